"""Counts merge exactly, in any order and grouping, and say of the texts what is true of them."""

from __future__ import annotations

import json
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whet.data.report import statistics
from whet.data.report.statistics import EDGES, SAMPLE, Stats, language, of_batch
from whet.errors import WhetError

TEXTS = st.lists(
    st.text(max_size=40) | st.sampled_from(["", "yes", "\ufffd?", "Ça va bien, merci.", "\ud800"]), max_size=25
)
SENTENCES = {
    "en": "My router has been blinking red since this morning; what should I do?",
    "de": "Mein Router blinkt seit heute Morgen rot; was soll ich jetzt tun?",
    "fr": "Mon routeur clignote en rouge depuis ce matin ; que dois-je faire ?",
    "es": "Mi enrutador parpadea en rojo desde esta mañana; ¿qué debo hacer?",
}


@settings(deadline=None, max_examples=60)
@given(one=TEXTS, two=TEXTS, three=TEXTS)
def test_batches_merge_exactly_in_any_order_and_grouping(one: list[str], two: list[str], three: list[str]):
    """Catches a sample or a count that depends on where the batches were cut. The sample is made small, and so cut."""
    with mock.patch.object(statistics, "SAMPLE", 8):
        a, b, c = of_batch(one), of_batch(two), of_batch(three)
        whole = of_batch([*three, *one, *two])
        assert a.merge(b).merge(c) == a.merge(b.merge(c)) == c.merge(b).merge(a) == whole
        assert a.merge(Stats()) == Stats().merge(a) == a
        assert whole.sample_size <= 8
        assert Stats.from_json(json.loads(json.dumps(whole.to_json()))) == whole


@given(texts=TEXTS)
@settings(deadline=None, max_examples=60)
def test_the_counts_are_those_of_the_texts(texts: list[str]):
    stats = of_batch(texts)
    lengths = sorted(map(len, texts))
    assert (stats.rows, stats.characters) == (len(texts), sum(lengths))
    assert sum(stats.lengths.values()) == stats.sample_size == len(texts)
    assert stats.non_ascii == sum(character > "\x7f" for text in texts for character in text)
    assert stats.replaced == sum(text.count("\ufffd") for text in texts)
    assert stats.damaged == sum("\ufffd" in text for text in texts)
    if texts:
        assert (stats.quantile(0), stats.quantile(1)) == (lengths[0], lengths[-1])


@given(
    lengths=st.lists(st.integers(0, 100_000), min_size=1, max_size=50),
    share=st.floats(0.01, 1) | st.sampled_from([0.25, 0.5, 0.75]),
)
@settings(deadline=None, max_examples=100)
def test_a_quantile_is_within_its_class_of_the_exact_one(lengths: list[int], share: float):
    """Catches a quantile read from the wrong end of a class, or one class off."""
    with mock.patch.object(statistics, "language", return_value="en"):
        found = of_batch(["x" * length for length in lengths]).quantile(share)
    exact = next(n for i, n in enumerate(sorted(lengths), start=1) if i >= share * len(lengths))
    assert found is not None
    assert exact <= found <= exact * 2 ** (1 / 8)
    if exact < 13:
        assert found == exact


def test_a_share_that_ends_with_a_row_ends_there():
    """Catches a median that is one class too high."""
    assert of_batch(["a", "bcd"]).quantile(0.5) == 1
    assert of_batch(["a", "bcd"]).quantile(0.51) == 3


def test_the_edges_are_the_same_everywhere():
    """Catches edges that move, after which old and new versions could not be compared."""
    assert EDGES[:16] == (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 15, 16)
    assert {2**i for i in range(40)} <= set(EDGES)


def test_languages_are_told():
    for code, sentence in SENTENCES.items():
        assert language(sentence) == code
    assert language("") == language("ok") == "und"
    stats = of_batch([*[SENTENCES["de"] + str(i) for i in range(3)], SENTENCES["en"]])
    assert list(stats.languages.items()) == [("de", 3), ("en", 1)]


def test_the_sample_is_bounded_and_fair():
    """Catches a sample that grows with the data, or that prefers early or long texts."""
    texts = [f"{SENTENCES['en' if i % 4 else 'fr']} Ticket {i}." for i in range(4 * SAMPLE)]
    with mock.patch.object(statistics, "language", side_effect=lambda text: "fr" if text.startswith("Mon") else "en"):
        stats = of_batch(texts)
    assert SAMPLE / 3 < stats.sample_size <= SAMPLE
    assert 0.2 < stats.languages["fr"] / stats.sample_size < 0.3


def test_no_text_is_kept():
    """Catches a field, added later, that carries a record's text or its digest into manifest and card."""
    written = json.dumps(of_batch([SENTENCES["en"], "Jane Roe, 555-0100"]).to_json())
    assert not any(word in written for word in ("router", "Jane", "0100"))
    assert set(json.loads(written)) == {
        "rows", "characters", "shortest", "longest", "lengths", "non_ascii", "replaced", "damaged", "level", "sampled",
    }  # fmt: skip


def test_foreign_statistics_are_refused():
    for value in (
        {},
        {"lengths": {}, "sampled": []},
        {"lengths": {"a": 1}, "sampled": {}},
        {**Stats().to_json(), "x": 1},
    ):
        with pytest.raises(WhetError, match="not as whet writes them"):
            Stats.from_json(value)
