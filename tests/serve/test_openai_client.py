"""OpenAI's own client against each engine on `builtin:tiny`: it must not matter to a client which one answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import openai
import pytest
from pydantic import SecretStr

from tests.llama_cpp import llama_cpp  # noqa: F401 (a fixture)
from tests.serve.gateways import Gateway, gateway
from whet.export.gguf import write_gguf
from whet.models.load import resolve
from whet.serve.engines.in_process import open_engine as in_process
from whet.serve.engines.in_process.settings import Settings
from whet.serve.engines.llama_cpp.engine import LlamaCppEngine
from whet.serve.engines.llama_cpp.engine import Settings as LlamaCppSettings
from whet.serve.engines.vllm.address import Address
from whet.serve.engines.vllm.engine import VllmEngine
from whet.serve.interface import Engine

MESSAGES: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module", params=["transformers", "llama.cpp", "another server"])
def up(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway over each engine; "another server" is a second gateway, asked over HTTP as vLLM is."""
    with ExitStack() as held:
        if request.param == "llama.cpp":
            request.getfixturevalue("llama_cpp")
            engine: Engine = _of_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")
        else:
            engine = in_process("builtin:tiny", settings=Settings(cache_bytes=16 << 20, max_running=8))
        if request.param == "another server":
            other = held.enter_context(gateway(engine))
            engine = VllmEngine(Address.of(other.url, SecretStr(other.token)))
        yield held.enter_context(gateway(engine))


def _of_gguf(path: Path) -> Engine:
    write_gguf(Path(resolve("builtin:tiny")), path, "f32")
    return LlamaCppEngine(path, name="tiny", settings=LlamaCppSettings(sequences=4, context=2048, threads=1))


@pytest.fixture(scope="module")
def client(up: Gateway) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{up.url}/v1", api_key=up.token, max_retries=0, timeout=60) as made:
        yield made


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, max_completion_tokens=8, temperature=0)
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage is not None
    assert 0 < answer.usage.completion_tokens <= 8
    assert answer.choices[0].finish_reason in ("stop", "length")


def test_chat_streams_what_it_says_whole(client: openai.OpenAI) -> None:
    """Catches a stream that loses or repeats text."""
    options: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**options).choices[0].message.content
    parts = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**options, stream=True)]
    assert len(parts) > 2
    assert "".join(parts) == whole


def test_a_seed_makes_an_answer_again(client: openai.OpenAI) -> None:
    def answer(seed: int) -> str | None:
        options: dict[str, Any] = {"max_tokens": 12, "temperature": 1.5, "seed": seed}
        return client.chat.completions.create(model="tiny", messages=MESSAGES, **options).choices[0].message.content

    assert answer(1) == answer(1) != answer(2)


def test_several_answers_to_one_question_differ(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"max_tokens": 12, "temperature": 1.5, "seed": 1, "n": 2}
    choices = client.chat.completions.create(model="tiny", messages=MESSAGES, **options).choices
    assert [choice.index for choice in choices] == [0, 1]
    assert choices[0].message.content != choices[1].message.content


def test_logprobs(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"max_tokens": 4, "temperature": 0, "logprobs": True, "top_logprobs": 3}
    choice = client.chat.completions.create(model="tiny", messages=MESSAGES, **options).choices[0]
    assert choice.logprobs is not None
    content = choice.logprobs.content or []
    assert content
    for one in content:
        assert len(one.top_logprobs) == 3
        assert one.logprob == pytest.approx(one.top_logprobs[0].logprob), "greedy takes the likeliest"


def test_a_stop_is_not_part_of_the_answer(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "max_tokens": 12, "temperature": 0}
    text = client.chat.completions.create(**options).choices[0].message.content or ""
    stop = text[len(text) // 2 :][:2]
    choice = client.chat.completions.create(**options, stop=[stop]).choices[0]
    assert stop
    assert choice.message.content == text[: text.index(stop)]
    assert choice.finish_reason == "stop"


def test_an_answer_obeys_its_schema(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "ok", "schema": schema, "strict": True}}
    options: dict[str, Any] = {"response_format": form, "max_tokens": 200, "seed": 1}
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, **options)
    assert set(json.loads(answer.choices[0].message.content or "")) == {"ok"}


def test_a_tool_that_must_be_called_is(client: openai.OpenAI) -> None:
    """A model that knows nothing of tools still makes a call with whole arguments."""
    parameters = {
        "type": "object",
        "properties": {"unit": {"enum": ["C", "F"]}},
        "required": ["unit"],
        "additionalProperties": False,
    }
    tools: Any = [{"type": "function", "function": {"name": "weather", "parameters": parameters}}]
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, tools=tools, tool_choice="required", max_tokens=200, seed=1
    )
    (call,) = answer.choices[0].message.tool_calls or []
    assert answer.choices[0].finish_reason == "tool_calls"
    assert call.type == "function"
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["unit"] in ("C", "F")


def test_completions(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "tiny", "prompt": "The capital", "max_tokens": 6, "temperature": 0}
    whole = client.completions.create(**options, logprobs=2)
    assert whole.choices[0].logprobs is not None
    parts = [chunk.choices[0].text for chunk in client.completions.create(**options, stream=True)]
    assert "".join(parts) == whole.choices[0].text


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "whet"


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (openai.BadRequestError, {"temperature": 9}),
        (openai.NotFoundError, {"model": "none"}),
        (openai.BadRequestError, {"messages": [{"role": "user", "content": "x " * 5000}]}),
    ],
)
def test_faults_are_the_clients_own_exceptions(client: openai.OpenAI, kind: type[Exception], changes: Any) -> None:
    with pytest.raises(kind) as error:
        client.chat.completions.create(**{"model": "tiny", "messages": MESSAGES, **changes})
    assert isinstance(error.value, openai.APIStatusError)
    assert error.value.request_id is not None


def test_a_wrong_key_is_an_authentication_error(up: Gateway) -> None:
    with openai.OpenAI(base_url=f"{up.url}/v1", api_key="sk-x", max_retries=0) as client:  # noqa: SIM117
        with pytest.raises(openai.AuthenticationError):
            client.models.list()


def test_a_client_that_stops_reading_frees_the_engine(up: Gateway, client: openai.OpenAI) -> None:
    with client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True, max_tokens=200) as stream:
        next(iter(stream))
    up.wait_until(lambda: up.parts.limits.running == 0)
    assert client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=2).choices
