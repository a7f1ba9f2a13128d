"""What of ``python -m train`` takes several trainings to see; tests of tests/train again for every kind of model."""

import inspect
import json
import math
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import get_constant_schedule

from export.__main__ import main as export_main
from export.bundle.folder import load_bundle
from tests.conftest import DECODERS, KINDS, ROOT, Data, Folders, family_of, peft_logits, write_jsonl
from tests.train import test_model, test_train
from tests.train.test_evaluate import Capture
from tests.train.test_gguf import check_adapter, write_gguf
from tests.train.test_train import read_state, run
from train.adapter.folder import load_adapter
from train.adapter.peft import find_adapter_base
from train.model.find import BERT_LIKE
from train.model.tokenizer import base_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


def test_every_reparameterization_ships_the_table_alone(base_model: Folders, data: Data, tmp_path: Path) -> None:
    tables = {}
    for name in ("mlp", "lstm", "residual", "none"):
        run(base_model("bert"), data, tmp_path / name, "--reparameterization", name, "--learning-rate", "1e-2")
        state = read_state(tmp_path / name)
        assert [key for key in state if not key.startswith("base_model.")] == ["prompt_embeddings"]
        tables[name] = state["prompt_embeddings"]
        assert tables[name].shape == (4, 32)
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        kind = (config["peft_type"], config["encoder_reparameterization_type"])
        assert kind == ("P_TUNING", "LSTM" if name == "lstm" else "MLP")
        # PEFT alone loads it; tests/train says that its logits are the reported ones.
        batch = {"input_ids": np.array([[0, 5, 6, 2]]), "attention_mask": np.ones((1, 4), int)}
        assert np.isfinite(peft_logits(tmp_path / name, base_model("bert"), batch)).all()
        for other, table in tables.items():
            assert other == name or np.abs(tables[name] - table).max() > 1e-3, (name, other)


