"""``python -m export.score`` through its entry point: whole files, any format, interrupted and gone on with."""

import csv
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from scipy.special import softmax
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

import export.runtime.session
from export.bundle.folder import load_bundle
from export.runtime.batches import classify, score_counts
from export.runtime.classifier import OnnxClassifier
from export.score.__main__ import main
from export.score.finished_chunks import ChunkRecord, FinishedChunks
from tests.conftest import (
    POSITIONS,
    ROOT,
    VIRTUAL_TOKENS,
    WORDS,
    Folders,
    family_of,
    flip_bit,
    make_pairs,
    peft_logits,
    write_jsonl,
)
from tests.train.test_data import GOOD
from train.data.tasks import MRPC, TASKS, Task, custom_task, score

pytestmark = pytest.mark.usefixtures("one_thread")

Rows = list[dict[str, Any]]
Label = Callable[..., dict[str, Any]]
"""Labels a file with the command line: bundle, input, output, flags → the JSON of the last line."""
Refusal = Callable[..., str]
"""Runs a command line that must be refused: words → the message."""

LABELS = MRPC.labels
SUFFIXES = (".csv", ".jsonl", ".parquet")


def write_rows(path: Path, rows: Rows) -> Path:
    """A file of the format that its name ends in, written by others than promptfold."""
    if path.suffix == ".jsonl":
        write_jsonl(path, rows)
    elif path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path


def read_rows(path: Path) -> Rows:
    """The inverse."""
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_bytes().splitlines()]  # text would be split at U+2028 too
    if path.suffix == ".parquet":
        return parquet.read_table(path).to_pylist()
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream, strict=True))


