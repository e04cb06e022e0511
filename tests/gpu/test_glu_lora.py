"""The activation's backward with adapters' gradients on a GPU: against fp64, at odd shapes, repeated."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from whet.kernels.glu import glu, glu_backward
from whet.kernels.glu_lora import Factors, Sum, glu_backward_lora, takes

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SHAPES = [
    (1, 8, (1, 1, 1)),
    (130, 200, (8, 8, 8)),
    (1025, 130, (16, 5, 16)),
    (4096, 14336, (16, 16, 16)),
    (2048, 8192, (32, 32, 32)),
]


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.bfloat16, extra: int = 8) -> Tensor:
    """With NaN beside each row."""
    generator = torch.Generator().manual_seed(seed)
    buffer = torch.full((shape[0], shape[1] + extra), float("nan"), dtype=dtype, device="cuda")
    buffer[:, : shape[1]] = torch.randn(*shape, generator=generator).to(dtype)
    return buffer[:, : shape[1]]


def sums_for(F: int, ranks: tuple[int, int, int], fill: float, add: bool) -> tuple[Sum, Sum, Sum]:
    shapes = [(ranks[0], F), (F, ranks[1]), (F, ranks[2])]
    down, gate, up = (
        Sum(torch.full(s, fill, device="cuda"), x, add) for s, x in zip(shapes, (1.0, 0.5, 2.0), strict=True)
    )
    return down, gate, up


def error(got: Tensor, exact: Tensor) -> float:
    return ((got.double() - exact).norm() / exact.norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("T", "F", "ranks"), SHAPES)
def test_gradients_are_those_of_the_steps_apart(
    T: int, F: int, ranks: tuple[int, int, int], dtype: torch.dtype
) -> None:
    """Catches rows or ranks left out, sums in 16 bits, what lies beside a row, tiles that a layout mixes up."""
    dact, gate_up = normal(T, F, seed=1, dtype=dtype), normal(T, 2 * F, seed=2, dtype=dtype)
    factors = Factors(*(normal(T, r, seed=3 + i, dtype=dtype) for i, r in enumerate(ranks)))
    assert takes(gate_up, ranks)
    act, grad = glu(gate_up, "silu"), glu_backward(dact, gate_up, "silu")
    dgate, dup = grad.chunk(2, dim=1)
    g, gate, up = (x.double() for x in factors)
    exact = [g.T @ act.double(), 0.5 * dgate.double().T @ gate, 2.0 * dup.double().T @ up]
    fresh, added = sums_for(F, ranks, float("nan"), add=False), sums_for(F, ranks, 1.0, add=True)
    out = torch.full((T, 2 * F + 8), float("nan"), dtype=dtype, device="cuda")
    for sums in (fresh, added):
        glu_backward_lora(dact, gate_up, "silu", factors, sums, out=out[:, : 2 * F])
        assert torch.equal(out[:, : 2 * F], grad)
        assert out[:, 2 * F :].isnan().all()
    floor = 1e-6  # fp32 sums of exact products of 16-bit values; values in fp32 are multiplied in fp32
    for one, more, product in zip(fresh, added, exact, strict=True):
        assert error(one.total, product) < floor
        assert error(more.total, product + 1) < floor
    again = sums_for(F, ranks, float("nan"), add=False)
    glu_backward_lora(dact, gate_up, "silu", factors, again, out=gate_up)
    assert torch.equal(gate_up, grad), "in place"
    assert all(torch.equal(a.total, b.total) for a, b in zip(fresh, again, strict=True)), "the same every time"
