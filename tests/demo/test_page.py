"""The page as visitors and their programs see it: one walk through all tabs, every endpoint, the code to copy."""

import ast
import asyncio
import csv
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import closing
from email.message import Message
from pathlib import Path

import httpx
import numpy as np
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from playwright.sync_api import Page, expect

from tests.conftest import Folders, make_pairs, write_jsonl
from tests.demo.browser import (
    choose_cells,
    compare,
    download,
    label_file,
    needs_chromium,
    open_tab,
    press,
    start_browser,
    visit_page,
)
from tests.demo.engines import PAIR, golden_probabilities
from tests.demo.page_client import call_mcp, check_answer, run_python, run_shell, values_on_load
from tests.demo.server import Server, connect


@pytest.fixture(autouse=True)
def no_traceback(running_page: Server) -> Iterator[None]:
    """Requests of visitors who follow the page's rules never fail."""
    before = len(running_page.lines)
    yield
    assert not [line for line in running_page.lines[before:] if "Traceback" in line]


@pytest.fixture
def client(running_page: Server) -> Iterator[Client]:
    with connect(running_page.url) as client:
        yield client


def check_compare(page: Page) -> None:
    for engine in ("pytorch", "onnx"):
        expect(page.locator(f"#{engine}-facts")).to_contain_text(re.compile(r"Runs on\s*\S+"))
    expect(page.locator("#model")).to_contain_text(re.compile(r"P-Tuning, 5 virtual tokens\s*Task\s*mrpc"))
    expect(page.locator("#quality")).to_contain_text("On 40 validation rows: accuracy")
    press(page, "Library hours")
    expect(page.get_by_label("Sentence 2").first).to_have_value(re.compile("^During exam weeks"))
    page.get_by_label("Sentence 1").first.fill(PAIR[0])
    page.get_by_label("Sentence 2").first.fill(" ")
    press(page, "Compare")
    expect(page.get_by_text("Sentence 2 is empty. Write a sentence.")).to_be_visible()
    page.get_by_label("Sentence 2").first.fill(PAIR[1])
    compare(page)
    expect(page.locator("#speedup .figure")).to_have_text(re.compile(r"^\d+\.\d\d×$"))
    expect(page.locator("#speedup")).to_contain_text("both give the same label")
    expect(page.locator("#distribution").get_by_role("img")).to_be_visible()
    for engine in ("pytorch", "onnx"):
        expect(page.locator(f"#{engine}-answer").get_by_role("heading")).to_have_text(re.compile("equivalent"))
        expect(page.locator(f"#{engine}-facts")).to_contain_text(re.compile(r"\d+\.\d\d ms median"))


@needs_chromium
def test_a_visitor_walks_through_all_tabs(running_page: Server, tmp_path: Path) -> None:
    with start_browser() as browser, visit_page(browser, f"{running_page.url}/") as page:
        check_compare(page)
        open_tab(page, "Latency lab")
        choose_cells(page, {"1"}, {"16"})
        press(page, "Measure")
        expect(page.locator("#lab-table tbody tr", has_text="×")).to_have_count(1)
        expect(page.locator("#lab-charts").get_by_role("img").first).to_be_visible()
        (row,) = csv.DictReader(download(page, "Download CSV", tmp_path).read_text(encoding="utf-8").splitlines())
        assert (row["batch_size"], row["tokens"]) == ("1", "16")
        assert float(row["pytorch_median_ms"]) > 0
        assert float(row["onnx_median_ms"]) > 0
        assert download(page, re.compile("PNG"), tmp_path).read_bytes().startswith(b"\x89PNG")
        open_tab(page, "Score a file")
        pairs = make_pairs(8, seed=5)
        label_file(page, write_jsonl(tmp_path / "pairs.jsonl", pairs))
        expect(page.locator("#score-results")).to_contain_text(
            "Both engines give the same label to each of the 8 rows."
        )
        expect(page.locator("#score-results")).to_contain_text("Confusion matrix, ONNX Runtime")
        lines = download(page, "Download the labelled file", tmp_path).read_text(encoding="utf-8").splitlines()
        labelled = [json.loads(line) for line in lines]
        assert [row["sentence1"] for row in labelled] == [row["sentence1"] for row in pairs]
        assert {row["prediction_onnx"] for row in labelled} <= {"equivalent", "not_equivalent"}
        open_tab(page, "The prompt")
        expect(page.locator("#prompt-learned").get_by_role("img").first).to_be_visible()
        expect(page.locator("#prompt-about")).to_contain_text("kept: epoch")
        press(page, "Classify with and without the prompt")
        expect(page.locator("#prompt-effect")).to_contain_text(re.compile("With the learned prompt the label is"))
        open_tab(page, "Use it")
        expect(page.locator("#use-python")).to_contain_text(f'Client("{running_page.url}/")')


