"""Text made uniform, without a change of what it says: one spelling of each character, none invisible, no loose space.

    html        tags and entities -> Markdown (off unless asked for: code and maths hold `<` too)
    unicode     text that was decoded wrongly ("cafÃ©" -> "café"), by ftfy; halves of surrogate pairs
    nfc         Unicode normal form C (UAX #15)
    controls    control characters, terminal escapes, zero-width and bidirectional marks where no script needs them
    whitespace  \\n as line end, " " for every space, none at line ends, at most two blank lines, none at the ends

Code keeps its indentation and tabs, emoji and Indic or Persian words their joiners, and special tokens (`<|im_end|>`,
`<｜end▁of▁sentence｜>`) every character. Quotes, dashes, ligatures and full-width letters stay as they were written.

clean(clean(x)) == clean(x) for every x. Let R be all steps, and S all steps but ftfy's, repeated until nothing changes.
S ends, because each of its changes but the first NFC takes a character away that no other step brings back, or shortens
an entity; so S(S(x)) == S(x). R, repeated, nearly always ends too, at y with R(y) == y. ftfy promises no such end, so R
is tried ROUNDS times, from x and then from S(x); failing both the answer is S(x), from which it fails the same way.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from html import unescape
from html.entities import html5

ROUNDS = 8
"""How often ftfy is tried again on its own answer; text that was decoded wrongly five times has not been seen."""

RIGHT_TO_LEFT = "\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc\U00010800-\U00010fff\U0001e800-\U0001efff"
NO_SPACES = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u19e0-\u19ff\u1a20-\u1aaf"
"""Scripts that write words without spaces, so that U+200B tells where a line may break: Thai, Lao, Khmer, Burmese."""

JOINED = "\u0590-\u1dff\u203c\u2049\u2100-\u2bff\u2d30-\ua4ff\ua840-\ufaff\ufb1d-\ufeff\U00010000-\U000dffff"
"""What a joiner may follow: letters of scripts that join, and emoji. Latin, Greek and Cyrillic don't."""

_ESCAPE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b\n]*(?:\x07|\x1b\\)|[@-Z\\^_])")
_LINE_END = re.compile("[\r\x0b\x0c\x85\u2028\u2029]")
_ALWAYS = (
    "\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u2060\ufeff\ufff9-\ufffb\ufdd0-\ufdef\ufffe\uffff\U000e0000-\U000e007f"
)
# Written as one class with conditions behind it: `re` then looks for the class alone, ten times as fast.
_CONTROL = re.compile(
    f"[{_ALWAYS}\u180e\u200b-\u200d](?:(?<=[{_ALWAYS}])|(?<=\u200b)(?<![{NO_SPACES}]\u200b)"
    f"|(?<=[\u200c\u200d])(?<![{JOINED}][\u200c\u200d])|(?<=\u180e)(?<![\u1800-\u18af]\u180e))"
)
_FLAG = re.compile("(\U0001f3f4[\U000e0020-\U000e007e]{1,8}\U000e007f)")  # England, Scotland, Wales: emoji with tags
_DIRECTION = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_RIGHT_TO_LEFT = re.compile(f"[{RIGHT_TO_LEFT}]")
_SPACE = re.compile("[\xa0\u2000-\u200a\u202f\u205f]")
_BLANK_LINES = re.compile("\n{4,}")

_TAGS = (
    "a|abbr|address|article|aside|b|big|blockquote|body|br|button|caption|center|cite|code|col|colgroup|dd|del|details"
    "|dfn|div|dl|dt|em|fieldset|figcaption|figure|font|footer|form|h[1-6]|head|header|hr|html|i|iframe|img|input|ins"
    "|kbd|label|legend|li|link|main|mark|meta|nav|noscript|object|ol|option|p|picture|pre|q|s|samp|script|section"
    "|select|small|span|strike|strong|style|sub|summary|sup|svg|table|tbody|td|textarea|tfoot|th|thead|time|title|tr"
    "|tt|u|ul|var|video"
)
_TAG = re.compile(rf"<(?:/?(?:{_TAGS})(?:[\s/][^<>]*)?>|!--|!doctype\b)", re.IGNORECASE)
_ENTITY = re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")

_ASCII_CONTROL = bytes({*range(0x20), 0x7F} - {*b"\t\n"})


@dataclass(frozen=True)
class Clean:
    """Which steps are taken."""

    unicode: bool = True
    nfc: bool = True
    html: bool = False
    controls: bool = True
    whitespace: bool = True


