"""Sorting: any number of rows in the one order, whatever the batches and the limits, within bounded memory."""

from __future__ import annotations

import random
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import sort
from pipeline.errors import Unavailable
from tests.stored import batch, bind
from tests.strategies import Row, events, rows_of

TINY: dict[str, int] = {"run_bytes": 4_000, "fan_in": 3, "piece_bytes": 1_500}
"""Limits under which a few dozen rows make many runs, of several levels, of a few pieces each."""

KEYED = events(
    time=st.integers(0, 6), node=st.sampled_from(["a", "b", "\u00e9", "\U0001f600"]),
    epoch=st.sampled_from(["0" * 16, "1" * 16]), pos=st.integers(0, 3),
)  # fmt: skip


def key(row: Row) -> tuple[Any, ...]:
    """What is ordered by; text as its bytes."""
    return row["time"], row["node"].encode(), row["epoch"].encode(), row["pos"]


def out(batches: list[pa.RecordBatch], **limits: int) -> list[Row]:
    """The sorted rows."""
    return [row for part in sort.in_order(iter(batches), **limits) for row in rows_of(part)]


@settings(max_examples=25)
@given(st.lists(st.lists(KEYED, max_size=6), max_size=8), st.randoms(use_true_random=False))
def test_the_order_is_one_whatever_the_batches_and_the_limits(parts: list[list[Row]], chance: random.Random) -> None:
    """Rows come out by key, none lost or added, and the same bytes when they came in another order."""
    rows = [row for part in parts for row in part]
    shuffled = list(rows)
    chance.shuffle(shuffled)

    found = out([batch(part) for part in parts], **TINY)

    assert list(map(key, found)) == sorted(map(key, rows))
    assert sorted(map(repr, found)) == sorted(map(repr, rows_of(batch(rows))))
    assert (
        found == out([batch(shuffled)]) == out([batch(shuffled[at : at + 3]) for at in range(0, len(rows), 3)], **TINY)
    )


def test_many_runs_of_several_levels() -> None:
    """Hundreds of rows over dozens of runs, each key once."""
    rows = [bind(pos, time=pos * 7919 % 2000, node=f"node-{pos % 3}") for pos in range(2_000)]
    parts = [batch(rows[first : first + 40]) for first in range(0, 2_000, 40)]

    found = out(parts, run_bytes=20_000, fan_in=4, piece_bytes=4_000)

    assert sorted(map(key, rows_of(batch(rows)))) == [key(row) for row in found]


def test_rows_with_one_key_have_one_order_over_many_pieces() -> None:
    """However the rows of one key lie in runs and pieces, they come out in the order of what they say."""
    rows = [bind(0, time=5, port=1 + number) for number in range(60)]
    found = []
    for seed in range(3):
        random.Random(seed).shuffle(rows)
        found.append(out([batch(rows[first : first + 7]) for first in range(0, 60, 7)], **TINY))

    assert found[0] == found[1] == found[2] == out([batch(rows)])
    assert 60 == len({row["port"] for row in found[0]})


def test_thousands_of_rows_with_one_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond a limit rows with the same key keep the order in which they came; none is lost."""
    monkeypatch.setattr(sort, "MAX_TIES", 16)
    rows = [bind(0, time=5, port=1 + number) for number in range(300)]

    found = out([batch(rows[first : first + 10]) for first in range(0, 300, 10)], **TINY)

    assert sorted(row["port"] for row in rows) == sorted(row["port"] for row in found)


def test_memory_is_bounded() -> None:
    """Sorting twenty times what may be in memory holds a small multiple of that, and few files."""
    run = 256 << 10
    one = batch([bind(0, comm="x" * 200)]).take(pa.array([0] * 500))
    place = one.schema.get_field_index("time")
    chance = random.Random(7)

    files: list[int] = []

    def parts() -> Iterator[pa.RecordBatch]:
        for _ in range(20 * run // one.nbytes + 1):
            times = pa.array([chance.randrange(10**9) for _ in range(500)], pa.int64()).cast(pa.timestamp("us"))
            files.append(len(list(Path("/proc/self/fd").iterdir())))
            yield one.set_column(place, one.schema.field(place), times)

    before, most, count = pa.total_allocated_bytes(), 0, 0
    for part in sort.in_order(parts(), run_bytes=run, fan_in=4, piece_bytes=run // 32, out_bytes=run // 4):
        count += part.num_rows
        most = max(most, pa.total_allocated_bytes() - before)

    assert count == 500 * (20 * run // one.nbytes + 1)
    assert most < 6 * run
    assert max(files) - files[0] <= 2 * 4


def test_a_full_temporary_folder_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full while runs are written, or merged, ends it with a sentence that names folder and reason."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "bindsnoop-test", tmp_path], check=True)
    try:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        chance = random.Random(7)
        parts = (batch([bind(pos, comm=chance.randbytes(100).hex()) for pos in range(50)]) for _ in range(100))

        with pytest.raises(Unavailable) as refused:
            list(sort.in_order(parts, run_bytes=20_000))

        assert "No space left on device" in str(refused.value)
        assert str(tmp_path) in str(refused.value)
        assert list(tmp_path.iterdir()) == []
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)
