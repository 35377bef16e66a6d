"""Options from flags, variables and files: what is read, what wins, and what is refused in which words."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import config, event
from pipeline.errors import UsageError
from pipeline.tracer import PINS, TIERS

NOWHERE = Path("/nonexistent/bindsnoop.toml")
NOW_US = 1767323045000000
SETTINGS: dict[config.Command, type] = {
    "agent": config.AgentConfig,
    "replay": config.ReplayConfig,
    "live": config.LiveConfig,
}


def replay(*argv: str, environ: Mapping[str, str] | None = None, system_file: Path = NOWHERE) -> config.ReplayConfig:
    """Settings of a replay of the topic ``binds``."""
    return config.parse("replay", ["--topic", "binds", *argv], environ or {}, now_us=NOW_US, system_file=system_file)


def agent(*argv: str, environ: Mapping[str, str] | None = None, system_file: Path = NOWHERE) -> config.AgentConfig:
    """Settings of an agent that publishes to the topic ``binds``."""
    return config.parse("agent", ["--topic", "binds", *argv], environ or {}, system_file=system_file)


def refusal(command: config.Command, argv: list[str], environ: Mapping[str, str] | None = None) -> str:
    """The sentence that a command refuses its arguments with."""
    with pytest.raises(UsageError) as refused:
        config.parse(command, argv, environ or {}, now_us=NOW_US, system_file=NOWHERE)
    return str(refused.value)


# --- the table ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", get_args(config.Command))
def test_the_table_and_the_settings_name_the_same(command: config.Command) -> None:
    """Every option of a command is an attribute of its settings, and the other way round."""
    options = {option.attribute for option in config.options_of(command).values()}
    fields = {field.name for field in dataclasses.fields(SETTINGS[command])}

    assert fields - {"columns"} == options - {"layout", "all_namespaces", "config", "completion", "version", "help"}


@pytest.mark.parametrize("command", get_args(config.Command))
def test_no_two_options_of_a_command_share_a_flag(command: config.Command) -> None:
    """Each flag has one meaning."""
    flags = [flag for option in config.options_of(command).values() for flag in option.flags]

    assert len(set(flags)) == len(flags)
    assert len(config.options_of(command)) == sum(command in option.commands for option in config.OPTIONS)


@pytest.mark.parametrize("option", config.OPTIONS, ids=lambda option: f"{option.commands[0]}-{option.name}")
def test_every_default_is_allowed(option: config.Option) -> None:
    """A default is written as a user would write it, and its own kind takes it."""
    if option.default is not None:
        option.kind.parse(option.default)

    assert option.help.endswith(".")


def test_defaults() -> None:
    """What the documents promise without any option."""
    asked = replay()

    assert (asked.bootstrap_servers, asked.ignore_errors, asked.columns) == (None, True, "trace-bind")
    assert (asked.output, asked.time, asked.info, asked.files, asked.ports) == ("columns", False, False, (), ())
    assert config.parse("live", [], {}, system_file=NOWHERE).columns == "ig"


# --- the command line ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["-i"], True),
        (["-i=false"], False),
        (["-i", "false"], False),
        (["--ignore-errors=false"], False),
        (["--ignore-errors"], True),
        (["-i=false", "-i"], True),
        (["-i=0"], False),
        (["-i=TRUE"], True),
    ],
)
def test_booleans_as_kubectl_takes_them(argv: list[str], expected: bool) -> None:
    """Alone means true; a value comes behind an equals sign; the last one counts."""
    assert expected == replay(*argv).ignore_errors


@pytest.mark.parametrize(
    "argv",
    [
        ["-P", "4242,8000-8100"],
        ["-P=4242,8000-8100"],
        ["-P4242,8000-8100"],
        ["--ports=4242", "--ports", "8000-8100"],
        ["-P", "4242, 8000-8100"],
        ["-P=4242", "-i=false", "-P8000-8100"],
    ],
)
def test_ports_in_every_spelling(argv: list[str]) -> None:
    """Lists, ranges and repeated flags add up."""
    assert replay(*argv).ports == (range(4242, 4243), range(8000, 8101))


def test_the_documented_filter() -> None:
    """The line of the documents works as typed."""
    asked = replay("-i=false", "--pid", "42", "-P=4242,4343")

    assert (asked.ignore_errors, asked.pids, asked.ports) == (False, (42,), (range(4242, 4243), range(4343, 4344)))


def test_short_flags_without_a_value_can_be_joined() -> None:
    """``-Ti`` is ``-T -i``, and the last of them may have a value."""
    assert (replay("-Ti").time, replay("-Ti").ignore_errors) == (True, True)
    assert (replay("-Ti=false").time, replay("-Ti=false").ignore_errors) == (True, False)
    assert replay("-Tojson").output == "json"


def test_files_takes_all_words_up_to_the_next_flag() -> None:
    """As a shell expands them."""
    asked = config.parse("replay", ["--files", "a", "b", "-T", "--files=c"], {}, system_file=NOWHERE)

    assert asked.files == (Path("a"), Path("b"), Path("c"))
    assert asked.time


def test_topic_and_files_together() -> None:
    """Both were named in one place: both are read."""
    asked = replay("--files", "a")

    assert (asked.topic, asked.files) == ("binds", (Path("a"),))


def test_properties_are_those_of_librdkafka() -> None:
    """-X as in kcat; the value may hold anything, the later one of a key counts."""
    asked = agent("-X", "sasl.password=a=b,c", "-Xlinger.ms=5", "-X=linger.ms=6", "--properties", "client.properties")

    assert asked.properties == {"sasl.password": "a=b,c", "linger.ms": "6"}
    assert asked.properties_file == Path("client.properties")


def test_custom_columns() -> None:
    """Names in any case, in the order given; they go with columns."""
    asked = replay("-o", "custom-columns=Pod, pid")

    assert (asked.output, asked.columns) == ("columns", ("Pod", "pid"))
    assert replay("-o", "json-full").output == "json-full"
    assert replay("--layout", "ig").columns == "ig"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("48h", NOW_US - 48 * 3600 * 10**6),
        ("-48h", NOW_US - 48 * 3600 * 10**6),
        ("1h30m", NOW_US - 90 * 60 * 10**6),
        ("0.1s", NOW_US - 100_000),
        ("1970-01-01", 0),
        ("2026-01-02T03:04:05Z", NOW_US),
        ("2026-01-02T03:04:05.000001Z", NOW_US + 1),
        ("2026-01-02 03:04:05", NOW_US),
        ("2026-01-02 04:04:05+01:00", NOW_US),
        ("2026-01-02 03:04", NOW_US - 5 * 10**6),
    ],
)
def test_times(text: str, expected: int) -> None:
    """Spans before now and ISO 8601, UTC unless an offset is given, in whole microseconds."""
    assert replay("--from", text).since_us == expected
    assert replay(f"--until={text}").until_us == expected


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("65536", 65536),
        ("64KiB", 65536),
        ("16MiB", 16 << 20),
        ("16 MiB", 16 << 20),
        ("0.5MiB", 1 << 19),
        ("1gib", 1 << 30),
    ],
)
def test_sizes(text: str, size: int) -> None:
    """Bytes, or with a unit of a thousand or of 1024."""
    assert agent("--ring-bytes", text).ring_bytes == size


def test_sizes_and_durations_of_the_agent() -> None:
    """Durations are seconds, sizes bytes, none is None."""
    asked = agent(
        "--max-delay=50ms", "--keep-age", "7d", "--keep-bytes=none", "--queue-bytes=10MB", "--checkpoint-age", "5m"
    )

    assert (asked.max_delay, asked.keep_age, asked.keep_bytes) == (0.05, 7 * 86400, None)
    assert (asked.queue_bytes, asked.checkpoint_age) == (10_000_000, 300)


@given(st.lists(st.tuples(st.integers(1, 65535), st.integers(1, 65535)).map(sorted), min_size=1, max_size=5))
def test_ports_are_read_as_they_are_written(pairs: list[list[int]]) -> None:
    """Every list of ports and ranges comes back as its numbers."""
    text = ",".join(str(first) if first == last else f"{first}-{last}" for first, last in pairs)

    assert replay("-P", text).ports == tuple(range(first, last + 1) for first, last in pairs)


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", ["0", "70000", "a", "80-", "-80", "90-80", "", "80-80-80", "٣", "1-65536"])
@pytest.mark.parametrize("flag", ["-P", "--ports"])
def test_a_wrong_port_is_named(flag: str, entry: str) -> None:
    """The sentence names the flag as it was written, the bad entry, and what is allowed."""
    assert refusal("replay", ["--topic", "binds", f"{flag}=4242,{entry}"]) == (
        f"{flag}: {entry!r} is not allowed, only ports and ranges from 1 to 65535, such as 4242,8000-8100."
    )


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--pid", "x"], "--pid: 'x' is not allowed, only process ids from 1 to 2147483647, such as 42,4711."),
        (["--pid", "0"], "--pid: '0' is not allowed, only process ids from 1 to 2147483647, such as 42,4711."),
        (["-i=maybe"], "-i: 'maybe' is not allowed, only true or false."),
        (["--tail=0"], "--tail: '0' is not allowed, only a whole number from 1."),
        (["--layout", "wide"], "--layout: 'wide' is not allowed, only one of trace-bind, ig, bindsnoop."),
        (
            ["--schema-registry", "ftp://u:secret@h"],
            "--schema-registry: 'ftp://…@h' is not allowed, only a URL that begins with http:// or https://.",
        ),
        (["-X", "novalue"], "-X: 'novalue' is not allowed, only KEY=VALUE."),
        (
            ["--bootstrap-servers", "a:1,b:70000"],
            "--bootstrap-servers: 'b:70000' is not allowed, only HOST:PORT, or a list of them with commas.",
        ),
        (["--folow"], "bindsnoop-replay has no option '--folow'; did you mean --follow?; --help lists all."),
        (["-z"], "bindsnoop-replay has no option '-z'; --help lists all."),
        (["word"], "bindsnoop-replay takes options only, and 'word' is none; --help lists them."),
        (["-P"], "-P needs a value: ports and ranges from 1 to 65535, such as 4242,8000-8100."),
        (["-P", "-T"], "-P needs a value: ports and ranges from 1 to 65535, such as 4242,8000-8100."),
        (["--follow", "--count"], "--follow and --count exclude each other; choose one."),
        (["--follow", "--sort"], "--follow and --sort exclude each other; choose one."),
        (["--to", "x", "--count"], "--to and --count exclude each other; choose one."),
        (["--to", "x", "--tail=3"], "--to and --tail exclude each other; choose one."),
        (["--to", "x", "--sort"], "--to and --sort exclude each other; choose one."),
        (["--to", "x", "--resolve"], "--to and --resolve exclude each other; choose one."),
        (["--to"], "--to needs a value: a path."),
        (
            ["--node", "a,!"],
            "--node: '!' is not allowed, only names, each with ! in front to leave it out, such as one,!another.",
            ),
            (
                ["-n", "a,,b"],
                "-n: '' is not allowed, only names, each with ! in front to leave it out, such as one,!another.",
            ),
            (
                ["-l", "app=web,=x"],
                "-l: '=x' is not allowed, only k=v, k!=v, k or !k, or a list of them with commas, such as "
                "app=web,tier!=db.",
            ),
            (
                ["-l", "!app=web"],
                "-l: '!app=web' is not allowed, only k=v, k!=v, k or !k, or a list of them with commas, such as "
                "app=web,tier!=db.",
            ),
        (
            ["--until", "2026-01-01", "--from", "2026-01-02"],
            "--until is 2026-01-01T00:00:00.000000Z and --from 2026-01-02T00:00:00.000000Z; "
            "--until has to be later, for what happens at that time is not shown.",
        ),
    ],
)  # fmt: skip
def test_each_refusal_is_one_sentence(argv: list[str], sentence: str) -> None:
    """The option as it was written, its value, what is allowed."""
    assert refusal("replay", ["--topic", "binds", *argv]) == sentence


@pytest.mark.parametrize("text", ["yesterday", "48", "2026-13-01", "999999999999w", "", "--", "1e9h", "h"])
def test_a_wrong_time_is_named(text: str) -> None:
    """What is neither a span nor ISO 8601."""
    assert f"--from: {text!r} is not allowed, only a span before now such as 48h" in refusal(
        "replay", ["--topic", "binds", f"--from={text}"]
    )


def test_an_unknown_column_lists_the_valid_ones() -> None:
    """The original printed a blank; that helps nobody."""
    sentence = refusal("replay", ["--topic", "binds", "-o", "custom-columns=pid,nope"])

    assert sentence.startswith("-o: 'nope' is not allowed, only columns, json, json-full, or custom-columns=")
    assert sentence.endswith(", ".join(event.columns()) + ".")


@pytest.mark.parametrize("size", ["63KiB", "100000", "2GiB", "x", "16Mi", "-1", ""])
def test_a_ring_is_a_power_of_two(size: str) -> None:
    """The kernel takes nothing else."""
    assert refusal("agent", ["--topic", "binds", f"--ring-bytes={size}"]) == (
        f"--ring-bytes: {size!r} is not allowed, only a power of two from 64KiB to 1GiB, "
        "in bytes or with kB, MB, GB, KiB, MiB or GiB."
    )


def test_an_agent_without_a_destination_says_so() -> None:
    """And a replay without a source."""
    assert refusal("agent", []) == ("bindsnoop-agent has nothing to write to: give --topic NAME, --files DIR, or both.")
    assert refusal("replay", []) == "bindsnoop-replay has nothing to read: give --topic NAME, --files PATH…, or both."


def test_what_needs_another_option_says_which() -> None:
    """Nothing is silently without effect."""
    assert refusal("agent", ["--files=d", "--create-topic"]) == "--create-topic is set without --topic, which it needs."
    assert refusal("agent", ["--topic=t"], {"BINDSNOOP_REGISTER_SCHEMA": "true"}) == (
        "BINDSNOOP_REGISTER_SCHEMA is set without --schema-registry, which it needs."
    )
    assert refusal("replay", ["--files=d", "--follow"]) == "--follow is set without --topic, which it needs."
    assert refusal("replay", ["--files=d", "--public-key=k"]) == "--public-key is set without --verify, which it needs."


def test_verify_says_what_it_does_not_go_with() -> None:
    """Filters that cut holes and forms that are none of its own are refused, wherever they are set."""
    assert refusal("replay", ["--files=d", "--verify", "-n", "default"]) == (
        "--verify and -n exclude each other; it takes --node, --from and --until."
    )
    assert refusal("replay", ["--files=d", "--verify"], {"BINDSNOOP_PORTS": "80"}) == (
        "--verify and BINDSNOOP_PORTS exclude each other; it takes --node, --from and --until."
    )
    assert refusal("replay", ["--files=d", "--verify", "-o", "json-full"]) == (
        "-o: 'json-full' is not allowed with --verify, only columns or json."
    )
    asked = config.parse("replay", ["--files=d", "--verify", "-o=json", "--node=a", "--from=1h", "-T"], {"HOME": "/x"})
    assert (asked.verify, asked.public_key) == (True, None)


WORDS = ["-i", "-P", "--from", "=", "-T", "80", "-48h", "--", "-", "", "--files", "-o", "json", "-Pi", "--config="]


@given(st.lists(st.sampled_from(WORDS)))
def test_no_command_line_breaks_it(argv: list[str]) -> None:
    """Every command line gives settings or one sentence."""
    try:
        asked: Any = replay(*argv)
    except UsageError as error:
        asked = str(error)

    assert isinstance(asked, config.ReplayConfig) or asked.endswith(".")


@pytest.mark.parametrize("command", ["agent", "live"])
def test_a_tracer_is_one_of_the_tiers(command: config.Command) -> None:
    """--tracer takes auto and every tier, in their order, and names them when it is given another."""
    option = config.options_of(command)["tracer"]

    assert option.kind.choices == ("auto", *TIERS)
    assert refusal(command, ["--files=d", "--tracer=kprobes"] if command == "agent" else ["--tracer=kprobes"]) == (
        "--tracer: 'kprobes' is not allowed, only one of auto, fexit, kprobe, tracepoint, bcc."
    )


def test_a_probe_needs_nothing_else() -> None:
    """--probe needs no destination, and what a destination would need is not asked for either."""
    environ = {"BINDSNOOP_REGISTER_SCHEMA": "true"}

    asked = config.parse("agent", ["--probe", "-o", "json"], environ, system_file=NOWHERE)

    assert (asked.probe, asked.output, asked.tracer, asked.topic, asked.files) == (True, "json", "auto", None, None)
    assert (agent().probe, agent().output) == (False, "text")


@pytest.mark.parametrize("argv", [["-o", "json"], ["--output=text"], ["--probe=false", "-ojson"]])
def test_the_form_of_a_probe_needs_the_probe(argv: list[str]) -> None:
    """An agent that records has nothing to print."""
    flag = "--output" if "--output=text" in argv else "-o"

    assert refusal("agent", ["--files=d", *argv]) == f"{flag} is set without --probe, which it needs."
    assert refusal("agent", ["--probe", "-o", "columns"]) == "-o: 'columns' is not allowed, only one of text, json."


def test_a_probe_is_asked_for_on_the_command_line_only(tmp_path: Path) -> None:
    """A setting that ends the agent must not lie in a file; the form of what the others show is none of its own."""
    file = tmp_path / "c.toml"
    file.write_text('output = "json-full"\n')

    assert agent("--config", str(file), environ={"BINDSNOOP_OUTPUT": "json-full"}).output == "text"
    assert replay("--config", str(file)).output == "json-full"
    assert "BINDSNOOP_PROBE is not known" in refusal("agent", ["--files=d"], {"BINDSNOOP_PROBE": "true"})
    for content in ("probe = true\n", '[agent]\noutput = "json"\n'):
        file.write_text(content)
        assert " is not known" in refusal("agent", ["--files=d", "--config", str(file)])


def test_unpinning_needs_a_folder_and_nothing_else() -> None:
    """--unpin needs no destination, cannot be left in a variable, and goes with neither --probe nor --pins none."""
    asked = config.parse("agent", ["--unpin", "--pins", "/b/s"], {}, system_file=NOWHERE)

    assert (asked.unpin, asked.pins, asked.topic, asked.files) == (True, Path("/b/s"), None, None)
    assert (agent().unpin, agent().pins) == (False, PINS)
    assert agent("--pins=none").pins is None
    assert refusal("agent", ["--unpin", "--pins=none"]) == "--unpin needs a folder, and --pins says none."
    assert refusal("agent", ["--unpin", "--probe"]) == "--unpin and --probe exclude each other; choose one."
    assert refusal("agent", ["--unpin", "-ojson"]) == "-o is set without --probe, which it needs."
    assert refusal("agent", ["--files=d", "--pins="]) == "--pins: '' is not allowed, only none, or a path."
    assert "BINDSNOOP_UNPIN is not known" in refusal("agent", ["--files=d"], {"BINDSNOOP_UNPIN": "true"})


# --- variables and files ------------------------------------------------------------------------------------------


def test_later_wins(tmp_path: Path) -> None:
    """Defaults, the machine's file, the user's file, variables, flags."""
    system = tmp_path / "system.toml"
    system.write_text('bootstrap_servers = "system:1"\ntail = 1\ntime = true\nports = [1, "2-3"]\n')
    user = tmp_path / "config" / "bindsnoop" / "bindsnoop.toml"
    user.parent.mkdir(parents=True)
    user.write_text('tail = 2\nbootstrap_servers = "user:1"\n[replay]\ntail = 3\n[agent]\n')
    environ = {"XDG_CONFIG_HOME": str(tmp_path / "config"), "BINDSNOOP_BOOTSTRAP_SERVERS": "variable:1"}

    def found(*argv: str, **more: str) -> tuple[str, int | None, bool]:
        asked = replay(*argv, environ={**environ, **more}, system_file=system)
        return asked.bootstrap_servers, asked.tail, asked.time

    assert found() == ("variable:1", 3, True)
    assert found(BINDSNOOP_TAIL="4") == ("variable:1", 4, True)
    assert found("--tail=5", "-T=false", "--bootstrap-servers", "flag:1", BINDSNOOP_TAIL="4") == ("flag:1", 5, False)
    assert replay(environ=environ, system_file=system).ports == (range(1, 2), range(2, 4))


def test_what_is_kept_is_whole_unless_less_is_asked_for(tmp_path: Path) -> None:
    """--to leaves out neither failed attempts nor notes by default; a flag, a variable or a file may."""
    file = tmp_path / "c.toml"
    file.write_text("ignore_errors = true\n")

    def found(*argv: str, **environ: str) -> tuple[bool, bool]:
        asked = replay("--to", "d", *argv, environ=environ)
        return asked.ignore_errors, asked.info

    assert (replay().ignore_errors, replay().info, replay().to) == (True, False, None)
    assert (found(), replay("--to", "d").to) == ((False, True), Path("d"))
    assert found("-i", "--info=false") == (True, False)
    assert found("--config", str(file)) == (True, True)
    assert found(BINDSNOOP_IGNORE_ERRORS="true") == (True, True)


def test_the_table_of_another_command_is_not_read(tmp_path: Path) -> None:
    """What a file says for one command says nothing for the others."""
    file = tmp_path / "c.toml"
    file.write_text("[live]\ntime = true\n[agent]\ntopic = 'others'\n[replay]\ninfo = true\n")

    asked = replay("--config", str(file))

    assert (asked.time, asked.topic, asked.info) == (False, "binds", True)


def test_the_users_file_lies_in_the_home_folder(tmp_path: Path) -> None:
    """Without XDG_CONFIG_HOME it is ~/.config; an agent may have no home at all."""
    file = tmp_path / ".config" / "bindsnoop" / "bindsnoop.toml"
    file.parent.mkdir(parents=True)
    file.write_text("tail = 7\n")

    assert replay(environ={"HOME": str(tmp_path)}).tail == 7
    assert replay(environ={}).tail is None


def test_a_chosen_file_is_read_instead_of_the_others(tmp_path: Path) -> None:
    """--config, or its variable; what the machine's file says is then not read."""
    system = tmp_path / "system.toml"
    system.write_text("tail = 1\n")
    chosen = tmp_path / "chosen.toml"
    chosen.write_text("info = true\n")

    for asked in (
        replay("--config", str(chosen), system_file=system),
        replay(environ={"BINDSNOOP_CONFIG": str(chosen)}, system_file=system),
    ):
        assert (asked.tail, asked.info) == (None, True)


