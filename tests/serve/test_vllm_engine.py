"""The engine that asks a server elsewhere: a second whet, one that speaks as vLLM does, and some that misbehave."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from pydantic import SecretStr

from tests.serve.engines import ask, pieces, text
from tests.serve.gateways import Gateway, events, gateway
from tests.serve.scripted import MODELS, Scripted
from tests.serve.test_serve_cli import certificate
from tests.serve.upstreams import ADAPTER, CARD, KEY, Says, Talk, Upstream, event, streaming, upstream
from whet.errors import WhetError
from whet.serve.engines.choice import chosen_for, open_engine
from whet.serve.engines.in_process import open_engine as in_process
from whet.serve.engines.in_process.settings import Settings as InProcess
from whet.serve.engines.mailbox import merged
from whet.serve.engines.vllm.address import Address, key_from
from whet.serve.engines.vllm.engine import VllmEngine
from whet.serve.engines.vllm.settings import Settings
from whet.serve.interface import Busy, EngineDown, Piece, Refused, Request, UnknownModel

Answer = TypeVar("Answer")
CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
USER = [{"role": "user", "content": "Hi"}]
USAGE = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}
COUNTED = {"choices": [], "usage": USAGE}
ENDED = {"choices": [{"index": 0, "text": "", "finish_reason": "stop"}]}
HELLO = [{"choices": [{"index": 0, "text": word, "finish_reason": None}]} for word in ("Hel", "lo")]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


def engine_of(url: str, key: str | None = KEY, name: str | None = None, **settings: Any) -> VllmEngine:
    address = Address.of(url, None if key is None else SecretStr(key))
    return VllmEngine(address, name=name, settings=Settings(**{"silence": 30.0, **settings}))


def with_engine(engine: VllmEngine, use: Callable[[VllmEngine], Awaitable[Answer]]) -> Answer:
    async def run() -> Answer:
        await engine.start()
        try:
            return await asyncio.wait_for(use(engine), 60)
        finally:
            await engine.stop()

    return asyncio.run(run())


def asked_of(up: Upstream, *requests: Request) -> list[Piece]:
    """Each request's answer, as one piece."""

    async def use(engine: VllmEngine) -> list[Piece]:
        return [merged(await pieces(engine, request)) for request in requests]  # type: ignore[arg-type]

    return with_engine(engine_of(up.url), use)


@pytest.fixture
def up() -> Iterator[Upstream]:
    with upstream() as found:
        yield found


# ---------------------------------------------------------------- over a second whet


@pytest.fixture(scope="module")
def two() -> Iterator[tuple[Gateway, Gateway]]:
    """A gateway over a gateway, over an engine whose answers are written down."""
    with gateway(Scripted()) as behind, gateway(engine_of(behind.url, behind.token)) as front:
        yield behind, front


@pytest.fixture(scope="module")
def real() -> Iterator[tuple[Gateway, Gateway]]:
    """The same over a real model."""
    engine = in_process("builtin:tiny", settings=InProcess(cache_bytes=16 << 20, max_running=8))
    with gateway(engine) as behind, gateway(engine_of(behind.url, behind.token)) as front:
        yield behind, front


SETTINGS: dict[str, Any] = {
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 40,
    "max_tokens": 17,
    "seed": 3,
    "stop": ["END", "\n\n"],
    "presence_penalty": 0.1,
    "frequency_penalty": -0.2,
    "logit_bias": {"5": -100},
}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Ulm"}'}}
SAID_BEFORE = [
    {"role": "system", "content": "Be brief."},
    *USER,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "rain"},
]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": USER, **SETTINGS, "logprobs": True, "top_logprobs": 2, "response_format": SCHEMA}),
        (CHAT, {"messages": SAID_BEFORE, "tools": TOOLS, "response_format": {"type": "json_object"}}),
        (CHAT, {"messages": USER, "tools": TOOLS, "tool_choice": "required", "temperature": 0, "logprobs": True}),
        (COMPLETIONS, {"prompt": "Once", **SETTINGS, "logprobs": 3}),
        (COMPLETIONS, {"prompt": [1, 2, 3], "logprobs": 0}),
    ],
    ids=["all settings", "a conversation with calls", "a call that must be", "text", "token ids"],
)
def test_a_request_comes_through_unchanged(two: tuple[Gateway, Gateway], path: str, body: dict[str, Any]) -> None:
    """Catches a setting that is lost on the way, and one that means something else at the other end."""
    behind, front = two
    behind.engine.asked.clear()
    direct, through = (up.post(path, {"model": "scripted", **body}) for up in (behind, front))
    assert through.status_code == 200, through.text
    first, second = behind.engine.asked
    assert first == second
    assert [choice.get("logprobs") for choice in direct.json()["choices"]] == [
        choice.get("logprobs") for choice in through.json()["choices"]
    ]
    assert direct.json()["usage"] == through.json()["usage"]


