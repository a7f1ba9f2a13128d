"""One text, two engines: what they answer, how long it takes, and how far apart they are."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from demo.engines.stage import AnyEngine, OpenedEngines, Setup, Stage
from demo.engines.timing import Arrays, Burst, BurstPlan, Served, join_bursts
from export.runtime.check_text import check_text
from train.common.errors import EngineError
from train.config import MULTI_LABEL, REGRESSION
from train.data.tasks import SEPARATOR, Task

PAUSE_SECONDS = 0.4
"""Idle time before each burst: after 0.3 s no thread pool of the other engine spins any more."""

ROUNDS = 4
"""Bursts of each engine, in turn. Each round gives a speed-up, so that the spread is known."""

MIN_RUNS, MAX_RUNS = 5, 50
BURST_BUDGET_SECONDS = 0.5
"""How long PyTorch's burst goes on, within these bounds; ONNX Runtime gets the same number of runs."""

DISTURBED = 1.5
"""Largest over smallest speed-up of the rounds, above which the machine was not quiet."""

CONTEXT_CHARACTERS = 24
"""How much of a text is shown before the place where it was cut."""


def is_disturbed(round_speedups: Sequence[float]) -> bool:
    """Whether something else must have used the machine meanwhile."""
    return bool(round_speedups) and max(round_speedups) > DISTURBED * min(round_speedups)


def finite(logits: np.ndarray, engine: str) -> np.ndarray:
    """The logits, or an EngineError where one is no number: argmax would make a label of it all the same."""
    if not np.isfinite(logits).all():
        raise EngineError(f"The {engine} engine gave logits that are no numbers. Choose another precision.")
    return logits


@dataclass(frozen=True)
class Answer:
    """One engine's prediction for a text."""

    task: Task
    logits: tuple[float, ...]
    latency: Burst | None = None
    """All bursts so far, at batch size 1; None until there is one."""
    served: Served | None = None
    """Which of several replicas answered; None for an engine in one process."""

    @staticmethod
    def of(engine: AnyEngine, task: Task, arrays: Arrays) -> "Answer":
        """Ask an engine about one text, as token ids by the names of the graph's inputs."""
        return Answer(task, tuple(finite(engine.logits(arrays), engine.name)[0].tolist()), served=engine.served)

    @property
    def _row(self) -> np.ndarray:
        return np.array([self.logits])

    @property
    def predicted(self) -> int | float | tuple[str, ...]:
        """A class index, a number, or the labels of a text that may have several."""
        (found,) = self.task.predict(self._row)
        if self.task.kind == MULTI_LABEL:
            return tuple(name for name, is_one in zip(self.task.labels, found, strict=True) if is_one)
        return float(found) if self.task.kind == REGRESSION else int(found)

    @property
    def probabilities(self) -> dict[str, float]:
        """One for every label, in the order of the logits; of a regression its number."""
        return dict(zip(self.task.labels, self.task.probabilities(self._row)[0].tolist(), strict=True))

    @property
    def label(self) -> str:
        """The prediction in words: a class, labels with commas between, or a number."""
        predicted = self.predicted
        if isinstance(predicted, tuple):
            return SEPARATOR.join(predicted)
        return f"{predicted:.4f}" if isinstance(predicted, float) else self.task.labels[predicted]

    def agrees_with(self, other: "Answer") -> bool | None:
        """Whether both are the same label or labels; None for numbers, whose difference says it."""
        return None if self.task.kind == REGRESSION else self.predicted == other.predicted

    @property
    def prediction_json(self) -> dict[str, Any]:
        """As `export.serve` answers: label, labels or value, and the probabilities."""
        predicted = self.predicted
        if isinstance(predicted, float):
            return {"value": predicted}
        if isinstance(predicted, tuple):
            return {"labels": list(predicted), "probabilities": self.probabilities}
        return {"label": self.task.labels[predicted], "probabilities": self.probabilities}

    def as_json(self) -> dict[str, Any]:
        value = self.prediction_json
        if self.served is not None:
            value |= asdict(self.served)
        if self.latency is not None:
            latency = self.latency
            value["latency_ms"] = {"median": latency.median_ms, "p95": latency.p95_ms, "p99": latency.p99_ms}
        return value


