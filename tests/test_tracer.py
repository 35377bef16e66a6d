"""The tracer as a machine: its ring, its accounts, its lock, its capabilities. What it sees is in test_binds.py."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import shutil
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline import records
from pipeline.errors import TracerUnavailable, UsageError
from pipeline.tracer import Burst, Tracer, Wanted, libbpf, open_tracer
from pipeline.tracer.ring import Ring
from tests.kernel.binds import DGRAM, STREAM, V4, V6, bind, raw_bind, tcp
from tests.kernel.plugin import bursts, events

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="tracing needs root")


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    """The BPF object of this source."""
    subprocess.run(["make", "-s", "-C", ROOT / "bpf"], check=True)


@pytest.fixture(scope="module")
def tracer(built: None) -> Iterator[Tracer]:  # noqa: ARG001
    """One tracer for all tests that only look."""
    with contextlib.closing(open_tracer(ring_bytes=1 << 20)) as opened:
        yield opened


def test_binds_still_work_while_traced(tracer: Tracer) -> None:
    """post_bind is attached, decides about every bind, and refuses none."""
    assert {"cgroup:post_bind4", "cgroup:post_bind6"} <= set(tracer.hooks)
    for family, address in ((V4, "127.0.0.1"), (V6, "::1")):
        for kind in (STREAM, DGRAM):
            with tcp(family, kind) as made:
                assert bind(made, address, 0) == 0


def grown(tracer: Tracer, before: dict[str, int]) -> dict[str, int]:
    """Counters that moved, and by how much."""
    return {name: value - before[name] for name, value in tracer.counters().items() if value != before[name]}


def fail(times: int) -> None:
    """Attempts that fail."""
    with tcp() as made:
        for _ in range(times):
            raw_bind(made.fileno(), b"\x02\0\0\0")


def test_a_full_ring_is_accounted_for() -> None:
    """With a reader that does not come, attempted = submitted + lost; what was submitted is read; then it goes on."""
    with contextlib.closing(open_tracer(ring_bytes=4096)) as tracer:
        fail(50)
        counts = tracer.counters()
        read = sum(len(burst.records) for burst in bursts(tracer))
        fail(3)
        again = sum(len(burst.records) for burst in bursts(tracer))

        assert counts["attempted"] >= 50
        assert counts["lost_ring_full"] > 0
        assert counts["attempted"] == sum(counts.values()) - counts["attempted"]
        assert read == counts["submitted"]
        assert again >= 3


def test_a_forgotten_request_is_accounted_for() -> None:
    """When requests in flight cannot be remembered any more, each attempt is counted as lost, and none twice."""
    with contextlib.closing(open_tracer()) as tracer:
        before = tracer.counters()
        with filled_inflight():
            fail(5)
            with tcp() as made:
                bind(made, "127.0.0.1", 0)  # post_bind must not report what is counted as lost
            lost = grown(tracer, before)
        ours = events(tracer)
        fail(1)

        assert lost["lost_inflight_full"] >= 6
        assert lost["attempted"] == lost["lost_inflight_full"] + lost.get("submitted", 0)
        assert ours == []
        assert len(events(tracer)) == 1


@contextlib.contextmanager
def filled_inflight() -> Iterator[None]:
    """The newest map ``inflight`` of this kernel, filled to the brim with threads that do not exist."""
    library = ctypes.CDLL("libbpf.so.1")
    at, descriptor = ctypes.c_uint32(0), -1
    info, size = ctypes.create_string_buffer(128), ctypes.c_uint32(128)
    while not library.bpf_map_get_next_id(at, ctypes.byref(at)):
        opened = library.bpf_map_get_fd_by_id(at)
        library.bpf_obj_get_info_by_fd(opened, info, ctypes.byref(size))
        if info.raw[24:40].rstrip(b"\0") == b"inflight":
            opened, descriptor = descriptor, opened
        if opened >= 0:
            os.close(opened)
    keys = [ctypes.c_uint64(number) for number in range(1, 8193)]
    value = ctypes.create_string_buffer(56)
    for key in keys:
        library.bpf_map_update_elem(descriptor, ctypes.byref(key), value, ctypes.c_uint64(0))
    yield
    for key in keys:
        library.bpf_map_delete_elem(descriptor, ctypes.byref(key))
    os.close(descriptor)


def ring_over(descriptor: int, ring_bytes: int) -> Ring:
    """A reader of its own over a ring; it never waits."""
    return Ring(descriptor, ring_bytes, wakeup_bytes=1, max_records=99, wait=lambda _: None)


@pytest.mark.parametrize(
    ("headers", "taken"),
    [
        pytest.param([8, 8, 8], [[0, 1, 2]], id="whole"),
        pytest.param([8, 8 | 1 << 31, 8], [[0]], id="one-is-being-written"),
        pytest.param([8 | 1 << 31, 8, 8], [], id="the-first-is-being-written"),
        pytest.param([8, 8 | 1 << 30, 8], [[0], [2]], id="one-was-discarded"),
        pytest.param([8 | 1 << 30, 8, 8], [[1, 2]], id="the-first-was-discarded"),
    ],
)
def test_what_is_being_written_or_discarded_is_no_record(headers: list[int], taken: list[list[int]]) -> None:
    """A burst ends before a record that is still being written, and steps over one that was taken back."""
    page = mmap.PAGESIZE
    memory = os.memfd_create("ring")
    os.truncate(memory, 2 * page + 2 * page)
    os.pwrite(memory, struct.pack("=Q", 16 * len(headers)), page)
    os.pwrite(memory, b"".join(struct.pack("=IIQ", header, 0, at) for at, header in enumerate(headers)), 2 * page)

    ring = ring_over(memory, page)

    assert taken == [burst.records.view("=u8")[:, 0].tolist() for burst in iter(lambda: ring.read(0), None)]
    os.close(memory)


def test_a_record_of_another_size_is_refused() -> None:
    """Records of two sizes mean that the object is not the one of this version."""
    memory = os.memfd_create("ring")
    os.truncate(memory, 4 * mmap.PAGESIZE)
    os.pwrite(memory, struct.pack("=Q", 40), mmap.PAGESIZE)
    os.pwrite(memory, struct.pack("=IIQ", 8, 0, 1) + struct.pack("=IIQQ", 16, 0, 2, 3), 2 * mmap.PAGESIZE)
    ring = ring_over(memory, mmap.PAGESIZE)
    ring.read(0)

    with pytest.raises(TracerUnavailable, match="a record of 16 bytes among records of 8"):
        ring.read(0)
    os.close(memory)


def test_records_stay_until_they_are_released() -> None:
    """Whoever reads the ring anew finds what was read and not released, and nothing of what was."""
    with contextlib.closing(open_tracer(ring_bytes=1 << 16)) as tracer:
        assert isinstance(tracer, libbpf.LibbpfTracer)
        fail(3)
        tracer.detach()
        first = tracer.read(0)
        assert first is not None
        seen = bytes(first.records)

        def anew() -> Burst | None:
            return ring_over(tracer.ring.descriptor, 1 << 16).read(0)

        again = anew()
        assert again is not None
        assert bytes(again.records) == seen
        tracer.release(first)
        assert anew() is None


def test_a_burst_is_bounded() -> None:
    """However long the reader was away, a burst has at most ``max_records``; the next one goes on behind it.

    A full burst is worth taking at once, though the mark that wakes the reader is not reached.
    """
    with contextlib.closing(open_tracer(ring_bytes=1 << 16, wakeup_bytes=1 << 15, max_records=10)) as tracer:
        fail(35)
        sizes = [len(burst.records) for burst in bursts(tracer)][:1]
        begin = time.monotonic()
        fail(35)
        burst = tracer.read(20)
        waited = time.monotonic() - begin
        assert burst is not None
        sizes.append(len(burst.records))
        sizes += [len(burst.records) for burst in bursts(tracer)]

    assert max(sizes) == 10
    assert sum(sizes) >= 10 + 35
    assert waited < 10


def test_the_ring_can_be_read_round_and_round() -> None:
    """Bursts that wrap around the end of the ring are whole, and come in the order of the attempts."""
    with contextlib.closing(open_tracer(ring_bytes=4096, wanted=Wanted(pids=(os.getpid(),)))) as tracer:
        for turn in range(40):
            with tcp() as made:
                for port in range(5):
                    bind(made, "192.0.2.1", 1 + turn * 5 + port)
            assert [event["port"] for event in events(tracer)] == [1 + turn * 5 + port for port in range(5)]


def test_the_reader_is_woken_before_its_time() -> None:
    """A reader that waits is woken as soon as the mark is passed, and takes the whole batch."""
    with contextlib.closing(open_tracer(ring_bytes=1 << 20, wakeup_bytes=50 * 424)) as tracer:
        waited: list[float] = []
        taken: list[int] = []

        def read() -> None:
            begin = time.monotonic()
            burst = tracer.read(20)
            waited.append(time.monotonic() - begin)
            taken.append(len(burst.records) if burst else 0)

        reader = threading.Thread(target=read)
        reader.start()
        fail(60)
        reader.join()

    assert waited[0] < 10
    assert taken[0] >= 50


def test_a_second_agent_is_told_so(tmp_path: Path) -> None:
    """A node has one agent: the second learns the first one's pid; when the first is gone the second may start."""
    lock = tmp_path / "deep" / "agent.lock"

    with contextlib.closing(open_tracer(exclusive=True, lock_path=lock)):
        with pytest.raises(TracerUnavailable, match=rf"another agent .*pid {os.getpid()} holds .*agent\.lock"):
            open_tracer(exclusive=True, lock_path=lock)
        open_tracer(lock_path=lock).close()
    open_tracer(exclusive=True, lock_path=lock).close()


