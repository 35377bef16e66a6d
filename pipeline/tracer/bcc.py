"""Compiles ``bpf/bindsnoop.bcc.c`` on this node with the distribution's bcc: the tier for kernels without BTF.

The source and the headers of the running kernel go in, a ``Tracer`` comes out: kprobes on the functions that the tier
``kprobe`` hooks, the same records, a perf buffer. It costs some 200 MiB and two seconds to start, and nothing of it
outlives the process, so it is the last tier that is tried.

bcc is a package of the distribution and of no environment of ours. The project of that name on PyPI is another one,
so what ``import bcc`` would give is looked at before it is used, and the distribution's own is found where
distributions keep such packages. Only that package is loaded from there.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import errno
import functools
import importlib.util
import itertools
import os
import platform
import re
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, NoReturn

import numpy as np

from pipeline import carried
from pipeline.errors import TracerUnavailable
from pipeline.tracer import coverage, host, pins
from pipeline.tracer.perf_buffer import PerfBuffers, cpus

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

    from pipeline.tracer import Burst, Tracer, Wanted


class Function(NamedTuple):
    """A function of the kernel: its names, newest first, and the programs ``enter_<program>``, ``leave_<program>``."""

    names: tuple[str, ...]
    program: str


FUNCTIONS: Final = (
    Function(("inet_bind",), "inet"),
    Function(("inet6_bind",), "inet"),
    Function(("mptcp_bind",), "mptcp"),
    Function(("security_socket_bind",), "security"),
    # Before Linux 4.17 there was the system call alone, with plain arguments.
    Function(("__sys_bind", "SyS_bind", "sys_bind"), "syscall"),
)
"""Every function that a bind can go through, in the order of attaching."""

REPORT: Final = "report"
"""The program that all the others end in."""

PROGRAMS: Final = (
    REPORT,
    *(f"{side}_{name}" for name in dict.fromkeys(each.program for each in FUNCTIONS) for side in ("leave", "enter")),
)
"""The programs of the source."""

_REQUIRED: Final = ("inet_bind",)
_WHERE_THERE_IS: Final = ("inet6_bind", "mptcp_bind")

RECORD_BYTES: Final = 416
"""Size of ``struct bind_event``."""

_INFLIGHT: Final = 8192
_MAX_WANTED: Final = 16

_COUNTERS: Final = (
    "attempted", "submitted", "lost_ring_full", "lost_inflight_full", "lost_return_missed", "faulted", "skipped",
)  # fmt: skip
_CALL_INET, _CALL_MPTCP = 3, 4

_CALLS_AT_ONCE: Final = 1024
"""Calls of one function whose ends are followed at the same time, where tracefs is mounted."""

_SWEEP_SECS: Final = 30.0
"""A request that has been under way for so long is taken for one whose end was missed: binds take microseconds."""

NO_PINS: Final = "nothing of tier bcc outlives its process"

_INSTALL: Final = "Debian, Ubuntu: apt-get install python3-bpfcc; Fedora: dnf install python3-bcc"


# --- bcc ----------------------------------------------------------------------------------------------------------

_FOLDERS: Final = (
    "usr/lib/python3/dist-packages",
    "usr/lib/python3*/site-packages",
    "usr/lib64/python3*/site-packages",
    "usr/local/lib/python3*/dist-packages",
    "usr/local/lib/python3*/site-packages",
)
_LOADED_AS: Final = "bcc_of_the_distribution"


@functools.cache
def library(root: Path = Path("/")) -> ModuleType:
    """The distribution's bcc, wherever this Python looks for packages.

    It is loaded under a name of its own, so that another project's ``bcc`` stays what it is. TracerUnavailable when
    there is none, or when it does not work.
    """
    wrong = ""
    found = importlib.util.find_spec("bcc")
    if found is not None and not _is_bcc(found):
        wrong = f"; {found.origin} is another project of that name, from PyPI"
        found = None
    if found is None:
        places = (
            place for folder in _FOLDERS for place in sorted(root.glob(f"{folder}/bcc/__init__.py"), reverse=True)
        )
        specs = (importlib.util.spec_from_file_location("bcc", place) for place in places)
        found = next((spec for spec in specs if spec is not None and _is_bcc(spec)), None)
    if found is None or found.origin is None:
        raise TracerUnavailable(f"bcc is missing; install it ({_INSTALL}){wrong}")
    spec = importlib.util.spec_from_file_location(_LOADED_AS, found.origin)
    if spec is None or spec.loader is None:
        raise TracerUnavailable(f"bcc cannot be loaded from {found.origin}; install it again ({_INSTALL})")
    module = importlib.util.module_from_spec(spec)
    sys.modules[_LOADED_AS] = module
    try:
        # Old releases have escapes in their strings that new Pythons complain about.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            spec.loader.exec_module(module)
    except (ImportError, OSError, SyntaxError) as error:
        del sys.modules[_LOADED_AS]
        raise TracerUnavailable(
            f"bcc in {Path(found.origin).parent} cannot be loaded ({error}); install it again with what it needs "
            f"({_INSTALL})"
        ) from error
    return module


def _is_bcc(spec: ModuleSpec) -> bool:
    """Whether this package is the BPF Compiler Collection, found out without running it."""
    return any(Path(folder, "libbcc.py").is_file() for folder in spec.submodule_search_locations or ())


@contextlib.contextmanager
def _heard() -> Iterator[list[str]]:
    """What bcc prints meanwhile, to standard output or error, line by line, once the block has ended."""
    flush = ctypes.CDLL(None).fflush
    lines: list[str] = []
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    flush(None)
    with contextlib.ExitStack() as held:
        file = held.enter_context(os.fdopen(os.memfd_create("bcc"), "w+b"))
        for descriptor in (1, 2):
            kept = os.dup(descriptor)
            held.callback(os.close, kept)
            held.callback(os.dup2, kept, descriptor)
            os.dup2(file.fileno(), descriptor)
        try:
            yield lines
        finally:
            flush(None)
            file.seek(0)
            lines += file.read().decode("utf-8", "replace").splitlines()


def compiled(wanted: Wanted | None = None) -> Any:
    """bcc's object of the compiled source, its maps created and nothing loaded yet.

    TracerUnavailable when bcc, the kernel's headers or the permission to create maps are missing, or when the headers
    do not fit.
    """
    source = carried("bpf/bindsnoop.bcc.c")
    flags = [f"-I{source.parent}", f"-DCPUS={len(cpus('possible'))}", f"-DINFLIGHT={_INFLIGHT}", *_wanted(wanted)]
    compiler = library()
    try:
        with _heard() as lines:
            programs = compiler.BPF(text=source.read_bytes(), cflags=flags)
    except Exception as error:  # bcc has no other
        raise _not_compiled(lines, error) from error
    # What is still attached when the process ends, the kernel detaches; bcc would complain on standard error.
    atexit.unregister(programs.cleanup)
    return programs


def _wanted(wanted: Wanted | None) -> list[str]:
    """Definitions that restrict the programs; a list that is too long for the kernel lets everything pass."""
    flags = []
    if wanted and 0 < len(wanted.pids) <= _MAX_WANTED:
        flags.append(f"-DWANTED_PIDS={','.join(str(pid) for pid in wanted.pids)}")
    if wanted and 0 < len(wanted.ports) <= _MAX_WANTED:
        flags.append(f"-DWANTED_PORTS={','.join(f'{{{part.start},{part.stop - 1}}}' for part in wanted.ports)}")
    if wanted and wanted.only_success:
        flags.append("-DONLY_SUCCESS=1")
    return flags


def _not_compiled(lines: Sequence[str], error: Exception) -> TracerUnavailable:
    text = "\n".join(lines)
    release = platform.release()
    if "Unable to find kernel headers" in text or re.search(r"kconfig\.h' file not found", text):
        where = os.environ.get("BCC_KERNEL_SOURCE", f"/lib/modules/{release}/build")
        return TracerUnavailable(
            f"the headers of this kernel are not in {where}; install them (Debian, Ubuntu: apt-get install "
            f"linux-headers-{release}; Fedora: dnf install kernel-devel-{release}) or, in a container, mount "
            "/lib/modules and /usr/src of the node"
        )
    if "Operation not permitted" in text:
        what = "the kernel refuses the BPF maps of tier bcc (Operation not permitted)"
        return TracerUnavailable(host.permission_sentence(what, *host.loading_capabilities("bcc")))
    verdict = next((line for line in lines if "error: " in line), str(error))
    return TracerUnavailable(
        f"bcc {library().__version__} cannot compile bindsnoop.bcc.c against the headers of this kernel ({release}): "
        f"{verdict}"
    )


# --- the tracer ---------------------------------------------------------------------------------------------------


class BccTracer:
    """A ``Tracer`` over programs that bcc compiled; ``open_tier`` makes it.

    ``held`` is what ``close`` lets go, last first. ``release`` makes room for the kernel, but a reader that is killed
    takes what it had not released with it: nothing is pinned.
    """

    def __init__(
        self,
        name: str,
        programs: Any,
        buffers: PerfBuffers,
        attached: Attached,
        notes: Sequence[str],
        gaps: Sequence[str],
        held: contextlib.ExitStack,
    ) -> None:
        self.name = name
        self.hooks: Sequence[str] = tuple(attached.hooks)
        self.notes: Sequence[str] = tuple(notes)
        self.gaps: Sequence[str] = tuple(gaps)
        self.epoch = ""
        self.resumed = False
        self.pinned = False
        self.before: Sequence[Tracer] = ()
        self.held = held
        self._buffers = buffers
        self._attached = attached
        self._table = programs[b"counters"]
        self._inflight = Inflight(programs[b"inflight"])
        self._cpus = len(cpus("possible"))
        self._lock = threading.Lock()
        self._final: dict[str, int] | None = None
        # An end whose call began before the beginning was hooked is no loss of this tracer's.
        self._skipped_before = self._totals()["skipped"]

    def read(self, timeout_s: float, idle_s: float = 0.0) -> Burst | None:  # noqa: ARG002 - only its mark wakes it
        """The contract is ``Tracer.read``'s; ``records`` is a copy, in the order of time within the burst."""
        burst = self._buffers.read(timeout_s)
        if burst is not None:
            # The programs know the clock that stands still while the machine sleeps.
            slept = time.clock_gettime_ns(time.CLOCK_BOOTTIME) - time.clock_gettime_ns(time.CLOCK_MONOTONIC)
            burst.records[:, :8].view(np.uint64)[:] += np.uint64(max(0, slept))
        return burst

    def half_full(self) -> bool:
        """The contract is ``Tracer.half_full``'s."""
        return self._buffers.half_full()

    def release(self, burst: Burst) -> None:
        """The contract is ``Tracer.release``'s, but for a reader that dies: see the class."""
        self._buffers.release(burst)

    def skip(self, end: int) -> None:
        """The contract is ``Tracer.skip``'s; there was no former agent."""

    def counters(self) -> dict[str, int]:
        """The contract is ``Tracer.counters``'s.

        ``lost_return_missed`` counts calls whose end was never seen. ``lost_hook_skipped`` is how often an end had no
        beginning: each may have been a bind, so it is the most that can be lost that way.
        """
        with self._lock:
            if self._final is None:
                self._inflight.sweep()
                return self._counts(self._totals())
            return dict(self._final)

    def _totals(self) -> dict[str, int]:
        rows = [self._table[cpu] for cpu in range(self._cpus)]
        return {name: sum(int(getattr(row, name)) for row in rows) for name in _COUNTERS}

    def _counts(self, totals: dict[str, int]) -> dict[str, int]:
        counts = dict(totals)
        skipped = counts.pop("skipped") - self._skipped_before + self._inflight.skipped
        counts["lost_return_missed"] += self._inflight.missed
        counts["lost_hook_skipped"] = skipped
        counts["attempted"] += self._inflight.missed + skipped
        return counts

    def detach(self) -> None:
        """The contract is ``Tracer.detach``'s."""
        with self._lock:
            if self._final is not None:
                return
            # An end whose call begins from here on is no loss either.
            skipped = self._totals()["skipped"]
            self._attached.close()
            self._inflight.sweep(final=True)
            self._final = self._counts({**self._totals(), "skipped": skipped})

    def close(self) -> None:
        """The contract is ``Tracer.close``'s."""
        for earlier in self.before:
            earlier.close()
        self.detach()
        self.held.close()

    def pin(self, place: pins.Place, epoch: str, digest: str) -> NoReturn:  # noqa: ARG002 - as others do it
        """Raises NoPins."""
        raise pins.NoPins(NO_PINS)


