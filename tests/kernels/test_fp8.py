"""FP8 products: the references against what they approximate, in fp64; the Triton kernels up to the rounding.

Triton's interpreter rounds to E4M3 wrongly, so the kernels write fp32 here: the values that a GPU would round. That
rounding, and the product on tensor cores, are tested in tests/gpu/test_fp8.py.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor

from tests.kernels.interpreter import needs_interpreter
from whet.kernels import fp8
from whet.kernels.fp8 import E4M3, dequantize_nf4_fp8, quantize_rows, scaled_mm, weight_scales
from whet.kernels.nf4 import NF4Weight, dequantize_nf4_reference, stack

NAN = float("nan")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def nf4(rows: int, columns: int, double: bool = True, seed: int = 0) -> NF4Weight:
    """Rows and columns of very different sizes: none can stand for another."""
    w = normal(rows, columns, seed=seed) * 4 ** normal(rows, 1, seed=seed + 1)
    w *= normal(1, columns, seed=seed + 2).clamp(-2, 2).exp2()
    packed, state = bnb.functional.quantize_4bit(w, quant_type="nf4", compress_statistics=double)
    weight = NF4Weight(packed.reshape(-1), state.absmax, state.code, rows, columns, torch.bfloat16)
    if not double:
        return weight
    return dataclasses.replace(
        weight, code2=state.state2.code, absmax2=state.state2.absmax, offset=state.offset.reshape(())
    )


def assert_rounded(x8: Tensor, scale: Tensor, x: Tensor) -> None:
    """Within half a unit in the last place of x: 2^-4 of it, or of 2^-6, the least normal number."""
    assert x8.dtype == E4M3
    back, exact, scale = x8.double() * scale.double(), x.double(), scale.double()
    least = exact.abs().clamp(min=2**-6 * scale)
    assert ((back - exact).abs() <= least * 2**-4 * (1 + 1e-6)).all()


# ------------------------------------------------------------------ quantize_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns"), [(1, 16), (7, 48), (5, 100), (3, 5000)])
def test_rows_are_rounded_to_nearest(rows: int, columns: int, dtype: torch.dtype) -> None:
    """Catches a scale of another row, truncation, and a row that does not use all of E4M3's range."""
    x = (normal(rows, columns) * 10 ** normal(rows, 1, seed=1)).to(dtype)
    x8, scale = quantize_rows(x)
    assert x8.is_contiguous()
    assert (scale.dtype, tuple(scale.shape)) == (torch.float32, (rows, 1))
    assert torch.equal(scale, x.float().abs().amax(1, keepdim=True) / torch.tensor(448.0))
    assert (x8.float().abs().amax(1) == 448).all()
    assert_rounded(x8, scale, x)


def test_ties_go_to_even() -> None:
    """Catches rounding half up, which shifts every sum of products. The scale is 1: 448 is in the row."""
    x = torch.tensor([[448.0, 17, 19, -17, -19, 2**-10, 3 * 2**-10, 432]])
    x8, scale = quantize_rows(x)
    assert scale.item() == 1
    assert x8.float()[0].tolist() == [448, 16, 20, -16, -20, 0, 2**-8, 448]


@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-30, 1e30, 3e38])
def test_rows_of_any_size(size: float) -> None:
    """Catches 1 / scale that overflows, or a scale that is 0, and one that rows share."""
    x = torch.cat((torch.zeros(1, 64), normal(1, 64).clamp(-1, 1) * size, normal(1, 64, seed=1)))
    x8, scale = quantize_rows(x)
    assert scale.isfinite().all()
    assert (scale > 0).all()
    assert scale[0] == 1
    assert (x8[0].float() == 0).all()
    assert x8.float().isfinite().all()
    least = max(x[1].abs().max().item(), 448 * 2.0**-126)
    assert ((x8.double() * scale.double() - x.double())[1].abs() <= least * 2**-4).all()
    assert_rounded(x8[2:], scale[2:], x[2:])
    assert x8[1].float().abs().max() == 448 or size < 1e-35


