"""Which events of a batch a reader asked for.

In: a batch of ``event.schema()`` and a ``Filter``. Out: the batch of those that pass, in the same order, and how many
failed attempts only ``ignore_errors`` kept back. The stream's own records pass by rules of their own: a warning says
that something is missing, and a filter for a port must not hide that.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.event import LabelTest

# pyarrow guesses the type of a bare constant at every call, which costs more than the comparison of a small batch.
_NORMAL, _WARN = pa.scalar("normal"), pa.scalar("warn")
_ZERO, _FALSE = pa.scalar(0, pa.int32()), pa.scalar(False)


@dataclass(frozen=True)
class Filter:
    """What a reader asked for; an empty collection and None do not restrict.

    ``pids`` process ids. ``ports`` ranges within 1 to 65535; an attempt matches when it asked for one or got one.
    ``ignore_errors`` keeps failed attempts back. ``since_us`` ≤ event time < ``until_us``, microseconds since 1970.
    ``info`` lets the stream's own info records through. ``nodes``, ``namespaces``, ``pods`` and ``containers`` are
    names, or ``!name`` for all but that one; ``labels`` must all be true. What has no pod is in no namespace.
    """

    pids: tuple[int, ...] = ()
    ports: tuple[range, ...] = ()
    ignore_errors: bool = True
    since_us: int | None = None
    until_us: int | None = None
    info: bool = False
    nodes: tuple[str, ...] = ()
    namespaces: tuple[str, ...] = ()
    pods: tuple[str, ...] = ()
    containers: tuple[str, ...] = ()
    labels: tuple[LabelTest, ...] = ()

    @cached_property
    def wanted_ports(self) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """For each number from 0 to 65535 whether it is asked for."""
        table = np.zeros(1 << 16, np.bool_)
        for ports in self.ports:
            table[ports.start : ports.stop] = True
        return table


class Selected(NamedTuple):
    """``batch`` is what passed; ``own`` of its rows are the stream's own records, the others are attempts.

    ``hidden_failures`` failed attempts would have passed with ``ignore_errors=False``.
    """

    batch: pa.RecordBatch
    hidden_failures: int
    own: int


def select(batch: pa.RecordBatch, wanted: Filter) -> Selected:
    """The rows that pass. A warning passes in the asked time and nodes whatever else is asked; info only when asked."""
    binds = _true(pc.equal(batch.column("type"), _NORMAL))
    own = ~binds
    if not wanted.info and own.any():
        own &= _true(pc.equal(batch.column("type"), _WARN))
    if wanted.pids:
        binds &= _true(pc.is_in(batch.column("pid"), pa.array(wanted.pids, pa.int32())))
    if wanted.ports and binds.any():
        binds &= _in_table(batch.column("port"), wanted) | _in_table(batch.column("asked_port"), wanted)
    for mask in _workload(batch, wanted) if binds.any() else ():
        binds &= mask
    for mask in _time_and_node(batch, wanted) if binds.any() or own.any() else ():
        binds &= mask
        own &= mask
    hidden = 0
    if wanted.ignore_errors and binds.any():
        failed = _true(pc.not_equal(batch.column("errno"), _ZERO))
        hidden = int((binds & failed).sum())
        binds &= ~failed
    passed = binds | own
    shown = int(passed.sum())
    if shown == batch.num_rows:
        chosen = batch
    elif shown == 0:
        chosen = batch.slice(0, 0)
    else:
        chosen = batch.filter(pa.array(passed))
    return Selected(chosen, hidden, int(own.sum()))


def _true(mask: pa.BooleanArray) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """A mask of Arrow as one of numpy; null is False."""
    known = pc.fill_null(mask, _FALSE) if mask.null_count else mask
    found: np.ndarray[tuple[int], np.dtype[np.bool_]] = known.to_numpy(zero_copy_only=False)
    return found


def _in_table(ports: pa.Int32Array, wanted: Filter) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    # Port 0 can be stored but not asked for: it stands for null and for numbers that are no port.
    numbers = (pc.fill_null(ports, _ZERO) if ports.null_count else ports).to_numpy()
    return wanted.wanted_ports[np.where(numbers >> 16 == 0, numbers, 0)]


def _time_and_node(batch: pa.RecordBatch, wanted: Filter) -> list[np.ndarray[tuple[int], np.dtype[np.bool_]]]:
    masks = []
    times = batch.column("time").view(pa.int64())
    if wanted.since_us is not None:
        masks.append(_true(pc.greater_equal(times, wanted.since_us)))
    if wanted.until_us is not None:
        masks.append(_true(pc.less(times, wanted.until_us)))
    masks += _named(batch.column("node"), wanted.nodes)
    return masks


def _named(names: pa.StringArray, wanted: tuple[str, ...]) -> list[np.ndarray[tuple[int], np.dtype[np.bool_]]]:
    masks = []
    included = [name for name in wanted if not name.startswith("!")]
    excluded = [name.removeprefix("!") for name in wanted if name.startswith("!")]
    if included:
        masks.append(_true(pc.is_in(names, pa.array(included))))
    if excluded:
        masks.append(~_true(pc.is_in(names, pa.array(excluded))))
    return masks


def _workload(batch: pa.RecordBatch, wanted: Filter) -> list[np.ndarray[tuple[int], np.dtype[np.bool_]]]:
    masks = _named(batch.column("namespace"), wanted.namespaces)
    masks += _named(batch.column("pod"), wanted.pods)
    masks += _named(batch.column("container"), wanted.containers)
    for test in wanted.labels:
        values = pc.map_lookup(batch.column("labels"), pa.scalar(test.key), "first")
        has = pc.is_valid(values) if test.value is None else pc.equal(values, pa.scalar(test.value))
        masks.append(_true(has) if test.wanted else ~_true(has))
    return masks
