"""Llama: the plain one. q and k in pairs, biases where the config asks for them."""

from __future__ import annotations

from whet.export.gguf_architectures.base import Architecture


class Llama(Architecture):
    """Llama 2, 3, 3.1, 3.2, and what shares their class."""

    gguf_name = "llama"
    model_type = "llama"
    ropes = ("default", "linear", "llama3", "yarn", "longrope")
    pairs = True

    def biases(self) -> tuple[str, ...]:
        asked = {"attention_bias": "self_attn.", "mlp_bias": "mlp."}
        prefixes = tuple(prefix for field, prefix in asked.items() if self.config.raw[field])
        return tuple(name for name in self.projections if name.startswith(prefixes)) if prefixes else ()
