"""The faults: each is a function that is given a stage, makes its fault while somebody binds, and counts.

A row's name is its function's. Faults are real: processes are killed and stopped, disks are filled, bytes are changed.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from confluent_kafka.admin import (
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    AdminClient,
    NewTopic,
    ResourcePatternType,
    ResourceType,
)

from tests.broker import Mock, free_ports, registry
from tests.commands import Agent, run, small_disk, until
from tests.faults.matrix import Fault, Row
from tests.faults.stage import Stage, events, goes_on, kill, pause, stopped


class Planned(NamedTuple):
    """A row before it is made."""

    fault: Fault
    make: Callable[[Stage], Row]


ROWS: dict[str, Planned] = {}
"""Each fault by its name, in the order of the table."""

DECLARED = (4,)
"""What verification says of declared loss, and of nothing worse."""


def _fault(
    what: str, phase: str, expected: tuple[int, ...] = (0,)
) -> Callable[[Callable[[Stage], Row]], Callable[[Stage], Row]]:
    def noted(make: Callable[[Stage], Row]) -> Callable[[Stage], Row]:
        ROWS[make.__name__.replace("_", "-")] = Planned(Fault(what, phase, expected), make)
        return make

    return noted


@_fault("none", "")
def nothing(stage: Stage) -> Row:
    """What the others are to be compared with."""
    with stage.agent():
        binder = stage.bind()
        binder.more(5000)
        made = binder.end()
    return stage.row(made)


# --- the broker ---------------------------------------------------------------------------------------------------


@_fault("broker killed and started again, twice", "under load")
def broker_killed(stage: Stage) -> Row:
    """SIGKILL, and a new life on the same data, twice."""
    with stage.agent():
        binder = stage.bind()
        for _ in range(2):
            binder.more(2000)
            stage.broker.kill()
            binder.more(1000)
            stage.broker.start()
        binder.more(2000)
        made = binder.end()
    return stage.row(made)


@_fault("broker killed, and still away", "at the agent's end")
def broker_killed_at_the_end(stage: Stage) -> Row:
    """The agent ends while the broker is away: what was not delivered is on disk."""
    with stage.agent("--shutdown", "2s"):
        binder = stage.bind()
        binder.more(2000)
        until(lambda: stage.last() > 0)
        stage.broker.kill()
        binder.more(3000)
        made = binder.end()
    stage.broker.start()
    return stage.row(made)


@_fault("broker stopped for 8 s (SIGSTOP)", "under load")
def broker_paused(stage: Stage) -> Row:
    """SIGSTOP for 8 s: connections stand, and nothing is answered."""
    with stage.agent():
        binder = stage.bind()
        binder.more(2000)
        stage.broker.pause()
        pause(8)
        stage.broker.resume()
        binder.more(2000)
        made = binder.end()
    return stage.row(made)


@_fault("broker unreachable", "at the start")
def broker_unreachable(stage: Stage) -> Row:
    """The agent begins without it."""
    stage.broker.stop()
    with stage.agent():
        binder = stage.bind()
        binder.more(3000)
        stage.broker.start()
        binder.more(2000)
        made = binder.end()
    return stage.row(made)


@_fault("topic deleted and created again (a copy of the first counts)", "under load")
def topic_deleted(stage: Stage) -> Row:
    """What had been delivered is gone with the topic, by the hand of whoever deleted it. A copy of it was made before,
    while the agent was stopped for a moment, so that nothing came in between; what was in it counts as delivered."""
    admin = AdminClient({"bootstrap.servers": stage.broker.internal})
    copy = stage.folder / "copy"
    with stage.agent() as agent:
        binder = stage.bind()
        binder.more(3000)
        until(lambda: stage.last() > 0)
        stopped(agent)
        pause(0.5)
        done = run("bindsnoop-replay", *stage.source, "--to", copy)
        assert done.code == 0, done.err
        admin.delete_topics([stage.topic])[stage.topic].result(10)
        until(lambda: stage.topic not in admin.list_topics(timeout=10).topics)
        goes_on(agent)
        binder.more(3000)
        with contextlib.suppress(Exception):  # the agent may have been quicker
            admin.create_topics([NewTopic(stage.topic, 1, 1)])[stage.topic].result(10)
        binder.more(2000)
        made = binder.end()
    former = events("--files", copy)
    return stage.row(made, former=former, copy=copy)


@_fault("right to write taken away and given back", "under load")
def right_taken(stage: Stage) -> Row:
    """A rule forbids the agent to write for a few seconds."""
    admin = AdminClient({"bootstrap.servers": stage.broker.internal})
    place = (ResourceType.TOPIC, stage.topic, ResourcePatternType.LITERAL, "User:agent", "*")
    with stage.agent() as agent:
        binder = stage.bind()
        binder.more(2000)
        for done in admin.create_acls([AclBinding(*place, AclOperation.WRITE, AclPermissionType.DENY)]).values():
            done.result(10)
        until(lambda: "permission" in agent.talk)
        binder.more(2000)
        filters = [AclBindingFilter(*place, AclOperation.WRITE, AclPermissionType.DENY)]
        for gone in admin.delete_acls(filters).values():
            gone.result(10)
        binder.more(2000)
        made = binder.end()
    return stage.row(made)


@_fault("schema registry unreachable", "at the start")
def registry_down(stage: Stage) -> Row:
    """The schema registry comes only later."""
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}/apis/ccompat/v7"
    with stage.agent("--schema-registry", url, "--register-schema") as agent:
        binder = stage.bind()
        binder.more(2000)
        until(lambda: "registry" in agent.talk)
        with registry(port=port):
            binder.more(2000)
            made = binder.end()
            agent.process.terminate()
            agent.process.wait(40)
            return stage.row(made, registry=url)


# Librdkafka's mock broker gives what a real one gives only in rare trouble.

_PASSING = {
    "UNKNOWN": -1,
    "UNKNOWN_TOPIC_OR_PART": 3,
    "LEADER_NOT_AVAILABLE": 5,
    "NOT_LEADER_FOR_PARTITION": 6,
    "REQUEST_TIMED_OUT": 7,
    "NOT_ENOUGH_REPLICAS": 19,
    "NOT_ENOUGH_REPLICAS_AFTER_APPEND": 20,
    "TOPIC_AUTHORIZATION_FAILED": 29,
    "CLUSTER_AUTHORIZATION_FAILED": 31,
    "INVALID_TIMESTAMP": 32,
    "INVALID_REQUEST": 42,
    "POLICY_VIOLATION": 44,
    "STORAGE": 56,
    "UNSUPPORTED_COMPRESSION": 76,
    "THROTTLING_QUOTA_EXCEEDED": 89,
}
"""Answers to Produce after which the same may be sent again."""

_TOO_LARGE = {"MSG_SIZE_TOO_LARGE": 10, "RECORD_LIST_TOO_LARGE": 18}
"""Answers after which less at a time is to be sent."""

_OUT_OF_ORDER_SEQUENCE = 45


def _answered(stage: Stage, *answers: int) -> Row:
    """A mock broker that answers one request after the other so, each once what is before it has arrived."""
    with contextlib.closing(Mock()) as mock:
        stage.away_to(mock.bootstrap)
        mock.create(stage.topic)
        with stage.agent():
            binder = stage.bind()
            for code in answers:
                mock.answer_produce(code)
                binder.more(200)
                stage.caught_up()
            binder.more(200)
            made = binder.end()
        return stage.row(made)


@_fault(f"each of {len(_PASSING) + len(_TOO_LARGE)} error codes to a Produce request (mock)", "under load")
def produce_errors(stage: Stage) -> Row:
    """Every error that may pass, and those for size."""
    return _answered(stage, *_PASSING.values(), *_TOO_LARGE.values())


@_fault("sequence out of order, five times (mock)", "under load")
def dead_producer(stage: Stage) -> Row:
    """An answer that kills the producer, five times."""
    return _answered(stage, *[_OUT_OF_ORDER_SEQUENCE] * 5)


@_fault("every answer two seconds late (mock)", "under load")
def slow_network(stage: Stage) -> Row:
    """Every answer of the broker is two seconds late."""
    with contextlib.closing(Mock()) as mock:
        stage.away_to(mock.bootstrap)
        mock.create(stage.topic)
        with stage.agent():
            binder = stage.bind()
            binder.more(1000)
            mock.answer_slowly(2000)
            binder.more(8000)
            mock.answer_slowly(0)
            binder.more(1000)
            made = binder.end()
        return stage.row(made)


# --- the agent ----------------------------------------------------------------------------------------------------

KILLS = 20


@_fault(f"agent killed at {KILLS} random instants (SIGKILL)", "under load")
def agent_killed(stage: Stage) -> Row:
    """SIGKILL at random instants; binds go on between one life and the next."""
    dice = random.Random(6)
    for _ in range(KILLS):
        with stage.agent("--checkpoint-records", "500", "--max-delay", "5ms") as agent:
            binder = stage.bind()
            pause(dice.uniform(0.0, 0.8))
            kill(agent)
    with stage.agent():
        binder.more(1000)
        made = binder.end()
    return stage.row(made)


@_fault("agent stopped and started again, five times (SIGTERM)", "under load")
def agent_stops(stage: Stage) -> Row:
    """SIGTERM, and the next agent, five times."""
    for _ in range(5):
        with stage.agent():
            binder = stage.bind()
            binder.more(1000)
        binder.more(500)
    with stage.agent():
        made = binder.end()
    return stage.row(made)


@_fault("agent without CPU for 5 s (SIGSTOP)", "under load")
def agent_paused(stage: Stage) -> Row:
    """SIGSTOP: what is bound meanwhile waits in the ring."""
    with stage.agent() as agent:
        binder = stage.bind()
        binder.more(1000)
        stopped(agent)
        pause(5)
        goes_on(agent)
        binder.more(1000)
        made = binder.end()
    return stage.row(made)


@_fault("ring full (64 KiB, and no CPU for 2 s)", "under load", DECLARED)
def ring_overflow(stage: Stage) -> Row:
    """The same with a ring of 64 KiB, which holds only a part of it."""
    with stage.agent("--ring-bytes", "64KiB") as agent:
        binder = stage.bind()
        binder.more(1000)
        stopped(agent)
        pause(2)
        goes_on(agent)
        binder.more(1000)
        made = binder.end()
    return stage.row(made)


@_fault("broker away for more than memory holds (`--queue-bytes 1MiB`)", "under load")
def small_queue(stage: Stage) -> Row:
    """Memory for 1 MiB while the broker is away for longer: the rest waits on disk alone."""
    stage.broker.stop()
    with stage.agent("--queue-bytes", "1MiB"):
        binder = stage.bind(3000)
        binder.more(20_000)
        stage.broker.start()
        binder.more(1000)
        made = binder.end()
    return stage.row(made)


# --- the disk -----------------------------------------------------------------------------------------------------


def _fill(folder: Path, agent: Agent, until_said: str) -> Path:
    """Take all room that there is, also what the agent makes by deleting, until it says so; the file that has it."""
    ballast = folder / "ballast"

    def said() -> bool:
        with contextlib.suppress(OSError), ballast.open("ab", buffering=0) as full:
            while True:
                full.write(bytes(4096))
        return until_said in agent.talk

    until(said, 60)
    return ballast


@_fault("disk full", "under load")
def disk_full(stage: Stage) -> Row:
    """No byte is left for some seconds; the topic gets everything from memory."""
    with small_disk("16m") as folder:
        stage.spool = folder / "spool"
        with stage.agent("--segment-bytes", "64KiB") as agent:
            binder = stage.bind()
            binder.more(2000)
            ballast = _fill(folder, agent, "No space left")
            binder.more(3000)
            ballast.unlink()
            binder.more(1000)
            made = binder.end()
        return stage.row(made)


@_fault("disk full, broker away, 1 MiB of memory", "under load", DECLARED)
def disk_full_and_broker_away(stage: Stage) -> Row:
    """Memory for 1 MiB, no room on disk and nobody to deliver to: the oldest goes, and is declared."""
    with small_disk("16m") as folder:
        stage.spool = folder / "spool"
        stage.broker.stop()
        with stage.agent("--queue-bytes", "1MiB", "--segment-bytes", "64KiB") as agent:
            binder = stage.bind(3000)
            binder.more(2000)
            ballast = _fill(folder, agent, "given up")
            ballast.unlink()
            binder.more(1000)
            stage.broker.start()
            stage.caught_up()
            made = binder.end()
        return stage.row(made)


@_fault("spool too small (`--spool-bytes 1MiB`), broker away", "under load", DECLARED)
def spool_too_small(stage: Stage) -> Row:
    """The broker is away until the spool is larger than it may be."""
    stage.broker.stop()
    with stage.agent("--spool-bytes", "1MiB", "--queue-bytes", "1MiB", "--max-delay", "5ms") as agent:
        binder = stage.bind(3000)
        until(lambda: "has not acknowledged all of it" in agent.talk, 100)
        binder.more(1000)
        stage.broker.start()
        stage.caught_up()
        made = binder.end()
    return stage.row(made)


@_fault("spool too small (`--spool-bytes 1MiB`), broker away", "at the agent's end", DECLARED)
def spool_too_small_at_the_end(stage: Stage) -> Row:
    """The broker comes back only when the agent has gone: the next one declares what the first has deleted."""
    stage.broker.stop()
    limits = ("--spool-bytes", "1MiB", "--queue-bytes", "1MiB", "--max-delay", "5ms")
    with stage.agent(*limits, "--shutdown", "1s") as agent:
        binder = stage.bind(3000)
        until(lambda: "has not acknowledged all of it" in agent.talk, 100)
        binder.more(1000)
    stage.broker.start()
    with stage.agent(*limits):
        stage.caught_up()
        made = binder.end()
    return stage.row(made)


@_fault("disk read-only, after SIGKILL", "at the start")
def disk_read_only(stage: Stage) -> Row:
    """Mounted read-only while no agent runs, for only then no file of it is open, and writable again under the next."""
    with small_disk("64m") as folder:
        stage.spool = folder / "spool"

        def mounted(mode: str) -> bool:
            words = ["mount", "-o", f"remount,{mode}", str(folder)]
            return subprocess.run(words, capture_output=True, check=False).returncode == 0

        with stage.agent() as agent:
            binder = stage.bind()
            binder.more(2000)
            kill(agent)
            assert mounted("ro")
        with stage.agent() as agent:
            binder.more(2000)
            until(lambda: "Read-only" in agent.talk)
            assert mounted("rw")
            binder.more(2000)
            made = binder.end()
        return stage.row(made)


@_fault("spool removed", "under load")
def spool_removed(stage: Stage) -> Row:
    """`rm -r` of the folder."""
    with stage.agent("--segment-age", "1s"):
        binder = stage.bind()
        binder.more(2000)
        shutil.rmtree(stage.spool)
        binder.more(3000)
        made = binder.end()
    return stage.row(made)


@_fault("spool removed, broker away, 1 MiB of memory", "under load", DECLARED)
def spool_removed_and_broker_away(stage: Stage) -> Row:
    """What was there alone is gone, and declared."""
    stage.broker.stop()
    with stage.agent("--segment-age", "1s", "--queue-bytes", "1MiB"):
        binder = stage.bind(3000)
        binder.more(15_000)
        shutil.rmtree(stage.spool)
        binder.more(1000)
        stage.broker.start()
        stage.caught_up()
        made = binder.end()
    return stage.row(made)


def _damaged(stage: Stage, change: Callable[[Path], None]) -> int:
    """An agent spools without a broker and is killed; the files are changed; the next one delivers what is left."""
    stage.broker.stop()
    often = ("--checkpoint-records", "500", "--checkpoint-age", "1s")
    with stage.agent("--segment-age", "1s", *often) as agent:
        binder = stage.bind()
        binder.more(5000)
        kill(agent)
    change(stage.spool)
    with stage.agent("--segment-age", "1s", *often):
        binder.more(1000)
        stage.broker.start()
        stage.caught_up()
        return binder.end()


def _closed(spool: Path) -> list[Path]:
    """Segments that are closed, oldest first."""
    return sorted(spool.rglob("*.avro"))


@_fault("one bit flipped in each of two files of the spool", "while no agent ran", (3, 4))
def files_flipped(stage: Stage) -> Row:
    """One bit in the middle of two closed segments. They stay where they are until they are sent."""

    def flip(spool: Path) -> None:
        for path in _closed(spool)[1:3]:
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)

    made = _damaged(stage, flip)
    return stage.row(made)


@_fault("half of a file of the spool cut off", "while no agent ran", (3, 4))
def file_cut(stage: Stage) -> Row:
    """A closed segment loses its second half."""
    made = _damaged(stage, lambda spool: os.truncate(_closed(spool)[1], _closed(spool)[1].stat().st_size // 2))
    return stage.row(made)


@_fault("half of the newest file of the spool cut off", "while no agent ran", DECLARED)
def newest_file_cut(stage: Stage) -> Row:
    """The file that the agent wrote when it was killed loses its end, and with it records that had left the ring."""

    def cut(spool: Path) -> None:
        (newest,) = spool.rglob("*.avro.partial")
        os.truncate(newest, newest.stat().st_size // 2)

    made = _damaged(stage, cut)
    return stage.row(made)


@_fault("a file of the spool removed", "while no agent ran", DECLARED)
def file_removed(stage: Stage) -> Row:
    """A closed segment is deleted."""
    made = _damaged(stage, lambda spool: _closed(spool)[1].unlink())
    return stage.row(made)
