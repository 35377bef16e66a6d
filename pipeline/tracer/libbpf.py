"""Loads ``bpf/bindsnoop.bpf.o`` with the distribution's libbpf: the tiers ``fexit``, ``kprobe`` and ``tracepoint``.

The compiled object goes in, a ``Tracer`` comes out. libbpf is called through ctypes: its ABI is stable, it is a
few hundred kilobytes, and loading takes some 30 ms. The counters are read straight from their mapped memory: asking
for them is no system call.

A tier is a list of hooks. Which of them this kernel has is found out by attaching: a hook that a tier can do without
leaves a gap with a name, any other refuses the tier.

What reads the ring is imported behind the loading, so that another thread can import the rest while the kernel checks
the programs: each takes about as long as the other.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import mmap
import os
import platform
import re
import select
import struct
import threading
import time
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Final, NamedTuple

from pipeline import carried
from pipeline.errors import TracerUnavailable
from pipeline.tracer import coverage, host

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import numpy as np
    import numpy.typing as npt

    from pipeline.tracer import Burst, Wanted
    from pipeline.tracer.ring import Ring


class Hook(NamedTuple):
    """A program and where it is attached.

    ``kind`` is one of tracepoint, cgroup, fentry, fexit, kprobe, kretprobe. ``alone`` hooks have no partner that
    would notice that they were not run, so it is the kernel's own count that says how often. ``spare`` is the number of
    the copy, 0 for the program itself.
    """

    program: str
    kind: str
    target: str
    alone: bool = False
    spare: int = 0

    def __str__(self) -> str:
        return f"{self.kind}:{self.target}"


_SPARES: Final = 2

# Hooks in the order of attaching, grouped by what stands or falls together. The end of a call is attached before its
# beginning: a request that is remembered always finds its end.
_TRACEPOINTS: Final = (
    Hook("tracepoint_exit", "tracepoint", "syscalls/sys_exit_bind"),
    Hook("tracepoint_enter", "tracepoint", "syscalls/sys_enter_bind", alone=True),
)
_POST_BIND: Final = (Hook("post_bind4", "cgroup", "post_bind4"), Hook("post_bind6", "cgroup", "post_bind6"))


def _function(name: str, target: str) -> dict[str, tuple[Hook, ...]]:
    return {
        "fexit": (Hook(f"fexit_{name}", "fexit", target), Hook(f"fentry_{name}", "fentry", target)),
        "kprobe": (
            Hook(f"kretprobe_{name}", "kretprobe", target),
            Hook(f"kprobe_{name}", "kprobe", target, alone=True),
        ),
    }


def _early_function(name: str, target: str) -> dict[str, tuple[Hook, ...]]:
    # Nothing rewrites what these two are given: the end alone sees it as it was.
    hooks = _function(name, target)
    return {**hooks, "fexit": (hooks["fexit"][0]._replace(alone=True),)}


def _with_spares(hooks: Iterable[Hook]) -> tuple[Hook, ...]:
    """Each hook and the copies that stand in for it while it is stuck; only when all are is something missed.

    A copy has to run behind the one it stands in for: the kernel runs tracepoints' programs in the order of attaching,
    and those of trampolines the other way round.
    """
    numbers = range(_SPARES + 1)
    return tuple(
        hook._replace(program=f"{hook.program}_spare{number}" if number else hook.program, spare=number)
        for hook in hooks
        for number in (numbers if hook.kind == "tracepoint" else reversed(numbers))
    )


# Every function that a bind can go through; a kernel without IPv6 or MPTCP lacks one, and misses nothing by that.
_FUNCTIONS: Final = {
    "inet_bind": _function("inet", "inet_bind"),
    "inet6_bind": _function("inet6", "inet6_bind"),
    "mptcp_bind": _function("mptcp", "mptcp_bind"),
    "security_socket_bind": _early_function("security", "security_socket_bind"),
    "__sys_bind": _early_function("syscall", "__sys_bind"),
}
_REQUIRED: Final = ("inet_bind",)
_WHERE_THERE_IS: Final = ("inet6_bind", "mptcp_bind")

_UNSEEN = "so binds through io_uring and by 32-bit processes are not seen"

# struct bind_knobs, struct bind_counters and struct request, of bpf/
_MAX_WANTED: Final = 16
_COUNTERS: Final = (
    "attempted", "submitted", "lost_ring_full", "lost_inflight_full", "lost_return_missed", "faulted", "skipped",
)  # fmt: skip
_COUNTERS_WORDS: Final = 8
_REQUEST: Final = struct.Struct("=QQIIIH22x")
_CALL_TRACEPOINT, _CALL_INET, _CALL_MPTCP = 0, 3, 4

_CALLS_AT_ONCE: Final = 1024
"""Calls of one function whose ends are followed at the same time, where tracefs can be written."""

_SWEEP_SECS: Final = 30.0
"""A request that has been under way for so long is taken for one whose end was missed: binds take microseconds."""


# --- libbpf -------------------------------------------------------------------------------------------------------

_PRINT = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_said: deque[str] = deque(maxlen=64)


def _listen(level: int, text: bytes, arguments: int) -> int:
    """Keeps libbpf's warnings for the sentence of an error instead of letting it print them."""
    if level == 0:
        said = ctypes.create_string_buffer(1 << 20)
        ctypes.CDLL(None).vsnprintf(said, ctypes.c_size_t(len(said)), text, ctypes.c_void_p(arguments))
        _said.extend(said.value.decode("utf-8", "replace").splitlines())
    return 0


