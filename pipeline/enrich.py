"""Who is behind a cgroup: in goes a batch from ``records``, out comes one that names the container.

In: a batch with the columns ``cgroup`` and ``cgroup_parent``, names as the kernel copied them into the record. Out: the
same batch without these two, with ``container_id`` instead. The kernel's own copy is used because a process, its
``/proc`` entry and its cgroup may all be gone when the record is read.
"""

from __future__ import annotations

import re

import pyarrow as pa
import pyarrow.compute as pc

# Docker, podman, containerd and CRI-O all put the 64 hexadecimal digits of the container's id into the cgroup's name:
# alone, or as <runtime>-<id>.scope. A container may make cgroups of its own below, so the parent counts too.
_ID = re.compile(r"(?:^|[-:])([0-9a-f]{64})(?:\.scope)?$")


def container_id(name: str | None) -> str | None:
    """``docker-<64 hex>.scope`` → the 64 hexadecimal digits; None when the cgroup is not a container's."""
    found = _ID.search(name) if name else None
    return found.group(1) if found else None


def enrich(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Replace ``cgroup`` and ``cgroup_parent`` by ``container_id`` (string, null for a process of the host)."""
    ids = pc.coalesce(_ids(batch.column("cgroup")), _ids(batch.column("cgroup_parent")))
    return batch.drop_columns(["cgroup", "cgroup_parent"]).append_column("container_id", ids)


def _ids(names: pa.Array) -> pa.Array:
    # A node has a few hundred cgroups and millions of binds: each name is looked at once.
    distinct = names.dictionary_encode()
    return pa.array([container_id(name) for name in distinct.dictionary.to_pylist()], pa.string()).take(
        distinct.indices
    )
