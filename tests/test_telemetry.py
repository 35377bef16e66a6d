"""Log lines and progress: what is said, when, and that it stays on its line."""

from __future__ import annotations

import io
import os
import pty
import sys
from collections.abc import Iterator
from typing import IO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.telemetry import LEVELS, Log, Progress, Sparing, Totals, closing_line


class Clock:
    """A clock that goes on when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal:
    """A real terminal: ``stream`` is what a command writes to, ``seen()`` what has come out since the last call."""

    def __init__(self) -> None:
        self._ours, theirs = pty.openpty()
        self.stream: IO[str] = os.fdopen(theirs, "w")

    def seen(self) -> str:
        # What is written to a terminal arrives in pieces: read up to a mark of our own.
        print("<mark>", end="", file=self.stream, flush=True)
        found = ""
        while not found.endswith("<mark>"):
            found += os.read(self._ours, 1 << 16).decode()
        return found.removesuffix("<mark>")

    def close(self) -> None:
        self.stream.close()
        os.close(self._ours)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    """A terminal of its own."""
    opened = Terminal()
    yield opened
    opened.close()


# --- log lines ----------------------------------------------------------------------------------------------------


def said(level: str, sentence: str, **values: object) -> str:
    """The line of a sentence, from a log that says everything."""
    stream = io.StringIO()
    Log("debug", stream, now=lambda: 1767323045.5).say(level, sentence, **values)
    return stream.getvalue()


def test_a_line_is_time_level_sentence_values() -> None:
    """The values are logfmt: quoted where they must be."""
    line = said(
        "warn", "The broker does not answer.", broker="kafka:9092", secs=1.5, ok=False, why="no route", none=None
    )

    assert line == (
        "2026-01-02T03:04:05.500Z WARN  The broker does not answer. "
        'broker=kafka:9092 secs=1.5 ok=false why="no route" none=""\n'
    )


def test_a_value_cannot_pretend_to_be_another() -> None:
    """Quotes and backslashes are escaped, so that the end of a value is where it ends."""
    assert said("info", "S.", a='x" b="y\\').endswith(' a="x\\" b=\\"y\\\\"\n')


@given(st.text(), st.text(), st.sampled_from(LEVELS))
def test_every_line_is_one_line(sentence: str, value: str, level: str) -> None:
    """Whatever a broker, a file or a process has put into it, surrogates included."""
    line = said(level, sentence + "\udcff\n\x1b", value=value)

    assert line.endswith("\n")
    assert line[:-1].isprintable()


@pytest.mark.parametrize(("level", "lines"), [("error", 1), ("warn", 2), ("info", 3), ("debug", 4)])
def test_levels(level: str, lines: int) -> None:
    """A log says its own level and what is worse."""
    stream = io.StringIO()
    log = Log(level, stream)

    for say in (log.debug, log.info, log.warn, log.error):
        say("Something happened.")

    assert stream.getvalue().count("\n") == lines


def test_a_closed_stream_ends_nothing() -> None:
    """The reader of standard error may be gone; the agent is still needed."""
    reading, writing = os.pipe()
    os.close(reading)
    gone = os.fdopen(writing, "w", buffering=1)
    closed = io.StringIO()
    closed.close()

    Log("info", gone).error("Nobody hears this.")
    Log("info", closed).error("Nor this.")

    with pytest.raises(BrokenPipeError):
        gone.close()


# --- sentences of whoever tries again -----------------------------------------------------------------------------


def test_a_sentence_is_said_again_after_ten_minutes() -> None:
    """However often it is said; another one is said at once, details behind a semicolon do not make another one."""
    lines: list[tuple[str, str]] = []
    clock = Clock()
    say = Sparing(lambda level, sentence: lines.append((level, sentence)), monotonic=clock)
    for _ in range(25):
        say("warn", "Kafka is away")
        say("warn", "Kafka is away; 7 events are kept")
        say("error", "the registry is away")
        clock.now += 60

    assert lines == [("warn", "Kafka is away"), ("error", "the registry is away")] * 3


def test_good_news_makes_trouble_worth_saying_again() -> None:
    """What has passed and comes again is said again, and good news is always said."""
    lines: list[str] = []
    say = Sparing(lambda _, sentence: lines.append(sentence))
    for _ in range(2):
        say("warn", "Kafka is away")
        say("warn", "Kafka is away")
        say("info", "Kafka works again")

    assert lines == ["Kafka is away", "Kafka works again"] * 2


# --- progress -----------------------------------------------------------------------------------------------------


def test_a_short_replay_draws_nothing(terminal: Terminal) -> None:
    """Before 0.7 s a replay simply answers."""
    clock = Clock()
    progress = Progress(terminal.stream, monotonic=clock)

    for tenths in range(7):
        clock.now = 100 + tenths / 10
        progress.at(tenths, tenths / 1000)
    progress.close()

    assert terminal.seen() == ""


def test_a_long_replay_shows_rate_and_time_left(terminal: Terminal) -> None:
    """After 1 s, with a quarter behind, three more remain."""
    clock = Clock()
    progress = Progress(terminal.stream, monotonic=clock)

    clock.now += 1
    progress.at(500_000, 0.25)

    assert "500,000 events, 500,000/s, 3.0 s left" in terminal.seen()


def test_it_is_drawn_ten_times_a_second_at_most(terminal: Terminal) -> None:
    """However often a replay says how far it is."""
    clock = Clock()
    progress = Progress(terminal.stream, monotonic=clock)
    clock.now += 1
    progress.at(1)
    terminal.seen()

    clock.now += 0.09
    progress.at(2)

    assert terminal.seen() == ""
    clock.now += 0.02
    progress.at(3)
    assert "3 events" in terminal.seen()


def test_without_a_known_end_there_is_no_time_left(terminal: Terminal) -> None:
    """A rate is still worth showing; a share that becomes known is used."""
    clock = Clock()
    progress = Progress(terminal.stream, monotonic=clock)
    clock.now += 1
    progress.at(10)

    unknown = terminal.seen()
    clock.now += 1
    progress.at(20, 0.5)
    known = terminal.seen()
    clock.now += 1
    progress.at(30, 0.5, "7 new")

    assert "10 events, 10/s" in unknown
    assert "left" not in unknown
    assert "20 events, 10/s, 2.0 s left" in known
    assert "30 events, 10/s, 3.0 s left, 7 new" in terminal.seen()


def test_others_write_to_a_clean_line(terminal: Terminal) -> None:
    """The bar is erased before a row is written to the same terminal, and the cursor shown; then the bar comes back."""
    clock = Clock()
    progress = Progress(terminal.stream, monotonic=clock)
    clock.now += 1
    progress.at(1)
    terminal.seen()

    with progress.cleared():
        between = terminal.seen()
        terminal.stream.write("row\n")
    clock.now += 1
    progress.at(2)

    assert between.endswith("\x1b[2K")
    assert "\x1b[?25h" in between
    after = terminal.seen()
    assert after.startswith("row\r\n")
    assert "2 events" in after
    progress.close()
    assert terminal.seen().endswith("\x1b[2K")


def test_without_a_terminal_nothing_is_drawn(terminal: Terminal) -> None:
    """Nor when it is not wanted."""
    clock = Clock()
    stream = io.StringIO()
    bars = [
        Progress(stream, monotonic=clock),
        Progress(terminal.stream, wanted=False, monotonic=clock),
    ]
    clock.now += 10

    for progress in bars:
        with progress:
            progress.at(5)

    assert stream.getvalue() + terminal.seen() == ""


def test_rich_is_loaded_only_when_it_draws() -> None:
    """A replay that answers at once does not wait for it."""
    import subprocess

    code = "import sys; from pipeline import telemetry as t; t.Progress(sys.stderr).at(1); print('rich' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


# --- the closing line ---------------------------------------------------------------------------------------------


def test_the_closing_line_on_a_terminal() -> None:
    """Totals, hidden failures and how to see them, what could not be read and why."""
    totals = Totals(2_000_000, 12, 3, {"truncated": 1, "unknown schema id 7": 2}, 4.21)

    assert closing_line(totals, terminal=True) == (
        "2,000,000 read and 12 shown in 4.2 s; 3 failed attempts are hidden, -i=false shows them; "
        "3 could not be read: 1 truncated, 2 unknown schema id 7."
    )
    assert closing_line(Totals(1, 1, 0, {}, 3725), terminal=True) == "1 read and 1 shown in 1:02:05."
    assert "1 failed attempt is hidden" in str(closing_line(Totals(1, 0, 1, {}, 0), terminal=True))
    assert "; 1,200 were copies and are not shown again." in str(
        closing_line(Totals(5, 1, 0, {}, 0, 1200), terminal=True)
    )


def test_without_a_terminal_only_what_could_not_be_read() -> None:
    """A script sees nothing that is no fault; a reason from a topic stays on its line."""
    assert closing_line(Totals(9, 9, 9, {}, 1, 3), terminal=False) is None
    assert closing_line(Totals(9, 9, 9, {}, 1, 3, 2), terminal=False) == (
        "2 events say something else than another of the same identity."
    )
    assert closing_line(Totals(9, 9, 9, {"bad\x1b\n": 1}, 1), terminal=False) == (
        "1 could not be read: 1 bad\\x1b\\x0a."
    )
