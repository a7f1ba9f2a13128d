"""An adapter and a bundle with random weights, in the shape of a model: latency does not depend on the values."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from export.bench.engines import CUDA
from export.bundle.folder import FP16, INT8
from train.adapter.folder import save_weights
from train.adapter.record import ADAPTER
from train.common.console import say
from train.common.errors import ModelError
from train.common.folder_record import write_record
from train.config import P_TUNING, TrainConfig
from train.data.tasks import custom_task
from train.model.find import ENCODERS
from train.untrusted.settings import refuse_settings

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SHAPES: dict[str, dict[str, Any]] = {
    "roberta-large": {
        "model_type": "roberta",
        "vocab_size": 50265,
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-5,
    }
}
"""Configurations by the names that ``--shape-of`` knows."""
WORDS = [f"word{number}" for number in range(32)]
RANDOM_ROWS = 64
"""Made-up texts: for the gate of a random model's int8 graph, and for OpenVINO's calibration."""
HEAD_BIAS = 8.0
"""Added to the second label's logit. A random model then always gives that label, so that there is no quality to lose,
and the gate lets every dense layer become int8, which is what shall be timed."""


def make_random_bundle(shape_of: str, work: Path, *, device: str) -> tuple[Path, Path]:
    """Make an adapter and its bundle with the code that makes the real ones, the gate included; their folders."""
    from transformers import AutoConfig

    from export.fold.config import ExportConfig
    from export.fold.pipeline import export_adapters

    if shape_of in SHAPES:
        settings = AutoConfig.for_model(**SHAPES[shape_of])
    else:
        refuse_settings(Path(shape_of), ModelError, who=f"--shape-of {shape_of}: ")
        settings = AutoConfig.from_pretrained(shape_of, local_files_only=True, trust_remote_code=False)
    kind = settings.model_type
    if kind not in ENCODERS:
        raise ModelError(f"--shape-of {shape_of} is of type {kind!r}. Give an encoder's: {', '.join(ENCODERS)}.")
    say(f"making random weights in the shape of {shape_of}")
    adapter, bundle, rows = work / "adapter", work / "bundle", work / "rows.jsonl"
    write_random_base(settings, work / "base")
    write_random_adapter(work / "base", adapter)
    generator = np.random.default_rng(0)
    texts = (" ".join(generator.choice(WORDS, generator.integers(4, 24))) for _ in range(RANDOM_ROWS))
    rows.write_text("".join(json.dumps({"text": text, "label": "second"}) + "\n" for text in texts), encoding="utf-8")
    precision = FP16 if device == CUDA else INT8
    export_adapters(ExportConfig((adapter,), out=bundle, precision=precision, validation_files=(rows,)))
    return adapter, bundle


def write_random_base(settings: "PretrainedConfig", folder: Path) -> None:
    """Write a base model with random weights and a tokenizer of a few words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    AutoModel.from_config(settings).save_pretrained(folder)
    tokens = ["<s>", "</s>", "<unk>", *WORDS]
    tokens.insert(settings.pad_token_id or 0, "<pad>")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))  # noqa: S106 -- no password
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = ["input_ids", "attention_mask", "token_type_ids"]
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=names if getattr(settings, "type_vocab_size", 1) > 1 else names[:2],
        **{"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>"},
    ).save_pretrained(folder)


def write_random_adapter(
    base_folder: Path, folder: Path, *, method: str = P_TUNING, head_bias: float = HEAD_BIAS
) -> None:
    """Write an adapter as training begins with it: a prompt of 20 tokens, and a head that leans to its second label."""
    import torch

    from train.model.add_prompt import add_prompt
    from train.model.classifier import load_classifier
    from train.model.find import find_base_model, text_limit
    from train.model.tokenizer import base_tokenizer

    base, task = find_base_model(str(base_folder)), custom_task(("text",), "label", ("first", "second"))
    config = TrainConfig(out=folder, method=method)
    limit = text_limit(base, config.virtual_tokens)
    model = load_classifier(base, task.labels)
    if head_bias:
        head: Any = model.classifier
        with torch.no_grad():
            getattr(head, "out_proj", head).bias[1] = head_bias
    folder.mkdir()
    save_weights(folder, add_prompt(model, base, config, text_ids=[0]), base_tokenizer(base, limit))
    record: dict[str, Any] = {
        "model": {"name": base.name, "sha256": base.sha256},
        "task": task.as_json(),
        "method": method,
        "virtual_tokens": config.virtual_tokens,
        "max_length": limit,
        "baseline_rules": {"constant": 1, "cosine": None},
        "n_validation": 0,
    }
    write_record(folder, ADAPTER, record | {name: {} for name in ("validation", "baselines", "config", "data_sha256")})
