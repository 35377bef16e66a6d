"""Bursts: what the ring swallows while the agent is busy, or stands still.

In: a broker, and ``bindload`` with two threads that bind 200,000 times a second together. Out: a ``Result`` a row. Each
loss that is shown here is one that the stream declares; a loss that it does not declare makes the row a failure.
"""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.measure import Failed, Result, Say, Spread, rate
from benchmarks.tracing import Carried, Pause, carried
from pipeline.tracer import RING_BYTES

PER_SEC = 200_000
THREADS = 2
RINGS_MIB = (1, 2, 4, 8, 16, 32, 64)
PAUSES_SECS = (0.1, 0.2, 0.5)

_PAUSE_LOAD_SECS = 2.0
_PAUSE_AFTER_SECS = 0.7


def burst(bootstrap: str, seconds: float, rounds: int, say: Say) -> Result:
    """The default ring; the round that loses most is the one that counts."""
    runs = []
    for number in range(rounds):
        found = carried(bootstrap, f"burst-{number}", PER_SEC, seconds, threads=THREADS)
        say(f"round {number + 1} of {rounds}: {_made(found)}, {found.lost:,} lost, {found.cpu_us:.1f} µs")
        runs.append(found)
    worst = max(runs, key=lambda found: (not found.exact, found.lost))
    return Result(
        f"{worst.lost:,} lost",
        "",
        f"{worst.load.attempts:,} attempted, {worst.delivered:,} delivered, {worst.lost:,} declared lost",
        all(found.exact and found.load.attempts > 0.98 * PER_SEC * seconds for found in runs),
        f"{_made(worst)} from {THREADS} threads for {worst.load.seconds:.0f} s, the worst of {rounds} rounds; "
        f"a ring of {RING_BYTES >> 20} MiB; {Spread.of(found.cpu_us for found in runs).text(_us)} of CPU an event",
    )


class Held(NamedTuple):
    """What a ring lost: without a pause, and in a pause of each of ``PAUSES_SECS``."""

    mib: int
    lost: int
    lost_in_pause: tuple[int, ...]


def rings(bootstrap: str, seconds: float, say: Say) -> Result:
    """Sizes of the ring beside each other: what each loses, and how long the agent may stand still."""
    found = []
    for mib in RINGS_MIB:
        lost = _declared(bootstrap, mib, seconds, None)
        in_pause = (_declared(bootstrap, mib, _PAUSE_LOAD_SECS, Pause(_PAUSE_AFTER_SECS, secs)) for secs in PAUSES_SECS)
        held = Held(mib, lost, tuple(in_pause))
        say(f"ring of {mib} MiB: {held.lost:,} lost, in pauses {held.lost_in_pause}")
        found.append(held)
    default = next(held for held in found if held.mib == RING_BYTES >> 20)
    kept = [secs for secs, count in zip(PAUSES_SECS, default.lost_in_pause, strict=True) if not count]
    return Result(
        f"{default.mib} MiB: {_share(default.lost, seconds)} lost; the agent may stand still for "
        f"{_ms(max(kept, default=0))}",
        "",
        "",
        None,
        f"lost without a pause, and in one of {', '.join(map(_ms, PAUSES_SECS))}: "
        + "; ".join(
            f"{held.mib} MiB {_share(held.lost, seconds)}, {', '.join(map(_share, held.lost_in_pause, PAUSES_SECS))}"
            for held in found
        ),
    )


def _declared(bootstrap: str, mib: int, seconds: float, pause: Pause | None) -> int:
    """What a run with such a ring lost. Failed when that was not declared to the last one."""
    name = f"ring-{mib}-{pause.secs if pause else 0}"
    found = carried(bootstrap, name, PER_SEC, seconds, "--ring-bytes", f"{mib}MiB", threads=THREADS, pause=pause)
    if not found.exact:
        raise Failed(
            f"a ring of {mib} MiB lost {found.lost} of {found.load.attempts} binds by its own account, but "
            f"{found.delivered} were delivered, {found.others} of others and {found.holes} holes beside: {found.counts}"
        )
    return found.lost


def _made(found: Carried) -> str:
    return rate(found.load.attempts / found.load.seconds)


def _share(lost: int, seconds: float) -> str:
    """Of what is bound in so long."""
    return f"{min(1.0, lost / (PER_SEC * seconds)):.1%}" if lost else "nothing"


def _ms(secs: float) -> str:
    return f"{secs * 1000:.0f} ms"


def _us(value: float) -> str:
    return f"{value:.1f} µs"
