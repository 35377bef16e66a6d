"""bindsnoop-agent: from this node's kernel to files and Kafka, for ever.

In: the ring of the tracer. Out: an archive (``--files``), a topic (``--topic``), or both. ``arrive`` and ``carry`` are
the whole path of a burst, with a delay line between them, where it may wait for the names of its containers; ``run`` is
the loop around it. A batch is on disk, in the archive or in the spool, before the topic gets it and before its records
leave the ring; it waits there until the topic has acknowledged it. Only where the disk refuses it waits in memory. What
a destination could not be given is declared in the stream, as a ``loss`` record with its positions.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import secrets
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from pipeline import config, event, telemetry
from pipeline.errors import BindsnoopError, SinkUnavailable, UsageError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pyarrow as pa

    from pipeline import archive, spool, testimony, topic
    from pipeline.tracer import Burst, Tracer
    from pipeline.workloads import Directory, Source


_REFUSED_BYTES = 64 << 20
"""How much is kept of what a topic refuses for itself."""

_CHECKPOINT_SPAN = 20_000
"""How many records before the last one are looked through for a checkpoint, at first."""

_SETTLE_TURNS = 100
"""How often a ring is read until nothing came meanwhile, under a load that does not end."""

_IDLE_SECS = 0.5
"""How often an agent looks around while nobody binds: whether it is to stop, and what its destinations want."""


class Batch(NamedTuple):
    """Encoded records: ``datums`` one Avro datum each, ``times`` timestamp[us], ``first_pos`` the pos of the first."""

    datums: pa.BinaryArray
    times: pa.Array
    first_pos: int

    @property
    def last_pos(self) -> int:
        """Pos of the last record."""
        return self.first_pos + len(self.datums) - 1


class Undelivered(NamedTuple):
    """Records that a destination will not get: positions, both included, and the cause. ``epoch`` where it is not the
    present one."""

    first_pos: int
    last_pos: int
    cause: str
    epoch: str = ""


class Sink(Protocol):
    """A destination. ``put`` never waits for one that is away; what was given up for that comes out of ``tick``."""

    name: str

    def put(self, batch: Batch, *, on_disk: bool) -> bool:
        """Take the batch; return when it is as safe as this destination makes it, and whether it is on disk now.

        ``on_disk``: a sink before this one has it there.
        """

    def tick(self) -> list[Undelivered]:
        """Called at every turn of the loop: rotate, retry, and say what was given up since the last call."""

    def declared(self) -> None:
        """Everything that was given up so far is declared in records that every sink has."""

    def close(self, budget_secs: float) -> int:
        """Deliver what is left within the budget; return how many records were not and are not on disk."""


class Files:
    """The archive as a sink. While the disk refuses, batches are held up to ``hold_bytes``, then the oldest goes.

    ``opened`` makes the writer. A ``spool`` is no destination: nobody is told what it could not be given, and a disk
    that refuses from the beginning is asked again.
    """

    def __init__(
        self,
        opened: Callable[[], archive.Writer],
        directory: Path,
        hold_bytes: int,
        log: telemetry.Log,
        *,
        spool: bool = False,
    ) -> None:
        """SinkUnavailable when the archive cannot be opened, but for a spool."""
        self.name = f"{'spool' if spool else 'files'} {directory}"
        self._opened = opened
        self._spool = spool
        self._writer: archive.Writer | None = None
        self._hold_bytes = hold_bytes
        self._log = log
        self._held: deque[Batch] = deque()
        self._held_bytes = 0
        self._refused: str | None = None
        self._given_up: list[Undelivered] = []
        try:
            self._writer = opened()
        except SinkUnavailable as error:
            if not spool:
                raise
            self._away(error)

    def put(self, batch: Batch, *, on_disk: bool) -> bool:  # noqa: ARG002 - it is the disk
        """Write the batch to disk, behind what is held."""
        self._held.append(batch)
        self._held_bytes += batch.datums.nbytes
        self._write()
        safe = not self._held
        while self._held_bytes > self._hold_bytes and len(self._held) > 1:
            oldest = self._held.popleft()
            self._held_bytes -= oldest.datums.nbytes
            self._given_up.append(Undelivered(oldest.first_pos, oldest.last_pos, self._refused or "not written"))
        return safe

    def tick(self) -> list[Undelivered]:
        """Rotate segments, delete what retention ends, and say what was given up."""
        if self._held or self._writer is None:
            self._write()
        else:
            try:
                for gone in self._writer.tick():
                    self._say_gone(gone)
            except SinkUnavailable as error:
                self._away(error)
        given_up, self._given_up = self._given_up, []
        return [] if self._spool else given_up

    def _say_gone(self, gone: archive.Retired) -> None:
        where = {"path": gone.path, "epoch": gone.epoch, "first_pos": gone.first_pos, "records": gone.count}
        if gone.unsent:
            why = "on a full disk" if gone.full else "as the largest size or age says"
            self._log.error(f"A segment was deleted {why}, and the topic has not acknowledged all of it.", **where)
        elif gone.full:
            self._log.warn("A segment was deleted to make room on a full disk.", **where)
        elif not self._spool:
            self._log.info("A segment was deleted, as --keep-bytes and --keep-age say.", **where)

    def declared(self) -> None:
        """Nothing waits for that."""

    def close(self, budget_secs: float) -> int:  # noqa: ARG002 - a disk answers at once or not at all
        """Close the segment; what is still held is lost."""
        self._write()
        try:
            if self._writer is not None:
                self._writer.close()
        except SinkUnavailable as error:
            self._away(error)
        return 0 if self._spool else sum(len(batch.datums) for batch in self._held)

    def _write(self) -> None:
        try:
            if self._writer is None:
                self._writer = self._opened()
            while self._held:
                batch = self._held[0]
                self._writer.write(batch.datums, batch.first_pos, batch.times)
                self._held_bytes -= self._held.popleft().datums.nbytes
        except SinkUnavailable as error:
            self._away(error)
        else:
            if self._refused is not None:
                self._log.info("The archive can be written again.", files=self.name)
                self._refused = None

    def _away(self, error: SinkUnavailable) -> None:
        if self._refused is None:
            self._log.error(str(error), files=self.name)
        self._refused = str(error)


class Topic:
    """A Kafka topic as a sink: a queue, on disk where there is an archive, and a thread that delivers it in order.

    How far the topic has acknowledged is kept beside the archive. It is written only when all that will not be in the
    topic before that place is declared: else a crash would leave a hole that nobody declares.
    """

    def __init__(self, make: Callable[[Topic], topic.Delivery], name: str, epoch: str, log: telemetry.Log) -> None:
        self.name = f"topic {name}"
        self._epoch = epoch
        self._log = log
        self._acknowledged: spool.Acknowledged | None = None
        self._behind: spool.Waiting | None = None
        self._at: spool.Place | None = None
        self._undeclared = False
        self._delivery = make(self)

    def keep(self, acknowledged: spool.Acknowledged, behind: Sequence[spool.Waiting]) -> None:
        """From now on write how far it is; ``behind`` is what an earlier life left, and goes first."""
        self._behind = behind[-1] if behind else None
        self._delivery.put_before(behind)
        self._acknowledged = acknowledged

    def reached(self, epoch: str, pos: int) -> None:
        """The topic has everything up to there, or will never have it. For the thread that delivers."""
        from pipeline import spool

        place = spool.Place(epoch, pos)
        if self._behind is not None:
            last = spool.Place(self._behind.epoch, self._behind.last_pos)
            if place > last:
                return  # was on its way when an older epoch was put before it
            if place == last:
                self._behind = None
        self._at = place

    def put(self, batch: Batch, *, on_disk: bool) -> bool:
        """Queue the batch. When memory is full it waits on disk; the oldest that is not there is given up."""
        self._delivery.put(batch.datums, batch.first_pos, epoch=self._epoch, on_disk=on_disk)
        return False

    def tick(self) -> list[Undelivered]:
        """What was given up or refused since the last call."""
        at = self._at  # before the question what was dropped: all of that lies before it
        dropped = self._delivery.take_dropped()
        self._undeclared |= bool(dropped)
        if at is not None and not self._undeclared:
            self._write(at)
        return [
            Undelivered(gone.first_pos, gone.last_pos, gone.reason, "" if gone.epoch == self._epoch else gone.epoch)
            for gone in dropped
        ]

    def declared(self) -> None:
        """What the topic will not have is said: the place behind it may be written."""
        self._undeclared = False

    def close(self, budget_secs: float) -> int:
        """Deliver what is queued within the budget; what is on disk waits for the next life."""
        left = self._delivery.drain(budget_secs)
        queued = self._delivery.stats().queued
        if queued > left:
            self._log.info("Records wait on disk for the next start.", destination=self.name, records=queued - left)
        if self._at is not None and not self._delivery.take_dropped() and not self._undeclared:
            self._write(self._at, now=True)
        return left

    def _write(self, at: spool.Place, *, now: bool = False) -> None:
        if self._acknowledged is not None:
            self._acknowledged.reached(at)
            # A disk that refuses is said by the archive; what is not noted is sent again.
            with contextlib.suppress(SinkUnavailable):
                self._acknowledged.tick(now=now)


class Clock:
    """Wall clock and boot clock of the kernel; ``offset_ns`` is what turns the second into the first, measured now."""

    def offset_ns(self) -> int:
        """Nanoseconds from CLOCK_BOOTTIME to UTC."""
        # The reading of the wall clock lies between two of the boot clock: half their distance is the largest error.
        before = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        wall = time.time_ns()
        after = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        return wall - (before + after) // 2

    def now_us(self) -> int:
        """UTC, microseconds since 1970."""
        return time.time_ns() // 1000


def arrive(burst: Burst, offset_ns: int) -> pa.RecordBatch:
    """The first half of the path: from the kernel's records to events that know the id of their container."""
    from pipeline import enrich, records

    batch = records.decode(burst.records, offset_ns)
    return enrich.enrich(batch)


