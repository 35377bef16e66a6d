"""The documents say what the code does."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from pipeline import config, event

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


def options_page() -> str:
    """What docs/options.md has to be, from the table of options."""
    lines = [
        "# Options",
        "",
        "Later wins: defaults, `/etc/bindsnoop/bindsnoop.toml`, `~/.config/bindsnoop/bindsnoop.toml` (or the file of",
        "`--config`), variables, flags. A key that holds for one command only stands in its table: `[agent]`,",
        "`[replay]`, `[live]`.",
    ]
    for command in ("agent", "replay", "live"):
        lines += ["", f"## {config.PROGRAMS[command]}", "", "| flag | variable, key | what | default |"]
        lines += ["| --- | --- | --- | --- |"]
        for option in config.options_of(command).values():
            flags = ", ".join(f"`{flag}`" for flag in option.flags) + (
                f" {option.kind.metavar}" if option.kind.metavar else ""
            )
            settable = not option.only_flag and option.name != "config"
            names = f"`{option.variable}`, `{option.key}`" if settable else ""
            cells = [flags, names, option.help, f"`{option.default}`" if option.default is not None else ""]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def test_options_md_lists_every_option() -> None:
    """docs/options.md is the table of options, written out."""
    assert options_page() == (ROOT / "docs/options.md").read_text(encoding="utf-8")


def readme_commands() -> list[tuple[config.Command, list[str]]]:
    """Every line of the README's shell blocks that runs one of the three commands."""
    found = []
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            for command, program in config.PROGRAMS.items():
                if words and words[0] == program:
                    found.append((command, words[1:]))
    return found


@pytest.mark.parametrize(("command", "words"), readme_commands(), ids=lambda value: " ".join(value))
def test_commands_of_the_readme_are_allowed(command: config.Command, words: list[str], tmp_path: Path) -> None:
    """Each command that the README shows parses."""
    config.parse(command, words, {"HOME": str(tmp_path)}, system_file=tmp_path / "none")


def test_promises_are_held_by_tests_that_exist() -> None:
    """docs/promises.md names eight promises, and for each of them tests that are there."""
    text = (ROOT / "docs/promises.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([0-9]+) \| (.*) \| (.*) \|$", text, re.MULTILINE)
    named = [re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", held) for _, _, held in rows]

    assert [str(number) for number in range(1, 9)] == [number for number, _, _ in rows]
    assert all(named)
    assert set() == {
        f"{path}::{name}"
        for path, name in (one for held in named for one in held)
        if f"def {name}(" not in (ROOT / path).read_text(encoding="utf-8")
    }


def test_readme_names_only_what_exists() -> None:
    """Every flag, make target and file that the README mentions exists."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    flags = {flag for option in config.OPTIONS for flag in option.flags}
    targets = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))

    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) <= flags
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE)) <= targets
    assert [path for path in re.findall(r"\]\(([^)#:]+)\)", text) if not (ROOT / path).exists()] == []
