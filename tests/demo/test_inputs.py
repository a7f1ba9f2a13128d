"""Bad inputs, made by Hypothesis: each is answered, or refused in words; nothing else is raised, hangs or shows its inside."""

import json
from collections.abc import Callable
from functools import reduce
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pyarrow import parquet

from demo.access.limits import MAX_BYTES
from demo.measure.upload import read_upload
from export.bundle.folder import load_bundle
from export.runtime.check_text import MAX_CHARACTERS, check_text
from export.runtime.classifier import OnnxClassifier
from tests.conftest import WORDS
from train.common.errors import PromptfoldError, TextError
from train.data.tasks import MRPC

MILLION = 1_000_000
trying = settings(
    deadline=None,
    max_examples=150,
    derandomize=True,  # the same inputs in every run: what fails once fails again
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)

Test = TypeVar("Test", bound=Callable[..., Any])


def examples(name: str, *values: Any) -> Callable[[Test], Test]:
    """Values of a parameter, or of several with commas between, to be tried beside the random ones."""
    names = name.split(",")
    inputs = [dict(zip(names, value if len(names) > 1 else (value,), strict=True)) for value in values]
    return lambda test: reduce(lambda decorated, one: example(**one)(decorated), inputs, test)


# Also halves of surrogate pairs, control characters, and what no version of Unicode has assigned.
EVERY_CHARACTER = st.characters(codec=None, exclude_categories=())
ZERO_WIDTH = "\u200b\u200c\u200d\u2060\ufeff"
RIGHT_TO_LEFT = "\u202e\u202b\u2067\u05d0\u0627"
COMBINING = "\u0301\u0489\u20dd\ufe0f"
PARTS = [*WORDS[:9], *ZERO_WIDTH, *RIGHT_TO_LEFT, *COMBINING, " ", "\0", "\r\n", "<s>", "</s>", "<pad>"]
some_text = st.text(EVERY_CHARACTER, min_size=1, max_size=3)
texts = st.one_of(
    st.text(EVERY_CHARACTER, max_size=200),
    st.lists(st.sampled_from(PARTS), max_size=60).map("".join),
    st.builds(lambda part, n: part * n, some_text, st.integers(1, MAX_CHARACTERS)),
)


@pytest.fixture(scope="module")
def classifier(bundle: Callable[[str], Path]) -> OnnxClassifier:
    return OnnxClassifier(load_bundle(bundle("bert")), threads=1, use_cuda=False)


def check_words(error: Exception) -> None:
    assert 0 < len(str(error)) < 1000
    assert "Traceback" not in str(error)
    str(error).encode()


@trying
@given(first=texts, second=texts)
@examples(
    "first,second",
    *(("\ud800", "word1"), ("word1", "\udfff word2"), ("\0", "\x1b[31m"), (ZERO_WIDTH, RIGHT_TO_LEFT)),
    *(("a\u0301" * 5000, "word1"), ("😀" * MAX_CHARACTERS, "👩‍👩‍👧‍👦" * 1400), ("<s>" * 3000, "</s>" * 2500)),
    *(("x" * MILLION, "word1"), ("word1", "x" * MILLION)),
)
def test_any_text_is_classified_or_refused(first: str, second: str, classifier: OnnxClassifier) -> None:
    try:
        sentences = check_text(MRPC, first, second)
        encoded = classifier.tokenize([sentences])
        logits = classifier.logits(encoded.arrays)
        classifier.tokenize.characters_read(sentences)
    except PromptfoldError as error:
        check_words(error)
    else:
        assert logits.shape == (1, 2)
        assert np.isfinite(logits).all()


no_texts = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.binary(), st.lists(texts))


@trying
@given(st.one_of(no_texts, st.dictionaries(texts, texts)))
def test_what_is_no_text_is_refused(value: Any) -> None:
    with pytest.raises(TextError) as caught:
        check_text(MRPC, value, "word1")
    check_words(caught.value)


TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
dtypes = st.one_of(
    hnp.scalar_dtypes(),
    hnp.unicode_string_dtypes(max_len=3),
    hnp.byte_string_dtypes(max_len=3),
    st.just(np.dtype(object)),
)
shapes = hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=60)
whole_numbers = st.one_of(
    hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=6).flatmap(lambda shape: hnp.arrays(np.int64, shape)),
    shapes.flatmap(lambda shape: hnp.arrays(np.int64, shape, elements=st.integers(-2, 200))),  # plausible token ids
    st.builds(lambda shape, value: np.full(shape, value, np.int64), shapes, st.integers(0, 3)),
)
batches = st.dictionaries(st.sampled_from([*TEXT_INPUTS, "task_ids", "a name"]), whole_numbers)


