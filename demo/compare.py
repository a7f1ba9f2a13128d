"""One text, two engines: what they answer, how long it takes, and how far apart they are."""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from demo.backends import BurstPlan, Engine
from export.predict import softmax
from export.runtime import TextTokenizer
from train.errors import TextError
from train.tasks import Task

MAX_CHARACTERS = 10_000
"""Longest sentence in characters; no text near it fits the model's positions."""

PAUSE_SECONDS = 0.4
"""Idle time before each burst: after 0.3 s no thread pool of the other engine spins any more."""

MIN_RUNS, MAX_RUNS = 5, 50
BURST_BUDGET_SECONDS = 2.0
"""How long PyTorch's burst goes on, within these bounds; ONNX Runtime gets the same number of runs."""


@dataclass(frozen=True)
class Latency:
    """Of one forward pass at batch size 1, tokenisation excluded, over a warm burst."""

    median_ms: float
    p95_ms: float


@dataclass(frozen=True)
class Answer:
    """What one engine says of a text.

    Attributes:
        label: the most probable class.
        probabilities: of every class, in the order of the logits.
        logits: in the same order.
        latency: how long a forward pass takes.
    """

    label: str
    probabilities: dict[str, float]
    logits: tuple[float, ...]
    latency: Latency

    def as_json(self) -> dict[str, Any]:
        """For the endpoint."""
        return {
            "label": self.label,
            "probabilities": self.probabilities,
            "latency_ms": {"median": self.latency.median_ms, "p95": self.latency.p95_ms},
        }


@dataclass(frozen=True)
class Comparison:
    """Both answers.

    Attributes:
        pytorch, onnx: the answers.
        max_logit_difference: largest absolute difference of a logit between them.
        speedup: PyTorch's median latency over ONNX Runtime's.
        runs: timed forward passes of each engine.
        tokens: length of the text in tokens, prompt excluded.
        cut: whether the text was longer than the model allows and lost its end.
    """

    pytorch: Answer
    onnx: Answer
    max_logit_difference: float
    speedup: float
    runs: int
    tokens: int
    cut: bool

    def as_json(self) -> dict[str, Any]:
        """For the endpoint ``/compare``; ``notice`` is there only when there is something to tell."""
        value = {
            "pytorch": self.pytorch.as_json(),
            "onnx": self.onnx.as_json(),
            "max_logit_difference": self.max_logit_difference,
            "speedup": self.speedup,
            "runs": self.runs,
        }
        return value | {"notice": self.notice} if self.cut else value

    @property
    def notice(self) -> str:
        """What a visitor should know about the text; empty when it was read whole."""
        if not self.cut:
            return ""
        return f"The text was cut to the {self.tokens} tokens that the model can read beside its prompt."


class Comparer:
    """Runs texts through both engines, one at a time: nothing may run beside a timed burst."""

    def __init__(self, tokenize: TextTokenizer, task: Task, *, pytorch: Engine, onnx: Engine) -> None:
        """Put two engines side by side.

        Args:
            tokenize: both engines get the very same token ids.
            task: says how many sentences a text has, and its labels.
        """
        self._tokenize = tokenize
        self._task = task
        self._pytorch = pytorch
        self._onnx = onnx
        self._lock = threading.Lock()

    def compare(self, sentence1: str, sentence2: str = "") -> Comparison:
        """Classify a text with both engines and measure both.

        Args:
            sentence2: of a pair; empty where the task has single texts.

        Raises:
            TextError: a sentence is empty, too long or not valid Unicode, or there is one too many.
            EngineError: an engine died or did not answer.
        """
        encoded = self._tokenize([self._sentences(sentence1, sentence2)])
        arrays = encoded.arrays
        with self._lock:
            pytorch_logits = self._pytorch.logits(arrays)[0]
            onnx_logits = self._onnx.logits(arrays)[0]

            time.sleep(PAUSE_SECONDS)
            pytorch_ms = self._pytorch.burst(arrays, BurstPlan(MIN_RUNS, MAX_RUNS, BURST_BUDGET_SECONDS))
            runs = len(pytorch_ms)
            time.sleep(PAUSE_SECONDS)
            onnx_ms = self._onnx.burst(arrays, BurstPlan(runs, runs, BURST_BUDGET_SECONDS))
        pytorch_latency, onnx_latency = _latency(pytorch_ms), _latency(onnx_ms)
        return Comparison(
            pytorch=_answer(self._task.labels, pytorch_logits, pytorch_latency),
            onnx=_answer(self._task.labels, onnx_logits, onnx_latency),
            max_logit_difference=float(np.max(np.abs(pytorch_logits - onnx_logits))),
            speedup=pytorch_latency.median_ms / onnx_latency.median_ms,
            runs=runs,
            tokens=int(arrays["input_ids"].shape[1]),
            cut=encoded.cut[0],
        )

    def _sentences(self, sentence1: str, sentence2: str) -> tuple[str, ...]:
        """A text as it may be tokenised."""
        if self._task.is_pair:
            return _check_sentence(sentence1, "Sentence 1"), _check_sentence(sentence2, "Sentence 2")
        if sentence2:
            raise TextError("This model reads one sentence. Leave sentence 2 empty.")
        return (_check_sentence(sentence1, "The sentence"),)


def _check_sentence(text: object, name: str) -> str:
    """A sentence as it may be tokenised; ``name`` is for complaints."""
    if not isinstance(text, str):
        raise TextError(f"{name} is no text. Give a sentence.")
    if not text.strip():
        raise TextError(f"{name} is empty. Write a sentence.")
    if len(text) > MAX_CHARACTERS:
        raise TextError(f"{name} has {len(text):,} characters; at most {MAX_CHARACTERS:,} are read. Shorten it.")
    try:
        text.encode()
    except UnicodeEncodeError as cause:
        raise TextError(
            f"{name} holds half a surrogate pair at character {cause.start + 1}, which is no valid Unicode. Remove it."
        ) from cause
    return text


def _latency(latencies_ms: Sequence[float]) -> Latency:
    return Latency(median_ms=float(np.median(latencies_ms)), p95_ms=float(np.percentile(latencies_ms, 95)))


def _answer(labels: tuple[str, ...], logits: np.ndarray, latency: Latency) -> Answer:
    return Answer(
        label=labels[int(np.argmax(logits))],
        probabilities={label: float(p) for label, p in zip(labels, softmax(logits), strict=True)},
        logits=tuple(float(logit) for logit in logits),
        latency=latency,
    )
