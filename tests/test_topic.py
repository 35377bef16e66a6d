"""The topic edge, on a real Apache Kafka; a mock broker only where a real one cannot be made to answer so."""

from __future__ import annotations

import itertools
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import (
    AclBinding,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ConfigResource,
    NewTopic,
    ResourcePatternType,
    ResourceType,
)
from hypothesis import given
from hypothesis import strategies as st

from pipeline import topic as edge
from pipeline.errors import SchemaUnknown, SinkFatal, SinkRejected, SinkUnavailable, SourceUnavailable, UsageError
from pipeline.spool import Part
from tests import broker
from tests.broker import servers

# --- what the tests use -------------------------------------------------------------------------------------------


_admins: dict[str, AdminClient] = {}


def admin_of(address: str) -> AdminClient:
    """A client for set-up. It is kept: one that is collected takes its unanswered questions with it."""
    logger = logging.Logger("set-up")
    logger.addHandler(logging.NullHandler())
    return _admins.setdefault(address, AdminClient({"bootstrap.servers": address, "logger": logger}))


def create(address: str, name: str, partitions: int = 1, **config: str) -> None:
    """Make a topic and wait until it has a leader."""
    admin = admin_of(address)
    settings = {key.replace("_", "."): value for key, value in config.items()}
    admin.create_topics([NewTopic(name, partitions, 1, config=settings)])[name].result(10)
    while any(p.leader < 0 for p in admin.list_topics(name, 10).topics[name].partitions.values()):
        pass


def some(count: int, tag: str = "value", size: int = 0) -> list[bytes]:
    """``count`` different values of at least ``size`` bytes."""
    return [f"{tag}-{number:08d}-".encode().ljust(size, b"x") for number in range(count)]


def publish(address: str, name: str, values: list[bytes], key: str = "node-1") -> None:
    """Publish through a publisher that lives for this call."""
    publisher = edge.Publisher(name, edge.settings(address), key=key)
    publisher.publish(values)
    publisher.close()


def parts_of(address: str, name: str, **options: object) -> list[edge.Messages | edge.Unread]:
    """Everything that a bounded read gives."""
    return list(edge.read(name, edge.settings(address), **options))  # type: ignore[arg-type]


def values_of(parts: list[edge.Messages | edge.Unread]) -> list[bytes | None]:
    """All values, in the order read."""
    return [value for part in parts if isinstance(part, edge.Messages) for value in part.values]


def unread_of(parts: list[edge.Messages | edge.Unread]) -> list[tuple[int, int, int]]:
    """All ranges that could not be read."""
    return [part[:3] for part in parts if isinstance(part, edge.Unread)]


def datums(values: list[bytes]) -> pa.BinaryArray:
    """Values as the column that the delivery takes."""
    return pa.array(values, pa.binary())


def as_they_are(column: pa.BinaryArray) -> list[bytes]:
    """A framing that adds nothing."""
    values: list[bytes] = column.to_pylist()
    return values


class Heard:
    """What was said, and a way to wait for it without sleeping."""

    def __init__(self) -> None:
        self.sentences: list[tuple[str, str]] = []
        self._more = threading.Condition()

    def say(self, level: str, sentence: str) -> None:
        """The callback."""
        with self._more:
            self.sentences.append((level, sentence))
            self._more.notify_all()

    def wait_for(self, part: str) -> str:
        """The first sentence with ``part`` in it, 20 s at most from now."""

        def found() -> str | None:
            return next((sentence for _, sentence in self.sentences if part in sentence), None)

        with self._more:
            sentence = self._more.wait_for(found, 20)
        assert sentence is not None, f"{part!r} was not said, but {self.sentences}"
        return sentence


def raw_producer(address: str, **settings: str) -> Producer:
    """A producer of the library itself, for what ours does not do."""
    return Producer({"bootstrap.servers": address, **{k.replace("_", "."): v for k, v in settings.items()}})


# --- settings -----------------------------------------------------------------------------------------------------


def test_settings_by_strength(tmp_path: Path) -> None:
    """What is given on the command line is stronger than the address, which is stronger than the file."""
    file = tmp_path / "client.properties"
    file.write_text(
        "# of the cluster\n! too\n\nbootstrap.servers=file:1\n"
        "security.protocol = SSL\nclient.id: a=b\nclient.rack=x\\\n  y\n"
    )

    assert edge.settings("address:2", {"client.rack": "z"}, file) == {
        "bootstrap.servers": "address:2",
        "security.protocol": "SSL",
        "client.id": "a=b",
        "client.rack": "z",
    }
    assert edge.settings(None, {}, file)["bootstrap.servers"] == "file:1"
    assert edge.settings(None, {}, file)["client.rack"] == "xy"
    assert edge.settings() == {"bootstrap.servers": "localhost:9092"}


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        ({"fetch.wait.mx.ms": "1"}, "fetch.wait.mx.ms is not a setting of librdkafka"),
        ({"ssl.truststore.location": "a"}, "Java TrustStores are not supported, use `ssl.ca.location`"),
        ({"security.protocol": "banana"}, "security.protocol=banana"),
        ({"linger.ms": "-7"}, "value -7 is outside allowed range 0..900000$"),
        ({"acks": "1"}, "acks=1 is not open to change; allowed is -1 or all"),
        ({"enable.auto.commit": "true"}, "enable.auto.commit=true is not open to change"),
        ({"transactional.id": "a"}, "transactional.id=a is not open to change"),
        ({"security.protocol": "SSL", "ssl.ca.location": "/nowhere/ca.pem"}, r"ssl\.ca\.location"),
    ],
)
def test_settings_that_are_wrong(extra: dict[str, str], sentence: str) -> None:
    """A setting that librdkafka does not know or that a promise depends on is refused by name."""
    with pytest.raises(UsageError, match=sentence):
        edge.settings("localhost:9092", extra)


@pytest.mark.parametrize("content", [b"no separator here\n", b"=value\n", b"\xff\xfe"])
def test_properties_file_that_is_wrong(tmp_path: Path, content: bytes) -> None:
    """The sentence names the file."""
    file = tmp_path / "client.properties"
    file.write_bytes(content)

    with pytest.raises(UsageError, match=r"client\.properties"):
        edge.settings(None, {}, file)
    with pytest.raises(UsageError, match=r"missing\.properties cannot be read"):
        edge.settings(None, {}, tmp_path / "missing.properties")


# --- there and back -----------------------------------------------------------------------------------------------


