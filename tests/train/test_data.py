"""GLUE's tasks by name, a user's own columns and labels, the baselines, and the order of the rows."""

import csv
import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from tests.conftest import WORDS, Data, make_pairs, peft_logits, write_jsonl
from train.__main__ import main
from train.adapter.folder import load_adapter
from train.adapter.peft import find_adapter_base
from train.data.load import load_split
from train.data.tasks import get_task
from train.data.token_ids import LengthGroupedSampler
from train.model.classifier import load_classifier

pytestmark = pytest.mark.usefixtures("one_thread")

Folders = Callable[[str], Path]
Rows = list[dict[str, Any]]
Metrics = dict[str, Callable[[Any, Any], float]]

ACCURACY: Metrics = {"accuracy": accuracy_score}
ACCURACY_F1: Metrics = {"accuracy": accuracy_score, "f1": f1_score}

GLUE: dict[str, tuple[list[str], list[str], Metrics]] = {
    "mrpc": (["sentence1", "sentence2"], ["not_equivalent", "equivalent"], ACCURACY_F1),
    "qqp": (["question1", "question2"], ["not_duplicate", "duplicate"], ACCURACY_F1),
    "rte": (["sentence1", "sentence2"], ["entailment", "not_entailment"], ACCURACY),
    "qnli": (["question", "sentence"], ["entailment", "not_entailment"], ACCURACY),
    "wnli": (["sentence1", "sentence2"], ["not_entailment", "entailment"], ACCURACY),
    "mnli": (["premise", "hypothesis"], ["entailment", "neutral", "contradiction"], ACCURACY),
    "sst2": (["sentence"], ["negative", "positive"], ACCURACY),
    "cola": (
        ["sentence"],
        ["unacceptable", "acceptable"],
        {"matthews": matthews_corrcoef, "accuracy": accuracy_score},
    ),
}
"""Columns, labels in order and metrics of each task: the data set card's, and table 1 of arXiv 1804.07461."""


def make_rows(columns: list[str], labels: Iterable[Any], *, label_column: str = "label", seed: int = 0) -> Rows:
    """Random texts of a few words, in these columns."""
    generator = random.Random(seed)  # noqa: S311 -- test data
    return [
        {
            **{column: " ".join(generator.sample(WORDS, generator.randint(2, 8))) for column in columns},
            label_column: label,
        }
        for label in labels
    ]


def write_csv(path: Path, rows: Rows) -> Path:
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_splits(folder: Path, train: Rows, validation: Rows, suffix: str = ".jsonl") -> Data:
    write = write_csv if suffix == ".csv" else write_jsonl
    return Data(write(folder / f"train{suffix}", train), write(folder / f"validation{suffix}", validation))


def run(base: Path, data: Data, out: Path, *flags: str) -> dict[str, Any]:
    """Train for an epoch, or a few, and return training.json."""
    sizes = ["--virtual-tokens", "4", "--encoder-hidden-size", "16", "--learning-rate", "1e-2"]
    assert main(["--model", str(base), *data.flags, *sizes, "--epochs", "1", *flags, "--out", str(out)]) == 0
    training: dict[str, Any] = json.loads((out / "training.json").read_text())
    return training


def peft_predictions(out: Path, base: Path, columns: list[str], rows: Rows, n_labels: int) -> list[int]:
    """Class indices by transformers and PEFT alone."""
    from transformers import AutoTokenizer

    texts = [[row[column] for row in rows] for column in columns]
    batch = AutoTokenizer.from_pretrained(out)(*texts, padding=True, return_tensors="np")
    predicted: list[int] = peft_logits(out, base, dict(batch), n_labels=n_labels).argmax(axis=-1).tolist()
    return predicted


def check_labels_everywhere(out: Path, labels: list[str]) -> None:
    adapter = load_adapter(out)
    assert list(adapter.labels) == labels
    assert json.loads((out / "training.json").read_text())["task"]["labels"] == labels
    assert ", ".join(f"`{label}`" for label in labels) in (out / "README.md").read_text()
    config = load_classifier(find_adapter_base(adapter), adapter.labels).config
    assert config.id2label == dict(enumerate(labels))
    assert config.label2id == {label: index for index, label in enumerate(labels)}


