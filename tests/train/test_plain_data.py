"""Settings of strangers: real ones pass, and nothing hostile does, at whatever depth of whichever file it stands."""

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from tests.conftest import Data, Folders
from tests.demo.test_inputs import trying
from tests.test_untrusted import change_json, rehash
from tests.train.test_gguf import write_gguf
from train.__main__ import main
from train.adapter.folder import load_adapter
from train.adapter.record import ADAPTER
from train.common.errors import AdapterError, ModelError, PromptfoldError
from train.model.find import find_base_model, minilm_folder
from train.model.tokenizer import load_tokenizer
from train.untrusted.settings import SETTINGS_FILES, find_complaint, read_plain_object

# What files on the hub hold beside what transformers writes today.
OLD_BERT = {
    "_name_or_path": "/home/me/checkpoints/step.1000/",
    "_num_labels": 3,
    "architectures": ["BertForSequenceClassification"],
    "attention_probs_dropout_prob": 0.1,
    "finetuning_task": "glue/mrpc",
    "gradient_checkpointing": False,
    "hidden_act": "gelu",
    "hidden_size": 768,
    "id2label": {"0": "a/b", "1": "_kernel", "2": "auto_map"},
    "label2id": {"a/b": 0, "_kernel": 1, "auto_map": 2},
    "model_type": "bert",
    "torch_dtype": "torch.float32",
    "transformers_version": "4.6.0.dev0",
    "_attn_implementation_autoset": True,
    "quantization_config": None,
    # cross-encoder/ms-marco-MiniLM-L6-v2
    "sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity", "version": "4.1.0.dev0"},
    "sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity",
}
GPT2 = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "n_ctx": 1024,
    "summary_proj_to_labels": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
}
DEBERTA_V3 = {
    "model_type": "deberta-v2",
    "attention_head_size": 64,
    "conv_act": "gelu",
    "conv_kernel_size": 3,
    "norm_rel_ebd": "layer_norm",
    "pos_att_type": ["p2c", "c2p"],
    "position_buckets": 256,
    "share_att_key": True,
}
QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "rope_scaling": None, "torch_dtype": "bfloat16"}
GEMMA3 = {
    "_sliding_window_pattern": 6,
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "text_config": {
        "model_type": "gemma3_text",
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    },
    "vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False},
}
GENERATION = {"_from_model_config": True, "eos_token_id": [1, 106], "top_p": 0.95, "transformers_version": "4.50.0"}
TOKEN = {"__type": "AddedToken", "content": "<s>", "lstrip": False, "normalized": True, "single_word": False}
TOKENIZER = {
    "added_tokens_decoder": {"0": TOKEN | {"special": True}},
    "bos_token": TOKEN,
    "chat_template": "{% for m in messages %}{{ m.auto_map }}/{{ m['_x'] }}{% endfor %}",
    "extra_special_tokens": {"image_token": "<kernel>", "_private": "</x>"},
    "model_max_length": 1e30,
    "name_or_path": "bert-base-uncased",
    "special_tokens_map_file": "/home/me/special_tokens_map.json",
    "tokenizer_class": "BertTokenizer",
    "tokenizer_file": None,
}
PROMPT = {
    "auto_mapping": None,
    "base_model_name_or_path": "FacebookAI/roberta-large",
    "peft_type": "P_TUNING",
    "peft_version": "0.21.2",
    "revision": None,
    "task_type": "SEQ_CLS",
}
REAL = (OLD_BERT, GPT2, DEBERTA_V3, QWEN3, GEMMA3, GENERATION, TOKENIZER, PROMPT)
WRITTEN = [
    json.loads(AutoConfig.for_model(model_type).to_json_string(use_diff=False))
    for model_type in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
]
"""The default configuration of every model type that transformers knows as a classifier, as it writes it."""

