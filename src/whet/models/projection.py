"""Linear layers that read one input, with their LoRA adapters, as one matrix product.

A `Projection` is read off the modules of a model, and read again whenever PEFT or the user has done something to them
in between (switched an adapter off, merged it, trained another). What the block can't compute, `Reader` says.

Shapes: T tokens, K inputs, N outputs of all parts together, R columns for adapters and bias (see kernels/extend.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from whet.kernels import layer_weights
from whet.kernels.extend import extend
from whet.kernels.layer_weights import ProjectionWeight
from whet.kernels.nf4 import NF4Weight, dequantize_nf4, stack


@dataclass(frozen=True)
class Part:
    """One linear layer: its frozen weight, bias [n], and adapter: down [r, K], up [n, r], both None without one."""

    weight: NF4Weight | Tensor
    rows: int
    bias: Tensor | None = None
    down: nn.Parameter | None = None
    up: nn.Parameter | None = None
    scale: float = 0.0


@dataclass(frozen=True)
class Weights:
    """A weight with adapters and bias beside it, in 16 or 32 bits, and the views of it that products take.

    whole [N + R, K + R]; forward [K + R, N]; back [N + R, K]; down [K, R] is A^T; up [N, R] is s B.
    """

    whole: Tensor
    forward: Tensor
    back: Tensor
    down: Tensor
    up: Tensor


class Projection:
    """Stacked parts: y [T, N] = x [T, K] W^T + b + s (x A^T) B^T."""

    def __init__(self, parts: tuple[Part, ...], columns: int):
        self.parts, self.columns = parts, columns
        self.rows = sum(part.rows for part in parts)
        self.adapted = tuple(part for part in parts if part.down is not None)
        self.rank = sum(part.down.shape[0] for part in self.adapted)
        self.biased = any(part.bias is not None for part in parts)
        self.parameters = tuple(p for part in self.adapted for p in (part.down, part.up))
        needed = self.rank + self.biased
        # A power of two keeps rows aligned on a GPU.
        self.least_margin = 0 if needed == 0 else max(16, 1 << (needed - 1).bit_length())

    def margin(self, device: torch.device) -> int:
        """R; 0 where there is nothing to add."""
        return max(self.least_margin, 64) if self.least_margin and device.type == "cuda" else self.least_margin

    @cached_property
    def _stacked(self) -> tuple[NF4Weight | Tensor, ...]:
        """The parts' weights: one, where they lie together in memory."""
        weights = [part.weight for part in self.parts]
        if all(isinstance(w, NF4Weight) for w in weights):
            together = stack(weights)  # type: ignore[arg-type]
            if together is not None:
                return (together,)
        return tuple(weights)

    def weights(self, dtype: torch.dtype, device: torch.device) -> Weights:
        """Dequantized into a new buffer."""
        rows, columns, margin = self.rows, self.columns, self.margin(device)
        e = torch.empty(rows + margin, columns + margin, dtype=dtype, device=device)
        row = 0
        for weight in self._stacked:
            height = weight.rows if isinstance(weight, NF4Weight) else weight.shape[0]
            place = e[row : row + height, :columns]
            if isinstance(weight, NF4Weight):
                dequantize_nf4(weight, out=place)
            else:
                place.copy_(weight)
            row += height
        if margin:
            downs = [p.down.detach() if p.down is not None else e.new_empty(0, columns) for p in self.parts]
            ups = [p.up.detach() if p.up is not None else e.new_empty(p.rows, 0) for p in self.parts]
            extend(e, downs, ups, [part.scale for part in self.parts], rows, columns, self._bias(e))
        return self.views(e)

    @cached_property
    def in_one_launch(self) -> ProjectionWeight | None:
        """For kernels/layer_weights.py; None where its kernel can't lay out this projection."""
        if len(self._stacked) > 1 or not isinstance(self._stacked[0], NF4Weight) or self.biased:
            return None
        weight = self._stacked[0]
        none = torch.empty(0, device=weight.packed.device)
        downs = [p.down if p.down is not None else none.view(0, self.columns) for p in self.parts]
        ups = [p.up if p.up is not None else none.view(p.rows, 0) for p in self.parts]
        scales = [p.scale for p in self.parts]
        return ProjectionWeight(weight, downs, ups, scales, self.margin(weight.packed.device))

    def views(self, e: Tensor) -> Weights:
        """The views of a laid out weight [N + R, K + R]."""
        rows, columns = self.rows, self.columns
        return Weights(e, e[:rows].T, e[:, :columns], e[rows:, :columns].T, e[:rows, columns:])

    def _bias(self, like: Tensor) -> Tensor | None:
        if not self.biased:
            return None
        return torch.cat([part.bias if part.bias is not None else like.new_zeros(part.rows) for part in self.parts])

    def gradients(self, g_TR: Tensor, x_TK: Tensor, dy_TN: Tensor, tail_TR: Tensor) -> list[Tensor]:
        """fp32 gradients of `parameters` from one tile of tokens.

        g: dY (s B), the margin of the gradient; x: the input; dy: the gradient of the output; tail: x A^T.
        """
        if not self.adapted:
            return []
        downs = product(g_TR[:, : self.rank].T, x_TK)
        ups = product(dy_TN.T, tail_TR[:, : self.rank])
        found, row, column = [], 0, 0
        for part in self.parts:
            if part.down is not None:
                rank = part.down.shape[0]
                up = ups[row : row + part.rows, column : column + rank]
                found += [downs[column : column + rank], up if part.scale == 1 else up * part.scale]
                column += rank
            row += part.rows
        return found


