"""The tab that labels a file: what is read and refused, what both engines say, what is written, and the endpoint."""

import asyncio
import csv
import html
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
import httpx
import numpy as np
import pyarrow
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from playwright.sync_api import Page, expect, sync_playwright
from pyarrow import parquet
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

import demo.measure.label_file
from demo.access.limits import MAX_BYTES
from demo.engines.adapters import choose_adapters
from demo.engines.pytorch import COMPILED
from demo.engines.stage import Setup, Stage
from demo.measure.label_file import BATCH_ROWS, MAX_PREVIEW_ROWS, Progress, Scored, label_upload, write_labelled
from demo.measure.upload import MAX_ROWS, Upload, read_upload
from demo.page.controls import Selectors
from demo.page.tab_score import _results, build_score_tab
from export.runtime.batches import Classified
from export.runtime.check_text import MAX_CHARACTERS
from tests.conftest import ON_CPU, POSITIONS, ROOT, VIRTUAL_TOKENS, make_pairs
from tests.export.test_score import golden_probabilities, read_rows, shuffled_pairs, write_rows
from train.common.errors import DataError, EngineError, PromptfoldError, UsageError
from train.data.tasks import MRPC, custom_task

Folders = Callable[[str], Path]
Rows = list[dict[str, Any]]

KINDS = ("bert", "gpt2")
LABELS = MRPC.labels
ADDED = ["prediction_pytorch", "probability_pytorch", "prediction_onnx", "probability_onnx", "agree"]


@pytest.fixture(scope="module")
def stage(adapter: Folders, bundle: Folders) -> Iterator[Stage]:
    """A tiny encoder and a tiny decoder, each on both engines."""
    stage = Stage(choose_adapters(list(map(adapter, KINDS))), bundles=list(map(bundle, KINDS)), threads=1)
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


def serve_page(adapters: list[str], bundles: list[str]) -> None:
    """A page with this tab alone, as a process of its own: Gradio leaves sockets open where it has served."""
    from demo.page.app import page_style

    stage = Stage(choose_adapters(list(map(Path, adapters))), bundles=list(map(Path, bundles)), threads=1)
    page = make_page(stage)
    page.queue()
    style = page_style()  # Gradio's own fetches fonts
    page.launch(prevent_thread_lock=True, quiet=True, ssr_mode=False, theme=style.theme, css=style.css)
    print(f"ready {page.local_url}", flush=True)
    sys.stdin.read()  # until the tests are done
    stage.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where Gradio keeps what visitors bring and take."""
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def url(adapter: Folders, bundle: Folders, served: Path) -> Iterator[str]:
    """The address of a page with the tiny encoder and the tiny decoder."""
    folders = [[str(make(kind)) for kind in KINDS] for make in (adapter, bundle)]
    code = f"from tests.demo.test_scorefile import serve_page; serve_page(*{folders!r})"
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | ON_CPU | {"GRADIO_TEMP_DIR": str(served)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        printed = []
        for line in process.stdout:
            printed.append(line)
            if line.startswith("ready "):
                yield line.split()[1]
                break
        rest, _ = process.communicate(timeout=60)
        printed.append(rest)
    assert process.returncode == 0
    # Gradio prints what it refuses; nothing of ours may be on the way there.
    assert str(ROOT / "demo") not in "".join(printed), "".join(printed)


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[Client]:
    """A visitor's program."""
    client = Client(url, verbose=False)
    yield client
    client.close()


def score(client: Client, path: Path, *rest: str, **named: str) -> tuple[dict[str, Any], Path]:
    """What the endpoint answers to a file."""
    summary, labelled = client.predict(handle_file(str(path)), *rest, **named, api_name="/score_file")
    return summary, Path(labelled)


def run(stage: Stage, upload: Upload, setup: Setup | None = None) -> Scored:
    """The result of a file that is labelled to its end."""
    *_, last = label_upload(stage, setup or stage.default(), upload, cancelled=threading.Event())
    assert last.result is not None
    return last.result


def files_in(folder: Path) -> list[str]:
    """Names of what visitors brought and took; Gradio's own empty files aside."""
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


# What both engines say.


