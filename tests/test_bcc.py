"""The tier for kernels without BTF: what it compiles to, what it says when something is missing, and what it sees.

The corner cases are those of tests/test_binds.py, with ``--tier bcc``. Here a kernel without kprobes shows everything
up to loading; what needs kprobes runs where there are some, as in the guests of tests/kernel.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import site
import socket
import struct
import subprocess
import sys
import time
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from pipeline import records
from pipeline.errors import TracerUnavailable
from pipeline.tracer import Tracer, Wanted, bcc, coverage, open_tracer
from tests.kernel.binds import bind, raw_bind, sockaddr_in
from tests.kernel.headers import headers, merge, own, source

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="tracing needs root")

HAS_KPROBES = b" register_kprobe\n" in Path("/proc/kallsyms").read_bytes()
needs_kprobes = pytest.mark.skipif(
    not (HAS_KPROBES and own()), reason="this kernel has no kprobes, or its headers are not installed"
)

PORTS = range(18700, 18720)
CHOOSY = Wanted(pids=(os.getpid(), 1), ports=(PORTS, range(9, 10)), only_success=True)
"""Everything that can be wanted: every line of the source is compiled."""


# --- the programs -------------------------------------------------------------------------------------------------


class Instruction(NamedTuple):
    """One of a BPF program (include/uapi/linux/bpf.h)."""

    code: int
    registers: int
    offset: int
    immediate: int

    @property
    def kind(self) -> int:
        """The instruction's class."""
        return self.code & 7

    @property
    def source(self) -> int:
        """Number of the source register; some instructions say with it what their immediate value is."""
        return self.registers >> 4 if sys.byteorder == "little" else self.registers & 15


BPF_JMP, BPF_JMP32 = 5, 6
CALL, EXIT, JUMP, LOAD_64 = 0x85, 0x95, 0x05, 0x18

LAST_HELPER_OF_4_14 = 53
"""BPF_FUNC_sock_map_update; the ones before are numbered without a hole."""

INSTRUCTIONS_OF_4_14 = 4096
"""BPF_MAXINSNS, of one program; a million since Linux 5.2."""


@pytest.fixture(scope="module")
def compiled() -> Iterator[Any]:
    """bcc's object of the source, with everything in it."""
    with headers():
        made = bcc.compiled(CHOOSY)
    yield made
    made.cleanup()


@pytest.fixture(params=bcc.PROGRAMS)
def program(request: pytest.FixtureRequest, compiled: Any) -> list[Instruction]:
    """The instructions of one program, as the kernel gets them."""
    code = compiled.dump_func(request.param.encode())
    return [Instruction(*found) for found in struct.iter_unpack("=BBhi", code)]


def test_no_helper_is_newer_than_linux_4_14(program: list[Instruction]) -> None:
    """Every function that a program calls is one that Linux 4.14 has."""
    helpers = {each.immediate for each in program if each.code == CALL}

    assert helpers
    assert max(helpers) <= LAST_HELPER_OF_4_14


def test_programs_are_short_enough_for_linux_4_14(program: list[Instruction]) -> None:
    """No program is longer than the verifier of Linux 4.14 takes."""
    assert len(program) <= INSTRUCTIONS_OF_4_14


def test_no_instruction_is_newer_than_linux_4_14(program: list[Instruction]) -> None:
    """Neither 32-bit jumps (5.1), nor calls of one's own functions (4.16), nor values that lie in maps (5.2)."""
    assert not [each for each in program if each.kind == BPF_JMP32]
    assert not [each for each in program if each.code == CALL and each.source != 0]
    assert {0, 1} >= {each.source for each in program if each.code == LOAD_64}


def test_programs_have_no_loops(program: list[Instruction]) -> None:
    """From no instruction a way leads back to it: loops are allowed since Linux 5.3."""
    ahead: dict[int, set[int]] = {}
    for at, each in enumerate(program):
        after = set() if each.code in (EXIT, JUMP) else {at + 1}
        if each.kind == BPF_JMP and each.code not in (CALL, EXIT):
            after.add(at + 1 + each.offset)
        ahead[at] = after
    left = set(ahead)
    # What only leads to what is gone already goes, until nothing does: a loop stays.
    while gone := {at for at in left if not ahead[at] & left}:
        left -= gone

    assert left == set()


def test_the_kernel_takes_the_programs(compiled: Any) -> None:
    """The verifier of this kernel accepts every program, with every filter in it."""
    loaded = {compiled.load_func(program.encode(), bcc.library().BPF.KPROBE).fd for program in bcc.PROGRAMS}

    assert min(loaded) > 2
    assert len(loaded) == len(bcc.PROGRAMS)


