"""Regression, several labels a text, weights of classes, and recall, from the command line to training.json."""

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LinearRegression
from sklearn.metrics import recall_score
from sklearn.utils.class_weight import compute_class_weight

from tests import task_kinds
from tests.conftest import Data, Folders, MadeOnce, make_pairs, write_jsonl
from tests.task_kinds import COLUMNS, TAGS, TASK_KINDS, kind_adapter
from tests.train.test_data import cosines
from tests.train.test_evaluate import peft_predictions
from train.__main__ import main
from train.adapter.folder import load_adapter
from train.common.errors import DataError, UsageError
from train.config import TrainConfig
from train.data.load import load_split, load_splits
from train.data.tasks import Scores, Task, custom_task, get_task, score

pytestmark = pytest.mark.usefixtures("one_thread")
Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize("task_kind", TASK_KINDS)
def test_scores_are_those_of_peft(
    task_kind: str, made_once: MadeOnce, base_model: Folders, tmp_path: Path, capsys: Capture
) -> None:
    from train.evaluate import main as evaluate

    folder = kind_adapter(made_once, base_model, "bert", task_kind)
    training = json.loads((folder / "training.json").read_text())
    own = task_kinds.read_rows(task_kinds.validation_file(made_once))
    other = task_kinds.make_rows(30, seed=7)
    assert evaluate([str(folder), "--file", str(write_jsonl(tmp_path / "o.jsonl", other))]) == 0
    output = capsys.readouterr().out
    result = json.loads(output.splitlines()[-1])
    for rows, scores, recalls in (
        (own, training["validation"], training["recalls"]["validation"]),
        (other, result["scores"], result["recalls"]),
    ):
        n_labels = 1 if task_kind == "regression" else len(TAGS)
        logits = task_kinds.golden_logits(folder, base_model("bert"), rows, n_labels)
        expected, predicted = task_kinds.truth(rows, task_kind), task_kinds.golden_answers(logits, task_kind)
        assert len(np.unique(predicted, axis=0)) > 1, "or the scores prove nothing"
        assert scores == pytest.approx(task_kinds.golden_scores(expected, predicted, task_kind), abs=1e-5)
        assert recalls == pytest.approx(task_kinds.golden_recalls(expected, predicted, task_kind))
    assert load_adapter(folder).task.kind == task_kind
    card = (folder / "README.md").read_text()
    assert ("Its only logit is the number." if task_kind == "regression" else "`long`, `near`, `same`.") in card
    assert ("recall long" in output) == ("recall of each label" in card) == (task_kind == "multi_label")


def test_baselines_are_the_best_constants_and_a_line(made_once: MadeOnce, base_model: Folders) -> None:
    data = task_kinds.make_data(made_once("data-of-kinds", task_kinds.make_data))
    train, validation = map(task_kinds.read_rows, (data.train_file, data.validation_file))

    def baselines(task_kind: str) -> dict[str, dict[str, float]]:
        folder = kind_adapter(made_once, base_model, "bert", task_kind)
        found: dict[str, dict[str, float]] = json.loads((folder / "training.json").read_text())["baselines"]
        return found

    numbers, expected = (task_kinds.truth(rows, "regression") for rows in (train, validation))
    of_mean, of_line = baselines("regression").values()
    assert (of_mean["pearson"], of_mean["spearman"]) == (0, 0), "a constant has no correlation"
    mean = ((expected - numbers.mean()) ** 2).sum()
    assert of_mean["r2"] == pytest.approx(1 - mean / ((expected - expected.mean()) ** 2).sum())
    inputs = [cosines(base_model("bert"), rows)[:, None] for rows in (train, validation)]
    answers = LinearRegression().fit(inputs[0], numbers).predict(inputs[1])
    assert of_line == pytest.approx(task_kinds.golden_scores(expected, answers, "regression"), abs=1e-4)

    sets, expected = (task_kinds.truth(rows, "multi_label") for rows in (train, validation))
    # Brute force over all sets of labels, on the training rows.
    every = [np.array([number >> bit & 1 for bit in range(3)], bool) for number in range(8)]

    def micro(rows: np.ndarray, answer: np.ndarray) -> float:
        return task_kinds.golden_scores(rows, np.tile(answer, (len(rows), 1)), "multi_label")["f1_micro"]

    best = max(every, key=lambda answer: micro(sets, answer))
    frequent = max(every, key=lambda answer: (sets == answer).all(axis=1).sum())
    found = {name: values["f1_micro"] for name, values in baselines("multi_label").items()}
    assert list(found.values()) == pytest.approx([micro(expected, frequent), micro(expected, best)])
    assert not frequent.any()
    assert list(found) == ["always no label", f"always `{','.join(np.array(TAGS)[best])}`"]


