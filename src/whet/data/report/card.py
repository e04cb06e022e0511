"""The data card: one web page that says what is in a version of a data set and how it came to be.

It is drawn from the manifest alone, which holds counts, names of files and names of classes, so that a card can be
handed to an auditor without the data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from whet.data.report.statistics import NO_LANGUAGE, UNSURE, Stats
from whet.errors import WhetError
from whet.pages import write_page
from whet.pages.numbers import count, percent, size_of

Manifest = Mapping[str, Any]

SHOWN = 12
"""Languages, and reasons of bad rows, that are listed by name; the rest are summed up."""

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)

LANGUAGE_NAMES = {
    UNSURE: "not sure", NO_LANGUAGE: "no language",
    "ar": "Arabic", "bg": "Bulgarian", "bn": "Bengali", "ca": "Catalan", "cs": "Czech", "da": "Danish",
    "de": "German", "el": "Greek", "en": "English", "es": "Spanish", "et": "Estonian", "eu": "Basque",
    "fa": "Persian", "fi": "Finnish", "fr": "French", "gl": "Galician", "gu": "Gujarati", "he": "Hebrew",
    "hi": "Hindi", "hr": "Croatian", "hu": "Hungarian", "id": "Indonesian", "is": "Icelandic", "it": "Italian",
    "ja": "Japanese", "ko": "Korean", "lb": "Luxembourgish", "lt": "Lithuanian", "lv": "Latvian", "mr": "Marathi",
    "ms": "Malay", "nl": "Dutch", "nn": "Norwegian Nynorsk", "no": "Norwegian", "pl": "Polish", "pt": "Portuguese",
    "ro": "Romanian", "ru": "Russian", "sk": "Slovak", "sl": "Slovenian", "sr": "Serbian", "sv": "Swedish",
    "ta": "Tamil", "te": "Telugu", "th": "Thai", "tr": "Turkish", "uk": "Ukrainian", "ur": "Urdu", "vi": "Vietnamese",
    "zh": "Chinese",
}  # fmt: skip


@dataclass(frozen=True)
class Notice:
    """What a reader must not miss. level: alarm or warn, as the style names it."""

    level: str
    title: str
    text: str = ""
    items: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Step:
    """One stage of the way from rows read to training rows. removed: rows that it took out; left: after it."""

    name: str
    removed: int
    left: int


@dataclass(frozen=True)
class Bar:
    """percent: of the longest bar, for drawing."""

    label: str
    count: int
    share: str
    percent: float
    note: str = ""


@dataclass(frozen=True)
class Side:
    """lengths: the shortest, those at QUANTILES, and the longest."""

    name: str
    title: str
    stats: Stats
    lengths: Sequence[int | None]
    languages: Sequence[Bar]


@dataclass(frozen=True)
class Chart:
    """The lengths of both sides in a picture of WIDTH by HEIGHT units.

    bars: x, y, width and height of each bar of the training side. outline: the path of the evaluation side.
    ticks: x and text. top: the share of rows at the highest point.
    """

    bars: Sequence[tuple[float, float, float, float]]
    outline: str
    ticks: Sequence[tuple[float, str]]
    top: str


TEMPLATE = Path(__file__).with_name("card.html.jinja")
WIDTH, HEIGHT, FLOOR = 760, 210, 180


def write_card(manifest: Manifest, path: Path) -> None:
    """Write the card of the version that `manifest` describes, as one HTML file. Raises WhetError for a manifest that
    lacks a part."""
    try:
        write_page(path, TEMPLATE, title=f"Data card: {manifest['name']}", **_view(manifest))
    except (KeyError, TypeError, AttributeError, jinja2.UndefinedError) as error:
        raise WhetError(
            f"a part of the manifest is missing or of a wrong kind: {error}",
            where="manifest.json",
            fix="make the version again with whet prep",
        ) from error


def _view(manifest: Manifest) -> dict[str, Any]:
    stages = manifest["stages"]
    steps = _funnel(manifest)
    sides = [_side(name, title, manifest) for name, title in (("train", "training"), ("eval", "evaluation"))]
    return {
        "manifest": manifest,
        "stages": stages,
        "digest": str(manifest["digest"])[:12],
        "tiles": _tiles(manifest),
        "notices": _notices(manifest, steps),
        "steps": steps,
        "reasons": _bars(stages["read"].get("reasons") or {}),
        "redactions": _redactions(stages["redact"]),
        "not_found": _not_found(stages["redact"]),
        "sides": sides,
        "sized": all("bytes" in source for source in manifest["sources"]),  # queries and streams have no size
        "quantiles": QUANTILES,
        "chart": _chart([side.stats for side in sides]),
        "size": (WIDTH, HEIGHT, FLOOR),
        "count": count,
        "percent": percent,
        "size_of": size_of,
    }


# ---------------------------------------------------------------- parts of the page


def _tiles(manifest: Manifest) -> list[tuple[str, str]]:
    stages = manifest["stages"]
    split, redact, dedup, leaks = (stages[name] for name in ("split", "redact", "dedup", "leaks"))
    found = sum((redact or {}).get("found", {}).values())
    return [
        (count(split["train"]), "training rows"),
        (count(split["eval"]), "evaluation rows"),
        (count(found) if redact else "none", "personal data found" if redact else "redaction"),
        (
            count(dedup["exact"] + dedup["near"]) if dedup else "not sought",
            "duplicates removed" if dedup else "duplicates",
        ),
        (count(_leaks_found(leaks)) if leaks else "not run", "leaks found" if leaks else "leak gate"),
    ]


def _leaks_found(leaks: Mapping[str, Any]) -> int:
    """Training rows that leak, each counted by the plainest way in which it does."""
    return int(leaks["exact"] + leaks["near"] + leaks["ngram"])


def _funnel(manifest: Manifest) -> list[Step]:
    """From all rows read, bad ones among them, to the training side."""
    stages = manifest["stages"]
    read, split = stages["read"], stages["split"]
    redact, dedup, leaks = (stages[name] or {} for name in ("redact", "dedup", "leaks"))
    removals = [
        ("bad rows, in quarantine", read["bad"]),
        ("dropped by redaction", redact.get("rows_dropped", 0)),
        ("exact duplicates", dedup.get("exact", 0)),
        ("near duplicates", dedup.get("near", 0)),
        ("near duplicates across the split", split.get("straddling", 0)),
        ("leaks, dropped", leaks.get("dropped", 0)),
        ("held out for evaluation", split["eval"]),
    ]
    left = read["rows"] + read["bad"]
    steps = [Step("rows read", 0, left)]
    for name, removed in removals:
        left -= removed
        steps.append(Step(name, removed, left))
    return [*steps, Step("training rows", 0, left)]


def _notices(manifest: Manifest, steps: Sequence[Step]) -> list[Notice]:
    stages = manifest["stages"]
    redact, leaks = stages["redact"], stages["leaks"]
    notices = []
    if redact is None:
        notices.append(Notice("alarm", "Not redacted", "No personal data was looked for in this version."))
    else:
        if redact["not_covered"]:
            notices.append(_not_covered(redact))
        if kept := _kept(redact):
            notices.append(Notice("warn", "Found and kept, as the policy says", items=kept))
    if leaks is None:
        text = "Training rows were not compared with the evaluation rows."
        notices.append(Notice("warn", "The leak gate did not run", text))
    elif _leaks_found(leaks) > leaks["dropped"]:
        text = f"{count(_leaks_found(leaks) - leaks['dropped'])} of the leaks found are still in the training rows."
        notices.append(Notice("alarm", "Evaluation rows leak into training", text))
    expected, written = steps[-1].left, stages["split"]["train"]
    if expected != written:
        text = f"The stages leave {count(expected)} training rows, and {count(written)} were written."
        notices.append(Notice("alarm", "The counts do not add up", text))
    return notices


def _not_covered(redact: Mapping[str, Any]) -> Notice:
    text = "These classes of personal data may remain in the rows:"
    return Notice("alarm", "Not covered by redaction", text, sorted(redact["not_covered"].items()))


def _kept(redact: Mapping[str, Any]) -> list[tuple[str, str]]:
    modes = redact["modes"]
    return [(name, count(n)) for name, n in sorted(redact["found"].items()) if n and modes.get(name) == "keep"]


def _redactions(redact: Mapping[str, Any] | None) -> list[Bar]:
    if redact is None:
        return []
    found = {name: n for name, n in redact["found"].items() if n}
    return _bars(found, shown=len(found), notes=redact["modes"])


def _not_found(redact: Mapping[str, Any] | None) -> list[str]:
    return [] if redact is None else sorted(name for name in redact["modes"] if not redact["found"].get(name))


def _bars(counts: Mapping[str, int], *, shown: int = SHOWN, notes: Mapping[str, str] | None = None) -> list[Bar]:
    """The most frequent first, equal ones by name; past `shown`, one bar for the others."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    listed, others = ordered[:shown], ordered[shown:]
    if others:
        listed.append((f"{len(others)} others", sum(n for _, n in others)))
    total = sum(counts.values())
    longest = max((n for _, n in listed), default=0) or 1
    return [Bar(name, n, percent(n, total), 100 * n / longest, (notes or {}).get(name, "")) for name, n in listed]


