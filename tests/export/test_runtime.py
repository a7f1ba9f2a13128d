"""`OnnxClassifier`: which graph it takes, what it says of itself, what it refuses; and others that load a bundle."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

import export.runtime.batches
import export.runtime.classifier
import export.runtime.cuda_graphs
import export.runtime.session
from export.bundle.folder import load_bundle
from export.runtime.batches import classify
from export.runtime.classifier import OnnxClassifier, best_precision, open_graph
from export.runtime.cuda_graphs import CudaGraphRunner
from export.runtime.session import CPU, CUDA
from tests.conftest import POSITIONS, VIRTUAL_TOKENS, WORDS, Folders, Precisions, make_pairs, random_batch
from tests.export.graphs import change_manifest, has_types, inputs_of, parametrize_kinds, run_file
from train.common.errors import BundleError, TextError
from train.common.folder_record import sha256_of_file
from train.common.machine import usable_cores

USUAL_KINDS = ("bert",)
"""Kinds of model that the tests run for by default; others are in tests/slow."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    parametrize_kinds(metafunc, USUAL_KINDS)


PAIRS = [(str(row["sentence1"]), str(row["sentence2"])) for row in make_pairs(9, seed=8)]


def on_cpu(folder: Path, precision: str | None = None) -> OnnxClassifier:
    return OnnxClassifier(load_bundle(folder), precision=precision, threads=1, use_cuda=False)


def small_batch(kind: str = "bert") -> dict[str, np.ndarray]:
    return random_batch(np.random.default_rng(1), 3, 9, token_types=has_types(kind))


def with_damaged_graph(source: Path, target: Path, name: str) -> Path:
    """A bundle one of whose graphs has the right hash and is no graph, as one of a newer ONNX Runtime might seem here."""
    shutil.copytree(source, target)
    (target / name).write_bytes((target / name).read_bytes()[:1000])
    sha256 = sha256_of_file(target / name)
    change_manifest(target, lambda manifest: manifest["sha256"].update({name: sha256}))
    return target


def test_a_random_batch_has_full_rows_or_rows_padded_on_the_right() -> None:
    inputs = ("input_ids", "attention_mask", "token_type_ids")

    def draw(**settings: Any) -> dict[str, np.ndarray]:
        return export.runtime.batches.random_batch(np.random.default_rng(1), (100, 12), vocabulary_size=7, **settings)

    full, padded = draw(inputs=inputs, pad_token_id=6), draw(inputs=inputs[:2], padded=True)
    assert tuple(full) == inputs
    assert {(array.shape, array.dtype.name) for array in full.values()} == {((100, 12), "int64")}
    assert set(np.unique(full["input_ids"])) == set(range(6))
    assert (full["attention_mask"] == 1).all()
    assert (full["token_type_ids"] == [0] * 6 + [1] * 6).all()

    assert tuple(padded) == inputs[:2]
    lengths = padded["attention_mask"].sum(axis=1)
    assert lengths[0] == 12
    assert set(lengths) == set(range(1, 13))
    assert (np.diff(padded["attention_mask"], axis=1) <= 0).all()
    # What the mask hides is random too, so that a graph that sees it differs.
    assert set(padded["input_ids"][padded["attention_mask"] == 0]) == set(range(7))


def test_on_a_cpu_int8_is_taken_and_fp32_where_it_is_asked_for(kind: str, bundle_in: Precisions) -> None:
    folder = bundle_in(kind, "int8")
    logits = {}
    for asked, precision, file in (
        (None, "int8", "model_int8.onnx"),
        ("int8", "int8", "model_int8.onnx"),
        ("fp32", "fp32", "model.onnx"),
    ):
        classifier = on_cpu(folder, asked)
        assert classifier.execution.precision == precision
        assert "fp32 instead of" not in classifier.execution.note
        logits[precision] = classifier.logits(small_batch(kind))
        assert np.abs(logits[precision] - run_file(folder / file, small_batch(kind))).max() < 1e-6
    assert np.abs(logits["int8"] - logits["fp32"]).max() > 1e-4


