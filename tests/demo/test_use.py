"""The tab "Use it": addresses and code to copy, quoted whatever they hold; the path behind a proxy; the QR code."""

import base64
import json
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from xml.etree import ElementTree

import gradio as gr
import pytest
from starlette.requests import Request

from demo.access.public_link import SAFE_URL, parse_root_path, qr_svg
from demo.page.tab_use import EXAMPLE, endpoint_table, pipeline_snippet, snippets, visitor_url
from tests.demo.page_client import run_python
from train.common.errors import UsageError

HOSTILE = (
    *('x";import os;os.system("id")#', "x$(id)", "x`id`", "x';id;'", "x\\", "x y", "user@evil.example", "x/../..;id"),
    *("x:99999999", "[::1", ""),
)


@pytest.mark.parametrize("header", ["host", "x-forwarded-host"])
def test_a_hostile_host_is_replaced_by_the_pages_own_address(header: str) -> None:
    page = cast(gr.Blocks, SimpleNamespace(share_url=None, local_url="http://127.0.0.1:7860/", root_path=""))

    def address(value: str) -> str:
        headers = [*([(b"host", b"honest:7860")] if header != "host" else []), (header.encode(), value.encode())]
        scope = {"type": "http", "method": "POST", "scheme": "http", "path": "/gradio_api/run/predict"}
        return visitor_url(
            page, Request(scope | {"query_string": b"", "headers": headers, "server": ("127.0.0.1", 7860)})
        )

    assert address("honest.example:81") == "http://honest.example:81"
    for value in HOSTILE:
        assert address(value) in ("http://127.0.0.1:7860", "http://honest:7860"), value
    # Every address in a snippet is of harmless characters.
    for url in ("http://127.0.0.1:7860", "https://a-b.gradio.live", "http://[::1]:7860/prompt_fold/x"):
        assert SAFE_URL.fullmatch(url)
    for url in (*(f"http://{host}" for host in HOSTILE), "javascript:alert(1)", "http://a/b\n"):
        assert not SAFE_URL.fullmatch(url)


def test_values_are_quoted_in_every_language(tmp_path: Path) -> None:
    nasty = 'it\'s "$(touch x)" `id` \\ \n é'
    values = {"sentence1": nasty, "flag": True}
    python, javascript, curl = snippets("http://127.0.0.1:1", "/compare", values, asks_password=False)
    found = re.search(r"predict\(\n    sentence1=(.*),\n    flag=True,", python)
    assert found
    assert run_python(f"import base64; print(base64.b64encode({found[1]}.encode()).decode())").strip() == (
        base64.b64encode(nasty.encode()).decode()
    )
    found = re.search(r'page\.predict\("/compare", (\{.*?\})\);', javascript, flags=re.DOTALL)
    assert found
    assert json.loads(found[1]) == values
    command = curl.replace("curl --silent", "printf %s").partition("--data ")[2].partition(" \\\n  | sed")[0]
    shell = subprocess.run(  # noqa: S602 -- the quoting is what is tested
        f"printf %s {command}", shell=True, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert json.loads(shell.stdout) == values
    assert list(tmp_path.iterdir()) == []


def test_the_pipeline_code_is_python_and_names_the_bundle_and_markup_in_the_table_is_text() -> None:
    compile(code := pipeline_snippet("minilm-mrpc-v2 (2)", EXAMPLE), "snippet", "exec")
    assert "bundle = 'bundles/minilm-mrpc-v2 (2)'" in code
    assert "--out 'bundles/minilm-mrpc-v2 (2)'" in code
    assert "text_pair" not in pipeline_snippet("one", {"sentence1": "A sentence."})
    assert ", top_k=None))" in pipeline_snippet("one", {"sentence1": "A sentence."}, all_labels=True)
    endpoint: Any = {"parameters": [], "returns": [], "api_visibility": "public", "description": "<script>x</script>"}
    assert "<script>" not in endpoint_table({"/compare": endpoint})


def test_a_root_path_is_a_path_or_an_address_or_refused() -> None:
    roots = ("/promptfold", "/a/b_c-1/", "/", "https://demo.example:8443/x/")
    assert parse_root_path(None) is None
    assert [parse_root_path(root) for root in roots] == [root.rstrip("/") for root in roots]
    for text in ("promptfold", "//evil", "/a b", "/$(id)", "/a?b", "ftp://a/b", "https://", "https:///x"):
        with pytest.raises(UsageError, match=r"^--root-path .* write a path such as /promptfold"):
            parse_root_path(text)


def test_the_qr_code_is_one_picture_with_a_name_and_a_quiet_zone() -> None:
    svg = ElementTree.fromstring(qr_svg('https://a.example/?a=1&b="<x>'))  # noqa: S314 -- our own
    assert svg.attrib["role"] == "img"
    assert svg.attrib["aria-label"] == 'QR code of https://a.example/?a=1&b="<x>'
    background, modules = list(svg.iter("path"))
    assert background.attrib["fill"] == "#fff"
    assert modules.attrib["stroke"] == "#000"
    assert modules.attrib["d"].startswith("M4 4.5")  # four modules from the edge
