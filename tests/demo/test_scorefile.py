"""The tab that labels a file: what is read and refused, what both engines say, what is written, and how it runs."""

import asyncio
import csv
import html
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import pyarrow
import pytest
from markupsafe import escape
from pyarrow import parquet
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

import demo.measure.label_file
from demo.access.limits import MAX_BYTES
from demo.engines.adapters import choose_adapters
from demo.engines.stage import Setup, Stage
from demo.measure.label_file import BATCH_ROWS, MAX_PREVIEW_ROWS, Progress, Scored, label_upload, write_labelled
from demo.measure.upload import MAX_ROWS, Upload, read_upload
from demo.page.controls import Selectors
from demo.page.tab_score import build_score_tab, results_html
from export.runtime.batches import Classified
from export.runtime.check_text import MAX_CHARACTERS
from tests.conftest import POSITIONS, VIRTUAL_TOKENS, Folders, make_pairs
from tests.export.test_score import golden_probabilities, read_rows, shuffled_pairs, write_rows
from train.common.errors import DataError, EngineError, PromptfoldError, UsageError
from train.data.tasks import MRPC, custom_task

Rows = list[dict[str, Any]]
Score = Callable[..., tuple[dict[str, Any], Path]]
"""Sends a file to ``/score_file``: path, named arguments → the summary, and the labelled file."""

LABELS = MRPC.labels
ADDED = ["prediction_pytorch", "probability_pytorch", "prediction_onnx", "probability_onnx", "agree"]


@pytest.fixture(scope="module")
def stage(adapter: Folders, bundle: Folders) -> Iterator[Stage]:
    """A tiny encoder on both engines."""
    stage = Stage(choose_adapters([adapter("bert")]), bundles=[bundle("bert")], threads=1)
    yield stage
    stage.close()


async def build_page(stage: Stage) -> gr.Blocks:
    """A page with this tab alone."""
    with gr.Blocks(analytics_enabled=False) as page:
        selectors = Selectors(
            gr.Dropdown(list(stage.choices), label="Adapter"),
            gr.Dropdown(["fp32"], label="ONNX Runtime"),
            gr.Dropdown(["eager"], label="PyTorch"),
        )
        with gr.Tab("Score a file"):
            build_score_tab(stage, selectors)
    return page


def make_page(stage: Stage) -> gr.Blocks:
    """The same from where no event loop runs: there Gradio would make one for each of its locks, and close none."""
    return asyncio.run(build_page(stage))


def handler(page: gr.Blocks, name: str) -> Callable[..., Any]:
    """What a button of the page runs."""
    (found,) = [function.fn for function in page.fns.values() if function.fn and function.fn.__name__ == name]
    return found


@pytest.fixture(autouse=True)
def step_by_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One batch a step, and Gradio's files in a folder of the test."""
    monkeypatch.setattr(demo.measure.label_file, "SLICE_SECONDS", 0.0)
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "files"))


@pytest.fixture
def page(stage: Stage) -> gr.Blocks:
    return make_page(stage)


@pytest.fixture
def score(page: gr.Blocks, tmp_path: Path) -> Score:
    """The endpoint's function, without HTTP."""

    def send(path: Path, text_columns: str = "", label_column: str = "", *, adapter: str = "") -> tuple[Any, Path]:
        copy = shutil.copy(path, tmp_path / "files" / path.name)  # the endpoint deletes what it was sent
        summary, written = handler(page, "score_file")(str(copy), text_columns, label_column, adapter, "", "")
        assert not Path(copy).exists()
        return summary, Path(written)

    (tmp_path / "files").mkdir()
    return send


def run(stage: Stage, upload: Upload) -> Scored:
    """The result of a file that is labelled to its end."""
    *_, last = label_upload(stage, stage.default(), upload, cancelled=threading.Event())
    assert last.result is not None
    return last.result


def files_in(folder: Path) -> list[str]:
    """Names of what visitors brought and took; Gradio's own empty files aside."""
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


def check_answers(kind: str, score: Score, adapter: Path, base_model: Path, folder: Path) -> None:
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


def test_both_engines_give_pefts_answers_in_the_callers_order(
    score: Score, adapter: Folders, base_model: Folders, tmp_path: Path
) -> None:
    check_answers("bert", score, adapter("bert"), base_model("bert"), tmp_path)