class Attached:
    """Kprobes that are attached: ``hooks`` by name, in order. ``close`` ends them, beginnings before ends."""

    def __init__(self, programs: Any) -> None:
        self.hooks: list[str] = []
        self._programs = programs
        self._beginnings: list[str] = []
        self._ends: list[str] = []

    def add(self, function: str, program: str) -> None:
        """Hooks a function of the kernel. TracerUnavailable when that is not possible, and then nothing is hooked.

        The end comes before the beginning: a request that is remembered always finds its end.
        """
        self._hook_end(function, f"leave_{program}")
        try:
            self._hook(self._programs.attach_kprobe, function, f"enter_{program}")
        except TracerUnavailable:
            _unhook(self._programs.detach_kretprobe, function)
            raise
        self._ends.append(function)
        self._beginnings.append(function)
        self.hooks += [f"kretprobe:{function}", f"kprobe:{function}"]

    def _hook_end(self, function: str, program: str) -> None:
        """Hooks the end of a function, for as many calls at once as the kernel lets us ask for.

        By itself it follows no more calls than there are CPUs, or ten, and misses the ends of all others. More can be
        asked for in tracefs alone, where it is mounted; a process that is killed leaves a name there, without effect.
        """
        attach = self._programs.attach_kretprobe
        try:
            self._hook(functools.partial(attach, maxactive=_CALLS_AT_ONCE), function, program)
        except TracerUnavailable:
            self._hook(attach, function, program)

    def _hook(self, attach: Any, function: str, program: str) -> None:
        try:
            with _heard() as lines:
                attach(event=function.encode(), fn_name=program.encode())
        except Exception as error:  # bcc has no other
            number = ctypes.get_errno()
            if number in (errno.EPERM, errno.EACCES):
                refused = OSError(number, os.strerror(number))
                raise host.perf_event_refused(f"a kprobe on {function}", refused) from error
            said = "; ".join(lines) or str(error)
            raise TracerUnavailable(f"{function} cannot be hooked: {said}") from error

    def close(self) -> None:
        """A second call does nothing."""
        while self._beginnings:
            _unhook(self._programs.detach_kprobe, self._beginnings.pop())
        while self._ends:
            _unhook(self._programs.detach_kretprobe, self._ends.pop())


