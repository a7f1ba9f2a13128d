"""A bundle in a real Ray Serve cluster: asked over HTTP, refused, and replaced; and starts that fail.

One cluster for the module; the tests run in their order, as the last one that asks replaces the bundle.
"""

import asyncio
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import chain, repeat
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import DEFAULT, AsyncMock, Mock
from urllib.parse import urljoin, urlsplit

import httpx
import numpy as np
import pytest
from scipy.special import softmax

from demo.__main__ import main as demo_main
from export.__main__ import main as export_main
from export.bundle.folder import Bundle, load_bundle
from export.ray_cluster import RayCluster
from export.runtime.check_text import MAX_CHARACTERS
from export.runtime.tokenizer import bundle_tokenizer
from export.serve.__main__ import main as serve_main
from export.serve.config import ServingConfig
from export.serve.requests import MAX_TEXTS
from export.serve.service import Service, import_serve
from tests.conftest import ROOT, Folders, make_pairs, peft_logits
from train.common.errors import EngineError, RequestError

# Ray does not wait for the processes of a start that failed and was tried again.
pytestmark = pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")
Capsys = pytest.CaptureFixture[str]
CONFIG = ServingConfig(replicas=1, batch_size=8)
PAIRS = [(str(row["sentence1"]), str(row["sentence2"])) for row in make_pairs(24, seed=11)]
WAIT_SECONDS = 90  # for what must happen in the end
CLIENT = httpx.Client(timeout=WAIT_SECONDS, trust_env=False, limits=httpx.Limits(max_keepalive_connections=0))


