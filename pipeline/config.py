"""Every option of the three commands: one table, and all that follows from it.

In: the arguments, the environment and the configuration files. Out: one frozen object a command, validated whole
before anything starts; or a UsageError that names the option as it was written, its value and what is allowed.
Later wins: defaults, ``/etc/bindsnoop/bindsnoop.toml``, the user's file, ``BINDSNOOP_…``, flags. ``OPTIONS`` also
gives ``--help``, the completion of the shells and the documentation.

Nothing here imports pyarrow, for ``--help`` has to answer at once. argparse is not used either: it has no optional
value behind a short flag (``-i=false`` beside ``-i``), takes ``-48h`` for a flag and cannot say which file or
variable a wrong value came from; what is left to do by hand is ``_scan``.
"""

from __future__ import annotations

import os
import re
import time as clock
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

from pipeline import __version__, event
from pipeline.errors import UsageError

Command = Literal["agent", "replay", "live"]

PROGRAMS: dict[Command, str] = {"agent": "bindsnoop-agent", "replay": "bindsnoop-replay", "live": "bindsnoop"}
"""What each command is called."""

SYSTEM_FILE = Path("/etc/bindsnoop/bindsnoop.toml")
"""The configuration file of the machine."""

PREFIX = "BINDSNOOP_"
"""What the names of the variables begin with."""


# --- what the commands get ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class AgentConfig:
    """Settings of ``bindsnoop-agent``. Durations are seconds, sizes bytes; None is none. Of topic and files one is set,
    unless ``probe`` asks for nothing but a report about the host, of which ``output`` is the form, or ``unpin`` for
    nothing but to remove what is pinned.

    ``properties`` are those of ``-X``, for librdkafka; ``properties_file`` has more of them, which those override.
    """

    probe: bool
    unpin: bool
    output: str
    topic: str | None
    files: Path | None
    bootstrap_servers: str | None
    schema_registry: str | None
    register_schema: bool
    create_topic: bool
    properties: Mapping[str, str]
    properties_file: Path | None
    node: str
    tracer: str
    ring_bytes: int
    max_delay: float
    workloads: tuple[str, ...]
    kubeconfig: Path | None
    docker_sockets: tuple[Path, ...]
    podman_storage: Path
    name_delay: float
    queue_bytes: int
    spool: Path | None
    spool_bytes: int
    spool_age: float | None
    linger: float
    shutdown: float
    lock: Path
    pins: Path | None
    segment_bytes: int
    segment_age: float
    keep_bytes: int | None
    keep_age: float | None
    checkpoint_records: int
    checkpoint_age: float
    signing_key: Path | None
    log_level: str


@dataclass(frozen=True, kw_only=True)
class ReplayConfig:
    """Settings of ``bindsnoop-replay``; topic, files or both are set.

    ``pids``, ``ports``, ``ignore_errors``, ``since_us``, ``until_us``, ``info``, ``nodes``, ``namespaces``, ``pods``,
    ``containers`` and ``labels`` are those of ``select.Filter``; times are microseconds since 1970. ``columns`` is a
    layout or names of columns. With ``to`` nothing is shown, and unless they were asked for otherwise failed attempts
    and the stream's own records are not left out.
    """

    topic: str | None
    files: tuple[Path, ...]
    bootstrap_servers: str | None
    schema_registry: str | None
    properties: Mapping[str, str]
    properties_file: Path | None
    pids: tuple[int, ...]
    ports: tuple[range, ...]
    ignore_errors: bool
    since_us: int | None
    until_us: int | None
    info: bool
    nodes: tuple[str, ...]
    namespaces: tuple[str, ...]
    pods: tuple[str, ...]
    containers: tuple[str, ...]
    labels: tuple[event.LabelTest, ...]
    to: Path | None
    resolve: bool
    sort: bool
    tail: int | None
    follow: bool
    count: bool
    output: str
    columns: str | tuple[str, ...]
    time: bool
    progress: str
    verify: bool
    public_key: Path | None


@dataclass(frozen=True, kw_only=True)
class LiveConfig:
    """Settings of ``bindsnoop``; the names mean what they mean in ``ReplayConfig`` and ``AgentConfig``."""

    node: str
    tracer: str
    ring_bytes: int
    workloads: tuple[str, ...]
    kubeconfig: Path | None
    docker_sockets: tuple[Path, ...]
    podman_storage: Path
    name_delay: float
    pids: tuple[int, ...]
    ports: tuple[range, ...]
    ignore_errors: bool
    info: bool
    namespaces: tuple[str, ...]
    pods: tuple[str, ...]
    containers: tuple[str, ...]
    labels: tuple[event.LabelTest, ...]
    output: str
    columns: str | tuple[str, ...]
    time: bool


# --- what a value may be ------------------------------------------------------------------------------------------


class Kind(NamedTuple):
    """What a value may be: ``parse`` gives it, or raises ValueError with the piece that is wrong.

    ``allowed`` ends the sentence "… is not allowed, only …". ``choices`` and ``paths`` (``file`` or
    ``directory``) are for the completion of the shells.
    """

    parse: Callable[[str], Any]
    allowed: str
    metavar: str = ""
    choices: tuple[str, ...] = ()
    paths: str = ""


class Ago(NamedTuple):
    """A moment before now, in microseconds."""

    us: int


_UNITS_US = {
    "us": 1,
    "ms": 1000,
    "s": 1_000_000,
    "m": 60_000_000,
    "h": 3_600_000_000,
    "d": 86_400_000_000,
    "w": 604_800_000_000,
}
_SPAN = r"([0-9]{1,12}(?:\.[0-9]{1,12})?)(us|ms|[smhdw])"
_BYTES = {"": 1, "b": 1, "kb": 1000, "mb": 1000**2, "gb": 1000**3, "tb": 1000**4}
_BYTES |= {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}


