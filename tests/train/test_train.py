"""``python -m train`` through its entry point: what it writes, reports and refuses. More is in tests/slow/train."""

import json
import math
import re
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import train.fit.seeds
import train.model.find
from tests.conftest import (
    DECODERS,
    MAIN_KINDS,
    POSITIONS,
    VIRTUAL_TOKENS,
    Data,
    Folders,
    family_of,
    flip_bit,
    make_pairs,
    write_jsonl,
)
from tests.train.test_evaluate import check_scores
from train.__main__ import main
from train.adapter.folder import load_adapter
from train.adapter.peft import find_adapter_base
from train.adapter.record import ADAPTER
from train.common.command_line import flag
from train.common.errors import AdapterError, ModelError
from train.common.folder_record import content_of, write_record
from train.config import TrainConfig

pytestmark = pytest.mark.usefixtures("one_thread")

Capture = pytest.CaptureFixture[str]


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


# The adapter


def test_an_adapter_folder_holds_exactly_these_files_one_of_them_a_picture(adapter: Folders) -> None:
    from matplotlib.image import imread

    names = "README.md adapter_config.json adapter_model.safetensors curves.png special_tokens_map.json tokenizer.json"
    found = {path.name for path in adapter("bert").iterdir()}
    assert found == {*names.split(), "tokenizer_config.json", "training.json"}
    assert not adapter("bert").with_name("bert.checkpoints").exists()
    picture = imread(adapter("bert") / "curves.png", format="png")
    assert picture.shape[0] > 300
    assert len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 20  # lines, words and more than one colour


def test_the_adapter_is_the_prompt_and_the_head_and_nothing_of_the_prompt_encoder(adapter: Folders) -> None:
    state = read_state(adapter("bert"))
    assert state.pop("prompt_embeddings").shape == (VIRTUAL_TOKENS, 32)
    # The pooler is part of BERT's head.
    assert set(state) == {
        f"base_model.{module}.{kind}" for module in ("bert.pooler.dense", "classifier") for kind in ("weight", "bias")
    }
    config = json.loads((adapter("bert") / "adapter_config.json").read_text())
    assert (config["peft_type"], config["encoder_reparameterization_type"]) == ("P_TUNING", "MLP")


@pytest.mark.parametrize("kind", MAIN_KINDS)
def test_the_reported_scores_are_those_of_peft_on_the_validation_file(
    kind: str, adapter: Folders, base_model: Folders, data: Data
) -> None:
    family = family_of(kind)
    training = json.loads((adapter(kind) / "training.json").read_text())
    reported = training["validation"]
    check_scores(reported, adapter(kind), base_model(family), data.validation_file, alone=family in DECODERS)
    # Half of the rows are equivalent.
    assert training["baselines"]["always `equivalent`"] == pytest.approx({"accuracy": 0.5, "f1": 2 / 3})
    # The best epoch was kept, and its record is what was loaded again.
    best = max(training["epochs"], key=lambda epoch: (epoch["scores"]["accuracy"], epoch["scores"]["f1"]))
    assert training["best_epoch"] == best["epoch"]
    assert reported == pytest.approx(best["scores"])


@pytest.mark.parametrize("kind", ["roberta-v2", "llama-v2"])
def test_p_tuning_v2_writes_pefts_prefix_tuning_of_one_key_and_value_a_layer(kind: str, adapter: Folders) -> None:
    config = json.loads((adapter(kind) / "adapter_config.json").read_text())
    assert (config["peft_type"], config["num_virtual_tokens"]) == ("PREFIX_TUNING", VIRTUAL_TOKENS)
    # Llama's keys and values have two heads for its four queries.
    width = 16 if kind == "llama-v2" else 32
    assert read_state(adapter(kind))["prompt_embeddings"].shape == (VIRTUAL_TOKENS, 2 * 2 * width)


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
    half = 100 * 1.96 * math.sqrt(accuracy * (1 - accuracy) / 40)
    assert f"- With 40 rows the 95 % confidence interval of the accuracy is about ±{half:.1f} points." in card
    assert "that of the best baseline (cosine of the frozen model's embeddings)." in card
    assert "![Loss and scores per epoch](curves.png)" in card


