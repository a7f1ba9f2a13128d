"""The page as a visitor sees it: a real browser types, clicks, uploads, downloads and reads."""

import csv
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe  # type: ignore[import-untyped]
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from demo.engines.adapters import SHIPPED
from tests.conftest import make_pairs, write_jsonl
from tests.demo.server import serve
from tests.demo.test_demo import MOODS, make_mood_adapter

REDWOODS = (
    "Coast redwood trees are the tallest trees on the planet and can grow over 300 feet tall.",
    "The coast redwood trees, which can attain a height of over 300 feet, are the tallest trees on earth.",
)


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


TABS = ("Compare", "Latency lab", "Score a file", "The prompt", "Use it")

DESKTOP, PHONE = (1280, 900), (360, 740)
"""Width and height in CSS pixels."""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The page as ``python -m demo`` without flags serves it: minilm and the adapters that ship."""
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
def visit_page(browser: Browser, url: str, *, size: tuple[int, int] = DESKTOP, dark: bool = False) -> Iterator[Page]:
    """A fresh visit that has to come along with what the page's own server gives, and without an error in scripts."""
    context = browser.new_context(
        viewport={"width": size[0], "height": size[1]}, color_scheme="dark" if dark else "light", accept_downloads=True
    )
    visit = context.new_page()
    foreign: list[str] = []
    errors: list[str] = []
    own = (url, "data:", "blob:")
    visit.on("request", lambda request: None if request.url.startswith(own) else foreign.append(request.url))
    visit.on("pageerror", lambda error: errors.append(str(error)))
    visit.add_init_script(
        "window.shift = 0; new PerformanceObserver(list => { for (const entry of list.getEntries()) "
        "if (!entry.hadRecentInput) window.shift += entry.value }).observe({type: 'layout-shift', buffered: true})"
    )
    visit.goto(url)
    # Filled by the page's first event: from here on every box is bound. What a program types earlier is lost.
    expect(visit.locator("#share-note")).to_contain_text("Local page")
    yield visit
    context.close()
    assert foreign == []
    assert errors == []


@pytest.fixture
def page(browser: Browser, url: str) -> Iterator[Page]:
    with visit_page(browser, url) as visit:
        yield visit


def open_tab(page: Page, name: str) -> None:
    """Open a tab, also where it stands in the menu of those that have no room."""
    tab = page.get_by_role("tab", name=name)
    if tab.is_visible():
        tab.click()
    else:
        page.get_by_role("button", name="More tabs").click()
        page.locator(".overflow-dropdown").get_by_text(name).click()


def compare(page: Page) -> None:
    """Press the button and wait for the last round."""
    page.get_by_role("button", name="Compare", exact=True).click()
    speedup = page.locator("#speedup")
    expect(speedup).to_contain_text(re.compile(r"in \d rounds?;"))


def choose(page: Page, label: str, option: str) -> None:
    """Choose from one of the lists on top and wait until the page has taken it in."""
    page.get_by_label(label, exact=True).click()
    page.get_by_role("option", name=re.compile(option)).click()


def test_a_visitor_types_the_redwood_pair_and_sees_both_answers(page: Page, request: pytest.FixtureRequest) -> None:
    page.get_by_label("Sentence 1").first.fill(REDWOODS[0])
    page.get_by_label("Sentence 2").first.fill(REDWOODS[1])
    page.evaluate("window.shift = 0")
    compare(page)
    speedup = page.locator("#speedup")
    expect(speedup.locator(".figure")).to_have_text(re.compile(r"^\d+\.\d\d×$"))
    expect(speedup).to_contain_text(re.compile(r"\d+\.\d\d to \d+\.\d\d in 4 rounds;"))
    expect(speedup).to_contain_text("both give the same label")
    expect(speedup).to_contain_text(re.compile(r"largest logit difference \d\.\de-\d\d"))
    for engine in ("pytorch", "onnx"):
        answer = page.locator(f"#{engine}-answer")
        expect(answer.get_by_role("heading")).to_have_text("equivalent")
        shares = [int(share) for share in re.findall(r"(\d+)%", answer.inner_text())]
        assert len(shares) == 2  # both classes are shown
        assert sum(shares) in {99, 100, 101}  # each is rounded
        facts = page.locator(f"#{engine}-facts")
        expect(facts).to_contain_text(
            re.compile(r"\d+\.\d\d ms median\s*\d+\.\d\d ms p95, \d+\.\d\d ms p99 of \d+ runs")
        )
        expect(facts).to_contain_text(re.compile(r"Threads\s*\d+ thread"))
        expect(facts).to_contain_text(re.compile(r"Precision\s*fp32"))
        expect(facts).to_contain_text(re.compile(r"Memory\s*[\d,]+ MiB at most\s*Load time\s*\d+\.\d s"))
    expect(page.locator("#onnx-facts")).to_contain_text(re.compile(r"(CPU|CUDA)ExecutionProvider"))
    expect(page.locator("#distribution").get_by_role("img")).to_be_visible()
    # Places are kept free for what arrives; Google calls 0.1 good.
    assert page.evaluate("window.shift") < 0.1
    if picture := request.config.getoption("--screenshot"):
        page.wait_for_timeout(1000)  # the bars grow
        page.screenshot(path=picture, full_page=True)