def _within(value: float, least: float, most: float | None, text: str) -> None:
    if value < least or (most is not None and value > most):
        raise ValueError(text)


def _span_us(text: str) -> int:
    if not re.fullmatch(f"(?:{_SPAN})+", text):
        raise ValueError(text)
    # In whole numbers, for 0.1 has no binary fraction.
    whole = 0
    for number, unit in re.findall(_SPAN, text):
        digits, _, fraction = number.partition(".")
        whole += int(digits + fraction) * _UNITS_US[unit] // 10 ** len(fraction)
    return whole


def _duration(least: str) -> Kind:
    def parse(text: str) -> float:
        secs = _span_us(text) / 1_000_000
        _within(secs, _span_us(least) / 1_000_000, 3650 * 86_400, text)
        return secs

    return Kind(parse, f"a number with us, ms, s, m, h, d or w, from {least} to 3650d, such as 50ms or 1h30m", "TIME")


def _bytes(text: str) -> int:
    found = re.fullmatch(r"([0-9]+)(?:\.([0-9]{1,6}))? ?([kmgt]?i?b|)", text, re.IGNORECASE | re.ASCII)
    if not found or found[3].lower() not in _BYTES:
        raise ValueError(text)
    fraction = found[2] or ""
    return int(found[1] + fraction) * _BYTES[found[3].lower()] // int(10 ** len(fraction))


def _size(least: str, most: str, *, power_of_two: bool = False) -> Kind:
    def parse(text: str) -> int:
        size = _bytes(text)
        _within(size, _bytes(least), _bytes(most), text)
        if power_of_two and size & (size - 1):
            raise ValueError(text)
        return size

    what = "a power of two" if power_of_two else "a size"
    return Kind(parse, f"{what} from {least} to {most}, in bytes or with kB, MB, GB, KiB, MiB or GiB", "SIZE")


def _whole(least: int, most: int | None = None) -> Kind:
    def parse(text: str) -> int:
        if not re.fullmatch("[0-9]{1,18}", text):
            raise ValueError(text)
        _within(int(text), least, most, text)
        return int(text)

    return Kind(parse, f"a whole number from {least}" + (f" to {most}" if most is not None else ""), "N")


def _or_none(kind: Kind) -> Kind:
    def parse(text: str) -> Any:
        return None if text == "none" else kind.parse(text)

    return kind._replace(parse=parse, allowed=f"none, or {kind.allowed}")


def _choice(*choices: str) -> Kind:
    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(text)
        return text

    return Kind(parse, "one of " + ", ".join(choices), "|".join(choices), choices)


def _matching(pattern: str, allowed: str, metavar: str) -> Kind:
    def parse(text: str) -> str:
        if not re.fullmatch(pattern, text, re.ASCII) or text in {".", ".."}:
            raise ValueError(text)
        return text

    return Kind(parse, allowed, metavar)


def _each(text: str) -> list[str]:
    return [entry.strip() for entry in text.split(",")]


def _boolean(text: str) -> bool:
    if text.lower() not in {"true", "false", "1", "0"}:
        raise ValueError(text)
    return text.lower() in {"true", "1"}


def parse_ports(text: str) -> tuple[range, ...]:
    """``4242,8000-8100`` → one range for each entry. ValueError with the entry that is wrong."""
    ranges = []
    for entry in _each(text):
        found = re.fullmatch(r"([0-9]{1,5})(?:-([0-9]{1,5}))?", entry)
        if not found:
            raise ValueError(entry)
        first, last = int(found[1]), int(found[2] or found[1])
        if not 1 <= first <= last <= 65535:
            raise ValueError(entry)
        ranges.append(range(first, last + 1))
    return tuple(ranges)


def parse_time(text: str) -> int | Ago:
    """``48h`` or ``-48h`` → how long ago; ISO 8601 → microseconds since 1970, UTC unless it names an offset.

    ValueError with the text when it is neither.
    """
    if re.fullmatch(f"-?(?:{_SPAN})+", text):
        ago = Ago(_span_us(text.removeprefix("-")))
        _within(ago.us, 0, 10**17, text)
        return ago
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(text) from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)


def _pids(text: str) -> tuple[int, ...]:
    for entry in _each(text):
        if not re.fullmatch("[0-9]{1,10}", entry) or not 1 <= int(entry) < 1 << 31:
            raise ValueError(entry)
    return tuple(int(entry) for entry in _each(text))


def _names(text: str) -> tuple[str, ...]:
    for entry in _each(text):
        if not entry.removeprefix("!"):
            raise ValueError(entry)
    return tuple(_each(text))


def parse_labels(text: str) -> tuple[event.LabelTest, ...]:
    """``app=web,tier!=db,canary,!old`` → one test for each entry. ValueError with the entry that is wrong."""
    tests = []
    for entry in _each(text):
        found = re.fullmatch(r"([^=!\s]+)\s*(?:(==|=|!=)\s*([^=!]*))?", entry.removeprefix("!"))
        if not found or (entry.startswith("!") and found[2]):
            raise ValueError(entry)
        tests.append(event.LabelTest(found[1], found[3], not entry.startswith("!") and found[2] != "!="))
    return tuple(tests)


def _workloads(text: str) -> tuple[str, ...]:
    names = tuple(_each(text))
    for name in names:
        if name not in _SOURCES or (name in {"auto", "none"} and len(names) > 1):
            raise ValueError(name)
    return names


_CUSTOM = "custom-columns="
_FORMS = ("columns", "json", "json-full")


def _output(text: str) -> str | tuple[str, ...]:
    """One of the forms, or the names of columns."""
    if text in _FORMS:
        return text
    if not text.startswith(_CUSTOM):
        raise ValueError(text)
    names = tuple(_each(text.removeprefix(_CUSTOM)))
    for name in names:
        if name.lower() not in event.columns():
            raise ValueError(name)
    return names


