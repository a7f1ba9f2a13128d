"""The page without a browser: engines, comparison, cache, command line, endpoint."""

import html
import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from scipy.special import softmax

from demo.__main__ import DEFAULT_PORT, find_port, main
from demo.app import model_facts, quality
from demo.backends import WARM_UP_RUNS, Arrays, Backend, BurstPlan, Engine, make_onnx_backend, make_pytorch_backend
from demo.compare import MAX_CHARACTERS, MAX_RUNS, MIN_RUNS, Comparer
from demo.shipped import SHIPPED, Choice, choose_adapter
from export.__main__ import main as export_main
from export.bundle import load_bundle
from export.runtime import Execution, bundle_tokenizer
from tests.conftest import POSITIONS, VIRTUAL_TOKENS, WORDS, Data, flip_bit, make_pairs, peft_logits, write_jsonl
from tests.server import exists, serve, wait_until_gone
from train.__main__ import main as train_main
from train.adapter import load_adapter
from train.errors import AdapterError, EngineError, TextError, UsageError
from train.tasks import Scores

Folders = Callable[[str], Path]

PAIR = ("word1 word2 word3 word4", "word4 word3 word2 word1 word9")

MOODS = ("bad", "good", "so-so")


@contextmanager
def both_engines(adapter_folder: Path, bundle_folder: Path) -> Iterator[Comparer]:
    """Both real engines, each in its process."""
    pytorch = Engine("PyTorch", make_pytorch_backend, adapter_folder, threads=1)
    onnx = Engine("ONNX Runtime", make_onnx_backend, bundle_folder, threads=1)
    loaded = load_bundle(bundle_folder)
    try:
        yield Comparer(bundle_tokenizer(loaded), loaded.find_task().task, pytorch=pytorch, onnx=onnx)
    finally:
        pytorch.close()
        onnx.close()


@pytest.fixture(scope="module")
def comparer(adapter: Folders, bundle: Folders) -> Iterator[Comparer]:
    """On the tiny BERT."""
    with both_engines(adapter("bert"), bundle("bert")) as comparer:
        yield comparer


def make_mood_adapter(folder: Path, base_folder: Path) -> Path:
    """An adapter for single sentences with three labels, by P-Tuning v2."""
    generator = random.Random(3)  # noqa: S311 -- test data
    rows: list[dict[str, object]] = [
        {"remark": " ".join(generator.sample(WORDS[index % 3 :: 3], 5)), "mood": MOODS[index % 3]}
        for index in range(48)
    ]
    data = Data(write_jsonl(folder / "train.jsonl", rows[:30]), write_jsonl(folder / "validation.jsonl", rows[30:]))
    flags = shlex.split(
        f"--model {base_folder} --method p-tuning-v2 --text-columns remark --label-column mood --epochs 2 "
        f"--virtual-tokens {VIRTUAL_TOKENS} --learning-rate 1e-2 --out {folder / 'moods'}"
    )
    assert train_main(flags + data.flags) == 0
    return folder / "moods"


@pytest.fixture(scope="module")
def mood_adapter(tmp_path_factory: pytest.TempPathFactory, base_model: Folders) -> Folders:
    """A function from a family to an adapter for single sentences with three labels."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = make_mood_adapter(tmp_path_factory.mktemp("moods"), base_model(family))
        return made[family]

    return get


def golden_probabilities(
    pair: tuple[str, str], adapter_folder: Path, base_folder: Path, *, tokenizer: Path | None = None
) -> np.ndarray:
    """Of both classes, by transformers, PEFT and SciPy alone."""
    from transformers import AutoTokenizer

    batch = AutoTokenizer.from_pretrained(tokenizer or base_folder)(*pair, return_tensors="np")
    return softmax(peft_logits(adapter_folder, base_folder, dict(batch))[0])


def golden_moods(sentence: str, adapter_folder: Path, base_folder: Path) -> np.ndarray:
    """Of the three classes of a single sentence, by transformers, PEFT and SciPy alone."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(base_folder, num_labels=3)
    # One sentence alone has no padding, so a decoder's last token is the last one, even if it is </s>.
    model.config.pad_token_id = None
    model = PeftModel.from_pretrained(model, adapter_folder).eval()
    batch = AutoTokenizer.from_pretrained(adapter_folder)(sentence, return_tensors="pt")
    with torch.inference_mode():
        return softmax(model(**batch).logits.numpy()[0])


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


