"""Safetensors files read and written a strip of rows at a time, so that no whole tensor need be in memory.

The safetensors library reads through a memory map, whose pages count as the process's own, and writes a shard from
tensors that are all in memory at once. Here rows are read into a buffer of their own, and a shard's header is written
first, from shapes that are known beforehand, so that strips go straight to their place.

Format: 8 bytes, the header's length N, little-endian; N bytes of JSON, name -> {dtype, shape, data_offsets}; the data.
Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch
from accelerate.utils.modeling import convert_file_size_to_int  # type: ignore[import-untyped]
from torch import Tensor

from whet.errors import WhetError
from whet.export.json_files import read_json

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LONGEST_HEADER = 100_000_000  # bytes; the safetensors library's own limit
STRIP = 8 << 20  # elements read, computed and written at once: 32 MiB of fp32


@dataclass(frozen=True)
class Part:
    """A tensor as a file holds it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Of one step along the first axis; of all of it where there is no axis."""
        return self.dtype.itemsize * math.prod(self.shape[1:])

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


@dataclass(frozen=True)
class Place:
    """A tensor of a file, and the byte at which its data starts there."""

    path: Path
    part: Part
    start: int


class TensorFiles:
    """The tensors of a folder's `STEM.safetensors`, or of the shards that `STEM.safetensors.index.json` lists.

    Raises WhetError where a file is missing, cut short or not safetensors, or a shard lacks what the index promises.
    """

    def __init__(self, folder: Path, stem: str = "model"):
        self.folder = folder
        self.places: dict[str, Place] = {}
        index = folder / f"{stem}.safetensors.index.json"
        if (folder / f"{stem}.safetensors").is_file():
            self.places = places_in(folder / f"{stem}.safetensors")
        elif index.is_file():
            self._read_shards(index)
        else:
            raise WhetError(
                f"there is no {stem}.safetensors here, nor an index of shards",
                where=str(folder),
                fix="save it with save_pretrained; pickle checkpoints (.bin, .pt) are not read",
            )

    def _read_shards(self, index: Path) -> None:
        listed: dict[str, str] = read_json(index).get("weight_map", {})
        for shard in dict.fromkeys(listed.values()):
            if Path(shard).name != shard:
                raise WhetError(f"{shard!r} is not the name of a file here", where=str(index), fix="copy it again")
            self.places |= places_in(self.folder / shard)
        for name, shard in listed.items():
            if name not in self.places:
                fix = "copy the shards and the index again, from one source"
                raise WhetError(f"{name} is listed but not held", where=str(self.folder / shard), fix=fix)

    def __contains__(self, name: str) -> bool:
        return name in self.places

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def part(self, name: str) -> Part:
        return self.places[name].part

    def read(self, name: str) -> Tensor:
        """All of a tensor, as the file holds it."""
        return self.rows(name, 0, first_axis(self.part(name).shape))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of a tensor (elements, where it has one axis), as the file holds them."""
        place = self.places[name]
        part = place.part
        buffer = torch.empty((stop - start) * part.row_bytes, dtype=torch.uint8)
        with open(place.path, "rb", buffering=0) as file:
            file.seek(place.start + start * part.row_bytes)
            _fill(file, buffer.numpy().data, place.path)
        return buffer.view(part.dtype).reshape((stop - start, *part.shape[1:]) if part.shape else ())


def first_axis(shape: Sequence[int]) -> int:
    """How many rows there are; one where there is no axis."""
    return shape[0] if shape else 1


