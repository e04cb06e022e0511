"""The card says what the manifest says, warns of what is missing, and lets no name in a manifest write HTML."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whet.data.report.card import count, percent, size_of, write_card
from whet.data.report.statistics import EDGES, Stats
from whet.errors import WhetError

HOSTILE = "\"><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7*7 }}{% raw %}'&amp;"


def drawn_stats(rows: int, *, median: int, seed: int, languages: dict[str, int]) -> Stats:
    """Lengths from a log-normal mixture: what tickets and their answers look like."""
    random = np.random.default_rng(seed)
    lengths = np.exp(np.log(median) + random.choice([0.0, 1.6], rows, p=[0.8, 0.2]) + random.normal(0, 0.55, rows))
    lengths = lengths.astype(np.int64) + 3
    counts = np.bincount(np.searchsorted(EDGES, lengths, side="right") - 1)
    return Stats(
        rows=rows,
        characters=int(lengths.sum()),
        shortest=int(lengths.min()),
        longest=int(lengths.max()),
        lengths={EDGES[i]: int(counts[i]) for i in np.flatnonzero(counts)},
        non_ascii=int(lengths.sum()) // 61,
        replaced=rows // 900,
        damaged=rows // 1500,
        level=6,
        sampled={6: languages},
    )


def demo_manifest() -> dict[str, Any]:
    """A version of a help desk's tickets, as prep describes it."""
    train, heldout = 41_208, 4_573
    return {
        "name": "Help desk tickets",
        "digest": "5be1c0d8a94f" + "7e" * 26,
        "parent": "90cc4a41e6d2" + "1b" * 26,
        "created": "2026-11-29T10:31:07Z",
        "recipe": "c7" * 32,
        "seed": 7,
        "sources": [
            {"source": "tickets/2024.jsonl", "sha256": "1a" * 32, "bytes": 48_120_331, "rows": 31_877, "bad": 12},
            {"source": "tickets/2025.jsonl", "sha256": "2b" * 32, "bytes": 39_004_912, "rows": 25_102, "bad": 31},
            {"source": "faq/answers.csv", "sha256": "3c" * 32, "bytes": 812_004, "rows": 640, "bad": 0},
        ],
        "stages": {
            "read": {"rows": 57_576, "bad": 43, "reasons": {"no answer": 27, "not JSON": 11, "empty": 5}},
            "clean": {"changed": 3_904},
            "redact": {
                "policy": "hipaa-safe-harbor",
                "rows_changed": 22_410,
                "rows_dropped": 96,
                "found": {
                    "EMAIL": 14_310, "PHONE": 11_902, "PERSON": 9_511, "DATE": 7_240, "ADDRESS": 2_118, "MRN": 1_377,
                    "URL": 640, "IP": 312, "SSN": 96, "CARD": 41,
                },
                "modes": {
                    "EMAIL": "placeholder", "PHONE": "placeholder", "PERSON": "pseudonym", "DATE": "generalise",
                    "ADDRESS": "placeholder", "MRN": "pseudonym", "URL": "keep", "IP": "mask", "SSN": "drop",
                    "CARD": "mask", "VIN": "placeholder",
                },
                "not_covered": {
                    "PERSON": "only after titles, greetings and labels; no NER model was given",
                    "LOCATION": "no NER model was given",
                },
            },
            "dedup": {"exact": 7_210, "near": 4_402, "clusters": 5_118, "largest": 388, "threshold": 0.85},
            "split": {"train": train, "eval": heldout, "how": "keyed hash of customer"},
            "leaks": {
                "policy": "drop", "exact": 4, "near": 61, "ngram": 22, "dropped": 87,
                "tasks": ["evals/triage.jsonl"],
            },
        },
        "sides": {
            "train": {
                "rows": train,
                "characters": 38_000_000,
                "statistics": drawn_stats(
                    train, median=420, seed=1, languages={"en": 488, "de": 102, "fr": 41, "es": 9, "und": 17, "zxx": 3}
                ).to_json(),
            },
            "eval": {
                "rows": heldout,
                "characters": 4_100_000,
                "statistics": drawn_stats(
                    heldout, median=400, seed=2, languages={"en": 512, "de": 96, "fr": 50, "und": 12}
                ).to_json(),
            },
        },
        "files": [
            {"name": "train-00000.parquet", "rows": train, "bytes": 14_220_118, "sha256": "4d" * 32},
            {"name": "eval-00000.parquet", "rows": heldout, "bytes": 1_602_441, "sha256": "5e" * 32},
        ],
        "versions": {"whet": "0.1.0"},
    }  # fmt: skip


