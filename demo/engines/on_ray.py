"""ONNX Runtime's side of the page in a Ray Serve cluster, behind the interface of an engine."""

import threading
import time
from dataclasses import replace
from queue import Queue

import numpy as np

from demo.engines.timing import Arrays, Burst, BurstPlan, Loaded, Served, timed_runs
from export.bundle.folder import Bundle
from export.serve.requests import Reply
from export.serve.service import Service
from train.common.errors import EngineError, PromptfoldError


class ClusterEngine:
    """A bundle in a cluster, as the page sees it. Of a cluster there is one at a time: the next one takes its place."""

    def __init__(self, name: str, service: Service, bundle: Bundle, *, task: str, precision: str) -> None:
        """Begin to deploy the bundle; the caller goes on meanwhile.

        Args:
            name: for messages.
            task: of the bundle's.
            precision: of the graph.
        """
        self.name = name
        self.served: Served | None = None
        self._service = service
        self._bundle = bundle
        self._bundle_sha256 = bundle.manifest_sha256
        self._task = task
        self._precision = precision
        self._is_closed = False
        self._loaded: Loaded | None = None
        self._lock = threading.Lock()
        self._outcome: Queue[Loaded | Exception] = Queue()
        threading.Thread(target=self._deploy, name="promptfold-deploy", daemon=True).start()

    @property
    def pid(self) -> int | None:
        """None: its replicas are processes of the cluster's."""
        return None

    def _deploy(self) -> None:
        start = time.perf_counter()
        try:
            self._service.deploy(self._bundle, self._precision)
            facts = self._service.facts()
            self.served = Served(self._service.replicas())
        except Exception as error:  # whatever it is, whoever waits for the engine shall have it
            self._outcome.put(error)
            return
        execution = facts.execution
        wait_ms = self._service.config.batch_wait_ms
        way = f"behind Ray Serve: a latency holds the way to a replica and back, and {wait_ms:g} ms of waiting for a batch"
        self._outcome.put(
            Loaded(
                replace(
                    execution,
                    engine=f"{execution.engine} in Ray Serve {self._service.version}",
                    note="; ".join(filter(None, [execution.note, way])),
                ),
                load_seconds=time.perf_counter() - start,
                memory_mib=facts.memory_mib,
            )
        )

    def wait_until_ready(self) -> Loaded:
        """Wait until every replica is running and return on what they run.

        Raises:
            EngineError: a replica cannot load the bundle, or there is no place for one.
        """
        with self._lock:
            if self._loaded is None:
                outcome = self._outcome.get()
                if isinstance(outcome, Exception):
                    self._outcome.put(outcome)
                    raise outcome
                self._loaded = outcome
            return self._loaded

    def logits(self, arrays: Arrays) -> np.ndarray:
        """As `demo.engines.timing.Backend.logits`, by one of the replicas.

        Raises:
            EngineError: no replica answered, the queue is full, or another bundle is served now.
        """
        reply = self._ask(arrays)
        self.served = Served(self._service.replicas(), reply.batch_size, reply.replica)
        return reply.logits

    def burst(self, arrays: Arrays, plan: BurstPlan) -> Burst:
        """Latency of each pass of a burst, the way to a replica and back included, after a warm-up.

        Raises:
            EngineError: as `logits`.
        """
        memory_mib = 0.0

        def run() -> None:
            nonlocal memory_mib
            memory_mib = max(memory_mib, self._ask(arrays).memory_mib)

        return Burst(timed_runs(run, plan), memory_mib)

    def _ask(self, arrays: Arrays) -> Reply:
        self.wait_until_ready()
        if self._is_closed:
            raise EngineError(f"The {self.name} engine was stopped to make room for others. Try again.")
        try:
            return self._service.logits(arrays, task=self._task, bundle_sha256=self._bundle_sha256)
        except PromptfoldError:
            # While this one waited, another visitor's choice may have taken its place.
            if self._is_closed:
                raise EngineError(f"The {self.name} engine was stopped to make room for others. Try again.") from None
            raise

    def close(self) -> None:
        """Answer nothing any more. What is deployed goes on until another bundle takes its place, or the page ends."""
        self._is_closed = True
