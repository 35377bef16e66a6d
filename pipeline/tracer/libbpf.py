"""Loads ``bpf/bindsnoop.bpf.o`` with the distribution's libbpf and reads its ring.

The compiled object goes in, a ``Tracer`` comes out. libbpf is called through ctypes: its ABI is stable, it is a
few hundred kilobytes, and loading takes some 30 ms. The ring and the counters are read straight from their mapped
memory: a burst is one strided view, however many records it holds, and asking for counters is no system call.

Nothing of the host is changed: where tracefs or the cgroup tree is not mounted, a mount that nobody else can see is
made for a moment, if the process may.
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
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from pipeline import carried
from pipeline.errors import TracerUnavailable
from pipeline.tracer import Burst

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt


class Tier(NamedTuple):
    """Programs of one way to look: tracepoints in the order of attaching, and those of the root cgroup."""

    tracepoints: tuple[tuple[str, str], ...]
    cgroup: tuple[str, ...]


# The end of the call is attached before its beginning: a request that is remembered always finds its end. post_bind
# comes last, when both know which binds are theirs.
TIERS: Final = {
    "tracepoint": Tier(
        tracepoints=(
            ("tracepoint_exit", "syscalls/sys_exit_bind"),
            ("tracepoint_enter", "syscalls/sys_enter_bind"),
        ),
        cgroup=("post_bind4", "post_bind6"),
    ),
}

_UNSEEN = "so binds through io_uring and by 32-bit processes are not seen"

# struct bind_counters of bpf/bind_event.h
_COUNTERS: Final = ("attempted", "submitted", "lost_ring_full", "lost_inflight_full", "faulted")
_COUNTERS_WORDS: Final = 8

_CAPABILITIES: Final = {12: "NET_ADMIN", 21: "SYS_ADMIN", 38: "PERFMON", 39: "BPF"}


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
def _libbpf() -> ctypes.CDLL:
    """The library, its functions typed and its own printing silenced."""
    try:
        library = ctypes.CDLL("libbpf.so.1", use_errno=True)
    except OSError as error:
        raise TracerUnavailable(
            "libbpf.so.1 is missing; install it (Debian, Ubuntu: apt-get install libbpf1; Fedora: dnf install libbpf)"
        ) from error
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
        ("bpf_program__attach_cgroup", pointer, (pointer, number)),
        ("bpf_link__destroy", number, (pointer,)),
        ("bpf_map__fd", number, (pointer,)),
        ("bpf_map__set_max_entries", number, (pointer, ctypes.c_uint32)),
        ("bpf_map__initial_value", pointer, (pointer, ctypes.POINTER(ctypes.c_size_t))),
        ("bpf_obj_get_info_by_fd", number, (number, pointer, ctypes.POINTER(ctypes.c_uint32))),
    ):
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments
    library.libbpf_set_print(ctypes.cast(_listener, pointer))
    return library


def _missing_capabilities(*needed: int) -> list[str]:
    """Names of the capabilities that this process does not have; SYS_ADMIN stands for BPF and PERFMON."""
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    found = re.search(r"^CapEff:\s*([0-9a-f]+)$", status, re.MULTILINE)
    effective = int(found[1], 16) if found else 0
    if effective >> 21 & 1:
        effective |= 1 << 38 | 1 << 39
    return [_CAPABILITIES[bit] for bit in needed if not effective >> bit & 1]


def _permission_sentence(what: str, *needed: int) -> str:
    missing = _missing_capabilities(*needed)
    if not missing:
        return (
            f"{what} although the process has the capabilities; "
            "look for a seccomp profile, kernel lockdown or a memlock limit (ulimit -l unlimited)"
        )
    names = " and ".join(f"CAP_{name}" for name in missing)
    return (
        f"{what}: {names} is missing; run as root, or give it "
        f"(Kubernetes: securityContext.capabilities.add: [{', '.join(missing)}])"
    )


# --- places that may not be mounted -------------------------------------------------------------------------------


def _mounts(kind: str) -> list[Path]:
    """Where a file system of this kind is mounted, whole, as this process sees it."""
    found = []
    for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
        fields = line.split(b" ")
        if fields[fields.index(b"-") + 1] == kind.encode() and fields[3] == b"/":
            place = re.sub(rb"\\([0-7]{3})", lambda escape: bytes([int(escape[1], 8)]), fields[4])
            found.append(Path(os.fsdecode(place)))
    return found


def _private_mount(kind: str) -> int:
    """Descriptor of a mount of this kind that is in nobody's tree and ends with the descriptor. OSError."""
    # Numbers of fsopen, fsconfig and fsmount are the same on every architecture but alpha.
    call = ctypes.CDLL(None, use_errno=True).syscall
    create, cloexec = 6, 1

    def checked(*arguments: Any) -> int:
        result = int(call(*arguments))
        if result < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return result

    context = checked(430, kind.encode(), cloexec)
    try:
        checked(431, context, create, None, None, 0)
        return checked(432, context, cloexec, 0)
    finally:
        os.close(context)


