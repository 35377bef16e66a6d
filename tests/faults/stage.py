"""What every row stands on: one real broker, an agent with topic and spool, and somebody who binds.

Each row has a topic, a spool and a bpffs of its own; the broker is the same for all, and runs again after each. The
agent comes to it as a user with a password, so that rights can be taken from it; whoever counts reads by the listener
without any.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.broker import Kafka, kafka
from tests.commands import Agent, agent_running, bpffs, replay, until
from tests.faults.matrix import Fault, Json, Row, numbers, row

_LOGIN = ["-X", "security.protocol=SASL_PLAINTEXT", "-X", "sasl.mechanism=PLAIN"]
_LOGIN += ["-X", "sasl.username=agent", "-X", "sasl.password=secret"]

_BINDER = """
import signal, socket, sys, time
rate, most = float(sys.argv[1]), int(sys.argv[2])
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
made, number, began = socket.socket(), 0, time.monotonic()
while not stop and (not most or number < most):
    for _ in range(10):
        number += 1
        try: made.bind((f"192.0.2.{number >> 16}", number & 65535))
        except OSError: pass
    time.sleep(max(0.0, began + number / rate - time.monotonic()))
    print(number, flush=True)
"""


class Binder:
    """A process whose attempts are numbered 1, 2, 3 … by the port and the address that they ask for; all fail."""

    def __init__(self, rate: float, most: int = 0) -> None:
        """So many a second, until ``end``, or until there were ``most``."""
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - it lives as long as the process
        self._process = subprocess.Popen([sys.executable, "-c", _BINDER, str(rate), str(most)], stdout=self._said)
        self.pid = self._process.pid

    @property
    def made(self) -> int:
        """How many attempts it has told of."""
        said = os.pread(self._said.fileno(), 64, max(0, os.fstat(self._said.fileno()).st_size - 64)).split(b"\n")
        return int(said[-2]) if len(said) > 1 and said[-2] else 0

    def more(self, count: int) -> None:
        """Return when it has made so many more."""
        target = self.made + count
        until(lambda: self.made >= target, 120)

    def end(self) -> int:
        """Stop it after a whole turn; how many attempts there were."""
        self._process.terminate()
        self._process.wait()
        return self.made

    def close(self) -> None:
        """Make sure that it is gone."""
        self._process.kill()
        self._process.wait()
        self._said.close()


class Stage:
    """What one row works with. ``spool`` is a folder, ``topic`` a name that nobody else uses, not created yet.

    ``said`` is what verification said.
    """

    def __init__(self, fault: Fault, broker: Kafka, topic: str, folder: Path, pins: Path) -> None:
        self.fault = fault
        self.broker, self.topic, self.folder, self.pins = broker, topic, folder, pins
        self.spool = folder / "spool"
        self._outside = ""
        self._binder: Binder | None = None
        self._agents: list[Agent] = []
        self.said = ""

    def bind(self, rate: float = 1000) -> Binder:
        """Somebody binds from the first call on. Nobody sees what is bound before the first agent is attached."""
        self._binder = self._binder or Binder(rate)
        return self._binder

    def close(self) -> None:
        """The binder ends with its row."""
        if self._binder is not None:
            self._binder.close()

    def away_to(self, bootstrap: str) -> None:
        """From now on the topic is at another broker, without users, that has it already."""
        self._outside = bootstrap

    @contextlib.contextmanager
    def agent(self, *extra: str) -> Iterator[Agent]:
        """The agent, with topic and spool; it delivers until it is told to end, and then for 20 s."""
        where = ["--topic", self.topic, "--spool", str(self.spool), "--pins", str(self.pins)]
        if self._outside:
            where += ["--bootstrap-servers", self._outside]
        else:
            where += ["--bootstrap-servers", self.broker.bootstrap, "--create-topic", *_LOGIN]
        with agent_running(*where, *extra, lock=self.folder / "lock") as agent:
            self._agents.append(agent)
            yield agent

    @property
    def talk(self) -> str:
        """What all agents said."""
        return "\n".join(agent.talk for agent in self._agents)

    @property
    def source(self) -> list[str]:
        """The topic, as an argument of replay."""
        return ["--topic", self.topic, "--bootstrap-servers", self._outside or self.broker.internal]

    @property
    def on_disk(self) -> list[str]:
        """What lies in the spool, as an argument of replay; nothing when it is empty."""
        return ["--files", str(self.spool)] if any(self.spool.glob("date=*/*/*.avro*")) else []

    def last(self) -> int:
        """The highest number of the binder in the topic now, 0 while it cannot be read."""
        assert self._binder is not None
        done = replay(*self.source, "-i=false", "-o", "json-full", "--pid", self._binder.pid, "--tail", "1")
        found = [json.loads(line) for line in done.out.splitlines()]
        return max(numbers(found, self._binder.pid), default=0)

    def caught_up(self) -> None:
        """Return when the topic has what is bound now. The order holds, so by then the agent knows of every hole before
        that, and declares it at its end at the latest."""
        assert self._binder is not None
        target = self._binder.made
        until(lambda: self.last() >= target, 90)

    def row(
        self,
        attempted: int,
        *,
        former: Sequence[Json] = (),
        copy: Path | None = None,
        registry: str = "",
    ) -> Row:
        """Count. ``former`` is what was in a topic of this name before, and ``copy`` an archive of that."""
        assert self._binder is not None
        source = [*self.source, *(["--schema-registry", registry] if registry else [])]
        known = {(event["epoch"], event["pos"]) for event in former}
        topic = [*former, *(one for one in events(*source) if (one["epoch"], one["pos"]) not in known)]
        there = self.on_disk
        disk = events(*there) if there else []
        files = [word for word in (*there, *(["--files", str(copy)] if copy else [])) if word != "--files"]
        done = replay(*source, *(["--files", *files] if files else []), "--verify")
        self.said = done.out + done.err
        return row(self.fault, attempted=attempted, pid=self._binder.pid, topic=topic, disk=disk, verify=done.code)


def events(*source: object) -> list[Json]:
    """Everything that replay reads, with the stream's own records; what is damaged is left out."""
    done = replay(*source, "-i=false", "--info", "-o", "json-full")
    assert done.code in (0, 1, 3), done.err
    return [json.loads(line) for line in done.out.splitlines()]


