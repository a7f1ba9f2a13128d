"""How many multiply-adds an engine spends on a batch: what a roofline needs beside the time.

Counted are matrix products: dense layers, attention's two products, the head. Not counted is what is small beside
them, or no product: softmax, LayerNorm, activations, embeddings. A causal mask is not exploited by any engine here,
so neither is it by the count.
"""

from dataclasses import dataclass
from typing import Any

from export.bench.engines import OURS, PEFT


@dataclass(frozen=True)
class Dimensions:
    """What a model's arithmetic follows from.

    Attributes:
        hidden: width of a row.
        wide: width inside a feed-forward part.
        wide_products: dense layers of a feed-forward part: 2, or 3 where a gate is one of them.
        keys: width of a row's keys, and of its values; less than ``hidden`` where heads share them.
        heads: of attention.
        layers: how many.
        labels: classes.
        is_decoder: whether it is causal.
        has_dense_head: whether the head (or the pooler) has a dense layer before the one that gives the logits.
        virtual_tokens: length of the prompt.
        in_every_layer: whether the prompt is keys and values (P-Tuning v2) or rows.
    """

    hidden: int
    wide: int
    wide_products: int
    keys: int
    heads: int
    layers: int
    labels: int
    is_decoder: bool
    has_dense_head: bool
    virtual_tokens: int
    in_every_layer: bool

    @staticmethod
    def of(config: Any, *, labels: int, is_decoder: bool, virtual_tokens: int, in_every_layer: bool) -> "Dimensions":
        """From a transformers configuration of any supported type.

        Args:
            config: `transformers.PretrainedConfig`; the types name the same thing differently.
        """
        hidden, heads = config.hidden_size, config.num_attention_heads
        names = ("intermediate_size", "hidden_dim", "ffn_dim", "n_inner")
        wide = next((value for name in names if (value := getattr(config, name, None))), 4 * hidden)
        shared = getattr(config, "num_key_value_heads", None) or heads
        return Dimensions(
            hidden=hidden,
            wide=wide,
            wide_products=3 if config.model_type == "llama" else 2,
            keys=hidden * shared // heads,
            heads=heads,
            layers=config.num_hidden_layers,
            labels=labels,
            is_decoder=is_decoder,
            has_dense_head=not is_decoder,
            virtual_tokens=virtual_tokens,
            in_every_layer=in_every_layer,
        )

    def multiply_adds(self, family: str, batch_size: int, length: int) -> int:
        """Of one batch, padding included, since it is computed like everything else.

        Args:
            family: of the engine. PEFT computes the rows of P-Tuning's prompt for every request, a decoder's too. The
                plain export has a decoder's as keys and values. Ours computes an encoder's last layer for one row.
            length: of the texts in tokens, without the prompt.
        """
        seen = self.virtual_tokens + length
        prompt_is_rows = not self.in_every_layer and (family == PEFT or not self.is_decoder)
        rows = seen if prompt_is_rows else length
        whole = self._row(seen) * rows
        layers = self.layers * whole
        if family == OURS and not self.is_decoder:
            layers += self._folded_last_layer(rows, seen) - whole
        head = self.hidden * self.labels + (self.hidden**2 if self.has_dense_head else 0)
        return batch_size * (layers + head)

    def _feed_forward(self) -> int:
        return self.wide_products * self.hidden * self.wide

    def _row(self, seen: int) -> int:
        """One row in one layer, which sees so many keys."""
        projections = 2 * self.hidden**2 + 2 * self.hidden * self.keys
        attention = 2 * seen * self.hidden
        return projections + attention + self._feed_forward()

    def _folded_last_layer(self, rows: int, seen: int) -> int:
        """One text in the last layer of `export.fold.rewrites.encoder.CpuEncoder`.

        One row has a query, which goes through the key's weights instead of the keys, and the values' weights come
        after the sum over rows; so each head meets whole rows. A prompt's own keys and values are met as usual.
        """
        projections = 4 * self.hidden**2
        attention = 2 * self.heads * rows * self.hidden + 2 * (seen - rows) * self.hidden
        return projections + attention + self._feed_forward()
