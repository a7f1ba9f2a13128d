"""The page under load: many visitors at once, each answered rightly or told that the page is busy."""

import json
import random
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import psutil
import pytest
from gradio_client import Client, handle_file
from gradio_client.utils import QueueError

from demo.access.gate import API, BUSY
from demo.access.limits import QUEUE_SIZE
from tests.conftest import ON_CPU, Folders, make_pairs, write_jsonl
from tests.demo.engines import golden_probabilities
from tests.demo.server import connect, serve_cleanly
from train.data.tasks import MRPC

HANG_SECONDS = 300.0  # an answer that takes longer never comes: several times what a full queue takes
MAX_GROWTH = 0.05  # of the memory in a soak, from its first third to its end


class Load(NamedTuple):
    """How hard a page is worked: each visitor asks again and again for some seconds."""

    visitors: int
    seconds: float
    burst_s: float  # every other visitor waits for a moment each so many seconds, so that many come together


SHORT, SOAK = Load(visitors=12, seconds=12, burst_s=4), Load(visitors=50, seconds=120, burst_s=10)


class Known(NamedTuple):
    """A pair of sentences and both labels' probabilities by PEFT alone."""

    pair: tuple[str, str]
    probabilities: np.ndarray

    @property
    def label(self) -> str:
        return MRPC.labels[int(self.probabilities.argmax())]

    def is_said_by(self, probabilities: dict[str, float]) -> bool:
        values = list(probabilities.values())
        return tuple(probabilities) == MRPC.labels and np.allclose(values, self.probabilities, atol=1e-4)


def known_pairs(adapter_folder: Path, base_folder: Path) -> list[Known]:
    pairs = [(str(row["sentence1"]), str(row["sentence2"])) for row in make_pairs(16, seed=11)]
    return [Known(pair, golden_probabilities(pair, adapter_folder, base_folder)) for pair in pairs]


