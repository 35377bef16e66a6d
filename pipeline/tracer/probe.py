"""What this host lets a tracer see: every tier is really opened, and closed again.

In: nothing but the host. Out: a ``Report``, and what it is printed as. Neither a version nor a configuration of the
kernel is asked: whether a tier works is known when its programs are attached. Nothing is recorded, no lock is taken,
and an agent that runs beside it goes on undisturbed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from pipeline.errors import TracerUnavailable
from pipeline.event import one_line
from pipeline.tracer import PINS, TIERS, coverage, host, open_tracer

if TYPE_CHECKING:
    from pipeline.tracer import Tracer

_RING_BYTES: Final = 1 << 16
_COMPILER_BYTES: Final = 256 << 20
_LOCKED_BYTES: Final = 32 << 20  # enough for the default ring and all maps
_CAP_BPF: Final = 39  # since Linux 5.8

_GOES_ON: Final = "goes on: what is bound until the next agent has started waits in the ring"
_BLIND: Final = "blind until the next agent has started"


class Finding(NamedTuple):
    """What became of opening one tier.

    ``refusal`` is the sentence it ended with, None when it was attached; ``load_ms`` is how long either took.
    ``blind`` is why nothing is seen while the agent restarts, None when something is, and when it was refused.
    ``capabilities`` are the least that this tier needs here for all its hooks, and ``lacking`` those of them that this
    process does not have. ``gaps`` are names of ``coverage.GAPS``: of the tracer as it was attached, of the tier at its
    best when it was refused.
    """

    tier: str
    refusal: str | None
    load_ms: float
    hooks: tuple[str, ...]
    notes: tuple[str, ...]
    gaps: tuple[str, ...]
    capabilities: tuple[str, ...]
    lacking: tuple[str, ...]
    blind: str | None = None

    @property
    def restart(self) -> str | None:
        """What a restart of the agent means, as a sentence; None when it was refused."""
        if not self.works:
            return None
        return _GOES_ON if self.blind is None else f"{_BLIND}: {self.blind}"

    @property
    def works(self) -> bool:
        """Whether it was attached."""
        return self.refusal is None


class Report(NamedTuple):
    """What was found on this host: ``findings`` best tier first, ``chosen`` the one that ``asked`` leads to.

    ``asked`` is ``auto`` or a tier; ``chosen`` is None when that does not work.
    """

    kernel: str
    architecture: str
    asked: str
    chosen: str | None
    findings: tuple[Finding, ...]


def report(asked: str = "auto", place: Path | None = PINS) -> Report:
    """Opens every tier, one after the other, pins it below ``place``, unless that is None, and takes it away again."""
    # What is loaded once for all tiers is not the first one's time.
    from pipeline.tracer import libbpf  # noqa: F401

    # Asked before anything is loaded, for libbpf raises the limit where it may.
    locks_memory = _locks_memory()
    findings = tuple(_find(tier, _capabilities(tier, locks_memory=locks_memory), place) for tier in TIERS)
    chosen = next((found.tier for found in findings if found.works and asked in ("auto", found.tier)), None)
    system = os.uname()
    return Report(system.release, system.machine, asked, chosen, findings)


def _find(tier: str, needed: tuple[str, ...], place: Path | None) -> Finding:
    at_best = coverage.of_tracepoints(post_bind=True) if tier == "tracepoint" else coverage.of_functions(())
    found = Finding(tier, None, 0.0, (), (), at_best, needed, tuple(host.missing_capabilities(*needed)))
    refusal = _no_room_to_compile() if tier == "bcc" else None
    if refusal is not None:
        return found._replace(refusal=refusal)
    begun = time.monotonic()
    try:
        tracer = open_tracer(tier, ring_bytes=_RING_BYTES)
    except TracerUnavailable as refused:
        return found._replace(refusal=one_line(str(refused)), load_ms=_ms_since(begun))
    with contextlib.closing(tracer):
        return found._replace(
            load_ms=_ms_since(begun),
            blind=_why_blind(tracer, place),
            hooks=tuple(tracer.hooks),
            notes=tuple(one_line(note) for note in tracer.notes),
            gaps=tuple(tracer.gaps),
        )


def _why_blind(tracer: Tracer, place: Path | None) -> str | None:
    """Why nothing of it could be kept beyond the end of its process, None when all was kept for a moment."""
    from pipeline.tracer import bcc, libbpf, pins

    if place is None:
        return "nothing is to be pinned (--pins none)"
    if not isinstance(tracer, libbpf.LibbpfTracer):
        return bcc.NO_PINS
    try:
        # Beside an agent that lives on it.
        with pins.opened(place, alone=False) as there:
            tracer.try_to_pin(there)
    except pins.NoPins as refused:
        return one_line(str(refused))
    return None


def _ms_since(begun: float) -> float:
    return (time.monotonic() - begun) * 1000


def _capabilities(tier: str, *, locks_memory: bool) -> tuple[str, ...]:
    """The least that a tier needs on this host for all its hooks, without ``CAP_``."""
    needed = host.loading_capabilities(tier)
    if tier == "tracepoint" and "SYS_ADMIN" not in needed:
        needed = (*needed, "NET_ADMIN")
    return (*needed, "SYS_RESOURCE") if locks_memory else needed


def _locks_memory() -> bool:
    """Whether maps count as locked memory, as before Linux 5.11, of which a process may not have enough."""
    found = re.match(r"(\d+)\.(\d+)", os.uname().release)
    old = found is not None and (int(found[1]), int(found[2])) < (5, 11)
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return old and limit != resource.RLIM_INFINITY and limit < _LOCKED_BYTES


def _no_room_to_compile() -> str | None:
    """Why bcc must not be tried: beyond its memory limit a container is ended whole, an agent in it too."""
    tree = Path("/sys/fs/cgroup")
    limits = {"memory": ("memory.limit_in_bytes", "memory.usage_in_bytes"), "": ("memory.max", "memory.current")}
    for line in Path("/proc/self/cgroup").read_text(encoding="utf-8", errors="replace").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in limits:
            continue
        # In a container what is mounted is its own cgroup, whatever that is called outside.
        for folder in (tree / controllers / path.lstrip("/"), tree / controllers):
            try:
                limit, used = ((folder / name).read_text(encoding="ascii").strip() for name in limits[controllers])
            except OSError:
                continue
            if limit != "max" and int(limit) - int(used) < _COMPILER_BYTES:
                return (
                    f"it was not tried, for the compiler takes up to {_COMPILER_BYTES >> 20} MiB and the memory limit "
                    f"of {int(limit) >> 20} MiB in {folder} has {(int(limit) - int(used)) >> 20} MiB left; raise it"
                )
    return None


# --- what is printed ----------------------------------------------------------------------------------------------

_WIDTH: Final = 100
_LABEL: Final = 10


def as_text(report: Report) -> str:
    """For people: the choice first, then a block for each tier; lines of at most 100 characters.

    What a name of a gap means is written out for the tier that is chosen.
    """
    where = f"this host (Linux {report.kernel}, {report.architecture})"
    if report.chosen:
        first = f"{report.chosen} is what --tracer {report.asked} uses on {where}."
    elif report.asked == "auto":
        first = f"No tracer works on {where}."
    else:
        first = f"{report.asked}, which --tracer asks for, does not work on {where}."
    blocks = [_filled(first, 0)]
    for found in report.findings:
        how = "works, attached in" if found.works else "does not work, refused in"
        lines = [f"{found.tier}: {how} {found.load_ms:.0f} ms"]
        if found.refusal is not None:
            lines += _row("why", [found.refusal])
        lines += _row("hooks", [", ".join(found.hooks)] if found.hooks else [])
        lines += _row("note", found.notes)
        names = ", ".join(f"CAP_{name}" for name in found.capabilities)
        lacking = ", ".join(f"CAP_{name}" for name in found.lacking)
        lines += _row("needs", [names + (f"; this process lacks {lacking}" if lacking else "")])
        lines += _row("restart", [found.restart] if found.restart else [])
        if found.tier == report.chosen:
            lines += _row("misses", [f"{name}: {coverage.GAPS[name]}" for name in found.gaps])
        else:
            lines += _row("misses", [", ".join(found.gaps)])
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def _row(label: str, texts: list[str] | tuple[str, ...]) -> list[str]:
    rows = [_filled(text, _LABEL) for text in texts]
    return [f"  {label:{_LABEL - 2}}{rows[0][_LABEL:]}", *rows[1:]] if rows else []


def _filled(text: str, indent: int) -> str:
    return textwrap.fill(
        text, _WIDTH, initial_indent=" " * indent, subsequent_indent=" " * indent,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def as_json(report: Report) -> str:
    """The same as one JSON object in one line; docs/tracing.md lists its keys."""
    tiers = [
        {
            "tier": found.tier,
            "works": found.works,
            "why_not": found.refusal,
            "load_ms": round(found.load_ms, 1),
            "hooks": found.hooks,
            "notes": found.notes,
            "capabilities": found.capabilities,
            "lacking": found.lacking,
            "blind_on_restart": found.blind is not None if found.works else None,
            "restart": found.restart,
            "gaps": {name: coverage.GAPS[name] for name in found.gaps},
        }
        for found in report.findings
    ]
    whole = {
        "kernel": report.kernel,
        "architecture": report.architecture,
        "asked": report.asked,
        "chosen": report.chosen,
        "tiers": tiers,
    }
    return json.dumps(whole, ensure_ascii=False) + "\n"
