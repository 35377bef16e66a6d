"""The three commands as a user runs them: real processes, with their output and exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from pipeline.tracer import host

BIN = Path(sys.executable).parent


class Done(NamedTuple):
    """What a command said and how it ended."""

    code: int
    out: str
    err: str


def environment(**extra: str) -> dict[str, str]:
    """This process's environment without settings of bindsnoop, and with ``extra``."""
    return {name: value for name, value in os.environ.items() if not name.startswith("BINDSNOOP")} | extra


def run(command: str, *arguments: object, timeout: float = 60, **extra: str) -> Done:
    """Run one of the commands to its end."""
    done = subprocess.run(
        [BIN / command, *map(str, arguments)],
        capture_output=True,
        timeout=timeout,
        env=environment(**extra),
        check=False,
    )
    return Done(done.returncode, done.stdout.decode(), done.stderr.decode())


def replay(*arguments: object, **extra: str) -> Done:
    """``bindsnoop-replay`` with these arguments."""
    return run("bindsnoop-replay", *arguments, **extra)


class Agent:
    """A running agent; after the block ``code`` is its exit code."""

    def __init__(self, process: subprocess.Popen[bytes], said: Path) -> None:
        self.process = process
        self.code: int | None = None
        self._said = said
        self._kept = ""

    @property
    def talk(self) -> str:
        """What it has said on standard error until now."""
        if self._said.exists():
            self._kept = self._said.read_text(encoding="utf-8")
        return self._kept


@contextmanager
def agent_running(
    *arguments: str,
    bin: Path = BIN,
    cwd: Path | None = None,
    lock: Path | None = None,
    node: str = "node-1",
    **extra: str,
) -> Iterator[Agent]:
    """``bindsnoop-agent``, attached when the block begins, ended by SIGTERM when it ends.

    Each has a lock and a spool of its own and pins nothing, for the test's agents are no neighbours of an agent that
    serves this host.
    """
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder, "said")
        with said.open("wb") as talk:
            process = subprocess.Popen(
                [bin / "bindsnoop-agent", "--node", node, "--lock", str(lock or Path(folder, "lock")), *arguments],
                stderr=talk, stdout=subprocess.DEVNULL, cwd=cwd,
                env=environment(**{"BINDSNOOP_SPOOL": str(Path(folder, "spool")), "BINDSNOOP_PINS": "none"} | extra),
            )  # fmt: skip
        agent = Agent(process, said)
        try:
            until(lambda: "traces with" in agent.talk or process.poll() is not None)
            assert process.poll() is None, agent.talk
            yield agent
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(40)
            finally:
                process.kill()
                process.wait()
                agent.code = process.returncode
                assert agent.talk is not None


@contextmanager
def small_disk(size: str) -> Iterator[Path]:
    """A file system of so many bytes, in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "bindsnoop-test", folder], check=True)
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", "-l", folder], check=True)


@contextmanager
def bpffs() -> Iterator[Path]:
    """A folder, not made yet, in a bpffs of this test's own, which every process of this user can reach."""
    mounted = host.private_mount("bpf")
    try:
        yield Path(f"/proc/{os.getpid()}/fd/{mounted}/pins")
    finally:
        os.close(mounted)


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait until ``condition()`` is true; AssertionError when it does not become so."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not true within {seconds} s"
        time.sleep(0.02)
