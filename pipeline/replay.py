"""bindsnoop-replay: from a topic or files to columns, JSON or a count; read-only, bounded at start.

In: a topic (``--topic``), files (``--files``), or both, the topic first. Out: text on standard output, each event once;
everything else on standard error. ``found`` is the whole reading path, ``show`` the whole printing path; ``evidence``
and ``verify`` are those of ``--verify``. What could not be read is said, with its place and the reason, and ends the
command with 3; it never stops what can still be read.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import os
import re
import signal
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple, TypeVar

from pipeline import config, event, telemetry
from pipeline.errors import BindsnoopError, Damaged, SchemaUnknown, SourceUnavailable

if TYPE_CHECKING:
    import pyarrow as pa

    from pipeline import archive, avro, copying, dedup, select, topic, verification
    from pipeline.render.printer import Printer

SHOWN, NOTHING, UNREADABLE = 0, 1, 3


class Found(NamedTuple):
    """Events in the order of their source, and the share of it that is behind with them, from 0 to 1.

    ``datums`` gives the datum of each row of the batch that was read, in the bytes in which it came. ``excerpt`` says
    by which filters they were cut out of a stream before; empty for a whole one. ``source`` is the file.
    """

    batch: pa.RecordBatch
    share: float
    datums: Callable[[], pa.BinaryArray]
    excerpt: str = ""
    source: str = ""


class Unread(NamedTuple):
    """Something that could not be read: where, why, how many records at least, and whether that is damage.

    ``source`` is the file or partition. Without ``counted`` nobody knows how many records it were.
    """

    place: str
    reason: str
    records: int = 1
    damage: bool = True
    source: str = ""
    counted: bool = True


class Evidence(NamedTuple):
    """Events with the bytes that they were decoded from, and the file or partition that they come from."""

    batch: pa.RecordBatch
    datums: avro.Datums
    source: str
    share: float


_Read = TypeVar("_Read", Found, Evidence)


class Schemas:
    """Finds the schema that a message was written with: by the fingerprint in it, or by its id in a registry.

    Where there is no registry, or it does not answer, ids are tried with the schema that this program carries: every
    datum must then fit it to its last byte, and ``say`` is told that this was done.
    """

    def __init__(self, url: str | None, say: Callable[[str], None]) -> None:
        self._url = url
        self._say = say
        self._known: dict[int, avro.Schema] = {}

    def say_level(self, _level: str, sentence: str) -> None:
        """What the topic has to say while it is read."""
        self._say(sentence)

    def resolve(self, key: int | bytes) -> avro.Schema:
        """The schema of a fingerprint or an id. SchemaUnknown or SchemaRefused when it cannot be used."""
        from pipeline import avro

        if isinstance(key, bytes):
            return avro.by_fingerprint(key)
        if key not in self._known:
            self._known[key] = self._ask(key)
        return self._known[key]

    def _ask(self, key: int) -> avro.Schema:
        from pipeline import avro, registry

        if self._url is None:
            why = "no --schema-registry was given"
        else:
            try:
                return avro.admit(registry.Registry(self._url, unavailable=SourceUnavailable).by_id(key))
            except (SourceUnavailable, SchemaUnknown) as error:
                why = str(error).rstrip(".")
        self._say(f"schema id {key} is read as the schema that this program carries, because {why}")
        return avro.ours()


def found(settings: config.ReplayConfig, schemas: Schemas) -> Iterator[Found | Unread]:
    """The reading path: every event of the sources, in order, and in its place what could not be read."""
    if settings.topic is not None:
        from pipeline import topic

        # Without --follow trouble ends the command, in one sentence; with it, it passes, and is said meanwhile.
        say = schemas.say_level if settings.follow else lambda _level, _sentence: None
        parts = topic.read(settings.topic, _client(settings), start=_start(settings), follow=settings.follow, say=say)
        yield from _decoded(settings.topic, parts, schemas)
    if settings.files:
        yield from _from_files(settings)


def last(
    settings: config.ReplayConfig, schemas: Schemas, names: Names | None, wanted: select.Filter, tally: Tally
) -> list[pa.RecordBatch]:
    """The reading path of ``--tail N``: the last N attempts that match, and what the stream says among them."""
    from pipeline import dedup

    assert settings.tail is not None
    seen = dedup.Seen()
    tail: deque[pa.RecordBatch] = deque()
    binds = 0
    if settings.files:
        for batch in selected(_resolved(once(_from_files(settings), seen, tally), names), wanted, tally):
            tail.append(batch)
            binds += _binds(batch)
            while binds - _binds(tail[0]) >= settings.tail:
                binds -= _binds(tail.popleft())
    if settings.topic is not None and binds < settings.tail:
        from pipeline import topic

        parts = topic.read_backwards(settings.topic, _client(settings), start=_start(settings))
        newest_first = once(_decoded(settings.topic, parts, schemas), seen, tally)
        for batch in selected(_resolved(newest_first, names), wanted, tally):
            tail.appendleft(batch)
            binds += _binds(batch)
            if binds >= settings.tail:
                break
    if binds > settings.tail:
        tail[0] = _without_first_binds(tail[0], binds - settings.tail)
    return list(tail)


def _resolved(parts: Iterable[Found | Unread], names: Names | None) -> Iterable[Found | Unread]:
    return parts if names is None else names.resolved(parts)


def _binds(batch: pa.RecordBatch) -> int:
    import pyarrow.compute as pc

    return int(pc.sum(pc.equal(batch.column("type"), "normal")).as_py() or 0)


def _without_first_binds(batch: pa.RecordBatch, count: int) -> pa.RecordBatch:
    import pyarrow.compute as pc

    places = pc.indices_nonzero(pc.equal(batch.column("type"), "normal"))
    return batch.slice(places[count].as_py()) if count < len(places) else batch.slice(batch.num_rows)


def _client(settings: config.ReplayConfig) -> dict[str, str]:
    from pipeline import topic

    return topic.settings(settings.bootstrap_servers, settings.properties, settings.properties_file)


def _start(settings: config.ReplayConfig) -> topic.Start:
    from pipeline import topic

    return topic.Start.beginning() if settings.since_us is None else topic.Start.time(settings.since_us)


def _decoded(name: str, parts: Iterable[topic.Messages | topic.Unread], schemas: Schemas) -> Iterator[Found | Unread]:
    from pipeline import avro, topic

    for part in parts:
        if isinstance(part, topic.Unread):
            yield _offsets_unread(name, part)
            continue
        decoded = avro.decode_messages(part.values, schemas.resolve)
        yield from _messages_unread(name, part, decoded.bad)
        datums = functools.partial(avro.datums_of_messages, part.values, decoded, schemas.resolve)
        yield Found(decoded.batch, part.done / max(part.total, 1), datums)


def _offsets_unread(name: str, part: topic.Unread) -> Unread:
    source = f"topic {name}[{part.partition}]"
    place = f"{source} offsets {part.start} to {part.end - 1}"
    return Unread(place, part.reason, part.end - part.start, source=source)


def _messages_unread(name: str, part: topic.Messages, bad: Iterable[avro.Bad]) -> Iterator[Unread]:
    source = f"topic {name}[{part.partition}]"
    for one in bad:
        yield Unread(f"{source} offset {part.offset(one.index)}", one.reason, source=source)


def _from_files(settings: config.ReplayConfig) -> Iterator[Found | Unread]:
    excerpts: set[str] = set()
    for part in _blocks(settings, _block):
        if isinstance(part, Found) and part.excerpt and part.excerpt not in excerpts:
            excerpts.add(part.excerpt)
            yield Unread(part.source, f"an excerpt by {part.excerpt[:1000]}; the rest is not in it", 0, damage=False)
        yield part


def _blocks(settings: config.ReplayConfig, read: Callable[[archive.Block], _Read]) -> Iterator[_Read | Unread]:
    """What ``read`` makes of each block of the files, and in its place what it cannot make anything of."""
    from pipeline import archive

    for part in archive.read(settings.files, settings.since_us, settings.until_us):
        source = str(part.path)
        if isinstance(part, archive.Unread):
            place = f"{source} bytes {part.start} to {part.end}"
            yield Unread(place, part.reason, damage=part.damage, source=source, counted=False)
            continue
        try:
            yield read(part)
        except Damaged:
            # Small blocks come together; the others of them may still be whole.
            for block in part.split():
                try:
                    yield read(block)._replace(share=part.share)
                except Damaged as error:
                    yield Unread(f"{source} block at byte {block.offset}", str(error), block.count, source=source)


def _block(block: archive.Block) -> Found:
    from pipeline import avro

    schema = avro.admit(block.schema_text)
    batch = avro.decode_block(block.payload, block.count, schema)
    datums = functools.partial(avro.datums_of_block, block.payload, batch, schema)
    return Found(batch, block.share, datums, block.excerpt, str(block.path))


def evidence(settings: config.ReplayConfig, schemas: Schemas) -> Iterator[Evidence | Unread]:
    """The reading path of ``--verify``: as ``found``, with the bytes."""
    if settings.topic is not None:
        from pipeline import avro, topic

        for part in topic.read(settings.topic, _client(settings), start=_start(settings)):
            if isinstance(part, topic.Unread):
                yield _offsets_unread(settings.topic, part)
                continue
            groups, bad = avro.decode_groups(part.values, schemas.resolve)
            yield from _messages_unread(settings.topic, part, bad)
            for batch, datums in groups:
                yield Evidence(
                    batch, datums, f"topic {settings.topic}[{part.partition}]", part.done / max(part.total, 1)
                )
    if settings.files:
        yield from _blocks(settings, _evidence)


def _evidence(block: archive.Block) -> Evidence:
    from pipeline import avro

    schema = avro.admit(block.schema_text)
    batch = avro.decode_block(block.payload, block.count, schema)
    known = [(0, 0)]
    for _, count, size in block.parts:
        known.append((known[-1][0] + count, known[-1][1] + size))
    return Evidence(batch, avro.BlockDatums(schema, block.payload, batch, known), str(block.path), block.share)


def once(parts: Iterable[Found | Unread], seen: dedup.Seen, tally: Tally) -> Iterator[Found | Unread]:
    """The same parts without the events that were there before."""
    for part in parts:
        if isinstance(part, Found):
            sifted = seen.sift(part.batch)
            tally.sifted(sifted)
            yield part._replace(batch=sifted.batch)
        else:
            yield part


class Names:
    """Names that the stream tells of containers after events that have their id alone: its ``workload`` records."""

    MOST = 1_000_000
    """Containers that are remembered; a stream that names more is not one of ours, and the rest stay raw ids."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], event.Workload] = {}

    def learn(self, batch: pa.RecordBatch) -> None:
        """Remember what the ``workload`` records of a batch say."""
        import pyarrow.compute as pc

        told = pc.equal(batch.column("kind"), "workload")
        if not pc.any(told).as_py():
            return
        fields = ("container", "image", "namespace", "pod", "labels")
        for row in batch.filter(told).select(["node", "container_id", *fields]).to_pylist():
            if row["container_id"] and row["container"] and len(self._known) < self.MOST:
                names = {name: row[name] for name in fields} | {"labels": tuple(row["labels"])}
                self._known[row["node"], row["container_id"]] = event.Workload(**names)

    def resolved(self, parts: Iterable[Found | Unread]) -> Iterator[Found | Unread]:
        """The same parts, their events named as far as anything is known, from earlier or from among them."""
        from pipeline import enrich

        for part in parts:
            if isinstance(part, Found):
                self.learn(part.batch)
                yield part._replace(batch=enrich.resolve(part.batch, lambda *key: self._known.get(key)))
            else:
                yield part

    @classmethod
    def of(cls, settings: config.ReplayConfig, schemas: Schemas) -> Names:
        """The first pass of ``--resolve``: everything from ``--from`` to the end, for names come after events."""
        names = cls()
        for part in found(dataclasses.replace(settings, until_us=None, follow=False), schemas):
            # What cannot be read is said by the second pass.
            if isinstance(part, Found):
                names.learn(part.batch)
        return names


