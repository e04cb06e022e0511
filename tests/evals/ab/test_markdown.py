"""Markdown as a tree: a page can only make of it what `answer.js` knows by name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from whet.evals.ab import markdown
from whet.evals.ab.markdown import tree

SCRIPT = Path(markdown.__file__).parent / "pages" / "answer.js"
KNOWN = set(re.findall(r'"(\w+)"', re.search(r"new Set\(\[(.*?)\]\)", SCRIPT.read_text(), re.S)[1]))  # type: ignore[index]


def elements(part: object) -> Iterator[str]:
    if isinstance(part, list):
        yield part[0]
        for inside in part[1:]:
            yield from elements(inside)


def text(part: object) -> str:
    return part if isinstance(part, str) else "".join(map(text, part[1:])) if isinstance(part, list) else ""


def test_what_people_write_is_formatted() -> None:
    assert tree("# Head\n\na **b** `c`\nd\n\n3. x\n4. y\n\n```py\n<b>\n```") == [
        ["h3", "Head"],
        ["p", "a ", ["strong", "b"], " ", ["code", "c"], ["br"], "d"],
        ["ol", 3, ["li", "x"], ["li", "y"]],
        ["pre", "<b>\n"],
    ]


def test_html_links_and_pictures_stay_text() -> None:
    """Catches an answer that runs a script, loads a picture from elsewhere, or leads the grader away."""
    for written in ("<img src=x onerror=alert(1)>", "<script>alert(1)</script>", "[a](javascript:alert(1))",
                    "![a](http://example.org/a.png)", "<http://example.org>", "[r]: http://example.org"):  # fmt: skip
        assert tree(written) == [["p", written]]


PIECES = st.sampled_from(["*", "_", "`", "```\n", "\n\n", "\n", "- ", "1. ", "> ", "# ", "|a|b|\n|-|-|\n", "<b>", "~~",
                          "[x](y)", "![x](y)", "\\", "&amp;", "&#xD800;", "word", " ", "    "])  # fmt: skip


@settings(deadline=None)
@given(st.lists(PIECES, max_size=30).map("".join))
def test_any_text_gives_known_elements_and_keeps_its_words(written: str) -> None:
    """Catches an element that the page does not know, and words that vanish in the formatting."""
    made = tree(written)
    assert made is not None
    assert {name for part in made for name in elements(part)} <= KNOWN
    assert "".join(map(text, made)).count("word") == written.count("word")
    "".join(map(text, made)).encode()


def test_deep_nesting_is_no_fault() -> None:
    assert tree("> " * 5000 + "x") is not None
    assert tree("*" * 20_000) is not None


def test_a_very_long_text_is_not_formatted() -> None:
    assert tree("x" * (markdown.LONGEST + 1)) is None
