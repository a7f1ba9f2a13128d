"""The export that anybody would make: base and prompt by optimum, in fp32, int8 and fp16."""

import warnings
from pathlib import Path
from typing import Any

from train.adapter.peft import load_prompted_classifier
from train.adapter.record import Adapter
from train.model.find import BaseModel


def export_plain(adapter: Adapter, base: BaseModel, folder: Path) -> Path:
    """Base and prompt as one module, written by optimum with its defaults and none of our rewrites.

    As optimum's command line does it: transformers' own choice of attention, optimum's opset, every row of every
    layer, and the prompt put in front by the graph, for every request. (A decoder's goes in as keys and values, without
    which its answers would depend on padding. ONNX Runtime folds what follows from constants.)

    Args:
        folder: config.json is written beside the graph, for the quantiser.
    """
    from optimum.exporters.onnx.convert import export_pytorch

    from export.fold.trace import describe_architecture
    from train.model.prompted import PooledRowLayer

    classifier = load_prompted_classifier(adapter, base)
    encoder: Any = getattr(classifier.model.base_model, "encoder", None)
    if encoder is not None and isinstance(encoder.layer[-1], PooledRowLayer):
        encoder.layer[-1] = encoder.layer[-1].layer
    settings = describe_architecture(classifier.config)
    path = folder / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # see `export.fold.trace.write_graph`
        export_pytorch(classifier, settings, opset=settings.DEFAULT_ONNX_OPSET, output=path)
    classifier.config.save_pretrained(folder)
    return path


def quantize_plain(graph: Path) -> Path:
    """A graph in int8 by optimum's dynamic quantisation, with its own choice of operators."""
    from optimum.onnxruntime import ORTQuantizer
    from optimum.onnxruntime.configuration import AutoQuantizationConfig

    ORTQuantizer.from_pretrained(graph.parent, file_name=graph.name).quantize(
        AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=True),
        save_dir=graph.parent,
        file_suffix="int8",
    )
    return graph.with_name("model_int8.onnx")


def halve_plain(graph: Path) -> Path:
    """A graph in fp16 by ONNX Runtime's converter, with inputs and logits as they were."""
    import onnx
    from onnxruntime.transformers.onnx_model import OnnxModel

    model = OnnxModel(onnx.load(graph))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # see `export.fold.quantize`
        model.convert_float_to_float16(keep_io_types=True)
    path = graph.with_name("model_fp16.onnx")
    model.save_model_to_file(str(path))
    return path
