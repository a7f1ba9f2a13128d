"""Gives a frozen classifier a trainable prompt, as PEFT's model."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from train.common.errors import ModelError, UsageError, first_line
from train.config import P_TUNING, P_TUNING_V2, TrainConfig
from train.model.architecture import head_modules, key_value_heads, keys_values_of
from train.model.classifier import drop_cache, load_classifier, put_prompt_before
from train.model.find import DECODERS, ENCODERS, BaseModel
from train.model.tokenizer import load_tokenizer

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

_WITH_KEYS_AND_VALUES = ("bert", "electra", "roberta", "gpt2", "llama", "qwen3")
"""Examples of model types that take learned keys and values."""
_LONGEST_TRIED = 512
"""Upper bound for the tokens of the texts on which a prompt is tried."""
_TOLERANCE = 1e-3
"""Largest difference of a logit there, relative to the largest logit: far above rounding, in bf16 too."""


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
    settings = model.config.get_text_config()
    common: dict[str, Any] = {
        "task_type": TaskType.SEQ_CLS,
        "num_virtual_tokens": config.virtual_tokens,
        "num_layers": settings.num_hidden_layers,
        # PEFT adds the layer of the logits, and leaves the layers before it frozen unless they are named.
        "modules_to_save": _more_to_save(model),
    }
    wanted = [text_ids[index % len(text_ids)] for index in range(config.virtual_tokens)]
    reparameterization = config.reparameterization or "mlp"
    if config.method == P_TUNING_V2:
        # Starting from real keys and values: "Prefix-Tuning", arXiv 2101.00190, section 7.4.
        start = _keys_values_of_text(model, base, wanted)
        heads = key_value_heads(model, is_decoder=base.is_decoder)
        # PEFT guesses these two by names that Falcon's configuration does not use.
        sizes = {"token_dim": start.shape[1] // (2 * common["num_layers"]), "num_attention_heads": heads}
        peft_model: Any = get_peft_model(model, PrefixTuningConfig(**common, **sizes))
        with torch.no_grad():
            peft_model.prompt_encoder["default"].embedding.weight.copy_(start)
    else:
        peft_model = get_peft_model(
            model,
            PromptEncoderConfig(
                **common,
                # PEFT guesses these two by names that DistilBERT's and OPT's configurations do not use.
                token_dim=base.hidden_size,
                num_attention_heads=getattr(settings, "num_attention_heads", 1),
                encoder_reparameterization_type="LSTM" if reparameterization == "lstm" else "MLP",
                encoder_hidden_size=config.encoder_hidden_size,
            ),
        )
        if reparameterization in {"residual", "none"}:
            from train.model.prompted import ResidualPromptEncoder

            hidden_size = config.encoder_hidden_size if reparameterization == "residual" else None
            table = _embeddings_of_text(model, base, wanted)
            peft_model.prompt_encoder["default"] = ResidualPromptEncoder(table, hidden_size)
    # PEFT would write the folder it was loaded from, which means nothing on another machine.
    peft_model.active_peft_config.base_model_name_or_path = base.hub_name
    return peft_model


def _more_to_save(model: "PreTrainedModel") -> list[str] | None:
    """The parts of the head that PEFT has to be told of."""
    names = [name for name in head_modules(model) if name not in {"classifier", "score"}]
    # PEFT compares the ends of names, and its prompt encoder has an "mlp_head".
    return [f"base_model.{name}" if "mlp_head".endswith(name) else name for name in names] or None


def check_method(base: BaseModel, method: str) -> None:
    """Refuse a method that PEFT cannot put on a base model, as far as its type tells; `try_prompt` tries it."""
    if method == P_TUNING_V2 and not base.takes_keys_values:
        raise no_keys_and_values(base)


def no_keys_and_values(base: BaseModel) -> UsageError:
    """The refusal of P-Tuning v2 by name."""
    return UsageError(
        f"--method {P_TUNING_V2} does not work with {base.name}: models of type {base.model_type!r} take no learned "
        f"keys and values. Take --method {P_TUNING}, or a model of type {', '.join(_WITH_KEYS_AND_VALUES)}."
    )


def try_prompt(base: BaseModel, config: TrainConfig, labels: Sequence[str], ids: Sequence[int]) -> None:
    """Try a prompt on a model of a type that is not known, before a run costs anything.

    PEFT runs each of two texts, made of the token ``ids``, alone. Ours runs both together, one of them padded.

    Raises:
        UsageError: the model takes no learned keys and values.
        ModelError: it runs with no prompt, its predictions depend on the padding of a text, or it shortens texts.
    """
    if base.model_type in ENCODERS + DECODERS:
        return
    peft_model = add_prompt(load_classifier(base, labels), base, config, text_ids=ids)
    _check_prompt(peft_model, base, config, ids)


def _check_prompt(peft_model: Any, base: BaseModel, config: TrainConfig, ids: Sequence[int]) -> None:
    """See `try_prompt`."""
    import torch

    settings = peft_model.config.get_text_config()
    window = getattr(settings, "sliding_window", None) or getattr(settings, "local_attention", None) or 0
    n_long = max(2, min(base.positions - config.virtual_tokens, max(12, 2 * window), _LONGEST_TRIED))
    mask = torch.ones(2, n_long, dtype=torch.long)
    mask[1, n_long // 2 :] = 0
    # transformers takes a last padding token for padding, and it may be the one that ends a text.
    ids = [token for token in ids if token != peft_model.config.pad_token_id] or ids
    rows = torch.tensor([ids[index % len(ids)] for index in range(2 * n_long)]).view(2, n_long)
    encoder = peft_model.prompt_encoder[peft_model.active_adapter]
    classifier = put_prompt_before(peft_model.base_model, base, config.method, encoder).eval()
    peft_model.eval()
    if not base.is_decoder:
        peft_model.base_model.base_model.register_forward_hook(drop_cache)
    failed = (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError)
    with torch.no_grad():
        try:
            lengths = zip(rows, mask.sum(dim=1), strict=True)
            alone = [peft_model(input_ids=row[None, :n], attention_mask=mask[:1, :n]).logits for row, n in lengths]
            together = classifier(rows, mask)["logits"]
            n_rows = peft_model.base_model.base_model(rows, attention_mask=mask).last_hidden_state.shape[1]
        except failed as cause:
            if config.method == P_TUNING_V2:
                raise no_keys_and_values(base) from cause
            raise ModelError(
                f"Base model {base.name}: a model of type {base.model_type!r} runs with no prompt ({first_line(cause)}). "
                "Take another one."
            ) from cause
    if n_rows != n_long:
        raise ModelError(
            f"Base model {base.name}: a model of type {base.model_type!r} has {n_rows} rows for a text of {n_long} tokens in "
            "its last layer, and no exporter writes such a graph. Take another one."
        )
    difference = float((torch.cat(alone) - together).abs().max())
    if not difference <= _TOLERANCE * max(1.0, float(together.abs().max())):
        if config.method == P_TUNING_V2:
            raise no_keys_and_values(base)
        raise ModelError(
            f"Base model {base.name}: what a model of type {base.model_type!r} says of a text depends on its padding (by "
            f"{difference:.2g} in a logit), so on the texts beside it. Take another one."
        )


def _embeddings_of_text(model: "PreTrainedModel", base: BaseModel, ids: Sequence[int]) -> "torch.Tensor":
    """The embeddings of a text with the token before it that a model expects, shape = (n_virtual, n_width)."""
    # An encoder's row of virtual token 0 is pooled, so it starts from [CLS] or <s>.
    first = model.config.bos_token_id
    if not base.is_decoder:
        first = load_tokenizer(base.folder, base.positions).cls_token_id
    whole = list(ids) if first is None else [first, *ids][: len(ids)]
    vocabulary: Any = model.get_input_embeddings()
    table: torch.Tensor = vocabulary.weight.detach()[whole].float()
    return table


def _keys_values_of_text(model: "PreTrainedModel", base: BaseModel, ids: Sequence[int]) -> "torch.Tensor":
    """Every layer's keys and values for a text of n_virtual tokens, in the order of PEFT's prefix table.

    shape = (n_virtual, n_layers · 2 · n_key_value_heads · n_head)

    Raises:
        UsageError: the model has none that could be learned: they differ in shape, or not every layer has them.
    """
    import torch

    layers = keys_values_of(model, ids, is_decoder=base.is_decoder)
    if len(layers) != model.config.get_text_config().num_hidden_layers:
        raise no_keys_and_values(base)
    flat = [states[0].transpose(0, 1).flatten(1) for pair in layers for states in pair]
    if len({states.shape for states in flat}) != 1 or len(flat[0]) != len(ids):
        raise no_keys_and_values(base)
    return torch.cat(flat, dim=1)
