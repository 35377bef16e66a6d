"""The watch of a node's pods against a server on loopback that behaves as well, or as badly, as it is told to."""

from __future__ import annotations

import base64
import contextlib
import copy
import json
import os
import re
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import UsageError
from pipeline.event import Workload, original
from pipeline.workloads import Directory
from pipeline.workloads.kubernetes import (
    LINE_BYTES,
    LIST_BYTES,
    LONGEST_SECS,
    Kubernetes,
    in_cluster,
    parsed,
    workloads_of,
)
from tests import fake_api
from tests.commands import until
from tests.fake_api import Behaviour, FakeApi, container_id, event, pod, serving, status
from tests.strategies import HARM, texts


@dataclass
class Watching:
    """A source at work: what it knows, what it said, and how long it wanted to wait each time."""

    directory: Directory
    source: Kubernetes
    said: list[tuple[str, str]] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)

    def knows(self, container: str, seconds: float = 20.0) -> Workload:
        """The names of a container, as soon as there are any."""
        until(lambda: self.directory.get(container) is not None, seconds)
        found = self.directory.get(container)
        assert found is not None
        return found

    def levels(self) -> list[str]:
        """The levels of all that was said."""
        return [level for level, _ in self.said]


@contextlib.contextmanager
def watching(kubeconfig: Path | None, directory: Directory | None = None, **chosen: Any) -> Iterator[Watching]:
    """A source that waits a moment where it wants to wait longer."""
    said: list[tuple[str, str]] = []
    waits: list[float] = []
    over = threading.Event()

    def wait(secs: float) -> bool:
        waits.append(secs)
        return over.wait(0.01)

    known = directory if directory is not None else Directory(gone_max=0)
    chosen = {"wait": wait, "say": lambda level, sentence: said.append((level, sentence)), **chosen}
    source = Kubernetes(known, "node-1", kubeconfig=kubeconfig, **chosen)
    try:
        yield Watching(known, source, said, waits)
    finally:
        over.set()
        source.close()
        assert not source._thread.is_alive()


@pytest.fixture
def api() -> Iterator[FakeApi]:
    """A server without TLS that has one pod, ``here``, for a node without any is worth a warning."""
    with serving() as server:
        server.put(pod("here"))
        yield server


@pytest.fixture
def kubeconfig(api: FakeApi, tmp_path: Path) -> Path:
    """A kubeconfig that leads to ``api``."""
    return api.kubeconfig(tmp_path / "kubeconfig")


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> fake_api.Certificate:
    """A certificate for a server on loopback."""
    return fake_api.certificate(tmp_path_factory.mktemp("tls"))


# --- names --------------------------------------------------------------------------------------------------------


def test_names_of_the_list_and_of_the_watch(api: FakeApi, kubeconfig: Path) -> None:
    """A container has its names whether it was there before the agent or came after it; nothing is said."""
    before, after = container_id(), container_id()
    api.put(pod("web", before, namespace="shop", labels={"tier": "front", "app": "web"}, image="nginx:1"))

    with watching(kubeconfig) as seen:
        first = seen.knows(before)
        api.put(pod("db", container_id(), after))
        second = seen.knows(after)

    assert Workload("c0", "nginx:1", "shop", "web", (("app", "web"), ("tier", "front"))) == first
    assert Workload("c1", "registry.example/app:1", "default", "db", (("app", "db"),)) == second
    assert [] == seen.said


def test_what_is_asked(api: FakeApi, kubeconfig: Path) -> None:
    """The list comes from the server's memory and of this node alone; the watch goes on from it, with bookmarks."""
    with watching(kubeconfig):
        until(lambda: len(api.asked) == 2)

    listed, watched = api.asked
    secs = int(watched.query.pop("timeoutSeconds"))
    assert ("list", "t0") == (listed.verb, listed.token)
    assert {"fieldSelector": "spec.nodeName=node-1", "limit": "500", "resourceVersion": "0"} == listed.query
    assert {
        "fieldSelector": "spec.nodeName=node-1",
        "watch": "true",
        "allowWatchBookmarks": "true",
        "resourceVersion": "101",
    } == watched.query
    assert 300 <= secs <= 600
    assert listed.agent.startswith("bindsnoop/")


def test_a_node_is_no_selector(api: FakeApi, kubeconfig: Path) -> None:
    """What means something in a selector cannot widen it."""
    source = Kubernetes(Directory(), "a,b=c\\", kubeconfig=kubeconfig, say=lambda *_: None)
    until(lambda: bool(api.asked))
    source.close()

    assert "spec.nodeName=a\\,b\\=c\\\\" == api.asked[0].query["fieldSelector"]


def test_pages(api: FakeApi, kubeconfig: Path) -> None:
    """A list that comes in pages is one list; a page that continues another names no version."""
    ids = [container_id() for _ in range(5)]
    for number, one in enumerate(ids):
        api.put(pod(f"web-{number}", one))
    api.page = 2

    with watching(kubeconfig) as seen:
        assert [f"web-{number}" for number in range(5)] == [seen.knows(one).pod for one in ids]

    assert [None, "2", "4"] == [one.query.get("continue") for one in api.asked if one.verb == "list"]
    assert ["0", None, None] == [one.query.get("resourceVersion") for one in api.asked if one.verb == "list"]


