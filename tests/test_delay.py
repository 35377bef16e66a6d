"""The delay line: order, how long the first waits, and what is never waited for."""

from __future__ import annotations

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from pipeline import delay
from pipeline.delay import DelayLine


def batch(*ids: str | None) -> pa.RecordBatch:
    """Binds of containers with these ids."""
    return pa.RecordBatch.from_pydict({"container_id": pa.array(ids, pa.string())})


class Line:
    """A line that waits two seconds, and the names that are known by now."""

    def __init__(self) -> None:
        self.known: set[str] = set()
        self.line: DelayLine[str] = DelayLine(lambda name: name in self.known, 2.0)

    def put(self, token: str, at: float, *ids: str | None) -> None:
        self.line.put(batch(*ids), token, at)

    def ready(self, at: float, *, pressed: bool = False) -> list[str]:
        return [token for _, token in self.line.ready(at, pressed=pressed)]


def test_what_is_known_or_of_the_host_does_not_wait() -> None:
    """A batch whose containers all have names, or that has none, is given back at once, the very same."""
    made = Line()
    made.known = {"a"}
    first = batch("a", None, "a")
    made.line.put(first, "one", 0.0)
    made.put("two", 0.0)
    found = list(made.line.ready(0.0))

    assert ["one", "two"] == [token for _, token in found]
    assert found[0][0] is first
    assert len(made.line) == 0


def test_the_first_waits_for_all_its_names_and_the_others_behind_it() -> None:
    """Order is kept: a batch that could go waits behind one that cannot."""
    made = Line()
    made.put("one", 0.0, "a", "b")
    made.put("two", 0.1, None)
    made.known = {"a"}
    before = made.ready(0.2)
    made.known = {"a", "b"}

    assert ([], ["one", "two"]) == (before, made.ready(0.3))


def test_nobody_waits_longer_than_is_allowed() -> None:
    """After its time a batch goes on without the name; the next has a time of its own."""
    made = Line()
    made.put("one", 0.0, "a")
    made.put("two", 1.0, "b")

    assert [[], ["one"], [], ["two"]] == [made.ready(at) for at in (1.99, 2.0, 2.99, 3.0)]


def test_a_container_without_a_name_is_waited_for_once() -> None:
    """What nobody knew in time makes no later batch wait, until it is known; others are still waited for."""
    made = Line()
    made.put("one", 0.0, "a")
    made.ready(2.0)
    made.put("two", 2.0, "a")
    made.put("three", 2.0, "a", "b")

    assert (["two"], ["three"]) == (made.ready(2.0), made.ready(4.0))


def test_pressed_for_room_nothing_waits() -> None:
    """Then everything goes on at once, and what did not have its time is waited for the next time."""
    made = Line()
    made.put("one", 0.0, "a")
    made.put("two", 0.0, "b")
    pressed = made.ready(0.0, pressed=True)
    made.put("three", 0.0, "a")

    assert (["one", "two"], []) == (pressed, made.ready(1.0))


def test_what_is_remembered_is_bounded() -> None:
    """However many containers stay without a name, the oldest are forgotten, and only waited for once more."""
    made = Line()
    for start in range(0, delay.GIVEN_UP_MAX + 1000, 1000):
        made.put("many", 0.0, *map(str, range(start, start + 1000)))
    made.ready(2.0)
    made.put("remembered", 2.0, *map(str, range(1000, delay.GIVEN_UP_MAX + 1000)))
    made.put("forgotten", 2.0, "999")

    assert (["remembered"], ["forgotten"]) == (made.ready(2.0), made.ready(4.0))


@given(
    st.lists(st.tuples(st.floats(0, 3), st.lists(st.sampled_from("abcde"), max_size=3), st.booleans(), st.booleans()))
)
def test_everything_comes_out_once_and_in_order(steps: list[tuple[float, list[str], bool, bool]]) -> None:
    """Whatever is named when: the line gives back what it was given, in order, no later than two seconds after."""
    made = Line()
    now, out, put_at = 0.0, [], []
    for number, (passes, ids, named, pressed) in enumerate(steps):
        now += passes
        put_at.append(now)
        made.put(str(number), now, *ids)
        if named:
            made.known |= set(ids)
        for token in made.ready(now, pressed=pressed):
            out.append(token)
        assert all(str(old) in out for old, at in enumerate(put_at) if now - at >= 2.0)

    out += made.ready(now + 2.0)
    assert [str(number) for number in range(len(steps))] == out
