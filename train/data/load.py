"""Labelled data, from the hub or from a file, checked, with labels as class indices."""

import csv
import errno
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.common.errors import DataError, HubError
from train.config import MINILM, TrainConfig
from train.data.tasks import GLUE, Task, custom_task, get_task

if TYPE_CHECKING:
    from datasets import Dataset


FILE_TYPES = (".csv", ".jsonl", ".parquet")


_DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Splits:
    """The labelled data of a run: the task, and both splits with its columns, the label's as class indices."""

    task: Task
    train: "Dataset"
    validation: "Dataset"


def load_splits(config: TrainConfig) -> Splits:
    """Load training and validation data and settle the task, as a configuration names them.

    Raises:
        UsageError: the task does not exist, or the columns do not make one.
        DataError, HubError: as `load_split` does.
    """
    task = _settle_task(config)
    if config.swap_sentences:
        if not task.is_pair:
            raise DataError(f"--swap-sentences needs two sentences; task {task.name} has one. Leave it out.")
        if not task.symmetric and task.name != "custom":
            raise DataError(
                f"--swap-sentences: in task {task.name} the order of the sentences decides the label. Leave it out."
            )
    return Splits(
        task=task,
        train=load_split(task, "train", config.train_file),
        validation=load_split(task, "validation", config.validation_file),
    )


def _settle_task(config: TrainConfig) -> Task:
    """The GLUE task, or one made of the user's columns and the labels that the training file holds."""
    if not config.text_columns:
        return get_task(config.task or "mrpc")
    column = config.label_column or "label"
    if config.labels:
        return custom_task(config.text_columns, column, config.labels)
    assert config.train_file is not None  # TrainConfig has checked
    dataset = _load_file(config.train_file, "train")
    _check_columns(dataset, (*config.text_columns, column), str(config.train_file), "--text-columns and --label-column")
    for row, label in enumerate(dataset[column], start=1):
        if label is None or not str(label).strip():
            raise DataError(f"{config.train_file}, row {row}: column {column!r} holds no label. Mend or drop the row.")
    return custom_task(config.text_columns, column, _in_order({str(label) for label in dataset[column]}))


def _in_order(labels: set[str]) -> list[str]:
    """Numbers by value, so that 10 comes after 9; everything else by its letters."""
    try:
        return sorted(labels, key=lambda label: (float(label), label))
    except ValueError:
        return sorted(labels)


def load_split(task: Task, split: str, file: Path | None) -> "Dataset":
    """Load one split, from ``file`` if given, else from the hub.

    Returns:
        A data set with the task's columns; that of the label holds class indices.

    Raises:
        DataError: the file cannot be read, lacks a column, or a row of it cannot be used.
        HubError: the hub did not give the data set.
    """
    if file is None:
        dataset = _load_from_hub(task, split)
        where = f"{GLUE}/{task.hub_config} ({split})"
    else:
        dataset = _load_file(file, split)
        where = str(file)
    _check_columns(dataset, (*task.text_columns, task.label_column), where, f"Task {task.name}")
    if not len(dataset):
        raise DataError(f"{where} has no rows. Give a file with at least one labelled text.")
    return _check_rows(dataset, task, where)


def _check_columns(dataset: "Dataset", wanted: tuple[str, ...], where: str, reader: str) -> None:
    missing = [column for column in wanted if column not in dataset.column_names]
    if missing:
        raise DataError(
            f"{where} has no column {missing[0]!r}; it has {', '.join(dataset.column_names)}. "
            f"{reader} reads {', '.join(wanted)}."
        )


def _load_from_hub(task: Task, split: str) -> "Dataset":
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        return load_dataset(GLUE, task.hub_config, split=task.hub_validation if split == "validation" else split)
    except (DatasetsError, HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError) as cause:
        raise HubError(
            f"The Hugging Face hub did not give the data set {GLUE}/{task.hub_config}. Without "
            f"network, give your own --train-file and --validation-file, and --model {MINILM} or a folder, "
            "which need none."
        ) from cause


