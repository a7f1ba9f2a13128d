"""Model types that take the generic way, from training to the graph, against PEFT alone."""

import json
import re
import shutil
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import pytest

from export.fold.graphs import exporter
from tests.conftest import (
    GENERIC_KINDS,
    VIRTUAL_TOKENS,
    Data,
    Folders,
    Precisions,
    Second,
    family_of,
    make_base_model,
    peft_logits,
)
from tests.export import test_many_tasks
from tests.export.graphs import (
    INTEGER,
    manifest_of,
    padded_batch,
    parametrize_kinds,
    peft_batch,
    refusal,
    run_export,
    run_file,
)
from tests.export.test_export import (  # noqa: F401
    test_a_prediction_of_the_graph_does_not_depend_on_its_batch,
    test_the_graph_gives_pefts_logits_on_shapes_that_were_not_traced,
    test_the_graph_takes_any_batch_and_holds_the_learned_prompt_under_the_names_of_the_manifest,
)
from tests.families import GENERIC, POSITIONS, REFUSED
from tests.train import test_model
from train.__main__ import main as train_main
from train.adapter.folder import load_adapter

Capture = pytest.CaptureFixture[str]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    parametrize_kinds(metafunc, GENERIC_KINDS)


def test_pytorch_gives_the_same(kind: str, adapter: Folders, base_model: Folders) -> None:
    """What training and the page run."""
    test_model.test_the_logits_equal_pefts(kind, adapter, base_model)
    test_model.test_a_prediction_does_not_depend_on_its_batch(kind, adapter)
    assert load_adapter(adapter(kind)).max_length == POSITIONS - VIRTUAL_TOKENS


def test_the_manifest_says_that_nothing_was_folded_but_keys_and_values(kind: str, bundle: Folders) -> None:
    manifest = manifest_of(bundle(kind))
    assert manifest["exporter"] in {"optimum", "torchscript", "dynamo"}
    assert manifest["rewrites"] == (["constant keys and values"] if kind != family_of(kind) else [])
    assert manifest["is_decoder"] == GENERIC[family_of(kind)].is_decoder


@pytest.mark.parametrize(
    "one_kind",
    ["albert", "camembert-v2", "deberta", "deberta-v2", "ernie", "rembert-v2", "gemma2", "qwen3", "qwen3-v2"],
)
def test_several_tasks_share_one_graph(
    one_kind: str, adapter: Folders, second: Second, base_model: Folders, tmp_path: Path
) -> None:
    """Heads of each form: a pooler that is a layer alone, none, and one beside the backbone."""
    test_many_tasks.test_a_batch_may_mix_tasks_and_each_row_gets_its_own_adapters_logits(
        one_kind, adapter, second, base_model, tmp_path
    )


def test_a_head_of_another_form_serves_one_task_alone(
    adapter: Folders, second: Second, no_leftovers: Path, capsys: Capture
) -> None:
    error = refusal(capsys, adapter("modernbert"), second("modernbert"), "--out", no_leftovers / "b")
    assert "The head of a model of type 'modernbert' (head, classifier) is not one or two dense layers" in error
    assert error.endswith("Export each alone.\n")


@pytest.mark.parametrize("family", GENERIC)
def test_fp16_is_as_near_as_its_mantissa(family: str, bundle_in: Precisions) -> None:
    """Run on a CPU here, whose kernels compute some operators in fp32."""
    folder, batch = bundle_in(family, "fp16"), peft_batch(family, 5, 19)
    full, half = (run_file(folder / name, batch) for name in ("model.onnx", "model_fp16.onnx"))
    # fp16 has 11 bits: a thousandth of each sum, a few sums deep.
    assert 0 < np.abs(half - full).max() < 20 * 2**-11 * np.abs(full).max()


@pytest.mark.parametrize("family", ["albert", "deberta-v2", "modernbert", "gemma3_text", "gpt_neox", "qwen3"])
def test_dense_layers_become_integer(family: str, bundle_in: Precisions) -> None:
    """Families whose graphs differ most: shared layers, relative positions, windows, one product for three, grouped heads."""
    folder = bundle_in(family, "int8")
    graph = onnx.load(folder / "model_int8.onnx")
    counts = Counter(node.op_type for node in graph.graph.node)
    assert sum(counts[name] for name in INTEGER) >= 4
    batch = padded_batch(family, 6, 30)
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


# Funnel's own code reads a tensor by a list of slices.
@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence for multidimensional indexing:UserWarning")
@pytest.mark.parametrize("family", REFUSED)
def test_a_type_that_no_graph_could_be_right_for_is_refused_before_it_is_trained(
    family: str, data: Data, no_leftovers: Path, capsys: Capture
) -> None:
    with TemporaryDirectory() as folder:
        base = make_base_model(Path(folder) / "base", family)
        assert train_main(["--model", str(base), *data.flags, "--out", str(no_leftovers / "a")]) == 2
    error = capsys.readouterr().err
    words = "rows for a text of 12 tokens in its last layer" if family == "funnel" else "depends on its padding"
    assert re.search(f"a model of type '{family}' .*{words}", error)
    assert list(no_leftovers.iterdir()) == []


def test_a_model_that_no_exporter_writes_is_refused_with_the_reason_of_each(
    adapter: Folders, no_leftovers: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here because all graphs are too far away."""
    monkeypatch.setattr(exporter, "TOLERANCE", -1.0)
    error = refusal(capsys, adapter("qwen3"), "--out", no_leftovers / "b")
    assert "no exporter writes a graph for its type 'qwen3' (optimum: its graph differs by " in error
    assert "; torchscript: RuntimeError" in error
    assert "; dynamo: its graph differs by " in error
    assert list(no_leftovers.iterdir()) == []


def test_without_optimum_pytorchs_exporters_write_everything(
    adapter: Folders, base_model: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A known encoder by the older exporter, and decoders, which that cannot trace, by the newer one."""
    monkeypatch.setattr(exporter, "HAS_OPTIMUM", False)
    for kind, name in (("bert", "torchscript"), ("gpt2", "dynamo"), ("qwen3", "dynamo"), ("llama-v2", "dynamo")):
        assert run_export(adapter(kind), "--out", tmp_path / kind) == 0
        assert manifest_of(tmp_path / kind)["exporter"] == name
        batch = peft_batch(kind, 3, 17)
        expected = peft_logits(adapter(kind), base_model(family_of(kind)), batch)
        assert np.abs(run_file(tmp_path / kind / "model.onnx", batch) - expected).max() < 1e-4
