"""Refuses untrusted base models and tokenizers that lead to code, other files or remote places."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.common.errors import ModelError
from train.common.folder_record import read_json_object
from train.common.limits import MAX_BASE_BYTES, MAX_TEXT_BYTES, check_file


def refuse_detours(name: str, folder: Path, config: dict[str, Any], weights: Sequence[Path]) -> None:
    """Refuse a base model that makes transformers load anything but the weights and settings in its folder."""
    remedy = "Take a base model that needs none of this, from somebody you trust."

    def refused(why: str) -> ModelError:
        return ModelError(f"Base model {name}: {why}. {remedy}")

    file = folder / "config.json"
    if config.get("auto_map"):
        raise refused(f"{file} wants code of its own (auto_map), which promptfold never runs")
    # transformers would read that file instead of model.safetensors, even a pickle.
    if config.get("transformers_weights") is not None:
        raise refused(f"{file} names another file of weights (transformers_weights)")
    # A name with a slash is a repository on the hub, whose code would be fetched and run.
    if any("/" in str(config.get(key) or "") for key in ("attn_implementation", "_attn_implementation")):
        raise refused(f"{file} wants attention by code from elsewhere (attn_implementation)")
    # transformers would load the model that its base_model_name_or_path names.
    if (folder / "adapter_config.json").exists():
        raise refused(f"{folder} is an adapter (adapter_config.json) and no base model")
    index = folder / "model.safetensors.index.json"
    if index.exists():
        shards = read_json_object(index, ModelError, remedy).get("weight_map")
        known = {path.name for path in weights}
        if not isinstance(shards, dict) or not known.issuperset(map(str, shards.values())):
            raise refused(f"{index} names other files than model*.safetensors in this folder")
    for path in weights:
        check_file(path, MAX_BASE_BYTES, ModelError, remedy)
    for path in folder.iterdir():
        if path.suffix in {".json", ".txt", ".model"}:
            check_file(path, MAX_TEXT_BYTES, ModelError, remedy)


def refuse_tokenizer_detours(folder: Path) -> None:
    """Refuse a tokenizer whose settings name files, which transformers would read."""
    path = folder / "tokenizer_config.json"
    remedy = "Take the tokenizer from somewhere else."
    settings = read_json_object(path, ModelError, remedy) if path.exists() else {}
    # Old versions of transformers wrote special_tokens_map_file; it is no longer read.
    named = [key for key in settings if key.endswith("_file") and key != "special_tokens_map_file"]
    for key in (*named, "init_inputs", "auto_map"):
        if settings.get(key):
            raise ModelError(
                f"{path} leads elsewhere: {key} is {settings[key]!r:.80}. If it is your own, take that entry out."
            )
