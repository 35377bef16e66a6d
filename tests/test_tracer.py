"""Real binds on this kernel, seen through the tracer."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import errno
import mmap
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline import records
from pipeline.errors import TracerUnavailable, UsageError
from pipeline.tracer import Burst, Tracer, libbpf, open_tracer
from tests.kernel.binds import as_user, bind, raw_bind, sockaddr_in

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="tracing needs root")

Event = dict[str, Any]

# 18 to 20 thousand lie below the ports that the kernel gives by itself.
PORT = 18410


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    """The BPF object of this source."""
    subprocess.run(["make", "-s", "-C", ROOT / "bpf"], check=True)


@pytest.fixture(scope="module")
def tracer(built: None) -> Iterator[Tracer]:  # noqa: ARG001
    """One tracer for all tests that only look."""
    with contextlib.closing(open_tracer(ring_bytes=1 << 20)) as opened:
        yield opened


def bursts(tracer: Tracer) -> Iterator[Burst]:
    """What the ring holds now, released one after the other."""
    while burst := tracer.read(0):
        yield burst
        tracer.release(burst)


def events(tracer: Tracer, pid: int | None = None) -> list[Event]:
    """What the ring holds now of this process, or of another."""
    found: list[Event] = []
    for burst in bursts(tracer):
        batch = records.decode(burst.records, time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME))
        found += [row for row in batch.to_pylist() if row["pid"] == (pid or os.getpid())]
    return found


def tcp(family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM, proto: int = 0, **options: Any) -> socket.socket:
    """A socket with options such as ``SO_REUSEPORT=1``."""
    made = socket.socket(family, kind, proto)
    for name, value in options.items():
        made.setsockopt(*OPTIONS[name], value)
    return made


OPTIONS = {
    "SO_REUSEADDR": (socket.SOL_SOCKET, socket.SO_REUSEADDR),
    "SO_REUSEPORT": (socket.SOL_SOCKET, socket.SO_REUSEPORT),
    "SO_BINDTODEVICE": (socket.SOL_SOCKET, 25),
    "IP_FREEBIND": (socket.IPPROTO_IP, 15),
    "IP_TRANSPARENT": (socket.IPPROTO_IP, 19),
    "IP_BIND_ADDRESS_NO_PORT": (socket.IPPROTO_IP, 24),
    "IPV6_V6ONLY": (socket.IPPROTO_IPV6, socket.IPV6_V6ONLY),
}

V4, V6 = socket.AF_INET, socket.AF_INET6
STREAM, DGRAM = socket.SOCK_STREAM, socket.SOCK_DGRAM


def given_port(made: socket.socket) -> int:
    """The port that the kernel says the socket has."""
    port: int = made.getsockname()[1]
    return port


def test_a_bind_to_a_fixed_port(tracer: Tracer) -> None:
    """Every field of a plain bind is what the process knows of itself."""
    events(tracer)
    before = time.time()
    with tcp() as made:
        assert bind(made, "127.0.0.1", PORT) == 0

    (event,) = events(tracer)

    assert event == event | {
        "type": "normal", "kind": "bind", "addr": "127.0.0.1", "port": PORT, "asked_addr": "127.0.0.1",
        "asked_port": PORT, "family": "inet", "sock_type": "stream", "proto": "TCP", "proto_num": 6, "opts": ".....",
        "v6only": None, "ifindex": 0, "ifname": None, "errno": 0, "error": None, "hook": "tracepoint",
        "pid": os.getpid(), "tid": threading.get_native_id(), "ppid": os.getppid(), "uid": os.getuid(),
        "gid": os.getgid(), "exe": Path("/proc/self/exe").resolve().name,
        "comm": Path("/proc/self/comm").read_text().strip(),
        "parent_comm": Path(f"/proc/{os.getppid()}/comm").read_text().strip(),
        "mountnsid": Path("/proc/self/ns/mnt").stat().st_ino, "netnsid": Path("/proc/self/ns/net").stat().st_ino,
    }  # fmt: skip
    assert event["cookie"] > 0
    assert before - 1 < event["time"].replace(tzinfo=datetime.UTC).timestamp() < time.time() + 1


def test_the_cgroup_is_named(tracer: Tracer) -> None:
    """Id and names of the process's cgroup are those that /proc tells, of version 1 where version 2 says only root."""
    events(tracer)
    with tcp() as made:
        bind(made, "127.0.0.1", 0)
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    paths = {name: path for _, names, path in lines for name in names.split(",")}
    path = next((paths[name] for name in ("", "memory", "pids") if paths.get(name, "/") != "/"), "/")

    (event,) = events(tracer)

    parts = path.split("/")
    assert (event["cgroup"], event["cgroup_parent"]) == (parts[-1], parts[-2] if len(parts) > 1 else "")
    assert event["cgroup_id"] > 0


