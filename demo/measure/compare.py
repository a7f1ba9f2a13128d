"""One text, two engines: what they answer, how long it takes, and how far apart they are."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from demo.engines.stage import Opened, Setup, Stage
from demo.engines.timing import AnyEngine, BurstPlan, Served
from export.runtime.batches import softmax
from export.runtime.check_text import check_text

PAUSE_SECONDS = 0.4
"""Idle time before each burst: after 0.3 s no thread pool of the other engine spins any more."""


ROUNDS = 4
"""Bursts of each engine, in turn: a speed-up a round, so that its spread can be told."""


MIN_RUNS, MAX_RUNS = 5, 50


BURST_BUDGET_SECONDS = 0.5
"""How long PyTorch's burst of a round goes on, within these bounds; ONNX Runtime gets the same number of runs."""


DISTURBED = 1.5
"""Rounds whose speed-ups are further apart than this, largest over smallest, were not measured on a quiet machine."""


@dataclass(frozen=True)
class Latency:
    """Of one forward pass at batch size 1, tokenisation excluded, over warm bursts.

    Attributes:
        runs_ms: every timed pass, in order.
        memory_mib: largest resident size of the engine's process.
    """

    runs_ms: tuple[float, ...]
    memory_mib: float

    @property
    def median_ms(self) -> float:
        """The middle one."""
        return float(np.median(self.runs_ms))

    @property
    def p95_ms(self) -> float:
        """Below which 95 % lie."""
        return float(np.percentile(self.runs_ms, 95))

    @property
    def p99_ms(self) -> float:
        """Below which 99 % lie."""
        return float(np.percentile(self.runs_ms, 99))

    def as_json(self) -> dict[str, float]:
        """For the endpoint."""
        return {"median": self.median_ms, "p95": self.p95_ms, "p99": self.p99_ms}


@dataclass(frozen=True)
class Answer:
    """What one engine says of a text.

    Attributes:
        label: the most probable class.
        probabilities: of every class, in the order of the logits.
        logits: in the same order.
        latency: how long a forward pass takes; None until that is measured.
        served: which of several replicas answered; None where there is one engine.
    """

    label: str
    probabilities: dict[str, float]
    logits: tuple[float, ...]
    latency: Latency | None = None
    served: Served | None = None

    def as_json(self) -> dict[str, Any]:
        """For the endpoint."""
        value: dict[str, Any] = {"label": self.label, "probabilities": self.probabilities}
        if self.served is not None:
            value |= asdict(self.served)
        return value | {"latency_ms": self.latency.as_json()} if self.latency else value


@dataclass(frozen=True)
class Comparison:
    """Both answers, and what was measured so far.

    Attributes:
        setup: the adapter and how the engines run.
        onnx: its answer.
        pytorch: its answer; None where the page runs without PyTorch.
        round_speedups: of each round PyTorch's median latency over ONNX Runtime's.
        tokens: length of the text in tokens, prompt excluded.
        cut: where the text was longer than the model allows, what became of it, in words; else empty.
    """

    setup: Setup
    onnx: Answer
    pytorch: Answer | None
    round_speedups: tuple[float, ...]
    tokens: int
    cut: str

    @property
    def runs(self) -> int:
        """Timed forward passes of each engine."""
        return len(self.onnx.latency.runs_ms) if self.onnx.latency else 0

    @property
    def max_logit_difference(self) -> float | None:
        """Largest absolute difference of a logit between the engines; None where there is one engine."""
        if self.pytorch is None:
            return None
        return float(np.abs(np.subtract(self.pytorch.logits, self.onnx.logits)).max())

    @property
    def speedup(self) -> float | None:
        """PyTorch's median latency over ONNX Runtime's, over all rounds; None until both are measured."""
        if self.pytorch is None or self.pytorch.latency is None or self.onnx.latency is None:
            return None
        return self.pytorch.latency.median_ms / self.onnx.latency.median_ms

    @property
    def is_disturbed(self) -> bool:
        """Whether something else must have used the machine meanwhile."""
        speedups = self.round_speedups
        return len(speedups) > 1 and max(speedups) / min(speedups) > DISTURBED

    @property
    def notices(self) -> tuple[str, ...]:
        """What a visitor should know about this comparison."""
        disturbed = (
            "The rounds differ widely: something else used this machine meanwhile. Compare again for a better figure."
        )
        return tuple(filter(None, (self.cut, disturbed if self.is_disturbed else "")))

    def as_json(self) -> dict[str, Any]:
        """For the endpoint ``/compare``; ``notices`` are there only when there is something to tell."""
        value: dict[str, Any] = {
            "adapter": self.setup.adapter,
            "precision": self.setup.onnx,
            "onnx": self.onnx.as_json(),
            "runs": self.runs,
            "tokens": self.tokens,
        }
        if self.pytorch is not None:
            value |= {
                "pytorch_mode": self.setup.pytorch,
                "pytorch": self.pytorch.as_json(),
                "max_logit_difference": self.max_logit_difference,
            }
        if self.round_speedups:
            value |= {
                "speedup": self.speedup,
                "speedup_range": [min(self.round_speedups), max(self.round_speedups)],
            }
        return value | {"notices": list(self.notices)} if self.notices else value


