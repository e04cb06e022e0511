"""What counts as a duplicate, and that neither order nor batches change it."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from faker import Faker
from hypothesis import given, settings
from hypothesis import strategies as st

from whet.data.similar.duplicates import (
    REPRESENTATIVES,
    WINDOW,
    Signatures,
    banding,
    clusters,
    common_shingles,
    keepers,
    sign,
)
from whet.data.similar.words import words_in, words_of
from whet.errors import WhetError


def grouped(texts: list[str], threshold: float | None = 0.85) -> set[frozenset[int]]:
    """The clusters of two rows and more, as sets of row numbers."""
    labels = clusters(sign(texts, threshold), threshold)
    sets = (frozenset(np.flatnonzero(labels == label).tolist()) for label in np.unique(labels))
    return {rows for rows in sets if len(rows) > 1}


def prose(seed: int, words: int = 100) -> str:
    fake = Faker("en_US")
    fake.seed_instance(seed)
    return " ".join(fake.words(words, unique=False))


def changed(text: str, words: int, seed: int = 0) -> str:
    """The text with that many words, far apart, replaced."""
    found = text.split()
    for i in range(words):
        found[(i * len(found)) // words] = f"changed{seed}x{i}"
    return " ".join(found)


# ---------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Hello, World!", "hello   world"),
        ("STRASSE", "straße"),
        ("ﬁne", "fine"),
        ("cafe\u0301", "café"),
        ("\uff41\uff42\uff43\uff11\uff12", "abc12"),
        ("It's 5 o'clock", "it s 5 o clock"),
    ],
)
def test_case_punctuation_spacing_and_unicode_forms_make_no_other_words(one: str, other: str):
    assert words_in(one) == words_in(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("2+2", "2-2"), ("is x < 5", "is x > 5"), ("$5", "€5"), ("2 \u00d7 3", "2 \u00f7 3"), ("good 😀", "good 🙁"),
        ("दिन", "दान"), ("今天", "明天"),
    ],
)  # fmt: skip
def test_what_matters_makes_other_words(one: str, other: str):
    assert words_in(one) != words_in(other)


def test_scripts_without_spaces_have_words_too():
    """Catches a Chinese document that is one word."""
    assert words_in("今天 good天气") == ["今", "天", "good", "天", "气"]


UNSPACED = "\u0e00-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
MARKS = "\u0300-\u036f\u0591-\u05bd\u05bf-\u05c7\u0610-\u061a\u064b-\u065f\u0900-\u0963\u0971-\u0dff"
REFERENCE = re.compile(
    rf"[{UNSPACED}\u2600-\u27bf\U0001f000-\U0001faff]|[-+*/^%<>=$](?=\s?\d)|[\u00d7\u00f7\u2212\u2264\u2265\u20a0-\u20bf£¥]"
    rf"|[^\W{UNSPACED}\u2600-\u27bf\U0001f000-\U0001faff](?:[^\W{UNSPACED}\u2600-\u27bf\U0001f000-\U0001faff]|[{MARKS}])*"
)
TEXTS = st.lists(
    st.text(alphabet="aB1 2+-$\t\0\x1c\n._é漢😀\ud800€\u00d7ि\u0301๑٣฿ş\u05b0", max_size=12) | st.text(max_size=12),
    max_size=6,
)


@settings(deadline=None)
@given(texts=TEXTS)
def test_words_are_those_of_a_regular_expression(texts: list[str]):
    """Catches boundaries of words that are found otherwise on arrays. Folding is left to the standard library."""
    for text in texts:
        folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
        assert words_in(text) == REFERENCE.findall(folded)


@settings(deadline=None)
@given(texts=TEXTS, cut=st.integers(0, 6))
def test_hashes_are_equal_where_words_are(texts: list[str], cut: int):
    """Catches hashes that rest on a word's neighbours, or on whether the other texts are ASCII."""
    found = words_of(texts)
    words = [words_in(text) for text in texts]
    assert found.lengths.tolist() == [len(some) for some in words]
    every = [word for some in words for word in some]
    by_word = dict(zip(every, found.hashes.tolist(), strict=True))
    assert [by_word[word] for word in every] == found.hashes.tolist()
    assert len(set(by_word.values())) == len(by_word)
    assert [*words_of(texts[:cut]).hashes, *words_of(texts[cut:]).hashes] == found.hashes.tolist()
    assert [int(words_of([" ".join(some)]).sequences()[0]) for some in words] == found.sequences().tolist()


