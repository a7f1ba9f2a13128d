"""``python -m train`` through its entry point: what it writes, what it reports, what it refuses."""

import csv
import json
import math
import os
import re
import shutil
import statistics
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score

from tests.conftest import (
    DECODERS,
    KINDS,
    P_TUNED_V2,
    POSITIONS,
    ROOT,
    VIRTUAL_TOKENS,
    Data,
    family_of,
    flip_bit,
    make_pairs,
    peft_logits,
    write_jsonl,
)
from train.__main__ import main
from train.adapter.folder import load_adapter
from train.adapter.peft import find_adapter_base
from train.common.errors import AdapterError, ModelError
from train.config import TrainConfig, flag, parse_config

pytestmark = pytest.mark.usefixtures("one_thread")

Folders = Callable[[str], Path]


def run(base: Path, data: Data, out: Path, *flags: str) -> dict[str, Any]:
    """Train on a tiny model, for an epoch where nothing else is said, and return training.json."""
    sizes = ["--virtual-tokens", "4", "--encoder-hidden-size", "16", "--epochs", "1"]
    assert main(["--model", str(base), *data.flags, *sizes, *flags, "--out", str(out)]) == 0
    training: dict[str, Any] = json.loads((out / "training.json").read_text())
    return training


def read_state(out: Path) -> dict[str, np.ndarray]:
    """The tensors of an adapter."""
    from safetensors.numpy import load_file

    state: dict[str, np.ndarray] = load_file(out / "adapter_model.safetensors")
    return state


def test_an_adapter_folder_holds_exactly_these_files(adapter: Callable[[str], Path]) -> None:
    assert {path.name for path in adapter("bert").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "curves.png",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
    }
    assert not adapter("bert").with_name("bert.checkpoints").exists()


def test_the_curves_are_a_picture(adapter: Callable[[str], Path]) -> None:
    from matplotlib.image import imread

    picture = imread(adapter("bert") / "curves.png", format="png")
    assert picture.shape[0] > 300
    assert len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 20  # lines, words and more than one colour


def test_the_adapter_is_the_prompt_and_the_head_and_nothing_of_the_prompt_encoder(
    adapter: Callable[[str], Path],
) -> None:
    state = read_state(adapter("bert"))
    assert state.pop("prompt_embeddings").shape == (VIRTUAL_TOKENS, 32)
    # The pooler is part of BERT's head.
    assert set(state) == {
        f"base_model.{module}.{kind}" for module in ("bert.pooler.dense", "classifier") for kind in ("weight", "bias")
    }
    config = json.loads((adapter("bert") / "adapter_config.json").read_text())
    assert (config["peft_type"], config["encoder_reparameterization_type"]) == ("P_TUNING", "MLP")


