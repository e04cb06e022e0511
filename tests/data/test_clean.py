"""Cleaning: it mends what is broken, leaves everything else, and has nothing left to do the second time."""

# ruff: noqa: RUF001 (letters of many scripts are what this is about)
from __future__ import annotations

import itertools
import re
import unicodedata

import pytest
from ftfy.badness import BADNESS_RE, is_bad
from hypothesis import example, given, settings
from hypothesis import strategies as st

from whet.data.clean import Clean, clean, suspects

ANY = st.characters(exclude_categories=[])
TROUBLE = st.sampled_from(
    "\r\n \t\xa0\u2028\x85\x00\u200b\u200c\u200d\ufeff\u202e\u061c\u0301\u0344\u2126\u0958\ufb1d"
) | (
    st.sampled_from("\ufb1d\xad\ufe0f\U000e0067\U000e007fÃâ€™\x9dÂÐ¡‰\ufffdã\ud83d\ude00👩🏴مक्ក<>bp&-`;#")
    | st.sampled_from(["\x1b[31m", "<b>", "</p>", "<!--", "-->", "&lt;", "&amp;", "&#60;", "&#8203;", "#60;", "amp;"])
)
TEXTS = st.lists(TROUBLE | ANY, max_size=25).map("".join) | st.text(ANY)
MISREAD = st.sampled_from(["latin-1", "cp1252", "cp1251", "cp437", "mac-roman"])
STEPS = [Clean(*flags) for flags in itertools.product([False, True], repeat=5)]


@settings(deadline=None, max_examples=300)
@given(text=TEXTS, how=st.sampled_from(STEPS))
@example(text="<\u200bb>x", how=Clean(html=True))
@example(text="e\u200b\u0301", how=Clean())
@example(text="Ã\x83Â\x83Ã\x82Â©", how=Clean())
def test_nothing_is_left_to_do(text: str, how: Clean):
    """Catches steps that make work for each other: a mark that composes once what stood between is gone."""
    once = clean(text, how)
    assert clean(once, how) == once


@settings(deadline=None, max_examples=150)
@given(text=st.text(min_size=1), codecs=st.lists(MISREAD, min_size=1, max_size=3))
def test_nothing_is_left_to_do_on_text_decoded_wrongly(text: str, codecs: list[str]):
    """Catches ftfy, which finds more to mend in what it has mended."""
    for codec in codecs:
        text = text.encode("utf-8", "replace").decode(codec, "replace")
    once = clean(text)
    assert clean(once) == once


LISTED = st.sampled_from(sorted(set(re.findall(r"[^\x00-\x7f]", BADNESS_RE.pattern))))


@settings(deadline=None, max_examples=400)
@given(text=st.lists(LISTED | LISTED | ANY | st.sampled_from(" aZ.,!\x80\xa0ÃÂВГРСØÙ"), max_size=6).map("".join))
def test_no_misread_text_is_passed_over(text: str):
    """Catches a version of ftfy that looks for more than the expression that spares asking it."""
    if is_bad(text):
        assert suspects().search(text)


@settings(deadline=None, max_examples=200)
@given(text=TEXTS)
def test_what_comes_out_can_be_written(text: str):
    """Catches halves of surrogate pairs, which no file and no tokenizer takes, and text that is not in form C."""
    once = clean(text)
    once.encode("utf-8")
    assert unicodedata.is_normalized("NFC", once)
    assert not any(character in once for character in "\r\x00\x1b\x7f\x85\ufeff\u2028\xa0")


KEPT = {
    "code": "def f(x):\n\tif x < 1 and x > 0:\n\t\treturn {'a': [1, 2]}  # why\n\n\nclass A:\n    pass",
    "C++": "std::vector<int> v; a = b << 2 & 0xff; &amp; stays; <b>too</b>",
    "maths": "∀ε>0 ∃δ: |x−a|<δ ⇒ |f(x)−L|<ε; ∫₀^∞ e^{−x²} dx = √π⁄2; 𝔸 ⊂ ℝⁿ; ½ ﬁ ①",
    "Markdown": "# T\n\n- a\n  - b\n\n| a | b |\n|---|---|\n| 1 |   2 |\n\n```py\n    x\n```",
    "quotes": "“Curly” ‘quotes’, en – em — dashes… «guillemets»",
    "family": "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 ❤️‍🔥 1️⃣ 🇩🇪",
    "England": "🏴󠁧󠁢󠁥󠁮󠁧󠁿 won",
    "Persian": "می‌خواهم کتاب‌ها را",
    "Hindi": "क्‍ष श्री न्‍",
    "Hebrew": "\u200fשלום (a)\u200f, \u2067abc\u2069",
    "Arabic": "ه\u200d = هـ؛ السَّلَامُ عَلَيْكُمْ",
    "Thai": "ภาษา\u200bไทย",
    "Chinese": "你好，世界！「全角」　ＡＢＣ",
    "Japanese": "カタカナ ｶﾀｶﾅ １２３",
    "Russian": "Привет, мир! Ёлка",
    "French": "Où est l’été ? Ça, naïf, œuvre",
    "tokens": "<|im_start|>user\nHi<|im_end|>\n<｜begin▁of▁sentence｜>[INST] <s></s> <think>\n</think> <0x0A>",
    "escapes": r"\n \u00e9 %20 &nbsp; \\server\share C:\new",
}


