"""Draws each sequence's next token from its logits, all of a step at once.

    z = logits + logit_bias - presence_penalty * [count > 0] - frequency_penalty * count
    p = softmax(z / temperature), then the top_k likeliest, then of those the fewest that hold top_p of the rest

Counts are of the tokens generated so far, as OpenAI counts them. A token is drawn by inverting the distribution's sum
at one uniform number that comes from the request's own generator, so that a seed gives the same answer whatever else is
in the batch; what work is shared with other rows never decides how a row is drawn. Log-probabilities are the model's
own, before any of this.

Letters: R rows (sequences that get a token in this step), V vocabulary.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from whet.serve.engines.in_process.structured import Matcher
from whet.serve.interface import Sampling

LIKELIEST = 256
"""So many tokens are sorted first; a row whose top_p reaches further has all of its vocabulary sorted."""


@dataclass
class Drawing:
    """How one sequence's tokens are drawn, and what has been drawn."""

    sampling: Sampling
    matcher: Matcher | None = None
    counts: Counter[int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._random = random.Random(self.sampling.seed)

    @property
    def greedy(self) -> bool:
        return self.sampling.temperature == 0

    @property
    def sorts(self) -> bool:
        return self.sampling.top_p < 1 or self.sampling.top_k > 0

    def uniform(self) -> float:
        return self._random.random()

    def changes(self) -> dict[int, float]:
        """What is added to the logits, by token."""
        s = self.sampling
        changes = {token: float(bias) for token, bias in s.logit_bias.items()}
        if s.presence_penalty or s.frequency_penalty:
            for token, count in self.counts.items():
                changes[token] = changes.get(token, 0.0) - s.presence_penalty - s.frequency_penalty * count
        return changes

    def accept(self, token: int) -> None:
        """Remember a drawn token. Raises ValueError where a grammar forbids it, which a masked draw can't give."""
        self.counts[token] += 1
        if self.matcher is not None:
            self.matcher.accept(token)


@dataclass(frozen=True)
class Drawn:
    """A token. logprob and top, [(token, logprob)]: where asked for."""

    token: int
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()


def draw(logits_RV: Tensor, drawings: Sequence[Drawing]) -> list[Drawn | None]:
    """The next token of each row; None for a row whose logits are no numbers, or of which nothing may follow."""
    logits_RV = logits_RV.float()
    changed_RV = _changed(logits_RV, drawings)
    best = changed_RV.max(dim=-1)
    tokens = best.indices.tolist()
    usable = torch.isfinite(best.values).tolist()
    drawn_rows = [i for i, drawing in enumerate(drawings) if usable[i] and not drawing.greedy]
    for rows, pick in (
        ([i for i in drawn_rows if not drawings[i].sorts], _pick),
        ([i for i in drawn_rows if drawings[i].sorts], _pick_sorted),
    ):
        if rows:
            chosen = [drawings[i] for i in rows]
            temperatures = torch.tensor([d.sampling.temperature for d in chosen], device=logits_RV.device)
            picked = pick(changed_RV[rows] / temperatures[:, None], chosen)
            for i, token in zip(rows, picked, strict=True):
                tokens[i] = token
    logprobs = _logprobs(logits_RV, drawings, tokens)
    return [
        Drawn(token, *logprobs.get(i, (0.0, ()))) if ok else None
        for i, (token, ok) in enumerate(zip(tokens, usable, strict=True))
    ]


def _changed(logits_RV: Tensor, drawings: Sequence[Drawing]) -> Tensor:
    """Biases, penalties and grammars applied; the same tensor where there are none."""
    changes = [(row, token, by) for row, d in enumerate(drawings) for token, by in d.changes().items()]
    matched = [(row, d.matcher) for row, d in enumerate(drawings) if d.matcher is not None]
    if not changes and not matched:
        return logits_RV
    logits_RV = logits_RV.clone()
    if changes:
        rows, tokens, by = (torch.tensor(part, device=logits_RV.device) for part in zip(*changes, strict=True))
        logits_RV[rows, tokens] += by.float()
    for row, matcher in matched:
        allowed = matcher.allowed(logits_RV.shape[1]).to(logits_RV.device)
        logits_RV[row].masked_fill_(~allowed, float("-inf"))
    return logits_RV


def _pick(scaled: Tensor, drawings: Sequence[Drawing]) -> list[int]:
    """A token of each row [V], from the whole of its distribution."""
    return _invert(torch.softmax(scaled, dim=-1), drawings)


def _pick_sorted(scaled: Tensor, drawings: Sequence[Drawing]) -> list[int]:
    """A token of each row [V], from its likeliest."""
    probs = torch.softmax(scaled, dim=-1)
    few = probs.topk(min(LIKELIEST, probs.shape[1]), dim=-1)
    reached = few.values.sum(-1).tolist()
    tokens = [0] * len(drawings)
    enough = [
        i
        for i, (d, mass) in enumerate(zip(drawings, reached, strict=True))
        if 0 < d.sampling.top_k <= LIKELIEST or (not d.sampling.top_k and mass >= d.sampling.top_p)
    ]
    rest = sorted(set(range(len(drawings))) - set(enough))
    for rows, likeliest in ((enough, few), (rest, probs[rest].sort(dim=-1, descending=True) if rest else None)):
        if rows and likeliest is not None:
            values, indices = likeliest
            if likeliest is few:
                values, indices = values[rows], indices[rows]
            chosen = [drawings[i] for i in rows]
            places = _invert(_kept(values, chosen), chosen)
            for i, row, place in zip(rows, indices, places, strict=True):
                tokens[i] = int(row[place])
    return tokens


def _kept(sorted_probs: Tensor, drawings: Sequence[Drawing]) -> Tensor:
    """Probabilities in falling order, those beyond top_k and top_p set to 0."""
    device = sorted_probs.device
    width = sorted_probs.shape[1]
    top_k = torch.tensor([d.sampling.top_k or width for d in drawings], device=device)
    top_p = torch.tensor([d.sampling.top_p for d in drawings], device=device, dtype=torch.float64)
    probs = sorted_probs.double()
    probs = probs.masked_fill(torch.arange(width, device=device) >= top_k[:, None], 0)
    # top_p is of what top_k leaves; without top_k of 1, of which the likeliest here may be but a part
    cut = torch.tensor([d.sampling.top_k > 0 for d in drawings], device=device)
    whole = torch.where(cut, probs.sum(-1), 1.0)
    before = probs.cumsum(-1) - probs
    beyond = before >= (top_p * whole)[:, None]
    beyond[:, 0] = False
    return probs.masked_fill(beyond & (top_p < 1)[:, None], 0)


def _invert(probs: Tensor, drawings: Sequence[Drawing]) -> list[int]:
    """Where each row's running sum first exceeds its uniform number times the row's sum."""
    sums = probs.double().cumsum(-1)
    uniform = torch.tensor([d.uniform() for d in drawings], device=probs.device, dtype=torch.float64)
    places = torch.searchsorted(sums, (uniform * sums[:, -1])[:, None], right=True)[:, 0]
    return places.clamp_(max=probs.shape[1] - 1).tolist()


def _logprobs(
    logits_RV: Tensor, drawings: Sequence[Drawing], tokens: Sequence[int]
) -> dict[int, tuple[float, tuple[tuple[int, float], ...]]]:
    """By row, for those that ask: the token's own logarithm, and the likeliest with theirs."""
    asked = [i for i, d in enumerate(drawings) if d.sampling.logprobs is not None]
    if not asked:
        return {}
    logs = torch.log_softmax(logits_RV[asked], dim=-1)
    own = logs.gather(1, torch.tensor([[tokens[i]] for i in asked], device=logs.device))[:, 0].tolist()
    most = min(max(drawings[i].sampling.logprobs or 0 for i in asked), logs.shape[1])
    top = logs.topk(most, dim=-1)
    found = {}
    for i, logprob, ids, values in zip(asked, own, top.indices.tolist(), top.values.tolist(), strict=True):
        number = drawings[i].sampling.logprobs or 0
        found[i] = (logprob, tuple(zip(ids[:number], values[:number], strict=True)))
    return found
