"""The latency lab: which cells are taken, what is measured in each, and what the tab and the endpoint make of it."""

import asyncio
import csv
import io
import itertools
import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
import httpx
import numpy as np
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError

import demo.measure.sweep
from demo.engines.adapters import choose_adapters
from demo.engines.pytorch import PYTORCH_MODES
from demo.engines.stage import Stage
from demo.measure.sweep import (
    MAX_RUNS,
    MIN_RUNS,
    ONE_TEXT_ONLY,
    ROUNDS,
    Cell,
    Row,
    Sweep,
    Times,
    choose_cells,
    random_batch,
    sweep,
)
from demo.page.controls import Selectors
from demo.page.sweep_charts import charts_png, charts_svg
from demo.page.tab_lab import build_lab_tab
from export.bundle.folder import load_bundle
from tests.conftest import POSITIONS, ROOT, VIRTUAL_TOKENS, WORDS
from train.common.errors import EngineError, UsageError

Folders = Callable[[str], Path]

LONGEST = POSITIONS - VIRTUAL_TOKENS


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """No figure is looked at here, so nothing has to come to rest."""
    monkeypatch.setattr(demo.measure.sweep, "PAUSE_SECONDS", 0.01)


def open_stage(kind: str, adapter: Folders, bundle: Folders, *, has_pytorch: bool = True) -> Stage:
    return Stage(choose_adapters([adapter(kind)]), bundles=[bundle(kind)], has_pytorch=has_pytorch, threads=1)


@pytest.fixture(scope="module")
def stage(adapter: Folders, bundle: Folders) -> Iterator[Stage]:
    """The tiny BERT on both engines."""
    stage = open_stage("bert", adapter, bundle)
    yield stage
    stage.close()


def measure(stage: Stage, cells: tuple[Cell, ...]) -> list[Sweep]:
    """Everything that a sweep yields."""
    return list(sweep(stage, stage.default(), cells, stop=threading.Event()))


