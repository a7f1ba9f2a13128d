"""The page as a visitor sees it: a real browser types, clicks and reads."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from demo.shipped import SHIPPED
from tests.server import serve
from tests.test_demo import MOODS, make_mood_adapter

REDWOODS = (
    "Coast redwood trees are the tallest trees on the planet and can grow over 300 feet tall.",
    "The coast redwood trees, which can attain a height of over 300 feet, are the tallest trees on earth.",
)

TIMEOUT_MS = 60_000


def find_chromium() -> str | None:
    """Any installed Chromium, or Playwright's own."""
    for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"):
        if path := shutil.which(name):
            return path
    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
    return own if Path(own).exists() else None


CHROMIUM = find_chromium()

pytestmark = pytest.mark.skipif(
    CHROMIUM is None,
    reason="no Chromium on this machine; install one with: python -m playwright install chromium "
    "(or: apt-get install chromium)",
)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The page as ``python -m demo`` without flags serves it: minilm and the best adapter that ships."""
    with serve([], tmp_path_factory.mktemp("cache")) as server:
        yield server.wait_for_url()
        assert "Traceback" not in server.output


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # Chromium's sandbox does not start for root, as whom containers run.
        flags = ["--disable-background-networking", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield chromium
        chromium.close()


@contextmanager
def visit_page(browser: Browser, url: str) -> Iterator[Page]:
    """A fresh visit that has to come along with what the page's own server gives."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    visit = context.new_page()
    foreign: list[str] = []
    visit.on("request", lambda request: None if request.url.startswith((url, "data:")) else foreign.append(request.url))
    # A text that is typed before Gradio has bound its boxes, as only a program can, is lost.
    visit.goto(url, wait_until="networkidle")
    yield visit
    context.close()
    assert foreign == []


@pytest.fixture
def page(browser: Browser, url: str) -> Iterator[Page]:
    with visit_page(browser, url) as visit:
        yield visit


def test_a_visitor_types_the_redwood_pair_and_sees_both_answers(page: Page, request: pytest.FixtureRequest) -> None:
    page.get_by_label("Sentence 1").fill(REDWOODS[0])
    page.get_by_label("Sentence 2").fill(REDWOODS[1])
    page.get_by_role("button", name="Compare").click()
    speedup = page.locator("#speedup")
    expect(speedup.locator(".figure")).to_have_text(re.compile(r"^\d+\.\d\d×$"), timeout=TIMEOUT_MS)
    expect(speedup).to_contain_text("both give the same label")
    expect(speedup).to_contain_text(re.compile(r"largest logit difference \d\.\de-\d\d"))
    for engine in ("pytorch", "onnx"):
        answer = page.locator(f"#{engine}-answer")
        expect(answer.get_by_role("heading")).to_have_text("equivalent")
        shares = [int(share) for share in re.findall(r"(\d+)%", answer.inner_text())]
        assert len(shares) == 2  # both classes are shown
        assert sum(shares) in {99, 100, 101}  # each is rounded
        facts = page.locator(f"#{engine}-facts")
        expect(facts).to_contain_text(re.compile(r"\d+\.\d\d ms median\s*\d+\.\d\d ms p95 of \d+ runs"))
        expect(facts).to_contain_text(re.compile(r"Threads\s*\d+ thread"))
        expect(facts).to_contain_text(re.compile(r"Precision\s*fp32"))
    expect(page.locator("#onnx-facts")).to_contain_text(re.compile(r"(CPU|CUDA)ExecutionProvider"))
    if picture := request.config.getoption("--screenshot"):
        page.wait_for_timeout(1000)  # the bars grow
        page.screenshot(path=picture, full_page=True)


def test_an_example_fills_both_sentences(page: Page) -> None:
    page.get_by_role("button", name="Coast redwoods").click()
    expect(page.get_by_label("Sentence 1")).to_have_value(REDWOODS[0])
    expect(page.get_by_label("Sentence 2")).to_have_value(REDWOODS[1])
    page.get_by_label("Sentence 2").press("Control+End")
    page.get_by_role("button", name="Compare").click()
    expect(page.locator("#onnx-answer").get_by_role("heading")).to_have_text("equivalent", timeout=TIMEOUT_MS)


def test_a_visitor_who_forgets_a_sentence_is_told_which(page: Page) -> None:
    page.get_by_label("Sentence 1").fill("A sentence alone.")
    page.get_by_role("button", name="Compare").click()
    expect(page.get_by_text("Sentence 2 is empty. Write a sentence.")).to_be_visible(timeout=TIMEOUT_MS)


def test_before_the_first_pair_the_page_says_on_what_each_engine_runs_and_how_good_the_model_is(page: Page) -> None:
    for engine in ("pytorch", "onnx"):
        expect(page.locator(f"#{engine}-facts")).to_contain_text(re.compile(r"Runs on\s*\S+"))
    expect(page.locator("#model")).to_contain_text(re.compile(r"P-Tuning v2\s*Task\s*mrpc"))
    accuracy = {
        name: 100 * json.loads((SHIPPED / name / "training.json").read_text())["validation"]["accuracy"]
        for name in ("minilm-mrpc", "minilm-mrpc-v2")
    }
    quality = page.locator("#quality")
    expect(quality).to_contain_text(f"On 408 validation rows: accuracy {accuracy['minilm-mrpc-v2']:.1f}, F1")
    expect(quality).to_contain_text(
        f"P-Tuning v2: accuracy {accuracy['minilm-mrpc-v2']:.1f}, against {accuracy['minilm-mrpc']:.1f} of P-Tuning "
        "(minilm-mrpc)"
    )


def test_a_page_for_single_sentences_shows_one_box_and_answers(
    browser: Browser, base_model: Callable[[str], Path], tmp_path: Path
) -> None:
    adapter = make_mood_adapter(tmp_path, base_model("bert"))
    with (
        serve(["--adapter", str(adapter)], tmp_path / "cache") as server,
        visit_page(browser, server.wait_for_url()) as page,
    ):
        expect(page.get_by_role("textbox")).to_have_count(1)
        page.get_by_label("Sentence").fill("word4 word7 word1")
        page.get_by_role("button", name="Compare").click()
        expect(page.locator("#speedup")).to_contain_text("both give the same label", timeout=TIMEOUT_MS)
        for mood in MOODS:
            expect(page.locator("#onnx-answer")).to_contain_text(mood)
        assert "Traceback" not in server.output
