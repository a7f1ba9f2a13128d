"""The code that a model card prints for transformers and PEFT alone, run as it stands there."""

import ast
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import SHIPPED, Data, Folders, MadeOnce, Second, train_kind
from tests.task_kinds import TASK_KINDS, kind_adapter
from tests.test_readme import ROOT, run_block
from tests.train.peft_sources import make_source
from tests.train.test_gguf import write_gguf
from train.adapter.card import model_card
from train.adapter.folder import load_adapter
from train.adapter.peft import find_adapter_base, load_prompted_classifier
from train.common.console import quiet_transformers
from train.common.folder_record import content_of
from train.import_peft import main as import_main
from train.model.tokenizer import load_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = (
    # GPT-2's padding token is the one that ends texts.
    ("word3 word4 </s>", "word5 </s>"),
    # Over every limit.
    (" ".join(f"word{i % 90}" for i in range(60)), " ".join(f"word{i % 7}" for i in range(30))),
)


def card_code(folder: Path) -> str:
    """The Python of an adapter's card."""
    text = (folder / "README.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return str(code)


def check_card(folder: Path) -> str:
    """Check the code of an adapter's card, and return it."""
    code = card_code(folder)
    check_code(code, folder)
    return code


def check_code(code: str, folder: Path) -> None:
    """It gives the logits that the adapter has here in a padded batch."""
    adapter = load_adapter(folder)
    base = find_adapter_base(adapter)
    names: dict[str, Any] = {}
    places = {"path/to/this/folder": str(folder)}
    if base.gguf_file is None:
        places[f'"{base.hub_name}"'] = f'"{base.folder}"'
    with quiet_transformers():
        printed = ast.literal_eval(run_block(code, places, names))
    assert len(printed) == len(adapter.labels)
    texts = [sentences[: len(adapter.task.text_columns)] for sentences in TEXTS]
    found = torch.tensor([names["logits"](*sentences) for sentences in texts])
    tokenizer = load_tokenizer(folder, adapter.max_length)
    columns = [list(column) for column in zip(*texts, strict=True)]
    batch = tokenizer(*columns, truncation="longest_first", padding=True, return_tensors="pt")
    assert not batch["attention_mask"].all(), "or the batch has no padding"
    with torch.inference_mode():
        logits = load_prompted_classifier(adapter, base)(**batch)["logits"]
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-5)


def imported(source: Path, base: Path, out: Path, sentences: str) -> Path:
    assert import_main([str(source), "--out", str(out), "--base-model", str(base), sentences]) == 0
    return out


@pytest.mark.parametrize("kind", ["bert", "roberta-v2", "gpt2"])
def test_the_code_of_a_card_gives_the_adapters_logits(kind: str, adapter: Folders) -> None:
    code = check_card(adapter(kind))
    assert ("register_forward_hook" in code) == (kind == "roberta-v2")
    assert ("pad_token_id = None" in code) == (kind == "gpt2")


def test_the_code_of_a_card_reads_a_padding_token_that_ends_a_text(
    base_model: Folders, data: Data, tmp_path: Path
) -> None:
    base = shutil.copytree(base_model("llama"), tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"pad_token_id": config["eos_token_id"]}))
    train_kind("llama-v2", base, tmp_path / "out", "--epochs 1", data.flags)
    check_card(tmp_path / "out")
    # What the code guards against: transformers passes over it.
    code = card_code(tmp_path / "out").replace("model.config.pad_token_id = None", "")
    with pytest.raises(AssertionError, match="not close"):
        check_code(code, tmp_path / "out")


def test_the_code_of_a_card_knows_the_number_of_labels(second: Second) -> None:
    assert "num_labels=3" in check_card(second("bert", three=True))


@pytest.mark.parametrize("task_kind", TASK_KINDS)
def test_the_code_of_a_card_knows_the_kind_of_task(task_kind: str, made_once: MadeOnce, base_model: Folders) -> None:
    assert f'problem_type="{task_kind}' in check_card(kind_adapter(made_once, base_model, "bert", task_kind))


@pytest.mark.parametrize(("kind", "family", "n_labels"), [("lora", "gpt2", 1), ("prefix", "roberta", 3)])
def test_the_code_of_an_imported_adapters_card(
    kind: str, family: str, n_labels: int, base_model: Folders, tmp_path: Path
) -> None:
    base = base_model(family)
    source = make_source(tmp_path / "source", base, kind, n_labels=n_labels)
    code = check_card(imported(source, base, tmp_path / "out", "--pair"))
    assert ('problem_type="regression"' in code) == (n_labels == 1)
    assert ("Its only logit is the number." in (tmp_path / "out" / "README.md").read_text()) == (n_labels == 1)


def test_the_code_of_a_card_reads_a_gguf_file(base_model: Folders, data: Data, tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", base_model("llama"))
    train_kind("llama", tmp_path / "tiny.gguf", tmp_path / "out", "--epochs 1", data.flags)
    assert 'gguf_file="tiny.gguf"' in check_card(tmp_path / "out")


@pytest.mark.parametrize("name", SHIPPED)
def test_the_card_of_an_adapter_that_ships_is_todays_and_its_code_runs(name: str, tmp_path: Path) -> None:
    folder = shutil.copytree(ROOT / "demo" / "adapters" / name, tmp_path / name)
    training = json.loads((folder / "training.json").read_text())
    assert (folder / "README.md").read_text() == model_card(content_of(training))
    check_card(folder)
