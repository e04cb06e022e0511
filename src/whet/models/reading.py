"""Reads a layer's projections off its modules, and says in words where the block can't compute what they do.

They are read again whenever PEFT or the user has done something to them in between: switched an adapter off, merged it,
trained another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from whet.kernels.nf4 import NF4Weight
from whet.models.projection import Part, Projection, Projections


@dataclass
class Reader:
    """Reads the projection of the linear modules `names` under their parents, and remembers it until one changes."""

    places: Sequence[tuple[nn.Module, str]]
    _stamp: tuple[Any, ...] | None = None
    _found: Projection | str = field(default="not read yet")
    _room: Tensor | None = None

    def read(self) -> Projection | str:
        """The projection as the modules now stand, or in words why the block can't compute it."""
        modules = [parent._modules[name] for parent, name in self.places]
        stamp = tuple(map(_state, modules))
        if stamp != self._stamp:
            self._stamp, self._found = stamp, _read_all(modules, self._room)
        return self._found

    def make_room(self) -> None:
        """Move a frozen base that is not quantized to where its adapters can lie beside it (kernels/extend.py).

        One product then applies both, as with a base that is dequantized there. The modules' parameters become views
        whose rows are not adjacent: `leave_room` undoes that. Nothing happens where there is no adapter.
        """
        found = self.read()
        if isinstance(found, str) or self._room is not None:
            return
        weights = [part.weight for part in found.parts]
        margin = found.margin(weights[0].device) if isinstance(weights[0], Tensor) else 0
        if not margin or not _movable(weights) or any(part.trained for part in found.parts):
            return
        first = weights[0]
        assert isinstance(first, Tensor)
        room = first.new_empty(found.rows + margin, found.columns + margin)
        self._forget()
        del found, weights, first  # what has moved must not be held here
        for base, place in zip(self._bases(), _places_in(room, self._bases()), strict=True):
            base.weight.data = place.copy_(base.weight.data)
        self._room = room

    def leave_room(self) -> None:
        """Lay the weights together again."""
        if self._room is None:
            return
        self._room = None
        self._forget()
        bases = self._bases()
        for base, weight in zip(bases, _together([base.weight.data for base in bases]), strict=True):
            base.weight.data = weight

    def _bases(self) -> list[nn.Module]:
        return [_base_of(parent._modules[name]) for parent, name in self.places]

    def _forget(self) -> None:
        self._stamp, self._found = None, "not read yet"


@dataclass
class LayerReader:
    """Reads a layer's projections, one reader for each."""

    readers: dict[str, Reader]
    _found: Projections | None = None

    def make_room(self) -> None:
        """Of each reader. See there."""
        self._found = None
        for reader in self.readers.values():
            reader.make_room()

    def leave_room(self) -> None:
        self._found = None
        for reader in self.readers.values():
            reader.leave_room()

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
        weight, bias = module._parameters["weight"], module._parameters["bias"]
        bias_trains = bias is not None and bias.requires_grad
        return (*own, id(weight), weight.requires_grad, weight.data_ptr(), id(bias), bias_trains)
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


def _base_of(module: Any) -> Any:
    """The linear layer under its adapters, if it has any."""
    return module.base_layer if isinstance(module, LoraLayer) else module


def _movable(weights: Sequence[Any]) -> bool:
    """Whether these are plain matrices of one dtype on one device."""
    return all(type(w) is Tensor for w in weights) and len({(w.dtype, w.device) for w in weights}) == 1


def _places_in(room: Tensor, modules: Sequence[nn.Module]) -> list[Tensor]:
    """The rows of each module's weight, under each other at the upper left of `room`."""
    ends = list(accumulate(m.out_features for m in modules))
    columns = modules[0].in_features
    return [room[end - m.out_features : end, :columns] for m, end in zip(modules, ends, strict=True)]


def _read_all(modules: Sequence[nn.Module], room: Tensor | None = None) -> Projection | str:
    parts = []
    for module in modules:
        part = _read(module)
        if isinstance(part, str):
            return part
        parts.append(part)
    bases = [_base_of(m) for m in modules]
    if room is not None:  # somebody may have put other weights in the place of those that were moved there
        places = _places_in(room, bases)
        moved = all(
            b.weight.data_ptr() == x.data_ptr() and b.weight.stride() == x.stride()
            for b, x in zip(bases, places, strict=True)
        )
        room = room if moved else None
    return Projection(tuple(parts), bases[0].in_features, room)


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
    return replace(base, down=down, up=up, scale=float(module.scaling[name]))


def _base(module: nn.Module) -> Part | str:
    if _hooked(module):
        return "hooks on a linear layer"
    weight, bias = module.weight, module.bias
    trained = tuple(p for p in (weight, bias) if p is not None and p.requires_grad)
    if isinstance(module, Linear4bit):
        if weight.quant_state is None:
            return "4-bit weights that are not quantized yet"
        try:
            return Part(NF4Weight.from_params4bit(weight), module.out_features, bias, trained)
        except ValueError as error:
            return str(error)
    if type(module) is nn.Linear and type(weight.data) is Tensor and weight.is_floating_point():
        return Part(weight.detach(), module.out_features, bias, trained)
    return f"layers of class {type(module).__name__}, weights of class {type(weight.data).__name__}"


def _hooked(module: nn.Module) -> bool:
    state = _state(module)
    return bool(state[1] or state[2])


def lay_together(modules: Sequence[nn.Module]) -> None:
    """Move the weights of linear modules that read one input next to each other, so that they are read as one.

    The modules keep their own parameters, which become views of the common memory.
    """
    if len(modules) < 2:
        return
    if all(type(m) is nn.Linear and type(m.weight.data) is Tensor for m in modules):
        dtypes = {m.weight.dtype for m in modules}
        if len(dtypes) == 1 and not any(m.weight.is_meta for m in modules):
            for module, weight in zip(modules, _together([m.weight.data for m in modules]), strict=True):
                module.weight.data = weight
        return
    if not all(isinstance(m, Linear4bit) and m.weight.quant_state is not None for m in modules):
        return
    states = [m.weight.quant_state for m in modules]
    for module, packed in zip(modules, _together([m.weight.data for m in modules]), strict=True):
        module.weight.data = packed
    for state, absmax in zip(states, _together([state.absmax for state in states]), strict=True):
        state.absmax = absmax


def _together(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of `tensors` in one piece of memory, one after another, each of its own shape."""
    flat = torch.cat([x.reshape(-1) for x in tensors])
    return [part.view(x.shape) for part, x in zip(flat.split([x.numel() for x in tensors]), tensors, strict=True)]
