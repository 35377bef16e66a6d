"""The first process of new namespaces: what to start comes in as lines of JSON, ``ready`` comes out.

Run by ``unshare --mount --pid --fork --mount-proc``. The first line is ``{"folder": PATH, "mounts": [...],
"groups": [...], "sysctls": {...}}``: folders that get an empty tmpfs, so that what programs write at fixed places is
theirs alone, control groups to live in, and what programs shall read of /proc/sys and may write without any effect.

After ``ready`` on standard output each line is ``{"command": [...], "log": PATH}``. When standard input ends, programs
are asked to end; then this process does, and the kernel ends with it what is left: also when whoever started it was
killed.

It has nothing but Python's own library, and before anything is mounted.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

PATIENCE_SECS = 5.0

_running: set[int] = set()


def main() -> None:
    """Serve until standard input ends."""
    # Shared below, so that a volume that is mounted for a pod shows up in its containers; private to the host.
    _mount("--make-rprivate", "/")
    _mount("--make-rshared", "/")
    wanted = json.loads(sys.stdin.readline())
    for group in wanted["groups"]:
        with Path(group, "cgroup.procs").open("w") as members:
            members.write("0")
    for folder in wanted["mounts"]:
        _mount("-t", "tmpfs", "-o", "mode=0755", "tmpfs", folder)
    for folder in ("/proc/sys/kernel", "/proc/sys/vm"):
        _mount("--bind", folder, folder)
        _mount("-o", "remount,bind,ro", folder)
    for number, (name, value) in enumerate(wanted["sysctls"].items()):
        file = Path(wanted["folder"], f"sysctl-{number}")
        file.write_text(f"{value}\n")
        _mount("--bind", str(file), f"/proc/sys/{name}")
    if not Path("/sys/kernel/tracing/events").exists():
        _mount("-t", "tracefs", "tracefs", "/sys/kernel/tracing")
    signal.signal(signal.SIGCHLD, _reap)
    print("ready", flush=True)
    for line in sys.stdin:
        wanted = json.loads(line)
        with Path(wanted["log"]).open("ab") as log:
            started = subprocess.Popen(
                wanted["command"], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        _running.add(started.pid)
    for pid in set(_running):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    end = time.monotonic() + PATIENCE_SECS
    while time.monotonic() < end and any(Path("/proc", str(pid)).exists() for pid in set(_running)):
        time.sleep(0.02)


def _mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True)


def _reap(*_: object) -> None:
    """What containers leave behind is inherited by the first process."""
    with contextlib.suppress(ChildProcessError):
        while pid := os.waitpid(-1, os.WNOHANG)[0]:
            _running.discard(pid)


if __name__ == "__main__":
    main()
