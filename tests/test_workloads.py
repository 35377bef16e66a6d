"""Names by container id: who is right, for how long, and how much is kept."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.event import Workload
from pipeline.workloads import Directory, open_sources
from tests.fake_api import serving

SOURCES = ("kubernetes", "docker")
IDS = ("a" * 64, "b" * 64, "c" * 64)

WEB = Workload("web", "nginx:1", "shop", "web-0", (("app", "web"),))
BELOW = Workload("k8s_web_web-0_shop", "nginx@sha256:1")


class Clock:
    """A clock that goes on when told to."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


def test_unknown_container() -> None:
    """Nobody knows it, so it has no name."""
    assert Directory().get(IDS[0]) is None


def test_container_that_lives() -> None:
    """It has the names of its source, the latest ones."""
    directory = Directory()
    directory.put("kubernetes", IDS[0], WEB)
    directory.put("kubernetes", IDS[0], WEB._replace(labels=()))

    assert WEB._replace(labels=()) == directory.get(IDS[0])
    assert (1, 2) == (len(directory), directory.changes)


def test_same_names_again_are_no_change() -> None:
    """Who looks at ``changes`` has nothing to do when a list repeats what was known."""
    directory = Directory()
    directory.put("kubernetes", IDS[0], WEB)
    directory.put("kubernetes", IDS[0], WEB)
    directory.replace("kubernetes", {IDS[0]: WEB})

    assert 1 == directory.changes


def test_container_that_has_gone() -> None:
    """Its names are kept for late events, until their time is over, also when nothing else happens."""
    clock = Clock()
    directory = Directory(gone_secs=900, monotonic=clock)
    directory.put("kubernetes", IDS[0], WEB)
    directory.remove("kubernetes", IDS[0])

    clock.now += 900
    assert (WEB, 1) == (directory.get(IDS[0]), len(directory))

    clock.now += 1
    assert directory.get(IDS[0]) is None
    assert 0 == len(directory)


def test_it_goes_only_once() -> None:
    """To say again that it has gone does not keep its names for longer."""
    clock = Clock()
    directory = Directory(gone_secs=900, monotonic=clock)
    directory.put("kubernetes", IDS[0], WEB)
    directory.remove("kubernetes", IDS[0])

    clock.now += 600
    directory.remove("kubernetes", IDS[0])
    directory.remove("docker", IDS[0])
    clock.now += 600

    assert directory.get(IDS[0]) is None


def test_too_many_have_gone() -> None:
    """The one that went first is forgotten first."""
    directory = Directory(gone_max=2)
    for one in IDS:
        directory.put("kubernetes", one, WEB)
    for one in IDS:
        directory.remove("kubernetes", one)

    assert [None, WEB, WEB] == [directory.get(one) for one in IDS]


def test_the_order_is_that_of_the_last_to_lose_it() -> None:
    """A container that another source sees go later went then, not when the first one lost it."""
    directory = Directory(gone_max=2)
    for source, one in (("kubernetes", IDS[0]), ("docker", IDS[0]), ("docker", IDS[1]), ("docker", IDS[2])):
        directory.put(source, one, WEB)
    for source, one in (("kubernetes", IDS[0]), ("docker", IDS[1]), ("docker", IDS[0]), ("docker", IDS[2])):
        directory.remove(source, one)

    assert [WEB, None, WEB] == [directory.get(one) for one in IDS]


def test_replace() -> None:
    """What is not among those that live has gone; what another source knows is not touched."""
    directory = Directory(gone_max=0)
    directory.put("kubernetes", IDS[0], WEB)
    directory.put("kubernetes", IDS[1], WEB)
    directory.put("docker", IDS[2], BELOW)

    directory.replace("kubernetes", {IDS[1]: WEB._replace(container="side")})

    assert [None, WEB._replace(container="side"), BELOW] == [directory.get(one) for one in IDS]


def test_who_knows_the_pod_is_right() -> None:
    """Whoever came first, and also when that one has gone and the other has not yet."""
    for order in (SOURCES, SOURCES[::-1]):
        directory = Directory()
        for source in order:
            directory.put(source, IDS[0], WEB if source == "kubernetes" else BELOW)
        assert WEB == directory.get(IDS[0])

        for source in order:
            directory.remove(source, IDS[0])
            assert WEB == directory.get(IDS[0])


