"""The importance matrix: how strongly each column of each matrix is used, measured on calibration text.

    importance_j = mean over tokens of x_j^2,    x [cols] what the matrix is multiplied with

An error in column j of a weight is multiplied with x_j, so quantizers weigh their squared errors by it. Kept in
llama.cpp's file format (its `llama-imatrix`): GGUF with `NAME.in_sum2` [1, cols] and `NAME.counts` [1, 1] for each
tensor. The older binary format, in which many published matrices are, is read too.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from whet.errors import WhetError
from whet.export.gguf_architectures import SourceTensor
from whet.files import whole_file

FloatArray = NDArray[np.float32]
# The key by which llama.cpp tells that a matrix guided a file's rounding.
IMATRIX_ENTRIES = "quantize.imatrix.entries_count"
_MEASURE_AGAIN = "measure the matrix on this model: whet.export.imatrix_measure.measure_imatrix"


@dataclass(frozen=True)
class Imatrix:
    """sums: GGUF tensor name -> sum of x^2 over the tokens, float32 [cols]. counts: tensor name -> tokens.
    chunks: texts of `chunk_size` tokens that were read. datasets: names of what they came from."""

    sums: dict[str, FloatArray]
    counts: dict[str, int]
    chunks: int
    chunk_size: int
    datasets: list[str] = field(default_factory=list)

    def importance(self, name: str) -> FloatArray | None:
        """Mean of x^2, [cols], for a tensor; None for one that was not measured."""
        if name not in self.sums:
            return None
        mean: FloatArray = self.sums[name] / np.float32(self.counts[name])
        return mean

    def check_fits(self, tensors: Iterable[SourceTensor]) -> None:
        """Raise WhetError unless the matrix can be of the model with these tensors."""
        cols = {tensor.name: tensor.shape[-1] for tensor in tensors if len(tensor.shape) == 2}
        for name, sums in self.sums.items():
            if name not in cols:
                raise WhetError(f"it has the tensor {name}, and the model has not", where="imatrix", fix=_MEASURE_AGAIN)
            if cols[name] != sums.size:
                what = f"{name} has {sums.size} columns in it, and {cols[name]} in the model"
                raise WhetError(what, where="imatrix", fix=_MEASURE_AGAIN)

    def add_metadata(self, writer: gguf.GGUFWriter) -> None:
        """What llama.cpp's quantizer notes in a file about the matrix that guided it."""
        if self.datasets:
            writer.add_string("quantize.imatrix.dataset", ", ".join(self.datasets))
        writer.add_uint32(IMATRIX_ENTRIES, len(self.sums))
        writer.add_uint32("quantize.imatrix.chunks_count", self.chunks)

    def save(self, path: Path) -> None:
        """Write llama.cpp's GGUF form."""
        with whole_file(path) as partial:
            writer = gguf.GGUFWriter(partial, "")
            writer.add_type(gguf.GGUFType.IMATRIX)
            writer.add_array(gguf.Keys.IMatrix.DATASETS, self.datasets or ["unnamed"])
            writer.add_uint32(gguf.Keys.IMatrix.CHUNK_COUNT, self.chunks)
            writer.add_uint32(gguf.Keys.IMatrix.CHUNK_SIZE, self.chunk_size)
            for name in sorted(self.sums):
                writer.add_tensor(f"{name}.in_sum2", self.sums[name][None])
                writer.add_tensor(f"{name}.counts", np.array([[self.counts[name]]], dtype=np.float32))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()


def read_imatrix(path: Path) -> Imatrix:
    """Read a matrix in llama.cpp's GGUF form or its older binary form.

    Raises WhetError where the file is missing, is neither, is cut short, or holds numbers no square can be.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
        imatrix = _read_gguf(path) if magic == b"GGUF" else _read_legacy(path.read_bytes())
    except FileNotFoundError:
        raise WhetError("the file is missing", where=str(path), fix="measure_imatrix(...).save(path)") from None
    except (ValueError, KeyError, IndexError, struct.error) as error:  # what broken files make of the readers
        raise WhetError(
            f"this is no importance matrix: {error}", where=str(path), fix="give a file of llama-imatrix or of whet"
        ) from error
    for name, sums in imatrix.sums.items():
        if imatrix.counts[name] <= 0 or not np.isfinite(sums).all() or (sums < 0).any():
            raise WhetError(
                f"{name} holds what no sum of squares can be, or was measured on nothing",
                where=str(path),
                fix="measure it again",
            )
    return imatrix


def _read_gguf(path: Path) -> Imatrix:
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    names = [name.removesuffix(".in_sum2") for name in tensors if name.endswith(".in_sum2")]
    if not names:
        raise ValueError("it has no sums of squares")
    value = {name: field.contents() for name, field in reader.fields.items()}
    return Imatrix(
        sums={name: np.array(tensors[f"{name}.in_sum2"], dtype=np.float32).ravel() for name in names},
        counts={name: int(tensors[f"{name}.counts"].ravel()[0]) for name in names},
        chunks=int(value.get(gguf.Keys.IMatrix.CHUNK_COUNT, 0)),
        chunk_size=int(value.get(gguf.Keys.IMatrix.CHUNK_SIZE, 0)),
        datasets=list(value.get(gguf.Keys.IMatrix.DATASETS, [])),
    )


def _read_legacy(data: bytes) -> Imatrix:
    """Little-endian: entries; of each the name's length, name, calls, values, the values; then chunks, dataset's name.

    A value is a call's mean square, summed over the calls.
    """
    (entries,), at = struct.unpack_from("<i", data), 4
    if entries < 1:
        raise ValueError("it has no entries")
    sums: dict[str, FloatArray] = {}
    counts: dict[str, int] = {}
    for _ in range(entries):
        name, at = _legacy_text(data, at)
        calls, values = struct.unpack_from("<ii", data, at)
        at += 8
        if values < 1:
            raise ValueError(f"{name} has {values} columns")
        sums[name] = np.frombuffer(data, "<f4", values, at).astype(np.float32)
        counts[name] = calls
        at += 4 * values
    chunks, dataset = 0, ""
    if at < len(data):  # the first files ended here
        (chunks,) = struct.unpack_from("<i", data, at)
        dataset, at = _legacy_text(data, at + 4)
    return Imatrix(sums, counts, chunks, 0, [dataset] if dataset else [])


def _legacy_text(data: bytes, at: int) -> tuple[str, int]:
    """A text behind its length, and where what follows begins."""
    (length,) = struct.unpack_from("<i", data, at)
    if not 0 <= length <= len(data) - at - 4:
        raise ValueError(f"a name of {length} bytes does not fit the file")
    return data[at + 4 : at + 4 + length].decode("utf-8"), at + 4 + length
