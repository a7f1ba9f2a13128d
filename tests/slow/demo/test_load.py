"""The page under load: many visitors at once, each answered rightly or told that the page is busy."""

import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from gradio_client import Client, handle_file
from gradio_client.utils import QueueError
from scipy.special import softmax

from demo.access.gate import API, BUSY
from demo.access.limits import QUEUE_SIZE
from tests.conftest import ON_CPU, Folders, make_pairs, peft_logits, write_jsonl
from tests.demo.server import Server, connect, exists, serve_cleanly

LABELS = ("not_equivalent", "equivalent")

HANG_SECONDS = 300.0
"""An answer that takes longer never comes: several times what a full queue takes."""

MAX_GROWTH = 0.05
"""Growth of the memory in a soak, from its first third to its end."""


@dataclass(frozen=True)
class Load:
    """How hard a page is worked: each visitor asks again and again for some seconds.

    Every other visitor waits for a moment each `burst_s` seconds, so that many come together.
    """

    visitors: int
    seconds: float
    burst_s: float


SHORT = Load(visitors=12, seconds=12, burst_s=4)
SOAK = Load(visitors=50, seconds=120, burst_s=10)


@dataclass(frozen=True)
class Known:
    """A pair of sentences and both labels' probabilities by PEFT alone."""

    pair: tuple[str, str]
    probabilities: np.ndarray

    @property
    def label(self) -> str:
        return LABELS[int(self.probabilities.argmax())]

    def is_said_by(self, probabilities: dict[str, float]) -> bool:
        """Whether an answer says the same, up to rounding."""
        values = list(probabilities.values())
        return tuple(probabilities) == LABELS and np.allclose(values, self.probabilities, atol=1e-4)


