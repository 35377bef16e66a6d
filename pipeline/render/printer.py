"""From batches to the two streams of a command: what ``-o``, ``--layout`` and ``-T`` choose, as one object.

In: batches that were selected. Out: bytes for standard output, and lines for standard error, where the stream's own
records go when the output is columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from pipeline.render import columns, json


class Printer:
    """How a command shows events. ``output`` is columns, json or json-full; ``chosen`` a layout or names of columns."""

    def __init__(self, output: str, chosen: str | Sequence[str], *, time: bool) -> None:
        self._output = output
        self._time = time
        self._columns = columns.Renderer(chosen, time=time) if output == "columns" else None

    @property
    def header(self) -> bytes:
        """What stands above the first event, printed even when none ever comes; empty for JSON."""
        return self._columns.header() if self._columns else b""

    def text(self, batch: pa.RecordBatch) -> tuple[bytes, list[str]]:
        """The events for standard output, and for standard error the stream's own records that do not go there."""
        if self._columns:
            return self._columns.rows(batch), columns.own_lines(batch, time=self._time)
        return (json.full(batch) if self._output == "json-full" else json.lines(batch, time=self._time)), []
