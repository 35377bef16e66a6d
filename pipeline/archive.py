"""The archive: datums to segments on disk, and segments back to blocks, whatever happened to them in between.

In: encoded datums with their positions and times. Out: standard Avro containers, and from them, or from anybody's Avro
containers, blocks of datums in order, with what could not be read said in its place. Why so: one format serves the file
sink, what waits for Kafka, and what an analyst copies out, and every Avro tool reads it.

A segment is ``DIR/date=YYYY-MM-DD/node=NAME/<start>Z-<epoch>-<first pos>.avro``; ``date`` is the UTC day of every event
inside. It is written as ``*.partial``, one or more blocks a batch, each batch synced, and renamed when it is closed. A
file of a previous life is never appended to: it is cut to its last whole block and renamed. A write is done whole or
not at all: what a failed one left is cut off again before anything else is written, so trying again neither loses nor
doubles.

Blocks are zstd frames with a content checksum: without it two flips of a bit in five come back as wrong data. The
header, which a block's checksum does not cover, carries a checksum of its own, in ``bindsnoop.check``.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import hashlib
import math
import os
import re
import secrets
import stat
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
from backports import zstd

from pipeline import event
from pipeline.errors import DatumDamaged, SinkUnavailable, SourceUnavailable

MAX_BLOCK_BYTES = 64 << 20
"""The longest block that is read, packed or unpacked."""
MAX_HEADER_BYTES = 1 << 20
BLOCK_BYTES = 1 << 20
"""Unpacked bytes of a block that the writer aims at, and that small blocks are joined up to when they are read."""
JOINED_EVENTS = 8_192
MAX_OPEN = 4
"""Days that stay open between writes, around midnight or when a clock jumps."""

EXCERPT = "bindsnoop.excerpt"
"""Key of the header that says by which filters a segment was cut out of a stream."""

_MAGIC = b"Obj\x01"
_PARTIAL = ".partial"
_ALLOCATE_AHEAD = 4 << 20
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_SETTLE_SECS = 60
_RETIRE_SECS = 60
_DAY_US = 86_400_000_000
_PACK: dict[int, int] = {zstd.CompressionParameter.compression_level: 3, zstd.CompressionParameter.checksum_flag: 1}
_UNPACK: dict[int, int] = {zstd.DecompressionParameter.window_log_max: 26}
_Positions = np.ndarray[Any, np.dtype[np.int64]]
_NAME = re.compile(r"(?P<start>\d{8}T\d{6})Z-(?P<epoch>[^-]+)-(?P<first>\d+)(?:-(?P<again>\d+))?\.avro(?:\.partial)?")
_DATE = re.compile(r"date=(\d{4}-\d{2}-\d{2})")


# --- the container's own encoding ---------------------------------------------------------------------------------


def _varint(number: int) -> bytes:
    rest = (number << 1) ^ (number >> 63)
    out = bytearray()
    while rest > 0x7F:
        out.append(rest & 0x7F | 0x80)
        rest >>= 7
    out.append(rest)
    return bytes(out)


def _read_varint(data: bytes | memoryview, at: int) -> tuple[int, int]:
    """A long and where it ends; IndexError when ``data`` ends first, DatumDamaged when it is none."""
    result = shift = 0
    while True:
        byte = data[at]
        at += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return (result >> 1) ^ -(result & 1), at
        shift += 7
        if shift > 63:
            raise DatumDamaged("A number of the container has more than 10 bytes.")


def _header(metadata: dict[str, bytes], sync: bytes) -> bytes:
    out = [_MAGIC, _varint(len(metadata))]
    for key, value in metadata.items():
        name = key.encode()
        out += [_varint(len(name)), name, _varint(len(value)), value]
    return b"".join([*out, b"\0", sync])


def _check(metadata: dict[str, bytes], sync: bytes) -> bytes:
    """Checksum of a header: of everything in it but the checksum itself."""
    rest = {key: value for key, value in metadata.items() if key != "bindsnoop.check"}
    return hashlib.sha256(_header(rest, sync)).hexdigest().encode()


# --- writing ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Retired:
    """A segment that retention deleted: ``count`` records from ``first_pos`` on. ``last_pos`` where it is certain.

    ``unsent``: something in it was not acknowledged. ``full``: it went to make room on a full disk.
    """

    path: Path
    epoch: str
    first_pos: int
    last_pos: int | None
    count: int
    unsent: bool = False
    full: bool = False


class Receipt(Protocol):
    """What a destination has acknowledged, for a writer whose segments wait for it."""

    def covers(self, segment: SegmentFile, last_pos: int | None) -> bool:
        """Whether everything in a segment is acknowledged; ``last_pos`` is None when an earlier life wrote it."""


@dataclass(slots=True, eq=False)
class _Segment:
    """An open ``*.partial``. ``size`` is what is safe in it; beyond that lies at most one write that failed."""

    path: Path
    fd: int
    sync: bytes
    opened: float
    size: int = 0
    count: int = 0
    last_pos: int = -1
    allocated: int = 0


class Writer:
    """Writes one node's stream to segments below ``directory``.

    ``segment_bytes`` and ``segment_secs`` close a segment; ``keep_bytes`` and ``keep_secs`` (None: for ever) bound what
    is kept of this node, whoever wrote it. ``now`` is seconds since 1970. Every method raises SinkUnavailable, with one
    sentence, when the disk refuses; the writer stays usable and the same call may be made again. A segment that met an
    error is closed, and the next one is a new file. On a full disk the oldest closed segments of this node go, 4 MiB at
    a time, unless ``make_room`` is False. ``metadata`` goes into the header of every segment, by keys that begin with
    ``bindsnoop.``.

    With a ``receipt`` segments wait for a destination: age ends only what is acknowledged, bytes also what is not. A
    ``spool`` is there for nothing else: what is acknowledged goes at once, and age ends the rest too.
    """

    def __init__(
        self,
        directory: Path,
        *,
        node: str,
        epoch: str,
        segment_bytes: int = 64 << 20,
        segment_secs: float = 3600,
        keep_bytes: int | None = None,
        keep_secs: float | None = None,
        receipt: Receipt | None = None,
        spool: bool = False,
        make_room: bool = True,
        metadata: Mapping[str, str] | None = None,
        now: Callable[[], float],
    ) -> None:
        self._directory = Path(directory)
        self._node = node
        self._folder = f"node={safe(node)}"
        self._epoch = epoch
        self._segment_bytes = segment_bytes
        self._segment_secs = segment_secs
        self._keep_bytes = keep_bytes
        self._keep_secs = keep_secs
        self._receipt = receipt
        self._spool = spool
        self._may_make_room = make_room
        self._metadata = {key: value.encode("utf-8", "surrogateescape") for key, value in (metadata or {}).items()}
        self._now = now
        self._last_pos: dict[Path, int] = {}
        self._made_room: list[Retired] = []
        self._open: dict[int, _Segment] = {}
        self._unsettled: list[_Segment] = []
        self._retire_at = -math.inf
        with self._disk():
            self._directory.mkdir(parents=True, exist_ok=True)
            self._recover()

    def write(
        self, datums: pa.BinaryArray, first_pos: int | _Positions, times_us: np.ndarray[Any, Any] | pa.Array
    ) -> None:
        """Make ``datums`` safe on disk; datum i has position ``first_pos + i`` and happened at ``times_us[i]``, UTC.

        Where there are holes ``first_pos`` has the position of each; within a segment they have to ascend. Returns when
        they are synced. Raises when not one of them is kept, so the same call can be made again.
        """
        if len(datums) != len(times_us):
            raise ValueError(f"{len(datums)} datums have {len(times_us)} times; each has one.")
        if len(datums) == 0:
            return
        times = _microseconds(times_us)
        positions = first_pos if isinstance(first_pos, np.ndarray) else first_pos + np.arange(len(datums))
        with self._disk():
            try:
                self._write(datums, positions, times)
            except OSError as error:
                if error.errno not in _FULL:
                    raise
                self._write_where_it_is_full(datums, positions, times)

    def _write_where_it_is_full(
        self, datums: pa.BinaryArray, positions: _Positions, times: np.ndarray[Any, np.dtype[np.int64]]
    ) -> None:
        # The failure has given back what its segment had reserved; only when that is not enough a segment goes.
        try:
            self._write(datums, positions, times)
        except OSError as error:
            if error.errno not in _FULL or not self._may_make_room or not self._make_room():
                raise
            self._write(datums, positions, times)

    def _write(self, datums: pa.BinaryArray, positions: _Positions, times: np.ndarray[Any, np.dtype[np.int64]]) -> None:
        days = times // _DAY_US
        self._settle()
        # Here and not when one is opened: what this write puts into a segment counts only when all of it is safe.
        while len(self._open) > MAX_OPEN:
            self._close(next(iter(self._open)))
        written: list[tuple[_Segment, int, int, int]] = []
        try:
            if (days == days[0]).all():
                self._append(int(days[0]), datums, int(positions[0]), int(positions[-1]), int(times[0]), written)
            else:
                for day in dict.fromkeys(days.tolist()):
                    places = np.flatnonzero(days == day)
                    chosen, mine = datums.take(pa.array(places)), positions[places]
                    self._append(day, chosen, int(mine[0]), int(mine[-1]), int(times[places[0]]), written)
            for segment, _, _, _ in written:
                os.fdatasync(segment.fd)
        except BaseException:
            self._spoil([segment for segment, _, _, _ in written])
            raise
        for segment, size, count, last_pos in written:
            segment.size = size
            segment.count += count
            segment.last_pos = last_pos

    def tick(self) -> list[Retired]:
        """Close segments that are old, even when nothing is written; then, when one was closed since the last time or a
        minute has passed, do what ``retire`` does. Cheap enough for every turn of a loop."""
        with self._disk():
            self._settle()
            newest = max(self._open, default=0)
            for day, segment in list(self._open.items()):
                age = self._now() - segment.opened
                if age >= self._segment_secs or (day < newest and age >= _SETTLE_SECS):
                    self._close(day)
        return self.retire() if self._now() >= self._retire_at else []

    def retire(self) -> list[Retired]:
        """Delete closed segments of this node, the oldest first, that are too old or too many bytes, and in a spool
        what is acknowledged; say which, and what went since the last time to make room on a full disk.

        A segment that cannot be read any more is deleted all the same, with a count of what is left of it.
        """
        retired, self._made_room = self._made_room, []
        if self._keep_bytes is not None or self._keep_secs is not None or self._spool:
            with self._disk():
                retired += self._retire()
            self._retire_at = self._now() + _RETIRE_SECS
        return retired

    def close(self) -> None:
        """Close what is open. The writer may be used again: it then starts a new segment."""
        with self._disk():
            self._settle()
            for day in list(self._open):
                self._close(day)

    # --- one write

    def _append(
        self,
        day: int,
        datums: pa.BinaryArray,
        first_pos: int,
        last_pos: int,
        first_us: int,
        written: list[tuple[_Segment, int, int, int]],
    ) -> None:
        """Writes to the day's segment and notes it in ``written``; the caller syncs, and counts when all are safe."""
        data = [self._block(part) for part in _parts(datums)]
        length = sum(map(len, data)) + 16 * len(data)
        segment = self._open.get(day)
        if segment is not None and segment.count and segment.size + length > self._segment_bytes:
            self._close(day)
            segment = None
        if segment is None:
            segment = self._start(day, first_pos, first_us)
        end = segment.size + length
        written.append((segment, end, len(datums), last_pos))
        if os.fstat(segment.fd).st_nlink == 0:
            raise FileNotFoundError(errno.ENOENT, "The segment was deleted", str(segment.path))
        if end > segment.allocated:
            _allocate(segment.fd, segment.allocated, max(end - segment.allocated, _ALLOCATE_AHEAD))
            segment.allocated += max(end - segment.allocated, _ALLOCATE_AHEAD)
        _write_all(segment.fd, segment.sync.join([*data, b""]), segment.size)

    def _block(self, datums: pa.BinaryArray) -> bytes:
        _, offsets, values = datums.buffers()
        ends = np.frombuffer(offsets, np.int32, len(datums) + 1, datums.offset * 4)
        raw = memoryview(values)[int(ends[0]) : int(ends[-1])]
        packed: bytes = _packer().compress(raw, zstd.ZstdCompressor.FLUSH_FRAME)
        return _varint(len(datums)) + _varint(len(packed)) + packed

    def _start(self, day: int, first_pos: int, first_us: int) -> _Segment:
        start = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=first_us)
        folder = self._directory / f"date={start:%Y-%m-%d}" / self._folder
        _make_folders(folder, self._directory)
        stem = f"{start:%Y%m%dT%H%M%S}Z-{safe(self._epoch)}-{first_pos}"
        again = 0
        while True:
            path = folder / f"{stem}{f'-{again}' if again else ''}.avro{_PARTIAL}"
            again += 1
            if not path.with_suffix("").exists():
                with contextlib.suppress(FileExistsError):
                    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
                    break
        sync = secrets.token_bytes(16)
        segment = _Segment(path, fd, sync, self._now())
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            metadata = {
                "avro.schema": event.schema_text().encode(),
                "avro.codec": b"zstandard",
                "bindsnoop.node": self._node.encode("utf-8", "surrogateescape"),
                "bindsnoop.epoch": self._epoch.encode(),
                "bindsnoop.first_pos": str(first_pos).encode(),
                **self._metadata,
            }
            header = _header(metadata | {"bindsnoop.check": _check(metadata, sync)}, sync)
            _write_all(fd, header, 0)
            sync_folder(folder)
        except OSError:
            self._unsettled.append(segment)
            self._try_to_settle()
            raise
        segment.size = segment.allocated = len(header)
        self._open[day] = segment
        return segment

    # --- the end of a segment, planned or not

    def _close(self, day: int) -> None:
        self._unsettled.append(self._open.pop(day))
        self._settle()
        self._retire_at = -math.inf

    def _spoil(self, segments: list[_Segment]) -> None:
        """Takes segments out of use after an error; cuts them now or, if the disk does not let us, before the next
        write."""
        for day, segment in list(self._open.items()):
            if segment in segments:
                self._unsettled.append(self._open.pop(day))
        self._try_to_settle()

    def _try_to_settle(self) -> None:
        with contextlib.suppress(OSError):
            self._settle()

    def _settle(self) -> None:
        """Cuts every segment that is no longer written to what is safe in it, and gives it its name."""
        while self._unsettled:
            segment = self._unsettled[0]
            if os.fstat(segment.fd).st_nlink:
                os.ftruncate(segment.fd, segment.size if segment.count else 0)
                os.fdatasync(segment.fd)
                # The time of the last write by our own clock: retention counts from it.
                os.utime(segment.fd, (self._now(), self._now()))
                with contextlib.suppress(FileNotFoundError):  # its folder was moved away
                    self._last_pos[_finish(segment.path, keep=segment.count > 0)] = segment.last_pos
            os.close(segment.fd)
            self._unsettled.pop(0)

    def _recover(self) -> None:
        """Cuts what a previous life left open to its last whole block, and gives it its name."""
        for path in sorted(self._directory.glob(f"date=*/{_escaped(self._folder)}/*.avro{_PARTIAL}")):
            try:
                fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            try:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue  # another process writes it now
                end = _last_whole_block(path)
                if end:
                    os.ftruncate(fd, end)
                    os.fsync(fd)
                _finish(path, keep=end is None or end > 0)
            finally:
                os.close(fd)

    # --- retention

    def _retire(self) -> list[Retired]:
        states = self._closed()
        total = sum(state.st_size for _, state in states) + sum(segment.size for segment in self._open.values())
        starts = self._starts(states)
        retired = []
        for path, state in states:
            sent = self._is_sent(path)
            old = self._keep_secs is not None and self._now() - state.st_mtime > self._keep_secs
            many = self._keep_bytes is not None and total > self._keep_bytes
            if many or (old and (sent or self._spool)) or (sent and self._spool):
                retired.append(self._delete(path, starts, unsent=not sent))
                total -= state.st_size
        return retired

    def _make_room(self) -> bool:
        """Deletes the oldest closed segments, as many as give room for what an open one reserves.

        False when all together are less: it would not last, and what they hold is worth more.
        """
        states, room = self._closed(), 0
        if sum(state.st_size for _, state in states) < _ALLOCATE_AHEAD:
            return False
        starts = self._starts(states)
        for path, state in states:
            gone = self._delete(path, starts, unsent=not self._is_sent(path))
            self._made_room.append(replace(gone, full=True))
            room += state.st_size
            if room >= _ALLOCATE_AHEAD:
                break
        self._retire_at = -math.inf
        return True

    def _closed(self) -> list[tuple[Path, os.stat_result]]:
        """Closed segments of this node, the oldest first."""
        states = []
        for path in self._directory.glob(f"date=*/{_escaped(self._folder)}/*.avro"):
            with contextlib.suppress(FileNotFoundError):
                if _NAME.fullmatch(path.name):
                    states.append((path, path.stat()))
        return sorted(states, key=lambda state: _order(state[0]))

    def _starts(self, states: list[tuple[Path, os.stat_result]]) -> set[tuple[str, int]]:
        paths = [path for path, _ in states] + [segment.path for segment in self._open.values()]
        return {(named["epoch"], int(named["first"])) for named in map(_named, paths)}

    def _is_sent(self, path: Path) -> bool:
        if self._receipt is None:
            return True
        named = _named(path)
        return self._receipt.covers(SegmentFile(path, named["epoch"], int(named["first"])), self._last_pos.get(path))

    def _delete(self, path: Path, starts: set[tuple[str, int]], *, unsent: bool) -> Retired:
        epoch, first = _named(path)["epoch"], int(_named(path)["first"])
        count = _count(path)
        path.unlink()
        sync_folder(path.parent)
        for folder in (path.parent, path.parent.parent):
            with contextlib.suppress(OSError):
                folder.rmdir()
        self._last_pos.pop(path, None)
        # Certain when the next segment goes on where this one must have ended.
        goes_on = (epoch, first + count) in starts
        return Retired(path, epoch, first, first + count - 1 if goes_on else None, count, unsent)

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            where = error.filename or self._directory
            raise SinkUnavailable(
                f"The archive {self._directory} cannot be written: {where}: {error.strerror}."
            ) from error