def test_restarted_container(api: FakeApi, kubeconfig: Path) -> None:
    """The one before has its name as long as the status mentions it, then it has gone."""
    first, second, third = container_id(), container_id(), container_id()
    api.put(pod("web", first))

    with watching(kubeconfig) as seen:
        seen.knows(first)
        api.put(pod("web", second, last=first))
        seen.knows(second)
        assert seen.directory.get(first) is not None

        api.put(pod("web", third, last=second))
        seen.knows(third)
        until(lambda: seen.directory.get(first) is None)
        assert seen.directory.get(second) is not None


def test_deleted_pod(api: FakeApi, kubeconfig: Path) -> None:
    """Its containers have gone; another pod of the same name is another pod."""
    old, new = container_id(), container_id()
    api.put(pod("web-0", old, uid="first", labels={"v": "1"}))

    with watching(kubeconfig) as seen:
        seen.knows(old)
        api.delete("first")
        api.put(pod("web-0", new, uid="second", labels={"v": "2"}))

        assert (("v", "2"),) == seen.knows(new).labels
        until(lambda: seen.directory.get(old) is None)


def test_container_that_lived_between_two_events(api: FakeApi, kubeconfig: Path) -> None:
    """One that only the last event of its pod mentions has its name for late records."""
    brief = container_id()

    with watching(kubeconfig, Directory()) as seen:
        until(lambda: api.verbs()[-1:] == ["watch"])
        api.misbehave(Behaviour(on="watch", lines=[event("DELETED", pod("job", brief))], then="follow"))
        api.stop()
        api.start()

        assert "job" == seen.knows(brief).pod


def test_every_kind_of_container() -> None:
    """Init containers (sidecars are some), ephemeral ones, those that ended: each with the image that was asked for."""
    ids = {name: container_id() for name in ("app", "app-last", "init", "sidecar", "debug", "fallback")}
    given = {
        "metadata": {"name": "web", "namespace": "shop", "uid": "u"},
        "spec": {
            "containers": [{"name": "app", "image": "app:1"}, {"name": "fallback"}],
            "initContainers": [
                {"name": "init", "image": "init:1"},
                {"name": "sidecar", "image": "sidecar:1", "restartPolicy": "Always"},
            ],
            "ephemeralContainers": [{"name": "debug", "image": "debug:1"}],
        },
        "status": {
            "containerStatuses": [
                {
                    "name": "app",
                    "image": "sha256:0",
                    "containerID": "",
                    "state": {"terminated": {"containerID": f"containerd://{ids['app']}"}},
                    "lastState": {"terminated": {"containerID": f"containerd://{ids['app-last']}"}},
                },
                {"name": "fallback", "image": "fallback:1", "containerID": f"docker://{ids['fallback']}"},
            ],
            "initContainerStatuses": [
                {"name": "init", "state": {"terminated": {"containerID": f"cri-o://{ids['init']}"}}},
                {"name": "sidecar", "containerID": f"unheard-of://{ids['sidecar']}"},
            ],
            "ephemeralContainerStatuses": [{"name": "debug", "containerID": f"containerd://{ids['debug']}"}],
        },
    }

    found = workloads_of(parsed(json.dumps(given).encode()))

    assert {
        ids["app"]: Workload("app", "app:1", "shop", "web"),
        ids["app-last"]: Workload("app", "app:1", "shop", "web"),
        ids["fallback"]: Workload("fallback", "fallback:1", "shop", "web"),
        ids["init"]: Workload("init", "init:1", "shop", "web"),
        ids["sidecar"]: Workload("sidecar", "sidecar:1", "shop", "web"),
        ids["debug"]: Workload("debug", "debug:1", "shop", "web"),
    } == found


@pytest.mark.parametrize(
    "given",
    ["", "containerd://", "containerd://abc", "a" * 64, f"containerd://{'a' * 63}", f"containerd://{'A' * 64}",
     f"containerd://{'a' * 65}", f"x/y://{'a' * 64}", None, 7, [], {}],
)  # fmt: skip
def test_what_is_no_container_id(given: Any) -> None:
    """Only 64 hexadecimal digits behind a scheme are; they are what a cgroup's name is compared with."""
    one = pod("web", "a" * 64)
    one["status"]["containerStatuses"][0]["containerID"] = given

    assert {} == workloads_of(one)


def _places(thing: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    for key, value in thing.items() if isinstance(thing, dict) else enumerate(thing) if isinstance(thing, list) else ():
        yield from _places(value, (*path, key))


def _put_at(thing: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    changed = copy.copy(thing)
    changed[path[0]] = _put_at(thing[path[0]], path[1:], value)
    return changed


@pytest.mark.parametrize("wrong", [None, "", 0, [], {}, [None], ["x"], {"name": None}, "\ud800"], ids=repr)
def test_any_part_of_a_pod_may_be_wrong(wrong: Any) -> None:
    """Whatever is null, empty or of another type is passed over; names that are found are still the right ones."""
    given = parsed(json.dumps(pod("web", "a" * 64, "b" * 64, last="c" * 64)).encode())

    for path in _places(given):
        found = workloads_of(_put_at(given, path, wrong))

        assert set() == {workload.pod for workload in found.values()} - {"web", None, "\\xed\\xa0\\x80"}
        assert found.keys() <= {"a" * 64, "b" * 64, "c" * 64}


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | texts(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["metadata", "status", "containerStatuses", "name", "labels", "containerID", "state"])
                | texts(),
                inner,
                max_size=4,
            )
        ),
    )
)
def test_any_json_is_a_pod_without_harm(thing: Any) -> None:
    """No JSON of any shape raises."""
    assert isinstance(workloads_of(parsed(json.dumps(thing).encode())), dict)


