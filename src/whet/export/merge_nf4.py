"""NF4 with double quantization, in bitsandbytes' layout and by its kernels, a strip of rows at a time.

    w[i] = code[q[i]] * a[i / 64],    a[j] = map[s[j]] * b[j / 256] + mean(a)

q are 4 bits, two in a byte; s one byte. a's own quantization needs all of a first, a 64th of the weights in number, so
what is held of a matrix while it is quantized is half a byte a weight. Source: Dettmers et al. 2023, arXiv:2305.14314.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import bitsandbytes.functional as bnb
import torch
from torch import Tensor

from whet.errors import WhetError
from whet.export.merge_files import Part, ShardWriter, TensorFiles, strips

BLOCK = 64  # weights that share an a
NESTED_BLOCK = 256  # of a that share a b
STATE = "quant_state.bitsandbytes__nf4"  # JSON in bytes, padded by blanks so that its length is known beforehand
STATE_BYTES = 256

Rows = Callable[[int, int], Tensor]


@dataclass(frozen=True)
class Quantized:
    """A matrix in 4 bits. packed: uint8 [n / 2]; absmax: fp32 [n / block], as its own quantization left it."""

    packed: Tensor
    absmax: Tensor
    state: bnb.QuantState

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows as the forward pass sees them, in the dtype it computes in."""
        width, block = math.prod(self.state.shape[1:]), self.state.blocksize
        first = start * width // block
        last = -(-stop * width // block)
        begin, end = first * block, min(last * block, self.state.shape.numel())
        state = bnb.QuantState(
            absmax=self.absmax[first:last], shape=torch.Size([end - begin]), code=self.state.code, blocksize=block,
            quant_type=self.state.quant_type, dtype=self.state.dtype,
        )  # fmt: skip
        found = bnb.dequantize_4bit(self.packed[begin // 2 : -(-end // 2), None], state)
        return found[start * width - begin : stop * width - begin].view(stop - start, *self.state.shape[1:])


def quantize(shape: tuple[int, ...], rows: Rows, dtype: torch.dtype) -> Quantized:
    """The matrix that `rows` gives strips of, rounded to `dtype` first, as a model that loads in 4 bits holds it."""
    multiple = BLOCK // math.gcd(BLOCK, math.prod(shape[1:]))  # rows that end where a block ends
    parts = [_quantize_strip(rows(start, stop).to(dtype)) for start, stop in strips(shape, multiple)]
    absmax = torch.cat([part[1] for part in parts])
    offset = absmax.mean()
    nested, nested_state = bnb.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK)
    code = bnb.get_4bit_type("nf4", device=absmax.device)
    state = bnb.QuantState(
        absmax=nested, shape=torch.Size(shape), code=code, blocksize=BLOCK, quant_type="nf4", dtype=dtype,
        offset=offset, state2=nested_state,
    )  # fmt: skip
    return Quantized(torch.cat([part[0] for part in parts]), _dequantize_absmax(state), state)


def _quantize_strip(strip: Tensor) -> tuple[Tensor, Tensor]:
    packed, state = bnb.quantize_4bit(strip.contiguous(), blocksize=BLOCK, quant_type="nf4")
    return packed.flatten(), state.absmax


def _dequantize_absmax(state: bnb.QuantState) -> Tensor:
    if state.state2 is None:
        scales: Tensor = state.absmax
    else:
        scales = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    return scales.float()


def held_in_4bit(files: TensorFiles, name: str) -> bool:
    return any(f"{name}.quant_state.bitsandbytes__{kind}" in files for kind in ("nf4", "fp4"))


def stored_shape(files: TensorFiles, name: str) -> tuple[int, ...]:
    """Of the matrix that a file holds in 4 bits under `name`."""
    return tuple(_stored_state(files, name)["shape"])


def stored(files: TensorFiles, name: str, device: torch.device) -> Quantized:
    """The matrix that a file holds in 4 bits under `name`, onto `device`."""
    held = {key.removeprefix(f"{name}."): files.read(key) for key in files if key.startswith(f"{name}.")}
    state = bnb.QuantState.from_dict(held, device=device)
    return Quantized(files.read(name).flatten().to(device), _dequantize_absmax(state), state)


def _stored_state(files: TensorFiles, name: str) -> dict[str, Any]:
    kind = next(kind for kind in ("nf4", "fp4") if f"{name}.quant_state.bitsandbytes__{kind}" in files)
    try:
        found: dict[str, Any] = json.loads(bytes(files.read(f"{name}.quant_state.bitsandbytes__{kind}").numpy()))
    except ValueError as error:
        what = f"the 4-bit state of {name} is no JSON: {error}"
        raise WhetError(what, where=str(files.folder), fix="copy the model again from its source") from error
    return found


def parts(name: str, shape: tuple[int, ...]) -> list[Part]:
    """What `write` puts into the files for a matrix of `shape`."""
    count = math.prod(shape)
    blocks = -(-count // BLOCK)
    return [
        Part(name, torch.uint8, (-(-count // 2), 1)),
        Part(f"{name}.absmax", torch.uint8, (blocks,)),
        Part(f"{name}.nested_absmax", torch.float32, (-(-blocks // NESTED_BLOCK),)),
        Part(f"{name}.nested_quant_map", torch.float32, (256,)),
        Part(f"{name}.quant_map", torch.float32, (16,)),
        Part(f"{name}.{STATE}", torch.uint8, (STATE_BYTES,)),
    ]


def write(name: str, matrix: Quantized, writer: ShardWriter) -> None:
    held = matrix.state.as_dict(packed=True)
    text = bytes(held.pop(STATE).numpy()).ljust(STATE_BYTES)
    assert len(text) == STATE_BYTES, text
    writer.write(name, matrix.packed[:, None])
    writer.write(f"{name}.{STATE}", torch.frombuffer(bytearray(text), dtype=torch.uint8))
    for key, value in held.items():
        writer.write(f"{name}.{key}", value)
