"""The agent under load, and what tracing costs those who bind.

In: ``bindload``, which binds at a given rate and tells how often and at what cost. Out: a ``Result`` a row. The agent
is the real command; what it delivered is read back from the topic, position by position.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pyarrow.compute as pc

from benchmarks.measure import (
    BIN,
    ROOT,
    Failed,
    Result,
    Say,
    Spread,
    cpu_secs,
    environment,
    interleaved,
    rate,
    rss_anon_mib,
)
from pipeline import avro, topic
from pipeline.tracer import open_tracer

LOAD = ROOT / "benchmarks" / "bindload"
SCRIPTS = {tier: ROOT / "benchmarks" / f"bind-{tier}.bt" for tier in ("fexit", "kprobe", "tracepoint")}
FEW = 50
WAIT_SECS = 30.0
STUCK_SECS = 5.0


class Load(NamedTuple):
    """What ``bindload`` says of itself."""

    attempts: int
    seconds: float
    cpu_ns_per_call: float

    @classmethod
    def of(cls, said: str) -> Load:
        """From its line."""
        found = dict(re.findall(r"(\w+)=([0-9.]+)", said))
        return cls(int(found["attempts"]), float(found["seconds"]), float(found["cpu_ns_per_call"]))


def load(**options: object) -> Load:
    """Run it to its end."""
    return Load.of(subprocess.run(_load_command(**options), stdout=subprocess.PIPE, text=True, check=True).stdout)


def _load_command(**options: object) -> list[str]:
    return [str(LOAD), *(part for name, value in options.items() for part in (f"--{name}", str(value)))]


class Agent:
    """A running agent and what it has said."""

    def __init__(self, process: subprocess.Popen[bytes], talk: Path) -> None:
        self.pid = process.pid
        self._process = process
        self._talk = talk

    def said(self) -> str:
        """Everything on standard error so far."""
        return self._talk.read_text(encoding="utf-8", errors="replace")

    def wait_ready(self) -> None:
        """Return when it traces."""
        deadline = time.monotonic() + WAIT_SECS
        while "traces with" not in self.said():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise Failed(f"the agent did not start: {self.said().strip()}")
            time.sleep(0.02)

    def stand_still(self, seconds: float) -> None:
        """It does nothing for so long, and then goes on."""
        self._process.send_signal(signal.SIGSTOP)
        time.sleep(seconds)
        self._process.send_signal(signal.SIGCONT)


@contextlib.contextmanager
def agent(*arguments: object, cpu: int | None = None) -> Iterator[Agent]:
    """``bindsnoop-agent``, tracing when the block begins, stopped in order when it ends. ``cpu`` ties it to one."""
    with tempfile.TemporaryDirectory(prefix="bindsnoop-bench-") as folder:
        talk = Path(folder, "talk")
        command = [*_tied(cpu), BIN / "bindsnoop-agent", "--node", "bench", "--lock", Path(folder, "lock"), *arguments]
        with (
            talk.open("wb") as said,
            subprocess.Popen(
                list(map(str, command)),
                env=environment(BINDSNOOP_SPOOL=str(Path(folder, "spool")), BINDSNOOP_PINS="none"),
                stdout=subprocess.DEVNULL,
                stderr=said,
            ) as process,
        ):
            running = Agent(process, talk)
            try:
                running.wait_ready()
                yield running
            finally:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(60)
                finally:
                    process.kill()
        if process.returncode != 0:
            raise Failed(f"the agent ended with {process.returncode}: {running.said().strip()[-1000:]}")


def _tied(cpu: int | None) -> list[str]:
    # With its whole path, for bpftrace takes nothing else.
    return [] if cpu is None else [shutil.which("taskset") or "taskset", "-c", str(cpu)]


# --- from the ring to the acknowledgement -------------------------------------------------------------------------


class Pause(NamedTuple):
    """The agent stands still for ``secs``, ``after_secs`` from the beginning of the load."""

    after_secs: float
    secs: float


class Carried(NamedTuple):
    """A load, and what became of it. ``delivered`` are its binds in the topic, ``others`` those of anybody else;
    ``holes`` positions are missing there; ``lag_secs`` after the load's end the topic had everything."""

    load: Load
    delivered: int
    others: int
    holes: int
    counts: dict[str, int]
    cpu_us: float
    lag_secs: float

    @property
    def lost(self) -> int:
        """By the stream's own records, in the kernel or later."""
        return sum(count for name, count in self.counts.items() if name.startswith("lost_") or name == "undelivered")

    @property
    def exact(self) -> bool:
        """Attempted is delivered and declared, by three counts that know nothing of each other: what the load says,
        what the kernel has counted, and what is in the topic.

        A few binds of others may be among the lost ones; nobody can say whose they were.
        """
        by_kernel = self.counts["attempted"] - self.counts["faulted"]
        unknown = by_kernel - self.load.attempts - self.others
        return not self.holes and by_kernel == self._in_topic + self.lost and 0 <= unknown <= min(self.lost, FEW)

    @property
    def _in_topic(self) -> int:
        return self.delivered + self.others

    @property
    def whole(self) -> bool:
        """Exact, and nothing is lost."""
        return self.exact and not self.lost


