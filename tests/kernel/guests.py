"""Other kernels: a command goes in, what it printed, its exit code and its files come out of a guest that ran it.

A guest is QEMU with one of Debian's kernels and a root image in memory that holds Debian's Python, libbpf and what
this project is tested with; the checkout itself (``pipeline``, ``bpf``, ``schemas``, ``tests``) is laid over it fresh
for each run, as it is. So what runs there is the real package, not a stand-in.

Kernels and root images are fetched once into ``${XDG_CACHE_HOME:-~/.cache}/bindsnoop/guests``. The Python packages are
the locked ones. Debian's are those that its mirror has on that day, checked by apt's signatures: a mirror keeps only
the newest point release, so a stricter pin would be a download that fails in a month. Which version it was stands in
``Guest.release`` and in every table made from it.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import io
import lzma
import os
import platform
import re
import secrets
import selectors
import shlex
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

from packaging.markers import Marker

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


class GuestFailed(RuntimeError):
    """A guest could not be made, did not end, or broke; the sentence says which, and what its console said."""


class Machine(NamedTuple):
    """What an architecture is called by Debian and by wheels, and how QEMU makes one."""

    debian: str
    qemu: str
    package: str
    options: tuple[str, ...]
    console: str
    channel: str


MACHINES: dict[str, Machine] = {
    "x86_64": Machine(
        debian="amd64",
        qemu="qemu-system-x86_64",
        package="qemu-system-x86",
        # numpy wants SSE 4.2. More than that makes emulation slower, not faster.
        options=(
            "-cpu",
            "Nehalem,+rdrand",
            "-device",
            "isa-serial,chardev=console",
            "-device",
            "isa-serial,chardev=channel",
        ),
        console="ttyS0",
        channel="/dev/ttyS1",
    ),
    "aarch64": Machine(
        debian="arm64",
        qemu="qemu-system-aarch64",
        package="qemu-system-arm",
        options=(
            "-M",
            "virt",
            "-cpu",
            "cortex-a57",
            "-serial",
            "chardev:console",
            "-device",
            "pci-serial,chardev=channel",
        ),
        console="ttyAMA0",
        channel="/dev/ttyS0",
    ),
}
"""By the name that ``platform.machine()`` gives there."""

SUITES: dict[str, str] = {
    "5.10": "bullseye",
    "6.1": "bookworm",
    "6.12": "trixie",
    "6.18": "trixie-backports",
    "7.3": "trixie-backports",
}
"""Kernel series, oldest first, and the suite of Debian that has it in the cloud flavour."""

USERLAND = "bookworm"
"""Suite of the root image: the newest whose Python the wheels of both architectures are made for."""

PYTHON = "3.11"

# util-linux for setpriv, of which busybox has only a part.
DEBS = ("python3-minimal", f"libpython{PYTHON}-stdlib", "libbpf1", "libstdc++6", "busybox-static", "util-linux")
WHEELS = (
    "fastavro", "iniconfig", "numpy", "packaging", "pluggy", "pyarrow", "pygments", "pyruhvro", "pytest",
    "pytest-timeout",
)  # fmt: skip

MODULES = ("crc32c_generic", "sctp", "dummy", "veth", "vxlan", "vsock")
"""Kernel modules that a guest has loaded, as far as its kernel knows them."""

CMDLINE = "mitigations=off clearcpuid=141 lsm=landlock,lockdown,yama,apparmor,bpf"
"""An emulated CPU needs no mitigations and pays dearly for them. 141 is CMPXCHG16B: emulated by QEMU before 8 it leaves
nonsense in the flags, and an interrupt right behind it breaks the kernel. Debian's 5.10 leaves ``bpf`` out of ``lsm``.
"""

# Of 400 MB a guest needs 220. What stays of pyarrow is what its compute functions are linked with.
_DROPPED = re.compile(
    r"""
    ^usr/share/(?!python3/)
    | ^usr/lib/python3\.\d+/(test|idlelib|lib2to3|ensurepip|tkinter|config-[^/]*)/
    | /(tests|include|src)/
    | /pyarrow/.*\.(pyx|pxi|pxd)$ | /pyarrow/libarrow_python\w*\.so$ | /pyarrow/lib[^/]*\.so\.\d+\.\d
    | /pyarrow/lib(arrow_flight|arrow_s3|arrow_python_flight)\.so
    | /pyarrow/_(flight|dataset|parquet|s3fs|orc|substrait|hdfs|gcsfs|azurefs|csv|json|feather|cuda|acero)[\w.-]*\.so$
    | /numpy/.*\.(pyi|a)$ | /numpy/(f2py|distutils)/
    | /pygments/(lexers/(?!python|diff|_mapping|__init__))
    | /gconv/ | ^usr/bin/(dpkg|perl|tar|update-alternatives) | ^usr/sbin/ | ^(etc|var)/
    """,
    re.VERBOSE,
)
_PACKAGES = f"usr/local/lib/python{PYTHON}/dist-packages"


# --- the cache ----------------------------------------------------------------------------------------------------


def cache() -> Path:
    """Folder of everything that guests are made of; deleting it costs a download."""
    place = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bindsnoop" / "guests"
    place.mkdir(parents=True, exist_ok=True)
    return place


@contextlib.contextmanager
def _made(name: str) -> Iterator[Path | None]:
    """A folder to fill, which becomes ``name`` in the cache when the block ends well; None when that exists.

    A broken download is never taken for a whole one, and two processes may ask for the same.
    """
    place = cache() / name
    if place.exists():
        yield None
        return
    with (place.parent / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if place.exists():
            yield None
            return
        with tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{name}-", ignore_cleanup_errors=True) as temporary:
            folder = Path(temporary) / "whole"
            folder.mkdir()
            yield folder
            folder.rename(place)


def _digest(*recipe: str) -> str:
    """What a name in the cache ends in, so that another recipe makes another folder."""
    return hashlib.sha256("\0".join(recipe).encode()).hexdigest()[:8]


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


def _done(command: Sequence[str | Path], failure: str, **options: object) -> str:
    """Standard output of a command. GuestFailed with ``failure`` and what it said when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    if done.returncode:
        raise GuestFailed(f"{failure}: {(done.stderr + done.stdout).strip()[-2000:]}")
    return str(done.stdout)