@given(values=st.lists(st.binary(max_size=300), max_size=40))
def test_round_trip(long_lived: edge.Publisher, kafka: broker.Kafka, values: list[bytes]) -> None:
    """Any values, equal and empty ones too, come back as they were and in their order."""
    long_lived.publish(values)

    newest = edge.Start.newest(len(values))
    assert values == values_of(parts_of(kafka.bootstrap, long_lived.topic, start=newest))


@pytest.fixture(scope="module")
def long_lived(kafka: broker.Kafka) -> Iterator[edge.Publisher]:
    """A publisher to a topic of its own."""
    create(kafka.bootstrap, "round-trip")
    publisher = edge.Publisher("round-trip", edge.settings(kafka.bootstrap), key="node-1")
    yield publisher
    publisher.close()


def test_a_node_stays_in_one_partition_in_order(kafka: broker.Kafka, topic: str) -> None:
    """The key is the node: its events keep their order beside those of other nodes, and partitions come by number."""
    create(kafka.bootstrap, topic, 4)
    client = edge.settings(kafka.bootstrap)
    publishers = [edge.Publisher(topic, client, key=f"node-{node}") for node in range(4)]
    for turn, (node, publisher) in itertools.product(range(3), enumerate(publishers)):
        publisher.publish(some(50, f"node-{node}-{turn}"))

    parts = parts_of(kafka.bootstrap, topic)

    read = [(part.partition, value) for part in parts if isinstance(part, edge.Messages) for value in part.values]
    assert [number for number, _ in read] == sorted(number for number, _ in read)
    assert len({number for number, _ in read}) > 1
    for node in range(4):
        mine = [(number, value) for number, value in read if value and value.startswith(f"node-{node}-".encode())]
        assert len({number for number, _ in mine}) == 1
        assert [value for turn in range(3) for value in some(50, f"node-{node}-{turn}")] == [v for _, v in mine]


def test_progress_adds_up(kafka: broker.Kafka, topic: str) -> None:
    """``done`` grows to ``total``, which is known from the first part on; each value knows its offset."""
    create(kafka.bootstrap, topic, 2)
    producer = raw_producer(kafka.bootstrap, queue_buffering_max_messages="200000")
    for partition, count in ((0, 25_000), (1, 100)):
        for value in some(count):
            producer.produce(topic, value, partition=partition)
    producer.flush()

    parts = [part for part in parts_of(kafka.bootstrap, topic) if isinstance(part, edge.Messages)]

    assert {25_100} == {part.total for part in parts}
    assert [part.done for part in parts] == sorted(part.done for part in parts)
    assert parts[-1].done == 25_100
    offsets = [part.offset(index) for part in parts for index in range(len(part.values))]
    assert [*range(25_000), *range(100)] == offsets


def test_empty_and_deleted_values(kafka: broker.Kafka, topic: str) -> None:
    """A tombstone is None, an empty value is empty, and both keep their place."""
    create(kafka.bootstrap, topic)
    producer = raw_producer(kafka.bootstrap)
    for value in (b"first", None, b"", b"last"):
        producer.produce(topic, value, key=b"k")
    producer.flush()

    assert [b"first", None, b"", b"last"] == values_of(parts_of(kafka.bootstrap, topic))


def test_large_values(kafka: broker.Kafka, topic: str) -> None:
    """Values of 900 kB pass, among small ones."""
    create(kafka.bootstrap, topic)
    values = [b"a" * 900_000, b"small", b"b" * 900_000]
    publish(kafka.bootstrap, topic, values)

    assert values == values_of(parts_of(kafka.bootstrap, topic))


def test_topic_that_we_create(kafka: broker.Kafka, topic: str) -> None:
    """It stamps by arrival and stores zstd, and a second wish for it finds it."""
    client = edge.settings(kafka.bootstrap)
    for _ in range(2):
        state = edge.ensure_topic(client, topic, partitions=3, replication=1, create=True)

    assert state == edge.TopicState(3, 1_048_588)
    resource = ConfigResource(ResourceType.TOPIC, topic)
    found = admin_of(kafka.bootstrap).describe_configs([resource])[resource].result()
    assert found["message.timestamp.type"].value == "LogAppendTime"
    assert found["compression.type"].value == "zstd"


def test_topic_that_cannot_be_created(kafka: broker.Kafka, topic: str) -> None:
    """More replicas than brokers is a wish that no waiting fulfils."""
    with pytest.raises(UsageError, match="5 replicas"):
        edge.ensure_topic(edge.settings(kafka.bootstrap), topic, replication=5, create=True)


def test_publisher_creates_only_when_told(kafka: broker.Kafka, topic: str) -> None:
    """Without ``create`` a missing topic is waited for, and the sentence says how to get it."""
    client = edge.settings(kafka.bootstrap)
    publisher = edge.Publisher(topic, client, key="node-1")

    with pytest.raises(SinkUnavailable, match=f"topic {topic} does not exist at .*--create-topic"):
        publisher.publish([b"a"])
    assert publisher.unacknowledged == [0]

    told = edge.Publisher(topic, client, key="node-1", create=edge.Creation(2))
    told.publish([b"a"])
    publisher.publish([b"b"])
    assert [b"a", b"b"] == values_of(parts_of(kafka.bootstrap, topic))


# --- what is refused ----------------------------------------------------------------------------------------------


def test_batches_too_large_for_the_topic(kafka: broker.Kafka, topic: str) -> None:
    """A topic that takes 2,000 bytes at a time gets all events, in order, in batches that fit."""
    create(kafka.bootstrap, topic, max_message_bytes="2000", compression_type="uncompressed")
    values = some(500, size=155)
    publish(kafka.bootstrap, topic, values)

    assert values == values_of(parts_of(kafka.bootstrap, topic))


def test_limit_that_shrinks_under_the_publisher(kafka: broker.Kafka, topic: str) -> None:
    """A limit that was not known at the start is found when it is met, and then kept to."""
    create(kafka.bootstrap, topic)
    heard = Heard()
    client = edge.settings(kafka.bootstrap, {"compression.type": "none"})
    publisher = edge.Publisher(topic, client, key="node-1", say=heard.say)
    publisher.publish([b"first"])
    _set_limit(kafka, topic, 2000)
    values = some(200, size=155)
    publisher.publish(values)
    publisher.publish([b"last"])

    assert [b"first", *values, b"last"] == sorted(values_of(parts_of(kafka.bootstrap, topic)), key=_first_value_last)
    assert [sentence for _, sentence in heard.sentences if "smaller batches" in sentence]


