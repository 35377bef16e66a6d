"""Copies into an archive: each record once and in its own bytes, whatever came before, in whatever order."""

from __future__ import annotations

import io
import random
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import fastavro
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import archive, avro, copying, dedup
from pipeline.errors import SinkUnavailable
from tests.stored import BASE_US, batch, bind
from tests.strategies import batches

EPOCH = "019b76daa8000007"
Kept = tuple[str, str, int, bytes]


def kept(*paths: Path) -> list[Kept]:
    """Node, epoch, position and datum of every record in an archive, as they lie; none of it may be damaged."""
    found: list[Kept] = []
    for part in archive.read(paths):
        if isinstance(part, archive.Unread):
            assert not part.damage, part
            continue
        schema = avro.admit(part.schema_text)
        made = avro.decode_block(part.payload, part.count, schema)
        datums = avro.datums_of_block(part.payload, made, schema).to_pylist()
        keys = zip(*(made.column(name).to_pylist() for name in ("node", "epoch", "pos")), strict=True)
        found += [(*key, datum) for key, datum in zip(keys, datums, strict=True)]
    return found


def copy(folder: Path, *parts: Sequence[dict[str, Any]], flush_secs: float | None = None) -> copying.Copy:
    """A whole run of ``--to`` over these batches, as the command makes it; each a write of its own with 0 seconds."""
    into = copying.Copy(folder, flush_secs=flush_secs, now=lambda: BASE_US / 1e6)
    seen = dedup.Seen()
    for rows in parts:
        fresh = seen.sift(batch(rows)).batch
        into.add(fresh, avro.encode(fresh))
    into.close()
    return into


def datum(row: dict[str, Any]) -> bytes:
    """An event as it is sent."""
    found: bytes = avro.encode(batch([row]))[0].as_py()
    return found


# --- datums in the bytes in which they came -----------------------------------------------------------------------


@given(batches(max_size=6))
def test_a_datum_of_ours_is_what_its_decoded_event_encodes_to(made: pa.RecordBatch) -> None:
    """encode(decode(datum)) is the datum, byte for byte, from messages of both framings and from blocks."""
    datums = avro.encode(made)

    for values in (avro.single_object(datums), avro.confluent(datums, 7)):
        decoded = avro.decode_messages(values, lambda _key: avro.ours())
        assert avro.encode(decoded.batch).to_pylist() == datums.to_pylist()
        assert avro.datums_of_messages(values, decoded, lambda _key: avro.ours()).to_pylist() == datums.to_pylist()
    count, payload = avro.encode_block(datums)
    again = avro.decode_block(payload, count)
    assert avro.encode(again).to_pylist() == datums.to_pylist()
    assert avro.datums_of_block(bytes(payload), again, avro.ours()).to_pylist() == datums.to_pylist()


def odd(row: dict[str, Any]) -> bytes:
    """An event with one label in other bytes than ours: the map as a block that names its size, as Avro allows."""
    usual = datum(row | {"labels": {"app": "web"}})
    entry = b"\x06app\x06web"
    assert usual.count(b"\x02" + entry + b"\0") == 1
    return usual.replace(b"\x02" + entry + b"\0", b"\x01" + bytes([2 * len(entry)]) + entry + b"\0")


def test_a_datum_in_other_bytes_than_ours_stays_as_it_came() -> None:
    """Other writers may write the same event otherwise; among ours, and among what is no event."""
    strange = [odd(bind(1)), datum(bind(2)), odd(bind(3))]
    framed = avro.single_object(pa.array(strange, pa.binary()))
    values = [framed[0], b"nonsense", None, framed[1], avro.confluent(pa.array(strange, pa.binary()), 9)[2]]

    decoded = avro.decode_messages(values, lambda _key: avro.ours())
    block = b"".join(strange)

    assert [1, 2, 3] == decoded.batch.column("pos").to_pylist()
    assert strange == avro.datums_of_messages(values, decoded, lambda _key: avro.ours()).to_pylist()
    assert strange == avro.datums_of_block(block, avro.decode_block(block, 3), avro.ours()).to_pylist()


