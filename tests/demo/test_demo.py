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
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from scipy.special import softmax

from demo.__main__ import DEFAULT_PORT, find_port, main
from demo.engines.adapters import SHIPPED, Choice, choose_adapters
from demo.engines.engine_process import Engine, make_onnx_backend
from demo.engines.pytorch import BF16, COMPILED, EAGER, make_pytorch_backend
from demo.engines.stage import Opened, Setup, Stage
from demo.engines.timing import WARM_UP_RUNS, Arrays, Backend, BurstPlan
from demo.measure.compare import MAX_RUNS, MIN_RUNS, ROUNDS, Comparison, Latency, compare
from demo.page.app import model_facts, quality_words
from export.__main__ import main as export_main
from export.bundle.folder import load_bundle
from export.runtime.check_text import MAX_CHARACTERS
from export.runtime.classifier import Execution, OnnxClassifier
from export.runtime.tokenizer import bundle_tokenizer
from tests.conftest import POSITIONS, VIRTUAL_TOKENS, WORDS, Data, flip_bit, make_pairs, peft_logits, write_jsonl
from tests.demo.server import exists, serve, wait_until_gone
from train.__main__ import main as train_main
from train.adapter.folder import load_adapter
from train.common.errors import AdapterError, EngineError, PromptfoldError, TextError, UsageError
from train.data.tasks import Scores

Folders = Callable[[str], Path]

PAIR = ("word1 word2 word3 word4", "word4 word3 word2 word1 word9")

MOODS = ("bad", "good", "so-so")


@dataclass(frozen=True)
class Pair:
    """Both real engines, each in its process, and all that the page does with them."""

    stage: Stage
    opened: Opened

    def steps(self, *sentences: Any, stopped: Callable[[], bool] = lambda: False) -> list[Comparison]:
        """Everything that a visitor is shown, in order."""
        return list(compare(self.stage, self.opened, *sentences, stopped=stopped))

    def compare(self, *sentences: Any) -> Comparison:
        """What stands there in the end."""
        return self.steps(*sentences)[-1]


@contextmanager
def both_engines(
    adapter_folder: Path, bundle_folder: Path, *, onnx: str = "fp32", pytorch: str = EAGER, has_pytorch: bool = True
) -> Iterator[Pair]:
    """A stage with one adapter, opened."""
    choices = choose_adapters([adapter_folder])
    stage = Stage(choices, bundles=[bundle_folder], threads=1, has_pytorch=has_pytorch)
    try:
        yield Pair(stage, stage.open(stage.setup(choices[0].name, onnx, pytorch)))
    finally:
        stage.close()


@pytest.fixture(scope="module")
def comparer(adapter: Folders, bundle: Folders) -> Iterator[Pair]:
    """On the tiny BERT."""
    with both_engines(adapter("bert"), bundle("bert")) as pair:
        yield pair


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


def test_both_engines_give_pefts_probabilities(comparer: Pair, adapter: Folders, base_model: Folders) -> None:
    comparison = comparer.compare(*PAIR)
    expected = golden_probabilities(PAIR, adapter("bert"), base_model("bert"))
    labels = ("not_equivalent", "equivalent")
    assert comparison.pytorch is not None
    for answer in (comparison.pytorch, comparison.onnx):
        assert tuple(answer.probabilities) == labels
        assert list(answer.probabilities.values()) == pytest.approx(expected, abs=1e-5)
        assert answer.label == labels[int(expected.argmax())]
        assert answer.latency is not None
        assert 0 < answer.latency.median_ms <= answer.latency.p95_ms <= answer.latency.p99_ms
        assert len(answer.latency.runs_ms) == comparison.runs
        assert answer.latency.memory_mib > 10
    difference = np.abs(np.subtract(comparison.pytorch.logits, comparison.onnx.logits)).max()
    assert comparison.max_logit_difference == pytest.approx(difference)
    assert comparison.max_logit_difference is not None
    assert comparison.max_logit_difference < 1e-4
    medians = [np.median(answer.latency.runs_ms) for answer in (comparison.pytorch, comparison.onnx) if answer.latency]
    assert comparison.speedup == pytest.approx(medians[0] / medians[1])
    assert len(comparison.round_speedups) == ROUNDS
    assert ROUNDS * MIN_RUNS <= comparison.runs <= ROUNDS * MAX_RUNS
    assert not comparison.cut


