"""One text, every engine of an adapter: each precision of its graph, and each of PyTorch's ways."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from demo.engines.pytorch import EAGER, PYTORCH_MODES
from demo.engines.stage import ONNX_RUNTIME, PYTORCH, Setup, Stage
from demo.engines.timing import BurstPlan
from demo.measure.compare import BURST_BUDGET_SECONDS, MAX_RUNS, MIN_RUNS, PAUSE_SECONDS, Answer
from export.bundle.folder import FP32
from export.runtime.check_text import check_text
from train.common.errors import EngineError


@dataclass(frozen=True)
class EngineLatency:
    """What one engine did with the text."""

    library: str
    mode: str
    """Precision of the graph, or one of `PYTORCH_MODES`."""
    median_ms: float
    """Median of one burst at batch size 1; infinite where the engine cannot run here."""
    agrees: bool | None
    """As `Answer.agrees_with` the first engine, PyTorch eager where the page has it; None too where it cannot run."""

    @property
    def name(self) -> str:
        """For people: "PyTorch, compiled"."""
        return f"{self.library}, {self.mode}"


def measure_all(
    stage: Stage, adapter: str, sentence1: str, sentence2: str = "", *, stopped: Callable[[], bool] = lambda: False
) -> Iterator[tuple[EngineLatency, ...]]:
    """Time one text in every engine, one after the other; yields what there is after each.

    ``stopped`` is asked before each engine. Raises a TextError for a text that cannot be read.
    """
    runs = [(PYTORCH, mode, Setup(adapter, FP32, mode)) for mode in PYTORCH_MODES if stage.has_pytorch]
    runs += [(ONNX_RUNTIME, name, Setup(adapter, name, EAGER)) for name in stage.bundle(adapter).precisions]
    done: list[EngineLatency] = []
    first: Answer | None = None
    for library, name, setup in runs:
        if stopped():
            return
        try:
            opened = stage.open(setup)
        except EngineError:
            # torch.compile needs a C++ compiler, for example.
            done.append(EngineLatency(library, name, float("inf"), agrees=None))
            yield tuple(done)
            continue
        arrays = opened.tokenize([check_text(opened.task, sentence1, sentence2)]).arrays
        engine = opened.pytorch if library == PYTORCH else opened.onnx
        assert engine is not None, "a mode only with PyTorch"
        with stage.measuring:
            answer = Answer.of(engine, opened.task, arrays)
            time.sleep(PAUSE_SECONDS)
            burst = engine.burst(arrays, BurstPlan(MIN_RUNS, MAX_RUNS, BURST_BUDGET_SECONDS))
        first = first or answer
        done.append(EngineLatency(library, name, burst.median_ms, answer.agrees_with(first)))
        yield tuple(done)
