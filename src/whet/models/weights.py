"""A projection's weight as the block multiplies by it: adapters beside it in one product, or apart from it.

`product` takes the input with its margin, [x | x A^T], and gives x W^T + s (x A^T) B^T; `back_product` takes the
gradient with its margin, [g | g s B], and gives g W + (g s B) A. Either way the caller fills the margins, from `down`
and `up`.
Shapes: W [N, K]; R columns of margin; x [T, K + R]; g [T, N + R]; down [K, R] is A^T; up [N, R] is s B.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from whet.kernels import cublaslt
from whet.kernels._precision import wide_dtype
from whet.kernels.fp8 import dequantize_nf4_fp8, quantize_rows
from whet.kernels.nf4 import NF4Weight


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, summed and returned in fp32 whatever the inputs are held in."""
    if a.dtype == wide_dtype(a.dtype):
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def add_product(total: Tensor, a: Tensor, b: Tensor, scale: float = 1.0) -> None:
    """total += scale * product(a, b), in place."""
    if a.dtype == wide_dtype(a.dtype):
        total.addmm_(a, b, alpha=scale)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=torch.float32, alpha=scale, out=total)
    else:
        total.addmm_(a.float(), b.float(), alpha=scale)


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
        return cublaslt.multiply(xe, self._forward, out)

    def add_product(self, residual: Tensor, xe: Tensor, out: Tensor) -> None:
        cublaslt.multiply(xe, self._forward, out, residual)

    def back_product(self, dye: Tensor, out: Tensor | None = None) -> Tensor:
        return cublaslt.multiply(dye, self._back, out)


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
        total = product(tail, self.up.T)
        for rows, part in zip(self._rows, self._parts, strict=True):
            add_product(total[:, rows], x, part.T)
        torch.add(residual, total, out=out)

    def back_product(self, dye: Tensor, out: Tensor | None = None) -> Tensor:
        dx = torch.mm(dye[:, self.up.shape[0] :], self.down.T, out=out)
        for rows, part in zip(self._rows, self._parts, strict=True):
            dx.addmm_(dye[:, rows], part)
        return dx


@dataclass(frozen=True)
class Fp8Base:
    """An NF4 weight and its FP8 scales: of rows for products, of columns for gradients. They are computed once.

    held: what of the weight in FP8 stays from pass to pass, transposed or not.
    """

    weight: NF4Weight
    row_scales: Tensor
    column_scales: Tensor
    held: dict[bool, Tensor] = field(default_factory=dict)

    def dequantized(self, *, transposed: bool, hold: bool) -> Tensor:
        found = self.held.get(transposed)
        if found is None:
            found = dequantize_nf4_fp8(self.weight, self.row_scales, self.column_scales, transposed=transposed)
            if hold:
                self.held[transposed] = found
        return found


class Fp8Weights:
    """The base in FP8 (E4M3), each operand's rows scaled to its range; adapters and bias in 16 bits, added after."""

    def __init__(self, frozen: Fp8Base, up: Tensor, down: Tensor, *, hold: bool = False):
        """up [N, R] is s B with the bias; down [R, K] is A. hold: the base in FP8 stays for other passes."""
        self._frozen, self.down, self.up, self._hold = frozen, down.T, up, hold
        margin = up.shape[1]
        self.width_in, self.width_out = frozen.weight.columns + margin, frozen.weight.rows + margin

    @cached_property
    def _rows(self) -> Tensor:
        return self._frozen.dequantized(transposed=False, hold=self._hold)

    @cached_property
    def _columns(self) -> Tensor:
        return self._frozen.dequantized(transposed=True, hold=self._hold)

    def product(self, xe: Tensor, out: Tensor | None = None) -> Tensor:
        return self._multiply(xe, self._rows, self._frozen.row_scales, self.up.T, out)

    def add_product(self, residual: Tensor, xe: Tensor, out: Tensor) -> None:
        self._multiply(xe, self._rows, self._frozen.row_scales, self.up.T, out, residual)

    def back_product(self, dye: Tensor, out: Tensor | None = None) -> Tensor:
        return self._multiply(dye, self._columns, self._frozen.column_scales, self.down.T, out)

    @staticmethod
    def _multiply(
        xe: Tensor, base: Tensor, scales: Tensor, small: Tensor, out: Tensor | None, residual: Tensor | None = None
    ) -> Tensor:
        """[x | tail]: x base^T + tail small (+ residual). The adapter's part comes first: the base's adds to it."""
        x, tail = xe[:, : base.shape[1]], xe[:, base.shape[1] :]
        if out is None:
            out = xe.new_empty(xe.shape[0], base.shape[0])
        if tail.shape[1]:
            residual = cublaslt.multiply(tail, small, out, residual)
        x8, x_scales = quantize_rows(x)
        return cublaslt.product(x8, base.T, c=residual, out=out, scale_a=x_scales, scale_b=scales)
