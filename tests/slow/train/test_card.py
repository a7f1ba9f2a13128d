"""The code of the model card, for every family with every method, and for each kind of PEFT's adapters."""

from pathlib import Path

import pytest

from tests.conftest import GENERIC_KINDS, KINDS, Folders
from tests.train.peft_sources import MERGED_KINDS, PROMPT_KINDS, make_source
from tests.train.test_card import check_card, imported

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("kind", [*KINDS, *GENERIC_KINDS])
def test_the_code_of_a_card_gives_the_adapters_logits(kind: str, adapter: Folders) -> None:
    check_card(adapter(kind))


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's own, of a missing CUDA extension and of norms
@pytest.mark.parametrize("kind", [kind for kind in (*PROMPT_KINDS, *MERGED_KINDS) if kind != "multitask"])
def test_the_code_of_an_imported_adapters_card(kind: str, base_model: Folders, tmp_path: Path) -> None:
    base = base_model("bert")
    source = make_source(tmp_path / "source", base, kind)
    check_card(imported(source, base, tmp_path / "out", "--single"))
