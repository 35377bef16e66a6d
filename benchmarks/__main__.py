"""Measures everything that the README says about speed: ``python -m benchmarks [names…] [--rounds N] [--quick]``.

Out: the table as Markdown on standard output, progress on standard error. A run of all rows that is not ``--quick``
writes the table into README.md between its markers. Exit code 1 when a figure is not reached.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks import bursts, naming, replaying, tiers, tracing
from benchmarks.measure import ROOT, Failed, Result
from tests.broker import ServerFailed, kafka


class Row(NamedTuple):
    """What stands in the table before anything is measured."""

    work: str
    beside: str
    goal: str


ROWS: dict[str, Row] = {
    "consume": Row("replay a topic of {events}, a filter keeps 0.1 %", "bare `consume()`", "≥ 40 %"),
    "kcat": Row("the same", "kcat to nothing, which decodes nothing", ""),
    "loop": Row("the same", "`poll()`, `fastavro`, `if`", "≥ 10 times"),
    "json": Row("all of them to JSON", "the loop with `json.dumps`", "≥ 8 times"),
    "columns": Row("all of them to columns", "the loop with `format`", "≥ 6 times"),
    "files": Row("replay the same from files, a filter keeps 0.1 %", "`fastavro.reader`, `if`", "≥ 10 times"),
    "dedup": Row("each event once: knowing {remembered}", "", "≤ 64 MiB"),
    "verify": Row("`--verify` of that topic: every digest", "its replay, a filter keeps 0.1 %", "≥ 50 %"),
    "verify-files": Row("`--verify` of those files", "their replay, a filter keeps 0.1 %", "≥ 50 %"),
    "agent": Row("agent at 100,000 binds/s, kernel to acknowledgement: CPU an event", "", "all, ≤ 5 µs"),
    "highest": Row("agent, highest rate without a loss", "", ""),
    "burst": Row("agent at 200,000 binds/s from two threads", "", "nothing lost, or declared"),
    "ring": Row("sizes of the ring at 200,000 binds/s", "", ""),
    "naming": Row("names of 500 pods put to an event: CPU", "one event after the other", "≤ 1 µs"),
    "churn": Row("5,000 pods in a minute, each binds once: agent with Kubernetes", "", "none wrong, ≤ 130 MiB, flat"),
    "bind-fails": Row("added to a `bind()` that fails", "bpftrace, same fields", "less, ≤ 1 µs"),
    "bind-works": Row("added to `socket`, `bind`, `close`", "bpftrace, same fields", "less"),
    **{
        f"tier-{tier}": Row(
            f"instructions added by tier `{tier}` to a `bind()` that fails, and to `socket`, `bind`, `close`",
            "bpftrace, same hooks",
            "less",
        )
        for tier in tiers.TIERS
    },
    "memory": Row("agent at 10,000 binds/s: RssAnon", "", "≤ 110 MiB, flat"),
    "help": Row("`--help`", "", "≤ 0.15 s"),
    "first-line": Row("first line of a replay of a small topic", "", "≤ 0.7 s"),
    "first-event": Row("first event of `bindsnoop`, from its start", "", "≤ 0.5 s"),
}
"""Every row, in the order of the table."""

_NEEDS_EVENTS = (*replaying.COMPARED, "first-line")
_NEEDS_KAFKA = (*_NEEDS_EVENTS, "agent", "highest", "burst", "ring", "memory")
_IN_GUESTS = tuple(f"tier-{tier}" for tier in tiers.TIERS)
_NEEDS_ROOT = ("churn", "agent", "highest", "burst", "ring", "memory", "first-event", *tracing.MODES)
_NEEDS_LOAD = (*_NEEDS_ROOT, *_IN_GUESTS)


class Size(NamedTuple):
    """How much is measured."""

    binds: int
    prefix: int
    agent_secs: float
    step_secs: float
    cost_secs: float
    memory_secs: float
    guest_rounds: int
    churn_secs: float
    remembered: int


FULL = Size(
    binds=2_000_000, prefix=100_000, agent_secs=30, step_secs=10, cost_secs=2, memory_secs=600, guest_rounds=3,
    churn_secs=60, remembered=100_000_000,
)  # fmt: skip
QUICK = Size(
    binds=200_000, prefix=20_000, agent_secs=5, step_secs=3, cost_secs=1, memory_secs=30, guest_rounds=1,
    churn_secs=12, remembered=10_000_000,
)  # fmt: skip


README = ROOT / "README.md"


def say(sentence: str) -> None:
    """Progress, for whoever waits."""
    print(f"{time.strftime('%H:%M:%S')} {sentence}", file=sys.stderr, flush=True)


def measured(names: Sequence[str], size: Size, rounds: int) -> Iterator[tuple[str, Result]]:
    """The rows that are named, as they are measured; the memory, which takes longest, at the end."""
    with contextlib.ExitStack() as stack:
        bootstrap = ""
        if set(names) & set(_NEEDS_KAFKA):
            bootstrap = stack.enter_context(kafka(heap="512m", jit_full=True)).bootstrap
        if set(names) & set(_NEEDS_EVENTS):
            with replaying.stored(bootstrap, size.binds, size.prefix) as store:
                say(f"{store.count:,} events are in the topic and in files, {store.kept:,} of them match the filter")
                compared = [name for name in names if name in replaying.COMPARED]
                if compared:
                    yield from replaying.compared(store, compared, rounds, say)
                if "first-line" in names:
                    yield "first-line", replaying.first_line(store, rounds)
        if "dedup" in names:
            yield "dedup", replaying.dedup_(size.remembered)
        if "help" in names:
            yield "help", replaying.help_(rounds)
        if "naming" in names:
            yield "naming", naming.naming(rounds, say)
        if "churn" in names:
            yield "churn", naming.churn(size.churn_secs, say)
        if "first-event" in names:
            yield "first-event", tracing.first_event(rounds)
        modes = [name for name in names if name in tracing.MODES]
        if modes:
            yield from tracing.cost(modes, rounds, size.cost_secs, say)
        if "agent" in names:
            yield "agent", tracing.at_rate(bootstrap, size.agent_secs)
        if "highest" in names:
            yield "highest", tracing.highest_rate(bootstrap, size.step_secs, say)
        if "burst" in names:
            yield "burst", bursts.burst(bootstrap, size.step_secs, rounds, say)
        if "ring" in names:
            yield "ring", bursts.rings(bootstrap, size.step_secs / 2, say)
        in_guests = [name for name in names if name in _IN_GUESTS]
        if in_guests:
            yield from tiers.beside_bpftrace(in_guests, min(rounds, size.guest_rounds), say)
        if "memory" in names:
            yield "memory", tracing.memory(bootstrap, size.memory_secs)


def table(results: dict[str, Result], size: Size, rounds: int) -> str:
    """Markdown: what was measured on, the rows in their order, and notes below them."""
    lines = [
        f"Measured by `make bench` on {_machine()}, everything in one run; median of {rounds} rounds, in parentheses "
        "the lowest and the highest.",
        "",
        "| work | ours | beside it | so | to reach | |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    below = []
    for name, row in ROWS.items():
        if name not in results:
            continue
        result = results[name]
        work = row.work.format(
            events=f"{size.binds / 1e6:g} million events", remembered=f"{size.remembered / 1e6:g} million events"
        )
        beside = ": ".join(part for part in (row.beside, result.beside) if part)
        mark = {True: "reached", False: "**missed**", None: ""}[result.reached]
        lines.append(f"| {work} | {result.ours} | {beside} | {result.judged} | {row.goal} | {mark} |")
        if result.note:
            below.append(f"* `{name}`: {result.note}.")
    loops = f"The loops read the first {size.prefix:,} events; their start counts once, the rest by the event."
    return "\n".join([*lines, "", *below, "", loops])


def _machine() -> str:
    model = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    cpus = len(os.sched_getaffinity(0))
    version = platform.release().partition("-")[0]
    return f"{cpus} CPUs ({model[1] if model else platform.machine()}), shared with the broker, Linux {version}"


def readme_with(text: str) -> str:
    """README.md with another table between its markers. Failed when it lacks them."""
    before, found, rest = README.read_text(encoding="utf-8").partition("<!-- bench -->\n")
    _, end, after = rest.partition("<!-- /bench -->")
    if not found or not end:
        raise Failed(f"{README.name} lacks the lines <!-- bench --> and <!-- /bench -->, where the table belongs")
    return f"{before}{found}{text}\n{end}{after}"


def main(arguments: Sequence[str]) -> int:
    """Measure, print, write; 2 when something cannot be measured here."""
    try:
        return _main(arguments)
    except (Failed, ServerFailed) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2


def _main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="What the README says about speed.")
    parser.add_argument("names", nargs="*", metavar="name", help=f"rows to measure: {', '.join(ROWS)}")
    parser.add_argument("--rounds", type=int, default=5, help="how often each contestant runs (default: 5)")
    parser.add_argument("--quick", action="store_true", help="a tenth of everything; the README stays as it is")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in ROWS]
    if unknown:
        parser.error(f"{unknown[0]} is no row; allowed are {', '.join(ROWS)}")
    names = [name for name in ROWS if name in (options.names or ROWS)]
    if set(names) & set(_NEEDS_ROOT) and os.geteuid() != 0:
        parser.error("tracing needs root; without it name other rows")
    if set(names) & set(_NEEDS_LOAD):
        subprocess.run(["make", "-s", "-C", str(ROOT / "benchmarks"), "bindload"], check=True)
    whole = len(names) == len(ROWS) and not options.quick
    if whole:
        readme_with("")
    # Without this a SIGTERM would end Python before the servers are stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    size = QUICK if options.quick else FULL
    results: dict[str, Result] = {}
    for name, result in measured(names, size, options.rounds):
        results[name] = result
        say(f"{name}: {' | '.join(part for part in result if isinstance(part, str) and part)}")
    text = table(results, size, options.rounds)
    print(text)
    if whole:
        README.write_text(readme_with(text), encoding="utf-8")
    return 0 if all(result.reached is not False for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
