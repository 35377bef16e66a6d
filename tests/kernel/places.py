"""Places from which a process binds, made for one test: namespaces, cgroups with somebody else's programs, sandboxes.

Namespaces and sandboxes are the calling thread's, so each is entered in a thread that ends with the test, or left
again. Everything is done by system calls: where the tests run there may be neither a shell nor iproute2.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.kernel.binds import NotHere, number_of, system_call

_libc = ctypes.CDLL(None, use_errno=True)

CLONE_NEWNS, CLONE_NEWPID, CLONE_NEWNET = 0x00020000, 0x20000000, 0x40000000


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


# --- namespaces ---------------------------------------------------------------------------------------------------


def unshare(flags: int) -> None:
    """This thread, or its children where that is the kernel's way, go on in new namespaces."""
    _checked(_libc.unshare(flags))


def enter(namespace: int) -> None:
    """This thread goes on in the namespace behind a descriptor."""
    _checked(_libc.setns(namespace, 0))


def inode_of(namespace: str) -> int:
    """Number of this thread's namespace: ``net``, ``mnt``."""
    return Path(f"/proc/thread-self/ns/{namespace}").stat().st_ino


@contextlib.contextmanager
def network(loopback: str) -> Iterator[int]:
    """This thread in a network namespace of its own, whose loopback device, index 1, has this name and is up.

    ``::1`` and ``fe80::1`` are there too, every group may make ping sockets, and MPTCP is on where the kernel has it.
    Gives a descriptor of the namespace that was left, and goes back there.
    """
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        unshare(CLONE_NEWNET)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
            fcntl.ioctl(control, 0x8923, struct.pack("16s16s8x", b"lo", os.fsencode(loopback)))  # SIOCSIFNAME
            device_up(loopback)
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as control:
            link_local = socket.inet_pton(socket.AF_INET6, "fe80::1")
            fcntl.ioctl(control, 0x8916, struct.pack("=16sIi", link_local, 64, 1))  # SIOCSIFADDR
        Path("/proc/sys/net/ipv4/ping_group_range").write_text("0 2147483647", encoding="ascii")
        with contextlib.suppress(FileNotFoundError):
            Path("/proc/sys/net/mptcp/enabled").write_text("1", encoding="ascii")
        yield before
    finally:
        enter(before)
        os.close(before)


