"""What waits on disk for a topic: read back in order as it was written, and how far the topic has it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import archive, avro, spool
from pipeline.agent import unpack
from pipeline.errors import SinkUnavailable
from tests import commands, stored
from tests.strategies import batches

EPOCH = "019a0b1c2d3e4f50"
LATER = "019a0b1c2d3e4f51"
MIDNIGHT = 1_767_312_000_000_000
"""2026-01-02T00:00:00Z in microseconds."""


class Clock:
    """Seconds since 1970 that pass when a test says so."""

    def __init__(self) -> None:
        self.secs = MIDNIGHT / 1e6

    def __call__(self) -> float:
        return self.secs


def writer(folder: Path, **settings: Any) -> archive.Writer:
    return archive.Writer(folder, **{"node": "node-1", "epoch": EPOCH, "now": Clock()} | settings)


def write(to: archive.Writer, *positions: int, times: Sequence[int] = (), epoch: str = EPOCH) -> list[bytes]:
    """One batch; its datums."""
    rows = [stored.bind(pos, epoch=epoch) for pos in positions]
    for row, time in zip(rows, times, strict=False):
        row["time"] = time
    batch = stored.batch(rows)
    datums = avro.encode(batch)
    to.write(datums, positions[0], batch.column("time"))
    return datums.to_pylist()


def backlog(folder: Path) -> spool.Backlog:
    return spool.Backlog(folder, "node-1", unpack)


def parts(source: spool.Backlog, first: int, last: int, epoch: str = EPOCH) -> list[spool.Part]:
    """All that is said about a range, from its first position to its last."""
    found = []
    while first <= last:
        found.append(source.read(epoch, first, last))
        assert first <= found[-1].last_pos <= last
        first = found[-1].last_pos + 1
    return found


def told(found: list[spool.Part]) -> list[tuple[int, int, bool]]:
    """First and last position of each part, and whether it is there; neighbours that are there as one."""
    joined: list[tuple[int, int, bool]] = []
    for part in found:
        there = not part.reason
        if joined and there and joined[-1][2]:
            joined[-1] = (joined[-1][0], part.last_pos, True)
        else:
            joined.append((part.first_pos, part.last_pos, there))
    return joined


# --- reading back


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(-3, 3), min_size=1, max_size=6), min_size=1, max_size=8),
    st.integers(1, 4),
    st.data(),
)
def test_whatever_was_written_comes_back_in_order(
    tmp_path_factory: pytest.TempPathFactory, times: list[list[int]], small: int, data: st.DataObject
) -> None:
    """From any position to any other, byte for byte: also around midnight, where two days are written in turns."""
    folder = tmp_path_factory.mktemp("spool")
    out = writer(folder, segment_bytes=small * 2048)
    written: list[bytes] = []
    for batch in times:
        written += write(
            out, *range(len(written), len(written) + len(batch)), times=[MIDNIGHT + offset for offset in batch]
        )
    first = data.draw(st.integers(0, len(written) - 1))
    last = data.draw(st.integers(first, len(written) - 1))

    found = parts(backlog(folder), first, last)

    assert [pos for part in found for pos in part.positions.tolist()] == list(range(first, last + 1))
    assert [datum for part in found for datum in part.datums.to_pylist()] == written[first : last + 1]


@settings(max_examples=40, deadline=None)
@given(batches(min_size=1))
def test_a_datum_is_not_changed_by_the_way_back(batch: pa.RecordBatch) -> None:
    """Decoding a block and encoding it again gives the bytes that were there, whatever the events hold."""
    datums = avro.encode(batch)
    count, payload = avro.encode_block(datums)

    again = avro.encode(avro.decode_block(payload, count))

    assert datums.to_pylist() == again.to_pylist()


def test_what_is_written_meanwhile_is_found(tmp_path: Path) -> None:
    """A segment that grows, is closed, and is followed by another one while it is read."""
    out, source = writer(tmp_path), backlog(tmp_path)
    write(out, 0, 1, 2)
    begun = parts(source, 0, 2)
    write(out, 3, 4)
    grown = parts(source, 3, 4)
    out.close()
    write(out, 5, 6)

    assert [[(0, 2, True)], [(3, 4, True)], [(5, 6, True)]] == [told(begun), told(grown), told(parts(source, 5, 6))]


def test_a_segment_that_is_gone(tmp_path: Path) -> None:
    """What retention deleted is said to be missing, from where to where, and what comes behind it is read."""
    out = writer(tmp_path, segment_bytes=1)
    for first in (0, 3, 6):
        write(out, first, first + 1, first + 2)
    next(tmp_path.rglob("*-3.avro")).unlink()

    found = parts(backlog(tmp_path), 1, 8)

    assert [(1, 2, True), (3, 5, False), (6, 8, True)] == told(found)
    assert ["they are no longer on disk"] == [part.reason for part in found if part.reason]
    assert [(9, 20, False)] == told(parts(backlog(tmp_path), 9, 20))


def test_a_block_that_is_damaged(tmp_path: Path) -> None:
    """Its positions are missing, with the reason; the blocks beside it are read."""
    out = writer(tmp_path)
    for first in (0, 3, 6):
        write(out, first, first + 1, first + 2)
    out.close()
    (path,) = tmp_path.rglob("*.avro")
    raw = bytearray(path.read_bytes())
    second = raw.index(b"\x28\xb5\x2f\xfd", raw.index(b"\x28\xb5\x2f\xfd") + 4)
    raw[second + 20] ^= 1
    path.write_bytes(raw)

    found = parts(backlog(tmp_path), 0, 8)

    assert [(0, 2, True), (3, 5, False), (6, 8, True)] == told(found)
    assert "is damaged at byte" in next(part.reason for part in found if part.reason)


def test_epochs_are_apart(tmp_path: Path) -> None:
    """Positions begin anew with each epoch; what is behind a place is a range an epoch, the oldest first."""
    first = writer(tmp_path)
    write(first, 0, 1, 2)
    first.close()
    second = writer(tmp_path, epoch=LATER)
    write(second, 0, 1, epoch=LATER)

    def left(after: spool.Place | None) -> list[tuple[str, int, int]]:
        return list(map(tuple, spool.left_by_earlier_lives(tmp_path, "node-1", after, unpack)))  # type: ignore[arg-type]

    assert [(EPOCH, 0, 2), (LATER, 0, 1)] == left(None)
    assert [(EPOCH, 2, 2), (LATER, 0, 1)] == left(spool.Place(EPOCH, 1))
    assert [(LATER, 0, 1)] == left(spool.Place(EPOCH, 2))
    assert [] == left(spool.Place(LATER, 1))
    assert [] == spool.left_by_earlier_lives(tmp_path, "node-2", None, unpack)
    source = backlog(tmp_path)
    assert [[(0, 2, True)], [(0, 1, True)]] == [
        told(parts(source, 0, 2)), told(parts(source, 0, 1, epoch=LATER)),
    ]  # fmt: skip


# --- how far it is


def acknowledged(folder: Path, clock: Clock | None = None, topic: str = "binds") -> spool.Acknowledged:
    return spool.Acknowledged(
        folder,
        node="node-1",
        topic=topic,
        last_pos=lambda segment: spool.last_position(segment, unpack),
        monotonic=clock or Clock(),
    )


def file_of(folder: Path) -> Path:
    (path,) = folder.rglob("*.json")
    return path


@given(st.text("0123456789abcdef", min_size=16, max_size=16), st.integers(-1, 2**62), st.text(min_size=1, max_size=30))
def test_a_place_is_found_again(tmp_path_factory: pytest.TempPathFactory, epoch: str, pos: int, topic: str) -> None:
    """By the next life, for this topic and no other."""
    folder = tmp_path_factory.mktemp("spool")
    one = acknowledged(folder, topic=topic)
    one.reached(spool.Place(epoch, pos))
    one.tick()

    assert (spool.Place(epoch, pos), None) == (acknowledged(folder, topic=topic).at, acknowledged(folder).damage)
    assert acknowledged(folder, topic=topic + "x").at is None


def test_damage_is_never_another_place(tmp_path: Path) -> None:
    """Every flip of a bit and every cut of the file is noticed, and nothing counts as acknowledged then."""
    one = acknowledged(tmp_path)
    one.reached(spool.Place(EPOCH, 41))
    one.tick()
    path = file_of(tmp_path)
    good = path.read_bytes()
    broken = [good[:cut] for cut in range(len(good) - 1)]
    broken += [bytes([*good[:at], good[at] ^ 1 << bit, *good[at + 1 :]]) for at in range(len(good)) for bit in range(8)]
    found = []
    for raw in broken:
        path.write_bytes(raw)
        found.append(acknowledged(tmp_path))

    # White space around the object means nothing.
    assert {None, spool.Place(EPOCH, 41)} >= {one.at for one in found}
    assert [one.at for one in found].count(spool.Place(EPOCH, 41)) <= 3
    assert {f"The acknowledged position in {path} is damaged."} == {one.damage for one in found if one.at is None}


@pytest.mark.parametrize("raw", [b"", b"[]", b"1", b"\xff", b"[" * 100_000, b'{"topic":"binds","epoch":1,"pos":"x"}'])
def test_a_file_that_is_none_of_ours(tmp_path: Path, raw: bytes) -> None:
    """Whatever it holds, it is one sentence."""
    one = acknowledged(tmp_path)
    one.reached(spool.Place(EPOCH, 1))
    one.tick()
    file_of(tmp_path).write_bytes(raw)

    assert (None, f"The acknowledged position in {file_of(tmp_path)} is damaged.") == (
        acknowledged(tmp_path).at,
        acknowledged(tmp_path).damage,
    )


def test_it_is_written_once_a_second(tmp_path: Path) -> None:
    """And at once when it must be; what a kill left half written is not looked at."""
    clock = Clock()
    one = acknowledged(tmp_path, clock)

    def on_disk() -> int:
        return int(json.loads(file_of(tmp_path).read_bytes())["pos"])

    found = []
    for pos, passed, now in ((1, 0, False), (2, 0.5, False), (3, 0.5, False), (4, 0, True)):
        clock.secs += passed
        one.reached(spool.Place(EPOCH, pos))
        one.tick(now=now)
        found.append(on_disk())
    file_of(tmp_path).with_name("binds.json.new").write_bytes(b'{"topic"')

    assert [1, 1, 3, 4] == found
    assert spool.Place(EPOCH, 4) == acknowledged(tmp_path).at


def test_a_disk_that_refuses_the_place(tmp_path: Path) -> None:
    """It is one sentence, and the next try may work."""
    (tmp_path / "acknowledged").touch()
    one = acknowledged(tmp_path)
    one.reached(spool.Place(EPOCH, 1))
    with pytest.raises(SinkUnavailable, match=r"^The acknowledged position \S+ cannot be written: Not a directory\.$"):
        one.tick()
    (tmp_path / "acknowledged").unlink()
    one.tick(now=True)

    assert spool.Place(EPOCH, 1) == acknowledged(tmp_path).at


# --- what may be deleted


def spooling(folder: Path, clock: Clock, **settings: Any) -> tuple[archive.Writer, spool.Acknowledged]:
    """A spool with a segment for each of positions 0 to 2, 3 to 5 and 6 to 8."""
    one = acknowledged(folder, clock)
    out = writer(folder, now=clock, segment_bytes=1, receipt=one, **{"spool": True} | settings)
    for first in (0, 3, 6):
        write(out, first, first + 1, first + 2)
    return out, one


def left(folder: Path) -> list[int]:
    return [segment.first_pos for segment in archive.segments(folder, "node-1")]


def test_a_spool_keeps_what_is_not_acknowledged(tmp_path: Path) -> None:
    """A segment goes when the last record in it is acknowledged, and not before that is on disk."""
    clock = Clock()
    out, one = spooling(tmp_path, clock)
    found = []
    for pos, saved in ((-1, True), (2, False), (4, True), (5, True)):
        one.reached(spool.Place(EPOCH, pos))
        if saved:
            one.tick(now=True)
        gone = out.retire()
        found.append((left(tmp_path), [(retired.first_pos, retired.unsent) for retired in gone]))

    assert [([0, 3, 6], []), ([0, 3, 6], []), ([3, 6], [(0, False)]), ([6], [(3, False)])] == found


def test_a_spool_of_an_earlier_life(tmp_path: Path) -> None:
    """Whether a segment is acknowledged is read from it, where this life has not written it."""
    clock = Clock()
    out, _ = spooling(tmp_path, clock)
    out.close()
    one = acknowledged(tmp_path, clock)
    one.reached(spool.Place(EPOCH, 4))
    one.tick()
    again = writer(tmp_path, epoch=LATER, now=clock, receipt=one, spool=True)

    assert [0] == [retired.first_pos for retired in again.retire()]
    one.reached(spool.Place(LATER, -1))
    one.tick(now=True)
    assert [3, 6] == [retired.first_pos for retired in again.retire()]


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"spool": True, "keep_secs": 60}, [(0, False), (3, True)]),
        ({"spool": True, "keep_bytes": 1}, [(0, False), (3, True)]),
        ({"spool": False, "keep_secs": 60}, [(0, False)]),
        ({"spool": False, "keep_bytes": 1}, [(0, False), (3, True)]),
        ({"spool": False}, []),
    ],
)
def test_what_is_not_acknowledged_goes_last(
    tmp_path: Path, limits: dict[str, Any], expected: list[tuple[int, bool]]
) -> None:
    """Size ends it anywhere, age in a spool alone, and it is said that it was not acknowledged."""
    clock = Clock()
    out, one = spooling(tmp_path, clock, **limits)
    one.reached(spool.Place(EPOCH, 3))
    one.tick()
    clock.secs += 3600

    assert expected == [(retired.first_pos, retired.unsent) for retired in out.retire()]


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A file system of 12 MiB."""
    with commands.small_disk("12m") as folder:
        yield folder


def test_on_a_full_disk_the_oldest_goes(small_disk: Path) -> None:
    """It is said which, and the newest is on disk: nothing that is written is refused."""
    out = writer(small_disk, segment_bytes=2 << 20)
    gone: list[archive.Retired] = []
    count = 0
    while sum(retired.count for retired in gone) < 20:
        row = stored.batch([stored.bind(count, message=_noise(count))])
        out.write(avro.encode(row), count, row.column("time"))
        count += 1
        gone += out.tick()
    out.close()

    found = parts(backlog(small_disk), 0, count - 1)
    lost = sum(retired.count for retired in gone)
    assert all(retired.full for retired in gone)
    assert [(0, lost - 1, False), (lost, count - 1, True)] == told(found)


def _noise(seed: int) -> str:
    """100 kB that do not pack."""
    import random

    return random.Random(seed).randbytes(50_000).hex()
