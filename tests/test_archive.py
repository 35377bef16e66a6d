"""Segments: what is written is there, in the standard format, whatever the disk, the clock or a kill did meanwhile."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import fastavro
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import archive, avro, event
from pipeline.errors import DatumDamaged, SinkUnavailable, SourceUnavailable
from tests.broker import avro_tools
from tests.strategies import HARM, Row, batch_of, batches, plain_event, rows_of

ROOT = Path(__file__).parent.parent
EPOCH = "019a0b1c2d3e4f50"
NOON = 1_767_268_800_000_000
"""2026-01-01T12:00:00Z in microseconds."""
DAY = 86_400_000_000


class Clock:
    """Seconds since 1970 that pass when a test says so."""

    def __init__(self) -> None:
        self.secs = NOON / 1e6

    def __call__(self) -> float:
        return self.secs


def writer(folder: Path, **settings: Any) -> archive.Writer:
    return archive.Writer(folder, **{"node": "node-1", "epoch": EPOCH, "now": Clock()} | settings)


def write(to: archive.Writer, *positions: int, times: list[int] | None = None) -> None:
    rows = [plain_event(pos, time=NOON + pos) for pos in positions]
    for row, time in zip(rows, times or [], strict=False):
        row["time"] = time
    batch = batch_of(rows)
    to.write(avro.encode(batch), positions[0], batch.column("time"))


def events_of(*paths: Path, **selection: Any) -> tuple[list[Row], list[archive.Unread]]:
    """What can be read, as a command reads it: blocks that do not decode are taken apart once."""
    rows: list[Row] = []
    unread: list[archive.Unread] = []
    for item in archive.read(paths, **selection):
        if isinstance(item, archive.Unread):
            unread.append(item)
            continue
        for block in [item] if decodes(item) else item.split():
            if decodes(block):
                rows += rows_of(avro.decode_block(block.payload, block.count, avro.admit(block.schema_text)))
            else:
                unread.append(archive.Unread(block.path, block.offset, block.offset, "does not decode"))
    return rows, unread


def decodes(block: archive.Block) -> bool:
    try:
        avro.decode_block(block.payload, block.count, avro.admit(block.schema_text))
    except DatumDamaged:
        return False
    return True


def positions_of(*paths: Path, **selection: Any) -> list[int]:
    rows, unread = events_of(*paths, **selection)
    assert [] == unread
    return [row["pos"] for row in rows]


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# --- the format


@settings(max_examples=40, deadline=None)
@given(batches(min_size=1))
def test_a_segment_is_a_standard_container(tmp_path_factory: pytest.TempPathFactory, batch: pa.RecordBatch) -> None:
    """fastavro reads every row of a segment, and so do we."""
    folder = tmp_path_factory.mktemp("archive")
    out = writer(folder)

    out.write(avro.encode(batch), 0, batch.column("time"))
    out.close()

    byday = sorted(rows_of(batch), key=lambda row: row["time"] // DAY)
    theirs = []
    for path in sorted(folder.rglob("*.avro")):
        with path.open("rb") as file:
            for row in fastavro.reader(file):
                theirs.append(
                    row | {"time": (row["time"] - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)}
                )
    assert byday == theirs == events_of(folder)[0]


def test_avro_tools_reads_every_row(tmp_path: Path) -> None:
    """Apache's own tool gives every event of a segment, with labels, testimony, harmful text and the empty ones."""
    rows = [plain_event(pos, time=NOON + pos, comm=text, labels={text: text}) for pos, text in enumerate(HARM)]
    counts = {"boot_id": "b", "first_pos": 0, "last_pos": 9, "counts": {"lost": 2}} | dict.fromkeys(
        ("digest", "head", "signature")
    )
    rows.append(dict.fromkeys(event.fields()) | {
        "type": "info", "kind": "checkpoint", "node": "n", "epoch": EPOCH, "pos": len(rows), "time": NOON, "labels": {},
        "testimony": counts,
    })  # fmt: skip
    batch = batch_of(rows)
    out = writer(tmp_path)
    out.write(avro.encode(batch), 0, batch.column("time"))
    out.close()
    (path,) = tmp_path.rglob("*.avro")

    run = subprocess.run([*avro_tools(), "tojson", str(path)], capture_output=True, check=True)

    lines = run.stdout.decode("utf-8").split("\n")[:-1]
    assert rows == [plainly(json.loads(line)) for line in lines]


