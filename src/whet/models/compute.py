"""FP8 for the products of a frozen base: what it needs, asked before anything is trained.

A layer that can't have it would run in 16 bits under a line in the log (models/fused.py). Whoever asks for FP8 in so
many words gets an error instead.
"""

from __future__ import annotations

import torch
from torch import nn

from whet.errors import WhetError
from whet.kernels import fp8
from whet.models import fused
from whet.models.fused import FusedLayer
from whet.models.load import pick_dtype

COMPUTE = ("bf16", "fp8")
FIX = 'compute="bf16", or leave it out'


def check_compute(
    compute: str, precision: str = "nf4", dtype: str | torch.dtype | None = None, *, full: bool = False
) -> None:
    """Raise WhetError for an unknown `compute`, or where a base held in `precision` can't have it on this machine.

    dtype: as load takes it. full: every weight is to be trained.
    """
    if compute not in COMPUTE:
        choices = ", ".join(map(repr, COMPUTE))
        raise WhetError(f"unknown value {compute!r}", where="compute", fix=f"use one of {choices}")
    if compute == "bf16":
        return
    if full:
        raise _refused("FP8 is for the products of a frozen base; every weight is to be trained", FIX)
    if precision != "nf4":
        held = {"int8": "8-bit integers"}.get(precision, "16 or 32 bits")
        raise _refused(f"FP8 is read from a base in NF4, not in {held}", "load_in_4bit=True and no other load_in_*")
    if not torch.cuda.is_available():
        raise _refused("FP8 needs a GPU of NVIDIA's Hopper generation or later; there is no GPU here", FIX)
    _check_device(torch.device("cuda", 0))  # where models are loaded unless device_map says otherwise
    if pick_dtype(dtype) != torch.bfloat16:
        raise _refused(f"FP8 products come out in bfloat16, not in {dtype}", "leave dtype out")


def use_fp8(model: nn.Module) -> None:
    """Let the products of every layer's frozen base run in FP8. Raises WhetError, changing nothing, if one can't."""
    shared = fused.shared_of(model)
    if shared is None:
        raise _refused("FP8 is part of the fused block, through which no layer of this model runs", FIX)
    path = fused.path_of(model)
    if path != "fused":
        raise _refused(f"FP8 is part of the fused block, through which not all layers run ({path})", FIX)
    for name, module in model.named_modules():
        if isinstance(module, FusedLayer):
            _check_layer(name, module)
    shared.fp8 = True


def check_adapter(model: nn.Module) -> None:
    """Raise WhetError where layers that are to run in FP8 leave the fused block once the model is in training."""
    shared = fused.shared_of(model)
    if shared is None or not shared.fp8:
        return
    modes = [(module, module.training) for module in model.modules()]
    model.train()  # dropout is none in evaluation
    path = fused.path_of(model)
    for module, training in modes:
        module.training = training
    if path != "fused":
        raise _refused(
            f"FP8 is part of the fused block, and with this adapter layers would leave it ({path})",
            'load the base again for an adapter without dropout, DoRA or biases of its own, or with compute="bf16"',
        )


def _check_layer(name: str, layer: FusedLayer) -> None:
    found = layer._whet_reader.read()
    assert not isinstance(found, str), "path_of has said so"
    _check_device(layer._whet_norms[0][2].device)
    for projection in found.all:
        if projection.fp8_base is None:
            raise _refused(
                f"{name} has a weight of {projection.rows}x{projection.columns} that FP8 does not take: it must be NF4 "
                "of sizes that are multiples of 16, and parts that read one input must lie together in memory",
                FIX,
            )


def _check_device(device: torch.device) -> None:
    if fp8.supported(device):
        return
    if device.type != "cuda":
        raise _refused(f"FP8 needs a GPU of NVIDIA's Hopper generation or later; the base is on {device}", FIX)
    major, minor = torch.cuda.get_device_capability(device)
    raise _refused(
        f"FP8 needs a GPU of NVIDIA's Hopper generation (compute capability 9.0) or later; "
        f"here is {torch.cuda.get_device_name(device)}, {major}.{minor}",
        FIX,
    )


def _refused(what: str, fix: str) -> WhetError:
    return WhetError(what, where='compute="fp8"', fix=fix)