def _set_limit(kafka: broker.Kafka, name: str, limit: int) -> None:
    from confluent_kafka.admin import AlterConfigOpType, ConfigEntry

    entry = ConfigEntry("max.message.bytes", str(limit), incremental_operation=AlterConfigOpType.SET)
    resource = ConfigResource(ResourceType.TOPIC, name, incremental_configs=[entry])
    admin_of(kafka.bootstrap).incremental_alter_configs([resource])[resource].result(10)


def _first_value_last(value: bytes | None) -> tuple[int, bytes]:
    return {b"first": 0, b"last": 2}.get(value or b"", 1), value or b""


def test_single_event_too_large(kafka: broker.Kafka, topic: str) -> None:
    """Events that are too large by themselves are named by their places; all others arrive."""
    create(kafka.bootstrap, topic, max_message_bytes="2000", compression_type="uncompressed")
    values = some(60, size=155)
    values[17] = b"\x00" * 3000
    values[59] = b"\x01" * 3000
    publisher = edge.Publisher(topic, edge.settings(kafka.bootstrap, {"compression.type": "none"}), key="node-1")

    with pytest.raises(SinkRejected) as caught:
        publisher.publish(values)

    assert caught.value.indices == [17, 59]
    assert publisher.unacknowledged == []
    expected = [value for value in values if len(value) < 1000]
    assert expected == sorted(value or b"" for value in values_of(parts_of(kafka.bootstrap, topic)))


# --- brokers that come and go -------------------------------------------------------------------------------------


def test_broker_killed_in_the_middle(kafka: broker.Kafka, topic: str) -> None:
    """A broker that is killed under load and comes back has every event once, in order."""
    create(kafka.bootstrap, topic)
    heard = Heard()
    publisher = edge.Publisher(topic, edge.settings(kafka.bootstrap), key="node-1", say=heard.say)
    delivery = edge.Delivery(publisher, frame=as_they_are, linger_secs=0.01, say=heard.say)
    values = some(300_000)
    for first in range(0, 100_000, 1000):
        delivery.put(datums(values[first : first + 1000]), first)
    while delivery.stats().acknowledged < 20_000:
        pass
    kafka.kill()
    for first in range(100_000, 300_000, 1000):
        delivery.put(datums(values[first : first + 1000]), first)
    heard.wait_for("cannot be reached")
    kafka.start()

    assert delivery.drain(60) == 0
    assert delivery.take_dropped() == []
    assert values == values_of(parts_of(kafka.bootstrap, topic))
    assert ("info", f"Kafka at {kafka.bootstrap} works again for topic {topic}") in heard.sentences


def test_broker_that_is_away_at_the_start(kafka: broker.Kafka, topic: str) -> None:
    """Events wait for a broker that is not there yet; what is wrong is said once, with the address."""
    create(kafka.bootstrap, topic)
    kafka.stop()
    heard = Heard()
    publisher = edge.Publisher(topic, edge.settings(kafka.bootstrap), key="node-1", say=heard.say)
    delivery = edge.Delivery(publisher, frame=as_they_are, say=heard.say)
    delivery.put(datums([b"a", b"b"]), 0)
    heard.wait_for(f"Kafka at {kafka.bootstrap} cannot be reached")
    heard.wait_for("2 events are kept")
    waiting = delivery.stats()
    kafka.start()

    assert (2, 0) == (waiting.queued, waiting.acknowledged)
    assert "cannot be reached" in waiting.last_error
    assert delivery.drain(30) == 0
    assert [b"a", b"b"] == values_of(parts_of(kafka.bootstrap, topic))


def test_topic_deleted_and_created_again(kafka: broker.Kafka, topic: str) -> None:
    """Events published while the topic does not exist are in it once it does."""
    create(kafka.bootstrap, topic)
    heard = Heard()
    client = edge.settings(kafka.bootstrap, {"topic.metadata.refresh.interval.ms": "500"})
    publisher = edge.Publisher(topic, client, key="node-1", say=heard.say)
    delivery = edge.Delivery(publisher, frame=as_they_are, say=heard.say)
    publisher.publish([b"of the old topic"])
    admin_of(kafka.bootstrap).delete_topics([topic])[topic].result(10)
    delivery.put(datums([b"a", b"b"]), 0)
    heard.wait_for("does not exist")
    create(kafka.bootstrap, topic)

    assert delivery.drain(30) == 0
    assert [b"a", b"b"] == values_of(parts_of(kafka.bootstrap, topic))


def test_broker_that_hangs_at_the_end(kafka: broker.Kafka, topic: str) -> None:
    """The end has a budget: what a silent broker has not acknowledged by then is counted and given up."""
    create(kafka.bootstrap, topic)
    delivery = edge.Delivery(
        edge.Publisher(topic, edge.settings(kafka.bootstrap), key="node-1"), frame=as_they_are, linger_secs=0
    )
    delivery.put(datums([b"before"]), 0)
    while not delivery.stats().acknowledged:
        pass
    kafka.pause()
    try:
        delivery.put(datums([b"a", b"b", b"c"]), 1)
        begun = time.monotonic()
        left = delivery.drain(0.5)
        taken = time.monotonic() - begun
    finally:
        kafka.resume()

    assert left == 3
    assert taken < 3


# --- the delivery -------------------------------------------------------------------------------------------------


def _nowhere() -> edge.Publisher:
    (port,) = broker.free_ports(1)
    return edge.Publisher("binds", edge.settings(f"127.0.0.1:{port}"), key="node-1")


def test_full_queue_drops_the_oldest() -> None:
    """What was dropped is told with its positions, neighbours as one; what is left is what was put last."""
    heard = Heard()
    delivery = edge.Delivery(_nowhere(), frame=as_they_are, queue_bytes=10_000, linger_secs=0, say=heard.say)
    delivery.put(datums(some(10, size=100)), 0)
    heard.wait_for("10 events are kept")
    for first in range(10, 210, 10):
        delivery.put(datums(some(10, size=100)), first)

    dropped = delivery.take_dropped()
    stats = delivery.stats()
    left = delivery.drain(0)

    assert [(10, 119, 110)] == [(one.first_pos, one.last_pos, one.count) for one in dropped]
    assert "full (10000 bytes)" in dropped[0].reason
    assert (100, 110, 0) == (stats.queued, stats.dropped, stats.acknowledged)
    assert left == 100
    assert stats.queued_bytes <= 10_000


