"""GLUE's tasks by name, a user's own columns and labels, labelled files, the baselines, and the order of the rows."""

import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from tests.conftest import WORDS, Data, Folders, make_pairs, write_jsonl
from tests.train.test_evaluate import Capture, Rows, peft_predictions
from tests.train.test_train import run
from train.__main__ import main
from train.adapter.folder import load_adapter
from train.adapter.peft import find_adapter_base
from train.common.errors import DataError
from train.config import TrainConfig
from train.data.load import load_split, load_splits
from train.data.tasks import MRPC, custom_task, score
from train.data.token_ids import LengthGroupedSampler, encode
from train.model.classifier import load_classifier
from train.model.find import find_base_model
from train.model.tokenizer import base_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

Metrics = dict[str, Callable[[Any, Any], float]]
ACCURACY: Metrics = {"accuracy": accuracy_score}
ACCURACY_F1: Metrics = {"accuracy": accuracy_score, "f1": f1_score}
MATTHEWS: Metrics = {"matthews": matthews_corrcoef, "accuracy": accuracy_score}
GLUE: dict[str, tuple[list[str], list[str], Metrics]] = {
    "mrpc": (["sentence1", "sentence2"], ["not_equivalent", "equivalent"], ACCURACY_F1),
    "qqp": (["question1", "question2"], ["not_duplicate", "duplicate"], ACCURACY_F1),
    "rte": (["sentence1", "sentence2"], ["entailment", "not_entailment"], ACCURACY),
    "qnli": (["question", "sentence"], ["entailment", "not_entailment"], ACCURACY),
    "wnli": (["sentence1", "sentence2"], ["not_entailment", "entailment"], ACCURACY),
    "mnli": (["premise", "hypothesis"], ["entailment", "neutral", "contradiction"], ACCURACY),
    "sst2": (["sentence"], ["negative", "positive"], ACCURACY),
    "cola": (["sentence"], ["unacceptable", "acceptable"], MATTHEWS),
}
"""Columns, labels in order and metrics of each task: the data set card's, and table 1 of arXiv 1804.07461."""


def make_rows(columns: list[str], labels: Iterable[Any], *, label_column: str = "label", seed: int = 0) -> Rows:
    """Random texts of a few words, in these columns."""
    generator = random.Random(seed)  # noqa: S311 -- test data

    def words() -> str:
        return " ".join(generator.sample(WORDS, generator.randint(2, 8)))

    return [{**{column: words() for column in columns}, label_column: label} for label in labels]


def write_csv(path: Path, rows: Rows) -> Path:
    pd.DataFrame(rows).to_csv(path, index=False, lineterminator="\r\n")
    return path


def write_splits(folder: Path, train: Rows, validation: Rows, suffix: str = ".jsonl") -> Data:
    write = write_csv if suffix == ".csv" else write_jsonl
    return Data(write(folder / f"train{suffix}", train), write(folder / f"validation{suffix}", validation))


def check_labels_everywhere(out: Path, labels: list[str]) -> None:
    adapter = load_adapter(out)
    assert list(adapter.labels) == labels
    assert json.loads((out / "training.json").read_text())["task"]["labels"] == labels
    assert ", ".join(f"`{label}`" for label in labels) in (out / "README.md").read_text()
    config = load_classifier(find_adapter_base(adapter), adapter.labels).config
    assert config.id2label == dict(enumerate(labels))
    assert config.label2id == {label: index for index, label in enumerate(labels)}


