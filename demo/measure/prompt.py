"""What an adapter learned, how it was trained, how large it is, and what its prompt does to a text.

Nothing here imports torch or transformers: `prompt_effect` asks an engine, which has torch in its own process.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from demo.engines.stage import Setup, Stage
from demo.measure.compare import finite
from demo.measure.weights import (
    NUMPY_TYPES,
    PROMPT,
    AdapterKey,
    adapter_tensors,
    base_files,
    base_tensors,
    is_decoder,
    prompt_table,
)
from export.bundle.folder import Bundle
from export.runtime.check_text import check_text
from train.adapter.record import ADAPTER, FILES, Adapter
from train.common.errors import AdapterError, ModelError, UsageError, first_line, is_of_tokenizers
from train.common.folder_record import read_json_object, reading
from train.config import MULTI_LABEL, P_TUNING_V2, REGRESSION
from train.data.tasks import METRICS, Task

NEAREST_WORDS = 5
"""How many are shown for each virtual token."""

RANDOM_PROMPTS = 20
RANDOM_SEED = 0

_WORD_TABLES = ("word_embeddings.weight", "wte.weight", "embed_tokens.weight")
"""How the names of the word embeddings end: BERT's family and BLOOM; GPT-2; Llama and OPT."""

_CHUNK_ROWS = 8192
"""Rows of a word table that are in memory at once."""


class Word(NamedTuple):
    """An entry of the vocabulary near a virtual token."""

    token: str
    cosine: float
    """Between its embedding and the virtual token's."""


@dataclass(frozen=True)
class Vocabulary:
    """The base model's words around a prompt."""

    nearest: tuple[tuple[Word, ...], ...]
    """For each virtual token, nearest first."""
    random_cosine: float
    """Cosine of a random vector and its nearest word, mean over as many as there are virtual tokens: for comparison."""
    median_norm: float
    """Over the embeddings of all words."""
    n_words: int


@dataclass(frozen=True)
class PromptPart:
    """One kind of vectors that a prompt consists of."""

    name: str
    """ "embeddings", "keys" or "values"."""
    norms: tuple[tuple[float, ...], ...]
    """Euclidean, shape = (n_layers, n_virtual); embeddings have one layer."""
    cosines: tuple[tuple[float, ...], ...]
    """Between the virtual tokens, mean over the layers, shape = (n_virtual, n_virtual)."""


@dataclass(frozen=True)
class LearnedPrompt:
    """What an adapter learned: embeddings (P-Tuning), or keys and values (P-Tuning v2)."""

    parts: tuple[PromptPart, ...]
    n_layers: int
    is_decoder: bool
    vocabulary: Vocabulary | None
    why_no_words: str
    """Why there is no vocabulary; else empty."""

    def as_json(self) -> dict[str, Any]:
        """For the endpoint ``/prompt``."""
        value: dict[str, Any] = {"norms": {part.name: [list(norms) for norms in part.norms] for part in self.parts}}
        if self.vocabulary is None:
            return value | {"nearest_words": None, "why_no_words": self.why_no_words}
        known = self.vocabulary
        nearest = [[{"word": word.token, "cosine": word.cosine} for word in words] for words in known.nearest]
        value |= {"nearest_words": nearest, "random_cosine": known.random_cosine}
        return value | {"median_word_norm": known.median_norm}


def learned_prompt(adapter: Adapter) -> LearnedPrompt:
    """Read what an adapter learned; the first time, this reads the base model's words too.

    Raises an AdapterError or a ModelError where the adapter itself cannot be read, a UsageError where it has no prompt.
    """
    _refuse_merged(adapter)
    table = prompt_table(adapter)
    config = read_json_object(adapter.folder / FILES.config, AdapterError, ADAPTER.remedy)
    vocabulary, why_no_words = None, ""
    parts: tuple[PromptPart, ...]
    with reading(adapter.folder, ADAPTER):
        n_layers = int(config["num_layers"])
        if adapter.method == P_TUNING_V2:
            # peft/peft_model.py, `get_prompt`: a row holds a key and a value of each layer in turn.
            keys, values = table.reshape(len(table), n_layers, 2, -1).transpose(2, 1, 0, 3)
            parts = (_part("keys", keys), _part("values", values))
        else:
            parts = (_part("embeddings", table[None]),)
    if adapter.method == P_TUNING_V2:
        why_no_words = (
            "P-Tuning v2 learns a key and a value for each virtual token in every layer. They have no row in the "
            "space of the word embeddings, so no word is near them."
        )
    else:
        try:
            vocabulary = _vocabulary(AdapterKey(adapter.sha256, adapter))
        except ModelError as error:
            why_no_words = str(error)
    return LearnedPrompt(parts, n_layers, is_decoder(adapter), vocabulary, why_no_words)


