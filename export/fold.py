"""From an adapter folder to a bundle folder: find, fold, compare, write."""

from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from export.bundle import BUNDLE, FILES, Bundle, finish_bundle, load_bundle
from train.adapter import find_adapter_base, load_adapter, load_peft_model, load_prompted_classifier
from train.console import say
from train.errors import AdapterError, ModelError
from train.files import check_target, new_folder
from train.model import load_tokenizer, text_limit

ONNX_FILE_LIMIT = 2**31
"""Bytes of one protobuf file, and so of one ONNX file without external data."""


def export_adapter(adapter_folder: Path, out: Path, *, overwrite: bool = False) -> Bundle:
    """Fold an adapter into one ONNX graph and write the bundle to ``out``.

    Args:
        adapter_folder: as `python -m train` wrote it.
        out: appears when everything was measured, or not at all.
        overwrite: whether an older bundle there may be replaced.

    Raises:
        UsageError: ``out`` cannot be used.
        AdapterError, ModelError, HubError: the adapter or its base model cannot be used.
        ParityError: the graph's logits are not PyTorch's.
    """
    check_target(out, BUNDLE, overwrite=overwrite)
    adapter = load_adapter(adapter_folder)
    say(f"[1/4] reading the base model {adapter.model}")
    base = find_adapter_base(adapter)
    if adapter.max_length > text_limit(base, adapter.virtual_tokens):
        raise AdapterError(
            f"{adapter_folder} allows texts of {adapter.max_length} tokens, more than {base.name} has positions "
            "for. Train the adapter again."
        )
    tokenizer = load_tokenizer(adapter.folder, adapter.max_length)

    # torch and optimum from here on
    from export.graph import OPSET, TRACED, write_graph
    from export.parity import measure_parity
    from export.runtime import open_session, run_session, usable_cores

    with new_folder(out) as folder:
        model_path = folder / FILES.model
        say(f"[2/4] folding {adapter.virtual_tokens} virtual tokens and tracing the graph")
        classifier = load_prompted_classifier(adapter, base, attention="eager")
        n_bytes = sum(tensor.nbytes for tensor in classifier.state_dict().values())
        if n_bytes >= ONNX_FILE_LIMIT:
            raise ModelError(
                f"{base.name} has {n_bytes / 1e9:.1f} GB of fp32 weights; one ONNX file holds "
                f"{ONNX_FILE_LIMIT / 1e9:.1f} GB. Take a smaller base model."
            )
        graph = write_graph(classifier, model_path)

        say("[3/4] comparing its logits with PEFT's on shapes that were not traced")
        session = open_session(model_path, threads=usable_cores())
        parity = measure_parity(
            load_peft_model(adapter.folder, base, adapter.labels),
            lambda arrays: run_session(session, arrays),
            inputs=graph.inputs,
            vocabulary_size=classifier.config.vocab_size,
            max_length=adapter.max_length,
            one_by_one=base.is_decoder,
        )

        say(f"[4/4] writing {out} (largest logit difference {parity.max_logit_difference:.1e})")
        classifier.config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        finish_bundle(
            folder,
            {
                "adapter_sha256": adapter.sha256,
                "base_model": {"name": base.name, "hub_name": base.hub_name, "sha256": base.sha256},
                "task": adapter.task.as_json(),
                "method": adapter.method,
                "virtual_tokens": adapter.virtual_tokens,
                "max_length": adapter.max_length,
                "pad_token_id": tokenizer.pad_token_id,
                "inputs": list(graph.inputs),
                "outputs": list(graph.outputs),
                "prompt_initializers": list(graph.prompt_initializers),
                "opset": OPSET,
                "traced_shape": asdict(TRACED),
                "precision": "fp32",
                "providers_tried": session.get_providers(),
                "parity": asdict(parity),
                "quality": {
                    "n_validation": adapter.n_validation,
                    "validation": adapter.scores.values,
                    "baselines": {name: scores.values for name, scores in adapter.baselines.items()},
                },
                "versions": _versions(),
            },
        )
    return load_bundle(out)


def _versions() -> dict[str, str]:
    names = ("torch", "transformers", "peft", "optimum", "optimum-onnx", "onnx")
    versions = {name: version(name) for name in names}
    for name in ("onnxruntime-gpu", "onnxruntime"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
