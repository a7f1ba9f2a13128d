"""Texts far beyond the limit: cut by characters, they give the tokens of the whole text."""

import random
from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from train.data.long_texts import TextCutter

LETTERS = "aábcdeéfghi jklmno pqrst uvwxyz .,!?'0123456789 中文字 \n"


def sample(generator: random.Random, n_characters: int, alphabet: str = LETTERS) -> str:
    return "".join(generator.choices(alphabet, k=n_characters))


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    return train(tokenizer, trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]"], show_progress=False))


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return train(tokenizer, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False))


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    return train(
        tokenizer,
        trainers.UnigramTrainer(vocab_size=300, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False),
    )


def without_words() -> Tokenizer:
    """As Llama 2: nothing splits the text; blanks are letters of the vocabulary."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    train(tokenizer, trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>"], show_progress=False))
    tokenizer.pre_tokenizer = None
    return tokenizer


def train(tokenizer: Tokenizer, trainer: object) -> Tokenizer:
    generator = random.Random(1)  # noqa: S311 -- test data
    tokenizer.train_from_iterator([sample(generator, 300) for _ in range(200)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B:1", special_tokens=[])
    return tokenizer


@pytest.mark.parametrize("make", [word_piece, byte_level, unigram, without_words])
def test_a_cut_text_has_the_tokens_of_the_whole(make: Callable[[], Tokenizer]) -> None:
    tokenizer, generator = make(), random.Random(2)  # noqa: S311 -- test data
    content = tokenizer.to_str()
    n_cut = 0
    for limit in (16, 31):
        cutter = TextCutter(Tokenizer.from_str(content), limit)
        tokenizer.enable_truncation(limit, strategy="longest_first")
        for _ in range(12):
            lengths = generator.choices((5, 60, 300, 900, 3000), k=generator.choice((1, 2)))
            blanks = generator.choice((LETTERS, LETTERS + " " * 20, LETTERS.replace(" ", "")))
            text = tuple(sample(generator, n, blanks) for n in lengths)
            if len(text) == 2 and min(lengths) > 8 * limit and lengths[0] == lengths[1]:
                continue  # which of two is longer by a token is not proved
            cut = cutter.cut(text)
            n_cut += cut != text
            whole, short = (tokenizer.encode(*sentences) for sentences in (text, cut))
            if len(text) == 2 and min(lengths) > 8 * limit:
                assert whole.ids[: limit // 2] == short.ids[: limit // 2]
            else:
                assert (whole.ids, whole.type_ids, bool(whole.overflowing)) == (
                    short.ids,
                    short.type_ids,
                    bool(short.overflowing),
                )
    assert n_cut > 8


def test_a_word_without_an_end_costs_little() -> None:
    tokenizer = word_piece()
    cutter = TextCutter(Tokenizer.from_str(tokenizer.to_str()), 16)
    (cut,) = cutter.cut(("a" * 300_000 + " b" * 100_000,))
    assert len(cut) < 10_000
    assert tokenizer.encode(cut).tokens[:3] == ["[UNK]", "b", "b"]
