"""AdamW on 8-bit moments: the formula, the nearest code, bitsandbytes' own update, and the kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import bitsandbytes.functional as F
import pytest
import torch
from torch import Tensor

from tests.kernels.interpreter import needs_interpreter
from whet.kernels.adamw_8bit import (
    DTYPES,
    CodeMap,
    Entry,
    Tables,
    Update,
    adamw_8bit,
    adamw_8bit_reference,
    adamw_8bit_triton,
    alignment,
)
from whet.kernels.stochastic_round import stochastic_round_reference

NUMBERS = F.create_dynamic_map(signed=True), F.create_dynamic_map(signed=False)
MAPS = CodeMap.of(NUMBERS[0]), CodeMap.of(NUMBERS[1])
SIZES = [1, 255, 256, 257, 2048, 0, 5000]
TENSORS = ("weight", "grad", "moment1", "moment2", "scale1", "scale2")


def entry(n: int, dtype: torch.dtype, eight_bits: bool, seed: int, first: int = 0) -> Entry:
    """Moments of gradients such as the one given."""
    draw = torch.Generator().manual_seed(seed)
    weight, grad = torch.randn(n, generator=draw).to(dtype), torch.randn(n, generator=draw).mul(0.01).to(dtype)
    moments = torch.randn(n, generator=draw) * 0.003, torch.randn(n, generator=draw).square() * 1e-4
    if not eight_bits:
        return Entry(weight, grad, *moments, None, None, first)
    (codes1, scale1), (codes2, scale2) = (
        torch.ops.bitsandbytes.quantize_blockwise(x, of, 256) for x, of in zip(moments, NUMBERS, strict=True)
    )
    return Entry(weight, grad, codes1, codes2, scale1, scale2, first)


def entries(dtype: torch.dtype, eight_bits: bool, sizes: Sequence[int] = SIZES) -> list[Entry]:
    made: list[Entry] = []
    for n in sizes:
        first = made[-1].first - (-made[-1].weight.numel() // 256) if made else 7
        made.append(entry(n, dtype, eight_bits, len(made), first))
    return made


def copies(of: Sequence[Entry]) -> list[Entry]:
    return [Entry(*(x.clone() if isinstance(x, Tensor) else x for x in one[:6]), one.first) for one in of]


def maps(eight_bits: bool) -> tuple[CodeMap, CodeMap] | None:
    return MAPS if eight_bits else None


def update(step: int = 3, **changes: Any) -> Update:
    return Update(step, 1e-3, 0.9, 0.99, 1e-8, 0.1)._replace(**changes)


def decoded(codes: Tensor, scale: Tensor, numbers: Tensor) -> Tensor:
    return torch.ops.bitsandbytes.dequantize_blockwise(codes, scale, numbers, 256, torch.float32)


def by_tables(x: Tensor, of: CodeMap) -> Tensor:
    """As the kernel looks a number up."""
    code = of.cells[(x.view(torch.int32) >> 16 & 0xFFFF).long()].long()
    return code + (x > of.middles[code])


# ---------------------------------------------------------------- maps


@pytest.mark.parametrize("which", [0, 1])
def test_one_comparison_finds_the_nearest_number(which: int) -> None:
    """Catches a cell whose candidate is its highest value's, a sign that orders cells the wrong way, and a middle that
    is taken for above itself: at every cell's ends, at each middle and its neighbours, and in between."""
    of, numbers = MAPS[which], NUMBERS[which].double()
    ends = torch.arange(1 << 16).repeat_interleave(2) << 16 | torch.tensor([0, 0xFFFF]).repeat(1 << 16)
    ends = torch.where(ends > 0x7FFFFFFF, ends - (1 << 32), ends).to(torch.int32).view(torch.float32)
    middles = of.middles[:-1]
    near = [torch.nextafter(middles, torch.tensor(side)) for side in (-2.0, 2.0)]
    drawn = torch.rand(20000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    x = torch.cat((ends[~ends.isnan()].clamp(-2, 2).unique(), middles, *near, drawn, drawn**5, drawn**19))
    found = by_tables(x, of)
    assert torch.equal(found, torch.searchsorted(middles, x)), "of two as near, the lower"
    nearest = (x.double()[:, None] - numbers).abs_().amin(1)
    assert ((x - numbers[found]).abs() <= nearest + 2.4e-7 * x.abs()).all(), "but for a middle's rounding"
    assert by_tables(torch.tensor([torch.inf, -torch.inf]), of).tolist() == [255, 0]


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (torch.linspace(-1, 1, 255), "256 ascending"),
        (torch.linspace(-1, 1, 256).double(), "256 ascending"),
        (torch.linspace(1, -1, 256), "256 ascending"),
        (torch.cat((torch.zeros(2), torch.linspace(0.1, 1, 254))), "256 ascending"),
        (torch.linspace(0.1, 1, 256), "no 0"),
        (torch.cat((torch.zeros(1), torch.linspace(0.9, 1, 255))), "one cell"),
    ],
)
def test_maps_that_one_comparison_cannot_tell(numbers: Tensor, message: str) -> None:
    """Catches codes that are not the nearest, in maps unlike bitsandbytes'."""
    with pytest.raises(ValueError, match=message):
        CodeMap.of(numbers)