def test_both_engines_give_pefts_probabilities(comparer: Comparer, adapter: Folders, base_model: Folders) -> None:
    comparison = comparer.compare(*PAIR)
    expected = golden_probabilities(PAIR, adapter("bert"), base_model("bert"))
    labels = ("not_equivalent", "equivalent")
    for answer in (comparison.pytorch, comparison.onnx):
        assert tuple(answer.probabilities) == labels
        assert list(answer.probabilities.values()) == pytest.approx(expected, abs=1e-5)
        assert answer.label == labels[int(expected.argmax())]
        assert 0 < answer.latency.median_ms <= answer.latency.p95_ms
    difference = np.abs(np.subtract(comparison.pytorch.logits, comparison.onnx.logits)).max()
    assert comparison.max_logit_difference == pytest.approx(difference)
    assert comparison.max_logit_difference < 1e-4
    assert comparison.speedup == pytest.approx(comparison.pytorch.latency.median_ms / comparison.onnx.latency.median_ms)
    assert MIN_RUNS <= comparison.runs <= MAX_RUNS
    assert not comparison.cut


def test_a_text_over_the_limit_is_cut_and_the_caller_told(comparer: Comparer) -> None:
    comparison = comparer.compare(" ".join(["word1"] * 100), "word2")
    assert comparison.cut
    assert comparison.tokens == POSITIONS - VIRTUAL_TOKENS
    assert f"cut to the {POSITIONS - VIRTUAL_TOKENS} tokens" in comparison.as_json()["notice"]
    assert "notice" not in comparer.compare(*PAIR).as_json()


@pytest.mark.parametrize(
    ("sentence1", "sentence2", "words"),
    [
        ("", "word1", "Sentence 1 is empty"),
        ("word1", "", "Sentence 2 is empty"),
        ("word1", " \n\t ", "Sentence 2 is empty"),
        ("word1", "x" * 100_000, "Sentence 2 has 100,000 characters; at most 10,000 are read"),
        ("word1 \ud800", "word1", "Sentence 1 holds half a surrogate pair at character 7"),
        (None, "word1", "Sentence 1 is no text"),
    ],
)
def test_a_sentence_that_cannot_be_read_is_named(
    sentence1: str, sentence2: str, words: str, comparer: Comparer
) -> None:
    with pytest.raises(TextError, match=words):
        comparer.compare(sentence1, sentence2)