class Tally:
    """What a replay read, showed and could not read. The first few of each kind of damage are said as they come."""

    _SAID_AT_ONCE = 10

    def __init__(self, say: Callable[[str], None], progress: telemetry.Progress) -> None:
        self.read = self.shown = self.hidden_failures = self.copies = self.contradictions = 0
        self.skipped: Counter[str] = Counter()
        self.damaged = False
        self._progress = progress
        self._say = say
        self._said: Counter[str] = Counter()

    def found(self, part: Found | Evidence, also: str = "") -> None:
        """Count what was read."""
        self.read += part.batch.num_rows
        self._progress.at(self.read, part.share, also)

    def sifted(self, sifted: dedup.Sifted) -> None:
        """Count copies, and say where events contradict each other: that is as bad as damage."""
        self.read += sifted.copies
        self.copies += sifted.copies
        for node, epoch, pos, events in sifted.contradictions:
            self.damaged = True
            self.contradictions += events
            more = f" and {events - 1} more after it" if events > 1 else ""
            self._say_some(
                "contradiction",
                f"node {node} epoch {epoch} pos {pos}{more}: another event with this identity says something else; "
                "neither is left out",
            )
        for note in sifted.notes:
            self._say(note)

    def kept(self, into: copying.Copy, where: str) -> None:
        """Say what ``--to`` did. Records that cannot be known again are not kept, and that is as bad as damage."""
        self.shown = into.written + into.there
        if into.strangers:
            self.damaged = True
            self._say(
                f"{into.strangers:,} records are not kept: they lack a node, an epoch of 16 hexadecimal digits or a "
                "position, by which they could be known again"
            )
        self._say(f"records written to {where}: {into.written:,}; there already: {into.there:,}")

    def unread(self, part: Unread) -> None:
        """Count what could not be read, and say where it is."""
        # Reasons hold numbers and bytes: what they have in common is one kind.
        kind = re.sub(r"\b[0-9A-F]{2}( [0-9A-F]{2})+\b|[0-9]+", "…", part.reason).rstrip(".")
        if part.damage:
            self.damaged = True
            self.skipped[kind] += part.records
        self._say_some(kind, f"{part.place}: {part.reason}")

    def _say_some(self, kind: str, sentence: str) -> None:
        self._said[kind] += 1
        if self._said[kind] <= self._SAID_AT_ONCE:
            self._say(sentence)
        elif self._said[kind] == self._SAID_AT_ONCE + 1:
            self._say("more of this kind are counted and not said one by one")