def device_up(name: str) -> None:
    """Brings a device of this thread's network namespace up."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, 0x8914, struct.pack("16sh22x", os.fsencode(name), 1))  # SIOCSIFFLAGS, IFF_UP


def vxlan_device(name: str, port: int) -> None:
    """Makes a tunnel device that receives on a UDP port: the kernel itself binds that port when it comes up."""

    def attribute(kind: int, value: bytes) -> bytes:
        return (struct.pack("=HH", 4 + len(value), kind) + value).ljust(4 + len(value) + 3 & ~3, b"\0")

    data = attribute(1, struct.pack("=I", 42)) + attribute(15, struct.pack("!H", port))
    link = attribute(3, name.encode() + b"\0") + attribute(18, attribute(1, b"vxlan") + attribute(2, data))
    body = struct.pack("=BxHiII", 0, 0, 0, 0, 0) + link
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as control:
        # RTM_NEWLINK; NLM_F_REQUEST, NLM_F_ACK, NLM_F_EXCL, NLM_F_CREATE
        control.send(struct.pack("=IHHII", 16 + len(body), 16, 0x605, 1, 0) + body)
        number = -struct.unpack_from("=i", control.recv(4096), 16)[0]
    if number:
        raise NotHere(f"a device of kind vxlan: {os.strerror(number)}")


# --- BPF programs of somebody else --------------------------------------------------------------------------------

Instruction = tuple[int, int, int, int]
"""Code, registers (source << 4 | destination), offset, constant."""

_EXIT: Instruction = (0x95, 0, 0, 0)


def _set(register: int, value: int) -> Instruction:
    return (0xB7, register, 0, value)


def _store(offset: int, register: int) -> Instruction:
    """32 bits of a register to where register 1 points."""
    return (0x63, register << 4 | 1, offset, 0)


def _signed(value: bytes) -> int:
    number: int = struct.unpack("=i", value)[0]
    return number


def rewriting(address: str, port: int) -> list[Instruction]:
    """A program of ``bind4`` that puts another address and port into the request (struct bpf_sock_addr)."""
    return [
        _set(2, _signed(socket.inet_aton(address))),
        _store(4, 2),
        _set(2, socket.htons(port)),
        _store(24, 2),
        _set(0, 1),
        _EXIT,
    ]


DENYING: Sequence[Instruction] = (_set(0, 0), _EXIT)
"""A program of a cgroup that refuses."""

# include/uapi/linux/bpf.h: type of the program, type of attachment
BIND4, BIND6, POST_BIND4 = (18, 8), (18, 9), (9, 12)


def _bpf(command: int, attributes: bytes) -> int:
    return system_call(
        number_of("bpf"), command, ctypes.create_string_buffer(attributes, len(attributes)), len(attributes)
    )


def _load(kind: int, attach_type: int, instructions: Sequence[Instruction], attach_btf_id: int = 0) -> int:
    """Descriptor of a program that the kernel has accepted. OSError."""
    code = ctypes.create_string_buffer(b"".join(struct.pack("=BBhi", *instruction) for instruction in instructions))
    gpl = ctypes.create_string_buffer(b"GPL")
    begin = struct.pack("=IIQQ", kind, len(instructions), ctypes.addressof(code), ctypes.addressof(gpl))
    # No log, no flags, a name, no device; no debugging information; what a security module's program attaches to.
    return _bpf(5, begin + struct.pack("=24x16s4xI36xI", b"somebody_else", attach_type, attach_btf_id))


def cgroup_root() -> Path:
    """Where the version 2 tree is mounted."""
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines():
        fields = line.split(" ")
        if fields[fields.index("-") + 1] == "cgroup2" and fields[3] == "/":
            return Path(fields[4])
    raise NotHere("no version 2 cgroup tree is mounted")


@contextlib.contextmanager
def cgroup(
    name: str, program: tuple[int, int] | None = None, instructions: Sequence[Instruction] = ()
) -> Iterator[Path]:
    """This process in a cgroup of its own, with somebody else's program attached; then back where it was.

    ``name`` may be a path, whose folders are made too.
    """
    root = cgroup_root()
    (before,) = (
        line.partition("::")[2]
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
        if line.startswith("0::")
    )
    made = root / name
    made.mkdir(parents=True)
    try:
        with contextlib.ExitStack() as attached:
            if program:
                kind, attach_type = program
                descriptor = _load(kind, attach_type, instructions)
                attached.callback(os.close, descriptor)
                folder = os.open(made, os.O_RDONLY | os.O_DIRECTORY)
                attached.callback(os.close, folder)
                _bpf(8, struct.pack("=IIII", folder, descriptor, attach_type, 2))  # more programs are allowed
                attached.callback(_bpf, 9, struct.pack("=IIII", folder, descriptor, attach_type, 0))
            attached.callback((root / before.lstrip("/") / "cgroup.procs").write_text, "0", encoding="ascii")
            (made / "cgroup.procs").write_text("0", encoding="ascii")
            yield made
    finally:
        for folder in (made, *made.parents[: len(Path(name).parts) - 1]):
            folder.rmdir()


# --- sandboxes: a thread's, for good ------------------------------------------------------------------------------


def forbid_system_call(name: str, error: int) -> None:
    """seccomp answers this system call of the thread with this error, before the kernel's own function is called."""
    code = b"".join(
        struct.pack("=HBBI", *instruction)
        for instruction in (
            (0x20, 0, 0, 0),  # the number of the call
            (0x15, 0, 1, number_of(name)),
            (0x06, 0, 0, 0x00050000 | error),
            (0x06, 0, 0, 0x7FFF0000),
        )
    )
    memory = ctypes.create_string_buffer(code, len(code))
    program = ctypes.create_string_buffer(struct.pack("=HxxxxxxQ", len(code) // 8, ctypes.addressof(memory)), 16)
    _checked(_libc.prctl(38, 1, 0, 0, 0))  # PR_SET_NO_NEW_PRIVS
    _checked(_libc.prctl(22, 2, program))  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


@contextlib.contextmanager
def tcp_binds_denied() -> Iterator[int]:
    """A security module denies this thread every bind of a TCP socket; gives the error it denies with.

    By Landlock (Linux 6.7), for good; where the kernel has not got that, by a BPF program in the place of a security
    module (where the boot parameter ``lsm=`` names ``bpf``). NotHere when both cannot be had.
    """
    try:
        _landlock()
    except OSError as refused:
        with _denying_program(f"Landlock: {refused.strerror}"):
            yield errno.EPERM
    else:
        yield errno.EACCES


def _landlock() -> None:
    handled = struct.pack("=QQ", 0, 1)  # nothing of files, LANDLOCK_ACCESS_NET_BIND_TCP
    rules = system_call(444, ctypes.create_string_buffer(handled, 16), ctypes.c_size_t(16), 0)
    try:
        _checked(_libc.prctl(38, 1, 0, 0, 0))
        system_call(446, rules, 0)
    finally:
        os.close(rules)


@contextlib.contextmanager
def _denying_program(before: str) -> Iterator[None]:
    library = ctypes.CDLL("libbpf.so.1")
    hook = library.libbpf_find_vmlinux_btf_id(b"socket_bind", 27)  # BPF_LSM_MAC
    if hook < 0:
        raise NotHere(f"{before}; a BPF program as security module: {os.strerror(-hook)}")
    this_thread: list[Instruction] = [
        (0x85, 0, 0, 14),  # bpf_get_current_pid_tgid
        (0xBC, 0x01, 0, 0),  # its lower half
        _set(0, 0),
        (0x56, 1, 1, threading.get_native_id()),
        _set(0, -errno.EPERM),
        _EXIT,
    ]
    with contextlib.ExitStack() as attached:
        try:
            program = _load(29, 27, this_thread, hook)
            attached.callback(os.close, program)
            attached.callback(os.close, _bpf(17, struct.pack("=QI", 0, program)))
        except OSError as error:
            raise NotHere(f"{before}; a BPF program as security module: {error.strerror}") from error
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.bind("")
            except PermissionError:
                pass
            else:
                raise NotHere(f"{before}; a BPF program as security module is not asked: lsm= does not name bpf")
        yield