def _side(name: str, title: str, manifest: Manifest) -> Side:
    stats = Stats.from_json(manifest["sides"][name]["statistics"])
    languages: dict[str, int] = {}
    for code, n in stats.languages.items():
        known = LANGUAGE_NAMES.get(code)
        label = code if known is None else known if code in (UNSURE, NO_LANGUAGE) else f"{known} ({code})"
        languages[label] = n
    lengths = [stats.shortest, *(stats.quantile(share) for share in QUANTILES), stats.longest]
    return Side(name, title, stats, lengths, _bars(languages))


# ---------------------------------------------------------------- the picture of lengths


def _chart(sides: Sequence[Stats]) -> Chart | None:
    """Share of each side's rows by length. Bars are equally wide on a log axis, and of both sides the same."""
    edges = [edge for side in sides for edge in side.lengths]
    if not edges:
        return None
    per_octave = _per_octave(min(edges), max(edges))
    shares = [_shares(stats, per_octave) for stats in sides]
    bins = [i for side in shares for i in side]
    first, last = min(bins), max(bins) + 1
    highest = max(share for side in shares for share in side.values())

    def x(i: float) -> float:
        return round(WIDTH * (i - first) / (last - first), 1)

    def y(share: float) -> float:
        return round(FLOOR - (FLOOR - 20) * share / highest, 1)

    train, heldout = shares
    bars = [(x(i) + 1, y(train[i]), x(i + 1) - x(i) - 2, FLOOR - y(train[i])) for i in sorted(train)]
    outline = ""
    if heldout:
        outline = f"M{x(first)} {FLOOR}"
        outline += "".join(f"V{y(heldout.get(i, 0))}H{x(i + 1)}" for i in range(first, last)) + f"V{FLOOR}"
    ticks = [
        (x(per_octave * math.log2(number)), _short(number))
        for number in _round_numbers(2 ** (first / per_octave), 2 ** (last / per_octave))
    ]
    return Chart(bars, outline, ticks, percent(highest, 1))