# ---------------------------------------------------------------- what is a duplicate


def test_rows_that_differ_in_what_matters_are_no_duplicates():
    rows = [
        "What is 2+2? 4", "What is 2-2? 0", "What is 2+2?", "What is 2-2?", "Yes.", "No.", "", "!", "😀", "🙁",
        "Translate to German: dog", "Translate to German: cat", "Is it open today? Yes", "Is it open today? No",
    ]  # fmt: skip
    assert grouped(rows, 0.7) == set()


def test_rows_of_a_few_words_are_duplicates_if_all_words_are_equal_in_order():
    assert grouped(["Thank you!", "thank  you", "you thank", "thank you so"]) == {frozenset({0, 1})}
    assert grouped(["Yes", "yes.", "YES!", "yes yes"]) == {frozenset({0, 1, 2})}


def test_near_copies_are_found_and_different_texts_are_not():
    rows = [text for seed in range(40) for text in (prose(seed), changed(prose(seed), 1), changed(prose(seed), 12))]
    assert grouped(rows, 0.85) == {frozenset({3 * i, 3 * i + 1}) for i in range(40)}


def test_an_exact_threshold_knows_only_equal_texts():
    rows = ["Hello there.", "hello there", "Hello there.", "", " ", ""]
    assert grouped(rows, None) == {frozenset({0, 2}), frozenset({3, 5})}


