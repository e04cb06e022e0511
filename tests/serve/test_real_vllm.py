"""A real vLLM behind the gateway: OpenAI's client, and what the built-in model says in the server's own process.

Skipped unless WHET_TEST_VLLM holds the address of one that serves the built-in model, on a CPU or a GPU:

    VLLM_API_KEY=... vllm serve src/whet/builtin/tiny --served-model-name tiny --dtype float32 --max-model-len 512 \\
        --port 8001 --structured-outputs-config '{"backend": "xgrammar", "disable_any_whitespace": true}'
    WHET_TEST_VLLM=http://127.0.0.1:8001 VLLM_API_KEY=... pytest tests/serve/test_real_vllm.py

Without that configuration so small a model fills its JSON with white space until the answer's end.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.serve.gateways import Gateway, gateway
from tests.serve.test_openai_client import (  # noqa: F401 (collected here too, over this file's `client`)
    test_a_client_that_stops_reading_frees_the_engine,
    test_a_seed_makes_an_answer_again,
    test_a_stop_is_not_part_of_the_answer,
    test_a_tool_that_must_be_called_is,
    test_an_answer_obeys_its_schema,
    test_chat,
    test_chat_streams_what_it_says_whole,
    test_completions,
    test_faults_are_the_clients_own_exceptions,
    test_logprobs,
    test_models,
    test_several_answers_to_one_question_differ,
)
from whet.serve.engines.in_process import open_engine
from whet.serve.engines.in_process.settings import Settings
from whet.serve.engines.vllm.address import Address, key_from
from whet.serve.engines.vllm.engine import VllmEngine

ADDRESS = os.environ.get("WHET_TEST_VLLM", "")
pytestmark = pytest.mark.skipif(not ADDRESS, reason="WHET_TEST_VLLM names no vLLM")
QUESTIONS = [f"Write {count} sentences about the number {count}." for count in range(2, 10)]


@pytest.fixture(scope="module")
def up() -> Iterator[Gateway]:
    with gateway(VllmEngine(Address.of(ADDRESS, key_from("VLLM_API_KEY")))) as found:
        yield found


@pytest.fixture(scope="module")
def client(up: Gateway) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{up.url}/v1", api_key=up.token, max_retries=0, timeout=60) as made:
        yield made


def chat(question: str, **more: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": question}], "temperature": 0, **more}


def running(up: Gateway) -> float:
    """Requests that vLLM works on, as its own metrics say."""
    lines = up.client.get(f"{ADDRESS}/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:num_requests_running{"))


def test_answers_are_those_of_the_engine_in_process(up: Gateway) -> None:
    """Catches a template, a setting or a special token that vLLM treats otherwise."""
    engine = open_engine("builtin:tiny", settings=Settings(cache_bytes=16 << 20, max_running=8, dtype="float32"))
    with gateway(engine) as here:
        for question in QUESTIONS:
            body = chat(question, max_tokens=16, logprobs=True, top_logprobs=2)
            ours, theirs = (one.post(body=body).json() for one in (here, up))
            assert theirs["usage"] == ours["usage"]
            assert theirs["choices"][0]["message"] == ours["choices"][0]["message"]
            told = [one["choices"][0]["logprobs"]["content"] for one in (ours, theirs)]
            assert len(told[1]) - len(told[0]) in (0, 1), "vLLM tells of the end token as well"
            for mine, other in zip(*told, strict=False):
                assert other["bytes"] == mine["bytes"]
                assert other["logprob"] == pytest.approx(mine["logprob"], abs=1e-2)


def test_a_client_that_leaves_frees_its_place_in_vllm(up: Gateway) -> None:
    """Catches a GPU that goes on writing for nobody."""
    body = chat(QUESTIONS[0], stream=True, max_tokens=400, logit_bias={"2": -100})
    client = socket.create_connection(up.address)
    client.sendall(up.request(json.dumps(body).encode()))
    assert client.recv(4096)
    up.wait_until(lambda: running(up) == 1)
    client.close()
    up.wait_until(lambda: running(up) == 0)


def test_refusals_are_the_client_s(up: Gateway) -> None:
    """Catches vLLM's 400 that becomes a fault of the server, and a limit that is refused beside a long prompt."""
    too_long = up.post(body=chat("x " * 600))
    assert (too_long.status_code, too_long.json()["error"]["type"]) == (400, "invalid_request_error")
    assert "512 tokens" in too_long.json()["error"]["message"]
    out_of_range = up.post(body=chat("x", logit_bias={"99999": 1}))
    assert (out_of_range.status_code, out_of_range.json()["error"]["param"]) == (400, "logit_bias")
    assert up.post(body=chat("x " * 200, max_tokens=500)).status_code == 200
    assert up.post("/v1/embeddings", {"model": "tiny", "input": "x"}).status_code == 400