def whole_batch(shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    ones = np.ones(shape, np.int64)
    return {"input_ids": 5 * ones, "attention_mask": ones, "token_type_ids": 0 * ones}


almost_whole = st.builds(
    lambda shape, which, wrong: whole_batch(shape) | {which: wrong}, shapes, st.sampled_from(TEXT_INPUTS), whole_numbers
)
other_dtypes = st.builds(
    lambda which, dtype: whole_batch((2, 3)) | {which: np.zeros((2, 3), dtype)}, st.sampled_from(TEXT_INPUTS), dtypes
)


@settings(trying, max_examples=450)
@given(arrays=st.one_of(batches, almost_whole, other_dtypes))
def test_any_batch_is_answered_or_refused(arrays: dict[str, np.ndarray], classifier: OnnxClassifier) -> None:
    try:
        logits = classifier.logits(arrays)
    except PromptfoldError as error:
        check_words(error)
    else:
        assert logits.shape == (len(arrays["input_ids"]), 2)
        assert np.isfinite(logits).all()


def read_or_refuse(content: bytes, name: str, folder: Path, **columns: str) -> None:
    (folder / name).write_bytes(content)
    try:
        upload = read_upload(folder / name, MRPC, **columns)
    except PromptfoldError as error:
        check_words(error)
        assert str(folder) not in str(error)
    else:
        assert len(upload.sentences) == len(upload.rows)
        for sentence in chain(*upload.sentences):
            sentence.encode()


CSV = b"sentence1,sentence2,label,idx\nword1 word2,word2 word3,1,0\nword4,word5,0,1\n"
JSONL = b'{"sentence1": "word1", "sentence2": "word2", "label": 1}\n{"sentence1": "a", "sentence2": "b", "label": 0}\n'
PAIRS = pyarrow.BufferOutputStream()
parquet.write_table(pyarrow.table({"sentence1": ["a", "b"], "sentence2": ["word3", "word4"], "label": [0, 1]}), PAIRS)
WHOLE = {"rows.csv": CSV, "rows.jsonl": JSONL, "rows.parquet": PAIRS.getvalue().to_pybytes()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("a visitors files")


@pytest.mark.parametrize("name", WHOLE)
@trying
@given(content=st.binary(max_size=2000))
@examples(
    "content",
    *(b"", b"\0", b"\xef\xbb\xbf", b"PAR1", b"PAR1PAR1", b"PAR1" + b"\xff" * 8 + b"PAR1"),
    *(b"sentence1,sentence2\n" + b'"' * 999, b'{"sentence1":' * 3000, b"[" * 100_000, b"," * MILLION),
    *(b"x" * MILLION, b"x" * (MAX_BYTES + 1), b'{"sentence1": "\\ud800", "sentence2": "b", "label": 0}'),
    *(b'{"sentence1": "a", "sentence2": "b", "label": %s}' % label for label in (b"1" + b"0" * 5000, b"1e999", b"NaN")),
)
def test_any_bytes_are_read_or_refused(name: str, content: bytes, folder: Path) -> None:
    read_or_refuse(content, name, folder)


@pytest.mark.parametrize("name", WHOLE)
@trying
@given(where=st.floats(0, 1), cut=st.integers(0, 20), put=st.binary(max_size=12), times=st.integers(1, 40))
def test_a_file_with_bytes_changed_is_read_or_refused(
    name: str, where: float, cut: int, put: bytes, times: int, folder: Path
) -> None:
    whole = WHOLE[name]
    at = int(where * len(whole))
    (folder / name).write_bytes(whole)
    assert len(read_upload(folder / name, MRPC).rows) == 2
    read_or_refuse(whole[:at] + put * times + whole[at + cut :], name, folder)


cells = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(EVERY_CHARACTER, max_size=20), st.lists(st.integers())
)


@trying
@given(rows=st.lists(st.dictionaries(st.sampled_from(["sentence1", "sentence2", "label", "", "é"]), cells), max_size=5))
def test_json_lines_of_any_kind_are_read_or_refused(rows: list[dict[str, Any]], folder: Path) -> None:
    read_or_refuse("\n".join(map(json.dumps, rows)).encode(), "rows.jsonl", folder)


@trying
@given(text_columns=texts, label_column=texts)
@examples(
    "text_columns,label_column",
    *(("sentence1,sentence2", "label"), ("sentence1,sentence1", "sentence1"), ("," * 5000, "label")),
    ("\ud800", "\udfff"),
)
def test_columns_of_any_name_are_found_or_refused(text_columns: str, label_column: str, folder: Path) -> None:
    read_or_refuse(CSV, "rows.csv", folder, text_columns=text_columns, label_column=label_column)