@given(texts(), texts(), texts().filter(bool), texts(), st.dictionaries(texts(), texts(), max_size=5))
def test_every_text_becomes_printable(
    namespace: str, name: str, container: str, image: str, labels: dict[str, str]
) -> None:
    """What a pod's owner wrote can be had back and cannot break a line, whatever it was; labels are in order."""
    one = pod(name, "a" * 64, namespace=namespace, labels=labels, image=image)
    for place in (one["spec"]["containers"][0], one["status"]["containerStatuses"][0]):
        place["name"] = container
    one["status"]["containerStatuses"][0]["image"] = ""

    found = workloads_of(parsed(json.dumps(one).encode()))["a" * 64]

    given = [container, image or None, namespace or None, name or None]
    assert given == [text if text is None else original(text).decode() for text in found[:4]]
    assert labels == {original(key).decode(): original(value).decode() for key, value in found.labels}
    assert list(found.labels) == sorted(found.labels)
    assert all(
        text.isprintable() for text in [*filter(None, found[:4]), *(part for pair in found.labels for part in pair)]
    )


def test_hostile_texts_over_the_wire(api: FakeApi, kubeconfig: Path) -> None:
    """The same through a list and a watch."""
    ids = {container_id(): text for text in HARM if text}
    for number, (one, text) in enumerate(ids.items()):
        if number % 2:
            api.put(pod(text, one, uid=one))

    with watching(kubeconfig) as seen:
        until(lambda: api.verbs() == ["list", "watch"])
        for number, (one, text) in enumerate(ids.items()):
            if not number % 2:
                api.put(pod(text, one, uid=one))

        assert ids == {one: original(str(seen.knows(one).pod)).decode() for one in ids}

    assert [] == seen.said


def test_no_pod_on_this_node(tmp_path: Path) -> None:
    """A node of which the server knows no pod is most often a name that is wrong; said once."""
    with serving() as server:
        server.misbehave(Behaviour(on="watch", lines=[event("ERROR", json.loads(status(410)))]))
        with watching(server.kubeconfig(tmp_path / "kubeconfig")) as seen:
            until(lambda: server.verbs() == ["list", "watch", "list", "watch"])

    ((level, sentence),) = seen.said
    assert ("warn", True, True) == (level, "no pod on a node node-1" in sentence, "--node" in sentence)


# --- failures -----------------------------------------------------------------------------------------------------


def test_down_at_start(api: FakeApi, kubeconfig: Path) -> None:
    """Making a source neither waits nor raises because the server is away; names come when it does."""
    here = container_id()
    api.put(pod("web", here))
    api.stop()

    with watching(kubeconfig) as seen:
        until(lambda: bool(seen.said))
        api.start()
        seen.knows(here)
        until(lambda: len(seen.said) == 2)

    (_, away), (_, back) = seen.said
    assert ["warn", "info"] == seen.levels()
    assert f"{api.url} cannot be reached (Connection refused)" in away
    assert "raw container id" in away
    assert f"{api.url} is back; 2 pods have names" in back


def test_down_in_between(api: FakeApi, kubeconfig: Path) -> None:
    """Pods that came and went meanwhile are found by a list; those that were known stay known while it is away."""
    stays, goes, comes = container_id(), container_id(), container_id()
    api.put(pod("stays", stays))
    api.put(pod("goes", goes))

    with watching(kubeconfig) as seen:
        seen.knows(goes)
        api.stop()
        until(lambda: seen.levels() == ["warn"])
        assert seen.directory.get(stays) is not None
        api.delete("uid-of-goes")
        api.put(pod("comes", comes))
        api.start()

        seen.knows(comes)
        assert seen.directory.get(goes) is None
        assert seen.directory.get(stays) is not None
        until(lambda: len(seen.said) == 2)

    assert ["warn", "info"] == seen.levels()


def test_down_for_an_hour(api: FakeApi, kubeconfig: Path) -> None:
    """One warning; at most 300 attempts, at random times so that agents do not come together; then names again."""
    here = container_id()
    api.put(pod("web", here))
    api.stop()
    tried: list[list[float]] = []

    for _ in range(2):
        attempts: list[float] = [0.0]

        def wait(secs: float, attempts: list[float] = attempts) -> bool:
            attempts.append(attempts[-1] + secs)
            if attempts[-1] > 3600 and api._server is None:
                api.start()
            return False

        with watching(kubeconfig, wait=wait, monotonic=lambda attempts=attempts: attempts[-1]) as seen:  # type: ignore[misc]
            seen.knows(here, 60)
            until(lambda seen=seen: len(seen.said) == 2)  # type: ignore[misc]
            until(lambda: api.verbs()[-1:] == ["watch"])
            api.stop()
        tried.append([at for at in attempts if at <= 3600])

        assert ["warn", "info"] == seen.levels()[:2]
        assert 100 < len(tried[-1]) <= 300
        assert (
            LONGEST_SECS
            >= max(after - before for before, after in zip(tried[-1], tried[-1][1:], strict=False))
            > LONGEST_SECS / 2
        )

    assert 0.0 in set(tried[0]) & set(tried[1])
    assert 1 == len(set(tried[0]) & set(tried[1]))


def test_connection_that_ends_in_the_middle_of_a_line(api: FakeApi, kubeconfig: Path) -> None:
    """The half line is dropped, and the watch goes on where it was, without another list and without a word."""
    first, second = container_id(), container_id()
    half = event("ADDED", pod("web", second))[:300]
    one = pod("web", first)
    one["metadata"]["resourceVersion"] = "150"
    api.misbehave(Behaviour(on="watch", lines=[event("ADDED", one), half], then="cut"))

    with watching(kubeconfig) as seen:
        seen.knows(first)
        until(lambda: api.verbs() == ["list", "watch", "watch"])
        assert "150" == api.asked[-1].query["resourceVersion"]

    assert [] == seen.said
    assert 0 == seen.source.malformed
    assert seen.directory.get(second) is None


