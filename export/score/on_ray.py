"""``python -m export.score BUNDLE --in 'FOLDER/*.parquet' --out FOLDER --engine ray``: a data set larger than memory.

Ray Data hands blocks of rows to workers, on one machine or on many; each holds the model and writes one Parquet file
a block (`export.score.finished_chunks`). A worker that dies is replaced and its block done again; a command that dies
goes on with ``--resume``. As with the other engine every row is checked first, on the cluster too: before a model is
loaded and before an older output is touched.

Ray Data 2.60's own restart (`ray.data.checkpoint.CheckpointConfig`) does not do for this. It loads the ids of all
finished rows into memory; it names what a resumed run writes anew, so that the order of the rows is lost where blocks
had finished out of order; it takes a finished file that was damaged or deleted for whole; it goes on with what another
bundle or other options had labelled; and its columns of paths and ids end up in the output.
"""

import logging
import os
import pickle
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from export.bundle.folder import load_bundle
from export.ray_cluster import RayCluster, import_ray, ray_cluster
from export.runtime.classifier import OnnxClassifier, best_precision
from export.runtime.session import CPU
from export.score.data_set import SUFFIX, Block, BlockReader, DataSet, find_data_set
from export.score.finished_chunks import ChunkRecord, FinishedChunks
from export.score.label import ChunkLabeller, Labelled, add_up, check_header, describe_run, refuse_bad_rows
from export.score.options import ScoreOptions
from export.score.place import parse_place
from train.common.errors import BundleError, DataError, EngineError, PromptfoldError, UsageError, first_line
from train.common.machine import peak_memory_mib
from train.data.check_rows import BadRows, check_rows
from train.data.tasks import Task

INSPECT_BLOCK_ROWS = 1 << 17
"""Rows that one task of the first pass checks, a chunk at a time."""


@dataclass(frozen=True, kw_only=True)
class RayScoreConfig(ScoreOptions):
    """What shall be labelled on a cluster, and how."""

    source: str
    """A Parquet file, a folder of them, a pattern of their paths, or the same as ``s3://BUCKET/KEY``."""
    out: str
    """The folder to write, or ``s3://BUCKET/KEY``."""
    address: str | None = None
    workers: int | None = None
    """Processes that hold the model; None for one a thread that there is room for."""


@dataclass(frozen=True)
class _Job:
    """All that a worker needs to know."""

    data_set: DataSet
    chunks: FinishedChunks
    bundle: Path
    """The bundle's folder on every machine."""
    task: Task
    """With the data set's columns."""
    is_labelled: bool
    options: ScoreOptions
    max_length: int
    fingerprint: dict[str, Any]
    """What decides the output's bytes; not workers and threads, so that a cluster that grew can go on."""
    threads: int = 1
    """Threads of each worker; known once the cluster is."""


@dataclass(frozen=True)
class _Outcome:
    """What became of a block."""

    number: int
    error: PromptfoldError | None = None
    record: ChunkRecord | None = None
    is_resumed: bool = False
    bad: BadRows = field(default_factory=BadRows)
    """Found by the first pass."""
    peak_mib: float = 0.0
    """The worker's largest resident size so far."""


def score_data_set(config: RayScoreConfig) -> Labelled:
    """Label a data set. What a user can fix is raised as a `PromptfoldError`."""
    config.check()
    if config.workers is not None and config.workers < 1:
        raise UsageError(f"--workers {config.workers}: give a whole number of at least 1.")
    import_ray()
    out = parse_place(config.out, "--out")
    chunks = FinishedChunks(out, str(out), SUFFIX)
    with chunks.held():
        return _score_data_set(config, chunks)


def _score_data_set(config: RayScoreConfig, chunks: FinishedChunks) -> Labelled:
    job = _plan(config, chunks)
    with ray_cluster(config.address) as cluster:
        workers, threads = _lay_out(cluster, config)
        job = replace(job, threads=threads)
        bad_rows = _inspect(job)
        job = replace(job, chunks=job.chunks.start(job.fingerprint, resume=config.resume))
        labelled, sizes = _label(job, workers)
        _finish(job, labelled, sizes)
    return replace(labelled, rows_skipped=bad_rows)


