"""What every measurement needs: figures with their spread, and processes with what they cost.

In: command lines. Out: ``Spread`` of what rounds gave, ``Cost`` of a process. Medians and ranges, never means: other
work on the machine only ever adds time.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
TICK_SECS = 1 / os.sysconf("SC_CLK_TCK")

Say = Callable[[str], None]
"""Tells whoever waits what goes on."""


class Failed(Exception):
    """A measurement that cannot be made; the sentence says why."""


class Spread(NamedTuple):
    """What several rounds gave."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Of at least one value."""
        found = list(values)
        return cls(statistics.median(found), min(found), max(found))

    def text(self, form: Callable[[float], str]) -> str:
        """``median (low to high)``; only the median when there is no spread."""
        if self.low == self.high:
            return form(self.median)
        return f"{form(self.median)} ({form(self.low)} to {form(self.high)})"


def ratios(above: Sequence[float], below: Sequence[float]) -> Spread:
    """Ratio of two contestants, round by round: what disturbs a whole round disturbs both."""
    return Spread.of(one / other for one, other in zip(above, below, strict=True))


def rate(events_per_sec: float) -> str:
    """``1234567`` → ``1.23 M/s``, ``12345`` → ``12 k/s``."""
    return f"{events_per_sec / 1e6:.2f} M/s" if events_per_sec >= 1e6 else f"{events_per_sec / 1e3:.0f} k/s"


class Result(NamedTuple):
    """One row as measured: our figure, the one beside it, and what is judged; ``reached`` None where nothing is."""

    ours: str
    beside: str
    judged: str
    reached: bool | None
    note: str = ""


class Cost(NamedTuple):
    """What a process took, and its last line on standard error."""

    wall_secs: float
    cpu_secs: float
    last_words: str


def environment() -> dict[str, str]:
    """This process's environment without settings of bindsnoop."""
    return {name: value for name, value in os.environ.items() if not name.startswith("BINDSNOOP")}


def run(command: Sequence[str | Path], allowed: Sequence[int] = (0,)) -> Cost:
    """Run a command to its end, its output thrown away. Failed when it ends otherwise than with an allowed code."""
    with subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    ) as process:
        start = time.monotonic()
        assert process.stderr is not None
        said = process.stderr.read().decode("utf-8", "replace").strip()
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.monotonic() - start
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in allowed:
        raise Failed(f"{Path(command[0]).name} ended with {process.returncode}: {said[-1000:]}")
    return Cost(wall, usage.ru_utime + usage.ru_stime, said.rpartition("\n")[2])


def interleaved(contestants: Mapping[str, Callable[[], float]], rounds: int, say: Say) -> dict[str, list[float]]:
    """Every contestant once a round, in turn, so that a slow minute of the machine hits all of them."""
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds):
        for name, contestant in contestants.items():
            value = contestant()
            found[name].append(value)
            say(f"round {number + 1} of {rounds}: {name} {value:.4g}")
    return found


def cpu_secs(pid: int) -> float:
    """CPU that a running process has taken, all its threads, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * TICK_SECS


def rss_anon_mib(pid: int) -> float:
    """Anonymous memory of a running process; maps of the kernel's ring are not in it."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise Failed(f"the process {pid} shows no RssAnon")