@pytest.fixture
def restless() -> Iterator[None]:
    """Threads take turns a thousand times as often as they usually do."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(usual / 1000)
    yield
    sys.setswitchinterval(usual)


@pytest.mark.usefixtures("restless")
def test_many_threads() -> None:
    """Sources and readers at once lose nothing and give no wrong name."""
    directory = Directory(gone_max=50)
    wrong: list[Any] = []

    def fill(source: str) -> None:
        for number in range(2_000):
            directory.put(source, f"{number:064x}", Workload(str(number)))
            if number >= 20:
                directory.remove(source, f"{number - 20:064x}")

    def ask() -> None:
        for number in range(2_000):
            found = directory.get(f"{number:064x}")
            if found not in (None, Workload(str(number))) or len(directory) > 50 + 2 * 21:
                wrong.append((number, found, len(directory)))

    threads = [threading.Thread(target=fill, args=(source,)) for source in SOURCES]
    threads += [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert [] == wrong
    assert [Workload(str(number)) for number in range(1_980, 2_000)] == [
        directory.get(f"{number:064x}") for number in range(1_980, 2_000)
    ]


ACTS = st.one_of(
    st.tuples(st.just("put"), st.sampled_from(SOURCES), st.sampled_from(IDS), st.integers(0, 3)),
    st.tuples(st.just("remove"), st.sampled_from(SOURCES), st.sampled_from(IDS)),
    st.tuples(
        st.just("replace"),
        st.sampled_from(SOURCES),
        st.dictionaries(st.sampled_from(IDS), st.integers(0, 3), max_size=3),
    ),
    st.tuples(st.just("pass"), st.integers(0, 12)),
)


@given(st.lists(ACTS, max_size=40), st.integers(0, 4))
def test_names_are_those_that_were_given(acts: list[Any], gone_max: int) -> None:
    """An id has only names that were given to it, and has them while it lives and for its time after that."""
    clock = Clock()
    directory = Directory(gone_secs=10, gone_max=gone_max, monotonic=clock)
    alive: dict[str, dict[str, Workload]] = {source: {} for source in SOURCES}
    given_to: dict[str, set[Workload]] = {one: set() for one in IDS}
    went: dict[str, float] = {}

    def workload(source: str, one: str, number: int) -> Workload:
        made = Workload(f"{one[0]}{number}", pod=f"{one[0]}-pod" if source == "kubernetes" else None)
        given_to[one].add(made)
        return made

    def leave(source: str, one: str) -> None:
        if alive[source].pop(one, None) is not None:
            went[one] = clock.now

    for act in acts:
        match act:
            case ("put", source, one, number):
                alive[source][one] = workload(source, one, number)
                directory.put(source, one, alive[source][one])
            case ("remove", source, one):
                leave(source, one)
                directory.remove(source, one)
            case ("replace", source, numbers):
                now = {one: workload(source, one, number) for one, number in numbers.items()}
                for one in list(alive[source].keys() - now.keys()):
                    leave(source, one)
                alive[source] = dict(now)
                directory.replace(source, now)
            case ("pass", secs):
                clock.now += secs

        for one in IDS:
            found = directory.get(one)
            living = [known[one] for known in alive.values() if one in known]
            assert found is None or found in given_to[one]
            assert not living or found in living or (found is not None and found.pod is not None)
            if any(known.pod for known in living):
                assert found in [known for known in living if known.pod]
            if not living and (one not in went or clock.now - went[one] > 10):
                assert found is None
        assert len(directory) <= len(alive["kubernetes"].keys() | alive["docker"].keys()) + gone_max


# --- which sources there are --------------------------------------------------------------------------------------


def chosen(folder: Path, *names: str, kubeconfig: Path | None = None) -> list[str]:
    """Which sources begin where sockets and storage lie in this folder."""
    made = open_sources(
        names,
        Directory(),
        node="node-1",
        kubeconfig=kubeconfig,
        docker_sockets=[folder / "docker.sock", folder / "podman.sock"],
        podman_storage=folder / "storage",
        say=lambda *_: None,
    )
    for source in made:
        source.close()
    return [source.name.replace(f"{folder}/", "") for source in made]


@pytest.mark.parametrize(
    ("there", "expected"),
    [
        ((), []),
        (("docker.sock",), ["docker docker.sock"]),
        (("storage",), ["podman"]),
        (("docker.sock", "storage"), ["docker docker.sock", "podman"]),
        (("docker.sock", "podman.sock", "storage"), ["docker docker.sock", "docker podman.sock"]),
    ],
)
def test_auto_is_what_is_there(tmp_path: Path, there: tuple[str, ...], expected: list[str]) -> None:
    """Sockets that exist, and podman's files where its service has no socket."""
    for name in there:
        if name == "storage":
            (tmp_path / name).mkdir()
        else:
            with socket.socket(socket.AF_UNIX) as made:
                made.bind(str(tmp_path / name))

    assert expected == chosen(tmp_path, "auto")


def test_auto_is_kubernetes_where_a_kubeconfig_is_given(tmp_path: Path) -> None:
    """And nothing else: docker would see the same containers from below."""
    (tmp_path / "storage").mkdir()
    with serving() as api:
        kubeconfig = api.kubeconfig(tmp_path / "kubeconfig")

        assert ["kubernetes"] == chosen(tmp_path, "auto", kubeconfig=kubeconfig)


def test_what_is_named_is_asked_whether_it_is_there_or_not(tmp_path: Path) -> None:
    """It may come later; ``none`` is nobody."""
    assert ["docker docker.sock", "docker podman.sock"] == chosen(tmp_path, "docker")
    assert ["podman"] == chosen(tmp_path, "podman")
    assert [] == chosen(tmp_path, "none")
