"""Perf buffers of this kernel, written by a BPF program that each getppid() of this process runs."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import platform
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.tracer import Burst, bcc
from pipeline.tracer.perf_buffer import PerfBuffers, cpus
from tests.kernel.headers import headers

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="tracing needs root")

SOURCE = Path(__file__).parent / "kernel" / "perf_writer.bcc.c"

RECORD_BYTES = 416
STRIDE = 432
"""What a record takes in a buffer: its header, its length, itself, filled up to a multiple of 8."""

FITS = mmap.PAGESIZE // STRIDE


class Writer:
    """The program, attached. Records go to the buffers that are given to ``into``."""

    def __init__(self) -> None:
        number = {"x86_64": 110, "aarch64": 173}[platform.machine()]
        program = bcc.library().BPF(text=SOURCE.read_bytes(), cflags=[f"-DPID={os.getpid()}", f"-DGETPPID={number}"])
        function = program.load_func(b"on_call", bcc.library().BPF.RAW_TRACEPOINT)
        attach = bcc.library().lib.bpf_attach_raw_tracepoint
        self._program = program
        self._link = attach(function.fd, b"sys_enter")
        assert self._link >= 0, os.strerror(ctypes.get_errno())

    def into(self, buffers: PerfBuffers) -> None:
        """Writes into these from here on, and counts from 0."""
        for cpu, descriptor in buffers.descriptors.items():
            self._program[b"events"][ctypes.c_int(cpu)] = ctypes.c_int(descriptor)
        self._program[b"counts"].clear()

    @property
    def counts(self) -> tuple[int, int]:
        """Records that were written, and records that found no room."""
        table = self._program[b"counts"]
        return table[0].value, table[1].value

    def close(self) -> None:
        """Detaches it."""
        os.close(self._link)
        self._program.cleanup()


@pytest.fixture(scope="module")
def writer() -> Iterator[Writer]:
    """One program for all tests."""
    with headers(), contextlib.closing(Writer()) as made:
        yield made


@pytest.fixture(autouse=True)
def _whole_machine() -> Iterator[None]:
    """Threads may run everywhere again after a test."""
    before = os.sched_getaffinity(0)
    yield
    os.sched_setaffinity(0, before)


def opened(writer: Writer, pages: int = 1, **options: Any) -> contextlib.closing[PerfBuffers]:
    """Buffers of so many pages a CPU that the program writes into."""
    total = pages * mmap.PAGESIZE * len(cpus("online"))
    made = PerfBuffers(
        total, **{"record_bytes": RECORD_BYTES, "wakeup_bytes": total // 4, "max_records": 1000, **options}
    )
    writer.into(made)
    return contextlib.closing(made)


def write(times: int, cpu: int | None = None) -> None:
    """Makes the program write so many records, all on one CPU or wherever this thread runs."""
    if cpu is not None:
        os.sched_setaffinity(0, {cpu})
    for _ in range(times):
        os.getppid()


def numbers(burst: Burst | None) -> list[int]:
    """The numbers of the records."""
    assert burst is not None
    return np.ascontiguousarray(burst.records[:, 8:16]).view(np.uint64)[:, 0].tolist()


def test_records_of_all_cpus_come_in_the_order_of_time(writer: Writer) -> None:
    """What was written on one CPU and on another comes out as it happened."""
    online = cpus("online")
    with opened(writer) as buffers:
        for at in range(8):
            write(1, online[at % len(online)])

        burst = buffers.read(0)

        assert numbers(burst) == list(range(8))
        assert burst is not None
        assert burst.records.shape == (8, RECORD_BYTES)
        assert not burst.records[:, 16:].any()


def test_nothing_comes_of_nothing(writer: Writer) -> None:
    """An empty buffer gives no burst, at once or after the time that was asked for."""
    with opened(writer) as buffers:
        begin = time.monotonic()

        assert buffers.read(0) is None
        assert buffers.read(0.05) is None
        assert 0.05 <= time.monotonic() - begin < 5


def test_what_finds_no_room_is_refused_and_the_rest_is_whole(writer: Writer) -> None:
    """A full buffer tells the writer; what it holds is what came first, and after it was read there is room again."""
    (cpu, *_) = cpus("online")
    with opened(writer) as buffers:
        write(3 * FITS, cpu)
        assert writer.counts == (FITS, 2 * FITS)

        first = buffers.read(0)
        assert numbers(first) == list(range(FITS))
        assert first is not None
        buffers.release(first)
        # The kernel puts a word of its own about what was lost between the records.
        write(FITS - 1, cpu)

        assert numbers(buffers.read(0)) == list(range(FITS, 2 * FITS - 1))
        assert writer.counts == (2 * FITS - 1, 2 * FITS)


def test_room_comes_back_with_release_alone(writer: Writer) -> None:
    """What was read stays in the buffer until it is released, with every burst before it."""
    (cpu, *_) = cpus("online")
    with opened(writer) as buffers:
        write(FITS - 1, cpu)
        first = buffers.read(0)
        write(1, cpu)
        second = buffers.read(0)
        write(1, cpu)
        assert (numbers(first), numbers(second)) == (list(range(FITS - 1)), [FITS - 1])
        assert writer.counts == (FITS, 1)
        assert second is not None

        buffers.release(second)
        write(FITS - 1, cpu)

        assert writer.counts == (2 * FITS - 1, 1)


def test_records_that_the_end_of_the_buffer_cuts_in_two_are_whole(writer: Writer) -> None:
    """Round after round every record comes, however it lies in the buffer."""
    (cpu, *_) = cpus("online")
    found = []
    with opened(writer) as buffers:
        for _ in range(60):
            write(5, cpu)
            burst = buffers.read(0)
            found += numbers(burst)
            assert burst is not None
            buffers.release(burst)

    assert found == list(range(300))


def test_a_burst_has_a_limit(writer: Writer) -> None:
    """No burst holds more than it may, and the next has what was left."""
    online = cpus("online")
    with opened(writer, max_records=5) as buffers:
        write(4, online[0])
        write(4, online[-1])

        sizes = [len(numbers(buffers.read(0))) for _ in range(2)]

        assert sizes == [5, 3]
        assert buffers.read(0) is None


def test_the_reader_is_woken_when_enough_waits(writer: Writer) -> None:
    """A waiting reader comes back long before its time when the mark is passed, with what waits."""
    waits = threading.Event()

    def act() -> None:
        waits.wait()
        write(400)

    thread = threading.Thread(target=act)
    thread.start()
    with opened(writer, pages=128, wakeup_bytes=100 * STRIDE) as buffers:
        waits.set()
        begin = time.monotonic()

        burst = buffers.read(60)

        assert time.monotonic() - begin < 30
        assert len(numbers(burst)) >= 100 // len(cpus("online"))
        thread.join()


def test_bursts_outlive_the_buffers(writer: Writer) -> None:
    """What was read can be read on after everything is closed, and closing twice does nothing."""
    with opened(writer) as buffers:
        write(3)
        burst = buffers.read(0)
    buffers.close()

    assert numbers(burst) == [0, 1, 2]
