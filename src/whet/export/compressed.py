"""Linear layers in 8-bit floats, 8-bit or 4-bit integers, as vLLM loads them: the compressed-tensors formats.

    fp8     w = s[row] * q, q in E4M3; inputs are quantized the same way, a token at a time, when the model runs
    int8    w = s[row] * q, q in -128..127; inputs likewise
    w4a16   w = s[row, group] * q, q in -8..7, eight in 32 bits; inputs stay as they are

Schemes, layouts and packing are the compressed-tensors library's. Scales of 8 bits follow from the largest weight of a
row. Those of 4 bits are searched for the least squared error, weighted by the inputs' mean squares where they are
known: rounding from the largest weight alone loses more. None of it needs a pass over data.
Shapes: w [out, in]; s [out, 1], or [out, in / group].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from whet.errors import WhetError
from whet.export.merge_files import Part, ShardWriter, strips
from whet.export.merge_formats import Plain, Source
from whet.export.merge_layout import Layout

SCHEMES = {"fp8": "FP8_DYNAMIC", "int8": "INT8", "w4a16": "W4A16"}
FORMATS = {"fp8": "float-quantized", "int8": "int-quantized", "w4a16": "pack-quantized"}
CODES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
GROUPS = (128, 64, 32)  # inputs that share a scale: sizes that vLLM's kernels have, the smallest file first
LOWEST, HIGHEST = -8, 7
CACHED = 1 << 18  # weights searched at once on a CPU: what its cache holds
SHRINK = [1.0 - 0.025 * i for i in range(15)]  # of a group's largest weight, which is cut off where that pays


def compressed(
    to: str, layout: Layout, dtype: torch.dtype, importance: Mapping[str, Tensor] | None = None
) -> Compressed:
    """The format `to`, one of SCHEMES, for a model's linear layers; what they do not hold in `dtype`.

    importance: a layer's name -> mean squares of its inputs, [in]; weights of inputs that are large are kept better.
    Raises WhetError where compressed-tensors is not installed.
    """
    try:
        from compressed_tensors.quantization import preset_name_to_scheme  # type: ignore[import-untyped]
    except ImportError as error:
        what = f"{to} needs the compressed-tensors library"
        raise WhetError(what, where="export", fix='pip install "whet[compressed]"') from error
    scheme = preset_name_to_scheme(SCHEMES[to], ["Linear"])
    scheme.format = FORMATS[to]
    unfit: dict[str, str] = {}
    if to == "w4a16":
        widths = {width for _, width in layout.linear.values()}
        group = next((g for g in GROUPS if all(width % g == 0 for width in widths)), GROUPS[-1])
        scheme.weights.group_size = group
        unfit = {
            name: f"its {width} inputs are no multiple of {group}"
            for name, (_, width) in layout.linear.items()
            if width % group
        }
    linear = frozenset(layout.linear) - unfit.keys()
    if not linear:
        raise WhetError(f"no linear layer of this model can be held as {to}", where="export", fix="choose fp8 or int8")
    return Compressed(to, scheme, dtype, linear, (*layout.kept, *unfit), unfit, dict(importance or {}))


@dataclass(frozen=True)
class Compressed:
    """Weights of `linear` quantized by `scheme`, the rest in `dtype`. A `Format`.

    kept: linear layers that stay in `dtype`. unfit: those of them that the scheme cannot hold, and why.
    """

    to: str
    scheme: Any
    dtype: torch.dtype
    linear: frozenset[str]
    kept: tuple[str, ...]
    unfit: dict[str, str]
    importance: dict[str, Tensor] = field(default_factory=dict)

    def parts(self, name: str, source: Source) -> list[Part]:
        module = name.removesuffix(".weight")
        if module not in self.linear:
            return Plain(self.dtype).parts(name, source)
        rows, columns = source.shape(name)
        if self.to != "w4a16":
            return [Part(name, CODES[self.to], (rows, columns)), Part(f"{name}_scale", self.dtype, (rows, 1))]
        return [
            Part(f"{name}_packed", torch.int32, (rows, columns // 8)),
            Part(f"{name}_scale", self.dtype, (rows, columns // self.scheme.weights.group_size)),
            Part(f"{name}_shape", torch.int64, (2,)),
        ]

    def write(self, name: str, source: Source, writer: ShardWriter) -> None:
        module = name.removesuffix(".weight")
        if module not in self.linear:
            return Plain(self.dtype).write(name, source, writer)
        shape = source.shape(name)
        for start, stop in strips(shape):
            rows = source.rows(name, start, stop)
            if not rows.isfinite().all():
                fix = "export an earlier checkpoint, or copy the base again from its source"
                raise WhetError(f"{name} holds numbers that are not finite", where="export", fix=fix)
            for key, value in self.compress(rows, self.importance.get(module)).items():
                if key != "weight_shape":
                    writer.write(f"{module}.{key}", value, start)
        if self.to == "w4a16":
            writer.write(f"{name}_shape", torch.tensor(shape))

    def compress(self, rows: Tensor, importance: Tensor | None = None) -> dict[str, Tensor]:
        """Codes and scales of rows [n, in], by compressed-tensors' names."""
        from compressed_tensors.compressors import BaseCompressor  # type: ignore[import-untyped]

        compressor = BaseCompressor.get_value_from_registry(self.scheme.format)
        scale = self._scale(rows, importance)
        held: dict[str, Tensor] = compressor.compress({"weight": rows, "weight_scale": scale}, self.scheme)
        return held

    def decoded(self, name: str, rows: Tensor) -> Tensor:
        """Rows [n, in] of the layer `name` as they come back from their codes, fp32."""
        from compressed_tensors.compressors import BaseCompressor

        if name not in self.linear:
            return rows.to(self.dtype).float()
        held = self.compress(rows.to(self.dtype).float(), self.importance.get(name))
        compressor = BaseCompressor.get_value_from_registry(self.scheme.format)
        weight: Tensor = compressor.decompress(held, self.scheme)["weight"]
        return weight.float()

    def _scale(self, rows: Tensor, importance: Tensor | None) -> Tensor:
        from compressed_tensors.quantization.utils import calculate_qparams  # type: ignore[import-untyped]

        if self.to == "w4a16":
            return search_scales(rows, self.scheme.weights.group_size, self.dtype, importance)
        low, high = rows.aminmax(dim=1, keepdim=True)
        scale: Tensor = calculate_qparams(low, high, self.scheme.weights)[0]
        return scale.to(self.dtype)

    def quantization(self) -> dict[str, Any] | None:
        from compressed_tensors.quantization import QuantizationConfig

        config = QuantizationConfig(
            config_groups={"group_0": self.scheme},
            format=self.scheme.format,
            quantization_status="compressed",
            ignore=list(self.kept),
        )
        fields: dict[str, Any] = config.model_dump(mode="json")
        return {"version": metadata.version("compressed-tensors")} | fields