def _servers(text: str) -> str:
    for entry in _each(text):
        found = re.fullmatch(r"(?:[A-Za-z_]+://)?(?:\[[0-9A-Fa-f:.]+\]|[^\s:\[\]/@]+)(?::([0-9]{1,5}))?", entry)
        if not found or not 1 <= int(found[1] or 9092) <= 65535:
            raise ValueError(entry)
    return ",".join(_each(text))


def _url(text: str) -> str:
    if not re.fullmatch(r"https?://[^\s/]+\S*", text):
        # A password must not end up in a log.
        raise ValueError(re.sub(r"//[^/@]*@", "//…@", text))
    return text.rstrip("/")


def _property(text: str) -> tuple[tuple[str, str], ...]:
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z0-9._-]+", key.strip()):
        raise ValueError(text if not equals else key)
    return ((key.strip(), value.strip()),)


def _paths(text: str) -> tuple[Path, ...]:
    return (_path(text),)


def _path(text: str) -> Path:
    if not text or "\0" in text:
        raise ValueError(text)
    return Path(text)


def _several_paths(text: str) -> tuple[Path, ...]:
    return tuple(_path(part) for part in text.split(os.pathsep))


BOOLEAN = Kind(_boolean, "true or false", choices=("true", "false"))
"""An option of this kind needs no value: alone it means true."""

_TIME = Kind(
    parse_time,
    "a span before now such as 48h, or ISO 8601 such as 2026-01-02T03:04:05Z or 2026-01-02 03:04+01:00",
    "TIME",
)
_PORTS = Kind(parse_ports, "ports and ranges from 1 to 65535, such as 4242,8000-8100", "LIST")
_PIDS = Kind(_pids, "process ids from 1 to 2147483647, such as 42,4711", "LIST")
_NAMES = Kind(_names, "names, each with ! in front to leave it out, such as one,!another", "LIST")
_LABELS = Kind(parse_labels, "k=v, k!=v, k or !k, or a list of them with commas, such as app=web,tier!=db", "LIST")
_SOURCES = ("auto", "none", "kubernetes", "docker", "podman")
_WORKLOADS = Kind(_workloads, "auto, none, or a list of kubernetes, docker, podman", "auto|none|LIST", choices=_SOURCES)
_NODE = _matching(r"[A-Za-z0-9._-]{1,253}", "up to 253 letters, digits, dots, dashes and underscores", "NAME")
_TOPIC = _matching(r"[A-Za-z0-9._-]{1,249}", "up to 249 letters, digits, dots, dashes and underscores", "NAME")
_OUTPUT = Kind(
    _output,
    "columns, json, json-full, or custom-columns= with a list of " + ", ".join(event.columns()),
    "FORM",
    (*_FORMS, _CUSTOM),
)
_SERVERS = Kind(_servers, "HOST:PORT, or a list of them with commas", "HOST:PORT")
_URL = Kind(_url, "a URL that begins with http:// or https://", "URL")
_PROPERTY = Kind(_property, "KEY=VALUE", "KEY=VALUE")
_FILE = Kind(_path, "a path", "FILE", paths="file")
_DIRECTORY = Kind(_path, "a path", "DIR", paths="directory")
_PATHS = Kind(_paths, "a path", "PATH…", paths="file")
_SOCKETS = Kind(_several_paths, f"a path, or several with {os.pathsep} between them", "PATH", paths="file")


# --- the table ----------------------------------------------------------------------------------------------------


class Option(NamedTuple):
    """One option of one or more commands.

    ``name`` is the long flag without its dashes; variable and key follow from it. ``field`` is the attribute of the
    settings. ``default`` is written as a user would write it. ``many``: every occurrence adds to the value;
    ``separator`` divides several in a variable, where the kind does not do that itself; ``greedy``: one flag takes
    all words up to the next flag; ``only_flag``: it makes no sense as a variable or in a file.
    """

    name: str
    kind: Kind
    help: str
    commands: tuple[Command, ...]
    group: str
    default: str | None = None
    short: str = ""
    field: str = ""
    many: bool = False
    separator: str = ""
    greedy: bool = False
    only_flag: bool = False

    @property
    def attribute(self) -> str:
        """Name in the settings object."""
        return self.field or self.key

    @property
    def key(self) -> str:
        """Key in a configuration file."""
        return self.name.replace("-", "_")

    @property
    def variable(self) -> str:
        """Name in the environment."""
        return PREFIX + self.key.upper()

    @property
    def flags(self) -> tuple[str, ...]:
        """As it is written on the command line, the short one first."""
        return (*((f"-{self.short}",) if self.short else ()), f"--{self.name}")


_A: tuple[Command, ...] = ("agent",)
_R: tuple[Command, ...] = ("replay",)
_L: tuple[Command, ...] = ("live",)
_SHOWN = _R + _L
_KAFKA = "Kafka"
_SOURCE = "Where to read"
_TO = "Where to write"
_WHICH = "Which events"
_HOW = "How they are shown"
_PROOF = "Whether anything is missing"
_TRACE = "Tracing"
_NAMES_OF = "Names of containers"
_STREAM = "The stream"
_ARCHIVE = "Files of --files"
_PROBE = "What this host can do"
_GENERAL = "General"

