"""FP8 products with a frozen NF4 base: both operands rounded to E4M3 with a scale a row, on Hopper and later.

    x8 = e4m3(x * (1 / s))                  s = max |row of x| / 448             quantize_rows
    w8 = e4m3(code * (absmax * (1 / s)))    s = the same of W's rows or W^T's    weight_scales, dequantize_nf4_fp8
    y  = (x8 w8^T) * s_x * s_w^T                                                 scaled_mm

E4M3 has 4 exponent and 3 mantissa bits: 448 is its largest value, and rounding to nearest even is off by 2^-4 at most.
A row of zeros has scale 1. Scales, and everything before the rounding, are in fp32. W's scales along rows serve x W^T,
those along columns dY W; both are found once, as the base is frozen.
Source: Micikevicius et al. 2022, arXiv:2209.05433.
Shapes: T tokens, N outputs, K inputs; x [T, K], W [N, K], W^T [K, N].
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from whet.kernels._triton import HAVE_TRITON, jit, tl, triton
from whet.kernels.nf4 import (
    BLOCK,
    NF4Weight,
    absmax_reference,
    code_at,
    dequantize_nf4,
    dequantize_nf4_reference,
    kernel_takes,
    shuffles,
)

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
LEAST_SCALE = 2.0**-126  # the least normal number in fp32: 1 / scale stays finite
IN_REGISTERS = 32768  # values of a row that a program holds at a time
BLOCKS = 128  # blocks of 64 weights that a program dequantizes
TILE_N, TILE_WARPS = 64, 1  # rows of W of which a program transposes a block each, and its warps
NEIGHBOURS = 2  # blocks of a row: 64 bytes
CHUNK = 1 << 23  # weights whose scales are found at a time


@functools.cache
def supported(device: torch.device) -> bool:
    """Whether `device` multiplies E4M3 with a scale a row: NVIDIA's Hopper and later. Elsewhere references run."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def _scales(amax: Tensor) -> Tensor:
    """Of rows with these maxima. A tensor divides, as torch would multiply by 1 / 448 on a GPU, a bit apart."""
    scale = (amax / torch.full_like(amax, LARGEST)).clamp(min=LEAST_SCALE)
    return torch.where(amax > 0, scale, 1.0)


def _round(x: Tensor, out: Tensor) -> Tensor:
    """e4m3(x) into `out`; some versions of torch make NaN of what exceeds 448 by a rounding."""
    return out.copy_(x.clamp(-LARGEST, LARGEST))


# ------------------------------------------------------------------ activations and their gradients


