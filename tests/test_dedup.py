"""Each event once: what is a copy, what contradicts, what is nobody's of ours, and how much is remembered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import dedup
from tests.stored import batch, bind, own

Place = tuple[str, int]
EPOCHS = ("0" * 16, "019b76daa8000007")


def sifted(seen: dedup.Seen, *rows: dict[str, Any]) -> dedup.Sifted:
    """What is left of these rows."""
    return seen.sift(batch(rows))


def ports(found: dedup.Sifted) -> list[int | None]:
    """Ports of what is left."""
    return list(found.batch.column("port").to_pylist())


PLACES = st.lists(st.lists(st.tuples(st.sampled_from(EPOCHS), st.integers(0, 40)), max_size=30), min_size=1, max_size=8)


@given(PLACES, st.sampled_from([dedup.CHUNK - 20, 0, dedup.CHUNK * 7 - 1]))
def test_every_event_once_in_its_order(parts: Sequence[Sequence[Place]], base: int) -> None:
    """Whatever the order and the division into batches: the first of each identity is kept, and nothing else is."""
    seen, known = dedup.Seen(), set()

    for places in parts:
        found = seen.sift(batch([bind(base + pos, epoch=epoch, comm=f"{epoch}-{pos}") for epoch, pos in places]))

        expected = []
        for place in places:
            if place not in known:
                known.add(place)
                expected.append(place)
        kept = found.batch.select(["epoch", "pos"]).to_pylist()
        assert expected == [(row["epoch"], row["pos"] - base) for row in kept]
        assert (len(places) - len(expected), [], []) == (found.copies, found.contradictions, found.notes)


def test_a_run_is_one_interval() -> None:
    """A stream in order, interrupted and sent again, takes one interval whatever its length."""
    seen = dedup.Seen()
    for first in (100, 300, 0, 50, 200, 0, 400):
        sifted(seen, *(bind(pos) for pos in range(first, first + 100)))

    (known,) = seen._epochs.values()
    assert ([0], [500]) == (known.starts.tolist(), known.ends.tolist())


def test_nodes_and_epochs_are_apart() -> None:
    """The same position of another node or epoch is another event."""
    seen = dedup.Seen()
    rows = [bind(7, node=node, epoch=epoch) for node in ("a", "b", "ab") for epoch in EPOCHS]

    assert [0, 6] == [sifted(seen, *rows).copies, sifted(seen, *rows[::-1]).copies]


@pytest.mark.parametrize(
    "changes",
    [
        {"time": 5}, {"pid": 7}, {"port": 9}, {"comm": "nginx-prosess-0"}, {"comm": "nginx-process-1"}, {"addr": "::1"},
        {"errno": 98}, {"asked_port": 0}, {"cookie": 5}, {"message": "another"}, {"boottime_ns": None},
    ],
    ids=str,
)  # fmt: skip
def test_another_event_with_one_identity_is_kept_and_named(changes: dict[str, Any]) -> None:
    """In the same batch, in a later one, and after a copy; the true copies are left out all the same."""
    seen = dedup.Seen()
    one = bind(5, comm="nginx-process-0")
    other = one | changes

    together = sifted(dedup.Seen(), one, other, one)
    first, again = sifted(seen, bind(4), one), sifted(seen, one, other, bind(6))

    named = [dedup.Contradiction("node-1", "0" * 16, 5, 1)]
    assert (2, 1, named) == (together.batch.num_rows, together.copies, together.contradictions)
    assert (2, 0, []) == (first.batch.num_rows, first.copies, first.contradictions)
    assert (2, 1, named) == (again.batch.num_rows, again.copies, again.contradictions)


def test_the_streams_own_records_count_too() -> None:
    """A loss that comes twice is one loss; another message with its identity is another."""
    seen = dedup.Seen()

    assert 1 == sifted(seen, own(3), own(3)).copies
    assert 1 == len(sifted(seen, own(3, message="lost 6 samples")).contradictions)


@pytest.mark.parametrize(
    "changes",
    [
        {"pos": -1}, {"pos": -(2**63)}, {"pos": 2**63 - 1}, {"pos": 2**62 + 1}, {"epoch": ""}, {"epoch": "x" * 16},
        {"epoch": "0" * 15}, {"epoch": "0" * 17}, {"epoch": "A" * 16}, {"node": ""}, {"node": "n" * 254},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_nobodys_of_ours_is_never_left_out(changes: dict[str, Any]) -> None:
    """Records without an identity are all kept, beside ours, and are no contradiction."""
    seen = dedup.Seen()
    stranger = bind(0) | changes
    rows = [bind(0), stranger, stranger, bind(1), bind(0)]

    first, again = sifted(seen, *rows), sifted(seen, *rows)

    assert 1 == sifted(dedup.Seen(), stranger).batch.num_rows
    assert (4, 1, []) == (first.batch.num_rows, first.copies, first.contradictions)
    assert (2, 3, []) == (again.batch.num_rows, again.copies, again.contradictions)


def test_strewn_positions_are_forgotten_and_that_is_said_once() -> None:
    """Beyond the limit events are shown again and never left out; a long run is remembered longest."""
    seen = dedup.Seen(intervals=8)
    run = [bind(pos) for pos in range(100)]
    strewn = [bind(pos) for pos in range(1_000, 9_000, 2)]

    sifted(seen, *run)
    notes = [note for row in strewn for note in sifted(seen, row).notes]
    again = sifted(seen, *strewn, *run)

    assert 100 <= again.copies <= 108
    assert [] == again.contradictions
    assert 1 == len(notes)
    assert "more than 8 holes" in notes[0]
    assert sum(len(known.starts) for known in seen._epochs.values()) <= 8


@pytest.mark.parametrize(("limits", "said"), [({"epochs": 10}, "10 epochs"), ({"all_intervals": 10}, "10 holes")])
def test_too_many_epochs_are_forgotten_and_that_is_said_once(limits: dict[str, int], said: str) -> None:
    """The one that was not read for longest goes first; what is forgotten is shown again."""
    seen = dedup.Seen(**limits)
    many = [bind(0, epoch=f"{number:016x}") for number in range(100)]

    first, last = sifted(seen, *many), sifted(seen, *many[-10:-5])
    oldest, again = sifted(seen, *many[:5]), sifted(seen, *many[-10:])

    assert ([0, 5, 0, 5], [[], [], []]) == (
        [found.copies for found in (first, last, oldest, again)], [found.notes for found in (last, oldest, again)]
    )  # fmt: skip
    assert 1 == len(first.notes)
    assert said in first.notes[0]
    assert len(seen._epochs) <= 10


def test_bits_of_the_newest_events_alone_are_remembered() -> None:
    """What lies further back is told by its identity alone, and that is said once."""
    seen = dedup.Seen(chunks=2)
    for first in range(0, 4 * dedup.CHUNK, dedup.CHUNK):
        sifted(seen, *(bind(pos) for pos in range(first, first + dedup.CHUNK)))

    far, further = sifted(seen, bind(5, comm="other")), sifted(seen, bind(6, comm="other"))
    near = sifted(seen, bind(4 * dedup.CHUNK - 1, comm="other"))

    assert [(1, 0), (1, 0), (0, 1)] == [(one.copies, len(one.contradictions)) for one in (far, further, near)]
    assert [1, 0, 0] == [len(one.notes) for one in (far, further, near)]
    assert f"{2 * dedup.CHUNK:,}" in far.notes[0]
