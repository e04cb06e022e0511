"""HTML pages as Markdown: headings, lists, tables and code stay readable; scripts, styles and navigation go.

The converter is html-to-markdown, because it keeps all of a page's text, reads markup that is broken, and is fast.
Extractors of articles (trafilatura, readability) leave out what they take for side matter: parts of most manuals.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from html import unescape
from typing import Any

from whet.data.read.piece import BYTE_ORDER_MARK, Piece, Row, decoded, opened
from whet.errors import WhetError

LARGEST_PAGE = 64 << 20  # bytes

_UNREAD = ("script", "style", "noscript", "template", "svg", "iframe", "nav", "button", "input", "select", "textarea")
_TITLE = re.compile(r"<title(?:\s[^>]*)?>([^<]*)", re.IGNORECASE)
_HEADING = re.compile(r"^#{1,6} +(.+)$", re.MULTILINE)
_CHARSET = re.compile(rb"<meta[^>]{0,200}charset\s*=\s*[\"']?\s*([\w-]{1,40})", re.IGNORECASE)
_KNOWN_CHARSET = re.compile(
    r"iso-8859-\d{1,2}|windows-125\d|latin1|us-ascii|koi8-[ru]|shift_jis|euc-(jp|kr)|gb(k|2312|18030)|big5|utf-16(le|be)?"
)


def read_html(piece: Piece) -> Iterator[Row | WhetError]:
    """One row, {"text": Markdown, "title": what <title> or the first heading says, or ""}."""
    page = _page(piece)
    if not page.strip():
        return
    try:
        text = _converted(page)
    except ValueError as error:
        raise WhetError(str(error), where=piece.source, fix="open it in a browser and save it as text") from error
    if text:
        yield Row({"text": text, "title": _title(page, text)}, piece.source, 1)


def html_to_text(html: str) -> str:
    """A page or a fragment as Markdown; unchanged where it cannot be converted."""
    try:
        return _converted(html)
    except ValueError:
        return html


def _converted(html: str) -> str:
    """Raises ValueError saying why a page cannot be converted."""
    import html_to_markdown as converter

    try:
        result = converter.convert(html.replace("\0", ""), _options())
    except Exception as error:  # its errors have no class of their own in common
        raise ValueError(f"not readable as HTML: {type(error).__name__}") from error
    if any("depth" in str(warning.message).lower() for warning in result.warnings):
        raise ValueError("elements are nested more deeply than can be converted")
    return (result.content or "").strip("\n")


@cache
def _options() -> Any:
    import html_to_markdown as converter

    return converter.ConversionOptions(
        bullets="-",
        newline_style="backslash",  # two spaces at a line's end would be cleaned away
        autolinks=False,
        extract_metadata=False,
        compact_tables=True,
        inline_data_media="alt_text_only",
        exclude_selectors=list(_UNREAD),
        # Forms stay: some servers wrap the whole page in one. Their fields are in the list.
        preprocessing=converter.PreprocessingOptions(enabled=True, preset="minimal", remove_forms=False),
    )


def _title(page: str, text: str) -> str:
    body = page.lower().find("<body")  # pictures in it have titles too
    head = page if body < 0 else page[:body]
    for found in (_TITLE.search(head), _HEADING.search(text)):
        if found and (title := " ".join(unescape(found[1]).split())):
            return title
    return ""


def _page(piece: Piece) -> str:
    """The page's text: UTF-8, or else in the encoding that the page says it is in."""
    with opened(piece) as file:
        raw = file.read(LARGEST_PAGE + 1)
    if len(raw) > LARGEST_PAGE:
        raise WhetError(f"a page of more than {LARGEST_PAGE >> 20} MiB", where=piece.source, fix="cut it into parts")
    try:
        return decoded(raw.removeprefix(BYTE_ORDER_MARK), piece, 1)
    except WhetError:
        if (encoding := _declared_encoding(raw)) is None:
            raise
        try:
            return raw.decode(encoding)
        except UnicodeDecodeError:
            pass
        raise


def _declared_encoding(raw: bytes) -> str | None:
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "utf-16"
    found = _CHARSET.search(raw[:4096])
    name = found[1].decode("ascii").lower() if found else ""
    if not _KNOWN_CHARSET.fullmatch(name):
        return None
    # Browsers read these two as Windows-1252, and so pages are written.
    return "windows-1252" if name in ("iso-8859-1", "latin1", "us-ascii") else name
