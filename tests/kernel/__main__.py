"""Other kernels from a shell.

``python -m tests.kernel run --kernel 5.10 [--arch aarch64] -- COMMAND…`` runs COMMAND in a guest, in a copy of this
checkout, prints what it prints and ends with its exit code. ``… matrix`` runs the corner-case suite in all of them and
prints a table; with ``--readme`` it writes that into README.md between its markers, of a run that was not of all of
them only the rows. ``… fetch`` fills the cache.

Exit code 1 when a case failed or a tier did not open where it should, 2 when a guest cannot be made or breaks.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import shutil
import signal
import sys
import time
from collections.abc import Sequence

from tests.kernel import guests, matrix

README = guests.ROOT / "README.md"

AT_ONCE = 2
"""Guests that run side by side; each emulates its CPUs with one thread."""


def main(arguments: Sequence[str]) -> int:
    """Run one of the sub-commands."""
    parser = argparse.ArgumentParser(prog="python -m tests.kernel", description="Other kernels, in QEMU.")
    commands = parser.add_subparsers(dest="what", required=True)
    run = commands.add_parser("run", help="run a command in a guest, in a copy of this checkout, and print its output")
    run.add_argument("--kernel", required=True, choices=guests.SUITES)
    run.add_argument("--arch", default="x86_64", choices=guests.MACHINES)
    run.add_argument("--extra-debs", default="", metavar="A,B!", help="further Debian packages; `!`: not what it needs")
    run.add_argument("--headers", action="store_true", help="with the headers of the kernel")
    run.add_argument("--timeout", type=float, default=120.0, metavar="SECONDS")
    run.add_argument("--memory", type=int, default=0, metavar="MIB", help="default: what the root image needs")
    run.add_argument("--console", action="store_true", help="print the kernel's console afterwards")
    run.add_argument("command", nargs=argparse.REMAINDER, help="-- COMMAND and its arguments")
    every = commands.add_parser("matrix", help="run the corner-case suite in every kernel and print the table")
    every.add_argument("--kernels", type=_list, default=list(guests.SUITES), metavar="A,B", help="default: all")
    every.add_argument("--arch", type=_list, default=list(guests.MACHINES), metavar="A,B", help="default: all")
    every.add_argument("--tiers", type=_list, default=[*matrix.TIERS, "bcc"], metavar="A,B", help="default: all")
    every.add_argument("--readme", action="store_true", help="write the table, or the rows of this run, into README.md")
    fetch = commands.add_parser("fetch", help="fetch every kernel and root image into the cache")
    fetch.add_argument("--renew", action="store_true", help="fetch again what Debian may have renewed")
    options = parser.parse_args(arguments)
    if options.what == "run":
        options.command = options.command[1:] if options.command[:1] == ["--"] else options.command
        if not options.command:
            parser.error("run needs a command after --")
    if options.what == "matrix":
        _check(parser, options)
    # Without this a SIGTERM would end Python before the guests are stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return {"run": _run, "matrix": _matrix, "fetch": _fetch}[options.what](options)
    except guests.GuestFailed as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _list(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    for name, given, allowed in (
        ("kernel", options.kernels, guests.SUITES),
        ("arch", options.arch, guests.MACHINES),
        ("tier", options.tiers, (*matrix.TIERS, "bcc")),
    ):
        for value in given:
            if value not in allowed:
                parser.error(f"{name} {value} is not known; allowed are {', '.join(allowed)}")


def _run(options: argparse.Namespace) -> int:
    result = guests.run(
        options.command,
        kernel=options.kernel,
        arch=options.arch,
        extra_debs=_list(options.extra_debs),
        headers=options.headers,
        files=matrix.built(options.arch),
        memory_mib=options.memory,
        timeout_s=options.timeout,
        echo=lambda text: print(text, end="", flush=True),
    )
    if options.console:
        print(result.console, file=sys.stderr)
    print(f"Linux {result.release}: exit code {result.returncode} after {result.seconds:.1f} s", file=sys.stderr)
    return result.returncode


def _matrix(options: argparse.Namespace) -> int:
    whole = (set(guests.SUITES), set(guests.MACHINES), {*matrix.TIERS, "bcc"})
    partly = whole != (set(options.kernels), set(options.arch), set(options.tiers))
    if options.readme:
        readme_with("")
    jobs = [
        (series, arch, tiers, False)
        for series, arch in matrix.PLACES
        if series in options.kernels
        and arch in options.arch
        and (tiers := tuple(tier for tier in matrix.tiers_of(series, arch) if tier in options.tiers))
    ]
    series, arch = matrix.BCC_PLACE
    if "bcc" in options.tiers and series in options.kernels and arch in options.arch:
        jobs.append((series, arch, ("bcc",), True))
    began = time.monotonic()
    found: list[matrix.Report] = []
    # What is fetched and built is fetched and built once, before guests wait for it.
    for series, arch, _, bcc in jobs:
        guests.prepare(series, arch, matrix.BCC_DEBS if bcc else (), headers=bcc)
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        # The one with bcc takes longest, so it begins first; the table keeps the order of the jobs.
        first = {job: pool.submit(matrix.reports, *job[:3], bcc=True) for job in jobs if job[3]}
        runs = [first.get(job) or pool.submit(matrix.reports, *job[:3]) for job in jobs]
        for run in runs:
            for report in run.result():
                _say(report)
                found.append(report)
    text = matrix.table(found)
    print(text)
    print(f"{len(jobs)} guests took {time.monotonic() - began:.0f} s", file=sys.stderr)
    if options.readme:
        README.write_text(readme_with(text, partly=partly), encoding="utf-8")
    return 0 if all(report.well for report in found) else 1


def _say(report: matrix.Report) -> None:
    load = "did not open" if report.load_s is None else f"loaded in {report.load_s:.2f} s"
    print(
        f"Linux {report.release}, {report.arch}, {report.tier}: {report.passed} passed, {report.failed} failed, "
        f"{report.skipped.total()} not possible there, {report.events} events, {load}",
        file=sys.stderr,
        flush=True,
    )
    if report.broken:
        print(report.broken, file=sys.stderr, flush=True)


def _fetch(options: argparse.Namespace) -> int:
    if options.renew:
        for name in ("apt-*", "kernel-*", "headers-*", "userland-*", "root-*", "extra-*"):
            for folder in guests.cache().glob(name):
                shutil.rmtree(folder)
    for series, arch in matrix.PLACES:
        guests.prepare(series, arch)
    guests.prepare(*matrix.BCC_PLACE, matrix.BCC_DEBS, headers=True)
    print(guests.cache())
    return 0


def readme_with(text: str, *, partly: bool = False) -> str:
    """README.md with another table between its markers, or with some of its rows. GuestFailed when it lacks them."""
    before, found, rest = README.read_text(encoding="utf-8").partition("<!-- kernels -->\n")
    table, end, after = rest.partition("<!-- /kernels -->")
    if partly:
        text = matrix.merged(table.rstrip("\n"), text)
    if not found or not end:
        raise guests.GuestFailed(
            f"{README.name} lacks the lines <!-- kernels --> and <!-- /kernels -->, where the table belongs"
        )
    return f"{before}{found}{text}\n{end}{after}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