def _tracepoint_id(tracepoint: str) -> int:
    """Number under which the kernel knows a tracepoint such as ``syscalls/sys_enter_bind``."""
    inside = f"events/{tracepoint}/id"
    reason = "none is mounted"
    for root in (*_mounts("tracefs"), *(place / "tracing" for place in _mounts("debugfs"))):
        try:
            return int((root / inside).read_text(encoding="ascii"))
        except OSError as error:
            reason = f"{root}: {error.strerror}"
    try:
        mount = _private_mount("tracefs")
    except OSError as error:
        raise TracerUnavailable(
            f"tracefs is needed to find the tracepoint {tracepoint} ({reason}), and mounting it privately is refused "
            f"({error.strerror}); mount it (mount -t tracefs tracefs /sys/kernel/tracing) or, in a pod, mount the "
            "node's /sys/kernel/tracing"
        ) from error
    try:
        with open(inside, encoding="ascii", opener=functools.partial(os.open, dir_fd=mount)) as file:
            return int(file.read())
    except OSError as error:
        raise TracerUnavailable(
            f"this kernel has no tracepoint {tracepoint}: {error.strerror}; it is built without CONFIG_FTRACE_SYSCALLS"
        ) from error
    finally:
        os.close(mount)


def _root_cgroup() -> int:
    """Descriptor of the root of the version 2 cgroup tree. TracerUnavailable when it is not to be had.

    A container with a cgroup namespace sees its own cgroup as the root: programs there would miss the node.
    """
    for place in _mounts("cgroup2"):
        with contextlib.suppress(OSError):
            descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            if os.fstat(descriptor).st_ino == 1:
                return descriptor
            os.close(descriptor)
    with contextlib.suppress(OSError):
        descriptor = _private_mount("cgroup2")
        if os.fstat(descriptor).st_ino == 1:
            return descriptor
        os.close(descriptor)
    raise TracerUnavailable(
        "the root of the version 2 cgroup tree is not visible; mount the node's /sys/fs/cgroup into the container"
    )


# --- the ring -----------------------------------------------------------------------------------------------------

_BUSY: Final = 1 << 31
_DISCARDED: Final = 1 << 30
_HEADER_BYTES: Final = 8


