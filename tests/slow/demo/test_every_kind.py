"""What tests/demo shows of a few kinds of models and ways to run PyTorch, shown of all of them."""

from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from demo.engines.engine_process import EngineProcess
from demo.engines.pytorch import BF16, COMPILED, EAGER, PyTorchBackend
from demo.page.tab_prompt import build_prompt_tab
from export.__main__ import main as export_main
from export.bundle.folder import FP32
from tests.conftest import FAMILIES, KINDS, Folders, family_of
from tests.demo.engines import (
    MOODS,
    PAIR,
    both_engines,
    check_kind,
    golden_probabilities,
    make_mood_adapter,
    stage_of,
)
from tests.demo.one_tab import handler, make_page
from tests.demo.test_prompt import check_effect, check_keys_and_values, check_words, seen
from train.common.errors import EngineError, TextError


@pytest.mark.parametrize("kind", KINDS)
def test_engines_and_prompt_are_as_peft(kind: str, adapter: Folders, bundle: Folders, base_model: Folders) -> None:
    check_kind(adapter(kind), bundle(kind), base_model(family_of(kind)))
    with stage_of(adapter(kind), bundles=(bundle(kind),)) as stage:
        check_effect(kind, adapter, base_model, stage)
    if kind in FAMILIES:
        check_words(kind, adapter, base_model)
    else:
        check_keys_and_values(kind, adapter, base_model)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_single_sentence_with_three_labels_is_as_by_peft(family: str, base_model: Folders, tmp_path: Path) -> None:
    """The tiny GPT-2 pads with </s>, with which its texts end, too."""
    folder = make_mood_adapter(tmp_path, base_model(family))
    assert export_main([str(folder), "--out", str(tmp_path / "bundle")]) == 0
    sentence = "word4 word7 word1"
    expected = golden_probabilities((sentence,), folder, base_model(family), tokenizer=folder, n_labels=3)
    with both_engines(folder, tmp_path / "bundle") as pair:
        comparison = pair.steps(sentence, stopped=lambda: True)[0]
        assert comparison.pytorch is not None
        for answer in (comparison.pytorch, comparison.onnx):
            assert tuple(answer.probabilities) == MOODS
            assert list(answer.probabilities.values()) == pytest.approx(expected, abs=1e-5)
            assert answer.label == MOODS[int(expected.argmax())]
        for sentences, words in (((sentence, "word2"), "reads one sentence"), ((" ",), "The sentence is empty")):
            with pytest.raises(TextError, match=words):
                pair.steps(*sentences)
        show = handler(make_page(pair.stage, build_prompt_tab), "show_effect")
        # The second box is hidden here, so what another task left in it does not matter.
        text = seen(show("moods", FP32, EAGER, sentence, "left over"))[2]
    for words in (*MOODS, "20 random prompts, mean", "random prompts leave it so"):
        assert words in text


@pytest.mark.parametrize(("mode", "precision"), [(BF16, "bf16"), (COMPILED, "fp32, compiled")])
def test_pytorch_runs_in_each_of_its_ways(
    mode: str, precision: str, adapter: Folders, bundle: Folders, base_model: Folders
) -> None:
    with both_engines(adapter("bert"), bundle("bert"), pytorch=mode) as pair:
        assert pair.opened.pytorch is not None
        assert pair.opened.pytorch.wait_until_ready().execution.precision == precision
        comparison = pair.steps(*PAIR, stopped=lambda: True)[0]
        # Another length than it was compiled with.
        assert pair.steps("word1", "word2", stopped=lambda: True)[0].pytorch is not None
    expected = golden_probabilities(PAIR, adapter("bert"), base_model("bert"))
    assert comparison.pytorch is not None
    tolerance = 0.02 if mode == BF16 else 1e-5
    assert list(comparison.pytorch.probabilities.values()) == pytest.approx(expected, abs=tolerance)
    assert comparison.as_json()["pytorch_mode"] == mode


def test_without_a_compiler_it_is_refused(adapter: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "no compiler"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    refused = pytest.raises(EngineError, match=r"torch\.compile does not work here .* It needs a C\+\+ compiler")
    make = partial(PyTorchBackend, mode=COMPILED)
    with closing(EngineProcess("PyTorch", make, adapter("bert"), threads=1)) as engine, refused:
        engine.wait_until_ready()