def test_a_lock_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    """The sentence names the lock."""
    (tmp_path / "file").touch()

    with pytest.raises(TracerUnavailable, match=r"file/agent\.lock"):
        open_tracer(exclusive=True, lock_path=tmp_path / "file" / "agent.lock")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"tier": "magic"}, "there is no tier 'magic'; allowed are auto, fexit, kprobe, tracepoint, bcc"),
        ({"ring_bytes": 5000}, "a ring of 5000 bytes is not possible"),
        ({"wakeup_bytes": 0}, "waking the reader at 0 bytes is not possible"),
        ({"max_records": 0}, "a burst of 0 records is not possible"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], sentence: str) -> None:
    """An argument that is not allowed is named, with what is allowed."""
    with pytest.raises(UsageError, match=sentence):
        open_tracer(**arguments)


def test_a_missing_object_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the compiled object the sentence says how to build it."""
    monkeypatch.setattr(libbpf, "carried", lambda name: tmp_path / name)

    with pytest.raises(TracerUnavailable, match=r"bindsnoop\.bpf\.o is missing; build it with make -C bpf"):
        open_tracer("tracepoint")


def test_a_broken_object_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An object that is none is refused without a word of libbpf's on standard error."""
    (tmp_path / "object").write_bytes(b"not an object")
    monkeypatch.setattr(libbpf, "carried", lambda _: tmp_path / "object")

    with pytest.raises(TracerUnavailable, match="libbpf cannot read"):
        open_tracer("tracepoint")