def test_events_of_another_schema_become_ours() -> None:
    """What was written with another schema is kept as this release writes it, beside what was written with ours."""
    older = avro.admit(
        '{"type":"record","name":"BindEvent","fields":[{"name":"pos","type":"long"},{"name":"node","type":"string"},'
        '{"name":"epoch","type":"string"},{"name":"time","type":"long"}]}'
    )
    out = io.BytesIO()
    fastavro.schemaless_writer(out, older.parsed, {"pos": 4, "node": "node-1", "epoch": EPOCH, "time": BASE_US})
    values = [b"\0\0\0\0\x05" + out.getvalue(), *avro.confluent(pa.array([datum(bind(5))]), 6)]
    known = {5: older, 6: avro.ours()}

    decoded = avro.decode_messages(values, known.__getitem__)  # type: ignore[arg-type]
    found = avro.datums_of_messages(values, decoded, known.__getitem__)  # type: ignore[arg-type]
    block = out.getvalue()
    from_block = avro.datums_of_block(block, avro.decode_block(block, 1, older), older)

    assert avro.encode(decoded.batch).to_pylist() == found.to_pylist()
    assert found.to_pylist()[:1] == from_block.to_pylist()


# --- each once, again and again -----------------------------------------------------------------------------------

POSITIONS = st.lists(st.lists(st.integers(0, 40), max_size=12), max_size=5)


@settings(max_examples=30)
@given(st.lists(POSITIONS, min_size=1, max_size=4), st.sampled_from([None, 0]))
def test_runs_in_any_order_hold_each_record_once(
    tmp_path_factory: pytest.TempPathFactory, runs: list[list[list[int]]], flush_secs: float | None
) -> None:
    """Whatever positions come in whatever batches and runs: each is there once, and the counts say so."""
    folder = tmp_path_factory.mktemp("copies")
    there: set[int] = set()

    for run in runs:
        parts = [[bind(pos, epoch=EPOCH) for pos in positions] for positions in run]
        into = copy(folder, *parts, flush_secs=flush_secs)

        new = {pos for positions in run for pos in positions}
        assert (len(new - there), len(new & there)) == (into.written, into.there)
        there |= new
        assert sorted(("node-1", EPOCH, pos, datum(bind(pos, epoch=EPOCH))) for pos in there) == sorted(kept(folder))


@pytest.mark.parametrize("positions", [[0, 12, 1, 3], [0, 1, 2, 50, 3], [3, 1, 0], [0, 1, 3, 2]])
def test_a_hole_is_no_hole_that_was_filled(tmp_path: Path, positions: list[int]) -> None:
    """Positions that came out of order make no segment that seems to hold what it does not."""
    rest = [pos for pos in range(60) if pos not in positions]

    copy(tmp_path, *([bind(pos, epoch=EPOCH)] for pos in positions), flush_secs=0)
    copy(tmp_path, [bind(pos, epoch=EPOCH) for pos in rest])

    assert list(range(60)) == sorted(pos for _, _, pos, _ in kept(tmp_path))


def test_a_contradiction_is_kept_once(tmp_path: Path) -> None:
    """Two events with one identity are both kept, and not again; what the pair makes of the count hides no hole."""
    rows = [bind(0), bind(1), bind(1, comm="other"), bind(3)]
    rows = [row | {"epoch": EPOCH} for row in rows]

    runs = [copy(tmp_path, rows[:3], rows[3:], flush_secs=0), copy(tmp_path, rows)]
    counts = [(run.written, run.there) for run in runs]
    copy(tmp_path, [bind(2, epoch=EPOCH)])

    assert [(4, 0), (0, 4)] == counts
    assert sorted([*map(datum, rows), datum(bind(2, epoch=EPOCH))]) == sorted(one[3] for one in kept(tmp_path))


def test_streams_without_identity_are_counted(tmp_path: Path) -> None:
    """They could not be told from what is there already at the next run."""
    into = copy(tmp_path, [bind(0, epoch="mine"), bind(-1, epoch=EPOCH), bind(0, epoch=EPOCH), bind(0, node="")])

    assert (1, 0, 3) == (into.written, into.there, into.strangers)
    assert [0] == [pos for _, _, pos, _ in kept(tmp_path)]


