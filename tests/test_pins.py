"""What outlives an agent: a ring that goes on while nobody reads it, and the way from one version to the next.

Agents are processes that are killed by SIGKILL; the bpffs is mounted for a test alone and gone with it. Whatever is
counted here was bound by one process, whose attempts fail and are numbered by what they ask for.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import mmap
import multiprocessing
import multiprocessing.connection
import os
import random
import re
import signal
import struct
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from pipeline import records
from pipeline.errors import TracerUnavailable, UsageError
from pipeline.tracer import Burst, Tracer, Wanted, host, libbpf, open_tracer, pins
from pipeline.tracer.ring import Ring
from tests.commands import Done, bpffs, run, until
from tests.kernel.binds import bind, tcp
from tests.kernel.plugin import build

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="tracing needs root")

FORK = multiprocessing.get_context("fork")
MANY = 1 << 26 if os.sysconf("SC_AVPHYS_PAGES") * mmap.PAGESIZE > 1 << 30 else 1 << 25
"""Size of a ring that does not overflow while a process binds as fast as it can; slow machines have less room."""

EPOCHS = tuple(f"{number:016x}" for number in range(0x19B_0000_0000_0000, 0x19B_0000_0000_0000 + 1000))


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    """The BPF object of this source."""
    build()


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder in a bpffs of this test's own, which every process of this user can reach."""
    with bpffs() as folder:
        yield folder


class Binder:
    """A process that binds when it is told to. ``pid`` is known before; ``next`` is the number of the next attempt."""

    def __init__(self) -> None:
        self._orders, orders = FORK.Pipe()
        self._going = FORK.RawValue("b", 0)
        self._process = FORK.Process(target=self._run, args=(orders,), daemon=True)
        self._process.start()
        self.pid: int = self._process.pid or 0
        self.next = 1

    def begin(self, count: int = 1 << 30, pause_secs: float = 0.0) -> None:
        """So many attempts from now on, or until ``wait`` says that it is enough; a pause between two of them."""
        self._going.value = 1 if pause_secs else 2
        self._orders.send((range(self.next, self.next + count), pause_secs))

    def hurry(self) -> None:
        """No pauses any more."""
        self._going.value = 2

    def wait(self, *, enough: bool = False) -> None:
        """Until what was begun has ended."""
        if enough:
            self._going.value = 0
        self.next = self._orders.recv()

    def bind(self, count: int) -> list[int]:
        """So many attempts, one after the other; their numbers."""
        first = self.next
        self.begin(count)
        self.wait()
        return list(range(first, self.next))

    def end(self) -> None:
        """The process ends."""
        self._process.kill()
        self._process.join()

    def _run(self, orders: multiprocessing.connection.Connection) -> None:
        while True:
            (asked, pause_secs), number = orders.recv(), 0
            with tcp() as made:
                for number in asked:
                    bind(made, f"192.0.2.{number >> 16}", number & 0xFFFF)
                    if self._going.value == 1:
                        time.sleep(pause_secs)
                    if not self._going.value:
                        break
            orders.send(number + 1)


@pytest.fixture
def binder() -> Iterator[Binder]:
    """The one process whose attempts are looked at."""
    made = Binder()
    yield made
    made.end()


class Read(NamedTuple):
    """A record by its place in the ring, and the number of the attempt."""

    at: int
    number: int


STRIDE = 8 + records.RECORD.itemsize


def rows(burst: Burst) -> list[Read]:
    """The records of a burst in which none was passed over."""
    record = np.ascontiguousarray(burst.records).view(records.RECORD)[:, 0]
    numbers = (record["asked_addr"][:, 3].astype(int) << 16 | record["asked_port"]).tolist()
    return [Read(burst.end - (len(numbers) - at) * STRIDE, number) for at, number in enumerate(numbers)]


def rest(tracer: Tracer) -> list[int]:
    """Numbers of everything that is in the ring, in order; it is released."""
    found = []
    while burst := tracer.read(0):
        found += [row.number for row in rows(burst)]
        tracer.release(burst)
    return found