def test_closing_twice_is_closing_once() -> None:
    """After ``close`` nothing is attached, and bursts that are held stay readable."""
    tracer = open_tracer("tracepoint")
    fail(2)
    burst = tracer.read(0)
    tracer.close()
    tracer.close()

    assert burst is not None
    assert len(bytes(burst.records)) >= 2 * records.RECORD.itemsize


TELL = """
import sys
from pipeline.tracer import open_tracer
from pipeline.errors import TracerUnavailable
try:
    tracer = open_tracer("tracepoint")
except TracerUnavailable as error:
    print(error)
else:
    import socket
    socket.socket().bind(("127.0.0.1", 0))
    print(len(tracer.read(0).records) > 0, *tracer.hooks, *tracer.notes, sep="\\n")
"""


def with_capabilities(dropped: str) -> str:
    """What a process without these capabilities is told, in a place where tracefs is mounted."""
    script = 'mount -t tracefs tracefs /sys/kernel/tracing && exec setpriv --bounding-set "$1" "$2" -c "$3"'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "sh", dropped, sys.executable, TELL],
        check=True, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.stderr == ""
    return done.stdout


needs_setpriv = pytest.mark.skipif(
    not (shutil.which("setpriv") and shutil.which("unshare")), reason="setpriv and unshare are not installed"
)


@needs_setpriv
def test_bpf_and_perfmon_are_enough() -> None:
    """Without NET_ADMIN the tracer goes on without post_bind, and says what it does not see."""
    said = with_capabilities("-sys_admin,-net_admin").splitlines()

    assert said[:3] == ["True", "tracepoint:syscalls/sys_exit_bind", "tracepoint:syscalls/sys_enter_bind"]
    assert len(said) == 4
    assert "io_uring" in said[3]
    assert "CAP_NET_ADMIN is missing" in said[3]


@needs_setpriv
@pytest.mark.parametrize(
    ("dropped", "missing"),
    [("-sys_admin,-bpf", "CAP_BPF"), ("-sys_admin,-perfmon", "CAP_PERFMON"), ("-all", "CAP_BPF and CAP_PERFMON")],
)
def test_a_missing_capability_is_a_sentence(dropped: str, missing: str) -> None:
    """The one sentence names the capabilities that are missing and how to give them."""
    (sentence,) = with_capabilities(dropped).splitlines()

    verb, them = ("are", "them") if " and " in missing else ("is", "it")
    assert f": {missing} {verb} missing; run as root, or give {them}" in sentence
    assert "securityContext.capabilities.add" in sentence
