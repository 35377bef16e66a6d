"""Imports point downwards only: commands → paths → edges and stages → words (docs/architecture.md)."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "pipeline"

WORDS = {"event", "chain", "errors"}
STAGES = {"records", "enrich", "delay", "testimony", "verification", "avro", "dedup", "select", "render"}
EDGES = {"tracer", "workloads", "archive", "sort", "spool", "topic", "registry", "keys"}
AROUND = {"config", "completion", "telemetry"}
PATHS = {"copying"}
COMMANDS = {"agent", "replay", "live"}

MAY_IMPORT = {
    **dict.fromkeys(WORDS | STAGES | EDGES, WORDS),
    "spool": WORDS | {"archive"},
    **dict.fromkeys(AROUND, WORDS | AROUND),
    **dict.fromkeys(PATHS, WORDS | STAGES | EDGES),
    **dict.fromkeys(COMMANDS, WORDS | STAGES | EDGES | AROUND | PATHS),
}

IN_TRACER = {
    "coverage": set(),
    "host": set(),
    "pins": {"host"},
    "ring": {"__init__"},
    "perf_buffer": {"__init__", "host"},
    "libbpf": {"__init__", "coverage", "host", "pins", "ring"},
    "bcc": {"__init__", "coverage", "host", "perf_buffer", "pins"},
    "probe": {"__init__", "bcc", "coverage", "host", "libbpf", "pins"},
    "__init__": {"libbpf", "bcc", "pins"},
}
"""What each module of the tracer may import of the others."""

ONLY_IN = {
    "confluent_kafka": {"topic"},
    "tenacity": {"topic"},
    "kubernetes": {"workloads"},
    "bcc": {"tracer"},
    "ctypes": {"tracer", "archive"},
    "pyruhvro": {"avro", "event"},
    "fastavro": {"avro", "archive"},
    "cryptography": {"keys"},
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


def test_sources_of_names_do_not_know_one_another() -> None:
    """Each module of the workloads knows their common part and no other of them."""
    for path in (PACKAGE / "workloads").glob("*.py"):
        others = {name.split(".")[2] for name in imports(path) if name.startswith("pipeline.workloads.")}
        modules = {other.stem for other in path.parent.glob("*.py")} - {"__init__"}

        assert path.stem == "__init__" or set() == others & modules


def test_modules_of_the_tracer_have_their_place() -> None:
    """Loaders do not know each other, what they share does not know them, and nobody knows the probe."""
    found = {
        path.stem: {
            module if (module := name.split(".")[2]) in IN_TRACER else "__init__"
            for name in imports(path)
            if name.startswith("pipeline.tracer.")
        }
        for path in (PACKAGE / "tracer").glob("*.py")
    }

    assert set(found) == set(IN_TRACER)
    assert {name: used - IN_TRACER[name] for name, used in found.items()} == {name: set() for name in IN_TRACER}


def test_every_module_is_on_the_map() -> None:
    """docs/architecture.md names each module of the package, and each of the tracer and the workloads."""
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = {name.removesuffix(".py").rpartition("/")[2] for name in re.findall(r"`([\w./]+)`", page)}

    inside = [path for folder in ("tracer", "workloads") for path in (PACKAGE / folder).glob("*.py")]
    assert set() == {path.stem for path in (*PACKAGE.glob("*.py"), *inside)} - named


@pytest.mark.parametrize(("part", "path"), [pytest.param(*found, id=found[1].name) for found in modules()])
def test_foreign_worlds_stay_behind_their_edge(part: str, path: Path) -> None:
    """A library that speaks to a foreign world is imported in one part only."""
    strangers = {name.split(".")[0] for name in imports(path)}

    assert set() == {name for name in strangers if part not in ONLY_IN.get(name, {part})}