_listener = _PRINT(_listen)


@functools.cache
def _libbpf() -> SimpleNamespace:
    """The library, its functions typed and its own printing silenced.

    Only those that take their time let other threads run: with a thread that imports beside it, each of the hundreds of
    short calls would wait for its turn again.
    """
    try:
        patient, short = (kind("libbpf.so.1", use_errno=True) for kind in (ctypes.CDLL, ctypes.PyDLL))
    except OSError as error:
        raise TracerUnavailable(
            "libbpf.so.1 is missing; install it (Debian, Ubuntu: apt-get install libbpf1; Fedora: dnf install libbpf)"
        ) from error
    library = SimpleNamespace()
    pointer, number, text = ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p
    for name, result, arguments in (
        ("libbpf_set_print", pointer, (pointer,)),
        ("libbpf_num_possible_cpus", number, ()),
        ("bpf_object__open_file", pointer, (text, pointer)),
        ("bpf_object__load", number, (pointer,)),
        ("bpf_object__close", None, (pointer,)),
        ("bpf_object__next_program", pointer, (pointer, pointer)),
        ("bpf_object__find_program_by_name", pointer, (pointer, text)),
        ("bpf_object__find_map_by_name", pointer, (pointer, text)),
        ("bpf_program__name", text, (pointer,)),
        ("bpf_program__fd", number, (pointer,)),
        ("bpf_program__set_autoload", number, (pointer, ctypes.c_bool)),
        ("bpf_program__attach_perf_event", pointer, (pointer, number)),
        ("bpf_program__attach_kprobe", pointer, (pointer, ctypes.c_bool, text)),
        ("bpf_program__attach_trace", pointer, (pointer,)),
        ("bpf_program__attach_cgroup", pointer, (pointer, number)),
        ("bpf_link__destroy", number, (pointer,)),
        ("bpf_link__fd", number, (pointer,)),
        ("bpf_map_get_next_key", number, (number, pointer, pointer)),
        ("bpf_map_lookup_elem", number, (number, pointer, pointer)),
        ("bpf_map_delete_elem", number, (number, pointer)),
        ("btf__load_vmlinux_btf", pointer, ()),
        ("btf__load_module_btf", pointer, (text, pointer)),
        ("btf__find_by_name_kind", ctypes.c_int32, (pointer, text, ctypes.c_uint32)),
        ("btf__free", None, (pointer,)),
        ("bpf_map__fd", number, (pointer,)),
        ("bpf_map__set_max_entries", number, (pointer, ctypes.c_uint32)),
        ("bpf_map__initial_value", pointer, (pointer, ctypes.POINTER(ctypes.c_size_t))),
        ("bpf_obj_get_info_by_fd", number, (number, pointer, ctypes.POINTER(ctypes.c_uint32))),
    ):
        takes_long = re.search("__load|__attach|__destroy|__close|__open", name)
        function = getattr(patient if takes_long else short, name)
        function.restype = result
        function.argtypes = arguments
        setattr(library, name, function)
    library.libbpf_set_print(ctypes.cast(_listener, pointer))
    return library


