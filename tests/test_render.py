"""Columns and JSON, byte for byte; and hostile text that must not get out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import config, event, render
from pipeline.errors import UsageError
from pipeline.render import columns
from pipeline.render import json as render_json
from pipeline.select import Filter, select

CASES: list[dict[str, Any]] = json.loads((Path(__file__).parent / "golden" / "cases.json").read_text(encoding="utf-8"))

BIND: dict[str, Any] = {
    "type": "normal", "kind": "bind", "node": "n1", "epoch": "0194265a3c005eed", "pos": 0, "time": 1767323045123456,
    "labels": {}, "pid": 42, "comm": "nc", "proto": "TCP", "addr": "::", "port": 4242, "opts": ".R...", "ifindex": 0,
    "mountnsid": 7, "errno": 0,
}  # fmt: skip
WARN: dict[str, Any] = {
    "type": "warn", "kind": "loss", "node": "n1", "epoch": "0194265a3c005eed", "pos": 1, "time": 0, "labels": {},
    "message": "lost 5 samples",
}  # fmt: skip


def batch(*rows: dict[str, Any]) -> pa.RecordBatch:
    """Rows as a batch; fields that a row lacks are null."""
    return pa.RecordBatch.from_pylist(list(rows), event.schema())


def shown(args: list[str], events: list[dict[str, Any]]) -> bytes:
    """What the replay of the events prints, by the functions it is made of."""
    asked = config.parse("replay", ["--files=x", *args], {}, system_file=Path("/nonexistent"))
    wanted = Filter(
        pids=asked.pids, ports=asked.ports, ignore_errors=asked.ignore_errors, since_us=asked.since_us,
        until_us=asked.until_us, info=asked.info, nodes=asked.nodes,
    )  # fmt: skip
    chosen = select(batch(*events), wanted).batch
    if asked.output == "json":
        return render_json.lines(chosen, time=asked.time)
    if asked.output == "json-full":
        return render_json.full(chosen)
    renderer = columns.Renderer(asked.columns, time=asked.time)
    return renderer.header() + renderer.rows(chosen)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_the_documented_output(case: dict[str, Any]) -> None:
    """Every header, row and JSON line of the documents comes out byte for byte."""
    assert case["stdout"] == shown(case["args"], case["events"]).decode()


# --- columns ------------------------------------------------------------------------------------------------------


def rows(names: str, *events: dict[str, Any]) -> list[str]:
    """The rows of the named columns."""
    return columns.Renderer(names.split(",")).rows(batch(*events)).decode().splitlines()


def test_names_of_columns_are_case_insensitive_and_choose_their_header() -> None:
    """``pod`` and ``k8s.podname`` are one field under two headers."""
    assert columns.Renderer(["Pod", "K8S.PodName"]).header() == b"POD              K8S.PODNAME\n"


def test_an_unknown_column_names_the_valid_ones() -> None:
    """Nothing is silently blank."""
    with pytest.raises(UsageError, match=r"The column 'nope' does not exist; allowed are time, node, .*, testimony\."):
        columns.Renderer(["pid", "nope"])


def test_the_same_column_twice_is_padded_the_first_time() -> None:
    """Only the last column of a row is unpadded, whichever columns they are."""
    assert rows("pid,pid", BIND) == ["42     42"]


def test_every_field_of_the_schema_is_a_column() -> None:
    """Numbers are decimal, booleans true or false, labels k=v, testimony compact JSON, null is blank."""
    testimony = {"boot_id": "b", "first_pos": 0, "last_pos": 9, "counts": {"read": 10}}
    labelled = {**BIND, "labels": {"a": "b", "c": "d"}, "v6only": True}

    assert rows("labels,v6only", labelled) == ["a=b,c=d" + " " * 24 + "true"]
    assert rows("testimony", {**BIND, "testimony": testimony}) == [
        '{"boot_id":"b","first_pos":0,"last_pos":9,"counts":{"read":10}}'
    ]
    assert rows("testimony", BIND) == [""]
    assert len(event.columns()) == len(columns.Renderer(list(event.columns())).header().split())
    assert len(rows(",".join(event.columns()), BIND)) == 1


@pytest.mark.parametrize(
    ("ifindex", "ifname", "text"),
    [(0, None, "0"), (2, "eth0", "eth0"), (2, None, "2"), (None, None, ""), (0, "eth0", "0")],
)
def test_the_interface(ifindex: int | None, ifname: str | None, text: str) -> None:
    """0 without a device, its name, its index when the name is gone, blank where there is no socket."""
    assert [text] == rows("if", {**BIND, "ifindex": ifindex, "ifname": ifname})


def test_no_trailing_blanks() -> None:
    """A row whose last columns are blank ends with its last value; one without values is an empty line."""
    assert rows("pid,comm,pod", BIND) == ["42     nc"]
    assert rows("pod,container", BIND) == [""]
    assert rows("comm", {**BIND, "comm": "nc  "}) == ["nc"]


def test_width_counts_characters() -> None:
    """A name of many bytes keeps the columns in place."""
    assert rows("comm,pid", {**BIND, "comm": "müller"}) == ["müller           42"]


def test_the_time_comes_first() -> None:
    """27 wide, UTC, microseconds; a time column that was named is not doubled."""
    renderer = columns.Renderer(["pid"], time=True)

    assert renderer.header() == b"TIME                        PID\n"
    assert renderer.rows(batch(BIND)) == b"2026-01-02T03:04:05.123456Z 42\n"
    assert columns.Renderer(["pid", "time"], time=True).header() == b"PID    TIME\n"


def test_a_time_that_no_calendar_holds_is_still_a_row() -> None:
    """A topic can hold any 64 bits."""
    extremes = [2**63 - 1, -(2**63), -1, 253402300800000000]

    texts = [rows("time,pid", {**BIND, "time": time})[0] for time in extremes]

    assert texts[2:] == ["1969-12-31T23:59:59.999999Z 42", "10000-01-01T00:00:00.000000Z 42"]
    assert all(text.endswith(" 42") for text in texts)


def test_the_streams_own_records_are_no_rows() -> None:
    """They are lines for standard error, with their time when it is asked for."""
    mixed = batch(BIND, WARN, {**WARN, "type": "info", "message": None, "kind": "start"})

    assert columns.Renderer(["pid"]).rows(mixed) == b"42\n"
    assert columns.own_lines(mixed) == ["warn n1: lost 5 samples", "info n1: start"]
    assert columns.own_lines(mixed, time=True)[0] == "1970-01-01T00:00:00.000000Z warn n1: lost 5 samples"
    assert columns.own_lines(batch(BIND)) == []


def test_no_events_no_rows() -> None:
    """An empty batch gives no bytes."""
    assert columns.Renderer("trace-bind").rows(batch()) == b""
    assert render_json.lines(batch()) == b""
    assert render_json.full(batch()) == b""


# --- JSON ---------------------------------------------------------------------------------------------------------


def test_keys_without_a_value_are_left_out_but_three() -> None:
    """Of a bind pid, port and mountnsid are always there, 0 included."""
    bare = {name: BIND[name] for name in ("type", "kind", "node", "epoch", "pos", "time", "labels")}

    assert render_json.lines(batch(bare)) == b'{"type":"normal","node":"n1","pid":0,"port":0,"mountnsid":0}\n'


def test_json_keeps_the_order_of_a_mixed_batch() -> None:
    """The stream's own records stand where they happened, with the three keys, and the time when it is asked for."""
    mixed = batch(WARN, BIND, {**WARN, "message": None}, {**BIND, "pid": 43})

    lines = [json.loads(line) for line in render_json.lines(mixed, time=True).splitlines()]

    assert [line["type"] for line in lines] == ["warn", "normal", "warn", "normal"]
    assert lines[0] == {
        "type": "warn",
        "node": "n1",
        "message": "lost 5 samples",
        "time": "1970-01-01T00:00:00.000000Z",
    }
    assert list(lines[1])[-1] == "time"


