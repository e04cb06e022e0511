"""Qwen3, dense: each head of q and k is normed before it is rotated. No biases, no sliding window in llama.cpp."""

from __future__ import annotations

from whet.export.gguf_architectures.base import HEAD_NORMS, NORMS, Architecture


class Qwen3(Architecture):
    """Qwen3 of 0.6B to 32B."""

    gguf_name = "qwen3"
    model_type = "qwen3"
    norms = NORMS | HEAD_NORMS

    def check(self) -> None:
        super().check()
        self.expect("attention_bias", False, None)
