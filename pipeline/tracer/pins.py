"""What outlives an agent: ring, counters, programs and links, as files of a bpffs.

In: a folder of a bpffs (``--pins``). Out: a folder below it for each tracer, ``<epoch>-<digest>``. One is filled under
another name and renamed when it is whole, and renamed back before it is emptied: what has such a name is whole, and
what an agent that was killed left half made is removed by the next one. Texts are symbolic links, for a bpffs has no
ordinary files. What is pinned is not known here, only names.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from pipeline.errors import TracerUnavailable
from pipeline.tracer import host

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_MAGIC: Final = 0xCAFE4A11
_HALF: Final = "half-"
_WHOLE: Final = re.compile(r"([0-9a-f]{16})-([0-9a-f]{16})", re.ASCII)
_MOST_TEXT: Final = 4000
"""Bytes that a symbolic link holds."""


class NoPins(TracerUnavailable):
    """Nothing can be kept here beyond the end of the process; the sentence says why."""


class Folder(NamedTuple):
    """One tracer's pins, whole. ``digest`` says of which programs and settings they are."""

    path: Path
    epoch: str
    digest: str

    def text(self, name: str) -> str:
        """What ``write`` wrote under this name, empty when it is not there."""
        try:
            return os.readlink(self.path / name)  # noqa: PTH115 - a Path would drop slashes
        except OSError:
            return ""

    def names(self, prefix: str) -> list[str]:
        """Names that begin so, without the prefix, in order."""
        return sorted(pin.name.removeprefix(prefix) for pin in self.path.iterdir() if pin.name.startswith(prefix))

    def remove(self) -> None:
        """Everything in it goes, and with that what nothing else holds in the kernel."""
        with contextlib.suppress(FileNotFoundError):
            half = self.path.with_name(_HALF + self.path.name)
            self.path.rename(half)
            shutil.rmtree(half)


def write(path: Path, text: str) -> None:
    """Keeps a text, cut where it is too long. OSError."""
    kept = text.encode()[:_MOST_TEXT].decode(errors="ignore")
    if kept:
        path.symlink_to(kept)


class Place:
    """The folder below which tracers are pinned; ``opened`` gives it, and locks it for one process."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def folders(self) -> list[Folder]:
        """Those that are whole, by epoch."""
        found = [(path, _WHOLE.fullmatch(path.name)) for path in sorted(self.path.iterdir())]
        return [Folder(path, match[1], match[2]) for path, match in found if match]

    def sweep(self) -> int:
        """Removes what was left half made; gives how many there were. What somebody is making just now stays."""
        count = 0
        for path in list(self.path.iterdir()):
            if path.name.startswith(_HALF):
                with contextlib.suppress(OSError), _locked(path):
                    shutil.rmtree(path)
                    count += 1
        return count

    @contextlib.contextmanager
    def making(self, epoch: str, digest: str, *, keep: bool = True) -> Iterator[Path]:
        """A folder to be filled, which has its name when the block ends, or is gone when that or the block fails.

        NoPins when it cannot be made.
        """
        whole = self.path / f"{epoch}-{digest}"
        half = self.path / f"{_HALF}{whole.name}-{os.getpid()}"
        try:
            half.mkdir(mode=0o700)
            with _locked(half):
                yield half
                if keep:
                    half.rename(whole)
        except OSError as error:
            raise NoPins(f"{half} cannot be made ({error.strerror})") from error
        finally:
            shutil.rmtree(half, ignore_errors=True)


@contextlib.contextmanager
def opened(path: Path, *, alone: bool = True) -> Iterator[Place]:
    """The place at ``path``, which is made where it is missing; ``alone`` keeps every other process out.

    NoPins when there is no bpffs that this process may write; TracerUnavailable while another process holds the place.
    """
    _in_bpffs(path)
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        dots = "; names in a bpffs hold no dots" if error.errno == errno.EPERM and "." in path.name else ""
        raise NoPins(f"{path} cannot be made ({error.strerror}{dots})") from error
    if path.stat().st_uid != os.geteuid():
        raise NoPins(f"{path} belongs to another user")
    with contextlib.ExitStack() as held:
        if alone:
            try:
                held.enter_context(_locked(path))
            except BlockingIOError as error:
                raise TracerUnavailable(
                    f"another agent lives on the pins below {path}; a node has one agent, stop that one first"
                ) from error
            except OSError as error:
                raise NoPins(f"{path} cannot be opened ({error.strerror})") from error
        yield Place(path)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """OSError, BlockingIOError when somebody else has it. A process that ends lets go."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _in_bpffs(path: Path) -> None:
    """NoPins unless the part of the path that exists lies in a bpffs."""
    statfs, answer = ctypes.CDLL(None).statfs, ctypes.create_string_buffer(256)
    any(not statfs(os.fsencode(above), answer) for above in (path, *path.absolute().parents))
    if int.from_bytes(answer.raw[:8], sys.byteorder) != _MAGIC:
        raise NoPins(
            f"{path} is in no bpffs; mount one (mount -t bpf bpf /sys/fs/bpf) or, in a pod, mount the node's "
            "/sys/fs/bpf"
        )


def remove_all(path: Path, unread: Callable[[Folder], str]) -> list[str]:
    """Removes every tracer that is pinned below ``path``, and ``path``; gives a sentence about each.

    ``unread`` says what is lost with one. TracerUnavailable while a process lives on them, or when they cannot be
    removed.
    """
    probes: list[str] = []
    try:
        with opened(path) as place:
            half = place.sweep()
            said = [f"{half} left half made"] if half else []
            for folder in place.folders():
                said.append(f"epoch {folder.epoch}, tier {folder.text('tier')}{unread(folder)}")
                probes += folder.text("probes").split()
                folder.remove()
            with contextlib.suppress(OSError):
                path.rmdir()
    except OSError as error:
        raise TracerUnavailable(f"the pins below {path} cannot be removed ({error.strerror})") from error
    if probes:
        host.remove_return_probes(probes, wait_secs=30.0)
    return said
