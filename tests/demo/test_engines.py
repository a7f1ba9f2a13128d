"""Engines, adapters to choose from, and the comparison of a text, all with real processes."""

import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from demo.engines.adapters import choose_adapters
from demo.engines.engine_process import EngineProcess, make_onnx_backend
from demo.engines.stage import Setup, Stage
from demo.engines.timing import WARM_UP_RUNS, Arrays, Backend, BurstPlan
from demo.measure.compare import MAX_RUNS, MIN_RUNS, ROUNDS
from export.runtime.check_text import MAX_CHARACTERS
from export.runtime.classifier import Execution
from tests.conftest import POSITIONS, SHIPPED, VIRTUAL_TOKENS, Folders
from tests.demo.engines import (
    PAIR,
    Pair,
    both_engines,
    check_kind,
    copy_with_scores,
    golden_probabilities,
    make_shipped,
)
from tests.demo.server import exists, wait_until_gone
from train.common.errors import AdapterError, BundleError, EngineError, PromptfoldError, TextError
from train.data.tasks import MRPC

pytestmark = pytest.mark.usefixtures("short_pauses")


@pytest.fixture(scope="module")
def pair(adapter: Folders, bundle: Folders) -> Iterator[Pair]:
    with both_engines(adapter("bert"), bundle("bert")) as pair:
        yield pair


def test_engines_are_as_peft_and_rounds_are_counted(pair: Pair, adapter: Folders, base_model: Folders) -> None:
    steps = pair.steps(*PAIR)
    assert [len(step.round_speedups) for step in steps] == list(range(ROUNDS + 1))
    assert [step.runs for step in steps] == sorted({step.runs for step in steps})
    assert (steps[0].onnx.latency, steps[0].speedup) == (None, None)
    assert "latency_ms" not in steps[0].onnx.as_json()
    comparison = steps[-1]
    assert steps[0].onnx.logits == comparison.onnx.logits
    assert ROUNDS * MIN_RUNS <= comparison.runs <= ROUNDS * MAX_RUNS
    assert not comparison.cut
    expected = golden_probabilities(PAIR, adapter("bert"), base_model("bert"))
    assert comparison.pytorch is not None
    medians = []
    for answer in (comparison.pytorch, comparison.onnx):
        assert tuple(answer.probabilities) == MRPC.labels
        assert list(answer.probabilities.values()) == pytest.approx(expected, abs=1e-5)
        assert answer.label == MRPC.labels[int(expected.argmax())]
        assert answer.latency is not None
        assert len(answer.latency.runs_ms) == comparison.runs
        assert answer.latency.memory_mib > 10
        median, p95, p99 = np.quantile(answer.latency.runs_ms, [0.5, 0.95, 0.99])
        assert answer.as_json()["latency_ms"] == pytest.approx({"median": median, "p95": p95, "p99": p99})
        medians.append(median)
    assert comparison.speedup == pytest.approx(medians[0] / medians[1])
    difference = np.abs(np.subtract(comparison.pytorch.logits, comparison.onnx.logits)).max()
    assert comparison.max_logit_difference == pytest.approx(difference)
    assert difference < 1e-4
    for slowest, told in ((2.2, False), (2.3, True)):
        notices = replace(comparison, round_speedups=(1.5, 1.6, 1.7, slowest)).notices
        assert ["something else used this machine" in notice for notice in notices] == [True] * told


