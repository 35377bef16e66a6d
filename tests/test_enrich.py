"""The container of a cgroup."""

from __future__ import annotations

import pyarrow as pa
import pytest

from pipeline.enrich import enrich

ID = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("cgroup", "parent", "expected"),
    [
        (f"docker-{ID}.scope", "system.slice", ID),
        (f"cri-containerd-{ID}.scope", "kubepods-besteffort-pod1.slice", ID),
        (f"crio-{ID}.scope", "kubepods.slice", ID),
        (f"libpod-{ID}.scope", "machine.slice", ID),
        (f"kubepods-pod1.slice:cri-containerd:{ID}", "/", ID),
        (ID, "docker", ID),
        ("init.scope", ID, ID),
        ("ssh.service", "system.slice", None),
        ("", "", None),
        (ID[:-1], "docker", None),
        (f"{ID}0", "docker", None),
        (ID.upper(), "docker", None),
    ],
)
def test_container_id(cgroup: str, parent: str, expected: str | None) -> None:
    """The id is found in the cgroup's name or its parent's, in the shapes of each runtime, and nowhere else."""
    batch = pa.RecordBatch.from_pydict(
        {"pid": pa.array([1], pa.int32()), "cgroup": [cgroup], "cgroup_parent": [parent]}
    )

    assert {"pid": [1], "container_id": [expected]} == enrich(batch).to_pydict()
