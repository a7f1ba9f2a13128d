"""Untrusted folders that take whole exports, or a process of their own, to be refused."""

import json
import random
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from google.protobuf.internal.encoder import _VarintBytes  # type: ignore[import-untyped]

import export.runtime.trial
from export.__main__ import main as export_main
from export.bundle.folder import load_bundle
from export.bundle.graph_outline import check_graph
from export.runtime.classifier import OnnxClassifier
from export.runtime.trial import try_bundle
from export.score.__main__ import main as score_main
from tests import test_untrusted
from tests.conftest import ROOT, Data, Folders, Precisions
from tests.test_untrusted import Capture, Copies, Hostile, Patch, change_json, graph_of, harmless, rehash, sparse
from train.adapter.folder import load_adapter
from train.adapter.peft import find_adapter_base, load_peft_model
from train.adapter.record import ADAPTER
from train.common.errors import BundleError, ModelError
from train.common.folder_record import sha256_of_file
from train.model.tokenizer import load_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
copies, hostile = test_untrusted.copies, test_untrusted.hostile


def test_the_base_model_that_an_adapter_names_is_not_asked_for(copies: Copies, monkeypatch: Patch) -> None:
    folder, kind = copies("adapter")
    before = load_adapter(folder)
    base = find_adapter_base(before)

    def logits() -> np.ndarray:
        with torch.inference_mode():
            return load_peft_model(folder, base, before.labels)(torch.tensor([[0, 5, 6, 2]])).logits.numpy()

    expected = logits()
    change_json(folder / "adapter_config.json", base_model_name_or_path="stranger/model", revision="evil")
    rehash(folder, kind)
    for place, name in ((socket.socket, "connect"), (socket, "getaddrinfo")):
        monkeypatch.setattr(place, name, None)  # to ask the network is a TypeError
    assert load_adapter(folder).sha256 != before.sha256
    assert np.array_equal(logits(), expected)


def test_a_file_that_an_adapter_names_is_opened_only_by_its_hash(copies: Copies, data: Data, capsys: Capture) -> None:
    """And never where it is larger than any."""
    folder, kind = copies("adapter")
    training = json.loads((folder / "training.json").read_text())
    huge = folder.parent / "huge.jsonl"
    sparse(huge, 100 * 2**30)
    for named in (huge, folder.parent / ("x" * 300), Path("/dev/zero")):
        rehash(folder, kind, config=training["config"] | {"validation_file": str(named)})
        capsys.readouterr()
        assert export_main([str(folder), "--out", str(folder.parent / f"b{len(str(named))}")]) == 0
        assert "compared with fp32 on" in capsys.readouterr().out
    changed = training["config"] | {"validation_file": str(data.validation_file)}
    rehash(folder, kind, config=changed, data_sha256={"validation": sha256_of_file(data.validation_file)})
    assert export_main([str(folder), "--out", str(folder.parent / "b")]) == 0
    assert f"gated on the 40 rows of {data.validation_file}" in capsys.readouterr().out


def ones(shape: str) -> str:
    """The operator that fills a tensor of any shape."""
    return f"ConstantOfShape <value = float[1] {{1.0}}> ({shape})"


_DOUBLED = " ".join(f"x{i + 1} = Concat <axis = 0> (x{i}, x{i})" for i in range(40))
TOO_LARGE = (
    # Known before any text, so ONNX Runtime may compute it while it loads.
    f"<int64[1] n = {{2000000000}}> {{ big = {ones('n')} logits = ReduceSum (big) }}",
    "<int64[1] m = {1000000}> { length = Shape <start = 1, end = 2> (input_ids) many = Mul (length, m) n = Mul (many, m) "
    f"big = {ones('n')} logits = ReduceSum (big) }}",
    f"<int64[1] n = {{1000}}> {{ x0 = {ones('n')} {_DOUBLED} logits = ReduceSum (x40) }}",
    # It claims to hold what it does not.
    "<float[1000000000000] w = {}> { logits = Identity (w) }",
)
"""Graphs that want more memory than there is."""
BREAK: dict[str, Callable[[dict[str, Any]], object]] = {
    "empty": dict.clear,
    "unknown": lambda content: content["model"].update(type="Unknown"),
    "negative id": lambda content: content["model"].update(vocab={"a": -1}),
    # It loads, and panics at the first text.
    "panic": lambda content: content["post_processor"].update(special_tokens={}),
    "no such token": lambda content: content["model"].update(unk_token="none"),
}


