"""A graph beyond the size of one ONNX file, here with a lower limit: its numbers are in a second file, which is hashed."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from optimum.onnxruntime import ORTModelForSequenceClassification

from export.bundle.folder import load_bundle
from export.fold.graphs import files
from export.runtime.classifier import OnnxClassifier
from export.triton import TritonConfig, write_triton_repository
from tests.conftest import Data, Folders, Second, peft_logits
from tests.export.graphs import change_manifest, manifest_of, peft_batch, run_export, run_file
from train.common.errors import BundleError

DATA = "model.onnx_data"


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LARGEST_FILE_BYTES", 1000)


@pytest.mark.usefixtures("large")
def test_a_large_graph_has_a_second_file_that_every_reader_takes(
    adapter: Folders, base_model: Folders, data: Data, tmp_path: Path
) -> None:
    out = tmp_path / "b"
    # int8 is tried, and kept if it costs little.
    assert run_export(adapter("qwen3"), "--out", out, "--validation-file", data.validation_file) == 0
    assert {"model.onnx", DATA} <= set(manifest_of(out)["sha256"])
    assert (out / DATA).stat().st_size > 50_000
    bundle = load_bundle(out)
    assert bundle.graph_bytes("fp32") == sum((out / name).stat().st_size for name in ("model.onnx", DATA))
    batch = peft_batch("qwen3", 2, 9)
    expected = peft_logits(adapter("qwen3"), base_model("qwen3"), batch)
    write_triton_repository(TritonConfig(out, out=tmp_path / "models", precision="fp32"))
    optimum_model = ORTModelForSequenceClassification.from_pretrained(out, file_name="model.onnx")
    for logits in (
        OnnxClassifier(bundle, threads=1, use_cuda=False, precision="fp32").logits(batch),
        run_file(tmp_path / "models" / "b" / "1" / "model.onnx", batch),
        optimum_model(**batch).logits,
    ):
        assert np.abs(np.asarray(logits) - expected).max() < 1e-5


@pytest.mark.usefixtures("large")
def test_the_second_file_is_checked_like_every_other(adapter: Folders, tmp_path: Path) -> None:
    assert run_export(adapter("roberta-v2"), "--out", tmp_path / "b") == 0
    changed, unnamed, gone = (
        shutil.copytree(tmp_path / "b", tmp_path / name) for name in ("changed", "unnamed", "gone")
    )
    with (changed / DATA).open("r+b") as file:
        file.write(b"\xff")
    with pytest.raises(BundleError, match=rf"{DATA} is damaged|{DATA}.*SHA-256"):
        load_bundle(changed)
    change_manifest(unnamed, lambda manifest: manifest["sha256"].pop(DATA))
    with pytest.raises(BundleError, match=f"has no SHA-256 of {DATA}"):
        load_bundle(unnamed)
    (gone / DATA).unlink()
    with pytest.raises(BundleError, match=DATA):
        load_bundle(gone)


@pytest.mark.usefixtures("large")
def test_a_task_is_added_to_a_large_graph(
    adapter: Folders, second: Second, base_model: Folders, tmp_path: Path
) -> None:
    out, other = tmp_path / "b", second("gpt2")
    assert run_export(adapter("gpt2"), second("gpt2", three=True), "--out", out) == 0
    assert run_export(other, "--add", "--out", out) == 0
    batch = peft_batch("gpt2", 2, 9)
    bundle = load_bundle(out)
    number = bundle.find_task(other.name).number
    found = run_file(out / "model.onnx", batch | {"task_ids": np.full(2, number)})[:, :2]
    assert np.abs(found - peft_logits(other, base_model("gpt2"), batch)).max() < 1e-5
