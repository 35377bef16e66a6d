"""Records of the kernel become columns.

A burst of fixed-size records goes in (``bpf/bind_event.h``), a batch of everything that the kernel knows of each
attempt comes out. Numbers are copied as columns. Texts and addresses repeat a lot, so each distinct one is found and
converted once, and the columns take it from there: no Python runs for each event.

What a process chose becomes printable text here, once, and nowhere else. The documented value of ADDR and PORT is
decided here too, since only here both the request and the socket are at hand.
"""

from __future__ import annotations

import functools
import ipaddress
import socket
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import event
from pipeline.errors import DatumDamaged

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import numpy.typing as npt

RECORD = np.dtype(
    [
        ("boottime_ns", np.uint64),
        ("cgroup_id", np.uint64),
        ("cookie", np.uint64),
        ("pid", np.uint32),
        ("tid", np.uint32),
        ("ppid", np.uint32),
        ("uid", np.uint32),
        ("gid", np.uint32),
        ("mountnsid", np.uint32),
        ("netnsid", np.uint32),
        ("ifindex", np.uint32),
        ("error", np.uint32),
        ("family", np.uint16),
        ("sock_type", np.uint16),
        ("proto", np.uint16),
        ("asked_family", np.uint16),
        ("asked_port", np.uint16),
        ("port", np.uint16),
        ("known", np.uint8),
        ("hook", np.uint8),
        ("opts", np.uint8),
        ("v6only", np.uint8),
        ("pad", np.uint8, (4,)),
        ("asked_addr", np.uint8, (16,)),
        ("addr", np.uint8, (16,)),
        ("ifname", "S16"),
        ("comm", "S16"),
        ("parent_comm", "S16"),
        ("exe", "S64"),
        ("cgroup", "S96"),
        ("cgroup_parent", "S96"),
    ]
)
"""``struct bind_event`` of ``bpf/bind_event.h``, name by name; what each means is said there."""

KNOWN_ASKED_PORT, KNOWN_ASKED_ADDR, KNOWN_SOCKET = 1, 2, 4
"""Bits of ``known``."""

HOOKS: dict[int, str] = {1: "fexit", 2: "kprobe", 3: "tracepoint", 4: "post_bind", 5: "lsm", 6: "bcc"}
"""Names of ``hook``."""

# The record in two halves that are copied out whole: what is decoded as numbers, and the texts that say who it was,
# which are the same for all binds of a process.
_WHO_NAMES = ("comm", "parent_comm", "exe", "cgroup", "cgroup_parent")
_WHO_AT: int = RECORD.fields["comm"][1]  # type: ignore[index]
_NUMBERS = np.dtype(
    {
        "names": [name for name in RECORD.names or () if name not in _WHO_NAMES],
        "formats": [RECORD[name] for name in RECORD.names or () if name not in _WHO_NAMES],
        "itemsize": _WHO_AT,
    }
)
_WHO = np.dtype([(name, RECORD[name]) for name in _WHO_NAMES])

_AF_INET6 = 10
_SOCK_RAW = 3


@functools.cache
def schema() -> pa.Schema:
    """What ``decode`` gives: the kernel's fields of an event as ``event.schema()`` has them, then ``cgroup`` and
    ``cgroup_parent`` (string, empty for the root), which name the process's cgroup for ``enrich``.
    """
    kernel = (
        "type", "kind", "time", "boottime_ns", "cgroup_id", "mountnsid", "netnsid", "pid", "tid", "ppid", "uid",
        "gid", "comm", "parent_comm", "exe", "family", "sock_type", "proto", "proto_num", "addr", "port",
        "asked_addr", "asked_port", "opts", "v6only", "ifindex", "ifname", "cookie", "errno", "error", "hook",
    )  # fmt: skip
    fields = [event.schema().field(name) for name in kernel]
    return pa.schema([*fields, pa.field("cgroup", pa.string()), pa.field("cgroup_parent", pa.string())])


