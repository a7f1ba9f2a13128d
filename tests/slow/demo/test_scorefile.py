"""The endpoint ``/score_file`` over HTTP and the tab "Score a file" in a browser, on a page of ``python -m demo``."""

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from playwright.sync_api import Page, expect, sync_playwright

from demo.engines.adapters import choose_adapters
from demo.engines.pytorch import COMPILED
from demo.engines.stage import Setup, Stage
from demo.measure.label_file import BATCH_ROWS, _batch_rows
from demo.measure.upload import MAX_ROWS
from tests.conftest import ON_CPU, ROOT, Folders
from tests.demo.server import serve
from tests.demo.test_scorefile import check_answers, files_in
from tests.export.test_score import read_rows, shuffled_pairs, write_rows

KINDS = ("bert", "gpt2")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where Gradio keeps what visitors bring and take."""
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def url(adapter: Folders, bundle: Folders, served: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a page with the tiny encoder and the tiny decoder."""
    flags = ["--adapter", *(str(adapter(kind)) for kind in KINDS), "--bundle", *(str(bundle(kind)) for kind in KINDS)]
    with serve(flags, tmp_path_factory.mktemp("cache"), ON_CPU | {"GRADIO_TEMP_DIR": str(served)}) as server:
        yield server.wait_for_url()
        # Gradio prints what it refuses; nothing of ours may be on the way there.
        assert str(ROOT / "demo") not in server.output, server.output


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[Client]:
    """A visitor's program."""
    client = Client(url, verbose=False)
    yield client
    client.close()


def score(client: Client, path: Path, **named: str) -> tuple[dict[str, Any], Path]:
    """What the endpoint answers to a file."""
    summary, labelled = client.predict(handle_file(str(path)), **named, api_name="/score_file")
    return summary, Path(labelled)


@pytest.mark.parametrize("kind", KINDS)
def test_the_endpoint_answers_as_peft_does(
    kind: str, client: Client, served: Path, adapter: Folders, base_model: Folders, tmp_path: Path
) -> None:
    before = files_in(served)
    check_answers(kind, lambda path, **named: score(client, path, **named), adapter(kind), base_model(kind), tmp_path)
    assert files_in(served) == sorted([*before, "a file-labelled.jsonl"])  # the upload is gone


def test_a_decoder_and_torch_compile_get_one_text_at_a_time_and_encoders_batches(
    adapter: Folders, bundle: Folders
) -> None:
    stage = Stage(choose_adapters(list(map(adapter, KINDS))), bundles=list(map(bundle, KINDS)), threads=1)
    try:
        for kind, rows in (("gpt2", 1), ("bert", BATCH_ROWS)):
            opened = stage.open(Setup(kind))
            assert _batch_rows(opened, "pytorch") == rows
            assert _batch_rows(opened, "onnx") == BATCH_ROWS
            compiled = replace(opened, setup=replace(opened.setup, pytorch=COMPILED))
            assert _batch_rows(compiled, "pytorch") == 1
    finally:
        stage.close()


@pytest.mark.parametrize(
    ("rest", "words"),
    [
        ({}, r"^in\.csv, row 1 \(line 2\): column 'sentence2' holds no text"),
        ({"adapter": "none"}, "There is no adapter 'none' here"),
        ({"adapter": "gpt2", "precision": "int4"}, "There is no precision 'int4' here"),
        ({"text_columns": "a"}, "1 text columns are named"),
    ],
)
def test_the_endpoint_refuses_in_the_same_words(
    rest: dict[str, str], words: str, client: Client, tmp_path: Path
) -> None:
    (tmp_path / "in.csv").write_text("sentence1,sentence2\na,\n")
    with pytest.raises(AppError, match=words):
        score(client, tmp_path / "in.csv", **rest)


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def visit(url: str) -> Iterator[Page]:
    """The page on a phone."""
    with sync_playwright() as playwright:
        # Chromium's sandbox does not start for root, as whom containers run.
        flags = ["--disable-background-networking", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        page = browser.new_page()
        page.set_default_timeout(180_000)
        page.goto(url)
        page.get_by_role("tab", name="Score a file").click()
        page.set_viewport_size({"width": 360, "height": 740})
        # A file that comes before Gradio has bound its components, as only a program can bring it, is lost.
        page.get_by_role("button", name="Label the file").click()
        expect(page.get_by_role("alert")).to_contain_text("No file was given")
        yield page
        browser.close()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_visitor_on_a_phone_labels_a_file_and_cancels_another(visit: Page, served: Path, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "pairs.csv", shuffled_pairs(30, seed=17))
    long = write_rows(tmp_path / "long.jsonl", shuffled_pairs(MAX_ROWS, seed=18))
    before = files_in(served)
    start, cancel = (visit.get_by_role("button", name=name, exact=True) for name in ("Label the file", "Cancel"))
    take = visit.get_by_role("button", name="Download the labelled file")
    status = visit.locator("[role=status]:visible")
    expect(take).to_be_disabled()

    def choose(file: Path) -> None:
        visit.locator("#score-file input[type=file]").set_input_files(file)
        expect(visit.locator("#score-file")).to_contain_text(file.stem)

    choose(source)
    start.click()
    expect(status).to_have_text("Done: 30 rows of pairs.csv labelled.")
    expect(visit.locator("#score-results")).to_contain_text("Both engines give the same label to each of the 30")
    expect(visit.locator("#score-file")).not_to_contain_text("pairs")
    with visit.expect_download() as download:
        take.click()
    assert download.value.suggested_filename == "pairs-labelled.csv"
    assert len(read_rows(download.value.path())) == 30
    expect(start).to_be_enabled()
    assert visit.evaluate("document.documentElement.scrollWidth") <= 360
    assert files_in(served) == sorted([*before, "pairs-labelled.csv"])

    visit.get_by_label("Adapter").click()
    visit.get_by_role("option", name="gpt2").click()
    choose(long)
    start.click()
    expect(status).to_contain_text(re.compile("PyTorch: [0-9,]+ of 2,000 rows labelled"))
    cancel.click()
    expect(status).to_have_text("Cancelled. Nothing was kept.")
    expect(start).to_be_enabled()
    expect(cancel).to_be_disabled()
    expect(visit.locator("#score-results")).not_to_contain_text("rows")
    assert files_in(served) == sorted([*before, "pairs-labelled.csv"])

    # The queue is free again, and what was cancelled says nothing more.
    choose(source)
    start.click()
    expect(status).to_have_text("Done: 30 rows of pairs.csv labelled.")