@pytest.mark.parametrize("kind", KINDS)
def test_both_engines_give_pefts_answers_in_the_callers_order(
    kind: str, client: Client, served: Path, adapter: Folders, base_model: Folders, tmp_path: Path
) -> None:
    generator = np.random.default_rng(4)
    rows = [row | {"label": int(generator.integers(2)), "n": n} for n, row in enumerate(shuffled_pairs(37, seed=4))]
    source = write_rows(tmp_path / "a file.jsonl", rows)
    before = files_in(served)
    summary, path = score(client, source, adapter=kind)
    assert path.name == "a file-labelled.jsonl"
    assert files_in(served) == sorted([*before, path.name])  # the upload is gone
    written = read_rows(path)
    assert [list(row) for row in written] == [[*row, *ADDED] for row in rows]
    assert [{name: row[name] for name in rows[0]} for row in written] == rows

    texts = [(row["sentence1"], row["sentence2"]) for row in rows]
    golden = golden_probabilities(texts, adapter(kind), base_model(kind))
    assert np.ptp(golden[:, 0]) > 0.01  # or any order would do
    predicted = golden.argmax(axis=1)
    expected = [row["label"] for row in rows]
    assert json.loads(json.dumps(summary)) == summary
    assert (summary["file"], summary["adapter"], summary["precision"]) == ("a file.jsonl", kind, "fp32")
    assert (summary["rows"], summary["texts_cut"], summary["disagreements"]) == (37, 1, 0)
    assert (summary["labels"], summary["pytorch_mode"]) == (list(LABELS), "eager")
    for side in ("pytorch", "onnx"):
        assert [row[f"prediction_{side}"] for row in written] == [LABELS[index] for index in predicted]
        probabilities = np.array([row[f"probability_{side}"] for row in written])
        assert np.abs(probabilities - golden.max(axis=1)).max() < 1e-5
        assert summary[side]["counts"] == {LABELS[index]: int((predicted == index).sum()) for index in range(2)}
        assert summary[side]["confusion"] == confusion_matrix(expected, predicted, labels=[0, 1]).tolist()
        assert summary[side]["scores"] == pytest.approx(
            {"accuracy": accuracy_score(expected, predicted), "f1": f1_score(expected, predicted)}
        )
    assert all(row["agree"] is True for row in written)


def test_without_pytorch_onnx_runtime_labels_alone(
    adapter: Folders, bundle: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Stage(choose_adapters([adapter("bert")]), bundles=[bundle("bert")], has_pytorch=False, threads=1)
    try:
        source = write_rows(tmp_path / "in.csv", shuffled_pairs(9, seed=5))
        shown = _results(run(stage, read_upload(source, MRPC)))
        monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "files"))
        summary, written = handler(make_page(stage), "score_file")(str(source), *[""] * 5)
    finally:
        stage.close()
    assert {"disagreements", "pytorch", "pytorch_mode"}.isdisjoint(summary)
    assert summary["onnx"]["scores"] is None
    assert list(read_rows(Path(written))[0]) == [*MRPC.text_columns, "prediction_onnx", "probability_onnx"]
    assert "PyTorch" not in shown
    assert "The file has no column &#x27;label&#x27;, so nothing is scored." in shown
    assert not re.search("engine|differ|Note", shown)


def test_a_decoder_and_torch_compile_get_one_text_at_a_time_and_encoders_batches(stage: Stage) -> None:
    for kind, rows in (("gpt2", 1), ("bert", BATCH_ROWS)):
        opened = stage.open(Setup(kind))
        assert demo.measure.label_file._batch_rows(opened, "pytorch") == rows
        assert demo.measure.label_file._batch_rows(opened, "onnx") == BATCH_ROWS
        compiled = replace(opened, setup=replace(opened.setup, pytorch=COMPILED))
        assert demo.measure.label_file._batch_rows(compiled, "pytorch") == 1


class NoNumbers:
    """An engine as `Engine` is, whose numbers overflowed."""

    name = "half"

    def logits(self, arrays: dict[str, np.ndarray]) -> np.ndarray:
        return np.full((len(arrays["input_ids"]), 2), np.nan, np.float32)


def test_logits_that_are_no_numbers_become_no_label(stage: Stage) -> None:
    opened = replace(stage.open(Setup("bert")), onnx=NoNumbers())  # type: ignore[arg-type]
    with pytest.raises(EngineError, match="The half engine gave logits that are no numbers"):
        demo.measure.label_file._finite_logits(opened, "onnx", opened.tokenize([("word1", "word2")]).arrays)


