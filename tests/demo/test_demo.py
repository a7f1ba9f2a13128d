"""The page without a browser: what it says of a model, its command line, its cache."""

import html
import json
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from demo.__main__ import DEFAULT_PORT, find_port, main
from demo.engines.adapters import Choice, choose_adapters
from demo.page.app import model_facts, quality_words
from export.__main__ import main as export_main
from export.bundle.folder import load_bundle
from export.runtime.classifier import OnnxClassifier
from tests.conftest import VIRTUAL_TOKENS, Folders
from tests.demo.engines import PAIR, both_engines, make_shipped
from train.adapter.folder import load_adapter
from train.common.errors import UsageError
from train.data.tasks import Scores


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