def test_batch_larger_than_the_queue() -> None:
    """It cannot be kept, and is told."""
    heard = Heard()
    delivery = edge.Delivery(_nowhere(), frame=as_they_are, queue_bytes=10, linger_secs=0, say=heard.say)
    delivery.put(datums(some(4, size=100)), 7)
    dropped = delivery.take_dropped()
    delivery.close()

    assert [(7, 10, 4)] == [(one.first_pos, one.last_pos, one.count) for one in dropped]


def test_put_never_blocks() -> None:
    """Nothing that happens to the destination holds up who puts."""
    delivery = edge.Delivery(_nowhere(), frame=as_they_are, queue_bytes=1_000_000)
    column = datums(some(100, size=100))
    begun = time.monotonic()
    for first in range(0, 100_000, 100):
        delivery.put(column, first)
    taken = time.monotonic() - begun
    delivery.close()

    assert taken < 1


class Disk:
    """Events by position, read back three at a time; what is not there is missing."""

    def __init__(self) -> None:
        self.events: dict[tuple[str, int], bytes] = {}
        self.asked: list[tuple[str, int, int]] = []

    def write(self, epoch: str, first: int, values: list[bytes]) -> pa.BinaryArray:
        """The events, and the batch that they are."""
        self.events |= {(epoch, first + place): value for place, value in enumerate(values)}
        return datums(values)

    def read(self, epoch: str, first_pos: int, last_pos: int) -> Part:
        """The contract is ``Backlog.read``'s."""
        self.asked.append((epoch, first_pos, last_pos))
        there = [pos for pos in range(first_pos, last_pos + 1) if (epoch, pos) in self.events]
        if not there or there[0] > first_pos:
            missing = there[0] - 1 if there else last_pos
            return Part(first_pos, missing, np.empty(0, np.int64), datums([]), "they are gone")
        run = [pos for place, pos in enumerate(there[:3]) if pos == first_pos + place]
        return Part(first_pos, run[-1], np.array(run), datums([self.events[epoch, pos] for pos in run]))


def test_what_memory_cannot_hold_is_read_back(kafka: broker.Kafka, topic: str) -> None:
    """Nothing is dropped that is on disk: the topic gets it in order, between what stood before and behind it."""
    create(kafka.bootstrap, topic)
    kafka.stop()
    heard, disk = Heard(), Disk()
    reached: list[tuple[str, int]] = []
    delivery = edge.Delivery(
        edge.Publisher(topic, edge.settings(kafka.bootstrap), key="node-1"), frame=as_they_are, queue_bytes=3_000,
        linger_secs=0, say=heard.say, backlog=disk, reached=lambda epoch, pos: reached.append((epoch, pos)),
    )  # fmt: skip
    values = some(200, size=100)
    delivery.put(disk.write("e", 0, values[:10]), 0, epoch="e", on_disk=True)
    heard.wait_for("10 events are kept")
    for first in range(10, 200, 10):
        delivery.put(disk.write("e", first, values[first : first + 10]), first, epoch="e", on_disk=True)
    stats = delivery.stats()
    kafka.start()

    assert delivery.drain(30) == 0
    assert values == values_of(parts_of(kafka.bootstrap, topic))
    assert (200, 0) == (stats.queued, stats.dropped)
    assert stats.queued_bytes <= 3_000
    assert ("e", 199) == reached[-1]
    assert sorted(reached) == reached
    assert {last for _, _, last in disk.asked} == {199}


def test_what_an_earlier_life_left_goes_first(kafka: broker.Kafka, topic: str) -> None:
    """Ranges on disk are sent before what is put; a hole in them is told, and does not hold up the rest."""
    create(kafka.bootstrap, topic)
    kafka.stop()
    disk = Disk()
    reached: list[tuple[str, int]] = []
    disk.write("old", 5, [b"a", b"b"])
    disk.write("old", 9, [b"c"])
    delivery = edge.Delivery(
        edge.Publisher(topic, edge.settings(kafka.bootstrap), key="node-1"), frame=as_they_are, linger_secs=0,
        backlog=disk, reached=lambda epoch, pos: reached.append((epoch, pos)),
    )  # fmt: skip
    delivery.put_before([("old", 5, 10)])
    delivery.put(datums([b"d"]), 0, epoch="new")
    queued = delivery.stats().queued
    kafka.start()

    assert delivery.drain(30) == 0
    assert [b"a", b"b", b"c", b"d"] == values_of(parts_of(kafka.bootstrap, topic))
    assert [("old", 7, 8), ("old", 10, 10)] == [(d.epoch, d.first_pos, d.last_pos) for d in delivery.take_dropped()]
    assert [("old", 6), ("old", 8), ("old", 9), ("old", 10), ("new", 0)] == reached
    assert (7, 0) == (queued, delivery.stats().queued)


def test_what_is_on_disk_is_not_left(topic: str) -> None:
    """At the end only what is nowhere else counts as left."""
    (port,) = broker.free_ports(1)
    disk = Disk()
    delivery = edge.Delivery(
        edge.Publisher(topic, edge.settings(f"127.0.0.1:{port}"), key="node-1"), frame=as_they_are, linger_secs=0,
        backlog=disk,
    )  # fmt: skip
    delivery.put(disk.write("e", 0, [b"a", b"b"]), 0, epoch="e", on_disk=True)
    delivery.put(datums([b"c"]), 2, epoch="e")
    delivery.put(disk.write("e", 3, [b"d"]), 3, epoch="e", on_disk=True)

    assert 1 == delivery.drain(0)
    assert 4 == delivery.stats().queued


def test_a_broker_that_takes_and_never_acknowledges(kafka: broker.Kafka, topic: str) -> None:
    """A connection that stands and is silent is given up for a new one, which is said; nothing is lost by that."""
    create(kafka.bootstrap, topic)
    heard = Heard()
    publisher = edge.Publisher(topic, edge.settings(kafka.bootstrap), key="node-1", silent_secs=0.5, say=heard.say)
    delivery = edge.Delivery(publisher, frame=as_they_are, linger_secs=0, say=heard.say)
    delivery.put(datums([b"before"]), 0)
    while not delivery.stats().acknowledged:
        pass
    kafka.pause()
    try:
        delivery.put(datums([b"a", b"b"]), 1)
        said = heard.wait_for("has acknowledged none")
    finally:
        kafka.resume()

    assert delivery.drain(30) == 0
    assert said.startswith(f"Kafka at {kafka.bootstrap} takes events for topic {topic} and has acknowledged none for")
    values = values_of(parts_of(kafka.bootstrap, topic))
    assert {b"before", b"a", b"b"} == set(values)
    assert [b"a", b"b"] == values[-2:]


