"""What the families share: the tensors of a Llama-like decoder, their metadata, and what a subclass may change.

Hugging Face rotates the two halves of a head against each other; llama.cpp's `llama` rotates neighbouring pairs. There
the rows of the q and k projections (and their biases) are reordered within each head: row i of the first half goes to
2i, row i of the second half to 2i + 1. Its other architectures rotate halves too, and take the rows as they are.
Source: llama.cpp's graphs and gguf's `constants.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from gguf import GGUFWriter
from numpy.typing import NDArray

from whet.errors import WhetError
from whet.export.gguf_architectures import rope
from whet.export.gguf_architectures.config import SLIDING, ModelConfig
from whet.export.gguf_architectures.rope import MERGED_INSTEAD

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class SourceTensor:
    """A tensor of the checkpoint: its name there, its name in GGUF, its shape, and what is done to it on the way.

    heads: reorder the rows within so many heads. offset: added to every element.
    """

    source: str
    name: str
    shape: tuple[int, ...]
    heads: int | None = None
    offset: float = 0.0

    def convert(self, x: FloatArray) -> FloatArray:
        """The tensor as the checkpoint holds it -> as llama.cpp computes with it; same shape."""
        if self.heads:
            x = reorder_heads(x, self.heads)
        return x + np.float32(self.offset) if self.offset else x


def reorder_heads(x: FloatArray, heads: int) -> FloatArray:
    """Rows [heads * head_dim, ...] from half-and-half to pairs within each head."""
    return x.reshape(heads, 2, x.shape[0] // heads // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


# Checkpoint's name in a layer -> GGUF's.
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
HEAD_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
PROJECTIONS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


class Architecture:
    """One model of a family, ready to be written. A subclass changes what its family has of its own.

    gguf_name: llama.cpp's name of the architecture. model_type: transformers' name. ropes: the kinds of rope its graph
    computes. partial_rope: it rotates a part of each head where told to. activations: config values that name the one
    it computes. norms, projections: names in a layer, checkpoint -> GGUF. pairs: q and k are rotated in pairs, not
    halves. norm_offset: what the family adds to a norm's weight at run time. slides: its graph has sliding windows.
    wide_heads: heads times their size may differ from the width. text: where the weights of the text model lie in
    transformers. left_out: where those of parts lie that the file does not hold.
    """

    gguf_name: ClassVar[str]
    model_type: ClassVar[str]
    ropes: ClassVar[tuple[str, ...]] = ("default", "linear", "yarn")
    partial_rope: ClassVar[bool] = False
    activations: ClassVar[tuple[str, ...]] = ("silu", "swish")
    norms: ClassVar[dict[str, str]] = NORMS
    projections: ClassVar[dict[str, str]] = PROJECTIONS
    pairs: ClassVar[bool] = False
    norm_offset: ClassVar[float] = 0.0
    slides: ClassVar[bool] = False
    wide_heads: ClassVar[bool] = True
    text: ClassVar[str] = "model."
    left_out: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: ModelConfig):
        self.config = config
        self.check()

    # What gguf.py asks for

    @property
    def context(self) -> int:
        """The longest text, in tokens, that llama.cpp reads as transformers does.

        Where its graph has no sliding window, the window is the longest: up to there every token is in sight.
        """
        window = self.config.window if not self.slides and self._slides_in_transformers() else None
        return min(self.config.context, window or self.config.context)

    @property
    def notes(self) -> list[str]:
        """What llama.cpp does differently from transformers, in sentences for the user."""
        notes, config = [], self.config
        if self.context < config.context:
            notes.append(
                f"llama.cpp has no sliding window for {self.gguf_name}: the file's context is the window, "
                f"{self.context} tokens, not {config.context}; beyond it the answers would not be the model's"
            )
        if config.rope.kind == "longrope" and self.context > config.rope.original_context:
            notes.append(
                f"llama.cpp chooses between the two ropes by the size of the context and not of the text: open it with "
                f"{config.rope.original_context} tokens or fewer unless the texts are longer"
            )
        return notes

    @property
    def embedding(self) -> str:
        """The checkpoint's name of the token embedding."""
        return f"{self.text}embed_tokens.weight"

    def add_metadata(self, writer: GGUFWriter) -> None:
        """Write the keys under the architecture's name."""
        config = self.config
        writer.add_block_count(config.layers)
        writer.add_context_length(self.context)
        writer.add_embedding_length(config.hidden)
        writer.add_feed_forward_length(config.intermediate)
        writer.add_head_count(config.heads)
        writer.add_head_count_kv(config.kv_heads)
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_layer_norm_rms_eps(config.rms_eps)
        writer.add_vocab_size(config.vocab)
        rope.add_rope_metadata(writer, config.rope, config.context)

    def rope_factors(self) -> dict[str, FloatArray]:
        """Tensors that are computed from the config, by GGUF name: divisors of the rope frequencies."""
        return rope.rope_factors(self.config.rope)

    def expected_tensors(self) -> list[SourceTensor]:
        """Every tensor the checkpoint must have, in GGUF's usual order."""
        config = self.config
        tensors = [SourceTensor(self.embedding, "token_embd.weight", (config.vocab, config.hidden))]
        for layer in range(config.layers):
            tensors += self._layer_tensors(layer)
        tensors.append(self._norm(f"{self.text}norm", "output_norm", config.hidden))
        if not config.tied:
            tensors.append(SourceTensor("lm_head.weight", "output.weight", (config.vocab, config.hidden)))
        return tensors

    # What a subclass adds to

    def check(self) -> None:
        """Raise WhetError for what llama.cpp would compute differently."""
        config = self.config
        self.expect("model_type", self.model_type)
        name = "hidden_activation" if "hidden_activation" in config.raw else "hidden_act"
        self.expect(name, *self.activations)
        rope.check_rope(config.rope, self.ropes, config.head_dim, config.where, self.partial_rope)
        if not self.wide_heads and config.heads * config.head_dim != config.hidden:
            self.expect("head_dim", config.hidden // config.heads)

    def expect(self, field: str, *values: Any) -> None:
        """Raise WhetError unless a field of the config has one of the values that llama.cpp computes with."""
        value = self.config.raw.get(field)
        if value not in values:
            wanted = " or ".join(f"{value!r}" for value in values)
            raise WhetError(
                f"llama.cpp's {self.gguf_name} computes with {field} = {wanted}, and the model has {value!r}",
                where=self.config.where,
                fix=MERGED_INSTEAD,
            )

    def biases(self) -> tuple[str, ...]:
        """The projections of a layer that have a bias, by their names in the checkpoint."""
        return ()

    def projection_shapes(self) -> dict[str, tuple[int, int]]:
        """[outputs, inputs] of each projection in a layer, by its name in the checkpoint."""
        c = self.config
        q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
        return {
            "self_attn.q_proj": (q, c.hidden),
            "self_attn.k_proj": (kv, c.hidden),
            "self_attn.v_proj": (kv, c.hidden),
            "self_attn.o_proj": (c.hidden, q),
            "mlp.gate_proj": (c.intermediate, c.hidden),
            "mlp.up_proj": (c.intermediate, c.hidden),
            "mlp.down_proj": (c.hidden, c.intermediate),
        }

    # The tensors of a layer

    def _layer_tensors(self, layer: int) -> list[SourceTensor]:
        at, to = f"{self.text}layers.{layer}.", f"blk.{layer}."
        shapes, biases = self.projection_shapes(), self.biases()
        tensors = [
            self._norm(at + name, to + gguf, self.config.head_dim if name in HEAD_NORMS else self.config.hidden)
            for name, gguf in self.norms.items()
        ]
        for name, gguf in self.projections.items():
            heads = self._reordered_heads(gguf)
            tensors.append(SourceTensor(f"{at}{name}.weight", f"{to}{gguf}.weight", shapes[name], heads))
            if name in biases:
                tensors.append(SourceTensor(f"{at}{name}.bias", f"{to}{gguf}.bias", shapes[name][:1], heads))
        return tensors

    def _norm(self, source: str, name: str, size: int) -> SourceTensor:
        return SourceTensor(f"{source}.weight", f"{name}.weight", (size,), offset=self.norm_offset)

    def _reordered_heads(self, projection: str) -> int | None:
        heads = {"attn_q": self.config.heads, "attn_k": self.config.kv_heads}
        return heads.get(projection) if self.pairs else None

    def _slides_in_transformers(self) -> bool:
        """Whether a window of the config is in use: layers that all slide are not listed."""
        return self.config.window is not None and (not self.config.layer_types or SLIDING in self.config.layer_types)
