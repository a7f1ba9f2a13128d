"""`FoldedEncoder`: a prompted encoder written out anew, now that neither its prompt nor its weights will change.

What only a frozen prompt allows, each exact up to rounding:

1. *Constant rows.* P-Tuning's rows of the first layer's input, with their positions, token type and LayerNorm, are one
   constant; the text's positions start behind them and carry the one token type where there is only one.
2. *One row in the last layer.* Nothing reads the others there. Keys and values of that layer are not computed either:
   with one query, ``q · (W_k x) = (W_kᵀ q) · x``, and ``Σ p (W_v x + b_v) = W_v (Σ p x) + b_v`` as ``Σ p = 1``. A term
   that is the same for every key, such as ``q · b_k``, drops out of the softmax.
3. *Constant keys and values.* P-Tuning v2's, of every layer.

And what any export may do: the scores' scale is folded into the query's weights, and rows of all texts stand in one
matrix, so that every dense layer is a plain matrix product with its bias. (On a CPU that is faster than fused operators;
for a GPU there is `export.fold.gpu_encoder`.)

Heavy: import it where it is used.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from train.model.prompted import EmbeddingPrompt, KeyValuePrompt, PooledRowLayer, PromptedClassifier


@dataclass(frozen=True)
class _Block:
    """One layer of an encoder after BERT, by what its parts do."""

    query: torch.nn.Linear
    key: torch.nn.Linear
    value: torch.nn.Linear
    mix: torch.nn.Linear
    mix_norm: torch.nn.LayerNorm
    widen: torch.nn.Linear
    activation: Any
    narrow: torch.nn.Linear
    narrow_norm: torch.nn.LayerNorm


def _block(layer: Any) -> _Block:
    """The parts of a layer of any supported encoder."""
    if isinstance(layer, PooledRowLayer):
        layer = layer.layer
    if hasattr(layer, "ffn"):  # DistilBERT
        attention = layer.attention
        return _Block(
            *(attention.q_lin, attention.k_lin, attention.v_lin, attention.out_lin, layer.sa_layer_norm),
            *(layer.ffn.lin1, layer.ffn.activation, layer.ffn.lin2, layer.output_layer_norm),
        )
    feed_forward = (
        *(layer.intermediate.dense, layer.intermediate.intermediate_act_fn),
        *(layer.output.dense, layer.output.LayerNorm),
    )
    if hasattr(layer.attention, "attn"):  # MPNet
        attention = layer.attention.attn
        return _Block(attention.q, attention.k, attention.v, attention.o, layer.attention.LayerNorm, *feed_forward)
    attention, mix = layer.attention.self, layer.attention.output
    return _Block(attention.query, attention.key, attention.value, mix.dense, mix.LayerNorm, *feed_forward)


class FoldedEncoder(torch.nn.Module):
    """An encoder's `PromptedClassifier`, rewritten for export; the same logits.

    Attributes:
        config: the base model's configuration.
        prompt_names: of the buffers that hold the prompt.
    """

    positions: torch.Tensor
    distance_bias: torch.Tensor

    def __init__(self, classifier: PromptedClassifier) -> None:
        """Rewrite a classifier; its weights are shared, not copied, where they stay as they are.

        Args:
            classifier: of an encoder (BERT, RoBERTa, XLM-R, ELECTRA, DistilBERT, MPNet), in evaluation mode.
        """
        super().__init__()
        self.config = classifier.config
        backbone: Any = classifier.model.base_model
        encoder = getattr(backbone, "encoder", None) or backbone.transformer
        blocks = [_block(layer) for layer in encoder.layer]
        self._heads: int = self.config.num_attention_heads
        self._head_width: int = blocks[0].query.out_features // self._heads
        scale = self._head_width**-0.5
        # Modules of the layers, part by part. The last layer's projections are below.
        self.queries = torch.nn.ModuleList(_scaled(block.query, scale) for block in blocks[:-1])
        self.keys = torch.nn.ModuleList(block.key for block in blocks[:-1])
        self.values = torch.nn.ModuleList(block.value for block in blocks[:-1])
        self.mixes = torch.nn.ModuleList(block.mix for block in blocks)
        self.mix_norms = torch.nn.ModuleList(block.mix_norm for block in blocks)
        self.widens = torch.nn.ModuleList(block.widen for block in blocks)
        self._activation = blocks[0].activation
        self.narrows = torch.nn.ModuleList(block.narrow for block in blocks)
        self.narrow_norms = torch.nn.ModuleList(block.narrow_norm for block in blocks)
        self._n_layers = len(blocks)

        self.embeddings: Any = backbone.embeddings
        self.projection: Any = getattr(backbone, "embeddings_project", None)
        self.pooler: Any = getattr(backbone, "pooler", None)
        # DistilBERT's head starts with a dense layer of its own.
        self.pre_classifier: Any = getattr(classifier.model, "pre_classifier", None)
        self.classifier: Any = classifier.model.classifier
        self._has_distances = hasattr(encoder, "compute_position_bias")

        with torch.no_grad():
            if self._has_distances:
                self._fold_distances(encoder)
            self._fold_last_layer(blocks[-1], scale)
            if isinstance(classifier, EmbeddingPrompt):
                table = classifier.prompt_table()
                self._in_every_layer = False
                self._n_virtual = table.shape[0]
                self._shift_positions()
                self.register_buffer("prompt_rows", self._prompt_rows(table))
                self.prompt_names: tuple[str, ...] = ("prompt_rows",)
            elif isinstance(classifier, KeyValuePrompt):
                self._in_every_layer = True
                self._fold_keys_values(classifier)
                self._shift_positions()
            else:
                raise TypeError(f"no rule for {type(classifier).__name__}")

    def _fold_distances(self, encoder: Any) -> None:
        """MPNet's bias, which is added to the scores of every layer, as a table by distance.

        MPNet sorts distances into buckets by their logarithm, for which fp16 finds another bucket now and then.
        """
        n_positions = self.config.max_position_embeddings
        distances = torch.arange(1 - n_positions, n_positions)
        buckets = encoder.relative_position_bucket(distances)
        self._zero_distance = n_positions - 1
        # shape = (2 · n_positions - 1, n_heads)
        self.register_buffer("distance_bias", encoder.relative_attention_bias(buckets).detach().clone())

    def _distances(self, n_rows: int) -> torch.Tensor | None:
        """Added to the scores, shape = (1, n_heads, n_rows, n_rows); None where the model knows no distances"""
        if not self._has_distances:
            return None
        places = torch.arange(n_rows)
        bias: torch.Tensor = self.distance_bias[places[None] - places[:, None] + self._zero_distance]
        return bias.permute(2, 0, 1)[None]

    def _fold_last_layer(self, block: _Block, scale: float) -> None:
        """See the module's point 2."""
        heads, width, n_hidden = self._heads, self._head_width, block.query.in_features
        self.last_query = _scaled(block.query, scale)
        # shape = (n_heads, n_head, n_hidden) and (n_heads, n_hidden, n_head)
        self.register_buffer("last_key", block.key.weight.view(heads, width, n_hidden).clone())
        self.register_buffer("last_value", block.value.weight.view(heads, width, n_hidden).transpose(1, 2).contiguous())
        self._last_key_bias = block.key.bias.view(1, heads, 1, width)
        self._last_value_bias = block.value.bias.view(1, heads, 1, width)
        # The values' bias, which every mixture has once, goes through the projection behind it.
        mix = _scaled(block.mix, 1.0)
        mix.bias.add_(block.mix.weight @ block.value.bias)
        self.mixes[-1] = mix

    def _fold_keys_values(self, classifier: KeyValuePrompt) -> None:
        """See the module's point 3.

        In the last layer the prompt's keys lose the key's bias, and its values the value's, as those of the text do.
        """
        names = []
        keys_values = classifier.keys_values()
        keys_values[-1] = (keys_values[-1][0] - self._last_key_bias, keys_values[-1][1] - self._last_value_bias)
        for layer, (key, value) in enumerate(keys_values):
            for name, tensor in ((f"prompt_key_{layer}", key), (f"prompt_value_{layer}", value)):
                self.register_buffer(name, tensor.detach().contiguous().clone())
                names.append(name)
        self._n_virtual = keys_values[0][0].shape[2]
        self.prompt_names = tuple(names)

    def _shift_positions(self) -> None:
        """The text's rows of the position table, which lie behind the prompt's; with the only token type, if there is one."""
        table = self.embeddings.position_embeddings.weight
        padding = self.embeddings.position_embeddings.padding_idx
        # RoBERTa and MPNet number from padding_idx + 1.
        self._first_position: int = 0 if padding is None else padding + 1
        types = getattr(self.embeddings, "token_type_embeddings", None)
        self.token_types: Any = types if types is not None and types.num_embeddings > 1 else None
        # RoBERTa given ids, as for P-Tuning v2, does not number the padding token, wherever it stands.
        self._skips_padding = self._in_every_layer and padding is not None
        if not self._skips_padding:
            table = table[self._first_position + self._n_virtual :]
        if types is not None and self.token_types is None:
            table = table + types.weight[0]
        self.register_buffer("positions", table.detach().clone())

    def _prompt_rows(self, table: torch.Tensor) -> torch.Tensor:
        """See the module's point 1; shape = (1, n_virtual, n_hidden)"""
        first, n_virtual = self._first_position, self._n_virtual
        rows = table + self.embeddings.position_embeddings.weight[first : first + n_virtual]
        types = getattr(self.embeddings, "token_type_embeddings", None)
        if types is not None:
            rows = rows + types.weight[0]
        rows = self.embeddings.LayerNorm(rows)
        if self.projection is not None:
            rows = self.projection(rows)
        return rows[None].detach().clone()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """See `PromptedClassifier.forward`, without labels."""
        # A zero for each text: adding it repeats a constant over the batch in a single operator.
        zero = attention_mask[:, :1].to(self.positions.dtype) * 0
        constants = {
            name: getattr(self, name) + zero.view(-1, *[1] * (getattr(self, name).dim() - 1))
            for name in self.prompt_names
        }
        pooled = self.pooled(input_ids, attention_mask, token_type_ids, constants)
        return {"logits": self._head(pooled)}

    def pooled(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None,
        prompt: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        """The last layer's row 0, which the head reads.

        Args:
            prompt: the constants by the names in `prompt_names`, of each text its own; shape = (n_batch, …)

        Returns:
            shape = (n_batch, n_hidden)
        """
        n_batch = input_ids.shape[0]
        rows = self._text_rows(input_ids, token_type_ids)
        if not self._in_every_layer:
            rows = torch.cat([prompt["prompt_rows"], rows], dim=1)
        n_hidden = rows.shape[2]
        bias = self._hidden_scores(attention_mask, rows.dtype)[:, None, None]
        distances = self._distances(rows.shape[1])
        flat = rows.reshape(-1, n_hidden)
        for layer in range(self._n_layers - 1):
            context = self._attend(layer, flat, n_batch, bias if distances is None else bias + distances, prompt)
            flat = self._feed_forward(layer, context, flat)
        first = bias[:, :, :1] if distances is None else (bias + distances)[:, :, :1]
        return self._last_row(flat.view(n_batch, -1, n_hidden), first, prompt)

    def _hidden_scores(self, attention_mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """What is added to the scores of keys that are padding, shape = (n_batch, n_virtual + n_text)"""
        hidden = (1 - attention_mask.to(dtype)) * torch.finfo(dtype).min
        return torch.nn.functional.pad(hidden, (self._n_virtual, 0))

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
            assert token_type_ids is not None
            rows = rows + self.token_types(token_type_ids)
        rows = self.embeddings.LayerNorm(rows)
        return rows if self.projection is None else self.projection(rows)

    def _split(self, flat: torch.Tensor, n_batch: int) -> torch.Tensor:
        """Rows, by text or of all texts in one matrix → shape = (n_batch, n_heads, n_rows, n_head)"""
        return flat.view(n_batch, -1, self._heads, self._head_width).transpose(1, 2)

    def _attend(
        self, layer: int, flat: torch.Tensor, n_batch: int, bias: torch.Tensor, prompt: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """Self-attention of a layer before its output projection, in the shape of ``flat``"""
        query = self._split(self.queries[layer](flat), n_batch)
        key = self._split(self.keys[layer](flat), n_batch)
        value = self._split(self.values[layer](flat), n_batch)
        if self._in_every_layer:
            key = torch.cat([prompt[f"prompt_key_{layer}"], key], dim=2)
            value = torch.cat([prompt[f"prompt_value_{layer}"], value], dim=2)
        context = (query @ key.transpose(-1, -2) + bias).softmax(dim=-1) @ value
        return context.transpose(1, 2).reshape(flat.shape)

    def _feed_forward(self, layer: int, context: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """The rest of a layer; both of shape = (…, n_hidden)"""
        rows = self.mix_norms[layer](self.mixes[layer](context) + rows)
        wide = self._activation(self.widens[layer](rows))
        return self.narrow_norms[layer](self.narrows[layer](wide) + rows)

    def _last_row(self, rows: torch.Tensor, bias: torch.Tensor, prompt: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """See `pooled`; rows of shape = (n_batch, n_rows, n_hidden)"""
        n_batch, _, n_hidden = rows.shape
        layer, heads = self._n_layers - 1, self._heads
        first = rows[:, 0]
        # shape = (n_batch, n_heads, 1, n_head)
        query = self.last_query(first).view(n_batch, heads, 1, self._head_width)
        scores = ((query @ self.last_key).view(n_batch, heads, n_hidden) @ rows.transpose(1, 2)).unsqueeze(2)
        if self._in_every_layer:
            scores = torch.cat([query @ prompt[f"prompt_key_{layer}"].transpose(-1, -2), scores], dim=-1)
        shares = (scores + bias).softmax(dim=-1)
        of_text = shares[:, :, 0, self._n_virtual :] if self._in_every_layer else shares[:, :, 0]
        context = (of_text @ rows).unsqueeze(2) @ self.last_value
        if self._in_every_layer:
            context = context + shares[..., : self._n_virtual] @ prompt[f"prompt_value_{layer}"]
        return self._feed_forward(layer, context.reshape(n_batch, -1), first)

    def _head(self, pooled: torch.Tensor) -> torch.Tensor:
        """Row 0 → logits, as the model's own classifier does it, shape = (n_batch, n_labels)"""
        if self.pre_classifier is not None:
            logits: torch.Tensor = self.classifier(torch.relu(self.pre_classifier(pooled)))
        elif self.pooler is not None:
            logits = self.classifier(self.pooler(pooled[:, None]))
        else:
            logits = self.classifier(pooled[:, None])
        return logits


def _scaled(linear: torch.nn.Linear, scale: float) -> torch.nn.Linear:
    """A copy whose output is the original's times a factor."""
    copy = torch.nn.Linear(linear.in_features, linear.out_features)
    with torch.no_grad():
        copy.weight.copy_(linear.weight * scale)
        copy.bias.copy_(linear.bias * scale)
    return copy.requires_grad_(False)