def _per_octave(lowest: int, highest: int) -> int:
    """Bars an octave: more on a short axis, as long as a bar is wider than one character."""
    octaves = math.log2(max(highest, 1) / max(lowest, 1))
    for bars, most_octaves, least in ((8, 4, 12), (4, 7, 6)):
        if octaves <= most_octaves and lowest >= least:
            return bars
    return 2


def _shares(stats: Stats, per_octave: int) -> dict[int, float]:
    """i -> share of rows whose length is in [2^(i/n), 2^((i+1)/n)); half a character makes up for rounded edges."""
    shares: dict[int, float] = {}
    for edge, n in stats.lengths.items():
        i = math.floor(per_octave * math.log2(edge + 0.5)) if edge else 0
        shares[i] = shares.get(i, 0) + n / stats.rows
    return shares


def _round_numbers(lowest: float, highest: float) -> list[int]:
    """At most about ten: 1, 10, 100 on a long axis; 1, 2, 5, 10 on a shorter one; all multiples on a short one."""
    ratio = highest / lowest
    digits = range(1, 10) if ratio < 12 else (1, 2, 5) if ratio < 2000 else (1,)
    numbers = [digit * 10**power for power in range(13) for digit in digits]
    return [number for number in numbers if lowest <= number <= highest]


def _short(number: int) -> str:
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number // size}{unit}"
    return str(number)
