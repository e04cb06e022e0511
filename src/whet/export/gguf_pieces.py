"""Tensors on their way into GGUF files: read in pieces of rows, so that memory holds a few of them whatever the model's
size, converted to what llama.cpp computes with, and encoded on the GPU or on the CPU's cores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from whet.errors import WhetError
from whet.export.gguf_architectures import SourceTensor
from whet.export.gguf_checkpoint import Checkpoint
from whet.quant.gguf_types import GGUFType

# Weights a piece: 128 MiB in float32.
_PIECE = 1 << 25
# Weights a task, where a piece is worked on by several threads.
_SHARE = 1 << 20

T = TypeVar("T")


@dataclass(frozen=True)
class Piece:
    """Some rows of a tensor, converted: x [rows, cols] float32. A vector is one row. last: the tensor ends with it."""

    tensor: SourceTensor
    rows: slice
    x: Tensor
    last: bool


def pieces(tensors: list[SourceTensor], checkpoint: Checkpoint, device: torch.device) -> Iterator[Piece]:
    """Every tensor's pieces in order, each read while the one before is in use."""
    parts = ((tensor, rows) for tensor in tensors for rows in _row_slices(tensor))
    return _one_ahead(_read(tensor, rows, checkpoint, device) for tensor, rows in parts)


def _row_slices(tensor: SourceTensor) -> Iterator[slice]:
    """Slices of about _PIECE weights that cut no head, since rows change places within theirs."""
    if len(tensor.shape) == 1:
        yield slice(0, 1)
        return
    rows, cols = tensor.shape
    unit = rows // tensor.heads if tensor.heads else 1
    step = max(1, _PIECE // (cols * unit)) * unit
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _read(tensor: SourceTensor, rows: slice, checkpoint: Checkpoint, device: torch.device) -> Piece:
    if len(tensor.shape) == 1:
        x, whole = checkpoint.read(tensor.source), tensor
    else:
        x = checkpoint.read(tensor.source, rows)
        heads = tensor.heads and tensor.heads * (rows.stop - rows.start) // tensor.shape[0]
        whole = replace(tensor, heads=heads)
    converted: Tensor = whole.convert(x.to(device).float())  # type: ignore[assignment, arg-type]  # as on arrays
    last = len(tensor.shape) == 1 or rows.stop == tensor.shape[0]
    return Piece(tensor, rows, converted.reshape(-1, tensor.shape[-1]), last)


def _one_ahead(items: Iterator[T]) -> Iterator[T]:
    """The items, the next one made on a thread while this one is in use."""
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(next, items, None)
        while (item := following.result()) is not None:
            following = pool.submit(next, items, None)
            yield item


def encode(piece: Piece, kind: GGUFType, importance: Tensor | None) -> NDArray[np.uint8]:
    """The piece in a type: [rows, bytes]. importance: of each column, [cols] float32 on the piece's device.

    Raises WhetError that names the tensor where a weight does not fit the type.
    """
    try:
        if piece.x.is_cuda:
            encoded: NDArray[np.uint8] = kind.encode_torch(piece.x, importance).cpu().numpy()
            return encoded
        return _encode_on_threads(piece.x.numpy(), kind, None if importance is None else importance.numpy())
    except WhetError as error:
        raise WhetError(error.what, where=piece.tensor.source, fix=error.fix) from error


def _encode_on_threads(
    x: NDArray[np.float32], kind: GGUFType, importance: NDArray[np.float32] | None
) -> NDArray[np.uint8]:
    out = np.empty((x.shape[0], kind.row_bytes(x.shape[1])), np.uint8)

    def work(rows: slice) -> None:
        out[rows] = kind.encode(x[rows], importance)

    on_threads(work, x.shape)
    return out


def on_threads(work: Callable[[slice], None], shape: tuple[int, ...]) -> None:
    """Call `work` for slices of rows of [rows, cols], on as many threads as torch has; encoders release the GIL."""
    step = max(1, _SHARE // shape[1])
    slices = [slice(start, start + step) for start in range(0, shape[0], step)]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(work, slices))  # list: raise what a task raised
