"""What this host lets a tracer do, and where it keeps what a tracer needs: capabilities, tracefs, the cgroup tree.

In: nothing but the host. Out: descriptors, numbers, and the sentence that says what is missing and how to give it.
Nothing of the host is changed: where tracefs or the cgroup tree is not mounted, a mount that nobody else can see is
made for a moment, if the process may.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import itertools
import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pipeline.errors import TracerUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_GROUP: Final = "bindsnoop"
_numbers = itertools.count()

_CAP_BPF: Final = 39
CAPABILITIES: Final = {12: "NET_ADMIN", 21: "SYS_ADMIN", 24: "SYS_RESOURCE", 38: "PERFMON", _CAP_BPF: "BPF"}


def missing_capabilities(*needed: str) -> list[str]:
    """Those of these capabilities that this process does not have; SYS_ADMIN stands for BPF and PERFMON."""
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    found = re.search(r"^CapEff:\s*([0-9a-f]+)$", status, re.MULTILINE)
    effective = int(found[1], 16) if found else 0
    if effective >> 21 & 1:
        effective |= 1 << 38 | 1 << 39
    held = {name for bit, name in CAPABILITIES.items() if effective >> bit & 1}
    return [name for name in needed if name not in held]


def permission_sentence(what: str, *needed: str) -> str:
    """``what`` was refused; which of the capabilities it needs are missing, and how to give them."""
    missing = missing_capabilities(*needed)
    if not missing:
        return (
            f"{what} although the process has the capabilities; "
            "look for a seccomp profile, kernel lockdown or a memlock limit (ulimit -l unlimited)"
        )
    names = " and ".join(f"CAP_{name}" for name in missing)
    are, them = ("is", "it") if len(missing) == 1 else ("are", "them")
    return (
        f"{what}: {names} {are} missing; run as root, or give {them} "
        f"(Kubernetes: securityContext.capabilities.add: [{', '.join(missing)}])"
    )


def perf_event_capability() -> str:
    """The capability that perf_event_open needs here; distributions let ``kernel.perf_event_paranoid`` demand more."""
    if int(Path("/proc/sys/kernel/cap_last_cap").read_text(encoding="ascii")) < 38:
        return "SYS_ADMIN"  # before Linux 5.8 there is no other
    level = Path("/proc/sys/kernel/perf_event_paranoid").read_text(encoding="ascii").strip()
    return "SYS_ADMIN" if int(level) > 2 else "PERFMON"


def loading_capabilities(tier: str) -> tuple[str, ...]:
    """The least that loading and attaching a tier's programs takes here; SYS_ADMIN stands for all the others."""
    last = int(Path("/proc/sys/kernel/cap_last_cap").read_text(encoding="ascii"))
    if last < _CAP_BPF or (tier != "fexit" and perf_event_capability() == "SYS_ADMIN"):
        return ("SYS_ADMIN",)
    return ("BPF", "PERFMON")


def perf_event_refused(what: str, error: OSError) -> TracerUnavailable:
    """What to raise when perf_event_open ended with ``error``; ``what`` names what was to be attached."""
    if error.errno not in (errno.EPERM, errno.EACCES):
        return TracerUnavailable(f"{what} cannot be opened: {error.strerror}")
    level = Path("/proc/sys/kernel/perf_event_paranoid").read_text(encoding="ascii").strip()
    return TracerUnavailable(
        permission_sentence(
            f"the kernel refuses perf_event_open for {what} (kernel.perf_event_paranoid is {level})",
            perf_event_capability(),
        )
    )


# --- places that may not be mounted -------------------------------------------------------------------------------


def mounts(kind: str) -> list[Path]:
    """Where a file system of this kind is mounted, whole, as this process sees it."""
    found = []
    for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
        fields = line.split(b" ")
        if fields[fields.index(b"-") + 1] == kind.encode() and fields[3] == b"/":
            place = re.sub(rb"\\([0-7]{3})", lambda escape: bytes([int(escape[1], 8)]), fields[4])
            found.append(Path(os.fsdecode(place)))
    return found


def private_mount(kind: str) -> int:
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


