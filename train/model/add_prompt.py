"""A frozen classifier → the same with a trainable prompt, as PEFT's model."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from train.common.errors import UsageError
from train.config import P_TUNING, P_TUNING_V2, TrainConfig
from train.model.find import DECODERS, ENCODERS, NO_KEYS_AND_VALUES, BaseModel
from train.model.tokenizer import first_token

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel


def add_prompt(
    model: "PreTrainedModel", base: BaseModel, config: TrainConfig, *, text_ids: Sequence[int]
) -> "PeftModel":
    """Freeze a classifier and give it a trainable prompt, as PEFT's model.

    Trainable are the prompt (encoder) and the whole head. In most models the head has a dense layer of
    its own; BERT's is the pooler, which PEFT would leave frozen, so it is named here.

    Args:
        config: of the method: its name, its sizes, what computes the prompt.
        text_ids: token ids of real text from which a prompt may start; repeated where they are too few.

    Raises:
        UsageError: the method does not work with this kind of model.

    Source: "GPT Understands, Too", arXiv 2103.10385 (peft/tuners/p_tuning); P-Tuning v2, arXiv 2110.07602
    (peft/tuners/prefix_tuning).
    """
    import torch
    from peft import PrefixTuningConfig, PromptEncoderConfig, TaskType, get_peft_model

    check_method(base, config.method)
    has_pooler = any(name.endswith(".pooler.dense.weight") for name, _ in model.named_parameters())
    common: dict[str, Any] = {
        "task_type": TaskType.SEQ_CLS,
        "num_virtual_tokens": config.virtual_tokens,
        # PEFT adds the classifier to this list by itself.
        "modules_to_save": ["pooler"] if has_pooler else None,
    }
    wanted = [text_ids[index % len(text_ids)] for index in range(config.virtual_tokens)]
    reparameterization = config.reparameterization or "mlp"
    if config.method == P_TUNING_V2:
        # Real keys and values before the model is touched: "Prefix-Tuning", arXiv 2101.00190, section 7.4.
        start = _keys_values_of_text(model, base, wanted)
        peft_model: Any = get_peft_model(model, PrefixTuningConfig(**common))
        with torch.no_grad():
            peft_model.prompt_encoder["default"].embedding.weight.copy_(start)
    else:
        peft_model = get_peft_model(
            model,
            PromptEncoderConfig(
                **common,
                # PEFT guesses these from names that DistilBERT's and OPT's configurations do not use.
                token_dim=base.hidden_size,
                num_attention_heads=model.config.num_attention_heads,
                encoder_reparameterization_type="LSTM" if reparameterization == "lstm" else "MLP",
                encoder_hidden_size=config.encoder_hidden_size,
            ),
        )
        if reparameterization in {"residual", "none"}:
            from train.model.prompted import ResidualPromptEncoder

            first = model.config.bos_token_id if base.is_decoder else first_token(base)
            ids = wanted if first is None else [first, *wanted][: config.virtual_tokens]
            vocabulary: Any = model.get_input_embeddings()
            table = vocabulary.weight.detach()[ids].float()
            hidden_size = config.encoder_hidden_size if reparameterization == "residual" else None
            peft_model.prompt_encoder["default"] = ResidualPromptEncoder(table, hidden_size)
    # PEFT writes the folder it was loaded from, which means nothing on another machine.
    peft_model.active_peft_config.base_model_name_or_path = base.hub_name
    return peft_model


def check_method(base: BaseModel, method: str) -> None:
    """Refuse a method that PEFT cannot put on a base model.

    Raises:
        UsageError: it cannot.
    """
    if method == P_TUNING_V2 and base.model_type in NO_KEYS_AND_VALUES:
        able = [name for name in ENCODERS + DECODERS if name not in NO_KEYS_AND_VALUES]
        raise UsageError(
            f"--method {P_TUNING_V2} does not work with {base.name}: models of type {base.model_type!r} take no learned "
            f"keys and values. Take --method {P_TUNING}, or a model of type {', '.join(able)}."
        )


def _keys_values_of_text(model: "PreTrainedModel", base: BaseModel, ids: Sequence[int]) -> "torch.Tensor":
    """What every layer computes for a text, in the order of PEFT's prefix table.

    Args:
        ids: n_virtual token ids.

    Returns:
        shape = (n_virtual, n_layers · 2 · n_key_value_heads · n_head)
    """
    import torch

    backbone: Any = model.base_model
    batch = torch.tensor([list(ids)], device=model.device)
    flat: list[torch.Tensor] = []
    was_training = model.training
    model.eval()
    with torch.no_grad():
        if base.is_decoder:
            for layer in backbone(batch, use_cache=True).past_key_values.layers:
                flat += [states[0].transpose(0, 1).flatten(1) for states in (layer.keys, layer.values)]
        else:
            rows = backbone(batch, output_hidden_states=True).hidden_states
            for layer, states in zip(backbone.encoder.layer, rows, strict=False):
                flat += [layer.attention.self.key(states)[0], layer.attention.self.value(states)[0]]
    model.train(was_training)
    return torch.cat(flat, dim=1)