def test_full_json_nests_labels_and_testimony() -> None:
    """Objects in the object; what is null in them is left out."""
    testimony = {"boot_id": "b", "first_pos": 0, "last_pos": 9, "counts": {"read": 10}, "digest": None}
    own = {**WARN, "labels": {"k": 'v"'}, "testimony": testimony}

    line = json.loads(render_json.full(batch(own)))

    assert line["labels"] == {"k": 'v"'}
    assert line["testimony"] == {"boot_id": "b", "first_pos": 0, "last_pos": 9, "counts": {"read": 10}}
    assert [name for name in event.fields() if name in line] == list(line)


# --- hostile text -------------------------------------------------------------------------------------------------

TEXT = st.one_of(
    st.text(max_size=6),
    st.text(st.sampled_from('\x00\x07\x1b\n\r\t\x7f\x85\u200b\u202e\u2028\ufeff"\\=,{} aé漢'), max_size=8),
)
HOSTILE = st.fixed_dictionaries(
    {
        **{name: st.just(BIND[name]) for name in BIND},
        "type": st.sampled_from(["normal", "normal", "warn", "info"]),
        **dict.fromkeys(("node", "epoch"), TEXT),
        **{name: st.none() | TEXT for name in ("comm", "pod", "ifname", "addr", "error", "message", "container_id")},
        "labels": st.dictionaries(TEXT, TEXT, max_size=3),
        "ifindex": st.none() | st.integers(-(2**31), 2**31 - 1),
        "port": st.none() | st.integers(-(2**31), 2**31 - 1),
        "time": st.integers(-(2**63), 2**63 - 1),
        "testimony": st.none()
        | st.fixed_dictionaries(
            {"boot_id": st.none() | TEXT, "counts": st.dictionaries(TEXT, st.integers(-9, 9), max_size=2)}
        ),
    }
)


