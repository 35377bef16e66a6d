"""Loads ``bpf/bindsnoop.bpf.o`` with the distribution's libbpf: the tiers ``fexit``, ``kprobe`` and ``tracepoint``.

The compiled object goes in, a ``Tracer`` comes out. libbpf is called through ctypes: its ABI is stable, it is a
few hundred kilobytes, and loading takes some 30 ms. The counters are read straight from their mapped memory: asking
for them is no system call.

A tier is a list of hooks. Which of them this kernel has is found out by attaching: a hook that a tier can do without
leaves a gap with a name, any other refuses the tier.

What reads the ring is imported behind the loading, so that another thread can import the rest while the kernel checks
the programs: each takes about as long as the other.

Pinned, all of it outlives the process: ``take_over`` finds it again, and ``hand_over`` divides the binds between two
tracers that were attached at the same time. Counts that are not the kernel's stand beside its own, in the same map.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import hashlib
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

from pipeline import __version__, carried
from pipeline.errors import TracerUnavailable
from pipeline.tracer import coverage, host, pins

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    import numpy as np
    import numpy.typing as npt

    from pipeline.tracer import Burst, Tracer, Wanted
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

_FORM: Final = "bind_event 416, bind_counters 64, bind_control 48; 1"
"""Of what a tracer shares with the next one; the last number grows when a layout changes that keeps its size."""

_OVERLAP_SECS: Final = 0.02
"""How long two tracers are attached at the same time, at least, when one hands over to the other."""

_LONGEST_NS: Final = 1_000_000_000
"""How long after the second was attached the moment that divides their records lies, at most."""

_QUIET_NS: Final = 20_000
"""The programs of two tracers see the same bind within a few µs: so long a silence divides the binds between them."""

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
        ("bpf_program__attach_trace", pointer, (pointer,)),
        ("bpf_program__attach_cgroup", pointer, (pointer, number)),
        ("bpf_link__destroy", number, (pointer,)),
        ("bpf_link__disconnect", None, (pointer,)),
        ("bpf_link__fd", number, (pointer,)),
        ("bpf_obj_pin", number, (number, text)),
        ("bpf_obj_get", number, (text,)),
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
    """A ``Tracer`` over programs in the kernel; ``open_tier`` loads them, ``take_over`` finds them pinned.

    ``maps`` are descriptors by name, ``alone`` those of the programs without a partner. ``held`` is what ``close`` lets
    go, last first. ``folder`` is where it was found pinned.
    """

    def __init__(
        self,
        name: str,
        attached: Attached,
        notes: Sequence[str],
        gaps: Sequence[str],
        ring: Ring,
        maps: Mapping[str, int],
        alone: Mapping[str, int],
        held: contextlib.ExitStack,
        folder: pins.Folder | None = None,
    ) -> None:
        self.name = name
        self.hooks: Sequence[str] = tuple(attached.hooks)
        self.notes: Sequence[str] = tuple(notes)
        self.gaps: Sequence[str] = tuple(gaps)
        self.before: Sequence[Tracer] = ()
        self.epoch = folder.epoch if folder else ""
        self.resumed = folder is not None
        self.ring = ring
        self.held = held
        self._folder = folder
        self._attached = attached
        self._maps = maps
        self._alone = dict(alone)
        self._detached = False
        self._counters = Counters(maps["counters"])
        self._inflight = Inflight(maps["inflight"], self._counters.add)
        self.control = Control(maps["control"])
        ring.since_ns, ring.until_ns = self.control["since_ns"], self.control["until_ns"]
        if not self.resumed:
            # An end whose call began before the beginning was hooked is no loss of this tracer's.
            self._counters.add("skipped", -self._counters.totals()["skipped"])
            self.control["opened_ns"] = time.clock_gettime_ns(time.CLOCK_BOOTTIME)

    @property
    def pinned(self) -> bool:
        """The contract is ``Tracer.pinned``'s."""
        return self._folder is not None

    @property
    def attached(self) -> bool:
        """Whether it records."""
        return not self.control["closed_ns"]

    @property
    def digest(self) -> str:
        """Of what is pinned, empty when nothing is."""
        return self._folder.digest if self._folder else ""

    def read(self, timeout_s: float, idle_s: float = 0.0) -> Burst | None:
        """The contract is ``Tracer.read``'s."""
        return self.ring.read(timeout_s, idle_s)

    def release(self, burst: Burst) -> None:
        """The contract is ``Tracer.release``'s."""
        self.ring.release(burst)

    def skip(self, end: int) -> None:
        """The contract is ``Tracer.skip``'s."""
        self.ring.skip(end)

    def half_full(self) -> bool:
        """The contract is ``Tracer.half_full``'s."""
        return self.ring.half_full()

    def counters(self) -> dict[str, int]:
        """The contract is ``Tracer.counters``'s.

        ``lost_return_missed`` counts calls whose end was never seen. ``lost_hook_skipped`` is how often a hook was
        passed by without being run: each time may have been a bind, so it is the most that can be lost that way.
        """
        self._inflight.sweep()
        counts = self._counters.totals()
        counts["lost_hook_skipped"] = max(counts.pop("skipped"), self._passed_by())
        counts["attempted"] += counts["lost_hook_skipped"]
        others = self.control["earlier"] + self.control["later"]
        counts["attempted"] -= others
        counts["submitted"] -= others
        return counts

    def detach(self) -> None:
        """The contract is ``Tracer.detach``'s."""
        self.shut()
        if not self._detached:
            self._inflight.sweep(final=True)
            self._detached = True

    def shut(self) -> None:
        """Nothing is recorded from here on. A call under way keeps its request, and is not counted yet."""
        passed_by = self._passed_by()
        if not self.control["closed_ns"]:
            self.control["closed_ns"] = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        # What the kernel counts is gone with the programs.
        self._counters.add("skipped", max(0, passed_by - self._counters.totals()["skipped"]))
        self._alone.clear()
        if self._folder:
            for name in self._folder.names("link_"):
                (self._folder.path / f"link_{name}").unlink()
        running = bool(self._attached.links)
        self._attached.close(wait_secs=0.5 if self._folder else 0.0)
        if running:
            _wait_for_programs()

    def close(self) -> None:
        """The contract is ``Tracer.close``'s."""
        for earlier in self.before:
            earlier.close()
        self._attached.close()
        if self._folder and self._detached and self.ring.empty():
            self._folder.remove()
        self._folder = None
        self.held.close()

    def _passed_by(self) -> int:
        """How often the kernel says that it did not run a hook that has no partner, none of its copies."""
        copies: dict[str, list[int]] = {}
        for program, descriptor in self._alone.items():
            copies.setdefault(program.partition("_spare")[0], []).append(_times_skipped(descriptor))
        return sum(map(min, copies.values())) + self._attached.probes_missed()

    # --- beyond the end of the process ---

    def pin(self, place: pins.Place, epoch: str, digest: str) -> None:
        """Keeps all of it in the kernel when the process ends. NoPins when that is not possible, and nothing is."""
        with self._pinned_in(place, epoch, digest):
            pass
        self.epoch = epoch
        self._folder = pins.Folder(place.path / f"{epoch}-{digest}", epoch, digest)

    def try_to_pin(self, place: pins.Place) -> None:
        """As ``pin``, but nothing stays."""
        with self._pinned_in(place, "0" * 16, "0" * 16, keep=False):
            pass

    @contextlib.contextmanager
    def _pinned_in(self, place: pins.Place, epoch: str, digest: str, *, keep: bool = True) -> Iterator[None]:
        texts = {
            "form": _FORM, "tier": self.name, "hooks": ", ".join(self.hooks), "gaps": ",".join(self.gaps),
            "links": ",".join(self._attached.links), "probes": " ".join(self._attached.probes),
            **{f"note_{number}": note for number, note in enumerate(self.notes)},
        }  # fmt: skip
        with place.making(epoch, digest, keep=keep) as path:
            for name, descriptor in self._maps.items():
                _pin(descriptor, path / name)
            for program, descriptor in self._alone.items():
                _pin(descriptor, path / f"alone_{program}")
            for program, descriptor in self._attached.links.items():
                _pin(descriptor, path / f"link_{program}")
            for name, text in texts.items():
                pins.write(path / name, text)
            yield

    # --- from one tracer to the next ---

    def look(self) -> None:
        """Remembers which calls are under way, and counts those as missed that were so the last time."""
        self._inflight.look()

    def leave_the_rest(self) -> None:
        """Calls that are under way still are another tracer's."""
        self._inflight.forget()