def _unhook(detach: Any, function: str) -> None:
    """Ends a kprobe. Since Linux 4.17 closing it is all; bcc then wants to remove its name from tracefs, which has
    none and may not be mounted, and fails.
    """
    with _heard(), contextlib.suppress(Exception):
        detach(function.encode())


class Inflight:
    """The map of calls under way, and what is found in it that should be over.

    ``missed`` and ``skipped`` count such calls: those that are lost attempts, and those that may have been.
    """

    def __init__(self, table: Any) -> None:
        self.missed = 0
        self.skipped = 0
        self._table = table
        self._seen: dict[int, int] = {}
        self._due = time.monotonic() + _SWEEP_SECS

    def sweep(self, *, final: bool = False) -> None:
        """Counts and forgets what was there at the last sweep already; all there is when nothing can end any more.

        Does nothing before ``_SWEEP_SECS`` have passed since the last time.
        """
        if not final and time.monotonic() < self._due:
            return
        self._due = time.monotonic() + _SWEEP_SECS
        found = dict(self._requests())
        for key, number in found.items():
            if final or self._seen.get(key) == number:
                if key >> 56 in (_CALL_INET, _CALL_MPTCP):
                    self.missed += 1
                else:
                    self.skipped += 1
                with contextlib.suppress(KeyError):
                    del self._table[ctypes.c_uint64(key)]
        self._seen = found

    def _requests(self) -> Iterator[tuple[int, int]]:
        """Key and number of what is not settled. A key that goes away starts the walk again, so it is bounded."""
        for key in itertools.islice(self._table.keys(), 8 * _INFLIGHT):
            with contextlib.suppress(KeyError):
                asked = self._table[key]
                if not asked.settled:
                    yield key.value, int(asked.number)