def test_the_longest_sentence_allowed_is_read(comparer: Comparer) -> None:
    assert comparer.compare("x " * (MAX_CHARACTERS // 2), "word1").cut


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_single_sentence_with_three_labels_is_classified_by_both_engines_as_by_peft(
    family: str, mood_adapter: Folders, base_model: Folders, tmp_path: Path
) -> None:
    """The tiny GPT-2 pads with </s>, with which its texts end, too."""
    folder = mood_adapter(family)
    assert export_main([str(folder), "--out", str(tmp_path / "bundle")]) == 0
    sentence = "word4 word7 word1"
    expected = golden_moods(sentence, folder, base_model(family))
    with both_engines(folder, tmp_path / "bundle") as comparer:
        comparison = comparer.compare(sentence)
        for answer in (comparison.pytorch, comparison.onnx):
            assert tuple(answer.probabilities) == MOODS
            assert list(answer.probabilities.values()) == pytest.approx(expected, abs=1e-5)
            assert answer.label == MOODS[int(expected.argmax())]
        with pytest.raises(TextError, match="reads one sentence"):
            comparer.compare(sentence, "word2")
        with pytest.raises(TextError, match="The sentence is empty"):
            comparer.compare(" ")


@pytest.mark.parametrize("kind", ["bert-v2", "llama", "opt-v2"])
def test_both_engines_agree_with_peft_whatever_the_kind_of_model(
    kind: str, adapter: Folders, bundle: Folders, base_model: Folders
) -> None:
    folder = adapter(kind)
    expected = golden_probabilities(PAIR, folder, base_model(kind.removesuffix("-v2")), tokenizer=folder)
    with both_engines(folder, bundle(kind)) as comparer:
        comparison = comparer.compare(*PAIR)
    for answer in (comparison.pytorch, comparison.onnx):
        assert list(answer.probabilities.values()) == pytest.approx(expected, abs=1e-5)


def test_the_engines_run_in_two_processes_of_their_own(adapter: Folders, bundle: Folders) -> None:
    engines = [
        Engine("PyTorch", make_pytorch_backend, adapter("bert"), threads=1),
        Engine("ONNX Runtime", make_onnx_backend, bundle("bert"), threads=1),
    ]
    try:
        executions = [engine.wait_until_ready() for engine in engines]
        assert len({os.getpid(), *(engine.pid for engine in engines)}) == 3
        assert [execution.engine.rpartition(" ")[0] for execution in executions] == ["PyTorch", "ONNX Runtime"]
        assert [execution.threads for execution in executions] == [1, 1]
        # The process that is to serve fast does not carry the other engine around.
        maps = Path(f"/proc/{engines[1].pid}/maps").read_text()
        assert "libonnxruntime" in maps or "onnxruntime_pybind11_state" in maps
        assert "libtorch" not in maps
    finally:
        for engine in engines:
            engine.close()
    assert not [engine.pid for engine in engines if engine.pid is not None and exists(engine.pid)]


def test_a_killed_engine_is_started_again(bundle: Folders) -> None:
    arrays = bundle_tokenizer(load_bundle(bundle("bert")))([PAIR]).arrays
    engine = Engine("ONNX Runtime", make_onnx_backend, bundle("bert"), threads=1)
    try:
        before = engine.logits(arrays)
        first_pid = engine.pid
        assert first_pid is not None
        os.kill(first_pid, signal.SIGKILL)
        wait_until_gone(first_pid)
        assert np.array_equal(engine.logits(arrays), before)
        assert engine.pid != first_pid
    finally:
        engine.close()


class DyingBackend:
    """Dies at its first request and answers from the second process on."""

    execution = Execution("none", "none", on_cuda=False, threads=1, precision="fp32", note="")

    def __init__(self, folder: Path) -> None:
        self._died = folder / "died"

    def logits(self, arrays: object) -> np.ndarray:
        if not self._died.exists():
            self._died.touch()
            os._exit(3)
        return np.ones((1, 2), dtype=np.float32)


def make_dying_backend(folder: Path, threads: int) -> Backend:
    return DyingBackend(folder)


def test_an_engine_that_dies_during_a_request_fails_that_one_and_serves_the_next(tmp_path: Path) -> None:
    engine = Engine("mortal", make_dying_backend, tmp_path, threads=1)
    try:
        with pytest.raises(EngineError, match=r"The mortal engine's process ended unexpectedly \(exit code 3\)"):
            engine.logits({})
        assert engine.logits({}).tolist() == [[1.0, 1.0]]
    finally:
        engine.close()


class RecordingBackend:
    """Answers after a given time and counts its runs in what it answers."""

    execution = Execution("none", "none", on_cuda=False, threads=1, precision="fp32", note="")
    runs = 0

    def logits(self, arrays: Arrays) -> np.ndarray:
        self.runs += 1
        time.sleep(float(arrays["seconds"]))
        return np.array([[self.runs]], dtype=np.float32)


def make_recording_backend(folder: Path, threads: int) -> Backend:
    return RecordingBackend()


def test_a_burst_is_warmed_up_bounded_and_measured_run_by_run(tmp_path: Path) -> None:
    engine = Engine("recording", make_recording_backend, tmp_path, threads=1)
    quick, slow = {"seconds": np.array(0.0)}, {"seconds": np.array(0.05)}
    try:
        assert len(engine.burst(quick, BurstPlan(min_runs=2, max_runs=9, budget_seconds=60))) == 9
        assert engine.logits(quick)[0, 0] == WARM_UP_RUNS + 9 + 1
        latencies_ms = engine.burst(slow, BurstPlan(min_runs=2, max_runs=9, budget_seconds=0))
        assert len(latencies_ms) == 2
        assert min(latencies_ms) >= 50  # it slept that long; milliseconds, not seconds
    finally:
        engine.close()


class HangingBackend:
    """Loads, and answers no request in time."""

    execution = Execution("none", "none", on_cuda=False, threads=1, precision="fp32", note="")

    def logits(self, arrays: object) -> np.ndarray:
        time.sleep(600)
        return np.zeros((1, 2))


def make_hanging_backend(folder: Path, threads: int) -> Backend:
    return HangingBackend()


def test_an_engine_that_hangs_is_stopped_within_its_time_limit(tmp_path: Path) -> None:
    engine = Engine("slow", make_hanging_backend, tmp_path, threads=1, request_timeout_seconds=0.2)
    try:
        engine.wait_until_ready()
        pid = engine.pid
        assert pid is not None
        with pytest.raises(EngineError, match="did not answer within"):
            engine.logits({})
        assert not exists(pid)
    finally:
        engine.close()


def test_what_an_engine_raises_while_it_loads_reaches_the_page(tmp_path: Path) -> None:
    engine = Engine("PyTorch", make_pytorch_backend, tmp_path / "none", threads=1)
    try:
        with pytest.raises(AdapterError, match="There is no adapter folder"):
            engine.wait_until_ready()
    finally:
        engine.close()


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
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return {
        "tmp": str(tmp_path),
        "adapter": str(adapter("bert")),
        "other_bundle": str(bundle("electra")),
        "taken": str(taken_port),
    }


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
        (["--port", "http"], "invalid int value"),
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


def copy_with_scores(source: Path, target: Path, accuracy: float) -> Path:
    """An adapter with other validation scores, which its hashes do not cover."""
    shutil.copytree(source, target)
    path = target / "training.json"
    training = json.loads(path.read_text())
    training["validation"] = {"accuracy": accuracy, "f1": 0.5}
    training["baselines"] = {
        "always `equivalent`": {"accuracy": 0.7, "f1": 0.8},
        "a coin": {"accuracy": 0.5, "f1": 0.5},
    }
    path.write_text(json.dumps(training))
    return target


@pytest.fixture
def shipped(adapter: Folders, mood_adapter: Folders, tmp_path: Path) -> Path:
    """A folder like ``demo/adapters``: three adapters of one task, one of another, a broken one, and other things."""
    folder = tmp_path / "adapters"
    copy_with_scores(adapter("bert-v2"), folder / "better", 0.775)
    copy_with_scores(adapter("bert"), folder / "plain", 0.711)
    copy_with_scores(adapter("electra"), folder / "worst", 0.6)
    broken = copy_with_scores(adapter("bert"), folder / "broken", 0.99)
    flip_bit(broken / "adapter_model.safetensors", 999)
    shutil.copytree(mood_adapter("bert"), folder / "moods")
    (folder / "no adapter").mkdir()
    (folder / "README.md").write_text("adapters")
    return folder


def names(adapters: tuple[Any, ...]) -> list[str]:
    return [adapter.folder.name for adapter in adapters]


def test_without_a_flag_the_best_adapter_that_ships_is_shown(
    shipped: Path, adapter: Folders, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    choice = choose_adapter(None, shipped=shipped)
    assert choice.adapter.folder.name == "better"
    assert names(choice.rivals) == ["plain", "worst"]  # of the same task, best first
    printed = capsys.readouterr().out
    assert re.fullmatch(r"left out: .*broken/adapter_model\.safetensors is damaged.*\n", printed)

    copy_with_scores(adapter("bert"), shipped / "as good as better", 0.775)
    assert choose_adapter(None, shipped=shipped).adapter.folder.name == "as good as better"


def test_an_adapter_that_was_named_is_shown_or_refused_but_never_replaced(shipped: Path, adapter: Folders) -> None:
    choice = choose_adapter(shipped / "plain", shipped=shipped)
    assert choice.adapter.folder.name == "plain"
    assert names(choice.rivals) == ["better", "worst"]
    with pytest.raises(AdapterError, match="is damaged"):
        choose_adapter(shipped / "broken", shipped=shipped)
    with pytest.raises(AdapterError, match="is no adapter"):
        choose_adapter(shipped / "no adapter", shipped=shipped)
    # On which rows a visitor's own was scored is not known.
    assert choose_adapter(adapter("bert"), shipped=shipped).rivals == ()


def test_where_no_adapter_ships_the_user_is_told_to_name_one(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"holds no adapter that can be loaded\. Name one with --adapter"):
        choose_adapter(None, shipped=tmp_path)


def test_the_adapters_that_ship_can_all_be_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    choice = choose_adapter(None)
    assert sorted([choice.adapter.folder.name, *names(choice.rivals)]) == ["minilm-mrpc", "minilm-mrpc-v2"]
    assert capsys.readouterr().out == ""
    scores = {
        path.name: json.loads((path / "training.json").read_text())["validation"]["accuracy"]
        for path in SHIPPED.iterdir()
    }
    assert scores[choice.adapter.folder.name] == max(scores.values())


def readable(markup: str) -> str:
    """HTML as a visitor reads it."""
    return html.unescape(re.sub(r"<[^>]*>", "", markup))


def test_the_page_says_how_good_the_adapter_is_beside_the_baselines_and_the_others(shipped: Path) -> None:
    best = readable(quality(choose_adapter(None, shipped=shipped)))
    assert "On 40 validation rows: accuracy 77.5, F1 50.0." in best
    assert "(always equivalent) has accuracy 70.0, F1 80.0: the model's accuracy is 7.5 points above it." in best
    assert "P-Tuning v2: accuracy 77.5, against 71.1 of P-Tuning (plain), which ships too: 6.4 points more." in best
    worst = readable(quality(choose_adapter(shipped / "worst", shipped=shipped)))
    assert "the model's accuracy is 10.0 points BELOW it." in worst
    assert "P-Tuning: accuracy 60.0, against 77.5 of P-Tuning v2 (better), which ships too: 17.5 points less." in worst
    equal = replace(load_adapter(shipped / "plain"), scores=Scores({"accuracy": 0.7, "f1": 0.1}))
    assert "the model's accuracy is no better." in readable(quality(Choice(equal, ())))


def test_the_page_names_the_method_the_task_and_at_most_ten_labels(bundle: Folders) -> None:
    loaded = load_bundle(bundle("bert-v2"))
    task = loaded.find_task().task
    facts = readable(model_facts(loaded, task))
    for words in ("P-Tuning v2", "mrpc, pairs of sentences", "not_equivalent, equivalent"):
        assert words in facts
    many = replace(task, labels=tuple(f"<{number}>" for number in range(30)))
    assert "<8>, <9> and 20 more" in readable(model_facts(loaded, many))


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
            assert list(endpoints) == ["/compare"]
            result = client.predict(*PAIR, api_name="/compare")
            assert set(result) == {"pytorch", "onnx", "max_logit_difference", "speedup", "runs"}
            expected = golden_probabilities(PAIR, adapter("bert"), base_model("bert"))
            for engine in ("pytorch", "onnx"):
                assert set(result[engine]) == {"label", "probabilities", "latency_ms"}
                assert set(result[engine]["latency_ms"]) == {"median", "p95"}
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
        assert boxes == {"Sentence": True, "": False}
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
            assert client.predict(*PAIR, api_name="/compare")["runs"] >= MIN_RUNS
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
