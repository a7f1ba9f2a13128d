"""``python -m train`` through its entry point: what it writes, what it reports, what it refuses."""

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score

from tests.conftest import (
    FAMILIES,
    POSITIONS,
    ROOT,
    VIRTUAL_TOKENS,
    Data,
    flip_bit,
    make_pairs,
    peft_logits,
    write_jsonl,
)
from train.__main__ import main
from train.adapter import find_adapter_base, load_adapter
from train.config import TrainConfig, parse_config
from train.errors import AdapterError, ModelError


def test_an_adapter_folder_holds_exactly_these_files(adapter: Callable[[str], Path]) -> None:
    assert {path.name for path in adapter("bert").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
    }


def test_the_adapter_is_the_prompt_and_the_head_and_nothing_of_the_prompt_encoder(
    adapter: Callable[[str], Path],
) -> None:
    from safetensors.numpy import load_file

    state = load_file(adapter("bert") / "adapter_model.safetensors")
    assert state.pop("prompt_embeddings").shape == (VIRTUAL_TOKENS, 32)
    # The pooler is part of BERT's head.
    assert set(state) == {
        f"base_model.{module}.{kind}" for module in ("bert.pooler.dense", "classifier") for kind in ("weight", "bias")
    }
    config = json.loads((adapter("bert") / "adapter_config.json").read_text())
    assert (config["peft_type"], config["encoder_reparameterization_type"]) == ("P_TUNING", "MLP")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reported_scores_are_those_of_peft_on_the_validation_file(
    family: str, adapter: Callable[[str], Path], base_model: Callable[[str], Path], data: Data
) -> None:
    from transformers import AutoTokenizer

    rows = [json.loads(line) for line in data.validation_file.read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(base_model(family))
    batch = tokenizer(
        [row["sentence1"] for row in rows], [row["sentence2"] for row in rows], padding=True, return_tensors="np"
    )
    predicted = peft_logits(adapter(family), base_model(family), dict(batch)).argmax(axis=-1)
    expected = [row["label"] for row in rows]

    training = json.loads((adapter(family) / "training.json").read_text())
    assert training["validation"] == pytest.approx(
        {"accuracy": accuracy_score(expected, predicted), "f1": f1_score(expected, predicted)}
    )
    ones = np.ones(len(expected))
    assert training["always_positive"] == pytest.approx(
        {"accuracy": accuracy_score(expected, ones), "f1": f1_score(expected, ones)}
    )
    # What was kept is the best epoch, and its record is what was loaded again.
    best = max(training["epochs"], key=lambda epoch: (epoch["accuracy"], epoch["f1"]))
    assert training["best_epoch"] == best["epoch"]
    assert training["validation"]["accuracy"] == pytest.approx(best["accuracy"])
    assert training["validation"]["f1"] == pytest.approx(best["f1"])


def test_an_earlier_epoch_is_kept_when_the_later_ones_are_worse(
    base_model: Callable[[str], Path], data: Data, tmp_path: Path
) -> None:
    """A learning rate that soon ruins the model: the last epoch must not be what is saved."""
    out = tmp_path / "adapter"
    flags = ["--model", str(base_model("bert")), *data.flags, "--virtual-tokens", "4", "--encoder-hidden-size", "16"]
    assert main([*flags, "--out", str(out), "--epochs", "6", "--learning-rate", "0.3", "--seed", "5"]) == 0
    training = json.loads((out / "training.json").read_text())
    accuracies = [epoch["accuracy"] for epoch in training["epochs"]]
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
    for value in training["validation"].values():
        assert f"{100 * value:.1f}" in card


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
        task="mrpc",
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
    ],
)
def test_a_wrong_flag_ends_with_one_sentence_and_status_2(
    flags: list[str], words: str, data: Data, no_leftovers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (no_leftovers / "x.txt").write_text("x")
    argv: list[str] = []
    for flag in flags:
        filled = flag.replace("{tmp}", str(no_leftovers)).replace("{train}", str(data.train_file))
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


def test_a_decoder_is_refused_by_name(tmp_path: Path, data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "model.safetensors").write_bytes(b"x")
    assert main(["--model", str(tmp_path), *data.flags, "--out", str(tmp_path / "a")]) == 2
    assert "'gpt2', which is not supported. Supported are encoders of type bert" in capsys.readouterr().err


def test_minilm_is_refused_when_its_weights_are_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import train.model

    intact = train.model.find_base_model("minilm")
    copy = tmp_path / "model"
    shutil.copytree(intact.folder, copy)
    flip_bit(copy / "model.safetensors", 50_000_000)
    monkeypatch.setattr(train.model, "_minilm_folder", lambda: copy)
    with pytest.raises(ModelError, match=r"is damaged .* pip install --force-reinstall"):
        train.model.find_base_model("minilm")


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
    import train.loop

    out = no_leftovers / "a"
    flags = ["--model", str(base_model("bert")), *data.flags, "--epochs", "1", "--virtual-tokens", "4"]
    assert main([*flags, "--out", str(out)]) == 0
    before = load_adapter(out)

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train.loop, "finish_adapter", no_space)
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
        ({"format_version": 2}, "format version 2"),
        ({"labels": None}, "wrong form"),
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