def decode(records: npt.NDArray[np.uint8], offset_ns: int) -> pa.RecordBatch:
    """Columns of a burst, as ``schema()`` says.

    ``records`` has shape (n, 416), rows any distance apart, and is not needed any more afterwards. ``offset_ns`` is
    what the wall clock is ahead of the kernel's boot clock. DatumDamaged when the records have another size.
    """
    if records.ndim != 2 or records.shape[1] != RECORD.itemsize:
        raise DatumDamaged(
            f"records of shape {records.shape} do not fit; allowed are (n, {RECORD.itemsize}): "
            "the BPF object is not the one of this version"
        )
    row = np.ascontiguousarray(records[:, :_WHO_AT]).view(_NUMBERS)[:, 0]
    names = _who(np.ascontiguousarray(records[:, _WHO_AT:]))

    socket_known = (row["known"] & KNOWN_SOCKET) != 0
    asked_port_known = (row["known"] & KNOWN_ASKED_PORT) != 0
    asked_addr_known = (row["known"] & KNOWN_ASKED_ADDR) != 0
    # The socket of a failed bind holds nothing, or what an earlier one gave it.
    got = socket_known & (row["error"] == 0)
    # A raw socket holds its protocol where others hold the port.
    got_port = got & (row["sock_type"] != _SOCK_RAW)
    port = np.where(got_port, row["port"], np.where(asked_port_known, row["asked_port"], 0))

    addresses, asked_at, socket_at = _addresses(row)
    protocols = pa.array(row["proto"], mask=~socket_known)
    time_us = (row["boottime_ns"].astype(np.int64) + offset_ns) // 1000
    columns: dict[str, pa.Array] = {
        "type": pa.repeat(pa.scalar("normal", pa.string()), len(row)),
        "kind": pa.repeat(pa.scalar("bind", pa.string()), len(row)),
        "time": time_us,
        "family": _named(pa.array(row["family"]), lambda number: event.FAMILIES.get(number, str(number))),
        "sock_type": _named(
            pa.array(row["sock_type"], mask=~socket_known), lambda number: event.SOCKET_TYPES.get(number, str(number))
        ),
        "proto": _named(protocols, event.protocol_name),
        "proto_num": protocols,
        "addr": addresses.take(pa.array(np.where(got, socket_at, asked_at), mask=~(got | asked_addr_known))),
        "port": port,
        "asked_addr": addresses.take(pa.array(asked_at, mask=~asked_addr_known)),
        "asked_port": pa.array(row["asked_port"], mask=~asked_port_known),
        "opts": _named(pa.array(row["opts"], mask=~socket_known), event.opts_text),
        "v6only": pa.array(row["v6only"] != 0, mask=~(socket_known & (row["family"] == _AF_INET6))),
        "ifindex": pa.array(row["ifindex"], mask=~socket_known),
        "ifname": _named(_binary(row["ifname"]), _text_or_none),
        "cookie": pa.array(row["cookie"], mask=row["cookie"] == 0),
        "errno": row["error"],
        "error": _named(pa.array(row["error"]), event.error_name),
        "hook": _named(pa.array(row["hook"]), lambda number: HOOKS.get(number, str(number))),
        **names,
    }
    return pa.record_batch([_cast(columns.get(field.name, row), field) for field in schema()], schema=schema())


def _cast(values: Any, field: pa.Field) -> pa.Array:
    """A column as its field wants it: an array of the right type stays, numbers are widened or reread as signed."""
    if isinstance(values, np.ndarray):
        numbers = values[field.name] if values.dtype.names else values
        values = pa.array(numbers)
    return values if values.type == field.type else pc.cast(values, field.type, safe=False)


def _named(values: pa.Array, name: Callable[[Any], str | None]) -> pa.Array:
    """The names of values, each distinct value named once; null stays null."""
    distinct = values.dictionary_encode()
    return pa.array([name(value) for value in distinct.dictionary.to_pylist()], pa.string()).take(distinct.indices)


def _binary(values: npt.NDArray[Any]) -> pa.Array:
    """A column of fixed-size binary over a contiguous copy."""
    packed = np.ascontiguousarray(values)
    size = packed.nbytes // len(packed) if len(packed) else packed.dtype.itemsize
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(size), len(packed), [None, pa.py_buffer(packed)])


def _text(raw: bytes) -> str:
    return event.printable(raw.partition(b"\0")[0])


def _text_or_none(raw: bytes) -> str | None:
    return _text(raw) or None


def _who(packed: npt.NDArray[np.uint8]) -> dict[str, pa.Array]:
    """The columns that say who it was: the five texts of a process are looked up as one value."""
    distinct = _binary(packed).dictionary_encode()
    blocks = np.frombuffer(b"".join(distinct.dictionary.to_pylist()), _WHO)
    columns = {}
    for name in _WHO_NAMES:
        raw: list[bytes] = blocks[name].tolist()
        texts = _each_once(raw, _text_or_none if name == "exe" else _text)
        columns[name] = pa.array([texts[value] for value in raw], pa.string()).take(distinct.indices)
    return columns


def _each_once(values: Iterable[bytes], text: Callable[[bytes], str | None]) -> dict[bytes, str | None]:
    return {value: text(value) for value in set(values)}


def _addresses(row: npt.NDArray[Any]) -> tuple[pa.Array, npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Every distinct address as text, and where in there each event's request and socket are found."""
    count = len(row)
    keys = np.empty(2 * count, np.dtype([("family", np.uint16), ("addr", np.uint8, (16,))]))
    keys["family"][:count] = row["asked_family"]
    keys["family"][count:] = row["family"]
    keys["addr"][:count] = row["asked_addr"]
    keys["addr"][count:] = row["addr"]
    distinct = _binary(keys).dictionary_encode()
    texts = pa.array([_address(key) for key in distinct.dictionary.to_pylist()], pa.string())
    places = distinct.indices.to_numpy()
    return texts, places[:count], places[count:]


def _address(key: bytes) -> str:
    """Text of an address behind its family: dotted, or RFC 5952."""
    family = int.from_bytes(key[:2], sys.byteorder)
    if family != _AF_INET6:
        return socket.inet_ntop(socket.AF_INET, key[2:6])
    text = socket.inet_ntop(socket.AF_INET6, key[2:])
    # libc writes the deprecated IPv4-compatible addresses with dots too; only IPv4-mapped ones have them.
    if "." in text and not text.startswith("::ffff:"):
        return ipaddress.IPv6Address(key[2:]).compressed
    return text