@pytest.mark.parametrize("task_kind", TASK_KINDS)
def test_the_loss_is_that_of_transformers(task_kind: str, made_once: MadeOnce, base_model: Folders) -> None:
    """PEFT's own forward with labels, of a model whose configuration has the kind as transformers names it."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    from train.adapter.peft import find_adapter_base, load_prompted_classifier

    folder = kind_adapter(made_once, base_model, "bert", task_kind)
    settings: dict[str, Any] = {"num_labels": 1, "problem_type": "regression"}
    labels = torch.tensor([0.5, 4.0])
    if task_kind == "multi_label":
        settings = {"num_labels": 3, "problem_type": "multi_label_classification"}
        labels = torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    model = AutoModelForSequenceClassification.from_pretrained(base_model("bert"), **settings)
    golden = PeftModel.from_pretrained(model, folder).eval()
    batch = {
        "input_ids": torch.tensor([[2, 5, 6, 3], [2, 7, 3, 0]]),
        "attention_mask": torch.tensor([[1] * 4, [1] * 3 + [0]]),
    }
    adapter = load_adapter(folder)
    classifier = load_prompted_classifier(adapter, find_adapter_base(adapter))
    assert classifier.config.problem_type == settings["problem_type"]
    with torch.inference_mode():
        expected = golden(**batch, labels=labels).loss
        assert float(classifier(**batch, labels=labels)["loss"]) == pytest.approx(float(expected), abs=1e-5)


def bad_rows(labels: list[Any]) -> list[dict[str, object]]:
    return [{"text": f"word{index}", "label": value} for index, value in enumerate(labels)]


@pytest.mark.parametrize(
    ("labels", "validation", "flags", "words"),
    [
        (
            [1, 2.5],
            [1, "much"],
            "--kind regression",
            "v.jsonl, row 2 (line 2): label 'much' in column 'label' is no fin",
        ),
        ([1, 2.5], [1, None], "--kind regression", "row 2 (line 2): label None in column 'label' is no finite number"),
        (
            [1, "nan"],
            [1, 2],
            "--kind regression",
            "t.jsonl, row 2 (line 2): label 'nan' in column 'label' is no finite",
        ),
        ([1, float("inf")], [1, 2], "--kind regression", "row 2 (line 2): label inf in column 'label' is no finite"),
        ([1, True], [1, 2], "--kind regression", "label True in column 'label' is no finite number"),
        ([1, "1_000"], [1, 2], "--kind regression", "label '1_000' in column 'label' is no finite number"),
        ([2, 2.0, "2"], [1, 2], "--kind regression", "t.jsonl: column 'label' holds 2.0 in every row"),
        ([1, 2], [3], "--kind regression", "v.jsonl: column 'label' holds 3.0 in every row, and no correlation"),
        ([1, 2], [1, 2], "--kind regression --labels a,b", "--labels a,b: a regression has a number"),
        ([["a"], ["b"]], [["c"]], "--kind multi_label", "v.jsonl, row 1 (line 1): label 'c' in column 'label' is none"),
        ([["a"], ["b"]], [{}], "--kind multi_label", "label {} in column 'label' is no list of labels"),
        ([["a"], ["b,c"]], [[]], "--kind multi_label", "Column 'label': label 'b,c' has a comma"),
        ([["a"], []], [[]], "--kind multi_label", "Column 'label': between 2 and 1000 labels can be told apart, not 1"),
        ([["a"], ["b"]], [["a"]], "", "t.jsonl, row 1 (line 1): column 'label' holds a list, and a classification has"),
        (
            [1, 2.5],
            [1, 2.5],
            "",
            "column 'label' holds numbers with fractions, such as 2.5. To learn the numbers add --kind",
        ),
        (
            [["a"], ["b"]],
            [[]],
            "--kind multi_label --threshold 1",
            "--threshold 1.0: give a number above 0 and below 1",
        ),
        ([["a"], ["b"]], [[]], "--kind multi_label --threshold nan", "--threshold nan: give a number above 0"),
        (["a", "b"], ["a"], "--threshold 0.4", "--threshold 0.4 is for --kind multi_label"),
        (["a", "b"], ["a"], "--kind ranking", "--kind"),
        (
            [1, 2],
            [1, 2],
            "--kind regression --class-weights balanced",
            "--class-weights is for classes, and task custom is",
        ),
        (["a", "b"], ["a"], "--labels a,b,c --class-weights balanced", "no training row has label 'c'"),
    ],
)
def test_what_is_no_label_of_the_kind_is_named(
    labels: list[Any],
    validation: list[Any],
    flags: str,
    words: str,
    tmp_path: Path,
    base_model: Folders,
    capsys: Capture,
) -> None:
    files = Data(
        write_jsonl(tmp_path / "t.jsonl", bad_rows(labels)),
        write_jsonl(tmp_path / "v.jsonl", bad_rows(validation)),
    )
    words_of_run = ["--model", str(base_model("bert")), "--text-columns", "text", *files.flags, *flags.split()]
    assert main([*words_of_run, "--out", str(tmp_path / "a")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert words in error
    assert not list(tmp_path.glob("a*"))


def test_labels_may_be_a_list_or_a_text_with_commas(tmp_path: Path) -> None:
    task = custom_task(("text",), "tags", ["a", "b", "10"], "multi_label", 0.25)
    rows: list[dict[str, object]] = [
        {"text": "one", "tags": ["b", "a"]},
        {"text": "two", "tags": []},
        {"text": "three", "tags": ["10"]},
    ]
    files = [write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / "in.parquet", tmp_path / "in.csv"]
    pd.DataFrame(rows).to_parquet(files[1])
    files[2].write_text('text,tags\none,"b, a"\ntwo,\nthree,10\n')
    for file in files:
        assert load_split(task, "train", file)["tags"][:] == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]
    assert Task.from_json(json.loads(json.dumps(task.as_json()))) == task
    config = TrainConfig(
        out=tmp_path,
        text_columns=("text",),
        label_column="tags",
        kind="multi_label",
        train_file=files[2],
        validation_file=write_jsonl(tmp_path / "other.jsonl", rows[:2]),
    )
    assert load_splits(config).task.labels == ("10", "a", "b")
    logits = np.log(np.array([[0.3, 0.2, 0.9]]) / (1 - np.array([[0.3, 0.2, 0.9]])))
    assert task.probabilities(logits) == pytest.approx(np.array([[0.3, 0.2, 0.9]]))
    assert task.predict(logits).tolist() == [[True, False, True]]
    assert task.join_labels([True, False, True]) == "a,10"


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"kind": "ranking"}, "a kind among"),
        ({"kind": "regression"}, "one label, as a regression has"),
        ({"kind": "multi_label"}, "metrics among f1_micro, f1_macro"),
        ({"kind": "multi_label", "metrics": ["f1_macro"], "threshold": 1.5}, "a threshold between 0 and 1"),
        ({"threshold": 0.5}, "a threshold between 0 and 1 where it is multi-label, and none elsewhere"),
        ({"kind": "multi_label", "metrics": ["f1_macro"], "labels": ["a"]}, "from 2 to 1000 labels"),
    ],
)
def test_a_task_that_contradicts_itself_is_refused(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Task.from_json(get_task("mrpc").as_json() | changed)


def test_numbers_without_a_correlation_are_named(tmp_path: Path) -> None:
    task = get_task("stsb")
    with pytest.raises(UsageError, match="all equal, so no correlation"):
        score(task, [1.0, 2.0], [3.0, 3.0])
    with pytest.raises(UsageError, match="smaller --learning-rate"):
        score(task, [1.0, np.nan], [3.0, 4.0])
    generator = np.random.default_rng(0)
    expected, predicted = generator.integers(0, 9, (2, 200)) / 3.0  # ties, as people's ratings have
    assert score(task, predicted, expected).values == pytest.approx(
        task_kinds.golden_scores(expected, predicted, "regression")
    )
    with pytest.raises(DataError, match=r"holds 2\.0 in every row"):
        load_split(task, "", write_jsonl(tmp_path / "in.jsonl", [dict.fromkeys(COLUMNS, "a") | {"label": 2}] * 3))


def test_stsb_is_a_regression_and_mnli_has_two_validation_splits(
    base_model: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    sizes = {"train": (24, 1), "validation_matched": (12, 2), "validation_mismatched": (10, 3)}
    names = {"sentence1": "premise", "sentence2": "hypothesis"}

    def rows_of(split: str) -> list[dict[str, Any]]:
        rows = make_pairs(*sizes[split])
        return [{new: row[old] for old, new in names.items()} | {"label": index % 3} for index, row in enumerate(rows)]

    def load_dataset(path: str, config: str, *, split: str) -> datasets.Dataset:
        """Stands in for the hub, which needs a network."""
        if config == "stsb":
            return datasets.Dataset.from_list([dict.fromkeys(COLUMNS, "a b") | {"label": n / 2} for n in range(3)])
        return datasets.Dataset.from_list(rows_of(split))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    stsb = load_splits(TrainConfig(out=tmp_path / "a", task="stsb", swap_sentences=True))
    assert (stsb.task.kind, stsb.task.metrics[:2]) == ("regression", ("pearson", "spearman"))
    assert stsb.train["label"][:] == [0, 0.5, 1]
    assert stsb.more == {}

    flags = "--task mnli --epochs 1 --virtual-tokens 5 --encoder-hidden-size 16 --learning-rate 0.03"
    assert main(["--model", str(base_model("bert")), *flags.split(), "--out", str(tmp_path / "a")]) == 0
    training = json.loads((tmp_path / "a" / "training.json").read_text())
    for split, scores in (
        ("validation_matched", training["validation"]),
        ("validation_mismatched", training["more_validation"]["validation_mismatched"]),
    ):
        rows = rows_of(split)
        predicted = peft_predictions(tmp_path / "a", base_model("bert"), rows, list(names.values()), n_labels=3)
        accuracy = np.mean(np.array(predicted) == [row["label"] for row in rows])
        assert scores == pytest.approx({"accuracy": accuracy})
    words = f"this adapter on validation_mismatched: accuracy {100 * accuracy:.1f}"
    assert words in capsys.readouterr().out
    assert "| this adapter on validation_mismatched, which chose nothing |" in (tmp_path / "a/README.md").read_text()


def test_weights_of_classes_and_the_recall_of_each(base_model: Folders, tmp_path: Path, capsys: Capture) -> None:
    import torch

    from train.model.loss import mean_loss

    rows = [row for index, row in enumerate(make_pairs(60, seed=1)) if row["label"] or index % 10 == 0]
    counts = np.bincount([int(str(row["label"])) for row in rows])
    files = Data(write_jsonl(tmp_path / "t.jsonl", rows), write_jsonl(tmp_path / "v.jsonl", make_pairs(30, seed=2)))
    small = "--epochs 2 --virtual-tokens 5 --encoder-hidden-size 16 --learning-rate 0.01"
    shown, losses = [], []
    for name, flags in (("plain", ""), ("weighed", "--class-weights balanced")):
        out = tmp_path / name
        words = ["--model", str(base_model("bert")), *files.flags, *small.split(), *flags.split(), "--out", str(out)]
        assert main(words) == 0
        shown.append(capsys.readouterr().out)
        training = json.loads((out / "training.json").read_text())
        losses.append([epoch["train_loss"] for epoch in training["epochs"]])
        validation = make_pairs(30, seed=2)
        predicted = peft_predictions(out, base_model("bert"), validation, COLUMNS)
        recalls = recall_score([row["label"] for row in validation], predicted, average=None)
        named = dict(zip(("not_equivalent", "equivalent"), recalls, strict=True))
        assert training["recalls"]["validation"] == pytest.approx(named)
        assert training["recalls"]["baselines"]["always `equivalent`"] == {"not_equivalent": 0, "equivalent": 1}
        for place in (shown[-1], (out / "README.md").read_text()):
            assert f"not_equivalent {100 * recalls[0]:.1f}, equivalent {100 * recalls[1]:.1f}" in place
    weights = compute_class_weight("balanced", classes=np.arange(2), y=[row["label"] for row in rows])
    assert weights == pytest.approx(counts.sum() / (2 * counts))
    assert f"weights of the classes: not_equivalent {weights[0]:.2f}, equivalent {weights[1]:.2f}" in shown[1]
    assert "weights of the classes" not in shown[0]
    assert losses[0] != losses[1]
    logits, labels = torch.randn(4, 2), torch.tensor([0, 1, 1, 1])
    golden = torch.nn.CrossEntropyLoss(weight=torch.tensor(weights, dtype=torch.float32))(logits, labels)
    assert mean_loss(None, logits, labels, torch.tensor(weights, dtype=torch.float32)) == pytest.approx(float(golden))


def test_of_many_labels_the_lowest_recalls_are_shown() -> None:
    scores = Scores({"accuracy": 0.5}, {f"label{number}": number / 20 for number in range(20)})
    assert scores.with_recalls().startswith("accuracy 50.0; recall label0 0.0, label1 5.0, ")
    assert scores.recall_words.endswith("label7 35.0 (the lowest of 20)")
