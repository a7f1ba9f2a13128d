"""``python -m train`` through its entry point: what it writes, reports and refuses. More is in tests/slow/train."""

import json
import math
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pytest

import train.model.find
from tests.conftest import MAIN_KINDS, POSITIONS, VIRTUAL_TOKENS, Data, Folders, flip_bit, make_pairs, write_jsonl
from tests.test_command_lines import UNWRITABLE
from tests.train.test_evaluate import Capture, check_scores
from train.__main__ import main
from train.adapter.folder import load_adapter
from train.adapter.peft import find_adapter_base
from train.adapter.record import ADAPTER
from train.common.errors import AdapterError, ModelError
from train.common.folder_record import content_of, write_record
from train.config import TrainConfig

pytestmark = pytest.mark.usefixtures("one_thread")


def run(base: Path, data: Data, out: Path, *flags: str) -> dict[str, Any]:
    """Train on a tiny model, for one epoch unless flags say otherwise, and return training.json."""
    sizes = ["--virtual-tokens", "4", "--encoder-hidden-size", "16", "--epochs", "1"]
    assert main(["--model", str(base), *data.flags, *sizes, *flags, "--out", str(out)]) == 0
    training: dict[str, Any] = json.loads((out / "training.json").read_text())
    return training


def read_state(out: Path) -> dict[str, np.ndarray]:
    """The tensors of an adapter."""
    from safetensors.numpy import load_file

    state: dict[str, np.ndarray] = load_file(out / "adapter_model.safetensors")
    return state


def refusal(argv: list[str], capsys: Capture) -> str:
    """The one sentence with which a command line ends."""
    assert main(argv) == 2
    lines = capsys.readouterr().err.splitlines()  # progress bars come first
    assert "Traceback" not in " ".join(lines)
    assert lines[-1].startswith("error: ")
    return lines[-1]


def test_an_adapter_folder_holds_the_prompt_the_head_and_a_picture(adapter: Folders) -> None:
    from matplotlib.image import imread

    folder = adapter("bert")
    names = "README.md adapter_config.json adapter_model.safetensors curves.png special_tokens_map.json tokenizer.json"
    found = {path.name for path in folder.iterdir()}
    assert found == {*names.split(), "tokenizer_config.json", "training.json"}
    assert not folder.with_name("bert.checkpoints").exists()
    picture = imread(folder / "curves.png", format="png")
    assert picture.shape[0] > 300
    assert len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 20  # lines, words and more than one colour
    state = read_state(folder)
    assert state.pop("prompt_embeddings").shape == (VIRTUAL_TOKENS, 32)
    # The pooler is part of BERT's head. Nothing of the prompt encoder is kept.
    modules = ("bert.pooler.dense", "classifier")
    assert set(state) == {f"base_model.{module}.{kind}" for module in modules for kind in ("weight", "bias")}
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["encoder_reparameterization_type"]) == ("P_TUNING", "MLP")


@pytest.mark.parametrize("kind", MAIN_KINDS)
def test_the_reported_scores_are_those_of_peft_on_the_validation_file(
    kind: str, adapter: Folders, base_model: Folders, data: Data
) -> None:
    training = json.loads((adapter(kind) / "training.json").read_text())
    reported = training["validation"]
    check_scores(reported, kind, adapter, base_model, data.validation_file)
    # Half of the rows are equivalent.
    assert training["baselines"]["always `equivalent`"] == pytest.approx({"accuracy": 0.5, "f1": 2 / 3})
    # The best epoch was kept, and its record is what was loaded again.
    best = max(training["epochs"], key=lambda epoch: (epoch["scores"]["accuracy"], epoch["scores"]["f1"]))
    assert training["best_epoch"] == best["epoch"]
    assert reported == pytest.approx(best["scores"])
    if kind.endswith("-v2"):
        # One key and value a layer. Llama's have two heads for its four queries.
        shape = (VIRTUAL_TOKENS, 2 * 2 * (16 if kind == "llama-v2" else 32))
        assert read_state(adapter(kind))["prompt_embeddings"].shape == shape
        config = json.loads((adapter(kind) / "adapter_config.json").read_text())
        assert (config["peft_type"], config["num_virtual_tokens"]) == ("PREFIX_TUNING", VIRTUAL_TOKENS)


def test_the_model_card_names_the_command_the_seed_and_the_scores(adapter: Folders) -> None:
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
    low, high = training["intervals"]["accuracy"]
    assert low < accuracy < high
    # The normal approximation of a share's interval.
    assert (high - low) / 2 == pytest.approx(1.96 * math.sqrt(accuracy * (1 - accuracy) / 40), rel=0.2)
    assert f"95 % intervals (bootstrap): accuracy {100 * low:.1f} to {100 * high:.1f}, F1 " in card
    assert "that of the best baseline (cosine of the frozen model's embeddings)." in card
    assert "![Loss and scores per epoch](curves.png)" in card