class LayerWeights(NamedTuple):
    qkv: Weights
    o: Weights
    gate_up: Weights
    down: Weights


@dataclass(eq=False)
class Projections:
    """The four of a layer."""

    qkv: Projection
    o: Projection
    gate_up: Projection
    down: Projection

    def __post_init__(self) -> None:
        self.all = (self.qkv, self.o, self.gate_up, self.down)
        self.parameters = tuple(x for p in self.all for x in p.parameters)

    def weights(self, dtype: torch.dtype, device: torch.device) -> LayerWeights:
        """All four dequantized, in one launch where that can be."""
        if self._together is None:
            return LayerWeights(*(p.weights(dtype, device) for p in self.all))
        laid_out = layer_weights.layer_weights(self._together, dtype)
        return LayerWeights(*(p.views(e) for p, e in zip(self.all, laid_out, strict=True)))

    @cached_property
    def _together(self) -> layer_weights.LayerWeights | None:
        found = [p.in_one_launch for p in self.all]
        known = [x for x in found if x is not None]
        return layer_weights.LayerWeights(known) if len(known) == 4 and layer_weights.takes(known) else None


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, summed and returned in fp32 whatever the inputs are held in."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


@dataclass
class Reader:
    """Reads the projection of the linear modules `names` under their parents, and remembers it until one changes."""

    places: Sequence[tuple[nn.Module, str]]
    _stamp: tuple[Any, ...] | None = None
    _found: Projection | str = field(default="not read yet")

    def read(self) -> Projection | str:
        """The projection as the modules now stand, or in words why the block can't compute it."""
        modules = [parent._modules[name] for parent, name in self.places]
        stamp = tuple(map(_state, modules))
        if stamp != self._stamp:
            self._stamp, self._found = stamp, _read_all(modules)
        return self._found


@dataclass
class LayerReader:
    """Reads a layer's projections, one reader for each."""

    readers: dict[str, Reader]
    _found: Projections | None = None

    def read(self) -> Projections | str:
        read = []
        for reader in self.readers.values():
            found = reader.read()
            if isinstance(found, str):
                return found
            read.append(found)
        if self._found is None or any(a is not b for a, b in zip(self._found.all, read, strict=True)):
            self._found = Projections(*read)
        return self._found


