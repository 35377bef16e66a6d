"""What the commands say of themselves: --help, --version and the completion of the shells."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from pipeline import __version__, config, event

COMMANDS: tuple[config.Command, ...] = get_args(config.Command)
ASK = "import sys; from pipeline import config; config.parse(sys.argv[1], sys.argv[2:], {})"


def printed(command: str, *argv: str, environ: dict[str, str] | None = None, capsys: pytest.CaptureFixture[str]) -> str:
    """What a command prints before it ends well."""
    with pytest.raises(SystemExit) as ended:
        config.parse(command, argv, environ or {}, system_file=Path("/nonexistent"))  # type: ignore[call-overload]
    assert ended.value.code == 0
    return capsys.readouterr().out


# --- help ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_option_and_ends_with_examples_and_opts(
    command: config.Command, capsys: pytest.CaptureFixture[str]
) -> None:
    """And every column where columns are shown."""
    text = printed(command, "--help", capsys=capsys)

    assert [flag for option in config.options_of(command).values() for flag in option.flags if flag not in text] == []
    examples, legend = text.index("\nExamples:\n"), text.index("\nOPTS is rRNTF")
    assert examples < legend
    assert text.endswith("F IP_FREEBIND.\n")
    words = set(re.findall(r"[a-z0-9_.]*[a-z0-9_]", text))
    assert command == "agent" or {name for name in event.columns() if name not in words} == set()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_example_of_the_help_works(command: config.Command) -> None:
    """What a reader copies is accepted."""
    for line, _ in config.EXAMPLES[command]:
        variables, _, rest = line.partition(config.PROGRAMS[command])
        argv = rest.partition("|")[0].split()
        environ = dict(word.split("=", 1) for word in variables.split())

        config.parse(command, argv, environ, system_file=Path("/nonexistent"))


@pytest.mark.parametrize("width", [60, 80, 100, 500])
def test_help_fits_the_terminal(width: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Lines are broken where they can be: only what is copied as a whole, flags and examples, may be longer."""
    text = printed("replay", "-h", environ={"COLUMNS": str(width)}, capsys=capsys)

    long = [line for line in text.splitlines() if len(line) > min(width, 100)]
    assert [line for line in long if not line.startswith(("  bindsnoop-replay ", "      --"))] == []


def test_help_wins_over_wrong_values(capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever asks for help may be in the middle of something wrong."""
    assert printed("replay", "-P=0", "--help", capsys=capsys).startswith("Usage: bindsnoop-replay")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """Name and version."""
    assert printed("live", "--version", capsys=capsys) == f"bindsnoop {__version__}\n"


def test_help_answers_at_once() -> None:
    """Within 0.15 s of work, whatever else the machine does, and without loading what only real work needs."""
    heavy = "print({'pyarrow', 'numpy', 'rich', 'confluent_kafka'} & set(sys.modules))"
    code = ASK.replace("; config.parse", f"; {heavy}; config.parse")
    before = os.times()

    answer = subprocess.run(
        [sys.executable, "-c", code, "replay", "--help"], capture_output=True, text=True, check=True
    )

    after = os.times()
    assert answer.stdout.startswith("set()\n")
    assert after.children_user + after.children_system - before.children_user - before.children_system < 0.15


# --- completion ---------------------------------------------------------------------------------------------------


def script(command: config.Command, shell: str) -> str:
    """The completion script as the command prints it."""
    return subprocess.run(
        [sys.executable, "-c", ASK, command, "--completion", shell], capture_output=True, text=True, check=True
    ).stdout


def bash_offers(command: config.Command, *words: str, folder: Path) -> list[str]:
    """What a real bash offers for the last of the words."""
    program = config.PROGRAMS[command]
    quoted = " ".join(f"'{word}'" for word in (program, *words))
    ask = f"""
        source completion
        COMP_WORDS=({quoted}) COMP_CWORD={len(words)}
        compopt() {{ :; }}
        function=$(complete -p {program} | sed 's/.*-F \\([^ ]*\\) .*/\\1/')
        $function
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    (folder / "completion").write_text(script(command, "bash"))
    (folder / "data.avro").touch()
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True, cwd=folder)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("command", "words", "offers"),
    [
        ("replay", ["--fo"], ["--follow"]),
        ("replay", ["--layout", ""], ["trace-bind", "ig", "bindsnoop"]),
        ("replay", ["--layout", "="], ["trace-bind", "ig", "bindsnoop"]),
        ("replay", ["--layout", "=", "i"], ["ig"]),
        ("replay", ["-o", "j"], ["json", "json-full"]),
        ("replay", ["-o", "custom-columns", "=", "mount"], ["mountnsid"]),
        ("replay", ["-o", "custom-columns", "=", "pid,com"], ["pid,comm"]),
        ("replay", ["-i", "=", "f"], ["false"]),
        ("replay", ["-T", "--tai"], ["--tail"]),
        ("replay", ["--files", "data"], ["data.avro"]),
        ("replay", ["--topic", ""], []),
        ("agent", ["--keep"], ["--keep-bytes", "--keep-age"]),
        ("agent", ["--log-level", "e"], ["error"]),
        ("agent", ["--fo"], []),
        ("agent", ["--probe", "-o", ""], ["text", "json"]),
        ("live", ["--tracer", ""], ["auto", "fexit", "kprobe", "tracepoint", "bcc"]),
    ],
)
def test_bash_offers(command: config.Command, words: list[str], offers: list[str], tmp_path: Path) -> None:
    """Flags, values, columns and files, as far as they have been typed; bash divides words at an equals sign."""
    assert bash_offers(command, *words, folder=tmp_path) == offers


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("--fo", "--follow"),
        ("--layout tr", "--layout trace-bind"),
        ("-o custom-columns=pid,mount", "-o custom-columns=pid,mountnsid"),
    ],
)
def test_zsh_offers(typed: str, completed: str, tmp_path: Path) -> None:
    """A real zsh completes a line that is typed into it, the first one too."""
    (tmp_path / "_bindsnoop-replay").write_text(script("replay", "zsh"))
    terminal, theirs = pty.openpty()
    argv = ["setsid", "--ctty", "zsh", "-f", "-i"]
    shell = subprocess.Popen(argv, stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, "TERM": "vt100"})
    os.close(theirs)

    def until(mark: str) -> str:
        seen = ""
        while mark not in seen and select.select([terminal], [], [], 20)[0]:
            seen += os.read(terminal, 1 << 16).decode(errors="replace")
        return seen

    try:
        os.write(terminal, f"fpath=({tmp_path} $fpath); autoload -Uz compinit; compinit -D -u; echo re''ady\n".encode())
        until("ready\r\n")
        os.write(terminal, f"bindsnoop-replay {typed}\t".encode())

        assert completed in until(completed)
    finally:
        shell.kill()
        shell.wait()
        os.close(terminal)
