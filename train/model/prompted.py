"""`PromptedClassifier`: the one definition of "base + prompt → logits", for training, scoring and export.

It reads the adapter file by itself and shares no code with `PeftModel.forward`, so that comparing the
two proves something. Two kinds of prompt:

- `EmbeddingPrompt`: encoders under P-Tuning. The table's rows stand before the text's embeddings.
- `KeyValuePrompt`: everything else. P-Tuning v2's table holds keys and values of every layer; and under a
  causal mask those of P-Tuning's rows do not depend on the text, so that they too are computed once.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel


class PromptedClassifier(torch.nn.Module):
    """A frozen transformer with a learned prompt and head.

    The frozen part stays in evaluation mode while the rest learns: there dropout slows an epoch, and against
    the overfitting of a prompt it did not help where it was tried (README, "How good and how fast").

    Attributes:
        config: the base model's configuration.
        model: the classifier that transformers made of the base model.
    """

    prompt_embeddings: torch.Tensor
    # torch types every attribute of a module as Tensor | Module.
    model: Any
    prompt_encoder: Any

    def __init__(self, model: PreTrainedModel, prompt: torch.Tensor | torch.nn.Module) -> None:
        """Put a prompt before a classifier.

        Args:
            prompt: the table, shape = (n_virtual, n_width), or PEFT's prompt encoder, which computes it.
        """
        super().__init__()
        self.config = model.config
        self.model = model
        if isinstance(prompt, torch.Tensor):
            self.register_buffer("prompt_embeddings", prompt)
            self.prompt_encoder = None
        else:
            self.prompt_encoder = prompt

    def train(self, mode: bool = True) -> "PromptedClassifier":
        """Training mode is for the prompt encoder alone."""
        super().train(mode)
        self.model.eval()
        return self

    def prompt_table(self) -> torch.Tensor:
        """The prompt as an adapter file holds it, shape = (n_virtual, n_width)."""
        if self.prompt_encoder is None:
            return self.prompt_embeddings
        n_virtual = self.prompt_encoder.embedding.weight.shape[0]
        device = self.prompt_encoder.embedding.weight.device
        table: torch.Tensor = self.prompt_encoder(torch.arange(n_virtual, device=device)[None])[0]
        return table

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Classify a batch of texts.

        Args:
            input_ids: shape = (n_batch, n_text), padded on the right
            attention_mask: 1 for text, 0 for padding, shape = (n_batch, n_text)
            token_type_ids: which sentence a token is of, for models that take it, shape = (n_batch, n_text)
            labels: class indices, shape = (n_batch,)

        Returns:
            ``logits``, shape = (n_batch, n_labels), and with ``labels`` the mean cross entropy, ``loss``
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if token_type_ids is not None:
            inputs["token_type_ids"] = token_type_ids
        logits = self._logits(inputs)
        if labels is None:
            return {"logits": logits}
        return {"loss": torch.nn.functional.cross_entropy(logits.float(), labels), "logits": logits}

    def _logits(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        raise NotImplementedError

    def freeze_prompt(self) -> tuple[str, ...]:
        """Turn the prompt into constants before an export.

        Returns:
            the names of the buffers that hold it
        """
        return ("prompt_embeddings",)


class EmbeddingPrompt(PromptedClassifier):
    """A frozen encoder with the prompt's embeddings before the text's.

    What `peft.PeftModelForSequenceClassification.forward` does for P-Tuning: positions run through both,
    the prompt has token type 0 and is never masked, and the pooled row is row 0, virtual token 0. With
    any right padding the logits equal PEFT's.
    """

    def _logits(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        table = self.prompt_table()
        n_virtual, n_batch = table.shape[0], inputs["input_ids"].shape[0]
        text = self.model.get_input_embeddings()(inputs["input_ids"])
        # Neither unsqueeze nor a cast that does nothing: constant folding would swallow it, and the table's name with it.
        prompt = (table if table.dtype == text.dtype else table.to(text.dtype)).expand(n_batch, -1, -1)
        mask = inputs["attention_mask"]
        longer = {
            "inputs_embeds": torch.cat([prompt, text], dim=1),
            "attention_mask": torch.cat([mask.new_ones(n_batch, n_virtual), mask], dim=1),
        }
        types = inputs.get("token_type_ids")
        if types is not None:
            longer["token_type_ids"] = torch.cat([types.new_zeros(n_batch, n_virtual), types], dim=1)
        logits: torch.Tensor = self.model(**longer).logits
        return logits


class KeyValuePrompt(PromptedClassifier):
    """A frozen transformer whose every layer sees the prompt as keys and values before the text's.

    No row is computed for a virtual token. For P-Tuning v2 this is what PEFT's prefix tuning does. For
    P-Tuning on a decoder it is the same sum as running prompt and text together, done once for all texts.

    Decoders are padded on the right and the pooled row is the last real token, so a prediction never
    depends on its batch; without padding the logits equal PEFT's. (PEFT takes the last row, so it needs
    left padding, and its positions then depend on how much padding a neighbour brought.)
    """

    def __init__(
        self, model: PreTrainedModel, prompt: torch.Tensor | torch.nn.Module, *, is_decoder: bool, in_every_layer: bool
    ) -> None:
        """Put a prompt before a classifier.

        Args:
            is_decoder: whether the model is causal.
            in_every_layer: whether the table holds keys and values, in PEFT's order, shape = (n_virtual,
                n_layers · 2 · n_key_value_heads · n_head), or embeddings, shape = (n_virtual, n_hidden).
        """
        super().__init__(model, prompt)
        self._is_decoder = is_decoder
        self._in_every_layer = in_every_layer
        self._frozen_layers = 0

    def keys_values(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Of each layer, each of shape = (1, n_key_value_heads, n_virtual, n_head)."""
        if self._frozen_layers:
            return [
                (getattr(self, f"prompt_key_{layer}"), getattr(self, f"prompt_value_{layer}"))
                for layer in range(self._frozen_layers)
            ]
        dtype = self.model.get_input_embeddings().weight.dtype
        table = self.prompt_table().to(dtype)
        if not self._in_every_layer:
            mask = torch.ones(1, len(table), dtype=torch.long, device=table.device)
            outputs = self.model.base_model(inputs_embeds=table[None], attention_mask=mask, use_cache=True)
            return [(layer.keys, layer.values) for layer in outputs.past_key_values.layers]
        heads = getattr(self.config, "num_key_value_heads", None) or self.config.num_attention_heads
        n_layers = self.config.num_hidden_layers
        # shape = (n_layers, 2, 1, n_key_value_heads, n_virtual, n_head)
        stacked = table.view(len(table), n_layers, 2, heads, -1).permute(1, 2, 3, 0, 4).unsqueeze(2)
        return [(layer[0], layer[1]) for layer in stacked]

    def _logits(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        n_batch = inputs["input_ids"].shape[0]
        pooled = self.pooled(
            inputs,
            [(key.expand(n_batch, -1, -1, -1), value.expand(n_batch, -1, -1, -1)) for key, value in self.keys_values()],
        )
        logits: torch.Tensor = self.model.score(pooled) if self._is_decoder else self.model.classifier(pooled)
        return logits

    def pooled(
        self, inputs: Mapping[str, torch.Tensor], keys_values: Sequence[tuple[torch.Tensor, torch.Tensor]]
    ) -> torch.Tensor:
        """What the head reads.

        Args:
            inputs: as `forward` takes them.
            keys_values: of each layer, each of shape = (n_batch, n_key_value_heads, n_virtual, n_head)

        Returns:
            of a decoder the last token's row, of an encoder what its pooler made of row 0, each of shape =
            (n_batch, n_hidden), or all rows where it has no pooler
        """
        mask = inputs["attention_mask"]
        n_batch = mask.shape[0]
        cache = DynamicCache()
        for layer, (key, value) in enumerate(keys_values):
            cache.update(key, value, layer)
        longer = {
            **inputs,
            "attention_mask": torch.cat([mask.new_ones(n_batch, keys_values[0][0].shape[2]), mask], dim=1),
            "past_key_values": cache,
        }
        outputs = self.model.base_model(**longer)
        rows: torch.Tensor = outputs.last_hidden_state
        if self._is_decoder:
            last = mask.sum(dim=1) - 1
            return rows[torch.arange(n_batch, device=mask.device), last]
        pooler_output: torch.Tensor | None = getattr(outputs, "pooler_output", None)
        return rows if pooler_output is None else pooler_output

    def freeze_prompt(self) -> tuple[str, ...]:
        """See `PromptedClassifier.freeze_prompt`; here one key and one value for each layer."""
        names = []
        with torch.no_grad():
            for layer, (key, value) in enumerate(self.keys_values()):
                for name, tensor in ((f"prompt_key_{layer}", key), (f"prompt_value_{layer}", value)):
                    self.register_buffer(name, tensor.contiguous().clone())
                    names.append(name)
        self._frozen_layers = len(names) // 2
        return tuple(names)


def has_absolute_positions(config: Any) -> bool:
    """Whether a layer's scores are of queries and keys alone: BERT's may have a term for relative positions."""
    return getattr(config, "position_embedding_type", "absolute") == "absolute"


class PooledRowLayer(torch.nn.Module):
    """The last layer of a BERT-like encoder, computed for row 0 alone.

    Nothing reads the other rows: they are keys and values here, and no query, attention, or feed-forward
    is needed for them. That is 10/12 of the layer's work, and exact.
    """

    layer: Any

    def __init__(self, layer: torch.nn.Module) -> None:
        """Wrap a `BertLayer` or one of its copies (RoBERTa's, XLM-R's, ELECTRA's)."""
        super().__init__()
        self.layer = layer

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *_: object,
        past_key_values: DynamicCache | None = None,
        **__: object,
    ) -> tuple[torch.Tensor]:
        """Compute the layer for row 0.

        Args:
            hidden_states: shape = (n_batch, n_rows, n_hidden)
            attention_mask: added to the scores, shape = (n_batch, 1, n_rows or 1, n_keys)

        Returns:
            shape = (n_batch, 1, n_hidden)
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
        if attention_mask is not None:
            scores = scores + attention_mask[:, :, :1]
        context = (scores.softmax(dim=-1) @ value).transpose(1, 2).reshape(n_batch, 1, heads * width)
        return (self.layer.feed_forward_chunk(self.layer.attention.output(context, first)),)


class ResidualPromptEncoder(torch.nn.Module):
    """A table plus an MLP of it: residual reparameterisation (arXiv 2305.03937) for PEFT's P-Tuning.

    Or the table alone. It starts from the vocabulary, so the frozen model first sees something it knows.
    """

    def __init__(self, table: torch.Tensor, hidden_size: int | None) -> None:
        """Start from a table.

        Args:
            table: shape = (n_virtual, n_hidden)
            hidden_size: of the MLP; None for no MLP.
        """
        super().__init__()
        n_virtual, width = table.shape
        self.embedding = torch.nn.Embedding(n_virtual, width, _weight=table.clone())
        self.mlp_head = None
        if hidden_size is not None:
            self.mlp_head = torch.nn.Sequential(
                torch.nn.Linear(width, hidden_size),
                torch.nn.ReLU(),
                torch.nn.Linear(hidden_size, hidden_size),
                torch.nn.ReLU(),
                torch.nn.Linear(hidden_size, width),
            )
            # The sum starts as the table itself.
            for parameter in self.mlp_head[-1].parameters():
                torch.nn.init.zeros_(parameter)

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """Indices of virtual tokens, shape = (n_batch, n_virtual) → embeddings, shape = (n_batch, n_virtual, n_hidden)."""
        table: torch.Tensor = self.embedding(indices)
        return table if self.mlp_head is None else table + self.mlp_head(table)
