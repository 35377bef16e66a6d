"""The words of an event: its fields, columns, and the names of protocols, options and errors.

One table each, and everything else is derived: the Arrow schema of a batch, headers, rows, JSON keys, help and docs.
This module imports neither pyarrow nor numpy, so that ``--help`` answers at once; ``schema()`` does when it is called.
"""

from __future__ import annotations

import errno as _errno
import functools
import json
import re
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline import carried

if TYPE_CHECKING:
    import pyarrow as pa


@functools.cache
def schema_text() -> str:
    """The text of ``schemas/bind_event.avsc``, the one description of an event."""
    return carried("schemas/bind_event.avsc").read_text(encoding="utf-8")


@functools.cache
def schema_json() -> dict[str, Any]:
    """``schemas/bind_event.avsc`` parsed, with ``doc`` on every field."""
    parsed: dict[str, Any] = json.loads(schema_text())
    return parsed


@functools.cache
def fields() -> tuple[str, ...]:
    """Names of an event's fields, in schema order."""
    return tuple(field["name"] for field in schema_json()["fields"])


@functools.cache
def schema() -> pa.Schema:
    """Arrow schema of a batch of events: enums and strings are utf8, maps are map, ``time`` is timestamp[us]."""
    import pyruhvro

    return pyruhvro.avro_to_arrow_schema(schema_text()).remove_metadata()


# --- protocols, families, types -----------------------------------------------------------------------------------

PROTOCOLS: dict[int, str] = {
    0: "IP", 1: "ICMP", 2: "IGMP", 4: "IPIP", 6: "TCP", 8: "EGP", 12: "PUP", 17: "UDP", 22: "IDP", 29: "TP",
    33: "DCCP", 41: "IPV6", 46: "RSVP", 47: "GRE", 50: "ESP", 51: "AH", 58: "ICMPV6", 92: "MTP", 94: "BEETPH",
    98: "ENCAP", 103: "PIM", 108: "COMP", 132: "SCTP", 136: "UDPLITE", 137: "MPLS", 143: "ETHERNET", 255: "RAW",
    262: "MPTCP",
}  # fmt: skip
"""Names of ``sk_protocol``; a number that is not here is ``UNKNOWN``. Source: the documented output."""

FAMILIES: dict[int, str] = {2: "inet", 10: "inet6"}
"""``sa_family`` of the families that are an attempt."""

SOCKET_TYPES: dict[int, str] = {1: "stream", 2: "dgram", 3: "raw", 4: "rdm", 5: "seqpacket", 6: "dccp", 10: "packet"}
"""``sk_type``; a number that is not here is shown as the number."""


def protocol_name(number: int) -> str:
    """``6`` → ``TCP``; a number without a name → ``UNKNOWN``."""
    return PROTOCOLS.get(number, "UNKNOWN")


# --- options of a socket ------------------------------------------------------------------------------------------


class SocketOption(NamedTuple):
    """One of the five letters of OPTS: ``bit`` in the kernel record, ``letter`` at its place in the text."""

    letter: str
    bit: int
    name: str


SOCKET_OPTIONS: tuple[SocketOption, ...] = (
    SocketOption("r", 0x10, "SO_REUSEPORT"),
    SocketOption("R", 0x08, "SO_REUSEADDR"),
    SocketOption("N", 0x04, "IP_BIND_ADDRESS_NO_PORT"),
    SocketOption("T", 0x02, "IP_TRANSPARENT"),
    SocketOption("F", 0x01, "IP_FREEBIND"),
)
"""In the order of the text: ``rRNTF``."""

OPTS_LEGEND = "OPTS is rRNTF, a dot where the option is off: " + ", ".join(
    f"{option.letter} {option.name}" for option in SOCKET_OPTIONS
)


def opts_text(bits: int) -> str:
    """``0x08`` → ``.R...``."""
    return "".join(option.letter if bits & option.bit else "." for option in SOCKET_OPTIONS)


# --- names of errors ----------------------------------------------------------------------------------------------

# Python prefers the POSIX alias where Linux has two names for one number; the kernel's own sources and strace say
# these. 512 to 530 never leave a healthy kernel, but a hook can see them.
_KERNEL_ERRORS = {11: "EAGAIN", 35: "EDEADLK", 95: "EOPNOTSUPP", 512: "ERESTARTSYS", 524: "ENOTSUPP"}


def error_name(number: int) -> str | None:
    """``98`` → ``EADDRINUSE``; ``0`` → None; a number without a name → its digits."""
    if number == 0:
        return None
    return _KERNEL_ERRORS.get(number) or _errno.errorcode.get(number, str(number))


# --- text that a process chose ------------------------------------------------------------------------------------

_PLAIN = re.compile(rb"[ !-\[\]-~]*")


def new_epoch(milliseconds: int, random16: int) -> str:
    """16 hexadecimal digits: 48 bits of milliseconds since 1970 and 16 random bits, so that epochs sort by time."""
    return f"{milliseconds & (1 << 48) - 1:012x}{random16 & 0xFFFF:04x}"


def printable(raw: bytes) -> str:
    """Bytes that a process chose, as text that no terminal, line or parser can trip over; reversible.

    Printable UTF-8 stays; every byte of anything else becomes ``\\xNN``; a backslash is doubled, so that
    ``\\x41`` in the text always means a byte and never four characters. ``original`` is the inverse.
    """
    if _PLAIN.fullmatch(raw):
        return raw.decode("ascii")
    text = raw.decode("utf-8", "surrogateescape")
    return "".join(
        "\\\\"
        if char == "\\"
        else char
        if char.isprintable()
        else "".join(f"\\x{byte:02x}" for byte in char.encode("utf-8", "surrogateescape"))
        for char in text
    )


