"""`FusedEncoder`: a `FoldedEncoder` as a GPU wants it, in operators that ONNX Runtime computes in one kernel each.

What differs from the form for a CPU, and why (ONNX Runtime 1.31, contrib_ops/cuda/bert):

- *Attention is one operator.* P-Tuning: ``com.microsoft::Attention``, whose queries, keys and values are one matrix
  product. P-Tuning v2: ``com.microsoft::MultiHeadAttention``, whose keys and values are one product.
- *Padding is told by lengths, not by a mask.* Given the vector that `mask_index` makes, the memory-efficient kernel runs
  for any number of rows. Given a mask, or a bias of a row count that is no multiple of 8, the scores take four kernels,
  and those misread that vector; so where they run (MPNet's bias, heads of another width than 8, 16, …), the lengths alone
  are given. `OnnxClassifier` tries a padded text before it trusts a GPU.
- *Rows stay apart by text*, so that residual sums, norms, biases and GELUs are found and fused (`export.fold.gpu_operators`).
- *The last layer is no exception*, but for its one query: to compute no keys and values there, as on a CPU, would take a
  dozen kernels more, which cost more than the product that they save.
- *No matrix product has one matrix for several of its left ones.* For such a one pointers are read from the host, a copy
  in every CUDA graph (before ONNX Runtime 1.30 of whatever lay there by then: its pull request 32121).

Heavy: import it where it is used.
"""

from collections.abc import Mapping
from typing import Any

import torch

from export.fold.encoder import FoldedEncoder
from train.model.prompted import PromptedClassifier

EFFICIENT_WIDTH = 8
"""The memory-efficient kernel takes heads whose width is a multiple of it."""


def mask_index(n_keys: torch.Tensor, *, n_queries: int, n_seen: int) -> torch.Tensor:
    """How many keys each text has and where its rows begin, as the memory-efficient kernel reads them.

    Args:
        n_keys: of each text, the prompt's included, padding not; shape = (n_batch,)
        n_queries: of each text.
        n_seen: keys of each text, padding included.

    Returns:
        int32, shape = (3 · n_batch + 2,): numbers of keys; starts of queries and their end; starts of keys and their end

    Source: ONNX Runtime, contrib_ops/cpu/bert/attention_common.h, MASK_1D_KEY_SEQ_LEN_START.
    """
    n_ends = n_keys.shape[0] + 1
    # By the range itself and no product: its bounds are on the host, and what is multiplied with them would be, too.
    starts = [torch.arange(0, n_ends * count, count) for count in (n_queries, n_seen)]
    return torch.cat([n_keys, *starts]).to(torch.int32)


