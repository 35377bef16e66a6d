"""attempted = submitted + lost, with each cause of loss forced one by one.

The body of the BPF programs is run by ``BPF_PROG_TEST_RUN``: no hook is attached, so nobody else's binds are counted
and every number is exact.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.tracer import Wanted, libbpf
from pipeline.tracer.ring import Ring

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="tracing needs root")

PROGRAMS = ("account_attempt", "account_begin", "account_end")

INFLIGHT_ENTRIES = 8192


class Runs:
    """A tracer over an object that nothing calls but ``run``."""

    def __init__(self, ring_bytes: int, held: contextlib.ExitStack, wanted: Wanted) -> None:
        hooks = [libbpf.Hook(program, "raw_tp", program) for program in PROGRAMS]
        self._library = ctypes.CDLL("libbpf.so.1", use_errno=True)
        self._object = libbpf.load(hooks, libbpf.knobs(1 << 20, wanted), ring_bytes, held)
        self._library.bpf_object__find_map_by_name.restype = ctypes.c_void_p
        self._library.bpf_object__find_program_by_name.restype = ctypes.c_void_p
        ring = Ring(self.map("ring"), ring_bytes, wakeup_bytes=1, max_records=99, wait=lambda _: None)
        maps = {"ring": self.map("ring"), "counters": self.map("counters"), "inflight": self.map("inflight")}
        maps["control"] = self.map(".data.control")
        self.tracer = libbpf.LibbpfTracer("none", libbpf.Attached(), (), (), ring, maps, {}, held.pop_all())

    def map(self, name: str) -> int:
        """Descriptor of a map."""
        found = self._library.bpf_object__find_map_by_name(ctypes.c_void_p(self._object), name.encode())
        return int(self._library.bpf_map__fd(ctypes.c_void_p(found)))

    def run(self, program: str, times: int = 1, argument: int = 0) -> None:
        """Runs a program of tests/kernel/accounting.bpf.c on the CPU that this thread is on."""
        found = self._library.bpf_object__find_program_by_name(ctypes.c_void_p(self._object), program.encode())
        descriptor = self._library.bpf_program__fd(ctypes.c_void_p(found))
        # As many words as a program may take for its arguments, whatever it takes them for.
        context = (ctypes.c_uint64 * 12)(argument)
        attributes = Attributes(
            prog_fd=descriptor, ctx_size_in=ctypes.sizeof(context), ctx_in=ctypes.addressof(context)
        )
        call, bpf, test_run = ctypes.CDLL(None, use_errno=True).syscall, {"x86_64": 321, "aarch64": 280}, 10
        for _ in range(times):
            number = call(bpf[os.uname().machine], test_run, ctypes.byref(attributes), ctypes.sizeof(attributes))
            assert number == 0, os.strerror(ctypes.get_errno())

    def read(self) -> int:
        """How many records the ring held."""
        count = 0
        while burst := self.tracer.read(0):
            count += len(burst.records)
            self.tracer.release(burst)
        return count

    def moved(self) -> dict[str, int]:
        """Counters that are not 0. Their sum is always that of the attempts."""
        counts = self.tracer.counters()
        assert counts["attempted"] == sum(counts.values()) - counts["attempted"]
        return {name: value for name, value in counts.items() if value}


class Attributes(ctypes.Structure):
    """``test`` of ``union bpf_attr``."""

    _fields_ = (
        ("prog_fd", ctypes.c_uint32), ("retval", ctypes.c_uint32), ("data_size_in", ctypes.c_uint32),
        ("data_size_out", ctypes.c_uint32), ("data_in", ctypes.c_uint64), ("data_out", ctypes.c_uint64),
        ("repeat", ctypes.c_uint32), ("duration", ctypes.c_uint32), ("ctx_size_in", ctypes.c_uint32),
        ("ctx_size_out", ctypes.c_uint32), ("ctx_in", ctypes.c_uint64), ("ctx_out", ctypes.c_uint64),
        ("flags", ctypes.c_uint32), ("cpu", ctypes.c_uint32), ("batch_size", ctypes.c_uint32), ("pad", ctypes.c_uint32),
    )  # fmt: skip


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The object of tests/kernel/accounting.bpf.c."""
    made = tmp_path_factory.mktemp("bpf") / "accounting.bpf.o"
    source = ROOT / "tests" / "kernel" / "accounting.bpf.c"
    subprocess.run(["make", "-s", "-C", ROOT / "bpf", f"SOURCE={source}", f"OBJECT={made}"], check=True)
    return made