def carry(
    batch: pa.RecordBatch, directory: Directory, stream: testimony.Stream
) -> tuple[pa.RecordBatch, Iterable[str]]:
    """The second half: from there to named and numbered events, and the ids that have no name yet."""
    from pipeline import enrich

    batch, unnamed = enrich.name(batch, directory.get)
    return stream.number(batch), unnamed


class Unnamed:
    """Containers whose events went on with the id alone, so that the stream tells their names when they are known."""

    _MOST = 10_000

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._ids: dict[str, None] = {}
        self._seen = directory.changes

    def note(self, ids: Iterable[str]) -> None:
        """These have no name; beyond ten thousand the oldest is forgotten."""
        for container_id in ids:
            self._ids[container_id] = None
            if len(self._ids) > self._MOST:
                del self._ids[next(iter(self._ids))]

    def named(self) -> list[tuple[str, event.Workload]]:
        """Those that have one since the last call, each once."""
        if self._seen == self._directory.changes:
            return []
        self._seen = self._directory.changes
        found = [(name, workload) for name in self._ids if (workload := self._directory.get(name)) is not None]
        for container_id, _ in found:
            del self._ids[container_id]
        return found


class Rarely:
    """Counts what is noted and says the sum at most every ten seconds: a flood of losses must not be one of lines."""

    _EVERY_SECS = 10.0

    def __init__(self, say: Callable[[int], None]) -> None:
        self._say = say
        self._count = 0
        self._due = 0.0

    def note(self, count: int, monotonic: float) -> None:
        """So many more; said now if nothing was said for a while."""
        self._count += count
        if self._count and monotonic >= self._due:
            self._due = monotonic + self._EVERY_SECS
            self.rest()

    def rest(self) -> None:
        """Say what has not been said."""
        if self._count:
            self._say(self._count)
            self._count = 0


