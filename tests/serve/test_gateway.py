"""What the gateway itself does with requests and answers, over an engine whose answers are written down."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from tests.serve.gateways import CHAT, Gateway, events, gateway
from tests.serve.scripted import Scripted
from whet.serve.interface import Busy, EngineDown, Refused
from whet.serve.limits import Settings


@pytest.fixture(scope="module")
def shared() -> Iterator[Gateway]:
    with gateway(Scripted()) as up:
        yield up


def chat(**more: Any) -> dict[str, Any]:
    return {**CHAT, **more}


# ---------------------------------------------------------------- whole answers


def test_a_chat_answer_is_openais(shared: Gateway) -> None:
    answer = shared.post().json()
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello!", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert answer["usage"] == {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}


def test_the_engine_gets_what_was_asked(shared: Gateway) -> None:
    """Catches a setting that is taken and then not passed on."""
    body = chat(
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        ],
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        max_completion_tokens=17,
        seed=3,
        stop="END",
        presence_penalty=0.1,
        frequency_penalty=-0.2,
        logit_bias={"5": -100},
        logprobs=True,
        top_logprobs=2,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}},
    )
    shared.engine.asked.clear()
    assert shared.post(body=body).status_code == 200
    (asked,) = shared.engine.asked
    assert asked.messages == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "ab"}]
    sampling = asked.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.max_tokens) == (0.5, 0.9, 40, 17)
    assert (sampling.seed, sampling.stop, sampling.presence_penalty) == (3, ("END",), 0.1)
    assert (sampling.frequency_penalty, sampling.logit_bias, sampling.logprobs) == (-0.2, {5: -100.0}, 2)
    assert sampling.schema == {"type": "object"}


def test_a_temperature_of_zero_is_not_the_default(shared: Gateway) -> None:
    """Catches `temperature or 1.0`."""
    shared.engine.asked.clear()
    shared.post(body=chat(temperature=0, max_tokens=None))
    assert shared.engine.asked[0].sampling.temperature == 0.0
    assert shared.engine.asked[0].sampling.max_tokens == 4096


def test_several_answers_have_seeds_of_their_own_and_one_prompt(shared: Gateway) -> None:
    """Catches n answers that are all the same, and a prompt that is counted n times."""
    shared.engine.asked.clear()
    answer = shared.post(body=chat(n=3, seed=2**63 - 1)).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert {asked.sampling.seed for asked in shared.engine.asked} == {2**63 - 1, -(2**63), -(2**63) + 1}
    assert answer["usage"] == {"prompt_tokens": 7, "completion_tokens": 9, "total_tokens": 16}


def test_logprobs_hold_no_number_that_json_lacks(shared: Gateway) -> None:
    """Catches -Infinity, which is not JSON, and more alternatives than were asked for."""
    response = shared.post(body=chat(logprobs=True, top_logprobs=2))
    assert "Infinity" not in response.text
    content = response.json()["choices"][0]["logprobs"]["content"]
    assert [one["token"] for one in content] == ["Hel", "lo", "!"]
    assert content[0]["bytes"] == [72, 101, 108]
    assert content[0]["logprob"] == -9999.0
    assert [len(one["top_logprobs"]) for one in content] == [2, 2, 2]


def test_completions_answer_each_prompt(shared: Gateway) -> None:
    body = {"model": "words", "prompt": ["one ", "two "], "n": 2, "echo": True, "max_tokens": 5}
    answer = shared.post("/v1/completions", body).json()
    assert [choice["text"] for choice in answer["choices"]] == ["one Hello!"] * 2 + ["two Hello!"] * 2
    assert answer["usage"] == {"prompt_tokens": 14, "completion_tokens": 12, "total_tokens": 26}


def test_completions_logprobs_have_offsets_into_the_answer(shared: Gateway) -> None:
    body = {"model": "words", "prompt": [1, 2], "logprobs": 1}
    logprobs = shared.post("/v1/completions", body).json()["choices"][0]["logprobs"]
    assert logprobs["text_offset"] == [0, 3, 5]
    streamed = events(shared.post("/v1/completions", body | {"stream": True}).text)
    offsets = [chunk["choices"][0]["logprobs"]["text_offset"] for chunk in streamed[:-2]]
    assert offsets == [[0], [3], [5]]


def test_embeddings_are_numbers_or_their_bytes(shared: Gateway) -> None:
    """Catches float64 or big-endian bytes, which the openai client would read as noise."""
    import base64
    import struct

    body = {"model": "vectors", "input": ["ab", "abc"]}
    plain = shared.post("/v1/embeddings", body).json()
    assert [row["embedding"] for row in plain["data"]] == [[2.0, 0.5, -1.0], [3.0, 0.5, -1.0]]
    assert plain["usage"] == {"prompt_tokens": 5, "total_tokens": 5}
    packed = shared.post("/v1/embeddings", body | {"encoding_format": "base64"}).json()
    assert struct.unpack("<3f", base64.b64decode(packed["data"][1]["embedding"])) == (3.0, 0.5, -1.0)
    assert shared.post("/v1/embeddings", body | {"dimensions": 2}).status_code == 400


# ---------------------------------------------------------------- streams


def test_a_stream_is_openais_chunks(shared: Gateway) -> None:
    response = shared.post(body=chat(stream=True, stream_options={"include_usage": True}))
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, usage, done = events(response.text)
    assert done == "[DONE]"
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""},
        {"content": "Hel"},
        {"content": "lo"},
        {"content": "!"},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 4 + ["stop"]
    assert all(chunk["usage"] is None for chunk in chunks)
    assert (usage["choices"], usage["usage"]["total_tokens"]) == ([], 10)
    assert len({chunk["id"] for chunk in [*chunks, usage]}) == 1


def test_several_streams_of_one_request_are_not_mixed() -> None:
    """Catches pieces that land in another answer."""
    with gateway(Scripted(answer=[*"abcdefgh"])) as up:
        *chunks, _ = events(up.post(body=chat(stream=True, n=4)).text)
    for index in range(4):
        own = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert "".join(delta.get("content", "") for delta in own) == "abcdefgh"


def test_text_with_line_breaks_stays_in_its_event() -> None:
    """Catches an answer that ends an event early, and forges the next."""
    text = 'a\n\ndata: [DONE]\n\n\r\u2028\x00"'
    with gateway(Scripted(answer=[text])) as up:
        chunks = events(up.post(body=chat(stream=True)).text)
    assert chunks[1]["choices"][0]["delta"]["content"] == text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [
        (Refused("the prompt is too long", "messages"), 400, None),
        (Busy(2.5), 429, "overloaded"),
        (EngineDown("node died at /home/secret"), 503, "engine_down"),
        (RuntimeError("secret of the server"), 500, "internal_error"),
    ],
)
def test_what_an_engine_refuses_before_it_begins_has_its_status(
    failure: Exception, status: int, code: str | None, stream: bool
) -> None:
    """Catches a stream that says 200 and then fails, and a bug's words that reach a client."""
    with gateway(Scripted(failure=failure)) as up:
        response = up.post(body=chat(stream=stream))
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (status, code)
        assert "secret" not in response.text
        assert set(error) == {"message", "type", "param", "code"}
        assert response.headers.get("retry-after") == {429: "3", 503: "5"}.get(status)
        assert up.engine.running == 0