def test_properties_in_a_file_and_in_a_variable(tmp_path: Path) -> None:
    """A table in a file, however it is nested; one a line in a variable."""
    file = tmp_path / "c.toml"
    file.write_text('[property]\n"linger.ms" = 5\nsasl.mechanism = "PLAIN"\nenable = true\n')

    assert agent("--config", str(file)).properties == {"linger.ms": "5", "sasl.mechanism": "PLAIN", "enable": "true"}
    assert agent(environ={"BINDSNOOP_PROPERTY": "a=1,2\nb=x=y\n"}).properties == {"a": "1,2", "b": "x=y"}


def test_lists_in_variables() -> None:
    """Commas as on the command line, paths as in PATH."""
    environ = {"BINDSNOOP_FILES": f"a{os.pathsep}b", "BINDSNOOP_NODE": "n1,!n2", "BINDSNOOP_TOPIC": ""}

    asked = config.parse("replay", [], environ, system_file=NOWHERE)

    assert (asked.files, asked.nodes, asked.topic) == ((Path("a"), Path("b")), ("n1", "!n2"), None)


def test_files_on_the_command_line_replace_a_topic_from_elsewhere() -> None:
    """Whoever names a source wants that one, not also the one that is configured; an agent serves both."""
    environ = {"BINDSNOOP_TOPIC": "binds"}

    asked = config.parse("replay", ["--files", "a"], environ, system_file=NOWHERE)

    assert (asked.topic, asked.files) == (None, (Path("a"),))
    serving = config.parse("agent", ["--files", "a"], environ, system_file=NOWHERE)
    assert (serving.topic, serving.files) == ("binds", Path("a"))


