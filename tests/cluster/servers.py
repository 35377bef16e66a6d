"""A real Kubernetes on this host: nothing comes in, an API server or a whole node comes out, ready to serve.

``api_server()`` is etcd and kube-apiserver: enough for whoever lists and watches. ``cluster()`` adds the scheduler, the
controllers, containerd and a kubelet, which is one node where pods run. Servers listen on 127.0.0.1, and the kubelet on
a bridge that is made for it.

The node's programs live in namespaces of processes and mounts of their own (``host``), so that this system's mounts,
sysctls and processes stay as they are whatever happens to the tests. What is outside is named: the bridge ``BRIDGE``,
the control groups ``CGROUP``, a few empty folders, and a folder for temporary files. All of it is removed at the end,
and what a killed run left is removed by the next.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import ssl
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.broker import free_ports
from tests.cluster import host, images
from tests.cluster.build import Programs, programs
from tests.cluster.cache import ClusterFailed, cache, done
from tests.cluster.host import Process, serving, succeeds, until
from tests.kernel.guests import needs

NODE = "minikube"
BRIDGE = "bindsnoop0"
CGROUP = "bindsnoop-cluster"
NETWORK = "198.18.42"
"""First three numbers of the pods' network, of the range that is set aside for testing devices; the node is .1."""

_SERVICES = "198.18.43.0/24"

# Where the node's programs write without asking.
OWN_FOLDERS = (
    "/run/containerd",
    "/run/netns",
    "/var/lib/bindsnoop",
    "/var/lib/cni",
    "/var/lib/kubelet",
    "/var/log/containers",
    "/var/log/pods",
)

# What a kubelet wants of the machine, and sets where it is otherwise.
_SYSCTLS = {
    "kernel/keys/root_maxbytes": "25000000",
    "kernel/keys/root_maxkeys": "1000000",
    "kernel/panic": "10",
    "kernel/panic_on_oops": "1",
    "vm/overcommit_memory": "1",
    "vm/panic_on_oom": "0",
}


# --- etcd and the API server --------------------------------------------------------------------------------------


def _asked(url: str, token: str = "") -> bytes:
    """What a server answers with status 200. OSError when it does not.

    Its certificate is its own, made when it started; it listens on 127.0.0.1.
    """
    trusting = ssl.create_default_context()
    trusting.check_hostname = False
    trusting.verify_mode = ssl.CERT_NONE
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=trusting))
    with opener.open(request, timeout=5) as answer:
        return bytes(answer.read())


def _answers(url: str, token: str = "") -> bool:
    try:
        _asked(url, token)
    except OSError:
        return False
    return True


@dataclass
class Etcd:
    """A running etcd; ``url`` is its clients' address."""

    url: str
    process: Process
    etcdctl: Path

    def compact(self) -> int:
        """Forget all revisions before the present one, and say which that is."""
        environment = {**os.environ, "ETCDCTL_API": "3"}
        client = [str(self.etcdctl), f"--endpoints={self.url}"]
        status = done([*client, "endpoint", "status", "-w=json"], "etcd does not tell its revision", env=environment)
        revision = int(json.loads(status)[0]["Status"]["header"]["revision"])
        done([*client, "compact", str(revision)], f"etcd cannot compact to {revision}", env=environment)
        return revision


@contextlib.contextmanager
def etcd(folder: Path | None = None) -> Iterator[Etcd]:
    """A fresh etcd; stopped and its data removed at the end. ClusterFailed when it does not start."""
    with _folder(folder) as place:
        found = programs()
        client, peer = free_ports(2)
        url = f"http://127.0.0.1:{client}"
        command = [
            str(found.deb("usr/bin/etcd")), "--name=only", f"--data-dir={place / 'etcd'}",
            f"--listen-client-urls={url}", f"--advertise-client-urls={url}",
            f"--listen-peer-urls=http://127.0.0.1:{peer}", f"--initial-advertise-peer-urls=http://127.0.0.1:{peer}",
            f"--initial-cluster=only=http://127.0.0.1:{peer}",
        ]  # fmt: skip
        process = Process("etcd", command, place / "etcd.log", lambda: _answers(f"{url}/health"))
        with serving(process):
            yield Etcd(url, process, found.deb("usr/bin/etcdctl"))


