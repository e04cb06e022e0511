"""All weights of a decoder layer, dequantized and with their adapters beside them, in one launch.

Each projection is laid out as kernels/extend.py says, [N + R, K + R], one after another in one buffer; NF4 is undone as
kernels/nf4.py says, to the bit. Where the weight is wanted in another form (FP8), the adapters are laid out alone.
Launching a kernel costs the host more than most of them take on the device, and a layer needs these eight times a pass:
this one reads where its inputs lie from a table that is made once.
Shapes: W [N, K] of a projection; A_j [r_j, K], B_j [n_j, r_j] of its parts, at most three; R columns of margin.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from whet.kernels._triton import HAVE_TRITON, jit, tl
from whet.kernels.extend import MOST_PARTS, extend, lay_out
from whet.kernels.nf4 import NF4Weight, decode, dequantize_nf4_reference, kernel_takes, shuffles

ALIGNED = 64  # elements that each projection's place is a multiple of
BLOCKS, WARPS = 128, 4  # blocks of 64 weights that a program dequantizes, a divisor of 256, and its warps
BORDER = 16  # rows or columns of margin that a program writes, so many of the others at a time: registers that these
STRIP = 16  # take are taken from the programs that dequantize, which want many of themselves on a multiprocessor
FIELDS = 30  # of a projection in the table


@dataclass(frozen=True, eq=False)
class ProjectionWeight:
    """One projection: its weight, A and B of its parts (rank 0 for a part without), their scales, R, and a bias [N]."""

    weight: NF4Weight
    downs: Sequence[Tensor]
    ups: Sequence[Tensor]
    scales: Sequence[float]
    margin: int
    bias: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """[N + R, K + R]."""
        return self.weight.rows + self.margin, self.weight.columns + self.margin


class Place(NamedTuple):
    """Where a projection's three parts begin in the buffer, and how far apart their rows are, in elements.

    The weight; s B at its right, or apart; A below it, or apart.
    """

    weight: int
    right: int
    below: int
    weight_stride: int
    right_stride: int
    below_stride: int


@dataclass(eq=False)
class LayerWeights:
    """The projections of one layer, and the table of their addresses, made again when an adapter has moved.

    apart: the adapters alone, B of [N, R] and A of [R, K] one after the other, and no weights. ready: the weights are
    in the buffer already, and only the adapters beside them are laid out.
    """

    projections: Sequence[ProjectionWeight]
    dtype: torch.dtype
    apart: bool = False
    ready: bool = False
    _addresses: tuple[int, ...] = ()
    _table: tuple[Tensor, Tensor, list[Tensor]] | None = field(default=None)

    @cached_property
    def places(self) -> list[Place]:
        places, end = [], 0
        for p in self.projections:
            rows, columns, margin = p.weight.rows, p.weight.columns, p.margin
            if self.apart:
                below = _aligned(end + rows * margin)
                places.append(Place(0, end, below, 0, margin, columns))
                end = _aligned(below + margin * columns)
            else:
                stride = columns + margin
                places.append(Place(end, end + columns, end + rows * stride, stride, stride, stride))
                end = _aligned(end + (rows + margin) * stride)
        return places

    @property
    def size(self) -> int:
        """Elements of the buffer."""
        last, p = self.places[-1], self.projections[-1]
        return _aligned(last.below + p.margin * last.below_stride)

    def programs(self, p: ProjectionWeight) -> tuple[int, int, int]:
        """Programs that dequantize, that write the margin at the right, and that below."""
        done = self.apart or self.ready
        dequantize = 0 if done else -(-p.weight.rows * p.weight.columns // (64 * BLOCKS))
        if not p.margin:
            return dequantize, 0, 0
        return dequantize, -(-p.weight.rows // BORDER), -(-p.weight.columns // BORDER)

    def table(self) -> tuple[Tensor, Tensor]:
        addresses = tuple(x.data_ptr() for p in self.projections for x in (*p.downs, *p.ups))
        if addresses != self._addresses or self._table is None:
            self._addresses, self._table = addresses, _table(self)
        return self._table[0], self._table[1]

    def views(self, out: Tensor) -> list[Tensor]:
        """[N + R, K + R] of each projection in its buffer; where they are apart, B and A of each in turn."""
        found = []
        for p, place in zip(self.projections, self.places, strict=True):
            rows, columns = p.shape
            if self.apart:
                found.append(out[place.right :][: p.weight.rows * p.margin].view(p.weight.rows, p.margin))
                found.append(out[place.below :][: p.margin * p.weight.columns].view(p.margin, p.weight.columns))
            else:
                found.append(out[place.weight :][: rows * columns].view(rows, columns))
        return found


def _aligned(elements: int) -> int:
    return -(-elements // ALIGNED) * ALIGNED


def takes(projections: Sequence[ProjectionWeight]) -> bool:
    """Whether one launch can do these: double-quantized weights that share their tables, contiguous fp32 adapters."""
    first = projections[0].weight
    if first.code2 is None:
        return False
    return HAVE_TRITON and all(
        kernel_takes(p.weight)
        and p.weight.code2 is not None
        and p.weight.packed.is_cuda
        and p.weight.packed.data_ptr() % 16 == 0
        and torch.equal(p.weight.code2, first.code2)
        and torch.equal(p.weight.code, first.code)
        and len(p.downs) <= MOST_PARTS
        and all(x.dtype == torch.float32 and x.is_contiguous() for x in (*p.downs, *p.ups))
        for p in projections
    )


def layer_weights_reference(layer: LayerWeights, out: Tensor) -> None:
    views = layer.views(out)
    for i, p in enumerate(layer.projections):
        if layer.apart:
            lay_out(views[2 * i + 1], views[2 * i], p.downs, p.ups, p.scales, p.bias)
            continue
        rows, columns = p.weight.rows, p.weight.columns
        if not layer.ready:
            dequantize_nf4_reference(p.weight, out=views[i][:rows, :columns])
        if p.margin:
            extend(views[i], p.downs, p.ups, p.scales, rows, columns, p.bias)


def _table(layer: LayerWeights) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The table, the scales, and what the table points at and nobody else holds."""
    entries, scales, made, first = [], [], [], 0
    for p, place in zip(layer.projections, layer.places, strict=True):
        w, missing = p.weight, MOST_PARTS - len(p.downs)
        assert w.absmax2 is not None
        assert w.offset is not None
        offset = w.offset.reshape(-1)
        if offset.numel() == 1:
            offset = offset.expand_as(w.absmax2).contiguous()
        bias = None if p.bias is None else p.bias.to(layer.dtype)
        made += [offset] if bias is None else [offset, bias]
        dequantize, right, below = layer.programs(p)
        entry = [
            w.packed.data_ptr(), w.absmax.data_ptr(), w.absmax2.data_ptr(), offset.data_ptr(),
            place.weight, w.rows, w.columns, p.margin, first, first + dequantize, first + dequantize + right,
            *[x.data_ptr() for x in p.downs], *[0] * missing,
            *[x.data_ptr() for x in p.ups], *[0] * missing,
            *[x.shape[0] for x in p.ups], *[0] * missing,
            *[x.shape[0] for x in p.downs], *[0] * missing,
            0 if bias is None else bias.data_ptr(),
            place.right, place.below, place.right_stride, place.below_stride,
            *_reciprocal(w.columns // 8),
        ]  # fmt: skip
        assert len(entry) == FIELDS
        entries.append(entry)
        scales.append([*p.scales, *[0.0] * missing])
        first += dequantize + right + below
    device = layer.projections[0].weight.packed.device
    return torch.tensor(entries, dtype=torch.int64).to(device), torch.tensor(scales).to(device), made


def _reciprocal(d: int) -> tuple[int, int]:
    """m and s with n // d = ((2 n * m) >> 32) >> s for all n below 2^31; m is below 2^32.

    Source: Granlund & Montgomery 1994, "Division by Invariant Integers using Multiplication", theorem 4.2.
    """
    s = (d - 1).bit_length()
    return (1 << (31 + s)) // d + 1, s


@jit
def _layer_weights_kernel(
    table, scales, code_ptr, code2_ptr, like_ptr, out_ptr,
    PROJECTIONS: tl.constexpr, BLOCKS: tl.constexpr, BORDER: tl.constexpr, STRIP: tl.constexpr, FIELDS: tl.constexpr,
    WHOLE: tl.constexpr, SHUFFLE: tl.constexpr,
):  # fmt: skip
    """Fields of a projection: see `_table`. The programs of one come before those of the next.

    Weights are dequantized as in kernels/nf4.py. WHOLE: all programs that do have all their blocks.
    """
    program = tl.program_id(0).to(tl.int64)
    p = 0
    for other in tl.static_range(1, PROJECTIONS):
        p += (program >= tl.load(table + other * FIELDS + 8)).to(tl.int32)
    entry = table + p * FIELDS
    rows, columns, margin = tl.load(entry + 5), tl.load(entry + 6), tl.load(entry + 7)
    program -= tl.load(entry + 8)
    right = tl.load(entry + 9) - tl.load(entry + 8)
    below = tl.load(entry + 10) - tl.load(entry + 8)
    if program < right:
        words_ptr = tl.multiple_of(tl.load(entry).to(tl.pointer_type(tl.int32)), 16)
        absmax_ptr = tl.load(entry + 1).to(tl.pointer_type(tl.uint8))
        absmax2_ptr = tl.load(entry + 2).to(tl.pointer_type(tl.float32))
        offset_ptr = tl.load(entry + 3).to(tl.pointer_type(tl.float32))
        out = out_ptr + tl.multiple_of(tl.load(entry + 4), 16)
        narrow = margin.to(tl.int32)
        magic, shift = tl.load(entry + 28).to(tl.uint32), tl.load(entry + 29).to(tl.uint32)
        block = program.to(tl.int32) * BLOCKS
        w = tl.arange(0, BLOCKS * 8)
        inside = w < (rows * columns // 8 - program * (BLOCKS * 8)).to(tl.int32)
        mask = None if WHOLE else inside
        packed = tl.load(words_ptr + program * (BLOCKS * 8) + tl.max_contiguous(w, [1]), mask=mask)
        index = tl.load(absmax_ptr + block + w // 8, mask=mask).to(tl.int32)
        scale2, offset = tl.load(absmax2_ptr + block // 256), tl.load(offset_ptr + block // 256)
        absmax = tl.load(code2_ptr + index, mask=mask) * scale2 + offset
        value = decode(packed, code_ptr, SHUFFLE) * absmax[:, None]
        row = (tl.umulhi((block * 16 + w * 2).to(tl.uint32), magic) >> shift).to(tl.int32)  # word // (columns // 8)
        at = w * 8 + tl.multiple_of(row * narrow, 8)
        place = out + program * (BLOCKS * 64) + at[:, None] + tl.arange(0, 8)[None, :]
        tl.store(place, value.to(out_ptr.dtype.element_ty), mask=None if WHOLE else inside[:, None])
    else:
        pointer = like_ptr.dtype
        n0, n1, n2 = tl.load(entry + 17), tl.load(entry + 18), tl.load(entry + 19)
        r0, r1, r2 = tl.load(entry + 20), tl.load(entry + 21), tl.load(entry + 22)
        if program < below:  # s B at the right of W
            b0 = tl.load(entry + 14).to(pointer)
            b1 = tl.load(entry + 15).to(pointer)
            b2 = tl.load(entry + 16).to(pointer)
            row = ((program - right) * BORDER + tl.arange(0, BORDER))[:, None]
            bias = tl.load(entry + 23).to(tl.pointer_type(out_ptr.dtype.element_ty))
            out = out_ptr + tl.load(entry + 24)
            stride = tl.load(entry + 26)
            s = scales + p * 3
            for c in range(0, margin, STRIP):
                column = (c + tl.arange(0, STRIP))[None, :]
                m0 = (row < n0) & (column < r0)
                m1 = (row >= n0) & (row < n0 + n1) & (column >= r0) & (column < r0 + r1)
                m2 = (row >= n0 + n1) & (row < n0 + n1 + n2) & (column >= r0 + r1) & (column < r0 + r1 + r2)
                x = tl.load(b0 + row * r0 + column, mask=m0, other=0.0) * tl.load(s)
                x += tl.load(b1 + (row - n0) * r1 + (column - r0), mask=m1, other=0.0) * tl.load(s + 1)
                x += tl.load(b2 + (row - n0 - n1) * r2 + (column - r0 - r1), mask=m2, other=0.0) * tl.load(s + 2)
                last = (row < rows) & (column == r0 + r1 + r2) & (tl.load(entry + 23) != 0)
                x += tl.load(bias + row + 0 * column, mask=last, other=0.0).to(tl.float32)
                inside = (row < rows) & (column < margin)
                tl.store(out + row * stride + column, x.to(out_ptr.dtype.element_ty), mask=inside)
        else:  # A under W
            a0 = tl.load(entry + 11).to(pointer)
            a1 = tl.load(entry + 12).to(pointer)
            a2 = tl.load(entry + 13).to(pointer)
            out = out_ptr + tl.load(entry + 25)
            stride = tl.load(entry + 27)
            k = ((program - below) * BORDER + tl.arange(0, BORDER))[None, :]
            in_k = k < columns
            for c in range(0, margin, STRIP):
                i = (c + tl.arange(0, STRIP))[:, None]
                y = tl.load(a0 + i * columns + k, mask=in_k & (i < r0), other=0.0)
                y += tl.load(a1 + (i - r0) * columns + k, mask=in_k & (i >= r0) & (i < r0 + r1), other=0.0)
                m = in_k & (i >= r0 + r1) & (i < r0 + r1 + r2)
                y += tl.load(a2 + (i - r0 - r1) * columns + k, mask=m, other=0.0)
                tl.store(out + i * stride + k, y.to(out_ptr.dtype.element_ty), mask=in_k & (i < margin))


def layer_weights_triton(layer: LayerWeights, out: Tensor) -> None:
    table, scales = layer.table()
    first = layer.projections[0]
    programs = sum(sum(layer.programs(p)) for p in layer.projections)
    if programs == 0:
        return
    _layer_weights_kernel[(programs,)](
        table, scales, first.weight.code, first.weight.code2, scales, out,
        PROJECTIONS=len(layer.projections), BLOCKS=BLOCKS, BORDER=BORDER, STRIP=STRIP, FIELDS=FIELDS,
        WHOLE=all(p.weight.rows * p.weight.columns % (64 * BLOCKS) == 0 for p in layer.projections),
        SHUFFLE=shuffles(out), num_warps=WARPS, enable_fp_fusion=False,  # as in kernels/nf4.py
    )  # fmt: skip


def new_buffer(layer: LayerWeights) -> Tensor:
    """[size], for `layer_weights`."""
    return torch.empty(layer.size, dtype=layer.dtype, device=layer.projections[0].weight.packed.device)


def layer_weights(layer: LayerWeights, out: Tensor | None = None) -> list[Tensor]:
    """[N + R, K + R] of each projection, or B [N, R] and A [R, K] of each: views of `out`, or a new buffer.

    Needs `takes`, and where the layer is `ready` the buffer in which the weights are.
    """
    if out is None:
        out = new_buffer(layer)
    (layer_weights_triton if out.is_cuda else layer_weights_reference)(layer, out)
    return layer.views(out)
