"""`GpuEncoder`: a `CpuEncoder` in operators that ONNX Runtime computes in one CUDA kernel each.

What differs from the form for a CPU, and why (ONNX Runtime 1.31, contrib_ops/cuda/bert):

- *Attention is one operator.* P-Tuning: ``com.microsoft::Attention``, whose queries, keys and values are one matrix
  product. P-Tuning v2: ``com.microsoft::MultiHeadAttention``, whose keys and values are one product.
- *Lengths stand for padding, not a mask.* Given the vector that `mask_index` makes, the memory-efficient kernel runs for
  any number of rows. Given a mask, or a bias of a row count that is no multiple of 8, the scores take four kernels, and
  those misread that vector; so where they run (MPNet's bias, heads of another width than 8, 16, …), only the lengths are
  given. `OnnxClassifier` tries a padded text before it trusts a GPU.
- *Rows stay apart by text*, so that residual sums, norms, biases and GELUs are found and fused
  (`export.fold.rewrites.gpu_operators`).
- *The last layer is like the others*, but for its one query: to compute no keys and values there, as on a CPU, would take
  a dozen kernels more, which cost more than the product that they save.
- *No matrix product has one right matrix for several left ones.* Its pointers are read from the host, a copy in every
  CUDA graph (before ONNX Runtime 1.30 of whatever lay there by then: its pull request 32121).
"""

from collections.abc import Mapping
from typing import Any, cast

import torch

from export.fold.rewrites.encoder import CpuEncoder, with_bias_of_values
from export.fold.rewrites.gpu_operators import absent_input
from export.runtime.session import KEY_STARTS_END
from train.model.prompted import PromptedClassifier

ALL_STARTS = 2**30
"""More than any batch has, and less than ONNX's highest number, for which ONNX Runtime would remove the cut."""
EFFICIENT_WIDTH = 8
"""The memory-efficient kernel takes heads whose width is a multiple of this."""


def mask_index(n_keys: torch.Tensor, starts_end: torch.Tensor, *, n_queries: int, n_seen: int) -> torch.Tensor:
    """How many keys each text has and where its rows begin, as the memory-efficient kernel reads them.

    A session that leaves attention to cuDNN (`export.runtime.session`) replaces ``starts_end`` by 0.

    Source: ONNX Runtime, contrib_ops/cpu/bert/attention_common.h, MASK_1D_KEY_SEQ_LEN_START.

    Args:
        n_keys: keys of each text, the prompt's included, padding not; shape = (n_batch,)
        starts_end: how many of the starts are given, `ALL_STARTS` for all; shape = (1,)
        n_queries: queries of every text.
        n_seen: keys of every text, padding included.

    Returns:
        int32, shape = (3 · n_batch + 2,): numbers of keys; starts of queries and their end; starts of keys and their end
    """
    n_ends = n_keys.shape[0] + 1
    # A range with a step, no product: its bounds are on the host, and a product with them would be, too.
    starts = [torch.arange(0, n_ends * count, count) for count in (n_queries, n_seen)]
    return torch.cat([n_keys, _FirstOnes.apply(torch.cat(starts), starts_end)]).to(torch.int32)


