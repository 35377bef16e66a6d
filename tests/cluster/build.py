"""The programs of a cluster: nothing goes in, folders of programs come out, of sources and packages that are pinned.

Kubernetes' own five programs are built from the Go modules that ``kubernetes/go.mod`` and ``go.sum`` name with their
hashes. etcd, containerd, runc and the CNI plug-ins are Debian's, unpacked beside the system: installed, some of them
would start as services of this machine.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tests.cluster.cache import ClusterFailed, cache, digest, done, made, say
from tests.kernel.guests import MACHINES, Apt

HERE = Path(__file__).parent
MODULE = HERE / "kubernetes"

VERSION = "1.34.4"
PROGRAMS = ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubectl", "kubelet")

# Kubernetes refuses neighbours whose version it cannot read, and reads it from here.
_STAMPED = {"gitMajor": "1", "gitMinor": VERSION.split(".")[1], "gitVersion": f"v{VERSION}", "gitTreeState": "clean"}
_LDFLAGS = " ".join(["-s", "-w", *(f"-X k8s.io/component-base/version.{name}={is_}" for name, is_ in _STAMPED.items())])

SUITE = "bookworm"
DEBS = (
    "busybox-static", "containerd", "containernetworking-plugins", "debootstrap", "etcd-client", "etcd-server", "runc",
)  # fmt: skip

# Debian 12's does not know the capability BPF.
DOCKER_SUITE = "trixie"
DOCKER_DEBS = ("docker-buildx", "docker-cli", "docker.io")

GO_SUITE = "trixie"
GO = "1.24"
"""The oldest Go that builds this Kubernetes, and the one that is fetched when this system has no newer one."""


class Programs(NamedTuple):
    """Where the programs of a cluster lie: ``kubernetes`` holds ``PROGRAMS``, ``debian`` is a root with Debian's."""

    kubernetes: Path
    debian: Path

    def kube(self, name: str) -> Path:
        """One of ``PROGRAMS``."""
        return self.kubernetes / name

    def deb(self, path: str) -> Path:
        """A file of Debian's packages, such as ``usr/bin/etcd``."""
        return self.debian / path


def programs() -> Programs:
    """All programs, made now as far as the cache has them not: about 8 minutes on two cores. ClusterFailed."""
    return Programs(kubernetes(), debian())


def kubernetes() -> Path:
    """Folder of ``PROGRAMS``, built now if the cache has it not. ClusterFailed."""
    recipe = [(MODULE / name).read_bytes() for name in ("go.mod", "go.sum")]
    name = f"kubernetes-{VERSION}-{digest(*recipe, _LDFLAGS, *PROGRAMS)}"
    with made(name) as folder:
        if folder:
            go = _go()
            say(
                f"building Kubernetes {VERSION} into {cache() / name}, once: "
                "570 MiB of sources, 8 minutes on two cores, 4 GiB for that time, 395 MiB afterwards"
            )
            _build(go, folder)
    return cache() / name


def _build(go: str, folder: Path) -> None:
    """Sources and objects lie in a folder that goes away: who has no other use for Go keeps nothing of it."""
    with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as temporary:
        module = Path(temporary) / "module"
        shutil.copytree(MODULE, module)
        done(
            [
                go, "build", "-mod=readonly", "-modcacherw", "-trimpath", "-buildvcs=false", "-ldflags", _LDFLAGS,
                "-o", f"{folder}/", *(f"k8s.io/kubernetes/cmd/{program}" for program in PROGRAMS),
            ],
            f"Kubernetes {VERSION} cannot be built",
            cwd=module,
            env=_go_environment(GOMODCACHE=f"{temporary}/sources", GOCACHE=f"{temporary}/objects"),
        )  # fmt: skip


def _go_environment(**extra: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("GOFLAGS", "GOWORK"))}
    return {**kept, "CGO_ENABLED": "0", "GOTOOLCHAIN": "local", "GOWORK": "off", **extra}


