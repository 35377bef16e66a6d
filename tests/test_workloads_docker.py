"""Names from a container engine: what it announces, what it does to us, and what stays known meanwhile."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.event import Workload
from pipeline.workloads import Directory
from pipeline.workloads import docker as edge
from pipeline.workloads.docker import Docker
from tests import fake_engine, strategies
from tests.commands import until
from tests.fake_engine import Engine

ROOT = Path(__file__).parent.parent

A, B = "a" * 64, "b" * 64


class Reader:
    """A source over a socket, its directory, and what it said. Waits are taken down and pass at once."""

    def __init__(self, path: Path, directory: Directory | None = None) -> None:
        self.directory = Directory() if directory is None else directory
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


def test_events_are_listened_to_before_the_list_is_asked_for(engine: Engine, reader: Reader) -> None:
    """What is made while the list is on its way is announced to us: no container falls between the two."""
    until(lambda: reader.name(A) == "web")

    assert ["/events", "/containers/json"] == [path.partition("?")[0] for path in engine.asked]


def test_a_renamed_container(engine: Engine, reader: Reader) -> None:
    """Events after it have the new name."""
    engine.containers[A]["name"] = "renamed"
    engine.say({"Action": "rename", "Actor": {"ID": A, "Attributes": {"name": "renamed", "oldName": "/web"}}})

    until(lambda: reader.name(A) == "renamed")


def test_one_that_others_are_linked_to(engine: Engine) -> None:
    """Its own name counts, not that which another container has for it, wherever in the list that stands."""
    engine.containers[A] = {"name": "zdb", "image": "postgres", "labels": {}, "links": ["/alink/alias"]}
    reader = Reader(engine.path)
    until(lambda: reader.directory.get(A) is not None)
    reader.close()

    assert reader.name(A) == "zdb"


@pytest.mark.parametrize("image_id", ["sha256:" + "e" * 64, "e" * 12])
def test_an_image_whose_name_has_gone_on(engine: Engine, image_id: str) -> None:
    """The list tells the id alone when the name is another image's by now: the container knows what it was."""
    engine.containers[A] = {"name": "web", "image": "nginx:1.27", "labels": {}, "image_id": image_id}
    reader = Reader(engine.path)
    until(lambda: reader.directory.get(A) is not None)
    reader.close()

    assert Workload("web", "nginx:1.27") == reader.directory.get(A)


def test_an_image_without_a_name_of_one_that_has_left(engine: Engine) -> None:
    """What the list told of it is all that anybody knows any more."""
    engine.containers[A] = {"name": "web", "image": "x", "labels": {}, "image_id": "e" * 12, "left": True}
    reader = Reader(engine.path)
    until(lambda: reader.directory.get(A) is not None)
    reader.close()

    assert Workload("web", "e" * 12) == reader.directory.get(A)


def test_a_container_without_an_image(engine: Engine, reader: Reader) -> None:
    """An empty text is no image."""
    engine.create(B, "bare", image="")
    until(lambda: reader.name(B) == "bare")

    assert Workload("bare") == reader.directory.get(B)


def test_what_is_created_and_does_not_run_yet(engine: Engine) -> None:
    """Its name is known before its first process; one that has ended is nobody's."""
    engine.containers[A] = {"name": "soon", "image": "x", "labels": {}, "state": "created"}
    engine.containers[B] = {"name": "over", "image": "x", "labels": {}, "state": "exited"}
    reader = Reader(engine.path)
    until(lambda: reader.name(A) == "soon")
    reader.close()

    assert reader.name(B) is None


@pytest.mark.parametrize(
    ("action", "word"), [("die", "die"), ("destroy", "destroy"), ("die", "died"), ("remove", "remove")]
)
def test_each_word_for_an_end(engine: Engine, action: str, word: str) -> None:
    """podman's service announces only what is asked for in its own words: died and remove."""
    engine.containers[A] = {"name": "web", "image": "x", "labels": {}}
    reader = Reader(engine.path, Directory(gone_max=0))
    until(lambda: reader.name(A) == "web")
    engine.say({"Action": action, "Actor": {"ID": A}}, word)
    until(lambda: reader.name(A) is None)
    reader.close()


def test_one_that_ends_without_a_word(engine: Engine) -> None:
    """What is not in the next list has gone, although nobody announced it."""
    engine.containers[A] = {"name": "web", "image": "x", "labels": {}}
    reader = Reader(engine.path, Directory(gone_max=0))
    until(lambda: reader.name(A) == "web")
    del engine.containers[A]
    engine.hang_up()
    until(lambda: reader.name(A) is None)
    reader.close()


def test_an_event_that_has_a_status_alone(engine: Engine, reader: Reader) -> None:
    """It says what an action would."""
    engine.containers[B] = {"name": "db", "image": "x", "labels": {}}
    engine.say({"status": "create", "Actor": {"ID": B}}, "create")

    until(lambda: reader.name(B) == "db")


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


@pytest.mark.parametrize("behaviour", [fake_engine.NO_JSON, fake_engine.NO_LIST, fake_engine.ERROR, fake_engine.CUT])
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


