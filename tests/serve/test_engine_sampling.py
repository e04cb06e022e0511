"""How the in-process engine draws tokens: seeds, filters, penalties, biases and log-probabilities."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from tests.serve.engines import ask, pieces, save, text, token_bytes, with_engine
from whet.serve.engines.in_process.engine import InProcessEngine
from whet.serve.engines.in_process.sampling import LIKELIEST, Drawing, draw
from whet.serve.interface import Refused, Sampling

PROMPT = [5, 6, 7, 8]


@pytest.fixture(scope="module")
def flat(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is unsure of everything, so that a draw can go anywhere."""
    return save(tmp_path_factory.mktemp("flat"), tiny_llama, initializer_range=0.02)


def drawing(**sampling: Any) -> Drawing:
    return Drawing(Sampling(**{"max_tokens": 1, **sampling}))


def tokens(logits: torch.Tensor, drawings: list[Drawing]) -> list[int]:
    return [drawn.token for drawn in draw(logits, drawings) if drawn is not None]


def test_a_seed_gives_the_same_answer_whatever_else_runs(flat: Path) -> None:
    """Catches a generator shared by the batch, and a draw that depends on what its neighbours asked for."""
    seeded = [
        ask(PROMPT, temperature=1.0, seed=7, max_tokens=12),
        ask(PROMPT, temperature=0.8, seed=8, top_p=0.7, max_tokens=12),
        ask(PROMPT, temperature=1.3, seed=9, top_k=40, max_tokens=12),
    ]
    others = [ask([20 + i], temperature=1.0, top_p=1 - i / 20, max_tokens=3 + i) for i in range(5)]

    async def alone(engine: InProcessEngine) -> list[str]:
        return [await text(engine, request) for request in seeded]

    async def together(engine: InProcessEngine) -> list[str]:
        return list(await asyncio.gather(*(text(engine, request) for request in [*others, *seeded])))[len(others) :]

    first = with_engine(flat, alone)
    assert first == with_engine(flat, together)
    assert len(set(first)) == 3


def test_other_seeds_and_none_differ(flat: Path) -> None:
    """Catches a seed that is not used, and a fixed one where none is given."""
    requests = [ask(PROMPT, temperature=1.0, seed=seed) for seed in (1, 2, None, None)]

    async def use(engine: InProcessEngine) -> list[str]:
        return [await text(engine, request) for request in requests]

    assert len(set(with_engine(flat, use))) == 4


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    vocabulary=st.sampled_from([7, 600]),
    spread=st.sampled_from([0.1, 1.0, 8.0]),
    top_k=st.sampled_from([0, 1, 5, LIKELIEST, LIKELIEST + 44]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.01]),
)
def test_only_tokens_that_the_filters_keep_are_drawn(
    seed: int, vocabulary: int, spread: float, top_k: int, top_p: float
) -> None:
    """Catches a nucleus that is one token too wide or narrow, against transformers' own filters."""
    logits = torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(seed)) * spread
    kept = logits
    if top_k:
        kept = TopKLogitsWarper(min(top_k, vocabulary))(None, kept)  # type: ignore[no-untyped-call]
    if top_p < 1:
        kept = TopPLogitsWarper(top_p)(None, kept)  # type: ignore[no-untyped-call]
    allowed = set(torch.isfinite(kept[0]).nonzero()[:, 0].tolist())
    rows = [drawing(seed=i, top_k=top_k, top_p=top_p) for i in range(40)]
    drawn = tokens(logits.expand(40, -1), rows)
    assert set(drawn) <= allowed
    if len(allowed) == 1:
        assert set(drawn) == allowed


