"""`OnnxClassifier`: which graph it takes, what it says of itself, what it refuses; and others that load a bundle."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

import export.runtime.classifier
import export.runtime.cuda_graphs
import export.runtime.session
from export.bundle.folder import load_bundle
from export.runtime.batches import classify
from export.runtime.classifier import OnnxClassifier, best_precision, open_graph
from export.runtime.cuda_graphs import CudaGraphRunner
from export.runtime.session import CPU, CUDA
from tests.conftest import POSITIONS, VIRTUAL_TOKENS, Folders, Precisions, make_pairs
from tests.export.graphs import change_manifest, inputs_of, padded_batch, run_file
from train.common.errors import BundleError, TextError
from train.common.folder_record import sha256_of_file
from train.common.machine import usable_cores

USUAL_KINDS = ("bert",)
PAIRS = [(str(row["sentence1"]), str(row["sentence2"])) for row in make_pairs(9, seed=8)]


def on_cpu(folder: Path, precision: str | None = None) -> OnnxClassifier:
    return OnnxClassifier(load_bundle(folder), precision=precision, threads=1, use_cuda=False)


def with_damaged_graph(source: Path, target: Path, name: str) -> Path:
    """A bundle one of whose graphs has the right hash and is no graph, as one of a newer ONNX Runtime might seem here."""
    shutil.copytree(source, target)
    (target / name).write_bytes((target / name).read_bytes()[:1000])
    change_manifest(target, lambda manifest: manifest["sha256"].update({name: sha256_of_file(target / name)}))
    return target


def test_on_a_cpu_int8_is_taken_and_fp32_where_it_is_asked_for(kind: str, bundle_in: Precisions) -> None:
    folder = bundle_in(kind, "int8")
    logits = {}
    for asked, precision, file in ((None, "int8", "model_int8.onnx"), ("fp32", "fp32", "model.onnx")):
        classifier = on_cpu(folder, asked)
        assert classifier.execution.precision == precision
        assert "fp32 instead of" not in classifier.execution.note
        logits[precision] = classifier.logits(padded_batch(kind, 3, 9))
        assert np.abs(logits[precision] - run_file(folder / file, padded_batch(kind, 3, 9))).max() < 1e-6
    assert np.abs(logits["int8"] - logits["fp32"]).max() > 1e-4


def test_fp16_is_left_to_gpus_and_a_missing_precision_is_named(bundle: Folders, bundle_in: Precisions) -> None:
    fp16, int8 = (bundle_in("bert", precision) for precision in ("fp16", "int8"))
    assert on_cpu(fp16).execution.precision == "fp32"
    assert on_cpu(fp16, "fp16").execution.precision == "fp16"
    assert best_precision(load_bundle(fp16), on_cuda=True) == "fp16"
    assert best_precision(load_bundle(int8), on_cuda=True) == "fp32"
    with pytest.raises(BundleError, match=r"holds no int8 graph, only fp32\. Export it again with --precision int8\."):
        on_cpu(bundle("bert"), "int8")
    with pytest.raises(BundleError, match=r"holds no fp16 graph, only fp32, int8\."):
        on_cpu(int8, "fp16")


def test_a_graph_that_cannot_be_loaded_gives_way_to_fp32(bundle_in: Precisions, tmp_path: Path) -> None:
    folder = with_damaged_graph(bundle_in("bert", "int8"), tmp_path / "b", "model_int8.onnx")
    classifier = on_cpu(folder)
    assert classifier.execution.precision == "fp32"
    assert "fp32 instead of int8, which cannot be loaded here: ONNX Runtime cannot load" in classifier.execution.note
    batch = padded_batch("bert", 3, 9)
    assert np.abs(classifier.logits(batch) - run_file(folder / "model.onnx", batch)).max() < 1e-6
    # Who asks for it by name is not given another.
    with pytest.raises(BundleError, match=r"ONNX Runtime cannot load .*model_int8\.onnx"):
        on_cpu(folder, "int8")
    # Nor is a graph taken whose inputs are not the manifest's.
    other = shutil.copytree(folder, tmp_path / "other")
    change_manifest(other, lambda manifest: manifest["inputs"].pop())
    words = r"takes input_ids, attention_mask, token_type_ids; its manifest says input_ids, attention_mask\."
    with pytest.raises(BundleError, match=words):
        on_cpu(other)
    # Nor is there another for fp32.
    folder = with_damaged_graph(folder, tmp_path / "c", "model.onnx")
    with pytest.raises(BundleError, match=r"ONNX Runtime cannot load .*model\.onnx.*Export the bundle again"):
        on_cpu(folder)


@pytest.mark.parametrize("one_kind", ["bert", "roberta-v2", "gpt2"])
def test_the_runtime_tokenizes_as_transformers_does(one_kind: str, bundle: Folders) -> None:
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(bundle(one_kind))
    tokenize = on_cpu(bundle(one_kind)).tokenize
    pairs = [(PAIRS[0][0], " ".join(["word3"] * 60)), *PAIRS[1:]]
    for texts in (pairs, [(first,) for first, _ in pairs]):
        columns = map(list, zip(*texts, strict=True))
        expected = reference(*columns, padding=True, truncation="longest_first", return_tensors="np")
        encoded = tokenize(texts)
        assert set(encoded.arrays) == set(expected) == set(inputs_of(one_kind))
        for name, array in encoded.arrays.items():
            assert np.array_equal(array, expected[name])
        assert encoded.cut == (len(texts[0]) == 2, *[False] * 8)
    assert tokenize(pairs).arrays["input_ids"].shape[1] == POSITIONS - VIRTUAL_TOKENS


def test_the_runtime_says_on_what_it_runs_and_why_not_on_a_gpu(
    bundle: Folders, bundle_in: Precisions, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_bundle(bundle("bert"))
    for absence, expected in (("no NVIDIA driver on this machine",) * 2, ("", "CUDA is switched off")):
        monkeypatch.setattr(export.runtime.classifier, "cuda_absence", lambda absence=absence: absence)
        for threads in (1, 2, None):
            classifier = OnnxClassifier(loaded, threads=threads, use_cuda=None if absence else False)
            said = classifier.execution
            assert (said.engine, said.provider) == (f"ONNX Runtime {onnxruntime.__version__}", CPU)
            assert (said.on_cuda, said.precision, said.note) == (False, "fp32", expected)
            n_threads = classifier.session.get_session_options().intra_op_num_threads
            assert said.threads == n_threads == (threads or usable_cores())
    # Where CUDA fails, ONNX Runtime goes on without a word, with the graph that was chosen for a GPU.
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
    really_open = export.runtime.session.open_session

    def open_session(path: Path, *, threads: int, use_cuda: bool, cuda_graphs: bool = False) -> object:
        opened.append(cuda_graphs)
        if cuda_graphs:
            raise BundleError("This session cannot use the graph capture feature.")
        return really_open(path, threads=threads, use_cuda=False)

    monkeypatch.setattr(export.runtime.classifier, "cuda_absence", lambda: "")
    monkeypatch.setattr(export.runtime.classifier, "open_session", open_session)
    loaded = load_bundle(bundle("bert"))
    found = open_graph(loaded, None, threads=1, use_cuda=True, cuda_graphs=True)
    assert (opened, found.cuda_graphs) == ([True, False], False)
    assert found.note.startswith("no CUDA graphs, which this graph cannot be captured in: This session cannot")
    # Where there is no GPU there is nothing to capture, and nothing more to say than that.
    execution = OnnxClassifier(loaded, threads=1, use_cuda=False, cuda_graphs=True).execution
    assert (opened, execution.note) == ([True, False, False], "CUDA is switched off")


Misread = Callable[[np.ndarray], np.ndarray]


@dataclass
class OnAGpu:
    """A session that says it runs on a GPU; its kernels take the mask as they like."""

    path: Path
    misread: Misread

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
def test_a_gpu_that_misreads_padding_is_found_out_before_it_answers(
    kind: str, misread: Misread, is_right: bool, bundle_in: Precisions, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_bundle(bundle_in(kind, "fp16"))
    monkeypatch.setattr(export.runtime.classifier, "run_on_cuda", lambda session, arrays: session.run(arrays))
    opener = lambda path, **_: OnAGpu(path, misread if "fp16" in path.name else lambda mask: mask)  # noqa: E731
    monkeypatch.setattr(export.runtime.classifier, "open_session", opener)
    opened = open_graph(loaded, None, threads=1, use_cuda=True)
    assert (opened.precision, opened.note == "") == (("fp16", True) if is_right else ("fp32", False))
    if not is_right:
        assert "fp32 instead of fp16, which cannot be loaded here" in opened.note
        assert "misreads padding on this GPU" in opened.note
        with pytest.raises(BundleError, match="misreads padding on this GPU"):
            open_graph(loaded, "fp16", threads=1, use_cuda=True)


def test_arrays_that_stay_in_place_give_each_batch_its_own_logits(
    kind: str, bundle: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a CUDA graph replays on, here on the CPU: the same buffers for a shape, and no answer of an earlier batch."""
    monkeypatch.setattr(export.runtime.cuda_graphs, "MAX_SHAPES", 2)
    shapes = CudaGraphRunner(on_cpu(bundle(kind)).session, device="cpu", n_labels=2)
    places: dict[tuple[int, ...], list[int]] = {}
    answers: list[tuple[np.ndarray, np.ndarray]] = []
    for seed, shape in enumerate([(1, 7), (3, 9), (1, 7), (3, 9), (2, 5), (1, 7), (2, 5)]):
        batch = padded_batch(kind, *shape, seed)
        answers.append((shapes.run(batch), run_file(bundle(kind) / "model.onnx", batch)))
        for known, place in shapes._places.items():
            addresses = [value.data_ptr() for value in (*place.inputs.values(), place.logits)]
            assert places.setdefault(known, addresses) == addresses
    # Compared only now: nothing that came later may have changed them.
    for answer, wanted in answers:
        np.testing.assert_array_equal(answer, wanted)
    # The third shape is answered too, without a place of its own.
    assert list(places) == [(1, 7), (3, 9)]
    numbers = [place.options.get_run_config_entry("gpu_graph_id") for place in shapes._places.values()]
    assert numbers == ["0", "1"]
    assert shapes._make_place(batch).options.get_run_config_entry("gpu_graph_id") == "-1"


