"""The latency lab: which cells are taken, what is measured in each, and what the tab and the endpoint make of it."""

import csv
import io
import itertools
import json
import re
import threading
from dataclasses import replace
from pathlib import Path

import gradio as gr
import numpy as np
import pytest

from demo.engines.stage import Setup, Stage
from demo.engines.timing import Burst
from demo.measure.sweep import MAX_RUNS, MIN_RUNS, ONE_TEXT_ONLY, ROUNDS, Cell, Row, Sweep, choose_cells, sweep
from demo.page.sweep_charts import charts_png, charts_svg
from demo.page.tab_lab import build_lab_tab
from tests.conftest import POSITIONS, VIRTUAL_TOKENS, Folders
from tests.demo.engines import stage_of
from tests.demo.one_tab import handler, make_page
from train.common.errors import UsageError

LONGEST = POSITIONS - VIRTUAL_TOKENS
pytestmark = pytest.mark.usefixtures("short_pauses")


def lab(stage: Stage) -> gr.Blocks:
    return make_page(stage, lambda stage, selectors, _: build_lab_tab(stage, selectors))


def measure(stage: Stage, *cells: Cell, adapter: str = "bert") -> list[Sweep]:
    return list(sweep(stage, Setup(adapter), cells, stop=threading.Event()))


@pytest.fixture(scope="module")
def steps(stage: Stage) -> list[Sweep]:
    return measure(stage, *choose_cells([1, 3], [8, LONGEST], max_length=LONGEST))