@pytest.mark.parametrize("name", GLUE)
def test_a_glue_task_is_learned_by_name_and_scored_as_glue_defines_it(
    name: str, base_model: Folders, tmp_path: Path
) -> None:
    columns, labels, metrics = GLUE[name]
    indices = [index % len(labels) for index in range(24)]
    # The index in one file and the name in the other: both are the task's.
    train = make_rows(columns, [labels[index] for index in indices], seed=1)
    validation = make_rows(columns, indices, seed=2)
    data = write_splits(tmp_path, train, validation)
    training = run(base_model("bert"), data, tmp_path / "a", "--task", name, "--epochs", "3", "--batch-size", "4")

    predicted = peft_predictions(tmp_path / "a", base_model("bert"), columns, validation, len(labels))
    assert training["validation"] == pytest.approx(
        {metric: compute(indices, predicted) for metric, compute in metrics.items()}
    )
    assert list(training["validation"]) == list(metrics)
    assert training["task"]["text_columns"] == columns
    check_labels_everywhere(tmp_path / "a", labels)
    # The first metric chooses the epoch, the others break ties.
    keys = [tuple(epoch["scores"].values()) for epoch in training["epochs"]]
    assert training["best_epoch"] == 1 + keys.index(max(keys))


class Hub:
    """Stands in for `datasets.load_dataset`, which needs a network: gives rows and remembers what was asked for."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.asked: list[tuple[str, str, str]] = []

    def __call__(self, path: str, name: str, *, split: str) -> datasets.Dataset:
        self.asked.append((path, name, split))
        return datasets.Dataset.from_list(self.rows)


def test_the_hubs_matched_validation_split_is_the_one_of_mnli(
    base_model: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns, labels, _ = GLUE["mnli"]
    hub = Hub(make_rows(columns, [0, 1, 2] * 4))
    monkeypatch.setattr(datasets, "load_dataset", hub)
    flags = ["--model", str(base_model("bert")), "--task", "mnli", "--virtual-tokens", "4", "--epochs", "1"]
    assert main([*flags, "--out", str(tmp_path / "a")]) == 0
    assert hub.asked == [("nyu-mll/glue", "mnli", "train"), ("nyu-mll/glue", "mnli", "validation_matched")]
    check_labels_everywhere(tmp_path / "a", labels)


@pytest.mark.parametrize("name", [name for name in GLUE if name != "mnli"])
def test_the_hub_is_asked_for_the_tasks_own_splits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    columns, _, __ = GLUE[name]
    hub = Hub(make_rows(columns, [0, 1]))
    monkeypatch.setattr(datasets, "load_dataset", hub)
    for split in ("train", "validation"):
        dataset = load_split(get_task(name), split, None)
        assert set(dataset.column_names) == {*columns, "label"}
    assert hub.asked == [("nyu-mll/glue", name, split) for split in ("train", "validation")]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_own_columns_with_three_classes_are_scored_by_accuracy_and_macro_f1(
    suffix: str, base_model: Folders, tmp_path: Path
) -> None:
    """Names that a CSV reader may take for an empty cell are labels like any other."""
    labels = ["NA", "none", "yes"]
    train = make_rows(["left", "right"], [labels[index % 3] for index in range(24)], label_column="gold", seed=1)
    # A class that the validation file lacks counts with an F1 of 0, as scikit-learn counts it.
    validation = make_rows(["left", "right"], ["none", "NA", "none"] * 5, label_column="gold", seed=2)
    data = write_splits(tmp_path, train, validation, suffix)
    flags = ["--text-columns", "left,right", "--label-column", "gold"]
    training = run(base_model("bert"), data, tmp_path / "a", *flags, "--epochs", "2", "--batch-size", "4")

    expected = [labels.index(row["gold"]) for row in validation]
    predicted = peft_predictions(tmp_path / "a", base_model("bert"), ["left", "right"], validation, 3)
    macro = np.mean(
        [f1_score([e == k for e in expected], [p == k for p in predicted], zero_division=0) for k in range(3)]
    )
    assert training["validation"] == pytest.approx({"accuracy": accuracy_score(expected, predicted), "f1_macro": macro})
    check_labels_everywhere(tmp_path / "a", labels)
    assert "macro F1" in (tmp_path / "a" / "README.md").read_text()


def test_one_text_column_with_a_hundred_classes(base_model: Folders, tmp_path: Path) -> None:
    labels = [f"class {index:03}" for index in range(100)]
    train = make_rows(["text"], labels, label_column="kind", seed=1)
    random.Random(3).shuffle(train)  # noqa: S311 -- test data
    validation = make_rows(["text"], labels[::-1], label_column="kind", seed=2)
    data = write_splits(tmp_path, train, validation)
    training = run(base_model("bert"), data, tmp_path / "a", "--text-columns", "text", "--label-column", "kind")
    expected = list(range(100))[::-1]
    predicted = peft_predictions(tmp_path / "a", base_model("bert"), ["text"], validation, 100)
    assert training["validation"] == pytest.approx(
        {
            "accuracy": accuracy_score(expected, predicted),
            "f1_macro": f1_score(expected, predicted, average="macro", labels=range(100), zero_division=0),
        }
    )
    check_labels_everywhere(tmp_path / "a", labels)
    # A single text is no pair of embeddings.
    assert list(training["baselines"]) == ["always `class 000`"]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_numbers_are_labels_by_their_value_and_not_class_indices(
    suffix: str, base_model: Folders, tmp_path: Path
) -> None:
    """2 comes before 10, and 1 is no way to write the second class."""
    rows = make_rows(["a", "b"], [10, 2, 10, 10] * 4, label_column="stars")
    data = write_splits(tmp_path, rows, rows, suffix)
    flags = ["--text-columns", "a,b", "--label-column", "stars"]
    training = run(base_model("bert"), data, tmp_path / "a", *flags)
    check_labels_everywhere(tmp_path / "a", ["2", "10"])
    assert training["task"]["positive_label"] == "10"
    # F1 is that of the second label: always saying it is right for three of four rows.
    assert training["baselines"]["always `10`"] == pytest.approx({"accuracy": 0.75, "f1": 6 / 7})
    expected = [int(row["stars"] == 10) for row in rows]
    predicted = peft_predictions(tmp_path / "a", base_model("bert"), ["a", "b"], rows, 2)
    assert training["validation"] == pytest.approx(
        {"accuracy": accuracy_score(expected, predicted), "f1": f1_score(expected, predicted)}
    )


def test_labels_stand_in_the_order_that_was_asked_for(base_model: Folders, tmp_path: Path) -> None:
    """And one may be named that the training file lacks. Leading zeros belong to a name."""
    rows = make_rows(["a", "b"], ["01", "1", "x"] * 4)
    data = write_splits(tmp_path, rows, rows, ".csv")
    run(base_model("bert"), data, tmp_path / "a", "--text-columns", "a,b", "--labels", "x, 1,unseen,01")
    check_labels_everywhere(tmp_path / "a", ["x", "1", "unseen", "01"])


def test_any_names_will_do_for_columns(base_model: Folders, tmp_path: Path) -> None:
    """Also those that the code itself uses."""
    rows = make_rows(["labels", "input_ids"], ["x", "y"] * 6, label_column="attention_mask")
    same = [{"a": row["labels"], "b": row["input_ids"], "c": row["attention_mask"]} for row in rows]
    flags = ["--text-columns", "labels,input_ids", "--label-column", "attention_mask"]
    (tmp_path / "same").mkdir()
    run(base_model("bert"), write_splits(tmp_path, rows, rows), tmp_path / "x", *flags)
    flags = ["--text-columns", "a,b", "--label-column", "c"]
    run(base_model("bert"), write_splits(tmp_path / "same", same, same), tmp_path / "y", *flags)
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "xy"]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--text-columns", "a,c"], "train.csv has no column 'c'; it has a, b, label, one, many, gap."),
        (["--text-columns", "a,b", "--label-column", "gold"], "train.csv has no column 'gold'"),
        (
            ["--text-columns", "a,b", "--label-column", "one"],
            "Column 'one': between 2 and 100 labels can be told apart, not 1.",
        ),
        (
            ["--text-columns", "a,b", "--label-column", "many"],
            "Column 'many': between 2 and 100 labels can be told apart, not 101.",
        ),
        (["--text-columns", "a,b", "--label-column", "gap"], "train.csv, row 3: column 'gap' holds no label."),
        (["--text-columns", "a,b", "--labels", "x,y,x"], "--labels x,y,x: a label stands there twice"),
        (["--text-columns", "a,b", "--labels", "x,z"], "row 2: label 'y' is none of task custom's ('x', 'z')"),
        (["--text-columns", "a,b"], "validation.csv, row 4: label 'w' is none of task custom's ('x', 'y')"),
        (["--text-columns", "a,b", "--label-column", "b"], "--label-column b is one of --text-columns too"),
        (["--text-columns", "a,label"], "--label-column label is one of --text-columns too"),
        (["--text-columns", "a,b,one"], "--text-columns a,b,one: name one column, or two different ones"),
        (["--text-columns", "a,a"], "--text-columns a,a: name one column, or two different ones"),
        (["--text-columns", "a,b", "--task", "rte"], "--task rte has its own columns"),
        (["--labels", "x,y"], "--labels needs --text-columns"),
        (["--label-column", "one"], "--label-column needs --text-columns"),
        (["--text-columns", "a", "--swap-sentences"], "--swap-sentences needs two sentences; task custom has one"),
        (["--task", "sst2", "--swap-sentences"], "--swap-sentences needs two sentences; task sst2 has one"),
        (["--task", "rte", "--swap-sentences"], "in task rte the order of the sentences decides the label"),
        (["--task", "cola"], "train.csv has no column 'sentence'; it has a, b, label, one, many, gap. Task cola reads"),
    ],
)
def test_columns_and_labels_that_cannot_be_used_are_named(
    flags: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = make_rows(["a", "b"], ["x", "y"] * 51)
    for index, row in enumerate(rows):
        row |= {"one": "same", "many": f"m{min(index, 100)}", "gap": ["x", "y", " "][index % 3]}
    data = write_splits(tmp_path, rows, [*rows[:3], {**rows[3], "label": "w"}], ".csv")
    assert main(["--model", "minilm", *data.flags, *flags, "--out", str(tmp_path / "a")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "a.checkpoints").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a,b,label\n", "has no rows"),
        ("a,b,label\nx,y\n", "cannot be read as csv (row 1 has not as many cells as the first line, 3)"),
        ("a,b,label\nx,y,z,w\n", "cannot be read as csv (row 1 has not as many cells as the first line, 3)"),
        ('a,b,label\n"x,y,z\n', "cannot be read as csv (unexpected end of data)"),
        (b"a,b,label\n\xff,y,z\n", "cannot be read as csv ("),
        ("a,b,label\nnull,,z\n", "row 1: column 'b' holds no text"),
    ],
)
def test_a_wrong_csv_file_is_named(
    content: str | bytes, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file.csv"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    flags = ["--text-columns", "a,b", "--labels", "z,w", "--train-file", str(file), "--validation-file", str(file)]
    assert main(["--model", "minilm", *flags, "--out", str(tmp_path / "a")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert words in error


def cosines(base: Path, pairs: list[tuple[str, str]]) -> np.ndarray:
    """Of mean-pooled embeddings, one text at a time, by transformers alone."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModel.from_pretrained(base).eval()

    def embed(text: str) -> np.ndarray:
        with torch.inference_mode():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].numpy()
        mean: np.ndarray = states.mean(axis=0)
        return mean / np.linalg.norm(mean)

    return np.array([embed(first) @ embed(second) for first, second in pairs])


