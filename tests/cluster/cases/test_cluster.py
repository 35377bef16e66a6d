"""The agent as a DaemonSet of a real cluster: whatever binds in a pod comes out of Kafka with the names of its pod."""

from __future__ import annotations

import itertools
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from tests import commands
from tests.broker import free_ports
from tests.cluster import deployed, host, images, pods
from tests.cluster.cases.conftest import Deployed
from tests.cluster.servers import NODE, Cluster

# Fixtures count: the first one starts a cluster and loads an image.
pytestmark = pytest.mark.timeout(300)

Event = dict[str, Any]

_numbers = itertools.count(6100)


class Bound(NamedTuple):
    """Who bound a port: the names of its pod, what the API server says the container's id is, and its labels.

    ``brief`` is one that may have gone before anybody could say its name.
    """

    port: int
    namespace: str
    pod: str
    container: str
    container_id: str
    labels: dict[str, str]
    brief: bool = False


@contextmanager
def applied(cluster: Cluster, *manifests: pods.Manifest) -> Iterator[None]:
    """These objects, until the block ends."""
    text = json.dumps({"apiVersion": "v1", "kind": "List", "items": list(manifests)})
    cluster.api.kubectl("apply", "-f", "-", given=text)
    try:
        yield
    finally:
        cluster.api.kubectl("delete", "--ignore-not-found", "--now", "-f", "-", given=text)


def status_of(cluster: Cluster, pod: str, container: str, namespace: str = "default") -> Event:
    """How the API server describes a container, with an id as soon as that is known."""
    found: list[Event] = []

    def known() -> bool:
        path = f"/api/v1/namespaces/{namespace}/pods/{pod}"
        status = cluster.api.read(path)["status"] if cluster.api.knows(path) else {}
        kinds = ("containerStatuses", "initContainerStatuses", "ephemeralContainerStatuses")
        found[:] = [one for kind in kinds for one in status.get(kind, ()) if one["name"] == container]
        return bool(found and found[0].get("containerID"))

    commands.until(known, 60)
    return found[0]


def id_of(status: Event) -> str:
    """The 64 digits of a container's id."""
    return str(status["containerID"]).rpartition("/")[2]


def bound(
    cluster: Cluster,
    pod: str,
    container: str,
    port: int,
    *,
    namespace: str = "default",
    labels: dict[str, str] | None = None,
    brief: bool = False,
) -> Bound:
    """What an event has to say, with the id that the API server knows."""
    found = id_of(status_of(cluster, pod, container, namespace))
    return Bound(port, namespace, pod, container, found, labels or {}, brief)


def replayed(agent: Deployed, *arguments: object) -> list[Event]:
    """What is in the topic now, as ``bindsnoop-replay`` shows it."""
    said = commands.replay(
        "--topic", agent.topic, "--bootstrap-servers", agent.bootstrap, "-o", "json-full", "-i=false", *arguments
    )
    assert said.code in {0, 1}, said.err
    return [json.loads(line) for line in said.out.splitlines()]


def events_of(agent: Deployed, ports: list[int], *arguments: object) -> list[Event]:
    """The binds of these ports, waited for until there is one of each."""
    found: list[Event] = []

    def all_there() -> bool:
        chosen = replayed(agent, "-P", ",".join(map(str, ports)), *arguments)
        found[:] = [event for event in chosen if event["kind"] == "bind"]
        return {event["port"] for event in found} == set(ports)

    commands.until(all_there, 60)
    return found


Port = Callable[[], int]
"""Gives a number that no other container binds."""

Case = Callable[[Cluster, Port], Iterator[list[Bound]]]
"""Runs pods, says who has bound, and removes the pods."""


def plain(cluster: Cluster, port: Port) -> Iterator[list[Bound]]:
    """A pod with one container."""
    labels = {"app": "web", "example.org/team": "blue"}
    with applied(cluster, pods.pod("plain", pods.container("web", pods.listens(first := port())), labels=labels)):
        yield [bound(cluster, "plain", "web", first, labels=labels)]


def two_containers(cluster: Cluster, port: Port) -> Iterator[list[Bound]]:
    """Two containers share the pod's network and nothing else."""
    left, right = port(), port()
    both = (pods.container("left", pods.listens(left)), pods.container("right", pods.listens(right)))
    with applied(cluster, pods.pod("two", *both)):
        yield [bound(cluster, "two", "left", left), bound(cluster, "two", "right", right)]


