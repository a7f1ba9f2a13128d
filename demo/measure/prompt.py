"""What an adapter learned and what it does to a text: the tab "The prompt" without its view.

Nothing here imports torch or transformers, as the page may run without them. So tensors are read from their files with
NumPy; only `prompt_effect` asks an engine, which has torch in its own process.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from demo.engines.stage import Setup, Stage
from export.bundle.folder import Bundle
from export.runtime.batches import softmax
from export.runtime.check_text import check_text
from train.adapter.record import ADAPTER, FILES, Adapter
from train.common.errors import AdapterError, ModelError, UsageError, first_line, is_of_tokenizers
from train.common.folder_record import read_json_object, reading, sha256_of_files
from train.config import MINILM, P_TUNING_V2, SMOLLM2
from train.data.tasks import METRICS
from train.model.find import SMOLLM2_FILE, minilm_folder, smollm2_folder

NEAREST_WORDS = 5
"""Shown of each virtual token."""


RANDOM_PROMPTS = 20


RANDOM_SEED = 0


PROMPT = "prompt_embeddings"
"""PEFT's name of the table in an adapter's weights."""


_WORD_TABLES = ("word_embeddings.weight", "wte.weight", "embed_tokens.weight")
"""How the names of the word embeddings end: BERT and its kin and BLOOM; GPT-2; Llama and OPT."""


_CHUNK_ROWS = 8192
"""Of a word table that are in memory at once, whatever its size."""


_NUMPY_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
"""safetensors' names of floating-point types; NumPy has no bf16, which is read as the bits that it is."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file, not read yet.

    Attributes:
        path: the file.
        dtype: safetensors' name of its type.
        shape: of the tensor.
        offset_bytes: where in the file it begins.

    Source: https://github.com/huggingface/safetensors#format
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset_bytes: int

    def rows(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Some rows, by default all, as float32; only they are read.

        Raises:
            ModelError: the type is none that is known here.
        """
        if self.dtype not in _NUMPY_TYPES:
            raise ModelError(f"{self.path.name} holds numbers of type {self.dtype}, which cannot be read here.")
        mapped = np.memmap(self.path, _NUMPY_TYPES[self.dtype], "r", self.offset_bytes, self.shape)[start:stop]
        if self.dtype == "BF16":
            # The upper half of a float32.
            return (mapped.astype(np.uint32) << 16).view(np.float32)
        return np.array(mapped, dtype=np.float32)


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name.

    Raises:
        ModelError: it is no such file, or a damaged one.
    """
    from safetensors import SafetensorError, safe_open

    try:
        # Checks every type, shape and place against the file's size; where a tensor begins it does not tell.
        with safe_open(path, framework="np"), path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(header_bytes))
    except (SafetensorError, OSError) as cause:
        raise ModelError(f"{path.name} cannot be read ({first_line(cause)}).") from cause
    return {
        name: StoredTensor(path, entry["dtype"], tuple(entry["shape"]), 8 + header_bytes + entry["data_offsets"][0])
        for name, entry in header.items()
        if name != "__metadata__"
    }


@dataclass(frozen=True)
class Word:
    """An entry of the vocabulary beside a virtual token.

    Attributes:
        token: as it stands in the vocabulary.
        cosine: of its embedding and the virtual token's.
    """

    token: str
    cosine: float


@dataclass(frozen=True)
class Vocabulary:
    """The base model's words around a prompt.

    Attributes:
        nearest: of each virtual token the nearest words, nearest first.
        random_cosine: of a random vector and its nearest word, mean over as many as there are virtual tokens: where no
            meaning is.
        median_norm: of the embeddings of all words.
        n_words: how many there are.
    """

    nearest: tuple[tuple[Word, ...], ...]
    random_cosine: float
    median_norm: float
    n_words: int


@dataclass(frozen=True)
class PromptPart:
    """One kind of vectors that a prompt consists of.

    Attributes:
        name: "embeddings", "keys" or "values".
        norms: Euclidean, of each layer's virtual tokens, shape = (n_layers, n_virtual); one layer for embeddings.
        cosines: of the virtual tokens among themselves, mean over the layers, shape = (n_virtual, n_virtual)
    """

    name: str
    norms: tuple[tuple[float, ...], ...]
    cosines: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class LearnedPrompt:
    """What was learned.

    Attributes:
        parts: embeddings (P-Tuning), or keys and values (P-Tuning v2).
        n_layers: of the base model.
        is_decoder: whether the base model is causal.
        vocabulary: the words around it, None where there are none to show.
        why_no_words: then the reason, in words; else empty.
    """

    parts: tuple[PromptPart, ...]
    n_layers: int
    is_decoder: bool
    vocabulary: Vocabulary | None
    why_no_words: str

    def as_json(self) -> dict[str, Any]:
        """For the endpoint ``/prompt``."""
        value: dict[str, Any] = {"norms": {part.name: [list(norms) for norms in part.norms] for part in self.parts}}
        if self.vocabulary is None:
            return value | {"nearest_words": None, "why_no_words": self.why_no_words}
        nearest = [[{"word": word.token, "cosine": word.cosine} for word in words] for words in self.vocabulary.nearest]
        return value | {
            "nearest_words": nearest,
            "random_cosine": self.vocabulary.random_cosine,
            "median_word_norm": self.vocabulary.median_norm,
        }


