"""The export, from adapter folders to a bundle folder: read, fold, trace, compare, quantize, write."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from export.bundle.folder import BUNDLE, FILES, GRAPH_FILES, Bundle, load_bundle
from export.fold.config import ExportConfig
from export.fold.read import Sources, read_sources
from export.fold.write import write_manifest
from train.common.atomic_folder import check_target, held_folder, new_folder
from train.common.console import say
from train.common.folder_record import content_of, read_record


def export_adapters(config: ExportConfig) -> Bundle:
    """Fold adapters into ONNX graphs and write the bundle, or add them to one.

    Raises:
        UsageError: ``out`` cannot be used, adapters do not fit together, or labelled rows are needed and missing.
        AdapterError, ModelError, HubError, BundleError, DataError: an input cannot be used.
        ParityError: the graph's logits are not PyTorch's.
        PrecisionError: the precision that was asked for scores worse than the gate allows.
    """
    if config.add and config.out.is_dir():
        # Of two runs that add to one bundle, the later one would drop what the other added.
        with held_folder(config.out, f"--out {config.out}"):
            return _export(config)
    if not config.add:
        check_target(config.out, BUNDLE, overwrite=config.overwrite)
    return _export(config)


def _export(config: ExportConfig) -> Bundle:
    sources = read_sources(config)
    # What is imported in functions imports torch, which takes seconds.
    from export.fold.compare import compare_with_peft
    from export.fold.precision.quantize import quantize

    with new_folder(config.out) as folder:
        manifest = _extend(sources, sources.old, folder) if sources.old else _trace(sources, folder)
        providers, reports = compare_with_peft(folder / FILES.model, sources.tasks, sources.base)
        kept, refused = quantize(folder, sources, config)
        say(f"[5/5] writing {config.out}")
        manifest = {"providers_tried": providers, **manifest}
        write_manifest(folder, manifest, sources.tasks, reports, kept=kept, refused=refused)
        # A bundle that cannot be opened never takes its place.
        bundle = load_bundle(folder)
    return replace(bundle, folder=config.out)


def _trace(sources: Sources, folder: Path) -> dict[str, Any]:
    """Write the fp32 graph, with the model's configuration and tokenizer beside it; the manifest's entries on them."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

    from export.fold.fold import fold_adapters
    from export.fold.graphs.description import OPSET, TRACED_SHAPE
    from export.fold.trace import write_graph

    adapter, base, tokenizer = sources.adapters[0], sources.base, sources.tokenizer
    what = "merging the adapter" if adapter.is_merged else f"folding {adapter.virtual_tokens} virtual tokens"
    say(f"[2/5] {what} and tracing the graph")
    model = fold_adapters(sources.adapters, base)
    graph = write_graph(model, folder / FILES.model)
    settings = model.module.config
    # The name of the classifier's class: serving engines read it, and a base model's own is another.
    settings.architectures = [MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES[settings.model_type]]
    settings.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {
        "base_model": {"name": base.name, "hub_name": base.hub_name, "sha256": base.sha256},
        "is_decoder": base.is_decoder,
        "method": adapter.method,
        "virtual_tokens": adapter.virtual_tokens,
        "max_length": adapter.max_length,
        "vocabulary_size": settings.get_text_config().vocab_size,
        "pad_token_id": tokenizer.pad_token_id,
        "token_types": sources.has_token_types,
        "inputs": graph.inputs,
        "outputs": graph.outputs,
        "exporter": graph.exporter,
        "rewrites": model.rewrites,
        "prompt_initializers": model.prompt_names,
        "opset": OPSET,
        "traced_shape": TRACED_SHAPE,
    }


def _extend(sources: Sources, old: Bundle, folder: Path) -> dict[str, Any]:
    """Copy a bundle and add the constants of the new tasks to its graphs; the entries of its manifest."""
    from export.fold.rewrites.many_tasks import append_tasks

    say(
        f"[2/5] adding the constants of {', '.join(task.name for task in sources.tasks)} to {', '.join(old.precisions)}"
    )
    shutil.copytree(old.folder, folder, dirs_exist_ok=True)
    manifest = content_of(read_record(folder, BUNDLE))
    (folder / FILES.manifest).unlink()
    append_tasks([folder / GRAPH_FILES[precision] for precision in old.precisions], sources.adapters, sources.base)
    return manifest