# --- the tracer ---------------------------------------------------------------------------------------------------


class LibbpfTracer:
    """A ``Tracer`` over one loaded object; ``open_tier`` makes it.

    ``held`` is what ``close`` lets go, last first.
    """

    def __init__(
        self,
        name: str,
        attached: Attached,
        notes: Sequence[str],
        gaps: Sequence[str],
        ring: Ring,
        loaded: int,
        held: contextlib.ExitStack,
    ) -> None:
        self.name = name
        self.hooks: Sequence[str] = tuple(str(hook) for hook in attached.hooks if not hook.spare)
        self.notes: Sequence[str] = tuple(notes)
        self.gaps: Sequence[str] = tuple(gaps)
        self.ring = ring
        self.held = held
        self._attached = attached
        self._alone: dict[tuple[str, str], list[int]] = {}
        for hook in attached.hooks:
            if hook.alone:
                copies = self._alone.setdefault((hook.kind, hook.target), [])
                copies.append(_program_descriptor(loaded, hook.program))
        self._counters = _map_counters(_map(loaded, "counters"))
        self._inflight = Inflight(_map(loaded, "inflight"))
        # An end whose call began before the beginning was hooked is no loss of this tracer's.
        self._skipped_before = int(self._counters[:, _COUNTERS.index("skipped")].sum())

    def read(self, timeout_s: float, idle_s: float = 0.0) -> Burst | None:
        """The contract is ``Tracer.read``'s."""
        return self.ring.read(timeout_s, idle_s)

    def release(self, burst: Burst) -> None:
        """The contract is ``Tracer.release``'s."""
        self.ring.release(burst)

    def half_full(self) -> bool:
        """The contract is ``Tracer.half_full``'s."""
        return self.ring.half_full()

    def counters(self) -> dict[str, int]:
        """The contract is ``Tracer.counters``'s.

        ``lost_return_missed`` counts calls whose end was never seen. ``lost_hook_skipped`` is how often a hook was
        passed by without being run: each time may have been a bind, so it is the most that can be lost that way.
        """
        totals = self._counters.sum(axis=0)
        counts = {name: int(total) for name, total in zip(_COUNTERS, totals, strict=False)}
        self._inflight.sweep()
        skipped = counts.pop("skipped") - self._skipped_before + self._inflight.skipped
        counts["lost_return_missed"] += self._inflight.missed
        counts["lost_hook_skipped"] = max(skipped, self._passed_by())
        counts["attempted"] += self._inflight.missed + counts["lost_hook_skipped"]
        return counts

    def detach(self) -> None:
        """The contract is ``Tracer.detach``'s."""
        self._passed_by()
        self._attached.links.close()
        self._inflight.sweep(final=True)

    def close(self) -> None:
        """The contract is ``Tracer.close``'s."""
        self._attached.links.close()
        self.held.close()

    def _passed_by(self) -> int:
        """How often the kernel says that it did not run a hook that has no partner, none of its copies."""
        return sum(min(map(_times_skipped, copies)) for copies in self._alone.values()) + self._attached.probes_missed()


