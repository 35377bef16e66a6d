"""Programs that leave this host as it was: commands go in, processes in namespaces of their own come out.

``processes`` gives namespaces of processes and mounts (``node_init`` is the first process there); the kernel ends all
of it with its first process, also when whoever started it was killed. What such programs need outside are empty folders
to mount at and control groups: these are removed at the end, and what a killed run left is removed by the next.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from tests.cluster.cache import ClusterFailed

READY_SECS = 60.0

_MADE = "places-that-were-made"

Start = Callable[[list[str], Path], None]
"""Starts a command that adds what it says to a file; it ends with the block that gave this function."""


# --- on the host itself -------------------------------------------------------------------------------------------


@dataclass
class Process:
    """A server that can be stopped and started again on the same ports and data. ``log`` holds all that it said.

    It is killed when it has not ended ``patience_secs`` after it was asked to.
    """

    name: str
    command: list[str]
    log: Path
    ready: Callable[[], bool]
    patience_secs: float = 20.0
    running: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def start(self) -> None:
        """Start and return when it is ready. ClusterFailed when it does not become so."""
        self.begin()
        process = self.running
        assert process
        until(self.ready, self.name, self.log, lambda: process.poll() is None)

    def begin(self) -> None:
        """Start, without waiting."""
        command = self.command
        # A test run that is killed must not leave a server behind.
        if shutil.which("setpriv"):
            command = ["setpriv", "--pdeathsig", "KILL", *command]
        with self.log.open("ab") as log:
            self.running = subprocess.Popen(
                command, cwd=self.log.parent, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def stop(self) -> None:
        """Stop and wait for the end; data stay."""
        process, self.running = self.running, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(self.patience_secs)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def serving(process: Process) -> Iterator[Process]:
    """A server, ready when the block begins and stopped when it ends. ClusterFailed."""
    try:
        process.start()
        yield process
    finally:
        process.stop()


def until(ready: Callable[[], bool], name: str, log: Path, alive: Callable[[], bool] = lambda: True) -> None:
    """Wait until ``ready()``; ClusterFailed with the end of the log when it does not become so or is not ``alive``."""
    deadline = time.monotonic() + READY_SECS
    while not ready():
        if not alive() or time.monotonic() > deadline:
            tail = log.read_text(errors="replace")[-3000:] if log.exists() else ""
            raise ClusterFailed(f"{name} was not ready within {READY_SECS:g} s; its log {log} ends:\n{tail}")
        time.sleep(0.05)


def succeeds(command: Sequence[str | Path]) -> bool:
    """Whether a command ends with 0; what it says is not shown."""
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


# --- in namespaces ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def processes(
    folder: Path, group: str, mounts: Sequence[str], sysctls: Mapping[str, str] | None = None
) -> Iterator[Start]:
    """A function that starts commands in namespaces of processes and mounts, all in control groups below ``group``.

    ``mounts`` are folders that are empty there and in memory; ``folder`` is where they start, and where files may lie;
    ``sysctls`` are values that they find set, by their path below /proc/sys. ClusterFailed.
    """
    with _places(mounts, folder / _MADE), _cgroups(group) as groups:
        log = folder / "namespaces.log"
        with log.open("ab") as said:
            first = subprocess.Popen(
                [
                    "unshare", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child=KILL",
                    sys.executable, "-I", Path(__file__).with_name("node_init.py"),
                ],
                cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, start_new_session=True,
            )  # fmt: skip
        assert first.stdin
        assert first.stdout
        asked: IO[bytes] = first.stdin

        def tell(what: object) -> None:
            asked.write(json.dumps(what).encode() + b"\n")
            asked.flush()

        try:
            tell(
                {
                    "folder": str(folder),
                    "mounts": list(mounts),
                    "groups": [str(one) for one in groups],
                    "sysctls": dict(sysctls or {}),
                }
            )
            if first.stdout.readline() != b"ready\n":
                raise ClusterFailed(f"namespaces cannot be made: {log.read_text(errors='replace')}")
            yield lambda command, output: tell({"command": command, "log": str(output)})
        finally:
            with contextlib.suppress(OSError):
                asked.close()
            try:
                first.wait(20)
            except subprocess.TimeoutExpired:
                first.send_signal(signal.SIGKILL)
                first.wait()
            first.stdout.close()


@contextlib.contextmanager
def temporary(prefix: str) -> Iterator[Path]:
    """A folder for who is the only one to use this prefix; what an earlier one left is removed first."""
    for old in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        for made in old.rglob(_MADE):
            _take_away(made.read_text(encoding="utf-8").splitlines())
        shutil.rmtree(old, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@contextlib.contextmanager
def _places(folders: Sequence[str], made: Path) -> Iterator[None]:
    """Places to mount at; those that were not there are noted in the file ``made``, and removed afterwards."""
    missing: list[str] = []
    for folder in map(Path, folders):
        missing += [str(path) for path in reversed((folder, *folder.parents)) if not path.exists()]
    made.write_text("".join(f"{path}\n" for path in missing), encoding="utf-8")
    try:
        for folder in map(Path, folders):
            folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        _take_away(missing)


def _take_away(places: Sequence[str]) -> None:
    for place in reversed(places):
        with contextlib.suppress(OSError):
            Path(place).rmdir()


# --- control groups -----------------------------------------------------------------------------------------------


def hierarchies() -> list[Path]:
    """Roots of the control groups of this host: one for each hierarchy of version 1, and version 2's."""
    found = []
    for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines():
        _, place, kind, *_ = line.split()
        if kind in {"cgroup", "cgroup2"} and place.startswith("/sys/fs/cgroup"):
            found.append(Path(place))
    return found


@contextlib.contextmanager
def _cgroups(name: str) -> Iterator[list[Path]]:
    """A control group in every hierarchy, with one for the programs themselves below, which are given.

    In version 2 a group that has processes of its own cannot divide what it has among groups below.
    """
    roots = [root / name for root in hierarchies()]
    try:
        for group in roots:
            _remove(group)
            _make(group)
            _make(group / "programs")
        yield [group / "programs" for group in roots]
    finally:
        for group in roots:
            _remove(group)


def _make(group: Path) -> None:
    group.mkdir()
    # A group of version 1 has no processors and no memory until somebody says which.
    for name in ("cpuset.cpus", "cpuset.mems"):
        if (group / name).exists() and (group.parent / name).exists():
            (group / name).write_text((group.parent / name).read_text(encoding="ascii"), encoding="ascii")


def _remove(group: Path) -> None:
    """Ends what still runs there and removes it with all below, the innermost first."""
    deadline = time.monotonic() + 10.0
    while group.exists():
        for folder, _, _ in os.walk(group, topdown=False):
            with contextlib.suppress(OSError):
                for pid in Path(folder, "cgroup.procs").read_text(encoding="ascii").split():
                    os.kill(int(pid), signal.SIGKILL)
            with contextlib.suppress(OSError):
                Path(folder).rmdir()
        if time.monotonic() > deadline:
            raise ClusterFailed(f"the control group {group} cannot be removed; look for processes in it")
        time.sleep(0.02)