def plainly(value: Any) -> Any:
    """A row of Avro's JSON without the names of the branches of its unions."""
    if not isinstance(value, dict):
        return value
    if len(value) == 1 and next(iter(value)) in ("string", "int", "long", "boolean", "bindsnoop.Testimony"):
        return plainly(next(iter(value.values())))
    return {key: plainly(inner) for key, inner in value.items()}


def test_path_and_metadata(tmp_path: Path) -> None:
    """A segment lies by day and node, is named by start, epoch and position, and says in its header what it is."""
    out = writer(tmp_path)
    write(out, 41, 42)
    out.close()

    (path,) = tmp_path.rglob("*.avro")
    with path.open("rb") as file:
        reader = fastavro.reader(file)

    assert f"date=2026-01-01/node=node-1/20260101T120000Z-{EPOCH}-41.avro" == str(path.relative_to(tmp_path))
    assert event.schema_text() == reader.metadata["avro.schema"]
    assert ("zstandard", "node-1", EPOCH, "41") == tuple(
        reader.metadata[key] for key in ("avro.codec", "bindsnoop.node", "bindsnoop.epoch", "bindsnoop.first_pos")
    )


@pytest.mark.parametrize("node", ["../../etc", "/", "", ".", "a/b", "x" * 500, "n\x00\x1b[31m", "ü", "a=b,c", "[x]*?"])
def test_a_node_name_stays_in_its_folder(tmp_path: Path, node: str) -> None:
    """Whatever a node is called, its segments lie in one folder of their day, and are found again."""
    out = writer(tmp_path / "archive", node=node)
    write(out, 0)
    left = writer(tmp_path / "archive", node=node)
    out.close()
    left.close()

    (path,) = (tmp_path / "archive").rglob("*.avro")
    assert tmp_path / "archive/date=2026-01-01" == path.parent.parent
    assert path.parent.name.isascii()
    assert path.parent.name.isprintable()
    assert [0] == positions_of(tmp_path)


def test_times_may_be_numbers_or_arrow(tmp_path: Path) -> None:
    """Times come as int64, as datetime64 or as a timestamp column."""
    datums = avro.encode(batch_of([plain_event(0, time=NOON)]))
    out = writer(tmp_path)

    for pos, times in enumerate([np.array([NOON]), np.array([NOON], "M8[us]"), pa.array([NOON], pa.timestamp("us"))]):
        out.write(datums, pos, times)
    out.close()

    assert 1 == len(files_below(tmp_path))
    with pytest.raises(ValueError, match="1 datums have 2 times"):
        out.write(datums, 3, np.array([NOON, NOON]))


def test_events_of_two_days_lie_in_two_folders(tmp_path: Path) -> None:
    """Around midnight every event goes to the folder of its own day, however they are mixed; none is lost."""
    midnight = NOON + DAY // 2
    out = writer(tmp_path)

    write(out, 0, 1, 2, 3, 4, times=[midnight - 2, midnight, midnight - 1, midnight + 1, midnight - 1])
    write(out, 5, 6, times=[midnight - 1, midnight + 9])
    out.close()

    first, second = sorted(tmp_path.rglob("*.avro"))
    assert ("date=2026-01-01", "date=2026-01-02") == (first.parent.parent.name, second.parent.parent.name)
    assert ([0, 2, 4, 5], [1, 3, 6]) == (positions_of(first), positions_of(second))
    assert [1, 3, 6] == positions_of(tmp_path, since_us=midnight)
    assert [0, 2, 4, 5] == positions_of(tmp_path, until_us=midnight)
    assert [0, 2, 4, 5, 1, 3, 6] == positions_of(tmp_path, since_us=midnight - 1, until_us=midnight + 1)


