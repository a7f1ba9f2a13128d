"""``python -m export.serve BUNDLE --replicas N``: serve a bundle over HTTP with Ray Serve, without a page.

By default a cluster is started on this machine and ends with the command, on Ctrl-C or SIGTERM. With ``--address`` the
bundle is deployed in a cluster that runs already, and the command ends while the cluster goes on: run it again with
another bundle and that takes the first one's place, replica after replica, with no failed request; ``--remove`` ends it.

What is asked and answered (`export.serve.requests` has all of it):

    curl -d '{"pair": ["Coast redwoods are tall.", "The tallest trees are redwoods."]}' http://127.0.0.1:8000/v1/classify

Needs Ray Serve, and neither torch nor transformers.
"""

import signal
import sys
import threading
from contextlib import closing
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from export.bundle.folder import load_bundle
from export.runtime.trial import try_bundle
from export.serve.config import ServingConfig
from export.serve.service import Service
from train.common.child import ExitOnce
from train.common.command_line import Command
from train.common.console import say
from train.common.errors import UsageError


@dataclass(frozen=True)
class ServeConfig:
    """Serve a bundle over HTTP with Ray Serve."""

    bundle: Path | None = None
    """folder that `python -m export` wrote; none with --remove"""
    _: KW_ONLY
    serving: Annotated[ServingConfig, Parameter(name="*")] = field(default_factory=ServingConfig)
    precision: str | None = None
    """precision of the graph: fp32, fp16 or int8 (default: the fastest)"""
    remove: bool = False
    """end what is served in the cluster at --address"""

    def __post_init__(self) -> None:
        if self.remove:
            if self.serving.address is None or self.bundle is not None:
                raise UsageError("--remove ends what is served in a cluster: give its --address, and no bundle.")
        elif self.bundle is None:
            raise UsageError("No bundle is named. Give the folder that `python -m export` wrote.")
        self.serving.check()


def _run(config: ServeConfig) -> None:
    """Serve a bundle until an exception, such as Ctrl-C's, ends it; in a cluster that runs already, just deploy it."""
    # As an exception, so that a start under way ends as well.
    signal.signal(signal.SIGTERM, ExitOnce(0))
    if config.bundle is None:
        with closing(Service(config.serving)) as service:
            service.remove()
        say(f"nothing of promptfold's is served at {config.serving.address} any more")
        return
    bundle = load_bundle(config.bundle)
    if config.precision is not None:
        bundle.graph_path(config.precision)  # refuses a precision that is not there
    # Bundles are untrusted: the graph is tried in a process of its own before replicas load it.
    try_bundle(bundle)
    where = config.serving.address or "a cluster on this machine"
    say(f"serving {config.bundle} ({bundle.manifest_sha256[:12]}) in {where}")
    with closing(Service(config.serving)) as service:
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


main = Command(
    ServeConfig,
    _run,
    "python -m export.serve",
    example="example: python -m export.serve bundles/minilm-mrpc --replicas 2",
)

if __name__ == "__main__":
    sys.exit(main())
