"""``make demo`` and ``make demo-kafka`` show what they say they do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.broker import Kafka, Registry

SCRIPT = Path(__file__).parent.parent / "scripts/demo.py"

EXPECTED = {
    "web-server": (18080, None),
    "tls-proxy": (18443, None),
    "resolver": (18053, None),
    "latecomer": (18080, "EADDRINUSE"),
    "intruder": (443, "EACCES"),
}


@pytest.mark.parametrize("kafka_too", [False, True], ids=["files", "kafka"])
def test_demo(kafka: Kafka, registry: Registry, kafka_too: bool) -> None:
    """Six binds are made and shown as columns, as JSON, and by port with their errors; nothing is missing."""
    servers = {"BOOTSTRAP": kafka.bootstrap, "REGISTRY": registry.url}

    done = subprocess.run(
        [sys.executable, SCRIPT, *(["--kafka"] if kafka_too else [])],
        capture_output=True, text=True, env=os.environ | servers, check=True,
    )  # fmt: skip

    lines = done.stdout.splitlines()
    events = {event["comm"]: event for event in (json.loads(line) for line in lines if line.startswith("{"))}
    shown = {name: (event["port"], event.get("error")) for name, event in events.items()}
    assert {name: shown[name] for name in EXPECTED} == EXPECTED
    assert shown["rpc-worker"][0] > 0
    assert shown["rpc-worker"][1] is None
    columns = [line for line in lines if line.startswith("demo ")]
    assert {line.split()[2] for line in columns} >= {*EXPECTED, "rpc-worker"}
    at = next(place for place, line in enumerate(lines) if line.startswith("TIME"))
    by_port = lines[at + 1 : at + 3]
    assert [line.split()[1] for line in by_port] == ["web-server", "latecomer"]
    assert by_port[1].endswith("EADDRINUSE")
    assert ["demo", "complete"] == [lines[-1].split()[0], lines[-1].split()[2]]
