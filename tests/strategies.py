"""Generated input for property tests: events as rows and as batches, text that means harm included."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
from hypothesis import strategies as st

from pipeline import event

Row = dict[str, Any]

INT32 = st.integers(-(2**31), 2**31 - 1)
INT64 = st.integers(-(2**63), 2**63 - 1)
TIMES_US = st.integers(0, 253_402_300_799_999_999)
"""1970 to the end of 9999."""

HARM = (
    "", "\x00", "\n", "\r\n", "\t", "\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "\x7f", "\x9b31m", "\u202egnp.exe",
    "\u2028", "\ufeff", "\ufffd", "a" * 300, "\\x41", "\\", '"', "'", "{}", "%s", "=cmd()", "../../etc/passwd",
    "nginx\nroot", "\U0001f600", "e\u0301", "CEF:0|a|b", "\U0010ffff",
)  # fmt: skip
"""Text that breaks a line, moves a cursor, hides a name or means something to a format."""


def texts() -> st.SearchStrategy[str]:
    """Text of any kind that UTF-8 can hold, harmful text often."""
    return st.one_of(
        st.sampled_from(HARM), st.text(max_size=20), st.text("abcdefghijklmnopqrstuvwxyz-0123456789", max_size=16)
    )


def _values(kind: Any) -> st.SearchStrategy[Any]:
    """Values of one type of the schema, as fastavro takes them; whole numbers stay numbers where a time is meant."""
    if isinstance(kind, list):
        return st.one_of(*map(_values, kind))
    if isinstance(kind, str):
        plain: dict[str, st.SearchStrategy[Any]] = {
            "null": st.none(), "boolean": st.booleans(), "int": INT32, "long": INT64, "string": texts(),
        }  # fmt: skip
        return plain[kind]
    match kind["type"]:
        case "enum":
            return st.sampled_from(kind["symbols"])
        case "map":
            return st.dictionaries(texts(), _values(kind["values"]), max_size=4)
        case "record":
            return st.fixed_dictionaries({one["name"]: _values(one["type"]) for one in kind["fields"]})
        case "long" if kind.get("logicalType") == "timestamp-micros":
            return TIMES_US
        case other:
            return _values(other)


def events(**fixed: st.SearchStrategy[Any]) -> st.SearchStrategy[Row]:
    """Events as rows, ``time`` in microseconds, maps as dicts: anything that the schema allows.

    ``fixed`` replaces the strategy of a field by name.
    """
    fields = {one["name"]: _values(one["type"]) for one in event.schema_json()["fields"]}
    return st.fixed_dictionaries(fields | fixed)


def batches(min_size: int = 0, max_size: int = 8, **fixed: st.SearchStrategy[Any]) -> st.SearchStrategy[pa.RecordBatch]:
    """Batches of exactly ``event.schema()``."""
    return st.lists(events(**fixed), min_size=min_size, max_size=max_size).map(batch_of)


def batch_of(rows: list[Row]) -> pa.RecordBatch:
    """Rows as a batch of ``event.schema()``; fields that a row lacks are null."""
    return pa.RecordBatch.from_pylist([_pairs(row) for row in rows], schema=event.schema())


def rows_of(batch: pa.RecordBatch) -> list[Row]:
    """The inverse of ``batch_of``."""
    numbers = batch.set_column(batch.schema.get_field_index("time"), "time", batch.column("time").cast(pa.int64()))
    rows: list[Row] = numbers.to_pylist(maps_as_pydicts="strict")
    return rows


def _pairs(row: Row) -> Row:
    out = dict(row)
    out["labels"] = list((row.get("labels") or {}).items())
    if row.get("testimony") is not None:
        out["testimony"] = row["testimony"] | {"counts": list(row["testimony"]["counts"].items())}
    return out


def plain_event(pos: int = 0, **changes: Any) -> Row:
    """One ordinary bind, for tests that need a recognisable row."""
    row: Row = dict.fromkeys(event.fields())
    row.update(
        type="normal", kind="bind", node="node-1", epoch="019a0b1c2d3e4f50", pos=pos,
        time=1_767_225_600_000_000 + pos * 1000, boottime_ns=10**12 + pos, labels={}, cgroup_id=7, mountnsid=4026531840,
        netnsid=4026531992, pid=1000 + pos % 50, tid=1000 + pos % 50, ppid=1, uid=0, gid=0, comm="nginx",
        parent_comm="systemd", exe="nginx", family="inet", sock_type="stream", proto="TCP", proto_num=6,
        addr="0.0.0.0", port=80 + pos % 1000, asked_addr="0.0.0.0", asked_port=80 + pos % 1000, opts=".R...",
        ifindex=0, cookie=pos, errno=0, hook="tracepoint",
    )  # fmt: skip
    return row | changes
