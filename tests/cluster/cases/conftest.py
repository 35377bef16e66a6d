"""The cluster, the API server alone, and the agent in the cluster, each started once for the module that asks."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from tests.broker import Kafka
from tests.cluster import deployed, images, servers


@pytest.fixture(scope="module")
def cluster() -> Iterator[servers.Cluster]:
    """A whole Kubernetes of one node. It ends with the module, for there is one at a time on a host."""
    with servers.cluster() as whole:
        yield whole


@pytest.fixture(scope="module")
def api() -> Iterator[servers.ApiServer]:
    """An API server without a node, which tests may stop and start."""
    with servers.api_server() as server:
        yield server


@dataclass(frozen=True)
class Deployed:
    """The agent as a DaemonSet: the name of its pod, and where it publishes."""

    pod: str
    topic: str
    bootstrap: str


@pytest.fixture(scope="module")
def image(cluster: servers.Cluster) -> Iterator[Future[None]]:
    """The image of this checkout, on its way to the node: half a minute in which others can start."""
    with ThreadPoolExecutor(1) as thread:
        yield thread.submit(lambda: cluster.load(images.agent()))


@pytest.fixture(scope="module")
def agent(cluster: servers.Cluster, image: Future[None], kafka: Kafka) -> Iterator[Deployed]:
    """The manifests of ``deploy/kubernetes`` with the image of this checkout, publishing to a real Kafka."""
    image.result()
    with deployed.agent(cluster, kafka, "binds") as pod:
        yield Deployed(pod, "binds", kafka.bootstrap)
