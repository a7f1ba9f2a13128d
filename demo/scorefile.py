"""A visitor's file through both engines: read within bounds, labelled, held against its labels, written again.

The same rows come out in the same order and format with all their columns, then

    prediction_pytorch, probability_pytorch     the most probable label and its probability; not there where the
                                                page runs without PyTorch, as is "agree"
    prediction_onnx, probability_onnx           the same of ONNX Runtime
    agree                                       whether both labels are the same

Whatever a complaint says of a file, it names it as the visitor does: where it lies here is nobody's business.
"""

import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from demo.backends import COMPILED, AnyEngine
from demo.stage import Opened, Setup, Stage
from export.bundle import BUNDLE, FILES
from export.labelling import check_texts, label_indices
from export.predict import Classified, count_pairs, in_batches, score_counts
from export.tables import ArrowChunk, Chunk, parquet_schema, read_chunks, write_part
from export.texts import MAX_CHARACTERS
from train.console import names
from train.data import FILE_TYPES
from train.errors import BundleError, DataError, EngineError, UsageError, first_line
from train.files import read_json_object
from train.model import DECODERS
from train.tasks import Scores, Task

if TYPE_CHECKING:
    import pyarrow

MAX_BYTES = 5_000_000
"""Of an uploaded file."""

MAX_ROWS = 2_000

MAX_DECODED_BYTES = 20_000_000
"""Of a Parquet file's columns without compression, and of what is read from them."""

MAX_PARQUET_VALUES = 2_000_000
"""In a Parquet file: of lists that repeat one value, a few bytes may hold billions."""

PARQUET_STEP_ROWS = 16
"""Read at a time: a page that is small, and a dictionary that names one long text often, are noticed in time."""

BATCH_ROWS = 8
"""Texts in one run. On a CPU more are no faster, and a cancelled file ends the sooner."""

SLICE_SECONDS = 0.5
"""So long the engines are held, then others may measure."""

GIVE_WAY_SECONDS = 0.02
"""Between two slices; a lock that is taken again at once never gets to whoever waits for it."""

MAX_PREVIEW_ROWS = 50

MESSAGE_CHARACTERS = 600
"""A complaint quotes from the file, which may hold anything."""

PREDICTION, PROBABILITY, AGREE = "prediction", "probability", "agree"

SIDES = ("pytorch", "onnx")
"""The engines, as the added columns name them."""


@dataclass(frozen=True, eq=False)
class Upload:
    """A file that was read and checked.

    Attributes:
        name: as the visitor calls it, without any folder.
        suffix: one of `FILE_TYPES`.
        rows: all of it.
        task: what the adapter learned, with the file's columns.
        expected: of each row its class index, where the file has labels.
        schema: of a Parquet file.
    """

    name: str
    suffix: str
    rows: Chunk
    task: Task
    expected: tuple[int, ...] | None
    schema: "pyarrow.Schema | None"

    @property
    def texts(self) -> list[tuple[str, ...]]:
        """Of each row its one or two sentences."""
        return list(zip(*(self.rows.column(name) for name in self.task.text_columns), strict=True))


def read_upload(path: Path | None, task: Task, *, text_columns: str = "", label_column: str = "") -> Upload:
    """Read a file that a visitor sent; nothing of it is read before its size is known.

    Args:
        path: where it lies; its name is the visitor's.
        task: what the adapter learned.
        text_columns: the file's, with commas between, where they are not named as in training.
        label_column: the same of its labels.

    Raises:
        UsageError: there is no file, or as many columns are not named as the model reads texts.
        DataError: it is too large, is not what its name says, lacks a column or has one too many, or a row cannot be
            used.
    """
    if path is None:
        raise UsageError(f"No file was given. Choose one that ends in {', '.join(FILE_TYPES)}.")
    name, suffix = path.name, path.suffix.lower()
    if suffix not in FILE_TYPES:
        raise DataError(f"{name}: give a file that ends in {', '.join(FILE_TYPES)}.")
    try:
        size_bytes = path.stat().st_size
    except OSError as cause:
        raise DataError(f"{name} is no longer here. Upload it again.") from cause
    if not size_bytes:
        raise DataError(f"{name} is empty. Give a file with at least one text.")
    if size_bytes > MAX_BYTES:
        raise DataError(
            f"{name} has {size_bytes:,} bytes; at most {MAX_BYTES:,} are taken here. Give fewer rows, or label it with "
            "python -m export.score, which takes files of any size."
        )
    with _naming(path):
        rows = _read_parquet(path) if suffix == ".parquet" else _read_text(path, suffix)
        schema = parquet_schema(path, rows, {}) if isinstance(rows, ArrowChunk) else None
        task = _with_columns(task, rows, name, text_columns, label_column)
        check_texts(rows, task, name)
        _check_lengths(rows, task, name)
        expected = None
        if task.label_column in rows.columns:
            expected = tuple(label_indices(rows, task, name, unread="rename the column"))
    return Upload(name=name, suffix=suffix, rows=rows, task=task, expected=expected, schema=schema)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Take the file's folder out of complaints, and what is too long."""
    try:
        yield
    except DataError as error:
        words = str(error).replace(str(path), path.name)
        raise DataError(words if len(words) <= MESSAGE_CHARACTERS else f"{words[:MESSAGE_CHARACTERS]} …") from error


