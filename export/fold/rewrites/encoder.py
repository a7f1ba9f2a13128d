"""`CpuEncoder`: an encoder with a prompt, rewritten for export, when neither its prompt nor its weights will change.

A frozen prompt allows three things, each exact up to rounding:

1. *Constant rows.* P-Tuning's rows of the first layer's input, with their positions, token type and LayerNorm, are one
   constant; the text's positions start after them and include the token type where there is only one.
2. *One row in the last layer.* Nothing reads the others there. Keys and values of that layer are not computed either:
   with one query, ``q · (W_k x) = (W_kᵀ q) · x``, and ``Σ p (W_v x + b_v) = W_v (Σ p x) + b_v`` as ``Σ p = 1``. A term
   that is the same for every key, such as ``q · b_k``, drops out of the softmax.
3. *Constant keys and values.* P-Tuning v2's, of every layer.

Any export allows two more: the scores' scale is part of the query's weights, and the rows of all texts are one matrix,
so that every dense layer is a plain matrix product with its bias. (On a CPU that is faster than fused operators; for a
GPU there is `export.fold.rewrites.gpu_encoder`.)
"""

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from train.model.prompted import EmbeddingPrompt, KeyValuePrompt, PooledRowLayer, PromptedClassifier


class _Layer(NamedTuple):
    """The modules of a layer of a BERT-like encoder, in the order in which they run."""

    query: torch.nn.Linear
    key: torch.nn.Linear
    value: torch.nn.Linear
    mix: torch.nn.Linear
    mix_norm: torch.nn.LayerNorm
    widen: torch.nn.Linear
    activation: Any
    narrow: torch.nn.Linear
    narrow_norm: torch.nn.LayerNorm


def _modules_of(layer: Any) -> _Layer:
    if isinstance(layer, PooledRowLayer):
        layer = layer.layer
    attention = layer.attention
    if hasattr(layer, "ffn"):  # DistilBERT
        own = (attention.q_lin, attention.k_lin, attention.v_lin, attention.out_lin, layer.sa_layer_norm)
        return _Layer(*own, layer.ffn.lin1, layer.ffn.activation, layer.ffn.lin2, layer.output_layer_norm)
    if hasattr(attention, "attn"):  # MPNet
        own = (attention.attn.q, attention.attn.k, attention.attn.v, attention.attn.o, attention.LayerNorm)
    else:
        inner, mix = attention.self, attention.output
        own = (inner.query, inner.key, inner.value, mix.dense, mix.LayerNorm)
    wide = layer.intermediate
    return _Layer(*own, wide.dense, wide.intermediate_act_fn, layer.output.dense, layer.output.LayerNorm)


