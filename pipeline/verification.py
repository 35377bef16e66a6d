"""Whether what was read is all of what was written, and as it was written.

In: batches with the bytes of their rows, in any order, and in its place what could not be read. Out: a ``Verdict`` for
each node and epoch: complete, or what is missing, where, how many and why, and what is not as it was written.

How: every run of records whose positions follow one another is a *lane*, and has a running digest that is compared at
every checkpoint in it. A lane that begins between two checkpoints keeps its datums up to the first one, for another
lane may turn up that ends where it begins. So a record is held only while it lies in front of the first checkpoint of
its run, whatever the order of the sources. A position that comes more than once is compared by the digests of both
lanes; what neither covers has to be read once more (``settle``, ``compare``). Everything that somebody else can make
grow has a limit, and what lies beyond it is said not to be proven.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import secrets
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import chain, event

COMPLETE, UNREADABLE, DECLARED, UNDECLARED = 0, 3, 4, 5
"""Exit codes, from the best to the worst: 0, 4, 3, 5."""
_RANK = {code: rank for rank, code in enumerate((COMPLETE, DECLARED, UNREADABLE, UNDECLARED))}

MAX_EPOCHS = 50_000
MAX_LANES = 2_000
"""Runs of one epoch that are kept apart."""
MAX_PIECES = 10_000
"""Ranges of one epoch that came more than once and are told apart."""
MAX_NOTED = 100_000
"""Declarations of one epoch, and places that could not be read."""
MAX_HELD_BYTES = 128 << 20
"""Datums that are held for all lanes together."""
MAX_COMPARED = 10_000_000
"""Positions that are compared in a second reading."""
MAX_SAID = 1_000
"""Gaps, and forgeries, that are listed of one epoch."""
SILENT_US = 75_000_000
"""How long an idle node is silent at most, and somewhat more: an agent writes a checkpoint after 60 s."""
EDGE_US = 1_000_000
"""By how much times of neighbouring positions may be in the wrong order; around midnight they lie in two files."""

Why = Literal["declared", "undeclared", "unread", "outside"]


def worst(codes: Sequence[int]) -> int:
    """The exit code for several verdicts: what is undeclared or forged, then what is unread, then declared loss."""
    return max(codes, key=_RANK.__getitem__, default=COMPLETE)


class Gap(NamedTuple):
    """Positions that were not there, both included, and why: ``declared`` by the stream, ``unread`` (something in this
    place could not be read), ``outside`` the range that was asked for, or ``undeclared``."""

    first_pos: int
    last_pos: int
    why: Why
    cause: str

    @property
    def records(self) -> int:
        """How many."""
        return self.last_pos - self.first_pos + 1


class Forgery(NamedTuple):
    """Positions, both included, where something is not as it was written, and what."""

    first_pos: int
    last_pos: int
    what: str


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What is known of one epoch of one node.

    ``end`` is ``stop``, ``open`` (the newest epoch of its node), ``none`` (another epoch follows) or ``outside`` the
    range. ``records`` were read, each position counted once, ``first_us`` to ``last_us``, microseconds since 1970;
    ``proven`` of them are covered by a digest that is right; ``signed`` when every checkpoint has a signature.
    ``lost`` are attempts by cause that the kernel could not hand over, as the stream declares. ``cut`` says what could
    not be read behind the last record, or is empty; ``doubtful`` that not everything could be compared or proven.
    ``head`` is that of the last checkpoint, to be compared with one that was noted elsewhere.
    ``missing`` counts positions by why; the first of them are listed in ``gaps``.
    """

    node: str
    epoch: str
    end: str
    records: int
    proven: int
    signed: bool
    first_us: int
    last_us: int
    head: str | None
    attempted: int | None
    lost: Mapping[str, int]
    missing: Mapping[Why, int]
    gaps: Sequence[Gap]
    forgeries: Sequence[Forgery]
    cut: str
    doubtful: bool
    notes: Sequence[str]

    @property
    def state(self) -> str:
        """The verdict in a word or three."""
        if self.forgeries:
            return "forged"
        if "undeclared" in self.missing:
            return "undeclared loss"
        if "unread" in self.missing or self.cut:
            return "unread"
        if self.doubtful:
            return "not proven"
        if "declared" in self.missing or self.lost:
            return "declared loss"
        if self.end == "none":
            return "ended without stop"
        if self.missing or self.end == "outside":
            return "part"
        return "complete" if self.end == "stop" else "open end"

    @property
    def code(self) -> int:
        """The exit code for this epoch alone."""
        return {
            "forged": UNDECLARED,
            "undeclared loss": UNDECLARED,
            "unread": UNREADABLE,
            "not proven": UNREADABLE,
            "declared loss": DECLARED,
            "ended without stop": DECLARED,
        }.get(self.state, COMPLETE)


