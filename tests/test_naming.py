"""From a bind in a container to its names: the agent, live and replay, beside a container engine that says when.

The binds are real, made in a cgroup that is named as docker names a container's; the engine is one that a test tells
what to announce and when (tests/fake_engine). Real engines are in test_runtimes.py, a real Kubernetes in tests/cluster.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.agent import Unnamed
from pipeline.event import Workload
from pipeline.workloads import Directory
from tests import fake_engine, stored
from tests.commands import BIN, agent_running, environment, replay, until
from tests.fake_engine import Engine
from tests.kernel import places
from tests.kernel.plugin import build

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="tracing needs root")

A, B = "1a" * 32, "2b" * 32


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    """The BPF object of this source."""
    build()


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    """An engine that listens."""
    with fake_engine.engine(tmp_path / "engine.sock") as made:
        yield made


def bind(container_id: str | None = None, count: int = 1) -> list[int]:
    """Bind sockets to free ports, in the cgroup of a container or where this process is; their ports."""
    if container_id is not None:
        with places.cgroup(f"docker-{container_id}.scope"):
            return bind(None, count)
    ports = []
    for _ in range(count):
        with socket.socket() as made:
            made.bind(("127.0.0.1", 0))
            ports.append(made.getsockname()[1])
    return ports


def events(files: Path, *more: str) -> list[dict[str, Any]]:
    """What an archive holds of this process, and what the stream says of containers."""
    done = replay("--files", files, "-i=false", "--info", "-o", "json-full", *more)
    rows = [json.loads(line) for line in done.out.splitlines()]
    return [row for row in rows if row.get("pid") == os.getpid() or row["kind"] == "workload"]


def containers(files: Path, *more: str) -> list[tuple[int | None, str | None]]:
    """Port and container of each of these."""
    return [(row.get("port"), row.get("container")) for row in events(files, *more)]


def agent(engine: Engine, files: Path, *more: str) -> Any:
    """An agent that asks this engine."""
    return agent_running("--files", str(files), "--workloads", "docker", "--docker-socket", str(engine.path), *more)


def test_a_bind_has_the_names_of_its_container(engine: Engine, tmp_path: Path) -> None:
    """Container, image and labels are the engine's; a bind of the host beside it has none."""
    engine.containers[A] = {"name": "web", "image": "nginx:1.27", "labels": {"app": "web"}}
    with agent(engine, tmp_path / "files"):
        (inside,), (outside,) = bind(A), bind()
        until(lambda: len(events(tmp_path / "files")) == 2)
    first, second = events(tmp_path / "files")

    assert (first["port"], first["container_id"], first["container"]) == (inside, A, "web")
    assert (first["image"], first["labels"], "pod" in first) == ("nginx:1.27", {"app": "web"}, False)
    assert (second["port"], "container" in second, "container_id" in second) == (outside, False, False)


def test_a_bind_waits_for_its_name(engine: Engine, tmp_path: Path) -> None:
    """A name that comes a moment after the bind is the event's, and what was bound behind it stays behind it."""
    hasty = agent(engine, tmp_path / "hasty", "--name-delay", "1ms")
    with hasty, agent(engine, tmp_path / "files", "--name-delay", "20s"):
        (first,), (second,) = bind(A), bind()
        until(lambda: len(events(tmp_path / "hasty")) == 2)
        engine.create(A, "web")
        until(lambda: len(events(tmp_path / "files")) == 2)

    assert [(first, "web"), (second, None)] == containers(tmp_path / "files")


def test_a_name_that_comes_too_late_is_told(engine: Engine, tmp_path: Path) -> None:
    """The event goes on with its id; the stream tells the name when it comes, once, and --resolve puts it in."""
    files = tmp_path / "files"
    with agent(engine, files, "--name-delay", "50ms"):
        (first,) = bind(A)
        until(lambda: len(events(files)) == 1)
        engine.create(A, "web", image="nginx:1.27", app="web")
        until(lambda: len(events(files)) == 2)
        (second,) = bind(A)
        engine.create(A, "web", image="nginx:1.27", app="web")
        until(lambda: len(events(files)) == 3)

    assert [(first, None), (None, "web"), (second, "web")] == containers(files)
    told = events(files)[1]
    assert (told["kind"], told["type"], told["container_id"], told["labels"]) == ("workload", "info", A, {"app": "web"})
    assert told["message"] == f"container {A} is web"
    assert [(first, "web"), (None, "web"), (second, "web")] == containers(files, "--resolve")