# ---------------------------------------------------------------- reference


def test_moments_of_32_bits_are_torch_s_adamw() -> None:
    """Catches a wrong formula: the corrections, where epsilon is added, and decay that goes into the moments."""
    one = Entry(*(torch.zeros(300) for _ in range(4)), None, None, 0)
    one.weight.copy_(torch.randn(300, generator=torch.Generator().manual_seed(0)))
    other = torch.nn.Parameter(one.weight.double())
    adam = torch.optim.AdamW([other], lr=1e-2, betas=(0.9, 0.99), eps=1e-3, weight_decay=0.3)
    for step in range(1, 20):
        one.grad.copy_(torch.randn(300, generator=torch.Generator().manual_seed(step)) * 0.01)
        other.grad = one.grad.double()
        adam_update = Update(step, 1e-2, 0.9, 0.99, 1e-3, 0.3)
        adamw_8bit_reference([one], None, adam_update)
        adam.step()
    torch.testing.assert_close(one.weight.double(), other.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("eight_bits", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_step_is_bitsandbytes_own(dtype: torch.dtype, eight_bits: bool, decay: float) -> None:
    """Catches another order of the update, scales of other blocks, and codes that are not the nearest. From the states
    that bitsandbytes is in, step after step.

    Its codes on a CPU are approximate (up to 7 off near 0): where they differ from ours, ours are nearer.
    """
    own, share = entry(9000, dtype, eight_bits, 0), 0.0
    for step in range(1, 13):
        draw = torch.Generator().manual_seed(step)
        own.grad.copy_(torch.randn(9000, generator=draw) * 0.01)
        (ours,) = copies([own])
        exact = copies([own])[0]
        adamw_8bit([ours], maps(eight_bits), update(step, weight_decay=decay), Tables())
        if eight_bits:
            F.optimizer_update_8bit_blockwise(
                "adam", own.grad, own.weight, own.moment1, own.moment2, 0.9, 0.99, 0.0, 0.0, 1e-8, step, 1e-3,
                *NUMBERS, own.scale1, own.scale2, decay,
            )  # fmt: skip
        else:
            F.optimizer_update_32bit(
                "adam", own.grad, own.weight, own.moment1, 0.9, 1e-8, step, 1e-3, own.moment2, 0.99, weight_decay=decay
            )
        spacing = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
        torch.testing.assert_close(ours.weight.float(), own.weight.float(), rtol=spacing, atol=1e-7)
        assert (ours.weight != own.weight).float().mean() < (0.5 if dtype == torch.float32 else 1e-3)
        for i in (0, 1):
            a, b = ours[2 + i], own[2 + i]
            if not eight_bits:
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
                continue
            scale, numbers = own[4 + i], NUMBERS[i]
            torch.testing.assert_close(ours[4 + i], scale, rtol=1e-6, atol=0)
            old = decoded(exact[2 + i], exact[4 + i], numbers)
            beta, g = (0.9, 0.99)[i], own.grad.float()
            new = beta * old + (1 - beta) * (g, g * g)[i]
            far = [(decoded(codes, scale, numbers) - new).abs() for codes in (a, b)]
            assert (far[0] <= far[1] + 1e-6 * scale.repeat_interleave(256)[:9000]).all()
            share = max(share, (a != b).float().mean().item())
    assert share < 0.05


@pytest.mark.parametrize("run", [adamw_8bit_reference, pytest.param("triton", marks=needs_interpreter)])
@pytest.mark.parametrize("eight_bits", [True, False])
def test_gradients_that_are_no_numbers(run: Any, eight_bits: bool) -> None:
    """Catches one NaN that makes its block's scale NaN, and a square that overflows into it."""
    bad = [3, 255, 256, 700]
    (before,) = entries(torch.float32, eight_bits, [777])
    before.grad[bad] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e25])
    (after,), (without,) = copies([before]), copies([before])
    without.grad[bad] = 0.0
    for one in (after, without):
        if run == "triton":
            adamw_8bit_triton([one], maps(eight_bits), update(), Tables())
        else:
            run([one], maps(eight_bits), update())
    good = torch.ones(777, dtype=torch.bool)
    good[bad] = False
    assert torch.equal(after.weight[~good], before.weight[~good])
    assert torch.equal(after.weight[good], without.weight[good])
    for name, numbers, scale in (("moment1", NUMBERS[0], "scale1"), ("moment2", NUMBERS[1], "scale2")):
        old, new = ([getattr(one, name), getattr(one, scale)] for one in (before, after))
        assert new[0].float().isfinite().all()
        if eight_bits:
            kept, largest = decoded(*old, numbers)[bad], new[1].repeat_interleave(256)[bad]
            assert ((decoded(*new, numbers)[bad] - kept).abs() <= 0.02 * largest).all(), "but for another scale"
        else:
            assert torch.equal(new[0][bad], old[0][bad])
            assert not torch.equal(new[0], old[0])


