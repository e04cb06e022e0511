"""Evaluation in the middle of training that leaves training bit for bit as it was.

Kept and put back: the mode of every module, which weights train, the random state of Python, NumPy and torch on every
device, and what fused layers remember of their weights (models/reading.py), which a recorded training pass goes on
reading. Nothing here makes gradients; key-value caches belong to a call and go with it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from whet.models.fused import FusedLayer, shared_of


@contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """Evaluation mode and no gradients; afterwards all that training reads is as it was."""
    modes = [(module, module.training) for module in model.modules()]
    trains = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with _random_state(), _fused_state(model), torch.no_grad():
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
            for parameter, wanted in trains:  # PEFT lets all of an adapter train that it turns on again
                parameter.requires_grad_(wanted)


@contextmanager
def _random_state() -> Iterator[None]:
    of_python, of_numpy = random.getstate(), np.random.get_state()
    # every generator that exists: an evaluation may run on any device, and seeding touches all
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)


@contextmanager
def _fused_state(model: Any) -> Iterator[None]:
    """Training's weights stay held for training, and evaluation holds none of its own.

    Evaluation mode makes layers read their modules again. What they had read keeps dequantized weights alive whose
    memory a CUDA graph of the training pass reads, so it is put back and not merely read anew.
    """
    shared = shared_of(model)
    if shared is None:
        yield
        return
    layers = [module._whet_reader for module in model.modules() if isinstance(module, FusedLayer)]
    read = [(layer, layer._found, [(r, r._stamp, r._found) for r in layer.readers.values()]) for layer in layers]
    holding, fp8 = shared.holding, shared.fp8
    shared.holding = shared.fp8 = False  # evaluation shows what is exported, which computes in 16 bits
    try:
        yield
    finally:
        shared.holding, shared.fp8 = holding, fp8
        for layer, found, readers in read:
            layer._found = found
            for reader, stamp, projection in readers:
                reader._stamp, reader._found = stamp, projection
