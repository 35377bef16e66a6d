"""bindsnoop-replay as a user runs it: the documented output, the filters, bad input, exit codes."""

from __future__ import annotations

import json
import os
import pty
import random
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline import archive, avro
from tests import stored
from tests.broker import Kafka, Registry, free_ports
from tests.commands import BIN, Done, environment, replay
from tests.stored import bind, failed, own

CASES: list[dict[str, Any]] = json.loads((Path(__file__).parent / "golden/cases.json").read_text(encoding="utf-8"))


def ports(text: str) -> list[int]:
    """The ports of JSON lines, in their order."""
    return [json.loads(line)["port"] for line in text.splitlines()]


# --- the documents ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [case for case in CASES if "live" not in case["name"]], ids=lambda case: case["name"])
def test_documented_output(case: dict[str, Any], tmp_path: Path) -> None:
    """Every header, row and JSON line of the documents comes out of the command byte for byte, from stored events."""
    files = tmp_path / "files"
    files.mkdir()
    if case["events"]:
        stored.write(files, case["events"])

    done = replay("--files", files, *case["args"])

    assert done.out == case["stdout"]
    assert done.code == (0 if case["events"] else 1)


def test_documented_line_from_a_topic_as_typed(kafka: Kafka, topic: str) -> None:
    """The card's command prints the documented JSON from a topic."""
    stored.make_topic(kafka.bootstrap, topic)
    stored.send(kafka.bootstrap, topic, stored.messages([bind(port=4242, comm="nc", addr="::", family="inet6")]))

    done = replay("--topic", topic, "-o", "json", BINDSNOOP_BOOTSTRAP_SERVERS=kafka.bootstrap)

    assert (0, "") == (done.code, done.err)
    assert done.out == (
        '{"type":"normal","node":"node-1","pid":4242,"comm":"nc","proto":"TCP","addr":"::","port":4242,'
        '"opts":".R...","if":"0","mountnsid":4026531840}\n'
    )


# --- filters ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive of two blocks: five attempts, a loss, a checkpoint."""
    return stored.write(
        tmp_path_factory.mktemp("mixed"),
        [bind(0, port=80, pid=1), failed(1, port=80, pid=2), bind(2, port=4343, asked_port=0, pid=1)],
        [own(3), failed(4, port=443, error="EACCES", errno=13), own(5, "info", "checkpoint"), bind(6, port=8100)],
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), [80, 4343, 8100]),
        (("-i",), [80, 4343, 8100]),
        (("-i=false",), [80, 80, 4343, 443, 8100]),
        (("--ignore-errors=false", "--pid", "1"), [80, 4343]),
        (("-i=false", "-P", "80"), [80, 80]),
        (("-i=false", "-P=443,4343"), [4343, 443]),
        (("-P", "8000-8100", "-P", "80"), [80, 8100]),
        (("--tail", "2", "-i=false"), [443, 8100]),
        (("--tail=1",), [8100]),
        (("--tail=1", "-P", "80"), [80]),
        (("--from", "2026-01-02T03:04:05.123458Z", "--until", "2026-01-02T03:04:05.123460Z", "-i=false"), [4343]),
        (("--node", "!node-1"), []),
    ],
)
def test_filters(mixed: Path, arguments: tuple[str, ...], expected: list[int]) -> None:
    """Filters choose attempts exactly as documented; exit code 1 says that nothing matched."""
    done = replay("--files", mixed, "-o", "custom-columns=port", *arguments)

    assert [int(line) for line in done.out.splitlines()[1:]] == expected
    assert done.code == (0 if expected else 1)


@pytest.mark.parametrize(("arguments", "count"), [(("-i=false",), "5\n"), (("-P", "1"), "0\n")])
def test_count(mixed: Path, arguments: tuple[str, ...], count: str) -> None:
    """--count prints how many attempts match, and nothing else; the stream's own records are none."""
    done = replay("--files", mixed, "--count", *arguments)

    assert (count, "") == (done.out, done.err.replace("lost 5 samples", "").replace("node-1", "").strip(" :\n"))