@dataclass
class ApiServer:
    """A running API server. ``kubeconfig`` is that of an administrator; ``url`` its address on 127.0.0.1.

    ``folder`` holds logs and credentials, for root alone.
    """

    url: str
    port: int
    kubeconfig: Path
    folder: Path
    etcd: Etcd
    process: Process
    programs: Programs
    tokens: dict[str, str] = field(repr=False)

    def stop(self) -> None:
        """Stop; everything that it knows stays in etcd."""
        self.process.stop()

    def start(self) -> None:
        """Start again at the same address."""
        self.process.start()

    def compact(self) -> None:
        """Restart without a past: a watch from any revision before now is told 410 Gone.

        Without the restart the API server would replay what it remembers itself.
        """
        self.stop()
        self.etcd.compact()
        self.start()

    def command(self, *words: str) -> list[str]:
        """The command line of kubectl for an administrator."""
        return [str(self.programs.kube("kubectl")), f"--kubeconfig={self.kubeconfig}", *words]

    def kubectl(self, *words: str, given: str | None = None, timeout: float = 60.0) -> str:
        """What kubectl prints. ClusterFailed with what it complains about."""
        return done(
            self.command(*words),
            f"kubectl {' '.join(words)}",
            given=None if given is None else given.encode(),
            timeout=timeout,
        )

    def get(self, *words: str) -> Any:
        """``kubectl get … -o json``, parsed."""
        return json.loads(self.kubectl("get", *words, "-o", "json"))

    def read(self, path: str) -> Any:
        """What the API server answers an administrator's GET of this path, parsed; a start of kubectl is saved.

        ClusterFailed when there is no such thing.
        """
        try:
            return json.loads(_asked(f"{self.url}{path}", self.tokens["admin"]))
        except OSError as error:
            raise ClusterFailed(f"the API server does not answer {path}: {error}") from error

    def knows(self, path: str) -> bool:
        """Whether the API server has something at this path."""
        return _answers(f"{self.url}{path}", self.tokens["admin"])

    def config_for(self, name: str, token: str) -> Path:
        """A kubeconfig for the bearer of a token, at ``<folder>/<name>.kubeconfig``."""
        # The API server's certificate is followed by that of the authority which it made for itself.
        trusted = str(self.folder / "apiserver/apiserver.crt")
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": name}}],
            "clusters": [{"name": "test", "cluster": {"server": self.url, "certificate-authority": trusted}}],
            "users": [{"name": name, "user": {"token": token}}],
        }
        path = self.folder / f"{name}.kubeconfig"
        path.touch(mode=0o600)
        path.write_text(json.dumps(config), encoding="utf-8")
        return path


# By name: the user and its group.
_USERS = {
    "admin": ("admin", "system:masters"),
    "kubelet": (f"system:node:{NODE}", "system:nodes"),
    "scheduler": ("system:kube-scheduler", ""),
    "controllers": ("system:kube-controller-manager", ""),
}