def _refuse_merged(adapter: Adapter) -> None:
    if adapter.is_merged:
        raise UsageError(
            f"{adapter.folder.name} has no prompt: its method ({adapter.method}) changes the base model's weights. Choose "
            "another adapter."
        )


def _part(name: str, vectors: np.ndarray) -> PromptPart:
    """From vectors, shape = (n_layers, n_virtual, n_width)."""
    unit = _unit(vectors)
    cosines = (unit @ unit.swapaxes(1, 2)).mean(axis=0)
    return PromptPart(name, _tuples(np.linalg.norm(vectors, axis=-1)), _tuples(cosines))


def _tuples(matrix: np.ndarray) -> tuple[tuple[float, ...], ...]:
    return tuple(map(tuple, matrix.tolist()))


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors of length 1; zeros, as padding often has, stay zeros and are near nothing."""
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(norms == 0, 1, norms)


@lru_cache(maxsize=16)
def _vocabulary(key: AdapterKey) -> Vocabulary:
    """The words nearest to a prompt of embeddings; a ModelError as `base_tensors`, or where there is no word table."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(key.adapter.folder / FILES.tokenizer))
    except BaseException as cause:
        if not is_of_tokenizers(cause):
            raise
        raise ModelError(f"The adapter's tokenizer cannot be read ({first_line(cause)}).") from cause
    prompt = prompt_table(key.adapter)
    tables = [tensor for name, tensor in base_tensors(key).items() if name.endswith(_WORD_TABLES)]
    if len(tables) != 1 or tables[0].shape[1:] != prompt.shape[1:]:
        raise ModelError("The base model's file holds no word embeddings that are known here.")
    random = np.random.default_rng(RANDOM_SEED).standard_normal(prompt.shape, dtype=np.float32)
    unit = _unit(np.vstack([prompt, random]))
    # Further rows only round up the size of the table.
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
        tuple(Word(tokenizer.id_to_token(number) or f"#{number}", cosine) for number, cosine in zip(*row, strict=True))
        for row in zip(ids[: len(prompt)].tolist(), best[: len(prompt)].tolist(), strict=True)
    )
    return Vocabulary(nearest, float(best[len(prompt) :, 0].mean()), float(np.median(norms)), n_words)


@dataclass(frozen=True)
class Curves:
    """A training, epoch by epoch; each sequence has shape = (n_epochs,). Losses are those of `train.model.loss`."""

    epochs: tuple[int, ...]
    train_loss: tuple[float, ...]
    """Mean over each epoch."""
    validation_loss: tuple[float, ...]
    """After each epoch."""
    scores: tuple[tuple[str, tuple[float, ...]], ...]
    """Names of the metrics, for people, each with its values on the validation rows."""
    kept_epoch: int
    """The one whose weights the adapter has."""


def training_curves(adapter: Adapter) -> Curves | None:
    """Read an adapter's history from training.json; None for one that was made elsewhere."""
    record = read_json_object(adapter.folder / FILES.training, AdapterError, ADAPTER.remedy)
    if "epochs" not in record:
        return None
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


class FileSize(NamedTuple):
    """How large a file is, and what it is, for people."""

    name: str
    n_bytes: int


@dataclass(frozen=True)
class Sizes:
    """How large an adapter is beside its base model."""

    files: tuple[FileSize, ...]
    """Base model, adapter, and the graphs that exist."""
    prompt_numbers: int
    head_numbers: int
    frozen_numbers: int | None
    """Parameters of the base model that the head does not replace; None where they cannot be counted."""
    why_unknown: str
    """Why they cannot be counted; else empty."""


