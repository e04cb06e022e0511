"""Mistral: Llama's tensors and llama.cpp's `llama`, which knows no sliding window; the file's context ends there."""

from __future__ import annotations

from whet.export.gguf_architectures.base import Architecture


class Mistral(Architecture):
    """Mistral 7B, Mistral NeMo, Mistral Small."""

    gguf_name = "llama"
    model_type = "mistral"
    ropes = ("default", "linear", "llama3", "yarn", "longrope")
    pairs = True
