"""Avro: batches of events to datums and blocks, and back, whole batches at a time.

In: a ``pyarrow.RecordBatch`` of ``event.schema()``, or bytes that somebody else wrote. Out: bytes, or a batch and what
could not be read. Why so: a loop over events costs 25 µs each; pyruhvro does whole columns in half a microsecond, but
it checks neither where a datum ends nor its UTF-8 nor the range of an int, and it resolves no schemas. This module adds
those checks, and fastavro's answers are the reference of its tests.

How a batch is decoded: the values are joined, a secret number behind each, and read as one Avro array of records that
have this number as an additional last field. If every record ends in the number, every datum was used to its last byte
and none leaned over into the next; otherwise the bad ones are searched by halves. A frame in front of each value is
read the same way, as additional first fields, so that nothing is cut in Python.

How a writer's schema is used: never as it came. ``admit`` walks it within limits and makes a plain one of its own from
it (no names, no defaults, no references, no logical types), the only one that pyruhvro sees; the columns are then
renamed, filled and narrowed to ours.
"""

from __future__ import annotations

import bisect
import enum
import functools
import hashlib
import io
import itertools
import json
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import fastavro
import fastavro.schema
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyruhvro

from pipeline import carried, event
from pipeline.errors import DatumDamaged, SchemaRefused, SchemaUnknown

MAX_SCHEMA_BYTES = 256 * 1024
MAX_FIELDS = 1_000
MAX_DEPTH = 16
MAX_NAME = 256
MAX_GROWTH = 64
"""Bytes of columns that one byte of a datum may become under a writer's schema."""
MAX_JOINED_BYTES = 1 << 30
"""Bytes that one call of ``decode`` takes: Arrow counts text by 31 bits."""

_WALK_BELOW = 64
"""A piece of this many values is searched for bad ones by a walk over the bytes instead of by halves."""


# --- errors of the libraries --------------------------------------------------------------------------------------

_FOREIGN = (ValueError, EOFError, IndexError, KeyError, TypeError, ArithmeticError, RecursionError, AttributeError,
            StopIteration, fastavro.schema.SchemaParseException, fastavro.schema.UnknownType,
            fastavro.read.SchemaResolutionError, pa.ArrowException)  # fmt: skip
"""What fastavro, pyruhvro and pyarrow raise about bytes that are not what the schema says."""


