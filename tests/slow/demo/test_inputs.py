"""Bad requests, made by Hypothesis: a page answers each, or refuses it in words; none hangs or shows the page's inside."""

import json
import re
import string
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.core.result import Ok

from demo.access.gate import API, MAX_BODY_BYTES
from tests.conftest import ON_CPU, ROOT
from tests.demo.server import Server, serve
from tests.demo.test_inputs import EVERY_CHARACTER, MILLION, examples, texts, trying

ENDPOINTS = ("compare", "latency", "score_file", "prompt", "prompt_effect")
INSIDE = re.compile(
    rf"Traceback|File \"|line \d+, in |{re.escape(str(ROOT))}|site-packages|\.py\b|/tmp/|/root/|/home/|/usr/|[A-Z]\w+Error\b"
)

over_http = settings(trying, max_examples=25)


@pytest.fixture(scope="module")
def page(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Without PyTorch, which would only take longer to say the same."""
    with serve([*flags, "--engine", "onnx"], tmp_path_factory.mktemp("cache"), ON_CPU) as server:
        yield server


@pytest.fixture(scope="module")
def visitor(page: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=page.wait_for_url(), timeout=60) as client:
        yield client


def check_answer(answer: httpx.Response) -> None:
    """No answer is the page's own fault, or shows its inside."""
    assert answer.status_code < 500, answer.text[:500]
    assert not INSIDE.search(answer.text), answer.text[:500]


def call(visitor: httpx.Client, name: str, data: Any) -> str:
    """What an endpoint says to parameters; empty where they were refused before the queue."""
    # As JSON, with lone surrogates and infinities as Python's decoder takes them.
    content, headers = json.dumps({"data": data}).encode(), {"Content-Type": "application/json"}
    asked = visitor.post(f"{API}/call/{name}", content=content, headers=headers)
    check_answer(asked)
    if asked.status_code != 200:
        return ""
    answer = visitor.get(f"{API}/call/{name}/{asked.json()['event_id']}")
    check_answer(answer)
    assert re.search(r"^event: (complete|error)$", answer.text, re.MULTILINE)
    return answer.text


FILE: dict[str, Any] = {"meta": {"_type": "gradio.FileData"}}
json_keys = st.one_of(st.sampled_from(["path", "url", "meta", "_type", "data", "__type__"]), st.text(max_size=8))
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(EVERY_CHARACTER, max_size=30)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(json_keys, inner, max_size=4)),
    max_leaves=12,
)
file_like = st.fixed_dictionaries(
    {"path": st.one_of(texts.map(lambda text: text[:300]), json_values)},
    optional={"meta": st.just(FILE["meta"])} | dict.fromkeys(("url", "is_stream", "size"), json_values),
)


@pytest.mark.parametrize("name", ENDPOINTS)
@over_http
@given(data=st.one_of(st.lists(st.one_of(json_values, file_like), max_size=7), json_values))
@examples(
    "data",
    *([], [None] * 6, ["\ud800"] * 5, [float("nan")] * 5, [[10**400], [1], "", "", ""]),
    *([FILE | {"path": None}] * 6, [FILE] * 6, [[1] * 1000, [8] * 1000, "", "", ""], ["x" * MILLION] * 2),
)
def test_any_parameters_of_an_endpoint_are_answered(name: str, data: Any, visitor: httpx.Client) -> None:
    call(visitor, name, data)


ROUTES = (
    *(f"{call}/{name}" for call in ("call", "call/v2") for name in (*ENDPOINTS, "nothing")),
    *("run/predict", "run/compare", "api/stop", "queue/join", "cancel", "reset", "upload", "mcp/"),
    *("process_recording", "component_server"),
)
FIELDS = ("event_id", "event_data", "trigger_id", "batched", "simple_format")
bodies = st.fixed_dictionaries(
    {},
    optional={
        "data": st.one_of(st.lists(json_values, max_size=6), json_values),
        "fn_index": st.one_of(st.integers(-3, 60), json_values),
        "session_hash": st.one_of(st.text(max_size=9), json_values),
    }
    | dict.fromkeys(FIELDS, json_values),
)
JSON, FORM = "application/json", "multipart/form-data; boundary=x"
KINDS = (
    JSON,
    FORM,
    "text/plain",
    "multipart/form-data",
    "application/x-www-form-urlencoded",
    "",
    f"{JSON}; charset=utf-7",
)