class Attached:
    """Programs that are attached: ``hooks`` in order, and ``links``, which end them last first."""

    def __init__(self) -> None:
        self.hooks: list[Hook] = []
        self.links = contextlib.ExitStack()
        self._probes: list[int] = []
        self._missed = 0

    def add(self, hook: Hook, link: int) -> None:
        """One more, by libbpf's pointer to its link."""
        self.hooks.append(hook)
        self.links.callback(_libbpf().bpf_link__destroy, link)
        if hook.kind == "kprobe":
            self._probes.append(link)
            self.links.callback(self._probes.clear)

    def probes_missed(self) -> int:
        """How often a breakpoint at a beginning was hit and not handled (``nmissed``); 0 before Linux 6.7."""
        if self._probes:
            self._missed = sum(_probe_misses(_libbpf().bpf_link__fd(link)) for link in self._probes)
        return self._missed

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What is added inside stands or falls as one: an error detaches it again."""
        count, probes, outer = len(self.hooks), len(self._probes), self.links
        with contextlib.ExitStack() as inner:
            self.links = inner
            try:
                yield
            except BaseException:
                del self.hooks[count:]
                del self._probes[probes:]
                raise
            finally:
                self.links = outer
            outer.push(inner.pop_all())


class Inflight:
    """The map of calls under way, and what is found in it that should be over.

    ``missed`` and ``skipped`` count such calls: those that are lost attempts, and those that may have been.
    """

    def __init__(self, descriptor: int) -> None:
        self.missed = 0
        self.skipped = 0
        self._descriptor = descriptor
        self._lock = threading.Lock()
        self._seen: dict[int, int] = {}
        self._due = time.monotonic() + _SWEEP_SECS

    def sweep(self, *, final: bool = False) -> None:
        """Counts and forgets what was there at the last sweep already; all there is when nothing can end any more.

        Does nothing before ``_SWEEP_SECS`` have passed since the last time.
        """
        with self._lock:
            if not final and time.monotonic() < self._due:
                return
            self._due = time.monotonic() + _SWEEP_SECS
            found = dict(self._requests())
            for key, (number, family) in found.items():
                if final or self._seen.get(key) == number:
                    self._count(key >> 56, family)
                    _libbpf().bpf_map_delete_elem(self._descriptor, ctypes.byref(ctypes.c_uint64(key)))
            self._seen = {key: number for key, (number, _) in found.items()}

    def _count(self, call: int, family: int) -> None:
        if call in (_CALL_INET, _CALL_MPTCP) or (call == _CALL_TRACEPOINT and family in (2, 10)):
            self.missed += 1
        elif call != _CALL_TRACEPOINT:
            self.skipped += 1

    def _requests(self) -> Iterator[tuple[int, tuple[int, int]]]:
        """Key, number and family that was asked for."""
        library, value = _libbpf(), ctypes.create_string_buffer(_REQUEST.size)
        key, following = None, ctypes.c_uint64()
        # A key that goes away in the middle starts the walk again, so it is bounded.
        for _ in range(1 << 16):
            if library.bpf_map_get_next_key(self._descriptor, key and ctypes.byref(key), ctypes.byref(following)):
                return
            key = ctypes.c_uint64(following.value)
            if not library.bpf_map_lookup_elem(self._descriptor, ctypes.byref(key), value):
                number, _, _, _, read_len, family = _REQUEST.unpack(value.raw)
                yield key.value, (number, family if read_len >= 2 else 0)


def _times_skipped(program: int) -> int:
    """``recursion_misses`` of struct bpf_prog_info, 0 before Linux 5.12; tracepoints are counted since 6.7."""
    info = _info(program, 256)
    return int(struct.unpack_from("=Q", info, 208)[0])


def _probe_misses(link: int) -> int:
    """``perf_event.kprobe.missed`` of struct bpf_link_info; 0 before Linux 6.7, and without such a link before 5.15."""
    return int(struct.unpack_from("=Q", _info(link, 128), 48)[0])


def _info(descriptor: int, length: int) -> bytes:
    info = ctypes.create_string_buffer(length)
    size = ctypes.c_uint32(length)
    _libbpf().bpf_obj_get_info_by_fd(descriptor, info, ctypes.byref(size))
    return info.raw


# --- opening a tier -----------------------------------------------------------------------------------------------


def open_tier(name: str, *, ring_bytes: int, wakeup_bytes: int, max_records: int, wanted: Wanted) -> LibbpfTracer:
    """Loads and attaches the programs of one tier. TracerUnavailable when that is not possible."""
    spares = name == "fexit" and _is_preemptible()
    given = knobs(wakeup_bytes, wanted, spares=spares)
    with contextlib.ExitStack() as held:
        attached = Attached()
        held.callback(lambda: attached.links.close())
        if name == "tracepoint":
            loaded, notes, gaps = _open_tracepoints(attached, given, ring_bytes, held)
        else:
            loaded, notes, gaps = _open_functions(name, attached, given, ring_bytes, held, spares)
        from pipeline.tracer.ring import Ring

        descriptor = _map(loaded, "ring")
        # Edge-triggered: level-triggered would answer at once as long as a single record waits.
        waiting = held.enter_context(select.epoll())
        waiting.register(descriptor, select.EPOLLIN | select.EPOLLET)
        ring = Ring(descriptor, ring_bytes, wakeup_bytes=wakeup_bytes, max_records=max_records, wait=waiting.poll)
        return LibbpfTracer(name, attached, notes, gaps, ring, loaded, held.pop_all())


def _open_tracepoints(
    attached: Attached, knobs: bytes, ring_bytes: int, held: contextlib.ExitStack
) -> tuple[int, list[str], tuple[str, ...]]:
    notes = []
    # Until Linux 7.0 these programs cannot lose their CPU in the middle of a run.
    preemptible = _is_preemptible() and _functions_there(("trace_call_bpf_faultable",))
    tracepoints = _with_spares(_TRACEPOINTS) if preemptible else _TRACEPOINTS
    cgroup_hooks: tuple[Hook, ...] = _POST_BIND
    root = -1
    try:
        root = host.root_cgroup()
        held.callback(os.close, root)
    except TracerUnavailable as missing:
        cgroup_hooks = ()
        notes.append(f"post_bind is not attached, {_UNSEEN}: {missing}")
    try:
        loaded = load(tracepoints + cgroup_hooks, knobs, ring_bytes, held)
    except PermissionError:
        # Without NET_ADMIN the kernel refuses the programs of the cgroup, and with them the object.
        cgroup_hooks = ()
        loaded = _load_or_say("tracepoint", tracepoints, knobs, ring_bytes, held)
        notes.append(host.permission_sentence(f"post_bind is not attached, {_UNSEEN}", "NET_ADMIN"))
    for hook in tracepoints:
        attached.add(hook, _attach(loaded, hook))
    # post_bind comes last, when both know which binds are theirs.
    if cgroup_hooks:
        try:
            with attached.together():
                for hook in cgroup_hooks:
                    attached.add(hook, _attach_cgroup(loaded, hook, root))
        except TracerUnavailable as refusal:
            cgroup_hooks = ()
            notes.append(f"{refusal}, {_UNSEEN}")
    return loaded, notes, coverage.of_tracepoints(post_bind=bool(cgroup_hooks))


def _open_functions(
    tier: str, attached: Attached, knobs: bytes, ring_bytes: int, held: contextlib.ExitStack, spares: bool
) -> tuple[int, list[str], tuple[str, ...]]:
    if tier == "kprobe" and not Path("/sys/bus/event_source/devices/kprobe").exists():
        # Attaching would say the same, a tenth of a second later.
        raise TracerUnavailable("this kernel has no kprobes (it is built without CONFIG_KPROBE_EVENTS)")
    there = _functions_there(_FUNCTIONS) if tier == "fexit" else set(_FUNCTIONS)
    hooks_of = {name: _with_spares(hooks[tier]) if spares else hooks[tier] for name, hooks in _FUNCTIONS.items()}
    for function in _REQUIRED:
        if function not in there:
            raise TracerUnavailable(f"this kernel's BTF does not describe {function}")
    loaded = _load_or_say(
        tier,
        [hook for function, hooks in hooks_of.items() if function in there for hook in hooks],
        knobs,
        ring_bytes,
        held,
    )
    notes: list[str] = []
    unhooked = []
    for function, hooks in hooks_of.items():
        try:
            if function not in there:
                raise _NotThere(f"this kernel's BTF does not describe {function}")
            with attached.together():
                for hook in hooks:
                    if not (hook.kind == "kretprobe" and _attach_return(loaded, hook, attached, notes)):
                        attached.add(hook, _attach(loaded, hook))
        except TracerUnavailable as refusal:
            if function in _REQUIRED or (function in _WHERE_THERE_IS and not isinstance(refusal, _NotThere)):
                raise
            if function not in _WHERE_THERE_IS:
                unhooked.append(function)
                notes.append(f"{function} is not hooked: {refusal}")
    return loaded, notes, coverage.of_functions(unhooked)


class _NotThere(TracerUnavailable):
    """The kernel has no such function."""


def _is_preemptible() -> bool:
    """Whether this kernel can be told to take the CPU from a task that is in the middle of a system call."""
    return "PREEMPT" in os.uname().version


def _functions_there(wanted: Iterable[str]) -> set[str]:
    """Those of these functions that the kernel's BTF describes; IPv6 may be a module. TracerUnavailable without BTF."""
    library, function_kind = _libbpf(), 12
    found: set[str] = set()
    with contextlib.ExitStack() as held:
        kernel = library.btf__load_vmlinux_btf()
        if not kernel:
            raise _no_btf()
        held.callback(library.btf__free, kernel)
        books = [kernel]
        if Path("/sys/kernel/btf/ipv6").exists() and (module := library.btf__load_module_btf(b"ipv6", kernel)):
            held.callback(library.btf__free, module)
            books.append(module)
        for name in wanted:
            if any(library.btf__find_by_name_kind(book, name.encode(), function_kind) > 0 for book in books):
                found.add(name)
    return found


