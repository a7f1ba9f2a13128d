"""A folder of PEFT's where an adapter folder is expected: it is imported into the user's cache, if nothing is to be asked."""

import hashlib
import shlex
from importlib.util import find_spec
from pathlib import Path

from train.adapter.folder import load_adapter
from train.adapter.record import FILES
from train.common.child import run_in_child
from train.common.console import say
from train.common.errors import AdapterError, PromptfoldError, UsageError
from train.common.folder_record import sha256_of_file
from train.foreign.config import ImportConfig
from train.foreign.source import CHOOSE, TOKENIZER_FILES, Source, find_source, is_foreign
from train.model.find import weights_on_disk

_FLAGS = {"--allow-bin": "--allow-bin", "--base-model": "--base-model MODEL", "--task-id": "--task-id NUMBER"}
"""What an import may have to be told, as it stands in its messages, and in a command."""


def import_if_foreign(folder: Path, base_model: str | None = None) -> Path:
    """A folder as it is, or the adapter folder that was made of it where it holds an adapter of PEFT's.

    ``base_model`` is the one on which it is imported, by default the one that it names.

    Raises:
        UsageError: something has to be asked first; the message names the command.
    """
    name = shlex.quote(str(folder))
    if len(folder.parts) == 2 and not folder.exists():  # as names on the hub are
        raise UsageError(
            f"There is no folder {folder}. If it is an adapter on the Hugging Face hub, it has to be imported first. The "
            f"command is: python -m train.import_peft {name} --out ADAPTER"
        )
    if not is_foreign(folder):
        return folder
    if find_spec("peft") is None:
        raise UsageError(
            f"{folder} is an adapter of PEFT's, and peft is not installed. Run: pip install -r requirements.txt"
        )
    command = f"python -m train.import_peft {name} --out ADAPTER"
    try:
        source = find_source(str(folder))
        target = _cache() / _key(source, base_model or source.base_model or "") / folder.resolve().name
        if target.is_dir():
            try:
                return load_adapter(target).folder
            except AdapterError as error:
                say(f"the cached import cannot be used and is made again: {error}")
        say(f"{folder} is an adapter of PEFT's: importing it to {target}")
        # In a child process, so that the page's own never loads torch and its thread pool.
        run_in_child(
            _import, folder, target, base_model, name=f"The import of {folder}", remedy=f"See why with: {command}"
        )
        return target
    except PromptfoldError as cause:
        flags = "".join(f" {words}" for flag, words in _FLAGS.items() if flag in str(cause))
        if CHOOSE in str(cause):
            command = command.replace(name, f"{name}/CHECKPOINT")
        raise UsageError(
            f"{folder} is an adapter of PEFT's that has to be imported first. {cause} The command is: {command}{flags}"
        ) from cause


def _key(source: Source, base_model: str) -> str:
    """A hash of all that an import reads: the adapter's files, and the base model's, which may be trained again."""
    weights = weights_on_disk(base_model, fetch=True) if base_model else []
    beside = {source.folder, *(file.parent for file in weights if file.suffix != ".gguf")}
    names = (FILES.config, "config.json", *TOKENIZER_FILES)
    files = (source.weights, *weights, *(folder / name for folder in sorted(beside) for name in names))
    hashes = (sha256_of_file(path) if path.is_file() else "-" for path in files)
    return hashlib.sha256(" ".join((base_model, *hashes)).encode()).hexdigest()[:16]


def _import(folder: Path, target: Path, base_model: str | None) -> None:
    from train.foreign.convert import import_adapter

    import_adapter(ImportConfig(str(folder), out=target, base_model=base_model, overwrite=True))


def _cache() -> Path:
    import platformdirs

    return Path(platformdirs.user_cache_dir("promptfold", appauthor=False)) / "imported"
