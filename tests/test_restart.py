"""Agents that end and begin again while somebody binds: nothing is lost, nothing is there twice.

The agents are real and killed by SIGKILL; their tracers are pinned in a bpffs of the test's own. Whoever binds numbers
his attempts by the port that he asks for, at an address that is not his, so every one of them fails.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.broker import Kafka, free_ports, kafka
from tests.commands import Agent, agent_running, bpffs, replay, run, small_disk, until
from tests.kernel.plugin import build

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="tracing needs root")

Json = dict[str, Any]


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    """The BPF object of this source."""
    build()


@pytest.fixture
def pins() -> Iterator[Path]:
    """A folder in a bpffs of this test's own."""
    with bpffs() as folder:
        yield folder


def bind(number: int) -> None:
    """An attempt with a number, that fails."""
    with socket.socket() as made, contextlib.suppress(OSError):
        made.bind((f"192.0.2.{number >> 16}", number & 0xFFFF))


_BINDER = """
import socket, time
made, number = socket.socket(), 0
while True:
    number += 1
    if number % 10 == 0: time.sleep(0.001)
    try: made.bind((f"192.0.2.{number >> 16}", number & 65535))
    except OSError: pass
    if number % 1000 == 0: print(number, flush=True)
"""


@contextlib.contextmanager
def binding() -> Iterator[subprocess.Popen[str]]:
    """A process that binds some thousand times a second, and prints how often it has, a thousand at a time."""
    with subprocess.Popen([sys.executable, "-c", _BINDER], stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def numbers(found: list[Json], pid: int) -> list[int]:
    """Which attempts of a process are there, in order."""
    mine = (event for event in found if event.get("pid") == pid and event["asked_addr"].startswith("192.0.2."))
    return [(int(event["asked_addr"].rsplit(".", 1)[1]) << 16) + event["asked_port"] for event in mine]


def events(*source: object) -> list[Json]:
    """Everything that replay reads, with the stream's own records."""
    done = replay(*source, "-i=false", "--info", "-o", "json-full")
    assert done.code in (0, 1), done.err
    return [json.loads(line) for line in done.out.splitlines()]


def kill(agent: Agent) -> None:
    """SIGKILL."""
    agent.process.kill()
    agent.process.wait()


def places(found: list[Json]) -> list[tuple[str, int]]:
    """Epoch and position of each record."""
    return [(event["epoch"], event["pos"]) for event in found]


def test_binds_while_no_agent_lives(tmp_path: Path, pins: Path) -> None:
    """They wait in the ring, and the next agent goes on in the same epoch, at the next position."""
    where = ["--files", str(tmp_path), "--pins", str(pins)]
    with agent_running(*where) as agent:
        bind(1)
        until(lambda: numbers(events("--files", tmp_path), os.getpid()) == [1])
        kill(agent)
    bind(2)
    bind(3)
    with agent_running(*where) as agent:
        bind(4)
        until(lambda: numbers(events("--files", tmp_path), os.getpid()) == [1, 2, 3, 4])

    found = events("--files", tmp_path)
    assert 1 == len({event["epoch"] for event in found})
    assert [event["pos"] for event in found] == list(range(len(found)))
    assert ["start"] == [event["kind"] for event in found if event["kind"] in ("start", "stop")]
    assert "goes on" in agent.talk


def test_an_agent_that_is_stopped_leaves_no_blind_window(tmp_path: Path, pins: Path) -> None:
    """SIGTERM ends the agent and not the epoch; with nothing pinned it ends both."""
    where = ["--files", str(tmp_path), "--pins", str(pins)]
    with agent_running(*where):
        bind(1)
    bind(2)
    with agent_running(*where):
        pass
    done = run("bindsnoop-agent", "--unpin", "--pins", pins, "--lock", tmp_path / "lock")

    found = events("--files", tmp_path)
    assert [1, 2] == numbers(found, os.getpid())
    assert ["start"] == [event["kind"] for event in found if event["kind"] in ("start", "stop")]
    assert "checkpoint" == found[-1]["kind"]
    assert (0, f"epoch {found[0]['epoch']}") == (done.code, done.out.partition(", ")[0].partition(": ")[2])


def test_kill_9_under_load(tmp_path: Path, pins: Path) -> None:
    """Killed at any instant, again and again: each attempt is in the archive once, or is counted as lost."""
    where = ["--files", str(tmp_path), "--pins", str(pins), "--checkpoint-records", "2000", "--max-delay", "5ms"]
    dice = random.Random(6)
    with binding() as process:
        assert process.stdout
        for _ in range(8):
            with agent_running(*where) as agent:
                for _ in range(dice.randrange(1, 12)):
                    process.stdout.readline()
                kill(agent)
    # Other settings end the epoch: from then on its counts are exact, whoever else binds on this host.
    with agent_running(*where, "--ring-bytes", "8MiB"):
        pass

    every = events("--files", tmp_path)
    found = [event for event in every if event["epoch"] == every[0]["epoch"]]
    counts = found[-1]["testimony"]["counts"]
    there = numbers(found, process.pid)
    assert 2 == len({event["epoch"] for event in every})
    assert ("start", "stop") == (found[0]["kind"], found[-1]["kind"])
    assert [event["pos"] for event in found] == list(range(len(found)))
    assert there == sorted(set(there))
    lost = sum(count for name, count in counts.items() if name.startswith("lost_"))
    declared = sum(sum(event["testimony"]["counts"].values()) for event in found if event["kind"] == "loss")
    assert declared == lost
    assert counts["attempted"] == counts["read"] + lost + counts["faulted"]
    assert counts["read"] == sum(event["kind"] == "bind" for event in found)
    assert there[-1] - there[0] + 1 - len(there) <= lost
    verdict = json.loads(replay("--files", tmp_path, "--verify", "-o", "json").out.splitlines()[0])
    assert ("declared loss" if lost else "complete", len(found) - 1) == (verdict["state"], verdict["proven"])


def test_a_topic_after_kill_9(tmp_path: Path, pins: Path, topic: str) -> None:
    """The topic gets every attempt, whoever was killed meanwhile and however long the broker was away."""
    (port,) = free_ports(1)
    where = ["--topic", topic, "--bootstrap-servers", f"127.0.0.1:{port}"]
    spool = ["--spool", str(tmp_path / "spool"), "--create-topic", "--pins", str(pins)]
    with agent_running(*where, *spool) as agent:
        for number in range(1, 300):
            bind(number)
        kill(agent)
    for number in range(300, 400):
        bind(number)
    with agent_running(*where, *spool) as agent, kafka(port=port):
        until(lambda: _last(where) == 399, 60)
        kill(agent)
        for number in range(400, 500):
            bind(number)
        with agent_running(*where, *spool):
            until(lambda: _last(where) == 499, 60)
            found = events(*where)

    there = numbers(found, os.getpid())
    assert list(range(1, 500)) == sorted(set(there))
    assert max(there.count(number) for number in range(1, 500)) <= 2
    assert 1 == len({event["epoch"] for event in found})


def _last(where: list[str]) -> int:
    done = replay(*where, "-i=false", "-o", "json-full", "--pid", os.getpid())
    return max(numbers([json.loads(line) for line in done.out.splitlines()], os.getpid()), default=0)


def test_another_version_takes_over(tmp_path: Path, pins: Path) -> None:
    """A tracer of other settings is read out into its own epoch, which ends; then another one begins."""
    where = ["--files", str(tmp_path), "--pins", str(pins)]
    with agent_running(*where) as agent:
        bind(1)
        until(lambda: numbers(events("--files", tmp_path), os.getpid()) == [1])
        kill(agent)
    bind(2)
    with agent_running(*where, "--ring-bytes", "1MiB"):
        bind(3)

    found = events("--files", tmp_path)
    epochs = sorted({event["epoch"] for event in found})
    assert [1, 2, 3] == numbers(found, os.getpid())
    assert 2 == len(epochs)
    assert [[event["pos"] for event in found if event["epoch"] == epoch] for epoch in epochs] == [
        list(range(sum(event["epoch"] == epoch for event in found))) for epoch in epochs
    ]
    assert ["start", "stop", "start"] == [event["kind"] for event in found if event["kind"] in ("start", "stop")]


def test_a_ring_whose_archive_is_gone(tmp_path: Path, pins: Path) -> None:
    """Nobody knows its last position: what waits in it is kept in an epoch of its own, and another one begins."""
    where = ["--pins", str(pins), "--files"]
    with agent_running(*where, str(tmp_path / "first")) as agent:
        bind(1)
        until(lambda: numbers(events("--files", tmp_path / "first"), os.getpid()) == [1])
        kill(agent)
    bind(2)
    with agent_running(*where, str(tmp_path / "second")):
        bind(3)

    found = events("--files", tmp_path / "second")
    before = {event["epoch"] for event in events("--files", tmp_path / "first")}
    assert [2, 3] == numbers(found, os.getpid())
    assert ["start", "stop", "start"] == [event["kind"] for event in found if event["kind"] in ("start", "stop")]
    assert not before & {event["epoch"] for event in found}
    stop = next(event for event in found if event["kind"] == "stop")["testimony"]["counts"]
    lost = sum(count for name, count in stop.items() if name.startswith("lost_"))
    assert stop["attempted"] == stop["read"] + lost + stop["faulted"]
    assert stop["read"] == sum(event["kind"] == "bind" and event["epoch"] == found[0]["epoch"] for event in found)


def test_no_bind_falls_between_a_ring_that_ends_and_the_next(tmp_path: Path, pins: Path) -> None:
    """Also where nobody can go on in the epoch, the next tracer sees what the one before it did not."""
    where = ["--pins", str(pins), "--files"]
    with agent_running(*where, str(tmp_path / "first")) as agent, binding() as process:
        assert process.stdout
        process.stdout.readline()
        kill(agent)
        with agent_running(*where, str(tmp_path / "second")):
            for _ in range(5):
                process.stdout.readline()

    found = events("--files", tmp_path / "second")
    there = numbers(found, process.pid)
    assert 2 == len({event["epoch"] for event in found})
    assert list(range(there[0], there[-1] + 1)) == there
    assert [["killed"]] == [list(event["testimony"]["counts"]) for event in found if event["kind"] == "loss"]


def test_what_a_disk_refused_before_the_kill(pins: Path) -> None:
    """Records that had left the ring and were in memory alone are declared, and no position is given twice."""
    with small_disk("3m") as disk:
        where = ["--files", str(disk / "archive"), "--pins", str(pins)]
        with agent_running(*where) as agent:
            bind(1)
            until(lambda: numbers(events("--files", disk / "archive"), os.getpid()) == [1])
            ballast = disk / "ballast"
            with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as full:
                while True:
                    full.write(bytes(4096))
            number = 1
            while "No space left" not in agent.talk:
                number += 1
                bind(number)
            kill(agent)
        ballast.unlink()
        bind(number + 1)
        with agent_running(*where) as agent:
            bind(number + 2)
        found = events("--files", disk / "archive")

    there = numbers(found, os.getpid())
    losses = [event for event in found if event["kind"] == "loss"]
    missing = sum(event["testimony"]["counts"].get("killed", 0) for event in losses)
    assert [number + 1, number + 2] == there[-2:]
    assert len(there) == len(set(there))
    assert missing >= number + 2 - len(there) > 0
    assert len(places(found)) == len(set(places(found)))
    assert "had left the ring" in agent.talk


def test_a_disk_that_is_read_only_at_the_start(pins: Path, kafka: Kafka, topic: str) -> None:
    """What is on it is read, so the epoch goes on, with what waited in the ring; the topic gets it from memory, and the
    disk when it can be written again."""
    where = ["--topic", topic, "--bootstrap-servers", kafka.bootstrap]
    with small_disk("3m") as disk:
        agent_of = [*where, "--create-topic", "--pins", str(pins), "--spool", str(disk / "spool")]
        with agent_running(*agent_of) as agent:
            bind(1)
            until(lambda: _last(where) == 1)
            kill(agent)
        bind(2)
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        with agent_running(*agent_of) as agent:
            bind(3)
            until(lambda: _last(where) == 3)
            subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
            bind(4)
            until(lambda: "can be written again" in agent.talk)

    found = events(*where)
    assert [1, 2, 3, 4] == sorted(numbers(found, os.getpid()))
    assert 1 == len({event["epoch"] for event in found})
    assert 0 == replay(*where, "--verify").code


def test_two_agents_on_one_node(tmp_path: Path, pins: Path) -> None:
    """The second says who is there and leaves, also with a lock of its own; the first goes on."""
    with agent_running("--files", str(tmp_path / "one"), "--pins", str(pins)) as agent:
        done = run("bindsnoop-agent", "--files", tmp_path / "two", "--pins", pins, "--lock", tmp_path / "lock")
        bind(1)

    assert 2 == done.code
    assert "a node has one agent" in done.err
    assert [1] == numbers(events("--files", tmp_path / "one"), os.getpid())
    assert 0 == agent.code


def test_stopped_for_ten_seconds(tmp_path: Path, pins: Path, kafka: Kafka, topic: str) -> None:
    """An agent that gets no CPU for a while goes on where it was."""
    where = ["--topic", topic, "--bootstrap-servers", kafka.bootstrap]
    with agent_running(*where, "--create-topic", "--files", str(tmp_path), "--pins", str(pins)) as agent:
        agent.process.send_signal(signal.SIGSTOP)
        for number in range(1, 200):
            bind(number)
        agent.process.send_signal(signal.SIGCONT)

    expected = list(range(1, 200))
    assert [expected, expected] == [numbers(events(*source), os.getpid()) for source in (("--files", tmp_path), where)]