@contextmanager
def _mapped(what: str, to: type[DatumDamaged] | type[SchemaRefused] = DatumDamaged) -> Iterator[None]:
    """Whatever a library says of bad input becomes one error of ours, a panic of Rust code included."""
    try:
        yield
    except _FOREIGN as error:
        raise to(f"{what}: {_first_line(error)}") from error
    except BaseException as error:
        # pyo3 makes a panic a BaseException and exports no class for it.
        if type(error).__name__ != "PanicException":
            raise
        raise to(f"{what}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    text = next(iter(str(error).splitlines()), "") or type(error).__name__
    return "".join(char if char.isprintable() else "?" for char in text[:200])


# --- variable-length integers -------------------------------------------------------------------------------------


def _varint(number: int) -> bytes:
    """A 64-bit integer as Avro writes ``long``: zigzag, seven bits a byte, lowest first."""
    rest = (number << 1) ^ (number >> 63)
    out = bytearray()
    while rest > 0x7F:
        out.append(rest & 0x7F | 0x80)
        rest >>= 7
    out.append(rest)
    return bytes(out)


# Nine bytes that no writer can know: a datum cannot end, nor swallow its neighbour and end, in the right place by
# chance or by design.
_SENTINEL = (1 << 61) + secrets.randbits(61)
_SENTINEL_BYTES = _varint(_SENTINEL)


# --- schemas ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Node:
    """One type of a parsed schema, references resolved. ``least`` is the fewest bytes of a value, ``width`` the most
    bytes of columns that such a value takes, its text not counted."""

    kind: str
    path: str
    name: str = ""
    children: tuple[_Node, ...] = ()
    fields: tuple[_Field, ...] = ()
    symbols: tuple[str, ...] = ()
    default: str | None = None
    size: int = 0
    logical: str = ""
    least: int = 0
    width: int = 0

    @property
    def inner(self) -> _Node:
        """The one type of an optional value, or the type itself."""
        others = [child for child in self.children if child.kind != "null"] if self.kind == "union" else [self]
        return others[0] if len(others) == 1 else self

    @property
    def optional(self) -> bool:
        return self.kind == "union" and any(child.kind == "null" for child in self.children)


@dataclass(frozen=True, slots=True)
class _Field:
    name: str
    node: _Node
    aliases: tuple[str, ...] = ()
    has_default: bool = False
    default: Any = None


_PRIMITIVES = {
    "null": (0, 0), "boolean": (1, 1), "int": (1, 8), "long": (1, 8), "float": (4, 4), "double": (8, 8),
    "string": (1, 4), "bytes": (1, 4),
}  # fmt: skip
"""The fewest bytes of a value, and the bytes of columns it takes."""


class _Gate:
    """Walks a writer's schema within limits; the first thing that is not allowed raises SchemaRefused."""

    def __init__(self) -> None:
        self.named: dict[str, Any] = {}
        self.open: set[str] = set()
        self.seen = 0

    def node(self, raw: Any, path: str, space: str, depth: int) -> _Node:
        self.seen += 1
        if self.seen > 4 * MAX_FIELDS:
            raise SchemaRefused(f"The schema has more than {4 * MAX_FIELDS} types; allowed are at most that many.")
        if depth > MAX_DEPTH:
            raise SchemaRefused(f"The schema is nested more than {MAX_DEPTH} levels deep at {path or 'its top'}.")
        if isinstance(raw, list):
            return self._union(raw, path, space, depth)
        if isinstance(raw, str):
            if raw in _PRIMITIVES:
                least, width = _PRIMITIVES[raw]
                return _Node(raw, path, least=least, width=width)
            return self._reference(raw, path, space, depth)
        if not isinstance(raw, dict) or "type" not in raw:
            raise SchemaRefused(f"The schema has no type at {path or 'its top'}.")
        kind = raw["type"]
        if kind in ("record", "enum", "fixed"):
            return self._named(raw, path, space, depth)
        if kind == "array":
            return self._many(raw.get("items"), "array", path, space, depth)
        if kind == "map":
            return self._many(raw.get("values"), "map", path, space, depth)
        plain = self.node(kind, path, space, depth + 1)
        logical = raw.get("logicalType")
        if plain.kind in _PRIMITIVES and isinstance(logical, str):
            return _Node(plain.kind, path, least=plain.least, width=plain.width, logical=_short(logical))
        return plain

    def _union(self, raw: list[Any], path: str, space: str, depth: int) -> _Node:
        children = tuple(self.node(branch, path, space, depth + 1) for branch in raw)
        kinds = [child.name or child.kind for child in children]
        if not children or len(set(kinds)) < len(kinds) or any(child.kind == "union" for child in children):
            raise SchemaRefused(f"The schema has a union at {path} that is empty, nested or names a type twice.")
        least = 1 + min(child.least for child in children)
        return _Node("union", path, children=children, least=least, width=1 + sum(child.width for child in children))

    def _many(self, raw: Any, kind: str, path: str, space: str, depth: int) -> _Node:
        item = self.node(raw, path, space, depth + 1)
        least, width = (item.least + 1, item.width + 4) if kind == "map" else (item.least, item.width)
        if item.least == 0:
            raise SchemaRefused(
                f"The schema has a {kind} of items of no bytes at {path}; a few bytes could ask for billions."
            )
        self._growth(least, width, path)
        return _Node(kind, path, children=(item,), least=1, width=4)

    def _growth(self, least: int, width: int, path: str) -> None:
        if width > MAX_GROWTH * least:
            raise SchemaRefused(
                f"The schema lets {least} bytes grow to {width} at {path or 'its top'}; allowed is {MAX_GROWTH} times."
            )

    def _reference(self, raw: str, path: str, space: str, depth: int) -> _Node:
        full = raw if "." in raw or not space else f"{space}.{raw}"
        if full in self.open:
            raise SchemaRefused(f"The schema is recursive at {path}: {_short(full)} contains itself.")
        if full not in self.named:
            raise SchemaRefused(f"The schema names the unknown type {_short(full)} at {path or 'its top'}.")
        definition, definition_space = self.named[full]
        return self._body(definition, full, path, definition_space, depth)

    def _named(self, raw: dict[str, Any], path: str, space: str, depth: int) -> _Node:
        name = raw.get("name")
        if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME:
            raise SchemaRefused(
                f"The schema has a {raw['type']} at {path or 'its top'} without a name of 1 to {MAX_NAME} characters."
            )
        own = raw.get("namespace", space)
        if not isinstance(own, str):
            raise SchemaRefused(f"The schema has a namespace that is no text at {path or 'its top'}.")
        if "." in name:
            own, _, name = name.rpartition(".")
        full = f"{own}.{name}" if own else name
        # The same definition comes by again when a name leads to what it lies in.
        if self.named.setdefault(full, (raw, own))[0] is not raw:
            raise SchemaRefused(f"The schema defines {_short(full)} twice.")
        return self._body(raw, full, path, own, depth)

    def _body(self, raw: dict[str, Any], full: str, path: str, space: str, depth: int) -> _Node:
        if raw["type"] == "fixed":
            size = raw.get("size")
            if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= 1 << 20:
                raise SchemaRefused(f"The schema has a fixed of no size from 0 to 1048576 at {path}.")
            return _Node("fixed", path, full, size=size, least=size, width=size)
        if raw["type"] == "enum":
            symbols = raw.get("symbols")
            if (
                not isinstance(symbols, list)
                or not 0 < len(symbols) <= MAX_FIELDS
                or not all(isinstance(symbol, str) and len(symbol) <= MAX_NAME for symbol in symbols)
            ):
                raise SchemaRefused(f"The schema has an enum at {path} without 1 to {MAX_FIELDS} symbols of text.")
            default = raw.get("default")
            default = default if isinstance(default, str) else None
            return _Node("enum", path, full, symbols=tuple(symbols), default=default, least=1, width=8)
        return self._record(raw, full, path, space, depth)

    def _record(self, raw: dict[str, Any], full: str, path: str, space: str, depth: int) -> _Node:
        listed = raw.get("fields")
        if not isinstance(listed, list) or not 0 < len(listed) <= MAX_FIELDS:
            raise SchemaRefused(f"The schema has a record at {path or 'its top'} without 1 to {MAX_FIELDS} fields.")
        self.open.add(full)
        found: dict[str, _Field] = {}
        for item in listed:
            name = item.get("name") if isinstance(item, dict) else None
            if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME or "type" not in item:
                raise SchemaRefused(
                    f"The schema has a field at {path or 'its top'} without a type or a name of at most {MAX_NAME}."
                )
            if name in found:
                raise SchemaRefused(f"The schema has the field {_short(name)} twice at {path or 'its top'}.")
            node = self.node(item["type"], f"{path}.{_short(name)}" if path else _short(name), space, depth + 1)
            aliases = tuple(alias for alias in item.get("aliases") or () if isinstance(alias, str))
            found[name] = _Field(name, node, aliases, "default" in item, item.get("default"))
        self.open.discard(full)
        nodes = [entry.node for entry in found.values()]
        least, width = sum(node.least for node in nodes), sum(node.width for node in nodes)
        return _Node("record", path, full, fields=tuple(found.values()), least=least, width=width)


def _short(text: str) -> str:
    """A name that somebody else chose, fit for a sentence."""
    cut = text if len(text) <= 60 else text[:57] + "..."
    return "".join(char if char.isprintable() else "?" for char in cut)


_Adapt = Callable[[pa.Array], pa.Array]
_Source: TypeAlias = tuple[int, _Adapt] | pa.Scalar
"""Where one of our columns comes from: a writer's column and what to do with it, or a constant."""


@dataclass(frozen=True, slots=True, eq=False)
class Schema:
    """A writer's schema that passed the gate, and the way from its columns to ours. Made by ``admit``."""

    text: str
    parsed: Any = field(repr=False)
    """The JSON of ``text``, as it came."""
    fingerprint: bytes
    """CRC-64-AVRO of the canonical form, the 8 bytes of a single-object frame."""
    sha256: str
    """SHA-256 of the canonical form, hexadecimal: what the chain of checkpoints begins with."""
    _node: _Node = field(repr=False)
    _columns: tuple[_Source, ...] | None = field(repr=False)
    """For each of our fields the writer's column and what to do with it, or a constant. None: fastavro reads it."""
    _array: tuple[str, ...] = field(repr=False)
    """The plain schema of an array of records with a sentinel, by framing."""
    _block: str = field(repr=False)
    """The plain schema of an array of records and one sentinel behind it."""


@functools.lru_cache(maxsize=256)
def admit(text: str) -> Schema:
    """A writer's schema, checked, and resolved onto ``event.schema()`` as Avro's rules say.

    SchemaRefused when it is no Avro schema, is unsafe to decode with (recursive, deep, wide, or a few bytes could grow
    without bound), or does not describe our events. Fields that we lack are dropped, fields that it lacks take their
    default.
    """
    if len(text.encode("utf-8", "surrogatepass")) > MAX_SCHEMA_BYTES:
        raise SchemaRefused(f"The schema is longer than {MAX_SCHEMA_BYTES} bytes.")
    with _mapped("The schema is no JSON", SchemaRefused):
        raw = json.loads(text)
    gate = _Gate()
    node = gate.node(raw, "", "", 0)
    if node.kind != "record":
        raise SchemaRefused(f"The schema describes {_short(node.kind)}; an event is a record.")
    if sum(1 for _ in _leaves(node)) > MAX_FIELDS:
        raise SchemaRefused(f"The schema has more than {MAX_FIELDS} fields.")
    gate._growth(node.least, node.width, "")
    with _mapped("The schema is no Avro schema", SchemaRefused):
        canonical = fastavro.schema.to_parsing_canonical_form(fastavro.parse_schema(_without(raw, "default")))
        fingerprint = bytes.fromhex(fastavro.schema.fingerprint(canonical, "CRC-64-AVRO"))
    ours = node if text == event.schema_text() else _ours_node()
    columns = _resolve(node, ours, event.schema())
    plain = _Plain()
    record = [{"name": f"f{at}", "type": plain.type(entry.node)} for at, entry in enumerate(node.fields)]
    if not plain.possible:
        columns = None
    last = [{"name": "s", "type": "long"}]
    arrays = [json.dumps(_array_of(frame + record + last)) for frame in _FRAME_FIELDS]
    block = json.dumps(_array_of(record, last))
    sha256 = hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()
    return Schema(text, raw, fingerprint, sha256, node, columns, tuple(arrays), block)


@functools.cache
def ours() -> Schema:
    """Our own schema, ``schemas/bind_event.avsc``."""
    return admit(event.schema_text())


@functools.cache
def released() -> dict[bytes, Schema]:
    """Every schema that was ever released, by fingerprint: each file of ``schemas/``."""
    folder = carried("schemas/bind_event.avsc").parent
    texts = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.avsc"))]
    return {schema.fingerprint: schema for schema in map(admit, [*texts, event.schema_text()])}


def by_fingerprint(fingerprint: bytes) -> Schema:
    """The released schema with this CRC-64-AVRO fingerprint (8 bytes). SchemaUnknown when there is none."""
    try:
        return released()[fingerprint]
    except KeyError:
        raise SchemaUnknown(
            f"No released schema has the fingerprint {fingerprint.hex()}; known are "
            f"{', '.join(sorted(known.hex() for known in released()))}."
        ) from None


@functools.cache
def _ours_node() -> _Node:
    return _Gate().node(event.schema_json(), "", "", 0)


def _leaves(node: _Node) -> Iterator[_Node]:
    below = (*node.children, *(entry.node for entry in node.fields))
    if not below:
        yield node
    for child in below:
        yield from _leaves(child)


class _Plain:
    """Makes the schema that pyruhvro sees: the same bytes, numbered names, every whole number a long."""

    def __init__(self) -> None:
        self.possible = True
        self._records = 0

    def type(self, node: _Node) -> Any:
        if node.kind in ("int", "long", "enum"):
            return "long"
        if node.kind in ("bytes", "fixed"):
            self.possible = False
            return "string"
        if node.kind == "map":
            return {"type": "map", "values": self.type(node.children[0])}
        if node.kind == "array":
            return {"type": "array", "items": self.type(node.children[0])}
        if node.kind == "union":
            if node.inner.kind == "union" or not node.optional:
                self.possible = False
            return [self.type(child) for child in node.children]
        if node.kind == "record":
            self._records += 1
            name = f"r{self._records}"
            listed = [{"name": f"f{at}", "type": self.type(entry.node)} for at, entry in enumerate(node.fields)]
            return {"type": "record", "name": name, "fields": listed}
        return node.kind


def _array_of(record: list[dict[str, Any]], behind: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    items = {"type": "record", "name": "item", "fields": record}
    return {
        "type": "record",
        "name": "top",
        "fields": [{"name": "a", "type": {"type": "array", "items": items}}, *behind],
    }


# --- resolution: from a writer's columns to ours ------------------------------------------------------------------


def _resolve(writer: _Node, reader: _Node, schema: pa.Schema) -> tuple[_Source, ...] | None:
    """For each field of ``schema`` where it comes from. None when only fastavro can; SchemaRefused when nobody."""
    columns: list[_Source] = []
    slow = False
    at = {entry.name: place for place, entry in enumerate(writer.fields)}
    for entry, target in zip(reader.fields, schema, strict=True):
        place = next((at[name] for name in (entry.name, *entry.aliases) if name in at), None)
        if place is not None:
            adapt = _adapter(writer.fields[place].node, entry.node, target.type)
            slow |= adapt is None
            columns.append((place, adapt or _same))
        elif entry.has_default:
            # A pyarrow map takes pairs; the only default of a map here is the empty one.
            value = list(entry.default.items()) if isinstance(entry.default, dict) else entry.default
            columns.append(pa.scalar(value, target.type))
        else:
            raise SchemaRefused(f"The schema lacks the field {entry.name}, which has no default.")
    return None if slow else tuple(columns)


def _same(column: pa.Array) -> pa.Array:
    return column


def _adapter(writer: _Node, reader: _Node, target: pa.DataType) -> _Adapt | None:
    """What turns the writer's column into one of ``target``; None when only fastavro can; SchemaRefused when nobody."""
    if writer.kind == "union" and writer.inner.kind == "union":
        return None
    mine, theirs = reader.inner, writer.inner
    adapt = _value_adapter(theirs, mine, target)
    if adapt is None or reader.optional or not writer.optional:
        return adapt

    def never_null(column: pa.Array) -> pa.Array:
        if column.null_count:
            raise DatumDamaged(f"{writer.path} is null in {column.null_count} records; allowed is a {mine.kind}.")
        return adapt(column)

    return never_null


def _value_adapter(theirs: _Node, mine: _Node, target: pa.DataType) -> _Adapt | None:
    kinds = (theirs.kind, mine.kind)
    if kinds in (("int", "int"), ("int", "long")):
        return _in_range(theirs, lambda column: column.cast(pa.int32()).cast(target))
    if kinds == ("long", "long"):
        if theirs.logical not in ("", mine.logical):
            raise SchemaRefused(
                f"The schema has {theirs.path} as {theirs.logical}; allowed is {mine.logical or 'a plain long'}."
            )
        return _same if target == pa.int64() else lambda column: column.cast(target)
    if kinds in (("string", "string"), ("boolean", "boolean")):
        return _same
    if kinds == ("bytes", "string"):
        return None
    if kinds == ("enum", "enum") and _last(theirs.name) == _last(mine.name):
        known = [symbol if symbol in mine.symbols else mine.default for symbol in theirs.symbols]
        symbols = pa.array(known, pa.string())
        return _in_range(theirs, symbols.take)
    if kinds == ("map", "map"):
        return _map_adapter(theirs, mine, target)
    if kinds == ("record", "record") and _last(theirs.name) == _last(mine.name):
        return _record_adapter(theirs, mine, target)
    raise SchemaRefused(
        f"The schema has {theirs.path or 'its top'} as {theirs.kind} {_short(_last(theirs.name))}".rstrip()
        + f"; ours is {mine.kind} {_last(mine.name)}".rstrip()
        + ", and Avro's rules know no way from the one to the other."
    )


def _in_range(theirs: _Node, adapt: _Adapt) -> _Adapt:
    def checked(column: pa.Array) -> pa.Array:
        with _mapped(f"{theirs.path} is outside of what its {theirs.kind} allows"):
            return adapt(column)

    return checked


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _map_adapter(theirs: _Node, mine: _Node, target: pa.DataType) -> _Adapt | None:
    values = _adapter(theirs.children[0], mine.children[0], target.item_type)
    if values is None or values is _same:
        return None if values is None else _same
    convert = values

    def adapt(column: pa.Array) -> pa.Array:
        return pa.MapArray.from_arrays(column.offsets, column.keys, convert(column.items), type=target)

    return adapt


def _record_adapter(theirs: _Node, mine: _Node, target: pa.DataType) -> _Adapt | None:
    columns = _resolve(theirs, mine, pa.schema(list(target)))
    if columns is None:
        return None

    def adapt(column: pa.Array) -> pa.Array:
        children = _arrange(columns, column.field, len(column))
        return pa.Array.from_buffers(target, len(column), column.buffers()[:1], column.null_count, 0, children)

    return adapt


def _arrange(sources: Sequence[_Source], column: Callable[[int], pa.Array], rows: int) -> list[pa.Array]:
    return [
        pa.repeat(source, rows) if isinstance(source, pa.Scalar) else source[1](column(source[0])) for source in sources
    ]


# --- encoding -----------------------------------------------------------------------------------------------------


def encode(batch: pa.RecordBatch) -> pa.BinaryArray:
    """The datums of a batch of exactly ``event.schema()``, one a row, byte for byte as fastavro writes them.

    The values lie one after the other in one buffer, which is a block of a container as it is. ValueError when the
    batch is not of ``event.schema()``; DatumDamaged when a field that is never null is.
    """
    if not batch.schema.equals(event.schema()):
        raise ValueError("encode takes a batch of exactly event.schema().")
    if batch.num_rows == 0:
        return pa.array([], pa.binary())
    for place, wanted in enumerate(event.schema()):
        if not wanted.nullable and batch.column(place).null_count:
            raise DatumDamaged(f"{wanted.name} is null in {batch.column(place).null_count} rows; it is never empty.")
    with _mapped("The batch cannot be encoded"):
        return pyruhvro.serialize_record_batch(batch, event.schema_text(), 1)[0]


def encode_block(events: pa.RecordBatch | pa.BinaryArray) -> tuple[int, memoryview]:
    """``(count, payload)`` of a container's block: the datums of a batch, or datums that are encoded already.

    The payload is a view of the array's own buffer. ValueError when a datum is null.
    """
    datums = events if isinstance(events, pa.BinaryArray) else encode(events)
    if datums.null_count:
        raise ValueError(f"{datums.null_count} datums are null; a block takes none.")
    if len(datums) == 0:
        return 0, memoryview(b"")
    _, offsets, values = datums.buffers()
    ends = np.frombuffer(offsets, np.int32, len(datums) + 1, datums.offset * 4)
    return len(datums), memoryview(values)[int(ends[0]) : int(ends[-1])]


# --- decoding -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, order=True)
class Bad:
    """A value that does not decode: its place in what was handed over, and why, in one sentence."""

    index: int
    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class Decoded:
    """What a call decoded: ``batch`` of ``event.schema()``, row i from value ``index[i]`` (None: row i from value i),
    and the ``bad`` ones, by place. Rows and bad ones together are all values, each once."""

    batch: pa.RecordBatch
    index: np.ndarray[Any, np.dtype[np.int64]] | None
    bad: list[Bad]


class Framing(enum.IntEnum):
    """What stands before the datum: nothing; ``00`` and a schema id; ``C3 01`` and a fingerprint."""

    BARE = 0
    CONFLUENT = 1
    SINGLE_OBJECT = 2


_FRAME_BYTES = (0, 5, 10)
# The frames as Avro fields of the same lengths: 00 is false, 4 and 8 bytes are a float and a double, C3 01 is a varint.
_FRAME_FIELDS: tuple[list[dict[str, Any]], ...] = (
    [],
    [{"name": "m", "type": "boolean"}, {"name": "k", "type": "float"}],
    [{"name": "m", "type": "long"}, {"name": "k", "type": "double"}],
)
_FRAME_COLUMNS = (0, 2, 2)


def decode(values: list[bytes], writer: Schema | None = None, framing: Framing = Framing.BARE) -> Decoded:
    """Decodes values of one writer's schema (ours when None), each a datum behind the frame that ``framing`` names.

    The frames themselves are those that ``unframe`` found; here they are only stepped over. Fastest with 2,000 to
    10,000 values a call. ValueError when the values are longer than ``MAX_JOINED_BYTES`` together.
    """
    schema = writer or ours()
    if not values:
        return Decoded(_empty(), None, [])
    if sum(map(len, values)) + len(values) * len(_SENTINEL_BYTES) > MAX_JOINED_BYTES:
        raise ValueError(f"decode takes at most {MAX_JOINED_BYTES} bytes a call.")
    if schema._columns is not None:
        try:
            return Decoded(_decode_whole(values, schema, framing), None, [])
        except DatumDamaged:
            if len(values) > 1:
                return _decode_around(values, schema, framing)
    return _decode_each(values, schema, framing)


def _empty() -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist([], event.schema())


def _decode_whole(values: Sequence[bytes], schema: Schema, framing: Framing) -> pa.RecordBatch:
    """All values at once; DatumDamaged when any of them is bad."""
    count = len(values)
    # One copy: a second one of these megabytes costs more than all else around the decoding.
    joined = _SENTINEL_BYTES.join([_varint(count) + values[0], *values[1:], b"\0"])
    with _mapped("The datum does not fit its schema"):
        records = pyruhvro.deserialize_array([joined], schema._array[framing]).column(0).values
        if len(records) != count:
            raise DatumDamaged(f"{count} datums decode to {len(records)} records.")
        if not pc.all(pc.equal(records.field(records.type.num_fields - 1), _SENTINEL)).as_py():
            raise DatumDamaged("A datum is longer or shorter than its schema says.")
        return _to_ours(records, schema, _FRAME_COLUMNS[framing])


def _to_ours(records: pa.StructArray, schema: Schema, skip: int = 0) -> pa.RecordBatch:
    assert schema._columns is not None
    records.validate(full=True)  # pyruhvro takes any bytes as text
    columns = _arrange(schema._columns, lambda place: records.field(skip + place), len(records))
    return pa.RecordBatch.from_arrays(columns, schema=event.schema())


def _decode_around(values: list[bytes], schema: Schema, framing: Framing) -> Decoded:
    """As ``decode``, when at least one value is bad: finds the bad ones by halves, then decodes the others at once."""
    bad: list[Bad] = []

    def search(start: int, end: int) -> None:
        if end - start > _WALK_BELOW:
            middle = (start + end) // 2
            for low, high in ((start, middle), (middle, end)):
                try:
                    _decode_whole(values[low:high], schema, framing)
                except DatumDamaged:
                    search(low, high)
            return
        found = _decode_each(values[start:end], schema, framing)
        bad.extend(Bad(start + one.index, one.reason) for one in found.bad)

    search(0, len(values))
    bad.sort()
    good = np.delete(np.arange(len(values)), [one.index for one in bad])
    batch = _decode_whole([values[at] for at in good], schema, framing) if len(good) else _empty()
    return Decoded(batch, good, bad)


def _decode_each(values: list[bytes], schema: Schema, framing: Framing) -> Decoded:
    """One value after the other: a walk over its bytes says what is wrong with it. What passes the walk is decoded."""
    bad: list[Bad] = []
    sound: list[int] = []
    for place, value in enumerate(values):
        try:
            _walk_whole(schema._node, value, _FRAME_BYTES[framing])
        except DatumDamaged as error:
            bad.append(Bad(place, str(error)))
        else:
            sound.append(place)
    try:
        batches = [_decode_sound([values[place] for place in sound], schema, framing)] if sound else []
    except DatumDamaged:
        # A number out of its range, or what the rules of resolution refuse: found one by one.
        batches, kept = [], []
        for place in sound:
            try:
                batches.append(_decode_sound([values[place]], schema, framing))
            except DatumDamaged as error:
                bad.append(Bad(place, str(error)))
            else:
                kept.append(place)
        sound = kept
    return Decoded(_one_batch(batches), np.array(sound, np.int64) if bad else None, sorted(bad))


def _decode_sound(values: list[bytes], schema: Schema, framing: Framing) -> pa.RecordBatch:
    if schema._columns is not None:
        return _decode_whole(values, schema, framing)
    return _one_batch([_decode_slowly(value[_FRAME_BYTES[framing] :], schema) for value in values])


def _one_batch(batches: list[pa.RecordBatch]) -> pa.RecordBatch:
    return pa.concat_batches(batches) if batches else _empty()


def _decode_slowly(datum: bytes, schema: Schema) -> pa.RecordBatch:
    """One datum by fastavro, its resolution included, for schemas with types that pyruhvro lacks."""
    with _mapped("The datum does not fit its schema"):
        row = fastavro.schemaless_reader(io.BytesIO(datum), *_illogical(schema.text))
        return pa.RecordBatch.from_pylist([_pairs(row)], event.schema())


@functools.lru_cache(maxsize=256)
def _illogical(text: str) -> tuple[Any, Any]:
    """A writer's schema and ours for fastavro, without logical types: whole numbers stay whole numbers, whatever
    calendar they would leave."""
    writer = _without(json.loads(text), "logicalType", "default")
    return fastavro.parse_schema(writer), fastavro.parse_schema(_without(event.schema_json(), "logicalType"))


def _without(raw: Any, *keys: str) -> Any:
    """A schema without some of its keys. What a writer has as defaults is not ours to check: they are for readers."""
    if isinstance(raw, dict):
        return {key: _without(value, *keys) for key, value in raw.items() if key not in keys}
    return [_without(item, *keys) for item in raw] if isinstance(raw, list) else raw


def _pairs(row: Any) -> Any:
    row["labels"] = list(row["labels"].items())
    if row["testimony"] is not None:
        row["testimony"]["counts"] = list(row["testimony"]["counts"].items())
    return row


def decode_block(payload: bytes | memoryview, count: int, writer: Schema | None = None) -> pa.RecordBatch:
    """The ``count`` events of a container's unpacked block. DatumDamaged when any byte is not what it must be."""
    schema = writer or ours()
    if count < 0 or count * max(schema._node.least, 1) > len(payload):
        raise DatumDamaged(f"A block of {len(payload)} bytes cannot hold {count} events.")
    if len(payload) > MAX_JOINED_BYTES:
        raise DatumDamaged(f"A block of {len(payload)} bytes is too long; allowed are {MAX_JOINED_BYTES}.")
    if count == 0:
        if payload:
            raise DatumDamaged(f"A block of no events has {len(payload)} bytes.")
        return _empty()
    if schema._columns is None:
        return _decode_block_slowly(bytes(payload), count, schema)
    joined = b"".join((_varint(count), payload, b"\0", _SENTINEL_BYTES))
    with _mapped(f"A block of {count} events does not fit its schema"):
        top = pyruhvro.deserialize_array([joined], schema._block)
        records = top.column(0).values
        if len(records) != count or top.column(1)[0].as_py() != _SENTINEL:
            raise DatumDamaged(f"A block of {count} events is longer or shorter than its schema says.")
        return _to_ours(records, schema)


def _decode_block_slowly(payload: bytes, count: int, schema: Schema) -> pa.RecordBatch:
    at = 0
    datums = []
    for _ in range(count):
        end = _walk(schema._node, payload, at)
        datums.append(payload[at:end])
        at = end
    if at != len(payload):
        raise DatumDamaged(f"A block of {count} events has {len(payload) - at} bytes behind the last.")
    decoded = _decode_each(datums, schema, Framing.BARE)
    if decoded.bad:
        raise DatumDamaged(
            f"A block of {count} events has a bad one at {decoded.bad[0].index}: {decoded.bad[0].reason}"
        )
    return decoded.batch


# --- the bytes of the rows ----------------------------------------------------------------------------------------


class MessageDatums:
    """The bytes that a batch was decoded from: the values of messages, one a row, behind frames of one length."""

    def __init__(self, schema: Schema, values: list[bytes], frame_bytes: int) -> None:
        self.schema = schema
        self._values = values
        self._frame_bytes = frame_bytes

    def of(self, first: int, end: int) -> bytes:
        """The datums of rows ``first`` to before ``end``, one directly behind the other."""
        frame = self._frame_bytes
        return b"".join([value[frame:] for value in self._values[first:end]])

    def pick(self, rows: list[int]) -> bytes:
        """The datums of these rows, in this order."""
        frame, values = self._frame_bytes, self._values
        return b"".join([values[row][frame:] for row in rows])

    def borders(self, first: int, end: int) -> list[int]:
        """Where in ``of(first, end)`` each of its datums begins, and where the last one ends."""
        borders = [0]
        for value in self._values[first:end]:
            borders.append(borders[-1] + len(value) - self._frame_bytes)
        return borders


class BlockDatums:
    """The bytes that a batch was decoded from: a block's payload, where datums lie without borders between them.

    A border is found by encoding the rows beside it once more, the fewer ones, and comparing: a datum says itself where
    it ends, so equal bytes have equal borders. What somebody else wrote in other bytes, which Avro allows, is walked
    over. ``known`` are borders to begin with: rows, and the bytes before them, ascending, both ends among them.
    """

    def __init__(self, schema: Schema, payload: bytes, batch: pa.RecordBatch, known: Sequence[tuple[int, int]]) -> None:
        self.schema = schema
        self._payload = payload
        self._batch = batch
        self._rows = [row for row, _ in known]
        self._bytes = [at for _, at in known]

    def of(self, first: int, end: int) -> memoryview:
        """The datums of rows ``first`` to before ``end``, one directly behind the other."""
        start = self._border(first)
        return memoryview(self._payload)[start : self._border(end)]

    def pick(self, rows: list[int]) -> bytes:
        """The datums of these rows, in this order."""
        return b"".join([self.of(row, row + 1) for row in rows])

    def borders(self, first: int, end: int) -> list[int]:
        """Where in ``of(first, end)`` each of its datums begins, and where the last one ends."""
        data = self.of(first, end)
        if self.schema.sha256 == ours().sha256:
            again = encode(self._batch.slice(first, end - first))
            if encode_block(again)[1] == data:
                found: list[int] = np.frombuffer(
                    again.buffers()[1], np.int32, end - first + 1, again.offset * 4
                ).tolist()
                return [border - found[0] for border in found]
        start = self._border(first)
        return [border - start for border in _walked(self.schema, self._payload, start, end - first)]

    def _border(self, row: int) -> int:
        place = bisect.bisect_left(self._rows, row)
        if self._rows[place] == row:
            return self._bytes[place]
        border = self._encoded_border(row, place)
        if border is None:
            border = _walked(self.schema, self._payload, self._bytes[place - 1], row - self._rows[place - 1])[-1]
        self._rows.insert(place, row)
        self._bytes.insert(place, border)
        return border

    def _encoded_border(self, row: int, place: int) -> int | None:
        if self.schema.sha256 != ours().sha256:
            return None
        (low, high), (start, end) = self._rows[place - 1 : place + 1], self._bytes[place - 1 : place + 1]
        if row - low <= high - row:
            again = encode_block(self._batch.slice(low, row - low))[1]
            return start + len(again) if self._payload.startswith(again, start) else None
        again = encode_block(self._batch.slice(row, high - row))[1]
        return end - len(again) if self._payload.endswith(again, start, end) else None


def _walked(schema: Schema, payload: bytes, at: int, rows: int) -> list[int]:
    """Where each of so many datums from ``at`` on begins, and where the last one ends."""
    borders = [at]
    for _ in range(rows):
        borders.append(_walk(schema._node, payload, borders[-1]))
    return borders


Datums: TypeAlias = MessageDatums | BlockDatums
"""The bytes of a batch's rows; both have the attribute ``schema``, what they were read with."""


def decode_groups(
    values: Sequence[bytes | None], resolve: Callable[[int | bytes], Schema]
) -> tuple[list[tuple[pa.RecordBatch, MessageDatums]], list[Bad]]:
    """As ``decode_messages``, with the bytes of the rows; a batch for each framing and schema among the values."""
    unframed = unframe(values)
    found, bad = [], unframed.bad
    for group in unframed.groups:
        decoded = _decode_group(group, resolve)
        places = range(len(values)) if group.index is None else group.index
        bad.extend(Bad(int(places[one.index]), one.reason) for one in decoded.bad)
        if decoded.batch.num_rows:
            kept = group.values if decoded.index is None else [group.values[at] for at in decoded.index]
            datums = MessageDatums(resolve(group.key), kept, _FRAME_BYTES[group.framing])
            found.append((decoded.batch, datums))
    return found, sorted(bad)


# --- a walk over one datum ----------------------------------------------------------------------------------------


def _walk_whole(node: _Node, value: bytes, start: int) -> None:
    end = _walk(node, value, start)
    if end != len(value):
        raise DatumDamaged(f"The datum ends after {end - start} bytes; {len(value) - end} more follow.")


def _walk(node: _Node, data: bytes, at: int) -> int:
    """Where the value that starts ``at`` ends; DatumDamaged, naming the field, when it cannot be one of this type.

    Checks what moves through the bytes, and UTF-8. The range of an int or an enum is the columns' to check.
    """
    kind = node.kind
    if kind in ("int", "long", "enum"):
        return _long(node, data, at)[1]
    if kind in ("string", "bytes"):
        return _walk_text(node, data, at, text=kind == "string")
    if kind == "union":
        branch, at = _long(node, data, at)
        if not 0 <= branch < len(node.children):
            raise DatumDamaged(f"{node.path} has the union branch {branch}; allowed are 0 to {len(node.children) - 1}.")
        return _walk(node.children[branch], data, at)
    if kind == "record":
        for entry in node.fields:
            at = _walk(entry.node, data, at)
        return at
    if kind in ("map", "array"):
        return _walk_many(node, data, at)
    size = node.size if kind == "fixed" else _PRIMITIVES[kind][0]
    if size > len(data) - at:
        raise DatumDamaged(f"{node.path} needs {size} bytes; {len(data) - at} are left.")
    if kind == "boolean" and data[at] > 1:
        raise DatumDamaged(f"{node.path} is the byte {data[at]}; a boolean is 0 or 1.")
    return at + size


def _walk_text(node: _Node, data: bytes, at: int, *, text: bool = True) -> int:
    size, at = _long(node, data, at)
    if not 0 <= size <= len(data) - at:
        raise DatumDamaged(f"{node.path} is said to have {size} bytes; {len(data) - at} are left.")
    if text and size:
        try:
            data[at : at + size].decode("utf-8")
        except UnicodeDecodeError as error:
            raise DatumDamaged(f"{node.path} is not UTF-8: {error.reason} at byte {error.start}.") from error
    return at + size


def _walk_many(node: _Node, data: bytes, at: int) -> int:
    item, keyed = node.children[0], node.kind == "map"
    step = _walk_text if item.kind == "string" else _walk
    while True:
        count, at = _long(node, data, at)
        if count == 0:
            return at
        if count < 0:
            count = -count
            _, at = _long(node, data, at)
        if count > len(data) - at:
            raise DatumDamaged(f"{node.path} is said to have {count} entries; {len(data) - at} bytes are left.")
        for _ in range(count):
            if keyed:
                at = _walk_text(node, data, at)
            at = step(item, data, at)


def _long(node: _Node, data: bytes, at: int) -> tuple[int, int]:
    result = shift = 0
    if at < len(data) and (first := data[at]) < 0x80:
        return (first >> 1) ^ -(first & 1), at + 1
    for place in range(at, min(at + 10, len(data))):
        byte = data[place]
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            result &= (1 << 64) - 1
            return (result >> 1) ^ -(result & 1), place + 1
        shift += 7
    if at + 10 <= len(data):
        raise DatumDamaged(f"{node.path} has a number of more than 10 bytes.")
    raise DatumDamaged(f"The datum ends inside {node.path}.")


# --- framings -----------------------------------------------------------------------------------------------------


def confluent(datums: pa.BinaryArray, schema_id: int) -> list[bytes]:
    """The values of messages in the Confluent framing: ``00``, the schema id in 4 bytes, the datum."""
    return _framed(datums, b"\0" + schema_id.to_bytes(4, "big"))


def single_object(datums: pa.BinaryArray, schema: Schema | None = None) -> list[bytes]:
    """The values of messages in Avro's single-object framing: ``C3 01``, the fingerprint in 8 bytes, the datum."""
    return _framed(datums, b"\xc3\x01" + (schema or ours()).fingerprint)


def _framed(datums: pa.BinaryArray, frame: bytes) -> list[bytes]:
    framed: list[bytes] = pc.binary_join_element_wise(pa.scalar(frame), datums, pa.scalar(b"")).to_pylist()
    return framed


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Values of one framing and one schema: ``key`` is the schema id or the fingerprint; value i stood at ``index[i]``
    (None: at i)."""

    framing: Framing
    key: int | bytes
    values: list[bytes]
    index: np.ndarray[Any, np.dtype[np.int64]] | None


@dataclass(frozen=True, slots=True, eq=False)
class Unframed:
    groups: list[Group]
    bad: list[Bad]


def unframe(values: Sequence[bytes | None]) -> Unframed:
    """Tells values apart by their first bytes, and groups them by schema. The values stay framed: ``decode`` takes the
    group's framing. What has no known frame is bad, with its place and the reason."""
    whole: list[Any] = values if isinstance(values, list) else list(values)
    key = _only_key(whole)
    if key is not None:
        return Unframed([Group(*key, whole, None)], [])
    places: dict[tuple[Framing, int | bytes], list[int]] = {}
    bad: list[Bad] = []
    for place, value in enumerate(whole):
        key = _frame(value) if value else None
        if key is None:
            bad.append(Bad(place, _no_frame(value)))
        else:
            places.setdefault(key, []).append(place)
    groups = [
        Group(framing, key, [whole[place] for place in index], np.array(index, np.int64))
        for (framing, key), index in places.items()
    ]
    return Unframed(groups, bad)


def _only_key(values: Sequence[bytes | None]) -> tuple[Framing, int | bytes] | None:
    """The one frame that all values have, found without a look at each; None when there is more than one kind."""
    try:
        for framing in (Framing.CONFLUENT, Framing.SINGLE_OBJECT):
            size = _FRAME_BYTES[framing]
            heads = {value[:size] for value in values}  # type: ignore[index]
            if len(heads) != 1:
                return None
            key = _frame(heads.pop())
            if key is not None:
                return key
    except TypeError:  # a tombstone
        pass
    return None


def _frame(value: bytes) -> tuple[Framing, int | bytes] | None:
    if value[:1] == b"\0" and len(value) >= 5:
        return Framing.CONFLUENT, int.from_bytes(value[1:5], "big")
    if value[:2] == b"\xc3\x01" and len(value) >= 10:
        return Framing.SINGLE_OBJECT, value[2:10]
    return None


def _no_frame(value: bytes | None) -> str:
    if value is None:
        return "The message has no value (a tombstone)."
    if not value:
        return "The message's value is empty."
    if value[:1] == b"\0" or value[:2] == b"\xc3\x01":
        return f"The message ends inside its frame, after {len(value)} bytes."
    return (
        f"The message starts with {value[:4].hex(' ').upper()}; an event starts with 00 and a schema id, or with C3 01."
    )


def decode_messages(values: Sequence[bytes | None], resolve: Callable[[int | bytes], Schema]) -> Decoded:
    """The events of whole messages, in their order, whatever framings and schemas they mix.

    ``resolve`` turns a schema id (int) or a fingerprint (bytes) into a schema; its SchemaUnknown and SchemaRefused make
    the values of that schema bad, anything else passes through.
    """
    unframed = unframe(values)
    groups, bad = unframed.groups, unframed.bad
    if len(groups) == 1 and not bad:
        return _decode_group(groups[0], resolve)
    batches, places = [], []
    for group in groups:
        found = _decode_group(group, resolve)
        index = np.arange(len(values), dtype=np.int64) if group.index is None else group.index
        bad.extend(Bad(int(index[one.index]), one.reason) for one in found.bad)
        batches.append(found.batch)
        places.append(index if found.index is None else index[found.index])
    bad.sort()
    if not batches:
        return Decoded(_empty(), np.array([], np.int64), bad)
    order = np.concatenate(places)
    batch = _one_batch(batches)
    rank = np.argsort(order, kind="stable")
    if len(groups) > 1:
        batch = batch.take(pa.array(rank))
    return Decoded(batch, order[rank], bad)


# --- the datums of what was decoded -------------------------------------------------------------------------------


def datums_of_messages(
    values: Sequence[bytes | None], decoded: Decoded, resolve: Callable[[int | bytes], Schema]
) -> pa.BinaryArray:
    """The datum of each row of ``decode_messages(values, resolve)``: as it came where its schema is ours, else as we
    write it."""
    rows = np.arange(len(values), dtype=np.int64) if decoded.index is None else decoded.index
    unframed = unframe(values)
    ours_at = np.zeros(len(values), np.int64)
    for group in unframed.groups:
        try:
            same = resolve(group.key).parsed == ours().parsed
        except (SchemaUnknown, SchemaRefused):
            continue
        if same:
            ours_at[slice(None) if group.index is None else group.index] = _FRAME_BYTES[group.framing]
    frames = ours_at[rows]
    as_we_write = [] if frames.all() else encode(decoded.batch).to_pylist()
    came = zip(rows.tolist(), frames.tolist(), strict=True)
    # pyarrow's own slicing makes room for the longest value in every row.
    datums = [values[row][frame:] if frame else as_we_write[place] for place, (row, frame) in enumerate(came)]
    return pa.array(datums, pa.binary())


def datums_of_block(payload: bytes, batch: pa.RecordBatch, writer: Schema) -> pa.BinaryArray:
    """The datum of each row of ``decode_block(payload, len(batch), writer)``: as it came where the schema is ours, else
    as we write it."""
    datums = encode(batch)
    if writer.parsed != ours().parsed or bytes(encode_block(datums)[1]) == payload:
        return datums
    # The same events in other bytes, which only a walk can part.
    borders = _walked(writer, payload, 0, batch.num_rows)
    return pa.array([payload[start:end] for start, end in itertools.pairwise(borders)], pa.binary())


def _decode_group(group: Group, resolve: Callable[[int | bytes], Schema]) -> Decoded:
    try:
        schema = resolve(group.key)
    except (SchemaUnknown, SchemaRefused) as error:
        reason = str(error)
        return Decoded(_empty(), np.array([], np.int64), [Bad(place, reason) for place in range(len(group.values))])
    return decode(group.values, schema, group.framing)
