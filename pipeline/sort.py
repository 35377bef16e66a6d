"""Events in the order of their time, however many there are.

In: batches of ``event.schema()`` in any order. Out: the same rows by (time, node, epoch, pos). That is a total order of
whatever our agents write, so the same events come out the same from a topic, from files and from both.

What is more than ``RUN_BYTES`` is sorted and written to a temporary file as a run, in Arrow's own format, packed; then
the runs are merged, a piece of each in memory at a time. Whole batches move: of every run what lies before the earliest
end of a piece that has a successor is taken, and these parts are sorted together. The files have no name, so nothing is
left of them, however the command ends.

Rows that are the same in all four contradict each other or are nobody's of ours; they come in the order of what they
say, as long as they are not thousands.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterable, Iterator
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import Unavailable

RUN_BYTES = 32 << 20
"""Rows that are sorted in memory; while that is done they are there three times."""
FAN_IN = 64
"""Runs that are merged at a time."""
PIECE_BYTES = 256 << 10
"""Of each run two pieces are in memory while it is merged."""
ROWS = 10_000
"""Rows that come out at a time; fewer where they are more than ``OUT_BYTES``."""
OUT_BYTES = 4 << 20
MAX_TIES = 8_192

KEYS = ("time", "node", "epoch", "pos")
_ORDER = [(name, "ascending") for name in KEYS]

Key = tuple[int, str, str, int]


def in_order(
    batches: Iterable[pa.RecordBatch],
    *,
    run_bytes: int = RUN_BYTES,
    fan_in: int = FAN_IN,
    piece_bytes: int = PIECE_BYTES,
    out_bytes: int = OUT_BYTES,
) -> Iterator[pa.RecordBatch]:
    """All rows of the batches, sorted. Unavailable when the temporary folder is full or cannot be used."""
    runs: list[_Run] = []
    try:
        held: list[pa.RecordBatch] = []
        size = 0
        for batch in batches:
            held.append(batch)
            size += batch.nbytes
            if size >= run_bytes:
                runs.append(_written(iter([_sorted(held)]), 0, piece_bytes))
                held, size = [], 0
                # Runs of one level become one of the next, so a row is written as often as there are levels.
                while len(runs) >= fan_in and runs[-fan_in].level == runs[-1].level:
                    _merge_last(runs, fan_in, piece_bytes)
        rest = _sorted(held) if held else None
        held = []
        while len(runs) >= fan_in:
            _merge_last(runs, fan_in, piece_bytes)
        parts = [_Part(run.read()) for run in runs] + ([_Part(iter([rest]))] if rest is not None else [])
        yield from _joined(_untied(_merged(parts)), out_bytes)
    finally:
        for run in runs:
            run.file.close()


def _joined(batches: Iterator[pa.RecordBatch], out_bytes: int) -> Iterator[pa.RecordBatch]:
    """The same rows, about ``ROWS`` at a time: whoever shows them pays for every batch."""
    held: list[pa.RecordBatch] = []
    rows = size = 0
    for batch in batches:
        for first in range(0, batch.num_rows, ROWS):
            part = batch.slice(first, ROWS)
            held.append(part)
            rows, size = rows + part.num_rows, size + part.nbytes
            if rows >= ROWS or size >= out_bytes:
                yield pa.concat_batches(held)
                held, rows, size = [], 0, 0
    if held:
        yield pa.concat_batches(held)


# --- runs ---------------------------------------------------------------------------------------------------------


class _Run(NamedTuple):
    """Sorted rows in a file."""

    file: IO[bytes]
    level: int

    def read(self) -> Iterator[pa.RecordBatch]:
        self.file.seek(0)
        with _disk(), pa.ipc.open_stream(self.file) as reader:
            yield from reader


def _written(batches: Iterator[pa.RecordBatch], level: int, piece_bytes: int) -> _Run:
    """A run of sorted batches, in pieces of about ``piece_bytes``."""
    with _disk(), contextlib.ExitStack() as stack:
        file = stack.enter_context(tempfile.TemporaryFile(prefix="bindsnoop-sort-"))
        writer: Any = None
        for batch in batches:
            if writer is None:
                options = pa.ipc.IpcWriteOptions(compression="lz4")
                writer = stack.enter_context(pa.ipc.new_stream(file, batch.schema, options=options))
            step = max(1, piece_bytes * batch.num_rows // max(batch.nbytes, 1))
            for first in range(0, batch.num_rows, step):
                writer.write_batch(batch.slice(first, step))
        if writer is not None:
            writer.close()
        file.flush()
        stack.pop_all()
    return _Run(file, level)


def _merge_last(runs: list[_Run], count: int, piece_bytes: int) -> None:
    """The last ``count`` runs become one."""
    last = runs[-count:]
    merged = _written(_merged([_Part(run.read()) for run in last]), last[0].level + 1, piece_bytes)
    del runs[-count:]
    for run in last:
        run.file.close()
    runs.append(merged)


@contextlib.contextmanager
def _disk() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        folder = tempfile.gettempdir() if tempfile.tempdir else "the temporary folder"
        raise Unavailable(
            f"--sort cannot use {folder}, where it keeps what is more than {RUN_BYTES >> 20} MiB: "
            f"{error.strerror or error}; TMPDIR names another folder"
        ) from error


# --- merging ------------------------------------------------------------------------------------------------------


class _Part:
    """The rows of one run that are in memory, from ``first`` on, and the batches behind them."""

    def __init__(self, behind: Iterator[pa.RecordBatch]) -> None:
        self._behind = behind
        self._next: pa.RecordBatch | None = None
        self.batch: pa.RecordBatch | None = None
        self._first = 0
        self._advance()
        self._advance()

    def _advance(self) -> None:
        self.batch, self._first = self._next, 0
        self._next = next(self._behind, None)
        if self.batch is not None:
            self._times = self.batch.column("time").view(pa.int64()).to_numpy()

    @property
    def bound(self) -> Key | None:
        """The last key in memory when more follow, else None."""
        return None if self.batch is None or self._next is None else self._key(self.batch.num_rows - 1)

    def _key(self, row: int) -> Key:
        assert self.batch is not None
        _, node, epoch, pos = (self.batch.column(name)[row] for name in KEYS)
        return int(self._times[row]), node.as_py(), epoch.as_py(), pos.as_py()

    def take(self, bound: Key | None) -> pa.RecordBatch | None:
        """The rows up to ``bound``, itself included; all for None."""
        if self.batch is None:
            return None
        end = self.batch.num_rows if bound is None else self._end(bound)
        taken = self.batch.slice(self._first, end - self._first)
        self._first = end
        if end == self.batch.num_rows:
            self._advance()
        return taken if taken.num_rows else None

    def _end(self, bound: Key) -> int:
        """The first row behind ``bound``; few rows have its very time."""
        low = max(int(np.searchsorted(self._times, bound[0], "left")), self._first)
        high = max(int(np.searchsorted(self._times, bound[0], "right")), self._first)
        while low < high:
            middle = (low + high) // 2
            if self._key(middle) <= bound:
                low = middle + 1
            else:
                high = middle
        return low


def _merged(parts: list[_Part]) -> Iterator[pa.RecordBatch]:
    while parts:
        bounds = [bound for part in parts if (bound := part.bound) is not None]
        bound = min(bounds) if bounds else None
        taken = [rows for part in parts if (rows := part.take(bound)) is not None]
        parts = [part for part in parts if part.batch is not None]
        if taken:
            yield taken[0] if len(taken) == 1 else _sorted(taken)


def _sorted(batches: list[pa.RecordBatch]) -> pa.RecordBatch:
    whole = pa.concat_batches(batches)
    return whole.take(pc.sort_indices(whole.select(list(KEYS)), sort_keys=_ORDER))


# --- rows that are the same in every key --------------------------------------------------------------------------


def _untied(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The same rows; those with the same key in the order of what they say."""
    held: pa.RecordBatch | None = None
    for batch in batches:
        if held is not None:
            if held.num_rows < MAX_TIES and _same(held, held.num_rows - 1, batch, 0):
                batch = pa.concat_batches([held, batch])
            else:
                yield held
        ordered, last = _ties_ordered(batch)
        if last:
            yield ordered.slice(0, last)
        held = ordered.slice(last)
    if held is not None:
        yield held


def _ties_ordered(batch: pa.RecordBatch) -> tuple[pa.RecordBatch, int]:
    """The batch with its ties in order, and the first row of those that have the last key."""
    times, places = (batch.column(name).to_numpy() for name in ("time", "pos"))
    maybe = np.flatnonzero((times[1:] == times[:-1]) & (places[1:] == places[:-1])).tolist()
    tied = {row + 1 for row in maybe if _same(batch, row, batch, row + 1)}
    last = batch.num_rows - 1
    while last in tied:
        last -= 1
    if not tied:
        return batch, last
    order = list(range(batch.num_rows))
    row = 0
    while row < batch.num_rows:
        end = row + 1
        while end in tied:
            end += 1
        if 1 < end - row <= MAX_TIES:
            said = batch.slice(row, end - row).to_pylist()
            order[row:end] = sorted(order[row:end], key=lambda place: repr(said[place - row]))
        row = end
    return batch.take(pa.array(order)), last


def _same(one: pa.RecordBatch, row: int, other: pa.RecordBatch, place: int) -> bool:
    return all(one.column(name)[row] == other.column(name)[place] for name in ("pos", "time", "node", "epoch"))