def test_models_are_those_of_the_server(two: tuple[Gateway, Gateway]) -> None:
    """Catches adapters without their base, and a context or a kind that is lost."""
    behind, front = two
    assert list(front.engine.models()) == list(behind.engine.models()) == list(MODELS)


def test_embeddings_come_in_the_order_of_their_texts(two: tuple[Gateway, Gateway]) -> None:
    body = {"model": "vectors", "input": ["a", "three", "of"]}
    direct, through = (up.post(EMBEDDINGS, body).json() for up in two)
    assert direct == through
    assert [one["embedding"][0] for one in through["data"]] == [1.0, 5.0, 2.0]


def test_real_answers_are_the_same_through_two_servers(real: tuple[Gateway, Gateway]) -> None:
    """Catches text that is lost or repeated between the pieces, and log-probabilities that are cut."""
    drawn = {"model": "tiny", "messages": USER, "max_tokens": 24, "seed": 5, "logprobs": True, "top_logprobs": 2}
    direct, through = (up.post(CHAT, drawn).json() for up in real)
    assert direct["choices"] == through["choices"]
    assert direct["usage"] == through["usage"]
    *chunks, _ = events(real[1].post(CHAT, {**drawn, "stream": True}).text)
    said = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert said == direct["choices"][0]["message"]["content"]
    assert len(chunks) > 4, "streamed means in pieces"


def test_a_forced_call_comes_through_two_servers(real: tuple[Gateway, Gateway]) -> None:
    """Catches a call that the first server finds and the second loses, or gives out twice."""
    function = {"name": "weather", "parameters": {"type": "object", "properties": {"unit": {"enum": ["C", "F"]}}}}
    function["parameters"] |= {"required": ["unit"], "additionalProperties": False}  # type: ignore[operator]
    tools = [{"type": "function", "function": function}]
    body = {"model": "tiny", "messages": USER, "tools": tools, "tool_choice": "required", "max_tokens": 200, "seed": 1}
    *chunks, _ = events(real[1].post(CHAT, {**body, "stream": True}).text)
    found = [call for chunk in chunks for call in chunk["choices"][0]["delta"].get("tool_calls", ())]
    assert [call["function"]["name"] for call in found if call["function"].get("name")] == ["weather"]
    assert json.loads("".join(call["function"].get("arguments", "") for call in found))["unit"] in ("C", "F")
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_clients_that_leave_free_the_place_behind() -> None:
    """Catches a server elsewhere that writes on for nobody."""
    with gateway(Scripted(hold=True)) as behind, gateway(engine_of(behind.url, behind.token)) as front:
        client = socket.create_connection(front.address)
        client.sendall(front.request(json.dumps({"model": "scripted", "messages": USER, "stream": True}).encode()))
        front.wait_until(lambda: behind.engine.running == 1)
        client.close()
        front.wait_until(lambda: behind.engine.running == 0)
        assert behind.lines(2)[-1]["left"], "the one before asked which models there are"
        assert front.engine.load()["running"] == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("failure", "status", "param", "wait"),
    [
        (Refused("the prompt is too long", "messages"), 400, "messages", None),
        (UnknownModel("scripted"), 404, "model", None),
        (Busy(7.0), 429, None, "7"),
        (EngineDown("node died at /home/secret"), 503, None, "5"),
    ],
    ids=["refused", "unknown", "busy", "down"],
)
def test_what_the_server_refuses_its_clients_is_refused_here(
    two: tuple[Gateway, Gateway], failure: Exception, status: int, param: str | None, wait: str | None, stream: bool
) -> None:
    """Catches a client's fault that is told as the server's own, and a Retry-After that is dropped."""
    behind, front = two
    behind.engine.failure = failure
    try:
        answer = front.post(CHAT, {"model": "scripted", "messages": USER, "stream": stream})
    finally:
        behind.engine.failure = None
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)
    assert answer.headers.get("retry-after") == wait
    assert "secret" not in answer.text


