"""What the commands say on standard error: log lines, the progress of a replay, its closing line.

In: sentences with values, and how far a replay has come. Out: text on a stream, quiet when healthy. Whatever the
values contain, it is one line without control characters. Standard output is never touched: that is for data.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import IO, TYPE_CHECKING, NamedTuple

from pipeline.event import one_line

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

LEVELS = ("error", "warn", "info", "debug")
"""From the few lines to the many. error: data is lost or an operator is needed. warn: unexpected, nothing is lost."""


class Log:
    """Log lines: time, level, a sentence, then its values as ``key=value`` (logfmt).

    ``level`` is one of LEVELS; lines of a later one are not written. ``now`` gives seconds since 1970. A stream that
    is closed or full ends nothing: talk that nobody can hear must not stop the work.
    """

    def __init__(self, level: str, stream: IO[str], *, now: Callable[[], float] = time.time) -> None:
        self._last = LEVELS.index(level)
        self._stream = stream
        self._now = now

    def error(self, sentence: str, /, **values: object) -> None:
        """Data is lost, or an operator is needed."""
        self.say("error", sentence, **values)

    def warn(self, sentence: str, /, **values: object) -> None:
        """Unexpected, and nothing is lost."""
        self.say("warn", sentence, **values)

    def info(self, sentence: str, /, **values: object) -> None:
        """A change of state that an operator wants to find again."""
        self.say("info", sentence, **values)

    def debug(self, sentence: str, /, **values: object) -> None:
        """For whoever looks for a defect."""
        self.say("debug", sentence, **values)

    def say(self, level: str, sentence: str, /, **values: object) -> None:
        """A line of a level that is known only when it is said."""
        if LEVELS.index(level) > self._last:
            return
        when = f"{datetime.fromtimestamp(self._now(), UTC):%Y-%m-%dT%H:%M:%S.%f}"[:23]
        said = "".join(f" {key}={_logfmt(value)}" for key, value in values.items())
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(f"{when}Z {level.upper():5} {one_line(sentence)}{said}\n")
            self._stream.flush()


class Sparing:
    """What somebody who tries again and again has to say: each sentence at once, then at most once in ten minutes.

    Two sentences are the same when they begin alike: what comes after the first semicolon is detail. Good news, a
    sentence of level info, makes everything worth saying again.
    """

    _AGAIN_SECS = 600.0

    def __init__(self, say: Callable[[str, str], None], *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._say = say
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._said: dict[str, float] = {}

    def __call__(self, level: str, sentence: str) -> None:
        """Say it, or not; from any thread."""
        now = self._monotonic()
        with self._lock:
            if level == "info":
                self._said.clear()
            else:
                self._said = {said: at for said, at in self._said.items() if now - at < self._AGAIN_SECS}
                begins = sentence.partition(";")[0]
                if begins in self._said:
                    return
                self._said[begins] = now
        self._say(level, sentence)


def _logfmt(value: object) -> str:
    text = "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    if re.fullmatch(r'[^\s"=\\]+', text) and text.isprintable():
        return text
    quoted = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{one_line(quoted)}"'


class Progress:
    """How far a replay has come, as a bar with rate and time left; only on a terminal, and only when it lasts.

    ``at(events, share)`` says how many events were read, and what share of the source is behind, or None where that is
    not known. ``cleared()`` is the context in which others may write to the same terminal. Nothing is drawn in the
    first 0.7 seconds, so that a short replay looks like a command that simply answers. ``monotonic`` gives seconds.
    """

    _WAIT_SECS = 0.7
    _REDRAW_SECS = 0.1

    def __init__(
        self,
        stream: IO[str],
        *,
        wanted: bool = True,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream
        self._monotonic = monotonic
        self._shown = wanted and stream.isatty()
        self._started = monotonic()
        self._due = self._started + self._WAIT_SECS
        self._bar: Bar | None = None
        self._drawn = False

    def at(self, events: int, share: float | None = None, also: str = "") -> None:
        """So many events were read; ``share``, from 0 to 1, of the source is behind; ``also`` is said beside it."""
        now = self._monotonic()
        if self._shown and now >= self._due:
            self._due = now + self._REDRAW_SECS
            self._draw(events, share, also)

    @contextlib.contextmanager
    def cleared(self) -> Iterator[None]:
        """The bar is off the terminal in here; it comes back when there is more to say."""
        self.close()
        yield

    def close(self) -> None:
        """Take the bar off the terminal."""
        if self._bar is not None and self._drawn:
            self._bar.stop()
            self._drawn = False

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def seconds(self) -> float:
        """Time since the start."""
        return self._monotonic() - self._started

    def _draw(self, events: int, share: float | None, also: str) -> None:
        if self._bar is None:
            self._bar = _bar(self._stream, self._monotonic)
            self._bar.add_task("", total=None)
        said = f"{_count(events)} events, {_count(events / max(self.seconds, 1e-9))}/s"
        if share:
            said += f", {_span(self.seconds * (1 - share) / share)} left"
        said += f", {also}" if also else ""
        total = None if share is None else 1
        self._bar.update(self._bar.task_ids[0], completed=share or 0, total=total, description=said)
        if not self._drawn:
            self._bar.start()
            self._drawn = True
        self._bar.refresh()


def _bar(stream: IO[str], monotonic: Callable[[], float]) -> Bar:
    # Only a replay that lasts pays for this import.
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bar

    return Bar(
        BarColumn(),
        TextColumn("{task.description}", markup=False),
        console=Console(file=stream, force_terminal=True),
        auto_refresh=False,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
        get_time=monotonic,
    )


class Totals(NamedTuple):
    """What a replay did: events ``read`` and ``shown``, failed attempts that were hidden, and what was skipped.

    ``skipped`` counts by reason what could not be read. ``copies`` of the events read were there before, and
    ``contradictions`` of them say something else than another event with the same identity.
    """

    read: int
    shown: int
    hidden_failures: int
    skipped: Mapping[str, int]
    seconds: float
    copies: int = 0
    contradictions: int = 0


def closing_line(totals: Totals, *, terminal: bool) -> str | None:
    """The last line of a replay, without its newline; where there is no terminal only what could not be read."""
    said = []
    if terminal:
        said.append(f"{_count(totals.read)} read and {_count(totals.shown)} shown in {_span(totals.seconds)}")
        if totals.hidden_failures:
            attempts = "attempt is" if totals.hidden_failures == 1 else "attempts are"
            said.append(f"{_count(totals.hidden_failures)} failed {attempts} hidden, -i=false shows them")
        if totals.copies:
            copies = "was a copy and is" if totals.copies == 1 else "were copies and are"
            said.append(f"{_count(totals.copies)} {copies} not shown again")
    if totals.contradictions:
        events = "event says" if totals.contradictions == 1 else "events say"
        said.append(f"{_count(totals.contradictions)} {events} something else than another of the same identity")
    skipped = sum(totals.skipped.values())
    if skipped:
        reasons = ", ".join(f"{_count(number)} {one_line(reason)}" for reason, number in totals.skipped.items())
        said.append(f"{_count(skipped)} could not be read: {reasons}")
    return "; ".join(said) + "." if said else None


def _count(number: float) -> str:
    return f"{number:,.0f}"


def _span(secs: float | None) -> str:
    if secs is None:
        return ""
    if secs < 60:
        return f"{secs:.1f} s"
    minutes, secs = divmod(round(secs), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{secs:02}"