class Ring:
    """Reader of a BPF ring buffer whose records all have one size, given by the first of them.

    The kernel's layout: a page with the consumer's position, a page with the producer's, then the data twice in a
    row, so that every stretch is contiguous. Reading moves a position of our own; ``release`` moves the consumer's.
    """

    def __init__(
        self,
        descriptor: int,
        ring_bytes: int,
        *,
        wakeup_bytes: int,
        max_records: int,
        wait: Callable[[float], object],
    ) -> None:
        """``wait`` blocks for so many seconds at most, and less when the kernel says that the mark is passed."""
        self.descriptor = descriptor
        self._mask = ring_bytes - 1
        self._wakeup_bytes = wakeup_bytes
        self._max_records = max_records
        self._wait = wait
        page = mmap.PAGESIZE
        self._consumer = np.frombuffer(mmap.mmap(descriptor, page), np.uint64, 1)
        self._memory = mmap.mmap(descriptor, page + 2 * ring_bytes, prot=mmap.PROT_READ, offset=page)
        self._producer = np.frombuffer(self._memory, np.uint64, 1)
        self._at = int(self._consumer[0])
        self._record_bytes = 0
        self._stride = 0
        self._fence = threading.Lock()

    def read(self, timeout_s: float) -> Burst | None:
        """The contract is ``Tracer.read``'s."""
        deadline = time.monotonic() + timeout_s
        enough = self._wakeup_bytes
        if self._stride:
            enough = min(enough, self._max_records * self._stride)
        while int(self._producer[0]) - self._at < enough:
            left = deadline - time.monotonic()
            if left <= 0:
                break
            self._wait(left)
        return self._take()

    def _take(self) -> Burst | None:
        while True:
            start = mmap.PAGESIZE + (self._at & self._mask)
            waiting = int(self._producer[0]) - self._at
            if not waiting:
                return None
            if not self._stride and not self._measure(start):
                return None
            count = min(waiting // self._stride, self._max_records)
            headers = np.ndarray((count,), np.uint32, self._memory, start, (self._stride,))
            odd = np.flatnonzero(headers != self._record_bytes)
            if odd.size:
                count = int(odd[0])
            if not count and not self._skip(int(headers[0])):
                return None
            if count:
                break
        # Data must not be read before the headers that say it is there: releasing and taking a lock orders them on
        # processors that would reorder loads.
        with self._fence:
            pass
        with self._fence:
            records = np.ndarray(
                (count, self._record_bytes), np.uint8, self._memory, start + _HEADER_BYTES, (self._stride, 1)
            )
        self._at += count * self._stride
        return Burst(records, self._at)

    def _measure(self, start: int) -> bool:
        """Learns the size of the records from the first; False while that is being written."""
        (header,) = struct.unpack_from("=I", self._memory, start)
        if header & _BUSY:
            return False
        self._record_bytes = header & ~_DISCARDED
        self._stride = _HEADER_BYTES + (self._record_bytes + 7 & ~7)
        return True

    def _skip(self, header: int) -> bool:
        """Steps over a record that is no record; False when it is one that is still being written."""
        if header & _BUSY:
            return False
        if header & ~_DISCARDED != self._record_bytes:
            raise TracerUnavailable(
                f"the ring holds a record of {header & ~_DISCARDED} bytes among records of {self._record_bytes}: "
                "the BPF object is not the one of this version"
            )
        if header & _DISCARDED:
            self._at += self._stride
        return True

    def release(self, burst: Burst) -> None:
        """The contract is ``Tracer.release``'s."""
        self._consumer[0] = max(burst.end, int(self._consumer[0]))


# --- the tracer ---------------------------------------------------------------------------------------------------


class LibbpfTracer:
    """A ``Tracer`` over one loaded object; ``open_tier`` makes it.

    ``held`` is what ``close`` lets go, last first.
    """

    def __init__(
        self,
        name: str,
        hooks: Sequence[str],
        notes: Sequence[str],
        ring: Ring,
        counters: npt.NDArray[np.uint64],
        programs: Sequence[int],
        links: contextlib.ExitStack,
        held: contextlib.ExitStack,
    ) -> None:
        self.name = name
        self.hooks = hooks
        self.notes = notes
        self.ring = ring
        self.held = held
        self._counters = counters
        self._programs = programs
        self._links = links

    def read(self, timeout_s: float) -> Burst | None:
        """The contract is ``Tracer.read``'s."""
        return self.ring.read(timeout_s)

    def release(self, burst: Burst) -> None:
        """The contract is ``Tracer.release``'s."""
        self.ring.release(burst)

    def counters(self) -> dict[str, int]:
        """The contract is ``Tracer.counters``'s.

        ``lost_hook_skipped`` is how often the kernel did not run a program because another one was running on that
        CPU: each may have been a bind, so it is the most that can be lost that way.
        """
        totals = self._counters.sum(axis=0)
        counts = {name: int(total) for name, total in zip(_COUNTERS, totals, strict=False)}
        counts["lost_hook_skipped"] = sum(_times_skipped(program) for program in self._programs)
        counts["attempted"] += counts["lost_hook_skipped"]
        return counts

    def detach(self) -> None:
        """The contract is ``Tracer.detach``'s."""
        self._links.close()

    def close(self) -> None:
        """The contract is ``Tracer.close``'s."""
        self.detach()
        self.held.close()


def _times_skipped(program: int) -> int:
    """``recursion_misses`` of struct bpf_prog_info, 0 before Linux 5.12; tracepoints are counted since 6.7."""
    info = ctypes.create_string_buffer(256)
    size = ctypes.c_uint32(len(info))
    if _libbpf().bpf_obj_get_info_by_fd(program, info, ctypes.byref(size)):
        return 0
    misses: int = struct.unpack_from("=Q", info, 208)[0]
    return misses


def open_tier(name: str, *, ring_bytes: int, wakeup_bytes: int, max_records: int) -> LibbpfTracer:
    """Loads and attaches the programs of one tier. TracerUnavailable when that is not possible."""
    tier = TIERS[name]
    notes = []
    with contextlib.ExitStack() as held:
        links = held.enter_context(contextlib.ExitStack())
        cgroup_programs = tier.cgroup
        try:
            root = _root_cgroup()
            held.callback(os.close, root)
        except TracerUnavailable as missing:
            cgroup_programs = ()
            notes.append(f"post_bind is not attached, {_UNSEEN}: {missing}")
        tracepoints = tuple(program for program, _ in tier.tracepoints)
        try:
            loaded = _load(tracepoints + cgroup_programs, ring_bytes, wakeup_bytes, held)
        except PermissionError:
            # Without NET_ADMIN the kernel refuses the programs of the cgroup, and with them the object.
            cgroup_programs = ()
            try:
                loaded = _load(tracepoints, ring_bytes, wakeup_bytes, held)
            except PermissionError as error:
                what = f"the kernel refuses the BPF programs of tier {name} ({_last_words(error)})"
                raise TracerUnavailable(_permission_sentence(what, 39, 38)) from error
            notes.append(_permission_sentence(f"post_bind is not attached, {_UNSEEN}", 12))
        ring_descriptor = _map(loaded, "ring")
        # Edge-triggered: level-triggered would answer at once as long as a single record waits.
        waiting = held.enter_context(select.epoll())
        waiting.register(ring_descriptor, select.EPOLLIN | select.EPOLLET)
        ring = Ring(ring_descriptor, ring_bytes, wakeup_bytes=wakeup_bytes, max_records=max_records, wait=waiting.poll)
        hooks = []
        for program, tracepoint in tier.tracepoints:
            _attach_tracepoint(loaded, program, tracepoint, links)
            hooks.append(f"tracepoint:{tracepoint}")
        for program in cgroup_programs:
            try:
                _attach_cgroup(loaded, program, root, links)
                hooks.append(f"cgroup:{program}")
            except OSError as error:
                notes.append(f"{program} is not attached to the root cgroup ({error.strerror}), {_UNSEEN}")
        return LibbpfTracer(
            name,
            tuple(hooks),
            tuple(notes),
            ring,
            _map_counters(_map(loaded, "counters")),
            [_libbpf().bpf_program__fd(_program(loaded, program)) for program in tracepoints + cgroup_programs],
            links.pop_all(),
            held.pop_all(),
        )


def _load(programs: Sequence[str], ring_bytes: int, wakeup_bytes: int, held: contextlib.ExitStack) -> int:
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
    with contextlib.ExitStack() as failed:
        failed.callback(library.bpf_object__close, loaded)
        program = library.bpf_object__next_program(loaded, None)
        while program:
            library.bpf_program__set_autoload(program, library.bpf_program__name(program).decode() in programs)
            program = library.bpf_object__next_program(loaded, program)
        for name, entries in (("ring", ring_bytes), ("counters", library.libbpf_num_possible_cpus())):
            library.bpf_map__set_max_entries(library.bpf_object__find_map_by_name(loaded, name.encode()), entries)
        knobs = library.bpf_object__find_map_by_name(loaded, b".rodata.knobs")
        size = ctypes.c_size_t()
        value = library.bpf_map__initial_value(knobs, ctypes.byref(size))
        ctypes.memmove(value, struct.pack("=Q", wakeup_bytes), 8)
        result = library.bpf_object__load(loaded)
        if result in (-errno.EPERM, -errno.EACCES):
            raise PermissionError(-result, os.strerror(-result))
        if result:
            error = OSError(-result, os.strerror(-result))
            if not Path("/sys/kernel/btf/vmlinux").exists():
                raise TracerUnavailable(
                    "this kernel has no BTF (/sys/kernel/btf/vmlinux is missing); "
                    "it must be built with CONFIG_DEBUG_INFO_BTF=y"
                ) from error
            raise TracerUnavailable(f"the kernel refuses the BPF programs: {_last_words(error)}") from error
        held.push(failed.pop_all())
    return loaded


def _error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))


