"""``python -m export.bench`` through its entry point, on tiny models; no figure of speed is asserted anywhere."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from export.bench.__main__ import main
from export.bench.config import Cell, Shape
from export.bench.engines import ENGINES, OURS, PEFT, PLAIN, Inputs, Measured, Timed
from export.bench.flops import Dimensions
from export.bench.prepare import Prepared
from export.bench.report import compare, summarise
from export.bench.worker import padded_on_the_left
from tests.conftest import VIRTUAL_TOKENS, Data, family_of
from train.common.console import quiet_transformers
from train.data.tasks import MRPC

Folders = Callable[[str], Path]

QUICK = [
    "--rounds",
    "1",
    "--threads",
    "1",
    "--pause",
    "0",
    "--min-runs",
    "2",
    "--max-runs",
    "2",
    "--budget-seconds",
    "0",
]


def run(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], str]:
    """The JSON document of a command, and all lines before it."""
    assert main([*words, *QUICK]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    return json.loads(last), "\n".join(lines)


def check_engines(document: dict[str, Any], wanted: list[str]) -> dict[str, dict[str, Any]]:
    """None is left out, each has figures or a reason, and fp32 means the same everywhere."""
    engines = {item["engine"]: item for item in document["engines"]}
    assert list(engines) == wanted
    for item in engines.values():
        if item["status"] == "not run":
            assert item["reason"]
            assert item["cells"] == []
            continue
        assert (item["status"], item["reason"]) == ("measured", "")
        assert item["max_logit_difference"] < (1e-3 if item["precision"] == "fp32" else 1.0)
        assert min(item["load_seconds"], item["peak_memory_mib"], item["file_mib"]) > 0
        texts = {cell["cell"]: cell["texts"] for cell in document["cells"]}
        for cell in item["cells"]:
            assert 0 < cell["latency_ms"] < math.inf
            assert cell["pairs_per_second"] == pytest.approx(1000 * texts[cell["cell"]] / cell["latency_ms"])
            assert cell["gflop_per_second"] == pytest.approx(1000 * cell["gflop"] / cell["latency_ms"])
            assert cell["runs"] == 2
            assert cell["peak_share"] > 0
    return engines


def test_every_engine_is_measured_on_every_cell_or_says_why_not(
    adapter: Folders, bundle: Folders, data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    no_openvino = tmp_path / "python"
    no_openvino.write_text("#!/bin/sh\necho 'no module named openvino' >&2\nexit 3\n")
    no_openvino.chmod(0o755)
    wanted = ["peft-eager", "peft-eager-fp16", "plain-fp32", "plain-int8", "openvino-int8", "ours-fp32", "ours-fp16"]
    words = [str(adapter("bert")), str(bundle("bert")), "--file", str(data.validation_file), "--shapes", "1x8,3x11"]
    words += ["--engines", ",".join(wanted), "--openvino-python", str(no_openvino), "--png", str(tmp_path / "a.png")]
    document, lines = run(words, capsys)

    engines = check_engines(document, wanted)
    reasons = {name: item["reason"] for name, item in engines.items() if item["status"] == "not run"}
    assert reasons == {
        "peft-eager-fp16": "runs on cuda only",
        "openvino-int8": "its process ended with exit code 3 (no module named openvino)",
        "ours-fp16": f"{bundle('bert')} holds no fp16 graph, only fp32",
    }
    for name, reason in reasons.items():
        assert f"{name}: not run: {reason}" in lines
    for name, item in engines.items():
        if name not in reasons:
            tutorial = ["file-as-tutorial"] if name == "peft-eager" else []
            assert [cell["cell"] for cell in item["cells"]] == ["1x8", "3x11", "file", *tutorial]
            # Quality stands beside speed.
            assert set(item["scores"]) == {"accuracy", "f1"}
            assert item["label_flips"] <= (0 if item["precision"] == "fp32" else 40)
            assert all(len(cell["speedup_per_round"]) == 1 for cell in item["cells"])
    # The rows were answered in their own order, whatever the batches: else this would be chance.
    assert engines["ours-fp32"]["scores"] == pytest.approx(
        json.loads((adapter("bert") / "training.json").read_text())["validation"]
    )
    assert [best["cell"] for best in document["best"]] == ["1x8", "3x11", "file"]
    assert {best["ours"] for best in document["best"]} == {"ours-fp32"}
    assert all(best["peer"] in {"peft-eager", "plain-fp32", "plain-int8"} for best in document["best"])
    assert document["best"][2]["tutorial_speedup"] > 0
    assert {peak["precision"] for peak in document["peaks"]} == {"fp32", "bf16", "int8"}
    assert (document["rounds"], document["threads"], document["device"]) == (1, 1, "cpu")
    assert "core" in document["machine"]
    with Image.open(tmp_path / "a.png") as image:
        image.verify()
        assert image.format == "PNG"


def test_a_decoder_is_compared_too(
    adapter: Folders, bundle: Folders, data: Data, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = ["peft-eager", "plain-fp32", "ours-fp32"]
    words = [str(adapter("llama")), str(bundle("llama")), "--file", str(data.validation_file), "--shapes", "2x9"]
    document, _ = run([*words, "--engines", ",".join(wanted)], capsys)
    engines = check_engines(document, wanted)
    assert [item["status"] for item in engines.values()] == ["measured"] * 3
    assert engines["plain-fp32"]["scores"] == engines["ours-fp32"]["scores"]


def test_random_weights_in_the_shape_of_a_model(base_model: Folders, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = ["peft-eager-bf16", "ours-fp32", "ours-int8"]
    words = ["--shape-of", str(base_model("roberta")), "--shapes", "1x20", "--engines", ",".join(wanted)]
    document, _ = run(words, capsys)
    engines = check_engines(document, wanted)
    assert [item["status"] for item in engines.values()] == ["measured"] * 3
    assert document["dimensions"]["virtual_tokens"] == 20
    # Without PEFT eager there is nothing to be a ratio of, and no file, so nothing to score.
    assert engines["ours-int8"]["cells"][0]["speedup"] is None
    assert engines["ours-int8"]["scores"] is None


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("", "Give an ADAPTER and the BUNDLE"),
        ("{adapter}", "Give an ADAPTER and the BUNDLE"),
        (
            "{adapter} {bundle} --engines ours-int4",
            "--engines ours-int4: there is no such engine. Choose from peft-eager",
        ),
        ("{adapter} {bundle} --shapes 1", "--shapes 1: write texts×tokens, such as 8x60"),
        ("{adapter} {bundle} --shapes 0x5", "--shapes 0x5: write"),
        ("{adapter} {bundle} --shapes ,", "There is nothing to time"),
        ("{adapter} {bundle} --rounds 0", "--rounds 0: give a whole number of at least 1"),
        ("{adapter} {bundle} --threads 0", "--threads 0: give"),
        ("{adapter} {bundle} --pause -1", "--pause -1: give seconds"),
        ("{adapter} {bundle} --device tpu", "--device tpu: choose cpu or cuda"),
        ("{adapter} {bundle} --openvino-python nowhere", "--openvino-python nowhere: there is no such program"),
        ("{adapter} {bundle} --png {tmp}/no/a.png", "in a folder that exists"),
        ("{adapter} {bundle} --png {tmp}/a.jpg", "give a name that ends in .png"),
        ("{adapter} {bundle} --shape-of roberta-large", "makes its own adapter"),
        ("--shape-of roberta-large --file {tmp}/f.jsonl", "random weights, which score nothing"),
        ("--shape-of roberta-huge", "give roberta-large, or a folder that holds a model's config.json"),
        ("{adapter} {bundle} --what", "unrecognized arguments: --what"),
    ],
)
def test_what_cannot_be_used_is_refused_at_once(
    flags: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = flags.format(adapter=tmp_path / "a", bundle=tmp_path / "b", tmp=tmp_path)
    assert main(flags.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert words in error


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("{adapter} {tmp}", "is no bundle of promptfold"),
        ("{adapter} {other}", "was not made from"),
        ("{adapter} {bundle} --shapes 1x44", "--shapes 1x44: {adapter} reads at most 43 tokens. Give shorter texts."),
    ],
)
def test_folders_that_do_not_fit_are_refused(
    flags: str, words: str, adapter: Folders, bundle: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"adapter": adapter("bert"), "bundle": bundle("bert"), "other": bundle("llama"), "tmp": tmp_path}
    assert main(flags.format(**places).split()) == 2
    assert words.format(**places) in capsys.readouterr().err


def test_a_gpu_that_is_not_there_is_refused(
    adapter: Folders, bundle: Folders, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main([str(adapter("bert")), str(bundle("bert")), "--shapes", "1x8", "--device", "cuda"]) == 2
    assert "Leave it out to compare on the CPU." in capsys.readouterr().err


def count_multiply_adds(module: Any, batch: dict[str, Any]) -> int:
    """What PyTorch's own counter says of a forward pass."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        module(**batch)
    return counter.get_total_flops() // 2