def test_the_answers_are_there_before_anything_is_measured_and_every_round_adds_to_the_figures(comparer: Pair) -> None:
    steps = comparer.steps(*PAIR)
    assert [len(step.round_speedups) for step in steps] == list(range(ROUNDS + 1))
    assert steps[0].onnx.latency is None
    assert steps[0].speedup is None
    assert "latency_ms" not in steps[0].onnx.as_json()
    assert steps[0].onnx.logits == steps[-1].onnx.logits
    assert [step.runs for step in steps] == sorted({step.runs for step in steps})


def test_a_visitor_who_stops_keeps_what_was_measured(comparer: Pair) -> None:
    answers = iter([False, False, False, True])  # asked before each burst: stops before ONNX Runtime's second
    steps = comparer.steps(*PAIR, stopped=lambda: next(answers))
    assert len(steps) == 2
    last = steps[-1]
    assert len(last.round_speedups) == 1
    assert last.pytorch is not None
    assert last.pytorch.latency is not None
    assert last.onnx.latency is not None
    assert len(last.pytorch.latency.runs_ms) == len(last.onnx.latency.runs_ms)
    assert len(comparer.steps(*PAIR, stopped=lambda: True)) == 1


def test_rounds_that_differ_widely_are_marked(comparer: Pair) -> None:
    comparison = comparer.compare(*PAIR)
    quiet = replace(comparison, round_speedups=(1.5, 1.6, 1.7, 2.2))
    assert not quiet.is_disturbed
    assert quiet.notices == ()
    disturbed = replace(comparison, round_speedups=(1.5, 1.6, 1.7, 2.3))
    assert "something else used this machine" in disturbed.as_json()["notices"][0]


def test_the_percentiles_are_numpys() -> None:
    runs_ms = tuple(float(number) for number in range(1, 101))
    latency = Latency(runs_ms, memory_mib=1.0)
    assert latency.as_json() == {"median": 50.5, "p95": pytest.approx(95.05), "p99": pytest.approx(99.01)}


def test_a_text_over_the_limit_is_cut_and_the_caller_told_where(comparer: Pair) -> None:
    long = " ".join(["word1"] * 100)
    comparison = comparer.steps(long, "word2", stopped=lambda: True)[0]
    limit = POSITIONS - VIRTUAL_TOKENS
    assert comparison.tokens == limit
    # Three special tokens and the other sentence's one; a word is five letters and a space.
    read = 6 * (limit - 4) - 1
    assert comparison.as_json()["notices"] == [
        f"The model reads {limit} tokens beside its prompt. Sentence 1 was cut after “…{long[read - 24 : read]}”: "
        f"{read} of its 599 characters were read."
    ]
    assert "notices" not in comparer.steps(*PAIR, stopped=lambda: True)[0].as_json()


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
def test_a_sentence_that_cannot_be_read_is_named(sentence1: str, sentence2: str, words: str, comparer: Pair) -> None:
    with pytest.raises(TextError, match=words):
        comparer.compare(sentence1, sentence2)


def test_the_longest_sentence_allowed_is_read(comparer: Pair) -> None:
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
        assert comparison.pytorch is not None
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
    assert comparison.pytorch is not None
    for answer in (comparison.pytorch, comparison.onnx):
        assert list(answer.probabilities.values()) == pytest.approx(expected, abs=1e-5)


