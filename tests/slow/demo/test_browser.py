"""The page in a real browser, with the models that ship: what a visitor types, clicks, reads and downloads."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from axe_playwright_python.sync_playwright import Axe  # type: ignore[import-untyped]
from playwright.sync_api import Browser, Page, expect

from demo.page.controls import EXAMPLES
from demo.starting_page import STEPS
from tests.conftest import Folders
from tests.demo.browser import DESKTOP, PHONE, choose, compare, needs_chromium, open_tab, press, visit_page
from tests.demo.engines import MOODS, make_mood_adapter
from tests.demo.page_client import check_answer, values_on_load
from tests.demo.server import connect, serve_cleanly
from train.adapter.folder import load_adapter

pytestmark = needs_chromium
REDWOODS = EXAMPLES["Coast redwoods"]


SHOWN_BY_A_START = """
const note = () => {
  const steps = [...document.querySelectorAll("#steps li")].map(step => step.className + " " + step.firstChild.data.trim());
  const shown = JSON.parse(sessionStorage.shown || "[]");
  if (steps.length && JSON.stringify(shown.at(-1)) !== JSON.stringify(steps))
    sessionStorage.shown = JSON.stringify([...shown, steps]);
};
addEventListener("DOMContentLoaded", () => { note(); new MutationObserver(note).observe(document.body, {subtree: true, childList: true}) });
"""
"""Script that keeps each list of steps that the tab shows, also when the tab loads the page itself."""


class FirstStart(NamedTuple):
    """What a tab showed that was opened as soon as the terminal said where."""

    url: str
    """The page's."""
    shown: list[list[str]]
    """Each list of steps, once: "done Read the adapter", …"""
    answer: str
    """In the page itself, without a click."""


@pytest.fixture(scope="module")
def first_start(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FirstStart]:
    """The page as ``python -m demo`` without flags serves it: minilm and the adapters that ship."""
    with serve_cleanly([], tmp_path_factory.mktemp("cache")) as server:
        tab = browser.new_page()
        tab.add_init_script(SHOWN_BY_A_START)
        tab.goto(server.wait_for(r"open (http://\S+) to watch the start")[1])
        assert "the page is at" not in server.output
        heading = tab.locator("#onnx-answer").get_by_role("heading")
        expect(heading).to_be_visible()
        shown = json.loads(tab.evaluate("sessionStorage.shown"))
        yield FirstStart(server.wait_for_url(), shown, heading.inner_text())
        tab.close()


@pytest.fixture(scope="module")
def url(first_start: FirstStart) -> str:
    return first_start.url


@pytest.fixture
def page(browser: Browser, url: str) -> Iterator[Page]:
    with visit_page(browser, url) as visit:
        yield visit


def test_a_tab_that_is_opened_at_once_shows_each_step_and_becomes_the_answered_page(first_start: FirstStart) -> None:
    last = [step.words for step in STEPS if step.part != "Ray"]
    ran = [step.removeprefix("running ") for steps in first_start.shown for step in steps if step.startswith("running")]
    assert [words for words in last if words in ran] == list(dict.fromkeys(ran)), "in another order"
    # Some are over within the second between two looks, the first ones before a busy machine's browser has the tab.
    assert last[-1] in ran
    assert len(set(ran)) > 1
    assert first_start.shown[-1] == [*(f"done {words}" for words in last[:-1]), f"running {last[-1]}"]
    assert first_start.answer == "equivalent"


def test_a_visitor_types_the_redwood_pair_and_sees_both_answers(page: Page, request: pytest.FixtureRequest) -> None:
    page.get_by_label("Sentence 1").first.fill(REDWOODS[0])
    page.get_by_label("Sentence 2").first.fill(REDWOODS[1])
    page.evaluate("window.shift = 0")
    compare(page)
    speedup = page.locator("#speedup")
    for words in (r"\d+\.\d\d to \d+\.\d\d in 4 rounds;", r"largest logit difference \d\.\de-\d\d"):
        expect(speedup).to_contain_text(re.compile(words))
    latency = r"\d+\.\d\d ms median\s*\d+\.\d\d ms p95, \d+\.\d\d ms p99 of \d+ runs"
    memory = r"Memory\s*[\d,]+ MiB at most\s*Load time\s*\d+\.\d s"
    # The page starts with the fastest graph that lost nothing on the texts it was judged by.
    for engine, precision in (("pytorch", "fp32"), ("onnx", "int8")):
        answer = page.locator(f"#{engine}-answer")
        expect(answer.get_by_role("heading")).to_have_text("equivalent")
        shares = [int(share) for share in re.findall(r"(\d+)%", answer.inner_text())]
        assert len(shares) == 2  # both classes are shown
        assert sum(shares) in {99, 100, 101}  # each is rounded
        for words in (latency, r"Threads\s*\d+ thread", rf"Precision\s*{precision}", memory):
            expect(page.locator(f"#{engine}-facts")).to_contain_text(re.compile(words))
    expect(page.locator("#onnx-facts")).to_contain_text(re.compile(r"(CPU|CUDA)ExecutionProvider"))
    # Places are kept free for what arrives; Google calls 0.1 good.
    assert page.evaluate("window.shift") < 0.1
    if picture := request.config.getoption("--screenshot"):
        page.wait_for_timeout(1000)  # the bars grow
        page.screenshot(path=picture, full_page=True)