def test_no_row_passes_the_largest_value() -> None:
    """Catches a maximum that its scale's rounding lifts over 448: torch before 2.13 makes it NaN past 464."""
    x = torch.rand(20_000, 16, generator=torch.Generator().manual_seed(0)) + 0.5
    assert (quantize_rows(x)[0].float().amax(1) == 448).all()


@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf")])
def test_a_value_that_is_none_stays_none(value: float) -> None:
    """Catches a divergence that saturation would hide."""
    x = normal(2, 32)
    x[0, 3] = value
    x8, scale = quantize_rows(x)
    product = x8.float() * scale
    assert product[0, 3].isnan()
    assert product[1].isfinite().all()


def test_rows_with_a_stride_into_an_output() -> None:
    """Catches a margin behind the row that is read with it: it may hold anything, and would set the scale."""
    buffer = torch.full((5, 80), 1e9)
    buffer[:, :64] = normal(5, 64)
    x, out = buffer[:, :64], torch.empty(5, 64, dtype=E4M3)
    x8, scale = quantize_rows(x, out)
    expected, expected_scale = quantize_rows(x.contiguous())
    assert x8 is out
    assert torch.equal(x8.float(), expected.float())
    assert torch.equal(scale, expected_scale)


def test_no_rows() -> None:
    x8, scale = quantize_rows(torch.empty(0, 32))
    assert (tuple(x8.shape), tuple(scale.shape)) == ((0, 32), (0, 1))


