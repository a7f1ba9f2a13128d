"""Both engines of the page on tiny models, adapters to choose from, and golden predictions by PEFT alone."""

import json
import random
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import softmax

from demo.engines.adapters import choose_adapters
from demo.engines.pytorch import EAGER
from demo.engines.stage import OpenedEngines, Stage
from demo.measure.compare import Comparison, compare
from tests.conftest import VIRTUAL_TOKENS, WORDS, Data, flip_bit, peft_logits, write_jsonl
from train.__main__ import main as train_main

PAIR = ("word1 word2 word3 word4", "word4 word3 word2 word1 word9")
MOODS = ("bad", "good", "so-so")


@contextmanager
def stage_of(*adapters: Path, bundles: tuple[Path, ...] = (), has_pytorch: bool = True) -> Iterator[Stage]:
    """A real stage of these adapters and none of those that ship."""
    choices = [choice for choice in choose_adapters(adapters) if choice.adapter.folder in adapters]
    stage = Stage(choices, bundles=bundles, has_pytorch=has_pytorch, threads=1)
    try:
        yield stage
    finally:
        stage.close()


@dataclass(frozen=True)
class Pair:
    """Both real engines, each in its process."""

    stage: Stage
    opened: OpenedEngines

    def steps(self, *sentences: Any, stopped: Callable[[], bool] = lambda: False) -> list[Comparison]:
        return list(compare(self.stage, self.opened, *sentences, stopped=stopped))


@contextmanager
def both_engines(
    adapter_folder: Path, bundle_folder: Path, *, onnx: str = "fp32", pytorch: str = EAGER, has_pytorch: bool = True
) -> Iterator[Pair]:
    with stage_of(adapter_folder, bundles=(bundle_folder,), has_pytorch=has_pytorch) as stage:
        yield Pair(stage, stage.open(stage.setup("", onnx, pytorch)))


def make_mood_adapter(folder: Path, base_folder: Path, *, flags: str = "", labels: tuple[str, ...] = MOODS) -> Path:
    """An adapter for single sentences with three labels, by P-Tuning v2."""
    generator = random.Random(3)  # noqa: S311 -- test data
    rows: list[dict[str, object]] = [
        {"remark": " ".join(generator.sample(WORDS[index % 3 :: 3], 5)), "mood": labels[index % 3]}
        for index in range(48)
    ]
    data = Data(write_jsonl(folder / "train.jsonl", rows[:30]), write_jsonl(folder / "validation.jsonl", rows[30:]))
    command = shlex.split(
        f"--model {base_folder} --method p-tuning-v2 --text-columns remark --label-column mood --epochs 2 "
        f"--virtual-tokens {VIRTUAL_TOKENS} --learning-rate 1e-2 --out {folder / 'moods'} {flags}"
    )
    assert train_main(command + data.flags) == 0
    return folder / "moods"


def copy_with_scores(source: Path, target: Path, accuracy: float) -> Path:
    """An adapter with other validation scores, which its hashes do not cover."""
    shutil.copytree(source, target)
    training = json.loads((target / "training.json").read_text())
    training["validation"] = {"accuracy": accuracy, "f1": 0.5}
    # Two share the first metric.
    scores = {"a guess": (0.7, 0.1), "always `equivalent`": (0.7, 0.8), "a coin": (0.5, 0.5)}
    training["baselines"] = {name: {"accuracy": pair[0], "f1": pair[1]} for name, pair in scores.items()}
    (target / "training.json").write_text(json.dumps(training))
    return target


def make_shipped(folder: Path, p_tuned: Path, p_tuned_v2: Path, other_task: Path) -> Path:
    """A folder like ``demo/adapters``: three adapters of one task, one of another, a broken one, and other things."""
    copy_with_scores(p_tuned_v2, folder / "better", 0.775)
    copy_with_scores(p_tuned, folder / "plain", 0.711)
    copy_with_scores(p_tuned, folder / "worst", 0.6)
    broken = copy_with_scores(p_tuned, folder / "broken", 0.99)
    flip_bit(broken / "adapter_model.safetensors", 999)
    copy_with_scores(other_task, folder / "other", 0.65)
    (folder / "no adapter").mkdir()
    (folder / "README.md").write_text("adapters")
    return folder


def golden_probabilities(
    sentences: tuple[str, ...],
    adapter_folder: Path,
    base_folder: Path,
    *,
    tokenizer: Path | None = None,
    n_labels: int = 2,
) -> np.ndarray:
    """Probabilities of the classes, by transformers, PEFT and SciPy alone."""
    from transformers import AutoTokenizer

    batch = AutoTokenizer.from_pretrained(tokenizer or base_folder)(*sentences, return_tensors="np")
    return softmax(peft_logits(adapter_folder, base_folder, dict(batch), n_labels=n_labels)[0])


def check_kind(kind_adapter: Path, kind_bundle: Path, base_folder: Path) -> None:
    expected = golden_probabilities(PAIR, kind_adapter, base_folder, tokenizer=kind_adapter)
    with both_engines(kind_adapter, kind_bundle) as pair:
        comparison = pair.steps(*PAIR, stopped=lambda: True)[0]
    assert comparison.pytorch is not None
    for answer in (comparison.pytorch, comparison.onnx):
        assert list(answer.probabilities.values()) == pytest.approx(expected, abs=1e-5)
