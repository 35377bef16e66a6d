"""The wheel and the sdist carry everything that the commands need."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.commands import agent_running

ROOT = Path(__file__).parent.parent
COMMANDS = ("bindsnoop-agent", "bindsnoop-replay", "bindsnoop")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist of this checkout."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [Path(sys.executable).parent / "hatchling", "build", "-d", folder], cwd=ROOT, check=True, capture_output=True
    )
    return folder


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``bin`` of an empty environment into which the wheel was installed, with its pinned dependencies."""
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [folder / "bin/python", "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "--require-hashes", "-r", ROOT / "requirements.txt"], check=True)
    # --no-index: what the wheel asks for must be met by the pinned list alone.
    subprocess.run([*pip, "--no-index", next(built.glob("*.whl"))], check=True)
    return folder / "bin"


def test_wheel_carries_object_and_schemas(built: Path) -> None:
    """The compiled BPF object and every schema lie inside the package."""
    names = set(zipfile.ZipFile(next(built.glob("*.whl"))).namelist())
    schemas = {f"pipeline/carried/schemas/{path.name}" for path in (ROOT / "schemas").iterdir()}

    assert {"pipeline/carried/bpf/bindsnoop.bpf.o", *schemas} <= names


def test_sdist_carries_object_and_schemas(built: Path) -> None:
    """The sdist has them at their place in the repository, with the sources of the object."""
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}

    assert {"bpf/bindsnoop.bpf.o", "bpf/bindsnoop.bpf.c", "bpf/bind_event.h", "schemas/bind_event.avsc"} <= names


@pytest.mark.parametrize("command", COMMANDS)
def test_installed_command_runs_from_another_folder(installed: Path, tmp_path: Path, command: str) -> None:
    """Each command of the wheel answers from a folder that has nothing to do with the checkout."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "BINDSNOOP"))}
    where = subprocess.run(
        [installed / "python", "-c", "import pipeline; print(pipeline.__file__)"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    done = subprocess.run(
        [installed / command, "--help"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )

    assert str(installed.parent) in where.stdout
    assert (0, "") == (done.returncode, done.stderr)
    assert f"usage: {command} " in done.stdout.lower()


def test_installed_commands_do_the_main_job(installed: Path, tmp_path: Path) -> None:
    """The wheel's agent loads its own BPF object and writes; its replay reads its own schema and shows the bind."""
    files = tmp_path / "binds"
    with agent_running("--files", str(files), bin=installed, cwd=tmp_path), socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    done = subprocess.run(
        [installed / "bindsnoop-replay", "--files", files, "-P", str(port)],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip

    assert [str(os.getpid())] == [line.split()[1] for line in done.stdout.splitlines()[1:]]