def _load_file(file: Path, split: str) -> "Dataset":
    import pyarrow
    from datasets import Dataset
    from datasets.exceptions import DatasetsError

    name = f"--{split}-file {file}" if split else f"--file {file}"
    if file.suffix not in FILE_TYPES:
        raise DataError(f"{name}: give a file that ends in {', '.join(FILE_TYPES)}.")
    readers: dict[str, Any] = {
        ".jsonl": Dataset.from_json,
        ".parquet": Dataset.from_parquet,
    }
    try:
        if not file.is_file():
            raise DataError(f"{name}: there is no such file.")
        if not file.stat().st_size:
            raise DataError(f"{name} is empty. Give a file with at least one labelled pair.")
        if file.suffix == ".csv":
            return Dataset.from_dict(_read_csv(file))
        # datasets keeps an Arrow copy of what it reads; a small labelled set need not stay in the user's cache.
        with _quiet_datasets(), tempfile.TemporaryDirectory() as cache:
            plain = _under_plain_name(file, Path(cache))
            return readers[file.suffix](str(plain), keep_in_memory=True, cache_dir=cache)
    except (DatasetsError, pyarrow.ArrowException, OSError, ValueError, csv.Error) as cause:
        reason = cause.__cause__ or cause
        if isinstance(reason, OSError) and reason.errno in _DISK_IS_FULL:
            raise DataError(
                f"{name} cannot be read: its copy in the temporary folder {tempfile.gettempdir()} finds no space "
                f"({reason.strerror}). Free some, or name another folder by the environment variable TMPDIR."
            ) from cause
        raise DataError(f"{name} cannot be read as {file.suffix[1:]} ({reason}).") from cause


def _under_plain_name(file: Path, folder: Path) -> Path:
    """The file by another name: datasets takes *, ? and [ for patterns, and would read whatever else matches them."""
    plain = folder / f"rows{file.suffix}"
    try:
        plain.symlink_to(file.absolute())
    except OSError:  # not every system lets everybody make links
        shutil.copyfile(file, plain)
    return plain


def _read_csv(file: Path) -> dict[str, list[str]]:
    """The columns of a CSV file, every cell as the text that stands there.

    datasets reads CSV by pandas, which takes "none", "null" or "NA" for an empty cell, and "01" for 1.
    """
    with file.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, strict=True)
        names = list(reader.fieldnames or ())
        rows = list(reader)
    for row, cells in enumerate(rows, start=1):
        # DictReader puts what is too much under None, and None where something is missing.
        if None in cells or None in cells.values():
            raise ValueError(f"row {row} has not as many cells as the first line, {len(names)}")
    return {name: [cells[name] for cells in rows] for name in names}


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """No progress bar for a small file, and no second report of an error that we report."""
    import datasets

    level = datasets.logging.get_verbosity()
    bars = datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()


def _check_rows(dataset: "Dataset", task: Task, where: str) -> "Dataset":
    """Keep the text columns, turn labels into indices, and refuse the first row that cannot be used."""
    columns = {column: list(dataset[column]) for column in task.text_columns}
    for column, texts in columns.items():
        for row, text in enumerate(texts, start=1):
            if not isinstance(text, str) or not text.strip():
                raise DataError(f"{where}, row {row}: column {column!r} holds no text. Mend or drop the row.")
    known = task.known_labels
    labels: list[int] = []
    for row, label in enumerate(dataset[task.label_column], start=1):
        index = known.get(str(label))
        if index is None:
            raise DataError(
                f"{where}, row {row}: label {label!r} is none of task {task.name}'s ({task.label_choices}). "
                "Mend or drop the row."
            )
        labels.append(index)
    from datasets import Dataset

    return Dataset.from_dict({**columns, task.label_column: labels})
