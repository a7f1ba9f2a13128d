"""``python -m export.bench`` through its entry point, on tiny models; no figure of speed is asserted anywhere."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from export.bench.__main__ import main
from export.bench.config import Cell, Shape
from export.bench.engines import ENGINES, Job, Measured, Peak, Plan, Timed
from export.bench.models import count_multiply_adds, family_module
from export.bench.prepare import Prepared
from export.bench.report import document, tables
from export.bench.worker import padded_on_the_left
from tests.conftest import ROOT, Data, Folders
from train.adapter.folder import load_adapter
from train.adapter.peft import find_adapter_base
from train.data.tasks import MRPC

QUICK = ["--rounds=1", "--threads=1", "--pause=0", "--min-runs=2", "--max-runs=2", "--budget-seconds=0"]


def run(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], str]:
    """The JSON document of a command, and all lines before it."""
    assert main([*words, *QUICK]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    return json.loads(last), "\n".join(lines)


def check_engines(document: dict[str, Any], wanted: list[str]) -> dict[str, dict[str, Any]]:
    """None is left out, each has figures or a reason, and fp32 means the same everywhere."""
    engines = {item["engine"]: item for item in document["engines"]}
    assert list(engines) == wanted
    for item in engines.values():
        if item["status"] == "not run":
            assert item["reason"]
            assert item["cells"] == []
            continue
        assert (item["status"], item["reason"]) == ("measured", "")
        assert item["max_logit_difference"] < (1e-3 if item["precision"] == "fp32" else 1.0)
        assert min(item["load_seconds"], item["peak_memory_mib"], item["file_mib"]) > 0
        texts = {cell["cell"]: cell["texts"] for cell in document["cells"]}
        for cell in item["cells"]:
            assert 0 < cell["latency_ms"] < math.inf
            assert cell["pairs_per_second"] == pytest.approx(1000 * texts[cell["cell"]] / cell["latency_ms"])
            assert cell["gflop_per_second"] == pytest.approx(1000 * cell["gflop"] / cell["latency_ms"])
            assert cell["runs"] == 2
            assert cell["peak_share"] > 0
    return engines


def test_every_engine_is_measured_on_every_cell_or_says_why_not(
    adapter: Folders, bundle: Folders, data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = ["peft-eager", "peft-eager-fp16", "openvino-int8", "ours-fp32", "ours-fp16"]
    words = [str(adapter("bert")), str(bundle("bert")), "--file", str(data.validation_file), "--shapes", "1x8,3x11"]
    words += ["--engines", ",".join(wanted), "--png", str(tmp_path / "a.png")]
    document, lines = run(words, capsys)

    engines = check_engines(document, wanted)
    reasons = {name: item["reason"] for name, item in engines.items() if item["status"] == "not run"}
    assert reasons == {
        "peft-eager-fp16": "runs on cuda only",
        "openvino-int8": "--openvino-python names no environment with OpenVINO (pip install openvino nncf)",
        "ours-fp16": f"{bundle('bert')} holds no fp16 graph, only fp32",
    }
    for name, reason in reasons.items():
        assert f"{name}: not run: {reason}" in lines
    for name, item in engines.items():
        if name not in reasons:
            tutorial = ["file-as-tutorial"] if name == "peft-eager" else []
            assert [cell["cell"] for cell in item["cells"]] == ["1x8", "3x11", "file", *tutorial]
            # Quality stands beside speed.
            assert set(item["scores"]) == {"accuracy", "f1"}
            assert item["label_flips"] == 0
            assert all(len(cell["speedup_per_round"]) == 1 for cell in item["cells"])
    # The rows were answered in their own order, whatever the batches: else this would be chance.
    assert engines["ours-fp32"]["scores"] == pytest.approx(
        json.loads((adapter("bert") / "training.json").read_text())["validation"]
    )
    assert [best["cell"] for best in document["best"]] == ["1x8", "3x11", "file"]
    assert {best["ours"] for best in document["best"]} == {"ours-fp32"}
    assert {best["peer"] for best in document["best"]} == {"peft-eager"}
    assert document["best"][2]["tutorial_speedup"] > 0
    assert {peak["precision"] for peak in document["peaks"]} == {"fp32", "bf16", "int8"}
    assert (document["rounds"], document["threads"], document["device"]) == (1, 1, "cpu")
    assert "core" in document["machine"]
    with Image.open(tmp_path / "a.png") as image:
        image.verify()
        assert image.format == "PNG"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("", "Give an ADAPTER and the BUNDLE"),
        ("{adapter}", "Give an ADAPTER and the BUNDLE"),
        (
            "{adapter} {bundle} --engines ours-int4",
            "--engines ours-int4: there is no such engine. Choose from peft-eager",
        ),
        ("{adapter} {bundle} --shapes 1", "--shapes 1: write texts×tokens, such as 8x60"),
        ("{adapter} {bundle} --shapes 0x5", "--shapes 0x5: write"),
        ("{adapter} {bundle} --shapes ,", "There is nothing to time"),
        ("{adapter} {bundle} --rounds 0", "--rounds 0: give a whole number of at least 1"),
        ("{adapter} {bundle} --threads 0", "--threads 0: give"),
        ("{adapter} {bundle} --pause -1", "--pause -1: give seconds"),
        ("{adapter} {bundle} --device tpu", 'Invalid value "tpu" for --device. Choose from: "cpu", "cuda".'),
        ("{adapter} {bundle} --openvino-python nowhere", "--openvino-python nowhere: there is no such program"),
        ("{adapter} {bundle} --png {tmp}/no/a.png", "in a folder that exists"),
        ("{adapter} {bundle} --png {tmp}/a.jpg", "give a name that ends in .png"),
        ("{adapter} {bundle} --shape-of roberta-large", "makes its own adapter"),
        ("--shape-of roberta-large --file {tmp}/f.jsonl", "random weights, which score nothing"),
        ("--shape-of roberta-huge", "give roberta-large, or a folder that holds a model's config.json"),
        ("{adapter} {bundle} --what", "Unknown option: --what"),
    ],
)
def test_what_cannot_be_used_is_refused_at_once(
    flags: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = flags.format(adapter=tmp_path / "a", bundle=tmp_path / "b", tmp=tmp_path)
    assert main(flags.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert words in error


def multiply_adds(folder: Path, inputs: tuple[str, ...]) -> list[int]:
    """Counts of PEFT, of the plain export, and of ours, for two batches of 3 texts of 11 tokens."""
    adapter = load_adapter(folder)
    base, batch = find_adapter_base(adapter), {name: np.ones((3, 11), np.int64) for name in inputs}
    modules = [family_module(family, adapter, base, 0) for family in ("peft", "plain", "ours")]
    return [count_multiply_adds(module, {"a": [batch, batch]})["a"] for module in modules]


def test_multiply_adds_are_those_of_a_count_by_hand(adapter: Folders) -> None:
    """3 texts of 11 tokens behind 5 virtual ones; 2 layers of 4 heads, 32 wide and 64 within; 2 labels."""
    counted = multiply_adds(adapter("bert"), ("input_ids", "attention_mask", "token_type_ids"))
    row = 4 * 32 * 32 + 2 * 16 * 32 + 2 * 32 * 64  # projections, attention to 16 rows, feed-forward
    # In the last layer ours has one row, and each head meets whole rows.
    last = 4 * 32 * 32 + 2 * 4 * 16 * 32 + 2 * 32 * 64
    head = 32 * 32 + 32 * 2
    whole = 2 * 3 * (2 * 16 * row + head)
    assert counted == [whole, whole, 2 * 3 * (16 * row + last + head)]


def measured(
    latencies_ms: dict[str, list[float]], *, difference: float = 0.0, labels: list[int] | None = None
) -> Measured:
    """What a process could have answered."""
    cells = {name: Timed(9.0, tuple(values)) for name, values in latencies_ms.items()}
    return Measured("", "", 1.0, 1.0, None, 1.0, difference, cells, {} if labels is None else {"file": labels})


def test_ratios_are_of_one_round_and_figures_are_medians_of_rounds() -> None:
    prepared = Prepared(
        job=Job("cpu", 1, Plan(0, 1, 1, 0), "", "", "", 0, ""),
        about={},
        cells=(Cell("1x8", "", 1, (Shape(1, 8),)), Cell("file", "", 4, (Shape(4, 8),))),
        multiply_adds={family: {"1x8": 1_250_000, "file": 1} for family in ("peft", "plain", "ours")},
        graphs={},
        task=MRPC,
        expected=(0, 1, 1, 0),
    )
    right, wrong = [0, 1, 1, 0], [0, 1, 0, 0]
    rounds: list[dict[str, Measured | str]] = [
        {
            "peft-eager": measured({"1x8": [10, 10, 40], "file": [8]}, labels=right),
            "plain-fp32": measured({"1x8": [1, 1, 1], "file": [1]}, difference=0.5, labels=wrong),
            "plain-int8": measured({"1x8": [5, 5, 5], "file": [4]}, difference=0.5, labels=wrong),
            "openvino-int8": "no",
            "ours-int8": measured({"1x8": [2, 2, 2], "file": [2]}, labels=right),
        },
        {
            "peft-eager": measured({"1x8": [30, 30, 30], "file": [8]}, labels=right),
            "plain-fp32": measured({"1x8": [1, 1, 1], "file": [1]}, labels=wrong),
            "plain-int8": measured({"1x8": [10, 10, 10], "file": [4]}, labels=wrong),
            "openvino-int8": "no",
            "ours-int8": measured({"1x8": [3, 3, 3], "file": [2]}, labels=right),
        },
    ]
    found = document(prepared, rounds, [Peak("fp32", 4.0, "")])
    by_name = {result["engine"]: result for result in found["engines"]}
    statuses = [result["status"] for result in found["engines"]]
    assert statuses == ["measured", "wrong", "measured", "not run", "measured"]
    assert "differs from PEFT's by 0.5" in by_name["plain-fp32"]["reason"]
    assert by_name["openvino-int8"]["cells"] == []
    ours = by_name["ours-int8"]["cells"][0]
    assert (ours["latency_ms"], ours["latency_ms_per_round"], ours["runs"]) == (2.5, (2, 3), 6)
    assert (ours["speedup_per_round"], ours["speedup"]) == ((5, 10), 7.5)
    assert (ours["pairs_per_second"], ours["gflop"], ours["gflop_per_second"]) == (400, 0.0025, 1)
    assert ours["peak_share"] is None
    assert by_name["peft-eager"]["cells"][0]["peak_share"] == pytest.approx(0.0025 / 0.020 / 4)
    assert by_name["plain-int8"]["scores"] == {"accuracy": 0.75, "f1": pytest.approx(2 / 3)}
    assert by_name["plain-int8"]["label_flips"] == 1
    # The wrong one is the fastest, and does not count.
    best = found["best"][0]
    assert (best["ours"], best["peer"]) == ("ours-int8", "plain-int8")
    assert best["peer_speedup_per_round"] == (5 / 2, 10 / 3)
    assert best["speedup"] == 7.5
    assert best["tutorial_speedup"] is None
    assert "7.50" in "\n".join(tables(prepared, found))


def test_padding_moves_to_the_left_for_pefts_decoders() -> None:
    batch = {
        "input_ids": np.array([[5, 6, 7, 8], [9, 4, 1, 1]]),
        "attention_mask": np.array([[1, 1, 1, 1], [1, 1, 0, 0]]),
    }
    moved = padded_on_the_left(batch)
    assert moved["input_ids"].tolist() == [[5, 6, 7, 8], [1, 1, 9, 4]]
    assert moved["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]


def test_the_worker_needs_nothing_but_numpy() -> None:
    """OpenVINO's interpreter has none of promptfold's requirements."""
    code = """
import sys
import numpy

class OnlyTheStandardLibrary:
    def find_spec(self, name, path=None, target=None):
        first = name.partition(".")[0]
        if first not in {"numpy", "export", "train"} and first not in sys.stdlib_module_names:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, OnlyTheStandardLibrary())
try:
    import pydantic
except ModuleNotFoundError:
    import export.bench.worker
    print("imported")
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ended.stdout, ended.stderr) == ("imported\n", "")


def test_the_names_of_the_engines_say_what_they_are() -> None:
    for name, engine in ENGINES.items():
        assert name.startswith(engine.family)
        assert engine.precision == "fp32" or name.endswith(engine.precision)
        assert bool(engine.compile_mode) == ("compile" in name)
        assert (engine.cuda_graphs or engine.compile_mode == "reduce-overhead") == ("graphs" in name)