def test_without_pytorch_onnx_runtime_labels_alone(adapter: Folders, bundle: Folders, tmp_path: Path) -> None:
    stage = Stage(choose_adapters([adapter("bert")]), bundles=[bundle("bert")], has_pytorch=False, threads=1)
    try:
        source = write_rows(tmp_path / "in.csv", shuffled_pairs(9, seed=5))
        shown = results_html(run(stage, read_upload(source, MRPC)))
        summary, written = handler(make_page(stage), "score_file")(str(source), *[""] * 5)
    finally:
        stage.close()
    assert {"disagreements", "pytorch", "pytorch_mode"}.isdisjoint(summary)
    assert summary["onnx"]["scores"] is None
    assert list(read_rows(Path(written))[0]) == [*MRPC.text_columns, "prediction_onnx", "probability_onnx"]
    assert "PyTorch" not in shown
    assert "The file has no column &#39;label&#39;, so nothing is scored." in shown
    assert not re.search("engine|differ|Note", shown)


class NoNumbers:
    """An engine as `Engine` is, whose numbers overflowed."""

    name = "half"

    def logits(self, arrays: dict[str, np.ndarray]) -> np.ndarray:
        return np.full((len(arrays["input_ids"]), 2), np.nan, np.float32)


def test_logits_that_are_no_numbers_become_no_label(stage: Stage) -> None:
    opened = replace(stage.open(Setup("bert")), onnx=NoNumbers())  # type: ignore[arg-type]
    with pytest.raises(EngineError, match="The half engine gave logits that are no numbers"):
        demo.measure.label_file._finite_logits(opened, "onnx", opened.tokenize([("word1", "word2")]).arrays)


def test_every_column_comes_back_in_the_format_it_came_in(score: Score, tmp_path: Path) -> None:
    """In any case of the ending; other formats are in tests/export/test_score.py."""
    notes = ["Ünïcödé 東京 🙂", 'says "no",\nand leaves', "null", "", "\u2028"]
    rows: Rows = [row | {"note": note} for row, note in zip(shuffled_pairs(5, seed=6), notes, strict=True)]
    _, path = score(write_rows(tmp_path / "in.csv", rows).rename(tmp_path / "in.CSV"))
    written = read_rows(path)
    assert path.suffix == ".csv"
    assert [list(row) for row in written] == [[*row, *ADDED] for row in rows]
    assert [{name: row[name] for name in rows[0]} for row in written] == rows
    assert {row["agree"] for row in written} == {"true"}
    assert all(float(row["probability_onnx"]) >= 0.5 for row in written)


FORMULAS = {
    **{cell: f"'{cell}" for cell in ("=1+1", "@SUM(A1)", "+49 170 1234", "-2+3", "\t=1", "\r=1", "-", "-٣", "-3\n")},
    **{cell: cell for cell in ("-3.5", "+7", "-1e-05", "-.5", "1=1", " =1", "")},
}
"""Cells as they come → as they leave."""


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_in_csv_no_cell_is_a_formula_and_numbers_stay(suffix: str, stage: Stage, tmp_path: Path) -> None:
    rows: Rows = [row | {"=x": cell} for row, cell in zip(make_pairs(len(FORMULAS), seed=7), FORMULAS, strict=True)]
    rows[0]["sentence1"] = "=word1"
    upload = read_upload(write_rows(tmp_path / f"in{suffix}", rows), MRPC)
    path = write_labelled(run(stage, upload), tmp_path)
    if suffix != ".csv":
        assert [row["=x"] for row in read_rows(path)] == list(FORMULAS)
        return
    with path.open(newline="", encoding="utf-8") as stream:
        head, *cells = csv.reader(stream)
    assert head == [*[*rows[0]][:-1], "'=x", *ADDED]
    assert [row[head.index("'=x")] for row in cells] == list(FORMULAS.values())
    assert cells[0][0] == "'=word1"


def test_columns_may_have_other_names(score: Score, tmp_path: Path) -> None:
    pairs: Rows = make_pairs(8, seed=8)
    rows = [{"b": p["sentence2"], "a": p["sentence1"], "gold": LABELS[p["label"]], "label": "?"} for p in pairs]
    source, plain = write_rows(tmp_path / "in.parquet", rows), write_rows(tmp_path / "plain.jsonl", pairs)
    named, path = score(source, " a , b ", "gold")
    expected, same = score(plain)
    assert named["onnx"] == expected["onnx"]
    assert [row["prediction_onnx"] for row in read_rows(path)] == [row["prediction_onnx"] for row in read_rows(same)]


PAIR = "sentence1,sentence2,label\nword1,word2,1\n"