def _state(module: Any) -> tuple[Any, ...]:
    """What of a linear module can change what it computes, as cheaply as it can be had: it is asked every time."""
    hooks = bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
    own = (id(module), hooks, "forward" in module.__dict__)  # accelerate's offloading puts a forward there
    if not isinstance(module, LoraLayer):
        weight = module._parameters["weight"]
        return (*own, id(weight), weight.requires_grad, weight.data_ptr())
    adapters = module._modules
    parameters = [x._parameters["weight"] for kind in ("lora_A", "lora_B") for x in adapters[kind]._modules.values()]
    return (
        *own,
        _state(adapters["base_layer"]),
        module.training,
        module._disable_adapters,
        tuple(module.active_adapters),
        tuple(module.merged_adapters),
        tuple(module.scaling.values()),
        tuple(map(id, parameters)),
    )


def _read_all(modules: Sequence[nn.Module]) -> Projection | str:
    parts = []
    for module in modules:
        part = _read(module)
        if isinstance(part, str):
            return part
        parts.append(part)
    first = modules[0]
    return Projection(tuple(parts), (first.base_layer if isinstance(first, LoraLayer) else first).in_features)


def _read(module: nn.Module) -> Part | str:
    if _hooked(module):
        return "hooks on a linear layer"
    if not isinstance(module, LoraLayer):
        return _base(module)
    base = _base(module.base_layer)
    if isinstance(base, str):
        return base
    if module.merged_adapters:
        return "an adapter that is merged in place"
    active = [name for name in module.active_adapters if name in module.lora_A]
    if module.disable_adapters or not active:
        return base
    if len(active) > 1:
        return "more than one active adapter"
    (name,) = active
    if module.lora_variant.get(name) is not None:
        return type(module.lora_variant[name]).__name__.removesuffix("LinearVariant") + " adapters"
    if module.lora_bias.get(name):
        return "a bias in the adapter"
    if module.training and not isinstance(module.lora_dropout[name], nn.Identity):
        return "LoRA dropout"
    down, up = module.lora_A[name].weight, module.lora_B[name].weight
    if not (down.is_contiguous() and up.is_contiguous()):
        return "adapter weights that are not contiguous"
    return Part(base.weight, base.rows, base.bias, down, up, float(module.scaling[name]))


def _base(module: nn.Module) -> Part | str:
    if _hooked(module):
        return "hooks on a linear layer"
    weight = module.weight
    if weight.requires_grad or (module.bias is not None and module.bias.requires_grad):
        return "a base weight that trains"
    if isinstance(module, Linear4bit):
        if weight.quant_state is None:
            return "4-bit weights that are not quantized yet"
        try:
            return Part(NF4Weight.from_params4bit(weight), module.out_features, module.bias)
        except ValueError as error:
            return str(error)
    if type(module) is nn.Linear and weight.is_floating_point():
        return Part(weight.detach(), module.out_features, module.bias)
    return f"layers of class {type(module).__name__}"


def _hooked(module: nn.Module) -> bool:
    state = _state(module)
    return bool(state[1] or state[2])


def lay_together(modules: Sequence[nn.Module]) -> None:
    """Move the NF4 bytes of linear modules that read one input next to each other, so that one launch reads them all.

    The modules keep their own parameters, which become views of the common bytes.
    """
    if len(modules) < 2 or not all(isinstance(m, Linear4bit) and m.weight.quant_state is not None for m in modules):
        return
    states = [m.weight.quant_state for m in modules]
    packed = torch.cat([m.weight.data.reshape(-1) for m in modules])
    absmax = torch.cat([state.absmax.reshape(-1) for state in states])
    for module, state, p, a in zip(
        modules,
        states,
        packed.split([m.weight.data.numel() for m in modules]),
        absmax.split([state.absmax.numel() for state in states]),
        strict=True,
    ):
        module.weight.data = p.view(module.weight.data.shape)
        state.absmax = a.view(state.absmax.shape)
