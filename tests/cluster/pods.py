"""Pods for tests: what a pod does goes in, its manifest comes out. All of them are busybox, which is on the node."""

from __future__ import annotations

from typing import Any

from tests.cluster import images

Manifest = dict[str, Any]


def container(name: str, command: str) -> Manifest:
    """A container that runs a line of shell."""
    return {"name": name, "image": images.BUSYBOX, "imagePullPolicy": "Never", "command": ["sh", "-c", command]}


def pod(
    name: str,
    *containers: Manifest,
    init: tuple[Manifest, ...] = (),
    namespace: str = "default",
    labels: dict[str, str] | None = None,
    restart: str = "Never",
    **spec: Any,
) -> Manifest:
    """A pod of these containers; ``spec`` is laid over the rest of it."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "labels": labels or {}},
        "spec": {
            "containers": list(containers),
            "initContainers": list(init),
            "restartPolicy": restart,
            # Nobody has said goodbye to these shells, and nothing is lost with them.
            "terminationGracePeriodSeconds": 0,
            **spec,
        },
    }


def listens(port: int) -> str:
    """A line of shell that binds a port once, keeps it, and stays."""
    return f"exec nc -l -p {port} </dev/null"


def passes(port: int) -> str:
    """A line of shell that binds a port, takes one connection at once, and ends: some 10 ms after it began."""
    return f"nc -l -p {port} </dev/null & until nc 127.0.0.1 {port} </dev/null 2>/dev/null; do :; done; wait"