def shuffled_pairs(n: int, seed: int) -> Rows:
    """Pairs of many lengths in no order, the longest of them too long."""
    generator = random.Random(seed)  # noqa: S311 -- test data

    def words() -> str:
        return " ".join(generator.choices(WORDS, k=generator.randint(1, 12)))

    rows: Rows = [{"sentence1": words(), "sentence2": words()} for _ in range(n)]
    rows[n // 2]["sentence2"] = " ".join(WORDS[:60])
    return rows


def golden_probabilities(
    texts: Sequence[tuple[str, ...]], adapter_folder: Path, base_folder: Path, *, n_labels: int = 2
) -> np.ndarray:
    """By transformers, PEFT and SciPy alone, texts of one length together: nothing is ever padded."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(adapter_folder)
    cut: dict[str, Any] = {"truncation": "longest_first", "max_length": POSITIONS - VIRTUAL_TOKENS}
    encoded = [tokenizer(*text, **cut, return_tensors="np") for text in texts]
    by_length = defaultdict(list)
    for row, item in enumerate(encoded):
        by_length[item["input_ids"].shape[1]].append(row)
    assert len(by_length) > 5
    logits = np.empty((len(texts), n_labels))
    for rows in by_length.values():
        batch = {name: np.concatenate([encoded[row][name] for row in rows]) for name in encoded[0]}
        logits[rows] = peft_logits(adapter_folder, base_folder, batch, n_labels=n_labels)
    return softmax(logits, axis=1)


@pytest.fixture(autouse=True)
def cpu_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime on the CPU, wherever the tests run: only there the same bits come again."""
    monkeypatch.setattr(export.runtime.session, "cuda_absence", lambda: "not in these tests")


@pytest.fixture
def label(capsys: pytest.CaptureFixture[str]) -> Label:
    """A function that runs the command line to its end and returns the JSON of its last line."""

    def run(bundle_folder: Path, source: Path, out: Path, *flags: str) -> dict[str, Any]:
        capsys.readouterr()
        words = [str(bundle_folder), "--in", str(source), "--out", str(out), "--threads", "1", *flags]
        status = main(words)
        captured = capsys.readouterr()
        assert status == 0, captured.err
        assert not out.with_name(f"{out.name}.partial").exists()
        return json.loads(captured.out.splitlines()[-1])

    return run


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Refusal:
    """A function that runs a command line which must be refused, and returns what it says."""

    def run(*words: str | Path) -> str:
        capsys.readouterr()
        assert main([str(word) for word in words]) == 2
        (error,) = [line for line in capsys.readouterr().err.splitlines() if line and "row/s" not in line]
        assert error.startswith("error: ")
        return error

    return run


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_predictions_are_pefts_in_the_callers_order(
    kind: str, bundle: Folders, adapter: Folders, base_model: Folders, tmp_path: Path, label: Label
) -> None:
    rows = shuffled_pairs(37, seed=4)
    source = write_rows(tmp_path / "in.jsonl", rows)
    result = label(bundle(kind), source, tmp_path / "out.jsonl", *shlex.split("--all-probabilities --batch-size 5"))
    texts = [(row["sentence1"], row["sentence2"]) for row in rows]
    golden = golden_probabilities(texts, adapter(kind), base_model(family_of(kind)))
    written = read_rows(tmp_path / "out.jsonl")
    assert [{name: row[name] for name in MRPC.text_columns} for row in written] == rows
    probabilities = np.array([[row[f"probability_{name}"] for name in LABELS] for row in written])
    assert np.abs(probabilities - golden).max() < 1e-5
    assert np.ptp(golden[:, 0]) > 0.01  # or any order would do
    assert [row["prediction"] for row in written] == [LABELS[index] for index in golden.argmax(axis=1)]
    assert [row["probability"] for row in written] == probabilities.max(axis=1).tolist()
    assert (result["rows"], result["texts_cut"], result["scores"]) == (37, 1, None)
    assert result["out"] == str(tmp_path / "out.jsonl")
    assert result["rows_per_second"] == pytest.approx(37 / result["seconds"])


def test_chunks_and_batches_change_nothing(bundle: Folders, tmp_path: Path, label: Label) -> None:
    source = write_rows(tmp_path / "in.csv", shuffled_pairs(50, seed=5))
    written = []
    for flags in ("", "--chunk-rows 7 --batch-size 3", "--batch-size 1", "--chunk-rows 50", "--chunk-rows 1"):
        label(bundle("bert"), source, tmp_path / "out.jsonl", "--overwrite", *shlex.split(flags))
        written.append(read_rows(tmp_path / "out.jsonl"))
    probabilities = np.array([[row["probability"] for row in rows] for rows in written])
    assert np.abs(probabilities - probabilities[0]).max() < 1e-5
    assert all([row["sentence1"] for row in rows] == [row["sentence1"] for row in written[0]] for rows in written)


def test_classify_serves_other_code(bundle: Folders) -> None:
    classifier = OnnxClassifier(load_bundle(bundle("bert")), threads=1, use_cuda=False)
    texts = [(row["sentence1"], row["sentence2"]) for row in shuffled_pairs(20, seed=6)]
    seen: list[int] = []
    classified = classify(classifier, texts, batch_size=8, report=seen.append)
    assert seen == [8, 8, 4]
    assert classified.probabilities.sum(axis=1) == pytest.approx(np.ones(20))
    assert classified.predictions == [LABELS[index] for index in classified.indices]
    assert classified.cut.tolist() == [row == 10 for row in range(20)]
    for row, text in enumerate(texts):
        alone = classify(classifier, [text])
        assert np.abs(alone.probabilities[0] - classified.probabilities[row]).max() < 1e-5
    nothing = classify(classifier, [])
    assert (nothing.predictions, nothing.probabilities.shape) == ([], (0, 2))


VALUES: list[tuple[Any, ...]] = [
    ("word1 word2", "word2 word1", 3, 0.1, 'says "no", then\nleaves'),
    ("word3 'word4'", 'word5 "word6", word7\r\nword8', None, None, "ends in \r and\r\nmore"),
    ("word9 ,", "Ünïcödé 東京 🙂", -7, 1e300, None),
    ("null", "NA", 0, -0.0, ""),
    ("word10", "word11", 12, 2.0, "\u2028 separates\tnothing"),
]
MANY_TYPES: Rows = [
    dict(zip(("sentence1", "sentence2", "count", "ratio", "note"), values, strict=True))
    | {
        "big": 2**53 + 1 + n,
        "sure": n % 2 == 0,
        "code": f"0{n}",
        "tags": [{"name": "ä", "n": n}, {"name": None, "n": 2}],
    }
    for n, values in enumerate(VALUES)
]


def in_csv(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


@pytest.mark.parametrize("source_suffix", SUFFIXES)
@pytest.mark.parametrize("out_suffix", SUFFIXES)
def test_every_column_survives_in_every_format(
    source_suffix: str, out_suffix: str, bundle: Folders, tmp_path: Path, label: Label
) -> None:
    as_text = [{name: in_csv(value) for name, value in row.items()} for row in MANY_TYPES]
    rows = as_text if source_suffix == ".csv" else MANY_TYPES
    source = write_rows(tmp_path / f"in{source_suffix}", rows)
    out = tmp_path / f"out{out_suffix}"
    label(bundle("bert"), source, out, "--chunk-rows", "2")
    written = read_rows(out)
    assert list(written[0]) == [*rows[0], "prediction", "probability"]
    for row in written:
        assert row.pop("prediction") in LABELS
        probability = row.pop("probability")
        assert isinstance(probability, str if out_suffix == ".csv" else float)
        assert 0.5 <= float(probability) <= 1
    expected = as_text if out_suffix == ".csv" else rows
    assert written == expected
    assert [list(map(type, row.values())) for row in written] == [list(map(type, row.values())) for row in expected]
    if source_suffix == out_suffix == ".parquet":
        before, after = parquet.read_schema(source), parquet.read_schema(out)
        assert [after.field(name) for name in before.names] == list(before)
    if out_suffix == ".parquet":
        metadata = parquet.ParquetFile(out).metadata
        assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [2, 2, 1]
    else:
        assert b"\r\n" not in out.read_bytes().splitlines(keepends=True)[0]


def test_parquets_own_types_and_metadata_survive_or_become_text(
    bundle: Folders, tmp_path: Path, label: Label, refusal: Refusal
) -> None:
    columns = {
        "sentence1": pyarrow.array(["word1", "word2", "word3"], pyarrow.large_string()),
        "sentence2": ["word4", "word5", "word6"],
        "day": [date(2024, 2, 29), None, date(1, 1, 1)],
        "at": [datetime(2024, 2, 29, 12, 30), None, datetime(1999, 1, 1)],
        "price": [Decimal("1.10"), Decimal("2.00"), None],
        "kind": pyarrow.array(["a", "b", "a"]).dictionary_encode(),
        "small": pyarrow.array([1, None, 3], pyarrow.int8()),
        "nan": [float("nan"), float("inf"), 1.5],
    }
    table = pyarrow.table(columns, metadata={"made by": "a test"})
    source = tmp_path / "in.parquet"
    parquet.write_table(table, source, row_group_size=2)
    label(bundle("bert"), source, tmp_path / "out.parquet", "--chunk-rows", "2")
    written = parquet.read_table(tmp_path / "out.parquet")
    assert written.schema.metadata == {b"made by": b"a test"}
    assert written.drop_columns(["prediction", "probability", "nan"]).equals(table.drop_columns(["nan"]))
    label(bundle("bert"), source, tmp_path / "out.jsonl")
    first, second, _ = (list(row.values())[2:-2] for row in read_rows(tmp_path / "out.jsonl"))
    assert first == ["2024-02-29", "2024-02-29T12:30:00", "1.10", "a", 1, None]
    assert second == [None, None, "2.00", "b", None, None]

    parquet.write_table(table.append_column("image", pyarrow.array([b"\xff"] * 3)), source)
    words = (bundle("bert"), "--in", source, "--out", tmp_path / "out.csv")
    assert "column 'image' holds bytes, which csv cannot" in refusal(*words)
    label(bundle("bert"), source, tmp_path / "out.parquet", "--overwrite")
    assert parquet.read_table(tmp_path / "out.parquet")["image"].to_pylist() == [b"\xff"] * 3


def test_json_lines_keep_their_own_columns_and_parquet_gets_one_type_for_all(
    bundle: Folders, tmp_path: Path, label: Label, refusal: Refusal
) -> None:
    rows = shuffled_pairs(4, seed=8)
    rows[0] |= {"n": None}
    rows[1] |= {"n": 1, "late": "x"}
    rows[2] |= {"n": 2.5}
    source = write_rows(tmp_path / "in.jsonl", rows)
    source.write_text("\ufeff" + source.read_text().replace("\n", "\n\n"), encoding="utf-8")
    label(bundle("bert"), source, tmp_path / "out.jsonl", "--chunk-rows", "1")
    added = ["prediction", "probability"]
    assert [list(row) for row in read_rows(tmp_path / "out.jsonl")] == [[*row, *added] for row in rows]
    label(bundle("bert"), source, tmp_path / "out.parquet", "--chunk-rows", "1")
    table = parquet.read_table(tmp_path / "out.parquet")
    assert table["n"].to_pylist() == [None, 1.0, 2.5, None]
    assert table["late"].to_pylist() == [None, "x", None, None]
    label(bundle("bert"), source, tmp_path / "out.csv", "--chunk-rows", "1")
    assert [row["late"] for row in read_rows(tmp_path / "out.csv")] == ["", "x", "", ""]

    for value in ("text", True, 2**70):
        rows[3]["n"] = value
        write_rows(source, rows)
        for chunk_rows in ("1", "4"):
            words = (bundle("bert"), "--in", source, "--out", tmp_path / "new.parquet", "--chunk-rows", chunk_rows)
            assert "column 'n' cannot be written as parquet" in refusal(*words)
            assert not list(tmp_path.glob("new*"))


def test_metrics_are_sklearns_on_names_and_on_indices(bundle: Folders, tmp_path: Path, label: Label) -> None:
    rows = make_pairs(41, seed=9)
    for row in rows[::3]:
        row["label"] = 1 - int(str(row["label"]))
    expected = [int(str(row["label"])) for row in rows]
    named: Rows = [row | {"label": LABELS[index]} for row, index in zip(rows, expected, strict=True)]
    for case, suffix in ((rows, ".csv"), (named, ".csv"), (rows, ".jsonl"), (rows, ".parquet")):
        source = write_rows(tmp_path / f"in{suffix}", case)
        out = tmp_path / "out.jsonl"
        result = label(bundle("bert"), source, out, "--overwrite", "--chunk-rows", "8")
        predicted = [LABELS.index(row["prediction"]) for row in read_rows(out)]
        metrics = {"accuracy": accuracy_score(expected, predicted), "f1": f1_score(expected, predicted)}
        assert result["scores"] == pytest.approx(metrics, abs=1e-12)
    assert label(bundle("bert"), source, out, "--overwrite", "--no-labels")["scores"] is None


@pytest.mark.parametrize(
    "task", [MRPC, TASKS["mnli"], TASKS["cola"], custom_task(("a",), "b", ["x", "y", "z", "never"])]
)
@pytest.mark.filterwarnings("ignore:A single label was found:UserWarning")  # scikit-learn's, of Matthews' correlation
@pytest.mark.parametrize("classes", ["all", "one predicted", "one expected", "one of both"])
def test_scores_from_counts_are_those_of_train_tasks(task: Task, classes: str) -> None:
    generator = np.random.default_rng(10)
    n = min(len(task.labels), 3)
    expected, predicted = generator.integers(0, n, (2, 200))
    if classes in {"one predicted", "one of both"}:
        predicted[:] = 1
    if classes in {"one expected", "one of both"}:
        expected[:] = 1
    counts = np.zeros((len(task.labels),) * 2, np.int64)
    np.add.at(counts, (expected, predicted), 1)
    assert score_counts(task, counts).values == pytest.approx(score(task, predicted, expected).values, abs=1e-12)
    if "matthews" in task.metrics:
        matthews = score_counts(task, counts * 10**7).values["matthews"]
        assert matthews == pytest.approx(matthews_corrcoef(expected, predicted))


def test_what_was_done_is_told(bundle: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = make_pairs(12, seed=13)
    rows[3]["sentence1"] = rows[5]["sentence2"] = " ".join(WORDS[:70])
    source = write_rows(tmp_path / "in.jsonl", rows)
    folder = bundle("bert")
    capsys.readouterr()
    assert main([str(folder), "--in", str(source), "--out", str(tmp_path / "deep" / "er" / "out.csv")]) == 0
    captured = capsys.readouterr()
    summary, cut, scores, document = captured.out.splitlines()
    assert summary.startswith(f"{tmp_path / 'deep' / 'er' / 'out.csv'}: 12 rows, 12 of them labelled in ")
    assert summary.endswith(" rows/s)")
    assert cut == f"2 texts are longer than {POSITIONS - VIRTUAL_TOKENS} tokens and lost their end"
    assert scores.startswith("against the file's labels: accuracy ")
    assert set(json.loads(document)) == {"rows", "seconds", "rows_per_second", "texts_cut", "scores", "out"}
    assert "12/12" in captured.err
    assert "row/s" in captured.err


def long_file(path: Path, n: int) -> Path:
    rows: Rows = make_pairs(n, seed=14)
    rows[7]["sentence1"] = " ".join(WORDS[:70])
    return write_rows(path, [row | {"note": f'"{index}",\n'} for index, row in enumerate(rows)])


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def interrupted(
    bundle: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> list[str]:
    """The words of a command line that was ended after two of three parts."""
    source = long_file(tmp_path / "in.jsonl", 23)
    words = [str(bundle("bert")), "--in", str(source), "--out", str(tmp_path / "out.jsonl"), "--chunk-rows", "10"]
    add = FinishedChunks.add

    def add_or_stop(self: FinishedChunks, number: int, *arguments: Any, **named: Any) -> ChunkRecord:
        if number == 2:
            raise KeyboardInterrupt
        return add(self, number, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(FinishedChunks, "add", add_or_stop)
        assert main(words) == 130
    assert "What is done is kept: add --resume to go on.\ninterrupted\n" in capsys.readouterr().err
    return words


def test_whole_parts_are_not_computed_again_and_damaged_ones_are(
    interrupted: list[str], bundle: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    partial, kept = tmp_path / "out.jsonl.partial", tmp_path / "kept"
    records = sorted((partial / "_progress").iterdir())
    first, second = partial / "part-00000000.jsonl", partial / "part-00000001.jsonl"
    assert sorted(partial.iterdir()) == [partial / "_progress", partial / "_run.json", first, second]
    assert [path.name.partition("-")[2] for path in records] == ["00000000.json", "00000001.json"]
    shutil.copytree(partial, kept)
    outputs = []

    def cut_short(path: Path) -> None:
        path.write_bytes(path.read_bytes()[:-20])

    damages: list[tuple[Callable[[], object], int]] = [
        (lambda: None, 3),
        (lambda: flip_bit(first, 50), 13),
        (lambda: cut_short(second), 13),
        (second.unlink, 13),
        (records[0].unlink, 13),
        (lambda: cut_short(records[0]), 13),
        (lambda: records[0].write_text("[]"), 13),
        (lambda: shutil.rmtree(partial), 23),
        (lambda: (partial / "_run.json").rename(partial / ".new-run"), 0),
    ]
    for damage, computed in damages:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(kept, partial)
        damage()
        if not computed:  # without run.json nothing says what these files are
            assert main([*interrupted, "--resume"]) == 2
            assert "holds something that is no run of export.score. Move it away" in capsys.readouterr().err
            assert first.exists()
            continue
        capsys.readouterr()
        assert main([*interrupted, "--resume"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert f"23 rows, {computed} of them labelled in" in lines[0]
        result = json.loads(lines[-1])
        outputs.append(((tmp_path / "out.jsonl").read_bytes(), result["texts_cut"], str(result["scores"])))
        (tmp_path / "out.jsonl").unlink()
    assert len(set(outputs)) == 1


def test_an_interrupted_run_is_neither_lost_nor_mixed_with_another(
    interrupted: list[str], bundle: Folders, tmp_path: Path, refusal: Refusal
) -> None:
    partial = tmp_path / "out.jsonl.partial"
    before = contents(partial)
    assert f"{partial} holds an interrupted run. Add --resume to go on, or --overwrite" in refusal(*interrupted)
    for flags, words in (
        (["--batch-size", "4"], "had batch_size 32, now it is 4"),
        (["--chunk-rows", "5"], "had chunk_rows 10, now it is 5"),
        (["--all-probabilities"], "had all_probabilities False, now it is True"),
        (["--text-columns", "sentence2,sentence1"], "had text_columns sentence1,sentence2, now"),
        (["--no-labels"], "had label_column label, now it is None"),
        (["--threads", "1"], "had threads None, now it is 1"),
    ):
        error = refusal(*interrupted, *flags, "--resume")
        assert words in error
        assert "start anew with --overwrite" in error
    assert "had bundle_sha256" in refusal(bundle("bert-v2"), *interrupted[1:], "--resume")
    source = Path(interrupted[2])
    rows = source.read_text()
    source.write_text(rows.replace("word1 ", "word2 "))
    assert "had input_sha256" in refusal(*interrupted, "--resume")
    # Not even a run that replaces it costs anything before its input is known to be good.
    source.write_text(rows + "[]\n")
    assert "line 24 holds no JSON object" in refusal(*interrupted, "--overwrite")
    source.write_text(rows)
    assert contents(partial) == before

    (partial / "_run.json").write_text("[]")
    assert "_run.json holds no JSON object. Start anew" in refusal(*interrupted, "--resume")
    assert main([*interrupted, "--overwrite"]) == 0
    assert not partial.exists()
    assert len(read_rows(tmp_path / "out.jsonl")) == 23


def test_an_input_that_changes_under_the_run_is_noticed(
    bundle: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: Refusal
) -> None:
    source = long_file(tmp_path / "in.jsonl", 23)
    add = FinishedChunks.add

    def add_and_touch(self: FinishedChunks, *arguments: Any, **named: Any) -> ChunkRecord:
        os.utime(source, (1, 1))
        return add(self, *arguments, **named)

    monkeypatch.setattr(FinishedChunks, "add", add_and_touch)
    words = (bundle("bert"), "--in", source, "--out", tmp_path / "out.csv")
    assert f"{source} changed while it was read, so nothing was written" in refusal(*words)
    assert not (tmp_path / "out.csv").exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.csv", None, "none.csv: there is no such file"),
        ("in.csv", GOOD + "a,b\n", "in.csv, row 3 (line 5) has 2 cells, the first line names 3 columns"),
        ("in.csv", GOOD + "a, ,1\n", "in.csv, row 3 (line 5): column 'sentence2' holds no text. Fix or remove"),
        ("in.csv", GOOD + "a,b,7\n", "label '7' in column 'label' is none of task mrpc's (0 or 'not_equivalent'"),
        ("in.csv", "sentence1,text\na,b\n", "'sentence2'; it has sentence1, text. Name the right ones: --text-columns"),
        (
            "in.csv",
            GOOD.replace("label", "prediction"),
            "has a column 'prediction' already, and one of that name would",
        ),
        ("in.csv", GOOD.replace("label", "probability"), "has a column 'probability' already"),
        (
            "in.jsonl",
            '{"sentence1": "a", "sentence2": "b"}\n\n{"sentence1": "a"}',
            "row 2 (line 3): column 'sentence2'",
        ),
        ("in.parquet", "PAR1 and no more", "in.parquet cannot be read as parquet ("),
    ],
)
def test_a_bad_input_is_named_with_its_place_and_leaves_nothing(
    name: str, content: str | None, words: str, bundle: Folders, tmp_path: Path, refusal: Refusal
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    error = refusal(bundle("bert"), "--in", tmp_path / name, "--out", tmp_path / "out.jsonl")
    assert words in error
    assert str(tmp_path / name) in error
    assert [path.name for path in tmp_path.iterdir()] == ([name] if content is not None else [])


@pytest.mark.parametrize("chunk_rows", ["1", "10"])
def test_labels_that_begin_or_end_within_a_file_are_refused(
    chunk_rows: str, bundle: Folders, tmp_path: Path, refusal: Refusal
) -> None:
    for missing, where in ((0, "row 1"), (2, "row 3 (line 3)")):
        rows = make_pairs(4, seed=15)
        del rows[missing]["label"]
        source = write_rows(tmp_path / "in.jsonl", rows)
        words = (bundle("bert"), "--in", source, "--out", tmp_path / "out.csv", "--chunk-rows", chunk_rows)
        assert f"in.jsonl, {where}" in (error := refusal(*words))
        assert "add --no-labels" in error


def test_a_damaged_parquet_file_is_refused(bundle: Folders, tmp_path: Path, refusal: Refusal) -> None:
    source = tmp_path / "in.parquet"
    table = pyarrow.Table.from_pylist(make_pairs(500, seed=16))
    parquet.write_table(table, source, write_page_checksum=True, row_group_size=250)
    content = source.read_bytes()
    words = (bundle("bert"), "--in", source, "--out", tmp_path / "out.csv", "--chunk-rows", "100")
    source.write_bytes(content[: len(content) // 2])
    assert "in.parquet cannot be read as parquet (" in refusal(*words)
    source.write_bytes(content)
    flip_bit(source, 3000)
    assert "in.parquet cannot be read as parquet (" in refusal(*words)
    latin = pyarrow.array([b"\xe4"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"sentence1": ["a"], "sentence2": ["b"], "note": latin}), source)
    assert "cannot be read as parquet (" in (error := refusal(*words))
    assert "UTF8" in error
    two = pyarrow.table([["a"], ["b"], ["c"]], names=["sentence1", "sentence2", "sentence2"])
    parquet.write_table(two, source)
    assert "in.parquet has two columns 'sentence2'" in refusal(*words)
    assert [path.name for path in tmp_path.iterdir()] == ["in.parquet"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("{tmp} --in {in} --out {out}", "is no bundle of promptfold"),
        ("{tmp}/none --in {in} --out {out}", "There is no bundle folder"),
        ("{bundle} --in {in}", "--out"),
        ("{bundle} --out {out}", "--in"),
        ("{bundle} --in - --out {out}", "--in -: a pipe cannot"),
        ("{bundle} --in {in} --out -", "--out -: a pipe cannot"),
        ("{bundle} --in {in} --out {tmp}/out.xlsx", "give a file that ends in .csv, .jsonl, .parquet"),
        ("{bundle} --in {in} --out {in}", "is the file that is read"),
        ("{bundle} --in {in} --out {tmp}/link.csv --overwrite", "is the file that is read"),
        ("{bundle} --in {in} --out {tmp}/older.csv", "older.csv is there already. Add --overwrite to replace it"),
        ("{bundle} --in {in} --out {tmp}/older.csv --resume", "older.csv is there already. Add --overwrite"),
        ("{bundle} --in {in} --out {tmp}/folder.csv --overwrite", "folder.csv is a folder"),
        ("{bundle} --in {in} --out {tmp}/other.csv --overwrite", "holds something that is no run of export.score"),
        ("{bundle} --in {in} --out {in}/out.csv", "cannot be written (Not a directory)"),
        ("{bundle} --in {in} --out {out} --batch-size 0", "--batch-size 0: give a whole number"),
        ("{bundle} --in {in} --out {out} --chunk-rows 0", "--chunk-rows 0: give a whole number"),
        ("{bundle} --in {in} --out {out} --threads 0", "--threads 0: give a whole number"),
        ("{bundle} --in {in} --out {out} --text-columns sentence1", "was trained on 2 (sentence1, sentence2)"),
        ("{bundle} --in {in} --out {out} --label-column gold", "has no column 'gold'"),
        ("{bundle} --in {in} --out {out} --label-column label --no-labels", "exclude each other"),
        ("{bundle} --in {in2} --out {out} --all-probabilities", "has a column 'probability_equivalent' already"),
        ("{bundle} --in {in} --out {out} --address auto", "--address is for --engine ray"),
        ("{bundle} --in {in} --out {out} --workers 2", "--workers is for --engine ray"),
    ],
)
def test_a_wrong_flag_ends_with_one_sentence_and_costs_nothing(
    flags: str, words: str, bundle: Folders, tmp_path: Path, refusal: Refusal
) -> None:
    (tmp_path / "in.csv").write_text(GOOD)
    (tmp_path / "in2.csv").write_text(GOOD.replace("label", "probability_equivalent"))
    (tmp_path / "link.csv").symlink_to("in.csv")
    (tmp_path / "older.csv").write_text("older")
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "other.csv.partial").mkdir()
    (tmp_path / "other.csv.partial" / "mine").write_text("mine")
    before = contents(tmp_path)
    places = {name: tmp_path / f"{name}.csv" for name in ("in", "in2", "out")}
    assert words in refusal(*shlex.split(flags.format(bundle=bundle("bert"), tmp=tmp_path, **places)))
    assert contents(tmp_path) == before


def test_an_older_output_is_replaced_only_when_asked_and_by_a_whole_one(
    bundle: Folders, tmp_path: Path, label: Label, refusal: Refusal
) -> None:
    source, out = tmp_path / "in.csv", tmp_path / "out.csv"
    out.write_text("older")
    source.write_text(GOOD + "a,,1\n")
    refusal(bundle("bert"), "--in", source, "--out", out, "--overwrite")
    assert out.read_text() == "older"
    source.write_text(GOOD)
    label(bundle("bert"), source, out, "--overwrite")
    assert len(read_rows(out)) == 2
    assert out.stat().st_mode == source.stat().st_mode


HEAVY = ("torch", "transformers", "peft", "datasets", "optimum", "onnxruntime", "sklearn", "pandas", "pyarrow", "tqdm")


def test_importing_it_imports_nothing_heavy() -> None:
    code = "import sys, export.score.__main__\nprint(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(HEAVY).isdisjoint(result.stdout.split())
