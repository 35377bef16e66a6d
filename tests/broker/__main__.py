"""Start real servers around a command, or fetch all of them beforehand.

``python -m tests.broker fetch`` fills the cache. ``python -m tests.broker run [--registry] [--full] -- COMMAND…``
starts Kafka (and a registry), runs COMMAND with ``BOOTSTRAP`` (and ``REGISTRY``) in its environment, stops them, and
ends with the command's exit code.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys

from tests.broker.servers import PROGRAMS, ServerFailed, fetched, kafka, registry


def main(arguments: list[str]) -> int:
    """Run one of the two sub-commands; 2 when a server cannot be fetched or started."""
    parser = argparse.ArgumentParser(prog="python -m tests.broker", description="Real Kafka and registry for tests.")
    commands = parser.add_subparsers(dest="what", required=True)
    commands.add_parser("fetch", help="fetch everything into the cache")
    run = commands.add_parser("run", help="start servers, run a command with BOOTSTRAP and REGISTRY set, stop them")
    run.add_argument("--registry", action="store_true", help="start a schema registry too")
    run.add_argument("--full", action="store_true", help="512 MiB and the full compiler, for benchmarks")
    run.add_argument("command", nargs=argparse.REMAINDER, help="-- COMMAND and its arguments")
    options = parser.parse_args(arguments)
    if options.what == "run":
        options.command = options.command[1:] if options.command[:1] == ["--"] else options.command
        if not options.command:
            parser.error("run needs a command after --")
    # Without this a SIGTERM would end Python before the servers are stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return _fetch() if options.what == "fetch" else _run(options)
    except ServerFailed as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _fetch() -> int:
    for name in PROGRAMS:
        print(fetched(name))
    return 0


def _run(options: argparse.Namespace) -> int:
    environment = dict(os.environ)
    with contextlib.ExitStack() as stack:
        node = stack.enter_context(kafka(heap="512m" if options.full else "256m", jit_full=options.full))
        environment["BOOTSTRAP"] = node.bootstrap
        if options.registry:
            environment["REGISTRY"] = stack.enter_context(registry()).url
        with subprocess.Popen(options.command, env=environment) as child:
            try:
                return child.wait()
            except BaseException:
                child.terminate()
                raise


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