@contextlib.contextmanager
def api_server(folder: Path | None = None, *, service_accounts: bool = False) -> Iterator[ApiServer]:
    """A fresh etcd and kube-apiserver with RBAC; stopped and their data removed at the end. ClusterFailed.

    Without ``service_accounts`` a pod may be made in a namespace where nobody makes an account for it.
    """
    needs("openssl", "openssl")
    with _folder(folder) as place, etcd(place) as store:
        found = programs()
        (port,) = free_ports(1)
        tokens = {name: secrets.token_hex(16) for name in _USERS}
        rows = [f'{tokens[name]},{user},{name},"{group}"\n' for name, (user, group) in _USERS.items()]
        (place / "tokens.csv").write_text("".join(rows), encoding="ascii")
        done(["openssl", "genrsa", "-out", place / "accounts.key", "2048"], "openssl cannot make a key")
        # The API server is the one client that the kubelet knows, by this certificate itself.
        subject = ["-subj", "/O=system:masters/CN=kube-apiserver-kubelet-client"]
        done(
            [
                "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject,
                "-keyout", place / "kubelet-client.key", "-out", place / "kubelet-client.crt",
            ],
            "openssl cannot make a certificate",
        )  # fmt: skip
        url = f"https://127.0.0.1:{port}"
        command = [
            str(found.kube("kube-apiserver")),
            f"--etcd-servers={store.url}",
            "--bind-address=127.0.0.1",
            "--advertise-address=127.0.0.1",
            f"--secure-port={port}",
            f"--cert-dir={place / 'apiserver'}",
            f"--token-auth-file={place / 'tokens.csv'}",
            "--authorization-mode=Node,RBAC",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={place / 'accounts.key'}",
            f"--service-account-signing-key-file={place / 'accounts.key'}",
            f"--service-cluster-ip-range={_SERVICES}",
            "--endpoint-reconciler-type=none",
            "--allow-privileged=true",
            "--kubelet-preferred-address-types=InternalIP",
            f"--kubelet-client-certificate={place / 'kubelet-client.crt'}",
            f"--kubelet-client-key={place / 'kubelet-client.key'}",
        ]
        if not service_accounts:
            command.append("--disable-admission-plugins=ServiceAccount")
        log = place / "kube-apiserver.log"
        # It would wait a minute for a watch that somebody has open.
        process = Process(
            "kube-apiserver", command, log, lambda: _answers(f"{url}/readyz", tokens["admin"]), patience_secs=2.0
        )  # fmt: skip
        with serving(process):
            server = ApiServer(url, port, place / "admin.kubeconfig", place, store, process, found, tokens)
            server.config_for("admin", tokens["admin"])
            yield server


@contextlib.contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    if given:
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="bindsnoop-api-", ignore_cleanup_errors=True) as temporary:
        yield Path(temporary)


# --- a node -------------------------------------------------------------------------------------------------------


@dataclass
class Cluster:
    """A running Kubernetes of one node, ``NODE``. ``manifests`` is where the kubelet looks for static pods."""

    api: ApiServer
    manifests: Path
    socket: Path

    def load(self, archive: Path) -> None:
        """Give the node an image, from an archive as ``docker save`` writes it."""
        snapshotter = _snapshotter(self.socket.parent)
        command = self.ctr("--namespace", "k8s.io", "images", "import", "--snapshotter", snapshotter, str(archive))
        done(command, f"containerd cannot take {archive}")

    def ctr(self, *words: str) -> list[str]:
        """The command line of containerd's own client."""
        return [str(self.api.programs.deb("usr/bin/ctr")), "--address", str(self.socket), *words]

    def ready(self, pod: str, namespace: str = "default", seconds: float = 60.0) -> Any:
        """Wait until a pod is ready, and give it as the API server describes it."""
        wait = ["wait", "--for=condition=Ready", f"pod/{pod}", "-n", namespace, f"--timeout={seconds:g}s"]
        self.api.kubectl(*wait, timeout=seconds + 10)
        return self.api.get("pod", pod, "-n", namespace)

    def logs(self) -> str:
        """The end of every server's log, for a test that failed."""
        texts = ((path, path.read_text(errors="replace")) for path in sorted(self.api.folder.glob("*.log")))
        return "\n".join(f"=== {path.name}\n{text[-3000:]}" for path, text in texts)


