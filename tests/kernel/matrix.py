"""The corner-case suite in other kernels: which to run goes in, a report for each kernel and tier comes out.

``reports`` boots one guest and runs the suite there for all its tiers in one process, so that the packages are
imported once; ``tests/kernel/plugin.py``, which runs inside, says at the end what each tier passed and saw.
"""

from __future__ import annotations

import json
import platform
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.kernel import guests

SUITE = ("tests/test_binds.py", "tests/test_missed.py")
PRIVILEGES = tuple(
    f"tests/test_probe.py::test_{name}"
    for name in (
        "the_user_is_an_ordinary_one",
        "exactly_the_capabilities_that_are_named_are_enough",
        "one_capability_fewer_is_said",
        "the_administrators_capability_stands_for_all",
    )
)
PINS = tuple(
    f"tests/test_pins.py::test_{name}"
    for name in (
        "whether_a_tier_can_be_pinned",
        "what_is_bound_while_no_agent_lives_waits",
        "another_version_takes_over",
        "detaching_ends_the_epoch",
        "unpinning_leaves_nothing",
    )
)
BCC_SUITE = (*SUITE, "tests/test_bcc.py")
"""Without the privileges: each look would compile, which takes a minute there."""

BCC_DEBS = ("python3-bpfcc",)

TIERS = ("fexit", "kprobe", "tracepoint")
"""Tiers of the CO-RE object, best first."""

PLACES: tuple[tuple[str, str], ...] = (
    *((series, "x86_64") for series in guests.SUITES),
    ("6.1", "aarch64"),
    ("7.3", "aarch64"),
)
"""Kernel series and architecture of each guest."""

BCC_PLACE = ("6.1", "x86_64")
"""Where tier bcc runs: the kernel of the suite that the root image, and so its bcc, comes from."""

TIMEOUT_S = 900.0
"""An emulated kernel on a busy machine is slow; a healthy one needs a tenth of this. With bcc twice as long, for it
compiles for half a minute each time.
"""


_AGENT = b"""#!/usr/bin/python3
import sys
sys.path.insert(0, "/bindsnoop")
from pipeline.agent import main
sys.exit(main())
"""


def tiers_of(series: str, arch: str) -> tuple[str, ...]:
    """CO-RE tiers that this kernel must be able to run."""
    # arm64 has trampolines for fexit since 6.4.
    return TIERS[1:] if arch == "aarch64" and _number(series) < (6, 4) else TIERS


def _number(series: str) -> tuple[int, ...]:
    return tuple(int(part) for part in series.split("."))


@dataclass(frozen=True)
class Report:
    """What one tier did in one guest.

    ``skipped`` is how many cases could not be made there, by reason. ``load_s`` is what loading and attaching took in
    the guest, None when the tier could not be opened. ``broken`` is what pytest printed of the failures, empty when
    all passed.
    """

    release: str
    version: str
    arch: str
    tier: str
    passed: int
    failed: int
    skipped: Counter[str]
    events: int
    load_s: float | None
    broken: str

    @property
    def well(self) -> bool:
        """Whether cases ran, all of them passed, and events came."""
        return not self.broken and not self.failed and self.passed > 0 and self.events > 0


def reports(
    series: str, arch: str, tiers: Sequence[str], *, bcc: bool = False, privileges: bool = True
) -> list[Report]:
    """Runs the suite for these tiers, in one boot; a report each. GuestFailed when the guest breaks.

    ``bcc`` gives the guest bcc and the headers of its kernel, and adds the tests of bcc itself. ``privileges`` adds
    what an ordinary user may do, which takes two minutes more.
    """
    job = ["python3", "-m", "pytest", "--noconftest", "-p", "tests.kernel.plugin", "--color=no", "--tb=short"]
    job += ["-o", f"timeout={TIMEOUT_S / 2:g}"]
    job += [word for tier in tiers for word in ("--tier", tier)]
    job += BCC_SUITE if bcc else (*SUITE, *PINS, *PRIVILEGES) if privileges else (*SUITE, *PINS)
    result = guests.run(
        job,
        kernel=series,
        arch=arch,
        extra_debs=BCC_DEBS if bcc else (),
        headers=bcc,
        files={**built(arch), "usr/bin/bindsnoop-agent": _AGENT},
        timeout_s=2 * TIMEOUT_S if bcc else TIMEOUT_S,
    )
    said = {
        line["tier"]: line for line in map(json.loads, re.findall(r"^@@bindsnoop (.*)$", result.stdout, re.MULTILINE))
    }
    broken = re.sub(r"^@@bindsnoop .*\n", "", result.stdout, flags=re.MULTILINE) if result.returncode else ""
    found = []
    for tier in tiers:
        line = said.get(tier, {"passed": 0, "failed": 0, "skipped": [], "events": 0, "load_s": None})
        found.append(
            Report(
                release=result.release,
                version=result.version,
                arch=arch,
                tier=tier,
                passed=line["passed"],
                failed=line["failed"],
                skipped=Counter(reason for _, reason in line["skipped"]),
                events=line["events"],
                load_s=line["load_s"],
                broken=broken if line["failed"] or tier not in said else "",
            )
        )
    # Tests that belong to no tier may have failed, or the run may have ended early.
    if broken and all(report.well for report in found):
        found[-1] = Report(**{**vars(found[-1]), "broken": broken})
    return found


