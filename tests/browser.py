"""Chromium for the tests of web pages, by Playwright. Where it is missing they are skipped; under CI they fail."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


def _missing() -> str | None:
    if shutil.which("chromium") is None:
        return "chromium is not installed: apt install chromium"
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return "playwright is not installed: pip install playwright"
    return None


@contextmanager
def chromium() -> Iterator[Any]:
    if reason := _missing():
        if os.environ.get("WHET_CI") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    options = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=options)
        yield found
        found.close()