def test_a_loss_is_shown_whatever_is_filtered(mixed: Path) -> None:
    """With columns the loss stands on standard error, with JSON on standard output; info only when asked for."""
    columns = replay("--files", mixed, "-P", "1")
    lines = replay("--files", mixed, "-P", "1", "-o", "json")
    info = replay("--files", mixed, "-P", "1", "-o", "json", "--info")

    assert "lost 5 samples" in columns.err
    assert "lost 5 samples" not in columns.out
    loss = '{"type":"warn","node":"node-1","message":"lost 5 samples"}\n'
    assert lines.out == loss
    assert info.out == loss + '{"type":"info","node":"node-1","message":"checkpoint"}\n'
    assert (1, 1, 1) == (columns.code, lines.code, info.code)


def test_tail_of_a_topic_is_the_tail_of_its_files(kafka: Kafka, topic: str, tmp_path: Path) -> None:
    """--tail counts matches, over several batches, the same from a topic as from files."""
    rows = [bind(pos, port=1 + pos % 7) if pos % 3 else failed(pos, port=1 + pos % 7) for pos in range(500)]
    stored.make_topic(kafka.bootstrap, topic)
    stored.send(kafka.bootstrap, topic, stored.messages(rows))
    stored.write(tmp_path, rows[:200], rows[200:])

    options = ("--tail", "9", "-P", "3", "-o", "custom-columns=port,errno,pos")
    from_topic = replay("--topic", topic, "--bootstrap-servers", kafka.bootstrap, *options)
    from_files = replay("--files", tmp_path, *options)

    expected = [row["pos"] for row in rows if row["port"] == 3 and row["errno"] == 0][-9:]
    assert [int(line.split()[2]) for line in from_topic.out.splitlines()[1:]] == expected
    assert from_topic.out == from_files.out


def test_time(mixed: Path) -> None:
    """-T puts TIME first and ``time`` last, UTC to the microsecond."""
    columns = replay("--files", mixed, "-T", "--tail", "1")
    line = replay("--files", mixed, "-T", "--tail", "1", "-o", "json")

    assert [row.split()[0] for row in columns.out.splitlines()] == ["TIME", "2026-01-02T03:04:05.123462Z"]
    assert line.out.endswith(',"time":"2026-01-02T03:04:05.123462Z"}\n')


def test_json_full_has_every_value(mixed: Path) -> None:
    """-o json-full shows every field that is not null, in schema order."""
    done = replay("--files", mixed, "-o", "json-full", "--tail", "1")

    shown = json.loads(done.out)
    expected = bind(6, port=8100)
    assert list(shown) == list(expected)
    assert {name: value for name, value in shown.items() if name != "time"} == {
        name: value for name, value in expected.items() if name != "time"
    }


def test_topic_and_files_together(kafka: Kafka, topic: str, mixed: Path) -> None:
    """A topic and files can be replayed in one go, the topic first."""
    stored.make_topic(kafka.bootstrap, topic)
    stored.send(kafka.bootstrap, topic, stored.messages([bind(0, port=7)]))

    done = replay(
        "--topic", topic, "--bootstrap-servers", kafka.bootstrap, "--files", mixed, "-o", "custom-columns=port"
    )

    assert [line.strip() for line in done.out.splitlines()] == ["PORT", "7", "80", "4343", "8100"]


def test_partitions_are_replayed_by_number(kafka: Kafka, topic: str) -> None:
    """Each partition keeps its order, and partitions follow each other by number."""
    stored.make_topic(kafka.bootstrap, topic, partitions=3)
    for partition in (2, 0, 1):
        rows = [bind(pos, port=100 * partition + pos + 1) for pos in range(3)]
        stored.send(kafka.bootstrap, topic, stored.messages(rows), partition)

    done = replay("--topic", topic, "--bootstrap-servers", kafka.bootstrap, "-o", "custom-columns=port")

    assert [int(line) for line in done.out.splitlines()[1:]] == [1, 2, 3, 101, 102, 103, 201, 202, 203]


