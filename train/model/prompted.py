"""`PromptedClassifier`: the one definition of "base + prompt → logits", for training, scoring and export.

It shares no code with `PeftModel.forward`, so that agreement with it proves something.
"""

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from train.model.architecture import key_value_heads
from train.model.loss import mean_loss


class PromptedClassifier(torch.nn.Module):
    """A frozen transformer with a learned prompt and head."""

    prompt_embeddings: torch.Tensor
    class_weights: torch.Tensor | None
    model: Any  # torch types every attribute of a module as Tensor | Module
    prompt_encoder: Any

    def __init__(self, model: PreTrainedModel, prompt: torch.Tensor | torch.nn.Module) -> None:
        """The prompt is a table, shape = (n_virtual, n_width), or PEFT's prompt encoder, which computes it."""
        super().__init__()
        self.config, self.model, self.prompt_encoder = model.config, model, None
        self.register_buffer("class_weights", None, persistent=False)
        if isinstance(prompt, torch.Tensor):
            self.register_buffer("prompt_embeddings", prompt)
        else:
            self.prompt_encoder = prompt

    def train(self, mode: bool = True) -> "PromptedClassifier":
        """Set the mode of the prompt encoder alone: the frozen model's dropout slows training and did not help."""
        super().train(mode)
        self.model.eval()
        return self

    def prompt_table(self) -> torch.Tensor:
        """The prompt as an adapter file holds it, shape = (n_virtual, n_width)."""
        if self.prompt_encoder is None:
            return self.prompt_embeddings
        weight = self.prompt_encoder.embedding.weight
        table: torch.Tensor = self.prompt_encoder(torch.arange(len(weight), device=weight.device)[None])[0]
        return table

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Token ids, mask (1 for text) and sentence numbers, each of shape = (n_batch, n_text), padded on the right →
        ``logits``, shape = (n_batch, n_labels), and with ``labels``, as in `mean_loss`, the mean ``loss``.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if token_type_ids is not None:
            inputs["token_type_ids"] = token_type_ids
        logits = self._logits(inputs)
        if labels is None:
            return {"logits": logits}
        return {"loss": mean_loss(self.config.problem_type, logits, labels, self.class_weights), "logits": logits}

    def _logits(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        raise NotImplementedError

    def freeze_prompt(self) -> tuple[str, ...]:
        """Turn the prompt into constant buffers before an export, and return their names."""
        return ("prompt_embeddings",)


def _last_real_rows(rows: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The row of each text's last real token, (n_batch, n_text, n_hidden) → (n_batch, n_hidden), padding on the right."""
    return rows[torch.arange(mask.shape[0], device=mask.device), mask.sum(dim=1) - 1]


class EmbeddingPrompt(PromptedClassifier):
    """A frozen transformer under P-Tuning: the prompt's embeddings stand before the text's.

    As in `peft.PeftModelForSequenceClassification.forward`, positions run through both, the prompt has token
    type 0 and is never masked. An encoder pools as it always does, most of them row 0, which is virtual token 0; with any
    right padding the logits equal PEFT's. A decoder pools the last real token, see `KeyValuePrompt`.
    """

    def __init__(
        self, model: PreTrainedModel, prompt: torch.Tensor | torch.nn.Module, *, is_decoder: bool = False
    ) -> None:
        super().__init__(model, prompt)
        self._is_decoder = is_decoder

    def _logits(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        longer = self._with_prompt(inputs, self.prompt_table())
        if not self._is_decoder:
            logits: torch.Tensor = self.model(**longer).logits
            return logits
        head_logits: torch.Tensor = self.model.score(self._row(longer))
        return head_logits

    def row(self, inputs: Mapping[str, torch.Tensor], table: torch.Tensor) -> torch.Tensor:
        """The row of a decoder's last real tokens, or an encoder's row 0, shape = (n_batch, n_hidden), for a prompt of
        shape = (n_batch or 1, n_virtual, n_width)."""
        return self._row(self._with_prompt(inputs, table))

    def _row(self, longer: Mapping[str, torch.Tensor]) -> torch.Tensor:
        mask = longer["attention_mask"]
        if not self._is_decoder:
            first: torch.Tensor = self.model.base_model(**longer).last_hidden_state[:, 0]
            return first
        rows: torch.Tensor = self.model.base_model(**longer, use_cache=False).last_hidden_state
        return _last_real_rows(rows, mask)

    def _with_prompt(self, inputs: Mapping[str, torch.Tensor], table: torch.Tensor) -> dict[str, torch.Tensor]:
        n_virtual, n_batch = table.shape[-2], inputs["input_ids"].shape[0]
        text = self.model.get_input_embeddings()(inputs["input_ids"])
        # An unsqueeze or a cast without effect would be folded into the table, which then loses its name in the graph.
        prompt = (table if table.dtype == text.dtype else table.to(text.dtype)).expand(n_batch, -1, -1)
        mask = inputs["attention_mask"]
        longer = {
            "inputs_embeds": torch.cat([prompt, text], dim=1),
            "attention_mask": torch.cat([mask.new_ones(n_batch, n_virtual), mask], dim=1),
        }
        types = inputs.get("token_type_ids")
        if types is not None:
            longer["token_type_ids"] = torch.cat([types.new_zeros(n_batch, n_virtual), types], dim=1)
        return longer


class KeyValuePrompt(PromptedClassifier):
    """A frozen transformer whose every layer sees the prompt as keys and values before the text's.

    For P-Tuning v2 this is PEFT's prefix tuning. For P-Tuning on a decoder it equals running prompt and text together,
    as under a causal mask the prompt's keys and values do not depend on the text.

    Decoders are padded on the right and the last real token is pooled, so a prediction never depends on its batch;
    without padding the logits equal PEFT's. (PEFT takes the last row, so it needs left padding, and its positions then
    depend on the longest text of the batch.)
    """

    def __init__(
        self, model: PreTrainedModel, prompt: torch.Tensor | torch.nn.Module, *, is_decoder: bool, in_every_layer: bool
    ) -> None:
        """With ``in_every_layer`` the table holds keys and values in PEFT's order, shape = (n_virtual,
        n_layers · 2 · n_key_value_heads · n_head), else embeddings, shape = (n_virtual, n_hidden)."""
        super().__init__(model, prompt)
        self._is_decoder, self._in_every_layer = is_decoder, in_every_layer
        self._heads = key_value_heads(model, is_decoder=is_decoder) if in_every_layer else 0
        self._frozen: list[tuple[str, str]] = []

    def keys_values(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The prompt's key and value in each layer, each of shape = (1, n_key_value_heads, n_virtual, n_head)."""
        if self._frozen:
            return [(getattr(self, key), getattr(self, value)) for key, value in self._frozen]
        table = self.prompt_table().to(self.model.get_input_embeddings().weight.dtype)
        if not self._in_every_layer:
            mask = torch.ones(1, len(table), dtype=torch.long, device=table.device)
            outputs = self.model.base_model(inputs_embeds=table[None], attention_mask=mask, use_cache=True)
            return [(layer.keys, layer.values) for layer in outputs.past_key_values.layers]
        n_layers = self.config.get_text_config().num_hidden_layers
        # shape = (n_layers, 2, 1, n_key_value_heads, n_virtual, n_head)
        stacked = table.view(len(table), n_layers, 2, self._heads, -1).permute(1, 2, 3, 0, 4).unsqueeze(2)
        return [(layer[0], layer[1]) for layer in stacked]

    def _logits(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        n_batch = inputs["input_ids"].shape[0]
        keys_values = [
            (key.expand(n_batch, -1, -1, -1), value.expand(n_batch, -1, -1, -1)) for key, value in self.keys_values()
        ]
        if self._is_decoder:
            head_logits: torch.Tensor = self.model.score(self.row(inputs, keys_values))
            return head_logits
        outputs = self._outputs(inputs, keys_values)
        pooled = getattr(outputs, "pooler_output", None)  # without a pooler the head takes all rows
        logits: torch.Tensor = self.model.classifier(outputs.last_hidden_state if pooled is None else pooled)
        return logits

    def row(
        self, inputs: Mapping[str, torch.Tensor], keys_values: Sequence[tuple[torch.Tensor, torch.Tensor]]
    ) -> torch.Tensor:
        """See `EmbeddingPrompt.row`.

        There is one key and value for each layer, each of shape = (n_batch, n_key_value_heads, n_virtual, n_head).
        """
        rows: torch.Tensor = self._outputs(inputs, keys_values).last_hidden_state
        return _last_real_rows(rows, inputs["attention_mask"]) if self._is_decoder else rows[:, 0]

    def _outputs(
        self, inputs: Mapping[str, torch.Tensor], keys_values: Sequence[tuple[torch.Tensor, torch.Tensor]]
    ) -> Any:
        """What the backbone answers to a text that follows a prompt."""
        mask = inputs["attention_mask"]
        n_batch = mask.shape[0]
        cache = DynamicCache()
        for layer, states in enumerate(keys_values):
            cache.update(*states, layer)
        longer = torch.cat([mask.new_ones(n_batch, keys_values[0][0].shape[2]), mask], dim=1)
        return self.model.base_model(**{**inputs, "attention_mask": longer, "past_key_values": cache})

    def freeze_prompt(self) -> tuple[str, ...]:
        """See `PromptedClassifier`; here the buffers are a key and a value for each layer."""
        with torch.no_grad():
            states = self.keys_values()
            self._frozen = [(f"prompt_key_{layer}", f"prompt_value_{layer}") for layer in range(len(states))]
            for names, tensors in zip(self._frozen, states, strict=True):
                for name, tensor in zip(names, tensors, strict=True):
                    self.register_buffer(name, tensor.contiguous().clone())
        return tuple(name for names in self._frozen for name in names)


def has_absolute_positions(config: Any) -> bool:
    """Whether attention scores depend on queries and keys alone; BERT may add a term for relative positions."""
    return getattr(config, "position_embedding_type", "absolute") == "absolute"


class PooledRowLayer(torch.nn.Module):
    """The last layer of a BERT-like encoder (`BertLayer` and its copies), computed for row 0 alone.

    Nothing reads the other rows, so they need keys and values only. This is exact and saves 10/12 of the layer's work.
    """

    layer: Any

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *_: object,
        past_key_values: DynamicCache | None = None,
        **__: object,
    ) -> tuple[torch.Tensor] | torch.Tensor:
        """Hidden states, shape = (n_batch, n_rows, n_hidden) → shape = (n_batch, 1, n_hidden).

        The mask, shape = (n_batch, 1, n_rows or 1, n_keys), is added to the scores, or says which keys are seen. As the
        layer itself, it returns a tuple with transformers 4 and a tensor with 5.
        """
        attention = self.layer.attention.self
        n_batch, heads, width = hidden_states.shape[0], attention.num_attention_heads, attention.attention_head_size

        def split(rows: torch.Tensor) -> torch.Tensor:
            return rows.view(n_batch, -1, heads, width).transpose(1, 2)

        first = hidden_states[:, :1]
        query = split(attention.query(first))
        key, value = split(attention.key(hidden_states)), split(attention.value(hidden_states))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, attention.layer_idx)
        scores = query @ key.transpose(-1, -2) / width**0.5
        if attention_mask is not None and attention_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attention_mask[:, :, :1], torch.finfo(scores.dtype).min)
        elif attention_mask is not None:
            scores = scores + attention_mask[:, :, :1]
        context = (scores.softmax(dim=-1) @ value).transpose(1, 2).reshape(n_batch, 1, heads * width)
        row: torch.Tensor = self.layer.feed_forward_chunk(self.layer.attention.output(context, first))
        return row if signature(self.layer.forward).return_annotation is torch.Tensor else (row,)


class ResidualPromptEncoder(torch.nn.Module):
    """A table, plus an MLP of it if wanted: residual reparameterization (arXiv 2305.03937) for PEFT's P-Tuning."""

    def __init__(self, table: torch.Tensor, hidden_size: int | None) -> None:
        """Start from a table, shape = (n_virtual, n_hidden); without a hidden size there is no MLP."""
        super().__init__()
        n_virtual, width = table.shape
        self.embedding = torch.nn.Embedding(n_virtual, width, _weight=table.clone())
        self.mlp_head = None
        if hidden_size is not None:
            sizes = ((width, hidden_size), (hidden_size, hidden_size), (hidden_size, width))
            first, second, last = (torch.nn.Linear(*size) for size in sizes)
            self.mlp_head = torch.nn.Sequential(first, torch.nn.ReLU(), second, torch.nn.ReLU(), last)
            for parameter in last.parameters():
                torch.nn.init.zeros_(parameter)  # the sum starts as the table itself

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """Virtual tokens, shape = (n_batch, n_virtual) → embeddings, shape = (n_batch, n_virtual, n_hidden)."""
        table: torch.Tensor = self.embedding(indices)
        return table if self.mlp_head is None else table + self.mlp_head(table)
