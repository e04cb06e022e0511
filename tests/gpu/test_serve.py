"""The in-process engine on a GPU: the same answers as transformers', however many are made at once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from whet.models.load import resolve
from whet.serve.engines.in_process.engine import InProcessEngine
from whet.serve.engines.in_process.settings import Settings
from whet.serve.interface import Request, Sampling

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

Result = TypeVar("Result")
QUESTIONS = [f"{'Say something long. ' * (i % 9)}Write {i % 5 + 1} sentences about the number {i}." for i in range(40)]
TOKENS = 24


def with_engine(use: Callable[[InProcessEngine], Awaitable[Result]], **settings: Any) -> Result:
    async def run() -> Result:
        chosen = Settings(**{"cache_bytes": 64 << 20, "dtype": "float32", **settings})
        engine = InProcessEngine("builtin:tiny", name="base", settings=chosen)
        await engine.start()
        try:
            assert engine._runner.device.type == "cuda"
            return await asyncio.wait_for(use(engine), 300)
        finally:
            await engine.stop()

    return asyncio.run(run())


async def answer(engine: InProcessEngine, question: str, **sampling: Any) -> str:
    asked = Request("base", Sampling(max_tokens=TOKENS, **sampling), messages=[{"role": "user", "content": question}])
    return "".join([piece.text async for piece in engine.generate(asked)])


async def answers(engine: InProcessEngine, **sampling: Any) -> list[str]:
    return list(await asyncio.gather(*(answer(engine, question, **sampling) for question in QUESTIONS)))


def test_greedy_answers_at_once_are_those_of_transformers() -> None:
    folder = resolve("builtin:tiny")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).cuda().eval()
    expected = []
    for question in QUESTIONS:
        asked = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(
            asked, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to("cuda")
        out = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
        expected.append(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    assert with_engine(lambda engine: answers(engine, temperature=0.0)) == expected


def test_a_seed_makes_an_answer_again_whatever_runs_beside_it() -> None:
    async def both(engine: InProcessEngine) -> tuple[list[str], list[str]]:
        together = await answers(engine, temperature=1.0, seed=5)
        return together, [await answer(engine, question, temperature=1.0, seed=5) for question in QUESTIONS[:8]]

    together, alone = with_engine(both)
    assert together[:8] == alone


def test_nothing_is_held_when_all_have_left() -> None:
    """Catches pages of the cache that stay taken: half of the clients leave in the middle of their answers."""

    async def leave(engine: InProcessEngine) -> dict[str, float]:
        async def left(question: str) -> None:
            asked = Request("base", Sampling(max_tokens=200), messages=[{"role": "user", "content": question}])
            stream = engine.generate(asked)
            await anext(stream)
            await stream.aclose()  # type: ignore[attr-defined]

        await asyncio.gather(*(left(question) for question in QUESTIONS[::2]), answers(engine))
        while engine.load()["running"]:
            await asyncio.sleep(0.01)
        return engine.load()

    load = with_engine(leave)
    assert (load["waiting"], load["cache_used"]) == (0, 0)
