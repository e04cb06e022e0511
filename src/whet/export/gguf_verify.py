"""Compare GGUF files with the Hugging Face folder they were made from, number by number."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
import torch
from numpy.typing import NDArray

from whet.errors import WhetError
from whet.export.gguf_architectures import Architecture, SourceTensor, architecture_of
from whet.export.gguf_checkpoint import Checkpoint
from whet.export.gguf_pieces import Piece, on_threads, pieces
from whet.export.gguf_plan import checked_tensors
from whet.export.imatrix import IMATRIX_ENTRIES
from whet.quant.gguf_types import TYPES, GGUFType

_BY_GGML = {kind.ggml: kind for kind in TYPES.values()}


def verify(paths: Path | Sequence[Path], model_dir: Path, device: str = "cpu") -> None:
    """Reopen GGUF files and compare them with the folder they were made from, which is read once.

    Every tensor must be there under its name, with its shape, and decode to within its type's error bound of the
    source. device: what decodes and compares. Raises WhetError that names the first tensor at fault.
    """
    model_dir = Path(model_dir)
    architecture = architecture_of(model_dir)
    checkpoint = Checkpoint(model_dir)
    tensors = checked_tensors(architecture, checkpoint)
    files = [_File(Path(path)) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    for file in files:
        file.check_factors(architecture)
        file.check_names(tensors)
    for piece in pieces(tensors, checkpoint, torch.device(device)):
        for file in files:
            file.compare(piece)


class _File:
    """A GGUF file. Rows are read when they are compared: pages of a mapped file would count as the process's memory."""

    def __init__(self, path: Path):
        self.path = path
        reader = gguf.GGUFReader(path)
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.guided = IMATRIX_ENTRIES in reader.fields

    def check_factors(self, architecture: Architecture) -> None:
        """The tensors that come from the config, and not from the checkpoint."""
        for name, factors in architecture.rope_factors().items():
            found = self.tensors.pop(name, None)
            if found is None or not np.array_equal(found.data, factors):
                raise self._mismatch(name, "is missing, or differs from config.json's rope parameters")

    def check_names(self, tensors: list[SourceTensor]) -> None:
        expected = {tensor.name: tensor for tensor in tensors}
        for name in sorted(expected.keys() ^ self.tensors.keys()):
            raise self._mismatch(name, "is in the one and not in the other")
        for name, tensor in expected.items():
            shape = tuple(int(size) for size in reversed(self.tensors[name].shape))
            if shape != tensor.shape:
                raise self._mismatch(name, f"has shape {list(shape)}, the source {list(tensor.shape)}")
            self._type(name)

    def compare(self, piece: Piece) -> None:
        """Raise WhetError unless the file's numbers for these rows lie near the source's."""
        name, kind = piece.tensor.name, self._type(piece.tensor.name)
        data = self._read(name, kind.row_bytes(piece.tensor.shape[-1]), piece.rows)
        # An importance matrix covers the layers, and lets errors grow where they count little.
        relative = kind.guided if self.guided and name.startswith("blk.") else kind.relative

        def compare_rows(rows: slice) -> None:
            x = piece.x[rows].reshape(-1, kind.block_size)
            encoded = torch.from_numpy(data[rows]).to(x.device)
            error = (kind.from_bytes(encoded.view(-1, kind.block_bytes)) - x).abs()
            if not (error <= x.abs().amax(1, keepdim=True) * relative + kind.absolute).all():
                raise self._mismatch(name, f"decodes to numbers that are off by up to {float(error.max()):g}")

        if piece.x.is_cuda:
            compare_rows(slice(None))
        else:
            on_threads(compare_rows, piece.x.shape)

    def _read(self, name: str, row_bytes: int, rows: slice) -> NDArray[np.uint8]:
        """Rows of a tensor as they are encoded, [rows, row_bytes]."""
        start = int(self.tensors[name].data_offset) + rows.start * row_bytes
        count = (rows.stop - rows.start) * row_bytes
        return np.fromfile(self.path, np.uint8, count, offset=start).reshape(-1, row_bytes)

    def _type(self, name: str) -> GGUFType:
        kind = self.tensors[name].tensor_type
        if kind not in _BY_GGML:
            raise self._mismatch(name, f"has type {kind.name}, which whet does not write")
        return _BY_GGML[kind]

    def _mismatch(self, name: str, what: str) -> WhetError:
        fix = "export again, from the folder the file was made from"
        return WhetError(f"the tensor {name} {what}", where=str(self.path), fix=fix)
