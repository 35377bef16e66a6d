"""Real servers for tests, demos and benchmarks: Apache Kafka, a schema registry, and tools beside them.

In: nothing but a network and a Java runtime. Out: context managers that start a server on 127.0.0.1 with its data in
a temporary folder, wait until it really answers, and stop it whatever happens. Programs are fetched once, with pinned
versions, into ``${XDG_CACHE_HOME:-~/.cache}/bindsnoop/<name>-<version>/``.

Why real ones: what a mock broker cannot show (retention, transactions, rights, re-created topics, restarts) is what
the promises of this project are about.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import secrets
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NamedTuple

HERE = Path(__file__).parent
READY_SECS = 60.0


class ServerFailed(RuntimeError):
    """A program could not be fetched, or a server did not start; the sentence says which, and where its log is."""


# --- fetching -----------------------------------------------------------------------------------------------------


class Program(NamedTuple):
    """Something to fetch: its pinned ``version``, its ``size`` in words, and how it gets into a folder."""

    version: str
    size: str
    into: Callable[[Path], None]


def _copy_jars(pom: str, goal: str, folder: Path) -> None:
    _needs("mvn", "maven")
    command = ["mvn", "-B", "-q", "-f", str(HERE / pom), f"dependency:{goal}", f"-DoutputDirectory={folder}"]
    _run(command, f"Maven could not fetch what {pom} lists")


def _kafka_into(folder: Path) -> None:
    _copy_jars("pom-kafka.xml", "copy-dependencies", folder)


def _avro_tools_into(folder: Path) -> None:
    _copy_jars("pom-avro-tools.xml", "copy-dependencies", folder)


def _registry_into(folder: Path) -> None:
    _copy_jars("pom-registry.xml", "copy", folder)
    (archive,) = folder.glob("*.tar.gz")
    # Not by tarfile: its safe filter is younger than the Python of some distributions.
    _run(["tar", "-xzf", str(archive), "-C", str(folder)], f"{archive.name} could not be unpacked")
    archive.unlink()


def _compose_into(folder: Path) -> None:
    """The compose plug-in of Debian 13, which also runs on its own, without touching the system's packages."""
    _needs("apt-get", "apt")
    state = folder / "apt"
    for name in ("lists/partial", "cache/archives/partial", "parts"):
        (state / name).mkdir(parents=True)
    (state / "status").touch()
    keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
    (state / "sources.list").write_text(f"deb [signed-by={keyring}] {_debian_mirror()} trixie main\n")
    places = {
        "Dir::Etc::sourcelist": "sources.list",
        "Dir::Etc::sourceparts": "parts",
        "Dir::State::lists": "lists",
        "Dir::Cache": "cache",
        "Dir::State::status": "status",
    }
    apt = ["apt-get", "-q=2"]
    for option, name in places.items():
        apt += ["-o", f"{option}={state / name}"]
    apt += ["-o", "APT::Sandbox::User=root"]
    _run([*apt, "update"], "apt-get could not read the package list of Debian 13")
    _run([*apt, "download", "docker-compose"], "apt-get could not fetch docker-compose", cwd=folder)
    (package,) = folder.glob("*.deb")
    _run(["dpkg-deb", "-x", str(package), str(folder / "root")], f"dpkg-deb could not unpack {package.name}")
    shutil.copy2(folder / "root/usr/libexec/docker/cli-plugins/docker-compose", folder / "docker-compose")
    shutil.rmtree(folder / "root")
    shutil.rmtree(state)
    package.unlink()


def _debian_mirror() -> str:
    """Address of the mirror that this system itself uses for Debian."""
    targets = [
        "apt-get",
        "indextargets",
        "--format",
        "$(REPO_URI) $(CODENAME)",
        "ORIGIN: Debian",
        "IDENTIFIER: Packages",
    ]
    lines = subprocess.run(targets, capture_output=True, text=True, check=False).stdout.splitlines()
    for line in lines:
        address, _, codename = line.partition(" ")
        if codename and "-" not in codename:
            return address
    raise ServerFailed("docker compose is missing: install it, for this system's apt-get knows no mirror of Debian")


