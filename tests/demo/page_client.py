"""Programs that use a page: what its events on load show, the code to copy, an MCP client, raw HTTP."""

import json
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx

from demo.access.gate import API
from tests.conftest import ROOT


def values_on_load(
    url: str, headers: dict[str, str] | None = None, cookies: httpx.Cookies | None = None
) -> dict[str, Any]:
    """What the page's events on load put into its components, by `elem_id`, as a browser gets it."""
    with httpx.Client(base_url=url, headers=headers, cookies=cookies, timeout=60) as browser:
        config = browser.get("/config").raise_for_status().json()
        names = {component["id"]: component["props"].get("elem_id") for component in config["components"]}
        shown: dict[str, Any] = {}
        for event in config["dependencies"]:
            if any(trigger == "load" for _, trigger in event["targets"]):
                body = {"data": [], "fn_index": event["id"], "session_hash": "test"}
                answer = browser.post(f"{API}/run/predict", json=body).raise_for_status().json()["data"]
                for component, value in zip(event["outputs"], answer, strict=True):
                    given = value.get("value") if isinstance(value, dict) else value
                    shown[names[component] or str(component)] = given
    return shown


def run_python(code: str, folder: Path = ROOT) -> str:
    command = [sys.executable, "-W", "error::DeprecationWarning:__main__", "-c", code]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, timeout=120).stdout


def run_shell(code: str, folder: Path) -> list[Any]:
    """The data of the event that a shell snippet receives at last."""
    command = ["bash", "-euc", code]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, timeout=120)
    found = re.search(r"^event: complete\ndata: (.*)$", result.stdout, flags=re.MULTILINE)
    assert found, result.stdout
    data = json.loads(found[1])
    assert isinstance(data, list)
    return data


def check_answer(answer: dict[str, Any]) -> None:
    assert answer["pytorch"]["label"] == answer["onnx"]["label"]
    assert set(answer["onnx"]["probabilities"]) == {"equivalent", "not_equivalent"}


async def call_mcp(url: str, *sentences: str) -> tuple[list[str], str]:
    """The tools of an MCP server, and what "compare" answers."""
    from mcp import ClientSession
    from mcp.client.streamable_http import streamable_http_client
    from mcp.types import TextContent

    async with streamable_http_client(url) as (read, write, _), ClientSession(read, write) as session:
        await session.initialize()
        tools = (await session.list_tools()).tools
        result = await session.call_tool("compare", {"sentence1": sentences[0], "sentence2": sentences[1]})
        assert not result.isError
        (content,) = result.content
        assert isinstance(content, TextContent)
        return [tool.name for tool in tools], content.text


def request_raw(url: str, target: str, *, method: str = "GET", headers: dict[str, str] | None = None) -> bytes:
    """The whole answer to a request whose target is sent as it is; an HTTP client would normalize its dots."""
    host, port = url.removeprefix("http://").split(":")
    lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in (headers or {}).items())]
    if "Host" not in (headers or {}):
        lines.append(f"Host: {host}:{port}")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(("\r\n".join([*lines, "Connection: close", "", ""])).encode())
        answer = b""
        while part := connection.recv(65536):
            answer += part
    return answer


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def call(client: httpx.Client, name: str, data: list[Any]) -> str:
    """Everything that an endpoint says to raw parameters, in the order of its events."""
    answer = client.post(f"{API}/call/{name}", json={"data": data})
    if answer.status_code != 200:
        return answer.text
    return client.get(f"{API}/call/{name}/{answer.json()['event_id']}").text