# --- what may be missing ------------------------------------------------------------------------------------------


def refused(capfd: pytest.CaptureFixture[str], action: Any) -> str:
    """The sentence with which an action is refused; nothing else is said, on either stream."""
    with pytest.raises(TracerUnavailable) as caught:
        action()
    assert capfd.readouterr() == ("", "")
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


@pytest.mark.skipif(HAS_KPROBES, reason="this kernel has kprobes")
def test_a_kernel_without_kprobes_says_so(capfd: pytest.CaptureFixture[str]) -> None:
    """The tier is refused in one sentence, and before anything is compiled."""
    sentence = refused(capfd, lambda: open_tracer("bcc"))

    assert sentence == "this kernel has no kprobes (it is built without CONFIG_KPROBES)"


def test_missing_headers_are_a_sentence(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """It names the package for this kernel, and says nothing of what the compiler said."""
    with source(tmp_path):
        sentence = refused(capfd, bcc.compiled)

    assert sentence.startswith(f"the headers of this kernel are not in {tmp_path}; install them")
    assert f"apt-get install linux-headers-{os.uname().release};" in sentence


@pytest.mark.skipif(own(), reason="the headers of this kernel are installed")
def test_without_another_place_the_kernels_own_headers_are_missed(capfd: pytest.CaptureFixture[str]) -> None:
    """Where nothing points elsewhere, the sentence names the place where distributions put them."""
    sentence = refused(capfd, bcc.compiled)

    assert f"not in /lib/modules/{os.uname().release}/build;" in sentence


@pytest.mark.skipif(own(), reason="the headers that are installed here are not divided as the test expects")
def test_headers_that_do_not_fit_are_a_sentence(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """It has the first of the compiler's complaints."""
    merge(tmp_path)
    net = tmp_path / "include" / "net"
    real = net.readlink()
    net.unlink()
    net.mkdir()
    for entry in real.iterdir():
        (net / entry.name).symlink_to(entry)
    (net / "inet_sock.h").unlink()
    (net / "inet_sock.h").write_text("#error this is no kernel\n")
    with source(tmp_path):
        sentence = refused(capfd, bcc.compiled)

    assert re.fullmatch(
        r"bcc [\d.]+ cannot compile bindsnoop\.bcc\.c against the headers of this kernel \(.*\): "
        r".*inet_sock\.h:1:2: error: this is no kernel",
        sentence,
    )


# busybox has one too, which cannot do this.
needs_setpriv = pytest.mark.skipif(
    not shutil.which("setpriv")
    or subprocess.run(["setpriv", "--version"], capture_output=True, check=False).returncode != 0,
    reason="util-linux with its setpriv is not installed",
)

COMPILE = """
from pipeline.errors import TracerUnavailable
from pipeline.tracer import bcc
from pipeline.tracer.perf_buffer import PerfBuffers
from tests.kernel.headers import headers
try:
    with headers():
        PerfBuffers(8192, record_bytes=416, wakeup_bytes=1, max_records=1).close()
        made = bcc.compiled()
    for program in bcc.PROGRAMS:
        made.load_func(program.encode(), bcc.library().BPF.KPROBE)
except TracerUnavailable as error:
    print(error)
else:
    print("loaded")
"""


@pytest.fixture
def _usual_paranoia() -> Iterator[None]:
    """perf_event_open asks for no more than the kernel's own default does; Debian's kernels let it want SYS_ADMIN."""
    level = Path("/proc/sys/kernel/perf_event_paranoid")
    before = level.read_text()
    level.write_text("2\n")
    yield
    level.write_text(before)


@needs_setpriv
@pytest.mark.parametrize(
    ("dropped", "expected"),
    [
        ("-net_admin,-sys_resource", r"loaded"),
        ("-sys_admin,-bpf", r"the kernel refuses the BPF maps of tier bcc .*: CAP_BPF is missing; run as root.*"),
        (
            "-sys_admin,-perfmon",
            r"the kernel refuses perf_event_open for the perf buffer of CPU 0 .*: CAP_PERFMON is missing.*",
        ),
    ],
)
@pytest.mark.usefixtures("_usual_paranoia")
def test_a_missing_capability_is_a_sentence(dropped: str, expected: str) -> None:
    """It names the capability; without those that no tier of functions needs, everything loads."""
    done = subprocess.run(
        ["setpriv", "--bounding-set", dropped, sys.executable, "-c", COMPILE],
        check=True, capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip

    assert done.stderr == ""
    assert re.fullmatch(expected, done.stdout.strip())


# --- finding bcc --------------------------------------------------------------------------------------------------

FIND = """
import sys
from pathlib import Path
from pipeline.errors import TracerUnavailable
from pipeline.tracer import bcc
try:
    found = bcc.library(*map(Path, sys.argv[1:]))
    print(found.__file__, found.BPF.__name__, "bcc" in sys.modules)
except TracerUnavailable as error:
    print(error)
"""


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """A virtual environment that sees nothing of the system's packages."""
    venv.create(tmp_path / "environment", with_pip=False)
    return tmp_path / "environment"


def found_in(environment: Path, *arguments: object) -> str:
    """What a Python of this environment finds, given the packages that this project needs and no bcc."""
    packages = [
        place for place in (*site.getsitepackages(), site.getusersitepackages()) if not Path(place, "bcc").exists()
    ]
    done = subprocess.run(
        [environment / "bin/python", "-c", FIND, *map(str, arguments)],
        check=True, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ":".join([str(ROOT), *packages])},
    )  # fmt: skip
    assert done.stderr == ""
    return done.stdout.strip()


def test_the_distributions_bcc_is_found_in_an_environment_without_system_packages(environment: Path) -> None:
    """It is loaded from the distribution's folder, and leaves the name ``bcc`` free."""
    path, name, taken = found_in(environment).split()

    assert re.fullmatch(r"/usr/lib(64)?/python3[^/]*/(dist|site)-packages/bcc/__init__\.py", path)
    assert (name, taken) == ("BPF", "False")


def test_another_project_called_bcc_is_passed_by(environment: Path) -> None:
    """What PyPI has under that name is recognised without being run."""
    (packages,) = environment.glob("lib/python3*/site-packages")
    (packages / "bcc").mkdir()
    (packages / "bcc/__init__.py").write_text('raise SystemExit("the wrong bcc runs")\n')

    assert found_in(environment).endswith("bcc/__init__.py BPF False")
    assert found_in(environment, environment) == (
        "bcc is missing; install it (Debian, Ubuntu: apt-get install python3-bpfcc; Fedora: dnf install python3-bcc); "
        f"{packages}/bcc/__init__.py is another project of that name, from PyPI"
    )


def test_a_missing_bcc_is_a_sentence(environment: Path) -> None:
    """It names the package of two distributions."""
    assert found_in(environment, environment) == (
        "bcc is missing; install it (Debian, Ubuntu: apt-get install python3-bpfcc; Fedora: dnf install python3-bcc)"
    )


def test_a_bcc_that_does_not_work_is_a_sentence(environment: Path, tmp_path: Path) -> None:
    """Where the package is there without its library, the sentence names both and what to install."""
    folder = tmp_path / "usr/lib/python3/dist-packages/bcc"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("from .libbcc import lib\n")
    (folder / "libbcc.py").write_text('import ctypes\n\nlib = ctypes.CDLL("libbcc-of-nowhere.so.0")\n')

    assert found_in(environment, tmp_path) == (
        f"bcc in {folder} cannot be loaded (libbcc-of-nowhere.so.0: cannot open shared object file: No such file or "
        "directory); install it again with what it needs "
        "(Debian, Ubuntu: apt-get install python3-bpfcc; Fedora: dnf install python3-bcc)"
    )


# --- binds --------------------------------------------------------------------------------------------------------

Event = dict[str, Any]


@contextlib.contextmanager
def hidden_btf() -> Iterator[None]:
    """In the block nobody can read this kernel's BTF."""
    btf = Path("/sys/kernel/btf/vmlinux")
    if not btf.exists():
        yield
        return
    subprocess.run(["mount", "--bind", "/dev/null", btf], check=True)
    try:
        assert btf.read_bytes() == b""
        yield
    finally:
        subprocess.run(["umount", btf], check=True)


@pytest.fixture(scope="module")
def tracer() -> Iterator[Tracer]:
    """A tracer with a page for each CPU that reports what ``CHOOSY`` wants, on a kernel that hides its BTF."""
    with hidden_btf(), contextlib.closing(open_tracer("bcc", ring_bytes=4096, wanted=CHOOSY)) as opened:
        yield opened


def events(tracer: Tracer) -> list[Event]:
    """What waits, all of it released."""
    found: list[Event] = []
    while burst := tracer.read(0):
        found += records.decode(burst.records, 0).to_pylist()
        tracer.release(burst)
    return found


def moved(tracer: Tracer, before: dict[str, int]) -> dict[str, int]:
    """Counters that moved. What was attempted is always the sum of all others."""
    counts = tracer.counters()
    assert counts["attempted"] == sum(counts.values()) - counts["attempted"]
    return {name: count - before[name] for name, count in counts.items() if count != before[name]}


def binds(*ports: int) -> None:
    """A socket for each of these ports, bound to it."""
    for port in ports:
        with socket.socket() as made:
            assert bind(made, "127.0.0.1", port) == 0


@needs_kprobes
def test_it_hooks_everything_without_btf(tracer: Tracer) -> None:
    """Every function is hooked at both ends, nothing but the gaps of every tier is missed, and the record says bcc."""
    events(tracer)
    binds(PORTS[0])

    (event,) = events(tracer)

    assert (event["hook"], event["port"], event["pid"]) == ("bcc", PORTS[0], os.getpid())
    functions = {"inet_bind", "inet6_bind", "security_socket_bind", "__sys_bind"}
    hooks = {f"{kind}:{function}" for kind in ("kprobe", "kretprobe") for function in functions}
    assert set(tracer.hooks) - {"kprobe:mptcp_bind", "kretprobe:mptcp_bind"} == hooks
    assert (tracer.name, tuple(tracer.notes), tuple(tracer.gaps)) == ("bcc", (), coverage.EVERYWHERE)


@needs_kprobes
def test_times_are_of_the_boot_clock(tracer: Tracer) -> None:
    """The record's time lies between two looks at CLOCK_BOOTTIME, and later binds have later times."""
    events(tracer)
    before = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    binds(*PORTS[:3])
    after = time.clock_gettime_ns(time.CLOCK_BOOTTIME)

    times = [event["boottime_ns"] for event in events(tracer)]

    # The difference of two clocks is known to some microseconds.
    assert before - 1_000_000 < times[0] < times[1] < times[2] < after + 1_000_000


@needs_kprobes
def test_only_what_is_wanted_is_reported_and_counted(tracer: Tracer) -> None:
    """Other ports, other processes and failures are left out by the kernel, and are no attempts either."""
    events(tracer)
    before = tracer.counters()
    binds(PORTS[1], PORTS[-1] + 1, PORTS[0] - 1, 0, PORTS[2])
    with socket.socket() as made:
        assert raw_bind(made.fileno(), sockaddr_in("192.0.2.1", PORTS[3])) > 0
    subprocess.run(
        [sys.executable, "-c", f"import socket; socket.socket().bind(('127.0.0.1', {PORTS[4]}))"], check=True
    )

    assert [PORTS[1], PORTS[2]] == [event["port"] for event in events(tracer)]
    assert moved(tracer, before) == {"attempted": 2, "submitted": 2}


@needs_kprobes
def test_a_full_buffer_is_counted(tracer: Tracer) -> None:
    """What finds no room is lost and counted, what does is read, and reading makes room."""
    events(tracer)
    before = tracer.counters()
    (cpu, *_) = os.sched_getaffinity(0)
    everywhere = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu})
    binds(*[PORTS[5]] * 30)
    counts = moved(tracer, before)

    found = len(events(tracer))
    binds(PORTS[6])
    os.sched_setaffinity(0, everywhere)

    assert 0 < found < 30
    assert counts == {"attempted": 30, "submitted": found, "lost_ring_full": 30 - found}
    assert [PORTS[6]] == [event["port"] for event in events(tracer)]


