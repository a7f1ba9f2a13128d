"""`Service`: a bundle in Ray Serve, seen from outside. Importing this module does not import Ray."""

import asyncio
import logging
import os
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from export.bundle.folder import Bundle
from export.ray_cluster import START_SECONDS, import_ray, ray_cluster, ray_reason, start_with_retries
from export.serve.config import DEFAULT_HTTP_PORT, LOCAL, ServingConfig
from export.serve.ports import PORT_FLAGS, PortFlags, find_port
from export.serve.requests import LogitsResponse, ReplicaFacts
from train.common.errors import EngineError, RequestError

APP = "promptfold"
"""Name of the application in the cluster. It serves one bundle; the next bundle takes that one's place."""
NO_CPUS_SECONDS = 120.0
"""After this long without a place for a replica there is none; a busy machine takes a minute to start its process."""
POLL_SECONDS = 0.2
LOG_CONFIG = {"log_level": "WARNING", "enable_access_log": False}
LOOK_BACK_SECONDS = 11.0
"""Period over which the load that decides on the number of replicas is averaged: about the least that Serve takes."""
TOKEN_FILE = Path(".ray") / "auth_token"
"""Below the user's home. Ray writes it where it starts a cluster; who joins that cluster must have it."""

SETTINGS = {
    "RAY_SERVE_LOG_TO_STDERR": "0",
    # Seconds between two reports of the load, which decide on the number of replicas; Serve's default is 10.
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
    # Seconds after which Serve kills its HTTP proxy, if three checks fail: its 5 and 10 are too few on a busy machine.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
}
"""Environment variables of Ray Serve. A user who sets one of them keeps that value."""


