"""Names from podman's own files: read when they change, whatever is in them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.event import Workload
from pipeline.workloads import Directory
from pipeline.workloads import podman as edge
from pipeline.workloads.podman import Podman
from tests import strategies
from tests.commands import until

ROOT = Path(__file__).parent.parent

A, B = "a" * 64, "b" * 64


class Storage:
    """podman's storage, a source that reads it, and what that said."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.directory = Directory()
        self.said: list[tuple[str, str]] = []
        self.turns = 0
        self.source = Podman(self.directory, folder, say=lambda *line: self.said.append(line), wait=self._wait)

    def _wait(self, _seconds: float) -> bool:
        self.turns += 1
        return self.source._ended.wait(0.002) if hasattr(self, "source") else False

    def write(self, content: bytes, name: str = "overlay-containers/containers.json") -> None:
        """Replace a file whole, as podman does."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".new").write_bytes(content)
        path.with_suffix(".new").replace(path)

    def name(self, container_id: str) -> str | None:
        found = self.directory.get(container_id)
        return found and found.container

    def look(self) -> None:
        """Return when it has looked at what is there now."""
        seen = self.turns
        until(lambda: self.turns >= seen + 2)


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[Storage]:
    """Empty storage, which a source looks at."""
    made = Storage(tmp_path)
    yield made
    made.source.close()
    assert not made.source._thread.is_alive()


def entry(container_id: str, *names: str, image: str = "docker.io/library/nginx:1.27") -> dict[str, Any]:
    """As podman writes it: its own notes are JSON in a text."""
    return {"id": container_id, "names": list(names), "metadata": json.dumps({"image-name": image, "name": names[0]})}


def test_what_is_there_comes_and_goes(storage: Storage) -> None:
    """A container is known from when the file names it, with its image, and its name stays for late events."""
    storage.write(json.dumps([entry(A, "web", "alias")]).encode())
    until(lambda: storage.name(A) == "web")
    storage.write(json.dumps([entry(B, "web", image="other")]).encode())
    until(lambda: storage.name(B) == "web")

    assert Workload("web", "docker.io/library/nginx:1.27") == storage.directory.get(A)
    assert Workload("web", "other") == storage.directory.get(B)
    assert storage.said == []


def test_what_is_not_in_the_file_any_more(storage: Storage) -> None:
    """It has gone."""
    storage.directory = storage.source._directory = Directory(gone_max=0)
    storage.write(json.dumps([entry(A, "web"), entry(B, "db")]).encode())
    until(lambda: storage.name(A) == "web")
    storage.write(json.dumps([entry(B, "db")]).encode())
    until(lambda: storage.name(A) is None)

    assert storage.name(B) == "db"


def test_a_file_of_the_same_size(storage: Storage) -> None:
    """It is another file all the same."""
    storage.write(json.dumps([entry(A, "one")]).encode())
    until(lambda: storage.name(A) == "one")
    storage.write(json.dumps([entry(A, "two")]).encode())

    until(lambda: storage.name(A) == "two")


def test_files_of_every_driver_and_of_brief_containers(storage: Storage) -> None:
    """Newer podman keeps containers that do not outlive a boot in a file of their own."""
    storage.write(json.dumps([entry(A, "one")]).encode(), "vfs-containers/containers.json")
    storage.write(json.dumps([entry(B, "two")]).encode(), "vfs-containers/volatile-containers.json")

    until(lambda: (storage.name(A), storage.name(B)) == ("one", "two"))


@pytest.mark.parametrize(
    "content", [b"{", b"{}", b"7", b"\xff", b"[" * 100_000], ids=["half", "object", "number", "no-text", "deep"]
)
def test_a_file_that_is_none(storage: Storage, content: bytes) -> None:
    """It is said once; what was known stays; and when the file is right again that is said too."""
    storage.write(json.dumps([entry(A, "web")]).encode())
    until(lambda: storage.name(A) == "web")
    storage.write(content)
    until(lambda: len(storage.said) == 1)
    storage.look()
    storage.write(json.dumps([entry(A, "web"), entry(B, "db")]).encode())
    until(lambda: storage.name(B) == "db")
    until(lambda: len(storage.said) == 2)

    assert ["warn", "info"] == [level for level, _ in storage.said]
    assert str(storage.folder) in storage.said[0][1]


@pytest.mark.parametrize(
    "odd",
    [
        None,
        7,
        {},
        {"id": B},
        {"id": 7, "names": ["x"]},
        {"id": B, "names": []},
        {"id": B, "names": "x"},
        {"id": B, "names": [None]},
    ],
)
def test_an_entry_that_is_none(storage: Storage, odd: object) -> None:
    """It is passed over, and the others count."""
    storage.write(json.dumps([odd, entry(A, "web")]).encode())
    until(lambda: storage.name(A) == "web")

    assert (storage.name(B), storage.said) == (None, [])


def test_a_file_that_goes_and_comes(storage: Storage) -> None:
    """Containers of storage that is gone are gone, which is nothing to be said."""
    storage.write(json.dumps([entry(A, "web")]).encode())
    until(lambda: storage.name(A) == "web")
    shutil.rmtree(storage.folder)
    storage.look()
    kept = storage.name(A)
    storage.write(json.dumps([entry(B, "db")]).encode())
    until(lambda: storage.name(B) == "db")

    assert (kept, storage.said) == ("web", [])


def test_a_file_that_is_too_large(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not read, and that is said."""
    monkeypatch.setattr(edge, "_FILE_BYTES", 1000)
    storage.write(b"[" + b" " * 1000 + b"]")
    until(lambda: len(storage.said) == 1)

    assert "is larger than" in storage.said[0][1]


def test_storage_that_may_not_be_read(tmp_path: Path) -> None:
    """The reason is said; root without its capabilities is refused as anybody is."""
    storage = tmp_path / "storage"
    storage.mkdir(mode=0)
    script = (
        "import sys; from pathlib import Path; from pipeline.workloads import Directory; "
        "from pipeline.workloads.podman import Podman; "
        "Podman(Directory(), Path(sys.argv[1]), say=lambda *line: print(*line), wait=lambda _: True)._thread.join()"
    )
    lacking = "-dac_override,-dac_read_search"
    unable = ["setpriv", f"--bounding-set={lacking}", f"--inh-caps={lacking}"] if os.geteuid() == 0 else []
    done = subprocess.run(
        [*unable, sys.executable, "-c", script, storage], capture_output=True, text=True, check=True, cwd=ROOT
    )

    assert f"warn podman's containers in {storage} cannot be read" in done.stdout
    assert "Permission denied" in done.stdout


@pytest.mark.parametrize("notes", ["", "{", "[]", "null", '{"image-name": null}', 7])
def test_notes_that_are_none(storage: Storage, notes: object) -> None:
    """A container without a readable image has its name all the same."""
    storage.write(json.dumps([{"id": A, "names": ["web"], "metadata": notes}]).encode())
    until(lambda: storage.name(A) == "web")

    assert Workload("web") == storage.directory.get(A)


@pytest.mark.parametrize("text", [text for text in strategies.HARM if text])
def test_names_that_mean_harm(storage: Storage, text: str) -> None:
    """Whatever a container's owner chose is printable text behind the edge."""
    storage.write(json.dumps([entry(A, text, image=text)]).encode())
    until(lambda: storage.directory.get(A) is not None)
    found = storage.directory.get(A)

    assert found
    assert (found.container + (found.image or "")).isprintable()
