"""Records of the kernel become columns: the layout is C's, and every row says what its record says."""

from __future__ import annotations

import ipaddress
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import event, records
from pipeline.errors import DatumDamaged

HEADER = Path(__file__).parent.parent / "bpf" / "bind_event.h"

TEXTS = {"ifname": 16, "comm": 16, "parent_comm": 16, "exe": 64, "cgroup": 96, "cgroup_parent": 96}


def burst(*rows: dict[str, Any], stride: int = 424) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Records as the ring holds them: apart by a header, in one row after the other."""
    packed = np.zeros(len(rows), records.RECORD)
    for at, row in enumerate(rows):
        for name, value in row.items():
            packed[at][name] = np.frombuffer(value.ljust(16, b"\0"), np.uint8) if name.endswith("addr") else value
    ring = np.full((len(rows), stride), 0xAA, np.uint8)
    ring[:, 8 : 8 + records.RECORD.itemsize] = packed.view(np.uint8).reshape(len(rows), records.RECORD.itemsize)
    return ring[:, 8 : 8 + records.RECORD.itemsize]


def decoded(**row: Any) -> dict[str, Any]:
    """One record with these fields, decoded."""
    rows: list[dict[str, Any]] = records.decode(burst(row), 0).to_pylist()
    return rows[0]


def bind(**changes: Any) -> dict[str, Any]:
    """Fields of a successful bind of a TCP socket to 127.0.0.1:0 that got port 40001."""
    return {
        "known": records.KNOWN_ASKED_PORT | records.KNOWN_ASKED_ADDR | records.KNOWN_SOCKET,
        "hook": 3, "family": 2, "sock_type": 1, "proto": 6, "asked_family": 2, "asked_port": 0, "port": 40001,
        "asked_addr": bytes([127, 0, 0, 1]), "addr": bytes([127, 0, 0, 1]), "comm": b"nc",
    } | changes  # fmt: skip


def test_layout_is_that_of_the_c_header(tmp_path: Path) -> None:
    """Each field of struct bind_event lies where RECORD reads it, and both have the same size and fields."""
    body = re.search(r"struct bind_event \{(.*?)\n\};", HEADER.read_text(), re.DOTALL)
    assert body
    names = re.findall(r"^\t(?:__\w+|char) ([^;]+);", body[1], re.MULTILINE)
    names = [name.split("[")[0] for name in names]
    prints = "".join(
        f'printf("{name} %zu %zu\\n", offsetof(struct bind_event, {name}), sizeof(((struct bind_event *)0)->{name}));'
        for name in names
    )
    source = tmp_path / "layout.c"
    source.write_text(
        "#include <linux/types.h>\n#include <stddef.h>\n#include <stdio.h>\n"
        f'#include "{HEADER}"\nint main(void) {{ {prints} printf("all 0 %zu\\n", sizeof(struct bind_event)); }}\n'
    )
    subprocess.run(["cc", "-o", tmp_path / "layout", source], check=True)
    said = subprocess.run([tmp_path / "layout"], check=True, capture_output=True, text=True).stdout

    fields = records.RECORD.fields
    assert fields is not None
    python = [f"{name} {fields[name][1]} {fields[name][0].itemsize}" for name in records.RECORD.names or ()]
    assert said.splitlines() == [*python, f"all 0 {records.RECORD.itemsize}"]


def test_constants_are_those_of_the_c_header() -> None:
    """Bits and numbers that both sides use mean the same."""
    text = HEADER.read_text()
    hooks = {int(number): name.lower() for name, number in re.findall(r"HOOK_(\w+) = (\d+)", text)}
    known = {name: 1 << int(bit) for name, bit in re.findall(r"(KNOWN_\w+) = 1 << (\d+)", text)}
    options = {int(bit, 16) for bit in re.findall(r"OPT_\w+ = (0x\w+)", text)}

    assert hooks == records.HOOKS
    assert known == {name: getattr(records, name) for name in known}
    assert options == {option.bit for option in event.SOCKET_OPTIONS}


def test_columns_are_fields_of_the_schema() -> None:
    """A batch has the schema's names and types, and two more columns for the cgroup's names."""
    batch = records.decode(burst(bind()), 0)

    assert batch.schema == records.schema()
    assert batch.schema.names[-2:] == ["cgroup", "cgroup_parent"]
    assert all(field.equals(event.schema().field(field.name)) for field in list(batch.schema)[:-2])
    batch.validate(full=True)


def test_no_records_make_an_empty_batch() -> None:
    """A burst of nothing is a batch of nothing, with the same columns."""
    assert records.decode(burst(), 0).num_rows == 0
    assert records.decode(burst(), 0).schema == records.schema()


def test_records_of_another_size_are_refused() -> None:
    """An object of another version is not read as if it were ours."""
    with pytest.raises(DatumDamaged, match=r"\(1, 408\)"):
        records.decode(np.zeros((1, 408), np.uint8), 0)


def test_time_is_boot_clock_plus_offset() -> None:
    """``time`` is in microseconds, the kernel's own clock stays as it is."""
    batch = records.decode(burst(bind(boottime_ns=5_000_001_999)), 1_700_000_000_000_000_000)

    assert batch["time"].cast("int64").to_pylist() == [1_700_000_005_000_001]
    assert batch["boottime_ns"].to_pylist() == [5_000_001_999]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        pytest.param({}, ("127.0.0.1", 40001, "127.0.0.1", 0), id="port-0-shows-what-the-kernel-gave"),
        pytest.param(
            {"error": 98, "asked_port": 4242, "port": 0, "addr": bytes(4)},
            ("127.0.0.1", 4242, "127.0.0.1", 4242),
            id="failed-shows-what-was-asked-for",
        ),
        pytest.param(
            {"error": 22, "asked_port": 18084, "port": 18083},
            ("127.0.0.1", 18084, "127.0.0.1", 18084),
            id="second-bind-shows-its-own-request",
        ),
        pytest.param(
            {"error": 22, "known": records.KNOWN_SOCKET, "port": 18083},
            (None, 0, None, None),
            id="failed-and-unreadable",
        ),
        pytest.param(
            {"known": records.KNOWN_SOCKET, "hook": 4}, ("127.0.0.1", 40001, None, None), id="post-bind-sees-no-request"
        ),
        pytest.param(
            {"error": 9, "known": records.KNOWN_ASKED_ADDR | records.KNOWN_ASKED_PORT, "asked_port": 53},
            ("127.0.0.1", 53, "127.0.0.1", 53),
            id="no-socket",
        ),
        pytest.param(
            {"sock_type": 3, "proto": 1, "port": 1, "asked_port": 7},
            ("127.0.0.1", 7, "127.0.0.1", 7),
            id="raw-has-no-port",
        ),
        pytest.param(
            {"error": 22, "known": records.KNOWN_SOCKET | records.KNOWN_ASKED_PORT, "asked_port": 80},
            (None, 80, None, 80),
            id="short-request",
        ),
    ],
)
def test_documented_value(changes: dict[str, Any], expected: tuple[Any, ...]) -> None:
    """ADDR and PORT are what the socket got, on failure what was asked for; raw sockets show the port asked for."""
    row = decoded(**bind(**changes))

    assert (row["addr"], row["port"], row["asked_addr"], row["asked_port"]) == expected


