"""Phi-3 and Phi-4: q, k and v in one projection, gate and up in another; rope over a part of each head, and longrope.

llama.cpp has Phi-3's sliding window turned off, so the file's context ends there; the window is written all the same,
for versions that have it.
"""

from __future__ import annotations

from typing import ClassVar

from gguf import GGUFWriter

from whet.export.gguf_architectures.base import Architecture


class Phi3(Architecture):
    """Phi-3-mini and -medium, Phi-3.5-mini, Phi-4 and Phi-4-mini."""

    gguf_name = "phi3"
    model_type = "phi3"
    ropes = ("default", "longrope")
    partial_rope = True
    wide_heads = False
    projections: ClassVar[dict[str, str]] = {
        "self_attn.qkv_proj": "attn_qkv",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }

    def projection_shapes(self) -> dict[str, tuple[int, int]]:
        c = self.config
        q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
        return {
            "self_attn.qkv_proj": (q + 2 * kv, c.hidden),
            "self_attn.o_proj": (c.hidden, q),
            "mlp.gate_up_proj": (2 * c.intermediate, c.hidden),
            "mlp.down_proj": (c.hidden, c.intermediate),
        }

    def add_metadata(self, writer: GGUFWriter) -> None:
        super().add_metadata(writer)
        writer.add_sliding_window(self.config.window or 0)
