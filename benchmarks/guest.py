"""Runs inside a guest: what a traced bind costs there, tier by tier, by our tracer and by bpftrace on the same hooks.

``python3 -m benchmarks.guest ROUNDS CALLS TIER…``, as root. Out: one line of JSON, ``{"fexit": {"fail": {"untraced":
[…], "ours": […], "bpftrace": […]}, "ok": {…}}, …}``, nanoseconds of CPU a call and one figure a round; ``lost`` beside
the tiers is how many lines bpftrace says it lost at most. Progress on standard error.

The guest's second CPU is switched off: where a guest's clock counts instructions, what happens on one CPU would else
be charged to the other.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from pipeline.tracer import open_tracer

HERE = Path(__file__).parent
MODES = ("fail", "ok")
PER_SEC = 2_000

Measured = dict[str, float]
"""By mode: CPU of a call, ns."""


class Failed(Exception):
    """A measurement that cannot be made; the sentence says why."""


def main(rounds: int, calls: int, *tiers: str) -> None:
    """Every contestant once a round, in turn."""
    load = _load(calls)
    subprocess.run(["mount", "-t", "debugfs", "debugfs", "/sys/kernel/debug"], check=True)
    subprocess.run(["mount", "-t", "tracefs", "tracefs", "/sys/kernel/tracing"], check=True)
    Path("/sys/devices/system/cpu/cpu1/online").write_text("0", encoding="ascii")
    lost: list[int] = []
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for tier in tiers:
        contestants: dict[str, Callable[[], Measured]] = {
            "untraced": lambda: _of(_run(load)),
            "ours": lambda tier=tier: _ours(load, tier, calls),  # type: ignore[misc]
            "bpftrace": lambda tier=tier: _bpftrace(load, tier, lost),  # type: ignore[misc]
        }
        found[tier] = {mode: {who: [] for who in contestants} for mode in MODES}
        for number in range(rounds):
            for who, measure in contestants.items():
                for mode, value in measure().items():
                    found[tier][mode][who].append(value)
                    print(f"{tier}, round {number + 1} of {rounds}: {who} {mode} {value:.0f}", file=sys.stderr)
    print(json.dumps({**found, "lost": max(lost, default=0)}))


def _load(calls: int) -> list[str]:
    """A command that binds in every mode, one after the other: bpftrace takes long to start in a guest."""
    path = Path("/tmp/load")
    lines = (f"{HERE}/bindload --mode {mode} --count {calls} --rate {PER_SEC}\n" for mode in MODES)
    path.write_text("".join(lines), encoding="ascii")
    # bpftrace runs nothing but an ELF file, by its whole path.
    return ["/usr/bin/busybox", "sh", str(path)]


def _of(said: str) -> Measured:
    values = [float(value) for value in re.findall(r"cpu_ns_per_call=(\d+)", said)]
    if len(values) != len(MODES):
        raise Failed(f"the load said {said!r}")
    return dict(zip(MODES, values, strict=True))


def _run(command: list[str]) -> str:
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def _ours(load: list[str], tier: str, calls: int) -> Measured:
    tracer = open_tracer(tier)
    seen = 0
    try:
        with subprocess.Popen(load, stdout=subprocess.PIPE, text=True) as binding:
            while binding.poll() is None:
                burst = tracer.read(0.05)
                if burst is not None:
                    seen += len(burst.records)
                    tracer.release(burst)
            assert binding.stdout is not None
            said = binding.stdout.read()
    finally:
        tracer.close()
    if seen < 2 * calls:
        raise Failed(f"the tier {tier} has seen {seen} of {2 * calls} binds")
    return _of(said)


def _bpftrace(load: list[str], tier: str, lost: list[int]) -> Measured:
    command = ["bpftrace", "-o", "/tmp/binds", "-c", " ".join(load), str(HERE / f"bind-{tier}.bt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "ns_per_call" not in done.stdout:
        raise Failed(f"bpftrace does not run bind-{tier}.bt here: {done.stderr.strip()[-2000:]}")
    lost.append(sum(int(count) for count in re.findall(r"Lost (\d+) events", done.stderr)))
    return _of(done.stdout)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
