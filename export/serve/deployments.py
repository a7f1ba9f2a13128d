"""The two deployments in Ray Serve: `Api` answers HTTP, `Classifier` holds the bundle. Importing it imports Ray Serve."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

from export.bundle.folder import Bundle, BundleTask, load_bundle
from export.runtime.batches import RowLogits, TokenRow, run_rows
from export.runtime.classifier import OnnxClassifier
from export.serve.requests import (
    MAX_BODY_BYTES,
    ClassifyRequest,
    ClassifyResponse,
    ErrorResponse,
    LogitsResponse,
    ReplicaFacts,
    parse_request,
)
from train.common.errors import BundleError, PromptfoldError, RequestError, TextError, UsageError
from train.common.limits import MIB
from train.common.machine import peak_memory_mib

CALL_SECONDS = 60.0
"""How long a call of a replica may take, queueing and further attempts included."""
PAUSE_SECONDS = 0.2
"""Pause before a further attempt: the router learns of a death a moment later than its callers."""


async def call_replica(method: Any, *arguments: Any) -> Any:
    """Call a method of a deployment's handle, and call it again where the replica died: classifying changes nothing.

    Raises a RequestError if the replica refuses, the queue is full, or none answers in time.
    """
    deadline = time.monotonic() + CALL_SECONDS
    while (seconds_left := deadline - time.monotonic()) > 0:
        try:
            value = await asyncio.wait_for(method.remote(*arguments), seconds_left)
        except BackPressureError as cause:
            message = "All replicas are busy and the queue is full. Ask again in a moment."
            raise RequestError(HTTPStatus.TOO_MANY_REQUESTS, message) from cause
        except (TimeoutError, DeploymentUnavailableError):
            break
        except (RayActorError, ReplicaUnavailableError):
            await asyncio.sleep(PAUSE_SECONDS)
            continue
        if isinstance(value, ErrorResponse):
            raise RequestError(value.status, value.message)
        return value
    message = "No replica answered in time. Those that died are started again; ask again in a moment."
    raise RequestError(HTTPStatus.SERVICE_UNAVAILABLE, message)


app = FastAPI(openapi_url=None, redirect_slashes=False)


def _error(status: int, message: str) -> JSONResponse:
    may_retry = status in {HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE}
    return JSONResponse({"error": message}, status, {"Retry-After": "1"} if may_retry else None)


@app.exception_handler(RequestError)
async def _refuse(_: Request, error: RequestError) -> JSONResponse:
    return _error(error.status, str(error))


@app.exception_handler(HTTPException)
async def _refuse_route(request: Request, error: HTTPException) -> JSONResponse:
    message = "There is nothing at this path. Known are /v1/classify, /v1/health."
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        message = f"{request.url.path} takes {(error.headers or {}).get('Allow')} alone."
    return _error(error.status_code, message)


@app.exception_handler(Exception)
async def _fail(_: Request, __: Exception) -> JSONResponse:  # Starlette raises it again, and Serve logs it
    message = "The server failed at this request, which is a bug of ours. Its log has the traceback."
    return _error(HTTPStatus.INTERNAL_SERVER_ERROR, message)


async def _read_request(request: Request) -> ClassifyRequest:
    """Read a request's JSON under any Content-Type (`curl -d` sends another), and no more of it than one may have."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            message = f"The request has more than {MAX_BODY_BYTES // MIB} MiB. Send fewer texts."
            raise RequestError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message)
    return parse_request(bytes(body))


@serve.ingress(app)  # it copies the routes, so all that they use is defined above
class Api:
    """``POST /v1/classify`` and ``GET /v1/health``."""

    def __init__(self, classifier: DeploymentHandle) -> None:
        self._classifier = classifier

    @app.post("/classify")
    async def classify(self, request: Request) -> ClassifyResponse:
        """Classify texts."""
        asked = await _read_request(request)
        return ClassifyResponse.model_validate(await call_replica(self._classifier.classify, asked))

    @app.get("/health")
    async def health(self) -> dict[str, Any]:
        """What one of the replicas says of itself."""
        return {"status": "ok"} | asdict(await call_replica(self._classifier.facts))