def test_fp16_is_left_to_gpus(bundle_in: Precisions) -> None:
    folder = bundle_in("bert", "fp16")
    assert on_cpu(folder).execution.precision == "fp32"
    assert on_cpu(folder, "fp16").execution.precision == "fp16"
    assert best_precision(load_bundle(folder), on_cuda=True) == "fp16"
    assert best_precision(load_bundle(bundle_in("bert", "int8")), on_cuda=True) == "fp32"


def test_a_precision_that_the_bundle_does_not_hold_is_named(bundle: Folders, bundle_in: Precisions) -> None:
    with pytest.raises(BundleError, match=r"holds no int8 graph, only fp32\. Export it again with --precision int8\."):
        on_cpu(bundle("bert"), "int8")
    with pytest.raises(BundleError, match=r"holds no fp16 graph, only fp32, int8\."):
        on_cpu(bundle_in("bert", "int8"), "fp16")


def test_a_graph_that_cannot_be_loaded_gives_way_to_fp32_and_that_is_said(
    bundle_in: Precisions, tmp_path: Path
) -> None:
    folder = with_damaged_graph(bundle_in("bert", "int8"), tmp_path / "b", "model_int8.onnx")
    classifier = on_cpu(folder)
    assert classifier.execution.precision == "fp32"
    assert "fp32 instead of int8, which cannot be loaded here: ONNX Runtime cannot load" in classifier.execution.note
    assert np.abs(classifier.logits(small_batch()) - run_file(folder / "model.onnx", small_batch())).max() < 1e-6
    # Who asks for it by name is not given another.
    with pytest.raises(BundleError, match=r"ONNX Runtime cannot load .*model_int8\.onnx"):
        on_cpu(folder, "int8")
    # Nor is there another for fp32.
    folder = with_damaged_graph(folder, tmp_path / "c", "model.onnx")
    with pytest.raises(BundleError, match=r"ONNX Runtime cannot load .*model\.onnx.*Export the bundle again"):
        on_cpu(folder)


def test_a_graph_that_the_manifest_does_not_vouch_for_is_not_opened(bundle_in: Precisions, tmp_path: Path) -> None:
    """Without its hash it is unknown whether a bit of it was flipped."""
    shutil.copytree(bundle_in("bert", "int8"), tmp_path / "b")
    change_manifest(tmp_path / "b", lambda manifest: manifest["sha256"].pop("model_int8.onnx"))
    with pytest.raises(BundleError, match=r"has no SHA-256 of model_int8\.onnx"):
        load_bundle(tmp_path / "b")


def test_a_graph_with_other_inputs_than_the_manifests_is_refused(bundle: Folders, tmp_path: Path) -> None:
    shutil.copytree(bundle("bert"), tmp_path / "b")
    change_manifest(tmp_path / "b", lambda manifest: manifest["inputs"].pop())
    words = r"takes input_ids, attention_mask, token_type_ids; its manifest says input_ids, attention_mask\."
    with pytest.raises(BundleError, match=words):
        on_cpu(tmp_path / "b")


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


def test_the_runtime_says_on_what_it_runs(bundle: Folders) -> None:
    loaded = load_bundle(bundle("bert"))
    for threads, expected in ((1, 1), (2, 2), (None, usable_cores())):
        classifier = OnnxClassifier(loaded, threads=threads, use_cuda=False)
        said = classifier.execution
        assert said.threads == classifier.session.get_session_options().intra_op_num_threads == expected
        assert (said.engine, said.provider) == (f"ONNX Runtime {onnxruntime.__version__}", CPU)
        assert (said.on_cuda, said.precision) == (False, "fp32")


