"""Batches to datums, blocks and messages, and back, with fastavro as the reference."""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import fastavro
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import avro, event
from pipeline.errors import DatumDamaged, SchemaRefused, SchemaUnknown
from tests.strategies import INT32, INT64, Row, batch_of, batches, plain_event, rows_of, texts

ROOT = Path(__file__).parent.parent
quick = settings(max_examples=60, deadline=None)


def illogical(schema: Any) -> Any:
    """A schema without logical types, so that fastavro, too, reads times as the numbers they are."""
    if isinstance(schema, dict):
        return {key: illogical(value) for key, value in schema.items() if key != "logicalType"}
    return [illogical(item) for item in schema] if isinstance(schema, list) else schema


OURS = fastavro.parse_schema(illogical(event.schema_json()))


def written(row: Row, schema: Any = OURS) -> bytes:
    """The datum that fastavro writes."""
    out = io.BytesIO()
    fastavro.schemaless_writer(out, schema, row)
    return out.getvalue()


def read(datum: bytes, writer: Any = OURS) -> Row:
    """The event that fastavro reads, resolved onto our schema; ValueError when it leaves bytes over."""
    source = io.BytesIO(datum)
    row = fastavro.schemaless_reader(source, writer, OURS)
    if source.read(1):
        raise ValueError("bytes are left")
    return row  # type: ignore[return-value]


def datums_of(*positions: int) -> list[bytes]:
    return [written(plain_event(pos)) for pos in positions]


# --- datums


@quick
@given(batches())
def test_encode_is_byte_for_byte_fastavro(batch: pa.RecordBatch) -> None:
    """Every datum has exactly the bytes that fastavro writes for the same event."""
    expected = [written(row) for row in rows_of(batch)]

    assert expected == avro.encode(batch).to_pylist()


@quick
@given(batches())
def test_decode_is_the_inverse_of_encode(batch: pa.RecordBatch) -> None:
    """What was encoded comes back as the same batch, of exactly the schema of events."""
    decoded = avro.decode(avro.encode(batch).to_pylist())

    assert (batch.to_pylist(), None, []) == (decoded.batch.to_pylist(), decoded.index, decoded.bad)
    assert decoded.batch.schema.equals(event.schema())
    decoded.batch.validate(full=True)


@quick
@given(batches(min_size=1))
def test_decode_reads_what_fastavro_reads(batch: pa.RecordBatch) -> None:
    """Datums that fastavro wrote decode to what fastavro reads."""
    datums = [written(row) for row in rows_of(batch)]

    assert [read(datum) for datum in datums] == rows_of(avro.decode(datums).batch)


def test_encode_takes_a_slice() -> None:
    """A slice of a batch gives the datums of that slice, and a slice of datums the block of that slice."""
    batch = batch_of([plain_event(pos) for pos in range(10)])

    assert datums_of(3, 4, 5) == avro.encode(batch.slice(3, 3)).to_pylist()
    assert b"".join(datums_of(3, 4, 5)) == bytes(avro.encode_block(avro.encode(batch).slice(3, 3))[1])


def test_encode_refuses_another_schema_and_missing_values() -> None:
    """A batch that is not one of events is a mistake of the caller; a null where none is allowed is said by name."""
    batch = batch_of([plain_event()])
    place = batch.schema.get_field_index("node")
    hollow = batch.set_column(place, event.schema().field("node"), pa.array([None], pa.string()))

    with pytest.raises(ValueError, match=r"event\.schema"):
        avro.encode(batch.select([0]))
    with pytest.raises(DatumDamaged, match="node is null in 1 rows"):
        avro.encode(hollow)