def test_what_is_no_adapter_is_refused_with_the_reason(adapter: Folders, tmp_path: Path) -> None:
    path = Path(shutil.copytree(adapter("bert"), tmp_path / "copy")) / "training.json"
    (tmp_path / "adapter_config.json").write_text("{}")
    lacking = r"lacks training.json, .* \(it holds adapter_config.json, copy\)"
    for folder, words in ((tmp_path / "none", "There is no adapter folder"), (tmp_path, lacking)):
        with pytest.raises(AdapterError, match=words):
            load_adapter(folder)
    record = json.loads(path.read_text())
    changes: dict[str, dict[str, object]] = {
        "format version 1; this promptfold reads 3": {"format_version": 1},
        r"training\.json, task: Input should be": {"task": None},
        "lacks 'text_columns'": {"task": {}},
        "method: Value error, methods are p-tuning; p-tuning-v2;": {"method": "lora"},
        "has no SHA-256 of": {"sha256": {"../x": "0"}},
    }
    for words, change in changes.items():
        path.write_text(json.dumps(record | change))
        with pytest.raises(AdapterError, match=words):
            load_adapter(path.parent)
    # The first of the task's metrics decides which of two scores is better.
    content = content_of(record) | {"task": record["task"] | {"metrics": ["f1", "accuracy"]}}
    path.unlink()
    write_record(path.parent, ADAPTER, content, unhashed=["README.md", "curves.png"])
    scores = record["validation"]
    assert load_adapter(path.parent).scores.key == (scores["f1"], scores["accuracy"])


