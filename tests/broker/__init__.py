"""Real servers for tests, demos and benchmarks; ``python -m tests.broker`` starts them from a shell."""

from __future__ import annotations

from tests.broker.mock import Mock
from tests.broker.servers import (
    Kafka,
    Registry,
    ServerFailed,
    avro_tools,
    compose,
    fetched,
    free_ports,
    kafka,
    registry,
)

__all__ = [
    "Kafka",
    "Mock",
    "Registry",
    "ServerFailed",
    "avro_tools",
    "compose",
    "fetched",
    "free_ports",
    "kafka",
    "registry",
]
