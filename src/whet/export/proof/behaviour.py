"""What an artifact answers in its engine, against what the reference answers: tokens, distributions, greedy answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from whet.export.proof.checks import Check
from whet.export.proof.limits import Limits
from whet.export.proof.reference import Asked, LogProbs, Reference, divergence

PROBES = (
    "Hello world, it's 3.14159 and 1,000,000 items!",
    "    four spaces,\n\ttabs\r\n\n  and \u00a0 lines   ",
    "naïve café, русский, 日本語のテキスト, 한국어, 🙂👩‍👩‍👧",
    "def f(x_1: int) -> str:\n    return f'{x_1!r}' != \"\"  # HTTPServer",
    "हिन्दी, שָׁלוֹם, ภาษาไทย, ÉCOLE, и\u0306, e\u0301",
)
"""Texts that are tokenized besides the prompts."""


class Answer(NamedTuple):
    """A greedy answer's token ids, the token that ended it left out, and whether one did."""

    ids: list[int]
    stopped: bool


class Engine(Protocol):
    """Runs an artifact as its users will."""

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text as whet serves the artifact, special tokens parsed and none added."""
        ...

    def log_probs(self, asked: Sequence[Asked]) -> list[LogProbs]:
        """[P, V] at the positions that each was asked at."""
        ...

    def answers(self, asked: Sequence[Asked]) -> list[Answer]:
        """The greedy answer to each prompt, as long as the reference's may be."""
        ...


def compare(reference: Reference, engine: Engine, limits: Limits) -> tuple[list[Check], dict[str, float | int]]:
    """Every check of what the engine says, and numbers to show beside them."""
    tokens = tokens_check(reference, engine)
    if not tokens.passed:  # other tokens lead to other answers, and to nothing that could be compared
        return [tokens], {}
    distributions, measures = distribution_checks(reference, engine.log_probs(reference.asked), limits)
    answers, same = answers_check(reference, engine.answers(reference.asked), limits)
    return [tokens, *distributions, answers], measures | {"answers the same": same}


def tokens_check(reference: Reference, engine: Engine) -> Check:
    """Prompts and probes become the same token ids."""
    texts = texts_to_tokenize(reference)
    expected = [reference.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    found = engine.tokenize(texts)
    wrong = [i for i, (a, b) in enumerate(zip(expected, found, strict=True)) if a != b]
    if wrong:
        kind = "prompt" if wrong[0] < len(reference.texts) else "test text"
        what = f"{len(wrong)} of {len(texts)} texts become other tokens, a {kind} first"
    else:
        what = f"{len(texts)} texts become the same {sum(map(len, expected)):,} tokens"
    return Check("tokens", not wrong, what, float(len(wrong)), 0.0)


def texts_to_tokenize(reference: Reference) -> list[str]:
    """Prompts, probes, and each added token: one that is missing is split."""
    added = (str(token) for _, token in sorted(reference.tokenizer.added_tokens_decoder.items()))
    return [*reference.texts, *PROBES, *added]


def distribution_checks(
    reference: Reference, found: Sequence[LogProbs], limits: Limits
) -> tuple[list[Check], dict[str, float | int]]:
    """KL divergence, mean and tail, and how often both find the same token likeliest."""
    rows = {(asked.log_probs.shape, log_probs.shape) for asked, log_probs in zip(reference.asked, found, strict=True)}
    unlike = [pair for pair in rows if pair[0] != pair[1]]
    if unlike:
        what = f"the engine's distributions have the shape {list(unlike[0][1])}, not {list(unlike[0][0])}"
        return [Check("distributions", False, what)], {}
    pairs = list(zip((asked.log_probs for asked in reference.asked), found, strict=True))
    far = np.concatenate([divergence(p, q) for p, q in pairs])
    near = limits.tie / 5
    same = top_1(pairs, near)
    mean, tail = (float(x) if np.isfinite(x) else float("inf") for x in (far.mean(), np.quantile(far, 0.99)))
    base = f"; the base itself lies {reference.base_kl:.3g} away" if reference.base_kl is not None else ""
    likeliest = f"the same token is likeliest, or one within {near:.3g} nats, at {same:.1%}"
    checks = [
        Check("KL a token", mean <= limits.kl, f"{mean:.3g} nats over {len(far):,} tokens{base}", mean, limits.kl),
        Check("KL, tail", tail <= limits.tail, f"1 of 100 tokens lies beyond {tail:.3g} nats", tail, limits.tail),
        Check("top-1", same >= limits.top1, likeliest, same, limits.top1, "at least"),
    ]
    measures: dict[str, float | int] = {"tokens compared": len(far), "largest KL": float(far.max())}
    if reference.base_kl is not None:
        measures["KL of the base"] = reference.base_kl
    return checks, measures


def top_1(pairs: Sequence[tuple[LogProbs, LogProbs]], near: float) -> float:
    """The share of positions at which both find the same token likeliest.

    Another token counts as the same where the reference likes it less by `near` nats at most: rounding may well change
    the order of those.
    """
    less = [p.max(-1) - np.take_along_axis(p, q.argmax(-1)[:, None], -1)[:, 0] for p, q in pairs]
    return float((np.concatenate(less) <= near).mean())


def answers_check(reference: Reference, found: Sequence[Answer], limits: Limits) -> tuple[Check, float]:
    """Greedy answers part only where the two likeliest tokens lie together; the share of answers that never part."""
    gaps = [parting(asked, answer, reference.ends) for asked, answer in zip(reference.asked, found, strict=True)]
    parted = [gap for gap in gaps if gap is not None]
    widest = max(parted, default=0.0)
    same = 1 - len(parted) / len(gaps)
    what = f"{len(gaps) - len(parted)} of {len(gaps)} are the same"
    if parted:
        what += f"; where others part, the reference prefers its own token by at most {widest:.3g} nats"
    return Check("greedy answers", widest <= limits.tie, what, widest, limits.tie), same


def parting(asked: Asked, answer: Answer, ends: frozenset[int]) -> float | None:
    """Nats by which the reference prefers its own token where the answers first part; None where they never do."""
    shared = next(
        (i for i, (a, b) in enumerate(zip(asked.answer, answer.ids, strict=False)) if a != b),
        min(len(asked.answer), len(answer.ids)),
    )
    own, other = _next(asked.answer, asked.stopped, shared, ends), _next(answer.ids, answer.stopped, shared, ends)
    if own == other:
        return None
    if not own or not other:  # one was cut short without an end: it ran out of tokens before the other
        return float("inf")
    row = asked.log_probs[len(asked.prompt) - 1 + shared - asked.start]
    return float(max(row[token] for token in own) - max(row[token] for token in other))


def _next(ids: Sequence[int], stopped: bool, at: int, ends: frozenset[int]) -> frozenset[int]:
    """The tokens that an answer may have gone on with: one, or those that end it; none where it was cut short."""
    if at < len(ids):
        return frozenset({ids[at]})
    return ends if stopped else frozenset()