def compare(
    stage: Stage, opened: Opened, sentence1: str, sentence2: str = "", *, stopped: Callable[[], bool] = lambda: False
) -> Iterator[Comparison]:
    """Classify a text with both engines and measure both.

    Args:
        opened: from ``stage.open``.
        sentence2: of a pair; empty where the task has single texts.
        stopped: asked before each burst; once it says yes, nothing more is measured.

    Yields:
        the answers as soon as they are there, then the same again with what each round adds.

    Raises:
        TextError: a sentence is empty, too long or not valid Unicode, or there is one too many.
        EngineError: an engine died or did not answer.
    """
    sentences = check_text(opened.task, sentence1, sentence2)
    encoded = opened.tokenize([sentences])
    arrays = encoded.arrays
    labels = opened.task.labels
    with stage.measuring:
        onnx = replace(_answer(labels, opened.onnx.logits(arrays)[0]), served=opened.onnx.served)
        pytorch = _answer(labels, opened.pytorch.logits(arrays)[0]) if opened.pytorch else None
    comparison = Comparison(
        setup=opened.setup,
        onnx=onnx,
        pytorch=pytorch,
        round_speedups=(),
        tokens=int(arrays["input_ids"].shape[1]),
        cut=_cut(opened, sentences) if encoded.cut[0] else "",
    )
    yield comparison
    for _ in range(ROUNDS):
        if stopped():
            return
        with stage.measuring:
            if opened.pytorch is None:
                burst = _burst(opened.onnx, arrays)
                comparison = replace(comparison, onnx=_with_runs(comparison.onnx, burst))
            else:
                slow = _burst(opened.pytorch, arrays)
                if stopped():
                    return
                # The same number of runs for both, or the rarest runs of the faster one would be rarer.
                fast = _burst(opened.onnx, arrays, runs=len(slow.runs_ms))
                assert comparison.pytorch is not None
                comparison = replace(
                    comparison,
                    pytorch=_with_runs(comparison.pytorch, slow),
                    onnx=_with_runs(comparison.onnx, fast),
                    round_speedups=(*comparison.round_speedups, slow.median_ms / fast.median_ms),
                )
        yield comparison


def _burst(engine: AnyEngine, arrays: dict[str, np.ndarray], *, runs: int | None = None) -> Latency:
    time.sleep(PAUSE_SECONDS)
    burst = engine.burst(arrays, BurstPlan(runs or MIN_RUNS, runs or MAX_RUNS, BURST_BUDGET_SECONDS))
    return Latency(burst.latencies_ms, burst.memory_mib)


def _with_runs(answer: Answer, latency: Latency) -> Answer:
    """An answer with one more burst."""
    before = answer.latency.runs_ms if answer.latency else ()
    return replace(answer, latency=replace(latency, runs_ms=before + latency.runs_ms))


def _answer(labels: tuple[str, ...], logits: np.ndarray) -> Answer:
    return Answer(
        label=labels[int(np.argmax(logits))],
        probabilities={label: float(p) for label, p in zip(labels, softmax(logits), strict=True)},
        logits=tuple(float(logit) for logit in logits),
    )


CONTEXT_CHARACTERS = 24
"""So much of a text is shown before the place where it was cut."""


def _cut(opened: Opened, sentences: Sequence[str]) -> str:
    """Where each sentence was cut, in words."""
    parts = []
    read = opened.tokenize.characters_read(tuple(sentences))
    for number, (sentence, end) in enumerate(zip(sentences, read, strict=True), start=1):
        if end < len(sentence.rstrip()):
            name = f"Sentence {number}" if len(sentences) > 1 else "The sentence"
            parts.append(
                f"{name} was cut after “…{sentence[max(0, end - CONTEXT_CHARACTERS) : end]}”: {end:,} of its "
                f"{len(sentence):,} characters were read."
            )
    return f"The model reads {opened.bundle.max_length} tokens beside its prompt. " + " ".join(parts)