# --- opening the tier ---------------------------------------------------------------------------------------------


def open_tier(name: str, *, ring_bytes: int, wakeup_bytes: int, max_records: int, wanted: Wanted) -> BccTracer:
    """Compiles, loads and attaches tier ``name``, which is bcc. TracerUnavailable when that is not possible.

    ``ring_bytes`` is shared by the perf buffers of all CPUs, each of which has a page at least.
    """
    there = functions_of_this_kernel()
    with contextlib.ExitStack() as held:
        # First what needs no compiler, so that a refusal costs no time.
        buffers = PerfBuffers(ring_bytes, record_bytes=RECORD_BYTES, wakeup_bytes=wakeup_bytes, max_records=max_records)
        held.callback(buffers.close)
        programs = compiled(wanted)
        held.callback(programs.cleanup)
        loaded = {program: _load(programs, program) for program in PROGRAMS}
        programs[b"reporter"][ctypes.c_int(0)] = ctypes.c_int(loaded[REPORT])
        events = programs[b"events"]
        for cpu, descriptor in buffers.descriptors.items():
            events[ctypes.c_int(cpu)] = ctypes.c_int(descriptor)
        attached = Attached(programs)
        held.callback(attached.close)
        notes, unhooked = [], []
        for function in FUNCTIONS:
            refusal = _hook(attached, function, there)
            if refusal:
                unhooked.append(function.names[0])
                notes.append(f"{function.names[0]} is not hooked: {refusal}")
        _forget_compiler(programs)
        return BccTracer(name, programs, buffers, attached, notes, coverage.of_functions(unhooked), held.pop_all())