def test_a_visitor_stops_the_measuring_and_keeps_the_answers(page: Page) -> None:
    page.get_by_label("Sentence 1").first.fill(REDWOODS[0] + " trees" * 1000)
    page.get_by_label("Sentence 2").first.fill(REDWOODS[1])
    press(page, "Compare")
    expect(page.locator("#onnx-answer").get_by_role("heading")).to_be_visible()
    press(page, "Stop measuring")
    expect(page.get_by_role("button", name="Stop measuring")).to_be_disabled()
    expect(page.locator("#speedup")).to_contain_text("Sentence 1 was cut after “…")
    expect(page.locator("#speedup")).not_to_contain_text("in 4 rounds")
    open_tab(page, "Latency lab")
    measured = page.locator("#lab-table tbody tr", has_text="×")
    press(page, "Measure")
    expect(measured).not_to_have_count(0)
    stop = page.get_by_role("button", name="Stop", exact=True)
    stop.click()
    expect(stop).to_be_disabled()
    assert 0 < measured.count() < 6


def test_the_page_opens_with_the_first_example_answered_and_a_click_runs_another(page: Page) -> None:
    expect(page.get_by_label("Sentence 1").first).to_have_value(REDWOODS[0])
    expect(page.locator("#speedup")).to_contain_text("both give the same label")
    expect(page.locator("#onnx-answer").get_by_role("heading")).to_have_text("equivalent")
    press(page, "Two pieces of news")
    expect(page.locator("#onnx-answer").get_by_role("heading")).to_have_text("not_equivalent")
    press(page, "All engines on this text")
    bars = page.locator("#all-engines").get_by_role("img")
    for name in ("PyTorch, eager", "PyTorch, compiled", "PyTorch, bf16", "ONNX Runtime, fp32", "ONNX Runtime, int8"):
        said = re.compile(rf"{name} (\d+\.\d\d ms, same label|cannot run here)")
        expect(bars).to_have_accessible_name(said)


def test_a_text_that_is_sent_while_another_is_measured_is_measured_next(page: Page) -> None:
    page.get_by_label("Sentence 1").first.fill(REDWOODS[0] + " trees" * 1000)
    page.get_by_label("Sentence 2").first.fill(REDWOODS[1])
    press(page, "Compare")
    expect(page.locator("#speedup")).to_contain_text("Sentence 1 was cut after “…")
    page.get_by_label("Sentence 1").first.fill(REDWOODS[0])
    compare(page)
    expect(page.locator("#speedup")).not_to_contain_text("was cut")
    expect(page.locator("#speedup")).to_contain_text("in 4 rounds")


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


def test_a_visitor_chooses_another_precision_and_the_other_adapter(page: Page) -> None:
    choose(page, "ONNX Runtime", "int8")
    expect(page.locator("#onnx-facts")).to_contain_text(re.compile(r"Precision\s*int8"))
    choose(page, "ONNX Runtime", "fp32")
    choose(page, "Adapter", "minilm-mrpc$")
    # It is exported first.
    expect(page.locator("#model")).to_contain_text(re.compile(r"Method\s*P-Tuning, 20"))
    expect(page.locator("#quality")).to_contain_text("BELOW it")
    press(page, "Coast redwoods")
    expect(page.get_by_label("Sentence 1").first).to_have_value(REDWOODS[0])
    compare(page)
    expect(page.locator("#speedup")).to_contain_text("both give the same label")
    open_tab(page, "The prompt")
    expect(page.locator("#prompt-learned")).to_contain_text("minilm-mrpc")
    expect(page.locator("#prompt-learned").get_by_role("img").first).to_be_visible()


