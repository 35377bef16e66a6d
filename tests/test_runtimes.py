"""Real containers of a real docker and podman: each bind in one has the names that these gave it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import host, images
from tests.cluster.build import debian
from tests.cluster.images import Docker
from tests.commands import BIN, agent_running, environment, replay, until
from tests.kernel.guests import needs

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="tracing and containers need root"),
    # The first run fetches docker and what it needs (140 MB).
    pytest.mark.timeout(600),
]

BUSYBOX = "busybox"


@pytest.fixture(scope="module")
def docker() -> Iterator[Docker]:
    """A daemon that has the image busybox."""
    with images.dockerd() as made:
        made("load", "--quiet", "--input", str(images.busybox()))
        yield made


def run(docker: Docker, name: str, script: str, *options: str) -> str:
    """Run a shell in a container to its end; the container's id."""
    docker("run", "--name", name, "--network=host", *options, BUSYBOX, "sh", "-c", script)
    found = docker("inspect", "--format={{.Id}}", name).strip()
    docker("rm", name)
    return found


def listens(port: int) -> str:
    """Bind a port and end soon after."""
    return f"nc -l -p {port} -w 1; true"


def events(files: Path, ports: range) -> dict[int, dict[str, Any]]:
    """What an archive holds of binds to these ports, by port."""
    done = replay("--files", files, "-P", f"{ports.start}-{ports.stop - 1}", "-o", "json-full")
    return {row["port"]: row for row in map(json.loads, done.out.splitlines())}


def test_the_documented_example(docker: Docker) -> None:
    """``bindsnoop -c test-trace-bind`` prints the row of the document for the container of the document."""
    seed = "test-trace-bind   380299  nc               TCP    ::               4242    .R...   0"
    command = [BIN / "bindsnoop", "-c", "test-trace-bind", "--docker-socket", docker.socket]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    ) as live:
        assert live.stdout
        header = live.stdout.readline()
        run(docker, "another", listens(4243))
        run(docker, "test-trace-bind", listens(4242))
        row = live.stdout.readline()
        live.send_signal(signal.SIGINT)
        rest, talk = live.communicate(timeout=20)

    assert header == "K8S.CONTAINERNAME PID     COMM             PROTO  ADDR             PORT    OPTS    IF\n"
    assert re.sub(r"(?<=^.{18})\d+ *", "380299  ", row) == f"{seed}\n"
    assert (rest, talk) == ("", "")


def test_every_container_has_its_own_names(docker: Docker, tmp_path: Path) -> None:
    """One that ran before the agent, brief ones, one name used twice, a renamed one, labels and hostile text."""
    ports = range(24310, 24320)
    docker("run", "--detach", "--name=early", "--network=host", BUSYBOX, "sleep", "60")
    try:
        with agent_running("--files", str(tmp_path), "--docker-socket", str(docker.socket)):
            docker("exec", "early", "sh", "-c", listens(24310))
            docker("rename", "early", "renamed")
            docker("exec", "renamed", "sh", "-c", listens(24311))
            ids = [run(docker, "same", listens(port)) for port in (24312, 24313)]
            run(docker, "labelled", listens(24314), "--label", "app=web", "--label", "text=\x1b[31mred\n")
            until(lambda: len(events(tmp_path, ports)) == 5)
        found = events(tmp_path, ports)
    finally:
        docker("rm", "--force", "renamed")

    assert {24310: "early", 24311: "renamed", 24312: "same", 24313: "same", 24314: "labelled"} == {
        port: row["container"] for port, row in found.items()
    }
    assert ids == [found[24312]["container_id"], found[24313]["container_id"]]
    assert found[24310]["container_id"] == found[24311]["container_id"] not in ids
    assert {"app": "web", "text": "\\x1b[31mred\\x0a"} == found[24314]["labels"]
    assert {BUSYBOX} == {row["image"] for row in found.values()}


# --- podman -------------------------------------------------------------------------------------------------------

PODMAN_GROUP = "libpod_parent"

_CONTAINERS_CONF = """\
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]
netns = "host"
log_driver = "k8s-file"
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
"""


class Podman:
    """podman with storage of its own, as on a host where nobody has started its service."""

    def __init__(self, folder: Path) -> None:
        needs("podman", "podman")
        self.storage = folder / "storage"
        conf = folder / "containers.conf"
        conf.write_text(_CONTAINERS_CONF, encoding="utf-8")
        path = f"{debian() / 'usr/sbin'}:{debian() / 'usr/bin'}:{os.environ['PATH']}"
        self.environment = {**environment(), "CONTAINERS_CONF": str(conf), "PATH": path}
        self.command = ["podman", f"--root={self.storage}", f"--runroot={folder / 'run'}", "--storage-driver=vfs"]

    def __call__(self, *words: str) -> str:
        """What it prints."""
        done = subprocess.run(
            [*self.command, *words], capture_output=True, text=True, env=self.environment, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def run(self, name: str, script: str) -> None:
        """Run a shell in a container to its end."""
        options = ["--network=host", "--security-opt=seccomp=unconfined"]
        self("run", "--rm", f"--name={name}", *options, f"docker.io/library/{BUSYBOX}", "sh", "-c", script)


@pytest.fixture
def podman() -> Iterator[Podman]:
    """podman that has the image busybox; its control groups are removed afterwards."""
    # It takes no longer path for what it keeps while containers run.
    with tempfile.TemporaryDirectory(prefix="podman-", ignore_cleanup_errors=True) as folder:
        made = Podman(Path(folder))
        made("load", "--quiet", "--input", str(images.busybox()))
        yield made
        made("rm", "--all", "--force")
    for hierarchy in host.hierarchies():
        for folder, _, _ in os.walk(hierarchy / PODMAN_GROUP, topdown=False):
            Path(folder).rmdir()


def test_podman_without_its_service(podman: Podman, tmp_path: Path) -> None:
    """Its files are enough: a brief container's bind has the name, and so has the same name's next container."""
    ports = range(24320, 24330)
    files = tmp_path / "files"
    with agent_running("--files", str(files), "--workloads", "podman", "--podman-storage", str(podman.storage)):
        podman.run("web", listens(24320))
        podman.run("web", listens(24321))
        until(lambda: len(events(files, ports)) == 2)
    found = events(files, ports)

    assert ["web", "web"] == [row["container"] for row in found.values()]
    assert {f"docker.io/library/{BUSYBOX}:latest"} == {row["image"] for row in found.values()}
    assert len({row["container_id"] for row in found.values()}) == 2


def test_podman_with_its_service(podman: Podman, tmp_path: Path) -> None:
    """It speaks the Docker Engine API: containers of before and after are known, by their labels too."""
    ports = range(24330, 24340)
    files, sock = tmp_path / "files", tmp_path / "podman.sock"
    image = f"docker.io/library/{BUSYBOX}"
    podman("create", "--name=early", "--network=host", "--label=app=web", image, "sh", "-c", listens(24330))
    service = [*podman.command, "system", "service", "--time=0", f"unix://{sock}"]
    with subprocess.Popen(service, env=podman.environment, stderr=subprocess.DEVNULL) as serving:
        try:
            until(sock.exists)
            with agent_running("--files", str(files), "--workloads", "docker", "--docker-socket", str(sock)):
                podman("start", "--attach", "early")
                podman.run("late", listens(24331))
                until(lambda: len(events(files, ports)) == 2)
            found = events(files, ports)
        finally:
            serving.terminate()

    assert {24330: "early", 24331: "late"} == {port: row["container"] for port, row in found.items()}
    assert found[24330]["labels"] == {"app": "web"}