def test_a_long_text_is_cut_and_a_visitor_may_stop(pair: Pair) -> None:
    long = " ".join(["word1"] * 100)
    comparison = pair.steps(long, "word2", stopped=lambda: True)[0]
    limit = POSITIONS - VIRTUAL_TOKENS
    assert comparison.tokens == limit
    # Three special tokens and the other sentence's one; a word is five letters and a space.
    read = 6 * (limit - 4) - 1
    assert comparison.as_json()["notices"] == [
        f"The model reads {limit} tokens beside its prompt. Sentence 1 was cut after “…{long[read - 24 : read]}”: "
        f"{read} of its 599 characters were read."
    ]
    assert "notices" not in pair.steps(*PAIR, stopped=lambda: True)[0].as_json()
    assert pair.steps("x " * (MAX_CHARACTERS // 2), "word1", stopped=lambda: True)[0].cut
    with pytest.raises(TextError, match="Sentence 2 has 100,000 characters; at most 10,000 are read"):
        pair.steps("word1", "x" * 100_000)
    # A visitor who stops keeps what was measured.
    answers = iter([False, False, False, True])  # asked before each burst: stops before ONNX Runtime's second
    steps = pair.steps(*PAIR, stopped=lambda: next(answers))
    assert [len(step.round_speedups) for step in steps] == [0, 1]
    assert steps[1].pytorch is not None
    assert steps[1].pytorch.latency is not None
    assert steps[1].onnx.latency is not None
    assert len(steps[1].pytorch.latency.runs_ms) == len(steps[1].onnx.latency.runs_ms)
    assert len(pair.steps(*PAIR, stopped=lambda: True)) == 1


def test_a_decoder_and_onnx_alone_are_as_peft(adapter: Folders, bundle: Folders, base_model: Folders) -> None:
    check_kind(adapter("llama-v2"), bundle("llama-v2"), base_model("llama"))
    with both_engines(adapter("bert"), bundle("bert"), has_pytorch=False) as pair:
        comparison = pair.steps(*PAIR)[-1]
    expected = golden_probabilities(PAIR, adapter("bert"), base_model("bert"))
    assert list(comparison.onnx.probabilities.values()) == pytest.approx(expected, abs=1e-5)
    assert set(comparison.as_json()) == {"adapter", "precision", "onnx", "runs", "tokens"}
    assert comparison.runs >= ROUNDS * MIN_RUNS


@contextmanager
def started(
    make: Callable[..., Backend], folder: Path, *, name: str = "tried", **settings: Any
) -> Iterator[EngineProcess]:
    with closing(EngineProcess(name, make, folder, threads=1, **settings)) as engine:
        yield engine


def test_the_engines_run_in_two_processes_of_their_own(pair: Pair) -> None:
    assert pair.opened.pytorch is not None
    onnx, engines = pair.opened.onnx, (pair.opened.pytorch, pair.opened.onnx)
    loaded = [engine.wait_until_ready() for engine in engines]
    assert len({os.getpid(), *(engine.pid for engine in engines)}) == 3
    assert [each.execution.engine.rpartition(" ")[0] for each in loaded] == ["PyTorch", "ONNX Runtime"]
    assert [each.execution.threads for each in loaded] == [1, 1]
    assert all(each.load_seconds > 0 for each in loaded)
    # PyTorch's libraries alone take more.
    assert loaded[0].memory_mib > loaded[1].memory_mib > 10
    # The fast engine's process does not load the other engine's library.
    maps = Path(f"/proc/{onnx.pid}/maps").read_text()
    assert "libonnxruntime" in maps or "onnxruntime_pybind11_state" in maps
    assert "libtorch" not in maps
    # A killed engine is started again.
    arrays = pair.opened.tokenize([PAIR]).arrays
    before, first_pid = onnx.logits(arrays), onnx.pid
    assert first_pid is not None
    os.kill(first_pid, signal.SIGKILL)
    wait_until_gone(first_pid)
    assert np.array_equal(onnx.logits(arrays), before)
    assert onnx.pid != first_pid


class ObedientBackend:
    """Sleeps as long as it is told, counts its runs, and dies when it is first told to."""

    execution = Execution("none", "none", on_cuda=False, threads=1, precision="fp32", note="")

    def __init__(self, folder: Path, threads: int) -> None:
        self._died = folder / "died"
        self._runs = 0

    def logits(self, arrays: Arrays) -> np.ndarray:
        if "die" in arrays and not self._died.exists():
            self._died.touch()
            os._exit(3)
        self._runs += 1
        time.sleep(float(arrays["seconds"]))
        return np.array([[self._runs]], dtype=np.float32)


QUICK, SLOW, HANGING = ({"seconds": np.array(seconds)} for seconds in (0.0, 0.05, 600.0))


def test_an_engine_that_dies_hangs_or_cannot_load_fails_that_request_alone(tmp_path: Path) -> None:
    deadly = QUICK | {"die": np.array(1)}
    with started(ObedientBackend, tmp_path, name="mortal") as engine:
        with pytest.raises(EngineError, match=r"The mortal engine's process ended unexpectedly \(exit code 3\)"):
            engine.logits(deadly)
        assert engine.logits(deadly).tolist() == [[1.0]]
    with started(ObedientBackend, tmp_path, request_timeout_seconds=0.2) as engine:
        engine.wait_until_ready()
        pid = engine.pid
        with pytest.raises(EngineError, match="did not answer within"):
            engine.logits(HANGING)
        assert pid is not None
        assert not exists(pid)
    none = pytest.raises(BundleError, match="There is no bundle folder")
    with started(make_onnx_backend, tmp_path / "none") as engine, none:
        engine.wait_until_ready()


def test_a_burst_is_warmed_up_bounded_and_measured_run_by_run(tmp_path: Path) -> None:
    with started(ObedientBackend, tmp_path) as engine:
        burst = engine.burst(QUICK, BurstPlan(min_runs=2, max_runs=9, budget_seconds=60))
        assert len(burst.runs_ms) == 9
        assert burst.memory_mib > 1
        assert engine.logits(QUICK)[0, 0] == WARM_UP_RUNS + 9 + 1
        runs_ms = engine.burst(SLOW, BurstPlan(min_runs=2, max_runs=9, budget_seconds=0)).runs_ms
        assert len(runs_ms) == 2
        assert min(runs_ms) >= 50  # it slept that long; milliseconds, not seconds


def test_engines_start_when_wanted_and_the_oldest_stop(adapter: Folders, bundle: Folders, tmp_path: Path) -> None:
    choices = choose_adapters([shutil.copytree(adapter("bert"), tmp_path / name) for name in "abc"])
    with closing(Stage(choices, bundles=[bundle("bert")], threads=1, has_pytorch=False, max_engines=2)) as stage:
        first = stage.open(Setup("a")).onnx
        assert stage.open(Setup("a")).onnx is first
        second = stage.open(Setup("b")).onnx
        stage.open(Setup("a"))
        third = stage.open(Setup("c")).onnx
        pids = [engine.pid for engine in (first, second, third)]
        assert [pid is not None and exists(pid) for pid in pids] == [True, False, True]
    assert not [pid for pid in pids if pid is not None and exists(pid)]


def test_a_choice_that_there_is_not_is_refused(pair: Pair) -> None:
    for chosen, words in (
        (("absent", "fp32", "eager"), "There is no adapter 'absent' here. Choose one of"),
        ((None, "fp32", "eager"), "There is no adapter 'None' here"),
        (("bert", "int4", "eager"), "There is no precision 'int4' here. Choose one of fp32, fp16, int8"),
        (("bert", "fp32", ["x" * 1000]), "There is no way for PyTorch"),
        (("", "fp16", ""), "holds no fp16 graph, only fp32"),
    ):
        with pytest.raises(PromptfoldError, match=words) as caught:
            pair.stage.open(pair.stage.setup(*cast(Any, chosen)))
        assert len(str(caught.value)) < 600


@pytest.fixture
def shipped(adapter: Folders, second: Callable[..., Path], tmp_path: Path) -> Path:
    return make_shipped(tmp_path / "adapters", adapter("bert"), adapter("llama-v2"), second("bert", three=True))


def test_shipped_adapters_come_best_first(shipped: Path, adapter: Folders, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    choices = choose_adapters(shipped=shipped)
    assert [choice.name for choice in choices] == ["better", "plain", "other", "worst"]
    assert [rival.folder.name for rival in choices[0].rivals] == ["plain", "worst"]  # of the same task, best first
    assert choices[2].rivals == ()
    printed = capsys.readouterr().out
    assert re.fullmatch(r"left out: .*broken/adapter_model\.safetensors is damaged.*\n", printed)

    copy_with_scores(adapter("bert"), shipped / "as good as better", 0.775)
    assert choose_adapters(shipped=shipped)[0].name == "as good as better"


def test_named_adapters_come_first_or_are_refused(shipped: Path, adapter: Folders, tmp_path: Path) -> None:
    own = adapter("bert")
    choices = choose_adapters([shipped / "plain", own], shipped=shipped)
    assert [choice.name for choice in choices] == ["plain", own.name, "better", "other", "worst"]
    assert [rival.folder.name for rival in choices[0].rivals] == ["better", "worst"]
    # It is not known on which rows a user's own adapter was scored.
    assert choices[1].rivals == ()
    for folder, words in ((shipped / "broken", "is damaged"), (shipped / "no adapter", "is no adapter")):
        with pytest.raises(AdapterError, match=words):
            choose_adapters([own, folder], shipped=shipped)
    # Folders of one name are told apart.
    paths = [shutil.copytree(own, tmp_path / str(number) / "plain") for number in range(2)]
    choices = choose_adapters(paths, shipped=shipped)
    assert [choice.name for choice in choices] == ["plain", "plain (2)", "better", "plain (3)", "other", "worst"]
    with pytest.raises(AdapterError, match=r"holds no adapter that can be loaded\. Name one with --adapter"):
        choose_adapters(shipped=shipped / "no adapter")


def test_the_adapters_that_ship_can_all_be_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    choices = choose_adapters()
    assert sorted(choice.name for choice in choices) == sorted(SHIPPED)
    assert capsys.readouterr().out == ""
    accuracies = [choice.adapter.scores.values["accuracy"] for choice in choices]
    assert accuracies == sorted(accuracies, reverse=True)
