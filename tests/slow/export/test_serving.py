"""A bundle in a real Ray Serve cluster under load, while replicas die, come, go and change their bundle; and the page.

One cluster for the module; the tests run in their order, as what one deploys the next one asks.
"""

import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest

from export.bundle.folder import Bundle
from export.serve.config import ServingConfig
from export.serve.requests import MAX_TEXTS
from export.serve.service import Service
from tests.conftest import Folders
from tests.demo.server import connect, serve, wait_until_gone
from tests.export.test_serving import PAIRS, WAIT_SECONDS, Models, ask, load, models_fixture, wait_until  # noqa: F401
from train.common.errors import EngineError

# Ray does not wait for the processes of a start that failed and was tried again.
pytestmark = pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")
CONFIG = ServingConfig(replicas=2, batch_size=8, batch_wait_ms=20)


@pytest.fixture(scope="module")
def service(models: Models) -> Iterator[Service]:
    with closing(Service(CONFIG)) as made:
        made.deploy(models.bert.bundle)
        yield made


def deployed() -> dict[str, Any]:
    """What Serve says of the replicas and the processes in which they are."""
    from ray.serve.context import _get_global_client

    client: Any = _get_global_client()
    return dict(client.get_serve_details()["applications"]["promptfold"]["deployments"]["Classifier"])


def replica_pids() -> set[int]:
    return {replica["pid"] for replica in deployed()["replicas"] if replica["state"] == "RUNNING"}


def test_requests_share_batches_and_each_gets_its_own_answer(service: Service, models: Models) -> None:
    asked = [(row, model) for _ in range(2) for row in range(len(PAIRS)) for model in (models.bert, models.three)]
    bodies = [{"pair": PAIRS[row], "task": model.task} for row, model in asked]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(partial(ask, service.url), bodies))
    assert all(model.gave(answer, [row]) for (row, model), answer in zip(asked, answers, strict=True))
    assert 1 < max(answer.json()["batch_size"] for answer in answers) <= CONFIG.batch_size
    assert len({answer.json()["replica"] for answer in answers}) == 2


def test_a_full_queue_sends_requests_away_and_replicas_come_and_go(service: Service, models: Models) -> None:
    small = replace(CONFIG, replicas=1, max_replicas=2, batch_size=1, queue_size=8)
    service.config = replace(small, upscale_seconds=0.5, downscale_seconds=1.0)
    service.deploy(models.bert.bundle)
    rows = [number % len(PAIRS) for number in range(MAX_TEXTS)]
    request = {"pairs": [PAIRS[row] for row in rows], "task": "bert"}
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(partial(ask, service.url), [request] * 48))
    refused = [answer for answer in answers if answer.status_code == 429]
    assert 0 < len(refused) < len(answers)
    assert all(models.bert.gave(answer, rows) for answer in answers if answer not in refused)
    assert all("queue is full" in answer.json()["error"] for answer in refused)
    assert {answer.headers["retry-after"] for answer in refused} == {"1"}
    for askers, replicas in ((8, 2), (1, 1)):
        with load(service.url, askers=askers) as seen:
            wait_until(partial(lambda wanted: service.replicas() == wanted, replicas))
            seen.wait_for(5)
        seen.check(models.bert)


def test_a_replica_that_is_killed_loses_no_request_nor_serves_another_bundle(service: Service, models: Models) -> None:
    """One of two replicas is killed while another bundle is in the folder; the next one waits for the right bundle."""
    service.config = CONFIG
    service.deploy(models.other.bundle)
    folder, before = models.other.bundle.folder, replica_pids()
    kept = folder.with_name("kept")
    assert len(before) == 2
    folder.rename(kept)
    shutil.copytree(models.bert.bundle.folder, folder)
    with load(service.url) as seen:
        seen.wait_for(20)
        os.kill(min(before), signal.SIGKILL)
        wait_until(lambda: f"{folder} holds another bundle" in deployed()["message"])
        seen.wait_for(20)
        shutil.rmtree(folder)
        kept.rename(folder)
        wait_until(lambda: len(replica_pids()) == 2 and len(replica_pids() - before) == 1)
        seen.wait_for(20)
    seen.check(models.other)


def test_a_bundle_that_is_not_on_the_replicas_machine_is_refused_in_words(
    service: Service, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on another machine: here the driver alone takes the folder for there."""
    monkeypatch.setattr(Bundle, "manifest_sha256", "0" * 64)
    service.config = replace(CONFIG, replicas=1)
    with pytest.raises(EngineError, match=r"replicas cannot start: .*nowhere is not on this machine\. Every machine"):
        service.deploy(replace(models.bert.bundle, folder=tmp_path / "nowhere"))


def test_the_page_in_front_of_replicas_gives_pefts_answers(models: Models, adapter: Folders, tmp_path: Path) -> None:
    """A cluster of its own, which ends with the page."""
    flags = ["--engine", "ray", "--replicas", "2", "--apis", "2", "--threads", "1", "--adapter", str(adapter("bert"))]
    with serve(
        [*flags, "--bundle", str(models.bert.bundle.folder)], tmp_path / "cache", {"CUDA_VISIBLE_DEVICES": ""}
    ) as server:
        page, url = server.wait_for_url(), server.wait_for(r"POST (http://\S+) needs no page")[1]
        with connect(page) as client:
            compared = client.predict(*PAIRS[2], api_name="/compare")
            shown = json.dumps(client.config["components"])
        said = [list(compared[side]["probabilities"].values()) for side in ("pytorch", "onnx")]
        assert np.allclose(said, models.bert.golden[2], atol=1e-5)
        assert (compared["onnx"]["replicas"], compared["onnx"]["batch_size"], compared["speedup"] > 0) == (2, 1, True)
        assert all(words in shown for words in ("2 running", "in Ray Serve"))
        assert models.bert.gave(ask(url, {"pairs": PAIRS, "task": "bert"}), range(len(PAIRS)))

        names = {child: child.cmdline() for child in psutil.Process(server.pid).children(recursive=True)}
        assert sum("ray::ServeReplica:promptfold:" in name[0] for name in names.values()) == 4
        elsewhere = [
            (name[0].partition(":promptfold:")[0], connection.laddr.port)
            for process, name in names.items()
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN and not connection.laddr.ip.endswith("127.0.0.1")
        ]
        # Serve 2.60 lets each replica listen on every address, for replicas elsewhere; who has no token is refused.
        assert {name for name, _ in elsewhere} == {"ray::ServeReplica"}
        for _, port in elsewhere:
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel, pytest.raises(grpc.RpcError) as refused:
                channel.unary_unary("/ray.serve.ASGIService/HandleRequest")(b"", timeout=WAIT_SECONDS)
            assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
        (folder,) = set(re.findall(r"/\S*pf-ray-[^/\s]+", " ".join(" ".join(name) for name in names.values())))
        assert server.stop(signal.SIGTERM) == 0
        assert "Traceback" not in server.output
        for process in names:
            wait_until_gone(process.pid)
        assert not Path(folder).exists()
