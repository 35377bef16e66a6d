"""JSON, one object a line: the documented keys (``lines``) or every field (``full``).

In: a batch of ``event.schema()``. Out: bytes; every line is one compact object, keys in a fixed order, and ends in a
newline. A key without a value is left out, but a bind always has ``pid``, ``port`` and ``mountnsid``. The line always
parses, and it holds no unprintable character, not even escaped as JSON allows: ``jq -r`` cannot bring it back.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import event
from pipeline.event import one_line
from pipeline.render import (
    each_unique,
    interface,
    is_bind,
    is_plain,
    iso_time,
    join,
    pairs,
    portions,
    to_bytes,
)


class Value(NamedTuple):
    """A column as JSON: ``text`` between two constants, which melt into those of the object around it."""

    opening: str
    text: pa.StringArray
    closing: str


Member = tuple[str, Value]


def lines(batch: pa.RecordBatch, *, time: bool = False) -> bytes:
    """The documented JSON, in the order of the batch; ``time`` adds a last key of that name.

    A failed bind has the key ``error`` beside the documented ones. The stream's own records have type, node, message.
    """
    return b"".join(_lines(portion, time=time) for portion in portions(batch))


def full(batch: pa.RecordBatch) -> bytes:
    """Every field that is not null, in schema order; ``labels`` and ``testimony`` as objects."""
    return b"".join(
        to_bytes(_objects((name, _value(portion.column(name))) for name in portion.schema.names))
        for portion in portions(batch)
    )


def _lines(batch: pa.RecordBatch, *, time: bool) -> bytes:
    binds = is_bind(batch)
    if binds.true_count == batch.num_rows:
        return to_bytes(_objects(_members_of_binds(batch, time=time)))
    if binds.true_count == 0:
        return to_bytes(_objects(_members_of_own(batch, time=time)))
    own = pc.invert(binds)
    texts = pa.concat_arrays(
        [
            _objects(_members_of_binds(batch.filter(binds), time=time)),
            _objects(_members_of_own(batch.filter(own), time=time)),
        ]
    )
    places = np.concatenate([np.flatnonzero(binds), np.flatnonzero(own)])
    return to_bytes(texts.take(pa.array(np.argsort(places))))


def _members_of_binds(batch: pa.RecordBatch, *, time: bool) -> Iterator[Member]:
    for key in event.JSON_KEYS:
        array = interface(batch) if key == "if" else batch.column(key)
        yield key, _value(pc.fill_null(array, 0) if key in event.JSON_ALWAYS else array)
    yield "error", _value(batch.column("error"))
    if time:
        yield "time", _value(batch.column("time"))


def _members_of_own(batch: pa.RecordBatch, *, time: bool) -> Iterator[Member]:
    for key in (*event.JSON_OWN_KEYS, *(("time",) if time else ())):
        yield key, _value(batch.column(key))


def _objects(members: Iterable[Member]) -> pa.StringArray:
    """One object a row and a newline; a null value leaves its key out. The first member is never null."""
    parts: list[pa.Array | str] = []
    constant = "{"
    for key, (opening, text, closing) in members:
        label = f'"{key}":{opening}' if constant == "{" else f',"{key}":{opening}'
        if text.null_count == 0:
            parts += [constant + label, text]
            constant = closing
        elif text.null_count < len(text):
            parts += [constant, join(label, text, closing)]
            constant = ""
    return pc.binary_join_element_wise(*parts, constant + "}\n", "", null_handling="replace", null_replacement="")


def _value(array: pa.Array) -> Value:
    """A column as JSON; null stays null."""
    convert = _BY_TYPE.get(array.type.id)
    return Value("", array.cast(pa.string()), "") if convert is None else convert(array)


def _text(array: pa.StringArray) -> Value:
    return Value('"', array if is_plain(array, but=b'"\\') else each_unique(array, _escaped), '"')


def _escaped(text: str) -> str:
    return json.dumps(one_line(text), ensure_ascii=False)[1:-1]


def _time(array: pa.TimestampArray) -> Value:
    return Value('"', iso_time(array), '"')


def _map(array: pa.MapArray) -> Value:
    return Value("{", pairs(array, lambda keys: join(*_text(keys), ":"), lambda values: join(*_value(values))), "}")


def _struct(array: pa.StructArray) -> Value:
    """Only the stream's own records have one, every few thousand rows."""
    texts = [None if value is None else _nested(value) for value in array.to_pylist()]
    return Value("", pa.array(texts, pa.string()), "")


def _nested(value: dict[str, object]) -> str:
    def member(item: object) -> str:
        if isinstance(item, list):
            return "{" + ",".join(f"{member(key)}:{member(inner)}" for key, inner in item) + "}"
        return f'"{_escaped(item)}"' if isinstance(item, str) else json.dumps(item)

    return "{" + ",".join(f'"{name}":{member(item)}' for name, item in value.items() if item is not None) + "}"


_BY_TYPE: dict[int, Callable[[pa.Array], Value]] = {
    pa.string().id: _text,
    pa.timestamp("us").id: _time,
    pa.map_(pa.string(), pa.string()).id: _map,
    pa.struct([]).id: _struct,
}
