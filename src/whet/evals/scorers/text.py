"""Scorers that compare an answer's text with the references: as it stands, normalized, by a pattern, as a number."""

from __future__ import annotations

import math
import re
import string
import unicodedata
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Literal

import regex
from pydantic import Field, field_validator

from whet.errors import WhetError
from whet.evals.scorers.base import Each, Kind, Options, Question, Score

Match = Literal["whole", "begins", "contains"]
MATCH = "The answer is the reference, begins with it, or contains it: whole, begins, contains."
SPACES = "\u00a0\u202f_'"
"""What else groups thousands: spaces that do not break a line, and the marks of code and of Switzerland."""
PATTERN_SECONDS = 2.0
"""A pattern may look at one answer for so long: some take exponential time on answers that nearly match."""


def matches(answer: str, reference: str, match: Match) -> bool:
    """Whether the answer is, begins with or contains the reference."""
    if match == "whole":
        return answer == reference
    return answer.startswith(reference) if match == "begins" else reference in answer


class ExactOptions(Options):
    match: Match = Field("whole", description=MATCH)


@dataclass(frozen=True)
class Exact(Each):
    """1 where the answer matches one of the references, white space at the ends apart."""

    options: ExactOptions

    def one(self, question: Question, answer: str) -> Score:
        return Score(float(any(matches(answer.strip(), r.strip(), self.options.match) for r in question.references)))


class NormalizedOptions(Options):
    match: Match = Field("whole", description=MATCH)
    case: bool = Field(False, description="Whether upper and lower case differ.")
    punctuation: bool = Field(False, description="Whether punctuation counts.")
    articles: bool = Field(True, description="Whether the English words a, an and the count.")


@dataclass(frozen=True)
class Normalized(Each):
    """1 where answer and a reference agree once case, punctuation and white space are made alike.

    With `articles: false` this is SQuAD's exact match (Rajpurkar et al. 2016, arXiv:1606.05250) on ASCII text.
    """

    options: NormalizedOptions

    def check(self, question: Question) -> None:
        for reference in question.references:
            if not self.normal(reference):
                fix = "keep what it consists of, as: punctuation: true"
                raise WhetError(f"nothing of the reference {reference!r} is left to compare", fix=fix)

    def one(self, question: Question, answer: str) -> Score:
        own = self.normal(answer)
        return Score(float(any(matches(own, self.normal(r), self.options.match) for r in question.references)))

    def normal(self, text: str) -> str:
        """NFKC, then what the options leave out, then single spaces."""
        text = unicodedata.normalize("NFKC", text)
        if not self.options.case:
            text = text.casefold()
        if not self.options.punctuation:
            text = "".join(c for c in text if not is_punctuation(c))
        if not self.options.articles:
            text = re.sub(r"\b(a|an|the)\b", " ", text, flags=re.IGNORECASE)
        return " ".join(text.split())


def is_punctuation(character: str) -> bool:
    """Unicode's punctuation, and ASCII's, which also counts $ + < = > ^ ` | ~ as such."""
    return character in string.punctuation or unicodedata.category(character).startswith("P")


class RegexOptions(Options):
    pattern: str = Field(description="What to look for in the answer; its group is compared with the reference.")
    take: Literal["first", "last"] = Field("first", description="Which of several places counts.")
    ignore_case: bool = Field(False, description="Whether case is ignored, in the comparison too.")

    @field_validator("pattern", mode="after")
    @classmethod
    def _readable(cls, pattern: str) -> str:
        try:
            groups = regex.compile(pattern).groups
        except regex.error as error:
            raise ValueError(
                f"pattern is not a regular expression: {error}; mend it, or escape special characters"
            ) from None
        if groups > 1:
            raise ValueError(f"pattern has {groups} groups; keep one, and write the others as (?:...)")
        return pattern


