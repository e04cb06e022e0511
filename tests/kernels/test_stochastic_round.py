"""Rounding at random: unbiased, exact where it can be, the same everywhere, and random enough."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.interpreter import needs_interpreter
from whet.kernels.stochastic_round import (
    random_bits_reference,
    stochastic_round,
    stochastic_round_reference,
    stochastic_round_triton,
)

SIZES = [1, 127, 128, 129, 255, 256, 257, 2048, 4231]
KEY: dict[str, int] = {"seed": 3, "step": 7}


def floats(patterns: Any) -> Tensor:
    """fp32 of these bits, 0 to 2^32 - 1."""
    bits = torch.as_tensor(patterns, dtype=torch.int64)
    return torch.where(bits > 0x7FFFFFFF, bits - (1 << 32), bits).to(torch.int32).view(torch.float32)


def bits_of(rounded: Tensor) -> Tensor:
    return rounded.view(torch.int16).long() & 0xFFFF


def rounded(x: Tensor, blocks: Tensor | int = 0, **key: int) -> Tensor:
    return stochastic_round(x, torch.empty(x.shape, dtype=torch.bfloat16), blocks, **(KEY | key))


def wide_draw(n: int, seed: int) -> Tensor:
    """Every kind of fp32: of any exponent and sign, subnormal, infinite, NaN of any payload, and what bf16 can hold."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 1 << 32, (n,), generator=generator)
    bits[::5] &= 0x807FFFFF
    bits[1::5] |= 0x7F800000
    bits[2::7] &= 0xFFFF0000
    bits[3::11] = bits[3::11] & 0x80000000 | 0x7F800000
    return floats(bits)


@pytest.mark.parametrize("value", [1.0, -1.0, 0.02, -3e-39, 1e-40, 2.9e38])
@pytest.mark.parametrize("part", [1, 0x1234, 0x8000, 0xC000, 0xFFFF])
def test_the_share_that_goes_up_is_the_fraction(value: float, part: int) -> None:
    """Catches rounding to nearest, a bias, and a sign or a subnormal number that goes the wrong way."""
    n = 1 << 17
    below = torch.tensor([value]).view(torch.int32).item() & 0xFFFF0000
    x = floats([below | part]).expand(n).contiguous()
    share, fraction = (bits_of(rounded(x)) - (below >> 16)).double(), part / 65536
    assert set(share.unique().tolist()) <= {0.0, 1.0}
    assert abs(share.mean().item() - fraction) <= 5 * (fraction * (1 - fraction) / n) ** 0.5


def test_the_mean_over_steps_is_the_number_itself() -> None:
    """Catches a place in the block that is always rounded the same way: bits that the step does not change."""
    x, steps = torch.randn(512, generator=torch.Generator().manual_seed(0)), 4000
    mean = sum(rounded(x, step=step).double() for step in range(steps)) / steps
    ulp = torch.exp2(torch.frexp(x)[1].double() - 8)
    assert ((mean - x) / ulp).abs().max() < 5 * 0.5 / steps**0.5
    assert ((mean - x) / ulp).mean().abs() < 5 * 0.5 / (steps * 512) ** 0.5


def test_what_bf16_can_hold_stays() -> None:
    """Catches an infinity that becomes NaN, a zero that loses its sign, a NaN that becomes a number: every bf16."""
    patterns = torch.arange(1 << 16)
    for step in range(3):
        got = bits_of(rounded(floats(patterns << 16), step=step))
        nan = (patterns & 0x7FFF) > 0x7F80
        assert torch.equal(got[~nan], patterns[~nan])
        assert torch.equal(got[nan], patterns[nan] | 0x40)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.integers(0, (1 << 32) - 1), min_size=1, max_size=600), st.integers(0, 1 << 40), st.integers(0, 1 << 20)
)
def test_the_result_is_one_of_two_neighbours(patterns: list[int], seed: int, step: int) -> None:
    """Catches bits that carry into the sign, and what NaN of some payload become: infinity, or 0."""
    x = floats(patterns)
    got = rounded(x, seed=seed, step=step)
    assert torch.equal(got.isnan(), x.isnan())
    assert torch.equal(got.signbit(), x.signbit())
    down = floats([p & 0xFFFF0000 for p in patterns]).double()
    up = floats([min((p & 0x7FFF0000) + 0x10000, 0x7F800000) | p & 0x80000000 for p in patterns]).double()
    number = ~x.isnan()
    assert ((got.double() == down) | ((got.double() == up) & (x != down)))[number].all()


def test_above_the_largest_number() -> None:
    """Catches a carry past infinity. Rounding to nearest, too, ends there from the middle on."""
    edge = floats([0x7F7F4000] * 4096 + [0xFF7F4000] * 4096)
    got = rounded(edge)
    assert set(bits_of(got).tolist()) == {0x7F7F, 0x7F80, 0xFF7F, 0xFF80}
    assert 0.2 < got.isinf().double().mean() < 0.3


def plain_bits(block: int, seed: int, step: int) -> list[int]:
    """The docstring's formula, in Python's integers."""

    def mix64(z: int) -> int:
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31

    def mix(h: int) -> int:
        h = (h ^ h >> 16) * 0x85EBCA6B % 2**32
        h = (h ^ h >> 13) * 0xC2B2AE35 % 2**32
        return h ^ h >> 16

    k1, k0 = divmod(mix64((mix64((seed + 0x9E3779B97F4A7C15) % 2**64) + step) % 2**64), 2**32)
    r = mix(block ^ k0)
    s = mix(r ^ k1)
    h = [mix(mix((r + lane * 0x9E3779B9) % 2**32) ^ s) for lane in range(128)]
    return [x & 0xFFFF for x in h] + [x >> 16 for x in h]


