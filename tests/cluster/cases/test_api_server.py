"""The watch of pods, on a real API server that goes away, comes back, and forgets."""

from __future__ import annotations

import json
import secrets
import ssl
import urllib.request
from collections.abc import Iterator

import pytest

from pipeline.event import Workload
from pipeline.workloads import Directory
from pipeline.workloads.kubernetes import Kubernetes
from tests import commands
from tests.cluster.servers import NODE, ApiServer

Said = list[tuple[str, str]]


def run_pod(api: ApiServer, name: str, node: str = NODE) -> str:
    """A pod that a kubelet would say runs there; gives the id of its one container, ``app``."""
    container_id = secrets.token_hex(32)
    spec = {"nodeName": node, "containers": [{"name": "app", "image": "example.org/app:1"}]}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"of": name}}, "spec": spec}
    status = {
        "name": "app", "ready": True, "restartCount": 0, "image": "example.org/app:1", "imageID": "",
        "containerID": f"containerd://{container_id}",
    }  # fmt: skip
    api.kubectl("create", "-f", "-", given=json.dumps(pod))
    patch = json.dumps({"status": {"phase": "Running", "containerStatuses": [status]}})
    api.kubectl("patch", "pod", name, "--subresource=status", "--type=merge", "-p", patch)
    return container_id


def workload(name: str) -> Workload:
    """What a directory has to say of ``run_pod``'s container."""
    return Workload("app", "example.org/app:1", "default", name, (("of", name),))


@pytest.fixture
def said() -> Said:
    """What the operator is told."""
    return []


@pytest.fixture
def directory(api: ApiServer, said: Said) -> Iterator[Directory]:
    """A directory that the API server's pods of ``NODE`` are written into."""
    # Of a node without any pod the source says that its name may be wrong.
    run_pod(api, "resident")
    found = Directory()
    source = Kubernetes(found, NODE, kubeconfig=api.kubeconfig, say=lambda *what: said.append(what))
    try:
        yield found
    finally:
        source.close()
        api.kubectl("delete", "pods", "--all", "--grace-period=0", "--force")


def watch(api: ApiServer, revision: str) -> dict[str, object]:
    """The first thing that a watch of pods from this revision is told."""
    trusting = ssl.create_default_context(cafile=str(api.folder / "apiserver/apiserver.crt"))
    request = urllib.request.Request(
        f"{api.url}/api/v1/pods?watch=true&resourceVersion={revision}&timeoutSeconds=2",
        headers={"Authorization": f"Bearer {api.tokens['admin']}"},
    )
    with urllib.request.urlopen(request, timeout=20, context=trusting) as answer:
        first: dict[str, object] = json.loads(answer.readline() or b"{}")
        return first


def test_a_compacted_past_is_gone(api: ApiServer) -> None:
    """The API server really answers 410 to a revision before the compaction."""
    revision = json.loads(api.kubectl("get", "--raw", "/api/v1/pods"))["metadata"]["resourceVersion"]
    api.kubectl("create", "configmap", "moves-the-revision")

    api.compact()

    event = watch(api, revision)
    api.kubectl("delete", "configmap", "moves-the-revision")
    assert ("ERROR", 410) == (event["type"], event["object"]["code"])  # type: ignore[index]


def test_pods_of_this_node_have_names(api: ApiServer, directory: Directory) -> None:
    """A pod is known as soon as its container is, keeps its name when it is deleted, and is not asked for elsewhere."""
    here, elsewhere = run_pod(api, "here"), run_pod(api, "elsewhere", "another-node")
    commands.until(lambda: directory.get(here) is not None)
    api.kubectl("delete", "pod", "here", "--grace-period=0", "--force")
    after = run_pod(api, "after")
    commands.until(lambda: directory.get(after) is not None)

    assert [workload("here"), workload("after"), None] == [directory.get(one) for one in (here, after, elsewhere)]


def test_a_watch_goes_on_after_the_api_server_was_away(api: ApiServer, directory: Directory, said: Said) -> None:
    """Names stay while it is away; that it is away is said once, and once that it is back."""
    before = run_pod(api, "before")
    commands.until(lambda: directory.get(before) is not None)
    api.stop()
    commands.until(lambda: [level for level, _ in said].count("warn") == 1)
    kept = directory.get(before)
    api.start()
    after = run_pod(api, "behind")

    commands.until(lambda: directory.get(after) is not None, 60)
    assert [workload("before"), workload("behind")] == [kept, directory.get(after)]
    assert ["warn", "info"] == [level for level, _ in said]


def test_a_watch_goes_on_after_410_gone(api: ApiServer, directory: Directory) -> None:
    """Who was watching from a revision that is compacted lists again: what went is gone, what came is known."""
    stays = run_pod(api, "stays")
    commands.until(lambda: directory.get(stays) is not None)
    # Not a pod, so the watch does not move on with it.
    for number in range(3):
        api.kubectl("create", "configmap", f"past-{number}")

    api.compact()

    comes = run_pod(api, "comes")
    commands.until(lambda: directory.get(comes) is not None, 60)
    api.kubectl("delete", "configmap", "past-0", "past-1", "past-2")
    assert [workload("stays"), workload("comes")] == [directory.get(stays), directory.get(comes)]


def test_a_revoked_right_is_named_and_comes_back(api: ApiServer, said: Said) -> None:
    """Without the right to list pods the operator is told which; when it is given, names come without a restart."""
    account = "system:serviceaccount:default:watcher"
    api.kubectl("create", "serviceaccount", "watcher")
    token = api.kubectl("create", "token", "watcher").strip()
    directory = Directory()
    config = api.config_for("watcher", token)
    source = Kubernetes(directory, NODE, kubeconfig=config, say=lambda *what: said.append(what))
    try:
        commands.until(lambda: len(said) == 1)
        api.kubectl("create", "clusterrole", "watcher", "--verb=list,watch", "--resource=pods")
        api.kubectl(
            "create", "clusterrolebinding", "watcher", "--clusterrole=watcher", "--serviceaccount=default:watcher"
        )
        found = run_pod(api, "late")
        commands.until(lambda: directory.get(found) is not None, 60)
    finally:
        source.close()
        api.kubectl("delete", "pods", "--all", "--grace-period=0", "--force")

    assert ["warn", "info"] == [level for level, _ in said]
    assert {"pods", account} == {word for word in ("pods", account) if word in said[0][1]}