def init_and_sidecar(cluster: Cluster, port: Port) -> Iterator[list[Bound]]:
    """One container that ends before the others begin, one that stays beside them, and one of those."""
    prepares, serves, works = port(), port(), port()
    sidecar = {**pods.container("mesh", pods.listens(serves)), "restartPolicy": "Always"}
    init = (pods.container("prepare", pods.passes(prepares)), sidecar)
    with applied(cluster, pods.pod("started", pods.container("app", pods.listens(works)), init=init)):
        yield [
            bound(cluster, "started", "prepare", prepares, brief=True),
            bound(cluster, "started", "mesh", serves),
            bound(cluster, "started", "app", works),
        ]


def host_network(cluster: Cluster, port: Port) -> Iterator[list[Bound]]:
    """A pod in the host's network is still a pod."""
    port()
    (free,) = free_ports(1)
    with applied(cluster, pods.pod("hosted", pods.container("proxy", pods.listens(free)), hostNetwork=True)):
        yield [bound(cluster, "hosted", "proxy", free)]


def static_pod(cluster: Cluster, port: Port) -> Iterator[list[Bound]]:
    """A pod that the kubelet has from a file: its control group is named by a hash that is not its uid."""
    place = cluster.manifests / "fixed.json"
    temporary = place.with_name(".fixed")
    temporary.write_text(json.dumps(pods.pod("fixed", pods.container("etc", pods.listens(first := port())))))
    temporary.rename(place)
    try:
        name = f"fixed-{NODE}"
        yield [bound(cluster, name, "etc", first)]
    finally:
        place.unlink()


def brief(cluster: Cluster, port: Port) -> Iterator[list[Bound]]:
    """A container that binds and ends at once."""
    with applied(cluster, pods.pod("brief", pods.container("once", pods.passes(first := port())))):
        yield [bound(cluster, "brief", "once", first, brief=True)]


def other_namespace(cluster: Cluster, port: Port) -> Iterator[list[Bound]]:
    """The same names in another namespace."""
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop"}}
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "own", "namespace": "shop"}}
    web = pods.container("web", pods.listens(first := port()))
    with applied(cluster, namespace, account, pods.pod("plain", web, namespace="shop", serviceAccountName="own")):
        yield [bound(cluster, "plain", "web", first, namespace="shop")]


def created_again(cluster: Cluster, port: Port) -> Iterator[list[Bound]]:
    """A pod that is deleted, and another one under its name: each event has the labels of its own."""
    found = []
    for life in ("first", "second"):
        labels = {"life": life}
        again = pods.pod("again", pods.container("app", pods.listens(number := port())), labels=labels)
        with applied(cluster, again):
            found.append(bound(cluster, "again", "app", number, labels=labels))
            cluster.ready("again")
    yield found


def restarted(cluster: Cluster, port: Port) -> Iterator[list[Bound]]:
    """A container that fails and is started again has another id under its name."""
    before, after = port(), port()
    line = f"if mkdir /kept/once; then {pods.passes(before)}; exit 1; fi; {pods.listens(after)}"
    mounts = {"volumeMounts": [{"name": "kept", "mountPath": "/kept"}]}
    app = {**pods.container("app", line), **mounts}
    with applied(cluster, pods.pod("twice", app, restart="OnFailure", volumes=[{"name": "kept", "emptyDir": {}}])):
        commands.until(lambda: status_of(cluster, "twice", "app")["restartCount"] == 1, 60)
        status: Event = {}

        def runs() -> bool:
            status.update(status_of(cluster, "twice", "app"))
            return "running" in status["state"] and "terminated" in status["lastState"]

        commands.until(runs, 60)
        yield [
            Bound(before, "default", "twice", "app", id_of(status["lastState"]["terminated"]), {}, brief=True),
            Bound(after, "default", "twice", "app", id_of(status), {}),
        ]


def ephemeral(cluster: Cluster, port: Port) -> Iterator[list[Bound]]:
    """A container that somebody adds to a running pod to look into it."""
    with applied(cluster, pods.pod("watched", pods.container("app", "exec sleep inf"))):
        cluster.ready("watched")
        line = ["--", "sh", "-c", pods.listens(first := port())]
        options = ["--container=look", "--profile=general", "--image-pull-policy=Never", f"--image={images.BUSYBOX}"]
        cluster.api.kubectl("debug", "watched", *options, *line)
        yield [bound(cluster, "watched", "look", first)]


CASES: list[Case] = [
    plain, two_containers, init_and_sidecar, host_network, static_pod, brief, other_namespace, created_again, restarted,
    ephemeral,
]  # fmt: skip


@dataclass(frozen=True)
class Seen:
    """What came of every case, by its name: who has bound, or why the case broke; and all events, by port."""

    bound: dict[str, list[Bound] | BaseException]
    resolved: dict[int, Event]
    at_once: dict[int, Event]


