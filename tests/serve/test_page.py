"""The chat page in Chromium: over builtin:tiny with an adapter, and over engines and connections that fail."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from safetensors.torch import save_file

from tests.browser import chromium
from tests.serve.gateways import Gateway, gateway, key_file
from tests.serve.scripted import MODELS, Scripted
from whet.serve import keys, page
from whet.serve.auth import Authenticator
from whet.serve.drain import Drain
from whet.serve.engines.in_process.engine import InProcessEngine
from whet.serve.engines.in_process.settings import Settings
from whet.serve.interface import EngineDown, ServedModel
from whet.serve.limits import Allowance, Limits

PATIENCE = 30.0
"""Seconds."""
LAST_LAYER = "base_model.model.model.layers.5.mlp.down_proj"
HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script></article>"


class Visitor:
    """Somebody at a browser of their own. hosts: those asked; asked: the bodies sent; complaints: what went wrong."""

    def __init__(self, browser: Any, url: str, token: str | None = None, **options: Any):
        self.hosts, self.asked, self.complaints = set[str](), list[Any](), list[str]()
        self.page = browser.new_context(**options).new_page()
        self.page.set_default_timeout(PATIENCE * 1000)
        self.page.on("request", self._note)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: self.complaints.append(dialog.message))
        self.page.goto(url)
        if token is not None:
            self.unlock(token)
            self.inside()

    def _note(self, request: Any) -> None:
        self.hosts.add(urlsplit(request.url).netloc)
        if request.method == "POST":
            self.asked.append(request.post_data_json)

    def unlock(self, token: str) -> None:
        self.page.get_by_label("Key").fill(token)
        self.page.keyboard.press("Enter")

    def inside(self) -> None:
        self.page.locator("#prompt").wait_for()

    def send(self, prompt: str) -> None:
        self.page.get_by_label("Prompt", exact=True).fill(prompt)
        self.page.keyboard.press("Enter")

    def ended(self) -> None:
        self.page.locator("#stop").wait_for(state="hidden")

    def ask(self, prompt: str) -> list[str]:
        """Send it, and return the answers."""
        self.send(prompt)
        self.ended()
        return [text.strip() for text in self.last(".text").all_inner_texts()]

    def last(self, inside: str) -> Any:
        """Of the last turn's answers."""
        return self.page.locator(f".turn:last-child article {inside}")

    def set(self, label: str, value: str) -> None:
        self.page.locator("summary").click()
        self.page.get_by_label(label).fill(value)
        self.page.keyboard.press("Escape")

    def shows(self, text: str) -> None:
        self.page.get_by_text(text).first.wait_for()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter whose part in the last layer drowns all others: its answers repeat two words and never end."""
    folder = tmp_path_factory.mktemp("endless")
    torch.manual_seed(0)
    weights = {"lora_A": torch.randn(1, 768), "lora_B": 1e3 * torch.randn(256, 1)}
    named = {f"{LAST_LAYER}.{part}.weight": weight for part, weight in weights.items()}
    save_file(named, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
    return folder


@pytest.fixture(scope="module")
def tiny(endless: Path) -> Iterator[Gateway]:
    settings = Settings(cache_bytes=16 << 20, max_running=4)
    with gateway(InProcessEngine("builtin:tiny", name="base", adapters={"tuned": endless}, settings=settings)) as found:
        yield found


@pytest.fixture
def scripted() -> Iterator[Gateway]:
    with gateway(Scripted()) as found:
        yield found


# ---------------------------------------------------------------- over a real model


def test_both_answer_and_each_keeps_its_own_history(tiny: Gateway, browser: Any) -> None:
    """Catches a column that is given the other's answers, a setting that is not sent, and a key that is written down.

    The page asks its own origin alone.
    """
    ada = Visitor(browser, tiny.url)
    ada.unlock("whet-not-a-key")
    ada.shows("This key is not valid.")
    ada.unlock(tiny.token)
    ada.inside()
    assert [ada.page.locator(f"#{place}").input_value() for place in ("first", "second")] == ["base", "tuned"]
    ada.shows("adapter on base")
    ada.set("Tokens at most", "4")
    ada.set("System prompt", "Be brief.")
    base, tuned = ada.ask("Hi")
    assert base
    assert tuned
    assert base != tuned
    assert all(re.match(r"4 tokens · [\d.]+ s", text) for text in ada.last(".figures").all_inner_texts())
    ada.ask("Go on")

    first, second = [(body["model"], body["messages"]) for body in ada.asked[:2]], ada.asked[2:]
    system, hi = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}
    assert first == [("base", [system, hi]), ("tuned", [system, hi])]
    for body, answer in zip(second, (base, tuned), strict=True):
        past = [{**message, "content": message["content"].strip()} for message in body["messages"]]
        assert past == [system, hi, {"role": "assistant", "content": answer}, {"role": "user", "content": "Go on"}]
        assert (body["max_tokens"], body["temperature"], "seed" in body) == (4, 0, False)
    kept = ada.page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie, location.href])")
    assert json.loads(kept) == [{}, {}, "", f"{tiny.url}/"]
    assert tiny.token not in ada.page.content()
    assert ada.hosts == {urlsplit(tiny.url).netloc}
    assert ada.complaints == []


def test_two_streams_are_stopped_one_alone_and_then_all(tiny: Gateway, browser: Any) -> None:
    """Catches answers that come one after the other, and a stop that leaves the engine at work on what nobody reads."""
    ada = Visitor(browser, tiny.url, tiny.token)
    ada.page.select_option("#first", "tuned")
    ada.send("Hi")
    for cell in ada.last(".text").all():
        cell.get_by_text(re.compile(r"\w+ \w+")).wait_for()
    tiny.wait_until(lambda: tiny.engine.load()["running"] == 2)
    assert ada.last(".text").count() == ada.page.locator("article[aria-busy=true]").count() == 2
    ada.last("button").get_by_text("Stop").first.click()
    tiny.wait_until(lambda: tiny.engine.load()["running"] == 1)
    assert ada.page.locator("article[aria-busy=true]").count() == 1
    assert ada.page.locator("#prompt:focus").count() == 1
    ada.page.keyboard.press("Escape")
    ada.ended()
    tiny.wait_until(lambda: tiny.engine.load()["running"] == 0)
    tiny.wait_until(lambda: tiny.parts.limits.running == 0)
    figures = ada.last(".figures").all_inner_texts()
    assert all(re.fullmatch(r"about \d+ tokens? · [\d.]+ s · stopped", text) for text in figures), figures
    answers = ada.last(".text").all_inner_texts()
    ada.set("Tokens at most", "2")
    ada.ask("And now?")
    assert [body["messages"][1]["content"].strip() for body in ada.asked[2:]] == [text.strip() for text in answers]
    assert ada.complaints == []


def test_no_mouse_is_needed(tiny: Gateway, browser: Any) -> None:
    """Catches what keys can't reach: a prompt that is sent by Shift+Enter, a sheet that stays, focus that is lost."""
    ada = Visitor(browser, tiny.url)
    ada.page.locator("#key").wait_for()
    page = ada.page
    press = page.keyboard.press

    def focused(what: str) -> bool:
        return bool(page.locator(f"{what}:focus").count())

    page.keyboard.type(tiny.token)  # the key's field has the focus by itself
    press("Enter")
    page.locator("#prompt:focus").wait_for()
    for wanted in ("#second", "#first", "summary"):
        press("Shift+Tab")
        assert focused(wanted), wanted
    press("Enter")
    for _ in range(3):
        press("Tab")
    assert focused("#max-tokens")
    page.keyboard.type("3")
    press("Escape")
    assert focused("summary")
    assert not page.locator("#settings").is_visible()
    press("Tab")
    press("Tab")
    press("n")  # by its first letter: no other model
    assert page.locator("#second").input_value() == ""
    press("Tab")
    page.keyboard.type("one")
    press("Shift+Enter")
    page.keyboard.type("two")
    assert not ada.asked
    press("Enter")
    ada.last(".figures").get_by_text("3 tokens").wait_for()
    assert ada.asked[0]["messages"] == [{"role": "user", "content": "one\ntwo"}]
    assert len(ada.asked) == 1
    assert focused("#prompt")
    press("Shift+Tab")
    assert focused("article button")
    assert page.get_by_role("article", name="base").count() == 1
    assert "base, 3 tokens" in page.locator("[aria-live=polite]").last.inner_text()
    assert page.get_by_role("log", name="Conversation").count() == 1