@pytest.mark.parametrize(
    ("address", "text"),
    [
        ("::", "::"),
        ("::1", "::1"),
        ("2001:db8:0:0:1:0:0:1", "2001:db8::1:0:0:1"),
        ("2001:db8:0:1:1:1:1:1", "2001:db8:0:1:1:1:1:1"),
        ("::ffff:127.0.0.1", "::ffff:127.0.0.1"),
        ("::1.2.3.4", "::102:304"),
        ("64:ff9b::192.0.2.33", "64:ff9b::c000:221"),
    ],
)
def test_ipv6_text_is_rfc_5952(address: str, text: str) -> None:
    """IPv6 is written as RFC 5952 says; only IPv4-mapped addresses have dots."""
    row = decoded(**bind(family=10, addr=ipaddress.IPv6Address(address).packed))

    assert text == row["addr"]


def test_hostile_names_become_printable() -> None:
    """What a process chose is made printable, and can be told from what only looks like it."""
    row = decoded(**bind(comm=b"\x1b[31m\\x41\n\xff", exe=b"\xc3\xa9", cgroup=b"a\tb", ifname=b"e\x07"))

    assert row["comm"] == "\\x1b[31m\\\\x41\\x0a\\xff"
    assert row["exe"] == "é"
    assert row["cgroup"] == "a\\x09b"
    assert row["ifname"] == "e\\x07"