@dataclass(frozen=True)
class Comparison:
    """Both predictions, and what was measured so far."""

    setup: Setup
    onnx: Answer
    pytorch: Answer | None
    """None where the page runs without PyTorch."""
    tokens: int
    """Length of the text, prompt excluded."""
    cut: str
    """For a text longer than the model allows: where it was cut, in words; else empty."""
    round_speedups: tuple[float, ...] = ()
    """PyTorch's median latency over ONNX Runtime's, in each round."""

    @property
    def runs(self) -> int:
        """Timed forward passes of each engine."""
        return len(self.onnx.latency.runs_ms) if self.onnx.latency else 0

    @property
    def max_logit_difference(self) -> float | None:
        """Largest absolute difference of a logit between the engines."""
        if self.pytorch is None:
            return None
        return float(np.abs(np.subtract(self.pytorch.logits, self.onnx.logits)).max())

    @property
    def agrees(self) -> bool | None:
        """As `Answer.agrees_with`; None too where there is one engine."""
        return self.onnx.agrees_with(self.pytorch) if self.pytorch else None

    @property
    def speedup(self) -> float | None:
        """PyTorch's median latency over ONNX Runtime's, over all rounds; None until both are measured."""
        if self.pytorch is None or self.pytorch.latency is None or self.onnx.latency is None:
            return None
        return self.pytorch.latency.median_ms / self.onnx.latency.median_ms

    @property
    def notices(self) -> tuple[str, ...]:
        """What a visitor should know about this comparison."""
        notices = [self.cut] if self.cut else []
        if is_disturbed(self.round_speedups):
            notices.append(
                "The rounds differ widely: something else used this machine meanwhile. Compare again for a better "
                "figure."
            )
        return tuple(notices)

    def as_json(self) -> dict[str, Any]:
        """For the endpoint ``/compare``; ``notices`` is there only if there are any."""
        value: dict[str, Any] = {"adapter": self.setup.adapter, "precision": self.setup.onnx}
        value |= {"onnx": self.onnx.as_json(), "runs": self.runs, "tokens": self.tokens}
        if self.pytorch is not None:
            value |= {"pytorch_mode": self.setup.pytorch, "pytorch": self.pytorch.as_json()}
            value |= {"max_logit_difference": self.max_logit_difference}
        if self.round_speedups:
            value |= {"speedup": self.speedup, "speedup_range": [min(self.round_speedups), max(self.round_speedups)]}
        return value | {"notices": list(self.notices)} if self.notices else value


def compare(
    stage: Stage,
    opened: OpenedEngines,
    sentence1: str,
    sentence2: str = "",
    *,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[Comparison]:
    """Classify a text with both engines and measure both.

    Yields the predictions as soon as they are there, then the same with the figures after each round. ``stopped`` is
    asked before each burst. Raises a TextError for a text that cannot be read.
    """
    sentences = check_text(opened.task, sentence1, sentence2)
    encoded = opened.tokenize([sentences])
    arrays, task = encoded.arrays, opened.task
    with stage.measuring:
        onnx = Answer.of(opened.onnx, task, arrays)
        pytorch = Answer.of(opened.pytorch, task, arrays) if opened.pytorch else None
    cut = _cut(opened, sentences) if encoded.cut[0] else ""
    comparison = Comparison(opened.setup, onnx, pytorch, int(arrays["input_ids"].shape[1]), cut)
    yield comparison
    for _ in range(ROUNDS):
        if stopped():
            return
        with stage.measuring:
            if opened.pytorch is None or comparison.pytorch is None:
                burst = _burst(opened.onnx, arrays)
                comparison = replace(comparison, onnx=_with_burst(comparison.onnx, burst))
            else:
                slow = _burst(opened.pytorch, arrays)
                if stopped():
                    return
                # The same number of runs for both: with more runs the faster engine would show rarer outliers.
                fast = _burst(opened.onnx, arrays, runs=len(slow.runs_ms))
                comparison = replace(
                    comparison,
                    pytorch=_with_burst(comparison.pytorch, slow),
                    onnx=_with_burst(comparison.onnx, fast),
                    round_speedups=(*comparison.round_speedups, slow.median_ms / fast.median_ms),
                )
        yield comparison


def _burst(engine: AnyEngine, arrays: dict[str, np.ndarray], *, runs: int | None = None) -> Burst:
    time.sleep(PAUSE_SECONDS)
    return engine.burst(arrays, BurstPlan(runs or MIN_RUNS, runs or MAX_RUNS, BURST_BUDGET_SECONDS))


def _with_burst(answer: Answer, burst: Burst) -> Answer:
    return replace(answer, latency=join_bursts([answer.latency, burst]) if answer.latency else burst)


def _cut(opened: OpenedEngines, sentences: tuple[str, ...]) -> str:
    """Where each sentence was cut, in words."""
    words = [f"The model reads {opened.bundle.max_length} tokens beside its prompt."]
    read = opened.tokenize.characters_read(sentences)
    for number, (sentence, end) in enumerate(zip(sentences, read, strict=True), start=1):
        if end < len(sentence.rstrip()):
            name = f"Sentence {number}" if len(sentences) > 1 else "The sentence"
            before = sentence[max(0, end - CONTEXT_CHARACTERS) : end]
            words.append(f"{name} was cut after “…{before}”: {end:,} of its {len(sentence):,} characters were read.")
    return " ".join(words)