class Ledger:
    """What one destination was not given and the stream has not yet told it; neighbouring ranges are one.

    A declaration is a record like any other and may be given up too. What it said is then said again.
    """

    def __init__(self) -> None:
        self._gaps: list[Undelivered] = []
        self._declared: list[tuple[int, Undelivered]] = []

    def add(self, gaps: Iterable[Undelivered]) -> None:
        """Note what the destination gave up, oldest first."""
        for gap in gaps:
            if not gap.epoch:
                for pos, said in self._declared:
                    if gap.first_pos <= pos <= gap.last_pos:
                        self._note(said)
                # Batches are given up oldest first: what was declared before this one has arrived.
                self._declared = [(pos, said) for pos, said in self._declared if pos > gap.last_pos]
            self._note(gap)

    def take(self) -> list[Undelivered]:
        """Everything that is to be declared now."""
        gaps, self._gaps = self._gaps, []
        return gaps

    def declared(self, gap: Undelivered, pos: int) -> None:
        """The record at ``pos`` declares ``gap``."""
        self._declared.append((pos, gap))

    def _note(self, gap: Undelivered) -> None:
        last = self._gaps[-1] if self._gaps else None
        if last and (last.epoch, last.cause, last.last_pos + 1) == (gap.epoch, gap.cause, gap.first_pos):
            self._gaps[-1] = last._replace(last_pos=gap.last_pos)
        else:
            self._gaps.append(gap)


class Former(NamedTuple):
    """What a former agent left: how many attempts it ``read``, and the bursts that wait in the ring, decoded.

    Those that its archive has are left out. ``missing`` is how many had left the ring and are not on disk. ``counted``
    are the tracer's counts of what an earlier epoch accounts for.
    """

    read: int
    waiting: Sequence[tuple[pa.RecordBatch, Burst]]
    missing: int
    counted: Mapping[str, int] = {}

    @property
    def rows(self) -> int:
        """How many records wait."""
        return sum(batch.num_rows for batch, _ in self.waiting)