@pytest.fixture
def runs(built: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Runs]]:
    """Makes ``Runs`` and closes them."""
    monkeypatch.setattr(libbpf, "carried", lambda _: built)
    with contextlib.ExitStack() as held:

        def make(ring_bytes: int = 1 << 16, wanted: Wanted | None = None) -> Runs:
            made = Runs(ring_bytes, contextlib.ExitStack(), wanted or Wanted())
            held.callback(made.tracer.close)
            return made

        yield make


def test_a_full_ring_on_every_cpu(runs: Callable[..., Runs]) -> None:
    """What finds the ring full is counted as that; what found room is read, to the last; then it goes on."""
    under_test, allowed = runs(4096), os.sched_getaffinity(0)
    room = 4096 // (8 + 416)
    try:
        for cpu in allowed:
            os.sched_setaffinity(0, {cpu})
            under_test.run("account_attempt", 100)
    finally:
        os.sched_setaffinity(0, allowed)

    attempts = 100 * len(allowed)
    assert under_test.moved() == {"attempted": attempts, "submitted": room, "lost_ring_full": attempts - room}
    assert under_test.read() == room
    under_test.run("account_attempt")
    assert under_test.read() == 1


def test_an_end_that_was_missed(runs: Callable[..., Runs]) -> None:
    """A call whose end was never seen is a lost attempt: at once when its thread makes the next, else in the end."""
    under_test = runs()

    under_test.run("account_begin")
    assert under_test.moved() == {}
    under_test.run("account_begin")
    assert under_test.moved() == {"attempted": 1, "lost_return_missed": 1}
    under_test.run("account_end")
    assert under_test.moved() == {"attempted": 2, "submitted": 1, "lost_return_missed": 1}
    under_test.run("account_begin")
    under_test.tracer.detach()
    assert under_test.moved() == {"attempted": 3, "submitted": 1, "lost_return_missed": 2}
    assert under_test.read() == 1


def test_an_end_that_was_missed_is_found_while_tracing_goes_on(
    runs: Callable[..., Runs], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is still under way at two sweeps in a row is over; what began between them is not."""
    under_test = runs()
    now, clock = [0.0], time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: clock() + now[0])

    def a_minute_later() -> dict[str, int]:
        now[0] += 60
        return under_test.moved()

    under_test.run("account_begin")
    assert a_minute_later() == {}  # seen for the first time
    under_test.run("account_end")
    under_test.run("account_begin")
    assert a_minute_later() == {"attempted": 1, "submitted": 1}  # another call of the same thread
    assert under_test.moved() == {"attempted": 1, "submitted": 1}  # not looked at again so soon
    assert a_minute_later() == {"attempted": 2, "submitted": 1, "lost_return_missed": 1}
    under_test.run("account_end")
    assert under_test.moved()["lost_hook_skipped"] == 1


def test_a_beginning_that_was_missed(runs: Callable[..., Runs]) -> None:
    """An end without a beginning may have been an attempt that nobody can report any more."""
    under_test = runs()

    under_test.run("account_end", 3)

    assert under_test.moved() == {"attempted": 3, "lost_hook_skipped": 3}


def test_a_full_map_of_calls(runs: Callable[..., Runs]) -> None:
    """An attempt that cannot be remembered is lost once: its end is not taken for another."""
    under_test = runs()
    library, inflight, value = ctypes.CDLL("libbpf.so.1"), under_test.map("inflight"), ctypes.create_string_buffer(56)
    for number in range(1, INFLIGHT_ENTRIES + 1):
        key = ctypes.c_uint64(number)
        assert library.bpf_map_update_elem(inflight, ctypes.byref(key), value, ctypes.c_uint64(0)) == 0

    under_test.run("account_begin")
    under_test.run("account_end")

    assert under_test.moved() == {"attempted": 1, "lost_inflight_full": 1}


def test_what_is_not_wanted_is_not_counted(runs: Callable[..., Runs]) -> None:
    """The kernel's own filter: an attempt that was not asked for takes no room and is no attempt."""
    under_test = runs(wanted=Wanted(pids=(os.getpid(),), only_success=True))
    of_nobody = runs(wanted=Wanted(pids=(1, 2, 3)))

    under_test.run("account_attempt", 5, argument=98)
    under_test.run("account_attempt", 2)
    of_nobody.run("account_attempt", 5)

    assert under_test.moved() == {"attempted": 2, "submitted": 2}
    assert of_nobody.moved() == {}
