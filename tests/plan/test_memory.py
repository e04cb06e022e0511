"""The plan: peaks that grow with what is kept, choices that fit and are the fastest that do."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from whet.models.activations import ALL, ATTENTION, INPUT, MOST
from whet.models.families import FamilySpec, LayerShape, Norm
from whet.plan import memory
from whet.plan.fit import describe
from whet.plan.memory import GIB, HOPPER, Plan, Sizes

NORM = Norm(nn.Parameter(torch.ones(1)), 1e-5)
LLAMA_8B = LayerShape(
    spec=FamilySpec(),
    width=4096,
    head_dim=128,
    q_heads=32,
    kv_heads=8,
    hidden=14336,
    activation="silu",
    scale=128**-0.5,
    window=None,
    softcap=None,
    layer_type=None,
    input_norm=NORM,
    mlp_norm=NORM,
)
SIZES = Sizes(LLAMA_8B, layers=32, vocabulary=128256, rank=16)
STATIC = 5.7 * GIB
HOST = 64 * GIB


def choose(budget: float, passes: list[int] | None = None, host: float = HOST) -> Plan | None:
    return memory.choose(SIZES, HOPPER, budget * GIB, STATIC, passes or [4096, 8192, 16384], 2048, host)


def test_what_a_token_keeps_is_what_the_design_counts() -> None:
    """Catches a value that is left out of the count: 92, 36, 16, 8 KB a token and layer at 8B."""
    for policy, kilobytes in ((ALL, 92), (MOST, 36), (ATTENTION, 16), (INPUT, 8)):
        assert memory.kept(SIZES, policy, 1024) / 1024 / 1024 == pytest.approx(kilobytes, abs=0.3)


def test_gemma_s_extra_outputs_are_counted() -> None:
    gemma = replace(SIZES, shape=replace(LLAMA_8B, spec=FamilySpec(post_norms=True)))
    assert memory.kept(gemma, MOST, 1) - memory.kept(SIZES, MOST, 1) == 2 * 2 * 4096


@pytest.mark.parametrize("tokens", [2048, 16384])
def test_keeping_more_takes_more_and_the_host_takes_it_off_the_device(tokens: int) -> None:
    def peak(policy):
        return memory.peak(SIZES, STATIC, {policy: 32}, tokens)

    assert peak(ALL) > peak(MOST) > peak(replace(MOST, offload=True))
    assert peak(MOST) > peak(ATTENTION) > peak(INPUT) > STATIC


@settings(max_examples=30, deadline=None)
@given(budget=st.floats(6.5, 90), host=st.sampled_from([0.0, 8 * GIB, HOST]))
def test_a_plan_fits_its_budget_and_the_host(budget: float, host: float) -> None:
    plan = choose(budget, host=host)
    if plan is None:
        return
    assert plan.peak <= budget * GIB
    tiled = replace(SIZES, tile=plan.tile)
    assert plan.peak == memory.peak(tiled, STATIC, Counter(plan.policies), plan.tokens)
    assert sum(memory.kept(SIZES, p, plan.tokens) for p in plan.policies if p.offload) <= host
    assert len(plan.policies) == SIZES.layers


def test_more_memory_is_never_slower() -> None:
    """Catches a search that misses plans which it finds for a smaller budget."""
    plans = [choose(budget) for budget in (7.5, 9, 12, 16, 21, 32, 48, 80)]
    times = [plan.seconds_a_token for plan in plans if plan]
    assert len(times) >= 7
    assert times == sorted(times, reverse=True)


def test_a_large_card_keeps_everything_and_a_small_one_parks() -> None:
    large, small = choose(120), choose(9)
    assert large is not None
    assert set(large.policies) == {ALL}
    assert large.tokens == 16384
    assert small is not None
    assert any(policy.offload for policy in small.policies)
    assert "on the host" in describe(small)


def test_what_cannot_fit_is_none_and_the_leanest_says_what_it_takes() -> None:
    assert choose(5.8) is None
    lean = memory.leanest(SIZES, STATIC, 4096)
    assert 5.8 * GIB < lean.peak < memory.peak(SIZES, STATIC, {ALL: 32}, 4096)