def test_follow_shows_what_comes_and_ends_cleanly(kafka: Kafka, topic: str) -> None:
    """--follow shows what is there and then what comes; Ctrl-C ends it with 0."""
    stored.make_topic(kafka.bootstrap, topic)
    stored.send(kafka.bootstrap, topic, stored.messages([bind(0, port=1)]))
    command = [BIN / "bindsnoop-replay", "--topic", topic, "--bootstrap-servers", kafka.bootstrap, "--follow"]
    with subprocess.Popen(
        [*command, "-o", "custom-columns=port"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment(),
    ) as process:  # fmt: skip
        assert process.stdout is not None
        first = [process.stdout.readline().strip() for _ in range(2)]
        stored.send(kafka.bootstrap, topic, stored.messages([bind(1, port=2)]))
        second = process.stdout.readline().strip()
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=20)

    assert (["PORT", "1"], "2", ("", ""), 0) == (first, second, rest, process.returncode)


# --- what a process or a topic may contain ------------------------------------------------------------------------


@pytest.mark.parametrize("output", ["columns", "json", "json-full"])
def test_hostile_text_never_reaches_the_terminal(tmp_path: Path, output: str) -> None:
    """Stored text with escapes, line breaks and separators is one printable line, and JSON parses."""
    harm = "\x1b[2J\r\n\u2028\u202e\x00\x9b31m\x7f"
    stored.write(tmp_path, [bind(0, comm=harm, node=harm, opts=harm, addr=harm, ifname=harm, ifindex=7, port=1)])

    done = replay("--files", tmp_path, "-o", output)

    lines = done.out.splitlines()
    assert len(lines) == (2 if output == "columns" else 1)
    assert all(line.isprintable() for line in lines)
    if output != "columns":
        assert json.loads(lines[-1])["port"] == 1


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "nothing to read"),
        (("--files", "/nowhere/at/all"), "/nowhere/at/all"),
        (("--files", ".", "-P", "0"), "'0'"),
        (("--files", ".", "-P", "70000"), "'70000'"),
        (("--files", ".", "-P", "80,a"), "'a'"),
        (("--files", ".", "-P", "80-"), "'80-'"),
        (("--files", ".", "--from", "2026-01-02", "--until", "2026-01-01"), "--until"),
        (("--files", ".", "-o", "custom-columns=pid,kolumn"), "kolumn"),
        (("--files", ".", "--tail", "0"), "--tail"),
        (("--topic", "binds", "-X", "no.such.setting=1"), "no.such.setting"),
        (("--topic", "binds", "--follow", "--tail", "3"), "--tail"),
    ],
)
def test_wrong_arguments(arguments: tuple[str, ...], said: str) -> None:
    """A wrong argument is one sentence that names it, and exit code 2."""
    done = replay(*arguments)

    assert (2, "") == (done.code, re.sub(r".*\n", "", done.out, count=1))
    assert said in done.err
    assert len(done.err.splitlines()) == 1
    assert done.err.startswith("bindsnoop-replay: ")


def test_unreachable_broker() -> None:
    """A broker that is not there is one sentence that names its address, within seconds."""
    (port,) = free_ports(1)
    begun = time.monotonic()

    done = replay("--topic", "binds", "--bootstrap-servers", f"127.0.0.1:{port}")

    assert done.code == 2
    assert f"127.0.0.1:{port}" in done.err
    assert len(done.err.splitlines()) == 1
    assert time.monotonic() - begun < 10


def test_unknown_topic(kafka: Kafka, topic: str) -> None:
    """A topic that is not there is named, and so is one that looks like it."""
    stored.make_topic(kafka.bootstrap, f"{topic}s")

    done = replay("--topic", topic, "--bootstrap-servers", kafka.bootstrap)

    assert done.code == 2
    assert f"topic {topic} does not exist" in done.err
    assert f"{topic}s" in done.err


