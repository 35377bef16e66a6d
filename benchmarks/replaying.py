"""``bindsnoop-replay`` beside the loops and tools that it replaces, and how soon the commands answer.

In: a topic and an archive with the same events. Out: a ``Result`` a row. Everything runs as a process of its own, from
the call to the exit. The loops, which need minutes for all events, read the first ``prefix`` of them; their start
counts once, the rest by the event.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from benchmarks import events
from benchmarks.measure import (
    BIN,
    ROOT,
    Failed,
    Result,
    Say,
    Spread,
    environment,
    interleaved,
    rate,
    ratios,
    rss_anon_mib,
    run,
)
from pipeline import archive, avro, dedup, topic

REPLAY = BIN / "bindsnoop-replay"
BASELINE = (sys.executable, "-m", "benchmarks.baseline")
SMALL = 1_000
FILTERED = ("-P", str(events.PORT))
ALL = ("-i=false",)


@dataclass
class Stored:
    """Where the events are: ``count`` of them in ``big`` and in ``folder``, the first few also in ``small``."""

    bootstrap: str
    folder: Path
    prefix: int
    big: str = "binds"
    small: str = "few"
    count: int = 0
    kept: int = 0


@contextlib.contextmanager
def stored(bootstrap: str, binds: int, prefix: int) -> Iterator[Stored]:
    """The events in two topics and an archive, the archive gone at the end."""
    with tempfile.TemporaryDirectory(prefix="bindsnoop-bench-") as folder:
        store = Stored(bootstrap, Path(folder), prefix)
        _write(store, store.big, binds, archived=True)
        _write(store, store.small, SMALL, archived=False)
        yield store


def _write(store: Stored, name: str, binds: int, *, archived: bool) -> None:
    client = topic.settings(store.bootstrap)
    publisher = topic.Publisher(name, client, key=events.NODE, create=topic.Creation(partitions=1))
    writer = (
        archive.Writer(store.folder, node=events.NODE, epoch="019b76daa8000007", now=time.time) if archived else None
    )
    for batch, kept in events.generate(binds):
        datums = avro.encode(batch)
        publisher.publish(avro.confluent(datums, 1))
        if writer is not None:
            writer.write(datums, batch.column("pos")[0].as_py(), batch.column("time"))
            store.count += batch.num_rows
            store.kept += kept
    publisher.close()
    if writer is not None:
        writer.close()


# --- contestants: each gives the seconds that all events took, or would have taken --------------------------------


def ours(*arguments: str) -> Callable[[], float]:
    """The command."""
    return lambda: run([REPLAY, *arguments]).wall_secs


def from_topic(store: Stored, name: str | None = None) -> tuple[str, ...]:
    """Arguments of the command that read a topic."""
    return ("--topic", name or store.big, "--bootstrap-servers", store.bootstrap)


def consume(store: Stored, name: str | None = None) -> Callable[[], float]:
    """Bare ``consume()``."""
    count = SMALL if name else store.count
    command = [*BASELINE, "consume", store.bootstrap, name or store.big, str(count)]
    return lambda: run(command).wall_secs


def kcat(store: Stored) -> Callable[[], float]:
    """kcat to nothing; it lacks ``fetch.queue.backoff.ms``, so it gets a queue that does not fill."""
    command = ["kcat", "-C", "-q", "-b", store.bootstrap, "-t", store.big, "-o", "beginning", "-c", str(store.count)]
    settings = ["queued.min.messages=1000000", "fetch.wait.max.ms=10", "check.crcs=true"]
    return lambda: run([*command, *(part for setting in settings for part in ("-X", setting))]).wall_secs


def loop(store: Stored, source: str, what: str) -> Callable[[], float]:
    """The plain loop over a prefix."""
    where = [str(store.folder)] if source == "files" else [store.bootstrap, store.big]
    command = [*BASELINE, source, *where, str(store.prefix), what]

    def measured() -> float:
        cost = run(command)
        in_loop = float(cost.last_words)
        return cost.wall_secs - in_loop + in_loop * store.count / store.prefix

    return measured


def contestants(store: Stored) -> dict[str, Callable[[], float]]:
    """Everybody, by the names that ``COMPARED`` uses."""
    topic_, files = from_topic(store), ("--files", str(store.folder))
    return {
        "ours filter": ours(*topic_, *FILTERED),
        "consume": consume(store),
        "kcat": kcat(store),
        "loop filter": loop(store, "topic", "filter"),
        "ours json": ours(*topic_, *ALL, "-o", "json"),
        "loop json": loop(store, "topic", "json"),
        "ours columns": ours(*topic_, *ALL),
        "loop columns": loop(store, "topic", "columns"),
        "ours files": ours(*files, *FILTERED),
        "loop files": loop(store, "files", "filter"),
        "ours verify": ours(*topic_, "--verify"),
        "ours verify files": ours(*files, "--verify"),
        # Almost nothing to read: what is left is the start.
        "ours start": ours(*from_topic(store, store.small)),
        "consume start": consume(store, store.small),
    }


class Compared(NamedTuple):
    """A row: two contestants, and how many times as fast ours is at least (None: only shown)."""

    ours: str
    beside: str
    least: float | None
    percent: bool = False


COMPARED: dict[str, Compared] = {
    "consume": Compared("ours filter", "consume", 0.4, percent=True),
    "kcat": Compared("ours filter", "kcat", None, percent=True),
    "loop": Compared("ours filter", "loop filter", 10),
    "json": Compared("ours json", "loop json", 8),
    "columns": Compared("ours columns", "loop columns", 6),
    "files": Compared("ours files", "loop files", 10),
    "verify": Compared("ours verify", "ours filter", 0.5, percent=True),
    "verify-files": Compared("ours verify files", "ours files", 0.5, percent=True),
}


def compared(store: Stored, names: Sequence[str], rounds: int, say: Say) -> Iterator[tuple[str, Result]]:
    """The rows of ``COMPARED`` that are named."""
    _same_work(store)
    everybody = contestants(store)
    wanted = {name for row in names for name in COMPARED[row][:2]}
    if "consume" in names:
        wanted |= {"ours start", "consume start"}
    if "kcat" in wanted and not shutil.which("kcat"):
        wanted.discard("kcat")
    secs = interleaved({name: everybody[name] for name in everybody if name in wanted}, rounds, say)
    for name in names:
        row = COMPARED[name]
        if row.beside not in secs:
            yield name, Result("", "not installed", "", None)
            continue
        times = ratios(secs[row.beside], secs[row.ours])
        note = ""
        if name == "consume":
            alone = ratios(
                [all_ - start for all_, start in zip(secs["consume"], secs["consume start"], strict=True)],
                [all_ - start for all_, start in zip(secs["ours filter"], secs["ours start"], strict=True)],
            )
            note = f"without the start of either process {alone.text(_percent)}"
        yield (
            name,
            Result(
                _rate(store, secs[row.ours]),
                _rate(store, secs[row.beside]),
                times.text(_percent if row.percent else _times),
                None if row.least is None else times.median >= row.least,
                note,
            ),
        )


def _rate(store: Stored, secs: Sequence[float]) -> str:
    return Spread.of(store.count / value for value in secs).text(rate)


def _percent(value: float) -> str:
    return f"{value:.0%}"


def _times(value: float) -> str:
    return f"{value:.1f} times"


def _same_work(store: Stored) -> None:
    """Both sides of a ratio show the same, byte for byte. Failed when they do not."""
    for what, arguments in (("filter", FILTERED), ("json", (*ALL, "-o", "json")), ("columns", ALL)):
        mine = _output([REPLAY, *from_topic(store, store.small), *arguments])
        theirs = _output([*BASELINE, "topic", store.bootstrap, store.small, str(SMALL), what])
        if mine != theirs:
            pair = next(
                (pair for pair in zip(mine.splitlines(), theirs.splitlines(), strict=False) if pair[0] != pair[1]),
                (f"{mine.count(NEWLINE)} lines", f"{theirs.count(NEWLINE)} lines"),
            )
            raise Failed(f"the command and the loop show other things for {what}: {pair[0]!r} and {pair[1]!r}")


NEWLINE = b"\n"


def _output(command: Sequence[str | Path]) -> bytes:
    done = subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        check=False,
    )
    return done.stdout


# --- each event once ----------------------------------------------------------------------------------------------

EPOCHS = 1_000
REMEMBERED_MIB = 64.0
_REMEMBER = "from benchmarks.replaying import remember; import sys; remember(*map(int, sys.argv[1:]))"


def dedup_(count: int) -> Result:
    """Memory and time that it takes to know ``count`` events of ``EPOCHS`` epochs, all different."""
    said = run([sys.executable, "-c", _REMEMBER, str(EPOCHS), str(count // EPOCHS)]).last_words
    mib, nanosecs = map(float, said.split())
    note = f"{count / 1e6:g} million events, dense, of {EPOCHS:,} epochs"
    return Result(f"+{mib:.1f} MiB, {nanosecs:.0f} ns an event", "", "", mib <= REMEMBERED_MIB, note)


def remember(epochs: int, each: int) -> None:
    """Sifts ``each`` events of so many epochs, by batches; prints MiB of anonymous memory and ns an event."""
    batch = next(events.generate(events.BATCH)).batch.slice(0, min(each, events.BATCH))
    places = [batch.schema.get_field_index(name) for name in ("epoch", "pos")]
    columns = batch.columns
    seen, secs, begun = dedup.Seen(), 0.0, 0.0
    for number in range(epochs):
        columns[places[0]] = pa.repeat(pa.scalar(f"{number:016x}"), batch.num_rows)
        for first in range(0, each, batch.num_rows):
            columns[places[1]] = pa.array(np.arange(first, first + batch.num_rows))
            part = pa.RecordBatch.from_arrays(columns, schema=batch.schema)
            start = time.perf_counter()
            copies = seen.sift(part).copies
            secs += time.perf_counter() - start
            if copies:
                raise Failed(f"{copies} of {part.num_rows} different events are taken for copies")
        begun = begun or rss_anon_mib(os.getpid())
    print(rss_anon_mib(os.getpid()) - begun, secs / (epochs * each) * 1e9, file=sys.stderr)


# --- how soon a command answers -----------------------------------------------------------------------------------

HELP_SECS = 0.15
FIRST_LINE_SECS = 0.7


def help_(rounds: int) -> Result:
    """``--help`` of the slowest of the three commands."""
    commands = ("bindsnoop", "bindsnoop-agent", "bindsnoop-replay")
    secs = {name: Spread.of(run([BIN / name, "--help"]).wall_secs for _ in range(2 * rounds)) for name in commands}
    slowest = max(secs, key=lambda name: secs[name].median)
    return Result(secs[slowest].text(_secs), "", "", secs[slowest].median <= HELP_SECS, f"the slowest is {slowest}")


def first_line(store: Stored, rounds: int) -> Result:
    """From the call to the first event, of a topic with a thousand."""
    secs = Spread.of(_first_line(store) for _ in range(2 * rounds))
    return Result(secs.text(_secs), "", "", secs.median <= FIRST_LINE_SECS)


def _first_line(store: Stored) -> float:
    start = time.monotonic()
    with subprocess.Popen(
        [REPLAY, *from_topic(store, store.small), "-o", "json"],
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        first = process.stdout.readline()
        secs = time.monotonic() - start
        process.stdout.read()
    if not first.startswith(b"{"):
        raise Failed(f"the first line of a replay is {first!r}")
    return secs


def _secs(value: float) -> str:
    return f"{value:.2f} s"
