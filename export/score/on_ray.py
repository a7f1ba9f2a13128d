"""``python -m export.score BUNDLE --in 'FOLDER/*.parquet' --out FOLDER --engine ray``: a data set larger than memory.

Ray Data hands blocks of rows to workers, on one machine or on many; each holds the model and writes one Parquet part a
block (`export.score.data_set`). A worker that dies is replaced and its block done again; a command that dies goes on with
``--resume``. (Ray Data's own checkpoints need a column of unique row ids, keep all of them in memory, and do not keep
the order.)

As with the other engine two passes are made, both on the cluster: the first refuses the first row that cannot be used,
before a model is loaded and before an older output is touched. That costs reading the files twice, which is little
beside the labelling, and no half-labelled output has to be thrown away for a row at its end.
"""

import json
import logging
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

import train.common.errors
from export.bundle.folder import Bundle, load_bundle
from export.ray_cluster import RayCluster, import_ray, ray_cluster
from export.runtime.batches import count_pairs, score_counts
from export.runtime.classifier import OnnxClassifier, best_precision
from export.runtime.session import CPU
from export.score.data_set import Block, BlockReader, DataSet, find_data_set, parse_place
from export.score.data_set_out import OutFolder
from export.score.label import Labelled, check_columns, check_texts, label_chunk, label_indices, refuse_clash
from export.score.options import Opened, ScoreOptions
from export.score.parts import pairs_met
from export.score.write_rows import write_parquet
from train.common.errors import BundleError, DataError, EngineError, PromptfoldError, UsageError, first_line
from train.common.machine import peak_memory_mib
from train.data.tasks import Task

INSPECT_BLOCK_ROWS = 1 << 17
"""Looked at by one task of the first pass, a chunk at a time."""


@dataclass(frozen=True, kw_only=True)
class RayScoreConfig(ScoreOptions):
    """What shall be labelled on a cluster, and how.

    Attributes:
        source: a Parquet file, a folder of them, a pattern of their paths, or the same as ``s3://BUCKET/KEY``.
        out: the folder to write, or ``s3://BUCKET/KEY``.
        address: of the cluster, as for `ray_cluster`.
        workers: processes that hold the model; None for one a thread that there is room for.
    """

    source: str
    out: str
    address: str | None = None
    workers: int | None = None


@dataclass(frozen=True)
class RayLabelled(Labelled):
    """What a run on a cluster did. Its seconds hold the start of the workers and the loading of their models.

    Attributes:
        workers: processes that labelled.
        threads: of each.
        peak_worker_mib: the largest resident size of any of them; 0 where all was labelled before.
        peak_driver_mib: the same of this process.
    """

    workers: int
    threads: int
    peak_worker_mib: float
    peak_driver_mib: float

    def document(self, out: str) -> dict[str, Any]:
        """The same as of the other engine, then what only this one has."""
        own = ("workers", "threads", "peak_worker_mib", "peak_driver_mib")
        return super().document(out) | {name: getattr(self, name) for name in own}


@dataclass(frozen=True)
class _Layout:
    """How many workers there are, and how many threads each has."""

    workers: int
    threads: int


@dataclass(frozen=True)
class _Job:
    """All that a worker needs to know.

    Attributes:
        data_set: to read.
        folder: to write.
        bundle: where it lies on every machine.
        manifest_sha256: of its manifest, which holds the hash of every other file.
        bundle_task: name of its task.
        precision: of the graph.
        engine: name and version of the library.
        task: with the data set's columns.
        is_labelled: whether the rows have labels.
        options: as the user gave them.
        threads: of a worker; how many is known once the cluster is.
    """

    data_set: DataSet
    folder: OutFolder
    bundle: Path
    manifest_sha256: str
    bundle_task: str
    precision: str
    engine: str
    task: Task
    is_labelled: bool
    options: ScoreOptions
    threads: int = 1


@dataclass(frozen=True)
class _Outcome:
    """What became of a block; crosses processes as JSON.

    Attributes:
        number: of the block.
        rows: of the block.
        trouble: class of a `PromptfoldError`, or empty.
        message: its own.
        is_resumed: whether an earlier run had labelled it.
        n_bytes: of its part.
        texts_cut: as in `PartRecord`.
        counts: as in `PartRecord`.
        peak_mib: the worker's largest resident size so far.
    """

    number: int
    rows: int
    trouble: str = ""
    message: str = ""
    is_resumed: bool = False
    n_bytes: int = 0
    texts_cut: int = 0
    counts: Sequence[Sequence[int]] = ()
    peak_mib: float = 0.0

    def error(self) -> PromptfoldError:
        """What the worker raised."""
        error: PromptfoldError = getattr(train.common.errors, self.trouble)(self.message)
        return error


