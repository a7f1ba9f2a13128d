"""``python -m export.bench`` on a decoder, on random weights, and on folders that do not fit together."""

from pathlib import Path

import pytest

from export.bench.__main__ import main
from tests.conftest import Data, Folders
from tests.export.test_export_bench import check_engines, multiply_adds, run


@pytest.mark.parametrize("plain", ["plain-fp32", "plain-int8"])
def test_a_decoder_and_the_usual_int8_are_compared_too(
    plain: str, adapter: Folders, bundle: Folders, data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind = {"plain-fp32": "llama", "plain-int8": "bert"}[plain]
    no_openvino = tmp_path / "python"
    no_openvino.write_text("#!/bin/sh\necho 'no module named openvino' >&2\nexit 3\n")
    no_openvino.chmod(0o755)
    wanted = ["peft-eager", plain, "openvino-int8", "ours-fp32"]
    words = [str(adapter(kind)), str(bundle(kind)), "--file", str(data.validation_file), "--shapes", "2x9"]
    words += ["--engines", ",".join(wanted), "--openvino-python", str(no_openvino)]
    engines = check_engines(run(words, capsys)[0], wanted)
    assert [item["status"] for item in engines.values()] == ["measured", "measured", "not run", "measured"]
    assert engines["openvino-int8"]["reason"] == "its process ended with exit code 3 (no module named openvino)"
    if plain == "plain-fp32":
        assert engines[plain]["scores"] == engines["ours-fp32"]["scores"]
    else:
        assert engines[plain]["label_flips"] <= 40


def test_random_weights_in_the_shape_of_a_model(base_model: Folders, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = ["peft-eager-bf16", "ours-fp32", "ours-int8"]
    words = ["--shape-of", str(base_model("roberta")), "--shapes", "1x20", "--engines", ",".join(wanted)]
    document, _ = run(words, capsys)
    engines = check_engines(document, wanted)
    assert [item["status"] for item in engines.values()] == ["measured"] * 3
    assert document["dimensions"]["virtual_tokens"] == 20
    # Without PEFT eager there is nothing to be a ratio of, and no file, so nothing to score.
    assert engines["ours-int8"]["cells"][0]["speedup"] is None
    assert engines["ours-int8"]["scores"] is None


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("{adapter} {tmp}", "is no bundle of promptfold"),
        ("{adapter} {other}", "was not made from"),
        ("{adapter} {bundle} --shapes 1x44", "--shapes 1x44: {adapter} reads at most 43 tokens. Give shorter texts."),
    ],
)
def test_folders_that_do_not_fit_are_refused(
    flags: str, words: str, adapter: Folders, bundle: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"adapter": adapter("bert"), "bundle": bundle("bert"), "other": bundle("llama"), "tmp": tmp_path}
    assert main(flags.format(**places).split()) == 2
    assert words.format(**places) in capsys.readouterr().err


def test_a_gpu_that_is_not_there_is_refused(
    adapter: Folders, bundle: Folders, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main([str(adapter("bert")), str(bundle("bert")), "--shapes", "1x8", "--device", "cuda"]) == 2
    assert "Leave it out to compare on the CPU." in capsys.readouterr().err


def test_a_decoders_prompt_costs_peft_alone(adapter: Folders) -> None:
    """3 texts of 11 tokens behind 5 virtual ones; 2 layers, 32 wide and 64 within; 2 labels."""
    row = 4 * 32 * 32 + 2 * 16 * 32 + 2 * 32 * 64  # projections, attention to 16 rows, feed-forward
    # transformers lets the head see every row, of which one is read.
    peft, others = 2 * 3 * (2 * 16 * row + 16 * 32 * 2), 2 * 3 * (2 * 11 * row + 32 * 2)
    assert multiply_adds(adapter("gpt2"), ("input_ids", "attention_mask")) == [peft, others, others]