def carried(
    bootstrap: str,
    name: str,
    per_sec: float,
    seconds: float,
    *options: object,
    threads: int = 1,
    pause: Pause | None = None,
) -> Carried:
    """Bind at a rate while an agent with these options publishes to a new topic, then read that topic back.

    With ``pause`` the agent stands still for a while in the middle. What is under way when the load ends is delivered
    before the agent ends; its CPU and the lag are right only when everything arrives.
    """
    with agent("--topic", name, "--bootstrap-servers", bootstrap, "--create-topic", *options) as running:
        _wait_for(bootstrap, name, 1)
        before = cpu_secs(running.pid)
        with subprocess.Popen(
            _load_command(rate=per_sec, seconds=seconds, threads=threads), stdout=subprocess.PIPE, text=True
        ) as binding:
            if pause:
                time.sleep(pause.after_secs)
                running.stand_still(pause.secs)
            assert binding.stdout is not None
            done = Load.of(binding.stdout.read())
        end = time.monotonic()
        if not pause:
            _wait_for(bootstrap, name, done.attempts)
        lag = time.monotonic() - end
        spent = cpu_secs(running.pid) - before
    delivered, others, holes, counts = _read_back(bootstrap, name)
    return Carried(done, delivered, others, holes, counts, spent / done.attempts * 1e6, lag)


def _wait_for(bootstrap: str, name: str, count: int) -> None:
    """Until the topic has so many messages, or is stuck: what is missing then shows when it is read back."""
    from confluent_kafka import Consumer, KafkaException, TopicPartition

    consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": "bench", "log_level": 0})
    held, moved = -1, time.monotonic()
    while held < count and time.monotonic() - moved < STUCK_SECS:
        with contextlib.suppress(KafkaException):
            now = consumer.get_watermark_offsets(TopicPartition(name, 0), timeout=1, cached=False)[1]
            # What a stream says of itself, now and then, is no progress.
            if now > held + 10 or now >= count:
                moved = time.monotonic()
            held = now
        time.sleep(0.02)
    consumer.close()


def _read_back(bootstrap: str, name: str) -> tuple[int, int, int, dict[str, int]]:
    """Binds of the load and of others, missing positions, and the counts of the ``stop`` and ``loss`` records."""
    delivered = binds = seen = 0
    last = -1
    counts: Counter[str] = Counter()
    for part in topic.read(name, topic.settings(bootstrap)):
        if isinstance(part, topic.Unread):
            raise Failed(f"the topic {name} cannot be read back: {part.reason}")
        batch = avro.decode_messages(part.values, lambda _: avro.ours()).batch
        delivered += pc.sum(pc.equal(batch.column("comm"), "bindload")).as_py() or 0
        binds += pc.sum(pc.equal(pc.cast(batch.column("kind"), "string"), "bind")).as_py() or 0
        seen += batch.num_rows
        last = max(last, pc.max(batch.column("pos")).as_py())
        for row in batch.filter(pc.is_in(batch.column("kind"), pc.cast(["stop", "loss"], "string"))).to_pylist():
            told = dict(row["testimony"]["counts"])
            counts.update(told if row["kind"] == "stop" else {"undelivered": told.get("undelivered", 0)})
    return delivered, binds - delivered, last + 1 - seen, dict(counts)


