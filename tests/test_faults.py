"""The short form of `make test-faults`: the cheapest rows, what counting finds, and the table in docs/delivery.md."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from tests.broker import Kafka
from tests.faults import __main__ as shell
from tests.faults import matrix, rows
from tests.faults.stage import guarded, stage
from tests.kernel.plugin import build

A_FAULT = matrix.Fault("a fault", "a phase", (0,))
CHEAPEST = ("agent-paused", "ring-overflow", "agent-stops")


@pytest.fixture(scope="module")
def broker() -> Iterator[Kafka]:
    """The broker of the matrix."""
    build()
    with guarded() as node:
        yield node


@pytest.mark.skipif(os.geteuid() != 0, reason="tracing needs root")
@pytest.mark.parametrize("name", CHEAPEST)
def test_the_cheapest_faults_balance(broker: Kafka, name: str) -> None:
    """Every attempt is delivered, on disk or declared; none twice; and verification finds the same."""
    with stage(rows.ROWS[name].fault, broker) as place:
        found = rows.ROWS[name].make(place)

        assert found.balances, f"{found}\n{place.said}"
        assert found.attempted > 1000
        assert (name == "ring-overflow") == (found.declared > 0)


def test_the_table_has_every_fault() -> None:
    """docs/delivery.md has a row for each fault, in the order of the runner, and nothing is undeclared or doubled."""
    page = shell.PAGE.read_text(encoding="utf-8").partition("<!-- faults -->\n")[2].partition("<!-- /faults -->")[0]
    there = [cells for line in page.splitlines() if len(cells := matrix.cells(line)) == 9][2:]

    assert [(planned.fault.what, planned.fault.phase) for planned in rows.ROWS.values()] == [
        (cells[0], cells[1]) for cells in there
    ]
    assert {("0", "0")} == {(cells[6], cells[7]) for cells in there}


# --- counting -----------------------------------------------------------------------------------------------------


def stream(*numbers: int, lost: int = 0, attempted: int | None = None) -> list[dict[str, Any]]:
    """The records of an epoch: attempts of pid 7 with these numbers, what was lost, and a checkpoint."""
    binds: list[dict[str, Any]] = [
        {"kind": "bind", "pid": 7, "asked_addr": "192.0.2.0", "asked_port": number} for number in numbers
    ]
    loss = [{"kind": "loss", "testimony": {"counts": {"ring_full": lost}}, "message": f"lost {lost}"}] if lost else []
    counts = {"attempted": len(numbers) + lost if attempted is None else attempted, "submitted": len(numbers)}
    end = {"kind": "checkpoint", "testimony": {"counts": counts | {"faulted": 0, "lost_ring_full": lost}}}
    return [record | {"epoch": "a" * 16, "pos": pos} for pos, record in enumerate([*binds, *loss, end])]


def undelivered(first: int, last: int, pos: int) -> dict[str, Any]:
    """A record that declares positions."""
    told = {"first_pos": first, "last_pos": last, "counts": {"undelivered": last - first + 1}}
    message = f"topic t did not get {last - first + 1} records, {first} to {last}: no room"
    return {"kind": "loss", "testimony": told, "message": message, "epoch": "a" * 16, "pos": pos}


def counted(
    attempted: int, topic: list[dict[str, Any]], disk: list[dict[str, Any]] | None = None, verify: int = 0
) -> matrix.Row:
    """The row of what is there."""
    return matrix.row(A_FAULT, attempted=attempted, pid=7, topic=topic, disk=disk or [], verify=verify)


def test_what_is_there_is_counted_once() -> None:
    """The topic before the disk, which has some of the same."""
    whole = stream(1, 2, 3, 4)
    found = counted(4, whole[:3], whole[1:])

    assert (4, 3, 1, 0, 0, 0) == found[1:5] + found[6:8]
    assert found.balances


def test_what_is_missing_without_a_word() -> None:
    """A number that the binder knows, a position that nobody speaks of, an attempt that the kernel counted."""
    whole = stream(1, 2, 3, 4)

    assert 1 == counted(5, whole).undeclared
    assert 1 == counted(4, [*whole[:1], *whole[2:]]).undeclared
    assert 2 == counted(4, stream(1, 2, 3, 4, attempted=6)).undeclared
    assert 1 == counted(4, stream(1, 2, 4)).undeclared
    assert not counted(4, stream(1, 2, 4)).balances


def test_what_is_declared() -> None:
    """What the kernel lost, and positions that a destination did not get; no more than is missing."""
    lost = counted(4, stream(1, 4, lost=2))
    whole = stream(1, 2, 3, 4)
    gone = counted(4, [whole[0], *whole[3:], undelivered(1, 2, 5)])

    assert (2, ("ring_full",), 0) == (lost.declared, lost.causes, lost.undeclared)
    assert (2, ("no room",), 0) == (gone.declared, gone.causes, gone.undeclared)
    assert 0 == counted(4, [*whole, undelivered(1, 2, 5)]).declared


def test_what_is_there_twice() -> None:
    """The same position again in one place, or the same number at another position."""
    whole = stream(1, 2, 3)

    assert 1 == counted(3, [*whole, whole[1]]).doubled
    assert 1 == counted(3, stream(1, 2, 2, 3)).doubled
    assert not counted(3, stream(1, 2, 2, 3)).balances


def test_verification_has_its_say() -> None:
    """A row whose verification finds something else does not balance."""
    assert not counted(2, stream(1, 2), verify=5).balances


def test_rows_of_a_partial_run_take_the_place_of_their_own() -> None:
    """Same fault and phase; a row that was not there comes last."""
    one, two = counted(1, stream(1)), counted(2, stream(1, 2))._replace(fault=A_FAULT._replace(phase="another"))
    before = matrix.table([one, two])

    again = one._replace(attempted=7, delivered=7)
    assert matrix.table([again, two]) == matrix.merged(before, matrix.table([again]))
    new = one._replace(fault=A_FAULT._replace(what="new"))
    assert matrix.table([one, two, new]) == matrix.merged(before, matrix.table([new]))