def one_line(text: str) -> str:
    """Every character that is not printable as the ``\\xNN`` of its bytes, all others as they are.

    For text that was printable once, or is somebody else's: nothing is doubled. Surrogates, which stand for bytes that
    were no UTF-8, become these bytes.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else "".join(f"\\x{byte:02x}" for byte in _bytes(char)) for char in text)


def _bytes(char: str) -> bytes:
    try:
        return char.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return char.encode("utf-8", "surrogatepass")


def original(text: str) -> bytes:
    """The bytes that ``printable`` was given. ValueError when the text is not one that it makes."""
    out = bytearray()
    at = 0
    while at < len(text):
        if text[at] != "\\":
            out += text[at].encode("utf-8")
            at += 1
        elif text[at : at + 2] == "\\\\":
            out += b"\\"
            at += 2
        elif re.fullmatch(r"\\x[0-9a-f]{2}", text[at : at + 4]):
            out.append(int(text[at + 2 : at + 4], 16))
            at += 4
        else:
            raise ValueError(f"{text!r} has a lone backslash at {at}; allowed are \\\\ and \\xNN")
    return bytes(out)


# --- who runs in a container --------------------------------------------------------------------------------------


class Workload(NamedTuple):
    """Names of one container: of its pod under Kubernetes, else its own alone. Every text is printable already.

    ``labels`` are the pod's, or without Kubernetes the container's, as pairs in the order of their keys.
    """

    container: str
    image: str | None = None
    namespace: str | None = None
    pod: str | None = None
    labels: tuple[tuple[str, str], ...] = ()


class LabelTest(NamedTuple):
    """What one entry of a label selector asks for, as kubectl reads it.

    ``wanted``: the label ``key`` is there and, unless ``value`` is None, has this value. Otherwise the opposite, so
    that ``key!=value`` is true of what has no such label.
    """

    key: str
    value: str | None
    wanted: bool


# --- columns ------------------------------------------------------------------------------------------------------


class Column(NamedTuple):
    """A column that can be printed: the ``name`` as typed gives ``header`` and ``width``; ``field`` is its source.

    ``field`` is a field of the schema, or ``if``, which is made from ``ifindex`` and ``ifname``, or ``TIME``, the
    field ``time`` as text.
    """

    name: str
    header: str
    width: int
    field: str


_DOCUMENTED = (
    Column("time", "TIME", 27, "time"),
    Column("node", "NODE", 16, "node"),
    Column("namespace", "NAMESPACE", 16, "namespace"),
    Column("pod", "POD", 16, "pod"),
    Column("container", "CONTAINER", 16, "container"),
    Column("k8s.node", "K8S.NODE", 16, "node"),
    Column("k8s.namespace", "K8S.NAMESPACE", 16, "namespace"),
    Column("k8s.podname", "K8S.PODNAME", 16, "pod"),
    Column("k8s.containername", "K8S.CONTAINERNAME", 17, "container"),
    Column("pid", "PID", 6, "pid"),
    Column("comm", "COMM", 16, "comm"),
    Column("proto", "PROTO", 6, "proto"),
    Column("addr", "ADDR", 16, "addr"),
    Column("port", "PORT", 6, "port"),
    Column("opts", "OPTS", 6, "opts"),
    Column("if", "IF", 16, "if"),
)

# Widths of the other fields, where the length of the header alone would not do.
_WIDTHS = {
    "epoch": 16, "pos": 10, "boottime_ns": 19, "image": 30, "labels": 30, "container_id": 64, "cgroup_id": 10,
    "mountnsid": 10, "netnsid": 10, "tid": 7, "ppid": 7, "uid": 6, "gid": 6, "parent_comm": 16, "exe": 16,
    "family": 6, "sock_type": 9, "asked_addr": 16, "ifname": 16, "error": 14, "hook": 10, "message": 30,
    "testimony": 30, "cookie": 8,
}  # fmt: skip


@functools.cache
def columns() -> dict[str, Column]:
    """Every column by its lower-case name: the documented ones, then every other field of the schema."""
    table = {column.name: column for column in _DOCUMENTED}
    for name in fields():
        width = max(_WIDTHS.get(name, 0), len(name))
        table.setdefault(name, Column(name, name.upper(), width, name))
    return table


LAYOUTS: dict[str, tuple[tuple[str, int], ...]] = {
    "trace-bind": (
        ("k8s.node", 16), ("k8s.namespace", 16), ("k8s.podname", 16), ("k8s.containername", 17), ("pid", 6),
        ("comm", 16), ("proto", 6), ("addr", 16), ("port", 6), ("opts", 6), ("if", 16),
    ),
    "ig": (
        ("k8s.containername", 17), ("pid", 7), ("comm", 16), ("proto", 6), ("addr", 16), ("port", 7), ("opts", 7),
        ("if", 16),
    ),
    "bindsnoop": (
        ("node", 16), ("namespace", 16), ("pod", 16), ("container", 16), ("pid", 6), ("comm", 16), ("proto", 6),
        ("addr", 16), ("port", 6), ("opts", 6), ("if", 16),
    ),
}  # fmt: skip
"""The three documented layouts: names of columns with their widths."""

JSON_KEYS: tuple[str, ...] = (
    "type", "node", "namespace", "pod", "container", "pid", "comm", "proto", "addr", "port", "opts", "if",
    "mountnsid",
)  # fmt: skip
"""Keys of a bind in the documented JSON, in order; ``error`` follows on failure, and ``time`` when asked for."""

JSON_ALWAYS = frozenset({"pid", "port", "mountnsid"})
"""Keys that a bind always has, 0 where the value is unknown."""

JSON_OWN_KEYS: tuple[str, ...] = ("type", "node", "message")
"""Keys of the stream's own records, warn and info."""
