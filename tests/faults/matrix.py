"""Rows of the table of faults: what was found goes in, numbers that have to balance come out.

Two witnesses stand beside each other. The binder numbers its own attempts, and knows nothing of the product: each
number is in the topic, or on disk, or missing. The stream numbers its records, and says what the kernel counted: each
position is there, or a ``loss`` record speaks of it. A missing number that no loss covers is undeclared, and so is a
missing position, and an attempt that the kernel counted and neither handed over nor counted as lost.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Json = dict[str, Any]


class Fault(NamedTuple):
    """What is done and when, as the table says it, and which exit codes of verification belong to that."""

    what: str
    phase: str
    expected: tuple[int, ...]


class Row(NamedTuple):
    """One fault at one moment. Numbers but ``verify`` are counts of the binder's attempts.

    ``delivered`` are in the topic, ``on_disk`` in the spool alone, ``declared`` nowhere, with the causes that ``loss``
    records name in ``causes``. ``undeclared`` and ``doubled`` have to be 0. ``verify`` is the exit code of
    ``bindsnoop-replay --verify`` over topic and spool.
    """

    fault: Fault
    attempted: int
    delivered: int
    on_disk: int
    declared: int
    causes: tuple[str, ...]
    undeclared: int
    doubled: int
    verify: int

    @property
    def balances(self) -> bool:
        """Whether nothing is missing that nobody declares, nothing is there twice, and verification says the same."""
        whole = self.attempted == self.delivered + self.on_disk + self.declared + self.undeclared
        return whole and not self.undeclared and not self.doubled and self.verify in self.fault.expected


def numbers(found: Sequence[Json], pid: int) -> list[int]:
    """Which attempts of the binder are there, in order: the port is the lower half, the address the upper."""
    mine = (event for event in found if event.get("pid") == pid and event["asked_addr"].startswith("192.0.2."))
    return [(int(event["asked_addr"].rsplit(".", 1)[1]) << 16) + event["asked_port"] for event in mine]


def row(
    fault: Fault,
    *,
    attempted: int,
    pid: int,
    topic: Sequence[Json],
    disk: Sequence[Json],
    verify: int,
) -> Row:
    """Count what is there. ``topic`` and ``disk`` are all records of either, each as ``-o json-full`` shows it."""
    everything = {_place(event): event for event in (*disk, *topic)}
    delivered = set(numbers(topic, pid))
    there = numbers(list(everything.values()), pid)
    doubled = len(there) - len(set(there)) + sum(len(one) - len(set(map(_place, one))) for one in (topic, disk))
    missing = attempted - len(set(there) & set(range(1, attempted + 1)))
    causes, undeclared = losses(everything)
    declared = min(missing, sum(causes.values()))
    return Row(
        fault,
        attempted,
        len(delivered),
        len(set(there) - delivered),
        declared,
        tuple(sorted(causes)) if declared else (),
        max(undeclared, missing - declared),
        doubled,
        verify,
    )


def losses(found: Mapping[tuple[str, int], Json]) -> tuple[Counter[str], int]:
    """How many records are declared lost, by cause, and how many are missing without a word.

    Of positions only those count that are nowhere: what did not reach the topic may be on disk.
    """
    causes: Counter[str] = Counter()
    spoken: dict[str, dict[int, str]] = {}
    ends: dict[str, int] = {}
    counts: dict[str, Mapping[str, int]] = {}
    lost_said: Counter[str] = Counter()
    for (epoch, pos), event in sorted(found.items()):
        ends[epoch] = max(ends.get(epoch, 0), pos)
        told = event.get("testimony") or {}
        if event["kind"] in ("checkpoint", "stop"):
            counts[epoch] = told["counts"]
        elif event["kind"] == "loss" and told.get("last_pos") is not None:
            of, cause = _undelivered(event)
            span = range(told["first_pos"], told["last_pos"] + 1)
            spoken.setdefault(of, {}).update(dict.fromkeys(span, cause))
            ends[of] = max(ends.get(of, 0), told["last_pos"])
        elif event["kind"] == "loss":
            for cause, count in told["counts"].items():
                causes[cause] += count
                lost_said[epoch] += count
    undeclared = 0
    for epoch, end in ends.items():
        positions = spoken.get(epoch, {})
        for pos in range(end + 1):
            if (epoch, pos) not in found:
                if pos in positions:
                    causes[positions[pos]] += 1
                else:
                    undeclared += 1
        total = counts.get(epoch, {})
        lost = {name: count for name, count in total.items() if name.startswith("lost_")}
        undeclared += max(
            0, total.get("attempted", 0) - total.get("submitted", 0) - total.get("faulted", 0) - sum(lost.values())
        )
        if not positions and sum(lost.values()) > lost_said[epoch]:
            undeclared += sum(lost.values()) - lost_said[epoch]
    return causes, undeclared


def _place(event: Json) -> tuple[str, int]:
    return event["epoch"], event["pos"]


def _undelivered(event: Json) -> tuple[str, str]:
    """The epoch that a loss of positions speaks of, and its cause, without what differs from one to the next."""
    _, _, cause = event["message"].partition(": ")
    other = re.search(r" \(of epoch ([0-9a-f]{16})\)$", cause)
    cause = cause[: other.start()] if other else cause
    cause = re.sub(r"^waiting for topic \S+, (they are |/\S+ (block )?)?", "", cause)
    cause = re.sub(r"topic faults-\S+", "the topic", cause)
    cause = re.sub(r"( at byte \d+|, \d+ bytes after|: ).*", "", cause)
    return (other[1] if other else event["epoch"]), cause


def table(rows: Sequence[Row]) -> str:
    """Markdown, a row a fault and phase."""
    lines = [
        "Written by `make test-faults`: a real broker, a real agent with topic and spool, and a process that makes a "
        "thousand attempts to bind a second, or three; then the fault, its end and the agent's, and what is in the "
        "topic and on disk is counted. The last column is the exit code of `bindsnoop-replay --verify` over both.",
        "",
        "| fault | phase | attempted | delivered | on disk | declared | undeclared | doubled | verify |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in rows:
        declared = f"{one.declared:,}" + (f" ({'; '.join(one.causes)})" if one.causes else "")
        what = one.fault.what if one.balances else f"{one.fault.what} **does not balance**"
        lines.append(
            f"| {what} | {one.fault.phase} | {one.attempted:,} | {one.delivered:,} | {one.on_disk:,} | {declared} | "
            f"{one.undeclared:,} | {one.doubled:,} | {one.verify} |"
        )
    return "\n".join(lines)


def merged(before: str, found: str) -> str:
    """A table with the rows of a run that was not of all in place of their own; rows that it lacks are appended."""
    fresh = {key: line for line in found.splitlines() if (key := _key(line))}
    lines = [fresh.pop(_key(line), line) if _key(line) else line for line in before.splitlines()]
    return "\n".join([*lines, *fresh.values()])


def _key(line: str) -> tuple[str, ...]:
    """Fault and phase of a row; nothing of another line."""
    found = cells(line)
    if len(found) != 9 or not re.fullmatch(r"[\d,]+", found[2]):
        return ()
    return found[0].removesuffix(" **does not balance**"), found[1]


def cells(line: str) -> list[str]:
    """The cells of a line of the table."""
    return [cell.strip() for cell in line.removeprefix("|").removesuffix("|").split("|")]