def search_scales(rows: Tensor, group: int, dtype: torch.dtype, importance: Tensor | None = None) -> Tensor:
    """Scales [n, in / group] in `dtype` for 4-bit codes of rows [n, in]: of those tried, the one of the least error.

    Tried are SHRINK times the scale that reaches the group's largest weight, and last the best scale for the codes of
    the best of them: s = <w, q> / <q, q>.
    """
    weight = None if importance is None else importance.to(rows.device).float().view(-1, group)
    few = max(1, CACHED // rows.shape[1]) if rows.device.type == "cpu" else len(rows)
    found = [_search(part.view(len(part), -1, group), dtype, weight) for part in torch.split(rows, few)]
    return torch.cat(found).to(dtype)


def _search(x: Tensor, dtype: torch.dtype, weight: Tensor | None) -> Tensor:
    """Scales [n, in / group] for x [n, in / group, group], already rounded to `dtype`."""
    largest = x.abs().amax(dim=2, keepdim=True)
    best = torch.full_like(largest, float("inf"))
    scale = torch.ones_like(largest)  # of a group of zeros
    root = None if weight is None else weight.sqrt()
    for shrink in [*SHRINK, None]:
        tried = largest * (shrink / HIGHEST) if shrink is not None else _least_squares(x, scale, weight)
        tried = tried.to(dtype).float()
        off = torch.mul(x, tried.reciprocal()).round_().clamp_(LOWEST, HIGHEST).mul_(tried).sub_(x)
        error = torch.linalg.vector_norm(off if root is None else off.mul_(root), dim=2, keepdim=True)
        better = (error < best) & (tried > 0)  # never where it is no number
        best, scale = torch.where(better, error, best), torch.where(better, tried, scale)
    return scale.squeeze(2)


def _least_squares(x: Tensor, scale: Tensor, weight: Tensor | None) -> Tensor:
    """The best scale for the codes that `scale` gives."""
    codes = (x / scale).round_().clamp_(LOWEST, HIGHEST)
    weighted = codes if weight is None else codes * weight
    return (x * weighted).sum(dim=2, keepdim=True) / (codes * weighted).sum(dim=2, keepdim=True)