def measure_sizes(adapter: Adapter, bundle: Bundle | None) -> Sizes:
    """Look up the sizes of an adapter, its base model and its bundle, where one exists."""
    key = AdapterKey(adapter.sha256, adapter)
    learned = {name: tensor.size for name, tensor in adapter_tensors(adapter).items()}
    prompt_numbers = learned.pop(PROMPT, 0)
    files = [FileSize("adapter: prompt and head", (adapter.folder / FILES.weights).stat().st_size)]
    frozen_numbers, why_unknown = None, ""
    try:
        files.insert(0, FileSize("base model, frozen", sum(file.stat().st_size for file in base_files(key))))
        # Names in a base model's file may or may not begin with the model's type.
        replaced = tuple(f".{name}" for name in learned)
        frozen_numbers = sum(
            tensor.size
            for name, tensor in base_tensors(key).items()
            if tensor.dtype in NUMPY_TYPES and not any(head.endswith(f".{name}") for head in replaced)
        )
    except ModelError as error:
        why_unknown = str(error)
    if bundle is not None:
        owner = f" of {len(bundle.tasks)} tasks" if bundle.has_many_tasks else ""
        for graph in bundle.graphs:
            size = bundle.graph_bytes(graph.precision)
            files.append(FileSize(f"ONNX graph{owner}, {graph.precision}, everything inside", size))
    return Sizes(tuple(files), prompt_numbers, sum(learned.values()), frozen_numbers, why_unknown)


@dataclass(frozen=True)
class PromptEffect:
    """Probabilities of one text, or a regression's number, with the learned prompt, others in its place, and none."""

    task: Task
    learned: tuple[float, ...]
    """Shape = (n_labels,)"""
    random: tuple[tuple[float, ...], ...]
    """With random prompts, whose vectors have the learned ones' norms; shape = (n_prompts, n_labels)."""
    none: tuple[float, ...]
    """With the text alone and the same head, shape = (n_labels,)."""
    tokens: int
    """Length of the text, prompt excluded."""
    cut: bool
    """Whether the text was longer than the model reads and lost its end."""

    @property
    def random_mean(self) -> tuple[float, ...]:
        return tuple(np.mean(self.random, axis=0).tolist())

    @property
    def random_kept(self) -> int:
        """How many random prompts give the same label as the learned one."""
        label = self.label(self.learned)
        return sum(self.label(probabilities) == label for probabilities in self.random)

    @property
    def is_number(self) -> bool:
        return self.task.kind == REGRESSION

    def label(self, probabilities: Sequence[float]) -> str:
        """The most probable class, or all labels whose probability reaches the threshold, with commas between."""
        if self.task.kind == MULTI_LABEL:
            return self.task.join_labels(self.task.reach_threshold(np.array(probabilities)))
        return self.task.labels[int(np.argmax(probabilities))]

    def as_json(self) -> dict[str, Any]:
        """For the endpoint ``/prompt_effect``."""

        def answer(probabilities: tuple[float, ...]) -> dict[str, Any]:
            if self.is_number:
                return {"value": probabilities[0]}
            named = dict(zip(self.task.labels, probabilities, strict=True))
            return {"label": self.label(probabilities), "probabilities": named}

        random = answer(self.random_mean) | {"prompts": len(self.random)}
        random |= {} if self.is_number else {"label_kept": self.random_kept}
        value = {"learned": answer(self.learned), "random": random, "none": answer(self.none)}
        return value | {"tokens": self.tokens, "cut": self.cut}


def prompt_effect(stage: Stage, setup: Setup, sentence1: object, sentence2: object = "") -> PromptEffect:
    """Classify a text with the learned prompt, with random ones, and with none, in PyTorch.

    Raises a UsageError where the page runs without PyTorch, a TextError for a text that cannot be read.
    """
    if not stage.has_pytorch:
        raise UsageError("This page runs without PyTorch, and the ONNX graph's prompt cannot be taken out of it.")
    adapter = stage.choices[setup.adapter].adapter
    _refuse_merged(adapter)
    sentences = check_text(adapter.task, sentence1, sentence2)
    opened = stage.open(setup)
    assert opened.pytorch is not None, "the stage has PyTorch"
    encoded = opened.tokenize([sentences])
    with stage.measuring:
        logits = opened.pytorch.prompt_logits(encoded.arrays, RANDOM_PROMPTS, RANDOM_SEED)
    for part in (logits.learned, logits.random, logits.none):
        finite(part, opened.pytorch.name)
    return PromptEffect(
        task=opened.task,
        learned=tuple(opened.task.probabilities(logits.learned)[0].tolist()),
        random=_tuples(opened.task.probabilities(logits.random[:, 0])),
        none=tuple(opened.task.probabilities(logits.none)[0].tolist()),
        tokens=int(encoded.arrays["input_ids"].shape[1]),
        cut=encoded.cut[0],
    )
