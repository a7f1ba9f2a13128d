"""Bad inputs, made by Hypothesis: each is answered, or refused in words; nothing else is raised, hangs or shows its inside."""

import io
import json
import re
import string
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow
import pytest
import schemathesis
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pyarrow import parquet
from schemathesis import GenerationMode
from schemathesis.core.result import Ok

from demo.access.gate import API, MAX_BODY_BYTES
from demo.access.limits import MAX_BYTES
from demo.measure.upload import Upload, read_upload
from export.bundle.folder import load_bundle
from export.runtime.check_text import MAX_CHARACTERS, check_text
from export.runtime.classifier import OnnxClassifier
from tests.conftest import ON_CPU, ROOT, WORDS
from tests.demo.server import Server, serve
from train.common.errors import PromptfoldError, TextError
from train.data.tasks import MRPC

Folders = Callable[[str], Path]

HANG_SECONDS = 5.0
"""No input of these sizes may take longer: a limit against hangs, not a figure."""

MILLION = 1_000_000

trying = settings(
    deadline=1000 * HANG_SECONDS,
    max_examples=150,
    derandomize=True,  # the same inputs in every run: what fails once fails again
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)

EVERY_CHARACTER = st.characters(codec=None, exclude_categories=())
"""Also halves of surrogate pairs, control characters, and what no version of Unicode has assigned."""

ZERO_WIDTH = "\u200b\u200c\u200d\u2060\ufeff"
RIGHT_TO_LEFT = "\u202e\u202b\u2067\u05d0\u0627"
COMBINING = "\u0301\u0489\u20dd\ufe0f"

PARTS = [*WORDS[:9], *ZERO_WIDTH, *RIGHT_TO_LEFT, *COMBINING, " ", "\0", "\r\n", "<s>", "</s>", "<pad>"]

texts = st.one_of(
    st.text(EVERY_CHARACTER, max_size=200),
    st.lists(st.sampled_from(PARTS), max_size=60).map("".join),
    st.builds(
        lambda part, n: part * n, st.text(EVERY_CHARACTER, min_size=1, max_size=3), st.integers(1, MAX_CHARACTERS)
    ),
)


@pytest.fixture(scope="module")
def classifier(bundle: Folders) -> OnnxClassifier:
    return OnnxClassifier(load_bundle(bundle("bert")), threads=1, use_cuda=False)


def check_words(error: Exception) -> None:
    """A refusal is short, and shown as it is."""
    words = str(error)
    assert 0 < len(words) < 1000
    assert "Traceback" not in words
    words.encode()  # or no page could show it


# Texts


@trying
@given(first=texts, second=texts)
@example(first="\ud800", second="word1")
@example(first="word1", second="\udfff word2")
@example(first="\0", second="\x1b[31m")
@example(first=ZERO_WIDTH, second=RIGHT_TO_LEFT)
@example(first="a\u0301" * 5000, second="word1")
@example(first="😀" * MAX_CHARACTERS, second="👩‍👩‍👧‍👦" * 1400)
@example(first="x" * MILLION, second="word1")
@example(first="word1", second="x" * MILLION)
@example(first="<s>" * 3000, second="</s>" * 2500)
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


@trying
@given(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.binary(),
        st.lists(texts),
        st.dictionaries(texts, texts),
    )
)
def test_what_is_no_text_is_refused(value: Any) -> None:
    with pytest.raises(TextError) as caught:
        check_text(MRPC, value, "word1")
    check_words(caught.value)


