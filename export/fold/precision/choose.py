"""Chooses a graph in int8, by its weights' bits, by smoothing and by the kind of scales; then by single products in fp32.

What is chosen by the logits' error is chosen on calibration texts, never on the rows of the gate.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import onnx

from export.bundle.folder import FP32, GRAPH_FILES, INT8, Int8Form, WeightBits
from export.fold.graphs.files import save_graph
from export.fold.precision.calibration import BATCH_SIZE, TaskBatches, measure_activations, session_in_memory
from export.fold.precision.dense import dense_products, load_graph
from export.fold.precision.fidelity import root_mean_square
from export.fold.precision.gate import Cost, run_for_task, task_logits
from export.fold.precision.integer import quantize_products
from export.fold.precision.rounding import IntegerWeight, round_weights
from export.fold.precision.smooth import smooth
from export.runtime.session import overflows
from train.common.console import say
from train.common.errors import PrecisionError

ALPHAS = (0.4, 0.5, 0.6, 0.7)
CHOOSING_TEXTS = 96
"""Calibration texts on which candidates are compared by the logits' error."""
RANKING_TEXTS = 32
"""The same for single products, of which there are many."""
TIMED_RUNS = 15
SLOWER = 1.02
"""Static scales are taken up to this ratio of the dynamic graph's time: rows independent of their batch are worth that."""


@dataclass(frozen=True)
class Candidate:
    """A way to make int8 of a graph."""

    alpha: float | None
    """SmoothQuant's α; None without smoothing."""
    wide: bool = False
    """Whether a tensor that is wider than what its products make of it gets a Mul too."""
    weight_bits: WeightBits = 8
    kept_fp32: tuple[str, ...] = ()
    """Names of products that stay in fp32."""


