"""Names of this host's containers from the Docker Engine API, which docker and podman's service speak.

In: a unix socket that we may read. Out: a ``Directory`` that knows every container from its creation on. Only GET is
used. The stream of events is opened before the list is asked for, so that no container falls between the two; docker
announces a container before it runs, so that its name is there before its first bind.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pipeline.event import Workload, printable
from pipeline.workloads import Directory, Say

_ANSWER_SECS = 10.0
"""How long an answer may take; an engine that hangs is an engine that is away."""

_SILENCE_SECS = 300.0
"""After so long without an event the stream is opened again and all is listed, should something have been missed."""

_LIST_SECS = 300.0
"""Among events all is listed so often: docker drops those that are not read fast enough, and says nothing of it."""

_STEADY_SECS = 30.0
"""A stream that ended sooner is opened again less and less often."""

_FIRST_WAIT_SECS, _LONGEST_WAIT_SECS = 0.5, 30.0
_ANSWER_BYTES, _LINE_BYTES = 64 << 20, 1 << 20

# podman's service speaks docker's words, except where it is asked for them: there it knows only its own.
_BORN, _GONE = ("create", "start", "rename"), ("die", "destroy", "died", "remove")
_EVENTS = "/events?filters=" + quote(json.dumps({"type": ["container"], "event": [*_BORN, *_GONE]}))

# Those that are created and do not run yet would be announced again only after their first process runs.
_LIST = "/containers/json?all=true"
_ENDED = {"exited", "dead", "removing", "stopped"}

_ID = re.compile("[0-9a-f]{64}")
"""What an event can have: anything else would name nothing."""

_POD = ("io.kubernetes.pod.namespace", "io.kubernetes.pod.name", "io.kubernetes.container.name")


class Docker:
    """A ``workloads.Source``: a thread that follows one engine for as long as this lives.

    ``wait`` sleeps for so many seconds and returns True when it is time to end.
    """

    def __init__(
        self,
        directory: Directory,
        socket_path: Path,
        *,
        say: Say,
        name: str = "docker",
        wait: Callable[[float], bool] | None = None,
    ) -> None:
        self.name = name
        self._directory, self._path, self._say = directory, socket_path, say
        self._ended = threading.Event()
        self._wait = wait or self._ended.wait
        self._open: dict[str, _Connection] = {}
        self._listed_at = 0.0
        self._listed = self._away = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop, within two seconds."""
        self._ended.set()
        end = time.monotonic() + 2.0
        while self._thread.is_alive() and time.monotonic() < end:
            for connection in tuple(self._open.values()):
                connection.interrupt()
            self._thread.join(0.05)

    def _work(self) -> None:
        failures = 0
        while not self._ended.is_set():
            begun = time.monotonic()
            self._listed = False
            try:
                self._follow()
            except _Away as error:
                if self._ended.is_set():
                    return
                failures = 1 if time.monotonic() - begun > _STEADY_SECS else failures + 1
                # One that ended its stream may only have been restarted: it is away when it does not answer again.
                if not self._listed and not self._away:
                    self._away = True
                    self._say(
                        "warn",
                        f"the Docker Engine API at {self._path} cannot be asked for names of containers ({error}); "
                        "binds are recorded with the ids of their containers meanwhile",
                    )
                most = min(_LONGEST_WAIT_SECS, _FIRST_WAIT_SECS * 2 ** min(failures, 10))
                if self._wait(random.uniform(0, most)):
                    return

    def _follow(self) -> None:
        """List all containers, then take each event as it comes; returns after a long silence. _Away."""
        with self._connection("events") as stream:
            events = stream.ask(_EVENTS)
            self._list()
            if self._away:
                self._away = False
                self._say("info", f"the Docker Engine API at {self._path} answers again")
            while not self._ended.is_set():
                line = stream.line(events, _SILENCE_SECS)
                if line is None:
                    return
                self._heed(line)
                if time.monotonic() - self._listed_at > _LIST_SECS:
                    self._list()

    def _list(self) -> None:
        """Tell the directory of everything that lives. _Away."""
        listed = self._ask(_LIST)
        if not isinstance(listed, list):
            raise _Away("its list of containers is none")
        alive = {}
        for entry in listed:
            found = _listed(entry)
            if found is not None:
                container_id, workload = found
                # The name that an image had when the container was made may have gone on to another image since.
                if _is_id(workload.image, entry):
                    workload = self._inspected(container_id) or workload
                alive[container_id] = workload
        self._directory.replace(self.name, alive)
        self._listed, self._listed_at = True, time.monotonic()

    def _heed(self, line: bytes) -> None:
        """One event. What is none is passed over: the next one may be."""
        try:
            event = json.loads(line)
            action = event["Action"] if "Action" in event else event["status"]
            container_id = event["Actor"]["ID"]
            attributes = event["Actor"].get("Attributes") or {}
            known = _ID.fullmatch(container_id) and isinstance(action, str) and isinstance(attributes, dict)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return
        if not known:
            return
        if action in _BORN:
            announced = _workload(attributes.get("name"), attributes.get("image"), {})
            try:
                workload = self._inspected(container_id) or announced
            except _Away:
                if announced is not None:
                    self._directory.put(self.name, container_id, announced)
                raise
            if workload is not None:
                self._directory.put(self.name, container_id, workload)
        elif action in _GONE:
            self._directory.remove(self.name, container_id)

    def _inspected(self, container_id: str) -> Workload | None:
        """Names of a container; None when it has gone again or is not described. _Away."""
        try:
            found = self._ask(f"/containers/{container_id}/json")
            config = found.get("Config") or {}
            return _workload(found.get("Name"), config.get("Image"), config.get("Labels"))
        except (_NotFound, AttributeError):
            return None

    def _ask(self, path: str) -> Any:
        with self._connection("answer") as connection:
            return connection.json(path)

    @contextlib.contextmanager
    def _connection(self, use: str) -> Iterator[_Connection]:
        """One to the engine, which ``close`` can interrupt."""
        with contextlib.closing(_Connection(self._path, _ANSWER_SECS)) as connection:
            self._open[use] = connection
            yield connection


