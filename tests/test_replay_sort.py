"""bindsnoop-replay --sort: the same evidence is the same bytes, wherever it was read."""

from __future__ import annotations

import random
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pipeline import avro
from tests import stored
from tests.broker import Kafka
from tests.commands import BIN, environment, replay, until
from tests.stored import bind, failed, own

EPOCHS = ("019b76daa8000007", "019b76dbb8000007")


def fleet() -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Streams of three nodes, two epochs each; clocks differ and step back, and events share their microsecond."""
    chance = random.Random(7)
    streams = {}
    for node in ("node-1", "node-2", "node-10"):
        for epoch in EPOCHS:
            rows = []
            for pos in range(200):
                place = {"node": node, "epoch": epoch, "time": stored.BASE_US + chance.randrange(0, 300)}
                make = own if pos % 40 == 39 else failed if pos % 3 == 0 else bind
                rows.append(make(pos, **place) | {"labels": {"b": "1", "a": "2"}})
            streams[node, epoch] = rows
    return streams


def write(folder: Path, streams: dict[tuple[str, str], list[dict[str, Any]]], first: int, end: int) -> Path:
    """An archive of these positions of every stream, in blocks of 70."""
    for (node, epoch), rows in streams.items():
        parts = [rows[start : min(start + 70, end)] for start in range(first, end, 70)]
        stored.write(folder, *parts, node=node, epoch=epoch)
    return folder


@pytest.mark.parametrize(
    "form", [("-o", "json-full"), ("-o", "json", "-T"), ("-T",), ("-o", "custom-columns=pos,node,epoch")], ids=" ".join
)
def test_sorted_evidence_is_the_same_bytes(kafka: Kafka, topic: str, tmp_path: Path, form: tuple[str, ...]) -> None:
    """From a topic of three partitions with events sent again, from files, and from both with an overlap."""
    streams = fleet()
    stored.make_topic(kafka.bootstrap, topic, partitions=3)
    for number, rows in enumerate(streams.values()):
        for first, end in ((0, 120), (90, 200)):
            stored.send(kafka.bootstrap, topic, stored.messages(rows[first:end]), number % 3)
    half = f"{topic}-half"
    stored.make_topic(kafka.bootstrap, half)
    for rows in streams.values():
        stored.send(kafka.bootstrap, half, stored.messages(rows[80:]))
    files, first_half = write(tmp_path / "all", streams, 0, 200), write(tmp_path / "half", streams, 0, 130)
    asked = ("--sort", "-i=false", "--info", *form)
    server = ("--bootstrap-servers", kafka.bootstrap)

    from_topic = replay("--topic", topic, *server, *asked)
    from_files = replay("--files", files, *asked)
    from_both = replay("--topic", half, *server, "--files", first_half, *asked)

    assert from_topic == from_files == from_both
    assert 0 == from_topic.code
    shown = 1200 if "json" in " ".join(form) else 1201 - 30  # the stream's own records go to standard error
    assert shown == len(from_topic.out.splitlines())


def test_the_order(tmp_path: Path) -> None:
    """By time, then node, epoch and position; without --sort as the files lie."""
    streams = fleet()
    write(tmp_path, streams, 0, 200)
    every = [row for rows in streams.values() for row in rows if row["type"] == "normal"]

    done = replay("--files", tmp_path, "--sort", "-i=false", "-o", "custom-columns=time,node,epoch,pos")

    expected = sorted(every, key=lambda row: (row["time"], row["node"], row["epoch"], row["pos"]))
    assert [[row["node"], row["epoch"], str(row["pos"])] for row in expected] == [
        line.split()[1:] for line in done.out.splitlines()[1:]
    ]


def test_tail_is_sorted(tmp_path: Path) -> None:
    """The last N that match, as they lie, in the order of their time."""
    rows = [bind(pos, time=stored.BASE_US + 1000 - pos) for pos in range(100)]
    stored.write(tmp_path, rows)

    done = replay("--files", tmp_path, "--tail", "5", "--sort", "-o", "custom-columns=pos")

    assert ["99", "98", "97", "96", "95"] == [line.strip() for line in done.out.splitlines()[1:]]


def test_contradictions_have_one_order(tmp_path: Path) -> None:
    """Two events with one identity and one time come out the same, whichever was read first."""
    one, other = bind(3, comm="one"), bind(3, comm="other")
    first = stored.write(tmp_path / "a", [bind(2), one]), stored.write(tmp_path / "b", [other, bind(4)])
    again = stored.write(tmp_path / "c", [bind(2), other]), stored.write(tmp_path / "d", [one, bind(4)])
    shown = ("--sort", "-o", "json-full")

    done, reversed_ = replay("--files", *first, *shown), replay("--files", *again, *shown)

    assert (done.out, 3) == (reversed_.out, done.code)
    assert 4 == len(done.out.splitlines())


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More than memory holds while it is sorted: a hundred thousand binds, their times all over a day."""
    from benchmarks import events
    from pipeline import archive

    folder = tmp_path_factory.mktemp("large")
    writer = archive.Writer(folder, node=events.NODE, epoch="019b76daa8000007", now=lambda: 0)
    for made, _ in events.generate(100_000):
        writer.write(avro.encode(made), made.column("pos")[0].as_py(), made.column("time"))
    writer.close()
    return folder


def test_more_than_memory_holds(large: Path) -> None:
    """Runs on disk give what sorting in memory gives."""
    plain = replay("--files", large, "-i=false", "-o", "custom-columns=time,pos")
    done = replay("--files", large, "-i=false", "-o", "custom-columns=time,pos", "--sort")

    header, *lines = plain.out.splitlines()
    assert [header, *sorted(lines, key=lambda line: (line.split()[0], int(line.split()[1])))] == done.out.splitlines()
    assert 0 == done.code


def test_full_temporary_folder(large: Path, tmp_path: Path) -> None:
    """It is one sentence that names the folder, the reason and what helps; exit code 2."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "bindsnoop-test", tmp_path], check=True)
    try:
        done = replay("--files", large, "--sort", "-o", "json", TMPDIR=str(tmp_path))
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)

    assert (2, "") == (done.code, done.out)
    assert 1 == len(done.err.splitlines())
    for said in (str(tmp_path), "No space left on device", "TMPDIR"):
        assert said in done.err


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_behind(large: Path, tmp_path: Path, how: signal.Signals) -> None:
    """However a sorting command ends, the temporary folder is empty."""
    command = [BIN / "bindsnoop-replay", "--files", large, "--sort", "-i=false", "-o", "json-full"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(TMPDIR=str(tmp_path))
    ) as process:
        # Nobody reads what it writes: it stands in the middle of its work.
        until(lambda: str(tmp_path) in open_files(process.pid))
        process.send_signal(how)
        process.communicate(timeout=30)

    assert 0 != process.returncode
    assert [] == list(tmp_path.iterdir())


def open_files(pid: int) -> str:
    """Paths of what a process has open."""
    listed = subprocess.run(["ls", "-l", f"/proc/{pid}/fd"], capture_output=True, text=True, check=False)
    return listed.stdout