def test_a_late_name_is_told_once() -> None:
    """However often the directory changes afterwards."""
    directory = Directory()
    unnamed = Unnamed(directory)
    unnamed.note([A])
    directory.put("docker", A, Workload("web"))
    told = unnamed.named()
    directory.put("docker", B, Workload("db"))

    assert ([(A, Workload("web"))], []) == (told, unnamed.named())


def test_late_names_of_which_there_are_too_many() -> None:
    """Of more than ten thousand containers the one that was met first is not told."""
    directory = Directory()
    unnamed = Unnamed(directory)
    ids = [f"{number:064x}" for number in range(10_001)]
    unnamed.note(ids)
    directory.replace("docker", dict.fromkeys(ids, Workload("web")))

    assert ids[1:] == [container_id for container_id, _ in unnamed.named()]


def test_a_name_that_another_file_tells(tmp_path: Path) -> None:
    """--resolve looks at everything before it shows anything: the name may lie in a later file."""
    told = stored.own(0, "info", kind="workload", time=stored.BASE_US + 9, container_id=A, container="web")
    stored.write(tmp_path, [stored.bind(0, port=80, pid=os.getpid(), container_id=A)])
    stored.write(tmp_path, [told], epoch="1" * 16)

    assert [(80, "web"), (None, "web")] == containers(tmp_path, "--resolve")


def test_a_ring_that_fills_does_not_wait(engine: Engine, tmp_path: Path) -> None:
    """Binds without names that take half of the ring go on long before their time, and nothing is lost."""
    files = tmp_path / "files"
    with agent(engine, files, "--name-delay", "10m", "--ring-bytes", "64KiB") as running:
        # The ring holds 154, so at most 77 go on waiting; how many had been read when it was half full nobody knows.
        ports = bind(A, 100)
        until(lambda: len(events(files)) >= 100 - 77)
    found = events(files)

    assert ports == [row["port"] for row in found]
    assert "lost" not in running.talk


def test_an_engine_that_is_away_does_not_stop_anything(engine: Engine, tmp_path: Path) -> None:
    """Binds are recorded and delivered, with ids; it is said once, and names come when it is back."""
    files = tmp_path / "files"
    engine.stop()
    with agent(engine, files, "--name-delay", "50ms") as running:
        bind(A)
        until(lambda: len(events(files)) == 1)
        engine.containers[A] = {"name": "web", "image": "nginx", "labels": {}}
        engine.start()
        until(lambda: len(events(files)) == 2, 60)

    assert [None, "web"] == [container for _, container in containers(files)]
    assert ["WARN"] == re.findall("WARN|ERROR", running.talk)


@pytest.mark.parametrize(
    ("options", "expected"),
    [(("-c", "test-trace-bind"), [0]), (("-c", "!test-trace-bind"), [1, 2]), (("-l", "app=db"), [1]), ((), [0, 1, 2])],
)
def test_live_by_container(engine: Engine, options: tuple[str, ...], expected: list[int]) -> None:
    """bindsnoop shows names, and selects by them."""
    engine.containers[A] = {"name": "test-trace-bind", "image": "busybox", "labels": {}}
    engine.containers[B] = {"name": "db", "image": "postgres", "labels": {"app": "db"}}
    command = [
        BIN / "bindsnoop", "--workloads", "docker", "--docker-socket", engine.path, "--pid", str(os.getpid()), *options
    ]  # fmt: skip
    with (
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
        ) as process,
        contextlib.ExitStack() as end,
    ):
        # Also when a row that is waited for never comes.
        end.callback(process.kill)
        assert process.stdout
        header = process.stdout.readline()
        until(lambda: engine.streams == 1)
        ports = [bind(A)[0], bind(B)[0], bind()[0]]
        names = ["test-trace-bind", "db", ""]
        rows = [process.stdout.readline() for _ in expected]
        process.send_signal(signal.SIGINT)
        rest, talk = process.communicate(timeout=20)

    assert header.split()[:2] == ["K8S.CONTAINERNAME", "PID"]
    assert [(names[number].ljust(17), str(ports[number])) for number in expected] == [
        (row[:17], row[18:].split()[4]) for row in rows
    ]
    assert (rest, talk) == ("", "")