@pytest.mark.parametrize("how", BREAK)
def test_a_broken_tokenizer_is_refused_in_words(how: str, copies: Copies) -> None:
    """Files that are JSON, and of which the library makes an error, an odd error, or a panic of its Rust code."""
    for folder, kind in (copies("bundle"), copies("adapter")):
        content = json.loads((folder / "tokenizer.json").read_text())
        BREAK[how](content)
        (folder / "tokenizer.json").write_text(json.dumps(content))
        rehash(folder, kind)
        if kind is ADAPTER:
            with pytest.raises(ModelError, match="holds no tokenizer that can be loaded"):
                load_tokenizer(folder, 40)
        else:
            with pytest.raises(BundleError, match=r"tokenizer\.json (is no tokenizer|has no token)"):
                OnnxClassifier(load_bundle(folder), threads=1).tokenize([("strange", "words")])
            with pytest.raises(BundleError):
                try_bundle(load_bundle(folder))


def test_a_graph_of_a_million_empty_nodes_is_refused_before_it_is_parsed(hostile: Hostile) -> None:
    """Two bytes each in the file, hundreds in memory; the bytes of tensors do not count, others do."""
    nodes = b"\x0a\x00" * 1_000_001
    # A second GraphProto, field 7 of the model; parsers merge the two.
    many = harmless().SerializeToString() + b"\x3a" + _VarintBytes(len(nodes)) + nodes
    described, with_tensor = harmless(), harmless()
    described.graph.doc_string = "x" * 17 * 2**20
    with_tensor.graph.initializer.add(raw_data=b"x" * 17 * 2**20)
    for content, words in ((many, "more than 1,000,000 fields"), (described, "17 MiB beside the bytes of its tensors")):
        with pytest.raises(BundleError, match=words):
            check_graph(hostile(content) / "model.onnx")
    check_graph(hostile(with_tensor) / "model.onnx")


def test_whatever_the_bytes_a_graph_is_read_to_its_end_or_refused(tmp_path: Path, bundle: Folders) -> None:
    path = tmp_path / "model.onnx"
    generator = random.Random(5)  # noqa: S311 -- test data
    for good in (harmless().SerializeToString(), (bundle("gpt2") / "model.onnx").read_bytes()[:3000]):
        n_refused = 0
        for _ in range(300):
            content = bytearray(good)
            for _ in range(generator.randint(1, 4)):
                odd = generator.choice((0, 1, 127, 128, 255, generator.randrange(256)))
                content[generator.randrange(len(content))] = odd
            path.write_bytes(content[: generator.randint(1, len(content))])
            try:
                check_graph(path)
            except BundleError:
                n_refused += 1
        assert n_refused
    for broken in (b"", b"\x80", b"\xff" * 20, b"\x3a\xff\xff\xff\xff\x0f", b"\x0b", b"\x00\x00"):
        path.write_bytes(broken)
        with pytest.raises(BundleError, match="ONNX Runtime cannot load"):
            check_graph(path)


@pytest.mark.parametrize(
    ("body", "output"),
    [
        ("{ logits = Cast <to = 1> (input_ids) }", "logits"),
        ("{ x = Cast <to = 1> (input_ids) sum = ReduceSum (x) }", "sum"),
        ("<int64[2] no = {7, 77}> { x = Cast <to = 1> (input_ids) out = Reshape (x, no) }", "out"),
        ("{ logits = NoSuchOperator (input_ids) }", "logits"),
    ],
)
def test_a_graph_that_gives_no_logits_of_the_texts_is_refused(body: str, output: str, hostile: Hostile) -> None:
    bundle = load_bundle(hostile(graph_of(body, output=output)))
    with pytest.raises(BundleError, match=r"gives no logits|gives logits of shape|cannot (load|run)"):
        classifier = OnnxClassifier(bundle, threads=1, use_cuda=False)
        classifier.logits(classifier.tokenize([("word1", "word2")]).arrays)
    with pytest.raises(BundleError, match=r"cannot be opened: "):
        try_bundle(bundle)


@pytest.mark.parametrize("body", TOO_LARGE)
def test_a_graph_that_wants_more_memory_than_there_is_ends_in_a_process_of_its_own(body: str, hostile: Hostile) -> None:
    with pytest.raises(BundleError, match=r"cannot be opened: .*512 MiB of memory and 60 s"):
        try_bundle(load_bundle(hostile(graph_of(body))))


