"""What is looked at before a file is read that somebody else may have made: that it is a plain file, and how large.

A folder's hashes tell of accidents. Whoever makes a folder makes its hashes too, so they say nothing about intent; what
is refused here and by whoever reads the files holds for every folder.
"""

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.common.errors import PromptfoldError

MIB = 2**20


MAX_RECORD_BYTES = 16 * MIB
"""Of a JSON file that is read whole: a record, a configuration. Those of the largest models are below 1 MiB."""


MAX_TEXT_BYTES = 64 * MIB
"""Of any other file that is no model: the largest tokenizers in use have 33 MiB."""


MAX_MODEL_BYTES = 2**31
"""Of an ONNX graph, which is one protobuf message, and of an adapter's weights."""


MAX_BASE_BYTES = 2**36
"""Of a file with a base model's weights: 64 GiB."""


MAX_TOKENS = 2**24
"""Of a text, of a prompt, of a vocabulary."""


MAX_ENTRIES = 1000
"""Of files and folders in an adapter or a bundle, which have about ten."""


_MODELS = (".onnx", ".safetensors")


def largest_bytes(name: str) -> int:
    """How large a file of an adapter or a bundle may be, by its name."""
    return MAX_MODEL_BYTES if name.endswith(_MODELS) else MAX_TEXT_BYTES


def check_file(path: Path, max_bytes: int, error: type[PromptfoldError], remedy: str) -> None:
    """Refuse what is no plain file (to read a named pipe never ends), or is larger than anything of its kind.

    A link counts as what it points to.

    Raises:
        error: it is, or it is not there; the message ends in ``remedy``.
    """
    try:
        state = path.stat()
    except OSError as cause:
        raise error(f"{path} cannot be read ({cause.strerror or cause}). {remedy}") from cause
    _check_state(path, state, max_bytes, error, remedy)


def check_entries(folder: Path, error: type[PromptfoldError], remedy: str) -> None:
    """Refuse an adapter or a bundle that holds a link, anything but plain files and folders, or a file that is too large.

    Folders in it are nobody's business: nothing in them is ever read.

    Raises:
        error: it does.
        OSError: it cannot be listed.
    """
    with os.scandir(folder) as entries:
        for count, entry in enumerate(entries):
            path = Path(entry.path)
            if count == MAX_ENTRIES:
                raise error(f"{folder} holds more than {MAX_ENTRIES} files. {remedy}")
            if entry.is_symlink():
                raise error(
                    f"{path} is a link, and a link may lead to any file of this machine. If it is your own, take a "
                    f"copy without links: cp -rL {folder} COPY"
                )
            if not entry.is_dir(follow_symlinks=False):
                state = entry.stat(follow_symlinks=False)
                _check_state(path, state, largest_bytes(entry.name), error, remedy)


def _check_state(path: Path, state: os.stat_result, max_bytes: int, error: type[PromptfoldError], remedy: str) -> None:
    if not stat.S_ISREG(state.st_mode):
        raise error(f"{path} is no plain file. {remedy}")
    if state.st_size > max_bytes:
        raise error(
            f"{path} has {state.st_size / MIB:,.0f} MiB; no such file has more than {max_bytes / MIB:,.0f}. {remedy}"
        )


def whole_number(record: Mapping[str, Any], name: str, lowest: int, highest: int) -> int:
    """A whole number of a record.

    Raises:
        KeyError: it is not there.
        ValueError: it is none, or out of range; the message reads on from "lacks".
    """
    value = record[name]
    if type(value) is not int or not lowest <= value <= highest:
        raise ValueError(f"a {name} from {lowest} to {highest}")
    return value