FOLDERS = [Path(folder) for folder in os.environ.get("NODE_PATH", "").split(os.pathsep) if folder]
MODULES = next((folder for folder in FOLDERS if (folder / "@gradio" / "client").is_dir()), None)
"""A folder of NODE_PATH with Gradio's client in it."""


@pytest.mark.skipif(
    shutil.which("node") is None or MODULES is None,
    reason="no Node with @gradio/client: npm install @gradio/client, and name its node_modules in NODE_PATH",
)
def test_the_javascript_on_the_page_runs(url: str, tmp_path: Path) -> None:
    assert MODULES is not None
    (tmp_path / "node_modules").symlink_to(MODULES.resolve())
    code = values_on_load(url)["use-javascript"]
    code = code.replace("console.log(answer.data[0]);", "console.log(JSON.stringify(answer.data));")
    # The client keeps a connection open, which keeps Node from ending.
    (tmp_path / "use.mjs").write_text(f"{code}process.exit();\n", encoding="utf-8")
    command = ["node", str(tmp_path / "use.mjs")]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    check_answer(json.loads(result.stdout)[0])


@pytest.mark.parametrize(("size", "dark"), [(DESKTOP, False), (DESKTOP, True), (PHONE, False)])
def test_no_tab_is_too_wide_or_hard_to_use(size: tuple[int, int], dark: bool, browser: Browser, url: str) -> None:
    with visit_page(browser, url, size=size, dark=dark) as page:
        assert page.evaluate("document.body.classList.contains('dark')") == dark
        for tab in ("Compare", "Latency lab", "Score a file", "The prompt", "Use it"):
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


def test_a_page_for_single_sentences_has_one_box(browser: Browser, base_model: Folders, tmp_path: Path) -> None:
    adapter = make_mood_adapter(tmp_path, base_model("gpt2"))
    page_alone = serve_cleanly(["--adapter", str(adapter)], tmp_path / "cache")
    with page_alone as server, visit_page(browser, server.wait_for_url()) as page:
        expect(page.get_by_label("Sentence", exact=True).first).to_be_visible()
        expect(page.locator("#sentence2")).not_to_be_visible()
        for words in ("gpt2", "P-Tuning v2", "custom, single sentences", "bad, good, so-so"):
            expect(page.locator("#model")).to_contain_text(words)
        expect(page.locator("#quality")).to_contain_text(
            f"On 18 validation rows: {load_adapter(adapter).scores} (95 %: "
        )
        page.get_by_label("Sentence", exact=True).first.fill("word4 word7 word1")
        compare(page)
        expect(page.locator("#speedup")).to_contain_text("both give the same label")
        for mood in MOODS:
            expect(page.locator("#onnx-answer")).to_contain_text(mood)


def test_without_pytorch_nothing_imports_it_and_the_page_shows_one_engine(
    browser: Browser, adapter: Folders, bundle: Folders, tmp_path: Path
) -> None:
    """Neither the page nor its engine: here an import of torch or transformers fails."""
    for name in ("torch", "transformers"):
        (tmp_path / "traps" / name).mkdir(parents=True)
        (tmp_path / "traps" / name / "__init__.py").write_text("raise SystemExit('it was imported')")
    kinds = ("bert", "llama-v2")
    flags = ["--engine", "onnx", "--adapter", *map(str, map(adapter, kinds)), "--bundle", *map(str, map(bundle, kinds))]
    with serve_cleanly(flags, tmp_path / "cache", {"PYTHONPATH": str(tmp_path / "traps")}) as server:
        with visit_page(browser, server.wait_for_url()) as page:
            expect(page.get_by_label("PyTorch", exact=True)).not_to_be_visible()
            press(page, "Coast redwoods")
            expect(page.get_by_label("Sentence 1").first).to_have_value(REDWOODS[0])
            press(page, "Compare")
            expect(page.locator("#speedup .figure")).to_have_text(re.compile(r"^\d+\.\d\d ms$"))
            open_tab(page, "The prompt")
            expect(page.locator("#prompt-about").get_by_role("img").first).to_be_visible()
        with connect(server.wait_for_url()) as client:
            answer = client.predict(*REDWOODS, api_name="/compare")
            assert client.predict(api_name="/prompt")["nearest_words"]
            assert client.predict("llama-v2", api_name="/prompt")["nearest_words"] is None
        assert "it was imported" not in server.output
        assert len(server.children()) == 1
    assert "pytorch" not in answer
    assert answer["onnx"]["label"] in {"equivalent", "not_equivalent"}
