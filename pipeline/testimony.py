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

Checkpoints and ``stop`` carry the digest of every datum since the record before them that did, so ``Stream`` has to be
shown the datums as they are written (``sealed``), and their own datums too. What is hashed: ``chain``.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline import chain, event

LOST = "lost_"
"""Counters of the tracer that begin so are attempts that it saw and could not record, by cause."""


class Stream:
    """One epoch of one node: gives ``pos``, and writes the stream's own records into the same row.

    ``checkpoint_records``, ``checkpoint_secs`` and ``idle_secs`` say how often a checkpoint is due. Times are passed
    in: ``now_us`` is UTC in microseconds, ``monotonic`` is in seconds. ``schema`` is the hash of the schema that the
    datums are written with, as ``chain.first_head`` takes it; a stream that is never stored needs none. ``sign`` makes
    the signatures, where there are to be any.
    """

    def __init__(
        self,
        node: str,
        epoch: str,
        *,
        boot_id: str,
        monotonic: float,
        schema: str = "",
        sign: Callable[[bytes], bytes] | None = None,
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
        self._schema = schema
        self._sign = sign
        self._head = chain.first_head(node, epoch, boot_id, schema)
        self._digest = hashlib.sha256()
        self._sealed_pos = 0

    def resume(self, records: pa.RecordBatch, datums: pa.BinaryArray) -> int:
        """Go on where an earlier life of this epoch ended; gives how many attempts of it were read from the ring.

        ``records`` are its last ones, in order and without a hole, and ``datums`` what they were written as. The first
        of them is the last that has a ``head``, or the first of the epoch when none has. ValueError when it is neither.
        """
        rows = records.select(["kind", "pos", "testimony"]).to_pylist()
        first, told = rows[0]["pos"], rows[0]["testimony"] or {}
        counts = dict(told.get("counts") or {})
        if told.get("head"):
            self._head = bytes.fromhex(told["head"])
            self._declared = {name: count for name, count in counts.items() if name.startswith(LOST)}
        elif first:
            raise ValueError(f"record {first} is neither a checkpoint nor the first of its epoch")
        self._first_pos, self._sealed_pos, self.next_pos = first, first, rows[-1]["pos"] + 1
        self.sealed(datums)
        for row in rows[1:]:
            # A loss that was declared, and no checkpoint behind it.
            if row["kind"] == "loss" and row["testimony"]["last_pos"] is None:
                for cause, count in row["testimony"]["counts"]:
                    self._declared[LOST + cause] = self._declared.get(LOST + cause, 0) + count
        self._attempts = sum(row["kind"] == "bind" for row in rows)
        return int(counts.get("read", 0)) + self._attempts

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

    def sealed(self, datums: pa.BinaryArray) -> None:
        """The datums of the next records, in their order, exactly as they will be written.

        Every record has to come by here, this stream's own too, before a checkpoint is asked for.
        """
        if len(datums):
            _, offsets, values = datums.buffers()
            ends = np.frombuffer(offsets, np.int32, len(datums) + 1, datums.offset * 4)
            self._digest.update(memoryview(values)[int(ends[0]) : int(ends[-1])])
            self._sealed_pos += len(datums)

    def due(self, monotonic: float) -> bool:
        """Whether it is time for a checkpoint."""
        age = monotonic - self._checkpoint_at
        return self._attempts >= self._checkpoint_records or age >= (
            self._checkpoint_secs if self._attempts else self._idle_secs
        )

    def start(self, now_us: int, message: str, counters: Mapping[str, int]) -> pa.RecordBatch:
        """The first record of the epoch. What was lost before it, since the ring was made, is declared later."""
        return self._own("start", "info", now_us, message, counts=dict(counters))

    def checkpoint(self, now_us: int, monotonic: float, counters: Mapping[str, int]) -> Iterator[pa.RecordBatch]:
        """A ``loss`` record when attempts were lost since the last one, then the checkpoint itself.

        Each batch has to be ``sealed`` before the next is taken, for that one has its digest. ``counters`` are the
        tracer's, never reset, and ``read``, the records taken from the ring so far. ValueError when records were not
        sealed.
        """
        lost = self.lost(now_us, counters)
        if lost is not None:
            yield lost
        self._attempts = 0
        self._checkpoint_at = monotonic
        message = f"checkpoint of {self._first_pos} to {self.next_pos - 1}"
        yield self._closing("checkpoint", now_us, message, counters)

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

    def undelivered(
        self, now_us: int, what: str, cause: str, first_pos: int, last_pos: int, epoch: str = ""
    ) -> pa.RecordBatch:
        """A ``loss`` record: the records ``first_pos`` to ``last_pos`` did not reach the destination ``what``; those of
        another ``epoch`` where one is named."""
        count = last_pos - first_pos + 1
        return self._own(
            "loss",
            "warn",
            now_us,
            f"{what} did not get {count} records, {first_pos} to {last_pos}: {cause}{chain.about(epoch)}",
            first_pos=first_pos,
            last_pos=last_pos,
            counts={"undelivered": count},
        )

    def missing(self, now_us: int, count: int) -> pa.RecordBatch:
        """A ``loss`` record: so many attempts left the ring in a life before, in an epoch that did not end, and are not
        on disk."""
        message = f"lost {count} samples: a former agent had read them, and they are not on its disk"
        return self._own("loss", "warn", now_us, message, counts={"killed": count})

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

    def stop(
        self, now_us: int, monotonic: float, counters: Mapping[str, int], message: str
    ) -> Iterator[pa.RecordBatch]:
        """The last checkpoint and the last record of the epoch, each to be sealed before the next is taken."""
        yield from self.checkpoint(now_us, monotonic, counters)
        yield self._closing("stop", now_us, message, counters)

    def _closing(self, kind: str, now_us: int, message: str, counters: Mapping[str, int]) -> pa.RecordBatch:
        """A record with the digest of everything from the last such record on; the next one has this one in its own."""
        if self._sealed_pos != self.next_pos:
            raise ValueError(f"Of {self.next_pos} records {self._sealed_pos} were sealed; all have to be.")
        digest = self._digest.digest()
        self._digest = hashlib.sha256()
        self._head = chain.next_head(self._head, digest)
        first, self._first_pos = self._first_pos, self.next_pos
        return self._own(
            kind,
            "info",
            now_us,
            message,
            first_pos=first,
            last_pos=self.next_pos - 1,
            counts=dict(counters),
            digest=digest.hex(),
            head=self._head.hex(),
        )

    def _own(
        self,
        kind: str,
        type_: str,
        now_us: int,
        message: str,
        fields: Mapping[str, Any] | None = None,
        **testimony: Any,
    ) -> pa.RecordBatch:
        row: dict[str, Any] = {
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
        if self._sign is not None and "head" in testimony:
            counts = list(testimony["counts"].items())
            text = chain.signed_text(self._schema, row | {"testimony": row["testimony"] | {"counts": counts}})
            row["testimony"]["signature"] = self._sign(text).hex()
        self.next_pos += 1
        return pa.RecordBatch.from_pylist([row], schema=event.schema())


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