def learned_prompt(adapter: Adapter) -> LearnedPrompt:
    """Read what an adapter learned; the first time, this reads the base model's words too.

    Raises:
        AdapterError: its configuration is of another kind, or its weights hold no prompt of that length.
        ModelError: its weights cannot be read.
    """
    tensors = stored_tensors(adapter.folder / FILES.weights)
    table = _prompt_table(adapter)
    config = read_json_object(adapter.folder / FILES.config, AdapterError, ADAPTER.remedy)
    vocabulary, why_no_words = None, ""
    parts: tuple[PromptPart, ...]
    with reading(adapter.folder, ADAPTER):
        n_layers = int(config["num_layers"])
        if adapter.method == P_TUNING_V2:
            # peft/peft_model.py, `get_prompt`: a row holds a key and a value of each layer in turn.
            keys, values = table.reshape(len(table), n_layers, 2, -1).transpose(2, 1, 0, 3)
            parts = (_part("keys", keys), _part("values", values))
            why_no_words = (
                "P-Tuning v2 learns a key and a value for each virtual token in every layer. They have no row in the "
                "space of the word embeddings, so no word is near them."
            )
        else:
            parts = (_part("embeddings", table[None]),)
    if adapter.method != P_TUNING_V2:
        try:
            vocabulary = _vocabulary(_BySha256(adapter.sha256, adapter))
        except ModelError as error:
            why_no_words = str(error)
    # transformers' name of a decoder's head; an encoder's is "classifier".
    is_decoder = any(name.startswith("base_model.score.") for name in tensors)
    return LearnedPrompt(parts, n_layers, is_decoder, vocabulary, why_no_words)


def _prompt_table(adapter: Adapter) -> np.ndarray:
    """The prompt, shape = (n_virtual, n_width); `train.adapter.peft.read_weights` reads it with torch."""
    tensor = stored_tensors(adapter.folder / FILES.weights).get(PROMPT)
    if tensor is None or len(tensor.shape) != 2 or not 0 < tensor.shape[0] == adapter.virtual_tokens:
        raise AdapterError(
            f"{adapter.folder.name} holds no prompt of {adapter.virtual_tokens} virtual tokens. Train it again."
        )
    return tensor.rows()


def _part(name: str, vectors: np.ndarray) -> PromptPart:
    """From vectors, shape = (n_layers, n_virtual, n_width)."""
    unit = _unit(vectors)
    cosines = (unit @ unit.swapaxes(1, 2)).mean(axis=0)
    return PromptPart(name, _tuples(np.linalg.norm(vectors, axis=-1)), _tuples(cosines))


