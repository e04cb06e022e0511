"""Attention of many sequences in one packed row, their keys and values in pages: what a step's forward pass calls.

A step packs the new tokens of every sequence into one row of T tokens, so that projections and MLPs see one matrix.
Here each sequence is told apart again: its new keys and values are written into its pages, and its queries attend to
the whole of what its pages hold. Sequences with one new token (those that generate) attend together, in groups of like
length; a prompt's chunk attends by itself.

    o_i = softmax(s * q_i K^T) V      keys j <= i, and i - j < window where there is one
    with a soft cap c the scores are c * tanh(s / c)   (Gemma 2)

Query heads that share a key head are laid along the query axis: [B, H, L, d] -> [B, G, (H / G) * L, d]. Keys and values
are then read once, not repeated.

Letters: T tokens of the step, B sequences of a group, L new tokens of each, P pages, S key positions, H heads, G key
heads, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

NAME = "whet_paged"


def register() -> str:
    """Offer the function to transformers under NAME, through its own registry, and return the name.

    No mask function goes with it: transformers then builds no mask at all, for a step brings its own.
    """
    AttentionInterface.register(NAME, paged_attention)
    return NAME


@dataclass(frozen=True)
class Group:
    """Sequences with L new tokens each, beside each other in the packed row from token `first` on.

    pages_BP: the pages that hold each sequence's keys, new ones too. positions_BL: of the new tokens, from 0.
    """

    first: int
    pages_BP: Tensor
    positions_BL: Tensor
    page_size: int
    _masks: dict[int | None, Tensor] = field(default_factory=dict)

    def mask(self, window: int | None) -> Tensor:
        """[B, 1, L, S], True where a query sees a key. The same for all layers with that window."""
        if window not in self._masks:
            keys_S = torch.arange(self.pages_BP.shape[1] * self.page_size, device=self.pages_BP.device)
            queries = self.positions_BL[:, :, None]
            seen = keys_S <= queries
            if window is not None:
                seen &= queries - keys_S < window
            self._masks[window] = seen[:, None]
        return self._masks[window]


@dataclass(frozen=True)
class Pages:
    """One layer's keys and values: [pages, page size, G, d] each."""

    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class Step:
    """What the attention of one forward pass needs. slots_T: where in the pages each token's key goes."""

    layers: dict[int, Pages]
    slots_T: Tensor
    groups: tuple[Group, ...]


@dataclass(frozen=True)
class Shape:
    """Of one layer's keys: heads, and the widths of a head's key and value, which differ in few architectures."""

    heads: int
    key_width: int
    value_width: int
    dtype: torch.dtype

    @property
    def bytes_a_token(self) -> int:
        return self.heads * (self.key_width + self.value_width) * self.dtype.itemsize


@dataclass(frozen=True)
class Probe:
    """Stands in for a step to learn what each layer's keys look like; every token attends to itself alone."""

    shapes: dict[int, Shape] = field(default_factory=dict)


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    paged: Step | Probe | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [1, H, T, d]; key, value [1, G, T, d]; returns [1, T, H, d] and no weights."""
    layer: Any = module.layer_idx
    if kwargs.get("s_aux") is not None:
        raise NotImplementedError("attention sinks")
    if isinstance(paged, Probe):
        paged.shapes[layer] = Shape(key.shape[1], key.shape[3], value.shape[3], key.dtype)
        return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1).transpose(1, 2), None
    assert paged is not None, "the step comes with the forward call, and decoder layers pass it on"
    pages = paged.layers[layer]
    pages.keys.flatten(0, 1).index_copy_(0, paged.slots_T, key[0].transpose(0, 1))
    pages.values.flatten(0, 1).index_copy_(0, paged.slots_T, value[0].transpose(0, 1))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    parts = [_attend(query, pages, group, scale, sliding_window, softcap) for group in paged.groups]
    return torch.cat(parts, dim=0)[None], None


def _attend(
    query: Tensor, pages: Pages, group: Group, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """[B * L, H, d_v] of one group."""
    B, L = group.positions_BL.shape
    H, d = query.shape[1], query.shape[3]
    G = pages.keys.shape[2]
    q = query[0, :, group.first : group.first + B * L]  # [H, B * L, d]
    q = q.view(H, B, L, d).transpose(0, 1).reshape(B, G, H // G * L, d)
    k = pages.keys[group.pages_BP].flatten(1, 2).transpose(1, 2)  # [B, G, S, d]
    v = pages.values[group.pages_BP].flatten(1, 2).transpose(1, 2)
    mask = group.mask(window)  # [B, 1, L, S]
    if L > 1:
        mask = mask.repeat(1, 1, H // G, 1)
    if softcap is None:
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    else:
        scores = softcap * torch.tanh((q @ k.transpose(2, 3)) * scale / softcap)
        scores = scores.masked_fill(~mask, float("-inf"))
        out = torch.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype) @ v
    return out.reshape(B, H, L, -1).transpose(1, 2).reshape(B * L, H, -1)
