"""``python -m export.triton``: the model repository, read as Triton reads it and run as Triton runs it."""

import json
import shlex
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from google.protobuf import descriptor_pb2 as pb2  # type: ignore[import-untyped]
from google.protobuf import descriptor_pool, message_factory, text_format

from export.__main__ import main as export_main
from export.bundle.folder import load_bundle
from export.runtime.classifier import OnnxClassifier
from export.triton import main
from tests.conftest import MAIN_KINDS, POSITIONS, VIRTUAL_TOKENS, Folders, Precisions, flip_bit
from tests.export.graphs import change_manifest

Capsys = pytest.CaptureFixture[str]
PAIRS = [("word1 word2", "word3"), ("word4 word5 word6", "word7 word8")]
SCHEMA = {
    "Reshape": "shape:int64*",
    "Input": "name:string data_type:DataType dims:int64* reshape:Reshape",
    "Output": "name:string data_type:DataType dims:int64* reshape:Reshape label_filename:string",
    "DynamicBatching": "preferred_batch_size:int32* max_queue_delay_microseconds:uint64",
    "InstanceGroup": "kind:Kind count:int32",
    "WarmupInput": "data_type:DataType dims:int64* zero_data:bool random_data:bool input_data_file:string",
    "WarmupEntry": "key:string value:WarmupInput",
    "Warmup": "name:string batch_size:uint32 inputs:WarmupEntry* count:uint32",
    "ModelConfig": "name:string platform:string backend:string max_batch_size:int32 input:Input* output:Output* "
    "instance_group:InstanceGroup* dynamic_batching:DynamicBatching model_warmup:Warmup*",
}
"""The used part of triton-inference-server/common, protobuf/model_config.proto: message → field:type, * if repeated."""
TYPES = {0: "TYPE_INVALID", 9: "TYPE_INT64", 10: "TYPE_FP16", 11: "TYPE_FP32"}
KINDS = {0: "KIND_AUTO", 1: "KIND_GPU", 2: "KIND_CPU", 3: "KIND_MODEL"}
ENUMS = {"DataType": TYPES, "Kind": KINDS}


@cache
def model_config() -> Any:
    """The message class: text that has another field, or a value of another type, does not parse."""
    file = pb2.FileDescriptorProto(name="model_config.proto", syntax="proto3", package="inference")
    for name, values in ENUMS.items():
        enum = file.enum_type.add(name=name)
        for number, value in values.items():
            enum.value.add(name=value, number=number)
    field_type = pb2.FieldDescriptorProto
    for name, fields in SCHEMA.items():
        message = file.message_type.add(name=name)
        for number, field in enumerate(fields.split(), start=1):
            field_name, kind = field.removesuffix("*").split(":")
            added = message.field.add(name=field_name, number=number)
            added.label = field_type.LABEL_REPEATED if field.endswith("*") else field_type.LABEL_OPTIONAL
            if kind in SCHEMA or kind in ENUMS:
                added.type = field_type.TYPE_MESSAGE if kind in SCHEMA else field_type.TYPE_ENUM
                added.type_name = f".inference.{kind}"
            else:
                added.type = getattr(field_type, f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))


def read_config(folder: Path) -> Any:
    return text_format.Parse((folder / "config.pbtxt").read_text(), model_config()())


def write(bundle_folder: Path, repository: Path) -> Path:
    assert main([str(bundle_folder), "--out", str(repository)]) == 0
    return repository / bundle_folder.name


