"""Every kind of bind that the kernel knows, made for real, and what each tier says of it.

Rows of a table: a bind, and what its event must say. The expectations are what Linux documents: bind(2), ip(7),
ipv6(7), raw(7), udplite(7), the error numbers of their source where the pages are silent, and what the process itself
is told afterwards (getsockname(2), getsockopt(2)); they are not what the tracer says. Every bind gives exactly one
event, or, where the tier publishes a gap of that kind, none: so a gap is a promise too.

Runs for each tier that this kernel has, or those of ``--tier``; in other kernels by tests/kernel.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import errno
import mmap
import os
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import records
from pipeline.tracer import Wanted, open_tracer
from tests.kernel import places
from tests.kernel.binds import (
    DGRAM,
    ICMP,
    ICMPV6,
    MPTCP,
    RAW,
    SCTP,
    UDPLITE,
    V4,
    V6,
    Attempted,
    NotHere,
    as_user,
    attempt,
    bind,
    descriptor_attempt,
    in_thread,
    odd,
    raw_attempt,
    raw_bind,
    sockaddr_in,
    sockaddr_in6,
    tcp,
    told,
)
from tests.kernel.plugin import Event, Watch, bursts, events

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="tracing needs root")

LOOPBACK = "loop-of-suite"
"""Name of the loopback device in the suite's network namespace, and of no device outside."""

PORT = 18410
ABSENT = "192.0.2.7"
"""An address that no host has: it is for documentation (RFC 5737)."""


@pytest.fixture(scope="module", autouse=True)
def network() -> Iterator[None]:
    """The suite's own ports, addresses and devices; the tracers look on from outside."""
    with places.network(LOOPBACK):
        yield


# --- the table ----------------------------------------------------------------------------------------------------

Asked = tuple[str | None, int | None]

UNREAD: Asked = ("unread", None)
"""The kernel never read the request, so nothing is promised of it."""


@dataclass(frozen=True)
class Case:
    """One bind and its event.

    ``run`` makes it, after ``earlier`` others. ``asked`` is the request as far as it can be read. On success ADDR and
    PORT are what getsockname(2) says, else they are what was asked for, 0 for a port that was not readable. ``more``
    are other fields; without them it is a TCP socket of IPv4 with no option. ``kinds`` are the gaps any of which
    explains that there is no event. ``via`` is ``call``; ``around`` for what comes by another way than the system call
    of a native process, which tier tracepoint sees at post_bind and without its request; ``denied`` for the end at a
    security module.
    """

    run: Callable[[], Attempted]
    asked: Asked
    error: int = 0
    more: Event = field(default_factory=dict)
    kinds: tuple[str, ...] = ()
    via: str = "call"
    earlier: int = 0


TCP = {"family": "inet", "sock_type": "stream", "proto": "TCP", "proto_num": 6, "opts": "....."}
UDP = TCP | {"sock_type": "dgram", "proto": "UDP", "proto_num": 17}
TCP6, UDP6 = TCP | {"family": "inet6"}, UDP | {"family": "inet6"}
# RAW and ping sockets begin with SO_REUSEADDR (INET_PROTOSW_REUSE, net/ipv4/af_inet.c).
RAW4 = TCP | {"sock_type": "raw", "proto": "ICMP", "proto_num": 1, "opts": ".R..."}
RAW6 = RAW4 | {"family": "inet6", "proto": "ICMPV6", "proto_num": 58}
PING, PING6 = RAW4 | {"sock_type": "dgram"}, RAW6 | {"sock_type": "dgram"}
NO_SOCKET = {
    "family": "inet", "sock_type": None, "proto": None, "proto_num": None, "opts": None, "v6only": None,
    "ifindex": None, "ifname": None, "cookie": None,
}  # fmt: skip


def hook(watch: Watch, via: str) -> str:
    """Where the tier sees it."""
    return {
        ("tracepoint", "around"): "post_bind",
        ("fexit", "denied"): "lsm",
        ("kprobe", "denied"): "lsm",
    }.get((watch.tier, via), watch.tier)


def look(watch: Watch, case: Case) -> Event | None:
    """Makes the bind and holds its event against what is expected; None where the tier has the gap."""
    watch.clear()
    try:
        made = case.run()
    except NotHere as reason:
        pytest.skip(str(reason))
    found = watch.events(made.pid)

    assert errno.errorcode.get(case.error) == errno.errorcode.get(made.error)
    if watch.gaps.intersection(case.kinds):
        assert found == []
        return None
    assert len(found) == case.earlier + 1
    event = found[-1]
    where = hook(watch, case.via)
    expected = TCP | {
        "type": "normal", "kind": "bind", "pid": made.pid, "tid": made.tid, "hook": where, "errno": made.error,
        "error": errno.errorcode.get(made.error), "netnsid": places.inode_of("net"), "v6only": made.v6only,
        "ifindex": made.device, "ifname": LOOPBACK if made.device == 1 else None,
    }  # fmt: skip
    if case.asked != UNREAD:
        asked = (None, None) if where == "post_bind" else case.asked
        expected |= {"asked_addr": asked[0], "asked_port": asked[1]}
        addr, port = (case.asked[0], case.asked[1] or 0) if made.error or not made.name else made.name
        # A raw socket's name ends in its protocol, which is no port.
        expected |= {"addr": addr, "port": port if case.more.get("sock_type") != "raw" else case.asked[1]}
    if not made.tid:
        expected["tid"] = event["tid"]
        assert event["tid"] not in (0, made.pid)
    assert event == event | expected | case.more | made.more
    if made.cookie:
        assert event["cookie"] in (None, made.cookie)
    return event


def taken(address: str, **how: Any) -> Callable[[], Attempted]:
    """A bind to a port that somebody else listens on."""

    def run() -> Attempted:
        with tcp(**how) as holder:
            assert bind(holder, address, PORT) == 0
            holder.listen()
            return attempt(address, PORT, **how)()

    return run


def twice() -> Attempted:
    """The second bind of one socket."""
    with tcp() as made:
        assert bind(made, "127.0.0.1", PORT) == 0
        return told(made, bind(made, "127.0.0.1", PORT + 1))


