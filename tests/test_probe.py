"""What a host lets the agent see: ``bindsnoop-agent --probe``, the capabilities it names, hosts that lack something.

Hosts that lack something are made of this one in a mount namespace of their own. Whoever looks there is an ordinary
user, with exactly the capabilities that a test says.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import TracerUnavailable
from pipeline.tracer import TIERS, coverage, libbpf, open_tracer, probe
from tests.commands import BIN, agent_running, bpffs, environment, replay, run, until
from tests.kernel.plugin import build

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="tracing needs root")

Json = dict[str, Any]

HAS_KPROBES = b" register_kprobe\n" in Path("/proc/kallsyms").read_bytes()
NO_KPROBES = "this kernel has no kprobes (it is built without CONFIG_KPROBE_EVENTS)"


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    """The BPF object of this source."""
    build()


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder in a bpffs of this test's own, which every process of this user can reach."""
    with bpffs() as folder:
        yield folder


def probed(*argv: str, **extra: str) -> tuple[int, Json]:
    """Exit code of a probe, and what it says as JSON."""
    done = run("bindsnoop-agent", "--probe", "-o", "json", *argv, **extra)
    assert done.err == ""
    return done.code, json.loads(done.out)


def opened(tier: str) -> tuple[tuple[str, ...], tuple[str, ...], str | None]:
    """Hooks and gaps of a tier that is opened here, and the sentence that it is refused with."""
    try:
        tracer = open_tracer(tier, ring_bytes=1 << 16)
    except TracerUnavailable as refused:
        return (), (), str(refused)
    with contextlib.closing(tracer):
        return tuple(tracer.hooks), tuple(tracer.gaps), None


def section(heading: str) -> str:
    """What docs/tracing.md says under this heading."""
    page = (ROOT / "docs" / "tracing.md").read_text(encoding="utf-8")
    assert f"\n## {heading}\n" in page
    return page.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


# --- what it says -------------------------------------------------------------------------------------------------


def test_json_says_what_opening_each_tier_gives() -> None:
    """Every tier in order, with the hooks and gaps that it has when it is opened, or the sentence why it is not."""
    code, said = probed()

    tiers = said["tiers"]
    assert [tier["tier"] for tier in tiers] == list(TIERS)
    for tier in tiers:
        hooks, gaps, refusal = opened(tier["tier"])
        assert (tier["hooks"], tier["works"], tier["why_not"]) == (list(hooks), refusal is None, refusal)
        assert tier["gaps"] == {name: coverage.GAPS[name] for name in gaps or tier["gaps"]}
        assert set(coverage.EVERYWHERE) <= set(tier["gaps"])
        if tier["works"]:
            assert tier["blind_on_restart"] == tier["restart"].startswith("blind")
        else:
            assert (tier["blind_on_restart"], tier["restart"]) == (None, None)
        assert 0 <= tier["load_ms"] < 60_000
        assert tier["lacking"] == []
    with contextlib.closing(open_tracer()) as tracer:
        assert (code, said["asked"], said["chosen"]) == (0, "auto", tracer.name)
    assert (said["kernel"], said["architecture"]) == (os.uname().release, os.uname().machine)


def test_every_key_is_documented() -> None:
    """docs/tracing.md has a row for each key of the object, and of what it says of a tier."""
    _, said = probed()

    documented = re.findall(r"^\| `([a-z_]+)` \|", section("Keys"), re.MULTILINE)
    assert documented == [*said, *said["tiers"][0]]


def test_every_gap_is_documented() -> None:
    """docs/tracing.md explains each name in the words of the program."""
    assert dict(re.findall(r"^\| `([a-z_-]+)` \| (.+?) \|", section("Gaps"), re.MULTILINE)) == coverage.GAPS