def test_the_engines_run_in_two_processes_of_their_own(adapter: Folders, bundle: Folders) -> None:
    engines = [
        Engine("PyTorch", make_pytorch_backend, adapter("bert"), threads=1),
        Engine("ONNX Runtime", make_onnx_backend, bundle("bert"), threads=1),
    ]
    try:
        loaded = [engine.wait_until_ready() for engine in engines]
        executions = [each.execution for each in loaded]
        assert len({os.getpid(), *(engine.pid for engine in engines)}) == 3
        assert [execution.engine.rpartition(" ")[0] for execution in executions] == ["PyTorch", "ONNX Runtime"]
        assert [execution.threads for execution in executions] == [1, 1]
        assert all(each.load_seconds > 0 for each in loaded)
        # PyTorch's libraries alone take more.
        assert loaded[0].memory_mib > loaded[1].memory_mib > 10
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
        burst = engine.burst(quick, BurstPlan(min_runs=2, max_runs=9, budget_seconds=60))
        assert len(burst.latencies_ms) == 9
        assert burst.memory_mib > 1
        assert engine.logits(quick)[0, 0] == WARM_UP_RUNS + 9 + 1
        latencies_ms = engine.burst(slow, BurstPlan(min_runs=2, max_runs=9, budget_seconds=0)).latencies_ms
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
        (["--port", "http"], "invalid int value"),
        (["--engine", "gpu"], "--engine gpu: choose one of both, onnx"),
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
    copy_with_scores(mood_adapter("bert"), folder / "moods", 0.65)
    (folder / "no adapter").mkdir()
    (folder / "README.md").write_text("adapters")
    return folder


def names(adapters: tuple[Any, ...]) -> list[str]:
    return [adapter.folder.name for adapter in adapters]