RATE = 100_000
CPU_US = 5.0


def at_rate(bootstrap: str, seconds: float) -> Result:
    """The promised rate."""
    found = carried(bootstrap, "agent", RATE, seconds)
    made = found.load.attempts / found.load.seconds
    said = f"{found.load.attempts:,} attempted, {found.delivered:,} delivered, {found.holes} holes, {found.lost} lost"
    return Result(
        f"{found.cpu_us:.1f} µs",
        "",
        said,
        found.whole and found.cpu_us <= CPU_US and made > 0.98 * RATE,
        f"{rate(made)} for {found.load.seconds:.0f} s; all acknowledged {found.lag_secs:.2f} s after the last bind",
    )


def highest_rate(bootstrap: str, seconds: float, say: Say) -> Result:
    """Steps of a quarter until something is lost, or ``bindload`` can do no more."""
    best, asked, end = 0.0, float(RATE), "bindload can do no more"
    while True:
        found = carried(bootstrap, f"highest-{asked:.0f}", asked, seconds)
        made = found.load.attempts / found.load.seconds
        say(f"asked for {rate(asked)}: {rate(made)}, {found.lost} lost, {found.cpu_us:.1f} µs")
        if not found.whole:
            end = f"at {rate(made)} {found.lost / found.load.attempts:.1%} were lost, declared"
            break
        best = max(best, made)
        if made < 0.9 * asked:
            break
        asked *= 1.25
    return Result(rate(best), "", "", None, f"{seconds:.0f} s a step; {end}")


# --- what tracing costs -------------------------------------------------------------------------------------------

BIND_NS = 1000.0
PER_SEC = 20_000
MODES = {"bind-fails": "fail", "bind-works": "ok"}


def cost(names: Sequence[str], rounds: int, seconds: float, say: Say) -> Iterator[tuple[str, Result]]:
    """CPU that a call takes more while it is traced: by the agent, and by bpftrace.

    The load is tied to one CPU and the tracer to another: what the tracer does there is no part of the call.
    """
    cpus = sorted(os.sched_getaffinity(0))
    tracer_cpu, load_cpu = (cpus[0], cpus[-1]) if len(cpus) > 1 else (None, None)
    lost: list[int] = []
    tier = chosen_tier()
    script = SCRIPTS.get(tier, SCRIPTS["kprobe"])  # bcc looks where kprobes do

    def bind(mode: str) -> list[str]:
        return [*_tied(load_cpu), *_load_command(rate=PER_SEC, seconds=seconds, mode=mode)]

    def untraced(mode: str) -> float:
        return Load.of(subprocess.run(bind(mode), stdout=subprocess.PIPE, text=True, check=True).stdout).cpu_ns_per_call

    def traced(mode: str) -> float:
        with tempfile.TemporaryDirectory(prefix="bindsnoop-bench-") as folder, agent("--files", folder, cpu=tracer_cpu):
            return untraced(mode)

    def bpftrace(mode: str) -> float:
        # It starts the load when it is attached, and ends with it.
        mounts = "mount -t debugfs debugfs /sys/kernel/debug; mount -t tracefs tracefs /sys/kernel/tracing"
        command = [*_tied(tracer_cpu), "bpftrace", "-o", "/dev/null", "-c", " ".join(bind(mode)), str(script)]
        done = subprocess.run(
            ["unshare", "-m", "sh", "-c", f'{mounts}; exec "$@"', "sh", *command],
            capture_output=True,
            text=True,
            check=False,
        )
        if "ns_per_call" not in done.stdout:
            raise Failed(f"bpftrace does not run here: {done.stderr.strip()[-500:]}")
        lost.append(sum(int(count) for count in re.findall(r"Lost (\d+) events", done.stderr)))
        return Load.of(done.stdout).cpu_ns_per_call

    contestants = {
        f"{who.__name__} {name}": partial(who, MODES[name])
        for name in names
        for who in (untraced, traced, *((bpftrace,) if shutil.which("bpftrace") else ()))
    }
    found = interleaved(contestants, rounds, say)
    for name in names:
        bare = found[f"untraced {name}"]
        ours = _added(found[f"traced {name}"], bare)
        beside = _added(found[f"bpftrace {name}"], bare) if f"bpftrace {name}" in found else None
        less = beside is None or ours.median < beside.median
        cheap = name != "bind-fails" or ours.median <= BIND_NS
        yield (
            name,
            Result(
                f"+{ours.text(_us)}",
                f"+{beside.text(_us)}" if beside else "not installed",
                "" if beside is None else f"{ours.median / beside.median:.0%}",
                less and cheap,
                f"tier {tier}; untraced {Spread.of(bare).text(_us)}; {PER_SEC:,} calls a second, of which bpftrace "
                f"lost up to {max(lost, default=0):,} a run",
            ),
        )


