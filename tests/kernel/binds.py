"""Binds as a process makes them, those that Python's socket module forbids included.

Each gives an ``Attempted``: what the process itself learned from the kernel about its bind. A test compares that, and
what it asked for, with the event.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import os
import platform
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

_libc = ctypes.CDLL(None, use_errno=True)

Result = TypeVar("Result")

ODDBIND = Path(__file__).parent / "oddbind"
ODDBIND32 = Path(__file__).parent / "oddbind32"
"""The same as a 32-bit program, for architectures whose 64-bit programs have no way into the 32-bit system calls."""

V4, V6 = socket.AF_INET, socket.AF_INET6
STREAM, DGRAM, RAW = socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW
ICMP, ICMPV6, UDPLITE, SCTP, MPTCP = 1, 58, 136, 132, 262

OPTIONS = {
    "SO_REUSEADDR": (socket.SOL_SOCKET, socket.SO_REUSEADDR),
    "SO_REUSEPORT": (socket.SOL_SOCKET, socket.SO_REUSEPORT),
    "SO_BINDTODEVICE": (socket.SOL_SOCKET, 25),
    "SO_BINDTOIFINDEX": (socket.SOL_SOCKET, 62),
    "IP_FREEBIND": (socket.IPPROTO_IP, 15),
    "IP_TRANSPARENT": (socket.IPPROTO_IP, 19),
    "IP_BIND_ADDRESS_NO_PORT": (socket.IPPROTO_IP, 24),
    "IPV6_V6ONLY": (socket.IPPROTO_IPV6, socket.IPV6_V6ONLY),
}
_SO_COOKIE = 57


class NotHere(Exception):
    """This kernel or machine cannot do what the test wants to look at; the text says which call refused, and how."""


class Attempted(NamedTuple):
    """What the process knows of its bind.

    ``error`` is the call's error number, 0 on success. Of the socket afterwards, where there is one: ``name`` is
    getsockname(2)'s address and port, ``cookie`` its number, ``device`` the index of its device (0 for none) and
    ``v6only`` what the option says (None where there is none). ``more`` are fields that only this attempt knows.
    """

    error: int
    name: tuple[str, int] | None
    pid: int
    tid: int
    cookie: int = 0
    device: int = 0
    v6only: bool | None = None
    more: Mapping[str, Any] = {}


# --- the system call ----------------------------------------------------------------------------------------------


def sockaddr_in(address: str, port: int, family: int = V4) -> bytes:
    """``struct sockaddr_in``."""
    return struct.pack("=H", family) + struct.pack("!H", port) + socket.inet_aton(address) + bytes(8)


def sockaddr_in6(address: str, port: int, scope: int = 0, family: int = V6) -> bytes:
    """``struct sockaddr_in6``."""
    begin = struct.pack("=H", family) + struct.pack("!HI", port, 0)
    return begin + socket.inet_pton(V6, address) + struct.pack("=I", scope)


def raw_bind(descriptor: int, request: bytes | ctypes.c_char | None, length: int | None = None) -> int:
    """bind(2) with these bytes, or those that begin at this one, or with an address nobody can read for None; the error
    number, 0 on success.
    """
    memory = ctypes.c_void_p(8) if request is None else request if isinstance(request, bytes) else ctypes.byref(request)
    size = length if length is not None else len(request) if isinstance(request, bytes) else 16
    return ctypes.get_errno() if _libc.bind(descriptor, memory, ctypes.c_int(size)) else 0


def bind(where: socket.socket, *address: object) -> int:
    """``socket.bind``; the error number, 0 on success."""
    try:
        where.bind(address)
    except OSError as error:
        return error.errno or -1
    return 0


def tcp(family: int = V4, kind: int = STREAM, proto: int = 0, **options: Any) -> socket.socket:
    """A socket with options such as ``SO_REUSEPORT=1``; NotHere when the kernel has no such socket."""
    try:
        made = socket.socket(family, kind, proto)
    except OSError as error:
        raise NotHere(f"socket({family}, {kind}, {proto}): {error.strerror}") from error
    for name, value in options.items():
        made.setsockopt(*OPTIONS[name], value)
    return made


def given_port(made: socket.socket) -> int:
    """The port that the kernel says the socket has."""
    port: int = made.getsockname()[1]
    return port


# --- attempts, with what the process learns -----------------------------------------------------------------------


def told(made: socket.socket, error: int, **more: Any) -> Attempted:
    """What this thread learns of the socket that it has just tried to bind."""
    address, port = made.getsockname()[:2]
    v6only = None
    if made.family == V6:
        # MPTCP sockets have got the option only since Linux 5.16.
        with contextlib.suppress(OSError):
            v6only = bool(made.getsockopt(*OPTIONS["IPV6_V6ONLY"]))
    return Attempted(
        error,
        (address.partition("%")[0], port),
        os.getpid(),
        threading.get_native_id(),
        int.from_bytes(made.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8), sys.byteorder),
        made.getsockopt(*OPTIONS["SO_BINDTOIFINDEX"]),
        v6only,
        more,
    )


def told_nothing(error: int) -> Attempted:
    """What this thread learns when there is no socket."""
    return Attempted(error, None, os.getpid(), threading.get_native_id())


def attempt(*address: object, **how: Any) -> Callable[[], Attempted]:
    """A bind of a new socket: ``family``, ``kind`` and ``proto`` of it, and its options, are ``how``."""

    def run() -> Attempted:
        with tcp(**how) as made:
            return told(made, bind(made, *address))

    return run


def raw_attempt(request: bytes | None, length: int | None = None, **how: Any) -> Callable[[], Attempted]:
    """A bind of a new socket with these bytes."""

    def run() -> Attempted:
        with tcp(**how) as made:
            return told(made, raw_bind(made.fileno(), request, length))

    return run


def descriptor_attempt(open_it: Callable[[], int], request: bytes | None) -> Callable[[], Attempted]:
    """A bind of a descriptor that is no socket."""

    def run() -> Attempted:
        descriptor = open_it()
        error = raw_bind(descriptor, request)
        if descriptor < 999:
            os.close(descriptor)
        return told_nothing(error)

    return run


def odd(way: str, what: str) -> Callable[[], Attempted]:
    """A bind by a process of its own that has ended when this returns; ways and objects are those of oddbind.c."""
    command = [ODDBIND, way, what]
    if way == "compat" and platform.machine() == "aarch64":
        command = [ODDBIND32, "call", what]

    def run() -> Attempted:
        try:
            child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        except OSError as error:
            if command[0] == ODDBIND:
                raise
            raise NotHere(f"{way}: {ODDBIND32.name}: {error.strerror}") from error
        with child:
            said, reason = child.communicate()
        if child.returncode == 77:
            raise NotHere(f"{way}: {reason.strip()}")
        assert child.returncode == 0, f"oddbind {way} {what} ended with {child.returncode}: {reason}"
        error, port, cookie = map(int, said.split())
        address, v6only = ("::1", True) if what == "given6" else ("127.0.0.1", None)
        name = (address, port) if cookie else None
        who = {"comm": command[0].name, "exe": command[0].name, "ppid": os.getpid()}
        return Attempted(error, name, child.pid, child.pid, cookie, v6only=v6only, more=who)

    return run


# --- threads: credentials, namespaces and sandboxes belong to a thread ---------------------------------------------


def in_thread(action: Callable[[], Result]) -> Result:
    """What ``action`` gives or raises in a thread of its own, which ends with it."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(action).result()


def system_call(number: int, *arguments: Any) -> int:
    """A system call by its number. OSError."""
    result = int(_libc.syscall(number, *arguments))
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result


def number_of(name: str) -> int:
    """The number of a system call on this architecture."""
    return {
        "x86_64": {"bind": 49, "setresuid": 117, "bpf": 321},
        "aarch64": {"bind": 200, "setresuid": 147, "bpf": 280},
    }[platform.machine()][name]


def as_user(uid: int, action: Callable[[], Result]) -> Result:
    """What ``action`` gives in a thread that is this user; threads have credentials of their own in Linux."""

    def run() -> Result:
        system_call(number_of("setresuid"), uid, uid, uid)
        return action()

    return in_thread(run)