def parquet_bytes(table: pyarrow.Table, **options: Any) -> bytes:
    out = pyarrow.BufferOutputStream()
    parquet.write_table(table, out, **options)
    return out.getvalue().to_pybytes()


def pairs_table(n: int, **columns: Any) -> pyarrow.Table:
    return pyarrow.table({"sentence1": ["word1"] * n, "sentence2": ["word2"] * n} | columns)


REFUSED: list[tuple[str, Callable[[], bytes], str]] = [
    ("in", lambda: b"x", "in: give a file that ends in"),
    ("in.csv", lambda: b"", r"in\.csv is empty"),
    ("in.parquet", lambda: parquet_bytes(pairs_table(1).slice(0, 0)), r"in\.parquet has no rows"),
    ("in.csv", lambda: b"x" * (MAX_BYTES + 1), r"in\.csv has 5,000,001 bytes; at most 5,000,000 are taken"),
    ("in.csv", (PAIR + "a,b,1\n" * MAX_ROWS).encode, r"in\.csv has more than 2,000 rows"),
    ("in.jsonl", lambda: b'{"sentence1": "a"}\n' * (MAX_ROWS + 1), r"in\.jsonl has more than 2,000 rows"),
    ("in.parquet", lambda: parquet_bytes(pairs_table(MAX_ROWS + 1)), r"in\.parquet has more than 2,000 rows"),
    ("in.csv", lambda: parquet_bytes(pairs_table(1)), r"in\.csv, line 1, byte \d+ of the file is not UTF-8 text"),
    ("in.jsonl", PAIR.encode, r"in\.jsonl, line 1 is no JSON"),
    ("in.csv", lambda: b"sentence1,text\na,b\n", r"no column 'sentence2'; it has sentence1, text\. Name its own"),
    ("in.jsonl", lambda: b'{"sentence1": "a"}\n{"sentence2": "b"}\n', r"row 1 \(line 1\): column 'sentence2' holds no"),
    ("in.parquet", lambda: parquet_bytes(pairs_table(2, sentence2=["a", None])), "row 2: column 'sentence2' holds no"),
    (
        "in.csv",
        f"sentence1,sentence2\na,{'x' * (MAX_CHARACTERS + 1)}\n".encode,
        r"in\.csv, row 1 \(line 2\): column 'sentence2' has 10,001 characters; at most 10,000 are read",
    ),
    ("in.csv", (PAIR + "a,b,\n").encode, "row 2 .*label ''.*or rename the column to leave labels unread"),
    ("in.csv", lambda: b"sentence1,sentence2,agree\na,b,c\n", "has a column 'agree' already, and one of that name"),
    ("in.jsonl", lambda: b'{"sentence1": "a", "sentence2": "b", "probability_onnx": 1}\n', "column 'probability_onnx'"),
]
"""The page's own limits and words; what every reader of labelled files refuses is in tests/train/test_data.py."""


@pytest.mark.parametrize(("name", "content", "words"), REFUSED)
def test_what_cannot_be_used_is_named_without_its_folder(
    name: str, content: Callable[[], bytes], words: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content())
    with pytest.raises(DataError, match=words) as refusal:
        read_upload(tmp_path / name, MRPC)
    message = str(refusal.value)
    assert message.startswith(name)
    assert str(tmp_path) not in message
    assert len(message) < 700


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"text_columns": "sentence1"}, UsageError, r"1 text columns are named \(sentence1\); this model was trained"),
        ({"text_columns": "a,b,c"}, UsageError, "3 text columns are named"),
        ({"text_columns": "sentence1, nowhere"}, DataError, r"in\.csv has no column 'nowhere'"),
        ({"label_column": "gold"}, DataError, r"in\.csv has no column 'gold'; it has sentence1, sentence2, label"),
        ({"label_column": "sentence1"}, DataError, "label 'word1' in column 'sentence1' is none of"),
    ],
)
def test_columns_that_do_not_fit_are_refused(
    arguments: dict[str, str], error: type[PromptfoldError], words: str, tmp_path: Path
) -> None:
    (tmp_path / "in.csv").write_text(PAIR)
    with pytest.raises(error, match=words):
        read_upload(tmp_path / "in.csv", MRPC, **arguments)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No file was given"):
        read_upload(None, MRPC)
    with pytest.raises(DataError, match=r"^gone\.csv is no longer here\. Upload it again\."):
        read_upload(tmp_path / "gone.csv", MRPC)


