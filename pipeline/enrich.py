"""Who is behind a cgroup: in goes a batch from ``records``, out comes one that names the container.

In: a batch with the columns ``cgroup`` and ``cgroup_parent``, names as the kernel copied them into the record, and
whoever knows the names of containers by their ids. Out: the same batch without these two, with ``container_id``
instead, and with the names. The kernel's own copy is used because a process, its ``/proc`` entry and its cgroup may all
be gone when the record is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import event
from pipeline.event import Workload

# Every runtime puts the 64 hexadecimal digits of the container's id at the end of its cgroup's name. Measured, or read
# in the runtime's source:
#
#   docker, cgroupfs               <id>                                below docker
#   docker, systemd                docker-<id>.scope                   below system.slice
#   podman, cgroupfs               libpod-<id>, and container in it    below libpod_parent
#   podman, systemd                libpod-<id>.scope, and container    below machine.slice
#   podman, cgroups split          libpod-payload-<id>                 below the unit's own
#   containerd, cgroupfs           <id>                                below pod<uid>, or the namespace of ctr
#   containerd, systemd            cri-containerd-<id>.scope           below kubepods-…-pod<uid>.slice
#   containerd, mixed up           kubepods-…-pod<uid>.slice:cri-containerd:<id>
#   CRI-O, cgroupfs                crio-<id>                           below pod<uid>
#   CRI-O, systemd                 crio-<id>.scope                     below kubepods-…-pod<uid>.slice
#
# The monitors of podman and CRI-O (libpod-conmon-<id>.scope, crio-conmon-<id>.scope) are processes of the host. Inside
# a container there may be more cgroups, of systemd or of containers in it: the innermost container counts.
_ID = re.compile(r"(?:^|[-:])(?<!conmon-)([0-9a-f]{64})(?:\.scope)?$")


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


# --- names --------------------------------------------------------------------------------------------------------

_TEXTS = ("namespace", "pod", "container", "image")


def name(batch: pa.RecordBatch, known: Callable[[str], Workload | None]) -> tuple[pa.RecordBatch, list[str]]:
    """Add ``namespace``, ``pod``, ``container``, ``image`` and ``labels`` of each ``container_id`` that is known.

    Also says which ids in the batch are not known: their rows keep the raw id, and no names.
    """
    distinct = batch.column("container_id").dictionary_encode()
    ids = distinct.dictionary.to_pylist()
    if not ids:
        return batch, []
    found = [known(container) for container in ids]
    for column, values in _columns(found):
        batch = batch.append_column(column, values.take(distinct.indices))
    labels = _labels([*found, None]).take(pc.fill_null(distinct.indices, len(found)))
    return batch.append_column("labels", labels), [
        container for container, workload in zip(ids, found, strict=True) if workload is None
    ]


def resolve(batch: pa.RecordBatch, known: Callable[[str, str], Workload | None]) -> pa.RecordBatch:
    """Give events that went without names those that ``known`` finds by node and container id.

    ``batch`` is one of ``event.schema()``. A row that has a container's name already is left as it is.
    """
    unnamed = pc.and_(pc.is_null(batch.column("container")), pc.is_valid(batch.column("container_id")))
    places = pc.indices_nonzero(unnamed)
    if not len(places):
        return batch
    nodes = batch.column("node").take(places).to_pylist()
    ids = batch.column("container_id").take(places).to_pylist()
    wanted = dict.fromkeys(zip(nodes, ids, strict=True))
    numbers = {key: number for number, key in enumerate(wanted)}
    found = [known(node, container) for node, container in wanted]
    if not any(found):
        return batch
    # Where each row's value lies: 0 is its own, the others are those that were found.
    which = np.full(batch.num_rows, -1, np.int64)
    which[places.to_numpy()] = [
        number if found[number] else -1 for number in (numbers[key] for key in zip(nodes, ids, strict=True))
    ]
    own = np.arange(batch.num_rows)
    taken = pa.array(np.where(which < 0, own, which + batch.num_rows))
    for column, values in (*_columns(found), ("labels", _labels(found))):
        at = batch.schema.get_field_index(column)
        field = batch.schema.field(at)
        both = pa.concat_arrays([batch.column(at), values.cast(field.type)])
        batch = batch.set_column(at, field, both.take(taken))
    return batch


def _columns(found: Iterable[Workload | None]) -> Iterable[tuple[str, pa.Array]]:
    for column in _TEXTS:
        yield column, pa.array([workload and getattr(workload, column) for workload in found], pa.string())


def _labels(found: Iterable[Workload | None]) -> pa.Array:
    kind = event.schema().field("labels").type
    return pa.array([workload.labels if workload else () for workload in found], kind)
