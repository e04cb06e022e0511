"""Puts the fused block in the place of a model's decoder layers: on this one model, under the same names.

Each layer gets a class of its own, made from the class it had: what it holds, what it is an instance of and what it is
called stay as they were, so adapters, state dicts and saving go on working. Where the block can't stand in (a cache, a
mask, an adapter of another kind) the layer's own forward runs, as if nothing had been done to it.
"""

from __future__ import annotations

import inspect
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy, deepcopy
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from whet.kernels._precision import wide_dtype
from whet.kernels.attention import Documents, Rows
from whet.kernels.rms_norm import rms_norm, rms_norm_backward
from whet.models import activations, attention
from whet.models.activations import HostMemory, Policy
from whet.models.block import Block
from whet.models.families import FamilySpec, LayerShape, Norm, family, projections, read_norm, read_shape
from whet.models.projection import Projections
from whet.models.reading import LayerReader, Reader, lay_together

log = logging.getLogger("whet")

CACHES = ("past_key_values", "cache", "past_key_value", "layer_past")
TILE = 4096  # tokens: enough for a GPU's matrix products to be at their best


@dataclass
class Shared:
    """What all fused layers of a model have in common.

    policy: what each keeps for the backward pass, where `layers` does not say it layer by layer. tile: tokens that go
    through a weight at once. fp8: the base's products run in FP8. auto: whether a trainer may plan policy and tile,
    within `budget` bytes on the device. plan: the one it made, in words. held: so many layers keep their weights
    dequantized from pass to pass, while it is `holding`. room: meanwhile, a base that is not quantized lies where its
    adapters can lie beside it. in_place: a trainer runs the pass, and will find gradients of
    weights in the weights' own `grad`, wherever they were made. begins: told of each layer whose backward pass begins,
    by its number from the first. gradient: the buffer in which the layer above has
    handed one down.
    """

    config: Any
    rotary: nn.Module
    policy: Policy = activations.ALL
    layers: tuple[Policy, ...] | None = None
    tile: int = TILE
    fp8: bool = False
    auto: bool = False
    budget: float | None = None
    plan: str | None = None
    held: int = 0
    room: bool = False
    holding: bool = False
    in_place: bool = False
    begins: Callable[[int], None] | None = None
    host: HostMemory | None = None
    said: set[str] = field(default_factory=set)
    gradient: Tensor | None = None
    _positions: tuple[Tensor, int, dict[str | None, tuple[Tensor, Tensor]]] | None = field(default=None, init=False)

    def policy_of(self, layer: int) -> Policy:
        return self.policy if self.layers is None else self.layers[layer]

    def holds(self, layer: int) -> bool:
        """The topmost: their backward comes when most is kept, and needs no room for dequantizing then."""
        return self.holding and layer >= self.config.num_hidden_layers - self.held

    def tables(self, position_ids: Tensor, layer_type: str | None) -> tuple[Tensor, Tensor]:
        """cos and sin [P, d/2] in fp32 of the batch's positions, from the model's own rotary module."""
        found = self._positions
        if found is None or found[0] is not position_ids or found[1] != position_ids._version:
            found = self._positions = (position_ids, position_ids._version, {})
        kinds = found[2]
        key = layer_type if _asks_layer_type(type(self.rotary)) else None
        if key not in kinds:
            like = torch.empty(0, dtype=torch.float32, device=position_ids.device)
            with torch.autocast(position_ids.device.type, enabled=False):
                cos, sin = self.rotary(like, position_ids, *([key] if key is not None else []))
            kinds[key] = tuple(x[..., : x.shape[-1] // 2].flatten(0, 1).contiguous() for x in (cos, sin))
        return kinds[key]

    def host_memory(self, device: torch.device) -> HostMemory:
        if self.host is None:
            self.host = HostMemory(device)
        return self.host

    def settle(self) -> None:
        """At the end of a pass: nothing is handed on to another, and copies to the host have come to an end."""
        self.gradient = self._positions = None
        if self.host is not None and any(p.offload for p in self.layers or (self.policy,)):
            self.host.join()

    def forget(self) -> None:
        """Let go of everything that a pass which failed has left behind."""
        self.gradient = self._positions = self.host = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Shared:
        """The same settings for a copied model; nothing of a batch, and host memory of its own."""
        copied = copy(self)
        copied.config, copied.rotary = deepcopy(self.config, memo), deepcopy(self.rotary, memo)
        copied.said, copied.host, copied.gradient, copied._positions = set(self.said), None, None, None
        copied.begins = None
        return copied


@cache
def _asks_layer_type(rotary: type) -> bool:
    return "layer_type" in inspect.signature(rotary.forward).parameters


class FusedLayer:
    """Goes before a transformers decoder layer's class in the class of a fused layer."""

    _whet: Shared
    _whet_index: int
    _whet_shape: LayerShape
    _whet_norms: tuple[tuple[nn.Module, str, nn.Parameter], ...]
    _whet_reader: LayerReader

    # transformers sets this to have a layer run again in the backward pass. The block keeps what `Shared.policy` says,
    # so transformers is always told no, and the layer's own forward, where it runs, does what was asked for.
    @property
    def gradient_checkpointing(self) -> bool:
        return False

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        self._whet_recompute = bool(value)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        block = None if args else self._block(hidden_states, kwargs)
        if isinstance(block, Block):
            return run(block, hidden_states, self._whet, self._whet_index)
        own = partial(super().forward, **kwargs)
        if getattr(self, "_whet_recompute", False) and self.training and torch.is_grad_enabled():
            return checkpoint(own, hidden_states, *args, use_reentrant=False)
        return own(hidden_states, *args)

    def _block(self, h: Tensor, kwargs: dict[str, Any]) -> Block | str:
        """The block for this batch, or in words why there is none."""
        shared, shape = self._whet, self._whet_shape
        if kwargs.get("attention_mask") is not None or any(kwargs.get(name) is not None for name in CACHES):
            return "a mask or a cache"
        if shared.config._attn_implementation != attention.NAME:
            return "another attention was asked for"
        position_ids = kwargs.get("position_ids")
        if position_ids is None:
            return "no positions"
        if h.dtype == torch.float32 and torch.is_autocast_enabled(h.device.type):
            return self._say("32-bit weights under autocast")
        if any(parent._modules[name]._parameters.get("weight") is not w for parent, name, w in self._whet_norms):
            return self._say("norms that were replaced")
        projections = self._whet_reader.read()
        if isinstance(projections, str):
            return self._say(projections)
        documents = attention.find_documents(
            h.shape[0], h.shape[1], position_ids, kwargs.get("cu_seq_lens_q"), kwargs.get("max_length_q")
        )
        cos, sin = shared.tables(position_ids, shape.layer_type)
        layout = _layout(h, documents)
        fp8 = shared.fp8 and all(p.fp8_base is not None for p in projections.all)
        if shared.fp8 and not fp8:
            self._say("weights that are no multiple of FP8's tiles, or not NF4", "16 bits, not FP8")
        hold = shared.holds(self._whet_index)
        return Block(shape, projections, cos, sin, layout, shared.tile, fp8, shared.in_place, hold)

    def _say(self, reason: str, what: str = "generic path, not the fused block") -> str:
        """Say once a model why its layers run in another way than was asked for."""
        if reason not in self._whet.said:
            self._whet.said.add(reason)
            log.warning("%s: %s", what, reason)
        return reason


def _layout(h: Tensor, documents: Documents | None) -> Rows | Documents:
    """Documents of one length are rows, which faster kernels take."""
    if documents is None:
        return Rows(h.shape[0], h.shape[1])
    count = documents.cu_seqlens.numel() - 1
    if count * documents.longest == h.shape[0] * h.shape[1]:
        return Rows(count, documents.longest)
    return documents


def run(block: Block, hidden_states: Tensor, shared: Shared, index: int) -> Tensor:
    """The output of layer `index` [B, S, D], differentiable in the input and the adapters."""
    parameters = block.parameters
    if torch.is_grad_enabled() and (hidden_states.requires_grad or any(p.requires_grad for p in parameters)):
        return _Layer.apply(hidden_states, block, shared, index, *parameters)
    with torch.autocast(hidden_states.device.type, enabled=False), torch.no_grad():
        out, _ = block.forward(hidden_states.flatten(0, 1).contiguous(), frozenset())
    return out.view_as(hidden_states)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_states: Tensor, block: Block, shared: Shared, index: int, *parameters: Tensor
    ) -> Tensor:
        policy = shared.policy_of(index)
        h = hidden_states.flatten(0, 1).contiguous()
        with torch.autocast(h.device.type, enabled=False):
            out, saved = block.forward(h, policy.keep)
        ctx.block, ctx.shared, ctx.index, ctx.parked = block, shared, index, None
        saved = {"h": h} | saved
        if policy.offload and h.is_cuda:
            ctx.memory = shared.host_memory(h.device)
            ctx.parked = ctx.memory.park(saved)
        else:
            ctx.names = list(saved)
            ctx.save_for_backward(*saved.values())
        return out.view_as(hidden_states)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        block: Block = ctx.block
        if ctx.shared.begins is not None:
            ctx.shared.begins(ctx.index)
        if ctx.parked is not None:
            saved = ctx.memory.fetch(ctx.parked)
        else:
            saved = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        dout = grad.flatten(0, 1)
        if dout.stride(1) != 1:
            dout = dout.contiguous()
        shared, handed = ctx.shared, ctx.shared.gradient
        if handed is not None and handed.untyped_storage().data_ptr() != dout.untyped_storage().data_ptr():
            handed = None  # something between the layers made a gradient of its own
        with torch.autocast(grad.device.type, enabled=False):
            dh, gradients = block.backward(
                saved.pop("h"), dout, saved, input_grad=ctx.needs_input_grad[0], dout_e=handed
            )
        shared.gradient = dh
        given = [
            g.to(p.dtype) if needed and g is not None else None
            for g, p, needed in zip(gradients, block.parameters, ctx.needs_input_grad[4:], strict=True)
        ]
        if dh is not None:
            dh = dh[:, : grad.shape[-1]].unflatten(0, grad.shape[:-1])
        return (dh, None, None, None, *given)


class FusedNorm:
    """Goes before a transformers RMSNorm's class in the class of a fused norm: one pass each way, nothing in fp32."""

    _whet_norm: Norm
    _whet_offset: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self._whet_norm.weight is not self.weight:
            return super().forward(hidden_states)
        return _Norm.apply(hidden_states, self.weight, self._whet_norm, self._whet_offset)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, norm: Norm, offset: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.norm, ctx.offset = norm, offset
        return rms_norm(x.flatten(0, -2), weight, norm.eps, offset).view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,), weight = ctx.saved_tensors, ctx.norm.weight
        dw = torch.zeros_like(weight, dtype=wide_dtype(weight.dtype)) if ctx.needs_input_grad[1] else None
        dx = rms_norm_backward(grad.flatten(0, -2), x.flatten(0, -2), weight, ctx.norm.eps, ctx.offset, weight_grad=dw)
        return dx.view_as(x), None if dw is None else dw.to(weight.dtype), None, None


