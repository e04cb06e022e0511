"""What cuBLASLt is asked for, without a GPU: a column-major multiplication of the memory that a call describes.

The products themselves are tested in tests/gpu/test_cublaslt.py.
"""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from whet.kernels import cublaslt
from whet.kernels.cublaslt import Call, Matrix, arrange, available, product, tune
from whet.kernels.fp8 import E4M3, quantize_rows

BF16 = torch.bfloat16


def integers(*shape: int, seed: int) -> Tensor:
    """Small ones: every sum is exact, in any order."""
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).float()


def laid_out(x: Tensor, by_rows: bool, margin: int, offset: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x in a buffer of sevens, `margin` between its rows (or columns); and the whole buffer."""
    rows, columns = x.shape if by_rows else x.T.shape
    buffer = torch.full((offset + rows * (columns + margin),), 7.0).to(dtype)
    view = buffer[offset:].view(rows, columns + margin)[:, :columns]
    view = view if by_rows else view.T
    view.copy_(x)
    return view, buffer


def memory(x: Tensor, m: Matrix) -> Tensor:
    """What cuBLASLt finds at x's address. Raises beyond the end of x's storage."""
    assert x.dtype == m.dtype
    return x.as_strided((m.rows, m.columns), (1, m.lead))


def execute(call: Call) -> None:
    """D = alpha op(A) op(B) + beta C, with scales of op(A)'s rows and op(B)'s columns, as cublasLt.h says."""
    left, right, c, out = call.problem[:4]
    a, b = memory(call.left, left).double(), memory(call.right, right).double()
    y = (a.T if left.transposed else a) @ (b.T if right.transposed else b)
    y *= call.alpha
    if call.left_scale is not None and call.right_scale is not None:
        y *= call.left_scale.reshape(-1, 1).double() * call.right_scale.reshape(1, -1).double()
    if call.problem.beta:
        y += call.problem.beta * memory(call.c, c).double()
    memory(call.out, out).copy_(y)


SIZE = st.integers(1, 9)
MARGIN = st.sampled_from([0, 1, 5])


@settings(max_examples=300, deadline=None)
@given(
    shape=st.tuples(SIZE, SIZE, SIZE),
    by_rows=st.tuples(st.booleans(), st.booleans()),
    margins=st.tuples(MARGIN, MARGIN, MARGIN, MARGIN),
    offsets=st.tuples(MARGIN, MARGIN, MARGIN, MARGIN),
    added=st.sampled_from(["none", "out", "apart"]),
    dtypes=st.sampled_from([(BF16, BF16), (BF16, torch.float32), (torch.float16, torch.float16)]),
    alpha=st.sampled_from([1.0, -0.5]),
)
def test_the_call_means_the_product(
    shape: tuple[int, int, int],
    by_rows: tuple[bool, bool],
    margins: tuple[int, ...],
    offsets: tuple[int, ...],
    added: str,
    dtypes: tuple[torch.dtype, torch.dtype],
    alpha: float,
) -> None:
    """Catches a wrong transposition, leading dimension or order of operands, and a margin that is written to."""
    M, N, K = shape
    exact = integers(M, K, seed=0), integers(K, N, seed=1)
    a, b = (laid_out(exact[i], by_rows[i], margins[i], offsets[i], dtypes[0])[0] for i in (0, 1))
    before = integers(M, N, seed=2)
    out, buffer = laid_out(before, True, margins[2], offsets[2], dtypes[1])
    c = {"none": None, "out": out, "apart": laid_out(before, True, margins[3], offsets[3], dtypes[1])[0]}[added]
    if added == "apart":
        out.fill_(float("nan"))
    call = arrange(a, b, c, out, alpha=alpha)
    execute(call)
    y = (alpha * (exact[0] @ exact[1]) + (0 if c is None else before)).to(dtypes[1])
    assert torch.equal(out, y)
    assert torch.equal(buffer, laid_out(y, True, margins[2], offsets[2], dtypes[1])[1])


@settings(max_examples=100, deadline=None)
@given(
    rows=SIZE,
    blocks=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    margins=st.tuples(*[st.sampled_from([0, 16, 48])] * 4),
    added=st.sampled_from(["none", "out", "apart"]),
)
def test_the_call_of_e4m3_means_the_scaled_product(
    rows: int, blocks: tuple[int, int], margins: tuple[int, ...], added: str
) -> None:
    """Catches scales of the wrong operand, and operands that are not in the layout that FP8 demands."""
    M, N, K = rows, 16 * blocks[0], 16 * blocks[1]
    exact, weight = integers(M, K, seed=0), integers(N, K, seed=1)
    a, w = laid_out(exact, True, margins[0], 0, E4M3)[0], laid_out(weight, True, margins[1], 0, E4M3)[0]
    scale_a, scale_b = 2 ** integers(M, 1, seed=2), 2 ** integers(N, seed=3)
    before = integers(M, N, seed=4)
    out, c = laid_out(before, True, margins[2], 0, BF16)[0], laid_out(before, True, margins[3], 16, BF16)[0]
    given_c = {"none": None, "out": out, "apart": c}[added]
    call = arrange(a, w.T, given_c, out, scale_a, scale_b)
    assert (call.problem.left.transposed, call.problem.right.transposed) == (True, False)
    execute(call)
    y = (exact * scale_a).double() @ (weight * scale_b[:, None]).double().T + (0 if given_c is None else before)
    assert torch.equal(out, y.to(BF16))


@pytest.mark.parametrize(("start", "alignment"), [(0, 64), (1, 2), (2, 4), (8, 16), (24, 16), (48, 32)])
def test_alignment_is_that_of_the_first_value(start: int, alignment: int) -> None:
    """Catches an algorithm that is chosen for an alignment the tensor lacks."""
    buffer = torch.zeros(4096, dtype=BF16)
    base = -(buffer.data_ptr() // 2) % 128 + 32  # 64 bytes behind a multiple of 256
    found = cublaslt.matrix(buffer[base + start :][:64].view(8, 8), "a").alignment
    assert found == (buffer[base + start :].data_ptr() & -buffer[base + start :].data_ptr()) == alignment


def test_alignment_ends_at_256() -> None:
    """Catches a plan for each of many alignments that make no difference."""
    buffer = torch.zeros(4096, dtype=BF16)
    base = -(buffer.data_ptr() // 2) % 1024
    assert cublaslt.matrix(buffer[base : base + 64].view(8, 8), "a").alignment == 256


def test_forms_that_differ_only_by_address_share_a_plan() -> None:
    """Catches a heuristic that runs again for each layer's weights."""
    x, w, y = torch.zeros(3, 512, dtype=BF16), torch.zeros(16, 512, dtype=BF16), torch.zeros(3, 16, dtype=BF16)
    one, other = (arrange(x[:, s : s + 128], w.T[s : s + 128], None, y) for s in (0, 256))
    assert one.problem == other.problem
    assert hash(one.problem) == hash(other.problem)


# ------------------------------------------------------------------ what is refused


def bf16(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=BF16)


def e4m3(*shape: int) -> Tensor:
    return torch.zeros(shape).to(E4M3)


ONES = torch.ones(64)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "inner": ({"a": bf16(3, 4), "b": bf16(5, 6), "out": bf16(3, 6)}, "MxK, KxN"),
    "out": ({"a": bf16(3, 4), "b": bf16(4, 6), "out": bf16(6, 3)}, r"\(6, 3\)"),
    "c": ({"a": bf16(3, 4), "b": bf16(4, 6), "out": bf16(3, 6), "c": bf16(1, 6)}, r"c are .*\(1, 6\)"),
    "vector": ({"a": bf16(4), "b": bf16(4, 6), "out": bf16(6)}, "MxK"),
    "operands": ({"a": bf16(3, 4), "b": bf16(4, 6).half(), "out": bf16(3, 6)}, "float16"),
    "wide": ({"a": bf16(3, 4).float(), "b": bf16(4, 6).float(), "out": bf16(3, 6).float()}, "float32 x"),
    "narrow": ({"a": bf16(3, 4), "b": bf16(4, 6), "out": bf16(3, 6).half()}, "into torch.float16"),
    "c dtype": ({"a": bf16(3, 4), "b": bf16(4, 6), "out": bf16(3, 6), "c": bf16(3, 6).float()}, "c is torch.float32"),
    "device": ({"a": bf16(3, 4), "b": bf16(4, 6).to("meta"), "out": bf16(3, 6)}, "b on meta"),
    "gaps": ({"a": bf16(3, 8)[:, ::2], "b": bf16(4, 6), "out": bf16(3, 6)}, "a is 3x4 with strides"),
    "repeated": ({"a": bf16(1, 4).expand(3, 4), "b": bf16(4, 6), "out": bf16(3, 6)}, "a is 3x4"),
    "repeated column": ({"a": bf16(3, 1).expand(3, 4), "b": bf16(4, 6), "out": bf16(3, 6)}, r"strides \(1, 0\)"),
    "out by columns": ({"a": bf16(3, 4), "b": bf16(4, 6), "out": bf16(6, 3).T}, "out has strides"),
    "c by columns": ({"a": bf16(3, 4), "b": bf16(4, 6), "out": bf16(3, 6), "c": bf16(6, 3).T}, "c has strides"),
    "scales": ({"a": bf16(3, 4), "b": bf16(4, 6), "out": bf16(3, 6), "scale_a": ONES[:3]}, "scales are for"),
}
E4M3_REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "b by rows": ({"b": e4m3(32, 48)}, "K adjacent"),
    "a by columns": ({"a": e4m3(32, 3).T}, "K adjacent"),
    "N": ({"b": e4m3(40, 32).T, "out": bf16(3, 40), "scale_b": ONES[:40]}, "32 and 40"),
    "address": ({"a": e4m3(3, 48)[:, 8:40]}, "a begins at a multiple of 8 bytes"),
    "stride": ({"a": e4m3(3, 40)[:, :32]}, "a .*40 bytes apart"),
    "out's stride": ({"out": bf16(3, 52)[:, :48]}, "out .*104 bytes apart"),
    "dtype": ({"out": bf16(3, 48).double()}, "into torch.float64"),
    "scale's device": ({"scale_a": ONES[:3].to("meta")}, "scale_a on meta"),
    "no scale": ({"scale_b": None}, "scale_b is missing"),
    "scale's dtype": ({"scale_a": ONES[:3].double()}, "scale_a is torch.float64"),
    "scale's size": ({"scale_a": ONES[:1]}, "3 adjacent fp32"),
    "scale's stride": ({"scale_b": torch.ones(96)[::2]}, "48 adjacent fp32"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    """Catches a call that would read or write beyond a tensor, or take its bits for another type."""
    arguments, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        arrange(**({"c": None} | arguments))


@pytest.mark.parametrize("name", E4M3_REFUSED)
def test_what_is_refused_of_e4m3(name: str) -> None:
    """Catches a refusal of cuBLASLt that names neither the operand nor the demand."""
    arguments, message = E4M3_REFUSED[name]
    right = {"a": e4m3(3, 32), "b": e4m3(48, 32).T, "c": None, "out": bf16(3, 48)}
    right |= {"scale_a": ONES[:3], "scale_b": ONES[:48]}
    arrange(**right)
    with pytest.raises(ValueError, match=message):
        arrange(**(right | arguments))


def test_c_at_the_place_of_out_must_be_out() -> None:
    """Catches rows of c that the product overwrites before it reads them."""
    buffer = bf16(64)
    out, c = buffer[:32].view(4, 8)[:, :6], buffer[:24].view(4, 6)
    with pytest.raises(ValueError, match="they must be one"):
        arrange(bf16(4, 5), bf16(5, 6), c, out)


# ------------------------------------------------------------------ elsewhere


def test_no_gpu() -> None:
    device = torch.device("cpu")
    assert not any(available(device, dtype) for dtype in (BF16, E4M3, torch.float32))
    assert tune(bf16(4, 4), bf16(4, 4), out=bf16(4, 4)) == ()


def test_the_structure_of_a_choice() -> None:
    """Catches a field of cublasLtMatmulHeuristicResult_t that is missing: 64 + 8 + 4 + 4 + 16 bytes."""
    assert ctypes.sizeof(cublaslt._Choice) == 96
    assert cublaslt._Choice.state.offset == 72


@pytest.mark.parametrize("added", ["none", "out", "apart"])
@pytest.mark.parametrize(
    ("dtype", "out_dtype"),
    [(BF16, BF16), (BF16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_torch_multiplies_elsewhere(dtype: torch.dtype, out_dtype: torch.dtype, added: str) -> None:
    a, b, before = integers(5, 8, seed=0), integers(8, 6, seed=1), integers(5, 6, seed=2)
    buffer = torch.full((5, 9), 7.0, dtype=out_dtype)
    out = buffer[:, :6]
    out.copy_(before)
    c = {"none": None, "out": out, "apart": before.to(out_dtype)}[added]
    assert product(a.to(dtype), b.to(dtype), c=c, out=out, alpha=0.5) is out
    assert torch.equal(out, (0.5 * (a @ b) + (0 if c is None else before)).to(out_dtype))
    assert (buffer[:, 6:] == 7).all()


@pytest.mark.parametrize("added", ["none", "out", "apart"])
def test_torch_multiplies_e4m3_elsewhere(added: str) -> None:
    """Catches scales of the wrong side, and c that is lost."""
    generator = torch.Generator().manual_seed(0)
    x8, x_scale = quantize_rows(torch.randn(7, 64, generator=generator) * 2 ** integers(7, 1, seed=1))
    w8, w_scale = quantize_rows(torch.randn(32, 64, generator=generator) * 2 ** integers(32, 1, seed=2))
    out, apart = torch.randn(7, 32, generator=generator).to(BF16), torch.randn(7, 32, generator=generator).to(BF16)
    c = {"none": None, "out": out, "apart": apart}[added]
    exact = -2 * (x8.double() * x_scale) @ (w8.double() * w_scale).T
    if c is not None:
        exact += c.double()
    product(x8, w8.T, c=c, out=out, scale_a=x_scale, scale_b=w_scale.reshape(-1), alpha=-2.0)
    torch.testing.assert_close(out.double(), exact, rtol=2**-7, atol=2**-6)


def test_a_wrong_out_is_refused_elsewhere_too() -> None:
    """Catches torch's habit of giving `out` another shape, whoever else holds it."""
    out = bf16(6, 3)
    with pytest.raises(ValueError, match="MxK"):
        product(bf16(3, 4), bf16(4, 6), out=out)
    assert out.shape == (6, 3)