def from_untouched_memory() -> Attempted:
    """A bind whose request lies on a page that the process has never touched."""
    with tcp() as made, tempfile.TemporaryFile() as file:
        file.write(sockaddr_in("127.0.0.1", PORT).ljust(mmap.PAGESIZE, b"\0"))
        file.flush()
        with mmap.mmap(file.fileno(), mmap.PAGESIZE, mmap.MAP_PRIVATE) as memory:
            error = raw_bind(made.fileno(), ctypes.c_char.from_buffer(memory), 16)
        return told(made, error)


def named(name: bytes) -> Callable[[], Attempted]:
    """A bind by a thread with this name."""

    def run() -> Attempted:
        assert ctypes.CDLL(None).prctl(15, name, 0, 0, 0) == 0  # PR_SET_NAME
        return attempt("127.0.0.1", 0)()

    return lambda: in_thread(run)


def on_device_named(name: str) -> Callable[[], Attempted]:
    """A bind in a network namespace whose only device has this name."""

    def run() -> Attempted:
        with places.network(name):
            made = attempt("127.0.0.1", 0, SO_BINDTODEVICE=os.fsencode(name) + b"\0")()
            return made._replace(more={"netnsid": places.inode_of("net")})

    return lambda: in_thread(run)


def of_another_network() -> Attempted:
    """A bind of a socket that was made in another network namespace than the thread is in now."""

    def run() -> Attempted:
        with places.network("elsewhere"):
            made = tcp(SO_BINDTODEVICE=b"elsewhere\0")
            network = places.inode_of("net")
        with made:
            return told(made, bind(made, "127.0.0.1", 0), netnsid=network, ifname="elsewhere")

    return in_thread(run)


def in_mount_namespace() -> Attempted:
    """A bind in a mount namespace of its own."""

    def run() -> Attempted:
        places.unshare(places.CLONE_NEWNS)
        return attempt("127.0.0.1", 0)()._replace(more={"mountnsid": places.inode_of("mnt")})

    return in_thread(run)


def in_pid_namespace() -> Attempted:
    """A bind by the first process of a pid namespace, which outside has another pid."""

    def run() -> Attempted:
        places.unshare(places.CLONE_NEWPID)
        return odd("call", "given")()

    return in_thread(run)


def in_cgroup(
    run: Callable[[], Attempted], program: tuple[int, int] | None = None, code: Sequence[places.Instruction] = ()
) -> Callable[[], Attempted]:
    """A bind by a process in a cgroup with somebody else's program."""

    def inside() -> Attempted:
        with places.cgroup("bindsnoop-suite", program, code) as folder:
            made = run()
            return made._replace(more={**made.more, "cgroup": folder.name, "cgroup_id": folder.stat().st_ino})

    return inside


def denied(run: Callable[[], Attempted]) -> Callable[[], Attempted]:
    """A bind that a security module denies. The number is the module's own choice, so it is told with the event."""

    def inside() -> Attempted:
        with places.tcp_binds_denied() as number:
            made = run()
            assert errno.errorcode[number] == errno.errorcode.get(made.error)
            return made._replace(
                error=errno.EACCES, more={**made.more, "errno": number, "error": errno.errorcode[number]}
            )

    return lambda: in_thread(inside)


def by_the_kernel() -> Attempted:
    """The kernel's own bind, for a tunnel that this process brings up."""

    def run() -> Attempted:
        with places.network("lo-of-tunnel"):
            places.vxlan_device("tunnel", PORT)
            places.device_up("tunnel")
            return Attempted(
                0, ("0.0.0.0", PORT), os.getpid(), threading.get_native_id(), more={"netnsid": places.inode_of("net")}
            )

    return in_thread(run)


def without_bind(act: Callable[[socket.socket], object], **how: Any) -> Callable[[], Attempted]:
    """A socket that gets its port without a bind."""

    def run() -> Attempted:
        with tcp(**how) as made:
            act(made)
            done = told(made, 0)
            assert done.name
            assert done.name[1] > 0
            return done

    return run


def sctp_bindx() -> Attempted:
    """An address that an SCTP socket gets by sctp_bindx(3)."""
    with tcp(proto=SCTP) as made:
        made.setsockopt(SCTP, 100, sockaddr_in("127.0.0.1", PORT))  # SCTP_SOCKOPT_BINDX_ADD
        return told(made, 0)


def by_helper(run: Callable[[], Attempted], name: str) -> Callable[[], Attempted]:
    """A bind by a thread of io_uring's, which has a name of its own and a tid that the process is not told."""

    def inside() -> Attempted:
        made = run()
        return made._replace(tid=0, more={**made.more, "comm": f"{name}-{made.pid}"})

    return inside


V4_HERE, V6_HERE = ("127.0.0.1", 0), ("::1", 0)
V4_PORT, V6_PORT = ("127.0.0.1", PORT), ("::1", PORT)

