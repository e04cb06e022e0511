"""Strings that tell tokenizers apart: many scripts, code, blanks, emoji, control characters, special tokens in text."""

# ruff: noqa: RUF001 - look-alike characters are the point here

from __future__ import annotations

import functools
import random

_WORDS = {
    "Latin": "Hello world naïve café Ünïcödé straße İstanbul coöperate ĲSSEL Łódź Đặng ĳs ﬁne ǅungla",
    "Greek and Cyrillic": "Ελλάδα γράμμα ΣΊΣΥΦΟΣ русский язык МОСКВА ёлка Їжак",
    "Armenian and Georgian": "Հայերեն բարեւ ქართული საქართველო ᲥᲐᲠᲗᲣᲚᲘ",
    "Hebrew": "עברית שלום שָׁלוֹם",
    "Arabic": "عربي مرحبا بِسْمِ اللَّهِ فارسی اردو",
    "Indic": "हिन्दी नमस्ते বাংলা தமிழ் తెలుగు ಕನ್ನಡ മലയാളം ਪੰਜਾਬੀ සිංහල",
    "South-East Asian": "ไทยภาษา ที่นี่ ລາວ ខ្មែរ မြန်မာ",
    "East Asian": "日本語のテキスト 中文字符 漢字カタカナ ｶﾅ ひらがな 한국어 조선말 注音ㄅㄆㄇ 𠮷野家 々〆",
    "other": "አማርኛ ᏣᎳᎩ ᐃᓄᒃᑎᑐᑦ ᚠᚢᚦ བོད་ཡིག ߒߞߏ 𐐀𐐁𐐨 𝔘𝔫𝔦 Tiếng Việt",
    "English": "don't it's we'll I'VE they'RE you'd 'tis O'Neill rock'n'roll HTTPServer camelCaseWord snake_case SHOUT",
    "numbers": "0 7 42 345 6789 12345678901 3.14159 1,000,000 0x7fFF 1e-5 ½ ² Ⅻ ٣٤٥ १२३ ①② ３４５ 𝟘𝟙 x1y2",
    "marks": "... -- => != && || ?! … — “q” ‘s’ «g» ¿que? (a) [b] {c} <d> /* */ // # @x $y 50% £3 €4 ~^` ™ ∑∞≠ ° ´ ¨ ·",
    "emoji": "🙂 👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪 ❤️ 1️⃣ ☃ ⚙️",
}
_CODE = (
    "def f(x, *, y=None):\n    return x[0] + y['k']  # sum\n",
    "for (int i = 0; i < n; ++i) {\n\tsum += a[i] * b[i];\n}\n",
    "SELECT name, COUNT(*) FROM t WHERE x >= 10 GROUP BY name;\r\n",
    '<a href="https://example.com/?q=1&r=%20">link</a>',
    "\\frac{a}{b} \\\\ $x^2$ \\n",
    '{"key": [1, 2.5, null], "nested": {"a": "b\\u00e9"}}',
    "    four\n        eight\n\t\ttabs\n",
    "path\\to\\file C:\\Windows ../../etc /usr/bin/env",
)
_BLANKS = (
    *(" " * n for n in (1, 1, 1, 2, 3, 4, 7, 8, 16, 33)),
    *("\n" * n for n in (1, 2, 3, 5, 33)),
    *("\t" * n for n in (1, 2, 4)),
    *("\r\n", "\r", " \n", "\n ", "  \n  ", "\t\n", " \t ", "\v", "\f"),
    *("\u00a0", "\u2003", "\u3000", "\u2009\u200a", "\u202f", "\u205f", "\u1680", "\u2028", "\u2029", "\u0085"),
)
_ODD = (
    *(chr(code) for code in (1, 2, 7, 8, 14, 27, 28, 31, 127, 128, 159)),
    *("\u00ad", "\u200b", "\u200d", "\u200e", "\u2060", "\ufeff", "\ufffd", "\ue000", "\U000f0000", "\u0378"),
    *("e\u0301", "\u0301", "\u093f", "\u0e34", "\u20dd", "\u3099", "\ufe0f"),
    *(
        "aaaaaaaaaaaaaaaaaaaa",
        "!!!!!!!!!!!!",
        "0000000000",
        "ababababab",
        "........",
        "<|",
        "|>",
        "</",
        "[/",
        "<unk",
        "<0x0A>",
    ),
)


@functools.lru_cache(maxsize=8)
def strings(count: int = 2000, seed: int = 0, special: tuple[str, ...] = ()) -> tuple[str, ...]:
    """`count` different strings, the same for the same arguments.

    special: tokens to put into one string of three, between other text and beside each other.
    "▁" is in none of them: in SentencePiece's kind of vocabulary it means a blank.
    """
    rng = random.Random(seed)
    found = dict.fromkeys([*_WORDS.values(), *_CODE, *_BLANKS, *_ODD])
    while len(found) < count:
        text = "".join(_piece(rng) for _ in range(rng.randint(1, 9)))
        if special and rng.random() < 1 / 3:
            text = _with_special(rng, text, special)
        found[text] = None
    return tuple(found)[:count]


def _piece(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.35:
        return rng.choice(_BLANKS)
    if kind < 0.42:
        return rng.choice(_ODD)
    if kind < 0.47:
        return rng.choice(_CODE)
    words = rng.choice(list(_WORDS.values())).split(" ")
    return rng.choice(["", " ", ""]).join(rng.sample(words, rng.randint(1, 3)))


def _with_special(rng: random.Random, text: str, special: tuple[str, ...]) -> str:
    for _ in range(rng.randint(1, 3)):
        at = rng.choice([0, len(text), rng.randint(0, len(text))])
        text = text[:at] + rng.choice(special) + text[at:]
    return text
