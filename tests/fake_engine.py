"""A container engine on a unix socket that behaves as a test says: a real HTTP server, behaviours as data.

In: what it lists, what it says of each container, what it does to a request. Out: a socket that speaks as much of the
Docker Engine API as a reader of names needs. What a real engine does is tested with a real one; this one does what a
real one cannot be made to do.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import queue
import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

ANSWER = "answer"
HANG = "hang"
NO_JSON = "no-json"
NO_LIST = "no-list"
ERROR = "error"
CUT = "cut"
TRICKLE = "trickle"
GIANT = "giant"
BRIEF = "brief"
"""What is done to every request: answered; never answered; answered with something else, with an object for a list,
with 500, or half; byte after byte without end; with more than anybody wants; or answered, but the stream of events
ended as soon as it begins."""


class Engine:
    """``containers`` by id: name, image and labels; what the list alone tells: names of links to it, its state.

    One that has ``left`` is in the list, and cannot be asked about any more.
    ``odd`` are further entries of the list, as they are. ``behaviour`` is one of those above. ``asked`` is every path.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.containers: dict[str, dict[str, Any]] = {}
        self.odd: list[object] = []
        self.behaviour = ANSWER
        self.asked: list[str] = []
        self.streams = 0
        self.over = threading.Event()
        self._lines: dict[queue.Queue[bytes | None], set[str]] = {}
        self._server: _Server | None = None

    def create(self, container_id: str, name: str, *, image: str = "busybox", **labels: str) -> None:
        """A container is made, and announced."""
        self.containers[container_id] = {"name": name, "image": image, "labels": labels}
        self.say({"Type": "container", "Action": "create", "Actor": {"ID": container_id, "Attributes": {"name": name}}})

    def die(self, container_id: str) -> None:
        """A container ends and is removed."""
        self.containers.pop(container_id, None)
        self.say({"Type": "container", "Action": "die", "Actor": {"ID": container_id}})

    def say(self, event: object, word: str | None = None) -> None:
        """Tell everybody who listens for this action, or for ``word``; bytes go to all, as they are."""
        line = event if isinstance(event, bytes) else json.dumps(event).encode()
        word = word or (event.get("Action") if isinstance(event, dict) else None)
        for lines, wanted in tuple(self._lines.items()):
            if word is None or word in wanted:
                lines.put(line + b"\n")

    def hang_up(self) -> None:
        """End every stream of events."""
        for lines in tuple(self._lines):
            lines.put(None)

    def start(self) -> None:
        """Listen, on a socket that is made anew."""
        self.path.unlink(missing_ok=True)
        self._server = _Server(str(self.path), _Handler, self)
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        """Listen no more; the socket is gone."""
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()
            self.path.unlink(missing_ok=True)
        self.hang_up()

    @contextlib.contextmanager
    def listening(self, wanted: set[str]) -> Iterator[queue.Queue[bytes | None]]:
        """One more who listens for these actions."""
        lines: queue.Queue[bytes | None] = queue.Queue()
        self._lines[lines] = wanted
        self.streams += 1
        try:
            yield lines
        finally:
            del self._lines[lines]


@contextlib.contextmanager
def engine(path: Path) -> Iterator[Engine]:
    """One that listens from the beginning of the block to its end."""
    made = Engine(path)
    made.start()
    try:
        yield made
    finally:
        made.over.set()
        made.stop()


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True

    def __init__(self, path: str, handler: type[_Handler], of: Engine) -> None:
        self.engine = of
        super().__init__(path, handler)

    def handle_error(self, *_: Any) -> None:
        """Whoever asked has gone."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def address_string(self) -> str:
        return "unix"

    def log_message(self, *_: Any) -> None:
        """Nothing is logged."""

    def do_GET(self) -> None:
        """Whatever is asked."""
        engine = self.server.engine
        engine.asked.append(self.path)
        self.close_connection = True
        url = urlsplit(self.path)
        query = parse_qs(url.query)
        if engine.behaviour == HANG:
            engine.over.wait(30)
        elif engine.behaviour == NO_JSON and "events" not in self.path:
            self._answer(200, b"<html>")
        elif engine.behaviour == ERROR:
            self._answer(500, b'{"message":"no"}')
        elif url.path == "/events":
            self._events(set(json.loads(query["filters"][0])["event"]))
        elif engine.behaviour in {TRICKLE, GIANT}:
            self._endless()
        elif url.path == "/containers/json":
            every = query.get("all") == ["true"]
            listed = [_listed(*one) for one in engine.containers.items()]
            shown = [one for one in listed if every or one["State"] == "running"] + engine.odd
            self._answer(200, json.dumps({} if engine.behaviour == NO_LIST else shown).encode())
        else:
            found = engine.containers.get(url.path.split("/")[2])
            found = None if found and found.get("left") else found
            self._answer(200 if found else 404, json.dumps(_inspected(found) if found else {"message": "no"}).encode())

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if self.server.engine.behaviour == CUT else body)

    def _endless(self) -> None:
        """Of a megabyte each, or of one byte now and then."""
        engine = self.server.engine
        giant = engine.behaviour == GIANT
        self.send_response(200)
        self.end_headers()
        while not engine.over.wait(0 if giant else 0.02):
            self.wfile.write(b" " * (1 << 20 if giant else 1))

    def _events(self, wanted: set[str]) -> None:
        with self.server.engine.listening(wanted) as lines:
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.flush()
            if self.server.engine.behaviour == BRIEF:
                lines.put(None)
            while line := lines.get():
                self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
                self.wfile.flush()


def _listed(container_id: str, container: dict[str, Any]) -> dict[str, Any]:
    own = [f"/{container['name']}"] if container["name"] is not None else None
    return {
        "Id": container_id,
        "Names": [*container.get("links", ()), *own] if own else None,
        "Image": container.get("image_id", container["image"]),
        "ImageID": "sha256:" + "e" * 64,
        "Labels": container["labels"],
        "State": container.get("state", "running"),
    }


def _inspected(container: dict[str, Any]) -> dict[str, Any]:
    return {
        "Name": f"/{container['name']}",
        "Config": {"Image": container["image"], "Labels": container["labels"]},
    }