@contextlib.contextmanager
def cluster() -> Iterator[Cluster]:
    """A fresh Kubernetes of one node, whose node is ready; removed as a whole at the end. ClusterFailed.

    One at a time on a host: a second one waits.
    """
    if os.geteuid() != 0:
        raise ClusterFailed("a cluster needs namespaces, control groups and a bridge: run this as root")
    for program, package in (("unshare", "util-linux"), ("mount", "mount"), ("ip", "iproute2")):
        needs(program, package)
    programs()
    with (cache() / ".running.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with (
            host.temporary("bindsnoop-cluster-") as place,
            _bridge(),
            api_server(place, service_accounts=True) as api,
            _controllers(api),
            _node(api) as node,
        ):
            yield node


@contextlib.contextmanager
def _controllers(api: ApiServer) -> Iterator[None]:
    """The scheduler and the controllers, which are ready when the node is."""
    scheduler, controllers = free_ports(2)
    shared = ["--leader-elect=false", "--bind-address=127.0.0.1"]
    commands = {
        "kube-scheduler": [
            f"--kubeconfig={api.config_for('scheduler', api.tokens['scheduler'])}",
            f"--secure-port={scheduler}",
            "--authentication-tolerate-lookup-failure=true",
        ],
        "kube-controller-manager": [
            f"--kubeconfig={api.config_for('controllers', api.tokens['controllers'])}",
            f"--secure-port={controllers}",
            f"--cert-dir={api.folder / 'controllers'}",
            f"--root-ca-file={api.folder / 'apiserver/apiserver.crt'}",
            f"--service-account-private-key-file={api.folder / 'accounts.key'}",
            # Each controller has the rights that Kubernetes gives it, and no more.
            "--use-service-account-credentials=true",
        ],
    }
    with contextlib.ExitStack() as stack:
        for name, options in commands.items():
            command = [str(api.programs.kube(name)), *shared, *options]
            process = Process(name, command, api.folder / f"{name}.log", lambda: True)
            stack.callback(process.stop)
            process.begin()
        yield


@contextlib.contextmanager
def _node(api: ApiServer) -> Iterator[Cluster]:
    folder = api.folder
    node = Cluster(api, folder / "manifests", folder / "containerd.sock")
    node.manifests.mkdir()
    _write_containerd(node)
    _write_kubelet(node)
    with host.processes(folder, CGROUP, OWN_FOLDERS, _SYSCTLS) as start:
        path = ":".join(str(api.programs.deb(name)) for name in ("usr/bin", "usr/sbin"))
        environment = ["env", f"PATH={path}:{os.environ['PATH']}"]
        containerd = [str(api.programs.deb("usr/bin/containerd")), "--config", str(folder / "containerd.toml")]
        start([*environment, *containerd], folder / "containerd.log")
        until(lambda: succeeds(node.ctr("--connect-timeout=1s", "version")), "containerd", folder / "containerd.log")
        for archive in (images.pause(), images.busybox()):
            node.load(archive)
        kubelet = [
            str(api.programs.kube("kubelet")),
            f"--config={folder / 'kubelet.json'}",
            f"--kubeconfig={api.config_for('kubelet', api.tokens['kubelet'])}",
            f"--root-dir={folder / 'kubelet'}",
            f"--cert-dir={folder / 'kubelet-certificates'}",
            f"--hostname-override={NODE}",
            f"--node-ip={NETWORK}.1",
        ]
        start([*environment, *kubelet], folder / "kubelet.log")
        until(lambda: _node_ready(api), "the node", folder / "kubelet.log")
        # Pods may be made when their account is there.
        account = "/api/v1/namespaces/default/serviceaccounts/default"
        until(lambda: api.knows(account), "the controllers", folder / "kube-controller-manager.log")
        yield node


def _node_ready(api: ApiServer) -> bool:
    path = f"/api/v1/nodes/{NODE}"
    if not api.knows(path):
        return False
    described = api.read(path)
    conditions = {one["type"]: one["status"] for one in described["status"].get("conditions", [])}
    return conditions.get("Ready") == "True" and not described["spec"].get("taints")


