"""Refuses untrusted base models and tokenizers that lead to code, other files or remote places."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from train.common.errors import ModelError
from train.common.folder_record import read_json_object
from train.common.limits import MAX_BASE_BYTES, MAX_TEXT_BYTES, check_file
from train.untrusted.settings import REMEDY, read_plain_object, refuse_settings


def refuse_detours(name: str, folder: Path, config: Mapping[str, Any], weights: Sequence[Path]) -> None:
    """Refuse a base model that makes transformers load anything but the weights and settings in its folder.

    Its weights are ``model*.safetensors`` files; or one GGUF file, which has no ``config`` but beside which transformers
    looks for the same settings.
    """
    who = f"Base model {name}: "
    # transformers would load the model that its base_model_name_or_path names.
    if (folder / "adapter_config.json").exists():
        raise ModelError(f"{who}{folder} is an adapter (adapter_config.json) and no base model. {REMEDY}")
    refuse_settings(folder, ModelError, who=who)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        shards = read_json_object(index, ModelError, REMEDY).get("weight_map")
        known = {path.name for path in weights}
        if not isinstance(shards, dict) or not known.issuperset(map(str, shards.values())):
            raise ModelError(f"{who}{index} names other files than model*.safetensors in this folder. {REMEDY}")
    for path in weights:
        check_file(path, MAX_BASE_BYTES, ModelError, REMEDY)
    if config:
        for path in folder.iterdir():
            if path.suffix in {".json", ".txt", ".model"}:
                check_file(path, MAX_TEXT_BYTES, ModelError, REMEDY)


def refuse_tokenizer_detours(folder: Path) -> None:
    """Refuse a tokenizer whose settings name code or files, or a class that is no fast tokenizer of transformers."""
    remedy = "Take the tokenizer from somewhere else; if it is your own, take that entry out."
    refuse_settings(folder, ModelError, remedy)
    # transformers turns to config.json where the tokenizer's own settings name no class.
    for name in ("tokenizer_config.json", "config.json"):
        settings = read_plain_object(folder / name, ModelError, remedy) if (folder / name).exists() else {}
        wanted = settings.get("tokenizer_class")
        if wanted is not None:
            _refuse_other_class(folder / name, wanted)
            return


def _refuse_other_class(path: Path, wanted: object) -> None:
    """Refuse a tokenizer's class that has no fast form: some of transformers' others read pickles, or start libraries."""
    from transformers import PreTrainedTokenizerFast
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    found = [tokenizer_class_from_name(f"{wanted}{end}") for end in ("Fast", "")]
    if any(found) and not any(isinstance(kind, type) and issubclass(kind, PreTrainedTokenizerFast) for kind in found):
        raise ModelError(
            f"{path} names a tokenizer without a fast (tokenizer.json) form, {wanted!r:.60}, which promptfold needs. "
            "Take a model with a fast one."
        )