# --- Debian -------------------------------------------------------------------------------------------------------


@functools.cache
def mirror() -> str:
    """Address of DEBIAN_MIRROR in the environment, else of the mirror that this system itself uses for Debian."""
    targets = ["indextargets", "--format", "$(REPO_URI) $(CODENAME)", "ORIGIN: Debian", "IDENTIFIER: Packages"]
    lines = _done(["apt-get", *targets], "apt-get cannot say which mirror it uses").splitlines()
    known = [address for address, _, suite in (line.partition(" ") for line in lines) if suite and "-" not in suite]
    found = os.environ.get("DEBIAN_MIRROR") or next(iter(known), None)
    if found is None:
        raise GuestFailed(
            "this system's apt-get knows no mirror of Debian, where guests come from; name one by DEBIAN_MIRROR=URL"
        )
    return found


_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_LIST_SECS = 86400.0


class Apt:
    """One suite of Debian for one architecture, in a state of its own: the system's packages stay as they are."""

    def __init__(self, suite: str, debian: str) -> None:
        """Reads the list of packages when it is not there or older than a day, for what it names goes away."""
        self.suite = suite
        self.name = f"{suite}-{debian}"
        folder = cache() / f"apt-{self.name}"
        self._options = self._state(folder, debian)
        with (cache() / f".apt-{self.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            read = folder / "read"
            if read.exists() and time.time() - read.stat().st_mtime < _LIST_SECS:
                return
            _say(f"reading the list of packages of Debian {suite} for {debian} (about 10 MB)")
            for place in ("lists/partial", "cache/archives/partial", "parts"):
                (folder / place).mkdir(parents=True, exist_ok=True)
            (folder / "status").touch()
            if not _KEYRING.exists():
                raise GuestFailed(f"{_KEYRING} is missing; install it by `apt-get install debian-archive-keyring`")
            (folder / "sources.list").write_text(
                f"deb [arch={debian} signed-by={_KEYRING}] {mirror()} {suite} main\n", encoding="ascii"
            )
            self._get(f"apt-get cannot read the list of packages of {self.name}", "update")
            read.touch()

    @staticmethod
    def _state(folder: Path, debian: str) -> list[str]:
        options = {
            "Dir::Etc::sourcelist": folder / "sources.list",
            "Dir::Etc::sourceparts": folder / "parts",
            "Dir::State::lists": folder / "lists",
            "Dir::State::status": folder / "status",
            "Dir::Cache": folder / "cache",
            "APT::Architecture": debian,
            "APT::Architectures": debian,
            "APT::Sandbox::User": "",
            "APT::Install-Recommends": "false",
            # Otherwise a list that could not be read is only a warning.
            "APT::Update::Error-Mode": "any",
        }
        return [word for name, value in options.items() for word in ("-o", f"{name}={value}")]

    def _get(self, failure: str, *words: str, cwd: Path | None = None) -> str:
        return _done(["apt-get", "-q=2", *self._options, *words], failure, cwd=cwd)

    def names(self, pattern: str) -> list[str]:
        """Names of packages that match a regular expression as a whole."""
        found = _done(["apt-cache", *self._options, "pkgnames", "linux-"], f"apt-cache cannot read {self.name}")
        return [name for name in found.splitlines() if re.fullmatch(pattern, name)]

    def with_dependencies(self, packages: Sequence[str]) -> list[str]:
        """Names with versions, ``name=version``, of these packages and of all that they need."""
        said = self._get(f"{self.name} cannot install {', '.join(packages)}", "install", "-s", *packages)
        return sorted(f"{name}={version}" for name, version in re.findall(r"^Inst (\S+) \((\S+)", said, re.MULTILINE))

    def headers_below(self, package: str) -> list[str]:
        """Packages of headers that a package of headers needs."""
        said = _done(["apt-cache", *self._options, "depends", package], f"{self.name} has no {package}")
        return re.findall(r"Depends: (linux-headers-\S+)", said)

    def download(self, packages: Sequence[str], folder: Path) -> list[Path]:
        """Downloads ``name`` or ``name=version``, without what they need, and gives the files."""
        self._get(f"apt-get cannot fetch {', '.join(packages)} of {self.name}", "download", *packages, cwd=folder)
        return sorted(folder.glob("*.deb"))


def _unpack(debs: Iterable[Path], root: Path) -> None:
    """Lays packages over a root whose /bin, /lib and /sbin are links into /usr, which dpkg-deb -x would replace."""
    for name in ("bin", "lib", "lib64", "sbin"):
        if not (root / name).is_symlink():
            (root / "usr" / name).mkdir(parents=True, exist_ok=True)
            (root / name).symlink_to(f"usr/{name}")
    for deb in debs:
        with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", deb], stdout=subprocess.PIPE) as package:
            options = ["--keep-directory-symlink", "--no-same-owner", "--no-same-permissions", "--exclude=./dev"]
            _done(["tar", "-x", "-C", root, *options], f"{deb.name} cannot be unpacked", stdin=package.stdout)
        if package.returncode:
            raise GuestFailed(f"{deb.name} is no Debian package")


# --- kernels ------------------------------------------------------------------------------------------------------


class Kernel(NamedTuple):
    """A kernel in the cache: its full release (``uname -r``), Debian's version, and the folder with its files.

    In there: ``vmlinuz``, and ``modules/NN-name.ko`` in the order in which they load.
    """

    release: str
    version: str
    folder: Path


def kernel(series: str, arch: str = "x86_64") -> Kernel:
    """The newest kernel of this series that Debian has, fetched now if the cache has none. GuestFailed."""
    if series not in SUITES or arch not in MACHINES:
        raise GuestFailed(
            f"kernel {series} for {arch} is not available; allowed are {', '.join(SUITES)} for {', '.join(MACHINES)}"
        )
    debian = MACHINES[arch].debian
    name = f"kernel-{series}-{debian}-{_digest(*MODULES)}"
    with _made(name) as folder:
        if folder:
            _fetch_kernel(Apt(SUITES[series], debian), series, folder)
    place = cache() / name
    release, version = (place / "release").read_text(encoding="ascii").split()
    return Kernel(release, version, place)


def _fetch_kernel(apt: Apt, series: str, folder: Path) -> None:
    pattern = rf"linux-(image|binary|modules)-({re.escape(series)}\.[0-9][\w.+-]*-cloud-\w+)"
    names = apt.names(pattern)
    if not names:
        raise GuestFailed(f"Debian {apt.suite} has no kernel {series} any more; look for one in another suite")
    release = max(
        (name.split("-", 2)[2] for name in names), key=lambda text: [int(n) for n in re.findall(r"\d+", text)]
    )
    _say(f"fetching Linux {release} of Debian {apt.suite} (20 to 50 MB)")
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        debs = apt.download([name for name in names if name.endswith(f"-{release}")], Path(temporary))
        version = _done(["dpkg-deb", "-f", debs[0], "Version"], f"{debs[0].name} has no version").strip()
        root = Path(temporary) / "root"
        _unpack(debs, root)
        image = next((path for path in root.rglob("vmlinuz*") if path.is_file()), None)
        if image is None:
            raise GuestFailed(f"the packages of Linux {release} hold no vmlinuz; Debian has moved it")
        shutil.copyfile(image, folder / "vmlinuz")
        (folder / "modules").mkdir()
        for number, (module, content) in enumerate(_modules(root / "usr/lib/modules" / release, MODULES).items()):
            (folder / "modules" / f"{number:02}-{module}.ko").write_bytes(content)
    (folder / "release").write_text(f"{release} {version}\n", encoding="ascii")


def _modules(tree: Path, wanted: Sequence[str]) -> dict[str, bytes]:
    """Modules by name, uncompressed, each behind those that it needs."""
    files = {path.name.partition(".ko")[0].replace("-", "_"): path for path in tree.rglob("*.ko*")}
    found: dict[str, bytes] = {}

    def add(name: str) -> None:
        if name in found or name not in files:
            return
        content = files[name].read_bytes()
        if files[name].suffix == ".xz":
            content = lzma.decompress(content)
        needs = re.search(rb"\0depends=([^\0]*)\0", content)
        for need in filter(None, (needs[1] if needs else b"").decode("ascii").split(",")):
            add(need.replace("-", "_"))
        found[name] = content

    for name in wanted:
        add(name)
    return found


# --- archives for the kernel --------------------------------------------------------------------------------------


class _Cpio:
    """Writer of an initramfs archive ("newc"): everything belongs to root, and several in a row are one."""

    def __init__(self, out: IO[bytes]) -> None:
        self._out = out
        self._number = 0
        self._folders: set[str] = set()

    def add(self, name: str, mode: int, content: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        """One entry; folders above it come by themselves."""
        above = name.rpartition("/")[0]
        if above and above not in self._folders:
            self.add(above, stat.S_IFDIR | 0o755)
        if stat.S_ISDIR(mode):
            if name in self._folders:
                return
            self._folders.add(name)
        self._number += 1
        raw = os.fsencode(name)
        fields = (self._number, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(raw) + 1, 0)
        self._out.write(b"070701" + b"".join(b"%08x" % field for field in fields))
        self._padded(raw + b"\0", 110)
        self._padded(content, 0)

    def _padded(self, content: bytes, before: int) -> None:
        self._out.write(content)
        self._out.write(bytes(-(before + len(content)) % 4))

    def add_file(self, name: str, path: Path) -> None:
        """A file, link or folder (without what is in it) of this machine; a file's execute bit stays."""
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            self.add(name, stat.S_IFLNK | 0o777, os.fsencode(path.readlink()))
        elif stat.S_ISDIR(mode):
            self.add(name, stat.S_IFDIR | 0o755)
        elif stat.S_ISREG(mode):
            self.add(name, stat.S_IFREG | (0o755 if mode & 0o111 else 0o644), path.read_bytes())

    def end(self) -> None:
        """Ends the archive; another may follow."""
        self.add("TRAILER!!!", 0)
        self._out.write(bytes(-self._out.tell() % 512))


def _pack_tree(root: Path, out: Path) -> None:
    with out.open("wb") as file:
        archive = _Cpio(file)
        for folder, folders, files in os.walk(root):
            folders.sort()
            for entry in sorted([*folders, *files]):
                path = Path(folder) / entry
                archive.add_file(str(path.relative_to(root)), path)
        archive.add("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
        archive.end()


# --- root images --------------------------------------------------------------------------------------------------


def _locked(names: Iterable[str]) -> str:
    """The lines of requirements-dev.txt for these packages and the guest's Python, with their hashes."""
    there = {"python_version": PYTHON, "python_full_version": f"{PYTHON}.2", "sys_platform": "linux"}
    lock = (ROOT / "requirements-dev.txt").read_text(encoding="utf-8")
    found = {}
    for name, version, marker, hashes in re.findall(
        r"^([\w.-]+)(==\S+)(?: ; (.*?))? \\\n((?: +--hash.*\n)+)", lock, re.MULTILINE
    ):
        # pip asks the markers of the Python that runs pip, so they are answered here and left out.
        if not marker or Marker(marker).evaluate(there):
            found[name.lower()] = f"{name}{version} \\\n{hashes}"
    return "".join(found[name] for name in names)


def root_image(arch: str = "x86_64", extra: Sequence[str] = ()) -> Path:
    """The uncompressed root archive for an architecture, made now if the cache has none. GuestFailed.

    With ``extra``: another archive, of these Debian packages and all that they need beyond the root archive; a name
    that ends in ``!`` comes alone, without what it needs.
    """
    debian = MACHINES[arch].debian
    locked = _locked(WHEELS)
    recipe = _digest(locked, *DEBS, _DROPPED.pattern, *extra)
    name = f"{'extra' if extra else 'root'}-{USERLAND}-{debian}-{recipe}"
    with _made(name) as folder:
        if folder:
            with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
                root = Path(temporary) / "root"
                if extra:
                    _fill_extra(arch, extra, root)
                else:
                    _fill_root(arch, locked, root)
                for path in [path for path in root.rglob("*") if _DROPPED.search(str(path.relative_to(root)))]:
                    if not path.is_dir():
                        path.unlink()
                _compile(root)
                _pack_tree(root, folder / "cpio")
    return cache() / name / "cpio"


def _userland(arch: str) -> Path:
    """Folder with DEBS and all that they need, unpacked."""
    debian = MACHINES[arch].debian
    name = f"userland-{USERLAND}-{debian}-{_digest(*DEBS)}"
    with _made(name) as folder:
        if folder:
            apt = Apt(USERLAND, debian)
            with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
                packages = apt.with_dependencies(DEBS)
                _say(f"fetching Python and libbpf of Debian {USERLAND} for {debian} (17 MB)")
                _unpack(apt.download(packages, Path(temporary)), folder)
            (folder / "packages").write_text("\n".join(packages) + "\n", encoding="ascii")
    return cache() / name


def _fill_root(arch: str, locked: str, root: Path) -> None:
    shutil.copytree(_userland(arch), root, symlinks=True)
    (root / "packages").unlink()
    _say(f"fetching the locked Python packages for {arch} (75 MB) and making a root image (220 MB)")
    lock = root.parent / "locked.txt"
    lock.write_text(locked, encoding="utf-8")
    platforms = [f"--platform=manylinux_2_{minor}_{arch}" for minor in (28, 27, 26, 24, 17)]
    _done(
        [
            sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps", "--no-compile",
            "--require-hashes", "-r", lock, "--only-binary=:all:", "--implementation=cp", f"--python-version={PYTHON}",
            f"--abi=cp{PYTHON.replace('.', '')}", *platforms, f"--platform=manylinux2014_{arch}",
            "--target", root / _PACKAGES,
        ],
        f"pip cannot fetch the locked packages for {arch}",
    )  # fmt: skip
    for name in ("dev", "guest", "proc", "run", "sys", "tmp", "root", "bindsnoop"):
        (root / name).mkdir(exist_ok=True)
    for name, text in {
        "etc/passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
        "etc/group": "root:x:0:\nnogroup:x:65534:\n",
        "etc/hosts": "127.0.0.1 localhost\n::1 localhost\n",
    }.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text, encoding="ascii")


def _fill_extra(arch: str, extra: Sequence[str], root: Path) -> None:
    apt = Apt(USERLAND, MACHINES[arch].debian)
    there = set((_userland(arch) / "packages").read_text(encoding="ascii").split())
    whole = [name for name in extra if not name.endswith("!")]
    packages = [name.removesuffix("!") for name in extra if name.endswith("!")]
    if whole:
        packages += [name for name in apt.with_dependencies([*DEBS, *whole]) if name not in there]
    _say(f"fetching {len(packages)} more packages for {arch}: {', '.join(packages)}")
    debs = root.parent / "debs"
    debs.mkdir()
    _unpack(apt.download(packages, debs), root)


def _compile(root: Path) -> None:
    """Bytecode for all Python below a root, which the guest takes as it is: reading it costs a guest a third."""
    here = _userland(platform.machine())
    (loader,) = (*here.glob("usr/lib/ld-linux-*.so.*"), *here.glob("usr/lib64/ld-linux-*.so.*"))[:1]
    libraries = ":".join(str(path) for path in here.glob("usr/lib/*-linux-gnu"))
    _done(
        [
            loader, "--library-path", libraries, here / f"usr/bin/python{PYTHON}", "-S", "-m", "compileall", "-q",
            "--invalidation-mode", "unchecked-hash", "-s", root, root,
        ],
        "the Python of the root image cannot compile its packages",
        env={"PYTHONHOME": str(here / "usr"), "PATH": os.environ["PATH"]},
    )  # fmt: skip


# --- running ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What a guest gave back: the job's exit code, what it printed (both streams, in order), the files that it left in
    /out by their path there, and everything that the kernel said on its console. ``seconds`` is from QEMU's start.
    """

    returncode: int
    stdout: str
    files: dict[str, bytes]
    console: str
    release: str
    version: str
    seconds: float


def prepare(
    series: str, arch: str, extra_debs: Sequence[str] = (), *, headers: bool = False
) -> tuple[Kernel, list[Path]]:
    """The kernel and the archives of a guest, made now as far as the cache has them not. GuestFailed."""
    needs(MACHINES[arch].qemu, MACHINES[arch].package)
    found = kernel(series, arch)
    parts = [root_image(arch)]
    if extra_debs:
        parts.append(root_image(arch, extra_debs))
    if headers:
        parts.append(kernel_headers(series, arch))
    return found, parts


_CHECKOUT = ("pipeline", "bpf", "schemas", "tests", "pyproject.toml")


def run(
    job: Sequence[str],
    *,
    kernel: str,
    arch: str = "x86_64",
    extra_debs: Sequence[str] = (),
    headers: bool = False,
    files: Mapping[str, bytes] | None = None,
    environment: Mapping[str, str] | None = None,
    memory_mib: int = 0,
    qemu: Sequence[str] = (),
    timeout_s: float = 120.0,
    echo: Callable[[str], object] | None = None,
) -> Result:
    """Boots a guest, runs ``job`` there as root in /bindsnoop, a copy of this checkout, and waits for its end.

    ``extra_debs`` are further packages of Debian bookworm, as ``root_image`` says; ``headers`` adds the kernel's own.
    ``files`` are laid over everything, by their path in the guest. ``qemu`` are further options of QEMU.
    ``echo`` gets what the job prints as it comes.
    GuestFailed when there is no such kernel, when the guest breaks, or when it has not ended after ``timeout_s``
    seconds: then its console is in the sentence.
    """
    machine = MACHINES[arch]
    wanted, parts = prepare(kernel, arch, extra_debs, headers=headers)
    mark = f"@@guest-{secrets.token_hex(8)}"
    with tempfile.TemporaryDirectory(prefix="bindsnoop-guest-") as temporary:
        folder = Path(temporary)
        with (folder / "initrd").open("wb") as initrd:
            for part in parts:
                with part.open("rb") as source:
                    shutil.copyfileobj(source, initrd, 1 << 20)
            archive = _Cpio(initrd)
            _add_checkout(archive)
            settings = f"CHANNEL={machine.channel}\nMARK={mark}\n"
            exports = {"OPENBLAS_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "TESTS_OWN_KERNEL": "1"}
            exports |= environment or {}
            lines = [f"export {name}={shlex.quote(value)}" for name, value in exports.items()]
            lines += ["cd /bindsnoop", f"exec {shlex.join(job)}", ""]
            archive.add("init", stat.S_IFREG | 0o755, (HERE / "guest_init.sh").read_bytes())
            archive.add("guest/settings", stat.S_IFREG | 0o644, settings.encode())
            archive.add("guest/job", stat.S_IFREG | 0o644, "\n".join(lines).encode())
            for module in sorted((wanted.folder / "modules").iterdir()):
                archive.add_file(f"guest/modules/{module.name}", module)
            for name, content in (files or {}).items():
                executable = content.startswith((b"#!", b"\x7fELF"))
                archive.add(name.lstrip("/"), stat.S_IFREG | (0o755 if executable else 0o644), content)
            archive.end()
            # The archive lies in memory beside what is unpacked from it, and that may fill half of the memory.
            memory_mib = memory_mib or max(768, 256 + 3 * (initrd.tell() >> 20))
        command = [
            machine.qemu, "-accel", "tcg,thread=single", "-smp", "2", "-m", str(memory_mib),
            "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-nic", "none",
            "-chardev", f"file,id=console,path={folder / 'console'}", "-chardev", "stdio,id=channel,signal=off",
            *machine.options, *qemu, "-kernel", str(wanted.folder / "vmlinuz"), "-initrd", str(folder / "initrd"),
            "-append", f"console={machine.console} rdinit=/init panic=-1 quiet {CMDLINE}",
        ]  # fmt: skip
        started = time.monotonic()
        said, broke = _boot(command, mark.encode(), timeout_s, echo)
        seconds = time.monotonic() - started
        console = (folder / "console").read_text("utf-8", "replace") if (folder / "console").exists() else ""
    text, found, rest = said.partition(b"\n" + mark.encode() + b" ")
    number, _, content = rest.partition(b"\n")
    if broke or not found or not number.strip().isdigit():
        reason = broke or "ended before its job did"
        raise GuestFailed(
            f"the guest with Linux {wanted.release} ({arch}) {reason}; its job said:\n"
            f"{text.decode('utf-8', 'replace')[-4000:]}\nand its console:\n{console[-8000:]}"
        )
    return Result(
        returncode=int(number),
        stdout=text.decode("utf-8", "replace"),
        files=_files(content),
        console=console,
        release=wanted.release,
        version=wanted.version,
        seconds=seconds,
    )


def kernel_headers(series: str, arch: str) -> Path:
    """The archive with the headers that modules for this kernel, and bcc, are compiled with. GuestFailed."""
    wanted = kernel(series, arch)
    debian = MACHINES[arch].debian
    name = f"headers-{series}-{debian}"
    with _made(name) as folder:
        if folder:
            apt = Apt(SUITES[series], debian)
            package = f"linux-headers-{wanted.release}"
            if not apt.names(re.escape(package)):
                raise GuestFailed(
                    f"Debian {apt.suite} has no {package} any more; "
                    "`python -m tests.kernel fetch --renew` fetches the kernel that it has now"
                )
            packages = [package, *apt.headers_below(package)]
            _say(f"fetching the headers of Linux {wanted.release} (10 MB)")
            with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
                root = Path(temporary) / "root"
                _unpack(apt.download(packages, Path(temporary)), root)
                _pack_tree(root, folder / "cpio")
    return cache() / name / "cpio"


def _add_checkout(archive: _Cpio) -> None:
    for top in _CHECKOUT:
        if (ROOT / top).is_file():
            archive.add_file(f"bindsnoop/{top}", ROOT / top)
        for folder, folders, files in os.walk(ROOT / top):
            folders[:] = sorted(name for name in folders if name not in {"__pycache__", "golden"})
            for name in sorted(files):
                path = Path(folder) / name
                archive.add_file(f"bindsnoop/{path.relative_to(ROOT)}", path)


def _boot(
    command: Sequence[str], mark: bytes, timeout_s: float, echo: Callable[[str], object] | None
) -> tuple[bytes, str]:
    """Everything that the guest sent, and why it is not whole, empty when it may be."""
    # A test run that is killed must not leave a guest behind.
    if shutil.which("setpriv"):
        command = ["setpriv", "--pdeathsig", "KILL", *command]
    deadline = time.monotonic() + timeout_s
    said = bytearray()
    shown = 0
    with (
        tempfile.TemporaryFile() as complaints,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=complaints) as qemu,
        selectors.DefaultSelector() as selector,
    ):
        assert qemu.stdout
        selector.register(qemu.stdout, selectors.EVENT_READ)
        try:
            while True:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    return bytes(said), f"had not ended after {timeout_s:g} s"
                chunk = os.read(qemu.stdout.fileno(), 1 << 16)
                if not chunk:
                    break
                said += chunk
                if echo and shown >= 0:
                    end = said.find(b"\n" + mark)
                    upto = end if end >= 0 else said.rfind(b"\n") + 1
                    echo(said[shown:upto].decode("utf-8", "replace"))
                    shown = -1 if end >= 0 else upto
        finally:
            qemu.kill()
        complaints.seek(0)
        complaint = complaints.read().decode("utf-8", "replace").strip()
    return bytes(said), f"did not start: {complaint}" if complaint and not said else ""


def _files(content: bytes) -> dict[str, bytes]:
    if not content:
        return {}
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        members = [(member, tar.extractfile(member)) for member in tar if member.isfile()]
        return {member.name.removeprefix("./"): file.read() for member, file in members if file}


def needs(program: str, *packages: str) -> None:
    """Installs the Debian packages that give ``program`` when it is missing; GuestFailed when that is not possible."""
    if shutil.which(program):
        return
    wanted = " ".join(packages)
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise GuestFailed(f"{program} is missing: install it, on Debian by `apt-get install {wanted}`")
    _say(f"installing {wanted}, which gives {program}, by apt-get (once)")
    with (cache() / ".apt-get.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        _done(["apt-get", "-q=2", "update"], "apt-get cannot read the list of packages", env=environment)
        install = ["apt-get", "-q=2", "install", "--no-install-recommends", "-y", *packages]
        _done(install, f"apt-get cannot install {wanted}", env=environment)
    if not shutil.which(program):
        raise GuestFailed(f"{program} is missing, and `apt-get install {wanted}` did not give it")