def waiting_in(tracer: Tracer, clock: Clock, last: Mapping[str, object], read: int) -> Former:
    """Everything in the ring behind ``last``, the last record on disk, after ``read`` attempts that are on disk.

    An agent that dies between the disk and the ring leaves the same records in both: the last one on disk tells how
    many. What left the ring and is not on disk is missing from the count of those that were submitted.
    """
    import pyarrow.compute as pc

    found: list[tuple[pa.RecordBatch, Burst]] = []
    for _ in range(_SETTLE_TURNS):
        submitted = tracer.counters()["submitted"]
        while (burst := tracer.read(0)) is not None:
            found.append((arrive(burst, clock.offset_ns()), burst))
        if tracer.counters()["submitted"] == submitted:
            break
    for place, (batch, _) in enumerate(found if last["kind"] == "bind" else ()):
        same = pc.and_(*(pc.equal(batch.column(name), last[name]) for name in ("boottime_ns", "tid")))
        row = pc.index(same, True).as_py()
        if row >= 0:
            for _, burst in found[:place]:
                tracer.release(burst)
            found = found[place:]
            found[0] = (batch.slice(row + 1), found[0][1])
            break
    former = Former(read, found, 0)
    return former._replace(missing=max(0, submitted - read - former.rows))


def run(
    tracer: Tracer,
    stream: testimony.Stream,
    sinks: Sequence[Sink],
    *,
    directory: Directory,
    clock: Clock,
    log: telemetry.Log,
    stopping: Callable[[], bool],
    max_delay_secs: float,
    name_delay_secs: float,
    budget_secs: float,
    start_message: str,
    former: Former | None = None,
    begins: bool = True,
    ends: bool = True,
) -> int:
    """Carry bursts until ``stopping``; return how many records some destination did not get in the end.

    The stream ``begins`` here with a ``start`` record, and ``ends`` with a ``stop``, or another life goes on with it.
    """
    from pipeline import avro
    from pipeline.delay import DelayLine

    read = former.read if former is not None else 0
    line: DelayLine[Burst] = DelayLine(lambda name: directory.get(name) is not None, name_delay_secs)
    unnamed = Unnamed(directory)
    ledgers = [(sink, Ledger(), _undelivered_line(sink, log)) for sink in sinks]
    lost_line = Rarely(lambda count: log.error("Attempts were lost before they could be read.", attempts=count))

    def counters() -> Mapping[str, int]:
        counted = former.counted if former is not None else {}
        return {name: count - counted.get(name, 0) for name, count in tracer.counters().items()} | {"read": read}

    def emit(numbered: pa.RecordBatch) -> None:
        batch = Batch(avro.encode(numbered), numbered.column("time"), numbered.column("pos")[0].as_py())
        stream.sealed(batch.datums)
        on_disk = False
        for sink in sinks:
            on_disk |= sink.put(batch, on_disk=on_disk)

    def take(timeout_secs: float, idle_secs: float = 0.0) -> bool:
        # While records wait in the ring the kernel does not wake anybody for the next one.
        burst = tracer.read(timeout_secs, 0.0 if line else idle_secs)
        if burst is not None:
            line.put(arrive(burst, clock.offset_ns()), burst, time.monotonic())
        pass_on(tracer.half_full())
        return burst is not None

    def pass_on(pressed: bool) -> None:
        nonlocal read
        for batch, burst in line.ready(time.monotonic(), pressed=pressed):
            numbered, without = carry(batch, directory, stream)
            emit(numbered)
            tracer.release(burst)
            unnamed.note(without)
            read += batch.num_rows
        for container_id, workload in unnamed.named():
            emit(stream.workload(clock.now_us(), container_id, workload))

    def tick() -> None:
        for sink, ledger, _ in ledgers:
            ledger.add(sink.tick())

    def declare() -> None:
        tick()
        for sink, ledger, said in ledgers:
            for gap in ledger.take():
                ledger.declared(gap, stream.next_pos)
                said.note(gap.last_pos - gap.first_pos + 1, time.monotonic())
                emit(
                    stream.undelivered(
                        clock.now_us(), sink.name, gap.cause, gap.first_pos, gap.last_pos, epoch=gap.epoch
                    )
                )
            sink.declared()

    def close_interval(batches: Iterable[pa.RecordBatch]) -> None:
        for batch in batches:
            lost_line.note(stream.lost_in(batch), time.monotonic())
            emit(batch)

    if begins:
        emit(stream.start(clock.now_us(), start_message, counters()))
    if former is not None:
        if former.missing:
            emit(stream.missing(clock.now_us(), former.missing))
        for batch, burst in former.waiting:
            line.put(batch, burst, time.monotonic())
        pass_on(tracer.half_full())
    while not stopping():
        take(max_delay_secs, _IDLE_SECS)
        tick()
        if stream.due(time.monotonic()):
            declare()
            close_interval(stream.checkpoint(clock.now_us(), time.monotonic(), counters()))

    if ends:
        # What was bound until now is in the ring, and nothing comes after it.
        tracer.detach()
        while take(0):
            pass
        pass_on(True)
        declare()
        close_interval(stream.stop(clock.now_us(), time.monotonic(), counters(), "the agent was stopped"))
    else:
        # The next agent goes on with what comes from here on.
        take(0)
        pass_on(True)
        declare()
        close_interval(stream.checkpoint(clock.now_us(), time.monotonic(), counters()))
    for rarely in (lost_line, *(said for _, _, said in ledgers)):
        rarely.rest()
    deadline = time.monotonic() + budget_secs
    left = 0
    for sink in sinks:
        missing = sink.close(max(0.0, deadline - time.monotonic()))
        left += missing
        if missing:
            log.error("Records were not delivered before the agent had to end.", destination=sink.name, records=missing)
    return left


