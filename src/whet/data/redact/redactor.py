"""The texts of a row -> the same texts without what a policy wants gone.

Passes go on until the finder sees nothing that is not a replacement: what one replacement uncovers, the next pass
finds. So a redacted row, redacted again, is itself. What was found at one place of a row also goes at the places where
the finder had no label to go by, and at those that a replacement beside them sets free later.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right, insort
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

from whet.data.redact.find import Finder, Span
from whet.data.redact.policy import Policy
from whet.data.redact.replace import Replacer, replaced

PASSES = 8  # each takes text away, so the last is far off; a bound all the same
REPEATED_FROM = 4
"""Characters from which on a value's repetitions are looked for, and leftovers beside a replacement are a value."""
INSIDE_WORDS_FROM = 6
"""Characters from which on a value with a digit is also replaced inside a longer word."""

CAMEL = re.compile("(?<=[a-z])(?=[A-Z])")

Places = list[tuple[int, int]]
"""(start, end) of places in a text, sorted and apart."""


class Finds(Protocol):
    """What `find.Finder` does."""

    @property
    def not_covered(self) -> dict[str, str]: ...

    def find(self, texts: Sequence[str]) -> list[list[Span]]: ...


@dataclass(frozen=True)
class RedactedRow:
    """counts: values replaced, by class. originals: replacement -> value, if the redactor keeps them.

    Of a dropped row there are no texts and no originals; its counts say what was found. The repr shows no text.
    """

    texts: list[str] = field(repr=False)
    counts: dict[str, int]
    dropped: bool = False
    originals: dict[str, str] = field(default_factory=dict, repr=False)


class Edit(NamedTuple):
    """The characters from `start` up to `end` become `new`."""

    start: int
    end: int
    entity: str
    new: str


class Redactor:
    """Applies a policy to rows. One for each process: finder and cache are its own."""

    def __init__(
        self,
        policy: Policy,
        *,
        key: bytes | None = None,
        ner: str | Path | None = None,
        keep_originals: bool = False,
        finder: Finds | None = None,
    ) -> None:
        """key: for pseudonyms and a vault. ner: folder of a name model. finder: another one than the policy's classes
        ask for. Raises WhetError when a key is needed and there is none."""
        modes = {entity: mode for entity, mode in policy.classes.items() if mode != "keep"}
        self._replacer = Replacer(modes, key=key, marks=keep_originals)
        self._finder: Finds = finder if finder is not None else Finder(modes, ner=ner, regions=policy.regions)
        self._drops = frozenset(entity for entity, mode in modes.items() if mode == "drop")
        self._classes = frozenset(modes)
        self._keep_originals = keep_originals

    @property
    def not_covered(self) -> dict[str, str]:
        """Class -> why it is found in part or not at all."""
        return dict(self._finder.not_covered)

    def row(self, texts: Sequence[str], labels: Sequence[str | None] | None = None) -> RedactedRow:
        """Redact the texts of one row together. labels: of each text, what stands before it, such as its key in JSON;
        what is there says what the text is, and stays."""
        texts, counts, originals = list(texts), Counter[str](), dict[str, str]()
        before = [_label(label) for label in labels or [None] * len(texts)]
        known = [replaced(text) for text in texts]
        values: dict[str, Edit] = {}
        for _ in range(PASSES):
            edits = self._edits(texts, known, before, values)
            counts.update(edit.entity for part in edits for edit in part)
            if not self._drops.isdisjoint(counts):
                return RedactedRow([], dict(sorted(counts.items())), dropped=True)
            if not any(edits):
                break
            for i, part in enumerate(edits):
                if part:
                    text = texts[i]
                    part, texts[i], known[i] = self._applied(text, part)
                    if self._keep_originals:
                        originals.update((edit.new, text[edit.start : edit.end]) for edit in part)
        return RedactedRow(texts, dict(sorted(counts.items())), originals=originals)

    def _applied(self, text: str, edits: list[Edit]) -> tuple[list[Edit], str, Places]:
        """The edits as they were made, the text after them, and where in it replacements stand.

        Letters beside a replacement can hide it from the next pass, which would then redact it once more; there the
        placeholder, which nothing hides, takes its place.
        """
        after, places = _edited(text, edits)
        known = replaced(after)
        hidden = [
            # a year, a ZIP, a network: coarse already, and found again they stay
            not _covered(*place, known) and self._replacer.replacement(edit.entity, edit.new) != edit.new
            for edit, place in zip(edits, places, strict=True)
        ]
        if not any(hidden):
            return edits, after, known
        edits = [
            edit._replace(new=self._replacer.placeholder(edit.entity, text[edit.start : edit.end])) if hide else edit
            for edit, hide in zip(edits, hidden, strict=True)
        ]
        after, _ = _edited(text, edits)
        return edits, after, replaced(after)

    def _edits(
        self, texts: Sequence[str], known: Sequence[Places], before: Sequence[str], values: dict[str, Edit]
    ) -> list[list[Edit]]:
        """What one pass replaces, for each text.

        known: where replacements stand already. before: see `row`. values: those of the passes before; this one's are
        added.
        """
        found = self._find(texts, known, before)
        edits = [list(self._found(*each)) for each in zip(texts, found, known, strict=True)]
        values.update(
            (text[edit.start : edit.end], edit)
            for text, part in zip(texts, edits, strict=True)
            for edit in part
            if edit.end - edit.start >= REPEATED_FROM
        )
        if not values:
            return edits
        longest_first = [(value, values[value]) for value in sorted(values, key=len, reverse=True)]
        return [_with_repeats(*each, longest_first) for each in zip(texts, edits, known, strict=True)]

    def _find(self, texts: Sequence[str], known: Sequence[Places], before: Sequence[str]) -> list[list[Span]]:
        """The finder's spans in the texts. It sees what is before each, and no replacement."""
        seen = [label + _hidden(text, spans) for label, text, spans in zip(before, texts, known, strict=True)]
        return [
            [
                span._replace(start=max(span.start - len(label), 0), end=span.end - len(label))
                for span in spans
                if span.end > len(label)
            ]
            if label
            else spans
            for label, spans in zip(before, self._finder.find(seen), strict=True)
        ]

    def _found(self, text: str, spans: Sequence[Span], known: Places) -> Iterator[Edit]:
        """An edit for each span of the policy's classes, and for what sticks out where one lies on a replacement."""
        for span in spans:
            if span.entity not in self._classes:
                continue
            for start, end in _outside(text, span.start, span.end, known):
                new = self._replacer.replacement(span.entity, text[start:end])
                if new != text[start:end] or span.entity in self._drops:
                    yield Edit(start, end, span.entity, new)


