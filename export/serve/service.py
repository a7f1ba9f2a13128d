"""A bundle in Ray Serve, from outside: a cluster that is started or joined, a deployment, questions through a handle.

`Service` holds both. Of Ray nothing is imported before one is made: most who use promptfold do not have it.
"""

import logging
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from export.bundle.folder import Bundle
from export.ray_cluster import (
    OBJECT_STORE_MIB,
    import_ray,
    no_stderr,
    reach,
    remove_folder,
    short_folder,
    sigterm_kept,
)
from export.serve.config import DEFAULT_HTTP_PORT, LOCAL, Address, ServingConfig
from export.serve.ports import PORT_FLAGS, PortFlags, find_port
from export.serve.requests import Refusal, ReplicaFacts, Reply, TokenQuestion
from train.common.errors import EngineError, first_line
from train.common.limits import MIB
from train.common.machine import usable_cores

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle


APP = "promptfold"
"""Name of the application in the cluster: one bundle is served there, and the next one takes its place."""


START_SECONDS = 300.0
"""Until every replica must have loaded the bundle."""


NO_CPUS_SECONDS = 40.0
"""After this long without a place for a replica, there is none: Serve says so after 30 s."""


POLL_SECONDS = 0.2


LOOK_BACK_SECONDS = 11.0
"""Over so long the load is averaged that decides on the number of replicas."""


TOKEN_FILE = Path(".ray") / "auth_token"
"""Below the user's home: Ray writes it where it starts a cluster, and who would join must have it."""