def dimensions(config: Any, kind: str) -> Dimensions:
    return Dimensions.of(
        config,
        labels=2,
        is_decoder=family_of(kind) in {"gpt2", "llama"},
        virtual_tokens=VIRTUAL_TOKENS,
        in_every_layer=kind.endswith("-v2"),
    )


def token_ids(batch_size: int, length: int) -> dict[str, Any]:
    import torch

    size = (batch_size, length)
    return {"input_ids": torch.full(size, 7), "attention_mask": torch.ones(size, dtype=torch.long)}


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta", "gpt2", "llama"])
def test_the_count_of_a_whole_model_is_that_of_pytorchs_own_counter(family: str, base_model: Folders) -> None:
    """PEFT's arithmetic is the plain model's, run on prompt and text together."""
    from transformers import AutoModelForSequenceClassification

    with quiet_transformers():
        model = AutoModelForSequenceClassification.from_pretrained(
            base_model(family), num_labels=2, attn_implementation="eager"
        ).eval()
    model.config.pad_token_id = 1
    batch_size, length = 3, 11
    counted = count_multiply_adds(model, token_ids(batch_size, VIRTUAL_TOKENS + length))
    if family in {"gpt2", "llama"}:
        # transformers lets the head see every row, of which one is read.
        counted -= batch_size * (VIRTUAL_TOKENS + length - 1) * model.config.hidden_size * 2
    if family == "llama":
        # Rotary embedding makes its angles by an outer product.
        counted -= model.config.head_dim // 2 * (VIRTUAL_TOKENS + length)
    assert dimensions(model.config, family).multiply_adds(PEFT, batch_size, length) == counted


