"""RMSNorm's kernels on a GPU, bf16 and fp32: no further from fp64 than plain torch in that precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from whet.kernels.rms_norm import rms_norm, rms_norm_backward

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

EPS = 1e-5
SHAPES = [(1, 64), (37, 1000), (515, 2304), (4096, 4096), (100, 14336)]
PRECISIONS = [torch.bfloat16, torch.float32]


def draw(*shape: int, seed: int, dtype: torch.dtype, extra: int = 0) -> Tensor:
    """Random numbers on the card, in rows that are `extra` values apart."""
    wide = torch.randn(*shape[:-1], shape[-1] + extra, generator=torch.Generator().manual_seed(seed))
    return wide.to("cuda", dtype)[..., : shape[-1]]


def plain(x: Tensor, w: Tensor, offset: float, residual: Tensor | None = None) -> Tensor:
    """As the models of transformers compute it, rounding on the way."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = (x.to(wide) * torch.rsqrt(x.to(wide).pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype) * (offset + w)
    return y if residual is None else residual + y


def error(got: Tensor, exact: Tensor) -> float:
    assert got.isfinite().all()
    return ((got.double().cpu() - exact).norm() / exact.norm()).item()


def check(got: Tensor, expected: Tensor, exact: Tensor, floor: float) -> None:
    """floor is for fp32, where the order of a sum alone decides which of the two is closer."""
    assert error(got, exact) <= max(1.05 * error(expected, exact), floor if got.dtype == torch.float32 else 0.0)


@pytest.mark.parametrize(("T", "D"), SHAPES)
@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("with_residual", [False, True])
def test_forward_and_backward(T: int, D: int, dtype: torch.dtype, with_residual: bool) -> None:
    """Catches rounding between steps, sums in bf16, and what the interpreter can't see: masks, strides, reductions."""
    x, dy = draw(T, D, seed=0, dtype=dtype, extra=8), draw(T, D, seed=1, dtype=dtype, extra=3)
    w, residual = draw(D, seed=2, dtype=dtype), draw(T, D, seed=3, dtype=dtype, extra=1) if with_residual else None
    skip = draw(T, D, seed=4, dtype=dtype) if with_residual else None

    def by_autograd(*tensors: Tensor | None) -> list[Tensor]:
        x, w, dy, residual, skip = tensors
        leaves = [x.detach().requires_grad_(), w.detach().requires_grad_()]
        y = plain(*leaves, 1.0, residual)
        dx, dw = torch.autograd.grad(y, leaves, dy)
        return [y.detach(), dx if skip is None else dx + skip, dw]

    inputs = (x, w, dy, residual, skip)
    expected = by_autograd(*inputs)
    exact = by_autograd(*(None if t is None else t.double().cpu() for t in inputs))
    out = torch.full((T, D + 64), float("nan"), device="cuda", dtype=dtype)
    check(rms_norm(x, w, EPS, 1.0, residual=residual, out=out[:, :D]), expected[0], exact[0], 1e-7)
    assert out[:, D:].isnan().all()
    weight_grad = torch.zeros(D, device="cuda")
    check(rms_norm_backward(dy, x, w, EPS, 1.0, residual=skip), expected[1], exact[1], 2e-7)
    normed = torch.empty_like(x)
    options = {"residual": skip, "weight_grad": weight_grad, "normed": normed}
    got = rms_norm_backward(dy, x, w, EPS, 1.0, **options, out=out[:, :D])
    torch.testing.assert_close(normed, rms_norm(x, w, EPS, 1.0), rtol=2 * torch.finfo(dtype).eps, atol=0)
    check(got, expected[1], exact[1], 2e-7)
    check(weight_grad, expected[2], exact[2], 1e-6)
    assert out[:, D:].isnan().all()


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_in_place(dtype: torch.dtype) -> None:
    """Catches a program that reads a row after it has begun to write it."""
    T, D = 1031, 3000
    x, w, dy, residual = (draw(*s, seed=i, dtype=dtype) for i, s in enumerate([(T, D), (D,), (T, D), (T, D)]))
    expected = rms_norm(x, w, EPS, residual=residual)
    place = residual.clone()
    assert torch.equal(rms_norm(x, w, EPS, residual=place, out=place), expected)
    for weight_grad in (None, torch.zeros(D, device="cuda")):
        expected = rms_norm_backward(dy, x, w, EPS, residual=residual, weight_grad=weight_grad)
        place = residual.clone()
        assert torch.equal(
            rms_norm_backward(dy, x, w, EPS, residual=place, weight_grad=weight_grad, out=place), expected
        )
        place = dy.clone()
        assert torch.equal(
            rms_norm_backward(place, x, w, EPS, residual=residual, weight_grad=weight_grad, out=place), expected
        )


def test_the_weight_gradient_is_the_same_every_time() -> None:
    """Catches atomics: a sum whose order changes from run to run."""
    x, w, dy = (draw(*s, seed=i, dtype=torch.bfloat16) for i, s in enumerate([(5000, 4096), (4096,), (5000, 4096)]))
    first, *others = (torch.zeros(4096, device="cuda") for _ in range(4))
    rms_norm_backward(dy, x, w, EPS, weight_grad=first)
    for other in others:
        rms_norm_backward(dy, x, w, EPS, weight_grad=other)
        assert torch.equal(first, other)


def test_a_weight_in_fp32() -> None:
    """Catches a kernel that takes the weight's precision from x, or writes the output in the weight's."""
    x, w = draw(33, 512, seed=0, dtype=torch.bfloat16), draw(512, seed=1, dtype=torch.float32)
    got = rms_norm(x, w, EPS)
    assert got.dtype == torch.bfloat16
    exact = plain(x.double(), w.double(), 0.0)
    assert ((got.double() - exact).abs() <= 2**-8 * exact.abs() * 1.001).all()
