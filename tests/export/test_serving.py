"""A bundle in a real Ray Serve cluster: over HTTP, under load, while replicas die, come, go and change their bundle.

One cluster for the module; the tests run in their order, as what one deploys the next one asks.
"""

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psutil
import pytest
from scipy.special import softmax

from demo.__main__ import main as demo_main
from export.__main__ import main as export_main
from export.bundle.folder import Bundle, load_bundle
from export.runtime.check_text import MAX_CHARACTERS
from export.runtime.tokenizer import bundle_tokenizer
from export.serve.__main__ import main as serve_main
from export.serve.config import ServingConfig
from export.serve.requests import MAX_TEXTS
from export.serve.service import Service
from tests.conftest import ON_CPU, ROOT, make_pairs, peft_logits
from tests.demo.server import serve, wait_until_gone
from tests.demo.test_demo import connect
from train.common.errors import BundleError, EngineError

Folders = Callable[[str], Path]
Pairs = list[tuple[str, str]]

PAIRS: Pairs = [(str(row["sentence1"]), str(row["sentence2"])) for row in make_pairs(24, seed=11)]
"""Of different lengths."""

LABELS = {"bert": ("not_equivalent", "equivalent"), "three": ("a", "b", "c")}

WAIT_SECONDS = 90
"""For what must happen in the end; no test measures time."""


@dataclass(frozen=True)
class Answer:
    """What came over HTTP."""

    status: int
    headers: dict[str, str]
    body: dict[str, Any]


def ask(url: str, body: object, *, path: str = "/v1/classify", method: str = "POST") -> Answer:
    """One request; ``body`` is sent as JSON unless it is bytes."""
    place = urlsplit(url)
    connection = http.client.HTTPConnection(str(place.hostname), place.port, timeout=WAIT_SECONDS)
    try:
        connection.request(method, path, body if isinstance(body, bytes) else json.dumps(body))
        response = connection.getresponse()
        headers = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, headers, json.loads(response.read()))
    finally:
        connection.close()


@dataclass(frozen=True)
class Model:
    """A task of a bundle, and what PEFT alone says of `PAIRS`: float, shape = (24, n_labels)"""

    bundle: Bundle
    task: str
    labels: tuple[str, ...]
    golden: np.ndarray

    def is_said_by(self, answer: dict[str, Any], rows: Sequence[int]) -> bool:
        """Whether an answer is of this bundle and task, and right for these pairs."""
        probabilities = [said["probabilities"] for said in answer["answers"]]
        return (
            (answer["bundle_sha256"], answer["task"]) == (self.bundle.manifest_sha256, self.task)
            and {tuple(said) for said in probabilities} == {self.labels}
            and np.allclose([list(said.values()) for said in probabilities], self.golden[rows], atol=1e-5)
            and all(
                said["label"] == self.labels[int(np.argmax(self.golden[row]))]
                and said["probability"] == max(said["probabilities"].values())
                and said["cut"] is False
                for said, row in zip(answer["answers"], rows, strict=True)
            )
        )


def golden(adapter_folder: Path, base_folder: Path, n_labels: int) -> np.ndarray:
    from transformers import AutoTokenizer

    batch = AutoTokenizer.from_pretrained(base_folder)(
        [first for first, _ in PAIRS], [second for _, second in PAIRS], return_tensors="np", padding=True
    )
    return softmax(peft_logits(adapter_folder, base_folder, dict(batch), n_labels=n_labels), axis=1)


@dataclass(frozen=True)
class Models:
    """A bundle of two tasks, "bert" and "three", and another whose only task is called "bert" too and is another one."""

    bert: Model
    three: Model
    other: Model


@pytest.fixture(scope="module")
def models(
    tmp_path_factory: pytest.TempPathFactory, adapter: Folders, second: Callable[..., Path], base_model: Folders
) -> Models:
    import torch

    torch.set_num_threads(1)  # models this small lose much by waiting for a second one
    folder = tmp_path_factory.mktemp("served")
    three = second("bert", three=True)
    assert export_main([str(adapter("bert")), str(three), "--out", str(folder / "two")]) == 0
    shutil.copytree(three, folder / "bert")
    assert export_main([str(folder / "bert"), "--out", str(folder / "other")]) == 0
    two, other = load_bundle(folder / "two"), load_bundle(folder / "other")
    of_bert, of_three = (golden(path, base_model("bert"), n) for path, n in ((adapter("bert"), 2), (three, 3)))
    return Models(
        Model(two, "bert", LABELS["bert"], of_bert),
        Model(two, "three", LABELS["three"], of_three),
        Model(other, "bert", LABELS["three"], of_three),
    )


