"""Labels a file of any size in this process, chunk by chunk."""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.bundle.folder import FILES
from export.runtime.batches import count_pairs, score_counts
from export.runtime.classifier import OnnxClassifier
from export.score.label import NO_LABELS, Labelled, check_columns, check_texts, label_chunk, label_indices, refuse_clash
from export.score.options import ScoreOptions
from export.score.parts import PartRecord, Parts
from export.score.write_rows import merge_types, parquet_schema, write_part
from train.common.errors import DataError, UsageError
from train.common.folder_record import sha256_of_file
from train.data.load import FILE_TYPES
from train.data.read_rows import Chunk, read_chunks
from train.data.tasks import Task

if TYPE_CHECKING:
    import pyarrow


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(ScoreOptions):
    """What shall be labelled, and how.

    Attributes:
        source: the file to label.
        out: the file to write.
    """

    source: Path
    out: Path


# The first pass: every row is looked at before anything is computed.


@dataclass(frozen=True)
class Inspected:
    """What the first pass found.

    Attributes:
        sha256: of the file.
        rows: how many there are.
        columns: the file's, in the order in which they first appear.
        is_labelled: whether every row has a known label.
        schema: of the output without the new columns; None unless that is Parquet.
    """

    sha256: str
    rows: int
    columns: tuple[str, ...]
    is_labelled: bool
    schema: "pyarrow.Schema | None"


def inspect_file(config: ScoreConfig, task: Task) -> Inspected:
    """Read the file once and refuse the first row that cannot be used.

    Args:
        task: with the file's text and label columns.

    Raises:
        DataError: the file cannot be read, has no rows or lacks a column, a row has no text or an
            unknown label, or the columns cannot be written in the format of the output.
    """
    file, out_suffix, wants_labels = config.source, config.out.suffix, not config.no_labels
    sha256 = sha256_of_file(file)
    rows = 0
    types: dict[str, Any] = {}
    for chunk in read_chunks(file, config.chunk_rows):
        is_first = not rows
        rows += len(chunk)
        columns = chunk.columns
        if is_first:
            check_columns(file, columns, task, needs_labels=config.label_column is not None)
        check_texts(chunk, task, file)
        was_labelled = task.label_column in types
        if wants_labels and (was_labelled or task.label_column in columns):
            if not is_first and not was_labelled:
                raise DataError(
                    f"{file}, row 1: column {task.label_column!r} holds no label, while later rows have one. "
                    f"Mend the row, or {NO_LABELS} to leave labels unread."
                )
            label_indices(chunk, task, file)
        for name in columns:
            types[name] = merge_types(file, chunk, name, types.get(name), out_suffix)
    if not rows:
        raise DataError(f"{file} has no rows. Give a file with at least one text.")
    return Inspected(
        sha256=sha256,
        rows=rows,
        columns=tuple(types),
        is_labelled=wants_labels and task.label_column in types,
        schema=parquet_schema(file, chunk, types) if out_suffix == ".parquet" else None,
    )


# The second pass, and what surrounds both.


def score_file(config: ScoreConfig) -> Labelled:
    """Label a file.

    Raises:
        UsageError: a flag cannot be used, or the output may not or cannot be written.
        DataError: as `inspect_file` raises; or the file changed while it was read.
        BundleError: the bundle cannot be used.
    """
    _check_files(config)
    parts = Parts(config.out)
    parts.refuse_leftovers(resume=config.resume, overwrite=config.overwrite)
    opened = config.open()
    task = opened.task
    before = _state(config.source)
    found = inspect_file(config, task)
    refuse_clash(config.source, found.columns, task, all_probabilities=config.all_probabilities)
    classifier = OnnxClassifier(
        opened.bundle, task=config.task, threads=config.threads, use_cuda=False if config.untrusted else None
    )
    parts.prepare(_fingerprint(config, task, found, classifier), resume=config.resume)
    labelled = _Run(config, classifier, task, found, parts).label()
    if _state(config.source) != before:
        raise DataError(
            f"{config.source} changed while it was read, so nothing was written. Start anew with --overwrite."
        )
    parts.finish(labelled.parts)
    return labelled