def ask(url: str, body: object, *, path: str = "/v1/classify", method: str = "POST") -> httpx.Response:
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
        expected = [
            {"label": self.labels[best], "probability": max(each.values()), "probabilities": each, "cut": False}
            for best, each in zip(self.golden[rows].argmax(axis=1), said, strict=True)
        ]
        is_golden = np.allclose([list(each.values()) for each in said], self.golden[rows], atol=1e-5)
        return {tuple(each) for each in said} == {self.labels} and is_golden and body["answers"] == expected


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
    two, other, abc = load_bundle(folder / "two"), load_bundle(folder / "other"), ("a", "b", "c")
    return Models(
        Model(two, two.manifest_sha256, "bert", ("not_equivalent", "equivalent"), of_bert),
        Model(two, two.manifest_sha256, "three", abc, of_three),
        Model(other, other.manifest_sha256, "bert", abc, of_three),
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
        done = pool.map(go_on, range(askers))
        try:
            yield seen
        finally:
            stop.set()
    list(done)  # raises what an asker raised


def refusal(argv: list[str], capsys: Capsys) -> str:
    """What the command line says when it ends with one sentence; Ray may print more to standard error."""
    assert serve_main(argv) == 2
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    (error,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    return error


def test_a_start_that_fails_leaves_no_folder(models: Models, monkeypatch: pytest.MonkeyPatch, capsys: Capsys) -> None:
    """This comes first: a process uses one cluster at a time."""
    import_serve(None)
    from ray.exceptions import ActorDiedError, RayTaskError

    monkeypatch.setattr("export.ray_cluster.START_PAUSE_SECONDS", 0)

    def try_to_start(function: str, error: Exception, attempts: int, words: str) -> Mock:
        monkeypatch.setattr(function, start := Mock(side_effect=error))
        assert words in refusal([str(models.bert.bundle.folder)], capsys)
        assert start.call_count == attempts
        return start

    words = "The current node timed out during startup"
    start = try_to_start("ray.init", Exception(f"{words}."), 3, f"Ray cannot be started on this machine ({words}).")
    assert not Path(start.call_args.kwargs["_temp_dir"]).exists()
    cluster = nullcontext(RayCluster("127.0.0.1:1", (2,)))
    monkeypatch.setattr("export.serve.service.ray_cluster", lambda *_, **__: cluster)
    words = "Ray Serve cannot be started (The actor died unexpectedly before finishing this task). Try again"
    try_to_start("ray.serve.start", ActorDiedError(), 3, words)
    # What Serve's own code raised, such as that a port is taken, another attempt does not change.
    failure = RayTaskError("ready", "Traceback:\nRuntimeError: Failed to bind.", None)
    try_to_start("ray.serve.start", failure, 1, "Ray Serve cannot be started (Failed to bind). Try again")


@pytest.fixture(scope="module")
def service(models: Models) -> Iterator[Service]:
    """Started at the second attempt: on a machine that is too busy for Serve's deadlines its first one fails."""
    import_serve(None)
    from ray import serve
    from ray.exceptions import ActorDiedError

    start = Mock(wraps=serve.start, side_effect=chain([ActorDiedError()], repeat(DEFAULT)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serve, "start", start)
        made = Service(CONFIG)
    with closing(made):
        assert start.call_count >= 2
        made.deploy(models.bert.bundle)
        yield made


def test_one_pair_many_and_either_task_are_answered_as_by_peft(service: Service, models: Models) -> None:
    for model in (models.bert, models.three):
        # Many come in their own order, though in batches by length, none larger than was allowed.
        for rows, size in ([3], 1), (range(len(PAIRS)), CONFIG.batch_size):
            texts: dict[str, object] = {"pairs": PAIRS} if size > 1 else {"pair": PAIRS[3]}
            answer = ask(service.url, texts | {"task": model.task})
            assert (model.gave(answer, rows), answer.json()["batch_size"]) == (True, size)
    health = ask(service.url, b"", path="/v1/health", method="GET")
    expected = {"status": "ok", "tasks": ["bert", "three"], "bundle_sha256": models.bert.sha256}
    assert (health.status_code, health.json()) == (200, health.json() | expected)
    assert service.replicas() == 1


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"\xff\xfe", 400, "is not JSON"),
        (b"[" * 100_000, 400, "is not JSON"),
        (b"[]", 422, "no JSON object"),
        ({"task": "bert"}, 422, "has no text"),
        ({"pair": PAIRS[0], "pairs": PAIRS, "task": "bert"}, 422, "has pair and pairs"),
        ({"pair": PAIRS[0], "model": "bert"}, 422, "no field 'model'"),
        ({"pair": ["word1"], "task": "bert"}, 422, "a list of two sentences"),
        ({"pair": ["word1", 2], "task": "bert"}, 422, "Sentence 2 is no text"),
        ({"pairs": [], "task": "bert"}, 422, "at least one pair"),
        ({"pairs": [*PAIRS, ["word1", ""]], "task": "bert"}, 422, "Pair 25: Sentence 2 is empty"),
        ({"pair": ["word1", "\ud800"], "task": "bert"}, 422, "half a surrogate pair at character 1"),
        ({"pair": ["word1", "x" * (MAX_CHARACTERS + 1)], "task": "bert"}, 413, "10,001 characters"),
        ({"pairs": [PAIRS[0]] * (MAX_TEXTS + 1), "task": "bert"}, 413, "at most 256"),
        (b" " * (9 * 2**20), 413, "more than 8 MiB"),
        ({"pair": PAIRS[0]}, 422, "No task is named. Give one of bert, three"),
        ({"pair": PAIRS[0], "task": "four"}, 422, "no task 'four'. Give one of bert, three"),
        ({"pair": PAIRS[0], "task": 4}, 422, "task is no text"),
        ({"text": "word1", "task": "bert"}, 422, "about pairs (sentence1 and sentence2). Send pair or pairs"),
        ({"texts": ["word1", ""], "task": "bert"}, 422, "Text 2: The sentence is empty"),
        (b"{}", 404, "There is nothing at this path. Known are /v1/classify, /v1/health."),
        (b"", 405, "/v1/classify takes POST alone."),
    ],
)
def test_a_request_that_cannot_be_answered_is_refused(body: object, status: int, words: str, service: Service) -> None:
    path, method = {404: ("/v1/other", "POST"), 405: ("/v1/classify", "GET")}.get(status, ("/v1/classify", "POST"))
    answer = ask(service.url, body, path=path, method=method)
    assert (answer.status_code, list(answer.json())) == (status, ["error"])
    assert words in answer.json()["error"]
    assert "Traceback" not in answer.text