def _undelivered_line(sink: Sink, log: telemetry.Log) -> Rarely:
    sentence = "Records were given up for a destination, and declared in the stream."
    return Rarely(lambda count: log.error(sentence, destination=sink.name, records=count))


def start_message(tracer: Tracer) -> str:
    """One sentence for the ``start`` record: the program, the tracer, and what this tracer cannot see.

    Who reads it years later finds the gaps by ``gaps=([a-z0-9_,-]*)``, and what each means in docs/tracing.md.
    """
    from pipeline import __version__

    program = f"bindsnoop {__version__} traces with {tracer.name} ({', '.join(tracer.hooks)})"
    return "; ".join((program, f"not seen are gaps={','.join(tracer.gaps)}", *tracer.notes))


def framing(settings: config.AgentConfig) -> Callable[[pa.BinaryArray], list[bytes]]:
    """How datums become messages: Confluent framing with a registry, Avro's single-object framing without.

    The registry is asked when the first batch is sent, not at start: one that is down delays delivery, never capture.
    """
    from pipeline import avro, registry

    if settings.schema_registry is None:
        return avro.single_object
    known = registry.Registry(settings.schema_registry)
    subject = f"{settings.topic}-value"
    ids: list[int] = []

    def frame(datums: pa.BinaryArray) -> list[bytes]:
        if not ids:
            ask = known.register if settings.register_schema else known.lookup
            ids.append(ask(subject, event.schema_text()))
        return avro.confluent(datums, ids[0])

    return frame


def unpack(block: archive.Block) -> tuple[npt.NDArray[np.int64], pa.BinaryArray]:
    """Positions and datums of a block of the archive, as they were when it was written. Damaged."""
    from pipeline import avro

    batch = avro.decode_block(block.payload, block.count, avro.admit(block.schema_text))
    return batch.column("pos").to_numpy(), avro.encode(batch)


def sinks_of(settings: config.AgentConfig, epoch: str, log: telemetry.Log) -> list[Sink]:
    """The destinations that the settings name; what is written to disk comes first."""
    made: list[Sink] = []
    to_topic = None if settings.topic is None else _topic_of(settings, settings.topic, epoch, log)
    directory = _store_of(settings)
    if directory is not None:
        opened = functools.partial(_open_store, settings, directory, epoch, to_topic, log)
        made.append(Files(opened, directory, settings.queue_bytes, log, spool=settings.files is None))
    if to_topic is not None:
        made.append(to_topic)
    return made


def _store_of(settings: config.AgentConfig) -> Path | None:
    """Where batches are written before they are sent: the archive that was asked for, else the spool."""
    return settings.files or (settings.spool if settings.topic is not None else None)


