"""Labels a file of any size in this process, chunk by chunk: every row is checked before the first one is labelled."""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from export.runtime.classifier import OnnxClassifier
from export.score.finished_chunks import ChunkRecord, FinishedChunks
from export.score.label import (
    NO_LABELS,
    ChunkLabeller,
    Labelled,
    add_up,
    check_header,
    describe_run,
    refuse_bad_rows,
)
from export.score.options import ScoreOptions
from export.score.place import local_place
from export.score.write_rows import OUT_TYPES, CsvStyle, merge_schema
from train.common.console import say
from train.common.errors import DataError, UsageError
from train.data.check_rows import BadRows, check_rows
from train.data.read_rows import Source, find_source, read_chunks, sha256_of_rows
from train.data.tasks import Task

if TYPE_CHECKING:
    import pyarrow


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(ScoreOptions):
    """What shall be labelled, and how."""

    source: Path
    out: Path


@dataclass(frozen=True)
class Inspected:
    """What the first pass over a file found."""

    sha256: str
    rows: int
    chunks: int
    is_labelled: bool
    schema: "pyarrow.Schema"
    bad_rows: int


def score_file(config: ScoreConfig) -> Labelled:
    """Label a file. What a user can fix is raised as a `PromptfoldError`."""
    source = _check_files(config)
    chunks = FinishedChunks(local_place(partial_folder(config.out)), str(config.out), config.out.suffix.lower())
    with chunks.held():
        return _score_file(config, source, chunks)


def _score_file(config: ScoreConfig, source: Source, chunks: FinishedChunks) -> Labelled:
    _refuse_older(config)  # again, as another run may have ended since
    chunks.refuse_leftovers(resume=config.resume, overwrite=config.overwrite)
    opened = config.open()
    before = _state(source)
    if source.description:
        say(source.description)
    found = inspect_source(config, source, opened.task)
    classifier = OnnxClassifier(
        opened.bundle, task=config.task, threads=config.threads, use_cuda=False if config.untrusted else None
    )
    execution = classifier.execution
    engine = f"{execution.engine}, {execution.provider}"
    is_labelled, precision = found.is_labelled, execution.precision
    fingerprint = {
        **{"input_sha256": found.sha256, "input_format": source.files[0].kind, "threads": config.threads},
        **describe_run(config, opened, is_labelled=is_labelled, precision=precision, engine=engine),
    }
    if config.resume:
        chunks.refuse_another_run(fingerprint)
    chunks = chunks.start(fingerprint, resume=config.resume)
    style = CsvStyle.of(source, chunks.suffix)
    labeller = ChunkLabeller(classifier, chunks, opened.task, found.is_labelled, config, found.schema, style)
    records = _label(config, source, labeller, found.rows)
    labelled = add_up(records, opened.task, is_labelled=found.is_labelled, max_length=opened.bundle.max_length)
    if _state(source) != before:
        raise DataError(
            f"{config.source} changed while it was read, so nothing was written. Start anew with --overwrite."
        )
    chunks.finish_file(found.chunks, config.out)
    return replace(labelled, rows_skipped=found.bad_rows)


def partial_folder(out: Path) -> Path:
    """The folder beside an output that keeps its finished chunks."""
    return out.with_name(f"{out.name}.partial")


def _check_files(config: ScoreConfig) -> Source:
    for flag, path in (("--in", config.source), ("--out", config.out)):
        if str(path) == "-":
            raise UsageError(f"{flag} -: a pipe cannot be read twice or resumed. Give a file.")
    if config.out.suffix.lower() not in OUT_TYPES:
        raise UsageError(f"--out {config.out}: give a file that ends in {', '.join(OUT_TYPES)}.")
    source = find_source(config.source, flag="--in", options=config.read_options)
    try:
        if config.out.is_dir():
            raise UsageError(f"--out {config.out} is a folder. Give the name of a file.")
        if config.out.exists() and any(config.out.samefile(file.path) for file in source.files):
            raise UsageError(f"--out {config.out} is the file that is read. Choose another name.")
        _refuse_older(config)
    except OSError as cause:
        raise UsageError(f"--out {config.out} cannot be used ({cause.strerror or cause}). Choose another.") from cause
    config.check()
    return source


def _refuse_older(config: ScoreConfig) -> None:
    if os.path.lexists(config.out) and not config.overwrite:
        raise UsageError(f"--out {config.out} is there already. Add --overwrite to replace it, or choose another name.")


def _state(source: Source) -> list[tuple[int, int, int]]:
    """What changes when a file is written: its inode, size and time."""
    states = [file.path.stat() for file in source.files]
    return [(state.st_ino, state.st_size, state.st_mtime_ns) for state in states]


def inspect_source(config: ScoreConfig, source: Source, task: Task) -> Inspected:
    """The first pass: refuse rows without text or with an unknown label, and what the output cannot hold."""
    name, label_column, suffix = str(config.source), task.label_column, config.out.suffix.lower()
    sha256, bad, n_rows, n_chunks = sha256_of_rows(source.files), BadRows(), 0, 0
    schema, is_labelled = None, False
    for chunk in read_chunks(source, config.chunk_rows):
        was_labelled = schema is None or label_column in schema.names
        if len(chunk.unreadable) < len(chunk):
            schema = merge_schema(chunk, schema, suffix)
            check_header(name, schema.names, task, config)
            is_labelled = not config.no_labels and label_column in schema.names
        if is_labelled and not was_labelled:
            raise DataError(
                f"{name}, row 1: column {label_column!r} holds no label, while later rows have one. Fix the row, or "
                f"{NO_LABELS} to leave labels unread."
            )
        bad.add(chunk, check_rows(chunk, task, with_labels=is_labelled))
        n_rows += len(chunk)
        n_chunks += 1
    refuse_bad_rows(bad, n_rows, config)
    assert schema is not None  # some row could be read
    return Inspected(sha256, n_rows, n_chunks, is_labelled, schema, bad.count)


def _label(
    config: ScoreConfig, source: Source, labeller: ChunkLabeller, n_rows: int
) -> Iterator[tuple[ChunkRecord, bool]]:
    """The second pass: the record of each chunk, and whether an earlier run had labelled it."""
    from tqdm import tqdm

    # smoothing=0: the mean so far. Rows are sorted by length within a chunk, so the pace varies.
    with tqdm(total=n_rows, unit="row", smoothing=0, file=sys.stderr) as bar:
        for number, chunk in enumerate(read_chunks(source, config.chunk_rows)):
            found = labeller.chunks.find(number, len(chunk)) if config.resume else None
            if found is not None:
                bar.initial += len(chunk)  # which tqdm leaves out of rows/s
                bar.update(len(chunk))
            yield found or labeller.label(number, chunk, bar.update), found is not None