CONFIG = ServingConfig(replicas=2, batch_size=8, batch_wait_ms=20)


@pytest.fixture(scope="module")
def service(models: Models) -> Iterator[Service]:
    made = Service(CONFIG)
    try:
        made.deploy(models.bert.bundle)
        yield made
    finally:
        made.close()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.1)


def replica_pids() -> list[int]:
    """The processes that hold the bundle, of this cluster alone."""
    pids = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it ended meanwhile
            # While it answers, the name goes on with what it does.
            if "".join(child.cmdline()[:1]).startswith("ray::ServeReplica:promptfold:Classifier"):
                pids.append(child.pid)
    return pids


@dataclass
class Load:
    """Requests that go on until they are told to stop, and what came of them; written by all askers."""

    answers: list[tuple[int, Answer]] = field(default_factory=list)
    failures: list[BaseException] = field(default_factory=list)


@contextmanager
def load(url: str, *, askers: int = 4) -> Iterator[Load]:
    """Askers who ask for one pair after the other while the block runs."""
    seen, stop = Load(), threading.Event()

    def go_on(number: int) -> None:
        row = number
        while not stop.is_set():
            row = (row + 1) % len(PAIRS)
            try:
                seen.answers.append((row, ask(url, {"pair": PAIRS[row], "task": "bert"})))
            except (OSError, http.client.HTTPException, ValueError) as error:
                seen.failures.append(error)

    with ThreadPoolExecutor(askers) as pool:
        done = [pool.submit(go_on, number) for number in range(askers)]
        try:
            yield seen
        finally:
            stop.set()
    for future in done:
        future.result()
    assert not seen.failures


def after(seen: Load, n: int) -> None:
    """Wait for so many more answers."""
    before = len(seen.answers)
    wait_until(lambda: len(seen.answers) >= before + n or bool(seen.failures))


def test_one_pair_many_and_either_task_are_answered_as_by_peft(service: Service, models: Models) -> None:
    for model in (models.bert, models.three):
        one = ask(service.url, {"pair": PAIRS[3], "task": model.task})
        assert one.status == 200
        assert model.is_said_by(one.body, [3])
        assert one.body["batch_size"] == 1
        many = ask(service.url, {"pairs": PAIRS, "task": model.task})
        assert many.status == 200
        assert model.is_said_by(many.body, range(len(PAIRS)))
        # In their own order, though in batches by length, none larger than was allowed.
        assert many.body["batch_size"] == CONFIG.batch_size
    health = ask(service.url, b"", path="/v1/health", method="GET")
    assert (health.status, health.body["status"], health.body["tasks"]) == (200, "ok", ["bert", "three"])
    assert health.body["bundle_sha256"] == models.bert.bundle.manifest_sha256
    assert service.replicas() == 2


def test_requests_that_come_together_share_batches_also_of_both_tasks_and_each_gets_its_own_answer(
    service: Service, models: Models
) -> None:
    both = [models.bert, models.three]

    def one(number: int) -> Answer:
        return ask(service.url, {"pair": PAIRS[number % len(PAIRS)], "task": both[number % 2].task})

    numbers = range(4 * len(PAIRS))
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(one, numbers))
    for number, answer in zip(numbers, answers, strict=True):
        assert both[number % 2].is_said_by(answer.body, [number % len(PAIRS)])
    sizes = {answer.body["batch_size"] for answer in answers}
    assert 1 < max(sizes) <= CONFIG.batch_size
    assert len({answer.body["replica"] for answer in answers}) == 2


