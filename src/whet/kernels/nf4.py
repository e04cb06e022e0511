"""NF4 weights of bitsandbytes' layout, dequantized in one pass.

    w[i] = code[q[i]] * absmax[i // 64]
    absmax[b] = code2[absmax8[b]] * absmax2[b // 256] + offset        (double quantization; else absmax is stored)

q are 4-bit indices over the weight read row after row, two a byte, the first in the high nibble. Products and sums are
rounded one by one in fp32, as bitsandbytes rounds them, then once to the dtype asked for: every dtype comes out
bitwise as bitsandbytes.functional.dequantize_4bit writes it. Source: Dettmers et al. 2023, arXiv:2305.14314.
Shapes: N rows (outputs), K columns (inputs) of a weight; a block is 64 weights in a row, or across the end of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from whet.kernels._triton import HAVE_TRITON, jit, tl, triton

BLOCK = 64  # weights that share one absmax
GROUP = 256  # blocks whose absmax share one absmax2
BLOCKS, WARPS = 128, 4  # that a program dequantizes, a divisor of 256, and its warps


@dataclass(frozen=True, eq=False)
class NF4Weight:
    """A weight [rows, columns] in NF4. With double quantization `absmax` is uint8 and the last three are given."""

    packed: torch.Tensor  # uint8 [ceil(rows * columns / 2)]
    absmax: torch.Tensor  # fp32, or uint8 indices into code2 [ceil(rows * columns / 64)]
    code: torch.Tensor  # fp32 [16]
    rows: int
    columns: int
    dtype: torch.dtype  # what the weight was before, and what it comes back as unless told otherwise
    code2: torch.Tensor | None = None  # fp32 [256]
    absmax2: torch.Tensor | None = None  # fp32 [ceil(blocks / 256)]
    offset: torch.Tensor | None = None  # fp32 [], or one for each of absmax2 where weights are stacked

    @classmethod
    def from_params4bit(cls, weight: Any) -> NF4Weight:
        """Views of a bitsandbytes Params4bit (2-D, NF4, blocks of 64); nothing is copied and no device waited for.

        Raises ValueError for what this layout cannot express.
        """
        state = getattr(weight, "quant_state", None)
        if state is None:
            raise ValueError("not a quantized weight: it has no quant_state; move the model to its device first")
        if state.quant_type != "nf4":
            raise ValueError(f"quant_type is {state.quant_type!r}; only 'nf4' can be read (bnb_4bit_quant_type='nf4')")
        if state.blocksize != BLOCK:
            raise ValueError(f"blocksize is {state.blocksize}; only {BLOCK} can be read")
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError("the weight was repacked for inference on a CPU; load the model anew")
        if len(state.shape) != 2:
            raise ValueError(f"the weight's shape is {tuple(state.shape)}; only matrices can be read")
        rows, columns = state.shape
        data = weight.data
        if data.dim() == 2 and data.shape[0] == 1 and data.numel() > 1:
            raise ValueError("the weight is transposed; pass the parameter itself, not its .t()")
        packed, size = data.reshape(-1).view(torch.uint8), rows * columns
        if packed.numel() != -(-size // 2):
            raise ValueError(f"{packed.numel()} bytes of packed weights; {rows}x{columns} need {-(-size // 2)}")
        if state.absmax.numel() != -(-size // BLOCK):
            raise ValueError(f"{state.absmax.numel()} absmax; {rows}x{columns} need {-(-size // BLOCK)}")
        fields = {"packed": packed, "absmax": state.absmax.reshape(-1), "code": state.code}
        if state.state2 is not None:
            if state.state2.blocksize != GROUP:
                raise ValueError(f"nested blocksize is {state.state2.blocksize}; only {GROUP} can be read")
            fields |= {"code2": state.state2.code, "absmax2": state.state2.absmax, "offset": state.offset}
        return cls(rows=rows, columns=columns, dtype=state.dtype, **fields)


def absmax_reference(weight: NF4Weight) -> torch.Tensor:
    """The blocks' absmax in fp32, double quantization undone."""
    if weight.code2 is None or weight.absmax2 is None or weight.offset is None:
        return weight.absmax.float()
    group = torch.arange(weight.absmax.numel(), device=weight.absmax.device) // GROUP
    offset = weight.offset if weight.offset.numel() == 1 else weight.offset[group]
    return weight.code2[weight.absmax.int()] * weight.absmax2[group] + offset