@pytest.mark.parametrize(
    ("batch_sizes", "lengths", "words"),
    [
        ([], [8], "Batch sizes: choose at least one number from 1 to 64"),
        ([1], [], "Lengths in tokens: choose at least one number from 1 to 512"),
        (None, [8], "Batch sizes: choose"),
        ([0], [8], "Batch sizes: '0' is no whole number from 1 to 64"),
        ([1], [-3], "Lengths in tokens: '-3' is no"),
        ([1], [513], "Lengths in tokens: '513' is no whole number from 1 to 512"),
        *(([n], [8], f"Batch sizes: '{n}' is no".replace(".", r"\.")) for n in (1.0, True, "1")),
        ([1], [float("nan")], "Lengths in tokens: 'nan' is no"),
        ([1], [[8]], r"Lengths in tokens: '\[8\]' is no"),
        ([10**200], [8], r"Batch sizes: '10{39}' is no"),
        ([1] * 10_000_000, [8], "Batch sizes: these are 10,000,000 numbers; at most 12"),
        ([1, 2, 3, 4], [8, 9, 10, 11], "4 batch sizes with 4 lengths are 16 cells; at most 12"),
        ([1, 64], [8, 257], "A batch of 64 texts of 257 tokens is too large: at most 16,384"),
    ],
)
def test_what_cannot_be_measured_is_refused_with_the_limit(batch_sizes: object, lengths: object, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        choose_cells(batch_sizes, lengths, max_length=512)


def test_each_cell_has_as_many_runs_of_both_engines_in_turn(steps: list[Sweep]) -> None:
    assert choose_cells([8, 1, 8], (16, 4), max_length=16) == (Cell(1, 4), Cell(1, 16), Cell(8, 4), Cell(8, 16))
    last = steps[-1]
    assert [row.cell for row in last.rows] == list(last.cells)
    assert (last.is_complete, last.doing) == (True, "")
    for row in last.rows:
        counts = {len(burst.runs_ms) for burst in (*row.pytorch_rounds, *row.onnx_rounds)}
        assert len(counts) == 1
        assert MIN_RUNS <= counts.pop() <= MAX_RUNS
        assert len(row.pytorch_rounds) == len(row.onnx_rounds) == ROUNDS
    n_bursts = 2 * ROUNDS * 4
    assert [step.bursts_done for step in steps] == list(range(n_bursts + 1))
    assert [step.n_bursts for step in steps] == [n_bursts] * (n_bursts + 1)
    assert steps[0].doing == f"Cell 1 of 4 (batch 1, 8 tokens): PyTorch, round 1 of {ROUNDS}"
    assert steps[-2].doing == f"Cell 4 of 4 (batch 3, {LONGEST} tokens): ONNX Runtime, round {ROUNDS} of {ROUNDS}"
    assert [len(step.rows) for step in steps[:: 2 * ROUNDS]] == [0, 1, 2, 3, 4]
    assert (steps[0].seconds_left, last.seconds_left) == (None, 0)


def golden(row: Row) -> dict[str, float]:
    """The figures of a row by NumPy, from nothing but the latencies."""
    both = [np.array([burst.runs_ms for burst in rounds]) for rounds in (row.pytorch_rounds, row.onnx_rounds)]
    rounds = np.divide(*(np.median(runs_ms, axis=1) for runs_ms in both))
    medians = [np.quantile(runs_ms, 0.5) for runs_ms in both]
    figures = {"runs": both[0].size, "rounds": ROUNDS, "speedup": medians[0] / medians[1]}
    for name, runs_ms, median in zip(("pytorch", "onnx"), both, medians, strict=True):
        figures |= {f"{name}_median_ms": median, f"{name}_p95_ms": np.quantile(runs_ms, 0.95)}
        figures[f"{name}_pairs_per_s"] = row.cell.batch_size / (median / 1000)
    return figures | {"speedup_lowest_round": rounds.min(), "speedup_highest_round": rounds.max()}


def test_the_file_and_the_charts_hold_the_figures_and_on_what_they_were_measured(steps: list[Sweep]) -> None:
    last = steps[-1]
    lines = list(csv.DictReader(io.StringIO(last.as_csv())))
    cells = [(int(line["batch_size"]), int(line["tokens"])) for line in lines]
    assert cells == list(itertools.product([1, 3], [8, LONGEST]))
    for line, row in zip(lines, last.rows, strict=True):
        expected = golden(row)
        assert {name: float(line[name]) for name in expected} == pytest.approx(expected)
        engines = [line["pytorch_engine"].split()[0], line["onnx_engine"].rpartition(" ")[0]]
        assert [line["adapter"], *engines] == ["bert", "PyTorch", "ONNX Runtime"]
        assert line["onnx_provider"].endswith("ExecutionProvider")
        assert [(line[f"{side}_threads"], line[f"{side}_precision"]) for side in ("pytorch", "onnx")] == [
            ("1", "fp32")
        ] * 2
    assert steps[0].as_csv() == "\n"  # nothing was measured yet
    for svg in charts_svg(last):
        assert svg.startswith('<svg role="img" aria-label="')
        for words in ("PyTorch", "ONNX Runtime", "batch 1", "batch 3"):
            assert f">{words}</text>" in svg
        assert svg.count("<svg") == 1
    assert charts_png(last).startswith(b"\x89PNG")
    # Rounds that differ widely are told.
    for slow_ms, told in ((2.9, False), (3.1, True)):
        fast, slow, slower = (Burst((ms, ms), 1.0) for ms in (1.0, 2.0, slow_ms))
        notes = replace(last, rows=(Row(Cell(1, 8), (fast, fast), (slow, slower)),)).notes
        assert any("something else used this machine" in note for note in notes) is told


def test_a_stop_keeps_the_rounds_that_both_engines_have_done_and_leaves_them_to_others(stage: Stage) -> None:
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
    assert len(last.rows[1].pytorch.runs_ms) == len(last.rows[1].onnx.runs_ms)
    assert (last.bursts_done, last.is_complete) == (2 * ROUNDS + 3, False)
    # An abandoned sweep leaves the engines to others.
    abandoned = sweep(stage, stage.default(), (Cell(1, 8),), stop=threading.Event())
    next(abandoned)
    next(abandoned)
    assert measure(stage, Cell(2, 4))[-1].is_complete


def test_a_decoder_in_pytorch_is_measured_one_text_at_a_time(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = (Cell(1, 8), Cell(2, 8))
    last = measure(stage, *cells, adapter="llama-v2")[-1]
    one, two = last.rows
    assert last.is_complete
    assert ONE_TEXT_ONLY in last.notes
    assert (one.pytorch is None, two.pytorch is None) == (False, True)
    assert len(two.onnx_rounds) == ROUNDS
    assert two.record() | {"pytorch_median_ms": None, "speedup": None} == two.record()
    charts_svg(last)
    # PEFT cannot take the larger batch, so here PyTorch's process dies; what was measured before is kept.
    encoder = replace(stage.bundle("llama-v2"), is_decoder=False)
    monkeypatch.setitem(stage._bundles, "llama-v2", encoder)
    page = lab(stage)
    run, *_ = handler(page, "prepare")("llama-v2", "fp32", "eager", [1, 2], [8])
    # Outside a request Gradio's warning is one of Python's.
    with pytest.warns(UserWarning, match="In cell 2 of 2"):
        shown = list(handler(page, "measure")(run))
    assert len([table for _, table, *_ in shown if isinstance(table, str)]) == 1
    assert "In cell 2 of 2 (batch 2, 8 tokens): The PyTorch engine&#39;s process" in shown[-1][0]
    assert "1 of 2 cells measured." in shown[-1][0]


def test_the_tab_shows_each_row_and_gives_files(stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "files"))
    page = lab(stage)
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
    # The visitor stops the next run.
    run, *_ = handler(page, "prepare")("bert", "fp32", "eager", [1, 2], [8])
    for status, *_ in handler(page, "measure")(run):
        statuses.append(status)
        if "Cell 2 of 2" in status:
            handler(page, "_halt")(run)
    assert "Stopped: 1 of 2 cells measured." in statuses[-1]
    handler(page, "_halt")(None)  # nothing runs


def test_without_pytorch_onnx_runtime_is_measured_alone(adapter: Folders, bundle: Folders) -> None:
    with stage_of(adapter("bert"), bundles=(bundle("bert"),), has_pytorch=False) as stage:
        page = lab(stage)
        run, *_ = handler(page, "prepare")("bert", "fp32", "eager", [1], [8])
        *_, (status, table, charts, *_) = handler(page, "measure")(run)
    assert "Done: 1 of 1 cells measured." in status
    assert "This page runs ONNX Runtime alone; PyTorch was not measured." in table
    assert table.count("<td") == 9
    assert table.count(">–</td>") == 4  # PyTorch's figures and the speed-up
    assert "ONNX Runtime</text>" in charts
    assert "PyTorch</text>" not in charts


def test_the_endpoint_measures_and_the_tab_offers_what_the_adapter_reads(stage: Stage) -> None:
    page = lab(stage)
    assert list(page.get_api_info()["named_endpoints"]) == ["/latency"]
    latency = handler(page, "latency")
    answer = latency([2, 1], [8])
    assert json.loads(json.dumps(answer)) == answer
    assert set(answer) - {"notes"} == {"adapter", "pytorch", "onnx", "cells"}
    assert (answer["adapter"], answer["onnx"]["precision"], answer["pytorch"]["threads"]) == ("bert", "fp32", 1)
    assert [(cell["batch_size"], cell["tokens"]) for cell in answer["cells"]] == [(1, 8), (2, 8)]
    for cell in answer["cells"]:
        assert 0 < cell["onnx_median_ms"] <= cell["onnx_p95_ms"]
        assert cell["speedup"] == pytest.approx(cell["pytorch_median_ms"] / cell["onnx_median_ms"])
        assert cell["speedup_lowest_round"] <= cell["speedup_highest_round"]
    with pytest.raises(gr.Error, match=f"'{LONGEST + 1}' is no whole number from 1 to {LONGEST}"):
        latency([1], [LONGEST + 1])
    with pytest.raises(gr.Error, match="There is no precision 'int4' here"):
        latency([1], [8], "bert", "int4")
    (box,) = [block for block in page.blocks.values() if getattr(block, "label", "") == "Lengths in tokens"]
    assert isinstance(box, gr.CheckboxGroup)
    assert [value for _, value in box.choices] == [16, 32, LONGEST]
    assert box.value == [16]
    assert handler(page, "refresh")("bert", [32, 128]).value == [32]
    with pytest.raises(gr.Error, match="Lengths in tokens: "):
        handler(page, "prepare")("bert", "fp32", "eager", [1], [LONGEST + 1])