def test_text_is_for_people() -> None:
    """The choice is the first line, then there is a block a tier; nothing is wider than 100 characters."""
    done = run("bindsnoop-agent", "--probe")
    first, *blocks = done.out.rstrip("\n").split("\n\n")

    with contextlib.closing(open_tracer()) as tracer:
        assert first.startswith(f"{tracer.name} is what --tracer auto uses on this host (Linux {os.uname().release}")
        chosen = blocks[TIERS.index(tracer.name)]
        assert all(f"{name}: {coverage.GAPS[name][:20]}" in chosen for name in tracer.gaps)
        assert all(hook in chosen for hook in tracer.hooks)
    assert (done.code, done.err) == (0, "")
    assert [block.partition(":")[0] for block in blocks] == list(TIERS)
    for block in blocks:
        labels = [line[2:10].strip() for line in block.splitlines()[1:] if line[2:10].strip()]
        assert labels in (["hooks", "needs", "restart", "misses"], ["why", "needs", "misses"])
    assert max(map(len, done.out.splitlines())) <= 100


def test_whether_a_restart_is_blind_is_found_by_pinning(place: Path) -> None:
    """In a bpffs a tier's links are really pinned, and nothing stays; elsewhere the sentence says what is missing."""
    there = {tier["tier"]: tier for tier in probed("--pins", str(place))[1]["tiers"] if tier["works"]}
    elsewhere = {tier["tier"]: tier for tier in probed("--pins", "/proc/x")[1]["tiers"] if tier["works"]}
    never = {tier["tier"]: tier for tier in probed("--pins", "none")[1]["tiers"] if tier["works"]}

    for name in there:
        with contextlib.closing(open_tracer(name, pins=place, epoch="0" * 16)) as tracer:
            assert there[name]["blind_on_restart"] is not tracer.pinned
            tracer.detach()
        assert (elsewhere[name]["blind_on_restart"], never[name]["blind_on_restart"]) == (True, True)
        if name != "bcc":
            assert "blind until the next agent has started: /proc/x is in no bpffs; mount" in elsewhere[name]["restart"]
            assert never[name]["restart"].endswith("nothing is to be pinned (--pins none)")
    assert list(place.iterdir()) == []