def _open_store(
    settings: config.AgentConfig, directory: Path, epoch: str, to_topic: Topic | None, log: telemetry.Log
) -> archive.Writer:
    """The writer, and behind it what an earlier life has left for the topic. SinkUnavailable."""
    from pipeline import spool

    own = settings.files is None
    acknowledged = None
    if to_topic is not None:
        acknowledged = spool.Acknowledged(
            directory,
            node=settings.node,
            topic=settings.topic or "",
            last_pos=lambda segment: spool.last_position(segment, unpack),
        )
    writer = _writer(settings, directory, epoch, acknowledged)
    if to_topic is not None and acknowledged is not None:
        if acknowledged.damage is not None:
            log.warn(f"{acknowledged.damage.rstrip('.')}; everything that is there is sent again.")
        # An archive that never had this topic is none of its backlog.
        new = acknowledged.at is None and acknowledged.damage is None and not own
        after = spool.Place(epoch, -1) if new else acknowledged.at
        behind = spool.left_by_earlier_lives(directory, settings.node, after, unpack)
        if behind:
            count = sum(waiting.last_pos - waiting.first_pos + 1 for waiting in behind)
            log.info("Records of an earlier life wait on disk and are sent first.", records=count)
        to_topic.keep(acknowledged, behind)
        if behind:
            acknowledged.reached(spool.Place(behind[0].epoch, behind[0].first_pos - 1))
        else:
            acknowledged.reached(max(acknowledged.at or spool.Place("", -1), spool.Place(epoch, -1)))
        acknowledged.tick(now=True)
    return writer