def built(arch: str) -> dict[str, bytes]:
    """What a guest needs and cannot build itself, made from this source: the BPF object, and the processes that bind by
    every way, for this architecture. GuestFailed when a compiler is missing.
    """
    compilers = {"oddbind": "cc" if arch == platform.machine() else f"{arch}-linux-gnu-gcc"}
    if arch == "aarch64":
        # A 64-bit process on arm64 has no way into the 32-bit system calls; on x86-64 it has.
        compilers["oddbind32"] = "arm-linux-gnueabihf-gcc"
    _make("-C", str(guests.ROOT / "bpf"))
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        for name, compiler in compilers.items():
            guests.needs(compiler, *_COMPILERS.get(compiler, ("gcc", "libc6-dev")))
            _make("-C", str(guests.HERE), f"CC={compiler}", f"OUT={temporary}/{name}")
            found[f"bindsnoop/tests/kernel/{name}"] = (Path(temporary) / name).read_bytes()
    return found


_COMPILERS = {
    "aarch64-linux-gnu-gcc": ("gcc-aarch64-linux-gnu", "libc6-dev-arm64-cross"),
    "arm-linux-gnueabihf-gcc": ("gcc-arm-linux-gnueabihf", "libc6-dev-armhf-cross"),
    "x86_64-linux-gnu-gcc": ("gcc-x86-64-linux-gnu", "libc6-dev-amd64-cross"),
}
"""Packages of Debian that give a compiler for another architecture."""


def _make(*words: str) -> None:
    done = subprocess.run(["make", "-s", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise guests.GuestFailed(f"make {' '.join(words)} failed: {(done.stdout + done.stderr).strip()}")


def table(found: Sequence[Report]) -> str:
    """Markdown: a row a kernel, architecture and tier, and below it what could not be made where."""
    lines = [
        "Written by `make test-kernels`: each kernel is Debian's, in QEMU without hardware acceleration, with the "
        "corner-case suite running in it for every tier. Load is what loading and attaching took there, a few times "
        "what it takes on hardware.",
        "",
        "| kernel | architecture | tier | cases passed | events seen | load time |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    reasons: dict[tuple[str, str], Counter[str]] = {}
    for report in found:
        skips = reasons.setdefault((report.release, report.arch), Counter())
        skips |= report.skipped
        cases = f"{report.passed} of {report.passed + report.failed}" if report.load_s is not None else "does not open"
        load = f"{report.load_s:.2f} s" if report.load_s is not None else ""
        lines.append(
            f"| {report.release} | {report.arch} | {report.tier} | {cases}{'' if report.well else ' **failed**'} | "
            f"{report.events:,} | {load} |"
        )
    if any(reasons.values()):
        lines += ["", "Cases that could not be made, because the kernel has not got what they need:", ""]
    for (release, arch), skips in reasons.items():
        if skips:
            texts = [f"{reason} ({count})" for reason, count in sorted(skips.items())]
            lines.append(f"* {release}, {arch}: {'; '.join(texts)}")
    return "\n".join(lines)


def merged(before: str, found: str) -> str:
    """A table with the rows and remarks of a run that was not of everything in place of its own of the same series."""
    fresh = {key: line for line in found.splitlines() if (key := _key(line))}
    there = {_key(line) for line in before.splitlines()}
    lacking = [", ".join(key) for key in fresh if key not in there and len(key) == 3]
    if lacking:
        raise guests.GuestFailed(f"the table has no row of {lacking[0]}; write a whole one by `make test-kernels`")
    return "\n".join(fresh.get(_key(line), line) for line in before.splitlines())


def _key(line: str) -> tuple[str, ...]:
    """Series, architecture and tier of a row; series and architecture of a remark; nothing of another line."""
    match = re.match(r"(?:\| |\* )(\d+\.\d+)\.[^ ,|]*(?: \||,) (\w+)(?: \| (\w+) \||:)", line)
    return tuple(part for part in match.groups() if part) if match else ()
