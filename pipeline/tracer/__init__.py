"""The edge to the kernel: binds as they happen come in, bursts of fixed-size records go out.

``open_tracer`` chooses how to look (the *tier*) by trying to attach, loads the programs of ``bpf/`` and gives a
``Tracer``. What a record means is not known here: it is bytes, and ``pipeline.records`` reads them. Loading is hidden
in one module a loader, so that a kernel that needs another one costs nobody else an import.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from pipeline.errors import TracerUnavailable, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    import numpy.typing as npt

    from pipeline.tracer.pins import Place

RING_BYTES = 16 << 20
"""Default size of the ring: about 39,000 binds. The smallest that lost nothing at 200,000 binds/s (docs/tracing.md)."""

MAX_RECORDS = 16384
"""Default limit of a burst, so that a batch stays bounded however long the reader was away."""

PINS = Path("/sys/fs/bpf/bindsnoop")
"""Where the agent of this node keeps in the kernel what is to outlive it."""

LOCK_PATH = Path("/run/bindsnoop/agent.lock")
"""Held by the agent of this node as long as it lives."""

TIERS = ("fexit", "kprobe", "tracepoint", "bcc")
"""Ways to look, best first: ``auto`` takes the first that attaches."""


@dataclass(frozen=True, slots=True)
class Burst:
    """What the ring held at one moment, at most ``max_records`` records, oldest first.

    ``records`` is a read-only ``uint8`` array of shape (n, record size), n at least 1, rows ``stride`` bytes apart: a
    view of the ring's own memory, valid until ``Tracer.release``. ``end`` is the place in the ring behind the last.
    """

    records: npt.NDArray[np.uint8]
    end: int


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the kernel is to report; whoever records leaves it empty. Empty collections do not restrict.

    ``pids`` process ids. ``ports`` ranges within 1 to 65535; an attempt matches when it asked for one or got one.
    ``only_success`` leaves out failed attempts. The kernel may let through more than is wanted, never less; what it
    leaves out is not counted as attempted either.
    """

    pids: tuple[int, ...] = ()
    ports: tuple[range, ...] = ()
    only_success: bool = False


class Tracer(Protocol):
    """A source of bursts. One thread reads; ``counters`` may be called from any.

    ``name`` is the tier, ``hooks`` are the programs that are attached. ``gaps`` names the kinds of bind that this
    tracer does not see, of ``coverage.GAPS``; ``notes`` are sentences about what it misses that its tier could see.

    ``epoch`` is the one in which ring and counters began, empty when none was given. ``resumed``: they are a former
    agent's, and nothing was missed since. ``pinned``: they outlive this process. ``before`` are tracers of other
    versions or settings that were found pinned, oldest first. They have ended; what they recorded comes before what
    this one does, and each waits to be read, in its own epoch, and then detached and closed.
    """

    name: str
    hooks: Sequence[str]
    notes: Sequence[str]
    gaps: Sequence[str]
    epoch: str
    resumed: bool
    before: Sequence[Tracer]

    @property
    def pinned(self) -> bool:
        """Whether what is bound while no agent lives waits in the ring for the next one."""

    def read(self, timeout_s: float, idle_s: float = 0.0) -> Burst | None:
        """Waits until a batch worth taking has come, at most ``timeout_s`` seconds, and gives all there is.

        While nothing at all is there it may wait up to ``idle_s`` seconds for the first record, and only then begins to
        count ``timeout_s``: a reader that has nothing to do sleeps. None when nothing came. ``read(0)`` takes what is
        there without waiting. The records stay in the ring until ``release``; a next ``read`` gives the ones behind
        them. TracerUnavailable when the ring is not readable.
        """

    def release(self, burst: Burst) -> None:
        """Gives the room of this burst, and of every earlier one, back to the kernel.

        Call it when the records are safe: a reader that dies before finds them again in a ring that outlives it.
        """

    def skip(self, end: int) -> None:
        """Gives back the room of bursts up to this ``Burst.end``, which a former agent got and could not release.

        Call it before the first ``read``, with the end of the last burst that is known to be safe: places in a ring go
        on when another process takes it over. TracerUnavailable when the ring never came so far.
        """

    def half_full(self) -> bool:
        """Whether half of the room is taken, by what was not read and by what was not released; costs no wait."""

    def counters(self) -> dict[str, int]:
        """Counts since the programs were loaded: ``attempted``, ``submitted``, ``lost_<cause>``, ``faulted``.

        They are never reset, and go on when another process takes the tracer over.
        ``attempted`` is the sum of all the others, exactly so when no bind is under way. Costs no wait.
        """

    def detach(self) -> None:
        """Stops tracing. What is in the ring can still be read, and the counters are final from here on.

        This ends the epoch, also for agents to come. An agent that is to be followed by another leaves it out.
        """

    def close(self) -> None:
        """Lets go of the ring and the lock. A second call does nothing. Bursts that are still held stay readable.

        What is pinned goes on; it is removed when it was detached and all that was read is released, so that records
        nobody has got wait for the next agent. What is not pinned ends.
        """