def _tuples(matrix: np.ndarray) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in matrix.tolist())


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors of length 1; one of zeros, as padding often has, stays so, and is near nothing."""
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(norms == 0, 1, norms)


@dataclass(frozen=True)
class _BySha256:
    """An adapter as a key of a cache: two of one hash have learned the same."""

    sha256: str
    adapter: Adapter = field(compare=False)


@lru_cache(maxsize=16)
def _base_files(key: _BySha256) -> tuple[Path, ...]:
    """The files with the base model's weights, once it is known that they are those of the training.

    `train.model.find.find_base_model` finds the same, but transformers, and with it torch, helps it.

    Raises:
        ModelError: they are not on this machine, or are others.
    """
    name, folder = key.adapter.model, Path(key.adapter.model)
    # Of a folder the last part: where it lies on this machine is nobody's business.
    missing = f"The base model {folder.name} is not on this machine."
    if name == SMOLLM2 or folder.suffix == ".gguf":
        files = [smollm2_folder() / SMOLLM2_FILE if name == SMOLLM2 else folder]
    else:
        if name == MINILM:
            folder = minilm_folder()
        elif not folder.is_absolute():
            from huggingface_hub import try_to_load_from_cache

            found = try_to_load_from_cache(name, "config.json")
            if not isinstance(found, str):
                raise ModelError(missing)
            folder = Path(found).parent
        files = sorted(folder.glob("model*.safetensors"))
    if not files or not all(file.is_file() for file in files):
        raise ModelError(missing)
    if sha256_of_files(files) != key.adapter.model_sha256:
        raise ModelError(f"The base model {Path(name).name} on this machine is not the one of the training.")
    return tuple(files)


@lru_cache(maxsize=16)
def _base_tensors(key: _BySha256) -> dict[str, StoredTensor]:
    """The base model's tensors by name, from all its files.

    Raises:
        ModelError: as `_base_files`, or the weights are in GGUF.
    """
    files = _base_files(key)
    if files[0].suffix == ".gguf":
        raise ModelError("The base model is a GGUF file, whose quantised weights are not unpacked for this page.")
    return {name: tensor for file in files for name, tensor in stored_tensors(file).items()}


@lru_cache(maxsize=16)
def _vocabulary(key: _BySha256) -> Vocabulary:
    """The words nearest to a prompt of embeddings.

    Raises:
        ModelError: as `_base_tensors`, or it holds no word embeddings of that width.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(key.adapter.folder / FILES.tokenizer))
    except BaseException as cause:
        if not is_of_tokenizers(cause):
            raise
        raise ModelError(f"The adapter's tokenizer cannot be read ({first_line(cause)}).") from cause
    prompt = _prompt_table(key.adapter)
    tables = [tensor for name, tensor in _base_tensors(key).items() if name.endswith(_WORD_TABLES)]
    if len(tables) != 1 or tables[0].shape[1:] != prompt.shape[1:]:
        raise ModelError("The base model's file holds no word embeddings that are known here.")
    random = np.random.default_rng(RANDOM_SEED).standard_normal(prompt.shape, dtype=np.float32)
    unit = _unit(np.vstack([prompt, random]))
    # Rows that only round up the size of the table belong to no word.
    n_words = min(tables[0].shape[0], tokenizer.get_vocab_size())
    best, ids = np.empty((len(unit), 0)), np.empty((len(unit), 0), dtype=np.int64)
    norms = np.empty(n_words)
    for start in range(0, n_words, _CHUNK_ROWS):
        stop = min(start + _CHUNK_ROWS, n_words)
        rows = tables[0].rows(start, stop)
        norms[start:stop] = np.linalg.norm(rows, axis=1)
        cosines = np.hstack([best, unit @ _unit(rows).T])
        numbers = np.hstack([ids, np.tile(np.arange(start, stop), (len(unit), 1))])
        order = np.argsort(-cosines, axis=1, kind="stable")[:, :NEAREST_WORDS]
        best, ids = np.take_along_axis(cosines, order, 1), np.take_along_axis(numbers, order, 1)
    nearest = tuple(
        tuple(
            Word(tokenizer.id_to_token(number) or f"#{number}", cosine)
            for number, cosine in zip(ids[row].tolist(), best[row].tolist(), strict=True)
        )
        for row in range(len(prompt))
    )
    return Vocabulary(nearest, float(best[len(prompt) :, 0].mean()), float(np.median(norms)), n_words)


@dataclass(frozen=True)
class Curves:
    """A training, epoch by epoch.

    Attributes:
        epochs: numbers from 1.
        train_loss, validation_loss: cross-entropy in nats, mean over an epoch and after it; shape = (n_epochs,)
        scores: of each metric, by its name for people, what the validation rows gave; each shape = (n_epochs,)
        kept_epoch: the one whose weights the adapter has.
    """

    epochs: tuple[int, ...]
    train_loss: tuple[float, ...]
    validation_loss: tuple[float, ...]
    scores: tuple[tuple[str, tuple[float, ...]], ...]
    kept_epoch: int


def training_curves(adapter: Adapter) -> Curves:
    """Read an adapter's history.

    Raises:
        AdapterError: training.json holds none.
    """
    record = read_json_object(adapter.folder / FILES.training, AdapterError, ADAPTER.remedy)
    with reading(adapter.folder, ADAPTER):
        rows: list[dict[str, Any]] = record["epochs"]
        return Curves(
            epochs=tuple(int(row["epoch"]) for row in rows),
            train_loss=tuple(float(row["train_loss"]) for row in rows),
            validation_loss=tuple(float(row["validation_loss"]) for row in rows),
            scores=tuple(
                (METRICS[name], tuple(float(row["scores"][name]) for row in rows)) for name in adapter.task.metrics
            ),
            kept_epoch=int(record["best_epoch"]),
        )


@dataclass(frozen=True)
class FileSize:
    """How large something is on the disk.

    Attributes:
        name: what it is, for people.
        n_bytes: how large.
    """

    name: str
    n_bytes: int


@dataclass(frozen=True)
class Sizes:
    """How large an adapter is beside what it belongs to.

    Attributes:
        files: base model, adapter, and the graphs that exist.
        prompt_numbers: how many numbers the prompt has.
        head_numbers: how many the learned head has.
        frozen_numbers: how many the base model's files have that the head does not replace; None where they cannot be
            counted.
        why_unknown: then the reason, in words; else empty.
    """

    files: tuple[FileSize, ...]
    prompt_numbers: int
    head_numbers: int
    frozen_numbers: int | None
    why_unknown: str


