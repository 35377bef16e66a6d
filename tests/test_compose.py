"""docker-compose.yml: compose accepts it, it is as closed as it says, and its Kafka settings run a Kafka."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pipeline import topic as edge
from tests import broker
from tests.broker import servers

ROOT = Path(__file__).parent.parent

_LOGGING = """Configuration:
  Appenders: {Console: {name: out, PatternLayout: {pattern: "%m%n"}}}
  Loggers:
    Root: {level: INFO, AppenderRef: [{ref: out}]}
    Logger: [{name: kafka, level: INFO}]
"""


@pytest.fixture(scope="module")
def composed() -> dict[str, Any]:
    """The file as compose reads it: merged, with every default filled in."""
    command = [*broker.compose(), "-f", str(ROOT / "docker-compose.yml"), "config", "--format=json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    config: dict[str, Any] = json.loads(done.stdout)
    return config


def test_compose_accepts_it(composed: dict[str, Any]) -> None:
    """Every part of the line is a service, and what it is built from is there."""
    assert set(composed["services"]) == {"kafka", "topic", "registry", "agent"}
    build = composed["services"]["agent"]["build"]
    assert (Path(build["context"]) / build["dockerfile"]).is_file()


def test_ports_are_open_on_this_machine_only(composed: dict[str, Any]) -> None:
    """Neither Kafka nor the registry asks for a password here, so neither is for others."""
    ports = [port for service in composed["services"].values() for port in service.get("ports", [])]

    assert len(ports) == 2
    assert {"127.0.0.1"} == {port["host_ip"] for port in ports}


def test_images_are_pinned(composed: dict[str, Any]) -> None:
    """A version, not whatever is newest; and Kafka's is the one that the tests run."""
    images = {name: service["image"] for name, service in composed["services"].items()}

    assert all(re.search(r":[\w.]+$", image) and not image.endswith(":latest") for image in images.values())
    assert images["kafka"] == images["topic"] == f"apache/kafka:{servers.PROGRAMS['kafka'].version}"
    assert images["registry"] == f"apicurio/apicurio-registry:{servers.PROGRAMS['registry'].version}"


def test_agent_has_the_least_rights(composed: dict[str, Any]) -> None:
    """Three capabilities, never privileged, never SYS_ADMIN; only the spool and the bpffs can be written."""
    agent = composed["services"]["agent"]

    assert agent["cap_drop"] == ["ALL"]
    assert set(agent["cap_add"]) == {"BPF", "PERFMON", "NET_ADMIN"}
    assert not agent.get("privileged", False)
    assert agent["read_only"]
    writable = [volume for volume in agent["volumes"] if not volume.get("read_only")]
    assert {("volume", "/var/lib/bindsnoop"), ("bind", "/sys/fs/bpf")} == {
        (volume["type"], volume["target"]) for volume in writable
    }
    assert {"/sys/kernel/tracing", "/sys/fs/cgroup"} <= {volume["target"] for volume in agent["volumes"]}


def test_dockerfile_and_what_it_is_given_fit_together() -> None:
    """Whatever the Dockerfile copies by name is let through to it."""
    let_through = set(re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE))
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", (ROOT / "deploy/Dockerfile").read_text(), re.MULTILINE)
    names = {name for line in copied for name in line.split()} - {"."}

    assert names
    assert all(any(Path(name).match(pattern) for pattern in let_through) for name in names)
    assert all(list(ROOT.glob(name)) for name in let_through)


def _server_properties(environment: dict[str, str], folder: Path) -> dict[str, str]:
    """Server properties as the image makes them of its environment: by the same class, which is in Kafka's jars."""
    for name in ("default", "mounted", "final"):
        (folder / name).mkdir()
    (folder / "default/server.properties").touch()
    for name in ("log4j2.yaml", "tools-log4j2.yaml"):
        (folder / "default" / name).write_text(_LOGGING)
    command = ["java", "-Xmx128m", "-XX:TieredStopAtLevel=1", "-cp", f"{broker.fetched('kafka')}/*"]
    command += ["kafka.docker.KafkaDockerWrapper", "setup", "-D", "default", "-M", "mounted", "-F", "final"]
    done = subprocess.run(
        command,
        cwd=folder,
        # Only what the container would see: the wrapper takes every variable that begins with KAFKA_.
        env={**environment, "PATH": os.environ["PATH"], "KAFKA_LOG_DIRS": str(folder / "data")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (folder / "final/server.properties").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line)


def test_kafka_runs_with_these_settings(composed: dict[str, Any], tmp_path: Path) -> None:
    """The environment, turned into server properties, starts a Kafka that stores and returns events."""
    environment = composed["services"]["kafka"]["environment"]
    properties = _server_properties(environment, tmp_path)
    assert properties["controller.quorum.voters"] == "1@kafka:29093"
    assert properties["transaction.state.log.min.isr"] == "1"
    ports = dict(zip(("9092", "19092", "29093"), map(str, broker.free_ports(3)), strict=True))
    for name, value in properties.items():
        # The same listeners on free ports, and only for this machine.
        local = (
            re.sub(r"//:", "//127.0.0.1:", value).replace("kafka:", "127.0.0.1:").replace("localhost:", "127.0.0.1:")
        )
        properties[name] = re.sub(r"(?<=127\.0\.0\.1:)\d+", lambda found: ports[found[0]], local)
    values = [f"event {number}".encode() for number in range(1000)]

    with servers.kafka(properties, only=True, port=int(ports["9092"])) as node:
        client = edge.settings(node.bootstrap)
        edge.Publisher("binds", client, key="node-1", create=edge.Creation()).publish(values)
        parts = list(edge.read("binds", client))

    assert values == [value for part in parts if isinstance(part, edge.Messages) for value in part.values]
