"""``python -m export.bench`` on an encoder, a decoder and random weights, and on folders that do not fit together.

No figure of speed is asserted anywhere.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from export.bench.__main__ import main
from tests.conftest import Data, Folders

Capsys = pytest.CaptureFixture[str]
Json = dict[str, Any]
QUICK = ["--rounds=1", "--threads=1", "--pause=0", "--min-runs=2", "--max-runs=2", "--budget-seconds=0"]


def run(words: list[str], wanted: list[str], capsys: Capsys) -> tuple[Json, dict[str, Json], str]:
    """The JSON document of a command, its engines, and all lines before it.

    No engine is left out, each has figures or a reason, and fp32 means the same everywhere.
    """
    assert main([*words, "--engines", ",".join(wanted), *QUICK]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    document = json.loads(last)
    engines = {item["engine"]: item for item in document["engines"]}
    assert list(engines) == wanted
    texts = {cell["cell"]: cell["texts"] for cell in document["cells"]}
    for item in engines.values():
        if item["status"] == "not run":
            assert (bool(item["reason"]), item["cells"]) == (True, [])
            continue
        assert (item["status"], item["reason"]) == ("measured", "")
        assert item["max_logit_difference"] < (1e-3 if item["precision"] == "fp32" else 1.0)
        assert min(item["load_seconds"], item["peak_memory_mib"], item["file_mib"]) > 0
        for cell in item["cells"]:
            assert 0 < cell["latency_ms"] < math.inf
            assert cell["pairs_per_second"] == pytest.approx(1000 * texts[cell["cell"]] / cell["latency_ms"])
            assert cell["gflop_per_second"] == pytest.approx(1000 * cell["gflop"] / cell["latency_ms"])
            assert (cell["runs"], cell["peak_share"] > 0) == (2, True)
    return document, engines, "\n".join(lines)


def test_engines_are_measured(adapter: Folders, bundle: Folders, data: Data, tmp_path: Path, capsys: Capsys) -> None:
    wanted = ["peft-eager", "peft-eager-fp16", "openvino-int8", "ours-fp32", "ours-fp16"]
    words = [str(adapter("bert")), str(bundle("bert")), "--file", str(data.validation_file), "--shapes", "1x8,3x11"]
    document, engines, lines = run([*words, "--png", str(tmp_path / "a.png")], wanted, capsys)
    reasons = {name: item["reason"] for name, item in engines.items() if item["status"] == "not run"}
    assert reasons == {
        "peft-eager-fp16": "runs on cuda only",
        "openvino-int8": "--openvino-python names no environment with it (pip install openvino nncf)",
        "ours-fp16": f"{bundle('bert')} holds no fp16 graph, only fp32",
    }
    assert all(f"{name}: not run: {reason}" in lines for name, reason in reasons.items())
    for name, tutorial in (("peft-eager", ["file-as-tutorial"]), ("ours-fp32", [])):
        cells = engines[name]["cells"]
        assert [cell["cell"] for cell in cells] == ["1x8", "3x11", "file", *tutorial]
        # Quality stands beside speed.
        assert (set(engines[name]["scores"]), engines[name]["label_flips"]) == ({"accuracy", "f1"}, 0)
        assert all(len(cell["speedup_per_round"]) == 1 for cell in cells)
    # The rows were answered in their own order, whatever the batches: else this would be chance.
    scores = json.loads((adapter("bert") / "training.json").read_text())["validation"]
    assert engines["ours-fp32"]["scores"] == pytest.approx(scores)
    assert [best["cell"] for best in document["best"]] == ["1x8", "3x11", "file"]
    assert {(best["ours"], best["peer"]) for best in document["best"]} == {("ours-fp32", "peft-eager")}
    assert document["best"][2]["tutorial_speedup"] > 0
    assert {peak["precision"] for peak in document["peaks"]} == {"fp32", "bf16", "int8"}
    assert (document["rounds"], document["threads"], document["device"]) == (1, 1, "cpu")
    assert "core" in document["machine"]
    with Image.open(tmp_path / "a.png", formats=["PNG"]) as image:
        image.verify()


@pytest.mark.parametrize("plain", ["plain-fp32", "plain-int8"])
def test_a_decoder_and_the_usual_int8_are_compared_too(
    plain: str, adapter: Folders, bundle: Folders, data: Data, tmp_path: Path, capsys: Capsys
) -> None:
    kind = {"plain-fp32": "llama", "plain-int8": "bert"}[plain]
    no_openvino = tmp_path / "python"
    no_openvino.write_text("#!/bin/sh\necho 'no module named openvino' >&2\nexit 3\n")
    no_openvino.chmod(0o755)
    wanted = ["peft-eager", plain, "openvino-int8", "ours-fp32"]
    words = [str(adapter(kind)), str(bundle(kind)), "--file", str(data.validation_file), "--shapes", "2x9"]
    _, engines, _ = run([*words, "--openvino-python", str(no_openvino)], wanted, capsys)
    assert [item["status"] for item in engines.values()] == ["measured", "measured", "not run", "measured"]
    assert engines["openvino-int8"]["reason"] == "its process ended with exit code 3 (no module named openvino)"
    if plain == "plain-fp32":
        assert engines[plain]["scores"] == engines["ours-fp32"]["scores"]
    else:
        assert engines[plain]["label_flips"] <= 40


def test_random_weights_in_the_shape_of_a_model(base_model: Folders, capsys: Capsys) -> None:
    wanted = ["peft-eager-bf16", "ours-fp32", "ours-int8"]
    words = ["--shape-of", str(base_model("roberta")), "--shapes", "1x20"]
    document, engines, _ = run(words, wanted, capsys)
    assert [item["status"] for item in engines.values()] == ["measured"] * 3
    assert document["dimensions"]["virtual_tokens"] == 20
    # Without PEFT eager there is nothing to be a ratio of, and no file, so nothing to score.
    assert engines["ours-int8"]["cells"][0]["speedup"] is engines["ours-int8"]["scores"] is None


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("{adapter} {adapter}", "is no bundle of promptfold"),
        ("{adapter} {other}", "was not made from"),
        ("{adapter} {bundle} --shapes 1x44", "--shapes 1x44: {adapter} reads at most 43 tokens. Give shorter texts."),
        ("{adapter} {bundle} --shapes 1x8 --device cuda", "Leave it out to compare on the CPU."),
    ],
)
def test_what_does_not_fit_is_refused(
    flags: str, words: str, adapter: Folders, bundle: Folders, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    places = {"adapter": adapter("bert"), "bundle": bundle("bert"), "other": bundle("llama")}
    assert main(flags.format(**places).split()) == 2
    assert words.format(**places) in capsys.readouterr().err