def test_the_name_of_the_node() -> None:
    """A flag, BINDSNOOP_NODE, NODE_NAME as Kubernetes gives it, else the name of the host."""
    assert agent(environ={"NODE_NAME": "worker-1"}).node == "worker-1"
    assert agent(environ={"NODE_NAME": "worker-1", "BINDSNOOP_NODE": "worker-2"}).node == "worker-2"
    assert agent("--node=worker-3", environ={"BINDSNOOP_NODE": "worker-2"}).node == "worker-3"
    assert agent().node == os.uname().nodename
    assert refusal("agent", ["--topic=t"], {"NODE_NAME": "a/b"}).startswith("NODE_NAME: 'a/b' is not allowed, only ")


def test_a_wrong_variable_is_named() -> None:
    """The variable, its value, what is allowed; an unknown one with the name that was perhaps meant."""
    assert refusal("replay", ["--topic=t"], {"BINDSNOOP_LAYOUT": "wide"}).startswith("BINDSNOOP_LAYOUT: 'wide' is not")
    assert refusal("replay", ["--topic=t"], {"BINDSNOOP_PORT": "80"}) == (
        "The variable BINDSNOOP_PORT is not known; did you mean BINDSNOOP_PORTS?; --help lists the options."
    )
    assert "BINDSNOOP_HELP is not known" in refusal("replay", ["--topic=t"], {"BINDSNOOP_HELP": "true"})