def _writer(
    settings: config.AgentConfig, directory: Path, epoch: str, receipt: spool.Acknowledged | None
) -> archive.Writer:
    from pipeline import archive

    own = settings.files is None
    return archive.Writer(
        directory,
        node=settings.node,
        epoch=epoch,
        segment_bytes=min(settings.segment_bytes, settings.spool_bytes // 8) if own else settings.segment_bytes,
        segment_secs=settings.segment_age,
        keep_bytes=settings.spool_bytes if own else settings.keep_bytes,
        keep_secs=settings.spool_age if own else settings.keep_age,
        receipt=receipt,
        spool=own and receipt is not None,
        now=time.time,
    )


def _topic_of(settings: config.AgentConfig, name: str, epoch: str, log: telemetry.Log) -> Topic:
    from pipeline import spool, topic

    client = topic.settings(settings.bootstrap_servers, settings.properties, settings.properties_file)
    create = topic.Creation(partitions=1) if settings.create_topic else None
    # The publisher and whoever retries it say the same of a broker that is away, at every attempt.
    say = telemetry.Sparing(log.say)
    publisher = topic.Publisher(name, client, key=settings.node, create=create, say=say)
    directory = _store_of(settings)

    def make(sink: Topic) -> topic.Delivery:
        return topic.Delivery(
            publisher,
            frame=framing(settings),
            queue_bytes=settings.queue_bytes,
            linger_secs=settings.linger,
            say=say,
            backlog=None if directory is None else spool.Backlog(directory, settings.node, unpack),
            reached=sink.reached,
            refused=functools.partial(_set_aside, settings, directory, log),
        )

    return Topic(make, name, epoch, log)


def _set_aside(
    settings: config.AgentConfig,
    directory: Path | None,
    log: telemetry.Log,
    epoch: str,
    positions: Sequence[int],
    messages: Sequence[bytes],
    reason: str,
) -> None:
    """Writes messages that the topic refuses for themselves into an archive of their own, below ``refused``."""
    from pipeline import archive, avro

    said = {"epoch": epoch, "first_pos": positions[0], "records": len(positions)}
    if directory is None:
        log.error(f"{reason}; there is no --spool to set them aside in.", **said)
        return
    batch = avro.decode_messages(list(messages), lambda _: avro.ours()).batch
    try:
        writer = archive.Writer(
            directory / "refused", node=settings.node, epoch=epoch, keep_bytes=_REFUSED_BYTES, now=time.time
        )
        # Their positions have holes, and a segment is named by its first.
        writer.write(avro.encode(batch), positions[0], batch.column("time"))
        writer.close()
        writer.retire()
    except SinkUnavailable as error:
        log.error(f"{reason}; they cannot be set aside: {error}", **said)  # noqa: TRY400 - one sentence
    else:
        log.error(f"{reason}; they are set aside.", path=directory / "refused", **said)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``bindsnoop-agent``."""
    try:
        settings = config.parse("agent", sys.argv[1:] if argv is None else argv, os.environ)
    except UsageError as error:
        print(f"bindsnoop-agent: {event.one_line(str(error))}", file=sys.stderr)
        return error.exit_code
    if settings.probe:
        return _probe(settings)
    if settings.unpin:
        return _unpin(settings)
    log = telemetry.Log(settings.log_level, sys.stderr)
    stops: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda signum, _frame: stops.append(signum))
    try:
        return _main(settings, log, lambda: bool(stops))
    except BindsnoopError as error:
        log.error(str(error))  # noqa: TRY400 - one sentence, never a traceback
        return error.exit_code


def _probe(settings: config.AgentConfig) -> int:
    from pipeline.tracer import probe

    report = probe.report(settings.tracer, settings.pins)
    sys.stdout.write(probe.as_json(report) if settings.output == "json" else probe.as_text(report))
    return 0 if report.chosen else 2


def _unpin(settings: config.AgentConfig) -> int:
    from pipeline import tracer

    assert settings.pins is not None
    try:
        removed = tracer.unpin(settings.pins, settings.lock)
    except BindsnoopError as error:
        print(f"bindsnoop-agent: {event.one_line(str(error))}", file=sys.stderr)
        return error.exit_code
    for what in removed:
        print(f"removed from {settings.pins}: {event.one_line(what)}")
    if not removed:
        print(f"nothing is pinned below {settings.pins}")
    return 0


def former_records(directory: Path, node: str, epoch: str) -> tuple[pa.RecordBatch, pa.BinaryArray] | None:
    """The last records of an epoch on disk, from its last checkpoint on, and what they are written as.

    None when nothing of it is there, or what is there has a hole.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    from pipeline import avro, spool

    # Nothing of earlier epochs is looked at: there may be years of them.
    there = spool.left_by_earlier_lives(directory, node, spool.Place(epoch, -1), unpack)
    if not there or there[0].epoch != epoch:
        return None
    _, lowest, last = there[0]
    span = _CHECKPOINT_SPAN
    while True:
        first = max(lowest, last - span)
        backlog, at = spool.Backlog(directory, node, unpack), first
        parts: list[spool.Part] = []
        while at <= last:
            part = backlog.read(epoch, at, last)
            parts = [] if part.reason else [*parts, part]
            at = part.last_pos + 1
        if not parts:
            return None
        datums = pa.concat_arrays([part.datums for part in parts])
        batch = avro.decode(datums.to_pylist()).batch
        heads = pc.is_valid(pc.struct_field(batch.column("testimony"), "head")).to_numpy(zero_copy_only=False)
        if heads.any():
            place = int(heads.nonzero()[0][-1])
            return batch.slice(place), datums.slice(place)
        if first == lowest:
            return (batch, datums) if batch.column("pos")[0].as_py() == 0 else None
        span *= 8


def _main(settings: config.AgentConfig, log: telemetry.Log, stopping: Callable[[], bool]) -> int:
    from pipeline.tracer import open_tracer

    sign = None
    if settings.signing_key is not None:
        from pipeline import keys

        sign = keys.signer(settings.signing_key)
    clock = Clock()
    store = _store_of(settings)

    asked_ms = 0

    def fresh_epoch(earlier_ms: int = 0) -> str:
        return event.new_epoch(asked_ms - earlier_ms, secrets.randbits(16))

    def opened(*, resume: bool = True) -> Tracer:
        nonlocal asked_ms
        asked_ms = clock.now_us() // 1000
        return open_tracer(
            settings.tracer,
            ring_bytes=settings.ring_bytes,
            exclusive=True,
            lock_path=settings.lock,
            # Only who knows what of a ring is on disk can take it over.
            pins=settings.pins if store is not None else None,
            epoch=fresh_epoch(),
            resume=resume,
        )

    # Before all else: from here on the kernel keeps what is bound while the rest is loaded.
    tracer = opened()
    sources: Sequence[Source] = ()
    try:
        from pipeline import avro, testimony, workloads

        # Messages come and go by the thousand and are never part of a cycle; nothing is gained by looking for one.
        gc.set_threshold(200_000, 50, 50)
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()

        def stream_of(epoch: str) -> testimony.Stream:
            return testimony.Stream(
                settings.node,
                epoch,
                boot_id=boot_id,
                monotonic=time.monotonic(),
                schema=avro.ours().sha256,
                sign=sign,
                checkpoint_records=settings.checkpoint_records,
                checkpoint_secs=settings.checkpoint_age,
            )

        def taken_up(old: Tracer) -> tuple[testimony.Stream, Former | None]:
            """The stream that goes on with what ``old`` has recorded; None when nobody can say where it was."""
            stream = stream_of(old.epoch)
            assert store is not None
            try:
                found = _recovered(store, settings, old.epoch)
            except LookupError:
                # Its agent died before it wrote anything: if it had read nothing either, the epoch begins only now.
                return stream, waiting_in(old, clock, {"kind": ""}, 0)
            if found is None:
                return stream, None
            batch, datums = found
            try:
                read = stream.resume(batch, datums)
            except ValueError:
                return stream, None
            return stream, waiting_in(old, clock, batch.slice(batch.num_rows - 1).to_pylist()[0], read)

        def read_out(old: Tracer, stream: testimony.Stream, former: Former | None) -> None:
            begins = stream.next_pos == 0
            if former is None or former.missing:
                begins = True
                # The same positions must not be given twice, and nobody knows which were.
                missing = former.missing if former is not None else 0
                # And epochs sort by time: this one comes before that of the tracer that takes over.
                stream = stream_of(fresh_epoch(len(tracer.before) - list(tracer.before).index(old)))
                former = former or waiting_in(old, clock, {"kind": ""}, 0)
                counts = old.counters()
                lost = sum(count for name, count in counts.items() if name.startswith(testimony.LOST))
                rest = lost + counts["faulted"] + former.rows
                counted = {"attempted": counts["attempted"] - rest, "submitted": counts["submitted"] - former.rows}
                former = former._replace(read=0, missing=missing, counted=counted)
            _read_out(old, stream, former, settings, clock, log, begins=begins)

        former: Former | None = None
        for old in tracer.before:
            read_out(old, *taken_up(old))
        if tracer.resumed:
            stream, former = taken_up(tracer)
            if former is None or former.missing:
                # Another one begins before this one ends, so that no bind falls between them.
                tracer.close()
                tracer, former = opened(resume=False), None
                for old in tracer.before:
                    read_out(old, *taken_up(old))
        if former is None:
            stream = stream_of(tracer.epoch)
        sinks = sinks_of(settings, stream.epoch, log)
        directory = workloads.Directory()
        sources = workloads.open_sources(
            settings.workloads,
            directory,
            node=settings.node,
            kubeconfig=settings.kubeconfig,
            docker_sockets=settings.docker_sockets,
            podman_storage=settings.podman_storage,
            say=telemetry.Sparing(log.say),
        )
        message = start_message(tracer)
        log.info(
            message,
            node=settings.node,
            epoch=stream.epoch,
            to=", ".join(sink.name for sink in sinks),
            names=", ".join(source.name for source in sources) or "none",
        )
        if former is not None and stream.next_pos:
            log.info("The epoch of a former agent goes on.", from_pos=stream.next_pos, waited_in_the_ring=former.rows)
        left = run(
            tracer,
            stream,
            sinks,
            directory=directory,
            clock=clock,
            log=log,
            stopping=stopping,
            max_delay_secs=settings.max_delay,
            name_delay_secs=settings.name_delay if sources else 0.0,
            budget_secs=settings.shutdown,
            start_message=message,
            former=former,
            begins=stream.next_pos == 0,
            ends=not tracer.pinned,
        )
        log.info("The agent has stopped.", records=stream.next_pos, undelivered=left)
        return 3 if left else 0
    finally:
        tracer.close()
        for source in sources:
            source.close()


def _recovered(store: Path, settings: config.AgentConfig, epoch: str) -> tuple[pa.RecordBatch, pa.BinaryArray] | None:
    """``former_records`` of an archive whose last file is cut to its last whole block; None when it cannot be read.

    LookupError when it has no file of this epoch.
    """
    from pipeline import archive

    with contextlib.suppress(SinkUnavailable):
        # A disk that refuses to be written may still be read; what follows there waits in memory.
        archive.Writer(store, node=settings.node, epoch=epoch, now=time.time)
    try:
        if not any(segment.epoch == epoch for segment in archive.segments(store, settings.node)):
            raise LookupError(epoch)
        return former_records(store, settings.node, epoch)
    except OSError:
        return None


def _read_out(
    old: Tracer,
    stream: testimony.Stream,
    former: Former,
    settings: config.AgentConfig,
    clock: Clock,
    log: telemetry.Log,
    *,
    begins: bool,
) -> None:
    """Writes what a tracer of a former agent has recorded to disk, and ends it; the topic gets it from there."""
    from pipeline.workloads import Directory

    store = _store_of(settings)
    assert store is not None
    log.info("What a former agent's tracer has recorded is read out.", tracer=old.name, epoch=stream.epoch)
    if former.missing:
        log.error("Records had left the ring and are not on disk.", records=former.missing)
    files = Files(lambda: _writer(settings, store, stream.epoch, None), store, settings.queue_bytes, log, spool=True)
    old.detach()
    run(
        old,
        stream,
        [files],
        directory=Directory(),
        clock=clock,
        log=log,
        stopping=lambda: True,
        max_delay_secs=0.0,
        name_delay_secs=0.0,
        budget_secs=0.0,
        start_message=start_message(old),
        former=former,
        begins=begins,
    )
    old.close()