def _read_text(path: Path, suffix: str) -> Chunk:
    """All rows of a CSV or JSON lines file."""
    content = path.read_bytes()
    zero = content.find(b"\0")
    if zero >= 0:
        raise DataError(
            f"{path}, byte {zero + 1:,} is zero, as in no text. Is it really a {suffix} file? Save it as such, in UTF-8."
        )
    try:
        content.decode()
    except UnicodeDecodeError as cause:
        line = content.count(b"\n", 0, cause.start) + 1
        raise DataError(
            f"{path}, line {line:,}, byte {cause.start + 1:,} of the file is not valid UTF-8. Save it as a {suffix} file "
            "in UTF-8."
        ) from cause
    rows = next(read_chunks(path, MAX_ROWS + 1), None)
    if rows is None:
        raise DataError(f"{path} has no rows. Give a file with at least one text.")
    if len(rows) > MAX_ROWS:
        raise _too_many_rows(path)
    return rows


def _too_many_rows(path: Path) -> DataError:
    return DataError(
        f"{path} has more than {MAX_ROWS:,} rows, which is the most that is taken here. Give fewer, or label it with "
        "python -m export.score, which takes files of any size."
    )


def _read_parquet(path: Path) -> ArrowChunk:
    """All rows of a Parquet file."""
    import pyarrow

    with path.open("rb") as file:
        if file.read(4) != b"PAR1":
            raise DataError(f"{path} is no Parquet file, whatever its name says. Name it after what it is.")
    tables: list[pyarrow.Table] = []
    n_rows = n_bytes = 0
    try:
        _check_metadata(path)
        for step in read_chunks(path, PARQUET_STEP_ROWS):
            assert isinstance(step, ArrowChunk)
            tables.append(step.arrow)
            n_rows += len(step)
            n_bytes += _decoded_bytes(step.arrow)
            # What the file says of itself need not be true.
            if n_rows > MAX_ROWS:
                raise _too_many_rows(path)
            if n_bytes > MAX_DECODED_BYTES:
                raise _too_much(path, "is")
        if not tables:
            raise DataError(f"{path} has no rows. Give a file with at least one text.")
        return ArrowChunk(0, pyarrow.concat_tables(tables))
    except (pyarrow.ArrowException, OSError) as cause:
        raise DataError(f"{path} cannot be read as parquet ({first_line(cause)}). Write it anew.") from cause


def _check_metadata(path: Path) -> None:
    """Refuse a Parquet file whose own figures are beyond the limits, before anything is decompressed."""
    from pyarrow import parquet

    metadata = parquet.read_metadata(path)
    if metadata.num_rows > MAX_ROWS:
        raise _too_many_rows(path)
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    columns = [group.column(number) for group in groups for number in range(group.num_columns)]
    if sum(column.total_uncompressed_size for column in columns) > MAX_DECODED_BYTES:
        raise _too_much(path, "says that it is")
    if sum(column.num_values for column in columns) > MAX_PARQUET_VALUES:
        raise DataError(f"{path} has more than {MAX_PARQUET_VALUES:,} values. Leave out columns that hold lists.")


def _too_much(path: Path, claim: str) -> DataError:
    return DataError(
        f"{path} {claim} more than {MAX_DECODED_BYTES:,} bytes long without compression. Give fewer rows or columns."
    )


def _decoded_bytes(table: "pyarrow.Table") -> int:
    """Size in memory, each text counted wherever it stands: a dictionary's is stored once and read often."""
    from pyarrow import types

    encoded = [column for column in table.columns if types.is_dictionary(column.type)]
    size_bytes: int = table.nbytes + sum(column.cast(column.type.value_type).nbytes for column in encoded)
    return size_bytes