@needs_interpreter
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 48), (5, 1000), (2, 2048)])
@pytest.mark.parametrize("at_once", [16384, 256])
def test_quantization_kernel(rows: int, columns: int, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a maximum of part of a row, a wrong stride or mask; rows longer than what a program holds, too."""
    monkeypatch.setattr(fp8, "IN_REGISTERS", at_once)
    buffer = torch.full((rows + 2, columns + 16), NAN)
    x = buffer[:rows, :columns]
    x.copy_(normal(rows, columns) * 10 ** normal(rows, 1, seed=1))
    if rows > 2:
        x[1], x[2] = 0, x[2] * 1e-38
    out, expected = torch.full((rows + 1, columns), NAN), torch.empty(rows, columns)
    got, scale = fp8.quantize_rows_triton(x, out[:rows])
    _, expected_scale = fp8.quantize_rows_reference(x, expected)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(got.clamp(-448, 448), expected)
    assert out[rows:].isnan().all()


# ------------------------------------------------------------------ weights

# several chunks of rows, and of blocks that cross rows, a single row, an odd number of weights
SHAPES = [(130, 192), (64, 64), (1, 128), (40, 48), (7, 33)]


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("chunk", [1, 4000, 1 << 23])
def test_scales_of_a_weight(rows: int, columns: int, double: bool, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a chunk that is dequantized with another's absmax, is left out, or overwrites the columns' maxima."""
    monkeypatch.setattr(fp8, "CHUNK", chunk)
    weight = nf4(rows, columns, double)
    w = dequantize_nf4_reference(weight, dtype=torch.float32).abs()
    row_scales, column_scales = weight_scales(weight)
    for scales, amax in ((row_scales, w.amax(1)), (column_scales, w.amax(0))):
        assert torch.equal(scales, torch.where(amax > 0, amax / torch.tensor(448.0), 1))


def test_scales_of_zeros() -> None:
    """Catches a division by zero, and the weights of a zero row as NaN."""
    weight = nf4(4, 64, double=False)
    absmax = weight.absmax.clone()
    absmax[1] = 0
    weight = dataclasses.replace(weight, absmax=absmax)
    rows, columns = weight_scales(weight)
    assert rows[1] == 1
    for transposed in (False, True):
        w8 = dequantize_nf4_fp8(weight, rows, columns, transposed=transposed).float()
        assert w8.isfinite().all()
        assert ((w8.T if transposed else w8)[1] == 0).all()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_a_weight_in_e4m3(rows: int, columns: int, double: bool, transposed: bool) -> None:
    """Catches scales of the other side, a transpose that is a reshape, and a range that is not used."""
    weight = nf4(rows, columns, double)
    scales = weight_scales(weight)
    w8 = dequantize_nf4_fp8(weight, *scales, transposed=transposed)
    w = dequantize_nf4_reference(weight, dtype=torch.float32)
    assert w8.is_contiguous()
    assert_rounded(w8, scales[transposed][:, None], w.T if transposed else w)
    amax = w8.float().abs().amax(1)
    assert torch.equal(amax, torch.where((w != 0).any(0 if transposed else 1), 448.0, 0.0))


def test_transposed_is_the_transpose_up_to_its_scales() -> None:
    """Catches a transposed weight that is laid out or rounded otherwise: with all scales alike both are one."""
    weight = nf4(48, 128)
    largest = max(x.max() for x in weight_scales(weight))
    scales = (torch.full((48,), largest), torch.full((128,), largest))
    plain, turned = (dequantize_nf4_fp8(weight, *scales, transposed=t).float() for t in (False, True))
    assert torch.equal(turned, plain.T)


def stacked() -> NF4Weight:
    """Three weights of ever larger values and of other offsets, as one: 3 + 6 + 3 groups of blocks."""
    parts = [nf4(rows, 192, seed=10 * i) for i, rows in enumerate((256, 512, 256))]
    parts = [dataclasses.replace(p, absmax2=p.absmax2 * 3**i, offset=p.offset * 3**i) for i, p in enumerate(parts)]
    packed, absmax = (torch.cat([getattr(p, name) for p in parts]) for name in ("packed", "absmax"))
    sizes = [256 * 192, 512 * 192, 256 * 192]
    pieces = zip(packed.split([n // 2 for n in sizes]), absmax.split([n // 64 for n in sizes]), parts, strict=True)
    together = stack([dataclasses.replace(part, packed=p, absmax=a) for p, a, part in pieces])
    assert together is not None
    assert together.offset is not None
    assert together.offset.numel() == 12
    return together


def test_a_stack() -> None:
    """Catches the first part's offset taken for all parts': in the scales, and in the weights."""
    weight = stacked()
    w = dequantize_nf4_reference(weight, dtype=torch.float32)
    rows, columns = weight_scales(weight)
    assert torch.equal(rows, w.abs().amax(1) / torch.tensor(448.0))
    assert_rounded(dequantize_nf4_fp8(weight, rows, columns, transposed=False), rows[:, None], w)
    assert_rounded(dequantize_nf4_fp8(weight, rows, columns, transposed=True), columns[:, None], w.T)


@pytest.mark.parametrize("transposed", [False, True])
def test_into_a_view(transposed: bool) -> None:
    """Catches a write past the width."""
    weight = nf4(16, 64)
    scales = weight_scales(weight)
    shape = (64, 16) if transposed else (16, 64)
    buffer = torch.zeros(shape[0], shape[1] + 16).to(E4M3)
    out = buffer[:, : shape[1]]
    assert dequantize_nf4_fp8(weight, *scales, transposed=transposed, out=out) is out
    assert torch.equal(out.float(), dequantize_nf4_fp8(weight, *scales, transposed=transposed).float())
    assert (buffer[:, shape[1] :].float() == 0).all()


KERNEL_SHAPES = [(1, 64), (70, 192), (64, 128), (130, 320)]  # within a tile, tiles that stick out on either side


@needs_interpreter
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("which", [*KERNEL_SHAPES, "single", "stack"])
def test_dequantization_kernels(which: tuple[int, int] | str, transposed: bool) -> None:
    """Catches a swapped nibble, a wrong row, block, scale, group or mask, and a fused multiply-add in absmax."""
    weight = stacked() if which == "stack" else nf4(70, 192, double=False) if which == "single" else nf4(*which)
    scales = weight_scales(weight)
    shape = (weight.columns, weight.rows) if transposed else (weight.rows, weight.columns)
    buffer, expected = torch.full((shape[0] + 1, shape[1] + 5), NAN), torch.empty(shape)
    out = buffer[:-1, :-5]
    assert fp8.dequantize_nf4_fp8_triton(weight, *scales, transposed=transposed, out=out) is out
    fp8.dequantize_nf4_fp8_reference(weight, *scales, transposed=transposed, out=expected)
    assert torch.equal(out.clamp(-448, 448), expected)
    assert buffer[-1].isnan().all()
    assert buffer[:, -5:].isnan().all()


# ------------------------------------------------------------------ the product


def operands(tokens: int, rows: int, columns: int) -> tuple[Tensor, Tensor, NF4Weight]:
    weight = nf4(rows, columns)
    return normal(tokens, columns), dequantize_nf4_reference(weight, dtype=torch.float64), weight


@pytest.mark.parametrize("transposed", [False, True])
def test_product_is_near_the_exact_one(transposed: bool) -> None:
    """Catches scales that are left out, or of the other side. Rounding costs 3.7%: 2^-4 / sqrt(12) / ~0.7 twice."""
    x, w, weight = operands(50, 96, 192)
    w = w.T if transposed else w
    x = normal(50, w.shape[1])
    scales = weight_scales(weight)
    w8 = dequantize_nf4_fp8(weight, *scales, transposed=transposed)
    y = scaled_mm(*quantize_rows(x), w8, scales[transposed])
    exact = x.double() @ w.T
    assert y.dtype == torch.bfloat16
    error = (y.double() - exact).norm(dim=0) / exact.norm(dim=0)
    assert error.max() < 0.06
    assert error.mean() < 0.045


def test_product_of_what_it_is_given() -> None:
    """Catches a rounding beside those of the operands. `out` may be a view, and its margin stays."""
    x8, x_scale = quantize_rows(normal(9, 32))
    w8, w_scale = quantize_rows(normal(48, 32, seed=1))
    exact = (x8.double() * x_scale) @ (w8.double() * w_scale).T
    y = scaled_mm(x8, x_scale, w8, w_scale.reshape(-1), out_dtype=torch.float32)
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)
    buffer = torch.full((9, 64), NAN)
    assert scaled_mm(x8, x_scale, w8, w_scale.T, torch.float32, buffer[:, :48]).data_ptr() == buffer.data_ptr()
    assert torch.equal(buffer[:, :48], y)
    assert buffer[:, 48:].isnan().all()


@pytest.mark.parametrize(("rows", "columns"), [(40, 32), (32, 40)])
def test_shapes_that_tensor_cores_cannot_take(rows: int, columns: int) -> None:
    """Catches a model that trains on the CPU and is refused, in words of cuBLAS, on the GPU."""
    x8, w8 = torch.zeros(4, columns).to(E4M3), torch.zeros(rows, columns).to(E4M3)
    with pytest.raises(ValueError, match=f"{rows}x{columns}.*multiples of 16.*16 bits"):
        scaled_mm(x8, torch.ones(4, 1), w8, torch.ones(rows))


def test_outputs_that_do_not_fit() -> None:
    """Catches a write outside of `out`, and values that would be left unrounded."""
    weight = nf4(16, 64)
    scales = weight_scales(weight)
    x8, x_scale = quantize_rows(normal(4, 64))
    w8 = dequantize_nf4_fp8(weight, *scales, transposed=False)
    with pytest.raises(ValueError, match="must be torch"):
        quantize_rows(normal(4, 64), torch.empty(4, 64))
    with pytest.raises(ValueError, match="must be 4x64 and contiguous"):
        quantize_rows(normal(4, 64), torch.empty(4, 80, dtype=E4M3)[:, :64])
    with pytest.raises(ValueError, match="must be torch"):
        dequantize_nf4_fp8(weight, *scales, transposed=False, out=torch.empty(16, 64))
    with pytest.raises(ValueError, match="must be 64x16"):
        dequantize_nf4_fp8(weight, *scales, transposed=True, out=torch.empty(16, 64, dtype=E4M3))
    with pytest.raises(ValueError, match="must be 4x16"):
        scaled_mm(x8, x_scale, w8, scales[0], out=torch.empty(16, 4, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="pass the same"):
        scaled_mm(x8, x_scale, w8, scales[0], out=torch.empty(4, 16))


def test_a_cpu_is_not_supported() -> None:
    """Catches kernels launched where there are none."""
    assert not fp8.supported(torch.device("cpu"))


def test_imports_without_triton() -> None:
    """Catches a kernel file that needs triton to be imported."""
    code = (
        "import sys; sys.modules['triton'] = None; import torch; from whet.kernels import fp8; "
        "fp8.quantize_rows(torch.ones(2, 16)); sys.exit(fp8.HAVE_TRITON)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
