"""Kernel headers for bcc: those of the running kernel where they are installed, else those of another kernel.

What is compiled against another kernel's headers must not be attached to this one's functions, but it can be examined,
and loaded where it reads nothing of the kernel's.
"""

from __future__ import annotations

import contextlib
import os
import platform
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# Debian divides the headers of a kernel in two; these folders are in both.
_DIVIDED = ("include", "arch", "arch/{0}", "arch/{0}/include")


def own() -> bool:
    """Whether the running kernel's own headers are here."""
    return any(Path(f"/lib/modules/{platform.release()}", name, "include").is_dir() for name in ("build", "source"))


@contextlib.contextmanager
def headers() -> Iterator[None]:
    """bcc finds headers in the block, by the environment where they are another kernel's."""
    if own():
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        merge(Path(folder))
        with source(Path(folder)):
            yield


@contextlib.contextmanager
def source(folder: Path) -> Iterator[None]:
    """bcc takes the headers in this folder, whatever kernel runs."""
    before = os.environ.get("BCC_KERNEL_SOURCE")
    os.environ["BCC_KERNEL_SOURCE"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["BCC_KERNEL_SOURCE"]
        else:
            os.environ["BCC_KERNEL_SOURCE"] = before


def merge(folder: Path) -> None:
    """Fills ``folder`` with links to Debian's headers of some kernel, as one tree."""
    architecture, debian = {"x86_64": ("x86", "amd64"), "aarch64": ("arm64", "arm64")}[platform.machine()]
    flavours = sorted(Path("/usr/src").glob(f"linux-headers-*-cloud-{debian}"))
    if not flavours:
        pytest.fail(f"no kernel headers are installed; install them with apt-get install linux-headers-cloud-{debian}")
    common = flavours[-1].with_name(flavours[-1].name.replace(f"cloud-{debian}", "common"))
    divided = {name.format(architecture) for name in _DIVIDED}
    for name in ("", *sorted(divided)):
        (folder / name).mkdir(exist_ok=True)
        for tree in (flavours[-1], common):
            for entry in (tree / name).iterdir() if (tree / name).is_dir() else ():
                place = folder / name / entry.name
                if str(place.relative_to(folder)) not in divided and not place.is_symlink():
                    place.symlink_to(entry)
