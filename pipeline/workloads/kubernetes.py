"""Names of this node's pods, from the Kubernetes API server: one list, then a watch that goes on for ever.

In: credentials, those of the service account or of a kubeconfig, and the JSON of pods. Out: a ``Workload`` for every
container id that a pod's status mentions, in the ``Directory``; and a sentence when the API server is away or back.

Why it looks as it does:

* A cluster has one API server and thousands of agents. So the list is asked with ``resourceVersion=0``, which the
  server answers from its memory, a watch goes on where the one before ended, and whatever fails is tried again after a
  random time that doubles up to half a minute: agents that lost the server together do not come back together.
* The client's model objects cost more memory than the pods themselves. Only its credentials and its HTTP are used; of
  the JSON nothing is kept beyond the keys in ``_KEYS``, not even while it is parsed, and of a pod only its ids.
* Credentials are read anew for every connection, a few times an hour: whatever rotates them is noticed without a clock.
* Importing the client takes half a second and 46 MiB, so this is done when one is made: attach the programs before.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import os
import random
import re
import socket
import ssl
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline import __version__
from pipeline.errors import UsageError
from pipeline.event import Workload, printable
from pipeline.workloads import Directory, Say

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""Folder that Kubernetes puts into every pod that has a service account: ``token`` and ``ca.crt``."""

FIRST_SECS, LONGEST_SECS = 1.0, 30.0
"""What fails is tried again after a random time up to the first, which doubles with every failure up to the second."""

RETRY_AFTER_SECS = 300.0
"""Longest Retry-After of a server that is obeyed to the end."""

STEADY_SECS = 30.0
"""A watch that lasted so long was a success: failures are counted from the beginning again."""

PATIENCE_SECS = 5.0
"""A first failure is not worth a line in the log, unless names would be missing for so long."""

SILENT_SECS = 240.0
"""A watch without a byte for so long is dead: the server sends a bookmark every minute."""

LINE_BYTES = 8 << 20
LIST_BYTES = 64 << 20
"""Longest event of a watch, and longest page of a list. etcd refuses objects above 1.5 MiB."""

_PATH = "/api/v1/pods"
_PAGE_PODS = 500
_LIST_SECS = 60.0
_CONNECT_SECS = 10.0
_CLOSE_SECS = 1.8
_WATCH_SECS = (300, 600)
_ID = re.compile(r"[^/]*://([0-9a-f]{64})")
_KINDS = ("", "init", "ephemeral")
_KEYS = frozenset(
    {
        "type", "object", "code", "message", "items", "metadata", "continue", "resourceVersion", "uid", "namespace",
        "name", "labels", "spec", "status", "containers", "initContainers", "ephemeralContainers", "containerStatuses",
        "initContainerStatuses", "ephemeralContainerStatuses", "image", "containerID", "state", "lastState",
        "terminated",
    }
)  # fmt: skip
"""Every key that is read here, apart from those of labels."""


def in_cluster(service_account: Path = SERVICE_ACCOUNT) -> bool:
    """Whether this process runs in a pod that has a service account. Cheap: nothing is imported."""
    return bool(os.environ.get("KUBERNETES_SERVICE_HOST")) and (service_account / "token").is_file()


class _Refused(Exception):
    """A request failed. ``str(error)`` goes on where "the Kubernetes API server …" began.

    ``gone`` when the version that was asked for is no longer known (410); ``retry_after`` is the server's wish, in
    seconds.
    """

    def __init__(self, reason: str, *, retry_after: float = 0.0, gone: bool = False) -> None:
        super().__init__(reason)
        self.retry_after = retry_after
        self.gone = gone


class _Broken(Exception):
    """A watch that had begun ended as it should not.

    With ``relist`` it may have missed something; ``gone`` as above.
    """

    def __init__(self, *, relist: bool, gone: bool = False) -> None:
        super().__init__()
        self.relist = relist
        self.gone = gone