def _with_columns(task: Task, rows: Chunk, name: str, text_columns: str, label_column: str) -> Task:
    """The task with the file's columns, which must be there."""
    wanted, label = names(text_columns), label_column.strip() or None
    if wanted and len(wanted) != len(task.text_columns):
        raise UsageError(
            f"{len(wanted)} text columns are named, but this model reads {len(task.text_columns)} "
            f"({', '.join(task.text_columns)}). Name as many, with a comma between."
        )
    task = task.with_columns(wanted, label, owner=name)
    columns = rows.columns
    for column in (*task.text_columns, *([] if label is None else [label])):
        if column not in columns:
            few = ", ".join(map(repr, columns[:8])) + (" …" if len(columns) > 8 else "")
            raise DataError(
                f"{name} has no column {column!r:.80}; it has {few:.300}. Name its own text columns or label column."
            )
    added = [f"{what}_{side}" for side in SIDES for what in (PREDICTION, PROBABILITY)]
    for column in (*added, AGREE):
        if column in columns:
            raise DataError(
                f"{name} has a column {column!r} already, and one of that name would be added. Rename or drop it."
            )
    return task


def _check_lengths(rows: Chunk, task: Task, name: str) -> None:
    for column in task.text_columns:
        for row, text in enumerate(rows.column(column)):
            if len(text) > MAX_CHARACTERS:
                raise DataError(
                    f"{name}, {rows.place(row)}: column {column!r} has {len(text):,} characters; at most "
                    f"{MAX_CHARACTERS:,} are read. Shorten it."
                )


@dataclass(frozen=True, eq=False)
class Scored:
    """What both engines say of a file.

    Attributes:
        upload: the file.
        setup: the adapter and how the engines ran.
        onnx: its answers, in the order of the rows.
        pytorch: its answers; None where the page runs without PyTorch.
        max_length: how many tokens the model reads.
    """

    upload: Upload
    setup: Setup
    onnx: Classified
    pytorch: Classified | None
    max_length: int

    @property
    def sides(self) -> dict[str, Classified]:
        """The answers by the names in `SIDES`."""
        return {"onnx": self.onnx} if self.pytorch is None else {"pytorch": self.pytorch, "onnx": self.onnx}

    @property
    def texts_cut(self) -> int:
        """How many texts were longer than the model reads and lost their end."""
        return int(self.onnx.cut.sum())

    @property
    def differs(self) -> np.ndarray:
        """Whether the engines give a row different labels; bool, shape = (n_rows,)"""
        answers = [classified.indices for classified in self.sides.values()]
        different: np.ndarray = answers[0] != answers[-1]
        return different

    @property
    def wrong(self) -> np.ndarray:
        """Whether an engine's label is not the file's; bool, shape = (n_rows,); nowhere where that has none"""
        if self.upload.expected is None:
            return np.zeros(len(self.upload.rows), bool)
        answers = np.stack([classified.indices for classified in self.sides.values()])
        mistaken: np.ndarray = (answers != np.array(self.upload.expected)).any(axis=0)
        return mistaken

    def counts(self, side: str) -> dict[str, int]:
        """How many rows got each label."""
        found = Counter(self.sides[side].predictions)
        return {label: found[label] for label in self.upload.task.labels}

    def confusion(self, side: str) -> np.ndarray | None:
        """As `count_pairs` gives it; None where the file has no labels."""
        if self.upload.expected is None:
            return None
        return count_pairs(self.upload.task, self.upload.expected, self.sides[side].indices)

    def scores(self, side: str) -> Scores | None:
        """The task's metrics; None where the file has no labels."""
        confusion = self.confusion(side)
        return None if confusion is None else score_counts(self.upload.task, confusion)

    @property
    def preview(self) -> list[int]:
        """Numbers of rows worth a look: first where the engines differ, then where one is wrong, then the others."""
        differs, wrong = self.differs, self.wrong
        return sorted(range(len(differs)), key=lambda row: (not differs[row], not wrong[row]))[:MAX_PREVIEW_ROWS]

    def as_json(self) -> dict[str, Any]:
        """For the endpoint ``/score_file``."""
        value: dict[str, Any] = {
            "file": self.upload.name,
            "adapter": self.setup.adapter,
            "precision": self.setup.onnx,
            "rows": len(self.upload.rows),
            "texts_cut": self.texts_cut,
            "labels": list(self.upload.task.labels),
        }
        if self.pytorch is not None:
            value |= {"pytorch_mode": self.setup.pytorch, "disagreements": int(self.differs.sum())}
        for side in self.sides:
            scores, confusion = self.scores(side), self.confusion(side)
            value[side] = {
                "counts": self.counts(side),
                "scores": None if scores is None else scores.values,
                "confusion": None if confusion is None else confusion.tolist(),
            }
        return value