Case = tuple[Callable[[], object], Event]
"""Something that binds once, and what the event must say; a callable value is called with what the bind gave."""


def attempt(expected_error: int, *address: object, **options: Any) -> Callable[[], int]:
    """A bind that ends with this error, and the port that the socket then has."""
    kind = {name: options.pop(name) for name in ("family", "kind", "proto") if name in options}

    def run() -> int:
        with tcp(**kind, **options) as made:
            assert bind(made, *address) == expected_error
            return given_port(made)

    return run


def raw_attempt(expected_error: int, request: bytes | None, length: int | None = None) -> Callable[[], None]:
    """A bind of a TCP socket with these bytes that ends with this error."""

    def run() -> None:
        with tcp() as made:
            assert raw_bind(made.fileno(), request, length) == expected_error

    return run


def taken() -> None:
    """A bind to a port that somebody else listens on."""
    with tcp() as made:
        assert bind(made, "127.0.0.1", PORT) == errno.EADDRINUSE


def twice() -> None:
    """The second bind of one socket."""
    with tcp() as made:
        bind(made, "127.0.0.1", PORT + 1)
        assert bind(made, "127.0.0.1", PORT + 2) == errno.EINVAL


def privileged() -> None:
    """An ordinary user's bind below 1024."""
    with tcp() as made:
        as_user(65534, lambda: bind(made, "127.0.0.1", 81))


def not_a_socket() -> None:
    """A bind of a file."""
    with Path("/dev/null").open("rb") as file:
        assert raw_bind(file.fileno(), sockaddr_in("127.0.0.1", 53)) == errno.ENOTSOCK


CASES: dict[str, Case] = {
    "port-0": (attempt(0, "127.0.0.1", 0), {"asked_port": 0, "port": lambda got: got, "errno": 0}),
    "ipv6": (
        attempt(0, "::1", 0, family=V6),
        {"family": "inet6", "addr": "::1", "port": lambda got: got, "v6only": True},
    ),
    "dual-stack": (attempt(0, "::", 0, family=V6, IPV6_V6ONLY=0), {"addr": "::", "v6only": False}),
    "v6only": (attempt(0, "::", 0, family=V6, IPV6_V6ONLY=1), {"addr": "::", "v6only": True}),
    "v4-mapped": (attempt(0, "::ffff:127.0.0.1", 0, family=V6), {"family": "inet6", "addr": "::ffff:127.0.0.1"}),
    "udp": (attempt(0, "0.0.0.0", PORT, kind=DGRAM), {"proto": "UDP", "sock_type": "dgram", "addr": "0.0.0.0"}),
    "multicast": (attempt(0, "224.0.0.251", PORT, kind=DGRAM), {"addr": "224.0.0.251", "port": PORT}),
    "all-options": (
        attempt(
            0,
            "127.0.0.1",
            0,
            SO_REUSEADDR=1,
            SO_REUSEPORT=1,
            IP_FREEBIND=1,
            IP_TRANSPARENT=1,
            IP_BIND_ADDRESS_NO_PORT=1,
        ),
        {"opts": "rRNTF", "port": 0},
    ),
    "freebind": (attempt(0, "192.0.2.7", PORT, IP_FREEBIND=1), {"opts": "....F", "addr": "192.0.2.7"}),
    "reuseaddr": (attempt(0, "127.0.0.1", PORT, SO_REUSEADDR=1), {"opts": ".R..."}),
    "device": (
        attempt(0, "127.0.0.1", 0, SO_BINDTODEVICE=b"lo\0"),
        {"ifname": "lo", "ifindex": socket.if_nametoindex("lo")},
    ),
    "raw": (
        attempt(0, "127.0.0.1", 7, kind=socket.SOCK_RAW, proto=1),
        {"sock_type": "raw", "proto": "ICMP", "port": 7, "asked_port": 7, "addr": "127.0.0.1"},
    ),
    "eaddrnotavail": (
        attempt(errno.EADDRNOTAVAIL, "192.0.2.7", PORT),
        {"error": "EADDRNOTAVAIL", "addr": "192.0.2.7", "port": PORT},
    ),
    "twice": (twice, {"error": "EINVAL", "port": PORT + 2, "asked_port": PORT + 2}),
    "eacces": (privileged, {"error": "EACCES", "uid": 65534, "addr": "127.0.0.1", "port": 81}),
    "ebadf": (
        lambda: raw_bind(9999, sockaddr_in("127.0.0.1", 53)),
        {
            "error": "EBADF",
            "addr": "127.0.0.1",
            "port": 53,
            "family": "inet",
            "proto": None,
            "opts": None,
            "ifindex": None,
        },
    ),
    "enotsock": (not_a_socket, {"error": "ENOTSOCK", "port": 53, "sock_type": None}),
    "short": (
        raw_attempt(errno.EINVAL, sockaddr_in("127.0.0.1", 53)[:8]),
        {"error": "EINVAL", "addr": "127.0.0.1", "port": 53},
    ),
    "shorter": (
        raw_attempt(errno.EINVAL, sockaddr_in("127.0.0.1", 53)[:4]),
        {"addr": None, "asked_addr": None, "asked_port": 53, "port": 53},
    ),
    "nothing": (raw_attempt(errno.EINVAL, b""), {"addr": None, "asked_port": None, "port": 0, "family": "inet"}),
    "negative-length": (raw_attempt(errno.EINVAL, sockaddr_in("127.0.0.1", 53), -1), {"error": "EINVAL"}),
    "unspecified-family": (
        raw_attempt(0, sockaddr_in("0.0.0.0", PORT, socket.AF_UNSPEC)),
        {"errno": 0, "addr": "0.0.0.0", "asked_addr": "0.0.0.0", "port": PORT},
    ),
    "wrong-family": (
        raw_attempt(errno.EAFNOSUPPORT, struct.pack("=H", socket.AF_UNIX) + b"/tmp/x".ljust(14, b"\0")),
        {"error": "EAFNOSUPPORT", "family": "inet", "addr": None, "asked_port": None},
    ),
}


