"""Fixtures that hand real servers to tests: ``kafka`` and ``registry`` for the session, ``topic`` for one test."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from tests.broker import servers

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def kafka() -> Iterator[servers.Kafka]:
    """One Apache Kafka for the whole run; it creates no topic by itself. Tests may restart it, and must wait for it."""
    with servers.kafka() as node:
        yield node


@pytest.fixture(scope="session")
def registry() -> Iterator[servers.Registry]:
    """One schema registry for the whole run; each test uses subjects of its own."""
    with servers.registry() as server:
        yield server


@pytest.fixture
def topic(request: pytest.FixtureRequest) -> str:
    """Name of a topic that no other test uses; nothing is created."""
    name = "".join(char if char.isalnum() else "-" for char in request.node.name)
    return f"{name[:150]}-{next(_numbers)}"