# ---------------------------------------------------------------- refusals, where they happen


def test_a_key_that_ends_is_asked_for_anew(tmp_path: Path, browser: Any) -> None:
    """Catches a page that has to be reloaded, and loses its conversation, when a key is revoked."""
    old, new = keys.add(key_file(tmp_path), "old"), keys.add(key_file(tmp_path), "new")
    with gateway(Scripted(), auth=Authenticator(keys.KeyRing(key_file(tmp_path)))) as served:
        ada = Visitor(browser, served.url, old)
        ada.page.select_option("#second", "")
        ada.ask("Hi")
        keys.revoke(key_file(tmp_path), "old")
        ada.ask("Again")
        ada.page.locator("#door").get_by_text("This key").first.wait_for()
        assert ada.last(".fault").inner_text().startswith("This key")
        ada.unlock(new)
        ada.inside()
        ada.last("button").get_by_text("Try again").click()
        ada.last(".text").get_by_text("Hello!").wait_for()
        assert len(ada.asked[-1]["messages"]) == 3
        ada.page.locator("summary").click()
        ada.page.get_by_role("button", name="Forget it").click()
        ada.page.get_by_label("Key").wait_for()
        assert ada.page.locator("article").count() == 0


def test_a_limit_is_shown_with_its_wait(tmp_path: Path, browser: Any) -> None:
    """Catches a page that hides why nothing comes, or that asks again before it may."""
    token = keys.add(key_file(tmp_path), "app", allowance=Allowance(concurrent=1))
    engine = Scripted(hold=True)
    auth = Authenticator(keys.KeyRing(key_file(tmp_path)))
    with gateway(engine, auth=auth, limits=Limits()) as served:
        ada = Visitor(browser, served.url, token)
        ada.page.clock.install()
        ada.send("Hi")
        ada.shows("1 requests at once for this key.")
        again = ada.page.get_by_role("button", name=re.compile("Try again"))
        assert again.inner_text() == "Try again in 1 s"
        assert again.is_disabled()
        served.in_loop(engine.go_on.set)
        ada.ended()
        ada.page.clock.run_for(2000)
        assert again.inner_text() == "Try again"
        again.click()
        ada.last(".text").get_by_text("Hello!").nth(1).wait_for()
        assert not again.is_visible()


