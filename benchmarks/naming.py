"""What naming the containers of events costs, and whether the names are right.

In: nothing, or an agent that watches an API server of the tests' own (``tests.fake_api``, real HTTP). Out: a ``Result``
a row. Beside the columns stands what a program does that names one event after the other.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks.measure import BIN, Failed, Result, Say, Spread, environment, interleaved, ratios, rss_anon_mib
from benchmarks.tracing import agent
from pipeline import enrich
from pipeline.delay import DelayLine
from pipeline.event import Workload
from pipeline.workloads import Directory
from tests import fake_api
from tests.kernel import places

PODS = 500
PER_BATCH = 5_000
BATCHES = 100
LOOP_BATCHES = 5
MOST_US = 1.0

CHURN = 5_000
CHURN_MIB = 130.0
FLAT_MIB = 5.0


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


# --- pods that come and go ----------------------------------------------------------------------------------------


def churn(seconds: float, say: Say) -> Result:
    """Pods that come, bind once and go while 500 others stay: each event's names are those of its pod, memory is flat.

    Each bind is made in a cgroup that is named as the pod's container; the pod is announced right before.
    """
    count = round(CHURN * seconds / 60)
    samples: list[float] = []
    truth: dict[int, str] = {}
    with tempfile.TemporaryDirectory(prefix="bindsnoop-bench-") as folder, fake_api.serving() as api:
        for number in range(PODS):
            api.put(fake_api.pod(f"stays-{number}", fake_api.container_id()))
        config = api.kubeconfig(Path(folder, "kubeconfig"))
        files = Path(folder, "files")
        with agent("--files", files, "--kubeconfig", config) as running:
            begin = time.monotonic()
            for number in range(count):
                _come_and_go(api, number, truth)
                if number % 50 == 0:
                    samples.append(rss_anon_mib(running.pid))
                time.sleep(max(0.0, begin + seconds * number / count - time.monotonic()))
        say(f"{count} pods came and went in {time.monotonic() - begin:.0f} s")
        at_once, wrong = _names(files, truth)
        after, wrong_after = _names(files, truth, "--resolve")
    quarters = [min(part) for part in np.array_split(samples, 4)]
    grown = quarters[3] - quarters[1]
    return Result(
        f"{after:,} named, {at_once:,} of them at once; {max(samples):.0f} MiB at most",
        "",
        f"{wrong + wrong_after:,} wrong names, {grown:+.1f} MiB from the second quarter to the last",
        not wrong and not wrong_after and after == count and max(samples) <= CHURN_MIB and grown <= FLAT_MIB,
        f"{count:,} pods in {seconds:.0f} s beside {PODS} that stay; lowest RssAnon of each quarter "
        f"{', '.join(f'{value:.0f}' for value in quarters)} MiB",
    )


def _come_and_go(api: fake_api.FakeApi, number: int, truth: dict[int, str]) -> None:
    container_id, name = fake_api.container_id(), f"pod-{number}"
    api.put(fake_api.pod(name, container_id))
    with places.cgroup(f"cri-containerd-{container_id}.scope"), socket.socket() as made:
        # A port of its own tells whose event it is, whatever the event says.
        port = 10_000 + number
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(("127.0.0.77", port))
    truth[port] = name
    api.delete(f"uid-of-{name}")


def _names(files: Path, truth: dict[int, str], *more: str) -> tuple[int, int]:
    """How many events of this process have their pod's name, and how many have another's."""
    command = [
        BIN / "bindsnoop-replay",
        "--files",
        files,
        "-i=false",
        "-o",
        "json-full",
        "--pid",
        str(os.getpid()),
        *more,
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment(), check=False)
    found: dict[int, str | None] = {}
    for row in map(json.loads, done.stdout.splitlines()):
        if row.get("addr") == "127.0.0.77":
            found[row["port"]] = row.get("pod")
    if found.keys() != truth.keys():
        raise Failed(f"{len(truth)} pods bound, and {len(found)} of these binds were recorded")
    named = {port: pod for port, pod in found.items() if pod is not None}
    wrong = sum(pod != truth[port] for port, pod in named.items())
    return len(named) - wrong, wrong
