"""Real containers of a real docker: each bind in one has the names that docker gave it, as the documents show it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import images
from tests.cluster.images import Docker
from tests.commands import BIN, agent_running, environment, replay, until

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