def _label(key: str | None) -> str:
    """A key as people write labels: "patientName" -> "patient Name: "."""
    return CAMEL.sub(" ", key) + ": " if key else ""


def _hidden(text: str, known: Places) -> str:
    """The text as the finder sees it: null characters, which no rule matches, in place of replacements."""
    parts, done = [], 0
    for start, end in known:
        parts += [text[done:start], "\0" * (end - start)]
        done = end
    return "".join([*parts, text[done:]]) if known else text


def _outside(text: str, start: int, end: int, before: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The whole span, if no replacement stands in it; else the parts beside them that are long enough to be a value."""
    whole = True
    for taken_start, taken_end in before:
        if taken_end <= start or taken_start >= end:
            continue
        whole = False
        yield from _leftover(text, start, taken_start)
        start = max(start, taken_end)
    if whole:
        yield start, end
    else:
        yield from _leftover(text, start, end)


def _leftover(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    while start < end and not text[start].isalnum():
        start += 1
    while start < end and not text[end - 1].isalnum():
        end -= 1
    if end - start >= REPEATED_FROM:
        yield start, end


def _with_repeats(text: str, edits: list[Edit], known: Places, values: Sequence[tuple[str, Edit]]) -> list[Edit]:
    """The edits, and one for each other place of this text where one of the row's values, longest first, stands."""
    taken = sorted([*known, *((edit.start, edit.end) for edit in edits)])
    more = []
    for value, edit in values:
        at = text.find(value)
        while at >= 0:
            end = at + len(value)
            if _free(at, end, taken) and _stands_alone(text, at, end, value):
                insort(taken, (at, end))
                more.append(edit._replace(start=at, end=end))
            at = text.find(value, at + 1)
    return sorted([*edits, *more]) if more else edits


def _free(start: int, end: int, taken: Sequence[tuple[int, int]]) -> bool:
    """Whether nothing in `taken`, sorted and apart, touches the characters from start up to end."""
    after = bisect_left(taken, (end,))
    return after == 0 or taken[after - 1][1] <= start


def _stands_alone(text: str, start: int, end: int, value: str) -> bool:
    """Whether a value is a word of its own here, or one that no longer word holds by chance."""
    if len(value) >= INSIDE_WORDS_FROM and any(map(str.isdigit, value)):
        return True
    return not (text[start - 1 : start].isalnum() or text[end : end + 1].isalnum())


def _covered(start: int, end: int, known: Places) -> bool:
    """Whether one of `known`, sorted and apart, holds the characters from start up to end."""
    at = bisect_right(known, (start, end)) - 1
    return any(s <= start and end <= e for s, e in known[max(at, 0) : at + 2])


def _edited(text: str, edits: Sequence[Edit]) -> tuple[str, Places]:
    """The text after sorted edits, and where in it each replacement stands."""
    parts, places, done, length = [], [], 0, 0
    for edit in edits:
        parts += [text[done : edit.start], edit.new]
        length += edit.start - done + len(edit.new)
        places.append((length - len(edit.new), length))
        done = edit.end
    return "".join([*parts, text[done:]]), places
