"""The edge to whoever started the containers of this node: names by container id.

``Directory`` is what the agent asks. Sources fill it from threads of their own: ``kubernetes`` watches this node's
pods, ``docker`` the Docker Engine API (docker and podman speak it), ``podman`` reads podman's own files. A source that
is away is said once and tried again; nobody waits for it, and binds are recorded with the raw id meanwhile.

The id alone joins a name to an event. Names come and go and are used again, ids are 256 random bits: what is not known
stays unknown, and nothing is ever given the name of something else.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from pipeline.event import Workload

GONE_SECS = 900.0
"""How long the name of a container that has gone is kept, for events that come late."""

GONE_MAX = 10_000
"""How many of those at most; the one that went first is forgotten first."""

Say = Callable[[str, str], None]
"""Takes a level (``info``, ``warn``) and a sentence for the operator."""


class Source(Protocol):
    """Something that fills a ``Directory`` from a thread of its own, from its making until ``close``.

    ``name`` is a word for the log, such as ``kubernetes``. Making one never waits for the other side and never raises
    because that is away.
    """

    name: str

    def close(self) -> None:
        """Stop, within two seconds."""


def open_sources(
    chosen: Sequence[str],
    directory: Directory,
    *,
    node: str,
    kubeconfig: Path | None,
    docker_sockets: Sequence[Path],
    podman_storage: Path,
    say: Say,
) -> list[Source]:
    """Start the sources that are chosen: ``none``, names of sources, or ``auto``.

    ``auto`` is Kubernetes in a pod with a service account, and wherever a kubeconfig is given; elsewhere docker and
    podman, as far as their socket or storage is there now. Podman's files are read only where its service has no
    socket. UsageError when one of them cannot be asked at all.
    """
    from pipeline.workloads import kubernetes

    wanted = set(chosen)
    if "auto" in wanted:
        if kubeconfig is not None or kubernetes.in_cluster():
            wanted = {"kubernetes"}
        else:
            docker_sockets = [path for path in docker_sockets if path.exists()]
            served = any("podman" in path.name for path in docker_sockets)
            wanted = {"docker", "podman"} if podman_storage.is_dir() and not served else {"docker"}
    sources: list[Source] = []
    if "kubernetes" in wanted:
        sources.append(kubernetes.Kubernetes(directory, node, kubeconfig=kubeconfig, say=say))
    if "docker" in wanted:
        from pipeline.workloads import docker

        sources += [docker.Docker(directory, path, say=say, name=f"docker {path}") for path in docker_sockets]
    if "podman" in wanted:
        from pipeline.workloads import podman

        sources.append(podman.Podman(directory, podman_storage, say=say))
    return sources


class Directory:
    """Names of containers by id, from any number of sources; every method may be called from any thread.

    Memory is that of the containers that live now, and of at most ``gone_max`` that have gone within ``gone_secs``.
    """

    def __init__(
        self,
        *,
        gone_secs: float = GONE_SECS,
        gone_max: int = GONE_MAX,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._gone_secs, self._gone_max, self._monotonic = gone_secs, gone_max, monotonic
        self._lock = threading.Lock()
        self._alive: dict[str, dict[str, Workload]] = {}
        self._gone: OrderedDict[str, tuple[Workload, float]] = OrderedDict()
        self.changes = 0

    def put(self, source: str, container_id: str, workload: Workload) -> None:
        """The container lives, and these are its names."""
        with self._lock:
            self._put(source, container_id, workload)
            self._forget()

    def remove(self, source: str, container_id: str) -> None:
        """The container has gone. Its names are kept for a while."""
        with self._lock:
            self._remove(source, container_id)
            self._forget()

    def replace(self, source: str, alive: Mapping[str, Workload]) -> None:
        """These are all containers that live, as far as this source knows."""
        with self._lock:
            for container_id, workload in alive.items():
                self._put(source, container_id, workload)
            for container_id in self._alive.get(source, {}).keys() - alive.keys():
                self._remove(source, container_id)
            self._forget()

    def get(self, container_id: str) -> Workload | None:
        """Names of a container that lives or has gone a short while ago; None when nobody knows it.

        Where two sources know it, the one that knows its pod is right: the other sees the same container from below.
        """
        # Asked for every container of every batch: plain steps, and no clock but for what has gone.
        with self._lock:
            found: Workload | None = None
            for known in self._alive.values():
                workload = known.get(container_id)
                if workload is not None and (found is None or found.pod is None):
                    found = workload
            if (found is None or found.pod is None) and container_id in self._gone:
                workload, since = self._gone[container_id]
                kept = since >= self._monotonic() - self._gone_secs
                if kept and (found is None or workload.pod is not None):
                    found = workload
            return found

    def __len__(self) -> int:
        """How many ids are known, those that have gone too."""
        with self._lock:
            self._forget()
            return len(self._gone.keys() | {known for source in self._alive.values() for known in source})

    def _put(self, source: str, container_id: str, workload: Workload) -> None:
        known = self._alive.setdefault(source, {})
        if known.get(container_id) != workload:
            known[container_id] = workload
            self.changes += 1

    def _remove(self, source: str, container_id: str) -> None:
        workload = self._alive.get(source, {}).pop(container_id, None)
        if workload is None:
            return
        before = self._gone.pop(container_id, (None, 0.0))[0]
        if before is not None and before.pod is not None and workload.pod is None:
            workload = before
        self._gone[container_id] = (workload, self._monotonic())

    def _forget(self) -> None:
        oldest = self._monotonic() - self._gone_secs
        while self._gone:
            container_id, (_, since) = next(iter(self._gone.items()))
            if since >= oldest and len(self._gone) <= self._gone_max:
                return
            del self._gone[container_id]