@pytest.mark.parametrize("then", ["hang", "cut"])
def test_list_that_breaks_off(api: FakeApi, kubeconfig: Path, then: str) -> None:
    """Half a list is none: what is known stays, and it is asked for again."""
    here = container_id()
    api.put(pod("web", here))
    api.misbehave(Behaviour(on="list", lines=[b'{"metadata": {"resourceVersion": "1"}, "items": ['], then=then))

    with watching(kubeconfig, silent_secs=0.3) as seen:
        seen.knows(here)
        until(lambda: api.verbs()[:3] == ["list", "list", "watch"])


@pytest.mark.parametrize("mute", [False, True], ids=["after headers", "before headers"])
def test_half_open_watch(api: FakeApi, kubeconfig: Path, mute: bool) -> None:
    """A connection on which nothing comes any more, not even a bookmark, is given up, and the pods are found."""
    here = container_id()
    api.misbehave(Behaviour(on="watch", lines=[], then="hang", mute=mute))

    with watching(kubeconfig, silent_secs=0.3) as seen:
        until(lambda: len(api.asked) == 2)
        api.put(pod("web", here))

        seen.knows(here)

    assert "warn" not in seen.levels()


def test_bookmarks_keep_a_silent_watch_alive(api: FakeApi, kubeconfig: Path) -> None:
    """And the next watch begins at the last of them."""
    with watching(kubeconfig, silent_secs=0.5) as seen:
        until(lambda: len(api.asked) == 2)
        for _ in range(8):
            api.bookmark()
            threading.Event().wait(0.1)
        assert 2 == len(api.asked)
        until(lambda: len(api.asked) == 3)

    assert ("watch", "109") == (api.asked[2].verb, api.asked[2].query["resourceVersion"])
    assert [] == seen.said


def test_hung_server(api: FakeApi, kubeconfig: Path) -> None:
    """A server that takes requests and never answers is away."""
    api.always(Behaviour(mute=True))

    with watching(kubeconfig, silent_secs=0.2) as seen:
        until(lambda: bool(seen.said))
        assert "cannot be reached (" in seen.said[0][1]
        assert "timed out" in seen.said[0][1]


@pytest.mark.parametrize("after_events", [False, True], ids=["of the list", "of an event"])
@pytest.mark.parametrize("how", ["status", "event"])
def test_version_that_is_no_longer_known(api: FakeApi, kubeconfig: Path, how: str, after_events: bool) -> None:
    """The pods are listed again; not from the server's memory when that was what was too old. Nothing is said."""
    here, late = container_id(), container_id()
    moved = [event("BOOKMARK", {"metadata": {"resourceVersion": "101"}})] if after_events else []
    gone = status(410, "too old resource version: 1 (2)", "Expired")
    if how == "status":
        api.misbehave(Behaviour(on="watch", lines=moved), Behaviour(on="watch", status=410, body=gone))
    else:
        api.misbehave(Behaviour(on="watch", lines=[*moved, event("ERROR", json.loads(gone))]))
    api.put(pod("web", here))

    with watching(kubeconfig) as seen:
        until(lambda: api.verbs().count("list") == 2)
        api.put(pod("late", late))
        seen.knows(late)

    again = [one for one in api.asked if one.verb == "list"][1]
    assert ("0" if after_events else None) == again.query.get("resourceVersion")
    assert [] == seen.said


def test_compacted_while_it_was_away(api: FakeApi, kubeconfig: Path) -> None:
    """A real order of events: connection lost, version compacted, list again, and a pod that went is gone."""
    goes, comes = container_id(), container_id()
    api.put(pod("goes", goes))
    cut = [event("BOOKMARK", {"metadata": {"resourceVersion": "102"}})]
    api.misbehave(Behaviour(on="watch", lines=cut, then="cut"))
    resume = threading.Event()

    def wait(_: float) -> bool:
        resume.wait(10)
        return False

    with watching(kubeconfig, wait=wait) as seen:
        seen.knows(goes)
        api.delete("uid-of-goes")
        api.put(pod("comes", comes))
        api.compact()
        resume.set()

        seen.knows(comes)
        until(lambda: seen.directory.get(goes) is None)

    assert ["list", "watch", "watch", "list", "watch"] == api.verbs()


def test_list_that_is_no_longer_known(api: FakeApi, kubeconfig: Path) -> None:
    """A token of a next page that has expired: the list begins anew."""
    ids = [container_id() for _ in range(3)]
    for number, one in enumerate(ids):
        api.put(pod(f"web-{number}", one))
    api.page = 2
    good = Behaviour(on="list", then="follow")
    api.misbehave(good, Behaviour(on="list", status=410, body=status(410, "continue expired", "Expired")))

    with watching(kubeconfig) as seen:
        assert ["web-0", "web-1", "web-2"] == [seen.knows(one).pod for one in ids]

    assert ["list"] * 4 == api.verbs()[:4]


