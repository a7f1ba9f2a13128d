"""The tab that labels a file: what is read and refused, what both engines say, what is written, and how it runs."""

import csv
import html
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import gradio as gr
import numpy as np
import pyarrow
import pytest
from markupsafe import escape
from pyarrow import parquet
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, recall_score

from demo.access.limits import MAX_BYTES
from demo.engines.stage import Setup, Stage
from demo.measure.compare import Answer
from demo.measure.label_file import BATCH_ROWS, Progress, Scored, label_upload, write_labelled
from demo.measure.upload import MAX_ROWS, Upload, read_upload
from demo.page.tab_score import build_score_tab, results_html
from export.runtime.batches import Classified
from export.runtime.check_text import MAX_CHARACTERS
from tests.conftest import POSITIONS, VIRTUAL_TOKENS, Folders, make_pairs
from tests.demo.engines import stage_of
from tests.demo.one_tab import handler, make_page
from tests.export.test_score import golden_probabilities, read_rows, shuffled_pairs, write_rows
from tests.train.test_files import TEXT, WRONG
from train.common.errors import DataError, EngineError, UsageError
from train.data.tasks import MRPC, custom_task

Rows = list[dict[str, Any]]
FLAG = re.compile(r"(?<!\S)--[a-z]")
"""A visitor has no command line."""
LABELS, LIMIT = MRPC.labels, POSITIONS - VIRTUAL_TOKENS
ADDED = ["prediction_pytorch", "probability_pytorch", "prediction_onnx", "probability_onnx", "agree"]


@pytest.fixture(autouse=True)
def step_by_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One batch a step, and Gradio's files in a folder of the test."""
    monkeypatch.setattr("demo.measure.label_file.SLICE_SECONDS", 0.0)
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "files"))


def page_of(stage: Stage) -> gr.Blocks:
    return make_page(stage, lambda stage, selectors, _: build_score_tab(stage, selectors))


@pytest.fixture
def page(stage: Stage) -> gr.Blocks:
    return page_of(stage)


@pytest.fixture
def score(page: gr.Blocks, tmp_path: Path) -> Callable[..., Any]:

    def send(path: Path, text_columns: str = "", label_column: str = "", *, adapter: str = "") -> tuple[Any, Path]:
        copy = shutil.copy(path, tmp_path / "files" / path.name)  # the endpoint deletes what it was sent
        summary, written = handler(page, "score_file")(str(copy), text_columns, label_column, adapter, "", "")
        assert not Path(copy).exists()
        return summary, Path(written)

    (tmp_path / "files").mkdir()
    return send


def run(stage: Stage, upload: Upload) -> Scored:
    *_, last = label_upload(stage, stage.default(), upload, cancelled=threading.Event())
    assert last.result is not None
    return last.result


def files_in(folder: Path) -> list[str]:
    """Names of what visitors brought and took; Gradio's own empty files aside."""
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


def check_answers(kind: str, score: Callable[..., Any], adapter: Path, base_model: Path, folder: Path) -> None:
    """Both engines' answers to a file against PEFT's and scikit-learn's, in the file's order."""
    generator = np.random.default_rng(4)
    rows = [row | {"label": int(generator.integers(2)), "n": n} for n, row in enumerate(shuffled_pairs(37, seed=4))]
    summary, path = score(write_rows(folder / "a file.jsonl", rows), adapter=kind)
    assert path.name == "a file-labelled.jsonl"
    written = read_rows(path)
    assert [list(row) for row in written] == [[*row, *ADDED] for row in rows]
    assert [{name: row[name] for name in rows[0]} for row in written] == rows

    golden = golden_probabilities([(row["sentence1"], row["sentence2"]) for row in rows], adapter, base_model)
    assert np.ptp(golden[:, 0]) > 0.01  # or any order would do
    predicted = golden.argmax(axis=1)
    expected = [row["label"] for row in rows]
    assert json.loads(json.dumps(summary)) == summary
    assert (summary["file"], summary["adapter"], summary["precision"]) == ("a file.jsonl", kind, "fp32")
    assert (summary["rows"], summary["texts_cut"], summary["disagreements"]) == (37, 1, 0)
    assert (summary["labels"], summary["pytorch_mode"]) == (list(LABELS), "eager")
    metrics = {"accuracy": accuracy_score(expected, predicted), "f1": f1_score(expected, predicted)}
    for side in ("pytorch", "onnx"):
        assert [row[f"prediction_{side}"] for row in written] == [LABELS[index] for index in predicted]
        probabilities = np.array([row[f"probability_{side}"] for row in written])
        assert np.abs(probabilities - golden.max(axis=1)).max() < 1e-5
        assert summary[side]["counts"] == {LABELS[index]: int((predicted == index).sum()) for index in range(2)}
        assert summary[side]["confusion"] == confusion_matrix(expected, predicted, labels=[0, 1]).tolist()
        assert summary[side]["scores"] == pytest.approx(metrics)
    assert all(row["agree"] is True for row in written)


