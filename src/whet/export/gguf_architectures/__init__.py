"""The model families that whet writes as GGUF, one file each.

A family says how a Hugging Face checkpoint is told to llama.cpp: metadata, tensor names and shapes, and what is done
to the weights on the way. What llama.cpp would compute differently is refused, or bounded and noted.
"""

from __future__ import annotations

from pathlib import Path

from whet.errors import WhetError
from whet.export.gguf_architectures.base import Architecture, SourceTensor
from whet.export.gguf_architectures.config import ModelConfig, architecture_name, read_config
from whet.export.gguf_architectures.gemma2 import Gemma2
from whet.export.gguf_architectures.gemma3 import Gemma3, Gemma3WithImages
from whet.export.gguf_architectures.llama import Llama
from whet.export.gguf_architectures.mistral import Mistral
from whet.export.gguf_architectures.phi3 import Phi3
from whet.export.gguf_architectures.qwen2 import Qwen2
from whet.export.gguf_architectures.qwen3 import Qwen3

__all__ = ["ARCHITECTURES", "Architecture", "ModelConfig", "SourceTensor", "architecture_of"]

# The class name in config.json's `architectures` -> the family.
ARCHITECTURES: dict[str, type[Architecture]] = {
    "LlamaForCausalLM": Llama,
    "MistralForCausalLM": Mistral,
    "Qwen2ForCausalLM": Qwen2,
    "Qwen3ForCausalLM": Qwen3,
    "Gemma2ForCausalLM": Gemma2,
    "Gemma3ForCausalLM": Gemma3,
    "Phi3ForCausalLM": Phi3,
    "Gemma3ForConditionalGeneration": Gemma3WithImages,
}


def architecture_of(model_dir: Path) -> Architecture:
    """The family of the model in `model_dir`, its config read and checked.

    Raises WhetError for a model that llama.cpp would not compute as transformers does.
    """
    name = architecture_name(model_dir)
    if name not in ARCHITECTURES:
        raise WhetError(
            f"whet cannot write GGUF for the architecture {name or 'that config.json leaves out'}",
            where=str(Path(model_dir) / "config.json"),
            fix=f"export one of {', '.join(ARCHITECTURES)}",
        )
    return ARCHITECTURES[name](read_config(model_dir))
