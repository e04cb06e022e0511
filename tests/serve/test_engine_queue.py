"""Requests that come, wait, leave and fail: what the in-process engine holds for them, and for how long."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tests.serve.engines import ask, pieces, running, save, text, with_engine
from whet.errors import WhetError
from whet.serve.engines.in_process import open_engine
from whet.serve.engines.in_process.engine import InProcessEngine
from whet.serve.engines.in_process.pages import PAGE, Capacity, PageTable, pages_for
from whet.serve.engines.mailbox import merged
from whet.serve.interface import Busy, EngineDown, Refused, Request, Sampling, UnknownModel

LONG = {"max_tokens": 200, "logit_bias": {2: -100.0}}
USER = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def model(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("model"), tiny_llama)


async def until(true: Callable[[], bool]) -> None:
    while not true():
        await asyncio.sleep(0.001)


async def empty(engine: InProcessEngine) -> None:
    """Returns once no row and no page is held."""
    await until(lambda: not engine.load()["running"] and not engine.load()["waiting"])
    assert engine.load()["cache_used"] == 0


def test_a_full_queue_is_busy(model: Path) -> None:
    """Catches a queue without a bound, and a place that is not given back."""

    async def use(engine: InProcessEngine) -> float:
        tasks = [asyncio.create_task(text(engine, ask([5 + i], **LONG))) for i in range(3)]
        await until(lambda: engine.load()["waiting"] == 2)
        with pytest.raises(Busy) as busy:
            await text(engine, ask([9]))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await empty(engine)
        await text(engine, ask([9]))
        return busy.value.retry_after

    assert with_engine(model, use, settings={"max_running": 1, "max_waiting": 2}) >= 1


def test_closing_an_answer_frees_its_place_at_once(model: Path) -> None:
    """Catches a slot that runs on to max_tokens for a client that has left."""

    async def use(engine: InProcessEngine) -> int:
        answer = engine.generate(ask([5], **LONG))
        await anext(answer)
        await answer.aclose()  # type: ignore[attr-defined]
        await empty(engine)
        return int(engine.load()["completion_tokens"])

    assert with_engine(model, use) < 150


def test_a_cancelled_reader_frees_its_place(model: Path) -> None:
    """Catches a task cancelled before its first piece, while it waits or while it runs, that leaves a sequence."""

    async def use(engine: InProcessEngine) -> None:
        for wait in (0.0, 0.0, 0.002, 0.02):
            task = asyncio.create_task(text(engine, ask(list(range(5, 200)), **LONG)))
            await asyncio.sleep(wait)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await empty(engine)

    with_engine(model, use, settings={"step_tokens": 16})


def test_a_slow_reader_holds_nobody_up_and_loses_nothing(model: Path) -> None:
    """Catches a batch that waits for its slowest reader, and pieces dropped for it."""

    async def use(engine: InProcessEngine) -> tuple[str, str]:
        slow = engine.generate(ask([5, 6], **LONG))
        first = await anext(slow)
        quick = await text(engine, ask([5, 6], **LONG))  # as long, and read to its end meanwhile
        await empty(engine)
        rest = [piece async for piece in slow]
        assert len(rest) == 1
        return first.text + rest[0].text, quick

    slow, quick = with_engine(model, use)
    assert slow == quick


def test_stopping_ends_what_runs_and_what_waits(model: Path) -> None:
    """Catches a reader that waits for ever, and a thread left behind."""

    async def use() -> list[Any]:
        async with running(model, settings={"max_running": 1}) as engine:
            tasks = [asyncio.create_task(text(engine, ask([5 + i], **LONG))) for i in range(3)]
            await until(lambda: engine.load()["completion_tokens"] > 0)
        ended = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)
        with pytest.raises(EngineDown):
            await text(engine, ask([5]))
        return ended

    assert [type(answer) for answer in asyncio.run(use())] == [EngineDown] * 3


def test_a_forward_pass_that_fails_ends_its_own_answers_alone(model: Path) -> None:
    """Catches a thread that dies of an exception and hangs all who wait, then and later."""

    async def use(engine: InProcessEngine) -> tuple[str, str]:
        before = await text(engine, ask([5, 6]))
        layer = engine._runner.model.get_submodule("model.layers.1")

        def fail(*_: Any) -> None:
            raise RuntimeError("out of memory, for one")

        hook = layer.register_forward_pre_hook(fail)
        with pytest.raises(EngineDown):
            await text(engine, ask([5, 6]))
        hook.remove()
        await empty(engine)
        return before, await text(engine, ask([5, 6]))

    before, after = with_engine(model, use)
    assert before == after


def test_what_is_no_number_stays_with_its_own_answer(model: Path) -> None:
    """Catches keys that are no numbers left in a page for whoever gets it next: 0 * nan is nan behind every mask."""

    async def use(engine: InProcessEngine) -> tuple[str, str]:
        prompt = list(range(5, 5 + PAGE // 2))
        before = await text(engine, ask(prompt))
        projection = engine._runner.model.get_submodule("model.layers.1.self_attn.v_proj")
        hook = projection.register_forward_hook(lambda module, args, output: output * float("nan"))
        with pytest.raises(EngineDown):
            await text(engine, ask(list(range(5, 5 + PAGE))))
        hook.remove()
        return before, await text(engine, ask(prompt))

    before, after = with_engine(model, use)
    assert before == after


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        (ask(list(range(5, 261))), "prompt"),
        (ask([]), "prompt"),
        (ask(""), "prompt"),
        (ask([512]), "prompt"),
        (ask([-1]), "prompt"),
        (Request("base", Sampling(5), messages=[{"role": "user", "content": "x " * 600}]), "messages"),
        (Request("base", Sampling(5), messages=[]), "messages"),
        (Request("base", Sampling(5), messages=[{"role": "user", "content": [{"type": "image_url"}]}]), "messages"),
        (Request("base", Sampling(5), messages=[{"role": "user", "content": 5}]), "messages"),
    ],
)
def test_a_prompt_that_can_not_be_read_is_refused(model: Path, request_: Request, param: str) -> None:
    """Catches a fault of one client that reaches the engine's thread."""
    with pytest.raises(Refused) as refused:
        with_engine(model, lambda engine: pieces(engine, request_))
    assert refused.value.param == param