@pytest.fixture(scope="module")
def steps(stage: Stage) -> list[Sweep]:
    """A sweep over two batch sizes and two lengths."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo.measure.sweep, "PAUSE_SECONDS", 0.01)
        return measure(stage, choose_cells([1, 3], [8, LONGEST], max_length=LONGEST))


def test_every_batch_size_is_measured_with_every_length_each_once() -> None:
    cells = choose_cells([8, 1, 8], (16, 4), max_length=16)
    assert cells == (Cell(1, 4), Cell(1, 16), Cell(8, 4), Cell(8, 16))


@pytest.mark.parametrize(
    ("batch_sizes", "lengths", "words"),
    [
        ([], [8], "Batch sizes: choose at least one number from 1 to 64"),
        ([1], [], "Lengths in tokens: choose at least one number from 1 to 512"),
        (None, [8], "Batch sizes: choose"),
        (8, [8], "Batch sizes: choose"),
        ("12", [8], "Batch sizes: choose"),
        ([0], [8], "Batch sizes: '0' is no whole number from 1 to 64"),
        ([65], [8], "Batch sizes: '65' is no whole number from 1 to 64"),
        ([1], [-3], "Lengths in tokens: '-3' is no"),
        ([1], [513], "Lengths in tokens: '513' is no whole number from 1 to 512"),
        ([1.0], [8], r"Batch sizes: '1\.0' is no"),
        ([True], [8], "Batch sizes: 'True' is no"),
        (["1"], [8], "Batch sizes: '1' is no"),
        ([1], [float("nan")], "Lengths in tokens: 'nan' is no"),
        ([1], [[8]], r"Lengths in tokens: '\[8\]' is no"),
        ([10**200], [8], r"Batch sizes: '10{39}' is no"),
        (list(range(1, 14)), [8], "Batch sizes: these are 13 numbers; at most 12"),
        ([1] * 10_000_000, [8], "Batch sizes: these are 10,000,000 numbers"),
        ([1, 2, 3, 4], [8, 9, 10, 11], "4 batch sizes with 4 lengths are 16 cells; at most 12"),
        ([1, 64], [8, 257], "A batch of 64 texts of 257 tokens is too large: at most 16,384"),
    ],
)
def test_what_cannot_be_measured_is_refused_by_name_with_the_limit(
    batch_sizes: object, lengths: object, words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        choose_cells(batch_sizes, lengths, max_length=512)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_random_batch_is_what_the_graph_takes(kind: str, bundle: Folders) -> None:
    loaded = load_bundle(bundle(kind))
    arrays = random_batch(loaded, Cell(32, 40))
    assert tuple(arrays) == loaded.text_inputs
    assert {(array.shape, array.dtype) for array in arrays.values()} == {((32, 40), np.dtype(np.int64))}
    ids = arrays["input_ids"]
    assert set(np.unique(ids)) == set(range(len(WORDS) + 4))  # 1280 draws: a word that never comes is a bug
    assert arrays["attention_mask"].all()
    assert not arrays.get("token_type_ids", np.zeros(1)).any()
    assert not np.array_equal(ids, random_batch(loaded, Cell(32, 40), seed=1)["input_ids"])


def test_each_cell_has_as_many_runs_of_both_engines_in_turn(steps: list[Sweep]) -> None:
    last = steps[-1]
    assert [row.cell for row in last.rows] == list(last.cells)
    assert last.is_complete
    assert last.doing == ""
    for row in last.rows:
        assert row.pytorch is not None
        counts = {len(runs) for times in (row.pytorch, row.onnx) for runs in times.rounds_ms}
        assert len(counts) == 1
        assert MIN_RUNS <= counts.pop() <= MAX_RUNS
        assert len(row.pytorch.rounds_ms) == len(row.onnx.rounds_ms) == ROUNDS
    n_bursts = 2 * ROUNDS * 4
    assert [step.bursts_done for step in steps] == list(range(n_bursts + 1))
    assert [step.n_bursts for step in steps] == [n_bursts] * (n_bursts + 1)
    assert steps[0].doing == f"Cell 1 of 4 (batch 1, 8 tokens): PyTorch, round 1 of {ROUNDS}"
    assert steps[-2].doing == f"Cell 4 of 4 (batch 3, {LONGEST} tokens): ONNX Runtime, round {ROUNDS} of {ROUNDS}"
    assert [len(step.rows) for step in steps[:: 2 * ROUNDS]] == [0, 1, 2, 3, 4]
    assert steps[0].seconds_left is None
    assert last.seconds_left == 0


def golden(row: Row) -> dict[str, float]:
    """The figures of a row by NumPy, from nothing but the latencies."""
    assert row.pytorch is not None
    slow, fast = (np.array(times.rounds_ms) for times in (row.pytorch, row.onnx))
    rounds = np.median(slow, axis=1) / np.median(fast, axis=1)
    return {
        "runs": slow.size,
        "rounds": ROUNDS,
        "pytorch_median_ms": np.quantile(slow, 0.5),
        "pytorch_p95_ms": np.quantile(slow, 0.95),
        "pytorch_pairs_per_s": row.cell.batch_size / (np.quantile(slow, 0.5) / 1000),
        "onnx_median_ms": np.quantile(fast, 0.5),
        "onnx_p95_ms": np.quantile(fast, 0.95),
        "onnx_pairs_per_s": row.cell.batch_size / (np.quantile(fast, 0.5) / 1000),
        "speedup": np.quantile(slow, 0.5) / np.quantile(fast, 0.5),
        "speedup_lowest_round": rounds.min(),
        "speedup_highest_round": rounds.max(),
    }


def test_the_file_holds_the_figures_and_on_what_they_were_measured(steps: list[Sweep]) -> None:
    last = steps[-1]
    lines = list(csv.DictReader(io.StringIO(last.as_csv())))
    assert [(int(line["batch_size"]), int(line["tokens"])) for line in lines] == list(
        itertools.product([1, 3], [8, LONGEST])
    )
    for line, row in zip(lines, last.rows, strict=True):
        expected = golden(row)
        assert {name: float(line[name]) for name in expected} == pytest.approx(expected)
        assert line["adapter"] == "bert"
        assert line["pytorch_engine"].startswith("PyTorch ")
        assert line["onnx_engine"].startswith("ONNX Runtime ")
        assert line["onnx_provider"].endswith("ExecutionProvider")
        assert (line["pytorch_threads"], line["onnx_threads"]) == ("1", "1")
        assert (line["pytorch_precision"], line["onnx_precision"]) == ("fp32", "fp32")
    assert steps[0].as_csv() == "\n"  # nothing was measured yet


def test_rounds_that_differ_widely_are_told(steps: list[Sweep]) -> None:
    fast = Times(((1.0, 1.0), (1.0, 1.0)))
    for slow_ms, told in ((2.9, False), (3.1, True)):
        row = Row(Cell(1, 8), fast, Times(((2.0, 2.0), (slow_ms, slow_ms))))
        notes = replace(steps[-1], rows=(row,)).notes
        assert any("something else used this machine" in note for note in notes) is told


def test_the_charts_have_a_line_for_each_engine_and_batch_size(steps: list[Sweep]) -> None:
    for svg in charts_svg(steps[-1]):
        assert svg.startswith('<svg role="img" aria-label="')
        for words in ("PyTorch", "ONNX Runtime", "batch 1", "batch 3"):
            assert f">{words}</text>" in svg
        assert svg.count("<svg") == 1
    assert charts_png(steps[-1]).startswith(b"\x89PNG")


def test_a_stop_keeps_the_rounds_that_both_engines_have_done(stage: Stage) -> None:
    stop = threading.Event()
    taken = []
    for now in sweep(stage, stage.default(), (Cell(1, 8), Cell(2, 8), Cell(3, 8)), stop=stop):
        taken.append(now)
        if now.bursts_done == 2 * ROUNDS + 3:  # the second cell has a round and a half
            stop.set()
    last = taken[-1]
    assert [row.cell for row in last.rows] == [Cell(1, 8), Cell(2, 8)]
    assert last.rows[1].record()["rounds"] == 1
    assert last.rows[1].pytorch is not None
    assert len(last.rows[1].pytorch.all_ms) == len(last.rows[1].onnx.all_ms)
    assert last.bursts_done == 2 * ROUNDS + 3
    assert not last.is_complete
    assert not stage.measuring.locked()


def test_whoever_walks_away_from_a_sweep_leaves_the_engines_to_others(stage: Stage) -> None:
    abandoned = sweep(stage, stage.default(), (Cell(1, 8),), stop=threading.Event())
    next(abandoned)
    next(abandoned)
    assert measure(stage, (Cell(2, 4),))[-1].is_complete


def test_a_decoder_in_pytorch_is_measured_one_text_at_a_time(
    adapter: Folders, bundle: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = open_stage("gpt2", adapter, bundle)
    cells = (Cell(1, 8), Cell(2, 8))
    try:
        last = measure(stage, cells)[-1]
        one, two = last.rows
        assert last.is_complete
        assert ONE_TEXT_ONLY in last.notes
        assert (one.pytorch is None, two.pytorch is None) == (False, True)
        assert len(two.onnx.rounds_ms) == ROUNDS
        assert two.record() | {"pytorch_median_ms": None, "speedup": None} == two.record()
        charts_svg(last)

        # It is no choice of ours: PEFT cannot do it. So an engine dies here, and what was measured before is there.
        monkeypatch.setattr(demo.measure.sweep, "DECODERS", ())
        taken: list[Sweep] = []
        with pytest.raises(EngineError, match=r"In cell 2 of 2 \(batch 2, 8 tokens\): The PyTorch engine's process"):
            taken.extend(sweep(stage, stage.default(), cells, stop=threading.Event()))
        assert [row.cell for row in taken[-1].rows] == [Cell(1, 8)]
        assert measure(stage, cells[:1])[-1].is_complete
    finally:
        stage.close()


async def build_page(stage: Stage) -> gr.Blocks:
    """A page with nothing but the selectors and this tab."""
    with gr.Blocks(analytics_enabled=False) as page:
        selectors = Selectors(
            gr.Dropdown(list(stage.choices), label="Adapter"),
            gr.Dropdown(["fp32"], label="Precision"),
            gr.Dropdown(list(PYTORCH_MODES), label="PyTorch"),
        )
        with gr.Tab("Latency lab"):
            build_lab_tab(stage, selectors)
    return page


def make_page(stage: Stage) -> gr.Blocks:
    """The same from where no event loop runs: there Gradio would make one for each of its locks, and close none."""
    return asyncio.run(build_page(stage))


def handler(page: gr.Blocks, name: str) -> Callable[..., Any]:
    """A handler of an event of the page."""
    (found,) = [function.fn for function in page.fns.values() if function.fn and function.fn.__name__ == name]
    return found


def test_the_tab_shows_row_by_row_and_gives_files(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "files"))
    page = make_page(stage)
    run, _, table, *_, start, stop = handler(page, "prepare")("bert", "fp32", "eager", [1, 2], [8])
    assert table.count("<tr>") == 3  # the head, and both cells before they are measured
    assert (start.interactive, stop.interactive) == (False, True)
    statuses, tables, files = [], [], []
    for status, table, _, *new in handler(page, "measure")(run):
        statuses.append(status)
        if isinstance(table, str):
            tables.append(table)
            files.append([Path(button.value["path"]) for button in new])
    assert "Starting the engines" in statuses[0]
    assert "Cell 1 of 2 (batch 1, 8 tokens): PyTorch, round 1" in statuses[1]
    assert "s left" not in statuses[1]
    assert re.search(r"Cell 2 of 2 .*; about \d+ s left", statuses[-2])
    assert "Done: 2 of 2 cells measured." in statuses[-1]
    assert [table.count("…") for table in tables] == [7, 0]
    assert [len(list(csv.DictReader(io.StringIO(csv_file.read_text())))) for csv_file, _ in files] == [1, 2]
    (line, _) = csv.DictReader(io.StringIO(files[-1][0].read_text()))
    for name in ("pytorch_median_ms", "pytorch_p95_ms", "onnx_median_ms", "onnx_p95_ms"):
        assert f">{float(line[name]):.2f}</td>" in tables[-1]
    assert files[-1][1].read_bytes().startswith(b"\x89PNG")
    assert {file.parent for pair in files for file in pair} == {tmp_path / "files"}


def test_the_tab_offers_what_the_adapter_reads_and_refuses_the_rest(stage: Stage) -> None:
    page = make_page(stage)
    (box,) = [block for block in page.blocks.values() if getattr(block, "label", "") == "Lengths in tokens"]
    assert isinstance(box, gr.CheckboxGroup)
    assert [value for _, value in box.choices] == [16, 32, LONGEST]
    assert box.value == [16]
    refreshed = handler(page, "refresh")("bert", [32, 128])
    assert refreshed.value == [32]
    for arguments, words in (
        (("bert", "fp32", "eager", [], [8]), "Batch sizes: choose"),
        (("bert", "fp32", "eager", [1], [LONGEST + 1]), "Lengths in tokens: "),
        (("nobody", "fp32", "eager", [1], [8]), "There is no adapter 'nobody'"),
    ):
        with pytest.raises(gr.Error, match=words):
            handler(page, "prepare")(*arguments)
    handler(page, "_halt")(None)  # nothing runs


def test_an_engine_that_dies_takes_no_row_along(
    adapter: Folders, bundle: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo.measure.sweep, "DECODERS", ())
    stage = open_stage("gpt2", adapter, bundle)
    try:
        page = make_page(stage)
        run, *_ = handler(page, "prepare")("gpt2", "fp32", "eager", [1, 2], [8])
        # Outside a request Gradio has nobody to warn but Python.
        with pytest.warns(UserWarning, match="In cell 2 of 2"):
            shown = list(handler(page, "measure")(run))
        tables = [table for _, table, *_ in shown if isinstance(table, str)]
        assert len(tables) == 1
        assert "In cell 2 of 2 (batch 2, 8 tokens)" in shown[-1][0]
        assert "1 of 2 cells measured." in shown[-1][0]
    finally:
        stage.close()


def test_without_pytorch_onnx_runtime_is_measured_alone(adapter: Folders, bundle: Folders) -> None:
    stage = open_stage("bert", adapter, bundle, has_pytorch=False)
    try:
        page = make_page(stage)
        run, *_ = handler(page, "prepare")("bert", "fp32", "eager", [1], [8])
        *_, (status, table, charts, *_) = handler(page, "measure")(run)
    finally:
        stage.close()
    assert "Done: 1 of 1 cells measured." in status
    assert "This page runs ONNX Runtime alone; PyTorch was not measured." in table
    assert table.count("<td") == 9
    assert table.count(">–</td>") == 4  # PyTorch's figures and the speed-up
    assert "ONNX Runtime</text>" in charts
    assert "PyTorch</text>" not in charts


@pytest.fixture(scope="module")
def url(adapter: Folders, bundle: Folders) -> Iterator[str]:
    """A served page, in a process of its own: in this one Gradio would leave sockets open."""
    command = [sys.executable, "-m", "tests.demo.test_lab", str(adapter("bert")), str(bundle("bert"))]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    printed = ""
    try:
        while not (found := re.search("^ready (.*)/$", printed, flags=re.MULTILINE)):
            line = process.stdout.readline()
            assert line, f"the page did not start:\n{printed}"
            printed += line
        yield found[1]
    finally:
        process.terminate()
        printed += process.communicate(timeout=60)[0]
    assert "Traceback" not in printed, printed


def serve(adapter_folder: str, bundle_folder: str) -> None:
    """What that process does until it is told to end."""
    # As an exception, so that the engines are stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    demo.measure.sweep.PAUSE_SECONDS = 0.01
    stage = Stage(choose_adapters([Path(adapter_folder)]), bundles=[Path(bundle_folder)], threads=1)
    try:
        page = make_page(stage)
        page.queue()
        page.launch(prevent_thread_lock=True, quiet=True, ssr_mode=False)
        print(f"ready {page.local_url}", flush=True)
        threading.Event().wait()
    finally:
        stage.close()


def test_the_stop_button_ends_the_run_of_its_session(url: str) -> None:
    """As a browser does it; the endpoints of the buttons are nobody else's."""
    with httpx.Client(base_url=f"{url}/gradio_api", timeout=60) as browser:
        config = browser.get(f"{url}/config").raise_for_status().json()
        clicks = {
            component["props"].get("value"): event["id"]
            for component in config["components"]
            for event in config["dependencies"]
            if [component["id"], "click"] in event["targets"]
        }
        (measure_event,) = [
            event["id"] for event in config["dependencies"] if event["trigger_after"] == clicks["Measure"]
        ]

        def call(event: int, data: list[object], *, where: str = "run/predict") -> None:
            body = {"data": data, "fn_index": event, "session_hash": "one"}
            browser.post(where, json=body).raise_for_status()

        call(clicks["Measure"], ["bert", "fp32", "eager", [1, 2, 4, 8], [16, 32, LONGEST]])
        call(measure_event, [None], where="queue/join")
        with browser.stream("GET", "queue/data", params={"session_hash": "one"}) as stream:
            for line in stream.iter_lines():
                if "Cell 2 of 12" in line:
                    call(clicks["Stop"], [None])
                if '"process_completed"' in line:
                    break
    message = json.loads(line.removeprefix("data: "))
    assert message["success"]
    status = message["output"]["data"][0]
    found = re.search(r"Stopped: (\d+) of 12 cells measured\.", status)
    assert found, status
    assert 1 <= int(found[1]) < 12


