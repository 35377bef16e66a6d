"""bindsnoop as a user runs it: the binds of this host as they happen."""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.commands import BIN, environment, run


@contextmanager
def live(*arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """A running ``bindsnoop``, ended with the block."""
    process = subprocess.Popen(
        [BIN / "bindsnoop", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0, env=environment()
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def line(process: subprocess.Popen[bytes], seconds: float = 10.0) -> str:
    """The next line of standard output; fails when none comes in time."""
    assert process.stdout is not None
    text = b""
    deadline = time.monotonic() + seconds
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while not text.endswith(b"\n"):
            assert selector.select(max(0.0, deadline - time.monotonic())), f"no line within {seconds} s; had {text!r}"
            text += process.stdout.read(1)
    return text.decode().rstrip("\n")


def bound_port() -> int:
    """Bind a socket of this process to a free port, and let go of it."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def test_header_at_once_and_a_bind_within_half_a_second() -> None:
    """The header stands before any event; a bind is on the screen within 0.5 s, in the documented columns."""
    with live("--pid", str(os.getpid())) as process:
        header = line(process)
        begun = time.monotonic()
        port = bound_port()
        row = line(process)
        took = time.monotonic() - begun

    assert header == "K8S.CONTAINERNAME PID     COMM             PROTO  ADDR             PORT    OPTS    IF"
    comm = Path("/proc/self/comm").read_text().strip()
    assert row == f"{'':17} {os.getpid():<7} {comm:<16} TCP    127.0.0.1        {port:<7} .....   0"
    assert took < 0.5


def test_json_and_filters() -> None:
    """JSON has the documented keys; a port filter finds the failed attempt by the port that it asked for."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        port = holder.getsockname()[1]
        with live("-o", "json", "-i=false", f"-P={port}", "--node", "here") as process:
            time_to_attach(process)
            bound_port()
            with socket.socket() as second, pytest.raises(OSError, match="in use"):
                second.bind(("127.0.0.1", port))
            event = json.loads(line(process))

    assert (event["node"], event["pid"], event["port"], event["error"]) == ("here", os.getpid(), port, "EADDRINUSE")
    assert list(event) == [
        "type", "node", "pid", "comm", "proto", "addr", "port", "opts", "if", "mountnsid", "error",
    ]  # fmt: skip


def time_to_attach(process: subprocess.Popen[bytes]) -> None:
    """JSON has no header that would say when tracing has begun: the kernel's list of the process's descriptors does."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        links = []
        for entry in Path(f"/proc/{process.pid}/fd").iterdir():
            try:
                links.append(str(entry.readlink()))
            except FileNotFoundError:
                continue
        if sum("bpf_link" in link or "perf_event" in link for link in links) >= 4:
            return
        time.sleep(0.01)
    raise AssertionError("bindsnoop has not attached within 10 s")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ends_cleanly(number: signal.Signals) -> None:
    """Ctrl-C and SIGTERM end it with 0 and without a word."""
    with live() as process:
        line(process)
        process.send_signal(number)
        out, err = process.communicate(timeout=10)

    assert (b"", b"", 0) == (out, err, process.returncode)


def test_closed_standard_output() -> None:
    """When nobody reads any more, it ends at the next event, quietly, with 0."""
    with live() as process:
        line(process)
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        deadline = time.monotonic() + 10
        while process.poll() is None and time.monotonic() < deadline:
            bound_port()
            time.sleep(0.05)
        err = process.stderr.read()

    assert (b"", 0) == (err, process.returncode)


def test_without_permission() -> None:
    """Without capabilities it is one sentence that says what is missing, and exit code 2."""
    done = subprocess.run(
        ["setpriv", "--bounding-set=-all", BIN / "bindsnoop"],
        capture_output=True, text=True, env=environment(), check=False,
    )  # fmt: skip

    assert (2, "") == (done.returncode, done.stdout)
    assert len(done.stderr.splitlines()) == 1
    assert "CAP_BPF" in done.stderr


def test_wrong_arguments() -> None:
    """A wrong argument is one sentence, and exit code 2."""
    done = run("bindsnoop", "-P", "80-")

    assert (2, "") == (done.code, done.out)
    assert "'80-'" in done.err