@pytest.mark.parametrize(("task", "flipped"), [("mrpc", False), ("rte", False), ("rte", True)])
def test_the_baselines_are_the_frequent_label_and_the_best_threshold_on_a_cosine(
    task: str, flipped: bool, base_model: Folders, tmp_path: Path
) -> None:
    """Alike is label 1 in MRPC; in RTE it may be either, and the direction has to be found."""
    splits: list[Rows] = []
    for n, seed in ((41, 1), (30, 2)):
        # Of an odd number of rows label 0 has one more.
        rows = make_pairs(n, seed=seed)
        splits.append([{**row, "label": 1 - int(str(row["label"])) if flipped else row["label"]} for row in rows])
    data = write_splits(tmp_path, splits[0], splits[1])
    training = run(base_model("bert"), data, tmp_path / "a", "--task", task)
    labels = [np.array([row["label"] for row in rows]) for rows in splits]
    values = [cosines(base_model("bert"), [(row["sentence1"], row["sentence2"]) for row in rows]) for rows in splits]

    metrics = GLUE[task][2]
    # Always giving the class that has no F1 would be too easy a mark: for MRPC it is the positive one.
    constant = 1 if task == "mrpc" else int(labels[0].mean() > 0.5)
    assert training["baselines"][f"always `{GLUE[task][1][constant]}`"] == pytest.approx(
        {name: compute(labels[1], np.full(30, constant)) for name, compute in metrics.items()}
    )
    # Brute force over all thresholds and both directions.
    edges = np.concatenate([values[0] - 1e-9, values[0] + 1e-9])
    best = max(
        max(np.mean((values[0] >= edge) == labels[0]), np.mean((values[0] < edge) == labels[0])) for edge in edges
    )
    rule = training["baseline_rules"]["cosine"]
    answers = [np.where(value >= rule["value"], rule["above"], 1 - rule["above"]) for value in values]
    assert np.mean(answers[0] == labels[0]) == pytest.approx(best)
    assert best > 0.8  # or it would be no baseline worth having
    assert rule["above"] == (0 if flipped else 1)
    (name,) = [name for name in training["baselines"] if name.startswith("cosine")]
    assert training["baselines"][name] == pytest.approx(
        {metric: compute(labels[1], answers[1]) for metric, compute in metrics.items()}
    )