@pytest.mark.parametrize("seed", [0, -1, 12345, 2**63, 2**64 - 1])
@pytest.mark.parametrize("step", [0, 1, 2**31])
def test_the_bits_are_those_of_the_formula(seed: int, step: int) -> None:
    """Catches a product that overflows, and a change of the bits: checkpoints must go on as they were begun."""
    blocks = [0, 1, 255, 65536, 2**31 - 1]
    got = random_bits_reference(torch.tensor(blocks), seed=seed, step=step)
    assert got.tolist() == [plain_bits(block, seed, step) for block in blocks]


def test_the_bits_are_random() -> None:
    """Catches bits that follow from the next value's, block's, step's or seed's, and one of the 16 that isn't even."""
    blocks = torch.arange(4096)
    bits = random_bits_reference(blocks, seed=0, step=1)
    others = {
        "lane": bits.roll(1, 1),
        "half": bits.roll(128, 1),
        "block": bits.roll(1, 0),
        "step": random_bits_reference(blocks, seed=0, step=2),
        "seed": random_bits_reference(blocks, seed=1, step=1),
        "step for seed": random_bits_reference(blocks, seed=1, step=0),
    }
    n = bits.numel()
    for position in range(16):
        one = (bits >> position & 1).double()
        assert abs(one.mean() - 0.5) < 5 * 0.5 / n**0.5, position
        for name, other in others.items():
            agreement = (one == (other >> position & 1)).double().mean()
            assert abs(agreement - 0.5) < 5 * 0.5 / n**0.5, (position, name)
    for byte in (bits & 0xFF, bits >> 8):
        counts = torch.bincount(byte.view(-1), minlength=256).double()
        chi2 = ((counts - n / 256) ** 2 / (n / 256)).sum()
        assert abs(chi2 - 255) < 5 * (2 * 255) ** 0.5
    per_lane, per_block = bits.double().mean(0), bits.double().mean(1)
    assert (per_lane / 65535 - 0.5).abs().max() < 5.5 * 12**-0.5 / 4096**0.5
    assert (per_block / 65535 - 0.5).abs().max() < 5.5 * 12**-0.5 / 256**0.5


def test_a_value_s_rounding_is_its_block_s() -> None:
    """Catches bits by the position in a call: pieces and tables of blocks must give what the whole gives."""
    x = wide_draw(2048 + 100, seed=1)
    whole = rounded(x, 40)
    assert torch.equal(bits_of(rounded(x[768:], 43)), bits_of(whole[768:]))
    order = torch.tensor([5, 0, 7, 2])
    picked = torch.cat([x[i * 256 : (i + 1) * 256] for i in order])
    expected = torch.cat([whole[i * 256 : (i + 1) * 256] for i in order])
    assert torch.equal(bits_of(rounded(picked, (40 + order).int())), bits_of(expected))


@needs_interpreter
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("with_table", [False, True])
def test_the_kernel_is_the_reference_bitwise(n: int, with_table: bool) -> None:
    """Catches signed shifts and products, a NaN treated otherwise, and what is written past the end."""
    x, blocks = wide_draw(n, seed=n), 2**31 - 40
    table = torch.randint(0, 2**31 - 1, (-(-n // 256),), dtype=torch.int32) if with_table else blocks
    out = torch.full((n + 300,), -7.0, dtype=torch.bfloat16)
    for seed, step in ((0, 1), (2**40, 16), (-3, 2)):
        stochastic_round_triton(x, out[:n], table, seed=seed, step=step)
        expected = stochastic_round_reference(x, table, seed=seed, step=step)
        assert torch.equal(bits_of(out[:n]), bits_of(expected))
    assert (out[n:] == -7).all()


@needs_interpreter
def test_nothing_to_round() -> None:
    stochastic_round_triton(torch.empty(0), torch.empty(0, dtype=torch.bfloat16), 0, **KEY)
    assert rounded(torch.empty(0)).shape == (0,)


def test_torch_s_generator_is_left_alone() -> None:
    """Catches random numbers taken from dropout's and the data's."""
    before = torch.get_rng_state()
    rounded(torch.randn(1000, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("x", "out", "blocks", "message"),
    [
        (torch.ones(6, dtype=torch.bfloat16), torch.ones(6).bfloat16(), 0, "x is torch.bfloat16"),
        (torch.ones(6), torch.ones(6), 0, "out is torch.float32"),
        (torch.ones(2, 3), torch.ones(2, 3).bfloat16(), 0, "must be a contiguous"),
        (torch.ones(12)[::2], torch.ones(6).bfloat16(), 0, "must be a contiguous"),
        (torch.ones(6), torch.ones(12).bfloat16()[::2], 0, "must be a contiguous"),
        (torch.ones(6), torch.ones(5).bfloat16(), 0, "one size"),
        (torch.ones(6), torch.ones(6).bfloat16(), -1, "0 to 2"),
        (torch.ones(257), torch.ones(257).bfloat16(), 2**31 - 1, "0 to 2"),
        (torch.ones(257), torch.ones(257).bfloat16(), torch.zeros(1, dtype=torch.int32), r"\[2\]"),
        (torch.ones(257), torch.ones(257).bfloat16(), torch.zeros(2, dtype=torch.int64), r"\[2\]"),
        (torch.ones(257), torch.ones(257).bfloat16(), torch.zeros(4, dtype=torch.int32)[::2], "strided"),
    ],
)
def test_what_the_kernel_would_misread(x: Tensor, out: Tensor, blocks: Tensor | int, message: str) -> None:
    """Catches memory read in another order, or past its end."""
    with pytest.raises(ValueError, match=message):
        stochastic_round(x, out, blocks, **KEY)