@pytest.fixture(scope="module")
def seen(cluster: Cluster, agent: Deployed) -> Seen:
    """All cases side by side, and the topic read with ``--resolve`` and without, when their pods have gone."""

    def happened(case: Case) -> list[Bound]:
        with contextmanager(case)(cluster, lambda: next(_numbers)) as bound:
            return bound

    with ThreadPoolExecutor(len(CASES)) as threads:
        futures = {case.__name__: threads.submit(happened, case) for case in CASES}
    bound = {name: future.exception() or future.result() for name, future in futures.items()}
    ports = [one.port for found in bound.values() if isinstance(found, list) for one in found]
    resolved, at_once = (
        {event["port"]: event for event in events_of(agent, ports, *options)} for options in (["--resolve"], [])
    )
    return Seen(bound, resolved, at_once)


@pytest.mark.parametrize("case", [case.__name__ for case in CASES])
def test_a_bind_in_a_pod_has_the_names_of_the_pod(seen: Seen, case: str) -> None:
    """Node, namespace, pod, container, image and labels, joined by the id; without ``--resolve`` too, unless the
    container had gone before the API server knew it.
    """
    bound = seen.bound[case]
    if isinstance(bound, BaseException):
        raise bound

    def names(event: Event) -> tuple[Any, ...]:
        fields = ("node", "namespace", "pod", "container", "container_id", "image", "labels")
        return tuple(event.get(field) for field in fields)

    expected = {
        one.port: (NODE, one.namespace, one.pod, one.container, one.container_id, images.BUSYBOX, one.labels)
        for one in bound
    }
    lasting = [one.port for one in bound if not one.brief]
    assert expected == {port: names(seen.resolved[port]) for port in expected}
    assert {port: expected[port] for port in lasting} == {port: names(seen.at_once[port]) for port in lasting}


HEADER_001 = (
    "K8S.NODE         K8S.NAMESPACE    K8S.PODNAME      K8S.CONTAINERNAME PID    COMM             "
    "PROTO  ADDR             PORT   OPTS   IF"
)
ROW_001 = (
    "minikube         default          test-pod         test-pod          58208  nc               "
    "TCP    ::               4242   .R...  0"
)
HEADER_000 = (
    "NODE             NAMESPACE        POD              CONTAINER        PID    COMM             "
    "PROTO  ADDR             PORT   OPTS   IF"
)
ROW_000 = (
    "minikube         default          test-pod         test-pod         58208  nc               "
    "TCP    ::               4242   .R...  0"
)


def test_the_documented_session_shows_the_documented_rows(cluster: Cluster, agent: Deployed, tmp_path: Path) -> None:
    """``kubectl run``, ``--follow -n default``, ``kubectl exec … nc``: the header and the row, but for the PID."""
    layouts = {"trace-bind": (HEADER_001, ROW_001), "bindsnoop": (HEADER_000, ROW_000)}
    run = ["run", "test-pod", "--image", "busybox:latest", "--image-pull-policy=Never", "--", "sleep", "inf"]
    cluster.api.kubectl(*run)
    outputs = {layout: tmp_path / layout for layout in layouts}
    followers = []
    try:
        cluster.ready("test-pod")
        for layout, output in outputs.items():
            options = ["--topic", agent.topic, "--bootstrap-servers", agent.bootstrap, "--follow", "-n", "default"]
            with output.open("wb") as shown:
                followers.append(
                    subprocess.Popen(
                        [commands.BIN / "bindsnoop-replay", *options, "--layout", layout, "--podname", "test-pod"],
                        stdout=shown, stderr=subprocess.DEVNULL, env=commands.environment(),
                    )
                )  # fmt: skip
        execute = cluster.api.command("exec", "test-pod", "--", "nc", "-l", "-p", "4242", "-w", "1")
        ended = subprocess.run(execute, capture_output=True, text=True, check=False)
        commands.until(lambda: all(len(one.read_text().splitlines()) == 2 for one in outputs.values()), 30)
    finally:
        for follower in followers:
            follower.terminate()
            follower.wait(20)
        cluster.api.kubectl("delete", "pod", "test-pod", "--now")

    assert "command terminated with exit code 1" in ended.stderr
    (pid,) = {event["pid"] for event in events_of(agent, [4242])}
    expected = {layout: [header, row.replace("58208 ", f"{pid:<6}")] for layout, (header, row) in layouts.items()}
    assert expected == {layout: output.read_text().splitlines() for layout, output in outputs.items()}


# --- what the manifests say ---------------------------------------------------------------------------------------


