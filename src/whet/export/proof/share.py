"""How much of the adapter is in each layer of an artifact: 1 where it was merged as trained, 0 where it was left out.

Random inputs go through the layer with its adapter, through its base alone, and through the artifact's layer. The share
is the multiple of the adapter's own change that explains the artifact's best:

    share = <y_artifact - y_base, y_tuned - y_base> / |y_tuned - y_base|^2

Rounding is noise that points elsewhere, so the share is known far better than any single weight: to within
noise = |rest| / (sqrt(n) |y_tuned - y_base|) for n outputs. That finds a layer at half its scale below 4-bit rounding.

Weights that lie on a grid already answer to a small change less than in proportion, whatever merges it. On that of 16
bits, as most bases' do, they swallow one smaller than half a step. On the 16 levels a block of an NF4 base they lie
alike to the steps of another 4-bit format: Q4_K passes on two thirds. What a format keeps of a change of the layer's
size is found by rounding such changes, and that much is expected.
Shapes: x [PROBES, in], y [PROBES, out].
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

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


class Layers(Protocol):
    """The layers of an artifact, by their names in the base model."""

    def layer(self, name: str, x: Tensor, /) -> Tensor:
        """What a layer makes of inputs [PROBES, in], or of token ids."""
        ...

    def rounded(self, name: str, rows: Tensor, /) -> Tensor:
        """What the format makes of rows of a layer's weights, fp32 on the CPU, [n, in]: rounded and decoded."""
        ...


SAMPLE = 1 << 16
"""Weights of a layer on which it is tried how much of a change the format keeps."""


@dataclass(frozen=True)
class Share:
    """share: see above. kept: what is expected of it. noise: how far rounding may move it (one standard deviation)."""

    layer: str
    share: float
    noise: float
    kept: float

    def error(self, limits: Limits) -> float:
        """How far it lies outside what may be: 0 and less is within. Trained changes are less regular than those that
        were tried, hence the half."""
        doubt = limits.share + 5 * self.noise + abs(1 - self.kept) / 2
        return max(min(self.kept, 1.0) - self.share, self.share - max(self.kept, 1.0)) - doubt


def shares(reference: Reference, artifact: Layers) -> Iterator[Share]:
    """The share of each layer that training changed. A full fine-tuning has none."""
    plain = reference.model.get_base_model() if hasattr(reference.model, "get_base_model") else reference.model
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad(), evaluating(reference.model):
        modules: Iterator[tuple[str, nn.Module]] = plain.named_modules()
        for name, module in modules:
            if isinstance(module, LoraLayer | ModulesToSaveWrapper):
                yield _share(name, module, artifact, generator)


def share_checks(reference: Reference, artifact: Layers, limits: Limits) -> list[Check]:
    """One check over all layers that training changed; none where no adapter was trained."""
    found = list(shares(reference, artifact))
    if not found:
        return []
    told = [one for one in found if one.noise <= LOST]
    drowned = len(found) - len(told)
    if not told:
        return [Check("adapter's share", True, f"its change is smaller than the rounding in all {drowned} layers")]
    worst = max(told, key=lambda one: one.error(limits))
    what = f"{worst.share:.3f} at its farthest from what is expected, in {worst.layer}, of {len(told)} layers"
    if abs(1 - worst.kept) > limits.share:
        what += f"; of so small a change the format keeps about {worst.kept:.0%}"
    if drowned:
        what += f"; in {drowned} more it is smaller than the rounding"
    limit = abs(worst.share - 1) - worst.error(limits)
    return [Check("adapter's share", worst.error(limits) <= 0, what, worst.share, limit, "1 within")]


def _share(name: str, module: nn.Module, artifact: Layers, generator: torch.Generator) -> Share:
    base, tuned = _in_fp32(module)
    x = _probes(base, generator)
    on_device = x.to(next(base.parameters()).device)
    before = base(on_device).double().cpu()
    effect = tuned(on_device).double().cpu() - before
    found = artifact.layer(name, x).double().cpu() - before
    square = float((effect * effect).sum())
    if square == 0:  # an adapter that was never trained changes nothing
        return Share(name, 1.0, math.inf, 1.0)
    share = float((found * effect).sum()) / square
    rest = float((found - share * effect).norm())
    noise = rest / math.sqrt(effect.numel() * square)
    size = math.sqrt(square / float((before * before).sum()))
    return Share(name, share, noise, 1.0 if noise > LOST else _kept(name, base.weight, size, artifact, generator))


def _kept(name: str, weight: Tensor, size: float, artifact: Layers, generator: torch.Generator) -> float:
    """How much of a random change, `size` times as large as the weights, the format passes on: 1 for all of it."""
    step = max(1, weight.numel() // SAMPLE)
    w = weight.detach()[::step].float().cpu()
    change = torch.randn(w.shape, generator=generator) * w.square().mean().sqrt() * size
    passed = artifact.rounded(name, w + change) - artifact.rounded(name, w)  # most of the rounding itself cancels
    return float((passed * change).sum() / change.square().sum())


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