def test_a_damaged_or_a_foreign_folder_is_no_adapter(adapter: Folders, tmp_path: Path) -> None:
    copy = shutil.copytree(adapter("bert"), tmp_path / "copy")
    flip_bit(copy / "adapter_model.safetensors", 101)
    with pytest.raises(AdapterError, match="is damaged"):
        load_adapter(copy)
    with pytest.raises(AdapterError, match="There is no adapter folder"):
        load_adapter(tmp_path / "none")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(AdapterError, match=r"lacks training.json, .* \(it holds adapter_config.json, copy\)"):
        load_adapter(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format_version": 1}, "format version 1; this promptfold reads 3"),
        ({"task": None}, r"training\.json, task: Input should be"),
        ({"task": {}}, "lacks 'text_columns'"),
        ({"baselines": None}, r"training\.json, baselines: Input should be"),
        ({"sha256": {"../x": "0"}}, "has no SHA-256 of"),
    ],
)
def test_a_training_json_that_cannot_be_used_is_refused(
    change: dict[str, object], words: str, adapter: Folders, tmp_path: Path
) -> None:
    copy = shutil.copytree(adapter("bert"), tmp_path / "copy")
    path = copy / "training.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(AdapterError, match=words):
        load_adapter(copy)


def test_scores_are_read_in_the_order_of_the_tasks_metrics(adapter: Folders, tmp_path: Path) -> None:
    """The first metric decides which of two scores is better."""
    copy = shutil.copytree(adapter("bert"), tmp_path / "copy")
    content = content_of(json.loads((copy / "training.json").read_text()))
    content["task"]["metrics"] = ["f1", "accuracy"]
    (copy / "training.json").unlink()
    write_record(copy, ADAPTER, content, unhashed=["README.md", "curves.png"])
    values = content["validation"]
    assert load_adapter(copy).scores.key == (values["f1"], values["accuracy"])


# Training


@pytest.mark.parametrize("family", ["bloom", "distilbert", "mpnet"])
def test_p_tuning_v2_is_refused_by_name_where_peft_cannot_do_it(
    family: str, base_model: Folders, data: Data, tmp_path: Path, capsys: Capture
) -> None:
    flags = ["--model", str(base_model(family)), *data.flags, "--method", "p-tuning-v2", "--out", str(tmp_path / "a")]
    error = refusal(flags, capsys)
    assert error.startswith("error: --method p-tuning-v2 does not work with ")
    assert f"models of type '{family}'" in error
    assert "Take --method p-tuning, or a model of type bert, " in error
    assert list(tmp_path.iterdir()) == []


