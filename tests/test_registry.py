"""The registry edge, against a real registry, and against servers that answer what no registry should."""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
from collections.abc import Iterator

import pytest

from pipeline import event
from pipeline.errors import SchemaUnknown, SinkUnavailable, SourceUnavailable, UsageError
from pipeline.registry import ANSWER_BYTES, Registry
from tests import broker


@contextlib.contextmanager
def answering(status: int, body: bytes, **headers: str) -> Iterator[tuple[str, list[str | None]]]:
    """A server that gives every question the same answer, and the credentials it was shown."""
    shown: list[str | None] = []

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            shown.append(self.headers.get("Authorization"))
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            with contextlib.suppress(ConnectionError):
                self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}", shown
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_registered_schema_is_found(registry: broker.Registry, topic: str) -> None:
    """What is registered is found by subject and by id, and registering it again gives the same id."""
    client = Registry(registry.url)

    number = client.register(f"{topic}-value", event.schema_text())

    assert number == client.register(f"{topic}-value", event.schema_text())
    assert number == Registry(registry.url + "/").lookup(f"{topic}-value", event.schema_text())
    assert event.schema_json() == json.loads(Registry(registry.url).by_id(number))


def test_lookup_registers_nothing(registry: broker.Registry, topic: str) -> None:
    """A schema that nobody registered is unknown, and still is after it was asked for."""
    client = Registry(registry.url)

    for _ in range(2):
        with pytest.raises(SchemaUnknown, match=f"does not know this schema under {topic}-value.*--register-schema"):
            client.lookup(f"{topic}-value", event.schema_text())


def test_other_schema_is_not_ours(registry: broker.Registry, topic: str) -> None:
    """A subject that holds another schema does not give an id for ours."""
    client = Registry(registry.url)
    client.register(f"{topic}-value", '"string"')

    with pytest.raises(SchemaUnknown, match="does not know this schema"):
        client.lookup(f"{topic}-value", event.schema_text())


@pytest.mark.parametrize("number", [2_000_000_000, -1, 1 << 31])
def test_unknown_id(registry: broker.Registry, number: int) -> None:
    """An id that names nothing is a schema nobody can resolve."""
    with pytest.raises(SchemaUnknown, match=str(number)):
        Registry(registry.url).by_id(number)


def test_known_id_is_asked_once() -> None:
    """A topic has millions of messages of one id."""
    with answering(200, b'{"schema": "\\"string\\""}') as (where, shown):
        client = Registry(f"http://{where}")

        assert ['"string"'] * 3 == [client.by_id(7) for _ in range(3)]
        assert [None] == shown


@pytest.mark.parametrize("kind", [SinkUnavailable, SourceUnavailable])
def test_registry_that_is_down(kind: type[SinkUnavailable] | type[SourceUnavailable]) -> None:
    """The caller says what a registry that is away means to it; the sentence names the address."""
    (port,) = broker.free_ports(1)

    with pytest.raises(kind, match=f"http://127.0.0.1:{port} cannot be reached .*refused"):
        Registry(f"http://127.0.0.1:{port}", unavailable=kind).by_id(1)


@pytest.mark.parametrize(
    ("status", "body", "sentence"),
    [
        (200, b"<html>hello</html>", "not JSON"),
        (200, b"", "not JSON"),
        (200, b"[" * 100_000, "not JSON"),
        (200, b"[]", "not a JSON object"),
        (200, b"{}", "holds no schema"),
        (200, b'{"id": true, "schema": 1}', "holds no schema"),
        (200, b'{"id": 99999999999}', "holds no schema"),
        (200, b'{"schema": "' + b"x" * ANSWER_BYTES + b'"}', "larger than 1048576 bytes"),
        (404, b"no such page", "answers HTTP 404"),
        (500, b'{"message": "out of\\u001b[31m order"}', r"answers HTTP 500.*out of\\x1b\[31m order"),
        (401, b"", "refuses the user name or password"),
        (403, b"", "refuses the user name or password"),
    ],
)
def test_garbage_is_an_error_that_passes(status: int, body: bytes, sentence: str) -> None:
    """Whatever comes back is one sentence without control characters, and the caller may try again."""
    with answering(status, body) as (where, _):
        client = Registry(f"http://{where}")

        for ask in (lambda: client.by_id(1), lambda: client.lookup("a-value", "{}")):
            with pytest.raises(SinkUnavailable, match=sentence) as caught:
                ask()
            assert str(caught.value).isprintable()


@pytest.mark.parametrize("status", [409, 422])
def test_refused_schema(status: int) -> None:
    """An incompatible or invalid schema is refused for itself, with the registry's reason."""
    with (
        answering(status, b'{"error_code": 409, "message": "incompatible"}') as (where, _),
        pytest.raises(SchemaUnknown, match=r"refuses this schema for a-value \(incompatible\)"),
    ):
        Registry(f"http://{where}").register("a-value", "{}")


def test_schema_of_another_kind() -> None:
    """An id of a Protobuf or JSON schema is none that a datum can be read with."""
    with (
        answering(200, b'{"schemaType": "PROTOBUF", "schema": "message A {}"}') as (where, _),
        pytest.raises(SchemaUnknown, match="PROTOBUF; allowed is AVRO"),
    ):
        Registry(f"http://{where}").by_id(1)


def test_credentials_are_sent_and_never_shown() -> None:
    """User name and password of the URL reach the registry, percent-encoding undone, and no error sentence."""
    with answering(500, b"") as (where, shown):
        client = Registry(f"http://alice:s%40crit@{where}/api")

        with pytest.raises(SinkUnavailable) as caught:
            client.by_id(1)

    assert ["Basic YWxpY2U6c0Bjcml0"] == shown
    assert "crit" not in str(caught.value)
    assert "alice" not in str(caught.value)


def test_token_is_sent() -> None:
    """A bearer token reaches the registry."""
    with answering(200, b'{"id": 4}') as (where, shown):
        assert Registry(f"http://{where}", token="abc").lookup("a-value", "{}") == 4

    assert ["Bearer abc"] == shown


def test_redirect_is_not_followed() -> None:
    """Credentials do not travel to another host."""
    with answering(200, b'{"id": 4}') as (elsewhere, shown):
        with (
            answering(302, b"", Location=f"http://{elsewhere}/") as (where, _),
            pytest.raises(SinkUnavailable, match="answers HTTP 302"),
        ):
            Registry(f"http://alice:secret@{where}").by_id(1)

        assert [] == shown


@pytest.mark.parametrize(
    "url", ["localhost:8081", "ftp://localhost", "http://", "http://u:secret@host:port", "http://["]
)
def test_address_that_is_none(url: str) -> None:
    """The sentence says what is allowed, and does not repeat what may hold a password."""
    with pytest.raises(UsageError, match="allowed is http") as caught:
        Registry(url)

    assert "secret" not in str(caught.value)


def test_missing_ca_file() -> None:
    """A CA file that is not there is said at start, not at the first call."""
    with pytest.raises(UsageError, match=r"/nowhere/ca\.pem cannot be read"):
        Registry("https://localhost", ca_file="/nowhere/ca.pem")