# Formats.


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet", ".CSV"])
def test_every_column_comes_back_in_the_format_it_came_in(suffix: str, client: Client, tmp_path: Path) -> None:
    extra = [("Ünïcödé 東京 🙂", 1), ('says "no",\nand leaves', 2), ("null", 3), ("", 4), ("\u2028", 5)]
    rows: Rows = [row | {"note": note, "n": n} for row, (note, n) in zip(shuffled_pairs(5, seed=6), extra, strict=True)]
    if suffix not in {".csv", ".CSV"}:
        rows[2] |= {"note": None}
    source = write_rows(tmp_path / f"in{suffix.lower()}", rows).rename(tmp_path / f"in{suffix}")
    _, path = score(client, source, adapter="bert")
    assert path.suffix == suffix.lower()
    written = read_rows(path)
    assert list(written[0]) == [*rows[0], *ADDED]
    as_text = suffix.lower() == ".csv"
    expected = [{name: str(value) if as_text else value for name, value in row.items()} for row in rows]
    assert [{name: row[name] for name in rows[0]} for row in written] == expected
    assert {row["agree"] for row in written} == {"true" if as_text else True}
    assert {float(row["probability_onnx"]) >= 0.5 for row in written} == {True}
    if suffix == ".parquet":
        before, after = parquet.read_schema(source), parquet.read_schema(path)
        assert [after.field(name) for name in before.names] == list(before)


