"""How much of the adapter is in each layer of an artifact: 1 where it was merged as trained, 0 where it was left out.

Random inputs go through the layer with its adapter, through its base alone, and through the artifact's layer. The share
is the multiple of the adapter's own change that explains the artifact's best:

    share = <y_artifact - y_base, y_tuned - y_base> / |y_tuned - y_base|^2

Rounding is noise that points elsewhere, so the share is known far better than any single weight: to within
noise = |rest| / (sqrt(n) |y_tuned - y_base|) for n outputs. That finds a layer at half its scale below 4-bit rounding.
Weights that lie on the grid of 16 bits, as most bases' do, swallow a change smaller than half a step, whatever merges
it. What rounding leaves of a change of the layer's size is found by rounding such changes, and is no fault.
Shapes: x [PROBES, in], y [PROBES, out].
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from whet.export.merge import dequantize
from whet.export.proof.checks import Check
from whet.export.proof.limits import Limits
from whet.export.proof.reference import Reference, evaluating

Plain: TypeAlias = nn.Linear | nn.Embedding

PROBES = 64
LOST = 0.15
"""Noise of a share above which the layer's change drowns in the format's rounding."""

Layer = Callable[[str, Tensor], Tensor]
"""A layer of an artifact by its name in the base model, applied to inputs: [PROBES, in] (or token ids) -> outputs."""


SAMPLE = 1 << 16
"""Weights of a layer on which the loss to 16 bits is tried."""

EXACT = ("f32", "fp32")
"""Formats that are made without rounding to 16 bits first."""


@dataclass(frozen=True)
class Share:
    """share: see above. noise: how far rounding to the format may move it (one standard deviation). lost: what rounding
    to 16 bits takes of it."""

    layer: str
    share: float
    noise: float
    lost: float

    def tolerance(self, limits: Limits) -> float:
        """How far from 1 it may lie. Trained changes are less regular than those that were tried, hence the factor."""
        return limits.share + 5 * self.noise + (1.5 * self.lost if self.share < 1 else 0.0)


def shares(reference: Reference, layer: Layer, rounded: torch.dtype) -> Iterator[Share]:
    """The share of each layer that training changed. A full fine-tuning has none. rounded: the merge's type."""
    plain = reference.model.get_base_model() if hasattr(reference.model, "get_base_model") else reference.model
    generator = torch.Generator().manual_seed(0)
    with evaluating(reference.model):
        modules: Iterator[tuple[str, nn.Module]] = plain.named_modules()
        for name, module in modules:
            if isinstance(module, LoraLayer | ModulesToSaveWrapper):
                yield _share(name, module, layer, rounded, generator)


def share_checks(reference: Reference, layer: Layer, format: str, limits: Limits) -> list[Check]:
    """One check over all layers that training changed; none where no adapter was trained."""
    rounded = torch.float32 if format in EXACT else torch.float16 if format == "fp16" else torch.bfloat16
    found = list(shares(reference, layer, rounded))
    if not found:
        return []
    told = [one for one in found if one.noise <= LOST]
    drowned = len(found) - len(told)
    if not told:
        return [Check("adapter's share", True, f"its change is smaller than the rounding in all {drowned} layers")]
    worst = max(told, key=lambda one: abs(one.share - 1) - one.tolerance(limits))
    what = f"{worst.share:.3f} at its farthest from 1, in {worst.layer}, of {len(told)} layers"
    if worst.lost > limits.share:
        what += f"; so small a change loses about {worst.lost:.0%} to 16 bits"
    if drowned:
        what += f"; in {drowned} more it is smaller than the rounding"
    limit = worst.tolerance(limits)
    return [Check("adapter's share", abs(worst.share - 1) <= limit, what, worst.share, limit, "1 within")]


def _share(name: str, module: nn.Module, layer: Layer, rounded: torch.dtype, generator: torch.Generator) -> Share:
    base, tuned = _in_fp32(module)
    x = _probes(base, generator)
    on_device = x.to(next(base.parameters()).device)
    before = base(on_device).double().cpu()
    effect = tuned(on_device).double().cpu() - before
    found = layer(name, x).double().cpu() - before
    square = float((effect * effect).sum())
    if square == 0:  # an adapter that was never trained changes nothing
        return Share(name, 1.0, math.inf, 0.0)
    share = float((found * effect).sum()) / square
    rest = float((found - share * effect).norm())
    size = math.sqrt(square / float((before * before).sum()))
    return Share(name, share, rest / math.sqrt(effect.numel() * square), _lost(base.weight, size, rounded, generator))


def _lost(weight: Tensor, size: float, rounded: torch.dtype, generator: torch.Generator) -> float:
    """What rounding takes of a random change, `size` times as large as the weights: 0 for nothing, 1 for all of it."""
    w = weight.detach().flatten()
    w = w[:: max(1, len(w) // SAMPLE)].float().cpu()
    change = torch.randn(len(w), generator=generator) * w.square().mean().sqrt() * size
    kept = (w + change).to(rounded).float() - w
    return max(0.0, 1 - float((kept * change).sum() / change.square().sum()))


def _in_fp32(module: nn.Module) -> tuple[Plain, nn.Module]:
    """The layer's base, and the layer with its adapter, both computing in fp32.

    In 16 bits the difference of the two outputs would be rounding for the most part, where an adapter changes little.
    """
    if isinstance(module, ModulesToSaveWrapper):
        trained = module.modules_to_save[module.active_adapters[0]]
        return wide(module.original_module), wide(trained)
    assert isinstance(module, LoraLayer)
    base, tuned = wide(module.get_base_layer()), copy.copy(module)
    tuned._modules = {**module._modules, "base_layer": base}
    return base, tuned


def wide(module: Any) -> Plain:
    """A copy of a linear layer or an embedding in fp32; a quantized one as its forward pass sees it."""
    if module.weight.is_floating_point():
        copied: Plain = copy.deepcopy(module).float()
        return copied
    weight = dequantize(module, "weight", module.weight).detach().float()
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=module.bias is not None, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    if module.bias is not None:
        made.bias = nn.Parameter(module.bias.detach().float(), requires_grad=False)
    return made


def _probes(base: Plain, generator: torch.Generator) -> Tensor:
    """Normal inputs for a linear layer, token ids for an embedding."""
    if isinstance(base, nn.Embedding):
        return torch.randint(base.num_embeddings, (PROBES,), generator=generator)
    return torch.randn(PROBES, base.weight.shape[1], generator=generator)