def test_the_manifests_are_as_closed_as_they_say(cluster: Cluster) -> None:
    """As they are published: no namespace of the host, nothing privileged; what can be written is known."""
    objects = list(yaml.safe_load_all(cluster.api.kubectl("kustomize", str(deployed.MANIFESTS))))
    (pod,) = (one["spec"]["template"]["spec"] for one in objects if one["kind"] == "DaemonSet")
    (container,) = pod["containers"]

    assert set() == {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
    assert "bindsnoop-agent:local" == container["image"]
    assert {
        "runAsUser": 0,
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"], "add": ["BPF", "PERFMON", "NET_ADMIN"]},
    } == container["securityContext"]
    assert {"type": "RuntimeDefault"} == pod["securityContext"]["seccompProfile"]
    writable = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert {"run": "/run", "spool": "/var/lib/bindsnoop", "bpf": "/sys/fs/bpf"} == writable
    assert "Memory" == volumes["run"]["emptyDir"]["medium"]
    assert {"path": "/var/lib/bindsnoop", "type": "DirectoryOrCreate"} == volumes["spool"]["hostPath"]
    assert {"path": "/sys/fs/bpf", "type": "Directory"} == volumes["bpf"]["hostPath"]


def test_the_api_server_takes_the_manifests_as_they_are(cluster: Cluster) -> None:
    """No field is unknown, none has the wrong type."""
    text = cluster.api.kubectl("kustomize", str(deployed.MANIFESTS))
    # Asked without effect, the namespace is not there for what lies in it.
    cluster.api.kubectl("create", "namespace", "dry")
    text = text.replace("namespace: bindsnoop\n", "namespace: dry\n")

    said = cluster.api.kubectl("apply", "--dry-run=server", "--validate=strict", "-f", "-", given=text)
    cluster.api.kubectl("delete", "namespace", "dry", "--wait=false")

    assert 5 == len([line for line in said.splitlines() if line.endswith("(server dry run)")])


# --- what the agent may do ----------------------------------------------------------------------------------------


def test_the_agent_may_list_and_watch_pods_and_nothing_else(cluster: Cluster, agent: Deployed) -> None:
    """What ``kubectl auth can-i --list`` says of the agent's account is what it says of an account without a role, and
    pods.
    """
    del agent

    def rights(account: str) -> set[str]:
        said = cluster.api.kubectl("auth", "can-i", "--list", f"--as=system:serviceaccount:{account}")
        return {" ".join(line.split()) for line in said.splitlines()[1:]}

    assert {"pods [] [] [list watch]"} == rights(f"{deployed.NAMESPACE}:bindsnoop-agent") - rights("default:default")


def test_the_agent_has_three_capabilities_and_cannot_get_more(cluster: Cluster, agent: Deployed) -> None:
    """The running process, as the kernel sees it: BPF, PERFMON and NET_ADMIN, no new privileges, filtered calls."""
    found = id_of(status_of(cluster, agent.pod, "agent", deployed.NAMESPACE))
    groups = (place for root in host.hierarchies() for place in root.rglob(found))
    pid = next(group / "cgroup.procs" for group in groups).read_text().split()[0]

    lines = Path("/proc", pid, "status").read_text(encoding="utf-8").splitlines()
    status = {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
    net_admin, perfmon, bpf = 12, 38, 39
    expected = f"{1 << net_admin | 1 << perfmon | 1 << bpf:016x}"
    assert (expected, expected, "1", "2") == tuple(
        status[name] for name in ("CapEff", "CapBnd", "NoNewPrivs", "Seccomp")
    )


def test_the_agent_ends_in_time_and_comes_back(cluster: Cluster, agent: Deployed) -> None:
    """A deleted pod of the DaemonSet says goodbye to the stream within its time, and the next one traces again."""
    before = cluster.api.get("pod", agent.pod, "-n", deployed.NAMESPACE)["metadata"]["uid"]
    begin = time.monotonic()

    cluster.api.kubectl("delete", "pod", agent.pod, "-n", deployed.NAMESPACE)
    seconds = time.monotonic() - begin
    wait = ["rollout", "status", "daemonset/bindsnoop-agent", "-n", deployed.NAMESPACE, "--timeout=60s"]
    cluster.api.kubectl(*wait, timeout=70)
    (pod,) = cluster.api.get("pods", "-n", deployed.NAMESPACE)["items"]

    kinds = [event["kind"] for event in replayed(agent, "--info")]
    assert seconds < 30
    assert before != pod["metadata"]["uid"]
    commands.until(lambda: [e["kind"] for e in replayed(agent, "--info")].count("start") == 2, 30)
    assert "stop" in kinds
