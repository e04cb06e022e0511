"""Gated activations: the references against autograd of torch's own, the Triton kernels (interpreted) against them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

from tests.kernels.interpreter import needs_interpreter
from whet.kernels import glu as module
from whet.kernels.glu import ACTIVATIONS, glu, glu_backward

TORCH = {
    "silu": functional.silu,
    "gelu_tanh": lambda z: functional.gelu(z, approximate="tanh"),
    "gelu": functional.gelu,
}
SHAPES = [(1, 1), (3, 5), (17, 130), (33, 2100)]  # tokens, width: below, across and above a tile


def normal(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def poisoned(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full((rows, columns), float("nan"), dtype=dtype)


def strided(x: torch.Tensor, extra: int = 3) -> torch.Tensor:
    """x as the first columns of a wider buffer whose rest is NaN."""
    buffer = poisoned(x.shape[0], x.shape[1] + extra, x.dtype)
    buffer[:, : x.shape[1]] = x
    return buffer[:, : x.shape[1]]


def test_activation_names_are_covered() -> None:
    """Catches an activation that is added and not tested."""
    assert set(TORCH) == set(ACTIVATIONS)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("scale", [0.01, 2.0, 12.0])
def test_reference_is_autograd_of_torchs_activation(activation: str, scale: float) -> None:
    """Catches a wrong constant, a swapped gate and up, a derivative that is off only near zero or only in a tail."""
    gate_up = normal(7, 22, dtype=torch.float64, scale=scale).requires_grad_()
    dact = normal(7, 11, dtype=torch.float64)
    gate, up = gate_up.chunk(2, dim=-1)
    expected = TORCH[activation](gate) * up
    (expected_grad,) = torch.autograd.grad(expected, gate_up, dact)
    act = poisoned(7, 11, torch.float64)
    grad = glu_backward(dact, gate_up.detach(), activation, act=act)
    for got in (glu(gate_up.detach(), activation), act):
        torch.testing.assert_close(got, expected.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-11, atol=1e-12)


def test_reference_rounds_once() -> None:
    """Catches a bf16 reference that rounds f(gate) before it multiplies by up."""
    gate_up = normal(6, 96, dtype=torch.bfloat16)
    assert torch.equal(glu(gate_up, "silu"), glu(gate_up.double(), "silu").to(torch.bfloat16))


@pytest.mark.parametrize("run", [glu_backward, pytest.param(module.glu_backward_triton, marks=needs_interpreter)])
def test_backward_in_place(run: Callable[..., torch.Tensor]) -> None:
    """Catches a gradient of gate written before up's gradient has read gate."""
    gate_up, dact = normal(9, 260), normal(9, 130)
    expected = module.glu_backward_reference(dact, gate_up, "gelu_tanh")
    buffer = strided(gate_up)
    assert run(dact, buffer, "gelu_tanh", out=buffer) is buffer
    torch.testing.assert_close(buffer, expected, rtol=1e-5, atol=1e-6)


@needs_interpreter
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("tokens", "width"), SHAPES)
def test_kernels_match_reference(activation: str, tokens: int, width: int) -> None:
    """Catches a wrong mask, stride or offset: every input and output is a view whose neighbours are NaN or watched."""
    gate_up, dact = strided(normal(tokens, 2 * width)), strided(normal(tokens, width), 4)
    buffers = [poisoned(tokens, n + 5) for n in (width, width, 2 * width)]
    out, act, grad = (b[:, :-5] for b in buffers)
    assert module.glu_triton(gate_up, activation, out) is out
    assert module.glu_backward_triton(dact, gate_up, activation, act=act, out=grad) is grad
    torch.testing.assert_close(out, module.glu_reference(gate_up, activation), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad, module.glu_backward_reference(dact, gate_up, activation), rtol=1e-5, atol=1e-5)
    assert torch.equal(act, out)
    assert all(b[:, -5:].isnan().all() for b in buffers)
    fresh = module.glu_triton(gate_up, activation)
    assert torch.equal(fresh, out)
    assert torch.equal(module.glu_backward_triton(dact, gate_up, activation), grad)


@needs_interpreter
def test_no_tokens() -> None:
    """Catches a launch over an empty grid."""
    gate_up, dact = normal(0, 64), normal(0, 32)
    assert module.glu_triton(gate_up, "silu").shape == (0, 32)
    assert module.glu_backward_triton(dact, gate_up, "silu").shape == (0, 64)


def test_refuses_what_it_would_misread() -> None:
    """Catches an unknown activation computed as gelu, a transposed input, and shapes that read past a tensor's end."""
    gate_up, dact = normal(2, 8), normal(2, 4)
    with pytest.raises(ValueError, match=r"activation 'relu' is unknown; known are silu, gelu_tanh, gelu"):
        glu(gate_up, "relu")
    with pytest.raises(ValueError, match=r"gate_up is \(2, 7\)"):
        glu(normal(2, 7), "silu")
    with pytest.raises(ValueError, match=r"dact is \(2, 4\) with strides \(1, 2\)"):
        glu_backward(normal(4, 2).t(), gate_up, "silu")
    with pytest.raises(ValueError, match=r"act is \(2, 8\) .* must be \(2, 4\)"):
        glu_backward(dact, gate_up, "silu", act=normal(2, 8))
    with pytest.raises(ValueError, match=r"out is \(2, 8\) .* must be \(2, 4\)"):
        glu(gate_up, "silu", normal(2, 8))
