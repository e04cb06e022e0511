"""What the answers teach together: one for all, refusals, copies of the question, contradictions, rare labels."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from whet.data.doctor.findings import Finding, Place, Severity, by_share
from whet.data.doctor.rows import Row, folded

ENOUGH = 20
"""Answered rows from which shares mean anything."""

FREQUENT, CONSTANT = 0.3, 0.95
"""Share of the most frequent answer that is a warning, and an error: then a constant would do."""

MOST_LABELS, LABEL_LENGTH, ROWS_A_LABEL = 64, 60, 10
"""Answers are labels if there are at most so many different ones, of at most so many characters, with at least so many
rows each on average."""

RARE, FEW = 0.01, 5
"""Share, and number, of rows under which a label is rare."""

REFUSALS = 0.05
COPIES = 0.01
CONTRADICTIONS = 0.01
"""Shares of the rows from which these are more than a note."""

COPIED_LENGTH = 40
"""Characters of a question from which an answer that begins with it is a copy: short ones are echoed rightly."""

REFUSAL = re.compile(
    r"""\s*(?:
        (?:i'm|i\ am)\ (?:very\ )?sorry,?\ (?:but\ )?(?:i|as\ an)\b | sorry,?\ (?:but\ )?i\ (?:can't|cannot)
      | (?:i|we)\ (?:can't|cannot|can\ not|am\ unable\ to|'m\ unable\ to|am\ not\ able\ to|won't|will\ not)\ (?:
            help|assist|answer|comply|provide|fulfil|do\ that|discuss|respond)
      | as\ an?\ (?:ai|artificial|large\ language|language\ model)
      | es\ tut\ mir\ leid,\ (?:aber\ )?ich | leider\ kann\ ich | als\ ki[-\s]
      | je\ suis\ désolée?,\ (?:mais\ )?je | je\ ne\ peux\ pas\ (?:vous\ )?(?:aider|répondre|fournir) | en\ tant\ qu'ia
      | lo\ siento,\ (?:pero\ )?no | como\ (?:una\ )?(?:ia|inteligencia\ artificial) | mi\ dispiace,\ (?:ma\ )?non
    )""",
    re.IGNORECASE | re.VERBOSE,
)


def find_in_answers(rows: Sequence[Row]) -> Iterator[Finding]:
    answered = [row for row in rows if row.answer is not None and row.answer.strip()]
    by_answer: dict[str, list[Row]] = defaultdict(list)
    for row in answered:
        by_answer[_key(row.answer or "")].append(row)
    if len(answered) >= ENOUGH:
        labels = _are_labels(by_answer, len(answered))
        yield from _frequent(by_answer, len(answered), labels=labels)
        if labels:
            yield from _imbalance(by_answer, len(answered))
            yield from _spellings(by_answer)
    yield from _refusals(answered)
    yield from _copies(answered)
    yield from _contradictions(answered)


def _key(answer: str) -> str:
    """Answers that differ in case, spaces or a final stop alone have one key."""
    return folded(answer).rstrip(".! ")


def _are_labels(by_answer: dict[str, list[Row]], total: int) -> bool:
    few = 1 < len(by_answer) <= min(MOST_LABELS, total // ROWS_A_LABEL)
    return few and max(map(len, by_answer)) <= LABEL_LENGTH


def _frequent(by_answer: dict[str, list[Row]], total: int, *, labels: bool) -> Iterator[Finding]:
    """Of labels, one may well be half of the rows: only an answer that is nearly all of them is told."""
    most = max(by_answer.values(), key=len)
    share = len(most) / total
    if share >= CONSTANT or (share >= FREQUENT and not labels):
        severity: Severity = "error" if share >= CONSTANT else "warning"
        yield Finding(
            "near-constant answers",
            severity,
            _answers(most),
            f"One answer stands in {share:.0%} of the rows. A model that always gives it would have a low loss.",
            "Check how the answers were made; keep fewer rows with this one, or add rows with others.",
        )


def _imbalance(by_answer: dict[str, list[Row]], total: int) -> Iterator[Finding]:
    sizes = sorted((len(rows) for rows in by_answer.values()), reverse=True)
    spread = (
        f"{len(sizes)} labels: the largest has {sizes[0] / total:.1%} of the rows, the median "
        f"{sizes[len(sizes) // 2] / total:.1%}, the smallest {sizes[-1] / total:.2%} ({sizes[-1]} rows)."
    )
    yield Finding(
        "labels",
        "note",
        (),
        spread,
        "Report accuracy by label, or balanced accuracy; compare with always giving the largest.",
    )
    rare = [rows for rows in by_answer.values() if len(rows) < max(RARE * total, FEW)]
    if rare:
        members = {id(row) for rows in rare for row in rows}
        yield Finding(
            "rare labels",
            "warning",
            _answers([row for rows in by_answer.values() for row in rows if id(row) in members]),
            f"{len(rare)} of {len(sizes)} labels have under {RARE:.0%} of the rows, or under {FEW} rows. "
            "The model may never give them, and no evaluation will tell.",
            "Add rows of these labels, merge them, or leave them out; stratify the split (split.stratify_by).",
        )


def _spellings(by_answer: dict[str, list[Row]]) -> Iterator[Finding]:
    odd: list[Row] = []
    for rows in by_answer.values():
        counts = Counter(row.answer for row in rows)
        usual = max(counts, key=lambda text: (counts[text], str(text)))
        odd += [row for row in rows if row.answer != usual]
    if odd:
        yield Finding(
            "label spellings",
            "warning",
            _answers(odd),
            "Labels that differ from a more frequent one in case, spaces or a final stop alone. "
            "The model learns each spelling, and an evaluation counts all but one as wrong.",
            "Write each label one way.",
        )


def _refusals(rows: Sequence[Row]) -> Iterator[Finding]:
    found = [row for row in rows if REFUSAL.match((row.answer or "").replace("\u2019", "'"))]
    if found:
        yield Finding(
            "refusals",
            by_share(len(found), max(len(rows), ENOUGH), warning=REFUSALS),
            _answers(found),
            f"{len(found) / len(rows):.1%} of the answers begin like a refusal; the model learns when to refuse.",
            "Keep those that are meant; leave out those that another model gave for want of an answer.",
        )


def _copies(rows: Sequence[Row]) -> Iterator[Finding]:
    found = []
    for row in rows:
        question, answer = folded(row.question or ""), folded(row.answer or "")
        if question and (answer == question or (len(question) >= COPIED_LENGTH and answer.startswith(question))):
            found.append(row)
    if found:
        yield Finding(
            "copied questions",
            by_share(len(found), len(rows), warning=COPIES),
            _answers(found),
            "Answers that are the question, or begin with all of it. The model learns to repeat what it is asked.",
            "Cut the question off the answer; often the columns were mapped wrongly.",
        )


def _contradictions(rows: Sequence[Row]) -> Iterator[Finding]:
    by_prompt: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row.prompt is not None:
            by_prompt[folded(row.prompt)].append(row)
    found: list[Place] = []
    for first, *others in by_prompt.values():
        if any(_key(row.answer or "") != _key(first.answer or "") for row in others):
            found.append(first.place(first.answer or ""))
            found += [row.place(row.answer or "", detail=f"asked as {first.where}") for row in others]
    if found:
        yield Finding(
            "contradicting answers",
            by_share(len(found), len(rows), warning=CONTRADICTIONS),
            tuple(found),
            "Rows that ask the same, word for word, and are answered differently. No model can give all the answers.",
            "Keep the right one of each. If both are right, as in free writing, leave them.",
        )


def _answers(rows: Sequence[Row]) -> tuple[Place, ...]:
    return tuple(row.place(row.answer or "") for row in rows)