@pytest.mark.parametrize(
    ("failure", "code"), [(EngineDown("died"), "engine_down"), (RuntimeError("secret"), "internal_error")]
)
def test_a_stream_that_breaks_says_so_and_is_not_done(failure: Exception, code: str) -> None:
    """Catches half an answer that looks whole."""
    with gateway(Scripted(failure=failure, fails_at=2)) as up:
        response = up.post(body=chat(stream=True))
        assert "secret" not in response.text
        *_, last = events(response.text)
        assert last["error"]["code"] == code
        assert up.lines(1)[0]["error"] == code


def test_an_engine_that_stops_without_an_end_is_down() -> None:
    """Catches an answer cut off by a crash that is given out as whole."""

    class Breaks(Scripted):
        async def generate(self, request: Any) -> Any:
            async for piece in super().generate(request):
                if piece.finish is None:
                    yield piece

    with gateway(Breaks()) as up:
        assert up.post().status_code == 503


# ---------------------------------------------------------------- tools

TOOLS = [
    {
        "type": "function",
        "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
    },
    {"type": "function", "function": {"name": "time"}},
]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call>'


def test_calls_of_tools_come_out_of_the_text() -> None:
    with gateway(Scripted(answer=["I look. ", CALL[:13], CALL[13:40], CALL[40:]])) as up:
        choice = up.post(body=chat(tools=TOOLS)).json()["choices"][0]
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] == "I look. "
        (call,) = choice["message"]["tool_calls"]
        assert (call["type"], call["function"]["name"]) == ("function", "weather")
        assert json.loads(call["function"]["arguments"]) == {"city": "Ulm"}
        assert up.engine.asked[0].tools == TOOLS
        *chunks, _ = events(up.post(body=chat(tools=TOOLS, stream=True)).text)
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        assert "".join(delta.get("content", "") for delta in deltas) == "I look. "
        assert [call["index"] for delta in deltas for call in delta.get("tool_calls", [])] == [0]
        assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_without_tools_text_stays_text() -> None:
    """Catches an answer about tools that loses its examples."""
    with gateway(Scripted(answer=[CALL])) as up:
        for body in (CHAT, chat(tools=TOOLS, tool_choice="none")):
            choice = up.post(body=body).json()["choices"][0]
            assert (choice["message"]["content"], choice["finish_reason"]) == (CALL, "stop")
        assert up.engine.asked[1].tools is None


