"""Labelled data, from the hub or from a file, checked, with labels as `train.data.labels.parse_label` gives them."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from train.common.console import say
from train.common.errors import DataError, HubError
from train.common.processes import is_main_process
from train.config import MINILM, TrainConfig
from train.data.check_rows import BadRows, CheckedRows, check_columns, check_rows
from train.data.classes import class_text, is_no_class, name_classes, named_value
from train.data.files.chunks import ArrowChunk, Chunk
from train.data.files.find import refuse_splits
from train.data.files.options import ReadOptions
from train.data.labels import (
    Label,
    holds_list,
    no_labels,
    refuse_equal_numbers,
    refuse_equal_sets,
    refuse_fractions,
    refuse_joined,
    refuse_other_kind,
    split_labels,
    written_sign,
)
from train.data.read_rows import Source, find_source, read_chunks
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
from train.data.token_ids import sentences_of

if TYPE_CHECKING:
    from datasets import Dataset

CHUNK_ROWS = 8192
"""Rows read at a time."""
LABELS_SHOWN = 10
MOST_WITHOUT_LABEL = 0.05
"""The share of training rows in which -1 may say that there is no label where it may also be a class, beside 0 and 1."""
_AS_GIVEN = ReadOptions()


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
    options = read_options(config)
    train = load_split(task, "train", config.train_file, options, takes_labels=True)
    if task.kind != REGRESSION and is_main_process():
        more = len(task.labels) - LABELS_SHOWN
        few = ", ".join(f"{name:.40}" for name in task.labels[:LABELS_SHOWN])
        say(f"{len(task.labels)} labels: {few}" + (f" and {more:,} more" if more > 0 else ""))
    validation = load_split(task, "validation", config.validation_file, options, takes_labels=True)
    _tell_shared(task, train, validation)
    names = MORE_SPLITS.get(task.name, ()) if config.validation_file is None else ()
    return Splits(task, train, validation, {name: load_split(task, name, None) for name in names})


def _tell_shared(task: Task, train: "Dataset", validation: "Dataset") -> None:
    """Say how many validation rows have texts of training rows, of which scores say nothing about other texts."""
    known = set(sentences_of(train, task))
    if (n_shared := sum(texts in known for texts in sentences_of(validation, task))) and is_main_process():
        say(
            f"{n_shared:,} of {len(validation):,} validation rows are training rows too, so the scores flatter the adapter; "
            "leave them out of one of the two"
        )


def read_options(config: TrainConfig) -> ReadOptions:
    return ReadOptions.parse(config.delimiter, config.encoding, config.quote)


def _find_task(config: TrainConfig) -> Task:
    """The GLUE task, or one made of the user's columns and the labels in the training file."""
    if not config.text_columns:
        return get_task(config.task or "mrpc")
    column, kind = config.label_column or "label", config.kind or CLASSIFICATION
    labels: Sequence[str] = config.labels
    if not labels and kind != REGRESSION:
        labels = _find_labels(config, column, kind)
    return custom_task(config.text_columns, column, labels, kind, config.threshold)


def _find_labels(config: TrainConfig, label_column: str, kind: str) -> list[str]:
    """The labels of the training file in order: that of the names which it has for numbers, else `_in_order`."""
    file, found = config.train_file, Counter[str]()
    names: tuple[str, ...] = ()
    assert file is not None  # TrainConfig has checked
    no_class = Counter[str]()
    bad, has_lists = BadRows(), False
    for chunk in read_chunks(_find_source(file, "train", read_options(config)), CHUNK_ROWS):
        wanted = (*config.text_columns, label_column)
        _check_columns(chunk, wanted, "--text-columns and --label-column name")
        names = chunk.class_names(label_column) or names
        unusable = dict(chunk.unreadable)
        for row, value in enumerate(chunk.column(label_column)):
            if kind == MULTI_LABEL:
                if (several := split_labels(value)) is None:
                    unusable.setdefault(row, no_labels(value, label_column))
                found.update(several or ())
                has_lists |= len(several or ()) > 1 or not isinstance(value, str) or holds_list(value)
                continue
            refuse_other_kind(chunk.place(row), label_column, value)
            if is_no_class(value, {}):
                no_class[class_text(value) or ""] += 1
                continue
            named = named_value(value, names)
            found[named if isinstance(named, str) else class_text(named) or ""] += 1
        bad.add(chunk, CheckedRows([], [], unusable, bad_label=False))
    labels = name_classes(found, file, label_column, merge=config.merge_labels)
    if len(labels) < 2:
        bad.refuse()  # else named with all other bad rows
    if kind == MULTI_LABEL:
        if not has_lists:
            refuse_joined(file, label_column, labels)
        return _in_order(labels)
    refuse_fractions(file, label_column, labels)
    _refuse_frequent_sign(file, label_column, no_class, found, is_named=bool(names))
    return sorted(labels, key=names.index) if set(labels) <= set(names) else _in_order(labels)


def _refuse_frequent_sign(
    file: Path, column: str, no_class: Counter[str], found: Counter[str], *, is_named: bool
) -> None:
    """Refuse a column where what says that there is no label may be one: -1 in many rows, as of -1, 0 and 1.

    Beside classes from 0 to 2 or more, as SNLI's, -1 is none: a scale that begins below 0 would have -2 too.
    """
    nothing = max(no_class, key=lambda sign: (bool(sign), no_class[sign]), default="")
    share = no_class[nothing] / max(no_class.total() + found.total(), 1)
    is_scale = nothing == "-1" and (set(found) <= {"0", "1"} or any(name.startswith("-") for name in found))
    if not nothing or (len(found) > 1 and (is_named or not is_scale or share <= MOST_WITHOUT_LABEL)):
        return
    without = f", else leave these rows out by --labels={','.join(_in_order(found)):.80}" if len(found) > 1 else ""
    raise DataError(
        f"{file}: column {column!r} has {len(found)} labels beside {nothing}, which many data sets write where a row has none, in "
        f"{no_class[nothing]:,} rows. If it is a class, name all: --labels={','.join(_in_order([nothing, *found])):.80}{without}"
    )