def test_a_model_that_is_gone_is_said_in_its_column(scripted: Gateway, browser: Any) -> None:
    """Catches a list of models that is as old as the page, and tokens that are counted by the pieces of text."""
    scripted.engine.answer = ("Hel", "", "lo!")
    ada = Visitor(browser, scripted.url, scripted.token)
    scripted.engine.models = lambda: MODELS[:1]
    ada.ask("Hi")
    assert "does not exist" in ada.last(".fault").last.inner_text()
    assert ada.last(".text").first.inner_text() == "Hello!"
    assert ada.last(".figures").first.inner_text().startswith("3 tokens")
    ada.shows("not served any more")
    assert ada.page.locator("#first option").all_inner_texts() == ["scripted"]


def _engine_dies(served: Gateway, ada: Visitor) -> None:
    served.engine.failure, served.engine.fails_at = EngineDown("it died"), 2
    served.in_loop(served.engine.go_on.set)


def _connection_breaks(served: Gateway, ada: Visitor) -> None:
    connections = served.server.server_state.connections
    served.in_loop(lambda: [connection.transport.abort() for connection in list(connections)])


CUTS = {"The model's engine is down.": _engine_dies, "The connection broke in the middle": _connection_breaks}


@pytest.mark.parametrize("words", CUTS)
def test_an_answer_that_is_cut_short_never_looks_whole(browser: Any, words: str) -> None:
    """Catches half an answer that is shown as one: the engine dies in the middle, or the server with its connection."""
    engine = Scripted(hold=True)
    with gateway(engine) as served:
        ada = Visitor(browser, served.url, served.token)
        ada.page.select_option("#second", "")
        ada.send("Hi")
        ada.last(".text").get_by_text("Hel").wait_for()
        CUTS[words](served, ada)
        ada.last(".fault").wait_for()
        assert words in ada.last(".fault").inner_text()
        assert ada.last(".text").inner_text().startswith("Hel")
        assert "about" in ada.last(".figures").inner_text()
        engine.failure = None
        served.in_loop(engine.go_on.set)
        ada.last("button").get_by_text("Try again").click()
        ada.last(".text").get_by_text("Hello!").wait_for()
        assert not ada.last(".fault").is_visible()


def test_an_end_that_nobody_announced_is_no_end(scripted: Gateway, browser: Any) -> None:
    """Catches a stream without [DONE] that counts as whole: a proxy on the way may close it in good order."""
    ada = Visitor(browser, scripted.url, scripted.token)
    chunk = json.dumps({"choices": [{"index": 0, "delta": {"content": "Hel"}, "finish_reason": None}]})
    half = {"status": 200, "content_type": "text/event-stream", "body": f"data: {chunk}\n\n"}
    ada.page.route("**/v1/chat/completions", lambda route: route.fulfill(**half))
    assert ada.ask("Hi") == ["Hel", "Hel"]
    faults = ada.last(".fault").all_inner_texts()
    assert all("The connection ended in the middle of the answer." in text for text in faults), faults


def test_a_server_that_comes_up_is_waited_for(browser: Any) -> None:
    """Catches a page that has to be reloaded once the models are there, or that asks without end."""
    with gateway(Scripted(), drain=Drain()) as served:
        served.parts.drain.ready = False
        ada = Visitor(browser, served.url)
        ada.page.clock.install()
        ada.unlock(served.token)
        ada.shows("The models are being loaded. Trying again every 5 s.")
        served.parts.drain.ready = True
        ada.page.clock.run_for(5000)
        ada.inside()
        assert not ada.page.locator("#notice").is_visible()