def open_model(folder: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(folder / "1" / "model.onnx", providers=["CPUExecutionProvider"])


def check_signature(folder: Path) -> None:
    """Names, types and dims against the graph's own, as Triton's backend compares them."""
    config, session = read_config(folder), open_model(folder)
    types = {"tensor(int64)": "TYPE_INT64", "tensor(float)": "TYPE_FP32"}
    for tensors, items in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
        for tensor, item in zip(tensors, items, strict=True):
            assert (tensor.name, TYPES[tensor.data_type]) == (item.name, types[item.type])
            inner = tensor.reshape.shape if tensor.HasField("reshape") else tensor.dims
            # A size with a name is any size; the batch's has to be.
            assert isinstance(item.shape[0], str)
            pairs = zip(inner, item.shape[1:], strict=True)
            assert all(size == of_graph or isinstance(of_graph, str) for size, of_graph in pairs)
    assert [list(output.dims) for output in config.output] == [[2]]


def warm_up_batch(folder: Path, sample: Any) -> dict[str, np.ndarray]:
    """What Triton makes of a warm-up sample: every row the same."""
    inputs, batch = {tensor.name: tensor for tensor in read_config(folder).input}, {}
    for entry in sample.inputs:
        value = entry.value
        assert (TYPES[value.data_type], min(value.dims) > 0) == ("TYPE_INT64", True)
        assert not value.random_data  # of 64 random bits no token id comes
        if value.input_data_file:
            row = np.fromfile(folder / "warmup" / value.input_data_file, dtype="<i8").reshape(value.dims)
        else:
            assert value.zero_data
            row = np.zeros(value.dims, np.int64)
        if inputs[entry.key].HasField("reshape"):
            row = row.reshape(inputs[entry.key].reshape.shape)
        batch[entry.key] = np.stack([row] * sample.batch_size)
    return batch


@pytest.mark.parametrize("kind", MAIN_KINDS)
def test_a_bundle_becomes_a_model_that_triton_reads_and_runs(kind: str, bundle: Folders, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = write(bundle(kind), tmp_path / "models")
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == {
        *("config.pbtxt", "1/model.onnx", "labels.txt", "warmup/attention_mask"),
        *("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    }
    config, session = read_config(folder), open_model(folder)
    assert (config.name, config.backend) == (kind, "onnxruntime")
    check_signature(folder)
    assert (folder / "labels.txt").read_text() == "not_equivalent\nequivalent\n"
    assert [output.label_filename for output in config.output] == ["labels.txt"]
    sizes = list(config.dynamic_batching.preferred_batch_size)
    assert [2, *sizes, config.max_batch_size] == sorted([2, *sizes, config.max_batch_size])
    assert config.dynamic_batching.max_queue_delay_microseconds > 0

    batch = AutoTokenizer.from_pretrained(folder)(*zip(*PAIRS, strict=True), padding=True, return_tensors="np")
    classifier = OnnxClassifier(load_bundle(bundle(kind)), threads=1)
    logits = session.run(["logits"], dict(batch))[0]
    assert np.abs(logits - classifier.logits(classifier.tokenize(PAIRS).arrays)).max() < 1e-6

    assert [sample.batch_size for sample in config.model_warmup] == [1, config.max_batch_size]
    for sample in config.model_warmup:
        batch = warm_up_batch(folder, sample)
        assert set(batch) == {item.name for item in session.get_inputs()}
        assert batch["input_ids"].shape == (sample.batch_size, POSITIONS - VIRTUAL_TOKENS)
        assert (batch["attention_mask"] == 1).all()
        assert np.isfinite(session.run(["logits"], batch)[0]).all()


@pytest.mark.parametrize(("precision", "kinds"), [("int8", ["KIND_CPU"]), ("fp16", ["KIND_GPU"]), ("fp32", [])])
def test_the_best_graph_is_taken_and_runs_where_it_is_fast(
    precision: str, kinds: list[str], bundle: Folders, bundle_in: Precisions, tmp_path: Path
) -> None:
    file = "model.onnx" if precision == "fp32" else f"model_{precision}.onnx"
    source = bundle("bert") if precision == "fp32" else bundle_in("bert", precision)
    folder = write(source, tmp_path)
    assert (folder / "1" / "model.onnx").read_bytes() == (source / file).read_bytes()
    assert [KINDS[group.kind] for group in read_config(folder).instance_group] == kinds
    check_signature(folder)
    assert not list(folder.glob("*.onnx"))
    # Another one is taken when it is named.
    assert main([str(source), "--out", str(tmp_path), "--name", "plain", "--precision", "fp32"]) == 0
    assert (tmp_path / "plain" / "1" / "model.onnx").read_bytes() == (source / "model.onnx").read_bytes()
    config = read_config(tmp_path / "plain")
    assert (config.name, list(config.instance_group)) == ("plain", [])


@pytest.mark.parametrize("activations", ["dynamic", "static"])
@pytest.mark.parametrize("bits", [None, 7, 8])
def test_the_configuration_says_what_triton_cannot_do_for_int8(
    bits: int | None, activations: str, bundle_in: Precisions, tmp_path: Path
) -> None:
    source = shutil.copytree(bundle_in("bert", "int8"), tmp_path / "b")
    form = {"activations": activations, "weight_bits": bits}
    change_manifest(source, lambda manifest: manifest["graphs"][1]["int8"].update(form))
    folder = write(source, tmp_path / "models")
    check_signature(folder)
    text = (folder / "config.pbtxt").read_text()
    assert ("move a little with their batch" in text) == (activations == "dynamic")
    assert ("without VNNI" in text) == (bits != 7)


def test_a_bundle_of_several_tasks_takes_the_task_of_each_row(adapter: Folders, tmp_path: Path) -> None:
    twin = shutil.copytree(adapter("bert"), tmp_path / "twin")
    assert export_main([str(adapter("bert")), str(twin), "--out", str(tmp_path / "both")]) == 0
    folder = write(tmp_path / "both", tmp_path / "models")
    check_signature(folder)
    (task_ids,) = [tensor for tensor in read_config(folder).input if tensor.name == "task_ids"]
    # A tensor of a number a row has no dims, and Triton wants some: the client gives (n_batch, 1).
    assert (list(task_ids.dims), task_ids.HasField("reshape"), list(task_ids.reshape.shape)) == ([1], True, [])
    task = {"labels": ["not_equivalent", "equivalent"]}
    tasks = [{"task_id": number, "name": name, **task} for number, name in enumerate(("bert", "twin"))]
    assert json.loads((folder / "tasks.json").read_text()) == tasks
    assert not (folder / "labels.txt").exists()
    for sample in read_config(folder).model_warmup:
        assert np.isfinite(open_model(folder).run(["logits"], warm_up_batch(folder, sample))[0]).all()


def test_a_repository_holds_several_models(bundle: Folders, no_leftovers: Path, capsys: Capsys) -> None:
    repository = no_leftovers / "models"
    first = write(bundle("bert"), repository)
    before = (first / "config.pbtxt").read_bytes()
    write(bundle("gpt2"), repository)
    assert main([str(bundle("gpt2")), "--out", str(repository), "--name", "bert"]) == 2
    assert "holds an older Triton model. Add --overwrite" in capsys.readouterr().err
    assert (first / "config.pbtxt").read_bytes() == before
    assert main([str(bundle("gpt2")), "--out", str(repository), "--name", "bert", "--overwrite"]) == 0
    check_signature(first)
    assert (first / "1" / "model.onnx").read_bytes() == (bundle("gpt2") / "model.onnx").read_bytes()
    # Nothing half-written beside them: Triton takes every folder there for a model.
    assert sorted(path.name for path in repository.iterdir()) == ["bert", "gpt2"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("{tmp} --out {tmp}/models", "is no bundle of promptfold"),
        ("{tmp}/damaged --out {tmp}/models", "model.onnx is damaged"),
        ("{bundle} --out {tmp}/models --precision int8", "holds no int8 graph, only fp32"),
        ("{bundle} --out {tmp}/models --name a/b", "--name a/b: Triton's model names stand in URLs"),
        ("{bundle} --out {tmp}/models --name ..", "--name ..: Triton's"),
        ("{bundle} --out {tmp}/x.txt", "cannot be written"),
        ("{bundle} --out {tmp} --name damaged", "holds something that is no Triton model"),
    ],
)
def test_a_wrong_flag_is_refused(flags: str, words: str, bundle: Folders, no_leftovers: Path, capsys: Capsys) -> None:
    (no_leftovers / "x.txt").write_text("x")
    shutil.copytree(bundle("bert"), no_leftovers / "damaged")
    flip_bit(no_leftovers / "damaged" / "model.onnx", 999)
    capsys.readouterr()
    assert main(shlex.split(flags.format(tmp=no_leftovers, bundle=bundle("bert")))) == 2
    error = capsys.readouterr().err
    assert (error.startswith("error: "), error.count("\n")) == (True, 1)
    assert words in error
    assert sorted(path.name for path in no_leftovers.iterdir()) == ["damaged", "x.txt"]
