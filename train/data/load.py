"""Labelled data, from the hub or from a file, checked, with labels as `train.data.labels.parse_label` gives them."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from train.common.errors import DataError, HubError
from train.config import MINILM, TrainConfig
from train.data.check_rows import FIX_ROW, check_columns, read_labels, read_sentences
from train.data.labels import Label, refuse_equal_numbers, refuse_fractions, refuse_other_kind, split_labels
from train.data.read_rows import ArrowChunk, Chunk, check_source, read_chunks
from train.data.tasks import (
    CLASSIFICATION,
    GLUE,
    MORE_SPLITS,
    MULTI_LABEL,
    REGRESSION,
    Task,
    custom_task,
    get_task,
)

if TYPE_CHECKING:
    from datasets import Dataset

CHUNK_ROWS = 8192
"""Rows read at a time."""


@dataclass(frozen=True)
class Splits:
    """The labelled data of a run; every split has the task's columns, that of the label as from `parse_label`."""

    task: Task
    train: "Dataset"
    validation: "Dataset"
    more: "dict[str, Dataset]"
    """Further validation splits by their names; they choose nothing."""


def load_splits(config: TrainConfig) -> Splits:
    """Load training and validation data and determine the task, as a configuration names them."""
    task = _find_task(config)
    if config.swap_sentences and not task.is_pair:
        raise DataError(f"--swap-sentences needs two sentences; task {task.name} has one. Leave it out.")
    if config.swap_sentences and not task.symmetric and task.name != "custom":
        raise DataError(
            f"--swap-sentences: in task {task.name} the order of the sentences decides the label. Leave it out."
        )
    if config.class_weights != "none" and task.kind != CLASSIFICATION:
        raise DataError(f"--class-weights is for classes, and task {task.name} is {task.kind}. Leave it out.")
    train = load_split(task, "train", config.train_file)
    validation = load_split(task, "validation", config.validation_file)
    names = MORE_SPLITS.get(task.name, ()) if config.validation_file is None else ()
    return Splits(task, train, validation, {name: load_split(task, name, None) for name in names})


def _find_task(config: TrainConfig) -> Task:
    """The GLUE task, or one made of the user's columns and the labels in the training file."""
    if not config.text_columns:
        return get_task(config.task or "mrpc")
    column, kind = config.label_column or "label", config.kind or CLASSIFICATION
    labels: Sequence[str] = config.labels
    if not labels and kind != REGRESSION:
        assert config.train_file is not None  # TrainConfig has checked
        labels = _find_labels(config.train_file, config.text_columns, column, kind)
    return custom_task(config.text_columns, column, labels, kind, config.threshold)


def _find_labels(file: Path, text_columns: tuple[str, ...], label_column: str, kind: str) -> list[str]:
    """The labels of a file in order: numbers by value, so that 10 comes after 9, anything else by its letters."""
    labels: set[str] = set()
    for chunk in _read_file(file, "train"):
        wanted = (*text_columns, label_column)
        _check_columns(chunk, wanted, "--text-columns and --label-column")
        for row, label in enumerate(chunk.column(label_column)):
            if kind == MULTI_LABEL:
                labels.update(split_labels(label) or ())  # what is no list is refused when rows are read
                continue
            if label is None or not str(label).strip():
                raise DataError(f"{chunk.place(row)}: column {label_column!r} holds no label. {FIX_ROW}.")
            refuse_other_kind(chunk.place(row), label_column, label)
            labels.add(str(label))
    if kind == CLASSIFICATION:
        refuse_fractions(file, label_column, labels)
    try:
        return sorted(labels, key=lambda label: (float(label), label))
    except ValueError:
        return sorted(labels)


def class_weights(task: Task, train: "Dataset") -> list[float]:
    """n / (k · count) of each class, of n rows and k classes: scikit-learn's "balanced"."""
    import numpy as np
    from sklearn.utils.class_weight import compute_class_weight

    indices = list(train[task.label_column])
    if absent := [name for index, name in enumerate(task.labels) if index not in set(indices)]:
        raise DataError(
            f"--class-weights balanced: no training row has label {absent[0]!r:.80}, so it has no weight. Give rows of it, "
            "or leave the flag out."
        )
    return list(map(float, compute_class_weight("balanced", classes=np.arange(len(task.labels)), y=indices)))


def load_split(task: Task, split: str, file: Path | None) -> "Dataset":
    """Load the "train" or "validation" split, from ``file`` if given, else from the hub; "" for a file from ``--file``.

    The data set has the task's columns; that of the label holds what `train.data.labels.parse_label` gives.
    """
    from datasets import Dataset

    chunks: Iterable[Chunk] = [_load_from_hub(task, split)] if file is None else _read_file(file, split)
    sentences: list[tuple[str, ...]] = []
    labels: list[Label] = []
    for chunk in chunks:
        _check_columns(chunk, (*task.text_columns, task.label_column), f"Task {task.name}")
        sentences += read_sentences(chunk, task)
        labels += read_labels(chunk, task)
    if task.kind == REGRESSION:
        refuse_equal_numbers(file or f"{GLUE}/{task.hub_config} ({split})", task.label_column, labels)
    columns = dict(zip(task.text_columns, map(list, zip(*sentences, strict=True)), strict=True))
    return Dataset.from_dict({**columns, task.label_column: labels})


def _read_file(file: Path, split: str) -> Iterator[Chunk]:
    check_source(file, f"--{split}-file {file}" if split else f"--file {file}")
    return read_chunks(file, CHUNK_ROWS)


def _check_columns(chunk: Chunk, wanted: tuple[str, ...], reader: str) -> None:
    # In JSON lines a later chunk may lack a column; then its rows are named.
    if not chunk.start:
        check_columns(chunk.file, chunk.columns, wanted, f"{reader} reads {', '.join(wanted)}.")


def _load_from_hub(task: Task, split: str) -> ArrowChunk:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        rows = load_dataset(GLUE, task.hub_config, split=task.hub_validation if split == "validation" else split)
    except (DatasetsError, HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError) as cause:
        raise HubError(
            f"The Hugging Face hub did not give the data set {GLUE}/{task.hub_config}. Without "
            f"network, give your own --train-file and --validation-file, and --model {MINILM} or a folder, "
            "which need none."
        ) from cause
    return ArrowChunk(f"{GLUE}/{task.hub_config} ({split})", 0, rows.with_format("arrow")[:])
