"""bindsnoop-replay --to: an archive that is what the topic is, again and again, killed or not, or an excerpt of it."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fastavro
import pytest

from pipeline import avro
from pipeline.replay import Stopping
from tests import stored
from tests.broker import Kafka
from tests.commands import BIN, environment, replay, until
from tests.stored import BASE_US, bind, failed, own
from tests.test_copying import kept

EPOCHS = ("019b76daa8000007", "019b76dbb8000007")
EVERYTHING = ("--sort", "-i=false", "--info", "-o", "json-full")
DAY = 86_400_000_000


def stream(node: str, epoch: str, first: int, end: int) -> list[dict[str, Any]]:
    """Records of one epoch over three days: binds, failures, notes of its own, and now and then a loss."""
    rows = []
    for pos in range(first, end):
        place = {"node": node, "epoch": epoch, "time": BASE_US + pos * DAY // 100}
        make = own if pos % 50 == 49 else failed if pos % 3 == 1 else bind
        extra = {"type_": "info", "message": f"checkpoint {pos}"} if pos % 20 == 9 else {}
        rows.append((own if extra else make)(pos, **extra) | place | {"port": None if extra else 1 + pos % 700})
    return rows


class Source:
    """A topic, how to read it, and what was sent to it."""

    def __init__(self, bootstrap: str, name: str) -> None:
        self.bootstrap, self.name = bootstrap, name
        self.where = ("--topic", name, "--bootstrap-servers", bootstrap)
        self.sent: set[tuple[str, str, int, bytes]] = set()

    def send(self, rows: list[dict[str, Any]], partition: int = 0) -> None:
        """Put these records into the topic, as an agent does."""
        datums = avro.encode(stored.batch(rows))
        stored.send(self.bootstrap, self.name, avro.single_object(datums), partition)
        self.sent |= {
            (row["node"], row["epoch"], row["pos"], datum) for row, datum in zip(rows, datums.to_pylist(), strict=True)
        }


@pytest.fixture
def source(kafka: Kafka, topic: str) -> Source:
    """Two partitions with two nodes and two epochs, 300 records each, some sent twice."""
    stored.make_topic(kafka.bootstrap, topic, partitions=2)
    made = Source(kafka.bootstrap, topic)
    for number, node in enumerate(("node-1", "node-2")):
        for epoch in EPOCHS:
            made.send(stream(node, epoch, 0, 170), number)
            made.send(stream(node, epoch, 150, 300), number)
    return made


def counts(err: str) -> tuple[int, int]:
    """How many records were written, and how many were there already, by what the command says."""
    (said,) = re.findall(r"^records written to .*: ([0-9,]+); there already: ([0-9,]+)$", err, re.MULTILINE)
    return int(said[0].replace(",", "")), int(said[1].replace(",", ""))


def states(folder: Path) -> dict[Path, tuple[int, int]]:
    """Size and time of every file."""
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def test_the_archive_is_what_the_topic_is(source: Source, tmp_path: Path) -> None:
    """Every record in its own bytes, failures and the stream's own too; both show the same; again, nothing is added."""
    first = replay(*source.where, "--to", tmp_path)
    before = states(tmp_path)
    again = replay(*source.where, "--to", tmp_path)

    assert (0, "", (1200, 0)) == (first.code, first.out, counts(first.err))
    assert (0, "", (0, 1200)) == (again.code, again.out, counts(again.err))
    assert before == states(tmp_path)
    assert sorted(source.sent) == sorted(kept(tmp_path))
    assert replay(*source.where, *EVERYTHING) == replay("--files", tmp_path, *EVERYTHING)
    assert not list(tmp_path.rglob("*.partial"))
    assert all("bindsnoop.excerpt" not in header(path) for path in tmp_path.rglob("*.avro"))


def header(path: Path) -> dict[str, Any]:
    """The metadata of a container, as another program reads it."""
    with path.open("rb") as file:
        return dict(fastavro.reader(file).metadata)


def test_a_run_adds_what_is_new(source: Source, tmp_path: Path) -> None:
    """What came since is added, also what came late into a hole; files that were there stay as they are."""
    source.send(stream("node-1", EPOCHS[1], 320, 340))
    replay(*source.where, "--to", tmp_path)
    before = states(tmp_path)

    source.send(stream("node-1", EPOCHS[1], 300, 360))
    source.send(stream("node-3", EPOCHS[0], 0, 30), 1)
    done = replay(*source.where, "--to", tmp_path)

    assert (70, 1220) == counts(done.err)
    assert before.items() <= states(tmp_path).items()
    assert sorted(source.sent) == sorted(kept(tmp_path))


