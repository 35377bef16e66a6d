"""Filters: which events pass, and what is said of those that do not."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import event
from pipeline.event import LabelTest
from pipeline.select import Filter, Selected, select


def batch(*rows: dict[str, Any]) -> pa.RecordBatch:
    """A batch of binds, or of what the rows say instead; ``pos`` counts them."""
    usual = {
        "type": "normal", "kind": "bind", "node": "n1", "epoch": "0194265a3c005eed", "time": 0, "labels": {},
        "pid": 1, "port": 80, "asked_port": 80, "errno": 0,
    }  # fmt: skip
    return pa.RecordBatch.from_pylist([{**usual, "pos": pos, **row} for pos, row in enumerate(rows)], event.schema())


def passed(rows: pa.RecordBatch, **wanted: Any) -> list[int]:
    """``pos`` of the rows that pass."""
    found: list[int] = select(rows, Filter(**wanted)).batch.column("pos").to_pylist()
    return found


WARN = {"type": "warn", "kind": "loss", "pid": None, "port": None, "asked_port": None, "errno": None}
INFO = {**WARN, "type": "info", "kind": "start"}


def test_everything_passes_unchanged_when_nothing_is_asked() -> None:
    """A batch of which all pass is given back as it is, not copied."""
    rows = batch({}, {"pid": 2})

    assert Selected(rows, 0, 0) == select(rows, Filter())
    assert select(rows, Filter()).batch is rows


def test_pid() -> None:
    """Binds of the given processes pass."""
    rows = batch({"pid": 42}, {"pid": 43}, {"pid": 44}, {"pid": None})

    assert passed(rows, pids=(42, 44)) == [0, 2]


def test_a_port_matches_what_was_asked_for_and_what_was_given() -> None:
    """A bind to port 0 is found by the port that it got, a failed one by the port that it asked for."""
    rows = batch(
        {"asked_port": 0, "port": 49152},
        {"asked_port": 4242, "port": 4242, "errno": 98},
        {"asked_port": 4242, "port": 18600},
        {"asked_port": None, "port": 4242},
        {"asked_port": 1, "port": 2},
    )

    assert passed(rows, ports=(range(49152, 49153),), ignore_errors=False) == [0]
    assert passed(rows, ports=(range(4242, 4243),), ignore_errors=False) == [1, 2, 3]
    assert passed(rows, ports=(range(18000, 50000),), ignore_errors=False) == [0, 2]


def test_a_stored_port_that_is_none_matches_nothing() -> None:
    """Numbers outside 0 to 65535 can lie in a topic; they match no port and break nothing."""
    rows = batch({"port": -1, "asked_port": 65536 + 80}, {"port": 2**31 - 1, "asked_port": None}, {"port": 65535})

    assert passed(rows, ports=(range(1, 65536),)) == [2]


def test_failures_are_kept_back_and_counted() -> None:
    """Failed attempts are hidden unless asked for; only those that would have been shown are counted."""
    rows = batch({"errno": 98}, {"errno": 13, "pid": 2}, {}, {"errno": None})

    assert passed(rows) == [2, 3]
    assert select(rows, Filter()).hidden_failures == 2
    assert select(rows, Filter(pids=(2,))).hidden_failures == 1
    assert select(rows, Filter(ignore_errors=False)).hidden_failures == 0
    assert passed(rows, ignore_errors=False) == [0, 1, 2, 3]


def test_the_range_of_time_includes_its_start_and_excludes_its_end() -> None:
    """[since, until), in microseconds."""
    rows = batch({"time": 9}, {"time": 10}, {"time": 19}, {"time": 20})

    assert passed(rows, since_us=10, until_us=20) == [1, 2]
    assert passed(rows, since_us=10) == [1, 2, 3]
    assert passed(rows, until_us=20) == [0, 1, 2]


def test_nodes() -> None:
    """Named nodes pass, and those with ! in front do not."""
    rows = batch({"node": "a"}, {"node": "b"}, {"node": "c"})

    assert passed(rows, nodes=("a", "b")) == [0, 1]
    assert passed(rows, nodes=("!b",)) == [0, 2]
    assert passed(rows, nodes=("a", "b", "!b")) == [0]


def test_a_warning_passes_whatever_the_filters_say() -> None:
    """That something is missing must not be hidden by a filter for a port; it is no attempt, though."""
    rows = batch(WARN, {"pid": 2}, INFO, {"port": 1})
    wanted = Filter(pids=(1,), ports=(range(1, 2),))

    assert select(rows, wanted).batch.column("pos").to_pylist() == [0, 3]
    assert select(rows, wanted)[1:] == (0, 1)


def test_a_warning_of_another_time_or_node_does_not_pass() -> None:
    """Time and node say which part of the stream is looked at, and the warnings belong to it."""
    rows = batch({**WARN, "time": 5}, {**WARN, "time": 15}, {**WARN, "time": 15, "node": "n2"})

    assert passed(rows, since_us=10, until_us=20, nodes=("n1",)) == [1]


def test_info_passes_only_when_asked_for() -> None:
    """Starts and checkpoints are for those who want them."""
    rows = batch(INFO, {}, WARN)

    assert passed(rows) == [1, 2]
    assert passed(rows, info=True) == [0, 1, 2]
    assert select(rows, Filter(info=True)).own == 2


def test_nothing_of_nothing() -> None:
    """An empty batch gives an empty batch of the same schema."""
    rows = batch()

    assert rows.schema == select(rows, Filter(pids=(1,), ports=(range(1, 9),), since_us=1, nodes=("a",))).batch.schema


ROW = st.fixed_dictionaries(
    {
        "type": st.sampled_from(["normal", "normal", "warn", "info"]),
        "node": st.sampled_from(["a", "b"]),
        "time": st.integers(0, 6),
        "pid": st.one_of(st.none(), st.integers(1, 3)),
        "port": st.one_of(st.none(), st.integers(-1, 4), st.just(65536)),
        "asked_port": st.one_of(st.none(), st.integers(0, 4)),
        "errno": st.one_of(st.none(), st.sampled_from([0, 98])),
    }
)
WANTED = st.builds(
    Filter,
    pids=st.lists(st.integers(1, 3), max_size=2).map(tuple),
    ports=st.lists(st.builds(range, st.integers(1, 4), st.integers(2, 5)), max_size=2).map(tuple),
    ignore_errors=st.booleans(),
    since_us=st.one_of(st.none(), st.integers(0, 6)),
    until_us=st.one_of(st.none(), st.integers(0, 6)),
    info=st.booleans(),
    nodes=st.sampled_from([(), ("a",), ("!a",), ("a", "b")]),
)


def passes(row: dict[str, Any], wanted: Filter) -> bool:
    """The rules once more, for one event at a time."""
    inside = (wanted.since_us is None or row["time"] >= wanted.since_us) and (
        wanted.until_us is None or row["time"] < wanted.until_us
    )
    there = not wanted.nodes or row["node"] in wanted.nodes or (wanted.nodes == ("!a",) and row["node"] != "a")
    if row["type"] != "normal":
        return inside and there and (row["type"] == "warn" or wanted.info)
    asked = not wanted.ports or any(row[name] in ports for ports in wanted.ports for name in ("port", "asked_port"))
    succeeded = not wanted.ignore_errors or not row["errno"]
    return inside and there and asked and succeeded and (not wanted.pids or row["pid"] in wanted.pids)


@given(st.lists(ROW, max_size=12), WANTED)
def test_whole_columns_give_what_one_event_at_a_time_gives(rows: list[dict[str, Any]], wanted: Filter) -> None:
    """The fast way and the plain way agree."""
    found = select(batch(*rows), wanted)

    assert [pos for pos, row in enumerate(rows) if passes(row, wanted)] == found.batch.column("pos").to_pylist()
    assert found.own == sum(kind != "normal" for kind in found.batch.column("type").to_pylist())


@pytest.mark.parametrize("offset", [0, 1, 3])
def test_a_slice_is_a_batch_like_any_other(offset: int) -> None:
    """Where a batch lies in a larger one makes no difference."""
    rows = batch({"pid": 1}, {"pid": 2}, {"pid": 1, "port": 81}, {"pid": 2}, {"pid": 1})

    assert [pos for pos in (0, 2, 4) if pos >= offset] == passed(rows.slice(offset), pids=(1,))


# --- who it was ---------------------------------------------------------------------------------------------------

WEB = {"namespace": "default", "pod": "web-1", "container": "web", "labels": [("app", "web"), ("tier", "front")]}
DB = {"namespace": "data", "pod": "db-0", "container": "db", "labels": [("app", "db"), ("canary", "")]}
DOCKER = {"container": "web", "container_id": "0" * 64}
HOST: dict[str, Any] = {}


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({"namespaces": ("default",)}, [0]),
        ({"namespaces": ("!default",)}, [1, 2, 3]),
        ({"namespaces": ("default", "data")}, [0, 1]),
        ({"namespaces": ("default", "!default")}, []),
        ({"pods": ("db-0",)}, [1]),
        ({"pods": ("!db-0",)}, [0, 2, 3]),
        ({"containers": ("web",)}, [0, 2]),
        ({"containers": ("web", "db")}, [0, 1, 2]),
        ({"containers": ("!web",)}, [1, 3]),
        ({"containers": ("web",), "namespaces": ("default",)}, [0]),
        ({"labels": (LabelTest("app", "web", True),)}, [0]),
        ({"labels": (LabelTest("app", "web", False),)}, [1, 2, 3]),
        ({"labels": (LabelTest("app", None, True),)}, [0, 1]),
        ({"labels": (LabelTest("canary", None, True),)}, [1]),
        ({"labels": (LabelTest("canary", "", True),)}, [1]),
        ({"labels": (LabelTest("canary", None, False),)}, [0, 2, 3]),
        ({"labels": (LabelTest("app", None, True), LabelTest("tier", "front", True))}, [0]),
        ({"labels": (LabelTest("app", "web", True), LabelTest("app", "db", True))}, []),
    ],
)
def test_names_and_labels(wanted: dict[str, Any], expected: list[int]) -> None:
    """Listed names pass, names behind ``!`` do not; every test of a label must hold, as kubectl reads it."""
    assert passed(batch(WEB, DB, DOCKER, HOST), **wanted) == expected


def test_names_do_not_hide_a_warning() -> None:
    """A warning belongs to no pod and passes whatever pod is asked for."""
    rows = batch(WARN, WEB, INFO)

    assert passed(rows, namespaces=("data",), pods=("x",), containers=("y",), labels=(LabelTest("a", "b", True),)) == [
        0
    ]


def test_hidden_failures_are_those_of_the_pods_asked_for() -> None:
    """A failed attempt of another pod is no hidden one."""
    rows = batch({**WEB, "errno": 98}, {**DB, "errno": 98}, {"errno": 13})

    assert select(rows, Filter(pods=("db-0",))).hidden_failures == 1