def selected(parts: Iterable[Found | Unread], wanted: select.Filter, tally: Tally) -> Iterator[pa.RecordBatch]:
    """What of the events a reader asked for, batch by batch; empty ones are left out."""
    from pipeline import select

    for part in parts:
        if isinstance(part, Unread):
            tally.unread(part)
            continue
        tally.found(part)
        chosen = select.select(part.batch, wanted)
        tally.hidden_failures += chosen.hidden_failures
        tally.shown += chosen.batch.num_rows - chosen.own
        if chosen.batch.num_rows:
            yield chosen.batch


def show(batches: Iterable[pa.RecordBatch], printer: Printer, out: IO[bytes], say: Callable[[str], None]) -> None:
    """The printing path: events to standard output, the stream's own records where the form says."""
    for batch in batches:
        text, own = printer.text(batch)
        out.write(text)
        out.flush()
        for line in own:
            say(line)


def verify(
    settings: config.ReplayConfig, verifier: verification.Verifier, schemas: Schemas, tally: Tally
) -> list[verification.Verdict]:
    """Read everything, and once more where something came twice, for a verdict on each node and epoch."""
    for part in evidence(settings, schemas):
        if isinstance(part, Unread):
            if part.damage:
                records = part.records if part.counted else None
                verifier.unread(part.source, f"{part.place}: {part.reason}", records)
            tally.unread(part)
        else:
            tally.found(part)
            verifier.add(part.batch, part.datums, part.source)
    if verifier.settle():
        for part in evidence(settings, schemas):
            # What cannot be read was said the first time.
            if isinstance(part, Evidence):
                verifier.compare(part.batch, part.datums)
    return verifier.verdicts()


