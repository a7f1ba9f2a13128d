"""A served bundle for tests: what PEFT alone says, requests over HTTP, and load that goes on while something happens."""

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urljoin

import httpx
import numpy as np
import pytest
from scipy.special import softmax

from export.__main__ import main as export_main
from export.bundle.folder import Bundle, load_bundle
from tests.conftest import Folders, make_pairs, peft_logits

PAIRS = [(str(row["sentence1"]), str(row["sentence2"])) for row in make_pairs(24, seed=11)]
"""Pairs of different lengths."""
WAIT_SECONDS = 90
"""Limit for what must happen in the end; no test measures time."""
CLIENT = httpx.Client(timeout=WAIT_SECONDS, trust_env=False, limits=httpx.Limits(max_keepalive_connections=0))


def ask(url: str, body: object, *, path: str = "/v1/classify", method: str = "POST") -> httpx.Response:
    """Send one request; ``body`` is sent as JSON unless it is bytes."""
    return CLIENT.request(method, urljoin(url, path), content=body if isinstance(body, bytes) else json.dumps(body))


@dataclass(frozen=True)
class Model:
    """A task of a bundle, and what PEFT alone says of `PAIRS`: float, shape = (24, n_labels)"""

    bundle: Bundle
    sha256: str
    task: str
    labels: tuple[str, ...]
    golden: np.ndarray

    def gave(self, answer: httpx.Response, rows: Sequence[int]) -> bool:
        """Whether an answer names this bundle and task, and is right for these pairs."""
        body = answer.json() if answer.status_code == 200 else {}
        if (body.get("bundle_sha256"), body.get("task")) != (self.sha256, self.task):
            return False
        said = [entry["probabilities"] for entry in body["answers"]]
        labels = [self.labels[int(np.argmax(self.golden[row]))] for row in rows]
        return (
            {tuple(each) for each in said} == {self.labels}
            and np.allclose([list(each.values()) for each in said], self.golden[rows], atol=1e-5)
            and body["answers"]
            == [
                {"label": label, "probability": max(each.values()), "probabilities": each, "cut": False}
                for label, each in zip(labels, said, strict=True)
            ]
        )


@dataclass(frozen=True)
class Models:
    """A bundle of two tasks, "bert" and "three"; and another bundle, whose only task is the second one, called "bert"."""

    bert: Model
    three: Model
    other: Model


@pytest.fixture(scope="module", name="models")
def models_fixture(
    tmp_path_factory: pytest.TempPathFactory, adapter: Folders, second: Callable[..., Path], base_model: Folders
) -> Models:
    import torch
    from transformers import AutoTokenizer

    torch.set_num_threads(1)  # models this small lose much by waiting for a second one
    folder, base = tmp_path_factory.mktemp("served"), base_model("bert")
    bert, three = adapter("bert"), second("bert", three=True)
    assert export_main([str(bert), str(three), "--out", str(folder / "two")]) == 0
    shutil.copytree(three, folder / "bert")
    assert export_main([str(folder / "bert"), "--out", str(folder / "other")]) == 0
    columns = map(list, zip(*PAIRS, strict=True))
    batch = dict(AutoTokenizer.from_pretrained(base)(*columns, return_tensors="np", padding=True))
    of_bert = softmax(peft_logits(bert, base, batch), axis=1)
    of_three = softmax(peft_logits(three, base, batch, n_labels=3), axis=1)

    def model(name: str, task: str, labels: tuple[str, ...], golden: np.ndarray) -> Model:
        bundle = load_bundle(folder / name)
        return Model(bundle, bundle.manifest_sha256, task, labels, golden)

    return Models(
        model("two", "bert", ("not_equivalent", "equivalent"), of_bert),
        model("two", "three", ("a", "b", "c"), of_three),
        model("other", "bert", ("a", "b", "c"), of_three),
    )


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.1)


@dataclass
class Load:
    """Requests that go on until they are told to stop, and their answers: the row that was asked, and what came."""

    answers: list[tuple[int, httpx.Response]] = field(default_factory=list)

    def wait_for(self, n: int) -> None:
        """Wait for so many more answers."""
        wanted = len(self.answers) + n
        wait_until(lambda: len(self.answers) >= wanted)

    def check(self, *models: Model) -> None:
        """Every answer is right for one of the models, and each of them gave one."""
        gave = [{model.sha256 for model in models if model.gave(answer, [row])} for row, answer in self.answers]
        assert [answer.text for which, (_, answer) in zip(gave, self.answers, strict=True) if not which] == []
        assert set.union(*gave) == {model.sha256 for model in models}


@contextmanager
def load(url: str, *, askers: int = 4) -> Iterator[Load]:
    """Ask for one pair after the other, by several askers, while the block runs; each of them must get all its answers."""
    seen, stop = Load(), threading.Event()

    def go_on(row: int) -> None:
        while not stop.is_set():
            row = (row + 1) % len(PAIRS)
            seen.answers.append((row, ask(url, {"pair": PAIRS[row], "task": "bert"})))

    with ThreadPoolExecutor(askers) as pool:
        done = [pool.submit(go_on, number) for number in range(askers)]
        try:
            yield seen
        finally:
            stop.set()
    for future in done:
        future.result()