def test_files_into_an_archive(source: Source, tmp_path: Path) -> None:
    """From files, and from topic and files together; damage is said, and another source fills the hole."""
    files, there = tmp_path / "files", tmp_path / "there"
    replay(*source.where, "--to", files)
    segment = max(files.rglob("*.avro"), key=lambda path: path.stat().st_size)
    whole = segment.read_bytes()
    segment.write_bytes(whole[:-30])

    damaged = replay("--files", files, "--to", there)
    partly = len(kept(there))
    both = replay(*source.where, "--files", files, "--to", there)

    assert (3, partly) == (damaged.code, counts(damaged.err)[0])
    assert segment.name in damaged.err
    assert (3, (1200 - partly, partly)) == (both.code, counts(both.err))
    assert 0 < partly < 1200
    assert sorted(source.sent) == sorted(kept(there))


KILLED = """
import sys
from pipeline import copying, replay
copying.HELD_BYTES = 20_000
sys.exit(replay.main(sys.argv[1:]))
"""


def test_killed_and_run_again(kafka: Kafka, topic: str, tmp_path: Path) -> None:
    """Killed at ten moments of its work, the archive always reads without damage, and at the end holds all once."""
    stored.make_topic(kafka.bootstrap, topic)
    source = Source(kafka.bootstrap, topic)
    for node in ("node-1", "node-2"):
        source.send(stream(node, EPOCHS[0], 0, 2_000))
    sizes = [0]
    for _ in range(10):
        with subprocess.Popen(
            [sys.executable, "-c", KILLED, *source.where, "--to", str(tmp_path)],
            env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        ) as process:  # fmt: skip
            until(lambda: process.poll() is not None or bytes_below(tmp_path) > sizes[-1] + 500)
            process.kill()
            process.communicate()
        sizes.append(bytes_below(tmp_path))
        held = kept(tmp_path)
        assert len(set(held)) == len(held)

    done = replay(*source.where, "--to", tmp_path)

    assert (0, (4_000 - len(held), len(held))) == (done.code, counts(done.err))
    assert sorted(source.sent) == sorted(kept(tmp_path))


def bytes_below(folder: Path) -> int:
    """What lies in the files of an archive; one may be renamed meanwhile."""
    total = 0
    for path in folder.rglob("*.avro*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_follow_keeps_archiving_until_it_is_stopped(source: Source, tmp_path: Path, how: signal.Signals) -> None:
    """What comes is kept; what waits when it is stopped is made safe, and every segment has its name."""
    command = [BIN / "bindsnoop-replay", *source.where, "--follow", "--to", tmp_path]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment()) as process:

        def one_more_is_safe() -> bool:
            pos = 300 + len(source.sent) - 1200
            source.send(stream("node-1", EPOCHS[0], pos, pos + 1))
            return bool(list(tmp_path.rglob("*.partial")))

        until(one_more_is_safe)
        process.send_signal(how)
        _, said = process.communicate(timeout=30)
    held = kept(tmp_path)
    rest = replay(*source.where, "--to", tmp_path)

    assert 0 == process.returncode
    assert 1200 < len(held) == len(set(held)) == counts(said)[0]
    assert 0 == counts(said)[1]
    assert not list(tmp_path.rglob("*.partial"))
    assert (0, (len(source.sent) - len(held), len(held))) == (rest.code, counts(rest.err))
    assert sorted(source.sent) == sorted(kept(tmp_path))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_waits_until_a_record_is_counted(number: signal.Signals) -> None:
    """Within a write it is remembered, and stops the work behind it; when the end has begun it does nothing."""
    before = {one: signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)}
    done = []
    try:
        stopping = Stopping()

        def write() -> None:
            with stopping:
                signal.raise_signal(number)
                done.append("written")

        with pytest.raises(KeyboardInterrupt):
            write()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
        stopping.forget()
        signal.raise_signal(number)
        done.append("closed")
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)

    assert ["written", "closed"] == done


# --- a case -------------------------------------------------------------------------------------------------------


def test_an_excerpt_is_marked(source: Source, tmp_path: Path) -> None:
    """Filters cut out a case, with the warnings and notes of its time and nodes; whoever reads it is told."""
    case, copy = tmp_path / "case", tmp_path / "copy"
    filters = ("-P", "10-12,40", "--node", "node-1", "--from", "2026-01-02T12:00Z", "-l", "!app")
    text = "--ports=10-12,40 --from=2026-01-02T12:00:00.000000Z --node=node-1 --selector=!app"

    done = replay(*source.where, "--to", case, *filters)
    again = replay(*source.where, "--to", case, *filters)
    shown = replay("--files", case, *EVERYTHING)
    replay("--files", case, "--to", copy, "-P", "40")

    assert 0 == done.code == again.code == shown.code
    assert (0, counts(done.err)[0]) == counts(again.err)
    assert shown.out == replay(*source.where, *filters, *EVERYTHING).out
    assert 0 < len(shown.out.splitlines()) < 300
    assert {text} == {header(path)["bindsnoop.excerpt"] for path in case.rglob("*.avro")}
    assert 1 == shown.err.count("an excerpt by")
    assert f"an excerpt by {text}; the rest is not in it" in shown.err
    assert {f"{text} --ports=40"} == {header(path)["bindsnoop.excerpt"] for path in copy.rglob("*.avro")}


