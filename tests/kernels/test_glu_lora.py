"""The activation's backward with adapters' gradients: against the two steps apart; the kernels, interpreted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.interpreter import needs_interpreter
from whet.kernels import glu_lora as module
from whet.kernels.glu import ACTIVATIONS, glu, glu_backward
from whet.kernels.glu_lora import (
    Factors,
    Sum,
    glu_backward_lora,
    glu_backward_lora_reference,
)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def strided(x: Tensor, extra: int = 3) -> Tensor:
    """x as the first columns of a wider buffer whose rest is NaN."""
    buffer = torch.full((x.shape[0], x.shape[1] + extra), float("nan"), dtype=x.dtype)
    buffer[:, : x.shape[1]] = x
    return buffer[:, : x.shape[1]]


def inputs(T: int, F: int, ranks: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Factors]:
    factors = Factors(*(strided(normal(T, r, seed=i, dtype=dtype)) for i, r in enumerate(ranks)))
    return strided(normal(T, F, seed=7, dtype=dtype)), strided(normal(T, 2 * F, seed=8, dtype=dtype)), factors


def sums_for(F: int, ranks: tuple[int, int, int], add: bool, dtype: torch.dtype) -> tuple[Sum, Sum, Sum]:
    """Filled with ones where they are added to, with NaN where they are not."""
    fill = 1.0 if add else float("nan")
    shapes = [(ranks[0], F), (F, ranks[1]), (F, ranks[2])]
    scales = (1.0, 0.5, 2.0)
    down, gate, up = (Sum(torch.full(s, fill, dtype=dtype), x, add) for s, x in zip(shapes, scales, strict=True))
    return down, gate, up


def expected(dact: Tensor, gate_up: Tensor, activation: str, factors: Factors, add: bool) -> list[Tensor]:
    """The gradient of gate_up and the three of adapters, step by step."""
    grad = glu_backward(dact, gate_up, activation)
    dgate, dup = grad.chunk(2, dim=1)
    g, gate, up = factors
    found = [g.T @ glu(gate_up, activation), 0.5 * dgate.T @ gate, 2.0 * dup.T @ up]
    return [grad, *(x + 1 if add else x for x in found)]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("add", [False, True])
def test_reference(activation: str, add: bool) -> None:
    """Catches gate's and up's halves or tails swapped, a scale left out, a sum that is replaced or was not empty."""
    ranks = (3, 2, 5)
    dact, gate_up, factors = inputs(9, 22, ranks, torch.float64)
    wanted = expected(dact, gate_up, activation, factors, add)
    sums = sums_for(22, ranks, add, torch.float64)
    out = torch.empty_like(gate_up)
    assert glu_backward_lora(dact, gate_up, activation, factors, sums, out=out) is out
    for got, exact in zip((out, *(s.total for s in sums)), wanted, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-12)


SHAPES = [(1, 1, (1, 1, 1)), (5, 130, (4, 16, 8)), (150, 70, (8, 3, 17)), (0, 40, (2, 2, 2))]


@needs_interpreter
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(("T", "F", "ranks"), SHAPES)
def test_kernels(
    T: int, F: int, ranks: tuple[int, int, int], in_place: bool, add: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches rows that no program takes or two do, ranks below a tile, neighbours of a row, a late read."""
    monkeypatch.setattr(module, "ROWS", 64)
    monkeypatch.setattr(module, "BLOCK_T", 32)
    dact, gate_up, factors = inputs(T, F, ranks, torch.float32)
    wanted, sums = (sums_for(F, ranks, add, torch.float32) for _ in range(2))
    exact = glu_backward_lora_reference(dact, gate_up, "silu", factors, wanted, torch.empty(T, 2 * F))
    out = gate_up if in_place else strided(torch.empty(T, 2 * F))
    assert module.glu_backward_lora_triton(dact, gate_up, "silu", factors, sums, out) is out
    torch.testing.assert_close(out, exact, rtol=1e-5, atol=1e-5)
    for got, want in zip(sums, wanted, strict=True):
        torch.testing.assert_close(got.total, want.total, rtol=1e-5, atol=1e-4)
    assert T == 0 or out._base is None or out._base[:, 2 * F :].isnan().all()


def test_refuses_what_it_would_misread() -> None:
    """Catches shapes that read past a tensor's end, and a sum whose rows lie apart."""
    ranks = (2, 2, 2)
    dact, gate_up, factors = inputs(4, 6, ranks, torch.float32)
    sums, out = sums_for(6, ranks, False, torch.float32), torch.empty(4, 12)
    with pytest.raises(ValueError, match=r"must be \(4, 12\)"):
        glu_backward_lora(dact, gate_up[:, :10], "silu", factors, sums, out=out)
    with pytest.raises(ValueError, match=r"must be \(4, 2\)"):
        glu_backward_lora(dact, gate_up, "silu", factors._replace(up_TR=factors.up_TR[:3]), sums, out=out)
    flipped = (Sum(torch.empty(6, 2).T), *sums[1:])
    with pytest.raises(ValueError, match=r"a sum is \(2, 6\); it must be \(2, 6\), contiguous"):
        glu_backward_lora(dact, gate_up, "silu", factors, flipped, out=out)
