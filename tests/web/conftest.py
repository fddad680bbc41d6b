"""One browser for all tests of the page; each test gets a fresh tab that fails on any console error."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright

from tests.web import browser as chromium

Open = Callable[..., Page]


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    path = chromium.find()
    if path is None:
        words = "no browser on this machine: `python -m tests.web.browser` gets one, or set TANGRAM_CHROMIUM"
        if os.environ.get("CI") == "true":
            pytest.fail(words)
        pytest.skip(words)
    with sync_playwright() as play:
        started = play.chromium.launch(executable_path=path, args=list(chromium.FLAGS))
        yield started
        started.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Open]:
    """Open a URL in a new tab of a new profile. `complaints` collects what the console says."""
    pages: list[Page] = []
    complaints: list[str] = []

    def hear(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            complaints.append(message.text)

    def open_(url: str, *, quiet: bool = True, **options: Any) -> Page:
        page = browser.new_context(
            viewport=options.pop("viewport", {"width": 1440, "height": 900}), **options
        ).new_page()
        if quiet:
            page.on("console", hear)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(url)
        pages.append(page)
        return page

    yield open_
    for page in pages:
        page.context.close()
    assert not complaints, f"the console said: {complaints}"


@pytest.fixture
def shots() -> Path:
    """Where screenshots go, to be looked at."""
    folder = Path("out") / "screenshots"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