def balance(tracer: Tracer) -> int:
    """Attempts that were submitted; none was lost, and all are accounted for."""
    counts = tracer.counters()
    assert counts["attempted"] == sum(counts.values()) - counts["attempted"]
    assert counts["attempted"] == counts["submitted"]
    return counts["submitted"]


class Lives:
    """Agents that live below one place, one after the other, and keep what they read in a file."""

    def __init__(self, place: Path, tier: str, binder: Binder, kept: Path) -> None:
        self.place = place
        self.tier = tier
        self.wanted = Wanted(pids=(binder.pid,))
        self.epochs = iter(EPOCHS)
        self.kept = kept
        self.attached = FORK.Event()
        kept.touch()

    def open(self, ring_bytes: int = 1 << 23) -> Tracer:
        """A tracer of this process."""
        return open_tracer(
            self.tier, ring_bytes=ring_bytes, wanted=self.wanted, pins=self.place, epoch=next(self.epochs)
        )

    def one(self, prepare: Callable[[], None] = lambda: None, ring_bytes: int = 1 << 23) -> BaseProcess:
        """A process that reads for ever."""
        epoch = next(self.epochs)

        def live() -> None:
            prepare()
            tracer = open_tracer(self.tier, ring_bytes=ring_bytes, wanted=self.wanted, pins=self.place, epoch=epoch)
            kept = os.open(self.kept, os.O_WRONLY | os.O_APPEND)
            self.attached.set()
            while True:
                burst = tracer.read(0.001)
                if burst is not None:
                    os.write(kept, b"".join(struct.pack("=QQ", *row) for row in rows(burst)))
                    tracer.release(burst)

        process = FORK.Process(target=live, daemon=True)
        process.start()
        return process

    def until_it_reads(self, binder: Binder) -> None:
        """The first process is a whole agent: something that the binder made has come to its file."""
        assert self.attached.wait(20)
        binder.bind(20)
        until(lambda: self.kept.stat().st_size > 0)

    def read(self) -> dict[int, int]:
        """Numbers by place in the ring, of all that was read. What is read again is the same."""
        found: dict[int, int] = {}
        for at, number in struct.iter_unpack("=QQ", self.kept.read_bytes()):
            assert found.setdefault(at, number) == number
        return found


def killed(process: BaseProcess) -> None:
    """The process is no more."""
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def kernel() -> tuple[int, ...]:
    """Version of the kernel."""
    return tuple(map(int, re.findall(r"\d+", os.uname().release)[:2]))


def can_be_pinned(tier: str) -> bool:
    """What docs/tracing.md says of this kernel."""
    return tier == "fexit" or (tier != "bcc" and kernel() >= (5, 15))


@pytest.fixture
def lives(place: Path, tier: str, binder: Binder, tmp_path: Path) -> Lives:
    """Agents of one tier, where it can be pinned."""
    if not can_be_pinned(tier):
        pytest.skip("links to perf events cannot be pinned before Linux 5.15, and nothing of bcc ever")
    return Lives(place, tier, binder, tmp_path / "kept")


def pinned(place: Path) -> list[str]:
    """What there is below a place, by epoch."""
    return sorted(path.name for path in place.iterdir())


def test_whether_a_tier_can_be_pinned(tier: str, place: Path) -> None:
    """It is where docs/tracing.md says so, and else a note says why; what could not be pinned leaves nothing there."""
    with contextlib.closing(open_tracer(tier, ring_bytes=1 << 16, pins=place, epoch=EPOCHS[0])) as tracer:
        notes = [note for note in tracer.notes if note.startswith("binds are not seen while the agent restarts: ")]
        assert (tracer.pinned, notes == []) == (can_be_pinned(tier), can_be_pinned(tier))
        assert len(pinned(place)) == tracer.pinned
        tracer.detach()
    assert pinned(place) == []


# --- one tracer, many agents --------------------------------------------------------------------------------------


