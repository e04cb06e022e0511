"""The page in Chromium: two graders at once, by keys and by clicks, through a killed server to the study's end."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.browser import chromium
from tests.evals.ab.ab_site import Site
from tests.evals.ab.studies import KIND, PLAIN, SYSTEMS, WORDS, make_study
from tests.evals.ab.wiretap import Wiretap
from whet.evals.ab.answers import read_systems
from whet.evals.ab.study import Study, create, load
from whet.evals.ab.votes import Log, read

ITEMS = 6


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


class Person:
    """Somebody at a browser of their own. sources: the page's source as it was at each step; hosts: those asked."""

    def __init__(self, browser: Any, url: str, token: str, **options: Any):
        self.sources, self.hosts, self.complaints = list[str](), set[str](), list[str]()
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(15_000)
        self.page.on("request", lambda request: self.hosts.add(urlsplit(request.url).netloc))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: self.complaints.append(dialog.message))
        self.page.goto(f"{url}/join#{token}")

    def status(self, text: str) -> None:
        """Wait until the page says so; note its source."""
        self.page.wait_for_function("text => document.getElementById('status')?.textContent.includes(text)", arg=text)
        self.page.wait_for_timeout(300)  # a comparison takes keys after a moment, and a person needs longer
        self.sources.append(self.page.content())

    def message(self, text: str) -> None:
        self.page.get_by_role("heading", name=text).wait_for()

    def key(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    def count(self) -> str:
        return str(self.page.inner_text("#count"))

    def kind_side(self) -> str:
        return "ArrowLeft" if self.page.inner_text("#left").startswith(KIND) else "ArrowRight"


def test_two_graders_from_their_links_to_the_result(tmp_path: Path, browser: Any) -> None:
    """Catches what only a browser shows: keys that do not vote, a page that does not come back, a name that leaks."""
    tokens = make_study(tmp_path, ITEMS)
    folder = tmp_path / "study"
    wire = Wiretap()
    site = Site(folder, ("--url", wire.url)).start()
    wire.target = site.port
    try:
        ada, grace = Person(browser, wire.url, tokens["ada"]), Person(browser, wire.url, tokens["grace"])
        for person in (ada, grace):
            person.status("Comparison 1 of 6.")

        ada.key(ada.kind_side())
        ada.status("Saved. Comparison 2 of 6.")
        grace.page.get_by_role("button", name="Answer 1").click()
        grace.status("Saved. Comparison 2 of 6.")
        ada.key("c")
        ada.page.keyboard.type("sure of it: 1 2 t s u")  # letters that vote elsewhere
        ada.key("Escape", ada.kind_side())
        ada.status("Saved. Comparison 3 of 6.")
        grace.key("t")
        grace.status("Comparison 3 of 6.")
        ada.key("n")
        ada.status("Comparison 4 of 6.")
        ada.key("s")
        ada.status("Comparison 5 of 6.")
        ada.key("u")
        ada.status("Taken back. Comparison 4 of 6.")
        assert ada.count() == "2 of 6 done"

        site.kill()
        ada.key(ada.kind_side())
        ada.status("cannot be reached, and nothing was saved")
        assert ada.count() == "2 of 6 done"
        site.start()
        for _ in range(4):
            ada.key(ada.kind_side())
            ada.page.wait_for_timeout(600)
        ada.message("All done. Thank you.")
        assert ada.count() == "6 of 6 done"
        grace.page.reload()
        grace.status("Comparison 3 of 6.")
        for position in (4, 5, 6):
            grace.page.get_by_role("button", name="Answer 1").click()
            grace.status(f"Comparison {position} of 6.")
        assert grace.count() == "5 of 6 done"

        assert standing_choices(folder)["grace"] == ["left", "tie", "left", "left", "left"]
        owner = Person(browser, wire.url, tokens["owner"])
        owner.page.get_by_role("button", name="Close the study").click()
        nothing_leaked(wire, (ada, grace, owner), load(folder))
        owner.page.get_by_role("button", name="Close it").click()
        owner.page.get_by_role("heading", name=f"{SYSTEMS[1]} against {SYSTEMS[0]}").wait_for()
        grace.page.get_by_role("button", name="Answer 2").click()
        grace.message("The study is closed")

        found = owner.page.evaluate("fetch('/api/owner/results.json').then(answer => answer.json())")
        ballots = [ballot for ballot in found["ballots"] if ballot["grader"] == "ada"]
        assert [ballot["winner"] for ballot in ballots] == [SYSTEMS[1]] * ITEMS
        assert sorted(ballot["comment"] for ballot in ballots)[-1] == "sure of it: 1 2 t s u"
        assert ada.complaints == grace.complaints == owner.complaints == []
    finally:
        site.kill()
        wire.__exit__()


def nothing_leaked(wire: Wiretap, people: Sequence[Person], study: Study) -> None:
    """Not in a byte on the wire, nor in a page's source, nor asked of another host."""
    everything = bytes(wire.heard).lower() + "\n".join(text for person in people for text in person.sources).encode()
    assert everything.count(PLAIN.encode().lower()) > 4 * ITEMS, "the answers themselves are heard"
    for word in (*SYSTEMS, *WORDS, "swap", study.secret.hex()):
        assert word.encode() not in everything.lower(), word
    assert {host for person in people for host in person.hosts} == {urlsplit(wire.url).netloc}


def standing_choices(folder: Path) -> dict[str, list[str]]:
    votes = read(folder / "votes.jsonl", load(folder)).votes
    return {grader: [vote.choice for vote in found.values()] for grader, found in votes.items()}


HOSTILE = (
    "<img src=x onerror=alert(1)><script>alert(2)</script> </div></article> [a](javascript:alert(3)) "
    "![p](https://example.org/p.png)\n\n**bold** {{ 7*7 }} \u202ereversed"
)


@pytest.fixture(scope="module")
def hostile_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, list[str]]]:
    """A study whose answers and prompt are HTML and scripts; its address, and graders' tokens."""
    tmp_path = tmp_path_factory.mktemp("hostile")
    for name, text in (("a", HOSTILE), ("b", "x" * 3000)):
        line = {"id": "1", "prompt": f"{HOSTILE} <b>prompt</b>", "answer": text, "reference": HOSTILE}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(line) + "\n")
    systems = [system for name in "ab" for system in read_systems(tmp_path / f"{name}.jsonl")]
    study = create(tmp_path / "study", systems, title="<i>title</i>", show_reference=True)
    with Log(tmp_path / "study" / "votes.jsonl", study, new=True) as log:
        tokens = [log.add_link("grader", f"grader {i}") for i in range(4)]
    with Site(tmp_path / "study") as site:
        yield site.url, tokens


