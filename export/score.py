"""``python -m export.score BUNDLE --in F --out G``: label a file of any size with ONNX Runtime.

Reads and writes .csv, .jsonl and .parquet, and turns any of them into any other. The same rows in the same
order with all their columns, then

    prediction             name of the most probable label
    probability            of that label
    probability_LABEL      of each one, with --all-probabilities

Where the file holds true labels, the task's metrics are printed too; the last line on standard output is
one JSON document. Memory does not grow with the file: a first pass reads every row and refuses the first one
that cannot be used, before anything is computed; the second labels chunk after chunk. Each finished chunk is
kept in G.partial until the last is done (``--resume``). Needs neither torch nor transformers.

With ``--engine ray`` a data set of many Parquet files is labelled on a cluster (`export.score_ray`).
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.bundle import FILES
from export.labelling import (
    CHUNK_ROWS,
    NO_LABELS,
    Labelled,
    ScoreOptions,
    check_columns,
    check_texts,
    label_chunk,
    label_indices,
    refuse_clash,
)
from export.parts import PartRecord, Parts
from export.predict import count_pairs, score_counts
from export.runtime import OnnxClassifier
from export.tables import Chunk, merge_types, parquet_schema, read_chunks, write_part
from train.console import Parser, names, run_main, say
from train.data import FILE_TYPES
from train.errors import DataError, UsageError
from train.files import sha256_of_file
from train.tasks import Task

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


def _command(argv: Sequence[str] | None) -> None:
    parser = Parser(
        prog="python -m export.score",
        description="Label a CSV, JSON lines or Parquet file of any size with ONNX Runtime, or a folder of Parquet files "
        "on a Ray cluster; the last line is JSON.",
        epilog="example: python -m export.score bundles/minilm-mrpc --in pairs.csv --out labelled.parquet",
    )
    suffixes = ", ".join(FILE_TYPES)
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder that `python -m export` wrote")
    parser.add_argument(
        "--in",
        dest="source",
        required=True,
        metavar="F",
        help=f"file to label ({suffixes}); with --engine ray a .parquet file, a folder or a quoted pattern of them, or "
        "s3://BUCKET/KEY",
    )
    parser.add_argument(
        "--out",
        required=True,
        metavar="G",
        help=f"file to write ({suffixes}); with --engine ray a folder, or s3://BUCKET/KEY",
    )
    parser.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="local: one process on this machine; ray: Ray Data, on a cluster (default: local)",
    )
    parser.add_argument(
        "--address", metavar="HOST:PORT", help="with --engine ray: of the cluster (default: start one on this machine)"
    )
    parser.add_argument(
        "--workers",
        type=int,
        help="with --engine ray: processes that hold the model (default: one a CPU of the cluster)",
    )
    parser.add_argument("--task", metavar="NAME", help="which task, where the bundle holds several")
    parser.add_argument(
        "--text-columns",
        type=names,
        default=(),
        metavar="COLUMNS",
        help="the file's text columns (default: the bundle's)",
    )
    parser.add_argument(
        "--label-column", metavar="COLUMN", help="its label column (default: the bundle's, where the file has it)"
    )
    parser.add_argument("--no-labels", action="store_true", help="leave labels unread and score nothing")
    parser.add_argument("--all-probabilities", action="store_true", help="write the probability of every label")
    parser.add_argument("--batch-size", type=int, default=32, help="texts in one run of the graph (default: 32)")
    parser.add_argument(
        "--chunk-rows",
        type=int,
        default=CHUNK_ROWS,
        help=f"rows in memory at a time, and lost at most when the run is killed (default: {CHUNK_ROWS})",
    )
    parser.add_argument(
        "--threads", type=int, help="threads on the CPU, of each worker (default: all usable cores, shared out)"
    )
    parser.add_argument("--resume", action="store_true", help="go on with what an interrupted run left beside --out")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an older --out, or start an interrupted run anew"
    )
    parser.add_argument(
        "--untrusted",
        action="store_true",
        help="open the bundle in a process of its own first, under limits of memory and time, and run it on the CPU",
    )
    options = vars(parser.parse_args(argv))
    out = str(options["out"])
    labelled = _run_ray(options) if options.pop("engine") == "ray" else _run_local(options)
    say(
        f"{out}: {labelled.rows} rows, {labelled.rows - labelled.rows_resumed} of them labelled in "
        f"{labelled.seconds:.1f} s ({labelled.rows_per_second:.0f} rows/s)"
    )
    if labelled.texts_cut:
        say(f"{labelled.texts_cut} texts are longer than {labelled.max_length} tokens and lost their end")
    if labelled.scores is not None:
        say(f"against the file's labels: {labelled.scores}")
    say(json.dumps(labelled.document(out)))


def _run_local(options: dict[str, Any]) -> Labelled:
    for name in ("address", "workers"):
        if options.pop(name) is not None:
            raise UsageError(f"--{name} is for --engine ray. Leave it out, or add that.")
    config = ScoreConfig(**options | {name: Path(options[name]) for name in ("source", "out")})
    try:
        return score_file(config)
    except KeyboardInterrupt:
        if Parts(config.out).folder.is_dir():
            print(_KEPT, file=sys.stderr)
        raise


def _run_ray(options: dict[str, Any]) -> Labelled:
    # With it comes Ray, which nothing else here needs.
    from export.score_ray import RayScoreConfig, score_data_set

    try:
        return score_data_set(RayScoreConfig(**options))
    except KeyboardInterrupt:
        print(_KEPT, file=sys.stderr)
        raise


_KEPT = "What is done is kept: add --resume to go on."


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    return run_main(_command, argv)


if __name__ == "__main__":
    sys.exit(main())
