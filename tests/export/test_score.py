"""``python -m export.score`` through its entry point: whole files, any format, killed and gone on with."""

import csv
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
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
import export.score.parts
from export.bundle.folder import load_bundle
from export.runtime.batches import classify, score_counts
from export.runtime.classifier import OnnxClassifier
from export.score.__main__ import main
from tests.conftest import (
    ON_CPU,
    POSITIONS,
    ROOT,
    VIRTUAL_TOKENS,
    WORDS,
    Data,
    family_of,
    flip_bit,
    make_pairs,
    peft_logits,
    write_jsonl,
)
from train.data.tasks import MRPC, TASKS, Task, custom_task, score

pytestmark = pytest.mark.usefixtures("one_thread")

Folders = Callable[[str], Path]
Rows = list[dict[str, Any]]

LABELS = MRPC.labels
MOODS = ("bad", "good", "so-so")
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
    rows: Rows = [
        {name: " ".join(generator.choices(WORDS, k=generator.randint(1, 12))) for name in MRPC.text_columns}
        for _ in range(n)
    ]
    rows[n // 2]["sentence2"] = " ".join(WORDS[:60])
    return rows


def golden_probabilities(
    texts: Sequence[tuple[str, ...]], adapter_folder: Path, base_folder: Path, *, n_labels: int = 2
) -> np.ndarray:
    """By transformers, PEFT and SciPy alone, texts of one length together: nothing is ever padded."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(adapter_folder)
    encoded = [
        tokenizer(*text, truncation="longest_first", max_length=POSITIONS - VIRTUAL_TOKENS, return_tensors="np")
        for text in texts
    ]
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
def label(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
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
def refusal(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """A function that runs a command line which must be refused, and returns what it says."""

    def run(*words: str | Path) -> str:
        capsys.readouterr()
        assert main([str(word) for word in words]) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line and "row/s" not in line]
        (error,) = lines
        assert error.startswith("error: ")
        return error

    return run


@pytest.fixture(scope="module")
def moods(tmp_path_factory: pytest.TempPathFactory, base_model: Folders) -> tuple[Path, Path]:
    """Adapter and bundle for single sentences with three labels."""
    from export.__main__ import main as export_main
    from train.__main__ import main as train_main

    folder = tmp_path_factory.mktemp("moods")
    rows = mood_rows(48)
    data = Data(write_jsonl(folder / "train.jsonl", rows[:30]), write_jsonl(folder / "validation.jsonl", rows[30:]))
    flags = shlex.split(
        f"--model {base_model('bert')} --text-columns remark --label-column mood --epochs 2 --encoder-hidden-size 16 "
        f"--virtual-tokens {VIRTUAL_TOKENS} --learning-rate 1e-2 --out {folder / 'adapter'}"
    )
    assert train_main(flags + data.flags) == 0
    assert export_main([str(folder / "adapter"), "--out", str(folder / "bundle")]) == 0
    return folder / "adapter", folder / "bundle"


def mood_rows(n: int) -> Rows:
    generator = random.Random(3)  # noqa: S311 -- test data
    return [
        {"remark": " ".join(generator.sample(WORDS[index % 3 :: 3], 3 + index % 11)), "mood": MOODS[index % 3]}
        for index in range(n)
    ]


@pytest.mark.parametrize("kind", ["bert", "gpt2", "bert-v2"])
def test_predictions_are_pefts_in_the_callers_order(
    kind: str,
    bundle: Folders,
    adapter: Folders,
    base_model: Folders,
    tmp_path: Path,
    label: Callable[..., dict[str, Any]],
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
    assert result["rows"] == 37
    assert result["texts_cut"] == 1
    assert result["scores"] is None
    assert result["out"] == str(tmp_path / "out.jsonl")
    assert result["rows_per_second"] == pytest.approx(37 / result["seconds"])


def test_chunks_and_batches_change_nothing(
    bundle: Folders, tmp_path: Path, label: Callable[..., dict[str, Any]]
) -> None:
    source = write_rows(tmp_path / "in.csv", shuffled_pairs(50, seed=5))
    written = []
    for flags in ("", "--chunk-rows 7 --batch-size 3", "--batch-size 1", "--chunk-rows 50", "--chunk-rows 1"):
        label(bundle("gpt2"), source, tmp_path / "out.jsonl", "--overwrite", *shlex.split(flags))
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


MANY_TYPES: Rows = [
    {
        **dict(zip(MRPC.text_columns, pair, strict=True)),
        "count": count,
        "big": 2**53 + 1 + index,
        "ratio": ratio,
        "sure": index % 2 == 0,
        "note": note,
        "code": f"0{index}",
        "tags": [{"name": "ä", "n": index}, {"name": None, "n": 2}],
    }
    for index, (pair, count, ratio, note) in enumerate(
        [
            (("word1 word2", "word2 word1"), 3, 0.1, 'says "no", then\nleaves'),
            (("word3 'word4'", 'word5 "word6", word7\r\nword8'), None, None, "ends in \r and\r\nmore"),
            (("word9 ,", "Ünïcödé 東京 🙂"), -7, 1e300, None),
            (("null", "NA"), 0, -0.0, ""),
            (("word10", "word11"), 12, 2.0, "\u2028 separates\tnothing"),
        ]
    )
]


def in_csv(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


@pytest.mark.parametrize("source_suffix", SUFFIXES)
@pytest.mark.parametrize("out_suffix", SUFFIXES)
def test_every_column_survives_in_every_format(
    source_suffix: str, out_suffix: str, bundle: Folders, tmp_path: Path, label: Callable[..., dict[str, Any]]
) -> None:
    rows = MANY_TYPES
    if source_suffix == ".csv":
        rows = [{name: in_csv(value) for name, value in row.items()} for row in rows]
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
    expected = rows
    if out_suffix == ".csv":
        expected = [{name: in_csv(value) for name, value in row.items()} for row in rows]
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
    bundle: Folders, tmp_path: Path, label: Callable[..., dict[str, Any]], refusal: Callable[..., str]
) -> None:
    pairs = pyarrow.Table.from_pylist(shuffled_pairs(3, seed=7))
    table = (
        pairs.append_column("day", pyarrow.array([date(2024, 2, 29), None, date(1, 1, 1)]))
        .append_column("at", pyarrow.array([datetime(2024, 2, 29, 12, 30), None, datetime(1999, 1, 1)]))
        .append_column("price", pyarrow.array([Decimal("1.10"), Decimal("2.00"), None]))
        .append_column("kind", pyarrow.array(["a", "b", "a"]).dictionary_encode())
        .append_column("small", pyarrow.array([1, None, 3], pyarrow.int8()))
        .append_column("nan", pyarrow.array([float("nan"), float("inf"), 1.5]))
        .replace_schema_metadata({"made by": "a test"})
    )
    table = table.set_column(0, "sentence1", table["sentence1"].cast(pyarrow.large_string()))
    source = tmp_path / "in.parquet"
    parquet.write_table(table, source, row_group_size=2)
    label(bundle("bert"), source, tmp_path / "out.parquet", "--chunk-rows", "2")
    written = parquet.read_table(tmp_path / "out.parquet")
    assert written.schema.metadata == {b"made by": b"a test"}
    assert written.drop_columns(["prediction", "probability", "nan"]).equals(table.drop_columns(["nan"]))
    label(bundle("bert"), source, tmp_path / "out.jsonl")
    first, second, _ = read_rows(tmp_path / "out.jsonl")
    assert {name: first[name] for name in ("day", "at", "price", "kind", "small", "nan")} == {
        "day": "2024-02-29",
        "at": "2024-02-29T12:30:00",
        "price": "1.10",
        "kind": "a",
        "small": 1,
        "nan": None,
    }
    assert (second["day"], second["nan"]) == (None, None)

    parquet.write_table(pairs.append_column("image", pyarrow.array([b"\xff"] * 3)), source)
    assert "column 'image' holds bytes, which csv cannot" in refusal(
        bundle("bert"), "--in", source, "--out", tmp_path / "out.csv"
    )
    label(bundle("bert"), source, tmp_path / "out.parquet", "--overwrite")
    assert parquet.read_table(tmp_path / "out.parquet")["image"].to_pylist() == [b"\xff"] * 3


def test_json_lines_keep_their_own_columns_and_parquet_gets_one_type_for_all(
    bundle: Folders, tmp_path: Path, label: Callable[..., dict[str, Any]], refusal: Callable[..., str]
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


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_metrics_are_sklearns_on_names_and_on_indices(
    suffix: str, bundle: Folders, tmp_path: Path, label: Callable[..., dict[str, Any]]
) -> None:
    rows = make_pairs(41, seed=9)
    for row in rows[::3]:
        row["label"] = 1 - int(str(row["label"]))
    expected = [int(str(row["label"])) for row in rows]
    named: Rows = [row | {"label": LABELS[index]} for row, index in zip(rows, expected, strict=True)]
    for case in (rows, named):
        source = write_rows(tmp_path / f"in{suffix}", case)
        out = tmp_path / f"out{suffix}"
        result = label(bundle("bert"), source, out, "--overwrite", "--chunk-rows", "8")
        predicted = [LABELS.index(row["prediction"]) for row in read_rows(out)]
        assert result["scores"] == pytest.approx(
            {"accuracy": accuracy_score(expected, predicted), "f1": f1_score(expected, predicted)}, abs=1e-12
        )
    without = label(bundle("bert"), source, out, "--overwrite", "--no-labels")
    assert without["scores"] is None


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
        assert score_counts(task, counts * 10**7).values["matthews"] == pytest.approx(
            matthews_corrcoef(expected, predicted)
        )


def test_single_texts_with_three_labels_and_columns_of_other_names(
    moods: tuple[Path, Path], base_model: Folders, tmp_path: Path, label: Callable[..., dict[str, Any]]
) -> None:
    adapter_folder, bundle_folder = moods
    rows: Rows = [{"said": row["remark"], "gold": row["mood"], "mood": 3} for row in mood_rows(30)]
    source = write_rows(tmp_path / "in.parquet", rows)
    out = tmp_path / "out.csv"
    flags = "--text-columns said --label-column gold --all-probabilities --chunk-rows 9"
    result = label(bundle_folder, source, out, *shlex.split(flags))
    golden = golden_probabilities(
        [(row["said"],) for row in rows], adapter_folder, base_model("bert"), n_labels=len(MOODS)
    )
    written = read_rows(out)
    probabilities = np.array([[float(row[f"probability_{name}"]) for name in MOODS] for row in written])
    assert np.abs(probabilities - golden).max() < 1e-5
    predicted = [row["prediction"] for row in written]
    assert predicted == [MOODS[index] for index in golden.argmax(axis=1)]
    gold = [row["gold"] for row in rows]
    assert result["scores"] == pytest.approx(
        {
            "accuracy": accuracy_score(gold, predicted),
            "f1_macro": f1_score(gold, predicted, labels=MOODS, average="macro", zero_division=0),
        }
    )


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


# Interrupted runs.


class Killed(BaseException):
    """Ends a run in this process where a signal would end another one: nothing of ours catches it."""


def long_file(path: Path, n: int) -> Path:
    rows: Rows = make_pairs(n, seed=14)
    rows[7]["sentence1"] = " ".join(WORDS[:70])
    return write_rows(path, [row | {"note": f'"{index}",\n'} for index, row in enumerate(rows)])


def start(words: Sequence[str], **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "export.score", *words],
        cwd=ROOT,
        env=os.environ | ON_CPU | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_run_killed_by_a_signal_goes_on_to_the_very_same_bytes(
    suffix: str, bundle: Folders, tmp_path: Path, label: Callable[..., dict[str, Any]]
) -> None:
    source = long_file(tmp_path / "in.jsonl", 1500)
    out, whole = tmp_path / f"out{suffix}", tmp_path / f"whole{suffix}"
    flags = ["--chunk-rows", "20", "--batch-size", "2"]
    unbroken = label(bundle("bert"), source, whole, *flags)
    words = [str(bundle("bert")), "--in", str(source), "--out", str(out), "--threads", "1", *flags]
    with start(words) as process:
        first = tmp_path / f"out{suffix}.partial" / "part-000001.json"
        while not first.exists() and process.poll() is None:
            time.sleep(0.002)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert first.exists()
    assert not out.exists()
    resumed = label(bundle("bert"), source, out, *flags, "--resume")
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", f"out{suffix}", f"whole{suffix}"]
    for name in ("rows", "texts_cut", "scores"):
        assert resumed[name] == unbroken[name]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_wherever_a_run_ends_it_goes_on_to_the_very_same_bytes(
    suffix: str,
    bundle: Folders,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    label: Callable[..., dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Before each of the moments at which something is flushed to the disk, and so between any two of them."""
    source = long_file(tmp_path / "in.csv", 23)
    out, whole = tmp_path / f"out{suffix}", tmp_path / f"whole{suffix}"
    flags = ["--chunk-rows", "10"]
    unbroken = label(bundle("bert"), source, whole, *flags)
    sync = export.score.parts.sync_path
    moments = 0
    # run.json, three parts and their records, the whole
    for last in range(8):
        moments = 0

        def sync_or_die(path: Path) -> None:
            nonlocal moments
            if moments == last:  # noqa: B023 -- it is called within this turn of the loop
                raise Killed
            moments += 1
            sync(path)

        with monkeypatch.context() as patch:
            patch.setattr(export.score.parts, "sync_path", sync_or_die)
            with pytest.raises(Killed):
                label(bundle("bert"), source, out, *flags)
        assert not out.exists()
        resumed = label(bundle("bert"), source, out, *flags, "--resume")
        assert out.read_bytes() == whole.read_bytes()
        assert (resumed["texts_cut"], resumed["scores"]) == (unbroken["texts_cut"], unbroken["scores"])
        out.unlink()


@pytest.fixture
def interrupted(
    bundle: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> list[str]:
    """The words of a command line that was ended after two of three parts."""
    source = long_file(tmp_path / "in.jsonl", 23)
    words = [str(bundle("bert")), "--in", str(source), "--out", str(tmp_path / "out.jsonl"), "--chunk-rows", "10"]
    add = export.score.parts.Parts.add

    def add_or_stop(
        self: export.score.parts.Parts, number: int, *arguments: Any, **named: Any
    ) -> export.score.parts.PartRecord:
        if number == 2:
            raise KeyboardInterrupt
        return add(self, number, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(export.score.parts.Parts, "add", add_or_stop)
        assert main(words) == 130
    assert "What is done is kept: add --resume to go on.\ninterrupted\n" in capsys.readouterr().err
    return words


def test_whole_parts_are_not_computed_again_and_damaged_ones_are(
    interrupted: list[str], bundle: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    partial, kept = tmp_path / "out.jsonl.partial", tmp_path / "kept"
    assert sorted(path.name for path in partial.iterdir()) == [
        "part-000000.json",
        "part-000000.jsonl",
        "part-000001.json",
        "part-000001.jsonl",
        "run.json",
    ]
    shutil.copytree(partial, kept)
    contents = []

    def cut_short(path: Path) -> None:
        path.write_bytes(path.read_bytes()[:-20])

    def no_record(path: Path) -> None:
        path.write_text("[]")

    damages: list[tuple[Callable[[], object], int]] = [
        (lambda: None, 3),
        (lambda: flip_bit(partial / "part-000000.jsonl", 50), 13),
        (lambda: cut_short(partial / "part-000001.jsonl"), 13),
        ((partial / "part-000001.jsonl").unlink, 13),
        ((partial / "part-000000.json").unlink, 13),
        (lambda: cut_short(partial / "part-000000.json"), 13),
        (lambda: no_record(partial / "part-000000.json"), 13),
        (lambda: shutil.rmtree(partial), 23),
        (lambda: (partial / "run.json").rename(partial / "run.json.new"), 0),
    ]
    for damage, computed in damages:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(kept, partial)
        damage()
        if not computed:  # without run.json nothing says what these files are
            assert main([*interrupted, "--resume"]) == 2
            assert "holds something that is no interrupted run. Move it away" in capsys.readouterr().err
            assert (partial / "part-000000.jsonl").exists()
            continue
        capsys.readouterr()
        assert main([*interrupted, "--resume"]) == 0
        assert f"23 rows, {computed} of them labelled in" in capsys.readouterr().out
        contents.append((tmp_path / "out.jsonl").read_bytes())
        (tmp_path / "out.jsonl").unlink()
    assert len(set(contents)) == 1


def test_an_interrupted_run_is_neither_lost_nor_mixed_with_another(
    interrupted: list[str], bundle: Folders, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    partial = tmp_path / "out.jsonl.partial"
    before = {path.name: path.read_bytes() for path in partial.iterdir()}
    error = refusal(*interrupted)
    assert str(partial) in error
    assert "--resume" in error
    assert "--overwrite" in error

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
    assert {path.name: path.read_bytes() for path in partial.iterdir()} == before

    (partial / "run.json").write_text("[]")
    assert "run.json holds no JSON object. Start anew" in refusal(*interrupted, "--resume")
    assert main([*interrupted, "--overwrite"]) == 0
    assert not partial.exists()
    assert len(read_rows(tmp_path / "out.jsonl")) == 23


def test_an_input_that_changes_under_the_run_is_noticed(
    bundle: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: Callable[..., str]
) -> None:
    source = long_file(tmp_path / "in.jsonl", 23)
    add = export.score.parts.Parts.add

    def add_and_touch(self: export.score.parts.Parts, *arguments: Any, **named: Any) -> export.score.parts.PartRecord:
        os.utime(source, (1, 1))
        return add(self, *arguments, **named)

    monkeypatch.setattr(export.score.parts.Parts, "add", add_and_touch)
    assert f"{source} changed while it was read, so nothing was written" in refusal(
        bundle("bert"), "--in", source, "--out", tmp_path / "out.csv"
    )
    assert not (tmp_path / "out.csv").exists()


# What is refused.

GOOD = 'sentence1,sentence2,label\nword1,word2,1\n"a\nb",word3,0\n'


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.csv", None, "none.csv: there is no such file"),
        ("empty.jsonl", b"", "empty.jsonl is empty"),
        ("in.txt", b"x", "give a file that ends in .csv, .jsonl, .parquet"),
        ("in.csv", b"sentence1,sentence2\n", "in.csv has no rows"),
        ("in.jsonl", b"\n\n", "in.jsonl has no rows"),
        ("in.csv", b"\n", "the first line names no columns"),
        ("in.csv", b"sentence1,sentence2,sentence1\na,b,c\n", "names the column 'sentence1' twice"),
        ("in.csv", GOOD.encode() + b"a,b\n", "in.csv, row 3 (line 5) has 2 cells, the first line names 3 columns"),
        ("in.csv", GOOD.encode() + b"a,b,1,\n", "in.csv, row 3 (line 5) has 4 cells"),
        ("in.csv", GOOD.encode() + b'"a,b,1\n', "in.csv, line 5 cannot be read as csv (unexpected end of data)"),
        ("in.csv", GOOD.encode() + b"\nn\xefve,b,1\n", "in.csv, line 6 is not valid UTF-8. Convert"),
        (
            "in.csv",
            GOOD.encode() + b"a, ,1\n",
            "in.csv, row 3 (line 5): column 'sentence2' holds no text. Mend or drop",
        ),
        (
            "in.csv",
            GOOD.encode() + b"a,b,maybe\n",
            "in.csv, row 3 (line 5): label 'maybe' in column 'label' is none of",
        ),
        (
            "in.csv",
            GOOD.encode() + b"a,b,\n",
            "label '' in column 'label' is none of task mrpc's (0 or 'not_equivalent'",
        ),
        (
            "in.csv",
            b"sentence1,text\na,b\n",
            "has no column 'sentence2'; it has sentence1, text. Name the right one: --text",
        ),
        (
            "in.csv",
            b"sentence1,sentence2,prediction\na,b,c\n",
            "has a column 'prediction' already, and one of that name",
        ),
        ("in.csv", b"sentence1,sentence2,probability\na,b,c\n", "'probability' already, and one of that name would be"),
        ("in.jsonl", b'{"sentence1": "a", "sentence2": "b"}\n{"sentence1": "a"\n', "in.jsonl, line 2 is no JSON ("),
        ("in.jsonl", b'{"sentence1": "a", "sentence2": "b"}\n\n["a"]\n', "in.jsonl, line 3 holds no JSON object"),
        ("in.jsonl", b"[" * 100_000 + b"\n", "in.jsonl, line 1 is no JSON"),
        ("in.jsonl", b'{"sentence1": "a", "sentence2": "\xff"}\n', "in.jsonl, line 1 is not valid UTF-8"),
        ("in.jsonl", b'{"sentence1": "a", "sentence2": "\\ud83d"}\n', "line 1 holds half a surrogate pair"),
        (
            "in.jsonl",
            b'{"sentence1": "a", "sentence2": "b"}\n\n{"sentence1": "a"}\n',
            "row 2 (line 3): column 'sentence2'",
        ),
        (
            "in.jsonl",
            b'{"sentence1": "a", "sentence2": null}\n',
            "in.jsonl, row 1 (line 1): column 'sentence2' holds no",
        ),
        (
            "in.jsonl",
            b'{"sentence1": 3, "sentence2": "b"}\n',
            "in.jsonl, row 1 (line 1): column 'sentence1' holds no text",
        ),
        ("in.jsonl", b'{"sentence1": "a", "sentence2": "b", "label": -1}\n', "label -1 in column 'label' is none of"),
        ("in.parquet", b"PAR1 and no more", "in.parquet cannot be read as parquet ("),
    ],
)
def test_a_broken_input_is_named_with_its_place_and_leaves_nothing(
    name: str, content: bytes | None, words: str, bundle: Folders, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    error = refusal(bundle("bert"), "--in", tmp_path / name, "--out", tmp_path / "out.jsonl")
    assert words in error
    assert str(tmp_path / name) in error
    assert [path.name for path in tmp_path.iterdir()] == ([name] if content is not None else [])


@pytest.mark.parametrize("chunk_rows", ["1", "10"])
def test_labels_that_begin_or_end_within_a_file_are_refused(
    chunk_rows: str, bundle: Folders, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    rows = make_pairs(4, seed=15)
    for missing, where in ((0, "row 1"), (2, "row 3 (line 3)")):
        source = write_rows(tmp_path / "in.jsonl", [row.copy() for row in rows])
        lines = [json.loads(line) for line in source.read_text().splitlines()]
        del lines[missing]["label"]
        write_rows(source, lines)
        words = (bundle("bert"), "--in", source, "--out", tmp_path / "out.csv", "--chunk-rows", chunk_rows)
        assert f"in.jsonl, {where}" in (error := refusal(*words))
        assert "add --no-labels" in error


def test_a_damaged_parquet_file_is_refused(bundle: Folders, tmp_path: Path, refusal: Callable[..., str]) -> None:
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
    latin = pyarrow.StringArray.from_buffers(
        1, pyarrow.array([0, 1], pyarrow.int32()).buffers()[1], pyarrow.py_buffer(b"\xe4")
    )
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
        ("{tmp} --in {in} --out {tmp}/out.csv", "is no bundle of promptfold"),
        ("{tmp}/none --in {in} --out {tmp}/out.csv", "There is no bundle folder"),
        ("{bundle} --in {in}", "--out"),
        ("{bundle} --out {tmp}/out.csv", "--in"),
        ("{bundle} --in - --out {tmp}/out.csv", "--in -: a pipe cannot"),
        ("{bundle} --in {in} --out -", "--out -: a pipe cannot"),
        ("{bundle} --in {in} --out {tmp}/out.xlsx", "give a file that ends in .csv, .jsonl, .parquet"),
        ("{bundle} --in {in} --out {in}", "is the file that is read"),
        ("{bundle} --in {in} --out {tmp}/link.csv --overwrite", "is the file that is read"),
        ("{bundle} --in {in} --out {tmp}/older.csv", "older.csv is there already. Add --overwrite to replace it"),
        ("{bundle} --in {in} --out {tmp}/older.csv --resume", "older.csv is there already. Add --overwrite"),
        ("{bundle} --in {in} --out {tmp}/folder.csv --overwrite", "folder.csv is a folder"),
        ("{bundle} --in {in} --out {tmp}/other.csv", "--resume to go on with it, or --overwrite"),
        ("{bundle} --in {in} --out {tmp}/other.csv --overwrite", "is no interrupted run. Move it away"),
        ("{bundle} --in {in} --out {tmp}/in.csv/out.csv", "cannot be written (Not a directory)"),
        ("{bundle} --in {in} --out {tmp}/out.csv --batch-size 0", "--batch-size 0: give a whole number"),
        ("{bundle} --in {in} --out {tmp}/out.csv --chunk-rows 0", "--chunk-rows 0: give a whole number"),
        ("{bundle} --in {in} --out {tmp}/out.csv --threads 0", "--threads 0: give a whole number"),
        ("{bundle} --in {in} --out {tmp}/out.csv --text-columns sentence1", "was trained on 2 (sentence1, sentence2)"),
        ("{bundle} --in {in} --out {tmp}/out.csv --label-column gold", "has no column 'gold'"),
        ("{bundle} --in {in} --out {tmp}/out.csv --label-column label --no-labels", "exclude each other"),
        (
            "{bundle} --in {in2} --out {tmp}/out.csv --all-probabilities",
            "has a column 'probability_equivalent' already",
        ),
    ],
)
def test_a_wrong_flag_ends_with_one_sentence_and_costs_nothing(
    flags: str, words: str, bundle: Folders, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    (tmp_path / "in.csv").write_text(GOOD)
    (tmp_path / "in2.csv").write_text(GOOD.replace("label", "probability_equivalent"))
    (tmp_path / "link.csv").symlink_to("in.csv")
    (tmp_path / "older.csv").write_text("older")
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "other.csv.partial").mkdir()
    (tmp_path / "other.csv.partial" / "mine").write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    places = {"bundle": bundle("bert"), "tmp": tmp_path, "in": tmp_path / "in.csv", "in2": tmp_path / "in2.csv"}
    assert words in refusal(*shlex.split(flags.format(**places)))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_an_older_output_is_replaced_only_when_asked_and_by_a_whole_one(
    bundle: Folders, tmp_path: Path, label: Callable[..., dict[str, Any]], refusal: Callable[..., str]
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


# What it takes.

PEAK = """
import sys
from export.score.__main__ import main
status = main(sys.argv[1:])
with open("/proc/self/status") as lines:
    print(*[line.split()[1] for line in lines if line.startswith("VmHWM")])
assert "torch" not in sys.modules and "transformers" not in sys.modules and "datasets" not in sys.modules
assert "sklearn" not in sys.modules
sys.exit(status)
"""


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="the peak of a process is read from /proc, which only Linux has"
)
@pytest.mark.parametrize(
    ("source_suffix", "out_suffix"), [(".jsonl", ".parquet"), (".parquet", ".csv"), (".csv", ".jsonl")]
)
def test_memory_does_not_grow_with_the_file_and_torch_is_never_imported(
    source_suffix: str, out_suffix: str, bundle: Folders, tmp_path: Path
) -> None:
    """ru_maxrss would do on its own, had it not the parent's peak in it: Linux hands that on through fork and exec."""
    peaks_mb = []
    for n in (4_000, 40_000):
        rows: Rows = [
            {"sentence1": f"word{i % 80} word3", "sentence2": "word4", "label": i % 2, "note": f"{i} " * 200}
            for i in range(n)
        ]
        source = tmp_path / f"in{n}{source_suffix}"
        if source_suffix == ".parquet":
            parquet.write_table(pyarrow.Table.from_pylist(rows), source, row_group_size=n)
        else:
            write_rows(source, rows)
        words = [str(bundle("bert")), "--in", str(source), "--out", str(tmp_path / f"out{n}{out_suffix}")]
        result = subprocess.run(
            [sys.executable, "-c", PEAK, *words, "--chunk-rows", "2000", "--batch-size", "256", "--threads", "1"],
            cwd=ROOT,
            env=os.environ | ON_CPU,
            capture_output=True,
            text=True,
            check=True,
        )
        peaks_mb.append(int(result.stdout.splitlines()[-1]) / 1024)
        assert json.loads(result.stdout.splitlines()[-2])["rows"] == n
    # The larger file holds 40 MB more as text, and rows that stay in memory take over 100.
    assert peaks_mb[1] - peaks_mb[0] < 32, peaks_mb


def test_importing_it_imports_nothing_heavy() -> None:
    heavy = (
        "torch",
        "transformers",
        "peft",
        "datasets",
        "optimum",
        "onnxruntime",
        "sklearn",
        "pandas",
        "pyarrow",
        "tqdm",
    )
    code = f"import sys, export.score.__main__\nprint([name for name in {heavy!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