def test_retry_after_is_honoured(api: FakeApi, kubeconfig: Path) -> None:
    """The server is not asked again before the time that it named, nor exactly then."""
    busy = Behaviour(status=429, headers={"Retry-After": "17"}, body=status(429, "too many requests"))
    api.misbehave(*[busy] * 4)

    with watching(kubeconfig) as seen:
        until(lambda: "watch" in api.verbs())

    assert [True] * 4 == [17 <= secs <= 17 + 2**number for number, secs in enumerate(seen.waits[:4])]
    assert 4 == len(set(seen.waits[:4]))
    assert "answers HTTP 429 (too many requests)" in seen.said[0][1]
    assert ["warn", "info"] == seen.levels()


@pytest.mark.parametrize("given", ["-5", "soon", "1e9", "", "9" * 30, "Wed, 21 Oct 2026 07:28:00 GMT"])
def test_retry_after_that_is_no_number_of_seconds(api: FakeApi, kubeconfig: Path, given: str) -> None:
    """It is as if there were none."""
    api.misbehave(Behaviour(status=503, headers={"Retry-After": given}, body=b""))

    with watching(kubeconfig) as seen:
        until(lambda: "watch" in api.verbs())

    assert 0 <= seen.waits[0] <= 1


def test_retry_after_has_an_end(api: FakeApi, kubeconfig: Path) -> None:
    """A server that wants to be left alone for days is asked after five minutes."""
    api.misbehave(Behaviour(status=503, headers={"Retry-After": "86400"}, body=b""))

    with watching(kubeconfig) as seen:
        until(lambda: "watch" in api.verbs())

    assert 300 <= seen.waits[0] <= 301
    assert "answers HTTP 503;" in seen.said[0][1]


@pytest.mark.parametrize("on", ["list", "watch"])
@pytest.mark.parametrize(
    ("code", "body", "sentence"),
    [
        (500, status(500, "etcd is\x1b[31m gone\n"), "answers HTTP 500 (etcd is\\x1b[31m gone\\x0a)"),
        (503, b"<html>no backend</html>", "answers HTTP 503;"),
        (502, b"[" * 5000, "answers HTTP 502;"),
        (404, b'{"message": ["x"]}', "answers HTTP 404;"),
        (302, b"", "answers HTTP 302;"),
        (401, b"", "refuses the credentials of "),
        (403, b"", "forbids this account to {on} pods (HTTP 403); bind it to a ClusterRole with the verbs list and"),
        (
            403,
            status(403, 'pods is forbidden: User "system:serviceaccount:a:b" cannot list resource "pods"'),
            "forbids system:serviceaccount:a:b to {on} pods (HTTP 403)",
        ),
    ],
)  # fmt: skip
def test_refusals(api: FakeApi, kubeconfig: Path, on: str, code: int, body: bytes, sentence: str) -> None:
    """Each is said once in a sentence that names the server and the reason, tried again, and over when it is over."""
    here = container_id()
    api.put(pod("web", here))
    api.always(Behaviour(on=on, status=code, headers={"Location": "http://127.0.0.1:1/"}, body=body))

    with watching(kubeconfig) as seen:
        until(lambda: api.verbs().count(on) >= 5)
        assert ["warn"] == seen.levels()
        assert f"{api.url} {sentence.replace('{on}', on)}" in seen.said[0][1]
        assert "\n" not in seen.said[0][1]

        api.always()
        seen.knows(here)
        until(lambda: seen.levels() == ["warn", "info"])


def test_first_failure_is_no_news(api: FakeApi, kubeconfig: Path) -> None:
    """A server that refuses once and a moment later does not is healthy."""
    api.misbehave(Behaviour(status=500, body=b""))

    with watching(kubeconfig) as seen:
        until(lambda: "watch" in api.verbs())

    assert [] == seen.said


def test_watch_that_ends_at_once_is_asked_slower_and_slower(api: FakeApi, kubeconfig: Path) -> None:
    """A server, or what stands before it, that ends every watch is not overrun, and the list is not asked again."""
    api.always(Behaviour(on="watch", lines=[]))

    with watching(kubeconfig) as seen:
        until(lambda: len(seen.waits) > 60)

    assert max(seen.waits[:1]) <= 1
    assert LONGEST_SECS / 2 < max(seen.waits) <= LONGEST_SECS
    assert 1 == api.verbs().count("list")
    assert [] == seen.said


def test_watch_that_lasted_is_renewed_at_once(api: FakeApi, kubeconfig: Path) -> None:
    """One that ends when it should is followed by the next, without a pause; and failures before it are forgotten."""
    now = [0.0]

    def hours() -> Iterator[bytes]:
        now[0] += 600
        yield event("BOOKMARK", {"metadata": {"resourceVersion": "102"}})

    api.misbehave(Behaviour(status=500, body=b""), Behaviour(on="watch", lines=hours()))

    with watching(kubeconfig, monotonic=lambda: now[0]) as seen:
        until(lambda: api.verbs().count("watch") == 2)

    assert 1 == len(seen.waits)
    assert 0 == seen.source._failures


