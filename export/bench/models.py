"""The model in the form that each family of engines runs, and the multiply-adds of each form.

Counted are matrix products: dense layers, attention's two, the head. No engine saves those that a causal mask hides.
"""

import itertools
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.bench.engines import OURS, PEFT, Batch
from train.adapter.peft import load_peft_model, load_prompted_classifier
from train.adapter.record import Adapter
from train.common.errors import first_line
from train.model.find import ENCODERS, BaseModel

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

    from train.model.prompted import PromptedClassifier


def peft_for_batches(adapter: Adapter, base: BaseModel, pad_token_id: int) -> "PeftModel":
    """`train.adapter.peft.load_peft_model`, but a decoder takes batches too, padded on the left as PEFT wants them.

    Its logits then depend on the batch's padding, so some labels of a file differ from those of each text alone, which
    are those of all other engines.
    """
    model = load_peft_model(adapter.folder, base, adapter.labels)
    base_model: Any = model.base_model
    if base.is_decoder:
        base_model.config.pad_token_id = pad_token_id
    return model


def plain_classifier(adapter: Adapter, base: BaseModel) -> "PromptedClassifier":
    """Base and prompt as one module, which computes every row of every layer."""
    from train.model.prompted import PooledRowLayer

    classifier = load_prompted_classifier(adapter, base)
    encoder: Any = getattr(classifier.model.base_model, "encoder", None)
    if encoder is not None and isinstance(encoder.layer[-1], PooledRowLayer):
        encoder.layer[-1] = encoder.layer[-1].layer
    return classifier


def plain_graphs(
    engines: Sequence[str], adapter: Adapter, base: BaseModel, folder: Path, calibration: Sequence[Batch]
) -> dict[str, Path | str]:
    """Make the usual exports in a new folder: by name of an engine its graph's file, or why there is none."""
    graphs: dict[str, Path | str] = {}
    path = folder / "model.onnx"
    # Any error of the other libraries is a line of the report.
    try:
        folder.mkdir()
        _export_plain(adapter, base, path)
    except Exception as cause:
        return dict.fromkeys(engines, f"the plain export failed ({type(cause).__name__}: {first_line(cause)})")
    for name in engines:
        try:
            graphs[name] = CONVERSIONS[name](path, calibration) if name in CONVERSIONS else path
        except Exception as cause:
            graphs[name] = f"the plain graph cannot be converted ({type(cause).__name__}: {first_line(cause)})"
    return graphs


def _export_plain(adapter: Adapter, base: BaseModel, path: Path) -> None:
    """Write base and prompt in fp32, by optimum with its defaults and none of our rewrites, and config.json beside it.

    This is what optimum's command line does: transformers' own choice of attention, optimum's opset, and the graph
    itself puts the prompt before the text in every request. (A decoder's prompt goes in as keys and values, without
    which its answers would depend on padding. ONNX Runtime computes what follows from constants once.)
    """
    from optimum.exporters.onnx.convert import export_pytorch

    from export.fold.graphs.with_optimum import describe_architecture

    classifier = plain_classifier(adapter, base)
    settings = describe_architecture(classifier.config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # see `export.fold.trace.write_graph`
        export_pytorch(classifier, settings, opset=settings.DEFAULT_ONNX_OPSET, output=path)
    classifier.config.save_pretrained(path.parent)


def _quantize_plain(graph: Path, _: Sequence[Batch]) -> Path:
    """A graph in int8 by optimum's dynamic quantization, with its own choice of operators."""
    from optimum.onnxruntime import ORTQuantizer
    from optimum.onnxruntime.configuration import AutoQuantizationConfig

    settings = AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=True)
    ORTQuantizer.from_pretrained(graph.parent, file_name=graph.name).quantize(
        settings, graph.parent, file_suffix="int8"
    )
    return graph.with_name("model_int8.onnx")


def _quantize_plain_statically(graph: Path, calibration: Sequence[Batch]) -> Path:
    """A graph in int8 as ONNX Runtime's documentation has it: its preparation, then quantize_static by its defaults."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Texts(CalibrationDataReader):
        def __init__(self) -> None:
            self._batches = iter(calibration)

        def get_next(self) -> Batch | None:
            batch = next(self._batches, None)
            return batch and {name: batch[name] for name in names}

    prepared, path = graph.with_name("prepared.onnx"), graph.with_name("model_static_int8.onnx")
    quant_pre_process(graph, prepared, skip_symbolic_shape=True)
    names = [item.name for item in onnx.load(prepared, load_external_data=False).graph.input]
    quantize_static(prepared, path, Texts(), per_channel=True)
    # It names sets of operators of which it uses none, and `open_session` refuses those that it does not know.
    model = onnx.load(path)
    used = [item for item in model.opset_import if item.domain in {node.domain for node in model.graph.node}]
    del model.opset_import[:]
    model.opset_import.extend(used)
    onnx.save(model, path)
    return path


def _halve_plain(graph: Path, _: Sequence[Batch]) -> Path:
    """A graph in fp16 by ONNX Runtime's converter; its inputs and logits keep their types."""
    import onnx
    from onnxruntime.transformers.onnx_model import OnnxModel

    model, path = OnnxModel(onnx.load(graph)), graph.with_name("model_fp16.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # see `export.fold.precision.quantize`
        model.convert_float_to_float16(keep_io_types=True)
    model.save_model_to_file(str(path))
    return path


CONVERSIONS = {
    "plain-int8": _quantize_plain,
    "plain-static-int8": _quantize_plain_statically,
    "plain-fp16": _halve_plain,
}


def family_module(family: str, adapter: Adapter, base: BaseModel, pad_token_id: int) -> "torch.nn.Module":
    """The module that the engines of a family run, or that their graph was traced from.

    Ours is the one for a CPU. The fp16 graph for a GPU also computes the last layer's keys and values.
    """
    from export.fold.rewrites.encoder import CpuEncoder
    from train.model.prompted import has_absolute_positions

    if family == PEFT:
        return peft_for_batches(adapter, base, pad_token_id)
    classifier = (load_prompted_classifier if family == OURS else plain_classifier)(adapter, base)
    if family == OURS and base.model_type in ENCODERS and has_absolute_positions(classifier.config):
        return CpuEncoder(classifier).eval()
    classifier.freeze_prompt()  # ONNX Runtime computes once what depends on constants alone
    return classifier


def count_multiply_adds(module: "torch.nn.Module", cells: Mapping[str, Sequence[Batch]]) -> dict[str, int]:
    """Multiply-adds of the matrix products in one pass over the batches of each cell, padding included."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    of_one_text: dict[int, int] = {}  # by length
    for batch in itertools.chain(*cells.values()):
        counter = FlopCounterMode(display=False)
        if (length := batch["input_ids"].shape[1]) not in of_one_text:
            # MATH writes attention as matrix products; its fused kernel for a CPU is not counted (PyTorch 2.14).
            with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), counter:
                module(**{name: torch.from_numpy(array[:1]) for name, array in batch.items()})
            of_one_text[length] = counter.get_total_flops() // 2
    shapes = {name: [batch["input_ids"].shape for batch in batches] for name, batches in cells.items()}
    return {cell: sum(n_texts * of_one_text[length] for n_texts, length in found) for cell, found in shapes.items()}
