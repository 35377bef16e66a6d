"""Start a real Kubernetes around a command, or make beforehand all that it needs.

``python -m tests.cluster fetch`` fills the cache. ``python -m tests.cluster run [--api-only] -- COMMAND…`` starts a
cluster, runs COMMAND with ``KUBECONFIG`` in its environment and kubectl on its path, stops the cluster, and ends with
the command's exit code. ``python -m tests.cluster lock`` renews the sources of Kubernetes that are pinned.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys

from tests.cluster import build, images, servers
from tests.cluster.cache import ClusterFailed, say
from tests.kernel.guests import GuestFailed


def main(arguments: list[str]) -> int:
    """Run one of the sub-commands; 2 when something cannot be made or started."""
    parser = argparse.ArgumentParser(prog="python -m tests.cluster", description="A real Kubernetes of one node.")
    commands = parser.add_subparsers(dest="what", required=True)
    commands.add_parser("fetch", help="fetch and build everything into the cache")
    commands.add_parser("lock", help=f"pin the sources of Kubernetes {build.VERSION} anew")
    run = commands.add_parser("run", help="start a cluster, run a command with KUBECONFIG set, stop the cluster")
    run.add_argument("--api-only", action="store_true", help="etcd and the API server, and no node")
    run.add_argument("command", nargs=argparse.REMAINDER, help="-- COMMAND and its arguments")
    options = parser.parse_args(arguments)
    if options.what == "run":
        options.command = options.command[1:] if options.command[:1] == ["--"] else options.command
        if not options.command:
            parser.error("run needs a command after --")
    # Without this a SIGTERM would end Python before the servers are stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        if options.what == "run":
            return _run(options)
        if options.what == "lock":
            build.lock()
        else:
            print(*build.programs(), images.busybox(), images.pause(), images.agent(), sep="\n")
    except (ClusterFailed, GuestFailed) as error:
        say(str(error))
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _run(options: argparse.Namespace) -> int:
    with contextlib.ExitStack() as stack:
        if options.api_only:
            api = stack.enter_context(servers.api_server())
        else:
            api = stack.enter_context(servers.cluster()).api
        path = f"{api.programs.kubernetes}:{os.environ['PATH']}"
        environment = {**os.environ, "KUBECONFIG": str(api.kubeconfig), "PATH": path}
        with subprocess.Popen(options.command, env=environment) as child:
            try:
                return child.wait()
            except BaseException:
                child.terminate()
                raise


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