def test_variables_of_kubernetes_services_are_not_ours() -> None:
    """A Service that is named bindsnoop gives every pod of its namespace variables that begin like ours."""
    environ = {
        "BINDSNOOP_SERVICE_HOST": "10.0.0.1",
        "BINDSNOOP_SERVICE_PORT": "9000",
        "BINDSNOOP_SERVICE_PORT_METRICS": "9000",
        "BINDSNOOP_PORT": "tcp://10.0.0.1:9000",
        "BINDSNOOP_PORT_9000_TCP": "tcp://10.0.0.1:9000",
        "BINDSNOOP_PORT_9000_TCP_ADDR": "10.0.0.1",
        "BINDSNOOP_AGENT_SERVICE_HOST": "10.0.0.2",
    }

    assert replay(environ=environ) == replay()


def test_variables_of_the_other_commands_are_left_alone() -> None:
    """One environment serves all three commands."""
    assert replay(environ={"BINDSNOOP_RING_BYTES": "nonsense", "BINDSNOOP_SEGMENT_AGE": "1h"}) == replay()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("max-delay = 1\n", "max-delay in {} is not known; did you mean max_delay?; --help lists the options."),
        ("[agent]\nfollow = true\n", "agent.follow in {} is not known; --help lists the options."),
        ("[live]\ntopic = 'x'\n", "live.topic in {} is not known; --help lists the options."),
        ("agent = 1\n", "agent in {}: 1 is not allowed, only a table of settings of that command."),
        ("tail = 0\n", "tail in {}: '0' is not allowed, only a whole number from 1."),
        ("[replay]\ntail = 1.5\n", "replay.tail in {}: '1.5' is not allowed, only a whole number from 1."),
        ("tail = [1]\n", "tail in {}: [1] is not allowed, only a whole number from 1."),
        ("tail = true\n", "tail in {}: 'true' is not allowed, only a whole number from 1."),
        ("help = true\n", "help in {} is not known; --help lists the options."),
        ("tail = \n", "The configuration file {} is not TOML: Invalid value (at line 1, column 8)."),
    ],
)
def test_a_wrong_key_is_named_with_its_file(tmp_path: Path, content: str, sentence: str) -> None:
    """Key, file, value, what is allowed."""
    file = tmp_path / "c.toml"
    file.write_text(content)

    assert refusal("replay", ["--topic=t", "--config", str(file)]) == sentence.format(file)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    """One that was named must be there; one that could be there need not; a folder is none."""
    missing = tmp_path / "missing.toml"

    assert refusal("replay", ["--topic=t", "--config", str(missing)]) == (
        f"The configuration file {missing} cannot be read: No such file or directory."
    )
    assert refusal("replay", ["--topic=t", "--config", str(tmp_path)]).endswith("cannot be read: Is a directory.")
    assert replay(system_file=missing) == replay()


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    """Bytes that are no UTF-8 are refused in one sentence."""
    file = tmp_path / "c.toml"
    file.write_bytes(b"\xff")

    assert refusal("replay", ["--topic=t", "--config", str(file)]).startswith(
        f"The configuration file {file} is not TOML"
    )


