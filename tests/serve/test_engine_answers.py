"""The in-process engine's greedy answers are those of transformers alone, whatever else runs beside them."""

from __future__ import annotations

import asyncio
import functools
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.serve.engines import FAMILIES, ask, pieces, reference, save, text, with_engine
from whet.serve.engines.in_process.engine import InProcessEngine
from whet.serve.engines.in_process.pages import PAGE

PROMPTS = [
    [5, 6, 7],
    list(range(40, 100)),  # longer than the sliding windows
    [9],
    list(range(300, 332)),
    list(range(100, 117)),
]


@pytest.fixture(scope="module")
def llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("llama"), tiny_llama)


@functools.cache
def expected(folder: Path, tokens: int = 24) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    answers = reference(folder, PROMPTS, tokens)
    return [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]


async def all_at_once(engine: InProcessEngine, tokens: int = 24) -> list[str]:
    return list(await asyncio.gather(*(text(engine, ask(prompt, max_tokens=tokens)) for prompt in PROMPTS)))


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_in_a_batch_are_those_of_transformers_alone(family: str, tiny_llama: Path, tmp_path: Path) -> None:
    """Catches a wrong position, window, soft cap or head order, and keys read from a neighbour's pages."""
    folder = save(tmp_path, tiny_llama, family)
    assert with_engine(folder, all_at_once) == expected(folder)


def test_a_prompt_read_in_chunks_gives_the_same_answer(llama: Path) -> None:
    """Catches a chunk that does not see the chunks before it, or sees its own later tokens."""
    assert with_engine(llama, all_at_once, settings={"step_tokens": 7}) == expected(llama)


def test_answers_survive_a_lack_of_pages(llama: Path) -> None:
    """Catches a sequence that goes on with another's keys after its own pages were taken for older ones."""
    token = 3 * 2 * 2 * 16 * 4  # bytes: layers, keys and values, heads, width, fp32
    steps = []

    async def use(engine: InProcessEngine) -> list[str]:
        answers = await all_at_once(engine, 40)
        steps.append(engine.load())
        return answers

    tight = {"cache_bytes": 8 * PAGE * token, "context": 128}
    assert with_engine(llama, use, settings=tight) == expected(llama, 40)
    assert steps[0]["prompt_tokens"] == sum(map(len, PROMPTS))
    assert steps[0]["recomputed_tokens"] > 0, "the cache was not too small for them all"
    assert steps[0]["cache_used"] == 0


def test_more_answers_than_places_take_turns(llama: Path) -> None:
    """Catches a request that waits for ever, and a row that is handed out twice."""
    assert with_engine(llama, all_at_once, settings={"max_running": 2}) == expected(llama)


def test_a_late_request_joins_a_running_batch(llama: Path) -> None:
    """Catches a batch that is closed until its longest answer ends."""

    async def use(engine: InProcessEngine) -> tuple[int, str, str]:
        long = asyncio.create_task(pieces(engine, ask(PROMPTS[0], max_tokens=100, logit_bias={2: -100.0})))
        while engine.load().get("completion_tokens", 0) < 5:
            await asyncio.sleep(0.001)
        short = await text(engine, ask(PROMPTS[3], max_tokens=24))
        before = long.done()
        last = (await long)[-1]
        return before, short, str(last.completion_tokens)

    assert with_engine(llama, use) == (False, expected(llama)[3], "100")


def test_counts_and_reasons_to_finish(llama: Path) -> None:
    """Catches a count that leaves out the end token, and an answer cut at the limit that claims to have ended."""
    (answer,) = reference(llama, PROMPTS[:1], 24)
    assert 2 not in answer, "the model has to go on, for the other half of this test to force its end"

    async def use(engine: InProcessEngine) -> list[tuple[str | None, int, int]]:
        cut = (await pieces(engine, ask(PROMPTS[0], max_tokens=24)))[-1]
        ended = (await pieces(engine, ask(PROMPTS[0], logit_bias={2: 100.0})))[-1]
        full = (await pieces(engine, ask(list(range(30, 270)), max_tokens=1000, logit_bias={2: -100.0})))[-1]
        return [(last.finish, last.prompt_tokens, last.completion_tokens) for last in (cut, ended, full)]

    assert with_engine(llama, use) == [("length", 3, 24), ("stop", 3, 1), ("length", 240, 16)]
