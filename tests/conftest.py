"""Small real models, made in code: the tests download nothing and mock no engine.

One tiny base model a family, a word-level tokenizer of a hundred words, and pairs of sentences whose
label can be learned: "equivalent" pairs share their words.
"""

import json
import os
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock

import train  # noqa: F401  -- switches telemetry off before anything below it is imported
from tests.families import GENERIC, POSITIONS, REFUSED

Folders = Callable[[str], Path]
"""Fixtures that make something of a kind: `base_model`, `adapter`, `bundle`."""
Precisions = Callable[[str, str], Path]
"""`bundle_in`, of a kind and a precision."""
Second = Callable[..., Path]
"""`second`, of a kind and what it shall have of its own."""

ROOT = Path(__file__).parent.parent
"""The repository: command lines are started here."""
SLOW = ROOT / "tests" / "slow"
SHIPPED = ("minilm-mrpc", "minilm-mrpc-v2")
"""Names of the adapters under demo/adapters."""

ENCODERS = ("bert", "distilbert", "electra", "mpnet", "roberta", "xlm-roberta")
DECODERS = ("bloom", "gpt2", "llama", "opt")
FAMILIES = ENCODERS + DECODERS
P_TUNED_V2 = ("bert", "electra", "gpt2", "llama", "opt", "roberta", "xlm-roberta")
"""Families that take learned keys and values (P-Tuning v2)."""
KINDS = (*FAMILIES, *(f"{family}-v2" for family in P_TUNED_V2))
"""Every known family with every method that it takes; "-v2" marks P-Tuning v2. For the slow tests."""
GENERIC_KINDS = (*GENERIC, *(f"{name}-v2" for name, family in GENERIC.items() if family.takes_v2))
"""The same of the families that take the generic way (its "deberta-v2" is a model type)."""

MAIN_KINDS = ("bert", "roberta-v2", "gpt2", "llama-v2", "qwen3")
"""An encoder and a decoder with each method, and the generic way: enough for the tests that run by default."""
TOKEN_TYPES = ("albert", "bert", "electra", "ernie", "nezha", "rembert", "squeezebert")
"""Families whose tiny tokenizer tells the two sentences apart."""
CLUSTERS = ("test_growth", "test_score_ray", "test_serving")
"""Test files that start Ray."""


def family_of(kind: str) -> str:
    """ "bert" of "bert-v2"."""
    return kind if kind in GENERIC else kind.removesuffix("-v2")


def is_decoder(kind: str) -> bool:
    """Whether a kind's base model is causal."""
    family = family_of(kind)
    return family in DECODERS or (family in GENERIC and GENERIC[family].is_decoder)


WORDS = tuple(f"word{number}" for number in range(90))
VIRTUAL_TOKENS = 5


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--screenshot", type=Path, help="where the browser test keeps its picture of the page")
    parser.addoption(
        "--soak",
        action="store_true",
        help="ten times as many faults in tests/slow/faults (half an hour), 50 visitors for two minutes in test_load.py",
    )


def pytest_configure() -> None:
    from playwright.sync_api import expect

    expect.set_options(timeout=180_000)  # the other worker's tests want the processor too


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what lies in tests/slow, which `python -m pytest` leaves out and `python -m pytest -m slow` runs."""
    for item in items:
        if item.path.is_relative_to(SLOW):
            item.add_marker(pytest.mark.slow)


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Name a file's content in a test's name by its argument alone.

    Packed content can hold the time at which it was packed: pytest-xdist's workers would disagree about the names.
    """
    return argname if isinstance(val, bytes) else None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each of pytest-xdist's workers whole files, for their fixtures, and all that start Ray to one of them.

    A test that kills a replica looks for it among all processes. (``--dist loadgroup``, which is made for this, does
    nothing with pytest 9.2 and pytest-xdist 3.8.)
    """
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            return "clusters" if Path(file).stem in CLUSTERS else file

    return Scheduling(config, log)


def make_tokenizer(folder: Path, family: str) -> None:
    """Write a fast tokenizer for pairs: one token a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import LlamaTokenizerFast, PreTrainedTokenizerFast

    special = ["<s>", "<pad>", "</s>", "<unk>"]
    vocabulary = {token: index for index, token in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    names = ["input_ids", "attention_mask", "token_type_ids"]
    # Llama's class rewrites the template of whatever file it is given.
    kind = LlamaTokenizerFast if family == "llama" else PreTrainedTokenizerFast
    kind(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        cls_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_input_names=names if family in TOKEN_TYPES else names[:2],
    ).save_pretrained(folder)


def make_base_model(folder: Path, family: str) -> Path:
    """Write a base model of a family with random weights, as a folder that ``--model`` takes."""
    import torch
    from transformers import AutoConfig, AutoModel

    usual = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": POSITIONS}
    encoder = usual | {"intermediate_size": 64, "type_vocab_size": 2}
    # RoBERTa numbers positions from pad_token_id + 1.
    from_2 = encoder | {"max_position_embeddings": POSITIONS + 2}
    sizes = {
        "bert": encoder,
        "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
        "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": POSITIONS},
        "electra": encoder | {"embedding_size": 32},
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 64, "n_positions": POSITIONS},
        "llama": usual | {"intermediate_size": 64, "num_key_value_heads": 2},  # grouped-query attention, as SmolLM2's
        "mpnet": from_2,
        "opt": usual | {"ffn_dim": 64, "word_embed_proj_dim": 16},  # as opt-350m, which embeds in another width
        "roberta": from_2 | {"type_vocab_size": 1},
        "xlm-roberta": from_2 | {"type_vocab_size": 1},
        **{name: generic.sizes for name, generic in (GENERIC | REFUSED).items()},
    }[family]
    # As the real ones, GPT-2 and Qwen3 have no padding token of their own.
    common = {"bos_token_id": 0, "eos_token_id": 2} if family in {"gpt2", "qwen3"} else {"pad_token_id": 1}
    torch.manual_seed(1)
    std = "init_std" if family == "opt" else "initializer_range"
    config = AutoConfig.for_model(family, vocab_size=len(WORDS) + 4, **(common | sizes | {std: 0.2}))
    with warnings.catch_warnings():
        # DeBERTa's file calls torch.jit.script, which goes away.
        warnings.simplefilter("ignore", FutureWarning)
        model = AutoModel.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                # A fresh model's biases are 0 and its norms' weights 1: one that is forgotten, or added twice, would not show.
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    make_tokenizer(folder, family)
    return folder


