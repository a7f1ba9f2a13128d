"""Step 5, quantize: the graph in int8 for CPUs and in fp16 for CUDA, each kept only if it passes the quality gate.

When the whole graph in int8 fails the gate, layers go back to fp32, the most sensitive first.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx

from export.bundle.folder import FP16, FP32, GRAPH_FILES, INT8, Gate
from export.fold.compare import compare_with_peft
from export.fold.config import AUTO, ExportConfig
from export.fold.fold import fold_adapters
from export.fold.gate import LabelledBatches, label_batches, logits_of, measure_gates
from export.fold.graphs.files import save_graph
from export.fold.int8 import layers_of, write_int8
from export.fold.read import Sources
from export.fold.trace import write_graph
from export.runtime.session import cuda_absence
from train.common.console import say
from train.common.errors import PrecisionError

RANKING_ROWS = 64
"""Labelled rows on which layers are ranked by how much int8 disturbs them."""


def quantize(
    folder: Path, sources: Sources, config: ExportConfig
) -> tuple[dict[str, list[Gate]], dict[str, list[Gate]]]:
    """Make a bundle's other precisions from its fp32 graph, or judge those that it has for the tasks that are added.

    Returns:
        the gates of each graph that stays in the folder, and of each that was removed, by precision

    Raises:
        PrecisionError: a precision costs too much that was asked for by name, or that the bundle holds already.
    """
    kept: dict[str, list[Gate]] = {FP32: []}
    refused: dict[str, list[Gate]] = {}
    precisions = _wanted_precisions(sources, config)
    rows = label_batches(folder, sources) if precisions else []
    for precision in precisions:
        if sources.old is not None:
            (old,) = (graph for graph in sources.old.graphs if graph.precision == precision)
            gates = measure_gates(folder, precision, rows, kept_fp32=old.gates[0].kept_fp32)
        else:
            gates = _make_int8(folder, rows) if precision == INT8 else _make_fp16(folder, rows, sources)
        for gate in gates:
            say(f"      {precision} on {gate.file}: {gate}")
        failed = [gate for gate in gates if not gate.passed]
        if not failed:
            kept[precision] = gates
        elif config.add or config.precision != AUTO:
            raise PrecisionError(
                f"{precision} on {failed[0].file}: {failed[0]}. More than {100 * failed[0].tolerance:g} points may not be "
                f"lost, so nothing was written. Take --precision {AUTO} or {FP32}."
            )
        else:
            (folder / GRAPH_FILES[precision]).unlink()
            refused[precision] = gates
    return kept, refused


def _wanted_precisions(sources: Sources, config: ExportConfig) -> list[str]:
    """The precisions beside fp32 that are made, or judged for the tasks that are added."""
    rows = [task.rows for task in sources.tasks if task.rows is not None]
    gated_on = f"gated on {', '.join(f'the {len(one.dataset)} rows of {one.file}' for one in rows)}"
    if sources.old is not None:
        gated: list[str] = [graph.precision for graph in sources.old.graphs if graph.gates]
        if gated:
            say(f"[4/5] other precisions, {gated_on}")
        return gated
    is_judged = len(rows) == len(sources.tasks)
    if config.precision == FP32 or not (is_judged or config.ungated):
        why = ": what another precision costs can be measured only with --validation-file"
        say(f"[4/5] fp32 alone{why if config.precision == AUTO else ''}")
        return []
    how = gated_on if is_judged else "ungated: no labelled rows are here that could say what they cost"
    say(f"[4/5] other precisions, {how}")
    if config.precision != AUTO:
        return [config.precision]
    return [INT8] if cuda_absence() else [INT8, FP16]


def _make_fp16(folder: Path, rows: Sequence[LabelledBatches], sources: Sources) -> list[Gate]:
    """Trace the graph for a GPU, which has other operators, compare it in fp32, and then convert it.

    Inputs and logits keep their types. Norms and softmaxes sum in fp32 inside.
    """
    from onnxruntime.transformers.onnx_model import OnnxModel

    path = folder / GRAPH_FILES[FP16]
    write_graph(fold_adapters(sources.adapters, sources.base, for_gpu=True), path)
    # Not on CUDA: it computes attention in fp32 by other kernels than in fp16, which is the one that counts.
    compare_with_peft(path, sources.tasks, sources.base, use_cuda=False)
    model = OnnxModel(onnx.load(path))
    with warnings.catch_warnings():
        # The mask's fp32 minimum becomes fp16's, which hides as well, and numbers below fp16's smallest become 0.
        warnings.simplefilter("ignore", UserWarning)
        model.convert_float_to_float16(keep_io_types=True)
    save_graph(model.model, path)
    return measure_gates(folder, FP16, rows)


def _make_int8(folder: Path, rows: Sequence[LabelledBatches]) -> list[Gate]:
    """Leave layers in fp32 until the graph passes the gate, half of them at most."""
    references = logits_of(folder / GRAPH_FILES[FP32], INT8, rows)

    def attempt(kept: Sequence[int]) -> list[Gate]:
        write_int8(folder, keep=set(kept))
        return measure_gates(folder, INT8, rows, kept_fp32=kept, references=references)

    gates = attempt([])
    if all(gate.passed for gate in gates):
        return gates
    layers = sorted(set(layers_of(onnx.load(folder / GRAPH_FILES[FP32])).values()))
    say(f"      int8 throughout: {'; '.join(map(str, gates))}; ranking the {len(layers)} layers")
    ranked = _by_disturbance(folder, rows, layers)
    for n_kept in range(1, len(layers) // 2 + 1):
        gates = attempt(sorted(ranked[:n_kept]))
        if all(gate.passed for gate in gates):
            break
        say(f"      int8: {'; '.join(map(str, gates))}")
    return gates


def _by_disturbance(folder: Path, rows: Sequence[LabelledBatches], layers: Sequence[int]) -> list[int]:
    """Layers in the order in which they go back to fp32: first the one without which int8 disturbs least."""
    samples = [one.sample(RANKING_ROWS) for one in rows]
    references = logits_of(folder / GRAPH_FILES[FP32], INT8, samples)
    remaining = {}
    for layer in layers:
        write_int8(folder, keep={layer})
        found = logits_of(folder / GRAPH_FILES[INT8], INT8, samples)
        differences = [np.abs(logits - reference).mean() for logits, reference in zip(found, references, strict=True)]
        remaining[layer] = float(np.mean(differences))
    return sorted(layers, key=remaining.__getitem__)