OPTIONS: tuple[Option, ...] = (
    Option("topic", _TOPIC, "Publish to this Kafka topic.", _A, _TO),
    Option("files", _DIRECTORY, "Write Avro files below this folder.", _A, _TO),
    Option("topic", _TOPIC, "Read this Kafka topic, from its beginning to its end at the start.", _R, _SOURCE),
    Option(
        "files", _PATHS, "Read these files, and what lies below these folders.", _R, _SOURCE,
        many=True, separator=os.pathsep, greedy=True,
    ),
    Option(
        "to", _DIRECTORY, "Show nothing: keep in files below this folder what is not there already.",
        _R, _TO,
    ),
    Option(
        "bootstrap-servers", _SERVERS,
        "Addresses of Kafka brokers; without any, also in -X and --properties, localhost:9092.", _A + _R, _KAFKA,
    ),
    Option("schema-registry", _URL, "Schema registry with Confluent's API.", _A + _R, _KAFKA),
    Option("register-schema", BOOLEAN, "Register the schema if the registry lacks it.", _A, _KAFKA, "false"),
    Option("create-topic", BOOLEAN, "Create the topic if it is missing.", _A, _KAFKA, "false"),
    Option(
        "property", _PROPERTY, "Any setting of librdkafka; repeat it for more. A variable holds one a line.",
        _A + _R, _KAFKA, short="X", field="properties", many=True, separator="\n",
    ),
    Option(
        "properties", _FILE, "File of such settings, one KEY=VALUE a line; -X overrides them.", _A + _R, _KAFKA,
        field="properties_file",
    ),
    Option("pid", _PIDS, "Only binds of these processes.", _SHOWN, _WHICH, field="pids", many=True),
    Option(
        "ports", _PORTS, "Only binds that asked for one of these ports or got one.", _SHOWN, _WHICH,
        short="P", many=True,
    ),
    Option("ignore-errors", BOOLEAN, "Only binds that succeeded; -i=false shows all.", _SHOWN, _WHICH, "true", "i"),
    Option("from", _TIME, "Only what happened at this time or later.", _R, _WHICH, field="since_us"),
    Option("until", _TIME, "Only what happened before this time.", _R, _WHICH, field="until_us"),
    Option("tail", _whole(1), "Only the last N that match.", _R, _WHICH),
    Option("node", _NAMES, "Only these nodes; !NAME leaves one out.", _R, _WHICH, field="nodes", many=True),
    Option(
        "namespace", _NAMES, "Only pods of these namespaces.", _SHOWN, _WHICH, short="n", field="namespaces", many=True,
    ),
    Option(
        "all-namespaces", BOOLEAN, "All namespaces, and the host; so it is without -n.", _SHOWN, _WHICH, "false", "A",
    ),
    Option("podname", _NAMES, "Only these pods.", _SHOWN, _WHICH, short="p", field="pods", many=True),
    Option(
        "containername", _NAMES, "Only these containers.", _SHOWN, _WHICH, short="c", field="containers", many=True,
    ),
    Option("selector", _LABELS, "Only pods with these labels.", _SHOWN, _WHICH, short="l", field="labels", many=True),
    Option(
        "resolve", BOOLEAN, "Name containers that the agent came to know after their events; reads everything twice.",
        _R, _HOW, "false",
    ),
    Option("info", BOOLEAN, "Also the stream's own notes, such as starts and checkpoints.", _SHOWN, _WHICH, "false"),
    Option("follow", BOOLEAN, "Go on with what comes after the end of the topic.", _R, _SOURCE, "false"),
    Option(
        "output", _OUTPUT, "columns, json, json-full or custom-columns=NAME,NAME.", _SHOWN, _HOW, "columns", "o",
    ),
    Option("layout", _choice(*event.LAYOUTS), "Which columns.", _R, _HOW, "trace-bind"),
    Option("layout", _choice(*event.LAYOUTS), "Which columns.", _L, _HOW, "ig"),
    Option("time", BOOLEAN, "Show the time too, UTC: the first column, the last key.", _SHOWN, _HOW, "false", "T"),
    Option(
        "sort", BOOLEAN, "Order by time, then node, epoch and position; what memory does not hold waits in $TMPDIR.",
        _R, _HOW, "false",
    ),
    Option("count", BOOLEAN, "Show nothing but how many there are.", _R, _HOW, "false"),
    Option("progress", _choice("auto", "never"), "A progress bar on a terminal.", _R, _HOW, "auto"),
    Option(
        "verify", BOOLEAN, "Show no events but, for each node and epoch, whether they are complete and unchanged.",
        _R, _PROOF, "false", only_flag=True,
    ),
    Option("public-key", _FILE, "Every checkpoint has to be signed by this key, Ed25519 in PEM.", _R, _PROOF),
    Option(
        "node", _NODE, "Name of this node; by default $NODE_NAME, else the name of the host.", _A + _L, _GENERAL,
    ),
    Option(
        "tracer", _choice("auto", "fexit", "kprobe", "tracepoint", "bcc"),
        "Where in the kernel to look; auto takes the first of these that works.", _A + _L, _TRACE, "auto",
    ),
    Option(
        "ring-bytes", _size("64KiB", "1GiB", power_of_two=True), "Buffer between the kernel and the command.",
        _A + _L, _TRACE, "16MiB",
    ),
    Option("max-delay", _duration("1ms"), "How long an event may wait in the kernel.", _A, _TRACE, "50ms"),
    Option(
        "lock", _FILE, "Held while the agent runs, for there is one a node.", _A, _TRACE, "/run/bindsnoop/agent.lock",
    ),
    Option(
        "pins", _or_none(_DIRECTORY), "Folder of a bpffs where the tracer outlives the agent, or none.", _A, _TRACE,
        "/sys/fs/bpf/bindsnoop",
    ),
    Option(
        "unpin", BOOLEAN, "Record nothing: end every tracer that was left below --pins, with what nobody has read.",
        _A, _TRACE, "false", only_flag=True,
    ),
    Option(
        "workloads", _WORKLOADS,
        "Who knows the names of containers; auto asks Kubernetes in a pod, else docker and podman where they are.",
        _A + _L, _NAMES_OF, "auto",
    ),
    Option("kubeconfig", _FILE, "How to reach Kubernetes from outside a pod.", _A + _L, _NAMES_OF),
    Option(
        "docker-socket", _SOCKETS, "Sockets of docker, and of podman's service, which speaks the same.",
        _A + _L, _NAMES_OF, f"/var/run/docker.sock{os.pathsep}/run/podman/podman.sock", field="docker_sockets",
    ),
    Option(
        "podman-storage", _DIRECTORY, "Where podman keeps its containers.", _A + _L, _NAMES_OF,
        "/var/lib/containers/storage",
    ),
    Option(
        "name-delay", _duration("0s"), "How long an event may wait for the name of its container.", _A, _NAMES_OF, "2s",
    ),
    Option(
        "name-delay", _duration("0s"), "How long an event may wait for the name of its container.", _L, _NAMES_OF,
        "300ms",
    ),
    Option("checkpoint-records", _whole(1, 10**9), "A checkpoint after so many records.", _A, _STREAM, "10000"),
    Option("checkpoint-age", _duration("1s"), "A checkpoint after this time.", _A, _STREAM, "10s"),
    Option("signing-key", _FILE, "Sign checkpoints with this key, Ed25519 in PEM.", _A, _STREAM),
    Option(
        "queue-bytes", _size("1MiB", "64GiB"), "What waits in memory for a destination that is away.",
        _A, _STREAM, "64MiB",
    ),
    Option(
        "spool", _or_none(_DIRECTORY), "Where events are on disk before --topic gets them, when there are no --files.",
        _A, _STREAM, "/var/lib/bindsnoop",
    ),
    Option(
        "spool-bytes", _size("1MiB", "1024TiB"), "Delete the oldest of the spool beyond this size.", _A, _STREAM,
        "1GiB",
    ),
    Option(
        "spool-age", _or_none(_duration("1m")), "Delete from the spool what is older than this, or none.", _A, _STREAM,
        "none",
    ),
    Option("linger", _duration("0s"), "How long to collect a batch for Kafka.", _A, _KAFKA, "50ms"),
    Option("segment-bytes", _size("64KiB", "16GiB"), "A new file after so many bytes.", _A, _ARCHIVE, "64MiB"),
    Option("segment-age", _duration("1s"), "A new file after this time.", _A, _ARCHIVE, "1h"),
    Option(
        "keep-bytes", _or_none(_size("1MiB", "1024TiB")), "Delete the oldest files beyond this size, or none.",
        _A, _ARCHIVE, "10GiB",
    ),
    Option("keep-age", _or_none(_duration("1m")), "Delete files older than this, or none.", _A, _ARCHIVE, "none"),
    Option("shutdown", _duration("0s"), "How long to go on delivering after the order to stop.", _A, _STREAM, "20s"),
    Option(
        "probe", BOOLEAN, "Record nothing: say which tracers work on this host, what they need, and what they miss.",
        _A, _PROBE, "false", only_flag=True,
    ),
    Option("output", _choice("text", "json"), "Form of what --probe says.", _A, _PROBE, "text", "o", only_flag=True),
    Option(
        "log-level", _choice("error", "warn", "info", "debug"), "What to say on standard error.", _A, _GENERAL, "info",
    ),
    Option("config", _FILE, "Read this file instead of the two below.", _A + _R + _L, _GENERAL),
    Option(
        "completion", _choice("bash", "zsh"), "Print the completion for this shell.", _A + _R + _L, _GENERAL,
        only_flag=True,
    ),
    Option("version", BOOLEAN, "Print the version.", _A + _R + _L, _GENERAL, only_flag=True),
    Option("help", BOOLEAN, "Print this.", _A + _R + _L, _GENERAL, short="h", only_flag=True),
)  # fmt: skip
"""Every option of every command, in the order of the help. A name that means two things has two rows."""