def _plan(config: RayScoreConfig, chunks: FinishedChunks) -> _Job:
    """Refuse what can be refused without reading a row and without a cluster."""
    source = parse_place(config.source, "--in")
    chunks.refuse_leftovers(resume=config.resume, overwrite=config.overwrite)
    opened = config.open()
    bundle, task = opened.bundle, opened.task
    data_set = find_data_set(source, chunks.place)
    columns = data_set.schema.names
    check_header(data_set.name(0), columns, task, config)
    is_labelled = not config.no_labels and task.label_column in columns
    # The precision is chosen here, so that no machine chooses for itself: on the CPU, which all of them have.
    precision = best_precision(bundle, on_cuda=False)
    common = describe_run(config, opened, is_labelled=is_labelled, precision=precision, engine=_engine())
    fingerprint = {"input_sha256_of_names_sizes_and_versions": data_set.fingerprint, **common}
    if config.resume:
        chunks.refuse_another_run(fingerprint)
    folder, max_length = bundle.folder.absolute(), bundle.max_length
    return _Job(data_set, chunks, folder, task, is_labelled, config, max_length, fingerprint)


def _engine() -> str:
    import onnxruntime

    return f"ONNX Runtime {onnxruntime.__version__}, {CPU}"


def _lay_out(cluster: RayCluster, config: RayScoreConfig) -> tuple[int, int]:
    """As many workers, and threads of each, as the machines have room for."""

    def room(threads: int) -> int:
        return sum(cpus // threads for cpus in cluster.node_cpus)

    workers = config.workers or max(1, room(config.threads or 1))
    most = cluster.cpus // workers
    threads = config.threads or next((n for n in range(most, 1, -1) if room(n) >= workers), 1)
    if room(threads) < workers:
        raise UsageError(
            f"--workers {workers} of {threads} threads each: the cluster has room for {room(threads)} "
            f"({cluster.cpus} CPUs on {len(cluster.node_cpus)} machines). Give fewer."
        )
    return workers, threads


def _inspect(job: _Job) -> int:
    """Check every row, and refuse those that cannot be used, or count them where they are to be skipped."""
    blocks = job.data_set.blocks(INSPECT_BLOCK_ROWS)
    outcomes = list(_run(blocks, "check", _inspect_batch, fn_kwargs={"job": job}))
    outcomes.sort(key=lambda outcome: outcome.number)
    if errors := [outcome.error for outcome in outcomes if outcome.error is not None]:
        raise errors[0]
    bad = BadRows()
    for outcome in outcomes:
        bad.join(outcome.bad)
    refuse_bad_rows(bad, sum(block.rows for block in blocks), job.options)
    return bad.count


def _inspect_batch(batch: dict[str, np.ndarray], job: _Job) -> dict[str, list[bytes]]:
    return _answer(batch, lambda block: _inspect_block(job, block))


def _inspect_block(job: _Job, block: Block) -> _Outcome:
    reader, bad = BlockReader(job.data_set), BadRows()
    step, end = job.options.chunk_rows, block.start + block.rows
    for start in range(block.start, end, step):
        chunk = reader.read(replace(block, start=start, rows=min(step, end - start)))
        bad.add(chunk, check_rows(chunk, job.task, with_labels=job.is_labelled))
    return _Outcome(block.number, bad=bad)


def _label(job: _Job, workers: int) -> tuple[Labelled, list[int]]:
    """Label every block that is not labelled yet; the result, and the size of each chunk in bytes."""
    from ray.data import ActorPoolStrategy

    blocks = job.data_set.blocks(job.options.chunk_rows)
    workers = min(workers, len(blocks))
    sizes = [0] * len(blocks)
    peak_mib = 0.0

    def records() -> Iterator[tuple[ChunkRecord, bool]]:
        nonlocal peak_mib
        pool = {"compute": ActorPoolStrategy(size=workers), "num_cpus": job.threads}
        for outcome in _run(blocks, "label", _Labeller, fn_constructor_kwargs={"job": job}, **pool):
            if outcome.error is not None:
                raise outcome.error
            assert outcome.record is not None
            sizes[outcome.number] = outcome.record.n_bytes
            peak_mib = max(peak_mib, outcome.peak_mib)
            yield outcome.record, outcome.is_resumed

    labelled = add_up(records(), job.task, is_labelled=job.is_labelled, max_length=job.max_length)
    peaks = {"peak_worker_mib": peak_mib, "peak_driver_mib": peak_memory_mib()}
    return replace(labelled, cluster={"workers": workers, "threads": job.threads, **peaks}), sizes


class _Labeller:
    """An actor of Ray Data that holds the model. If it cannot be loaded, that error is the answer to every block."""

    def __init__(self, job: _Job) -> None:
        # The tokenizer's threads, which would else be as many as the machine has cores in every worker.
        os.environ.setdefault("RAYON_NUM_THREADS", str(job.threads))
        self._job, self._reader = job, BlockReader(job.data_set)
        self._error: PromptfoldError | None = None
        try:
            self._labeller = ChunkLabeller(
                _load_same(job), job.chunks, job.task, job.is_labelled, job.options, job.data_set.schema
            )
        except PromptfoldError as error:
            self._error = error

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[bytes]]:
        return _answer(batch, self._label)

    def _label(self, block: Block) -> _Outcome:
        if self._error is not None:
            raise self._error
        found = self._job.chunks.find(block.number, block.rows)
        record = found or self._labeller.label(block.number, self._reader.read(block))
        # In a run that does not resume, a chunk that is found was written by a worker that died before it answered.
        is_resumed = found is not None and self._job.options.resume
        return _Outcome(block.number, None, record, is_resumed, peak_mib=peak_memory_mib())