def test_a_visitor_stops_the_measuring_and_keeps_the_answers(page: Page) -> None:
    page.get_by_label("Sentence 1").first.fill(REDWOODS[0] + " trees" * 1000)
    page.get_by_label("Sentence 2").first.fill(REDWOODS[1])
    page.get_by_role("button", name="Compare", exact=True).click()
    expect(page.locator("#onnx-answer").get_by_role("heading")).to_be_visible()
    page.get_by_role("button", name="Stop measuring").click()
    expect(page.get_by_role("button", name="Stop measuring")).to_be_disabled()
    expect(page.locator("#speedup")).to_contain_text("Sentence 1 was cut after “…")
    expect(page.locator("#speedup")).not_to_contain_text("in 4 rounds")


def test_an_example_fills_both_sentences(page: Page) -> None:
    page.get_by_role("button", name="Coast redwoods").first.click()
    expect(page.get_by_label("Sentence 1").first).to_have_value(REDWOODS[0])
    expect(page.get_by_label("Sentence 2").first).to_have_value(REDWOODS[1])


def test_the_page_can_be_used_by_keyboard_alone(page: Page) -> None:
    page.get_by_label("Sentence 1").first.focus()
    page.keyboard.type("It rains.")
    page.keyboard.press("Tab")
    page.keyboard.type("Rain is falling.")
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Compare", exact=True)).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#onnx-answer").get_by_role("heading")).to_be_visible()
    page.get_by_role("tab", name="Compare").focus()
    # Every stop on the way is one that can be seen.
    for _ in range(3):
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.checkVisibility()")


def test_a_visitor_who_forgets_a_sentence_is_told_which(page: Page) -> None:
    page.get_by_label("Sentence 1").first.fill("A sentence alone.")
    page.get_by_role("button", name="Compare", exact=True).click()
    expect(page.get_by_text("Sentence 2 is empty. Write a sentence.")).to_be_visible()


def test_before_the_first_pair_the_page_says_on_what_each_engine_runs_and_how_good_the_model_is(page: Page) -> None:
    for engine in ("pytorch", "onnx"):
        expect(page.locator(f"#{engine}-facts")).to_contain_text(re.compile(r"Runs on\s*\S+"))
    expect(page.locator("#model")).to_contain_text(re.compile(r"P-Tuning v2, 20 virtual tokens\s*Task\s*mrpc"))
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


def test_a_visitor_chooses_another_precision_and_another_way_for_pytorch(page: Page) -> None:
    choose(page, "ONNX Runtime", "int8")
    expect(page.locator("#onnx-facts")).to_contain_text(re.compile(r"Precision\s*int8"))
    expect(page.locator("#model")).to_contain_text("what it costs in quality was not measured here")
    choose(page, "PyTorch", "bf16")
    expect(page.locator("#pytorch-facts")).to_contain_text(re.compile(r"Precision\s*bf16"))
    page.get_by_role("button", name="Coast redwoods").first.click()
    expect(page.get_by_label("Sentence 1").first).to_have_value(REDWOODS[0])
    compare(page)
    expect(page.locator("#onnx-facts")).to_contain_text(re.compile(r"Precision\s*int8"))