def stack(weights: Sequence[NF4Weight]) -> NF4Weight | None:
    """Weights of equal width that lie one after another in memory, as one weight of all their rows; None if not so.

    None, too, where one does not end with a block of 64 or, double-quantized, with a group of 256 blocks.
    Bytes are shared, not copied; only the second level of absmax is (one number for 16,384 weights).
    """
    first = weights[0]
    alike = all(
        w.columns == first.columns and w.dtype == first.dtype and w.rows * w.columns % BLOCK == 0 for w in weights
    )
    if not alike or not (_adjacent([w.packed for w in weights]) and _adjacent([w.absmax for w in weights])):
        return None
    rows = sum(w.rows for w in weights)
    packed, absmax = (
        x.as_strided((sum(y.numel() for y in ys),), (1,))
        for x, ys in ((first.packed, [w.packed for w in weights]), (first.absmax, [w.absmax for w in weights]))
    )
    double: dict[str, torch.Tensor] = {}
    if first.code2 is not None:
        absmax2, offset = [], []
        for w in weights:
            if w.code2 is None or w.absmax2 is None or w.offset is None:
                return None
            if w.absmax.numel() % GROUP or not torch.equal(w.code2, first.code2):
                return None
            absmax2.append(w.absmax2)
            offset.append(w.offset.reshape(-1).expand(w.absmax2.numel()))
        double = {"code2": first.code2, "absmax2": torch.cat(absmax2), "offset": torch.cat(offset)}
    elif any(w.code2 is not None for w in weights):
        return None
    return NF4Weight(packed, absmax, first.code, rows, first.columns, first.dtype, **double)


