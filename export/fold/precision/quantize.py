"""Step 5, quantize: the graph in int8 for CPUs and in fp16 for CUDA, each kept only if it passes the quality gate."""

import warnings
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import onnx

from export.bundle.folder import FP16, FP32, GRAPH_FILES, INT8, Int8Form, data_path
from export.fold.compare import compare_with_peft
from export.fold.config import AUTO, GATE_TOLERANCE, ExportConfig
from export.fold.fold import fold_adapters
from export.fold.graphs.files import save_graph
from export.fold.precision.calibration import TaskBatches, batch_texts
from export.fold.precision.choose import Int8Chooser
from export.fold.precision.fidelity import LEAST_EQUAL
from export.fold.precision.gate import Cost, Judge, LabelledBatches, label_batches
from export.fold.read import Sources
from export.fold.trace import write_graph
from export.runtime.session import cuda_absence
from train.common.console import say
from train.common.errors import PrecisionError


@dataclass(frozen=True)
class MadeGraph:
    """A graph in one precision, and what it costs."""

    precision: str
    cost: Cost
    int8: Int8Form | None = None
    no_fidelity: str = ""
    """Why the calibration texts are no measure of what it costs; empty where they are."""


NOTHING = Cost((), ())
"""The cost of fp32, with which the others are compared, and of a graph that is kept ungated."""


def quantize(folder: Path, sources: Sources, config: ExportConfig) -> tuple[list[MadeGraph], list[MadeGraph]]:
    """Make a bundle's other precisions from its fp32 graph, or judge those that it has for the tasks that are added.

    Returns:
        the graphs that stay in the folder, and those that were removed

    Raises:
        PrecisionError: a precision costs too much that was asked for by name, or that the bundle holds already, or
            nothing can say what it costs.
    """
    kept = [MadeGraph(FP32, NOTHING)]
    refused: list[MadeGraph] = []
    precisions = _wanted_precisions(sources, config)
    if not precisions:
        return kept, refused
    rows, texts = label_batches(folder, sources), batch_texts(folder, sources)
    if sources.old and not any(graph.gates for graph in sources.old.graphs):
        rows = []  # a new task is judged as those before it were
    judge, trouble = _find_judge(folder, sources, rows, texts)
    if judge is None and (sources.old or not config.ungated):
        if sources.old or config.precision != AUTO:
            raise PrecisionError(f"What {precisions[0]} costs is unknown: {trouble}. {_REMEDY}")
        say(f"      left out, as nothing can say what they cost. {_REMEDY}")
        return kept, refused
    for precision in precisions:
        made = replace(_make(precision, folder, sources, texts, judge), no_fidelity=trouble)
        if made.cost is not NOTHING:
            say(f"      {precision} {made.cost}")
        if made.cost.passed:
            kept.append(made)
        elif config.add or config.precision != AUTO:
            limit = (
                f"More than {100 * GATE_TOLERANCE:g} points may not be lost"
                if made.cost.gates
                else f"At least {100 * LEAST_EQUAL:g} % of the labels must be equal"
            )
            raise PrecisionError(
                f"{precision} {made.cost}. {limit}, so nothing was written. Take --precision {AUTO} or {FP32}."
            )
        else:
            path = folder / GRAPH_FILES[precision]
            path.unlink()
            data_path(path).unlink(missing_ok=True)
            refused.append(made)
    return kept, refused


_REMEDY = "Give labelled rows with --validation-file, or texts in its language with --calibration-file"


def _find_judge(
    folder: Path, sources: Sources, rows: list[LabelledBatches], texts: list[TaskBatches]
) -> tuple[Judge | None, str]:
    """The judge of what a precision costs, None where nothing can say it; and why texts without labels cannot."""
    trouble = next((task.texts.trouble for task in sources.tasks if task.texts and task.texts.trouble), "")
    judge = Judge(folder, rows, [] if trouble else texts)
    if not trouble:
        seen = judge.classes_seen()
        one_sided = [task.name for task, n_classes in zip(texts, seen, strict=True) if n_classes < 2]
        if one_sided:
            trouble = f"fp32 gives all texts of {one_sided[0]} the same label"
            judge = Judge(folder, rows, [])
    if trouble:
        say(f"      no fidelity without labels is measured: {trouble}")
    return (judge if rows or not trouble else None), trouble


def _make(precision: str, folder: Path, sources: Sources, texts: list[TaskBatches], judge: Judge | None) -> MadeGraph:
    """Make a graph, or take the one that the bundle holds already, and measure what it costs."""
    path = folder / GRAPH_FILES[precision]
    cost_of = partial(judge, on_cpu=precision == INT8) if judge else lambda _: NOTHING
    if sources.old is not None:
        return MadeGraph(precision, cost_of(path))
    if precision == INT8:
        # int8 is for CPUs, so it is judged on one, even on a machine with a GPU.
        # Static scales from texts of another language would be wrong for its own.
        may_be_static = not any(task.texts and task.texts.trouble for task in sources.tasks)
        form, cost = Int8Chooser(folder, texts).choose(cost_of, may_be_static=may_be_static)
        say(f"      int8: {form}; calibrated on {form.n_texts} texts of {form.calibration}")
        return MadeGraph(precision, cost, form)
    _write_fp16(path, sources)
    return MadeGraph(precision, cost_of(path))


def _wanted_precisions(sources: Sources, config: ExportConfig) -> list[str]:
    """The precisions beside fp32 that are made, or judged for the tasks that are added."""
    if sources.old is not None:
        judged: list[str] = [graph.precision for graph in sources.old.graphs if graph.is_judged]
        if judged:
            say(f"[4/5] other precisions, {_judged_on(sources)}")
        return judged
    if config.precision == FP32:
        say("[4/5] fp32 alone")
        return []
    say(f"[4/5] other precisions, {_judged_on(sources)}")
    if config.precision != AUTO:
        return [config.precision]
    return [INT8] if cuda_absence() else [INT8, FP16]


def _judged_on(sources: Sources) -> str:
    rows = [task.rows for task in sources.tasks if task.rows is not None]
    if len(rows) == len(sources.tasks):
        return f"gated on {', '.join(f'the {len(one.dataset)} rows of {one.file}' for one in rows)}"
    texts = [task.texts for task in sources.tasks if task.texts is not None]
    return f"compared with fp32 on {', '.join(f'{len(one.rows)} texts of {one.name}' for one in texts)}"


def _write_fp16(path: Path, sources: Sources) -> None:
    """Trace the graph for a GPU, which has other operators, compare it in fp32, and then convert it.

    Inputs and logits keep their types. Norms and softmaxes sum in fp32 inside.
    """
    from onnxruntime.transformers.onnx_model import OnnxModel

    write_graph(fold_adapters(sources.adapters, sources.base, for_gpu=True), path)
    # Not on CUDA: it computes attention in fp32 by other kernels than in fp16, which is the one that counts.
    compare_with_peft(path, sources.tasks, sources.base, use_cuda=False)
    model = OnnxModel(onnx.load(path))
    with warnings.catch_warnings():
        # The mask's fp32 minimum becomes fp16's, which hides as well, and numbers below fp16's smallest become 0.
        warnings.simplefilter("ignore", UserWarning)
        model.convert_float_to_float16(keep_io_types=True)
    save_graph(model.model, path)