def load_deployed(folder: Path, bundle_sha256: str) -> Bundle:
    """Load the bundle on this machine; raises a BundleError where the folder is missing or holds another bundle."""
    if not folder.is_dir():
        raise BundleError(
            f"{folder} is not on this machine. Every machine of the cluster needs the bundle at the same path: "
            "copy it there."
        )
    bundle = load_bundle(folder)
    if bundle.manifest_sha256 != bundle_sha256:
        raise BundleError(
            f"{folder} holds another bundle ({bundle.manifest_sha256[:12]}) than the one that was deployed "
            f"({bundle_sha256[:12]}), so it is not served. Put that one back, or deploy this one."
        )
    return bundle


@dataclass(frozen=True, eq=False)
class _Job:
    """A request as token ids."""

    rows: tuple[TokenRow, ...]
    cut: tuple[bool, ...]
    task: BundleTask
    min_batch_size: int = 1
    """This many texts may go through the graph at once, whatever the replica's batch size."""


class Classifier:
    """A replica: a bundle in ONNX Runtime, which answers waiting requests together, in batches of similar length."""

    def __init__(
        self, folder: Path, bundle_sha256: str, precision: str | None, *, threads: int, batch_size: int, wait_ms: float
    ) -> None:
        """Load the bundle from an absolute path, which is the same on every machine of the cluster."""
        self._bundle = load_deployed(folder, bundle_sha256)
        self._bundle_sha256 = bundle_sha256  # kept: by now the folder may hold another bundle
        self._batch_size = batch_size
        # One session for all tasks: in a bundle of several, each row carries its task's number.
        first = self._bundle.tasks[0].name
        self._classifier = OnnxClassifier(self._bundle, task=first, precision=precision, threads=threads)
        self._replica = str(serve.get_replica_context().replica_id.unique_id)
        # ONNX Runtime has its own threads. This one waits for it, so that the event loop stays free for health checks.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="onnxruntime")
        self._is_free = asyncio.Event()
        self._is_free.set()
        batching: Any = self._answer  # its type says nothing of what the decorator adds
        batching.set_max_batch_size(batch_size)
        batching.set_batch_wait_timeout_s(wait_ms / 1000)
        self._try()

    def _try(self) -> None:
        """Run the graph on the shortest possible text."""
        texts = [("a",) * len(self._classifier.task.task.text_columns)]
        run_rows(self._classifier, self._tokenize(texts, self._classifier.task).rows, batch_size=1)

    async def check_health(self) -> None:
        """Raise if the graph cannot be run any more: Serve then replaces this replica."""
        # Not in the replica's thread, where the check would wait for a batch: a session may be run from several threads.
        await asyncio.to_thread(self._try)

    async def facts(self) -> ReplicaFacts:
        """What this replica runs on."""
        names = tuple(task.name for task in self._bundle.tasks)
        return ReplicaFacts(self._classifier.execution, names, self._bundle_sha256, peak_memory_mib())

    async def classify(self, request: ClassifyRequest) -> LogitsResponse | ErrorResponse:
        """Classify texts, which are tokenized here so that tokenizer, graph and labels always belong together."""
        try:
            task = self._bundle.find_task(request.task)
        except UsageError:
            names = ", ".join(task.name for task in self._bundle.tasks)
            wanted = "No task is named" if request.task is None else f"There is no task {request.task[:80]!r}"
            return ErrorResponse(HTTPStatus.UNPROCESSABLE_ENTITY, f"{wanted}. Give one of {names} as task.")
        if (len(request.rows[0]) == 2) != task.task.is_pair:
            kind, use = ("pairs", "pair or pairs") if task.task.is_pair else ("single sentences", "text or texts")
            message = f"Task {task.name} is about {kind} ({' and '.join(task.task.text_columns)}). Send {use}."
            return ErrorResponse(HTTPStatus.UNPROCESSABLE_ENTITY, message)
        # In a thread beside the batch that is being run.
        return await self._join_batch(await asyncio.to_thread(self._tokenize, request.rows, task))

    async def logits(
        self, arrays: Mapping[str, np.ndarray], task_name: str, bundle_sha256: str
    ) -> LogitsResponse | ErrorResponse:
        """Classify token ids (each int64, shape = (n_batch, n_text)) of a caller that has this bundle's tokenizer."""
        if bundle_sha256 != self._bundle_sha256:
            message = (
                f"The cluster serves another bundle ({self._bundle_sha256[:12]}) than the one that the token ids are for "
                f"({bundle_sha256[:12]}). Deploy that one again."
            )
            return ErrorResponse(HTTPStatus.CONFLICT, message)
        try:
            task = self._bundle.find_task(task_name)
        except UsageError as error:
            return ErrorResponse(HTTPStatus.UNPROCESSABLE_ENTITY, str(error))
        n_texts, n_tokens = arrays["input_ids"].shape
        rows = self._rows(arrays, [n_tokens] * n_texts, task)
        # A caller who sends token ids chose the batch, and may be measuring it: it is not split.
        return await self._join_batch(_Job(rows, (False,) * n_texts, task, min_batch_size=n_texts))

    def _tokenize(self, texts: Sequence[tuple[str, ...]], task: BundleTask) -> _Job:
        encoded = self._classifier.tokenize(texts)
        lengths = encoded.arrays["attention_mask"].sum(axis=1)
        return _Job(self._rows(encoded.arrays, lengths, task), encoded.cut, task)

    def _rows(
        self, arrays: Mapping[str, np.ndarray], lengths: Sequence[int] | np.ndarray, task: BundleTask
    ) -> tuple[TokenRow, ...]:
        names = self._bundle.text_inputs
        return tuple(
            TokenRow({name: arrays[name][row, :length] for name in names}, task.number)
            for row, length in enumerate(lengths)
        )

    async def _join_batch(self, job: _Job) -> LogitsResponse | ErrorResponse:
        # Ray closes a batch when its wait is over, even while the graph is busy, and then admits no further request.
        # Requests that come while the graph is busy wait here instead, and are the next batch together.
        await self._is_free.wait()
        return await self._answer(job)

    @serve.batch  # its limits are set in __init__
    async def _answer(self, jobs: list[_Job]) -> list[LogitsResponse | ErrorResponse]:
        self._is_free.clear()
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._run, jobs)
        finally:
            self._is_free.set()

    def _run(self, jobs: Sequence[_Job]) -> list[LogitsResponse | ErrorResponse]:
        """Run the rows of all jobs together; each job gets its own response or error."""
        rows = [row for job in jobs for row in job.rows]
        batch_size = max(self._batch_size, *(job.min_batch_size for job in jobs))
        try:
            result = run_rows(self._classifier, rows, batch_size=batch_size)
        except PromptfoldError as error:
            if len(jobs) > 1:  # one of them is at fault; the others still get their answers
                return [response for job in jobs for response in self._run([job])]
            is_callers = isinstance(error, TextError)  # anything else is the bundle's
            status = HTTPStatus.UNPROCESSABLE_ENTITY if is_callers else HTTPStatus.INTERNAL_SERVER_ERROR
            return [ErrorResponse(status, str(error))]
        ends = np.cumsum([len(job.rows) for job in jobs])
        return [
            self._response(job, result, slice(end - len(job.rows), end)) for job, end in zip(jobs, ends, strict=True)
        ]

    def _response(self, job: _Job, result: RowLogits, rows: slice) -> LogitsResponse:
        meaning = job.task.task
        return LogitsResponse(
            logits=result.logits[rows, : len(meaning.labels)],
            cut=job.cut,
            task=job.task.name,
            meaning=meaning,
            bundle_sha256=self._bundle_sha256,
            batch_size=int(result.batch_sizes[rows].max()),
            replica=self._replica,
            memory_mib=peak_memory_mib(),
        )
