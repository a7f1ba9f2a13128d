"""A bundle in a real Ray Serve cluster: asked over HTTP, refused, and replaced; and starts that fail.

One cluster for the module; the tests run in their order, as the last one that asks replaces the bundle.
"""

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import DEFAULT, AsyncMock, Mock
from urllib.parse import urlsplit

import numpy as np
import pytest
from scipy.special import softmax

from demo.__main__ import main as demo_main
from export.ray_cluster import RayCluster
from export.runtime.check_text import MAX_CHARACTERS
from export.runtime.tokenizer import bundle_tokenizer
from export.serve.__main__ import main as serve_main
from export.serve.config import ServingConfig
from export.serve.requests import MAX_TEXTS
from export.serve.service import Service, import_serve
from tests.conftest import ROOT
from tests.export.serving import PAIRS, Models, ask, load, models_fixture  # noqa: F401 -- `models`
from train.common.errors import EngineError, RequestError

# Ray does not wait for the processes of a start that failed and was tried again.
pytestmark = pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")

CONFIG = ServingConfig(replicas=1, batch_size=8)


def refusal(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What the command line says when it ends with one sentence; Ray may print more to standard error."""
    assert serve_main(argv) == 2
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    (error,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    return error


def test_a_start_that_always_fails_ends_with_one_sentence_and_leaves_no_folder(
    models: Models, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """This comes first: a process uses one cluster at a time."""
    import_serve(None)
    from ray.exceptions import ActorDiedError, RayTaskError

    monkeypatch.setattr("export.ray_cluster.START_PAUSE_SECONDS", 0)

    def try_to_start(function: str, error: Exception) -> tuple[str, Mock]:
        monkeypatch.setattr(function, start := Mock(side_effect=error))
        return refusal([str(models.bert.bundle.folder)], capsys), start

    error, start = try_to_start("ray.init", Exception("The current node timed out during startup."))
    assert "Ray cannot be started on this machine (The current node timed out during startup)." in error
    assert start.call_count == 3
    assert not Path(start.call_args.kwargs["_temp_dir"]).exists()

    cluster = nullcontext(RayCluster("127.0.0.1:1", (2,)))
    monkeypatch.setattr("export.serve.service.ray_cluster", lambda *_, **__: cluster)
    error, start = try_to_start("ray.serve.start", ActorDiedError())
    assert "Ray Serve cannot be started (The actor died unexpectedly before finishing this task). Try again" in error
    assert start.call_count == 3
    # What Serve's own code raised, such as that a port is taken, another attempt does not change.
    failure = RayTaskError("ready", "Traceback:\nRuntimeError: Failed to bind.", None)
    error, start = try_to_start("ray.serve.start", failure)
    assert "Ray Serve cannot be started (Failed to bind). Try again" in error
    assert start.call_count == 1


@pytest.fixture(scope="module")
def service(models: Models) -> Iterator[Service]:
    """Started at the second attempt: on a machine that is too busy for Serve's deadlines its first one fails."""
    import_serve(None)
    from ray import serve
    from ray.exceptions import ActorDiedError

    start = Mock(wraps=serve.start, side_effect=[ActorDiedError(), DEFAULT])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serve, "start", start)
        made = Service(CONFIG)
    with closing(made):
        assert start.call_count == 2
        made.deploy(models.bert.bundle)
        yield made


def test_one_pair_many_and_either_task_are_answered_as_by_peft(service: Service, models: Models) -> None:
    for model in (models.bert, models.three):
        one = ask(service.url, {"pair": PAIRS[3], "task": model.task})
        assert model.gave(one, [3])
        assert one.json()["batch_size"] == 1
        many = ask(service.url, {"pairs": PAIRS, "task": model.task})
        assert model.gave(many, range(len(PAIRS)))
        # In their own order, though in batches by length, none larger than was allowed.
        assert many.json()["batch_size"] == CONFIG.batch_size
    health = ask(service.url, b"", path="/v1/health", method="GET")
    expected = {"status": "ok", "tasks": ["bert", "three"], "bundle_sha256": models.bert.sha256}
    assert (health.status_code, health.json()) == (200, health.json() | expected)
    assert service.replicas() == 1


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
        ({"texts": ["word1", ""], "task": "bert"}, 422, "Text 2: The sentence is empty"),
    ],
)
def test_a_request_that_cannot_be_answered_gets_one_sentence(
    body: object, status: int, words: str, service: Service
) -> None:
    answer = ask(service.url, body)
    assert (answer.status_code, list(answer.json())) == (status, ["error"])
    assert words in answer.json()["error"]
    assert "Traceback" not in answer.text