def damages(datum: bytes) -> dict[str, bytes]:
    """Ways to damage a datum that no reader may take for an event."""
    return {
        "cut": datum[:-1],
        "cut in half": datum[: len(datum) // 2],
        "empty": b"",
        "longer": datum + b"\0",
        "twice": datum * 2,
        "zeros": bytes(3),
        "ones": b"\xff" * 40,
        "a kind that is none": datum[:1] + b"\x50" + datum[2:],
        "a type of a million": b"\x80\x89\x7a" + datum[1:],
    }


@pytest.mark.parametrize("damage", damages(b"0123456789"))
@pytest.mark.parametrize("place", [0, 1, 150, 299])
def test_a_bad_datum_is_found_and_costs_no_other(damage: str, place: int) -> None:
    """Whatever is wrong with one datum, and wherever it stands, it is named by its place and all others are read."""
    datums = datums_of(*range(300))
    datums[place] = damages(datums[place])[damage]
    others = [at for at in range(300) if at != place]

    decoded = avro.decode(datums)

    assert [place] == [one.index for one in decoded.bad]
    assert decoded.index is not None
    assert others == decoded.index.tolist() == decoded.batch.column("pos").to_pylist()


@quick
@given(st.lists(st.sampled_from([None, *damages(b"0123456789")]), min_size=1, max_size=150))
def test_any_mix_of_bad_datums(kinds: list[str | None]) -> None:
    """Every value is either a row or a bad one, each once, in order."""
    good = datums_of(*range(len(kinds)))
    datums = [datum if kind is None else damages(datum)[kind] for datum, kind in zip(good, kinds, strict=True)]
    sound = [at for at, kind in enumerate(kinds) if kind is None]

    decoded = avro.decode(datums)

    assert sound == decoded.batch.column("pos").to_pylist()
    assert [at for at, kind in enumerate(kinds) if kind is not None] == [one.index for one in decoded.bad]
    assert sound == (decoded.index.tolist() if decoded.index is not None else list(range(len(kinds))))


def test_the_reason_names_the_field() -> None:
    """What is wrong with a datum is one sentence that names the field."""
    good = written(plain_event())
    at = good.index(b"nginx")
    cases = {
        good[:at] + b"\xff" + good[at + 1 :]: "comm is not UTF-8",
        good[: at - 1] + b"\xfe\x7f" + good[at:]: "comm is said to have 8191 bytes",
        good[:10]: "is said to have",
        good + b"!": "1 more follow",
        b"\x08" + good[1:]: "type is outside of what its enum allows: Index 4 out of bounds",
        good[: at - 2] + b"\x06" + good[at - 1 :]: "comm has the union branch 3; allowed are 0 to 1",
    }

    found = avro.decode(list(cases))

    assert [True] * len(cases) == [words in one.reason for words, one in zip(cases.values(), found.bad, strict=True)], (
        found.bad
    )


def test_a_number_that_does_not_fit_is_bad_and_not_another_number() -> None:
    """An int of more than 32 bits is damage, not its lowest 32 bits."""
    wide = json.loads(json.dumps(illogical(event.schema_json())).replace('"int"', '"long"'))
    datum = written(plain_event(port=2**32 + 80), fastavro.parse_schema(wide))

    decoded = avro.decode([*datums_of(0), datum])

    assert [1] == [one.index for one in decoded.bad]
    assert "4294967376" in decoded.bad[0].reason


def test_one_flipped_bit_is_bad_or_what_the_reference_reads() -> None:
    """A datum has no checksum; but what we read of a damaged one is never something else than its bytes say."""
    dice = random.Random(3)
    rows = [plain_event(pos, labels={"app": "web"}, container_id="ab" * 32) for pos in range(400)]
    datums = []
    for row in rows:
        datum = bytearray(written(row))
        place = dice.randrange(len(datum) * 8)
        datum[place // 8] ^= 1 << place % 8
        datums.append(bytes(datum))

    decoded = avro.decode(datums)

    assert decoded.index is not None
    assert 400 == len(decoded.index) + len(decoded.bad)
    assert [read(datums[at]) for at in decoded.index] == rows_of(decoded.batch)
    for one in decoded.bad:
        with pytest.raises((ValueError, EOFError, IndexError, KeyError, fastavro.read.SchemaResolutionError)):
            in_range(read(datums[one.index]))


def in_range(row: Row) -> None:
    """fastavro reads any number as an int; 32 bits is what the type says."""
    ints = [name for name in event.fields() if event.schema().field(name).type == pa.int32()]
    if any(row[name] is not None and not -(2**31) <= row[name] < 2**31 for name in ints):
        raise ValueError("more than 32 bits")


@quick
@given(st.lists(st.binary(max_size=80), min_size=1, max_size=5))
def test_any_bytes_are_bad_or_an_event(datums: list[bytes]) -> None:
    """Nothing that bytes can be raises anything, and nothing is lost from the account."""
    decoded = avro.decode(datums)

    assert len(datums) == decoded.batch.num_rows + len(decoded.bad)


# --- blocks


@quick
@given(batches())
def test_a_block_is_its_datums(batch: pa.RecordBatch) -> None:
    """A block is the datums one behind the other, and decodes to the same batch."""
    datums = avro.encode(batch)

    count, payload = avro.encode_block(batch)

    assert (len(datums), b"".join(datums.to_pylist())) == (count, bytes(payload))
    assert batch.to_pylist() == avro.decode_block(payload, count).to_pylist()


@pytest.mark.parametrize(
    ("count", "change"),
    [
        (2, lambda payload: payload),
        (4, lambda payload: payload),
        (0, lambda payload: payload),
        (-3, lambda payload: payload),
        (2**62, lambda payload: payload),
        (3, lambda payload: payload[:-1]),
        (3, lambda payload: payload + b"\0"),
        (3, lambda payload: payload.replace(b"nginx", b"\xff\xff\xff\xff\xff")),
        (3, lambda _: b""),
    ],
)
def test_a_block_is_used_to_its_last_byte(count: int, change: Any) -> None:
    """A count or a length that is off, and text that is none, are damage."""
    payload = b"".join(datums_of(0, 1, 2))

    with pytest.raises(DatumDamaged):
        avro.decode_block(change(payload), count)


# --- messages


# --- the bytes of the rows


def otherwise(row: Row) -> bytes:
    """A datum in bytes that nobody but we would have chosen, which means the same: an empty map in two pieces."""
    datum = written(row | {"labels": {"a": "b"}, "testimony": None})
    assert datum.count(b"\x02\x02a\x02b\x00") == 1
    return datum.replace(b"\x02\x02a\x02b\x00", b"\x01\x08\x02a\x02b\x00")


def cuts(count: int) -> st.SearchStrategy[list[int]]:
    """Rows, ascending, at which a batch is cut."""
    return st.lists(st.integers(0, count), max_size=6).map(lambda rows: sorted({0, count, *rows}))


@quick
@given(batches(min_size=1), st.data())
def test_the_bytes_of_any_rows_are_their_datums(batch: pa.RecordBatch, data: st.DataObject) -> None:
    """From a block, with or without borders that are known, and from messages."""
    datums = avro.encode(batch).to_pylist()
    known = [(row, len(b"".join(datums[:row]))) for row in data.draw(cuts(len(datums)))]
    block = avro.BlockDatums(avro.ours(), b"".join(datums), batch, known)
    messages = avro.MessageDatums(avro.ours(), [b"frame" + datum for datum in datums], 5)

    first, end = sorted(data.draw(st.tuples(*[st.integers(0, len(datums))] * 2)))
    for source in (block, messages):
        assert b"".join(datums[first:end]) == source.of(first, end)
        assert [len(b"".join(datums[first:row])) for row in range(first, end + 1)] == source.borders(first, end)
        assert b"".join(datums[first:end:2]) == source.pick(list(range(first, end, 2)))


@pytest.mark.parametrize("writer", [avro.ours(), "older"])
def test_the_bytes_of_rows_that_we_would_write_otherwise(writer: Any) -> None:
    """Another writer's encoding of the same events, and one of a schema that lacks a field, are walked over."""
    if writer == "older":
        fields = [one for one in event.schema_json()["fields"] if one["name"] != "cookie"]
        writer = avro.admit(json.dumps(event.schema_json() | {"fields": fields}))
        parsed = fastavro.parse_schema(illogical(json.loads(writer.text)))
        datums = [written(plain_event(pos), parsed) for pos in range(20)]
    else:
        datums = [otherwise(plain_event(pos)) if pos % 3 else written(plain_event(pos)) for pos in range(20)]
    payload = b"".join(datums)
    batch = avro.decode_block(payload, 20, writer)

    for row in range(21):
        block = avro.BlockDatums(writer, payload, batch, [(0, 0), (20, len(payload))])
        assert (b"".join(datums[:row]), b"".join(datums[row:])) == (block.of(0, row), block.of(row, 20))
        assert [len(b"".join(datums[row:end])) for end in range(row, 21)] == block.borders(row, 20)


def test_messages_of_several_schemas_come_in_groups_with_their_bytes() -> None:
    """A batch for each framing and schema; what is bad is told by its place."""
    datums = datums_of(*range(6))
    array = pa.array(datums, pa.binary())
    values = [*avro.single_object(array)[:2], b"bad", *avro.confluent(array, 7)[2:5], avro.confluent(array, 8)[5][:-1]]

    groups, bad = avro.decode_groups(values, resolve)

    assert [[0, 1], [2, 3, 4]] == [batch.column("pos").to_pylist() for batch, _ in groups]
    assert [b"".join(datums[:2]), b"".join(datums[2:5])] == [of.of(0, batch.num_rows) for batch, of in groups]
    assert [2, 6] == [one.index for one in bad]


@quick
@given(batches(min_size=1), st.integers(0, 2**32 - 1))
def test_framings_round_trip(batch: pa.RecordBatch, schema_id: int) -> None:
    """A framed message is told by its first bytes, and is the datum behind them."""
    datums = avro.encode(batch)
    for framing, key, values, size in (
        (avro.Framing.CONFLUENT, schema_id, avro.confluent(datums, schema_id), 5),
        (avro.Framing.SINGLE_OBJECT, avro.ours().fingerprint, avro.single_object(datums), 10),
    ):
        (group,) = avro.unframe(values).groups

        assert (framing, key, values) == (group.framing, group.key, group.values)
        assert datums.to_pylist() == [value[size:] for value in values]
        assert batch.to_pylist() == avro.decode(group.values, framing=framing).batch.to_pylist()


def test_the_frames_are_what_the_standards_say() -> None:
    """Confluent: 00 and the id, big endian. Single object: C3 01 and CRC-64-AVRO, little endian, as fastavro has it."""
    datums = avro.encode(batch_of([plain_event()]))
    canonical = fastavro.schema.to_parsing_canonical_form(fastavro.parse_schema(event.schema_json()))
    fingerprint = bytes.fromhex(fastavro.schema.fingerprint(canonical, "CRC-64-AVRO"))

    assert b"\x00\x00\x00\x01\x02" + datums[0].as_py() == avro.confluent(datums, 258)[0]
    assert b"\xc3\x01" + fingerprint + datums[0].as_py() == avro.single_object(datums)[0]


def test_what_has_no_frame_says_what_it_is() -> None:
    """Tombstones, empty, cut and foreign messages are bad, each with its place and a reason; the others keep theirs."""
    datums = avro.encode(batch_of([plain_event(pos) for pos in range(4)]))
    one, two = avro.confluent(datums, 7)[:2], avro.single_object(datums)[2:]
    values = [None, one[0], b"", two[0], b'{"pid": 1}', one[1], b"\0\0\0", two[1], b"\xc3\x01abc", b"\0\0\0\0\x09x"]

    decoded = avro.decode_messages(values, resolve)

    assert decoded.index is not None
    assert ([1, 3, 5, 7], [0, 2, 1, 3]) == (decoded.index.tolist(), decoded.batch.column("pos").to_pylist())
    assert {
        0: "The message has no value (a tombstone).",
        2: "The message's value is empty.",
        4: "The message starts with 7B 22 70 69; an event starts with 00 and a schema id, or with C3 01.",
        6: "The message ends inside its frame, after 3 bytes.",
        8: "The message ends inside its frame, after 5 bytes.",
        9: "Schema id 9 is unknown.",
    } == {bad.index: bad.reason for bad in decoded.bad}


def resolve(key: int | bytes) -> avro.Schema:
    if isinstance(key, bytes):
        return avro.by_fingerprint(key)
    if key == 7:
        return avro.ours()
    raise SchemaUnknown(f"Schema id {key} is unknown.")


def test_nothing_that_can_be_read() -> None:
    """No messages, or none that can be read, give an empty batch of events."""
    assert (0, []) == (avro.decode_messages([], resolve).batch.num_rows, avro.decode_messages([], resolve).bad)
    decoded = avro.decode_messages([None, b"x"], resolve)
    assert ([], [0, 1]) == (decoded.batch.to_pylist(), [one.index for one in decoded.bad])
    assert decoded.index is not None


def test_an_unknown_fingerprint_is_named() -> None:
    """A fingerprint that no release had is an error that names it and those that are known."""
    with pytest.raises(SchemaUnknown, match=f"0102030405060708; known are .*{avro.ours().fingerprint.hex()}"):
        avro.by_fingerprint(bytes(range(1, 9)))


# --- writers' schemas


def changed(**changes: Any) -> dict[str, Any]:
    """Our schema with fields changed by name (None: left out) and, by ``more``, added in front and behind."""
    schema = json.loads(event.schema_text())
    front, behind = changes.pop("more", ([], []))
    fields = [field | changes.get(field["name"], {}) for field in schema["fields"] if changes.get(field["name"], 1)]
    schema["fields"] = [*front, *fields, *behind]
    return schema  # type: ignore[no-any-return]


def extra(kind: Any, value: Any) -> tuple[dict[str, Any], Row]:
    return changed(more=([{"name": "x1", "type": kind}], [{"name": "x2", "type": kind}])), {"x1": value, "x2": value}


INNER = {"type": "record", "name": "Inner", "fields": [{"name": "y", "type": "int"}]}
POINT = {"type": "record", "name": "Point", "fields": [{"name": "x", "type": INNER}]}
NEWER = json.loads(event.schema_text())["fields"][0]["type"]
NEWER["symbols"].append("panic")

WRITERS: dict[str, tuple[dict[str, Any], Row]] = {
    "older: fields that it lacks take their default": (
        changed(labels=None, testimony=None, comm=None, port=None, kind=None),
        {},
    ),
    "another order": (changed() | {"fields": changed()["fields"][::-1]}, {}),
    "extra string": extra("string", "x"),
    "extra optional int": extra(["null", "int"], 5),
    "extra float": extra("float", 0.5),
    "extra double": extra("double", 0.5),
    "extra bytes": extra("bytes", b"\xff\0"),
    "extra fixed": (
        changed(more=([{"name": "x1", "type": {"type": "fixed", "name": "F", "size": 4}}], [])),
        {"x1": b"\xff\xff\xff\xff"},
    ),
    "extra array": extra({"type": "array", "items": "int"}, [1, 2, 3]),
    "extra map of arrays": extra({"type": "map", "values": {"type": "array", "items": "long"}}, {"a": [1]}),
    "extra wide union": extra(["null", "string", "long"], 7),
    "extra record, then its name": (
        changed(more=([{"name": "x1", "type": POINT}], [{"name": "x2", "type": ["null", "Point"]}])),
        {"x1": {"x": {"y": 1}}, "x2": {"x": {"y": 2}}},
    ),
    "int where ours is long": (changed(uid={"type": ["null", "int"]}, pos={"type": "int"}), {}),
    "never null where ours may be": (
        changed(comm={"type": "string", "default": ""}, v6only={"type": "boolean", "default": False}),
        {"v6only": True},
    ),
    "null last": (changed(comm={"type": ["string", "null"]}, pid={"type": ["int", "null"]}), {"comm": None}),
    "bytes where ours is text": (changed(comm={"type": ["null", "bytes"]}), {"comm": b"nginx"}),
    "a symbol that we do not know": (changed(type={"type": NEWER}), {"type": "panic"}),
    "another namespace": (changed() | {"namespace": "elsewhere"}, {}),
    "a plain long for the time": (changed(time={"type": "long"}), {}),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_writers_schema_is_resolved_as_fastavro_does(name: str) -> None:
    """Whatever the rules allow between a writer's schema and ours gives what fastavro reads, bare and in blocks."""
    schema, values = WRITERS[name]
    plain = fastavro.parse_schema(illogical(schema))
    rows = [plain_event(pos, labels={"a": "b"}) | values for pos in range(5)]
    datums = [written(row, plain) for row in rows]
    expected = [read(datum, plain) for datum in datums]

    admitted = avro.admit(json.dumps(schema))

    assert expected == rows_of(avro.decode(datums, admitted).batch)
    assert expected == rows_of(avro.decode_block(b"".join(datums), 5, admitted))
    bad = avro.decode([datums[0], datums[1][:-1], datums[2] + b"\0", datums[3]], admitted)
    assert ([0, 3], [1, 2]) == (bad.index.tolist(), [one.index for one in bad.bad])  # type: ignore[union-attr]
    with pytest.raises(DatumDamaged):
        avro.decode_block(b"".join(datums) + b"\0", 5, admitted)


PLAIN: dict[str, st.SearchStrategy[Any]] = {
    "boolean": st.booleans(), "int": INT32, "long": INT64, "float": st.floats(width=32, allow_nan=False),
    "double": st.floats(allow_nan=False), "string": texts(), "bytes": st.binary(max_size=5),
}  # fmt: skip


@st.composite
def kinds(draw: st.DrawFn, name: str = "T", depth: int = 3, union: bool = True) -> tuple[Any, st.SearchStrategy[Any]]:
    """Any type within the gate, and a strategy for its values."""
    choices = ["plain"] + ["array", "map", "record", "enum", "fixed"] * (depth > 0) + ["union"] * (union and depth > 0)
    match draw(st.sampled_from(choices)):
        case "plain":
            kind = draw(st.sampled_from(sorted(PLAIN)))
            return kind, PLAIN[kind]
        case "array":
            kind, value = draw(kinds(name, depth - 1))
            return {"type": "array", "items": kind}, st.lists(value, max_size=3)
        case "map":
            kind, value = draw(kinds(name, depth - 1))
            return {"type": "map", "values": kind}, st.dictionaries(texts(), value, max_size=3)
        case "record":
            parts = [draw(kinds(f"{name}{at}", depth - 1)) for at in range(draw(st.integers(1, 3)))]
            listed = [{"name": f"f{at}", "type": kind} for at, (kind, _) in enumerate(parts)]
            values = st.fixed_dictionaries({f"f{at}": value for at, (_, value) in enumerate(parts)})
            return {"type": "record", "name": name, "fields": listed}, values
        case "enum":
            return {"type": "enum", "name": name, "symbols": ["A", "B"]}, st.sampled_from("AB")
        case "fixed":
            return {"type": "fixed", "name": name, "size": 3}, st.binary(min_size=3, max_size=3)
        case _:
            kind, value = draw(kinds(name, depth - 1, union=False))
            other = "string" if kind != "string" else "long"
            branches = draw(st.sampled_from([["null", kind], [kind, "null"], ["null", kind, other], [kind, other]]))
            return branches, value if "null" not in branches else st.none() | value


@quick
@given(kinds(), st.data())
def test_whatever_else_a_writer_has_is_stepped_over(
    kind: tuple[Any, st.SearchStrategy[Any]], data: st.DataObject
) -> None:
    """Additional fields of any type, in front of ours and behind them, do not change what is read."""
    schema, _ = extra(kind[0], None)
    schema["fields"][-1]["type"] = "long"
    plain = fastavro.parse_schema(illogical(schema))
    values = data.draw(st.lists(kind[1], min_size=1, max_size=3))
    rows = [plain_event(pos) for pos in range(len(values))]
    datums = [written(row | {"x1": value, "x2": 9}, plain) for row, value in zip(rows, values, strict=True)]

    decoded = avro.decode(datums, avro.admit(json.dumps(schema)))

    assert (rows, []) == (rows_of(decoded.batch), decoded.bad)


def test_aliases_of_our_own_fields() -> None:
    """A field that we renamed is found by its alias, as the rules say."""
    renamed = changed(comm={"name": "command", "aliases": ["comm"]})
    theirs = avro._Gate().node(event.schema_json(), "", "", 0)
    ours = avro._Gate().node(renamed, "", "", 0)

    columns = avro._resolve(theirs, ours, event.schema())

    assert columns is not None
    place = event.fields().index("comm")
    assert place == columns[place][0]


def test_null_where_we_allow_none_is_bad() -> None:
    """A writer may have a field optional that ours is not: then only its nulls are bad."""
    schema = changed(node={"type": ["null", "string"]})
    plain = fastavro.parse_schema(illogical(schema))
    datums = [written(plain_event(0), plain), written(plain_event(1, node=None), plain)]

    decoded = avro.decode(datums, avro.admit(json.dumps(schema)))

    assert ([0], [1]) == (decoded.index.tolist(), [one.index for one in decoded.bad])  # type: ignore[union-attr]
    assert "node is null" in decoded.bad[0].reason


def nested(depth: int) -> Any:
    return {"type": "array", "items": nested(depth - 1)} if depth else "int"


def doubling(levels: int) -> Any:
    """A few hundred bytes that name two of the one below at every level."""
    first: Any = {"type": "record", "name": "R0", "fields": [{"name": "a", "type": "int"}]}
    for level in range(1, levels):
        below = [{"name": f"f{at}", "type": f"R{level - 1}" if at else first} for at in range(8)]
        first = {"type": "record", "name": f"R{level}", "fields": below}
    return first


def wide(count: int, kind: Any) -> Any:
    return {
        "type": "record",
        "name": "W",
        "fields": [{"name": f"f{at}", "type": kind} for at in range(count)],
    }


NODE = {"type": "record", "name": "N", "fields": [{"name": "next", "type": ["null", "N"]}]}
REFUSED: dict[str, tuple[str, str]] = {
    "no JSON": ("{", "is no JSON"),
    "a number": ("7", "no type"),
    "nothing": ("", "is no JSON"),
    "deep JSON": ("[" * 100_000, "is no JSON"),
    "a string": ('"string"', "an event is a record"),
    "another record": (json.dumps(POINT), "lacks the field node"),
    "unknown type": (json.dumps(changed(comm={"type": "varchar"})), "unknown type bindsnoop.varchar at comm"),
    "recursive": (json.dumps(changed(comm={"type": NODE})), "recursive at comm.next: bindsnoop.N contains itself"),
    "array of null": (json.dumps(extra({"type": "array", "items": "null"}, [])[0]), "items of no bytes at x1"),
    "array of empty fixed": (
        json.dumps(extra({"type": "array", "items": {"type": "fixed", "name": "F", "size": 0}}, [])[0]),
        "items of no bytes at x1",
    ),
    "a record of nothing": (
        json.dumps(changed(comm={"type": {"type": "record", "name": "E", "fields": []}})),
        "without 1 to 1000 fields",
    ),
    "array of optional wide records": (
        json.dumps(
            changed(more=([{"name": "x", "type": {"type": "array", "items": ["null", wide(900, "long")]}}], []))
        ),
        "grow to",
    ),
    "too deep": (json.dumps(extra(nested(20), [])[0]), "nested more than 16 levels"),
    "too many": (json.dumps(changed(more=([{"name": "x", "type": wide(999, "int")}], []))), "more than 1000 fields"),
    "doubling": (json.dumps(changed(more=([{"name": "x", "type": doubling(6)}], []))), "more than"),
    "too long": (json.dumps(changed(comm={"doc": "x" * 300_000})), "longer than 262144 bytes"),
    "fields of text": (
        json.dumps({"type": "record", "name": "BindEvent", "fields": ["a"]}),
        "without a type or a name",
    ),
    "a field twice": (json.dumps(changed(more=([{"name": "comm", "type": "int"}], []))), "the field comm twice"),
    "a type twice": (json.dumps(extra(POINT, None)[0]), "(Point|Inner) twice"),
    "text where ours is a number": (json.dumps(changed(pid={"type": "string"})), "pid as string; ours is int"),
    "long where ours is int": (json.dumps(changed(pid={"type": "long"})), "pid as long; ours is int"),
    "milliseconds": (
        json.dumps(changed(time={"type": {"type": "long", "logicalType": "timestamp-millis"}})),
        "time as timestamp-millis; allowed is timestamp-micros",
    ),
    "no pos": (json.dumps(changed(pos=None)), "lacks the field pos, which has no default"),
    "a control character": (
        json.dumps(changed(more=([{"name": "x", "type": "a\x1b[31m"}], []))),
        r"type bindsnoop.a\?\[31m",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_schema_that_is_unsafe_or_not_ours_is_refused(name: str) -> None:
    """What could exhaust us, and what does not describe events, is refused in one sentence that says where."""
    text, words = REFUSED[name]

    with pytest.raises(SchemaRefused, match=words) as refused:
        avro.admit(text)
    assert str(refused.value).isprintable()


def test_every_released_schema_is_read() -> None:
    """Each file of schemas/ is admitted, known by its fingerprint, and read without fastavro's help."""
    released = avro.released()

    assert avro.ours() is released[avro.ours().fingerprint]
    assert [] == [schema.text for schema in released.values() if schema._columns is None]


def test_our_schema_can_change_for_ever() -> None:
    """FULL_TRANSITIVE: every field has a default, but the identity and the time, and so has every enum."""
    schema = event.schema_json()
    without = [field["name"] for field in schema["fields"] if "default" not in field]
    enums = [field["type"] for field in schema["fields"] if isinstance(field["type"], dict)]
    inner = next(field["type"][1] for field in schema["fields"] if field["name"] == "testimony")

    assert ["node", "epoch", "pos", "time"] == without
    assert [] == [kind for kind in enums if kind["type"] == "enum" and kind.get("default") not in kind["symbols"]]
    assert [] == [field["name"] for field in inner["fields"] if "default" not in field]


# --- what means harm

HOSTILE = """
import json, resource, sys, time
from pipeline import avro, event
from tests.test_avro import REFUSED, extra, changed, written
from tests.strategies import plain_event
from pipeline.errors import SchemaRefused

plain = written(plain_event(labels={}))

def varint(n):
    n = (n << 1) ^ (n >> 63); out = bytearray()
    while n > 127: out.append(n & 127 | 128); n >>= 7
    out.append(n); return bytes(out)

head, tail = written(plain_event(labels={"QQQQQQ": ""})).split(b"\\x02\\x0cQQQQQQ\\x00\\x00")
values = {
    "entries": head + varint(450_000) + b"\\0\\0" * 450_000 + b"\\0" + tail,
    "entries, cut": head + varint(450_000) + b"\\0\\0" * 450_000,
    "blocks of one": head + b"\\x02\\0\\0" * 300_000 + b"\\0" + tail,
    "blocks of one, cut": head + b"\\x02\\0\\0" * 300_000,
    "count": head + varint(2**62) + b"\\0" * 900_000,
    "negative count": head + varint(-2**63) + varint(2**62) + b"\\0" * 10 + tail,
    "negative blocks": head + b"\\x01\\0\\0\\0" * 225_000 + b"\\0" + tail,
    "length": head + b"\\x02" + varint(2**62) + tail,
    "negative length": head + b"\\x02" + varint(-2**62) + tail,
    "zeros": bytes(900_000),
    "ones": b"\\xff" * 900_000,
    "text": plain * 5000,
}
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
avro.decode([plain])
report = {}
for name, value in values.items():
    start = time.monotonic()
    decoded = avro.decode([value])
    assert decoded.batch.num_rows + len(decoded.bad) == 1, name
    report[name] = time.monotonic() - start
for name, (text, _) in REFUSED.items():
    start = time.monotonic()
    try:
        avro.admit(text)
    except SchemaRefused:
        pass
    report["schema: " + name] = time.monotonic() - start
for kind, value in (({"type": "array", "items": "int"}, bytes(900_000)), (["null", "string", "long"], bytes(900_000))):
    schema = avro.admit(json.dumps(extra(kind, None)[0]))
    start = time.monotonic()
    avro.decode([varint(900_000) + value], schema)
    report[str(kind)] = time.monotonic() - start
print(json.dumps([max(report.items(), key=lambda item: item[1]),
                  (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) / 1024]))
"""


def test_hostile_input_costs_a_second_and_256_mib_at_most() -> None:
    """No value of 900 kB, and no schema, crashes, hangs or exhausts a reader."""
    run = subprocess.run(
        [sys.executable, "-c", HOSTILE], capture_output=True, text=True, timeout=100, check=False, cwd=ROOT
    )

    assert 0 == run.returncode, run.stderr
    (name, seconds), mib = json.loads(run.stdout)
    assert seconds < 1, name
    assert mib < 256
    assert "" == run.stderr