def test_what_is_bound_while_no_agent_lives_waits(lives: Lives, binder: Binder) -> None:
    """After kill -9 the next agent goes on in the same epoch, ring and counters, and finds what was bound meanwhile."""
    agent = lives.one()
    lives.until_it_reads(binder)
    killed(agent)
    (folder,) = pinned(lives.place)
    binder.bind(100)

    with contextlib.closing(lives.open()) as tracer:
        read = lives.read()
        tracer.skip(max(read) + STRIDE)
        waited = rest(tracer)

        assert [*read.values(), *waited] == list(range(1, binder.next))
        assert waited[-100:] == list(range(binder.next - 100, binder.next))
        assert (tracer.resumed, tracer.pinned, list(tracer.before)) == (True, True, [])
        assert tracer.epoch == folder.partition("-")[0] == EPOCHS[0]
        assert pinned(lives.place) == [folder]
        assert balance(tracer) == binder.next - 1
        assert binder.bind(3) == rest(tracer)
        tracer.detach()
    assert pinned(lives.place) == []


def test_a_tracer_that_goes_on_is_what_it_was(lives: Lives) -> None:
    """Hooks, gaps and notes are those of the tracer that was attached."""
    first = lives.open()
    first.close()
    with contextlib.closing(lives.open()) as second:
        assert (second.name, second.hooks) == (first.name, first.hooks)
        assert (second.gaps, second.notes, second.resumed) == (first.gaps, first.notes, True)
        second.detach()


def test_agents_killed_at_random_moments(lives: Lives, binder: Binder) -> None:
    """Whenever an agent is killed: every bind since the first was attached is read or waits, once; counters agree."""
    chance = random.Random(6)
    first = lives.one()
    lives.until_it_reads(binder)
    # The ring holds what is bound in two seconds in which nobody reads.
    binder.begin(pause_secs=0.0001)
    killed(first)
    for _ in range(12):
        agent = lives.one()
        time.sleep(chance.uniform(0, 0.08))
        killed(agent)
    binder.wait(enough=True)

    with contextlib.closing(lives.open()) as tracer:
        tracer.detach()
        read = lives.read()
        tracer.skip(max(read) + STRIDE)
        numbers = [*read.values(), *rest(tracer)]
        assert numbers == list(range(1, binder.next))
        assert balance(tracer) == len(numbers)
    assert pinned(lives.place) == []


def test_an_agent_killed_in_the_middle_of_pinning(lives: Lives, binder: Binder) -> None:
    """Whichever pin was its last: the next agent removes what is half made, and there is one tracer, not two."""
    with contextlib.closing(lives.open()) as tracer:
        steps = 1 + len(list((lives.place / pinned(lives.place)[0]).iterdir()))
        tracer.detach()
    for step in {*range(0, steps, 3), steps - 1}:
        agent = lives.one(prepare=lambda step=step: die_at(step))  # type: ignore[misc]
        agent.join()
        assert agent.exitcode == -signal.SIGKILL
        assert [name[:5] for name in pinned(lives.place)] == ["half-"]

    with contextlib.closing(lives.open()) as tracer:
        assert [name[:16] for name in pinned(lives.place)] == [tracer.epoch]
        assert not tracer.resumed
        assert binder.bind(10) == rest(tracer)
        tracer.detach()


