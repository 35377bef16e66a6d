"""bindsnoop: the binds of this host as they happen, without any server.

In: the ring of the tracer. Out: columns or JSON on standard output, the header at once, everything else on standard
error. Nothing is kept: what is to be asked about later, ``bindsnoop-agent`` records.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import config, event, telemetry
from pipeline.errors import BindsnoopError

if TYPE_CHECKING:
    from pipeline.tracer import Burst
    from pipeline.workloads import Source

_DELAY_SECS = 0.05
"""How long a bind may wait in the ring."""

_LOOK_SECS = 1.0
"""How often the counters are asked whether something was lost, and how long nothing at all is waited for."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``bindsnoop``."""
    try:
        return _main(config.parse("live", sys.argv[1:] if argv is None else argv, os.environ))
    except BindsnoopError as error:
        print(f"bindsnoop: {event.one_line(str(error))}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 0
    except BrokenPipeError:
        # Whoever reads has enough. Python would try to flush once more at exit, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _import() -> None:
    for name in ("records", "enrich", "select", "render.printer", "workloads.docker", "workloads.podman"):
        importlib.import_module(f"pipeline.{name}")


def _main(settings: config.LiveConfig) -> int:
    # While the kernel checks the programs another thread imports what the first event needs: half of the start.
    threading.Thread(target=_import).start()
    from pipeline.tracer import Wanted, open_tracer

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sources: Sequence[Source] = ()
    # The kernel leaves out most of what nobody asked for, and what it lets through is filtered again below.
    tracer = open_tracer(
        settings.tracer,
        ring_bytes=settings.ring_bytes,
        wanted=Wanted(pids=settings.pids, ports=settings.ports, only_success=settings.ignore_errors),
    )
    try:
        import pyarrow as pa

        from pipeline import enrich, records, select, testimony, workloads
        from pipeline.delay import DelayLine
        from pipeline.render.printer import Printer

        printer = Printer(settings.output, settings.columns, time=settings.time)
        out = sys.stdout.buffer
        wanted = select.Filter(
            pids=settings.pids,
            ports=settings.ports,
            ignore_errors=settings.ignore_errors,
            info=settings.info,
            namespaces=settings.namespaces,
            pods=settings.pods,
            containers=settings.containers,
            labels=settings.labels,
        )
        stream = testimony.Stream(
            settings.node,
            event.new_epoch(time.time_ns() // 1_000_000, os.getpid()),
            boot_id=Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip(),
            monotonic=time.monotonic(),
        )

        def show(batch: pa.RecordBatch) -> None:
            text, own = printer.text(select.select(batch, wanted).batch)
            out.write(text)
            out.flush()
            for line in own:
                print(line, file=sys.stderr, flush=True)

        for note in tracer.notes:
            print(f"bindsnoop: {note}", file=sys.stderr)
        out.write(printer.header)
        out.flush()
        show(stream.start(time.time_ns() // 1000, f"bindsnoop traces with {tracer.name}", tracer.counters()))
        directory = workloads.Directory()
        sources = workloads.open_sources(
            settings.workloads,
            directory,
            node=settings.node,
            kubeconfig=settings.kubeconfig,
            docker_sockets=settings.docker_sockets,
            podman_storage=settings.podman_storage,
            say=telemetry.Sparing(lambda _, sentence: print(f"bindsnoop: {sentence}", file=sys.stderr, flush=True)),
        )
        delay_secs = settings.name_delay if sources else 0.0
        line: DelayLine[Burst] = DelayLine(lambda name: directory.get(name) is not None, delay_secs)
        look = time.monotonic() + _LOOK_SECS
        wait_secs = 0.0  # What came meanwhile has waited enough.
        while True:
            burst = tracer.read(wait_secs, 0.0 if line else _LOOK_SECS)
            wait_secs = _DELAY_SECS
            if burst is not None:
                offset_ns = time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME)
                line.put(enrich.enrich(records.decode(burst.records, offset_ns)), burst, time.monotonic())
            for batch, taken in line.ready(time.monotonic(), pressed=tracer.half_full()):
                named, _ = enrich.name(batch, directory.get)
                tracer.release(taken)
                show(stream.number(named))
            if time.monotonic() >= look:
                look = time.monotonic() + _LOOK_SECS
                lost = stream.lost(time.time_ns() // 1000, tracer.counters())
                if lost is not None:
                    show(lost)
    finally:
        tracer.close()
        for source in sources:
            source.close()