@pytest.mark.parametrize("trouble", [SinkUnavailable("the registry is away"), SchemaUnknown("it has not our schema")])
def test_framing_that_has_to_wait(kafka: broker.Kafka, topic: str, trouble: Exception) -> None:
    """Events wait for a registry as for a broker."""
    create(kafka.bootstrap, topic)
    heard = Heard()
    answers: list[Exception] = [trouble, trouble]

    def frame(column: pa.BinaryArray) -> list[bytes]:
        if answers:
            raise answers.pop()
        return [b"framed " + value for value in column.to_pylist()]

    delivery = edge.Delivery(
        edge.Publisher(topic, edge.settings(kafka.bootstrap), key="node-1"), frame=frame, say=heard.say
    )
    delivery.put(datums([b"a"]), 0)

    assert delivery.drain(20) == 0
    assert [("warn", f"{trouble}; 1 events are kept, trying again")] == heard.sentences
    assert [b"framed a"] == values_of(parts_of(kafka.bootstrap, topic))


def test_rejected_events_are_told_by_position(kafka: broker.Kafka, topic: str) -> None:
    """What a topic refuses for itself is declared like a loss, and does not hold up the rest."""
    create(kafka.bootstrap, topic, max_message_bytes="2000", compression_type="uncompressed")
    client = edge.settings(kafka.bootstrap, {"compression.type": "none"})
    delivery = edge.Delivery(edge.Publisher(topic, client, key="node-1"), frame=as_they_are)
    delivery.put(datums([b"a", b"b" * 3000, b"c" * 3000, b"d"]), 40)
    delivery.put(datums([b"e", b"f" * 3000]), 44)

    left = delivery.drain(20)

    assert left == 0
    assert [(41, 42, 2), (45, 45, 1)] == [(d.first_pos, d.last_pos, d.count) for d in delivery.take_dropped()]
    assert (3, 3) == (delivery.stats().acknowledged, delivery.stats().rejected)
    assert [b"a", b"d", b"e"] == sorted(value or b"" for value in values_of(parts_of(kafka.bootstrap, topic)))


def test_error_that_nothing_heals_comes_out(kafka: broker.Kafka, topic: str) -> None:
    """A mistake in the framing is not tried for ever in silence: the next call raises it."""

    def frame(_: pa.BinaryArray) -> list[bytes]:
        raise ZeroDivisionError("a mistake")

    heard = Heard()
    delivery = edge.Delivery(
        edge.Publisher(topic, edge.settings(kafka.bootstrap), key="node-1"), frame=frame, say=heard.say
    )
    delivery.put(datums([b"a"]), 0)
    heard.wait_for("has stopped: a mistake")

    with pytest.raises(ZeroDivisionError):
        delivery.drain(5)


# --- reading ------------------------------------------------------------------------------------------------------


def test_read_is_bounded_at_its_start(kafka: broker.Kafka, topic: str) -> None:
    """What is written after the start is not read, however long the read takes."""
    create(kafka.bootstrap, topic)
    values = some(30_000)
    publish(kafka.bootstrap, topic, values)
    publisher = edge.Publisher(topic, edge.settings(kafka.bootstrap), key="node-1")
    read: list[bytes | None] = []
    for part in edge.read(topic, edge.settings(kafka.bootstrap)):
        assert isinstance(part, edge.Messages)
        read += part.values
        publisher.publish(some(20_000, "later"))

    assert values == read


def test_holes_do_not_move_the_bound(kafka: broker.Kafka, topic: str) -> None:
    """Where markers take offsets, what is written later does not fill up the number that was expected."""
    create(kafka.bootstrap, topic, 2)
    producer = raw_producer(kafka.bootstrap, transactional_id=topic)
    producer.init_transactions(20)
    for _ in range(3):
        producer.begin_transaction()
        producer.produce(topic, b"first", partition=0)
        producer.produce(topic, b"second", partition=1)
        producer.commit_transaction(20)
    reading = edge.read(topic, edge.settings(kafka.bootstrap))
    parts = [next(reading)]
    later = raw_producer(kafka.bootstrap)
    for value in some(10, "later"):
        later.produce(topic, value, partition=1)
    later.flush()
    parts += reading

    assert [b"first"] * 3 + [b"second"] * 3 == values_of(parts)


def test_empty_topic_ends_at_once(kafka: broker.Kafka, topic: str) -> None:
    """Nothing is there, so nothing comes, without an error and without waiting."""
    create(kafka.bootstrap, topic, 3)
    begun = time.monotonic()

    assert [] == parts_of(kafka.bootstrap, topic)
    assert time.monotonic() - begun < 1


def test_unknown_topic_names_its_neighbours(kafka: broker.Kafka, topic: str) -> None:
    """A typing mistake is answered with what is there."""
    create(kafka.bootstrap, f"{topic}-binds")

    with pytest.raises(SourceUnavailable, match=f"topic {topic}-bimds does not exist at .*; there is {topic}-binds"):
        parts_of(kafka.bootstrap, f"{topic}-bimds")


def test_unknown_partition(kafka: broker.Kafka, topic: str) -> None:
    """A partition that is not there is named, with those that are."""
    create(kafka.bootstrap, topic, 2)
    publish(kafka.bootstrap, topic, [b"a"])

    with pytest.raises(SourceUnavailable, match="no partition 5; allowed is 0 to 1"):
        parts_of(kafka.bootstrap, topic, partitions=[0, 5])


@pytest.mark.parametrize("name", ["", "a b", "x" * 250])
def test_name_that_no_topic_can_have(kafka: broker.Kafka, name: str) -> None:
    """It is one sentence for reader and writer."""
    with pytest.raises(SourceUnavailable):
        parts_of(kafka.bootstrap, name)
    with pytest.raises(SinkUnavailable):
        edge.ensure_topic(edge.settings(kafka.bootstrap), name)