def _in_order(labels: Iterable[str]) -> list[str]:
    """Numbers by value, so that 10 comes after 9, anything else by its letters."""
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


def load_split(
    task: Task, split: str, file: Path | None, options: ReadOptions = _AS_GIVEN, *, takes_labels: bool = False
) -> "Dataset":
    """Load the "train" or "validation" split, from ``file`` if given, else from the hub; "" for a file from ``--file``.

    The data set has the task's columns; that of the label holds what `train.data.labels.parse_label` gives. Rows without
    a label are left out, which is said. With ``takes_labels`` the command has a flag ``--labels``, which a refusal names.
    """
    from datasets import Dataset

    found = None if file is None else _find_source(file, split, options)
    if found is not None and found.description and is_main_process():
        say(found.description)
    chunks: Iterable[Chunk] = [_load_from_hub(task, split)] if found is None else read_chunks(found, CHUNK_ROWS)
    sentences: list[tuple[str, ...]] = []
    labels: list[Label] = []
    bad, n_rows, missing, empty = BadRows(), 0, Counter[str](), Counter[str]()
    for chunk in chunks:
        which = f"Task {task.name} reads"
        own = split == "train" and task.name != "custom"
        _check_columns(chunk, (*task.text_columns, task.label_column), which, has_own=own)
        checked = check_rows(chunk, task, with_labels=True, needs_labels=False)
        bad.add(chunk, checked)
        n_rows += len(chunk)
        values = chunk.column(task.label_column)
        for row, (texts, label) in enumerate(zip(checked.sentences, checked.labels, strict=True)):
            if label is not None:
                sentences.append(texts)
                labels.append(label)
                if task.kind == MULTI_LABEL and (sign := written_sign(task, values[row])):
                    empty[sign] += 1
            elif row not in checked.bad:
                missing[class_text(values[row]) or "empty"] += 1
    is_named = takes_labels and task.name == "custom" and task.kind != REGRESSION
    bad.refuse(or_name="name all labels, in the order of the logits, with --labels" if is_named else "")
    if file is not None and found is not None and is_main_process():
        _tell_size(file, found, n_rows)
    source = file or f"{GLUE}/{task.hub_config} ({split})"
    if missing:
        _tell_missing(str(source), task, n_rows, missing)
    if empty and is_main_process():
        signs = " or ".join(sorted(empty))
        say(
            f"{source}: in {empty.total():,} of {n_rows:,} rows {task.label_column!r} is {signs}, which is taken for no label"
        )
    if task.kind == REGRESSION:
        refuse_equal_numbers(source, task.label_column, labels)
    if task.kind == MULTI_LABEL and split == "train":
        refuse_equal_sets(source, task.label_column, labels)
    columns = dict(zip(task.text_columns, map(list, zip(*sentences, strict=True)), strict=True))
    return Dataset.from_dict({**columns, task.label_column: labels})


def _tell_missing(source: str, task: Task, n_rows: int, missing: Counter[str]) -> None:
    """Say which rows are left out, from how often the label column has which sign that there is none."""
    column, n_missing, signs = task.label_column, missing.total(), " or ".join(sorted(missing))
    if n_missing == n_rows:
        raise DataError(
            f"{source}: column {column!r} holds no label: it is {signs} in all {n_rows:,} rows, as in test sets whose "
            "labels are kept back. Give a file with labels."
        )
    if is_main_process():
        named = sorted(set(missing) - {"empty"})
        hint = f" If {named[0]} is a class, it is one of --labels." if named and task.name == "custom" else ""
        say(
            f"{source}: left out {n_missing:,} of {n_rows:,} rows, whose {column!r} is {signs}: they have no label.{hint}"
        )


def _find_source(file: Path, split: str, options: ReadOptions) -> Source:
    source = find_source(file, flag=_flag(split), options=options)
    refuse_splits(file, source.files, f"{_flag(split)} {file}")
    return source


def _flag(split: str) -> str:
    return f"--{split}-file" if split else "--file"


def _tell_size(file: Path, source: Source, n_rows: int) -> None:
    names = [part.path.name for part in source.files]
    few = ", ".join(names[:5]) + (" …" if len(names) > 5 else "")
    say(f"{file}: {n_rows:,} rows" + (f" in {len(names):,} files: {few:.300}" if len(names) > 1 else ""))


def _check_columns(chunk: Chunk, wanted: tuple[str, ...], reader: str, *, has_own: bool = False) -> None:
    # In JSON lines a later chunk may lack a column; then its rows are named. A row that cannot be read has none.
    if not chunk.start and len(chunk.unreadable) < len(chunk):
        own = _own_columns(chunk) if has_own else ""
        check_columns(chunk.file, chunk.columns, wanted, f"{reader} {', '.join(wanted)}.{own}")


def _own_columns(chunk: Chunk) -> str:
    """The flags that name a file's own columns: that of the longest texts, and "label" or that of fewest values."""
    values = {name: list(map(str, chunk.column(name))) for name in chunk.columns if re.fullmatch(r"[\w.-]+", name)}
    if len(values) < 2:
        return " For a file with other columns name them: --text-columns and --label-column."
    text = max(values, key=lambda name: (name != "label") * (1 + sum(map(len, values[name]))))
    label = min(values, key=lambda name: (name == text, name != "label", len(set(values[name]))))
    return f" For a file with other columns name them, such as --text-columns {text} --label-column {label}."


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