@cache
def _fused_class(mixin: type, kind: type) -> type:
    return type(f"Fused{kind.__name__}", (mixin, kind), {"__module__": kind.__module__})


def fuse(model: nn.Module) -> Shared | None:
    """Put the block in the place of every decoder layer of `model` that a family describes; None if there is none.

    Says which layers stay as they are, and why. The model is changed in place; call it before adapters are added.
    """
    decoder = getattr(model, "base_model", model)
    layers, rotary = getattr(decoder, "layers", None), getattr(decoder, "rotary_emb", None)
    if layers is None or rotary is None:
        log.warning("generic path, not the fused block: %s is not a decoder whet knows", type(model).__name__)
        return None
    shared = Shared(model.config.get_text_config(), rotary)
    left: Counter[str] = Counter()
    for index, layer in enumerate(layers):
        spec = family(layer)
        shape = f"layers of class {type(layer).__name__}" if spec is None else read_shape(layer, spec, shared.config)
        if spec is None or isinstance(shape, str):
            left[str(shape)] += 1
            continue
        _fuse_layer(layer, index, spec, shape, shared)
        last = layer
    if sum(left.values()) < len(layers):
        decoder.norm._whet_norm, decoder.norm._whet_offset = read_norm(decoder.norm), last._whet_shape.spec.norm_offset
        decoder.norm.__class__ = _fused_class(FusedNorm, type(decoder.norm))
    for reason, count in left.items():
        log.warning("generic path, not the fused block, in %d of %d layers: %s", count, len(layers), reason)
    return shared if sum(left.values()) < len(layers) else None