FORMULAS = {
    "=1+1": "'=1+1",
    "@SUM(A1)": "'@SUM(A1)",
    "+49 170 1234": "'+49 170 1234",
    "-2+3": "'-2+3",
    "\t=1": "'\t=1",
    "\r=1": "'\r=1",
    "-3.5": "-3.5",
    "+7": "+7",
    "-1e-05": "-1e-05",
    "-.5": "-.5",
    "-": "'-",
    "-٣": "'-٣",
    "1=1": "1=1",
    " =1": " =1",
    "": "",
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


def test_columns_may_have_other_names(client: Client, tmp_path: Path) -> None:
    rows: Rows = [
        {"b": row["sentence2"], "a": row["sentence1"], "gold": LABELS[int(str(row["label"]))], "label": "?"}
        for row in make_pairs(8, seed=8)
    ]
    source = write_rows(tmp_path / "in.parquet", rows)
    plain = write_rows(tmp_path / "plain.jsonl", make_pairs(8, seed=8))
    named, path = score(client, source, text_columns=" a , b ", label_column="gold")
    expected, same = score(client, plain, "", "")
    assert named["onnx"] == expected["onnx"]
    assert [row["prediction_onnx"] for row in read_rows(path)] == [row["prediction_onnx"] for row in read_rows(same)]


# What is refused.

PAIR = "sentence1,sentence2,label\nword1,word2,1\n"
LONG = "x" * (MAX_CHARACTERS + 1)


def parquet_bytes(table: pyarrow.Table, **options: Any) -> bytes:
    out = pyarrow.BufferOutputStream()
    parquet.write_table(table, out, **options)
    return out.getvalue().to_pybytes()


def pairs_table(n: int, **columns: Any) -> pyarrow.Table:
    return pyarrow.table({"sentence1": ["word1"] * n, "sentence2": ["word2"] * n} | columns)


def png() -> bytes:
    return (ROOT / "demo" / "bench.png").read_bytes()[:1000]


REFUSED: list[tuple[str, Callable[[], bytes], str]] = [
    ("in.txt", lambda: b"x", r"in\.txt: give a file that ends in \.csv, \.jsonl, \.parquet"),
    ("in", lambda: b"x", "in: give a file that ends in"),
    ("in.csv", lambda: b"", r"in\.csv is empty"),
    ("in.csv", lambda: b"sentence1,sentence2\n", r"in\.csv has no rows"),
    ("in.jsonl", lambda: b"\n\n", r"in\.jsonl has no rows"),
    ("in.parquet", lambda: parquet_bytes(pairs_table(1).slice(0, 0)), r"in\.parquet has no rows"),
    ("in.csv", lambda: b"x" * (MAX_BYTES + 1), r"in\.csv has 5,000,001 bytes; at most 5,000,000 are taken"),
    ("in.csv", (PAIR + "a,b,1\n" * MAX_ROWS).encode, r"in\.csv has more than 2,000 rows"),
    ("in.jsonl", lambda: b'{"sentence1": "a"}\n' * (MAX_ROWS + 1), r"in\.jsonl has more than 2,000 rows"),
    ("in.parquet", lambda: parquet_bytes(pairs_table(MAX_ROWS + 1)), r"in\.parquet has more than 2,000 rows"),
    ("in.csv", png, r"in\.csv, byte \d+ is zero, as in no text\. Is it really a \.csv file"),
    ("in.csv", lambda: PAIR.encode("utf-16"), r"in\.csv, byte \d+ is zero"),
    ("in.csv", lambda: PAIR.encode() + b"na\xefve,b,1\n", r"in\.csv, line 3, byte 43 of the file is not valid UTF-8"),
    ("in.jsonl", lambda: b'{"sentence1": "\xff"}', r"in\.jsonl, line 1, byte 16 of the file is not valid UTF-8"),
    ("in.parquet", PAIR.encode, r"in\.parquet is no Parquet file, whatever its name says"),
    ("in.parquet", lambda: b"PAR1 and no more", r"in\.parquet cannot be read as parquet \("),
    ("in.csv", lambda: parquet_bytes(pairs_table(1)), r"in\.csv, byte \d+ is zero"),
    ("in.jsonl", PAIR.encode, r"in\.jsonl, line 1 is no JSON"),
    ("in.jsonl", lambda: b'["a"]\n', r"in\.jsonl, line 1 holds no JSON object"),
    ("in.jsonl", lambda: b'{"sentence1": "\\ud83d", "sentence2": "b"}\n', "line 1 holds half a surrogate pair"),
    ("in.csv", lambda: b"\n", r"in\.csv: the first line names no columns"),
    ("in.csv", lambda: b"a,a\n1,2\n", "names the column 'a' twice"),
    ("in.csv", (PAIR + "a,b\n").encode, r"in\.csv, row 2 \(line 3\) has 2 cells"),
    ("in.csv", (PAIR + '"a,b,1\n').encode, r"in\.csv, line 3 cannot be read as csv"),
    (
        "in.csv",
        lambda: b"sentence1,text\na,b\n",
        r"in\.csv has no column 'sentence2'; it has 'sentence1', 'text'\. Name its own",
    ),
    ("in.parquet", lambda: parquet_bytes(pyarrow.table({"a": ["b"]})), "no column 'sentence1'; it has 'a'"),
    ("in.csv", (PAIR + "a, ,1\n").encode, r"in\.csv, row 2 \(line 3\): column 'sentence2' holds no text"),
    ("in.jsonl", lambda: b'{"sentence1": "a"}\n{"sentence2": "b"}\n', r"row 2 \(line 2\): column 'sentence1' holds no"),
    ("in.jsonl", lambda: b'{"sentence1": 1, "sentence2": "b"}\n', "column 'sentence1' holds no text"),
    ("in.parquet", lambda: parquet_bytes(pairs_table(2, sentence2=["a", None])), "row 2: column 'sentence2' holds no"),
    (
        "in.csv",
        f"sentence1,sentence2\na,{LONG}\n".encode,
        r"in\.csv, row 1 \(line 2\): column 'sentence2' has 10,001 characters; at most 10,000 are read",
    ),
    (
        "in.csv",
        (PAIR + "a,b,maybe\n").encode,
        r"in\.csv, row 2 \(line 3\): label 'maybe' in column 'label' is none of task mrpc's \(0 or 'not_equivalent'",
    ),
    ("in.csv", (PAIR + "a,b,\n").encode, "row 2 .*label ''.*or rename the column to leave labels unread"),
    ("in.csv", f"sentence1,sentence2,label\na,b,{LONG}\n".encode, "label 'x{79} in column"),
    (
        "in.csv",
        lambda: b"sentence1,sentence2,agree\na,b,c\n",
        r"in\.csv has a column 'agree' already, and one of that name would be added",
    ),
    ("in.jsonl", lambda: b'{"sentence1": "a", "sentence2": "b", "probability_onnx": 1}\n', "column 'probability_onnx'"),
    ("in.csv", ("c," * 500_000 + "d\n1").encode, "names the column 'c' twice"),
    ("in.csv", lambda: ",".join(f"c{n}" for n in range(300_000)).encode() + b"\n1\n", "row 1 .*has 1 cells"),
    ("in.jsonl", lambda: json.dumps({f"{n}" * 50: 1 for n in range(9999)}).encode(), "no column 'sentence1'; it has"),
]


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
        ({"text_columns": "sentence1"}, UsageError, r"1 text columns are named, but this model reads 2 \(sentence1, "),
        ({"text_columns": "a,b,c"}, UsageError, "3 text columns are named"),
        ({"text_columns": "sentence1, nowhere"}, DataError, r"in\.csv has no column 'nowhere'"),
        (
            {"label_column": "gold"},
            DataError,
            r"in\.csv has no column 'gold'; it has 'sentence1', 'sentence2', 'label'",
        ),
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


def lists(n: int) -> pyarrow.Array:
    return pyarrow.ListArray.from_arrays(pyarrow.array([0, n]), pyarrow.nulls(n, pyarrow.int64()))


BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "plain": (
        lambda: parquet_bytes(pairs_table(500, x=["0" * 100_000] * 500), use_dictionary=False, compression="zstd"),
        "says that it is more than 20,000,000 bytes long",
    ),
    "dictionary": (
        lambda: parquet_bytes(pairs_table(200, x=["0" * 500_000] * 200), dictionary_pagesize_limit=10**8),
        "is more than 20,000,000 bytes long",
    ),
    "dictionary kept by Arrow": (
        lambda: parquet_bytes(
            pairs_table(200, x=pyarrow.array(["0" * 500_000] * 200).dictionary_encode()),
            dictionary_pagesize_limit=10**8,
        ),
        "is more than 20,000,000 bytes long",
    ),
    "lists": (lambda: parquet_bytes(pairs_table(1, x=lists(3_000_000))), "has more than 2,000,000 values"),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_small_parquet_file_cannot_become_a_large_one(kind: str, tmp_path: Path) -> None:
    content, words = BOMBS[kind]
    path = tmp_path / "in.parquet"
    path.write_bytes(content())
    assert path.stat().st_size < 1_000_000
    with pytest.raises(DataError, match=rf"in\.parquet .*{words}"):
        read_upload(path, MRPC)


def test_the_largest_file_that_is_allowed_is_read(tmp_path: Path) -> None:
    rows: Rows = [{"sentence1": "x" * 1200, "sentence2": "y" * 1200, "kind": f"k{n % 1500}"} for n in range(MAX_ROWS)]
    table = pyarrow.Table.from_pylist(rows)
    table = table.set_column(2, "kind", table["kind"].dictionary_encode())
    path = tmp_path / "in.parquet"
    parquet.write_table(table, path)
    assert len(read_upload(path, MRPC).texts) == MAX_ROWS
    rows[0]["sentence1"] = "x" * MAX_CHARACTERS
    assert len(read_upload(write_rows(tmp_path / "in.csv", rows), MRPC).texts[0][0]) == MAX_CHARACTERS


@pytest.mark.parametrize(
    ("rest", "words"),
    [
        ({}, r"^in\.csv, row 1 \(line 2\): column 'sentence2' holds no text"),
        ({"adapter": "none"}, "There is no adapter 'none' here"),
        ({"adapter": "gpt2", "precision": "int4"}, "There is no precision 'int4' here"),
        ({"text_columns": "a"}, "1 text columns are named"),
    ],
)
def test_the_endpoint_refuses_in_the_same_words(
    rest: dict[str, str], words: str, client: Client, tmp_path: Path
) -> None:
    (tmp_path / "in.csv").write_text("sentence1,sentence2\na,\n")
    with pytest.raises(AppError, match=words):
        score(client, tmp_path / "in.csv", **rest)


def test_the_endpoint_is_the_only_one_and_takes_uploads_alone(client: Client, url: str, tmp_path: Path) -> None:
    endpoints = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert list(endpoints) == ["/score_file"]
    names = [parameter["parameter_name"] for parameter in endpoints["/score_file"]["parameters"]]
    assert names == ["file", "text_columns", "label_column", "adapter", "precision", "pytorch"]
    with pytest.raises(AppError, match="No file was given"):
        client.predict(None, api_name="/score_file")
    # A path on the server is no upload, whoever names it; gradio_client would upload it.
    foreign = tmp_path / "foreign.csv"
    foreign.write_text(PAIR)
    with httpx.Client(base_url=url, timeout=60) as browser:
        for meta in ({"_type": "gradio.FileData"}, {}):
            named = {"path": str(foreign), "meta": meta}
            call = browser.post("/gradio_api/call/score_file", json={"data": [named, *[""] * 5]}).raise_for_status()
            answer = browser.get(f"/gradio_api/call/score_file/{call.json()['event_id']}").text
            assert answer.startswith("event: error")
    assert foreign.read_text() == PAIR


# What the tab shows.


def made_up(n: int, *, expected: tuple[int, ...] | None, pytorch: list[int], onnx: list[int], folder: Path) -> Scored:
    """A result with given answers."""
    upload = read_upload(write_rows(folder / "in.csv", shuffled_pairs(n, seed=9)), MRPC)

    def answers(indices: list[int]) -> Classified:
        return Classified.of(LABELS, np.eye(2)[indices], np.zeros(n, bool))

    upload = Upload(upload.name, upload.suffix, upload.rows, upload.task, expected, None)
    return Scored(upload, Setup("bert"), answers(onnx), answers(pytorch), POSITIONS - VIRTUAL_TOKENS)


def column(shown: str, title: str, number: int) -> list[str]:
    """The cells of a column of the table under a title, as a visitor reads them."""
    markup = re.search(rf"<h3>{re.escape(html.escape(title))}.*?</table>", shown, re.DOTALL)
    assert markup, title
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in markup[0].split("<tr>")[1:]]
    return [html.unescape(cells[number]) for cells in rows]


