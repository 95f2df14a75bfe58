"""The page in a real browser, with every address but the server's cut off."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import httpx2 as httpx
import pytest

from tests.server import front
from tests.server.process import ServerProcess, serving

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
KEY = "correct horse"
PAGE = "/flashmoe/"
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine")
LIVE = "#status[data-state=live]"
PICTURE = "document.querySelector('#map').toDataURL()"
SECONDS = 60
#: Playwright's own way evaluates text in the page, which the page's policy forbids.
until = partial(front.until, seconds=SECONDS)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        cut = "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"
        browser = driver.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", cut]
        )
        yield browser
        browser.close()


@contextmanager
def page_of(
    browser: Any, url: str, expected: str | None = None, *, ours: bool = True, **options: Any
) -> Iterator[Any]:
    """An open page that asks no other address; ours says nothing on the console but what holds `expected`."""
    with browser.new_context(**options) as context:
        page = context.new_page()
        page.set_default_timeout(1000 * SECONDS)
        said: list[str] = []
        asked: set[str] = set()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.add(urlsplit(request.url).netloc))
        page.goto(url)
        yield page
        assert not ours or not [text for text in said if expected is None or expected not in text]
        assert asked == {urlsplit(url).netloc}


def ask(server: ServerProcess) -> None:
    """Something for the page to show."""
    for number in range(8):
        body = {"prompt": f"Number {number}", "max_tokens": 100, "ignore_eos": True}
        assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).status_code == 200


def tokens(server: ServerProcess) -> int:
    """Decoded so far."""
    return int(httpx.get(f"{server.url}/flashmoe/live").json()["decode"]["tokens"])


@needs_browser
def test_page_of_the_library(browser: Any, server: ServerProcess) -> None:
    """Its chat, at the root, works through the front; the dashboard has a link to it."""
    before = tokens(server)
    with page_of(browser, server.url + PAGE, ours=False) as page:
        page.wait_for_selector(LIVE)
        page.click("text=Chat")
        page.wait_for_selector("textarea")
        page.fill("textarea", "What is a mixture of experts?")
        page.press("textarea", "Enter")
        until(lambda: tokens(server) > before)


@needs_browser
@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_map_and_figures(browser: Any, server: ServerProcess, scheme: str) -> None:
    with page_of(browser, server.url + PAGE, color_scheme=scheme) as page, ThreadPoolExecutor(1) as others:
        page.wait_for_selector(LIVE)
        assert page.inner_text("#model").endswith(".gguf")
        still = page.evaluate(PICTURE)
        asked = others.submit(ask, server)
        until(lambda: page.evaluate(PICTURE) != still)
        moving = page.evaluate(PICTURE)
        until(lambda: page.evaluate(PICTURE) != moving)
        asked.result()
        for tile in ("speed", "hits", "drive", "memory"):
            until(lambda tile=tile: re.fullmatch(r"[\d.]+", page.inner_text(f"#{tile} .value")))
        rates = page.locator("#against b")
        until(lambda: all(re.fullmatch(r"[\d.]+ %", text) for text in rates.all_inner_texts()))
        lru, cache, belady = (float(text.split()[0]) for text in rates.all_inner_texts())
        assert 0 < max(lru, cache) <= belady <= 100
        until(lambda: "-bound: " in page.inner_text("#time .note"))
        assert "experts are in memory" in page.get_attribute("#map", "aria-label")


@needs_browser
def test_phone(browser: Any, server: ServerProcess) -> None:
    with page_of(browser, server.url + PAGE, viewport={"width": 360, "height": 740}) as page:
        page.wait_for_selector(LIVE)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360


@needs_browser
def test_key_is_asked_for(browser: Any, demo: Any) -> None:
    with (
        serving(demo, "--cache", "50%", env={"FLASHMOE_API_KEY": KEY}) as server,
        page_of(browser, server.url + PAGE, expected="401") as page,  # the browser tells of refused requests
    ):
        for key in ("wrong", KEY):
            page.wait_for_selector("#key-dialog[open]")
            page.fill("#key", key)
            page.press("#key", "Enter")
        page.wait_for_selector(LIVE)
        page.reload()
        page.wait_for_selector(LIVE)
        assert page.evaluate("localStorage.length") == 0
