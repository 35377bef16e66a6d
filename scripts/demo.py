"""The main job, for real: trace binds of this host, keep them, and ask for them afterwards.

``demo.py`` keeps them in files; ``demo.py --kafka`` sends them through the broker and the registry that the environment
names in ``BOOTSTRAP`` and ``REGISTRY``.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

HERE = Path(sys.executable).parent
WEB, TLS, DNS = 18080, 18443, 18053


def say(text: str) -> None:
    """One line on what happens now."""
    print(f"\n\033[1m# {text}\033[0m" if sys.stdout.isatty() else f"\n# {text}", flush=True)


def listener(family: int, kind: int, address: str, port: int, done: int) -> Callable[[], None]:
    """A process that binds as a server does, writes a byte to ``done``, and stays."""

    def act() -> None:
        sock = socket.socket(family, kind)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((address, port))
        if kind == socket.SOCK_STREAM:
            sock.listen()
        os.write(done, b".")
        signal.pause()

    return act


def attempt(port: int, uid: int = 0) -> Callable[[], None]:
    """A process whose bind fails."""

    def act() -> None:
        os.setuid(uid)
        try:
            socket.socket().bind(("0.0.0.0", port))
        except OSError as error:
            print(f"  the kernel says: {error.strerror}", flush=True)

    return act


def process(name: str, act: Callable[[], None]) -> int:
    """Fork a process that calls itself ``name``; return its pid."""
    pid = os.fork()
    if pid == 0:
        Path("/proc/self/comm").write_text(name)
        act()
        os._exit(0)
    return pid


def binds() -> list[int]:
    """Six binds that a reader recognises; returns the pids that are still there."""
    servers = []
    for name, text, family, kind, address, port in (
        ("web-server", f"listens on TCP port {WEB}", socket.AF_INET, socket.SOCK_STREAM, "0.0.0.0", WEB),
        ("rpc-worker", "lets the kernel choose a port (port 0)", socket.AF_INET, socket.SOCK_STREAM, "127.0.0.1", 0),
        ("tls-proxy", f"listens on IPv6 [::]:{TLS}", socket.AF_INET6, socket.SOCK_STREAM, "::", TLS),
        ("resolver", f"binds UDP 127.0.0.1:{DNS}", socket.AF_INET, socket.SOCK_DGRAM, "127.0.0.1", DNS),
    ):
        say(f"{name} {text}")
        ready, done = os.pipe()
        servers.append(process(name, listener(family, kind, address, port, done)))
        os.close(done)
        if not os.read(ready, 1):
            raise SystemExit(f"demo: port {port} is taken on this host; stop what holds it")
        os.close(ready)
    say(f"latecomer wants port {WEB} too, and fails because it is taken")
    os.waitpid(process("latecomer", attempt(WEB)), 0)
    say("intruder, an ordinary user, wants port 443, and fails because it is below 1024")
    os.waitpid(process("intruder", attempt(443, uid=65534)), 0)
    return servers


def replay(*arguments: str) -> None:
    """Show a command as a person would type it, and run it."""
    say("bindsnoop-replay " + " ".join(arguments))
    subprocess.run([HERE / "bindsnoop-replay", *arguments], check=False)


def main() -> None:
    """Agent, binds, stop, replay."""
    if os.geteuid() != 0:
        raise SystemExit("demo: tracing needs root; try: sudo make demo")
    kafka = "--kafka" in sys.argv[1:]
    with tempfile.TemporaryDirectory(prefix="bindsnoop-demo-") as folder:
        if kafka:
            where = ["--topic", "binds", "--bootstrap-servers", os.environ["BOOTSTRAP"]]
            where += ["--schema-registry", os.environ["REGISTRY"]]
            extra = ["--create-topic", "--register-schema", "--spool", f"{folder}/spool"]
        else:
            where, extra = ["--files", f"{folder}/binds"], []
        # Nothing of a demonstration is to outlive it.
        extra += ["--pins", "none"]
        say("bindsnoop-agent " + " ".join([*where, *extra]))
        agent = subprocess.Popen(
            [HERE / "bindsnoop-agent", "--node", "demo", *where, *extra], stderr=subprocess.PIPE, text=True
        )
        assert agent.stderr is not None
        first = agent.stderr.readline()
        print("  " + first.rstrip(), flush=True)
        if agent.poll() is not None or "traces with" not in first:
            raise SystemExit("demo: the agent did not start\n" + agent.stderr.read())
        servers = binds()
        say("stop the agent")
        agent.terminate()
        talk = agent.communicate()[1]
        print("".join(f"  {line}\n" for line in talk.splitlines()), end="", flush=True)
        for pid in servers:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        if not kafka:
            say("what is on disk")
            for path in sorted(Path(folder, "binds").rglob("*.avro")):
                print(f"  {path.relative_to(folder)}  {path.stat().st_size} bytes", flush=True)
        replay(*where, "-i=false")
        replay(*where, "-i=false", "-o", "json")
        replay(*where, "-i=false", "-P", str(WEB), "-o", "custom-columns=time,comm,pid,addr,port,error")
        replay(*where, "--verify")


if __name__ == "__main__":
    main()
