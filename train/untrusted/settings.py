"""Which settings a stranger's JSON may hold: plain data, and nothing that makes a library run code or read elsewhere.

A key that no configuration class names passes where its value is plain data, as transformers' models read such keys
too: DeBERTa-v3's `position_buckets` and `norm_rel_ebd` are among them, and a model without them computes something
else. What names code, another place, or an internal setting of a library is refused by the form of its key.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from train.common.errors import PromptfoldError
from train.common.folder_record import read_json_object

SETTINGS_FILES = (
    "adapter_config.json",
    "added_tokens.json",
    "config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
)
"""The files of a model, an adapter, a tokenizer or a bundle that transformers, PEFT or optimum take settings from."""
REMEDY = "Take one that needs none of this, from somebody you trust."

# Private keys that transformers itself has written into files on the hub, with plain values.
_HARMLESS = {
    "__type",  # of a token in tokenizer_config.json, "AddedToken"
    "_attn_implementation_autoset",  # transformers 4.47 to 4.51; whether the attention was chosen by itself
    "_flash_attn_2_enabled",  # 4.34 and 4.35; no longer read
    "_from_model_config",  # generation_config.json
    "_label_trainable_num_channels",  # Perceiver
    "_model_name_or_path",  # the name in a GGUF file's header, which transformers puts into its configuration; never read
    "_name_or_path",  # where it was loaded from when it was saved; no longer read
    "_num_labels",  # BART; no longer read
    "_output_attentions",
    "_remove_final_layer_norm",  # OPT
    "_sliding_window_pattern",  # Gemma 3
    "special_tokens_map_file",  # transformers before 4.30; no longer read
    "use_mamba_kernels",  # Jamba and Zamba: the package mamba_ssm, where it is installed
}
# Their keys are a user's words: labels and tokens.
_MAPS = ("id2label", "label2id", "vocab", "extra_special_tokens", "model_specific_special_tokens")
_ATTENTION = ("eager", "sdpa")  # transformers' own, in torch; flash attention may be fetched from the hub
_CODE = re.compile(r"auto_map|remote_code|custom_(pipeline|generate|code)|code_(revision|path)", re.IGNORECASE)
_ELSEWHERE = re.compile(r".*_files?|transformers_weights|init_inputs", re.IGNORECASE)
_CLASS = re.compile(r"architectures|model_type|(.*_)?class(_name)?|.*_(extractor|processor)_type", re.IGNORECASE)
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_-]+")
# transformers writes each template to a file of its name: CVE-2026-9856.
_TEMPLATES = "chat_template"
_DTYPE = re.compile(r"(torch\.)?(auto|half|double|b?float[0-9a-z_]*)")


def read_plain_object(
    path: Path, error: type[PromptfoldError], remedy: str = REMEDY, *, who: str = ""
) -> dict[str, Any]:
    """Read a JSON object of a stranger's; what is not plain data is an ``error`` that names the file and the key.

    ``who`` begins the message ("Base model x: "), ``remedy`` ends it.
    """
    value = read_json_object(path, error, remedy)
    # The keys of a list of tokens are the tokens.
    complaint = None if path.name == "added_tokens.json" else find_complaint(value)
    if complaint is not None:
        raise error(f"{who}{path} {complaint}. {remedy}")
    return value


def refuse_settings(folder: Path, error: type[PromptfoldError], remedy: str = REMEDY, *, who: str = "") -> None:
    """Refuse a folder whose `SETTINGS_FILES` hold anything but plain data; see `read_plain_object`."""
    for name in SETTINGS_FILES:
        if (folder / name).exists():
            read_plain_object(folder / name, error, remedy, who=who)


def find_complaint(value: Any) -> str | None:
    """What is wrong with settings: None, or words that follow the file's name, "wants code of its own, which … (auto_map)"."""
    return next((why for key, name, entry in _entries(value) if (why := _complaint(key, name, entry))), None)


def _entries(value: Any) -> Iterator[tuple[str, str, Any]]:
    """Every key at any depth, the way to it ("text_config.auto_map"), and its value."""
    waiting: list[tuple[str, str, Any]] = [("", "", value)]
    while waiting:
        parent, way, item = waiting.pop()
        # A label or a token may be called anything.
        is_map = (
            parent in _MAPS and isinstance(item, dict) and not any(isinstance(v, dict | list) for v in item.values())
        )
        if isinstance(item, dict) and not is_map:
            for key, entry in item.items():
                name = f"{way}.{key}" if way else key
                yield key, name, entry
                waiting.append((key, name, entry))
        elif isinstance(item, list):
            waiting += [(parent, way, entry) for entry in item]


def _complaint(key: str, name: str, value: Any) -> str | None:
    if value is None or value is False or value in ("", {}, []):
        return None
    lower, is_plain = key.lower(), isinstance(value, str | int | float)
    is_own_attention = isinstance(value, str) and value in _ATTENTION
    names = [entry for entry in (value if isinstance(value, list) else [value]) if isinstance(entry, str)]
    never_run = "by code from elsewhere, which promptfold never runs"
    wrong: tuple[tuple[object, str], ...] = (
        (_CODE.search(key), "wants code of its own, which promptfold never runs"),
        (
            "quantization_config" in lower or lower == "compression_config",
            "describes a quantized model, which is not taken",
        ),
        ("implementation" in lower and not is_own_attention, f"wants attention {never_run}"),
        ("kernel" in lower and not _is_numbers(value), f"wants kernels {never_run}"),
        (key.startswith("_") and not is_own_attention, "sets what is internal to transformers"),
        (_ELSEWHERE.fullmatch(key), "leads elsewhere, to other files"),
        (
            _CLASS.fullmatch(key) and not all(map(_PLAIN_NAME.fullmatch, names)),
            "names a class that is not transformers' own",
        ),
        (
            key == _TEMPLATES and not all(map(_PLAIN_NAME.fullmatch, _template_names(value))),
            "names a template like a path",
        ),
        (lower in {"dtype", "torch_dtype"} and not all(map(_DTYPE.fullmatch, names)), "names no type of numbers"),
    )
    if key in _HARMLESS:
        wrong = ((not is_plain, "sets what is internal to transformers"),)
    where = f"{name[-80:]}: {value!r:.60}" if is_plain else name[-80:]
    return next((f"{why} ({where})" for is_wrong, why in wrong if is_wrong), None)


def _is_numbers(value: Any) -> bool:
    """Whether it is a number, or a list of numbers: a kernel's size, as in ConvBERT."""
    entries = value if isinstance(value, list) else [value]
    return all(isinstance(entry, int | float) and not isinstance(entry, bool) for entry in entries)


def _template_names(value: Any) -> list[str]:
    """The names of several chat templates: the keys of an object, or in the older form a list of objects with names."""
    entries = value if isinstance(value, list) else []
    return [
        *map(str, value if isinstance(value, dict) else []),
        *(str(e.get("name")) for e in entries if isinstance(e, dict)),
    ]