class Counters:
    """The counters where the kernel counts: a row a CPU, and one of our own."""

    def __init__(self, descriptor: int) -> None:
        import numpy as np

        rows = _libbpf().libbpf_num_possible_cpus() + 1
        words = rows * _COUNTERS_WORDS
        length = -(-words * 8 // mmap.PAGESIZE) * mmap.PAGESIZE
        self._rows = np.frombuffer(mmap.mmap(descriptor, length), np.uint64, words).reshape(rows, _COUNTERS_WORDS)

    def totals(self) -> dict[str, int]:
        """Each counter, summed."""
        return {name: int(total) for name, total in zip(_COUNTERS, self._rows.sum(axis=0), strict=False)}

    def add(self, name: str, number: int) -> None:
        """Adds to our own row, which may be below 0 as long as no sum is."""
        import numpy as np

        at = _COUNTERS.index(name)
        self._rows[-1, at : at + 1] += np.uint64(number & (1 << 64) - 1)


class Control:
    """``struct bind_control`` where the kernel sees it, a number by the name of its field."""

    _FIELDS: Final = ("opened_ns", "closed_ns", "since_ns", "until_ns", "earlier", "later")

    def __init__(self, descriptor: int) -> None:
        import numpy as np

        self._words = np.frombuffer(mmap.mmap(descriptor, mmap.PAGESIZE), np.uint64, len(self._FIELDS))

    def __getitem__(self, field: str) -> int:
        return int(self._words[self._FIELDS.index(field)])

    def __setitem__(self, field: str, number: int) -> None:
        self._words[self._FIELDS.index(field)] = number


class Attached:
    """Programs that are attached: ``hooks`` as text, in order, and ``links``, descriptors by name of the program.

    ``probes`` are names of ``host.ReturnProbe``s.
    """

    def __init__(self) -> None:
        self.hooks: list[str] = []
        self.links: dict[str, int] = {}
        self.probes: list[str] = []
        self._events: list[int] = []
        self._missed = 0

    def add(self, hook: Hook, link: int, *events: int) -> None:
        """One more, by the descriptors of its link and of what that hangs on."""
        if not hook.spare:
            self.hooks.append(str(hook))
        self.links[hook.program] = link
        self._events += events

    def probes_missed(self) -> int:
        """How often a breakpoint at a beginning was hit and not handled (``nmissed``); 0 before Linux 6.7."""
        probes = [link for program, link in self.links.items() if program.startswith("kprobe_")]
        if probes:
            self._missed = sum(map(_probe_misses, probes))
        return self._missed

    def close(self, wait_secs: float = 0.0) -> None:
        """Lets go of the links, last first: what is pinned nowhere ends. A second call does nothing."""
        self._close(0, 0)
        if self.probes:
            host.remove_return_probes(self.probes, wait_secs)

    def _close(self, links: int, events: int) -> None:
        for program in list(self.links)[: links - 1 if links else None : -1]:
            os.close(self.links.pop(program))
        for event in self._events[events:]:
            os.close(event)
        del self._events[events:]

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What is added inside stands or falls as one: an error detaches it again."""
        hooks, links, events = len(self.hooks), len(self.links), len(self._events)
        try:
            yield
        except BaseException:
            del self.hooks[hooks:]
            self._close(links, events)
            raise


class Inflight:
    """The map of calls under way, and what is found in it that should be over.

    ``count`` is told the name of a counter and by how much it grows, for every such call: one that is a lost attempt,
    or that may have been.
    """

    def __init__(self, descriptor: int, count: Callable[[str, int], None]) -> None:
        self._descriptor = descriptor
        self._count = count
        self._lock = threading.Lock()
        self._seen: dict[int, int] = {}
        self._due = time.monotonic() + _SWEEP_SECS

    def sweep(self, *, final: bool = False) -> None:
        """Counts and forgets what was there at the last sweep already; all there is when nothing can end any more.

        Does nothing before ``_SWEEP_SECS`` have passed since the last time.
        """
        if final or time.monotonic() >= self._due:
            self.look(final=final)

    def look(self, *, final: bool = False) -> None:
        """As ``sweep``, at once."""
        with self._lock:
            self._due = time.monotonic() + _SWEEP_SECS
            found = dict(self._requests())
            for key, (number, family) in found.items():
                if final or self._seen.get(key) == number:
                    # A reader that dies in between counts it again rather than never.
                    self._missed(key >> 56, family)
                    self._delete(key)
            self._seen = {key: number for key, (number, _) in found.items()}

    def forget(self) -> None:
        """Everything in it, uncounted."""
        with self._lock:
            for key in [key for key, _ in self._requests()]:
                self._delete(key)

    def _delete(self, key: int) -> None:
        _libbpf().bpf_map_delete_elem(self._descriptor, ctypes.byref(ctypes.c_uint64(key)))

    def _missed(self, call: int, family: int) -> None:
        if call in (_CALL_INET, _CALL_MPTCP) or (call == _CALL_TRACEPOINT and family in (2, 10)):
            self._count("lost_return_missed", 1)
            self._count("attempted", 1)
        elif call != _CALL_TRACEPOINT:
            self._count("skipped", 1)

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

_MAPS: Final = {"ring": "ring", "counters": "counters", "inflight": "inflight", "control": ".data.control"}
"""Those that a tracer works with, by the names that they are pinned by."""


def _has_spares(tier: str) -> bool:
    return tier == "fexit" and _is_preemptible()


def open_tier(name: str, *, ring_bytes: int, wakeup_bytes: int, max_records: int, wanted: Wanted) -> LibbpfTracer:
    """Loads and attaches the programs of one tier. TracerUnavailable when that is not possible."""
    spares = _has_spares(name)
    given = knobs(wakeup_bytes, wanted, spares=spares)
    with contextlib.ExitStack() as held:
        attached = Attached()
        held.callback(attached.close)
        if name == "tracepoint":
            loaded, notes, gaps = _open_tracepoints(attached, given, ring_bytes, held)
        else:
            loaded, notes, gaps = _open_functions(name, attached, given, ring_bytes, held, spares)
        maps = {ours: _map(loaded, theirs) for ours, theirs in _MAPS.items()}
        alone = {
            hook.program: _program_descriptor(loaded, hook.program)
            for hook in _hooks_of(name)
            if hook.alone and hook.program in attached.links
        }
        ring = _ring(maps["ring"], ring_bytes, wakeup_bytes, max_records, held)
        return LibbpfTracer(name, attached, notes, gaps, ring, maps, alone, held.pop_all())


def _ring(descriptor: int, ring_bytes: int, wakeup_bytes: int, max_records: int, held: contextlib.ExitStack) -> Ring:
    from pipeline.tracer.ring import Ring

    # Edge-triggered: level-triggered would answer at once as long as a single record waits.
    waiting = held.enter_context(select.epoll())
    waiting.register(descriptor, select.EPOLLIN | select.EPOLLET)
    return Ring(descriptor, ring_bytes, wakeup_bytes=wakeup_bytes, max_records=max_records, wait=waiting.poll)


def _hooks_of(tier: str) -> list[Hook]:
    """All that a tier may attach."""
    plain = (
        _TRACEPOINTS + _POST_BIND
        if tier == "tracepoint"
        else tuple(hook for hooks in _FUNCTIONS.values() for hook in hooks[tier])
    )
    return list(_with_spares(plain))


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
        attached.add(hook, *_attach(loaded, hook))
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
    if tier == "kprobe":
        _kprobes()  # attaching would say that there are none a tenth of a second later
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
                        attached.add(hook, *_attach(loaded, hook))
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
        for name, entries in (("ring", ring_bytes), ("counters", library.libbpf_num_possible_cpus() + 1)):
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


def _attach(loaded: int, hook: Hook) -> tuple[int, ...]:
    """Descriptors of the link and of what it hangs on. _NotThere when the kernel has no such place, else
    TracerUnavailable.
    """
    if hook.kind == "tracepoint":
        return _attach_event(loaded, hook, _TRACEPOINT_EVENTS, host.tracepoint_id(hook.target))
    if hook.kind in ("kprobe", "kretprobe"):
        return _attach_probe(loaded, hook)
    link = _libbpf().bpf_program__attach_trace(_program(loaded, hook.program))
    if not link:
        error = _error()
        raise TracerUnavailable(f"{hook} cannot be attached: {error.strerror}") from error
    return (_descriptor_of(link),)


def _descriptor_of(link: int) -> int:
    """The descriptor of libbpf's link, which is ours from here on: libbpf would stop what is pinned."""
    library = _libbpf()
    descriptor: int = library.bpf_link__fd(link)
    library.bpf_link__disconnect(link)
    library.bpf_link__destroy(link)
    return descriptor


def _kprobes() -> tuple[int, int]:
    """The type of event that kprobes are here, and the bit of its configuration that makes it a return probe."""
    source = Path("/sys/bus/event_source/devices/kprobe")
    try:
        kind = int((source / "type").read_text(encoding="ascii"))
        bit = int((source / "format" / "retprobe").read_text(encoding="ascii").partition(":")[2])
    except OSError as error:
        raise TracerUnavailable("this kernel has no kprobes (it is built without CONFIG_KPROBE_EVENTS)") from error
    return kind, bit


def _attach_probe(loaded: int, hook: Hook) -> tuple[int, ...]:
    kind, bit = _kprobes()
    function = ctypes.create_string_buffer(hook.target.encode())
    config = 1 << bit if hook.kind == "kretprobe" else 0
    return _attach_event(loaded, hook, kind, config, ctypes.addressof(function))


def _attach_return(loaded: int, hook: Hook, attached: Attached, notes: list[str]) -> bool:
    """Attaches to the end of a function for as many calls at once as can be asked for; False when none can."""
    try:
        probe = host.ReturnProbe(hook.target, _CALLS_AT_ONCE)
    except TracerUnavailable as refusal:
        if hook.target in _REQUIRED:
            notes.append(f"of calls that wait at the same time only the first ones' ends are followed: {refusal}")
        return False
    attached.probes.append(probe.name)
    attached.add(hook, *_attach_event(loaded, hook, _TRACEPOINT_EVENTS, probe.id))
    return True


_TRACEPOINT_EVENTS: Final = 2


def _attach_event(loaded: int, hook: Hook, kind: int, config: int, function: int = 0) -> tuple[int, ...]:
    """Attaches for every process and CPU: the program hangs on the event's place, which alone carries it there.

    ``kind`` and ``config`` are those of struct perf_event_attr, ``function`` the address of a name for a kprobe.
    """
    attributes = struct.pack("=IIQQQQQIIQQ", kind, 72, config, 1, 0, 0, 0, 1, 0, function, 0)
    number = {"x86_64": 298, "s390x": 331, "ppc64le": 319}.get(platform.machine(), 241)
    event = ctypes.CDLL(None, use_errno=True).syscall(number, attributes, -1, 0, -1, ctypes.c_ulong(8))
    if event < 0:
        error = _error()
        if error.errno == errno.ENOENT and function:
            raise _NotThere(f"this kernel has no function {hook.target}") from error
        raise host.perf_event_refused(str(hook), error) from error
    link = _libbpf().bpf_program__attach_perf_event(_program(loaded, hook.program), event)
    if not link:
        error = _error()
        os.close(event)
        raise TracerUnavailable(f"{hook} cannot be attached: {error.strerror}") from error
    descriptor = _descriptor_of(link)
    # Before Linux 5.15 the event is all there is.
    return (descriptor,) if descriptor == event else (descriptor, event)


def _attach_cgroup(loaded: int, hook: Hook, root: int) -> int:
    link = _libbpf().bpf_program__attach_cgroup(_program(loaded, hook.program), root)
    if not link:
        error = _error()
        raise TracerUnavailable(f"{hook.target} is not attached to the root cgroup ({error.strerror})") from error
    return _descriptor_of(link)


# --- what others left pinned --------------------------------------------------------------------------------------


def digest(tier: str, *, ring_bytes: int, wakeup_bytes: int, wanted: Wanted) -> str:
    """16 hex digits of everything that a tracer's programs and settings depend on: whose are the same goes on."""
    path = carried("bpf/bindsnoop.bpf.o")
    what = hashlib.sha256(path.read_bytes() if path.is_file() else b"")
    # What was missing when it was attached stays missing.
    lacking = host.missing_capabilities(*host.CAPABILITIES.values())
    given = knobs(wakeup_bytes, wanted, spares=_has_spares(tier))
    what.update(repr((__version__, _FORM, tier, ring_bytes, given, lacking)).encode())
    return what.hexdigest()[:16]


def take_over(place: pins.Place, *, wakeup_bytes: int, max_records: int) -> tuple[list[LibbpfTracer], list[str]]:
    """Every tracer that is pinned and can be read, in the order of opening; and a sentence about each that cannot.

    Those are removed. TracerUnavailable when this process may not have them.
    """
    place.sweep()
    found, lost = [], []
    for folder in place.folders():
        try:
            with contextlib.ExitStack() as held:
                found.append(_from_pins(folder, wakeup_bytes, max_records, held))
        except FileNotFoundError:
            lost.append(f"what epoch {folder.epoch} left pinned is not whole, and was removed")
            folder.remove()
        except _OtherForm as waiting:
            lost.append(
                f"epoch {folder.epoch} left {waiting} bytes of records that this version cannot read; they are lost"
            )
            folder.remove()
    return sorted(found, key=lambda tracer: tracer.control["opened_ns"]), lost


class _OtherForm(Exception):
    """The number of bytes in a ring of another layout."""


def _from_pins(folder: pins.Folder, wakeup_bytes: int, max_records: int, held: contextlib.ExitStack) -> LibbpfTracer:
    """FileNotFoundError when a pin is missing, _OtherForm when ours is another, TracerUnavailable for all else."""

    def taken(name: str) -> int:
        found: int = _libbpf().bpf_obj_get(os.fsencode(folder.path / name))
        if found >= 0:
            return found
        error = _error()
        if error.errno == errno.ENOENT:
            raise FileNotFoundError(name)
        what = f"{folder.path / name} cannot be opened ({error.strerror})"
        raise TracerUnavailable(host.permission_sentence(what, *host.loading_capabilities("tracepoint"))) from error

    def descriptor(name: str) -> int:
        found = taken(name)
        held.callback(os.close, found)
        return found

    in_ring = descriptor("ring")
    (ring_bytes,) = struct.unpack_from("=I", _info(in_ring, 128), 16)  # max_entries of struct bpf_map_info
    ring = _ring(in_ring, ring_bytes, min(wakeup_bytes, ring_bytes // 4), max_records, held)
    if folder.text("form") != _FORM:
        raise _OtherForm(ring.waiting_bytes())
    maps = {name: in_ring if name == "ring" else descriptor(name) for name in _MAPS}
    alone = {program: descriptor(f"alone_{program}") for program in folder.names("alone_")}
    control = Control(maps["control"])
    attached = Attached()
    attached.hooks = folder.text("hooks").split(", ")
    held.callback(attached.close)
    if not control["closed_ns"]:
        for program in folder.text("links").split(","):
            attached.links[program] = taken(f"link_{program}")
    attached.probes = folder.text("probes").split()
    return LibbpfTracer(
        folder.text("tier"),
        attached,
        [folder.text(f"note_{number}") for number in range(len(folder.names("note_")))],
        folder.text("gaps").split(","),
        ring,
        maps,
        alone,
        held.pop_all(),
        folder,
    )


def unread(folder: pins.Folder) -> str:
    """How many bytes of records wait in a ring that is pinned, in words; empty when none do, or when nobody can say."""
    with contextlib.suppress(TracerUnavailable, OSError), contextlib.ExitStack() as held:
        descriptor = _libbpf().bpf_obj_get(os.fsencode(folder.path / "ring"))
        if descriptor < 0:
            return ""
        held.callback(os.close, descriptor)
        waiting = _ring(descriptor, mmap.PAGESIZE, 1, 1, held).waiting_bytes()
        return f", with {waiting} bytes of records that nobody has read" if waiting else ""
    return ""


def hand_over(olds: Sequence[LibbpfTracer], new: Tracer | None) -> None:
    """Ends tracers that were found pinned, in the order of opening, and divides what two of them in a row recorded.

    ``new`` comes after them; None when it cannot be attached beside them. What both of two recorded while both were
    attached is a matter of its time. The moment is chosen where neither recorded anything for the longest while, so
    that no bind lies on both sides of it. Where a process was killed in the middle of this, the next does it again.
    """
    for at, old in enumerate(olds):
        follower = olds[at + 1] if at + 1 < len(olds) else new
        if not old.control["closed_ns"]:
            old.look()
            if follower is not None:
                time.sleep(_OVERLAP_SECS)
            old.shut()
            # What began before the new one was attached, and has not ended, neither of them sees.
            old.look()
        if isinstance(follower, LibbpfTracer) and not old.control["until_ns"]:
            _divide(old, follower)
    if new is not None:
        new.before = tuple(olds)


def _divide(old: LibbpfTracer, new: LibbpfTracer) -> None:
    first, last = new.control["opened_ns"], old.control["closed_ns"]
    cut = (1 << 64) - 1
    if first < last:
        old.leave_the_rest()
        old_times, new_times = old.ring.times(), new.ring.times()
        # Rings that nobody has read for long are full, and silent for that.
        cut, quiet_ns = _quiet_moment(old_times, new_times, first, min(last, first + _LONGEST_NS))
        if quiet_ns < _QUIET_NS:
            new.notes = (
                *new.notes,
                f"binds came so fast when epoch {old.epoch} was taken over that one may be told twice or not at all",
            )
        new.control["earlier"] = int((new_times < cut).sum())
        old.control["later"] = int((old_times >= cut).sum())
        new.control["since_ns"] = new.ring.since_ns = cut
    # This is what says that it is done.
    old.control["until_ns"] = old.ring.until_ns = cut


def _quiet_moment(
    old_times: npt.NDArray[np.uint64], new_times: npt.NDArray[np.uint64], first: int, last: int
) -> tuple[int, int]:
    """The middle of the longest silence of two tracers from ``first`` to ``last``, and how long that is, in ns.

    A task may lose its CPU between the programs of one and of the other, and that makes a silence too. There one has
    recorded a bind more than usual, and it does not count.
    """
    import numpy as np

    times = np.concatenate([[first], old_times, new_times, [last]]).astype(np.int64)
    ahead = np.concatenate([[0], np.full(len(old_times), -1), np.full(len(new_times), 1), [0]])
    within = np.flatnonzero((times >= first) & (times <= last))
    order = within[np.argsort(times[within], kind="stable")]
    lengths = np.diff(times[order])
    ahead = np.cumsum(ahead[order])[:-1]
    heard = lengths >= min(_QUIET_NS, int(lengths.max()))
    values, counts = np.unique(ahead[heard], return_counts=True)
    at = int(np.where(ahead == values[counts.argmax()], lengths, 0).argmax())
    return int(times[order[at]]) + int(lengths[at]) // 2, int(lengths[at])


def _pin(descriptor: int, path: Path) -> None:
    """NoPins."""
    if _libbpf().bpf_obj_pin(descriptor, os.fsencode(path)):
        what = "a link" if path.name.startswith("link_") else "a map or program"
        raise pins.NoPins(f"the kernel does not pin {what} as {path} ({_error().strerror})")


def _wait_for_programs() -> None:
    """Until every program that is running now has come to its end: the kernel waits for its readers, as they are."""
    number = {"x86_64": 324, "s390x": 356, "ppc64le": 365}.get(platform.machine(), 283)
    if ctypes.CDLL(None).syscall(number, 1, 0, 0):
        # Some kernels do not wait for this; a program takes microseconds.
        time.sleep(0.02)
