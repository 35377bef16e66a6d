"""Every error that bindsnoop raises on purpose, as a tree; the leaf decides what the caller does.

::

    BindsnoopError
    ├── UsageError            an argument, a setting or a file of settings is wrong: say so, exit 2
    ├── Unavailable           what was asked for cannot be reached now: say so, exit 2
    │   ├── TracerUnavailable     no permission, no BTF, no libbpf, another agent on this node
    │   ├── SourceUnavailable     topic, broker, registry or file that replay was asked to read
    │   └── SinkUnavailable       a destination that may come back: keep the batch, try again
    │       └── SinkFatal             this producer is dead: make a new one, then try again
    ├── SinkRejected          a destination refuses these records for themselves: set them aside, declared
    └── Damaged               something that was read is not what was written: skip it, report it, exit 3
        ├── DatumDamaged          one datum, message or block
        ├── SchemaRefused         a writer's schema that is unsafe or does not describe our events
        └── SchemaUnknown         a schema id or fingerprint that nobody can resolve

Each carries one clear sentence, without a stack, that names the thing, its value and what is allowed. Exceptions of
libraries are mapped to these once, at the edge, with ``from``.
"""

from __future__ import annotations


class BindsnoopError(Exception):
    """Root of the tree. ``str(error)`` is one sentence for a person; ``exit_code`` is what a command ends with."""

    exit_code = 2


class UsageError(BindsnoopError):
    """An argument, an environment variable or a key of a configuration file is not what is allowed."""


class Unavailable(BindsnoopError):
    """What was asked for cannot be reached."""


class TracerUnavailable(Unavailable):
    """The kernel side cannot start; the sentence says what is missing and how to give it."""


class SourceUnavailable(Unavailable):
    """A topic, broker, registry or file that replay was asked to read cannot be reached."""


class SinkUnavailable(Unavailable):
    """A destination cannot take records now. The caller keeps them and tries again."""


class SinkFatal(SinkUnavailable):
    """The connection object is dead. The caller makes a new one, then sends again what is not acknowledged."""


class SinkRejected(BindsnoopError):
    """A destination refuses records for themselves; trying again cannot help.

    ``indices`` are the places of the refused records in what was handed over; all the others were acknowledged.
    """

    def __init__(self, sentence: str, indices: list[int]) -> None:
        super().__init__(sentence)
        self.indices = indices


class Damaged(BindsnoopError):
    """Something that was read is not what was written."""

    exit_code = 3


class DatumDamaged(Damaged):
    """A datum, message or block that does not decode to what its writer wrote."""


class SchemaRefused(Damaged):
    """A writer's schema that is unsafe to decode with, or does not describe our events."""


class SchemaUnknown(Damaged):
    """A schema id or fingerprint that cannot be resolved to a schema."""
