"""bindsnoop-replay --verify, by attack: what was changed, taken away, added or lost is found, and where.

A stream is recorded as the agent does it; then somebody who may write to the archive changes it, and hides that as well
as it can be hidden: blocks with right checksums, and in ``rechained`` a whole new chain of checkpoints. Only a key is
something they have not got.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import archive, avro, chain, keys, testimony, verification
from tests import stored
from tests.broker import Kafka
from tests.commands import Done, agent_running, replay
from tests.signing import openssl_keys
from tests.strategies import batches
from tests.test_agent import some_binds

Row = dict[str, Any]
Sign = Callable[[bytes], bytes]

NODE, EPOCH, BOOT = "node-1", "019b7d0000000001", "8f1d6f0e-58a2-4c11-9d53-1f5e7f0ab0c4"
LATER = "019b7e0000000002"
SCHEMA = avro.ours().sha256


# --- a stream, and what is made of it -----------------------------------------------------------------------------


def recorded(
    bursts: Iterable[int] = (20, 30, 25), *, node: str = NODE, epoch: str = EPOCH, sign: Sign | None = None,
    lost: int = 0, undelivered: tuple[int, int] | None = None,
) -> list[Row]:  # fmt: skip
    """The rows of a stream: a start, then bursts of binds with a checkpoint behind each, then the stop."""
    stream = testimony.Stream(node, epoch, boot_id=BOOT, monotonic=0, schema=SCHEMA, sign=sign)
    rows: list[Row] = []

    def write(batch: pa.RecordBatch) -> None:
        stream.sealed(avro.encode(batch))
        rows.extend(batch.to_pylist())

    def now_us() -> int:
        return stored.BASE_US + stream.next_pos

    write(stream.start(now_us(), "begins", {}))
    for number, count in enumerate(bursts):
        binds = [stored.bind(port=1000 + at, time=now_us() + at, cookie=at) for at in range(count)]
        write(stream.number(stored.batch(binds).drop_columns(["node", "epoch", "pos"])))
        if undelivered and number == 1:
            write(stream.undelivered(now_us(), "files", "the disk was full", *undelivered))
        for batch in stream.checkpoint(now_us(), 1, {"attempted": stream.next_pos, "lost_ring_full": lost}):
            write(batch)
    for batch in stream.stop(now_us(), 2, {"attempted": stream.next_pos, "lost_ring_full": lost}, "ends"):
        write(batch)
    return rows


def written(folder: Path, rows: list[Row], block: int = 7, segment_bytes: int = 1 << 20) -> Path:
    """An archive of rows, in blocks of at most so many; a new file after each ``segment_bytes``."""
    for (node, epoch), group in itertools.groupby(rows, lambda row: (row["node"], row["epoch"])):
        mine = list(group)
        writer = archive.Writer(
            folder, node=node, epoch=epoch, segment_bytes=segment_bytes, now=lambda: stored.BASE_US / 1e6
        )
        for at in range(0, len(mine), block):
            batch = stored.batch(mine[at : at + block])
            writer.write(avro.encode(batch), mine[at]["pos"], batch.column("time"))
        writer.close()
    return folder


def rechained(rows: list[Row], *, sign: Sign | None = None) -> list[Row]:
    """What an attacker makes of their rows: positions, ranges, digests and heads that fit; signatures stay as they are
    unless they have a key."""
    rows = copy.deepcopy(rows)
    head, first, digest = chain.first_head(rows[0]["node"], rows[0]["epoch"], BOOT, SCHEMA), 0, hashlib.sha256()
    for pos, row in enumerate(rows):
        row["pos"] = pos
        own = row["testimony"]
        if row["kind"] in ("checkpoint", "stop"):
            head = chain.next_head(head, digest.digest())
            own.update(first_pos=first, last_pos=pos - 1, digest=digest.hexdigest(), head=head.hex())
            first, digest = pos, hashlib.sha256()
            if sign is not None:
                text = chain.signed_text(SCHEMA, stored.batch([row]).to_pylist()[0] | {"time": _us(row["time"])})
                own["signature"] = sign(text).hex()
        digest.update(avro.encode(stored.batch([row]))[0].as_py())
    return rows


def _us(time: Any) -> int:
    return int(pa.scalar(time, pa.timestamp("us")).cast(pa.int64()).as_py())


def verified(*where: object, **extra: str) -> tuple[int, list[dict[str, Any]]]:
    """Exit code and verdicts of a folder, or of whatever arguments."""
    source = ("--files", *where) if where and isinstance(where[0], Path) else where
    done = replay(*source, "--verify", "-o", "json", **extra)
    return done.code, [json.loads(line) for line in done.out.splitlines()]


def only(found: tuple[int, list[dict[str, Any]]]) -> dict[str, Any]:
    """The one verdict, with the exit code as ``code``."""
    (verdict,) = found[1]
    return verdict | {"code": found[0]}


def spans(found: list[dict[str, Any]]) -> list[tuple[int, int]]:
    """First and last position of gaps or forgeries."""
    return [(one["first_pos"], one["last_pos"]) for one in found]


# The stream that is attacked: 0 start, 1 to 20, 21 checkpoint, 22 to 51, 52 checkpoint, 53 to 77, 78 checkpoint,
# 79 checkpoint, 80 stop.
LAST = 80


def test_a_whole_stream_is_complete(tmp_path: Path) -> None:
    """Every record is there and covered by a digest, but the stop itself; exit code 0."""
    rows = recorded()
    found = only(verified(written(tmp_path, rows)))

    assert rows[LAST]["testimony"]["head"] == found["head"]
    assert ("complete", 0, LAST + 1, LAST) == (found["state"], found["code"], found["records"], found["proven"])
    assert ([], [], 0, {}) == (found["gaps"], found["forgeries"], found["missing"], found["lost"])


# --- attacks on what is stored ------------------------------------------------------------------------------------


def edited(rows: list[Row]) -> list[Row]:
    rows[30]["comm"] = "innocent"
    return rows


def deleted(rows: list[Row]) -> list[Row]:
    return rows[:30] + rows[31:]


def deleted_and_renumbered(rows: list[Row]) -> list[Row]:
    return rows[:30] + [row | {"pos": row["pos"] - 1} for row in rows[31:]]


def added(rows: list[Row]) -> list[Row]:
    extra = copy.deepcopy(rows[30]) | {"port": 4444}
    return rows[:31] + [row | {"pos": row["pos"] + 1} for row in [extra, *rows[31:]]]


def added_beside(rows: list[Row]) -> list[Row]:
    return [*rows[:31], copy.deepcopy(rows[30]) | {"port": 4444}, *rows[31:]]


def swapped(rows: list[Row]) -> list[Row]:
    rows[30], rows[40] = rows[40] | {"pos": 30}, rows[30] | {"pos": 40}
    return rows


def swapped_across(rows: list[Row]) -> list[Row]:
    rows[30], rows[60] = rows[60] | {"pos": 30}, rows[30] | {"pos": 60}
    return rows


def cut_out(rows: list[Row]) -> list[Row]:
    return rows[:28] + rows[35:]


def interval_cut_out(rows: list[Row]) -> list[Row]:
    return rows[:22] + rows[53:]


def beginning_cut(rows: list[Row]) -> list[Row]:
    return rows[15:]


def counters_changed(rows: list[Row]) -> list[Row]:
    rows[52]["testimony"]["counts"] = [("attempted", 1), ("lost_ring_full", 0)]
    return rows


def digest_changed(rows: list[Row]) -> list[Row]:
    edited(rows)
    digest = hashlib.sha256(b"".join(avro.encode(stored.batch(rows[21:52])).to_pylist()))
    rows[52]["testimony"]["digest"] = digest.hexdigest()
    return rows


def digest_and_head_changed(rows: list[Row]) -> list[Row]:
    digest_changed(rows)
    before, digest = (bytes.fromhex(rows[at]["testimony"][what]) for at, what in ((21, "head"), (52, "digest")))
    rows[52]["testimony"]["head"] = chain.next_head(before, digest).hex()
    return rows


def range_changed(rows: list[Row]) -> list[Row]:
    rows[52]["testimony"]["first_pos"] = 25
    return rows


def end_of_range_changed(rows: list[Row]) -> list[Row]:
    rows[52]["testimony"]["last_pos"] = 50
    return rows


def of_another_boot(rows: list[Row]) -> list[Row]:
    return rechained([row | {"testimony": row["testimony"] and row["testimony"] | {"boot_id": "x"}} for row in rows])


def digest_taken_away(rows: list[Row]) -> list[Row]:
    rows[52]["testimony"].update(digest=None, head=None)
    return rows


def nonsense_as_digest(rows: list[Row]) -> list[Row]:
    rows[52]["testimony"].update(digest="\x1b[2J", head="zz")
    return rows


def went_on_after_the_stop(rows: list[Row]) -> list[Row]:
    return [*rows, copy.deepcopy(rows[30]) | {"pos": LAST + 1}]


def of_another_node(rows: list[Row]) -> list[Row]:
    return [row | {"node": "node-2"} for row in rows]


def of_another_epoch(rows: list[Row]) -> list[Row]:
    return [row | {"epoch": LATER} for row in rows]


FORGED: dict[Callable[[list[Row]], list[Row]], list[tuple[int, int]]] = {
    edited: [(21, 51)],
    deleted_and_renumbered: [(51, 51), (77, 77), (78, 78), (79, 79)],
    added: [(53, 53), (79, 79), (80, 80), (81, 81)],
    added_beside: [(30, 30)],
    swapped: [(21, 51)],
    swapped_across: [(21, 51), (52, 77)],
    counters_changed: [(52, 77)],
    digest_changed: [(21, 52), (52, 77)],
    digest_and_head_changed: [(52, 77)],
    range_changed: [(52, 52), (52, 77)],
    end_of_range_changed: [(52, 52), (52, 77)],
    of_another_boot: [(0, 21)],
    digest_taken_away: [(0, 80), (52, 77)],
    nonsense_as_digest: [(21, 51), (52, 77)],
    went_on_after_the_stop: [(81, 81)],
    of_another_node: [(0, 20), (21, 51), (52, 77), (78, 78), (79, 79)],
    of_another_epoch: [(0, 20), (21, 51), (52, 77), (78, 78), (79, 79)],
}  # fmt: skip
"""What an attacker does, and the positions that are said to be not as they were written."""


@pytest.mark.parametrize("attack", FORGED, ids=lambda attack: attack.__name__)
def test_a_change_is_found_where_it_is(attack: Callable[[list[Row]], list[Row]], tmp_path: Path) -> None:
    """Whatever is changed without a new chain is found between two checkpoints, without any key; exit code 5."""
    found = only(verified(written(tmp_path, attack(recorded()))))

    assert ("forged", 5) == (found["state"], found["code"])
    assert FORGED[attack] == spans(found["forgeries"])


GONE: dict[Callable[[list[Row]], list[Row]], tuple[int, int]] = {
    deleted: (30, 30), cut_out: (28, 34), interval_cut_out: (22, 52), beginning_cut: (0, 14),
}  # fmt: skip


@pytest.mark.parametrize("attack", GONE, ids=lambda attack: attack.__name__)
def test_a_loss_that_nobody_declared_is_found_where_it_is(
    attack: Callable[[list[Row]], list[Row]], tmp_path: Path
) -> None:
    """Records that are not there are a gap in the positions, exactly; exit code 5."""
    found = only(verified(written(tmp_path, attack(recorded()))))

    assert ("undeclared loss", 5, []) == (found["state"], found["code"], found["forgeries"])
    assert [GONE[attack]] == spans(found["gaps"])
    assert ["undeclared"] == [gap["why"] for gap in found["gaps"]]
    assert found["missing"] == GONE[attack][1] - GONE[attack][0] + 1


def test_a_block_that_was_cut_out_of_a_file(tmp_path: Path) -> None:
    """The bytes of a block and its marker are gone, and the file is one like any other."""
    written(tmp_path, recorded(), block=5)
    file = next(tmp_path.rglob("*.avro"))
    head = len(_header(file))
    content = file.read_bytes()
    marker = content[head - 16 : head]
    blocks = content[head:].split(marker)[:-1]
    file.write_bytes(content[:head] + b"".join(block + marker for at, block in enumerate(blocks) if at != 4))

    found = only(verified(tmp_path))

    assert ("undeclared loss", 5, [(20, 24)]) == (found["state"], found["code"], spans(found["gaps"]))


def _header(file: Path) -> bytes:
    """The bytes of a container before its first block, the marker at their end."""
    content = file.read_bytes()
    closing = content[-16:]
    return content[: content.index(closing) + 16]


def test_a_file_that_was_left_out(tmp_path: Path) -> None:
    """Exactly the positions of that file are missing."""
    written(tmp_path, recorded([60] * 10), block=30, segment_bytes=6_000)
    files = sorted(tmp_path.rglob("*.avro"), key=lambda path: int(path.stem.split("-")[-1]))
    firsts = [int(path.stem.split("-")[-1]) for path in files]
    assert len(files) >= 4
    files[2].unlink()

    found = only(verified(tmp_path))

    assert ("undeclared loss", 5) == (found["state"], found["code"])
    assert [(firsts[2], firsts[3] - 1)] == spans(found["gaps"])


# --- attacks with a new chain -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A private and a public key."""
    return openssl_keys(tmp_path_factory.mktemp("keys"))


