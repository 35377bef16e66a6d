"""Each event once: which rows of a batch were there before.

In: batches in the order in which they are read. Out: the same without copies. An agent that was killed sends again what
was not acknowledged, and an archive holds what a topic holds, so the same event may come twice; (node, epoch, pos) is
its identity.

What is remembered of an epoch are the positions that were there, as a few intervals, for an agent counts without holes.
A batch that goes on where the last one ended, which is nearly every one, only moves an end. Positions that are strewn
by somebody else are forgotten beyond a limit: then a copy may be shown, but nothing is left out that was not shown.

Two *different* events with one identity contradict each other: a forgery, a second writer, or a node that was set back
to a snapshot. Of the newest 16 million events 16 bits of what they say are remembered too: a row whose identity was
there, but not with these bits, is no copy, and is kept and named. The bits are made of the time, the numbers and the
ends of the texts that tell binds apart (``NUMBERS``, ``TEXTS``), with secret weights, so that nobody can aim at them.
What lies further back is told by its identity alone. Whether a stream is what its agent wrote is for its digests to
say, not for these bits.

A record whose epoch is not 16 hexadecimal digits, whose position is negative or past 2^62, or whose node has no name or
one of more than 253 characters, is not one of ours. It has no identity, and is always kept.
"""

from __future__ import annotations

import itertools
import re
import secrets
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa

Longs: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]
Mask: TypeAlias = np.ndarray[Any, np.dtype[np.bool_]]
Bits: TypeAlias = np.ndarray[Any, np.dtype[np.uint16]]

EPOCHS = 100_000
"""Epochs that are remembered; the one that was not read for longest is forgotten first."""
INTERVALS = 65_536
"""Intervals of one epoch that are remembered; the shortest are forgotten first."""
ALL_INTERVALS = 1_000_000
"""Intervals of all epochs together."""
CHUNK = 1_024
CHUNKS = 16_384
"""So many times ``CHUNK`` positions have their bits remembered, two bytes each."""

NUMBERS = ("time", "boottime_ns", "cgroup_id", "cookie", "pid", "errno", "port", "asked_port")
TEXTS = ("comm", "addr", "message")

_EPOCH = re.compile("[0-9a-f]{16}")
_NODE_CHARACTERS = 253
_LAST_POS = 1 << 62


class Contradiction(NamedTuple):
    """``events`` that are not what was there before under their identity; the first of them is at ``pos``."""

    node: str
    epoch: str
    pos: int
    events: int


class Sifted(NamedTuple):
    """``batch`` without its ``copies``; rows that contradict an earlier one are still in it. ``notes`` are sentences
    about what can no longer be told, each once."""

    batch: pa.RecordBatch
    copies: int
    contradictions: list[Contradiction]
    notes: list[str]


class Intervals:
    """Positions of one epoch that were there: sorted intervals [start, end) that do not touch."""

    __slots__ = ("ends", "starts")

    def __init__(self) -> None:
        self.starts: Longs = np.empty(0, np.int64)
        self.ends: Longs = np.empty(0, np.int64)

    def has(self, pos: Longs) -> Mask:
        """For each position whether it was there."""
        if not len(self.starts):
            return np.zeros(len(pos), np.bool_)
        place = np.searchsorted(self.starts, pos, "right") - 1
        found: Mask = (place >= 0) & (pos < self.ends[place])
        return found

    def add(self, pos: Longs) -> None:
        """Remember sorted positions, none of which was there."""
        breaks = np.flatnonzero(np.diff(pos) != 1) + 1
        starts = np.concatenate([self.starts, pos[:1], pos[breaks]])
        ends = np.concatenate([self.ends, pos[breaks - 1] + 1, pos[-1:] + 1])
        order = np.argsort(starts, kind="stable")
        starts, ends = starts[order], ends[order]
        apart = starts[1:] != ends[:-1]
        self.starts = starts[np.concatenate([[True], apart])]
        self.ends = ends[np.concatenate([apart, [True]])]

    def put(self, pos: Longs) -> None:
        """Remember positions in any order, whether they were there or not."""
        ascending = np.unique(pos)
        fresh = ascending[~self.has(ascending)]
        if len(fresh):
            self.add(fresh)

    def cover(self, start: int, end: int) -> None:
        """Remember everything from ``start`` to before ``end``."""
        low, high = int(np.searchsorted(self.ends, start, "left")), int(np.searchsorted(self.starts, end, "right"))
        if low < high:
            start, end = min(start, int(self.starts[low])), max(end, int(self.ends[high - 1]))
        self.starts = np.concatenate([self.starts[:low], np.array([start]), self.starts[high:]])
        self.ends = np.concatenate([self.ends[:low], np.array([end]), self.ends[high:]])

    def shorten(self, most: int) -> None:
        """Forget all but the ``most`` longest intervals."""
        kept = np.sort(np.argpartition(self.starts - self.ends, most)[:most])
        self.starts, self.ends = self.starts[kept], self.ends[kept]