def _check_files(config: ScoreConfig) -> None:
    for flag, path in (("--in", config.source), ("--out", config.out)):
        if str(path) == "-":
            raise UsageError(f"{flag} -: a pipe cannot be gone through twice or gone on with. Give a file.")
        if path.suffix not in FILE_TYPES:
            raise UsageError(f"{flag} {path}: give a file that ends in {', '.join(FILE_TYPES)}.")
    _check_source(config.source)
    try:
        _check_out(config)
    except OSError as cause:
        raise UsageError(f"--out {config.out} cannot be used ({cause.strerror or cause}). Choose another.") from cause
    config.check()


def _check_source(file: Path) -> None:
    try:
        if not file.is_file():
            raise DataError(f"--in {file}: there is no such file.")
        with file.open("rb") as stream:
            is_empty = not stream.read(1)
    except OSError as cause:
        raise DataError(f"--in {file} cannot be read ({cause.strerror or cause}).") from cause
    if is_empty:
        raise DataError(f"--in {file} is empty. Give a file with at least one text.")


def _check_out(config: ScoreConfig) -> None:
    if config.out.is_dir():
        raise UsageError(f"--out {config.out} is a folder. Give the name of a file.")
    if config.out.exists() and config.out.samefile(config.source):
        raise UsageError(f"--out {config.out} is the file that is read. Choose another name.")
    if os.path.lexists(config.out) and not config.overwrite:
        raise UsageError(f"--out {config.out} is there already. Add --overwrite to replace it, or choose another name.")


def _state(file: Path) -> tuple[int, int, int]:
    """What changes when a file is written: its inode, size and time."""
    state = file.stat()
    return state.st_ino, state.st_size, state.st_mtime_ns


def _fingerprint(config: ScoreConfig, task: Task, found: Inspected, classifier: OnnxClassifier) -> dict[str, Any]:
    """What decides the output's bytes, under names that a message can show."""
    return {
        "input_sha256": found.sha256,
        "input_format": config.source.suffix,
        # The manifest holds the hash of every other file.
        "bundle_sha256": sha256_of_file(classifier.bundle.folder / FILES.manifest),
        "task": classifier.task.name,
        "precision": classifier.execution.precision,
        "text_columns": ",".join(task.text_columns),
        "label_column": task.label_column if found.is_labelled else None,
        "all_probabilities": config.all_probabilities,
        "batch_size": config.batch_size,
        "chunk_rows": config.chunk_rows,
        "threads": config.threads,
        "engine": f"{classifier.execution.engine}, {classifier.execution.provider}",
    }


@dataclass(frozen=True)
class _Run:
    """The second pass: everything is checked and loaded."""

    config: ScoreConfig
    classifier: OnnxClassifier
    task: Task
    found: Inspected
    parts: Parts

    def label(self) -> Labelled:
        """Label what is not labelled yet, chunk by chunk."""
        from tqdm import tqdm

        n_parts = rows_resumed = texts_cut = 0
        counts = count_pairs(self.task, [], [])
        start = time.perf_counter()
        # smoothing=0: the mean so far. Texts are sorted within a chunk, so the pace swings with their length.
        with tqdm(total=self.found.rows, unit="row", smoothing=0, file=sys.stderr) as bar:
            for chunk in read_chunks(self.config.source, self.config.chunk_rows):
                record = self.parts.find(n_parts, len(chunk)) if self.config.resume else None
                if record is not None:
                    rows_resumed += len(chunk)
                    bar.initial += len(chunk)  # which tqdm leaves out of rows/s
                    bar.update(len(chunk))
                else:
                    record = self._label_chunk(n_parts, chunk, bar.update)
                n_parts += 1
                texts_cut += record.texts_cut
                for expected, predicted, n in record.counts:
                    counts[expected, predicted] += n
        seconds = time.perf_counter() - start
        return Labelled(
            rows=self.found.rows,
            rows_resumed=rows_resumed,
            parts=n_parts,
            seconds=seconds,
            texts_cut=texts_cut,
            scores=score_counts(self.task, counts) if self.found.is_labelled else None,
            max_length=self.classifier.bundle.max_length,
        )

    def _label_chunk(self, number: int, chunk: Chunk, report: Callable[[int], object]) -> PartRecord:
        labelled = label_chunk(
            self.classifier,
            chunk,
            self.task,
            self.config.source,
            is_labelled=self.found.is_labelled,
            batch_size=self.config.batch_size,
            all_probabilities=self.config.all_probabilities,
            report=report,
        )
        return self.parts.add(
            number,
            lambda path: write_part(path, chunk, labelled.added, columns=self.found.columns, schema=self.found.schema),
            rows=len(chunk),
            cut=labelled.texts_cut,
            counts=labelled.counts,
        )