def test_weights_in_bf16_are_rounded_by_the_bits_of_their_place() -> None:
    """Catches rounding of other blocks' bits, and moments that depend on how weights are rounded."""
    (low,) = entries(torch.bfloat16, True, [1000])
    (wide,) = copies([low])
    wide = wide._replace(weight=low.weight.float(), grad=low.grad.float())
    adamw_8bit_reference([low], MAPS, update(seed=5))
    adamw_8bit_reference([wide], MAPS, update(seed=5))
    assert torch.equal(low.weight, stochastic_round_reference(wide.weight, 7, seed=5, step=3))
    assert torch.equal(low.moment1, wide.moment1)
    assert torch.equal(low.moment2, wide.moment2)


def test_blocks_of_zeros_stay_zero() -> None:
    """Catches 0 / 0 in a block that has had no gradient yet, and an infinity in one of the least numbers there are."""
    one = Entry(*(torch.zeros(512) for _ in range(2)), *(torch.full((512,), of.zero).byte() for of in MAPS),
                torch.zeros(2), torch.zeros(2), 0)  # fmt: skip
    one.grad[256:] = 1e-22  # squared, 1e-44
    adamw_8bit_reference([one], MAPS, update())
    assert (one.weight[:256] == 0).all()
    assert one.weight.isfinite().all()
    assert (one.scale1[0], one.scale2[0]) == (0, 0)
    assert (decoded(one.moment2, one.scale2, NUMBERS[1]) == 0).all()
    assert (decoded(one.moment1, one.scale1, NUMBERS[0])[256:] > 0).all()


# ---------------------------------------------------------------- kernel


def assert_close(ours: Entry, expected: Entry, rounds: bool) -> None:
    """Moments to the bit. Weights within the last bits of an update: roots differ by one between torch and numpy."""
    for name in TENSORS[2:]:
        a, b = getattr(ours, name), getattr(expected, name)
        assert b is None or torch.equal(a, b), name
    a, b = ours.weight.float(), expected.weight.float()
    if ours.weight.dtype == torch.float32:
        torch.testing.assert_close(a, b, rtol=2.5e-7, atol=1e-9)
        return
    spacing = 2**-7 if ours.weight.dtype == torch.bfloat16 else 2**-10
    torch.testing.assert_close(a, b, rtol=spacing, atol=0)
    # the interpreter cuts bf16 off where a GPU rounds to nearest (tests/gpu/test_optimizer.py)
    assert (ours.weight.dtype == torch.bfloat16 and not rounds) or (a != b).sum() <= 2


@needs_interpreter
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("eight_bits", [True, False])
@pytest.mark.parametrize("seed", [None, 2**40])
def test_the_kernel_is_the_reference(dtype: torch.dtype, eight_bits: bool, seed: int | None) -> None:
    """Catches a program that works on another parameter, masks at the end, halves of a block with each other's bits."""
    expected = entries(dtype, eight_bits)
    ours, tables = copies(expected), Tables()
    for step in (1, 16, 3):
        for one in (*expected, *ours):
            draw = torch.Generator().manual_seed(one.weight.numel() + step)
            one.grad.copy_(torch.randn(one.grad.shape, generator=draw) * 0.01)
            one.grad[100:101] = torch.nan
            one.grad[256:512] *= step == 3
        adamw_8bit_reference(expected, maps(eight_bits), update(step, seed=seed))
        adamw_8bit_triton(ours, maps(eight_bits), update(step, seed=seed), tables)
        for a, b in zip(ours, expected, strict=True):
            assert_close(a, b, rounds=seed is not None)
            b.weight.copy_(a.weight)