def test_a_text_of_a_million_characters_is_refused_before_it_is_tokenised(
    classifier: OnnxClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = time.perf_counter()
    with pytest.raises(TextError, match=r"1,000,000 characters; at most 10,000 are read"):
        check_text(MRPC, "x" * MILLION, "word1")
    assert time.perf_counter() - start < HANG_SECONDS


# Batches

dtypes = st.one_of(
    hnp.integer_dtypes(),
    hnp.unsigned_integer_dtypes(),
    hnp.floating_dtypes(),
    hnp.boolean_dtypes(),
    hnp.complex_number_dtypes(),
    hnp.unicode_string_dtypes(max_len=3),
    hnp.byte_string_dtypes(max_len=3),
    hnp.datetime64_dtypes(),
    st.just(np.dtype(object)),
)
shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=6)
whole_numbers = shapes.flatmap(lambda shape: hnp.arrays(np.int64, shape))
plausible = st.builds(
    lambda shape, low, high, seed: np.random.default_rng(seed).integers(low, high + 1, shape, np.int64),
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=60),
    st.integers(-2, 0),
    st.integers(0, 200),
    st.integers(0, 9),
)
mask_like = st.integers(0, 3).flatmap(
    lambda value: hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=60).map(
        lambda shape: np.full(shape, value, np.int64)
    )
)
names = st.sampled_from(["input_ids", "attention_mask", "token_type_ids", "task_ids", "a name"])


@trying
@given(arrays=st.dictionaries(names, st.one_of(whole_numbers, plausible, mask_like)))
def test_any_batch_of_whole_numbers_is_answered_or_refused(
    arrays: dict[str, np.ndarray], classifier: OnnxClassifier
) -> None:
    answer_or_refuse(classifier, arrays)


@trying
@given(
    shape=hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=50),
    which=st.sampled_from(["input_ids", "attention_mask", "token_type_ids"]),
    wrong=st.one_of(whole_numbers, plausible, mask_like),
)
def test_a_whole_batch_with_one_wrong_array_is_answered_or_refused(
    shape: tuple[int, int], which: str, wrong: np.ndarray, classifier: OnnxClassifier
) -> None:
    answer_or_refuse(classifier, whole_batch(shape) | {which: wrong})


@trying
@given(which=st.sampled_from(["input_ids", "attention_mask", "token_type_ids"]), dtype=dtypes)
def test_a_batch_of_another_kind_than_whole_numbers_is_answered_or_refused(
    which: str, dtype: np.dtype[Any], classifier: OnnxClassifier
) -> None:
    arrays = whole_batch((2, 3))
    answer_or_refuse(classifier, arrays | {which: np.zeros((2, 3), dtype)})


def whole_batch(shape: tuple[int, int]) -> dict[str, np.ndarray]:
    """A batch that is answered."""
    ones = np.ones(shape, np.int64)
    return {"input_ids": 5 * ones, "attention_mask": ones, "token_type_ids": 0 * ones}


def answer_or_refuse(classifier: OnnxClassifier, arrays: dict[str, np.ndarray]) -> None:
    """What every batch must come to."""
    try:
        logits = classifier.logits(arrays)
    except PromptfoldError as error:
        check_words(error)
    else:
        assert logits.shape == (len(arrays["input_ids"]), 2)
        assert np.isfinite(logits).all()


# Files


def read_or_refuse(content: bytes, name: str, folder: Path, **columns: str) -> None:
    """What every file must come to."""
    path = folder / name
    path.write_bytes(content)
    try:
        upload = read_upload(path, MRPC, **columns)
    except PromptfoldError as error:
        check_words(error)
        assert str(folder) not in str(error)
    else:
        assert isinstance(upload, Upload)
        assert len(upload.texts) == len(upload.rows)
        for row in upload.texts:
            for sentence in row:
                sentence.encode()


CSV = b"sentence1,sentence2,label,idx\nword1 word2,word2 word3,1,0\nword4,word5,0,1\n"
JSONL = b'{"sentence1": "word1", "sentence2": "word2", "label": 1}\n{"sentence1": "a", "sentence2": "b", "label": 0}\n'


def parquet_bytes() -> bytes:
    """A small file that can be read."""
    sink = io.BytesIO()
    columns = {"sentence1": ["word1", "word2"], "sentence2": ["word3", "word4"], "label": [0, 1]}
    parquet.write_table(pyarrow.table(columns), sink)
    return sink.getvalue()


