"""What a merged model's weights are written as: in floating point, or its linear layers in NF4.

`write_weights` takes any source of weights and any format through memory a strip of rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from whet.errors import WhetError
from whet.export import merge_nf4
from whet.export.merge_files import Part, ShardWriter, strips
from whet.models.load import nf4_config

FLOATS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

Track = Callable[[int, int], None]
"""Told after each tensor: bytes written so far, bytes in all."""


class Source(Protocol):
    """A model's weights by name."""

    @property
    def names(self) -> Iterable[str]:
        """Of all weights to write, in the order to write them in."""

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype:
        """As it is held; what is no float stays as it is."""

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """A strip along the first axis; floats in fp32, on the device to compute on."""


class Format(Protocol):
    """How weights are laid down in files, and what config.json says about it."""

    @property
    def dtype(self) -> torch.dtype:
        """Of what is not quantized."""

    def parts(self, name: str, source: Source) -> list[Part]:
        """The tensors that one weight becomes."""

    def write(self, name: str, source: Source, writer: ShardWriter) -> None: ...

    def quantization(self) -> dict[str, Any] | None:
        """config.json's `quantization_config`."""


def write_weights(
    source: Source, form: Format, folder: Path, max_shard_size: int | str = "5GB", track: Track | None = None
) -> int:
    """Write all of `source` into `folder` as safetensors, in shards where it is larger; the bytes of the tensors.

    Host memory: a strip of rows and its copies, about 200 MiB, and what `source` and `form` say they hold.
    """
    groups = {name: form.parts(name, source) for name in source.names}
    written = 0
    with ShardWriter(folder, list(groups.values()), max_shard_size) as writer:
        for name, parts in groups.items():
            form.write(name, source, writer)
            written += sum(part.nbytes for part in parts)
            if track:
                track(written, writer.nbytes)
    return written


@dataclass(frozen=True)
class Plain:
    """Every float in `dtype`, rounded once."""

    dtype: torch.dtype

    def parts(self, name: str, source: Source) -> list[Part]:
        held = source.dtype(name)
        return [Part(name, self.dtype if held.is_floating_point else held, source.shape(name))]

    def write(self, name: str, source: Source, writer: ShardWriter) -> None:
        held = source.dtype(name)
        for start, stop in strips(source.shape(name)):
            rows = source.rows(name, start, stop)
            writer.write(name, rounded(name, rows, self.dtype) if held.is_floating_point else rows, start)

    def quantization(self) -> dict[str, Any] | None:
        return None


@dataclass(frozen=True)
class Nf4:
    """The weights of `linear` in NF4 with double quantization, as bitsandbytes lays them down; the rest in `dtype`.

    kept: linear layers that are left, which config.json names. Host memory: half a byte a weight of the largest layer.
    """

    dtype: torch.dtype
    linear: frozenset[str]
    kept: tuple[str, ...] = ()

    def parts(self, name: str, source: Source) -> list[Part]:
        if name.removesuffix(".weight") not in self.linear:
            return Plain(self.dtype).parts(name, source)
        return merge_nf4.parts(name, source.shape(name))

    def write(self, name: str, source: Source, writer: ShardWriter) -> None:
        if name.removesuffix(".weight") not in self.linear:
            return Plain(self.dtype).write(name, source, writer)

        def rows(start: int, stop: int) -> Tensor:
            return rounded(name, source.rows(name, start, stop), self.dtype)

        merge_nf4.write(name, merge_nf4.quantize(source.shape(name), rows, self.dtype), writer)

    def quantization(self) -> dict[str, Any] | None:
        config: dict[str, Any] = nf4_config(self.dtype).to_dict()
        return config | {"llm_int8_skip_modules": list(self.kept)}


def alike(source: Source, a: str, b: str) -> bool:
    """Whether two weights have the same values."""
    return source.shape(a) == source.shape(b) and all(
        torch.equal(source.rows(a, *strip), source.rows(b, *strip)) for strip in strips(source.shape(a))
    )


def rounded(name: str, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """`rows` in `dtype`. Raises WhetError where a number is not finite there."""
    found = rows.to(dtype)
    if found.numel() and not torch.stack(torch.aminmax(found)).isfinite().all():
        if rows.isfinite().all():
            raise WhetError(f"{name} holds numbers too large for {dtype}", where="export", fix="export in bf16")
        fix = "export an earlier checkpoint, or copy the base again from its source"
        raise WhetError(f"{name} holds numbers that are not finite", where="export", fix=fix)
    return found
