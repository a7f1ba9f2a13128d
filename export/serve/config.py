"""Settings of a service: replicas, batches, queue, address."""

from dataclasses import dataclass

from export.ray_cluster import check_address
from export.serve.ports import PORT_FLAGS, PortFlags, check_port
from train.common.errors import UsageError
from train.common.machine import usable_cores

DEFAULT_HTTP_PORT = 8000


LOCAL = "127.0.0.1"


@dataclass(frozen=True)
class ServingConfig:
    """How a bundle is served.

    Attributes:
        replicas: processes that hold it; with ``max_replicas`` the least number of them.
        max_replicas: their greatest number under load; None for always the same.
        batch_size: requests that a replica answers together, and texts in one run of the graph, at most.
        batch_wait_ms: how long a request waits for others to join it, at most.
        queue_size: requests that wait for a replica in each Api, at most; beyond them they are refused.
        apis: processes that take HTTP requests and ask the replicas.
        threads: of each replica; None to share out the cores.
        host: address on which HTTP is answered.
        port: the same; None for the first free one from 8000 on.
        address: HOST:PORT of a cluster, as `ray start --head` prints it; None to start one on this machine, which ends
            with this process.
        upscale_seconds: for so long there must have been too much to do before a replica is added.
        downscale_seconds: and too little before one is taken away.
    """

    replicas: int = 1
    max_replicas: int | None = None
    batch_size: int = 32
    batch_wait_ms: float = 2.0
    queue_size: int = 256
    apis: int = 1
    threads: int | None = None
    host: str = LOCAL
    port: int | None = None
    address: str | None = None
    upscale_seconds: float = 5.0
    downscale_seconds: float = 60.0

    @property
    def most_replicas(self) -> int:
        """As many as there can be."""
        return max(self.replicas, self.max_replicas or 0)

    @property
    def threads_per_replica(self) -> int:
        """What each replica may use when there are as many as there can be."""
        return self.threads or max(1, usable_cores() // self.most_replicas)

    def check(self, flags: PortFlags = PORT_FLAGS) -> None:
        """Refuse numbers that cannot be.

        Args:
            flags: the names of the flags for host and port.

        Raises:
            UsageError: there is one.
        """
        for flag, number in (
            ("--replicas", self.replicas),
            ("--max-replicas", self.max_replicas),
            ("--batch-size", self.batch_size),
            ("--queue-size", self.queue_size),
            ("--apis", self.apis),
            ("--threads", self.threads),
        ):
            if number is not None and number < 1:
                raise UsageError(f"{flag} {number}: give a whole number of at least 1.")
        if not 0 <= self.batch_wait_ms <= MAX_WAIT_MS:
            raise UsageError(f"--batch-wait-ms {self.batch_wait_ms:g}: give a number from 0 to {MAX_WAIT_MS:g}.")
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise UsageError(f"--max-replicas {self.max_replicas} is less than --replicas {self.replicas}.")
        check_port(self.port, flags.port)
        if self.address is not None:
            check_address(self.address)
            return
        wanted, cores = self.most_replicas * self.threads_per_replica, usable_cores()
        if wanted > cores:
            raise UsageError(
                f"{self.most_replicas} replicas of {self.threads_per_replica} "
                f"thread{'s' * (self.threads_per_replica > 1)} want {wanted} cores, and there are {cores}. Take fewer "
                "replicas or threads, or join a cluster with --address."
            )


MAX_WAIT_MS = 1000.0


@dataclass(frozen=True)
class Address:
    """Where something listens."""

    host: str
    port: int
