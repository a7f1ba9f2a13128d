"""Where an adapter of PEFT's lies: which folder it is, and that its files are safe to open."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.adapter.peft_config import MERGED_TYPES, check_merged_config
from train.adapter.record import FILES
from train.common.errors import AdapterError, HubError, first_line
from train.common.folder_record import read_json_object
from train.common.limits import MAX_ENTRIES, MAX_MODEL_BYTES, MAX_TEXT_BYTES, check_file
from train.config import P_TUNING, P_TUNING_V2
from train.untrusted.settings import read_plain_object

PICKLE = "adapter_model.bin"
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.txt", "vocab.json", "merges.txt"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "spm.model"),
)
_OPENED = (FILES.config, FILES.weights, PICKLE, *TOKENIZER_FILES)
"""Everything in the folder that is ever opened: not training_args.bin, optimizer.pt and other pickles of the Trainer."""

PROMPT_METHODS = {
    "P_TUNING": P_TUNING,
    "PROMPT_TUNING": P_TUNING,  # its table of embeddings is used in the same way
    "MULTITASK_PROMPT_TUNING": P_TUNING,
    "PREFIX_TUNING": P_TUNING_V2,
}
"""PEFT's types with a prompt, and the method that an adapter folder has for each."""

REMEDY = "Take an unbroken copy of the adapter."
CHOOSE = "Give one of them"


@dataclass(frozen=True)
class Source:
    """An adapter of PEFT's whose files may be opened."""

    folder: Path
    config: dict[str, Any]
    """adapter_config.json"""
    weights: Path

    @property
    def peft_type(self) -> str:
        return str(self.config["peft_type"])

    @property
    def base_model(self) -> str | None:
        """As the adapter names it."""
        name = self.config.get("base_model_name_or_path")
        return name if isinstance(name, str) and name.strip() else None

    @property
    def has_tokenizer(self) -> bool:
        return any((self.folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))


def find_source(name: str, *, allow_bin: bool = False) -> Source:
    """Find an adapter of PEFT's by the name of a folder or on the hub, and check its files.

    Raises:
        AdapterError: there is none, it is of a kind that cannot be imported, or it could harm.
        HubError: the hub did not give it.
    """
    folder = Path(name)
    if folder.is_dir():
        folder, root = _choose_checkpoint(folder), folder.resolve()
    elif folder.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise AdapterError(
            f"There is no folder {name}. Give one that PeftModel.save_pretrained or the Trainer wrote, or a hub name."
        )
    else:
        folder = _download(name)
        # The hub's cache links to files beside its snapshots.
        root = folder.resolve().parents[1]
    _check_files(folder, root)
    config = read_plain_object(folder / FILES.config, AdapterError, REMEDY)
    _check_config(folder / FILES.config, config)
    return Source(folder, config, _find_weights(folder, allow_bin=allow_bin))


def is_foreign(folder: Path) -> bool:
    """Whether a folder is none of ours and holds an adapter of PEFT's, or checkpoints with one."""
    if not folder.is_dir() or (folder / FILES.training).exists():
        return False
    return (folder / FILES.config).is_file() or bool(adapters_in(folder))


def adapters_in(folder: Path) -> list[Path]:
    """The folders in a folder that hold an adapter: the Trainer's checkpoints, or PEFT's adapters with a name."""
    return sorted(path.parent for path in folder.glob(f"*/{FILES.config}"))


def _choose_checkpoint(folder: Path) -> Path:
    """The folder itself, or the one in it that the Trainer says was best."""
    if (folder / FILES.config).is_file():
        return folder
    found = adapters_in(folder)
    if not found:
        content = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise AdapterError(
            f"{folder} holds no {FILES.config} (it holds {content}), so it is no adapter of PEFT's. Give a folder that "
            "PeftModel.save_pretrained or the Trainer wrote."
        )
    if len(found) == 1:
        return found[0]
    best = _best_checkpoint(found)
    if best is None:
        some = ", ".join(path.name for path in found[:8])
        raise AdapterError(
            f"{folder} holds {len(found)} adapters ({some}), and no trainer_state.json says which was best. {CHOOSE}: "
            f"{found[-1]}"
        )
    return best