@pytest.mark.parametrize(("run", "expected"), [pytest.param(*case, id=name) for name, case in CASES.items()])
def test_corner_case(tracer: Tracer, run: Callable[[], object], expected: Event) -> None:
    """Each attempt is one event that says what was asked for, what the socket got, and how it ended."""
    events(tracer)

    got = run()

    event = events(tracer)[-1]
    assert event == event | {name: value(got) if callable(value) else value for name, value in expected.items()}
    assert event["hook"] == "tracepoint"


def test_a_taken_port_shows_the_port(tracer: Tracer) -> None:
    """EADDRINUSE names the port that was asked for, though the socket holds 0."""
    with tcp() as holder:
        bind(holder, "127.0.0.1", PORT)
        holder.listen()
        events(tracer)

        taken()

    (event,) = events(tracer)
    assert (event["error"], event["addr"], event["port"]) == ("EADDRINUSE", "127.0.0.1", PORT)


def test_mptcp_is_seen_as_such(tracer: Tracer) -> None:
    """A multipath socket shows its own protocol and the port it got."""
    try:
        made = tcp(proto=262)
    except OSError:
        pytest.skip("this kernel has no MPTCP")
    events(tracer)
    with made:
        bind(made, "127.0.0.1", 0)

        (event,) = events(tracer)
        assert (event["proto"], event["port"]) == ("MPTCP", given_port(made))


def test_other_families_are_no_attempts(tracer: Tracer) -> None:
    """AF_UNIX and netlink sockets are neither reported nor counted."""
    events(tracer)
    before = tracer.counters()
    with socket.socket(socket.AF_UNIX) as unix, socket.socket(socket.AF_NETLINK, socket.SOCK_RAW) as netlink:
        unix.bind("\0bindsnoop-test")
        netlink.bind((0, 0))

    assert events(tracer) == []
    assert "faulted" not in grown(tracer, before)


def test_an_unreadable_request_is_only_counted(tracer: Tracer) -> None:
    """EFAULT has nothing to report; the attempt is counted all the same."""
    events(tracer)
    before = tracer.counters()
    with tcp() as made:
        assert raw_bind(made.fileno(), None) == errno.EFAULT

    assert events(tracer) == []
    # Other processes of this machine may bind too, and are reported.
    counts = grown(tracer, before)
    assert counts["faulted"] == 1
    assert counts["attempted"] == counts.get("submitted", 0) + 1


def test_a_request_that_is_not_in_memory_yet_is_read(tracer: Tracer, tmp_path: Path) -> None:
    """A request on a page that the process never touched is read all the same, once the kernel has fetched it."""
    (tmp_path / "request").write_bytes(sockaddr_in("127.0.0.1", PORT).ljust(mmap.PAGESIZE, b"\0"))
    events(tracer)
    with tcp() as made, (tmp_path / "request").open("rb") as file:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        page = ctypes.c_void_p(libc.mmap(None, ctypes.c_size_t(mmap.PAGESIZE), 1, 2, file.fileno(), ctypes.c_long(0)))
        assert libc.bind(made.fileno(), page, 16) == 0
        libc.munmap(page, ctypes.c_size_t(mmap.PAGESIZE))

    (event,) = events(tracer)
    assert (event["asked_addr"], event["asked_port"]) == ("127.0.0.1", PORT)