PLACE = st.sampled_from(
    ["stranger/kernel", "stranger/kernel@main:Layer", "evil.Model", "stranger/x--evil.Model", "../x"]
)
ANYTHING = st.one_of(PLACE, st.lists(PLACE, min_size=1), st.dictionaries(st.text(), PLACE, min_size=1), st.just(True))
CODE_KEYS = (
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "_experts_implementation_internal",
    "auto_map",
    "auto_mapping",
    "compression_config",
    "custom_generate",
    "custom_pipelines",
    "hub_kernels",
    "kernel_config",
    "quantization_config",
    "trust_remote_code",
    "use_kernels",
)
PLACE_KEYS = ("configuration_files", "fast_tokenizer_files", "init_inputs", "tokenizer_file", "transformers_weights")
CLASS_KEYS = (
    "architectures",
    "model_type",
    "tokenizer_class",
    "processor_class",
    "feature_extractor_type",
    "torch_dtype",
)
PRIVATE = st.from_regex(r"_[a-z]{1,20}", fullmatch=True).filter(lambda key: key not in OLD_BERT)
TEMPLATES = PLACE.filter(lambda name: "/" in name)
HOSTILE = st.one_of(
    st.tuples(
        st.just("chat_template"), TEMPLATES.map(lambda name: [{"name": "default"}, {"name": name, "template": "x"}])
    ),
    st.tuples(st.just("chat_template"), st.dictionaries(TEMPLATES, st.text(), min_size=1)),
    st.tuples(st.sampled_from(CODE_KEYS + PLACE_KEYS), ANYTHING),
    st.tuples(PRIVATE, ANYTHING),
    st.tuples(st.sampled_from(CLASS_KEYS), PLACE),
)
"""A key and its value."""


def places(value: Any, key: str = "") -> Iterator[dict[str, Any]]:
    """Every object at any depth that holds settings, not a user's words."""
    if isinstance(value, dict) and key not in {"id2label", "label2id", "extra_special_tokens"}:
        yield value
    entries = value.items() if isinstance(value, dict) else ((key, item) for item in value)
    for name, entry in entries:
        if isinstance(entry, dict | list):
            yield from places(entry, name)


@pytest.mark.parametrize("config", REAL, ids=lambda config: next(iter(config)))
def test_what_lies_on_the_hub_passes(config: dict[str, Any]) -> None:
    assert find_complaint(config) is None


def test_what_transformers_writes_passes() -> None:
    assert len(WRITTEN) > 80
    assert {config["model_type"]: why for config in WRITTEN if (why := find_complaint(config))} == {}
    for name in ("config.json", "tokenizer_config.json", "special_tokens_map.json"):
        read_plain_object(minilm_folder() / name, ModelError)


@given(st.sampled_from((*REAL, *WRITTEN)), HOSTILE, st.data())
@settings(trying, max_examples=600)
def test_nothing_hostile_passes_at_any_depth(
    config: dict[str, Any], hostile: tuple[str, Any], data: st.DataObject
) -> None:
    """Nor where lists and unknown objects are wrapped around it."""
    key, value = hostile
    config = copy.deepcopy(config)
    place = data.draw(st.sampled_from(list(places(config))))
    for wrap in data.draw(
        st.lists(st.sampled_from(["text_config", "unknown", "task_specific_params", None]), max_size=3)
    ):
        place[wrap or "list"] = [{}] if wrap is None else {}
        place = place["list"][0] if wrap is None else place[wrap]
    place[key] = value
    why = find_complaint(config)
    assert why is not None
    assert key in why


@pytest.mark.parametrize(
    "file", [name for name in SETTINGS_FILES if name not in {"added_tokens.json", "adapter_config.json"}]
)
def test_every_file_of_settings_is_looked_at(file: str, base_model: Folders, adapter: Folders, tmp_path: Path) -> None:
    """In a base model and in an adapter; the sentence names the file and the key."""
    base, own = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(base_model("bert"), base)
    shutil.copytree(adapter("bert"), own)
    for folder in (base, own):
        if not (folder / file).exists():
            (folder / file).write_text("{}")
        change_json(folder / file, deep=[{"_attn_implementation_internal": "stranger/kernel"}])
    rehash(own, ADAPTER)
    words = (
        rf"{file} wants attention by code from elsewhere.*\(deep\._attn_implementation_internal: 'stranger/kernel'\)"
    )
    with pytest.raises(ModelError, match=words):
        find_base_model(str(base))
    with pytest.raises(AdapterError, match=words):
        load_adapter(own)
    if "token" in file:
        with pytest.raises(ModelError, match=words):
            load_tokenizer(base, 40)