def stack_dense(weights: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Matrices of equal width and dtype that lie one after another in memory, as one: a view. None if not so."""
    first = weights[0]
    alike = all(w.is_contiguous() and w.dtype == first.dtype and w.shape[1:] == first.shape[1:] for w in weights)
    if not alike or not _adjacent(weights):
        return None
    return first.as_strided((sum(w.shape[0] for w in weights), first.shape[1]), first.stride())


def _adjacent(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether each begins where the one before ends, in one allocation."""
    return all(
        a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() and a.data_ptr() + a.nbytes == b.data_ptr()
        for a, b in pairwise(tensors)
    )


def dequantize_nf4_reference(
    weight: NF4Weight, out: torch.Tensor | None = None, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """`dequantize_nf4` in torch, on any device and for any shape."""
    out = _output(weight, out, dtype)
    nibbles = torch.stack((weight.packed >> 4, weight.packed & 15), -1).reshape(-1)[: weight.rows * weight.columns]
    block = torch.arange(nibbles.numel(), device=nibbles.device) // BLOCK
    values = weight.code[nibbles.int()] * absmax_reference(weight)[block]
    return out.copy_(values.view(weight.rows, weight.columns))


def shuffles(x: torch.Tensor) -> bool:
    """Whether kernels on x may hold assembly, `code_at`'s SHUFFLE: on NVIDIA's GPUs."""
    return x.is_cuda and torch.version.hip is None


@jit
def code_at(index, code_ptr, SHUFFLE: tl.constexpr):
    """code[index % 16], in index's shape; bits of index above the lowest four may be anything.

    SHUFFLE: each lane holds one entry, lanes 0 to 15 as lanes 16 to 31, and a shuffle among 16 fetches another's. It
    ignores the higher bits itself and needs no address: one instruction where shared memory takes three.
    """
    if SHUFFLE:
        entry = tl.inline_asm_elementwise(
            """{ .reg .b32 lane; .reg .b64 address;
            mov.u32 lane, %laneid;
            and.b32 lane, lane, 15;
            mad.wide.u32 address, lane, 4, $1;
            ld.global.nc.f32 $0, [address]; }""",
            "=f,l", [code_ptr.to(tl.int64)], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
        code = tl.inline_asm_elementwise(
            "shfl.sync.idx.b32 $0, $1, $2, 0x101f, 0xffffffff;",
            "=f,f,r", [entry, index], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        table = tl.load(code_ptr + tl.arange(0, 16))
        code = tl.reshape(tl.gather(table, tl.ravel(index & 15), 0), index.shape)
    return code


@jit
def decode(packed, code_ptr, SHUFFLE: tl.constexpr):
    """[W, 8] entries of the code for W words. The high nibble of a byte comes first."""
    return code_at(packed[:, None] >> ((tl.arange(0, 8) ^ 1) * 4)[None, :], code_ptr, SHUFFLE)


@jit
def _dequantize_kernel(
    words_ptr,  # int32: eight weights each
    absmax_ptr,
    code_ptr,
    code2_ptr,
    absmax2_ptr,
    offset_ptr,
    out_ptr,
    out_stride,
    words,
    COLUMNS: tl.constexpr,
    DOUBLE: tl.constexpr,
    STACKED: tl.constexpr,
    WHOLE: tl.constexpr,
    SHUFFLE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """One program writes BLOCKS blocks of 64, a divisor of 256; WHOLE: there is no last program with fewer.

    A lane reads, decodes and writes whole words of eight, 16 bytes of bf16 a store, and finds the absmax of each
    itself: nothing moves between lanes. Words are loaded one a lane for that, as told by max_contiguous.
    """
    WORDS_A_ROW: tl.constexpr = COLUMNS // 8
    first = tl.program_id(0) * BLOCKS
    word = first * 8 + tl.arange(0, BLOCKS * 8)
    inside = word < words
    mask = None if WHOLE else inside
    packed = tl.load(words_ptr + tl.max_contiguous(word, [1]), mask=mask)
    if DOUBLE:
        index = tl.load(absmax_ptr + word // 8, mask=mask).to(tl.int32)
        offset = tl.load(offset_ptr + first // 256) if STACKED else tl.load(offset_ptr)
        absmax = tl.load(code2_ptr + index, mask=mask) * tl.load(absmax2_ptr + first // 256) + offset
    else:
        absmax = tl.load(absmax_ptr + word // 8, mask=mask).to(tl.float32)
    value = decode(packed, code_ptr, SHUFFLE) * absmax[:, None]
    out = out_ptr + (word // WORDS_A_ROW).to(tl.int64) * out_stride + (word % WORDS_A_ROW) * 8
    place = out[:, None] + tl.arange(0, 8)[None, :]
    tl.store(place, value.to(out_ptr.dtype.element_ty), mask=None if WHOLE else inside[:, None])


def dequantize_nf4_triton(
    weight: NF4Weight, out: torch.Tensor | None = None, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """`dequantize_nf4` in one launch. Needs `kernel_takes(weight)`."""
    out = _output(weight, out, dtype)
    words = weight.rows * weight.columns // 8
    if words == 0:
        return out
    _dequantize_kernel[(triton.cdiv(words, BLOCKS * 8),)](
        weight.packed.view(torch.int32),
        weight.absmax,
        weight.code,
        weight.code2,
        weight.absmax2,
        weight.offset,
        out,
        out.stride(0),
        words,
        COLUMNS=weight.columns,
        DOUBLE=weight.code2 is not None,
        STACKED=weight.offset is not None and weight.offset.numel() > 1,
        WHOLE=words % (BLOCKS * 8) == 0,
        SHUFFLE=shuffles(out),
        BLOCKS=BLOCKS,
        num_warps=WARPS,
        enable_fp_fusion=False,  # a fused multiply-add rounds once where bitsandbytes rounds twice
    )
    return out


def kernel_takes(weight: NF4Weight) -> bool:
    """Whether rows end on words of eight weights and the words are aligned; any model's do."""
    return weight.columns % 8 == 0 and weight.packed.storage_offset() % 4 == 0


def dequantize_nf4(
    weight: NF4Weight, out: torch.Tensor | None = None, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """The weight as [rows, columns] in `dtype` (of `out`, else the weight's own), into `out` where given.

    `out` may have a row stride beyond its width. Columns that are no multiple of 8 take the reference, on any device.
    """
    if weight.packed.is_cuda and HAVE_TRITON and kernel_takes(weight):
        return dequantize_nf4_triton(weight, out, dtype)
    return dequantize_nf4_reference(weight, out, dtype)


def _output(weight: NF4Weight, out: torch.Tensor | None, dtype: torch.dtype | None) -> torch.Tensor:
    if out is None:
        device = weight.packed.device
        return torch.empty(weight.rows, weight.columns, device=device, dtype=dtype or weight.dtype)
    if out.shape != (weight.rows, weight.columns) or out.stride(-1) != 1:
        expected = f"{weight.rows}x{weight.columns} with adjacent columns"
        raise ValueError(f"out is {tuple(out.shape)} with strides {out.stride()}; it must be {expected}")
    if dtype not in (None, out.dtype):
        raise ValueError(f"out is {out.dtype} and dtype {dtype}; pass one of them")
    return out