PROGRAMS: dict[str, Program] = {
    "kafka": Program("4.3.1", "54 MiB", _kafka_into),
    "registry": Program("3.0.9", "104 MiB, 115 MiB unpacked", _registry_into),
    "avro-tools": Program("1.12.0", "55 MiB", _avro_tools_into),
    "compose": Program("2.26", "30 MiB", _compose_into),
}


def fetched(name: str) -> Path:
    """Folder of a program in ``PROGRAMS``, fetched now if the cache has it not. ServerFailed when that fails.

    It is filled in a temporary folder beside its place and renamed, so a broken download is never taken for a whole
    one, and two processes may fetch at the same time.
    """
    program = PROGRAMS[name]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bindsnoop"
    place = cache / f"{name}-{program.version}"
    if place.is_dir():
        return place
    cache.mkdir(parents=True, exist_ok=True)
    with _one_at_a_time(cache / f".{name}.lock"):
        if place.is_dir():
            return place
        print(f"fetching {name} {program.version} ({program.size}) into {place}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=f".{name}-") as temporary:
            folder = Path(temporary) / "whole"
            folder.mkdir()
            program.into(folder)
            folder.rename(place)
    return place


def avro_tools() -> list[str]:
    """Command line of Avro's reference tools; append a tool such as ``tojson`` and its arguments."""
    (jar,) = fetched("avro-tools").glob("avro-tools-*.jar")
    return [_java(), "-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-jar", str(jar)]


def compose() -> list[str]:
    """Command line of docker compose, the system's own where there is one; checking a file needs no docker daemon."""
    if shutil.which("docker"):
        with contextlib.suppress(OSError):
            asked = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False)
            if asked.returncode == 0:
                return ["docker", "compose"]
    return [str(fetched("compose") / "docker-compose")]


@contextlib.contextmanager
def _one_at_a_time(lock: Path) -> Iterator[None]:
    with lock.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _run(command: list[str], failure: str, cwd: Path | None = None) -> None:
    done = subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise ServerFailed(f"{failure}: {done.stdout.strip()[-2000:]}")


def _needs(command: str, package: str) -> None:
    """Install a Debian package that gives ``command``, or say in one sentence that it is missing."""
    if shutil.which(command):
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise ServerFailed(f"{command} is missing: install it, on Debian by `apt-get install {package}`")
    print(f"installing {package}, which gives {command}, by apt-get", file=sys.stderr, flush=True)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(["apt-get", "-q=2", "update"], env=environment, stdout=subprocess.DEVNULL, check=False)
    install = ["apt-get", "-q=2", "install", "--no-install-recommends", "-y", package]
    subprocess.run(install, env=environment, stdout=sys.stderr, check=False)
    if not shutil.which(command):
        raise ServerFailed(f"{command} is missing, and `apt-get install {package}` did not give it")


@functools.cache
def _java() -> str:
    _needs("java", "default-jre-headless")
    return shutil.which("java") or "java"


# --- processes ----------------------------------------------------------------------------------------------------


def free_ports(count: int) -> list[int]:
    """Distinct TCP ports on 127.0.0.1 that nothing listens on now."""
    with contextlib.ExitStack() as stack:
        taken = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in taken:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in taken]


def _spawn(command: list[str], folder: Path, log: IO[bytes]) -> subprocess.Popen[bytes]:
    # A test run that is killed must not leave a server behind. A process group of its own keeps a Ctrl-C at the
    # terminal from stopping the server before the tests have said goodbye to it.
    if shutil.which("setpriv"):
        command = ["setpriv", "--pdeathsig", "KILL", *command]
    return subprocess.Popen(
        command, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )


def _wait_ready(process: subprocess.Popen[bytes], ready: Callable[[], bool], name: str, log: Path) -> None:
    end = time.monotonic() + READY_SECS
    while not ready():
        if process.poll() is not None or time.monotonic() > end:
            tail = log.read_text(errors="replace")[-3000:]
            raise ServerFailed(f"{name} did not become ready within {READY_SECS:.0f} s; its log {log} ends:\n{tail}")
        time.sleep(0.05)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()


# --- Kafka --------------------------------------------------------------------------------------------------------

