"""Texts far longer than a model reads: the same tokens as from the whole text, within bounds of memory and time."""

import random
import resource
import subprocess
import sys
from collections.abc import Iterator

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from tests.conftest import ROOT
from train.data import long_texts
from train.data.long_texts import TextShortener

WORDS = [
    "coast",
    "redwood",
    "trees",
    "are",
    "the",
    "tallest",
    "on",
    "earth",
    "and",
    "grow",
    "over",
    "300",
    "feet",
    "树木很高",
    "ёлки",
    "don't",
    "re-read",
    "ﬁne",
    "naïve",
]


def texts() -> Iterator[str]:
    generator = random.Random(0)  # noqa: S311 -- test data
    while True:
        blank = generator.choice([" ", "", "  \n", "\t", ". "])
        yield blank.join(generator.choices(WORDS, k=generator.randrange(1, 150)))


def trained(kind: str) -> Tokenizer:
    if kind == "WordPiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer: trainers.Trainer = trainers.WordPieceTrainer(
            vocab_size=200, special_tokens=["[UNK]", "[CLS]", "[SEP]"]
        )
    elif kind == "byte-level BPE":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=["[CLS]", "[SEP]"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        )
    else:
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=kind == "Unigram")
        trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=["[UNK]", "[CLS]", "[SEP]"], unk_token="[UNK]")
    generator = texts()
    tokenizer.train_from_iterator([next(generator) for _ in range(60)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
    )
    return tokenizer


@pytest.mark.parametrize("kind", ["WordPiece", "byte-level BPE", "Unigram", "Unigram of whole texts"])
def test_a_cut_text_has_the_tokens_of_the_whole_one(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_texts, "_FIRST_CHARACTERS", 64)
    monkeypatch.setattr(long_texts, "_CHARACTERS_PER_TOKEN", 4)
    monkeypatch.setattr(long_texts, "_UNSURE_CHARACTERS", 128)
    tokenizer, source, n_cut = trained(kind), texts(), 0
    for n_tokens in (7, 8, 20, 21):
        shorten = TextShortener(tokenizer, n_tokens)
        tokenizer.enable_truncation(n_tokens, strategy="longest_first")
        for _ in range(12):
            for text in ((next(source),), (next(source), next(source))):
                shortened, lost = shorten(text)
                assert not lost
                n_cut += shortened != text
                whole, cut = tokenizer.encode(*text), tokenizer.encode(*shortened)
                assert (cut.ids, cut.type_ids, bool(cut.overflowing)) == (
                    whole.ids,
                    whole.type_ids,
                    bool(whole.overflowing),
                )
    assert n_cut > 30


@pytest.mark.parametrize(
    ("cell", "is_cut"),
    [
        ("'redwood trees are tall ' * 435_000", True),
        ("'x' * 10**7", False),  # one unknown word
        ("' ' * 9_999_000 + 'word ' * 200", True),
        ("'树' * 10**7", True),
    ],
)
def test_ten_million_characters_take_less_than_a_gigabyte(cell: str, *, is_cut: bool) -> None:
    """In processes of their own, as a row of a file would be labelled."""
    code = (
        "from export.runtime.tokenizer import TextTokenizer\nfrom train.model.find import minilm_folder\n"
        "tokenize = TextTokenizer(minilm_folder() / 'tokenizer.json', max_length=128, pad_token_id=0, inputs=('input_ids',))\n"
        f"a = {cell}\nprint(tokenize([(a, a[:-3])]).cut, tokenize([(a,)]).cut)"
    )
    limit = 2**30
    said = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
    ).stdout
    assert said == f"({is_cut},) ({is_cut},)\n"