def test_a_visitor_chooses_the_other_adapter(page: Page) -> None:
    choose(page, "Adapter", "minilm-mrpc$")
    # It is exported first.
    expect(page.locator("#model")).to_contain_text(re.compile(r"Method\s*P-Tuning, 20"))
    expect(page.locator("#quality")).to_contain_text("BELOW it")
    page.get_by_role("button", name="Coast redwoods").first.click()
    expect(page.get_by_label("Sentence 1").first).to_have_value(REDWOODS[0])
    compare(page)
    expect(page.locator("#speedup")).to_contain_text("both give the same label")
    open_tab(page, "The prompt")
    expect(page.locator("#prompt-learned")).to_contain_text("minilm-mrpc")
    expect(page.locator("#prompt-learned").get_by_role("img").first).to_be_visible()


def measured_rows(page: Page) -> Locator:
    """Of the lab's table, which holds a row for each combination from the start."""
    return page.locator("#lab-table tbody tr", has_text="×")


def test_the_latency_lab_measures_what_was_chosen_and_gives_it_as_a_file(page: Page, tmp_path: Path) -> None:
    open_tab(page, "Latency lab")
    for group, wanted in (("Batch sizes", {"1", "2"}), ("Lengths in tokens", {"16"})):
        boxes = page.locator("fieldset", has_text=group).get_by_role("checkbox")
        assert boxes.count() > 4
        for index in range(boxes.count()):
            box = boxes.nth(index)
            value = box.evaluate("box => box.closest('label').innerText.trim()")
            box.set_checked(value in wanted)
    page.get_by_role("button", name="Measure").click()
    expect(measured_rows(page)).to_have_count(2)
    expect(page.locator("#lab-table tbody tr")).to_have_count(2)
    expect(page.locator("#lab-charts").get_by_role("img").first).to_be_visible()
    expect(page.get_by_role("button", name="Download CSV")).to_be_enabled()
    with page.expect_download() as download:
        page.get_by_role("button", name="Download CSV").click()
    download.value.save_as(tmp_path / "lab.csv")
    with (tmp_path / "lab.csv").open(newline="") as file:
        measured = list(csv.DictReader(file))
    assert [(row["batch_size"], row["tokens"]) for row in measured] == [("1", "16"), ("2", "16")]
    assert all(float(row["pytorch_median_ms"]) > 0 and float(row["onnx_median_ms"]) > 0 for row in measured)
    with page.expect_download() as download:
        page.get_by_role("button", name=re.compile("PNG")).click()
    download.value.save_as(tmp_path / "lab.png")
    assert (tmp_path / "lab.png").read_bytes().startswith(b"\x89PNG")


def test_the_latency_lab_is_stopped(page: Page) -> None:
    open_tab(page, "Latency lab")
    page.get_by_role("button", name="Measure").click()
    expect(measured_rows(page)).not_to_have_count(0)
    stop = page.get_by_role("button", name="Stop", exact=True)
    stop.click()
    expect(stop).to_be_disabled()
    assert 0 < measured_rows(page).count() < 6


def test_a_file_is_scored_and_comes_back_labelled(page: Page, tmp_path: Path) -> None:
    pairs = make_pairs(24, seed=5)
    source = write_jsonl(tmp_path / "pairs.jsonl", pairs)
    open_tab(page, "Score a file")
    page.locator("#score-file input[type=file]").set_input_files(source)
    page.get_by_role("button", name="Label the file").click()
    results = page.locator("#score-results")
    expect(results).to_contain_text("24")
    expect(results).to_contain_text("onfusion")
    expect(results).to_contain_text("Both engines give the same label to each of the 24 rows.")
    with page.expect_download() as download:
        page.get_by_role("button", name=re.compile("Download")).click()
    download.value.save_as(tmp_path / "labelled.jsonl")
    labelled = [json.loads(line) for line in (tmp_path / "labelled.jsonl").read_text().splitlines()]
    assert [row["sentence1"] for row in labelled] == [row["sentence1"] for row in pairs]
    assert {row["prediction_onnx"] for row in labelled} <= {"equivalent", "not_equivalent"}