_LOG4J = """<?xml version="1.0" encoding="UTF-8"?>
<Configuration status="ERROR">
  <Appenders><Console name="out"><PatternLayout pattern="%d %p %c %m%n"/></Console></Appenders>
  <Loggers>
    <Root level="INFO"><AppenderRef ref="out"/></Root>
  </Loggers>
</Configuration>
"""

_QUICK = {
    "auto.create.topics.enable": "false",
    "broker.heartbeat.interval.ms": "200",
    "broker.session.timeout.ms": "2000",
    "group.initial.rebalance.delay.ms": "0",
    "log.initial.task.delay.ms": "500",
    "log.retention.check.interval.ms": "1000",
    "log.segment.delete.delay.ms": "1000",
    "num.partitions": "1",
    "offsets.topic.num.partitions": "1",
    "offsets.topic.replication.factor": "1",
    "share.coordinator.state.topic.min.isr": "1",
    "share.coordinator.state.topic.replication.factor": "1",
    "transaction.state.log.min.isr": "1",
    "transaction.state.log.num.partitions": "1",
    "transaction.state.log.replication.factor": "1",
}


def single_node(port: int, controller: int, internal: int, protocol: str = "PLAINTEXT") -> dict[str, str]:
    """Server properties of one KRaft node on 127.0.0.1, tuned for quick starts, restarts and retention.

    ``protocol`` is the security protocol of the clients' listener, named CLIENT. INTERNAL is always plain text.
    """
    return {
        **_QUICK,
        "process.roles": "broker,controller",
        "node.id": "1",
        "controller.quorum.voters": f"1@127.0.0.1:{controller}",
        "controller.listener.names": "CONTROLLER",
        "inter.broker.listener.name": "INTERNAL",
        "listeners": f"CLIENT://127.0.0.1:{port},INTERNAL://127.0.0.1:{internal},CONTROLLER://127.0.0.1:{controller}",
        "advertised.listeners": f"CLIENT://127.0.0.1:{port},INTERNAL://127.0.0.1:{internal}",
        "listener.security.protocol.map": f"CLIENT:{protocol},INTERNAL:PLAINTEXT,CONTROLLER:PLAINTEXT",
    }