def test_a_kernel_that_pins_no_links_is_found_out(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel answers when a link is pinned is the reason that is given, whatever version it is."""
    real = libbpf._pin

    def refuse(descriptor: int, path: Path) -> None:
        with Path(os.devnull).open("rb") as nothing:
            real(nothing.fileno() if path.name.startswith("link_") else descriptor, path)

    monkeypatch.setattr(libbpf, "_pin", refuse)
    for found in probe.report(place=place).findings:
        if found.works and found.tier != "bcc":
            assert found.restart is not None
            assert found.restart.startswith(
                "blind until the next agent has started: the kernel does not pin a link as "
            )
    assert list(place.iterdir()) == []


def test_a_probe_beside_an_agent_that_is_pinned(place: Path) -> None:
    """The agent's own pins stay as they are, and what it records is its own."""
    with contextlib.closing(open_tracer(pins=place, epoch="0" * 16)) as tracer:
        before = [path.name for path in place.iterdir()]
        code, said = probed("--pins", str(place))
        assert (code, [path.name for path in place.iterdir()]) == (0, before)
        assert not next(tier for tier in said["tiers"] if tier["tier"] == tracer.name)["blind_on_restart"]
        tracer.detach()


@pytest.mark.parametrize("name", TIERS)
def test_a_tier_that_is_asked_for(name: str) -> None:
    """With --tracer it is that one that has to work; the others are shown all the same."""
    works = opened(name)[2] is None

    code, said = probed("--tracer", name)

    assert (code, said["asked"], said["chosen"]) == ((0, name, name) if works else (2, name, None))
    assert [found["tier"] for found in said["tiers"]] == list(TIERS)


def test_without_capabilities() -> None:
    """A process that may do nothing learns from every tier which capabilities are missing; the exit code is 2."""
    ask = ["setpriv", "--bounding-set=-all", BIN / "bindsnoop-agent", "--probe"]
    text = subprocess.run(ask, capture_output=True, text=True, env=environment(), check=False)
    as_json = subprocess.run([*ask, "-o", "json"], capture_output=True, text=True, env=environment(), check=False)

    assert (text.returncode, text.stderr, as_json.returncode) == (2, "", 2)
    assert text.stdout.startswith("No tracer works on this host (Linux ")
    tiers = json.loads(as_json.stdout)["tiers"]
    assert all(tier["lacking"] == tier["capabilities"] for tier in tiers)
    for tier in tiers[:3]:
        loading = [f"CAP_{name}" for name in tier["capabilities"] if name != "NET_ADMIN"]
        there = tier["tier"] != "kprobe" or HAS_KPROBES
        assert tier["why_not"] == NO_KPROBES if not there else " and ".join(loading) in tier["why_not"]


def test_a_running_agent_is_not_disturbed(tmp_path: Path) -> None:
    """Beside an agent that holds the lock of this node a probe works, and that agent records every bind once."""
    files, lock = tmp_path / "binds", tmp_path / "agent.lock"
    ports = []
    with agent_running("--files", str(files), lock=lock) as agent:
        held = lock.read_text()
        for _ in range(3):
            ports += [bound_port(), bound_port()]
            code, _ = probed("--lock", str(lock))
            assert code == 0
        ports.append(bound_port())
        assert lock.read_text() == held == f"{agent.process.pid}\n"

    events = recorded(files)
    assert [event["port"] for event in events if event["pid"] == os.getpid()] == ports
    assert [event for event in events if event["kind"] == "loss"] == []
    assert (agent.code, re.findall("WARN|ERROR", agent.talk)) == (0, [])


def bound_port() -> int:
    """Bind a socket of this process to a free port, and let go of it."""
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        port: int = made.getsockname()[1]
        return port


def recorded(files: Path) -> list[Json]:
    """Everything in an archive, the stream's own records too."""
    done = replay("--files", files, "-i=false", "--info", "-o", "json-full")
    return [{"pid": None, **json.loads(line)} for line in done.out.splitlines()]


def test_the_start_record_says_what_is_not_seen(tmp_path: Path) -> None:
    """The pattern of docs/tracing.md finds tier, hooks and gaps in the first record of a stream."""
    patterns = re.findall(r"^    (\S.*)$", section("In the stream"), re.MULTILINE)
    with agent_running("--files", str(tmp_path)):
        pass

    start = recorded(tmp_path)[0]
    found = [re.search(pattern, start["message"]) for pattern in patterns]

    assert (start["kind"], start["pos"], len(found)) == ("start", 0, 2)
    with contextlib.closing(open_tracer()) as tracer:
        assert [match and match.groups() for match in found] == [
            (tracer.name, ", ".join(tracer.hooks)),
            (",".join(tracer.gaps),),
        ]


# --- an ordinary user ---------------------------------------------------------------------------------------------

USER = 65534

TELL = """
import contextlib, json, os, re, socket, sys
from pipeline.errors import TracerUnavailable
from pipeline.tracer import open_tracer
said = {"uids": os.getresuid(), "gids": os.getresgid(), "groups": os.getgroups()}
said["capabilities"] = int(re.search("CapEff:\\t(.*)", open("/proc/self/status").read())[1], 16)
try:
    tracer = open_tracer(sys.argv[1], ring_bytes=1 << 16)
except TracerUnavailable as refused:
    said["refusal"] = str(refused)
else:
    with contextlib.closing(tracer):
        made = socket.socket()
        made.bind(("127.0.0.1", 0))
        from pipeline import records
        events = records.decode(tracer.read(5).records, 0).to_pylist()
        said["seen"] = [event["uid"] for event in events if event["pid"] == os.getpid()]
        said |= {"hooks": tracer.hooks, "notes": tracer.notes, "gaps": tracer.gaps}
print(json.dumps(said))
"""
NUMBERS = {"NET_ADMIN": 12, "SYS_ADMIN": 21, "PERFMON": 38, "BPF": 39}


def _closed(path: Path) -> bool:
    needed = 0o005 if path.is_dir() else 0o004
    return path.stat().st_mode & needed != needed


NEEDED = {Path(sys.prefix), Path(sys.base_prefix), ROOT}


def _owners_alone() -> list[Path]:
    return [path for path in (*NEEDED, Path(sys.executable).resolve(), ROOT / "pipeline" / "agent.py") if _closed(path)]


def reachable() -> tuple[int, str]:
    """The user to be, and the shell's lines that let it reach the interpreter and the checkout in a mount namespace.

    Whatever lies in a folder that is closed to others, such as root's home, is mounted at the same path below an empty
    folder. Files that are closed themselves can be read by their owner only: then the user is root, who without
    capabilities is nobody special, and no less so than another.
    """
    if _owners_alone():
        return 0, ""
    closed = {path: [above for above in reversed(path.parents) if _closed(above)] for path in NEEDED}
    hidden = sorted(path for path, above in closed.items() if above)
    lines = [f"exec {number}<{shlex.quote(str(path))}" for number, path in enumerate(hidden, 3)]
    tops = {shlex.quote(str(closed[path][0])) for path in hidden}
    lines += [f"mount -t tmpfs -o mode=755 tmpfs {top}" for top in tops]
    for number, path in enumerate(hidden, 3):
        quoted = shlex.quote(str(path))
        lines.append(f"mkdir -p {quoted} && mount --no-canonicalize --bind /proc/self/fd/{number} {quoted}")
        lines.append(f"exec {number}<&-")
    return (USER, "\n".join(lines))


def elsewhere(
    command: Sequence[str | Path], capabilities: Sequence[str], *, host: str = ":", inside: str = ""
) -> subprocess.CompletedProcess[str]:
    """A command run by an ordinary user with these capabilities, where the shell's lines ``host`` were run before.

    ``inside`` is a command that root runs it by. Programs go by their whole path: some shells have poorer ones inside.
    """
    user, lines = reachable()
    given = ",".join(["-all", *(f"+{name.lower()}" for name in capabilities)])
    setpriv = shutil.which("setpriv")
    script = f"""set -e
        {lines}
        {host}
        exec {inside} {setpriv} --reuid {user} --regid {user} --clear-groups \\
            --inh-caps={given} --ambient-caps={given} --bounding-set={given} "$@"
    """
    return subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "sh", *command],
        capture_output=True, text=True, cwd=ROOT, env=environment(PYTHONPATH=str(ROOT)), check=False,
    )  # fmt: skip