CASES: dict[str, Case] = {
    # --- plain: port 0 and fixed ports, both families, both kinds
    "tcp": Case(attempt(*V4_HERE), V4_HERE),
    "tcp-port": Case(attempt(*V4_PORT), V4_PORT),
    "tcp-any": Case(attempt("0.0.0.0", PORT), ("0.0.0.0", PORT)),
    "tcp6": Case(attempt(*V6_HERE, family=V6), V6_HERE, more=TCP6),
    "tcp6-port": Case(attempt(*V6_PORT, family=V6), V6_PORT, more=TCP6),
    "udp": Case(attempt(*V4_HERE, kind=DGRAM), V4_HERE, more=UDP),
    "udp-port": Case(attempt("0.0.0.0", PORT, kind=DGRAM), ("0.0.0.0", PORT), more=UDP),
    "udp6": Case(attempt(*V6_HERE, family=V6, kind=DGRAM), V6_HERE, more=UDP6),
    "highest-port": Case(attempt("127.0.0.1", 65535), ("127.0.0.1", 65535)),
    "privileged-port": Case(attempt("127.0.0.1", 81), ("127.0.0.1", 81)),
    # --- what IPv6 sockets take
    "dual-stack": Case(attempt("::", PORT, family=V6, IPV6_V6ONLY=0), ("::", PORT), more=TCP6 | {"v6only": False}),
    "v6only": Case(attempt("::", PORT, family=V6, IPV6_V6ONLY=1), ("::", PORT), more=TCP6 | {"v6only": True}),
    # An address that is not the wildcard makes the socket IPv6 only (__inet6_bind, net/ipv6/af_inet6.c).
    "v6only-by-address": Case(attempt("::1", 0, family=V6, IPV6_V6ONLY=0), V6_HERE, more=TCP6 | {"v6only": True}),
    "v4-mapped": Case(
        attempt("::ffff:127.0.0.1", PORT, family=V6), ("::ffff:127.0.0.1", PORT), more=TCP6 | {"v6only": False}
    ),
    "v4-mapped-v6only": Case(
        attempt("::ffff:127.0.0.1", PORT, family=V6, IPV6_V6ONLY=1),
        ("::ffff:127.0.0.1", PORT),
        errno.EINVAL,
        TCP6 | {"v6only": True},
    ),
    "link-local": Case(
        attempt("fe80::1", PORT, 0, 1, family=V6),
        ("fe80::1", PORT),
        more=TCP6 | {"ifindex": 1, "ifname": LOOPBACK},
    ),
    "link-local-without-scope": Case(
        attempt("fe80::1", PORT, family=V6), ("fe80::1", PORT), errno.EINVAL, TCP6 | {"ifindex": 0}
    ),
    # The scope is the socket's device from then on, even though the bind fails; here there is no such device.
    "link-local-of-no-device": Case(
        attempt("fe80::1", PORT, 0, 4242, family=V6),
        ("fe80::1", PORT),
        errno.ENODEV,
        TCP6 | {"ifindex": 4242, "ifname": None},
    ),
    "multicast6": Case(
        attempt("ff02::fb", PORT, 0, 1, family=V6, kind=DGRAM),
        ("ff02::fb", PORT),
        more=UDP6 | {"ifindex": 1, "ifname": LOOPBACK},
    ),
    "shortest-length-6": Case(raw_attempt(sockaddr_in6(*V6_PORT)[:24], family=V6), V6_PORT, more=TCP6),
    # --- groups: the socket receives at the group and sends from 0.0.0.0
    "multicast": Case(attempt("224.0.0.251", PORT, kind=DGRAM), ("224.0.0.251", PORT), more=UDP),
    "broadcast": Case(attempt("255.255.255.255", PORT, kind=DGRAM), ("255.255.255.255", PORT), more=UDP),
    # --- options
    "SO_REUSEPORT": Case(attempt(*V4_PORT, SO_REUSEPORT=1), V4_PORT, more={"opts": "r...."}),
    "SO_REUSEADDR": Case(attempt(*V4_PORT, SO_REUSEADDR=1), V4_PORT, more={"opts": ".R..."}),
    "IP_BIND_ADDRESS_NO_PORT": Case(
        attempt(*V4_HERE, IP_BIND_ADDRESS_NO_PORT=1), V4_HERE, more={"opts": "..N..", "port": 0}
    ),
    "IP_BIND_ADDRESS_NO_PORT-6": Case(
        attempt(*V6_HERE, family=V6, IP_BIND_ADDRESS_NO_PORT=1), V6_HERE, more=TCP6 | {"opts": "..N..", "port": 0}
    ),
    "IP_TRANSPARENT": Case(attempt(ABSENT, PORT, IP_TRANSPARENT=1), (ABSENT, PORT), more={"opts": "...T."}),
    "IP_FREEBIND": Case(attempt(ABSENT, PORT, IP_FREEBIND=1), (ABSENT, PORT), more={"opts": "....F"}),
    "all-options": Case(
        attempt(
            *V4_HERE,
            SO_REUSEPORT=1,
            SO_REUSEADDR=1,
            IP_BIND_ADDRESS_NO_PORT=1,
            IP_TRANSPARENT=1,
            IP_FREEBIND=1,
        ),
        V4_HERE,
        more={"opts": "rRNTF", "port": 0},
    ),
    # --- devices
    "SO_BINDTODEVICE": Case(
        attempt(*V4_HERE, SO_BINDTODEVICE=os.fsencode(LOOPBACK) + b"\0"),
        V4_HERE,
        more={"ifindex": 1, "ifname": LOOPBACK},
    ),
    "device-gone": Case(attempt(*V4_HERE, SO_BINDTOIFINDEX=4242), V4_HERE, more={"ifindex": 4242, "ifname": None}),
    "device-with-hostile-name": Case(
        on_device_named("\x1b[2J\\\udcff\x7f"), V4_HERE, more={"ifindex": 1, "ifname": "\\x1b[2J\\\\\\xff\\x7f"}
    ),
    "socket-of-another-network": Case(of_another_network, V4_HERE),
    # --- other protocols
    "raw": Case(
        attempt("127.0.0.1", 7, kind=RAW, proto=ICMP),
        ("127.0.0.1", 7),
        more=RAW4,
    ),
    "raw6": Case(
        attempt("::1", 7, family=V6, kind=RAW, proto=ICMPV6),
        ("::1", 7),
        more=RAW6,
    ),
    "raw-failed": Case(
        attempt(ABSENT, 7, kind=RAW, proto=ICMP),
        (ABSENT, 7),
        errno.EADDRNOTAVAIL,
        RAW4,
    ),
    # Where others have a port, these have the identifier of their echo requests.
    "ping": Case(attempt(*V4_HERE, kind=DGRAM, proto=ICMP), V4_HERE, more=PING),
    "ping6": Case(
        attempt(*V6_HERE, family=V6, kind=DGRAM, proto=ICMPV6),
        V6_HERE,
        more=PING6,
    ),
    "ping-failed": Case(
        attempt(ABSENT, 7, kind=DGRAM, proto=ICMP),
        (ABSENT, 7),
        errno.EADDRNOTAVAIL,
        PING,
    ),
    "udplite": Case(
        attempt(*V4_HERE, kind=DGRAM, proto=UDPLITE), V4_HERE, more=UDP | {"proto": "UDPLITE", "proto_num": 136}
    ),
    "udplite6": Case(
        attempt(*V6_HERE, family=V6, kind=DGRAM, proto=UDPLITE),
        V6_HERE,
        more=UDP6 | {"proto": "UDPLITE", "proto_num": 136},
    ),
    "mptcp": Case(attempt(*V4_HERE, proto=MPTCP), V4_HERE, more={"proto": "MPTCP", "proto_num": 262}),
    "mptcp6": Case(
        attempt(*V6_HERE, family=V6, proto=MPTCP), V6_HERE, more=TCP6 | {"proto": "MPTCP", "proto_num": 262}
    ),
    "mptcp-taken": Case(
        taken("127.0.0.1", proto=MPTCP),
        V4_PORT,
        errno.EADDRINUSE,
        {"proto": "MPTCP", "proto_num": 262},
        earlier=1,
    ),
    "mptcp6-absent": Case(
        attempt("2001:db8::7", PORT, family=V6, proto=MPTCP),
        ("2001:db8::7", PORT),
        errno.EADDRNOTAVAIL,
        TCP6 | {"proto": "MPTCP", "proto_num": 262},
    ),
    "sctp": Case(attempt(*V4_HERE, proto=SCTP), V4_HERE, more={"proto": "SCTP", "proto_num": 132}),
    "sctp6": Case(attempt(*V6_HERE, family=V6, proto=SCTP), V6_HERE, more=TCP6 | {"proto": "SCTP", "proto_num": 132}),
    "sctp-seqpacket": Case(
        attempt(*V4_PORT, kind=socket.SOCK_SEQPACKET, proto=SCTP),
        V4_PORT,
        more={"sock_type": "seqpacket", "proto": "SCTP", "proto_num": 132},
    ),
    "sctp-failed": Case(
        attempt(ABSENT, PORT, proto=SCTP),
        (ABSENT, PORT),
        errno.EADDRNOTAVAIL,
        {"proto": "SCTP", "proto_num": 132},
    ),
    # --- binds that fail: what was asked for, though the socket holds nothing, or what it had before
    "taken": Case(taken("127.0.0.1"), V4_PORT, errno.EADDRINUSE, earlier=1),
    "taken6": Case(taken("::1", family=V6), V6_PORT, errno.EADDRINUSE, TCP6 | {"v6only": False}, earlier=1),
    "absent": Case(attempt(ABSENT, PORT), (ABSENT, PORT), errno.EADDRNOTAVAIL),
    "absent6": Case(attempt("2001:db8::7", PORT, family=V6), ("2001:db8::7", PORT), errno.EADDRNOTAVAIL, TCP6),
    "privileged-port-refused": Case(
        lambda: as_user(65534, attempt("127.0.0.1", 81)), ("127.0.0.1", 81), errno.EACCES, {"uid": 65534}
    ),
    "twice": Case(twice, ("127.0.0.1", PORT + 1), errno.EINVAL, earlier=1),
    # --- requests that are no proper address
    # Old programs forget the family: IPv4 sockets take that for the wildcard (net/ipv4/af_inet.c).
    "unspecified-family": Case(
        raw_attempt(sockaddr_in("0.0.0.0", PORT, socket.AF_UNSPEC)), ("0.0.0.0", PORT), more={"addr": "0.0.0.0"}
    ),
    "unspecified-family-with-address": Case(
        raw_attempt(sockaddr_in("127.0.0.1", PORT, socket.AF_UNSPEC)), V4_PORT, errno.EAFNOSUPPORT
    ),
    "unspecified-family-6": Case(
        raw_attempt(sockaddr_in6("::", PORT, family=socket.AF_UNSPEC), family=V6),
        ("::", PORT),
        errno.EAFNOSUPPORT,
        TCP6,
    ),
    "unix-address": Case(
        raw_attempt(struct.pack("=H", socket.AF_UNIX) + b"/tmp/x".ljust(14, b"\0")), (None, None), errno.EAFNOSUPPORT
    ),
    "v6-address-of-v4-socket": Case(raw_attempt(sockaddr_in6(*V6_PORT)), V6_PORT, errno.EAFNOSUPPORT),
    "v4-address-of-v6-socket": Case(
        raw_attempt(sockaddr_in(*V4_PORT).ljust(28, b"\0"), family=V6), V4_PORT, errno.EAFNOSUPPORT, TCP6
    ),
    "v4-length-of-v6-socket": Case(raw_attempt(sockaddr_in(*V4_PORT), family=V6), V4_PORT, errno.EINVAL, TCP6),
    "short": Case(raw_attempt(sockaddr_in(*V4_PORT)[:8]), V4_PORT, errno.EINVAL),
    "short-without-address": Case(raw_attempt(sockaddr_in(*V4_PORT)[:4]), (None, PORT), errno.EINVAL),
    "short-without-port": Case(raw_attempt(sockaddr_in(*V4_PORT)[:2]), (None, None), errno.EINVAL),
    "short-6": Case(raw_attempt(sockaddr_in6(*V6_PORT)[:23], family=V6), (None, PORT), errno.EINVAL, TCP6),
    # The kernel looks at what lay in its own buffer before; nobody asked for that.
    "nothing": Case(raw_attempt(b""), (None, None), errno.EINVAL),
    "longest-length": Case(raw_attempt(sockaddr_in(*V4_PORT).ljust(128, b"\xff")), V4_PORT),
    "too-long": Case(raw_attempt(sockaddr_in(*V4_PORT).ljust(129, b"\0")), UNREAD, errno.EINVAL, kinds=("bad-length",)),
    "negative-length": Case(raw_attempt(sockaddr_in(*V4_PORT), -1), UNREAD, errno.EINVAL, kinds=("bad-length",)),
    "untouched-memory": Case(from_untouched_memory, V4_PORT),
    # --- no socket
    "closed": Case(
        descriptor_attempt(lambda: 999, sockaddr_in("127.0.0.1", 53)),
        ("127.0.0.1", 53),
        errno.EBADF,
        NO_SOCKET,
        ("no-socket",),
    ),
    "closed-6": Case(
        descriptor_attempt(lambda: 999, sockaddr_in6("::1", 53)),
        ("::1", 53),
        errno.EBADF,
        NO_SOCKET | {"family": "inet6"},
        ("no-socket",),
    ),
    "file": Case(
        descriptor_attempt(lambda: os.open("/dev/null", os.O_RDONLY), sockaddr_in("127.0.0.1", 53)),
        ("127.0.0.1", 53),
        errno.ENOTSOCK,
        NO_SOCKET,
        ("no-socket",),
    ),
    # --- who
    "thread-of-another-name": Case(named(b"lightning"), V4_HERE, more={"comm": "lightning"}),
    "hostile-name": Case(
        named(b"\x1b]0;\x07\\\xff\t\r\n\x7f\xc3a\x80"),
        V4_HERE,
        more={"comm": "\\x1b]0;\\x07\\\\\\xff\\x09\\x0d\\x0a\\x7f\\xc3a\\x80"},
    ),
    "ended-before-it-is-read": Case(odd("call", "given"), V4_HERE),
    "ended-in-its-cgroup": Case(in_cgroup(odd("call", "given")), V4_HERE),
    "pid-namespace": Case(in_pid_namespace, V4_HERE),
    "mount-namespace": Case(in_mount_namespace, V4_HERE),
    "user": Case(lambda: as_user(4711, attempt(*V4_HERE)), V4_HERE, more={"uid": 4711}),
    # --- somebody else's programs, and security modules
    "rewritten": Case(
        in_cgroup(attempt("127.0.0.1", 18500), places.BIND4, places.rewriting("127.0.0.2", 18600)),
        ("127.0.0.1", 18500),
        more={"addr": "127.0.0.2", "port": 18600},
    ),
    "rewritten-into-failure": Case(
        in_cgroup(attempt("127.0.0.1", 18500), places.BIND4, places.rewriting(ABSENT, 18600)),
        ("127.0.0.1", 18500),
        errno.EADDRNOTAVAIL,
    ),
    "denied-by-cgroup": Case(in_cgroup(attempt(*V4_PORT), places.BIND4, places.DENYING), V4_PORT, errno.EPERM),
    "denied-by-cgroup-6": Case(
        in_cgroup(attempt(*V6_PORT, family=V6), places.BIND6, places.DENYING), V6_PORT, errno.EPERM, TCP6
    ),
    # This program is asked when the port is taken already, and it is given back.
    "denied-by-cgroup-late": Case(
        in_cgroup(attempt(*V4_PORT), places.POST_BIND4, places.DENYING), V4_PORT, errno.EPERM
    ),
    "denied-by-security-module": Case(
        denied(attempt(*V4_PORT)), V4_PORT, errno.EACCES, kinds=("denied",), via="denied"
    ),
    "denied-by-security-module-6": Case(
        denied(attempt(*V6_PORT, family=V6)), V6_PORT, errno.EACCES, TCP6, ("denied",), "denied"
    ),
    # --- by the kernel, in the name of whoever made it do so
    "kernel": Case(by_the_kernel, ("0.0.0.0", PORT), more=UDP, kinds=("kernel",), via="around"),
    # --- by io_uring
    "uring": Case(odd("uring", "given"), V4_HERE, kinds=("io_uring",), via="around"),
    "uring6": Case(odd("uring", "given6"), V6_HERE, more=TCP6, kinds=("io_uring",), via="around"),
    "uring-registered-file": Case(odd("registered", "given"), V4_HERE, kinds=("io_uring",), via="around"),
    # Two threads that the kernel makes for the process, with its name for them; the pid stays the process's.
    "uring-sqpoll": Case(
        by_helper(odd("sqpoll", "given"), "iou-sqp"),
        V4_HERE,
        kinds=("io_uring",),
        via="around",
    ),
    "uring-worker": Case(
        by_helper(odd("worker", "given"), "iou-wrk"),
        V4_HERE,
        kinds=("io_uring",),
        via="around",
    ),
    "uring-sqpoll-failed": Case(
        by_helper(odd("sqpoll", "absent"), "iou-sqp"),
        (ABSENT, 18451),
        errno.EADDRNOTAVAIL,
        kinds=("io_uring-failed",),
        via="around",
    ),
    "uring-failed": Case(
        odd("uring", "absent"), (ABSENT, 18451), errno.EADDRNOTAVAIL, kinds=("io_uring-failed",), via="around"
    ),
    "uring-closed": Case(
        odd("uring", "closed"), ("127.0.0.1", 53), errno.EBADF, NO_SOCKET, ("io_uring-refused",), "around"
    ),
    "uring-file": Case(
        odd("uring", "file"), ("127.0.0.1", 53), errno.ENOTSOCK, NO_SOCKET, ("io_uring-refused",), "around"
    ),
    # io_uring copies the request itself, before anything that binds is called (io_bind_prep, io_uring/net.c).
    "uring-too-long": Case(odd("uring", "long"), UNREAD, errno.EINVAL, kinds=("io_uring-refused",), via="around"),
    "uring-raw": Case(
        odd("uring", "raw"),
        ("127.0.0.1", 7),
        more=RAW4,
        kinds=("unhooked-raw",),
        via="around",
    ),
    "uring-ping": Case(
        odd("uring", "ping"),
        V4_HERE,
        more=PING,
        kinds=("unhooked-raw",),
        via="around",
    ),
    "uring-no-port": Case(
        odd("uring", "no-port"), V4_HERE, more={"opts": "..N.."}, kinds=("unhooked-raw",), via="around"
    ),
    "uring-denied": Case(
        denied(odd("uring", "absent")),
        (ABSENT, 18451),
        errno.EACCES,
        kinds=("denied", "io_uring-failed"),
        via="denied",
    ),
    # --- by 32-bit processes
    "compat": Case(odd("compat", "given"), V4_HERE, kinds=("compat",), via="around"),
    "compat6": Case(odd("compat", "given6"), V6_HERE, more=TCP6, kinds=("compat",), via="around"),
    "compat-failed": Case(
        odd("compat", "absent"), (ABSENT, 18451), errno.EADDRNOTAVAIL, kinds=("compat-failed",), via="around"
    ),
    "compat-closed": Case(
        odd("compat", "closed"),
        ("127.0.0.1", 53),
        errno.EBADF,
        NO_SOCKET,
        ("compat-failed", "no-socket"),
        "around",
    ),
    "compat-file": Case(
        odd("compat", "file"),
        ("127.0.0.1", 53),
        errno.ENOTSOCK,
        NO_SOCKET,
        ("compat-failed", "no-socket"),
        "around",
    ),
    "compat-too-long": Case(
        odd("compat", "long"), UNREAD, errno.EINVAL, kinds=("compat-failed", "bad-length"), via="around"
    ),
    "compat-raw": Case(
        odd("compat", "raw"),
        ("127.0.0.1", 7),
        more=RAW4,
        kinds=("unhooked-raw",),
        via="around",
    ),
    "compat-ping": Case(
        odd("compat", "ping"),
        V4_HERE,
        more=PING,
        kinds=("unhooked-raw",),
        via="around",
    ),
    "compat-no-port": Case(
        odd("compat", "no-port"), V4_HERE, more={"opts": "..N.."}, kinds=("unhooked-raw",), via="around"
    ),
    "socketcall": Case(odd("socketcall", "given"), V4_HERE, kinds=("compat",), via="around"),
    "socketcall6": Case(odd("socketcall", "given6"), V6_HERE, more=TCP6, kinds=("compat",), via="around"),
    "socketcall-failed": Case(
        odd("socketcall", "absent"), (ABSENT, 18451), errno.EADDRNOTAVAIL, kinds=("compat-failed",), via="around"
    ),
    "socketcall-closed": Case(
        odd("socketcall", "closed"),
        ("127.0.0.1", 53),
        errno.EBADF,
        NO_SOCKET,
        ("compat-failed", "no-socket"),
        "around",
    ),
    # --- ports without a bind: nobody is asked
    "listen": Case(without_bind(lambda made: made.listen()), (None, None), kinds=("autobind",)),
    "connect": Case(
        without_bind(lambda made: made.connect(("127.0.0.1", 9)), kind=DGRAM), (None, None), kinds=("autobind",)
    ),
    "connect-tcp": Case(
        without_bind(lambda made: made.connect_ex(("127.0.0.1", 9)), family=V4), (None, None), kinds=("autobind",)
    ),
    "sendto": Case(
        without_bind(lambda made: made.sendto(b"", ("127.0.0.1", 9)), kind=DGRAM), (None, None), kinds=("autobind",)
    ),
    "sctp_bindx": Case(sctp_bindx, (None, None), kinds=("sctp_bindx",)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_case(watch: Watch, case: Case) -> None:
    """Each attempt is one event that says what was asked for, what the socket got and how it ended, or none where the
    tier says that it misses this kind.
    """
    look(watch, case)


def test_every_field_of_a_plain_bind(watch: Watch) -> None:
    """Every field is what the process knows of itself."""
    before = time.time()

    event = look(watch, Case(attempt(*V4_PORT), V4_PORT))

    assert event is not None
    assert event == event | {
        "pid": os.getpid(), "tid": threading.get_native_id(), "ppid": os.getppid(), "uid": os.getuid(),
        "gid": os.getgid(), "exe": Path("/proc/self/exe").resolve().name,
        "comm": Path("/proc/self/comm").read_text(encoding="utf-8").strip(),
        "parent_comm": Path(f"/proc/{os.getppid()}/comm").read_text(encoding="utf-8").strip(),
        "mountnsid": places.inode_of("mnt"),
    }  # fmt: skip
    assert before - 1 < event["time"].replace(tzinfo=datetime.UTC).timestamp() < time.time() + 1


def test_the_cgroup_is_named(watch: Watch) -> None:
    """Id and names of the process's cgroup are those that /proc tells, of version 1 where version 2 says only root."""
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()]
    paths = {name: path for _, names, path in lines for name in names.split(",")}
    path = next((paths[name] for name in ("", "memory", "pids") if paths.get(name, "/") != "/"), "/")

    event = look(watch, Case(attempt(*V4_HERE), V4_HERE))

    parts = path.split("/")
    assert event is not None
    assert (event["cgroup"], event["cgroup_parent"]) == (parts[-1], parts[-2] if len(parts) > 1 else "")
    assert event["cgroup_id"] == (places.cgroup_root() / paths[""].lstrip("/")).stat().st_ino


ID = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (f"docker-{ID}.scope/init.scope", f"docker-{ID}.scope"),
        (f"docker-{ID}.scope/kubelet.slice/kubelet.service", f"docker-{ID}.scope"),
        (f"{ID}/user.slice/user-0.slice/user@0.service/app.slice/some.service", ID),
        (f"{ID}/1/2/3/4/5/6/leaf", ID),
        (f"{ID}/1/2/3/4/5/6/7/leaf", "7"),
        (f"docker-{ID}.scope/kubepods.slice/cri-containerd-{ID[::-1]}.scope", "kubepods.slice"),
        (f"{ID}/{ID[::-1]}/inner/leaf", ID[::-1]),
        ("system.slice/" + "s" * 63 + "/short/leaf", "short"),
        ("system.slice/some.service", "system.slice"),
    ],
    ids=["parent", "above", "far-above", "as-far-as-looked", "further", "own", "nearest", "long-but-no-id", "host"],
)
def test_a_tree_inside_a_container_names_the_container(watch: Watch, path: str, expected: str) -> None:
    """In place of the parent's comes the nearest name above that can hold an id; nothing else is left in its field."""
    watch.clear()
    with places.cgroup(path):
        made = attempt(*V4_HERE)()
    rows = [
        row
        for burst in bursts(watch.tracer)
        for row in np.ascontiguousarray(burst.records).view(records.RECORD)[:, 0].copy()
        if row["pid"] == made.pid
    ]

    watch.seen += len(rows)
    assert [(Path(path).name.encode(), expected.encode())] == [(row["cgroup"], row["cgroup_parent"]) for row in rows]