def test_empty_topic(kafka: Kafka, topic: str) -> None:
    """An empty topic is an answer: the header, and that nothing matched."""
    stored.make_topic(kafka.bootstrap, topic)

    done = replay("--topic", topic, "--bootstrap-servers", kafka.bootstrap)

    assert (1, 1, "") == (done.code, len(done.out.splitlines()), done.err)


def test_bad_messages_are_said_and_passed(kafka: Kafka, topic: str) -> None:
    """What is no event is said with its offset and the reason; every event around it is shown; exit code 3."""
    good = stored.messages([bind(pos, port=pos + 1) for pos in range(7)])
    bad = [b"hello", None, b"", good[0][:-3], good[0] + b"\0", b"\xc3\x01" + b"\x55" * 8 + good[0][10:], bytes(900_000)]
    stored.make_topic(kafka.bootstrap, topic)
    stored.send(kafka.bootstrap, topic, [value for pair in zip(good, bad, strict=True) for value in pair])

    done = replay("--topic", topic, "--bootstrap-servers", kafka.bootstrap, "-o", "json")

    assert ports(done.out) == list(range(1, 8))
    assert done.code == 3
    for offset in range(1, 14, 2):
        assert f"{topic}[0] offset {offset}:" in done.err
    assert "Traceback" not in done.err


def test_registry_resolves_ids(kafka: Kafka, registry: Registry, topic: str) -> None:
    """Messages in the Confluent framing are read with the schema that the registry has for their id."""
    from pipeline import event
    from pipeline.registry import Registry as Client

    number = Client(registry.url).register(f"{topic}-value", event.schema_text())
    stored.make_topic(kafka.bootstrap, topic)
    stored.send(kafka.bootstrap, topic, stored.messages([bind(0, port=1)], number))
    stored.send(kafka.bootstrap, topic, stored.messages([bind(1, port=2)], number + 1000))

    done = replay(
        "--topic", topic, "--bootstrap-servers", kafka.bootstrap, "--schema-registry", registry.url, "-o", "json"
    )

    assert ports(done.out) == [1, 2]
    assert f"schema id {number} " not in done.err
    assert f"schema id {number + 1000} is read as the schema that this program carries" in done.err


def test_registry_that_is_down_hides_nothing(kafka: Kafka, topic: str) -> None:
    """While the registry is down, events are read with the schema that the program carries, and that is said once."""
    (port,) = free_ports(1)
    stored.make_topic(kafka.bootstrap, topic)
    stored.send(kafka.bootstrap, topic, stored.messages([bind(pos, port=pos + 1) for pos in range(5)], 3))

    done = replay(
        "--topic", topic, "--bootstrap-servers", kafka.bootstrap, "-o", "json",
        "--schema-registry", f"http://127.0.0.1:{port}",
    )  # fmt: skip

    assert ports(done.out) == [1, 2, 3, 4, 5]
    assert done.err.count("schema id 3 is read as the schema that this program carries") == 1
    assert done.code == 0


@pytest.fixture
def segment(tmp_path: Path) -> Path:
    """A file of 40 blocks, one bind each, port 1 to 40; large enough that blocks are not read as one."""
    folder = stored.write(
        tmp_path / "archive", *[[bind(pos, port=pos + 1, comm=os.urandom(900).hex())] for pos in range(40)]
    )
    return next(folder.rglob("*.avro"))


def test_empty_file(tmp_path: Path) -> None:
    """An empty file is no archive; it is said, and the others are read."""
    stored.write(tmp_path, [bind(0, port=1)])
    (tmp_path / "empty.avro").touch()

    done = replay("--files", tmp_path, "-o", "json")

    assert ([1], 3) == (ports(done.out), done.code)
    assert "empty.avro" in done.err


def test_foreign_files_in_a_folder_are_left_alone(tmp_path: Path) -> None:
    """In a folder only Avro files count; a file that is named is read or refused."""
    stored.write(tmp_path, [bind(0, port=1)])
    (tmp_path / "notes.txt").write_text("not Avro")

    folder, file = replay("--files", tmp_path, "-o", "json"), replay("--files", tmp_path / "notes.txt", "-o", "json")

    assert ([1], 0, "") == (ports(folder.out), folder.code, folder.err)
    assert ("", 3) == (file.out, file.code)
    assert "notes.txt" in file.err