class Datums(Protocol):
    """The bytes of a batch's rows: ``of(first, end)`` those of some, one directly behind the other, ``pick`` those of
    any; ``borders(first, end)`` where in ``of`` each begins, and where the last ends. ``schema.sha256`` is what they
    were read with."""

    @property
    def schema(self) -> Any: ...

    def of(self, first: int, end: int) -> bytes | memoryview: ...

    def pick(self, rows: list[int]) -> bytes: ...

    def borders(self, first: int, end: int) -> list[int]: ...


# --- what is kept of an epoch -------------------------------------------------------------------------------------


class _Spans:
    """Positions as disjoint ranges [first, end), ascending; neighbours are one."""

    def __init__(self) -> None:
        self.firsts: list[int] = []
        self.ends: list[int] = []

    def add(self, first: int, end: int) -> None:
        """These too."""
        low = bisect.bisect_left(self.ends, first)
        high = bisect.bisect_right(self.firsts, end)
        if low < high:
            first, end = min(first, self.firsts[low]), max(end, self.ends[high - 1])
        self.firsts[low:high], self.ends[low:high] = [first], [end]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self.firsts, self.ends, strict=True)

    def __len__(self) -> int:
        """How many positions."""
        return sum(self.ends) - sum(self.firsts)

    def place(self, pos: int) -> int:
        """How many positions in here lie before this one, which is in here."""
        at = bisect.bisect_right(self.firsts, pos) - 1
        return sum(self.ends[:at]) - sum(self.firsts[:at]) + pos - self.firsts[at]

    def covers(self, first: int, end: int) -> bool:
        """Whether all of [first, end) is in here."""
        place = bisect.bisect_right(self.firsts, first) - 1
        return place >= 0 and end <= self.ends[place]


class _Closing(NamedTuple):
    """A checkpoint or a stop: the record at ``pos`` speaks of ``first_pos`` to before ``pos``."""

    pos: int
    kind: str
    first_pos: int | None
    last_pos: int | None
    boot_id: str
    digest: bytes | None
    head: bytes | None


class _Front(NamedTuple):
    """Held datums from ``first_pos`` on; datum i lies from ``borders[i]`` to ``borders[i + 1]``."""

    first_pos: int
    data: bytes
    borders: np.ndarray[Any, np.dtype[np.int64]]


@dataclass(slots=True, eq=False)
class _Lane:
    """Positions ``lo`` to before ``hi``, which came one after the other.

    From ``anchor`` on, where a checkpoint is, or the epoch begins, ``digest`` covers every datum; ``head`` is that
    checkpoint's. Before the first anchor the datums are in ``front``, unless not ``held``, and ``first`` is the
    checkpoint at its end.
    """

    lo: int
    hi: int
    anchor: int | None
    head: bytes | None = None
    digest: Any = field(default_factory=hashlib.sha256)
    front: list[_Front] = field(default_factory=list)
    front_end: int = 0
    first: _Closing | None = None
    held: bool = True
    first_us: int = 0
    last_us: int = 0


@dataclass(slots=True, eq=False)
class _Note:
    """Something that could not be read, and how many records of it no gap is explained by yet; None: nobody knows."""

    source: str
    place: str
    left: int | None


@dataclass(slots=True, eq=False)
class _Epoch:
    """Everything that is kept of one epoch of one node."""

    node: str
    name: str
    schema: str
    lanes: list[_Lane] = field(default_factory=list)
    ends: dict[int, _Lane] = field(default_factory=dict)
    proven: _Spans = field(default_factory=_Spans)
    forgeries: list[Forgery] = field(default_factory=list)
    lost: Counter[str] = field(default_factory=Counter)
    newest: tuple[int, str | None, int | None] = (-1, None, None)
    """Of the last checkpoint: its position, head, and counter of attempts."""
    stop: int | None = None
    closings: int = 0
    without: int = 0
    unsigned: int = 0
    first_us: int = 1 << 62
    last_us: int = -(1 << 62)
    at: int = 0
    source: str = ""
    unread_at: int = 0
    unread: list[tuple[int, int, list[_Note]]] = field(default_factory=list)
    """What could not be read between two positions."""
    beyond: int = 0
    doubts: _Spans = field(default_factory=_Spans)
    compared: np.ndarray[Any, np.dtype[np.uint64]] = field(default_factory=lambda: np.zeros(0, np.uint64))
    """A hash of the record at each position of ``doubts``, 0 while none has been read."""
    differ: _Spans = field(default_factory=_Spans)
    uncompared: int = 0
    unproven: int = 0

    def repeat(self, first: int, end: int) -> None:
        """These positions came once more, in pieces that no digest covers."""
        self.doubts.add(first, end)
        if len(self.doubts.firsts) > MAX_PIECES:
            self.doubts.add(self.doubts.firsts[0], self.doubts.ends[-1])

    def forged(self, first_pos: int, last_pos: int, what: str) -> None:
        """Note a forgery, as far as so many are listed; one that is known already is none."""
        found = Forgery(first_pos, last_pos, what)
        if len(self.forgeries) < MAX_SAID and found not in self.forgeries[-50:]:
            self.forgeries.append(found)