_of_thread = threading.local()


def _packer() -> Any:
    """The compressor of this thread: each takes megabytes, and a copy of a topic has a writer for every node."""
    if not hasattr(_of_thread, "packer"):
        _of_thread.packer = zstd.ZstdCompressor(options=_PACK)
    return _of_thread.packer


def safe(name: str) -> str:
    """Any name as one part of a path: anything but letters, digits, ``.``, ``_`` and ``-`` becomes ``%XX``."""
    raw = name.encode("utf-8", "surrogateescape")
    text = "".join(
        chr(byte) if byte < 128 and (chr(byte).isalnum() or byte in b"._-") else f"%{byte:02X}" for byte in raw
    )
    return text if len(text) <= 200 else text[:160] + "%" + hashlib.sha256(raw).hexdigest()[:32]


def _escaped(folder: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", folder)


def _named(path: Path) -> re.Match[str]:
    named = _NAME.fullmatch(path.name)
    if named is None:
        raise ValueError(f"{path.name} is no name of a segment.")
    return named


def _microseconds(times: np.ndarray[Any, Any] | pa.Array) -> np.ndarray[Any, np.dtype[np.int64]]:
    if isinstance(times, pa.Array | pa.ChunkedArray):
        times = (
            times.cast(pa.int64()).to_numpy(zero_copy_only=False)
            if isinstance(times, pa.Array)
            else times.cast(pa.int64()).to_numpy()
        )
    whole = np.asarray(times)
    if whole.dtype.kind == "M":
        whole = whole.astype("datetime64[us]")
    # What no calendar can name keeps its place at the calendar's end.
    return np.clip(whole.astype(np.int64), 0, 253_402_300_799_999_999)


def _parts(datums: pa.BinaryArray) -> Iterator[pa.BinaryArray]:
    """Consecutive parts of about BLOCK_BYTES; a longer datum is a part of its own."""
    if datums.null_count:
        raise ValueError(f"{datums.null_count} datums are null; a block takes none.")
    ends = np.frombuffer(datums.buffers()[1], np.int32, len(datums) + 1, datums.offset * 4)
    start = 0
    while start < len(datums):
        stop = int(np.searchsorted(ends, int(ends[start]) + BLOCK_BYTES, side="right")) - 1
        stop = max(stop, start + 1)
        yield datums.slice(start, stop - start)
        start = stop


def _write_all(fd: int, data: bytes, at: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, at)
        view, at = view[done:], at + done


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _allocate(fd: int, start: int, length: int) -> None:
    """Reserves space behind the end of the file without moving the end, so that whoever looks sees whole blocks only,
    and a kill leaves no zeros. A disk that cannot, or has not that much, says so when it is written."""
    keep_size = 1
    with contextlib.suppress(AttributeError):
        _libc().fallocate(ctypes.c_int(fd), ctypes.c_int(keep_size), ctypes.c_int64(start), ctypes.c_int64(length))


def _make_folders(folder: Path, top: Path) -> None:
    """As ``mkdir -p``; every folder that gets a new entry is synced."""
    if folder.is_dir():
        return
    if folder != top:
        _make_folders(folder.parent, top)
    folder.mkdir(exist_ok=True, parents=folder == top)
    sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Make the entries of a folder safe."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _finish(path: Path, *, keep: bool) -> Path:
    """``*.partial`` gets its name, which is returned, or goes when nothing is in it."""
    final = path.with_suffix("")
    if keep:
        again = 0
        while final.exists():
            again += 1
            final = path.with_name(f"{path.name.removesuffix(f'.avro{_PARTIAL}')}-{again}.avro")
        path.rename(final)
    else:
        path.unlink(missing_ok=True)
    sync_folder(path.parent)
    return final


# --- reading ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Block:
    """``count`` datums of one schema, one behind the other in ``payload``, unpacked. ``offset`` is in the file.

    Small neighbours come as one; ``parts`` are their (offset, count, bytes), for ``split``. ``share``, from 0 to 1, of
    the bytes of everything that is being read is behind. ``excerpt`` says by which filters what is in this file was cut
    out of a stream; empty for a whole one.
    """

    path: Path
    offset: int
    schema_text: str = field(repr=False)
    count: int
    payload: bytes = field(repr=False)
    parts: tuple[tuple[int, int, int], ...] = field(repr=False)
    share: float = field(default=0.0, compare=False)
    excerpt: str = field(default="", compare=False)

    def split(self) -> list[Block]:
        """The blocks as they are in the file: when this one does not decode, the others of them still may."""
        blocks, at = [], 0
        for offset, count, size in self.parts:
            payload = self.payload[at : at + size]
            blocks.append(Block(self.path, offset, self.schema_text, count, payload, ((offset, count, size),)))
            at += size
        return blocks


@dataclass(frozen=True, slots=True)
class Unread:
    """Bytes ``start`` to ``end`` of a file that could not be read, and why, in one sentence. ``damage`` is False for
    the last block of a file that is still being written."""

    path: Path
    start: int
    end: int
    reason: str
    damage: bool = True


def read(paths: Sequence[Path], since_us: int | None = None, until_us: int | None = None) -> Iterator[Block | Unread]:
    """The blocks of files and of the ``*.avro`` and ``*.avro.partial`` files below folders, ordered by path.

    With a range [since_us, until_us), UTC microseconds, segments whose day lies outside it are not opened; what is
    opened is given whole. SourceUnavailable, before anything is read, when a path does not exist or may not be read.
    """
    files: dict[Path, None] = {}
    for path in map(Path, paths):
        try:
            mode = path.stat().st_mode
            if stat.S_ISDIR(mode):
                files.update(dict.fromkeys(_below(path)))
            elif stat.S_ISREG(mode):
                with path.open("rb"):
                    files[path] = None
            else:
                raise SourceUnavailable(f"{path} is neither a file nor a folder.")
        except OSError as error:
            raise SourceUnavailable(f"{path} cannot be read: {error.strerror}.") from error
    chosen = [path for path in sorted(files, key=_order) if _in_range(path, since_us, until_us)]
    return _read_files(chosen)


def _read_files(paths: Sequence[Path]) -> Iterator[Block | Unread]:
    sizes = list(map(_size, paths))
    whole, behind = max(sum(sizes), 1), 0
    for path, size in zip(paths, sizes, strict=True):
        for item in _read_file(path):
            yield replace(item, share=(behind + item.offset) / whole) if isinstance(item, Block) else item
        behind += size


def _size(path: Path) -> int:
    # Retention may delete a file meanwhile; reading it says so.
    return path.stat().st_size if path.exists() else 0


def _below(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise error

    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders.sort()
        yield from (Path(parent, name) for name in names if name.endswith((".avro", f".avro{_PARTIAL}")))


def _order(path: Path) -> tuple[str, str, str, int, int, str]:
    """By path, numbers in names by value: within a node and a day by start, epoch and first position."""
    named = _NAME.fullmatch(path.name)
    if named is None:
        return str(path.parent), path.name, "", 0, 0, ""
    return str(path.parent), named["start"], named["epoch"], int(named["first"]), int(named["again"] or 0), path.name


def _in_range(path: Path, since_us: int | None, until_us: int | None) -> bool:
    """Whether a file may hold events of the range. Only the day of a segment that this module wrote is trusted."""
    if _NAME.fullmatch(path.name) is None or not path.parent.name.startswith("node="):
        return True
    named = _DATE.fullmatch(path.parent.parent.name)
    if named is None:
        return True
    try:
        day = (date.fromisoformat(named[1]) - date(1970, 1, 1)).days * _DAY_US
    except ValueError:
        return True
    return (since_us is None or day + _DAY_US > since_us) and (until_us is None or day < until_us)


class SegmentFile(NamedTuple):
    """A segment on disk, open or closed, by its name."""

    path: Path
    epoch: str
    first_pos: int


def segments(directory: Path, node: str) -> list[SegmentFile]:
    """All segments of one node below ``directory``, ordered by path; none where there is no such folder."""
    folder = _escaped(f"node={safe(node)}")
    paths = directory.glob(f"date=*/{folder}/*.avro*")
    named = sorted(
        ((path, found) for path in paths if (found := _NAME.fullmatch(path.name))), key=lambda one: _order(one[0])
    )
    return [SegmentFile(path, found["epoch"], int(found["first"])) for path, found in named]


def read_segment(path: Path, start: int = 0) -> Iterator[Block | Unread]:
    """The blocks of one file, in order, small ones joined, as ``read``; also when its writer closes it meanwhile.

    ``start`` is the offset of a block, from where on they are wanted.
    """
    return _read_file(path, start)


def block_offsets(path: Path) -> tuple[list[int], bool]:
    """Where the blocks of a file begin, by their headers alone, and whether that is all there is of it."""
    file = _File(path)
    offsets: list[int] = []
    try:
        for at, *_ in _frames(file, _read_head(path, file).end):
            offsets.append(at)
    except (DatumDamaged, IndexError):
        return offsets, False
    finally:
        file.close()
    return offsets, True


class _File:
    """Reads a file by pieces of a MiB. Not by mmap: a writer that cuts its file would kill the reader."""

    def __init__(self, path: Path) -> None:
        self._raw = path.open("rb", buffering=0)
        self.size = os.fstat(self._raw.fileno()).st_size
        self._base = 0
        self._data = b""

    def close(self) -> None:
        self._raw.close()

    def piece(self, start: int, length: int) -> memoryview:
        """Up to ``length`` bytes from ``start``; fewer at the end of the file."""
        end = min(start + length, self.size)
        if start < self._base or end > self._base + len(self._data):
            self._base = start
            self._data = self._fill(start, min(max(length, 1 << 20), self.size - start))
        return memoryview(self._data)[start - self._base : max(end - self._base, 0)]

    def _fill(self, start: int, length: int) -> bytes:
        pieces = []
        while length > 0:
            piece = os.pread(self._raw.fileno(), length, start)
            if not piece:
                break
            pieces.append(piece)
            start, length = start + len(piece), length - len(piece)
        return b"".join(pieces)

    def find(self, what: bytes, start: int) -> int:
        """Where ``what`` is next, or -1."""
        step = 1 << 20
        while start < self.size:
            at = bytes(self.piece(start, step)).find(what)
            if at >= 0:
                return start + at
            start += step - len(what) + 1
        return -1


@dataclass(frozen=True, slots=True)
class _Head:
    """The header of a container: where it ends and what its blocks are. ``note`` says what is wrong with it."""

    end: int
    schema_text: str
    codec: str
    sync: bytes
    note: str = ""
    first_pos: int | None = None
    excerpt: str = ""


def _read_file(path: Path, start: int = 0) -> Iterator[Block | Unread]:
    partial = path.name.endswith(_PARTIAL)
    try:
        try:
            file = _File(path)
        except FileNotFoundError:
            # Closed by its writer since it was listed.
            if not partial:
                raise
            path = path.with_suffix("")
            file = _File(path)
    except OSError as error:
        yield Unread(path, 0, 0, f"{path} cannot be opened: {error.strerror}.")
        return
    at = 0
    try:
        for item in _joined(_blocks(path, file, partial=partial, start=start)):
            at = item.end if isinstance(item, Unread) else item.offset
            yield item
    except OSError as error:
        yield Unread(path, at, file.size, f"{path} cannot be read after byte {at}: {error.strerror}.")
    finally:
        file.close()


def _joined(items: Iterator[Block | Unread]) -> Iterator[Block | Unread]:
    """Small blocks as one, until they are as many as decode best: an idle node writes one event a block."""
    held: list[Block] = []
    gap: Unread | None = None
    events = size = 0
    for item in items:
        if isinstance(item, Unread):
            if gap is not None and gap.end == item.start and gap.damage == item.damage:
                gap = replace(gap, end=item.end)
                continue
            if held:
                yield _join(held)
                held = []
            if gap is not None:
                yield gap
            gap = item
            continue
        if gap is not None:
            yield gap
            gap = None
        if held and (events + item.count > JOINED_EVENTS or size + len(item.payload) > BLOCK_BYTES):
            yield _join(held)
            held = []
        if not held:
            events = size = 0
        held.append(item)
        events, size = events + item.count, size + len(item.payload)
    if held:
        yield _join(held)
    if gap is not None:
        yield gap


def _join(blocks: list[Block]) -> Block:
    if len(blocks) == 1:
        return blocks[0]
    return Block(
        blocks[0].path,
        blocks[0].offset,
        blocks[0].schema_text,
        sum(block.count for block in blocks),
        b"".join(block.payload for block in blocks),
        tuple(part for block in blocks for part in block.parts),
        excerpt=blocks[0].excerpt,
    )


def _blocks(path: Path, file: _File, *, partial: bool, start: int = 0) -> Iterator[Block | Unread]:
    """Every block of one file that is whole, in order, and what lies between them.

    The blocks are parted by the marker that the header names. One whose marker is damaged, but whose own checksum is
    right, is read; else everything up to behind the next marker is skipped.
    """
    try:
        head = _read_head(path, file)
    except (DatumDamaged, IndexError) as error:
        torn = partial and file.size < MAX_HEADER_BYTES and not isinstance(error, DatumDamaged)
        why = "ends inside its header" if isinstance(error, IndexError) else str(error)
        yield Unread(path, 0, file.size, f"{path} {why}.", damage=not torn)
        return
    if head.note:
        yield Unread(path, 0, head.end, f"{path} {head.note}.")
    unpack = _CODECS.get(head.codec)
    if unpack is None:
        allowed = ", ".join(_CODECS)
        yield Unread(path, head.end, file.size, f"{path} has the codec {head.codec!r}; allowed are {allowed}.")
        return
    at = max(head.end, start)
    while at < file.size:
        try:
            count, begin, end = _frame(file, at)
            marked = file.piece(end, 16) == head.sync
            if not marked and not (head.codec == "zstandard" and _has_checksum(file.piece(begin, 6))):
                raise DatumDamaged("the marker behind a block is missing")
            payload = unpack(file.piece(begin, end - begin)) if end > begin else b""
            if (count == 0) != (payload == b""):
                raise DatumDamaged(f"a block of {count} events has {len(payload)} bytes")
        except (IndexError, *_UNPACK_ERRORS) as error:
            found = file.find(head.sync, at + 1)
            if found < 0:
                reason = f"{path} ends inside a block, {file.size - at} bytes after byte {at}: {_why(error)}."
                yield Unread(path, at, file.size, reason, damage=not partial)
                return
            yield Unread(path, at, found + 16, f"{path} is damaged at byte {at}: {_why(error)}.")
            at = found + 16
        else:
            if count:
                parts = ((at, count, len(payload)),)
                yield Block(path, at, head.schema_text, count, payload, parts, excerpt=head.excerpt)
            at = end + 16
            if not marked:
                yield Unread(
                    path, end, at, f"{path} has a damaged marker at byte {end}; the blocks beside it are whole."
                )


def _has_checksum(start: memoryview) -> bool:
    """Whether a zstd frame that starts so ends with a checksum of its content."""
    return bytes(start[:4]) == b"\x28\xb5\x2f\xfd" and bool(start[4] & 4)


def _why(error: BaseException) -> str:
    if isinstance(error, IndexError):
        return "the block is longer than the file"
    return str(error).rstrip(".") or type(error).__name__


def _frame(file: _File, at: int) -> tuple[int, int, int]:
    """``(count, start, end)`` of the packed bytes of the block at ``at``. IndexError when the file ends inside it."""
    small = file.piece(at, 20)
    count, used = _read_varint(small, 0)
    length, used = _read_varint(small, used)
    if count < 0 or not 0 <= length <= MAX_BLOCK_BYTES:
        raise DatumDamaged(f"a block of {count} events in {length} bytes")
    start = at + used
    end = start + length
    if end + 16 > file.size:
        raise IndexError
    return count, start, end


def _frames(file: _File, at: int) -> Iterator[tuple[int, int, int, int]]:
    """``(offset, count, start, end)`` of each block from ``at`` on, by their headers alone. Errors as ``_frame``."""
    while at < file.size:
        count, start, end = _frame(file, at)
        yield at, count, start, end
        at = end + 16


def _read_head(path: Path, file: _File) -> _Head:
    if file.size == 0:
        raise IndexError if path.name.endswith(_PARTIAL) else DatumDamaged("is empty")
    data = file.piece(0, MAX_HEADER_BYTES)
    if data[:4] != _MAGIC:
        raise DatumDamaged("is no Avro container: it does not start with Obj and 01")
    metadata: dict[str, bytes] = {}
    at = 4
    while True:
        count, at = _read_varint(data, at)
        if count == 0:
            break
        if count < 0:
            count, (_, at) = -count, _read_varint(data, at)
        for _ in range(count):
            key, at = _read_bytes(data, at)
            value, at = _read_bytes(data, at)
            metadata[key.decode("utf-8", "replace")] = value
    sync = bytes(data[at : at + 16])
    if len(sync) < 16:
        raise IndexError
    text = metadata.get("avro.schema", b"").decode("utf-8", "replace")
    codec = metadata.get("avro.codec", b"null").decode("utf-8", "replace")
    if any(key.startswith("bindsnoop.") for key in metadata) and metadata.get("bindsnoop.check") != _check(
        metadata, sync
    ):
        return _mend(file, at + 16, text, sync)
    if "avro.schema" not in metadata:
        raise DatumDamaged("has no schema in its header")
    first = metadata.get("bindsnoop.first_pos", b"")
    return _Head(
        at + 16,
        text,
        codec,
        sync,
        first_pos=int(first) if re.fullmatch(rb"[0-9]{1,19}", first) else None,
        excerpt=metadata.get(EXCERPT, b"").decode("utf-8", "replace"),
    )


def _read_bytes(data: memoryview, at: int) -> tuple[bytes, int]:
    size, at = _read_varint(data, at)
    if size < 0:
        raise DatumDamaged("has a damaged header")
    if at + size > len(data):
        if len(data) == MAX_HEADER_BYTES:
            raise DatumDamaged(f"has a header of more than {MAX_HEADER_BYTES} bytes")
        raise IndexError
    return bytes(data[at : at + size]), at + size


def _mend(file: _File, end: int, text: str, sync: bytes) -> _Head:
    """The header of one of our own segments whose checksum is wrong, when what it must have been is certain enough:
    a few characters off our schema, and a marker that does occur behind blocks."""
    ours = event.schema_text()
    off = sum(one != other for one, other in zip(text, ours, strict=False)) + 64 * abs(len(text) - len(ours))
    closing = bytes(file.piece(max(file.size - 16, end), 16))
    for marker in (sync, closing):
        if off < 64 and len(marker) == 16 and file.find(marker, end) >= 0:
            note = "has a damaged header; its blocks are read with this release's schema"
            return _Head(end, ours, "zstandard", marker, note)
    raise DatumDamaged("has a damaged header, and its schema is not this release's")


# --- codecs -------------------------------------------------------------------------------------------------------


def _unpack_null(data: memoryview) -> bytes:
    return bytes(data)


def _unpack_deflate(data: memoryview) -> bytes:
    unpacker = zlib.decompressobj(-15)
    out = unpacker.decompress(data, MAX_BLOCK_BYTES)
    # fastavro leaves three bytes of zlib's own checksum behind.
    rest = len(unpacker.unused_data)
    return _whole(out, ended=unpacker.eof, rest=0 if rest <= 4 else rest)


def _unpack_zstandard(data: memoryview) -> bytes:
    unpacker = zstd.ZstdDecompressor(options=_UNPACK)
    out: bytes = unpacker.decompress(data, MAX_BLOCK_BYTES)
    return _whole(out, ended=unpacker.eof, rest=len(unpacker.unused_data))


def _whole(out: bytes, *, ended: bool, rest: int) -> bytes:
    if rest:
        raise DatumDamaged(f"a block has {rest} bytes behind its packed data")
    if not ended:
        raise DatumDamaged(
            f"a block unpacks to more than {MAX_BLOCK_BYTES} bytes" if len(out) >= MAX_BLOCK_BYTES else "a block is cut"
        )
    return out


_UNPACK_ERRORS = (DatumDamaged, ValueError, OSError, EOFError, zstd.ZstdError, zlib.error)
_CODECS: dict[str, Callable[[memoryview], bytes]] = {
    "null": _unpack_null,
    "deflate": _unpack_deflate,
    "zstandard": _unpack_zstandard,
}


# --- what is there, at a glance -----------------------------------------------------------------------------------


class Glance(NamedTuple):
    """What a segment says without being unpacked: first position, how many ``datums`` it has, and the last block."""

    first_pos: int
    datums: int
    last: Block


def glance(path: Path) -> Glance | None:
    """A look at the frames of a segment's blocks; None when it is not whole, or not one that ``Writer`` wrote.

    Only the last block is unpacked: damage inside of another is not noticed.
    """
    try:
        file = _File(path)
    except OSError:
        return None
    try:
        head = _read_head(path, file)
        if head.first_pos is None or head.note or head.codec not in _CODECS:
            return None
        total, last = 0, None
        for last in _frames(file, head.end):
            _, count, _, end = last
            if file.piece(end, 16) != head.sync:
                return None
            total += count
        if last is None:
            return None
        at, count, start, end = last
        payload = _CODECS[head.codec](file.piece(start, end - start))
        block = Block(path, at, head.schema_text, count, payload, ((at, count, len(payload)),))
        return Glance(head.first_pos, total, block)
    except (IndexError, *_UNPACK_ERRORS):
        return None
    finally:
        file.close()


# --- what the writer asks of a file -------------------------------------------------------------------------------


def _last_whole_block(path: Path) -> int | None:
    """Where the last whole block of a file ends: 0 when it has none, None when its header cannot tell."""
    file = _File(path)
    try:
        end = 0
        for item in _blocks(path, file, partial=True):
            if isinstance(item, Block):
                _, _, packed_end = _frame(file, item.offset)
                end = packed_end + 16
            elif item.start == 0 and item.damage and bytes(file.piece(0, MAX_HEADER_BYTES)).strip(b"\0"):
                return None
        return end
    finally:
        file.close()


def _count(path: Path) -> int:
    """Datums in the blocks of a file, by their headers."""
    total = 0
    try:
        file = _File(path)
    except OSError:
        return 0
    try:
        for _, count, _, _ in _frames(file, _read_head(path, file).end):
            total += count
    except (DatumDamaged, IndexError, OSError):
        pass
    finally:
        file.close()
    return total
