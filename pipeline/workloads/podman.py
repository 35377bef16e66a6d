"""Names of podman's containers from its own files, where no service of podman's answers.

In: podman's storage, such as ``/var/lib/containers/storage``, which we may read. Out: a ``Directory``. podman has no
daemon: each command of it rewrites ``<driver>-containers/containers.json`` before a container runs. So the file is
looked at many times a second, and read when it has changed. Labels are not known this way: podman keeps them in its
database alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline.event import Workload, printable
from pipeline.workloads import Directory, Say

_LOOK_SECS = 0.05
"""A container that ends at once is in the file for two tenths of a second; a look takes 30 microseconds."""

_FILE_BYTES = 64 << 20
_FILES = ("containers.json", "volatile-containers.json")

_Seen = dict[str, tuple[int, int, int]]


class Podman:
    """A ``workloads.Source``: a thread that looks at the files until ``close``.

    ``wait`` sleeps for so many seconds and returns True when it is time to end.
    """

    name = "podman"

    def __init__(
        self, directory: Directory, storage: Path, *, say: Say, wait: Callable[[float], bool] | None = None
    ) -> None:
        self._directory, self._storage, self._say = directory, storage, say
        self._ended = threading.Event()
        self._wait = wait or self._ended.wait
        self._away = False
        self._thread = threading.Thread(target=self._work, name=self.name, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop, within two seconds."""
        self._ended.set()
        self._thread.join(2.0)

    def _work(self) -> None:
        seen: _Seen | None = None
        while not self._ended.is_set():
            try:
                now = self._stamps()
                if now != seen:
                    alive = dict(pair for path in now for pair in _containers(path))
                    self._directory.replace(self.name, alive)
                    seen = now
                if self._away:
                    self._away = False
                    self._say("info", f"podman's containers in {self._storage} can be read again")
            except (OSError, ValueError, RecursionError) as error:
                # podman replaces its files whole, so this is no file in the middle of being written.
                seen = None
                if not self._away:
                    self._away = True
                    reason = printable(str(error).encode("utf-8", "surrogateescape"))
                    self._say(
                        "warn",
                        f"podman's containers in {self._storage} cannot be read ({reason}); "
                        "binds are recorded with the ids of their containers meanwhile",
                    )
            if self._wait(_LOOK_SECS):
                return

    def _stamps(self) -> _Seen:
        """What tells of each file whether it is the same as before. OSError when we may not know."""
        try:
            with os.scandir(self._storage) as entries:
                folders = sorted(entry.path for entry in entries if entry.name.endswith("-containers"))
        except FileNotFoundError:
            # Nobody has used podman yet.
            return {}
        found = {}
        for path in (f"{folder}/{name}" for folder in folders for name in _FILES):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                status = os.stat(path)  # noqa: PTH116 - many times a second, for ever
                found[path] = (status.st_ino, status.st_mtime_ns, status.st_size)
        return found


def _containers(path: str) -> Iterator[tuple[str, Workload]]:
    """Ids and names in one file. OSError, or ValueError when it is not what podman writes."""
    with Path(path).open("rb") as file:
        content = file.read(_FILE_BYTES + 1)
    if len(content) > _FILE_BYTES:
        raise ValueError(f"{path} is larger than {_FILE_BYTES >> 20} MiB")
    entries = json.loads(content) if content.strip() else []
    if not isinstance(entries, list):
        raise ValueError(f"{path} holds no list of containers")  # noqa: TRY004 - the file's fault, not the caller's
    for entry in entries:
        names = entry.get("names") if isinstance(entry, dict) else None
        if names and isinstance(names, list) and isinstance(names[0], str) and isinstance(entry.get("id"), str):
            yield entry["id"], Workload(_text(names[0]), _image(entry))


def _image(entry: dict[str, Any]) -> str | None:
    """podman's own notes are JSON in a text of the JSON."""
    try:
        image = json.loads(entry.get("metadata") or "{}").get("image-name")
    except (ValueError, AttributeError, TypeError, RecursionError):
        return None
    return _text(image) if image else None


def _text(value: object) -> str:
    return printable(str(value).encode("utf-8", "surrogatepass"))