@pytest.mark.parametrize(
    ("filters", "text"),
    [
        (("-i",), "--ignore-errors=true"), (("--info=false",), "--info=false"), (("--pid", "4242,1"), "--pid=4242,1"),
        (("-n", "!a,b"), "--namespace=!a,b"), (("-p", "x"), "--podname=x"), (("-c", "x"), "--containername=x"),
        (("-l", "a=b,c!=d,e,!f"), "--selector=a=b,c!=d,e,!f"),
        (("--until", "2026-01-02T12:00Z"), "--until=2026-01-02T1"),
    ],
    ids=str,
)  # fmt: skip
def test_every_filter_is_in_the_mark(tmp_path: Path, filters: tuple[str, ...], text: str) -> None:
    """The mark says what was left out, as on the command line, and is covered by the header's checksum."""
    files = tmp_path / "files"
    stored.write(files, stream("node-1", EPOCHS[0], 0, 60), epoch=EPOCHS[0])

    replay("--files", files, "--to", tmp_path / "case", *filters)
    segment = next((tmp_path / "case").rglob("*.avro"))
    said = header(segment)["bindsnoop.excerpt"]
    segment.write_bytes(segment.read_bytes().replace(text.encode(), text.upper().encode()))

    assert said.startswith(text)
    assert 3 == replay("--files", segment).code


# --- what can go wrong --------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "bindsnoop-test", folder], check=True)
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk(source: Source, small_disk: Path) -> None:
    """It is one sentence and exit code 2; with room again, a run completes what is there."""
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(50_000))

    full = replay(*source.where, "--to", small_disk)
    held = kept(small_disk)
    ballast.unlink()
    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
    done = replay(*source.where, "--to", small_disk)

    assert (2, "") == (full.code, full.out)
    assert 1 == len(full.err.splitlines())
    assert "No space left on device" in full.err
    assert str(small_disk) in full.err
    assert (0, (1200 - len(held), len(held))) == (done.code, counts(done.err))
    assert sorted(source.sent) == sorted(kept(small_disk))


def test_two_at_once(source: Source, tmp_path: Path) -> None:
    """A second one into the same folder says so and leaves."""
    command = [BIN / "bindsnoop-replay", *source.where, "--follow", "--to", tmp_path]
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=environment()) as process:
        until(lambda: locked(tmp_path))
        second = replay(*source.where, "--to", tmp_path)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)

    assert (2, 1) == (second.code, len(second.err.splitlines()))
    assert str(tmp_path) in second.err


def locked(folder: Path) -> bool:
    """Whether a process holds the lock of a folder."""
    inode = f":{folder.stat().st_ino} "
    return any("FLOCK" in line and inode in line for line in Path("/proc/locks").read_text().splitlines())


def test_records_without_identity_are_said(kafka: Kafka, topic: str, tmp_path: Path) -> None:
    """They are not kept, for the next run could not know them again; the others are."""
    stored.make_topic(kafka.bootstrap, topic)
    rows = [bind(0, epoch="mine"), bind(0), bind(-5), bind(1)]
    stored.send(kafka.bootstrap, topic, stored.messages(rows))

    done = replay("--topic", topic, "--bootstrap-servers", kafka.bootstrap, "--to", tmp_path)

    assert (3, (2, 0)) == (done.code, counts(done.err))
    assert "2 records are not kept" in done.err


def test_contradictions_are_kept_and_said(kafka: Kafka, topic: str, tmp_path: Path) -> None:
    """Both are in the archive, which then says so too; exit code 3."""
    stored.make_topic(kafka.bootstrap, topic)
    stored.send(kafka.bootstrap, topic, stored.messages([bind(0), bind(0, comm="other"), bind(1)]))

    done = replay("--topic", topic, "--bootstrap-servers", kafka.bootstrap, "--to", tmp_path)
    shown = replay("--files", tmp_path, "--count")

    assert (3, (3, 0)) == (done.code, counts(done.err))
    assert ("3\n", 3) == (shown.out, shown.code)


def test_nothing_matched(tmp_path: Path) -> None:
    """Exit code 1, and no segment."""
    stored.write(tmp_path / "files", [bind(0), bind(1)])

    done = replay("--files", tmp_path / "files", "--to", tmp_path / "case", "-P", "1")

    assert (1, (0, 0)) == (done.code, counts(done.err))
    assert [] == list((tmp_path / "case").rglob("*.avro*"))