def test_a_clock_that_jumps_keeps_few_files_open(tmp_path: Path) -> None:
    """Times all over the calendar do not exhaust file descriptors, and nonsense stays inside the calendar."""
    out = writer(tmp_path)
    before = len(list(Path("/proc/self/fd").iterdir()))

    write(out, *range(50), times=[NOON + DAY * (pos % 25) for pos in range(50)])
    write(out, 50, 51, times=[-(2**60), 2**60])
    write(out, 52)

    assert len(list(Path("/proc/self/fd").iterdir())) <= before + archive.MAX_OPEN + 1
    out.close()
    assert set(range(53)) == set(positions_of(tmp_path))


def test_big_writes_become_blocks_of_a_mebibyte(tmp_path: Path) -> None:
    """A batch of any size is cut into blocks that a reader can hold; a small one is a block as it is."""
    rows = [plain_event(pos, time=NOON, message="x" * 1000) for pos in range(3000)]
    out = writer(tmp_path)
    batch = batch_of(rows)

    out.write(avro.encode(batch), 0, batch.column("time"))
    out.close()

    (path,) = tmp_path.rglob("*.avro")
    with path.open("rb") as file:
        sizes = [block.num_records for block in fastavro.block_reader(file)]
    assert (4, 3000) == (len(sizes), sum(sizes))
    assert list(range(3000)) == positions_of(tmp_path)


# --- the life of a segment


def test_what_is_written_can_be_read_before_it_is_closed(tmp_path: Path) -> None:
    """A segment that is still written is a *.partial; its whole blocks are there for any reader."""
    out = writer(tmp_path)
    write(out, 0, 1)
    write(out, 2)

    assert [True] == [name.endswith(".avro.partial") for name in files_below(tmp_path)]
    assert [0, 1, 2] == positions_of(tmp_path)
    out.close()


def test_segments_end_by_size(tmp_path: Path) -> None:
    """A segment that would become longer than allowed is closed first; each starts with its own position."""
    out = writer(tmp_path, segment_bytes=30_000)
    for pos in range(0, 60, 3):
        rows = [
            plain_event(at, time=NOON, message=random.Random(at).randbytes(1500).hex()) for at in range(pos, pos + 3)
        ]
        batch = batch_of(rows)
        out.write(avro.encode(batch), pos, batch.column("time"))
    out.close()

    paths = sorted(tmp_path.rglob("*.avro"), key=lambda path: int(path.stem.rpartition("-")[2]))
    assert len(paths) > 3
    assert all(path.stat().st_size <= 30_000 for path in paths)
    assert [int(path.stem.rpartition("-")[2]) for path in paths] == [positions_of(path)[0] for path in paths]
    assert list(range(60)) == positions_of(tmp_path)


def test_segments_end_by_age_even_when_nothing_happens(tmp_path: Path) -> None:
    """tick closes a segment that is old enough, and one of yesterday after a minute."""
    clock = Clock()
    out = writer(tmp_path, now=clock, segment_secs=3600)
    write(out, 0, 1, times=[NOON, NOON + DAY])

    closed = []
    for secs in (59, 1, 3538, 2):
        clock.secs += secs
        out.tick()
        closed.append(len(list(tmp_path.rglob("*.avro"))))

    assert [0, 1, 1, 2] == closed
    write(out, 2)
    out.close()
    assert [0, 2, 1] == positions_of(tmp_path)


def test_space_is_reserved_and_given_back(tmp_path: Path) -> None:
    """An open segment has room ahead, so that a full disk is met between batches; a closed one takes what it needs."""
    out = writer(tmp_path)
    write(out, 0)
    (path,) = tmp_path.rglob("*.partial")
    ahead = path.stat().st_blocks * 512
    out.close()

    (path,) = tmp_path.rglob("*.avro")
    assert ahead >= 4 << 20
    assert path.stat().st_blocks * 512 < path.stat().st_size + 16_384