def score_data_set(config: RayScoreConfig) -> RayLabelled:
    """Label a data set.

    Raises:
        UsageError: a flag cannot be used, Ray is not installed, or the output may not or cannot be written.
        DataError: a file cannot be read or lacks a column, a row has no text or an unknown label; or a file changed.
        BundleError: the bundle cannot be used, or is missing or another one on a machine of the cluster.
        EngineError: the cluster cannot be reached, or gave up.
    """
    config.check()
    if config.workers is not None and config.workers < 1:
        raise UsageError(f"--workers {config.workers}: give a whole number of at least 1.")
    import_ray()
    source, out = parse_place(config.source, "--in"), parse_place(config.out, "--out")
    folder = OutFolder(out)
    folder.refuse_leftovers(resume=config.resume, overwrite=config.overwrite)
    opened = config.open()
    task = opened.task
    data_set = find_data_set(source, out)
    columns = data_set.schema.names
    check_columns(data_set.name(0), columns, task, needs_labels=config.label_column is not None)
    refuse_clash(source, columns, task, all_probabilities=config.all_probabilities)
    job = _plan(config, opened, data_set, folder)
    fingerprint = _fingerprint(job)
    if config.resume:
        folder.refuse_another_run(fingerprint)
    with ray_cluster(config.address) as cluster:
        layout = _lay_out(cluster, config)
        _inspect(job)
        folder = folder.prepare(fingerprint, resume=config.resume)
        labelled = _label(replace(job, folder=folder, threads=layout.threads), layout, opened.bundle)
        if find_data_set(source, out).fingerprint != data_set.fingerprint:
            raise DataError(f"{source} changed while it was read. Start anew with --overwrite.")
        _finish(folder, fingerprint, labelled)
    return labelled.summary