class Kubernetes:
    """A ``Source`` that follows the pods of ``node``, which is the node's name in Kubernetes.

    Without a ``kubeconfig`` it speaks as the pod's service account. UsageError when that, or the kubeconfig, is not
    there or wrong; whatever happens later is said by ``say``, from a thread of its own, and tried again.

    ``malformed`` counts events that were skipped because they could not be understood. ``wait`` takes seconds and says
    whether to stop; ``monotonic`` gives seconds; ``silent_secs`` is how long a watch may be silent.
    """

    name = "kubernetes"

    def __init__(
        self,
        directory: Directory,
        node: str,
        *,
        kubeconfig: Path | None,
        say: Say,
        service_account: Path = SERVICE_ACCOUNT,
        silent_secs: float = SILENT_SECS,
        wait: Callable[[float], bool] | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._directory, self._node, self._say = directory, node, say
        self._kubeconfig, self._service_account = kubeconfig, service_account
        self._silent_secs, self._monotonic = silent_secs, monotonic
        # In a selector these three mean something.
        self._selector = "spec.nodeName=" + re.sub(r"([\\,=])", r"\\\1", node)
        self._stop = threading.Event()
        self._wait = wait or self._stop.wait
        self._lock = threading.Lock()
        self._line: socket.socket | None = None

        self._ids: dict[str, frozenset[str]] = {}
        self._version: str | None = None
        self._moved = False
        self._newest = False
        self._failures = 0
        self._refusals = 0
        self._away = False
        self._alone = False
        self._good = monotonic()
        self.malformed = 0

        # Plug-ins of a kubeconfig ask somebody else for credentials; nobody waits for that here.
        self._host = printable(str(self._configuration(plugins=False).host).encode("utf-8", "surrogateescape"))
        self._thread = threading.Thread(target=self._run, name=self.name, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread, within two seconds, also in the middle of a request.

        Only a connection that is just being made cannot be broken off; then the thread is left behind, ends by itself
        and says nothing more.
        """
        self._stop.set()
        self._hang_up()
        self._thread.join(_CLOSE_SECS)

    # --- the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stop.is_set():
            lasted, gone, retry_after, refusal = False, False, 0.0, None
            try:
                lasted = self._follow()
            except _Broken as broken:
                gone = broken.gone
                if broken.relist:
                    self._version = None
            except _Refused as refused:
                gone, retry_after, refusal = refused.gone, refused.retry_after, str(refused)
                self._refusals += 1
                self._version = None
            finally:
                self._drop()
            if gone:
                # Too old although nothing came after the list: then the server's memory was too old itself.
                self._newest = not self._moved
            if self._stop.is_set() or (not lasted and self._paused(retry_after, refusal)):
                return

    def _paused(self, retry_after: float, refusal: str | None) -> bool:
        """Wait before the next attempt, and say when the server is away. True when it is time to stop."""
        most = min(LONGEST_SECS, FIRST_SECS * 2.0 ** min(self._failures, 10))
        self._failures += 1
        pause = retry_after + random.uniform(0, most)
        missing = self._monotonic() - self._good + pause
        if refusal is not None and not self._away and (self._refusals > 1 or missing >= PATIENCE_SECS):
            self._away = True
            self._say(
                "warn",
                f"the Kubernetes API server {self._host} {refusal}; containers that start now have no names, "
                f"and their binds are recorded with the raw container id",
            )
        return self._wait(pause)

    def _follow(self) -> bool:
        """List if need be, then watch until the server ends it; whether that was when it should. _Refused, _Broken."""
        client = self._client()
        try:
            if self._version is None:
                self._list(client)
            return self._watch(client)
        finally:
            client.rest_client.pool_manager.clear()

    def _list(self, client: Any) -> None:
        """Ask for all pods of this node, and replace what the directory knows."""
        alive: dict[str, Workload] = {}
        ids: dict[str, frozenset[str]] = {}
        self._moved = False
        query = [] if self._newest else [("resourceVersion", "0")]
        while True:
            page = _mapping(self._page(client, [("limit", str(_PAGE_PODS)), *query]))
            metadata = _mapping(page.get("metadata"))
            for pod in _mappings(page.get("items")):
                key = _key(pod)
                if key is not None:
                    found = workloads_of(pod)
                    alive |= found
                    ids[key] = frozenset(found)
            token = metadata.get("continue")
            if not token:
                break
            query = [("continue", str(token))]
        version = metadata.get("resourceVersion")
        if not isinstance(version, str) or not version:
            raise _Refused("answers with something that is no list of pods")
        if self._stop.is_set():
            return
        self._directory.replace(self.name, alive)
        self._ids, self._version, self._newest = ids, version, False
        self._good = self._monotonic()
        if not ids and not self._alone:
            self._alone = True
            self._say(
                "warn",
                f"the Kubernetes API server {self._host} knows no pod on a node {self._node}; if there are any, "
                f"the agent's --node must be the name that `kubectl get nodes` shows",
            )

    def _page(self, client: Any, query: list[tuple[str, str]]) -> Any:
        answer = self._ask(client, query, min(_LIST_SECS, self._silent_secs))
        raw = bytearray()
        end = time.monotonic() + _LIST_SECS
        try:
            for piece in _pieces(answer):
                raw += piece
                if len(raw) > LIST_BYTES:
                    raise _Refused(f"answers with a list of pods that is larger than {LIST_BYTES} bytes")
                if time.monotonic() > end:
                    raise _Refused(f"takes longer than {_LIST_SECS:.0f} s for a list of pods")
            return parsed(raw)
        except ValueError as error:
            raise _Refused("answers with something that is no list of pods") from error
        except _Broken as error:
            raise _Refused(f"broke off its list of pods ({_why(error.__cause__ or error)})") from error
        finally:
            answer.close()

    def _watch(self, client: Any) -> bool:
        """Take events until the server ends the watch; whether it lasted as long as it was asked for."""
        asked_secs = random.randint(*_WATCH_SECS)
        query = [
            ("watch", "true"),
            ("allowWatchBookmarks", "true"),
            ("resourceVersion", self._version or ""),
            ("timeoutSeconds", str(asked_secs)),
        ]
        began = self._monotonic()
        answer = self._ask(client, query, self._silent_secs)
        malformed = 0
        try:
            self._is_back()
            for line in _lines(_pieces(answer)):
                if self._stop.is_set():
                    break
                try:
                    self._take(_mapping(parsed(line)))
                except ValueError as error:
                    self.malformed += 1
                    malformed += 1
                    if malformed > 1:
                        raise _Broken(relist=True) from error
        finally:
            answer.close()
            self._good = self._monotonic()
            if self._good - began >= STEADY_SECS:
                self._failures = 0
        return self._good - began >= asked_secs - 1

    def _is_back(self) -> None:
        self._refusals = 0
        if self._away:
            self._away = False
            self._say("info", f"the Kubernetes API server {self._host} is back; {len(self._ids)} pods have names")

    def _take(self, event: dict[str, Any]) -> None:
        """One event of a watch. ValueError when it cannot be understood."""
        kind, thing = event.get("type"), _mapping(event.get("object"))
        if kind == "ERROR":
            raise _Broken(relist=True, gone=thing.get("code") == http.HTTPStatus.GONE)
        if kind in ("ADDED", "MODIFIED", "DELETED"):
            key = _key(thing)
            if key is None:
                raise ValueError("a pod without uid and name")
            self._put(key, workloads_of(thing))
            if kind == "DELETED":
                # Put before: a container that lived only between two events has its name for a while, too.
                for container_id in self._ids.pop(key):
                    self._directory.remove(self.name, container_id)
        elif kind != "BOOKMARK":
            raise ValueError("an event of an unknown type")
        version = _mapping(thing.get("metadata")).get("resourceVersion")
        if isinstance(version, str) and version:
            self._version, self._moved = version, True

    def _put(self, key: str, found: dict[str, Workload]) -> None:
        for container_id, workload in found.items():
            self._directory.put(self.name, container_id, workload)
        for container_id in self._ids.get(key, frozenset()) - found.keys():
            self._directory.remove(self.name, container_id)
        self._ids[key] = frozenset(found)

    # --- the client -----------------------------------------------------------------------------------------------

    def _ask(self, client: Any, query: list[tuple[str, str]], silent_secs: float) -> Any:
        """The answer to a request, its body not yet read. _Refused when there is none, or none with 2xx."""
        from kubernetes.client.exceptions import ApiException  # type: ignore[import-untyped]
        from kubernetes.config.config_exception import ConfigException  # type: ignore[import-untyped]
        from urllib3.exceptions import HTTPError

        try:
            return client.call_api(
                _PATH,
                "GET",
                query_params=[("fieldSelector", self._selector), *query],
                header_params={"Accept": "application/json"},
                auth_settings=["BearerToken"],
                _preload_content=False,
                _request_timeout=(_CONNECT_SECS, silent_secs),
                _return_http_data_only=True,
            )
        except ApiException as error:
            verb = "watch" if ("watch", "true") in query else "list"
            raise self._refusal(error, verb) from error
        except (HTTPError, http.client.HTTPException, ConfigException, OSError, ValueError) as error:
            raise _Refused(f"cannot be reached ({_why(error)})") from error

    def _refusal(self, error: Any, verb: str) -> _Refused:
        """What an HTTP status, or TLS that does not come about, means."""
        status = error.status
        if not status:
            return _Refused(f"cannot be reached by TLS ({_text(str(error.reason).replace(chr(10), ': '))[:300]})")
        message = ""
        with contextlib.suppress(ValueError):
            said = _mapping(parsed(error.body or b"")).get("message")
            message = said if isinstance(said, str) else ""
        if status == http.HTTPStatus.UNAUTHORIZED:
            whose = f"the service account in {self._service_account}" if self._kubeconfig is None else self._kubeconfig
            return _Refused(f"refuses the credentials of {whose} (HTTP 401)")
        if status == http.HTTPStatus.FORBIDDEN:
            user = re.search(r'User "([^"]*)"', message)
            who = _text(user[1])[:300] if user else "this account"
            return _Refused(
                f"forbids {who} to {verb} pods (HTTP 403); bind it to a ClusterRole with the verbs list and watch on "
                f"the resource pods"
            )
        retry_after = str((error.headers or {}).get("Retry-After", ""))
        return _Refused(
            f"answers HTTP {status}{f' ({_text(message)[:300]})' if message else ''}",
            retry_after=min(RETRY_AFTER_SECS, float(retry_after)) if re.fullmatch(r"[0-9]{1,9}", retry_after) else 0.0,
            gone=status == http.HTTPStatus.GONE,
        )

    def _client(self) -> Any:
        """A client with today's credentials, whose connection ``close`` can break. _Refused."""
        from kubernetes.client.api_client import ApiClient  # type: ignore[import-untyped]

        try:
            client = ApiClient(self._configuration(plugins=True))
        except (UsageError, OSError, ValueError) as error:
            raise _Refused(f"is not asked, for {error}") from error
        client.user_agent = f"bindsnoop/{__version__}"
        manager = client.rest_client.pool_manager
        pools = manager.pool_classes_by_scheme
        manager.pool_classes_by_scheme = {scheme: self._kept(pool) for scheme, pool in pools.items()}
        return client

    def _kept(self, pool: Any) -> Any:
        """A class of connection pools that shows each new connection to ``_keep``."""
        below = pool.ConnectionCls

        def connected(connection: Any) -> socket.socket:
            line: socket.socket = below._new_conn(connection)
            self._keep(line)
            if self._stop.is_set():
                line.close()
                raise ConnectionAbortedError
            return line

        connections = type(below.__name__, (below,), {"_new_conn": connected})
        return type(pool.__name__, (pool,), {"ConnectionCls": connections})

    def _keep(self, line: socket.socket) -> None:
        # A duplicate: TLS takes the first one over, and leaves it useless for us.
        with self._lock:
            if self._line is not None:
                self._line.close()
            self._line = line.dup()

    def _hang_up(self) -> None:
        """End the connection under whoever reads from it."""
        with self._lock, contextlib.suppress(OSError):
            if self._line is not None:
                self._line.shutdown(socket.SHUT_RDWR)

    def _drop(self) -> None:
        with self._lock:
            if self._line is not None:
                self._line.close()
                self._line = None

    # --- credentials ----------------------------------------------------------------------------------------------

    def _configuration(self, *, plugins: bool) -> Any:
        """The client's configuration, read now and checked. UsageError. Only with ``plugins`` those of a file run."""
        from kubernetes.client.configuration import Configuration  # type: ignore[import-untyped]
        from kubernetes.config.config_exception import ConfigException

        # It keeps no default: without an address it would speak to localhost.
        configuration = Configuration(host="")
        try:
            if self._kubeconfig is None:
                self._from_service_account(configuration)
            else:
                _from_kubeconfig(configuration, self._kubeconfig, plugins)
            _check(configuration)
        except (ConfigException, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            # The client meets what it does not expect in a file with any of the last three.
            why = _text(str(error) or type(error).__name__)[:300]
            if self._kubeconfig is not None:
                raise UsageError(f"the kubeconfig {self._kubeconfig} cannot be used: {why}") from error
            raise UsageError(
                f"the service account of this pod, {self._service_account}, cannot be used: {why.rstrip('.')}; outside "
                f"of a pod name a kubeconfig"
            ) from error
        if "authorization" in configuration.api_key:
            configuration.api_key["authorization"] = configuration.api_key["authorization"].strip()
        configuration.refresh_api_key_hook = None
        configuration.retries = False
        configuration.connection_pool_maxsize = 1
        return configuration

    def _from_service_account(self, configuration: Any) -> None:
        from kubernetes.config.incluster_config import InClusterConfigLoader  # type: ignore[import-untyped]

        InClusterConfigLoader(
            token_filename=str(self._service_account / "token"), cert_filename=str(self._service_account / "ca.crt")
        ).load_and_set(configuration)
        # The address is the cluster's own; a proxy for the world outside does not lead there.
        configuration.proxy = None


def _from_kubeconfig(configuration: Any, path: Path, plugins: bool) -> None:
    import yaml
    from kubernetes.config.config_exception import ConfigException
    from kubernetes.config.kube_config import KubeConfigLoader  # type: ignore[import-untyped]

    try:
        wanted = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"it is no YAML ({' '.join(str(error).split())})") from error
    if not isinstance(wanted, dict):
        raise TypeError("it is no kubeconfig")
    if not plugins:
        for user in _mappings(wanted.get("users")):
            for plugin in ("exec", "auth-provider"):
                _mapping(user.get("user")).pop(plugin, None)
    with _said_by_client() as said:
        KubeConfigLoader(wanted, config_base_path=str(path.absolute().parent)).load_and_set(configuration)
    if said:
        raise ConfigException(said[-1])

    parts = urllib.parse.urlsplit(configuration.host)
    proxies = urllib.request.getproxies()
    direct = parts.hostname is None or urllib.request.proxy_bypass(parts.hostname, proxies)
    configuration.proxy = None if direct else proxies.get(parts.scheme)
    configuration.no_proxy = proxies.get("no")


@contextlib.contextmanager
def _said_by_client() -> Iterator[list[str]]:
    """What the client logs in here, instead of an exception, when a plug-in for credentials fails."""
    said: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.name == "root":
                said.append(record.getMessage())

    kept = Kept(logging.ERROR)
    logging.root.addHandler(kept)
    try:
        yield said
    finally:
        logging.root.removeHandler(kept)


def _check(configuration: Any) -> None:
    """OSError or ValueError, which the client would raise at every request."""
    parts = urllib.parse.urlsplit(configuration.host)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ValueError(f"the server's address is {configuration.host!r}; allowed is http(s)://HOST[:PORT]")
    if parts.scheme == "https":
        trust = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if configuration.ssl_ca_cert:
            trust.load_verify_locations(configuration.ssl_ca_cert)
        if configuration.cert_file:
            # With a password, however wrong, nobody is asked for one on the terminal.
            trust.load_cert_chain(configuration.cert_file, configuration.key_file, password="")
        if not configuration.verify_ssl:
            import urllib3

            urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)


# --- JSON ---------------------------------------------------------------------------------------------------------


def parsed(raw: bytes | bytearray) -> Any:
    """JSON without what nobody reads here. ValueError when it is none.

    An object that holds no others stays whole, for labels have keys of their own; the others lose keys that are not in
    ``_KEYS``.
    """
    try:
        return json.loads(raw, object_pairs_hook=_needed)
    except RecursionError as error:
        raise ValueError("too deep") from error


def _needed(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if not any(isinstance(value, dict | list) for _, value in pairs):
        return dict(pairs)
    return {key: value for key, value in pairs if key in _KEYS}


def workloads_of(pod: Any) -> dict[str, Workload]:
    """Names by container id of every container that the status of a pod mentions, also of those that have ended.

    ``pod`` is JSON of any shape; what is missing, null or of another type is passed over.
    """
    metadata, spec, status = (_mapping(_mapping(pod).get(part)) for part in ("metadata", "spec", "status"))
    labels = _mapping(metadata.get("labels"))
    pairs = tuple(sorted((_text(key), _text(value)) for key, value in labels.items() if isinstance(value, str)))
    whose: dict[str, Any] = {
        "namespace": _given(metadata, "namespace"),
        "pod": _given(metadata, "name"),
        "labels": pairs,
    }
    found: dict[str, Workload] = {}
    for kind in _KINDS:
        wanted = _mappings(spec.get(_camel(kind, "containers")))
        images = {_given(one, "name"): _given(one, "image") for one in wanted}
        for one in _mappings(status.get(_camel(kind, "containerStatuses"))):
            container = _given(one, "name")
            if container is not None:
                image = images.get(container) or _given(one, "image")
                found |= dict.fromkeys(_ids(one), Workload(container, image, **whose))
    return found


def _given(mapping: dict[str, Any], key: str) -> str | None:
    """A text that is there and not empty, printable."""
    value = mapping.get(key)
    return _text(value) if isinstance(value, str) and value else None


def _ids(status: dict[str, Any]) -> Iterator[str]:
    """Container ids in the status of one container: of the present one, and of the one before it."""
    states = (_mapping(status.get(when)) for when in ("state", "lastState"))
    for place in (status, *(_mapping(state.get("terminated")) for state in states)):
        given = place.get("containerID")
        match = _ID.fullmatch(given) if isinstance(given, str) else None
        if match:
            yield match[1]


def _camel(kind: str, word: str) -> str:
    return kind + word[0].upper() + word[1:] if kind else word


def _key(pod: dict[str, Any]) -> str | None:
    """What a pod is known by as long as it lives; None when it has neither uid nor name."""
    metadata = _mapping(pod.get("metadata"))
    uid, name = metadata.get("uid"), metadata.get("name")
    if isinstance(uid, str) and uid:
        return uid
    return f"{metadata.get('namespace')}/{name}" if isinstance(name, str) and name else None


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _mappings(value: Any) -> list[dict[str, Any]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def _text(value: str) -> str:
    try:
        return printable(value.encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError:
        # JSON can name halves of a pair that no byte stands for.
        return printable(value.encode("utf-8", "surrogatepass"))


# --- bytes --------------------------------------------------------------------------------------------------------


def _pieces(answer: Any) -> Iterator[bytes]:
    """The body of an answer, as it comes. _Broken when it ends before its end."""
    from urllib3.exceptions import HTTPError

    try:
        while piece := answer.read1(1 << 16):
            yield piece
    except (HTTPError, http.client.HTTPException, OSError) as error:
        raise _Broken(relist=False) from error


def _lines(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Whole lines without their ends; what stands behind the last one is dropped. _Broken when one is too long."""
    begun: list[bytes] = []
    size = 0
    for piece in pieces:
        *whole, rest = piece.split(b"\n")
        for end in whole:
            line = b"".join([*begun, end])
            begun, size = [], 0
            if line:
                yield line
        begun.append(rest)
        size += len(rest)
        if size > LINE_BYTES:
            raise _Broken(relist=True)


def _why(error: BaseException) -> str:
    """The system's word for what went wrong, where there is one below the client's."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return _text(cause.strerror)[:300]
        below = cause.args[-1] if cause.args and isinstance(cause.args[-1], BaseException) else None
        cause = cause.__cause__ or below
    return _text(str(error) or type(error).__name__)[:300]
