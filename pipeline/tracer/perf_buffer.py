"""Reads the kernel's perf buffers, what there was before the ring buffer: one a CPU, read together as one.

In: nothing; out: a descriptor for each CPU, which whoever writes records finds in a map, and bursts of what was
written. bcc brings a reader of its own that calls Python for every record; this one takes all that waits at once.

The records of several CPUs come out in the order of their time, which is the first word of each. Unlike a ring that is
pinned they die with the reader.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import platform
import re
import select
import struct
import threading
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from pipeline.errors import TracerUnavailable
from pipeline.tracer import Burst, host

if TYPE_CHECKING:
    import numpy.typing as npt

# include/uapi/linux/perf_event.h: numbers, struct perf_event_attr as of its second version, and the page before the
# data, struct perf_event_mmap_page.
_PERF_TYPE_SOFTWARE: Final = 1
_PERF_COUNT_SW_BPF_OUTPUT: Final = 10
_PERF_SAMPLE_RAW: Final = 1 << 10
_WATERMARK: Final = 1 << 14
_PERF_FLAG_FD_CLOEXEC: Final = 8
_PERF_EVENT_IOC_ENABLE: Final = 0x2400
_PERF_RECORD_SAMPLE: Final = 9
_ATTRIBUTES: Final = struct.Struct("=IIQQQQQIIQ8x")
_PAGE_HEAD_AT: Final = 1024
_PAGE_TAIL_AT: Final = 1032

_HEADER: Final = np.dtype([("type", np.uint32), ("misc", np.uint16), ("size", np.uint16)])
_DATA_AT: Final = _HEADER.itemsize + 4


def cpus(which: str) -> list[int]:
    """Numbers of the CPUs that are ``online`` or ``possible``."""
    text = Path("/sys/devices/system/cpu", which).read_text(encoding="ascii")
    ranges = [(int(first), int(last or first)) for first, last in re.findall(r"(\d+)(?:-(\d+))?", text)]
    return [cpu for first, last in ranges for cpu in range(first, last + 1)]


class PerfBuffers:
    """The perf buffers of all CPUs that are online, for records of one size.

    ``descriptors`` has one for each CPU, by its number. One thread reads. What is read stays in the buffers until
    ``release``, so that a reader that lags is told by the writer, not by losing what it had.
    """

    def __init__(self, total_bytes: int, *, record_bytes: int, wakeup_bytes: int, max_records: int) -> None:
        """``total_bytes`` is divided among the CPUs, at least a page each, rounded down to powers of two.

        The reader is woken when its share of ``wakeup_bytes`` waits on one CPU. TracerUnavailable when the kernel does
        not give them.
        """
        online = cpus("online")
        each = mmap.PAGESIZE
        while each * 2 * len(online) <= total_bytes:
            each *= 2
        # A record is its header, the length of what follows, and that, filled up to a multiple of 8.
        stride = _DATA_AT + record_bytes + 7 & ~7
        self._record_bytes = record_bytes
        self._max_records = max_records
        self._enough = min(max(1, wakeup_bytes // len(online)), each // 2, max_records * stride)
        self._buffers: list[_Buffer] = []
        self._waiting = select.epoll()
        self._taken: deque[tuple[int, dict[int, int]]] = deque()
        self._count = 0
        try:
            for cpu in online:
                # The kernel's mark moves on by itself, wherever the reader stands: twice as often finds it in time.
                buffer = _Buffer(cpu, each, stride, max(1, self._enough // 2))
                self._buffers.append(buffer)
                self._waiting.register(buffer.descriptor, select.EPOLLIN)
        except BaseException:
            self.close()
            raise

    @property
    def descriptors(self) -> dict[int, int]:
        """Descriptor of the perf event of each CPU."""
        return {buffer.cpu: buffer.descriptor for buffer in self._buffers}

    def read(self, timeout_s: float) -> Burst | None:
        """The contract is ``Tracer.read``'s; ``records`` is a copy, sorted by the first word of each record."""
        deadline = time.monotonic() + timeout_s
        while max(buffer.waiting() for buffer in self._buffers) < self._enough:
            left = deadline - time.monotonic()
            if left <= 0:
                break
            self._waiting.poll(left)
        return self._take()

    def _take(self) -> Burst | None:
        parts: list[npt.NDArray[np.uint8]] = []
        room = self._max_records
        # Each time another CPU is the first, so that a limit does not always stop the same one.
        self._buffers.append(self._buffers.pop(0))
        for buffer in self._buffers:
            found = buffer.take(room)
            parts += found
            room -= sum(len(part) for part in found)
        if not parts:
            return None
        records = np.concatenate(parts)[:, _DATA_AT : _DATA_AT + self._record_bytes]
        times = np.ascontiguousarray(records[:, :8]).view(np.uint64)[:, 0]
        self._count += len(records)
        self._taken.append((self._count, {buffer.cpu: buffer.at for buffer in self._buffers}))
        return Burst(records[np.argsort(times, kind="stable")], self._count)

    def half_full(self) -> bool:
        """The contract is ``Tracer.half_full``'s; it is the fullest buffer that counts."""
        return any(buffer.taken() > buffer.size // 2 for buffer in self._buffers)

    def release(self, burst: Burst) -> None:
        """The contract is ``Tracer.release``'s."""
        places: dict[int, int] = {}
        while self._taken and self._taken[0][0] <= burst.end:
            places = self._taken.popleft()[1]
        for buffer in self._buffers:
            if buffer.cpu in places:
                buffer.release(places[buffer.cpu])

    def close(self) -> None:
        """Gives the buffers back, and with them what was not read. A second call does nothing."""
        self._waiting.close()
        while self._buffers:
            self._buffers.pop().close()


class _Buffer:
    """The perf buffer of one CPU: a page with the positions of reader and writer, then ``size`` bytes of records."""

    def __init__(self, cpu: int, size: int, stride: int, wakeup_bytes: int) -> None:
        self.cpu = cpu
        self.size = size
        self.descriptor = _open(cpu, wakeup_bytes)
        try:
            self._memory = mmap.mmap(self.descriptor, mmap.PAGESIZE + size)
            fcntl.ioctl(self.descriptor, _PERF_EVENT_IOC_ENABLE, 0)
        except OSError as error:
            os.close(self.descriptor)
            raise TracerUnavailable(
                f"the kernel refuses a perf buffer of {size} bytes for CPU {cpu} ({error.strerror}); "
                "ask for a smaller ring, raise kernel.perf_event_mlock_kb, or add the capability IPC_LOCK"
            ) from error
        self._head = np.frombuffer(self._memory, np.uint64, 1, _PAGE_HEAD_AT)
        self._tail = np.frombuffer(self._memory, np.uint64, 1, _PAGE_TAIL_AT)
        self._data = np.frombuffer(self._memory, np.uint8, size, mmap.PAGESIZE)
        self._stride = stride
        self._fence = threading.Lock()
        self.at = 0

    def waiting(self) -> int:
        """Bytes that were written and not taken."""
        return int(self._head[0]) - self.at

    def taken(self) -> int:
        """Bytes that were written and not released."""
        return int(self._head[0]) - int(self._tail[0])

    def take(self, limit: int) -> list[npt.NDArray[np.uint8]]:
        """What waits, at most ``limit`` records, in pieces of shape (n, stride) of the buffer's own memory."""
        end = int(self._head[0])
        # Data must not be read before the position that says it is there: see Ring.
        with self._fence:
            pass
        parts = []
        while self.at < end and limit > 0:
            start = self.at % len(self._data)
            whole = min((end - self.at) // self._stride, (len(self._data) - start) // self._stride, limit)
            rows = self._data[start : start + whole * self._stride].reshape(whole, self._stride)
            headers = np.ascontiguousarray(rows[:, : _HEADER.itemsize]).view(_HEADER)[:, 0]
            odd = np.flatnonzero((headers["type"] != _PERF_RECORD_SAMPLE) | (headers["size"] != self._stride))
            if odd.size:
                whole = int(odd[0])
            if whole:
                parts.append(rows[:whole])
                self.at += whole * self._stride
            else:
                single = self._single(start)
                if single is not None:
                    parts.append(single)
                    whole = 1
            limit -= whole
        return parts

    def _single(self, start: int) -> npt.NDArray[np.uint8] | None:
        """The next record when it is cut in two by the end of the buffer; None when it is a word of the kernel's own,
        that records were lost, which the writer has counted already.
        """
        header = self._data[start : start + _HEADER.itemsize].view(_HEADER)[0]
        size = int(header["size"])
        self.at += size
        if header["type"] != _PERF_RECORD_SAMPLE:
            return None
        if size != self._stride:
            raise TracerUnavailable(
                f"a perf buffer holds a record of {size} bytes among records of {self._stride}: "
                "the program is not the one of this version"
            )
        first = self._data[start : start + size]
        return np.concatenate([first, self._data[: size - len(first)]]).reshape(1, size)

    def release(self, place: int) -> None:
        """Gives the room before ``place`` back."""
        with self._fence:
            self._tail[0] = place

    def close(self) -> None:
        del self._head, self._tail, self._data
        self._memory.close()
        os.close(self.descriptor)


def _open(cpu: int, wakeup_bytes: int) -> int:
    """Descriptor of a perf event of one CPU that BPF programs write to."""
    attributes = ctypes.create_string_buffer(
        _ATTRIBUTES.pack(
            _PERF_TYPE_SOFTWARE, _ATTRIBUTES.size, _PERF_COUNT_SW_BPF_OUTPUT, 1, _PERF_SAMPLE_RAW, 0, _WATERMARK,
            wakeup_bytes, 0, 0,
        ),
        _ATTRIBUTES.size,
    )  # fmt: skip
    number = {"x86_64": 298, "s390x": 331, "ppc64le": 319}.get(platform.machine(), 241)
    library = ctypes.CDLL(None, use_errno=True)
    descriptor: int = library.syscall(number, attributes, -1, cpu, -1, ctypes.c_ulong(_PERF_FLAG_FD_CLOEXEC))
    if descriptor < 0:
        error = OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        raise host.perf_event_refused(f"the perf buffer of CPU {cpu}", error) from error
    return descriptor