def kill(agent: Agent) -> None:
    """SIGKILL, and wait for the end."""
    agent.process.kill()
    agent.process.wait()


def stopped(agent: Agent) -> None:
    """SIGSTOP; returns when no thread of it runs any more."""
    agent.process.send_signal(signal.SIGSTOP)
    tasks = Path(f"/proc/{agent.process.pid}/task")
    until(lambda: all(" T " in (task / "stat").read_text().rpartition(")")[2] for task in tasks.iterdir()))


def goes_on(agent: Agent) -> None:
    """SIGCONT."""
    agent.process.send_signal(signal.SIGCONT)


def pause(seconds: float) -> None:
    """The fault lasts."""
    time.sleep(seconds)


@contextlib.contextmanager
def guarded() -> Iterator[Kafka]:
    """A broker that asks who comes, and lets everybody do everything that no rule speaks of."""
    plain = "org.apache.kafka.common.security.plain.PlainLoginModule required"
    properties = {
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "allow.everyone.if.no.acl.found": "true",
        "super.users": "User:ANONYMOUS",
        "sasl.enabled.mechanisms": "PLAIN",
        "listener.name.client.plain.sasl.jaas.config": f'{plain} user_agent="secret";',
    }
    with kafka(properties, protocol="SASL_PLAINTEXT") as node:
        yield node


_numbers = itertools.count(1)


@contextlib.contextmanager
def stage(fault: Fault, broker: Kafka) -> Iterator[Stage]:
    """A place for one row."""
    with bpffs() as pins, tempfile.TemporaryDirectory(prefix="bindsnoop-faults-") as folder:
        made = Stage(fault, broker, f"faults-{os.getpid()}-{next(_numbers)}", Path(folder), pins)
        with contextlib.closing(made):
            yield made