def test_disagreements_come_first_then_what_is_wrong(tmp_path: Path) -> None:
    scored = made_up(
        6, expected=(0, 0, 1, 1, 0, 1), pytorch=[0, 1, 1, 0, 0, 1], onnx=[0, 1, 1, 1, 1, 1], folder=tmp_path
    )
    assert scored.differs.tolist() == [False, False, False, True, True, False]
    assert scored.wrong.tolist() == [False, True, False, True, True, False]
    assert scored.as_json()["disagreements"] == 2
    assert [row["agree"] for row in read_rows(write_labelled(scored, tmp_path))] == [
        "true",
        "true",
        "true",
        "false",
        "false",
        "true",
    ]
    shown = _results(scored)
    assert "<b>The engines give different labels to 2 of 6 rows.</b>" in shown
    assert column(shown, "All 6 rows", 0) == ["Row", "4", "5", "2", "1", "3", "6"]
    notes = ["Note", "engines differ, wrong", "engines differ, wrong", "wrong", "", "", ""]
    assert column(shown, "All 6 rows", -1) == notes
    assert column(shown, "Rows by label", 3) == ["In the file", "3", "3"]
    for side, predicted in (("PyTorch", [0, 1, 1, 0, 0, 1]), ("ONNX Runtime", [0, 1, 1, 1, 1, 1])):
        matrix = confusion_matrix([0, 0, 1, 1, 0, 1], predicted)
        for number in range(2):
            cells = column(shown, f"Confusion matrix, {side}", number + 1)
            assert cells == [LABELS[number], *map(str, matrix[:, number])]
        counted = Counter(predicted)
        side_number = {"PyTorch": 1, "ONNX Runtime": 2}[side]
        assert column(shown, "Rows by label", side_number) == [side, str(counted[0]), str(counted[1])]
        accuracy, f1 = accuracy_score([0, 0, 1, 1, 0, 1], predicted), f1_score([0, 0, 1, 1, 0, 1], predicted)
        shown_scores = column(shown, "Against the file's labels", side_number)
        assert shown_scores == [side, f"{100 * accuracy:.1f}", f"{100 * f1:.1f}"]


