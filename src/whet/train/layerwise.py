"""The optimizer's step within the backward pass, layer by layer, so that gradients take one layer's memory.

When the backward pass begins a layer, all gradients of the one above are there. They update its weights then, and are
let go. The result is that of one step at the end, to the bit: AdamW looks at no other value than its own. What needs
all gradients at one time can't be had beside it: a limit on their norm, or sums over several passes.
Source: Lv et al. 2023, arXiv:2306.09782 (LOMO), which does so with plain gradient descent.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from whet.train.optimizer import NAMES, AdamW8bit


def allowed(args: Any) -> bool:
    """Whether a trainer's arguments leave each gradient to itself, in steps of one pass: no limit on their norm."""
    return not (args.max_grad_norm or 0) > 0 and args.optim in NAMES


class Layerwise:
    """Called by each fused layer when its backward pass begins, with its number from the first."""

    def __init__(self, layers: list[list[nn.Parameter]], optimizer: AdamW8bit):
        self.layers, self.optimizer = layers, optimizer
        self._norms: list[Tensor] = []

    @torch.no_grad()
    def __call__(self, layer: int) -> None:
        if layer + 1 == len(self.layers):
            self._norms.clear()  # of a pass whose norm nobody asked for
            return
        done = [p for p in self.layers[layer + 1] if p.grad is not None]
        if done:
            self._norms += torch._foreach_norm([p.grad for p in done])
            self.optimizer.step(only=done)
            for p in done:
                p.grad = None

    def norm(self, model: nn.Module) -> Tensor:
        """Of all gradients of the last pass: those that are still there, and those that are not."""
        rest = [p.grad for p in model.parameters() if p.grad is not None]
        norms = [*self._norms, *(torch._foreach_norm(rest) if rest else [torch.zeros(())])]
        self._norms = []
        return torch.linalg.vector_norm(torch.stack([x.float() for x in norms]))
