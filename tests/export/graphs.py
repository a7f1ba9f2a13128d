"""Helpers for tests of graphs: what a kind of model takes, batches for it, and the same tests for few kinds or for many."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from export.__main__ import main
from export.bundle.folder import BUNDLE
from tests.conftest import ENCODERS, TOKEN_TYPES, family_of, is_decoder, random_batch
from train.common.folder_record import seal

N_LAYERS = 2
"""The same for every tiny model."""


def parametrize_kinds(metafunc: pytest.Metafunc, kinds: Sequence[str]) -> None:
    """Run a test that takes a ``kind`` for each of them, and one that takes an ``encoder_kind`` for the encoders among them."""
    if "kind" in metafunc.fixturenames:
        metafunc.parametrize("kind", kinds)
    elif "encoder_kind" in metafunc.fixturenames:
        metafunc.parametrize("encoder_kind", [kind for kind in kinds if family_of(kind) in ENCODERS])


def run_export(*words: object) -> int:
    return main([str(word) for word in words])


def refusal(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """What an export says that has to fail."""
    capsys.readouterr()
    assert run_export(*words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    return error


def inputs_of(kind: str) -> list[str]:
    return ["input_ids", "attention_mask", *(["token_type_ids"] if family_of(kind) in TOKEN_TYPES else [])]


def padded_batch(kind: str, n_batch: int, n_text: int, seed: int = 1) -> dict[str, np.ndarray]:
    return random_batch(np.random.default_rng(seed), n_batch, n_text, token_types=family_of(kind) in TOKEN_TYPES)


def peft_batch(kind: str, n_batch: int, n_text: int, seed: int = 3) -> dict[str, np.ndarray]:
    """A random batch that PEFT reads as well: padded on the right, but for a decoder, of which it reads the last row."""
    batch = padded_batch(kind, n_batch, n_text, seed)
    if is_decoder(kind):
        batch["attention_mask"][:] = 1
        # transformers takes a last padding token for padding.
        batch["input_ids"][:, -1] = 7
    return batch


INTEGER = {"MatMulInteger", "MatMulIntegerToFloat"}
"""Operators of dense products in int8."""


def open_graph(graph: Path | bytes) -> onnxruntime.InferenceSession:
    """A graph in plain ONNX Runtime, slowly, but with int8 that is exact on processors without VNNI too."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def run_file(path: Path, batch: dict[str, np.ndarray]) -> np.ndarray:
    """The logits of a graph by ONNX Runtime alone."""
    return open_graph(path).run(["logits"], batch)[0]


def manifest_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return content


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest in a way that its own hash does not tell."""
    manifest = manifest_of(folder)
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(seal(manifest, BUNDLE)))
