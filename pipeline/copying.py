"""``--to``: what was read into an archive, each record once and in the bytes in which it came.

In: batches with the datum of each row, in any order. Out: segments below a folder, by one ``archive.Writer`` a node and
epoch, and counts. Why so: the archive itself says what it holds, so a copy that was killed at any moment, or is made
again, goes on where it ended: the positions of a stream are looked up in the folder when the stream is first met.

That is cheap, because positions ascend within a segment, here and in an agent's: when the first and the last of them
are as far apart as there are datums, none is missing in between, and only the last block was unpacked to know it. Any
other segment is decoded whole. A segment of ours never holds a position that is not above those before it: the next one
is begun instead.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline import archive, avro, dedup
from pipeline.errors import Damaged, SinkUnavailable

HELD_BYTES = 32 << 20
"""What waits in memory before it is written, of all streams together."""
OPEN_STREAMS = 128
"""Streams with open segments; the one that was not written for longest is closed first."""
STREAMS = 100_000
"""Streams whose positions are remembered; of others they are looked up again."""


@dataclass(slots=True, eq=False)
class _Stream:
    """One node and epoch: what the folder held when it was met, and what waits. ``last`` is the highest position that
    was written since its segments were opened."""

    node: str
    epoch: str
    held: dedup.Intervals
    writer: archive.Writer | None = None
    last: int = -1
    positions: list[dedup.Longs] = field(default_factory=list)
    times: list[dedup.Longs] = field(default_factory=list)
    datums: list[pa.BinaryArray] = field(default_factory=list)


class Copy:
    """An archive that is added to. ``written`` records were new and ``there`` were not; ``strangers`` have no identity
    by which they could be known again, and are not kept.

    ``flush_secs`` bounds how long records wait while others come; None: until there are enough. Methods raise
    SinkUnavailable, with one sentence, when the disk refuses or another process adds to the same folder.
    """

    def __init__(
        self,
        directory: Path,
        *,
        flush_secs: float | None = None,
        now: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.written = self.there = self.strangers = 0
        self._directory = directory
        self._excerpt = ""
        self._flush_secs, self._now, self._monotonic = flush_secs, now, monotonic
        self._flushed = monotonic()
        self._streams: OrderedDict[tuple[str, str], _Stream] = OrderedDict()
        self._open: OrderedDict[tuple[str, str], _Stream] = OrderedDict()
        self._waiting: dict[tuple[str, str], _Stream] = {}
        self._bytes = 0
        self._lock = _locked(directory)

    def add(self, batch: pa.RecordBatch, datums: pa.BinaryArray) -> None:
        """Keep the rows that the folder did not hold, none of which was added before; row i is ``datums[i]``."""
        positions = batch.column("pos").to_numpy()
        times = batch.column("time").view(pa.int64()).to_numpy()
        every = np.arange(batch.num_rows)
        for node, epoch, rows in dedup.streams(batch) if batch.num_rows else ():
            mine = every[rows]
            placed = dedup.identified(positions[mine]) if dedup.ours(node, epoch) else np.zeros(len(mine), np.bool_)
            self.strangers += len(mine) - int(placed.sum())
            if not placed.any():
                continue
            stream = self._stream(node, epoch)
            fresh = mine[placed & ~stream.held.has(positions[mine])]
            self.there += int(placed.sum()) - len(fresh)
            if len(fresh):
                taken = datums if len(fresh) == len(datums) else datums.take(pa.array(fresh))
                stream.positions.append(positions[fresh])
                stream.times.append(times[fresh])
                stream.datums.append(taken)
                self._waiting[node, epoch] = stream
                self._bytes += taken.nbytes
        waited = self._flush_secs is not None and self._monotonic() - self._flushed >= self._flush_secs
        if waited or self._bytes >= HELD_BYTES:
            self.flush()

    def cut(self, excerpt: str) -> None:
        """From now on segments say that they are an ``excerpt`` by these filters; empty: that they are whole."""
        if excerpt != self._excerpt:
            self.flush()
            self._close_all()
            self._excerpt = excerpt

    def flush(self) -> None:
        """Make everything safe that was added; close segments that are old."""
        while self._waiting:
            key, stream = next(iter(self._waiting.items()))
            self._write(stream)
            del self._waiting[key]
        self._bytes = 0
        for stream in self._open.values():
            assert stream.writer is not None
            stream.writer.tick()
        self._flushed = self._monotonic()

    def close(self) -> None:
        """Make everything safe, and give every segment its name."""
        self.flush()
        self._close_all()
        os.close(self._lock)

    def _close_all(self) -> None:
        while self._open:
            self._close(next(iter(self._open.values())))

    def _stream(self, node: str, epoch: str) -> _Stream:
        key = (node, epoch)
        stream = self._streams.get(key)
        if stream is None:
            if len(self._streams) >= STREAMS:
                self.flush()
                _, oldest = self._streams.popitem(last=False)
                self._close(oldest)
            stream = self._streams[key] = _Stream(node, epoch, held(self._directory, node, epoch))
        else:
            self._streams.move_to_end(key)
        return stream

    def _write(self, stream: _Stream) -> None:
        """Everything of a stream that waits: by position, and what contradicts another in a segment of its own."""
        if not stream.positions:
            return
        positions, times = np.concatenate(stream.positions), np.concatenate(stream.times)
        datums = pa.concat_arrays(stream.datums)
        if not (np.diff(positions) > 0).all():
            order = np.argsort(positions, kind="stable")
            positions, times, datums = positions[order], times[order], datums.take(pa.array(order))
        # From here on a second attempt after an error would double what the first one wrote.
        stream.positions, stream.times, stream.datums = [], [], []
        while len(positions):
            first = np.concatenate([[True], np.diff(positions) > 0])
            rest = pa.array(~first)
            self._put(stream, positions[first], times[first], datums.filter(pa.array(first)))
            positions, times, datums = positions[~first], times[~first], datums.filter(rest)

    def _put(self, stream: _Stream, positions: dedup.Longs, times: dedup.Longs, datums: pa.BinaryArray) -> None:
        key = (stream.node, stream.epoch)
        if stream.writer is not None and positions[0] <= stream.last:
            self._close(stream)
        if stream.writer is None:
            while len(self._open) >= OPEN_STREAMS:
                self._close(next(iter(self._open.values())))
            metadata = {archive.EXCERPT: self._excerpt} if self._excerpt else {}
            # What is kept for years never goes to make room for more.
            stream.writer = archive.Writer(
                self._directory, node=stream.node, epoch=stream.epoch, make_room=False, metadata=metadata, now=self._now
            )
            self._open[key] = stream
        stream.writer.write(datums, positions, times)
        self._open.move_to_end(key)
        stream.last = int(positions[-1])
        self.written += len(positions)

    def _close(self, stream: _Stream) -> None:
        if stream.writer is not None:
            stream.writer.close()
            del self._open[stream.node, stream.epoch]
            stream.writer, stream.last = None, -1


def _locked(directory: Path) -> int:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:
            os.close(fd)
            raise
    except BlockingIOError:
        raise SinkUnavailable(f"Another bindsnoop-replay --to adds to {directory}; wait until it has ended.") from None
    except OSError as error:
        raise SinkUnavailable(f"The archive {directory} cannot be written: {error.strerror}.") from error
    return fd


def held(directory: Path, node: str, epoch: str) -> dedup.Intervals:
    """The positions of one stream that can be read in an archive."""
    found = dedup.Intervals()
    for path in (segment.path for segment in archive.segments(directory, node) if segment.epoch == epoch):
        look = archive.glance(path)
        if look is not None and _dense(look, node, epoch):
            found.cover(look.first_pos, look.first_pos + look.datums)
            continue
        for part in archive.read_segment(path):
            if isinstance(part, archive.Block):
                for block in part.split():
                    found.put(_positions(block, node, epoch))
    return found


def _dense(look: archive.Glance, node: str, epoch: str) -> bool:
    """Whether a segment holds every position from its first on: they ascend, and there is room for no hole."""
    last = _positions(look.last, node, epoch)
    end = look.first_pos + look.datums
    return len(last) == look.last.count and bool((last == np.arange(end - len(last), end)).all())


def _positions(block: archive.Block, node: str, epoch: str) -> dedup.Longs:
    """The positions that a block has of one stream; none when it cannot be decoded."""
    try:
        batch = avro.decode_block(block.payload, block.count, avro.admit(block.schema_text))
    except Damaged:
        return np.empty(0, np.int64)
    for one, other, rows in dedup.streams(batch):
        if (one, other) == (node, epoch):
            mine: dedup.Longs = batch.column("pos").to_numpy()[rows]
            return mine
    return np.empty(0, np.int64)