def test_a_lower_threshold_joins_what_a_higher_one_keeps_apart():
    """Pairs of similarity 0.9, 0.6 and 0.3, which are clear of 0.8, 0.45 and 0.95."""
    text = prose(1, 200)
    rows = [
        text,
        changed(text, 2),
        prose(2, 200),
        changed(prose(2, 200), 10),
        prose(3, 200),
        changed(prose(3, 200), 22),
    ]
    pairs = [frozenset({0, 1}), frozenset({2, 3}), frozenset({4, 5})]
    assert [grouped(rows, threshold) for threshold in (0.98, 0.8, 0.45, 0.15)] == [
        set(), set(pairs[:1]), set(pairs[:2]), set(pairs),
    ]  # fmt: skip


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.85, 0.9, 0.95, 1.0])
def test_bands_find_a_pair_at_the_threshold_and_one_more_place_in_each_would_not(threshold: float):
    bands, rows = banding(threshold)
    assert bands * rows <= 128
    assert 1 - (1 - threshold**rows) ** bands >= 0.99
    if rows < 128:
        assert 1 - (1 - threshold ** (rows + 1)) ** (128 // (rows + 1)) < 0.99


@pytest.mark.parametrize("threshold", [0.0, -1.0, 1.01, float("nan")])
def test_a_threshold_that_is_no_share_is_a_fault(threshold: float):
    with pytest.raises(WhetError, match="threshold"):
        sign(["a"], threshold)


def test_signatures_of_another_threshold_are_refused():
    """Catches clusters made of bands that do not fit."""
    with pytest.raises(ValueError, match="16 bands"):
        clusters(sign(["a b"], 0.85), 0.5)


def test_the_share_of_equal_places_estimates_the_similarity():
    """Jaccard of 5-word shingles: each change far from others takes 5 of them from both sides."""
    errors = []
    for seed in range(100):
        text = prose(seed, 204)
        signatures = sign([text, changed(text, 4, seed)], 0.85).minhash
        shared = 200 - 1 - 3 * 5  # the first change is at the first word
        errors.append((signatures[0] == signatures[1]).mean() - shared / (400 - shared))
    assert abs(np.mean(errors)) < 0.01
    assert np.std(errors) < 0.05


# ---------------------------------------------------------------- the same however it is computed

LINES = st.lists(
    st.lists(st.sampled_from(["a", "b", "c", "d", "e", "É", "1+1", "漢"]), max_size=9).map(" ".join), max_size=12
)


@settings(deadline=None, max_examples=60)
@given(texts=LINES, order=st.randoms(use_true_random=False), threshold=st.sampled_from([None, 0.4, 0.85]))
def test_the_order_of_rows_changes_no_cluster(texts: list[str], order: random.Random, threshold: float | None):
    moved = list(range(len(texts)))
    order.shuffle(moved)
    labels = clusters(sign(texts, threshold), threshold)
    again = clusters(sign([texts[i] for i in moved], threshold), threshold)
    assert again.tolist() == labels[moved].tolist()


@settings(deadline=None, max_examples=60)
@given(texts=LINES, cut=st.integers(0, 12), threshold=st.sampled_from([None, 0.4, 0.85]))
def test_a_signature_rests_on_its_text_alone(texts: list[str], cut: int, threshold: float | None):
    whole = sign(texts, threshold)
    parts = Signatures.concatenate([sign(texts[:cut], threshold), sign(texts[cut:], threshold)])
    for name in ("exact", "bands", "minhash"):
        assert np.array_equal(getattr(whole, name), getattr(parts, name))


@settings(deadline=None, max_examples=60)
@given(texts=LINES)
def test_exact_duplicates_are_near_duplicates(texts: list[str]):
    exact, near = (clusters(sign(texts, threshold), threshold) for threshold in (None, 0.85))
    for label in np.unique(exact):
        assert len(np.unique(near[exact == label])) == 1


def test_signatures_are_the_same_on_every_machine():
    """Catches hashes that depend on the process, the processor or a library's version. Written down once."""
    signatures = sign(["The quick brown fox jumps over the lazy dog.", "Größe 2+2", ""], 0.85)
    assert [f"{word:016x}" for word in signatures.exact[:, 0]] == EXACT
    assert signatures.minhash[:, 0].tolist() == MINHASH
    assert [f"{word:016x}" for word in signatures.bands[:, 0]] == BANDS


EXACT = ["e21b9ba9a54571d9", "7958f3dedb852c26", "cae66941d9efbd40"]
MINHASH = [3260543536, 4054738661, 3886348291]
BANDS = ["0c671c99b2827c7b", "3cb9b5eeee733609", "7d1a3695673741d0"]


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_no_thread_is_started_which_a_forked_worker_would_wait_for():
    """Catches a worker that hangs for ever, since the pool of threads it has from its parent is not running."""
    code = """
import os
from whet.data.similar.duplicates import sign
before = len(os.listdir("/proc/self/task"))
sign(["a b c d e f " * 10000, *[f"{i} {i} x y z {i}" for i in range(3000)], *["q w e r t " * 900] * 60], 0.85)
assert len(os.listdir("/proc/self/task")) == before
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "RAYON_NUM_THREADS": ""})


def test_memory_maps_give_the_same_clusters(tmp_path: Path):
    texts = [text for seed in range(20) for text in (prose(seed), changed(prose(seed), 1))]
    signatures = sign(texts, 0.85)
    for name in ("exact", "bands", "minhash"):
        np.save(tmp_path / f"{name}.npy", getattr(signatures, name))
    mapped = Signatures(*(np.load(tmp_path / f"{n}.npy", mmap_mode="r") for n in ("exact", "bands", "minhash")))
    assert np.array_equal(clusters(mapped, 0.85), clusters(signatures, 0.85))


# ---------------------------------------------------------------- many alike


def test_ten_thousand_equal_rows_are_one_cluster():
    signatures = sign([prose(1)], 0.85)
    many = Signatures(*(np.repeat(part, 10_000, axis=0) for part in vars(signatures).values()))
    labels = clusters(many, 0.85)
    assert len(labels) == 10_000
    assert not labels.any()


def test_thousands_of_near_copies_are_one_cluster():
    """Catches a bucket that is compared pair by pair (18 million pairs), and one that falls into pieces."""
    text = prose(1, 60)
    labels = clusters(sign([f"{text} copy{i}" for i in range(6000)], 0.85), 0.85)
    assert not labels.any()


def test_a_bucket_of_strangers_costs_a_bounded_number_of_comparisons(monkeypatch: pytest.MonkeyPatch):
    """Catches a boilerplate bucket that goes quadratic: 5,000 texts that agree in a band and in little else."""
    rng = np.random.default_rng(0)
    count = 5000
    minhash = rng.integers(0, 2**32, (count, 128), dtype=np.uint32)
    bands = rng.integers(0, 2**64, (count, 16), dtype=np.uint64)
    bands[:, 3] = 7
    minhash[1234, :120] = minhash[4321, :120]
    bands[1234, 4] = bands[4321, 4]  # the next band brings them side by side
    compared = []
    counted = np.count_nonzero
    monkeypatch.setattr(np, "count_nonzero", lambda a, **kw: compared.append(len(a)) or counted(a, **kw))
    exact = rng.integers(0, 2**64, (count, 2), dtype=np.uint64)
    labels = clusters(Signatures(exact, bands, minhash), 0.85)
    assert sum(compared) <= count * (WINDOW + REPRESENTATIVES) + 100
    assert labels[1234] == labels[4321]
    assert len(np.unique(labels)) == count - 1


def test_rows_that_share_a_long_instruction_are_told_apart_by_the_rest():
    """Catches a data set of one instruction and short inputs that shrinks to a single row."""
    instruction = prose(0, 300)
    rows = [f"{instruction} {prose(seed, 12)}" for seed in range(1, 61)]
    rows.append(rows[7].upper())
    assert len(grouped(rows, 0.85)) == 1
    assert max(map(len, grouped(rows, 0.85))) == len(rows)
    common = common_shingles(rows, 0.1)
    labels = clusters(sign(rows, 0.85, common), 0.85)
    assert len(np.unique(labels)) == 60
    assert labels[7] == labels[60]


def test_rows_of_nothing_but_common_phrases_are_compared_as_a_whole():
    phrase = prose(0, 30)
    common = common_shingles([f"{phrase} {i}" for i in range(60)], 0.1)
    signatures = sign([phrase, f"{phrase}!", " ".join(phrase.split()[:20])], 0.85, common)
    assert clusters(signatures, 0.85).tolist() in ([0, 0, 1], [1, 1, 0])


# ---------------------------------------------------------------- who stays


@settings(deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=20),
    order=st.randoms(use_true_random=False),
)
def test_the_kept_row_is_the_longest_then_the_one_of_the_smallest_id_in_any_order(
    rows: list[tuple[int, int]], order: random.Random
):
    ids = list(range(len(rows)))
    order.shuffle(ids)
    labels, lengths = (np.array([row[i] for row in rows], np.int64) for i in (0, 1))
    kept = keepers(labels, lengths, np.array(ids, np.uint64).reshape(-1, 1))
    for label in set(labels.tolist()):
        best = min((-lengths[i], ids[i]) for i in range(len(rows)) if labels[i] == label)
        assert [(-lengths[i], ids[i]) for i in np.flatnonzero(kept & (labels == label))] == [best]


def test_equal_rows_and_near_ones_are_in_one_cluster_and_clusters_are_numbered_from_zero():
    """Catches rows of one text that get numbers of their own, and numbers that leave gaps."""
    labels = clusters(sign(["A a a a a a.", "a a a a a a", "A a a a a a.", "b", "c", "c"], 0.85), 0.85)
    assert labels[0] == labels[1] == labels[2]
    assert labels[4] == labels[5]
    assert sorted(np.bincount(labels).tolist()) == [1, 2, 3]


def test_no_rows_are_no_fault():
    for threshold in (None, 0.85):
        nothing = sign([], threshold)
        assert len(clusters(nothing, threshold)) == 0
