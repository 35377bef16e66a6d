"""Images of containers without a registry: programs go in, archives as ``docker save`` writes them come out.

``busybox()`` and ``pause()`` are Debian's static busybox and nothing else, written here. ``base()`` is a small Debian
made by debootstrap, under the name that ``deploy/Dockerfile`` builds on; ``agent()`` is what that Dockerfile makes of
this checkout.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
import platform
import shutil
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.cluster import host
from tests.cluster.build import debian, docker
from tests.cluster.cache import cache, digest, done, made, say
from tests.kernel.guests import MACHINES, mirror, needs

ROOT = Path(__file__).parent.parent.parent
DOCKERFILE = ROOT / "deploy" / "Dockerfile"

BUSYBOX = "docker.io/library/busybox:latest"
PAUSE = "bindsnoop.test/pause:1"
BASE = "debian:12-slim"
AGENT = "docker.io/library/bindsnoop-agent:local"

_PASSWD = "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n"


def busybox() -> Path:
    """Archive of ``BUSYBOX``: a shell, and every applet of busybox under its name."""
    return _busybox(BUSYBOX, ["sh"])


def pause() -> Path:
    """Archive of ``PAUSE``, which holds a pod's namespaces open: it sleeps."""
    return _busybox(PAUSE, ["sleep", "inf"])


def _busybox(name: str, command: Sequence[str]) -> Path:
    program = next(path for path in (debian() / "bin/busybox", debian() / "usr/bin/busybox") if path.exists())
    place = f"image-{digest(name, *command, _PASSWD, program.read_bytes())}"
    with made(place) as folder:
        if folder:
            layer = _layer(program, done([program, "--list"], "busybox does not run here").split())
            _write(folder / "image.tar", name, command, layer)
    return cache() / place / "image.tar"


def _layer(program: Path, applets: Sequence[str]) -> bytes:
    """A root with one program in it, the same bytes every time."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:

        def add(name: str, kind: bytes, mode: int, data: bytes = b"", link: str = "") -> None:
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode, entry.size, entry.linkname = kind, mode, len(data), link
            tar.addfile(entry, io.BytesIO(data))

        for name in ("bin", "dev", "etc", "proc", "root", "run", "sys", "tmp"):
            add(name, tarfile.DIRTYPE, 0o1777 if name == "tmp" else 0o755)
        add("bin/busybox", tarfile.REGTYPE, 0o755, program.read_bytes())
        for applet in applets:
            if applet != "busybox":
                add(f"bin/{applet}", tarfile.SYMTYPE, 0o777, link="busybox")
        add("etc/passwd", tarfile.REGTYPE, 0o644, _PASSWD.encode())
    return content.getvalue()


def _write(archive: Path, name: str, command: Sequence[str], layer: bytes) -> None:
    """One layer and its description, as ``docker save`` lays them out."""
    layer_id = hashlib.sha256(layer).hexdigest()
    config = {
        "architecture": MACHINES[platform.machine()].debian,
        "os": "linux",
        "config": {"Cmd": list(command), "Env": ["PATH=/bin"], "WorkingDir": "/"},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{layer_id}"]},
        "history": [{"created_by": "tests/cluster/images.py"}],
    }
    described = json.dumps(config).encode()
    config_name = f"{hashlib.sha256(described).hexdigest()}.json"
    manifest = [{"Config": config_name, "RepoTags": [name], "Layers": [f"{layer_id}/layer.tar"]}]
    with tarfile.open(archive, mode="w") as tar:
        for path, data in (
            (config_name, described),
            (f"{layer_id}/layer.tar", layer),
            ("manifest.json", json.dumps(manifest).encode()),
        ):
            entry = tarfile.TarInfo(path)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


# --- the agent ----------------------------------------------------------------------------------------------------


def agent() -> Path:
    """Archive of ``AGENT``: what ``deploy/Dockerfile`` makes of this checkout, built now if the cache has it not.

    The first time takes about 3 minutes and the package registries; afterwards docker builds what has changed.
    """
    context = _context()
    recipe = [part for path in context for part in (str(path.relative_to(ROOT)), path.read_bytes())]
    name = f"image-agent-{digest(DOCKERFILE.read_bytes(), *recipe)}"
    with made(name, lock="image-agent") as folder:
        if folder:
            say(f"building the image of the agent into {cache() / name} (600 MB)")
            # One of an earlier checkout is of no use, and as large.
            for old in cache().glob("image-agent-*"):
                shutil.rmtree(old)
            with tempfile.TemporaryDirectory() as temporary:
                for path in context:
                    copy = Path(temporary) / path.relative_to(ROOT)
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(path, copy)
                _build(Path(temporary), folder / "image.tar")
    return cache() / name / "image.tar"


def _context() -> list[Path]:
    """The files that ``.dockerignore`` lets through, without what is compiled."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    tops = [path for line in lines if line.startswith("!") for path in ROOT.glob(line[1:])]
    inside = [path for top in tops for path in (top.rglob("*") if top.is_dir() else [top])]
    return sorted(path for path in inside if path.is_file() and path.suffix not in {".o", ".pyc"})


