"""A real HTTP(S) server on loopback that plays a Kubernetes API server; how it misbehaves is data.

In: pods that are put, changed and deleted, and a ``Behaviour`` for each request that is not to be served well. Out:
lists and watches as an API server gives them (versions, bookmarks, pages, 410 for what was compacted), and the
requests that came. It stops and starts again on the same port, and every connection ends with it.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import secrets
import socket
import ssl
import subprocess
import threading
import time
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

Pod = dict[str, Any]


class Behaviour(NamedTuple):
    """How one request is answered. Without ``body`` and ``lines`` it is served well, as far as ``status`` lets it.

    ``on`` is ``list``, ``watch`` or ``any``. ``lines`` are sent one by one as those of a watch. ``then`` says what
    comes after them: ``end`` of the answer, ``cut`` the connection in the middle of it, ``hang`` without a byte or
    ``follow`` as a good watch does. With ``mute`` not even headers are sent, and ``hang`` is all that follows.
    """

    on: str = "any"
    status: int = 200
    headers: Mapping[str, str] = {}
    body: bytes | None = None
    lines: Iterable[bytes] | None = None
    then: str = "end"
    mute: bool = False


class Asked(NamedTuple):
    """A request: ``verb`` is ``list`` or ``watch``, ``query`` its parameters, ``token`` that of the client."""

    verb: str
    query: dict[str, str]
    token: str | None
    agent: str


def status(code: int, message: str = "", reason: str = "") -> bytes:
    """The JSON of a failure, as an API server words it."""
    return json.dumps(
        {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": message,
         "reason": reason, "code": code}
    ).encode()  # fmt: skip


def event(kind: str, thing: Any) -> bytes:
    """A line of a watch."""
    return json.dumps({"type": kind, "object": thing}).encode() + b"\n"


def container_id() -> str:
    """64 hexadecimal digits that nobody else has."""
    return secrets.token_hex(32)


def pod(
    name: str,
    *ids: str,
    namespace: str = "default",
    labels: Mapping[str, str] | None = None,
    uid: str | None = None,
    image: str = "registry.example/app:1",
    last: str | None = None,
) -> Pod:
    """A pod whose containers ``c0``, ``c1`` … run with these ids; ``last`` is the one that c0 had before.

    It is as large as real ones are, with the parts that nobody reads here.
    """
    containers = [
        {
            "name": f"c{number}",
            "image": image,
            "env": [{"name": f"VARIABLE_{one}", "value": "some value of it"} for one in range(8)],
            "resources": {"limits": {"cpu": "1", "memory": "64Mi"}},
            "volumeMounts": [{"name": "token", "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount"}],
        }
        for number in range(len(ids) or 1)
    ]
    statuses = [
        {
            "name": f"c{number}",
            "image": f"sha256:{number}",
            "imageID": f"registry.example/app@sha256:{number:064x}",
            "containerID": f"containerd://{one}",
            "ready": True,
            "state": {"running": {"startedAt": "2026-01-02T03:04:05Z"}},
            "lastState": {"terminated": {"containerID": f"containerd://{last}", "exitCode": 1}}
            if last is not None and number == 0
            else {},
        }
        for number, one in enumerate(ids)
    ]
    return {
        "metadata": {
            "name": name,
            "namespace": namespace,
            "uid": uid or f"uid-of-{name}",
            "labels": dict({"app": name} if labels is None else labels),
            "annotations": {"example.org/config": "x" * 400},
            "managedFields": [{"manager": "kubelet", "fieldsV1": {f"f:field{one}": {} for one in range(40)}}],
        },
        "spec": {"nodeName": "node-1", "containers": containers},
        "status": {"phase": "Running" if ids else "Pending", "containerStatuses": statuses},
    }


class Certificate(NamedTuple):
    """Files of a certificate for 127.0.0.1 that is its own authority."""

    certificate: Path
    key: Path


def certificate(folder: Path, name: str = "api") -> Certificate:
    """Make one, valid for a day."""
    made = Certificate(folder / f"{name}.crt", folder / f"{name}.key")
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "1", "-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1"]
    command += ["-keyout", str(made.key), "-out", str(made.certificate)]
    subprocess.run(command, check=True, capture_output=True)
    return made


@dataclass
class FakeApi:
    """The server: ``put`` and ``delete`` change its pods, ``misbehave`` its next answers, ``asked`` what came.

    ``tokens`` are those that it takes, None for any or none. ``page`` pods go into an answer to a list.
    """

    tls: Certificate | None = None
    tokens: set[str] | None = None
    page: int = 1_000_000
    asked: list[Asked] = field(default_factory=list)
    port: int = 0
    _pods: dict[str, Pod] = field(default_factory=dict)
    _version: int = 100
    _log: list[tuple[int, bytes]] = field(default_factory=list)
    _oldest: int = 0
    _behaviours: list[Behaviour] = field(default_factory=list)
    _always: list[Behaviour] = field(default_factory=list)
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _server: http.server.ThreadingHTTPServer | None = None
    _lines: set[socket.socket] = field(default_factory=set)
    _stopped: threading.Event = field(default_factory=threading.Event)

    # --- what a cluster does --------------------------------------------------------------------------------------

    def put(self, one: Pod) -> None:
        """Add a pod, or change the one with its uid."""
        with self._changed:
            known = one["metadata"]["uid"] in self._pods
            self._pods[one["metadata"]["uid"]] = one
            self._note("MODIFIED" if known else "ADDED", one)

    def delete(self, uid: str) -> None:
        """Delete a pod."""
        with self._changed:
            self._note("DELETED", self._pods.pop(uid))

    def bookmark(self) -> None:
        """Send every watch a bookmark of a new version."""
        with self._changed:
            self._note("BOOKMARK", {"kind": "Pod", "metadata": {}})

    def compact(self) -> None:
        """Forget all versions before the present one."""
        with self._changed:
            self._oldest = self._version
            self._log.clear()

    def _note(self, kind: str, thing: Pod) -> None:
        self._version += 1
        thing["metadata"]["resourceVersion"] = str(self._version)
        self._log.append((self._version, event(kind, thing)))
        self._changed.notify_all()

    # --- how it behaves -------------------------------------------------------------------------------------------

    def misbehave(self, *behaviours: Behaviour) -> None:
        """Each is the answer to one request to come that it fits, in this order."""
        with self._changed:
            self._behaviours += behaviours

    def always(self, *behaviours: Behaviour) -> None:
        """These are the answers to all requests that they fit from now on; without any all is well again."""
        with self._changed:
            self._always = list(behaviours)

    def verbs(self) -> list[str]:
        """``list`` or ``watch`` for each request that came."""
        return [one.verb for one in self.asked]

    def watches(self) -> int:
        """How many connections stand."""
        return len(self._lines)

    # --- its life -------------------------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        """Its address, the same in its second life."""
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Listen, on the port of the life before."""
        self._stopped.clear()
        self._server = _Server(("127.0.0.1", self.port), _handler(self))
        self.port = self._server.server_port
        if self.tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self.tls.certificate, self.tls.key)
            self._server.trust = context
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """End every connection and listen no longer."""
        if self._server is None:
            return
        self._stopped.set()
        with self._changed:
            self._changed.notify_all()
        self._server.shutdown()
        for line in list(self._lines):
            with contextlib.suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)
        self._server.server_close()
        self._server = None

    def kubeconfig(self, path: Path, *, token: str | None = "t0", **cluster: Any) -> Path:
        """Write a kubeconfig that leads here; ``cluster`` is laid over its cluster."""
        where = {"server": self.url, **cluster}
        if self.tls and "certificate-authority" not in where and "certificate-authority-data" not in where:
            where["certificate-authority"] = str(self.tls.certificate)
        wanted = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "here",
            "contexts": [{"name": "here", "context": {"cluster": "fake", "user": "agent"}}],
            "clusters": [
                {"name": "fake", "cluster": {key: value for key, value in where.items() if value is not None}}
            ],
            "users": [{"name": "agent", "user": {} if token is None else {"token": token}}],
        }
        path.write_text(json.dumps(wanted), encoding="utf-8")
        return path

    # --- answers --------------------------------------------------------------------------------------------------

    def _behaviour(self, verb: str) -> Behaviour:
        with self._changed:
            for behaviour in self._behaviours:
                if behaviour.on in {verb, "any"}:
                    self._behaviours.remove(behaviour)
                    return behaviour
            return next((one for one in self._always if one.on in {verb, "any"}), Behaviour(then="follow"))

    def _listed(self, query: Mapping[str, str]) -> tuple[int, bytes]:
        with self._changed:
            first = int(query.get("continue", "0"))
            pods = list(self._pods.values())
            metadata = {"resourceVersion": str(self._version)}
            if first + self.page < len(pods):
                metadata["continue"] = str(first + self.page)
            body = {"kind": "PodList", "metadata": metadata, "items": pods[first : first + self.page]}
            return 200, json.dumps(body).encode()

    def _after(self, version: int) -> Iterator[bytes]:
        """Events after ``version``, as they happen, until the server stops."""
        while not self._stopped.is_set():
            with self._changed:
                if version < self._oldest:
                    yield event("ERROR", json.loads(status(410, f"too old resource version: {version}", "Expired")))
                    return
                new = [(at, line) for at, line in self._log if at > version]
                if not new:
                    self._changed.wait(5)
            for at, line in new:
                version = at
                yield line


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = True
    request_queue_size = 64
    trust: ssl.SSLContext | None = None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no error of a test."""


def _handler(api: FakeApi) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            trust = self.server.trust  # type: ignore[attr-defined]
            if trust:
                # Python leaves a socket open that it cannot wrap because the client is already gone.
                self.request.getpeername()
                self.request = trust.wrap_socket(self.request, server_side=True, do_handshake_on_connect=False)
                try:
                    self.request.do_handshake()
                except OSError:
                    self.request.close()
                    raise
            api._lines.add(self.request)
            super().setup()

        def finish(self) -> None:
            api._lines.discard(self.request)
            super().finish()
            self.request.close()

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            parts = urllib.parse.urlsplit(self.path)
            query = dict(urllib.parse.parse_qsl(parts.query, keep_blank_values=True))
            verb = "watch" if query.get("watch") == "true" else "list"
            scheme, _, given = self.headers.get("Authorization", "").partition(" ")
            token = given if scheme.lower() == "bearer" else None
            api.asked.append(Asked(verb, query, token, self.headers.get("User-Agent", "")))
            behaviour = api._behaviour(verb)
            if parts.path != "/api/v1/pods":
                behaviour = Behaviour(status=404, body=status(404, "no such path"))
            elif api.tokens is not None and token not in api.tokens:
                behaviour = Behaviour(status=401, body=status(401, "Unauthorized"))
            with contextlib.suppress(OSError):
                self._answer(verb, query, behaviour)

        def _answer(self, verb: str, query: Mapping[str, str], behaviour: Behaviour) -> None:
            if behaviour.mute:
                self._then("hang")
                return
            if behaviour.body is None and behaviour.lines is None and verb == "list":
                code, body = api._listed(query)
                behaviour = behaviour._replace(status=code, body=body)
            if behaviour.body is not None:
                self._head(behaviour, {"Content-Length": str(len(behaviour.body))})
                self.wfile.write(behaviour.body)
                return
            self._head(behaviour, {"Transfer-Encoding": "chunked"})
            for line in behaviour.lines or ():
                self._chunk(line)
            if behaviour.then == "follow":
                for line in api._after(int(query.get("resourceVersion") or 0)):
                    self._chunk(line)
            self._then("end" if behaviour.then == "follow" else behaviour.then)

        def _head(self, behaviour: Behaviour, more: Mapping[str, str]) -> None:
            self.send_response(behaviour.status)
            for name, value in {"Content-Type": "application/json", **behaviour.headers, **more}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.flush()

        def _chunk(self, line: bytes) -> None:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
            self.wfile.flush()

        def _then(self, what: str) -> None:
            self.close_connection = True
            if what == "end":
                self.wfile.write(b"0\r\n\r\n")
            elif what == "hang":
                api._stopped.wait(60)

    return Handler


@contextlib.contextmanager
def serving(**chosen: Any) -> Iterator[FakeApi]:
    """A ``FakeApi`` that listens; stopped at the end, with every thread of it."""
    before = set(threading.enumerate())
    api = FakeApi(**chosen)
    api.start()
    try:
        yield api
    finally:
        api.stop()
        end = time.monotonic() + 5
        for thread in set(threading.enumerate()) - before:
            if thread.name.startswith("Thread-"):
                thread.join(max(0.0, end - time.monotonic()))
