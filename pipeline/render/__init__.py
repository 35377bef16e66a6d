"""From a batch of events to the bytes that a person or a program reads: ``columns`` and ``json``.

In: a batch of ``event.schema()``. Out: bytes that end in a newline. Everything here works on whole columns; a stored
text is looked at one by one only where a column holds something that is not plain ASCII, and there each unique value
once. What a topic or a file contains is not trusted: a character that a terminal, a line or a parser could trip over
is written as the ``\\xNN`` of its bytes. Nothing is doubled, for the agent did that once where bytes became text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.event import one_line

# A string array of Arrow addresses 2 GiB, and an escape makes a byte into five: work on at most this much at a time.
_PORTION_BYTES = 64 << 20
# pyarrow guesses the type of a bare constant at every call, which costs more than a comparison of a small batch.
_NORMAL, _EMPTY, _NAUGHT, _ZERO = pa.scalar("normal"), pa.scalar(""), pa.scalar("0"), pa.scalar(0, pa.int32())


def portions(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """The batch in pieces of at most 64 MiB, or of one row; almost always the batch itself."""
    if batch.num_rows < 2 or batch.nbytes <= _PORTION_BYTES:
        yield batch
        return
    half = batch.num_rows // 2
    yield from portions(batch.slice(0, half))
    yield from portions(batch.slice(half))


def is_bind(batch: pa.RecordBatch) -> pa.BooleanArray:
    """True for an attempt to bind, False for the stream's own records."""
    return pc.equal(batch.column("type"), _NORMAL)


def _bytes_of(array: pa.StringArray) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """The bytes that the array's texts share, without copying."""
    _, offsets, values = array.buffers()
    if values is None or len(array) == 0:
        return np.empty(0, np.uint8)
    ends = np.frombuffer(offsets, np.int32)[array.offset : array.offset + len(array) + 1]
    return np.frombuffer(values, np.uint8)[ends[0] : ends[-1]]


def is_plain(array: pa.StringArray, but: bytes = b"") -> bool:
    """Whether all bytes are printable ASCII, and none of them is in ``but``."""
    held = _bytes_of(array)
    if held.size == 0:
        return True
    # Below 0x20 wraps around to above: one comparison for both ends.
    if int((held - np.uint8(0x20)).max()) > 0x7E - 0x20:
        return False
    return not any(bool((held == byte).any()) for byte in but)


def each_unique(array: pa.StringArray, convert: Callable[[str], str]) -> pa.StringArray:
    """``convert`` applied to every unique text; null stays null. What is no UTF-8 arrives as surrogate escapes."""
    known = pc.dictionary_encode(array.cast(pa.binary()))
    raw: list[bytes] = known.dictionary.to_pylist()
    texts = pa.array([convert(value.decode("utf-8", "surrogateescape")) for value in raw], pa.string())
    return texts.take(known.indices)


def printable(array: pa.StringArray) -> pa.StringArray:
    """The texts with everything unprintable replaced."""
    return array if is_plain(array) else each_unique(array, one_line)


def join(*parts: pa.StringArray | str) -> pa.StringArray:
    """Texts put together row by row; null where a part is null."""
    typed = (pa.scalar(part, pa.string()) if isinstance(part, str) else part for part in parts)
    return pc.binary_join_element_wise(*typed, _EMPTY)


def interface(batch: pa.RecordBatch) -> pa.StringArray:
    """What IF shows: ``0`` without a device, else its name, else its index; null where there is no socket."""
    index = batch.column("ifindex")
    named = pc.coalesce(batch.column("ifname"), index.cast(pa.string()))
    return pc.if_else(pc.equal(index, _ZERO), _NAUGHT, named)


def iso_time(array: pa.TimestampArray) -> pa.StringArray:
    """UTC as ``2026-01-02T03:04:05.123456Z``; a time that no calendar holds says so in its place."""
    text = pc.cast(array, pa.string())
    iso = join(pc.replace_substring(text, " ", "T", max_replacements=1), "Z")
    return iso if is_plain(text, but=b"<") else pc.if_else(pc.starts_with(text, "<"), text, iso)


def pairs(array: pa.MapArray, key: Callable[[pa.Array], pa.Array], value: Callable[[pa.Array], pa.Array]) -> pa.Array:
    """Every map as ``k``, the pairs joined by commas: ``key`` and ``value`` give the text of either side."""
    members = join(key(array.keys), value(array.items))
    return pc.binary_join(pa.ListArray.from_arrays(array.offsets, members), ",")


def to_bytes(lines: pa.StringArray) -> bytes:
    """All texts of the array, one after the other."""
    return _bytes_of(lines).tobytes()
