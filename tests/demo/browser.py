"""A real browser for tests of the page: its start, visits, and what a visitor does in every tab."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright


def find_chromium() -> str | None:
    """Any installed Chromium, or Playwright's own."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    if path := next(filter(None, map(shutil.which, names)), None):
        return path
    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
    return own if Path(own).exists() else None


CHROMIUM = find_chromium()
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None,
    reason="no Chromium on this machine; install one with: python -m playwright install chromium "
    "(or: apt-get install chromium)",
)
DESKTOP, PHONE = (1280, 900), (360, 740)  # width and height in CSS pixels


@contextmanager
def start_browser() -> Iterator[Browser]:
    """Chromium; until it is closed, `asyncio.run` does not work in this thread."""
    with sync_playwright() as playwright:
        # Chromium's sandbox does not start for root, as whom containers run.
        flags = ["--disable-background-networking", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield chromium
        chromium.close()


@contextmanager
def visit_page(browser: Browser, url: str, *, size: tuple[int, int] = DESKTOP, dark: bool = False) -> Iterator[Page]:
    """A visit that loads from the page's own server alone, and in which no script fails."""
    context = browser.new_context(
        viewport={"width": size[0], "height": size[1]}, color_scheme="dark" if dark else "light", accept_downloads=True
    )
    visit = context.new_page()
    addresses: list[str] = []
    errors: list[str] = []
    visit.on("request", lambda request: addresses.append(request.url))
    visit.on("pageerror", lambda error: errors.append(str(error)))
    visit.add_init_script(
        "window.shift = 0; new PerformanceObserver(list => { for (const entry of list.getEntries()) "
        "if (!entry.hadRecentInput) window.shift += entry.value }).observe({type: 'layout-shift', buffered: true})"
    )
    visit.goto(url)
    # Filled by the page's first event: from here on every box is bound. Earlier input would be lost.
    expect(visit.locator("#share-note")).to_contain_text("Local page")
    yield visit
    context.close()
    assert [address for address in addresses if not address.startswith((url, "data:", "blob:"))] == []
    assert errors == []


def open_tab(page: Page, name: str) -> None:
    """Open a tab, also from the menu of those that have no room."""
    tab = page.get_by_role("tab", name=name)
    if tab.is_visible():
        tab.click()
    else:
        page.get_by_role("button", name="More tabs").click()
        page.locator(".overflow-dropdown").get_by_text(name).click()


def press(page: Page, name: str | re.Pattern[str]) -> None:
    page.get_by_role("button", name=name, exact=isinstance(name, str)).first.click()


def compare(page: Page) -> None:
    press(page, "Compare")
    expect(page.locator("#speedup")).to_contain_text(re.compile(r"in \d rounds?;"))


def choose(page: Page, label: str, option: str) -> None:
    page.get_by_label(label, exact=True).click()
    page.get_by_role("option", name=re.compile(option)).click()


def choose_cells(page: Page, batch_sizes: set[str], lengths: set[str]) -> None:
    """Check these boxes of the latency lab, and no others."""
    for group, wanted in (("Batch sizes", batch_sizes), ("Lengths in tokens", lengths)):
        for box in page.locator("fieldset", has_text=group).get_by_role("checkbox").all():
            box.set_checked(box.evaluate("box => box.closest('label').innerText.trim()") in wanted)


def download(page: Page, name: str | re.Pattern[str], folder: Path) -> Path:
    """The file behind a button, once there is one."""
    button = page.get_by_role("button", name=name)
    expect(button).to_be_enabled()
    with page.expect_download() as started:
        button.click()
    started.value.save_as(folder / started.value.suggested_filename)
    return folder / started.value.suggested_filename


def label_file(page: Page, path: Path) -> None:
    """Upload a file in the tab "Score a file" and start."""
    page.locator("#score-file input[type=file]").set_input_files(path)
    expect(page.locator("#score-file")).to_contain_text(path.stem)
    press(page, "Label the file")