@pytest.mark.parametrize(
    "line",
    [
        b"{]", b"\xff\xfe", b"null", b"[]", b"7", b"{}", b'{"type": "ADDED"}', b'{"type": "UNKNOWN", "object": {}}',
        b'{"type": ["ADDED"], "object": {}}', b'{"type": "DELETED", "object": {"metadata": null}}', b"[" * 100_000,
        b'{"type": "MODIFIED", "object": {"metadata": {"name": ""}}}', b"9" * 5000,
    ],
    ids=lambda line: line[:20].decode("latin-1"),
)  # fmt: skip
def test_malformed_line(api: FakeApi, kubeconfig: Path, line: bytes) -> None:
    """One is skipped and counted, and the watch goes on; when it happens again the pods are listed again."""
    first, second = container_id(), container_id()
    good = event("ADDED", pod("web", first))
    api.misbehave(Behaviour(on="watch", lines=[line + b"\n", b"\n", good], then="follow"))

    with watching(kubeconfig) as seen:
        seen.knows(first)
        assert (1, ["list", "watch"]) == (seen.source.malformed, api.verbs())

    api.misbehave(Behaviour(on="watch", lines=[line + b"\n", good, line + b"\n"], then="follow"))
    with watching(kubeconfig) as seen:
        until(lambda: api.verbs()[2:] == ["list", "watch", "list", "watch"])
        api.put(pod("late", second))
        seen.knows(second)

    assert 2 == seen.source.malformed
    assert [] == seen.said


def test_error_event(api: FakeApi, kubeconfig: Path) -> None:
    """Whatever a watch fails of, the pods are listed again."""
    api.misbehave(
        Behaviour(on="watch", lines=[event("ERROR", json.loads(status(500, "decoding failed")))], then="hang")
    )

    with watching(kubeconfig) as seen:
        until(lambda: api.verbs() == ["list", "watch", "list", "watch"])

    assert [] == seen.said


def test_line_without_end(api: FakeApi, kubeconfig: Path) -> None:
    """A line that is longer than any event can be is not read to its end."""
    sent = []

    def endless() -> Iterator[bytes]:
        for _ in range(100):
            sent.append(1 << 20)
            yield b"x" * (1 << 20)

    api.misbehave(Behaviour(on="watch", lines=endless()))

    with watching(kubeconfig):
        until(lambda: api.verbs() == ["list", "watch", "list", "watch"])

    # What was sent and not read stands in the buffers of the connection.
    assert LINE_BYTES < sum(sent) < 5 * LINE_BYTES


def test_list_without_end(api: FakeApi, kubeconfig: Path) -> None:
    """Nor is a list that is larger than memory may be."""
    api.misbehave(*[Behaviour(on="list", lines=(b" " * (1 << 20) for _ in range(200))) for _ in range(2)])

    with watching(kubeconfig) as seen:
        until(lambda: "watch" in api.verbs(), 60)

    assert f"larger than {LIST_BYTES} bytes" in seen.said[0][1]


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{}", b'{"items": []}', b'{"metadata": {"resourceVersion": 7}}', b"<html>"]
)
def test_what_is_no_list(api: FakeApi, kubeconfig: Path, body: bytes) -> None:
    """An answer that is no list of pods takes no name away."""
    here = container_id()
    api.put(pod("web", here))

    with watching(kubeconfig) as seen:
        seen.knows(here)
        api.always(Behaviour(on="list", body=body), Behaviour(on="watch", status=500, body=b""))
        api.stop()
        api.start()
        until(lambda: api.verbs().count("list") > 3)
        until(lambda: bool(seen.said))

        assert seen.directory.get(here) is not None

    assert ["warn"] == seen.levels()


# --- credentials --------------------------------------------------------------------------------------------------


def test_rotated_token_of_a_kubeconfig(api: FakeApi, kubeconfig: Path) -> None:
    """A token that is no longer taken is read again."""
    api.tokens = {"t1"}

    with watching(kubeconfig) as seen:
        until(lambda: seen.levels() == ["warn"])
        assert f"refuses the credentials of {kubeconfig} (HTTP 401)" in seen.said[0][1]
        api.kubeconfig(kubeconfig, token="t1")
        until(lambda: seen.levels() == ["warn", "info"])

    assert {"t0", "t1"} == {one.token for one in api.asked}


@pytest.fixture
def service_account(tmp_path: Path, tls: fake_api.Certificate) -> Path:
    """The folder that Kubernetes gives to a pod, with the token ``t0``."""
    folder = tmp_path / "serviceaccount"
    folder.mkdir()
    (folder / "token").write_text("t0")
    (folder / "ca.crt").write_bytes(tls.certificate.read_bytes())
    return folder


def test_service_account(service_account: Path, tls: fake_api.Certificate, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a pod: TLS with the cluster's authority, no proxy; a token that is rotated is used for the next request."""
    with serving(tls=tls, tokens={"t0"}) as server:
        server.put(pod("here"))
        server.misbehave(Behaviour(on="watch", lines=[], then="cut"))
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(server.port))
        monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
        rotated = threading.Event()

        def wait(_: float) -> bool:
            server.tokens = {"t1"}
            (service_account / "token").write_text("t1\n")
            rotated.set()
            return False

        with watching(None, service_account=service_account, wait=wait) as seen:
            until(rotated.is_set)
            until(lambda: len(server.asked) == 3)

    assert [("list", "t0"), ("watch", "t0"), ("watch", "t1")] == [(one.verb, one.token) for one in server.asked]
    assert [] == seen.said


def test_service_account_that_goes_away(
    service_account: Path, tls: fake_api.Certificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token that cannot be read for a while is said, and does not end the thread."""
    with serving(tls=tls) as server:
        server.put(pod("here"))
        server.always(Behaviour(on="watch", lines=[]))
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(server.port))

        with watching(None, service_account=service_account) as seen:
            until(lambda: "watch" in server.verbs())
            (service_account / "token").rename(service_account / "away")
            until(lambda: seen.levels() == ["warn"])
            assert (
                f"is not asked, for the service account of this pod, {service_account}, cannot be used"
                in seen.said[0][1]
            )
            (service_account / "away").rename(service_account / "token")
            until(lambda: seen.levels() == ["warn", "info"])


@pytest.mark.parametrize("missing", ["token", "ca.crt", "host"])
def test_no_service_account(service_account: Path, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside of a pod that is an error at once, in a sentence that says what else there is."""
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    if missing != "host":
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "1")
        (service_account / missing).unlink()

    with pytest.raises(UsageError, match=f"{re.escape(str(service_account))}, cannot be used.*name a kubeconfig"):
        Kubernetes(Directory(), "n", kubeconfig=None, say=lambda *_: None, service_account=service_account)


