"""Matrices in integers: rounded to nearest, or by GPTQ (arXiv 2210.17323) so that a product's error stays small.

GPTQ rounds one input channel after the other. What that does to the product is taken back by changes of the channels that
are not yet rounded (equation 3), as far as inputs are correlated: of the inputs X it needs H = Xᵀ·X alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import numpy_helper

from export.bundle.folder import WeightBits
from export.fold.precision.calibration import TaskBatches, measure_grams
from export.fold.precision.dense import dense_products

LARGEST = {7: 64, 8: 127}
"""With 64, two products with an input of 8 bits fit into 16 bits, in which AVX2 sums them."""
DAMPING = 0.01
"""Added to H's diagonal, as a share of its mean, as in GPTQ's own code."""
BLOCK = 128
"""Channels that are rounded before the rest of the matrix is changed, as in GPTQ's own code."""
WIDEST = 8192
"""Input channels of a matrix at most; a wider one is rounded to nearest, as H would take gigabytes."""
GRAM_BYTES = 1e9
"""Memory for the H of some products; the texts are run once for each such part of the graph."""


@dataclass(frozen=True)
class IntegerWeight:
    """A matrix, symmetric, with a scale for each output channel."""

    values: np.ndarray
    """int8, shape = (n_in, n_out)"""
    scales: np.ndarray
    """float32, shape = (n_out,)"""


def round_to_nearest(matrix: np.ndarray, bits: WeightBits = 8) -> IntegerWeight:
    """Each number by itself; matrix: shape = (n_in, n_out)"""
    scales = _scales(matrix, bits)
    rounded = _clipped(matrix / scales, bits).astype(np.int8)
    return IntegerWeight(np.ascontiguousarray(rounded), scales.astype(np.float32))


def round_by_gptq(matrix: np.ndarray, gram: np.ndarray, bits: WeightBits) -> IntegerWeight:
    """By GPTQ, with the scales that rounding to nearest has.

    Args:
        matrix: shape = (n_in, n_out)
        gram: Xᵀ·X of the inputs, shape = (n_in, n_in)
    """
    factor = _inverse_factor(gram)
    if factor is None:
        return round_to_nearest(matrix, bits)
    order, upper = factor
    scales = _scales(matrix, bits)
    left = matrix[order].astype(np.float64)
    rounded = np.empty(matrix.shape, np.int8)
    for start in range(0, len(left), BLOCK):
        end = min(start + BLOCK, len(left))
        errors = np.empty((end - start, left.shape[1]))
        for i in range(start, end):
            integers = _clipped(left[i] / scales, bits)
            rounded[order[i]] = integers
            errors[i - start] = (left[i] - integers * scales) / upper[i, i]
            left[i + 1 : end] -= np.outer(upper[i, i + 1 : end], errors[i - start])
        left[end:] -= upper[start:end, end:].T @ errors
    return IntegerWeight(rounded, scales.astype(np.float32))


def round_weights(model: onnx.ModelProto, tasks: Sequence[TaskBatches], bits: WeightBits) -> dict[str, IntegerWeight]:
    """The matrices of a graph's dense products by GPTQ on calibration texts, by the initializers' names."""
    matrices = {item.name: item for item in model.graph.initializer}
    transposed = {product.weight: product.transposed for product in dense_products(model.graph)}
    found: dict[str, IntegerWeight] = {}
    for readers in _parts(model.graph):
        grams = measure_grams(model, tasks, list(readers))
        for sources, names in readers.items():
            arrays = [numpy_helper.to_array(matrices[name]) for name in names]
            together = [array.T if transposed[name] else array for name, array in zip(names, arrays, strict=True)]
            # Outputs do not depend on each other, so matrices that read the same are rounded as one.
            rounded = round_by_gptq(np.hstack(together), grams[sources], bits)
            ends = np.cumsum([matrix.shape[1] for matrix in together])[:-1]
            parts = zip(np.split(rounded.values, ends, axis=1), np.split(rounded.scales, ends), strict=True)
            for name, (values, scales) in zip(names, parts, strict=True):
                found[name] = IntegerWeight(np.ascontiguousarray(values), scales)
    return found


def _parts(graph: onnx.GraphProto) -> Iterator[dict[tuple[str, ...], list[str]]]:
    """The matrices that read the same tensors, by these, in parts whose H fit into memory.

    A matrix that layers share, as in ALBERT, reads several.
    """
    sources: dict[str, set[str]] = {}
    for product in dense_products(graph):
        sources.setdefault(product.weight, set()).add(product.source)
    shapes = {item.name: item.dims for item in graph.initializer}
    transposed = {product.weight: product.transposed for product in dense_products(graph)}
    part: dict[tuple[str, ...], list[str]] = {}
    size = 0.0
    for weight, names in sources.items():
        n_in = shapes[weight][int(transposed[weight])]
        key = tuple(sorted(names))
        if n_in > WIDEST:
            continue
        if key not in part:
            if part and size + 8 * n_in**2 > GRAM_BYTES:
                yield part
                part, size = {}, 0.0
            size += 8 * n_in**2
        part.setdefault(key, []).append(weight)
    if part:
        yield part


def _scales(matrix: np.ndarray, bits: WeightBits) -> np.ndarray:
    scales = np.abs(matrix).max(axis=0) / LARGEST[bits]
    scales[scales == 0] = 1  # an output that is its bias alone
    return np.asarray(scales)


def _clipped(numbers: np.ndarray, bits: WeightBits) -> np.ndarray:
    return np.rint(numbers).clip(-LARGEST[bits], LARGEST[bits])


def _inverse_factor(gram: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """The channels, largest first, and the upper Cholesky factor of H⁻¹ in that order; None if H has no inverse."""
    sizes = np.diag(gram).copy()
    if not np.isfinite(gram).all() or not sizes.any():
        return None
    order = np.argsort(-sizes, kind="stable")
    damped = gram[np.ix_(order, order)].astype(np.float64)
    damped[np.diag_indices_from(damped)] += DAMPING * sizes.mean()
    try:
        return order, np.linalg.cholesky(np.linalg.inv(damped)).T
    except np.linalg.LinAlgError:
        return None