def order_of(sampler: LengthGroupedSampler, epoch: int) -> list[int]:
    sampler.epoch = epoch
    return list(sampler)


LENGTHS = np.random.default_rng(0).integers(3, 200, 1003).tolist()


def test_an_epoch_meets_every_row_once_in_batches_of_like_length() -> None:
    sampler = LengthGroupedSampler(LENGTHS, batch_size=8, seed=0, swap=False)
    order = order_of(sampler, 0)
    assert sorted(order) == list(range(1003))
    assert len(sampler) == 1003
    batches = [order[start : start + 8] for start in range(0, 1003, 8)]
    # 1003 = 125 · 8 + 3: the incomplete batch is the last one.
    assert len(batches[-1]) == 3
    spread = np.mean([max(LENGTHS[row] for row in batch) - min(LENGTHS[row] for row in batch) for batch in batches])
    assert spread < 10  # of 197; rows at random would give about 150
    # The batches themselves come in no order of length.
    firsts = [LENGTHS[batch[0]] for batch in batches]
    assert abs(np.corrcoef(firsts, range(len(firsts)))[0, 1]) < 0.3


def test_the_order_follows_from_seed_and_epoch_alone() -> None:
    def make(seed: int) -> LengthGroupedSampler:
        return LengthGroupedSampler(LENGTHS, batch_size=8, seed=seed, swap=True)

    sampler = make(0)
    first, second = order_of(sampler, 0), order_of(sampler, 1)
    assert first != second
    # Whatever was drawn before, from it or from numpy.
    np.random.default_rng(0).random(7)
    assert order_of(sampler, 0) == first
    assert order_of(make(0), 1) == second
    assert order_of(make(1), 0) != first


def test_half_of_the_pairs_come_in_the_other_order() -> None:
    order = order_of(LengthGroupedSampler(LENGTHS, batch_size=8, seed=0, swap=True), 0)
    assert sorted(row % 1003 for row in order) == list(range(1003))
    assert 0.45 < np.mean(np.array(order) >= 1003) < 0.55


def test_swapped_pairs_are_the_same_pairs_with_the_sentences_exchanged(base_model: Folders, tmp_path: Path) -> None:
    from train.data.token_ids import encode
    from train.model.find import find_base_model
    from train.model.tokenizer import base_tokenizer

    rows = make_pairs(5, seed=4)
    turned = [{**row, "sentence1": row["sentence2"], "sentence2": row["sentence1"]} for row in rows]
    tokenizer = base_tokenizer(find_base_model(str(base_model("bert"))), 40)
    task = get_task("mrpc")
    first, second = (
        encode(load_split(task, "train", write_jsonl(tmp_path / f"{name}.jsonl", items)), task, tokenizer, swap=True)
        for name, items in (("first", rows), ("second", turned))
    )
    assert first.swapped == second.rows
    assert first.rows == second.swapped
    assert first.rows != first.swapped