@pytest.mark.parametrize("name", KEPT)
def test_what_is_right_stays(name: str):
    assert clean(KEPT[name]) == KEPT[name]


@pytest.mark.parametrize(
    ("broken", "mended"),
    [
        ("cafÃ© dâ€™Ã©tÃ©", "café d’été"),
        ("schÃ¶n\nplain\nÃ¼ber", "schön\nplain\nüber"),
        ("ÃƒÂ© twice: l\u00c3\u00a9gende", "é twice: légende"),
        ("\ud83d\ude00 \ud800", "😀 \ufffd"),
        ("e\u0301te\u0301", "été"),
        ("j\u200bohn\u200c@ex\u200dam\xadple.\u2060com\ufeff", "john@example.com"),
        ("user\u202etxt.exe\u202c", "usertxt.exe"),
        ("a\U000e0041\U000e0042b 🏴x", "ab 🏴x"),
        ("\x1b[1;31mred\x1b[0m\x07 \x00nul\x7f \x1b]0;title\x07ok", "red nul ok"),
        ("a\r\nb\rc\x0bd\x0ce\u2028f\u2029g", "a\nb\nc\nd\ne\nf\ng"),
        ("well\x85 \x93so\x94", "well… “so”"),
        ("a \t\n  b  \n\n\n\n\n\nc\n \t\n", "a\n  b\n\n\nc"),
        ("\n \n    indented", "    indented"),
        ("10\xa0000\u202f€\u2009x", "10 000 € x"),
        ("", ""),
        (" \n\t", ""),
    ],
)
def test_what_is_broken_is_mended(broken: str, mended: str):
    assert clean(broken) == mended


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("<p>Hello<br>big <b>world</b></p><p>x &lt; y &amp; z</p>", "Hello\\\nbig **world**\n\nx < y & z"),
        ("<ul><li>one</li><li>two</li></ul><script>alert('x')</script>", "- one\n- two"),
        ("<pre><code>def f(x):\n    return x &lt; 1\n</code></pre>", "```\ndef f(x):\n    return x < 1\n```"),
        ("AT&amp;T &copy; &eacute; &#8364; &nosuch; R&D ?a=1&copy=2", "AT&T © é € &nosuch; R&D ?a=1&copy=2"),
        ("write &lt;b&gt; for bold", "write &lt;b> for bold"),
        ("if a < b and c > d:\n    x", "if a < b and c > d:\n    x"),
        ("vector<int> x; <|im_end|> <think>", "vector<int> x; <|im_end|> <think>"),
    ],
)
def test_html_becomes_text(html: str, text: str):
    assert clean(html, Clean(html=True)) == text


def test_each_step_can_be_left_out():
    broken = "cafÃ© e\u0301 \x07<b>x</b>  \n"
    assert clean(broken, Clean(False, False, False, False, False)) == broken
    assert clean(broken, Clean(unicode=False)) == "cafÃ© é <b>x</b>"
    assert clean(broken, Clean(nfc=False)) == "café e\u0301 <b>x</b>"
    assert clean(broken, Clean(controls=False)) == "café é \x07<b>x</b>"
    assert clean(broken, Clean(whitespace=False)) == "café é <b>x</b>  \n"


def test_clean_ascii_is_returned_as_it_is():
    """Catches a fast path that is never taken, or makes a copy."""
    text = "def f(x):\n\treturn x < 1  # <b>&amp;\n" * 100 + "end"
    assert clean(text) is text


@settings(deadline=None, max_examples=300)
@given(text=st.text(st.characters(max_codepoint=127), max_size=30), how=st.sampled_from(STEPS))
def test_the_fast_path_decides_nothing(text: str, how: Clean):
    """Catches a fast path that lets through what the steps would change: a letter beyond ASCII takes the slow one."""
    assert clean(text + "x", how) + "ж" == clean(text + "xж", how)


def test_long_lines_of_spaces_take_no_square_time():
    """Catches expressions that try every start of a run of spaces; this would run for hours."""
    text = (" " * 1_000_000 + "x\xa0" + "\n" * 1_000_000 + "\t" * 1_000_000) * 2 + "ж"
    assert clean(text).count("x") == 2
