"""Model types that take the generic way, from training to the graph, against PEFT alone."""

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.conftest import (
    GENERIC_KINDS,
    VIRTUAL_TOKENS,
    Data,
    Folders,
    Precisions,
    family_of,
    make_base_model,
    peft_logits,
)
from tests.export.graphs import manifest_of, padded_batch, parametrize_kinds, peft_batch, refusal, run_file
from tests.export.test_export import (  # noqa: F401
    test_a_prediction_of_the_graph_does_not_depend_on_its_batch,
    test_the_graph_gives_pefts_logits_on_shapes_that_were_not_traced,
    test_the_graph_takes_any_batch_and_holds_the_learned_prompt_under_the_names_of_the_manifest,
)
from tests.families import GENERIC, PADDED
from tests.train import test_model
from train.__main__ import main as train_main
from train.adapter.folder import load_adapter

Capture = pytest.CaptureFixture[str]
NO_GRAPH = {"funnel"}
"""Types of which no exporter writes a graph: training and PyTorch take them."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    kinds = [kind for kind in GENERIC_KINDS if kind not in NO_GRAPH or metafunc.function is test_pytorch_gives_the_same]
    parametrize_kinds(metafunc, kinds)


def test_pytorch_gives_the_same(kind: str, adapter: Folders, base_model: Folders) -> None:
    """What training and the page run."""
    test_model.test_the_logits_equal_pefts(kind, adapter, base_model)
    test_model.test_a_prediction_does_not_depend_on_its_batch(kind, adapter)
    assert load_adapter(adapter(kind)).max_length == GENERIC[family_of(kind)].positions - VIRTUAL_TOKENS


def test_the_manifest_says_that_nothing_was_folded_but_keys_and_values(kind: str, bundle: Folders) -> None:
    manifest = manifest_of(bundle(kind))
    assert manifest["exporter"] in {"optimum", "torchscript", "dynamo"}
    assert manifest["rewrites"] == (["constant keys and values"] if kind != family_of(kind) else [])
    assert manifest["is_decoder"] == GENERIC[family_of(kind)].is_decoder


def test_dense_layers_become_integer_and_padding_stays_without_effect(
    kind: str, bundle_in: Precisions, adapter: Folders
) -> None:
    folder = bundle_in(kind, "int8")
    graph = onnx.load(folder / "model_int8.onnx")
    counts = Counter(node.op_type for node in graph.graph.node)
    assert counts["MatMulInteger"] + counts["DynamicQuantizeMatMul"] >= 4
    batch = padded_batch(kind, 6, 30)
    exact, rounded = (run_file(folder / name, batch) for name in ("model.onnx", "model_int8.onnx"))
    # A random model has no margin, so labels say nothing; its logits are of the size of 1.
    assert np.abs(rounded - exact).mean() < 0.2


@pytest.mark.parametrize("family", [name for name, family in GENERIC.items() if family.ignored])
def test_what_is_special_about_a_family_changes_the_logits(
    family: str, adapter: Folders, base_model: Folders, tmp_path: Path
) -> None:
    """So that a graph which ignores a window, relative positions or a rotation fails the comparison with PEFT."""
    other = shutil.copytree(base_model(family), tmp_path / "base")
    config = json.loads((other / "config.json").read_text())
    assert config.keys() >= GENERIC[family].ignored.keys()
    (other / "config.json").write_text(json.dumps(config | GENERIC[family].ignored))
    batch = peft_batch(family, 2, 40)
    right, wrong = (peft_logits(adapter(family), base, batch) for base in (base_model(family), other))
    assert np.abs(right - wrong).max() > 1e-3


@pytest.mark.parametrize("family", [name for name, family in GENERIC.items() if not family.takes_v2])
def test_p_tuning_v2_is_refused_by_name_where_a_model_takes_no_keys_and_values(
    family: str, base_model: Folders, data: Data, no_leftovers: Path, capsys: Capture
) -> None:
    words = [
        "--model",
        str(base_model(family)),
        "--method",
        "p-tuning-v2",
        *data.flags,
        "--out",
        str(no_leftovers / "a"),
    ]
    assert train_main(words) == 2
    assert f"models of type '{family}' take no learned keys and values." in capsys.readouterr().err
    assert list(no_leftovers.iterdir()) == []


@pytest.mark.parametrize("family", PADDED)
def test_a_type_whose_answers_depend_on_padding_is_refused_before_it_is_trained(
    family: str, data: Data, tmp_path: Path, capsys: Capture
) -> None:
    base = make_base_model(tmp_path / "base", family)
    assert train_main(["--model", str(base), *data.flags, "--out", str(tmp_path / "a")]) == 2
    error = capsys.readouterr().err
    assert re.search(f"what a model of type '{family}' says of a text depends on its padding", error)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("family", sorted(NO_GRAPH))
def test_a_type_that_no_exporter_writes_is_refused_with_the_reasons(
    family: str, adapter: Folders, no_leftovers: Path, capsys: Capture
) -> None:
    error = refusal(capsys, adapter(family), "--out", no_leftovers / "b")
    assert f"no exporter writes a graph for its type '{family}' (optimum: " in error
    assert "; torchscript: " in error
    assert "; dynamo: " in error
    assert list(no_leftovers.iterdir()) == []
