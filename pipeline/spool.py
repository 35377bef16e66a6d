"""What waits on disk for a topic: how far the topic has acknowledged, and the records behind that, read back.

In: the archive that the agent writes before it sends anything, and acknowledgements. Out: the place behind which
everything still has to be sent, and its records in order. Why so: the archive is the only store. What waits is a range
of positions in it, and the one thing that is kept beside it is a file with the last position that was acknowledged.

The file ``DIR/acknowledged/node=NAME/<topic>.json`` is one JSON object, ``{"topic", "epoch", "pos", "check"}``: in this
topic everything up to ``pos`` of ``epoch``, and all of earlier epochs, is acknowledged or declared lost. ``check`` is
the SHA-256 of the rest. It is replaced as a whole, at most once a second: after a crash some records are sent again,
and readers tell the copies apart by (epoch, pos).
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline import archive
from pipeline.errors import DatumDamaged, SchemaRefused, SinkUnavailable

_SAVE_SECS = 1.0


class Place(NamedTuple):
    """A record: epochs sort by time, so places do. Before the first record of an epoch ``pos`` is -1."""

    epoch: str
    pos: int


# --- how far ------------------------------------------------------------------------------------------------------


class Acknowledged:
    """The acknowledged position of one topic, on disk. It is an ``archive.Receipt``.

    ``at`` is what is acknowledged, None when nothing is known: the file is missing or damaged. ``damage`` is then the
    sentence that says so, or None. ``last_pos`` finds the last position in a segment that an earlier life has written.
    """

    def __init__(
        self,
        directory: Path,
        *,
        node: str,
        topic: str,
        last_pos: Callable[[archive.SegmentFile], int],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path = directory / "acknowledged" / f"node={archive.safe(node)}" / f"{archive.safe(topic)}.json"
        self._topic = topic
        self._find_last_pos = last_pos
        self._monotonic = monotonic
        self._known: dict[Path, int] = {}
        self._save_at = -math.inf
        self.damage: str | None = None
        self.at = self._saved = self._read()

    def _read(self) -> Place | None:
        try:
            found = json.loads(self._path.read_bytes())
            rest = {name: found[name] for name in ("topic", "epoch", "pos")}
            whole = found["check"] == _check(rest) and isinstance(found["pos"], int) and found["topic"] == self._topic
        except FileNotFoundError:
            return None
        except OSError as error:
            self.damage = f"The acknowledged position in {self._path} cannot be read: {error.strerror}."
            return None
        except (ValueError, TypeError, KeyError, RecursionError):
            whole = False
        if not whole:
            self.damage = f"The acknowledged position in {self._path} is damaged."
            return None
        return Place(str(found["epoch"]), found["pos"])

    def reached(self, at: Place) -> None:
        """Everything up to there is acknowledged. For the thread that delivers; nothing is written here."""
        self.at = at

    def tick(self, *, now: bool = False) -> None:
        """Write what has been reached, once a second at most unless ``now``. SinkUnavailable when the disk refuses."""
        at = self.at
        if at is None or at == self._saved or (not now and self._monotonic() < self._save_at):
            return
        self._save_at = self._monotonic() + _SAVE_SECS
        rest = {"topic": self._topic, "epoch": at.epoch, "pos": at.pos}
        fresh = self._path.with_name(f"{self._path.name}.new")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with fresh.open("wb") as file:
                file.write(json.dumps(rest | {"check": _check(rest)}).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(self._path)
            archive.sync_folder(self._path.parent)
        except OSError as error:
            raise SinkUnavailable(
                f"The acknowledged position {self._path} cannot be written: {error.strerror}."
            ) from error
        self._saved = at

    def covers(self, segment: archive.SegmentFile, last_pos: int | None) -> bool:
        """Whether what is on disk says that all of a segment is acknowledged."""
        # Not what was reached since: after a crash that is forgotten, and would be looked for.
        if self._saved is None or segment.epoch > self._saved.epoch:
            return False
        if segment.epoch < self._saved.epoch:
            return True
        if last_pos is None:
            if segment.path not in self._known:
                self._known[segment.path] = self._find_last_pos(segment)
            last_pos = self._known[segment.path]
        return last_pos <= self._saved.pos


def _check(rest: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


# --- what is behind it --------------------------------------------------------------------------------------------


class Waiting(NamedTuple):
    """Records of one epoch on disk, both ends included."""

    epoch: str
    first_pos: int
    last_pos: int


class Part(NamedTuple):
    """Records: ``positions`` int64, ascending, and a datum for each; without any, ``reason`` why they cannot be had."""

    first_pos: int
    last_pos: int
    positions: npt.NDArray[np.int64]
    datums: pa.BinaryArray
    reason: str = ""


Unpack = Callable[[archive.Block], tuple[npt.NDArray[np.int64], pa.BinaryArray]]
"""Positions and datums of a block. DatumDamaged or SchemaRefused when it is not what it should be."""


def left_by_earlier_lives(directory: Path, node: str, after: Place | None, unpack: Unpack) -> list[Waiting]:
    """What is on disk behind ``after`` (None: from the first record on), a range an epoch, oldest first."""
    epochs: dict[str, list[archive.SegmentFile]] = {}
    for segment in archive.segments(directory, node):
        if after is None or segment.epoch >= after.epoch:
            epochs.setdefault(segment.epoch, []).append(segment)
    found = []
    for epoch, there in sorted(epochs.items()):
        there.sort(key=lambda segment: segment.first_pos)
        first = after.pos + 1 if after is not None and epoch == after.epoch else there[0].first_pos
        last = max(last_position(segment, unpack) for segment in there[-archive.MAX_OPEN :])
        if last >= first:
            found.append(Waiting(epoch, first, last))
    return found


@dataclass(slots=True)
class _Source:
    """A segment that is being read. ``positions`` and ``datums`` are what was read of it and not given yet."""

    path: Path
    blocks: Iterator[archive.Block | archive.Unread]
    positions: npt.NDArray[np.int64]
    datums: pa.BinaryArray


class Backlog:
    """Reads records of one node back, in the order of their positions. One thread at a time.

    Segments hold consecutive positions but around midnight, where two days are written in turns: what is read of those
    is put in order.
    """

    def __init__(self, directory: Path, node: str, unpack: Unpack) -> None:
        self._directory, self._node, self._unpack = directory, node, unpack
        self._epoch = ""
        self._next = -1
        self._sources: list[_Source] = []
        self._unopened: list[archive.SegmentFile] = []
        self._offsets: dict[str, int] = {}
        self._trouble = ""

    def read(self, epoch: str, first_pos: int, last_pos: int) -> Part:
        """The first of these that there are, of one block or a few; or those that are missing before them."""
        wanted = Waiting(epoch, first_pos, last_pos)
        part = self._following(wanted) if (epoch, first_pos) == (self._epoch, self._next) else None
        if part is None or part.reason:
            # Not so until looked for: segments grow, are closed and begun.
            before = part
            self._begin(epoch, first_pos)
            part = self._following(wanted)
            if before is not None and part.reason and part[:2] == before[:2]:
                part = part._replace(reason=before.reason)
        self._next = part.last_pos + 1
        return part

    def _begin(self, epoch: str, first: int) -> None:
        if epoch != self._epoch or first != self._next:
            self._offsets.clear()
        self._epoch, self._next, self._sources, self._trouble = epoch, first, [], ""
        there = [one for one in archive.segments(self._directory, self._node) if one.epoch == epoch]
        there.sort(key=lambda one: one.first_pos)
        # Of a day, what comes first ends before the next begins.
        latest = {one.path.parent: one for one in there if one.first_pos <= first}
        self._unopened = [one for one in there if one.first_pos > first or one is latest[one.path.parent]]

    def _following(self, wanted: Waiting) -> Part:
        while True:
            self._open_what_begins(wanted.first_pos)
            self._fill(wanted.first_pos)
            first = min((int(source.positions[0]) for source in self._sources), default=wanted.last_pos + 1)
            if self._unopened and self._unopened[0].first_pos <= min(first, wanted.last_pos):
                self._open_what_begins(self._unopened[0].first_pos)
            elif first > wanted.first_pos:
                reason = self._trouble or "they are no longer on disk"
                self._trouble = ""
                nothing = pa.array([], pa.binary())
                return Part(wanted.first_pos, min(first - 1, wanted.last_pos), np.empty(0, np.int64), nothing, reason)
            else:
                limit = min(int(source.positions[-1]) for source in self._sources)
                if self._unopened:
                    limit = min(limit, self._unopened[0].first_pos - 1)
                return self._take(min(limit, wanted.last_pos))

    def _take(self, limit: int) -> Part:
        """What was read up to ``limit``, as far as it is without a hole."""
        positions, datums = [], []
        for source in self._sources:
            count = int(np.searchsorted(source.positions, limit, "right"))
            positions.append(source.positions[:count])
            datums.append(source.datums.slice(0, count))
            source.positions, source.datums = source.positions[count:], source.datums.slice(count)
        found, every = np.concatenate(positions), pa.concat_arrays(datums)
        if len(positions) > 1:
            found, order = np.unique(found, return_index=True)
            every = every.take(pa.array(order))
        holes = np.flatnonzero(np.diff(found) != 1)
        if len(holes):
            # The rest comes with the next call, behind the part that is missing.
            at = int(holes[0]) + 1
            self._sources.insert(0, _Source(Path(), iter(()), found[at:], every.slice(at)))
            found, every = found[:at], every.slice(0, at)
        return Part(int(found[0]), int(found[-1]), found, every)

    def _open_what_begins(self, first: int) -> None:
        while self._unopened and self._unopened[0].first_pos <= first:
            path = self._unopened.pop(0).path
            empty = pa.array([], pa.binary())
            start = self._offsets.get(_stem(path))
            blocks = archive.read_segment(path, self._place_of(path, first) if start is None else start)
            self._sources.append(_Source(path, blocks, np.empty(0, np.int64), empty))

    def _place_of(self, path: Path, first: int) -> int:
        """Offset of the last block that does not begin behind ``first``, as far as blocks can be read."""
        with contextlib.suppress(OSError, DatumDamaged, SchemaRefused, StopIteration):
            offsets, _ = archive.block_offsets(path)
            low, high = 0, len(offsets)
            while high - low > 1:
                middle = (low + high) // 2
                block = next(item for item in archive.read_segment(path, offsets[middle]))
                if not isinstance(block, archive.Block):
                    break
                positions, _ = self._unpack(block.split()[0])
                low, high = (middle, high) if positions[0] <= first else (low, middle)
            return offsets[low] if offsets else 0
        return 0

    def _fill(self, first: int) -> None:
        """Reads on where nothing from ``first`` on is left, and drops what has ended."""
        for source in list(self._sources):
            while not len(source.positions):
                item = next(source.blocks, None)
                if item is None:
                    self._sources.remove(source)
                    break
                if isinstance(item, archive.Unread):
                    self._trouble = item.reason
                    continue
                try:
                    positions, datums = self._unpack(item)
                except (DatumDamaged, SchemaRefused) as error:
                    # Small blocks come together; the others of them may still be whole.
                    if len(item.parts) > 1:
                        source.blocks = itertools.chain(item.split(), source.blocks)
                    self._trouble = f"{item.path} block at byte {item.offset}: {error}"
                    continue
                self._offsets[_stem(source.path)] = item.offset
                skip = int(np.searchsorted(positions, first))
                source.positions, source.datums = positions[skip:], datums.slice(skip)


def _stem(path: Path) -> str:
    """The name of a segment, whether it is closed or not."""
    return path.name.partition(".")[0]


def last_position(segment: archive.SegmentFile, unpack: Unpack) -> int:
    """The last position in a segment that can be read; one before its first when there is none."""
    last = None
    with contextlib.suppress(OSError):
        offsets, whole = archive.block_offsets(segment.path)
        for item in archive.read_segment(segment.path, offsets[-1] if whole and offsets else 0):
            if isinstance(item, archive.Block):
                last = item
    for block in reversed(last.split() if last is not None else []):
        with contextlib.suppress(DatumDamaged, SchemaRefused):
            return int(unpack(block)[0][-1])
    return segment.first_pos - 1
