"""A block format: rows of weights cut into blocks, worked through in pieces, and numbers it cannot hold refused.

A row of `cols` weights is stored as `cols / block_size` blocks of `block_bytes` bytes each, in order. Importance, where
given, says how much an error in each column counts: the mean square of what the column is multiplied with, from
calibration text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from gguf import GGMLQuantizationType
from numpy.typing import NDArray
from torch import Tensor

from whet.errors import WhetError
from whet.quant.kernels import TORCH, Kernels, for_cpu

FloatArray = NDArray[np.float32]
ByteArray = NDArray[np.uint8]

# Weights a piece. On the CPU so many that calls into torch and numba do not show, in some 20 MiB; elsewhere a piece
# keeps a GPU busy for longer than it takes to launch the next operation, in about 4 GiB.
_CPU_PIECE, _DEVICE_PIECE = 1 << 20, 1 << 26


@dataclass(frozen=True)
class GGUFType:
    """One tensor type: how to encode and decode it, and how far a decoded weight may lie from its source.

    to_bytes: blocks x [n, block_size], importance [P, block_size] of a row's P blocks or None, and the searches to use
    -> uint8 [n, block_bytes]. from_bytes: back to float32 [n, block_size].
    max_abs: the largest magnitude whose fp16 scales do not overflow.
    relative: error bound as a fraction of the largest magnitude in the block; `guided`: the same with importance, which
    may clip what counts little. absolute: added to it; what fp16 scales near zero lose.
    """

    name: str
    ggml: GGMLQuantizationType
    block_size: int
    block_bytes: int
    to_bytes: Callable[[Tensor, Tensor | None, Kernels], Tensor]
    from_bytes: Callable[[Tensor], Tensor]
    max_abs: float
    relative: float
    guided: float
    absolute: float

    def row_bytes(self, cols: int) -> int:
        """Bytes of a row of `cols` weights; `cols` is a multiple of the block size."""
        return cols // self.block_size * self.block_bytes

    def encode(self, x: FloatArray, importance: FloatArray | None = None, kernels: Kernels | None = None) -> ByteArray:
        """Encode x [rows, cols], with importance [cols] -> [rows, bytes]. On the CPU; releases the GIL mostly.

        kernels: `for_cpu` chooses where none are given; the bytes are the same by all.
        Raises WhetError when `cols` is no multiple of the block size, a weight is NaN, infinite or above `max_abs`, or
        importance is NaN, infinite or negative.
        """
        out = np.empty((x.shape[0], self.row_bytes(x.shape[1])), np.uint8)
        h = None if importance is None else _tensor(importance)
        if kernels is None:  # of single numbers there is nothing to compile
            kernels = for_cpu(self.name, x.size) if self.block_size > 1 else TORCH
        with torch.no_grad():
            self._encode(_tensor(x), h, torch.from_numpy(out), _CPU_PIECE, kernels)
        return out

    def encode_torch(self, x: Tensor, importance: Tensor | None = None) -> Tensor:
        """`encode` in torch, on x's device: float [rows, cols] -> uint8 [rows, bytes], the same bytes."""
        out = torch.empty((x.shape[0], self.row_bytes(x.shape[1])), dtype=torch.uint8, device=x.device)
        with torch.no_grad():
            self._encode(x, importance, out, _DEVICE_PIECE, TORCH)
        return out

    def decode(self, data: ByteArray) -> FloatArray:
        """Decode [rows, bytes] to float32 [rows, cols]."""
        rows, nbytes = data.shape
        out = np.empty((rows, nbytes // self.block_bytes * self.block_size), np.float32)
        step = max(1, _CPU_PIECE // max(1, out.shape[1]))
        for start in range(0, rows, step):
            piece = _tensor(data[start : start + step]).view(-1, self.block_bytes)
            out[start : start + step] = self.from_bytes(piece).view(-1, out.shape[1]).numpy()
        return out

    def error_bound(self, x: FloatArray, *, guided: bool = False) -> FloatArray:
        """The largest permitted |decoded - x| of each block of x [rows, cols]: [blocks, 1]. guided: by importance."""
        largest = np.abs(x.reshape(-1, self.block_size)).max(1, keepdims=True)
        share = self.guided if guided else self.relative
        bound: FloatArray = largest * np.float32(share) + np.float32(self.absolute)
        return bound

    def _encode(self, x: Tensor, importance: Tensor | None, out: Tensor, weights: int, kernels: Kernels) -> None:
        rows, cols = x.shape
        if cols % self.block_size:
            raise WhetError(
                f"{self.name} stores rows in blocks of {self.block_size} weights; this tensor's rows have {cols}",
                fix=f"choose a type with smaller blocks, or pad the rows to a multiple of {self.block_size}",
            )
        h = None if importance is None else _checked(importance, cols).view(-1, self.block_size)
        step = max(1, weights // max(1, cols))
        for start in range(0, rows, step):
            piece = x[start : start + step].to(torch.float32).contiguous()
            if piece.numel():
                self._check(kernels.largest(piece))
            encoded = self.to_bytes(piece.view(-1, self.block_size), h, kernels)
            _copy(encoded.view(-1, out.shape[1]), out[start : start + step])

    def _check(self, largest: float) -> None:
        if not largest <= self.max_abs:  # NaN compares false
            raise WhetError(
                f"a weight of magnitude {largest:g} does not fit {self.name}, which holds up to {self.max_abs:g}",
                fix="check the weights for NaN or overflow; f32 or bf16 hold every finite weight",
            )


def _copy(encoded: Tensor, out: Tensor) -> None:
    if out.device.type == "cpu":  # torch would wake its own threads, and encoders run on threads already
        np.copyto(out.numpy(), encoded.numpy())
    else:
        out.copy_(encoded)


def _tensor(array: NDArray[np.generic]) -> Tensor:
    """The array as a tensor: its memory where torch may have it, a copy where it is read-only or not contiguous."""
    array = np.ascontiguousarray(array)
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _checked(importance: Tensor, cols: int) -> Tensor:
    h = importance.to(torch.float32).contiguous()
    if h.shape != (cols,):
        raise WhetError(
            f"importance has shape {list(h.shape)}, and the tensor's rows have {cols} weights",
            fix="measure the importance matrix on this model",
        )
    if not bool((torch.isfinite(h) & (h >= 0)).all()):
        raise WhetError(
            "importance holds a number that is negative or not finite",
            fix="measure the importance matrix again; a mean of squares is neither",
        )
    return h