def test_compare_answers_each_visitor_as_peft_does(client: Client, adapter: Folders, base_model: Folders) -> None:
    """Two visitors at once: each gets the answer to its own pair."""
    pairs = [PAIR, *((str(row["sentence1"]), str(row["sentence2"])) for row in make_pairs(1, seed=6))]
    jobs = [client.submit(*pair, api_name="/compare") for pair in pairs]
    for pair, job in zip(pairs, jobs, strict=True):
        result = job.result(timeout=120)
        expected = golden_probabilities(pair, adapter("bert"), base_model("bert"))
        keys = {"adapter", "precision", "pytorch_mode", "pytorch", "onnx", "max_logit_difference", "speedup"}
        assert set(result) - {"notices"} == keys | {"speedup_range", "runs", "tokens"}
        for engine in ("pytorch", "onnx"):
            assert set(result[engine]) == {"label", "probabilities", "latency_ms"}
            assert set(result[engine]["latency_ms"]) == {"median", "p95", "p99"}
            assert list(result[engine]["probabilities"].values()) == pytest.approx(expected, abs=1e-5)
    for bad, words in ((("", "x"), "Sentence 1 is empty"), (("x" * 100_000, "y"), "100,000 characters")):
        with pytest.raises(AppError, match=words):
            client.predict(*bad, api_name="/compare")


@pytest.mark.parametrize(
    "name",
    [
        "hash #1.jsonl",
        "50% off.jsonl",
        "a?b&c=d;e.jsonl",
        'it\'s "x" [1].jsonl',
        "данные 你好.jsonl",
        "a%23b%2Fc.jsonl",
        "x" * 194 + ".jsonl",
    ],
)
def test_a_file_of_any_name_comes_back(running_page: Server, name: str) -> None:
    """Upload, label, download, as a browser does it."""
    rows = "".join(f"{json.dumps(row)}\n" for row in make_pairs(2, seed=8)).encode()
    client = Client(running_page.url, verbose=False, download_files=False)
    with closing(client), httpx.Client(base_url=running_page.url, timeout=120) as visitor:
        sent = visitor.post("/gradio_api/upload", files={"files": (name, rows)})
        file = {"path": sent.json()[0], "orig_name": name, "meta": {"_type": "gradio.FileData"}}
        _, labelled = client.predict(file, *[""] * 5, api_name="/score_file")
        got = visitor.get(labelled["url"])
    assert got.status_code == 200
    assert got.text.count("prediction_onnx") == 2
    assert len(got.text.splitlines()) == 2
    header = Message()
    header["Content-Disposition"] = got.headers["Content-Disposition"]
    kept = Path(sent.json()[0]).stem  # Gradio takes out what no file system allows
    assert header.get_filename() == f"{kept}-labelled.jsonl"


def test_every_other_endpoint_answers(client: Client, adapter: Folders, base_model: Folders, tmp_path: Path) -> None:
    endpoints = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert list(endpoints) == ["/compare", "/latency", "/score_file", "/prompt", "/prompt_effect"]
    (cell,) = client.predict([1], [8], api_name="/latency")["cells"]
    assert (cell["batch_size"], cell["tokens"]) == (1, 8)
    rows = write_jsonl(tmp_path / "rows.jsonl", make_pairs(4, seed=7))
    summary, labelled = client.predict(handle_file(rows), *[""] * 5, api_name="/score_file")
    assert summary["rows"] == 4
    assert Path(labelled).read_text(encoding="utf-8").count("prediction_onnx") == 4
    assert len(client.predict(api_name="/prompt")["nearest_words"]) == 5
    effect = client.predict(*PAIR, api_name="/prompt_effect")["learned"]["probabilities"]
    expected = golden_probabilities(PAIR, adapter("bert"), base_model("bert"))
    assert np.allclose(list(effect.values()), expected, atol=1e-5)


def test_the_code_to_copy_runs_and_has_the_visitors_address(running_page: Server, tmp_path: Path) -> None:
    shown = values_on_load(running_page.url)
    check_answer(ast.literal_eval(run_python(shown["use-python"]).splitlines()[-1]))
    if shutil.which("curl"):
        check_answer(run_shell(shown["use-curl"], tmp_path)[0])
    (configured,) = json.loads(shown["use-mcp"])["mcpServers"].values()
    tools, answer = asyncio.run(call_mcp(configured["url"], *PAIR))
    assert tools == ["compare", "latency", "score_file", "prompt", "prompt_effect"]
    assert "max_logit_difference" in answer
    assert shown["endpoints"].count("<tr>") == 6  # the head, and each endpoint
    port = running_page.url.rpartition(":")[2]
    assert f'Client("http://localhost:{port}/")' in values_on_load(f"http://localhost:{port}")["use-python"]
    elsewhere = values_on_load(running_page.url, {"X-Forwarded-Host": "demo.example", "X-Forwarded-Proto": "https"})
    assert 'Client("https://demo.example/")' in elsewhere["use-python"]
    assert "https://demo.example/" in elsewhere["use-mcp"]
    parameters = "sentence1: str, sentence2: str = &#39;&#39;, adapter: str = &#39;&#39;"
    assert f"<code>/compare</code></th><td><code>{parameters}" in shown["endpoints"]
    assert shown["share-note"] == "Local page. Start with <code>--share</code> for a public link."
    assert not (shown["share-link"] or shown["share-qr"])