def _no_btf() -> TracerUnavailable:
    return TracerUnavailable(
        "this kernel has no BTF (/sys/kernel/btf/vmlinux is missing); it must be built with CONFIG_DEBUG_INFO_BTF=y"
    )


def knobs(wakeup_bytes: int, wanted: Wanted, *, spares: bool = False) -> bytes:
    """``struct bind_knobs``; a list that is too long for the kernel is not given to it, and everything passes."""
    pids = wanted.pids if len(wanted.pids) <= _MAX_WANTED else ()
    ports = wanted.ports if len(wanted.ports) <= _MAX_WANTED else ()
    return (
        struct.pack("=QIII", wakeup_bytes, len(pids), len(ports), wanted.only_success)
        + struct.pack(f"={_MAX_WANTED}I", *pids, *[0] * (_MAX_WANTED - len(pids)))
        + b"".join(struct.pack("=HH", part.start, part.stop - 1) for part in ports).ljust(4 * _MAX_WANTED, b"\0")
        + struct.pack("=I", spares)
    )


def _load_or_say(tier: str, hooks: Sequence[Hook], knobs: bytes, ring_bytes: int, held: contextlib.ExitStack) -> int:
    """As ``load``, with the capabilities named that are missing."""
    try:
        return load(hooks, knobs, ring_bytes, held)
    except PermissionError as error:
        what = f"the kernel refuses the BPF programs of tier {tier} ({_last_words(error)})"
        raise TracerUnavailable(host.permission_sentence(what, *host.loading_capabilities(tier))) from error


