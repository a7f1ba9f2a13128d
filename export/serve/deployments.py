"""What runs in the cluster: `Classifier`, whose replicas hold the bundle, and `Api`, which speaks HTTP before them.

Heavy: it imports Ray Serve, so import it where it is used (`export.serve.service`).
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import JSONResponse

from export.bundle.folder import Bundle, BundleTask, load_bundle
from export.runtime.batches import TokenRow, run_rows
from export.runtime.classifier import OnnxClassifier
from export.serve.requests import (
    INTERNAL,
    MAX_BODY_BYTES,
    METHOD_NOT_ALLOWED,
    NOT_FOUND,
    TOO_LARGE,
    TOO_MANY,
    UNAVAILABLE,
    UNPROCESSABLE,
    WRONG_BUNDLE,
    Question,
    Refusal,
    ReplicaFacts,
    Reply,
    TokenQuestion,
    read_question,
    reply_json,
)
from train.common.errors import BundleError, PromptfoldError, RequestError, TextError, UsageError
from train.common.limits import MIB
from train.common.machine import peak_memory_mib

DEAD = (RayActorError, ReplicaUnavailableError)
"""What a call raises whose replica is gone. Classifying changes nothing, so the call may be made again."""


ANSWER_SECONDS = 60.0
"""For one question, queueing and further attempts included."""


ATTEMPT_PAUSE_SECONDS = 0.2
"""Before a further attempt: the router learns of a death a moment later than its callers."""


RETRY_AFTER_SECONDS = 1
"""What who is sent away is told to wait."""


QUEUE_FULL = Refusal(TOO_MANY, "All replicas are busy and the queue is full. Ask again in a moment.")


GONE = Refusal(UNAVAILABLE, "No replica answered in time. Those that died are started again; ask again in a moment.")


BROKEN = Refusal(INTERNAL, "The server failed at this request, which is a bug of ours. Its log has the traceback.")


@dataclass(frozen=True)
class ReplicaPlan:
    """What each replica loads.

    Attributes:
        folder: of the bundle, as an absolute path; on every machine of the cluster the same.
        bundle_sha256: `Bundle.manifest_sha256` of the bundle that was deployed.
        precision: of the graph; None for the fastest.
        threads: of ONNX Runtime.
        batch_size: requests that are answered together, and texts in one run of the graph, at most.
        batch_wait_ms: how long a request waits for others, at most.
    """

    folder: Path
    bundle_sha256: str
    precision: str | None
    threads: int
    batch_size: int
    batch_wait_ms: float


@dataclass(frozen=True, eq=False)
class _Job:
    """A question as rows.

    Attributes:
        rows: of each text its token ids.
        cut: of each text, whether it lost its end.
        task: which one is asked.
        least_batch_size: so many texts may go through the graph at once, whatever the plan says.
    """

    rows: tuple[TokenRow, ...]
    cut: tuple[bool, ...]
    task: BundleTask
    least_batch_size: int = 1


def load_planned(plan: ReplicaPlan) -> Bundle:
    """The bundle on this machine, where it is the one that was deployed.

    Raises:
        BundleError: it is not there, is damaged, or is another one.
    """
    if not plan.folder.is_dir():
        raise BundleError(
            f"{plan.folder} is not on this machine. Every machine of the cluster needs the bundle at the same path: "
            "copy it there."
        )
    bundle = load_bundle(plan.folder)
    if bundle.manifest_sha256 != plan.bundle_sha256:
        raise BundleError(
            f"{plan.folder} holds another bundle ({bundle.manifest_sha256[:12]}) than the one that was deployed "
            f"({plan.bundle_sha256[:12]}), so it is not served. Put that one back, or deploy this one."
        )
    return bundle


class Classifier:
    """A replica: a bundle in ONNX Runtime, which answers what waits together in batches of like length."""

    def __init__(self, plan: ReplicaPlan) -> None:
        """Load the bundle.

        Raises:
            BundleError: as `load_planned` and `OnnxClassifier`.
        """
        self._bundle = load_planned(plan)
        self._plan = plan
        first = self._bundle.tasks[0]
        # All tasks through one graph: rows of a shared one carry their own number.
        self._classifier = OnnxClassifier(self._bundle, task=first.name, precision=plan.precision, threads=plan.threads)
        self._replica = str(serve.get_replica_context().replica_id.unique_id)
        # ONNX Runtime has its own threads; here one waits for it, and the event loop is free for health checks.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="onnxruntime")
        self._is_free = asyncio.Event()
        self._is_free.set()
        batching: Any = self._answer  # its type tells nothing of what the decorator adds
        batching.set_max_batch_size(plan.batch_size)
        batching.set_batch_wait_timeout_s(plan.batch_wait_ms / 1000)
        self._try()

    def _try(self) -> None:
        """Run the graph on the shortest text that there is."""
        texts = [("a",) * len(self._classifier.task.task.text_columns)]
        run_rows(self._classifier, self._tokenize(texts, self._classifier.task).rows, batch_size=1)

    async def check_health(self) -> None:
        """Raise where the graph cannot be run any more: Serve then starts another replica in this one's place."""
        # Not in the one thread, where the check would wait for a batch: a session may be run from several.
        await asyncio.get_running_loop().run_in_executor(None, self._try)

    async def facts(self) -> ReplicaFacts:
        """What this replica runs on."""
        names = tuple(task.name for task in self._bundle.tasks)
        return ReplicaFacts(self._classifier.execution, names, self._plan.bundle_sha256, peak_memory_mib())

    async def classify(self, question: Question) -> Reply | Refusal:
        """Answer texts, which are tokenised here: text, graph and labels always belong together."""
        try:
            task = self._bundle.find_task(question.task)
        except UsageError:
            names = ", ".join(task.name for task in self._bundle.tasks)
            wanted = "No task is named" if question.task is None else f"There is no task {question.task[:80]!r}"
            return Refusal(UNPROCESSABLE, f"{wanted}. Give one of {names} as task.")
        is_pair = len(question.texts[0]) == 2
        if is_pair != task.task.is_pair:
            kind = "pairs" if task.task.is_pair else "single sentences"
            columns = " and ".join(task.task.text_columns)
            use = "pair or pairs" if task.task.is_pair else "text or texts"
            return Refusal(UNPROCESSABLE, f"Task {task.name} is about {kind} ({columns}). Send {use}.")
        # In the default executor, beside the batch that is being run.
        job = await asyncio.get_running_loop().run_in_executor(None, self._tokenize, question.texts, task)
        return await self._join_batch(job)

    async def logits(self, question: TokenQuestion) -> Reply | Refusal:
        """Answer token ids, where they are for this bundle."""
        if question.bundle_sha256 != self._plan.bundle_sha256:
            return Refusal(
                WRONG_BUNDLE,
                f"The cluster serves another bundle ({self._plan.bundle_sha256[:12]}) than the one that the token ids "
                f"are for ({question.bundle_sha256[:12]}). Deploy that one again.",
            )
        try:
            task = self._bundle.find_task(question.task)
        except UsageError as error:
            return Refusal(UNPROCESSABLE, str(error))
        arrays = question.arrays
        n_texts = len(arrays["input_ids"])
        names = self._bundle.text_inputs
        rows = tuple(TokenRow({name: arrays[name][number] for name in names}, task.number) for number in range(n_texts))
        # Who sends token ids chose the batch, and may be measuring it: it is not taken apart.
        return await self._join_batch(_Job(rows, (False,) * n_texts, task, least_batch_size=n_texts))

    def _tokenize(self, texts: Sequence[tuple[str, ...]], task: BundleTask) -> _Job:
        encoded = self._classifier.tokenize(texts)
        lengths = encoded.arrays["attention_mask"].sum(axis=1)
        rows = tuple(
            TokenRow({name: array[number, :length] for name, array in encoded.arrays.items()}, task.number)
            for number, length in enumerate(lengths)
        )
        return _Job(rows, encoded.cut, task)

    async def _join_batch(self, job: _Job) -> Reply | Refusal:
        # Ray closes a batch when its wait is over, whether or not the graph is free, and then it takes nobody in. Who
        # comes while the graph is busy waits here instead, and all of them are the next batch.
        await self._is_free.wait()
        return await self._answer(job)

    # Its limits are set for each replica when it is made.
    @serve.batch
    async def _answer(self, jobs: list[_Job]) -> list[Reply | Refusal]:
        self._is_free.clear()
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._run, jobs)
        finally:
            self._is_free.set()

    def _run(self, jobs: Sequence[_Job]) -> list[Reply | Refusal]:
        """Run everything that came together; each job is answered, or refused, by itself."""
        rows = [row for job in jobs for row in job.rows]
        batch_size = max(self._plan.batch_size, *(job.least_batch_size for job in jobs))
        try:
            result = run_rows(self._classifier, rows, batch_size=batch_size)
        except PromptfoldError as error:
            if len(jobs) == 1:
                # What cannot be read is the caller's to mend; anything else is the bundle's.
                return [Refusal(UNPROCESSABLE if isinstance(error, TextError) else INTERNAL, str(error))]
            # One of them is at fault; the others shall not suffer for it.
            return [reply for job in jobs for reply in self._run([job])]
        replies: list[Reply | Refusal] = []
        start = 0
        for job in jobs:
            numbers = slice(start, start + len(job.rows))
            labels = job.task.task.labels
            replies.append(
                Reply(
                    logits=result.logits[numbers, : len(labels)],
                    cut=job.cut,
                    task=job.task.name,
                    labels=labels,
                    bundle_sha256=self._plan.bundle_sha256,
                    batch_size=int(result.batch_sizes[numbers].max()),
                    replica=self._replica,
                    memory_mib=peak_memory_mib(),
                )
            )
            start = numbers.stop
        return replies


