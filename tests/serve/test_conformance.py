"""Answers against the types of OpenAI's own client, which are made from OpenAI's published schema.

`strict` checks an answer against them: a field that is missing, of another type, or that the schema does not know (but
those that the gateway adds on purpose) is a fault. Then whatever else fits the gateway's own OpenAPI document.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from openai.types import Completion, CreateEmbeddingResponse, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel

from tests.serve.gateways import Gateway, events, gateway
from tests.serve.scripted import Scripted
from whet.serve.app import Parts, routes_over
from whet.serve.auth import Open

OURS = {"context", "kind", "parent"}
MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]


def strict(kind: type[BaseModel], answer: dict[str, Any]) -> None:
    """Raises where the published type and the answer differ."""
    if kind is Completion and answer["object"] == "text_completion":  # streamed, OpenAI's own have null there
        choices = [{**choice, "finish_reason": choice["finish_reason"] or "stop"} for choice in answer["choices"]]
        answer = {**answer, "choices": choices}
    checked = kind.model_validate(answer, strict=True)
    extra = _unknown(checked) - OURS
    assert not extra, f"the schema does not know {extra}"


def _unknown(value: Any) -> set[str]:
    if isinstance(value, list):
        return set().union(*map(_unknown, value))
    if not isinstance(value, BaseModel):
        return set()
    own = set(value.model_extra or {})
    return own.union(*(_unknown(getattr(value, name)) for name in type(value).model_fields))


# ---------------------------------------------------------------- the published types


@pytest.fixture(scope="module")
def scripted() -> Iterator[Gateway]:
    with gateway(Scripted()) as found:
        yield found


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CHAT = {"model": "scripted", "messages": MESSAGES}
WORDS = {"model": "words", "prompt": "x"}
VECTORS = {"model": "vectors", "input": "x"}
LIST: list[tuple[str, dict[str, Any], type[BaseModel]]] = [
    ("chat/completions", CHAT, ChatCompletion),
    ("chat/completions", {**CHAT, "n": 2, "logprobs": True, "top_logprobs": 2}, ChatCompletion),
    ("chat/completions", {**CHAT, "tools": [TOOL]}, ChatCompletion),
    ("chat/completions", {**CHAT, "stream": True}, ChatCompletionChunk),
    ("chat/completions", {**CHAT, "stream": True, "stream_options": {"include_usage": True}}, ChatCompletionChunk),
    ("chat/completions", {**CHAT, "stream": True, "logprobs": True, "top_logprobs": 1}, ChatCompletionChunk),
    ("completions", WORDS, Completion),
    ("completions", {**WORDS, "logprobs": 2, "n": 2}, Completion),
    ("completions", {**WORDS, "stream": True, "logprobs": 1}, Completion),
    ("completions", {**WORDS, "stream": True, "stream_options": {"include_usage": True}}, Completion),
    ("embeddings", VECTORS, CreateEmbeddingResponse),
    ("embeddings", {**VECTORS, "input": [[1, 2], [3]]}, CreateEmbeddingResponse),
]


@pytest.mark.parametrize(("path", "body", "kind"), LIST, ids=lambda value: value if isinstance(value, str) else "")
def test_answers_are_of_the_published_types(
    scripted: Gateway, path: str, body: dict[str, Any], kind: type[BaseModel]
) -> None:
    response = scripted.post(f"/v1/{path}", body)
    assert response.status_code == 200, response.text
    for answer in events(response.text)[:-1] if body.get("stream") else [response.json()]:
        strict(kind, answer)


def test_models_are_of_the_published_type(scripted: Gateway) -> None:
    found = scripted.get("/v1/models").json()
    assert found["object"] == "list"
    for card in found["data"]:
        strict(Model, card)
        assert scripted.get(f"/v1/models/{card['id']}").json() == card


def test_calls_of_tools_are_of_the_published_type() -> None:
    text = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    with gateway(Scripted(answer=[text])) as found:
        strict(ChatCompletion, found.post(body={**CHAT, "tools": [TOOL]}).json())
        for chunk in events(found.post(body={**CHAT, "tools": [TOOL], "stream": True}).text)[:-1]:
            strict(ChatCompletionChunk, chunk)


def test_the_check_finds_what_it_looks_for(scripted: Gateway) -> None:
    """Catches a check that passes whatever comes."""
    good = scripted.post().json()
    for bad in ({**good, "made_up": 1}, {**good, "created": "now"}, {key: good[key] for key in good if key != "id"}):
        with pytest.raises((AssertionError, ValueError)):
            strict(ChatCompletion, bad)


TAKEN = {
    "messages", "model", "frequency_penalty", "logit_bias", "logprobs", "max_completion_tokens", "max_tokens",
    "metadata", "modalities", "n", "parallel_tool_calls", "presence_penalty", "prompt_cache_key", "response_format",
    "safety_identifier", "seed", "service_tier", "stop", "store", "stream", "stream_options", "temperature",
    "tool_choice", "tools", "top_logprobs", "top_p", "user",
}  # fmt: skip
REFUSED = {
    "audio", "function_call", "functions", "moderation", "prediction", "prompt_cache_options",
    "prompt_cache_retention", "reasoning_effort", "verbosity", "web_search_options",
}  # fmt: skip


def test_every_published_field_of_chat_is_taken_or_refused_by_name(scripted: Gateway) -> None:
    """Catches a new field of OpenAI's that nobody has decided about, and one that is dropped in silence."""
    from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming as Published

    from whet.serve.schemas import ChatRequest

    assert set(Published.__annotations__) | {"stream"} == TAKEN | REFUSED
    assert set(ChatRequest.model_fields) == TAKEN | {"top_k"}
    for name in REFUSED:
        error = scripted.post(body={**CHAT, name: {}}).json()["error"]
        assert (error["param"], error["type"]) == (name, "invalid_request_error")


# ---------------------------------------------------------------- everything else that fits the OpenAPI document

PARTS = Parts(auth=Open())
DOCUMENT = routes_over(Scripted(), PARTS).openapi()
schema = schemathesis.openapi.from_dict(DOCUMENT)
CHECKS = [
    schemathesis.checks.not_a_server_error,
    schemathesis.checks.status_code_conformance,
    schemathesis.checks.content_type_conformance,
    schemathesis.checks.response_schema_conformance,
    schemathesis.checks.negative_data_rejection,
]


@schema.parametrize()
@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_no_request_of_the_document_ends_in_a_fault_of_the_server(case: schemathesis.Case, scripted: Gateway) -> None:
    """Catches 5xx, and answers that the document does not announce."""
    served = {"chat": "scripted", "completions": "words", "embeddings": "vectors"}.get(
        case.path.rpartition("v1/")[2].partition("/")[0]
    )
    model = case.body.get("model") if isinstance(case.body, dict) else None
    if served and isinstance(model, str) and 0 < len(model) <= 256:
        case.body["model"] = served  # with made-up names alone, no request would get any further
    case.headers = {**(case.headers or {}), **scripted.auth}
    case.call_and_validate(base_url=scripted.url, checks=CHECKS)


def test_the_document_is_not_given_to_strangers(scripted: Gateway, tmp_path: Path) -> None:
    for path in ("/openapi.json", "/docs", "/redoc"):
        assert scripted.client.get(path).status_code == 401
        assert scripted.get(path).status_code == 404
