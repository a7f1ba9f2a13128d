"""``python -m train.evaluate`` through its entry point."""

import json
from pathlib import Path

import pytest
from sklearn.metrics import accuracy_score, f1_score

from tests.conftest import DECODERS, Data, Folders, family_of, make_pairs, peft_logits, write_jsonl
from train.evaluate import main


def check_scores(scores: dict[str, float], adapter: Path, base: Path, file: Path, *, alone: bool) -> None:
    """Compare with the metrics of scikit-learn on what PEFT alone predicts for an MRPC file, with the adapter's tokenizer.

    PEFT pools a decoder's last row, so such a one gets row after row, without padding.
    """
    from transformers import AutoTokenizer

    rows = [json.loads(line) for line in file.read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    predicted: list[int] = []
    for batch in [[row] for row in rows] if alone else [rows]:
        texts = [[row[column] for row in batch] for column in ("sentence1", "sentence2")]
        encoded = dict(tokenizer(*texts, padding=True, return_tensors="np"))
        predicted += peft_logits(adapter, base, encoded).argmax(axis=-1).tolist()
    expected = [row["label"] for row in rows]
    assert scores == pytest.approx(
        {"accuracy": accuracy_score(expected, predicted), "f1": f1_score(expected, predicted)}
    )


@pytest.mark.parametrize("kind", ["roberta-v2", "gpt2"])
def test_scores_on_another_file_are_those_of_peft(
    kind: str, adapter: Folders, base_model: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, family = write_jsonl(tmp_path / "other.jsonl", make_pairs(30, seed=11)), family_of(kind)
    assert main([str(adapter(kind)), "--file", str(file)]) == 0
    output = capsys.readouterr().out
    result = json.loads(output.splitlines()[-1])
    check_scores(result["scores"], adapter(kind), base_model(family), file, alone=family in DECODERS)
    assert result["rows"] == 30
    assert result["baselines"]["always `equivalent`"] == pytest.approx({"accuracy": 0.5, "f1": 2 / 3})
    # The pairs that mean the same share their words, which the frozen embeddings see well.
    assert result["baselines"]["cosine of the frozen model's embeddings"]["accuracy"] > 0.7
    assert f"accuracy {100 * result['scores']['accuracy']:.1f}" in output


def test_a_file_with_other_column_names_is_read_when_they_are_given(
    adapter: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = make_pairs(12, seed=12)
    file = tmp_path / "mine.csv"
    names = ("not_equivalent", "equivalent")
    lines = [f"{row['sentence1']},{row['sentence2']},{names[index % 2]}\n" for index, row in enumerate(rows)]
    file.write_text("".join(["left,right,gold\n", *lines]))
    same = write_jsonl(tmp_path / "same.jsonl", rows)
    results = []
    for flags in ([str(file), "--text-columns", "left,right", "--label-column", "gold"], [str(same)]):
        assert main([str(adapter("bert")), "--batch-size", "5", "--file", *flags]) == 0
        results.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert results[0]["scores"] == pytest.approx(results[1]["scores"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("{adapter} --file {tmp}/none.jsonl", "--file {tmp}/none.jsonl: there is no such file"),
        ("{tmp} --file {data}", "is no adapter of promptfold"),
        ("{adapter}", "--file"),
        ("{adapter} --file {data} --text-columns sentence1", "was trained on 2"),
        ("{adapter} --file {data} --label-column gold", "has no column 'gold'"),
        ("{adapter} --file {data} --batch-size 0", "--batch-size 0: give a whole number"),
    ],
)
def test_a_wrong_flag_ends_with_one_sentence_and_status_2(
    flags: str, words: str, adapter: Folders, data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"adapter": adapter("bert"), "tmp": tmp_path, "data": data.validation_file}
    assert main(flags.format(**places).split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert words.format(**places) in error
