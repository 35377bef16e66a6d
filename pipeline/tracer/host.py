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
import os
import re
from pathlib import Path
from typing import Any, Final

from pipeline.errors import TracerUnavailable

CAPABILITIES: Final = {12: "NET_ADMIN", 21: "SYS_ADMIN", 38: "PERFMON", 39: "BPF"}


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
    return (
        f"{what}: {names} is missing; run as root, or give it "
        f"(Kubernetes: securityContext.capabilities.add: [{', '.join(missing)}])"
    )


def perf_event_capability() -> str:
    """The capability that perf_event_open needs here; distributions let ``kernel.perf_event_paranoid`` demand more."""
    level = Path("/proc/sys/kernel/perf_event_paranoid").read_text(encoding="ascii").strip()
    return "SYS_ADMIN" if int(level) > 2 else "PERFMON"


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
    inside = f"events/{tracepoint}/id"
    reason = "none is mounted"
    for root in (*mounts("tracefs"), *(place / "tracing" for place in mounts("debugfs"))):
        try:
            return int((root / inside).read_text(encoding="ascii"))
        except OSError as error:
            reason = f"{root}: {error.strerror}"
    try:
        mount = private_mount("tracefs")
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
