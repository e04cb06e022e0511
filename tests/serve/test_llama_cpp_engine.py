"""The llama.cpp engine on a real GGUF file: answers, streams, and a process that dies."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import jsonschema
import pytest
import torch
from tokenizers import normalizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.export.planted import rewritten
from tests.llama_cpp import llama_cpp  # noqa: F401 (a fixture)
from tests.serve.engines import ask, greedy, pieces, text
from whet.errors import WhetError
from whet.export.gguf import write_gguf
from whet.export.gguf_tokenizer.carried import KEY
from whet.models.load import resolve
from whet.serve.engines.llama_cpp.engine import LlamaCppEngine, Settings
from whet.serve.engines.llama_cpp.schema import translated
from whet.serve.engines.mailbox import merged
from whet.serve.interface import Busy, EngineDown, Piece, Refused, Request, Sampling, UnknownModel

Answer = TypeVar("Answer")
FOLDER = Path(resolve("builtin:tiny"))
TOKENIZER = AutoTokenizer.from_pretrained(FOLDER)
USER = [{"role": "user", "content": "Write two sentences about rain."}]
FEW: dict[str, Any] = {"max_tokens": 3, "temperature": 0.0}
LONG = {"max_tokens": 400, "logit_bias": {2: -1000.0, 0: -1000.0}}


@pytest.fixture(scope="module")
def gguf(llama_cpp: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(FOLDER, path, "f32")
    return path


def with_engine(gguf: Path, use: Callable[[LlamaCppEngine], Awaitable[Answer]], **settings: Any) -> Answer:
    async def run() -> Answer:
        chosen = Settings(**{"sequences": 4, "context": 512, "threads": 1, **settings})
        engine = LlamaCppEngine(gguf, name="base", settings=chosen)
        await engine.start()
        try:
            return await asyncio.wait_for(use(engine), 300)
        finally:
            await engine.stop()

    return asyncio.run(run())


def expected(prompts: list[list[int]], tokens: int) -> list[str]:
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    return [TOKENIZER.decode(greedy(model, prompt, tokens), skip_special_tokens=True) for prompt in prompts]


def test_answers_at_once_are_those_of_transformers(gguf: Path) -> None:
    """Catches answers mixed between sequences, a template rendered otherwise, and text cut within a character."""
    questions = [f"Write {i} sentences about the number {i}." for i in range(2, 8)]
    chats = [[{"role": "user", "content": question}] for question in questions]
    prompts = [
        TOKENIZER.apply_chat_template(chat, add_generation_prompt=True, tokenize=True)["input_ids"] for chat in chats
    ]

    async def use(engine: LlamaCppEngine) -> list[Any]:
        asked = [Request("base", Sampling(16, temperature=0.0), messages=chat) for chat in chats]
        return [merged(answer) for answer in await asyncio.gather(*(pieces(engine, request) for request in asked))]

    answers = with_engine(gguf, use)
    assert [answer.text for answer in answers] == expected(prompts, 16)
    assert [answer.prompt_tokens for answer in answers] == [len(prompt) for prompt in prompts]


def test_seeds_logprobs_stops_and_counts(gguf: Path) -> None:
    """Catches settings that never reach llama.cpp."""

    async def use(engine: LlamaCppEngine) -> dict[str, Any]:
        drawn = {"temperature": 1.0, "max_tokens": 12, "seed": 5}
        whole = merged(await pieces(engine, ask("The rain", **drawn)))
        return {
            "whole": whole,
            "again": merged(await pieces(engine, ask("The rain", **drawn))),
            "other": merged(await pieces(engine, ask("The rain", **{**drawn, "seed": 6}))),
            "cut": merged(await pieces(engine, ask("The rain", **drawn, stop=(whole.text[5:8],)))),
            "one": merged(await pieces(engine, ask("The rain", temperature=1.0, max_tokens=1, logprobs=5))),
        }

    found = with_engine(gguf, use)
    assert found["whole"] == found["again"]
    assert found["whole"].text != found["other"].text
    assert found["whole"].completion_tokens <= 12
    assert found["cut"].finish == "stop"
    assert found["whole"].text.startswith(found["cut"].text)
    assert len(found["cut"].text) <= 5
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    with torch.no_grad():
        logs = torch.log_softmax(model(torch.tensor([TOKENIZER("The rain")["input_ids"]])).logits[0, -1], -1).topk(5)
    (entry,) = found["one"].logprobs
    assert [top.logprob for top in entry.top] == pytest.approx(logs.values.tolist(), abs=1e-2)
    assert [top.token for top in entry.top] == [TOKENIZER.decode([token]) for token in logs.indices.tolist()]


def test_answers_obey_a_schema(gguf: Path) -> None:
    """Catches a grammar that is not used, and white space without end where the JSON has ended."""
    properties = {"ok": {"type": "boolean"}, "kind": {"enum": ["a", "b"]}}
    schema = {"type": "object", "properties": properties, "required": ["ok", "kind"], "additionalProperties": False}

    async def use(engine: LlamaCppEngine) -> list[Piece]:
        asked = [ask("The rain", max_tokens=200, temperature=t, seed=1, schema=schema) for t in (0.0, 1.0, 1.5)]
        any_object = ask("The rain", max_tokens=8, temperature=1.0, seed=1, schema={})
        answers = await asyncio.gather(*(pieces(engine, request) for request in [*asked, any_object]))
        return [merged(answer) for answer in answers]

    *answers, start = with_engine(gguf, use)
    for answer in answers:
        jsonschema.validate(json.loads(answer.text), schema)
        assert answer.finish == "stop"
        assert answer.text == answer.text.strip()
    assert start.text.startswith("{")


def test_leaving_an_answer_frees_its_sequence(gguf: Path) -> None:
    """Catches a sequence that draws on for a client that has left, and a queue without a bound."""

    async def use(engine: LlamaCppEngine) -> str:
        left = engine.generate(ask("The rain", **LONG))
        await anext(left)
        waiting = asyncio.create_task(text(engine, ask("A cat", **LONG)))
        await asyncio.sleep(0.05)
        with pytest.raises(Busy):
            await text(engine, ask("A dog"))
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await left.aclose()  # type: ignore[attr-defined]
        assert engine.load() == {"running": 0, "waiting": 0}
        return await text(engine, ask("The rain", max_tokens=3))

    assert with_engine(gguf, use, sequences=1, max_waiting=1)


def test_a_process_that_dies_is_told_and_started_again(gguf: Path) -> None:
    """Catches readers that wait for a dead process for ever, and an engine that stays down."""

    async def use(engine: LlamaCppEngine) -> tuple[str, str, str]:
        before = await text(engine, ask("The rain", max_tokens=5))
        running = asyncio.create_task(text(engine, ask("The rain", **LONG)))
        await asyncio.sleep(0.05)
        assert engine._node is not None
        os.kill(engine._node._process.pid, signal.SIGKILL)
        with pytest.raises(EngineDown) as down:
            await running
        return before, await text(engine, ask("The rain", max_tokens=5)), str(down.value)

    before, after, why = with_engine(gguf, use)
    assert before == after
    assert "exit code -9" in why


REFUSED = [
    (ask(""), "prompt"),
    (ask([]), "prompt"),
    (ask([9000]), "prompt"),
    (ask("x " * 900), "prompt"),
    (ask("x", logit_bias={9000: 1.0}), "logit_bias"),
    (ask("x", schema={"type": "string", "pattern": "a+"}), "response_format"),
    (Request("base", Sampling(5), messages=[]), "messages"),
    (Request("base", Sampling(5), messages=[{"role": "user", "content": "x " * 900}]), "messages"),
]


def test_what_can_not_be_read_is_refused(gguf: Path) -> None:
    """Catches a fault of one client that ends the process, or that gets no answer at all."""

    async def use(engine: LlamaCppEngine) -> str:
        for request, param in REFUSED:
            with pytest.raises(Refused) as refused:
                await text(engine, request)
            assert refused.value.param == param, request
        with pytest.raises(UnknownModel):
            await text(engine, ask("x", "other"))
        return await text(engine, ask("The rain", max_tokens=3))

    assert with_engine(gguf, use)


def test_blanks_before_punctuation_stay(gguf: Path) -> None:
    """Catches llama.cpp's clean-up of text, which makes "ça va ?" and "x ? y" into "ça va?" and "x? y"."""
    (blank_and_mark,) = TOKENIZER(" !", add_special_tokens=False)["input_ids"]

    async def use(engine: LlamaCppEngine) -> Any:
        request = ask("The rain", max_tokens=4, logit_bias={blank_and_mark: 1000.0}, logprobs=1)
        return merged(await pieces(engine, request))

    answer = with_engine(gguf, use)
    assert answer.text == " ! ! ! !"
    assert [(entry.token, entry.bytes) for entry in answer.logprobs] == 4 * [(" !", b" !")]


