"""Gives a frozen classifier a trainable prompt, as PEFT's model."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from train.common.errors import UsageError
from train.config import P_TUNING, P_TUNING_V2, TrainConfig
from train.model.find import DECODERS, ENCODERS, NO_KEYS_AND_VALUES, BaseModel
from train.model.tokenizer import load_tokenizer

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel


def add_prompt(
    model: "PreTrainedModel", base: BaseModel, config: TrainConfig, *, text_ids: Sequence[int]
) -> "PeftModel":
    """Freeze a classifier and give it a trainable prompt, as PEFT's model.

    The prompt encoder and the whole head are trainable. The prompt starts from ``text_ids``, token ids of real text,
    repeated where they are too few.

    Sources: "GPT Understands, Too", arXiv 2103.10385 (peft/tuners/p_tuning); P-Tuning v2, arXiv 2110.07602
    (peft/tuners/prefix_tuning).
    """
    import torch
    from peft import PrefixTuningConfig, PromptEncoderConfig, TaskType, get_peft_model

    check_method(base, config.method)
    has_pooler = any(name.endswith(".pooler.dense.weight") for name, _ in model.named_parameters())
    common: dict[str, Any] = {
        "task_type": TaskType.SEQ_CLS,
        "num_virtual_tokens": config.virtual_tokens,
        # PEFT adds the classifier, and leaves the dense layer before it frozen unless it is named.
        "modules_to_save": ["pooler"] if has_pooler else None,
    }
    wanted = [text_ids[index % len(text_ids)] for index in range(config.virtual_tokens)]
    reparameterization = config.reparameterization or "mlp"
    if config.method == P_TUNING_V2:
        # Starting from real keys and values: "Prefix-Tuning", arXiv 2101.00190, section 7.4.
        start = _keys_values_of_text(model, base, wanted)
        peft_model: Any = get_peft_model(model, PrefixTuningConfig(**common))
        with torch.no_grad():
            peft_model.prompt_encoder["default"].embedding.weight.copy_(start)
    else:
        peft_model = get_peft_model(
            model,
            PromptEncoderConfig(
                **common,
                # PEFT guesses these two by names that DistilBERT's and OPT's configurations do not use.
                token_dim=base.hidden_size,
                num_attention_heads=model.config.num_attention_heads,
                encoder_reparameterization_type="LSTM" if reparameterization == "lstm" else "MLP",
                encoder_hidden_size=config.encoder_hidden_size,
            ),
        )
        if reparameterization in {"residual", "none"}:
            from train.model.prompted import ResidualPromptEncoder

            # An encoder's row of virtual token 0 is pooled, so it starts from [CLS] or <s>.
            first = model.config.bos_token_id
            if not base.is_decoder:
                first = load_tokenizer(base.folder, base.positions).cls_token_id
            ids = wanted if first is None else [first, *wanted][: config.virtual_tokens]
            vocabulary: Any = model.get_input_embeddings()
            table = vocabulary.weight.detach()[ids].float()
            hidden_size = config.encoder_hidden_size if reparameterization == "residual" else None
            peft_model.prompt_encoder["default"] = ResidualPromptEncoder(table, hidden_size)
    # PEFT would write the folder it was loaded from, which means nothing on another machine.
    peft_model.active_peft_config.base_model_name_or_path = base.hub_name
    return peft_model


def check_method(base: BaseModel, method: str) -> None:
    """Refuse a method that PEFT cannot put on a base model."""
    if method == P_TUNING_V2 and base.model_type in NO_KEYS_AND_VALUES:
        able = [name for name in ENCODERS + DECODERS if name not in NO_KEYS_AND_VALUES]
        raise UsageError(
            f"--method {P_TUNING_V2} does not work with {base.name}: models of type {base.model_type!r} take no learned "
            f"keys and values. Take --method {P_TUNING}, or a model of type {', '.join(able)}."
        )


def _keys_values_of_text(model: "PreTrainedModel", base: BaseModel, ids: Sequence[int]) -> "torch.Tensor":
    """Every layer's keys and values for a text of n_virtual tokens, in the order of PEFT's prefix table.

    shape = (n_virtual, n_layers · 2 · n_key_value_heads · n_head)
    """
    import torch

    backbone: Any = model.base_model
    batch = torch.tensor([list(ids)], device=model.device)
    flat: list[torch.Tensor] = []
    model.eval()  # as `PromptedClassifier` keeps it
    with torch.no_grad():
        if base.is_decoder:
            for layer in backbone(batch, use_cache=True).past_key_values.layers:
                flat += [states[0].transpose(0, 1).flatten(1) for states in (layer.keys, layer.values)]
        else:
            rows = backbone(batch, output_hidden_states=True).hidden_states
            for layer, states in zip(backbone.encoder.layer, rows, strict=False):
                flat += [layer.attention.self.key(states)[0], layer.attention.self.value(states)[0]]
    return torch.cat(flat, dim=1)