def measure_sizes(adapter: Adapter, bundle: Bundle | None) -> Sizes:
    """Look up the sizes.

    Args:
        bundle: of this adapter, where one exists.
    """
    key = _BySha256(adapter.sha256, adapter)
    weights = adapter.folder / FILES.weights
    learned = {name: math.prod(tensor.shape) for name, tensor in stored_tensors(weights).items()}
    prompt_numbers = learned.pop(PROMPT, 0)
    files = [FileSize("adapter: prompt and head", weights.stat().st_size)]
    frozen_numbers, why_unknown = None, ""
    try:
        files.insert(0, FileSize("base model, frozen", sum(file.stat().st_size for file in _base_files(key))))
        # A base model's file may or may not begin its names with the model's type.
        replaced = tuple(f".{name}" for name in learned)
        frozen_numbers = sum(
            math.prod(tensor.shape)
            for name, tensor in _base_tensors(key).items()
            if tensor.dtype in _NUMPY_TYPES and not any(head.endswith(f".{name}") for head in replaced)
        )
    except ModelError as error:
        why_unknown = str(error)
    if bundle is not None:
        owner = f" of {len(bundle.tasks)} tasks" if bundle.has_many_tasks else ""
        for graph in bundle.graphs:
            size = bundle.graph_path(graph.precision).stat().st_size
            files.append(FileSize(f"ONNX graph{owner}, {graph.precision}, everything inside", size))
    return Sizes(tuple(files), prompt_numbers, sum(learned.values()), frozen_numbers, why_unknown)


@dataclass(frozen=True)
class PromptEffect:
    """What the prompt does to one text: the probabilities with it, with others in its place, and with none.

    Attributes:
        labels: in the order of the logits.
        learned: probabilities with the learned prompt, shape = (n_labels,)
        random: with random prompts, each of the learned one's norms, shape = (n_prompts, n_labels)
        none: with the text alone and the same head, shape = (n_labels,)
        tokens: length of the text in tokens, prompt excluded.
        cut: whether the text was longer than the model reads and lost its end.
    """

    labels: tuple[str, ...]
    learned: tuple[float, ...]
    random: tuple[tuple[float, ...], ...]
    none: tuple[float, ...]
    tokens: int
    cut: bool

    @property
    def random_mean(self) -> tuple[float, ...]:
        """Mean probabilities over the random prompts, shape = (n_labels,)"""
        return tuple(np.mean(self.random, axis=0).tolist())

    @property
    def random_kept(self) -> int:
        """How many random prompts leave the label as the learned one has it."""
        label = self.label(self.learned)
        return sum(self.label(probabilities) == label for probabilities in self.random)

    def label(self, probabilities: Sequence[float]) -> str:
        """The most probable one."""
        return self.labels[int(np.argmax(probabilities))]

    def as_json(self) -> dict[str, Any]:
        """For the endpoint ``/prompt_effect``."""

        def answer(probabilities: tuple[float, ...]) -> dict[str, Any]:
            named = dict(zip(self.labels, probabilities, strict=True))
            return {"label": self.label(probabilities), "probabilities": named}

        random = answer(self.random_mean) | {"prompts": len(self.random), "label_kept": self.random_kept}
        return {
            "learned": answer(self.learned),
            "random": random,
            "none": answer(self.none),
            "tokens": self.tokens,
            "cut": self.cut,
        }


def prompt_effect(stage: Stage, setup: Setup, sentence1: object, sentence2: object = "") -> PromptEffect:
    """Classify a text with the learned prompt, with random ones, and with none, in PyTorch.

    Args:
        sentence2: of a pair; empty where the task has single texts.

    Raises:
        UsageError: the page runs without PyTorch.
        TextError: a sentence is empty, too long or not valid Unicode, or there is one too many.
        PromptfoldError: as `Stage.open`, or the engine failed.
    """
    if not stage.has_pytorch:
        raise UsageError("This page runs without PyTorch, and the ONNX graph's prompt cannot be taken out of it.")
    sentences = check_text(stage.choices[setup.adapter].adapter.task, sentence1, sentence2)
    opened = stage.open(setup)
    assert opened.pytorch is not None, "the stage has PyTorch"
    encoded = opened.tokenize([sentences])
    with stage.measuring:
        logits = opened.pytorch.prompt_logits(encoded.arrays, RANDOM_PROMPTS, RANDOM_SEED)
    return PromptEffect(
        labels=opened.task.labels,
        learned=tuple(softmax(logits.learned[0]).tolist()),
        random=_tuples(softmax(logits.random[:, 0])),
        none=tuple(softmax(logits.none[0]).tolist()),
        tokens=int(encoded.arrays["input_ids"].shape[1]),
        cut=encoded.cut[0],
    )
