"""Gemma 2: norms before and after attention and MLP, every other layer with a sliding window, capped scores and logits.

transformers multiplies by 1 + w in a norm and llama.cpp by what it reads, so 1 is added. llama.cpp scales the
embedding by sqrt(hidden) itself. It has the scale of the scores and the order of the layers built in too, so a config
with others is refused. Source: llama.cpp's `gemma2` graph.
"""

from __future__ import annotations

from typing import ClassVar

from gguf import GGUFWriter

from whet.errors import WhetError
from whet.export.gguf_architectures.base import Architecture
from whet.export.gguf_architectures.config import FULL, SLIDING
from whet.export.gguf_architectures.rope import MERGED_INSTEAD


class Gemma(Architecture):
    """What Gemma 2 and 3 share.

    period: layers in a group; all but its last have the window. layers_of_27b: how llama.cpp recognises that model,
    whose scores have a scale of their own.
    """

    ropes = ("default", "linear")
    activations = ("gelu_pytorch_tanh",)
    norms: ClassVar[dict[str, str]] = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    }
    norm_offset = 1.0
    slides = True
    period: ClassVar[int]
    layers_of_27b: ClassVar[int]

    def check(self) -> None:
        super().check()
        c = self.config
        self.expect("attention_bias", False, None)
        self.expect("use_bidirectional_attention", False, None)
        self.expect("query_pre_attn_scalar", c.hidden // c.heads if c.layers == self.layers_of_27b else c.head_dim)
        last = self.period - 1
        built_in = tuple(FULL if layer % self.period == last else SLIDING for layer in range(c.layers))
        if c.layer_types != built_in or c.window is None:
            raise WhetError(
                f"llama.cpp's {self.gguf_name} slides a window in all but the last of every {self.period} layers, and "
                f"the model has sliding_window = {c.window}, layer_types = {', '.join(c.layer_types)}",
                where=c.where,
                fix=MERGED_INSTEAD,
            )

    def add_metadata(self, writer: GGUFWriter) -> None:
        super().add_metadata(writer)
        assert self.config.window is not None  # checked
        writer.add_sliding_window(self.config.window)


class Gemma2(Gemma):
    """Gemma 2 of 2B, 9B and 27B."""

    gguf_name = "gemma2"
    model_type = "gemma2"
    period = 2
    layers_of_27b = 46

    def check(self) -> None:
        super().check()
        self.expect("tie_word_embeddings", True)
        for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
            if not self.config.raw[cap]:
                what = f"llama.cpp's gemma2 cannot do without {cap}"
                raise WhetError(what, where=self.config.where, fix=MERGED_INSTEAD)

    def add_metadata(self, writer: GGUFWriter) -> None:
        super().add_metadata(writer)
        writer.add_attn_logit_softcapping(self.config.raw["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(self.config.raw["final_logit_softcapping"])
