"""bindsnoop-agent as a user runs it: from real binds of this kernel to files and a real Kafka, and back by replay."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from pipeline.agent import Ledger, Undelivered
from tests import stored
from tests.broker import Kafka, Registry, free_ports, kafka, registry
from tests.commands import BIN, agent_running, environment, replay, run, small_disk, until

ME = str(os.getpid())
ROOT = Path(__file__).parent.parent


def bound() -> tuple[socket.socket, int]:
    """A socket of this process that has a port, and the port."""
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    return sock, sock.getsockname()[1]


def some_binds(count: int = 3) -> list[int]:
    """Bind so many sockets one after the other; their ports."""
    found = []
    for _ in range(count):
        sock, port = bound()
        sock.close()
        found.append(port)
    return found


def events(*source: object) -> list[dict[str, Any]]:
    """Everything that replay reads from a source, with the stream's own records, as json-full."""
    done = replay(*source, "-i=false", "--info", "-o", "json-full")
    assert done.code in (0, 1), done.err
    return [json.loads(line) for line in done.out.splitlines()]


def mine(found: list[dict[str, Any]]) -> list[int]:
    """Ports of this process's binds."""
    return [event["port"] for event in found if event.get("pid") == os.getpid()]


def test_files(tmp_path: Path) -> None:
    """Every bind while the agent runs is in the archive, from start to stop, each position once and without a hole."""
    with agent_running("--files", str(tmp_path)) as agent:
        ports = some_binds(50)

    found = events("--files", tmp_path)
    assert mine(found) == ports
    assert [event["pos"] for event in found] == list(range(len(found)))
    assert ("start", "stop") == (found[0]["kind"], found[-1]["kind"])
    assert {event["node"] for event in found} == {"node-1"}
    assert len({event["epoch"] for event in found}) == 1
    assert agent.code == 0
    assert list(tmp_path.rglob("*.partial")) == []


def test_accounting(tmp_path: Path) -> None:
    """At the end attempted = read + lost, and as many attempts are in the archive as were read."""
    with agent_running("--files", str(tmp_path)):
        some_binds(200)

    found = events("--files", tmp_path)
    counts = found[-1]["testimony"]["counts"]
    binds = [event for event in found if event["kind"] == "bind"]
    lost = sum(value for name, value in counts.items() if name.startswith("lost_"))
    assert counts["read"] == len(binds) >= 200
    assert counts["attempted"] == counts["submitted"] + lost + counts["faulted"]
    assert counts["submitted"] == counts["read"]


def test_accounting_while_binds_go_on(tmp_path: Path) -> None:
    """An agent that stops in the middle of a load stops counting and reading at the same attempt."""
    subprocess.run(["make", "-s", "-C", ROOT / "benchmarks", "bindload"], check=True)
    load = [ROOT / "benchmarks/bindload", "--mode", "fail", "--rate", "0", "--seconds", "60"]
    with subprocess.Popen(load, stdout=subprocess.DEVNULL) as binding:
        with agent_running("--files", str(tmp_path)) as agent:
            until(lambda: sum(path.stat().st_size for path in tmp_path.rglob("*.partial")) > 1_000_000)
        binding.terminate()

    done = replay("--files", tmp_path, "--pid", "1", "--info", "-o", "json-full")
    counts = json.loads(done.out.splitlines()[-1])["testimony"]["counts"]
    lost = sum(value for name, value in counts.items() if name.startswith("lost_"))
    assert counts["attempted"] == counts["read"] + lost + counts["faulted"]
    assert agent.code == 0


def test_what_a_lost_declaration_said_is_said_again() -> None:
    """When the record that declared a gap is given up too, the gap is declared once more, as one with its neighbour."""
    ledger = Ledger()
    first, second = Undelivered(0, 9, "full"), Undelivered(10, 29, "full")
    ledger.add([first])
    declared = ledger.take()
    ledger.declared(first, 20)

    ledger.add([second])

    assert [first] == declared
    assert [Undelivered(0, 29, "full")] == ledger.take()
    ledger.add([Undelivered(40, 49, "full")])
    assert [Undelivered(40, 49, "full")] == ledger.take()


def test_checkpoints(tmp_path: Path) -> None:
    """A checkpoint follows when enough records have been written, and speaks of every position before it."""
    with agent_running("--files", str(tmp_path), "--checkpoint-records", "20"):
        for _ in range(3):
            some_binds(30)
            until(lambda: _checkpoints(tmp_path) > 0)

    found = events("--files", tmp_path)
    spans = [
        (event["testimony"]["first_pos"], event["testimony"]["last_pos"])
        for event in found
        if event["kind"] == "checkpoint"
    ]
    assert len(spans) >= 2
    assert spans[0][0] == 0
    assert all(later[0] == earlier[1] + 1 for earlier, later in itertools.pairwise(spans))