def test_markers_and_aborted_transactions(kafka: broker.Kafka, topic: str) -> None:
    """Aborted events are not shown, and markers that take offsets at the end do not make a read wait for ever."""
    create(kafka.bootstrap, topic)
    producer = raw_producer(kafka.bootstrap, transactional_id=topic)
    producer.init_transactions(20)
    for kept in (True, False, True, False):
        producer.begin_transaction()
        for number in range(10):
            producer.produce(topic, f"{kept} {number}".encode())
        producer.flush()
        (producer.commit_transaction if kept else producer.abort_transaction)(20)
    begun = time.monotonic()

    parts = parts_of(kafka.bootstrap, topic)

    assert [f"True {number}".encode() for number in range(10)] * 2 == values_of(parts)
    assert [] == unread_of(parts)
    assert time.monotonic() - begun < 3


def test_open_transaction_bounds_the_read(kafka: broker.Kafka, topic: str) -> None:
    """What is not committed yet is neither shown nor waited for."""
    create(kafka.bootstrap, topic)
    publish(kafka.bootstrap, topic, [b"a"])
    producer = raw_producer(kafka.bootstrap, transactional_id=topic)
    producer.init_transactions(20)
    producer.begin_transaction()
    producer.produce(topic, b"not yet")
    producer.flush()
    parts = parts_of(kafka.bootstrap, topic)
    producer.abort_transaction(20)

    assert [b"a"] == values_of(parts)


def _delete_before(kafka: broker.Kafka, name: str, partition: int, offset: int) -> None:
    place = TopicPartition(name, partition, offset)
    admin_of(kafka.bootstrap).delete_records([place])[place].result(10)


def test_log_that_begins_later(kafka: broker.Kafka, topic: str) -> None:
    """What was deleted before the read began is not missed."""
    create(kafka.bootstrap, topic)
    publish(kafka.bootstrap, topic, some(10))
    _delete_before(kafka, topic, 0, 6)

    assert some(10)[6:] == values_of(parts_of(kafka.bootstrap, topic))


@pytest.mark.parametrize(("deleted", "left"), [(40, 60), (100, 0)])
def test_log_start_that_moves_during_the_read(kafka: broker.Kafka, topic: str, deleted: int, left: int) -> None:
    """Events that are deleted before their turn are a range that is told, and the rest is read."""
    create(kafka.bootstrap, topic, 2)
    publisher = raw_producer(kafka.bootstrap)
    for partition, value in itertools.product(range(2), some(100)):
        publisher.produce(topic, value, partition=partition)
    publisher.flush()
    reading = edge.read(topic, edge.settings(kafka.bootstrap))
    parts = [next(reading)]
    _delete_before(kafka, topic, 1, deleted)
    parts += reading

    assert some(100) + some(100)[100 - left :] == values_of(parts)
    assert [(1, 0, deleted)] == unread_of(parts)


@pytest.mark.parametrize("size", [1, 500])
def test_damaged_batch_is_skipped_and_told(kafka: broker.Kafka, topic: str, size: int) -> None:
    """One stored batch whose bytes were changed does not end the read; its offsets are told."""
    create(kafka.bootstrap, topic)
    for tag, count in (("before", 30), ("damaged", size), ("after", 30)):
        publish(kafka.bootstrap, topic, some(count, tag))
    (log,) = (kafka.data / f"{topic}-0").glob("*.log")
    _damage(log, nth=1)

    parts = parts_of(kafka.bootstrap, topic)

    assert some(30, "before") + some(30, "after") == values_of(parts)
    assert [(0, 30, 30 + size)] == unread_of(parts)
    assert all("damaged" in part.reason for part in parts if isinstance(part, edge.Unread))


def _damage(log: Path, nth: int) -> None:
    """Change the last byte of the nth batch of a log segment: 8 bytes of offset, 4 of length, then the batch."""
    raw = bytearray(log.read_bytes())
    at = 0
    for _ in range(nth):
        at += 12 + int.from_bytes(raw[at + 8 : at + 12])
    raw[at + 12 + int.from_bytes(raw[at + 8 : at + 12]) - 1] ^= 0xFF
    with log.open("r+b") as file:
        file.write(raw)


def test_start_by_time(kafka: broker.Kafka, topic: str) -> None:
    """A quarter of an hour before the time is read too, for clocks differ; after the last message there is nothing."""
    create(kafka.bootstrap, topic)
    now_ms = int(time.time() * 1000)
    producer = raw_producer(kafka.bootstrap)
    for minutes in (60, 14, 0):
        producer.produce(topic, f"{minutes} minutes ago".encode(), timestamp=now_ms - minutes * 60_000)
    producer.flush()

    def read(time_us: int) -> list[bytes | None]:
        return values_of(parts_of(kafka.bootstrap, topic, start=edge.Start.time(time_us)))

    assert [b"14 minutes ago", b"0 minutes ago"] == read(now_ms * 1000)
    assert [] == read((now_ms + 3_600_000) * 1000)
    assert len(read(0)) == 3


def test_start_at_the_newest(kafka: broker.Kafka, topic: str) -> None:
    """The last offsets of each partition, or what there is."""
    create(kafka.bootstrap, topic)
    publish(kafka.bootstrap, topic, some(10))

    for count in (0, 3, 10, 50):
        parts = parts_of(kafka.bootstrap, topic, start=edge.Start.newest(count))
        assert some(10)[max(0, 10 - count) :] == values_of(parts)


@pytest.mark.parametrize("chunk", [1, 7, 10, 1000])
def test_backwards_is_the_reverse(kafka: broker.Kafka, topic: str, chunk: int) -> None:
    """Parts come newest first and whole; put in reverse they are what a read gives."""
    create(kafka.bootstrap, topic, 2)
    producer = raw_producer(kafka.bootstrap)
    for partition, value in itertools.product(range(2), some(20)):
        producer.produce(topic, f"{partition} ".encode() + value, partition=partition)
    producer.flush()

    parts = list(edge.read_backwards(topic, edge.settings(kafka.bootstrap), chunk=chunk))

    assert values_of(parts_of(kafka.bootstrap, topic)) == values_of(parts[::-1])
    assert all(len(part.values) <= chunk for part in parts if isinstance(part, edge.Messages))
    assert isinstance(parts[-1], edge.Messages)
    assert parts[-1].done == parts[-1].total == 40


def test_follow_goes_on(kafka: broker.Kafka, topic: str) -> None:
    """After what was there comes what is published later, at once."""
    create(kafka.bootstrap, topic, 2)
    publish(kafka.bootstrap, topic, [b"before"])
    following = edge.read(topic, edge.settings(kafka.bootstrap), follow=True)
    first = next(following)
    publish(kafka.bootstrap, topic, [b"later"], key="another node")
    begun = time.monotonic()
    second = next(following)
    taken = time.monotonic() - begun
    following.close()  # type: ignore[attr-defined]

    assert [[b"before"], [b"later"]] == [part.values for part in (first, second) if isinstance(part, edge.Messages)]
    assert taken < 0.5