def test_a_running_average_is_what_is_scored_and_kept(
    base_model: Folders, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recomputed from runs of one, two and three steps, each of which ends with the weights of that step."""
    # A schedule that does not fall: that of a run of 1 step is otherwise another one than that of 3.
    constant: Any = lambda _, optimizer, **__: get_constant_schedule(optimizer)  # noqa: E731
    monkeypatch.setattr("transformers.trainer.get_scheduler", constant)
    flags = ["--reparameterization", "none", "--batch-size", "16", "--learning-rate", "1e-2"]
    for name in ("1", "2", "3"):
        run(base_model("bert"), data, tmp_path / name, *flags, "--max-steps", name)
    training = run(base_model("bert"), data, tmp_path / "a", *flags, "--max-steps", "3", "--average", "0.25")
    steps = [read_state(tmp_path / name) for name in ("1", "2", "3")]
    averaged = read_state(tmp_path / "a")
    for name, value in averaged.items():
        expected = steps[0][name]
        for step, state in enumerate(steps[1:], start=2):
            decay = min(0.25, (1 + step) / (10 + step))
            expected = decay * expected + (1 - decay) * state[name]
        assert np.abs(value - expected).max() < 1e-6, name
    assert np.abs(averaged["prompt_embeddings"] - steps[-1]["prompt_embeddings"]).max() > 1e-4
    (epoch,) = training["epochs"]
    # Scored again from the folder, this is what the epoch had: with the average, as the folder holds it.
    assert training["validation"] == pytest.approx(epoch["scores"])


def test_progress_bars_and_tensorboard(base_model: Folders, data: Data, tmp_path: Path, capsys: Capture) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = "--batch-size 16 --epochs 3 --report-to tensorboard --seeds 0,1"
    run(base_model("bert"), data, tmp_path / "a", *flags.split())
    bars = capsys.readouterr().err
    assert "cosine baseline:   0%|          | 0/2 [" in bars  # 64 pairs are 128 sentences
    assert re.search(r"12/12 \[\S+<\S+, .*loss=\d\.\d+\]", bars)  # time gone and time left
    for seed in (0, 1):
        events = EventAccumulator(str(tmp_path / "a.runs" / f"seed-{seed}")).Reload()
        for name in ("train/loss", "eval/loss", "eval/accuracy", "eval/f1"):
            assert [event.step for event in events.Scalars(name)] == [4, 8, 12]


def test_the_best_epoch_is_kept(base_model: Folders, data: Data, tmp_path: Path) -> None:
    """The validation labels are turned round: the more is learned, the more is wrong."""
    rows = [json.loads(line) for line in data.validation_file.read_text().splitlines()]
    turned = write_jsonl(tmp_path / "v.jsonl", [{**row, "label": 1 - row["label"]} for row in rows])
    flags = ["--batch-size", "8", "--epochs", "6", "--learning-rate", "1e-2", "--seed", "1"]
    training = run(base_model("bert"), Data(data.train_file, turned), tmp_path / "a", *flags)
    accuracies = [epoch["scores"]["accuracy"] for epoch in training["epochs"]]
    assert accuracies[-1] < max(accuracies)  # or this run shows nothing
    assert training["best_epoch"] == 1 + accuracies.index(max(accuracies))
    assert training["validation"]["accuracy"] == pytest.approx(max(accuracies))


def test_a_run_stops_early_when_nothing_gets_better(base_model: Folders, data: Data, tmp_path: Path) -> None:
    """Next to nothing is learned here, so no epoch is better than the first one."""
    flags = ["--learning-rate", "1e-9", "--epochs", "9", "--early-stopping"]
    for patience in (2, 4):
        training = run(base_model("bert"), data, tmp_path / f"{patience}", *flags, f"{patience}")
        assert (len(training["epochs"]), training["best_epoch"]) == (1 + patience, 1)


def test_what_is_learned_stays_fp32_beside_a_bf16_model(base_model: Folders, data: Data, tmp_path: Path) -> None:
    flags = ["--epochs", "2", "--learning-rate", "1e-2"]
    for precision in ("fp32", "bf16"):
        training = run(base_model("bert"), data, tmp_path / precision, *flags, "--precision", precision)
        assert all(math.isfinite(epoch["train_loss"]) for epoch in training["epochs"])
    states = [read_state(tmp_path / precision) for precision in ("fp32", "bf16")]
    assert {tensor.dtype for state in states for tensor in state.values()} == {np.dtype("float32")}
    first, second = (state["prompt_embeddings"] for state in states)
    assert 0 < np.abs(first - second).max() < 0.5  # another arithmetic, the same lesson
    assert (second.view(np.uint32) & 0xFFFF).any()  # more digits than bf16 has
    # The next run is not bf16 too, though transformers leaves its choice in the environment.
    run(base_model("bert"), data, tmp_path / "again", *flags)
    names = [tmp_path / name / "adapter_model.safetensors" for name in ("fp32", "again")]
    assert names[0].read_bytes() == names[1].read_bytes()


def test_the_median_of_several_seeds_is_kept(base_model: Folders, data: Data, tmp_path: Path, capsys: Capture) -> None:
    flags, seeds = ["--epochs", "3", "--learning-rate", "1e-2", "--batch-size", "8"], (3, 1, 2)
    base = base_model("bert")
    alone = {seed: run(base, data, tmp_path / f"{seed}", *flags, "--seed", f"{seed}")["validation"] for seed in seeds}
    capsys.readouterr()
    training = run(base, data, tmp_path / "all", *flags, "--seeds", "3,1,2")
    output = capsys.readouterr().out

    kept = sorted(alone, key=lambda seed: tuple(alone[seed].values()))[1]
    assert (training["seed"], training["seeds"], training["validation"]) == (kept, [3, 1, 2], alone[kept])
    weights = {name: (tmp_path / f"{name}" / "adapter_model.safetensors").read_bytes() for name in (*seeds, "all")}
    assert weights["all"] == weights[kept]
    assert len(set(weights.values())) == 3  # each seed learns something else
    assert len({tuple(scores.values()) for scores in alone.values()}) > 1  # or this run shows nothing
    columns = []
    for metric in ("accuracy", "f1"):
        values = [scores[metric] for scores in alone.values()]
        mean, std = statistics.mean(values), statistics.stdev(values)
        assert training["seed_summary"][metric] == {"mean": mean, "std": std, "values": values}
        columns.append(f"{100 * mean:.1f} ± {100 * std:.1f}")
    card = (tmp_path / "all" / "README.md").read_text()
    assert f"| mean ± standard deviation over seeds 3, 1, 2 | {columns[0]} | {columns[1]} |" in card
    assert f"with seed {kept}," in card
    assert f"mean of 3 seeds: accuracy {columns[0]}, F1 {columns[1]}" in output
    assert not (tmp_path / "all.checkpoints").exists()


def test_the_prompt_has_its_own_learning_rate(base_model: Folders, data: Data, tmp_path: Path) -> None:
    """And the base model learns nothing."""
    before = (base_model("bert") / "model.safetensors").read_bytes()
    for name, rate in (("slow", "1e-9"), ("fast", "1e-1")):
        run(base_model("bert"), data, tmp_path / name, "--prompt-learning-rate", rate)
    slow, fast = (read_state(tmp_path / name)["prompt_embeddings"] for name in ("slow", "fast"))
    assert np.abs(slow - fast).max() > 0.1
    assert (base_model("bert") / "model.safetensors").read_bytes() == before


def test_a_gguf_model_takes_p_tuning_v2_too_and_becomes_a_bundle(
    base_model: Folders, data: Data, tmp_path: Path
) -> None:
    write_gguf(tmp_path / "tiny.gguf", base_model("llama"))
    run(tmp_path / "tiny.gguf", data, tmp_path / "a", "--method", "p-tuning-v2")
    check_adapter(tmp_path / "a")
    assert export_main([str(tmp_path / "a"), "--out", str(tmp_path / "b"), "--precision", "fp32"]) == 0
    assert load_bundle(tmp_path / "b").task_of(load_adapter(tmp_path / "a").sha256) is not None


def test_without_network_the_default_names_the_two_ways_that_need_none(tmp_path: Path, data: Data) -> None:
    """The hub is made unreachable, whatever this machine's network is."""
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:1", "HF_HOME": str(tmp_path / "hub")}
    for flags in ([], data.flags):
        command = [sys.executable, "-m", "train", "--out", str(tmp_path / "a"), *flags]
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 2, result.stderr
        assert re.match("error: (?=.*--model minilm).*--train-file", result.stderr.strip().splitlines()[-1])
        assert "Traceback" not in result.stderr
        assert not (tmp_path / "a").exists()


OF_KINDS: dict[Callable[..., None], list[str]] = {
    test_train.test_the_prompt_starts_from_the_vocabulary: ["residual"],
    test_train.test_p_tuning_v2_starts_from_real_words: ["bert"],
    test_train.test_the_reported_scores_are_those_of_peft_on_the_validation_file: [*KINDS],
    test_model.test_the_logits_equal_pefts: [*KINDS],
    test_model.test_a_prediction_does_not_depend_on_its_batch: [*KINDS],
    test_model.test_the_text_limit_is_the_longest_text_that_the_positions_allow: [*KINDS],
    test_model.test_the_last_layer_is_for_the_pooled_row_alone: [k for k in KINDS if family_of(k) in BERT_LIKE],
}


@pytest.mark.parametrize(
    ("check", "kind"),
    [pytest.param(check, kind, id=f"{check.__name__}-{kind}") for check, kinds in OF_KINDS.items() for kind in kinds],
)
def test_again(check: Callable[..., None], kind: str, request: pytest.FixtureRequest) -> None:
    _, *fixtures = inspect.signature(check).parameters
    check(kind, **{name: request.getfixturevalue(name) for name in fixtures})


@pytest.mark.parametrize("kind", [*DECODERS, "llama-v2"])
def test_a_decoders_tokenizer_ends_each_sentence(kind: str, adapter: Folders, bundle: Folders) -> None:
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    # However it is loaded: some classes put a template of their own into the file they are given.
    for folder in (adapter(kind), bundle(kind)):
        loaded = AutoTokenizer.from_pretrained(folder)
        ids = loaded("word1 word2", "word3")["input_ids"]
        assert loaded.convert_ids_to_tokens(ids) == ["<s>", "word1", "word2", "</s>", "word3", "</s>"]
        assert ids == Tokenizer.from_file(str(folder / "tokenizer.json")).encode("word1 word2", "word3").ids
    tokenizer = Tokenizer.from_file(str(adapter(kind) / "tokenizer.json"))
    assert tokenizer.encode("word1").tokens == ["<s>", "word1", "</s>"]
    base = find_adapter_base(load_adapter(adapter(kind)))
    assert base_tokenizer(base, 30).padding_side == "right"
