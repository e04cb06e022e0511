"""Gemma 3, text: Gemma 2's norms, q and k normed, five layers of six with a sliding window and a rope of their own.

Scores are not capped. That the sliding layers' rope is not stretched is built into llama.cpp. Models that also read
images have the same text model, which is what the file holds.
"""

from __future__ import annotations

from typing import ClassVar

from gguf import GGUFWriter

from whet.export.gguf_architectures.base import HEAD_NORMS
from whet.export.gguf_architectures.gemma2 import Gemma
from whet.export.gguf_architectures.rope import Rope, check_rope


class Gemma3(Gemma):
    """Gemma 3 of 270M and 1B, and the text part of 4B, 12B and 27B saved on its own."""

    gguf_name = "gemma3"
    model_type = "gemma3_text"
    norms = Gemma.norms | HEAD_NORMS
    period = 6
    layers_of_27b = 62

    @property
    def local_rope(self) -> Rope:
        """The rope of the sliding layers."""
        assert self.config.local_rope is not None, "transformers gives every Gemma 3 config both"
        return self.config.local_rope

    def check(self) -> None:
        super().check()
        self.expect("attn_logit_softcapping", None)
        check_rope(self.local_rope, ("default",), self.config.head_dim, self.config.where)

    def add_metadata(self, writer: GGUFWriter) -> None:
        super().add_metadata(writer)
        writer.add_rope_freq_base_swa(self.local_rope.base)
        if cap := self.config.raw["final_logit_softcapping"]:
            writer.add_final_logit_softcapping(cap)


class Gemma3WithImages(Gemma3):
    """Gemma 3 of 4B, 12B and 27B as published: a text model, and a vision tower before it, which is left out."""

    text: ClassVar[str] = "model.language_model."
    left_out: ClassVar[tuple[str, ...]] = ("model.vision_tower.", "model.multi_modal_projector.")

    @property
    def notes(self) -> list[str]:
        return [*super().notes, "the vision tower is left out: the file holds the text model, which reads no images"]
