"""Runs what asks for ``watch`` once for each tier of tracing, and says at the end what each tier saw.

A plugin of pytest: ``-p tests.kernel.plugin`` where there is no conftest, as in a guest. ``--tier NAME``, as often as
wanted, chooses; without it every tier that can be opened on this kernel is taken, found by trying. At the end there is
one line of JSON a tier, behind ``@@bindsnoop``, for whoever runs this elsewhere and collects.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline import records
from pipeline.errors import TracerUnavailable
from pipeline.tracer import TIERS, Burst, Tracer, open_tracer

ROOT = Path(__file__).parent.parent.parent

Event = dict[str, Any]

_watches: dict[str, Watch] = {}
_refusals: dict[str, str] = {}
_outcomes: dict[str, Counter[str]] = {}
_skipped: dict[str, list[tuple[str, str]]] = {}
_tier_of: dict[str, str] = {}


def bursts(tracer: Tracer) -> Iterator[Burst]:
    """What the ring holds now, released one after the other."""
    while burst := tracer.read(0):
        yield burst
        tracer.release(burst)


def events(tracer: Tracer, pid: int | None = None) -> list[Event]:
    """What the ring holds now of this process, or of another, oldest first."""
    found: list[Event] = []
    for burst in bursts(tracer):
        batch = records.decode(burst.records, time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME))
        found += [row for row in batch.to_pylist() if row["pid"] == (pid or os.getpid())]
    # A buffer a CPU, as bcc has them, is read one after the other.
    return sorted(found, key=lambda event: event["boottime_ns"])


class Watch:
    """One tier, open for a whole run. ``seen`` counts the events that tests have asked for."""

    def __init__(self, tier: str) -> None:
        begin = time.monotonic()
        self.tracer = open_tracer(tier, ring_bytes=1 << 20)
        self.load_s = time.monotonic() - begin
        self.tier = self.tracer.name
        self.gaps = frozenset(self.tracer.gaps)
        self.seen = 0

    def clear(self) -> None:
        """Forgets what the ring holds."""
        events(self.tracer)

    def events(self, pid: int | None = None) -> list[Event]:
        """What the ring holds now of this process, or of another, oldest first."""
        found = events(self.tracer, pid)
        self.seen += len(found)
        return found


@functools.cache
def build() -> None:
    """The BPF object and the binding process of this source, where there is a compiler; a guest brings them along."""
    if shutil.which("make"):
        for folder in ("bpf", "tests/kernel"):
            subprocess.run(["make", "-s", "-C", ROOT / folder], check=True)


@functools.cache
def available() -> tuple[str, ...]:
    """Tiers that can be opened here, best first; why the others cannot is remembered for the end of the run."""
    build()
    found = []
    for tier in TIERS:
        try:
            open_tracer(tier).close()
        except TracerUnavailable as refusal:
            _refusals[tier] = str(refusal)
        else:
            found.append(tier)
    return tuple(found)


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--tier``."""
    parser.addoption(
        "--tier", action="append", metavar="NAME", help="watch binds with this tier; default: each that can be opened"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that watches runs for each tier; all tests of one tier before the next one's."""
    if "tier" in metafunc.fixturenames:
        tiers = metafunc.config.getoption("--tier")
        if not tiers and os.geteuid() == 0:
            tiers = available()
        # Where nothing can be opened the tests must say why.
        metafunc.parametrize("tier", tiers or ("auto",), scope="session")


def pytest_itemcollected(item: pytest.Item) -> None:
    """Remembers whose test it is."""
    if isinstance(item, pytest.Function) and hasattr(item, "callspec") and "tier" in item.callspec.params:
        _tier_of[item.nodeid] = item.callspec.params["tier"]


@pytest.fixture(scope="session")
def watch(tier: str) -> Iterator[Watch]:
    """The tier, attached."""
    build()
    opened = Watch(tier)
    _watches[tier] = opened
    with contextlib.closing(opened.tracer):
        yield opened


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Counts each test once, as its tier's."""
    tier = _tier_of.get(report.nodeid)
    if tier is None:
        return
    outcomes = _outcomes.setdefault(tier, Counter())
    if report.failed:
        outcomes["failed"] += 1
    elif report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        _skipped.setdefault(tier, []).append((report.nodeid, reason.removeprefix("Skipped: ")))
    elif report.when == "call":
        outcomes["passed"] += 1


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line a tier: what passed, and why what did not run did not."""
    for tier, outcomes in _outcomes.items():
        watch = _watches.get(tier)
        _say(
            terminalreporter,
            tier=tier,
            passed=outcomes["passed"],
            failed=outcomes["failed"],
            skipped=_skipped.get(tier, []),
            events=watch.seen if watch else 0,
            load_s=round(watch.load_s, 3) if watch else None,
            gaps=sorted(watch.gaps) if watch else [],
        )
    for tier, reason in _refusals.items():
        _say(terminalreporter, tier=tier, passed=0, failed=0, skipped=[], events=0, load_s=None, refused=reason)


def _say(reporter: pytest.TerminalReporter, **fields: Any) -> None:
    reporter.ensure_newline()
    reporter.write_line("@@bindsnoop " + json.dumps(fields))
