"""A projection's weight as the block multiplies by it: adapters beside it in one product, or apart from it.

`product` takes the input with its margin, [x | x A^T], and gives x W^T + s (x A^T) B^T; `back_product` takes the
gradient with its margin, [g | g s B], and gives g W + (g s B) A. Either way the caller fills the margins, from `down`
and `up`.
Shapes: W [N, K]; R columns of margin; x [T, K + R]; g [T, N + R]; down [K, R] is A^T; up [N, R] is s B.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from whet.kernels._precision import wide_dtype
from whet.kernels.fp8 import dequantize_nf4_fp8, quantize_rows, scaled_mm
from whet.kernels.nf4 import NF4Weight


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, summed and returned in fp32 whatever the inputs are held in."""
    if a.dtype == wide_dtype(a.dtype):
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


class Weights(Protocol):
    """What the block asks of a weight."""

    down: Tensor
    up: Tensor

    @property
    def width_in(self) -> int:
        """K + R."""

    @property
    def width_out(self) -> int:
        """N + R."""

    def product(self, xe: Tensor, out: Tensor | None = None) -> Tensor: ...

    def add_product(self, residual: Tensor, xe: Tensor, out: Tensor) -> None:
        """out = residual + product(xe)."""

    def back_product(self, dye: Tensor, out: Tensor | None = None) -> Tensor: ...


class BesideWeights:
    """[N + R, K + R] as kernels/extend.py lays it out: one product gives base and adapters."""

    def __init__(self, e: Tensor, rows: int, columns: int):
        self._forward, self._back = e[:rows].T, e[:, :columns]
        self.down, self.up = e[rows:, :columns].T, e[:rows, columns:]
        self.width_out, self.width_in = e.shape

    def product(self, xe: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.mm(xe, self._forward, out=out)

    def add_product(self, residual: Tensor, xe: Tensor, out: Tensor) -> None:
        torch.addmm(residual, xe, self._forward, out=out)

    def back_product(self, dye: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.mm(dye, self._back, out=out)


class ApartWeights:
    """A weight in 16 bits as it lies in the model, nothing copied; adapters and bias in a product of their own.

    The smaller product comes first: the larger one then rounds the sum, once.
    """

    def __init__(self, parts: tuple[Tensor, ...], up: Tensor, down: Tensor):
        """parts: [n_j, K], under each other W. up [N, R] is s B with the bias; down [R, K] is A."""
        self._parts, self.down, self.up = parts, down.T, up
        self._columns, rows = down.shape[1], [part.shape[0] for part in parts]
        self._rows = [slice(end - n, end) for n, end in zip(rows, accumulate(rows), strict=True)]
        self.width_in, self.width_out = self._columns + up.shape[1], up.shape[0] + up.shape[1]

    def product(self, xe: Tensor, out: Tensor | None = None) -> Tensor:
        x, tail = xe[:, : self._columns], xe[:, self._columns :]
        y = torch.mm(tail, self.up.T, out=out)
        for rows, part in zip(self._rows, self._parts, strict=True):
            y[:, rows].addmm_(x, part.T)
        return y

    def add_product(self, residual: Tensor, xe: Tensor, out: Tensor) -> None:
        """Summed in fp32: rounded once, at the residual's size, as with adapters beside the weight."""
        x, tail = xe[:, : self._columns], xe[:, self._columns :]
        small = torch.mm(tail, self.up.T)
        for rows, part in zip(self._rows, self._parts, strict=True):
            torch.add(residual[:, rows], product(x, part.T).add_(small[:, rows]), out=out[:, rows])

    def back_product(self, dye: Tensor, out: Tensor | None = None) -> Tensor:
        dx = torch.mm(dye[:, self.up.shape[0] :], self.down.T, out=out)
        for rows, part in zip(self._rows, self._parts, strict=True):
            dx.addmm_(dye[:, rows], part)
        return dx


@dataclass(frozen=True)
class Fp8Base:
    """An NF4 weight and its FP8 scales: of rows for products, of columns for gradients. They are computed once."""

    weight: NF4Weight
    row_scales: Tensor
    column_scales: Tensor


class Fp8Weights:
    """The base in FP8 (E4M3), each operand's rows scaled to its range; adapters and bias in 16 bits, added after."""

    def __init__(self, frozen: Fp8Base, up: Tensor, down: Tensor):
        """up [N, R] is s B with the bias; down [R, K] is A."""
        self._frozen, self.down, self.up = frozen, down.T, up
        margin = up.shape[1]
        self.width_in, self.width_out = frozen.weight.columns + margin, frozen.weight.rows + margin

    @cached_property
    def _rows(self) -> Tensor:
        f = self._frozen
        return dequantize_nf4_fp8(f.weight, f.row_scales, f.column_scales, transposed=False)

    @cached_property
    def _columns(self) -> Tensor:
        f = self._frozen
        return dequantize_nf4_fp8(f.weight, f.row_scales, f.column_scales, transposed=True)

    def product(self, xe: Tensor, out: Tensor | None = None) -> Tensor:
        x, tail = xe[:, : self._frozen.weight.columns], xe[:, self._frozen.weight.columns :]
        y = scaled_mm(*quantize_rows(x), self._rows, self._frozen.row_scales, xe.dtype, out)
        return y.addmm_(tail, self.up.T) if self.up.shape[1] else y

    def add_product(self, residual: Tensor, xe: Tensor, out: Tensor) -> None:
        self.product(xe, out).add_(residual)

    def back_product(self, dye: Tensor, out: Tensor | None = None) -> Tensor:
        g, tail = dye[:, : self._frozen.weight.rows], dye[:, self._frozen.weight.rows :]
        dx = scaled_mm(*quantize_rows(g), self._columns, self._frozen.column_scales, dye.dtype, out)
        return dx.addmm_(tail, self.down.T) if self.down.shape[1] else dx
