"""Rope's kernels on a GPU, bf16 and fp32: no further from fp64 than plain torch in that precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from whet.kernels.rope import rope, rope_backward

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

EPS = 1e-6
CASES = [  # T, P, query heads, key/value heads, head width, rotated
    (1, 1, 3, 1, 64, 64),
    (37, 37, 14, 2, 64, 64),
    (129, 43, 4, 1, 64, 16),
    (131, 131, 32, 32, 80, 32),
    (77, 77, 32, 32, 96, 96),
    (77, 77, 24, 8, 96, 72),
    (4096, 2048, 32, 8, 128, 128),
    (101, 101, 4, 1, 256, 256),
    (515, 103, 8, 4, 256, 256),
]
PRECISIONS = [torch.bfloat16, torch.float32]


def draw(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


def plain(qkv: Tensor, cos: Tensor, sin: Tensor, H: int, G: int, weights: list[Tensor | None], offset: float) -> Tensor:
    """As the models of transformers compute it: tables in the model's precision, rounding on the way."""
    T, half = qkv.shape[0], cos.shape[1]
    wide = torch.promote_types(qkv.dtype, torch.float32)
    rows = torch.arange(T, device=cos.device) % cos.shape[0]
    co, si = (torch.cat([t[rows], t[rows]], 1).to(qkv.dtype)[:, None] for t in (cos, sin))
    q, k, v = qkv.view(T, H + 2 * G, -1).split([H, G, G], 1)
    parts = []
    for x, weight in zip((q, k), weights, strict=True):
        if weight is not None:
            rstd = torch.rsqrt(x.to(wide).pow(2).mean(-1, keepdim=True) + EPS)
            x = (x.to(wide) * rstd).to(x.dtype) * (offset + weight)
        turned, rest = x[..., : 2 * half], x[..., 2 * half :]
        swapped = torch.cat([-turned[..., half:], turned[..., :half]], -1)
        parts.append(torch.cat([turned * co + swapped * si, rest], -1))
    return torch.cat([*parts, v], 1).flatten(1)


def error(got: Tensor, exact: Tensor) -> float:
    assert got.isfinite().all()
    return ((got.double().cpu() - exact).norm() / exact.norm()).item()


def check(got: Tensor, expected: Tensor, exact: Tensor, floor: float) -> None:
    """floor is for fp32, where the order of a sum alone decides which of the two is closer."""
    assert error(got, exact) <= max(1.05 * error(expected, exact), floor if got.dtype == torch.float32 else 0.0)


def inputs(shape: tuple[int, ...], norm: bool, dtype: torch.dtype) -> dict[str, Tensor | None]:
    T, P, H, G, d, rot = shape
    angle = torch.arange(P)[:, None] / 10000.0 ** (torch.arange(0, rot, 2)[None] / rot)
    return {
        "qkv": draw(T, (H + 2 * G) * d + 8, seed=0, dtype=dtype)[:, :-8],
        "cos": 1.1 * angle.cos().cuda(),
        "sin": 1.1 * angle.sin().cuda(),
        "q_weight": draw(d, seed=1, dtype=dtype) if norm else None,
        "k_weight": draw(d, seed=2, dtype=dtype) if norm else None,
        "dq": draw(H, T, d, seed=3, dtype=dtype).transpose(0, 1),
        "dk": draw(T, G, d + 8, seed=4, dtype=dtype)[..., :d],
        "dv": draw(T, G + 1, d, seed=5, dtype=dtype)[:, 1:],
    }


@pytest.mark.parametrize("shape", CASES)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_forward_and_backward(shape: tuple[int, ...], norm: bool, dtype: torch.dtype) -> None:
    """Catches rounding between norm and rotation, and what the interpreter can't see: masks, strides, reductions."""
    T, _, H, G, d, _ = shape
    W = (H + 2 * G) * d
    c = inputs(shape, norm, dtype)

    def by_autograd(qkv, cos, sin, q_weight, k_weight, dq, dk, dv) -> list[Tensor]:
        leaves = [t.detach().clone().requires_grad_() for t in (qkv, q_weight, k_weight) if t is not None]
        y = plain(leaves[0], cos, sin, H, G, leaves[1:] or [None, None], 1.0)
        return [y.detach(), *torch.autograd.grad(y, leaves, torch.cat([dq, dk, dv], 1).flatten(1))]

    expected = by_autograd(**c)
    exact = by_autograd(**{name: None if t is None else t.double().cpu() for name, t in c.items()})
    options = {"q_weight": c["q_weight"], "k_weight": c["k_weight"], "eps": EPS, "offset": 1.0}
    out = torch.full((T, W + 64), float("nan"), device="cuda", dtype=dtype)
    check(rope(c["qkv"], c["cos"], c["sin"], H, G, **options, out=out[:, :W]), expected[0], exact[0], 2e-7)
    qkv = c["qkv"].clone()
    check(rope(qkv, c["cos"], c["sin"], H, G, **options, out=qkv), expected[0], exact[0], 2e-7)

    dy = (c["dq"], c["dk"], c["dv"])
    tables = (c["cos"], c["sin"])
    raw = c["qkv"] if norm else None
    check(rope_backward(*dy, *tables, qkv=raw, **options, out=out[:, :W]), expected[1], exact[1], 3e-7)
    assert out[:, W:].isnan().all()
    place = torch.cat(dy, 1).flatten(1)
    views = place.view(T, H + 2 * G, d).split([H, G, G], 1)
    check(rope_backward(*views, *tables, qkv=raw, **options, out=place), expected[1], exact[1], 3e-7)
    if norm:
        runs = [[torch.zeros(d, device="cuda") for _ in range(2)] for _ in range(3)]
        for q_grad, k_grad in runs:
            again = rope_backward(*dy, *tables, qkv=raw, **options, q_weight_grad=q_grad, k_weight_grad=k_grad)
            check(again, expected[1], exact[1], 3e-7)
            assert torch.equal(q_grad, runs[0][0])  # no atomics
            assert torch.equal(k_grad, runs[0][1])
        for got, plainly, exactly in zip(runs[0], expected[2:], exact[2:], strict=True):
            check(got, plainly, exactly, 1e-6)
