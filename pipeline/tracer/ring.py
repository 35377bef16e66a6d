"""Reads the kernel's ring buffer from its mapped memory: a burst is one strided view, however many records it holds.

In: the descriptor of a BPF ring buffer. Out: bursts. No library is needed and nothing is copied.
"""

from __future__ import annotations

import mmap
import struct
import threading
import time
from typing import TYPE_CHECKING, Final

import numpy as np

from pipeline.errors import TracerUnavailable
from pipeline.tracer import Burst

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

_BUSY: Final = 1 << 31
_DISCARDED: Final = 1 << 30
_HEADER_BYTES: Final = 8


class Ring:
    """Reader of a BPF ring buffer whose records all have one size, given by the first of them.

    The kernel's layout: a page with the consumer's position, a page with the producer's, then the data twice in a
    row, so that every stretch is contiguous. Reading moves a position of our own, which begins at the consumer's;
    ``release`` moves that.

    ``since_ns`` and ``until_ns`` bound the records that are given: of others, which another tracer has too, only the
    room is given back. 0 is no bound. A record begins with its time.
    """

    def __init__(
        self,
        descriptor: int,
        ring_bytes: int,
        *,
        wakeup_bytes: int,
        max_records: int,
        wait: Callable[[float], object],
    ) -> None:
        """``wait`` blocks for so many seconds at most, and less when the kernel says that the mark is passed."""
        self.descriptor = descriptor
        self._mask = ring_bytes - 1
        self._wakeup_bytes = wakeup_bytes
        self._max_records = max_records
        self._wait = wait
        page = mmap.PAGESIZE
        self._consumer = np.frombuffer(mmap.mmap(descriptor, page), np.uint64, 1)
        self._memory = mmap.mmap(descriptor, page + 2 * ring_bytes, prot=mmap.PROT_READ, offset=page)
        self._producer = np.frombuffer(self._memory, np.uint64, 1)
        self.since_ns = 0
        self.until_ns = 0
        self._at = self._given = int(self._consumer[0])
        self._record_bytes = 0
        self._stride = 0
        self._fence = threading.Lock()

    def read(self, timeout_s: float, idle_s: float = 0.0) -> Burst | None:
        """The contract is ``Tracer.read``'s."""
        if idle_s and int(self._producer[0]) == self._at:
            # The kernel wakes the reader for the first record after everything was released.
            self._wait(idle_s)
            if int(self._producer[0]) == self._at:
                return None
        deadline = time.monotonic() + timeout_s
        enough = self._wakeup_bytes
        if self._stride:
            enough = min(enough, self._max_records * self._stride)
        while int(self._producer[0]) - self._at < enough:
            left = deadline - time.monotonic()
            if left <= 0:
                break
            self._wait(left)
        while (burst := self._take()) is not None:
            if self.since_ns or self.until_ns:
                burst = self._bounded(burst)
            if len(burst.records):
                self._given = burst.end
                return burst
            if int(self._consumer[0]) >= self._given:
                self.release(burst)
        return None

    def _bounded(self, burst: Burst) -> Burst:
        times = _times(burst)
        ours = times >= self.since_ns
        if self.until_ns:
            ours &= times < self.until_ns
        return burst if ours.all() else Burst(burst.records[ours], burst.end)

    def skip(self, end: int) -> None:
        """The contract is ``Tracer.skip``'s."""
        newest = int(self._producer[0])
        if end > newest:
            raise TracerUnavailable(f"place {end} is none of this ring, whose newest record ends at {newest}")
        if end > self._at:
            self._at = self._given = end
            self._consumer[0] = end

    def times(self) -> npt.NDArray[np.uint64]:
        """Times of all records that wait, whoever's they are, in the order of the ring; nothing is read by this."""
        at, found = self._at, [np.empty(0, np.uint64)]
        while (burst := self._take()) is not None:
            found.append(_times(burst))
        self._at = at
        return np.concatenate(found)

    def empty(self) -> bool:
        """Whether all that was there was read, and what was given out was released."""
        return int(self._producer[0]) == self._at and int(self._consumer[0]) >= self._given

    def waiting_bytes(self) -> int:
        """Bytes between what was released and the newest."""
        return int(self._producer[0]) - int(self._consumer[0])

    def _take(self) -> Burst | None:
        while True:
            start = mmap.PAGESIZE + (self._at & self._mask)
            waiting = int(self._producer[0]) - self._at
            if not waiting:
                return None
            if not self._stride and not self._measure(start):
                return None
            count = min(waiting // self._stride, self._max_records)
            headers = np.ndarray((count,), np.uint32, self._memory, start, (self._stride,))
            odd = np.flatnonzero(headers != self._record_bytes)
            if odd.size:
                count = int(odd[0])
            if not count and not self._skip(int(headers[0])):
                return None
            if count:
                break
        # Data must not be read before the headers that say it is there: releasing and taking a lock orders them on
        # processors that would reorder loads.
        with self._fence:
            pass
        with self._fence:
            records = np.ndarray(
                (count, self._record_bytes), np.uint8, self._memory, start + _HEADER_BYTES, (self._stride, 1)
            )
        self._at += count * self._stride
        return Burst(records, self._at)

    def _measure(self, start: int) -> bool:
        """Learns the size of the records from the first; False while that is being written."""
        (header,) = struct.unpack_from("=I", self._memory, start)
        if header & _BUSY:
            return False
        self._record_bytes = header & ~_DISCARDED
        self._stride = _HEADER_BYTES + (self._record_bytes + 7 & ~7)
        return True

    def _skip(self, header: int) -> bool:
        """Steps over a record that is no record; False when it is one that is still being written."""
        if header & _BUSY:
            return False
        if header & ~_DISCARDED != self._record_bytes:
            raise TracerUnavailable(
                f"the ring holds a record of {header & ~_DISCARDED} bytes among records of {self._record_bytes}: "
                "the BPF object is not the one of this version"
            )
        if header & _DISCARDED:
            self._at += self._stride
        return True

    def half_full(self) -> bool:
        """The contract is ``Tracer.half_full``'s."""
        return self.waiting_bytes() > self._mask // 2

    def release(self, burst: Burst) -> None:
        """The contract is ``Tracer.release``'s."""
        self._consumer[0] = max(burst.end, int(self._consumer[0]))


def _times(burst: Burst) -> npt.NDArray[np.uint64]:
    return np.ascontiguousarray(burst.records[:, :8]).view(np.uint64)[:, 0]
