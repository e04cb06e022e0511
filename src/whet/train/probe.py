"""Where numbers stop being numbers: in a weight, in a layer's output, or in a gradient.

Only run when a step has gone wrong: it waits for the GPU at every layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Fault:
    """layer: the module, or the weight, by its name in the model. what: what happens there, in words."""

    layer: str
    what: str


def shown(name: str) -> str:
    """A module's or weight's name without what PEFT puts around it."""
    return name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".default", "")


def damaged_weights(model: nn.Module) -> list[str]:
    """The names of weights that hold a NaN or an infinity. Quantized ones can't be told and are passed over."""
    return [shown(name) for name, p in model.named_parameters() if p.is_floating_point() and not _whole(p)]


def first_fault(trainer: Any, batch: Mapping[str, Any]) -> Fault | None:
    """Where a batch first makes a NaN or an infinity, forward or backward, with the weights as they are; else None.

    The loss is the trainer's own, without its CUDA graph. Random state and gradients are as before afterwards. Layers
    that are listened to take the generic path, which holds more; where memory runs out, None: it can't be told.
    """
    try:
        return _first_fault(trainer, batch)
    except torch.OutOfMemoryError:
        return None


def _first_fault(trainer: Any, batch: Mapping[str, Any]) -> Fault | None:
    model = trainer.model
    with _undone(model):
        outputs: list[str] = []
        with _listening(model, outputs), trainer.compute_loss_context_manager():
            inputs = {name: value for name, value in batch.items() if name != "fill"}
            loss = trainer.compute_loss(model, trainer._prepare_inputs(inputs))
        if outputs:
            return Fault(shown(outputs[0]), "its output is no number")
        if not _whole(loss):
            return Fault("loss", "every layer's output is a number, the loss is not")
        if not loss.requires_grad:
            return None
        loss.backward()
        broken = [name for name, p in model.named_parameters() if p.grad is not None and not _whole(p.grad)]
        # The backward pass goes down from the last layer, and carries a NaN to all below: the last one is its origin.
        return Fault(shown(broken[-1]), "its gradient is no number") if broken else _overflow(model)


def _overflow(model: nn.Module) -> Fault | None:
    """The weight with the largest gradient, where the gradients' common norm is too large for fp32."""
    norms = {name: float(p.grad.float().norm()) for name, p in model.named_parameters() if p.grad is not None}
    largest = max(norms, key=lambda name: norms[name], default=None)
    if largest is None or math.isfinite(float(torch.tensor(list(norms.values())).norm())):
        return None
    return Fault(shown(largest), "its gradient overflows")


def _whole(tensor: torch.Tensor) -> bool:
    return bool(torch.isfinite(tensor.detach()).all())


@contextmanager
def _listening(model: nn.Module, found: list[str]) -> Iterator[None]:
    """Append the name of each module whose output is not finite, in the order in which they finish."""

    def listen(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not all(_whole(tensor) for tensor in _tensors(output)):
                found.append(name)

        return hook

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if name:
                hooks.callback(module.register_forward_hook(listen(name)).remove)
        yield


def _tensors(output: Any) -> Sequence[torch.Tensor]:
    """The floating-point tensors of a module's output."""
    values = (
        output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else [output]
    )
    return [value for value in values if isinstance(value, torch.Tensor) and value.is_floating_point()]


@contextmanager
def _undone(model: nn.Module) -> Iterator[None]:
    """Training mode, and afterwards the modes, gradients and random state of before."""
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(p, p.grad) for p in model.parameters() if p.requires_grad]
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        model.train()
        model.zero_grad(set_to_none=True)
        try:
            yield
        finally:
            for p, gradient in gradients:
                p.grad = gradient
            for module, training in modes:
                module.training = training