def test_nothing_beside_a_gguf_file_leads_elsewhere(base_model: Folders, tmp_path: Path) -> None:
    """transformers looks there for an adapter, whose base it would load instead, and for a tokenizer's settings."""
    file = tmp_path / "model.gguf"
    write_gguf(file, base_model("llama"))
    find_base_model(str(file))
    for name, content in (
        ("adapter_config.json", {"base_model_name_or_path": "stranger/model"}),
        ("config.json", {"auto_map": {"AutoTokenizer": "evil.Tokenizer"}}),
        ("special_tokens_map.json", {"tokenizer_file": "../elsewhere.json"}),
    ):
        (tmp_path / name).write_text(json.dumps(content))
        with pytest.raises(ModelError, match=name):
            find_base_model(str(file))
        (tmp_path / name).unlink()


def test_a_gguf_files_own_settings_are_those_that_transformers_maps(base_model: Folders, tmp_path: Path) -> None:
    import gguf

    file = tmp_path / "model.gguf"
    hostile = {
        "general.auto_map": "evil.Config",
        "llama._attn_implementation_internal": "stranger/kernel",
        "llama.attn_implementation": "stranger/kernel",
        "llama.quantization_config": "evil",
        "tokenizer.chat_template": "{{ cycler.__init__.__globals__.os.mkdir('hostile') }}",
    }
    add = gguf.GGUFWriter.write_header_to_file

    def with_more(writer: Any, *arguments: Any) -> None:
        for key, value in hostile.items():
            writer.add_string(key, value)
        add(writer, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "write_header_to_file", with_more)
        write_gguf(file, base_model("llama"))
    base = find_base_model(str(file))
    config = AutoConfig.from_pretrained(**base.source)
    assert find_complaint(config.to_dict()) is None
    assert config._attn_implementation is None
    assert load_tokenizer(tmp_path, 40, gguf_file=file.name).chat_template == hostile["tokenizer.chat_template"]


@pytest.mark.parametrize("name", ["RagTokenizer", "AutoTokenizer", "TransfoXLTokenizer", "pipeline", "CanineTokenizer"])
def test_a_class_that_is_no_fast_tokenizer_is_refused_before_it_is_asked(
    name: str, base_model: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Named in the tokenizer's settings, or in config.json where those name none."""
    folder = Path(shutil.copytree(base_model("bert"), tmp_path / "base"))
    for file in ("tokenizer_config.json", "config.json"):
        change_json(folder / file, tokenizer_class=name)
        monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", None)
        with pytest.raises(ModelError, match=f"{file} names a tokenizer without a fast"):
            load_tokenizer(folder, 40)
        change_json(folder / file, tokenizer_class=None)


def test_a_chat_template_is_never_written_outside_of_an_adapter(
    base_model: Folders, data: Data, tmp_path: Path
) -> None:
    """transformers 4.57 takes a template's name for a path as it saves a tokenizer (CVE-2026-9856)."""
    folder = Path(shutil.copytree(base_model("bert"), tmp_path / "base"))
    templates = [{"name": "default", "template": "x"}, {"name": "../../outside", "template": "x"}]
    change_json(folder / "tokenizer_config.json", chat_template=templates)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(tmp_path / "deep" / "er")
    assert (tmp_path / "deep" / "outside.jinja").exists()  # the trap works
    assert main(["--model", str(folder), "--out", str(tmp_path / "a" / "b"), *data.flags]) == 2
    assert not (tmp_path / "a").exists()
    templates[1]["name"] = "tool_use"
    change_json(folder / "tokenizer_config.json", chat_template=templates)
    assert load_tokenizer(folder, 40).chat_template.keys() == {"default", "tool_use"}


def test_a_sentence_names_file_key_and_remedy(base_model: Folders, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(base_model("bert"), tmp_path / "base"))
    change_json(folder / "config.json", quantization_config={"quant_method": "gptq"})
    with pytest.raises(PromptfoldError) as refused:
        find_base_model(str(folder))
    assert str(refused.value) == (
        f"Base model {folder}: {folder / 'config.json'} describes a quantized model, which is not taken "
        "(quantization_config). Take one that needs none of this, from somebody you trust."
    )