def test_truncated_file(segment: Path) -> None:
    """A file that ends early gives every whole block, and says where the rest is missing."""
    segment.write_bytes(segment.read_bytes()[: segment.stat().st_size * 2 // 3])

    done = replay("--files", segment, "-o", "json")

    shown = ports(done.out)
    assert shown == list(range(1, len(shown) + 1))
    assert 20 <= len(shown) < 40
    assert done.code == 3
    assert segment.name in done.err


def test_flipped_bits_hide_no_other_block(segment: Path) -> None:
    """A damaged block is said; every other block is shown; nothing wrong is shown."""
    whole = bytearray(segment.read_bytes())
    chosen = random.Random(7)
    for _ in range(8):
        damaged = bytearray(whole)
        damaged[chosen.randrange(len(whole) // 4, len(whole))] ^= 1 << chosen.randrange(8)
        segment.write_bytes(damaged)

        done = replay("--files", segment, "-o", "json")

        shown = ports(done.out)
        assert set(shown) < set(range(1, 41))
        assert len(shown) >= 38
        assert done.code == 3
        assert segment.name in done.err


def test_a_block_of_nonsense_hides_no_other(tmp_path: Path) -> None:
    """A block whose checksum is right and whose datums are none is said; the small blocks around it are shown."""
    writer = archive.Writer(tmp_path, node="node-1", epoch="0" * 16, now=lambda: stored.BASE_US / 1e6)
    for pos in range(5):
        made = stored.batch([bind(pos, port=pos + 1)])
        datums = pa.array([b"\xff" * 50]) if pos == 2 else avro.encode(made)
        writer.write(datums, pos, made.column("time"))
    writer.close()

    done = replay("--files", tmp_path, "-o", "json")

    assert ports(done.out) == [1, 2, 4, 5]
    assert done.code == 3
    assert "block at byte" in done.err


def test_closed_standard_output(mixed: Path) -> None:
    """``| head`` has enough: no traceback, nothing said, exit code 0."""
    command = f"{BIN}/bindsnoop-replay --files {mixed} {mixed} -o json | head -n 1; echo ${{PIPESTATUS[0]}}"

    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment(), check=False)

    assert [json.loads(done.stdout.splitlines()[0])["port"], done.stdout.splitlines()[1], done.stderr] == [80, "0", ""]


def test_output_that_is_closed_while_much_is_written(tmp_path: Path) -> None:
    """A reader that leaves in the middle of a long output ends the command quietly."""
    stored.write(tmp_path, [bind(pos, port=1 + pos % 60000) for pos in range(20_000)])
    command = f"{BIN}/bindsnoop-replay --files {tmp_path} -o json-full | head -n 1 | wc -l; echo ${{PIPESTATUS[0]}}"

    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment(), check=False)

    assert ["1", "0", ""] == [*done.stdout.split(), done.stderr]


def test_a_home_that_is_closed(mixed: Path, tmp_path: Path) -> None:
    """A user without access to the folder of their settings has none; that is no error."""
    closed = tmp_path / "closed"
    closed.mkdir(mode=0)

    done = subprocess.run(
        ["setpriv", "--bounding-set=-all", BIN / "bindsnoop-replay", "--files", mixed, "--count"],
        capture_output=True, text=True, env=environment(HOME=str(closed)), check=False,
    )  # fmt: skip

    assert ("3\n", 0) == (done.stdout, done.returncode)


# --- on a terminal ------------------------------------------------------------------------------------------------


def test_closing_line_on_a_terminal_says_what_is_hidden(mixed: Path) -> None:
    """On a terminal the last line says how many failures were hidden and how to see them; elsewhere nothing is said."""
    terminal, theirs = pty.openpty()
    process = subprocess.Popen(
        [BIN / "bindsnoop-replay", "--files", mixed], stdout=subprocess.PIPE, stderr=theirs, env=environment()
    )
    os.close(theirs)
    process.communicate(timeout=30)
    said = b""
    try:
        while chunk := os.read(terminal, 65536):
            said += chunk
    except OSError:  # the other side is closed
        pass
    os.close(terminal)

    assert "2 failed attempts are hidden, -i=false shows them" in said.decode()
    assert "hidden" not in replay("--files", mixed).err


# --- names that came late -----------------------------------------------------------------------------------------

ID, NEVER = "ab" * 32, "cd" * 32
WEB = {"container": "web", "image": "nginx:1.27", "namespace": "default", "pod": "web-1", "labels": {"app": "web"}}


def told_late() -> list[dict[str, Any]]:
    """Binds of two containers with their ids alone; then the stream tells the names of one."""
    told = stored.own(3, "info", "container …", kind="workload", container_id=ID, **WEB)
    return [
        stored.bind(0, container_id=ID, port=1001),
        stored.bind(1, container_id=NEVER, port=1002),
        stored.bind(2, container_id=ID, port=1003, node="node-2"),
        told,
        stored.bind(4, container_id=ID, port=1005, **WEB),
        stored.failed(5, container_id=ID, port=1006),
    ]


def names_of(done: Done) -> dict[int, tuple[str | None, ...]]:
    """By port: namespace, pod, container, and the label ``app``."""
    rows = [json.loads(line) for line in done.out.splitlines()]
    return {
        row["port"]: (row.get("namespace"), row.get("pod"), row.get("container"), row["labels"].get("app"))
        for row in rows
    }


NAMED, RAW = ("default", "web-1", "web", "web"), (None, None, None, None)


def test_resolve_names_events_after_the_fact(tmp_path: Path) -> None:
    """With --resolve an event has the names that the stream told later, of its own node; without, it has its id."""
    where = ["--files", stored.write(tmp_path, told_late()), "-i=false", "-o", "json-full"]

    resolved = names_of(replay(*where, "--resolve"))
    assert {1001: NAMED, 1002: RAW, 1003: RAW, 1005: NAMED, 1006: NAMED} == resolved
    assert {1001: RAW, 1002: RAW, 1003: RAW, 1005: NAMED, 1006: RAW} == names_of(replay(*where))


def test_resolve_comes_before_selecting(tmp_path: Path) -> None:
    """A pod is found by the names that were told late, also by --tail and --count, also told after --until."""
    where = ["--files", stored.write(tmp_path, told_late()), "--resolve"]
    until = "2026-01-02T03:04:05.123458Z"

    for asked in (["-n", "default"], ["-p", "web-1"], ["-c", "web"], ["-l", "app=web"]):
        assert replay(*where, *asked, "--count").out == "2\n"
        assert replay(*where, *asked, "-i=false", "--count").out == "3\n"
    assert replay(*where, "-n", "default", "--until", until, "--count").out == "1\n"
    tail = replay(*where, "-n", "default", "-i=false", "--tail", "2", "-o", "json-full")
    assert [1005, 1006] == list(names_of(tail))


def test_resolve_from_a_topic(kafka: Kafka, topic: str) -> None:
    """A topic is read twice, and gives what the same events give from files."""
    stored.make_topic(kafka.bootstrap, topic)
    stored.send(kafka.bootstrap, topic, stored.messages(told_late()))
    where = ["--topic", topic, "--bootstrap-servers", kafka.bootstrap, "-i=false", "--resolve", "-o", "json-full"]

    assert {1001: NAMED, 1002: RAW, 1003: RAW, 1005: NAMED, 1006: NAMED} == names_of(replay(*where))
    assert [1005, 1006] == list(names_of(replay(*where, "-n", "default", "--tail", "2")))


def test_all_namespaces_wins(tmp_path: Path) -> None:
    """-A is as without -n, whichever comes first."""
    where = ["--files", stored.write(tmp_path, told_late()), "--count"]

    assert ["4", "1", "4", "4"] == [
        replay(*where, *flags).out.strip() for flags in ((), ("-n", "default"), ("-A",), ("-A", "-n", "default"))
    ]
