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
from train.foreign.config import ImportConfig
from train.foreign.source import find_source, is_foreign


def import_if_foreign(folder: Path) -> Path:
    """A folder as it is, or the adapter folder that was made of it where it holds an adapter of PEFT's.

    Raises:
        UsageError: something has to be asked first; the message names the command.
    """
    if not is_foreign(folder):
        return folder
    if find_spec("peft") is None:
        raise UsageError(
            f"{folder} is an adapter of PEFT's, and peft is not installed. Run: pip install -r requirements.txt"
        )
    command = f"python -m train.import_peft {shlex.quote(str(folder))} --out ADAPTER"
    try:
        source = find_source(str(folder))
        digest = hashlib.sha256()
        for path in (source.weights, *(source.folder / name for name in (FILES.config, FILES.tokenizer))):
            digest.update(path.read_bytes() if path.is_file() else b"-")
        target = _cache() / digest.hexdigest()[:16] / folder.resolve().name
        if target.is_dir():
            try:
                return load_adapter(target).folder
            except AdapterError as error:
                say(f"the cached import cannot be used and is made again: {error}")
        say(f"{folder} is an adapter of PEFT's: importing it to {target}")
        # In a child process, so that the page's own never loads torch and its thread pool.
        run_in_child(_import, folder, target, name=f"The import of {folder}", remedy=f"See why with: {command}")
        return target
    except PromptfoldError as cause:
        raise UsageError(
            f"{folder} is an adapter of PEFT's that has to be imported first. {cause} The command is: {command}"
        ) from cause


def _import(folder: Path, target: Path) -> None:
    from train.foreign.convert import import_adapter

    import_adapter(ImportConfig(str(folder), out=target, overwrite=True))


def _cache() -> Path:
    import platformdirs

    return Path(platformdirs.user_cache_dir("promptfold", appauthor=False)) / "imported"
