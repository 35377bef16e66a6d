"""The topic: publish framed datums to Kafka, and read them back.

In: values, one message each, and settings of librdkafka. Out: acknowledgements; on the way back ``Messages`` in their
order and, in its place, ``Unread`` for what could not be read. Every exception and error code of the client becomes
one of ours here, with one sentence for a person; nothing of the client reaches standard error by itself.

Why it looks as it does:

* What waits is on disk where there is one, and then nothing is dropped; else a full queue may drop its oldest, which is
  reported. No error of a broker drops an event: the table of errors knows what is refused for itself (``_REFUSED``),
  and everything else is tried again. The client's own ``retriable()`` says False for almost everything, so it is
  never asked.
* One publisher, one producer, acknowledged by all replicas and idempotent: a broker that dies and returns neither
  loses nor doubles. Only a producer that is dead itself is replaced, and then what was not acknowledged is sent again;
  (epoch, pos) tells the copies apart.
* A value carries its own time. A timestamp is never passed: a topic that expires by it would drop a backlog at once.
* Reading assigns partitions and never subscribes, commits nothing and is bounded by the watermarks at its start, so it
  leaves no trace on the cluster and ends although the agents go on writing.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import re
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition

from pipeline.errors import (
    SchemaUnknown,
    SinkFatal,
    SinkRejected,
    SinkUnavailable,
    SourceUnavailable,
    Unavailable,
    UsageError,
)
from pipeline.event import printable

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pyarrow as pa

Say = Callable[[str, str], None]
"""``say(level, sentence)``: what an operator should hear now; level is ``info``, ``warn`` or ``error``."""

DEFAULT_BOOTSTRAP = "localhost:9092"

# --- settings -----------------------------------------------------------------------------------------------------

_OURS: dict[str, frozenset[str]] = {
    "acks": frozenset({"all", "-1"}),
    "request.required.acks": frozenset({"all", "-1"}),
    "enable.idempotence": frozenset({"true"}),
    "message.timeout.ms": frozenset({"0"}),
    "delivery.timeout.ms": frozenset({"0"}),
    "delivery.report.only.error": frozenset({"true"}),
    "queue.buffering.max.messages": frozenset(),
    "queue.buffering.max.kbytes": frozenset(),
    "transactional.id": frozenset(),
    "enable.auto.commit": frozenset({"false"}),
    "enable.auto.offset.store": frozenset({"false"}),
    "enable.partition.eof": frozenset({"true"}),
    "auto.offset.reset": frozenset({"error"}),
    "group.instance.id": frozenset(),
}
"""Settings that a promise depends on, and the values that they may be given; the others are the user's."""


def settings(
    bootstrap: str | None = None, extra: Mapping[str, str] | None = None, properties_file: Path | None = None
) -> dict[str, str]:
    """Settings of librdkafka: those of a file, over them ``bootstrap``, over them ``extra`` (``-X key=value``).

    The file holds Java-style properties: ``key=value`` or ``key: value``, ``#`` and ``!`` begin a comment, a backslash
    at the end continues the line. Without any address it is ``localhost:9092``. UsageError names a setting that
    librdkafka does not know, a value that it does not take, and a file (of certificates too) that cannot be read.
    """
    chosen = {"bootstrap.servers": DEFAULT_BOOTSTRAP}
    if properties_file is not None:
        chosen |= _properties(properties_file)
    if bootstrap is not None:
        chosen["bootstrap.servers"] = bootstrap
    chosen |= extra or {}
    for name, allowed in _OURS.items():
        if name in chosen and chosen[name] not in allowed:
            only = f"; allowed is {' or '.join(sorted(allowed))}" if allowed else ""
            raise UsageError(f"the Kafka setting {name}={chosen[name]} is not open to change{only}")
    _checked({name: value for name, value in chosen.items() if name != "bootstrap.servers"})
    return chosen


