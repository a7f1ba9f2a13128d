"""What hostile folders are made of, with hashes that fit: the maker of a folder makes its hashes too."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx.parser
import pytest

from export.bundle.folder import BUNDLE, load_bundle
from tests.conftest import Folders
from train.adapter.folder import load_adapter
from train.adapter.record import ADAPTER
from train.common.folder_record import FolderKind, content_of, write_record

Copies = Callable[[str], tuple[Path, FolderKind]]
Hostile = Callable[[onnx.ModelProto | bytes], Path]
KIND_NAMES = ("adapter", "bundle")


def rehash(folder: Path, kind: FolderKind, **changes: Any) -> None:
    """Make a folder's hashes anew, and change entries of its record."""
    path = folder / kind.record
    content = content_of(json.loads(path.read_text(encoding="utf-8"))) | changes
    path.unlink()
    write_record(folder, kind, content, unhashed=["README.md", "curves.png"] if kind is ADAPTER else [])


def load(folder: Path, kind: FolderKind) -> object:
    return load_bundle(folder) if kind is BUNDLE else load_adapter(folder)


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def sparse(path: Path, n_bytes: int) -> None:
    """A file that has its length and nothing in it."""
    path.unlink(missing_ok=True)
    with path.open("wb") as file:
        file.truncate(n_bytes)


class Trap:
    """An object whose pickle makes a folder when it is loaded."""

    def __init__(self, canary: Path) -> None:
        self._canary = canary

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self._canary),)


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """What hostile code makes when it runs."""
    return tmp_path / "hostile-code-was-here"


@pytest.fixture
def copies(adapter: Folders, bundle: Folders, tmp_path: Path) -> Copies:
    """A function from "adapter" or "bundle" to a copy of one, and its kind."""

    def get(name: str) -> tuple[Path, FolderKind]:
        folder = tmp_path / name
        shutil.copytree((adapter if name == "adapter" else bundle)("bert"), folder)
        return folder, (ADAPTER if name == "adapter" else BUNDLE)

    return get


@pytest.fixture
def base(base_model: Folders, tmp_path: Path) -> Path:
    """A copy of a base model."""
    return Path(shutil.copytree(base_model("bert"), tmp_path / "base"))


@pytest.fixture
def hostile(copies: Copies) -> Hostile:
    """A function from a graph to a bundle of it, whose hashes fit."""
    folder, kind = copies("bundle")

    def get(model: onnx.ModelProto | bytes) -> Path:
        content = model if isinstance(model, bytes) else model.SerializeToString()
        (folder / "model.onnx").write_bytes(content)
        rehash(folder, kind)
        return folder

    return get


def graph_of(body: str, *, domain: str = "", output: str = "logits") -> onnx.ModelProto:
    """A model that takes what a bundle's does, from ONNX's own text format."""
    inputs = ", ".join(f"int64[batch, length] {name}" for name in ("input_ids", "attention_mask", "token_type_ids"))
    opsets = '"" : 18' + (f', "{domain}" : 1' if domain else "")
    text = f"<ir_version: 9, opset_import: [{opsets}]> hostile ({inputs}) => (float[] {output}) {body}"
    return onnx.parser.parse_model(text)


def ones(shape: str) -> str:
    """The operator that fills a tensor of any shape."""
    return f"ConstantOfShape <value = float[1] {{1.0}}> ({shape})"


def harmless() -> onnx.ModelProto:
    """Two logits, 1 and 1, of every text."""
    shape = "rows = Shape <start = 0, end = 1> (input_ids) shape = Concat <axis = 0> (rows, two)"
    return graph_of(f"<int64[1] two = {{2}}> {{ {shape} logits = {ones('shape')} }}")


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