def test_follow_waits_for_a_broker_that_restarts(kafka: broker.Kafka, topic: str) -> None:
    """A live view survives a broker's restart, says what is wrong, and misses nothing."""
    create(kafka.bootstrap, topic)
    publish(kafka.bootstrap, topic, [b"before"])
    heard = Heard()
    following = edge.read(topic, edge.settings(kafka.bootstrap), follow=True, say=heard.say)
    first = next(following)
    kafka.kill()
    kafka.start()
    publish(kafka.bootstrap, topic, [b"later"])
    second = next(following)
    following.close()  # type: ignore[attr-defined]

    assert [[b"before"], [b"later"]] == [part.values for part in (first, second) if isinstance(part, edge.Messages)]
    assert heard.wait_for(f"Kafka at {kafka.bootstrap} cannot be reached")


def test_reading_leaves_no_trace(kafka: broker.Kafka, topic: str) -> None:
    """No group, no commit: the cluster does not know afterwards that anybody read."""
    create(kafka.bootstrap, topic)
    publish(kafka.bootstrap, topic, some(100))
    admin = admin_of(kafka.bootstrap)
    before = {group.group_id for group in admin.list_consumer_groups().result(10).valid}
    reading = edge.read(topic, edge.settings(kafka.bootstrap))
    next(reading)
    during = {group.group_id for group in admin.list_consumer_groups().result(10).valid}
    list(reading)

    assert before == during
    assert before == {group.group_id for group in admin.list_consumer_groups().result(10).valid}
    assert not list((kafka.data).glob("__consumer_offsets-*/*.log")) or _no_commits(kafka)


def _no_commits(kafka: broker.Kafka) -> bool:
    consumer = Consumer({"bootstrap.servers": kafka.bootstrap, "group.id": "test"})
    first, end = consumer.get_watermark_offsets(TopicPartition("__consumer_offsets", 0), 10)
    consumer.close()
    return bool(first == end)


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        (
            "127.0.0.1:1",
            "Kafka at 127.0.0.1:1 cannot be reached (Connect to ipv4#127.0.0.1:1 failed: Connection refused)",
        ),
        ("nowhere.invalid:9092", "the name of Kafka's address nowhere.invalid:9092 cannot be resolved"),
    ],
)
def test_unreachable_broker_is_one_quick_sentence(address: str, sentence: str) -> None:
    """Within three seconds, as one sentence with the address, and nothing of the library's own on standard error."""
    program = (
        "import sys; from pipeline import errors, topic\n"
        "try: list(topic.read('binds', topic.settings(sys.argv[1])))\n"
        "except errors.SourceUnavailable as error: print(error)\n"
    )
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program, address], capture_output=True, text=True, check=False)

    assert sentence in done.stdout
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 1
    assert time.monotonic() - begun < 3


# --- rights -------------------------------------------------------------------------------------------------------

_USERS = {"admin": "admin-secret", "writer": "writer-secret", "stranger": "stranger-secret"}


@pytest.fixture(scope="module")
def guarded() -> Iterator[broker.Kafka]:
    """A broker with user names, rights, and topics that come into being when somebody touches them."""
    plain = "org.apache.kafka.common.security.plain.PlainLoginModule required "
    users = " ".join(f'user_{name}="{password}"' for name, password in _USERS.items())
    properties = {
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "super.users": "User:ANONYMOUS;User:admin",
        "sasl.enabled.mechanisms": "PLAIN",
        "listener.name.client.plain.sasl.jaas.config": f"{plain} {users};",
        "auto.create.topics.enable": "true",
    }
    with servers.kafka(properties, protocol="SASL_PLAINTEXT") as node:
        yield node


def as_user(node: broker.Kafka, user: str, password: str | None = None, **extra: str) -> dict[str, str]:
    """Settings of one user."""
    login = {"security.protocol": "SASL_PLAINTEXT", "sasl.mechanism": "PLAIN", "sasl.username": user}
    login["sasl.password"] = password or _USERS[user]
    return edge.settings(node.bootstrap, login | {key.replace("_", "."): value for key, value in extra.items()})


def allow(node: broker.Kafka, user: str, name: str, *operations: AclOperation) -> None:
    """Give a user rights on one topic."""
    admin = admin_of(node.internal)
    bindings = [
        AclBinding(
            ResourceType.TOPIC,
            name,
            ResourcePatternType.LITERAL,
            f"User:{user}",
            "*",
            operation,
            AclPermissionType.ALLOW,
        )
        for operation in operations
    ]
    for done in admin.create_acls(bindings).values():
        done.result(10)


def test_forbidden_topic(guarded: broker.Kafka, topic: str) -> None:
    """Without rights there is one sentence, for reader and writer, that names the topic and the user."""
    create(guarded.internal, topic)
    stranger = as_user(guarded, "stranger")

    with pytest.raises(SourceUnavailable, match=f"no permission on topic {topic} at .* of user stranger"):
        list(edge.read(topic, stranger))
    with pytest.raises(SinkUnavailable, match=f"no permission on topic {topic} at .* of user stranger"):
        edge.Publisher(topic, stranger, key="node-1").publish([b"a"])


def test_topic_that_may_be_seen_but_not_read(guarded: broker.Kafka, topic: str) -> None:
    """DESCRIBE without READ is not an endless wait."""
    create(guarded.internal, topic)
    publish(guarded.internal, topic, some(3))
    allow(guarded, "stranger", topic, AclOperation.DESCRIBE)

    with pytest.raises(SourceUnavailable, match=f"no permission (on|to read) topic {topic} at .* of user stranger"):
        list(edge.read(topic, as_user(guarded, "stranger")))


def test_write_is_right_enough(guarded: broker.Kafka, topic: str) -> None:
    """An agent needs WRITE on its topic and nothing else; a limit it may not ask for is found when it is met."""
    create(guarded.internal, topic, max_message_bytes="2000", compression_type="uncompressed")
    allow(guarded, "writer", topic, AclOperation.WRITE)
    values = some(100, size=155)
    values[40] = b"x" * 3000
    publisher = edge.Publisher(topic, as_user(guarded, "writer", compression_type="none"), key="node-1")

    with pytest.raises(SinkRejected) as caught:
        publisher.publish(values)

    assert caught.value.indices == [40]
    del values[40]
    assert values == sorted(value or b"" for value in values_of(parts_of(guarded.internal, topic)))


