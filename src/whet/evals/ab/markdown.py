"""An answer's Markdown as a tree of plain lists, from which the page makes elements one by one.

    "text"                            text
    ["p", "text", ["em", "text"]]     an element and what is in it
    ["ol", 3, ["li", "text"]]         a list that is numbered from 3 on
    ["pre", "code"]                   a block of code

Only the elements of `ELEMENTS` come about. HTML, links and pictures stay the text they were written as: nothing an
answer holds can run, load, or lead away from the page.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.tree import SyntaxTreeNode

Tree: TypeAlias = "str | int | list[Tree]"

ELEMENTS = {
    "paragraph": "p", "bullet_list": "ul", "list_item": "li", "blockquote": "blockquote",
    "em": "em", "strong": "strong", "s": "s", "hr": "hr", "hardbreak": "br", "softbreak": "br",
    "table": "table", "thead": "thead", "tbody": "tbody", "tr": "tr", "th": "th", "td": "td",
}  # fmt: skip
HEADINGS = {"h1": "h3", "h2": "h4", "h3": "h5", "h4": "h6", "h5": "h6", "h6": "h6"}
"""An answer's own heading on the page is h2."""

LONGEST = 100_000
"""Characters; a longer answer is shown as it was written."""


def tree(text: str) -> list[Tree] | None:
    """None for a text that is too long."""
    from markdown_it.tree import SyntaxTreeNode

    if len(text) > LONGEST:
        return None
    return [part for node in SyntaxTreeNode(_parser().parse(text)).children for part in _parts(node)]


@cache
def _parser() -> MarkdownIt:
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
    return parser.disable(["link", "image", "autolink", "reference", "html_block", "html_inline"])


def _parts(node: SyntaxTreeNode) -> list[Tree]:
    inside = [part for child in node.children for part in _parts(child)]
    if node.hidden:  # a paragraph of a list without blank lines
        return inside
    if node.type == "ordered_list":
        return [["ol", int(node.attrs.get("start", 1)), *inside]]
    if node.type in ELEMENTS:
        return [[ELEMENTS[node.type], *inside]]
    if node.type == "heading":
        return [[HEADINGS[node.tag], *inside]]
    if node.type in ("fence", "code_block"):
        return [["pre", node.content]]
    if node.type == "code_inline":
        return [["code", node.content]]
    if node.type == "inline":
        return inside
    return [node.content] if node.content else inside
