"""The weights of a model's folder in strips, as they lie there or as a training that quantized them saw them."""

from __future__ import annotations

from typing import Any

import bitsandbytes.functional as bnb
import torch
from torch import Tensor
from transformers import PretrainedConfig

from whet.errors import WhetError
from whet.export import merge_nf4
from whet.export.merge_files import TensorFiles
from whet.export.merge_layout import Layout

HELD = ("nf4", "int8")


class Base:
    """A model's folder. Floats come in fp32, on `device`; weights in bitsandbytes' 4 or 8 bits are dequantized.

    names: of the weights, in the files' order. held, computed: see `merge_folders`.
    Host memory: half a byte a weight of the largest layer where it is in 4 bits, else a strip.
    """

    def __init__(
        self,
        files: TensorFiles,
        config: PretrainedConfig,
        layout: Layout,
        held: str | None,
        computed: torch.dtype,
        device: torch.device,
    ):
        self.layout, self.device = layout, device
        self._files, self._held, self._computed = files, held, computed
        self._matrix: tuple[str, merge_nf4.Quantized] | None = None
        stored = _stored_as(config, files)
        if held is not None and held not in HELD:
            raise WhetError(f"unknown holding {held!r}", where="held", fix=f"use one of {', '.join(HELD)}, or None")
        if held is not None and stored:
            what = f"the base is in {stored} bits already, so training saw those"
            raise WhetError(what, where=f"held={held!r}", fix="leave held out")
        self._four = {name for name in files if merge_nf4.held_in_4bit(files, name)}
        self._eight = {name for name in files if _scales_of(name) in files and files.part(name).dtype == torch.int8}
        self.names = [name for name in files if not self._is_state(name)]
        quantized = [name for name in self.names if not self._is_read(name)]
        if quantized:
            dtype = files.part(quantized[0]).dtype
            raise WhetError(
                f"{quantized[0]} is held as {dtype}, which is not dequantized here",
                where=str(files.folder),
                fix="give the folder of the model it was quantized from",
            )

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self._four:
            return merge_nf4.stored_shape(self._files, name)
        return self._files.part(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """fp32 for what is dequantized."""
        return torch.float32 if name in self._four | self._eight else self._files.part(name).dtype

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """A strip: floats in fp32, the rest as it is."""
        if name in self._four or self._trained_in("nf4", name):
            return self._four_bits(name).rows(start, stop).float()
        found = self._as_stored(name, start, stop)
        if name in self._eight:
            scales = self._files.rows(_scales_of(name), start, stop).to(self.device)
            found = bnb.int8_vectorwise_dequant(found, scales)
        elif self._trained_in("int8", name):
            codes, scales, _ = bnb.int8_vectorwise_quant(found.to(self._computed).half())
            found = bnb.int8_vectorwise_dequant(codes, scales)
        return found.float() if found.is_floating_point() else found

    def _as_stored(self, name: str, start: int, stop: int) -> Tensor:
        return self._files.rows(name, start, stop).to(self.device)

    def _trained_in(self, held: str, name: str) -> bool:
        return self._held == held and name.removesuffix(".weight") in self.layout.linear and name.endswith(".weight")

    def _four_bits(self, name: str) -> merge_nf4.Quantized:
        """The matrix in 4 bits: the one that was asked for last stays."""
        if self._matrix is None or self._matrix[0] != name:
            self._matrix = None
            if name in self._four:
                matrix = merge_nf4.stored(self._files, name, self.device)
            else:
                matrix = merge_nf4.quantize(
                    self.shape(name), lambda start, stop: self._as_stored(name, start, stop), self._computed
                )
            self._matrix = (name, matrix)
        return self._matrix[1]

    def _is_state(self, name: str) -> bool:
        """Whether a tensor is not a weight but belongs to a quantized one."""
        weight = name.partition(".weight.")[0] + ".weight"
        if weight != name and weight in self._four:
            return True
        return name.endswith((".SCB", ".weight_format")) and name.rpartition(".")[0] + ".weight" in self._eight

    def _is_read(self, name: str) -> bool:
        dtype = self._files.part(name).dtype
        floats = dtype.is_floating_point and dtype.itemsize > 1
        return floats or name in self._four | self._eight or name not in self.layout.shapes


def _scales_of(weight: str) -> str:
    """Where bitsandbytes keeps the scales of a weight in 8 bits."""
    return weight.removesuffix(".weight") + ".SCB"


def _stored_as(config: PretrainedConfig, files: TensorFiles) -> int | None:
    """In how many bits bitsandbytes holds the folder's weights. Raises WhetError for other ways to quantize."""
    found: Any = getattr(config, "quantization_config", None)
    if not found:
        return None
    settings = found if isinstance(found, dict) else found.to_dict()
    if settings.get("quant_method") != "bitsandbytes" and not settings.get("load_in_4bit"):
        what = f"the base is quantized by {settings.get('quant_method')}, which is not undone here"
        raise WhetError(what, where=str(files.folder), fix="give the folder of the model it was quantized from")
    return 4 if settings.get("load_in_4bit") else 8
