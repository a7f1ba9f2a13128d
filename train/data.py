"""Labelled data: read from the hub or from a file, checked, and turned into token ids."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.errors import DataError, HubError
from train.model import MINILM
from train.tasks import Task

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

FILE_TYPES = (".csv", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Encoded:
    """A split as token ids.

    Attributes:
        dataset: columns ``input_ids``, ``attention_mask``, ``labels`` and what else the tokenizer gives.
        texts_cut: how many texts were longer than the limit and lost their end.
    """

    dataset: "Dataset"
    texts_cut: int


def load_split(task: Task, split: str, file: Path | None) -> "Dataset":
    """Load one split, from ``file`` if given, else from the hub.

    Returns:
        A data set with the task's two text columns and the column ``labels`` (class indices).

    Raises:
        DataError: the file cannot be read, lacks a column, or a row of it cannot be used.
        HubError: the hub did not give the data set.
    """
    if file is None:
        dataset = _load_from_hub(task, split)
        where = f"{task.hub_dataset}/{task.hub_config} ({split})"
    else:
        dataset = _load_file(file, split)
        where = str(file)
    wanted = (*task.text_columns, task.label_column)
    missing = [column for column in wanted if column not in dataset.column_names]
    if missing:
        raise DataError(
            f"{where} has no column {missing[0]!r}; it has {', '.join(dataset.column_names)}. "
            f"Task {task.name} reads {', '.join(wanted)}."
        )
    if not len(dataset):
        raise DataError(f"{where} has no rows. Give a file with at least one labelled pair.")
    return _check_rows(dataset, task, where)


def _load_from_hub(task: Task, split: str) -> "Dataset":
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        return load_dataset(task.hub_dataset, task.hub_config, split=split)
    except (DatasetsError, HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError) as cause:
        raise HubError(
            f"The Hugging Face hub did not give the data set {task.hub_dataset}/{task.hub_config}. Without "
            f"network, give your own --train-file and --validation-file, and --model {MINILM} or a folder, "
            "which need none."
        ) from cause


def _load_file(file: Path, split: str) -> "Dataset":
    import pyarrow
    from datasets import Dataset
    from datasets.exceptions import DatasetsError

    name = f"--{split}-file {file}"
    if file.suffix not in FILE_TYPES:
        raise DataError(f"{name}: give a file that ends in {', '.join(FILE_TYPES)}.")
    if not file.is_file():
        raise DataError(f"{name}: there is no such file.")
    if not file.stat().st_size:
        raise DataError(f"{name} is empty. Give a file with at least one labelled pair.")
    readers: dict[str, Any] = {
        ".csv": Dataset.from_csv,
        ".jsonl": Dataset.from_json,
        ".parquet": Dataset.from_parquet,
    }
    try:
        # datasets keeps an Arrow copy of what it reads; a small labelled set need not stay in the user's cache.
        with _quiet_datasets(), tempfile.TemporaryDirectory() as cache:
            return readers[file.suffix](str(file), keep_in_memory=True, cache_dir=cache)
    except (DatasetsError, pyarrow.ArrowException, OSError, ValueError) as cause:
        reason = cause.__cause__ or cause
        raise DataError(f"{name} cannot be read as {file.suffix[1:]} ({reason}).") from cause


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
    names = {name: index for index, name in enumerate(task.labels)}
    known = names | {str(index): index for index in names.values()}
    labels: list[int] = []
    for row, label in enumerate(dataset[task.label_column], start=1):
        index = known.get(str(label))
        if index is None:
            choices = ", ".join(f"{index} or {name!r}" for name, index in names.items())
            raise DataError(
                f"{where}, row {row}: label {label!r} is none of task {task.name}'s ({choices}). Mend or drop the row."
            )
        labels.append(index)
    from datasets import Dataset

    return Dataset.from_dict({**columns, "labels": labels})


def encode(dataset: "Dataset", task: Task, tokenizer: "PreTrainedTokenizerFast") -> Encoded:
    """Tokenise a split. Texts over the tokenizer's ``model_max_length`` lose their end, the longer sentence first."""
    first, second = task.text_columns
    pairs = (list(dataset[first]), list(dataset[second]))
    whole_lengths = [len(ids) for ids in tokenizer(*pairs, verbose=False)["input_ids"]]
    encoded = tokenizer(*pairs, truncation="longest_first")
    from datasets import Dataset

    return Encoded(
        dataset=Dataset.from_dict({**encoded, "labels": list(dataset["labels"])}),
        texts_cut=sum(length > tokenizer.model_max_length for length in whole_lengths),
    )
