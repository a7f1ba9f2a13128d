"""SmoothQuant (arXiv 2211.10438): the outliers of activations are moved into weights, where a scale a channel takes them.

x·W = (x/s)·(s·W) with s_j = max|x_j|^α / max|W_j|^(1-α) for each input channel j (equation 4), but at least 1. 1/s is
folded into what makes x where that is exact; else it is one Mul, for example where a norm feeds the residual as well.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import numpy_helper

from export.fold.precision.dense import DenseProduct, dense_products

HEADS_FIRST = [0, 2, 1, 3]
"""The order of axes that makes (batch, token, head, channel) of (batch, head, token, channel), and back."""
SMALLEST_WEIGHT = 1e-5
"""Share of the largest that a channel's weights count at least, as in SmoothQuant's own code."""
LARGEST_SCALE = 1e4
"""Beyond, fp32's own rounding would show in the logits."""


def smooth(model: onnx.ModelProto, largest: Mapping[str, np.ndarray], alpha: float, *, wide: bool) -> onnx.ModelProto:
    """The same function, with activations that are easier to quantize.

    Args:
        largest: the largest absolute value in each channel of a product's source, by its name; shape = (n_channels,)
        alpha: how much of the difficulty goes to the weights, from 0 to 1
        wide: whether a Mul is also made for a tensor that is wider than what its products make of it, as the one between a
            feed-forward part's two layers, where the Mul takes longest
    """
    smoothed = onnx.ModelProto()
    smoothed.CopyFrom(model)
    graph = _Graph(smoothed.graph)
    for sources, products in _groups(dense_products(smoothed.graph)):
        known = [largest[source] for source in sources if source in largest]
        weights = {product.weight: product for product in products}
        # A matrix that is also looked up in, or is another node's matrix in another role, must stay as it is.
        if len(known) < len(sources) or any(graph.uses[name] > _uses(name, products) for name in weights):
            continue
        if not wide and not graph.is_cheap(sources, products):
            continue
        rows = np.max([graph.channel_sizes(product) for product in weights.values()], axis=0)
        scales = channel_scales(np.max(known, axis=0), rows, alpha)
        if (scales == 1).all():
            continue
        for product in weights.values():
            graph.scale_rows(product, scales)
        for source in sources:
            graph.divide(source, scales, [product.name for product in products if product.source == source])
    graph.write()
    return smoothed


def channel_scales(activations: np.ndarray, weights: np.ndarray, alpha: float) -> np.ndarray:
    """Equation 4 from the largest absolute values, shapes = (n_channels,); a channel that is dead or not finite keeps 1."""
    # A channel that no product reads may be divided by anything, however large it is.
    read = np.maximum(weights.astype(np.float64), SMALLEST_WEIGHT * weights.max(initial=0))
    with np.errstate(all="ignore"):
        scales = activations.astype(np.float64) ** alpha / read ** (1 - alpha)
    usable = np.isfinite(scales) & (scales > 0)
    if not usable.any():
        return np.ones(len(scales), np.float32)
    # Divided by their geometric mean, which the tensor's own scale takes up: x stays near its old size.
    centred = np.where(usable, scales, 1) / np.exp(np.log(scales[usable]).mean())
    # No channel is made larger: it may be small in the calibration texts alone, and then be an outlier in others.
    return np.where(usable, centred.clip(1, LARGEST_SCALE), 1).astype(np.float32)


def _groups(products: Sequence[DenseProduct]) -> list[tuple[list[str], list[DenseProduct]]]:
    """Products that must share their scales, as they share their source or, as in ALBERT, their matrix."""
    groups: list[tuple[set[str], list[DenseProduct]]] = []
    for product in products:
        names = {product.source, product.weight}
        joined = [group for group in groups if group[0] & names]
        groups = [group for group in groups if not group[0] & names]
        members = [member for group in joined for member in group[1]]
        groups.append((names.union(*(group[0] for group in joined)), [*members, product]))
    return [(sorted({product.source for product in members}), members) for _, members in groups]


def _uses(weight: str, products: Sequence[DenseProduct]) -> int:
    return sum(product.weight == weight for product in products)


