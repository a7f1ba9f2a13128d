"""The page without a browser: what it says of a model, cache, command line, endpoint."""

import html
import json
import re
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError

from demo.__main__ import DEFAULT_PORT, find_port, main
from demo.engines.adapters import Choice, choose_adapters
from demo.measure.compare import MIN_RUNS, ROUNDS
from demo.page.app import model_facts, quality_words
from export.__main__ import main as export_main
from export.bundle.folder import load_bundle
from export.runtime.classifier import OnnxClassifier
from tests.conftest import VIRTUAL_TOKENS, flip_bit, make_pairs
from tests.demo.engines import (
    MOODS,
    PAIR,
    both_engines,
    golden_moods,
    golden_probabilities,
    make_mood_adapter,
    make_shipped,
)
from tests.demo.server import exists, serve, wait_until_gone
from train.adapter.folder import load_adapter
from train.common.errors import UsageError
from train.data.tasks import Scores

Folders = Callable[[str], Path]


@pytest.fixture(scope="module")
def mood_adapter(tmp_path_factory: pytest.TempPathFactory, base_model: Folders) -> Folders:
    """A function from a family to an adapter for single sentences with three labels."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = make_mood_adapter(tmp_path_factory.mktemp("moods"), base_model(family))
        return made[family]

    return get


def components(client: Client) -> list[dict[str, Any]]:
    """The properties of every component of a page."""
    return [component["props"] for component in client.config["components"]]


@contextmanager
def connect(url: str) -> Iterator[Client]:
    """A visitor's program."""
    client = Client(url, verbose=False)
    try:
        yield client
    finally:
        client.close()


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.fixture
def places(
    adapter: Folders, bundle: Folders, taken_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, str]:
    """What the braces in a test's flags stand for."""
    values = {
        "tmp": str(tmp_path),
        "adapter": str(adapter("bert")),
        "other_bundle": str(bundle("electra")),
        "taken": str(taken_port),
    }
    # After what makes those: it may fill caches of its own.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return values


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--adapter", "{tmp}/none"], "There is no adapter folder"),
        (["--adapter", "{tmp}"], "is no adapter of promptfold"),
        (["--adapter", "{adapter}", "--bundle", "{tmp}/none"], "There is no bundle folder"),
        (["--adapter", "{adapter}", "--bundle", "{tmp}"], "is no bundle"),
        (["--adapter", "{adapter}", "--bundle", "{other_bundle}"], "was exported from another adapter"),
        (["--adapter", "{adapter}", "--port", "{taken}"], "is in use on 127.0.0.1"),
        (["--port", "70000"], "give a number from 1 to 65535"),
        (["--port", "http"], '--port: unable to convert "http" into int'),
        (["--engine", "gpu"], '"gpu" for --engine. Choose from: "both", "onnx", "ray"'),
        (["--auth", "nobody"], "--auth"),
        (["--auth-file", "{tmp}/none"], "--auth-file"),
        (["--host", "192.0.2.1"], "this machine has no such address"),
        (["--host", "no.such.host.invalid"], "there is no such address"),
        (["--bogus"], "--help"),
    ],
)
def test_a_wrong_argument_ends_with_one_sentence_and_status_2(
    flags: list[str], words: str, places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main([flag.format_map(places) for flag in flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert words in error
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def shipped(adapter: Folders, second: Callable[..., Path], tmp_path: Path) -> Path:
    return make_shipped(tmp_path / "adapters", adapter("bert"), adapter("bert-v2"), second("bert", three=True))


def readable(markup: str) -> str:
    """HTML as a visitor reads it."""
    return html.unescape(re.sub(r"<[^>]*>", "", markup))


def test_the_page_says_how_good_the_adapter_is_beside_the_baselines_and_the_others(shipped: Path) -> None:
    choices = {choice.name: choice for choice in choose_adapters(shipped=shipped)}
    best = readable(quality_words(choices["better"]))
    assert "On 40 validation rows: accuracy 77.5, F1 50.0." in best
    assert "(always equivalent) has accuracy 70.0, F1 80.0: the model's accuracy is 7.5 points above it." in best
    assert "P-Tuning v2: accuracy 77.5, against 71.1 of P-Tuning (plain), which ships too: 6.4 points more." in best
    worst = readable(quality_words(choices["worst"]))
    assert "the model's accuracy is 10.0 points BELOW it." in worst
    assert "P-Tuning: accuracy 60.0, against 77.5 of P-Tuning v2 (better), which ships too: 17.5 points less." in worst
    equal = replace(load_adapter(shipped / "plain"), scores=Scores({"accuracy": 0.7, "f1": 0.1}))
    assert "the model's accuracy is no better." in readable(quality_words(Choice("equal", equal, ())))


def test_the_page_names_the_method_the_task_the_graph_and_at_most_ten_labels(adapter: Folders, bundle: Folders) -> None:
    with both_engines(adapter("bert-v2"), bundle("bert-v2")) as pair:
        opened = pair.opened
    facts = readable(model_facts(opened))
    for words in (
        f"P-Tuning v2, {VIRTUAL_TOKENS} virtual tokens",
        "mrpc, pairs of sentences: not_equivalent, equivalent",
        f"logits at most {opened.bundle_task.max_logit_difference:.1e} from PEFT's",
    ):
        assert words in facts
    many = replace(opened.task, labels=tuple(f"<{number}>" for number in range(30)))
    assert "<8>, <9> and 20 more" in readable(
        model_facts(replace(opened, bundle_task=replace(opened.bundle_task, task=many)))
    )


def test_int8_runs_where_it_is_chosen_and_the_page_says_what_it_costs(
    adapter: Folders, bundle_in: Callable[[str, str], Path]
) -> None:
    folder = bundle_in("bert", "int8")
    with both_engines(adapter("bert"), folder, onnx="int8") as pair:
        (gate,) = pair.opened.graph.gates
        assert f"int8, on 40 labelled rows: {gate}" in readable(model_facts(pair.opened))
        comparison = pair.compare(*PAIR)
        assert pair.opened.onnx.wait_until_ready().execution.precision == "int8"
    assert comparison.as_json()["precision"] == "int8"
    assert comparison.max_logit_difference is not None
    assert 1e-5 < comparison.max_logit_difference < 1  # rounded, and the same model


def test_an_ungated_graph_is_never_taken_unasked_and_never_praised(adapter: Folders, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    missing = copy_without_validation_file(adapter("bert"), tmp_path / "adapter")
    assert export_main([str(missing), "--out", str(out), "--ungated"]) == 0
    loaded = load_bundle(out)
    assert loaded.precisions == ("fp32", "int8")
    assert loaded.graphs[1].gates == ()
    assert OnnxClassifier(loaded, use_cuda=False).execution.precision == "fp32"
    assert OnnxClassifier(loaded, precision="int8", use_cuda=False).execution.precision == "int8"
    with both_engines(missing, out, onnx="int8", has_pytorch=False) as pair:
        assert "what it costs in quality was not measured" in readable(model_facts(pair.opened))


def copy_without_validation_file(source: Path, target: Path) -> Path:
    """An adapter as it comes to another machine, where the rows that it was validated on do not lie."""
    shutil.copytree(source, target)
    path = target / "training.json"
    training = json.loads(path.read_text())
    training["config"]["validation_file"] = "/nowhere/validation.jsonl"
    path.write_text(json.dumps(training))
    return target


def test_without_a_port_the_first_free_one_is_taken() -> None:
    first = find_port("127.0.0.1", None)
    assert first >= DEFAULT_PORT
    with socket.socket() as listener:
        # Connections that an earlier test left lingering there do not count, as they do not for a server.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", first))
        listener.listen()
        assert find_port("127.0.0.1", None) > first
        with pytest.raises(UsageError, match="is in use"):
            find_port("127.0.0.1", first)


def test_a_port_that_is_taken_while_the_engines_load_is_left_for_the_next(
    adapter: Folders, bundle: Folders, tmp_path: Path
) -> None:
    with (
        socket.socket() as listener,
        serve(["--adapter", str(adapter("bert")), "--bundle", str(bundle("bert"))], tmp_path) as server,
    ):
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.wait_for("starting the engines")
        taken = find_port("127.0.0.1", None)  # as the page has just done
        listener.bind(("127.0.0.1", taken))
        listener.listen()
        url = server.wait_for_url()
        assert not url.endswith(f":{taken}/")
        with connect(url) as client:
            assert client.predict(*PAIR, api_name="/compare")["runs"] >= ROUNDS * MIN_RUNS
        assert "Traceback" not in server.output


def test_without_pytorch_nothing_imports_it(adapter: Folders, bundle: Folders, tmp_path: Path) -> None:
    """Neither the page nor its engine: here whoever imports torch or transformers fails."""
    for name in ("torch", "transformers"):
        (tmp_path / "traps" / name).mkdir(parents=True)
        (tmp_path / "traps" / name / "__init__.py").write_text("raise SystemExit('somebody imported it')")
    flags = ["--engine", "onnx", "--adapter", str(adapter("bert")), "--bundle", str(bundle("bert"))]
    with serve(flags, tmp_path / "cache", {"PYTHONPATH": str(tmp_path / "traps")}) as server:
        with connect(server.wait_for_url()) as client:
            answer = client.predict(*PAIR, api_name="/compare")
            learned = client.predict(api_name="/prompt")
        assert "somebody imported it" not in server.output
        assert len(server.children()) == 1
    assert "pytorch" not in answer
    assert answer["onnx"]["label"] in {"equivalent", "not_equivalent"}
    assert learned["nearest_words"]


def test_the_page_exports_once_serves_the_endpoint_and_leaves_no_process(
    adapter: Folders, base_model: Folders, tmp_path: Path
) -> None:
    cache = tmp_path / "a cache"  # a space in the path
    with serve(["--adapter", str(adapter("bert"))], cache) as server:
        url = server.wait_for_url()
        for step in ("[1/5]", "[2/5]", "[3/5]", "[4/5]", "[5/5]"):
            assert step in server.output
        (folder,) = (cache / "promptfold" / "bundles").iterdir()
        exported = (folder / "model.onnx").stat().st_mtime_ns

        with connect(url) as client:
            endpoints = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
            assert list(endpoints) == ["/compare", "/latency", "/score_file", "/prompt", "/prompt_effect"]
            result = client.predict(*PAIR, api_name="/compare")
            assert set(result) - {"notices"} == {
                "adapter",
                "precision",
                "pytorch_mode",
                "pytorch",
                "onnx",
                "max_logit_difference",
                "speedup",
                "speedup_range",
                "runs",
                "tokens",
            }
            expected = golden_probabilities(PAIR, adapter("bert"), base_model("bert"))
            for engine in ("pytorch", "onnx"):
                assert set(result[engine]) == {"label", "probabilities", "latency_ms"}
                assert set(result[engine]["latency_ms"]) == {"median", "p95", "p99"}
                assert list(result[engine]["probabilities"].values()) == pytest.approx(expected, abs=1e-5)
            assert json.loads(json.dumps(result)) == result

            # Several visitors at once: each gets the answer to its own pair.
            pairs = [(str(row["sentence1"]), str(row["sentence2"])) for row in make_pairs(4, seed=6)]
            jobs = [client.submit(*pair, api_name="/compare") for pair in pairs]
            for pair, job in zip(pairs, jobs, strict=True):
                expected = golden_probabilities(pair, adapter("bert"), base_model("bert"))
                answer = job.result(timeout=60)
                assert list(answer["onnx"]["probabilities"].values()) == pytest.approx(expected, abs=1e-5)

            for bad, words in ((("", "x"), "Sentence 1 is empty"), (("x" * 100_000, "y"), "100,000 characters")):
                with pytest.raises(AppError, match=words):
                    client.predict(*bad, api_name="/compare")

        children = server.children()
        assert len(children) == 2
        assert server.stop(signal.SIGTERM) == 0
        assert "Traceback" not in server.output
        assert not [pid for pid in children if exists(pid)]

    with serve(["--adapter", str(adapter("bert"))], cache) as server:
        server.wait_for_url()
        assert "[1/5]" not in server.output
        assert (folder / "model.onnx").stat().st_mtime_ns == exported
        assert server.stop(signal.SIGINT) == 130
        assert "Traceback" not in server.output

    # A cached bundle that was damaged is noticed and made again.
    flip_bit(folder / "model.onnx", 4000)
    with serve(["--adapter", str(adapter("bert"))], cache) as server:
        server.wait_for_url()
        assert "is damaged" in server.output
        assert "[5/5]" in server.output
    assert load_bundle(folder).find_task().max_logit_difference < 1e-4


def test_a_page_for_single_sentences_has_one_box_and_an_endpoint_that_needs_no_second(
    mood_adapter: Folders, base_model: Folders, tmp_path: Path
) -> None:
    folder = mood_adapter("gpt2")
    with serve(["--adapter", str(folder)], tmp_path) as server:
        with connect(server.wait_for_url()) as client:
            shown = components(client)
            result = client.predict("word4 word7 word1", api_name="/compare")
            with pytest.raises(AppError, match="reads one sentence"):
                client.predict("word1", "word2", api_name="/compare")
        boxes = {props["label"]: props["visible"] for props in shown if "lines" in props}
        assert boxes["Sentence"]
        assert not boxes["Second sentence"]
        texts = {
            props["elem_id"]: readable(props["value"])
            for props in shown
            if props.get("elem_id") in {"model", "quality"}
        }
        for words in ("gpt2", "P-Tuning v2", "custom, single sentences", "bad, good, so-so"):
            assert words in texts["model"]
        assert f"On 18 validation rows: {load_adapter(folder).scores}." in texts["quality"]
        assert "Traceback" not in server.output
    expected = golden_moods("word4 word7 word1", folder, base_model("gpt2"))
    for engine in ("pytorch", "onnx"):
        assert tuple(result[engine]["probabilities"]) == MOODS
        assert list(result[engine]["probabilities"].values()) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_first_start_that_is_interrupted_leaves_nothing(how: signal.Signals, tmp_path: Path) -> None:
    with serve([], tmp_path) as server:
        server.wait_for(r"\[2/5\]")
        children = server.children()
        assert len(children) == 1
        assert server.stop(how) == {signal.SIGTERM: 0, signal.SIGINT: 130}[how]
        assert "Traceback" not in server.output
        assert not [pid for pid in children if exists(pid)]
    assert list((tmp_path / "promptfold" / "bundles").iterdir()) == []


def test_killing_the_page_takes_its_engines_with_it(adapter: Folders, bundle: Folders, tmp_path: Path) -> None:
    flags = ["--adapter", str(adapter("bert")), "--bundle", str(bundle("bert"))]
    with serve(flags, tmp_path) as server:
        server.wait_for_url()
        children = server.children()
        assert len(children) == 2
        assert server.stop(signal.SIGKILL) == -signal.SIGKILL
    for pid in children:
        wait_until_gone(pid)
    assert not (tmp_path / "promptfold").exists()  # a bundle was given, so none was exported


def test_a_share_link_that_cannot_be_made_is_explained_and_the_page_goes_on(
    adapter: Folders, bundle: Folders, tmp_path: Path
) -> None:
    """The way out is closed by a proxy that is not there, whatever this machine's network is."""
    proxy = "http://127.0.0.1:1"
    environment = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), proxy)
    environment |= {name.lower(): proxy for name in environment}
    environment |= {"NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost"}
    environment |= {"HF_HOME": str(tmp_path / "hub")}  # where Gradio keeps its tunnel program
    flags = ["--adapter", str(adapter("bert")), "--bundle", str(bundle("bert")), "--share"]
    with serve(flags, tmp_path, environment) as server:
        url = server.wait_for_url()
        server.wait_for(r"no public link: .*The local address works")
        with connect(url) as client:
            assert client.predict(*PAIR, api_name="/compare")["runs"] >= ROUNDS * MIN_RUNS
        assert "Traceback" not in server.output


def test_a_cache_that_cannot_be_written_names_the_way_out(
    adapter: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    cache.write_text("a file where the cache should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    assert main(["--adapter", str(adapter("bert"))]) == 2
    error = capsys.readouterr().err
    assert "cannot be kept in the cache" in error
    assert "--bundle" in error


def test_a_bundle_folder_may_be_given_from_anywhere(adapter: Folders, bundle: Folders, tmp_path: Path) -> None:
    """Spaces and letters beyond ASCII in both paths."""
    moved = tmp_path / "ein Bündel"
    shutil.copytree(bundle("bert"), moved)
    copied = tmp_path / "ein Adapter ä"
    shutil.copytree(adapter("bert"), copied)
    flags = ["--adapter", str(copied), "--bundle", str(moved)]
    with serve(flags, tmp_path / "cache") as server, connect(server.wait_for_url()) as client:
        assert client.predict(*PAIR, api_name="/compare")["max_logit_difference"] < 1e-4
