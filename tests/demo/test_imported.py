"""The page with adapters that were made elsewhere: what is not known is said to be unknown, and no prompt is shown where none is."""

from pathlib import Path

import pytest

from demo.engines.adapters import Choice
from demo.measure.prompt import learned_prompt, measure_sizes, training_curves
from demo.page.app import quality_words
from demo.page.tab_prompt import about_html, learned_html
from tests.train.test_import_peft import Sources, run_import, source  # noqa: F401 -- a fixture
from train.common.errors import UsageError

pytestmark = pytest.mark.usefixtures("one_thread")


def test_unknown_facts_are_not_shown_as_zeros(source: Sources, tmp_path: Path) -> None:  # noqa: F811
    adapter = run_import(source("mlp"), tmp_path / "mine")
    choice = Choice("mine", adapter, ())
    words = quality_words(choice)
    assert "not measured here" in words
    assert "<code>python -m train.evaluate mine --file FILE</code>" in words
    assert "0.0" not in words
    learned = learned_prompt(adapter)
    assert "What mine learned" in learned_html(learned, choice)
    assert training_curves(adapter) is None
    about = about_html(learned, adapter, measure_sizes(adapter, None), None)
    assert "It was learned elsewhere" in about
    assert "Loss and scores per epoch" not in about


def test_a_merged_adapter_has_no_prompt_to_show(source: Sources, tmp_path: Path) -> None:  # noqa: F811
    adapter = run_import(source("lora"), tmp_path / "mine")
    with pytest.raises(UsageError, match=r"has no prompt: its method \(lora, merged\)"):
        learned_prompt(adapter)
