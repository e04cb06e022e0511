"""Random weights in the shape of a real model, with a small tokenizer.

Speed and memory do not depend on what was learnt. Shapes are those of Llama 3.1 8B and Llama 3.2 1B, and one that a CPU
trains in seconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

SHAPES: dict[str, dict[str, Any]] = {
    "8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
    },
    "1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
    },
}
SPECIAL = ["<pad>", "<s>", "</s>"]


def checkpoint(name: str, folder: Path) -> Path:
    """`name` where that is a folder; else the shape of that name, written into `folder` unless it is there already."""
    if name not in SHAPES:
        return Path(name)
    if not (folder / "config.json").is_file():
        partial = folder.with_name(f"{folder.name}.partial")
        _write(name, partial)
        partial.rename(folder)
    return folder


def _write(name: str, folder: Path) -> None:
    config = LlamaConfig(
        **SHAPES[name],
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        rms_norm_eps=1e-5,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    _tokenizer(min(8000, config.vocab_size)).save_pretrained(folder)
    model.save_pretrained(folder, max_shard_size="5GB")


def _tokenizer(size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of at most `size` tokens, trained on torch's own source."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    sources = sorted(str(path) for path in (Path(torch.__file__).parent / "nn").rglob("*.py"))[:60]
    bpe.train(sources, trainers.BpeTrainer(vocab_size=size, special_tokens=SPECIAL, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
