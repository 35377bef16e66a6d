"""What a cluster is made of, kept: a name and a recipe go in, a folder that is whole comes out.

Everything lies in ``${XDG_CACHE_HOME:-~/.cache}/bindsnoop/cluster`` and may be deleted at any time; that costs the
minutes to make it again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path


class ClusterFailed(RuntimeError):
    """Something of a cluster could not be made or did not start; the sentence says what, and what it said."""


def cache() -> Path:
    """The folder of everything that a cluster is made of."""
    place = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bindsnoop" / "cluster"
    place.mkdir(parents=True, exist_ok=True)
    return place


def digest(*recipe: str | bytes) -> str:
    """What a name in the cache ends in, so that another recipe makes another folder: 12 hex digits."""
    parts = (part.encode() if isinstance(part, str) else part for part in recipe)
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:12]


@contextlib.contextmanager
def made(name: str, lock: str | None = None) -> Iterator[Path | None]:
    """A folder to fill, which becomes ``name`` in the cache when the block ends well; None when that exists.

    What is half made is never taken for whole, and two processes may ask for the same: one makes it, the other waits.
    Who makes others of the kind ``lock`` waits too.
    """
    place = cache() / name
    if place.exists():
        yield None
        return
    with (place.parent / f".{lock or name}.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        if place.exists():
            yield None
            return
        with tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{name}-", ignore_cleanup_errors=True) as temporary:
            folder = Path(temporary) / "whole"
            folder.mkdir()
            yield folder
            folder.rename(place)


def say(sentence: str) -> None:
    """To whoever waits for it."""
    print(sentence, file=sys.stderr, flush=True)


def done(
    command: Sequence[str | Path],
    failure: str,
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    given: bytes | None = None,
    timeout: float | None = None,
) -> str:
    """Standard output of a command that got ``given`` on its input.

    ClusterFailed with ``failure`` and what it said when it fails or takes longer than ``timeout`` seconds.
    """
    try:
        ended = subprocess.run(
            command, capture_output=True, check=False, cwd=cwd, env=env, input=given, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        raise ClusterFailed(f"{failure}: it had not ended after {timeout:g} s") from None
    if ended.returncode:
        said = (ended.stderr + ended.stdout).decode("utf-8", "replace").strip()
        raise ClusterFailed(f"{failure}: {said[-3000:]}")
    return ended.stdout.decode("utf-8", "replace")