@pytest.mark.parametrize("name", GLUE)
def test_a_glue_task_is_the_one_on_the_hub(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    columns, labels, metrics = GLUE[name]
    asked: list[tuple[str, str, str]] = []

    def load_dataset(path: str, config: str, *, split: str) -> datasets.Dataset:
        """Stands in for the hub, which needs a network."""
        asked.append((path, config, split))
        return datasets.Dataset.from_list(make_rows(columns, [1, 0]))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    splits = load_splits(TrainConfig(out=tmp_path / "a", task=name))
    validation = ["validation_matched", "validation_mismatched"] if name == "mnli" else ["validation"]
    assert asked == [("nyu-mll/glue", name, split) for split in ("train", *validation)]
    task = splits.task
    assert list(task.labels) == labels
    # A file may hold names in the place of indices.
    files = [write_csv(tmp_path / "file.csv", make_rows(columns, [labels[1], labels[0]])), tmp_path / "file.parquet"]
    pd.read_csv(files[0]).to_parquet(files[1])
    for dataset in (splits.train, splits.validation, *(load_split(task, "train", file) for file in files)):
        assert dataset.column_names == [*columns, "label"]
        assert dataset["label"][:] == [1, 0]
    expected, predicted = np.random.default_rng(0).integers(0, len(labels), (2, 50))
    values = {metric: compute(expected, predicted) for metric, compute in metrics.items()}
    assert score(task, predicted, expected).values == pytest.approx(values)
    assert list(score(task, predicted, expected).values) == list(metrics)


def test_own_labels_are_scored_by_accuracy_and_macro_f1(base_model: Folders, tmp_path: Path) -> None:
    """Names that a CSV reader may take for an empty cell or a number are labels like any other."""
    labels = ["none", "01", "NA", "1"]  # the last is in neither file
    train = make_rows(["said"], [labels[index % 3] for index in range(24)], label_column="gold", seed=1)
    # A class that the validation file lacks counts with an F1 of 0, as scikit-learn counts it.
    validation = make_rows(["said"], ["none", "NA", "none"] * 5, label_column="gold", seed=2)
    data = write_splits(tmp_path, train, validation, ".csv")
    flags = ["--text-columns", "said", "--label-column", "gold", "--labels", "none, 01,NA,1"]
    sizes = ["--epochs", "3", "--batch-size", "4", "--learning-rate", "1e-2"]
    training = run(base_model("bert"), data, tmp_path / "a", *flags, *sizes)

    expected = [labels.index(row["gold"]) for row in validation]
    predicted = peft_predictions(tmp_path / "a", base_model("bert"), validation, ["said"], n_labels=4)
    f1_macro = f1_score(expected, predicted, average="macro", labels=range(4), zero_division=0)
    accuracy = accuracy_score(expected, predicted)
    assert training["validation"] == pytest.approx({"accuracy": accuracy, "f1_macro": f1_macro})
    check_labels_everywhere(tmp_path / "a", labels)
    assert "macro F1" in (tmp_path / "a" / "README.md").read_text()
    # The first metric chooses the epoch, the next breaks ties.
    keys = [tuple(epoch["scores"].values()) for epoch in training["epochs"]]
    assert training["best_epoch"] == 1 + keys.index(max(keys))
    # A single text is no pair of embeddings.
    assert list(training["baselines"]) == ["always `none`"]
    assert len(custom_task(("said",), "gold", [str(number) for number in range(1000)]).labels) == 1000


def test_numbers_are_labels_by_their_value_in_columns_of_any_name(base_model: Folders, tmp_path: Path) -> None:
    """2 comes before 10, 1 is not the second class, and the columns have names that the code itself uses."""
    columns, label_column = ["labels", "input_ids"], "attention_mask"
    rows = make_rows(columns, [10, 2, 10, 10] * 4, label_column=label_column)
    flags = ["--text-columns", ",".join(columns), "--label-column", label_column, "--learning-rate", "1e-2"]
    training = run(base_model("bert"), write_splits(tmp_path, rows, rows[::-1]), tmp_path / "a", *flags)
    check_labels_everywhere(tmp_path / "a", ["2", "10"])
    assert training["task"]["positive_label"] == "10"
    # F1 is that of the second label: always saying it is right for three of four rows.
    assert training["baselines"]["always `10`"] == pytest.approx({"accuracy": 0.75, "f1": 6 / 7})
    expected = [int(row[label_column] == 10) for row in rows]
    predicted = peft_predictions(tmp_path / "a", base_model("bert"), rows, columns)
    metrics = {"accuracy": accuracy_score(expected, predicted), "f1": f1_score(expected, predicted)}
    assert training["validation"] == pytest.approx(metrics)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--text-columns a,c", "train.csv has no column 'c'; it has a, b, label, one, many, gap."),
        ("--text-columns a,b --label-column gold", "train.csv has no column 'gold'"),
        ("--text-columns a,b --label-column one", "Column 'one': between 2 and 1000 labels can be told apart, not 1."),
        ("--text-columns a,b --label-column many", "between 2 and 1000 labels can be told apart, not 1001."),
        ("--text-columns a,b --labels x,y,x", "--labels x,y,x: a label is named twice"),
        ("--text-columns a,b --labels x,z", "row 2 (line 3): label 'y' in column 'label' is none of task custom's"),
        ("--text-columns a,b", "validation.csv, row 4 (line 5): label 'w' in column 'label' is none of task custom's"),
        ("--text-columns a,b", "Fix or remove the row, or name all labels, in the order of the logits, with --labels."),
        ("--text-columns a,b --label-column b", "--label-column b is one of --text-columns too"),
        ("--text-columns a,b,one", "--text-columns a,b,one: name one column, or two different ones"),
        ("--text-columns a,a", "--text-columns a,a: name one column, or two different ones"),
        ("--text-columns a,b --task rte", "--task rte has its own columns"),
        ("--labels x,y", "--labels needs --text-columns"),
        ("--label-column one", "--label-column needs --text-columns"),
        ("--text-columns a --swap-sentences", "--swap-sentences needs two sentences; task custom has one"),
        ("--task rte --swap-sentences", "in task rte the order of the sentences decides the label"),
        ("--task cola", "train.csv has no column 'sentence'; it has a, b, label, one, many, gap. Task cola reads"),
    ],
)
def test_wrong_columns_and_labels_are_named(flags: str, words: str, tmp_path: Path, capsys: Capture) -> None:
    rows = make_rows(["a", "b"], ["x", "y"] * 501)
    for index, row in enumerate(rows):
        row |= {"one": "same", "many": f"m{min(index, 1000)}", "gap": ["x", "y", " "][index % 3]}
    data = write_splits(tmp_path, rows, [*rows[:3], {**rows[3], "label": "w"}], ".csv")
    assert main(["--model", "minilm", *data.flags, *flags.split(), "--out", str(tmp_path / "a")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert words in error
    # Up to twenty bad rows are named, one a line.
    assert error.count("\n") == (1 if "rows cannot be used" not in error else 22)
    assert not list(tmp_path.glob("a*"))


GOOD = 'sentence1,sentence2,label\nword1,word2,1\n"a\nb",word3,0\n'
"""Two rows; the second begins on line 3 and ends on line 4."""

BAD_FILES: list[tuple[str, bytes, str]] = [
    ("in.txt", b"x", "in.txt: give a file that ends in .csv, .jsonl, .parquet"),
    ("in.csv", b"", "in.csv is empty"),
    ("in.csv", b"sentence1,sentence2,label\n", "in.csv has no rows"),
    ("in.csv", b"\n", "in.csv: the first line names no columns"),
    ("in.csv", b"a,a\n1,2\n", "in.csv has two columns 'a', the 1. and the 2. Rename one."),
    ("in.csv", b"c," * 500_000 + b"d\n1", "in.csv has two columns 'c'"),
    (
        "in.csv",
        ",".join(map(str, range(300_000))).encode() + b"\n1\n",
        "row 1 (line 2): it has 1 cells, the first line",
    ),
    ("in.csv", GOOD.encode() + b"a,b\n", "in.csv, row 3 (line 5): it has 2 cells, the first line names 3 columns"),
    (
        "in.csv",
        GOOD.encode() + b'"a,b,1\n',
        "in.csv, row 3 (line 5): it cannot be read as csv (unexpected end of data)",
    ),
    ("in.csv", GOOD.encode() + b"\n\xc3\xa4 n\xefve,b,1\n", "in.csv, line 6, byte 60 of the file is not UTF-8 text"),
    ("in.csv", GOOD.encode() + b"\x00,b,1\n", "in.csv, line 5, byte 55 of the file is not UTF-8 text. Is it really a"),
    ("in.csv", GOOD.encode() + b"a, ,1\n", "row 3 (line 5): column 'sentence2' holds no text. Fix or remove the row."),
    ("in.csv", GOOD.encode() + b"a,b,maybe\n", "in.csv, row 3 (line 5): label 'maybe' in column 'label' is none of"),
    ("in.csv", b"sentence1,sentence2,label\na,b," + b"x" * 9999, f"label '{'x' * 79} in column"),
    ("in.csv", b"sentence1,text,label\na,b,c\n", "has no column 'sentence2'; it has sentence1, text, label. Task mrpc"),
    ("in.jsonl", json.dumps({f"{n}" * 50: 1 for n in range(9999)}).encode(), "has no column 'sentence1'; it has 00000"),
    (
        "in.jsonl",
        b'{"sentence1": "a", "sentence2": "b", "label": 1}\n{"sentence1": "a"\n',
        "row 2 (line 2): it is no JSON (",
    ),
    (
        "in.jsonl",
        b'{"sentence1": "a", "sentence2": "b", "label": 1}\n\n["a"]\n',
        "row 2 (line 3): it holds no JSON object, of which every line needs one",
    ),
    ("in.jsonl", b"[" * 100_000 + b"\n", "in.jsonl, line 1 is no JSON"),
    ("in.jsonl", b'{"sentence1": "\xc3\xa4\xff"}\n', "in.jsonl, line 1, byte 18 of the file is not UTF-8 text"),
    ("in.jsonl", b'{"sentence1": "\\ud83d"}\n', "row 1 (line 1): it holds half a surrogate pair"),
    ("in.jsonl", b'{"sentence1": 3, "sentence2": "b", "label": 1}', "row 1 (line 1): column 'sentence1' holds no text"),
    (
        "in.jsonl",
        b'{"sentence1": "a", "sentence2": "b", "label": -1}',
        "column 'label' holds no label: it is -1 in all 1 rows",
    ),
    ("in.parquet", GOOD.encode(), "in.parquet cannot be read as parquet (Parquet magic bytes not found"),
]


@pytest.mark.parametrize(("name", "content", "words"), BAD_FILES, ids=range(len(BAD_FILES)))
def test_a_bad_file_is_named_with_its_place(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as refusal:
        load_split(MRPC, "train", tmp_path / name)
    message = str(refusal.value)
    assert words in message
    assert str(tmp_path / name) in message
    assert len(message.replace(str(tmp_path), "")) < 700


def cosines(base: Path, rows: Rows) -> np.ndarray:
    """Cosines of mean-pooled embeddings, one text at a time, by transformers alone."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModel.from_pretrained(base).eval()

    def embed(text: str) -> np.ndarray:
        with torch.inference_mode():
            mean = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].numpy().mean(axis=0)
        return np.asarray(mean / np.linalg.norm(mean))

    return np.array([embed(row["sentence1"]) @ embed(row["sentence2"]) for row in rows])


@pytest.mark.parametrize(("task", "flipped"), [("mrpc", False), ("rte", True)])
def test_the_baselines_are_the_best_that_need_no_prompt(
    task: str, flipped: bool, base_model: Folders, tmp_path: Path
) -> None:
    """The frequent label, and the best threshold on a cosine.

    Alike is label 1 in MRPC; in RTE it may be either, and the direction has to be found.
    """
    # Of an odd number of rows label 0 has one more.
    splits: list[Rows] = [make_pairs(41, seed=1), make_pairs(30, seed=2)]
    for row in (row for rows in splits for row in rows if flipped):
        row["label"] = 1 - row["label"]
    training = run(base_model("bert"), write_splits(tmp_path, splits[0], splits[1]), tmp_path / "a", "--task", task)
    labels = [np.array([row["label"] for row in rows]) for rows in splits]
    values = [cosines(base_model("bert"), rows) for rows in splits]

    def check(baseline: str, answers: np.ndarray) -> None:
        (scores,) = [scores for name, scores in training["baselines"].items() if name.startswith(baseline)]
        assert scores == pytest.approx({name: compute(labels[1], answers) for name, compute in GLUE[task][2].items()})

    # Always giving the class that has no F1 would be too easy a mark: for MRPC it is the positive one.
    constant = 1 if task == "mrpc" else int(labels[0].mean() > 0.5)
    check(f"always `{GLUE[task][1][constant]}`", np.full(30, constant))
    # Brute force over all thresholds; the other direction has the other rows right.
    edges = np.concatenate([values[0] - 1e-9, values[0] + 1e-9])
    best = max(max(right, 1 - right) for right in (np.mean((values[0] >= edge) == labels[0]) for edge in edges))
    rule = training["baseline_rules"]["cosine"]
    answers = [np.where(value >= rule["value"], rule["above"], 1 - rule["above"]) for value in values]
    assert np.mean(answers[0] == labels[0]) == pytest.approx(best)
    assert best > 0.8  # or it would be no baseline worth having
    assert rule["above"] == (0 if flipped else 1)
    check("cosine", answers[1])


def order_of(epoch: int, *, seed: int = 0, swap: bool = True) -> list[int]:
    sampler = LengthGroupedSampler(LENGTHS, batch_size=8, seed=seed, swap=swap)
    sampler.epoch = epoch
    assert len(sampler) == 1003
    return list(sampler)


LENGTHS = np.random.default_rng(0).integers(3, 200, 1003).tolist()


def test_an_epoch_meets_every_row_once_in_batches_of_like_length() -> None:
    order = order_of(0, swap=False)
    assert sorted(order) == list(range(1003))
    batches = [order[start : start + 8] for start in range(0, 1003, 8)]
    # 1003 = 125 · 8 + 3: the incomplete batch is the last one.
    assert len(batches[-1]) == 3
    spread = np.mean([max(LENGTHS[row] for row in batch) - min(LENGTHS[row] for row in batch) for batch in batches])
    assert spread < 10  # of 197; rows at random would give about 150
    # The batches themselves come in no order of length.
    firsts = [LENGTHS[batch[0]] for batch in batches]
    assert abs(np.corrcoef(firsts, range(len(firsts)))[0, 1]) < 0.3
    # The order follows from seed and epoch alone, and half of the pairs come the other way round.
    sampler = LengthGroupedSampler(LENGTHS, batch_size=8, seed=0, swap=True)
    assert list(sampler) == list(sampler) == order_of(0)
    sampler.epoch = 1
    assert list(sampler) == order_of(1)
    assert order_of(0) not in (order_of(1), order_of(0, seed=1))
    assert sorted(row % 1003 for row in order_of(0)) == list(range(1003))
    assert 0.45 < np.mean(np.array(order_of(0)) >= 1003) < 0.55


def test_swapped_pairs_have_their_sentences_exchanged(base_model: Folders, tmp_path: Path) -> None:
    rows = make_pairs(5, seed=4)
    turned = [{**row, "sentence1": row["sentence2"], "sentence2": row["sentence1"]} for row in rows]
    tokenizer = base_tokenizer(find_base_model(str(base_model("bert"))), 40)
    files = (write_jsonl(tmp_path / "first.jsonl", rows), write_jsonl(tmp_path / "second.jsonl", turned))
    first, second = (encode(load_split(MRPC, "train", file), MRPC, tokenizer, swap=True) for file in files)
    assert first.swapped == second.rows
    assert first.rows == second.swapped
    assert first.rows != first.swapped