def _best_checkpoint(checkpoints: Sequence[Path]) -> Path | None:
    """The best by what the Trainer wrote into the last checkpoint; None where it was not told to keep the best."""

    def step(path: Path) -> int:
        found = re.fullmatch(r"checkpoint-(\d{1,15})", path.name)
        return int(found[1]) if found else -1

    state = max(checkpoints, key=step) / "trainer_state.json"
    if not state.is_file():
        return None
    best = read_json_object(state, AdapterError, "Give one of the checkpoints by name.").get("best_model_checkpoint")
    # A path on the machine of the training.
    name = re.split(r"[/\\]", best)[-1] if isinstance(best, str) else None
    return next((path for path in checkpoints if path.name == name), None)


def _download(name: str) -> Path:
    """Fetch an adapter from the hub (or find it in the hub's cache): no pickles, no code."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = [name for name in _OPENED if name != PICKLE]
    try:
        folder = Path(snapshot_download(name, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as cause:
        raise HubError(
            f"Adapter {name}: there is no such folder, and the Hugging Face hub did not give it ({first_line(cause)}). "
            "Without network, give a folder that holds the adapter."
        ) from cause
    if not (folder / FILES.config).is_file():
        raise HubError(f"Adapter {name}: it has no {FILES.config} on the hub. Give the name of an adapter.")
    return folder


def _check_files(folder: Path, root: Path) -> None:
    """Refuse files that lead out of ``root``, are no plain files or are too large."""
    if len(list(folder.iterdir())) > MAX_ENTRIES:
        raise AdapterError(f"{folder} holds more than {MAX_ENTRIES} files. Give the folder of one adapter.")
    if not folder.resolve().is_relative_to(root):
        raise AdapterError(f"{folder} is a link out of {root}. Give the folder to which it leads.")
    for name in (*_OPENED, "trainer_state.json"):
        path = folder / name
        if path.is_symlink() and not path.resolve().is_relative_to(root):
            raise AdapterError(
                f"{path} is a link out of the folder, and may lead to any file of this machine. If it is your own, take "
                f"a copy without links: cp -rL {folder} COPY"
            )
        if path.exists():
            max_bytes = MAX_MODEL_BYTES if name in {FILES.weights, PICKLE} else MAX_TEXT_BYTES
            check_file(path, max_bytes, AdapterError, REMEDY)


def _check_config(path: Path, config: dict[str, Any]) -> None:
    """Refuse an adapter for another task, of a type that cannot be imported, or with settings that PEFT would run."""
    kind, task = config.get("peft_type"), config.get("task_type")
    if task != "SEQ_CLS":
        raise AdapterError(
            f"{path} is for task_type {task!r:.40}; promptfold takes classifiers of texts. Give an adapter that was "
            "trained with task_type SEQ_CLS."
        )
    if config.get("auto_mapping"):
        raise AdapterError(
            f"{path} names a class to import (auto_mapping). Set it to null, if the adapter is your own."
        )
    if kind in MERGED_TYPES:
        check_merged_config(path, config)
    elif kind not in PROMPT_METHODS:
        raise AdapterError(
            f"{path} is of peft_type {kind!r:.40}, which promptfold does not take. It takes "
            f"{', '.join((*PROMPT_METHODS, *MERGED_TYPES))}."
        )
    elif config.get("num_transformer_submodules") not in {None, 1}:
        raise AdapterError(f"{path} is for an encoder and a decoder (num_transformer_submodules). Give a classifier's.")
    modules = config.get("modules_to_save")
    if modules is not None and not (isinstance(modules, list) and all(isinstance(item, str) for item in modules)):
        raise AdapterError(f"{path} holds modules_to_save {modules!r:.80}, which is no list of names. {REMEDY}")


def _find_weights(folder: Path, *, allow_bin: bool) -> Path:
    if (folder / FILES.weights).is_file():
        return folder / FILES.weights
    if not (folder / PICKLE).is_file():
        raise AdapterError(f"{folder} lacks {FILES.weights}. {REMEDY}")
    if not allow_bin:
        raise AdapterError(
            f"{folder / PICKLE} is a pickle, which may hold code. Add --allow-bin to read it without running any "
            "(torch.load with weights_only), or save the adapter as safetensors."
        )
    return folder / PICKLE