def test_token_ids_are_answered_for_their_own_bundle_alone(service: Service, models: Models) -> None:
    arrays = bundle_tokenizer(models.three.bundle)(PAIRS).arrays
    response = service.logits(arrays, task="three", bundle_sha256=models.three.sha256)
    assert np.allclose(softmax(response.logits, axis=1), models.three.golden, atol=1e-5)
    # A caller that sends a batch measures it: it goes through the graph as it came.
    assert response.batch_size == len(PAIRS) > CONFIG.batch_size
    with pytest.raises(EngineError, match="serves another bundle"):
        service.logits(arrays, task="bert", bundle_sha256=models.other.sha256)
    arrays["input_ids"] += 1000
    with pytest.raises(EngineError, match="outside the vocabulary"):
        service.logits(arrays, task="bert", bundle_sha256=models.bert.sha256)


def test_a_bundle_is_replaced_under_load_by_the_command_line(service: Service, models: Models) -> None:
    command = [sys.executable, "-m", "export.serve", str(models.other.bundle.folder), "--address", service.address]
    with load(service.url, askers=2) as seen:
        seen.wait_for(20)
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        seen.wait_for(20)
    assert result.returncode == 0, result.stderr
    assert all(words in result.stdout for words in ("1 replicas are running: ONNX Runtime", f"POST {service.url} "))
    seen.check(models.bert, models.other)
    # What was deployed stays when the command has ended.
    assert models.other.gave(ask(service.url, {"pairs": PAIRS}), range(len(PAIRS)))


def test_more_replicas_than_cpus_are_refused(service: Service, models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "config", replace(CONFIG, replicas=3, threads=999))
    with pytest.raises(EngineError, match=r"3 replicas of 999 threads want 2997 CPUs, and the cluster has \d+\."):
        service.deploy(models.bert.bundle)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--address 127.0.0.1:1", "--address 127.0.0.1:1: no Ray cluster answers there"),
        ("--address ray://127.0.0.1:1", "give HOST:PORT"),
        ("--replicas 0", "--replicas 0: give a whole number of at least 1."),
        ("--replicas 2 --max-replicas 1", "--max-replicas 1 is less than --replicas 2."),
        ("--replicas 999", "999 replicas of 1 thread want 999 cores, and there are"),
        ("--queue-size 0", "--queue-size 0"),
        ("--batch-wait-ms nan", "--batch-wait-ms nan: give a number from 0 to 1000."),
        ("--port 0", "--port 0"),
        ("--port {taken}", "is in use on 127.0.0.1. Stop what listens there"),
        ("--precision int8", "holds no int8 graph"),
        ("--remove", "--remove ends what is served in a cluster"),
    ],
)
def test_a_wrong_flag_is_refused(flags: str, words: str, service: Service, models: Models, capsys: Capsys) -> None:
    given = flags.format(taken=urlsplit(service.url).port).split()
    assert words in refusal([str(models.bert.bundle.folder), *given], capsys)


def test_a_call_is_made_again_where_its_replica_died(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.exceptions import ActorDiedError

    from export.serve.deployments import call_replica

    def call(*outcomes: object) -> object:
        """What a caller gets from a method that raises or returns these, call by call."""
        return asyncio.run(call_replica(SimpleNamespace(remote=AsyncMock(side_effect=outcomes))))

    assert call(ActorDiedError(), ActorDiedError(), "answer") == "answer"
    with pytest.raises(RequestError, match="No replica answered in time"):
        call(ActorDiedError(), TimeoutError())
    monkeypatch.setattr("export.serve.deployments.CALL_SECONDS", 0.1)
    with pytest.raises(RequestError, match="No replica answered in time"):
        call(ActorDiedError(), "too late")


def test_flags_for_replicas_without_ray_serve_are_refused(capsys: Capsys) -> None:
    assert demo_main(["--replicas", "2"]) == 2
    assert "needs --engine ray" in capsys.readouterr().err