# --- selectors and sources of names -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("app=web", [("app", "web", True)]),
        ("app==web", [("app", "web", True)]),
        ("app!=web", [("app", "web", False)]),
        ("app", [("app", None, True)]),
        ("!app", [("app", None, False)]),
        ("app=", [("app", "", True)]),
        ("app = web , tier != db", [("app", "web", True), ("tier", "db", False)]),
        ("app.kubernetes.io/name=web,!canary", [("app.kubernetes.io/name", "web", True), ("canary", None, False)]),
    ],
)
def test_label_selectors(text: str, expected: list[tuple[str, str | None, bool]]) -> None:
    """As kubectl writes them."""
    settings = config.parse("replay", ["--topic", "binds", "-l", text], {}, system_file=NOWHERE)

    assert expected == [tuple(test) for test in settings.labels]


def test_selectors_have_kubectls_letters() -> None:
    """-n, -p, -c and -l, each a list or repeated; -A is all namespaces again."""
    argv = ["--topic", "binds", "-n", "a,!b", "-n=c", "-p", "web-1", "-cweb", "-l", "app=web", "-l", "tier"]
    settings = config.parse("replay", argv, {}, system_file=NOWHERE)
    every = config.parse("live", ["-n", "a", "-A"], {}, system_file=NOWHERE)

    assert (settings.namespaces, settings.pods, settings.containers) == (("a", "!b", "c"), ("web-1",), ("web",))
    assert [test.key for test in settings.labels] == ["app", "tier"]
    assert every.namespaces == ()


@pytest.mark.parametrize("text", ["auto,docker", "none,podman", "crictl", ""])
def test_sources_of_names_that_are_none(text: str) -> None:
    """auto and none stand alone, and others than those listed do not exist."""
    with pytest.raises(
        UsageError, match=r"is not allowed, only auto, none, or a list of kubernetes, docker, podman\.$"
    ):
        config.parse("live", ["--workloads", text], {}, system_file=NOWHERE)


def test_sockets_are_paths_with_colons_between_them() -> None:
    """Both usual ones by default."""
    usual = config.parse("live", [], {}, system_file=NOWHERE)
    given = config.parse("live", ["--docker-socket", "/a:/b"], {}, system_file=NOWHERE)

    assert [Path("/var/run/docker.sock"), Path("/run/podman/podman.sock")] == list(usual.docker_sockets)
    assert [Path("/a"), Path("/b")] == list(given.docker_sockets)