def quantize_rows_reference(x_TK: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    x, x8 = x_TK.float(), _rows_output(x_TK, out)
    scale = _scales(x.abs().amax(1, keepdim=True)) if x.shape[1] else x.new_ones(x.shape[0], 1)
    return _round(x * (1 / scale), x8), scale


@jit
def _scale(amax):
    scale = tl.maximum(tl.div_rn(amax, 448.0), 1.1754943508222875e-38)  # LEAST_SCALE
    return tl.where(amax > 0, scale, 1.0)


@jit
def _quantize_rows_kernel(x_ptr, x_stride, out_ptr, scale_ptr, K, BLOCK: tl.constexpr, ONCE: tl.constexpr):
    """One program a row. ONCE: BLOCK holds it; else it is read twice, the second time from a cache."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    out_ptr += row * K
    c = tl.arange(0, BLOCK)
    if ONCE:
        x = tl.load(x_ptr + c, mask=c < K, other=0.0).to(tl.float32)
        scale = _scale(tl.max(tl.abs(x)))
        y = x * tl.div_rn(1.0, scale)
        tl.store(out_ptr + c, y.to(out_ptr.dtype.element_ty), mask=c < K)
    else:
        amax = tl.zeros((BLOCK,), tl.float32)
        for k in range(0, K, BLOCK):
            x = tl.load(x_ptr + k + c, mask=k + c < K, other=0.0).to(tl.float32)
            amax = tl.maximum(amax, tl.abs(x))
        scale = _scale(tl.max(amax))
        inverse = tl.div_rn(1.0, scale)
        for k in range(0, K, BLOCK):
            x = tl.load(x_ptr + k + c, mask=k + c < K, other=0.0).to(tl.float32)
            tl.store(out_ptr + k + c, (x * inverse).to(out_ptr.dtype.element_ty), mask=k + c < K)
    tl.store(scale_ptr + row, scale)


def quantize_rows_triton(x_TK: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`quantize_rows` in one launch."""
    out = _rows_output(x_TK, out)
    rows, K = x_TK.shape
    scale = torch.empty(rows, 1, device=x_TK.device, dtype=torch.float32)
    if rows == 0:
        return out, scale
    block = min(triton.next_power_of_2(max(K, 1)), IN_REGISTERS)
    _quantize_rows_kernel[(rows,)](
        x_TK, x_TK.stride(0), out, scale, K, BLOCK=block, ONCE=block >= K, num_warps=max(block // 2048, 1)
    )
    return out, scale


def quantize_rows(x_TK: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x as (E4M3 [T, K], contiguous, into `out` where given; scales fp32 [T, 1]). x may have a row stride beyond K.

    NaN and infinities come out as NaN.
    """
    _check_e4m3(out)
    fast = HAVE_TRITON and supported(x_TK.device)
    return (quantize_rows_triton if fast else quantize_rows_reference)(x_TK, out)


# ------------------------------------------------------------------ the base


def weight_scales(weight: NF4Weight) -> tuple[Tensor, Tensor]:
    """The scales of W's rows [N] and columns [K], in fp32. At most CHUNK weights (or a row) are dequantized at once."""
    device = weight.packed.device
    rows = torch.zeros(weight.rows, device=device)
    columns = torch.zeros(weight.columns, device=device)
    for start, part in _row_chunks(weight):
        w = dequantize_nf4(part, dtype=torch.float32).abs_()
        torch.amax(w, 1, out=rows[start : start + part.rows])
        torch.maximum(columns, w.amax(0), out=columns)
    return _scales(rows), _scales(columns)


def _row_chunks(weight: NF4Weight) -> Iterator[tuple[int, NF4Weight]]:
    """The weight in parts of whole rows and whole blocks, each with its first row."""
    absmax, columns = absmax_reference(weight), weight.columns
    least = BLOCK // math.gcd(columns, BLOCK)  # rows that end with a block
    step = max(CHUNK // (columns * least), 1) * least
    for start in range(0, weight.rows, step):
        rows = min(step, weight.rows - start)
        first, size = start * columns, rows * columns
        packed = weight.packed[first // 2 : first // 2 + -(-size // 2)]
        blocks = absmax[first // BLOCK : first // BLOCK + -(-size // BLOCK)]
        yield start, NF4Weight(packed, blocks, weight.code, rows, columns, torch.float32)


def dequantize_nf4_fp8_reference(
    weight: NF4Weight, row_scales: Tensor, column_scales: Tensor, *, transposed: bool, out: Tensor | None = None
) -> Tensor:
    out = _weight_output(weight, transposed, out)
    shape = weight.rows, weight.columns
    absmax = absmax_reference(weight).repeat_interleave(BLOCK)[: weight.rows * weight.columns].view(shape)
    ones = torch.ones_like(weight.absmax, dtype=torch.float32)
    code = dequantize_nf4_reference(
        replace(weight, absmax=ones, code2=None, absmax2=None, offset=None), dtype=torch.float32
    )
    w = code * (absmax * (1 / (column_scales if transposed else row_scales[:, None])))
    return _round(w.T if transposed else w, out)


@jit
def _absmax(
    absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, block, mask, DOUBLE: tl.constexpr, STACKED: tl.constexpr
):  # fmt: skip
    if DOUBLE:
        index = tl.load(absmax_ptr + block, mask=mask, other=0).to(tl.int32)
        absmax2 = tl.load(absmax2_ptr + block // 256, mask=mask, other=0.0)
        offset = tl.load(offset_ptr + block // 256, mask=mask, other=0.0) if STACKED else tl.load(offset_ptr)
        absmax = tl.load(code2_ptr + index) * absmax2 + offset
    else:
        absmax = tl.load(absmax_ptr + block, mask=mask, other=0.0).to(tl.float32)
    return absmax


@jit
def _inverse(scale, ASM: tl.constexpr):
    """1 / scale, rounded to nearest, of a normal number below 2^125, which weights' scales are.

    ASM: as NVIDIA's own division goes for such numbers, without its branch for others.
    """
    if ASM:
        inverse = tl.inline_asm_elementwise(
            """{ .reg .f32 about, off;
            rcp.approx.ftz.f32 about, $1;
            fma.rn.f32 off, $1, about, 0fBF800000;
            neg.f32 off, off;
            fma.rn.f32 $0, about, off, about; }""",
            "=f,f", [scale], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        inverse = tl.div_rn(1.0, scale)
    return inverse


@jit
def _words(pointer, ASM: tl.constexpr):
    """The words at these pointers, of which stores change none.

    ASM: to Triton this is arithmetic, so a thread loads what it goes on to use. A load of Triton's own spreads over
    threads as memory lies, and what it brings, or worse, what is made of it, then moves through shared memory.
    """
    if ASM:
        words = tl.inline_asm_elementwise(
            "ld.global.nc.b32 $0, [$1];", "=r,l", [pointer.to(tl.int64)], tl.int32, is_pure=True, pack=1
        )
    else:
        words = tl.load(pointer)
    return words


@jit
def _dequantize_rows_kernel(
    words_ptr, absmax_ptr, code_ptr, code2_ptr, absmax2_ptr, offset_ptr, scales_ptr, out_ptr, out_stride, blocks,
    BLOCKS_A_ROW: tl.constexpr, DOUBLE: tl.constexpr, STACKED: tl.constexpr, SHUFFLE: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """As kernels/nf4.py's, with each block's absmax over its row's scale: a block lies in one row."""
    pair = tl.program_id(0) * BLOCKS * 4 + tl.arange(0, BLOCKS * 4)  # of words: 16 bytes of E4M3 a store
    block = pair // 4
    inside = block < blocks
    i, j = tl.arange(0, 2), tl.arange(0, 8)
    words = words_ptr + pair[:, None] * 2 + i[None, :]
    packed = tl.load(words, mask=inside[:, None], other=0)
    scale = _absmax(absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, block, inside, DOUBLE, STACKED)
    scale *= _inverse(tl.load(scales_ptr + block // BLOCKS_A_ROW, mask=inside, other=1.0), SHUFFLE)
    nibble = packed[:, :, None] >> ((j ^ 1) * 4)[None, None, :]  # the high nibble of a byte comes first
    value = tl.reshape(code_at(nibble, code_ptr, SHUFFLE), (BLOCKS * 4, 16)) * scale[:, None]
    out = out_ptr + (pair // (BLOCKS_A_ROW * 4)).to(tl.int64) * out_stride + pair % (BLOCKS_A_ROW * 4) * 16
    tl.store(out[:, None] + tl.arange(0, 16)[None, :], value.to(out_ptr.dtype.element_ty), mask=inside[:, None])


@jit
def _dequantize_transposed_kernel(
    words_ptr, absmax_ptr, code_ptr, code2_ptr, absmax2_ptr, offset_ptr, scales_ptr, out_ptr, out_stride, rows,
    BLOCKS_A_ROW: tl.constexpr, DOUBLE: tl.constexpr, STACKED: tl.constexpr, SHUFFLE: tl.constexpr,
    TILE_N: tl.constexpr, NEIGHBOURS: tl.constexpr,
):  # fmt: skip
    """A program reads a block of each of TILE_N rows of W, and writes TILE_N of each of 64 rows of W^T.

    A thread holds words of 16 rows of W that lie at the same place, and writes one weight of each, 16 bytes, eight
    times: no weight moves between threads, and few are in registers at a time.
    NEIGHBOURS blocks of a row, which share what memory fetches at a time, are read at about the same time.
    """
    program = tl.program_id(0)
    tiles = tl.cdiv(rows, TILE_N)
    b = program // (tiles * NEIGHBOURS) * NEIGHBOURS + program % NEIGHBOURS
    n = program // NEIGHBOURS % tiles * TILE_N + tl.arange(0, TILE_N)
    row = tl.minimum(n, rows - 1).to(tl.int64)
    block = row * BLOCKS_A_ROW + b
    w = tl.arange(0, 8)
    packed = _words(words_ptr + (block * 8)[None, :] + w[:, None], SHUFFLE)
    absmax = _absmax(absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, block, n < rows, DOUBLE, STACKED)
    k = b * 64 + w * 8
    scale_words = scales_ptr.to(tl.pointer_type(tl.int32))
    for j in tl.static_range(8):
        scale = _words(scale_words + k + j, SHUFFLE).to(tl.float32, bitcast=True)
        inverse = _inverse(scale, SHUFFLE)
        code = code_at(packed >> ((j ^ 1) * 4), code_ptr, SHUFFLE)  # the high nibble of a byte comes first
        value = code * (absmax[None, :] * inverse[:, None])
        out = out_ptr + (k + j).to(tl.int64)[:, None] * out_stride + n[None, :]
        tl.store(out, value.to(out_ptr.dtype.element_ty), mask=(n < rows)[None, :])


def dequantize_nf4_fp8_triton(
    weight: NF4Weight, row_scales: Tensor, column_scales: Tensor, *, transposed: bool, out: Tensor | None = None
) -> Tensor:
    """`dequantize_nf4_fp8` in one launch. Needs aligned words of eight weights, and rows of whole blocks."""
    out = _weight_output(weight, transposed, out)
    blocks = weight.rows * weight.columns // BLOCK
    if blocks == 0:
        return out
    given: tuple[Any, ...] = (
        weight.packed.view(torch.int32), weight.absmax, weight.code, weight.code2, weight.absmax2, weight.offset,
    )  # fmt: skip
    options: dict[str, Any] = {
        "BLOCKS_A_ROW": weight.columns // BLOCK,
        "DOUBLE": weight.code2 is not None,
        "STACKED": weight.offset is not None and weight.offset.numel() > 1,
        "SHUFFLE": shuffles(out),
        "enable_fp_fusion": False,  # as in kernels/nf4.py
    }
    if transposed:
        a_row = weight.columns // BLOCK
        given = (*given, column_scales, out, out.stride(0), weight.rows)
        _dequantize_transposed_kernel[(triton.cdiv(weight.rows, TILE_N) * a_row,)](
            *given, TILE_N=TILE_N, NEIGHBOURS=math.gcd(a_row, NEIGHBOURS), num_warps=TILE_WARPS, **options
        )
    else:
        given = (*given, row_scales, out, out.stride(0), blocks)
        _dequantize_rows_kernel[(triton.cdiv(blocks, BLOCKS),)](*given, BLOCKS=BLOCKS, num_warps=4, **options)
    return out


def dequantize_nf4_fp8(
    weight: NF4Weight, row_scales: Tensor, column_scales: Tensor, *, transposed: bool, out: Tensor | None = None
) -> Tensor:
    """W [N, K] in E4M3 over `row_scales`, or, transposed, W^T [K, N] over `column_scales`, from `weight_scales`.

    `out` may have a row stride beyond its width. Columns that are no multiple of 64 take the reference, on any device.
    """
    _check_e4m3(out)
    fast = HAVE_TRITON and supported(weight.packed.device) and kernel_takes(weight) and weight.columns % BLOCK == 0
    dequantize = dequantize_nf4_fp8_triton if fast else dequantize_nf4_fp8_reference
    return dequantize(weight, row_scales, column_scales, transposed=transposed, out=out)


# ------------------------------------------------------------------ the product


def scaled_mm_reference(
    x8_TK: Tensor,
    x_scale: Tensor,
    w8_NK: Tensor,
    w_scale: Tensor,
    out_dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,
) -> Tensor:
    out = _product_output(x8_TK, w8_NK, out_dtype, out)
    return out.copy_((x8_TK.float() * x_scale) @ (w8_NK.float() * w_scale.reshape(-1, 1)).T)


def scaled_mm(
    x8_TK: Tensor,
    x_scale: Tensor,
    w8_NK: Tensor,
    w_scale: Tensor,
    out_dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,
) -> Tensor:
    """x W^T [T, N] of E4M3 operands and their scales, [T, 1] and [N]. For dY W give W^T [K, N] as the weight.

    `out`, of `out_dtype`, may have a row stride beyond N.
    Tensor cores keep the sums, and cut every product off at 2^-13 of the largest number in sight, the sum so far among
    them. With products of both signs, whose sums stay small, rounding the operands (3.7%) hides that. With products of
    one sign the loss grows with K: at K = 14336 the result was 21% too small on an H100.
    """
    N, K = w8_NK.shape
    if N % 16 or K % 16:
        raise ValueError(f"the weight is {N}x{K}; FP8 products need multiples of 16: leave this layer in 16 bits")
    if not supported(x8_TK.device):
        return scaled_mm_reference(x8_TK, x_scale, w8_NK, w_scale, out_dtype, out)
    out = _product_output(x8_TK, w8_NK, out_dtype, out)
    return torch._scaled_mm(
        x8_TK, w8_NK.t(), x_scale, w_scale.reshape(1, -1), out_dtype=out_dtype, use_fast_accum=True, out=out
    )


# ------------------------------------------------------------------ outputs


def _check_e4m3(out: Tensor | None) -> None:
    """Launchers and references take an output in fp32 too, and leave it unrounded: Triton's interpreter has no E4M3."""
    if out is not None and out.dtype != E4M3:
        raise ValueError(f"out is {out.dtype}; it must be {E4M3}")


def _rows_output(x: Tensor, out: Tensor | None) -> Tensor:
    if out is None:
        return torch.empty(x.shape, device=x.device, dtype=E4M3)
    if out.shape != x.shape or not out.is_contiguous():
        expected = f"{x.shape[0]}x{x.shape[1]} and contiguous"
        raise ValueError(f"out is {tuple(out.shape)} with strides {out.stride()}; it must be {expected}")
    return out


def _weight_output(weight: NF4Weight, transposed: bool, out: Tensor | None) -> Tensor:
    shape = (weight.columns, weight.rows) if transposed else (weight.rows, weight.columns)
    if out is None:
        return torch.empty(shape, device=weight.packed.device, dtype=E4M3)
    return _checked(out, shape)


def _product_output(x8: Tensor, w8: Tensor, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    shape = (x8.shape[0], w8.shape[0])
    if out is None:
        return torch.empty(shape, device=x8.device, dtype=dtype)
    if out.dtype != dtype:
        raise ValueError(f"out is {out.dtype} and out_dtype {dtype}; pass the same")
    return _checked(out, shape)


def _checked(out: Tensor, shape: tuple[int, int]) -> Tensor:
    if out.shape != shape or out.stride(-1) != 1:
        expected = f"{shape[0]}x{shape[1]} with adjacent columns"
        raise ValueError(f"out is {tuple(out.shape)} with strides {out.stride()}; it must be {expected}")
    return out