def test_an_answer_that_breaks_there_breaks_here(two: tuple[Gateway, Gateway]) -> None:
    """Catches half an answer that looks whole."""
    behind, front = two
    behind.engine.failure, behind.engine.fails_at = EngineDown("died"), 2
    try:
        *_, last = events(front.post(CHAT, {"model": "scripted", "messages": USER, "stream": True}).text)
    finally:
        behind.engine.failure, behind.engine.fails_at = None, 0
    assert last["error"]["code"] == "engine_down"


# ---------------------------------------------------------------- vLLM's own words


def test_vllm_is_told_every_setting(up: Upstream) -> None:
    """Catches settings that vLLM then takes from the model's generation_config.json: top_k, min_p, and penalties."""
    up.says[COMPLETIONS] = streaming(ENDED, COUNTED)
    asked_of(up, ask("Once", max_tokens=512, stop=("a",), logit_bias={7: 1.5}, seed=-1, logprobs=2))
    (body,) = up.bodies(COMPLETIONS)
    assert body == {
        "model": "base",
        "prompt": "Once",
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": None,
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": -1,
        "stop": ["a"],
        "logit_bias": {"7": 1.5},
        "logprobs": 2,
        "skip_special_tokens": True,
    }


def test_vllm_leaves_calls_in_the_text(up: Upstream) -> None:
    """Catches a vLLM that refuses tools for want of a parser, and one that drops the markers of a call."""
    marked = '<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call>'
    said = [{"choices": [{"index": 0, "delta": {"content": part}}]} for part in (marked[:9], marked[9:])]
    end = {"choices": [{"index": 0, "delta": {"content": ""}, "finish_reason": "stop", "stop_reason": None}]}
    up.says[CHAT] = streaming(*said, end, COUNTED)
    with gateway(engine_of(up.url)) as front:
        answer = front.post(CHAT, {"model": "base", "messages": USER, "tools": TOOLS}).json()
    (body,) = up.bodies(CHAT)
    assert (body["tool_choice"], body["skip_special_tokens"], body["tools"]) == ("none", False, TOOLS)
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"city": "Ulm"}
    assert answer["choices"][0]["finish_reason"] == "tool_calls"


