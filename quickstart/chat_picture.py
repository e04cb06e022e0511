"""The picture of the chat page in the documentation: the built-in model beside the adapter of a quickstart run.

    python -m quickstart.chat_picture RUN           -> docs/chat.png

Serves both with `whet serve`, asks held-out questions of them in Chromium, and takes a picture of the page. Needs
Playwright and a chromium.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parents[1]
HELD_OUT = ROOT / "build" / "quickstart" / "heldout.jsonl"
ASKED = ("asyncio.base_events.BaseEventLoop.create_task", "logging.Logger.info")
WIDTH, HEIGHT = 1200, 890


def prompts() -> list[str]:
    """Of the entries ASKED."""
    rows = [json.loads(line) for line in HELD_OUT.read_text(encoding="utf-8").splitlines()]
    by_entry = {row["entry"]: row["messages"][0]["content"] for row in rows}
    return [by_entry[entry] for entry in ASKED]


@contextmanager
def serving(adapter: Path) -> Iterator[str]:
    """The server's address. It asks for no key, and only this machine reaches it."""
    options = ["--name", "tiny", "--adapter", f"quickstart={adapter}", "--port", "0", "--no-auth"]
    command = [sys.executable, "-m", "whet.cli", "serve", "builtin:tiny", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        try:
            if not line.startswith("ready "):
                raise SystemExit(f"whet serve did not start: {line}")
            yield line.split()[1].removesuffix("/v1")
        finally:
            process.kill()


def take(url: str, picture: Path) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme="light")
        page.goto(url)
        for prompt in prompts():
            page.get_by_label("Prompt", exact=True).fill(prompt)
            page.keyboard.press("Enter")
            page.locator("#stop").wait_for(state="hidden")
        page.evaluate("() => scrollTo(0, 0)")
        page.screenshot(path=picture)
        browser.close()


if __name__ == "__main__":
    with serving(Path(sys.argv[1]) / "trained") as url:
        take(url, ROOT / "docs" / "chat.png")