class _Epoch(Intervals):
    """An epoch that was met; its ``number`` is that of no other."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class Seen:
    """Remembers the events of one reading. The limits are those of this module unless a test says otherwise."""

    def __init__(
        self,
        *,
        epochs: int = EPOCHS,
        intervals: int = INTERVALS,
        all_intervals: int = ALL_INTERVALS,
        chunks: int = CHUNKS,
    ) -> None:
        self._most_epochs, self._most_intervals, self._most_chunks = epochs, intervals, chunks
        self._most_in_all = all_intervals
        self._epochs: OrderedDict[tuple[str, str], _Epoch] = OrderedDict()
        self._bits: OrderedDict[tuple[int, int], Bits] = OrderedDict()
        self._count = 0
        self._numbers = 0
        self._weights = [secrets.randbits(64) | 1 for _ in range(len(NUMBERS) + 3 * len(TEXTS))]
        self._noted: set[str] = set()

    def sift(self, batch: pa.RecordBatch) -> Sifted:
        """The rows of a batch of ``event.schema()`` that are no copies, in their order; they are now remembered."""
        notes: list[str] = []
        contradictions: list[Contradiction] = []
        if not batch.num_rows:
            return Sifted(batch, 0, contradictions, notes)
        pos = batch.column("pos").to_numpy()
        bits = _bits(batch, self._weights)
        kept: Mask | None = None
        for node, epoch, rows in streams(batch):
            if not ours(node, epoch):
                continue
            mask = self._sift(node, epoch, pos[rows], bits[rows], contradictions, notes)
            if mask is not None:
                kept = np.ones(batch.num_rows, np.bool_) if kept is None else kept
                kept[rows] = mask
        if kept is None or (count := int(kept.sum())) == batch.num_rows:
            return Sifted(batch, 0, contradictions, notes)
        return Sifted(batch.filter(pa.array(kept)), batch.num_rows - count, contradictions, notes)

    def _sift(
        self, node: str, epoch: str, pos: Longs, bits: Bits, contradictions: list[Contradiction], notes: list[str]
    ) -> Mask | None:
        """Which rows of one epoch are kept; None for all."""
        known = self._epoch(node, epoch, notes)
        dense = int(pos[-1]) - int(pos[0]) == len(pos) - 1 and bool((np.diff(pos) == 1).all())
        if dense and len(known.ends) and pos[0] == known.ends[-1]:
            known.ends[-1] += len(pos)
            self._keep_bits(known, pos, bits)
            return None
        placed = identified(pos)
        fresh = placed & ~known.has(pos)
        if not dense:
            first = np.zeros(len(pos), np.bool_)
            first[np.unique(pos, return_index=True)[1]] = True
            fresh &= first
        if fresh.any():
            added, added_bits = pos[fresh], bits[fresh]
            if not dense:
                order = np.argsort(added, kind="stable")
                added, added_bits = added[order], added_bits[order]
            self._remember(known, added, notes)
            self._keep_bits(known, added, added_bits)
        again = placed & ~fresh
        if not again.any():
            return None
        before = self._known_bits(known, pos[again])
        other = (before != 0) & (before != bits[again])
        if other.any():
            contradictions.append(Contradiction(node, epoch, int(pos[again][other][0]), int(other.sum())))
        if not before.all():
            self._note(
                notes, f"copies of events that came more than {self._most_chunks * CHUNK:,} events before are told "
                "from others by node, epoch and pos alone",
            )  # fmt: skip
        copies = again.copy()
        copies[again] = ~other
        return ~copies

    def _epoch(self, node: str, epoch: str, notes: list[str]) -> _Epoch:
        key = (node, epoch)
        known = self._epochs.get(key)
        if known is None:
            if len(self._epochs) >= self._most_epochs:
                self._forget(notes, f"there are more than {self._most_epochs:,} epochs")
            self._numbers += 1
            known = self._epochs[key] = _Epoch(self._numbers)
        else:
            self._epochs.move_to_end(key)
        return known

    def _remember(self, known: _Epoch, pos: Longs, notes: list[str]) -> None:
        before = len(known.starts)
        known.add(pos)
        if len(known.starts) > self._most_intervals:
            known.shorten(self._most_intervals // 2)
            self._note(notes, _may_be_shown(f"an epoch has more than {self._most_intervals:,} holes in its positions"))
        self._count += len(known.starts) - before
        while self._count > self._most_in_all and len(self._epochs) > 1:
            self._forget(notes, f"there are more than {self._most_in_all:,} holes in the positions")

    def _forget(self, notes: list[str], why: str) -> None:
        _, oldest = self._epochs.popitem(last=False)
        self._count -= len(oldest.starts)
        self._note(notes, _may_be_shown(why))

    def _note(self, notes: list[str], sentence: str) -> None:
        if sentence not in self._noted:
            self._noted.add(sentence)
            notes.append(sentence)

    def _keep_bits(self, known: _Epoch, pos: Longs, bits: Bits) -> None:
        for chunk, rows in _chunks(pos):
            key = (known.number, chunk)
            held = self._bits.get(key)
            if held is None:
                if len(self._bits) >= self._most_chunks:
                    self._bits.popitem(last=False)
                held = self._bits[key] = np.zeros(CHUNK, np.uint16)
            held[pos[rows] & (CHUNK - 1)] = bits[rows]

    def _known_bits(self, known: _Epoch, pos: Longs) -> Bits:
        """What is remembered of the events at ``pos``, in any order; 0 where nothing is."""
        found = np.zeros(len(pos), np.uint16)
        order = np.argsort(pos, kind="stable")
        ascending = pos[order]
        for chunk, rows in _chunks(ascending):
            held = self._bits.get((known.number, chunk))
            if held is not None:
                found[order[rows]] = held[ascending[rows] & (CHUNK - 1)]
        return found


def _may_be_shown(why: str) -> str:
    return f"{why}: not all are remembered, and an event that comes again may be shown again"


def _chunks(pos: Longs) -> Iterator[tuple[int, slice]]:
    """Ascending positions by the chunk that they lie in."""
    chunks = pos // CHUNK
    borders = [0, *(np.flatnonzero(np.diff(chunks)) + 1).tolist(), len(pos)]
    for start, end in itertools.pairwise(borders):
        yield int(chunks[start]), slice(start, end)


# --- the rows of a batch ------------------------------------------------------------------------------------------


def ours(node: str, epoch: str) -> bool:
    """Whether records with this node and epoch have an identity."""
    return bool(_EPOCH.fullmatch(epoch)) and 0 < len(node) <= _NODE_CHARACTERS


def identified(pos: Longs) -> Mask:
    """For each position whether one of ours can have it."""
    mask: Mask = (pos >= 0) & (pos <= _LAST_POS)
    return mask


def streams(batch: pa.RecordBatch) -> Iterator[tuple[str, str, slice | Longs]]:
    """Node, epoch and the rows of each stream in a batch."""
    nodes, epochs = batch.column("node"), batch.column("epoch")
    if _all_alike(nodes) and _all_alike(epochs):
        yield nodes[0].as_py(), epochs[0].as_py(), slice(None)
        return
    coded = [column.dictionary_encode() for column in (nodes, epochs)]
    one, other = (codes.indices.to_numpy().astype(np.int64) for codes in coded)
    key = one * len(coded[1].dictionary) + other
    order = np.argsort(key, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(key[order])) + 1):
        yield nodes[int(rows[0])].as_py(), epochs[int(rows[0])].as_py(), rows


def _all_alike(column: pa.StringArray) -> bool:
    """Whether all rows have the same text, by one comparison of the bytes."""
    ends, data = _text(column)
    size = int(ends[1] - ends[0])
    if size == 0 or not (np.diff(ends) == size).all():
        return False
    return data == data[:size] * len(column)


def _text(column: pa.StringArray) -> tuple[np.ndarray[Any, np.dtype[np.int32]], bytes]:
    """Where the texts of a column begin and end, from 0, and their bytes."""
    _, offsets, data = column.buffers()
    ends = np.frombuffer(offsets, np.int32, len(column) + 1, column.offset * 4)
    # As bytes: a memoryview of signed bytes is compared one after the other.
    return ends - ends[0], bytes(memoryview(data)[int(ends[0]) : int(ends[-1])]) if data is not None else b""


_BELOW = np.array([(1 << 8 * size) - 1 for size in range(9)], np.uint64)
"""Masks of the first so many bytes of a word."""


def _bits(batch: pa.RecordBatch, weights: list[int]) -> Bits:
    """16 bits of what each row says, never 0."""
    total = np.zeros(batch.num_rows, np.uint64)
    rest = iter(weights)
    for name in NUMBERS:
        column = batch.column(name)
        numbers = (column.fill_null(0) if column.null_count else column).to_numpy()
        total += numbers.view(np.int64 if numbers.itemsize == 8 else np.int32).astype(np.int64).view(np.uint64) * (
            np.uint64(next(rest))
        )
    for name in TEXTS:
        ends, data = _text(batch.column(name))
        three = [np.uint64(next(rest)) for _ in range(3)]
        if not len(data):
            continue
        words = np.ndarray((len(data) + 1,), "<u8", data + bytes(8), strides=(1,))
        places = ends.astype(np.intp)
        starts, sizes = places[:-1], np.diff(places)
        inside = _BELOW[np.minimum(sizes, 8)]
        total += (words[starts] & inside) * three[0]
        total += (words[np.maximum(starts, places[1:] - 8)] & inside) * three[1]
        total += sizes.astype(np.uint64) * three[2]
    total ^= total >> np.uint64(29)
    total *= np.uint64(0xBF58476D1CE4E5B9)
    bits: Bits = np.maximum(total >> np.uint64(48), np.uint64(1)).astype(np.uint16)
    return bits