def printable(text: str | None) -> str | None:
    """What a text looks like after rendering, one character at a time."""
    return text and "".join(
        char if char.isprintable() else "".join(f"\\x{byte:02x}" for byte in char.encode()) for char in text
    )


@settings(max_examples=60)
@given(st.lists(HOSTILE, max_size=5))
def test_hostile_text_stays_on_its_line(events: list[dict[str, Any]]) -> None:
    """One line an event, no control character, whatever a topic holds; and JSON always parses to what was stored."""
    stored = batch(*events)
    everything = columns.Renderer(list(event.columns()))

    texts = [render_json.lines(stored, time=True), render_json.full(stored), everything.rows(stored)]

    decoded = [text.decode() for text in texts]
    assert all(line.isprintable() for text in decoded for line in text.split("\n"))
    binds = sum(row["type"] == "normal" for row in events)
    assert [len(events), len(events), binds] == [text.count("\n") for text in decoded]
    assert len(events) - binds == len([line for line in columns.own_lines(stored) if line.isprintable()])
    full = [json.loads(line) for line in decoded[1].splitlines()]
    assert [printable(row["comm"]) for row in events] == [line.get("comm") for line in full]
    assert [{printable(k): printable(v) for k, v in row["labels"].items()} for row in events] == [
        line["labels"] for line in full
    ]
    short = [json.loads(line) for line in decoded[0].splitlines()]
    assert [printable(row["node"]) for row in events] == [line["node"] for line in short]


def test_bytes_that_are_no_utf8_are_escaped() -> None:
    """Should a damaged text ever get as far as here, it is shown as its bytes."""
    rotten = pa.array([b"a\xff\xed\xa0\x80", None], pa.binary()).view(pa.string())
    stored = batch(BIND, BIND).set_column(event.fields().index("comm"), "comm", rotten)

    assert json.loads(render_json.lines(stored).splitlines()[0])["comm"] == r"a\xff\xed\xa0\x80"
    assert columns.Renderer(["comm"]).rows(stored).decode() == "a\\xff\\xed\\xa0\\x80\n\n"


def test_a_backslash_is_not_doubled_again() -> None:
    """The agent did that once; what a process called itself looks the same everywhere."""
    stored = batch({**BIND, "comm": r"\\ \x1b"})

    assert columns.Renderer(["comm"]).rows(stored).decode() == "\\\\ \\x1b\n"
    assert json.loads(render_json.lines(stored))["comm"] == r"\\ \x1b"


def test_a_batch_too_large_for_one_array_is_rendered_in_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Portions change nothing in what comes out."""
    events = [{**BIND, "pos": pos, "comm": "x" * pos, "labels": {"pos": str(pos)}} for pos in range(50)]
    stored = batch(*events).slice(3)
    whole = render_json.full(stored), columns.Renderer("ig").rows(stored)

    monkeypatch.setattr(render, "_PORTION_BYTES", 500)

    assert len(list(render.portions(stored))) > 1
    assert whole == (render_json.full(stored), columns.Renderer("ig").rows(stored))