class _Graph:
    """A graph while its constants change."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._graph = graph
        self._constants = {item.name: item for item in graph.initializer}
        self._makers = {output: node for node in graph.node for output in node.output}
        self._nodes = {node.name: node for node in graph.node}
        self._products = {product.name: product for product in dense_products(graph)}
        self._transposed = {product.weight for product in self._products.values() if product.transposed}
        self._added: dict[str, onnx.NodeProto] = {}
        self.uses = Counter(name for node in graph.node for name in node.input)
        self.uses.update(item.name for item in graph.output)

    def _array(self, name: str) -> np.ndarray:
        return numpy_helper.to_array(self._constants[name])

    def _change(self, name: str, array: np.ndarray) -> None:
        self._constants[name].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array, np.float32), name))

    def channel_sizes(self, product: DenseProduct) -> np.ndarray:
        """The largest absolute weight of each input channel, shape = (n_channels,)"""
        return np.asarray(np.abs(self._array(product.weight)).max(axis=0 if product.transposed else 1))

    def scale_rows(self, product: DenseProduct, scales: np.ndarray) -> None:
        array = self._array(product.weight)
        self._change(product.weight, array * (scales if product.transposed else scales[:, None]))

    def is_cheap(self, sources: Sequence[str], products: Sequence[DenseProduct]) -> bool:
        """Whether all of these tensors can be divided for nothing, or are no wider than what is made of them."""
        for source in sources:
            readers = [product for product in products if product.source == source]
            n_channels = len(self.channel_sizes(readers[0]))
            is_wide = n_channels > sum(self._n_outputs(product) for product in readers)
            if is_wide and (self.uses[source] > len(readers) or self._folds_into(source, n_channels) is None):
                return False
        return True

    def divide(self, source: str, scales: np.ndarray, readers: Sequence[str]) -> None:
        """Divide a tensor by its channels' scales, for the products that read it."""
        constants = self._folds_into(source, len(scales)) if self.uses[source] == len(readers) else None
        if constants is not None:
            for name in constants:
                array = self._array(name)
                # A dense product's matrix has its output channels last, or first where it is stored transposed.
                self._change(name, array / (scales[:, None] if name in self._transposed else scales))
            return
        inverse, divided = f"{source}_inverse_scales", f"{source}_smoothed"
        self._graph.initializer.append(numpy_helper.from_array((1 / scales).astype(np.float32), inverse))
        first = next(node for node in self._graph.node if node.name in readers)
        node = onnx.helper.make_node("Mul", [source, inverse], [divided], name=f"{first.name}_smoothing")
        self._added[first.name] = node
        for reader in readers:
            self._nodes[reader].input[0] = divided

    def write(self) -> None:
        """Put the new nodes in their places, each before the first that reads it."""
        nodes = [new for node in self._graph.node for new in (self._added.get(node.name), node) if new is not None]
        del self._graph.node[:]
        self._graph.node.extend(nodes)

    def _folds_into(self, name: str, n_channels: int) -> list[str] | None:
        """The constants that are divided in a tensor's place, which changes nothing else; None where there are none."""
        node = self._makers.get(name)
        if node is None:
            return None
        inputs = list(node.input)
        if node.op_type == "LayerNormalization":
            return inputs[1:] if all(self._is_own_vector(item, n_channels) for item in inputs[1:]) else None
        if node.name in self._products:
            product = self._products[node.name]
            own = self.uses[product.weight] == 1 and all(self._is_own_vector(item, n_channels) for item in inputs[2:])
            return inputs[1:] if own and self._n_outputs(product) == n_channels else None
        if node.op_type in {"Relu", "Mul"}:
            # max(x, 0)/s = max(x/s, 0), and a·b/s = a·(b/s).
            found = (self._folds_input(item, n_channels) for item in inputs)
            return next((constants for constants in found if constants is not None), None)
        if node.op_type == "Add":
            both = [self._folds_input(item, n_channels) for item in inputs]
            return None if None in both else [name for constants in both for name in constants or []]
        values = self._values_of_attention(node)
        return self._folds_input(values, n_channels) if values else None

    def _folds_input(self, name: str, n_channels: int) -> list[str] | None:
        if self._is_own_vector(name, n_channels):
            return [name]
        return self._folds_into(name, n_channels) if self.uses[name] == 1 else None

    def _values_of_attention(self, node: onnx.NodeProto) -> str | None:
        """The tensor of all heads' values, where a node joins the heads of softmax(…)·values.

        Heads are split and joined by one Reshape and one Transpose each, which leaves every channel in its place.
        """
        before = self._before(node, "Reshape", "Transpose", "MatMul")
        if before is None or list(before[1].attribute[0].ints) != HEADS_FIRST:
            return None
        values = self._makers.get(before[2].input[1])
        split = self._before(values, "Transpose", "Reshape") if values is not None else None
        if split is None or list(split[0].attribute[0].ints) != HEADS_FIRST:
            return None
        return str(split[1].input[0])

    def _before(self, node: onnx.NodeProto, *types: str) -> list[onnx.NodeProto] | None:
        """A node and those before it, by their first inputs, if they are of these types and nothing else reads them."""
        found: list[onnx.NodeProto] = []
        for op_type in types:
            following = self._makers.get(found[-1].input[0]) if found else node
            if following is None or following.op_type != op_type or self.uses[following.output[0]] != 1:
                return None
            found.append(following)
        return found

    def _n_outputs(self, product: DenseProduct) -> int:
        return int(self._constants[product.weight].dims[0 if product.transposed else 1])

    def _is_own_vector(self, name: str, n_channels: int) -> bool:
        item = self._constants.get(name)
        return item is not None and list(item.dims) == [n_channels] and self.uses[name] == 1
