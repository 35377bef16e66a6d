"""Imports point downwards only: commands → edges and stages → words (docs/architecture.md)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "pipeline"

WORDS = {"event", "errors"}
STAGES = {"records", "enrich", "testimony", "avro", "select", "render"}
EDGES = {"tracer", "archive", "topic", "registry"}
AROUND = {"config", "completion", "telemetry"}
COMMANDS = {"agent", "replay", "live"}

MAY_IMPORT = {
    **dict.fromkeys(WORDS | STAGES | EDGES, WORDS),
    **dict.fromkeys(AROUND, WORDS | AROUND),
    **dict.fromkeys(COMMANDS, WORDS | STAGES | EDGES | AROUND),
}

ONLY_IN = {
    "confluent_kafka": {"topic"},
    "tenacity": {"topic"},
    "kubernetes": {"workloads"},
    "bcc": {"tracer"},
    "ctypes": {"tracer", "archive"},
    "pyruhvro": {"avro", "event"},
    "fastavro": {"avro", "archive"},
}


def modules() -> Iterator[tuple[str, Path]]:
    """Each file of the package with the name of the part that it belongs to."""
    for path in sorted(PACKAGE.rglob("*.py")):
        relative = path.relative_to(PACKAGE)
        if relative.name == "__init__.py" and len(relative.parts) == 1:
            continue
        yield relative.parts[0].removesuffix(".py"), path


def imports(path: Path) -> Iterator[str]:
    """Full dotted names of everything that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_module_has_its_place() -> None:
    """A new module is a decision: it is listed here and in docs/architecture.md."""
    assert {part for part, _ in modules()} == set(MAY_IMPORT)


@pytest.mark.parametrize(("part", "path"), [pytest.param(*found, id=found[1].name) for found in modules()])
def test_imports_point_downwards(part: str, path: Path) -> None:
    """Stages do not import one another, commands never each other, and nothing imports what stands above it."""
    ours = {name.split(".")[1] for name in imports(path) if name.startswith("pipeline.")}

    assert set() == ours - MAY_IMPORT[part] - {part, "carried", "__version__"}


@pytest.mark.parametrize(("part", "path"), [pytest.param(*found, id=found[1].name) for found in modules()])
def test_foreign_worlds_stay_behind_their_edge(part: str, path: Path) -> None:
    """A library that speaks to a foreign world is imported in one part only."""
    strangers = {name.split(".")[0] for name in imports(path)}

    assert set() == {name for name in strangers if part not in ONLY_IN.get(name, {part})}