# --- what is no attempt -------------------------------------------------------------------------------------------


def grown(watch: Watch, before: dict[str, int]) -> dict[str, int]:
    """Counters that moved, and by how much."""
    return {name: value - before[name] for name, value in watch.tracer.counters().items() if value != before[name]}


def unix() -> None:
    """AF_UNIX."""
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("\0bindsnoop-suite")


def netlink() -> None:
    """AF_NETLINK."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW) as made:
        made.bind((0, 0))


def packet() -> None:
    """AF_PACKET."""
    with tcp(socket.AF_PACKET, DGRAM) as made:
        made.bind((LOOPBACK, 0))


def vsock() -> None:
    """AF_VSOCK; without a transport the kernel refuses, which is no attempt either."""
    with tcp(socket.AF_VSOCK) as made:
        bind(made, socket.VMADDR_CID_ANY, PORT)


def closed_unix() -> None:
    """EBADF, with an address of another family."""
    assert raw_bind(999, struct.pack("=H", socket.AF_UNIX) + b"/tmp/x") == errno.EBADF


def closed_unreadable() -> None:
    """EBADF, with an address that nobody can read."""
    assert raw_bind(999, None) == errno.EBADF


def unix_unreadable() -> None:
    """EFAULT of a socket of another family."""
    with socket.socket(socket.AF_UNIX) as made:
        assert raw_bind(made.fileno(), None) == errno.EFAULT


def forbidden() -> None:
    """seccomp's answer: the kernel's bind is never called.

    The filter is asked before the tracepoint of the call's entry, while that of its exit is run all the same
    (syscall_trace_enter and syscall_exit_work, kernel/entry/common.c).
    """

    def run() -> None:
        places.forbid_system_call("bind", errno.EMFILE)
        with tcp() as made:
            assert bind(made, *V4_PORT) == errno.EMFILE

    in_thread(run)


@pytest.mark.parametrize(
    "act",
    [unix, netlink, packet, vsock, closed_unix, closed_unreadable, unix_unreadable, forbidden],
    ids=lambda act: act.__name__,
)
def test_what_is_no_attempt(watch: Watch, act: Callable[[], None]) -> None:
    """It is neither reported nor counted, and the next bind of the same process is seen as ever."""
    watch.clear()
    before = watch.tracer.counters()
    try:
        act()
    except NotHere as reason:
        pytest.skip(str(reason))

    assert watch.events() == []
    # Other processes of this machine may bind meanwhile, but do not ask with addresses that nobody can read.
    assert "faulted" not in grown(watch, before)
    look(watch, Case(attempt(*V4_PORT), V4_PORT))


def test_an_unreadable_request_is_only_counted(watch: Watch) -> None:
    """EFAULT has nothing to report; the attempt is counted all the same."""
    watch.clear()
    before = watch.tracer.counters()
    with tcp() as made:
        assert raw_bind(made.fileno(), None) == errno.EFAULT

    assert watch.events() == []
    # The same hook that sees refused lengths sees this.
    assert grown(watch, before).get("faulted", 0) == (0 if "bad-length" in watch.gaps else 1)


# --- many at once -------------------------------------------------------------------------------------------------


def test_two_threads_bind_one_socket_at_once(watch: Watch) -> None:
    """One wins, the other is told EINVAL; each is one event with what that thread asked for."""
    watch.clear()
    gate = threading.Barrier(2)
    results: dict[int, tuple[int, int]] = {}

    def run(made: socket.socket, port: int) -> None:
        gate.wait()
        results[threading.get_native_id()] = (port, bind(made, "127.0.0.1", port))

    with tcp() as made:
        threads = [threading.Thread(target=run, args=(made, PORT + at)) for at in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    found = watch.events()
    assert sorted(error for _, error in results.values()) == [0, errno.EINVAL]
    assert len(found) == 2
    assert {event["tid"]: (event["port"], event["errno"]) for event in found} == results


def test_binds_of_four_threads_are_each_one_event(tier: str, watch: Watch) -> None:
    """Under load with all hooks: as many events as binds, each thread's own, in the order it made them.

    A kernel that can be preempted skips programs; there a bind may be missing, and is declared. None is there twice.
    """
    rounds = 60
    results: dict[int, list[tuple[str, int, int]]] = {}

    def run(first: int) -> None:
        mine = []
        for at in range(rounds):
            port = first + at
            with tcp() as one, tcp(V6, DGRAM) as other:
                mine += [("127.0.0.1", port, bind(one, "127.0.0.1", port))]
                mine += [("127.0.0.1", port, bind(one, "127.0.0.1", port))]
                mine += [("::1", port, bind(other, "::1", port))]
                mine += [(ABSENT, port, raw_bind(one.fileno(), sockaddr_in(ABSENT, port)))]
        results[threading.get_native_id()] = mine

    with contextlib.closing(open_tracer(tier, ring_bytes=1 << 20, wanted=Wanted(pids=(os.getpid(),)))) as tracer:
        threads = [threading.Thread(target=run, args=(20000 + 1000 * at,)) for at in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        found = events(tracer)
        tracer.detach()
        counts = tracer.counters()
    watch.seen += len(found)

    by_thread: dict[int, list[tuple[str, int, int]]] = {tid: [] for tid in results}
    for event in found:
        by_thread[event["tid"]].append((event["addr"], event["port"], event["errno"]))
    missing = {tid: [row for row in made if row not in by_thread[tid]] for tid, made in results.items()}
    lost = sum(map(len, missing.values()))
    assert by_thread == {tid: [row for row in made if row not in missing[tid]] for tid, made in results.items()}
    assert counts["submitted"] == len(found) == 4 * 4 * rounds - lost
    # What may have been lost is counted; not every hook that was passed by was a bind.
    assert lost <= counts["lost_return_missed"] + counts["lost_hook_skipped"]
    assert lost == 0 or ("PREEMPT" in os.uname().version and lost < 2 * rounds)


# --- what the first tools of this kind got wrong -------------------------------------------------------------------


def seen(watch: Watch, name: str) -> Event:
    """The event of a row of the table. Skips where this tier or kernel has no such bind."""
    event = look(watch, CASES[name])
    if event is None:
        pytest.skip(f"tier {watch.tier} publishes the gap {', '.join(watch.gaps.intersection(CASES[name].kinds))}")
    return event


@pytest.mark.parametrize(
    ("row", "error", "port"),
    [("taken", "EADDRINUSE", PORT), ("absent", "EADDRNOTAVAIL", PORT), ("privileged-port-refused", "EACCES", 81)],
)
def test_first_generation_1_a_failed_bind_shows_its_request(watch: Watch, row: str, error: str, port: int) -> None:
    """Not 0.0.0.0:0: ADDR and PORT are what was asked for, so that a filter on the port finds the failure."""
    event = seen(watch, row)

    assert (error, CASES[row].asked[0], port) == (event["error"], event["addr"], event["port"])


def test_first_generation_2_a_second_bind_shows_its_own_port(watch: Watch) -> None:
    """Not the first one's, which the socket holds."""
    event = seen(watch, "twice")

    assert ("EINVAL", PORT + 1, PORT + 1) == (event["error"], event["port"], event["asked_port"])


