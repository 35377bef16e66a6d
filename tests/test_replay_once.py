"""bindsnoop-replay shows each event once: from a topic, from files, from both, in every mode."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline import archive, avro
from tests import stored
from tests.broker import Kafka
from tests.commands import BIN, environment, replay
from tests.stored import bind, failed, own

SHOWN = ("-o", "custom-columns=pos", "-i=false")


def positions(text: str) -> list[int]:
    """The positions of lines below the header, in their order."""
    return [int(line) for line in text.splitlines()[1:]]


def stream(first: int, end: int) -> list[dict[str, Any]]:
    """Records of one epoch: binds, failures and, every tenth, a note of the stream's own."""
    return [
        own(pos, "info", f"checkpoint {pos}") if pos % 10 == 9 else failed(pos) if pos % 3 == 1 else bind(pos)
        for pos in range(first, end)
    ]


def binds(first: int, end: int) -> list[int]:
    """Positions of the attempts among those records."""
    return [pos for pos in range(first, end) if pos % 10 != 9]


@pytest.fixture
def sent_again(kafka: Kafka, topic: str) -> tuple[str, ...]:
    """A topic that holds 0 to 59 of an agent that was killed twice and sent again what was not acknowledged."""
    stored.make_topic(kafka.bootstrap, topic)
    for first, end in ((0, 30), (20, 45), (40, 60)):
        stored.send(kafka.bootstrap, topic, stored.messages(stream(first, end)))
    return ("--topic", topic, "--bootstrap-servers", kafka.bootstrap)


def test_events_that_were_sent_again(sent_again: tuple[str, ...]) -> None:
    """An agent that was killed sends again what was not acknowledged; each record is shown and counted once."""
    shown = replay(*sent_again, *SHOWN)
    counted = replay(*sent_again, "-i=false", "--count")
    notes = replay(*sent_again, "--info", "-o", "json", "-P", "1")

    assert (binds(0, 60), "", 0) == (positions(shown.out), shown.err, shown.code)
    assert f"{len(binds(0, 60))}\n" == counted.out
    assert [f"checkpoint {pos}" in line for pos, line in zip(range(9, 60, 10), notes.out.splitlines(), strict=True)]


def test_tail_counts_each_event_once(sent_again: tuple[str, ...], tmp_path: Path) -> None:
    """The newest are read first; a copy takes no place among the last N, nor does one that is in files too."""
    stored.write(tmp_path, stream(50, 60), stream(50, 60))

    for count in (5, 30, 54, 99):
        tail = replay(*sent_again, *SHOWN, "--tail", count)
        assert (binds(0, 60)[-count:], 0) == (sorted(positions(tail.out)), tail.code)
    both = replay(*sent_again, "--files", tmp_path, *SHOWN, "--tail", 20)
    assert (binds(0, 60)[-20:], 0) == (sorted(positions(both.out)), both.code)


def test_topic_and_files_that_overlap(sent_again: tuple[str, ...], tmp_path: Path) -> None:
    """What the topic holds is not shown again from the files."""
    stored.write(tmp_path, stream(30, 55), stream(55, 80))

    both = replay(*sent_again, "--files", tmp_path, *SHOWN)

    assert (binds(0, 80), "", 0) == (positions(both.out), both.err, both.code)


def test_files_that_were_copied(tmp_path: Path) -> None:
    """A copy of a segment, or of an open one before it was closed, shows nothing twice."""
    folder = stored.write(tmp_path / "archive", stream(0, 40), stream(40, 60))
    (segment,) = folder.rglob("*.avro")
    (tmp_path / "copy.avro").write_bytes(segment.read_bytes())
    (tmp_path / "earlier.avro.partial").write_bytes(segment.read_bytes()[:-50])

    shown = replay("--files", tmp_path, *SHOWN)

    assert (binds(0, 60), 0) == (positions(shown.out), shown.code)