_NO_SETTINGS = {"config", "completion", "version", "help"}
"""What is over when the settings are made."""


def options_of(command: Command) -> dict[str, Option]:
    """The options of a command by name, in the order of the table."""
    return {option.name: option for option in OPTIONS if command in option.commands}


# --- from what was written to settings ----------------------------------------------------------------------------


class Written(NamedTuple):
    """A value as it was written: ``where`` is the flag, the variable, or the key and its file.

    ``layer`` grows from the weakest source of settings to the strongest.
    """

    where: str
    texts: list[str]
    layer: int


_DEFAULTS, _SYSTEM, _USER, _ENVIRONMENT, _FLAGS = range(5)
_NOWHERE = Written("", [], _DEFAULTS)


@overload
def parse(
    command: Literal["agent"],
    argv: Sequence[str],
    environ: Mapping[str, str],
    *,
    now_us: int | None = ...,
    system_file: Path = ...,
) -> AgentConfig: ...
@overload
def parse(
    command: Literal["replay"],
    argv: Sequence[str],
    environ: Mapping[str, str],
    *,
    now_us: int | None = ...,
    system_file: Path = ...,
) -> ReplayConfig: ...
@overload
def parse(
    command: Literal["live"],
    argv: Sequence[str],
    environ: Mapping[str, str],
    *,
    now_us: int | None = ...,
    system_file: Path = ...,
) -> LiveConfig: ...
def parse(
    command: Command,
    argv: Sequence[str],
    environ: Mapping[str, str],
    *,
    now_us: int | None = None,
    system_file: Path = SYSTEM_FILE,
) -> AgentConfig | ReplayConfig | LiveConfig:
    """The settings of a command from its arguments, the environment and the files.

    ``now_us`` is what spans such as ``--from 48h`` are counted from. UsageError when anything is not allowed.
    ``--help``, ``--version`` and ``--completion`` print to standard output and raise SystemExit(0).
    """
    options = options_of(command)
    flags = _scan(command, argv)
    for name in ("help", "version", "completion"):
        if name in flags and (answer := _answer(command, options[name], flags[name], environ)):
            print(answer, end="")
            raise SystemExit(0)

    variables = _environment(environ, options)
    written = {
        **_defaults(options, environ),
        **_files(command, flags.get("config") or variables.get("config"), environ, system_file),
        **variables,
        **flags,
    }
    if command == "replay":
        _strongest_source(written)
        _whole_to(written)
    values = {option.name: _value(option, written.get(option.name)) for option in options.values()}
    _check(command, values, written)
    return _settings(command, options, values, clock.time_ns() // 1000 if now_us is None else now_us)


def _scan(command: Command, argv: Sequence[str]) -> dict[str, Written]:
    """The flags of the command line by name of the option."""
    options = options_of(command)
    by_flag = {flag: option for option in options.values() for flag in option.flags}
    found: dict[str, Written] = {}
    words = list(reversed(argv))
    while words:
        word = words.pop()
        if not word.startswith("-") or word in {"-", "--"}:
            raise UsageError(f"{PROGRAMS[command]} takes options only, and {word!r} is none; --help lists them.")
        flag, equals, value = word.partition("=")
        if not word.startswith("--") and flag[:2] in by_flag and len(flag) > 2:
            # What follows a short flag is its value, or more short flags behind one that needs none.
            flag, rest = word[:2], word[2:]
            if by_flag[flag].kind is BOOLEAN:
                words.append("-" + rest)
                equals, value = "", ""
            else:
                equals, value = "=", rest
        if flag not in by_flag:
            known = [name for name in by_flag if name.startswith("--")]
            raise UsageError(f"{PROGRAMS[command]} has no option {flag!r}{_near(flag, known)}; --help lists all.")
        option = by_flag[flag]
        texts = [value] if equals else []
        if option.kind is BOOLEAN:
            if not equals:
                texts = [words.pop()] if words and words[-1] in {"true", "false"} else ["true"]
        elif option.greedy:
            while words and not words[-1].startswith("-"):
                texts.append(words.pop())
        elif not equals and words and words[-1].partition("=")[0] not in by_flag:
            texts = [words.pop()]
        if not texts:
            raise UsageError(f"{flag} needs a value: {option.kind.allowed}.")
        before = found[option.name].texts if option.many and option.name in found else []
        found[option.name] = Written(flag, before + texts, _FLAGS)
    return found


def _environment(environ: Mapping[str, str], options: Mapping[str, Option]) -> dict[str, Written]:
    """The variables by name of the option; an empty one counts as not set."""
    known = {option.variable for option in OPTIONS if not option.only_flag}
    mine = {option.variable: option for option in options.values() if not option.only_flag}
    found = {}
    for variable, text in environ.items():
        if not variable.startswith(PREFIX) or _of_kubernetes(variable, text):
            continue
        if variable not in known:
            raise UsageError(f"The variable {variable} is not known{_near(variable, known)}; --help lists the options.")
        if text and variable in mine:
            option = mine[variable]
            texts = [part for part in text.split(option.separator) if part] if option.separator else [text]
            found[option.name] = Written(variable, texts, _ENVIRONMENT)
    return found


def _of_kubernetes(variable: str, text: str) -> bool:
    """Whether Kubernetes set it: every pod gets such variables for a Service that is named bindsnoop or bindsnoop-…."""
    return bool(
        re.fullmatch(r"\w+_SERVICE_(HOST|PORT(_\w+)?)", variable)
        or re.fullmatch(r"\w+_PORT_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?", variable)
        or (variable.endswith("_PORT") and re.match("(tcp|udp|sctp)://", text))
    )


def _files(
    command: Command, chosen: Written | None, environ: Mapping[str, str], system_file: Path
) -> dict[str, Written]:
    """The keys of the configuration files by name of the option."""
    if chosen is not None:
        return _file(command, _value(options_of(command)["config"], chosen), _USER, must_exist=True)
    home = environ.get("HOME")
    folder = environ.get("XDG_CONFIG_HOME") or (f"{home}/.config" if home else None)
    found = _file(command, system_file, _SYSTEM)
    if folder:
        found |= _file(command, Path(folder) / "bindsnoop" / "bindsnoop.toml", _USER)
    return found


def _file(command: Command, path: Path, layer: int, *, must_exist: bool = False) -> dict[str, Written]:
    """One file: keys for every command that knows them, then those of the table of this command."""
    try:
        content = path.read_bytes()
    except OSError as error:
        # A folder that is closed to this user, such as another's home, holds no file of theirs.
        hidden = isinstance(error, PermissionError) and not os.access(path.parent, os.X_OK)
        if not must_exist and (hidden or isinstance(error, FileNotFoundError | NotADirectoryError)):
            return {}
        raise UsageError(f"The configuration file {path} cannot be read: {error.strerror}.") from error

    import tomllib

    try:
        parsed = tomllib.loads(content.decode("utf-8"))
    except ValueError as error:
        raise UsageError(f"The configuration file {path} is not TOML: {error}.") from error

    found: dict[str, Written] = {}
    tables = {name: parsed.pop(name) for name in PROGRAMS if name in parsed}
    for of, keys in ((None, parsed), *tables.items()):
        if not isinstance(keys, dict):
            raise UsageError(f"{of} in {path}: {keys!r} is not allowed, only a table of settings of that command.")
        known = {
            option.key: option
            for option in OPTIONS
            if (of is None or of in option.commands) and not option.only_flag and option.name != "config"
        }
        for key, value in keys.items():
            where = f"{key} in {path}" if of is None else f"{of}.{key} in {path}"
            if key not in known:
                raise UsageError(f"{where} is not known{_near(key, known)}; --help lists the options.")
            option = options_of(command).get(known[key].name)
            if option is not None and not option.only_flag and of in {None, command}:
                found[option.name] = Written(where, _texts(option, value, where), layer)
    return found


def _texts(option: Option, value: object, where: str) -> list[str]:
    """A value of TOML as it would be written on the command line."""
    if isinstance(value, bool):
        return ["true" if value else "false"]
    if isinstance(value, dict) and option.kind is _PROPERTY:
        return [f"{key}={text}" for name, inner in value.items() for key, text in _flat(name, inner)]
    if isinstance(value, list) and option.many and not any(isinstance(entry, (list, dict)) for entry in value):
        return [text for entry in value for text in _texts(option, entry, where)]
    if isinstance(value, (list, dict)):
        raise UsageError(f"{where}: {value!r} is not allowed, only {option.kind.allowed}.")
    return [str(value)]


def _flat(name: str, value: object) -> Iterator[tuple[str, str]]:
    """``sasl = {mechanism = "PLAIN"}``, which TOML makes of ``sasl.mechanism = "PLAIN"``, as ``sasl.mechanism``."""
    if isinstance(value, dict):
        for inner, deeper in value.items():
            yield from _flat(f"{name}.{inner}", deeper)
    else:
        yield name, ("true" if value else "false") if isinstance(value, bool) else str(value)


def _defaults(options: Mapping[str, Option], environ: Mapping[str, str]) -> dict[str, Written]:
    found = {
        option.name: Written(f"--{option.name}", [option.default], _DEFAULTS)
        for option in options.values()
        if option.default is not None
    }
    if options["node"].kind is _NODE:
        given = environ.get("NODE_NAME")
        found["node"] = Written(
            "NODE_NAME" if given else "the name of this host", [given or os.uname().nodename], _DEFAULTS
        )
    return found


def _strongest_source(written: dict[str, Written]) -> None:
    """Files on the command line are read instead of a topic in a file or variable, not together with it."""
    if "topic" in written and "files" in written:
        strongest = max(written["topic"].layer, written["files"].layer)
        for name in ("topic", "files"):
            if written[name].layer < strongest:
                del written[name]


def _whole_to(written: dict[str, Written]) -> None:
    """What --to keeps is whole unless somebody asks for less: the defaults of showing are none of keeping."""
    if "to" in written:
        for name, text in (("ignore-errors", "false"), ("info", "true")):
            if written[name].layer == _DEFAULTS:
                written[name] = written[name]._replace(texts=[text])


def _value(option: Option, written: Written | None) -> Any:
    if written is None:
        return () if option.many else None
    try:
        values = [option.kind.parse(text) for text in written.texts]
    except ValueError as error:
        raise UsageError(f"{written.where}: {str(error)!r} is not allowed, only {option.kind.allowed}.") from error
    return tuple(part for value in values for part in value) if option.many else values[-1]


def _check(command: Command, values: Mapping[str, Any], written: Mapping[str, Written]) -> None:
    """What no option can say alone."""
    if command == "live":
        return
    if command == "agent":
        if values["probe"] and values["unpin"]:
            raise UsageError(f"{written['unpin'].where} and {written['probe'].where} exclude each other; choose one.")
        if values["unpin"] and values["pins"] is None:
            raise UsageError(f"{written['unpin'].where} needs a folder, and {written['pins'].where} says none.")
        if values["probe"]:
            return
        if written["output"].layer == _FLAGS:
            raise UsageError(f"{written['output'].where} is set without --probe, which it needs.")
        if values["unpin"]:
            return
    if values["topic"] is None and not values["files"]:
        verb = "write to" if command == "agent" else "read"
        where = "--topic NAME, --files DIR, or both" if command == "agent" else "--topic NAME, --files PATH…, or both"
        raise UsageError(f"{PROGRAMS[command]} has nothing to {verb}: give {where}.")
    needs = {"register-schema": "schema-registry", "create-topic": "topic", "follow": "topic"}
    for name, needed in needs.items():
        if values.get(name) and not values[needed]:
            raise UsageError(f"{written[name].where} is set without --{needed}, which it needs.")
    if command == "replay" and values["to"] is not None:
        for name in ("count", "tail", "sort", "resolve"):
            if values[name]:
                raise UsageError(f"{written['to'].where} and {written[name].where} exclude each other; choose one.")
    for name in ("count", "tail", "sort"):
        if values.get("follow") and values[name]:
            raise UsageError(f"{written['follow'].where} and {written[name].where} exclude each other; choose one.")
    if values.get("verify"):
        _check_verify(values, written)
    elif written.get("public-key", _NOWHERE).layer == _FLAGS:
        raise UsageError(f"{written['public-key'].where} is set without --verify, which it needs.")


_CUTS = (
    "follow", "tail", "count", "resolve", "sort", "to", "pid", "ports", "namespace", "podname", "containername",
    "selector",
)  # fmt: skip
"""What ``--verify`` cannot go with: what shows or keeps events, and what leaves some out, which would look lost."""


def _check_verify(values: Mapping[str, Any], written: Mapping[str, Written]) -> None:
    for name in _CUTS:
        if values[name]:
            where = written[name].where
            raise UsageError(f"--verify and {where} exclude each other; it takes --node, --from and --until.")
    if values["output"] not in {"columns", "json"}:
        form = written["output"].texts[-1]
        raise UsageError(f"{written['output'].where}: {form!r} is not allowed with --verify, only columns or json.")


def _settings(
    command: Command, options: Mapping[str, Option], values: dict[str, Any], now_us: int
) -> AgentConfig | ReplayConfig | LiveConfig:
    fields = {options[name].attribute: value for name, value in values.items() if name not in _NO_SETTINGS}
    if "properties" in fields:
        fields["properties"] = dict(fields["properties"])
    if command == "agent":
        return AgentConfig(**fields)
    if fields.pop("all_namespaces"):
        fields["namespaces"] = ()
    layout, output = fields.pop("layout"), fields["output"]
    fields["columns"] = layout if isinstance(output, str) else output
    fields["output"] = output if isinstance(output, str) else "columns"
    if command == "live":
        return LiveConfig(**fields)
    for name in ("since_us", "until_us"):
        if isinstance(fields[name], Ago):
            fields[name] = now_us - fields[name].us
    if None not in (fields["since_us"], fields["until_us"]) and fields["until_us"] <= fields["since_us"]:
        raise UsageError(
            f"--until is {iso(fields['until_us'])} and --from {iso(fields['since_us'])}; "
            "--until has to be later, for what happens at that time is not shown."
        )
    return ReplayConfig(**fields)


def iso(us: int) -> str:
    """Microseconds since 1970 as a time that ``--from`` takes; as a number where no calendar has it."""
    try:
        return f"{datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=us):%Y-%m-%dT%H:%M:%S.%fZ}"
    except OverflowError:
        return f"{us} µs"


# --- what a command says of itself --------------------------------------------------------------------------------


def _answer(command: Command, option: Option, written: Written, environ: Mapping[str, str]) -> str:
    """What ``--help``, ``--version`` and ``--completion`` print; nothing for ``--help=false``."""
    value = _value(option, written)
    if option.name == "completion":
        from pipeline import completion

        return completion.script(PROGRAMS[command], list(options_of(command).values()), value)
    if not value:
        return ""
    if option.name == "version":
        return f"{PROGRAMS[command]} {__version__}\n"
    return help_text(command, _width(environ))


def _width(environ: Mapping[str, str]) -> int:
    given = environ.get("COLUMNS", "")
    try:
        width = int(given) if re.fullmatch("[0-9]{1,6}", given) else os.get_terminal_size(1).columns
    except OSError:
        width = 80
    return min(max(width, 60), 100)


_ABOUT: dict[Command, str] = {
    "agent": "Record every attempt to bind a socket on this node, in a Kafka topic, in files, or both.",
    "replay": "Show who bound which port, from a Kafka topic, from files, or both.",
    "live": "Show who binds which port on this host, as it happens.",
}

EXAMPLES: dict[Command, tuple[tuple[str, str], ...]] = {
    "agent": (
        ("bindsnoop-agent --files /var/lib/bindsnoop", "into files, without any server"),
        ("bindsnoop-agent --topic binds --bootstrap-servers kafka:9092", "into Kafka"),
        ("BINDSNOOP_TOPIC=binds bindsnoop-agent -X security.protocol=SSL", "with settings of the client"),
        ("bindsnoop-agent --probe", "what it can see on this host, and what it needs for that"),
    ),
    "replay": (
        ("bindsnoop-replay --topic binds -o json", "everything, as JSON"),
        ("bindsnoop-replay --topic binds -i=false --pid 42 -P=4242,4343", "failed attempts too"),
        ("bindsnoop-replay --files /var/lib/bindsnoop --from 48h -T", "the last two days, with times"),
        (
            "bindsnoop-replay --topic binds --follow -o custom-columns=node,comm,port,error -i=false",
            "live, the whole cluster",
        ),
        ("bindsnoop-replay --files /var/lib/bindsnoop --verify", "whether anything is missing or was changed"),
        ("bindsnoop-replay --topic binds --to /srv/binds", "keep them for years; again, only what is new"),
    ),
    "live": (
        ("bindsnoop", "binds that succeed"),
        ("bindsnoop -i=false -P 1-1023", "all attempts on the well-known ports"),
        ("bindsnoop -o json -T | jq .", "as JSON, with times"),
    ),
}
"""For each command lines that can be typed, and what they do."""

_ENDINGS = (
    "Exit codes: 0 something was shown, 1 nothing matched, 2 wrong arguments or unreachable, 3 something could not be "
    "read or is damaged. With --verify 0 nothing is missing, 4 what is missing is declared, 5 it is not, or something "
    "was changed; 5 wins over 3, and 3 over 4."
)


def help_text(command: Command, width: int) -> str:
    """The whole help of a command, lines of at most ``width`` characters where a line can be broken."""
    import textwrap

    def filled(text: str, indent: int = 0) -> str:
        return textwrap.fill(
            text, width, initial_indent=" " * indent, subsequent_indent=" " * indent,
            break_long_words=False, break_on_hyphens=False,
        )  # fmt: skip

    options = options_of(command)
    groups: dict[str, list[str]] = {}
    for option in options.values():
        metavar = option.kind.metavar
        names = ", ".join(option.flags) if option.short else f"    --{option.name}"
        label = f"  {names} {metavar}".rstrip()
        default = option.default if option.default not in {None, "false"} else None
        about = filled(option.help + (f" [{default}]" if default else ""), 30)
        groups.setdefault(option.group, []).append(
            label.ljust(30) + about[30:] if len(label) < 29 else f"{label}\n{about}"
        )
    examples = "\n".join(f"  # {about}\n  {line}" for line, about in EXAMPLES[command])
    named = options["ring-bytes" if "ring-bytes" in options else "bootstrap-servers"]
    parts = [
        f"Usage: {PROGRAMS[command]} [OPTION]…",
        filled(_ABOUT[command]),
        *(f"{group}:\n" + "\n".join(groups[group]) for group in sorted(groups, key=_GENERAL.__eq__)),
        filled(
            f"Every option can be a variable too (--{named.name} is {named.variable}), or a key ({named.key}; for one "
            f"command in the table [{command}]) of {SYSTEM_FILE} and ~/.config/bindsnoop/bindsnoop.toml. "
            "Flags win over variables, variables over files."
        ),
        *([filled(f"Columns: {', '.join(event.columns())}.")] if "layout" in options else []),
        *([filled(_ENDINGS)] if command == "replay" else []),
        f"Examples:\n{examples}",
        filled(f"{event.OPTS_LEGEND}."),
    ]
    return "\n\n".join(parts) + "\n"


def _near(name: str, known: Iterable[str]) -> str:
    import difflib

    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""