def _load_same(job: _Job) -> OnnxClassifier:
    """Load the bundle that the command has, or raise why this machine cannot."""
    machine, expected = platform.node(), job.fingerprint
    remedy = "Copy the same bundle to the same path on every machine of the cluster, then add --resume."
    if not job.bundle.is_dir():
        raise BundleError(f"On {machine} there is no bundle folder {job.bundle}. {remedy}")
    try:
        bundle = load_bundle(job.bundle)
    except BundleError as cause:
        raise BundleError(f"On {machine}: {cause}") from cause
    sha256 = bundle.manifest_sha256
    if sha256 != expected["bundle_sha256"]:
        raise BundleError(
            f"On {machine} {job.bundle} is another bundle (manifest {sha256[:12]}…, here "
            f"{expected['bundle_sha256'][:12]}…). It labelled nothing. {remedy}"
        )
    if _engine() != expected["engine"]:
        raise BundleError(f"On {machine} there is {_engine()}, here {expected['engine']}. Install the same everywhere.")
    return OnnxClassifier(
        bundle, task=expected["task"], precision=expected["precision"], threads=job.threads, use_cuda=False
    )


def _finish(job: _Job, labelled: Labelled, sizes: list[int]) -> None:
    """Mark the output as whole, unless the input changed."""
    if find_data_set(job.data_set.place, job.chunks.place).fingerprint != job.data_set.fingerprint:
        raise DataError(f"{job.data_set.place} changed while it was read. Start anew with --overwrite.")
    scores = labelled.scores.values if labelled.scores is not None else None
    summary = {"rows": labelled.rows, "chunks": len(sizes), "texts_cut": labelled.texts_cut, "scores": scores}
    job.chunks.finish_folder(sizes, {**job.fingerprint, **summary})


def _run(blocks: list[Block], title: str, work: Callable[..., Any], **options: Any) -> Iterator[_Outcome]:
    """Let Ray Data's `map_batches` work through blocks; the outcome of each, in the order in which they are done."""
    from ray.data import DataContext, from_items
    from ray.exceptions import RayError, RayTaskError
    from tqdm import tqdm

    # Nothing of Ray Data's own on the terminal.
    context = DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    n_done, n_rows = 0, sum(block.rows for block in blocks)
    # A block of Ray's own for each: then they are done, and done again, one by one.
    rows = from_items([asdict(block) for block in blocks], override_num_blocks=len(blocks))
    try:
        with tqdm(total=n_rows, desc=title, unit="row", smoothing=0, file=sys.stderr) as bar:
            outcomes = rows.map_batches(work, batch_size=1, **options)
            for batch in outcomes.iter_batches(batch_size=None, prefetch_batches=0):
                for pickled in batch["outcome"]:
                    outcome: _Outcome = pickle.loads(pickled)  # noqa: S301 -- from our own workers
                    yield outcome
                    n_done += 1
                    if outcome.is_resumed:
                        bar.initial += blocks[outcome.number].rows  # which tqdm leaves out of rows/s
                    bar.update(blocks[outcome.number].rows)
    except RayTaskError:
        raise  # an error in our code, with its traceback
    except RayError as cause:
        raise EngineError(f"Ray gave up ({first_line(cause)}). What is done is kept: add --resume to go on.") from cause
    if n_done != len(blocks):
        raise EngineError(
            f"Ray answered for {n_done} of {len(blocks)} blocks. What is done is kept: add --resume to go on."
        )


def _answer(batch: dict[str, np.ndarray], work: Callable[[Block], _Outcome]) -> dict[str, list[bytes]]:
    """A block's outcome, as Ray Data passes it on; a user's error is one too: to Ray an exception is a crash."""
    block = Block(**{name: int(values[0]) for name, values in batch.items()})
    try:
        outcome = work(block)
    except PromptfoldError as error:
        outcome = _Outcome(block.number, error)
    return {"outcome": [pickle.dumps(outcome)]}