def test_in_cluster(service_account: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process is in a cluster when it has both the address and a service account."""
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    assert not in_cluster(service_account)

    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert in_cluster(service_account)

    (service_account / "token").unlink()
    assert not in_cluster(service_account)


@pytest.mark.parametrize(
    "text",
    [
        None, "", "{", "- a", "7", "[]", "{}", "\x00", "a: &a [*a]", "current-context: x",
        '{"current-context": "c", "contexts": null, "clusters": [], "users": []}',
        '{"current-context": "c", "contexts": [{"name": "c", "context": {"cluster": "x"}}], "clusters": []}',
        '{"current-context": "c", "contexts": [{"name": "c", "context": {"cluster": "x"}}], "users": 7, '
        '"clusters": [{"name": "x", "cluster": {}}]}',
        '{"current-context": "c", "contexts": [{"name": "c", "context": {"cluster": "x"}}], '
        '"clusters": [{"name": "x", "cluster": {"server": "127.0.0.1:6443"}}]}',
        '{"current-context": "c", "contexts": [{"name": "c", "context": {"cluster": "x"}}], '
        '"clusters": [{"name": "x", "cluster": {"server": 7}}]}',
        '{"current-context": "c", "contexts": [{"name": "c", "context": {"cluster": "x"}}], '
        '"clusters": [{"name": "x", "cluster": {"server": "https://h", "certificate-authority": "none.crt"}}]}',
        '{"current-context": "c", "contexts": [{"name": "c", "context": {"cluster": "x"}}], '
        '"clusters": [{"name": "x", "cluster": {"server": "https://h", "certificate-authority-data": "AAAA"}}]}',
        '{"current-context": "c", "contexts": [{"name": "c", "context": {"cluster": "x"}}], '
        '"clusters": [{"name": "x", "cluster": {"server": "https://h", "certificate-authority-data": "!"}}]}',
    ],
)  # fmt: skip
def test_kubeconfig_that_is_wrong(tmp_path: Path, text: str | None) -> None:
    """It is an error at once that names the file, in one line."""
    path = tmp_path / "kubeconfig"
    if text is not None:
        path.write_text(text)

    with pytest.raises(UsageError, match=f"^the kubeconfig {re.escape(str(path))} cannot be used: .+$"):
        Kubernetes(Directory(), "n", kubeconfig=path, say=lambda *_: None)


@pytest.mark.parametrize("how", ["file", "relative", "data"])
def test_tls_with_an_authority_of_a_kubeconfig(tmp_path: Path, tls: fake_api.Certificate, how: str) -> None:
    """By its file, also relative to the kubeconfig, or as data."""
    here = container_id()
    chosen = {
        "file": {"certificate-authority": str(tls.certificate)},
        "relative": {"certificate-authority": os.path.relpath(tls.certificate, tmp_path)},
        "data": {"certificate-authority-data": base64.b64encode(tls.certificate.read_bytes()).decode()},
    }[how]
    with serving(tls=tls) as server:
        server.put(pod("web", here))
        with watching(server.kubeconfig(tmp_path / "kubeconfig", **chosen)) as seen:
            assert "web" == seen.knows(here).pod

    assert [] == seen.said


def test_another_authority(tmp_path: Path, tls: fake_api.Certificate) -> None:
    """A server that another authority vouches for is not spoken to, and the sentence says that it is TLS."""
    other = fake_api.certificate(tmp_path, "other")
    with serving(tls=tls) as server:
        wrong = server.kubeconfig(tmp_path / "kubeconfig", **{"certificate-authority": str(other.certificate)})
        with watching(wrong) as seen:
            until(lambda: bool(seen.said))
            assert "cannot be reached by TLS (" in seen.said[0][1]
            assert "CERTIFICATE_VERIFY_FAILED" in seen.said[0][1]

    assert [] == server.asked


def test_tls_that_is_not_checked(tmp_path: Path, tls: fake_api.Certificate) -> None:
    """Who turns the check off in a kubeconfig gets what he asked for, without a warning at every request."""
    here = container_id()
    with serving(tls=tls) as server:
        server.put(pod("web", here))
        path = server.kubeconfig(
            tmp_path / "kubeconfig", **{"certificate-authority": None, "insecure-skip-tls-verify": True}
        )
        with watching(path) as seen:
            seen.knows(here)


def _plugin(path: Path, kubeconfig: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    wanted = json.loads(kubeconfig.read_text())
    wanted["users"][0]["user"] = {"exec": {"apiVersion": "client.authentication.k8s.io/v1", "command": str(path)}}
    kubeconfig.write_text(json.dumps(wanted))


def test_plugin_for_credentials(api: FakeApi, kubeconfig: Path, tmp_path: Path) -> None:
    """A program that a kubeconfig names gives a token; the thread runs it, for making a source waits for nobody."""
    answer = {"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential", "status": {"token": "t9"}}
    _plugin(tmp_path / "plugin", kubeconfig, f"read wait <{tmp_path}/gate; echo '{json.dumps(answer)}'")
    os.mkfifo(tmp_path / "gate")

    with watching(kubeconfig):
        assert [] == api.asked
        (tmp_path / "gate").write_text("go\n")
        until(lambda: bool(api.asked))

    assert "t9" == api.asked[0].token


def test_plugin_that_fails(api: FakeApi, kubeconfig: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What it says is the reason, and nothing else writes to standard error."""
    _plugin(tmp_path / "plugin", kubeconfig, "echo no ticket >&2; exit 3")

    with watching(kubeconfig) as seen:
        until(lambda: bool(seen.said))

    assert (
        f"is not asked, for the kubeconfig {kubeconfig} cannot be used: exec: process returned 3. no ticket"
        in seen.said[0][1]
    )
    assert ("", "") == capfd.readouterr()
    assert [] == api.asked


# --- the end ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def mute_listener(backlog: int = 5) -> Iterator[int]:
    """A port where connections come about and nothing is ever read or written."""
    with socket.create_server(("127.0.0.1", 0), backlog=backlog) as listener:
        yield listener.getsockname()[1]


def _closing(source: Kubernetes) -> float:
    began = time.monotonic()
    source.close()
    assert not source._thread.is_alive()
    return time.monotonic() - began


@pytest.mark.parametrize("secure", [False, True], ids=["http", "https"])
@pytest.mark.parametrize(
    "behaviour",
    [
        Behaviour(on="watch", then="follow"),
        Behaviour(on="watch", lines=[b'{"type"'], then="hang"),
        Behaviour(on="list", mute=True),
        Behaviour(on="list", lines=[b"{"], then="hang"),
        Behaviour(on="list", status=500, lines=[b"{"], then="hang"),
        Behaviour(on="list", status=503, headers={"Retry-After": "200"}, body=b""),
    ],
    ids=["silent watch", "half a line", "no headers", "half a list", "half an error", "waiting"],
)
def test_close(tmp_path: Path, tls: fake_api.Certificate, secure: bool, behaviour: Behaviour) -> None:
    """The thread ends within two seconds, whatever it waits for, says nothing of it and may be closed again."""
    said: list[str] = []
    with serving(tls=tls if secure else None) as server:
        server.put(pod("here"))
        server.misbehave(behaviour)
        source = Kubernetes(
            Directory(),
            "node-1",
            kubeconfig=server.kubeconfig(tmp_path / "k"),
            say=lambda _, sentence: said.append(sentence),
        )
        until(lambda: behaviour.on in server.verbs())
        if behaviour.headers:
            until(lambda: bool(said))
        before = list(said)

        assert _closing(source) < 2
        assert _closing(source) < 0.1
        assert before == said


def test_close_in_a_handshake(tmp_path: Path, tls: fake_api.Certificate) -> None:
    """Also when the other side takes the connection and never speaks TLS."""
    with mute_listener() as port, serving(tls=tls) as server:
        path = server.kubeconfig(tmp_path / "kubeconfig", server=f"https://127.0.0.1:{port}")
        source = Kubernetes(Directory(), "node-1", kubeconfig=path, say=lambda *_: None)
        until(lambda: source._line is not None)

        assert _closing(source) < 2


def test_close_at_once(kubeconfig: Path) -> None:
    """Also when it has not begun."""
    for _ in range(20):
        source = Kubernetes(Directory(), "node-1", kubeconfig=kubeconfig, say=lambda *_: None)

        assert _closing(source) < 2


# --- memory -------------------------------------------------------------------------------------------------------


def _rss_kib() -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.partition("RssAnon:")[2].split()[0])


