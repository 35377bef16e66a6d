"""Names from a container engine: what it announces, what it does to us, and what stays known meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.event import Workload
from pipeline.workloads import Directory
from pipeline.workloads import docker as edge
from pipeline.workloads.docker import Docker
from tests import fake_engine, strategies
from tests.commands import until
from tests.fake_engine import Engine

A, B = "a" * 64, "b" * 64


class Reader:
    """A source over a socket, its directory, and what it said. Waits are taken down and pass at once."""

    def __init__(self, path: Path) -> None:
        self.directory = Directory()
        self.said: list[tuple[str, str]] = []
        self.waits: list[float] = []
        self._ended = threading.Event()
        self.source = Docker(self.directory, path, say=lambda *line: self.said.append(line), wait=self._wait)

    def _wait(self, seconds: float) -> bool:
        self.waits.append(seconds)
        # Not at once: the other side needs a processor too.
        return self._ended.wait(0.002)

    def name(self, container_id: str) -> str | None:
        found = self.directory.get(container_id)
        return found and found.container

    def close(self) -> None:
        self._ended.set()
        self.source.close()


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    """An engine that listens."""
    with fake_engine.engine(tmp_path / "engine.sock") as made:
        yield made


@pytest.fixture
def reader(engine: Engine) -> Iterator[Reader]:
    """A source that has listed the engine's containers, one, and listens."""
    engine.containers[A] = {"name": "web", "image": "nginx:1.27", "labels": {"b": "2", "a": "1"}}
    made = Reader(engine.path)
    until(lambda: made.name(A) is not None)
    yield made
    made.close()


def test_what_runs_and_what_is_created_later(engine: Engine, reader: Reader) -> None:
    """Name, image and labels of both; a name goes with its container, and stays known for late events."""
    engine.create(B, "db", image="postgres:17", tier="back")
    until(lambda: reader.name(B) is not None)
    engine.die(A)
    until(lambda: reader.directory.changes == 2)

    assert Workload("web", "nginx:1.27", labels=(("a", "1"), ("b", "2"))) == reader.directory.get(A)
    assert Workload("db", "postgres:17", labels=(("tier", "back"),)) == reader.directory.get(B)
    assert reader.said == []


def test_a_renamed_container(engine: Engine, reader: Reader) -> None:
    """Events after it have the new name."""
    engine.containers[A]["name"] = "renamed"
    engine.say({"Action": "rename", "Actor": {"ID": A, "Attributes": {"name": "renamed", "oldName": "/web"}}})

    until(lambda: reader.name(A) == "renamed")


def test_two_containers_with_one_name(engine: Engine, reader: Reader) -> None:
    """One after the other: each id has its own image, whatever the other's name was."""
    engine.die(A)
    engine.create(B, "web", image="nginx:1.28")
    until(lambda: reader.name(B) is not None)

    assert ["nginx:1.27", "nginx:1.28"] == [
        found.image for found in (reader.directory.get(A), reader.directory.get(B)) if found
    ]


def test_one_that_has_gone_before_it_is_looked_at(engine: Engine, reader: Reader) -> None:
    """The announcement itself has the name, if the container cannot be asked for any more."""
    engine.say({"Action": "create", "Actor": {"ID": B, "Attributes": {"name": "brief", "image": "busybox"}}})
    until(lambda: reader.name(B) is not None)

    assert Workload("brief", "busybox") == reader.directory.get(B)


def test_a_container_of_kubernetes(engine: Engine, reader: Reader) -> None:
    """Where the kubelet made it, its labels say which pod and container it is."""
    labels = {
        "io.kubernetes.pod.namespace": "default", "io.kubernetes.pod.name": "web-1",
        "io.kubernetes.container.name": "web",
    }  # fmt: skip
    engine.create(B, "k8s_web_web-1_default_0", **labels)
    until(lambda: reader.name(B) is not None)
    found = reader.directory.get(B)

    assert found
    assert (found.namespace, found.pod, found.container) == ("default", "web-1", "web")


@pytest.mark.parametrize("behaviour", [fake_engine.NO_JSON, fake_engine.ERROR, fake_engine.CUT])
def test_an_engine_that_answers_nonsense(engine: Engine, behaviour: str) -> None:
    """It is said once, tried again and again, and said when it is over."""
    engine.containers[A] = {"name": "web", "image": "nginx", "labels": {}}
    engine.behaviour = behaviour
    reader = Reader(engine.path)
    until(lambda: len(reader.waits) >= 5)
    engine.behaviour = fake_engine.ANSWER
    until(lambda: reader.name(A) == "web")
    reader.close()

    assert ["warn", "info"] == [level for level, _ in reader.said]
    assert str(engine.path) in reader.said[0][1]