@needs_interpreter
@pytest.mark.parametrize("eight_bits", [True, False])
def test_nothing_is_written_past_the_end(eight_bits: bool) -> None:
    """Catches masks that are wrong where a block, or a program's blocks, are not full: at odd addresses, too."""
    (one,) = entries(torch.bfloat16, eight_bits, [2048 + 300])
    guarded, wholes = [], []
    for x in one[:6]:
        if isinstance(x, Tensor):
            whole = torch.full((x.numel() + 2101,), 77, dtype=x.dtype)
            guarded.append(whole[1 : 1 + x.numel()].copy_(x))
            wholes.append(whole)
        else:
            guarded.append(None)
    ours = Entry(*guarded, one.first)
    assert alignment(ours) == 1
    adamw_8bit_triton([ours], maps(eight_bits), update(seed=1), Tables())
    adamw_8bit_reference([one], maps(eight_bits), update(seed=1))
    assert_close(ours, one, rounds=True)
    for whole, x in zip(wholes, (x for x in ours[:6] if x is not None), strict=True):
        assert whole[0] == 77
        assert (whole[1 + x.numel() :] == 77).all()


@pytest.mark.parametrize("run", ["reference", pytest.param("triton", marks=needs_interpreter)])
def test_how_parameters_are_grouped_does_not_matter(run: str) -> None:
    """Catches random bits, or anything else, that depends on what is updated in the same launch."""
    together = entries(torch.bfloat16, True)
    apart = copies(together)
    for group in (together, *([one] for one in reversed(apart))):
        if run == "triton":
            adamw_8bit_triton(group, MAPS, update(seed=3), Tables())
        else:
            adamw_8bit_reference(group, MAPS, update(seed=3))
    for a, b in zip(together, apart, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a[:6], b[:6], strict=True))


@needs_interpreter
def test_tables_follow_what_moves_and_are_kept_otherwise() -> None:
    """Catches gradients read where they were a step ago, tables copied at every step, and those of fewer parameters."""
    ours, tables = entries(torch.float32, True, [300, 5000, 64]), Tables()
    expected = copies(ours)

    def step_of(*which: int) -> tuple[Tensor, Tensor]:
        adamw_8bit_triton([ours[i] for i in which], MAPS, update(), tables)
        adamw_8bit_reference([expected[i] for i in which], MAPS, update())
        for a, b in zip(ours, expected, strict=True):
            assert_close(a, b, rounds=False)
            b.weight.copy_(a.weight)
        return tables.rows, tables.owners

    first = step_of(0, 1, 2)
    same = step_of(0, 1, 2)
    assert first[0] is same[0]
    assert first[1] is same[1]
    ours[1] = ours[1]._replace(grad=-ours[1].grad)
    expected[1].grad.neg_()
    moved = step_of(0, 1, 2)
    assert moved[0] is not same[0]
    assert moved[1] is same[1]
    for which, owners in (((1, 2), [0, 0, 0, 1]), ((2, 1), [0, 1, 1, 1]), ((2, 0), [0, 1])):
        assert step_of(*which)[1].tolist() == owners


@needs_interpreter
def test_nothing_to_update() -> None:
    adamw_8bit_triton([], MAPS, update(), Tables())
    adamw_8bit_triton([entry(0, torch.float32, True, 0)], MAPS, update(), Tables())
    adamw_8bit([], MAPS, update(), Tables())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weight": torch.ones(300, dtype=torch.float64)}, "weight 1 is torch.float64"),
        ({"weight": torch.ones(300).half()}, "like the first"),
        ({"weight": torch.ones(300, 2)[:, 0]}, "one piece"),
        ({"grad": torch.ones(300).half()}, "grad 1 is torch.float16"),
        ({"grad": torch.ones(299)}, "300 values"),
        ({"moment1": torch.zeros(300)}, "moment1 1 is torch.float32"),
        ({"moment2": torch.zeros(600, dtype=torch.uint8)[::2]}, "one piece"),
        ({"scale2": torch.zeros(1)}, "2 values"),
        ({"scale1": None}, "missing"),
        ({"first": 2**31 - 1}, "0 to 2"),
    ],
)
@pytest.mark.parametrize("run", [adamw_8bit, pytest.param(adamw_8bit_triton, marks=needs_interpreter)])
def test_what_the_kernel_would_misread(run: Any, changed: dict[str, Any], message: str) -> None:
    """Catches memory read in another order, or past its end."""
    good = entry(300, torch.float32, True, 0)
    with pytest.raises(ValueError, match=message):
        run([good, good._replace(**changed)], MAPS, update(), Tables())