@pytest.mark.parametrize("filters", [{}, {"top_k": 4}, {"top_p": 0.9}, {"top_p": 0.999999}])
def test_tokens_come_as_often_as_their_probability_says(filters: dict[str, Any]) -> None:
    """Catches a distribution that is not scaled again after a filter, and a temperature used upside down."""
    logits, temperature, draws = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0, -3.0]]), 0.7, 4000
    probs = torch.softmax(logits[0] / temperature, dim=0)
    if filters.get("top_k"):
        probs[4:] = 0
    if filters.get("top_p") == 0.9:
        probs[3:] = 0  # the first two hold less, the first three more
    probs /= probs.sum()
    rows = [drawing(seed=i, temperature=temperature, **filters) for i in range(draws)]
    counts = torch.bincount(torch.tensor(tokens(logits.expand(draws, -1), rows)), minlength=6)
    deviation = (probs * (1 - probs) / draws).sqrt()
    assert torch.all((counts / draws - probs).abs() <= 5 * deviation + 1e-9)


def test_penalties_are_openai_s() -> None:
    """Catches a penalty on the prompt's tokens, and one that grows with a count where it must not, or does not."""
    logits = torch.tensor([[1.0, 0.9, 0.0]])
    row = drawing(temperature=0.0, presence_penalty=0.25, frequency_penalty=0.1)
    drawn = []
    for _ in range(4):
        (token,) = tokens(logits, [row])
        row.accept(token)
        drawn.append(token)
    # after 0: 0.65 against 0.9; after 0 and 1: 0.65 against 0.55; then 0.55 and 0.55, the first of which is taken
    assert drawn == [0, 1, 0, 0] or drawn == [0, 1, 0, 1]
    assert row.changes()[0] == pytest.approx(-0.25 - 0.1 * drawn.count(0))


def test_a_bias_can_forbid_and_force(flat: Path) -> None:
    async def use(engine: InProcessEngine) -> tuple[list[bytes], list[bytes], list[bytes], bytes]:
        free = await token_bytes(engine, ask(PROMPT, max_tokens=1))
        likeliest = next(token for token in range(500) if engine._runner.vocabulary.bytes_of(token) == free[0])
        other = await token_bytes(engine, ask(PROMPT, logit_bias={likeliest: -100.0}, max_tokens=1))
        forced = await token_bytes(engine, ask(PROMPT, logit_bias={65: 100.0}, max_tokens=3))
        return free, other, forced, engine._runner.vocabulary.bytes_of(65)

    free, other, forced, wanted = with_engine(flat, use)
    assert free != other
    assert forced == [wanted] * 3


def test_a_bias_on_a_token_that_is_not_there_is_refused(flat: Path) -> None:
    """Catches an index beyond the logits, which would end the step for every other request."""
    with pytest.raises(Refused) as refused:
        with_engine(flat, lambda engine: text(engine, ask(PROMPT, logit_bias={512: 1.0})))
    assert refused.value.param == "logit_bias"


def test_logprobs_are_the_model_s_own(flat: Path) -> None:
    """Catches logarithms taken after the temperature or a bias, and alternatives of another position."""
    model = AutoModelForCausalLM.from_pretrained(flat).eval()

    async def use(engine: InProcessEngine) -> Any:
        request = ask(PROMPT, temperature=0.5, seed=3, logprobs=4, logit_bias={70: 3.0}, max_tokens=6)
        entries = [entry for piece in await pieces(engine, request) for entry in piece.logprobs]
        return entries, engine._runner.vocabulary.bytes_of

    entries, bytes_of = with_engine(flat, use)
    assert len(entries) == 6
    by_bytes = {bytes_of(token): token for token in reversed(range(500))}
    ids = list(PROMPT)
    for entry in entries:
        with torch.no_grad():
            logs = torch.log_softmax(model(torch.tensor([ids])).logits[0, -1], dim=-1)
        best = logs.topk(4)
        assert [top.logprob for top in entry.top] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert [top.bytes for top in entry.top] == [bytes_of(token) for token in best.indices.tolist()]
        ids.append(by_bytes[entry.bytes])
        assert entry.logprob == pytest.approx(float(logs[ids[-1]]), abs=1e-4)


def test_a_row_without_numbers_is_told_apart() -> None:
    """Catches one broken sequence that ends the step for all, or that gets token 0."""
    logits = torch.tensor([[math.nan, 1.0], [0.0, 1.0], [-math.inf, -math.inf]])
    drawn = draw(logits, [drawing(temperature=t) for t in (0.0, 0.0, 1.0)])
    assert [d and d.token for d in drawn] == [None, 1, None]