def text(size: int) -> st.SearchStrategy[bytes]:
    """What a NUL-terminated field of this size can hold."""
    return st.binary(max_size=size - 1).map(lambda raw: raw.partition(b"\0")[0])


@st.composite
def rows(draw: st.DrawFn) -> dict[str, Any]:
    """A record with anything in it that the kernel could write."""
    row: dict[str, Any] = {}
    for name, (dtype, *_) in (records.RECORD.fields or {}).items():
        if name in TEXTS:
            row[name] = draw(text(TEXTS[name]))
        elif name.endswith("addr"):
            row[name] = draw(st.binary(min_size=16, max_size=16))
        elif dtype.itemsize == 8:
            row[name] = draw(st.integers(0, 2**62))
        elif name in ("pid", "tid", "ppid", "ifindex"):
            row[name] = draw(st.integers(0, 2**31 - 1))
        elif name != "pad":
            row[name] = draw(st.integers(0, 2 ** (8 * dtype.itemsize) - 1))
    row["family"] = draw(st.sampled_from([2, 10]))
    row["asked_family"] = draw(st.sampled_from([0, 2, 10]))
    row["sock_type"] = draw(st.sampled_from([1, 2, 3, 77]))
    row["error"] = draw(st.sampled_from([0, 0, 13, 98, 4000]))
    return row


def reference(row: dict[str, Any]) -> dict[str, Any]:
    """What a record means, one field after the other, slowly."""
    socket_known, error = bool(row["known"] & records.KNOWN_SOCKET), row["error"]
    got = socket_known and not error

    def address(family: int, raw: bytes) -> str:
        if family != 10:
            return str(ipaddress.IPv4Address(raw[:4]))
        address = ipaddress.IPv6Address(raw)
        return f"::ffff:{address.ipv4_mapped}" if address.ipv4_mapped else address.compressed

    asked_addr = address(row["asked_family"], row["asked_addr"]) if row["known"] & records.KNOWN_ASKED_ADDR else None
    asked_port = row["asked_port"] if row["known"] & records.KNOWN_ASKED_PORT else None

    def of_socket(value: Any) -> Any:
        return value if socket_known else None

    return {
        "type": "normal",
        "kind": "bind",
        **{name: row[name] for name in ("boottime_ns", "cgroup_id", "mountnsid", "netnsid", "pid", "tid", "ppid")},
        **{name: row[name] for name in ("uid", "gid")},
        **{name: event.printable(row[name]) for name in ("comm", "parent_comm", "cgroup", "cgroup_parent")},
        "exe": event.printable(row["exe"]) or None,
        "family": event.FAMILIES[row["family"]],
        "sock_type": of_socket(event.SOCKET_TYPES.get(row["sock_type"], str(row["sock_type"]))),
        "proto": of_socket(event.protocol_name(row["proto"])),
        "proto_num": of_socket(row["proto"]),
        "addr": address(row["family"], row["addr"]) if got else asked_addr,
        "port": row["port"] if got and row["sock_type"] != 3 else asked_port or 0,
        "asked_addr": asked_addr,
        "asked_port": asked_port,
        "opts": of_socket(event.opts_text(row["opts"])),
        "v6only": of_socket(row["v6only"] != 0) if row["family"] == 10 else None,
        "ifindex": of_socket(row["ifindex"]),
        "ifname": event.printable(row["ifname"]) or None,
        "cookie": row["cookie"] or None,
        "errno": error,
        "error": event.error_name(error),
        "hook": records.HOOKS.get(row["hook"], str(row["hook"])),
    }


@given(st.lists(rows(), min_size=1, max_size=5))
def test_every_row_says_what_its_record_says(given_rows: list[dict[str, Any]]) -> None:
    """Columns over distinct values give the same as reading one record after the other."""
    batch = records.decode(burst(*given_rows), 0).drop_columns("time")

    assert [reference(row) for row in given_rows] == batch.select(list(reference(given_rows[0]))).to_pylist()
    assert set(reference(given_rows[0])) == set(batch.schema.names)
