"""Engines for the tests of the in-process engine, and their models: tiny, random, of several families."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from whet.serve.engines.in_process.engine import InProcessEngine
from whet.serve.engines.in_process.settings import Settings
from whet.serve.interface import Piece, Request, Sampling

Answer = TypeVar("Answer")
GREEDY = {"temperature": 0.0}
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # wide, so that the likeliest token stands well apart
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 2,
}
FAMILIES: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "mistral": (MistralConfig, {"sliding_window": 24}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {}),
    "gemma2": (Gemma2Config, {"sliding_window": 24, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0}),
    "gemma3": (Gemma3TextConfig, {"sliding_window": 24, "query_pre_attn_scalar": 16}),
    "phi3": (Phi3Config, {"tie_word_embeddings": False}),
}


def save(folder: Path, tokenizer_folder: Path, family: str = "llama", seed: int = 0, **changes: Any) -> Path:
    """A random model of a family, with the tokenizer of another folder."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    config, special = FAMILIES[family]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config(**{"vocab_size": 512, **SIZES, **special, **changes}))
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def reference(folder: Path, prompts: Sequence[list[int]], tokens: int) -> list[list[int]]:
    """The greedy answers of transformers, one prompt at a time, their end tokens included."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    return [greedy(model, prompt, tokens) for prompt in prompts]


def greedy(model: Any, prompt: list[int], tokens: int) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=2,
        pad_token_id=0,
    )
    answer: list[int] = out[0, len(prompt) :].tolist()
    return answer


@asynccontextmanager
async def running(folder: Path | str, **options: Any) -> AsyncIterator[InProcessEngine]:
    settings = Settings(**{"cache_bytes": 16 << 20, "max_running": 8, **options.pop("settings", {})})
    engine = InProcessEngine(folder, name="base", settings=settings, **options)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


def with_engine(folder: Path | str, use: Callable[[InProcessEngine], Awaitable[Answer]], **options: Any) -> Answer:
    """What `use` returns, given a running engine."""

    async def run() -> Answer:
        async with running(folder, **options) as engine:
            return await asyncio.wait_for(use(engine), 300)

    return asyncio.run(run())


def ask(prompt: str | list[int], model: str = "base", max_tokens: int = 20, **sampling: Any) -> Request:
    return Request(model, Sampling(max_tokens=max_tokens, **{**GREEDY, **sampling}), prompt=prompt)


async def pieces(engine: InProcessEngine, request: Request) -> list[Piece]:
    return [piece async for piece in engine.generate(request)]


async def text(engine: InProcessEngine, request: Request) -> str:
    return "".join(piece.text for piece in await pieces(engine, request))


async def token_bytes(engine: InProcessEngine, request: Request) -> list[bytes]:
    """The answer's tokens, as bytes, through its log-probabilities; without the end token."""
    asked = Request(request.model, _with_logprobs(request.sampling), prompt=request.prompt)
    return [entry.bytes for piece in await pieces(engine, asked) for entry in piece.logprobs]


def _with_logprobs(sampling: Sampling) -> Sampling:
    return replace(sampling, logprobs=0)