def open_tracer(
    tier: str = "auto",
    *,
    ring_bytes: int = RING_BYTES,
    wakeup_bytes: int | None = None,
    max_records: int = MAX_RECORDS,
    wanted: Wanted | None = None,
    exclusive: bool = False,
    lock_path: Path = LOCK_PATH,
    pins: Path | None = None,
    epoch: str | None = None,
    resume: bool = True,
) -> Tracer:
    """Starts to trace: loads and attaches the programs of ``tier``, or for ``auto`` of the first that attaches.

    ``ring_bytes`` is a power of two and at least a page. The reader is woken when ``wakeup_bytes`` wait (default: a
    quarter of the ring). ``exclusive`` takes the lock at ``lock_path`` first, so that a node has one agent.

    ``pins`` is a folder of a bpffs. What is pinned there by the same programs for the same settings goes on as it is;
    what others left there is ended, and is ``Tracer.before``. Else a new tracer is pinned there, as ``epoch`` (16 hex
    digits); where that is not possible ``notes`` says why. One process at a time has such a folder. Without ``resume``
    nothing goes on: all that is pinned there is ended when a new one has begun.

    ``wanted`` restricts what the kernel reports. UsageError when an argument is not what is allowed,
    TracerUnavailable when the kernel or the machine does not let us; its sentence says what is missing.
    """
    if tier != "auto" and tier not in TIERS:
        raise UsageError(f"there is no tier {tier!r}; allowed are auto, {', '.join(TIERS)}")
    if ring_bytes < mmap.PAGESIZE or ring_bytes & (ring_bytes - 1) or ring_bytes > 1 << 31:
        raise UsageError(
            f"a ring of {ring_bytes} bytes is not possible; allowed are powers of two from {mmap.PAGESIZE} to {1 << 31}"
        )
    if wakeup_bytes is None:
        wakeup_bytes = ring_bytes // 4
    if not 0 < wakeup_bytes <= ring_bytes // 2:
        raise UsageError(
            f"waking the reader at {wakeup_bytes} bytes is not possible in a ring of {ring_bytes}; "
            f"allowed are 1 to {ring_bytes // 2}"
        )
    if max_records < 1:
        raise UsageError(f"a burst of {max_records} records is not possible; allowed are 1 and more")

    if pins is not None and not re.fullmatch("[0-9a-f]{16}", epoch or ""):
        raise UsageError(f"the epoch {epoch!r} cannot be pinned; allowed are 16 hex digits")

    settings = _Settings(ring_bytes, wakeup_bytes, max_records, wanted or Wanted())
    tiers = TIERS if tier == "auto" else (tier,)
    with contextlib.ExitStack() as held:
        if exclusive:
            held.callback(os.close, _lock(lock_path))
        if pins is None:
            opened = _first_that_opens(tiers, settings)
            opened.epoch = epoch or ""
        else:
            opened = _open_pinned(tiers, settings, pins, epoch or "", held, resume=resume)
        opened.held.push(held.pop_all())
        return opened