def _properties(path: Path) -> dict[str, str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the file of Kafka settings {path} cannot be read: {error}") from error
    found = {}
    for line in re.sub(r"\\\r?\n[ \t]*", "", text).splitlines():
        line = line.strip()
        if not line or line[0] in "#!":
            continue
        name, separator, value = re.match(r"([^=:\s]*)\s*([=:]?)\s*(.*)", line).groups()  # type: ignore[union-attr]
        if not name or not separator:
            raise UsageError(f"{line!r} in {path} is not a Kafka setting; allowed is key=value")
        found[name] = value
    return found


def _checked(chosen: Mapping[str, str]) -> None:
    """A producer without an address connects to nothing and has librdkafka judge every setting, also a consumer's."""
    try:
        Producer({**chosen, "logger": _silent_logger()})
    except KafkaException as error:
        reason = error.args[0].str().removeprefix("Failed to create producer: ").strip()
        unknown = re.search(r'No such configuration property: "(.*)"', reason)
        if unknown:
            raise UsageError(f"{unknown[1]} is not a setting of librdkafka") from error
        invalid = re.search(r'Invalid value .*for configuration property "(.*)"', reason)
        if invalid and invalid[1] in chosen:
            raise UsageError(f"the Kafka setting {invalid[1]}={chosen[invalid[1]]} has no allowed value") from error
        raise UsageError(f"librdkafka refuses the Kafka settings: {printable(reason.encode())}") from error


def _silent_logger() -> logging.Logger:
    # Without a logger librdkafka writes to standard error itself. What matters comes through the error callback.
    logger = logging.Logger("librdkafka")
    logger.addHandler(logging.NullHandler())
    return logger


# --- errors -------------------------------------------------------------------------------------------------------

_REFUSED = frozenset(
    {
        KafkaError.MSG_SIZE_TOO_LARGE,
        KafkaError.INVALID_RECORD,
        KafkaError.INVALID_MSG_SIZE,
        KafkaError.RECORD_LIST_TOO_LARGE,
    }
)
"""The batch is refused for what is in it: smaller batches, and a single message is set aside. All else is retried."""

_BAD_BATCH = frozenset({KafkaError._BAD_COMPRESSION, KafkaError._BAD_MSG, KafkaError.INVALID_MSG})
"""A stored batch that will never be readable: skipped and reported."""

_SENTENCES: dict[int, str] = {
    KafkaError._AUTHENTICATION: "Kafka at {where} refuses the user name or password{user}",
    KafkaError.SASL_AUTHENTICATION_FAILED: "Kafka at {where} refuses the user name or password{user}",
    KafkaError._SSL: "no TLS connection to Kafka at {where} comes about; ssl.ca.location and, where the broker asks "
    "for one, ssl.certificate.location must fit ({why})",
    KafkaError._RESOLVE: "the name of Kafka's address {where} cannot be resolved ({why})",
    KafkaError._TRANSPORT: "Kafka at {where} cannot be reached ({why})",
    KafkaError._ALL_BROKERS_DOWN: "Kafka at {where} closes every connection; it may be stopping, or ask for another "
    "security.protocol",
    KafkaError._TIMED_OUT: "Kafka at {where} does not answer ({why})",
    KafkaError.TOPIC_AUTHORIZATION_FAILED: "no permission on topic {topic} at {where}{user}",
    # A reader without READ on the topic hears of the group first, although it uses none.
    KafkaError.GROUP_AUTHORIZATION_FAILED: "no permission to read topic {topic} at {where}{user}",
    KafkaError.CLUSTER_AUTHORIZATION_FAILED: "Kafka at {where} does not permit this client what it needs{user} ({why})",
    KafkaError.UNKNOWN_TOPIC_OR_PART: "topic {topic} does not exist at {where}",
    KafkaError._UNKNOWN_TOPIC: "topic {topic} does not exist at {where}",
    KafkaError._UNKNOWN_PARTITION: "topic {topic} at {where} has no such partition ({why})",
    KafkaError.NOT_ENOUGH_REPLICAS: "topic {topic} at {where} has too few replicas in sync to take events",
    KafkaError.TOPIC_EXCEPTION: "{topic} is not a name that a topic can have",
}

_WILL_NOT_PASS = frozenset({KafkaError._AUTHENTICATION, KafkaError.SASL_AUTHENTICATION_FAILED, KafkaError._SSL})
"""Heard while connecting, these are an answer; the others may be the first of several addresses."""

_FORBIDDEN = frozenset(
    {
        KafkaError.TOPIC_AUTHORIZATION_FAILED,
        KafkaError.GROUP_AUTHORIZATION_FAILED,
        KafkaError.CLUSTER_AUTHORIZATION_FAILED,
    }
)
_NEVER_CREATED = frozenset(
    {KafkaError.INVALID_REPLICATION_FACTOR, KafkaError.INVALID_PARTITIONS, KafkaError.TOPIC_EXCEPTION}
)
_GONE = frozenset({KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC, KafkaError._UNKNOWN_PARTITION})


def _sentence(error: KafkaError, topic: str, chosen: Mapping[str, str]) -> str:
    """One sentence about ``error``: printable whatever a broker wrote, and without a password."""
    why = re.sub(r"^\S*/(bootstrap|\d+): ", "", error.str())
    why = re.sub(r" \(after \d+ms in state [^)]*\)", "", why).strip()
    user = chosen.get("sasl.username") or chosen.get("sasl.user")
    text = _SENTENCES.get(error.code(), "Kafka at {where} answers for topic {topic}: {why}").format(
        where=chosen.get("bootstrap.servers", DEFAULT_BOOTSTRAP),
        topic=topic,
        why=why,
        user=f" of user {user}" if user else "",
    )
    return printable(text.encode("utf-8", "surrogateescape")).replace("\\\\", "\\")


class _Troubles:
    """What the client's error callback reports, as one sentence now and then instead of twenty a second.

    ``last`` is the error that explains most, and ``all_down`` that no address is left to try, until ``over()``;
    ``fatal`` says that the producer is dead.
    """

    _AGAIN_SECS = 60.0

    def __init__(self, topic: str, chosen: Mapping[str, str], say: Say) -> None:
        self._topic, self._chosen, self._say = topic, chosen, say
        self._said: tuple[int, float] | None = None
        self._ended = False
        self.last: KafkaError | None = None
        self.all_down = False
        self.fatal: KafkaError | None = None

    def end(self) -> None:
        """Its client is closed: what is heard from now on is of the past."""
        self._ended = True

    def heard(self, error: KafkaError) -> None:
        """The error callback."""
        if self._ended:
            return
        if error.fatal():
            self.fatal = error
        # "All brokers are down" follows the error that says why, and must not hide it.
        if error.code() == KafkaError._ALL_BROKERS_DOWN:
            self.all_down = True
            if self.last is not None:
                return
        self.last = error
        now = time.monotonic()
        if self._said is None or self._said[0] != error.code() or now - self._said[1] >= self._AGAIN_SECS:
            self._said = (error.code(), now)
            self._say("warn", self.sentence(error))

    def over(self) -> None:
        """Something arrived: what was wrong has passed."""
        self.last, self.all_down = None, False
        if self._said is not None:
            self._said = None
            where = self._chosen.get("bootstrap.servers", DEFAULT_BOOTSTRAP)
            self._say("info", f"Kafka at {where} works again for topic {self._topic}")

    def sentence(self, error: KafkaError | None = None) -> str:
        """One sentence about ``error``, or about the last one heard."""
        error = error or self.last or KafkaError(KafkaError._TIMED_OUT)
        return _sentence(error, self._topic, self._chosen)


def _quiet(_level: str, _sentence_: str) -> None:
    """Say nothing: what is wrong comes as an exception."""


# --- creating -----------------------------------------------------------------------------------------------------

_ASK_SECS = 3.0
_CONFIG_SECS = 1.0


class TopicState(NamedTuple):
    """What a topic is before anything is sent: its partitions, and its ``max.message.bytes`` where we may know it."""

    partitions: int
    max_message_bytes: int | None


def ensure_topic(
    chosen: Mapping[str, str],
    topic: str,
    *,
    partitions: int = -1,
    replication: int = -1,
    create: bool = False,
    say: Say = _quiet,
    stopping: Callable[[], bool] = lambda: False,
) -> TopicState:
    """State of ``topic``, made first when it is missing and ``create`` says so.

    A topic of ours stamps messages when they arrive (``LogAppendTime``), so that a backlog does not expire on its way
    in, and stores zstd, whose unpacked size a reader can bound. -1 is the broker's own default. Asking
    never creates one, whatever the broker's settings. SinkUnavailable when Kafka cannot be reached, the topic is
    missing or forbidden, or when ``stopping`` turns true; UsageError when it cannot be made as asked.
    """
    # The admin client's modules are needed by agents only; a reader starts without them.
    from confluent_kafka.admin import AdminClient, ConfigResource, NewTopic, ResourceType  # type: ignore[attr-defined]

    missing = False
    try:
        # A consumer asks, because a producer's or an admin's question makes the topic where the broker allows it.
        with _Source(topic, chosen, say, SinkUnavailable) as source:
            count = len(source.partitions(stopping))
    except _Missing as error:
        if not create:
            hint = "create it, or let the agent do so by --create-topic"
            raise SinkUnavailable(f"{error}: {hint}") from error
        missing = True
    troubles = _Troubles(topic, chosen, say)
    # Not before: what it heard while Kafka was away would be said after Kafka works again.
    admin = AdminClient(_client(chosen, troubles, {"client.id": "bindsnoop-agent"}))
    if missing:
        wanted = {"message.timestamp.type": "LogAppendTime", "compression.type": "zstd"}
        request = NewTopic(topic, num_partitions=partitions, replication_factor=replication, config=wanted)
        try:
            admin.create_topics([request], request_timeout=_ASK_SECS)[topic].result()
        except KafkaException as refused:
            if _code(refused) in _NEVER_CREATED:
                sizes = f"{partitions} partitions and {replication} replicas"
                raise UsageError(f"topic {topic} cannot be created with {sizes}: {refused.args[0].str()}") from refused
            if _code(refused) != KafkaError.TOPIC_ALREADY_EXISTS:
                raise _mapped(refused, SinkUnavailable, troubles) from refused
        count = partitions
    try:
        resource = ConfigResource(ResourceType.TOPIC, topic)
        entries = admin.describe_configs([resource], request_timeout=_CONFIG_SECS)[resource].result()
        limit = int(entries["max.message.bytes"].value)
    except (KafkaException, KeyError, TypeError, ValueError):
        # The right to ask is one more than an agent needs; without it the limit is found when it is met.
        return TopicState(count, None)
    return TopicState(count, limit)


class _Missing(SinkUnavailable):
    """The topic does not exist."""


def _client(chosen: Mapping[str, str], troubles: _Troubles, own: Mapping[str, Any]) -> dict[str, Any]:
    """Configuration of a client: our defaults, the user's settings over them, our callbacks."""
    return {**own, **chosen, "logger": _silent_logger(), "error_cb": troubles.heard}


def _code(error: BaseException) -> int | None:
    inner = error.args[0] if isinstance(error, KafkaException) and error.args else None
    return inner.code() if isinstance(inner, KafkaError) else None


def _mapped(error: BaseException, kind: type[Unavailable], troubles: _Troubles) -> Unavailable:
    """``error`` as one of ours: of ``kind``, or what the error callback heard where that explains it."""
    inner = error.args[0] if isinstance(error, KafkaException) and error.args else None
    if not isinstance(inner, KafkaError):
        return kind(printable(str(error).encode()))
    vague = {KafkaError._TRANSPORT, KafkaError._TIMED_OUT, KafkaError._ALL_BROKERS_DOWN, KafkaError._WAIT_COORD}
    if inner.code() in vague and troubles.last is not None:
        inner = troubles.last
    return kind(troubles.sentence(inner))


# --- publishing ---------------------------------------------------------------------------------------------------

_PIECE_VALUES = 20_000
_PIECE_BYTES = 16 << 20
_BATCH_BYTES = 1_000_000

_PRODUCER = {
    "client.id": "bindsnoop-agent",
    "compression.type": "zstd",
    # The same node goes to the same partition as with clients in Java.
    "partitioner": "murmur2_random",
    "linger.ms": "20",
    "batch.num.messages": "100000",
    # The topic's own limit decides what is too large, not the client's.
    "message.max.bytes": "67108864",
    "topic.metadata.refresh.interval.ms": "30000",
    "topic.metadata.propagation.max.ms": "5000",
    "reconnect.backoff.max.ms": "2000",
}
_PRODUCER_PROMISES = {
    "acks": "all",
    "enable.idempotence": "true",
    "message.timeout.ms": "0",
    "delivery.report.only.error": "true",
    "queue.buffering.max.messages": str(4 * _PIECE_VALUES),
    "queue.buffering.max.kbytes": str(8 * _PIECE_BYTES // 1024),
}


class Creation(NamedTuple):
    """How to make a topic that is missing; -1 is the broker's own default."""

    partitions: int = -1
    replication: int = -1


class Publisher:
    """One producer to one topic; every value goes under one ``key``, so into one partition, in order.

    Not thread-safe but for ``give_up``. Connects with the first ``publish``. ``unacknowledged`` are the places, in
    what was last handed to ``publish``, of the values that the topic has not acknowledged.
    """

    def __init__(
        self,
        topic: str,
        chosen: Mapping[str, str],
        *,
        key: str,
        create: Creation | None = None,
        silent_secs: float = 300.0,
        say: Say = _quiet,
    ) -> None:
        """When a connection that works has acknowledged nothing for ``silent_secs``, a new one is made."""
        self.topic = topic
        self.unacknowledged: list[int] = []
        self._silent_secs = silent_secs
        self._silent = False
        self._chosen, self._create = dict(chosen), create
        self._key = key.encode()
        self._troubles = _Troubles(topic, chosen, say)
        self._say = say
        self._producer: Producer | None = None
        self._batch_bytes = min(_BATCH_BYTES, int(chosen.get("batch.size", _BATCH_BYTES)))
        self._given_up = threading.Event()

    def publish(self, values: Sequence[bytes]) -> None:
        """Return when every replica in sync has acknowledged every value; may block as long as Kafka is away.

        SinkUnavailable: some were not taken, or ``give_up`` was called; hand over those at ``unacknowledged`` again.
        SinkFatal: the same, and the producer was dead; the next call makes a new one. SinkRejected: those at its
        ``indices`` are refused for themselves, all others are acknowledged. UsageError: a setting is wrong.
        """
        self.unacknowledged = list(range(len(values)))
        rejected: dict[int, KafkaError] = {}
        kept: dict[int, KafkaError] = {}
        too_large: list[tuple[list[int], int]] = []
        pieces: deque[Sequence[int]] = deque(_pieces(values))
        self._connect()
        while pieces and not (self._troubles.fatal or self._silent or self._given_up.is_set()):
            piece = pieces.popleft()
            if isinstance(piece, range):
                failures = self._send(values[piece.start : piece.stop])
            else:
                failures = self._send([values[place] for place in piece])
            refused = []
            for index, error in sorted(failures.items()):
                place = piece[index]
                if error.code() not in _REFUSED:
                    kept[place] = error
                elif len(piece) == 1:
                    rejected[place] = error
                else:
                    refused.append(place)
            if refused:
                too_large.append((refused, sum(len(values[place]) for place in refused)))
                half = len(refused) // 2
                pieces.extendleft(part for part in (refused[half:], refused[:half]) if part)
        self.unacknowledged = sorted({*kept, *(place for piece in pieces for place in piece)})
        self._learn(too_large, rejected)
        fatal = self._troubles.fatal
        if fatal is not None:
            self._discard()
            raise SinkFatal(f"the Kafka producer of topic {self.topic} is dead ({fatal.str()}); a new one takes over")
        if self._silent:
            self._silent = False
            self._discard()
            where = self._chosen.get("bootstrap.servers", DEFAULT_BOOTSTRAP)
            raise SinkUnavailable(
                f"Kafka at {where} takes events for topic {self.topic} and has acknowledged none for "
                f"{self._silent_secs:g} s; a new connection is made"
            )
        if self.unacknowledged:
            count = len(self.unacknowledged)
            if kept:
                error = next(iter(kept.values()))
                if error.code() in _FORBIDDEN | _GONE:
                    # The producer repeats such an answer from memory until its next look at the cluster.
                    self._discard()
                purged = {KafkaError._PURGE_QUEUE, KafkaError._PURGE_INFLIGHT}
                if error.code() not in purged:
                    raise SinkUnavailable(self._troubles.sentence(error))
            reason = f": {self._troubles.sentence()}" if self._troubles.last is not None else ""
            raise SinkUnavailable(f"topic {self.topic} has not acknowledged {count} events in time{reason}")
        if rejected:
            places = sorted(rejected)
            why = _sentence(rejected[places[0]], self.topic, self._chosen)
            raise SinkRejected(f"{len(places)} events are refused for themselves: {why}", places)

    def give_up(self) -> None:
        """Make a ``publish`` that is blocked, and every later one, raise SinkUnavailable soon. For other threads."""
        self._given_up.set()

    def close(self) -> None:
        """Let go of the producer at once; what is not acknowledged is not sent."""
        self._discard()

    def _connect(self) -> None:
        if self._producer is not None:
            return
        wanted = self._create or Creation()
        state = ensure_topic(
            self._chosen,
            self.topic,
            partitions=wanted.partitions,
            replication=wanted.replication,
            create=self._create is not None,
            say=self._say,
            stopping=self._given_up.is_set,
        )
        if state.max_message_bytes is not None:
            self._batch_bytes = min(self._batch_bytes, state.max_message_bytes)
        own = {**_PRODUCER, **self._chosen, **_PRODUCER_PROMISES, "batch.size": str(self._batch_bytes)}
        # Two spellings of one setting would contradict each other.
        for alias in ("request.required.acks", "delivery.timeout.ms"):
            own.pop(alias, None)
        configuration = {**own, "logger": _silent_logger(), "error_cb": self._troubles.heard}
        configuration["delivery.report.only.error"] = True
        try:
            self._producer = Producer(configuration)
        except KafkaException as error:
            raise UsageError(f"librdkafka refuses the Kafka settings: {error.args[0].str()}") from error

    def _discard(self) -> None:
        self._troubles.fatal = None
        if self._producer is not None:
            # A producer with messages left would wait for them when it is collected.
            self._producer.purge()
            self._producer.poll(0)
            self._producer = None

    def _send(self, values: Sequence[bytes]) -> dict[int, KafkaError]:
        """Send and wait until each value is acknowledged or failed; the failures by place."""
        assert self._producer is not None
        producer, failures = self._producer, {}
        failed: list[tuple[KafkaError, bytes]] = []

        def report(error: KafkaError | None, message: Any) -> None:
            if error is not None:
                failed.append((error, message.value() or b""))

        key = self._key
        messages = [{"value": value, "key": key} for value in values]
        try:
            queued = producer.produce_batch(self.topic, messages, on_delivery=report)
        except (KafkaException, BufferError) as error:
            # What had been queued before the error is settled by the reports below or purged with the producer.
            inner = error.args[0] if isinstance(error, KafkaException) else None
            if isinstance(inner, KafkaError) and (inner.fatal() or inner.code() == KafkaError._FATAL):
                self._troubles.fatal = inner
            self._settle(producer, purge=True)
            return {index: inner or KafkaError(KafkaError._QUEUE_FULL) for index in range(len(values))}
        if queued < len(messages):
            for index, message in enumerate(messages):
                error_ = message.get("_error")
                if error_ is not None:
                    failures[index] = _as_error(error_)
        self._settle(producer, purge=False)
        if any(error.code() == KafkaError._FATAL or error.fatal() for error, _ in failed):
            self._troubles.fatal = self._troubles.fatal or failed[0][0]
        if failed:
            places: dict[bytes, list[int]] = {}
            for index, value in enumerate(values):
                if index not in failures:
                    places.setdefault(value, []).append(index)
            for error__, value in failed:
                # Equal values are equal events: which of the copies failed makes no difference. The later ones are
                # taken, so that the order of what is sent again is that of the failures.
                failures[places[value].pop()] = error__
        if len(failures) < len(values):
            self._troubles.over()
        return failures

    def _settle(self, producer: Producer, *, purge: bool) -> None:
        """Wait until every message has its report. A dead producer, one that is silent, or ``give_up`` ends the
        waiting by a purge."""
        left, since = len(producer), time.monotonic()
        while not purge:
            try:
                if not producer.flush(0.2):
                    return
            except KafkaException as error:
                # A producer that died says so here, although its messages still lack their reports.
                self._troubles.fatal = self._troubles.fatal or error.args[0]
            if len(producer) < left or self._troubles.last is not None:
                left, since = len(producer), time.monotonic()
            self._silent = time.monotonic() - since >= self._silent_secs
            purge = self._silent or self._troubles.fatal is not None or self._given_up.is_set()
        producer.purge()
        while len(producer):
            producer.poll(0.1)

    def _learn(self, too_large: list[tuple[list[int], int]], rejected: Mapping[int, KafkaError]) -> None:
        """Smaller batches from now on, if a batch was too large and its events one by one were not."""
        limits = [size // 2 for places, size in too_large if not any(place in rejected for place in places)]
        if limits:
            self._batch_bytes = max(1, min(self._batch_bytes, *limits))
            self._say(
                "info", f"topic {self.topic} takes smaller batches than expected: {self._batch_bytes} bytes from now on"
            )
            self._discard()


def _as_error(found: object) -> KafkaError:
    return found if isinstance(found, KafkaError) else KafkaError(KafkaError._FAIL, str(found))


def _pieces(values: Sequence[bytes]) -> Iterator[range]:
    """Places of ``values`` in runs that the producer's own queue can hold."""
    begin = size = 0
    for place, length in enumerate(map(len, values)):
        if place - begin >= _PIECE_VALUES or (place > begin and size + length > _PIECE_BYTES):
            yield range(begin, place)
            begin, size = place, 0
        size += length
    if begin < len(values):
        yield range(begin, len(values))


# --- delivery -----------------------------------------------------------------------------------------------------

_GROUP_EVENTS = 20_000
_GROUP_BYTES = 4 << 20
_WAIT_SECS_MAX = 10.0


@dataclass(frozen=True, slots=True)
class Dropped:
    """Events that will not be in the topic: ``pos`` from first to last, both included, how many, and why."""

    first_pos: int
    last_pos: int
    count: int
    reason: str
    epoch: str = ""


class Stats(NamedTuple):
    """Events waiting (``queued``, of which ``queued_bytes`` are held in memory), and those that left, by how;
    ``last_error`` or ``""``."""

    queued: int
    queued_bytes: int
    acknowledged: int
    dropped: int
    rejected: int
    last_error: str


class Part(Protocol):
    """Records that were read back: ``positions``, ascending, and a datum for each. Where there are none, ``reason``
    says why those from ``first_pos`` to ``last_pos`` cannot be had."""

    @property
    def first_pos(self) -> int: ...
    @property
    def last_pos(self) -> int: ...
    @property
    def positions(self) -> npt.NDArray[np.int64]: ...
    @property
    def datums(self) -> pa.BinaryArray: ...
    @property
    def reason(self) -> str: ...


class Backlog(Protocol):
    """Reads back what waits on disk. One thread at a time."""

    def read(self, epoch: str, first_pos: int, last_pos: int) -> Part:
        """The first of these that there are, or those that are missing before them."""


@dataclass(slots=True, eq=False)
class _Waiting:
    """Events of one epoch with consecutive positions; without ``datums`` they wait on disk alone."""

    epoch: str
    first_pos: int
    last_pos: int
    datums: pa.BinaryArray | None
    size: int
    on_disk: bool

    @property
    def count(self) -> int:
        return self.last_pos - self.first_pos + 1


@dataclass
class _Group:
    """Events on their way: first as datums, then as framed values with the pos of each."""

    epoch: str
    last_pos: int
    datums: list[pa.BinaryArray]
    positions: list[int]
    on_disk: bool
    values: list[bytes] | None = None


class Delivery:
    """A bounded queue before a publisher, on disk where there is one, and the thread between. The one owner of
    retrying.

    ``frame`` makes messages of datums; it may raise SinkUnavailable (a registry that is down) or SchemaUnknown (one
    that has not our schema yet) and is then tried again too. ``queue_bytes`` bounds what waits in memory, beside the
    one group that is on its way (4 MiB or one batch). ``linger_secs`` is how long a batch waits for company. An error
    that trying again cannot heal comes out of the next call of any method.

    What is on disk waits there when memory is full, and ``backlog`` reads it back; only what is not is dropped.
    ``reached(epoch, pos)`` is told, by the thread, that everything up to there is settled: acknowledged, dropped or
    refused. ``refused(epoch, positions, values, reason)`` gets the messages that the topic refuses for themselves.
    """

    def __init__(
        self,
        publisher: Publisher,
        *,
        frame: Callable[[pa.BinaryArray], list[bytes]],
        queue_bytes: int = 64 << 20,
        linger_secs: float = 0.05,
        say: Say = _quiet,
        backlog: Backlog | None = None,
        reached: Callable[[str, int], None] = lambda _epoch, _pos: None,
        refused: Callable[[str, list[int], list[bytes], str], None] = lambda *_: None,
    ) -> None:
        self._publisher, self._frame, self._say = publisher, frame, say
        self._queue_bytes, self._linger_secs = queue_bytes, linger_secs
        self._backlog, self._reached, self._refused = backlog, reached, refused
        self._changed = threading.Condition()
        self._queue: deque[_Waiting] = deque()
        self._bytes = self._waiting = self._under_way = 0
        self._under_way_on_disk = True
        self._acknowledged = self._dropped = self._rejected = 0
        self._losses: list[Dropped] = []
        self._last_error = ""
        self._draining = False
        self._ended = threading.Event()
        self._broken: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="delivery", daemon=True)
        self._thread.start()

    def put(self, datums: pa.BinaryArray, first_pos: int, *, epoch: str = "", on_disk: bool = False) -> None:
        """Queue one batch, whose events have the positions from ``first_pos`` on; never blocks.

        When memory is full, batches that are ``on_disk`` wait there; without any the oldest one is dropped, to be told
        by ``take_dropped``.
        """
        self._raise_broken()
        if not len(datums):
            return
        batch = _Waiting(epoch, first_pos, first_pos + len(datums) - 1, datums, int(datums.nbytes), on_disk)
        with self._changed:
            self._queue.append(batch)
            self._bytes += batch.size
            self._waiting += batch.count
            while self._bytes > self._queue_bytes:
                self._make_room()
            self._changed.notify_all()

    def put_before(self, behind: Iterable[tuple[str, int, int]]) -> None:
        """Ranges of an earlier life that are on disk, ``(epoch, first pos, last pos)``, oldest first: they go first."""
        with self._changed:
            ranges = [_Waiting(*range_, None, 0, on_disk=True) for range_ in behind]
            self._queue.extendleft(reversed(ranges))
            self._waiting += sum(waiting.count for waiting in ranges)
            self._changed.notify_all()

    def _make_room(self) -> None:
        """Let the newest batch that is on disk wait there, or drop the oldest that is in memory. Lock held."""
        queue = self._queue
        for place in range(len(queue) - 1, -1, -1):
            batch = queue[place]
            if batch.datums is not None and batch.on_disk:
                self._bytes -= batch.size
                batch.datums, batch.size = None, 0
                before = queue[place - 1] if place else None
                if (
                    before is not None and before.datums is None
                    and (before.epoch, before.last_pos + 1) == (batch.epoch, batch.first_pos)
                ):  # fmt: skip
                    before.last_pos = batch.last_pos
                    del queue[place]
                return
        oldest = next(batch for batch in queue if batch.datums is not None)
        queue.remove(oldest)
        self._bytes -= oldest.size
        self._waiting -= oldest.count
        self._dropped += oldest.count
        reason = f"the queue before topic {self._publisher.topic} was full ({self._queue_bytes} bytes)"
        self._lose(oldest.epoch, oldest.first_pos, oldest.last_pos, reason)

    def take_dropped(self) -> list[Dropped]:
        """What was dropped or rejected since the last call, in order; for the stream to declare."""
        self._raise_broken()
        with self._changed:
            taken, self._losses = self._losses, []
        return taken

    def stats(self) -> Stats:
        """Counts since the start; what is queued includes what is on its way."""
        self._raise_broken()
        with self._changed:
            return Stats(
                self._waiting + self._under_way,
                self._bytes,
                self._acknowledged,
                self._dropped,
                self._rejected,
                self._last_error,
            )

    def drain(self, budget_secs: float) -> int:
        """Wait until everything is acknowledged, ``budget_secs`` at most; how many events are left unacknowledged and
        are not on disk.

        Nothing may be put afterwards: what is left is given up here.
        """
        end = time.monotonic() + budget_secs
        with self._changed:
            self._draining = True
            self._changed.notify_all()
            while self._waiting + self._under_way and self._broken is None:
                rest = end - time.monotonic()
                if rest <= 0 or not self._changed.wait(rest):
                    break
        self.close()
        with self._changed:
            left = sum(batch.count for batch in self._queue if not batch.on_disk)
            return left + (0 if self._under_way_on_disk else self._under_way)

    def close(self) -> None:
        """Stop now, within about two seconds, and let go of the publisher."""
        self._ended.set()
        self._publisher.give_up()
        with self._changed:
            self._draining = True
            self._changed.notify_all()
        self._thread.join()
        self._publisher.close()
        self._raise_broken()

    def _raise_broken(self) -> None:
        if self._broken is not None:
            broken, self._broken = self._broken, None
            raise broken

    def _lose(self, epoch: str, first: int, last: int, reason: str) -> None:
        """Remember a loss, as one with the loss before where they touch. Call with the lock held."""
        before = self._losses[-1] if self._losses else None
        if before and (before.epoch, before.reason, before.last_pos + 1) == (epoch, reason, first):
            self._losses[-1] = Dropped(before.first_pos, last, before.count + last - first + 1, reason, epoch)
        else:
            self._losses.append(Dropped(first, last, last - first + 1, reason, epoch))

    def _work(self) -> None:
        # Imported where it is used: a reader starts without it.
        from tenacity import Retrying, retry_if_exception_type, sleep_using_event, stop_when_event_set
        from tenacity import wait_random_exponential as full_jitter

        def note(state: Any) -> None:
            error = state.outcome.exception()
            with self._changed:
                fresh = str(error) != self._last_error
                self._last_error = str(error)
            if fresh:
                self._say("warn", f"{error}; {self._waiting + self._under_way} events are kept, trying again")

        retrying = Retrying(
            # A schema that the registry does not know yet is one that somebody is about to register.
            retry=retry_if_exception_type((SinkUnavailable, SchemaUnknown)),
            wait=full_jitter(multiplier=0.25, max=_WAIT_SECS_MAX),
            sleep=sleep_using_event(self._ended),
            stop=stop_when_event_set(self._ended),
            before_sleep=note,
            reraise=True,
        )
        try:
            while (group := self._next_group()) is not None:
                retrying(self._attempt, group)
                self._reached(group.epoch, group.last_pos)
                with self._changed:
                    self._last_error = ""
        except (SinkUnavailable, SchemaUnknown) as error:
            # Only the end of the agent ends the retrying.
            self._last_error = str(error)
        except BaseException as error:
            self._broken = error
            self._say("error", f"delivery to topic {self._publisher.topic} has stopped: {error}")
        finally:
            with self._changed:
                self._changed.notify_all()

    def _next_group(self) -> _Group | None:
        """The oldest events, as many as one publish should carry; None at the end."""
        group = None
        while group is None:
            with self._changed:
                while not self._queue:
                    if self._draining or self._ended.is_set():
                        return None
                    self._changed.wait()
                if self._queue[0].datums is not None:
                    self._linger()
                if self._ended.is_set():
                    return None
                group = self._from_memory()
                waiting = self._queue[0] if self._queue else None
            if group is None and waiting is not None:
                group = self._from_disk(waiting)
        return group

    def _linger(self) -> None:
        """Wait for company, while there is little. Lock held; the queue may be another one afterwards."""
        end = time.monotonic() + self._linger_secs
        while not self._draining and self._waiting < _GROUP_EVENTS and self._bytes < _GROUP_BYTES:
            rest = end - time.monotonic()
            if rest <= 0:
                break
            self._changed.wait(rest)

    def _from_memory(self) -> _Group | None:
        """Batches from the head of the queue on; None when that waits on disk alone. Lock held."""
        batches: list[_Waiting] = []
        events = size = 0
        while self._queue and (not batches or (events < _GROUP_EVENTS and size < _GROUP_BYTES)):
            batch = self._queue[0]
            if batch.datums is None:
                break
            if batches and (batch.epoch, batch.on_disk) != (batches[0].epoch, batches[0].on_disk):
                break
            batches.append(self._queue.popleft())
            events += batch.count
            size += batch.size
        self._bytes -= size
        if not batches:
            return None
        return self._under_way_from(
            _Group(
                batches[-1].epoch,
                batches[-1].last_pos,
                [batch.datums for batch in batches if batch.datums is not None],
                [pos for batch in batches for pos in range(batch.first_pos, batch.last_pos + 1)],
                batches[0].on_disk,
            )
        )

    def _from_disk(self, head: _Waiting) -> _Group | None:
        """What the head of the queue has on disk; None when it is not there, which is noted as lost."""
        assert self._backlog is not None
        epoch, first_pos = head.epoch, head.first_pos
        part = self._backlog.read(epoch, first_pos, head.last_pos)
        with self._changed:
            head.first_pos = part.last_pos + 1
            if head.first_pos > head.last_pos:
                self._queue.popleft()
            if not part.reason:
                return self._under_way_from(
                    _Group(epoch, part.last_pos, [part.datums], part.positions.tolist(), on_disk=True)
                )
            lost = part.last_pos - first_pos + 1
            self._waiting -= lost
            self._dropped += lost
            self._lose(epoch, first_pos, part.last_pos, f"waiting for topic {self._publisher.topic}, {part.reason}")
            self._changed.notify_all()
        self._reached(epoch, part.last_pos)
        return None

    def _under_way_from(self, group: _Group) -> _Group:
        """The group is no longer in the queue. Lock held."""
        self._waiting -= len(group.positions)
        self._under_way = len(group.positions)
        self._under_way_on_disk = group.on_disk
        return group

    def _attempt(self, group: _Group) -> None:
        """Publish what of the group is not acknowledged yet; on SinkUnavailable the group keeps only that."""
        if group.values is None:
            group.values = [value for datums in group.datums for value in self._frame(datums)]
            group.datums = []
        values, positions = group.values, group.positions
        rejected: list[int] = []
        reason = ""
        try:
            self._publisher.publish(values)
        except SinkRejected as error:
            rejected, reason = error.indices, str(error)
        except SinkUnavailable:
            left = self._publisher.unacknowledged
            group.values = [values[index] for index in left]
            group.positions = [positions[index] for index in left]
            self._settled(group.epoch, len(values) - len(left), [], "")
            raise
        refused = [positions[index] for index in rejected]
        if refused:
            self._refused(group.epoch, refused, [values[index] for index in rejected], reason)
        self._settled(group.epoch, len(values) - len(rejected), refused, reason)

    def _settled(self, epoch: str, acknowledged: int, rejected: Iterable[int], reason: str) -> None:
        with self._changed:
            self._acknowledged += acknowledged
            self._under_way -= acknowledged
            for pos in rejected:
                self._rejected += 1
                self._under_way -= 1
                self._lose(epoch, pos, pos, reason)
            self._changed.notify_all()


# --- reading ------------------------------------------------------------------------------------------------------

_CONNECT_SECS = 15.0
_REFUSED_SECS = 1.0
_UNSURE_SECS = 3.0
_PATIENCE_SECS = 2.0
_STALL_SECS = 30.0
_BEHIND_SECS = 5.0
_NEW_PARTITIONS_SECS = 30.0
_CLOCKS_DIFFER_MS = 15 * 60 * 1000
_BATCH = 10_000
_FILL_SECS = 0.02
_WAIT_SECS = 0.1

_CONSUMER = {
    "client.id": "bindsnoop-replay",
    # Measured: without it the client idles most of the time, four to five times slower.
    "fetch.queue.backoff.ms": "10",
    "fetch.error.backoff.ms": "50",
    # The broker holds a fetch at the end of a partition this long, and the next partition waits behind it.
    "fetch.wait.max.ms": "10",
    "reconnect.backoff.max.ms": "1000",
    "allow.auto.create.topics": "false",
    "check.crcs": "true",
}
_CONSUMER_PROMISES = {
    "enable.auto.commit": "false",
    "enable.auto.offset.store": "false",
    "enable.partition.eof": "true",
    "auto.offset.reset": "error",
}
_ONLY_PRODUCER = ("acks", "request.required.acks", "enable.idempotence", "message.timeout.ms", "delivery.timeout.ms")
_AT_END, _AT_START = -1, -2


@dataclass(frozen=True)
class Start:
    """Where reading begins: at the oldest message, at a time, or so many messages before the end of each partition."""

    time_us: int | None = None
    messages: int | None = None

    @classmethod
    def beginning(cls) -> Start:
        """The oldest message that the topic holds."""
        return cls()

    @classmethod
    def time(cls, time_us: int) -> Start:
        """What was appended at this time (microseconds since 1970) or later, and a quarter of an hour before.

        Clocks differ, and events are older than their messages: the caller still selects by the time of the event.
        """
        return cls(time_us=time_us)

    @classmethod
    def newest(cls, messages: int) -> Start:
        """The last ``messages`` offsets of each partition; 0 is the end."""
        return cls(messages=messages)


@dataclass(frozen=True, slots=True)
class Messages:
    """Values of one partition, in order; None is a tombstone. ``done`` of ``total`` offsets are behind with these."""

    partition: int
    values: list[bytes | None]
    done: int
    total: int
    _messages: list[Any] = field(repr=False, compare=False)

    def offset(self, index: int) -> int:
        """Offset of the value at ``index``; offsets have holes."""
        return int(self._messages[index].offset())


class Unread(NamedTuple):
    """Offsets of one partition that could not be read, from ``start`` to before ``end``, and why."""

    partition: int
    start: int
    end: int
    reason: str


def read(
    topic: str,
    chosen: Mapping[str, str],
    *,
    start: Start | None = None,
    follow: bool = False,
    partitions: Sequence[int] | None = None,
    say: Say = _quiet,
) -> Iterator[Messages | Unread]:
    """What ``topic`` held when this was called, partitions by number, each in order; then, with ``follow``, what comes.

    Nothing is committed and no group is joined. With ``follow`` all partitions are read at once, new ones too, and the
    iterator never ends by itself; a broker that is away is said and waited for. Without it the broker has 30 s.
    SourceUnavailable when Kafka cannot be reached, or the topic is missing or forbidden; UsageError for settings.
    """
    with _Source(topic, chosen, say) as source:
        ranges = source.ranges(start or Start(), partitions)
        if follow:
            yield from source.follow(ranges, watch=partitions is None)
            return
        total = sum(end - first for first, end in ranges.values())
        done = 0
        for partition, (first, end) in ranges.items():
            for part in source.between(partition, first, end):
                yield _counted(part, done - first, total)
            done += end - first


def read_backwards(
    topic: str,
    chosen: Mapping[str, str],
    *,
    start: Start | None = None,
    chunk: int = 50_000,
    partitions: Sequence[int] | None = None,
    say: Say = _quiet,
) -> Iterator[Messages | Unread]:
    """The exact reverse of ``read``'s parts: the last partition first, its newest messages first.

    Values within one ``Messages`` are still in order. It reads ``chunk`` offsets at a time and holds no more, so a
    caller who has enough stops. Bounds and errors as ``read``.
    """
    with _Source(topic, chosen, say) as source:
        ranges = source.ranges(start or Start(), partitions)
        total = sum(end - first for first, end in ranges.values())
        done = 0
        for partition, (first, end) in reversed(ranges.items()):
            for low in range(first + (end - first - 1) // chunk * chunk, first - 1, -chunk):
                high = min(low + chunk, end)
                for part in reversed(list(source.between(partition, low, high))):
                    yield _counted(part, done, total) if isinstance(part, Unread) else _placed(part, done, total)
                done += high - low


def _counted(part: _Run | Unread, base: int, total: int) -> Messages | Unread:
    if isinstance(part, Unread):
        return part
    return Messages(part.partition, part.values, base + part.end, total, part.messages)


def _placed(part: _Run, done: int, total: int) -> Messages:
    return Messages(part.partition, part.values, done + len(part.values), total, part.messages)


class _Run(NamedTuple):
    """Messages without errors, of one partition; ``end`` is the offset after the last."""

    partition: int
    values: list[bytes | None]
    end: int
    messages: list[Any]


class _Source:
    """A consumer that assigns, and what its errors mean. A context: leaving it closes the consumer."""

    def __init__(
        self,
        topic: str,
        chosen: Mapping[str, str],
        say: Say,
        unavailable: type[SourceUnavailable] | type[SinkUnavailable] = SourceUnavailable,
    ) -> None:
        self._topic, self._unavailable = topic, unavailable
        self._troubles = _Troubles(topic, chosen, say)
        self._bad: tuple[int, int] | None = None
        own = {**_CONSUMER, "group.id": f"bindsnoop-replay-{secrets.token_hex(8)}"}
        configuration = {**_client(chosen, self._troubles, own), **_CONSUMER_PROMISES}
        for name in _ONLY_PRODUCER:
            configuration.pop(name, None)
        try:
            self._consumer = Consumer(configuration)
        except KafkaException as error:
            raise UsageError(f"librdkafka refuses the Kafka settings: {error.args[0].str()}") from error

    def __enter__(self) -> _Source:
        return self

    def __exit__(self, *_: object) -> None:
        # Closing hands out what was heard before Kafka worked again.
        self._troubles.end()
        self._consumer.close()

    # What there is to read.

    def ranges(self, start: Start, partitions: Sequence[int] | None) -> dict[int, tuple[int, int]]:
        """First offset and end of each partition to read, by number, as of now."""
        there = self.partitions()
        if partitions is not None and (unknown := sorted(set(partitions) - set(there))):
            raise SourceUnavailable(
                f"topic {self._topic} has no partition {unknown[0]}; allowed is {there[0]} to {there[-1]}"
            )
        wanted = sorted(there if partitions is None else set(partitions))
        lows = self._offsets(wanted, _AT_START)
        ends = self._offsets(wanted, _AT_END)
        firsts = dict(lows)
        if start.messages is not None:
            firsts = {partition: max(lows[partition], ends[partition] - start.messages) for partition in wanted}
        elif start.time_us is not None:
            found = self._offsets(wanted, max(0, start.time_us // 1000 - _CLOCKS_DIFFER_MS))
            # -1 says that nothing is that young. Given to assign() it would mean something else.
            firsts = {p: ends[p] if offset < 0 else max(offset, lows[p]) for p, offset in found.items()}
        return {partition: (min(firsts[partition], ends[partition]), ends[partition]) for partition in wanted}

    def partitions(self, stopping: Callable[[], bool] = lambda: False) -> list[int]:
        """Numbers of the topic's partitions; the first contact, so this is where Kafka turns out to be away."""
        begun = time.monotonic()
        patience = 0.5
        while True:
            try:
                metadata = self._consumer.list_topics(self._topic, timeout=patience)
                break
            except KafkaException as error:
                self._consumer.poll(0)
                heard, waited = self._troubles.last, time.monotonic() - begun
                final = heard is not None and heard.code() in _WILL_NOT_PASS
                refused = heard is not None and waited >= (_REFUSED_SECS if self._troubles.all_down else _UNSURE_SECS)
                if final or refused or waited >= _CONNECT_SECS or stopping():
                    raise _mapped(error, self._unavailable, self._troubles) from error
                # A slow cluster needs longer than the first try gives it; one that refuses has answered long before.
                patience = 0.5 if heard else min(2 * patience, _PATIENCE_SECS)
        self._troubles.over()
        described = metadata.topics[self._topic]
        if described.error is not None:
            sentence = self._troubles.sentence(described.error)
            if described.error.code() not in _GONE:
                raise self._unavailable(sentence)
            if self._unavailable is SinkUnavailable:
                raise _Missing(sentence)
            raise SourceUnavailable(sentence + self._near_names())
        if not described.partitions:
            raise SourceUnavailable(f"topic {self._topic} has no partitions")
        return sorted(described.partitions)

    def _near_names(self) -> str:
        try:
            names = [name for name in self._consumer.list_topics(timeout=_ASK_SECS).topics if not name.startswith("__")]
        except KafkaException:
            return ""
        near = difflib.get_close_matches(self._topic, names, n=3)
        if near:
            return f"; there is {' and '.join(near)}"
        return "; the cluster shows us no topics" if not names else ""

    def _offsets(self, partitions: Iterable[int], time_ms: int) -> dict[int, int]:
        """Offsets at a time, or at ``_AT_START`` or ``_AT_END``: one question for all partitions."""
        asked = [TopicPartition(self._topic, partition, time_ms) for partition in partitions]
        end = time.monotonic() + _CONNECT_SECS
        while True:
            try:
                found = self._consumer.offsets_for_times(asked, timeout=_ASK_SECS)
            except KafkaException as error:
                failed: KafkaError = error.args[0]
            else:
                errors = [one.error for one in found if one.error is not None]
                if not errors:
                    return {one.partition: one.offset for one in found}
                failed = errors[0]
            self._consumer.poll(0)
            if failed.code() in _FORBIDDEN | _GONE or time.monotonic() > end:
                raise _mapped(KafkaException(failed), SourceUnavailable, self._troubles)

    # Reading it.

    def between(self, partition: int, start: int, end: int) -> Iterator[_Run | Unread]:
        """Everything in [start, end) of one partition: runs of messages, and what could not be read."""
        position = start
        if position >= end:
            return
        self._assign({partition: position})
        moved = time.monotonic()
        log_end: int | None = None
        while position < end:
            good, failed = _split(self._consumer.consume(min(_BATCH, end - position), _FILL_SECS))
            if good:
                position = min(good[-1].offset() + 1, end)
                # Offsets have holes, so as many messages as offsets were left can reach beyond the end.
                run = [message for message in good if message.offset() < end] if good[-1].offset() >= end else good
                moved, log_end = time.monotonic(), None
                self._troubles.over()
                if run:
                    yield _Run(partition, [message.value() for message in run], position, run)
            for message in failed:
                if message.error().code() == KafkaError._PARTITION_EOF:
                    log_end = message.offset()
                    position = end if log_end >= end else position
                elif gap := self._gap(message.error(), partition, position, end):
                    yield gap
                    position, moved = gap.end, time.monotonic()
                    if position < end:
                        self._assign({partition: position})
                    break
            still = time.monotonic() - moved
            if log_end is not None and log_end < end and position < end and still >= _BEHIND_SECS:
                yield Unread(partition, position, end, _SHRANK)
                return
            if still >= _STALL_SECS:
                why = f": {self._troubles.sentence()}" if self._troubles.last is not None else ""
                raise SourceUnavailable(
                    f"topic {self._topic}[{partition}] has sent nothing after offset {position} for {still:.0f} s{why}"
                )

    def follow(self, ranges: Mapping[int, tuple[int, int]], *, watch: bool) -> Iterator[Messages | Unread]:
        """Everything from the starts on, as it comes, for ever; ``watch`` takes in partitions that are added."""
        positions = {partition: first for partition, (first, _) in ranges.items()}
        begun = dict(positions)
        total = sum(end - first for first, end in ranges.values())
        self._assign(positions)
        looked = time.monotonic()
        while True:
            # The first message is not held back for company.
            messages = self._consumer.consume(1, _WAIT_SECS)
            if messages:
                messages += self._consumer.consume(_BATCH, 0)
            good, failed = _split(messages)
            by_partition: dict[int, list[Any]] = {}
            for message in good:
                by_partition.setdefault(message.partition(), []).append(message)
            for partition, run in sorted(by_partition.items()):
                positions[partition] = run[-1].offset() + 1
                self._troubles.over()
                done = sum(positions[one] - begun[one] for one in positions)
                yield Messages(partition, [message.value() for message in run], done, max(total, done), run)
            for message in failed:
                if message.error().code() == KafkaError._PARTITION_EOF:
                    continue
                partition = message.partition()
                gap = self._gap(message.error(), partition, positions.get(partition, 0), None)
                if gap is not None:
                    if gap.end > gap.start:
                        yield gap
                    positions[partition] = gap.end
                    self._assign(positions)
                    break
            if watch and time.monotonic() - looked >= _NEW_PARTITIONS_SECS:
                looked = time.monotonic()
                if added := self._added(positions):
                    positions |= self._offsets(added, _AT_START)
                    begun |= {partition: positions[partition] for partition in added}
                    self._assign(positions)

    def _gap(self, error: KafkaError, partition: int, position: int, end: int | None) -> Unread | None:
        """What ``error`` makes unreadable from ``position`` on, up to ``end`` (None: no end); None for nothing yet.

        SourceUnavailable when the error is about the whole topic.
        """
        if error.code() == KafkaError._AUTO_OFFSET_RESET:
            low = self._offsets([partition], _AT_START)[partition]
            if low > position:
                return Unread(partition, position, low if end is None else min(low, end), _EXPIRED)
            return Unread(partition, position, low if end is None else end, _SHRANK)
        if error.code() in _BAD_BATCH:
            # Once may be the line; the same again at the same place is the log.
            if self._bad != (partition, position):
                self._bad = (partition, position)
                return None
            last = self._offsets([partition], _AT_END)[partition] if end is None else end
            after = self._readable_after(partition, position, last)
            return Unread(partition, position, after, f"the stored batch is damaged: {_plain(error)}")
        self._judge(error)
        return None

    def _added(self, known: Mapping[int, int]) -> list[int]:
        with contextlib.suppress(KafkaException):
            described = self._consumer.list_topics(self._topic, timeout=_ASK_SECS).topics[self._topic]
            return sorted(set(described.partitions) - set(known))
        return []

    def _assign(self, positions: Mapping[int, int]) -> None:
        self._consumer.assign([TopicPartition(self._topic, *place) for place in positions.items()])

    def _judge(self, error: KafkaError) -> None:
        """Raise for what waiting does not heal; remember the rest, which the client tries again by itself."""
        if error.code() in _FORBIDDEN | _GONE | _WILL_NOT_PASS:
            raise SourceUnavailable(self._troubles.sentence(error))
        self._troubles.heard(error)

    def _readable_after(self, partition: int, bad: int, end: int) -> int:
        """First offset after ``bad``, ``end`` at most, where reading works again.

        The end of a damaged batch is not known, and every step through it costs a fetch: the steps double until one
        succeeds, and halve back to the border.
        """
        step = 1
        while (good := bad + step) < end and not self._readable(partition, good):
            step *= 2
        good = min(good, end)
        bad += step // 2
        while good - bad > 1:
            middle = (bad + good) // 2
            if self._readable(partition, middle):
                good = middle
            else:
                bad = middle
        return good

    def _readable(self, partition: int, offset: int) -> bool:
        self._assign({partition: offset})
        deadline = time.monotonic() + _STALL_SECS
        while time.monotonic() < deadline:
            for message in self._consumer.consume(1, _WAIT_SECS):
                error = message.error()
                if error is None or error.code() in {KafkaError._PARTITION_EOF, KafkaError._AUTO_OFFSET_RESET}:
                    return True
                if error.code() in _BAD_BATCH:
                    return False
                self._judge(error)
        raise SourceUnavailable(f"topic {self._topic}[{partition}] has sent nothing at offset {offset}")


_EXPIRED = "the topic no longer held them when they were to be read"
_SHRANK = "the topic ends earlier than it did when reading began"


def _split(messages: list[Any]) -> tuple[list[Any], list[Any]]:
    failed = [message for message in messages if message.error() is not None]
    return ([message for message in messages if message.error() is None], failed) if failed else (messages, failed)


def _plain(error: KafkaError) -> str:
    return printable(error.str().encode("utf-8", "surrogateescape"))
