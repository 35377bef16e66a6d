"""The chain of checkpoints: what is hashed, what is signed. docs/testimony.md says what it is good for.

In: the datums of a stream, and what its own records say. Out: digests, heads and the text that a signature covers, all
of them bytes that anybody can make again with SHA-256 and JSON alone.

``digest`` of a record is SHA-256 over the datums ``first_pos`` to ``last_pos``, one directly behind the other, without
frames, lengths or anything between them. That is unambiguous: a datum of one schema says itself where it ends, so the
same bytes are never two different rows of datums, wherever somebody draws the borders. What they would mean under
another schema is another matter, and so the chain begins with the schema.

``head`` is SHA-256 over the head before and the digest, 64 bytes. The head before the first one is ``first_head``:
SHA-256 over the node, the epoch, the boot and the schema. A ``signature`` covers ``signed_text``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

_NAME = "bindsnoop testimony 1"
"""The first word of what is hashed and signed, so that it can be nothing else that the same key ever signs."""


def first_head(node: str, epoch: str, boot_id: str, schema: str) -> bytes:
    """What stands for the head before the first one.

    ``schema`` is SHA-256 of the schema's parsing canonical form, hexadecimal.
    """
    return hashlib.sha256(_json(node, epoch, boot_id, schema)).digest()


def next_head(before: bytes, digest: bytes) -> bytes:
    """The head behind an interval."""
    return hashlib.sha256(before + digest).digest()


def signed_text(schema: str, record: Mapping[str, Any]) -> bytes:
    """What the signature of one of the stream's own records covers: the head, and all else that the record says.

    ``record`` is a row as ``to_pylist`` gives it with ``time`` in microseconds. Its digest covers the records before
    it, and only the next one would cover it itself: without this the last record could be changed, a checkpoint into
    a ``stop`` above all.
    """
    own = record["testimony"]
    return _json(
        record["node"],
        record["epoch"],
        own["boot_id"],
        schema,
        record["kind"],
        record["pos"],
        record["time"],
        own["first_pos"],
        own["last_pos"],
        sorted(map(list, own["counts"])),
        own["digest"],
        own["head"],
        record["message"],
    )


def about(epoch: str) -> str:
    """The end of the message of a ``loss`` record whose positions are another epoch's; empty for its own, "".

    The schema has no field for it: a former agent's records are rarely lost.
    """
    return f" (of epoch {epoch})" if epoch else ""


def epoch_of(message: str) -> str | None:
    """The other epoch that a ``loss`` record speaks of; None when it is its own."""
    found = re.search(r" \(of epoch ([0-9a-f]{16})\)$", message)
    return found[1] if found else None


def _json(*values: object) -> bytes:
    return json.dumps([_NAME, *values], separators=(",", ":")).encode("ascii")