TRACEFS = "mount -t tracefs tracefs /sys/kernel/tracing"


@pytest.fixture
def tracefs_for_a_group() -> Iterator[None]:
    """Tracefs is root's alone; here the user's group may read it. All mounts are one: afterwards it is as it was."""
    user, _ = reachable()

    def mounted(then: str) -> str:
        return subprocess.run(
            ["unshare", "-m", "sh", "-ec", f"{TRACEFS}\n{then}"], check=True, capture_output=True, text=True
        ).stdout.strip()

    before = mounted("stat -c gid=%g,mode=%a /sys/kernel/tracing")
    mounted(f"mount -o remount,gid={user},mode=750 /sys/kernel/tracing")
    yield
    mounted(f"mount -o remount,{before} /sys/kernel/tracing")


def told(tier: str, capabilities: Sequence[str], *, host: str = TRACEFS, inside: str = "") -> Json:
    """What opening a tier gives that user."""
    done = elsewhere([sys.executable, "-c", TELL, tier], capabilities, host=host, inside=inside)
    assert (done.returncode, done.stderr) == (0, "")
    said: Json = json.loads(done.stdout)
    user = reachable()[0]
    assert (said.pop("uids"), said.pop("gids"), said.pop("groups")) == ([user] * 3, [user] * 3, [])
    assert said.pop("capabilities") == sum(1 << NUMBERS[name] for name in capabilities)
    return said


