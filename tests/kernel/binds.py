"""Binds as a process makes them, those that Python's socket module forbids included."""

from __future__ import annotations

import ctypes
import os
import platform
import socket
import struct
import threading
from collections.abc import Callable

_libc = ctypes.CDLL(None, use_errno=True)


def sockaddr_in(address: str, port: int, family: int = socket.AF_INET) -> bytes:
    """``struct sockaddr_in``."""
    return struct.pack("=H", family) + struct.pack("!H", port) + socket.inet_aton(address) + bytes(8)


def raw_bind(descriptor: int, request: bytes | None, length: int | None = None) -> int:
    """bind(2) with these bytes, or with an address nobody can read for None; the error number, 0 on success."""
    memory = ctypes.c_void_p(8) if request is None else request
    size = length if length is not None else 16 if request is None else len(request)
    return ctypes.get_errno() if _libc.bind(descriptor, memory, ctypes.c_int(size)) else 0


def bind(where: socket.socket, *address: object) -> int:
    """``socket.bind``; the error number, 0 on success."""
    try:
        where.bind(address)
    except OSError as error:
        return error.errno or -1
    return 0


def as_user(uid: int, action: Callable[[], object]) -> None:
    """Runs ``action`` in a thread that is this user; threads have credentials of their own in Linux."""
    setresuid = {"x86_64": 117, "aarch64": 147}[platform.machine()]
    failed = []

    def run() -> None:
        if _libc.syscall(setresuid, uid, uid, uid):
            failed.append(ctypes.get_errno())
        else:
            action()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert [] == failed, os.strerror(failed[0])