LONG = "x" * (MAX_CHARACTERS + 1)


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"no JSON", 400, "is not JSON"),
        (b"\xff\xfe", 400, "is not JSON"),
        (b"[" * 100_000, 400, "is not JSON"),
        (b"[]", 422, "no JSON object"),
        ({}, 422, "has no text"),
        ({"task": "bert"}, 422, "has no text"),
        ({"pair": PAIRS[0], "pairs": PAIRS, "task": "bert"}, 422, "has pair and pairs"),
        ({"pair": PAIRS[0], "model": "bert"}, 422, "no field 'model'"),
        ({"pair": ["word1"], "task": "bert"}, 422, "a list of two sentences"),
        ({"pair": "word1 word2", "task": "bert"}, 422, "a list of two sentences"),
        ({"pair": ["word1", 2], "task": "bert"}, 422, "Sentence 2 is no text"),
        ({"pair": ["word1", "  "], "task": "bert"}, 422, "Sentence 2 is empty"),
        ({"pairs": [], "task": "bert"}, 422, "at least one pair"),
        ({"pairs": [*PAIRS, ["word1", ""]], "task": "bert"}, 422, "Pair 25: Sentence 2 is empty"),
        ({"pair": ["word1", "\ud800"], "task": "bert"}, 422, "half a surrogate pair at character 1"),
        ({"pair": ["word1", LONG], "task": "bert"}, 413, "10,001 characters"),
        ({"pairs": [PAIRS[0]] * (MAX_TEXTS + 1), "task": "bert"}, 413, "at most 256"),
        (b" " * (9 * 2**20), 413, "more than 8 MiB"),
        ({"pair": PAIRS[0]}, 422, "No task is named. Give one of bert, three"),
        ({"pair": PAIRS[0], "task": "four"}, 422, "no task 'four'. Give one of bert, three"),
        ({"pair": PAIRS[0], "task": 4}, 422, "task is no text"),
        ({"text": "word1", "task": "bert"}, 422, "about pairs (sentence1 and sentence2). Send pair or pairs"),
    ],
)
def test_a_request_that_cannot_be_answered_gets_one_sentence(
    body: object, status: int, words: str, service: Service
) -> None:
    answer = ask(service.url, body)
    assert (answer.status, list(answer.body)) == (status, ["error"])
    assert words in answer.body["error"]
    assert "Traceback" not in answer.body["error"]


def test_other_paths_and_methods_are_refused_in_words(service: Service) -> None:
    assert ask(service.url, b"{}", path="/v1/other").status == 404
    assert ask(service.url, b"", method="GET").status == 405


def test_token_ids_are_answered_for_their_own_bundle_alone(service: Service, models: Models) -> None:
    arrays = bundle_tokenizer(models.three.bundle)(PAIRS).arrays
    reply = service.logits(arrays, task="three", bundle_sha256=models.three.bundle.manifest_sha256)
    assert np.allclose(softmax(reply.logits, axis=1), models.three.golden, atol=1e-5)
    # Who sends a batch measures it: it goes through the graph as it came.
    assert reply.batch_size == len(PAIRS) > CONFIG.batch_size
    with pytest.raises(EngineError, match="serves another bundle"):
        service.logits(arrays, task="bert", bundle_sha256=models.other.bundle.manifest_sha256)
    with pytest.raises(EngineError, match="outside the vocabulary"):
        service.logits(
            arrays | {"input_ids": arrays["input_ids"] + 1000},
            task="bert",
            bundle_sha256=models.bert.bundle.manifest_sha256,
        )


def test_a_replica_that_is_killed_under_load_loses_no_request(service: Service, models: Models) -> None:
    pids = replica_pids()
    assert len(pids) == 2
    with load(service.url) as seen:
        after(seen, 20)
        os.kill(pids[0], signal.SIGKILL)
        after(seen, 40)
        wait_until(lambda: service.replicas() == 2 and len(set(replica_pids()) - set(pids)) == 1)
        after(seen, 20)
    for row, answer in seen.answers:
        assert answer.status == 200, answer.body
        assert models.bert.is_said_by(answer.body, [row])


SCALED = replace(
    CONFIG, replicas=1, max_replicas=2, batch_size=1, queue_size=8, upscale_seconds=0.5, downscale_seconds=1.0
)


def test_beyond_a_full_queue_requests_are_sent_away_and_all_others_answered(service: Service, models: Models) -> None:
    service.config = SCALED
    service.deploy(models.bert.bundle)
    rows = [number % len(PAIRS) for number in range(MAX_TEXTS)]
    question = {"pairs": [PAIRS[row] for row in rows], "task": "bert"}
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(partial(ask, service.url), [question] * 48))
    assert {answer.status for answer in answers} == {200, 429}
    for answer in answers:
        if answer.status == 200:
            assert models.bert.is_said_by(answer.body, rows)
        else:
            assert answer.headers["retry-after"] == "1"
            assert "queue is full" in answer.body["error"]


def test_replicas_come_under_load_and_go_after_it(service: Service, models: Models) -> None:
    """As deployed by the test before."""
    with load(service.url, askers=8) as seen:
        wait_until(lambda: service.replicas() == 2)
        after(seen, 20)
    with load(service.url, askers=1) as few:
        wait_until(lambda: service.replicas() == 1)
        after(few, 5)
    for row, answer in [*seen.answers, *few.answers]:
        assert answer.status == 200, answer.body
        assert models.bert.is_said_by(answer.body, [row])