def load(hooks: Iterable[Hook], knobs: bytes, ring_bytes: int, held: contextlib.ExitStack) -> int:
    """The object with these programs and no others loaded into the kernel, as libbpf's pointer.

    PermissionError when the kernel says so, TracerUnavailable for everything else.
    """
    path = carried("bpf/bindsnoop.bpf.o")
    if not path.is_file():
        raise TracerUnavailable(f"the BPF object {path} is missing; build it with make -C bpf")
    library = _libbpf()
    _said.clear()
    loaded: int | None = library.bpf_object__open_file(os.fsencode(path), None)
    if not loaded:
        raise TracerUnavailable(f"libbpf cannot read {path}: {_last_words(_error())}")
    programs = {hook.program for hook in hooks}
    with contextlib.ExitStack() as failed:
        failed.callback(library.bpf_object__close, loaded)
        program = library.bpf_object__next_program(loaded, None)
        while program:
            library.bpf_program__set_autoload(program, library.bpf_program__name(program).decode() in programs)
            program = library.bpf_object__next_program(loaded, program)
        for name, entries in (("ring", ring_bytes), ("counters", library.libbpf_num_possible_cpus())):
            library.bpf_map__set_max_entries(library.bpf_object__find_map_by_name(loaded, name.encode()), entries)
        initial = library.bpf_object__find_map_by_name(loaded, b".rodata.knobs")
        size = ctypes.c_size_t()
        value = library.bpf_map__initial_value(initial, ctypes.byref(size))
        if size.value != len(knobs):
            raise TracerUnavailable(f"the BPF object {path} is not the one of this version; build it with make -C bpf")
        ctypes.memmove(value, knobs, len(knobs))
        result = library.bpf_object__load(loaded)
        if result in (-errno.EPERM, -errno.EACCES):
            raise PermissionError(-result, os.strerror(-result))
        if result:
            error = OSError(-result, os.strerror(-result))
            if not Path("/sys/kernel/btf/vmlinux").exists():
                raise _no_btf() from error
            raise TracerUnavailable(f"the kernel refuses the BPF programs: {_last_words(error)}") from error
        held.push(failed.pop_all())
    return loaded


def _error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, _name_of(number))


