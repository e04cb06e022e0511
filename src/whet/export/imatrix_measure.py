"""Measure an importance matrix: run text through a model, and sum the squares of what enters each of its matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from whet.errors import WhetError
from whet.export.gguf_architectures import architecture_of
from whet.export.imatrix import Imatrix

# A text shorter than this says little about its tokens; llama.cpp leaves such batches out too.
_SHORTEST = 16


def measure_imatrix(
    model_dir: Path,
    texts: Iterable[str],
    *,
    chunk_size: int = 512,
    max_chunks: int | None = None,
    device: str | None = None,
    dataset: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> Imatrix:
    """The importance matrix of the model in `model_dir`, from texts like those it will be asked.

    texts: chats as rendered by the template, or plain text. They are put end to end and cut into chunks of `chunk_size`
    tokens, each beginning with the BOS token where the tokenizer adds one. max_chunks: how many to read; None reads
    all. device: "cpu" (computes in fp32) or "cuda" (in bf16); None takes a GPU where there is one. dataset: a name for
    the texts, kept in the file. progress: called with the chunks done.
    Raises WhetError where the texts are too short, or the model computes something that is not finite.
    """
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    chunks = list(islice(_chunks(tokenizer, texts, chunk_size), max_chunks))
    if not chunks:
        raise WhetError(
            f"the calibration texts have fewer than {_SHORTEST} tokens", where="texts", fix="give more text"
        )
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, local_files_only=True, use_safetensors=True)
    nn.Module.to(model, where)
    sums = _sums(model, _matrices(model_dir), chunks, progress)
    tokens = sum(map(len, chunks))
    return Imatrix(
        sums={name: value.cpu().numpy().astype(np.float32) for name, value in sums.items()},
        counts=dict.fromkeys(sums, tokens),
        chunks=len(chunks),
        chunk_size=chunk_size,
        datasets=[dataset] if dataset else [],
    )


def _matrices(model_dir: Path) -> dict[str, str]:
    """Module in transformers -> GGUF tensor, of every matrix in the layers. llama.cpp measures no others either."""
    return {
        tensor.source.removesuffix(".weight"): tensor.name
        for tensor in architecture_of(model_dir).expected_tensors()
        if len(tensor.shape) == 2 and tensor.name.startswith("blk.")
    }


def _chunks(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], size: int) -> Iterator[list[int]]:
    bos = [tokenizer.bos_token_id] if _adds_bos(tokenizer) else []
    waiting: list[int] = []
    short = True  # until a whole chunk was given
    for text in texts:
        waiting += tokenizer(text, add_special_tokens=False)["input_ids"]
        while len(waiting) >= size - len(bos):
            yield bos + waiting[: size - len(bos)]
            del waiting[: size - len(bos)]
            short = False
    if short and len(bos + waiting) >= _SHORTEST:
        yield bos + waiting


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


@torch.no_grad()
def _sums(
    model: nn.Module, matrices: dict[str, str], chunks: list[list[int]], progress: Callable[[int], None] | None
) -> dict[str, Tensor]:
    """GGUF tensor -> sum over all tokens of x^2, [cols] in fp64: x enters the module."""
    base: Any = model.base_model  # without the head, which is not measured
    device = next(model.parameters()).device
    sums: dict[str, Tensor] = {}

    def listen(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def add(module: nn.Module, args: tuple[Any, ...]) -> None:
            squares = args[0].detach().flatten(0, -2).float().square().sum(0).double()
            sums[name] = sums[name] + squares if name in sums else squares

        return add

    handles = [model.get_submodule(source).register_forward_pre_hook(listen(name)) for source, name in matrices.items()]
    try:
        for done, chunk in enumerate(chunks, 1):
            base(torch.tensor([chunk], device=device), use_cache=False)
            if progress:
                progress(done)
    finally:
        for handle in handles:
            handle.remove()
    for name, value in sums.items():
        if not value.isfinite().all():
            raise WhetError(
                f"what enters {name} is not finite", where="the calibration texts", fix="check the model's weights"
            )
    return sums
