"""The plan for a model in memory, and its application: what each layer keeps, and how many tokens a pass has."""

from __future__ import annotations

import logging
import os
from collections import Counter
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import nn

from whet.errors import WhetError
from whet.models import activations, pinned
from whet.models.activations import Policy
from whet.models.embedding import bytes_of, movable_embedding, move_to_host
from whet.models.fused import FusedLayer, shared_of, trained_layers
from whet.plan import memory
from whet.plan.memory import GIB, Device, Plan, Sizes

log = logging.getLogger("whet")

EIGHT_BIT = ("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "lion_8bit")


def sizes_of(model: nn.Module) -> Sizes | None:
    """What the plan depends on, read from a fused model; None where its layers are not fused, or not all."""
    shared = shared_of(model)
    layers = [m for m in model.modules() if isinstance(m, FusedLayer)]
    if shared is None or len(layers) != shared.config.num_hidden_layers:
        return None
    projections = layers[0]._whet_reader.read()
    if isinstance(projections, str):
        return None
    parts = [part for projection in projections.all for part in projection.parts]
    weights = [part.weight for part in parts]
    bits = 16 if all(isinstance(w, torch.Tensor) for w in weights) else 4
    element = layers[0]._whet_shape.input_norm.weight.element_size()
    rank = max(part.down.shape[0] if part.down is not None else 0 for part in parts)
    trained = any(part.trained for part in parts)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    head_trains = head is not None and any(p.requires_grad for p in head.parameters())
    return Sizes(
        layers[0]._whet_shape,
        len(layers),
        shared.config.vocab_size,
        rank,
        bits,
        element,
        trained,
        head_trains,
        float(bytes_of(movable_embedding(model))),
        fp8=shared.fp8,
    )


@cache
def device_rates(device: torch.device) -> Device:
    """Rates of the nearest device known, and of this machine's own link to its host, which differs most: measured."""
    nearest = memory.HOPPER if torch.cuda.get_device_capability(device)[0] >= 9 else memory.AMPERE
    if "H200" in torch.cuda.get_device_name(device):
        nearest = memory.H200
    return replace(nearest, link=_link(device))


def _link(device: torch.device, size: int = 64 * 2**20) -> float:
    """Bytes/s of copies to pinned host memory, the best of three."""
    there = torch.empty(size, dtype=torch.uint8, device=device)
    here = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    best = float("inf")
    for _ in range(3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        here.copy_(there, non_blocking=True)
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) / 1e3)
    return size / best


def static_bytes(model: nn.Module, optimizer: str, *, layerwise: bool = False) -> float:
    """What lies on the device all the time: what does now, and gradients and optimizer states to come.

    layerwise: of the fused layers' gradients, one layer's are there at one time.
    """
    eight_bit = optimizer in EIGHT_BIT
    # transformers has bitsandbytes keep an embedding's moments in 32 bits
    embeddings = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    coming = 0.0
    for p in model.parameters():
        if p.requires_grad:
            states = 2.1 if eight_bit and p not in embeddings else 8
            coming += p.numel() * (states + (p.element_size() if p.grad is None else 0))
    if layerwise:
        each = [sum(p.numel() * p.element_size() for p in layer) for layer in trained_layers(model)]
        coming -= sum(each) - max(each, default=0)
    return torch.cuda.memory_allocated() + coming


def plan(
    model: nn.Module,
    passes: list[int],
    length: int,
    *,
    optimizer: str,
    budget: float | None,
    recorded: bool = False,
    layerwise: bool = False,
) -> Plan | None:
    """The fastest plan for passes of one of `passes` tokens in rows of `length`; None where the layers are not fused.

    budget: bytes that training may take on the device; None for all that is free. recorded: whether passes will run as
    CUDA graphs. layerwise: whether a step of the longest pass would update weights layer by layer. Raises WhetError
    where no plan fits.
    """
    sizes = sizes_of(model)
    if sizes is None:
        return None
    static = static_bytes(model, optimizer)
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    within = min(budget, free) if budget is not None else free
    host = 0.6 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") + pinned.spare()
    device = device_rates(torch.device("cuda"))
    tries = [(static, sorted(set(passes)), replace(device, launch=0.0) if recorded else device)]
    if layerwise:  # instead of the whole step's pass with all gradients; not recorded (train/layerwise.py)
        tries = [(static, tries[0][1][:-1], tries[0][2])] if len(set(passes)) > 1 else []
        tries.append((static_bytes(model, optimizer, layerwise=True), [max(passes)], device))
    found = [memory.choose(sizes, at, within, there, tokens, length, host) for there, tokens, at in tries]
    plans = [x for x in found if x is not None]
    if not plans:
        lean = min((memory.leanest(sizes, there, min(tokens)) for there, tokens, _ in tries), key=lambda x: x.peak)
        raise WhetError(
            f"training needs {lean.peak / GIB:.2f} GiB on the GPU, {within / GIB:.2f} are to be had",
            where="gpu_memory",
            fix="in this order: a smaller max_seq_length, fewer rows at a time (per_device_train_batch_size=1), "
            "or a larger gpu_memory",
        )
    return min(plans, key=lambda x: x.seconds_a_token)


def fit_to_memory(
    model: nn.Module, config: Any, budget: float | None, *, recorded: bool = False, layerwise: bool = False
) -> Plan | None:
    """Plan for a trainer's config, set its micro-batches to the plan's passes, and apply it.

    The rows of an optimizer step stay as they are, in their order: only how many of them go through the model at a time
    may be more or fewer than was asked for. None, and nothing changed, where there is no GPU or no fused layer.
    budget, recorded, layerwise: as in `plan`.
    """
    shared = shared_of(model)
    if shared is None or not torch.cuda.is_available():
        return None
    length = config.max_length or model.max_seq_length
    a_step = config.per_device_train_batch_size * config.gradient_accumulation_steps
    passes = {rows * length: rows for rows in range(1, a_step + 1) if a_step % rows == 0}
    options: dict[str, Any] = {"optimizer": str(getattr(config.optim, "value", config.optim)), "budget": budget}
    chosen = plan(model, list(passes), length, **options, recorded=recorded, layerwise=layerwise)
    if chosen is None:
        return None
    rows = passes[chosen.tokens]
    config.per_device_train_batch_size, config.gradient_accumulation_steps = rows, a_step // rows
    shared.layers, shared.tile, shared.held = chosen.policies, chosen.tile, chosen.held
    shared.room = True  # has no effect on a base that is quantized, or trains
    embedding = movable_embedding(model)
    if chosen.embedding_on_host and embedding is not None:
        move_to_host(embedding)
    shared.plan = f"{rows} rows at a time, {a_step // rows} times a step; {describe(chosen)}"
    log.info("%s", shared.plan)
    return chosen


def describe(chosen: Plan) -> str:
    """The plan in words: peak, and how many layers keep what, where."""
    names = {frozenset(p.keep): name for name, p in vars(activations).items() if isinstance(p, Policy)}
    counts = Counter(f"{names[p.keep].lower()}{' on the host' if p.offload else ''}" for p in chosen.policies)
    kinds = ", ".join(f"{count} {name}" for name, count in counts.items())
    more = f"; {chosen.held} layers' weights stay dequantized" if chosen.held else ""
    more += "; the embedding in host memory" if chosen.embedding_on_host else ""
    static = f"{chosen.static / GIB:.2f} of it all the time"
    return f"peak {chosen.peak / GIB:.2f} GiB, {static}; layers keep: {kinds}; tiles of {chosen.tile} tokens{more}"
