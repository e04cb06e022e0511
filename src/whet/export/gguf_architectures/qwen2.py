"""Qwen2 and 2.5: biases on q, k and v. llama.cpp's graph has no sliding window for it."""

from __future__ import annotations

from whet.export.gguf_architectures.base import Architecture


class Qwen2(Architecture):
    """Qwen2, Qwen2.5."""

    gguf_name = "qwen2"
    model_type = "qwen2"
    wide_heads = False

    def biases(self) -> tuple[str, ...]:
        return ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