def _verify(settings: config.ReplayConfig, schemas: Schemas, tally: Tally, out: IO[bytes]) -> int:
    from pipeline import keys, verification

    good = keys.verifier(settings.public_key) if settings.public_key is not None else None
    excluded = {name.removeprefix("!") for name in settings.nodes if name.startswith("!")}
    included = set(settings.nodes) - {f"!{name}" for name in excluded}
    verifier = verification.Verifier(
        good,
        lambda node: (not included or node in included) and node not in excluded,
        settings.since_us,
        settings.until_us,
    )
    verdicts = verify(settings, verifier, schemas, tally)
    if settings.output == "json":
        lines = [verification.as_json(verdict) for verdict in verdicts]
    else:
        lines = [verification.HEADER, *map(verification.as_columns, verdicts)]
    out.write("".join(lines).encode())
    out.flush()
    if verifier.left_out:
        tally.unread(Unread("what was read", "it has too many epochs to tell them apart", verifier.left_out))
    if not verdicts and not tally.damaged:
        return NOTHING
    return verification.worst([*(verdict.code for verdict in verdicts), UNREADABLE if tally.damaged else 0])


class Stopping:
    """SIGINT and SIGTERM as KeyboardInterrupt, but never inside of this context: there they wait for its end.

    A record must be either written and counted as such, or neither, also when a service is stopped.
    """

    def __init__(self) -> None:
        self._held = self._asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._heard)

    def _heard(self, *_: object) -> None:
        self._asked = True
        if not self._held:
            raise KeyboardInterrupt

    def __enter__(self) -> None:
        self._held = True

    def __exit__(self, *_: object) -> None:
        self._held = False
        if self._asked:
            raise KeyboardInterrupt

    def forget(self) -> None:
        """From now on neither ends anything: the end has begun."""
        self._held = True