def test_what_would_be_answered_with_another_row_of_a_table_or_a_crash_is_refused(bundle: Folders) -> None:
    classifier = on_cpu(bundle("bert"))
    batch = padded_batch("bert", 3, 9)
    classifier.logits(batch)
    long = padded_batch("bert", 2, POSITIONS - VIRTUAL_TOKENS + 1)
    mask = batch["attention_mask"]

    def changed(name: str, value: int) -> dict[str, np.ndarray]:
        array = batch[name].copy()
        array[1, 2] = value
        return batch | {name: array}

    for bad, words in (
        # Negative numbers count from the end of a table, without an error.
        (changed("input_ids", -1), r"input_ids hold -1, outside the vocabulary of 94 tokens"),
        (changed("input_ids", 94), "input_ids hold 94, outside the vocabulary"),
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
        (batch | {"attention_mask": mask[:, :-1]}, r"attention_mask has shape \(3, 8\), input_ids \(3, 9\)"),
        (batch | {"attention_mask": mask[:1]}, r"attention_mask has shape \(1, 9\), input_ids \(3, 9\)"),
        (batch | {"task_ids": np.zeros(3, np.int64)}, "holds one task and takes no task_ids"),
        (batch | {"attention_mask": mask.astype(np.int32)}, "attention_mask holds int32, not int64"),
    ):
        with pytest.raises(TextError, match=words):
            classifier.logits(bad)
    # The largest of everything is fine.
    classifier.logits(changed("input_ids", 93))
    classifier.logits({name: array[:, :-1] for name, array in long.items()})
    # As a tokenizer gives token types for RoBERTa, which has none.
    roberta = on_cpu(bundle("roberta-v2"))
    without = {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert np.array_equal(roberta.logits(batch), roberta.logits(without))


def test_many_texts_are_answered_in_the_callers_order_from_batches_of_like_length(
    bundle: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier = on_cpu(bundle("bert"))
    lengths = np.random.default_rng(9).permutation(np.arange(1, 31))
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


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_transformers_pipeline_says_the_same_of_a_pair_and_of_many(
    kind: str, precision: str, bundle_in: Precisions
) -> None:
    from optimum.onnxruntime import ORTModelForSequenceClassification
    from transformers import AutoTokenizer, pipeline

    folder = bundle_in(kind, "int8")
    classifier = on_cpu(folder, precision)
    path = classifier.bundle.graph_path(precision)
    model = ORTModelForSequenceClassification.from_pretrained(folder, file_name=path.name)
    says: Any = pipeline("text-classification", model=model, tokenizer=AutoTokenizer.from_pretrained(folder))
    assert says.model.config.id2label == {0: "not_equivalent", 1: "equivalent"}
    # text-embeddings-inference takes for a classifier what says so here.
    assert says.model.config.architectures[0].endswith("ForSequenceClassification")
    assert len({len(first.split()) + len(second.split()) for first, second in PAIRS}) > 4
    inputs = [{"text": first, "text_pair": second} for first, second in PAIRS]
    # One by one; int8 would say something a little different of a text in a batch. Then all at once, which pads them.
    for batch_size in (1, len(PAIRS)):
        expected = classify(classifier, PAIRS, batch_size=batch_size)
        rows = says(inputs, batch_size=batch_size)
        assert [row["label"] for row in rows] == expected.predictions
        assert [row["score"] for row in rows] == pytest.approx(expected.best_probabilities, abs=1e-5)