@pytest.mark.parametrize(("row", "addr"), [("multicast", "224.0.0.251"), ("broadcast", "255.255.255.255")])
def test_first_generation_3_a_group_is_shown(watch: Watch, row: str, addr: str) -> None:
    """Not 0.0.0.0, from where such a socket sends."""
    assert addr == seen(watch, row)["addr"]


@pytest.mark.parametrize("row", ["raw", "raw6"])
def test_first_generation_4_a_raw_sockets_port_is_not_its_protocol(watch: Watch, row: str) -> None:
    """The port is the one that was asked for, though the socket holds the protocol's number there."""
    assert seen(watch, row)["port"] == 7


@pytest.mark.parametrize("row", ["mptcp", "mptcp6", "mptcp-taken", "mptcp6-absent"])
def test_first_generation_5_mptcp_is_seen(watch: Watch, row: str) -> None:
    """Once, as MPTCP, whichever function of the kernel binds its first subflow."""
    assert seen(watch, row)["proto"] == "MPTCP"


@pytest.mark.parametrize(
    ("row", "opts"), [("IP_FREEBIND", "....F"), ("IP_TRANSPARENT", "...T."), ("IP_BIND_ADDRESS_NO_PORT", "..N..")]
)
def test_first_generation_6_options_are_where_the_kernel_keeps_them(watch: Watch, row: str, opts: str) -> None:
    """F, T and N on every kernel, each letter by its own option alone."""
    assert opts == seen(watch, row)["opts"]


