"""A schema registry with Confluent's API: ids of schemas, and the schemas of ids.

In: a subject and the text of a schema, or an id. Out: the id, or the text. Plain HTTP calls of the standard library:
the client that is made for it costs 16 MiB at import, and a node agent needs one call.

Agents look up and do not register unless they are told to, for a node must not need the right to change a registry.
Without a registry they frame by Avro's single-object encoding, ``C3 01`` and the schema's fingerprint, which a reader
that carries the schema understands; then nothing here is used.
"""

from __future__ import annotations

import base64
import http.client
import json
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import Any, NoReturn

from pipeline.errors import SchemaUnknown, SinkUnavailable, Unavailable, UsageError
from pipeline.event import printable

ANSWER_BYTES = 1 << 20
ANSWER_SECS = 5.0

_TYPE = "application/vnd.schemaregistry.v1+json"
_UNKNOWN = frozenset({40401, 40402, 40403})
_MAX_ID = (1 << 31) - 1
# Without the value: it may hold a password.
_NO_URL = "the schema registry's address is not a URL; allowed is http(s)://HOST[:PORT][/PATH]"


class Registry:
    """The registry at ``url``; a user name and password in the URL are sent as basic authentication and never shown.

    ``unavailable`` is the class of errors that pass: SinkUnavailable for who publishes, SourceUnavailable for who
    reads. Answers are bounded in size and time. No connection is kept.
    """

    def __init__(
        self,
        url: str,
        *,
        unavailable: type[Unavailable] = SinkUnavailable,
        token: str | None = None,
        ca_file: str | None = None,
    ) -> None:
        self._unavailable = unavailable
        try:
            parts = urllib.parse.urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise UsageError(_NO_URL) from error
        if parts.scheme not in {"http", "https"} or not host:
            raise UsageError(_NO_URL)
        place = f"[{host}]" if ":" in host else host
        self.url = f"{parts.scheme}://{place}{f':{port}' if port else ''}{parts.path.rstrip('/')}"
        self._headers = {"Accept": _TYPE, "Content-Type": _TYPE, "User-Agent": "bindsnoop"}
        if parts.username is not None:
            user, password = (urllib.parse.unquote(part or "") for part in (parts.username, parts.password))
            self._headers["Authorization"] = "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
        elif token is not None:
            self._headers["Authorization"] = f"Bearer {token}"
        try:
            trust = ssl.create_default_context(cafile=ca_file) if parts.scheme == "https" else None
        except OSError as error:
            raise UsageError(f"the schema registry's CA file {ca_file} cannot be read: {error}") from error
        # A redirect would carry the password to another host, and a proxy is for the web, not for this.
        handlers: list[urllib.request.BaseHandler] = [_NoRedirect(), urllib.request.ProxyHandler({})]
        if trust is not None:
            handlers.append(urllib.request.HTTPSHandler(context=trust))
        self._opener = urllib.request.build_opener(*handlers)
        self._texts: dict[int, str] = {}

    def lookup(self, subject: str, schema_text: str) -> int:
        """Id under which ``subject`` has this schema.

        SchemaUnknown when it has it not; ``unavailable`` when the registry cannot be reached or is in trouble.
        """
        what = f"this schema under {subject}; register it, or let the agent do so by --register-schema"
        return self._id_of(self._ask(f"/subjects/{_quoted(subject)}", schema_text, what))

    def register(self, subject: str, schema_text: str) -> int:
        """Id of this schema after it was added to ``subject``; the same id when it was there.

        SchemaUnknown when the registry refuses it (incompatible); ``unavailable`` as ``lookup``.
        """
        return self._id_of(
            self._ask(f"/subjects/{_quoted(subject)}/versions", schema_text, f"this schema for {subject}")
        )

    def by_id(self, schema_id: int) -> str:
        """Text of the schema with this id, asked once. SchemaUnknown when there is none, or none of Avro."""
        if schema_id not in self._texts:
            if not 0 <= schema_id <= _MAX_ID:
                raise SchemaUnknown(f"schema id {schema_id} is none; allowed is 0 to {_MAX_ID}")
            answer = self._ask(f"/schemas/ids/{schema_id}", None, f"schema id {schema_id}")
            if answer.get("schemaType", "AVRO") != "AVRO":
                kind = printable(str(answer["schemaType"])[:40].encode())
                raise SchemaUnknown(f"schema id {schema_id} at {self.url} is of type {kind}; allowed is AVRO")
            if not isinstance(answer.get("schema"), str):
                self._away("its answer holds no schema")
            self._texts[schema_id] = answer["schema"]
        return self._texts[schema_id]

    def _id_of(self, answer: dict[str, Any]) -> int:
        found = answer.get("id")
        if not isinstance(found, int) or isinstance(found, bool) or not 0 <= found <= _MAX_ID:
            self._away("its answer holds no schema id")
        return found

    def _ask(self, path: str, schema_text: str | None, what: str) -> dict[str, Any]:
        """The JSON object that the registry answers; with ``schema_text`` as a question of its own."""
        body = None if schema_text is None else json.dumps({"schema": schema_text, "schemaType": "AVRO"}).encode()
        request = urllib.request.Request(self.url + path, data=body, headers=self._headers)
        try:
            with self._opener.open(request, timeout=ANSWER_SECS) as answer:
                raw = self._bounded(answer)
        except urllib.error.HTTPError as error:
            with error:
                self._refused(error, what)
        except urllib.error.URLError as error:
            raise self._unavailable(self._sentence(f"cannot be reached ({error.reason})")) from error
        except (OSError, http.client.HTTPException) as error:
            raise self._unavailable(self._sentence(f"cannot be reached ({error or type(error).__name__})")) from error
        return self._parsed(raw)

    def _bounded(self, answer: http.client.HTTPResponse) -> bytes:
        """The body; the socket's own timeout is for each piece of it, and a slow sender could send for ever."""
        end = time.monotonic() + ANSWER_SECS
        raw = b""
        while piece := answer.read1(65536):
            raw += piece
            if len(raw) > ANSWER_BYTES:
                self._away(f"its answer is larger than {ANSWER_BYTES} bytes")
            if time.monotonic() > end:
                self._away(f"its answer takes longer than {ANSWER_SECS:.0f} s")
        return raw

    def _parsed(self, raw: bytes) -> dict[str, Any]:
        try:
            answer = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise self._unavailable(self._sentence("answers something that is not JSON")) from error
        if not isinstance(answer, dict):
            self._away("its answer is not a JSON object")
        return answer

    def _refused(self, error: urllib.error.HTTPError, what: str) -> NoReturn:
        """The error for an answer of 300 and more; ``error`` is still open."""
        try:
            said = json.loads(error.read(ANSWER_BYTES))
        except (ValueError, RecursionError, OSError, http.client.HTTPException):
            said = {}
        said = said if isinstance(said, dict) else {}
        message = f" ({str(said['message'])[:300]})" if said.get("message") else ""
        # An address that is no registry at all answers 404 too, but without one of the registry's own codes.
        if error.code == 404 and said.get("error_code") in _UNKNOWN:
            raise SchemaUnknown(self._sentence(f"does not know {what}{message}")) from error
        if error.code in {409, 422}:
            raise SchemaUnknown(self._sentence(f"refuses {what}{message}")) from error
        if error.code in {401, 403}:
            raise self._unavailable(self._sentence(f"refuses the user name or password (HTTP {error.code})")) from error
        raise self._unavailable(
            self._sentence(f"answers HTTP {error.code} to the question for {what}{message}")
        ) from error

    def _away(self, what: str) -> NoReturn:
        raise self._unavailable(self._sentence(f"cannot be understood: {what}"))

    def _sentence(self, text: str) -> str:
        return f"the schema registry at {self.url} " + printable(text.encode("utf-8", "surrogateescape"))


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_args: object, **_names: object) -> None:
        return None


def _quoted(subject: str) -> str:
    return urllib.parse.quote(subject, safe="")