def test_why_it_does_not_run_on_a_gpu_is_said(
    bundle: Folders, bundle_in: Precisions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export.runtime.classifier, "cuda_absence", lambda: "no NVIDIA driver on this machine")
    assert OnnxClassifier(load_bundle(bundle("bert"))).execution.note == "no NVIDIA driver on this machine"
    monkeypatch.setattr(export.runtime.classifier, "cuda_absence", lambda: "")
    assert on_cpu(bundle("bert")).execution.note == "CUDA is switched off"
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
def test_a_gpu_that_misreads_padding_is_found_out_before_it_answers(
    kind: str,
    misread: Callable[[np.ndarray], np.ndarray],
    is_right: bool,
    bundle_in: Precisions,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded = load_bundle(bundle_in(kind, "fp16"))
    fp16 = loaded.graph_path("fp16")

    def open_session(path: Path, **_: object) -> OnAGpu:
        return OnAGpu(path, misread if path == fp16 else lambda mask: mask)

    monkeypatch.setattr(export.runtime.classifier, "run_on_cuda", lambda session, arrays: session.run(arrays))
    monkeypatch.setattr(export.runtime.classifier, "open_session", open_session)
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
    generator = np.random.default_rng(2)
    places: dict[tuple[int, ...], list[int]] = {}
    answers: list[np.ndarray] = []
    expected: list[np.ndarray] = []
    for n_batch, n_text in [(1, 7), (3, 9), (1, 7), (3, 9), (2, 5), (1, 7), (2, 5)]:
        batch = random_batch(generator, n_batch, n_text, token_types=has_types(kind))
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


def test_what_would_be_answered_with_another_row_of_a_table_or_a_crash_is_refused(bundle: Folders) -> None:
    classifier = on_cpu(bundle("bert"))
    batch = small_batch()
    classifier.logits(batch)
    long = random_batch(np.random.default_rng(1), 2, POSITIONS - VIRTUAL_TOKENS + 1, token_types=True)
    vocabulary_size = len(WORDS) + 4
    mask = batch["attention_mask"]

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
        (batch | {"attention_mask": mask[:, :-1]}, r"attention_mask has shape \(3, 8\), input_ids \(3, 9\)"),
        (batch | {"attention_mask": mask[:1]}, r"attention_mask has shape \(1, 9\), input_ids \(3, 9\)"),
        (batch | {"task_ids": np.zeros(3, np.int64)}, "holds one task and takes no task_ids"),
        (batch | {"attention_mask": mask.astype(np.int32)}, "attention_mask holds int32, not int64"),
    ):
        with pytest.raises(TextError, match=words):
            classifier.logits(bad)
    # The largest of everything is fine.
    classifier.logits(changed("input_ids", vocabulary_size - 1))
    classifier.logits({name: array[:, :-1] for name, array in long.items()})


def test_an_array_that_the_model_does_not_take_is_left_out(bundle: Folders) -> None:
    """As a tokenizer gives token types for RoBERTa, which has none."""
    classifier = on_cpu(bundle("roberta-v2"))
    without = {name: small_batch()[name] for name in ("input_ids", "attention_mask")}
    assert np.array_equal(classifier.logits(small_batch()), classifier.logits(without))


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
    says = pipeline(
        "text-classification",
        model=ORTModelForSequenceClassification.from_pretrained(folder, file_name=path.name),
        tokenizer=AutoTokenizer.from_pretrained(folder),
    )
    assert len({len(first.split()) + len(second.split()) for first, second in PAIRS}) > 4
    inputs = [{"text": first, "text_pair": second} for first, second in PAIRS]
    # One by one; int8 would say something a little different of a text in a batch. Then all at once, which pads them.
    for batch_size in (1, len(PAIRS)):
        expected = classify(classifier, PAIRS, batch_size=batch_size)
        rows = says(inputs, batch_size=batch_size)
        assert [row["label"] for row in rows] == expected.predictions
        assert [row["score"] for row in rows] == pytest.approx(expected.best_probabilities, abs=1e-5)
        if batch_size == 1:
            single: Any = says(inputs[0])
            assert (single["label"], single["score"]) == (rows[0]["label"], pytest.approx(rows[0]["score"], abs=1e-5))