class Service:
    """A cluster with Ray Serve, and in it at most one bundle of ours."""

    def __init__(self, config: ServingConfig, *, flags: PortFlags = PORT_FLAGS) -> None:
        """Start a cluster on this machine, or join the one at ``config.address``; ``flags`` are named in messages.

        Raises a UsageError for a value of ``config`` or if Ray is missing, an EngineError if the cluster does not answer.
        """
        config.check(flags)
        self.config = config
        """How bundles are served, from the next `deploy` on."""
        self._ray = import_serve(config.address)
        self.version: str = self._ray.__version__
        self._lock = threading.Lock()
        self._deployed: tuple[str, str | None, ServingConfig] | None = None
        self._handle: Any = None
        port = config.port or DEFAULT_HTTP_PORT
        if config.address is None:
            port = find_port(config.host, config.port, first=DEFAULT_HTTP_PORT, flags=flags)
        # Workers import our modules, which may be on this process's path alone.
        path = [str(Path(__file__).parents[2]), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        runtime_env = {"env_vars": {"PYTHONPATH": os.pathsep.join(path)}}
        with ExitStack() as stack:  # Ctrl-C leaves nothing of a cluster either
            cluster = ray_cluster(config.address, is_private=False, namespace=APP, runtime_env=runtime_env)
            self.address = stack.enter_context(cluster).address
            """HOST:PORT of the cluster, for ``--address``."""
            self.url = f"http://{_start_serve(config.host, port)}/v1/classify"
            self._stack = stack.pop_all()

    def deploy(self, bundle: Bundle, precision: str | None = None) -> None:
        """Serve a bundle in place of the one that is served now: replica after replica, and no request is lost.

        It must be in the same folder on every machine of the cluster. Without a precision its fastest graph is served.
        Raises an EngineError if a replica cannot load the bundle, or there is no place for one.
        """
        wanted = (bundle.manifest_sha256, precision, self.config)
        with self._lock:
            if wanted != self._deployed:
                self._deployed = None
                cpus = self._ray.cluster_resources().get("CPU", 0)
                self._handle = _deploy(bundle, precision, self.config, cpus)
                _wait_until_running()
                self._deployed = wanted

    def replicas(self) -> int:
        """How many replicas are running."""
        from ray import serve
        from ray.serve.schema import ReplicaState

        app = serve.status().applications.get(APP)
        return app.deployments["Classifier"].replica_states.get(ReplicaState.RUNNING, 0) if app else 0

    def facts(self) -> ReplicaFacts:
        """What a replica says of itself; raises an EngineError if none answers."""
        facts: ReplicaFacts = self._call("facts")
        return facts

    def logits(self, arrays: Mapping[str, np.ndarray], *, task: str, bundle_sha256: str) -> LogitsResponse:
        """Classify token ids; each array is int64, shape = (n_batch, n_text).

        Raises an EngineError if no replica answers, the queue is full, or another bundle is served.
        """
        response: LogitsResponse = self._call("logits", dict(arrays), task, bundle_sha256)
        return response

    def _call(self, method: str, *arguments: Any) -> Any:
        from export.serve.deployments import call_replica

        if self._handle is None:
            raise EngineError("No bundle is served.")
        try:
            return asyncio.run(call_replica(getattr(self._handle, method), *arguments))
        except RequestError as refusal:
            raise EngineError(str(refusal)) from refusal

    def remove(self) -> None:
        """Serve no bundle any more; harmless where none is served."""
        from ray import serve

        self._deployed = self._handle = None
        if APP in serve.status().applications:
            serve.delete(APP)

    def close(self, *, remove: bool = False) -> None:
        """End the cluster that was started here; leave one that was joined, if asked without the bundle."""
        if remove and self.config.address is not None and self._ray.is_initialized():
            self.remove()
        self._stack.close()


def import_serve(address: str | None) -> Any:
    """Import Ray and Serve, to start a cluster (None) or to join one; a UsageError says how to install them."""
    settings = dict(SETTINGS)
    if address is None or address.startswith(f"{LOCAL}:"):
        # The only way to make Ray use 127.0.0.1: its servers would listen on every address of this machine.
        settings["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    if address is not None and (Path.home() / TOKEN_FILE).is_file():
        # Ray sends the token by itself only to a cluster that it starts.
        settings["RAY_AUTH_MODE"] = "token"
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    import_ray("ray.serve")
    return import_ray()


def _start_serve(host: str, port: int) -> str:
    """Start Ray Serve in the connected cluster, unless it runs there; HOST:PORT where it answers, maybe another one."""
    from ray import serve
    from ray.exceptions import RayTaskError
    from ray.serve.config import HTTPOptions, ProxyLocation
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ProxyStatus

    # Hides "Started Serve", and warnings about a busy machine.
    logging.getLogger("ray.serve").addFilter(lambda record: record.levelno >= logging.ERROR)
    options = HTTPOptions(host=host, port=port)

    def start() -> None:
        serve.start(proxy_location=ProxyLocation.HeadOnly, http_options=options, logging_config=LOG_CONFIG)

    deadline = time.monotonic() + START_SECONDS
    message = "Ray Serve cannot be started ({}). Try again when the machine is less busy."
    start_with_retries(start, message, (RayTaskError,))  # which says that the proxy cannot listen at the port
    # A second attempt finds the controller of the first one, which starts another proxy, and does not wait for that.
    while (proxies := serve.status().proxies) and ProxyStatus.HEALTHY not in proxies.values():
        if time.monotonic() > deadline:
            raise EngineError(f"Ray Serve's HTTP proxy did not start within {START_SECONDS:.0f} s. Try again.")
        time.sleep(POLL_SECONDS)
    client: Any = _get_global_client()  # there is no public way to ask
    return f"{client.http_config.host}:{client.http_config.port}"


def _deploy(bundle: Bundle, precision: str | None, config: ServingConfig, cpus: float) -> Any:
    """Ask Serve for replicas of a bundle, in place of those that run, and return the handle that calls them."""
    from ray import serve

    from export.serve.deployments import CALL_SECONDS, Api, Classifier

    threads = config.threads_per_replica
    needed = config.replicas * threads
    if needed > cpus:
        raise EngineError(
            f"{config.replicas} replicas of {threads} thread{'s' * (threads > 1)} want {needed} CPUs, and the cluster "
            f"has {cpus:g}. Take fewer replicas or threads, or add a machine to the cluster."
        )
    deployment: Any = serve.deployment  # its types are those of a decorator
    classifier = deployment(
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
        logging_config=LOG_CONFIG,
        **_scaling(config),
    )
    api = deployment(
        Api,
        name="Api",
        num_replicas=config.apis,
        ray_actor_options={"num_cpus": 0},
        # It only waits for replicas: what may wait is bounded before them.
        max_ongoing_requests=100_000,
        # When another bundle comes, it ends once it has answered, and the proxies know that it goes: Serve tries no other.
        graceful_shutdown_timeout_s=CALL_SECONDS,
        graceful_shutdown_wait_loop_s=5,
        health_check_timeout_s=CALL_SECONDS,
        logging_config=LOG_CONFIG,
    )
    limits = {"threads": threads, "batch_size": config.batch_size, "wait_ms": config.batch_wait_ms}
    replica = classifier.bind(bundle.folder.resolve(), bundle.manifest_sha256, precision, **limits)
    target = serve.RunTarget(api.bind(replica), name=APP, route_prefix="/v1")
    serve.run_many([target], wait_for_applications_running=False)
    return serve.get_deployment_handle("Classifier", APP)


def _scaling(config: ServingConfig) -> dict[str, Any]:
    if config.most_replicas == config.replicas:
        return {"num_replicas": config.replicas}
    scaling = {
        "min_replicas": config.replicas,
        "max_replicas": config.most_replicas,
        # A replica is added when each has more than one full batch to answer.
        "target_ongoing_requests": config.batch_size,
        "upscale_delay_s": config.upscale_seconds,
        "downscale_delay_s": config.downscale_seconds,
        "look_back_period_s": LOOK_BACK_SECONDS,
    }
    return {"autoscaling_config": scaling}


def _wait_until_running() -> None:
    """Wait until every replica runs; raise an EngineError if one cannot load the bundle, or there is no place for it."""
    from ray import serve
    from ray.serve.schema import ApplicationStatus

    start = time.monotonic()
    while (app := serve.status().applications[APP]).status != ApplicationStatus.RUNNING:
        message = " ".join([app.message, *(deployment.message for deployment in app.deployments.values())])
        seconds = time.monotonic() - start
        if app.status in {ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY}:
            raise EngineError(f"The replicas cannot start: {ray_reason(message)}.")
        if seconds > NO_CPUS_SECONDS and "to be scheduled" in message:
            raise EngineError(
                "The cluster has no place for all replicas: its CPUs are in use. Take fewer --replicas or --threads, "
                "or add a machine to it."
            )
        if seconds > START_SECONDS:
            raise EngineError(f"The replicas did not start within {START_SECONDS:.0f} s. {ray_reason(message)}.")
        time.sleep(POLL_SECONDS)