def _checkpoints(folder: Path) -> int:
    done = replay("--files", folder, "--info", "-o", "json")
    return done.out.count('"message":"checkpoint of')


@pytest.mark.parametrize("with_registry", [True, False], ids=["registry", "no registry"])
def test_topic(kafka: Kafka, registry: Registry, topic: str, with_registry: bool) -> None:
    """Binds travel from the kernel through Kafka to the documented line, with a registry and without one."""
    where = ["--topic", topic, "--bootstrap-servers", kafka.bootstrap]
    where += ["--schema-registry", registry.url] if with_registry else []
    extra = ["--register-schema"] if with_registry else []
    with agent_running(*where, *extra, "--create-topic") as agent:
        ports = some_binds(20)

    done = replay(*where, "--pid", ME, "-o", "json")
    assert [json.loads(line)["port"] for line in done.out.splitlines()] == ports
    assert ("", 0) == (done.err, done.code)
    found = events(*where)
    assert [event["pos"] for event in found] == list(range(len(found)))
    assert agent.code == 0


def test_files_and_topic_hold_the_same(kafka: Kafka, topic: str, tmp_path: Path) -> None:
    """With both destinations the same records are in both, byte for byte as json-full shows them."""
    where = ["--topic", topic, "--bootstrap-servers", kafka.bootstrap]
    with agent_running(*where, "--create-topic", "--files", str(tmp_path)):
        some_binds(20)

    assert events(*where) == events("--files", tmp_path)


def test_live_view_of_a_topic(kafka: Kafka, topic: str) -> None:
    """replay --follow shows a bind while the agent runs."""
    where = ["--topic", topic, "--bootstrap-servers", kafka.bootstrap]
    stored.make_topic(kafka.bootstrap, topic)
    with (
        agent_running(*where),
        subprocess.Popen(
            [BIN / "bindsnoop-replay", *where, "--follow", "--pid", ME, "-o", "custom-columns=port"],
            stdout=subprocess.PIPE, text=True, env=environment(),
        ) as follower,
    ):  # fmt: skip
        assert follower.stdout is not None
        header = follower.stdout.readline().strip()
        ports = some_binds(2)
        shown = [int(follower.stdout.readline()) for _ in ports]
        follower.send_signal(signal.SIGINT)

    assert ("PORT", ports) == (header, shown)


def test_broker_down_at_start(topic: str) -> None:
    """An agent whose broker is away keeps the events, says so once however long, and delivers them when it comes."""
    (port,) = free_ports(1)
    where = ["--topic", topic, "--bootstrap-servers", f"127.0.0.1:{port}"]
    with agent_running(*where, "--create-topic") as agent:
        ports = some_binds(10)
        with kafka(port=port) as late:
            until(lambda: mine(events_or_none(*where))[: len(ports)] == ports, 30)
            assert late.bootstrap == f"127.0.0.1:{port}"
            # Before the broker ends, which may be said too.
            until_now = agent.talk

    assert len(re.findall("cannot be reached", until_now)) == 1
    assert len(agent.talk.splitlines()) < 12


def events_or_none(*source: object) -> list[dict[str, Any]]:
    """As ``events``; nothing while the source cannot be reached."""
    done = replay(*source, "-i=false", "--info", "-o", "json-full")
    return [json.loads(line) for line in done.out.splitlines()] if done.code in (0, 1) else []


def test_registry_down_at_start(kafka: Kafka, topic: str) -> None:
    """An agent whose registry is away keeps the events, says so, and delivers them when it comes."""
    (port,) = free_ports(1)
    where = ["--topic", topic, "--bootstrap-servers", kafka.bootstrap]
    where += ["--schema-registry", f"http://127.0.0.1:{port}/apis/ccompat/v7"]
    stored.make_topic(kafka.bootstrap, topic)
    with agent_running(*where, "--register-schema") as agent:
        ports = some_binds(10)
        with registry(port=port):
            until(lambda: mine(events_or_none(*where))[: len(ports)] == ports, 30)

    assert "registry" in agent.talk
    assert "trying again" in agent.talk


def holes(found: list[dict[str, Any]]) -> set[int]:
    """Positions that are not there, up to the last that is."""
    positions = {event["pos"] for event in found}
    return set(range(max(positions))) - positions


def declared(found: list[dict[str, Any]]) -> set[int]:
    """Positions that ``loss`` records speak of."""
    spans = [event["testimony"] for event in found if event["kind"] == "loss" and "last_pos" in event["testimony"]]
    return {pos for span in spans for pos in range(span["first_pos"], span["last_pos"] + 1)}


