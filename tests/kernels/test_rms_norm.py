"""RMSNorm: the references against fp64 autograd and transformers, the kernels against the references."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from whet.kernels import rms_norm as module
from whet.kernels.rms_norm import (
    rms_norm,
    rms_norm_backward,
    rms_norm_backward_reference,
    rms_norm_backward_triton,
    rms_norm_reference,
    rms_norm_triton,
)

EPS = 1e-3  # large enough that one added at the wrong place shows


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def strided(x: Tensor, extra: int = 7) -> Tensor:
    """The same values as the first columns of wider rows."""
    wide = torch.full((x.shape[0], x.shape[1] + extra), float("nan"), dtype=x.dtype)
    wide[:, : x.shape[1]] = x
    return wide[:, : x.shape[1]]


def formula(x: Tensor, w: Tensor, offset: float, residual: Tensor | None) -> Tensor:
    y = x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * (offset + w)
    return y if residual is None else residual + y


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("with_residual", [False, True])
def test_forward_and_backward_are_those_of_autograd(offset: float, with_residual: bool) -> None:
    """Catches a wrong term in dx, a gradient that replaces the skip path's or the weight's instead of adding to it."""
    x, w, dy = (draw(*shape, seed=i, dtype=torch.float64) for i, shape in enumerate([(5, 12), (12,), (5, 12)]))
    residual = draw(5, 12, seed=3, dtype=torch.float64) if with_residual else None
    leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
    y = formula(*leaves, offset, residual)
    dx, dw = torch.autograd.grad(y, leaves, dy)
    torch.testing.assert_close(rms_norm(x, w, EPS, offset, residual=residual), y)

    weight_grad = torch.ones(12)
    normed = torch.empty_like(x)
    got = rms_norm_backward(dy, x, w, EPS, offset, residual=residual, weight_grad=weight_grad, normed=normed)
    torch.testing.assert_close(normed, formula(x, w, offset, None))
    torch.testing.assert_close(got, dx if residual is None else dx + residual)
    torch.testing.assert_close(weight_grad, 1 + dw.float())


@pytest.mark.parametrize(("hf", "offset"), [(LlamaRMSNorm, 0.0), (Gemma3RMSNorm, 1.0)])
def test_it_is_the_norm_of_transformers(hf: type, offset: float) -> None:
    """Catches an offset or an eps that the families do not mean."""
    norm = hf(24, eps=EPS)
    torch.nn.init.normal_(norm.weight)
    x, dy = draw(6, 24, seed=0).requires_grad_(), draw(6, 24, seed=1)
    y = norm(x)
    dx, dw = torch.autograd.grad(y, [x, norm.weight], dy)
    x, w = x.detach(), norm.weight.detach()
    torch.testing.assert_close(rms_norm(x, w, EPS, offset), y)
    weight_grad = torch.zeros(24)
    torch.testing.assert_close(rms_norm_backward(dy, x, w, EPS, offset, weight_grad=weight_grad), dx)
    torch.testing.assert_close(weight_grad, dw)


def test_one_rounding_at_the_end() -> None:
    """Catches intermediate results in bf16, and a sum with the residual after rounding."""
    x, w, residual = (draw(*shape, seed=i, dtype=torch.bfloat16) for i, shape in enumerate([(9, 40), (40,), (9, 40)]))
    exact = formula(x.double(), w.double(), 1.0, residual.double())
    got = rms_norm(x, w, EPS, 1.0, residual=residual)
    assert got.dtype == torch.bfloat16
    assert (got == exact.bfloat16()).float().mean() > 0.99  # fp32 may fall on the other side of a tie


def test_results_may_land_on_what_they_are_made_of() -> None:
    """Catches a reference that reads what it has overwritten, and one that returns a new tensor."""
    x, w, dy, residual = (draw(*shape, seed=i) for i, shape in enumerate([(5, 12), (12,), (5, 12), (5, 12)]))
    expected = rms_norm(x, w, EPS, residual=residual)
    place = residual.clone()
    assert rms_norm(x, w, EPS, residual=place, out=place) is place
    torch.testing.assert_close(place, expected, rtol=0, atol=0)
    expected = rms_norm_backward(dy, x, w, EPS, residual=residual)
    for name in ("residual", "dy", "x"):
        tensors = {"dy": dy.clone(), "x": x.clone(), "residual": residual.clone()}
        got = rms_norm_backward(tensors["dy"], tensors["x"], w, EPS, residual=tensors["residual"], out=tensors[name])
        assert got is tensors[name]
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


SHAPES = [(1, 1), (3, 130), (7, 64), (5, 1000)]


@pytest.mark.parametrize(("T", "D"), SHAPES)
@pytest.mark.parametrize("with_residual", [False, True])
def test_forward_kernel(T: int, D: int, with_residual: bool) -> None:
    """Catches a mean over the padded width, a wrong mask or row stride."""
    x, w, residual = strided(draw(T, D, seed=0)), draw(D, seed=1), draw(T, D, seed=2) if with_residual else None
    out = torch.full((T, D + 5), float("nan"))
    rms_norm_triton(x, w, EPS, 1.0, residual, out[:, :D])
    torch.testing.assert_close(out[:, :D], rms_norm_reference(x, w, EPS, 1.0, residual))
    assert out[:, D:].isnan().all()


@pytest.mark.parametrize(("T", "D"), SHAPES)
@pytest.mark.parametrize("place", [None, "dy", "residual"])
@pytest.mark.parametrize("with_weight_grad", [False, True])
def test_backward_kernel(
    T: int, D: int, place: str | None, with_weight_grad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches rows that a program skips or counts twice, partial sums of padding, a result that disturbs its inputs."""
    monkeypatch.setattr(module, "_BACKWARD_PROGRAMS", 3)
    x, w, dy, residual = (
        strided(draw(T, D, seed=0)),
        draw(D, seed=1),
        strided(draw(T, D, seed=2), 4),
        draw(T, D, seed=3),
    )
    skip = residual if place == "residual" else None
    dx, dw = rms_norm_backward_reference(dy, x, w, EPS, 1.0, skip)
    weight_grad = torch.ones(D) if with_weight_grad else None
    buffer = torch.full((T, D + 5), float("nan"))
    out = {None: buffer[:, :D], "dy": dy, "residual": residual}[place]
    beside = torch.full((T, D + 5), float("nan"))
    normed = None if place == "dy" else beside[:, :D]
    rms_norm_backward_triton(dy, x, w, EPS, 1.0, skip, weight_grad, normed, out)
    torch.testing.assert_close(out, dx, rtol=1e-5, atol=1e-5)
    if weight_grad is not None:
        torch.testing.assert_close(weight_grad, 1 + dw, rtol=1e-5, atol=1e-5)
    if normed is not None:
        torch.testing.assert_close(normed, rms_norm_reference(x, w, EPS, 1.0), rtol=1e-5, atol=1e-5)
    assert buffer[:, D:].isnan().all()
    assert beside[:, D:].isnan().all()


def test_no_tokens() -> None:
    """Catches a launch over an empty grid."""
    x, w, weight_grad = torch.empty(0, 8), torch.ones(8), torch.ones(8)
    rms_norm_triton(x, w, EPS, 0.0, None, torch.empty(0, 8))
    rms_norm_backward_triton(x, x, w, EPS, 0.0, None, weight_grad, None, torch.empty(0, 8))
    assert rms_norm(x, w, EPS).shape == (0, 8)
    assert rms_norm_backward(x, x, w, EPS, weight_grad=weight_grad).shape == (0, 8)
    assert (weight_grad == 1).all()
