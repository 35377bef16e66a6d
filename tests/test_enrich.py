"""The container of a cgroup, and its names."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import enrich, event
from pipeline.event import Workload
from tests import stored, strategies

ID = "0123456789abcdef" * 4
OTHER = "fedcba9876543210" * 4


@pytest.mark.parametrize(
    ("cgroup", "parent", "expected"),
    [
        # docker: cgroupfs, systemd
        (ID, "docker", ID),
        (f"docker-{ID}.scope", "system.slice", ID),
        # podman: cgroupfs, systemd, split; with the payload's own cgroup in it
        (f"libpod-{ID}", "libpod_parent", ID),
        ("container", f"libpod-{ID}.scope", ID),
        (f"libpod-{ID}.scope", "machine.slice", ID),
        (f"libpod-payload-{ID}", "unit.service", ID),
        # containerd under Kubernetes: cgroupfs, systemd, and a path of systemd's form with cgroupfs
        (ID, "pod8a6f1c1e-0000-4000-8000-000000000000", ID),
        (f"cri-containerd-{ID}.scope", "kubepods-besteffort-pod1.slice", ID),
        (f"kubepods-pod1.slice:cri-containerd:{ID}", "/", ID),
        # CRI-O: cgroupfs, systemd
        (f"crio-{ID}", "pod1", ID),
        (f"crio-{ID}.scope", "kubepods.slice", ID),
        # a tree inside: systemd's in a container, a container in one (kind), and the name that the kernel found above
        ("init.scope", ID, ID),
        ("kubelet.service", f"docker-{ID}.scope", ID),
        (f"cri-containerd-{OTHER}.scope", f"docker-{ID}.scope", OTHER),
        (OTHER, ID, OTHER),
        # monitors are of the host
        (f"libpod-conmon-{ID}.scope", "machine.slice", None),
        (f"crio-conmon-{ID}.scope", "kubepods-pod1.slice", None),
        # the host's own, and what only looks alike
        ("ssh.service", "system.slice", None),
        ("", "", None),
        (ID[:-1], "docker", None),
        (f"{ID}0", "docker", None),
        (ID.upper(), "docker", None),
        (f"docker-{ID}.service", "system.slice", None),
    ],
)
def test_container_id(cgroup: str, parent: str, expected: str | None) -> None:
    """The id is found in the cgroup's name or the one above, in the shapes of each runtime, and nowhere else."""
    batch = pa.RecordBatch.from_pydict(
        {"pid": pa.array([1], pa.int32()), "cgroup": [cgroup], "cgroup_parent": [parent]}
    )

    assert {"pid": [1], "container_id": [expected]} == enrich.enrich(batch).to_pydict()


# --- names --------------------------------------------------------------------------------------------------------

WEB = Workload("web", "nginx:1.27", "default", "web-1", (("app", "web"), ("tier", "front")))
ALONE = Workload("postgres", "postgres:17")
NAMES = ("namespace", "pod", "container", "image", "labels")


def named(ids: list[str | None], known: dict[str, Workload]) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows and unknown ids of binds with these container ids."""
    batch, unknown = enrich.name(pa.RecordBatch.from_pydict({"container_id": pa.array(ids, pa.string())}), known.get)
    return batch.to_pylist(), unknown


def test_names_go_to_every_event_of_their_container() -> None:
    """By id alone: the host's events and those of unknown containers get none, and the latter are told."""
    rows, unknown = named([ID, None, OTHER, "f" * 64, ID], {ID: WEB, OTHER: ALONE})

    web = {"container_id": ID, **WEB._asdict(), "labels": list(WEB.labels)}
    alone = {"container_id": OTHER, **ALONE._asdict(), "labels": []}
    nobody = {"namespace": None, "pod": None, "container": None, "image": None, "labels": []}
    assert [web, {"container_id": None, **nobody}, alone, {"container_id": "f" * 64, **nobody}, web] == rows
    assert ["f" * 64] == unknown


def test_columns_are_those_of_an_event() -> None:
    """What is added has the types of the schema; where no event is of a container nothing is added."""
    batch, _ = enrich.name(pa.RecordBatch.from_pydict({"container_id": [ID]}), {ID: WEB}.get)
    none, _ = enrich.name(pa.RecordBatch.from_pydict({"container_id": pa.array([None], pa.string())}), {}.get)

    assert {name: event.schema().field(name).type for name in NAMES} == {
        name: batch.schema.field(name).type for name in NAMES
    }
    assert none.schema.names == ["container_id"]


def workloads() -> st.SearchStrategy[Workload]:
    """Names of any kind."""
    text = strategies.texts()
    maybe = st.none() | text
    labels = st.dictionaries(text, text, max_size=3).map(lambda made: tuple(sorted(made.items())))
    return st.builds(Workload, text, maybe, maybe, maybe, labels)


IDS = st.sampled_from("abcdefgh")


@given(st.lists(st.none() | IDS, max_size=30), st.dictionaries(IDS, workloads()))
def test_each_event_has_the_names_of_its_own_id(ids: list[str | None], known: dict[str, Workload]) -> None:
    """Column by column it is what one look-up an event gives."""
    rows, unknown = named(ids, known)

    expected = [known.get(one or "") for one in ids]
    assert [found and found.container for found in expected] == [row.get("container") for row in rows]
    assert [list(found.labels) if found else [] for found in expected] == [row.get("labels", []) for row in rows]
    assert {one for one in ids if one} - set(known) == set(unknown)


def test_resolve_names_what_has_an_id_alone() -> None:
    """Only where the id is there and the name is not, and only on its own node; everything else stays."""
    rows = [
        stored.bind(0, container_id=ID),
        stored.bind(1, container_id=ID, node="node-2"),
        stored.bind(2),
        stored.bind(3, container_id=OTHER, container="named", labels={"kept": "1"}),
        stored.bind(4, container_id="f" * 64),
        stored.own(5),
        stored.bind(6, container_id=ID),
    ]
    known = {("node-1", ID): WEB, ("node-1", OTHER): ALONE}

    found = enrich.resolve(stored.batch(rows), lambda *key: known.get(key))

    assert found.schema == event.schema()
    assert ["web", None, None, "named", None, None, "web"] == found.column("container").to_pylist()
    assert ["web-1", None, None, None, None, None, "web-1"] == found.column("pod").to_pylist()
    assert [list(WEB.labels), [], [], [("kept", "1")], [], [], list(WEB.labels)] == found.column("labels").to_pylist()
    assert list(range(7)) == found.column("pos").to_pylist()


def test_resolve_gives_back_what_needs_nothing() -> None:
    """A batch that nobody can name better is the very same."""
    batch = stored.batch([stored.bind(0), stored.bind(1, container_id=ID)])

    assert enrich.resolve(batch, lambda *_: None) is batch
