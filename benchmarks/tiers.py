"""Every tier beside bpftrace on the same hooks, in guests: this machine's own kernel may have but one of them.

In: kernels that ``tests.kernel.guests`` knows. Out: a ``Result`` a tier. A guest is emulated, so its times say nothing;
its clock is made to count instructions instead (``-icount``), and they are the same in every run, whatever else the
machine does. What they do not show is what it takes to wake a reader, which is most of what bpftrace costs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.guest import MODES
from benchmarks.measure import Failed, Result, Say, Spread, ratios
from tests.kernel import guests

HERE = Path(__file__).parent
KERNELS = ("6.12", "6.18")
TIERS = ("fexit", "kprobe", "tracepoint")
CALLS = 1000
TIMEOUT_SECS = 900.0

_COUNT_INSTRUCTIONS = ("-icount", "shift=0,sleep=off")

_Found = dict[str, dict[str, list[float]]]
"""By mode and contestant: instructions of a call, one figure a round."""


def beside_bpftrace(rows: Sequence[str], rounds: int, say: Say) -> Iterator[tuple[str, Result]]:
    """A row ``tier-NAME`` each: what a failing bind takes more, and what socket, bind and close take more."""
    tiers = [row.removeprefix("tier-") for row in rows]
    found = {kernel: _measured(kernel, tiers, rounds, say) for kernel in KERNELS}
    for tier in tiers:
        of_tier: dict[str, _Found] = {kernel: measured[tier] for kernel, measured in found.items()}
        shares = [_ratio(modes[mode]) for modes in of_tier.values() for mode in MODES]
        lost = max(measured["lost"] for measured in found.values())
        yield (
            f"tier-{tier}",
            Result(
                _by_kernel(of_tier, lambda modes, mode: _thousands(_added(modes[mode], "ours"))),
                _by_kernel(of_tier, lambda modes, mode: _thousands(_added(modes[mode], "bpftrace"))),
                _by_kernel(of_tier, lambda modes, mode: _ratio(modes[mode]).text(_percent)),
                all(share.high < 1 for share in shares),
                f"counted by the emulator; {CALLS:,} calls a run, {rounds} rounds, of which "
                f"bpftrace lost {lost:,} lines at most",
            ),
        )


def _measured(kernel: str, tiers: Sequence[str], rounds: int, say: Say) -> dict[str, Any]:
    """What ``benchmarks.guest`` prints in this guest."""
    files = {f"bindsnoop/benchmarks/{name}": (HERE / name).read_bytes() for name in ("__init__.py", "guest.py")}
    files["bindsnoop/benchmarks/bindload"] = (HERE / "bindload").read_bytes()
    for tier in tiers:
        files[f"bindsnoop/benchmarks/bind-{tier}.bt"] = script(tier, kernel)
    job = ["python3", "-m", "benchmarks.guest", str(rounds), str(CALLS), *tiers]
    try:
        done = guests.run(
            job, kernel=kernel, extra_debs=["bpftrace"], files=files, timeout_s=TIMEOUT_SECS, qemu=_COUNT_INSTRUCTIONS
        )
    except guests.GuestFailed as error:
        raise Failed(str(error)) from error
    *talk, last = done.stdout.strip().splitlines()
    if done.returncode:
        raise Failed(f"in the guest with Linux {kernel} the tiers cannot be measured: {done.stdout.strip()[-2000:]}")
    for line in talk:
        say(f"Linux {kernel}: {line}")
    return dict(json.loads(last))


def script(tier: str, kernel: str) -> bytes:
    """The script of bpftrace for a tier, in the words of a kernel: the field had another name before Linux 6.15."""
    text = (HERE / f"bind-{tier}.bt").read_bytes()
    return text if tuple(map(int, kernel.split("."))) >= (6, 15) else text.replace(b"->__parent", b"->parent")


def _added(found: dict[str, list[float]], who: str) -> list[float]:
    return [one - bare for one, bare in zip(found[who], found["untraced"], strict=True)]


def _ratio(found: dict[str, list[float]]) -> Spread:
    return ratios(_added(found, "ours"), _added(found, "bpftrace"))


def _thousands(added: list[float]) -> str:
    return f"+{Spread.of(added).median / 1000:.1f} k"


def _percent(share: float) -> str:
    return f"{share:.0%}"


def _by_kernel(found: dict[str, _Found], shown: Callable[[_Found, str], str]) -> str:
    return "; ".join(
        f"Linux {kernel} {' and '.join(shown(modes, mode) for mode in MODES)}" for kernel, modes in found.items()
    )