WHOLE = {"rows.csv": CSV, "rows.jsonl": JSONL, "rows.parquet": parquet_bytes()}

bits = st.binary(max_size=12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("a visitors files")


@pytest.mark.parametrize("name", WHOLE)
def test_the_whole_files_can_be_read(name: str, folder: Path) -> None:
    path = folder / name
    path.write_bytes(WHOLE[name])
    assert len(read_upload(path, MRPC).rows) == 2


@pytest.mark.parametrize("name", WHOLE)
@trying
@given(content=st.binary(max_size=2000))
@example(content=b"")
@example(content=b"\0")
@example(content=b"\xef\xbb\xbf")
@example(content=b"PAR1")
@example(content=b"PAR1PAR1")
@example(content=b"PAR1" + b"\xff" * 8 + b"PAR1")
@example(content=b"sentence1,sentence2\n" + b'"' * 999)
@example(content=b'{"sentence1":' * 3000)
@example(content=b"[" * 100_000)
@example(content=b"," * MILLION)
@example(content=b"x" * MILLION)
@example(content=b"x" * (MAX_BYTES + 1))
@example(content=b'{"sentence1": "\\ud800", "sentence2": "b", "label": 0}')
@example(content=b'{"sentence1": "a", "sentence2": "b", "label": 1' + b"0" * 5000 + b"}")
@example(content=b'{"sentence1": "a", "sentence2": "b", "label": 1e999}')
@example(content=b'{"sentence1": "a", "sentence2": "b", "label": NaN}')
def test_any_bytes_are_read_or_refused(name: str, content: bytes, folder: Path) -> None:
    read_or_refuse(content, name, folder)


@pytest.mark.parametrize("name", WHOLE)
@trying
@given(where=st.floats(0, 1), cut=st.integers(0, 20), put=bits, times=st.integers(1, 40))
def test_a_whole_file_with_some_bytes_changed_is_read_or_refused(
    name: str, where: float, cut: int, put: bytes, times: int, folder: Path
) -> None:
    whole = WHOLE[name]
    at = int(where * len(whole))
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
@example(text_columns="sentence1,sentence2", label_column="label")
@example(text_columns="sentence1,sentence1", label_column="sentence1")
@example(text_columns="," * 5000, label_column="label")
def test_columns_of_any_name_are_found_or_refused(text_columns: str, label_column: str, folder: Path) -> None:
    try:
        read_or_refuse(CSV, "rows.csv", folder, text_columns=text_columns, label_column=label_column)
    except UnicodeEncodeError:
        pytest.fail("a name that is no valid Unicode is repeated")


# Over HTTP


@pytest.fixture(scope="module")
def page(adapter: Folders, bundle: Folders, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Without PyTorch, which would only take longer to say the same."""
    flags = ["--adapter", str(adapter("bert")), "--bundle", str(bundle("bert")), "--engine", "onnx"]
    with serve(flags, tmp_path_factory.mktemp("cache"), ON_CPU) as server:
        server.wait_for_url()
        yield server
        # What a visitor asks is no reason for the page to fall silent.
        server.wait_for_url()


@pytest.fixture(scope="module")
def visitor(page: Server) -> Iterator[httpx.Client]:
    # A read that takes longer is a hang.
    with httpx.Client(base_url=page.wait_for_url(), timeout=2 * HANG_SECONDS) as client:
        yield client


INSIDE = re.compile(
    rf"Traceback|File \"|line \d+, in |{re.escape(str(ROOT))}|site-packages|\.py\b|/tmp/|/root/|/home/|/usr/|[A-Z]\w+Error\b"
)
"""What a visitor has no business to see."""


def check_answer(answer: httpx.Response) -> None:
    """Any answer is one of the visitor's own fault or none, and shows nothing of the inside."""
    assert answer.status_code < 500, answer.text[:500]
    assert not INSIDE.search(answer.text), answer.text[:500]


def finish(visitor: httpx.Client, name: str, asked: httpx.Response) -> str:
    """What came of a request that was let into the queue; empty where it was refused."""
    check_answer(asked)
    if asked.status_code != 200:
        return ""
    event = asked.json()["event_id"]
    answer = visitor.get(f"{API}/call/{name}/{event}")
    check_answer(answer)
    assert re.search(r"^event: (complete|error)$", answer.text, re.MULTILINE)
    return answer.text


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(EVERY_CHARACTER, max_size=30)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.one_of(st.sampled_from(["path", "url", "meta", "_type", "data", "__type__"]), st.text(max_size=8)),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=12,
)
file_like = st.fixed_dictionaries(
    {"path": st.one_of(texts.map(lambda text: text[:300]), json_values)},
    optional={
        "meta": st.just({"_type": "gradio.FileData"}),
        "url": json_values,
        "is_stream": json_values,
        "size": json_values,
    },
)

ENDPOINTS = ("compare", "latency", "score_file", "prompt", "prompt_effect")

over_http = settings(trying, max_examples=25, deadline=None)


def body_of(value: Any) -> bytes:
    """As JSON, with lone surrogates and infinities as Python's decoder takes them."""
    return json.dumps(value).encode()


JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize("name", ENDPOINTS)
@over_http
@given(data=st.one_of(st.lists(st.one_of(json_values, file_like), max_size=7), json_values))
@example(data=[])
@example(data=[None] * 6)
@example(data=[{"path": None, "meta": {"_type": "gradio.FileData"}}] * 6)
@example(data=[{"meta": {"_type": "gradio.FileData"}}] * 6)
@example(data=["\ud800"] * 5)
@example(data=[float("nan")] * 5)
@example(data=[[10**400], [1], "", "", ""])
@example(data=[[1] * 1000, [8] * 1000, "", "", ""])
def test_any_parameters_of_an_endpoint_are_answered(name: str, data: Any, visitor: httpx.Client) -> None:
    finish(visitor, name, visitor.post(f"{API}/call/{name}", content=body_of({"data": data}), headers=JSON))


@settings(over_http, max_examples=5)  # each that is no nonsense is measured, for seconds
@given(first=texts, second=texts)
@example(first="\ud800", second="word1")
@example(first="x" * MILLION, second="word1")
@example(first=RIGHT_TO_LEFT, second=ZERO_WIDTH)
def test_any_pair_of_texts_is_compared_or_refused(first: str, second: str, visitor: httpx.Client) -> None:
    body = body_of({"data": [first, second, "", "", ""]})
    said = finish(visitor, "compare", visitor.post(f"{API}/call/compare", content=body, headers=JSON))
    if "event: error" in said:
        # In words: null would say nothing.
        assert re.search(r"(empty|characters|surrogate)", said), said
    else:
        assert '"label"' in said


routes = st.sampled_from(
    [
        *(f"{API}/call/{name}" for name in ENDPOINTS),
        *(f"{API}/call/v2/{name}" for name in ENDPOINTS),
        f"{API}/call/nothing",
        f"{API}/call/v2/nothing",
        f"{API}/run/predict",
        f"{API}/run/compare",
        f"{API}/api/stop",
        f"{API}/queue/join",
        f"{API}/cancel",
        f"{API}/reset",
        f"{API}/upload",
        f"{API}/mcp/",
        f"{API}/process_recording",
        f"{API}/component_server",
        "/login",
    ]
)
body_fields = st.fixed_dictionaries(
    {},
    optional={
        "data": st.one_of(st.lists(json_values, max_size=6), json_values),
        "fn_index": st.one_of(st.integers(-3, 60), json_values),
        "session_hash": st.one_of(st.text(max_size=9), json_values),
        "event_id": json_values,
        "event_data": json_values,
        "trigger_id": json_values,
        "batched": json_values,
        "simple_format": json_values,
    },
)
types = st.sampled_from(
    [
        "application/json",
        "text/plain",
        "multipart/form-data; boundary=x",
        "multipart/form-data",
        "application/x-www-form-urlencoded",
        "",
        "application/json; charset=utf-7",
    ]
)


@settings(over_http, max_examples=200)
@given(
    route=routes,
    content=st.one_of(body_fields.map(body_of), json_values.map(body_of), st.binary(max_size=200)),
    kind=types,
)
@example(route=f"{API}/upload", content=b"--x\r\n\r\n--x--", kind="multipart/form-data; boundary=x")
@example(route=f"{API}/upload", content=b"xx", kind="multipart/form-data; boundary=x")
@example(route=f"{API}/call/compare", content=b"[" * 50_000, kind="application/json")
@example(route=f"{API}/call/compare", content=b'{"data": [' + b"9" * 5000 + b"]}", kind="application/json")
@example(
    route=f"{API}/queue/join", content=b'{"data": [], "fn_index": 99999, "session_hash": "a"}', kind="application/json"
)
@example(route=f"{API}/call/compare", content=b" " * (MAX_BODY_BYTES + 1), kind="application/json")
def test_any_request_to_any_route_is_answered(route: str, content: bytes, kind: str, visitor: httpx.Client) -> None:
    answer = visitor.post(route, content=content, headers={"Content-Type": kind} if kind else {})
    assert answer.status_code < 500, (route, content[:200], answer.text[:300])
    if route != f"{API}/upload":  # which gives the place where the file lies, as a name for it
        assert not INSIDE.search(answer.text), (route, content[:200], answer.text[:300])


@settings(over_http, max_examples=100)
@given(
    parts=st.lists(
        st.sampled_from([*string.printable, "%00", "%ff", "..", "gradio_api", "file=", "call", "queue", "data", "mcp"]),
        max_size=12,
    ),
    start=st.sampled_from(
        ["/", f"{API}/", f"{API}/file=", f"{API}/call/", f"{API}/heartbeat", f"{API}/queue/", "/static/", "/?"]
    ),
)
def test_any_address_is_answered(parts: list[str], start: str, visitor: httpx.Client) -> None:
    path = start + "".join(re.sub(r"[^!-~]|[#?]", "", part) for part in parts)
    if path.startswith(f"{API}/heartbeat/"):
        return  # goes on for as long as the visitor stays
    answer = visitor.get(httpx.URL(visitor.base_url, raw_path=path.encode()))
    assert answer.status_code < 500, path
    if path[:2] != "/?" and path != "/":  # the page itself holds the code of its "Use it" tab
        assert "Traceback" not in answer.text


def test_whatever_schemathesis_makes_of_an_endpoint_is_answered(page: Server) -> None:
    schema = schemathesis.openapi.from_url(f"{page.wait_for_url().rstrip('/')}{API}/openapi.json")
    asked = set()
    for found in schema.get_all_operations():
        assert isinstance(found, Ok), found
        operation = found.ok()

        # Its own pytest plugin uses a name that pytest 9 no longer has.
        @settings(over_http)
        @given(case=operation.as_strategy(generation_mode=GenerationMode.POSITIVE))
        def ask(case: schemathesis.Case) -> None:
            answer = case.call(timeout=2 * HANG_SECONDS)
            assert answer.status_code < 500, answer.text[:500]
            if not case.operation.path.endswith(
                "/upload"
            ):  # which gives the place where the file lies, as a name for it
                assert not INSIDE.search(answer.text), answer.text[:500]

        ask()
        asked.add(operation.path.rpartition("/")[2])
    assert asked >= {*ENDPOINTS, "upload"}


def test_after_all_that_the_page_answers(page: Server, visitor: httpx.Client) -> None:
    """Last of those over HTTP."""
    body = {"data": ["word1 word2", "word2 word1", "", "", ""]}
    assert '"label"' in finish(visitor, "compare", visitor.post(f"{API}/call/compare", json=body))
    assert len(page.children()) == 1, "the engine that was there from the start"