def test_the_command_line_replaces_a_bundle_under_load_and_every_answer_is_of_the_bundle_it_names(
    service: Service, models: Models
) -> None:
    by_hash = {model.bundle.manifest_sha256: model for model in (models.bert, models.other)}
    command = [sys.executable, "-m", "export.serve", str(models.other.bundle.folder), "--replicas", "2"]
    with load(service.url) as seen:
        after(seen, 20)
        result = subprocess.run(
            [*command, "--address", service.address], cwd=ROOT, capture_output=True, text=True, check=False
        )
        after(seen, 20)
    assert result.returncode == 0, result.stderr
    assert "2 replicas are running: ONNX Runtime" in result.stdout
    assert f"POST {service.url} " in result.stdout
    used = set()
    for row, answer in seen.answers:
        assert answer.status == 200, answer.body
        used.add(answer.body["bundle_sha256"])
        assert by_hash[answer.body["bundle_sha256"]].is_said_by(answer.body, [row])
    assert used == set(by_hash)
    # What was deployed stays when the command has ended.
    assert models.other.is_said_by(ask(service.url, {"pairs": PAIRS}).body, range(len(PAIRS)))
    arrays = bundle_tokenizer(models.bert.bundle)(PAIRS).arrays
    with pytest.raises(EngineError, match="serves another bundle"):
        service.logits(arrays, task="bert", bundle_sha256=models.bert.bundle.manifest_sha256)


def statuses() -> str:
    """What Serve says of the application and its deployments."""
    from ray import serve as ray_serve

    app = ray_serve.status().applications["promptfold"]
    return " ".join([app.message, *(deployment.message for deployment in app.deployments.values())])


def test_a_replica_whose_folder_holds_another_bundle_by_now_serves_nothing(service: Service, models: Models) -> None:
    """Two replicas of the other bundle are running; one is killed after the folder was changed."""
    folder, golden_bundle = models.other.bundle.folder, models.other.bundle.manifest_sha256
    by_now = folder.with_name("by now")
    folder.rename(by_now)
    shutil.copytree(models.bert.bundle.folder, folder)
    pids = replica_pids()
    with load(service.url) as seen:
        after(seen, 20)
        os.kill(pids[0], signal.SIGKILL)
        wait_until(lambda: f"{folder} holds another bundle" in statuses())
        after(seen, 20)
    shutil.rmtree(folder)
    by_now.rename(folder)
    assert models.other.bundle.manifest_sha256 == golden_bundle
    for row, answer in seen.answers:
        assert answer.status == 200, answer.body
        assert models.other.is_said_by(answer.body, [row])
    wait_until(lambda: service.replicas() == 2)