def refusal_of(error: Exception, deadline: float) -> Refusal | None:
    """What becomes of a question whose call failed; None where it shall be asked again.

    Args:
        deadline: of further attempts, by `time.monotonic`.

    Raises:
        Exception: the same error, where it is none of a cluster's.
    """
    if isinstance(error, BackPressureError):
        return QUEUE_FULL
    if isinstance(error, (TimeoutError, DeploymentUnavailableError)):
        return GONE
    if not isinstance(error, DEAD):
        raise error
    return None if time.monotonic() < deadline else GONE


async def ask(call: Callable[[], Awaitable[Any]]) -> Any:
    """Make a call to a replica, and again where that one died: what it returns, or a `Refusal`."""
    deadline = time.monotonic() + ANSWER_SECONDS
    while True:
        try:
            return await asyncio.wait_for(call(), max(deadline - time.monotonic(), 0.01))
        except Exception as error:  # `refusal_of` raises it again where it is not the cluster's
            refusal = refusal_of(error, deadline)
        if refusal is not None:
            return refusal
        await asyncio.sleep(ATTEMPT_PAUSE_SECONDS)


class Api:
    """HTTP for those who need no page: ``POST /v1/classify`` and ``GET /v1/health`` (see `export.serve.requests`)."""

    def __init__(self, classifier: DeploymentHandle) -> None:
        self._classifier = classifier
        self._log = logging.getLogger("ray.serve")

    async def __call__(self, request: Request) -> JSONResponse:
        """Answer one request."""
        try:
            return JSONResponse(await self._respond(request))
        except RequestError as error:
            return _error(Refusal(error.status, str(error)))
        except Exception:  # whatever it is, who asked gets JSON and no traceback
            self._log.exception("a request failed")
            return _error(BROKEN)

    async def _respond(self, request: Request) -> dict[str, Any]:
        routes = {"/v1/classify": ("POST", self._classify), "/v1/health": ("GET", self._health)}
        if request.url.path not in routes:
            raise RequestError(NOT_FOUND, f"There is nothing at this path. Known are {', '.join(routes)}.")
        method, respond = routes[request.url.path]
        if request.method != method:
            raise RequestError(METHOD_NOT_ALLOWED, f"{request.url.path} takes {method} alone.")
        return await respond(request)

    async def _classify(self, request: Request) -> dict[str, Any]:
        question = read_question(await _body(request))
        return reply_json(_taken(await ask(lambda: self._classifier.classify.remote(question))))

    async def _health(self, request: Request) -> dict[str, Any]:
        facts: ReplicaFacts = _taken(await ask(self._classifier.facts.remote))
        return {"status": "ok"} | asdict(facts)


def _taken(value: Any) -> Any:
    """A value that is no refusal."""
    if isinstance(value, Refusal):
        raise RequestError(value.status, value.message)
    return value


async def _body(request: Request) -> bytes:
    """A request's body, of which no more is kept than a request may have."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise RequestError(TOO_LARGE, f"The request has more than {MAX_BODY_BYTES // MIB} MiB. Send fewer texts.")
    return bytes(body)


def _error(refusal: Refusal) -> JSONResponse:
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)} if refusal.status in {TOO_MANY, UNAVAILABLE} else None
    return JSONResponse({"error": refusal.message}, refusal.status, headers)