def partial_of(tmp_path: Path, blocks: int = 3) -> tuple[Path, list[int]]:
    """A *.partial that a killed process left, and where its header and each of its blocks ends."""
    out = writer(tmp_path)
    ends = []
    for pos in range(blocks):
        write(out, pos)
        (path,) = tmp_path.rglob("*.partial")
        ends.append(path.stat().st_size)
    os.close(out._open[NOON // DAY].fd)
    return path, ends


def test_a_torn_tail_costs_what_was_not_whole(tmp_path: Path) -> None:
    """Wherever a kill cut the file, all whole blocks are read, the rest is said and is no damage; the next life cuts
    it there, gives it its name and writes another."""
    path, ends = partial_of(tmp_path)
    whole = path.read_bytes()
    header = ends[0] - (ends[1] - ends[0])
    for cut in sorted({*range(0, len(whole), 97), *(end + step for end in ends for step in (-17, -16, -1, 0, 1))}):
        path.write_bytes((whole + b"\x02\x04")[:cut])
        expected = [pos for pos, end in enumerate(ends) if end <= cut]

        rows, unread = events_of(tmp_path)
        writer(tmp_path).close()

        assert expected == [row["pos"] for row in rows], cut
        assert all(not one.damage for one in unread), unread
        assert bool(unread) == (cut not in ends and not (abs(cut - header) < 4 and not unread)), cut
        assert expected == positions_of(tmp_path), cut
        assert [] == list(tmp_path.rglob("*.partial"))
        for closed in tmp_path.rglob("*.avro"):
            assert ends[len(expected) - 1] == closed.stat().st_size
            closed.unlink()


def test_a_previous_life_is_not_appended_to(tmp_path: Path) -> None:
    """A new life leaves the old file as it is and starts its own, even at the same position."""
    path, ends = partial_of(tmp_path)

    out = writer(tmp_path)
    write(out, 0)
    out.close()

    old, new = tmp_path.rglob("*.avro")
    assert {path.with_suffix("").name, path.name.replace(".avro.partial", "-1.avro")} == {old.name, new.name}
    assert ends[-1] in (old.stat().st_size, new.stat().st_size)


def test_what_another_process_writes_is_left_alone(tmp_path: Path) -> None:
    """A second writer on the same folder does not take the open segment of the first for a leftover."""
    first = writer(tmp_path)
    write(first, 0)

    second = writer(tmp_path, epoch="019a0b1c2d3e4f51")
    assert 1 == len(list(tmp_path.rglob("*.partial")))
    write(first, 1)
    write(second, 0)
    first.close()
    second.close()

    assert [0, 1, 0] == positions_of(tmp_path)


KILLED = """
import itertools, sys, time
from pathlib import Path
from pipeline import archive, avro
from tests.strategies import batch_of, plain_event
from tests.test_archive import NOON
out = archive.Writer(Path(sys.argv[1]), node="node-1", epoch="019a0b1c2d3e4f50", segment_bytes=20_000, now=time.time)
batch = batch_of([plain_event(0, time=NOON, message="x" * 500)] * 7)
datums = avro.encode(batch)
for write in itertools.count():
    out.write(datums, write * 7, batch.column("time"))
    print(write + 1, flush=True)
"""


@pytest.mark.parametrize("acknowledged", [1, 40, 200])
def test_kill_9_loses_nothing_that_was_acknowledged(tmp_path: Path, acknowledged: int) -> None:
    """Every write that returned is on disk after SIGKILL, and at most the one under way besides, whole or not at
    all."""
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as run:
        assert run.stdout is not None
        for line in run.stdout:
            if int(line) >= acknowledged:
                run.send_signal(signal.SIGKILL)
                break
        rest = run.stdout.read()
    done = int(rest.split()[-1]) if rest.split() else acknowledged

    writer(tmp_path).close()

    assert len(positions_of(tmp_path)) in (done * 7, done * 7 + 7)


# --- a disk that refuses


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", disk], check=False).returncode:
        pytest.skip("needs root to mount a small disk")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def noise(pos: int, count: int = 10, size: int = 500) -> tuple[pa.BinaryArray, pa.Array]:
    """Events that do not compress."""
    dice = random.Random(pos)
    rows = [plain_event(at, time=NOON + at, message=dice.randbytes(size).hex()) for at in range(pos, pos + count)]
    batch = batch_of(rows)
    return avro.encode(batch), batch.column("time")


def test_a_full_disk_breaks_no_file_and_loses_nothing(small_disk: Path) -> None:
    """On a full disk a write says so and leaves whole blocks only; when there is room the same write succeeds, and
    every event is there once."""
    out = writer(small_disk / "archive")
    filler = small_disk / "filler"
    filler.write_bytes(bytes(120_000))
    done, refusals = 0, []
    while done < 250 and len(refusals) < 5:
        try:
            out.write(noise(done, size=600)[0], done, noise(done, size=600)[1])
            done += 10
        except SinkUnavailable as error:
            refusals.append((str(error), done, positions_of(small_disk / "archive")))
            if len(refusals) == 2:
                filler.unlink()
    out.close()

    assert 2 == len(refusals)
    assert all("No space left on device" in sentence for sentence, _, _ in refusals)
    assert [list(range(kept)) for _, kept, _ in refusals] == [there for _, _, there in refusals]
    assert list(range(250)) == positions_of(small_disk / "archive")
    assert [] == list(small_disk.rglob("*.partial"))


@pytest.mark.parametrize("broken", [("fdatasync",), ("pwrite", "ftruncate"), ("fdatasync", "ftruncate", "rename")])
def test_a_disk_that_fails_and_recovers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: tuple[str, ...]
) -> None:
    """While a disk neither syncs nor cuts nor renames, every call says so; afterwards nothing is lost or doubled."""

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    out = writer(tmp_path)
    write(out, 0, 1)
    with monkeypatch.context() as disk:
        for name in broken:
            disk.setattr(archive.os, name, fail)
        disk.setattr(Path, "rename", fail if "rename" in broken else Path.rename)
        for _ in range(3):
            with pytest.raises(SinkUnavailable, match="Input/output error"):
                write(out, 2, 3)
    write(out, 2, 3)
    out.close()

    assert [0, 1, 2, 3] == positions_of(tmp_path)
    assert 2 == len(files_below(tmp_path))


def test_a_deleted_folder_is_noticed_and_made_again(tmp_path: Path) -> None:
    """A segment that was deleted under the writer does not swallow what is written: the write fails, the next works."""
    folder = tmp_path / "archive"
    out = writer(folder)
    write(out, 0)
    subprocess.run(["rm", "-r", folder], check=True)

    with pytest.raises(SinkUnavailable, match="was deleted"):
        write(out, 1)
    write(out, 1)
    out.close()

    assert [1] == positions_of(folder)


def test_a_write_over_midnight_is_done_whole_or_not_at_all(tmp_path: Path) -> None:
    """When the second of two folders cannot be made, the first keeps nothing of the write either."""
    out = writer(tmp_path)
    write(out, 0)
    (tmp_path / "date=2026-01-02").write_text("in the way")
    times = [NOON, NOON + DAY]

    for _ in range(2):
        with pytest.raises(SinkUnavailable, match="date=2026-01-02"):
            write(out, 1, 2, times=times)
    assert [0] == positions_of(tmp_path)
    (tmp_path / "date=2026-01-02").unlink()
    write(out, 1, 2, times=times)
    out.close()

    assert [0, 1, 2] == positions_of(tmp_path)


def test_a_folder_that_cannot_be_made_is_said_at_start(tmp_path: Path) -> None:
    """An archive that cannot exist is an error at once, in one sentence that names it."""
    (tmp_path / "file").write_text("")

    with pytest.raises(SinkUnavailable, match=f"{tmp_path}/file/archive cannot be written"):
        writer(tmp_path / "file/archive")


# --- retention


def test_retention_by_age(tmp_path: Path) -> None:
    """Segments go when their last write is older than allowed, with what was in them; the others stay."""
    clock = Clock()
    out = writer(tmp_path, now=clock, segment_secs=10, keep_secs=3600)
    for pos in (0, 2):
        write(out, pos, pos + 1)
        clock.secs += 10
        assert [] == out.tick()
    write(out, 4)
    first, second = sorted(tmp_path.rglob("*.avro"))

    clock.secs += 3591
    retired = out.tick()

    assert [archive.Retired(first, EPOCH, 0, 1, 2)] == retired
    clock.secs += 60
    assert [archive.Retired(second, EPOCH, 2, 3, 2)] == out.tick()
    clock.secs += 7200
    assert [4] == [one.first_pos for one in out.retire()]
    assert [] == positions_of(tmp_path)


def test_retention_by_bytes(tmp_path: Path) -> None:
    """The oldest segments go until the rest fits; other nodes' segments and other files are not touched."""
    other = writer(tmp_path, node="node-2")
    write(other, 0)
    other.close()
    (tmp_path / "date=2026-01-01/node=node-1").mkdir()
    (tmp_path / "date=2026-01-01/node=node-1/mine.avro").write_bytes(b"x" * 9000)
    out = writer(tmp_path, segment_bytes=1, keep_bytes=60_000)
    for pos in range(0, 100, 10):
        out.write(noise(pos)[0], pos, noise(pos)[1])
    sizes = [path.stat().st_size for path in tmp_path.rglob(f"*{EPOCH}*") if "node-1" in str(path.parent)]

    retired = out.retire()

    kept = [path.stat().st_size for path in tmp_path.rglob(f"*{EPOCH}*") if "node-1" in str(path.parent)]
    assert sum(kept) <= 60_000 < sum(kept) + max(sizes)
    assert [(pos * 10, pos * 10 + 9, 10) for pos in range(len(retired))] == [
        (one.first_pos, one.last_pos, one.count) for one in retired
    ]
    assert list(range(len(retired) * 10, 100)) == [
        row["pos"] for row in events_of(tmp_path / "date=2026-01-01/node=node-1")[0]
    ]
    assert [0] == positions_of(tmp_path / "date=2026-01-01/node=node-2")


def test_retention_says_no_more_than_it_knows(tmp_path: Path) -> None:
    """Where a segment's positions have holes, as around midnight, its last position is not claimed."""
    clock = Clock()
    out = writer(tmp_path, now=clock, keep_secs=1)
    write(out, 0, 1, 2, times=[NOON, NOON + DAY, NOON])
    out.close()
    clock.secs += 10

    assert [(0, None, 2), (1, None, 1)] == [(one.first_pos, one.last_pos, one.count) for one in out.retire()]


# --- damage


def segment_of(folder: Path, blocks: int = 20, size: int = 5) -> Path:
    out = writer(folder)
    for start in range(0, blocks * size, size):
        write(out, *range(start, start + size))
    out.close()
    (path,) = folder.rglob("*.avro")
    return path


def test_a_flipped_bit_is_never_wrong_data(tmp_path: Path) -> None:
    """After any flip of one bit every row that is read is one that was written; at most one block of twenty is lost,
    or all if the flip made the header unreadable, and it is said."""
    path = segment_of(tmp_path)
    good = path.read_bytes()
    expected = [plain_event(pos, time=NOON + pos) for pos in range(100)]
    blocks_at = good.index(b"\x28\xb5\x2f\xfd") - 4
    dice = random.Random(7)
    places = [dice.randrange(blocks_at * 8, len(good) * 8) for _ in range(220)]
    places += [dice.randrange(blocks_at * 8) for _ in range(80)]
    silent, lost = [], []
    for place in places:
        data = bytearray(good)
        data[place // 8] ^= 1 << place % 8
        path.write_bytes(data)
        rows, unread = events_of(tmp_path)
        wrong = [row for row in rows if row["pos"] >= 100 or row != expected[row["pos"]]]
        assert [] == wrong, place
        if not unread:
            silent.append(place)
        if len(rows) < 95:
            lost.append(place)

    assert [] == silent
    assert all(place < 8 * blocks_at for place in lost)
    assert len(lost) <= 12


def test_a_hole_costs_its_own_blocks(tmp_path: Path) -> None:
    """Bytes that were overwritten in the middle cost the blocks they lie in; all others are read."""
    path = segment_of(tmp_path, blocks=200)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 1000] = bytes(1000)
    path.write_bytes(data)

    rows, unread = events_of(tmp_path)

    (gap,) = unread
    assert gap.start <= middle
    assert middle + 1000 <= gap.end
    assert gap.damage
    assert 1000 - len(rows) <= 5 * 9
    assert rows == [plain_event(row["pos"], time=NOON + row["pos"]) for row in rows]


@pytest.mark.parametrize("cut", [1, 16, 17, 60])
def test_a_closed_segment_that_is_cut_is_damaged(tmp_path: Path, cut: int) -> None:
    """A closed segment that ends inside a block is damage; everything before is read."""
    path = segment_of(tmp_path)
    path.write_bytes(path.read_bytes()[:-cut])

    rows, unread = events_of(tmp_path)

    assert 95 == len(rows)
    assert [True] == [one.damage for one in unread]
    assert "ends inside a block" in unread[0].reason


def test_a_damaged_header_of_ours_is_mended(tmp_path: Path) -> None:
    """One wrong letter in the schema of a segment of ours is noticed, said, and costs no event."""
    path = segment_of(tmp_path)
    path.write_bytes(path.read_bytes().replace(b'"name": "comm"', b'"name": "conm"'))

    rows, unread = events_of(tmp_path)

    assert [plain_event(pos, time=NOON + pos) for pos in range(100)] == rows
    assert ["has a damaged header; its blocks are read with this release's schema"] == [
        one.reason.removeprefix(f"{path} ").rstrip(".") for one in unread
    ]


# --- other people's files


def foreign(path: Path, codec: str, rows: list[Row]) -> None:
    with path.open("wb") as file:
        fastavro.writer(file, fastavro.parse_schema(event.schema_json()), rows, codec=codec, sync_interval=2000)


@pytest.mark.parametrize("codec", ["null", "deflate", "zstandard"])
def test_containers_of_others_are_read(tmp_path: Path, codec: str) -> None:
    """A container that another Avro library wrote gives its events, in any codec of the standard's common ones."""
    rows = [plain_event(pos) for pos in range(100)]
    foreign(tmp_path / "theirs.avro", codec, rows)

    assert (rows, []) == events_of(tmp_path / "theirs.avro")


def test_a_codec_that_we_lack_is_said(tmp_path: Path) -> None:
    """A container in another codec is named with its codec and those that are allowed."""
    foreign(tmp_path / "theirs.avro", "bzip2", [plain_event()])

    rows, (unread,) = events_of(tmp_path)

    assert [] == rows
    assert "has the codec 'bzip2'; allowed are null, deflate, zstandard." in unread.reason


@pytest.mark.parametrize("codec", ["deflate", "zstandard"])
def test_a_block_that_unpacks_without_end_is_not_unpacked(tmp_path: Path, codec: str) -> None:
    """A few kilobytes that would become gigabytes are damage, and the memory they take is bounded."""
    foreign(tmp_path / "bomb.avro", codec, [plain_event(0, message="x" * (archive.MAX_BLOCK_BYTES + 1000))])

    rows, (unread,) = events_of(tmp_path)

    assert [] == rows
    assert "unpacks to more than 67108864 bytes" in unread.reason


def test_a_folder_may_have_other_things_in_it(tmp_path: Path) -> None:
    """Below a folder only Avro files are read, in the order of their paths; each bad one is said once."""
    foreign(tmp_path / "b.avro", "null", [plain_event(2)])
    (tmp_path / "a").mkdir()
    foreign(tmp_path / "a/c.avro", "null", [plain_event(1)])
    (tmp_path / "a/notes.txt").write_text("no")
    (tmp_path / "empty.avro").write_bytes(b"")
    (tmp_path / "text.avro").write_text("not avro at all")
    (tmp_path / "short.avro").write_bytes(b"Obj\x01\x04")
    (tmp_path / "gone.avro").symlink_to(tmp_path / "nowhere")

    rows, unread = events_of(tmp_path)

    assert [2, 1] == [row["pos"] for row in rows]
    assert {
        "empty.avro": "is empty",
        "text.avro": "is no Avro container",
        "short.avro": "ends inside its header",
        "gone.avro": "cannot be opened: No such file or directory",
    } == {
        one.path.name: next(
            words
            for words in (
                "is empty",
                "is no Avro container",
                "ends inside its header",
                "cannot be opened: No such file or directory",
            )
            if words in one.reason
        )
        for one in unread
    }
    assert all(one.damage for one in unread)


def test_a_file_that_is_named_is_tried_whatever_it_is_called(tmp_path: Path) -> None:
    """A path that was asked for by name is never passed over in silence."""
    (tmp_path / "notes.txt").write_text("no")

    _, (unread,) = events_of(tmp_path / "notes.txt")

    assert "notes.txt is no Avro container" in unread.reason


def test_a_path_that_does_not_exist_is_said_before_anything_is_read(tmp_path: Path) -> None:
    """Missing paths and things that are no files are an error at once."""
    os.mkfifo(tmp_path / "pipe")

    for name, words in (("nowhere", "No such file"), ("pipe", "neither a file nor a folder")):
        with pytest.raises(SourceUnavailable, match=f"{tmp_path}/{name} .*{words}"):
            archive.read([tmp_path, tmp_path / name])


def test_a_segment_that_is_closed_while_it_is_read_is_found(tmp_path: Path) -> None:
    """A *.partial that its writer renamed after it was listed is read under its name."""
    out = writer(tmp_path)
    write(out, 0)
    items = archive.read([tmp_path])
    out.close()

    assert [1] == [item.count for item in items if isinstance(item, archive.Block)]


def test_small_blocks_come_as_one_and_can_be_taken_apart(tmp_path: Path) -> None:
    """Blocks of an idle node are joined for decoding; when one of them is bad the others are still read."""
    path = segment_of(tmp_path, blocks=50, size=1)
    (joined,) = [item for item in archive.read([path]) if isinstance(item, archive.Block)]
    data = path.read_bytes()
    twentieth = joined.split()[20]
    assert data[twentieth.offset] == 2
    path.write_bytes(data[: twentieth.offset] + b"\x04" + data[twentieth.offset + 1 :])

    rows, unread = events_of(path)

    assert (50, 50) == (joined.count, len(joined.split()))
    assert [pos for pos in range(50) if pos != 20] == [row["pos"] for row in rows]
    assert [twentieth.offset] == [one.start for one in unread]


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_said(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    """Whatever stands in a file, with or without a container's first bytes, reading ends and raises nothing."""
    path = tmp_path_factory.getbasetemp() / "any.avro"
    for content in (data, b"Obj\x01" + data, b"Obj\x01\x02\x16avro.schema\x04{}\x00" + bytes(16) + data):
        path.write_bytes(content)

        for item in archive.read([path]):
            assert isinstance(item, archive.Block | archive.Unread)


def test_segments_of_one_second_are_in_the_order_of_their_positions(tmp_path: Path) -> None:
    """Positions in names are numbers: 9 comes before 10."""
    out = writer(tmp_path, segment_bytes=1)
    for pos in range(12):
        write(out, pos)
    out.close()

    assert 12 == len(files_below(tmp_path))
    assert list(range(12)) == positions_of(tmp_path)
    assert datetime(2026, 1, 1, 12, tzinfo=UTC).timestamp() * 1e6 == NOON
