"""``python -m export.bench`` on a decoder, on random weights, and on folders that do not fit together."""

from pathlib import Path

import pytest

from export.bench.__main__ import main
from tests.conftest import Data, Folders
from tests.export.test_export_bench import Capsys, run


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
