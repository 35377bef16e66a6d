"""What the stream says of itself: the place of every record, and the records that account for what is missing.

In: batches from ``enrich``, counters from the tracer. Out: batches of exactly ``event.schema()``, each record with its
node, its epoch and its ``pos``. ``pos`` counts 0, 1, 2 … without holes over everything, the stream's own records too,
in the order of the ring, so a reader who sees a hole knows that something is missing.

The stream's own records:

``start``       the epoch begins: program, kernel boot, tracer, and what this tracer cannot see
``checkpoint``  every 10,000 records or 10 s (60 s when idle): first and last pos since the one before, the counters
``loss``        type ``warn``: attempts that are not in the stream, by cause, or records that a destination did not get
``workload``    names of a container that came too late for its events, which only have its id
``stop``        the epoch ends; without it the end is open until the next ``start``
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline import event

LOST = "lost_"
"""Counters of the tracer that begin so are attempts that it saw and could not record, by cause."""


def new_epoch(milliseconds: int, random16: int) -> str:
    """16 hexadecimal digits: 48 bits of milliseconds since 1970 and 16 random bits, so that epochs sort by time."""
    return f"{milliseconds & (1 << 48) - 1:012x}{random16 & 0xFFFF:04x}"


class Stream:
    """One epoch of one node: gives ``pos``, and writes the stream's own records into the same row.

    ``checkpoint_records``, ``checkpoint_secs`` and ``idle_secs`` say how often a checkpoint is due. Times are passed
    in: ``now_us`` is UTC in microseconds, ``monotonic`` is in seconds.
    """

    def __init__(
        self,
        node: str,
        epoch: str,
        *,
        boot_id: str,
        monotonic: float,
        checkpoint_records: int = 10_000,
        checkpoint_secs: float = 10,
        idle_secs: float = 60,
    ) -> None:
        self.node = node
        self.epoch = epoch
        self.next_pos = 0
        self._boot_id = boot_id
        self._checkpoint_records = checkpoint_records
        self._checkpoint_secs = checkpoint_secs
        self._idle_secs = idle_secs
        self._first_pos = 0
        self._attempts = 0
        self._checkpoint_at = monotonic
        self._declared: dict[str, int] = {}

    def number(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Give each row its node, epoch and pos; columns that the batch lacks are filled with their default."""
        count = batch.num_rows
        ours = {
            "node": pa.repeat(pa.scalar(self.node, pa.string()), count),
            "epoch": pa.repeat(pa.scalar(self.epoch, pa.string()), count),
            "pos": pa.array(np.arange(self.next_pos, self.next_pos + count, dtype=np.int64)),
        }
        self.next_pos += count
        self._attempts += count
        given = set(batch.schema.names)
        return pa.RecordBatch.from_arrays(
            [
                ours[field.name]
                if field.name in ours
                else batch.column(field.name)
                if field.name in given
                else _default(field, count)
                for field in event.schema()
            ],
            schema=event.schema(),
        )

    def due(self, monotonic: float) -> bool:
        """Whether it is time for a checkpoint."""
        age = monotonic - self._checkpoint_at
        return self._attempts >= self._checkpoint_records or age >= (
            self._checkpoint_secs if self._attempts else self._idle_secs
        )

    def start(self, now_us: int, message: str, counters: Mapping[str, int]) -> pa.RecordBatch:
        """The first record of the epoch. What was lost before it, since the ring was made, is declared later."""
        return self._own("start", "info", now_us, message, counts=dict(counters))

    def checkpoint(self, now_us: int, monotonic: float, counters: Mapping[str, int]) -> pa.RecordBatch:
        """A ``loss`` record when attempts were lost since the last one, then the checkpoint itself.

        ``counters`` are the tracer's, never reset, and ``read``, the records taken from the ring so far.
        """
        lost = self.lost(now_us, counters)
        rows = [] if lost is None else [lost]
        first, last = self._first_pos, self.next_pos - 1
        # The next checkpoint speaks of this one too, so that no record is left out of the testimony.
        self._first_pos = self.next_pos
        rows.append(
            self._own(
                "checkpoint",
                "info",
                now_us,
                f"checkpoint of {first} to {last}",
                first_pos=first,
                last_pos=last,
                counts=dict(counters),
            )
        )
        self._attempts = 0
        self._checkpoint_at = monotonic
        return _concat(rows)

    def lost(self, now_us: int, counters: Mapping[str, int]) -> pa.RecordBatch | None:
        """A ``loss`` record of what the counters grew by since it was last declared; None when nothing was lost."""
        lost = {name: value for name, value in counters.items() if name.startswith(LOST)}
        fresh = {
            name.removeprefix(LOST): value - self._declared.get(name, 0)
            for name, value in lost.items()
            if value > self._declared.get(name, 0)
        }
        self._declared = lost
        if not fresh:
            return None
        causes = ", ".join(f"{name} {count}" for name, count in sorted(fresh.items()))
        return self._own("loss", "warn", now_us, f"lost {sum(fresh.values())} samples: {causes}", counts=fresh)

    @staticmethod
    def lost_in(batch: pa.RecordBatch) -> int:
        """How many lost attempts the ``loss`` records of a checkpoint declare."""
        kinds, own = batch.column("kind").to_pylist(), batch.column("testimony").to_pylist()
        losses = [record["counts"] for kind, record in zip(kinds, own, strict=True) if kind == "loss"]
        return sum(count for counts in losses for _, count in counts)

    def undelivered(self, now_us: int, what: str, cause: str, first_pos: int, last_pos: int) -> pa.RecordBatch:
        """A ``loss`` record: the records ``first_pos`` to ``last_pos`` did not reach the destination ``what``."""
        count = last_pos - first_pos + 1
        return self._own(
            "loss",
            "warn",
            now_us,
            f"{what} did not get {count} records, {first_pos} to {last_pos}: {cause}",
            first_pos=first_pos,
            last_pos=last_pos,
            counts={"undelivered": count},
        )

    def workload(self, now_us: int, container_id: str, workload: event.Workload) -> pa.RecordBatch:
        """A ``workload`` record: the container whose events before this one have its id alone is called so."""
        pod = f" of pod {workload.namespace}/{workload.pod}" if workload.pod is not None else ""
        return self._own(
            "workload",
            "info",
            now_us,
            f"container {container_id} is {workload.container}{pod}",
            {**workload._asdict(), "container_id": container_id},
        )

    def stop(self, now_us: int, monotonic: float, counters: Mapping[str, int], message: str) -> pa.RecordBatch:
        """The last checkpoint and the last record of the epoch."""
        last = self.checkpoint(now_us, monotonic, counters)
        return _concat([last, self._own("stop", "info", now_us, message, counts=dict(counters))])

    def _own(
        self,
        kind: str,
        type_: str,
        now_us: int,
        message: str,
        fields: Mapping[str, Any] | None = None,
        **testimony: Any,
    ) -> pa.RecordBatch:
        row = {
            "type": type_,
            "kind": kind,
            "node": self.node,
            "epoch": self.epoch,
            "pos": self.next_pos,
            "time": now_us,
            "labels": {},
            "message": message,
            "testimony": {"boot_id": self._boot_id} | testimony,
            **(fields or {}),
        }
        self.next_pos += 1
        return pa.RecordBatch.from_pylist([row], schema=event.schema())


def _concat(batches: list[pa.RecordBatch]) -> pa.RecordBatch:
    return batches[0] if len(batches) == 1 else pa.concat_batches(batches)


def _default(field: pa.Field, count: int) -> pa.Array:
    if field.nullable:
        return pa.nulls(count, field.type)
    return _empty_maps(count)


@functools.lru_cache(maxsize=8)
def _empty_maps(count: int) -> pa.Array:
    # ``labels`` is the only column with a default that a stage may leave out.
    return pa.MapArray.from_arrays(
        pa.array(np.zeros(count + 1, np.int32)), pa.array([], pa.string()), pa.array([], pa.string())
    )
