"""Attention over packed documents, as an attention function that transformers' models can be pointed at.

A packed row holds several documents one after another. Each attends to itself alone, so no [T, T] mask is built and no
work is spent between documents: their boundaries come from `cu_seq_lens_q` (the collator's, for one row) or from
restarts in `position_ids`. Rows that carry an explicit mask (padding, or a key-value cache) take the masked path.

    o_i = softmax(s * q_i K_d^T) V_d    d the document of i; keys j <= i, and i - j < window where there is one
    with a soft cap c the scores are c * tanh(s / c)   (Gemma 2)

Shapes: query [B, H, T, d]; key, value [B, G, S, d] with H a multiple of G; output [B, T, H, d].
"""

from __future__ import annotations

from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from whet.kernels.attention import Documents

NAME = "whet_varlen"


def register() -> str:
    """Offer the function to transformers under NAME, through its own registry, and return the name."""
    AttentionInterface.register(NAME, varlen_attention)
    AttentionMaskInterface.register(NAME, varlen_mask)
    return NAME


def varlen_mask(
    *args: Any,
    q_length: int,
    kv_length: int,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """None where the function finds the documents itself; a boolean mask where tokens are padded or cached, or where a
    model brings a mask function of its own (which is what `use_vmap` stands for).

    Padding at the right needs no mask either: no real token comes after it, and what padding itself sees is nobody's.
    """
    if q_length == kv_length and not use_vmap and (attention_mask is None or _padded_right(attention_mask)):
        return None
    return sdpa_mask(
        *args,
        q_length=q_length,
        kv_length=kv_length,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip and q_length in (1, kv_length),
        use_vmap=use_vmap,
        **kwargs,
    )


def _padded_right(mask: Tensor) -> bool:
    """Whether in each row [T] of a padding mask no real token follows a padded one."""
    return mask.ndim == 2 and not bool((mask[:, 1:] & ~mask[:, :-1]).any())


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
    max_length_q: int | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention, document by document. Takes the arguments that transformers' attention functions take."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    # One new token, or a model that looks both ways, sees all the keys there are.
    whole = attention_mask is not None or not causal or query.shape[2] != key.shape[2]
    batch, length = query.shape[0], query.shape[2]
    documents = None if whole else find_documents(batch, length, position_ids, cu_seq_lens_q, max_length_q)
    if documents is not None and _flash_takes(query, dropout, softcap):
        return _flash(query, key, value, documents, scale, sliding_window), None

    groups = query.shape[1] // key.shape[1]
    # On a GPU the kernels without a mask read each key for its group of queries; the others need it repeated.
    if groups > 1 and not (query.is_cuda and attention_mask is None and sliding_window is None and softcap is None):
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    attend = partial(_attend, dropout=dropout, scale=scale, softcap=softcap)
    if whole:
        out = attend(query, key, value, attention_mask, causal=False)
    elif documents is None:
        out = attend(query, key, value, _window(query, sliding_window), causal=True)
    else:
        # `split` rather than slices: its backward joins the parts once, where each slice's fills a whole gradient
        flat = (x.transpose(0, 1).flatten(1, 2)[None].split(documents.lengths, dim=2) for x in (query, key, value))
        parts = [attend(q, k, v, _window(q, sliding_window), causal=True) for q, k, v in zip(*flat, strict=True)]
        out = torch.cat(parts, dim=2)[0].unflatten(1, (query.shape[0], query.shape[2])).transpose(0, 1)
    return out.transpose(1, 2).contiguous(), None


def find_documents(
    batch: int, length: int, position_ids: Tensor | None, cu_seq_lens: Tensor | None, longest: int | None
) -> Documents | None:
    """The documents of a packed batch; None where each row is one document.

    Found once a batch and kept on the batch's own tensor, since every layer asks and a GPU is waited for at each look.
    Positions of one row for a batch of many are the model's own, 0, 1, 2 ...: nothing is packed then.
    """
    source = cu_seq_lens if cu_seq_lens is not None and batch == 1 else position_ids
    if source is None or (source is position_ids and (source.shape[-1] != length or source.shape[0] < batch)):
        return None
    if not hasattr(source, "_whet_documents"):
        source._whet_documents = _find(source, batch, longest, packed=source is cu_seq_lens)
    return source._whet_documents


def _find(source: Tensor, batch: int, longest: int | None, *, packed: bool) -> Documents | None:
    if packed:
        cu_seqlens = source.to(torch.int32)
    else:
        first = torch.ones(source.shape[0], 1, dtype=torch.bool, device=source.device)
        starts = torch.cat([first, source.diff(dim=-1) != 1], dim=-1).flatten()
        bounds = [starts.nonzero().flatten(), torch.tensor([starts.numel()], device=source.device)]
        cu_seqlens = torch.cat(bounds).to(torch.int32)
    if cu_seqlens.numel() == batch + 1:
        return None
    cu_seqlens = cu_seqlens.to(source.device)
    return Documents(cu_seqlens, longest if packed and longest else int(cu_seqlens.diff().max()))


def _flash_takes(query: Tensor, dropout: float, softcap: float | None) -> bool:
    return query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and softcap is None and dropout == 0


def _flash(query: Tensor, key: Tensor, value: Tensor, documents: Documents, scale: float, window: int | None) -> Tensor:
    """All documents in one launch of FlashAttention."""
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {"scale": scale, "window_size": (-1 if window is None else window - 1, 0)}
    if "enable_gqa" in signature(varlen_attn).parameters:
        options["enable_gqa"] = True
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    bounds = documents.cu_seqlens.to(query.device)
    out = varlen_attn(q, k, v, bounds, bounds, documents.longest, documents.longest, **options)
    return out.unflatten(0, (query.shape[0], query.shape[2]))


def _window(query: Tensor, window: int | None) -> Tensor | None:
    """The boolean mask of a sliding window, or None where the document is no longer than the window."""
    length = query.shape[2]
    if window is None or length <= window:
        return None
    i = torch.arange(length, device=query.device)
    distance = i[:, None] - i[None, :]
    return (distance >= 0) & (distance < window)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    causal: bool,
    dropout: float,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Attention under a boolean mask, under a causal one where that is None and `causal` is set, or over all keys."""
    if softcap is None:
        causal = causal and mask is None
        return scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=causal,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
    scores = softcap * torch.tanh(q @ k.transpose(-1, -2) * (scale / softcap))
    if mask is None and causal:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return nn.functional.dropout(weights, dropout) @ v
