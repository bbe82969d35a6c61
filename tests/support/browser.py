"""A headless Chromium, for the tests that look at the page as a reader does."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def chromium() -> str | None:
    """The program: ``CHROMIUM``, or what is on the path, or what `playwright install chromium` has put in its folder
    (None: it finds that itself)."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    """Skips the test, saying what is missing, where there is no playwright or no Chromium."""
    driver = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -e '.[browser]'")
    with driver.sync_playwright() as playwright:
        try:
            found = playwright.chromium.launch(
                executable_path=chromium(),
                args=["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else [],
            )
        except driver.Error as error:
            pytest.skip(
                f"needs Chromium (apt-get install chromium, or playwright install chromium): {error.message[:80]}"
            )
        with contextlib.closing(found):
            yield found


class Reader:
    """One page in one window; whatever the browser complains of is kept."""

    def __init__(self, browser: Any, path: Path, *, width: int = 1280, scheme: str = "light") -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.tab = self.context.new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.tab.on("console", lambda message: self.complaints.append(message.text))
        self.tab.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.tab.on("dialog", lambda dialog: (self.complaints.append(dialog.message), dialog.dismiss()))
        self.stopped: list[str] = []
        self.tab.on("requestfailed", lambda request: self.stopped.append(f"{request.url} {request.failure}"))
        self.tab.on("request", lambda request: self.requests.append(request.url))
        self.tab.goto(path.resolve().as_uri())

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()