def _lay_out(cluster: RayCluster, config: RayScoreConfig) -> _Layout:
    """As many workers and threads as the machines have room for."""

    def room(threads: int) -> int:
        return sum(cpus // threads for cpus in cluster.node_cpus)

    workers = config.workers or max(1, room(config.threads or 1))
    threads = config.threads or max(1, cluster.cpus // workers)
    while config.threads is None and threads > 1 and room(threads) < workers:
        threads -= 1
    if room(threads) < workers:
        raise UsageError(
            f"--workers {workers} of {threads} threads each: the cluster has room for {room(threads)} "
            f"({cluster.cpus} CPUs on {len(cluster.node_cpus)} machines). Give fewer."
        )
    return _Layout(workers, threads)


def _plan(config: RayScoreConfig, opened: Opened, data_set: DataSet, folder: OutFolder) -> _Job:
    bundle, task = opened.bundle, opened.task
    return _Job(
        data_set=data_set,
        folder=folder,
        bundle=bundle.folder.absolute(),
        manifest_sha256=bundle.manifest_sha256,
        bundle_task=bundle.find_task(config.task).name,
        # Decided here, so that no machine chooses for itself. On the CPU, which all of them have.
        precision=best_precision(bundle, on_cuda=False),
        engine=_engine(),
        task=task,
        is_labelled=not config.no_labels and task.label_column in data_set.schema.names,
        # Without the places, which have their own entries.
        options=ScoreOptions(**{item.name: getattr(config, item.name) for item in fields(ScoreOptions)}),
    )


def _engine() -> str:
    import onnxruntime

    return f"ONNX Runtime {onnxruntime.__version__}, {CPU}"


def _fingerprint(job: _Job) -> dict[str, Any]:
    """What decides the output, under names that a message can show.

    Workers and threads are left out: they decide the last bits of a probability at most, and a cluster that grew must
    be able to go on.
    """
    options = job.options
    return {
        "input_sha256_of_names_sizes_and_versions": job.data_set.fingerprint,
        "bundle_sha256": job.manifest_sha256,
        "task": job.bundle_task,
        "precision": job.precision,
        "text_columns": ",".join(job.task.text_columns),
        "label_column": job.task.label_column if job.is_labelled else None,
        "all_probabilities": options.all_probabilities,
        "batch_size": options.batch_size,
        "chunk_rows": options.chunk_rows,
        "engine": job.engine,
    }


# The first pass.


def _inspect(job: _Job) -> None:
    """Look at every row, and refuse the first one that cannot be used."""
    blocks = job.data_set.blocks(INSPECT_BLOCK_ROWS)
    outcomes = _run(
        blocks, "check", lambda rows: rows.map_batches(_inspect_batch, batch_size=1, fn_kwargs={"job": job})
    )
    bad = [outcome for outcome in outcomes.values() if outcome.trouble]
    if bad:
        raise min(bad, key=lambda outcome: outcome.number).error()


def _inspect_batch(batch: dict[str, np.ndarray], job: _Job) -> dict[str, list[str]]:
    return _answer(_block(batch), lambda block: _inspect_block(job, block))


def _inspect_block(job: _Job, block: Block) -> _Outcome:
    reader = BlockReader(job.data_set)
    name = job.data_set.name(block.file)
    step = job.options.chunk_rows
    try:
        for start in range(block.start, block.start + block.rows, step):
            rows = min(step, block.start + block.rows - start)
            chunk = reader.read(Block(block.number, block.file, start, rows))
            check_texts(chunk, job.task, name)
            if job.is_labelled:
                label_indices(chunk, job.task, name)
    finally:
        reader.close()
    return _Outcome(block.number, block.rows)


# The second pass.


class _Labeller:
    """An actor of Ray Data that holds the model. Trouble of its own is its answer to every block: none is labelled."""

    def __init__(self, job: _Job) -> None:
        # The tokenizer's threads, which would else be as many as the machine has cores in every worker.
        os.environ.setdefault("RAYON_NUM_THREADS", str(job.threads))
        self._job = job
        self._reader = BlockReader(job.data_set)
        self._trouble: PromptfoldError | None = None
        try:
            self._classifier = _load_same(job)
        except PromptfoldError as error:
            self._trouble = error

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        return _answer(_block(batch), self._label)

    def _label(self, block: Block) -> _Outcome:
        import pyarrow

        if self._trouble is not None:
            raise self._trouble
        job = self._job
        found = job.folder.find(block)
        # In a run that does not resume, such a part is of a worker that died before it could answer.
        is_resumed = found is not None and job.options.resume
        if found is None:
            chunk = self._reader.read(block)
            labelled = label_chunk(
                self._classifier,
                chunk,
                job.task,
                job.data_set.name(block.file),
                is_labelled=job.is_labelled,
                batch_size=job.options.batch_size,
                all_probabilities=job.options.all_probabilities,
            )
            sink = pyarrow.BufferOutputStream()
            write_parquet(sink, chunk, labelled.added, chunk.arrow.schema)
            counts = pairs_met(labelled.counts)
            found = job.folder.add(block, sink.getvalue(), texts_cut=labelled.texts_cut, counts=counts)
        return _Outcome(
            number=block.number,
            rows=block.rows,
            is_resumed=is_resumed,
            n_bytes=found.n_bytes,
            texts_cut=found.record.texts_cut,
            counts=found.record.counts,
            peak_mib=peak_memory_mib(),
        )


def _load_same(job: _Job) -> OnnxClassifier:
    """Load the bundle that the driver has, or raise what is the matter with this machine."""
    machine = platform.node()
    remedy = "Copy the same bundle to the same path on every machine of the cluster, then add --resume."
    if not job.bundle.is_dir():
        raise BundleError(f"On {machine} there is no bundle folder {job.bundle}. {remedy}")
    try:
        bundle = load_bundle(job.bundle)
    except BundleError as cause:
        raise BundleError(f"On {machine}: {cause}") from cause
    sha256 = bundle.manifest_sha256
    if sha256 != job.manifest_sha256:
        raise BundleError(
            f"On {machine} {job.bundle} is another bundle (manifest {sha256[:12]}…, here {job.manifest_sha256[:12]}…). "
            f"It labelled nothing. {remedy}"
        )
    if _engine() != job.engine:
        raise BundleError(f"On {machine} there is {_engine()}, here {job.engine}. Install the same everywhere.")
    return OnnxClassifier(bundle, task=job.bundle_task, precision=job.precision, threads=job.threads, use_cuda=False)


@dataclass(frozen=True)
class _Done:
    """What the second pass did, and the size of each part in bytes."""

    summary: RayLabelled
    sizes: list[int]


def _label(job: _Job, layout: _Layout, bundle: Bundle) -> _Done:
    from ray.data import ActorPoolStrategy

    blocks = job.data_set.blocks(job.options.chunk_rows)
    workers = min(layout.workers, len(blocks))
    start = time.perf_counter()
    outcomes = _run(
        blocks,
        "label",
        lambda rows: rows.map_batches(
            _Labeller,
            batch_size=1,
            fn_constructor_kwargs={"job": job},
            compute=ActorPoolStrategy(size=workers),
            num_cpus=layout.threads,
        ),
        stop_at_trouble=True,
    )
    seconds = time.perf_counter() - start
    counts = count_pairs(job.task, [], [])
    for outcome in outcomes.values():
        for expected, predicted, n in outcome.counts:
            counts[expected, predicted] += n
    done = outcomes.values()
    summary = RayLabelled(
        rows=job.data_set.rows,
        rows_resumed=sum(outcome.rows for outcome in done if outcome.is_resumed),
        parts=len(blocks),
        seconds=seconds,
        texts_cut=sum(outcome.texts_cut for outcome in done),
        scores=score_counts(job.task, counts) if job.is_labelled else None,
        max_length=bundle.max_length,
        workers=workers,
        threads=layout.threads,
        peak_worker_mib=max(outcome.peak_mib for outcome in done),
        peak_driver_mib=peak_memory_mib(),
    )
    return _Done(summary, [outcomes[block.number].n_bytes for block in blocks])


def _finish(folder: OutFolder, fingerprint: dict[str, Any], done: _Done) -> None:
    labelled = done.summary
    scores = labelled.scores.values if labelled.scores is not None else None
    folder.finish(
        done.sizes,
        {
            **fingerprint,
            "rows": labelled.rows,
            "parts": labelled.parts,
            "texts_cut": labelled.texts_cut,
            "scores": scores,
        },
    )


# What both passes share.


def _run(
    blocks: list[Block], title: str, plan: Callable[[Any], Any], *, stop_at_trouble: bool = False
) -> dict[int, _Outcome]:
    """Let Ray Data work through blocks.

    Args:
        title: of the bar that says how far it is.
        plan: from a `ray.data.Dataset` of blocks to one of outcomes.
        stop_at_trouble: whether the first trouble is raised at once.

    Returns:
        The outcomes by the number of their block: of each exactly one

    Raises:
        EngineError: Ray gave up.
    """
    from ray.data import from_items
    from ray.exceptions import RayError, RayTaskError
    from tqdm import tqdm

    _quieten()
    outcomes: dict[int, _Outcome] = {}
    # A block of Ray's own for each: then they are done, and done again, one by one.
    rows = from_items([asdict(block) for block in blocks], override_num_blocks=len(blocks))
    try:
        with tqdm(
            total=sum(block.rows for block in blocks), desc=title, unit="row", smoothing=0, file=sys.stderr
        ) as bar:
            for batch in plan(rows).iter_batches(batch_size=None, prefetch_batches=0):
                for text in batch["outcome"]:
                    outcome = _Outcome(**json.loads(text))
                    if outcome.trouble and stop_at_trouble:
                        raise outcome.error()
                    outcomes[outcome.number] = outcome
                    if outcome.is_resumed:
                        bar.initial += outcome.rows  # which tqdm leaves out of rows/s
                    bar.update(outcome.rows)
    except RayTaskError:
        raise  # a bug of ours, with its traceback
    except RayError as cause:
        raise EngineError(f"Ray gave up ({first_line(cause)}). What is done is kept: add --resume to go on.") from cause
    if len(outcomes) != len(blocks):
        raise EngineError(
            f"Ray answered for {len(outcomes)} of {len(blocks)} blocks. What is done is kept: add --resume to go on."
        )
    return outcomes


def _block(batch: dict[str, np.ndarray]) -> Block:
    return Block(**{name: int(values[0]) for name, values in batch.items()})


def _answer(block: Block, work: Callable[[Block], _Outcome]) -> dict[str, list[str]]:
    """An outcome as Ray Data passes it on. What a user can mend is one too: to Ray an exception would be a crash."""
    try:
        outcome = work(block)
    except PromptfoldError as error:
        outcome = _Outcome(block.number, block.rows, trouble=type(error).__name__, message=str(error))
    return {"outcome": [json.dumps(asdict(outcome))]}


def _quieten() -> None:
    """No bars and no plans of Ray Data's on the terminal: one bar of ours says how far it is."""
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