def _hook(attached: Attached, function: Function, there: set[str]) -> str:
    """Hooks a function under the name that it has here. Why that was not possible, where the tier can do without.

    TracerUnavailable where it cannot.
    """
    name = next((name for name in function.names if name in there), None)
    wanted = function.names[0]
    if name is None:
        if wanted in _REQUIRED:
            raise TracerUnavailable(f"this kernel has no function {wanted}")
        return "" if wanted in _WHERE_THERE_IS else f"this kernel has no function {wanted}"
    try:
        attached.add(name, function.program)
    except TracerUnavailable as refusal:
        if wanted in _REQUIRED or wanted in _WHERE_THERE_IS:
            raise
        return str(refusal)
    return ""


def functions_of_this_kernel() -> set[str]:
    """Those of our functions that this kernel has. TracerUnavailable when it has no kprobes to hook them with."""
    names = {name for function in FUNCTIONS for name in function.names}
    wanted = "|".join(re.escape(name) for name in (*names, "register_kprobe"))
    listed = Path("/proc/kallsyms").read_bytes()
    found = {name.decode() for name in re.findall(rf"^\S+ [tTwW] ({wanted})\s".encode(), listed, re.MULTILINE)}
    if "register_kprobe" not in found:
        raise TracerUnavailable("this kernel has no kprobes (it is built without CONFIG_KPROBES)")
    return found


def _load(programs: Any, program: str) -> int:
    """Descriptor of a program in the kernel. TracerUnavailable when the kernel does not take it."""
    try:
        with _heard() as lines:
            descriptor: int = programs.load_func(program.encode(), library().BPF.KPROBE).fd
    except Exception as error:  # bcc has no other
        number = ctypes.get_errno()
        reason = os.strerror(number)
        if number in (errno.EPERM, errno.EACCES):
            what = f"the kernel refuses the BPF programs of tier bcc ({reason})"
            raise TracerUnavailable(host.permission_sentence(what, *host.loading_capabilities("bcc"))) from error
        verdict = next((lines[at - 1] for at, line in enumerate(lines) if at and line.startswith("processed ")), "")
        said = f"; the verifier says: {verdict}" if verdict else ""
        raise TracerUnavailable(f"the kernel refuses the BPF program {program} of tier bcc: {reason}{said}") from error
    return descriptor


def _forget_compiler(programs: Any) -> None:
    """Takes the compiler's code and what it worked with out of the memory of this process: it has done its part."""
    programs.free_bcc_memory()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # not every C library has it
    if trim is not None:
        trim(0)