@pytest.mark.parametrize("kind", ["bert", "bert-v2", "roberta", "gpt2-v2"])
def test_the_count_of_ours_is_what_the_folded_model_computes(kind: str, adapter: Folders) -> None:
    import torch

    from export.fold.rewrites.encoder import CpuEncoder
    from train.adapter.folder import load_adapter
    from train.adapter.peft import find_adapter_base, load_prompted_classifier

    loaded = load_adapter(adapter(kind))
    classifier = load_prompted_classifier(loaded, find_adapter_base(loaded), attention="eager")
    batch = token_ids(3, 11)
    module: torch.nn.Module = classifier
    if kind == "gpt2-v2":
        classifier.freeze_prompt()
    else:
        module = CpuEncoder(classifier).eval()
        if "bert" in kind.partition("-")[0] and kind != "roberta":
            batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
    assert dimensions(classifier.config, kind).multiply_adds(OURS, 3, 11) == count_multiply_adds(module, batch)


def test_ours_computes_less_and_a_decoders_prompt_costs_peft_alone() -> None:
    encoder = Dimensions(
        hidden=384,
        wide=1536,
        wide_products=2,
        keys=384,
        heads=12,
        layers=6,
        labels=2,
        is_decoder=False,
        has_dense_head=True,
        virtual_tokens=20,
        in_every_layer=False,
    )
    # Five layers of six, and one row of the last.
    assert 5 / 6 < encoder.multiply_adds(OURS, 1, 60) / encoder.multiply_adds(PLAIN, 1, 60) < 0.87
    assert encoder.multiply_adds(PLAIN, 1, 60) == encoder.multiply_adds(PEFT, 1, 60)


def measured(
    latencies_ms: dict[str, list[float]], *, difference: float = 0.0, labels: list[int] | None = None
) -> Measured:
    """What a process could have answered."""
    return Measured(
        library="",
        note="",
        load_seconds=1.0,
        peak_memory_mib=1.0,
        gpu_memory_mib=None,
        file_bytes=2**20,
        max_logit_difference=difference,
        cells={name: Timed(9.0, tuple(values)) for name, values in latencies_ms.items()},
        predictions={} if labels is None else {"file": labels},
    )


