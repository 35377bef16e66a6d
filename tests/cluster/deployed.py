"""The agent as its users deploy it: a cluster and a Kafka go in, a DaemonSet that publishes comes out."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests import commands
from tests.broker import Kafka
from tests.cluster import images
from tests.cluster.servers import Cluster

MANIFESTS = Path(__file__).parent.parent.parent / "deploy" / "kubernetes"
NAMESPACE = "bindsnoop"


@contextmanager
def agent(cluster: Cluster, kafka: Kafka, topic: str, *more: str) -> Iterator[str]:
    """The manifests, applied with what is this cluster's own, until an agent traces; deleted afterwards.

    Gives the name of the agent's pod. ``more`` are further arguments of the agent.
    """
    with tempfile.TemporaryDirectory(prefix="bindsnoop-overlay-") as temporary:
        overlay = Path(temporary) / "overlay"
        shutil.copytree(MANIFESTS, overlay / "base")
        _write_overlay(overlay, cluster, kafka, topic, more)
        cluster.api.kubectl("apply", "-k", str(overlay))
        try:
            wait = ["rollout", "status", "daemonset/bindsnoop-agent", "-n", NAMESPACE, "--timeout=60s"]
            cluster.api.kubectl(*wait, timeout=70)
            (pod,) = cluster.api.get("pods", "-n", NAMESPACE, "-l", "app.kubernetes.io/name=bindsnoop-agent")["items"]
            name = str(pod["metadata"]["name"])
            # The pod is ready when its program runs, which is a moment before that looks into the kernel.
            commands.until(lambda: "traces with" in cluster.api.kubectl("logs", name, "-n", NAMESPACE))
            yield name
        finally:
            cluster.api.kubectl("delete", "-k", str(overlay), "--wait=false")


def _write_overlay(overlay: Path, cluster: Cluster, kafka: Kafka, topic: str, more: Sequence[str]) -> None:
    """Everything that differs from one cluster to another, as kustomize wants it.

    Kafka and the API server of a test listen on 127.0.0.1 alone, which a pod reaches from the host's network; and this
    cluster has no kube-proxy, which would lead from a service's address to them.
    """
    # A bpffs of this host would keep the tracer when the cluster has gone.
    arguments = [f"--topic={topic}", f"--bootstrap-servers={kafka.bootstrap}", "--create-topic", "--pins=none", *more]
    environment = [
        {"name": "KUBERNETES_SERVICE_HOST", "value": "127.0.0.1"},
        {"name": "KUBERNETES_SERVICE_PORT", "value": str(cluster.api.port)},
    ]
    name, _, tag = images.AGENT.rpartition(":")
    container = {"name": "agent", "imagePullPolicy": "Never", "args": arguments, "env": environment}
    patch: dict[str, Any] = {
        "apiVersion": "apps/v1",
        "kind": "DaemonSet",
        "metadata": {"name": "bindsnoop-agent"},
        "spec": {"template": {"spec": {"hostNetwork": True, "containers": [container]}}},
    }
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": ["base"],
        "images": [{"name": "bindsnoop-agent", "newName": name, "newTag": tag}],
        "patches": [{"patch": json.dumps(patch)}],
    }
    (overlay / "kustomization.yaml").write_text(json.dumps(kustomization), encoding="utf-8")