@pytest.fixture
def hostile(hostile_site: tuple[str, list[str]]) -> tuple[str, str]:
    """The same, with the token of a grader who has not voted yet."""
    url, tokens = hostile_site
    return url, tokens.pop()


def test_answers_are_shown_as_text_and_never_run(hostile: tuple[str, str], browser: Any) -> None:
    """Catches an answer that becomes part of the page: its scripts would run with the grader's cookie."""
    person = Person(browser, *hostile)
    person.status("Comparison 1 of 1.")
    page = person.page
    for formatted in (True, False):
        if page.is_checked("#formatted") != formatted:
            page.click("#menu summary")
            page.click("#formatted")
        assert page.locator("#work :is(img, script, a, iframe, i, b)").count() == 0
        assert page.locator("#work strong").count() == int(formatted)
        shown = page.inner_text("#left") + page.inner_text("#right")
        assert "<img src=x onerror=alert(1)><script>alert(2)</script>" in shown
        assert "[a](javascript:alert(3))" in shown
    assert "<b>prompt</b>" in page.inner_text("#prompt")
    assert page.inner_text("#title") == "<i>title</i>"
    assert person.complaints == []
    assert person.hosts == {urlsplit(hostile[0]).netloc}


def test_a_phone_shows_all_of_it(hostile: tuple[str, str], browser: Any) -> None:
    """Catches a page wider than the phone, and buttons too small for a finger (WCAG 2.5.8: 24 px)."""
    phone = {"viewport": {"width": 360, "height": 700}, "has_touch": True, "is_mobile": True}
    person = Person(browser, *hostile, **phone)
    person.status("Comparison 1 of 1.")
    assert person.page.evaluate("document.documentElement.scrollWidth") <= 360
    for button in person.page.locator("#dock button").all():
        box = button.bounding_box()
        assert min(box["width"], box["height"]) >= 24
        assert 0 <= box["x"] <= box["x"] + box["width"] <= 360
    person.page.get_by_role("button", name="Tie").tap()
    person.message("All done. Thank you.")


def test_a_screen_reader_finds_its_way(hostile: tuple[str, str], browser: Any) -> None:
    """Catches parts without a name or a role: what the accessibility tree lacks, a screen reader cannot say."""
    person = Person(browser, *hostile)
    person.status("Comparison 1 of 1.")
    page = person.page
    for name in ("Prompt 1 of 1", "Answer 1", "Answer 2"):
        assert page.get_by_role("heading", name=name, exact=True).count() == 1
    for name in ("Answer 1", "Answer 2"):
        assert page.get_by_role("article", name=name).count() == 1
    group = page.get_by_role("group", name="Which answer is better?")
    assert [button.get_attribute("aria-pressed") for button in group.get_by_role("button").all()] == ["false"] * 3
    assert page.evaluate("document.activeElement.id") == "prompt-title", "reading begins where the comparison begins"
    assert page.get_by_label("Comment").count() == 1
    page.click("#menu summary")
    page.get_by_label("Go on after each vote").uncheck()
    page.get_by_role("button", name="Tie").click()
    person.status("Saved.")
    assert page.get_by_role("button", name="Tie").get_attribute("aria-pressed") == "true"


def test_shortcuts_can_be_turned_off(hostile: tuple[str, str], browser: Any) -> None:
    """Catches letters that vote while somebody dictates to the browser (WCAG 2.1.4)."""
    person = Person(browser, *hostile)
    person.status("Comparison 1 of 1.")
    person.page.click("#menu summary")
    person.page.uncheck("#keys")
    person.page.locator("#prompt-title").focus()
    person.key("t", "ArrowLeft", "1")
    person.page.wait_for_timeout(200)
    assert person.count() == "0 of 1 done"
