"""``python -m train.evaluate`` and ``python -m tests.measure.training`` through their entry points."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from sklearn.metrics import accuracy_score, f1_score

from tests.conftest import DECODERS, Data, family_of, make_pairs, peft_logits, write_jsonl
from tests.measure.training import main as bench
from train.evaluate import main

Folders = Callable[[str], Path]


def peft_predictions(
    adapter_folder: Path, base_folder: Path, texts: list[tuple[str, str]], *, alone: bool
) -> list[int]:
    """By transformers and PEFT alone, with the tokenizer that the adapter brings."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(adapter_folder)
    batches = [[pair] for pair in texts] if alone else [texts]
    predicted: list[int] = []
    for batch in batches:
        first, second = zip(*batch, strict=True)
        encoded = tokenizer(list(first), list(second), padding=True, return_tensors="np")
        predicted += peft_logits(adapter_folder, base_folder, dict(encoded)).argmax(axis=-1).tolist()
    return predicted


@pytest.mark.parametrize("kind", ["bert", "roberta-v2", "gpt2", "llama-v2"])
def test_scores_on_another_file_are_those_of_peft(
    kind: str, adapter: Folders, base_model: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = make_pairs(30, seed=11)
    file = write_jsonl(tmp_path / "other.jsonl", rows)
    assert main([str(adapter(kind)), "--file", str(file)]) == 0
    output = capsys.readouterr().out
    result = json.loads(output.splitlines()[-1])

    texts = [(str(row["sentence1"]), str(row["sentence2"])) for row in rows]
    expected = [row["label"] for row in rows]
    predicted = peft_predictions(adapter(kind), base_model(family_of(kind)), texts, alone=family_of(kind) in DECODERS)
    assert result["rows"] == 30
    assert result["scores"] == pytest.approx(
        {"accuracy": accuracy_score(expected, predicted), "f1": f1_score(expected, predicted)}
    )
    assert result["baselines"]["always `equivalent`"] == pytest.approx({"accuracy": 0.5, "f1": 2 / 3})
    (cosine,) = [scores for name, scores in result["baselines"].items() if name.startswith("cosine")]
    # The pairs that mean the same share their words, which the frozen embeddings see well.
    assert cosine["accuracy"] > 0.7
    assert f"accuracy {100 * result['scores']['accuracy']:.1f}" in output


def test_a_file_with_other_column_names_is_read_when_they_are_given(
    adapter: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = make_pairs(12, seed=12)
    file = tmp_path / "mine.csv"
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["left", "right", "gold"])
        writer.writerows(
            [row["sentence1"], row["sentence2"], ("not_equivalent", "equivalent")[int(str(row["label"]))]]
            for row in rows
        )
    same = write_jsonl(tmp_path / "same.jsonl", rows)
    results = []
    for flags in (
        ["--file", str(file), "--text-columns", "left,right", "--label-column", "gold"],
        ["--file", str(same)],
    ):
        assert main([str(adapter("bert")), *flags, "--batch-size", "5"]) == 0
        results.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert results[0]["scores"] == pytest.approx(results[1]["scores"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["{adapter}", "--file", "{tmp}/none.jsonl"], "--file {tmp}/none.jsonl: there is no such file"),
        (["{tmp}", "--file", "{data}"], "is no adapter of promptfold"),
        (["{adapter}"], "--file"),
        (["{adapter}", "--file", "{data}", "--text-columns", "sentence1"], "was trained on 2"),
        (["{adapter}", "--file", "{data}", "--label-column", "gold"], "has no column 'gold'"),
        (["{adapter}", "--file", "{data}", "--batch-size", "0"], "--batch-size 0: give a whole number"),
    ],
)
def test_a_wrong_flag_ends_with_one_sentence_and_status_2(
    flags: list[str], words: str, adapter: Folders, data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"{adapter}": str(adapter("bert")), "{tmp}": str(tmp_path), "{data}": str(data.validation_file)}
    for name, place in places.items():
        flags = [flag.replace(name, place) for flag in flags]
        words = words.replace(name, place)
    assert main(flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert words in error


def test_the_bench_trains_both_loops_and_ends_with_their_ratio(
    base_model: Folders, data: Data, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(["--model", str(base_model("bert")), *data.flags, "--epochs", "1", "--rounds", "2"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    loops = [item["loop"] for item in result["trainings"]]
    assert loops == ["tutorial", "promptfold", "tutorial", "promptfold"]
    for item in result["trainings"]:
        assert item["samples_per_second"] == pytest.approx(64 / item["seconds"])
        assert 0 <= item["scores"]["accuracy"] <= 1
    first, second = result["ratio_per_round"]
    assert first > 0
    assert second > 0
    assert result["samples_per_second_ratio"] > 0


def test_the_bench_refuses_what_it_cannot_train(data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(["--model", str(tmp_path), *data.flags]) == 2
    assert "has no config.json" in capsys.readouterr().err
    assert bench(["--rounds", "0"]) == 2
    assert "--rounds 0" in capsys.readouterr().err
