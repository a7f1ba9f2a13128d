"""``python -m export.score`` through its entry point: whole files, any format, interrupted and gone on with."""

import csv
import json
import os
import random
import re
import shlex
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from datetime import date, datetime
from decimal import Decimal
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from scipy.special import softmax
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

import export.runtime.session
from export.score.__main__ import main
from export.score.data_set import Block, BlockReader, find_data_set
from export.score.finished_chunks import ChunkRecord, FinishedChunks
from export.score.place import local_place, parse_place
from tests.conftest import POSITIONS, VIRTUAL_TOKENS, WORDS, Folders, flip_bit, make_pairs, peft_logits, write_jsonl
from tests.train.test_data import GOOD
from train.common.errors import DataError, UsageError
from train.data.tasks import MRPC, TASKS, Task, custom_task, score, score_counts

pytestmark = pytest.mark.usefixtures("one_thread")
Capsys = pytest.CaptureFixture[str]
Rows = list[dict[str, Any]]
Label = Callable[..., dict[str, Any]]
"""Labels a file with the command line: bundle, input, output, flags → the JSON of the last line."""
Refusal = Callable[..., str]
"""Runs a command line that must be refused: words → the message."""
LABELS, SUFFIXES = MRPC.labels, (".csv", ".jsonl", ".parquet")
TWO_TEXTS, LABELLED = '{"sentence1": "a", "sentence2": "b"}', '{"sentence1": "a", "sentence2": "b", "label": 1}'


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
        return " ".join(generator.choices(WORDS, k=generator.choice((1, 5, 12))))

    rows: Rows = [{"sentence1": words(), "sentence2": words()} for _ in range(n)]
    rows[n // 2]["sentence2"] = " ".join(WORDS[:60])
    return rows


def golden_probabilities(texts: Sequence[Sequence[str]], adapter: Path, base: Path, *, n_labels: int = 2) -> np.ndarray:
    """By transformers, PEFT and SciPy alone, texts of one length together: nothing is ever padded."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(adapter)
    cut: dict[str, Any] = {"truncation": "longest_first", "max_length": POSITIONS - VIRTUAL_TOKENS}
    encoded = [tokenizer(*text, **cut, return_tensors="np") for text in texts]
    by_length = defaultdict(list)
    for row, item in enumerate(encoded):
        by_length[item["input_ids"].shape[1]].append(row)
    assert len(by_length) > 5
    logits = np.empty((len(texts), n_labels))
    for rows in by_length.values():
        batch = {name: np.concatenate([encoded[row][name] for row in rows]) for name in encoded[0]}
        logits[rows] = peft_logits(adapter, base, batch, n_labels=n_labels)
    return softmax(logits, axis=1)


@pytest.fixture(autouse=True)
def cpu_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime on the CPU, wherever the tests run: only there the same bits come again."""
    monkeypatch.setattr(export.runtime.session, "cuda_absence", lambda: "not in these tests")


@pytest.fixture
def label(capsys: Capsys) -> Label:
    def run(bundle_folder: Path, source: Path, out: Path, *flags: str) -> dict[str, Any]:
        capsys.readouterr()
        status = main([str(bundle_folder), "--in", str(source), "--out", str(out), "--threads", "1", *flags])
        captured = capsys.readouterr()
        assert status == 0, captured.err
        assert not out.with_name(f"{out.name}.partial").exists()
        return json.loads(captured.out.splitlines()[-1])

    return run


@pytest.fixture
def refusal(capsys: Capsys) -> Refusal:
    def run(*words: str | Path) -> str:
        capsys.readouterr()
        assert main([str(word) for word in words]) == 2
        errors = capsys.readouterr().err  # Ray may write lines of its own
        assert "Traceback" not in errors
        assert [line.startswith("error: ") for line in errors.splitlines()].count(True) == 1
        return errors[errors.index("error: ") :]

    return run


@pytest.mark.parametrize("kind", ["bert"])
def test_predictions_are_pefts_in_the_callers_order(
    kind: str, bundle: Folders, adapter: Folders, base_model: Folders, tmp_path: Path, label: Label
) -> None:
    rows, out = shuffled_pairs(37, seed=4), tmp_path / "out.jsonl"
    source, texts = write_rows(tmp_path / "in.jsonl", rows), [tuple(row.values()) for row in rows]
    golden = golden_probabilities(texts, adapter(kind), base_model(kind.removesuffix("-v2")))
    assert np.ptp(golden[:, 0]) > 0.01  # or any order would do
    for flags in ("", "--batch-size 1", "--chunk-rows 7 --batch-size 3", "--chunk-rows 1"):
        result = label(bundle(kind), source, out, "--all-probabilities", "--overwrite", *flags.split())
        written = read_rows(out)
        assert [{name: row[name] for name in MRPC.text_columns} for row in written] == rows
        probabilities = np.array([[row[f"probability_{name}"] for name in LABELS] for row in written])
        assert np.abs(probabilities - golden).max() < 1e-5
        assert [row["prediction"] for row in written] == [LABELS[index] for index in golden.argmax(axis=1)]
        assert [row["probability"] for row in written] == probabilities.max(axis=1).tolist()
        assert (result["rows"], result["texts_cut"], result["scores"], result["out"]) == (37, 1, None, str(out))
        assert result["rows_per_second"] == pytest.approx(37 / result["seconds"])


VALUES: list[tuple[Any, ...]] = [
    ("word1 word2", "word2 word1", 3, 0.1, 'says "no", then\nleaves'),
    ("word3 'word4'", 'word5 "word6", word7\r\nword8', None, None, "ends in \r and\r\nmore"),
    ("word9 ,", "Ünïcödé 東京 🙂", -7, 1e300, None),
    ("null", "NA", 0, -0.0, ""),
    ("word10", "word11", 12, 2.0, "\u2028 separates\tnothing"),
]
MANY_TYPES: Rows = [
    dict(zip(("sentence1", "sentence2", "count", "ratio", "note"), values, strict=True))
    | {"big": 2**53 + 1 + n, "sure": n % 2 == 0, "code": f"0{n}", "tags": [{"a": "ä", "n": n}, {"a": None, "n": 2}]}
    for n, values in enumerate(VALUES)
]


def in_csv(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


@pytest.mark.parametrize("source_suffix", SUFFIXES)
@pytest.mark.parametrize("out_suffix", SUFFIXES)
def test_columns_survive(source_suffix: str, out_suffix: str, bundle: Folders, tmp_path: Path, label: Label) -> None:
    as_text = [{name: in_csv(value) for name, value in row.items()} for row in MANY_TYPES]
    rows = as_text if source_suffix == ".csv" else MANY_TYPES
    source, out = write_rows(tmp_path / f"in{source_suffix}", rows), tmp_path / f"out{out_suffix}"
    label(bundle("bert"), source, out, "--chunk-rows", "2")
    written = read_rows(out)
    assert list(written[0]) == [*rows[0], "prediction", "probability"]
    for row in written:
        assert row.pop("prediction") in LABELS
        assert isinstance(probability := row.pop("probability"), str if out_suffix == ".csv" else float)
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


def test_parquets_types_and_metadata_survive(bundle: Folders, tmp_path: Path, label: Label, refusal: Refusal) -> None:
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
    table, source = pyarrow.table(columns, metadata={"made by": "a test"}), tmp_path / "in.parquet"
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
    error = refusal(bundle("bert"), "--in", source, "--out", tmp_path / "out.csv")
    assert "column 'image' holds bytes, which csv cannot" in error
    label(bundle("bert"), source, tmp_path / "out.parquet", "--overwrite")
    assert parquet.read_table(tmp_path / "out.parquet")["image"].to_pylist() == [b"\xff"] * 3


def test_json_lines_need_not_have_like_columns(bundle: Folders, tmp_path: Path, label: Label, refusal: Refusal) -> None:
    rows = shuffled_pairs(4, seed=8)
    rows[:3] = [rows[0] | {"n": None}, rows[1] | {"n": 1, "late": "x"}, rows[2] | {"n": 2.5}]
    source = write_rows(tmp_path / "in.jsonl", rows)
    source.write_text("\ufeff" + source.read_text().replace("\n", "\n\n"), encoding="utf-8")
    for suffix in SUFFIXES:
        label(bundle("bert"), source, tmp_path / f"out{suffix}", "--chunk-rows", "1")
    added = ["prediction", "probability"]
    assert [list(row) for row in read_rows(tmp_path / "out.jsonl")] == [[*row, *added] for row in rows]
    in_parquet = [(row["n"], row["late"]) for row in read_rows(tmp_path / "out.parquet")]
    assert in_parquet == [(None, None), (1.0, "x"), (2.5, None), (None, None)]
    assert [row["late"] for row in read_rows(tmp_path / "out.csv")] == ["", "x", "", ""]
    words = (bundle("bert"), "--in", source, "--out", tmp_path / "new.parquet", "--chunk-rows")
    for value, chunk_rows in product(("text", True, 2**70), "14"):
        write_rows(source, [*rows[:3], rows[3] | {"n": value}])
        assert "column 'n' cannot be written as parquet" in refusal(*words, chunk_rows)
        assert not list(tmp_path.glob("new*"))


def test_metrics_are_sklearns_on_names_and_on_indices(bundle: Folders, tmp_path: Path, label: Label) -> None:
    expected = [(index + (index % 3 == 0)) % 2 for index in range(41)]
    rows, named = (
        [row | {"label": names[index]} for row, index in zip(make_pairs(41, seed=9), expected, strict=True)]
        for names in ((0, 1), LABELS)
    )
    for case, suffix in ((rows, ".csv"), (named, ".csv"), (rows, ".jsonl"), (rows, ".parquet")):
        source, out = write_rows(tmp_path / f"in{suffix}", case), tmp_path / "out.jsonl"
        result = label(bundle("bert"), source, out, "--overwrite", "--chunk-rows", "8")
        predicted = [LABELS.index(row["prediction"]) for row in read_rows(out)]
        metrics = {"accuracy": accuracy_score(expected, predicted), "f1": f1_score(expected, predicted)}
        assert result["scores"] == pytest.approx(metrics, abs=1e-12)
    assert label(bundle("bert"), source, out, "--overwrite", "--no-labels")["scores"] is None


@pytest.mark.filterwarnings("ignore:A single label was found:UserWarning")  # scikit-learn's, of Matthews' correlation
@pytest.mark.parametrize("single", [(), (0,), (1,), (0, 1)], ids=["neither", "expected", "predicted", "both"])
@pytest.mark.parametrize("task", [MRPC, *map(TASKS.get, ("mnli", "cola")), custom_task(("a",), "b", [*"xyz", "never"])])
def test_scores_from_counts_are_those_of_train_tasks(task: Task, single: tuple[int, ...]) -> None:
    pair = np.random.default_rng(10).integers(0, min(len(task.labels), 3), (2, 200))
    pair[list(single)] = 1
    expected, predicted = pair
    counts = np.zeros((len(task.labels),) * 2, np.int64)
    np.add.at(counts, (expected, predicted), 1)
    assert score_counts(task, counts).values == pytest.approx(score(task, predicted, expected).values, abs=1e-12)
    if "matthews" in task.metrics:
        matthews = score_counts(task, counts * 10**7).values["matthews"]
        assert matthews == pytest.approx(matthews_corrcoef(expected, predicted))


def test_what_was_done_is_told(bundle: Folders, tmp_path: Path, capsys: Capsys) -> None:
    source, out, folder = long_file(tmp_path / "in.jsonl", 12), tmp_path / "deep" / "er" / "out.csv", bundle("bert")
    capsys.readouterr()
    assert main([str(folder), "--in", str(source), "--out", str(out)]) == 0
    captured = capsys.readouterr()
    read, summary, cut, scores, document = captured.out.splitlines()
    assert read == f"{source}: UTF-8"
    assert re.fullmatch(rf"{out}: 12 rows, 12 of them labelled in .* rows/s\)", summary)
    assert cut == f"1 texts are longer than {POSITIONS - VIRTUAL_TOKENS} tokens and lost their end"
    assert out.stat().st_mode == source.stat().st_mode
    assert scores.startswith("against the file's labels: accuracy ")
    assert set(json.loads(document)) == {"rows", "seconds", "rows_per_second", "texts_cut", "scores", "recalls", "out"}
    assert re.search(r"12/12.*row/s", captured.err)


def long_file(path: Path, n: int) -> Path:
    rows: Rows = make_pairs(n, seed=14)
    rows[7]["sentence1"] = " ".join(WORDS[:70])
    return write_rows(path, [row | {"note": f'"{index}",\n'} for index, row in enumerate(rows)])


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def before_each_chunk(patch: pytest.MonkeyPatch, act: Callable[[int], object]) -> None:
    add = FinishedChunks.add

    def act_and_add(self: FinishedChunks, number: int, *arguments: Any, **named: Any) -> ChunkRecord:
        act(number)
        return add(self, number, *arguments, **named)

    patch.setattr(FinishedChunks, "add", act_and_add)


@pytest.fixture
def interrupted(bundle: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capsys) -> list[str]:
    """The words of a command line that was ended after two of three parts."""
    source = long_file(tmp_path / "in.jsonl", 23)
    words = [str(bundle("bert")), "--in", str(source), "--out", str(tmp_path / "out.jsonl"), "--chunk-rows", "10"]
    with monkeypatch.context() as patch:
        before_each_chunk(patch, Mock(side_effect=[None, None, KeyboardInterrupt]))
        assert main(words) == 130
    assert "What is done is kept: add --resume to go on.\ninterrupted\n" in capsys.readouterr().err
    return words


def test_damaged_parts_are_computed_again(interrupted: list[str], tmp_path: Path, capsys: Capsys) -> None:
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
        assert f"23 rows, {computed} of them labelled in" in lines[1]
        result = json.loads(lines[-1])
        outputs.append(((tmp_path / "out.jsonl").read_bytes(), result["texts_cut"], str(result["scores"])))
        (tmp_path / "out.jsonl").unlink()
    assert len(set(outputs)) == 1


def test_an_interrupted_run_is_kept(interrupted: list[str], bundle: Folders, tmp_path: Path, refusal: Refusal) -> None:
    partial = tmp_path / "out.jsonl.partial"
    before = contents(partial)
    assert f"{partial} holds an interrupted run. Add --resume to go on, or --overwrite" in refusal(*interrupted)
    for flags, words in (
        ("--batch-size 4", "had batch_size 32, now it is 4"),
        ("--chunk-rows 5", "had chunk_rows 10, now it is 5"),
        ("--all-probabilities", "had all_probabilities False, now it is True"),
        ("--text-columns sentence2,sentence1", "had text_columns sentence1,sentence2, now"),
        ("--no-labels", "had label_column label, now it is None"),
        ("--threads 1", "had threads None, now it is 1"),
    ):
        assert words in (error := refusal(*interrupted, *flags.split(), "--resume"))
        assert "start anew with --overwrite" in error
    assert "had bundle_sha256" in refusal(bundle("bert-v2"), *interrupted[1:], "--resume")
    rows = (source := Path(interrupted[2])).read_text()
    source.write_text(rows.replace("word1 ", "word2 "))
    assert "had input_sha256" in refusal(*interrupted, "--resume")
    # Not even a run that replaces it costs anything before its input is known to be good.
    source.write_text(rows + "[]\n")
    assert "(line 24): it holds no JSON object" in refusal(*interrupted, "--overwrite")
    source.write_text(rows)
    assert contents(partial) == before
    (partial / "_run.json").write_text("[]")
    assert "_run.json holds no JSON object. Start anew" in refusal(*interrupted, "--resume")
    assert main([*interrupted, "--overwrite"]) == 0
    assert not partial.exists()
    assert len(read_rows(tmp_path / "out.jsonl")) == 23


@pytest.mark.parametrize("flags", ["", "--overwrite", "--resume"])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_two_runs_never_write_one_output(
    suffix: str, flags: str, bundle: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: Refusal
) -> None:
    """A scheduler's retry, or a job that takes longer than the time until the next one."""
    source, out = long_file(tmp_path / "in.jsonl", 23), tmp_path / f"out{suffix}"
    words = ["--in", str(source), "--out", str(out), "--chunk-rows", "10"]
    refused = []

    def start_another(number: int) -> None:
        refused.append(refusal(bundle("bert-v2"), *words, *flags.split()))

    with monkeypatch.context() as patch:
        before_each_chunk(patch, start_another)
        assert main([str(bundle("bert")), *words, *flags.split()]) == 0
    assert len(refused) == 3
    busy = f"error: --out {out}: another run is writing there (it holds {out}.partial). Wait until it has ended"
    assert all(error.startswith(busy) for error in refused)
    written = out.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", out.name]
    out.unlink()
    assert main([str(bundle("bert")), *words]) == 0
    assert out.read_bytes() == written


def test_a_run_that_waited_for_another_does_not_replace_its_output(
    bundle: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: Refusal
) -> None:
    held, source, out = FinishedChunks.held, write_rows(tmp_path / "in.csv", make_pairs(3, seed=1)), tmp_path / "o.csv"

    def appear(self: FinishedChunks) -> Any:
        out.write_text("another run's")
        return held(self)

    monkeypatch.setattr(FinishedChunks, "held", appear)
    assert f"--out {out} is there already. Add --overwrite" in refusal(bundle("bert"), "--in", source, "--out", out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.csv", "o.csv"]
    assert out.read_text() == "another run's"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_part_that_changes_while_others_are_written_is_not_joined(
    suffix: str, bundle: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: Refusal
) -> None:
    source, out = long_file(tmp_path / "in.jsonl", 23), tmp_path / f"out{suffix}"
    words = (bundle("bert"), "--in", source, "--out", out, "--chunk-rows", "10")
    part = tmp_path / f"out{suffix}.partial" / f"part-00000000{suffix}"

    def damage(number: int) -> None:
        if number == 2:
            flip_bit(part, 50)

    with monkeypatch.context() as patch:
        before_each_chunk(patch, damage)
        assert f"{part} is missing or was changed while others were written. Add --resume" in refusal(*words)
    assert not out.exists()
    assert main([*map(str, words), "--resume"]) == 0
    assert len(read_rows(out)) == 23


def test_two_runs_never_finish_one_folder(tmp_path: Path) -> None:
    """Where there are no locks, as on S3, a folder's records tell."""

    def add(run: FinishedChunks) -> list[int]:
        return [run.add(0, run.run.encode(), rows=1, texts_cut=0, counts=[]).n_bytes]

    folder = FinishedChunks(local_place(tmp_path / "out"), "out", ".parquet")
    first = folder.start({"batch_size": 1}, resume=False)
    sizes = add(first)
    second = folder.start({"batch_size": 2}, resume=False)
    with pytest.raises(UsageError, match="--out out: another run wrote there too"):
        first.finish_folder(sizes, {})
    add(second)
    add(first)
    with pytest.raises(UsageError, match="another run wrote there too"):
        second.finish_folder(sizes, {})
    resumed = folder.start({"batch_size": 2}, resume=True)
    resumed.finish_folder(add(resumed), {})
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["_SUCCESS", "part-00000000.parquet"]


def test_an_input_changes(bundle: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: Refusal) -> None:
    source, out = long_file(tmp_path / "in.jsonl", 23), tmp_path / "out.csv"
    before_each_chunk(monkeypatch, lambda _: os.utime(source, (1, 1)))
    assert f"{source} changed while it was read, so nothing" in refusal(bundle("bert"), "--in", source, "--out", out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.csv", None, "none.csv: there is no such file"),
        ("in.csv", GOOD + "a,b\n", "in.csv, row 3 (line 5): it has 2 cells, the first line names 3 columns"),
        ("in.csv", GOOD + "a, ,1\n", "in.csv, row 3 (line 5): column 'sentence2' holds no text. Fix or remove"),
        ("in.csv", GOOD + "a,b,7\n", "label '7' in column 'label' is none of task mrpc's (0 or 'not_equivalent'"),
        ("in.csv", "sentence1,text\na,b\n", "'sentence2'; it has sentence1, text. Name the right ones: --text-columns"),
        ("in.csv", GOOD.replace("label", "prediction"), "has a column 'prediction' already, and one of"),
        ("in.csv", GOOD.replace("label", "probability"), "has a column 'probability' already"),
        ("in.jsonl", f'{TWO_TEXTS}\n\n{{"sentence1": "a"}}', "row 2 (line 3): column 'sentence2'"),
        ("in.jsonl", f"{TWO_TEXTS}\n{LABELLED}", "in.jsonl, row 1"),
        ("in.jsonl", f"{LABELLED}\n{TWO_TEXTS}", "in.jsonl, row 2 (line 2)"),
    ],
)
def test_a_bad_input_is_named_with_its_place_and_costs_nothing(
    name: str, content: str | None, words: str, bundle: Folders, tmp_path: Path, refusal: Refusal
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    (tmp_path / "out.jsonl").write_text("older")
    before, source = contents(tmp_path), tmp_path / name
    for chunk_rows in "19":
        flags = ("--out", tmp_path / "out.jsonl", "--overwrite", "--chunk-rows", chunk_rows)
        assert words in (error := refusal(bundle("bert"), "--in", source, *flags))
        assert str(source) in error
        assert LABELLED not in (content or "") or "add --no-labels" in error
        assert contents(tmp_path) == before


def test_a_damaged_parquet_file_is_refused(bundle: Folders, tmp_path: Path, refusal: Refusal) -> None:
    source, table = tmp_path / "in.parquet", pyarrow.Table.from_pylist(make_pairs(500, seed=16))
    parquet.write_table(table, source, write_page_checksum=True, row_group_size=250)
    content = source.read_bytes()
    words = (bundle("bert"), "--in", source, "--out", tmp_path / "out.csv", "--chunk-rows", "100")
    for damaged in (content[: len(content) // 2], content[:3000] + bytes([content[3000] ^ 1]) + content[3001:]):
        source.write_bytes(damaged)
        assert "in.parquet cannot be read as parquet (" in refusal(*words)
    latin = pyarrow.array([b"\xe4"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"sentence1": ["a"], "sentence2": ["b"], "note": latin}), source)
    assert re.search(r"cannot be read as parquet \(.*UTF8", refusal(*words))
    parquet.write_table(pyarrow.table([["a"], ["b"], ["c"]], names=["sentence1", "sentence2", "sentence2"]), source)
    assert "in.parquet has two columns 'sentence2'" in refusal(*words)
    assert [path.name for path in tmp_path.iterdir()] == ["in.parquet"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("{tmp} --in {in} --out {out}", "is no bundle of promptfold"),
        ("{bundle} --in - --out {out}", "--in -: a pipe cannot"),
        ("{bundle} --in {in} --out -", "--out -: a pipe cannot"),
        ("{bundle} --in {in} --out {tmp}/out.xlsx", "give a file that ends in .csv, .jsonl, .parquet"),
        ("{bundle} --in {in} --out {in}", "is the file that is read"),
        ("{bundle} --in {in} --out {tmp}/link.csv --overwrite", "is the file that is read"),
        ("{bundle} --in {in} --out {tmp}/older.csv", "older.csv is there already. Add --overwrite to replace it"),
        ("{bundle} --in {in} --out {tmp}/folder.csv --overwrite", "folder.csv is a folder"),
        ("{bundle} --in {in} --out {tmp}/other.csv --overwrite", "holds something that is no run of export.score"),
        ("{bundle} --in {in} --out {in}/out.csv", "cannot be written (Not a directory)"),
        ("{bundle} --in {in} --out {out} --batch-size 0", "--batch-size 0: give a whole number"),
        ("{bundle} --in {in} --out {out} --chunk-rows 0", "--chunk-rows 0: give a whole number"),
        ("{bundle} --in {in} --out {out} --threads 0", "--threads 0: give a whole number"),
        *(
            (
                f"{{bundle}} --in {{in}} --out {{out}} --{flag} {10**20}",
                f"--{flag} {10**20}: give a whole number from 1 to",
            )
            for flag in ("batch-size", "chunk-rows", "threads")
        ),
        ("{bundle} --in {in} --out {out} --text-columns sentence1", "was trained on 2 (sentence1, sentence2)"),
        ("{bundle} --in {in} --out {out} --label-column gold", "has no column 'gold'"),
        ("{bundle} --in {in} --out {out} --label-column label --no-labels", "exclude each other"),
        ("{bundle} --in {in2} --out {out} --all-probabilities", "has a column 'probability_equivalent' already"),
        ("{bundle} --in {in} --out {out} --address auto", "--address is for --engine ray"),
        ("{bundle} --in {in} --out {out} --workers 2", "--workers is for --engine ray"),
    ],
)
def test_a_wrong_flag_costs_nothing(flags: str, words: str, bundle: Folders, tmp_path: Path, refusal: Refusal) -> None:
    (tmp_path / "in.csv").write_text(GOOD)
    (tmp_path / "in2.csv").write_text(GOOD.replace("label", "probability_equivalent"))
    (tmp_path / "link.csv").symlink_to("in.csv")
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "other.csv.partial").mkdir()
    for name in ("older.csv", "other.csv.partial/mine"):
        (tmp_path / name).write_text("mine")
    before = contents(tmp_path)
    places = {name: tmp_path / f"{name}.csv" for name in ("in", "in2", "out")}
    assert words in refusal(*shlex.split(flags.format(bundle=bundle("bert"), tmp=tmp_path, **places)))
    assert contents(tmp_path) == before


def write_files(folder: Path, rows: Rows, names: dict[str, int], *, group_rows: int = 7) -> Path:
    """Rows as Parquet files: so many in each, in the order of their names."""
    assert sum(names.values()) == len(rows)
    start = 0
    for name, n in names.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        table = pyarrow.Table.from_pylist(rows).slice(start, n)
        parquet.write_table(table, folder / name, row_group_size=group_rows)
        start += n
    return folder


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--in {in} --out {tmp}/new --address 127.0.0.1:1", "--address 127.0.0.1:1: no Ray cluster answers there"),
        ("--in {in} --out {tmp}/new --address nonsense", "give HOST:PORT"),
        ("--in {in} --out {tmp}/new --workers 0", "--workers 0: give a whole number of at least 1"),
        ("--in {in} --out {tmp}/new --text-columns a,b", "has no column 'a'"),
        ("--in {in} --out {tmp}/file", "is a file, not a folder"),
        ("--in {in} --out {in}", "holds something that is no run of export.score"),
        ("--in {tmp} --out {in} --overwrite", "holds something that is no run of export.score"),
        ("--in {tmp}/nowhere --out {tmp}/new", "there is no such file or folder"),
        ("--in {in}/*.pq --out {tmp}/new", "there is no such file"),
        ("--in {tmp}/rows.csv --out {tmp}/new", "no file there ends in .parquet, and --engine ray reads Parquet alone"),
        (
            "--in {tmp}/mixed --out {tmp}/new",
            "mixed/2.csv would be left out, as --engine ray reads .parquet files alone",
        ),
        ("--in {tmp}/broken.parquet --out {tmp}/new", "broken.parquet cannot be read as parquet"),
        ("--in {tmp}/others --out {tmp}/new", "2.parquet has other columns than "),
        ("--in {tmp}/empty.parquet --out {tmp}/new", "has no rows"),
        ("--in http://here/x --out {tmp}/new", "--in http://here/x: give a path, or s3://BUCKET/KEY"),
        ("--in s3:// --out {tmp}/new", "give s3://BUCKET/KEY"),
        ("--in {in} --out {tmp}/done", "is there already, and whole. Add --overwrite"),
        ("--in {tmp}/done/*.parquet --out {tmp}/done --overwrite", "is read. Choose another folder"),
        ("--in {in} --out {in}/new", "is read. Choose another folder"),
    ],
)
def test_a_wrong_flag_for_ray(flags: str, words: str, bundle: Folders, tmp_path: Path, refusal: Refusal) -> None:
    rows = make_pairs(4, seed=26)
    write_files(tmp_path / "in", rows, {"1.parquet": 4})
    write_files(tmp_path / "others", rows, {"1.parquet": 4})
    write_files(tmp_path / "others", [row | {"idx": "text"} for row in rows], {"2.parquet": 4})
    write_files(tmp_path / "mixed", rows, {"1.parquet": 4})
    (tmp_path / "mixed" / "2.csv").write_text(GOOD)
    write_files(tmp_path / "done", rows, {"part-00000000.parquet": 4})
    for name in ("file", "rows.csv", "broken.parquet", "done/_SUCCESS"):
        (tmp_path / name).write_text("mine")
    parquet.write_table(pyarrow.Table.from_pylist(rows).slice(0, 0), tmp_path / "empty.parquet")
    before = contents(tmp_path)
    command = shlex.split(flags.format(**{"in": tmp_path / "in", "tmp": tmp_path}))
    assert words in refusal(bundle("bert"), "--engine", "ray", *command)
    assert contents(tmp_path) == before