class _Run(NamedTuple):
    """Records of one epoch with the positions ``first_pos`` and following; ``rows`` are their places in the batch."""

    first_pos: int
    rows: np.ndarray[Any, np.dtype[np.int64]]
    datums: Datums
    closings: list[_Closing]
    times: np.ndarray[Any, np.dtype[np.int64]]

    @property
    def end(self) -> int:
        return self.first_pos + len(self.rows)

    def data(self, first: int, end: int) -> bytes | memoryview:
        """The datums of positions ``first`` to before ``end``."""
        rows = self._rows(first, end)
        if rows[-1] - rows[0] == len(rows) - 1:
            return self.datums.of(int(rows[0]), int(rows[-1]) + 1)
        return self.datums.pick(rows.tolist())

    def borders(self, first: int, end: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Where in ``data`` each of them begins, and where the last ends."""
        rows = self._rows(first, end)
        if rows[-1] - rows[0] == len(rows) - 1:
            return np.array(self.datums.borders(int(rows[0]), int(rows[-1]) + 1))
        return np.cumsum([0, *(self.datums.borders(row, row + 1)[1] for row in rows.tolist())])

    def _rows(self, first: int, end: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        return self.rows[first - self.first_pos : end - self.first_pos]


# --- the work -----------------------------------------------------------------------------------------------------


class Verifier:
    """Takes everything that was read. ``good(signature, text)`` is the judge of signatures, where there have to be any.

    First ``add`` and ``unread`` for everything, then ``settle``; if it says so, ``compare`` for everything once more;
    then ``verdicts``. ``wanted(node)`` leaves nodes out. [``since_us``, ``until_us``) is the range that was asked for;
    more may be added, but what is missing outside it is no loss. ``left_out`` counts records of more than MAX_EPOCHS
    epochs.
    """

    def __init__(
        self,
        good: Callable[[bytes, bytes], bool] | None = None,
        wanted: Callable[[str], bool] = lambda _: True,
        since_us: int | None = None,
        until_us: int | None = None,
    ) -> None:
        self._good = good
        self._wanted = wanted
        self._since_us = since_us
        self._until_us = until_us
        self._epochs: dict[tuple[str, str], _Epoch] = {}
        self._declared: dict[tuple[str, str], list[tuple[int, int, str]]] = {}
        self._notes: list[_Note] = []
        self._quiet = False
        # Nobody can make two records with one hash that they cannot compute.
        self._secret = secrets.token_bytes(16)
        self._held = 0
        self.left_out = 0

    # --- the first reading

    def add(self, batch: pa.RecordBatch, datums: Datums, source: str) -> None:
        """The next records, of whatever nodes; ``source`` is the file or the partition that they come from."""
        times = batch.column("time").view(pa.int64()).to_numpy()
        own = _own_rows(batch)
        for node, name, rows, positions in _grouped(batch):
            if not self._wanted(node):
                continue
            epoch = self._epoch(node, name, datums.schema.sha256)
            if epoch is None:
                self.left_out += len(rows)
                continue
            if epoch.schema != datums.schema.sha256:
                epoch.forged(int(positions[0]), int(positions[-1]), "they were read with another schema than the rest")
            epoch.first_us = min(epoch.first_us, int(times[rows].min()))
            epoch.last_us = max(epoch.last_us, int(times[rows].max()))
            if positions.min() < 0:
                epoch.forged(int(positions.min()), -1, "positions begin at 0")
                rows, positions = rows[positions >= 0], positions[positions >= 0]
                if not len(rows):
                    continue
            told = own.get((node, name))
            breaks = (np.flatnonzero(np.diff(positions) != 1) + 1).tolist()
            for low, high in zip([0, *breaks], [*breaks, len(rows)], strict=True):
                mine, heard = rows[low:high], []
                while told and told[0][0] <= mine[-1]:
                    heard.append(told.popleft()[1])
                closings = self._heard(epoch, heard) if heard else []
                run = _Run(int(positions[low]), mine, datums, closings, times[mine])
                self._run(epoch, run, source, fresh=low == 0)
            epoch.unread_at = len(self._notes)
        self._quiet = False

    def unread(self, source: str, place: str, records: int | None = None) -> None:
        """Something that could not be read, behind what was added last; so many records, where that is known."""
        last = self._notes[-1] if self._notes and self._quiet else None
        if last and last.source == source and last.left is not None and records is not None:
            last.left += records
        elif len(self._notes) < MAX_NOTED:
            self._notes.append(_Note(source, place, records))
        self._quiet = True

    def _epoch(self, node: str, name: str, schema: str) -> _Epoch | None:
        epoch = self._epochs.get((node, name))
        if epoch is None and len(self._epochs) < MAX_EPOCHS:
            epoch = self._epochs[node, name] = _Epoch(node, name, schema)
        return epoch

    def _heard(self, epoch: _Epoch, records: list[dict[str, Any]]) -> list[_Closing]:
        """What some of the stream's own records say; the checkpoints of them."""
        closings = []
        for record in records:
            told, pos, kind = record["testimony"], record["pos"], record["kind"]
            if kind == "loss" and not any(lane.lo <= pos < lane.hi for lane in epoch.lanes):
                if told["first_pos"] is None:
                    if not self._before(record["time"]) and not self._past(record["time"]):
                        epoch.lost.update({name: count for name, count in told["counts"] if count > 0})
                elif told["last_pos"] is not None:
                    message = record["message"] or ""
                    whose = (epoch.node, chain.epoch_of(message) or epoch.name)
                    if whose in self._declared or len(self._declared) < MAX_EPOCHS:
                        declared = self._declared.setdefault(whose, [])
                        if len(declared) < MAX_NOTED:
                            declared.append((told["first_pos"], told["last_pos"], message))
            if kind not in ("checkpoint", "stop"):
                continue
            if kind == "stop":
                epoch.stop = pos if epoch.stop is None else max(pos, epoch.stop)
            if pos > epoch.newest[0]:
                epoch.newest = (pos, told["head"], dict(told["counts"]).get("attempted"))
            epoch.closings += 1
            if told["digest"] is None and told["head"] is None:
                epoch.without += 1
            closings.append(
                _Closing(
                    pos,
                    kind,
                    told["first_pos"],
                    told["last_pos"],
                    told["boot_id"] or "",
                    _hash(told["digest"]),
                    _hash(told["head"]),
                )
            )
            self._signature(epoch, record)
        return closings

    def _signature(self, epoch: _Epoch, record: dict[str, Any]) -> None:
        pos, signature = record["pos"], record["testimony"]["signature"]
        epoch.unsigned += signature is None
        if self._good is None:
            return
        if signature is None:
            epoch.forged(pos, pos, f"the {record['kind']} is not signed")
            return
        try:
            raw = bytes.fromhex(signature)
        except ValueError:
            raw = b""
        if not self._good(raw, chain.signed_text(epoch.schema, record)):
            epoch.forged(pos, pos, f"the {record['kind']} has a signature of another key, or of another text")

    def _run(self, epoch: _Epoch, run: _Run, source: str, *, fresh: bool) -> None:
        """Put a run where it belongs: behind the lane that ends where it begins, or beside the others."""
        at, end = run.first_pos, run.end
        while at < end:
            lane = epoch.ends.get(at)
            if lane is None and len(epoch.lanes) >= MAX_LANES:
                epoch.beyond += end - at
                break
            if lane is None:
                self._note_unread(epoch, at, source, fresh=fresh)
                if (until := _repeated(epoch, run, at)) > at:
                    epoch.repeat(at, until)
                    at = until
                    continue
                lane = _Lane(at, at, 0 if at == 0 else None, front_end=at)
                lane.first_us = lane.last_us = int(run.times[at - run.first_pos])
                epoch.lanes.append(lane)
            self._extend(epoch, lane, run, at)
            at = end
        epoch.at, epoch.source = end, source

    def _note_unread(self, epoch: _Epoch, at: int, source: str, *, fresh: bool) -> None:
        """What could not be read since this epoch was last heard of may be why positions are missing before ``at``.

        Within a batch, after its first run (``fresh``), only single records of which it is known that they are few.
        """
        notes = [
            note
            for note in self._notes[max(epoch.unread_at, len(self._notes) - MAX_SAID) :]
            if (note.source in (source, epoch.source) or f"-{epoch.name}-" in note.source)
            and (fresh or note.left is not None)
        ]
        if notes:
            epoch.unread.append((epoch.at, at, notes))

    def _extend(self, epoch: _Epoch, lane: _Lane, run: _Run, start: int) -> None:
        """Take in a run from ``start`` on, to its end."""
        end = run.end
        if epoch.ends.get(lane.hi) is lane:
            del epoch.ends[lane.hi]
        at = start
        for closing in run.closings:
            if start <= closing.pos:
                self._absorb(lane, run, at, closing.pos)
                lane.hi = at = closing.pos
                self._close(epoch, lane, closing)
        self._absorb(lane, run, at, end)
        lane.hi = end
        lane.last_us = int(run.times[end - 1 - run.first_pos])
        rival = epoch.ends.get(end)
        if rival is None or (rival.anchor is None, rival.lo) > (lane.anchor is None, lane.lo):
            epoch.ends[end] = lane

    def _absorb(self, lane: _Lane, run: _Run, first: int, end: int) -> None:
        if first == end:
            return
        data = run.data(first, end)
        if lane.anchor is not None:
            lane.digest.update(data)
            return
        lane.front_end = end
        if lane.held:
            lane.front.append(_Front(first, bytes(data), run.borders(first, end)))
            self._held += len(data)
            if self._held > MAX_HELD_BYTES:
                self._held -= sum(len(piece.data) for piece in lane.front)
                lane.front, lane.held = [], False

    def _close(self, epoch: _Epoch, lane: _Lane, closing: _Closing) -> None:
        """A checkpoint in a lane: what its digest covers is as it was, or is not."""
        first, pos = closing.first_pos, closing.pos
        if first is None or closing.last_pos != pos - 1 or not 0 <= first < pos:
            epoch.forged(pos, pos, f"the {closing.kind} speaks of {first} to {closing.last_pos}, and stands at {pos}")
        elif lane.anchor is None:
            lane.first = closing
        elif lane.anchor != first:
            what = f"the {closing.kind} speaks of {first} to {pos - 1}; what was before it ends at {lane.anchor - 1}"
            epoch.forged(pos, pos, what)
        else:
            self._judge(epoch, closing, lane.digest.digest(), lane.head)
        lane.anchor, lane.head, lane.digest = pos, closing.head, hashlib.sha256()

    def _judge(self, epoch: _Epoch, closing: _Closing, digest: bytes, before: bytes | None) -> None:
        first, pos = closing.first_pos, closing.pos
        assert first is not None
        if closing.digest is None and closing.head is None:
            return
        if first == 0:
            before = chain.first_head(epoch.node, epoch.name, closing.boot_id, epoch.schema)
        if closing.digest != digest:
            epoch.forged(first, pos - 1, "they are not what their digest was made of")
        elif closing.head != chain.next_head(before or b"", digest):
            what = "this node, epoch, boot and schema" if first == 0 else "the one before"
            epoch.forged(first, pos, f"the head of the {closing.kind} does not follow from {what}")
        else:
            epoch.proven.add(first, pos)

    # --- the end of the first reading

    def settle(self) -> bool:
        """Everything was read once. Whether it has to be read again: something came twice, and may differ."""
        for epoch in self._epochs.values():
            seen = _seen(epoch)
            for lane in epoch.lanes:
                first = lane.first
                if first is None or first.digest is None or first.first_pos is None:
                    continue
                if not epoch.proven.covers(first.first_pos, first.pos) and not self._assemble(epoch, first):
                    # Its datums have all been here, but not so that they could be held.
                    epoch.unproven += (first.pos - first.first_pos) * seen.covers(first.first_pos, first.pos)
            self._doubt(epoch)
        left = MAX_COMPARED
        for epoch in self._epochs.values():
            if len(epoch.doubts) > left:
                epoch.uncompared, epoch.doubts = len(epoch.doubts), _Spans()
            left -= len(epoch.doubts)
            epoch.compared = np.zeros(len(epoch.doubts), np.uint64)
        return any(epoch.doubts.firsts for epoch in self._epochs.values())

    def _assemble(self, epoch: _Epoch, closing: _Closing) -> bool:
        """Judge the interval of a checkpoint whose datums came in several lanes; False where they are not all there."""
        begun = [lane for lane in epoch.lanes if lane.anchor == closing.first_pos and lane.hi <= closing.pos]
        if not begun:
            return False
        lane = max(begun, key=lambda one: one.hi)
        digest, at = lane.digest.copy(), lane.hi
        while at < closing.pos:
            beside = [one for one in epoch.lanes if one.front and one.lo <= at < one.front_end]
            if not beside:
                return False
            following = max(beside, key=lambda one: one.front_end)
            for piece in following.front:
                end = piece.first_pos + len(piece.borders) - 1
                if end > at:
                    until = min(end, closing.pos)
                    low, high = (piece.borders[pos - piece.first_pos] for pos in (at, until))
                    digest.update(piece.data[low:high])
                    at = until
                if at == closing.pos:
                    break
        self._judge(epoch, closing, digest.digest(), lane.head)
        return True

    def _doubt(self, epoch: _Epoch) -> None:
        """Positions in two lanes that no digest covers in one of them: the digests cannot say whether they agree.

        Of the last checkpoint of a lane its own record is in doubt too; its head stands for everything before it.
        """
        lanes = sorted(epoch.lanes, key=lambda lane: lane.lo)
        for place, lane in enumerate(lanes):
            for other in lanes[place + 1 :]:
                if other.lo >= lane.hi:
                    break
                same = lane.anchor is not None and _tail(lane) == _tail(other)
                for one, two in ((lane, other), (other, lane)):
                    loose = [(one.lo, one.front_end)]
                    if epoch.without:
                        loose = [(one.lo, one.hi)]
                    elif one.anchor is not None and not same:
                        loose.append((one.anchor, one.hi))
                    for low, high in loose:
                        if max(low, two.lo) < min(high, two.hi):
                            epoch.doubts.add(max(low, two.lo), min(high, two.hi))

    # --- the second reading

    def compare(self, batch: pa.RecordBatch, datums: Datums) -> None:
        """What was added before, once more: records that came twice are compared, byte for byte."""
        for node, name, rows, positions in _grouped(batch):
            epoch = self._epochs.get((node, name))
            if epoch is None or not epoch.doubts.firsts:
                continue
            places = np.flatnonzero(_inside(positions, epoch.doubts))
            breaks = (np.flatnonzero((np.diff(rows[places]) != 1) | (np.diff(positions[places]) != 1)) + 1).tolist()
            for low, high in zip([0, *breaks], [*breaks, len(places)], strict=True):
                if low < high:
                    first = places[low]
                    self._compare(epoch, datums, int(rows[first]), int(positions[first]), high - low)

    def _compare(self, epoch: _Epoch, datums: Datums, row: int, pos: int, count: int) -> None:
        data, borders = datums.of(row, row + count), datums.borders(row, row + count)
        first = epoch.doubts.place(pos)
        for place in range(count):
            datum = data[borders[place] : borders[place + 1]]
            found = int.from_bytes(hashlib.blake2b(datum, digest_size=8, key=self._secret).digest()) or 1
            known = int(epoch.compared[first + place])
            if known not in (0, found):
                epoch.differ.add(pos + place, pos + place + 1)
            epoch.compared[first + place] = known or found

    # --- the answer

    def verdicts(self) -> list[Verdict]:
        """A verdict for each node and epoch with records in the range, by node and epoch."""
        newest: dict[str, str] = {}
        for node, name in self._epochs:
            newest[node] = max(name, newest.get(node, ""))
        return [
            self._verdict(epoch, newest[node])
            for (node, _), epoch in sorted(self._epochs.items())
            if not self._before(epoch.last_us) and not self._past(epoch.first_us)
        ]

    def _before(self, time_us: int) -> bool:
        return self._since_us is not None and time_us < self._since_us

    def _past(self, time_us: int) -> bool:
        return self._until_us is not None and time_us >= self._until_us

    def _verdict(self, epoch: _Epoch, newest: str) -> Verdict:
        seen = _seen(epoch)
        last = max(seen.ends, default=0) - 1
        if epoch.stop is not None and epoch.stop < last:
            epoch.forged(epoch.stop + 1, last, "they follow the stop, which is the last record of an epoch")
        for first, behind in epoch.differ:
            epoch.forged(first, behind - 1, "there are two records that differ")
        if 0 < epoch.without < epoch.closings:
            epoch.forged(0, last, f"{epoch.without} of {epoch.closings} checkpoints have no digest")
        gaps = [gap for hole in _holes(seen) for gap in self._explained(epoch, *hole)]
        missing = Counter[Why]()
        for gap in gaps:
            missing[gap.why] += gap.records
        end = "stop" if epoch.stop is not None else "none" if epoch.name < newest else "open"
        if end != "stop" and self._past(epoch.last_us + SILENT_US):
            end = "outside"
        return Verdict(
            node=epoch.node,
            epoch=epoch.name,
            end=end,
            records=len(seen) + epoch.beyond,
            proven=len(epoch.proven),
            signed=epoch.closings > 0 and epoch.unsigned == 0 and epoch.without == 0,
            first_us=epoch.first_us,
            last_us=epoch.last_us,
            head=epoch.newest[1],
            attempted=epoch.newest[2],
            lost=dict(sorted(epoch.lost.items())),
            missing=missing,
            gaps=gaps[:MAX_SAID],
            forgeries=sorted(epoch.forgeries),
            doubtful=epoch.uncompared > 0 or epoch.unproven > 0,
            cut="" if end == "stop" else self._cut(epoch),
            notes=self._remarks(epoch, gaps),
        )

    def _explained(self, epoch: _Epoch, low: int, high: int) -> Iterator[Gap]:
        """A hole as gaps: what the stream declares, and between that what else is known."""
        at = low
        for first, last, message in sorted(self._declared.get((epoch.node, epoch.name), ())):
            if last < at or first >= high:
                continue
            if first > at:
                yield self._unexplained(epoch, at, first)
            yield Gap(max(first, at), min(last + 1, high) - 1, "declared", message)
            at = max(at, min(last + 1, high))
        if at < high:
            yield self._unexplained(epoch, at, high)

    def _unexplained(self, epoch: _Epoch, low: int, high: int) -> Gap:
        before = max((lane.last_us for lane in epoch.lanes if lane.hi == low), default=None)
        behind = min((lane.first_us for lane in epoch.lanes if lane.lo == high), default=None)
        edge = EDGE_US if low else SILENT_US
        if behind is not None and self._before(behind - edge):
            return Gap(low, high - 1, "outside", "before the range that was asked for")
        if before is not None and self._past(before + EDGE_US):
            return Gap(low, high - 1, "outside", "behind the range that was asked for")
        for first, end, notes in epoch.unread:
            if first < high and low < end and _spent(notes, high - low):
                return Gap(low, high - 1, "unread", notes[0].place)
        if low == 0:
            return Gap(low, high - 1, "undeclared", "the beginning is not there: it has expired, or was taken away")
        return Gap(low, high - 1, "undeclared", "no record says why")

    def _cut(self, epoch: _Epoch) -> str:
        """What could not be read behind the last record; of a partition nobody knows whose it was."""
        for note in self._notes[max(epoch.unread_at, len(self._notes) - MAX_SAID) :]:
            if (note.source == epoch.source and note.left is None) or f"-{epoch.name}-" in note.source:
                return note.place
        return ""

    def _remarks(self, epoch: _Epoch, gaps: Sequence[Gap]) -> list[str]:
        said = []
        if epoch.closings and epoch.without == epoch.closings:
            said.append("its checkpoints have no digests: they are of an older version, or were taken away")
        if epoch.beyond:
            said.append(f"{epoch.beyond} records lie in more than {MAX_LANES} pieces and were only counted")
        if epoch.uncompared:
            said.append(f"{epoch.uncompared} records came more than once and were not compared, being too many")
        if epoch.unproven:
            said.append(f"{epoch.unproven} records came in pieces too large to be held until they could be proven")
        if len(gaps) > MAX_SAID:
            said.append(f"{len(gaps) - MAX_SAID} more gaps")
        return said


def _repeated(epoch: _Epoch, run: _Run, at: int) -> int:
    """How far a run from ``at`` on only repeats what another lane has: up to a checkpoint, where a lane can begin that
    is proven by itself, or to the end of the other lane, which can take the rest."""
    if at == 0:
        return at
    closing = next((one.pos for one in run.closings if one.pos >= at), run.end)
    return min(max((lane.hi for lane in epoch.lanes if lane.lo <= at < lane.hi), default=at), closing, run.end)


def _tail(lane: _Lane) -> tuple[int | None, int, bytes]:
    """Equal for lanes that end with the same bytes since the same checkpoint, and so have the same before it too."""
    return lane.anchor, lane.hi, lane.digest.digest()


def _inside(positions: np.ndarray[Any, np.dtype[np.int64]], spans: _Spans) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """For each position whether it lies in the spans."""
    place = np.searchsorted(np.array(spans.firsts), positions, "right") - 1
    inside: np.ndarray[Any, np.dtype[np.bool_]] = (place >= 0) & (positions < np.array(spans.ends)[place])
    return inside


def _spent(notes: list[_Note], count: int) -> bool:
    """Whether so many records are among what could not be read; they explain no other gap then."""
    if any(note.left is None for note in notes):
        return True
    if sum(note.left or 0 for note in notes) < count:
        return False
    for note in notes:
        part = min(note.left or 0, count)
        note.left, count = (note.left or 0) - part, count - part
    return True


def _seen(epoch: _Epoch) -> _Spans:
    seen = _Spans()
    for lane in epoch.lanes:
        seen.add(lane.lo, lane.hi)
    return seen


def _holes(seen: _Spans) -> Iterator[tuple[int, int]]:
    at = 0
    for first, end in seen:
        if first > at:
            yield at, first
        at = end


def _hash(text: str | None) -> bytes | None:
    """32 bytes from their digits; something else is 32 bytes that nothing has as its hash."""
    if text is None:
        return None
    try:
        raw = bytes.fromhex(text)
    except ValueError:
        return b""
    return raw if len(raw) == 32 else b""


_BIND = pa.scalar("bind")


def _own_rows(batch: pa.RecordBatch) -> dict[tuple[str, str], deque[tuple[int, dict[str, Any]]]]:
    """The stream's own records of a batch by node and epoch, with their rows, ascending; times in microseconds."""
    told = pc.and_(pc.not_equal(batch.column("kind"), _BIND), pc.is_valid(batch.column("testimony")))
    rows = pc.indices_nonzero(told)
    found: dict[tuple[str, str], deque[tuple[int, dict[str, Any]]]] = {}
    if not len(rows):
        return found
    names = ["node", "epoch", "kind", "pos", "time", "message", "testimony"]
    chosen = batch.select(names).take(rows)
    times = chosen.column("time").view(pa.int64()).to_pylist()
    for row, record, time in zip(rows.to_pylist(), chosen.drop_columns(["time"]).to_pylist(), times, strict=True):
        record["time"] = time
        found.setdefault((record["node"], record["epoch"]), deque()).append((row, record))
    return found


def _grouped(
    batch: pa.RecordBatch,
) -> Iterator[tuple[str, str, np.ndarray[Any, np.dtype[np.int64]], np.ndarray[Any, np.dtype[np.int64]]]]:
    """Node, epoch, rows and positions of each epoch in a batch, rows ascending."""
    if batch.num_rows == 0:
        return
    positions = batch.column("pos").to_numpy()
    nodes, epochs = (batch.column(name).dictionary_encode() for name in ("node", "epoch"))
    names, ids = nodes.dictionary.to_pylist(), epochs.dictionary.to_pylist()
    if len(names) == len(ids) == 1:
        yield names[0], ids[0], np.arange(batch.num_rows), positions
        return
    codes = nodes.indices.to_numpy().astype(np.int64) * len(ids) + epochs.indices.to_numpy()
    order = np.argsort(codes, kind="stable")
    borders = (np.flatnonzero(np.diff(codes[order])) + 1).tolist()
    for low, high in zip([0, *borders], [*borders, len(order)], strict=True):
        rows = order[low:high]
        node, epoch = divmod(int(codes[rows[0]]), len(ids))
        yield names[node], ids[epoch], rows, positions[rows]


# --- as text ------------------------------------------------------------------------------------------------------

_COLUMNS = (("NODE", 16), ("EPOCH", 16), ("STATE", 18), ("RECORDS", 10), ("PROVEN", 10), ("LOST", 8), ("MISSING", 8))
_SAID = 3

HEADER = "".join(f"{name:{width}} " for name, width in _COLUMNS) + "FOUND\n"


def as_columns(verdict: Verdict) -> str:
    """One line of the table; the first few findings in the last column."""
    cells: list[object] = [
        event.one_line(verdict.node),
        event.one_line(verdict.epoch),
        verdict.state,
        verdict.records,
        verdict.proven,
        sum(verdict.lost.values()),
        _missing(verdict),
    ]
    found = [f"{_span(one)} forged: {one.what}" for one in verdict.forgeries]
    found += [f"{_span(gap)} missing, {gap.why}: {gap.cause}" for gap in verdict.gaps]
    found += [f"lost in the kernel: {', '.join(f'{name} {count}' for name, count in verdict.lost.items())}"] * bool(
        verdict.lost
    )
    found += [f"the end could not be read: {verdict.cut}"] * bool(verdict.cut)
    if verdict.end in ("open", "none"):
        found.append(f"no stop; its last record is of {_iso(verdict.last_us)}")
    found += verdict.notes
    if len(found) > _SAID:
        found[_SAID:] = [f"{len(found) - _SAID} more, which -o json lists"]
    line = "".join(f"{cell!s:{width}} " for cell, (_, width) in zip(cells, _COLUMNS, strict=True))
    return (line + event.one_line("; ".join(found))).rstrip() + "\n"


def _missing(verdict: Verdict) -> int:
    """Positions that were not there, where they were asked for."""
    return sum(count for why, count in verdict.missing.items() if why != "outside")


def _span(one: Gap | Forgery) -> str:
    return f"{one.first_pos}" if one.first_pos == one.last_pos else f"{one.first_pos} to {one.last_pos}"


def _iso(us: int) -> str:
    try:
        return f"{datetime(1970, 1, 1) + timedelta(microseconds=us):%Y-%m-%dT%H:%M:%S.%fZ}"
    except OverflowError:
        return f"{us} µs"


def as_json(verdict: Verdict) -> str:
    """The whole verdict as one line of JSON."""
    fields = {
        "node": verdict.node,
        "epoch": verdict.epoch,
        "state": verdict.state,
        "end": verdict.end,
        "records": verdict.records,
        "proven": verdict.proven,
        "signed": verdict.signed,
        "missing": _missing(verdict),
        "head": verdict.head,
        "attempted": verdict.attempted,
        "lost": dict(verdict.lost),
        "first": _iso(verdict.first_us),
        "last": _iso(verdict.last_us),
        "gaps": [{**gap._asdict(), "records": gap.records} for gap in verdict.gaps],
        "forgeries": [one._asdict() for one in verdict.forgeries],
        "cut": verdict.cut,
        "notes": list(verdict.notes),
    }
    return json.dumps(fields, separators=(",", ":")) + "\n"
