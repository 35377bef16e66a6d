"""Faults from a shell.

``python -m tests.faults matrix`` makes every fault, one after the other, and prints a table; with ``--write`` it writes
that into docs/delivery.md between its markers, of a run that was not of all of them only the rows. ``--only`` names
some.

Exit code 1 when a row does not balance, or breaks before it can be counted; 2 when a server cannot be had.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from tests.broker import ServerFailed
from tests.faults import matrix, rows
from tests.faults.stage import guarded, stage
from tests.kernel.plugin import build

PAGE = Path(__file__).parents[2] / "docs" / "delivery.md"


def main(arguments: Sequence[str]) -> int:
    """Run the matrix."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description="Faults under load, counted.")
    commands = parser.add_subparsers(dest="what", required=True)
    every = commands.add_parser("matrix", help="make every fault and print the table")
    every.add_argument("--only", nargs="+", choices=rows.ROWS, metavar="NAME", help=", ".join(rows.ROWS))
    every.add_argument("--write", action="store_true", help="write the table, or the rows, into docs/delivery.md")
    options = parser.parse_args(arguments)
    # Without this a SIGTERM would end Python before the servers are stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return _matrix(options)
    except ServerFailed as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _matrix(options: argparse.Namespace) -> int:
    build()
    if options.write:
        page_with("")
    found: list[matrix.Row] = []
    broken: list[str] = []
    began = time.monotonic()
    with guarded() as broker:
        for name in options.only or rows.ROWS:
            row_began = time.monotonic()
            with stage(rows.ROWS[name].fault, broker) as place:
                try:
                    one = rows.ROWS[name].make(place)
                except Exception:  # one that breaks is told, and the others are still wanted
                    traceback.print_exc()
                    print(place.talk, file=sys.stderr, flush=True)
                    broken.append(name)
                    broker.stop()
                    broker.start()
                    continue
            found.append(one)
            verdict = "balances" if one.balances else f"DOES NOT BALANCE: {one}\n{place.said}{place.talk}"
            print(f"{name}: {verdict} ({time.monotonic() - row_began:.0f} s)", file=sys.stderr, flush=True)
    text = matrix.table(found)
    print(text)
    print(f"{len(found)} faults took {time.monotonic() - began:.0f} s", file=sys.stderr)
    for name in broken:
        print(f"{name} broke before it could be counted", file=sys.stderr)
    if options.write:
        PAGE.write_text(page_with(text, partly=bool(options.only or broken)), encoding="utf-8")
    return 0 if not broken and all(one.balances for one in found) else 1


def page_with(text: str, *, partly: bool = False) -> str:
    """docs/delivery.md with another table between its markers, or some of its rows. ValueError when it has none."""
    before, found, rest = PAGE.read_text(encoding="utf-8").partition("<!-- faults -->\n")
    table, end, after = rest.partition("<!-- /faults -->")
    if not found or not end:
        raise ValueError(f"{PAGE.name} lacks the lines <!-- faults --> and <!-- /faults -->, where the table belongs")
    if partly:
        text = matrix.merged(table.rstrip("\n"), text)
    return f"{before}{found}{text}\n{end}{after}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