@pytest.mark.parametrize("kind", KINDS)
def test_the_reported_scores_are_those_of_peft_on_the_validation_file(
    kind: str, adapter: Folders, base_model: Folders, data: Data
) -> None:
    from transformers import AutoTokenizer

    family = family_of(kind)
    rows = [json.loads(line) for line in data.validation_file.read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(adapter(kind))
    # PEFT pools a decoder's last row, so such a one gets row after row, without padding.
    batches = [[row] for row in rows] if family in DECODERS else [rows]
    predicted: list[int] = []
    for batch in batches:
        texts = [[row[column] for row in batch] for column in ("sentence1", "sentence2")]
        encoded = dict(tokenizer(*texts, padding=True, return_tensors="np"))
        predicted += peft_logits(adapter(kind), base_model(family), encoded).argmax(axis=-1).tolist()
    expected = [row["label"] for row in rows]

    training = json.loads((adapter(kind) / "training.json").read_text())
    assert training["validation"] == pytest.approx(
        {"accuracy": accuracy_score(expected, predicted), "f1": f1_score(expected, predicted)}
    )
    ones = np.ones(len(expected))
    assert training["baselines"]["always `equivalent`"] == pytest.approx(
        {"accuracy": accuracy_score(expected, ones), "f1": f1_score(expected, ones)}
    )
    # What was kept is the best epoch, and its record is what was loaded again.
    best = max(training["epochs"], key=lambda epoch: (epoch["scores"]["accuracy"], epoch["scores"]["f1"]))
    assert training["best_epoch"] == best["epoch"]
    assert training["validation"] == pytest.approx(best["scores"])


@pytest.mark.parametrize("family", P_TUNED_V2)
def test_p_tuning_v2_writes_pefts_prefix_tuning_of_one_key_and_value_a_layer(family: str, adapter: Folders) -> None:
    config = json.loads((adapter(f"{family}-v2") / "adapter_config.json").read_text())
    assert (config["peft_type"], config["num_virtual_tokens"]) == ("PREFIX_TUNING", VIRTUAL_TOKENS)
    # Llama's keys and values have two heads for its four queries.
    width = 16 if family == "llama" else 32
    assert read_state(adapter(f"{family}-v2"))["prompt_embeddings"].shape == (VIRTUAL_TOKENS, 2 * 2 * width)


@pytest.mark.parametrize("family", ["bloom", "distilbert", "mpnet"])
def test_p_tuning_v2_is_refused_by_name_where_peft_cannot_do_it(
    family: str, base_model: Folders, data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", str(base_model(family)), *data.flags, "--method", "p-tuning-v2", "--out", str(tmp_path / "a")]
    assert main(flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --method p-tuning-v2 does not work with ")
    assert f"models of type '{family}'" in error
    assert "Take --method p-tuning, or a model of type bert, " in error
    assert list(tmp_path.iterdir()) == []


def test_every_reparameterization_trains_and_ships_the_table_alone(
    base_model: Folders, data: Data, tmp_path: Path
) -> None:
    tables = {}
    for name in ("mlp", "lstm", "residual", "none"):
        run(base_model("bert"), data, tmp_path / name, "--reparameterization", name, "--learning-rate", "1e-2")
        state = read_state(tmp_path / name)
        assert [key for key in state if not key.startswith("base_model.")] == ["prompt_embeddings"]
        tables[name] = state["prompt_embeddings"]
        assert tables[name].shape == (4, 32)
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert config["peft_type"] == "P_TUNING"
        assert config["encoder_reparameterization_type"] == ("LSTM" if name == "lstm" else "MLP")
        # PEFT alone loads it; that its logits are the reported ones is tested above.
        batch = {"input_ids": np.array([[0, 5, 6, 2]]), "attention_mask": np.ones((1, 4), int)}
        assert np.isfinite(peft_logits(tmp_path / name, base_model("bert"), batch)).all()
    names = list(tables)
    for index, name in enumerate(names):
        for other in names[:index]:
            assert np.abs(tables[name] - tables[other]).max() > 1e-3, (name, other)


def text_ids(base: Path, data: Data) -> list[int]:
    """Token ids of the training texts, one after the other, by transformers alone."""
    from transformers import AutoTokenizer

    rows = [json.loads(line) for line in data.train_file.read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(base)
    return [
        token
        for row in rows
        for column in ("sentence1", "sentence2")
        for token in tokenizer(row[column], add_special_tokens=False)["input_ids"]
    ]


@pytest.mark.parametrize("name", ["residual", "none"])
def test_a_prompt_without_mlp_or_beside_one_starts_from_the_vocabulary(
    name: str, base_model: Folders, data: Data, tmp_path: Path
) -> None:
    """Next to nothing is learned here, so what is saved is the beginning: [CLS], then words of the training data."""
    from transformers import AutoModel

    run(base_model("bert"), data, tmp_path / "a", "--reparameterization", name, "--learning-rate", "1e-12")
    vocabulary = AutoModel.from_pretrained(base_model("bert")).get_input_embeddings().weight.detach().numpy()
    ids = [0, *text_ids(base_model("bert"), data)[:3]]
    assert np.abs(read_state(tmp_path / "a")["prompt_embeddings"] - vocabulary[ids]).max() < 1e-6


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_p_tuning_v2_starts_from_keys_and_values_of_real_words(
    family: str, base_model: Folders, data: Data, tmp_path: Path
) -> None:
    """What the frozen model computes for these words, read off its own linear layers."""
    import torch
    from transformers import AutoModel

    run(base_model(family), data, tmp_path / "a", "--method", "p-tuning-v2", "--learning-rate", "1e-12")
    table = read_state(tmp_path / "a")["prompt_embeddings"]
    model = AutoModel.from_pretrained(base_model(family)).eval()
    seen: dict[str, np.ndarray] = {}
    for name, module in model.named_modules():
        if name.endswith((".key", ".value", ".k_proj", ".v_proj")):
            module.register_forward_hook(lambda _, __, output, name=name: seen.update({name: output[0].numpy()}))
    with torch.inference_mode():
        model(torch.tensor([text_ids(base_model(family), data)[:4]]))
    expected = list(seen.values())  # key and value of layer 0, then of layer 1
    assert len(expected) == 4
    width = expected[0].shape[1]
    # Positions turn Llama's keys, which PEFT stores turned; all values and BERT's keys are as they come.
    for index, states in enumerate(expected):
        part = table[:, index * width : (index + 1) * width]
        if family == "bert" or index % 2:
            assert np.abs(part - states).max() < 1e-5
        else:
            assert np.abs(part[0] - states[0]).max() < 1e-5  # position 0 is turned by nothing
            norms = [np.linalg.norm(rows.reshape(4, 2, -1), axis=-1) for rows in (part, states)]
            assert np.abs(norms[0] - norms[1]).max() < 1e-4


def test_a_running_average_is_what_is_scored_and_kept(base_model: Folders, data: Data, tmp_path: Path) -> None:
    """Recomputed from runs of one, two and three steps, each of which ends with the weights of that step."""
    flags = ["--reparameterization", "none", "--batch-size", "16", "--learning-rate", "1e-2"]
    # A learning rate that does not fall: the schedule of a run of 1 step is not that of 3.
    steps = []
    for step in (1, 2, 3):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("train.fit.loop._arguments", constant_learning_rate())
            run(base_model("bert"), data, tmp_path / f"{step}", *flags, "--max-steps", str(step))
            steps.append(read_state(tmp_path / f"{step}"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.fit.loop._arguments", constant_learning_rate())
        training = run(base_model("bert"), data, tmp_path / "a", *flags, "--max-steps", "3", "--average", "0.25")
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


def constant_learning_rate() -> Callable[..., Any]:
    """`train.fit.loop._arguments` with a schedule that stays level."""
    import train.fit.loop
    import train.fit.seeds
    import train.model.find

    arguments = train.fit.loop._arguments

    def level(*args: Any) -> Any:
        result = arguments(*args)
        result.lr_scheduler_type = "constant"
        return result

    return level


def test_a_run_stops_after_so_many_steps(
    base_model: Folders, data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """64 rows in batches of 16 are four steps an epoch; the sixth is in the middle of the second."""
    training = run(base_model("bert"), data, tmp_path / "a", "--batch-size", "16", "--max-steps", "6")
    assert [epoch["epoch"] for epoch in training["epochs"]] == [1, 2]
    assert "epoch 2/2  training loss" in capsys.readouterr().out
    training = run(base_model("bert"), data, tmp_path / "b", "--batch-size", "16", "--max-steps", "2")
    assert len(training["epochs"]) == 1


def test_what_takes_long_shows_how_far_it_is(
    base_model: Folders, data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(base_model("bert"), data, tmp_path / "a", "--batch-size", "16", "--epochs", "3")
    bars = capsys.readouterr().err
    assert "cosine baseline:   0%|          | 0/2 [" in bars  # 64 pairs are 128 sentences
    assert re.search(r"12/12 \[\S+<\S+, .*loss=\d\.\d+\]", bars)  # time gone and time left


def test_a_run_stops_early_when_nothing_gets_better(base_model: Folders, data: Data, tmp_path: Path) -> None:
    """Next to nothing is learned here, so no epoch is better than the first one."""
    flags = ["--learning-rate", "1e-9", "--epochs", "9", "--early-stopping"]
    training = run(base_model("bert"), data, tmp_path / "a", *flags, "2")
    assert (len(training["epochs"]), training["best_epoch"]) == (3, 1)
    training = run(base_model("bert"), data, tmp_path / "b", *flags, "4")
    assert len(training["epochs"]) == 5


def test_what_is_learned_stays_fp32_when_the_frozen_model_is_bf16(
    base_model: Folders, data: Data, tmp_path: Path
) -> None:
    flags = ["--epochs", "2", "--learning-rate", "1e-2"]
    for precision in ("fp32", "bf16"):
        training = run(base_model("bert"), data, tmp_path / precision, *flags, "--precision", precision)
        assert all(math.isfinite(epoch["train_loss"]) for epoch in training["epochs"])
    states = [read_state(tmp_path / precision) for precision in ("fp32", "bf16")]
    assert {tensor.dtype for state in states for tensor in state.values()} == {np.dtype("float32")}
    difference = np.abs(states[0]["prompt_embeddings"] - states[1]["prompt_embeddings"]).max()
    assert 0 < difference < 0.5  # another arithmetic, the same lesson
    rounded = states[1]["prompt_embeddings"].view(np.uint32) & 0xFFFF
    assert rounded.any()  # more digits than bf16 has
    # The next run is not bf16 too, though transformers leaves its choice in the environment.
    run(base_model("bert"), data, tmp_path / "again", *flags)
    names = [tmp_path / name / "adapter_model.safetensors" for name in ("fp32", "again")]
    assert names[0].read_bytes() == names[1].read_bytes()


@pytest.mark.usefixtures("on_cpu")
def test_fp16_is_refused_without_a_gpu(data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "minilm", *data.flags, "--precision", "fp16", "--out", str(tmp_path / "a")]) == 2
    assert "--precision fp16 needs an NVIDIA GPU, and there is none. Take fp32 or bf16." in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_several_seeds_are_summed_up_and_the_median_one_is_kept(
    base_model: Folders, data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--epochs", "3", "--learning-rate", "1e-2", "--batch-size", "8"]
    alone = {}
    for seed in (3, 1, 2):
        alone[seed] = run(base_model("bert"), data, tmp_path / f"{seed}", *flags, "--seed", str(seed))["validation"]
    capsys.readouterr()
    training = run(base_model("bert"), data, tmp_path / "all", *flags, "--seeds", "3,1,2")
    output = capsys.readouterr().out

    kept = sorted(alone, key=lambda seed: tuple(alone[seed].values()))[1]
    assert (training["seed"], training["seeds"]) == (kept, [3, 1, 2])
    assert training["validation"] == alone[kept]
    names = [tmp_path / folder / "adapter_model.safetensors" for folder in ("all", f"{kept}")]
    assert names[0].read_bytes() == names[1].read_bytes()
    assert len({tuple(scores.values()) for scores in alone.values()}) > 1  # or this run shows nothing
    card = (tmp_path / "all" / "README.md").read_text()
    columns = []
    for metric in ("accuracy", "f1"):
        values = [alone[seed][metric] for seed in (3, 1, 2)]
        mean, std = statistics.mean(values), statistics.stdev(values)
        summary = training["seed_summary"][metric]
        assert summary["values"] == values
        assert (summary["mean"], summary["std"]) == pytest.approx((mean, std))
        columns.append(f"{100 * mean:.1f} ± {100 * std:.1f}")
    assert f"| mean ± standard deviation over seeds 3, 1, 2 | {columns[0]} | {columns[1]} |" in card
    assert f"with seed {kept}," in card
    assert f"mean of 3 seeds: accuracy {columns[0]}, F1 {columns[1]}" in output
    assert not (tmp_path / "all.checkpoints").exists()


def read_events(file: Path) -> dict[str, list[int]]:
    """The steps at which each scalar of a TensorBoard file stands: length, check sum, event, check sum, and again."""
    from tensorboard.compat.proto.event_pb2 import Event

    steps: dict[str, list[int]] = {}
    content = file.read_bytes()
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        event = Event.FromString(content[12 : 12 + length])
        for value in event.summary.value:
            steps.setdefault(value.tag, []).append(event.step)
        content = content[16 + length :]
    return steps


def test_the_curves_go_to_tensorboard_when_asked(base_model: Folders, data: Data, tmp_path: Path) -> None:
    flags = ["--epochs", "2", "--report-to", "tensorboard", "--seeds", "0,1"]
    run(base_model("bert"), data, tmp_path / "a", *flags)
    for seed in (0, 1):
        (file,) = (tmp_path / "a.runs" / f"seed-{seed}").glob("events.out.tfevents.*")
        steps = read_events(file)
        for name in ("train/loss", "eval/loss", "eval/accuracy", "eval/f1"):
            assert steps[name] == [2, 4]


def test_an_earlier_epoch_is_kept_when_the_later_ones_are_worse(
    base_model: Folders, data: Data, tmp_path: Path
) -> None:
    """The validation labels are turned round: the more is learned, the more is wrong."""
    rows = [json.loads(line) for line in data.validation_file.read_text().splitlines()]
    turned = write_jsonl(tmp_path / "v.jsonl", [{**row, "label": 1 - row["label"]} for row in rows])
    flags = ["--batch-size", "8", "--epochs", "6", "--learning-rate", "1e-2", "--seed", "1"]
    training = run(base_model("bert"), Data(data.train_file, turned), tmp_path / "a", *flags)
    accuracies = [epoch["scores"]["accuracy"] for epoch in training["epochs"]]
    assert accuracies[-1] < max(accuracies)  # or this run shows nothing
    assert training["best_epoch"] == 1 + accuracies.index(max(accuracies))
    assert training["validation"]["accuracy"] == pytest.approx(max(accuracies))


def test_the_same_command_gives_the_same_weights(base_model: Callable[[str], Path], data: Data, tmp_path: Path) -> None:
    flags = ["--model", str(base_model("bert")), *data.flags, "--epochs", "1", "--virtual-tokens", "4"]
    for name, seed in (("a", "7"), ("b", "7"), ("c", "8")):
        assert main([*flags, "--out", str(tmp_path / name), "--seed", seed]) == 0
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]


def test_training_moves_the_prompt_with_its_own_learning_rate_and_leaves_the_base_model_alone(
    base_model: Callable[[str], Path], data: Data, tmp_path: Path
) -> None:
    from safetensors.numpy import load_file

    before = (base_model("bert") / "model.safetensors").read_bytes()
    states = []
    for name, rate in (("slow", "1e-9"), ("fast", "1e-1")):
        flags = ["--model", str(base_model("bert")), *data.flags, "--epochs", "1", "--virtual-tokens", "4"]
        assert main([*flags, "--out", str(tmp_path / name), "--prompt-learning-rate", rate]) == 0
        states.append(load_file(tmp_path / name / "adapter_model.safetensors"))
    slow, fast = (state["prompt_embeddings"] for state in states)
    assert np.abs(slow - fast).max() > 0.1
    assert (base_model("bert") / "model.safetensors").read_bytes() == before


def test_the_model_card_names_the_command_the_seed_and_the_scores(adapter: Callable[[str], Path]) -> None:
    card = (adapter("bert") / "README.md").read_text()
    training = json.loads((adapter("bert") / "training.json").read_text())
    assert f"    {training['command']}\n" in card
    assert training["command"].startswith("python -m train --model ")
    assert "with seed 0" in card
    for scores in (training["validation"], *training["baselines"].values()):
        assert f" | {100 * scores['accuracy']:.1f} | {100 * scores['f1']:.1f} |\n" in card
    assert len(training["baselines"]) == 2
    assert "## Limits\n\n- The same rows chose the epoch" in card
    accuracy = training["validation"]["accuracy"]
    half = 100 * 1.96 * math.sqrt(accuracy * (1 - accuracy) / 40)
    assert f"- With 40 rows the 95 % confidence interval of the accuracy is about ±{half:.1f} points." in card
    assert "that of the best baseline (cosine of the frozen model's embeddings)." in card
    assert "![Loss and scores per epoch](curves.png)" in card


def test_the_help_names_the_flag_of_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    words = capsys.readouterr().out.replace(",", " ").split()
    assert [item.name for item in fields(TrainConfig) if flag(item.name) not in words] == []


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_files_of_every_kind_give_the_same_adapter(
    suffix: str, base_model: Callable[[str], Path], data: Data, tmp_path: Path
) -> None:
    """Label names in place of indices, too."""
    import pyarrow
    import pyarrow.parquet

    files = []
    for file in (data.train_file, data.validation_file):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        for row in rows:
            row["label"] = ("not_equivalent", "equivalent")[row["label"]]
        files.append(tmp_path / (file.stem + suffix))
        if suffix == ".csv":
            with files[-1].open("w", newline="") as stream:
                writer = csv.DictWriter(stream, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        else:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), files[-1])
    flags = ["--model", str(base_model("bert")), "--epochs", "1", "--virtual-tokens", "4"]
    assert main([*flags, *Data(*files).flags, "--out", str(tmp_path / "a")]) == 0
    assert main([*flags, *data.flags, "--out", str(tmp_path / "b")]) == 0
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]


def test_texts_over_the_limit_are_cut_and_counted(
    base_model: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = make_pairs(8, seed=3)
    rows[0]["sentence1"] = " ".join(["word1"] * 500)
    files = [write_jsonl(tmp_path / name, rows) for name in ("t.jsonl", "v.jsonl")]
    flags = ["--model", str(base_model("roberta")), "--epochs", "1", "--virtual-tokens", "4"]
    assert main([*flags, *Data(*files).flags, "--out", str(tmp_path / "a")]) == 0
    assert f"1 train texts are longer than {POSITIONS - 4} tokens" in capsys.readouterr().out


def test_the_defaults_are_the_tutorials() -> None:
    config = parse_config(["--out", "x"])
    assert config == TrainConfig(
        out=Path("x"),
        model="roberta-large",
        method="p-tuning",
        epochs=20,
        virtual_tokens=20,
        encoder_hidden_size=128,
        learning_rate=1e-3,
        batch_size=32,
        weight_decay=0.01,
    )


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "--out"),
        (["--out", "{tmp}/a", "--epochs", "0"], "--epochs 0: give a whole number"),
        (["--out", "{tmp}/a", "--epochs", "two"], "invalid int value: 'two'"),
        (["--out", "{tmp}/a", "--learning-rate", "-1"], "--learning-rate -1.0: give a number above 0"),
        (["--out", "{tmp}/a", "--learning-rate", "nan"], "--learning-rate nan"),
        (["--out", "{tmp}/a", "--seed", "-1"], "--seed -1"),
        (["--out", "{tmp}/a", "--task", "sst3"], "Choose one of: mrpc"),
        (["--out", "{tmp}/a", "--train-file", "{train}"], "--validation-file"),
        (["--out", "{tmp}/a", "{data}", "--model", "{tmp}/none/here"], "there is no such folder"),
        (["--out", "{tmp}/a", "{data}", "--model", "{tmp}"], "has no config.json"),
        (["--out", "{tmp}/a", "{data}", "--max-length", "400", "--model", "minilm", "--virtual-tokens", "200"], "312"),
        (["--out", "{tmp}/a", "{data}", "--model", "minilm", "--virtual-tokens", "510"], "--virtual-tokens"),
        (["--out", "{tmp}/a", "--train-file", "{tmp}/no.csv", "--validation-file", "{train}"], "no such file"),
        (["--out", "{tmp}/a", "--train-file", "{tmp}/x.txt", "--validation-file", "{train}"], ".csv, .jsonl, .parquet"),
        (["--out", "{train}", "{data}"], "is not a folder"),
        (["--out", "{tmp}", "{data}"], "holds something that is no adapter"),
        (["--out", "/proc/none/a", "{data}"], "/proc cannot be written"),
        (["--out", "{train}/a", "{data}"], "cannot be written"),
        (["--bogus"], "--help"),
        (["--out", "{tmp}/a", "{data}", "--precision", "int4"], "--precision int4: choose one of fp32, bf16, fp16"),
        (["--out", "{tmp}/a", "{data}", "--report-to", "trackio"], "Run: pip install -r requirements.txt trackio"),
        (["--out", "{tmp}/a", "{data}", "--method", "lora"], "--method lora: choose one of p-tuning, p-tuning-v2"),
        (
            ["--out", "{tmp}/a", "--method", "p-tuning-v2", "--reparameterization", "mlp"],
            "--reparameterization mlp belongs to --method p-tuning",
        ),
        (["--out", "{tmp}/a", "--average", "1"], "--average 1.0: give a number from 0 to below 1"),
        (["--out", "{tmp}/a", "--seeds", "1,1"], "--seeds names a seed twice"),
        (["--out", "{tmp}/a", "--seeds", "1,x"], "invalid comma-separated int value: '1,x'"),
        (["--out", "{tmp}/a", "--max-steps", "0"], "--max-steps 0: give a whole number"),
        (["--out", "{tmp}/a", "--checkpoint-steps", "0"], "--checkpoint-steps 0: give a whole number"),
    ],
)
def test_a_wrong_flag_ends_with_one_sentence_and_status_2(
    flags: list[str], words: str, data: Data, no_leftovers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (no_leftovers / "x.txt").write_text("x")
    argv: list[str] = []
    for word in flags:
        filled = word.replace("{tmp}", str(no_leftovers)).replace("{train}", str(data.train_file))
        argv += data.flags if filled == "{data}" else [filled]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert words in error
    assert "Traceback" not in error
    assert [path.name for path in no_leftovers.iterdir()] == ["x.txt"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "train.jsonl is empty"),
        ("not json\n", "cannot be read as jsonl"),
        ('{"sentence1": "a", "label": 1}\n', "no column 'sentence2'; it has sentence1, label"),
        ('{"sentence1": "a", "sentence2": " ", "label": 1}\n', "row 1: column 'sentence2' holds no text"),
        ('{"sentence1": "a", "sentence2": "b", "label": 7}\n', "row 1: label 7 is none of task mrpc's"),
        ('{"sentence1": "a", "sentence2": null, "label": 1}\n', "row 1: column 'sentence2' holds no text"),
    ],
)
def test_a_wrong_data_file_is_named_with_its_row(
    content: str, words: str, data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text(content)
    flags = ["--train-file", str(file), "--validation-file", str(data.validation_file)]
    assert main(["--model", "minilm", *flags, "--out", str(tmp_path / "a")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert words in error
    assert not (tmp_path / "a").exists()


def test_without_network_the_default_names_the_two_ways_that_need_none(tmp_path: Path, data: Data) -> None:
    """The hub is made unreachable, whatever this machine's network is."""
    environment = os.environ | {
        "HF_ENDPOINT": "http://127.0.0.1:1",
        "HF_HOME": str(tmp_path / "hub"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    for flags in ([], data.flags):
        result = subprocess.run(
            [sys.executable, "-m", "train", "--out", str(tmp_path / "a"), *flags],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert result.returncode == 2, result.stderr
        last = result.stderr.strip().splitlines()[-1]
        assert last.startswith("error: ")
        assert "--model minilm" in last
        assert "--train-file" in last
        assert "Traceback" not in result.stderr
        assert not (tmp_path / "a").exists()


def test_a_base_model_given_by_a_relative_path_is_found_from_elsewhere(
    base_model: Callable[[str], Path], data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(base_model("bert"), tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    flags = ["--model", "mine", *data.flags, "--epochs", "1", "--virtual-tokens", "4"]
    assert main([*flags, "--out", "adapter"]) == 0
    monkeypatch.chdir("/")
    assert find_adapter_base(load_adapter(tmp_path / "adapter")).folder == tmp_path / "mine"


def test_an_unknown_type_is_refused_by_name(tmp_path: Path, data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    (tmp_path / "model.safetensors").write_bytes(b"x")
    assert main(["--model", str(tmp_path), *data.flags, "--out", str(tmp_path / "a")]) == 2
    error = capsys.readouterr().err
    assert "is of type 't5', which is not supported. Supported are encoders of type bert" in error
    assert "and decoders of type bloom, gpt2, llama, opt." in error


def test_minilm_is_refused_when_its_weights_are_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import train.fit.loop
    import train.fit.seeds
    import train.model.find

    intact = train.model.find.find_base_model("minilm")
    copy = tmp_path / "model"
    shutil.copytree(intact.folder, copy)
    flip_bit(copy / "model.safetensors", 50_000_000)
    monkeypatch.setattr(train.model.find, "minilm_folder", lambda: copy)
    with pytest.raises(ModelError, match=r"is damaged .* pip install --force-reinstall"):
        train.model.find.find_base_model("minilm")


def test_an_older_adapter_is_replaced_only_when_asked(
    base_model: Callable[[str], Path], data: Data, no_leftovers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = no_leftovers / "a"
    flags = ["--model", str(base_model("bert")), *data.flags, "--epochs", "1", "--virtual-tokens", "4"]
    assert main([*flags, "--out", str(out)]) == 0
    first = load_adapter(out)
    assert main([*flags, "--out", str(out), "--seed", "1"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert load_adapter(out) == first
    assert main([*flags, "--out", str(out), "--seed", "1", "--overwrite"]) == 0
    assert load_adapter(out).sha256 != first.sha256


def test_a_run_that_fails_while_it_writes_leaves_the_older_adapter_untouched(
    base_model: Callable[[str], Path],
    data: Data,
    no_leftovers: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import train.fit.loop
    import train.fit.seeds
    import train.model.find

    out = no_leftovers / "a"
    flags = ["--model", str(base_model("bert")), *data.flags, "--epochs", "1", "--virtual-tokens", "4"]
    assert main([*flags, "--out", str(out)]) == 0
    before = load_adapter(out)

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train.fit.seeds, "finish_adapter", no_space)
    assert main([*flags, "--out", str(out), "--seed", "1", "--overwrite"]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert load_adapter(out) == before


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "tokenizer.json"])
def test_one_flipped_bit_in_an_adapter_is_refused(name: str, adapter: Callable[[str], Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(adapter("bert"), copy)
    flip_bit(copy / name, 101)
    with pytest.raises(AdapterError, match="is damaged"):
        load_adapter(copy)


def test_a_foreign_folder_is_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="There is no adapter folder"):
        load_adapter(tmp_path / "none")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(AdapterError, match=r"lacks training.json, .* \(it holds adapter_config.json\)"):
        load_adapter(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format_version": 1}, "format version 1; this promptfold reads 3"),
        ({"task": None}, "wrong form"),
        ({"task": {}}, "lacks 'text_columns'"),
        ({"baselines": None}, "wrong form"),
        ({"sha256": {"../x": "0"}}, "has no SHA-256 of"),
    ],
)
def test_a_training_json_that_cannot_be_used_is_refused(
    change: dict[str, object], words: str, adapter: Callable[[str], Path], tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(adapter("bert"), copy)
    path = copy / "training.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(AdapterError, match=words):
        load_adapter(copy)