def test_full_queue_is_declared(topic: str) -> None:
    """Without a disk the oldest records go when a broker is away for too long, and the stream says which."""
    (port,) = free_ports(1)
    where = ["--topic", topic, "--bootstrap-servers", f"127.0.0.1:{port}"]
    limits = ["--queue-bytes", "1MiB", "--checkpoint-age", "1s", "--create-topic", "--spool", "none"]
    with agent_running(*where, *limits) as agent:
        until(lambda: bool(some_binds(500)) and "given up" in agent.talk, 60)
        with kafka(port=port):
            until(lambda: any(event["kind"] == "loss" for event in events_or_none(*where)), 40)
            agent.process.send_signal(signal.SIGTERM)
            agent.process.wait(30)
            delivered = events(*where)

    assert holes(delivered)
    assert declared(delivered) == holes(delivered)
    assert agent.code == 0


@pytest.mark.parametrize("with_files", [True, False], ids=["files", "spool"])
def test_what_memory_cannot_hold_waits_on_disk(tmp_path: Path, topic: str, with_files: bool) -> None:
    """However much is bound while the broker is away, the topic gets all of it, in order, and then the newest."""
    (port,) = free_ports(1)
    where = ["--topic", topic, "--bootstrap-servers", f"127.0.0.1:{port}"]
    disk = ["--files" if with_files else "--spool", str(tmp_path)]
    with agent_running(*where, *disk, "--queue-bytes", "1MiB", "--create-topic", "--segment-bytes", "64KiB") as agent:
        before = some_binds(8000)
        with kafka(port=port):
            until(lambda: mine(events_or_none(*where))[: len(before)] == before, 60)
            after = some_binds(5)
            agent.process.send_signal(signal.SIGTERM)
            agent.process.wait(30)
            delivered = events(*where)

    # Whoever starts a broker binds too.
    assert mine(delivered)[: len(before)] == before
    assert mine(delivered)[-5:] == after
    assert [event["pos"] for event in delivered] == list(range(len(delivered)))
    assert not any(event["kind"] == "loss" for event in delivered)
    assert agent.code == 0


def test_killed_before_the_topic_had_it(tmp_path: Path, topic: str) -> None:
    """What an agent had on disk when it was killed is sent by the next one, first, and is then gone from the disk."""
    (port,) = free_ports(1)
    where = ["--topic", topic, "--bootstrap-servers", f"127.0.0.1:{port}", "--spool", str(tmp_path), "--create-topic"]
    with agent_running(*where) as agent:
        first = some_binds(3000)
        until(lambda: mine(events("--files", tmp_path))[-1:] == first[-1:])
        agent.process.kill()
        agent.process.wait()
    with agent_running(*where, "--segment-age", "1s") as agent:
        second = some_binds(5)
        with kafka(port=port):
            until(lambda: mine(events_or_none(*where[:4]))[: len(first + second)] == first + second, 60)
            until(lambda: not list(tmp_path.rglob("*.avro")), 60)
            agent.process.send_signal(signal.SIGTERM)
            agent.process.wait(30)
            delivered = events(*where[:4])

    assert mine(delivered)[: len(first + second)] == first + second
    assert len({event["epoch"] for event in delivered}) == 2
    assert agent.code == 0


def test_what_was_acknowledged_is_not_sent_again(tmp_path: Path, kafka: Kafka, topic: str) -> None:
    """An agent that stopped in order leaves nothing to send; the next one adds its own records and no others."""
    where = ["--topic", topic, "--bootstrap-servers", kafka.bootstrap, "--create-topic"]
    ports = []
    for _ in range(2):
        with agent_running(*where, "--files", str(tmp_path)):
            ports += some_binds(20)

    assert mine(events(*where[:4])) == ports
    assert events(*where[:4]) == events("--files", tmp_path)


def test_a_topic_that_is_new_to_an_archive(tmp_path: Path, kafka: Kafka, topic: str) -> None:
    """Events of the time before there was a topic stay in the archive alone."""
    with agent_running("--files", str(tmp_path)):
        some_binds(20)
    where = ["--topic", topic, "--bootstrap-servers", kafka.bootstrap]
    with agent_running(*where, "--create-topic", "--files", str(tmp_path)):
        ports = some_binds(20)

    assert mine(events(*where)) == ports


