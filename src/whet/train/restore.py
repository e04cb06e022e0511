"""Weights in training put back to what they were: from a copy in memory, or from a checkpoint's files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

from whet.errors import WhetError

MOST = 4 << 30
"""Bytes of trained weights that are copied to memory. More than an adapter has; less than a whole large model."""


class StartingWeights:
    """A copy of the weights that train, in host memory; none where they exceed `MOST` bytes."""

    def __init__(self, model: nn.Module):
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        fits = sum(p.numel() * p.element_size() for p in trained.values()) <= MOST
        self.values = {name: p.detach().to("cpu", copy=True) for name, p in trained.items()} if fits else {}

    def put_back(self, model: nn.Module) -> bool:
        """Whether there was a copy to put back."""
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, value in self.values.items():
                parameters[name].copy_(value)
        return bool(self.values)


def load_weights(model: nn.Module, checkpoint: Path) -> None:
    """Give the model the weights of a checkpoint: of its adapter, or all. Raises WhetError where it holds none."""
    adapter = checkpoint / "adapter_model.safetensors"
    if isinstance(model, PeftModel) and adapter.is_file():
        set_peft_model_state_dict(model, load_file(adapter))
        return
    files = sorted(checkpoint.glob("model*.safetensors"))
    if not files:
        raise WhetError("the checkpoint holds no weights", where=str(checkpoint), fix="remove it, then run again")
    parameters: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for file in files:
            for name, value in load_file(file).items():
                if name in parameters:
                    parameters[name].copy_(value)