def test_a_bundle_that_is_not_on_the_replicas_machine_is_refused_in_words(
    service: Service, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on another machine: here the driver alone takes the folder for there."""
    monkeypatch.setattr(Bundle, "manifest_sha256", "0" * 64)
    service.config = replace(CONFIG, replicas=1)
    with pytest.raises(
        EngineError, match=r"The replicas cannot start: .*nowhere is not on this machine\. Every machine"
    ):
        service.deploy(replace(models.bert.bundle, folder=tmp_path / "nowhere"))


def test_more_replicas_than_the_cluster_has_cpus_for_are_refused_at_once(service: Service, models: Models) -> None:
    service.config = replace(CONFIG, replicas=3, threads=999)
    with pytest.raises(EngineError, match=r"3 replicas of 999 threads want 2997 CPUs, and the cluster has \d+\."):
        service.deploy(models.bert.bundle)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--address 127.0.0.1:1", "--address 127.0.0.1:1: no Ray cluster answers there"),
        ("--address nowhere", "--address nowhere: give HOST:PORT"),
        ("--address ray://127.0.0.1:1", "give HOST:PORT"),
        ("--replicas 0", "--replicas 0: give a whole number of at least 1."),
        ("--replicas 2 --max-replicas 1", "--max-replicas 1 is less than --replicas 2."),
        ("--replicas 999", "999 replicas of 1 thread want 999 cores, and there are"),
        ("--queue-size 0", "--queue-size 0"),
        ("--batch-wait-ms -1", "--batch-wait-ms -1: give a number from 0 to 1000."),
        ("--batch-wait-ms nan", "--batch-wait-ms nan"),
        ("--port 0", "--port 0"),
        ("--precision int8", "holds no int8 graph"),
        ("--remove", "--remove ends what is served in a cluster"),
    ],
)
def test_a_wrong_flag_ends_with_one_sentence_and_status_2(
    flags: str, words: str, bundle: Folders, capsys: pytest.CaptureFixture[str]
) -> None:
    assert serve_main([str(bundle("bert")), *flags.split()]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_a_port_that_is_taken_is_named_before_a_cluster_is_started(
    service: Service, bundle: Folders, capsys: pytest.CaptureFixture[str]
) -> None:
    assert serve_main([str(bundle("bert")), "--port", str(urlsplit(service.url).port)]) == 2
    assert "is in use on 127.0.0.1. Stop what listens there" in capsys.readouterr().err


def test_without_ray_the_command_to_install_it_is_named(
    bundle: Folders, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert serve_main([str(bundle("bert"))]) == 2
    assert 'Run: pip install "ray[serve,data]==' in capsys.readouterr().err


def test_a_replica_refuses_what_it_was_not_meant_to_load(models: Models, tmp_path: Path) -> None:
    from export.serve.deployments import ReplicaPlan, load_planned

    plan = ReplicaPlan(models.bert.bundle.folder, "0" * 64, None, threads=1, batch_size=1, batch_wait_ms=0)
    with pytest.raises(BundleError, match="holds another bundle"):
        load_planned(plan)
    with pytest.raises(BundleError, match="Every machine of the cluster needs the bundle at the same path"):
        load_planned(replace(plan, folder=tmp_path / "nowhere"))


def test_flags_for_replicas_without_ray_serve_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert demo_main(["--replicas", "2"]) == 2
    assert "needs --engine ray" in capsys.readouterr().err


def assert_refused_without_token(port: int) -> None:
    """Ask a replica past the front, as a stranger on the network would."""
    import grpc

    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel, pytest.raises(grpc.RpcError) as refused:
        channel.unary_unary("/ray.serve.ASGIService/HandleRequest")(b"", timeout=WAIT_SECONDS)
    assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED


def test_the_page_in_front_of_two_replicas_gives_pefts_answers_and_leaves_no_process(
    models: Models, adapter: Folders, tmp_path: Path
) -> None:
    """A cluster of its own, which ends with the page."""
    flags = ["--engine", "ray", "--replicas", "2", "--apis", "2", "--threads", "1", "--adapter", str(adapter("bert"))]
    with serve([*flags, "--bundle", str(models.bert.bundle.folder)], tmp_path / "cache", ON_CPU) as server:
        page = server.wait_for_url()
        url = server.wait_for(r"POST (http://\S+) needs no page")[1]
        with connect(page) as client:
            compared = client.predict(*PAIRS[2], api_name="/compare")
            shown = json.dumps(client.config["components"])
        for side in ("pytorch", "onnx"):
            said = np.array(list(compared[side]["probabilities"].values()))
            assert np.allclose(said, models.bert.golden[2], atol=1e-5)
        assert (compared["onnx"]["replicas"], compared["onnx"]["batch_size"]) == (2, 1)
        assert compared["speedup"] > 0
        assert "2 running" in shown
        assert "in Ray Serve" in shown
        plain = ask(url, {"pairs": PAIRS, "task": "bert"})
        assert models.bert.is_said_by(plain.body, range(len(PAIRS)))

        processes = psutil.Process(server.pid).children(recursive=True)
        assert sum("ray::ServeReplica:promptfold:" in process.cmdline()[0] for process in processes) == 4
        elsewhere = [
            (process.cmdline()[0].partition(":promptfold:")[0], connection.laddr.port)
            for process in processes
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN and not connection.laddr.ip.endswith("127.0.0.1")
        ]
        # Serve 2.60 lets each replica listen on every address, for replicas elsewhere; who has no token is refused.
        assert {name for name, _ in elsewhere} == {"ray::ServeReplica"}
        for _, port in elsewhere:
            assert_refused_without_token(port)
        folders = set(re.findall(r"/\S*pf-ray-[^/\s]+", " ".join(" ".join(process.cmdline()) for process in processes)))
        assert len(folders) == 1
        assert server.stop(signal.SIGTERM) == 0
        assert "Traceback" not in server.output
        for process in processes:
            wait_until_gone(process.pid)
        assert not [folder for folder in folders if Path(folder).exists()]