def chosen_tier() -> str:
    """The one that ``auto`` comes to on this machine."""
    with contextlib.closing(open_tracer(ring_bytes=1 << 16)) as tracer:
        return tracer.name


def _added(traced: Sequence[float], untraced: Sequence[float]) -> Spread:
    return Spread.of(one - other for one, other in zip(traced, untraced, strict=True))


def _us(ns: float) -> str:
    return f"{ns / 1000:.2f} µs"


# --- how soon it sees -----------------------------------------------------------------------------------------------

FIRST_EVENT_SECS = 0.5


def first_event(rounds: int) -> Result:
    """From the call of the live command to the first bind that it shows, while somebody binds all the time."""
    tier = chosen_tier()
    with subprocess.Popen(_load_command(rate=1000, seconds=3600, mode="ok"), stdout=subprocess.DEVNULL) as binding:
        try:
            chosen, named = (Spread.of(_first_event(name) for _ in range(2 * rounds)) for name in ("auto", tier))
        finally:
            binding.kill()
    return Result(
        chosen.text(_secs),
        "",
        "",
        chosen.median <= FIRST_EVENT_SECS,
        f"`auto` chooses {tier} here; with `--tracer {tier}` {named.text(_secs)}",
    )


def _first_event(tier: str) -> float:
    start = time.monotonic()
    with subprocess.Popen(
        [BIN / "bindsnoop", "-o", "json", "--tracer", tier],
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        first = process.stdout.readline()
        secs = time.monotonic() - start
        process.kill()
    if not first.startswith(b"{"):
        raise Failed(f"the first line of bindsnoop is {first!r}")
    return secs


def _secs(value: float) -> str:
    return f"{value:.2f} s"


# --- memory -------------------------------------------------------------------------------------------------------

MEMORY_PER_SEC = 10_000
MEMORY_MIB = 110.0
FLAT_MIB = 5.0


def memory(bootstrap: str, seconds: float) -> Result:
    """RssAnon of an agent that writes files and publishes, each second; flat is the last quarter beside the second."""
    samples: list[float] = []
    with tempfile.TemporaryDirectory(prefix="bindsnoop-bench-") as folder:
        to = ["--files", folder, "--topic", "memory", "--bootstrap-servers", bootstrap, "--create-topic"]
        with (
            agent(*to) as running,
            subprocess.Popen(_load_command(rate=MEMORY_PER_SEC, seconds=seconds), stdout=subprocess.DEVNULL) as binding,
        ):
            while binding.poll() is None:
                samples.append(rss_anon_mib(running.pid))
                with contextlib.suppress(subprocess.TimeoutExpired):
                    binding.wait(1)
    size = len(samples) // 4
    # The lowest of each: a stall of the machine leaves a step of some MiB for a minute, a leak lifts the floor.
    quarters = [min(samples[size * number : size * (number + 1)]) for number in range(4)]
    grown = quarters[3] - quarters[1]
    return Result(
        f"{max(samples):.0f} MiB at most",
        "",
        f"{grown:+.1f} MiB from the second quarter to the last",
        max(samples) <= MEMORY_MIB and grown <= FLAT_MIB,
        f"{seconds:.0f} s, to files and to a topic; lowest of each quarter "
        f"{', '.join(f'{value:.0f}' for value in quarters)} MiB",
    )