def test_calls_that_a_server_finds_itself_are_passed_on(up: Upstream) -> None:
    """Catches arguments that come in parts and are given out as several calls, and a second one nobody wanted."""
    up.cards = [{**CARD, "owned_by": "somebody"}]
    parts: list[dict[str, Any]] = [
        {"index": 0, "id": "call_1", "type": "function", "function": {"name": "weather", "arguments": ""}},
        {"index": 0, "function": {"arguments": '{"city": '}},
        {"index": 0, "function": {"arguments": '"Ulm"}'}},
        {"index": 1, "id": "call_2", "type": "function", "function": {"name": "weather", "arguments": "{}"}},
    ]
    said = [{"choices": [{"index": 0, "delta": {"tool_calls": [part]}}]} for part in parts]
    end = {"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]}
    up.says[CHAT] = streaming(*said, end, COUNTED)
    with gateway(engine_of(up.url)) as front:
        body = {"model": "base", "messages": USER, "tools": TOOLS}
        both = front.post(CHAT, body).json()["choices"][0]
        one = front.post(CHAT, {**body, "parallel_tool_calls": False}).json()["choices"][0]
    assert [call["id"] for call in both["message"]["tool_calls"]] == ["call_1", "call_2"]
    assert both["message"]["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city": "Ulm"}'}
    assert both["finish_reason"] == "tool_calls"
    assert [call["id"] for call in one["message"]["tool_calls"]] == ["call_1"]
    assert "top_k" not in up.bodies(CHAT)[0], "OpenAI's servers refuse what they do not know"


def test_an_answer_is_clipped_where_its_limit_does_not_fit(up: Upstream) -> None:
    """Catches clients that name no limit and are refused, because the operator's own is beside a long prompt too long.
    A refusal for another reason is not asked twice."""
    too_long = "This model's maximum context length is 512 tokens. However, you requested 300 output tokens"

    def refuse_limits(talk: Talk) -> None:
        if talk.body["max_tokens"] is None:
            return streaming(ENDED, COUNTED)(talk)
        return talk.whole(400, {"error": {"message": too_long, "type": "BadRequestError", "param": None, "code": 400}})

    up.says[COMPLETIONS] = refuse_limits
    (answer,) = asked_of(up, ask("x", max_tokens=300))
    assert answer.finish == "stop"
    assert [body["max_tokens"] for body in up.bodies(COMPLETIONS)] == [300, None]
    up.asked.clear()
    up.says[COMPLETIONS] = lambda talk: talk.whole(400, {"error": {"message": "no", "param": "top_k", "code": 400}})
    with pytest.raises(Refused, match="no") as refused:
        asked_of(up, ask("x", max_tokens=300))
    assert refused.value.param == "top_k"
    assert len(up.asked) - len(up.bodies(EMBEDDINGS)) == 1


def test_log_probabilities_of_completions_are_in_order(up: Upstream) -> None:
    """Catches the drawn token that stands first among the likeliest, and half a character with the bytes of another."""
    logprobs = {
        "tokens": ["x", "\ufffd"],
        "token_logprobs": [-3.0, None],
        "top_logprobs": [{"x": -3.0, "a": -0.5, "b": -1.0}, None],
        "text_offset": [0, 1],
    }
    chosen = {"index": 0, "text": "x", "logprobs": logprobs, "finish_reason": "length"}
    up.says[COMPLETIONS] = streaming({"choices": [chosen]}, COUNTED)
    (answer,) = asked_of(up, ask("x", logprobs=2))
    drawn, half = answer.logprobs
    assert [one.token for one in drawn.top] == ["a", "b", "x"]
    assert (drawn.bytes, half.bytes, half.logprob) == (b"x", b"", float("-inf"))
    assert (answer.finish, answer.prompt_tokens, answer.completion_tokens) == ("length", 5, 2)


def test_adapters_have_a_base_and_its_context(up: Upstream) -> None:
    """Catches vLLM's adapters, which name no context, and a base that is renamed for itself alone."""
    up.cards = [CARD, ADAPTER]

    async def use(engine: VllmEngine) -> Any:
        await text(engine, ask("x", "tuned"))  # type: ignore[arg-type]
        await text(engine, ask("x", "ours"))  # type: ignore[arg-type]
        with pytest.raises(UnknownModel):
            await text(engine, ask("x", "base"))  # type: ignore[arg-type]
        return engine.models()

    up.says[COMPLETIONS] = streaming(ENDED, COUNTED)
    base, tuned = with_engine(engine_of(up.url, name="ours"), use)
    assert (base.name, base.context, base.kind, base.parent) == ("ours", 512, "chat", None)
    assert (tuned.name, tuned.context, tuned.kind, tuned.parent) == ("tuned", 512, "chat", "ours")
    assert [body["model"] for body in up.bodies(COMPLETIONS)] == ["tuned", "base"]


def test_an_adapter_that_is_loaded_later_is_served(up: Upstream) -> None:
    """Catches a list of models that is read once, and a server that is given up because it was away for a moment."""

    async def use(engine: VllmEngine) -> None:
        up.says["/v1/models"] = lambda talk: talk.whole(500, b"")
        await _until(lambda: engine.load()["up"] == 0.0)
        assert [model.name for model in engine.models()] == ["base"]
        up.cards = [CARD, ADAPTER]
        del up.says["/v1/models"]
        await _until(lambda: len(engine.models()) == 2)
        assert engine.load()["up"] == 1.0

    with_engine(engine_of(up.url, refresh=0.01), use)


def test_an_embedding_model_is_known_as_one(up: Upstream) -> None:
    """Catches a model for embeddings that is offered for chats: vLLM's list does not say what a model is for."""

    def vectors(talk: Talk) -> None:
        count = len(talk.body["input"])
        data = [{"index": place, "embedding": [float(place), 0.5]} for place in reversed(range(count))]
        talk.whole(200, {"data": data[: 2 if count == 3 else count], "usage": USAGE})

    async def use(engine: VllmEngine) -> Any:
        with pytest.raises(EngineDown, match="2 vectors came for 3 texts"):
            await engine.embed("base", ["a", "b", "c"])
        return engine.models()[0].kind, await engine.embed("base", [[1, 2], [3]])

    up.says[EMBEDDINGS] = vectors
    kind, found = with_engine(engine_of(up.url), use)
    assert kind == "embedding"
    assert (found.vectors, found.tokens) == ([[0.0, 0.5], [1.0, 0.5]], 5)


# ---------------------------------------------------------------- servers that misbehave


def half_an_event(talk: Talk) -> None:
    talk.begin()
    talk.part(event(HELLO[0]))
    talk.part(event(HELLO[1])[:20])
    talk.end()


def dies(talk: Talk) -> None:
    talk.begin()
    talk.part(event(HELLO[0]))
    talk.send(b"5\r\nda")
    raise ConnectionResetError


def silent(talk: Talk) -> None:
    talk.begin()
    talk.part(event(HELLO[0]))
    talk.hold.wait(30)


MISBEHAVIOURS: dict[str, Says] = {
    "dies in the middle": dies,
    "half an event": half_an_event,
    "ends too early": streaming(*HELLO),
    "no counts": streaming(*HELLO, ENDED),
    "another end": streaming(*HELLO, {"choices": [{"index": 0, "text": "", "finish_reason": "abort"}]}, COUNTED),
    "no JSON": streaming(HELLO[0], b"{not json"),
    "another JSON": streaming(HELLO[0], {"choices": [{"text": 7}]}),
    "a list": streaming(HELLO[0], []),
    "nothing in it": streaming(HELLO[0], {"id": "x"}),
    "an error": streaming(
        HELLO[0], {"error": {"message": "out of memory", "type": "InternalServerError", "code": 500}}
    ),
    "a page": lambda talk: talk.whole(200, b"<html>Sign in</html>", kind="text/html"),
    "an endless event": lambda talk: (talk.begin(), talk.part(b"data: " + b"x" * (17 << 20)))[-1],
    "500": lambda talk: talk.whole(500, {"error": {"message": "boom", "code": 500}}),
    "401": lambda talk: talk.whole(401, {"error": "Unauthorized"}),
    "silence at once": lambda talk: (talk.hold.wait(30), None)[-1],
    "silence in the middle": silent,
    "nothing at all": lambda talk: (_ for _ in ()).throw(ConnectionResetError),
}


@pytest.mark.parametrize("how", MISBEHAVIOURS)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_server_that_misbehaves_is_down(up: Upstream, how: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Catches half an answer that passes for a whole one, and a wait without an end. The next request is served."""
    quiet = 0.2 if "silence" in how else 30.0

    async def use(engine: VllmEngine) -> str:
        up.says[COMPLETIONS] = MISBEHAVIOURS[how]
        with pytest.raises(EngineDown) as failure:
            await pieces(engine, ask("x"))  # type: ignore[arg-type]
        assert how != "an endless event" or "byte limit" in str(failure.value), "not only because it broke off"
        assert engine.load()["running"] == 0
        up.says[COMPLETIONS] = streaming(*HELLO, ENDED, COUNTED)
        return await text(engine, ask("x"))  # type: ignore[arg-type]

    assert with_engine(engine_of(up.url, silence=quiet), use) == "Hello"
    capfd.readouterr()  # the misbehaving server's own complaints


def test_faults_within_a_stream_are_the_client_s_or_the_server_s(up: Upstream) -> None:
    """Catches vLLM's refusals that come as an event, after 200, and are told as a server that is down."""

    def failing(code: int, param: str | None = None) -> Any:
        up.says[COMPLETIONS] = streaming({"error": {"message": "too much", "type": "X", "param": param, "code": code}})
        with pytest.raises((Refused, Busy, EngineDown)) as failure:
            asked_of(up, ask("x", logit_bias={5: 1.0}))
        return failure.value

    assert [type(failing(code)) for code in (400, 422, 429, 401, 500)] == [
        Refused,
        Refused,
        Busy,
        EngineDown,
        EngineDown,
    ]


@pytest.mark.parametrize("wait", ["3", "Thu, 01 Jan 1970 00:00:00 GMT", "soon", None])
def test_a_full_server_says_when_to_come_again(up: Upstream, wait: str | None) -> None:
    headers = [] if wait is None else [f"Retry-After: {wait}"]
    up.says[COMPLETIONS] = lambda talk: talk.whole(429, {"error": {"message": "full", "code": 429}}, *headers)
    with pytest.raises(Busy) as busy:
        asked_of(up, ask("x"))
    assert busy.value.retry_after == (3.0 if wait == "3" else 1.0)


def test_nothing_is_sent_elsewhere(up: Upstream) -> None:
    """Catches a prompt, or the key, that follows a redirection."""
    with upstream() as other:
        up.says[COMPLETIONS] = lambda talk: talk.whole(307, b"", f"Location: {other.url}{COMPLETIONS}")
        with pytest.raises(EngineDown, match="HTTP 307"):
            asked_of(up, ask("x"))
        up.says["/v1/models"] = lambda talk: talk.whole(302, b"", f"Location: {other.url}/v1/models")
        with pytest.raises(WhetError, match="HTTP 302"):
            asked_of(up, ask("x"))
        assert other.asked == []


def test_no_proxy_of_the_environment_hears_of_it(up: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches prompts for this machine that a proxy reads, and a .netrc that replaces the key."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    up.says[COMPLETIONS] = streaming(ENDED, COUNTED)
    asked_of(up, ask("x"))
    assert {talk.headers["authorization"] for talk in up.asked} == {f"Bearer {KEY}"}


def test_the_key_is_in_no_log_and_no_error(up: Upstream, caplog: pytest.LogCaptureFixture) -> None:
    """Catches servers that quote the key they refuse, and a client that shows its headers."""
    caplog.set_level(logging.DEBUG)
    up.says[COMPLETIONS] = lambda talk: talk.whole(400, {"error": {"message": f"no {KEY}\nis", "code": 400}})
    engine = engine_of(up.url)
    with gateway(engine) as front:
        answer = front.post(COMPLETIONS, {"model": "base", "prompt": "x"})
        assert answer.json()["error"]["message"] == "no *** is"
        up.says[COMPLETIONS] = lambda talk: talk.whole(500, {"error": {"message": f"no {KEY}", "code": 500}})
        assert front.post(COMPLETIONS, {"model": "base", "prompt": "x"}).status_code == 503
        assert KEY not in front.log.getvalue() + answer.text
        assert KEY not in repr(vars(engine)) + repr(vars(engine._server)) + repr(engine._server._client.headers)
    assert "HTTP 500: no ***" in caplog.text
    assert KEY not in caplog.text


# ---------------------------------------------------------------- the start


STARTS: dict[str, tuple[Says, str, str]] = {
    "another server": (lambda talk: talk.whole(200, b"<html>", kind="text/html"), "no Cards", "vllm serve"),
    "no such address": (lambda talk: talk.whole(404, {"detail": "Not Found"}), "Not Found", "vllm serve"),
    "a wrong key": (lambda talk: talk.whole(401, {"error": "Unauthorized"}), "refuses the key", "--upstream-key-env"),
    "no model": (lambda talk: talk.whole(200, {"data": []}), "has no model", "load one"),
    "no context": (lambda talk: talk.whole(200, {"data": [{"id": "x"}]}), "how many tokens", "max_model_len"),
    "silence": (lambda talk: (talk.hold.wait(30), None)[-1], "within 0.2 s", "vllm serve"),
}


@pytest.mark.parametrize("how", STARTS)
def test_a_start_that_fails_says_why(up: Upstream, how: str) -> None:
    """Catches a server that comes up and then refuses every request."""
    up.says["/v1/models"], what, fix = STARTS[how]
    with pytest.raises(WhetError) as failure:
        with_engine(engine_of(up.url, probe=0.2 if how == "silence" else 30.0), lambda engine: asyncio.sleep(0))
    assert what in failure.value.what
    assert fix in str(failure.value.fix)
    assert str(failure.value.where).startswith(up.url)


def test_a_server_that_is_not_there_is_said(here: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the command line. Catches a traceback, and a key that is asked for and then not looked up."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("UPSTREAM", KEY)
    told = here("serve", url, "--port", "0", "--no-auth", "--upstream-key-env", "UPSTREAM", cwd=tmp_path)
    assert told.code == 2
    assert "can not be reached" in told.err
    assert "vllm serve" in told.err
    assert KEY not in told.out + told.err
    told = here("serve", url, "--port", "0", "--no-auth", "--upstream-key-env", "MISSING", cwd=tmp_path)
    assert told.code == 2
    assert "no such variable" in told.err


def test_certificates_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a client that takes anybody for the server, and a company's own authority that can't be named."""
    cert, key = certificate(tmp_path)
    with upstream(tls=(str(tmp_path / cert), str(tmp_path / key))) as up:
        up.says[COMPLETIONS] = streaming(*HELLO, ENDED, COUNTED)
        with pytest.raises(WhetError, match="SSL_CERT_FILE"):
            asked_of(up, ask("x"))
        assert up.asked == []
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / cert))
        assert asked_of(up, ask("x"))[0].text == "Hello"


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("http://127.0.0.1:8001", "http://127.0.0.1:8001/v1"),
        ("http://localhost:8001/v1/", "http://localhost:8001/v1"),
        ("http://[::1]:8001", "http://[::1]:8001/v1"),
        ("https://models.example.org/team", "https://models.example.org/team/v1"),
        ("http://vllm:8000", None),
        ("http://10.0.0.7:8000", None),
        ("https://user:secret@example.org", None),
        ("https://example.org/v1?key=secret", None),
        ("https://", None),
        ("http://127.0.0.1:port", None),
    ],
)
def test_an_address_is_one_that_nobody_listens_in_on(given: str, url: str | None) -> None:
    """Catches prompts that cross the network in the clear, and keys in addresses, which end up in logs."""
    assert chosen_for(given) == "vllm"
    if url is None:
        with pytest.raises(WhetError) as refused:
            Address.of(given)
        assert "secret" not in str(refused.value) or "?" in given
    else:
        assert Address.of(given).url == url
    assert Address.of("http://vllm:8000", plain_http=True).url == "http://vllm:8000/v1"


def test_options_of_an_address_are_for_an_address(tmp_path: Path) -> None:
    """Catches a key that is given and means nothing, and adapters that are."""
    for options in ({"upstream_key": SecretStr("x")}, {"upstream_plain_http": True}):
        with pytest.raises(WhetError, match="no server is asked"):
            open_engine("builtin:tiny", **options)  # type: ignore[arg-type]
    with pytest.raises(WhetError, match="--lora-modules"):
        open_engine("http://127.0.0.1:8001", adapters={"a": tmp_path})
    with pytest.raises(WhetError, match="no address"):
        open_engine(str(tmp_path), "vllm")


@pytest.mark.parametrize("value", ["", "   ", "two words", "schlüssel", "a\nb"])
def test_a_key_that_no_header_can_hold_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a client whose own error would show the key."""
    monkeypatch.setenv("UPSTREAM", value)
    with pytest.raises(WhetError) as refused:
        key_from("UPSTREAM")
    assert not value.strip() or value not in str(refused.value)
    monkeypatch.setenv("UPSTREAM", f"{KEY}\n")
    assert key_from("UPSTREAM").get_secret_value() == KEY


async def _until(what: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not what():
            await asyncio.sleep(0.005)
