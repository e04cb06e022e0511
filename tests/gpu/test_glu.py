"""Gated activations on a GPU: no further from fp64 than plain torch in the same dtype; strided, in place, repeated."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

from whet.kernels.glu import ACTIVATIONS, glu, glu_backward

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DTYPES = [torch.bfloat16, torch.float32]
TORCH: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu_tanh": lambda z: functional.gelu(z, approximate="tanh"),
    "gelu": functional.gelu,
}
SHAPES = [(1, 7), (37, 130), (65, 2100), (512, 14336)]


def normal(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


def poisoned(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """A view of `columns` in a buffer of 64 more, all NaN."""
    return torch.full((rows, columns + 64), float("nan"), dtype=dtype, device="cuda")[:, :columns]


def strided(x: torch.Tensor) -> torch.Tensor:
    return poisoned(*x.shape, x.dtype).copy_(x)  # type: ignore[call-arg]


def error(x: torch.Tensor, exact: torch.Tensor) -> float:
    return ((x.double().cpu() - exact).norm() / exact.norm()).item()


def plain(gate_up: torch.Tensor, dact: torch.Tensor, activation: str) -> tuple[torch.Tensor, torch.Tensor]:
    """act and the gradient of gate_up by autograd, in whatever dtype the inputs have."""
    gate_up = gate_up.detach().requires_grad_()
    gate, up = gate_up.chunk(2, dim=-1)
    act = TORCH[activation](gate) * up
    return act.detach(), torch.autograd.grad(act, gate_up, dact)[0]


def untouched(view: torch.Tensor) -> bool:
    buffer = view._base
    assert buffer is not None
    return bool(buffer[:, view.shape[1] :].isnan().all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("tokens", "width"), SHAPES)
def test_error_is_no_larger_than_torchs(tokens: int, width: int, activation: str, dtype: torch.dtype) -> None:
    """Catches arithmetic in bf16, a wrong fast path of exp or erf, a wrong mask, stride or offset."""
    gate_up, dact = normal(tokens, 2 * width, dtype=dtype), normal(tokens, width, dtype=dtype)
    exact_act, exact_grad = plain(gate_up.double(), dact.double(), activation)
    torch_act, torch_grad = plain(gate_up.cuda(), dact.cuda(), activation)
    out, act, grad = (poisoned(tokens, n, dtype) for n in (width, width, 2 * width))
    assert glu(strided(gate_up), activation, out) is out
    assert glu_backward(strided(dact), strided(gate_up), activation, act=act, out=grad) is grad
    floor = 2**-21 if dtype == torch.float32 else 0.0  # two fast approximations against torch's slow ones
    assert error(out, exact_act) <= error(torch_act, exact_act) * 1.05 + floor
    assert error(grad, exact_grad) <= error(torch_grad, exact_grad) * 1.05 + floor
    assert torch.equal(act, out)  # what backward recomputes is what forward had
    assert all(untouched(x) for x in (out, act, grad))
    assert torch.equal(glu(gate_up.cuda(), activation), out)
    assert torch.equal(glu_backward(dact.cuda(), gate_up.cuda(), activation), grad)


@pytest.mark.parametrize("store_act", [True, False])
def test_backward_in_place_at_8b_shapes(store_act: bool) -> None:
    """Catches a row offset that overflows, and lanes that write what others have yet to read."""
    tokens, width, dtype = 4096, 14336, torch.bfloat16
    gate_up, dact = normal(tokens, 2 * width, dtype=dtype).cuda(), normal(tokens, width, dtype=dtype).cuda()
    expected = glu_backward(dact, gate_up, "silu")
    act = poisoned(tokens, width, dtype) if store_act else None
    buffer = strided(gate_up)
    assert glu_backward(dact, buffer, "silu", act=act, out=buffer) is buffer
    assert torch.equal(buffer, expected)
    assert untouched(buffer)
    assert act is None or (torch.equal(act, glu(gate_up, "silu")) and untouched(act))