def test_an_engine_that_hangs(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that is not answered ends, and is said once; closing does not wait for it."""
    monkeypatch.setattr(edge, "_ANSWER_SECS", 0.1)
    engine.behaviour = fake_engine.HANG
    reader = Reader(engine.path)
    until(lambda: len(reader.waits) >= 3)
    reader.close()

    assert ["warn"] == [level for level, _ in reader.said]
    assert "does not answer" in reader.said[0][1]


def test_a_socket_that_appears_later(tmp_path: Path) -> None:
    """It is waited for, longer and longer up to half a minute, and not in step with others."""
    made = Engine(tmp_path / "engine.sock")
    made.containers[A] = {"name": "web", "image": "nginx", "labels": {}}
    reader = Reader(made.path)
    until(lambda: len(reader.waits) >= 40)
    made.start()
    until(lambda: reader.name(A) == "web")
    reader.close()
    made.stop()

    assert ["warn", "info"] == [level for level, _ in reader.said]
    assert "No such file" in reader.said[0][1]
    assert max(reader.waits) <= 30.0
    assert sum(reader.waits[20:]) > sum(reader.waits[:20])
    assert len(set(reader.waits)) == len(reader.waits)


def test_an_engine_that_is_restarted(engine: Engine, reader: Reader) -> None:
    """Names stay known while it is away; what was made meanwhile is known when it is back, what went is gone."""
    engine.stop()
    until(lambda: len(reader.said) == 1)
    known = reader.name(A)
    engine.containers = {B: {"name": "db", "image": "postgres", "labels": {}}}
    engine.start()
    until(lambda: reader.name(B) == "db")

    assert ("web", ["warn", "info"]) == (known, [level for level, _ in reader.said])
    assert reader.name(A) == "web"


def test_a_long_silence_lists_again(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that says nothing is opened anew now and then, without a word, so that nothing stays missed."""
    monkeypatch.setattr(edge, "_SILENCE_SECS", 0.05)
    reader = Reader(engine.path)
    until(lambda: engine.streams > 2)
    engine.containers[B] = {"name": "unannounced", "image": "x", "labels": {}}
    until(lambda: reader.name(B) == "unannounced")
    reader.close()

    assert reader.said == []


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'{"Action":1,"Actor":{"ID":2}}',
        b'{"Action":"create"}',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"Action":"create","Actor":{"ID":"x","Attributes":[]}}',
        b'{"Action":"create","Actor":null}',
    ],
)
def test_an_event_that_is_none(engine: Engine, reader: Reader, line: bytes) -> None:
    """It is passed over, and the next one counts."""
    engine.say(line)
    engine.create(B, "next")
    until(lambda: reader.name(B) == "next")

    assert reader.said == []


def test_an_event_without_end(engine: Engine, reader: Reader) -> None:
    """A line of more than a megabyte is no event: the stream is opened anew."""
    engine.say(b"x" * (2 << 20))
    until(lambda: engine.streams == 2)
    engine.create(B, "next")

    until(lambda: reader.name(B) == "next")


@pytest.mark.parametrize("text", [text for text in strategies.HARM if text])
def test_names_that_mean_harm(engine: Engine, reader: Reader, text: str) -> None:
    """Whatever a container's owner chose is printable text behind the edge."""
    engine.create(B, text, image=text, **{text: text})
    until(lambda: reader.directory.get(B) is not None)
    found = reader.directory.get(B)

    assert found
    assert all(part.isprintable() for part in (found.container, found.image or "", *found.labels[0]))


@pytest.mark.parametrize("entry", [None, 7, {}, {"Id": 1}, {"Id": B, "Names": []}, {"Id": B, "Names": 3, "Image": {}}])
def test_a_list_with_entries_that_are_none(engine: Engine, entry: object) -> None:
    """They are passed over; the others count."""
    engine.containers[A] = {"name": "web", "image": "nginx", "labels": None}
    engine.containers[B] = {"name": None, "image": None, "labels": entry}
    reader = Reader(engine.path)
    until(lambda: reader.name(A) == "web")
    reader.close()

    assert reader.directory.get(B) is None


def test_memory_does_not_grow_with_what_has_gone(engine: Engine, reader: Reader) -> None:
    """Two thousand containers come and go: as many stay known as are kept for late events."""
    small = Directory(gone_max=100)
    reader.directory = reader.source._directory = small
    for number in range(2000):
        engine.create(f"{number:064x}", f"c{number}")
        engine.die(f"{number:064x}")
    until(lambda: small.get(f"{1999:064x}") is not None and len(small) <= 100, 60)

    assert [f"c{number}" for number in range(1950, 2000)] == [
        found.container for number in range(1950, 2000) if (found := small.get(f"{number:064x}"))
    ]


def test_closing_ends_a_silent_stream(engine: Engine, reader: Reader) -> None:
    """Within two seconds, although the next event may be minutes away."""
    reader.close()

    assert not reader.source._thread.is_alive()
    assert engine.streams == 1