def text_ids(base: Path, data: Data) -> list[int]:
    """Token ids of the training texts, one after the other, by transformers alone."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = [json.loads(line) for line in data.train_file.read_text().splitlines()]
    texts = [row[column] for row in rows for column in ("sentence1", "sentence2")]
    return [token for text in texts for token in tokenizer(text, add_special_tokens=False)["input_ids"]]


@pytest.mark.parametrize(
    ("label", "flags"),
    [
        (lambda row: "ab"[row % 2], "--learning-rate 1e9"),
        (lambda row: "ab"[row % 2], "--learning-rate 1 --weight-decay 1e9 --average 0.5"),
        (lambda row: "abc"[row % 3], "--learning-rate 1e9 --method p-tuning-v2"),
        (lambda row: ["a,b", "b"][row % 2], "--kind multi_label --learning-rate 1e9"),
        (lambda row: row, "--kind regression --learning-rate 1e9"),
        (lambda row: row * 1e30, "--kind regression"),
    ],
)
def test_a_training_that_diverges_keeps_nothing(
    label: Callable[[int], object], flags: str, base_model: Folders, tmp_path: Path, capsys: Capture
) -> None:
    rows = [{"text": f"word{row} word{row + 1}", "label": label(row)} for row in range(24)]
    files, out = (
        [str(write_jsonl(tmp_path / name, part)) for name, part in (("t.jsonl", rows), ("v.jsonl", rows[:12]))],
        tmp_path / "out",
    )
    words = f"--virtual-tokens 4 --encoder-hidden-size 16 --epochs 2 --batch-size 4 --text-columns text {flags}".split()
    words += [
        "--train-file",
        files[0],
        "--validation-file",
        files[1],
        "--model",
        str(base_model("bert")),
        "--out",
        str(out),
    ]
    error = refusal(words, capsys)
    assert re.search(r"the training has diverged before any epoch was good\. Take a smaller --learning-rate", error)
    assert {path.name for path in tmp_path.iterdir()} == {"t.jsonl", "v.jsonl"}


@pytest.mark.parametrize(("open_output", "status", "printed"), UNWRITABLE, ids=["no reader", "full"])
def test_a_training_whose_lines_nobody_reads_is_kept(
    open_output: Callable[[], TextIO],
    status: int,
    printed: str,
    base_model: Folders,
    data: Data,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    words = f"--virtual-tokens 4 --encoder-hidden-size 16 --max-steps 2 --out {tmp_path / 'a'}".split()
    with open_output() as output:
        monkeypatch.setattr(sys, "stdout", output)
        assert main(["--model", str(base_model("bert")), *data.flags, *words]) == status
    assert capsys.readouterr().err.endswith(printed)
    load_adapter(tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_of_a_training_that_diverges_later_a_good_epoch_is_kept(
    bad: float, base_model: Folders, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    from train.fit.trainer import PromptTrainer

    def overflow(self: PromptTrainer) -> None:
        if self.state.global_step == 5:  # of 4 an epoch
            for tensor in self._trainable().values():
                tensor.data.fill_(bad)

    monkeypatch.setattr(PromptTrainer, "update_average", overflow)
    training = run(base_model("bert"), data, tmp_path / "a", "--epochs", "3", "--batch-size", "16")
    said = capsys.readouterr().out
    assert (
        "epoch 2: the training loss is nan and the validation loss nan, so the training has diverged. It ends" in said
    )
    assert "epoch 1 is kept; better may be a smaller --learning-rate" in said
    assert (training["best_epoch"], [epoch["epoch"] for epoch in training["epochs"]]) == (1, [1])
    assert all(np.isfinite(tensor).all() for tensor in read_state(tmp_path / "a").values())


@pytest.mark.parametrize("kind", ["bert", "bert-v2"])
@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_an_adapter_with_numbers_that_are_not_finite_is_refused(
    kind: str, bad: float, adapter: Folders, data: Data, tmp_path: Path, capsys: Capture
) -> None:
    from safetensors.numpy import save_file

    from export.__main__ import main as export
    from train.evaluate import main as evaluate

    folder = shutil.copytree(adapter(kind), tmp_path / "a")
    state = read_state(folder)
    name = max(state)
    state[name].flat[0] = bad
    save_file(state, folder / "adapter_model.safetensors")
    record = content_of(json.loads((folder / "training.json").read_text()))
    (folder / "training.json").unlink()
    write_record(folder, ADAPTER, record, unhashed=["README.md", "curves.png"])
    for command, words in ((evaluate, ["--file", str(data.validation_file)]), (export, ["--out", str(tmp_path / "b")])):
        capsys.readouterr()
        assert command([str(folder), *words]) == 2
        path = folder / "adapter_model.safetensors"
        error = capsys.readouterr().err
        assert f"error: {path} holds numbers in {name} that are not finite. Train the adapter again" in error
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("name", ["none"])
def test_the_prompt_starts_from_the_vocabulary(name: str, base_model: Folders, data: Data, tmp_path: Path) -> None:
    """Next to nothing is learned here, so what is saved is the beginning: [CLS], then words of the training data."""
    from transformers import AutoModel

    run(base_model("bert"), data, tmp_path / "a", "--reparameterization", name, "--learning-rate", "1e-12")
    vocabulary = AutoModel.from_pretrained(base_model("bert")).get_input_embeddings().weight.detach().numpy()
    ids = [0, *text_ids(base_model("bert"), data)[:3]]
    assert np.abs(read_state(tmp_path / "a")["prompt_embeddings"] - vocabulary[ids]).max() < 1e-6


@pytest.mark.parametrize("family", ["llama"])
def test_p_tuning_v2_starts_from_real_words(family: str, base_model: Folders, data: Data, tmp_path: Path) -> None:
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


def test_a_base_model_by_a_relative_path_is_found_from_elsewhere_and_long_texts_are_cut(
    base_model: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    rows = make_pairs(8, seed=3)
    rows[0]["sentence1"] = " ".join(["word1"] * 500)
    files = [write_jsonl(tmp_path / name, rows[start:]) for name, start in (("t.jsonl", 0), ("v.jsonl", 6))]
    shutil.copytree(base_model("roberta"), tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    run(Path("mine"), Data(*files), Path("adapter"))
    assert f"1 train texts are longer than {POSITIONS - 4} tokens" in capsys.readouterr().out
    monkeypatch.chdir("/")
    assert find_adapter_base(load_adapter(tmp_path / "adapter")).folder == tmp_path / "mine"


def test_an_older_adapter_is_replaced_only_when_asked(
    base_model: Folders, adapter: Folders, data: Data, no_leftovers: Path, capsys: Capture
) -> None:
    """And only by a whole one, as tests/test_faults.py says of any folder."""
    out = shutil.copytree(adapter("bert"), no_leftovers / "a")
    older = load_adapter(out)
    flags = ["--model", str(base_model("bert")), *data.flags, "--epochs", "1", "--out", str(out)]
    assert "--overwrite" in refusal(flags, capsys)
    assert load_adapter(out) == older
    assert main([*flags, "--overwrite"]) == 0
    assert load_adapter(out).sha256 != older.sha256


def test_the_defaults_are_the_tutorials() -> None:
    settings: dict[str, Any] = {"model": "roberta-large", "method": "p-tuning", "epochs": 20, "virtual_tokens": 20}
    settings |= {"encoder_hidden_size": 128, "learning_rate": 1e-3, "batch_size": 32, "weight_decay": 0.01}
    assert main.parse(["--out", "x"]) == TrainConfig(out=Path("x"), **settings)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--out {tmp}/a --epochs 0", "--epochs 0: give a whole number"),
        ("--out {tmp}/a --learning-rate -1", "--learning-rate -1.0: give a number above 0"),
        ("--out {tmp}/a --learning-rate nan", "--learning-rate nan"),
        ("--out {tmp}/a --learning-rate 1e38", "--learning-rate 1e+38: give a number above 0 and at most 1e+09"),
        (
            "--out {tmp}/a --prompt-learning-rate 1e38",
            "--prompt-learning-rate 1e+38: give a number above 0 and at most",
        ),
        ("--out {tmp}/a --weight-decay 1e30", "--weight-decay 1e+30: give a number from 0 to 1e+09"),
        ("--out {tmp}/a --seed -1", "--seed -1"),
        ("--out {tmp}/a --task sst3", "Choose one of: mrpc"),
        ("--out {tmp}/a --train-file {train}", "--validation-file"),
        ("--out {tmp}/a {data} --model {tmp}/none/here", "there is no such folder"),
        ("--out {tmp}/a {data} --model {tmp}", "has no config.json"),
        ("--out {tmp}/a {data} --max-length 400 --model minilm --virtual-tokens 200", "312"),
        ("--out {tmp}/a {data} --model minilm --virtual-tokens 510", "--virtual-tokens"),
        ("--out {tmp}/a --train-file {tmp}/no.csv --validation-file {train}", "no such file"),
        ("--out {train} {data}", "is not a folder"),
        ("--out {tmp} {data}", "holds something that is no adapter"),
        ("--out /proc/none/a {data}", "/proc cannot be written"),
        ("--out {train}/a {data}", "cannot be written"),
        ("--out {tmp}/a {data} --model minilm --precision fp16", "needs an NVIDIA GPU, and there is none. Take fp32"),
        ("--out {tmp}/a {data} --report-to trackio", "Run: pip install -r requirements.txt trackio"),
        ("--out {tmp}/a --method p-tuning-v2 --reparameterization mlp", "mlp belongs to --method p-tuning"),
        ("--out {tmp}/a --average 1", "--average 1.0: give a number from 0 to below 1"),
        ("--out {tmp}/a --seeds 1,1", "--seeds names a seed twice"),
        ("--out {tmp}/a --max-steps 0", "--max-steps 0: give a whole number"),
        (
            "--out {tmp}/a --batch-size 99999999999999999999",
            "--batch-size 99999999999999999999: give a whole number from 1",
        ),
        (
            "--out {tmp}/a --max-length 99999999999999999999",
            "--max-length 99999999999999999999: give a whole number from 1",
        ),
        (
            "--out {tmp}/a {data} --model minilm --encoder-hidden-size 1000000000",
            "bytes. Error code 12 (Cannot allocate memory)). Give a smaller --encoder-hidden-size, or the process more.",
        ),
        ("--out {tmp}/a --checkpoint-steps 0", "--checkpoint-steps 0: give a whole number"),
    ],
)
@pytest.mark.usefixtures("on_cpu")
def test_a_wrong_flag_ends_with_one_sentence_and_status_2(
    flags: str, words: str, data: Data, no_leftovers: Path, capsys: Capture
) -> None:
    (no_leftovers / "x.txt").write_text("x")
    filled = flags.format(tmp=no_leftovers, train=data.train_file, data=" ".join(data.flags))
    assert words in refusal(filled.split(), capsys)
    assert [path.name for path in no_leftovers.iterdir()] == ["x.txt"]


def test_what_the_flags_alone_do_not_show_is_refused_too(
    base_model: Folders, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    words = [*data.flags, "--out", str(tmp_path / "a"), "--model"]
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    (tmp_path / "model.safetensors").write_bytes(b"x")
    error = refusal([*words, str(tmp_path)], capsys)
    assert "is of type 't5', which is not supported: it is an encoder with a decoder" in error
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    error = refusal([*words, str(tmp_path)], capsys)
    assert "is of type 'clip', which is not supported: transformers has no text classifier of this type." in error
    assert "Take an encoder (bert, roberta, modernbert …) or a decoder (gpt2, llama, qwen3 …)." in error
    for family in ("bloom", "distilbert", "mpnet"):  # where PEFT cannot do it
        error = refusal([*words, str(base_model(family)), "--method", "p-tuning-v2"], capsys)
        start = f"error: --method p-tuning-v2 does not work with .*models of type '{family}'.*"
        assert re.match(f"{start}Take --method p-tuning, or a model of type bert, ", error)
    monkeypatch.setenv("WORLD_SIZE", "2")  # as torchrun and accelerate launch say it
    error = refusal([*words, "minilm", "--batch-size", "15"], capsys)
    assert "--batch-size 15 cannot be shared out among 2 processes. Give a multiple." in error
    assert not (tmp_path / "a").exists()


def test_minilm_is_refused_when_its_weights_are_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = shutil.copytree(train.model.find.minilm_folder(), tmp_path / "model")
    flip_bit(copy / "model.safetensors", 50_000_000)
    monkeypatch.setattr(train.model.find, "minilm_folder", lambda: copy)
    with pytest.raises(ModelError, match=r"is damaged .* pip install --force-reinstall"):
        train.model.find.find_base_model("minilm")