@dataclass
class Kafka:
    """A running Apache Kafka of one node. ``folder`` holds its properties, its data and its log.

    ``bootstrap`` is the clients' address; ``internal`` that of a listener without any security, for set-up.
    """

    bootstrap: str
    internal: str
    folder: Path
    command: list[str]
    log_path: Path
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def pid(self) -> int:
        """Process id of the running node."""
        if self._process is None:
            raise ServerFailed("Kafka is not running; start() it first")
        return self._process.pid

    @property
    def data(self) -> Path:
        """Folder with one sub-folder for each partition."""
        return self.folder / "data"

    def start(self) -> None:
        """Start on the same ports and data, and return when clients are served (2 to 5 s)."""
        with self.log_path.open("ab") as log:
            self._process = _spawn(self.command, self.folder, log)
        _wait_ready(self._process, lambda: _serves(self.bootstrap), "Kafka", self.log_path)

    def stop(self) -> None:
        """Stop in order and wait for the end; data stay."""
        if self._process is not None:
            _end(self._process)
            self._process = None

    def kill(self) -> None:
        """Kill at once, as a power cut would, and wait for the end; data stay."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def pause(self) -> None:
        """Stop answering without closing connections (SIGSTOP); returns when no thread of it runs any more."""
        os.kill(self.pid, signal.SIGSTOP)
        tasks = Path(f"/proc/{self.pid}/task")
        while any(" T " not in (task / "stat").read_text().rpartition(")")[2] for task in tasks.iterdir()):
            time.sleep(0.001)

    def resume(self) -> None:
        """Answer again (SIGCONT)."""
        os.kill(self.pid, signal.SIGCONT)


@contextlib.contextmanager
def kafka(
    properties: Mapping[str, str] | None = None,
    *,
    heap: str = "256m",
    port: int | None = None,
    jit_full: bool = False,
    protocol: str = "PLAINTEXT",
    only: bool = False,
    format_options: tuple[str, ...] = (),
) -> Iterator[Kafka]:
    """A fresh Apache Kafka of one node, ready to serve; stopped and its data removed at the end.

    ``properties`` are laid over ``single_node``'s, or with ``only`` stand alone (then they name listeners on
    127.0.0.1 themselves, the clients' one on ``port``). ``heap`` is Java's; ``jit_full`` is for benchmarks, slower to
    start and faster to run. ``format_options`` go to the storage tool, such as ``--add-scram``. ServerFailed when it
    does not start.
    """
    libraries = fetched("kafka")
    ports = free_ports(3)
    own = port or ports[0]
    whole = {} if only else single_node(own, ports[1], ports[2], protocol)
    whole.update(properties or {})
    folder = Path(tempfile.mkdtemp(prefix="bindsnoop-kafka-"))
    try:
        (folder / "log4j2.xml").write_text(_LOG4J)
        whole["log.dirs"] = str(folder / "data")
        (folder / "server.properties").write_text("".join(f"{name}={value}\n" for name, value in whole.items()))
        java = [_java(), "-XX:+UseSerialGC", f"-Dlog4j2.configurationFile={folder / 'log4j2.xml'}"]
        java += ["-cp", f"{libraries}/*"]
        if not jit_full:
            java.insert(1, "-XX:TieredStopAtLevel=1")
        cluster = secrets.token_urlsafe(16)
        formatter = ["kafka.tools.StorageTool", "format", "-t", cluster, "-c", str(folder / "server.properties")]
        _run([*java[:1], "-Xmx128m", *java[1:], *formatter, *format_options], "Kafka could not format its storage")
        node = Kafka(
            bootstrap=f"127.0.0.1:{own}",
            internal=f"127.0.0.1:{own if only else ports[2]}",
            folder=folder,
            command=[*java[:1], f"-Xmx{heap}", "-Xms64m", *java[1:], "kafka.Kafka", str(folder / "server.properties")],
            log_path=folder / "kafka.log",
        )
        try:
            node.start()
            yield node
        finally:
            node.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _serves(address: str) -> bool:
    """Whether a Kafka node answers an ApiVersions request, which every listener does before any authentication."""
    host, port = address.rsplit(":", 1)
    request = struct.pack(">hhih", 18, 0, 1, -1)
    for tls in (False, True):
        try:
            with contextlib.ExitStack() as stack:
                line = stack.enter_context(socket.create_connection((host, int(port)), timeout=2))
                if tls:
                    trusting = ssl.create_default_context()
                    trusting.check_hostname = False
                    trusting.verify_mode = ssl.CERT_NONE
                    line = stack.enter_context(trusting.wrap_socket(line))
                line.sendall(struct.pack(">i", len(request)) + request)
                if len(line.recv(8)) == 8:
                    return True
        except ConnectionRefusedError:
            return False
        except ssl.SSLError as error:
            # A node that wants a certificate from its clients has come far enough to say so.
            return "CERTIFICATE_REQUIRED" in str(error) or "bad certificate" in str(error).lower()
        except OSError:
            continue
    return False


# --- schema registry ----------------------------------------------------------------------------------------------


@dataclass
class Registry:
    """A running schema registry; ``url`` is its Confluent-compatible API."""

    url: str
    log_path: Path


@contextlib.contextmanager
def registry(port: int | None = None) -> Iterator[Registry]:
    """A fresh schema registry that keeps everything in memory (Apicurio), ready to serve; stopped at the end."""
    (jar,) = fetched("registry").glob("*-runner.jar")
    own = port or free_ports(1)[0]
    folder = Path(tempfile.mkdtemp(prefix="bindsnoop-registry-"))
    log_path = folder / "registry.log"
    command = [_java(), "-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"]
    command += ["-Dquarkus.http.host=127.0.0.1", f"-Dquarkus.http.port={own}", "-jar", str(jar)]
    url = f"http://127.0.0.1:{own}/apis/ccompat/v7"
    try:
        with log_path.open("ab") as log:
            process = _spawn(command, folder, log)
        try:
            _wait_ready(process, lambda: _answers(f"{url}/subjects"), "the schema registry", log_path)
            yield Registry(url, log_path)
        finally:
            _end(process)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