def test_resolve_and_once(tmp_path: Path) -> None:
    """Names that come late are put to what is shown; each event is still shown once."""
    told = own(3, "info", "container …", kind="workload", container_id="ab" * 32, container="web", image="nginx")
    rows = [bind(0, container_id="ab" * 32), bind(1), bind(2), told]
    stored.write(tmp_path, rows, rows)

    done = replay("--files", tmp_path, "--resolve", "-o", "custom-columns=pos,container", "-c", "web")

    assert [["0", "web"]] == [line.split() for line in done.out.splitlines()[1:]]


def test_follow_shows_each_event_once(kafka: Kafka, topic: str) -> None:
    """What is sent again while it is followed is not shown again."""
    stored.make_topic(kafka.bootstrap, topic, partitions=2)
    stored.send(kafka.bootstrap, topic, stored.messages(stream(0, 8)))
    command = [BIN / "bindsnoop-replay", "--topic", topic, "--bootstrap-servers", kafka.bootstrap, "--follow", *SHOWN]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    ) as process:
        assert process.stdout is not None
        first = [process.stdout.readline() for _ in range(9)]
        stored.send(kafka.bootstrap, topic, stored.messages(stream(4, 12)), partition=1)
        stored.send(kafka.bootstrap, topic, stored.messages(stream(10, 19)), partition=1)
        second = [process.stdout.readline() for _ in range(10)]
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=20)

    assert (binds(0, 19), ("", ""), 0) == ([int(line) for line in (first + second)[1:]], rest, process.returncode)


def test_a_contradiction_is_shown_and_said(sent_again: tuple[str, ...], tmp_path: Path) -> None:
    """Another event under an identity that was there is shown, its place is said, and the exit code is 3."""
    stored.write(tmp_path, [bind(30, comm="forged"), *stream(31, 33)])

    both = replay(*sent_again, "--files", tmp_path, "-o", "custom-columns=pos,comm", "-i=false")

    assert ["30", "forged"] == both.out.splitlines()[-1].split()
    assert len(binds(0, 60)) + 2 == len(both.out.splitlines())
    assert 3 == both.code
    assert f"node node-1 epoch {'0' * 16} pos 30: another event with this identity says something else" in both.err
    assert "1 event says something else" in both.err


def test_a_foreign_writer_is_not_swallowed(kafka: Kafka, topic: str) -> None:
    """Events that all claim position 0, or none at all, are all shown."""
    rows = [bind(0, port=1 + number, time=stored.BASE_US + number) for number in range(50)]
    stored.make_topic(kafka.bootstrap, topic)
    where = ("--topic", topic, "--bootstrap-servers", kafka.bootstrap, "-i=false", "--count")

    stored.send(kafka.bootstrap, topic, stored.messages([row | {"epoch": "mine", "pos": -1} for row in rows]))
    strangers = replay(*where)
    stored.send(kafka.bootstrap, topic, stored.messages(rows))
    zeros = replay(*where)

    assert ("50\n", "", 0) == (strangers.out, strangers.err, strangers.code)
    assert ("100\n", 3) == (zeros.out, zeros.code)
    assert "49 events say something else" in zeros.err
    assert len(zeros.err.splitlines()) < 15


def test_strewn_positions_are_all_shown(tmp_path: Path) -> None:
    """Positions that nobody of ours gives exceed what is remembered: that is said once, and every event is shown."""
    count = 70_000
    one = stored.batch([bind(0)]).take(pa.array([0] * count))
    place = one.schema.get_field_index("pos")
    strewn = one.set_column(place, one.schema.field(place), pa.array(range(0, 2 * count, 2), pa.int64()))
    writer = archive.Writer(tmp_path, node="node-1", epoch="0" * 16, now=lambda: stored.BASE_US / 1e6)
    writer.write(avro.encode(strewn), 0, strewn.column("time"))
    writer.close()

    done = replay("--files", tmp_path, "--count")

    assert (f"{count}\n", 0, 1) == (done.out, done.code, len(done.err.splitlines()))
    assert "may be shown again" in done.err