def _listed(entry: Any) -> tuple[str, Workload] | None:
    """Id and names from an entry of the list; None for what is no container or has ended."""
    try:
        names = [name for name in entry.get("Names") or () if isinstance(name, str)]
        # Other containers' links to it are there too, as /other/alias.
        own = next((name for name in names if "/" not in name.removeprefix("/")), next(iter(names), None))
        workload = _workload(own, entry.get("Image"), entry.get("Labels"))
        container_id = entry["Id"]
        joins = _ID.fullmatch(container_id) and str(entry.get("State")).lower() not in _ENDED
    except (KeyError, TypeError, AttributeError):
        return None
    return (container_id, workload) if joins and workload is not None else None


def _is_id(image: str | None, entry: Mapping[str, Any]) -> bool:
    """Whether a list tells an image's id, or its beginning, in the place of its name."""
    image_id = entry.get("ImageID")
    return isinstance(image_id, str) and bool(image) and _digits(image_id).startswith(_digits(str(image)))


def _digits(image: str) -> str:
    return image.removeprefix("sha256:")


def _workload(name: Any, image: Any, labels: Any) -> Workload | None:
    """Names as this project has them; those of its pod where Kubernetes made the container."""
    if not isinstance(name, str) or not name.removeprefix("/"):
        return None
    texts = labels if isinstance(labels, Mapping) else {}
    pairs = sorted((_text(key), _text(value)) for key, value in texts.items())
    image_text = _text(image) if isinstance(image, str) and image else None
    namespace, pod, container = (texts.get(label) for label in _POD)
    if namespace and pod and container:
        return Workload(_text(container), image_text, _text(namespace), _text(pod), tuple(pairs))
    return Workload(_text(name.removeprefix("/")), image_text, labels=tuple(pairs))


def _text(value: object) -> str:
    # JSON can name halves of surrogate pairs, which are no characters.
    return printable(str(value).encode("utf-8", "surrogatepass"))


# --- HTTP over a unix socket --------------------------------------------------------------------------------------


class _Away(Exception):
    """The engine cannot be asked; the text is the reason in a few words."""


class _NotFound(_Away):
    """It has no such container."""


class _Connection(http.client.HTTPConnection):
    """One request to one unix socket."""

    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        """Connect to the socket, within the time for an answer."""
        # http.client forgets the socket where the other side says that it will close it.
        self._socket = self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))

    def ask(self, path: str) -> http.client.HTTPResponse:
        """GET; the answer, unread. _Away."""
        try:
            self.request("GET", path)
            response = self.getresponse()
        except (OSError, http.client.HTTPException) as error:
            raise _Away(_reason(error)) from error
        if response.status != 200:
            failure = _NotFound if response.status == 404 else _Away
            raise failure(f"it answers {response.status} {printable(response.reason.encode('latin-1', 'replace'))}")
        return response

    def json(self, path: str) -> Any:
        """GET; the whole answer. _Away."""
        end = time.monotonic() + _ANSWER_SECS
        response = self.ask(path)
        content = bytearray()
        try:
            while part := response.read1(1 << 20):
                content += part
                if len(content) > _ANSWER_BYTES:
                    raise _Away(f"an answer is longer than {_ANSWER_BYTES >> 20} MiB")
                if time.monotonic() > end:
                    raise TimeoutError
            return json.loads(content)
        except (OSError, http.client.HTTPException) as error:
            raise _Away(_reason(error)) from error
        except (ValueError, RecursionError) as error:
            raise _Away("an answer is no JSON") from error

    def line(self, response: http.client.HTTPResponse, within_s: float) -> bytes | None:
        """The next line of an answer that goes on. _Away at its end.

        None when there is none ``within_s``; then this answer cannot be read any further.
        """
        self._socket.settimeout(within_s)
        try:
            line = response.readline(_LINE_BYTES + 1)
        except TimeoutError:
            return None
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise _Away(_reason(error)) from error
        if not line:
            raise _Away("it ended the stream of events")
        if len(line) > _LINE_BYTES:
            raise _Away(f"an event is longer than {_LINE_BYTES >> 20} MiB")
        return line

    def interrupt(self) -> None:
        """End a wait of another thread."""
        with contextlib.suppress(AttributeError, OSError):
            self._socket.shutdown(socket.SHUT_RDWR)


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return f"it does not answer within {_ANSWER_SECS:.0f} s"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
    return printable(text.encode("utf-8", "surrogateescape"))
