"""A cluster leaves this host as it was: its sysctls, mounts, control groups, links, and folders."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests import commands
from tests.cluster import host, servers

ROOT = Path(__file__).parent.parent.parent.parent

# What the kernel counts, or makes up anew whenever it is read.
_MOVES = re.compile(
    r"fs/(dentry-state|file-nr|inode-nr|inode-state|quota/|aio-nr|epoll)|kernel/(random/|ns_last_pid|pty/nr|perf_event_max_s)"
    r"|net/netfilter/nf_conntrack_count|net/ipv[46]/(conf|neigh)/(veth|br|cali|cni)"
)


def sysctls() -> dict[str, bytes]:
    """All that can be read below /proc/sys, but for what moves by itself."""
    found = {}
    for folder, _, files in os.walk("/proc/sys"):
        for name in files:
            path = f"{folder}/{name}".removeprefix("/proc/sys/")
            if not _MOVES.match(path):
                try:
                    found[path] = Path("/proc/sys", path).read_bytes()
                except OSError:
                    continue
    return found


def said(*command: str) -> list[str]:
    """Lines of what a command prints."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def state() -> dict[str, Any]:
    """Everything outside that a node could leave behind. Neighbours may come and go, so theirs is not looked at."""
    return {
        "mounts": sorted(line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()),
        "groups": [
            str(path)
            for root in host.hierarchies()
            for name in (f"{servers.CGROUP}*", "kubepods*")
            for path in root.glob(name)
        ],
        "links": said("ip", "-brief", "address"),
        "routes": said("ip", "route"),
        "namespaces": said("ip", "netns", "list"),
        "folders": {
            folder: sorted(path.name for path in Path(folder).iterdir()) if Path(folder).exists() else None
            for folder in ("/etc/cni", "/etc/kubernetes", "/opt/cni", "/run/flannel", *servers.OWN_FOLDERS)
        },
        "temporary": sorted(path.name for path in Path(tempfile.gettempdir()).glob("bindsnoop-cluster-*")),
    }


def changed(before: dict[str, Any], after: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What is not as it was: before and after, by name."""
    names = before.keys() | after.keys()
    return {name: (before.get(name), after.get(name)) for name in names if before.get(name) != after.get(name)}


def run(*command: str) -> subprocess.Popen[str]:
    """A cluster around a command."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.cluster", "run", "--", *command], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )


def test_a_cluster_leaves_nothing_behind() -> None:
    """A command has had a pod with a volume and an address of its own, and everything is as before."""
    before, numbers = state(), sysctls()

    pod = "kubectl run p --image=busybox --image-pull-policy=Never -- sleep inf >&2; "
    pod += "kubectl wait --for=condition=Ready pod/p; kubectl get nodes -o name; exit 7"
    with run("sh", "-c", pod) as cluster:
        output, _ = cluster.communicate(timeout=100)

    assert (7, f"pod/p condition met\nnode/{servers.NODE}\n") == (cluster.returncode, output)
    assert {} == changed(numbers, sysctls())
    assert {} == changed(before, state())


def test_what_a_killed_run_leaves_is_removed_by_the_next() -> None:
    """SIGKILL ends every process and mount of the node at once; groups, bridge and folders go with the next run."""
    before = state()
    with run("sh", "-c", "echo $KUBECONFIG; exec sleep 100") as killed:
        assert killed.stdout
        config = Path(killed.stdout.readline().strip())
        members = [Path(root, servers.CGROUP, "programs/cgroup.procs") for root in host.hierarchies()]
        alive = [group.read_text().split() for group in members]
        children = said("ps", "-o", "pid=,comm=", "--ppid", str(killed.pid))
        killed.kill()
        killed.wait()
    try:
        commands.until(lambda: not any(group.read_text().split() for group in members), 30)
    finally:
        # The command itself is nobody's to end but its user's.
        (command,) = (int(pid) for pid, name in map(str.split, children) if name == "sleep")
        os.kill(command, signal.SIGKILL)

    with run("true") as after:
        after.communicate(timeout=100)

    assert all(alive)
    assert (0, False, {}) == (after.returncode, config.exists(), changed(before, state()))


def test_a_command_runs_with_an_api_server() -> None:
    """``KUBECONFIG`` and kubectl are its own, and the exit code is the command's."""
    command = [sys.executable, "-m", "tests.cluster", "run", "--api-only", "--", "sh", "-c"]
    line = "kubectl get namespace default -o name; kubectl get nodes -o name; exit 7"
    done = subprocess.run([*command, line], cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)

    assert (7, "namespace/default\n") == (done.returncode, done.stdout)
