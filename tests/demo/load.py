"""Many visitors of one page at once: what each asks, whether the answer is right, and how long it was waited for."""

import json
import random
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from gradio_client import Client, handle_file
from gradio_client.utils import QueueError

from tests.conftest import make_pairs, peft_logits

HANG_SECONDS = 300.0
"""An answer that takes longer never comes: several times what a full queue takes."""

BUSY_SECONDS = 1.0
"""Pause of a visitor who was told that the page is busy."""

LABELS = ("not_equivalent", "equivalent")


@dataclass(frozen=True)
class Known:
    """A pair of sentences with what PEFT alone says of it.

    Attributes:
        pair: both sentences.
        logits: float32, shape = (2,)
    """

    pair: tuple[str, str]
    logits: np.ndarray

    @property
    def probabilities(self) -> np.ndarray:
        """Of both labels."""
        powers = np.exp(self.logits - self.logits.max())
        return powers / powers.sum()

    def is_said_by(self, probabilities: dict[str, float]) -> bool:
        """Whether an answer says the same, up to rounding."""
        return tuple(probabilities) == LABELS and np.allclose(
            list(probabilities.values()), self.probabilities, atol=1e-4
        )


def known_pairs(adapter_folder: Path, base_folder: Path, n: int) -> list[Known]:
    """Pairs of different lengths, and their logits by transformers and PEFT."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    pairs = [(str(row["sentence1"]), str(row["sentence2"])) for row in make_pairs(n, seed=11)]
    batch = tokenizer([first for first, _ in pairs], [second for _, second in pairs], return_tensors="np", padding=True)
    logits = peft_logits(adapter_folder, base_folder, dict(batch))
    return [Known(pair, row) for pair, row in zip(pairs, logits, strict=True)]


@dataclass(frozen=True)
class Load:
    """How hard a page is worked.

    Attributes:
        visitors: at once.
        seconds: for so long each asks again and again.
        burst: every other visitor waits for such a moment, so that many come together, in seconds.
    """

    visitors: int
    seconds: float
    burst: float


@dataclass
class Seen:
    """What came of it; written by all visitors.

    Attributes:
        waits: seconds until an answer, by endpoint.
        busy: how many requests were refused because too many waited.
        wrong: what was asked and what came, for each answer that is wrong, and for each that never came.
        memory: of the page with its engines in bytes, once a second.
    """

    waits: dict[str, list[float]] = field(default_factory=dict)
    busy: int = 0
    wrong: list[str] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def growth(self) -> float:
        """Of the memory: the median of the last tenth over that of the first third's last tenth, less one."""
        part = max(len(self.memory) // 10, 1)
        third = len(self.memory) // 3
        before = float(np.median(self.memory[max(third - part, 0) : third] or self.memory[:1]))
        return float(np.median(self.memory[-part:])) / before - 1

    def as_json(self, load: Load) -> str:
        """One line of figures."""
        waits = {
            name: {"answers": len(values), "p50_s": round(float(np.median(values)), 2), "p95_s": _p95(values)}
            for name, values in sorted(self.waits.items())
        }
        everything = [value for values in self.waits.values() for value in values]
        return json.dumps(
            {
                "visitors": load.visitors,
                "seconds": load.seconds,
                "answers": len(everything),
                "wrong": len(self.wrong),
                "busy": self.busy,
                "p95_s": _p95(everything),
                "memory_mib": [round(self.memory[index] / 2**20) for index in (0, len(self.memory) // 3, -1)],
                "memory_growth": round(self.growth, 4),
                "endpoints": waits,
            }
        )


def _p95(values: list[float]) -> float:
    return round(float(np.percentile(values, 95)), 2)


class Visitor(threading.Thread):
    """One who asks one thing after the other, and looks at each answer."""

    def __init__(self, number: int, url: str, known: list[Known], load: Load, seen: Seen, folder: Path) -> None:
        super().__init__(name=f"visitor {number}", daemon=True)
        self._random = random.Random(number)  # noqa: S311 -- test data
        self._number = number
        self._url = url
        self._known = known
        self._load = load
        self._seen = seen
        self._folder = folder
        self._prompt: Any = None

    def run(self) -> None:
        """Ask until the time is over; whatever goes wrong is written down."""
        try:
            client = Client(self._url, verbose=False, download_files=str(self._folder / str(self._number)))
        except Exception as error:  # a visitor who does not get in is one of the faults looked for
            self._note(f"connect: {error!r}")
            return
        try:
            self._visit(client)
        finally:
            client.close()

    def _visit(self, client: Client) -> None:
        asks: list[Callable[[Client], str]] = [self._compare, self._latency, *[self._score] * 3, *[self._effect] * 3]
        asks += [self._learned] * 3
        start = time.monotonic()
        while (now := time.monotonic() - start) < self._load.seconds:
            if self._number % 2:
                time.sleep(self._load.burst - now % self._load.burst)
            ask = self._random.choice(asks)
            began = time.monotonic()
            try:
                name = ask(client)
            except QueueError:
                with self._seen.lock:
                    self._seen.busy += 1
                time.sleep(BUSY_SECONDS)
                continue
            except Exception as error:  # written down: a thread's own exception would be lost
                self._note(f"{ask.__name__}: {error!r}")
                continue
            with self._seen.lock:
                self._seen.waits.setdefault(name, []).append(time.monotonic() - began)

    def _note(self, words: str) -> None:
        with self._seen.lock:
            self._seen.wrong.append(words[:500])

    def _expect(self, right: bool, asked: object, answer: object) -> None:
        if not right:
            self._note(f"asked {asked}, answered {answer}")

    def _answer(self, client: Client, *values: Any, name: str) -> Any:
        return client.submit(*values, api_name=name).result(timeout=HANG_SECONDS)

    def _compare(self, client: Client) -> str:
        known = self._random.choice(self._known)
        answer = self._answer(client, *known.pair, name="/compare")
        right = all(known.is_said_by(answer[side]["probabilities"]) for side in ("pytorch", "onnx"))
        self._expect(right and answer["onnx"]["label"] == LABELS[int(known.logits.argmax())], known, answer)
        return "/compare"

    def _latency(self, client: Client) -> str:
        batch, length = self._random.randint(1, 3), self._random.randint(2, 16)
        answer = self._answer(client, [batch], [length], name="/latency")
        (cell,) = answer["cells"]
        self._expect((cell["batch_size"], cell["tokens"]) == (batch, length), (batch, length), answer)
        return "/latency"

    def _effect(self, client: Client) -> str:
        known = self._random.choice(self._known)
        answer = self._answer(client, *known.pair, name="/prompt_effect")
        self._expect(known.is_said_by(answer["learned"]["probabilities"]), known, answer)
        return "/prompt_effect"

    def _learned(self, client: Client) -> str:
        answer = self._answer(client, name="/prompt")
        self._prompt = self._prompt or answer
        self._expect(answer == self._prompt and bool(answer["nearest_words"]), "the prompt", answer)
        return "/prompt"

    def _score(self, client: Client) -> str:
        # Of few different files, so that several visitors bring the same at once.
        first = self._random.randrange(3)
        rows = self._known[first : first + 4]
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            path = Path(folder) / "rows.jsonl"
            lines = [json.dumps({"sentence1": row.pair[0], "sentence2": row.pair[1]}) for row in rows]
            path.write_text("\n".join(lines), encoding="utf-8")
            summary, labelled = self._answer(client, handle_file(path), *[""] * 5, name="/score_file")
        answers = [json.loads(line) for line in Path(labelled).read_text(encoding="utf-8").splitlines()]
        Path(labelled).unlink()
        for row, answer in zip(rows, answers, strict=True):
            for side in ("pytorch", "onnx"):
                right = answer[f"prediction_{side}"] == LABELS[int(row.logits.argmax())]
                right &= abs(answer[f"probability_{side}"] - float(row.probabilities.max())) < 1e-4
                self._expect(right and answer["sentence1"] == row.pair[0], row, answer)
        self._expect(summary["rows"] == len(rows), rows, summary)
        return "/score_file"


def work(url: str, pid: int, known: list[Known], load: Load, folder: Path) -> Seen:
    """Let the visitors in, and watch the page's memory until the last has gone.

    Args:
        pid: of the page.
        folder: for the visitors' files.
    """
    seen = Seen()
    visitors = [Visitor(number, url, known, load, seen, folder) for number in range(load.visitors)]
    for visitor in visitors:
        visitor.start()
    page = psutil.Process(pid)
    end = time.monotonic() + load.seconds + HANG_SECONDS
    while any(visitor.is_alive() for visitor in visitors):
        if time.monotonic() > end:
            seen.wrong += [f"{visitor.name} still waits" for visitor in visitors if visitor.is_alive()]
            break
        seen.memory.append(sum(_resident(process) for process in (page, *page.children(recursive=True))))
        time.sleep(1)
    return seen


def _resident(process: psutil.Process) -> int:
    try:
        n_bytes: int = process.memory_info().rss
        return n_bytes
    except psutil.NoSuchProcess:
        return 0