def test_half_a_character_has_its_bytes(gguf: Path) -> None:
    """Catches an answer that ends within a character and says nothing of it, and bytes that are told as none."""
    (first,) = (i for i, token in enumerate(TOKENIZER.convert_ids_to_tokens(range(600))) if token == "Ã")

    async def use(engine: LlamaCppEngine) -> Any:
        return merged(await pieces(engine, ask("The rain", max_tokens=1, logit_bias={first: 1000.0}, logprobs=0)))

    answer = with_engine(gguf, use)
    assert answer.text == "\ufffd"
    assert [entry.bytes for entry in answer.logprobs] == [b"\xc3"]


@pytest.fixture(scope="module")
def normalizing(llama_cpp: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A model whose tokenizer puts text into NFC, as Qwen's do and llama.cpp does not."""
    folder = tmp_path_factory.mktemp("nfc")
    shutil.copytree(FOLDER, folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    tokenizer.save_pretrained(folder / "model")
    write_gguf(folder / "model", folder / "model.gguf", "f32")
    return folder / "model.gguf"


def test_prompts_are_cut_by_the_tokenizer_in_the_file(gguf: Path, normalizing: Path) -> None:
    """Catches prompts and chats left to llama.cpp, which cuts them otherwise than the model was trained on."""
    apart, whole = "Cafe\u0301 de\u0301ja\u0300 vu", "Café déjà vu"

    async def use(engine: LlamaCppEngine) -> list[Any]:
        chats = [[{"role": "user", "content": content}] for content in (apart, whole)]
        asked = [ask(apart, **FEW), ask(whole, **FEW), *(Request("base", Sampling(**FEW), messages=c) for c in chats)]
        return [merged(await pieces(engine, request)) for request in asked]

    prompt, same_prompt, chat, same_chat = with_engine(normalizing, use)
    assert (prompt, chat) == (same_prompt, same_chat)
    assert prompt.prompt_tokens == len(TOKENIZER(whole)["input_ids"])
    own, _, *_ = with_engine(gguf, use)
    assert own.prompt_tokens == len(TOKENIZER(apart)["input_ids"]) > prompt.prompt_tokens


def test_a_damaged_tokenizer_in_the_file_is_told_at_the_start(normalizing: Path, tmp_path: Path) -> None:
    broken = rewritten(normalizing, tmp_path / "broken.gguf", {KEY: "{}"})

    async def start() -> None:
        engine = LlamaCppEngine(broken)
        try:
            await engine.start()
        finally:
            await engine.stop()

    with pytest.raises(WhetError, match=rf"broken\.gguf: {KEY} in the file is no tokenizer"):
        asyncio.run(start())


def test_a_file_that_is_no_gguf_is_the_user_s_fault(llama_cpp: Path, tmp_path: Path) -> None:  # noqa: F811
    """Catches a start that waits for a process that has ended."""
    (tmp_path / "torn.gguf").write_bytes(b"GGUF" + bytes(100))
    for name in ("torn.gguf", "missing.gguf"):
        with pytest.raises(WhetError):
            asyncio.run(LlamaCppEngine(tmp_path / name).start())


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "a"},
        {"type": "integer", "minimum": 3},
        {"allOf": [{"type": "string"}]},
        {"type": "object", "properties": {"a": {"type": "array", "items": {"not": {}}}}},
        {"$ref": "#/definitions/a"},
        {"enum": [[1]]},
        {},
    ],
    ids=str,
)
def test_a_schema_that_grammars_would_pass_over_is_refused(schema: dict[str, Any]) -> None:
    """Catches JSON that breaks its schema because a keyword was left out without a word."""
    with pytest.raises(Refused):
        translated(schema)
