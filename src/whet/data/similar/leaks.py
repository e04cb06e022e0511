"""Which training rows hold what the evaluation asks: text of held-out rows, or of the files of evaluation tasks.

    exact   all words of a held-out text, or of a task's question, are all words of a training row or of one part of it
    near    a training row and a held-out text are in one cluster of near duplicates (duplicates.py)
    ngram   a training row holds a run of GRAM = 13 words of a held-out text, unless that run is boilerplate; of texts
            of 8 to 12 words, all of them

Words are those of words.py, so letter case, punctuation and spacing hide nothing.

Boilerplate. Rows share templates, greetings, signatures and system prompts, and two tickets that say "Hello Anna" in
one template are no leak. A word of a held-out text is boilerplate if it lies in a run of WINDOW = 5 words that more
than FREQUENT = 10 training rows have (in sets of under 100 rows: more than a tenth of them). Then a training row leaks
a held-out text

    by a run of 13 words of which most (OWN_WORDS = 7) are no boilerplate, or
    by COVERED = 0.8 of the text's own runs, those that no other held-out text has, however many rows have them.

The first is the rule of Brown et al. 2020 (arXiv:2005.14165, appendix C: 13-grams that more than ten training
documents have do not count), applied to each word, so that a run across the border of two templates does not count
either. The second finds what is planted in more than ten rows; the share is that of Touvron et al. 2023
(arXiv:2307.09288, section A.6). What both miss: less than 0.8 of a text that is made of frequent phrases.

Two passes over the training rows. `LeakIndex.count` says which windows a chunk of rows has, `LeakIndex.live` gives the
index of the runs that count, and `LeakIndex.find` the leaks of those rows that the first pass found `touched` (or of
all). All are pure, and what they give for chunks adds up to what they give for the whole, in any order.
Arrays: U held-out texts of T words in all, G different runs, W different windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from whet.data.faults import LIMIT
from whet.data.similar.duplicates import Flags
from whet.data.similar.leak_runs import GRAM, WINDOW, hashes_of, numbered, runs_of, starting
from whet.data.similar.lookup import filter_of, find_hashes
from whet.data.similar.words import Hashes, Indices, Words, words_of
from whet.errors import WhetError

Kind = Literal["exact", "near", "ngram"]
KINDS: tuple[Kind, ...] = ("exact", "near", "ngram")

WHOLE = 3  # words of a question that is looked for among the parts of rows, such as messages
FREQUENT = 10
FREQUENT_SHARE = 0.1
OWN_WORDS = 7

Text = str | Sequence[str]
"""A training row as its parts (messages), or as one text."""

Role = Literal["row", "question", "answer"]
"""Of a held-out text. question: also compared with each part of a row; answer: looked for by its 13-word runs alone,
since many rows say "yes"."""


@dataclass(frozen=True)
class Matches:
    """Matches of training rows, sorted by row, text and kind; each once. row, text: int64 [L]; kind: index in KINDS."""

    row: Indices
    text: Indices
    kind: Indices

    def __len__(self) -> int:
        return len(self.row)

    @classmethod
    def of(cls, row: Indices, text: Indices, kind: Kind | Indices) -> Matches:
        kinds = np.full(len(row), KINDS.index(kind)) if isinstance(kind, str) else kind
        table = np.unique(np.stack([row, text, kinds], axis=1).astype(np.int64), axis=0)
        return cls(table[:, 0], table[:, 1], table[:, 2])

    @classmethod
    def merged(cls, parts: Sequence[Matches]) -> Matches:
        row, text, kind = (
            np.concatenate([np.zeros(0, np.int64), *(getattr(part, name) for part in parts)])
            for name in ("row", "text", "kind")
        )
        return cls.of(row, text, kind)

    def shifted(self, first_row: int) -> Matches:
        """The leaks of a chunk, with its rows numbered from `first_row`."""
        return replace(self, row=self.row + first_row)

    def counts(self) -> dict[Kind, int]:
        """Training rows by the first of the kinds that they leak by."""
        by_kind = np.lexsort((self.kind, self.row))
        first = np.unique(self.row[by_kind], return_index=True)[1]
        found = np.bincount(self.kind[by_kind][first], minlength=len(KINDS))
        return dict(zip(KINDS, found.tolist(), strict=True))


def near_leaks(labels: Indices, training: Flags, held_out: Flags) -> Matches:
    """Training rows that share a cluster with a held-out text, and the first such text. All arrays [N] over both."""
    texts = np.flatnonzero(held_out)
    first = np.full(int(labels.max(initial=-1)) + 1, -1)
    first[labels[texts[::-1]]] = texts[::-1]
    rows = np.flatnonzero(training)
    owner = first[labels[rows]]
    return Matches.of(rows[owner >= 0], owner[owner >= 0], "near")


@dataclass(frozen=True)
class Counts:
    """In how many of `total` training rows windows are. window: their numbers, ascending [C]; rows: int64 [C].

    touched: numbers of the rows that have any run or text of the index. No other row leaks, so `find` may skip it.
    """

    window: Indices
    rows: Indices
    total: int
    touched: Indices

    @classmethod
    def merged(cls, parts: Sequence[Counts]) -> Counts:
        windows = np.concatenate([np.zeros(0, np.int64), *(part.window for part in parts)])
        rows = np.concatenate([np.zeros(0, np.int64), *(part.rows for part in parts)])
        found, place = np.unique(windows, return_inverse=True)
        summed = np.zeros(len(found), np.int64)
        np.add.at(summed, place, rows)
        touched = np.concatenate([np.zeros(0, np.int64), *(part.touched for part in parts)])
        return cls(found, summed, sum(part.total for part in parts), touched)

    def shifted(self, first_row: int) -> Counts:
        """The counts of a chunk, with its rows numbered from `first_row`."""
        return replace(self, touched=self.touched + first_row)


@dataclass(frozen=True)
class LeakIndex:
    """The held-out texts, as hashes; no text is in it or in its files.

    exact, exact_text: the hash of each text's words, sorted, and its number; part: whether parts of rows are compared.
    windows: sorted hashes of the windows [W]. place_window: the window that starts at each word of all texts, or -1.
    grams: sorted hashes of the runs [G]. place_gram: the run that starts at each word of all texts, or -1.
    gram_text: the text that a run is reported for. own: the run counts towards its text's share; strong: it leaks by
        itself, which `live` finds out; short: it is all of a text.
    needed: how many of its own runs leak a text [U]. lengths: of the runs, in words.
    *_filter: bit h is set if some hash has the high bits h.
    """

    exact: Hashes
    exact_text: Indices
    part: Flags
    windows: Hashes
    windows_filter: NDArray[np.uint8]
    place_window: NDArray[np.int32]
    grams: Hashes
    grams_filter: NDArray[np.uint8]
    place_gram: NDArray[np.int32]
    gram_text: NDArray[np.int32]
    own: Flags
    strong: Flags
    short: Flags
    needed: Indices
    lengths: Indices

    @classmethod
    def build(cls, texts: Sequence[str], roles: Sequence[Role] | None = None) -> LeakIndex:
        """The index of held-out texts; text i is called i in all that follows. roles: of each; None: all are rows."""
        roles = ["row"] * len(texts) if roles is None else roles
        whole = np.array([role != "answer" for role in roles], np.bool_)
        hashed = hashes_of(texts, whole)
        whole &= hashed.lengths > 0
        part = np.array([role == "question" for role in roles], np.bool_) & (hashed.lengths >= WHOLE)
        exact, first = np.unique(hashed.sequences[whole], return_index=True)
        windows, place_window = numbered(hashed.windows, starting(hashed.lengths, WINDOW))
        return cls(
            exact=exact,
            exact_text=np.flatnonzero(whole)[first],
            part=np.isin(exact, hashed.sequences[part]),
            windows=windows,
            windows_filter=filter_of(windows),
            place_window=place_window,
            **runs_of(hashed),
        )

    def save(self, folder: Path) -> None:
        """One .npy file an array, in a folder that exists."""
        for field in fields(self):
            np.save(folder / f"{field.name}.npy", getattr(self, field.name), allow_pickle=False)

    @classmethod
    def load(cls, folder: Path) -> LeakIndex:
        """The arrays as memory maps, which processes of one machine share."""
        return cls(
            **{
                field.name: np.load(folder / f"{field.name}.npy", mmap_mode="r", allow_pickle=False)
                for field in fields(cls)
            }
        )

    def count(self, rows: Sequence[Text]) -> Counts:
        """Which windows a chunk of training rows has. For `live`."""
        words, parts = _words_of_rows(rows)
        starts, owners = words.windows(WINDOW)
        hit, window = find_hashes(self.windows, self.windows_filter, words.runs(starts, WINDOW))
        pairs = np.unique(owners[hit] * len(self.windows) + window)
        touched = np.concatenate([self._grams_in(words)[0], self._exact_leaks(words, parts).row])
        return Counts(
            *np.unique(pairs % max(len(self.windows), 1), return_counts=True),
            total=len(rows),
            touched=np.unique(touched).astype(np.int64),
        )

    def live(self, counts: Counts) -> LeakIndex:
        """The index of those runs that can leak, given in how many training rows each window is."""
        limit = min(FREQUENT, max(1, FREQUENT_SHARE * counts.total))
        frequent = np.zeros(len(self.windows) + 1, np.bool_)  # the last: no window
        frequent[counts.window[counts.rows > limit]] = True
        boilerplate = _covered(frequent[self.place_window], WINDOW)
        before = np.zeros(len(boilerplate) + 1, np.int32)
        np.cumsum(~boilerplate, out=before[1:])
        starts = np.flatnonzero(self.place_gram >= 0)
        own_words = before[np.minimum(starts + GRAM, len(boilerplate))] - before[starts]
        # A run that several texts have is as little its own as in the text where it is least.
        least = np.full(len(self.grams), GRAM, np.int32)
        np.minimum.at(least, self.place_gram[starts], own_words)
        strong = (least >= OWN_WORDS) & ~self.short
        kept = strong | self.own
        return replace(
            self,
            windows=self.windows[:0],
            windows_filter=filter_of(self.windows[:0]),
            place_window=self.place_window[:0],
            grams=self.grams[kept],
            grams_filter=filter_of(self.grams[kept]),
            place_gram=self.place_gram[:0],
            gram_text=self.gram_text[kept],
            own=self.own[kept],
            strong=strong[kept],
            short=self.short[kept],
        )

    def find(self, rows: Sequence[Text]) -> Matches:
        """The exact and 13-gram leaks of a chunk of training rows. Of an index that `live` gave."""
        words, parts = _words_of_rows(rows)
        return Matches.merged([self._exact_leaks(words, parts), self._gram_leaks(words)])

    def _exact_leaks(self, rows: Words, parts: Words) -> Matches:
        if not len(self.exact):
            return Matches.merged([])
        found = []
        row_of_part = np.searchsorted(rows.offsets, parts.offsets[:-1], side="right") - 1
        for words, owner, of_parts in ((rows, np.arange(len(rows.lengths)), False), (parts, row_of_part, True)):
            sequences = words.sequences()
            place = np.minimum(np.searchsorted(self.exact, sequences), len(self.exact) - 1)
            equal = (self.exact[place] == sequences) & (words.lengths > 0)
            if of_parts:
                equal &= self.part[place]
            found.append(Matches.of(owner[equal], self.exact_text[place[equal]], "exact"))
        return Matches.merged(found)

    def _gram_leaks(self, words: Words) -> Matches:
        row, gram = np.unique(np.stack(self._grams_in(words)), axis=1)
        text = self.gram_text[gram].astype(np.int64)
        leaks = [Matches.of(row[self.strong[gram]], text[self.strong[gram]], "ngram")]
        own = self.own[gram]
        shared, runs = np.unique(np.stack([row[own], text[own]]), axis=1, return_counts=True)
        enough = runs >= self.needed[shared[1]]
        return Matches.merged([*leaks, Matches.of(shared[0][enough], shared[1][enough], "ngram")])

    def _grams_in(self, words: Words) -> tuple[Indices, Indices]:
        """(row, number of the run) of every place where rows have a run of the index."""
        rows, grams = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for length in self.lengths.tolist():
            starts, owners = words.windows(length)
            hit, gram = find_hashes(self.grams, self.grams_filter, words.runs(starts, length))
            rows.append(owners[hit])
            grams.append(gram)
        return np.concatenate(rows), np.concatenate(grams)


def _words_of_rows(rows: Sequence[Text]) -> tuple[Words, Words]:
    """(words of the rows, words of their parts)."""
    parts = [[row] if isinstance(row, str) else row for row in rows]
    words = words_of([part for row in parts for part in row])
    return words.joined([len(row) for row in parts]), words


def _covered(starting: Flags, length: int) -> Flags:
    """Words that lie in a run of that length, given where runs start."""
    covered = starting.copy()
    for back in range(1, length):
        covered[back:] |= starting[:-back]
    return covered


# ---------------------------------------------------------------- what the user is told


@dataclass(frozen=True)
class Leak:
    """A training row and the held-out row or task that it holds text of, each as file:line."""

    training: str
    other: str
    kind: Kind


def faults_of(leaks: Sequence[Leak], *, rows: int | None = None) -> list[WhetError]:
    """Errors that show up to LIMIT leaks, and one that sums up. rows: how many training rows leak in all."""
    said = {"exact": "says the same as", "near": "is a near-duplicate of", "ngram": "holds text of"}
    shown = [WhetError(f"this training row {said[leak.kind]} {leak.other}", where=leak.training) for leak in leaks]
    total = len(leaks) if rows is None else rows
    summary = WhetError(
        f"{total} training row{'s hold' if total != 1 else ' holds'} text of the evaluation",
        where="data.leaks",
        fix="remove these rows, or under data write leaks: {gate: drop} to leave them out, {gate: warn} to keep them",
    )
    return [*shown[:LIMIT], summary]
