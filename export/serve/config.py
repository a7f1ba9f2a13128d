"""Settings of a service: replicas, batches, queue, address."""

from dataclasses import dataclass
from typing import Annotated

from cyclopts import Parameter

from export.ray_cluster import check_address
from export.serve.ports import PORT_FLAGS, PortFlags, check_port
from train.common.command_line import check_counts
from train.common.errors import UsageError
from train.common.machine import core_limit, usable_cores

DEFAULT_HTTP_PORT = 8000
LOCAL = "127.0.0.1"
MAX_WAIT_MS = 1000.0


@dataclass(frozen=True)
class ServingConfig:
    """How a bundle is served."""

    replicas: int = 1
    """processes that hold the bundle; with --max-replicas their least number"""
    max_replicas: int | None = None
    """add more under load, up to this many (default: none)"""
    batch_size: int = 32
    """requests that a replica answers together, and texts in one run of the graph"""
    batch_wait_ms: float = 2.0
    """how long a request waits for others to join it, at most"""
    queue_size: int = 256
    """requests that may wait for a replica, in each process of --apis; the next one gets 429"""
    apis: int = 1
    """processes that take HTTP requests, each with a queue of its own"""
    threads: int | None = None
    """threads of each replica (default: the cores shared out)"""
    host: str = LOCAL
    """address for HTTP"""
    port: int | None = None
    """port for HTTP (default: the first free one from 8000 on)"""
    address: Annotated[str | None, Parameter(metavar="HOST:PORT")] = None
    """address of a running cluster, as `ray start --head` prints it (default: start one on this machine, which ends
    with this command)"""
    upscale_seconds: Annotated[float, Parameter(parse=False)] = 5.0
    """How long there must be too much to do before a replica is added."""
    downscale_seconds: Annotated[float, Parameter(parse=False)] = 60.0
    """How long there must be too little to do before a replica is taken away."""

    @property
    def most_replicas(self) -> int:
        """The greatest number that there can be under load."""
        return max(self.replicas, self.max_replicas or 0)

    @property
    def threads_per_replica(self) -> int:
        """Threads of each replica, so that the greatest number of replicas shares the cores."""
        return self.threads or max(1, usable_cores() // self.most_replicas)

    def check(self, flags: PortFlags = PORT_FLAGS) -> None:
        """Refuse impossible numbers with a UsageError, which names the flags for host and port as they are called here."""
        check_counts(self, "replicas", "max_replicas", "batch_size", "queue_size", "apis", "threads")
        if not 0 <= self.batch_wait_ms <= MAX_WAIT_MS:
            raise UsageError(f"--batch-wait-ms {self.batch_wait_ms:g}: give a number from 0 to {MAX_WAIT_MS:g}.")
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise UsageError(f"--max-replicas {self.max_replicas} is less than --replicas {self.replicas}.")
        check_port(self.port, flags.port)
        if self.address is not None:
            check_address(self.address)
            return
        wanted, limit = self.most_replicas * self.threads_per_replica, core_limit()
        if wanted > limit.cores:
            raise UsageError(
                f"{self.most_replicas} replicas of {self.threads_per_replica} "
                f"thread{'s' * (self.threads_per_replica > 1)} want {wanted} cores, and there are {limit.cores} "
                f"({limit.reason}). Take fewer replicas or threads, or join a cluster with --address."
            )
