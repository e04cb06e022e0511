"""FP8 on a GPU of Hopper or later: kernels are bitwise their references on the CPU; products against fp64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from tests.gpu.test_nf4 import random_weight, to_cpu
from whet.kernels import fp8
from whet.kernels.fp8 import E4M3, dequantize_nf4_fp8, quantize_rows, scaled_mm, weight_scales
from whet.kernels.nf4 import dequantize_nf4, stack

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or not fp8.supported(torch.device("cuda")), reason="needs a GPU that takes E4M3"
    ),
]


def assert_same_bits(a8: Tensor, b8: Tensor) -> None:
    assert a8.dtype == b8.dtype == E4M3
    assert torch.equal(a8.cpu().contiguous().view(torch.uint8), b8.contiguous().view(torch.uint8))


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, device="cuda", generator=generator).to(dtype)


# ------------------------------------------------------------------ kernels


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("rows", "columns"),
    [(1, 16), (5, 100), (333, 896), (4096, 4096), (257, 6144), (513, 14336), (130, 28672), (3, 16384), (3, 16392)],
)
def test_quantization_is_bitwise_the_reference(rows: int, columns: int, dtype: torch.dtype) -> None:
    """Catches rounding other than to nearest even, a scale that is divided approximately, a margin that is read."""
    buffer = torch.full((rows, columns + 64), 1e4, device="cuda", dtype=dtype)
    x = buffer[:, :columns]
    x.copy_(normal(rows, columns) * 10 ** normal(rows, 1, dtype=torch.float32, seed=1).clamp(-2, 2))
    if rows > 2:
        x[1], x[2] = 0, x[2] * 1e-5
    out = torch.empty(rows, columns, device="cuda", dtype=E4M3)
    x8, scale = quantize_rows(x, out)
    assert x8 is out
    expected, expected_scale = fp8.quantize_rows_reference(x.cpu())
    assert torch.equal(scale.cpu(), expected_scale)
    assert_same_bits(x8, expected)


@pytest.mark.parametrize("size", [1e-38, 1e-36, 1e-20, 1e20, 3e38])
def test_quantization_of_any_size(size: float) -> None:
    """Catches numbers below fp32's least normal one that are flushed to zero, and 1 / scale that overflows."""
    x = normal(64, 4096).clamp(-1, 1) * size
    x8, scale = quantize_rows(x)
    expected, expected_scale = fp8.quantize_rows_reference(x.cpu())
    assert torch.equal(scale.cpu(), expected_scale)
    assert_same_bits(x8, expected)