def test_few_segments_are_open_whatever_the_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With more streams than may be open all of them are whole, and the next run finds all of them."""
    monkeypatch.setattr(copying, "OPEN_STREAMS", 3)
    monkeypatch.setattr(copying, "STREAMS", 5)
    monkeypatch.setattr(copying, "HELD_BYTES", 2_000)
    chance = random.Random(7)
    rows = [bind(pos, node=f"node-{node}", epoch=EPOCH) for pos in range(12) for node in range(7)]
    parts = [rows[first : first + 10] for first in range(0, len(rows), 10)]
    into = copying.Copy(tmp_path, now=lambda: BASE_US / 1e6)

    for part in parts:
        made = batch(part)
        into.add(made, avro.encode(made))
        assert len(list(tmp_path.rglob("*.partial"))) <= 3
    into.close()
    chance.shuffle(parts)
    again = copy(tmp_path, *parts)

    assert (84, 0) == (into.written, into.there)
    assert (0, 84) == (again.written, again.there)
    assert 84 == len(set(kept(tmp_path))) == len(kept(tmp_path))


def test_what_waits_is_written_in_time(tmp_path: Path) -> None:
    """With a bound on waiting, records are safe when the next ones come after it."""
    clock = [0.0]
    into = copying.Copy(tmp_path, flush_secs=5, now=lambda: BASE_US / 1e6, monotonic=lambda: clock[0])

    for pos, secs in enumerate((0, 4.9, 5, 6, 10)):
        clock[0] = secs
        made = batch([bind(pos, epoch=EPOCH)])
        into.add(made, avro.encode(made))
        held = [one[2] for one in kept(tmp_path)]
        assert {0: [], 1: [], 2: [0, 1, 2], 3: [0, 1, 2], 4: [0, 1, 2, 3, 4]}[pos] == held
    into.close()


def test_what_is_kept_never_makes_room(tmp_path: Path) -> None:
    """On a full disk, where an agent would give up its oldest segments, a copy refuses and keeps all that was there."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "bindsnoop-test", tmp_path], check=True)
    chance = random.Random(7)
    try:
        into = copying.Copy(tmp_path, flush_secs=0, now=lambda: BASE_US / 1e6)

        def fill() -> None:
            for pos in range(100):
                day = BASE_US + pos * 86_400_000_000
                made = batch([bind(pos, epoch=EPOCH, time=day, comm=chance.randbytes(200_000).hex())])
                into.add(made, avro.encode(made))

        with pytest.raises(SinkUnavailable, match="No space left on device"):
            fill()

        assert list(range(into.written)) == [pos for _, _, pos, _ in kept(tmp_path)]
        assert into.written > 20
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


def test_one_at_a_time(tmp_path: Path) -> None:
    """A second copy into the same folder would double records: it says so, and may when the first has ended."""
    first = copying.Copy(tmp_path)

    with pytest.raises(SinkUnavailable, match=str(tmp_path)):
        copying.Copy(tmp_path)
    first.close()
    copying.Copy(tmp_path).close()


# --- what an archive holds ----------------------------------------------------------------------------------------


@pytest.fixture
def archived(tmp_path: Path) -> Iterator[Path]:
    """An agent's archive: 3,000 records in three segments, the last still open."""
    writer = archive.Writer(tmp_path, node="node-1", epoch=EPOCH, segment_bytes=30_000, now=lambda: BASE_US / 1e6)
    for first in range(0, 3_000, 100):
        made = batch([bind(pos, epoch=EPOCH) for pos in range(first, first + 100)])
        writer.write(avro.encode(made), first, made.column("time"))
    yield tmp_path
    writer.close()


def test_an_agents_archive_is_known_by_its_frames(archived: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense segments are not decoded, only their last blocks are; another node's and another epoch's do not count."""
    decoded = []
    plain = avro.decode_block
    monkeypatch.setattr(avro, "decode_block", lambda *given: decoded.append(given[1]) or plain(*given))

    found = copying.held(archived, "node-1", EPOCH)

    assert ([0], [3_000]) == (found.starts.tolist(), found.ends.tolist())
    assert len(decoded) == len(list(archived.rglob("*.avro*"))) > 1
    for stream in (("node-2", EPOCH), ("node-1", "0" * 16)):
        assert 0 == len(copying.held(archived, *stream).starts)


def test_damage_is_a_hole_that_can_be_filled(archived: Path) -> None:
    """A segment that is cut or torn holds what can be read of it, and a copy brings the rest."""
    segments = sorted(archived.rglob("*.avro"))
    segments[0].write_bytes(segments[0].read_bytes()[:-40])

    found = copying.held(archived, "node-1", EPOCH)
    copy(archived, [bind(pos, epoch=EPOCH) for pos in range(3_000)])

    assert 2 == len(found.starts)
    readable = [part for part in archive.read([archived]) if isinstance(part, archive.Block)]
    batches_ = [avro.decode_block(part.payload, part.count) for part in readable]
    assert list(range(3_000)) == sorted(pos for made in batches_ for pos in made.column("pos").to_pylist())
