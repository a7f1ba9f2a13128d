"""`OnnxClassifier`: which graph it takes, what it says of itself, what it refuses; and others that load a bundle."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

import export.runtime.classifier
import export.runtime.cuda_graphs
import export.runtime.session
from export.bundle.folder import BUNDLE, load_bundle
from export.runtime.batches import classify
from export.runtime.classifier import OnnxClassifier
from export.runtime.cuda_graphs import FixedShapes
from export.runtime.session import CPU, CUDA, TENSORRT, cuda_absence, has_tensorrt, providers
from tests.conftest import POSITIONS, TOKEN_TYPES, VIRTUAL_TOKENS, WORDS, family_of, make_pairs, random_batch
from train.common.errors import BundleError, TextError
from train.common.folder_record import seal, sha256_of_file
from train.common.machine import usable_cores

Folders = Callable[[str], Path]
Precisions = Callable[[str, str], Path]

PAIRS = [(str(row["sentence1"]), str(row["sentence2"])) for row in make_pairs(9, seed=8)]


def run_file(path: Path, batch: dict[str, np.ndarray]) -> np.ndarray:
    """ONNX Runtime alone."""
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(["logits"], batch)[0]


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(seal(manifest, BUNDLE)))


def with_broken_int8(source: Path, target: Path) -> Path:
    """A bundle whose int8 graph has the right hash and is no graph, as one of a newer ONNX Runtime might seem here."""
    shutil.copytree(source, target)
    (target / "model_int8.onnx").write_bytes(b"no protobuf")
    sha256 = sha256_of_file(target / "model_int8.onnx")
    change_manifest(target, lambda manifest: manifest["sha256"].update({"model_int8.onnx": sha256}))
    return target


@pytest.mark.parametrize("kind", ["bert", "gpt2-v2"])
def test_on_a_cpu_int8_is_taken_and_fp32_where_it_is_asked_for(kind: str, bundle_in: Precisions) -> None:
    folder = bundle_in(kind, "int8")
    batch = random_batch(np.random.default_rng(0), 4, 12, token_types=family_of(kind) in TOKEN_TYPES)
    logits = {}
    for asked, precision, file in (
        (None, "int8", "model_int8.onnx"),
        ("int8", "int8", "model_int8.onnx"),
        ("fp32", "fp32", "model.onnx"),
    ):
        classifier = OnnxClassifier(load_bundle(folder), precision=asked, threads=1, use_cuda=False)
        assert classifier.execution.precision == precision
        assert "fp32 instead of" not in classifier.execution.note
        logits[precision] = classifier.logits(batch)
        assert np.abs(logits[precision] - run_file(folder / file, batch)).max() < 1e-6
    assert np.abs(logits["int8"] - logits["fp32"]).max() > 1e-4


def test_fp16_is_left_to_gpus(bundle_in: Precisions) -> None:
    loaded = load_bundle(bundle_in("bert", "fp16"))
    assert OnnxClassifier(loaded, threads=1, use_cuda=False).execution.precision == "fp32"
    assert OnnxClassifier(loaded, precision="fp16", threads=1, use_cuda=False).execution.precision == "fp16"
    assert export.runtime.classifier.best_precision(loaded, on_cuda=True) == "fp16"
    assert export.runtime.classifier.best_precision(load_bundle(bundle_in("bert", "int8")), on_cuda=True) == "fp32"


def test_a_precision_that_the_bundle_does_not_hold_is_named(bundle: Folders, bundle_in: Precisions) -> None:
    with pytest.raises(BundleError, match=r"holds no int8 graph, only fp32\. Export it again with --precision int8\."):
        OnnxClassifier(load_bundle(bundle("bert")), precision="int8", threads=1)
    with pytest.raises(BundleError, match=r"holds no fp16 graph, only fp32, int8\."):
        OnnxClassifier(load_bundle(bundle_in("bert", "int8")), precision="fp16", threads=1)


def test_a_graph_that_cannot_be_loaded_gives_way_to_fp32_and_that_is_said(
    bundle_in: Precisions, tmp_path: Path
) -> None:
    folder = with_broken_int8(bundle_in("bert", "int8"), tmp_path / "b")
    loaded = load_bundle(folder)
    classifier = OnnxClassifier(loaded, threads=1, use_cuda=False)
    assert classifier.execution.precision == "fp32"
    assert "fp32 instead of int8, which cannot be loaded here: ONNX Runtime cannot load" in classifier.execution.note
    batch = random_batch(np.random.default_rng(0), 2, 7, token_types=True)
    assert np.abs(classifier.logits(batch) - run_file(folder / "model.onnx", batch)).max() < 1e-6
    # Who asks for it by name is not given another.
    with pytest.raises(BundleError, match=r"ONNX Runtime cannot load .*model_int8\.onnx"):
        OnnxClassifier(loaded, precision="int8", threads=1, use_cuda=False)


def test_where_fp32_cannot_be_loaded_either_nothing_is(bundle: Folders, tmp_path: Path) -> None:
    shutil.copytree(bundle("bert"), tmp_path / "b")
    path = tmp_path / "b" / "model.onnx"
    path.write_bytes(path.read_bytes()[:1000])
    change_manifest(tmp_path / "b", lambda manifest: manifest["sha256"].update({"model.onnx": sha256_of_file(path)}))
    with pytest.raises(BundleError, match=r"ONNX Runtime cannot load .*model\.onnx.*Export the bundle again"):
        OnnxClassifier(load_bundle(tmp_path / "b"), threads=1)


def test_a_graph_that_the_manifest_does_not_vouch_for_is_not_opened(bundle_in: Precisions, tmp_path: Path) -> None:
    """Without its hash nobody knows whether a bit of it was flipped."""
    shutil.copytree(bundle_in("bert", "int8"), tmp_path / "b")
    change_manifest(tmp_path / "b", lambda manifest: manifest["sha256"].pop("model_int8.onnx"))
    with pytest.raises(BundleError, match=r"lacks 'the SHA-256 of model_int8\.onnx'"):
        load_bundle(tmp_path / "b")


def test_a_graph_with_other_inputs_than_the_manifests_is_refused(bundle: Folders, tmp_path: Path) -> None:
    shutil.copytree(bundle("bert"), tmp_path / "b")
    change_manifest(tmp_path / "b", lambda manifest: manifest["inputs"].pop())
    words = r"takes input_ids, attention_mask, token_type_ids; its manifest says input_ids, attention_mask\."
    with pytest.raises(BundleError, match=words):
        OnnxClassifier(load_bundle(tmp_path / "b"), threads=1)


def test_the_threads_it_reports_are_those_it_has(bundle: Folders) -> None:
    loaded = load_bundle(bundle("bert"))
    for threads, expected in ((1, 1), (2, 2), (None, usable_cores())):
        classifier = OnnxClassifier(loaded, threads=threads, use_cuda=False)
        assert classifier.execution.threads == expected
        assert classifier._session.get_session_options().intra_op_num_threads == expected


@pytest.mark.parametrize(
    ("use_cuda", "tensorrt", "expected"),
    [
        (False, True, [CPU]),
        (False, False, [CPU]),
        (True, False, [CUDA, CPU]),
        (True, True, [TENSORRT, CUDA, CPU]),
    ],
)
def test_providers_are_tried_from_the_fastest_down(
    use_cuda: bool, tensorrt: bool, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export.runtime.session, "has_tensorrt", lambda: tensorrt)
    found = providers(use_cuda=use_cuda)
    assert [name for name, _ in found] == expected
    # fp32 stays fp32 on a GPU, or the logits would not be PyTorch's.
    options = dict(found)
    if use_cuda:
        assert options[CUDA]["use_tf32"] == "0"
    if TENSORRT in options:
        assert options[TENSORRT]["trt_fp16_enable"] == "0"
    # A CUDA graph is CUDA's own: no kernel of it may be TensorRT's.
    captured = providers(use_cuda=use_cuda, cuda_graphs=True)
    assert [name for name, _ in captured] == [name for name in expected if name != TENSORRT]
    assert dict(captured).get(CUDA, {}).get("enable_cuda_graph") == ("1" if use_cuda else None)
    assert "enable_cuda_graph" not in dict(found).get(CUDA, {})


def test_tensorrt_is_there_only_with_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)  # as if it were not installed
    assert not has_tensorrt()
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CPU])
    assert not has_tensorrt()
    assert cuda_absence() == "this ONNX Runtime has no CUDA provider"


class Driver:
    """NVIDIA's driver as far as it is asked how many GPUs there are."""

    def __init__(self, status: int, n_devices: int) -> None:
        self.status, self.n_devices = status, n_devices

    def cuInit(self, flags: int) -> int:  # noqa: N802 -- the driver's name
        return self.status

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802 -- the same
        count._obj.value = self.n_devices
        return 0