def keep(
    settings: config.ReplayConfig,
    schemas: Schemas,
    wanted: select.Filter,
    tally: Tally,
    into: copying.Copy,
    stopping: Stopping,
) -> None:
    """The path of ``--to``: every record that was asked for, as it came, into an archive."""
    import numpy as np
    import pyarrow as pa

    from pipeline import dedup, select

    seen, filters = dedup.Seen(), excerpt(settings)
    for part in found(settings, schemas):
        if isinstance(part, Unread):
            tally.unread(part)
            continue
        # Rows keep their number through the stages: it leads back to their datums.
        rows = pa.array(np.arange(part.batch.num_rows))
        sifted = seen.sift(part.batch.append_column("row", rows))
        tally.sifted(sifted)
        tally.found(part._replace(batch=sifted.batch), f"{into.written:,} new, {into.there:,} there already")
        chosen = select.select(sifted.batch, wanted).batch
        if chosen.num_rows:
            datums = part.datums()
            datums = datums if chosen.num_rows == len(rows) else datums.take(chosen.column("row"))
            with stopping:
                into.cut(f"{part.excerpt} {filters}".strip())
                into.add(chosen, datums)


def _into(settings: config.ReplayConfig, directory: Path) -> copying.Copy:
    from pipeline import copying

    return copying.Copy(directory, flush_secs=5 if settings.follow else None)


def excerpt(settings: config.ReplayConfig) -> str:
    """The filters of ``--to`` as text, as they would be written; empty when nothing is left out."""
    said = {
        "pid": ",".join(map(str, settings.pids)),
        "ports": ",".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in settings.ports),
        "ignore-errors": "true" if settings.ignore_errors else "",
        "from": _utc(settings.since_us),
        "until": _utc(settings.until_us),
        "node": ",".join(settings.nodes),
        "namespace": ",".join(settings.namespaces),
        "podname": ",".join(settings.pods),
        "containername": ",".join(settings.containers),
        "selector": ",".join(
            f"{'' if test.wanted else '!'}{test.key}"
            if test.value is None
            else f"{test.key}{'=' if test.wanted else '!='}{test.value}"
            for test in settings.labels
        ),
        "info": "" if settings.info else "false",
    }
    return " ".join(f"--{name}={text}" for name, text in said.items() if text)