def test_a_signed_stream_is_complete(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """With the key all signatures are right, without it they are not asked for."""
    written(tmp_path, recorded(sign=keys.signer(pair[0])))

    with_key, without = only(verified(tmp_path, "--public-key", pair[1])), only(verified(tmp_path))

    assert ("complete", 0, True) == (with_key["state"], with_key["code"], with_key["signed"])
    assert ("complete", 0, True) == (without["state"], without["code"], without["signed"])


def end_cut(rows: list[Row]) -> list[Row]:
    return rows[:60] + [row | {"kind": row["kind"]} for row in rows[-2:]]


WITHIN = (edited, deleted, added, swapped, cut_out)
REWRITTEN = (edited, deleted, added, swapped, cut_out, interval_cut_out, of_another_node, of_another_epoch, end_cut)


@pytest.mark.parametrize("attack", REWRITTEN, ids=lambda attack: attack.__name__)
def test_a_new_chain_is_found_by_the_key_alone(
    attack: Callable[[list[Row]], list[Row]], pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """Who rewrites all positions, digests and heads is not found without a key, and with it from the change on; nor
    does it help them to sign with a key of their own, or not to sign."""
    original = recorded(sign=keys.signer(pair[0]))
    stolen = [row["testimony"]["signature"] for row in original if row["kind"] in ("checkpoint", "stop")]
    rows = rechained(attack(copy.deepcopy(original)))
    folder = written(tmp_path / "stolen", rows)
    unsigned = written(tmp_path / "unsigned", [_without_signature(row) for row in rows])
    other_key = openssl_keys(tmp_path / "other")[0]
    theirs = written(tmp_path / "theirs", rechained(rows, sign=keys.signer(other_key)))

    assert stolen
    found = only(verified(folder))
    assert ("complete", 0) == (found["state"], found["code"])
    for where in (folder, unsigned, theirs):
        found = only(verified(where, "--public-key", pair[1]))
        assert ("forged", 5) == (found["state"], found["code"])
        first = found["forgeries"][0]["first_pos"]
        # Of a chain that was right up to the change, the checkpoint before it is still signed as it was.
        assert (22 if where == folder and attack in WITHIN else 21) <= first <= 61


def _without_signature(row: Row) -> Row:
    return row | {"testimony": row["testimony"] and row["testimony"] | {"signature": None}}


def test_a_checkpoint_cannot_be_made_the_stop(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """A stream that is cut behind a checkpoint, and ends with this one as its stop, has a wrong signature there."""
    rows = recorded(sign=keys.signer(pair[0]))[:53]
    rows[52]["kind"] = "stop"
    written(tmp_path, rows)

    assert "complete" == only(verified(tmp_path))["state"]
    found = only(verified(tmp_path, "--public-key", pair[1]))
    assert ("forged", 5, [(52, 52)]) == (found["state"], found["code"], spans(found["forgeries"]))


def test_a_stream_that_was_never_signed_fails_with_a_key(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Every checkpoint and the stop are named."""
    found = only(verified(written(tmp_path, recorded()), "--public-key", pair[1]))

    assert [(pos, pos) for pos in (21, 52, 78, 79, 80)] == spans(found["forgeries"])
    assert {"the checkpoint is not signed", "the stop is not signed"} == {one["what"] for one in found["forgeries"]}


# --- how an epoch ends --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [60, 53, 1])
def test_a_truncated_end_is_an_open_end(left: int, pair: tuple[Path, Path], tmp_path: Path) -> None:
    """A cut end looks like that of an agent that goes on, or was killed, key or no key: it is never called complete,
    and what lies behind the last checkpoint is not proven."""
    written(tmp_path, recorded(sign=keys.signer(pair[0]))[:left])

    for flags in ((), ("--public-key", pair[1])):
        found = only(verified(tmp_path, *flags))
        assert ("open end", 0, left) == (found["state"], found["code"], found["records"])
        assert found["proven"] == (52 if left > 52 else 0)


def test_the_next_epoch_closes_an_open_end(tmp_path: Path) -> None:
    """What went on elsewhere did not end with a stop; of another node that says nothing."""
    rows = recorded()[:60]
    alone = verified(written(tmp_path / "alone", [*rows, *recorded(node="node-2", epoch=LATER)]))
    closed = verified(written(tmp_path / "closed", [*rows, *recorded(epoch=LATER)]))

    assert (0, ["open end", "complete"]) == (alone[0], [one["state"] for one in alone[1]])
    assert (4, ["ended without stop", "complete"]) == (closed[0], [one["state"] for one in closed[1]])


def test_a_stream_without_digests_is_judged_by_its_positions(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Checkpoints of an older version prove nothing; that is said, and with a key it is not enough."""
    bare = {"digest": None, "head": None}
    rows = [row | {"testimony": row["testimony"] and row["testimony"] | bare} for row in recorded()]
    written(tmp_path, rows)

    found = only(verified(tmp_path))
    assert ("complete", 0, 0) == (found["state"], found["code"], found["proven"])
    assert "no digests" in found["notes"][0]
    assert 5 == only(verified(tmp_path, "--public-key", pair[1]))["code"]


# --- what is declared, and what is damaged ------------------------------------------------------------------------


def test_a_declared_loss_of_records(tmp_path: Path) -> None:
    """Records that a destination did not get are missing there and declared, with the reason; exit code 4. Beside
    another destination, which has them, nothing is missing."""
    rows = recorded(undelivered=(5, 9))
    holed = written(tmp_path / "holed", rows[:5] + rows[10:])
    whole = written(tmp_path / "whole", rows)

    found = only(verified(holed))
    assert ("declared loss", 4, [(5, 9)], 5) == (
        found["state"], found["code"], spans(found["gaps"]), found["missing"],
    )  # fmt: skip
    assert "declared" == found["gaps"][0]["why"]
    assert "the disk was full" in found["gaps"][0]["cause"]
    for where in ((whole,), (holed, whole)):
        found = only(verified(*where))
        assert ("complete", 0) == (found["state"], found["code"])


def test_a_loss_that_the_next_epoch_declares(tmp_path: Path) -> None:
    """Records of a former agent that the topic did not get are declared by the one that was to send them."""
    rows = recorded()
    stream = testimony.Stream(NODE, "f" * 16, boot_id=BOOT, monotonic=0, schema=SCHEMA)
    told = stream.undelivered(stored.BASE_US, "topic binds", "the spool was full", 5, 9, epoch=EPOCH)
    later = written(tmp_path / "later", told.to_pylist())
    holed = written(tmp_path / "holed", rows[:5] + rows[10:])

    found = {verdict["epoch"]: verdict for verdict in verified(holed, later)[1]}

    assert [(5, 9, "declared")] == [(gap["first_pos"], gap["last_pos"], gap["why"]) for gap in found[EPOCH]["gaps"]]
    assert "undeclared loss" == only(verified(holed))["state"]


def test_more_is_missing_than_was_declared(tmp_path: Path) -> None:
    """A hole is divided: what a record declares, and what none does."""
    rows = recorded(undelivered=(5, 9))
    found = only(verified(written(tmp_path, rows[:3] + rows[12:])))

    assert ("undeclared loss", 5) == (found["state"], found["code"])
    assert [(3, 4, "undeclared"), (5, 9, "declared"), (10, 11, "undeclared")] == [
        (gap["first_pos"], gap["last_pos"], gap["why"]) for gap in found["gaps"]
    ]


def test_an_interval_with_a_hole_is_not_proven(tmp_path: Path) -> None:
    """Its digest cannot be made any more, so a change beside a declared loss is not found, and nothing there proven."""
    rows = recorded(undelivered=(5, 9))
    rows[3]["port"] = 1

    found = only(verified(written(tmp_path, rows[:5] + rows[10:])))

    assert ("declared loss", [], LAST + 1 - 21) == (found["state"], found["forgeries"], found["proven"])


def test_a_declared_loss_of_attempts(tmp_path: Path) -> None:
    """What the kernel could not hand over has no positions; it is counted by cause, once, however often it is read."""
    one, two = (written(tmp_path / name, recorded(lost=17)) for name in ("one", "two"))

    for where in ((one,), (one, two)):
        found = only(verified(*where))
        assert ("declared loss", 4, {"ring_full": 17}, []) == (
            found["state"], found["code"], found["lost"], found["gaps"],
        )  # fmt: skip


def test_damage_is_told_from_loss(tmp_path: Path) -> None:
    """A block that cannot be read is why its positions are missing; exit code 3. A second hole is a loss: 5."""
    rows = recorded()
    damaged = written(tmp_path / "damaged", rows, block=5)
    _flip(next(damaged.rglob("*.avro")), 4)
    both = written(tmp_path / "both", rows[:60] + rows[62:], block=5)
    _flip(next(both.rglob("*.avro")), 4)

    found = only(verified(damaged))
    assert ("unread", 3, [(20, 24)]) == (found["state"], found["code"], spans(found["gaps"]))
    assert ("unread", True) == (found["gaps"][0]["why"], "is damaged at byte" in found["gaps"][0]["cause"])
    found = only(verified(both))
    assert ("undeclared loss", 5) == (found["state"], found["code"])
    assert [(20, 24, "unread"), (60, 61, "undeclared")] == [
        (gap["first_pos"], gap["last_pos"], gap["why"]) for gap in found["gaps"]
    ]


def _flip(file: Path, block: int) -> None:
    """Flip a bit in the middle of a block."""
    head = _header(file)
    content = bytearray(file.read_bytes())
    at = len(head)
    for _ in range(block):
        at = content.index(head[-16:], at) + 16
    content[(at + content.index(head[-16:], at)) // 2] ^= 1
    file.write_bytes(content)


def test_damage_at_the_end_is_no_open_end(tmp_path: Path) -> None:
    """Where the last block cannot be read nobody knows whether the stop was in it."""
    written(tmp_path, recorded(), block=5)
    _flip(next(tmp_path.rglob("*.avro")), 16)

    found = only(verified(tmp_path))

    assert ("unread", 3, LAST) == (found["state"], found["code"], found["records"])
    assert "is damaged at byte" in found["cut"]


def test_a_file_that_cannot_be_read_at_all(tmp_path: Path) -> None:
    """The name of the file says whose records are missing, and of another epoch's loss it is no reason."""
    written(tmp_path, recorded([60] * 10), block=30, segment_bytes=6_000)
    other = recorded([60], node="node-1", epoch=LATER)
    written(tmp_path, other[:10] + other[12:])
    files = sorted(tmp_path.rglob(f"*{EPOCH}*.avro"), key=lambda path: int(path.stem.split("-")[-1]))
    firsts = [int(path.stem.split("-")[-1]) for path in files]
    files[2].write_bytes(b"no Avro")

    code, (first, second) = verified(tmp_path)

    assert (5, "unread", "undeclared loss") == (code, first["state"], second["state"])
    assert [(firsts[2], firsts[3] - 1)] == spans(first["gaps"])


# --- the same records more than once, and in any order ------------------------------------------------------------


def test_the_same_archive_twice(tmp_path: Path) -> None:
    """Copies with the same bytes are fine."""
    found = only(verified(written(tmp_path / "one", recorded()), written(tmp_path / "two", recorded(), block=11)))

    assert ("complete", 0, LAST + 1, LAST) == (found["state"], found["code"], found["records"], found["proven"])


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("pos", [0, 30, 52, 79, LAST])
def test_a_record_that_contradicts_its_copy(pos: int, first: bool, tmp_path: Path) -> None:
    """One record in a file of its own, with other bytes, is found at its position, before or after the others."""
    other = recorded()[pos] | {"message": "other"}
    written(tmp_path / ("a" if first else "z"), [other])
    written(tmp_path / "m", recorded())

    found = only(verified(tmp_path))

    assert ("forged", 5) == (found["state"], found["code"])
    assert (pos, pos) in spans([one for one in found["forgeries"] if "two records that differ" in one["what"]])


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_a_copy_with_a_chain_of_its_own(first: bool, tmp_path: Path) -> None:
    """Two copies that are both whole for themselves contradict each other."""
    written(tmp_path / ("a" if first else "z"), rechained(edited(recorded())))
    written(tmp_path / "m", recorded())

    found = only(verified(tmp_path))
    assert ("forged", 5) == (found["state"], found["code"])


def batches_of(rows: list[Row], cuts: list[int]) -> list[tuple[pa.RecordBatch, avro.Datums]]:
    """Rows in batches, with their bytes, as a reader gives them: some from blocks, some from messages."""
    found: list[tuple[pa.RecordBatch, avro.Datums]] = []
    for number, (low, high) in enumerate(itertools.pairwise(sorted({0, *cuts, len(rows)}))):
        batch = stored.batch(rows[low:high])
        datums = avro.encode(batch).to_pylist()
        if number % 2:
            found.append((batch, avro.MessageDatums(avro.ours(), datums, 0)))
        else:
            payload = b"".join(datums)
            found.append((batch, avro.BlockDatums(avro.ours(), payload, batch, [(0, 0), (len(batch), len(payload))])))
    return found


def judged(parts: list[tuple[pa.RecordBatch, avro.Datums]]) -> list[verification.Verdict]:
    """The verdicts on parts that are read in this order."""
    verifier = verification.Verifier()
    for batch, datums in parts:
        verifier.add(batch, datums, "source")
    if verifier.settle():
        for batch, datums in parts:
            verifier.compare(batch, datums)
    return verifier.verdicts()


def test_whole_copies_need_no_second_reading() -> None:
    """Their digests say that they are the same, however each is divided."""
    verifier = verification.Verifier()
    for batch, datums in batches_of(STREAM, [3, 11]) + batches_of(STREAM, [7]):
        verifier.add(batch, datums, "source")

    assert not verifier.settle()
    assert ["complete"] == [verdict.state for verdict in verifier.verdicts()]


STREAM = recorded([9, 0, 14, 3])
PIECES = st.lists(st.integers(0, len(STREAM)), max_size=8)


@settings(max_examples=300, deadline=None)
@given(PIECES, PIECES, st.randoms(use_true_random=False))
def test_any_order_and_any_copies_prove_everything(cuts: list[int], again: list[int], chance: Any) -> None:
    """However a stream is cut, shuffled and repeated: all of it is proven when all of it is there."""
    parts = batches_of(STREAM, cuts)
    parts += chance.sample(whole := batches_of(STREAM, again), chance.randrange(len(whole) + 1))
    chance.shuffle(parts)

    (verdict,) = judged(parts)
    assert ("complete", len(STREAM), len(STREAM) - 1) == (verdict.state, verdict.records, verdict.proven)


@settings(max_examples=300, deadline=None)
@given(PIECES, PIECES, st.integers(0, len(STREAM) - 2), st.randoms(use_true_random=False))
def test_any_change_is_found_in_any_order(cuts: list[int], again: list[int], pos: int, chance: Any) -> None:
    """One record that differs, in the only copy or in one of two, makes a forgery whose range holds it."""
    rows = copy.deepcopy(STREAM)
    rows[pos]["message"] = "changed"
    parts = batches_of(rows, cuts)
    if chance.random() < 0.5:
        parts += batches_of(STREAM, again)
    chance.shuffle(parts)

    (verdict,) = judged(parts)
    assert "forged" == verdict.state
    assert any(one.first_pos <= pos <= one.last_pos for one in verdict.forgeries)


@settings(max_examples=200, deadline=None)
@given(PIECES, st.sets(st.integers(0, len(STREAM) - 2), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_any_loss_is_found_in_any_order(cuts: list[int], gone: set[int], chance: Any) -> None:
    """Exactly the positions that are not there are missing, and no interval with a hole is proven."""
    parts = batches_of([row for row in STREAM if row["pos"] not in gone], cuts)
    chance.shuffle(parts)

    (verdict,) = judged(parts)
    missing = {pos for gap in verdict.gaps for pos in range(gap.first_pos, gap.last_pos + 1)}
    assert (gone, "undeclared loss") == (missing, verdict.state)
    closings = [0] + [row["pos"] for row in STREAM if row["kind"] in ("checkpoint", "stop")]
    whole = [(low, high) for low, high in itertools.pairwise(closings) if not gone & set(range(low, high))]
    proven = [(low, high) for low, high in whole if high not in gone]
    assert verdict.proven == sum(high - low for low, high in proven)


@settings(max_examples=100, deadline=None)
@given(PIECES, st.integers(0, 2000), st.randoms(use_true_random=False))
def test_what_cannot_be_held_is_said(cuts: list[int], held: int, chance: Any) -> None:
    """With little memory what came out of order may stay unproven; then it is not called complete, nor forged."""
    parts = batches_of(STREAM, cuts)
    chance.shuffle(parts)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(verification, "MAX_HELD_BYTES", held)
        (verdict,) = judged(parts)

    proven = verdict.proven == len(STREAM) - 1
    assert ("complete" if proven else "not proven", 0 if proven else 3) == (verdict.state, verdict.code)


def test_more_copies_than_can_be_compared_are_said() -> None:
    """Pieces that came twice, too many to be compared, are not called complete."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(verification, "MAX_COMPARED", 3)
        (verdict,) = judged(batches_of(STREAM, []) + batches_of(STREAM[5:9], []))

    assert ("not proven", 3) == (verdict.state, verdict.code)
    assert verdict.notes[0].startswith("4 records came more than once and were not compared")


def test_copies_without_digests_are_compared_whole(tmp_path: Path) -> None:
    """Where checkpoints prove nothing, every record that came twice is compared."""
    bare = {"digest": None, "head": None}
    rows = [row | {"testimony": row["testimony"] and row["testimony"] | bare} for row in recorded()]
    written(tmp_path / "one", rows)
    rows[30] = rows[30] | {"port": 1}
    written(tmp_path / "two", rows)

    found = only(verified(tmp_path))
    assert ("forged", [(30, 30)]) == (found["state"], spans(found["forgeries"]))


def test_nodes_in_one_batch_are_told_apart() -> None:
    """Records of several nodes and epochs between one another, as a partition has them."""
    streams = [recorded([5, 4], node=node, epoch=epoch) for node in ("a", "b") for epoch in (EPOCH, LATER)]
    rows = [row for mixed in itertools.zip_longest(*streams) for row in mixed if row is not None]

    verdicts = judged(batches_of(rows, [13, 14, 30]))

    assert [("a", EPOCH), ("a", LATER), ("b", EPOCH), ("b", LATER)] == [(one.node, one.epoch) for one in verdicts]
    assert {("complete", len(streams[0]), len(streams[0]) - 1)} == {
        (one.state, one.records, one.proven) for one in verdicts
    }


# --- ranges -------------------------------------------------------------------------------------------------------

MIDNIGHT_US = 1_767_398_400_000_000
"""2026-01-03T00:00:00Z."""


def over_midnight(folder: Path) -> Path:
    """A stream from 23:50 to 00:10, a bind a second; at midnight there are more, out of order by half a second."""
    rows = recorded([100] * 12)
    for row in rows:
        place = row["pos"] - 600
        jitter = 250_000 if place % 2 else -250_000
        row["time"] = MIDNIGHT_US + (place * 50_000 + jitter if abs(place) < 10 else place * 1_000_000)
    return written(folder, rechained(rows), block=50)


def test_a_stream_over_midnight_lies_in_two_days(tmp_path: Path) -> None:
    """Records around midnight are in two files out of order, and nothing is missing."""
    over_midnight(tmp_path)
    first, second = (_positions(folder) for folder in sorted(tmp_path.glob("date=*")))
    assert max(first) > min(second) + 5

    found = only(verified(tmp_path))
    assert ("complete", 0, found["records"] - 1) == (found["state"], found["code"], found["proven"])


@pytest.mark.parametrize(
    "flags",
    [
        ("--from", "2026-01-03T00:05:00Z"),
        ("--from", "2026-01-03"),
        ("--until", "2026-01-03"),
        ("--until", "2026-01-02T23:55:00Z"),
        ("--from", "2026-01-03", "--until", "2026-01-03T00:01:00Z"),
    ],
)
def test_what_lies_outside_the_range_is_no_loss(flags: tuple[str, ...], tmp_path: Path) -> None:
    """A day that was not read is outside the range that was asked for; exit code 0."""
    found = only(verified(over_midnight(tmp_path), *flags))

    assert ("part", 0, 0, []) == (found["state"], found["code"], found["missing"], found["forgeries"])
    assert {"outside"} >= {gap["why"] for gap in found["gaps"]}
    assert found["proven"] > 500


def _positions(folder: Path) -> list[int]:
    done = replay("--files", folder, "-i=false", "--info", "-o", "custom-columns=pos")
    return [int(line) for line in done.out.splitlines()[1:]]


def test_an_idle_node_begins_its_day_late(tmp_path: Path) -> None:
    """What comes a minute after the beginning of the range may be the first; more than that is a loss."""
    rows = recorded()
    for row in rows:
        row["time"] = MIDNIGHT_US + (row["pos"] - 30) * 60_000_000 + 59_000_000
    rows = rechained(rows)
    written(tmp_path / "idle", rows)
    cut = [row for row in rows if row["time"] < MIDNIGHT_US or row["time"] > MIDNIGHT_US + 100_000_000]
    written(tmp_path / "cut", cut)

    assert ("part", [(0, 29)]) == _day(tmp_path / "idle")
    assert ("undeclared loss", [(0, 30)]) == _day(tmp_path / "cut")


def _day(folder: Path) -> tuple[str, list[tuple[int, int]]]:
    found = only(verified(folder, "--from", "2026-01-03"))
    return found["state"], spans(found["gaps"])


def test_a_loss_inside_the_range_stays_one(tmp_path: Path) -> None:
    """Of the days that are read every record has to be there."""
    over_midnight(tmp_path)
    rows = [row for row in recorded() if row["pos"] != 30]
    written(tmp_path, [row | {"epoch": LATER} for row in rows])

    code, verdicts = verified(tmp_path, "--until", "2026-01-03", "--node", NODE)

    assert (5, ["part", "forged"]) == (code, [one["state"] for one in verdicts])
    assert [(30, 30)] == spans(verdicts[1]["gaps"])


def test_attempts_that_were_lost_outside_the_range(tmp_path: Path) -> None:
    """Count where they were declared: before, inside and behind the range."""
    rows = recorded(lost=17)
    declared = next(row for row in rows if row["kind"] == "loss")["time"]
    written(tmp_path, rows)
    before, behind = (f"{declared + timedelta(microseconds=shift):%Y-%m-%dT%H:%M:%S.%fZ}" for shift in (0, 1))

    assert [{}, {"ring_full": 17}, {}] == [
        only(verified(tmp_path, *flags))["lost"]
        for flags in (("--until", before), ("--from", before, "--until", behind), ("--from", behind))
    ]


def test_epochs_outside_the_range_are_not_spoken_of(tmp_path: Path) -> None:
    """Neither in what was read anyway, nor their losses; then nothing matches: exit code 1."""
    written(tmp_path, deleted(recorded()))

    assert (1, []) == verified(tmp_path, "--from", "2026-01-02T12:00:00Z")


def test_nodes_that_were_not_asked_for(tmp_path: Path) -> None:
    """--node chooses, and leaves out."""
    written(tmp_path, [*recorded(node="a"), *deleted(recorded(node="b")), *recorded(node="c")])

    assert (0, ["a"]) == (lambda found: (found[0], [one["node"] for one in found[1]]))(
        verified(tmp_path, "--node", "a")
    )
    assert (0, ["a", "c"]) == (lambda found: (found[0], [one["node"] for one in found[1]]))(
        verified(tmp_path, "--node", "!b")
    )
    assert (5, ["a", "b"]) == (lambda found: (found[0], [one["node"] for one in found[1]]))(
        verified(tmp_path, "--node", "a,b")
    )


# --- a topic, an agent --------------------------------------------------------------------------------------------


def sent(kafka: Kafka, topic: str, rows: list[Row], partition: int = 0) -> None:
    """Rows as messages in a partition."""
    stored.send(kafka.bootstrap, topic, avro.single_object(avro.encode(stored.batch(rows))), partition)


def test_a_topic(kafka: Kafka, topic: str) -> None:
    """A topic verifies as files do: whole, with re-sent records, with a message that is none, with a change."""
    where = ["--topic", topic, "--bootstrap-servers", kafka.bootstrap]
    stored.make_topic(kafka.bootstrap, topic, partitions=4)
    rows = recorded()
    sent(kafka, topic, rows, 0)
    other = recorded(node="node-2")
    sent(kafka, topic, other[:60] + other[40:], 1)
    damaged = avro.single_object(avro.encode(stored.batch(recorded(node="node-3"))))
    damaged[30] = damaged[30][:-1]
    stored.send(kafka.bootstrap, topic, damaged, 2)
    sent(kafka, topic, edited(recorded(node="node-4")), 3)

    code, verdicts = verified(*where)

    assert 5 == code
    assert [("node-1", "complete", 0), ("node-2", "complete", 0), ("node-3", "unread", 1), ("node-4", "forged", 0)] == [
        (one["node"], one["state"], one["missing"]) for one in verdicts
    ]
    assert "offset 30" in verdicts[2]["gaps"][0]["cause"]
    # Whose the message was that cannot be read nobody knows, so it counts for every node.
    assert [3, 3] == [verified(*where, "--node", node)[0] for node in ("node-2", "node-3")]


def test_a_topic_and_files_complete_each_other(kafka: Kafka, topic: str, tmp_path: Path) -> None:
    """What one has lost the other has: nothing is missing, and intervals that lie in both are proven."""
    where = ["--topic", topic, "--bootstrap-servers", kafka.bootstrap]
    stored.make_topic(kafka.bootstrap, topic)
    rows = recorded()
    sent(kafka, topic, rows[35:])
    written(tmp_path, rows[:47])

    assert "undeclared loss" == only(verified(*where))["state"]
    assert "open end" == only(verified(tmp_path))["state"]
    found = only(verified(*where, "--files", tmp_path))
    assert ("complete", 0, LAST) == (found["state"], found["code"], found["proven"])

    rows[40]["port"] = 1
    written(tmp_path / "forged", rows[:47])
    found = only(verified(*where, "--files", tmp_path / "forged"))
    assert ("forged", 5) == (found["state"], found["code"])
    assert (40, 40) in spans(found["forgeries"])


def test_a_real_agent(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """What the agent writes is complete and signed to its last record; one more agent makes one more epoch."""
    flags = ("--files", str(tmp_path), "--signing-key", str(pair[0]), "--checkpoint-records", "20")
    for _ in range(2):
        with agent_running(*flags):
            some_binds(100)

    code, verdicts = verified(tmp_path, "--public-key", pair[1])

    assert (0, ["complete", "complete"]) == (code, [one["state"] for one in verdicts])
    for found in verdicts:
        assert (True, found["records"] - 1) == (found["signed"], found["proven"])
        assert found["records"] > 100


def test_an_agent_into_kafka(kafka: Kafka, topic: str) -> None:
    """And so is what comes through a topic."""
    stored.make_topic(kafka.bootstrap, topic)
    with agent_running("--topic", topic, "--bootstrap-servers", kafka.bootstrap, "--checkpoint-records", "20"):
        some_binds(100)

    found = only(verified("--topic", topic, "--bootstrap-servers", kafka.bootstrap))

    assert ("complete", 0, found["records"] - 1) == (found["state"], found["code"], found["proven"])


def test_an_agent_with_a_wrong_key_says_so_and_traces_nothing(tmp_path: Path) -> None:
    """One sentence, exit code 2, before anything is attached."""
    from tests.commands import run

    (tmp_path / "key").write_text("no key")
    done = run("bindsnoop-agent", "--files", tmp_path / "out", "--signing-key", tmp_path / "key")

    assert 2 == done.code
    assert "holds no private key" in done.err
    assert not (tmp_path / "out").exists()


# --- hostile input ------------------------------------------------------------------------------------------------


def test_hostile_positions_cost_little(tmp_path: Path) -> None:
    """Positions far apart, backwards, below zero and at the end of all numbers are counted, and listed to a limit."""
    places = [*(3 * pos for pos in range(5_000, 0, -1)), -1, -(2**63), 2**63 - 1, 2**62, 0]
    rows = [stored.bind(pos, time=stored.BASE_US, boottime_ns=0) for pos in places]
    found = only(verified(written(tmp_path, rows, block=1000)))

    assert ("forged", 5, 1000) == (found["state"], found["code"], len(found["gaps"]))
    assert any("more than 2000 pieces" in note for note in found["notes"])


SMALL = st.one_of(st.integers(0, 12), st.sampled_from([-(2**63), -1, 2**63 - 1]))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        batches(1, 6, node=st.sampled_from(["a", "b"]), epoch=st.sampled_from([EPOCH, ""]), pos=SMALL, time=SMALL),
        min_size=1, max_size=5,
    ),
    st.sampled_from([None, 0, 5]),
)  # fmt: skip
def test_whatever_the_schema_allows_is_judged(parts: list[pa.RecordBatch], since_us: int | None) -> None:
    """Any records, with any testimony, end in verdicts of one line each and never in an error."""
    verifier = verification.Verifier(lambda *_: False, since_us=since_us, until_us=since_us and since_us + 3)
    read = [(batch, avro.MessageDatums(avro.ours(), avro.encode(batch).to_pylist(), 0)) for batch in parts]
    for batch, datums in read:
        verifier.add(batch, datums, "source")
        verifier.unread("source", f"somewhere-{EPOCH}-", 1)
    verifier.settle()
    for batch, datums in read:
        verifier.compare(batch, datums)

    for verdict in verifier.verdicts():
        lines = verification.as_columns(verdict), verification.as_json(verdict)
        assert all(line.endswith("\n") and line[:-1].isprintable() for line in lines)
        assert verdict.code == 0 or verdict.state not in ("complete", "open end", "part")


def test_hostile_text_stays_on_its_line(tmp_path: Path) -> None:
    """Names that somebody else chose are one line, in the table and in JSON."""
    harm = "\x1b[2J\r\n\u2028\u202e\x00"
    rows = [row | {"node": harm, "epoch": harm, "message": harm} for row in recorded(undelivered=(5, 9))]
    stored.write(tmp_path, rows[:5] + rows[10:])

    table = replay("--files", tmp_path, "--verify")
    lines = replay("--files", tmp_path, "--verify", "-o", "json")

    assert 2 == len(table.out.splitlines())
    assert all(line.isprintable() for line in (*table.out.splitlines(), *lines.out.splitlines()))
    assert harm == json.loads(lines.out)["node"]


def test_another_schema_is_another_chain() -> None:
    """The same bytes under a schema that calls two fields the other way round are not what was written."""
    rows = recorded()
    batch = stored.batch(rows)
    payload = b"".join(avro.encode(batch).to_pylist())
    text = avro.ours().text.replace('"name": "comm"', '"name": "x"').replace(
        '"name": "parent_comm"', '"name": "comm"'
    ).replace('"name": "x"', '"name": "parent_comm"')  # fmt: skip
    swapped_names = avro.admit(text)
    decoded = avro.decode_block(payload, len(rows), swapped_names)
    assert decoded.column("comm")[5].as_py() == "systemd"

    datums = avro.BlockDatums(swapped_names, payload, decoded, [(0, 0), (len(rows), len(payload))])
    (verdict,) = judged([(decoded, datums)])

    assert "forged" == verdict.state
    assert (0, 21) == (verdict.forgeries[0].first_pos, verdict.forgeries[0].last_pos)
    # A part of the stream alone, in a chain that begins as it should.
    tail = avro.encode(batch.slice(60)).to_pylist()
    renamed = avro.decode(tail, swapped_names).batch
    (verdict,) = judged([*batches_of(rows[:60], []), (renamed, avro.MessageDatums(swapped_names, tail, 0))])
    assert [(60, LAST)] == [(one.first_pos, one.last_pos) for one in verdict.forgeries]


# --- what a user sees ---------------------------------------------------------------------------------------------


def test_the_table(tmp_path: Path) -> None:
    """A line for each node and epoch, the findings at its end."""
    written(tmp_path, [*recorded(node="a"), *cut_out(recorded(node="b", lost=3))])

    done = replay("--files", tmp_path, "--verify")

    assert 5 == done.code
    assert (
        "NODE             EPOCH            STATE              RECORDS    PROVEN     LOST     MISSING  FOUND\n"
        "a                019b7d0000000001 complete           81         80         0        0\n"
        "b                019b7d0000000001 undeclared loss    75         50         3        7        "
        "28 to 34 missing, undeclared: no record says why; lost in the kernel: ring_full 3\n"
    ) == done.out


@pytest.mark.parametrize(
    "flags",
    [
        ("--follow", "--topic", "t"), ("--tail", "3"), ("--count",), ("--resolve",), ("--pid", "1"), ("-P", "80"),
        ("-n", "default"), ("-p", "web"), ("-c", "web"), ("-l", "app=web"), ("-o", "json-full"),
        ("-o", "custom-columns=pid"),
    ],
)  # fmt: skip
def test_what_verify_does_not_go_with(flags: tuple[str, ...], tmp_path: Path) -> None:
    """What leaves events out, and other forms, are one sentence that names both options; exit code 2."""
    done = replay("--files", tmp_path, "--verify", *flags)

    assert (2, "") == (done.code, done.out)
    assert re.fullmatch(r"bindsnoop-replay: .*--verify.*\n", done.err)


def test_a_public_key_that_is_none(tmp_path: Path) -> None:
    """A wrong file is one sentence, before anything is read; and without --verify the key is for nothing."""
    written(tmp_path, recorded())
    (tmp_path / "key").write_text("no key")

    done = replay("--files", tmp_path, "--verify", "--public-key", tmp_path / "key")
    assert (2, "", True) == (done.code, done.out, "holds no public key" in done.err)
    done: Done = replay("--files", tmp_path, "--public-key", tmp_path / "key")
    assert (2, True) == (done.code, "--verify" in done.err)


def test_the_worst_code_wins() -> None:
    """5 over 3 over 4 over 0."""
    assert [5, 3, 4, 0, 0] == [verification.worst(codes) for codes in ([0, 3, 5, 4], [4, 3, 0], [0, 4], [0], [])]
