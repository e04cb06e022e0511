"""The in-process engine on one GPU, without HTTP, beside transformers' continuous batching: bench/results/engine.jsonl.

    python bench/engine_speed.py [--model 1b] [--requests 256] [--tokens 128]

Random weights in the shape of a real model, in bf16; prompts of 64 to 512 random tokens, all there at once, greedy
answers of exactly `--tokens` tokens. One warm-up of each, then ROUNDS rounds, the best of each.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from pathlib import Path
from typing import Any

import torch
from checkpoint import checkpoint
from environment import ROOT, origin
from transformers import AutoModelForCausalLM, GenerationConfig

from whet.serve.engines.in_process.engine import InProcessEngine
from whet.serve.engines.in_process.settings import Settings
from whet.serve.interface import Request, Sampling

ROUNDS = 3
END = 2  # never drawn: all answers have one length


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="1b")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "engine.jsonl")
    asked = parser.parse_args()
    folder = checkpoint(asked.model, ROOT / "build" / "bench-models" / asked.model)
    draw = random.Random(0)
    prompts = [[draw.randrange(3, 8000) for _ in range(draw.randrange(64, 513))] for _ in range(asked.requests)]
    measured = {
        "whet": asyncio.run(whet(folder, prompts, asked.tokens)),
        "transformers, continuous batching": transformers(folder, prompts, asked.tokens),
    }
    for engine, seconds in measured.items():
        line = {
            "kind": "engine",
            "engine": engine,
            "model": asked.model,
            "requests": len(prompts),
            "prompt_tokens": sum(map(len, prompts)),
            "tokens": asked.tokens * len(prompts),
            "seconds": [round(value, 3) for value in seconds],
            "tokens_a_second": round(asked.tokens * len(prompts) / min(seconds), 1),
        }
        print(line, flush=True)
        with open(asked.out, "a", encoding="utf-8") as file:
            file.write(json.dumps(line | origin()) + "\n")


async def whet(folder: Path, prompts: list[list[int]], tokens: int) -> list[float]:
    engine = InProcessEngine(folder, settings=Settings(max_running=len(prompts), dtype="bfloat16", context=2048))
    await engine.start()
    name = engine.models()[0].name
    sampling = Sampling(max_tokens=tokens, temperature=0.0, logit_bias={END: -1e4})

    async def answer(prompt: list[int]) -> int:
        drawn = 0
        async for piece in engine.generate(Request(name, sampling, prompt=prompt)):
            drawn = piece.completion_tokens or drawn
        return drawn

    seconds = []
    try:
        for _ in range(ROUNDS + 1):
            start = time.perf_counter()
            drawn = await asyncio.gather(*(answer(prompt) for prompt in prompts))
            seconds.append(time.perf_counter() - start)
            assert sum(drawn) == tokens * len(prompts), sum(drawn)
    finally:
        await engine.stop()
    torch.cuda.empty_cache()
    return seconds[1:]


def transformers(folder: Path, prompts: list[list[int]], tokens: int) -> list[float]:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="paged|sdpa")
    model = model.cuda().eval()
    config = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    seconds = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        outputs = model.generate_batch(inputs=prompts, generation_config=config)
        seconds.append(time.perf_counter() - start)
        drawn = sum(len(output.generated_tokens) for output in outputs.values())
        assert drawn == tokens * len(prompts), drawn
    return seconds[1:]


if __name__ == "__main__":
    main()