@pytest.mark.parametrize(
    ("row", "error"),
    [("closed", "EBADF"), ("file", "ENOTSOCK"), ("denied-by-cgroup", "EPERM")],
)
def test_first_generation_8_what_ends_before_inet_bind_is_seen(watch: Watch, row: str, error: str) -> None:
    """With its errno and the requested address."""
    event = seen(watch, row)

    assert (error, *CASES[row].asked) == (event["error"], event["asked_addr"], event["asked_port"])


def test_first_generation_8_a_denial_is_seen(watch: Watch) -> None:
    """A security module's, with the errno of its choice and the requested address."""
    event = seen(watch, "denied-by-security-module")

    assert event["error"] in ("EACCES", "EPERM")
    assert V4_PORT == (event["asked_addr"], event["asked_port"])


def test_first_generation_9_a_thread_does_not_hide_its_process(watch: Watch) -> None:
    """COMM is the thread's name; pid and exe are the process's."""
    event = seen(watch, "thread-of-another-name")

    assert event["comm"] == "lightning"
    assert (event["pid"], event["exe"]) == (os.getpid(), Path("/proc/self/exe").resolve().name)
    assert event["tid"] != event["pid"]


def test_first_generation_9_sqpoll_does_not_hide_its_process(watch: Watch) -> None:
    """Under SQPOLL the thread is the kernel's helper; pid and exe are the process's."""
    event = seen(watch, "uring-sqpoll")

    assert (event["comm"], event["exe"]) == (f"iou-sqp-{event['pid']}", "oddbind")