def test_a_file_that_is_not_what_its_name_says_is_refused(page: Page, tmp_path: Path) -> None:
    wrong = tmp_path / "pairs.csv"
    wrong.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))
    open_tab(page, "Score a file")
    page.locator("#score-file input[type=file]").set_input_files(wrong)
    page.get_by_role("button", name="Label the file").click()
    refusal = page.get_by_role("alert").get_by_text("pairs.csv").first
    expect(refusal).to_be_visible()
    # Where it lies on the server is nobody's business.
    assert "/" not in (refusal.text_content() or "")


def test_the_prompt_is_shown_and_its_effect_on_a_text(page: Page) -> None:
    open_tab(page, "The prompt")
    expect(page.locator("#prompt-learned").get_by_role("img").first).to_be_visible()
    expect(page.locator("#prompt-about")).to_contain_text("kept: epoch")
    page.get_by_role("button", name="Classify with and without the prompt").click()
    expect(page.locator("#prompt-effect")).to_contain_text("random")
    expect(page.locator("#prompt-effect")).to_contain_text("equivalent")


def test_the_code_to_copy_names_this_page(page: Page, url: str) -> None:
    open_tab(page, "Use it")
    expect(page.locator("#use-python")).to_contain_text(f'Client("{url}")')
    expect(page.locator("#use-python")).to_contain_text('api_name="/compare"')
    for endpoint in ("/compare", "/latency", "/score_file", "/prompt", "/prompt_effect"):
        expect(page.locator("#endpoints")).to_contain_text(endpoint)


@pytest.mark.parametrize(("size", "dark"), [(DESKTOP, False), (DESKTOP, True), (PHONE, False)])
def test_no_tab_is_wider_than_its_screen_or_has_a_serious_fault_for_those_who_see_or_move_less(
    size: tuple[int, int], dark: bool, browser: Browser, url: str
) -> None:
    with visit_page(browser, url, size=size, dark=dark) as page:
        assert page.evaluate("document.body.classList.contains('dark')") == dark
        for tab in TABS:
            open_tab(page, tab)
            page.wait_for_timeout(1500)  # the tab's own first event
            # Gradio pales what an event is about to replace.
            expect(page.locator(".pending")).to_have_count(0)
            assert page.evaluate("document.documentElement.scrollWidth") <= size[0], tab
            faults = [
                f"{tab}: {fault['id']}: {fault['nodes'][0]['html']}"
                for fault in Axe().run(page).response["violations"]
                if fault["impact"] in {"serious", "critical"}
            ]
            assert faults == []


def test_a_page_for_single_sentences_shows_one_box_and_answers(
    browser: Browser, base_model: Callable[[str], Path], tmp_path: Path
) -> None:
    adapter = make_mood_adapter(tmp_path, base_model("bert"))
    with (
        serve(["--adapter", str(adapter)], tmp_path / "cache") as server,
        visit_page(browser, server.wait_for_url()) as page,
    ):
        expect(page.get_by_label("Sentence", exact=True).first).to_be_visible()
        expect(page.locator("#sentence2")).not_to_be_visible()
        page.get_by_label("Sentence", exact=True).first.fill("word4 word7 word1")
        compare(page)
        expect(page.locator("#speedup")).to_contain_text("both give the same label")
        for mood in MOODS:
            expect(page.locator("#onnx-answer")).to_contain_text(mood)
        assert "Traceback" not in server.output


def test_the_page_runs_without_pytorch(browser: Browser, tmp_path: Path) -> None:
    with (
        serve(["--engine", "onnx"], tmp_path / "cache") as server,
        visit_page(browser, server.wait_for_url()) as page,
    ):
        expect(page.get_by_label("PyTorch", exact=True)).not_to_be_visible()
        page.get_by_role("button", name="Coast redwoods").first.click()
        expect(page.get_by_label("Sentence 1").first).to_have_value(REDWOODS[0])
        page.get_by_role("button", name="Compare", exact=True).click()
        figure = page.locator("#speedup .figure")
        expect(figure).to_have_text(re.compile(r"^\d+\.\d\d ms$"))
        assert "Traceback" not in server.output