def test_only_one_call_where_several_are_not_wanted() -> None:
    with gateway(Scripted(answer=[CALL, "\n", CALL])) as up:
        for parallel, count in ((None, 2), (False, 1)):
            message = up.post(body=chat(tools=TOOLS, parallel_tool_calls=parallel)).json()["choices"][0]["message"]
            assert len(message["tool_calls"]) == count
            assert message["content"] is None


def test_a_call_that_must_be_is_forced_by_a_schema() -> None:
    """Catches tool_choice that is taken and means nothing."""
    with gateway(Scripted(answer=['{"name": "weather", "arg', 'uments": {"city": "Ulm"}}'])) as up:
        for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
            answer = up.post(body=chat(tools=TOOLS, tool_choice=choice)).json()["choices"][0]
            assert answer["message"]["tool_calls"][0]["function"]["name"] == "weather"
        either, one = (asked.sampling.schema for asked in up.engine.asked)
        assert [form["properties"]["name"]["const"] for form in either["anyOf"]] == ["weather", "time"]
        assert one["properties"]["arguments"] == TOOLS[0]["function"]["parameters"]


def test_a_conversation_with_calls_goes_back_to_the_engine() -> None:
    with gateway(Scripted()) as up:
        call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Ulm"}'}}
        history = [
            *CHAT["messages"],
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "rain"},
        ]
        assert up.post(body=chat(messages=history, tools=TOOLS)).status_code == 200
        said = up.engine.asked[0].messages
        assert said[1]["content"] == ""
        assert said[1]["tool_calls"][0]["function"]["name"] == "weather"
        assert said[2] == {"role": "tool", "content": "rain", "tool_call_id": "c1"}


# ---------------------------------------------------------------- requests that are refused


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 4097}, "max_tokens"),
        ({"n": 9}, "n"),
        ({"n": 0}, "n"),
        ({"stop": ""}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"top_logprobs": 3}, None),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"audio": {}}, "audio"),
        ({"store": True}, "store"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
        ({"messages": [{"role": "assistant"}]}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"tool_choice": "required"}, None),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "rm"}}}, None),
        ({"tools": [*TOOLS, TOOLS[0]]}, None),
        ({"stream_options": {"include_usage": True}}, None),
        ({"model": "vectors"}, "model"),
        ({"model": "words"}, "model"),
        ({"model": None}, "model"),
    ],
)
def test_a_request_that_can_not_be_honoured_is_refused(shared: Gateway, change: dict[str, Any], param: Any) -> None:
    """Catches fields that are dropped in silence, and faults that are not said where they are."""
    shared.engine.asked.clear()
    response = shared.post(body=chat(**change))
    assert response.status_code == 400, response.text
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert response.json()["error"]["param"] == param
    assert shared.engine.asked == []


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]), "should be 'text'"),
        (chat(messages=[{"role": "user", "content": 7}]), "text is wanted, or a list of its parts"),
        ({"model": "words", "prompt": [1, "a"]}, "prompt.ids.1"),
        ({"model": "words", "prompt": []}, "text is wanted, or token ids"),
        ({"model": "vectors", "input": ["a", ""]}, "a text is empty"),
        (chat(fancy=1), "Unknown or unsupported field: fancy."),
        (chat(tool_choice="required"), "there are no tools"),
    ],
)
def test_a_refusal_says_what_is_wrong_and_where(shared: Gateway, body: dict[str, Any], words: str) -> None:
    path = {"scripted": "chat/completions", "words": "completions", "vectors": "embeddings"}[body["model"]]
    response = shared.post(f"/v1/{path}", body)
    assert response.status_code == 400
    assert words in response.json()["error"]["message"]


def test_more_tokens_than_the_operator_allows_are_refused() -> None:
    with gateway(Scripted(), settings=Settings(max_tokens=100)) as up:
        assert up.post(body=chat(max_tokens=101)).status_code == 400
        assert up.post().status_code == 200
        assert up.engine.asked[0].sampling.max_tokens == 100


# ---------------------------------------------------------------- clients that leave, or do not read


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("how", ["close", "reset", "half-close"])
def test_a_client_that_leaves_frees_its_place(stream: bool, how: str) -> None:
    """Catches slots that stay taken: the client goes while the engine waits to go on."""
    with gateway(Scripted(hold=True)) as up:
        body = json.dumps(chat(stream=stream)).encode()
        client = socket.create_connection(up.address)
        client.sendall(up.request(body))
        up.wait_until(lambda: up.engine.running == 1)
        if how == "reset":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        client.shutdown(socket.SHUT_WR) if how == "half-close" else client.close()
        up.wait_until(lambda: up.engine.running == 0)
        line = up.lines(1)[0]
        assert line["left"]
        assert up.parts.limits.running == 0
        assert up.parts.drain.running == 0
        client.close()