@pytest.mark.parametrize(("row", "v6only"), [("dual-stack", False), ("v6only", True), ("tcp", None)])
def test_first_generation_10_a_wildcard_says_whether_it_exposes_ipv4(
    watch: Watch, row: str, v6only: bool | None
) -> None:
    """IPV6_V6ONLY is recorded, and is nothing where there is no such option."""
    assert seen(watch, row)["v6only"] is v6only


def test_first_generation_11_the_device_is_named_where_the_socket_is(watch: Watch) -> None:
    """By the socket's network namespace, though reader and binding thread are in others, which have no such name."""
    assert "elsewhere" == seen(watch, "socket-of-another-network")["ifname"]


def test_first_generation_11_a_device_that_is_gone_drops_nothing(watch: Watch) -> None:
    """The event stays, with the index."""
    event = seen(watch, "device-gone")

    assert (4242, None) == (event["ifindex"], event["ifname"])


def test_mptcp_around_the_system_call(watch: Watch) -> None:
    """MPTCP through io_uring is seen once; at post_bind the kernel shows only the first subflow, which is TCP."""
    row = Case(odd("uring", "mptcp"), V4_HERE, kinds=("io_uring",), via="around")
    proto = {"proto": "MPTCP", "proto_num": 262} if hook(watch, row.via) != "post_bind" else {}

    # The subflow's cookie is its own, and the process is told the other's.
    look(watch, replace(row, run=lambda: row.run()._replace(cookie=0), more=proto))