# ---------------------------------------------------------------- what a page must not do


class Hostile(Scripted):
    def models(self) -> Sequence[ServedModel]:
        return [MODELS[0], ServedModel(HOSTILE, context=64, parent="scripted")]


def test_texts_of_models_are_never_markup(browser: Any) -> None:
    """Catches a name, an answer or an error that becomes part of the page, where it could read the key."""
    with gateway(Hostile(answer=(HOSTILE[:20], HOSTILE[20:], " \u202eok"))) as served:
        ada = Visitor(browser, served.url, served.token)
        ada.ask(f"{HOSTILE} asked")
        assert ada.page.locator("#second").input_value() == HOSTILE
        assert HOSTILE in ada.last(".text").first.inner_text()
        assert HOSTILE in ada.last("h3").last.inner_text()
        assert HOSTILE[:28] in ada.last(".fault").last.inner_text()
        assert f"{HOSTILE} asked" in ada.page.locator(".asked").inner_text()
        assert ada.page.locator("body :is(img, script, iframe, a:not(.skip))").count() == 0
        assert ada.complaints == []
        for markup in ("document.body.innerHTML = '<b>x</b>'", "document.body.insertAdjacentHTML('beforeend', '<b>')"):
            with pytest.raises(Exception, match="TrustedHTML"):
                ada.page.evaluate(f"() => {{ {markup} }}")
        style = "const s = document.createElement('style'); s.append('body{display:none}'); document.body.append(s)"
        ada.page.evaluate(f"() => {{ {style} }}")
        assert ada.page.locator("#prompt").is_visible()
        assert ada.hosts == {urlsplit(served.url).netloc}


def test_a_phone_shows_all_of_it(scripted: Gateway, browser: Any) -> None:
    """Catches a page wider than the phone, and buttons too small for a finger (WCAG 2.5.8: 24 px)."""
    scripted.engine.answer = ("x" * 3000,)
    phone = {"viewport": {"width": 320, "height": 700}, "has_touch": True, "is_mobile": True}
    ada = Visitor(browser, scripted.url, scripted.token, **phone)
    ada.ask("y" * 300)
    ada.page.locator("summary").tap()
    assert ada.page.evaluate("() => document.documentElement.scrollWidth") <= 320
    for shown in ada.page.locator(":is(button, select, input, textarea, summary):visible").all():
        box = shown.bounding_box()
        assert min(box["width"], box["height"]) >= 24, shown
        assert 0 <= box["x"] <= box["x"] + box["width"] <= 320, shown


def test_the_page_needs_no_key_and_holds_none(scripted: Gateway) -> None:
    """Catches a file that is not served, one that is by accident, and a policy that would let a script in."""
    html = scripted.client.get("/")
    assert (html.status_code, html.headers["content-type"]) == (200, "text/html; charset=utf-8")
    policy = dict(part.strip().split(" ", 1) for part in html.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert {policy[name] for name in ("script-src", "style-src", "img-src", "connect-src")} == {"'self'"}
    assert {policy[name] for name in ("frame-ancestors", "base-uri", "form-action")} == {"'none'"}
    assert html.headers["x-content-type-options"] == "nosniff"
    assert html.headers["referrer-policy"] == "no-referrer"
    assert html.headers.get_list("content-security-policy") == [html.headers["content-security-policy"]]
    assert set(re.findall(r'(?:src|href)="([^"#]+)"', html.text)) == {f"/page/{name}" for name in FIRST}
    assert not re.search(r"<script>|<style|\son\w+=|\sstyle=|https?:", html.text)
    files = {path.name for path in page.FOLDER.iterdir() if path.is_file() and path.suffix != ".py"}
    assert files == {"chat.html", *page.PARTS}
    for name, kind in page.PARTS.items():
        part = scripted.client.get(f"/page/{name}")
        assert (part.status_code, part.headers["content-type"]) == (200, kind)
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|innerHTML|localStorage|sessionStorage", part.text)
    for path in ("/page/", "/page/__init__.py", "/page/chat.html", "/page/..%2fauth.py", "/page/style.css/x"):
        assert scripted.client.get(path).status_code == 404


FIRST = ("chat.js", "icon.svg", "style.css")
"""What the HTML names; the other scripts are imported."""


def test_it_can_be_left_out() -> None:
    """Catches `--no-page` that leaves a part of it."""
    with gateway(Scripted(), page=False) as served:
        assert [served.client.get(path).status_code for path in ("/", "/page/chat.js")] == [404, 404]
