"""Rows, adapters and golden scores of a regression and of a task with several labels a text."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, r2_score, recall_score

from tests.conftest import (
    DECODERS,
    Data,
    Folders,
    MadeOnce,
    family_of,
    make_pairs,
    peft_logits,
    train_kind,
    write_jsonl,
)

Rows = list[dict[str, Any]]
COLUMNS = ("sentence1", "sentence2")
LABEL_COLUMNS = {"regression": "score", "multi_label": "tags"}
TAGS = ("long", "near", "same")
TASK_KINDS = tuple(LABEL_COLUMNS)


def make_rows(n: int, seed: int) -> Rows:
    """Pairs with the share of their common words, and with tags, of which a row may have none."""
    rows: Rows = make_pairs(n, seed)
    for row in rows:
        first, second = (set(str(row[column]).split()) for column in COLUMNS)
        share = len(first & second) / len(first | second)
        found = (len(first) > 6, share > 0.1, share == 1)
        row |= {"score": round(5 * share, 2), "tags": [tag for tag, is_one in zip(TAGS, found, strict=True) if is_one]}
    return rows


def make_data(folder: Path) -> Data:
    """Files with such rows."""
    folder.mkdir(exist_ok=True)
    return Data(
        *(write_jsonl(folder / f"{name}.jsonl", make_rows(*size)) for name, size in (("t", (64, 1)), ("v", (40, 2))))
    )


def columns_flags(task_kind: str) -> list[str]:
    return ["--text-columns", ",".join(COLUMNS), "--label-column", LABEL_COLUMNS[task_kind], "--kind", task_kind]


def kind_adapter(made_once: MadeOnce, base_model: Folders, kind: str, task_kind: str) -> Path:
    """An adapter of a kind of model ("bert-v2") for a kind of task, made once a run; its data lie in "data-of-kinds"."""
    data = make_data(made_once("data-of-kinds", make_data))

    def make(folder: Path) -> None:
        flags = "--epochs 3 --learning-rate 3e-2"
        train_kind(kind, base_model(family_of(kind)), folder, flags, [*data.flags, *columns_flags(task_kind)])

    return made_once(f"adapters-{task_kind}/{kind}", make)


def validation_file(made_once: MadeOnce) -> Path:
    """The rows with which `kind_adapter` validates."""
    return made_once("data-of-kinds", make_data) / "v.jsonl"


def golden_logits(adapter: Path, base: Path, rows: Rows, n_labels: int) -> np.ndarray:
    """The logits of transformers and PEFT alone, row after row; shape = (n_rows, n_labels)"""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(adapter)
    found = []
    for row in rows:
        batch = dict(tokenizer(*(row[column] for column in COLUMNS), return_tensors="np"))
        batch = {name: np.atleast_2d(array) for name, array in batch.items()}
        found.append(peft_logits(adapter, base, batch, n_labels=n_labels)[0])
    return np.array(found)


def golden_answers(logits: np.ndarray, task_kind: str) -> np.ndarray:
    """Numbers, or whether each label has a probability of 0.5: a logit of 0."""
    return logits[:, 0] if task_kind == "regression" else logits >= 0


def truth(rows: Rows, task_kind: str) -> np.ndarray:
    if task_kind == "regression":
        return np.array([row["score"] for row in rows])
    return np.array([[tag in row["tags"] for tag in TAGS] for row in rows])


def golden_scores(expected: np.ndarray, predicted: np.ndarray, task_kind: str) -> dict[str, float]:
    """By SciPy and scikit-learn."""
    if task_kind == "regression":
        correlations: dict[str, Callable[..., Any]] = {"pearson": pearsonr, "spearman": spearmanr}
        found = {name: float(compute(expected, predicted).statistic) for name, compute in correlations.items()}
        return found | {"r2": r2_score(expected, predicted)}
    averages = {"f1_micro": "micro", "f1_macro": "macro"}
    return {name: f1_score(expected, predicted, average=mean, zero_division=0) for name, mean in averages.items()}


def golden_recalls(expected: np.ndarray, predicted: np.ndarray, task_kind: str) -> dict[str, float]:
    if task_kind == "regression":
        return {}
    return dict(zip(TAGS, recall_score(expected, predicted, average=None, zero_division=0).tolist(), strict=True))


def read_rows(file: Path) -> Rows:
    return [json.loads(line) for line in file.read_text().splitlines()]


def is_decoder(kind: str) -> bool:
    return family_of(kind) in DECODERS


def kind_bundle(made_once: MadeOnce, base_model: Folders, kind: str, task_kind: str, precision: str = "auto") -> Path:
    """A bundle of `kind_adapter`; with "auto", int8 was judged on its validation rows."""
    from export.__main__ import main

    adapter, file = kind_adapter(made_once, base_model, kind, task_kind), validation_file(made_once)

    def make(folder: Path) -> None:
        rows = [] if precision == "fp32" else ["--validation-file", str(file)]
        assert main([str(adapter), "--out", str(folder), "--precision", precision, *rows]) == 0

    return made_once(f"{precision}-{task_kind}/{kind}", make)
