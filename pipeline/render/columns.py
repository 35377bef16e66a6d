"""Columns for people: a header, then one row for each bind.

In: a batch of ``event.schema()``. Out: bytes; every line ends in a newline and has no trailing blanks. Everything is
left-aligned with one blank between columns. A value is never cut: one that is longer than its column pushes the rest
of its row to the right. Width counts characters. The stream's own records are no rows: ``own_lines`` gives them as
text, for standard error.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import event
from pipeline.errors import UsageError
from pipeline.render import interface, is_bind, is_plain, iso_time, join, pairs, portions, printable, to_bytes

_EMPTY, _BLANK = pa.scalar(""), pa.scalar(" ")


class Renderer:
    """A chosen set of columns: ``header()`` once, then ``rows(batch)`` for each batch.

    ``chosen`` is the name of a layout (``event.LAYOUTS``) or names of columns (``event.columns()``), in any case;
    ``time`` puts TIME before them. UsageError for a name that is neither.
    """

    def __init__(self, chosen: str | Sequence[str], *, time: bool = False) -> None:
        named = _layout(chosen) if isinstance(chosen, str) else [_column(name) for name in chosen]
        if time and not any(column.field == "time" for column in named):
            named = [event.columns()["time"], *named]
        self._columns = named

    def header(self) -> bytes:
        """The line of the names, as bytes."""
        *padded, last = self._columns
        cells = [column.header.ljust(column.width) for column in padded]
        return " ".join([*cells, last.header]).encode() + b"\n"

    def rows(self, batch: pa.RecordBatch) -> bytes:
        """A line for each bind of the batch, in its order."""
        binds = is_bind(batch)
        chosen = batch if binds.true_count == batch.num_rows else batch.filter(binds)
        return b"".join(self._rows(portion) for portion in portions(chosen))

    def _rows(self, batch: pa.RecordBatch) -> bytes:
        *padded, last = self._columns
        cells = [_padded(cell(batch, column.field), column.width) for column in padded]
        row = pc.binary_join_element_wise(*cells, cell(batch, last.field), _BLANK)
        return to_bytes(join(pc.ascii_rtrim(row, characters=" "), "\n"))


def cell(batch: pa.RecordBatch, field: str) -> pa.StringArray:
    """What a column shows for each row, printable, blank without a value; ``field`` is of the schema, or ``if``."""
    array = interface(batch) if field == "if" else batch.column(field)
    if array.null_count == len(array):
        return pa.repeat(_EMPTY, len(array))
    if pa.types.is_timestamp(array.type):
        text = iso_time(array)
    elif pa.types.is_map(array.type):
        text = printable(pairs(array, lambda keys: join(keys, "="), lambda values: values))
    elif pa.types.is_struct(array.type):
        text = printable(pa.array([_compact(value) for value in array.to_pylist()], pa.string()))
    elif pa.types.is_string(array.type):
        text = printable(array)
    else:
        text = array.cast(pa.string())
    return pc.fill_null(text, _EMPTY) if text.null_count else text


def _padded(text: pa.StringArray, width: int) -> pa.StringArray:
    # Of plain text bytes are characters, and counting them is twice as fast.
    return pc.ascii_rpad(text, width) if is_plain(text) else pc.utf8_rpad(text, width)


def own_lines(batch: pa.RecordBatch, *, time: bool = False) -> list[str]:
    """The stream's own records as text, one line each without its newline: ``warn minikube: lost 5 samples``."""
    own = batch.filter(pc.invert(is_bind(batch)))
    if own.num_rows == 0:
        return []
    message = pc.coalesce(own.column("message"), own.column("kind"))
    texts = join(own.column("type"), " ", own.column("node"), ": ", message)
    if time:
        texts = join(iso_time(own.column("time")), " ", texts)
    lines: list[str] = printable(texts).to_pylist()
    return lines


def _layout(name: str) -> list[event.Column]:
    if name not in event.LAYOUTS:
        raise UsageError(f"The layout {name!r} does not exist; allowed are {', '.join(event.LAYOUTS)}.")
    return [event.columns()[column]._replace(width=width) for column, width in event.LAYOUTS[name]]


def _column(name: str) -> event.Column:
    column = event.columns().get(name.lower())
    if column is None:
        raise UsageError(f"The column {name!r} does not exist; allowed are {', '.join(event.columns())}.")
    return column


def _compact(value: dict[str, object] | None) -> str | None:
    if value is None:
        return None
    known = {key: dict(item) if isinstance(item, list) else item for key, item in value.items() if item is not None}
    return json.dumps(known, separators=(",", ":"), ensure_ascii=False)
