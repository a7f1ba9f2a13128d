"""The bundle folder: every file name once, save, load, check.

bundle/    model.onnx                     the graph, prompt and weights inside
           config.json, tokenizer.json …  so that `ORTModelForSequenceClassification` and a pipeline load it
           manifest.json                  what it is, what was measured, SHA-256 of each file
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.errors import BundleError
from train.files import FolderKind, read_record, reading, write_record
from train.tasks import Task


@dataclass(frozen=True)
class BundleFiles:
    """Names inside a bundle folder."""

    model: str = "model.onnx"
    config: str = "config.json"
    tokenizer: str = "tokenizer.json"
    manifest: str = "manifest.json"


FILES = BundleFiles()

BUNDLE = FolderKind(
    name="bundle",
    record=FILES.manifest,
    needed=(FILES.model, FILES.tokenizer, FILES.config),
    format_version=2,
    error=BundleError,
    command="python -m export ADAPTER --out",
    remedy="Export it again: python -m export ADAPTER --out BUNDLE",
)


@dataclass(frozen=True)
class Bundle:
    """A bundle folder that was checked.

    Attributes:
        folder: where it lies.
        adapter_sha256: `train.adapter.Adapter.sha256` of the adapter it was made from.
        base_model: name of the base model.
        task: what was learned.
        method: "p-tuning" or "p-tuning-v2".
        virtual_tokens: length of the prompt inside the graph.
        max_length: longest text in tokens, beside the prompt.
        pad_token_id: what fills the end of shorter texts in a batch.
        inputs: names of the graph's inputs, in order.
        precision: "fp32".
        max_logit_difference: the largest one seen between this graph and `PeftModel.forward` at export.
    """

    folder: Path
    adapter_sha256: str
    base_model: str
    task: Task
    method: str
    virtual_tokens: int
    max_length: int
    pad_token_id: int
    inputs: tuple[str, ...]
    precision: str
    max_logit_difference: float

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names in the order of the logits."""
        return self.task.labels

    @property
    def model_path(self) -> Path:
        """The graph."""
        return self.folder / FILES.model

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer."""
        return self.folder / FILES.tokenizer


def finish_bundle(folder: Path, manifest: dict[str, Any]) -> None:
    """Write manifest.json, with the format version and the hash of every file already in ``folder``."""
    write_record(folder, BUNDLE, manifest)


def load_bundle(folder: Path) -> Bundle:
    """Read a bundle folder and check it file by file, without loading the graph.

    Raises:
        BundleError: it is not there, is no bundle, is of another format, or a file of it was changed.
    """
    manifest = read_record(folder, BUNDLE)
    with reading(folder, BUNDLE):
        return Bundle(
            folder=folder,
            adapter_sha256=str(manifest["adapter_sha256"]),
            base_model=str(manifest["base_model"]["name"]),
            task=Task.from_json(manifest["task"]),
            method=str(manifest["method"]),
            virtual_tokens=int(manifest["virtual_tokens"]),
            max_length=int(manifest["max_length"]),
            pad_token_id=int(manifest["pad_token_id"]),
            inputs=tuple(str(name) for name in manifest["inputs"]),
            precision=str(manifest["precision"]),
            max_logit_difference=float(manifest["parity"]["max_logit_difference"]),
        )
