"""The words: names, printable text, columns."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import event


@given(st.binary(max_size=64))
def test_printable_is_reversible(raw: bytes) -> None:
    """The bytes that a process chose can be had back from the text that was made of them."""
    assert event.original(event.printable(raw)) == raw


@given(st.binary(max_size=64))
def test_printable_is_printable(raw: bytes) -> None:
    """No byte string becomes a text with a control, format or separator character in it."""
    assert event.printable(raw).isprintable()


@given(st.binary(max_size=16), st.binary(max_size=16))
def test_two_names_are_never_confused(one: bytes, other: bytes) -> None:
    """Different bytes give different texts."""
    assert (event.printable(one) == event.printable(other)) == (one == other)


def test_printable_shows_what_a_hostile_name_holds() -> None:
    """Escape sequences, line breaks and invalid UTF-8 become hexadecimal, a backslash is doubled, letters stay."""
    raw = b"\x1b[2J\n" + "é\u202e".encode() + b"\xff\\x41"

    assert event.printable(raw) == "\\x1b[2J\\x0aé\\xe2\\x80\\xae\\xff\\\\x41"


@pytest.mark.parametrize("text", ["\\", "\\x4", "\\n", "a\\xZZ"])
def test_original_refuses_what_printable_never_makes(text: str) -> None:
    """A lone backslash is an error, not a guess."""
    with pytest.raises(ValueError, match="lone backslash"):
        event.original(text)


@pytest.mark.parametrize(
    ("bits", "text"),
    [(0, "....."), (0x08, ".R..."), (0x10, "r...."), (0x1F, "rRNTF"), (0x04, "..N.."), (0x03, "...TF")],
)
def test_opts(bits: int, text: str) -> None:
    """OPTS is rRNTF, left to right from the highest bit."""
    assert event.opts_text(bits) == text


@pytest.mark.parametrize(
    ("number", "name"),
    [
        (0, None),
        (98, "EADDRINUSE"),
        (13, "EACCES"),
        (95, "EOPNOTSUPP"),
        (11, "EAGAIN"),
        (35, "EDEADLK"),
        (4095, "4095"),
    ],
)
def test_error_names_are_the_kernels(number: int, name: str | None) -> None:
    """Where Linux has two names for a number, ours is the one that the kernel's sources and strace use."""
    assert event.error_name(number) == name


@pytest.mark.parametrize(("number", "name"), [(6, "TCP"), (17, "UDP"), (262, "MPTCP"), (0, "IP"), (250, "UNKNOWN")])
def test_protocol_names(number: int, name: str) -> None:
    """Numbers without a documented name are UNKNOWN."""
    assert event.protocol_name(number) == name


def test_every_field_is_a_column() -> None:
    """custom-columns can show each field of the schema, under a lower-case name."""
    table = event.columns()

    assert set(event.fields()) <= set(table)
    assert all(set(name) <= set(string.ascii_lowercase + string.digits + "_.") for name in table)


def test_layouts_name_columns() -> None:
    """Each column of the three layouts exists."""
    named = {name for layout in event.LAYOUTS.values() for name, _ in layout}

    assert named <= set(event.columns())