def text_ids(base: Path, data: Data) -> list[int]:
    """Token ids of the training texts, one after the other, by transformers alone."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = [json.loads(line) for line in data.train_file.read_text().splitlines()]
    texts = [row[column] for row in rows for column in ("sentence1", "sentence2")]
    return [token for text in texts for token in tokenizer(text, add_special_tokens=False)["input_ids"]]


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


def test_what_takes_long_shows_how_far_it_is(base_model: Folders, data: Data, tmp_path: Path, capsys: Capture) -> None:
    run(base_model("bert"), data, tmp_path / "a", "--batch-size", "16", "--epochs", "3")
    bars = capsys.readouterr().err
    assert "cosine baseline:   0%|          | 0/2 [" in bars  # 64 pairs are 128 sentences
    assert re.search(r"12/12 \[\S+<\S+, .*loss=\d\.\d+\]", bars)  # time gone and time left


def test_the_curves_go_to_tensorboard_when_asked(base_model: Folders, data: Data, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(base_model("bert"), data, tmp_path / "a", "--epochs", "2", "--report-to", "tensorboard", "--seeds", "0,1")
    for seed in (0, 1):
        events = EventAccumulator(str(tmp_path / "a.runs" / f"seed-{seed}")).Reload()
        for name in ("train/loss", "eval/loss", "eval/accuracy", "eval/f1"):
            assert [event.step for event in events.Scalars(name)] == [2, 4]


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


def test_files_of_every_kind_give_the_same_adapter(base_model: Folders, data: Data, tmp_path: Path) -> None:
    """Label names in place of indices, too."""
    import pyarrow
    import pyarrow.csv
    import pyarrow.parquet

    files = [tmp_path / "train.csv", tmp_path / "validation.parquet"]
    writes = (pyarrow.csv.write_csv, pyarrow.parquet.write_table)
    for write, file, source in zip(writes, files, (data.train_file, data.validation_file), strict=True):
        rows = [json.loads(line) for line in source.read_text().splitlines()]
        named = [row | {"label": ("not_equivalent", "equivalent")[row["label"]]} for row in rows]
        write(pyarrow.Table.from_pylist(named), file)
    records = [run(base_model("bert"), read, tmp_path / name) for read, name in ((Data(*files), "a"), (data, "b"))]
    assert records[0]["validation"] == records[1]["validation"]
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]


def test_texts_over_the_limit_are_cut_and_counted(base_model: Folders, tmp_path: Path, capsys: Capture) -> None:
    rows = make_pairs(8, seed=3)
    rows[0]["sentence1"] = " ".join(["word1"] * 500)
    files = [write_jsonl(tmp_path / name, rows) for name in ("t.jsonl", "v.jsonl")]
    run(base_model("roberta"), Data(*files), tmp_path / "a")
    assert f"1 train texts are longer than {POSITIONS - 4} tokens" in capsys.readouterr().out


def test_a_base_model_given_by_a_relative_path_is_found_from_elsewhere(
    base_model: Folders, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(base_model("bert"), tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    run(Path("mine"), data, Path("adapter"))
    monkeypatch.chdir("/")
    assert find_adapter_base(load_adapter(tmp_path / "adapter")).folder == tmp_path / "mine"


def test_an_older_adapter_is_replaced_only_when_asked_and_only_by_a_whole_one(
    base_model: Folders, adapter: Folders, data: Data, no_leftovers: Path, capsys: Capture
) -> None:
    out = shutil.copytree(adapter("bert"), no_leftovers / "a")
    older = load_adapter(out)
    flags = ["--model", str(base_model("bert")), *data.flags, "--epochs", "1", "--out", str(out)]
    assert "--overwrite" in refusal(flags, capsys)
    assert load_adapter(out) == older

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.fit.seeds, "finish_adapter", no_space)
        assert "No space left on device" in refusal([*flags, "--overwrite"], capsys)
    assert load_adapter(out) == older
    assert main([*flags, "--overwrite"]) == 0
    assert load_adapter(out).sha256 != older.sha256


# The command line


def test_the_help_names_the_flag_of_every_setting(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    words = capsys.readouterr().out.replace(",", " ").split()
    assert [item.name for item in fields(TrainConfig) if flag(item.name) not in words] == []


def test_the_defaults_are_the_tutorials() -> None:
    settings: dict[str, Any] = {"model": "roberta-large", "method": "p-tuning", "epochs": 20, "virtual_tokens": 20}
    settings |= {"encoder_hidden_size": 128, "learning_rate": 1e-3, "batch_size": 32, "weight_decay": 0.01}
    assert main.parse(["--out", "x"]) == TrainConfig(out=Path("x"), **settings)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("", "--out"),
        ("--out {tmp}/a --epochs 0", "--epochs 0: give a whole number"),
        ("--out {tmp}/a --epochs two", '--epochs: unable to convert "two" into int'),
        ("--out {tmp}/a --learning-rate -1", "--learning-rate -1.0: give a number above 0"),
        ("--out {tmp}/a --learning-rate nan", "--learning-rate nan"),
        ("--out {tmp}/a --seed -1", "--seed -1"),
        ("--out {tmp}/a --task sst3", "Choose one of: mrpc"),
        ("--out {tmp}/a --train-file {train}", "--validation-file"),
        ("--out {tmp}/a {data} --model {tmp}/none/here", "there is no such folder"),
        ("--out {tmp}/a {data} --model {tmp}", "has no config.json"),
        ("--out {tmp}/a {data} --max-length 400 --model minilm --virtual-tokens 200", "312"),
        ("--out {tmp}/a {data} --model minilm --virtual-tokens 510", "--virtual-tokens"),
        ("--out {tmp}/a --train-file {tmp}/no.csv --validation-file {train}", "no such file"),
        ("--out {tmp}/a --train-file {tmp}/x.txt --validation-file {train}", ".csv, .jsonl, .parquet"),
        ("--out {train} {data}", "is not a folder"),
        ("--out {tmp} {data}", "holds something that is no adapter"),
        ("--out /proc/none/a {data}", "/proc cannot be written"),
        ("--out {train}/a {data}", "cannot be written"),
        ("--bogus", "--help"),
        ("--out {tmp}/a {data} --precision int4", '"int4" for --precision. Choose from: "fp32", "bf16", "fp16"'),
        (
            "--out {tmp}/a {data} --model minilm --precision fp16",
            "needs an NVIDIA GPU, and there is none. Take fp32 or",
        ),
        ("--out {tmp}/a {data} --report-to trackio", "Run: pip install -r requirements.txt trackio"),
        ("--out {tmp}/a {data} --method lora", '"lora" for --method. Choose from: "p-tuning", "p-tuning-v2"'),
        (
            "--out {tmp}/a --method p-tuning-v2 --reparameterization mlp",
            "--reparameterization mlp belongs to --method p-tuning",
        ),
        ("--out {tmp}/a --average 1", "--average 1.0: give a number from 0 to below 1"),
        ("--out {tmp}/a --seeds 1,1", "--seeds names a seed twice"),
        ("--out {tmp}/a --seeds 1,x", '--seeds: unable to convert "x" into int'),
        ("--out {tmp}/a --max-steps 0", "--max-steps 0: give a whole number"),
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


def test_a_batch_that_cannot_be_shared_out_is_refused(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")  # as torchrun and accelerate launch say it
    error = refusal(["--model", "minilm", *data.flags, "--batch-size", "15", "--out", str(tmp_path / "a")], capsys)
    assert "--batch-size 15 cannot be shared out among 2 processes. Give a multiple." in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "train.jsonl is empty"),
        ("not json\n", "line 1 is no JSON"),
        ('{"sentence1": "a", "label": 1}\n', "no column 'sentence2'; it has sentence1, label"),
        ('{"sentence1": "a", "sentence2": " ", "label": 1}\n', "row 1 (line 1): column 'sentence2' holds no text"),
        (
            '{"sentence1": "a", "sentence2": "b", "label": 7}\n',
            "row 1 (line 1): label 7 in column 'label' is none of task mrpc's",
        ),
        ('{"sentence1": "a", "sentence2": null, "label": 1}\n', "row 1 (line 1): column 'sentence2' holds no text"),
    ],
)
def test_a_wrong_data_file_is_named_with_its_row(
    content: str, words: str, data: Data, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "train.jsonl").write_text(content)
    flags = Data(tmp_path / "train.jsonl", data.validation_file).flags
    assert words in refusal(["--model", "minilm", *flags, "--out", str(tmp_path / "a")], capsys)
    assert not (tmp_path / "a").exists()


def test_an_unknown_type_is_refused_by_name(tmp_path: Path, data: Data, capsys: Capture) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    (tmp_path / "model.safetensors").write_bytes(b"x")
    error = refusal(["--model", str(tmp_path), *data.flags, "--out", str(tmp_path / "a")], capsys)
    assert "is of type 't5', which is not supported. Supported are encoders of type bert" in error
    assert "and decoders of type bloom, gpt2, llama, opt." in error


def test_minilm_is_refused_when_its_weights_are_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = shutil.copytree(train.model.find.minilm_folder(), tmp_path / "model")
    flip_bit(copy / "model.safetensors", 50_000_000)
    monkeypatch.setattr(train.model.find, "minilm_folder", lambda: copy)
    with pytest.raises(ModelError, match=r"is damaged .* pip install --force-reinstall"):
        train.model.find.find_base_model("minilm")
