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

from demo.__main__ import main
from demo.engines.adapters import Choice, choose_adapters
from demo.measure.all_engines import measure_all
from demo.page.app import model_facts, not_for_use, quality_words
from export.__main__ import main as export_main
from export.bundle.folder import Fidelity, load_bundle
from export.runtime.classifier import OnnxClassifier
from tests.conftest import VIRTUAL_TOKENS, Folders, Precisions
from tests.demo.engines import PAIR, both_engines, make_shipped, stage_of
from train.adapter.card import model_card
from train.adapter.folder import load_adapter
from train.data.tasks import Scores, custom_task


@pytest.fixture
def places(
    adapter: Folders, bundle: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[dict[str, str]]:
    values = {"tmp": str(tmp_path), "adapter": str(adapter("bert")), "other_bundle": str(bundle("electra"))}
    # A file where the cache should be; set after what makes those, which may fill caches of its own.
    monkeypatch.setenv("XDG_CACHE_HOME", __file__)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield values | {"taken": str(listener.getsockname()[1])}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--adapter", "{tmp}/none"], "There is no adapter folder"),
        (["--adapter", "{adapter}"], "cannot be kept in the cache"),
        (["--adapter", "{adapter}", "--bundle", "{tmp}/none"], "There is no bundle folder"),
        (["--adapter", "{adapter}", "--bundle", "{other_bundle}"], "was exported from another adapter"),
        (["--adapter", "{adapter}", "--port", "{taken}"], "is in use on 127.0.0.1"),
        (["--port", "70000"], "give a number from 1 to 65535"),
        (["--engine", "gpu"], '"gpu" for --engine. Choose from: "both", "onnx", "ray"'),
        (["--auth", "alice"], "--auth"),
        (["--host", "192.0.2.1"], "this machine has no such address"),
        (["--host", "no.such.host.invalid"], "there is no such address"),
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


def readable(markup: str) -> str:
    return html.unescape(re.sub(r"<[^>]*>", "", markup))


def test_the_page_says_how_good_the_adapter_is(adapter: Folders, second: Callable[..., Path], tmp_path: Path) -> None:
    shipped = tmp_path / "adapters"
    make_shipped(shipped, adapter("bert"), adapter("bert-v2"), second("bert", three=True))
    choices = {choice.name: choice for choice in choose_adapters(shipped=shipped)}
    best = readable(quality_words(choices["better"]))
    assert "On 40 validation rows: accuracy 77.5, F1 50.0 (95 %: accuracy " in best
    assert "(always equivalent) has accuracy 70.0, F1 80.0: the model's accuracy is 7.5 points above it." in best
    assert "P-Tuning v2: accuracy 77.5, against 71.1 of P-Tuning (plain), which ships too: 6.4 points more." in best
    worst = readable(quality_words(choices["worst"]))
    assert "the model's accuracy is 10.0 points BELOW it." in worst
    assert not_for_use(choices["worst"]) == "An answer that needs no learned prompt has a better accuracy; take better."
    assert not_for_use(choices["better"]) == ""
    assert "P-Tuning: accuracy 60.0, against 77.5 of P-Tuning v2 (better), which ships too: 17.5 points less." in worst
    training = json.loads((shipped / "worst" / "training.json").read_text())
    assert "not for use:** always `equivalent`, which needs no learned prompt" in model_card(training)
    equal = replace(load_adapter(shipped / "plain"), scores=Scores({"accuracy": 0.7, "f1": 0.1}))
    assert "the model's accuracy is no better." in readable(quality_words(Choice("equal", equal, ())))


def test_int8_runs_where_chosen_and_the_page_names_its_cost_the_method_and_the_task(
    adapter: Folders, bundle_in: Precisions
) -> None:
    with both_engines(adapter("bert"), bundle_in("bert", "int8"), onnx="int8") as pair:
        opened, comparison = pair.opened, pair.steps(*PAIR)[-1]
        assert opened.onnx.wait_until_ready().execution.precision == "int8"
    assert comparison.as_json()["precision"] == "int8"
    assert comparison.max_logit_difference is not None
    assert 1e-5 < comparison.max_logit_difference < 1  # rounded, and the same model
    facts, (gate,) = readable(model_facts(opened)), opened.graph.gates
    assert f"int8, on 40 labelled rows: {gate}" in facts
    assert f"P-Tuning, {VIRTUAL_TOKENS} virtual tokens" in facts
    assert "mrpc, pairs of sentences: not_equivalent, equivalent" in facts
    assert "on texts without labels it was not measured, as the tokenizer does not know 100 % of the words in" in facts
    found = Fidelity("news", 300, 297, (0.971, 0.997), 0.08, 0.31, 0.98)
    graphs = tuple(replace(graph, gates=(), no_fidelity="", fidelity=(found,)) for graph in opened.bundle.graphs)
    told = readable(model_facts(replace(opened, bundle=replace(opened.bundle, graphs=graphs))))
    assert (
        "int8, against fp32 on texts of news: 297 of 300 labels equal (99.0 %, 97.1 to 99.7), logits differ by" in told
    )
    worse = replace(opened.choice, adapter=replace(opened.choice.adapter, scores=Scores({"accuracy": 0.1, "f1": 0.1})))
    assert (
        readable(model_facts(replace(opened, choice=worse)))
        .strip()
        .startswith("An example of its method, not for use.")
    )
    many = custom_task(("a", "b"), "label", tuple(f"intent{number}" for number in range(150)))
    opened = replace(opened, bundle_task=replace(opened.bundle_task, task=many))
    assert "intent8, intent9 and 140 more" in readable(model_facts(opened))
    in_fp32 = replace(opened, setup=replace(opened.setup, onnx="fp32"))
    difference = f"logits at most {opened.bundle_task.max_logit_difference:.1e} from PEFT's"
    assert difference in readable(model_facts(in_fp32))
    task = replace(opened.bundle_task, task=replace(opened.task, labels=tuple(f"<{number}>" for number in range(30))))
    assert "<8>, <9> and 20 more" in readable(model_facts(replace(opened, bundle_task=task)))


def test_an_ungated_graph_is_never_taken_unasked_and_never_praised(adapter: Folders, tmp_path: Path) -> None:
    # An adapter as it comes to another machine, where the rows that it was validated on do not lie.
    out, missing = tmp_path / "bundle", shutil.copytree(adapter("bert"), tmp_path / "adapter")
    training = json.loads((missing / "training.json").read_text())
    training["config"]["validation_file"] = "/nowhere/validation.jsonl"
    (missing / "training.json").write_text(json.dumps(training))
    assert export_main([str(missing), "--out", str(out), "--ungated"]) == 0
    loaded = load_bundle(out)
    assert (loaded.precisions, loaded.graphs[1].gates) == (("fp32", "int8"), ())
    for asked, taken in ((None, "fp32"), ("int8", "int8")):
        assert OnnxClassifier(loaded, precision=asked, use_cuda=False).execution.precision == taken
    with both_engines(missing, out, onnx="int8", has_pytorch=False) as pair:
        facts = readable(model_facts(pair.opened))
        assert (
            "what it costs in quality was not measured here, as the tokenizer does not know 100 % of the words in"
            in facts
        )


def test_the_page_starts_with_the_fastest_graph_that_passed_and_times_every_engine(
    adapter: Folders, bundle_in: Precisions
) -> None:
    with stage_of(adapter("bert"), bundles=(bundle_in("bert", "int8"),), has_pytorch=False) as stage:
        assert stage.default().onnx == "int8"
        *_, last = measure_all(stage, stage.default().adapter, *PAIR)
    assert [one.name for one in last] == ["ONNX Runtime, fp32", "ONNX Runtime, int8"]
    assert all(one.median_ms > 0 for one in last)
    bundle = load_bundle(bundle_in("bert", "int8"))
    predicted = [OnnxClassifier(bundle, precision=precision, use_cuda=False) for precision in ("fp32", "int8")]
    labels = [classifier.logits(classifier.tokenize([PAIR]).arrays).argmax() for classifier in predicted]
    assert last[1].agrees == (labels[0] == labels[1])