def _build(context: Path, archive: Path) -> None:
    with dockerd() as client:
        if not client("image", "ls", "-q", BASE):
            # Behind a proxy that opens what passes, whoever this system trusts has to be trusted in there too.
            client("import", "--change", "ENV PIP_CERT=/etc/ssl/certs/ca-certificates.crt", str(base()), BASE)
        options = ["--quiet", "--network=host", "--target=agent", f"--tag={AGENT}", f"--file={DOCKERFILE}"]
        client("build", *options, str(context))
        client("save", "--output", str(archive), AGENT)
        client("image", "prune", "--force")
        client("builder", "prune", "--force", "--keep-storage=2GB")


@dataclass
class Docker:
    """A docker daemon: its socket, and its client, which is called with the words of a command."""

    socket: Path
    command: list[str]
    environment: dict[str, str]

    def __call__(self, *words: str) -> str:
        """What the client prints. ClusterFailed."""
        return done([*self.command, *words], f"docker {words[0]} failed", env=self.environment)


@contextlib.contextmanager
def dockerd() -> Iterator[Docker]:
    """A docker daemon; stopped at the end, images stay in the cache.

    It has no network but the host's, and one process at a time has it.
    """
    programs, data = docker(), cache() / "docker"
    with contextlib.ExitStack() as stack:
        fcntl.flock(stack.enter_context((cache() / ".docker.lock").open("w")), fcntl.LOCK_EX)
        folder = stack.enter_context(host.temporary("bindsnoop-docker-"))
        path = ":".join(str(root / name) for root in (programs, debian()) for name in ("usr/sbin", "usr/bin"))
        environment = {**os.environ, "PATH": f"{path}:{os.environ['PATH']}"}
        group = "bindsnoop-docker"
        daemon = [
            str(programs / "usr/sbin/dockerd"), f"--data-root={data}", f"--exec-root={folder / 'exec'}",
            f"--pidfile={folder / 'pid'}", f"--host=unix://{folder / 'socket'}", f"--cgroup-parent=/{group}/containers",
            "--exec-opt=native.cgroupdriver=cgroupfs", "--bridge=none", "--iptables=false", "--ip6tables=false",
            "--ip-forward=false", "--ip-masq=false",
        ]  # fmt: skip
        (folder / "config.json").write_text(
            json.dumps({"cliPluginsExtraDirs": [str(programs / "usr/libexec/docker/cli-plugins")]}), encoding="utf-8"
        )
        command = [str(programs / "usr/bin/docker"), "--config", str(folder), "--host", f"unix://{folder / 'socket'}"]

        own = ["/etc/docker", "/run/containerd", "/run/docker"]
        start = stack.enter_context(host.processes(folder, group, own))
        start(["env", f"PATH={environment['PATH']}", *daemon], folder / "dockerd.log")
        host.until(lambda: host.succeeds([*command, "version"]), "dockerd", folder / "dockerd.log")
        yield Docker(folder / "socket", command, environment)


def base() -> Path:
    """A root of Debian's smallest system, packed: debootstrap's, without documentation and what apt keeps."""
    needs("wget", "wget")
    place = f"base-bookworm-{digest(*_BASE_DROPPED)}"
    with made(place) as folder:
        if folder:
            say(f"making a small Debian 12 by debootstrap into {cache() / place} (60 MB to download, 1 minute)")
            tools = debian()
            with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as temporary:
                root = Path(temporary)
                done(
                    [
                        "unshare", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child=KILL",
                        tools / "usr/sbin/debootstrap", "--variant=minbase", "bookworm", root, mirror(),
                    ],
                    "debootstrap cannot make a Debian",
                    env={**os.environ, "DEBOOTSTRAP_DIR": str(tools / "usr/share/debootstrap")},
                )  # fmt: skip
                for pattern in _BASE_DROPPED:
                    for path in root.glob(pattern):
                        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
                trusted = root / "usr/local/share/ca-certificates"
                trusted.mkdir(parents=True, exist_ok=True)
                for certificate in Path("/usr/local/share/ca-certificates").glob("*.crt"):
                    shutil.copy(certificate, trusted)
                done(
                    ["tar", "-C", root, "--exclude=./dev/*", "-cf", folder / "root.tar", "."], "tar cannot pack Debian"
                )
    return cache() / place / "root.tar"


_BASE_DROPPED = (
    "usr/share/doc/*", "usr/share/man/*", "usr/share/info/*", "usr/share/locale/*", "var/lib/apt/lists/*",
    "var/cache/apt/*.bin", "var/cache/apt/archives/*.deb", "var/log/*.log", "var/log/apt/*",
)  # fmt: skip