def _write_containerd(node: Cluster) -> None:
    folder = node.api.folder
    network = folder / "cni"
    network.mkdir()
    # Pods reach one another and the node. Nothing routes for them, so the host's forwarding stays as it is.
    addresses = {"type": "host-local", "ranges": [[{"subnet": f"{NETWORK}.0/24", "rangeStart": f"{NETWORK}.10"}]]}
    bridge = {"type": "bridge", "bridge": BRIDGE, "isGateway": False, "ipMasq": False, "ipam": addresses}
    plugins = {"cniVersion": "0.4.0", "name": "pods", "plugins": [bridge]}
    (network / "10-pods.conflist").write_text(json.dumps(plugins), encoding="ascii")
    runtime = 'plugins."io.containerd.grpc.v1.cri".containerd'
    (folder / "containerd.toml").write_text(
        f"""
version = 2
root = "{folder}/containerd"
state = "{folder}/containerd-state"
disabled_plugins = ["io.containerd.internal.v1.opt"]
[grpc]
address = "{node.socket}"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{images.PAUSE}"
restrict_oom_score_adj = true
disable_apparmor = true
disable_tcp_service = true
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{node.api.programs.deb("usr/lib/cni")}"
conf_dir = "{network}"
[{runtime}]
snapshotter = "{_snapshotter(folder)}"
[{runtime}.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[{runtime}.runtimes.runc.options]
BinaryName = "{node.api.programs.deb("usr/sbin/runc")}"
SystemdCgroup = false
""",
        encoding="utf-8",
    )


def _snapshotter(folder: Path) -> str:
    """Layers lie over one another, unless the folder lies in such layers itself, where that does not work."""
    kind = done(["stat", "-f", "-c", "%T", folder], f"{folder} has no file system")
    return "native" if kind.strip() in {"overlayfs", "aufs"} else "overlayfs"


def _write_kubelet(node: Cluster) -> None:
    folder = node.api.folder
    port, health = free_ports(2)
    config = {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": f"{NETWORK}.1",
        "port": port,
        "healthzBindAddress": "127.0.0.1",
        "healthzPort": health,
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": str(folder / "kubelet-client.crt")},
        },
        "authorization": {"mode": "Webhook"},
        "containerRuntimeEndpoint": f"unix://{node.socket}",
        "staticPodPath": str(node.manifests),
        "podLogsDir": "/var/log/pods",
        "volumePluginDir": str(folder / "volume-plugins"),
        "cgroupRoot": f"/{CGROUP}",
        "cgroupDriver": "cgroupfs",
        "failCgroupV1": False,
        # A machine that is a container or a small virtual one itself: what cannot be set is not fatal.
        "featureGates": {"KubeletInUserNamespace": True},
        "localStorageCapacityIsolation": False,
        "enforceNodeAllocatable": [],
        "failSwapOn": False,
        "makeIPTablesUtilChains": False,
        "fileCheckFrequency": "1s",
        "syncFrequency": "5s",
        # The disk of a machine that runs tests may be rather full.
        "evictionHard": {},
        "imageGCHighThresholdPercent": 100,
        "registerNode": True,
        "resolvConf": "",
    }
    (folder / "kubelet.json").write_text(json.dumps(config), encoding="utf-8")


# --- what lies outside the namespaces -----------------------------------------------------------------------------


@contextlib.contextmanager
def _bridge() -> Iterator[None]:
    """The bridge of the pods, with the node's address."""

    def remove() -> None:
        if Path(f"/sys/class/net/{BRIDGE}").exists():
            done(["ip", "link", "delete", BRIDGE], f"the bridge {BRIDGE} cannot be removed")

    remove()
    try:
        done(["ip", "link", "add", BRIDGE, "type", "bridge"], f"the bridge {BRIDGE} cannot be made")
        done(["ip", "address", "add", f"{NETWORK}.1/24", "dev", BRIDGE], f"{BRIDGE} cannot have {NETWORK}.1")
        done(["ip", "link", "set", BRIDGE, "up"], f"the bridge {BRIDGE} cannot be used")
        yield
    finally:
        remove()