def _utc(us: int | None) -> str:
    return "" if us is None else config.iso(us)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``bindsnoop-replay``."""
    try:
        settings = config.parse("replay", sys.argv[1:] if argv is None else argv, os.environ)
        return _main(settings)
    except BindsnoopError as error:
        print(f"bindsnoop-replay: {event.one_line(str(error))}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # Whoever reads has enough. Python would try to flush once more at exit, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return SHOWN


def _main(settings: config.ReplayConfig) -> int:
    from pipeline import dedup, select, sort
    from pipeline.render.printer import Printer

    if settings.topic is not None:
        _client(settings)  # a wrong setting is said before anything is shown
    # Messages come and go by the thousand and are never part of a cycle: looking at them again and again for one took
    # a tenth of the time.
    gc.set_threshold(200_000, 50, 50)
    out = sys.stdout.buffer
    # Before anything is looked for: whoever waits sees that the command has begun.
    printer = Printer(settings.output, settings.columns, time=settings.time)
    silent = settings.count or settings.verify or settings.to is not None
    if not silent:
        out.write(printer.header)
        out.flush()
    terminal = sys.stderr.isatty()
    wanted = settings.progress == "auto" and not settings.follow and not (sys.stdout.isatty() and not silent)
    progress = telemetry.Progress(sys.stderr, wanted=wanted)

    def say(sentence: str) -> None:
        with progress.cleared():
            print(event.one_line(sentence), file=sys.stderr, flush=True)

    tally = Tally(say, progress)
    schemas = Schemas(settings.schema_registry, say)
    filter_ = select.Filter(
        pids=settings.pids,
        ports=settings.ports,
        ignore_errors=settings.ignore_errors,
        since_us=settings.since_us,
        until_us=settings.until_us,
        info=settings.info,
        nodes=settings.nodes,
        namespaces=settings.namespaces,
        pods=settings.pods,
        containers=settings.containers,
        labels=settings.labels,
    )
    interrupted = False
    verdict = NOTHING
    into = None if settings.to is None else _into(settings, settings.to)
    stopping = None if into is None else Stopping()
    try:
        names = Names.of(settings, schemas) if settings.resolve else None
        batches: Iterable[pa.RecordBatch] = ()
        if settings.verify:
            verdict = _verify(settings, schemas, tally, out)
        elif into is not None and stopping is not None:
            keep(settings, schemas, filter_, tally, into, stopping)
        elif settings.tail is not None:
            batches = last(settings, schemas, names, filter_, tally)
            tally.shown = sum(map(_binds, batches))
        else:
            each = once(found(settings, schemas), dedup.Seen(), tally)
            batches = selected(_resolved(each, names), filter_, tally)
        if settings.sort and not settings.count:
            batches = sort.in_order(batches)
        if settings.count:
            for _ in batches:
                pass
            out.write(f"{tally.shown}\n".encode())
            out.flush()
        else:
            show(batches, printer, out, say)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        progress.close()
    if into is not None and stopping is not None:
        stopping.forget()
        into.close()
        tally.kept(into, str(settings.to))
    if interrupted and not settings.follow:
        say("interrupted: what follows was not read")
    totals = telemetry.Totals(
        tally.read, tally.shown, tally.hidden_failures, tally.skipped, progress.seconds, tally.copies,
        tally.contradictions,
    )  # fmt: skip
    line = telemetry.closing_line(totals, terminal=terminal and into is None and not settings.verify)
    if line is not None:
        say(line)
    if settings.verify and not interrupted:
        return verdict
    if tally.damaged or (interrupted and not settings.follow):
        return UNREADABLE
    return SHOWN if tally.shown or settings.follow else NOTHING
