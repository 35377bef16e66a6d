"""What a user would write instead, each as a process of its own: ``python -m benchmarks.baseline KIND SOURCE …``.

``consume BOOTSTRAP TOPIC COUNT``: bare ``consume()``, which decodes nothing.
``topic BOOTSTRAP TOPIC COUNT WHAT`` and ``files FOLDER COUNT WHAT``: one event after the other, by fastavro.
WHAT is ``filter`` (binds to one port, as columns), ``json`` or ``columns`` (all binds). Events go to standard output as
``bindsnoop-replay`` shows them, byte for byte; the last line on standard error is the seconds of the loop alone.
"""

from __future__ import annotations

import io
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.events import PORT
from pipeline import event

Event = dict[str, Any]

CHUNK = 10_000
LAYOUT = event.LAYOUTS["trace-bind"]


def consumer_settings(bootstrap: str) -> dict[str, Any]:
    """Those of ``bindsnoop-replay``: a ratio must not show a setting instead of our work."""
    from pipeline.topic import _CONSUMER, _CONSUMER_PROMISES

    return {**_CONSUMER, **_CONSUMER_PROMISES, "group.id": "baseline", "bootstrap.servers": bootstrap}


def _consumer(bootstrap: str, topic: str) -> Any:
    from confluent_kafka import Consumer, TopicPartition

    consumer = Consumer(consumer_settings(bootstrap))
    consumer.assign([TopicPartition(topic, 0, 0)])
    return consumer


def consume(bootstrap: str, topic: str, count: int) -> None:
    """All messages, and nothing done with them."""
    consumer = _consumer(bootstrap, topic)
    done = 0
    while done < count:
        done += len(consumer.consume(min(CHUNK, count - done), 1.0))
    consumer.close()


def of_topic(bootstrap: str, topic: str, count: int) -> Iterator[Event]:
    """The first events of a topic, by ``poll()`` and fastavro."""
    from fastavro import parse_schema, schemaless_reader

    schema = parse_schema(json.loads(event.schema_text()))
    consumer = _consumer(bootstrap, topic)
    for _ in range(count):
        message = consumer.poll(10.0)
        yield schemaless_reader(io.BytesIO(message.value()[5:]), schema)  # type: ignore[misc]
    consumer.close()


def of_files(folder: str, count: int) -> Iterator[Event]:
    """The first events of an archive, by fastavro's reader."""
    from fastavro import reader

    def each() -> Iterator[Event]:
        for path in sorted(Path(folder).rglob("*.avro")):
            with path.open("rb") as file:
                yield from reader(file)  # type: ignore[misc]

    return itertools.islice(each(), count)


def interface(found: Event) -> str | None:
    """What IF shows."""
    if found["ifindex"] is None:
        return None
    return (found["ifname"] or str(found["ifindex"])) if found["ifindex"] else "0"


def row(found: Event) -> str:
    """The columns of the default layout."""
    values = (
        found["node"], found["namespace"] or "", found["pod"] or "", found["container"] or "", found["pid"],
        found["comm"], found["proto"] or "", found["addr"] or "", found["port"], found["opts"] or "",
        interface(found) or "",
    )  # fmt: skip
    return ROW.format(*values).rstrip() + "\n"


ROW = " ".join(f"{{:<{width}}}" for _, width in LAYOUT)
HEADER = " ".join(f"{name.upper():<{width}}" for name, width in LAYOUT).rstrip() + "\n"


def line(found: Event) -> str:
    """The documented JSON."""
    named = {key: interface(found) if key == "if" else found[key] for key in event.JSON_KEYS}
    if found["error"] is not None:
        named["error"] = found["error"]
    return json.dumps({key: value for key, value in named.items() if value is not None}, separators=(",", ":")) + "\n"


def loop(events: Iterator[Event], what: str, out: Callable[[str], object]) -> float:
    """Show what is wanted, one event after the other; the seconds from the first to the last."""
    if what != "json":
        out(HEADER)
    show = line if what == "json" else row
    start = 0.0
    for found in events:
        start = start or time.monotonic()
        if found["type"] != "normal":
            continue
        if what == "filter" and (found["errno"] != 0 or PORT not in (found["port"], found["asked_port"])):
            continue
        out(show(found))
    return time.monotonic() - start


def main(kind: str, *arguments: str) -> None:
    """Run one of them."""
    if kind == "consume":
        bootstrap, topic, count = arguments
        consume(bootstrap, topic, int(count))
        return
    *source, count, what = arguments
    events = of_topic(source[0], source[1], int(count)) if kind == "topic" else of_files(source[0], int(count))
    print(loop(events, what, sys.stdout.write), file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