def test_every_rounding() -> None:
    """Catches a tie that does not go to even, and a wrong rounding of E4M3's subnormal numbers. All scales are 1."""
    grid = torch.arange(256, dtype=torch.uint8).view(E4M3).float()
    grid = grid[grid.isfinite()].sort().values
    middles = (grid[1:] + grid[:-1]) / 2
    values = torch.cat([grid, middles, middles.nextafter(torch.tensor(500.0)), middles.nextafter(torch.tensor(-500.0))])
    x = torch.cat([torch.full((len(values), 1), 448.0), values[:, None].expand(-1, 15)], 1).cuda()
    x8, scale = quantize_rows(x)
    assert (scale == 1).all()
    assert_same_bits(x8, fp8.quantize_rows_reference(x.cpu())[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("columns", [4096, 28672])
def test_a_value_that_is_none_stays_none(value: float, columns: int) -> None:
    """Catches a divergence that saturation would hide."""
    x = normal(2, columns)
    x[0, columns - 3] = value
    x8, scale = quantize_rows(x)
    product = x8.float() * scale
    assert product[0, columns - 3].isnan()
    assert product[1].isfinite().all()


SHAPES = [(1, 64), (16, 64), (130, 192), (80, 320), (1024, 4096), (4096, 14336), (14336, 4096), (40, 48), (7, 33)]


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_weights_are_bitwise_the_reference(rows: int, columns: int, double: bool) -> None:
    """Catches a wrong tile, mask or scale, a fused multiply-add, and scales found otherwise on a GPU."""
    weight = random_weight(rows, columns, double, "cuda")
    scales = weight_scales(weight)
    on_cpu = weight_scales(to_cpu(weight))
    for ours, theirs in zip(scales, on_cpu, strict=True):
        assert torch.equal(ours.cpu(), theirs)
    for transposed in (False, True):
        expected = fp8.dequantize_nf4_fp8_reference(to_cpu(weight), *on_cpu, transposed=transposed)
        assert_same_bits(dequantize_nf4_fp8(weight, *scales, transposed=transposed), expected)
        shape = expected.shape
        buffer = torch.full((shape[0] + 1, shape[1] + 64), 3.0, device="cuda").to(E4M3)
        out = buffer[:-1, :-64]
        assert dequantize_nf4_fp8(weight, *scales, transposed=transposed, out=out) is out
        assert_same_bits(out, expected)
        assert (buffer[-1].float() == 3).all()
        assert (buffer[:, -64:].float() == 3).all()


@pytest.mark.parametrize("size", [1e-36, 1e-30, 1e-20, 1e20, 3e38])
def test_weights_of_any_size_are_bitwise_the_reference(size: float) -> None:
    """Catches a reciprocal of the scale that is right for scales of common sizes alone."""
    weight = random_weight(192, 320, False, "cuda")
    weight = dataclasses.replace(weight, absmax=weight.absmax * size)
    on_cpu = weight_scales(to_cpu(weight))
    scales = tuple(s.cuda() for s in on_cpu)
    for transposed in (False, True):
        expected = fp8.dequantize_nf4_fp8_reference(to_cpu(weight), *on_cpu, transposed=transposed)
        assert (expected.float() != 0).any()
        assert_same_bits(dequantize_nf4_fp8(weight, *scales, transposed=transposed), expected)


def test_a_stack_is_bitwise_the_reference() -> None:
    """Catches a part read with another's absmax2 or offset."""
    parts = [random_weight(rows, 4096, True, "cuda") for rows in (4096, 1024, 1024)]
    packed, absmax = torch.cat([w.packed for w in parts]), torch.cat([w.absmax for w in parts])
    pieces = zip(
        parts,
        packed.split([w.packed.numel() for w in parts]),
        absmax.split([w.absmax.numel() for w in parts]),
        strict=True,
    )
    weight = stack(
        [
            dataclasses.replace(w, packed=p, absmax=a, offset=w.offset + i, absmax2=w.absmax2 * (i + 1))
            for i, (w, p, a) in enumerate(pieces)
        ]
    )
    assert weight is not None
    scales = weight_scales(weight)
    for transposed in (False, True):
        on_cpu = tuple(s.cpu() for s in scales)
        expected = fp8.dequantize_nf4_fp8_reference(to_cpu(weight), *on_cpu, transposed=transposed)
        assert_same_bits(dequantize_nf4_fp8(weight, *scales, transposed=transposed), expected)


def test_one_launch_and_no_wait() -> None:
    """Catches a helper kernel or copy beside the one launch, and a wait for the device."""
    weight, x = random_weight(4096, 4096, True, "cuda"), normal(512, 4096)
    scales = weight_scales(weight)
    x8, x_scale = quantize_rows(x)
    w8, y = dequantize_nf4_fp8(weight, *scales, transposed=False), x.new_empty(512, 4096)

    def ours() -> None:
        quantize_rows(x, x8)
        dequantize_nf4_fp8(weight, *scales, transposed=False, out=w8)
        dequantize_nf4_fp8(weight, *scales, transposed=True, out=w8)

    ours()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours()
        scaled_mm(x8, x_scale, w8, scales[1], out=y)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        ours()
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) == 3, kernels


# ------------------------------------------------------------------ products


def relative(y: Tensor, exact: Tensor) -> float:
    return ((y.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("tokens", "rows", "columns"),
    [(1, 4096, 4096), (200, 6144, 4096), (4096, 4096, 4096), (2048, 4096, 14336), (2048, 28672, 4096), (77, 48, 192)],
)
def test_products_against_fp64(tokens: int, rows: int, columns: int, transposed: bool) -> None:
    """Catches scales of the wrong side, and sums on tensor cores that lose more than the rounding does (3.7%)."""
    weight = random_weight(rows, columns, True, "cuda")
    scales = weight_scales(weight)
    w = dequantize_nf4(weight, dtype=torch.float32).double()
    w = w.T if transposed else w
    x = normal(tokens, w.shape[1])
    x8, x_scale = quantize_rows(x)
    w8 = dequantize_nf4_fp8(weight, *scales, transposed=transposed)
    y = scaled_mm(x8, x_scale, w8, scales[transposed])
    rounded = (x8.double() * x_scale) @ (w8.double() * scales[transposed][:, None]).T
    exact = x.double() @ w.T
    assert y.dtype == torch.bfloat16
    assert relative(y, rounded) < 0.02
    assert relative(y, exact) < 1.15 * relative(rounded, exact)
    assert relative(rounded, exact) < 0.05
    buffer = torch.full((tokens, w.shape[0] + 64), 7.0, device="cuda", dtype=torch.bfloat16)
    scaled_mm(x8, x_scale, w8, scales[transposed], out=buffer[:, :-64])
    assert torch.equal(buffer[:, :-64], y)
    assert (buffer[:, -64:] == 7).all()


def test_sums_of_one_sign() -> None:
    """Where all products are positive, what tensor cores cut off adds up: 21% on an H100.

    Catches sums that lose more. Held to, as nobody should rely on them for such data unawares.
    """
    x8, x_scale = quantize_rows(normal(256, 14336).abs())
    w8, w_scale = quantize_rows(normal(512, 14336, seed=1).abs())
    exact = (x8.double() * x_scale) @ (w8.double() * w_scale).T
    fast = scaled_mm(x8, x_scale, w8, w_scale.reshape(-1))
    assert relative(fast, exact) < 0.25
    assert fast.double().sum() < exact.sum()


def test_sums_of_both_signs_lose_less_than_rounding_the_operands() -> None:
    """Catches sums on tensor cores so short that training would notice: 13 bits make 1.01 here, 12 bits 1.03."""
    x, w = normal(256, 14336), normal(512, 14336, seed=1)
    x8, x_scale = quantize_rows(x)
    w8, w_scale = quantize_rows(w)
    exact = x.double() @ w.double().T
    rounded = (x8.double() * x_scale) @ (w8.double() * w_scale).T
    y = scaled_mm(x8, x_scale, w8, w_scale.reshape(-1))
    assert relative(y, exact) < 1.05 * relative(rounded, exact)


def test_a_tile_of_tokens() -> None:
    """Catches a product that needs its operands to begin a storage."""
    x8, x_scale = quantize_rows(normal(512, 4096))
    w8, w_scale = quantize_rows(normal(1024, 4096, seed=1))
    whole = scaled_mm(x8, x_scale, w8, w_scale.reshape(-1))
    part = scaled_mm(x8[256:], x_scale[256:], w8, w_scale.reshape(-1))
    assert relative(part, whole[256:].double()) < 2**-8


def test_no_tokens() -> None:
    x8, x_scale = quantize_rows(normal(0, 64))
    w8, w_scale = quantize_rows(normal(32, 64))
    assert scaled_mm(x8, x_scale, w8, w_scale.reshape(-1)).shape == (0, 32)