def test_the_endpoint_measures_refuses_and_is_the_only_one(url: str) -> None:
    with closing(Client(url, verbose=False)) as client:
        check_endpoint(client)


def check_endpoint(client: Client) -> None:
    endpoints = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert list(endpoints) == ["/latency"]
    answer = client.predict([2, 1], [8], api_name="/latency")
    assert json.loads(json.dumps(answer)) == answer
    assert set(answer) - {"notes"} == {"adapter", "pytorch", "onnx", "cells"}
    assert (answer["adapter"], answer["onnx"]["precision"], answer["pytorch"]["threads"]) == ("bert", "fp32", 1)
    assert [(cell["batch_size"], cell["tokens"]) for cell in answer["cells"]] == [(1, 8), (2, 8)]
    for cell in answer["cells"]:
        assert 0 < cell["onnx_median_ms"] <= cell["onnx_p95_ms"]
        assert cell["speedup"] == pytest.approx(cell["pytorch_median_ms"] / cell["onnx_median_ms"])
        assert cell["speedup_lowest_round"] <= cell["speedup_highest_round"]
    for arguments, words in (
        (([], [8]), "Batch sizes: choose at least one"),
        (([1], [LONGEST + 1]), f"'{LONGEST + 1}' is no whole number from 1 to {LONGEST}"),
        (([1], [8], "none"), "There is no adapter 'none' here"),
        (([1], [8], "bert", "int4"), "There is no precision 'int4' here"),
        (([1], [8], "bert", "int8"), "holds no int8 graph"),
    ):
        with pytest.raises(AppError, match=words):
            client.predict(*arguments, api_name="/latency")


if __name__ == "__main__":
    serve(*sys.argv[1:])
