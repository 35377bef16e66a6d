"""More binds at once than a kernel has room to return from: what is missed is counted, to the last one.

A return probe has a fixed number of places, some two a CPU. Threads that wait inside ``inet_bind`` hold one each, and
the end of every further call goes by unseen.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import platform
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.errors import TracerUnavailable
from pipeline.tracer import Wanted, host, open_tracer
from tests.kernel.binds import raw_bind, sockaddr_in
from tests.kernel.plugin import build, events

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="tracing needs root")

THREADS = 24
PORT = 18710

# include/uapi/linux/userfaultfd.h
UFFDIO_API, UFFDIO_REGISTER, UFFDIO_ZEROPAGE = 0xC018AA3F, 0xC020AA00, 0xC020AA04


@contextlib.contextmanager
def locked(made: socket.socket) -> Iterator[None]:
    """The socket, locked by the kernel: a thread is sending from a page of memory that comes when the block ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    faults = libc.syscall({"x86_64": 323, "aarch64": 282}[platform.machine()], os.O_CLOEXEC)
    if faults < 0:
        pytest.skip(f"this kernel has no userfaultfd: {os.strerror(ctypes.get_errno())}")
    fcntl.ioctl(faults, UFFDIO_API, struct.pack("=QQQ", 0xAA, 0, 0))
    page = libc.mmap(None, ctypes.c_size_t(mmap.PAGESIZE), 3, 0x22, -1, ctypes.c_long(0))
    fcntl.ioctl(faults, UFFDIO_REGISTER, struct.pack("=QQQQ", page, mmap.PAGESIZE, 1, 0))

    def send() -> None:
        address = sockaddr_in("127.0.0.1", 9)
        libc.sendto(made.fileno(), ctypes.c_void_p(page), ctypes.c_size_t(64), socket.MSG_MORE, address, len(address))

    sender = threading.Thread(target=send)
    sender.start()
    try:
        os.read(faults, 32)
        yield
    finally:
        fcntl.ioctl(faults, UFFDIO_ZEROPAGE, struct.pack("=QQQq", page, mmap.PAGESIZE, 0, 0))
        sender.join()
        os.close(faults)
        libc.munmap(ctypes.c_void_p(page), ctypes.c_size_t(mmap.PAGESIZE))


def is_binding(thread: threading.Thread) -> bool:
    """Whether a thread waits inside bind(2)."""
    number, *_ = Path(f"/proc/self/task/{thread.native_id}/syscall").read_text().split()
    return number == {"x86_64": "49", "aarch64": "200"}[platform.machine()]


def wait_all_at_once(tier: str) -> tuple[int, dict[str, int]]:
    """How many of THREADS binds, all under way at the same time, gave an event, and the counters after that."""
    build()
    address = sockaddr_in("127.0.0.1", PORT)
    with (
        contextlib.closing(open_tracer(tier, wanted=Wanted(pids=(os.getpid(),)))) as tracer,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made,
    ):
        threads = [threading.Thread(target=raw_bind, args=(made.fileno(), address)) for _ in range(THREADS)]
        with locked(made):
            for thread in threads:
                thread.start()
            while not all(map(is_binding, threads)):
                os.sched_yield()
        for thread in threads:
            thread.join()
        seen = len(events(tracer))
        tracer.detach()
        return seen, tracer.counters()


def test_every_bind_is_an_event_or_declared(tier: str) -> None:
    """Of threads that all wait in bind() at once each is seen, as far as anybody can promise that.

    bcc misses some where tracefs is not mounted. Kernels that take the CPU from a program in the middle may have all
    its copies stuck at once when there is too little of it, as in an emulator: then one is missed, and counted.
    """
    seen, counts = wait_all_at_once(tier)

    assert seen + counts["lost_return_missed"] == THREADS
    # A hook that was passed by is the most that can be missing, and need not have been a bind.
    assert counts["attempted"] == THREADS + counts["lost_hook_skipped"]
    starved = 2 if tier != "kprobe" and "PREEMPT" in os.uname().version else 0
    assert seen >= THREADS - starved or (tier == "bcc" and not host.mounts("tracefs"))


def test_ends_that_nobody_follows_are_counted(tier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where tracefs cannot be written, kprobes follow few calls at once; the others are missed, and counted."""

    def refuse(*_: object) -> None:
        raise TracerUnavailable("tracefs cannot be written")

    monkeypatch.setattr(host, "ReturnProbe", refuse)
    seen, counts = wait_all_at_once(tier)

    assert seen + counts["lost_return_missed"] == THREADS
    # A hook that was passed by is the most that can be missing, and need not have been a bind.
    assert counts["attempted"] == THREADS + counts["lost_hook_skipped"]
    assert tier != "kprobe" or seen < THREADS