def test_a_spool_that_is_full_is_declared(tmp_path: Path, topic: str) -> None:
    """Beyond --spool-bytes the oldest goes, the log says so at once, and the stream says which records those were."""
    (port,) = free_ports(1)
    where = ["--topic", topic, "--bootstrap-servers", f"127.0.0.1:{port}"]
    limits = ["--spool", str(tmp_path), "--spool-bytes", "1MiB", "--queue-bytes", "1MiB", "--checkpoint-age", "1s"]
    with agent_running(*where, *limits, "--create-topic") as agent:
        # What memory and the batch under way hold is not lost with its segments: more than that has to go.
        until(lambda: bool(some_binds(2000)) and agent.talk.count("has not acknowledged all of it") >= 8, 90)
        with kafka(port=port):
            # Where nobody binds a checkpoint, and with it what it declares, may take a minute.
            until(lambda: bool(some_binds(1)) and any(event["kind"] == "loss" for event in events_or_none(*where)), 60)
            agent.process.send_signal(signal.SIGTERM)
            agent.process.wait(30)
            delivered = events(*where)

    assert holes(delivered)
    assert declared(delivered) == holes(delivered)


def test_a_spool_that_cannot_be_written(tmp_path: Path, kafka: Kafka, topic: str) -> None:
    """A disk that refuses from the start is said once, and what is bound reaches the topic from memory."""
    (tmp_path / "file").touch()
    where = ["--topic", topic, "--bootstrap-servers", kafka.bootstrap]
    with agent_running(*where, "--create-topic", "--spool", str(tmp_path / "file" / "spool")) as agent:
        ports = some_binds(20)
        until(lambda: mine(events_or_none(*where)) == ports)

    assert mine(events(*where)) == ports
    assert 1 == agent.talk.count("cannot be written")
    assert agent.code == 0


def test_full_disk() -> None:
    """A disk that is full stops neither the agent nor the capture; when it has room again nothing is missing."""
    with small_disk("3m") as disk:
        with agent_running("--files", str(disk / "archive"), "--checkpoint-age", "1h") as agent:
            before = some_binds(5)
            until(lambda: len(mine(events("--files", disk / "archive"))) == 5)
            ballast = disk / "ballast"
            with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as full:
                while True:
                    full.write(bytes(4096))
            during = []
            while "No space left" not in agent.talk:
                during += some_binds(200)
            # What is on disk can be read meanwhile; and by then the last of these binds is held.
            kept = mine(events("--files", disk / "archive"))
            assert before == kept[:5]
            assert len(kept) < 5 + len(during)
            ballast.unlink()
            # Without another bind: what was held is written by itself.
            until(lambda: mine(events("--files", disk / "archive")) == before + during)
            after = some_binds(5)

        found = events("--files", disk / "archive")
    assert mine(found) == before + during + after
    assert [event["pos"] for event in found] == list(range(len(found)))


def test_killed_agent_leaves_what_it_wrote(tmp_path: Path) -> None:
    """After kill -9 the archive can be read up to the last batch, and the next agent goes on beside it."""
    lock = tmp_path / "lock"
    with agent_running("--files", str(tmp_path / "archive"), lock=lock) as agent:
        first = some_binds(5)
        until(lambda: mine(events("--files", tmp_path / "archive")) == first)
        agent.process.kill()
        agent.process.wait()
        left = replay("--files", tmp_path / "archive", "--pid", ME, "-o", "custom-columns=port")
    with agent_running("--files", str(tmp_path / "archive"), lock=lock):
        second = some_binds(5)

    assert [int(line) for line in left.out.splitlines()[1:]] == first
    assert left.code == 0
    found = events("--files", tmp_path / "archive")
    assert mine(found) == first + second
    assert len({event["epoch"] for event in found}) == 2


def test_segments_rotate(tmp_path: Path) -> None:
    """--segment-bytes closes files; replay reads them as one, in order."""
    with agent_running("--files", str(tmp_path), "--segment-bytes", "64KiB"):
        ports = []
        while len(list(tmp_path.rglob("*.avro"))) < 2:
            ports += some_binds(100)

    assert mine(events("--files", tmp_path)) == ports


def test_address_from_a_properties_file(kafka: Kafka, topic: str, tmp_path: Path) -> None:
    """A properties file may name the brokers, for the agent and for replay; a flag would win."""
    properties = tmp_path / "client.properties"
    properties.write_text(f"# ours\nbootstrap.servers={kafka.bootstrap}\n")
    where = ["--topic", topic, "--properties", str(properties)]
    with agent_running(*where, "--create-topic"):
        ports = some_binds(2)

    assert mine(events(*where)) == ports