def test_ratios_are_of_one_round_and_figures_are_medians_of_rounds() -> None:
    prepared = Prepared(
        adapter=Path("a"),
        bundle=Path("b"),
        task_name="a",
        model="a",
        inputs=Path("i"),
        cells=(Cell("1x8", "", 1, (Shape(1, 8),)), Cell("file", "", 4, (Shape(4, 8),))),
        dimensions=Dimensions(8, 16, 2, 8, 2, 2, 2, False, True, 2, False),
        pad_token_id=0,
        is_decoder=False,
        graphs={},
        absent={},
        task=MRPC,
        expected=(0, 1, 1, 0),
        machine="",
        versions={},
    )
    right, wrong = [0, 1, 1, 0], [0, 1, 0, 0]
    rounds: list[dict[str, Measured | str]] = [
        {
            "peft-eager": measured({"1x8": [10, 10, 40], "file": [8]}, labels=right),
            "plain-fp32": measured({"1x8": [1, 1, 1], "file": [1]}, difference=0.5, labels=wrong),
            "plain-int8": measured({"1x8": [5, 5, 5], "file": [4]}, difference=0.5, labels=wrong),
            "openvino-int8": "no",
            "ours-int8": measured({"1x8": [2, 2, 2], "file": [2]}, labels=right),
        },
        {
            "peft-eager": measured({"1x8": [30, 30, 30], "file": [8]}, labels=right),
            "plain-fp32": measured({"1x8": [1, 1, 1], "file": [1]}, labels=wrong),
            "plain-int8": measured({"1x8": [10, 10, 10], "file": [4]}, labels=wrong),
            "openvino-int8": "no",
            "ours-int8": measured({"1x8": [3, 3, 3], "file": [2]}, labels=right),
        },
    ]
    results = summarise(prepared, rounds, [])
    by_name = {result.engine: result for result in results}
    assert [result.status for result in results] == ["measured", "wrong", "measured", "not run", "measured"]
    assert "differs from PEFT's by 0.5" in by_name["plain-fp32"].reason
    ours = by_name["ours-int8"].cells[0]
    assert (ours.latency_ms, ours.latency_ms_per_round, ours.runs) == (2.5, (2, 3), 6)
    assert (ours.speedup_per_round, ours.speedup) == ((5, 10), 7.5)
    assert ours.pairs_per_second == 400
    assert ours.peak_share is None
    assert by_name["plain-int8"].scores == {"accuracy": 0.75, "f1": pytest.approx(2 / 3)}
    assert by_name["plain-int8"].label_flips == 1
    # The wrong one is the fastest, and does not count.
    best = compare(prepared, rounds, results)[0]
    assert (best.ours, best.peer) == ("ours-int8", "plain-int8")
    assert best.peer_speedup_per_round == (5 / 2, 10 / 3)


def test_inputs_come_back_from_their_file_as_they_were(tmp_path: Path) -> None:
    def batch(*shape: int) -> dict[str, np.ndarray]:
        return {"input_ids": np.arange(np.prod(shape)).reshape(shape), "attention_mask": np.ones(shape, np.int64)}

    before = Inputs(
        cells={"1x8": [batch(1, 8)], "file": [batch(2, 3 + number) for number in range(12)]},
        rows={"file": [np.array([2 * number, 2 * number + 1]) for number in range(12)]},
        calibration=[batch(1, 4), batch(1, 5)],
        check=batch(2, 6),
        reference=np.array([[0.5, 1.5]], np.float32),
    )
    before.save(tmp_path / "inputs.npz")
    after = Inputs.load(tmp_path / "inputs.npz")
    np.testing.assert_equal(vars(after), vars(before))


def test_padding_moves_to_the_left_for_pefts_decoders() -> None:
    batch = {
        "input_ids": np.array([[5, 6, 7, 8], [9, 4, 1, 1]]),
        "attention_mask": np.array([[1, 1, 1, 1], [1, 1, 0, 0]]),
    }
    moved = padded_on_the_left(batch)
    assert moved["input_ids"].tolist() == [[5, 6, 7, 8], [1, 1, 9, 4]]
    assert moved["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]


def test_the_names_of_the_engines_say_what_they_are() -> None:
    for name, engine in ENGINES.items():
        assert name.startswith(engine.family)
        assert engine.precision == "fp32" or name.endswith(engine.precision)
        assert bool(engine.compile_mode) == ("compile" in name)
        assert engine.cuda_graphs == ("graphs" in name)