def _name_of(number: int) -> str:
    # ENOTSUPP is the kernel's own, and no C library knows it.
    return "not supported" if number == 524 else os.strerror(number)


def _last_words(error: OSError) -> str:
    """The error, with the verifier's verdict where libbpf passed it on: the line before its statistics."""
    verdict = next((_said[at - 1] for at, line in enumerate(_said) if at and line.startswith("processed ")), None)
    return f"{error.strerror}; the verifier says: {verdict}" if verdict else str(error.strerror)


def _program(loaded: int, name: str) -> int:
    program: int = _libbpf().bpf_object__find_program_by_name(loaded, name.encode())
    return program


def _program_descriptor(loaded: int, name: str) -> int:
    descriptor: int = _libbpf().bpf_program__fd(_program(loaded, name))
    return descriptor


def _map(loaded: int, name: str) -> int:
    library = _libbpf()
    descriptor: int = library.bpf_map__fd(library.bpf_object__find_map_by_name(loaded, name.encode()))
    return descriptor


def _map_counters(descriptor: int) -> npt.NDArray[np.uint64]:
    """The counters where the kernel counts: one row a CPU."""
    import numpy as np

    cpus = _libbpf().libbpf_num_possible_cpus()
    words = cpus * _COUNTERS_WORDS
    length = -(-words * 8 // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(descriptor, length, prot=mmap.PROT_READ)
    return np.frombuffer(memory, np.uint64, words).reshape(cpus, _COUNTERS_WORDS)


def _attach(loaded: int, hook: Hook) -> int:
    """libbpf's pointer to the link. _NotThere when the kernel has no such place, else TracerUnavailable."""
    library, program = _libbpf(), _program(loaded, hook.program)
    if hook.kind == "tracepoint":
        return _attach_tracepoint(program, hook, host.tracepoint_id(hook.target))
    if hook.kind in ("fentry", "fexit"):
        link = library.bpf_program__attach_trace(program)
    else:
        link = library.bpf_program__attach_kprobe(program, hook.kind == "kretprobe", hook.target.encode())
    if link:
        return int(link)
    error = _error()
    if hook.kind in ("kprobe", "kretprobe"):
        if error.errno == errno.ENOENT:
            raise _NotThere(f"this kernel has no function {hook.target}") from error
        raise host.perf_event_refused(str(hook), error) from error
    raise TracerUnavailable(f"{hook} cannot be attached: {error.strerror}") from error


def _attach_return(loaded: int, hook: Hook, attached: Attached, notes: list[str]) -> bool:
    """Attaches to the end of a function for as many calls at once as can be asked for; False when none can."""
    try:
        probe = host.ReturnProbe(hook.target, _CALLS_AT_ONCE)
    except TracerUnavailable as refusal:
        if hook.target in _REQUIRED:
            notes.append(f"of calls that wait at the same time only the first ones' ends are followed: {refusal}")
        return False
    attached.links.callback(probe.remove)
    attached.add(hook, _attach_tracepoint(_program(loaded, hook.program), hook, probe.id))
    return True


def _attach_tracepoint(program: int, hook: Hook, number_of_event: int) -> int:
    """Attaches for every process and CPU: the program hangs on the tracepoint, the event only carries it there."""
    attributes = ctypes.create_string_buffer(struct.pack("=IIQQQQQII", 2, 64, number_of_event, 1, 0, 0, 0, 1, 0), 64)
    number = {"x86_64": 298, "s390x": 331, "ppc64le": 319}.get(platform.machine(), 241)
    event = ctypes.CDLL(None, use_errno=True).syscall(number, attributes, -1, 0, -1, ctypes.c_ulong(8))
    if event < 0:
        error = _error()
        raise host.perf_event_refused(str(hook), error) from error
    link = _libbpf().bpf_program__attach_perf_event(program, event)
    if not link:
        error = _error()
        os.close(event)
        raise TracerUnavailable(f"{hook} cannot be attached: {error.strerror}") from error
    return int(link)


def _attach_cgroup(loaded: int, hook: Hook, root: int) -> int:
    link = _libbpf().bpf_program__attach_cgroup(_program(loaded, hook.program), root)
    if not link:
        error = _error()
        raise TracerUnavailable(f"{hook.target} is not attached to the root cgroup ({error.strerror})") from error
    return int(link)