@pytest.mark.parametrize(
    ("status", "n_devices", "expected"),
    [
        (100, 0, "the NVIDIA driver shows no GPU (CUDA error 100)"),
        (0, 0, "the NVIDIA driver shows no GPU (CUDA error 100)"),
        (803, 0, "the NVIDIA driver shows no GPU (CUDA error 803)"),
        (0, 1, ""),
    ],
)
def test_a_driver_without_a_gpu_is_told_from_one_with(
    status: int, n_devices: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(export.runtime.session.ctypes, "CDLL", lambda _: Driver(status, n_devices))
    assert cuda_absence() == expected


def test_why_it_does_not_run_on_a_gpu_is_said(bundle: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_bundle(bundle("bert"))
    monkeypatch.setattr(export.runtime.classifier, "cuda_absence", lambda: "no NVIDIA driver on this machine")
    assert OnnxClassifier(loaded, threads=1).execution.note == "no NVIDIA driver on this machine"
    monkeypatch.setattr(export.runtime.classifier, "cuda_absence", lambda: "")
    assert OnnxClassifier(loaded, threads=1, use_cuda=False).execution.note == "CUDA is switched off"


def test_where_cuda_fails_the_graph_for_the_cpu_is_taken(
    bundle_in: Precisions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime then goes on without a word, with the graph that was chosen for a GPU."""
    monkeypatch.setattr(export.runtime.classifier, "cuda_absence", lambda: "")
    monkeypatch.setattr(export.runtime.session, "providers", lambda **_: [(CPU, {})])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    for precision, expected in (("fp16", "fp32"), ("int8", "int8")):
        execution = OnnxClassifier(load_bundle(bundle_in("bert", precision)), threads=1).execution
        assert (execution.provider, execution.on_cuda, execution.precision) == (CPU, False, expected)
        assert execution.note == "ONNX Runtime fell back from CUDA to the CPU"


def test_a_graph_that_cannot_be_captured_runs_without_and_says_so(
    bundle: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime refuses to load such a graph. Only the loading is played: there is no GPU in this test."""
    opened: list[bool] = []
    on_cpu = export.runtime.session.open_session

    def open_session(path: Path, *, threads: int, use_cuda: bool, cuda_graphs: bool = False) -> object:
        opened.append(cuda_graphs)
        if cuda_graphs:
            raise BundleError("This session cannot use the graph capture feature.")
        return on_cpu(path, threads=threads, use_cuda=False)

    monkeypatch.setattr(export.runtime.classifier, "cuda_absence", lambda: "")
    monkeypatch.setattr(export.runtime.classifier, "open_session", open_session)
    loaded = load_bundle(bundle("bert"))
    found = export.runtime.classifier._open_graph(loaded, None, threads=1, use_cuda=True, cuda_graphs=True)
    assert (opened, found.cuda_graphs) == ([True, False], False)
    assert found.why.startswith("no CUDA graphs, which this graph cannot be captured in: This session cannot")
    # Where there is no GPU there is nothing to capture, and nothing more to say than that.
    execution = OnnxClassifier(loaded, threads=1, use_cuda=False, cuda_graphs=True).execution
    assert (opened, execution.note) == ([True, False, False], "CUDA is switched off")


class OnAGpu:
    """A session that says it runs on a GPU; its kernels take the mask as they like."""

    def __init__(self, path: Path, misread: Callable[[np.ndarray], np.ndarray]) -> None:
        self.path, self.misread = path, misread

    def get_providers(self) -> list[str]:
        return [CUDA, CPU]

    def run(self, arrays: dict[str, np.ndarray]) -> np.ndarray:
        return run_file(self.path, arrays | {"attention_mask": self.misread(arrays["attention_mask"])})


@pytest.mark.parametrize(
    ("misread", "is_right"),
    [
        (lambda mask: mask, True),
        (np.ones_like, False),  # padding is seen
        (lambda mask: mask * (np.arange(len(mask))[:, None] == 0), False),  # only the first text is seen
    ],
)
@pytest.mark.parametrize("kind", ["bert-v2", "gpt2"])
def test_a_gpu_that_misreads_padding_is_found_out_before_it_answers(
    kind: str,
    misread: Callable[[np.ndarray], np.ndarray],
    is_right: bool,
    bundle_in: Precisions,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded = load_bundle(bundle_in(kind, "fp16"))
    fp16 = loaded.graph_path("fp16")
    monkeypatch.setattr(export.runtime.classifier, "_run_on_cuda", lambda session, arrays: session.run(arrays))

    def open_session(path: Path, **_: object) -> OnAGpu:
        return OnAGpu(path, misread if path == fp16 else lambda mask: mask)

    monkeypatch.setattr(export.runtime.classifier, "open_session", open_session)
    opened = export.runtime.classifier._open_graph(loaded, None, threads=1, use_cuda=True)
    assert (opened.precision, opened.why == "") == (("fp16", True) if is_right else ("fp32", False))
    if not is_right:
        assert "fp32 instead of fp16, which cannot be loaded here" in opened.why
        assert "misreads padding on this GPU" in opened.why
        with pytest.raises(BundleError, match="misreads padding on this GPU"):
            export.runtime.classifier._open_graph(loaded, "fp16", threads=1, use_cuda=True)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_arrays_that_stay_in_place_give_each_batch_its_own_logits(
    kind: str, bundle: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a CUDA graph replays on, here on the CPU: the same buffers for a shape, and no answer of an earlier batch."""
    monkeypatch.setattr(export.runtime.cuda_graphs, "MAX_SHAPES", 2)
    classifier = OnnxClassifier(load_bundle(bundle(kind)), threads=1, use_cuda=False)
    shapes = FixedShapes(classifier._session, device="cpu", n_labels=2)
    generator = np.random.default_rng(2)
    places: dict[tuple[int, ...], list[int]] = {}
    answers: list[np.ndarray] = []
    expected: list[np.ndarray] = []
    for n_batch, n_text in [(1, 7), (3, 9), (1, 7), (3, 9), (2, 5), (1, 7), (2, 5)]:
        batch = random_batch(generator, n_batch, n_text, token_types=kind == "bert")
        answers.append(shapes.run(batch))
        expected.append(run_file(bundle(kind) / "model.onnx", batch))
        for shape, place in shapes._places.items():
            addresses = [value.data_ptr() for value in (*place.inputs.values(), place.logits)]
            assert places.setdefault(shape, addresses) == addresses
    # Compared only now: nothing that came later may have changed them.
    for answer, wanted in zip(answers, expected, strict=True):
        np.testing.assert_array_equal(answer, wanted)
    # The third shape is answered too, without a place of its own.
    assert list(places) == [(1, 7), (3, 9)]
    numbers = [place.options.get_run_config_entry("gpu_graph_id") for place in shapes._places.values()]
    assert numbers == ["0", "1"]
    assert shapes._make_place(batch).options.get_run_config_entry("gpu_graph_id") == "-1"


def test_what_would_be_answered_with_somebody_elses_row_or_a_crash_is_refused(bundle: Folders) -> None:
    classifier = OnnxClassifier(load_bundle(bundle("bert")), threads=1)
    batch = random_batch(np.random.default_rng(1), 3, 9, token_types=True)
    classifier.logits(batch)
    long = random_batch(np.random.default_rng(1), 2, POSITIONS - VIRTUAL_TOKENS + 1, token_types=True)
    vocabulary_size = len(WORDS) + 4

    def changed(name: str, value: int) -> dict[str, np.ndarray]:
        array = batch[name].copy()
        array[1, 2] = value
        return batch | {name: array}

    for bad, words in (
        # Negative numbers count from the end of a table, without an error.
        (changed("input_ids", -1), r"input_ids hold -1, outside the vocabulary of 94 tokens"),
        (changed("input_ids", vocabulary_size), "input_ids hold 94, outside the vocabulary"),
        (changed("token_type_ids", -1), "token_type_ids holds other numbers than 0 and 1"),
        (changed("token_type_ids", 2), "token_type_ids holds other numbers than 0 and 1"),
        (changed("attention_mask", 2), "attention_mask holds other numbers than 0 and 1"),
        # Padding on the left, or a hole: what is behind it would be cut off, or be at another position.
        (changed("attention_mask", 0), "attention_mask has a 1 behind a 0. Pad texts on the right"),
        ({name: array[:0] for name, array in batch.items()}, r"input_ids of shape \(0, 9\) hold no text"),
        ({name: array[:, :0] for name, array in batch.items()}, r"input_ids of shape \(3, 0\) hold no text"),
        ({name: array[0] for name, array in batch.items()}, r"input_ids of shape \(9,\) hold no text"),
        (long, "input_ids hold texts of 44 tokens; this model reads 43"),
        ({"input_ids": batch["input_ids"]}, "The batch lacks attention_mask, token_type_ids"),
        (
            batch | {"attention_mask": batch["attention_mask"][:, :-1]},
            r"attention_mask has shape \(3, 8\), input_ids \(3, 9\)",
        ),
        (
            batch | {"attention_mask": batch["attention_mask"][:1]},
            r"attention_mask has shape \(1, 9\), input_ids \(3, 9\)",
        ),
        (batch | {"task_ids": np.zeros(3, np.int64)}, "holds one task and takes no task_ids"),
    ):
        with pytest.raises(TextError, match=words):
            classifier.logits(bad)
    # The largest of everything is fine.
    classifier.logits(changed("input_ids", vocabulary_size - 1))
    classifier.logits({name: array[:, :-1] for name, array in long.items()})


def test_an_array_that_the_model_does_not_take_is_left_out(bundle: Folders) -> None:
    """As a tokenizer gives token types for RoBERTa, which has none."""
    classifier = OnnxClassifier(load_bundle(bundle("roberta")), threads=1)
    batch = random_batch(np.random.default_rng(1), 3, 9, token_types=True)
    without = {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert np.array_equal(classifier.logits(batch), classifier.logits(without))


def test_many_texts_are_answered_in_the_callers_order_from_batches_of_like_length(
    bundle: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier = OnnxClassifier(load_bundle(bundle("bert")), threads=1)
    generator = np.random.default_rng(9)
    lengths = generator.permutation(np.arange(1, 31))
    texts = [(" ".join(["word10"] * int(length)), "word20") for length in lengths]
    # Each by itself, so without any padding, is what each has to be in a batch.
    alone = np.concatenate([classifier.logits(classifier.tokenize([text]).arrays) for text in texts])

    seen: list[list[int]] = []
    logits = classifier.logits

    def spy(arrays: dict[str, np.ndarray]) -> np.ndarray:
        seen.append(arrays["attention_mask"].sum(axis=1).tolist())
        return logits(arrays)

    monkeypatch.setattr(classifier, "logits", spy)
    reported: list[int] = []
    found = classify(classifier, texts, batch_size=8, report=reported.append)
    assert reported == [8, 8, 8, 6]
    # <s>, the words, </s>, one word and </s>: the batches hold the shortest texts, the next ones, and so on.
    assert [length for batch in seen for length in batch] == list(range(5, 35))
    exponentials = np.exp(alone)
    assert np.abs(found.probabilities - exponentials / exponentials.sum(axis=1, keepdims=True)).max() < 1e-6
    assert found.predictions == [("not_equivalent", "equivalent")[index] for index in alone.argmax(axis=1)]
    assert not found.cut.any()
    assert classify(classifier, []).predictions == []


@pytest.mark.parametrize(
    ("kind", "file"),
    [("bert", "model.onnx"), ("bert", "model_int8.onnx"), ("roberta-v2", "model.onnx"), ("gpt2", "model_int8.onnx")],
)
def test_a_transformers_pipeline_says_the_same_of_a_pair_and_of_many(
    kind: str, file: str, bundle_in: Precisions
) -> None:
    from optimum.onnxruntime import ORTModelForSequenceClassification
    from transformers import AutoTokenizer, pipeline

    folder = bundle_in(kind, "int8")
    says = pipeline(
        "text-classification",
        model=ORTModelForSequenceClassification.from_pretrained(folder, file_name=file),
        tokenizer=AutoTokenizer.from_pretrained(folder),
    )
    precision = "int8" if "int8" in file else "fp32"
    classifier = OnnxClassifier(load_bundle(folder), precision=precision, threads=1, use_cuda=False)
    assert len({len(first.split()) + len(second.split()) for first, second in PAIRS}) > 4
    inputs = [{"text": first, "text_pair": second} for first, second in PAIRS]
    # One by one; int8 would say something a little different of a text in a batch.
    expected = classify(classifier, PAIRS, batch_size=1)
    assert [row["label"] for row in says(inputs)] == expected.predictions
    assert [row["score"] for row in says(inputs)] == pytest.approx(expected.best_probabilities, abs=1e-5)
    single: Any = says(inputs[0])
    assert (single["label"], single["score"]) == (
        expected.predictions[0],
        pytest.approx(expected.best_probabilities[0], abs=1e-5),
    )
    # All at once, which pads them; the classifier is given the same batch.
    encoded = classifier.tokenize(PAIRS)
    exponentials = np.exp(classifier.logits(encoded.arrays))
    together = exponentials / exponentials.sum(axis=1, keepdims=True)
    rows = says(inputs, batch_size=len(inputs))
    assert [row["label"] for row in rows] == [classifier.task.task.labels[index] for index in together.argmax(axis=1)]
    assert [row["score"] for row in rows] == pytest.approx(together.max(axis=1), abs=1e-5)