@dataclass(frozen=True)
class Progress:
    """How far a file is.

    Attributes:
        engine: whose turn it was.
        done: rows that it has labelled.
        rows: in the file.
        fraction: of all the work, from 0 to 1.
        result: at the end.
    """

    engine: str
    done: int
    rows: int
    fraction: float
    result: Scored | None = None


def label_upload(stage: Stage, setup: Setup, upload: Upload, *, cancelled: threading.Event) -> Iterator[Progress]:
    """Label every row with both engines, one after the other, in batches of like length.

    The engines are held for `SLICE_SECONDS` at a time, so that other visitors need not wait for a whole file.

    Args:
        upload: for the setup's adapter.
        cancelled: asked before each batch; once it is set, nothing more is yielded, and there is no result.

    Raises:
        EngineError: an engine died, did not answer, or gave what is no number.
        PromptfoldError: as `Stage.open`.
    """
    opened = stage.open(setup)
    texts = upload.texts
    answers: dict[str, Classified] = {}
    # The whole file by one engine first: in turn, the threads of each would disturb the other's batches.
    sides = [side for side in reversed(SIDES) if side == "onnx" or opened.pytorch is not None]
    for number, side in enumerate(sides):
        logits = np.empty((len(texts), len(upload.task.labels)), np.float64)
        cut = np.zeros(len(texts), bool)
        batches = deque(in_batches(texts, _batch_rows(opened, side)))
        done = 0
        while batches:
            with stage.measuring:
                # Again each time: meanwhile another visitor's engines may have taken the place of these.
                opened = stage.open(setup)
                end = time.perf_counter() + SLICE_SECONDS
                while batches and not cancelled.is_set():
                    rows = batches.popleft()
                    encoded = opened.tokenize([texts[row] for row in rows])
                    logits[rows] = _finite_logits(opened, side, encoded.arrays)
                    cut[rows] = encoded.cut
                    done += len(rows)
                    if time.perf_counter() >= end:
                        break
            if cancelled.is_set():
                return
            yield Progress(_engine(opened, side).name, done, len(texts), (number + done / len(texts)) / len(sides))
            time.sleep(GIVE_WAY_SECONDS)
        answers[side] = Classified.of(upload.task.labels, logits, cut)
    scored = Scored(upload, setup, answers["onnx"], answers.get("pytorch"), opened.bundle.max_length)
    yield Progress(_engine(opened, side).name, len(texts), len(texts), 1.0, scored)


def _engine(opened: Opened, side: str) -> AnyEngine:
    engine = opened.onnx if side == "onnx" else opened.pytorch
    assert engine is not None
    return engine


def _batch_rows(opened: Opened, side: str) -> int:
    """How many texts an engine takes at once."""
    if side == "onnx":
        return BATCH_ROWS
    # See `train.adapter.load_peft_model`; a larger batch would end the engine's process. And what torch.compile made
    # of a batch of one does for others only once it is compiled anew, for longer than a request may take.
    config = read_json_object(opened.bundle.folder / FILES.config, BundleError, BUNDLE.remedy)
    return 1 if config.get("model_type") in DECODERS or opened.setup.pytorch == COMPILED else BATCH_ROWS


def _finite_logits(opened: Opened, side: str, arrays: dict[str, np.ndarray]) -> np.ndarray:
    engine = _engine(opened, side)
    logits = engine.logits(arrays)
    if not np.isfinite(logits).all():
        # argmax would make a label of it all the same.
        raise EngineError(f"The {engine.name} engine gave logits that are no numbers. Choose another precision.")
    return logits


def write_labelled(scored: Scored, folder: Path) -> Path:
    """Write the file with the added columns into a folder, in its own format and under a name like its own.

    In CSV no cell is a formula: see `export.tables.write_part`.

    Raises:
        DataError: a value cannot be written.
    """
    upload = scored.upload
    added: dict[str, Sequence[Any]] = {}
    for side, classified in scored.sides.items():
        added[f"{PREDICTION}_{side}"] = classified.predictions
        added[f"{PROBABILITY}_{side}"] = classified.best_probabilities.tolist()
    if scored.pytorch is not None:
        added[AGREE] = (~scored.differs).tolist()
    path = folder / f"{Path(upload.name).stem}-labelled{upload.suffix}"
    with _naming(path):
        write_part(path, upload.rows, added, columns=upload.rows.columns, schema=upload.schema, neutralise=True)
    return path
