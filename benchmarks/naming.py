"""What naming the containers of events costs: a batch of a twentieth of a second over 500 pods, column by column.

In: nothing. Out: a ``Result``. Beside it stands what a program does that names one event after the other.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa

from benchmarks.measure import Result, Say, Spread, interleaved, ratios
from pipeline import enrich
from pipeline.delay import DelayLine
from pipeline.event import Workload
from pipeline.workloads import Directory

PODS = 500
PER_BATCH = 5_000
BATCHES = 100
LOOP_BATCHES = 5
MOST_US = 1.0


def naming(rounds: int, say: Say) -> Result:
    """CPU that names take for an event at 100,000 events/s: the delay line and the columns."""
    directory = Directory()
    ids = [f"{number:064x}" for number in range(PODS)]
    for number, container_id in enumerate(ids):
        labels = (("app", f"app-{number % 40}"), ("pod-template-hash", "7d4b9c6f5"), ("tier", "backend"))
        pod = Workload("main", f"registry.example.com/app:{number}", "default", f"app-{number}", labels)
        directory.put("kubernetes", container_id, pod)
    random = np.random.default_rng(7)
    everyone = pa.array([*ids, None], pa.string())
    batches = [
        pa.RecordBatch.from_pydict({"container_id": everyone.take(pa.array(random.integers(0, PODS + 1, PER_BATCH)))})
        for _ in range(10)
    ]
    found = interleaved(
        {
            "columns": lambda: _us_of(lambda: _columns(batches, directory), BATCHES * PER_BATCH),
            "loop": lambda: _us_of(lambda: _loop(batches, directory), LOOP_BATCHES * PER_BATCH),
        },
        rounds,
        say,
    )
    ours, loop = Spread.of(found["columns"]), Spread.of(found["loop"])
    return Result(
        ours.text(_us),
        loop.text(_us),
        ratios(found["loop"], found["columns"]).text(lambda times: f"{times:.1f} times"),
        ours.median <= MOST_US,
        f"batches of {PER_BATCH:,} events over {PODS} pods with three labels",
    )


def _us_of(work: Callable[[], None], events: int) -> float:
    begin = time.process_time()
    work()
    return (time.process_time() - begin) / events * 1e6


def _columns(batches: Sequence[pa.RecordBatch], directory: Directory) -> None:
    line: DelayLine[None] = DelayLine(lambda container_id: directory.get(container_id) is not None, 2.0)
    for number, batch in enumerate(itertools.islice(itertools.cycle(batches), BATCHES)):
        line.put(batch, None, float(number))
        for ready, _ in line.ready(float(number)):
            enrich.name(ready, directory.get)


def _loop(batches: Sequence[pa.RecordBatch], directory: Directory) -> None:
    for batch in itertools.islice(batches, LOOP_BATCHES):
        rows = batch.to_pylist()
        for row in rows:
            workload = directory.get(row["container_id"]) if row["container_id"] else None
            if workload is not None:
                row.update(workload._asdict())
        pa.RecordBatch.from_pylist(rows)


def _us(value: float) -> str:
    return f"{value:.2f} µs"