LONG = "0" * 500_000
ONE_LIST = pyarrow.ListArray.from_arrays(pyarrow.array([0, 3_000_000]), pyarrow.nulls(3_000_000, pyarrow.int8()))
TOO_LONG = "is more than 20,000,000 bytes long"


@pytest.mark.parametrize(
    ("column", "options", "words"),
    [
        ([LONG] * 200, {"use_dictionary": False, "compression": "zstd"}, f"says that it {TOO_LONG}"),
        ([LONG] * 200, {"dictionary_pagesize_limit": 10**8}, TOO_LONG),
        (pyarrow.DictionaryArray.from_arrays([0] * 200, [LONG]), {"dictionary_pagesize_limit": 10**8}, TOO_LONG),
        (ONE_LIST, {}, "has more than 2,000,000 values"),
    ],
    ids=["plain", "dictionary", "dictionary kept by Arrow", "lists"],
)
def test_a_small_parquet_file_cannot_become_a_large_one(
    column: Any, options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "in.parquet"
    parquet.write_table(pairs_table(len(column), x=column), path, **options)
    assert path.stat().st_size < 1_000_000
    with pytest.raises(DataError, match=rf"in\.parquet .*{words}"):
        read_upload(path, MRPC)


def test_the_largest_file_that_is_allowed_is_read(tmp_path: Path) -> None:
    rows: Rows = [{"sentence1": "x" * 1200, "sentence2": "y" * 1200, "kind": f"k{n % 1500}"} for n in range(MAX_ROWS)]
    table = pyarrow.Table.from_pylist(rows)
    table = table.set_column(2, "kind", table["kind"].dictionary_encode())
    path = tmp_path / "in.parquet"
    parquet.write_table(table, path)
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
    pytorch, onnx = (Classified.of(LABELS, np.eye(2)[list(p)], np.zeros(6, bool)) for p in predictions.values())
    scored = Scored(upload, Setup("bert"), onnx, pytorch, POSITIONS - VIRTUAL_TOKENS)
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
        metrics = [f"{100 * metric(expected, predicted):.1f}" for metric in (accuracy_score, f1_score)]
        assert column(shown, "Against the file's labels", number) == [side, *metrics]


def test_at_most_fifty_rows_are_shown_and_every_text_is_only_text(tmp_path: Path) -> None:
    n = MAX_PREVIEW_ROWS + 10
    rows: Rows = [row | {"sentence1": f"<img src=x onerror=alert({row['idx']})>"} for row in make_pairs(n, seed=10)]
    rows[0]["sentence2"] = "y" * 5000
    upload = read_upload(write_rows(tmp_path / "in.jsonl", rows), MRPC)
    answers = Classified.of(LABELS, np.eye(2)[[0] * n], np.arange(n) < 3)
    shown = results_html(Scored(upload, Setup("bert"), answers, answers, POSITIONS - VIRTUAL_TOKENS))
    assert "<img" not in shown
    assert len(column(shown, "50 of 60 rows", 0)) == 1 + MAX_PREVIEW_ROWS
    assert "y" * 160 + " …" in shown
    assert "y" * 161 not in shown
    assert f"3 texts are longer than the {POSITIONS - VIRTUAL_TOKENS} tokens that the model reads" in shown
    assert "Both engines give the same label to each of the 60 rows." in shown


def test_many_labels_have_no_matrix_on_the_page(tmp_path: Path) -> None:
    task = custom_task(("said",), "gold", [f"<{n}>" for n in range(30)])
    rows: Rows = [{"said": "word1", "gold": "<3>"}]
    upload = read_upload(write_rows(tmp_path / "in.csv", rows), task)
    answers = Classified.of(task.labels, np.eye(30)[[3]], np.zeros(1, bool))
    scored = Scored(upload, Setup("bert"), answers, None, 10)
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
    assert [(step.engine, step.done, step.fraction) for step in seen] == [
        ("ONNX Runtime", 8, 0.25),
        ("ONNX Runtime", 16, 0.5),
        ("PyTorch", 8, 0.75),
        ("PyTorch", 16, 1.0),
        ("PyTorch", 16, 1.0),
    ]


def test_a_visitor_who_waits_for_the_engines_gets_them_before_the_file_is_done(stage: Stage, tmp_path: Path) -> None:
    upload = read_upload(write_rows(tmp_path / "in.csv", shuffled_pairs(40 * BATCH_ROWS, seed=12)), MRPC)
    fractions = [0.0]
    got: list[float] = []

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


def prepare(page: gr.Blocks, source: Path, precision: str = "fp32") -> tuple[dict[int, Any], int]:
    """A visitor's first file; the jobs and its number."""
    jobs, number, start, cancel, status, results, download = handler(page, "prepare")(
        {}, 0, "bert", precision, "eager", str(source), "", ""
    )
    assert (start.interactive, cancel.interactive, results, download.interactive) == (False, True, "", False)
    assert f"{source.name}: waiting for a turn" in status
    return jobs, number


STATUS = 3
"""Its place among what the run of a file gives to the page."""


def test_the_tab_counts_rows_shows_results_and_deletes_the_upload(page: gr.Blocks, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.csv", make_pairs(12, seed=13))
    jobs, number = prepare(page, source)
    *steps, (start, cancel, file, status, results, download) = handler(page, "label")(jobs, number)
    assert (start.interactive, cancel.interactive, file) == (True, False, None)
    counted = [re.search(r">([\w ]+: \d+) of 12 rows labelled", step[STATUS]) for step in steps]
    expected = ["ONNX Runtime: 8", "ONNX Runtime: 12", "PyTorch: 8", "PyTorch: 12"]
    assert [found[1] for found in counted if found] == expected
    assert "Done: 12 rows of in.csv labelled." in status
    assert "Confusion matrix, PyTorch" in results
    written = Path(download.value["path"])
    assert (written.name, len(read_rows(written))) == ("in-labelled.csv", 12)
    assert written.is_relative_to(tmp_path / "files")
    assert not source.exists()
    assert jobs == {}


def test_cancelling_ends_between_two_batches_and_keeps_nothing(page: gr.Blocks, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.csv", make_pairs(40, seed=14))
    jobs, number = prepare(page, source)
    steps = handler(page, "label")(jobs, number)
    assert "8 of 40 rows" in next(steps)[STATUS]
    assert handler(page, "_cancel")(jobs, number)[1].interactive is False
    ((start, cancel, file, status, *_),) = steps
    assert (file, start.interactive, cancel.interactive) == (None, True, False)
    assert "Cancelled. Nothing was kept." in status
    assert not source.exists()
    assert jobs == {}
    assert files_in(tmp_path / "files") == []


def test_a_file_that_is_cancelled_while_it_waits_is_not_labelled_when_its_turn_comes(
    page: gr.Blocks, tmp_path: Path
) -> None:
    source = write_rows(tmp_path / "in.csv", make_pairs(40, seed=14))
    jobs, number = prepare(page, source)
    start, cancel, file, status = handler(page, "_cancel")(jobs, number)
    assert (file, start.interactive, cancel.interactive) == (None, True, False)
    assert "Cancelled. Nothing was kept." in status
    assert not source.exists()
    # Nothing of the page changes then, and what the visitor asked for since goes its way.
    write_rows(source, make_pairs(4, seed=14))
    jobs, second, *_ = handler(page, "prepare")(jobs, number, "bert", "fp32", "eager", str(source), "", "")
    assert list(handler(page, "label")(jobs, number)) == [[gr.skip()] * 6]
    assert "Done: 4 rows" in list(handler(page, "label")(jobs, second))[-1][STATUS]
    assert handler(page, "_cancel")(jobs, second) == [gr.skip()] * 4


def test_a_visitor_who_leaves_leaves_no_file(page: gr.Blocks, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.csv", make_pairs(40, seed=15))
    jobs, number = prepare(page, source)
    steps = handler(page, "label")(jobs, number)
    next(steps)
    steps.close()  # as Gradio does
    assert not source.exists()
    assert jobs == {}


def test_an_engine_that_cannot_be_started_is_told_and_the_upload_deleted(page: gr.Blocks, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.csv", make_pairs(4, seed=16))
    jobs, number = prepare(page, source, precision="int8")
    ((start, cancel, file, status, *_),) = handler(page, "label")(jobs, number)
    assert (file, start.interactive, cancel.interactive) == (None, True, False)
    assert "no int8 graph" in status
    assert not source.exists()


def test_a_refused_file_leaves_the_page_as_it_was(page: gr.Blocks, tmp_path: Path) -> None:
    source = tmp_path / "<b>.csv"
    source.write_text("sentence1\nword1\n")
    *same, status, results, download = handler(page, "prepare")({}, 0, "bert", "fp32", "eager", str(source), "", "")
    assert [*same, results, download] == [gr.skip()] * 6
    assert "&lt;b&gt;.csv has no column" in status
    assert source.exists()  # another name of a column may do