def _fuse_layer(layer: nn.Module, index: int, spec: FamilySpec, shape: LayerShape, shared: Shared) -> None:
    recompute = layer.gradient_checkpointing
    layer.__class__ = _fused_class(FusedLayer, type(layer))
    layer._whet, layer._whet_index, layer._whet_shape = shared, index, shape
    places = [
        (parent, name) for parent in (layer, layer.self_attn) for name in parent._modules if name.endswith("norm")
    ]
    layer._whet_norms = tuple((parent, name, parent._modules[name].weight) for parent, name in places)
    layer._whet_reader = LayerReader({name: Reader(modules) for name, modules in projections(layer, spec).items()})
    for reader in layer._whet_reader.readers.values():
        lay_together([parent._modules[name] for parent, name in reader.places])
    layer.__dict__.pop("gradient_checkpointing", None)
    layer.gradient_checkpointing = recompute


def shared_of(model: nn.Module) -> Shared | None:
    """What the fused layers of a model share, or None where it has none."""
    return next((m._whet for m in model.modules() if isinstance(m, FusedLayer)), None)


@contextmanager
def weights_held(model: nn.Module) -> Iterator[None]:
    """Meanwhile, weights lie as the plan says: those of `Shared.held` layers dequantized, or with `Shared.room`.

    Nothing may change the values of weights that are held.
    """
    shared, readers = shared_of(model), [m._whet_reader for m in model.modules() if isinstance(m, FusedLayer)]
    if shared is None:
        yield
        return
    shared.holding = True
    try:
        if shared.room:
            for reader in readers:
                reader.make_room()
                _give_back_cached()
        yield
    finally:
        shared.holding = False
        for reader in readers:
            if isinstance(found := reader.read(), Projections):
                found.let_go()
            del found
            if shared.room:
                reader.leave_room()
                _give_back_cached()


def _give_back_cached() -> None:
    """The next layer's weights need somewhat more than what these have left: torch would keep both."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def path_of(model: nn.Module) -> str:
    """How the model's layers run as they now stand: "fused", "generic: REASON", or how many of them each."""
    layers = [m for m in model.modules() if isinstance(m, FusedLayer)]
    reasons = Counter(str(found) for layer in layers if isinstance(found := layer._whet_reader.read(), str))
    total = model.config.get_text_config().num_hidden_layers
    if len(layers) < total:
        reasons["another kind of layer"] += total - len(layers)
    if not reasons:
        return "fused"
    generic = ", ".join(reasons)
    count = sum(reasons.values())
    return f"generic: {generic}" if count == total else f"fused, but for {count} of {total}: {generic}"


def trained_layers(model: nn.Module) -> list[list[nn.Parameter]]:
    """The weights that train, of each fused layer from the first; none where adapters do, or where a layer has none."""
    layers = [m for m in model.modules() if isinstance(m, FusedLayer)]
    if any("lora_" in name for name, p in model.named_parameters() if p.requires_grad):
        return []
    found = [[p for p in layer.parameters() if p.requires_grad] for layer in layers]
    return found if all(found) else []
