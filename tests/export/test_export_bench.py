"""What ``python -m export.bench`` refuses, counts and reports; its engines run in tests/slow/export."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from export.bench.__main__ import main
from export.bench.config import Cell, Shape
from export.bench.engines import Job, Measured, Peak, Plan, Timed
from export.bench.models import count_multiply_adds, family_module
from export.bench.prepare import Prepared
from export.bench.report import document, tables
from export.bench.rounds import Worker
from export.bench.worker import padded_on_the_left
from tests.conftest import ROOT, Folders
from train.adapter.folder import load_adapter
from train.adapter.peft import find_adapter_base
from train.data.tasks import MRPC

Capsys = pytest.CaptureFixture[str]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("{adapter}", "Give an ADAPTER and the BUNDLE"),
        ("{adapter} {bundle} --engines ours-int4", "--engines ours-int4: there is no such engine. Choose from peft"),
        ("{adapter} {bundle} --shapes 1", "--shapes 1: write texts×tokens, such as 8x60"),
        ("{adapter} {bundle} --shapes 0x5", "--shapes 0x5: write"),
        ("{adapter} {bundle} --shapes ,", "There is nothing to time"),
        ("{adapter} {bundle} --rounds 0", "--rounds 0: give a whole number of at least 1"),
        ("{adapter} {bundle} --pause -1", "--pause -1: give seconds"),
        ("{adapter} {bundle} --openvino-python nowhere", "--openvino-python nowhere: there is no such program"),
        ("{adapter} {bundle} --png {tmp}/no/a.png", "in a folder that exists"),
        ("{adapter} {bundle} --png {tmp}/a.jpg", "give a name that ends in .png"),
        ("{adapter} {bundle} --shape-of roberta-large", "makes its own adapter"),
        ("--shape-of roberta-large --file {tmp}/f.jsonl", "random weights, which score nothing"),
        ("--shape-of roberta-huge", "give roberta-large, or a folder that holds a model's config.json"),
    ],
)
def test_what_cannot_be_used_is_refused_at_once(flags: str, words: str, tmp_path: Path, capsys: Capsys) -> None:
    assert main(flags.format(adapter=tmp_path / "a", bundle=tmp_path / "b", tmp=tmp_path).split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert words in error


def multiply_adds(folder: Path, *inputs: str) -> list[int]:
    """Counts of PEFT, of the plain export, and of ours, for two batches of 3 texts of 11 tokens."""
    adapter = load_adapter(folder)
    base, batch = find_adapter_base(adapter), {name: np.ones((3, 11), np.int64) for name in inputs}
    modules = [family_module(family, adapter, base, 0) for family in ("peft", "plain", "ours")]
    return [count_multiply_adds(module, {"a": [batch, batch]})["a"] for module in modules]


def test_multiply_adds_are_those_of_a_count_by_hand(adapter: Folders) -> None:
    """3 texts of 11 tokens behind 5 virtual ones; 2 layers of 4 heads, 32 wide and 64 within; 2 labels."""
    row = 4 * 32 * 32 + 2 * 16 * 32 + 2 * 32 * 64  # projections, attention to 16 rows, feed-forward
    # In the last layer ours has one row, and each head meets whole rows.
    last, head = 4 * 32 * 32 + 2 * 4 * 16 * 32 + 2 * 32 * 64, 32 * 32 + 32 * 2
    whole, ours = 2 * 3 * (2 * 16 * row + head), 2 * 3 * (16 * row + last + head)
    assert multiply_adds(adapter("bert"), "input_ids", "attention_mask", "token_type_ids") == [whole, whole, ours]
    # A decoder's prompt costs PEFT alone; transformers lets its head see every row, of which one is read.
    peft, others = 2 * 3 * (2 * 16 * row + 16 * 32 * 2), 2 * 3 * (2 * 11 * row + 32 * 2)
    assert multiply_adds(adapter("gpt2"), "input_ids", "attention_mask") == [peft, others, others]


def measured(labels: list[int], file_ms: float, *shape_ms: float, difference: float = 0.0) -> Measured:
    cells = {"1x8": Timed(9.0, shape_ms), "file": Timed(9.0, (file_ms,))}
    return Measured("", "", 1.0, 1.0, None, 1.0, difference, cells, {"file": labels})


def test_ratios_are_of_one_round_and_figures_are_medians_of_rounds() -> None:
    right, wrong = [0, 1, 1, 0], [0, 1, 0, 0]
    job, cells = Job("cpu", 1, Plan(0, 1, 1, 0), "", "", "", "", 0, ""), {"1x8": Shape(1, 8), "file": Shape(4, 8)}
    multiply_adds = {family: {"1x8": 1_250_000, "file": 1} for family in ("peft", "plain", "ours")}
    shapes = [Cell(name, "", shape.batch_size, (shape,)) for name, shape in cells.items()]
    prepared = Prepared(job, {}, shapes, multiply_adds, graphs={}, task=MRPC, expected=right)
    first: dict[str, Measured | str] = {
        "peft-eager": measured(right, 8, 10, 10, 40),
        "plain-fp32": measured(wrong, 1, 1, 1, 1, difference=0.5),
        "plain-int8": measured(wrong, 4, 5, 5, 5, difference=0.5),
        "openvino-int8": "no",
        "ours-int8": measured(right, 2, 2, 2, 2),
    }
    then = {"plain-fp32": measured(wrong, 1, 1, 1, 1), "plain-int8": measured(wrong, 4, 10, 10, 10)}
    then |= {"peft-eager": measured(right, 8, 30, 30, 30), "ours-int8": measured(right, 2, 3, 3, 3)}
    found = document(prepared, [first, first | then], [Peak("fp32", 4.0, "")])
    by_name = {result["engine"]: result for result in found["engines"]}
    statuses = ["measured", "wrong", "measured", "not run", "measured"]
    assert [result["status"] for result in by_name.values()] == statuses
    assert "differs from PEFT's by 0.5" in by_name["plain-fp32"]["reason"]
    assert by_name["openvino-int8"]["cells"] == []
    ours, best = by_name["ours-int8"]["cells"][0], found["best"][0]
    assert (ours["latency_ms"], ours["latency_ms_per_round"], ours["runs"]) == (2.5, (2, 3), 6)
    assert (ours["speedup_per_round"], ours["speedup"]) == ((5, 10), 7.5)
    assert (ours["pairs_per_second"], ours["gflop"], ours["gflop_per_second"]) == (400, 0.0025, 1)
    assert ours["peak_share"] is best["tutorial_speedup"] is None
    assert by_name["peft-eager"]["cells"][0]["peak_share"] == pytest.approx(0.0025 / 0.020 / 4)
    assert by_name["plain-int8"]["scores"] == {"accuracy": 0.75, "f1": pytest.approx(2 / 3)}
    assert by_name["plain-int8"]["label_flips"] == 1
    # The wrong one is the fastest, and does not count.
    assert (best["ours"], best["peer"]) == ("ours-int8", "plain-int8")
    assert (best["peer_speedup_per_round"], best["speedup"]) == ((5 / 2, 10 / 3), 7.5)
    # plain-int8 has one label of four wrong, which no graph of ours would be allowed.
    assert (best["passing_peer"], best["passing_peer_speedup_per_round"]) == ("peft-eager", (5, 10))
    assert "7.50" in "\n".join(tables(prepared, found))


def test_padding_moves_to_the_left_for_pefts_decoders() -> None:
    ids, mask = np.array([[5, 6, 7, 8], [9, 4, 1, 1]]), np.array([[1, 1, 1, 1], [1, 1, 0, 0]])
    moved = padded_on_the_left({"input_ids": ids, "attention_mask": mask})
    assert moved["input_ids"].tolist() == [[5, 6, 7, 8], [1, 1, 9, 4]]
    assert moved["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]


def test_a_worker_survives_what_a_library_prints_and_raises_and_tells_how_it_ended(tmp_path: Path) -> None:
    job = Job("cpu", 1, Plan(0, 1, 1, 0), "", "", "", "", 0, "")
    with Worker(sys.executable, job, tmp_path) as worker:
        assert worker.call(partial(print, "not an answer")) is None
        assert worker.call(partial(int, "x")) == "ValueError: invalid literal for int() with base 10: 'x'"
        assert worker.call(partial(os.write, 2, b"out of memory\n")) == 14
        assert worker.call(partial(os._exit, 7)) == "its process ended with exit code 7 (out of memory)"
        assert "exit code 7" in str(worker.call(partial(int, "1")))


def test_the_worker_needs_nothing_but_numpy() -> None:
    """OpenVINO's interpreter has none of promptfold's requirements."""
    code = "import sys; before = {*sys.modules}; import export.bench.worker; print(*{*sys.modules} - before)"
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    imported = {name.partition(".")[0] for name in printed.split()} - sys.stdlib_module_names
    # The entry of "kernels" is None: it cannot be imported.
    assert {name for name in imported if "cython" not in name} == {"numpy", "export", "train", "kernels"}
