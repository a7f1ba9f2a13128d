"""ONNX Runtime's side of the page in a Ray Serve cluster, behind the interface of an engine."""

import threading
import time
from concurrent.futures import Future
from dataclasses import replace

import numpy as np

from demo.engines.timing import Arrays, Burst, BurstPlan, Loaded, Served, timed_runs
from export.bundle.folder import Bundle
from export.serve.requests import LogitsResponse
from export.serve.service import Service
from train.common.errors import EngineError, PromptfoldError


class ClusterEngine:
    """A bundle in a cluster, as the page sees it. A cluster serves one at a time: the next one takes its place."""

    pid = None  # its replicas are processes of the cluster

    def __init__(self, name: str, service: Service, bundle: Bundle, *, task: str, precision: str) -> None:
        """Begin to deploy the bundle for one of its tasks; the caller goes on meanwhile."""
        self.name = name
        self.served: Served | None = None
        self._service = service
        self._bundle_sha256 = bundle.manifest_sha256
        self._task = task
        self._is_closed = False
        self._loaded: Future[Loaded] = Future()
        # A daemon, so that the page can end while it deploys.
        threading.Thread(target=self._load, args=(bundle, precision), name="promptfold-deploy", daemon=True).start()

    def _load(self, bundle: Bundle, precision: str) -> None:
        start = time.perf_counter()
        try:
            self._service.deploy(bundle, precision)
            facts = self._service.facts()
            self.served = Served(self._service.replicas())
        except Exception as error:  # raised again in `wait_until_ready`
            self._loaded.set_exception(error)
            return
        wait_ms = self._service.config.batch_wait_ms
        note = f"behind Ray Serve: a latency includes the way to a replica and back, and {wait_ms:g} ms of waiting for a batch"
        execution = replace(
            facts.execution,
            engine=f"{facts.execution.engine} in Ray Serve {self._service.version}",
            note="; ".join(filter(None, [facts.execution.note, note])),
        )
        self._loaded.set_result(Loaded(execution, time.perf_counter() - start, facts.memory_mib))

    def wait_until_ready(self) -> Loaded:
        """Wait until every replica runs; raises an EngineError if one cannot load the bundle or has no place."""
        return self._loaded.result()

    def logits(self, arrays: Arrays) -> np.ndarray:
        """As `demo.engines.timing.Backend.logits`, by one of the replicas; raises an EngineError if none answers."""
        response = self._call(arrays)
        self.served = Served(self._service.replicas(), response.batch_size, response.replica)
        return response.logits

    def burst(self, arrays: Arrays, plan: BurstPlan) -> Burst:
        """Latency of each pass of a burst, the way to a replica and back included, after a warm-up; errors as `logits`."""
        memory_mib: list[float] = []
        latencies_ms = timed_runs(lambda: memory_mib.append(self._call(arrays).memory_mib), plan)
        return Burst(latencies_ms, max(memory_mib))

    def _call(self, arrays: Arrays) -> LogitsResponse:
        self.wait_until_ready()
        try:
            if not self._is_closed:
                return self._service.logits(arrays, task=self._task, bundle_sha256=self._bundle_sha256)
        except PromptfoldError:
            # While this call waited, another visitor's choice may have taken the bundle's place.
            if not self._is_closed:
                raise
        raise EngineError(f"The {self.name} engine was stopped to make room for others. Try again.")

    def close(self) -> None:
        """Answer no further call. The bundle stays deployed until another one takes its place, or the page ends."""
        self._is_closed = True
