"""The documents say what the code does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline import event

ROOT = Path(__file__).parent.parent


def type_text(avro: Any) -> str:
    """An Avro type as docs/events.md writes it."""
    if isinstance(avro, list):
        return type_text(avro[1]) + "?"
    if isinstance(avro, str):
        return avro
    if "logicalType" in avro:
        return str(avro["logicalType"])
    if avro["type"] == "enum":
        return "enum " + ", ".join(avro["symbols"])
    return "map of " + avro["values"] if avro["type"] == "map" else str(avro["type"])


def all_fields() -> list[dict[str, Any]]:
    """The fields of an event and of its testimony, in schema order."""
    fields = event.schema_json()["fields"]
    return [*fields, *fields[-1]["type"][1]["fields"]]


def test_events_md_describes_exactly_the_schema() -> None:
    """docs/events.md has one row for each field, in schema order, with its type and its doc, and a source."""
    rows = [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in (ROOT / "docs/events.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("| `") and line.count(" | ") == 3
    ]
    kinds = event.schema_json()["fields"][1]["type"]["symbols"]
    described = [row for row in rows if row[0].strip("`") not in kinds]

    assert [[f"`{field['name']}`", type_text(field["type"]), field["doc"]] for field in all_fields()] == [
        row[:3] for row in described
    ]
    assert all(row[3] for row in described)


@pytest.mark.parametrize("field", all_fields(), ids=lambda field: field["name"])
def test_every_field_has_a_doc_that_says_when_it_is_empty(field: dict[str, Any]) -> None:
    """A doc is a sentence; one that may be null says when."""
    assert field["doc"].endswith(".")
    assert not isinstance(field["type"], list) or "Null" in field["doc"] or field in all_fields()[-7:]