def _churn(numbers: range, each: Callable[[], None]) -> Iterable[bytes]:
    """Pods that come, run and go, thirty at a time; ``each`` is called for each of them."""

    def one(number: int, running: bool) -> dict[str, Any]:
        ids = (f"{number:064x}", f"{number + (1 << 40):064x}") if running else ()
        return pod(f"job-{number}", *ids, namespace=f"ns-{number % 7}", labels={"job": str(number)})

    for number in range(numbers.start, numbers.stop + 30):
        if number in numbers:
            yield event("ADDED", one(number, False))
            yield event("MODIFIED", one(number, True))
            each()
        if number - 30 in numbers:
            yield event("DELETED", one(number - 30, True))


def test_many_pods_come_and_go(api: FakeApi, kubeconfig: Path) -> None:
    """Thousands within seconds: no name is wrong, and what is kept does not grow with those that left."""
    directory = Directory(gone_max=2_000)
    sizes: list[int] = []
    grown: list[int] = []

    with watching(kubeconfig, directory) as seen:
        for numbers in (range(5_000), range(5_000, 8_000)):
            until(lambda: api.verbs()[-1:] == ["watch"])
            churn = _churn(numbers, lambda: sizes.append(len(directory)))
            api.misbehave(Behaviour(on="watch", lines=churn, then="follow"))
            api.stop()
            api.start()
            until(lambda numbers=numbers: directory.get(f"{numbers[-1]:064x}") is not None, 60)  # type: ignore[misc]
            until(lambda: seen.source._ids.keys() == {"uid-of-here"}, 60)
            grown.append(_rss_kib())

            found = {f"job-{number}": directory.get(f"{number:064x}") for number in numbers}
            known = {name: workload.pod for name, workload in found.items() if workload is not None}
            assert {name: name for name in known} == known
            assert 1_000 == len(known)

    assert max(sizes) <= 2_000 + 2 * 60
    assert grown[1] - grown[0] < 4 << 10