@dataclass(frozen=True)
class Regex(Each):
    """1 where the pattern is found, and what it took, or its group did, is one of the references, if there are any."""

    options: RegexOptions

    def one(self, question: Question, answer: str) -> Score:
        taken, note = self.taken(answer)
        if taken is None:
            return Score(0.0, note)
        right = not question.references or any(self.same(taken, r) for r in question.references)
        return Score(float(right), f"took {taken!r}")

    def taken(self, answer: str) -> tuple[str | None, str]:
        """What the pattern takes of the answer; or None, and why."""
        compiled = regex.compile(self.options.pattern, regex.IGNORECASE if self.options.ignore_case else 0)
        try:
            found = list(compiled.finditer(answer, timeout=PATTERN_SECONDS))
        except TimeoutError:
            return None, f"the pattern took more than {PATTERN_SECONDS:g} s"
        if not found:
            return None, "the pattern is not there"
        last = found[0 if self.options.take == "first" else -1]
        return (last[1] or "") if compiled.groups else last[0], ""

    def same(self, taken: str, reference: str) -> bool:
        a, b = taken.strip(), reference.strip()
        return a.casefold() == b.casefold() if self.options.ignore_case else a == b


class NumericOptions(Options):
    take: Literal["last", "first", "whole"] = Field(
        "last", description="Which number of the answer counts; whole: the answer is nothing else."
    )
    absolute: float = Field(0.0, ge=0, description="How far off a number may be.")
    relative: float = Field(0.0, ge=0, description="The same, as a share of the reference.")
    decimal: Literal[".", ","] = Field(".", description="What stands before the decimals; the other groups thousands.")


@dataclass(frozen=True)
class Numeric(Each):
    """1 where |answer - reference| <= max(absolute, relative * |reference|) for one of the references."""

    options: NumericOptions

    def check(self, question: Question) -> None:
        for reference in question.references:
            if self.wanted(reference) is None:
                raise WhetError(f"the reference {reference!r} is not a number", fix="write it as 1234.5")

    def one(self, question: Question, answer: str) -> Score:
        found = self.number(answer, self.options.take)
        if found is None:
            return Score(0.0, "no number in the answer")
        wanted = [value for value in map(self.wanted, question.references) if value is not None]
        return Score(float(any(self.near(found, value) for value in wanted)), f"took {found}")

    def near(self, found: Decimal, wanted: Decimal) -> bool:
        """In decimals, so that 3.1 is within 0.04 of 3.14."""
        absolute, relative = Decimal(str(self.options.absolute)), Decimal(str(self.options.relative))
        return abs(found - wanted) <= max(absolute, relative * abs(wanted))

    def wanted(self, reference: str) -> Decimal | None:
        """The reference as YAML and JSON write numbers, or else as answers do."""
        try:
            return _finite(Decimal(reference.strip()))
        except InvalidOperation:
            return self.number(reference, "whole")

    def number(self, text: str, take: str) -> Decimal | None:
        """The number in the text; currency signs, percent signs and units around it do not matter."""
        point = self.options.decimal
        group = "," if point == "." else "."
        digits = rf"(?:\d{{1,3}}(?:[{group}{SPACES}]\d{{3}})+(?!\d)|\d+)"
        number = rf"[-+]?(?:{digits}(?:{re.escape(point)}\d+)?|{re.escape(point)}\d+)(?:[eE][-+]?\d+)?"
        text = text.replace("\u2212", "-")
        if take == "whole":
            found = re.findall(rf"\A\s*[^\d\s\w.,+-]?\s*({number})\s*%?\s*\Z", text)
        else:
            found = re.findall(rf"(?<![\w]){number}", text)
        if not found:
            return None
        chosen = re.sub(rf"[{group}{SPACES}]", "", found[0 if take == "first" else -1])
        return _finite(Decimal(chosen.replace(point, ".")))


def _finite(value: Decimal) -> Decimal | None:
    """None for what is no number, or so large that nothing can be said about it."""
    return value if math.isfinite(value) else None


EXACT = Kind(ExactOptions, lambda options, folder: Exact(options))
NORMALIZED = Kind(NormalizedOptions, lambda options, folder: Normalized(options))
REGEX = Kind(RegexOptions, lambda options, folder: Regex(options), needs_reference=False)
NUMERIC = Kind(NumericOptions, lambda options, folder: Numeric(options))
