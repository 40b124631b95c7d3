"""The demo in a real headless Chromium: type, click, see results, open an explanation; nothing fetched elsewhere."""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from data_makers import encoded
from test_demo import page, searches  # noqa: F401 (fixtures)
from test_index import seeing  # noqa: F401 (a fixture)

pytest.importorskip("gradio", reason='the page comes with pip install ".[demo]"')
playwright = pytest.importorskip("playwright.sync_api", reason="a browser is driven by: pip install playwright")
pytestmark = pytest.mark.slow
PATIENCE = 120_000  # milliseconds


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium from $CHROMIUM, the system's, or Playwright's own."""
    found = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    with playwright.sync_playwright() as driver:
        try:
            opened = driver.chromium.launch(executable_path=found, args=["--no-sandbox"], timeout=PATIENCE)
        except playwright.Error as error:
            if "CHROMIUM" in os.environ:  # who names one expects it to start
                raise
            pytest.skip(f"no Chromium here (set CHROMIUM to its path): {str(error)[:100]}")
        yield opened
        opened.close()


@pytest.fixture
def tab(browser: Any, page: Any) -> Iterator[Any]:  # noqa: F811
    """The page, open in a tab, and every address that was asked for in `tab.asked`."""
    opened = browser.new_page(viewport={"width": 1280, "height": 900})
    opened.set_default_timeout(PATIENCE)
    opened.asked = []
    opened.on("request", lambda request: opened.asked.append(request.url))
    opened.goto(page.local_url)
    opened.wait_for_selector("#query textarea, #query input")
    yield opened
    opened.close()


def here(tab: Any, url: str) -> list[str]:
    return [asked for asked in tab.asked if not asked.startswith((url, "data:", "blob:"))]


def test_a_query_is_typed_results_are_clicked_and_an_explanation_opens(tab: Any, page: Any, tmp_path: Path) -> None:  # noqa: F811
    tab.fill("#query textarea, #query input", "two dogs run in snow")
    tab.click("#find")
    tab.wait_for_selector("#results img")
    tab.wait_for_selector("text=9 found.")
    assert tab.locator("#results button img").count() == 9
    tab.locator("#results button:has(img)").nth(1).click()
    tab.wait_for_selector(".tvrn-explanation svg image", state="attached")
    seen = tab.locator("#why").bounding_box()
    assert seen is not None and 0 <= seen["y"] < 900, "where the click was, not below the fold"
    assert re.search(r"matching score 0\.\d+", tab.inner_text("#reason"))
    words = tab.locator(".tvrn-words button")
    assert words.all_inner_texts()[1:] == ["two", "dogs", "run", "in", "snow"]
    words.nth(3).click()
    opacity = tab.locator("rect.region").evaluate_all("all => all.map(r => +r.getAttribute('opacity'))")
    assert len(opacity) == 4 and "run" in tab.inner_text("figcaption"), "of the word that was clicked"
    tab.screenshot(path=os.environ.get("DEMO_SCREENSHOT") or tmp_path / "search.png", full_page=True)
    tab.keyboard.press("Escape")
    tab.wait_for_selector("#why", state="hidden")
    tab.set_viewport_size({"width": 390, "height": 844})
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390, "a phone's width"
    assert here(tab, page.local_url) == [], "works without a network"


def test_a_pair_is_uploaded_and_scored(tab: Any, tmp_path: Path) -> None:
    photograph = tmp_path / "photograph.png"
    photograph.write_bytes(encoded(5))
    tab.get_by_role("tab", name="Score a pair").click()
    tab.set_input_files("#pair input[type=file]", photograph)
    tab.wait_for_selector("#pair-preview img")
    tab.fill("#caption textarea, #caption input", "a red kite over the sea")
    tab.click("#score")
    tab.wait_for_selector("#result .tvrn-explanation")
    assert "matching score" in tab.inner_text("#result")