class _FirstOnes(torch.autograd.Function):
    """The first numbers of a vector, as many as a tensor of shape = (1,) says; torch calls its functions by position."""

    @staticmethod
    def forward(ctx: Any, numbers: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        return numbers[: int(end)].clone()

    @staticmethod
    def symbolic(g: Any, numbers: Any, end: Any) -> Any:
        zero = g.op("Constant", value_t=torch.tensor([0]))
        first = g.op("Slice", numbers, zero, end, zero)
        first.setType(numbers.type().with_sizes([None]))
        return first


class _Attention(torch.autograd.Function):
    """Attention as one operator; torch.autograd and torch.onnx call its functions by position.

    Inputs: queries, keys and values of shape = (n_batch, …, n_heads · n_head) for ``com.microsoft::MultiHeadAttention``,
    or where ``is_packed`` rows, weights and biases, whose product is all three, for ``com.microsoft::Attention``; then
    `mask_index` or the numbers of keys, the number of heads, and what is added to the scores, or None.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> torch.Tensor:
        query, key, value, index, heads, bias, is_packed = inputs
        if is_packed:
            query, key, value = (query @ key + value).chunk(3, dim=2)
        n_batch, n_rows, _ = query.shape
        is_key = torch.arange(key.shape[1]) < index[:n_batch, None]
        hidden = torch.where(is_key, 0.0, torch.finfo(query.dtype).min)[:, None, None]
        mask = hidden if bias is None else hidden + bias
        query, key, value = (rows.unflatten(2, (heads, -1)).transpose(1, 2) for rows in (query, key, value))
        mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=1.0)
        return mixed.transpose(1, 2).reshape(n_batch, n_rows, -1)

    @staticmethod
    def symbolic(g: Any, *inputs: Any) -> Any:
        *tensors, index, heads, bias, is_packed = inputs
        biases = [] if bias is None else [bias]
        if is_packed:
            # Left out: past keys and values.
            more = [index, *([absent_input(g)] if biases else []), *biases]
        else:
            # Left out: the biases of queries, keys and values, which include them already.
            more = [absent_input(g), index, *biases]
        name = "com.microsoft::Attention" if is_packed else "com.microsoft::MultiHeadAttention"
        mixed = g.op(name, *tensors, *more, num_heads_i=heads, scale_f=1.0)
        mixed.setType(tensors[0].type())
        return mixed


class GpuEncoder(CpuEncoder):
    """An encoder's `PromptedClassifier`, rewritten for a GPU; the same logits."""

    last_key: torch.Tensor
    last_value: torch.Tensor
    last_weights: torch.Tensor
    text_biases: torch.Tensor
    key_starts_end: torch.Tensor

    def __init__(self, classifier: PromptedClassifier) -> None:
        super().__init__(classifier)
        with torch.no_grad():
            for layer, projections in enumerate(zip(self.queries, self.keys, self.values, strict=True)):
                packed: list[Any] = [*(projections[1:] if self._in_every_layer else projections)]
                # shape = (n_hidden, n · n_hidden)
                self.register_buffer(f"weights_{layer}", torch.cat([dense.weight for dense in packed]).T.contiguous())
                if not self._in_every_layer:
                    # shape = (n · n_hidden,)
                    self.register_buffer(f"biases_{layer}", torch.cat([dense.bias for dense in packed]))
            if self._in_every_layer:
                self._fold_biases()
            # The last layer's keys and values, whose biases are folded elsewhere; shape = (n_hidden, 2 · n_hidden)
            last = [self.last_key.flatten(0, 1), self.last_value.transpose(1, 2).flatten(0, 1)]
            self.register_buffer("last_weights", torch.cat(last).T.contiguous())
        del self.keys, self.values, self.last_key, self.last_value
        self.register_buffer(KEY_STARTS_END, torch.tensor([ALL_STARTS]))
        if not self._in_every_layer:
            del self.queries

    def _fold_biases(self) -> None:
        """Take the biases from the text's keys and values, as `CpuEncoder` does in the last layer, so that no kernel adds them.

        The prompt's keys and values lose the same. They do so within the graph: its constants are those of every graph, to
        which `append_tasks` adds other adapters'.
        """
        pairs: Any = zip(self.keys, self.values, strict=True)
        biases = [dense.bias for pair in pairs for dense in pair]
        # Of all layers, shape = (n_layers · 2 · n_hidden,)
        self.register_buffer("text_biases", torch.cat([*biases, torch.zeros(2 * self._heads * self._head_width)]))
        for layer, value in enumerate(self.values):
            self.mixes[layer] = with_bias_of_values(cast(Any, self.mixes[layer]), cast(Any, value))

    def _prompt(self, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """The prompt's constants, which here are one for all texts, shape = (1, …)"""
        return {name: getattr(self, name) for name in self.prompt_names}

    def pooled(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None,
        prompt: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        """See `CpuEncoder.pooled`; the prompt may also be one for all texts."""
        rows = self._text_rows(input_ids, token_type_ids)
        if "prompt_rows" in prompt:
            rows = torch.cat([prompt["prompt_rows"].expand(input_ids.shape[0], -1, -1), rows], dim=1)
        n_rows = rows.shape[1]
        distances = self._distances(n_rows)
        n_keys = attention_mask.sum(dim=1) + self._n_virtual
        index = self._index(n_keys, n_rows, n_rows)
        learned = self._learned_keys_values(prompt, input_ids.shape[0]) if self._in_every_layer else None
        for layer in range(self._n_layers - 1):
            weights = getattr(self, f"weights_{layer}")
            if learned is None:
                biases = getattr(self, f"biases_{layer}")
                context = _Attention.apply(rows, weights, biases, index, self._heads, distances, True)
            else:
                context = self._mix(self.queries[layer](rows), rows @ weights, index, learned[layer], None)
            rows = self._feed_forward(layer, context, rows)
        first = rows[:, :1]
        context = self._mix(
            self.last_query(first),
            rows @ self.last_weights,
            self._index(n_keys, 1, n_rows),
            None if learned is None else learned[-1],
            None if distances is None else distances[:, :, :1],
        )
        return self._feed_forward(self._n_layers - 1, context, first)[:, 0]

    def _index(self, n_keys: torch.Tensor, n_queries: int, n_rows: int) -> torch.Tensor:
        """How many keys each text has, in the form that this model's attention kernel reads."""
        if self._has_distances or self._head_width % EFFICIENT_WIDTH:
            return n_keys.to(torch.int32)
        n_seen = n_rows + self._n_virtual if self._in_every_layer else n_rows
        return mask_index(n_keys, self.key_starts_end, n_queries=n_queries, n_seen=n_seen)

    def _learned_keys_values(self, prompt: Mapping[str, torch.Tensor], n_batch: int) -> tuple[torch.Tensor, ...]:
        """The prompt's keys and values side by side, without the text's biases; of each layer,
        shape = (n_batch, n_virtual, 2 · n_hidden)
        """
        keys_values = [
            prompt[f"prompt_{name}_{layer}"].transpose(1, 2).flatten(2)
            for layer in range(self._n_layers)
            for name in ("key", "value")
        ]
        tables = (torch.cat(keys_values, dim=2) - self.text_biases).expand(n_batch, -1, -1)
        return tables.split(2 * self._heads * self._head_width, dim=2)

    def _mix(
        self,
        query: torch.Tensor,
        of_text: torch.Tensor,
        index: torch.Tensor,
        learned: torch.Tensor | None,
        distances: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention of some rows to all, before its output projection, shape = (n_batch, n_queries, n_hidden)

        Args:
            query: shape = (n_batch, n_queries, n_hidden)
            of_text: keys and values side by side, shape = (n_batch, n_rows, 2 · n_hidden)
            learned: one of `_learned_keys_values`; None where the prompt is among the rows.
            distances: added to the scores, shape = (1, n_heads, n_queries, n_rows)
        """
        if learned is not None:
            of_text = torch.cat([learned, of_text], dim=1)
        key, value = of_text.split(self._heads * self._head_width, dim=2)
        mixed: torch.Tensor = _Attention.apply(query, key, value, index, self._heads, distances, False)
        return mixed