def test_engines_are_as_peft(score: Callable[..., Any], adapter: Folders, base_model: Folders, tmp_path: Path) -> None:
    check_answers("bert", score, adapter("bert"), base_model("bert"), tmp_path)


def test_without_pytorch_onnx_runtime_labels_alone(
    adapter: Folders, bundle: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stage_of(adapter("bert"), bundles=(bundle("bert"),), has_pytorch=False) as stage:
        source = write_rows(tmp_path / "in.csv", shuffled_pairs(9, seed=5))
        shown = results_html(run(stage, read_upload(source, MRPC)))
        summary, written = handler(page_of(stage), "score_file")(str(source), *[""] * 5)
        # Logits that are no numbers become no label.
        nan = SimpleNamespace(name="half", logits=lambda _: np.full((1, 2), np.nan, np.float32))
        opened = replace(stage.open(Setup("bert")), onnx=cast(Any, nan))
        with pytest.raises(EngineError, match="The half engine gave logits that are no numbers"):
            Answer.of(opened.onnx, MRPC, opened.tokenize([("word1", "word2")]).arrays)
        engine = type(stage.open(Setup("bert")).onnx)
        monkeypatch.setattr(engine, "logits", lambda _, arrays: np.full((len(arrays["input_ids"]), 2), np.nan))
        upload = read_upload(write_rows(tmp_path / "again.csv", shuffled_pairs(9, seed=5)), MRPC)
        with pytest.raises(EngineError, match="engine gave logits that are no numbers"):
            run(stage, upload)
    assert {"disagreements", "pytorch", "pytorch_mode"}.isdisjoint(summary)
    assert summary["onnx"]["scores"] is None
    assert list(read_rows(Path(written))[0]) == [*MRPC.text_columns, "prediction_onnx", "probability_onnx"]
    assert "PyTorch" not in shown
    assert "The file has no column &#39;label&#39;, so nothing is scored." in shown
    assert not re.search("engine|differ|Note", shown)


def test_every_column_comes_back_in_the_format_it_came_in(score: Callable[..., Any], tmp_path: Path) -> None:
    """In any case of the ending; other formats are in tests/export/test_score.py."""
    notes = ["Ünïcödé 東京 🙂", 'says "no",\nand leaves', "null", "", "\u2028"]
    rows: Rows = [row | {"note": note} for row, note in zip(shuffled_pairs(5, seed=6), notes, strict=True)]
    plain, path = score(write_rows(tmp_path / "in.csv", rows).rename(tmp_path / "in.CSV"))
    written = read_rows(path)
    assert path.suffix == ".csv"
    assert [list(row) for row in written] == [[*row, *ADDED] for row in rows]
    assert [{name: row[name] for name in rows[0]} for row in written] == rows
    assert {row["agree"] for row in written} == {"true"}
    assert all(float(row["probability_onnx"]) >= 0.5 for row in written)
    assert plain["read_as"] == "in.CSV: UTF-8, delimiter comma, columns sentence1, sentence2, note"
    # Columns may have other names.
    gold = [LABELS[n % 2] for n in range(5)]
    renamed = [{"b": row["sentence2"], "a": row["sentence1"], "label": "?"} for row in rows]
    other = [row | {"gold": label} for row, label in zip(renamed, gold, strict=True)]
    named, path = score(write_rows(tmp_path / "in.parquet", other), " a , b ", "gold")
    assert named["onnx"]["counts"] == plain["onnx"]["counts"]
    predicted = [row["prediction_onnx"] for row in read_rows(path)]
    assert predicted == [row["prediction_onnx"] for row in written]
    assert named["onnx"]["scores"]["accuracy"] == accuracy_score(gold, predicted)


FORMULAS = {
    **{cell: f"'{cell}" for cell in ("=1+1", "@SUM(A1)", "+49 170 1234", "-2+3", "\t=1", "\r=1", "-", "-٣", "-3\n")},
    **{cell: cell for cell in ("-3.5", "+7", "-1e-05", "-.5", "1=1", " =1", "")},
}


def test_in_csv_no_cell_is_a_formula_and_numbers_stay(stage: Stage, tmp_path: Path) -> None:
    rows: Rows = [row | {"=x": cell} for row, cell in zip(make_pairs(len(FORMULAS), seed=7), FORMULAS, strict=True)]
    rows[0]["sentence1"] = "=word1"
    sources = [write_rows(tmp_path / f"in{suffix}", rows) for suffix in (".csv", ".jsonl", ".parquet")]
    paths = [write_labelled(run(stage, read_upload(source, MRPC)), tmp_path) for source in sources]
    for path in paths[1:]:
        assert [row["=x"] for row in read_rows(path)] == list(FORMULAS)
    with paths[0].open(newline="", encoding="utf-8") as stream:
        head, *cells = csv.reader(stream)
    assert head == [*[*rows[0]][:-1], "'=x", *ADDED]
    assert [row[head.index("'=x")] for row in cells] == list(FORMULAS.values())
    assert cells[0][0] == "'=word1"


PAIR = "sentence1,sentence2,label\nword1,word2,1\n"


def pairs_table(n: int, **columns: Any) -> pyarrow.Table:
    return pyarrow.table({"sentence1": ["word1"] * n, "sentence2": ["word2"] * n} | columns)


def parquet_rows(n: int) -> bytes:
    out = pyarrow.BufferOutputStream()
    parquet.write_table(pairs_table(n), out)
    return out.getvalue().to_pybytes()


def run_end_encoded() -> bytes:
    """An Arrow file with a column of a type that Parquet lacks."""
    table = pairs_table(2, x=pyarrow.RunEndEncodedArray.from_arrays([2], ["a"]))
    out = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(out, table.schema) as writer:
        writer.write_table(table)
    return out.getvalue().to_pybytes()


def swallowing_rows() -> bytes:
    """Behind what is looked at to recognise quotes, one that is text."""
    return b"sentence1\tsentence2\n" + (b"a" * 300 + b"\tb\n") * 1000 + b'"c\td\ne"\tf\n'


LISTED = {"sentence1": "a", "sentence2": "b", "label": ["x", "y"]}
COLUMNS = ("text_columns", "label_column")
HEAD = "sentence1,sentence2\n"
REFUSED: list[tuple[str | None, Callable[[], bytes], tuple[str, ...], str]] = [
    ("in", lambda: b"x", (), "in: give a file that ends in"),
    ("in.csv", lambda: b"x" * (MAX_BYTES + 1), (), r"in\.csv has 5,000,001 bytes; at most 5,000,000 are taken"),
    ("in.csv", (PAIR + "a,b,1\n" * MAX_ROWS).encode, (), r"in\.csv has more than 2,000 rows"),
    ("in.jsonl", lambda: b'{"sentence1": "a"}\n' * (MAX_ROWS + 1), (), r"in\.jsonl has more than 2,000 rows"),
    ("in.parquet", lambda: parquet_rows(MAX_ROWS + 1), (), r"in\.parquet has more than 2,000 rows"),
    ("in.csv", lambda: b"sentence1,text\na,b\n", (), r"no column 'sentence2'; it has sentence1, text\. Name its own"),
    (
        "in.csv",
        (HEAD + "a," + "x" * 10_001).encode,
        (),
        r"row 1 \(line 2\).*'sentence2' has 10,001 characters; at most",
    ),
    (
        "in.jsonl",
        lambda: b'{"a": 1},\n' * 3,
        ("",),
        r"3 rows cannot be used.*\n  in\.jsonl, row 1 \(line 1\): it is no JSON",
    ),
    ("in.csv", (PAIR + "a,b,\n").encode, (), "row 2 .*label ''.*or rename the column to leave labels unread"),
    ("in.csv", lambda: b"sentence1,sentence2,agree\na,b,c\n", (), "has a column 'agree' already, and one of that name"),
    ("in.csv", lambda: b"sentence1,sentence2,probability_onnx\na,b,1\n", (), "has a column 'probability_onnx'"),
    ("in.csv", PAIR.encode, ("sentence1",), r"1 text columns are named \(sentence1\); this model was trained"),
    ("in.csv", PAIR.encode, ("a,b,c",), "3 text columns are named"),
    ("in.csv", PAIR.encode, ("sentence1, nowhere",), r"in\.csv has no column 'nowhere'"),
    ("in.csv", PAIR.encode, ("", "gold"), r"in\.csv has no column 'gold'; it has sentence1, sentence2, label"),
    ("in.csv", PAIR.encode, ("", "sentence1"), "label 'word1' in column 'sentence1' is none of"),
    ("in.csv", lambda: b"sentence1^sentence2\na^b\n", (), r"stands between its cells, save it with commas there\.$"),
    ("in.csv", lambda: "sentence1,sentence2\nПривет,мир\n".encode("cp1251"), (), r"Save it as such, in UTF-8\.$"),
    (
        "in.csv",
        lambda: "sentence1,sentence2\n".encode("utf-16") + b"\0",
        (),
        r"no text in utf-16 .*\. Save it in UTF-8\.$",
    ),
    ("in.tsv", swallowing_rows, (), "put the cell in quotes and each of its own twice. Fix or remove the row"),
    ("in.arrow", run_end_encoded, (), r"column 'x' .* Leave it out, or write the rows as \.jsonl\.$"),
    ("in.jsonl", lambda: json.dumps(LISTED).encode(), (), "For several labels a row train with kind multi_label"),
    ("gone.csv", bytes, (), r"^gone\.csv is no longer here\. Upload it again\."),
    (None, bytes, (), "No file was given"),
]
"""The page's own limits and words; what every reader of labelled files refuses is in tests/train/test_data.py."""


@pytest.mark.parametrize(("name", "content", "arguments", "words"), REFUSED)
def test_what_cannot_be_used_is_named_without_its_folder(
    name: str | None, content: Callable[[], bytes], arguments: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    if name and name != "gone.csv":
        (tmp_path / name).write_bytes(content())
    with pytest.raises((DataError, UsageError), match=words) as refusal:
        read_upload(tmp_path / name if name else None, MRPC, **dict(zip(COLUMNS, arguments, strict=False)))
    message = str(refusal.value)
    assert message.startswith(name or "No") or arguments
    assert str(tmp_path) not in message
    assert len(message) < 700
    assert not FLAG.search(message)


@pytest.mark.parametrize(("name", "content", "_"), WRONG)
def test_no_refusal_of_a_file_names_a_flag(name: str, content: bytes, _: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as refusal:
        read_upload(tmp_path / name, TEXT)
    assert not FLAG.search(str(refusal.value))


def test_a_small_parquet_file_cannot_become_a_large_one(tmp_path: Path) -> None:
    long, path = "0" * 500_000, tmp_path / "in.parquet"
    one_list = pyarrow.ListArray.from_arrays(pyarrow.array([0, 3_000_000]), pyarrow.nulls(3_000_000, pyarrow.int8()))
    large_pages = {"dictionary_pagesize_limit": 10**8}
    too_long = "is more than 20,000,000 bytes long"
    cases: tuple[tuple[Any, dict[str, Any], str], ...] = (
        ([long] * 200, {"use_dictionary": False, "compression": "zstd"}, f"says that it {too_long}"),
        ([long] * 200, large_pages, too_long),
        (pyarrow.DictionaryArray.from_arrays([0] * 200, [long]), large_pages, too_long),  # kept by Arrow
        (one_list, {}, "has more than 2,000,000 values"),
    )
    for column, options, words in cases:
        parquet.write_table(pairs_table(len(column), x=column), path, **options)
        assert path.stat().st_size < 1_000_000
        with pytest.raises(DataError, match=rf"in\.parquet .*{words}"):
            read_upload(path, MRPC)
    # The largest file that is allowed is read.
    rows: Rows = [{"sentence1": "x" * 1200, "sentence2": "y" * 1200, "kind": f"k{n % 1500}"} for n in range(MAX_ROWS)]
    table = pyarrow.Table.from_pylist(rows)
    parquet.write_table(table.set_column(2, "kind", table["kind"].dictionary_encode()), path)
    assert len(read_upload(path, MRPC).sentences) == MAX_ROWS
    rows[0]["sentence1"] = "x" * MAX_CHARACTERS
    assert len(read_upload(write_rows(tmp_path / "in.csv", rows), MRPC).sentences[0][0]) == MAX_CHARACTERS


def column(shown: str, title: str, number: int) -> list[str]:
    """The cells of a column of the table under a title, as a visitor reads them."""
    markup = re.search(rf"<h3>{re.escape(escape(title))}.*?</table>", shown, re.DOTALL)
    assert markup, title
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in markup[0].split("<tr>")[1:]]
    return [html.unescape(cells[number]) for cells in rows]


def test_disagreements_come_first_then_what_is_wrong(tmp_path: Path) -> None:
    expected, predictions = [0, 0, 1, 1, 0, 1], {"PyTorch": [0, 1, 1, 0, 0, 1], "ONNX Runtime": [0, 1, 1, 1, 1, 1]}
    upload = replace(read_upload(write_rows(tmp_path / "in.csv", shuffled_pairs(6, seed=9)), MRPC), expected=expected)
    pytorch, onnx = (Classified.of(MRPC, np.eye(2)[list(p)], np.zeros(6, bool)) for p in predictions.values())
    scored = Scored(upload, Setup("bert"), onnx, pytorch, LIMIT)
    assert scored.differs.tolist() == [False, False, False, True, True, False]
    assert scored.wrong.tolist() == [False, True, False, True, True, False]
    assert scored.as_json()["disagreements"] == 2
    agree = [json.loads(row["agree"]) for row in read_rows(write_labelled(scored, tmp_path))]
    assert agree == [True, True, True, False, False, True]
    shown = results_html(scored)
    assert "<b>The engines give different labels to 2 of 6 rows.</b>" in shown
    assert column(shown, "All 6 rows", 0) == ["Row", "4", "5", "2", "1", "3", "6"]
    notes = ["Note", "engines differ, wrong", "engines differ, wrong", "wrong", "", "", ""]
    assert column(shown, "All 6 rows", -1) == notes
    assert column(shown, "Rows by label", 3) == ["In the file", "3", "3"]
    for number, (side, predicted) in enumerate(predictions.items(), start=1):
        matrix = confusion_matrix(expected, predicted)
        for index, label in enumerate(LABELS):
            cells = column(shown, f"Confusion matrix, {side}", index + 1)
            assert cells == [label, *map(str, matrix[:, index])]
        assert column(shown, "Rows by label", number) == [side, str(6 - sum(predicted)), str(sum(predicted))]
        metrics = [metric(expected, predicted) for metric in (accuracy_score, f1_score)]
        cells = [f"{100 * value:.1f}" for value in (*metrics, *recall_score(expected, predicted, average=None))]
        assert column(shown, "Against the file's labels", number) == [side, *cells]
    assert column(shown, "Against the file's labels", 0)[-2:] == [f"recall of {label}" for label in LABELS]


def test_at_most_fifty_rows_and_few_labels_are_shown_and_every_text_is_only_text(tmp_path: Path) -> None:
    n = 60
    rows: Rows = [row | {"sentence1": f"<img src=x onerror=alert({row['idx']})>"} for row in make_pairs(n, seed=10)]
    rows[0]["sentence2"] = "y" * 5000
    upload = read_upload(write_rows(tmp_path / "in.jsonl", rows), MRPC)
    answers = Classified.of(MRPC, np.eye(2)[[0] * n], np.arange(n) < 3)
    shown = results_html(Scored(upload, Setup("bert"), answers, answers, LIMIT))
    assert "<img" not in shown
    assert len(column(shown, "50 of 60 rows", 0)) == 1 + 50
    assert "y" * 160 + " …" in shown
    assert "y" * 161 not in shown
    assert f"3 texts are longer than the {LIMIT} tokens that the model reads" in shown
    assert "Both engines give the same label to each of the 60 rows." in shown
    # Many labels have no matrix on the page.
    task = custom_task(("said",), "gold", [f"<{n}>" for n in range(30)])
    upload = read_upload(write_rows(tmp_path / "in.csv", [{"said": "word1", "gold": "<3>"}]), task)
    scored = Scored(upload, Setup("bert"), Classified.of(task, np.eye(30)[[3]], np.zeros(1, bool)), None, 10)
    assert "The confusion matrices of 30 labels are in the answer of the endpoint alone" in results_html(scored)
    assert np.sum(scored.as_json()["onnx"]["confusion"]) == 1
    assert scored.as_json()["onnx"]["scores"]["accuracy"] == 1


def test_others_may_measure_between_two_batches_and_none_runs_beside_them(stage: Stage, tmp_path: Path) -> None:
    upload = read_upload(write_rows(tmp_path / "in.csv", shuffled_pairs(2 * BATCH_ROWS, seed=11)), MRPC)
    steps = label_upload(stage, stage.default(), upload, cancelled=threading.Event())
    seen: list[Progress] = []
    for _ in range(5):
        with stage.measuring:
            thread = threading.Thread(target=lambda: seen.append(next(steps)))
            thread.start()
            thread.join(0.2)
            assert thread.is_alive() or seen[-1].result is not None
            before = len(seen)
        thread.join()
        assert len(seen) == before + 1 or seen[-1].result is not None
        assert not stage.measuring.locked()
    assert list(steps) == []
    expected = [("ONNX Runtime", 8, 0.25), ("ONNX Runtime", 16, 0.5), ("PyTorch", 8, 0.75), *[("PyTorch", 16, 1.0)] * 2]
    assert [(step.engine, step.done, step.fraction) for step in seen] == expected
    # A visitor who waits for the engines gets them before the file is done.
    upload = read_upload(write_rows(tmp_path / "in.csv", shuffled_pairs(40 * BATCH_ROWS, seed=12)), MRPC)
    fractions, got = [0.0], []

    def wait() -> None:
        with stage.measuring:
            got.append(fractions[-1])

    visitor = threading.Thread(target=wait)
    for step in label_upload(stage, stage.default(), upload, cancelled=threading.Event()):
        fractions.append(step.fraction)
        if len(fractions) == 3:
            visitor.start()
    visitor.join()
    assert got[0] < 1


def prepare(
    page: gr.Blocks, source: Path, precision: str = "fp32", jobs: dict[int, Any] | None = None, number: int = 0
) -> tuple[dict[int, Any], int]:
    inputs = (jobs or {}, number, "bert", precision, "eager", str(source), "", "")
    jobs, number, start, cancel, status, results, download = handler(page, "prepare")(*inputs)
    assert (start.interactive, cancel.interactive, results, download.interactive) == (False, True, "", False)
    assert f"{source.name}: waiting for a turn" in status
    return jobs, number


def named(outputs: Sequence[Any]) -> SimpleNamespace:
    names = ("start", "cancel", "file", "status", "results", "download")
    return SimpleNamespace(**dict(zip(names, outputs, strict=False)))


def label(page: gr.Blocks, jobs: dict[int, Any], number: int) -> Iterator[SimpleNamespace]:
    with closing(handler(page, "label")(jobs, number)) as steps:
        yield from map(named, steps)


def check_ended(now: Any, words: str, source: Path) -> None:
    """The page can label another file, and the upload is gone."""
    assert (now.file, now.start.interactive, now.cancel.interactive) == (None, True, False)
    assert words in now.status
    assert not source.exists()


def test_the_tab_counts_rows_shows_results_and_deletes_the_upload(page: gr.Blocks, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.csv", make_pairs(12, seed=13))
    jobs, number = prepare(page, source)
    *steps, last = label(page, jobs, number)
    counted = [re.search(r">([\w ]+: \d+) of 12 rows labelled", step.status) for step in steps]
    expected = ["ONNX Runtime: 8", "ONNX Runtime: 12", "PyTorch: 8", "PyTorch: 12"]
    assert [found[1] for found in counted if found] == expected
    check_ended(last, "Done: 12 rows of in.csv labelled.", source)
    assert "Confusion matrix, PyTorch" in last.results
    assert "in.csv: UTF-8, delimiter comma, columns sentence1, sentence2, label, idx" in last.results
    written = Path(last.download.value["path"])
    assert (written.name, len(read_rows(written))) == ("in-labelled.csv", 12)
    assert written.is_relative_to(tmp_path / "files")
    assert jobs == {}
    # An engine that cannot be started is told.
    source = write_rows(tmp_path / "in.csv", make_pairs(4, seed=16))
    (last,) = label(page, *prepare(page, source, precision="int8"))
    check_ended(last, "no int8 graph", source)


def test_a_file_that_is_cancelled_or_left_ends_between_two_batches(page: gr.Blocks, tmp_path: Path) -> None:
    for leaves in (False, True):
        source = write_rows(tmp_path / "in.csv", make_pairs(40, seed=14))
        jobs, number = prepare(page, source)
        steps = label(page, jobs, number)
        assert "8 of 40 rows" in next(steps).status
        if leaves:
            cast(Any, steps).close()  # as Gradio does
            assert not source.exists()
        else:
            assert handler(page, "_cancel")(jobs, number)[1].interactive is False
            (last,) = steps
            check_ended(last, "Cancelled. Nothing was kept.", source)
        assert jobs == {}
        assert files_in(tmp_path / "files") == []
    # One that waits is not labelled when its turn comes; what the visitor asked for since goes its way.
    source = write_rows(tmp_path / "in.csv", make_pairs(40, seed=14))
    jobs, number = prepare(page, source)
    check_ended(named(handler(page, "_cancel")(jobs, number)), "Cancelled. Nothing was kept.", source)
    write_rows(source, make_pairs(4, seed=14))
    jobs, second = prepare(page, source, jobs=jobs, number=number)
    assert list(handler(page, "label")(jobs, number)) == [[gr.skip()] * 6]
    assert "Done: 4 rows" in list(label(page, jobs, second))[-1].status
    assert handler(page, "_cancel")(jobs, second) == [gr.skip()] * 4
    # A file that is refused leaves the page as it was.
    source = tmp_path / "<b>.csv"
    source.write_text("sentence1\nword1\n")
    *same, status, results, download = handler(page, "prepare")({}, 0, "bert", "fp32", "eager", str(source), "", "")
    assert [*same, results, download] == [gr.skip()] * 6
    assert "&lt;b&gt;.csv has no column" in status
    assert source.exists()  # another name of a column may do