def _go() -> str:
    """A Go that is new enough: this system's, else Debian's, unpacked into the cache."""
    found = shutil.which("go")
    if found and _new_enough(found):
        return found
    name = f"go-{GO}"
    with made(name) as folder:
        if folder:
            say(f"this system has no Go {GO} or newer; fetching Debian {GO_SUITE}'s (75 MB, 300 MiB unpacked)")
            _unpacked(GO_SUITE, [f"golang-{GO}-go", f"golang-{GO}-src"], folder)
            # Debian divides Go into what depends on the machine and what does not, and joins them by links.
            library, share = folder / f"usr/lib/go-{GO}", folder / f"usr/share/go-{GO}"
            for link in (path for path in library.iterdir() if path.is_symlink()):
                target = share / link.name
                link.unlink()
                link.symlink_to(target if not target.exists() else os.path.relpath(target, library))
    found = str(cache() / name / f"usr/lib/go-{GO}/bin/go")
    if not _new_enough(found):
        raise ClusterFailed(f"Kubernetes {VERSION} needs Go {GO} or newer, and Debian's does not run here; install one")
    return found


def _new_enough(go: str) -> bool:
    try:
        said = subprocess.run(
            [go, "env", "GOVERSION"], capture_output=True, text=True, check=False, env=_go_environment()
        ).stdout
    except OSError:
        return False
    version = re.match(r"go(\d+)\.(\d+)", said)
    return version is not None and tuple(map(int, version.groups())) >= tuple(map(int, GO.split(".")))


def debian() -> Path:
    """A root with the packages ``DEBS`` in it, unpacked now if the cache has it not. ClusterFailed."""
    name = f"debian-{SUITE}-{digest(*DEBS)}"
    with made(name) as folder:
        if folder:
            say(f"fetching {', '.join(DEBS)} of Debian {SUITE} into {cache() / name} (62 MB, 250 MiB unpacked)")
            _unpacked(SUITE, DEBS, folder)
    return cache() / name


def docker() -> Path:
    """A root with the packages ``DOCKER_DEBS`` in it, unpacked now if the cache has it not. ClusterFailed."""
    name = f"docker-{DOCKER_SUITE}-{digest(*DOCKER_DEBS)}"
    with made(name) as folder:
        if folder:
            say(f"fetching {', '.join(DOCKER_DEBS)} of Debian {DOCKER_SUITE} (44 MB, 190 MiB unpacked)")
            _unpacked(DOCKER_SUITE, DOCKER_DEBS, folder)
    return cache() / name


def _unpacked(suite: str, packages: Sequence[str], root: Path) -> None:
    machine = MACHINES.get(platform.machine())
    if machine is None:
        raise ClusterFailed(f"a cluster runs on {', '.join(MACHINES)}, not on {platform.machine()}")
    with tempfile.TemporaryDirectory(dir=root.parent) as temporary:
        for package in Apt(suite, machine.debian).download(packages, Path(temporary)):
            done(["dpkg-deb", "-x", package, root], f"{package.name} cannot be unpacked")


def lock() -> None:
    """Writes ``kubernetes/go.mod`` and ``go.sum`` anew for ``VERSION``. ClusterFailed.

    Kubernetes' own go.mod takes its other modules from folders of its repository; whoever requires it as a module has
    to say that they are the releases of the same day.
    """
    go = _go()
    answer = done(
        [go, "mod", "download", "-json", f"k8s.io/kubernetes@v{VERSION}"],
        f"Go cannot fetch Kubernetes {VERSION}",
        cwd=Path(tempfile.gettempdir()),
        env=_go_environment(),
    )
    text = Path(json.loads(answer)["GoMod"]).read_text(encoding="utf-8")
    staging = sorted(set(re.findall(r"^\s*(k8s\.io/\S+) => \./staging", text, re.MULTILINE)))
    (language,) = re.findall(r"^go (\S+)$", text, re.MULTILINE)
    lines = ["module bindsnoop.test/kubernetes", "", f"go {language}", "", f"godebug default=go{GO}", "", "tool ("]
    lines += [f"\tk8s.io/kubernetes/cmd/{program}" for program in PROGRAMS]
    lines += [")", "", f"require k8s.io/kubernetes v{VERSION}", "", "replace ("]
    lines += [f"\t{name} => {name} v0.{VERSION.removeprefix('1.')}" for name in staging]
    (MODULE / "go.sum").unlink(missing_ok=True)
    (MODULE / "go.mod").write_text("\n".join([*lines, ")", ""]), encoding="ascii")
    # What the programs are made of, and not what their tests would need too.
    done(
        [go, "list", "-mod=mod", "-modcacherw", "-deps", "tool"],
        "Go cannot find what the programs are made of",
        cwd=MODULE,
        env=_go_environment(),
    )
