"""`FusedEncoder`: a `FoldedEncoder` as a GPU wants it, in operators that ONNX Runtime computes in one kernel each.

What differs from the form for a CPU, and why (ONNX Runtime 1.31, contrib_ops/cuda/bert):

- *Attention is one operator.* P-Tuning: ``com.microsoft::Attention``, whose queries, keys and values are one matrix
  product. P-Tuning v2: ``com.microsoft::MultiHeadAttention``, whose keys and values are one product.
- *Padding is told by lengths, not by a mask.* Given the vector that `mask_index` makes, the memory-efficient kernel runs
  for any number of rows. Given a mask, or a bias of a row count that is no multiple of 8, the scores take four kernels.
- *Rows stay apart by text*, so that residual sums, norms, biases and GELUs are found and fused (`export.fused`).
- *No matrix product has one matrix for several of its left ones, and no layer has a Concat.* Both read an array of pointers
  from the host, a copy for each in every CUDA graph (before ONNX Runtime 1.30 a wrong one, its pull request 32121).

Heavy: import it where it is used.
"""

from collections.abc import Mapping
from typing import Any

import torch

from export.folded import FoldedEncoder
from train.prompted import PromptedClassifier


def mask_index(attention_mask: torch.Tensor, *, n_prompt_keys: int, n_rows: int, n_seen: int) -> torch.Tensor:
    """How many keys each text has and where its rows begin, as both attention operators read them.

    Args:
        attention_mask: 1 for text, 0 for padding, which stands behind it; shape = (n_batch, n_text)
        n_prompt_keys: keys of the prompt, which stand before the text's.
        n_rows: queries of each text.
        n_seen: keys of each text, padding included.

    Returns:
        int32, shape = (3 · n_batch + 2,): numbers of keys; starts of queries and their end; starts of keys and their end

    Source: ONNX Runtime, contrib_ops/cpu/bert/attention_common.h, MASK_1D_KEY_SEQ_LEN_START.
    """
    n_keys = attention_mask.sum(dim=1) + n_prompt_keys
    texts = torch.arange(attention_mask.shape[0] + 1)
    return torch.cat([n_keys, texts * n_rows, texts * n_seen]).to(torch.int32)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    index: torch.Tensor,
    heads: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """What both operators compute; of query, key and value shape = (n_batch, …, n_heads · n_head)"""
    n_batch, n_rows, _ = query.shape
    by_head = [part.view(n_batch, -1, heads, part.shape[2] // heads).transpose(1, 2) for part in (query, key, value)]
    is_key = torch.arange(key.shape[1]) < index[:n_batch, None]
    hidden = torch.where(is_key, 0.0, torch.finfo(query.dtype).min)[:, None, None]
    mixed = torch.nn.functional.scaled_dot_product_attention(
        *by_head, attn_mask=hidden if bias is None else hidden + bias, scale=1.0
    )
    return mixed.transpose(1, 2).reshape(n_batch, n_rows, -1)


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
        inputs = [rows, weights, biases, index]
        if bias is not None:
            none = g.op("prim::Constant")
            none.setType(torch._C.OptionalType.ofTensor())
            inputs += [none, bias]  # between them: past keys and values
        mixed = g.op("com.microsoft::Attention", *inputs, num_heads_i=heads, scale_f=1.0)
        mixed.setType(rows.type())
        return mixed


class _MultiHeadAttention(torch.autograd.Function):
    """``com.microsoft::MultiHeadAttention``: queries, keys and values → the queries' mixtures."""

    @staticmethod
    def forward(  # noqa: PLR0917 -- the same
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, index: torch.Tensor, heads: int
    ) -> torch.Tensor:
        return _attend(query, key, value, index, heads)

    @staticmethod
    def symbolic(  # noqa: PLR0917 -- the same
        g: Any, query: Any, key: Any, value: Any, index: Any, heads: int
    ) -> Any:
        none = g.op("prim::Constant")
        none.setType(torch._C.OptionalType.ofTensor())
        mixed = g.op(
            "com.microsoft::MultiHeadAttention", query, key, value, none, index, num_heads_i=heads, scale_f=1.0
        )
        mixed.setType(query.type())
        return mixed


class FusedEncoder(FoldedEncoder):
    """An encoder's `PromptedClassifier`, rewritten for a GPU; the same logits.

    Attributes:
        config, prompt_names: see `FoldedEncoder`.
    """

    def __init__(self, classifier: PromptedClassifier) -> None:
        """Rewrite a classifier; see `FoldedEncoder`."""
        super().__init__(classifier)
        with torch.no_grad():
            for layer, parts in enumerate(zip(self.queries, self.keys, self.values, strict=True)):
                packed = parts[1:] if self._in_every_layer else parts
                # shape = (n_hidden, n · n_hidden) and (n · n_hidden,)
                self.register_buffer(f"weights_{layer}", torch.cat([part.weight for part in packed]).T.contiguous())
                self.register_buffer(f"biases_{layer}", torch.cat([part.bias for part in packed]))
        del self.keys, self.values
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
        n_batch = input_ids.shape[0]
        rows = self._text_rows(input_ids, token_type_ids)
        if not self._in_every_layer:
            rows = torch.cat([prompt["prompt_rows"].expand(n_batch, -1, -1), rows], dim=1)
        n_rows = rows.shape[1]
        index = mask_index(
            attention_mask,
            n_prompt_keys=self._n_virtual,
            n_rows=n_rows,
            n_seen=n_rows + self._n_virtual if self._in_every_layer else n_rows,
        )
        distances = None if self.position_bias is None else self.position_bias.compute_position_bias(rows)
        learned = self._learned_keys_values(prompt, n_rows) if self._in_every_layer else ()
        for layer in range(self._n_layers - 1):
            if self._in_every_layer:
                context = self._mix_with_learned(layer, rows, index, learned[layer])
            else:
                weights, biases = getattr(self, f"weights_{layer}"), getattr(self, f"biases_{layer}")
                context = _Attention.apply(rows, weights, biases, index, self._heads, distances)
            rows = self._feed_forward(layer, context, rows)
        hidden = self._hidden_scores(attention_mask, rows.dtype)[:, None]
        return self._last_text_row(rows, hidden if distances is None else hidden + distances[:, :, 0], prompt)

    def _learned_keys_values(self, prompt: Mapping[str, torch.Tensor], n_rows: int) -> tuple[torch.Tensor, ...]:
        """Of each layer but the last the prompt's keys and values side by side, with zeros where the text's will be.

        Returns:
            each of shape = (n_batch or 1, n_virtual + n_rows, 2 · n_hidden)
        """
        parts = [
            prompt[f"prompt_{part}_{layer}"].transpose(1, 2).flatten(2)
            for layer in range(self._n_layers - 1)
            for part in ("key", "value")
        ]
        tables = torch.nn.functional.pad(torch.cat(parts, dim=2), (0, 0, 0, n_rows))
        return tables.split(2 * self._heads * self._head_width, dim=2)

    def _mix_with_learned(
        self, layer: int, rows: torch.Tensor, index: torch.Tensor, learned: torch.Tensor
    ) -> torch.Tensor:
        """P-Tuning v2's self-attention before its output projection; shape = (n_batch, n_rows, n_hidden)"""
        of_text = rows @ getattr(self, f"weights_{layer}") + getattr(self, f"biases_{layer}")
        both = torch.nn.functional.pad(of_text, (0, 0, self._n_virtual, 0)) + learned
        key, value = both.split(self._heads * self._head_width, dim=2)
        mixed: torch.Tensor = _MultiHeadAttention.apply(self.queries[layer](rows), key, value, index, self._heads)
        return mixed

    def _last_text_row(
        self, rows: torch.Tensor, hidden: torch.Tensor, prompt: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """`FoldedEncoder._last_row` with the heads in front, where each has its own matrix for all texts.

        Args:
            rows: shape = (n_batch, n_rows, n_hidden)
            hidden: added to the scores, shape = (n_batch, 1 or n_heads, n_seen)

        Returns:
            shape = (n_batch, n_hidden)
        """
        n_batch, layer = rows.shape[0], self._n_layers - 1
        first = rows[:, :1]
        # shape = (n_heads, n_batch, n_head), later (n_batch, n_heads, n_seen)
        query = self.last_query(first).view(n_batch, self._heads, self._head_width).transpose(0, 1)
        scores = (query @ self.last_key).transpose(0, 1) @ rows.transpose(1, 2)
        if self._in_every_layer:
            key, value = (prompt[f"prompt_{part}_{layer}"].expand(n_batch, -1, -1, -1) for part in ("key", "value"))
            of_prompt = (query.transpose(0, 1)[:, :, None] @ key.transpose(-1, -2))[:, :, 0]
            scores = torch.cat([of_prompt, scores], dim=2)
        shares = (scores + hidden).softmax(dim=2)
        of_text = shares[:, :, self._n_virtual :] if self._in_every_layer else shares
        context = ((of_text @ rows).transpose(0, 1) @ self.last_value).transpose(0, 1)
        if self._in_every_layer:
            context = context + (shares[:, :, None, : self._n_virtual] @ value)[:, :, 0]
        mixed = context.reshape(n_batch, 1, -1) + self.last_value_bias
        return self._feed_forward(layer, mixed, first)[:, 0]