@functools.cache
def needed(number: int) -> dict[str, list[str]]:
    """The capabilities that --probe names for each tier that works here, while kernel.perf_event_paranoid is so."""
    assert int(PARANOID.read_text(encoding="ascii")) == number
    return {tier["tier"]: tier["capabilities"] for tier in probed()[1]["tiers"] if tier["works"]}


PARANOID = Path("/proc/sys/kernel/perf_event_paranoid")


def levels() -> Iterator[int]:
    """kernel.perf_event_paranoid as it is, then, where the kernel is the tests' own, one that PERFMON is enough for."""
    before = PARANOID.read_text(encoding="ascii")
    yield int(before)
    if os.environ.get("TESTS_OWN_KERNEL") and int(before) > 2:
        PARANOID.write_text("2", encoding="ascii")
        try:
            yield 2
        finally:
            PARANOID.write_text(before, encoding="ascii")


def test_the_user_is_an_ordinary_one() -> None:
    """Those that follow are made by another user than root, wherever another can read this checkout."""
    if closed := _owners_alone():
        pytest.skip(f"{closed[0]} can be read by its owner alone: the following are made by root without capabilities")

    said = told(TIERS[0], [])
    assert "CAP_BPF and CAP_PERFMON" in said["refusal"]
    assert reachable()[0] == USER


# These run in the guests of tests/kernel too, for the tiers that work there.

NOTES = {
    "kprobe": [
        "of calls that wait at the same time only the first ones' ends are followed: "
        "tracefs cannot be written (Permission denied)"
    ]
}
"""What an ordinary user is told whom a group lets read tracefs: nobody but root may write there."""


@pytest.mark.usefixtures("tracefs_for_a_group")
def test_exactly_the_capabilities_that_are_named_are_enough(tier: str) -> None:
    """An ordinary user with these and no others opens the tier, with all hooks, and sees a bind."""
    hooks, gaps, _ = opened(tier)
    for number in levels():
        said = told(tier, needed(number)[tier])

        assert (number, said.pop("notes")) == (number, NOTES.get(tier, []))
        assert (number, said) == (number, {"seen": [reachable()[0]], "hooks": list(hooks), "gaps": list(gaps)})


@pytest.mark.usefixtures("tracefs_for_a_group")
def test_one_capability_fewer_is_said(tier: str) -> None:
    """Without any one of them it is refused in a sentence that names that one; only NET_ADMIN leaves but a gap."""
    gaps = opened(tier)[1]
    for number in levels():
        for missing in needed(number)[tier]:
            said = told(tier, [other for other in needed(number)[tier] if other != missing])

            if missing == "NET_ADMIN":
                (sentence,) = said["notes"]
                assert said["seen"] == [reachable()[0]]
                assert set(said["gaps"]) - set(gaps) == {"io_uring", "compat", "kernel"}
            else:
                sentence = said["refusal"]
            assert (number, re.findall("CAP_[A-Z_]+", sentence)) == (number, [f"CAP_{missing}"])
            assert f"add: [{missing}]" in sentence


# --- hosts that lack something ------------------------------------------------------------------------------------

ALL = ("BPF", "PERFMON", "NET_ADMIN")


@pytest.mark.parametrize("name", ["fexit", "kprobe", "tracepoint"])
def test_a_kernel_without_btf(name: str) -> None:
    """Where /sys/kernel/btf is empty no tier of the CO-RE object loads, and the sentence names file and option."""
    said = told(name, ALL, host=f"{TRACEFS}; mount -t tmpfs tmpfs /sys/kernel/btf")

    no_btf = (
        "this kernel has no BTF (/sys/kernel/btf/vmlinux is missing); it must be built with CONFIG_DEBUG_INFO_BTF=y"
    )
    assert said == {"refusal": NO_KPROBES if name == "kprobe" and not HAS_KPROBES else no_btf}


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        pytest.param("umount -a -t tracefs,debugfs", "none is mounted", id="not-mounted"),
        pytest.param(
            f"umount -a -t tracefs,debugfs; {TRACEFS}", "/sys/kernel/tracing: Permission denied", id="closed-to-users"
        ),
    ],
)
def test_without_tracefs(host: str, reason: str) -> None:
    """An ordinary user who can neither read nor mount tracefs is told both, and what to do."""
    if not reachable()[0] and "Permission" in reason:
        pytest.skip("the checkout is closed to others, and nothing is closed to root")

    said = told("tracepoint", ALL, host=host)

    assert f"tracepoint syscalls/sys_exit_bind ({reason}), and mounting it privately is refused" in said["refusal"]
    assert "mount the node's /sys/kernel/tracing" in said["refusal"]


