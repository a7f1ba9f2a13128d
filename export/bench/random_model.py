"""An adapter and a bundle around random weights, in the shape of a model."""

import json
from collections.abc import Sequence
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
from train.data.tasks import Task, custom_task
from train.model.find import ENCODERS

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
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
    }
}
"""By the names that ``--shape-of`` knows: configurations."""


RANDOM_ROWS = 64
"""Texts made up for a random model: the gate of its int8 graph, and OpenVINO's calibration."""


HEAD_BIAS = 8.0
"""A random model's head leans so far to its second label that it always gives it.

There is no quality to lose then, and the gate lets every dense layer become int8, which is what shall be timed.
"""


def make_random_bundle(shape_of: str, work: Path, *, device: str) -> tuple[Path, Path]:
    """An adapter and its bundle around random weights: latency does not depend on the values.

    Everything is made by what makes the real ones, the other precisions' gate included (see `HEAD_BIAS`).

    Args:
        shape_of: see `BenchConfig`.
        device: the graph beside fp32 is int8 for `CPU`, fp16 for `CUDA`.

    Returns:
        the folders of the adapter and of the bundle

    Raises:
        ModelError: it is no encoder.
    """
    from transformers import AutoConfig

    from export.fold.config import ExportConfig
    from export.fold.pipeline import export_adapters

    if shape_of in SHAPES:
        settings = AutoConfig.for_model(**SHAPES[shape_of])
    else:
        settings = AutoConfig.from_pretrained(shape_of, local_files_only=True)
    if settings.model_type not in ENCODERS:
        raise ModelError(
            f"--shape-of {shape_of} is of type {settings.model_type!r}. Give an encoder's: {', '.join(ENCODERS)}."
        )
    say(f"making random weights in the shape of {shape_of}")
    words = [f"word{number}" for number in range(32)]
    base_folder, adapter_folder = work / "base", work / "adapter"
    _write_random_base(settings, words, base_folder)
    task = custom_task(("text",), "label", ("first", "second"))
    _write_random_adapter(base_folder, task, adapter_folder)
    generator = np.random.default_rng(0)
    rows = work / "rows.jsonl"
    texts = (" ".join(generator.choice(words, generator.integers(4, 24))) for _ in range(RANDOM_ROWS))
    rows.write_text("".join(json.dumps({"text": text, "label": "second"}) + "\n" for text in texts), encoding="utf-8")
    precision = FP16 if device == CUDA else INT8
    export_adapters(ExportConfig((adapter_folder,), work / "bundle", precision=precision, validation_files=(rows,)))
    return adapter_folder, work / "bundle"


def _write_random_base(settings: "PretrainedConfig", words: Sequence[str], folder: Path) -> None:
    """A base model with random weights and a tokenizer of a few words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import AutoModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    AutoModel.from_config(settings).save_pretrained(folder)
    tokens = ["<s>", "</s>", "<unk>", *words]
    tokens.insert(settings.pad_token_id or 0, "<pad>")
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="<unk>"))  # noqa: S106 -- no password
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[(token, tokens.index(token)) for token in ("<s>", "</s>")]
    )
    names = ["input_ids", "attention_mask", "token_type_ids"]
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        cls_token="<s>",  # noqa: S106
        sep_token="</s>",  # noqa: S106
        eos_token="</s>",  # noqa: S106 -- which decoders want
        pad_token="<pad>",  # noqa: S106
        unk_token="<unk>",  # noqa: S106
        model_input_names=names if getattr(settings, "type_vocab_size", 1) > 1 else names[:2],
    ).save_pretrained(folder)


def _write_random_adapter(
    base_folder: Path, task: Task, folder: Path, *, method: str = P_TUNING, head_bias: float = HEAD_BIAS
) -> None:
    """An adapter as training begins with it: a prompt of 20 tokens, and a head that leans to its second label."""
    import torch

    from train.model.add_prompt import add_prompt
    from train.model.baselines import Baselines
    from train.model.classifier import load_classifier
    from train.model.find import find_base_model, text_limit
    from train.model.tokenizer import base_tokenizer

    base = find_base_model(str(base_folder))
    config = TrainConfig(out=folder, method=method)
    limit = text_limit(base, config.virtual_tokens)
    model = load_classifier(base, task.labels)
    if head_bias:
        head: Any = model.classifier
        with torch.no_grad():
            getattr(head, "out_proj", head).bias[1] = head_bias
    folder.mkdir()
    save_weights(folder, add_prompt(model, base, config, text_ids=[0]), base_tokenizer(base, limit))
    write_record(
        folder,
        ADAPTER,
        {
            "model": {"name": base.name, "sha256": base.sha256},
            "task": task.as_json(),
            "method": method,
            "virtual_tokens": config.virtual_tokens,
            "max_length": limit,
            "validation": {},
            "baselines": {},
            "baseline_rules": Baselines(constant=1, cosine=None).as_json(),
            "n_validation": 0,
            "config": {},
            "data_sha256": {},
        },
    )