def test_a_hostile_name_arrives_harmless(tracer: Tracer) -> None:
    """A thread's name with control characters, a backslash and broken UTF-8 is printable text."""
    name = Path(f"/proc/self/task/{threading.get_native_id()}/comm")
    before = name.read_bytes()
    events(tracer)
    name.write_bytes(b"\x1b[2J\\\xff\tx")
    try:
        with tcp() as made:
            bind(made, "127.0.0.1", 0)
    finally:
        name.write_bytes(before.strip())

    (event,) = events(tracer)
    assert event["comm"] == "\\x1b[2J\\\\\\xff\\x09x"


@pytest.mark.parametrize("way", ["uring", "compat"])
def test_what_the_system_calls_miss(tracer: Tracer, tmp_path: Path, way: str) -> None:
    """A successful bind through io_uring or by the 32-bit system call is seen once, by post_bind."""
    subprocess.run(["cc", "-o", tmp_path / "oddbind", ROOT / "tests" / "kernel" / "oddbind.c"], check=True)
    events(tracer)
    started = subprocess.Popen([tmp_path / "oddbind", way], stdout=subprocess.PIPE, text=True)
    said, _ = started.communicate()
    if started.returncode == 77:
        pytest.skip(f"this kernel cannot bind by {way}")

    (event,) = events(tracer, started.pid)
    assert event == event | {
        "hook": "post_bind", "addr": "127.0.0.1", "port": int(said), "asked_port": None, "comm": "oddbind",
        "proto": "TCP",
    }  # fmt: skip
    assert event["cookie"] > 0


def test_binds_still_work_while_traced(tracer: Tracer) -> None:
    """post_bind is attached, decides about every bind, and refuses none."""
    assert {"cgroup:post_bind4", "cgroup:post_bind6"} <= set(tracer.hooks)
    for family, address in ((V4, "127.0.0.1"), (V6, "::1")):
        for kind in (STREAM, DGRAM):
            with tcp(family, kind) as made:
                assert bind(made, address, 0) == 0


def test_each_attempt_of_two_threads_is_one_event(tracer: Tracer) -> None:
    """Two threads at once: exactly as many events as attempts, none twice, none of the other's."""
    events(tracer)
    attempts = 400

    def load(port: int) -> None:
        with tcp() as made:
            for _ in range(attempts):
                bind(made, "127.0.0.1", port)

    threads = [threading.Thread(target=load, args=(PORT + at,)) for at in (3, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    found = events(tracer)
    by_thread = {
        tid: {event["asked_port"] for event in found if event["tid"] == tid} for tid in {e["tid"] for e in found}
    }
    assert len(found) == 2 * attempts
    assert sorted(by_thread.values(), key=min) == [{PORT + 3}, {PORT + 4}]


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
    value = ctypes.create_string_buffer(48)
    for key in keys:
        library.bpf_map_update_elem(descriptor, ctypes.byref(key), value, ctypes.c_uint64(0))
    yield
    for key in keys:
        library.bpf_map_delete_elem(descriptor, ctypes.byref(key))
    os.close(descriptor)


def ring_over(descriptor: int, ring_bytes: int) -> libbpf.Ring:
    """A reader of its own over a ring; it never waits."""
    return libbpf.Ring(descriptor, ring_bytes, wakeup_bytes=1, max_records=99, wait=lambda _: None)


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
    with contextlib.closing(open_tracer(ring_bytes=4096)) as tracer:
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
        ({"tier": "magic"}, "tier 'magic' is not available in this version; allowed are auto, tracepoint"),
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
        open_tracer()


def test_a_broken_object_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An object that is none is refused without a word of libbpf's on standard error."""
    (tmp_path / "object").write_bytes(b"not an object")
    monkeypatch.setattr(libbpf, "carried", lambda _: tmp_path / "object")

    with pytest.raises(TracerUnavailable, match="libbpf cannot read"):
        open_tracer()


def test_closing_twice_is_closing_once() -> None:
    """After ``close`` nothing is attached, and bursts that are held stay readable."""
    tracer = open_tracer()
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
    tracer = open_tracer()
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

    assert f": {missing} is missing; run as root, or give it" in sentence
    assert "securityContext.capabilities.add" in sentence