def test_tracefs_is_mounted_for_a_moment(tmp_path: Path) -> None:
    """Root, who may mount, needs no tracefs in the tree, and leaves none there."""
    ask = f"umount -a -t tracefs,debugfs; {BIN / 'bindsnoop-agent'} --probe -o json; cat /proc/self/mountinfo >&2"
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", ask], capture_output=True, text=True, cwd=tmp_path, env=environment(), check=True
    )

    tiers = {tier["tier"]: tier for tier in json.loads(done.stdout)["tiers"]}
    assert tiers["tracepoint"]["why_not"] is None
    assert " - tracefs " not in done.stderr


def level(number: int) -> str:
    """Shell's lines after which kernel.perf_event_paranoid reads so; what the kernel does is the same as before."""
    return (
        f"mount -t tmpfs tmpfs /mnt; echo {number} >/mnt/level; "
        "mount --bind /mnt/level /proc/sys/kernel/perf_event_paranoid"
    )


def test_where_perf_events_are_for_the_administrator() -> None:
    """Above 2, kernel.perf_event_paranoid makes SYS_ADMIN the one capability of tiers that need perf_event_open."""
    probe = [BIN / "bindsnoop-agent", "--probe", "-o", "json"]
    needed = {
        number: {
            tier["tier"]: tier["capabilities"]
            for tier in json.loads(elsewhere(probe, ALL, host=level(number)).stdout)["tiers"]
        }
        for number in (2, 3, 4)
    }

    one, two = ["SYS_ADMIN"], ["BPF", "PERFMON"]
    assert needed[2] == {"fexit": two, "kprobe": two, "tracepoint": [*two, "NET_ADMIN"], "bcc": two}
    assert needed[3] == needed[4] == {"fexit": two, "kprobe": one, "tracepoint": one, "bcc": one}


@pytest.mark.usefixtures("tracefs_for_a_group")
def test_the_administrators_capability_stands_for_all(tier: str) -> None:
    """What --probe names there, SYS_ADMIN alone, is enough for a tier with all its hooks."""
    hooks, _, _ = opened(tier)

    said = told(tier, ["SYS_ADMIN"], host=f"{TRACEFS}; {level(4)}")

    expected = (list(hooks), NOTES.get(tier, []), [reachable()[0]])
    assert expected == (said["hooks"], said["notes"], said["seen"])


REFUSE = """
import ctypes, os, platform, struct, sys
number = {"x86_64": 298, "aarch64": 241}[platform.machine()]
parts = ((0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x50000 | 13), (0x06, 0, 0, 0x7FFF0000))
code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *part) for part in parts))
program = ctypes.create_string_buffer(struct.pack("=H6xQ", len(parts), ctypes.addressof(code)))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, program) == 0
os.execv(sys.argv[1], sys.argv[1:])
"""
"""Ends perf_event_open with EACCES, as kernels do whose administrator reserves it, and goes on as another program."""


