"""Loads a base model as a classifier, and puts a prompt before its text."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from train.common.console import quiet_transformers
from train.common.errors import ModelError, first_line
from train.config import CLASSIFICATION, P_TUNING_V2
from train.model.architecture import head_modules
from train.model.find import BERT_LIKE, DECODERS, MALFORMED, BaseModel
from train.model.loss import PROBLEM_TYPES

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from train.model.prompted import PromptedClassifier


def load_classifier(
    base: BaseModel, labels: Sequence[str], *, kind: str = CLASSIFICATION, attention: str | None = None
) -> "PreTrainedModel":
    """Load the base model with a new head for a kind of task, whose weights come from torch's global generator.

    ``attention`` is the implementation of attention; by default transformers chooses.
    """
    return load_with_random(base, labels, kind=kind, attention=attention)[0]


def load_with_random(
    base: BaseModel, labels: Sequence[str], *, kind: str = CLASSIFICATION, attention: str | None = None
) -> "tuple[PreTrainedModel, list[str]]":
    """As `load_classifier`; with it the names of the head's weights that the base model lacks, which are random."""
    from safetensors import SafetensorError
    from transformers import AutoModelForSequenceClassification

    try:
        with quiet_transformers():
            model, loaded = AutoModelForSequenceClassification.from_pretrained(
                **base.source,
                output_loading_info=True,
                num_labels=len(labels),
                problem_type=PROBLEM_TYPES[kind],
                id2label=dict(enumerate(labels)),
                label2id={label: index for index, label in enumerate(labels)},
                ignore_mismatched_sizes=True,  # replaces a head for another number of labels
                attn_implementation=attention,
                use_safetensors=base.gguf_file is None,
            )
    except (*MALFORMED, SafetensorError, RuntimeError, ImportError) as cause:
        raise ModelError(
            f"Base model {base.name}: the weights in {base.folder} cannot be loaded ({first_line(cause)}). "
            "Take an unbroken copy."
        ) from cause
    random = _random_weights(base, model, loaded)
    if model.config.pad_token_id is None:
        # transformers' own forward, which PEFT calls, takes no batch without one.
        end = model.config.eos_token_id
        model.config.pad_token_id = end[0] if isinstance(end, list) else end
    return model, random


def _random_weights(base: BaseModel, model: "PreTrainedModel", loaded: Mapping[str, Any]) -> list[str]:
    """Names of weights that the files lack or hold in another shape, from transformers' loading info.

    transformers fills them with random numbers, so they may be the head's alone: a ModelError for those of the backbone.
    """
    heads = {f".{name}." for name in head_modules(model)}
    # transformers 4 lists names; transformers 5 tuples of a name and two shapes.
    mismatched = (entry if isinstance(entry, str) else entry[0] for entry in loaded["mismatched_keys"])
    random = [*loaded["missing_keys"], *mismatched]
    backbone = f"{model.base_model_prefix}."
    lost = [name for name in random if not any(part in f".{name.removeprefix(backbone)}" for part in heads)]
    if lost:
        raise ModelError(
            f"Base model {base.name}: the weights in {base.folder} lack {len(lost)} tensors of a model of type "
            f"{base.model_type!r}, or hold them in another shape, such as {min(lost)}. Take an unbroken copy."
        )
    return random


def drop_cache(_: object, __: object, outputs: Any) -> Any:
    """Remove the cache, which PEFT's `_prefix_tuning_forward` takes for the pooled row in models without a pooler."""
    if getattr(outputs, "past_key_values", None) is None:
        return outputs
    return type(outputs)(**{name: value for name, value in outputs.items() if name != "past_key_values"})


def put_prompt_before(
    model: "PreTrainedModel", base: BaseModel, method: str, prompt: "torch.Tensor | torch.nn.Module"
) -> "PromptedClassifier":
    """The one definition of "base + prompt → logits" for a kind of model and a method.

    The prompt is the table, or the prompt encoder that computes it. Where only one row of the model's last layer is
    read, that layer is replaced.
    """
    from train.model.prompted import EmbeddingPrompt, KeyValuePrompt, PooledRowLayer, has_absolute_positions

    if base.model_type in BERT_LIKE and has_absolute_positions(model.config):
        backbone: Any = model.base_model
        layers = backbone.encoder.layer
        if not isinstance(layers[-1], PooledRowLayer):
            layers[-1] = PooledRowLayer(layers[-1])
    in_every_layer = method == P_TUNING_V2
    if base.model_type in DECODERS or in_every_layer:
        return KeyValuePrompt(model, prompt, is_decoder=base.is_decoder, in_every_layer=in_every_layer)
    return EmbeddingPrompt(model, prompt, is_decoder=base.is_decoder)


def prompted_classifier(
    model: "PreTrainedModel", base: BaseModel, method: str, adapter_state: "dict[str, torch.Tensor]"
) -> "PromptedClassifier":
    """A classifier with an adapter's prompt and head, in evaluation mode.

    The adapter's tensors are ``prompt_embeddings``, shape = (n_virtual, n_width), and the head's under ``base_model.``.
    """
    state = dict(adapter_state)
    prompt = state.pop("prompt_embeddings")
    head = {name.removeprefix("base_model."): tensor for name, tensor in state.items()}
    try:
        result = model.load_state_dict(head, strict=False)
    except RuntimeError as cause:
        raise ModelError(f"The adapter's head does not fit the base model ({first_line(cause)}).") from cause
    if result.unexpected_keys:
        raise ModelError(
            f"The adapter holds tensors that the base model has no place for: {', '.join(result.unexpected_keys)}."
        )
    return put_prompt_before(model, base, method, prompt).eval()