class Page(HTMLParser):
    """The page's tags, in order, and its text."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.text += " "
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


def card_of(manifest: dict[str, Any], folder: Path) -> Page:
    write_card(manifest, folder / "card.html")
    return Page(folder / "card.html")


def words(page: Page) -> str:
    return re.sub(r"\s+", " ", page.text)


def test_the_card_holds_the_figures(tmp_path: Path):
    text = words(card_of(demo_manifest(), tmp_path))
    for shown in (
        "Help desk tickets", "5be1c0d8a94f", "41,208 training rows", "11,612 duplicates removed", "rows read 57,619",
        "bad rows, in quarantine 43 57,576", "exact duplicates 7,210 50,270", "near duplicates 4,402 45,868",
        "no answer 27 62.8%", "EMAIL placeholder 14,310", "Looked for and not found: VIN.", "keyed hash of customer",
        "4, 61, 22", "evals/triage.jsonl", "48.1 MB", "Training, of 660 rows sampled from 41,208",
        "English (en) 488 73.9%",
    ):  # fmt: skip
        assert shown in text
    assert "do not add up" not in text
    assert "Not covered by redaction These classes of personal data may remain in the rows: LOCATION: no NER" in text
    assert "Found and kept, as the policy says URL: 640" in text


@pytest.mark.parametrize(
    ("change", "notice"),
    [
        ({"redact": None}, "Not redacted"),
        ({"leaks": None}, "The leak gate did not run"),
        (
            {"leaks": {"policy": "warn", "exact": 0, "near": 2, "ngram": 0, "dropped": 0, "tasks": []}},
            "2 of the leaks",
        ),
        ({"dedup": None}, "The stages leave 52,820 training rows, and 41,208 were written."),
    ],
)
def test_what_is_missing_is_said(change: dict[str, Any], notice: str, tmp_path: Path):
    """Catches a card that looks as clean as one whose stages all ran."""
    manifest = demo_manifest()
    manifest["stages"].update(change)
    assert notice in words(card_of(manifest, tmp_path))


def strings_in(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], bool]]:
    """(path, whether it is a key) of each string of the manifest, and each key that is a name: a class, a reason."""
    if isinstance(value, dict):
        for key, item in value.items():
            if path[-1:] and path[-1] in ("reasons", "found", "modes", "not_covered", "versions"):
                yield (*path, key), True
            yield from strings_in(item, (*path, key))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from strings_in(item, (*path, i))
    elif isinstance(value, str):
        yield path, False


@pytest.mark.parametrize(("path", "is_key"), list(strings_in(demo_manifest())), ids=str)
def test_no_name_writes_html(path: tuple[Any, ...], is_key: bool, tmp_path: Path):
    """Catches a place in the template that prints a file's, a class's or a language's name as it is."""
    manifest = demo_manifest()
    place: Any = manifest
    for key in path[:-1]:
        place = place[key]
    if is_key:
        place[HOSTILE] = place.pop(path[-1])
    else:
        place[path[-1]] = HOSTILE
    page = card_of(manifest, tmp_path)
    assert not {"script", "img", "link", "iframe", "object"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "href")]
    assert "49" + "{% raw %}" not in page.text


def test_sources_without_a_size_are_listed(tmp_path: Path):
    """Catches a card that fails for a query, which has rows but no bytes."""
    manifest = demo_manifest()
    manifest["sources"] = [{"source": "SELECT * FROM tickets", "rows": 57_576, "bad": 43}]
    assert "SELECT * FROM tickets 57,576 43" in words(card_of(manifest, tmp_path))


def test_the_page_fetches_nothing(tmp_path: Path):
    write_card(demo_manifest(), tmp_path / "card.html")
    html = (tmp_path / "card.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in html
    assert not re.search(r"https?:|url\(|@import|<script", html)


def test_the_same_manifest_gives_the_same_card(tmp_path: Path):
    """Catches a date, or an order that is not that of the content, in the page."""
    one, two = demo_manifest(), demo_manifest()
    for manifest in (one, two):
        manifest["stages"]["redact"]["found"] |= {"SSN": 41, "IP": 41}  # as many as cards
    two["stages"]["redact"]["found"] = dict(reversed(two["stages"]["redact"]["found"].items()))
    write_card(one, tmp_path / "one.html")
    write_card(two, tmp_path / "two.html")
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()


def test_a_version_without_an_evaluation_side_has_a_card(tmp_path: Path):
    """Catches a division by nothing, and the picture of a side that has no rows."""
    manifest = demo_manifest()
    manifest["sides"]["eval"]["statistics"] = manifest["sides"]["train"]["statistics"] = Stats().to_json()
    manifest["sources"] = manifest["files"] = []
    assert "Evaluation, of 0 rows sampled from 0" in words(card_of(manifest, tmp_path))


@pytest.mark.parametrize(
    "path", [("stages", "leaks", "ngram"), ("stages", "clean", "changed"), ("digest",), ("sides", "eval")]
)
def test_a_manifest_that_lacks_a_part_is_refused(path: tuple[str, ...], tmp_path: Path):
    manifest = copy.deepcopy(demo_manifest())
    place = manifest
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    with pytest.raises(WhetError, match="a part of the manifest is missing"):
        write_card(manifest, tmp_path / "card.html")
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(0, 10**9), min_size=1, max_size=20))
def test_any_lengths_can_be_drawn(lengths: list[int], tmp_path_factory: pytest.TempPathFactory):
    """Catches bars outside the picture, and a logarithm of nothing."""
    counts = np.bincount(np.searchsorted(EDGES, lengths, side="right") - 1)
    stats = Stats(
        rows=len(lengths),
        characters=sum(lengths),
        shortest=min(lengths),
        longest=max(lengths),
        lengths={EDGES[i]: int(counts[i]) for i in np.flatnonzero(counts)},
    )
    manifest = demo_manifest()
    manifest["sides"]["train"]["statistics"] = stats.to_json()
    page = card_of(manifest, tmp_path_factory.mktemp("card"))
    for name, value in page.attributes:
        if name in ("x", "y", "width", "height", "x1", "x2"):
            assert value in ("100%", "none") or 0 <= float(value) <= 760.1


def test_numbers_read_well():
    assert [percent(*pair) for pair in ((1, 3), (0, 5), (1, 10**6), (5, 5), (99_999, 100_000), (1, 0))] == [
        "33.3%", "0.0%", "< 0.01%", "100.0%", "> 99.9%", "n/a",
    ]  # fmt: skip
    assert [size_of(n) for n in (0, 999, 1_000, 48_120_331, 5 * 10**12)] == [
        "0 B",
        "999 B",
        "1 kB",
        "48.1 MB",
        "5,000 GB",
    ]
    assert count(1_234_567) == "1,234,567"