@pytest.mark.usefixtures("tracefs_for_a_group")
@pytest.mark.parametrize(
    ("host", "given", "names"),
    [(level(3), ALL, ["CAP_SYS_ADMIN"]), (level(3), ("SYS_ADMIN",), []), (level(2), ("BPF", "PERFMON"), [])],
    ids=["for-the-administrator", "refused-to-the-administrator", "refused-to-all"],
)
def test_refused_perf_events(host: str, given: Sequence[str], names: list[str]) -> None:
    """Where perf_event_open is refused the sentence says the level, and the capability if that is what is missing."""
    command = [sys.executable, "-c", REFUSE, sys.executable, "-c", TELL, "tracepoint"]
    done = elsewhere(command, given, host=f"{TRACEFS}; {host}")

    sentence = json.loads(done.stdout)["refusal"]
    assert re.search(r"refuses perf_event_open for tracepoint:\S+ \(kernel\.perf_event_paranoid is [23]\)", sentence)
    assert re.findall("CAP_[A-Z_]+", sentence) == names
    assert ("although the process has the capabilities" in sentence) == (not names)


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A cgroup of version 2 that is not the root."""
    tree = next(
        Path(line.split(" ")[1])
        for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()
        if line.split(" ")[2] == "cgroup2"
    )
    made = tree / f"bindsnoop-test-{os.getpid()}"
    made.mkdir()
    yield made
    made.rmdir()


@pytest.mark.usefixtures("tracefs_for_a_group")
def test_a_container_with_its_own_cgroup_tree(cgroup: Path) -> None:
    """There post_bind would see the container alone: it is left out, and the note names the mount that is needed."""
    mount = f"umount -a -l -t cgroup2; mount -t cgroup2 cgroup2 {cgroup.parent}"

    said = told(
        "tracepoint",
        ALL,
        host=f"{TRACEFS}; echo $$ >{cgroup}/cgroup.procs",
        inside=f"""unshare -C sh -ec '{mount}; exec "$@"' sh""",
    )

    assert said["hooks"] == ["tracepoint:syscalls/sys_exit_bind", "tracepoint:syscalls/sys_enter_bind"]
    assert {"io_uring", "compat", "kernel"} <= set(said["gaps"])
    assert said["seen"] == [reachable()[0]]
    (note,) = said["notes"]
    assert note.endswith("mount the node's /sys/fs/cgroup into the container")


@pytest.mark.parametrize("left", [255, 256])
def test_a_container_without_room_for_a_compiler(left: int) -> None:
    """Near the memory limit of its cgroup a probe does not compile: the agent beside it would be ended with it."""
    files = f"echo {512 << 20} >/sys/fs/cgroup/memory.max; echo {(512 - left) << 20} >/sys/fs/cgroup/memory.current"
    done = elsewhere(
        [BIN / "bindsnoop-agent", "--probe", "-o", "json"],
        (),
        host=f"umount -l /sys/fs/cgroup; mount -t tmpfs -o mode=755 tmpfs /sys/fs/cgroup; {files}",
    )

    bcc = json.loads(done.stdout)["tiers"][TIERS.index("bcc")]
    tried = left >= 256
    assert bcc["why_not"].startswith("it was not tried, for the compiler takes up to 256 MiB") != tried
    assert ("512 MiB in /sys/fs/cgroup has 255 MiB left" in bcc["why_not"]) != tried


# --- at rest ------------------------------------------------------------------------------------------------------


def wakeups(pid: int) -> int:
    """How often the threads of a process have gone to sleep so far."""
    statuses = (path.read_text(encoding="ascii") for path in Path(f"/proc/{pid}/task").glob("*/status"))
    return sum(int(text.partition("\nvoluntary_ctxt_switches:")[2].split()[0]) for text in statuses)


def test_an_idle_agent_sleeps(tmp_path: Path) -> None:
    """While nobody binds an agent wakes up a few times a second at most, whatever --max-delay says.

    Others may bind on this machine meanwhile: a second in which nobody does is waited for.
    """
    # podman's files, where there are some, are looked at more often.
    with agent_running("--files", str(tmp_path), "--max-delay", "1ms", "--workloads", "none") as agent:
        port = bound_port()
        until(lambda: port in [event.get("port") for event in recorded(tmp_path)])
        woken = []
        while not woken or (woken[-1] > 5 and len(woken) < 20):
            before = wakeups(agent.process.pid)
            with pytest.raises(subprocess.TimeoutExpired):
                agent.process.wait(1)
            woken.append(wakeups(agent.process.pid) - before)

    assert min(woken) <= 5