class CpuEncoder(torch.nn.Module):
    """An encoder's `PromptedClassifier`, rewritten for export; the same logits."""

    prompt_names: tuple[str, ...]
    """Names of the buffers that hold the prompt."""
    positions: torch.Tensor
    distance_bias: torch.Tensor

    def __init__(self, classifier: PromptedClassifier) -> None:
        """Rewrite a classifier in evaluation mode (BERT, RoBERTa, XLM-R, ELECTRA, DistilBERT, MPNet)."""
        super().__init__()
        self.config = classifier.config
        backbone: Any = classifier.model.base_model
        encoder = getattr(backbone, "encoder", None) or backbone.transformer
        layers = [_modules_of(layer) for layer in encoder.layer]
        last = layers[-1]
        self._n_layers = len(layers)
        self._heads: int = self.config.num_attention_heads
        self._head_width: int = last.query.out_features // self._heads
        self._n_hidden: int = last.query.in_features
        scale = self._head_width**-0.5
        # Without the last layer's, which are folded below.
        self.queries = torch.nn.ModuleList(_scaled(layer.query, scale) for layer in layers[:-1])
        self.keys = torch.nn.ModuleList(layer.key for layer in layers[:-1])
        self.values = torch.nn.ModuleList(layer.value for layer in layers[:-1])
        self.mixes = torch.nn.ModuleList(layer.mix for layer in layers)
        self.mix_norms = torch.nn.ModuleList(layer.mix_norm for layer in layers)
        self.widens = torch.nn.ModuleList(layer.widen for layer in layers)
        self._activation = last.activation
        self.narrows = torch.nn.ModuleList(layer.narrow for layer in layers)
        self.narrow_norms = torch.nn.ModuleList(layer.narrow_norm for layer in layers)

        self.embeddings: Any = backbone.embeddings
        self.projection: Any = getattr(backbone, "embeddings_project", None)
        self.pooler: Any = getattr(backbone, "pooler", None)
        # The first dense layer of DistilBERT's head.
        self.pre_classifier: Any = getattr(classifier.model, "pre_classifier", None)
        self.classifier: Any = classifier.model.classifier
        self._has_distances = hasattr(encoder, "compute_position_bias")
        self._in_every_layer = isinstance(classifier, KeyValuePrompt)
        with torch.no_grad():
            if self._has_distances:
                self._fold_distances(encoder)
            self._fold_last_layer(last, scale)
            if isinstance(classifier, KeyValuePrompt):
                self._fold_keys_values(classifier, last)
            else:
                assert isinstance(classifier, EmbeddingPrompt)
                self._fold_rows(classifier.prompt_table())

    def _fold_distances(self, encoder: Any) -> None:
        """MPNet's bias of the scores as a table by distance: in fp16 its buckets by logarithm would sometimes be others."""
        n_positions = self.config.max_position_embeddings
        buckets = encoder.relative_position_bucket(torch.arange(1 - n_positions, n_positions))
        self._zero_distance = n_positions - 1
        # shape = (2 · n_positions - 1, n_heads)
        self.register_buffer("distance_bias", encoder.relative_attention_bias(buckets).detach().clone())

    def _fold_last_layer(self, layer: _Layer, scale: float) -> None:
        """See the module's point 2."""
        self.last_query = _scaled(layer.query, scale)
        shape = self._heads, self._head_width, layer.query.in_features
        self.register_buffer("last_key", layer.key.weight.view(shape).clone())
        # shape = (n_heads, n_hidden, n_head)
        self.register_buffer("last_value", layer.value.weight.view(shape).transpose(1, 2).contiguous())
        self.mixes[-1] = with_bias_of_values(layer.mix, layer.value)

    def _fold_keys_values(self, classifier: KeyValuePrompt, last: _Layer) -> None:
        """See the module's point 3. In the last layer they lose the bias, as those of the text do."""
        layers = [list(pair) for pair in classifier.keys_values()]
        for index, dense in enumerate((last.key, last.value)):
            layers[-1][index] = layers[-1][index] - dense.bias.view(1, self._heads, 1, self._head_width)
        self._n_virtual = layers[0][0].shape[2]
        constants = {
            f"prompt_{name}_{layer}": tensor
            for layer, pair in enumerate(layers)
            for name, tensor in zip(("key", "value"), pair, strict=True)
        }
        for name, tensor in constants.items():
            self.register_buffer(name, tensor.detach().contiguous().clone())
        self.prompt_names = tuple(constants)
        self._fold_positions()

    def _fold_rows(self, table: torch.Tensor) -> None:
        """See the module's point 1; table's shape = (n_virtual, n_width), rows' = (1, n_virtual, n_hidden)"""
        self._n_virtual = n_virtual = table.shape[0]
        self._fold_positions()
        first = self._first_position
        rows = table + self.embeddings.position_embeddings.weight[first : first + n_virtual]
        types = getattr(self.embeddings, "token_type_embeddings", None)
        if types is not None:
            rows = rows + types.weight[0]
        self.prompt_names = ("prompt_rows",) if n_virtual else ()
        if n_virtual:
            self.register_buffer("prompt_rows", self._normed(rows)[None].detach().clone())

    def _fold_positions(self) -> None:
        """The text's rows of the position table, after the prompt's; with the token type where there is only one."""
        table = self.embeddings.position_embeddings.weight
        padding = self.embeddings.position_embeddings.padding_idx
        # RoBERTa and MPNet number from padding_idx + 1.
        self._first_position: int = 0 if padding is None else padding + 1
        types = getattr(self.embeddings, "token_type_embeddings", None)
        self.token_types: Any = types if types is not None and types.num_embeddings > 1 else None
        # RoBERTa given ids, as for P-Tuning v2 and without a prompt, gives a padding token no number, wherever it stands.
        self._skips_padding = padding is not None and (self._in_every_layer or not self._n_virtual)
        if not self._skips_padding:
            table = table[self._first_position + self._n_virtual :]
        if types is not None and self.token_types is None:
            table = table + types.weight[0]
        self.register_buffer("positions", table.detach().clone())

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """See `PromptedClassifier.forward`, without labels."""
        prompt = self._prompt(attention_mask)
        return {"logits": self._head(self.pooled(input_ids, attention_mask, token_type_ids, prompt))}

    def _prompt(self, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """The prompt's constants for every text of a batch."""
        # A zero for each text: adding it repeats a constant over the batch in a single operator.
        zero = attention_mask[:, :1].to(self.positions.dtype) * 0
        constants = {name: getattr(self, name) for name in self.prompt_names}
        return {name: table + zero.view(-1, *[1] * (table.dim() - 1)) for name, table in constants.items()}

    def pooled(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None,
        prompt: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        """The last layer's row 0, which the head reads, shape = (n_batch, n_hidden)

        The prompt's constants come by their names in `prompt_names`, each of shape = (n_batch, …)
        """
        n_batch = input_ids.shape[0]
        rows = self._text_rows(input_ids, token_type_ids)
        if "prompt_rows" in prompt:
            rows = torch.cat([prompt["prompt_rows"], rows], dim=1)
        # Added to the scores, the lowest number for padding, shape = (n_batch, 1, 1, n_virtual + n_text)
        hidden = (1 - attention_mask.to(rows.dtype)) * torch.finfo(rows.dtype).min
        bias = torch.nn.functional.pad(hidden, (self._n_virtual, 0))[:, None, None]
        distances = self._distances(rows.shape[1])
        # Sizes come from the settings: a traced one would be computed at run time, in each layer.
        flat = rows.reshape(-1, self._n_hidden)
        for layer in range(self._n_layers - 1):
            context = self._attend(layer, flat, n_batch, bias if distances is None else bias + distances, prompt)
            flat = self._feed_forward(layer, context, flat)
        first = bias[:, :, :1] if distances is None else (bias + distances)[:, :, :1]
        return self._last_row(flat.view(n_batch, -1, self._n_hidden), first, prompt)

    def _text_rows(self, input_ids: torch.Tensor, token_type_ids: torch.Tensor | None) -> torch.Tensor:
        """The first layer's input for the text, shape = (n_batch, n_text, n_hidden)"""
        if self._skips_padding:
            counted = (input_ids != self._first_position - 1).to(input_ids.dtype)
            numbers = (counted.cumsum(dim=1) + self._n_virtual) * counted + (self._first_position - 1)
            positions = torch.nn.functional.embedding(numbers, self.positions)
        else:
            positions = self.positions[: input_ids.shape[1]]
        rows = self.embeddings.word_embeddings(input_ids) + positions
        if self.token_types is not None:
            rows = rows + self.token_types(token_type_ids)
        return self._normed(rows)

    def _normed(self, rows: torch.Tensor) -> torch.Tensor:
        """Sums of embeddings → the first layer's input."""
        rows = self.embeddings.LayerNorm(rows)
        return rows if self.projection is None else self.projection(rows)

    def _distances(self, n_rows: int) -> torch.Tensor | None:
        """Added to the scores, shape = (1, n_heads, n_rows, n_rows); None for models without relative distances"""
        if not self._has_distances:
            return None
        places = torch.arange(n_rows)
        bias: torch.Tensor = self.distance_bias[places[None] - places[:, None] + self._zero_distance]
        return bias.permute(2, 0, 1)[None]

    def _attend(
        self, layer: int, flat: torch.Tensor, n_batch: int, bias: torch.Tensor, prompt: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """Self-attention of a layer before its output projection; rows of all texts, shape = (n_batch · n_rows, n_hidden)"""
        # Each of shape = (n_batch, n_heads, n_rows, n_head)
        query, key, value = (
            projections[layer](flat).view(n_batch, -1, self._heads, self._head_width).transpose(1, 2)
            for projections in (self.queries, self.keys, self.values)
        )
        if self._in_every_layer:
            key = torch.cat([prompt[f"prompt_key_{layer}"], key], dim=2)
            value = torch.cat([prompt[f"prompt_value_{layer}"], value], dim=2)
        context = (query @ key.transpose(-1, -2) + bias).softmax(dim=-1) @ value
        return context.transpose(1, 2).reshape(-1, self._n_hidden)

    def _feed_forward(self, layer: int, context: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """A layer after its attention; both of shape = (…, n_hidden)"""
        rows = self.mix_norms[layer](self.mixes[layer](context) + rows)
        wide = self._activation(self.widens[layer](rows))
        return self.narrow_norms[layer](self.narrows[layer](wide) + rows)

    def _last_row(self, rows: torch.Tensor, bias: torch.Tensor, prompt: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """See `pooled`; rows of shape = (n_batch, n_rows, n_hidden)"""
        n_batch = rows.shape[0]
        layer, heads = self._n_layers - 1, self._heads
        first = rows[:, 0]
        # shape = (n_batch, n_heads, 1, n_head)
        query = self.last_query(first).view(n_batch, heads, 1, self._head_width)
        scores = ((query @ self.last_key).view(n_batch, heads, self._n_hidden) @ rows.transpose(1, 2)).unsqueeze(2)
        if self._in_every_layer:
            scores = torch.cat([query @ prompt[f"prompt_key_{layer}"].transpose(-1, -2), scores], dim=-1)
        weights = (scores + bias).softmax(dim=-1)
        of_text = weights[:, :, 0, self._n_virtual :] if self._in_every_layer else weights[:, :, 0]
        context = (of_text @ rows).unsqueeze(2) @ self.last_value
        if self._in_every_layer:
            context = context + weights[..., : self._n_virtual] @ prompt[f"prompt_value_{layer}"]
        return self._feed_forward(layer, context.reshape(n_batch, -1), first)

    def _head(self, pooled: torch.Tensor) -> torch.Tensor:
        """Row 0 → logits, as the model's own classifier does it, shape = (n_batch, n_labels)"""
        if self.pre_classifier is not None:
            pooled = torch.relu(self.pre_classifier(pooled))
        else:
            pooled = pooled[:, None] if self.pooler is None else self.pooler(pooled[:, None])
        logits: torch.Tensor = self.classifier(pooled)
        return logits


def with_bias_of_values(mix: torch.nn.Linear, value: torch.nn.Linear) -> torch.nn.Linear:
    """A copy of the projection after attention that adds the values' bias, which every sum of values has once."""
    copied = _scaled(mix, 1.0)
    copied.bias.add_(mix.weight @ value.bias)
    return copied


def _scaled(linear: torch.nn.Linear, scale: float) -> torch.nn.Linear:
    """A copy whose output is the original's times a factor."""
    copied = copy.deepcopy(linear).requires_grad_(False)
    for parameter in copied.parameters():
        parameter.mul_(scale)
    return copied
