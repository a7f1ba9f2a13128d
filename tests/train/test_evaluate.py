"""``python -m train.evaluate`` through its entry point."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from sklearn.metrics import accuracy_score, f1_score

from tests.conftest import Data, Folders, family_of, is_decoder, make_pairs, peft_logits, write_jsonl
from train.evaluate import main

Capture = pytest.CaptureFixture[str]
Rows = list[dict[str, Any]]


def peft_predictions(
    adapter: Path, base: Path, rows: Rows, columns: Sequence[str], *, n_labels: int = 2, alone: bool = False
) -> list[int]:
    """Class indices by transformers and PEFT alone, with the adapter's tokenizer.

    PEFT pools a decoder's last row, so such a one gets row after row (``alone``), without padding.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(adapter)
    predicted: list[int] = []
    for batch in [[row] for row in rows] if alone else [rows]:
        texts = [[row[column] for row in batch] for column in columns]
        encoded = dict(tokenizer(*texts, padding=True, return_tensors="np"))
        predicted += peft_logits(adapter, base, encoded, n_labels=n_labels).argmax(axis=-1).tolist()
    return predicted


def check_scores(scores: dict[str, float], kind: str, adapter: Folders, base_model: Folders, file: Path) -> None:
    """Compare with the metrics of scikit-learn on what PEFT alone predicts for an MRPC file."""
    rows, family = [json.loads(line) for line in file.read_text().splitlines()], family_of(kind)
    columns, alone = ("sentence1", "sentence2"), is_decoder(kind)
    predicted = peft_predictions(adapter(kind), base_model(family), rows, columns, alone=alone)
    expected = [row["label"] for row in rows]
    metrics = {"accuracy": accuracy_score(expected, predicted), "f1": f1_score(expected, predicted)}
    assert scores == pytest.approx(metrics)


@pytest.mark.parametrize("kind", ["roberta-v2", "gpt2"])
def test_scores_on_another_file_are_those_of_peft(
    kind: str, adapter: Folders, base_model: Folders, tmp_path: Path, capsys: Capture
) -> None:
    file = write_jsonl(tmp_path / "other.jsonl", make_pairs(30, seed=11))
    assert main([str(adapter(kind)), "--file", str(file)]) == 0
    output = capsys.readouterr().out
    result = json.loads(output.splitlines()[-1])
    check_scores(result["scores"], kind, adapter, base_model, file)
    assert result["baselines"]["always `equivalent`"] == pytest.approx({"accuracy": 0.5, "f1": 2 / 3})
    # The pairs that mean the same share their words, which the frozen embeddings see well.
    assert result["baselines"]["cosine of the frozen model's embeddings"]["accuracy"] > 0.7
    assert f"accuracy {100 * result['scores']['accuracy']:.1f}" in output


def test_other_column_names_are_read_when_they_are_given(adapter: Folders, tmp_path: Path, capsys: Capture) -> None:
    rows, names = make_pairs(12, seed=12), ("not_equivalent", "equivalent")
    lines = [f"{row['sentence1']},{row['sentence2']},{names[index % 2]}\n" for index, row in enumerate(rows)]
    (tmp_path / "mine.csv").write_text("".join(["left,right,gold\n", *lines]))
    write_jsonl(tmp_path / "same.jsonl", rows)
    results = []
    for flags in ("mine.csv --text-columns left,right --label-column gold", "same.jsonl"):
        assert main([str(adapter("bert")), "--batch-size", "5", *f"--file {tmp_path}/{flags}".split()]) == 0
        results.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert results[0]["scores"] == pytest.approx(results[1]["scores"])


def test_the_rows_of_the_training_are_recognised(adapter: Folders, data: Data, capsys: Capture) -> None:
    for file, is_known in ((data.train_file, True), (data.validation_file, False)):
        assert main([str(adapter("bert")), "--file", str(file)]) == 0
        assert (
            "that is what the adapter was trained on, so the scores flatter it" in capsys.readouterr().out
        ) == is_known


def test_a_wrong_flag_ends_with_one_sentence(adapter: Folders, data: Data, tmp_path: Path, capsys: Capture) -> None:
    for flags, words in (
        (f"--file {tmp_path}/none.jsonl", f"--file {tmp_path}/none.jsonl: there is no such file"),
        (f"--file {data.validation_file} --text-columns sentence1", "was trained on 2"),
        (f"--file {data.validation_file} --batch-size 0", "--batch-size 0: give a whole number"),
    ):
        assert main([str(adapter("bert")), *flags.split()]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert words in error
