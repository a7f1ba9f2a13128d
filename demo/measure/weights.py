"""Tensors of adapters and base models, read with NumPy: the page may run without torch and transformers."""

import json
import math
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np

from train.adapter.record import FILES, Adapter
from train.common.errors import AdapterError, ModelError, first_line
from train.common.folder_record import sha256_of_files
from train.model.find import weights_on_disk

PROMPT = "prompt_embeddings"
"""PEFT's name of the prompt in an adapter's weights."""

NUMPY_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
"""safetensors' names of floating-point types. NumPy has no bf16; its bits are read."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file, not read yet."""

    path: Path
    dtype: str
    """safetensors' name of its type."""
    shape: tuple[int, ...]
    offset_bytes: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def rows(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Some rows, by default all, as float32; only they are read. A ModelError where the type is not known here."""
        if self.dtype not in NUMPY_TYPES:
            raise ModelError(f"{self.path.name} holds numbers of type {self.dtype}, which cannot be read here.")
        mapped = np.memmap(self.path, NUMPY_TYPES[self.dtype], "r", self.offset_bytes, self.shape)[start:stop]
        if self.dtype == "BF16":
            # bf16 is the upper half of float32.
            return (mapped.astype(np.uint32) << 16).view(np.float32)
        return np.array(mapped, dtype=np.float32)


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name; a ModelError where it cannot be read.

    Its own NumPy reader cannot read bf16. Source of the layout: https://github.com/huggingface/safetensors#format
    """
    from safetensors import SafetensorError, safe_open

    try:
        # safe_open checks types, shapes and offsets against the file's size, but does not give the offsets.
        with safe_open(path, framework="np"), path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(header_bytes))
    except (SafetensorError, OSError) as cause:
        raise ModelError(f"{path.name} cannot be read ({first_line(cause)}).") from cause
    header.pop("__metadata__", None)
    return {
        name: StoredTensor(path, entry["dtype"], tuple(entry["shape"]), 8 + header_bytes + entry["data_offsets"][0])
        for name, entry in header.items()
    }


def adapter_tensors(adapter: Adapter) -> dict[str, StoredTensor]:
    """The prompt and the head by PEFT's names."""
    return stored_tensors(adapter.folder / FILES.weights)


def is_decoder(adapter: Adapter) -> bool:
    """Whether the base model is causal, for an adapter that has no bundle yet; later `Bundle.is_decoder` says it.

    transformers calls a decoder's head "score", an encoder's "classifier".
    """
    return any(name.startswith("base_model.score.") for name in adapter_tensors(adapter))


def prompt_table(adapter: Adapter) -> np.ndarray:
    """The prompt, shape = (n_virtual, n_width)."""
    tensor = adapter_tensors(adapter).get(PROMPT)
    if tensor is None or len(tensor.shape) != 2 or not 0 < tensor.shape[0] == adapter.virtual_tokens:
        raise AdapterError(
            f"{adapter.folder.name} holds no prompt of {adapter.virtual_tokens} virtual tokens. Train it again."
        )
    return tensor.rows()


@dataclass(frozen=True)
class AdapterKey:
    """An adapter as a key of a cache: two with the same hash have learned the same."""

    sha256: str
    adapter: Adapter = field(compare=False)


@lru_cache(maxsize=16)
def base_files(key: AdapterKey) -> tuple[Path, ...]:
    """The base model's weights; a ModelError where they are not on this machine, or not those of the training.

    `train.model.find.find_base_model` finds the same, but needs transformers, and with it torch.
    """
    # Only the last part of a path is shown to visitors.
    name = Path(key.adapter.model).name
    files = weights_on_disk(key.adapter.model)
    if not files:
        raise ModelError(f"The base model {name} is not on this machine.")
    if sha256_of_files(files) != key.adapter.model_sha256:
        raise ModelError(f"The base model {name} on this machine is not the one of the training.")
    return tuple(files)


@lru_cache(maxsize=16)
def base_tensors(key: AdapterKey) -> dict[str, StoredTensor]:
    """The base model's tensors by name, from all its files; a ModelError as `base_files`, or for a GGUF file."""
    files = base_files(key)
    if files[0].suffix == ".gguf":
        raise ModelError("The base model is a GGUF file, whose quantized weights are not unpacked for this page.")
    return {name: tensor for file in files for name, tensor in stored_tensors(file).items()}