@dataclass
class Seen:
    """What came of the load; written by all visitors."""

    waits_s: dict[str, list[float]] = field(default_factory=dict)  # until an answer, by endpoint
    busy: list[str] = field(default_factory=list)  # endpoints that refused because too many waited
    wrong: list[str] = field(default_factory=list)  # what was asked and answered, or never answered
    memory_bytes: list[int] = field(default_factory=list)  # of the page with its engines, once a second

    @property
    def growth(self) -> float:
        """Growth of the memory: the median of the last tenth over that of the first third's last tenth, less one."""
        part, third = max(len(self.memory_bytes) // 10, 1), len(self.memory_bytes) // 3
        before = float(np.median(self.memory_bytes[max(third - part, 0) : third] or self.memory_bytes[:1]))
        return float(np.median(self.memory_bytes[-part:])) / before - 1

    def as_json(self, load: Load) -> str:
        waits_s = {name: np.percentile(values, [0, 50, 95, 100]).tolist() for name, values in self.waits_s.items()}
        memory_mib = [round(self.memory_bytes[index] / 2**20) for index in (0, len(self.memory_bytes) // 3, -1)]
        counts = {"answers": sum(map(len, self.waits_s.values())), "wrong": len(self.wrong), "busy": len(self.busy)}
        return json.dumps(
            load._asdict() | counts | {"memory_mib": memory_mib, "growth": self.growth, "waits_s": waits_s}
        )


class Visitor:
    """Asks one thing after the other, and looks at each answer; everything that goes wrong is written down."""

    def __init__(self, number: int, url: str, known: list[Known], load: Load, seen: Seen, folder: Path) -> None:
        self._random = random.Random(number)  # noqa: S311 -- test data
        self._number, self._url, self._known, self._load, self._seen = number, url, known, load, seen
        self._folder = folder / str(number)
        self._folder.mkdir()
        self._prompt: Any = None

    def visit(self) -> None:
        asks = {"/compare": self._pair, "/latency": self._latency}
        asks |= {"/score_file": self._score, "/prompt_effect": self._pair, "/prompt": self._learned}
        with closing(Client(self._url, verbose=False, download_files=str(self._folder))) as self._client:
            start = time.monotonic()
            while (now := time.monotonic() - start) < self._load.seconds:
                if self._number % 2:
                    time.sleep(self._load.burst_s - now % self._load.burst_s)
                (name,) = self._random.choices(list(asks), [1, 1, 3, 3, 3])
                began = time.monotonic()
                try:
                    asks[name](name)
                except QueueError:
                    self._seen.busy.append(name)
                    time.sleep(1)
                except Exception as error:  # the visitor goes on
                    self._seen.wrong.append(f"{name}: {error!r}"[:500])
                else:
                    self._seen.waits_s.setdefault(name, []).append(time.monotonic() - began)

    def _expect(self, right: bool, asked: object, answer: object) -> None:
        if not right:
            self._seen.wrong.append(f"asked {asked}, answered {answer}"[:500])

    def _answer(self, name: str, *values: Any) -> Any:
        return self._client.submit(*values, api_name=name).result(timeout=HANG_SECONDS)

    def _pair(self, name: str) -> None:
        known, sides = self._random.choice(self._known), ("pytorch", "onnx") if name == "/compare" else ("learned",)
        answer = self._answer(name, *known.pair)
        right = all(known.is_said_by(answer[side]["probabilities"]) for side in sides)
        self._expect(right and answer[sides[-1]]["label"] == known.label, known, answer)

    def _latency(self, name: str) -> None:
        batch, length = self._random.randint(1, 3), self._random.randint(2, 16)
        (cell,) = self._answer(name, [batch], [length])["cells"]
        self._expect((cell["batch_size"], cell["tokens"]) == (batch, length), (batch, length), cell)

    def _learned(self, name: str) -> None:
        answer = self._answer(name)
        self._prompt = self._prompt or answer
        self._expect(answer == self._prompt and bool(answer["nearest_words"]), "the prompt", answer)

    def _score(self, name: str) -> None:
        # Few different files, so that several visitors upload equal ones at once.
        first = self._random.randrange(3)
        rows = self._known[first : first + 4]
        pairs: list[dict[str, object]] = [{"sentence1": row.pair[0], "sentence2": row.pair[1]} for row in rows]
        path = write_jsonl(self._folder / "rows.jsonl", pairs)
        summary, labelled = self._answer(name, handle_file(path), *[""] * 5)
        answers = [json.loads(line) for line in Path(labelled).read_text(encoding="utf-8").splitlines()]
        for row, answer in zip(rows, answers, strict=True):
            for side in ("pytorch", "onnx"):
                right = answer[f"prediction_{side}"] == row.label
                right &= abs(answer[f"probability_{side}"] - float(row.probabilities.max())) < 1e-4
                self._expect(right and answer["sentence1"] == row.pair[0], row, answer)
        self._expect(summary["rows"] == len(rows), rows, summary)


def work(url: str, pid: int, known: list[Known], load: Load, folder: Path) -> Seen:
    seen, page = Seen(), psutil.Process(pid)
    with ThreadPoolExecutor(load.visitors) as pool:
        visits = [pool.submit(Visitor(number, url, known, load, seen, folder).visit) for number in range(load.visitors)]
        while not all(visit.done() for visit in visits):
            with suppress(psutil.NoSuchProcess):
                processes = (page, *page.children(recursive=True))
                seen.memory_bytes.append(sum(process.memory_info().rss for process in processes))
            time.sleep(1)
    for visit in visits:
        visit.result()
    return seen


def test_every_visitor_is_answered_rightly_or_told_that_the_page_is_busy(
    flags: list[str], adapter: Folders, base_model: Folders, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    is_soak = request.config.getoption("--soak")
    load = SOAK if is_soak else SHORT
    known = known_pairs(adapter("bert"), base_model("bert"))
    assert {pair.label for pair in known} == {*MRPC.labels}, "or a page that always says the same passes"
    with serve_cleanly(flags, tmp_path / "cache", ON_CPU) as page:
        url, engines = page.wait_for_url(), page.children()
        seen = work(url, page.pid, known, load, tmp_path)
        print(seen.as_json(load))
        assert seen.wrong == []
        assert {"/compare", "/score_file", "/prompt", "/prompt_effect"} <= set(seen.waits_s)
        assert page.children() == engines, "no engine was started anew"
        if is_soak:
            assert seen.growth < MAX_GROWTH
        # Beyond the queue, which then stays full for minutes.
        with httpx.Client(base_url=url, timeout=30) as visitor:
            body = {"data": ["word1", "word2", "", "", ""]}
            posts = (visitor.post(f"{API}/call/compare", json=body) for _ in range(QUEUE_SIZE + 2))
            answer = next(answer for answer in posts if answer.status_code != 200)
            assert answer.status_code == 503
            assert answer.json() == {"detail": BUSY}
            assert f"{QUEUE_SIZE} visitors are waiting" in BUSY
            assert int(answer.headers["retry-after"]) > 0
            assert visitor.get("/").status_code == 200
        with connect(url) as client, pytest.raises(QueueError, match="Queue is full! Please try again"):
            client.predict("word1", "word2", api_name="/compare")
