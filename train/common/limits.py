"""What is checked before an untrusted file is read: that it is a regular file, and how large it is.

Hashes in a folder only reveal accidents, because its author computes them. These checks hold for every folder.
"""

import os
import stat
from pathlib import Path

from train.common.errors import PromptfoldError
from train.common.machine import usable_memory_bytes

MIB = 2**20

MAX_RECORD_BYTES = 16 * MIB  # a record or a configuration; those of the largest models are below 1 MiB
MAX_TEXT_BYTES = 64 * MIB  # any other file that is no model; the largest tokenizers in use have 33 MiB
MAX_MODEL_BYTES = 2**31  # an ONNX graph, which is one protobuf message, and an adapter's weights
MAX_BASE_BYTES = 2**36  # a file with a base model's weights: 64 GiB
MAX_COUNT = 2**31 - 1  # any number of rows, steps or threads: libraries keep them in four bytes
MAX_THREADS = 4096  # no machine has as many cores, and a library starts all that it is told to
MAX_TOKENS = 2**24  # any token count: text, prompt or vocabulary
_MAX_BYTES = {".onnx": MAX_MODEL_BYTES, ".safetensors": MAX_MODEL_BYTES, ".onnx_data": MAX_BASE_BYTES}
MAX_ENTRIES = 1000  # files and folders in an adapter or a bundle, which have about ten


def check_file(path: Path, max_bytes: int, error: type[PromptfoldError], remedy: str) -> None:
    """Refuse a file that is missing, not regular (reading a named pipe never ends) or too large; follows links."""
    try:
        state = path.stat()
    except OSError as cause:
        raise error(f"{path} cannot be read ({cause.strerror or cause}). {remedy}") from cause
    _check_state(path, state, max_bytes, error, remedy)


def check_entries(folder: Path, error: type[PromptfoldError], remedy: str) -> None:
    """Refuse an adapter or a bundle that holds a link, a special file, a file that is too large, or too many files."""
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
            if not entry.is_dir(follow_symlinks=False):  # nothing in a folder is ever read
                max_bytes = _MAX_BYTES.get(path.suffix, MAX_TEXT_BYTES)
                _check_state(path, entry.stat(follow_symlinks=False), max_bytes, error, remedy)


def _check_state(path: Path, state: os.stat_result, max_bytes: int, error: type[PromptfoldError], remedy: str) -> None:
    if not stat.S_ISREG(state.st_mode):
        raise error(f"{path} is no plain file. {remedy}")
    if state.st_size > max_bytes:
        raise error(
            f"{path} has {state.st_size / MIB:,.0f} MiB; no such file has more than {max_bytes / MIB:,.0f}. {remedy}"
        )
    memory = usable_memory_bytes()
    if memory is not None and state.st_size > memory:
        raise error(
            f"{path} has {state.st_size / MIB:,.0f} MiB, and this process may use {memory / MIB:,.0f} MiB of memory. Give "
            "it more, or take a smaller file."
        )