def known_pairs(adapter_folder: Path, base_folder: Path, n: int) -> list[Known]:
    """Pairs of different lengths."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    pairs = [(str(row["sentence1"]), str(row["sentence2"])) for row in make_pairs(n, seed=11)]
    batch = tokenizer([first for first, _ in pairs], [second for _, second in pairs], return_tensors="np", padding=True)
    rows = softmax(peft_logits(adapter_folder, base_folder, dict(batch)), axis=1)
    return [Known(pair, row) for pair, row in zip(pairs, rows, strict=True)]


@dataclass
class Seen:
    """What came of the load; written by all visitors."""

    waits_s: dict[str, list[float]] = field(default_factory=dict)
    """Seconds until an answer, by endpoint."""
    busy: int = 0
    """How many requests were refused because too many waited."""
    wrong: list[str] = field(default_factory=list)
    """What was asked and answered, for each answer that is wrong or never came."""
    memory_bytes: list[int] = field(default_factory=list)
    """The page with its engines, once a second."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def growth(self) -> float:
        """Of the memory: the median of the last tenth over that of the first third's last tenth, less one."""
        part, third = max(len(self.memory_bytes) // 10, 1), len(self.memory_bytes) // 3
        before = float(np.median(self.memory_bytes[max(third - part, 0) : third] or self.memory_bytes[:1]))
        return float(np.median(self.memory_bytes[-part:])) / before - 1

    def as_json(self, load: Load) -> str:
        """One line of figures."""
        waits_s = self.waits_s | {"all": [value for values in self.waits_s.values() for value in values]}
        endpoints = {
            name: {"answers": len(values), **{f"p{q}_s": round(float(np.percentile(values, q)), 2) for q in (50, 95)}}
            for name, values in sorted(waits_s.items())
        }
        memory_mib = [round(self.memory_bytes[index] / 2**20) for index in (0, len(self.memory_bytes) // 3, -1)]
        counts = {"visitors": load.visitors, "seconds": load.seconds, "wrong": len(self.wrong), "busy": self.busy}
        return json.dumps(counts | {"memory_mib": memory_mib, "growth": round(self.growth, 4), "endpoints": endpoints})


class Visitor(threading.Thread):
    """Asks one thing after the other, and looks at each answer; everything that goes wrong is written down."""

    def __init__(self, number: int, url: str, known: list[Known], load: Load, seen: Seen, folder: Path) -> None:
        super().__init__(name=f"visitor {number}", daemon=True)
        self._random = random.Random(number)  # noqa: S311 -- test data
        self._number, self._url, self._known, self._load, self._seen = number, url, known, load, seen
        self._folder = folder / str(number)
        self._folder.mkdir()
        self._prompt: Any = None

    def run(self) -> None:
        """Ask until the time is over."""
        try:
            self._client = Client(self._url, verbose=False, download_files=str(self._folder))
        except Exception as error:  # a visitor who does not get in is one of the faults looked for
            self._note(f"connect: {error!r}")
            return
        asks = [self._compare, self._latency, *[self._score] * 3, *[self._effect] * 3, *[self._learned] * 3]
        start = time.monotonic()
        while (now := time.monotonic() - start) < self._load.seconds:
            if self._number % 2:
                time.sleep(self._load.burst_s - now % self._load.burst_s)
            self._ask(self._random.choice(asks))
        self._client.close()

    def _ask(self, ask: Callable[[], str]) -> None:
        began = time.monotonic()
        try:
            name = ask()
        except QueueError:
            with self._seen.lock:
                self._seen.busy += 1
            time.sleep(1)
        except Exception as error:  # a thread's own exception would be lost
            self._note(f"{ask.__name__}: {error!r}")
        else:
            with self._seen.lock:
                self._seen.waits_s.setdefault(name, []).append(time.monotonic() - began)

    def _note(self, words: str) -> None:
        with self._seen.lock:
            self._seen.wrong.append(words[:500])

    def _expect(self, right: bool, asked: object, answer: object) -> None:
        if not right:
            self._note(f"asked {asked}, answered {answer}")

    def _answer(self, *values: Any, name: str) -> Any:
        return self._client.submit(*values, api_name=name).result(timeout=HANG_SECONDS)

    def _compare(self) -> str:
        known = self._random.choice(self._known)
        answer = self._answer(*known.pair, name="/compare")
        right = all(known.is_said_by(answer[side]["probabilities"]) for side in ("pytorch", "onnx"))
        self._expect(right and answer["onnx"]["label"] == known.label, known, answer)
        return "/compare"

    def _latency(self) -> str:
        batch, length = self._random.randint(1, 3), self._random.randint(2, 16)
        (cell,) = self._answer([batch], [length], name="/latency")["cells"]
        self._expect((cell["batch_size"], cell["tokens"]) == (batch, length), (batch, length), cell)
        return "/latency"

    def _effect(self) -> str:
        known = self._random.choice(self._known)
        answer = self._answer(*known.pair, name="/prompt_effect")
        self._expect(known.is_said_by(answer["learned"]["probabilities"]), known, answer)
        return "/prompt_effect"

    def _learned(self) -> str:
        answer = self._answer(name="/prompt")
        self._prompt = self._prompt or answer
        self._expect(answer == self._prompt and bool(answer["nearest_words"]), "the prompt", answer)
        return "/prompt"

    def _score(self) -> str:
        # Few different files, so that several visitors upload equal ones at once.
        first = self._random.randrange(3)
        rows = self._known[first : first + 4]
        pairs: list[dict[str, object]] = [{"sentence1": row.pair[0], "sentence2": row.pair[1]} for row in rows]
        path = write_jsonl(self._folder / "rows.jsonl", pairs)
        summary, labelled = self._answer(handle_file(path), *[""] * 5, name="/score_file")
        answers = [json.loads(line) for line in Path(labelled).read_text(encoding="utf-8").splitlines()]
        for row, answer in zip(rows, answers, strict=True):
            for side in ("pytorch", "onnx"):
                right = answer[f"prediction_{side}"] == row.label
                right &= abs(answer[f"probability_{side}"] - float(row.probabilities.max())) < 1e-4
                self._expect(right and answer["sentence1"] == row.pair[0], row, answer)
        self._expect(summary["rows"] == len(rows), rows, summary)
        return "/score_file"


def resident_bytes(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def work(url: str, pid: int, known: list[Known], load: Load, folder: Path) -> Seen:
    """Let the visitors in, and watch the page's memory until the last has gone."""
    seen = Seen()
    visitors = [Visitor(number, url, known, load, seen, folder) for number in range(load.visitors)]
    for visitor in visitors:
        visitor.start()
    page = psutil.Process(pid)
    end = time.monotonic() + load.seconds + HANG_SECONDS
    while waiting := [visitor.name for visitor in visitors if visitor.is_alive()]:
        if time.monotonic() > end:
            seen.wrong += [f"{name} still waits" for name in waiting]
            break
        seen.memory_bytes.append(sum(map(resident_bytes, (page, *page.children(recursive=True)))))
        time.sleep(1)
    return seen


@pytest.fixture(scope="module")
def page(adapter: Folders, bundle: Folders, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The page with both engines."""
    flags = ["--adapter", str(adapter("bert")), "--bundle", str(bundle("bert"))]
    with serve_cleanly(flags, tmp_path_factory.mktemp("cache"), ON_CPU) as server:
        server.wait_for_url()
        yield server


def test_every_visitor_is_answered_rightly_or_told_that_the_page_is_busy(
    page: Server, adapter: Folders, base_model: Folders, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    is_soak = request.config.getoption("--soak")
    load = SOAK if is_soak else SHORT
    known = known_pairs(adapter("bert"), base_model("bert"), 16)
    assert {pair.label for pair in known} == {*LABELS}, "or a page that always says the same passes"
    engines = page.children()
    seen = work(page.wait_for_url(), page.pid, known, load, tmp_path)
    print(seen.as_json(load))
    assert seen.wrong == []
    assert {"/compare", "/score_file", "/prompt", "/prompt_effect"} <= set(seen.waits_s)
    assert page.children() == engines, "no engine was started anew"
    if is_soak:
        assert seen.growth < MAX_GROWTH


def test_beyond_the_queue_a_visitor_is_told_that_the_page_is_busy(page: Server) -> None:
    """The last test of this page: its queue stays full for minutes."""
    url = page.wait_for_url()
    with httpx.Client(base_url=url, timeout=30) as visitor:
        for _ in range(QUEUE_SIZE + 2):
            answer = visitor.post(f"{API}/call/compare", json={"data": ["word1", "word2", "", "", ""]})
            if answer.status_code != 200:
                break
        assert answer.status_code == 503
        assert answer.json() == {"detail": BUSY}
        assert f"{QUEUE_SIZE} visitors are waiting" in BUSY
        assert int(answer.headers["retry-after"]) > 0
        # A page that is busy is still there.
        assert visitor.get("/").status_code == 200
    with connect(url) as client, pytest.raises(QueueError, match="Queue is full! Please try again"):
        client.predict("word1", "word2", api_name="/compare")
    assert exists(page.pid)