def test_retention(tmp_path: Path) -> None:
    """--keep-bytes deletes the oldest segments, says so, and what is left can be read."""
    with agent_running("--files", str(tmp_path), "--segment-bytes", "64KiB", "--keep-bytes", "1MiB") as agent:
        until(lambda: bool(some_binds(2000)) and "was deleted" in agent.talk, 60)

    left = sum(path.stat().st_size for path in tmp_path.rglob("*.avro"))
    found = events("--files", tmp_path)
    assert left <= (1 << 20) + (64 << 10)
    assert found[0]["pos"] > 0
    assert [event["pos"] for event in found] == list(range(found[0]["pos"], found[-1]["pos"] + 1))


def test_hostile_comm(kafka: Kafka, topic: str, tmp_path: Path) -> None:
    """15 hostile bytes as a process's name stay one printable line everywhere, and can be had back."""
    from pipeline import event

    raw = b"\x1b[2J\n\\x41\xff\xe2\x80\xae\t"
    names: list[bytes] = []

    def act() -> None:
        ctypes.CDLL(None).prctl(15, ctypes.create_string_buffer(raw))
        names.append(Path("/proc/thread-self/comm").read_bytes())
        some_binds(1)

    where = ["--topic", topic, "--bootstrap-servers", kafka.bootstrap]
    with agent_running("--files", str(tmp_path), *where, "--create-topic"):
        thread = threading.Thread(target=act)
        thread.start()
        thread.join()

    for source in (["--files", tmp_path], where):
        columns = replay(*source, "--pid", ME)
        shown = json.loads(replay(*source, "--pid", ME, "-o", "json").out)
        assert len(columns.out.splitlines()) == 2
        assert all(line.isprintable() for line in columns.out.splitlines())
        assert event.original(shown["comm"]) == raw == names[0][:-1]


def test_a_flood_is_declared_in_the_stream_and_not_in_the_log(tmp_path: Path) -> None:
    """Attempts that found the ring full are counted and declared one for one; the log says so in a few lines."""
    subprocess.run(["make", "-s", "-C", ROOT / "benchmarks", "bindload"], check=True)
    limits = ["--ring-bytes", "64KiB", "--max-delay", "1s", "--checkpoint-records", "100"]
    with agent_running("--files", str(tmp_path), *limits) as agent:
        subprocess.run(
            [ROOT / "benchmarks/bindload", "--mode", "fail", "--rate", "0", "--count", "300000"],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip

    found = events("--files", tmp_path)
    counts = found[-1]["testimony"]["counts"]
    lost = sum(value for name, value in counts.items() if name.startswith("lost_"))
    declared = sum(sum(event["testimony"]["counts"].values()) for event in found if event["kind"] == "loss")
    assert lost > 1000
    assert declared == lost
    assert counts["attempted"] == counts["read"] + lost + counts["faulted"]
    assert 1 <= agent.talk.count("Attempts were lost") <= 4


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "nothing to write"),
        (("--files", "/tmp/x", "--ring-bytes", "100000"), "100000"),
        (("--files", "/tmp/x", "--tracer", "magic"), "magic"),
        (("--topic", "a/b"), "a/b"),
        (("--topic", "binds", "-X", "acks=0"), "acks"),
        (("--files", "/proc/version/x"), "/proc/version/x"),
        (("--register-schema", "--topic", "binds"), "--schema-registry"),
    ],
)
def test_wrong_arguments(arguments: tuple[str, ...], said: str, tmp_path: Path) -> None:
    """A wrong argument, or a destination that can never work, is one sentence that names it, and exit code 2."""
    done = run("bindsnoop-agent", "--lock", tmp_path / "lock", *arguments)

    assert (2, "") == (done.code, done.out)
    assert said in done.err
    assert len(done.err.splitlines()) == 1


def test_without_permission(tmp_path: Path) -> None:
    """Without capabilities it is one sentence that says what is missing and how to give it."""
    done = subprocess.run(
        [
            "setpriv", "--bounding-set=-all", BIN / "bindsnoop-agent",
            "--files", tmp_path / "files", "--lock", tmp_path / "lock",
        ],
        capture_output=True, text=True, env=environment(), check=False,
    )  # fmt: skip

    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "CAP_BPF" in done.stderr


def test_second_agent(tmp_path: Path) -> None:
    """A second agent on the node says who is there, and leaves; the first goes on."""
    lock = tmp_path / "lock"
    with agent_running("--files", str(tmp_path / "first"), lock=lock) as agent:
        done = run("bindsnoop-agent", "--files", tmp_path / "second", "--lock", lock)
        ports = some_binds(1)

    assert done.code == 2
    assert f"pid {agent.process.pid} " in done.err
    assert len(done.err.splitlines()) == 1
    assert mine(events("--files", tmp_path / "first")) == ports