@pytest.mark.parametrize("behaviour", [fake_engine.HANG, fake_engine.TRICKLE])
def test_an_engine_that_hangs(engine: Engine, behaviour: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that is not answered, or not to its end, is given up, and that is said once."""
    monkeypatch.setattr(edge, "_ANSWER_SECS", 0.1)
    engine.behaviour = behaviour
    reader = Reader(engine.path)
    until(lambda: len(reader.waits) >= 3)
    reader.close()

    assert ["warn"] == [level for level, _ in reader.said]
    assert "does not answer" in reader.said[0][1]


@pytest.mark.parametrize("behaviour", [fake_engine.HANG, fake_engine.TRICKLE])
def test_closing_ends_a_request(engine: Engine, behaviour: str) -> None:
    """Within two seconds, although the answer may take five times as long."""
    engine.behaviour = behaviour
    reader = Reader(engine.path)
    until(lambda: len(engine.asked) > (behaviour == fake_engine.TRICKLE))
    reader.close()

    assert not reader.source._thread.is_alive()
    assert reader.said == []


def test_an_engine_that_hangs_at_one_container(engine: Engine, reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the announcement itself tells is taken, and what was announced behind it is not waited for one by one."""
    monkeypatch.setattr(edge, "_ANSWER_SECS", 0.1)
    engine.behaviour = fake_engine.HANG
    for number in range(50):
        engine.create(f"{number:064x}", f"c{number}")
    until(lambda: len(reader.said) == 1)
    first = reader.name(f"{0:064x}")
    engine.behaviour = fake_engine.ANSWER
    until(lambda: reader.name(f"{49:064x}") == "c49")

    assert first == "c0"
    assert ["warn", "info"] == [level for level, _ in reader.said]


def test_an_answer_that_is_too_large(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not read to its end."""
    monkeypatch.setattr(edge, "_ANSWER_BYTES", 4 << 20)
    engine.behaviour = fake_engine.GIANT
    reader = Reader(engine.path)
    until(lambda: len(reader.waits) >= 2)
    reader.close()

    assert ["an answer is longer than 4 MiB" in sentence for _, sentence in reader.said] == [True]


def test_a_socket_that_may_not_be_read(engine: Engine) -> None:
    """The reason is said; root without its capabilities is refused as anybody is."""
    engine.path.chmod(0)
    script = (
        "import sys; from pathlib import Path; from pipeline.workloads import Directory; "
        "from pipeline.workloads.docker import Docker; "
        "Docker(Directory(), Path(sys.argv[1]), say=lambda *line: print(*line), wait=lambda _: True)._thread.join()"
    )
    unable = ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override"] if os.geteuid() == 0 else []
    done = subprocess.run(
        [*unable, sys.executable, "-c", script, engine.path], capture_output=True, text=True, check=True, cwd=ROOT
    )

    assert f"warn the Docker Engine API at {engine.path} cannot be asked" in done.stdout
    assert "(Permission denied)" in done.stdout


def test_an_engine_that_ends_its_stream_again_and_again(engine: Engine) -> None:
    """Names come all the same, from the list; nothing is said, and it is asked less and less often."""
    engine.containers[A] = {"name": "web", "image": "nginx", "labels": {}}
    engine.behaviour = fake_engine.BRIEF
    reader = Reader(engine.path)
    until(lambda: len(reader.waits) >= 30)
    reader.close()

    assert (reader.name(A), reader.said) == ("web", [])
    assert max(reader.waits[:3]) <= 4.0 < max(reader.waits[10:])


def test_a_stream_that_lasted_is_opened_again_soon(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only one that ends at once is asked less and less often."""
    monkeypatch.setattr(edge, "_STEADY_SECS", 0.0)
    engine.behaviour = fake_engine.BRIEF
    reader = Reader(engine.path)
    until(lambda: len(reader.waits) >= 30)
    reader.close()

    assert max(reader.waits) <= 1.0


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
    assert max(reader.waits[:3]) <= 4.0 < max(reader.waits[10:])
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

    assert (reader.said, reader.waits) == ([], [])


def test_a_busy_stream_lists_again(engine: Engine, reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine drops events that are not taken fast enough: what was dropped is found while others go on."""
    monkeypatch.setattr(edge, "_LIST_SECS", 0.05)
    engine.containers[B] = {"name": "dropped", "image": "x", "labels": {}}

    def found() -> bool:
        engine.say({"Action": "rename", "Actor": {"ID": "c" * 64, "Attributes": {"name": "other"}}})
        return reader.name(B) is not None

    until(found)

    assert engine.streams == 1


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
        b'{"Action":"create","Actor":{"ID":"\\ud800","Attributes":{"name":"half"}}}',
        b'{"Action":"create","Actor":{"ID":"../../info","Attributes":{"name":"other"}}}',
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
    engine.odd = [entry]
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


HISTORY = st.lists(
    st.tuples(st.sampled_from(["create", "rename", "die"]), st.integers(0, 4), st.sampled_from("abc")), max_size=25
)


@given(HISTORY)
@settings(max_examples=20)
def test_each_id_has_its_own_last_name(history: list[tuple[str, int, str]]) -> None:
    """Whatever is made, renamed and removed, and however names are used again: only the id joins."""
    expected: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder, fake_engine.engine(Path(folder, "s")) as engine:
        reader = Reader(engine.path)
        until(lambda: engine.streams == 1)
        for action, number, name in history:
            container_id = f"{number:064x}"
            if action == "create":
                engine.create(container_id, name)
            elif container_id not in engine.containers:
                continue
            elif action == "rename":
                engine.containers[container_id]["name"] = name
                engine.say({"Action": "rename", "Actor": {"ID": container_id, "Attributes": {"name": name}}})
            else:
                engine.die(container_id)
                continue
            expected[container_id] = name
            until(lambda: reader.name(container_id) == name)  # noqa: B023 - it is called at once
        engine.create("f" * 64, "last")
        until(lambda: reader.name("f" * 64) == "last")
        found = {container_id: reader.name(container_id) for container_id in expected}
        reader.close()

    assert expected == found


def test_closing_ends_a_silent_stream(engine: Engine, reader: Reader) -> None:
    """Within two seconds, although the next event may be minutes away."""
    reader.close()

    assert not reader.source._thread.is_alive()
    assert engine.streams == 1
