"""Rotary embedding of fused q/k/v: the references against fp64 autograd and transformers, the kernels against them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

from whet.kernels import rope as module
from whet.kernels.rope import (
    rope,
    rope_backward,
    rope_backward_reference,
    rope_backward_triton,
    rope_reference,
    rope_triton,
)

EPS = 1e-3  # large enough that one added at the wrong place shows
WIDE = torch.float64


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=WIDE).to(dtype)


def case(T: int, P: int, H: int, G: int, d: int, rot: int, norm: bool, dtype: torch.dtype = torch.float32) -> dict:
    """Tables of random numbers: their squares sum to no constant, so that an inverse is not a transpose."""
    return {
        "qkv": draw(T, (H + 2 * G) * d, seed=0, dtype=dtype),
        "cos": draw(P, rot // 2, seed=1, dtype=dtype),
        "sin": draw(P, rot // 2, seed=2, dtype=dtype),
        "q_weight": draw(d, seed=3, dtype=dtype) if norm else None,
        "k_weight": draw(d, seed=4, dtype=dtype) if norm else None,
        "dq": draw(H, T, d, seed=5, dtype=dtype).transpose(0, 1),  # as attention kernels leave it
        "dk": draw(T, G, d + 3, seed=6, dtype=dtype)[..., :d],
        "dv": draw(G, T, d, seed=7, dtype=dtype).transpose(0, 1),
    }


def formula(
    qkv: Tensor, cos: Tensor, sin: Tensor, H: int, G: int, weights: list[Tensor | None], offset: float
) -> Tensor:
    """Rotation as a complex product, head by head."""
    T, d, half = qkv.shape[0], qkv.shape[1] // (H + 2 * G), cos.shape[1]
    turn = torch.complex(cos, sin)[[t % cos.shape[0] for t in range(T)]]
    heads = []
    for i, head in enumerate(qkv.split(d, 1)):
        if i >= H + G:
            heads.append(head)
            continue
        weight = weights[i >= H]
        if weight is not None:
            head = head / (head.pow(2).mean(1, keepdim=True) + EPS).sqrt() * (offset + weight)
        turned = torch.complex(head[:, :half], head[:, half : 2 * half]) * turn
        heads += [turned.real, turned.imag, head[:, 2 * half :]]
    return torch.cat(heads, 1)


@pytest.mark.parametrize(("d", "rot"), [(8, 8), (10, 4)])
@pytest.mark.parametrize("norm", [False, True])
def test_forward_and_backward_are_those_of_autograd(d: int, rot: int, norm: bool) -> None:
    """Catches a rotation the wrong way round, a norm after it, an inverse for the transpose, lost gradients."""
    H, G, offset = 4, 2, 1.0
    c = case(7, 3, H, G, d, rot, norm, WIDE)
    weights = [c["q_weight"], c["k_weight"]]
    leaves = [c["qkv"].clone().requires_grad_(), *(w.clone().requires_grad_() for w in weights if norm)]
    y = formula(leaves[0], c["cos"], c["sin"], H, G, leaves[1:] if norm else weights, offset)
    dy = torch.cat([c["dq"], c["dk"], c["dv"]], 1).flatten(1)
    d_qkv, *d_weights = torch.autograd.grad(y, leaves, dy)
    options = {"q_weight": weights[0], "k_weight": weights[1], "eps": EPS, "offset": offset}
    torch.testing.assert_close(rope(c["qkv"], c["cos"], c["sin"], H, G, **options), y)

    grads = [torch.ones(d), torch.ones(d)] if norm else [None, None]
    got = rope_backward(
        c["dq"], c["dk"], c["dv"], c["cos"], c["sin"],
        qkv=c["qkv"] if norm else None, **options, q_weight_grad=grads[0], k_weight_grad=grads[1],
    )  # fmt: skip
    torch.testing.assert_close(got, d_qkv)
    for grad, expected in zip(grads, d_weights, strict=norm):
        torch.testing.assert_close(grad, 1 + expected.float())


@pytest.mark.parametrize(("hf", "offset"), [(None, 0.0), (LlamaRMSNorm, 0.0), (Gemma3RMSNorm, 1.0)])
def test_it_is_what_transformers_does(hf: type | None, offset: float) -> None:
    """Catches interleaved pairs instead of halves, a negative angle, q and k weights exchanged."""
    T, H, G, d = 9, 4, 2, 16
    config = LlamaConfig(hidden_size=H * d, num_attention_heads=H, num_key_value_heads=G, head_dim=d)
    qkv = draw(T, (H + 2 * G) * d, seed=0).requires_grad_()
    cos, sin = LlamaRotaryEmbedding(config)(qkv, torch.arange(T)[None])
    q, k, v = qkv.view(1, T, -1, d).split([H, G, G], 2)
    norms = [hf(d, eps=EPS) for _ in range(2)] if hf else []
    for norm in norms:
        torch.nn.init.normal_(norm.weight)
    if norms:
        q, k = norms[0](q), norms[1](k)
    q, k = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    y = torch.cat([q.transpose(1, 2), k.transpose(1, 2), v], 2)[0].flatten(1)
    dy = draw(*y.shape, seed=1)
    d_qkv, *d_weights = torch.autograd.grad(y, [qkv, *(norm.weight for norm in norms)], dy)

    cos, sin = cos[0, :, : d // 2], sin[0, :, : d // 2]
    weights = [norm.weight.detach() for norm in norms] or [None, None]
    options = {"q_weight": weights[0], "k_weight": weights[1], "eps": EPS, "offset": offset}
    torch.testing.assert_close(rope(qkv.detach(), cos, sin, H, G, **options), y)
    grads = [torch.zeros(d) for _ in norms] or [None, None]
    dq, dk, dv = dy.view(T, -1, d).split([H, G, G], 1)
    got = rope_backward(
        dq, dk, dv, cos, sin, qkv=qkv.detach(), **options, q_weight_grad=grads[0], k_weight_grad=grads[1]
    )
    torch.testing.assert_close(got, d_qkv)
    for grad, expected in zip(grads, d_weights, strict=bool(norms)):
        torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("norm", [False, True])
def test_results_may_land_on_what_they_are_made_of(norm: bool) -> None:
    """Catches a reference that reads what it has overwritten, and one that returns a new tensor."""
    T, H, G, d = 5, 4, 2, 8
    c = case(T, T, H, G, d, d, norm)
    options = {"q_weight": c["q_weight"], "k_weight": c["k_weight"], "eps": EPS}
    expected = rope(c["qkv"], c["cos"], c["sin"], H, G, **options)
    place = c["qkv"].clone()
    assert rope(place, c["cos"], c["sin"], H, G, **options, out=place) is place
    torch.testing.assert_close(place, expected, rtol=0, atol=0)
    expected = rope_backward(c["dq"], c["dk"], c["dv"], c["cos"], c["sin"], qkv=c["qkv"], **options)
    place = torch.cat([c["dq"], c["dk"], c["dv"]], 1).flatten(1)
    views = place.view(T, H + 2 * G, d).split([H, G, G], 1)
    assert rope_backward(*views, c["cos"], c["sin"], qkv=c["qkv"], **options, out=place) is place
    torch.testing.assert_close(place, expected, rtol=0, atol=0)


CASES = [  # T, P, H, G, d, rot
    (3, 3, 5, 2, 64, 64),
    (5, 5, 3, 3, 80, 32),
    (7, 3, 4, 1, 96, 72),
    (3, 1, 18, 2, 128, 128),
    (2, 2, 9, 10, 256, 256),
    (1, 1, 1, 1, 6, 2),
]


@pytest.mark.parametrize("shape", CASES)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
def test_forward_kernel(shape: tuple[int, ...], norm: bool, in_place: bool) -> None:
    """Catches a mean over padded columns, heads beyond a block, a wrong row of the tables, a lost v."""
    T, _, H, G, d, _ = shape
    c = case(*shape, norm)
    W = (H + 2 * G) * d
    arguments = (c["cos"], c["sin"], H, G, c["q_weight"], c["k_weight"], EPS, 1.0)
    qkv = torch.full((T, W + 5), float("nan"))
    qkv[:, :W] = c["qkv"]
    out = qkv if in_place else torch.full((T, W + 3), float("nan"))
    rope_triton(qkv[:, :W], *arguments, out[:, :W])
    torch.testing.assert_close(out[:, :W], rope_reference(c["qkv"], *arguments), rtol=1e-5, atol=1e-5)
    assert out[:, W:].isnan().all()
    if not in_place:
        assert (qkv[:, :W] == c["qkv"]).all()


@pytest.mark.parametrize("shape", CASES)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
def test_backward_kernel(shape: tuple[int, ...], norm: bool, in_place: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches strides of one gradient used for another, tokens that a slot skips, partial sums that miss a head."""
    monkeypatch.setattr(module, "_GRADIENT_SLOTS", 2)
    T, _, H, G, d, _ = shape
    c = case(*shape, norm)
    W = (H + 2 * G) * d
    qkv = torch.full((T, W + 2), float("nan"))
    qkv[:, :W] = c["qkv"]
    out = torch.full((T, W + 3), float("nan"))
    dy = [c["dq"], c["dk"], c["dv"]]
    arguments = (c["cos"], c["sin"], qkv[:, :W] if norm else None, c["q_weight"], c["k_weight"], EPS, 1.0)
    expected_grads, grads = ([torch.ones(d), torch.ones(d)] if norm else [None, None] for _ in range(2))
    expected = rope_backward_reference(*dy, *arguments, *expected_grads)
    if in_place:
        out[:, :W] = torch.cat(dy, 1).flatten(1)
        dy = list(out[:, :W].view(T, H + 2 * G, d).split([H, G, G], 1))
    rope_backward_triton(*dy, *arguments, *grads, out[:, :W])
    torch.testing.assert_close(out[:, :W], expected, rtol=1e-5, atol=1e-5)
    assert out[:, W:].isnan().all()
    if norm:
        torch.testing.assert_close(grads, expected_grads, rtol=1e-5, atol=1e-4)