def test_two_runs_on_ray_never_write_one_folder(bundle: Folders, tmp_path: Path, refusal: Refusal) -> None:
    write_files(tmp_path / "in", make_pairs(4, seed=26), {"1.parquet": 4})
    words = (bundle("bert"), "--engine", "ray", "--in", tmp_path / "in", "--out", out := tmp_path / "deep" / "out")
    with FinishedChunks(local_place(out), str(out), ".parquet").held():
        assert f"--out {out}: another run is writing there (it holds {out})" in refusal(*words)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_missing_ray_is_named_and_the_other_engine_does_without(
    bundle: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, label: Label, refusal: Refusal
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    source, out = write_rows(tmp_path / "in.parquet", make_pairs(4, seed=27)), tmp_path / "out.parquet"
    words = (bundle("bert"), "--in", source, "--out", out)
    assert 'pip install "ray[serve,data]==2.60.0"' in refusal(*words, "--engine", "ray")
    assert label(bundle("bert"), source, out)["rows"] == 4


def test_blocks_are_the_rows_of_the_file_in_whatever_order_they_are_read(tmp_path: Path) -> None:
    rows: Rows = [{"n": index} for index in range(100)]
    write_files(tmp_path / "in", rows, {"1.parquet": 63, "2.parquet": 37}, group_rows=13)
    data_set = find_data_set(*(parse_place(str(tmp_path / name), f"--{name}") for name in ("in", "out")))
    for block_rows in (1, 7, 13, 50, 1000):
        blocks = data_set.blocks(block_rows)
        assert [block.number for block in blocks] == list(range(len(blocks)))
        order = list(blocks)
        random.Random(block_rows).shuffle(order)  # noqa: S311 -- test data
        for sequence in (blocks, order, blocks[::2]):
            reader = BlockReader(data_set)
            for block in sequence:
                start = block.start + (63 if block.file else 0)
                chunk = reader.read(block)
                assert chunk.column("n") == list(range(start, start + block.rows))
                assert chunk.place(0) == f"{data_set.name(block.file)}, row {block.start + 1}"
    os.utime(tmp_path / "in" / "2.parquet", ns=(1, 1))
    with pytest.raises(DataError, match="changed while it was read"):
        BlockReader(data_set).read(Block(0, 1, 0, 5))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("in.csv", b"\xef\xbb\xbfsentence1;sentence2;label\r\nword1;word2, word3;1\r\n"),
        ("in.csv", b"sentence1|sentence2|label\nword1|word2, word3|1\n"),
        ("in.tsv", b"\xef\xbb\xbfsentence1\tsentence2\tlabel\nword1\tword2, word3\t1\n"),
        ("in.csv", "sentence1\tsentence2\tlabel\nword1\tword2, word3\t1\n".encode("utf-16")),
    ],
)
def test_the_mark_and_the_delimiter_of_a_csv_file_stay(
    name: str, content: bytes, bundle: Folders, tmp_path: Path, label: Label
) -> None:
    """Excel knows UTF-8 by its byte-order mark; that of UTF-16 becomes one."""
    (tmp_path / name).write_bytes(content)
    out = tmp_path / f"out{Path(name).suffix}"
    label(bundle("bert"), tmp_path / name, out, "--chunk-rows", "1")
    is_marked = content.startswith((b"\xef\xbb\xbf", b"\xff\xfe"))
    delimiter = next(character for character in ";|\t" if character.encode() in content)
    head, row, *more = out.read_bytes().decode().splitlines()
    assert head == "\ufeff" * is_marked + delimiter.join(
        ("sentence1", "sentence2", "label", "prediction", "probability")
    )
    assert row.split(delimiter)[:3] == ["word1", "word2, word3", "1"]
    assert not more


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_rows_that_cannot_be_used_are_skipped_where_wanted(
    suffix: str, label: Label, refusal: Refusal, bundle: Folders, tmp_path: Path
) -> None:
    """The others get what they get alone, in every chunk; by default nothing is written."""
    good = shuffled_pairs(6, seed=21)
    rows = [*good[:2], {"sentence1": "a", "sentence2": ""}, {"sentence1": " ", "sentence2": "b"}, *good[2:]]
    source, alone = write_rows(tmp_path / f"in{suffix}", rows), write_rows(tmp_path / f"good{suffix}", good)
    message = refusal(str(bundle("bert")), "--in", str(source), "--out", str(tmp_path / f"no{suffix}"))
    assert "2 rows cannot be used" in message
    assert "--skip-bad-rows" in message
    assert not (tmp_path / f"no{suffix}").exists()
    found = label(bundle("bert"), source, tmp_path / f"out{suffix}", "--skip-bad-rows", "--chunk-rows", "2")
    assert (found["rows"], found["rows_skipped"]) == (8, 2)
    label(bundle("bert"), alone, tmp_path / f"expected{suffix}", "--chunk-rows", "2")
    written, expected = read_rows(tmp_path / f"out{suffix}"), read_rows(tmp_path / f"expected{suffix}")
    kept = [row for row in written if not row["problem"]]
    assert [row["prediction"] for row in kept] == [row["prediction"] for row in expected]
    assert np.allclose([float(row["probability"]) for row in kept], [float(row["probability"]) for row in expected])
    assert [row["problem"] for row in written[2:4]] == [
        "column 'sentence2' holds no text",
        "column 'sentence1' holds no text",
    ]
    assert not any(row["prediction"] for row in written[2:4])