def import_serve(address: str | None) -> Any:
    """Ray with Serve, as a server wants them.

    Args:
        address: of the cluster that shall be joined; None to start one. It counts for the first import only.

    Raises:
        UsageError: Ray Serve is not installed.
    """
    settings = {
        "RAY_SERVE_LOG_TO_STDERR": "0",
        # So often who scales learns how much there is to do; by default every 10 s.
        "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
        "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
    }
    if address is None or address.startswith(f"{LOCAL}:"):
        # The only way to make Ray take 127.0.0.1 for this machine's address: its servers would listen on every one.
        settings["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    if address is not None and (Path.home() / TOKEN_FILE).is_file():
        # Ray sends the token by itself only to a cluster that it starts.
        settings["RAY_AUTH_MODE"] = "token"
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    return import_ray("serve")


@dataclass(frozen=True)
class _Wanted:
    """Which model is served, and how."""

    bundle_sha256: str
    precision: str | None
    config: ServingConfig


class Service:
    """A cluster with Ray Serve, and in it at most one bundle of ours.

    Attributes:
        config: how bundles are served, from the next `deploy` on.
        version: of Ray.
    """

    def __init__(self, config: ServingConfig, *, flags: PortFlags = PORT_FLAGS) -> None:
        """Start a cluster on this machine, or join the one at ``config.address``.

        Args:
            flags: the names of the flags for host and port, for complaints.

        Raises:
            UsageError: Ray is missing, or a value of ``config`` cannot be used.
            EngineError: the cluster cannot be reached, or cannot be started.
        """
        config.check(flags)
        self._ray = import_serve(config.address)
        self.config = config
        self.version: str = self._ray.__version__
        self._wanted: _Wanted | None = None
        self._handle: DeploymentHandle | None = None
        self._lock = threading.Lock()
        self._folder: Path | None = None
        self._has_begun = False
        port = config.port or DEFAULT_HTTP_PORT
        if config.address is None:
            port = find_port(config.host, config.port, first=DEFAULT_HTTP_PORT, flags=flags)
        try:
            if config.address is None:
                self._start()
            else:
                self._join(config.address)
            self._start_serve(port)
        except BaseException:  # Ctrl-C as well: nothing of a cluster may be left
            self.close()
            raise

    def _start(self) -> None:
        """A cluster of our own: it listens on this machine alone, and its files are in a folder that goes with it."""
        self._folder = short_folder()
        try:
            self._init(
                # Else RAY_ADDRESS could name another one.
                address="local",
                num_cpus=usable_cores(),
                object_store_memory=OBJECT_STORE_MIB * MIB,
                include_dashboard=False,
                _temp_dir=str(self._folder),
            )
        except Exception as cause:  # Ray's exceptions share no base here
            raise EngineError(f"Ray cannot start on this machine ({first_line(cause)}).") from cause

    def _join(self, address: str) -> None:
        reach(address)
        try:
            self._init(address=address)
        except Exception as cause:  # as above
            raise EngineError(
                f"--address {address}: the Ray cluster there cannot be used ({first_line(cause)}). Run this on one of "
                "its machines, with the same Python and Ray, and with its ~/.ray/auth_token."
            ) from cause

    def _init(self, **options: Any) -> None:
        if self._ray.is_initialized():
            raise EngineError("This process uses a Ray cluster already, and can use one only.")
        self._has_begun = True
        # Ray puts its own handler in the place of the command line's.
        with sigterm_kept(), no_stderr():
            self._ray.init(
                namespace=APP,
                logging_level=logging.ERROR,
                log_to_driver=False,
                # Workers import our modules, which may be on no path but this process's.
                runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(_python_path())}},
                **options,
            )

    def _start_serve(self, port: int) -> None:
        from ray import serve
        from ray.serve.config import HTTPOptions, ProxyLocation
        from ray.serve.context import _get_global_client
        from ray.serve.schema import LoggingConfig

        # Its "Started Serve", and what it notices of a machine that is busy.
        logging.getLogger("ray.serve").addFilter(lambda record: record.levelno >= logging.ERROR)
        serve.start(
            proxy_location=ProxyLocation.HeadOnly,
            http_options=HTTPOptions(host=self.config.host, port=port),
            logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False),
        )
        # In a cluster that was joined, Serve may listen elsewhere already. There is no public way to ask.
        client: Any = _get_global_client()
        http = client.http_config
        self._place = Address(str(http.host), int(http.port))

    @property
    def url(self) -> str:
        """Where HTTP is answered."""
        return f"http://{self._place.host}:{self._place.port}/v1/classify"

    @property
    def address(self) -> str:
        """HOST:PORT of the cluster, for ``--address``."""
        return str(self._ray.get_runtime_context().gcs_address)

    def deploy(self, bundle: Bundle, precision: str | None = None) -> None:
        """Serve a bundle, in the place of the one that is served now: replica after replica, and no request is lost.

        Args:
            bundle: as from `load_bundle`; on every machine of the cluster it must be in the same folder.
            precision: of its graph; None for the fastest.

        Raises:
            BundleError: the bundle is gone.
            EngineError: a replica cannot load the bundle, or there is no place for one.
        """
        wanted = _Wanted(bundle.manifest_sha256, precision, self.config)
        with self._lock:
            if wanted == self._wanted:
                return
            self._wanted = None
            self._run(bundle, wanted)
            self._wait_until_running()
            self._wanted = wanted

    def _run(self, bundle: Bundle, wanted: _Wanted) -> None:
        from ray import serve
        from ray.serve.config import AutoscalingConfig
        from ray.serve.schema import LoggingConfig

        from export.serve.deployments import Api, Classifier, ReplicaPlan

        config = self.config
        threads = config.threads_per_replica
        needed, there = config.replicas * threads, self._ray.cluster_resources().get("CPU", 0)
        if needed > there:
            raise EngineError(
                f"{config.replicas} replicas of {threads} thread{'s' * (threads > 1)} want {needed} CPUs, and the "
                f"cluster has {there:g}. Take fewer replicas or threads, or add a machine to the cluster."
            )
        plan = ReplicaPlan(
            folder=bundle.folder.resolve(),
            bundle_sha256=wanted.bundle_sha256,
            precision=wanted.precision,
            threads=threads,
            batch_size=config.batch_size,
            batch_wait_ms=config.batch_wait_ms,
        )
        scale: dict[str, Any] = {"num_replicas": config.replicas}
        if config.most_replicas > config.replicas:
            scale = {
                "autoscaling_config": AutoscalingConfig(
                    min_replicas=config.replicas,
                    max_replicas=config.most_replicas,
                    # More than one full batch for each replica, and another one is worth it.
                    target_ongoing_requests=config.batch_size,
                    upscale_delay_s=config.upscale_seconds,
                    downscale_delay_s=config.downscale_seconds,
                    # As little as Serve takes, so that it acts on what is, not on what was.
                    look_back_period_s=LOOK_BACK_SECONDS,
                )
            }
        logs = LoggingConfig(log_level="WARNING", enable_access_log=False)
        make: Any = serve.deployment  # its types are those of a decorator
        classifier = make(
            Classifier,
            name="Classifier",
            ray_actor_options={"num_cpus": threads},
            # One batch is being answered while the next one gathers.
            max_ongoing_requests=2 * config.batch_size,
            max_queued_requests=config.queue_size,
            health_check_period_s=5,
            health_check_timeout_s=30,
            graceful_shutdown_timeout_s=30,
            max_constructor_retry_count=3,
            logging_config=logs,
            **scale,
        )
        api = make(
            Api,
            name="Api",
            num_replicas=config.apis,
            ray_actor_options={"num_cpus": 0},
            # It only waits for replicas: what may wait is bounded before them.
            max_ongoing_requests=100_000,
            logging_config=logs,
        )
        serve.run_many(
            [serve.RunTarget(api.bind(classifier.bind(plan)), name=APP, route_prefix="/v1")],
            wait_for_applications_running=False,
        )
        self._handle = serve.get_deployment_handle("Classifier", APP)

    def _wait_until_running(self) -> None:
        from ray import serve
        from ray.serve.schema import ApplicationStatus

        start = time.monotonic()
        while True:
            app = serve.status().applications[APP]
            if app.status == ApplicationStatus.RUNNING:
                return
            said = " ".join([app.message, *(deployment.message for deployment in app.deployments.values())])
            seconds = time.monotonic() - start
            if app.status in {ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY}:
                raise EngineError(f"The replicas cannot start: {_reason(said)}")
            if seconds > NO_CPUS_SECONDS and "to be scheduled" in said:
                raise EngineError(
                    "The cluster has no place for all replicas: its CPUs are in use. Take fewer --replicas or "
                    "--threads, or add a machine to it."
                )
            if seconds > START_SECONDS:
                raise EngineError(f"The replicas did not start within {START_SECONDS:.0f} s. {_reason(said)}")
            time.sleep(POLL_SECONDS)

    def replicas(self) -> int:
        """How many replicas are running."""
        from ray import serve
        from ray.serve.schema import ReplicaState

        app = serve.status().applications.get(APP)
        return app.deployments["Classifier"].replica_states.get(ReplicaState.RUNNING, 0) if app else 0

    def facts(self) -> ReplicaFacts:
        """What a replica says of itself.

        Raises:
            EngineError: no replica answered.
        """
        facts: ReplicaFacts = self._ask("facts")
        return facts

    def logits(self, arrays: Mapping[str, np.ndarray], *, task: str, bundle_sha256: str) -> Reply:
        """Ask a replica.

        Args:
            arrays: as from the bundle's tokenizer; each int64, shape = (n_batch, n_text)
            task: the name of one of the bundle's.
            bundle_sha256: `Bundle.manifest_sha256` of that bundle; no other one answers.

        Raises:
            EngineError: no replica answered, the queue is full, or another bundle is served.
        """
        reply: Reply = self._ask("logits", TokenQuestion(dict(arrays), task, bundle_sha256))
        return reply

    def _ask(self, method: str, *arguments: Any) -> Any:
        from export.serve.deployments import ANSWER_SECONDS, ATTEMPT_PAUSE_SECONDS, refusal_of

        if self._handle is None:
            raise EngineError("No bundle is served.")
        deadline = time.monotonic() + ANSWER_SECONDS
        while True:
            try:
                call = getattr(self._handle, method).remote(*arguments)
                value = call.result(timeout_s=max(deadline - time.monotonic(), 0.01))
            except Exception as error:  # `refusal_of` raises it again where it is not the cluster's
                value = refusal_of(error, deadline)
            if isinstance(value, Refusal):
                raise EngineError(value.message)
            if value is not None:
                return value
            time.sleep(ATTEMPT_PAUSE_SECONDS)

    def remove(self) -> None:
        """Serve no bundle any more; harmless where none is served."""
        from ray import serve

        self._wanted = self._handle = None
        if APP in serve.status().applications:
            serve.delete(APP)

    def close(self, *, remove: bool = False) -> None:
        """End the cluster that was started here, with all its processes; one that was joined goes on.

        Args:
            remove: whether to take the bundle out of one that was joined.
        """
        if remove and self._folder is None and self._has_begun and self._ray.is_initialized():
            self.remove()
        # Another service's cluster is not this one's to leave.
        if self._has_begun:
            self._ray.shutdown()
        if self._folder is not None:
            remove_folder(self._folder)


def _python_path() -> list[str]:
    root = str(Path(__file__).parents[2])
    return [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]


def _reason(said: str) -> str:
    """Of what Serve says, a traceback included, the sentence that matters."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    for line in reversed(lines):
        name, _, message = line.partition(": ")
        if name.rpartition(".")[2].endswith("Error") and message:
            return message
    return lines[-1] if lines else "Serve gives no reason."