def test_gradients_laid_out_like_the_result() -> None:
    """Catches a v taken for the result's own, and not copied, because it has the same strides."""
    T, H, G, d = 3, 2, 1, 16
    c = case(T, T, H, G, d, d, False)
    both = torch.cat([c["dq"], c["dk"], c["dv"]], 1).flatten(1)
    dy = both.view(T, H + 2 * G, d).split([H, G, G], 1)
    out = torch.full_like(both, float("nan"))
    rope_backward_triton(*dy, c["cos"], c["sin"], None, None, None, EPS, 0.0, None, None, out)
    torch.testing.assert_close(out, rope_backward_reference(*dy, c["cos"], c["sin"]))


@pytest.mark.parametrize("only", ["q_weight", "k_weight"])
def test_kernels_with_one_norm(only: str) -> None:
    """Catches a norm of k that follows q's weight, and a gradient's partial sums that never were written."""
    T, H, G, d = 5, 3, 2, 16
    c = case(T, T, H, G, d, d, True)
    weights = {"q_weight": None, "k_weight": None, only: c[only]}
    arguments = (c["cos"], c["sin"], H, G, *weights.values(), EPS, 0.0)
    out = torch.full_like(c["qkv"], float("nan"))
    rope_triton(c["qkv"], *arguments, out)
    torch.testing.assert_close(out, rope_reference(c["qkv"], *arguments))
    arguments = (c["dq"], c["dk"], c["dv"], c["cos"], c["sin"], c["qkv"], *weights.values(), EPS, 0.0)
    grads = {"q_weight": None, "k_weight": None, only: torch.zeros(d)}
    expected = {"q_weight": None, "k_weight": None, only: torch.zeros(d)}
    out.fill_(float("nan"))
    rope_backward_triton(*arguments, *grads.values(), out)
    torch.testing.assert_close(out, rope_backward_reference(*arguments, *expected.values()), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grads[only], expected[only], rtol=1e-5, atol=1e-5)


def test_no_tokens() -> None:
    """Catches a launch over an empty grid."""
    c = case(0, 4, 2, 1, 8, 8, False)
    arguments = (c["cos"], c["sin"])
    rope_triton(c["qkv"], *arguments, 2, 1, None, None, EPS, 0.0, torch.empty(0, 32))
    rope_backward_triton(
        c["dq"], c["dk"], c["dv"], *arguments, None, None, None, EPS, 0.0, None, None, torch.empty(0, 32)
    )
    assert rope(c["qkv"], *arguments, 2, 1).shape == (0, 32)
    assert rope_backward(c["dq"], c["dk"], c["dv"], *arguments).shape == (0, 32)
