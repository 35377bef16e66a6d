"""Positions, checkpoints and declared losses."""

from __future__ import annotations

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from pipeline import event, testimony


def stream(**settings: float) -> testimony.Stream:
    """A stream that begins at second 0 of its clock."""
    return testimony.Stream("node-1", "0" * 16, boot_id="boot", monotonic=0.0, **settings)  # type: ignore[arg-type]


def attempts(count: int) -> pa.RecordBatch:
    """A batch as ``enrich`` gives it, as narrow as it may be."""
    return pa.RecordBatch.from_pydict(
        {
            "type": pa.repeat("normal", count),
            "kind": pa.repeat("bind", count),
            "time": pa.array([7] * count, pa.timestamp("us")),
        }
    )


def counts(record: dict[str, object]) -> dict[str, int]:
    """The counters of one of the stream's own records."""
    own = record["testimony"]
    assert isinstance(own, dict)
    return dict(own["counts"])


@given(st.lists(st.one_of(st.integers(0, 50), st.just("checkpoint"), st.just("undelivered")), max_size=12))
def test_pos_has_no_holes(steps: list[int | str]) -> None:
    """Whatever the mix of attempts and own records, pos is 0, 1, 2 … in the order in which batches were made."""
    row = stream()
    made = [row.start(1, "begins", {})]
    for step in steps:
        if isinstance(step, int):
            made.append(row.number(attempts(step)))
        elif step == "checkpoint":
            made.append(row.checkpoint(2, 1.0, {"lost_ring_full": row.next_pos}))
        else:
            made.append(row.undelivered(2, "topic binds", "queue full", 0, 0))
    made.append(row.stop(3, 2.0, {}, "ends"))

    positions = [pos for batch in made for pos in batch.column("pos").to_pylist()]
    assert positions == list(range(len(positions)))


def test_every_batch_has_the_schema_of_an_event() -> None:
    """Attempts and own records leave in exactly the shape that is encoded."""
    row = stream()

    for batch in (row.start(1, "begins", {}), row.number(attempts(3)), row.stop(2, 1.0, {}, "ends")):
        assert batch.schema.equals(event.schema())
        batch.validate(full=True)


def test_a_loss_is_declared_once_at_the_next_checkpoint() -> None:
    """What the counters grew by is declared by cause, what was lost before the start too, and nothing twice."""
    row = stream()
    row.start(1, "begins", {"attempted": 9, "lost_ring_full": 2})

    first = row.checkpoint(2, 1.0, {"attempted": 20, "lost_ring_full": 3, "lost_inflight_full": 2}).to_pylist()
    second = row.checkpoint(3, 2.0, {"attempted": 20, "lost_ring_full": 3, "lost_inflight_full": 2}).to_pylist()

    assert ["loss", "checkpoint"] == [record["kind"] for record in first]
    assert ["warn", "info"] == [record["type"] for record in first]
    assert first[0]["message"] == "lost 5 samples: inflight_full 2, ring_full 3"
    assert {"ring_full": 3, "inflight_full": 2} == counts(first[0])
    assert ["checkpoint"] == [record["kind"] for record in second]


def test_checkpoints_cover_every_record() -> None:
    """The ranges of consecutive checkpoints join without a gap, and each begins with the checkpoint before."""
    row = stream()
    row.start(1, "begins", {})
    row.number(attempts(10))
    first = row.checkpoint(2, 1.0, {}).to_pylist()[-1]
    row.number(attempts(5))
    second = row.checkpoint(3, 2.0, {}).to_pylist()[-1]

    assert (0, 10) == (first["testimony"]["first_pos"], first["testimony"]["last_pos"])
    assert (first["pos"], second["pos"] - 1) == (second["testimony"]["first_pos"], second["testimony"]["last_pos"])


def test_checkpoints_are_due_by_count_age_and_idleness() -> None:
    """10,000 records, 10 s with records, 60 s without."""
    busy, slow, idle = stream(), stream(), stream()
    busy.number(attempts(10_000))
    slow.number(attempts(1))

    assert (False, True) == (stream().due(0.1), busy.due(0.1))
    assert (False, True) == (slow.due(9.9), slow.due(10.0))
    assert (False, True) == (idle.due(59.9), idle.due(60.0))


def test_what_a_destination_did_not_get_is_declared_with_its_range() -> None:
    """An undelivered range names the destination, the range and the cause, and is a warn."""
    record = stream().undelivered(5, "topic binds", "the queue was full", 10, 19).to_pylist()[0]

    assert record["type"] == "warn"
    assert record["message"] == "topic binds did not get 10 records, 10 to 19: the queue was full"
    assert (10, 19) == (record["testimony"]["first_pos"], record["testimony"]["last_pos"])
    assert {"undelivered": 10} == counts(record)


def test_epochs_sort_by_time() -> None:
    """An epoch is 16 hexadecimal digits, the milliseconds first."""
    early, late = testimony.new_epoch(1_700_000_000_000, 0xFFFF), testimony.new_epoch(1_700_000_000_001, 0)

    assert (16, 16) == (len(early), len(late))
    assert early < late