def test_without_a_flag_the_adapters_that_ship_are_shown_best_first(
    shipped: Path, adapter: Folders, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    choices = choose_adapters(shipped=shipped)
    assert [choice.name for choice in choices] == ["better", "plain", "moods", "worst"]
    assert names(choices[0].rivals) == ["plain", "worst"]  # of the same task, best first
    assert choices[2].rivals == ()
    printed = capsys.readouterr().out
    assert re.fullmatch(r"left out: .*broken/adapter_model\.safetensors is damaged.*\n", printed)

    copy_with_scores(adapter("bert"), shipped / "as good as better", 0.775)
    assert choose_adapters(shipped=shipped)[0].name == "as good as better"


def test_adapters_that_were_named_come_first_or_are_refused_but_never_replaced(shipped: Path, adapter: Folders) -> None:
    own = adapter("bert")
    choices = choose_adapters([shipped / "plain", own], shipped=shipped)
    assert [choice.name for choice in choices] == ["plain", own.name, "better", "moods", "worst"]
    assert names(choices[0].rivals) == ["better", "worst"]
    # On which rows a visitor's own was scored is not known.
    assert choices[1].rivals == ()
    for folder, words in ((shipped / "broken", "is damaged"), (shipped / "no adapter", "is no adapter")):
        with pytest.raises(AdapterError, match=words):
            choose_adapters([own, folder], shipped=shipped)


def test_folders_of_one_name_are_told_apart(shipped: Path, adapter: Folders, tmp_path: Path) -> None:
    paths = [shutil.copytree(adapter("bert"), tmp_path / str(number) / "plain") for number in range(2)]
    choices = choose_adapters(paths, shipped=shipped)
    assert [choice.name for choice in choices] == ["plain", "plain (2)", "better", "plain (3)", "moods", "worst"]


def test_where_no_adapter_ships_the_user_is_told_to_name_one(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"holds no adapter that can be loaded\. Name one with --adapter"):
        choose_adapters(shipped=tmp_path)


def test_the_adapters_that_ship_can_all_be_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    choices = choose_adapters()
    assert sorted(choice.name for choice in choices) == ["minilm-mrpc", "minilm-mrpc-v2"]
    assert capsys.readouterr().out == ""
    scores = {
        path.name: json.loads((path / "training.json").read_text())["validation"]["accuracy"]
        for path in SHIPPED.iterdir()
    }
    assert scores[choices[0].name] == max(scores.values())


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


@pytest.mark.parametrize(("mode", "precision"), [(BF16, "bf16"), (COMPILED, "fp32, compiled")])
def test_pytorch_runs_in_each_of_its_ways(
    mode: str, precision: str, adapter: Folders, bundle: Folders, base_model: Folders
) -> None:
    expected = golden_probabilities(PAIR, adapter("bert"), base_model("bert"))
    with both_engines(adapter("bert"), bundle("bert"), pytorch=mode) as pair:
        assert pair.opened.pytorch is not None
        assert pair.opened.pytorch.wait_until_ready().execution.precision == precision
        comparison = pair.compare(*PAIR)
        # Another length than it was compiled with.
        assert pair.compare("word1", "word2").pytorch is not None
    assert comparison.pytorch is not None
    assert list(comparison.pytorch.probabilities.values()) == pytest.approx(
        expected, abs=0.02 if mode == BF16 else 1e-5
    )
    assert comparison.as_json()["pytorch_mode"] == mode


def test_where_there_is_no_compiler_torch_compile_is_refused_in_words(adapter: Folders, tmp_path: Path) -> None:
    environment = {"CXX": str(tmp_path / "no compiler"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        engine = Engine("PyTorch", partial(make_pytorch_backend, mode=COMPILED), adapter("bert"), threads=1)
        try:
            with pytest.raises(EngineError, match=r"torch\.compile does not work here .* It needs a C\+\+ compiler"):
                engine.wait_until_ready()
        finally:
            engine.close()


def test_without_pytorch_only_onnx_runtime_answers_and_is_measured(
    adapter: Folders, bundle: Folders, base_model: Folders
) -> None:
    with both_engines(adapter("bert"), bundle("bert"), has_pytorch=False) as pair:
        comparison = pair.compare(*PAIR)
    expected = golden_probabilities(PAIR, adapter("bert"), base_model("bert"))
    assert list(comparison.onnx.probabilities.values()) == pytest.approx(expected, abs=1e-5)
    assert set(comparison.as_json()) == {"adapter", "precision", "onnx", "runs", "tokens"}
    assert comparison.runs >= ROUNDS * MIN_RUNS


def test_engines_are_started_when_wanted_and_the_longest_unwanted_are_stopped(
    adapter: Folders, bundle: Folders
) -> None:
    kinds = ("bert", "electra", "roberta")
    choices = choose_adapters([adapter(kind) for kind in kinds])
    stage = Stage(choices, bundles=[bundle(kind) for kind in kinds], threads=1, has_pytorch=False, max_engines=2)
    try:
        first = stage.open(Setup(choices[0].name)).onnx
        assert stage.open(Setup(choices[0].name)).onnx is first
        second = stage.open(Setup(choices[1].name)).onnx
        stage.open(Setup(choices[0].name))
        third = stage.open(Setup(choices[2].name)).onnx
        pids = [engine.pid for engine in (first, second, third)]
        assert [pid is not None and exists(pid) for pid in pids] == [True, False, True]
    finally:
        stage.close()
    assert not [pid for pid in pids if pid is not None and exists(pid)]


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        (("nobody", "fp32", "eager"), "There is no adapter 'nobody' here. Choose one of"),
        ((None, "fp32", "eager"), "There is no adapter 'None' here"),
        (("bert", "int4", "eager"), "There is no precision 'int4' here. Choose one of fp32, fp16, int8"),
        (("bert", "fp32", ["x" * 1000]), "There is no way for PyTorch"),
        (("bert", "int8", "eager"), "holds no int8 graph, only fp32"),
    ],
)
def test_a_choice_that_there_is_not_is_refused(
    chosen: tuple[Any, Any, Any], words: str, adapter: Folders, bundle: Folders, tmp_path: Path
) -> None:
    only_fp32 = tmp_path / "bundle"
    assert export_main([str(adapter("bert")), "--out", str(only_fp32), "--precision", "fp32"]) == 0
    stage = Stage(choose_adapters([adapter("bert")]), bundles=[only_fp32], threads=1)
    try:
        with pytest.raises(PromptfoldError) as caught:
            stage.open(stage.setup(*chosen))
        assert words in str(caught.value)
        assert len(str(caught.value)) < 600
    finally:
        stage.close()


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