def test_right_that_is_given_later(guarded: broker.Kafka, topic: str) -> None:
    """Events wait for a right as for a broker."""
    create(guarded.internal, topic)
    heard = Heard()
    publisher = edge.Publisher(topic, as_user(guarded, "writer"), key="node-1", say=heard.say)
    delivery = edge.Delivery(publisher, frame=as_they_are, say=heard.say)
    delivery.put(datums([b"a", b"b"]), 0)
    heard.wait_for(f"no permission on topic {topic}")
    allow(guarded, "writer", topic, AclOperation.WRITE)

    assert delivery.drain(30) == 0
    assert [b"a", b"b"] == values_of(parts_of(guarded.internal, topic))


def test_wrong_password(guarded: broker.Kafka, topic: str) -> None:
    """It is said at once and once, with the user and without the password."""
    wrong = as_user(guarded, "writer", "guessed")
    heard = Heard()
    begun = time.monotonic()
    with pytest.raises(SourceUnavailable, match="refuses the user name or password of user writer") as caught:
        list(edge.read(topic, wrong))
    taken = time.monotonic() - begun
    delivery = edge.Delivery(edge.Publisher(topic, wrong, key="node-1", say=heard.say), frame=as_they_are)
    delivery.put(datums([b"a"]), 0)
    heard.wait_for("refuses the user name or password of user writer")
    left = delivery.drain(0.5)

    assert taken < 3
    assert left == 1
    assert "guessed" not in str(caught.value)
    assert len(heard.sentences) <= 2


def test_nothing_of_ours_makes_a_topic(guarded: broker.Kafka, topic: str) -> None:
    """Even where the broker makes every topic that somebody touches, looking for one does not make it."""
    admin = as_user(guarded, "admin")

    with pytest.raises(SourceUnavailable, match="does not exist"):
        list(edge.read(topic, admin))
    with pytest.raises(SinkUnavailable, match="does not exist"):
        edge.Publisher(topic, admin, key="node-1").publish([b"a"])

    assert topic not in admin_of(guarded.internal).list_topics(timeout=10).topics


def test_plain_client_at_a_guarded_door(guarded: broker.Kafka) -> None:
    """A client without the settings for it hears what is missing, not silence."""
    with pytest.raises(SourceUnavailable, match=f"Kafka at {guarded.bootstrap} "):
        parts_of(guarded.bootstrap, "binds")


# --- answers that a healthy broker does not give ------------------------------------------------------------------


@pytest.fixture(scope="module")
def mock() -> Iterator[broker.Mock]:
    """One mock broker for this module."""
    cluster = broker.Mock()
    yield cluster
    cluster.close()


_PASSES_INSIDE = {"NOT_LEADER_FOR_PARTITION": 6, "REQUEST_TIMED_OUT": 7, "NOT_ENOUGH_REPLICAS": 19, "STORAGE": 56}
_COMES_OUT = {
    "TOPIC_AUTHORIZATION_FAILED": 29,
    "CLUSTER_AUTHORIZATION_FAILED": 31,
    "INVALID_TIMESTAMP": 32,
    "INVALID_REQUEST": 42,
    "POLICY_VIOLATION": 44,
    "UNSUPPORTED_COMPRESSION": 76,
    "UNKNOWN": -1,
    "THROTTLING_QUOTA_EXCEEDED": 89,
}
_KILLS = 45  # OUT_OF_ORDER_SEQUENCE_NUMBER


@pytest.fixture(scope="module")
def mocked(mock: broker.Mock) -> Iterator[edge.Publisher]:
    """A publisher to a topic of the mock; tests look at the end of it."""
    mock.create("mocked")
    publisher = edge.Publisher("mocked", edge.settings(mock.bootstrap), key="node-1")
    publisher.publish([b"before"])
    yield publisher
    publisher.close()


@pytest.mark.parametrize("code", [pytest.param(code, id=name) for name, code in _PASSES_INSIDE.items()])
def test_trouble_that_librdkafka_heals(mock: broker.Mock, mocked: edge.Publisher, topic: str, code: int) -> None:
    """A publish succeeds as if nothing had been, and nothing is doubled."""
    values = some(10, topic)
    mock.answer_produce(code)
    mocked.publish([b"before", *values])

    assert [b"before", *values] == values_of(parts_of(mock.bootstrap, "mocked", start=edge.Start.newest(11)))


@pytest.mark.parametrize("code", [pytest.param(code, id=name) for name, code in _COMES_OUT.items()])
def test_trouble_that_passes(mock: broker.Mock, mocked: edge.Publisher, topic: str, code: int) -> None:
    """No error code that can pass drops an event: what was not acknowledged is named, and goes with the next try."""
    mocked.publish([b"before"])
    values = some(10, topic)
    mock.answer_produce(code)

    with pytest.raises(SinkUnavailable, match=f"Kafka at {mock.bootstrap}|topic mocked at {mock.bootstrap}"):
        mocked.publish(values)
    left = mocked.unacknowledged
    mocked.publish([values[index] for index in left])

    assert list(range(10)) == left
    assert [b"before", *values] == values_of(parts_of(mock.bootstrap, "mocked", start=edge.Start.newest(11)))


def test_dead_producer_is_replaced(mock: broker.Mock, mocked: edge.Publisher) -> None:
    """An error that kills the producer is no end: the next call has a new one."""
    mocked.publish([b"before"])
    mock.answer_produce(_KILLS)

    with pytest.raises(SinkFatal, match="a new one takes over"):
        mocked.publish([b"a", b"b"])
    assert mocked.unacknowledged == [0, 1]
    mocked.publish([b"a", b"b"])

    expected = [b"before", b"a", b"b"]
    assert expected == values_of(parts_of(mock.bootstrap, "mocked", start=edge.Start.newest(3)))


def test_delivery_survives_a_dead_producer(mock: broker.Mock, topic: str) -> None:
    """The delivery goes on by itself."""
    mock.create(topic)
    publisher = edge.Publisher(topic, edge.settings(mock.bootstrap), key="node-1")
    publisher.publish([b"before"])
    mock.answer_produce(_KILLS)
    delivery = edge.Delivery(publisher, frame=as_they_are)
    delivery.put(datums([b"a", b"b"]), 0)

    assert delivery.drain(20) == 0
    assert [b"before", b"a", b"b"] == values_of(parts_of(mock.bootstrap, topic))