def strips(shape: Sequence[int], multiple: int = 1) -> Iterator[tuple[int, int]]:
    """(start, stop) of runs of rows of about STRIP elements, in order; all but the last a multiple of `multiple`."""
    total, width = first_axis(shape), math.prod(shape[1:])
    rows = max(1, STRIP // max(1, width))
    rows = -(-rows // multiple) * multiple
    for start in range(0, total, rows):
        yield start, min(start + rows, total)


def places_in(path: Path) -> dict[str, Place]:
    """Every tensor of a file, in the order of its data."""
    broken = "copy the file again from its source"
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if length > min(size, LONGEST_HEADER):
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
            places = [_place(path, name, entry, 8 + length) for name, entry in header.items() if name != "__metadata__"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WhetError(f"is no safetensors file: {error}", where=str(path), fix=broken) from error
    end = max((place.start + place.part.nbytes for place in places), default=8 + length)
    if end != size:
        what = f"its tensors take {end} bytes, the file has {size}"
        raise WhetError(f"the file is cut short: {what}" if end > size else what, where=str(path), fix=broken)
    return {place.part.name: place for place in sorted(places, key=lambda place: place.start)}


def _place(path: Path, name: str, entry: dict[str, Any], data: int) -> Place:
    start, stop = entry["data_offsets"]
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"{name} is of dtype {entry['dtype']}, which is not read")
    part = Part(name, DTYPES[entry["dtype"]], tuple(int(n) for n in entry["shape"]))
    if min(part.shape, default=0) < 0 or start < 0 or stop - start != part.nbytes:
        raise ValueError(f"the header's offsets of {name} are not those of its shape")
    return Place(path, part, data + start)


def _fill(file: Any, view: memoryview, path: Path) -> None:
    """Read until `view` is full: one call gives 2 GiB at most."""
    while view:
        count = file.readinto(view)
        if not count:
            raise WhetError("the file ended while it was read", where=str(path), fix="leave it alone during an export")
        view = view[count:]


@dataclass
class _Shard:
    parts: list[Part] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


class ShardWriter:
    """Writes tensors whose names, dtypes and shapes are known to `model.safetensors`, or to shards and an index.

    Use as a context manager. `write` puts rows in their place, in any order; leaving raises AssertionError unless each
    byte was written once.

    groups: parts that belong together, such as a quantized weight and its scales, go to one shard.
    limit: bytes of a shard's data, or "5GB"; a group that is larger has a shard of its own.
    """

    def __init__(self, folder: Path, groups: Sequence[Sequence[Part]], limit: int | str = "5GB"):
        self.folder = folder
        self._shards = _shards(groups, _limit(limit))
        self._places: dict[str, tuple[IO[bytes], Part, int]] = {}
        self._left: dict[str, int] = {}
        self._stack = ExitStack()

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(shard.nbytes for shard in self._shards)

    def __enter__(self) -> ShardWriter:
        count = len(self._shards)
        with ExitStack() as stack:
            names: dict[str, str] = {}
            for number, shard in enumerate(self._shards, 1):
                single = count == 1
                name = "model.safetensors" if single else f"model-{number:05}-of-{count:05}.safetensors"
                self._open(stack.enter_context(open(self.folder / name, "wb", buffering=0)), shard)
                names |= {part.name: name for part in shard.parts}
            if count > 1:
                index = {"metadata": {"total_size": self.nbytes}, "weight_map": dict(sorted(names.items()))}
                text = json.dumps(index, indent=2) + "\n"
                (self.folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            unwritten = [name for name, left in self._left.items() if left]
            for file in {id(file): file for file, _, _ in self._places.values()}.values():
                os.fsync(file.fileno())
        self._stack.close()
        if error is None:
            assert not unwritten, f"{unwritten[0]} was not written whole"

    def write(self, name: str, rows: Tensor, start: int = 0) -> None:
        """Put `rows`, a strip of the tensor `name`, in its place, row `start` first."""
        file, part, offset = self._places[name]
        expected = rows.shape[0] if part.shape else 1
        assert rows.dtype == part.dtype, name
        assert start + expected <= first_axis(part.shape), name
        data = rows.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
        assert len(data) == expected * part.row_bytes, name
        self._left[name] -= len(data)
        file.seek(offset + start * part.row_bytes)
        while data:
            data = data[file.write(data) :]

    def _open(self, file: IO[bytes], shard: _Shard) -> None:
        """Write the header, and note where each tensor's data will lie: the widest elements first, aligned so."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for part in sorted(shard.parts, key=lambda part: -part.dtype.itemsize):
            offsets = [end, end + part.nbytes]
            header[part.name] = {"dtype": NAMES[part.dtype], "shape": list(part.shape), "data_offsets": offsets}
            self._places[part.name] = (file, part, end)
            self._left[part.name] = part.nbytes
            end += part.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file.write(len(text).to_bytes(8, "little") + text)
        for part in shard.parts:
            self._places[part.name] = (file, part, self._places[part.name][2] + 8 + len(text))


def _shards(groups: Sequence[Sequence[Part]], limit: int) -> list[_Shard]:
    shards = [_Shard()]
    for group in groups:
        if shards[-1].parts and shards[-1].nbytes + sum(part.nbytes for part in group) > limit:
            shards.append(_Shard())
        shards[-1].parts.extend(group)
    return shards


def _limit(limit: int | str) -> int:
    try:
        found = int(convert_file_size_to_int(limit))
    except ValueError:
        found = 0
    if found < 1:
        raise WhetError(f"{limit!r} is not a size", where="max_shard_size", fix='max_shard_size="5GB"')
    return found
