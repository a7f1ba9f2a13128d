"""The bundle folder: every file name once, save, load, check.

bundle/    model.onnx                     the graph, prompt and weights inside
           config.json, tokenizer.json …  so that `ORTModelForSequenceClassification` and a pipeline load it
           manifest.json                  what it is, what was measured, SHA-256 of each file
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.errors import BundleError
from train.files import check_hashes, read_json_object, sha256_of_file, write_json

FORMAT_VERSION = 1
"""Version of manifest.json. A reader refuses a newer one."""


@dataclass(frozen=True)
class BundleFiles:
    """Names inside a bundle folder."""

    model: str = "model.onnx"
    config: str = "config.json"
    tokenizer: str = "tokenizer.json"
    manifest: str = "manifest.json"


FILES = BundleFiles()


@dataclass(frozen=True)
class Bundle:
    """A bundle folder that was checked.

    Attributes:
        folder: where it lies.
        adapter_sha256: `train.adapter.Adapter.sha256` of the adapter it was made from.
        base_model: name of the base model.
        task: name of the task.
        labels: class names in the order of the logits.
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
    task: str
    labels: tuple[str, ...]
    virtual_tokens: int
    max_length: int
    pad_token_id: int
    inputs: tuple[str, ...]
    precision: str
    max_logit_difference: float

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
    hashes = {path.name: sha256_of_file(path) for path in sorted(folder.iterdir())}
    write_json(folder / FILES.manifest, {"format_version": FORMAT_VERSION, **manifest, "sha256": hashes})


def load_bundle(folder: Path) -> Bundle:
    """Read a bundle folder and check it file by file, without loading the graph.

    Raises:
        BundleError: it is not there, is no bundle, is of another format, or a file of it was changed.
    """
    if not folder.is_dir():
        raise BundleError(f"There is no bundle folder {folder}. Make one: python -m export ADAPTER --out {folder}")
    missing = _missing((FILES.manifest, FILES.model, FILES.tokenizer, FILES.config), folder)
    if missing:
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise BundleError(
            f"{folder} is no bundle: it lacks {', '.join(missing)} (it holds {found}). "
            "Give a folder that `python -m export --out` wrote."
        )
    remedy = "Export it again: python -m export ADAPTER --out BUNDLE"
    manifest = read_json_object(folder / FILES.manifest, BundleError, remedy)
    if manifest.get("format_version") != FORMAT_VERSION:
        raise BundleError(
            f"{folder / FILES.manifest} has format version {manifest.get('format_version')!r}; this promptfold "
            f"reads {FORMAT_VERSION}. {remedy}"
        )
    try:
        hashes = dict(manifest["sha256"])
        bundle = Bundle(
            folder=folder,
            adapter_sha256=str(manifest["adapter_sha256"]),
            base_model=str(manifest["base_model"]["name"]),
            task=str(manifest["task"]),
            labels=tuple(str(label) for label in manifest["labels"]),
            virtual_tokens=int(manifest["virtual_tokens"]),
            max_length=int(manifest["max_length"]),
            pad_token_id=int(manifest["pad_token_id"]),
            inputs=tuple(str(name) for name in manifest["inputs"]),
            precision=str(manifest["precision"]),
            max_logit_difference=float(manifest["parity"]["max_logit_difference"]),
        )
    except (KeyError, TypeError, ValueError) as cause:
        raise BundleError(f"{folder / FILES.manifest} lacks {cause} or holds it in a wrong form. {remedy}") from cause
    unlisted = [name for name in (FILES.model, FILES.tokenizer, FILES.config) if name not in hashes]
    if unlisted:
        raise BundleError(f"{folder / FILES.manifest} has no SHA-256 of {unlisted[0]}. {remedy}")
    check_hashes(folder, hashes, BundleError, remedy)
    return bundle


def _missing(names: Sequence[str], folder: Path) -> list[str]:
    return [name for name in names if not (folder / name).is_file()]