class Int8Chooser:
    """A graph in fp32, and what calibration texts say of it."""

    def __init__(self, folder: Path, texts: Sequence[TaskBatches]) -> None:
        """Run the graph on the calibration texts.

        Raises:
            PrecisionError: no product of the graph has a constant side.
        """
        self._path = folder / GRAPH_FILES[INT8]
        self._model = load_graph(folder / GRAPH_FILES[FP32])
        self.products = dense_products(self._model.graph)
        if not self.products:
            raise PrecisionError(
                "int8 would win nothing: the graph has no product with a constant matrix. Take --precision fp32."
            )
        self._texts = [_sample(task, CHOOSING_TEXTS) for task in texts]
        self._few = [_sample(task, RANKING_TEXTS) for task in texts]
        self._activations = measure_activations(self._model, self._texts)
        self._references = task_logits(session_in_memory(self._model), self._texts)
        self._alphas: dict[bool, float | None] = {}
        """α by whether it is for wide tensors too."""
        self._last: tuple[Candidate, onnx.ModelProto, dict[str, IntegerWeight]] | None = None

    def choose(self, judge: Callable[[Path], Cost], *, may_be_static: bool) -> tuple[Int8Form, Cost]:
        """Write the graph in int8; ``judge`` says what the graph in a file costs.

        Returns:
            what was chosen, and its cost, which may be more than is allowed
        """
        n_bits: tuple[WeightBits, ...] = (7, 8) if overflows() else (8,)
        for bits, wide in product(n_bits, (False, True)):
            candidate = self._with_best_alpha(Candidate(None, wide, bits))
            cost = self._judge(candidate, judge)
            form = self._form(candidate)
            if may_be_static:
                form, cost = self._try_static(candidate, form, cost, judge)
            if cost.passed:
                return form, cost
        candidate, cost = self._give_up_products(candidate, cost, judge)
        form = self._form(candidate)
        return self._try_static(candidate, form, cost, judge) if may_be_static and cost.passed else (form, cost)

    def _form(self, candidate: Candidate) -> Int8Form:
        return Int8Form(
            activations="dynamic",
            alpha=candidate.alpha,
            wide=candidate.wide,
            weight_bits=candidate.weight_bits,
            kept_fp32=candidate.kept_fp32,
            calibration=self._texts[0].name,
            n_texts=sum(task.n_texts for task in self._texts),
        )

    def _judge(self, candidate: Candidate, judge: Callable[[Path], Cost]) -> Cost:
        save_graph(self._quantized(candidate), self._path)
        cost = judge(self._path)
        if not cost.passed:
            say(f"      int8, {self._form(candidate)}: {cost}")
        return cost

    def _smoothed(self, candidate: Candidate) -> onnx.ModelProto:
        if candidate.alpha is None:
            return self._model
        largest = {name: found.largest for name, found in self._activations.items()}
        return smooth(self._model, largest, candidate.alpha, wide=candidate.wide)

    def _rounded(self, candidate: Candidate) -> tuple[onnx.ModelProto, dict[str, IntegerWeight]]:
        """The smoothed graph, and its matrices in integers; made once for candidates that differ in ``kept_fp32`` alone."""
        key = replace(candidate, kept_fp32=())
        if self._last is None or self._last[0] != key:
            smoothed = self._smoothed(candidate)
            self._last = key, smoothed, round_weights(smoothed, self._texts, candidate.weight_bits)
        return self._last[1:]

    def _quantized(self, candidate: Candidate) -> onnx.ModelProto:
        smoothed, weights = self._rounded(candidate)
        return quantize_products(smoothed, weights=weights, kept_fp32=candidate.kept_fp32)

    def _error(self, model: onnx.ModelProto) -> float:
        return root_mean_square(self._references, task_logits(session_in_memory(model), self._texts))

    def _with_best_alpha(self, candidate: Candidate) -> Candidate:
        """The candidate with the α that makes the least error; the same one with 7 bits and with 8."""
        if candidate.wide not in self._alphas:
            alphas = ALPHAS if candidate.wide else (None, *ALPHAS)
            candidates = [replace(candidate, alpha=alpha) for alpha in alphas]
            # To round to nearest is faster, and the order is nearly the same, but for wide tensors: without GPTQ their best
            # α is a smaller one.
            models = (
                self._quantized(each) if candidate.wide else quantize_products(self._smoothed(each))
                for each in candidates
            )
            self._alphas[candidate.wide] = alphas[int(np.argmin([self._error(model) for model in models]))]
        return replace(candidate, alpha=self._alphas[candidate.wide])

    def _give_up_products(
        self, candidate: Candidate, cost: Cost, judge: Callable[[Path], Cost]
    ) -> tuple[Candidate, Cost]:
        """Leave products in fp32 until the cost is allowed, or half of the time is spent in them."""
        ranked = self._by_error_for_time(candidate)
        whole = sum(self._times().values())
        kept: list[str] = []
        last = 0
        for name in ranked:
            if sum(self._times()[one] for one in (*kept, name)) > whole / 2:
                continue
            kept.append(name)
            # One more at a time costs an hour in a large model.
            if len(kept) < max(1.5 * last, last + 1):
                continue
            last = len(kept)
            candidate = replace(candidate, kept_fp32=tuple(kept))
            cost = self._judge(candidate, judge)
            if cost.passed:
                break
        return candidate, cost

    def _times(self) -> Mapping[str, float]:
        """A measure of each product's time by its name: multiply-adds."""
        sizes = {item.name: float(np.prod(item.dims)) for item in self._model.graph.initializer}
        return {item.name: sizes[item.weight] * self._activations[item.source].n_rows for item in self.products}

    def _by_error_for_time(self, candidate: Candidate) -> list[str]:
        """The products' names, first the one that wins most when it stays in fp32, for the time that it takes."""
        references = task_logits(session_in_memory(self._model), self._few)

        def error(kept: tuple[str, ...]) -> float:
            model = self._quantized(replace(candidate, kept_fp32=kept))
            return root_mean_square(references, task_logits(session_in_memory(model), self._few))

        say(f"      ranking {len(self.products)} dense products by what int8 in them costs")
        before, times = error(()), self._times()
        won = {item.name: (before - error((item.name,))) / times[item.name] for item in self.products}
        return sorted(won, key=won.__getitem__, reverse=True)

    def _try_static(
        self, candidate: Candidate, form: Int8Form, cost: Cost, judge: Callable[[Path], Cost]
    ) -> tuple[Int8Form, Cost]:
        """Take static scales instead where they pass and are no slower, or where dynamic ones do not pass."""
        smoothed, weights = self._rounded(candidate)
        dynamic = self._quantized(candidate)
        ranges = {name: found.range for name, found in measure_activations(smoothed, self._texts).items()}
        if not all(np.isfinite(bounds).all() for bounds in ranges.values()):
            return form, cost
        static = quantize_products(smoothed, weights=weights, kept_fp32=candidate.kept_fp32, ranges=ranges)
        if cost.passed:
            dynamic_ms, static_ms = _time_both(dynamic, static, self._texts[0])
            form = replace(form, dynamic_ms=dynamic_ms, static_ms=static_ms)
            if static_ms > SLOWER * dynamic_ms:
                return form, cost
        save_graph(static, self._path)
        static_cost = judge(self._path)
        if static_cost.passed:
            return replace(form, activations="static"), static_cost
        if not cost.passed:
            say(f"      int8, {replace(form, activations='static')}: {static_cost}")
        save_graph(dynamic, self._path)
        return form, cost


def _sample(task: TaskBatches, n_texts: int) -> TaskBatches:
    """Batches of about so many texts, of all lengths."""
    n_wanted = min(-(-n_texts // BATCH_SIZE), len(task.batches))
    picked = (round(i) for i in np.linspace(0, len(task.batches) - 1, n_wanted))
    return replace(task, batches=tuple(task.batches[i] for i in picked))


def _time_both(one: onnx.ModelProto, other: onnx.ModelProto, texts: TaskBatches) -> tuple[float, float]:
    """Medians of one text's time in ms, in turn."""
    sessions = [session_in_memory(model) for model in (one, other)]
    longest = texts.batches[-1]
    batch = {name: np.ascontiguousarray(array[:1]) for name, array in longest.items()}
    runs_ms: list[list[float]] = [[], []]
    for _ in range(TIMED_RUNS + 1):
        for session, times in zip(sessions, runs_ms, strict=True):
            run_for_task(session, batch, texts.number)  # for the caches, which the other one used
            start = time.perf_counter()
            run_for_task(session, batch, texts.number)
            times.append(1000 * (time.perf_counter() - start))
    dynamic_ms, static_ms = (float(np.median(times[1:])) for times in runs_ms)
    return dynamic_ms, static_ms
