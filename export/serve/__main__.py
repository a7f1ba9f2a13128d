"""``python -m export.serve BUNDLE --replicas N``: serve a bundle over HTTP with Ray Serve, without a page.

By default a cluster is started on this machine and ends with the command, on Ctrl-C or SIGTERM. With ``--address`` the
bundle is deployed in a cluster that runs already, and the command ends while the cluster goes on: run it again with
another bundle and that takes the first one's place, replica after replica, with no failed request; ``--remove`` ends it.

What is asked and answered (`export.serve.requests` has all of it):

    curl -d '{"pair": ["Coast redwoods are tall.", "The tallest trees are redwoods."]}' http://127.0.0.1:8000/v1/classify

Needs Ray Serve, and neither torch nor transformers.
"""

import argparse
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from export.bundle.folder import load_bundle
from export.runtime.trial import try_bundle
from export.serve.config import DEFAULT_HTTP_PORT, ServingConfig
from export.serve.ports import PORT_FLAGS, PortFlags
from export.serve.service import Service
from train.common.console import Parser, run_main, say
from train.common.errors import UsageError


@dataclass(frozen=True)
class ServeConfig:
    """The flags of ``python -m export.serve``.

    Attributes:
        bundle: folder that `python -m export` wrote; None with ``remove``.
        precision: of its graph; None for the fastest.
        remove: whether to end what is served at ``serving.address``.
        serving: how.
    """

    bundle: Path | None
    precision: str | None
    remove: bool
    serving: ServingConfig


def add_serving_flags(
    parser: "argparse.ArgumentParser | argparse._ArgumentGroup", flags: PortFlags = PORT_FLAGS
) -> None:
    """Add the flags that make a `ServingConfig`.

    Args:
        flags: what those for host and port are called.
    """
    defaults = ServingConfig()
    parser.add_argument(
        "--replicas", type=int, default=1, metavar="N", help="processes that hold the bundle (default: 1)"
    )
    parser.add_argument(
        "--max-replicas", type=int, metavar="M", help="add more under load, up to this many (default: none)"
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        default=defaults.batch_size,
        help="requests that a replica answers together, and texts in one run of the graph (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-wait-ms",
        type=float,
        default=defaults.batch_wait_ms,
        help="how long a request waits for others to join it, at most (default: %(default)s)",
    )
    parser.add_argument(
        "--queue-size",
        type=int,
        default=defaults.queue_size,
        help="requests that may wait for a replica; who comes then gets 429 (default: %(default)s)",
    )
    parser.add_argument(
        "--apis",
        type=int,
        default=defaults.apis,
        metavar="N",
        help="processes that take HTTP requests, each with a queue of its own (default: %(default)s)",
    )
    parser.add_argument("--threads", type=int, help="of each replica (default: the cores shared out)")
    parser.add_argument(
        flags.host, dest="http_host", default=defaults.host, help="address for HTTP (default: %(default)s)"
    )
    parser.add_argument(
        flags.port,
        dest="http_port",
        type=int,
        help=f"port for HTTP (default: the first free one from {DEFAULT_HTTP_PORT} on)",
    )
    parser.add_argument(
        "--address",
        metavar="HOST:PORT",
        help="of a running cluster, as `ray start --head` prints it (default: start one on this machine)",
    )


def serving_config(namespace: argparse.Namespace) -> ServingConfig:
    """What `add_serving_flags` added, taken out of parsed flags."""
    # Of the page, host and port are other ones.
    names = {field.name for field in fields(ServingConfig)} & set(vars(namespace)) - {"host", "port"}
    return ServingConfig(
        **{name: getattr(namespace, name) for name in names}, host=namespace.http_host, port=namespace.http_port
    )


def parse_config(argv: Sequence[str] | None) -> ServeConfig:
    """Parse the command line.

    Raises:
        UsageError: an unknown flag or a value that cannot be used.
    """
    parser = Parser(
        prog="python -m export.serve",
        description="Serve a bundle over HTTP with Ray Serve.",
        epilog="example: python -m export.serve bundles/minilm-mrpc --replicas 2",
    )
    parser.add_argument("bundle", type=Path, nargs="?", metavar="BUNDLE", help="folder that `python -m export` wrote")
    add_serving_flags(parser)
    parser.add_argument("--precision", help="of the graph: fp32, fp16 or int8 (default: the fastest)")
    parser.add_argument("--remove", action="store_true", help="end what is served in the cluster at --address")
    flags = parser.parse_args(argv)
    config = ServeConfig(flags.bundle, flags.precision, flags.remove, serving_config(flags))
    if config.remove:
        if config.serving.address is None or config.bundle is not None:
            raise UsageError("--remove ends what is served in a cluster: give its --address, and no bundle.")
    elif config.bundle is None:
        raise UsageError("No bundle is named. Give the folder that `python -m export` wrote.")
    config.serving.check()
    return config


def run(config: ServeConfig) -> None:
    """Serve a bundle until an exception, such as Ctrl-C's, ends it; in a cluster that runs already, just deploy it.

    Raises:
        PromptfoldError: what the user can mend: flags, the bundle, the cluster.
    """
    if config.bundle is None:
        service = Service(config.serving)
        try:
            service.remove()
            say(f"nothing of promptfold's is served at {config.serving.address} any more")
        finally:
            service.close()
        return
    bundle = load_bundle(config.bundle)
    if config.precision is not None:
        bundle.graph_path(config.precision)  # refuses a precision that is not there
    # Whoever made it: its graph is tried where it can harm nobody, before replicas keep it.
    try_bundle(bundle)
    where = config.serving.address or "a cluster on this machine"
    say(f"serving {config.bundle} ({bundle.manifest_sha256[:12]}) in {where}")
    service = Service(config.serving)
    try:
        service.deploy(bundle, config.precision)
        execution = service.facts().execution
        say(
            f"{service.replicas()} replicas are running: {execution.engine}, {execution.provider}, "
            f"{execution.precision}, threads: {execution.threads}"
        )
        if config.serving.address is not None:
            say(f"POST {service.url}  (python -m export.serve --remove --address {config.serving.address} ends it)")
            return
        say(f"the cluster is at {service.address}: --address takes it, to replace the bundle")
        say(f"POST {service.url}  (Ctrl-C stops it)")
        threading.Event().wait()
    finally:
        service.close()


def _command(argv: Sequence[str] | None) -> None:
    config = parse_config(argv)
    # An exception, as Ctrl-C's is: it ends a start that is under way as well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    run(config)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    return run_main(_command, argv)


if __name__ == "__main__":
    sys.exit(main())
