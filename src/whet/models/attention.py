"""Attention over packed documents, as an attention function that transformers' models can be pointed at.

A packed row holds several documents one after another. Each attends to itself alone, so no [T, T] mask is built and no
work is spent between documents: their boundaries come from `cu_seq_lens_q` (the collator's, for one row) or from
restarts in `position_ids`. Rows that carry an explicit mask (padding, or a key-value cache) take the masked path.

    o_i = softmax(s * q_i K_d^T) V_d    d the document of i; keys j <= i, and i - j < window where there is one
    with a soft cap c the scores are c * tanh(s / c)   (Gemma 2)

Shapes: query [B, H, T, d]; key, value [B, G, S, d] with H a multiple of G; output [B, T, H, d].
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

NAME = "whet_varlen"


def register() -> str:
    """Offer the function to transformers under NAME, through its own registry, and return the name."""
    AttentionInterface.register(NAME, varlen_attention)
    AttentionMaskInterface.register(NAME, varlen_mask)
    return NAME


def varlen_mask(*args: Any, q_length: int, kv_length: int, attention_mask: Tensor | None = None, **kwargs: Any):
    """None where the function finds the documents itself; a boolean mask where tokens are padded or cached."""
    if attention_mask is None and q_length == kv_length:
        return None
    kwargs["allow_is_causal_skip"] = False
    return sdpa_mask(*args, q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, **kwargs)


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention, document by document. Takes the arguments that transformers' attention functions take."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value)) if groups > 1 else (key, value)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if attention_mask is not None:
        out = _attend(query, key, value, attention_mask, False, dropout, scale, softcap)
        return out.transpose(1, 2).contiguous(), None

    # `split` rather than slices: its backward joins the parts once, where each slice's fills a whole gradient
    rows = []
    for row, lengths in enumerate(_document_lengths(query, position_ids, cu_seq_lens_q)):
        parts = zip(*(x[row : row + 1].split(lengths, dim=2) for x in (query, key, value)), strict=True)
        documents = [
            _attend(q, k, v, _window(q.shape[2], sliding_window, q), True, dropout, scale, softcap) for q, k, v in parts
        ]
        rows.append(torch.cat(documents, dim=2))
    return torch.cat(rows).transpose(1, 2).contiguous(), None


def _document_lengths(query: Tensor, position_ids: Tensor | None, cu_seq_lens: Tensor | None) -> list[list[int]]:
    """For each row, the lengths of its documents, in tokens."""
    batch, length = query.shape[0], query.shape[2]
    if cu_seq_lens is not None and batch == 1:
        return [cu_seq_lens.diff().tolist()]
    if position_ids is None or position_ids.shape[-1] != length:
        return [[length]] * batch
    restart = position_ids.diff(dim=-1) != 1
    starts = [[0, *(row.nonzero().flatten() + 1).tolist(), length] for row in restart]
    lengths = [[b - a for a, b in pairwise(row)] for row in starts]
    return lengths * batch if len(lengths) == 1 else lengths


def _window(length: int, window: int | None, like: Tensor) -> Tensor | None:
    """The boolean mask of a sliding window, or None where the document is no longer than the window."""
    if window is None or length <= window:
        return None
    i = torch.arange(length, device=like.device)
    distance = i[:, None] - i[None, :]
    return (distance >= 0) & (distance < window)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    dropout: float,
    scale: float,
    softcap: float | None,
):
    if softcap is None:
        causal = causal and mask is None
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale)
    scores = softcap * torch.tanh(q @ k.transpose(-1, -2) * (scale / softcap))
    if mask is None:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return nn.functional.dropout(weights, dropout) @ v