def _last_words(error: OSError) -> str:
    """The error, with the verifier's verdict where libbpf passed it on: the line before its statistics."""
    verdict = next((_said[at - 1] for at, line in enumerate(_said) if at and line.startswith("processed ")), None)
    return f"{error.strerror}; the verifier says: {verdict}" if verdict else str(error.strerror)


def _program(loaded: int, name: str) -> int:
    program: int = _libbpf().bpf_object__find_program_by_name(loaded, name.encode())
    return program


def _map(loaded: int, name: str) -> int:
    library = _libbpf()
    descriptor: int = library.bpf_map__fd(library.bpf_object__find_map_by_name(loaded, name.encode()))
    return descriptor


def _map_counters(descriptor: int) -> npt.NDArray[np.uint64]:
    """The counters where the kernel counts: one row a CPU."""
    cpus = _libbpf().libbpf_num_possible_cpus()
    words = cpus * _COUNTERS_WORDS
    length = -(-words * 8 // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(descriptor, length, prot=mmap.PROT_READ)
    return np.frombuffer(memory, np.uint64, words).reshape(cpus, _COUNTERS_WORDS)


def _attach_tracepoint(loaded: int, program: str, tracepoint: str, links: contextlib.ExitStack) -> None:
    """Attaches for every process and CPU: the program hangs on the tracepoint, the event only carries it there."""
    attributes = ctypes.create_string_buffer(
        struct.pack("=IIQQQQQII", 2, 64, _tracepoint_id(tracepoint), 1, 0, 0, 0, 1, 0), 64
    )
    number = {"x86_64": 298, "s390x": 331, "ppc64le": 319}.get(platform.machine(), 241)
    event = ctypes.CDLL(None, use_errno=True).syscall(number, attributes, -1, 0, -1, ctypes.c_ulong(8))
    if event < 0:
        error = _error()
        if error.errno in (errno.EPERM, errno.EACCES):
            level = Path("/proc/sys/kernel/perf_event_paranoid").read_text(encoding="ascii").strip()
            needed = 21 if int(level) > 2 else 38
            what = f"the kernel refuses perf_event_open (kernel.perf_event_paranoid is {level})"
            raise TracerUnavailable(_permission_sentence(what, needed)) from error
        raise TracerUnavailable(f"the tracepoint {tracepoint} cannot be opened: {error.strerror}") from error
    link = _libbpf().bpf_program__attach_perf_event(_program(loaded, program), event)
    if not link:
        error = _error()
        os.close(event)
        raise TracerUnavailable(f"{program} cannot be attached to {tracepoint}: {error.strerror}") from error
    links.callback(_libbpf().bpf_link__destroy, link)


def _attach_cgroup(loaded: int, program: str, root: int, links: contextlib.ExitStack) -> None:
    link = _libbpf().bpf_program__attach_cgroup(_program(loaded, program), root)
    if not link:
        raise _error()
    links.callback(_libbpf().bpf_link__destroy, link)
