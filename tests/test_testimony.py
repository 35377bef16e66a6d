"""Positions, checkpoints and declared losses."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import avro, chain, event, testimony


def stream(**settings: Any) -> testimony.Stream:
    """A stream that begins at second 0 of its clock."""
    return testimony.Stream("node-1", "0" * 16, boot_id="boot", monotonic=0.0, schema=SCHEMA, **settings)


SCHEMA = "5c" * 32


def written(row: testimony.Stream, batches: pa.RecordBatch | Iterable[pa.RecordBatch]) -> list[dict[str, Any]]:
    """The rows of batches, after they were written and sealed as an agent does it."""
    rows = []
    for batch in [batches] if isinstance(batches, pa.RecordBatch) else batches:
        row.sealed(avro.encode(batch))
        rows += batch.to_pylist()
    return rows


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
    made = written(row, row.start(1, "begins", {}))
    for step in steps:
        if isinstance(step, int):
            made += written(row, row.number(attempts(step)))
        elif step == "checkpoint":
            made += written(row, row.checkpoint(2, 1.0, {"lost_ring_full": row.next_pos}))
        else:
            made += written(row, row.undelivered(2, "topic binds", "queue full", 0, 0))
    made += written(row, row.stop(3, 2.0, {}, "ends"))

    assert [record["pos"] for record in made] == list(range(len(made)))


def test_every_batch_has_the_schema_of_an_event() -> None:
    """Attempts and own records leave in exactly the shape that is encoded."""
    row = stream()

    batches = [row.start(1, "begins", {}), row.number(attempts(3))]
    for batch in batches:
        written(row, batch)
    for batch in row.stop(2, 1.0, {}, "ends"):
        written(row, batch)
        batches.append(batch)

    for batch in batches:
        assert batch.schema.equals(event.schema())
        batch.validate(full=True)


def test_a_loss_is_declared_once_at_the_next_checkpoint() -> None:
    """What the counters grew by is declared by cause, what was lost before the start too, and nothing twice."""
    row = stream()
    written(row, row.start(1, "begins", {"attempted": 9, "lost_ring_full": 2}))

    first = written(row, row.checkpoint(2, 1.0, {"attempted": 20, "lost_ring_full": 3, "lost_inflight_full": 2}))
    second = written(row, row.checkpoint(3, 2.0, {"attempted": 20, "lost_ring_full": 3, "lost_inflight_full": 2}))

    assert ["loss", "checkpoint"] == [record["kind"] for record in first]
    assert ["warn", "info"] == [record["type"] for record in first]
    assert first[0]["message"] == "lost 5 samples: inflight_full 2, ring_full 3"
    assert {"ring_full": 3, "inflight_full": 2} == counts(first[0])
    assert ["checkpoint"] == [record["kind"] for record in second]


def test_checkpoints_cover_every_record() -> None:
    """The ranges of consecutive checkpoints join without a gap, and each begins with the checkpoint before."""
    row = stream()
    written(row, row.start(1, "begins", {}))
    written(row, row.number(attempts(10)))
    first = written(row, row.checkpoint(2, 1.0, {}))[-1]
    written(row, row.number(attempts(5)))
    second = written(row, row.checkpoint(3, 2.0, {}))[-1]

    assert (0, 10) == (first["testimony"]["first_pos"], first["testimony"]["last_pos"])
    assert (first["pos"], second["pos"] - 1) == (second["testimony"]["first_pos"], second["testimony"]["last_pos"])


# --- digests ------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 30), min_size=1, max_size=6), st.booleans())
def test_digests_and_heads_are_what_the_documents_say(bursts: list[int], lossy: bool) -> None:
    """Each digest is SHA-256 over the datums of its range, each head over the one before and the digest."""
    row = stream()
    batches = [row.start(1, "begins", {})]
    row.sealed(avro.encode(batches[0]))
    for number, burst in enumerate(bursts):
        batches.append(row.number(attempts(burst)))
        row.sealed(avro.encode(batches[-1]))
        for batch in row.checkpoint(2, 1.0, {"lost_ring_full": number if lossy else 0}):
            batches.append(batch)
            row.sealed(avro.encode(batch))
    for batch in row.stop(3, 2.0, {}, "ends"):
        batches.append(batch)
        row.sealed(avro.encode(batch))
    whole = pa.Table.from_batches(batches).combine_chunks().to_batches()[0]
    datums, rows = avro.encode(whole).to_pylist(), whole.to_pylist()

    head = hashlib.sha256(
        json.dumps(["bindsnoop testimony 1", "node-1", "0" * 16, "boot", SCHEMA], separators=(",", ":")).encode()
    ).digest()
    behind = 0
    for own in (one["testimony"] for one in rows if one["kind"] in ("checkpoint", "stop")):
        assert own["first_pos"] == behind
        digest = hashlib.sha256(b"".join(datums[own["first_pos"] : own["last_pos"] + 1])).digest()
        head = hashlib.sha256(head + digest).digest()
        assert (digest.hex(), head.hex(), None) == (own["digest"], own["head"], own["signature"])
        behind = own["last_pos"] + 1
    assert behind == len(rows) - 1


def test_slices_of_a_buffer_are_sealed_as_what_they_hold() -> None:
    """Datums that are part of a larger array count without what lies beside them."""
    row, other = stream(), stream()
    datums = avro.encode(row.number(attempts(9)))
    other.number(attempts(9))

    row.sealed(datums)
    for part in (datums.slice(0, 4), datums.slice(4, 0), datums.slice(4)):
        other.sealed(part)

    (one,), (two,) = row.checkpoint(2, 1.0, {}), other.checkpoint(2, 1.0, {})
    assert one.to_pylist() == two.to_pylist()


def test_a_record_that_was_not_sealed_is_an_error() -> None:
    """A checkpoint without all datums would be a wrong one, for ever."""
    row = stream()
    row.number(attempts(3))

    with pytest.raises(ValueError, match="Of 3 records 0 were sealed"):
        list(row.checkpoint(2, 1.0, {}))


@pytest.mark.parametrize("other", [("node-2", "e", "b", "s"), ("n", "x", "b", "s"), ("n", "e", "x", "s"),
                                   ("n", "e", "b", "x"), ("ne", "", "b", "s"), ("", "ne", "b", "s")])  # fmt: skip
def test_a_chain_is_bound_to_node_epoch_boot_and_schema(other: tuple[str, str, str, str]) -> None:
    """Another one of these four, or the same letters divided otherwise, begins another chain."""
    assert chain.first_head("n", "e", "b", "s") != chain.first_head(*other)


def test_signatures_cover_the_whole_record() -> None:
    """A signature is one over the head and all else that its record says; the stream signs checkpoints and the stop."""
    signed: list[bytes] = []

    def sign(text: bytes) -> bytes:
        signed.append(text)
        return hashlib.sha512(text).digest()

    row = stream(sign=sign)
    rows = written(row, row.start(1, "begins", {}))
    rows += written(row, row.stop(2, 1.0, {"read": 1, "attempted": 2}, "ends"))

    assert [None, hashlib.sha512(signed[0]).hexdigest(), hashlib.sha512(signed[1]).hexdigest()] == [
        one["testimony"]["signature"] for one in rows
    ]
    for one, text in zip(rows[1:], signed, strict=True):
        assert text == chain.signed_text(SCHEMA, one | {"time": 2})
        own = one["testimony"]
        changed = [one | {"time": 2} | change for change in (
            {"kind": "bind"}, {"node": "x"}, {"epoch": "x"}, {"pos": 9}, {"time": 3}, {"message": "x"},
            *({"testimony": own | {field: "x"}} for field in ("boot_id", "first_pos", "last_pos", "digest", "head")),
            {"testimony": own | {"counts": [("read", 1)]}},
        )]  # fmt: skip
        assert text not in {chain.signed_text(SCHEMA, row) for row in changed}
    assert signed[0] != chain.signed_text("00" * 32, rows[1] | {"time": 2})


# --- when ---------------------------------------------------------------------------------------------------------


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
    early, late = event.new_epoch(1_700_000_000_000, 0xFFFF), event.new_epoch(1_700_000_000_001, 0)

    assert (16, 16) == (len(early), len(late))
    assert early < late
