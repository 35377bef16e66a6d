"""bindsnoop: who bound which port, on every node, for years.

The map of this package is docs/architecture.md.
"""

from __future__ import annotations

from pathlib import Path

__version__ = "0.1.0"


def carried(name: str) -> Path:
    """Path of a file that travels with the package but is built outside it.

    ``name`` is relative to the repository, such as ``schemas/bind_event.avsc`` or ``bpf/bindsnoop.bpf.o``. A wheel
    carries these below ``pipeline/carried/``; a checkout has them beside ``pipeline/``.
    """
    here = Path(__file__).parent
    inside = here / "carried" / name
    return inside if inside.exists() else here.parent / name