@needs_kprobes
def test_no_room_in_flight_is_counted_and_detaching_keeps_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for one call at a time, the system call takes it and the bind within is lost, and counted as that."""
    monkeypatch.setattr(bcc, "_INFLIGHT", 1)
    with contextlib.closing(open_tracer("bcc", wanted=Wanted(pids=(os.getpid(),)))) as tracer:
        before = tracer.counters()
        binds(*PORTS[:5])
        assert moved(tracer, before) == {"attempted": 5, "lost_inflight_full": 5}
        # Of a descriptor that is no socket the system call itself knows, and has the room.
        raw_bind(9999, sockaddr_in("127.0.0.1", PORTS[0]))

        tracer.detach()

        binds(*PORTS[:5])
        assert moved(tracer, before) == {"attempted": 6, "lost_inflight_full": 5, "submitted": 1}
        assert ["EBADF"] == [event["error"] for event in events(tracer)]


def test_records_have_the_size_of_the_shared_struct(compiled: Any) -> None:
    """What the programs write is struct bind_event, field by field where Python has it."""
    leaf = compiled[b"slots"].sLeaf
    fields = {name: getattr(leaf, name).offset for name, *_ in leaf._fields_}

    assert np.dtype(records.RECORD).itemsize == bcc.RECORD_BYTES
    assert fields == {name: place[1] for name, place in (records.RECORD.fields or {}).items()}