def tracepoint_id(tracepoint: str) -> int:
    """Number under which the kernel knows a tracepoint such as ``syscalls/sys_enter_bind``."""
    with tracefs(f"to find the tracepoint {tracepoint}") as root:
        try:
            return int(_text(root, f"events/{tracepoint}/id"))
        except FileNotFoundError as error:
            raise TracerUnavailable(
                f"this kernel has no tracepoint {tracepoint}: it is built without CONFIG_FTRACE_SYSCALLS"
            ) from error
        except OSError as error:
            raise TracerUnavailable(
                f"tracefs does not show the tracepoint {tracepoint} ({error.strerror}); let a group of this user read "
                "it (mount -o remount,gid=GROUP,mode=750 /sys/kernel/tracing)"
            ) from error


@contextlib.contextmanager
def tracefs(purpose: str) -> Iterator[int]:
    """Descriptor of the root of tracefs: where it is mounted and open to this process, else of a mount of our own.

    TracerUnavailable when there is none. ``purpose`` says what for, as ``to find …``.
    """
    reason, root = "none is mounted", -1
    for place in (*mounts("tracefs"), *(place / "tracing" for place in mounts("debugfs"))):
        try:
            root = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            break
        except OSError as error:
            reason = f"{place}: {error.strerror}"
    if root < 0:
        try:
            root = private_mount("tracefs")
        except OSError as error:
            raise TracerUnavailable(
                f"tracefs is needed {purpose} ({reason}), and mounting it privately is refused ({error.strerror}); "
                "mount it (mount -t tracefs tracefs /sys/kernel/tracing) or, in a pod, mount the node's "
                "/sys/kernel/tracing"
            ) from error
    try:
        yield root
    finally:
        os.close(root)


def _text(root: int, name: str) -> str:
    with open(name, encoding="ascii", opener=functools.partial(os.open, dir_fd=root)) as file:
        return file.read()


class ReturnProbe:
    """A return probe that is defined in tracefs, where alone it can be said how many calls it follows at once.

    By itself it follows one a CPU, or two and at least ten, and the ends of all further calls are missed. ``name`` is
    what ``remove_return_probes`` takes, and ``id`` what perf_event_open does. The definition does nothing by itself,
    and what is attached to it keeps it there.
    """

    def __init__(self, function: str, calls: int) -> None:
        """TracerUnavailable when tracefs cannot be written."""
        self.name = f"{_GROUP}/{function}_{os.getpid()}_{next(_numbers)}"
        with tracefs(f"to follow {calls} calls of {function} at once") as root:
            try:
                _define(root, f"r{calls}:{self.name} {function}")
                self.id = int(_text(root, f"events/{self.name}/id"))
            except OSError as error:
                raise TracerUnavailable(f"tracefs cannot be written ({error.strerror})") from error


def remove_return_probes(names: Sequence[str], wait_secs: float = 0.0) -> None:
    """Takes away these definitions, and those that others left behind; what is in use stays.

    The kernel lets go of what was pinned a moment after that is removed: so long are these waited for.
    """
    deadline = time.monotonic() + wait_secs
    with contextlib.suppress(OSError, TracerUnavailable), tracefs("to remove a probe") as root:
        defined = _defined(root)
        for name in defined:
            _undefine(root, name)
        while wait_secs and set(names) & set(_defined(root)) and time.monotonic() < deadline:
            time.sleep(0.005)
            for name in names:
                _undefine(root, name)


def _defined(root: int) -> list[str]:
    """Names of our definitions, of whatever process."""
    names = [line.partition(":")[2].partition(" ")[0] for line in _text(root, "kprobe_events").splitlines()]
    return [name for name in names if name.startswith(f"{_GROUP}/")]


def _undefine(root: int, name: str) -> None:
    with contextlib.suppress(OSError):
        _define(root, f"-:{name}")


def _define(root: int, line: str) -> None:
    events = os.open("kprobe_events", os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC, dir_fd=root)
    try:
        os.write(events, f"{line}\n".encode("ascii"))
    finally:
        os.close(events)


def root_cgroup() -> int:
    """Descriptor of the root of the version 2 cgroup tree. TracerUnavailable when it is not to be had.

    A container with a cgroup namespace sees its own cgroup as the root: programs there would miss the node.
    """
    for place in mounts("cgroup2"):
        with contextlib.suppress(OSError):
            descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            if os.fstat(descriptor).st_ino == 1:
                return descriptor
            os.close(descriptor)
    with contextlib.suppress(OSError):
        descriptor = private_mount("cgroup2")
        if os.fstat(descriptor).st_ino == 1:
            return descriptor
        os.close(descriptor)
    raise TracerUnavailable(
        "the root of the version 2 cgroup tree is not visible; mount the node's /sys/fs/cgroup into the container"
    )