def die_at(step: int) -> None:
    """This process is killed just before it makes its pin of this number."""
    steps = iter(range(step))

    def dying(real: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: object) -> None:
            if next(steps, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            real(*arguments)

        return call

    libbpf._pin = dying(libbpf._pin)
    pins.write = dying(pins.write)
    Path.rename = dying(Path.rename)  # type: ignore[assignment,method-assign]


def test_a_closed_tracer_holds_no_ring(lives: Lives) -> None:
    """Its memory goes back with the last reference; an agent that has drained an old ring does not look for cycles."""
    gc.disable()
    try:
        tracer = lives.open()
        tracer.detach()
        tracer.close()
        gone = weakref.ref(tracer)
        del tracer
        assert gone() is None
    finally:
        gc.enable()


def test_a_second_agent_is_told_so(lives: Lives) -> None:
    """One process at a time has the pins, whatever lock it holds besides."""
    with contextlib.closing(lives.open()) as tracer:
        with pytest.raises(TracerUnavailable, match=r"another agent lives on the pins below .*/pins"):
            lives.open()
        tracer.detach()


# --- the end ------------------------------------------------------------------------------------------------------


def test_detaching_ends_the_epoch(lives: Lives, binder: Binder) -> None:
    """After ``detach`` nothing is recorded; pins whose records were read are gone, and the next tracer is a new one."""
    tracer = lives.open()
    binder.bind(5)
    tracer.detach()
    binder.bind(5)
    assert rest(tracer) == [1, 2, 3, 4, 5]
    assert balance(tracer) == 5
    tracer.close()
    assert pinned(lives.place) == []
    with contextlib.closing(lives.open()) as following:
        assert not following.resumed
        following.detach()


def test_records_that_nobody_got_are_kept(lives: Lives, binder: Binder) -> None:
    """A detached tracer whose records were not released is the next one's ``before``, under its own epoch."""
    tracer = lives.open()
    binder.bind(5)
    tracer.detach()
    assert tracer.read(0) is not None
    tracer.close()

    with contextlib.closing(lives.open()) as following:
        (before,) = following.before
        binder.bind(2)
        assert (before.epoch, before.pinned, following.resumed) == (tracer.epoch, True, False)
        assert rest(before) == [1, 2, 3, 4, 5]
        assert balance(before) == 5
        before.detach()
        before.close()
        assert [name[:16] for name in pinned(lives.place)] == [following.epoch]
        assert rest(following) == [6, 7]
        following.detach()


def test_a_wrong_epoch(place: Path) -> None:
    """What is pinned has an epoch for its name."""
    for epoch in (None, "", "12", "../0123456789abcd"):
        with pytest.raises(UsageError, match="allowed are 16 hex digits"):
            open_tracer(pins=place, epoch=epoch)


# --- from one version to the next ---------------------------------------------------------------------------------

OTHER_RING = 1 << 22


def test_another_version_takes_over(lives: Lives, binder: Binder, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a process binds as fast as it can, each of its binds is told by one of the two, in its own epoch."""
    real = libbpf.hand_over

    def hand_over(olds: Sequence[libbpf.LibbpfTracer], new: Tracer | None) -> None:
        # Loading takes seconds on slow machines, in which the ring would overflow.
        binder.hurry()
        real(olds, new)

    for _ in range(3):
        monkeypatch.setattr(libbpf, "hand_over", real)
        old = lives.open(ring_bytes=MANY)
        binder.bind(10)
        binder.begin(pause_secs=0.0002)
        old.close()
        monkeypatch.setattr(libbpf, "hand_over", hand_over)
        with contextlib.closing(lives.open(ring_bytes=MANY // 2)) as new:
            binder.wait(enough=True)
            binder.bind(10)
            (before,) = new.before
            told, following = rest(before), rest(new)
            counts = new.counters()
            # Nobody reads meanwhile: on a slow machine the new ring is full in the end, and has said so.
            lost = counts["lost_ring_full"]
            assert (before.epoch, before.pinned, new.resumed) == (old.epoch, True, False)
            assert told
            assert following
            assert told + following == list(range(told[0], binder.next - lost))
            assert (balance(before), counts["submitted"]) == (len(told), len(following))
            assert counts["attempted"] == counts["submitted"] + lost
            assert new.notes == old.notes
            before.detach()
            new.detach()
        assert pinned(lives.place) == []


@pytest.mark.parametrize("step", range(4))
def test_killed_while_another_version_takes_over(lives: Lives, binder: Binder, step: int) -> None:
    """Killed before the old one was ended, before the moment was chosen, after, or while the old one was drained."""
    old = lives.open()
    binder.bind(10)
    old.close()
    agent = lives.one(prepare=lambda: die_in_hand_over(step), ring_bytes=OTHER_RING)
    agent.join()
    assert len(pinned(lives.place)) == 2
    binder.bind(10)

    with contextlib.closing(lives.open(ring_bytes=OTHER_RING)) as new:
        (before,) = new.before
        assert new.resumed
        told, following = rest(before), rest(new)
        assert told + following == list(range(1, 21))
        assert (balance(before), balance(new)) == (len(told), len(following))
        before.detach()
        new.detach()
    assert pinned(lives.place) == []


def die_in_hand_over(step: int) -> None:
    """This process is killed in the middle of it."""

    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if step == 0:
        libbpf.LibbpfTracer.shut = die  # type: ignore[method-assign]
    elif step == 1:
        libbpf._divide = die  # type: ignore[assignment]
    elif step == 2:
        libbpf._quiet_moment = die  # type: ignore[assignment]
    else:
        libbpf.LibbpfTracer.read = die  # type: ignore[method-assign, assignment]


def test_back_to_the_version_before(lives: Lives, binder: Binder) -> None:
    """A downgrade in the middle of an upgrade: the old one has a follower and is not gone on with; all are drained."""
    lives.open().close()
    binder.bind(3)
    agent = lives.one(prepare=lambda: die_in_hand_over(0), ring_bytes=OTHER_RING)
    agent.join()
    binder.bind(3)

    with contextlib.closing(lives.open()) as third:
        first, second = third.before
        binder.bind(3)
        assert (first.epoch < second.epoch < third.epoch, third.resumed) == (True, False)
        told = [rest(first), rest(second), rest(third)]
        assert [number for numbers in told for number in numbers] == list(range(1, 10))
        for tracer, numbers in zip((first, second, third), told, strict=True):
            assert balance(tracer) == len(numbers)
            tracer.detach()
    assert pinned(lives.place) == []


def test_a_ring_of_another_form(lives: Lives, binder: Binder, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a version cannot read it declares, in bytes, and removes."""
    with monkeypatch.context() as patch:
        patch.setattr(libbpf, "_FORM", "bind_event 4711; 2")
        old = lives.open()
        binder.bind(4)
        old.close()

    with contextlib.closing(lives.open()) as new:
        assert [note for note in new.notes if note not in old.notes] == [
            f"epoch {old.epoch} left {4 * STRIDE} bytes of records that this version cannot read; they are lost"
        ]
        assert (list(new.before), [name[:16] for name in pinned(lives.place)]) == ([], [new.epoch])
        new.detach()


def test_pins_that_are_not_whole(lives: Lives, binder: Binder) -> None:
    """Where somebody took a pin away the rest is removed too, said, and a new tracer begins."""
    lives.open().close()
    (folder,) = lives.place.iterdir()
    next(folder.glob("link_*")).unlink()

    with contextlib.closing(lives.open()) as new:
        assert new.notes[-1] == f"what epoch {folder.name[:16]} left pinned is not whole, and was removed"
        assert not new.resumed
        assert binder.bind(2) == rest(new)
        new.detach()


def test_the_form_names_what_is_shared() -> None:
    """The sizes in it are those that bpf/bind_event.h asserts."""
    header = (ROOT / "bpf" / "bind_event.h").read_text(encoding="ascii")
    for name, size in re.findall(r"(bind_\w+) (\d+)", libbpf._FORM):
        assert size == str(records.RECORD.itemsize) or f"sizeof(struct {name}) == {size}" in header


@pytest.mark.parametrize("seed", range(50))
def test_the_moment_divides_no_bind(seed: int) -> None:
    """Of binds that two tracers see, in either order and with pauses in between, none has one time on each side."""
    chance = random.Random(seed)
    first, last, pairs = 1_000_000, 21_000_000, []
    for _ in range(chance.randint(1, 4)):
        now = chance.randrange(30_000)
        while now < 22_000_000:
            began = now + chance.choice((2_000, 3_000, 5_000, 60_000))
            now = began + (3_000_000 if chance.random() < 0.0003 else chance.choice((800, 1_000)))
            pairs.append((began, now))
    behind = chance.random() < 0.5
    old = np.array([pair[behind] for pair in pairs if pair[behind] < last], np.uint64)
    new = np.array([pair[not behind] for pair in pairs if pair[not behind] >= first - 5_000], np.uint64)

    cut, quiet_ns = libbpf._quiet_moment(old, new, first, last)

    assert first <= cut <= last
    assert quiet_ns >= 20_000
    assert [pair for pair in pairs if pair[0] < cut <= pair[1]] == []


def ring_of(times: list[int], released: int = 0) -> Ring:
    """A reader of a ring of one page with records that are nothing but a time, of which the first are released."""
    page = mmap.PAGESIZE
    memory = os.memfd_create("ring")
    os.truncate(memory, 4 * page)
    os.pwrite(memory, struct.pack("=Q", 16 * released), 0)
    os.pwrite(memory, struct.pack("=Q", 16 * len(times)), page)
    os.pwrite(memory, b"".join(struct.pack("=IIQ", 8, 0, each) for each in times), 2 * page)
    ring = Ring(memory, page, wakeup_bytes=1, max_records=3, wait=lambda _: None)
    os.close(memory)
    return ring


def taken(ring: Ring) -> list[int]:
    """Times of all that it gives; they are released."""
    found: list[int] = []
    while burst := ring.read(0):
        found += burst.records.view(np.uint64)[:, 0].tolist()
        assert not ring.empty()
        ring.release(burst)
    return found


def test_a_ring_gives_what_lies_within_its_bounds() -> None:
    """It begins behind what was released; of what is not its own it gives nothing, and gives back the room."""
    times = [1, 5, 2, 9, 3, 7, 4, 8, 9, 9, 9, 9, 9, 1]
    for released in range(len(times) + 1):
        for first, end in ((0, 0), (3, 0), (0, 8), (3, 8), (20, 0), (0, 1)):
            ring = ring_of(times, released)
            ring.since_ns, ring.until_ns = first, end
            assert ring.times().tolist() == times[released:]
            expected = [each for each in times[released:] if each >= first and (each < end or not end)]
            assert taken(ring) == expected
            assert ring.empty()
            assert ring.waiting_bytes() == 0


def test_what_is_held_is_not_given_back() -> None:
    """Room behind a burst that was not released stays, even of records that are passed over."""
    ring = ring_of([1, 1, 1, 9, 9, 9])
    ring.until_ns = 5
    burst = ring.read(0)
    assert burst is not None
    assert ring.read(0) is None
    assert (ring.waiting_bytes(), ring.empty()) == (16 * 6, False)
    ring.release(burst)
    assert ring.empty()


def test_a_former_agents_bursts_are_skipped() -> None:
    """From the end of a burst that is safe on, nothing before it is given again; a place that never was is refused."""
    former = ring_of([1, 2, 3, 4, 5, 6, 7])
    burst = former.read(0)
    assert burst is not None

    for released in (0, 2, 5):
        ring = ring_of([1, 2, 3, 4, 5, 6, 7], released)
        ring.skip(burst.end)
        assert ring.waiting_bytes() == 16 * (7 - max(3, released))
        assert taken(ring) == [1, 2, 3, 4, 5, 6, 7][max(3, released) :]
    with pytest.raises(TracerUnavailable, match="place 10000 is none of this ring, whose newest record ends at 112"):
        ring_of([1, 2, 3, 4, 5, 6, 7]).skip(10_000)


# --- uninstalling -------------------------------------------------------------------------------------------------


def unpinned(place: Path, lock: Path) -> Done:
    """``bindsnoop-agent --unpin``."""
    return run("bindsnoop-agent", "--unpin", "--pins", place, "--lock", lock)


def probes_defined(tier: str) -> set[bytes]:
    """Our definitions in tracefs; a tracer of another test may have some all the time."""
    if tier != "kprobe":
        return set()
    with host.tracefs("to look") as root:
        events = os.open("kprobe_events", os.O_RDONLY, dir_fd=root)
    try:
        return {line for line in os.read(events, 1 << 16).splitlines() if b"bindsnoop/" in line}
    finally:
        os.close(events)


def test_unpinning_leaves_nothing(lives: Lives, binder: Binder, tmp_path: Path) -> None:
    """It says what it removes, and nothing is counted any more; a second time there is nothing."""
    others = probes_defined(lives.tier)
    tracer = lives.open()
    binder.bind(4)
    tracer.close()
    (folder,) = lives.place.iterdir()
    counters = libbpf.Counters(libbpf._libbpf().bpf_obj_get(os.fsencode(folder / "counters")))
    (lives.place / f"half-{EPOCHS[-1]}").mkdir()

    first, second = (unpinned(lives.place, tmp_path / "lock") for _ in range(2))

    assert (first.code, first.err) == (0, "")
    assert first.out.splitlines() == [
        f"removed from {lives.place}: 1 left half made",
        f"removed from {lives.place}: epoch {tracer.epoch}, tier {tracer.name}, "
        f"with {4 * STRIDE} bytes of records that nobody has read",
    ]
    assert second == Done(0, f"nothing is pinned below {lives.place}\n", "")
    assert not lives.place.exists()

    def is_over() -> bool:
        before = counters.totals()
        binder.bind(1)
        return counters.totals() == before

    until(is_over)
    assert probes_defined(lives.tier) <= others


def test_unpinning_beside_an_agent_that_lives(lives: Lives, tmp_path: Path) -> None:
    """It refuses, with one sentence, because of the pins and because of the lock."""
    with contextlib.closing(lives.open()) as tracer:
        because_of_pins = unpinned(lives.place, tmp_path / "lock")
        assert len(pinned(lives.place)) == 1
        tracer.detach()
    with contextlib.closing(open_tracer(lives.tier, exclusive=True, lock_path=tmp_path / "lock")):
        lives.place.mkdir(exist_ok=True)
        because_of_lock = unpinned(lives.place, tmp_path / "lock")

    for done, sentence in ((because_of_pins, "lives on the pins"), (because_of_lock, "traces this node already")):
        assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
        assert sentence in done.err


def test_nothing_to_unpin(tmp_path: Path) -> None:
    """Where no agent ever was there is nothing, and that is well."""
    assert unpinned(tmp_path / "none", tmp_path / "lock").code == 0
    done = unpinned(tmp_path, tmp_path / "lock")
    assert (done.code, done.out) == (2, "")
    assert f"{tmp_path} is in no bpffs" in done.err


# --- where nothing can be pinned ----------------------------------------------------------------------------------


def blind(path: Path) -> str:
    """What a tracer says that cannot be pinned below ``path``, and works all the same."""
    with contextlib.closing(open_tracer(pins=path, epoch=EPOCHS[0])) as tracer:
        assert (tracer.pinned, tracer.resumed, tracer.epoch) == (False, False, EPOCHS[0])
        (note,) = [note for note in tracer.notes if note.startswith("binds are not seen while the agent restarts: ")]
        return note.partition(": ")[2]


def test_no_bpffs(tmp_path: Path) -> None:
    """The note says what to mount, and nothing is made there."""
    assert blind(tmp_path / "deep" / "pins") == (
        f"{tmp_path}/deep/pins is in no bpffs; mount one (mount -t bpf bpf /sys/fs/bpf) or, in a pod, mount the node's "
        "/sys/fs/bpf"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_bpffs_that_is_read_only() -> None:
    """The note says so."""
    done = subprocess.run(
        ["unshare", "-m", "sh", "-ec", READ_ONLY, "sh", sys.executable, TELL],
        check=True, capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.stdout.startswith("binds are not seen while the agent restarts: /mnt/pins cannot be made (Read-only")


READ_ONLY = 'mount -t bpf bpf /mnt; mount -o remount,ro /mnt; exec "$1" -c "$2"'
TELL = """
from pathlib import Path
from pipeline.tracer import open_tracer
tracer = open_tracer(pins=Path("/mnt/pins"), epoch="0" * 16)
print(tracer.notes[-1])
tracer.close()
"""


def test_a_name_with_dots(place: Path) -> None:
    """A bpffs allows none in names, and the note says that."""
    assert "hold no dots" in blind(place.with_name("a.b"))


def test_a_kernel_that_pins_no_links(lives: Lives, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing stays half made, and the note names the link."""
    real = libbpf._pin

    def refuse(descriptor: int, path: Path) -> None:
        real(os.open("/dev/null", os.O_RDONLY) if path.name.startswith("link_") else descriptor, path)

    monkeypatch.setattr(libbpf, "_pin", refuse)
    assert re.fullmatch(rf"the kernel does not pin a link as \S+ \({os.strerror(errno.EINVAL)}\)", blind(lives.place))
    assert pinned(lives.place) == []