def clean(text: str, how: Clean = Clean()) -> str:
    """The text after the steps of `how`. Idempotent; see above. Never raises for a str."""
    if _is_clean_ascii(text, how):
        return text
    if not how.unicode:
        return _settled(text, how)
    repaired = _repaired(text, how)
    if repaired is None:
        plain = _settled(text, how)
        repaired = _repaired(plain, how)
        return plain if repaired is None else repaired
    return repaired


def _is_clean_ascii(text: str, how: Clean) -> bool:
    """Whether every step would leave the text as it is, told at the speed of a copy. False may be wrong."""
    if not text.isascii():
        return False
    if how.html and ("<" in text or "&" in text):
        return False
    if how.controls or how.whitespace:
        raw = text.encode("ascii")
        if len(raw.translate(None, _ASCII_CONTROL)) != len(raw):
            return False
    if how.whitespace:
        loose = " \n" in text or "\t\n" in text or "\n\n\n\n" in text
        return not loose and text[:1] != "\n" and text[-1:] not in ("\n", " ", "\t")
    return True


def _repaired(text: str, how: Clean) -> str | None:
    """A text that all steps leave as it is, or None where ROUNDS rounds find none."""
    text = _settled(_decoded_again(text), how)
    for _ in range(ROUNDS):
        decoded = _decoded_again(text)
        if decoded == text:
            return text
        text = _settled(decoded, how)
    return None


def _settled(text: str, how: Clean) -> str:
    """All steps but ftfy's, until nothing changes."""
    steps: list[Callable[[str], str]] = []
    if how.html:
        steps.append(_without_html)
    if how.controls:
        steps.append(_without_controls)
    if how.nfc:
        steps.append(lambda text: unicodedata.normalize("NFC", text))
    if how.whitespace:
        steps.append(_with_even_space)
    while True:
        before = text
        for step in steps:
            text = step(text)
        if text == before:
            return text


# ---------------------------------------------------------------- the steps


def _decoded_again(text: str) -> str:
    """Line by line, as ftfy does: one line that was pasted from elsewhere says nothing about the others."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if text.isascii() or not (suspect := suspects()).search(text):
        return text
    from ftfy import TextFixerConfig, fix_encoding

    config = TextFixerConfig(explain=False)
    lines = text.split("\n")
    return "\n".join(fix_encoding(line, config) if suspect.search(line) else line for line in lines)


@cache
def suspects() -> re.Pattern[str]:
    """Found in every text that ftfy takes for misread (`is_bad`), at ten times the speed; and in some others.

    What ftfy looks for holds a control character of Latin-1, one of `ŒœÃÂЂ`, or a character of its lists beside another
    one beyond ASCII. Its lists of plain letters and of dashes are left out: each rule with them has another character.
    """
    from ftfy.badness import MOJIBAKE_CATEGORIES

    left_out = ("c1", "common", "lower_common", "upper_common")
    listed = "".join(members for name, members in MOJIBAKE_CATEGORIES.items() if name not in left_out)
    alone, beyond = "\x80-\x9fŒœÃÂЂ", "[^\x00-\x7f]"
    return re.compile(f"{beyond}(?:(?<=[{alone}])|(?<=[{listed}]){beyond}|(?<={beyond})[{listed}])")


def _without_controls(text: str) -> str:
    if "\x1b" in text:
        text = _ESCAPE.sub("", text)
    if text.isascii():
        return _CONTROL.sub("", text)
    # Every second part is a flag, kept whole.
    parts = _FLAG.split(text)
    parts[::2] = [_CONTROL.sub("", part) for part in parts[::2]]
    text = "".join(parts)
    if _DIRECTION.search(text) and not _RIGHT_TO_LEFT.search(text):
        text = _DIRECTION.sub("", text)
    return text


def _with_even_space(text: str) -> str:
    text = _LINE_END.sub("\n", text.replace("\r\n", "\n"))
    if not text.isascii():
        text = _SPACE.sub(" ", text)
    if " \n" in text or "\t\n" in text:
        text = "\n".join(line.rstrip(" \t") for line in text.split("\n"))
    if "\n\n\n\n" in text:
        text = _BLANK_LINES.sub("\n\n\n", text)
    return text.rstrip(" \t\n").lstrip("\n")


def _without_html(text: str) -> str:
    """Tags become Markdown, entities their characters. What would read as a tag afterwards is written &lt;."""
    if _TAG.search(text):
        from whet.data.read.html_files import html_to_text

        text = html_to_text(text)
    if "&" in text:
        text = _ENTITY.sub(_character, text)
    return _TAG.sub(lambda tag: "&lt;" + tag[0][1:], text)


def _character(entity: re.Match[str]) -> str:
    name = entity[0][1:]
    return unescape(entity[0]) if name.startswith("#") else html5.get(name, entity[0])