def test_a_client_that_reads_nothing_is_dropped() -> None:
    """Catches slow readers that hold a place for ever: megabytes wait, and nobody takes them."""
    answer = ["x" * 65536] * 400
    with gateway(Scripted(answer=answer), settings=Settings(write_patience=0.2)) as up:
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(up.address)
        client.sendall(up.request(json.dumps(chat(stream=True)).encode()))
        up.wait_until(lambda: up.engine.closed == 1)
        assert up.lines(1)[0]["left"]
        assert up.engine.running == 0
        client.close()


def test_answers_that_are_out_are_not_taken_for_abandoned(shared: Gateway) -> None:
    """Catches a finished answer that is logged as one that its client left."""
    before = len(shared.log.getvalue().splitlines())
    for stream in (True, False):
        shared.post(body=chat(stream=stream))
    assert [line["left"] for line in shared.lines(before + 2)[before:]] == [False, False]


# ---------------------------------------------------------------- draining


def test_draining_lets_the_last_answer_end_and_takes_no_new_one() -> None:
    """Catches a deployment that cuts off answers, or goes on taking requests."""
    import signal
    import threading

    with gateway(Scripted(hold=True)) as up:
        got: list[Any] = []
        client = threading.Thread(target=lambda: got.append(up.post()))
        client.start()
        up.wait_until(lambda: up.engine.running == 1)
        assert up.get("/ready").json() == {"status": "ready"}
        up.in_loop(lambda: up.server.end(signal.SIGTERM))
        up.wait_until(lambda: up.get("/ready").status_code == 503)
        assert up.get("/health").status_code == 200
        refused = up.post()
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert "retry-after" in refused.headers
        up.in_loop(up.engine.go_on.set)
        client.join(20)
        assert got[0].json()["choices"][0]["message"]["content"] == "Hello!"
        up.wait_until(lambda: not up.engine.started)


def test_draining_ends_what_does_not_end_by_itself() -> None:
    """Catches a server that never goes down because one answer never ends."""
    import signal

    with gateway(Scripted(hold=True), patience=0.1) as up:
        client = socket.create_connection(up.address)
        client.sendall(up.request(json.dumps(CHAT).encode()))
        up.wait_until(lambda: up.engine.running == 1)
        up.in_loop(lambda: up.server.end(signal.SIGTERM))
        up.wait_until(lambda: not up.engine.started)
        assert up.engine.running == 0
        client.close()


# ---------------------------------------------------------------- what is written down


def test_the_log_has_no_word_of_prompts_answers_or_keys(shared: Gateway) -> None:
    shared.post(body=chat(messages=[{"role": "user", "content": "my secret illness"}]))
    shared.get(f"/v1/models/{shared.token}")
    shared.get(f"/{shared.token}?key={shared.token}")
    shared.post(body=chat(model="my-secret-model"))
    shared.wait_until(lambda: "other" in shared.log.getvalue())
    for word in ("secret", "Hello", shared.token, shared.token[14:]):
        assert word not in shared.log.getvalue()


def test_the_log_says_who_asked_what_and_how_long_it_took() -> None:
    with gateway(Scripted()) as up:
        response = up.post(body=chat(stream=True))
        (line,) = up.lines(1)
    assert line["id"] == response.headers["x-request-id"]
    expected = {"status": 200, "key": "tests", "model": "scripted", "stream": True, "finish": "stop", "error": None}
    assert {name: line[name] for name in expected} == expected
    assert (line["prompt_tokens"], line["completion_tokens"]) == (7, 3)
    assert 0 <= line["first_token_seconds"] <= line["seconds"]


def test_content_is_logged_when_asked_for() -> None:
    with gateway(Scripted(), content=True) as up:
        up.post(body=chat(stream=True))
        (line,) = up.lines(1)
    assert line["request"]["messages"] == [{"role": "user", "content": "Hi"}]
    assert line["answers"] == ["Hello!"]


def test_metrics_count_requests_and_tokens(shared: Gateway) -> None:
    shared.post()
    shared.post(body=chat(model="made-up"))
    text = shared.get("/metrics").text
    assert 'whet_tokens_total{kind="completion",model="scripted"}' in text
    assert 'whet_requests_total{path="/v1/chat/completions",status="404"}' in text
    assert "made-up" not in text, "a label that clients choose would grow without end"


def test_probes_need_no_key_and_say_nothing_more(shared: Gateway) -> None:
    assert shared.client.get("/health").json() == {"status": "ok"}
    assert shared.client.get("/ready").json() == {"status": "ready"}