@settings(over_http, max_examples=200)
@given(
    route=st.sampled_from([*(f"{API}/{route}" for route in ROUTES), "/login"]),
    content=st.one_of(
        st.one_of(bodies, json_values).map(lambda value: json.dumps(value).encode()), st.binary(max_size=200)
    ),
    kind=st.sampled_from(KINDS),
)
@examples(
    "route,content,kind",
    *((f"{API}/upload", content, FORM) for content in (b"--x\r\n\r\n--x--", b"xx")),
    *((f"{API}/call/compare", content, JSON) for content in (b"[" * 50_000, b'{"data": [' + b"9" * 5000 + b"]}")),
    (f"{API}/queue/join", b'{"data": [], "fn_index": 99999, "session_hash": "a"}', JSON),
    (f"{API}/call/compare", b" " * (MAX_BODY_BYTES + 1), JSON),
)
def test_any_request_to_any_route_is_answered(route: str, content: bytes, kind: str, visitor: httpx.Client) -> None:
    answer = visitor.post(route, content=content, headers={"Content-Type": kind} if kind else {})
    assert answer.status_code < 500, (route, content[:200], answer.text[:300])
    if route != f"{API}/upload":  # which names an uploaded file by its path
        assert not INSIDE.search(answer.text), (route, content[:200], answer.text[:300])


@settings(over_http, max_examples=100)
@given(
    start=st.sampled_from(
        ["/", "/static/", "/?", *(f"{API}/{path}" for path in ("", "file=", "call/", "heartbeat", "queue/"))]
    ),
    parts=st.lists(
        st.sampled_from([*string.printable, "%00", "%ff", "..", "gradio_api", "file=", "call", "queue", "data", "mcp"]),
        max_size=12,
    ),
)
def test_any_address_is_answered(start: str, parts: list[str], visitor: httpx.Client) -> None:
    path = start + "".join(re.sub(r"[^!-~]|[#?]", "", part) for part in parts)
    if path.startswith(f"{API}/heartbeat/"):
        return  # goes on for as long as the visitor stays
    answer = visitor.get(httpx.URL(visitor.base_url, raw_path=path.encode()))
    assert answer.status_code < 500, path
    if path[:2] != "/?" and path != "/":  # the page itself holds the code of its "Use it" tab
        assert "Traceback" not in answer.text


def test_what_schemathesis_makes_of_each_endpoint_is_answered(page: Server) -> None:
    schema = schemathesis.openapi.from_url(f"{page.url}{API}/openapi.json")
    asked = set()
    for found in schema.get_all_operations():
        assert isinstance(found, Ok), found
        operation = found.ok()

        # Its own pytest plugin uses a name that pytest 9 no longer has.
        @over_http
        @given(case=operation.as_strategy(generation_mode=GenerationMode.POSITIVE))
        def ask(case: schemathesis.Case) -> None:
            answer = case.call(timeout=60)
            assert answer.status_code < 500, answer.text[:500]
            if not case.operation.path.endswith("/upload"):  # which names an uploaded file by its path
                assert not INSIDE.search(answer.text), answer.text[:500]

        ask()
        asked.add(operation.path.rpartition("/")[2])
    assert asked >= {*ENDPOINTS, "upload"}


def test_after_all_that_the_page_answers(page: Server, visitor: httpx.Client) -> None:
    """The last test of this file."""
    assert '"label"' in call(visitor, "compare", ["word1 word2", "word2 word1", "", "", ""])
    assert len(page.children()) == 1, "the engine that was there from the start"