def test_an_unknown_model_is_told_apart(model: Path) -> None:
    with pytest.raises(UnknownModel):
        with_engine(model, lambda engine: text(engine, ask([5], "other")))


def test_messages_come_through_the_model_s_own_template(model: Path) -> None:
    """Catches a prompt that is not what training rendered, and parts of content joined by something."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompt = tokenizer.apply_chat_template(USER, add_generation_prompt=True, tokenize=True)["input_ids"]
    parts = [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}]

    async def use(engine: InProcessEngine) -> list[Any]:
        asked = [Request("base", Sampling(9, temperature=0), messages=messages) for messages in (USER, parts)]
        return [merged(await pieces(engine, request)) for request in [*asked, ask(prompt, max_tokens=9)]]

    chat, in_parts, ids = with_engine(model, use)
    assert chat == in_parts == ids
    assert chat.prompt_tokens == len(prompt)


def test_a_template_s_refusal_tells_no_path(tiny_llama: Path, tmp_path: Path) -> None:
    """Catches the folder of the model, and so the machine's users and mounts, in an error that a client gets."""
    folder = save(tmp_path / "mounted", tiny_llama)
    (folder / "chat_template.jinja").write_text("{{ raise_exception('turns have to alternate') }}")
    with pytest.raises(Refused, match="turns have to alternate") as refused:
        with_engine(folder, lambda engine: pieces(engine, Request("base", Sampling(5), messages=USER)))
    assert "mounted" not in str(refused.value)


def test_special_tokens_show_only_where_tools_are_asked_for(model: Path) -> None:
    """Catches a tool call whose marker is a special token and is lost, and markers in plain answers."""
    plain = Request("base", Sampling(2, temperature=0, logit_bias={1: 100.0}), messages=USER)  # 1: <|im_start|>
    with_tools = replace(plain, tools=[{"type": "function", "function": {"name": "f"}}])

    async def use(engine: InProcessEngine) -> list[str]:
        return [await text(engine, plain), await text(engine, with_tools)]

    assert with_engine(model, use) == ["", "<|im_start|>" * 2]


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "dynamic rope")],
    ids=["dynamic"],
)
def test_a_model_that_pages_can_not_serve_is_refused(
    tiny_llama: Path, tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    """Catches wrong answers from an architecture that needs more than keys by position."""
    folder = save(tmp_path, tiny_llama, **changes)
    with pytest.raises(WhetError, match=says):
        with_engine(folder, lambda engine: text(engine, ask([5])))


def test_a_cache_too_small_is_refused_and_a_small_one_shortens_the_context(model: Path) -> None:
    """Catches a context that the pages can't hold, which would wait for ever."""

    async def context(engine: InProcessEngine) -> int:
        return engine.models()[0].context

    token = 3 * 2 * 2 * 16 * 4
    assert with_engine(model, context, settings={"cache_bytes": 4 * PAGE * token}) == 4 * PAGE
    with pytest.raises(WhetError, match="cache"):
        with_engine(model, context, settings={"cache_bytes": 100})


def test_a_missing_folder_is_the_user_s_fault(tmp_path: Path) -> None:
    with pytest.raises(WhetError):
        open_engine(tmp_path / "nothing")


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 70)), max_size=60))
def test_a_page_is_never_held_twice(moves: list[tuple[int, int]]) -> None:
    """Catches two sequences that write into one page, and pages lost when a sequence leaves."""
    table = PageTable(Capacity(pages=9, rows=3, context=70))
    rows: dict[int, int] = {}
    for who, tokens in moves:
        if who in rows and tokens % 3 == 0:
            table.give_back(rows.pop(who))
        elif who in rows or table.free_rows:
            row = rows[who] if who in rows else rows.setdefault(who, table.take_row())
            before = table.held[row]
            grown = table.grow(row, tokens)
            assert table.held[row] == (max(before, pages_for(tokens)) if grown else before)
        held = [page for row in rows.values() for page in table.table[row, : table.held[row]].tolist()]
        assert len(set(held)) == len(held)
        assert len(held) + table.free_pages == 9