def make_pairs(n: int, seed: int) -> list[dict[str, object]]:
    """Pairs in MRPC's columns: label 1 where the second sentence has the first one's words, in any order."""
    generator = random.Random(seed)  # noqa: S311 -- test data
    rows: list[dict[str, object]] = []
    for index in range(n):
        label = index % 2
        first = generator.sample(WORDS, generator.randint(3, 9))
        second = generator.sample(first, len(first)) if label else generator.sample(WORDS, generator.randint(3, 9))
        rows.append({"sentence1": " ".join(first), "sentence2": " ".join(second), "label": label, "idx": index})
    return rows


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@dataclass(frozen=True)
class Data:
    """Files for ``--train-file`` and ``--validation-file``."""

    train_file: Path
    validation_file: Path

    @property
    def flags(self) -> list[str]:
        """As command-line words."""
        return ["--train-file", str(self.train_file), "--validation-file", str(self.validation_file)]


class MadeOnce:
    """Folders that are made once a run, whichever of pytest-xdist's workers asks first; the others wait for it."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._root.mkdir(exist_ok=True)

    def __call__(self, name: str, make: Callable[[Path], object]) -> Path:
        """The folder of a name, made if it is not there."""
        folder, whole = self._root / name, self._root / f"{name}.whole"
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self._root / f"{name}.lock"):
            if not whole.exists():
                make(folder)
                whole.touch()
        return folder


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> MadeOnce:
    base = tmp_path_factory.getbasetemp()
    # A worker's own folder lies in that of the run.
    return MadeOnce((base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "made")


@pytest.fixture(scope="session")
def data(made_once: MadeOnce) -> Data:
    def make(folder: Path) -> None:
        folder.mkdir()
        write_jsonl(folder / "train.jsonl", make_pairs(64, seed=1))
        write_jsonl(folder / "validation.jsonl", make_pairs(40, seed=2))

    folder = made_once("data", make)
    return Data(folder / "train.jsonl", folder / "validation.jsonl")


@pytest.fixture(scope="session")
def base_model(made_once: MadeOnce) -> Folders:
    """A function from a family to a folder with a tiny model of it, made once a run."""
    return lambda family: made_once(f"base-{family}", lambda folder: make_base_model(folder, family))


def train_kind(kind: str, base: Path, folder: Path, flags: str, files: list[str]) -> None:
    """``python -m train`` for a tiny model."""
    from train.__main__ import main

    method = "p-tuning-v2" if kind != family_of(kind) else "p-tuning"
    words = f"--method {method} --virtual-tokens {VIRTUAL_TOKENS} --encoder-hidden-size 16 {flags}"
    assert main(["--model", str(base), "--out", str(folder), *words.split(), *files]) == 0


@pytest.fixture(scope="session")
def adapter(made_once: MadeOnce, base_model: Folders, data: Data) -> Folders:
    """A function from a kind ("bert", "bert-v2") to an adapter folder that ``python -m train`` wrote for it."""

    def get(kind: str) -> Path:
        base, flags = base_model(family_of(kind)), "--epochs 3 --learning-rate 1e-2"
        return made_once(f"adapters/{kind}", lambda folder: train_kind(kind, base, folder, flags, data.flags))

    return get


def write_three_labels(path: Path, seed: int) -> Path:
    """Pairs with three labels, under other column names."""
    rows = enumerate(make_pairs(30, seed))
    columns = ({"left": row["sentence1"], "right": row["sentence2"], "kind": "abc"[i % 3]} for i, row in rows)
    return write_jsonl(path, list(columns))


@pytest.fixture(scope="session")
def second(made_once: MadeOnce, base_model: Folders, data: Data) -> Second:
    """A function from a kind to another adapter of it; ``three`` labels, or other ``flags``."""

    def get(kind: str, *, three: bool = False, flags: str = "") -> Path:
        place = "second-" + "".join(c if c.isalnum() else "-" for c in f"{kind}{flags}")

        def make(folder: Path) -> None:
            files = data.flags
            if three:
                paths = (write_three_labels(folder.parent / f"{seed}.jsonl", seed) for seed in (3, 4))
                files = [*Data(*paths).flags, "--text-columns", "left,right", "--label-column", "kind"]
            more = f"--epochs 1 --learning-rate 3e-2 --seed 5 {flags}"
            train_kind(kind, base_model(family_of(kind)), folder, more, files)

        return made_once(f"{place}/{'three' if three else 'other'}", make)

    return get


@pytest.fixture(scope="session")
def bundle(made_once: MadeOnce, adapter: Folders) -> Folders:
    """A function from a kind to a bundle folder that ``python -m export`` wrote from its adapter, in fp32 alone."""
    from export.__main__ import main

    def get(kind: str) -> Path:
        def make(folder: Path) -> None:
            assert main([str(adapter(kind)), "--out", str(folder), "--precision", "fp32"]) == 0

        return made_once(f"bundles/{kind}", make)

    return get


@pytest.fixture(scope="session")
def bundle_in(made_once: MadeOnce, adapter: Folders, data: Data) -> Precisions:
    """A function from a kind and a precision to a bundle that holds it beside fp32, whatever it costs in quality."""
    import export.fold.precision.gate
    from export.__main__ import main

    def get(kind: str, precision: str) -> Path:
        def make(folder: Path) -> None:
            rows = ["--validation-file", str(data.validation_file)]
            with pytest.MonkeyPatch.context() as patch:
                # No metric can fall by more.
                patch.setattr(export.fold.precision.gate, "GATE_TOLERANCE", 2.0)
                assert main([str(adapter(kind)), "--out", str(folder), "--precision", precision, *rows]) == 0

        return made_once(f"{precision}/{kind}", make)

    return get


def random_batch(
    generator: np.random.Generator, batch_size: int, length: int, *, token_types: bool
) -> dict[str, np.ndarray]:
    """Random token ids with the padding on the right, the first row full."""
    lengths = generator.integers(1, length + 1, batch_size)
    lengths[0] = length
    batch = {
        "input_ids": generator.integers(0, len(WORDS) + 4, (batch_size, length)),
        "attention_mask": (np.arange(length) < lengths[:, None]).astype(np.int64),
    }
    if token_types:
        batch["token_type_ids"] = generator.integers(0, 2, (batch_size, length))
    return batch


def peft_logits(
    adapter_folder: Path, base_folder: Path, batch: dict[str, np.ndarray], *, n_labels: int = 2
) -> np.ndarray:
    """The golden logits: transformers and PEFT alone; of promptfold only what hides their warnings."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    from train.common.console import quiet_transformers

    with quiet_transformers():
        model = AutoModelForSequenceClassification.from_pretrained(
            base_folder, num_labels=n_labels, ignore_mismatched_sizes=True
        )
    if model.config.pad_token_id is None and len(batch["input_ids"]) > 1:
        # Or transformers takes no batch. One text has no padding, and may well end with this token.
        model.config.pad_token_id = model.config.eos_token_id
    if hasattr(model.base_model, "encoder"):
        # PEFT's prefix tuning takes the second output for the pooled row; without a pooler that is the cache.
        model.base_model.register_forward_hook(
            lambda _, __, outputs: type(outputs)({key: outputs[key] for key in outputs if key != "past_key_values"})
        )
    model = PeftModel.from_pretrained(model, adapter_folder).eval()
    with torch.inference_mode():
        return model(**{name: torch.from_numpy(array) for name, array in batch.items()}).logits.numpy()


def flip_bit(path: Path, position: int) -> None:
    """Flip the lowest bit of one byte of a file."""
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= 1
    path.write_bytes(content)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread for torch: models this small lose much by waiting for a second one where cores are few or busy."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU, wherever the tests run: only a CPU gives the same bits again."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


ON_CPU = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
"""One thread and no GPU for a process of its own: environment variables."""


@pytest.fixture
def no_leftovers(tmp_path: Path) -> Iterator[Path]:
    """A folder for ``--out``; afterwards nothing hidden or half-written may lie in it."""
    yield tmp_path
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
