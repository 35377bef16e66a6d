"""Stored events for tests: made by our encoder, kept as files or sent to a topic as an agent would."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient, NewTopic

from pipeline import archive, avro, event

BASE_US = 1_767_323_045_123_456
"""2026-01-02T03:04:05.123456Z."""


def bind(pos: int = 0, **fields: Any) -> dict[str, Any]:
    """A bind that succeeded, on a host; ``fields`` replaces what a test is about."""
    port = fields.get("port", 8080)
    addr = fields.get("addr", "0.0.0.0")
    return {
        "type": "normal", "kind": "bind", "node": "node-1", "epoch": "0" * 16, "pos": pos, "time": BASE_US + pos,
        "boottime_ns": 1_000_000 + pos, "labels": {}, "cgroup_id": 1, "mountnsid": 4026531840, "netnsid": 4026531840,
        "pid": 4242, "tid": 4242, "ppid": 1, "uid": 0, "gid": 0, "comm": "nginx", "parent_comm": "systemd",
        "exe": "nginx", "family": "inet", "sock_type": "stream", "proto": "TCP", "proto_num": 6, "addr": addr,
        "port": port, "asked_addr": addr, "asked_port": port, "opts": ".R...", "ifindex": 0, "errno": 0,
        "hook": "tracepoint",
    } | fields  # fmt: skip


def failed(pos: int = 0, **fields: Any) -> dict[str, Any]:
    """A bind that failed because the port was taken."""
    return bind(pos, **({"errno": 98, "error": "EADDRINUSE"} | fields))


def own(pos: int = 0, type_: str = "warn", message: str = "lost 5 samples", **fields: Any) -> dict[str, Any]:
    """One of the stream's own records."""
    kind = "loss" if type_ == "warn" else "checkpoint"
    base = {"type": type_, "kind": kind, "node": "node-1", "epoch": "0" * 16, "pos": pos, "time": BASE_US + pos}
    return base | {"labels": {}, "message": message} | fields


def batch(rows: Iterable[dict[str, Any]]) -> pa.RecordBatch:
    """Rows as a batch of the event's schema; fields that a row lacks are null."""
    return pa.RecordBatch.from_pylist(
        [row | {"labels": list(dict(row.get("labels") or {}).items())} for row in rows], schema=event.schema()
    )


def write(directory: Path, *parts: Sequence[dict[str, Any]], node: str = "node-1", epoch: str = "0" * 16) -> Path:
    """An archive with one block for each of ``parts``; returns its folder."""
    writer = archive.Writer(directory, node=node, epoch=epoch, now=lambda: BASE_US / 1e6)
    for rows in parts:
        made = batch(rows)
        writer.write(avro.encode(made), rows[0]["pos"], made.column("time"))
    writer.close()
    return directory


def messages(rows: Iterable[dict[str, Any]], schema_id: int | None = None) -> list[bytes]:
    """Rows as the values of messages: Confluent framing with an id, single-object framing without."""
    datums = avro.encode(batch(rows))
    return avro.single_object(datums) if schema_id is None else avro.confluent(datums, schema_id)


def make_topic(bootstrap: str, name: str, partitions: int = 1, **config: str) -> str:
    """A new topic; returns its name."""
    admin = AdminClient({"bootstrap.servers": bootstrap})
    admin.create_topics([NewTopic(name, partitions, 1, config=config)])[name].result(20)
    return name


def send(bootstrap: str, name: str, values: Iterable[bytes | None], partition: int = 0) -> None:
    """Put messages into a partition, in order, and wait until the broker has them."""
    errors: list[object] = []
    producer = Producer({"bootstrap.servers": bootstrap, "enable.idempotence": True, "message.max.bytes": 10_000_000})
    for value in values:
        producer.produce(
            name, value, "node-1", partition, on_delivery=lambda error, _message: error and errors.append(error)
        )
        producer.poll(0)
    assert producer.flush(30) == 0
    assert not errors
