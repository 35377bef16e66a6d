"""bindsnoop as a user runs it: the binds of this host as they happen."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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


# --- filters ------------------------------------------------------------------------------------------------------

NOWHERE = "192.0.2.1"
"""An address that no host has: binding it fails, whatever the port."""

ANOTHER = f"""
import socket
for _ in range(3000):
    try:
        socket.socket().bind(("{NOWHERE}", 7))
    except OSError:
        pass
"""


def another_process() -> None:
    """Thousands of binds by a process of its own."""
    subprocess.run([sys.executable, "-c", ANOTHER], check=True)


def binds(*ports: int, address: str = "127.0.0.77") -> None:
    """A bind to each of these ports, on an address of this host that nobody else uses, or on one that fails."""
    for port in ports:
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind((address, port))


def warnings(process: subprocess.Popen[bytes], seconds: float) -> list[dict[str, Any]]:
    """What it warns of on standard output within this time."""
    assert process.stdout is not None
    text = b""
    deadline = time.monotonic() + seconds
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while selector.select(max(0.0, deadline - time.monotonic())):
            text += os.read(process.stdout.fileno(), 65536)
    return [event for event in map(json.loads, text.splitlines()) if event["type"] == "warn"]


@pytest.mark.parametrize(
    ("arguments", "unwanted", "wanted", "error"),
    [
        pytest.param([], another_process, lambda: binds(18500), None, id="failures"),
        pytest.param(
            ["-i=false", "-P", "8,18400-18500"],
            another_process,
            lambda: binds(18500, address=NOWHERE),
            "EADDRNOTAVAIL",
            id="ports",
        ),
        pytest.param(
            ["-i=false", "--pid", str(os.getpid())],
            another_process,
            lambda: binds(18500, address=NOWHERE),
            "EADDRNOTAVAIL",
            id="pid",
        ),
    ],
)
def test_what_nobody_asked_for_takes_no_room(
    arguments: list[str], unwanted: Callable[[], None], wanted: Callable[[], None], error: str | None
) -> None:
    """Attempts that are not wanted do not leave the kernel: thousands of them do not fill the smallest ring.

    While they are made the reader is stopped, so that whatever reached the ring would stay there.
    """
    with live("--ring-bytes", "64KiB", "-o", "json", *arguments) as process:
        time_to_attach(process)
        process.send_signal(signal.SIGSTOP)
        unwanted()
        wanted()
        process.send_signal(signal.SIGCONT)
        events = [json.loads(line(process))]
        while events[-1].get("pid") != os.getpid():
            events.append(json.loads(line(process)))

        assert (events[-1]["port"], events[-1].get("error")) == (18500, error)
        assert [event for event in events if event["type"] == "warn"] + warnings(process, 1.5) == []


def test_what_does_not_fit_is_declared() -> None:
    """The same attempts do fill that ring when they are wanted, and the loss is shown."""
    with live("--ring-bytes", "64KiB", "-o", "json", "-i=false", "-P", "7,18500") as process:
        time_to_attach(process)
        process.send_signal(signal.SIGSTOP)
        another_process()
        process.send_signal(signal.SIGCONT)

        event = json.loads(line(process))
        while event["type"] != "warn":
            event = json.loads(line(process))

        assert "ring_full" in event["message"]


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        pytest.param(["-P", "18500,18510-18512"], [18500, 18510, 18511, 18512], id="ports-and-ranges"),
        pytest.param(["-P", ",".join(map(str, range(18500, 18533, 2)))], [*range(18500, 18533, 2)], id="17-ports"),
        pytest.param(["--pid", ",".join(map(str, [*range(1 << 22, (1 << 22) + 16), os.getpid()]))], None, id="17-pids"),
    ],
)
def test_lists_and_ranges(arguments: list[str], shown: list[int] | None) -> None:
    """Exactly the binds that match are shown, of lists too that are longer than what the kernel filters by."""
    tried = [*range(18498, 18536)]
    with live("-o", "json", *arguments) as process:
        time_to_attach(process)
        subprocess.run([sys.executable, "-c", "import socket; socket.socket().bind(('127.0.0.77', 18490))"], check=True)
        binds(*tried)
        events = [json.loads(line(process)) for _ in shown or tried]

    assert [(event["pid"], event["port"]) for event in events] == [(os.getpid(), port) for port in shown or tried]


def test_failures_are_shown_when_asked_for() -> None:
    """By default a failed attempt is not shown; with -i=false it is, with what it asked for and its error."""
    with live("-o", "json", "--pid", str(os.getpid())) as some, live("-o", "json", "-i=false") as every:
        time_to_attach(some)
        time_to_attach(every)
        binds(18500, address=NOWHERE)
        binds(18501)
        first = json.loads(line(every))
        while first["pid"] != os.getpid():
            first = json.loads(line(every))

        assert json.loads(line(some))["port"] == 18501
        assert (first["addr"], first["port"], first["error"]) == (NOWHERE, 18500, "EADDRNOTAVAIL")
