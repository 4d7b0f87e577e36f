"""Pages in a real browser: Debian's Chromium, or whichever is on the path."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

NETWORK = re.compile(r"""(src|href)\s*=\s*["']?http|@import|url\(\s*["']?http|fetch\(""")
Open = Callable[..., Any]

_NAMES = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    path = next(filter(None, map(shutil.which, _NAMES)), None)
    if path is None:
        pytest.skip("needs a browser: `apt-get install chromium`, or any of " + ", ".join(_NAMES))
    # as root, as in a container, Chromium has no sandbox of its own
    options = ["--no-sandbox"] if os.geteuid() == 0 else []
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=path, args=options)
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Open]:
    """Opens a file with network off; fails on whatever error the page reports."""
    errors: list[str] = []
    contexts = []

    def open_page(path: Path, fragment: str = "", theme: str = "light") -> Any:
        context = browser.new_context(
            viewport={"width": 1400, "height": 900}, color_scheme=theme, offline=True
        )
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda said: errors.extend([said.text] if said.type == "error" else []))
        page.goto(path.as_uri() + fragment)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not errors