def unpin(path: Path, lock_path: Path = LOCK_PATH) -> list[str]:
    """Ends every tracer that is pinned below ``path``, with the records in it; gives a sentence about each.

    TracerUnavailable while an agent lives, or when the pins cannot be removed.
    """
    from pipeline.tracer import libbpf, pins

    if not path.is_dir():
        return []
    lock = _lock(lock_path)
    try:
        return pins.remove_all(path, libbpf.unread)
    finally:
        os.close(lock)


class _Settings(NamedTuple):
    """What a tier is opened with."""

    ring_bytes: int
    wakeup_bytes: int
    max_records: int
    wanted: Wanted


def _first_that_opens(
    tiers: Sequence[str], settings: _Settings, *, before_bcc: Callable[[], None] = lambda: None
) -> _Opened:
    refusals: list[str] = []
    for name in tiers:
        try:
            if name == "bcc":
                before_bcc()
            return _loader(name)(name, **settings._asdict())
        except TracerUnavailable as refusal:
            refusals.append(str(refusal) if len(tiers) == 1 else f"{name}: {refusal}")
    raise TracerUnavailable("; ".join(refusals))


def _open_pinned(
    tiers: Sequence[str], settings: _Settings, path: Path, epoch: str, held: contextlib.ExitStack, *, resume: bool
) -> _Opened:
    """What is pinned below ``path`` goes on, or something new that is then pinned there."""
    from pipeline.tracer import libbpf, pins

    opened: _Opened
    try:
        place = held.enter_context(pins.opened(path))
    except pins.NoPins as refusal:
        opened = _first_that_opens(tiers, settings)
        opened.epoch, opened.notes = epoch, (*opened.notes, f"{_BLIND}: {refusal}")
        return opened

    digests = {
        name: libbpf.digest(
            name, ring_bytes=settings.ring_bytes, wakeup_bytes=settings.wakeup_bytes, wanted=settings.wanted
        )
        for name in tiers
        if name != "bcc"
    }
    found, lost = libbpf.take_over(place, wakeup_bytes=settings.wakeup_bytes, max_records=settings.max_records)
    with contextlib.ExitStack() as failed:
        for each in found:
            failed.callback(each.close)
        if resume and found and found[-1].digest in digests.values() and found[-1].attached:
            opened = found.pop()
        else:
            opened = _first_that_opens(tiers, settings, before_bcc=lambda: libbpf.hand_over(found, None))
            failed.callback(opened.close)
            opened.epoch = epoch
            try:
                opened.pin(place, epoch, digests.get(opened.name, ""))
            except pins.NoPins as refusal:
                opened.notes = (*opened.notes, f"{_BLIND}: {refusal}")
        libbpf.hand_over(found, opened)
        opened.notes = (*opened.notes, *lost)
        failed.pop_all()
    return opened


_BLIND: Final = "binds are not seen while the agent restarts"


class _Loader(Protocol):
    """Loads and attaches one tier. TracerUnavailable when that is not possible."""

    def __call__(
        self, name: str, *, ring_bytes: int, wakeup_bytes: int, max_records: int, wanted: Wanted
    ) -> _Opened: ...


class _Opened(Tracer, Protocol):
    """A tracer that can be given more to let go when it is closed."""

    held: contextlib.ExitStack

    def pin(self, place: Place, epoch: str, digest: str) -> None:
        """Keeps all of it in the kernel when the process ends. NoPins when that is not possible."""


def _loader(tier: str) -> _Loader:
    if tier == "bcc":
        from pipeline.tracer import bcc

        return bcc.open_tier
    from pipeline.tracer import libbpf

    return libbpf.open_tier


def _lock(path: Path) -> int:
    """Descriptor of the lock file, locked and with our pid in it; the lock ends with the descriptor."""
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise TracerUnavailable(
            f"the lock {path} of this node's agent cannot be opened: {error.strerror}; its folder must be writable"
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        other = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
        os.close(descriptor)
        raise TracerUnavailable(
            f"another agent traces this node already (pid {other} holds {path}); "
            "a node has one agent, stop that one first"
        ) from error
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode("ascii"), 0)
    return descriptor
