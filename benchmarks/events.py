"""Events to replay: a node with a hundred programs that bind as programs do, two days in two million binds.

In: how many. Out: numbered batches of ``event.schema()``, always the same ones: containers with all their names and
processes of the host, TCP and UDP, IPv4 and IPv6, fixed ports and those that the kernel chose, every eighth a failure,
and the stream's own checkpoints among them. One in a thousand is a successful bind to ``PORT``, which nothing else is.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipeline import avro, event, testimony

PORT = 4242
KEPT = 0.001
NODE = "worker-7"
PROGRAMS = 120
BATCH = 10_000
START_US = 1_767_225_600_000_000
EVERY_US = 40_000

_HOST = ("sshd", "kubelet", "containerd", "chronyd", "systemd-resolve", "node_exporter", "dhclient", "rpcbind")
_POD = ("nginx", "envoy", "java", "redis-server", "postgres", "python3", "node", "coredns", "prometheus", "haproxy")
_FAILURES = (errno.EADDRINUSE, errno.EADDRINUSE, errno.EADDRINUSE, errno.EACCES, errno.EADDRNOTAVAIL, errno.EINVAL)


class Events(NamedTuple):
    """``batches`` hold ``count`` events, the stream's own records included; ``kept`` are binds to ``PORT``."""

    batch: pa.RecordBatch
    kept: int


def generate(binds: int) -> Iterator[Events]:
    """Batches of about ``BATCH`` events, ``binds`` binds in all; each batch ends in a checkpoint."""
    random = np.random.default_rng(7)
    stream = testimony.Stream(
        NODE,
        event.new_epoch(START_US // 1000, 7),
        boot_id="8f1d6f0e-58a2-4c11-9d53-1f5e7f0ab0c4",
        monotonic=0,
        schema=avro.ours().sha256,
    )
    programs = [_program(number, random) for number in range(PROGRAMS)]
    columns = pa.RecordBatch.from_pylist(programs, schema=_program_schema())
    for first in range(0, binds, BATCH):
        count = min(BATCH, binds - first)
        batch, kept = _binds(columns, first, count, random)
        numbered = stream.number(batch)
        now_us = START_US + (first + count) * EVERY_US
        attempted = first + count
        counters = {"attempted": attempted, "submitted": attempted, "lost_ring_full": 0, "read": attempted}
        made = [numbered]
        stream.sealed(avro.encode(numbered))
        for own in stream.checkpoint(now_us, 0, counters):
            made.append(own)
            stream.sealed(avro.encode(own))
        yield Events(pa.concat_batches(made), kept)


def _program_schema() -> pa.Schema:
    names = (
        "namespace", "pod", "container", "image", "labels", "container_id", "cgroup_id", "mountnsid", "netnsid", "pid",
        "tid", "ppid", "uid", "gid", "comm", "parent_comm", "exe", "family", "sock_type", "proto", "proto_num",
        "opts", "v6only", "ifindex", "ifname",
    )  # fmt: skip
    fields = [event.schema().field(name) for name in names]
    return pa.schema([*fields, pa.field("address", pa.string()), pa.field("fixed_port", pa.int32())])


def _program(number: int, random: np.random.Generator) -> dict[str, Any]:
    """What a program is, and what it binds: the same at each of its binds."""
    in_pod = number % 10 < 7
    name = _POD[number % len(_POD)] if in_pod else _HOST[number % len(_HOST)]
    stream = random.random() < 0.7
    v6 = random.random() < 0.25
    address = ("::", "::1", f"fd00:10:244:{number:x}::2")[number % 3] if v6 else (
        "0.0.0.0", "127.0.0.1", f"10.244.{number}.2")[number % 3]  # fmt: skip
    device = number % 40 == 0
    row: dict[str, Any] = {
        "labels": [], "cgroup_id": 4000 + number * 7, "mountnsid": 4026531841, "netnsid": 4026531840,
        "pid": 900 + number * 37, "tid": 900 + number * 37 + number % 3, "ppid": 1, "uid": 0, "gid": 0,
        "comm": name, "parent_comm": "systemd", "exe": name, "family": "inet6" if v6 else "inet",
        "sock_type": "stream" if stream else "dgram", "proto": "TCP" if stream else "UDP",
        "proto_num": 6 if stream else 17, "opts": (".....", ".R...", "rR...", "..N..")[number % 4],
        "v6only": number % 2 == 0 if v6 else None, "ifindex": 3 if device else 0, "ifname": "eth1" if device else None,
        "address": address, "fixed_port": None if number % 5 == 0 else 5000 + number * 101,
    }  # fmt: skip
    if in_pod:
        app = f"{name}-{number % 30}"
        row.update(
            namespace=("default", "kube-system", "payments", "monitoring")[number % 4],
            pod=f"{app}-7d4b9c6f5-{number:05x}", container=name, image=f"registry.example.com/{name}:1.{number}",
            labels=[("app", app), ("pod-template-hash", "7d4b9c6f5"), ("tier", "backend")],
            container_id=random.bytes(32).hex(), mountnsid=4026532500 + number, netnsid=4026532300 + number,
            ppid=800 + number * 37, uid=1000 + number % 5, gid=1000, parent_comm="containerd-shim",
        )  # fmt: skip
    return row


def _binds(programs: pa.RecordBatch, first: int, count: int, random: np.random.Generator) -> tuple[pa.RecordBatch, int]:
    """``count`` binds by ``programs``, a few of which bind most; and how many of them are to ``PORT``."""
    who = (random.zipf(1.3, count) - 1) % PROGRAMS
    mine = programs.take(pa.array(who))
    wanted = random.random(count) < KEPT
    number = np.where((random.random(count) < 0.125) & ~wanted, random.choice(_FAILURES, count), 0)
    failed = number != 0
    fixed = mine.column("fixed_port").fill_null(0).to_numpy()
    asked = np.where(wanted, PORT, fixed).astype(np.int32)
    got = np.where((asked == 0) & ~failed, random.integers(32768, 60999, count), asked).astype(np.int32)
    boot = 10**13 + (first + np.arange(count)) * EVERY_US * 1000
    names = [event.error_name(value) for value in range(200)]
    columns = {
        **{name: mine.column(name) for name in mine.schema.names if name not in ("address", "fixed_port")},
        "type": pa.repeat("normal", count),
        "kind": pa.repeat("bind", count),
        "time": pa.array(START_US + (first + np.arange(count)) * EVERY_US).cast(pa.timestamp("us")),
        "boottime_ns": pa.array(boot),
        "addr": mine.column("address"),
        "asked_addr": mine.column("address"),
        "port": pa.array(got),
        "asked_port": pa.array(asked),
        "cookie": pa.array(np.arange(first, first + count) * 3 + 4096),
        "errno": pa.array(number.astype(np.int32)),
        "error": pa.array(names, pa.string()).take(pa.array(number)),
        "hook": pa.repeat("tracepoint", count),
    }
    return pa.RecordBatch.from_pydict(columns), int(wanted.sum())