def test_other_paths_and_methods_are_refused_in_words(service: Service) -> None:
    other, wrong = ask(service.url, b"{}", path="/v1/other"), ask(service.url, b"", method="GET")
    known = {"error": "There is nothing at this path. Known are /v1/classify, /v1/health."}
    assert (other.status_code, other.json()) == (404, known)
    assert (wrong.status_code, wrong.json()) == (405, {"error": "/v1/classify takes POST alone."})


def test_token_ids_are_answered_for_their_own_bundle_alone(service: Service, models: Models) -> None:
    arrays = bundle_tokenizer(models.three.bundle)(PAIRS).arrays
    response = service.logits(arrays, task="three", bundle_sha256=models.three.sha256)
    assert np.allclose(softmax(response.logits, axis=1), models.three.golden, atol=1e-5)
    # A caller that sends a batch measures it: it goes through the graph as it came.
    assert response.batch_size == len(PAIRS) > CONFIG.batch_size
    with pytest.raises(EngineError, match="serves another bundle"):
        service.logits(arrays, task="bert", bundle_sha256=models.other.sha256)
    strange = arrays | {"input_ids": arrays["input_ids"] + 1000}
    with pytest.raises(EngineError, match="outside the vocabulary"):
        service.logits(strange, task="bert", bundle_sha256=models.bert.sha256)


def test_the_command_line_replaces_a_bundle_under_load_and_every_answer_is_of_the_bundle_it_names(
    service: Service, models: Models
) -> None:
    command = [sys.executable, "-m", "export.serve", str(models.other.bundle.folder), "--address", service.address]
    with load(service.url, askers=2) as seen:
        seen.wait_for(20)
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        seen.wait_for(20)
    assert result.returncode == 0, result.stderr
    assert "1 replicas are running: ONNX Runtime" in result.stdout
    assert f"POST {service.url} " in result.stdout
    seen.check(models.bert, models.other)
    # What was deployed stays when the command has ended.
    assert models.other.gave(ask(service.url, {"pairs": PAIRS}), range(len(PAIRS)))


def test_more_replicas_than_the_cluster_has_cpus_for_are_refused_at_once(
    service: Service, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "config", replace(CONFIG, replicas=3, threads=999))
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
        ("--port {taken}", "is in use on 127.0.0.1. Stop what listens there"),
        ("--precision int8", "holds no int8 graph"),
        ("--remove", "--remove ends what is served in a cluster"),
    ],
)
def test_a_wrong_flag_ends_with_one_sentence_and_status_2(
    flags: str, words: str, service: Service, models: Models, capsys: pytest.CaptureFixture[str]
) -> None:
    given = flags.format(taken=urlsplit(service.url).port).split()
    assert words in refusal([str(models.bert.bundle.folder), *given], capsys)


def test_without_ray_the_command_to_install_it_is_named(
    models: Models, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert 'Run: pip install "ray[serve,data]==' in refusal([str(models.bert.bundle.folder)], capsys)


def test_a_call_is_made_again_where_its_replica_died(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.exceptions import ActorDiedError
    from ray.serve.exceptions import BackPressureError

    from export.serve.deployments import call_replica

    def call(*outcomes: object) -> object:
        """What a caller gets from a method that raises or returns these, call by call."""
        return asyncio.run(call_replica(SimpleNamespace(remote=AsyncMock(side_effect=outcomes))))

    assert call(ActorDiedError(), ActorDiedError(), "answer") == "answer"
    with pytest.raises(RequestError, match="queue is full"):
        call(BackPressureError(num_queued_requests=1, max_queued_requests=1))
    with pytest.raises(RequestError, match="No replica answered in time"):
        call(ActorDiedError(), TimeoutError())
    monkeypatch.setattr("export.serve.deployments.CALL_SECONDS", 0.1)
    with pytest.raises(RequestError, match="No replica answered in time"):
        call(ActorDiedError(), "too late")


def test_flags_for_replicas_without_ray_serve_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert demo_main(["--replicas", "2"]) == 2
    assert "needs --engine ray" in capsys.readouterr().err