def _attend(  # noqa: PLR0917 -- of the functions below, which torch.autograd calls so
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    index: torch.Tensor,
    heads: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """What both operators compute; of query, key and value shape = (n_batch, …, n_heads · n_head)"""
    n_batch, n_rows, _ = query.shape

    def by_head(part: torch.Tensor) -> torch.Tensor:
        return part.view(n_batch, -1, heads, part.shape[2] // heads).transpose(1, 2)

    is_key = torch.arange(key.shape[1]) < index[:n_batch, None]
    hidden = torch.where(is_key, 0.0, torch.finfo(query.dtype).min)[:, None, None]
    mask = hidden if bias is None else hidden + bias
    mixed = torch.nn.functional.scaled_dot_product_attention(
        by_head(query), by_head(key), by_head(value), attn_mask=mask, scale=1.0
    )
    return mixed.transpose(1, 2).reshape(n_batch, n_rows, -1)


def _none(g: Any) -> Any:
    """An input that is left out."""
    none = g.op("prim::Constant")
    none.setType(torch._C.OptionalType.ofTensor())
    return none


class _Attention(torch.autograd.Function):
    """``com.microsoft::Attention``: rows → their mixture, projections included."""

    @staticmethod
    def forward(  # noqa: PLR0917 -- torch.autograd takes no keywords
        ctx: Any,
        rows: torch.Tensor,
        weights: torch.Tensor,
        biases: torch.Tensor,
        index: torch.Tensor,
        heads: int,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        query, key, value = (rows @ weights + biases).chunk(3, dim=2)
        return _attend(query, key, value, index, heads, bias)

    @staticmethod
    def symbolic(  # noqa: PLR0917 -- the same
        g: Any, rows: Any, weights: Any, biases: Any, index: Any, heads: int, bias: Any
    ) -> Any:
        # Between keys' numbers and bias: past keys and values.
        inputs = [rows, weights, biases, index, *([] if bias is None else [_none(g), bias])]
        mixed = g.op("com.microsoft::Attention", *inputs, num_heads_i=heads, scale_f=1.0)
        mixed.setType(rows.type())
        return mixed


class _MultiHeadAttention(torch.autograd.Function):
    """``com.microsoft::MultiHeadAttention``: queries, keys and values → the queries' mixtures."""

    @staticmethod
    def forward(  # noqa: PLR0917 -- the same
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        index: torch.Tensor,
        heads: int,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        return _attend(query, key, value, index, heads, bias)

    @staticmethod
    def symbolic(  # noqa: PLR0917 -- the same
        g: Any, query: Any, key: Any, value: Any, index: Any, heads: int, bias: Any
    ) -> Any:
        # Between values and keys' numbers: biases of all three, which are in them already.
        inputs = [query, key, value, _none(g), index, *([] if bias is None else [bias])]
        mixed = g.op("com.microsoft::MultiHeadAttention", *inputs, num_heads_i=heads, scale_f=1.0)
        mixed.setType(query.type())
        return mixed


class FusedEncoder(FoldedEncoder):
    """An encoder's `PromptedClassifier`, rewritten for a GPU; the same logits.

    Attributes:
        config, prompt_names: see `FoldedEncoder`.
    """

    last_key: torch.Tensor
    last_value: torch.Tensor
    last_weights: torch.Tensor

    def __init__(self, classifier: PromptedClassifier) -> None:
        """Rewrite a classifier; see `FoldedEncoder`."""
        super().__init__(classifier)
        with torch.no_grad():
            for layer, parts in enumerate(zip(self.queries, self.keys, self.values, strict=True)):
                packed: list[Any] = [*(parts[1:] if self._in_every_layer else parts)]
                # shape = (n_hidden, n · n_hidden) and (n · n_hidden,)
                self.register_buffer(f"weights_{layer}", torch.cat([part.weight for part in packed]).T.contiguous())
                self.register_buffer(f"biases_{layer}", torch.cat([part.bias for part in packed]))
            # Keys and values of the last layer, which have no biases any more; shape = (n_hidden, 2 · n_hidden)
            last = [self.last_key.flatten(0, 1), self.last_value.transpose(1, 2).flatten(0, 1)]
            self.register_buffer("last_weights", torch.cat(last).T.contiguous())
        del self.keys, self.values, self.last_key, self.last_value
        if not self._in_every_layer:
            del self.queries

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """See `PromptedClassifier.forward`, without labels."""
        constants = {name: getattr(self, name) for name in self.prompt_names}
        return {"logits": self._head(self.pooled(input_ids, attention_mask, token_type_ids, constants))}

    def pooled(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None,
        prompt: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        """See `FoldedEncoder.pooled`.

        Args:
            prompt: of each text its own constants, or one for all; shape = (n_batch or 1, …)
        """
        rows = self._text_rows(input_ids, token_type_ids)
        if not self._in_every_layer:
            rows = torch.cat([prompt["prompt_rows"].expand(input_ids.shape[0], -1, -1), rows], dim=1)
        n_rows = rows.shape[1]
        distances = self._distances(n_rows)
        n_keys = attention_mask.sum(dim=1) + self._n_virtual
        index = self._index(n_keys, n_rows, n_rows)
        learned = self._learned_keys_values(prompt, n_rows) if self._in_every_layer else None
        for layer in range(self._n_layers - 1):
            weights, biases = getattr(self, f"weights_{layer}"), getattr(self, f"biases_{layer}")
            if learned is None:
                context = _Attention.apply(rows, weights, biases, index, self._heads, distances)
            else:
                query = self.queries[layer](rows)
                context = self._mix(query, rows @ weights + biases, index, learned[layer], None)
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
        """How many keys each text has, in the form that the kernel of this model's attention reads."""
        if self._has_distances or self._head_width % EFFICIENT_WIDTH:
            return n_keys.to(torch.int32)
        return mask_index(
            n_keys, n_queries=n_queries, n_seen=n_rows + self._n_virtual if self._in_every_layer else n_rows
        )

    def _learned_keys_values(self, prompt: Mapping[str, torch.Tensor], n_rows: int) -> tuple[torch.Tensor, ...]:
        """Of each layer the prompt's keys and values side by side, with zeros where the text's will be.

        Returns:
            each of shape = (n_batch or 1, n_virtual + n_rows, 2 · n_hidden)
        """
        parts = [
            prompt[f"prompt_{part}_{layer}"].transpose(1, 2).flatten(2)
            for layer in range(self._n_layers)
            for part in ("key", "value")
        ]
        tables = torch.nn.functional.pad(torch.cat(parts, dim=2), (0, 0, 0, n_rows))
        return tables.split(2 * self._heads * self._head_width, dim=2)

    def _mix(
        self,
        query: torch.Tensor,
        of_text: torch.Tensor,
        index: torch.Tensor,
        learned: torch.Tensor | None,
        distances: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention of some rows to all, before its output projection.

        Args:
            query: shape = (n_batch, n_queries, n_hidden)
            of_text: keys and values side by side, shape = (n_batch, n_rows, 2 · n_hidden)
            index: see `_index`.
            learned: one of `_learned_keys_values`; None where the prompt is among the rows.
            distances: added to the scores, shape = (1, n_heads, n_queries, n_rows)

        Returns:
            shape = (n_batch, n_queries, n_hidden)
        """
        if learned is not None:
            # A sum of two tables, each with zeros where the other has its rows.
            of_text = torch.nn.functional.pad(of_text, (0, 0, self._n_virtual, 0)) + learned
        key, value = of_text.split(self._heads * self._head_width, dim=2)
        mixed: torch.Tensor = _MultiHeadAttention.apply(query, key, value, index, self._heads, distances)
        return mixed