def test_at_most_fifty_rows_are_shown_and_every_text_is_only_text(tmp_path: Path) -> None:
    n = MAX_PREVIEW_ROWS + 10
    rows: Rows = [row | {"sentence1": f"<img src=x onerror=alert({row['idx']})>"} for row in make_pairs(n, seed=10)]
    rows[0]["sentence2"] = "y" * 5000
    upload = read_upload(write_rows(tmp_path / "in.jsonl", rows), MRPC)
    answers = Classified.of(LABELS, np.eye(2)[[0] * n], np.arange(n) < 3)
    shown = _results(Scored(upload, Setup("bert"), answers, answers, POSITIONS - VIRTUAL_TOKENS))
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
    assert "The confusion matrices of 30 labels are in the answer of the endpoint alone" in _results(scored)
    assert np.sum(scored.as_json()["onnx"]["confusion"]) == 1
    assert scored.as_json()["onnx"]["scores"]["accuracy"] == 1


# How it runs.


def step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """One batch a step."""
    monkeypatch.setattr(demo.measure.label_file, "SLICE_SECONDS", 0.0)


def test_others_may_measure_between_two_batches_and_none_runs_beside_them(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step_by_step(monkeypatch)
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


def test_whoever_waits_for_the_engines_gets_them_before_the_file_is_done(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step_by_step(monkeypatch)
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


@pytest.fixture
def page(stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> gr.Blocks:
    """The tab, whose every step is one batch."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "files"))
    step_by_step(monkeypatch)
    return make_page(stage)


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
    counted = [re.search(r">([\w ]+): (\d+) of 12 rows labelled", step[STATUS]) for step in steps]
    assert [(found[1], found[2]) for found in counted if found] == [
        ("ONNX Runtime", "8"),
        ("ONNX Runtime", "12"),
        ("PyTorch", "8"),
        ("PyTorch", "12"),
    ]
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


# In a browser.

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def visit(url: str) -> Iterator[Page]:
    """The page on a phone."""
    with sync_playwright() as playwright:
        # Chromium's sandbox does not start for root, as whom containers run.
        flags = ["--disable-background-networking", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        page = browser.new_page(viewport={"width": 360, "height": 740})
        page.set_default_timeout(60_000)
        page.goto(url)
        # A file that comes before Gradio has bound its components, as only a program can bring it, is lost.
        page.get_by_role("button", name="Label the file").click()
        expect(page.get_by_role("alert")).to_contain_text("No file was given")
        yield page
        browser.close()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_visitor_on_a_phone_labels_a_file_and_cancels_another(visit: Page, served: Path, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "pairs.csv", shuffled_pairs(30, seed=17))
    long = write_rows(tmp_path / "long.jsonl", shuffled_pairs(MAX_ROWS, seed=18))
    before = files_in(served)
    start, cancel = (visit.get_by_role("button", name=name, exact=True) for name in ("Label the file", "Cancel"))
    take = visit.get_by_role("button", name="Download the labelled file")
    status = visit.get_by_role("status")
    expect(take).to_be_disabled()

    # Twice: the second time nothing may be left of the first.
    for _ in range(2):
        visit.locator("#score-file input[type=file]").set_input_files(source)
        expect(visit.locator("#score-file")).to_contain_text("pairs")
        start.click()
        expect(status).to_have_text("Done: 30 rows of pairs.csv labelled.")
        expect(visit.locator("#score-results")).to_contain_text("Both engines give the same label to each of the 30")
        expect(visit.locator("#score-file")).not_to_contain_text("pairs")
        with visit.expect_download() as download:
            take.click()
        assert download.value.suggested_filename == "pairs-labelled.csv"
        assert len(read_rows(download.value.path())) == 30
        expect(start).to_be_enabled()
    assert visit.evaluate("document.documentElement.scrollWidth") <= 360
    assert files_in(served) == sorted([*before, *["pairs-labelled.csv"] * 2])

    visit.get_by_label("Adapter").click()
    visit.get_by_role("option", name="gpt2").click()
    visit.locator("#score-file input[type=file]").set_input_files(long)
    expect(visit.locator("#score-file")).to_contain_text("long")
    start.click()
    expect(status).to_contain_text(re.compile("PyTorch: [0-9,]+ of 2,000 rows labelled"))
    cancel.click()
    expect(status).to_have_text("Cancelled. Nothing was kept.")
    expect(start).to_be_enabled()
    expect(cancel).to_be_disabled()
    expect(visit.locator("#score-results")).not_to_contain_text("rows")
    assert files_in(served) == sorted([*before, *["pairs-labelled.csv"] * 2])

    # The queue is free again, and what was cancelled says nothing more.
    visit.locator("#score-file input[type=file]").set_input_files(source)
    expect(visit.locator("#score-file")).to_contain_text("pairs")
    start.click()
    expect(status).to_have_text("Done: 30 rows of pairs.csv labelled.")

    # What is refused, is told; nothing of the results before is lost.
    (tmp_path / "bad.csv").write_text("sentence1\nword1\n")
    visit.locator("#score-file input[type=file]").set_input_files(tmp_path / "bad.csv")
    expect(visit.locator("#score-file")).to_contain_text("bad")
    start.click()
    expect(visit.get_by_role("alert")).to_contain_text("bad.csv has no column 'sentence2'; it has 'sentence1'")
    expect(visit.locator("#score-results")).to_contain_text("Both engines give the same label to each of the 30")