def test_a_graph_that_takes_for_ever_is_stopped(hostile: Hostile) -> None:
    """Matrices of 8000 by 8000, a thousand products of them: hours."""
    products = " ".join(f"x{i + 1} = MatMul (x0, x{i})" for i in range(1000))
    body = f"<int64[2] n = {{8000, 8000}}> {{ x0 = {ones('n')} {products} logits = Identity (x1000) }}"
    with pytest.raises(BundleError, match=r"(was not open after 3 s|it took too long).*2048 MiB of memory and 3 s"):
        try_bundle(load_bundle(hostile(graph_of(body))), memory_mib=2048, seconds=3)


def test_a_process_without_memory_says_so_and_does_not_take_us_along(bundle: Folders) -> None:
    with pytest.raises(BundleError, match=r"cannot be opened: its? .*32 MiB of memory"):
        try_bundle(load_bundle(bundle("bert")), memory_mib=32)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import time; time.sleep(3600)", "was not open after 1 s"),  # its processor time does not end
        ("import os; os.kill(os.getpid(), 11)", "ended by SIGSEGV"),
        ("import os; os.kill(os.getpid(), 24)", "it took too long"),
        ("import os; os.kill(os.getpid(), 9)", "ended by SIGKILL"),
        ("import os; os._exit(3)", "ended with status 3"),
        ("import os; os.kill(os.getpid(), 64)", r"ended by (SIGRTMAX|signal)"),
    ],
)
def test_a_process_that_ends_silently_is_described(code: str, words: str, bundle: Folders, monkeypatch: Patch) -> None:
    """Another program in the place of the one that `try_bundle` starts, which a crash, a limit or a killer ends."""
    run = subprocess.run
    instead: Callable[..., Any] = lambda _, **settings: run([sys.executable, "-c", code], **settings)  # noqa: E731
    monkeypatch.setattr(export.runtime.trial.subprocess, "run", instead)
    with pytest.raises(BundleError, match=words):
        try_bundle(load_bundle(bundle("bert")), seconds=1)


def test_the_process_can_write_no_file_and_its_limits_are_set(tmp_path: Path) -> None:
    code = (
        "import pathlib, resource, sys, export.runtime.trial\nexport.runtime.trial.limit_process(4096, 7)\n"
        "print(resource.getrlimit(resource.RLIMIT_AS)[1] >> 20, resource.getrlimit(resource.RLIMIT_CPU)[0])\n"
        "pathlib.Path(sys.argv[1]).write_text('x')\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "x")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.stdout.split() == ["4096", "7"]
    assert "File too large" in result.stderr
    assert not (tmp_path / "x").read_text()


def test_our_own_bundles_open_from_any_folder_and_all_their_tasks_are_tried(
    adapter: Folders, bundle_in: Precisions, tmp_path: Path, monkeypatch: Patch
) -> None:
    for name in ("one", "two"):
        shutil.copytree(adapter("bert"), tmp_path / name)
    assert export_main([str(tmp_path / "one"), str(tmp_path / "two"), "--out", str(tmp_path / "both")]) == 0
    for kind in ("bert", "gpt2-v2"):
        shutil.copytree(bundle_in(kind, "int8"), tmp_path / kind)
    monkeypatch.chdir(tmp_path)
    for name in ("both", "bert", "gpt2-v2"):
        try_bundle(load_bundle(Path(name)))


def test_a_file_is_labelled_by_an_untrusted_bundle_only_after_it_was_tried(
    hostile: Hostile, bundle: Folders, data: Data, tmp_path: Path, capsys: Capture
) -> None:
    words = ["--in", str(data.validation_file), "--threads", "1", "--no-labels", "--out"]
    out, again = tmp_path / "x.jsonl", tmp_path / "y.jsonl"
    assert score_main([str(hostile(graph_of(TOO_LARGE[0]))), *words, str(out), "--untrusted"]) == 2
    sentence = "error: .*If you trust who made it, open it without this trial.*\n"
    assert re.fullmatch(sentence, capsys.readouterr().err)
    assert not out.exists()
    assert score_main([str(bundle("bert")), *words, str(out), "--untrusted"]) == 0
    assert score_main([str(bundle("bert")), *words, str(again)]) == 0
    assert out.read_bytes() == again.read_bytes()
