"""An OpenAI-compatible HTTP server over builtin:tiny, in this process, which goes wrong when it is told to.

    with OpenAIServer() as server:
        server.policy = lambda body: Fault(status=429)      # or a text to answer with; None asks the model
        ... server.url, server.requests

Served: /v1/models, /v1/chat/completions (with response_format json_schema: the model fills in the schema, so the reply
always fits it) and /v1/completions (with echo and logprobs). Generation is greedy.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

import whet
from whet.data.template import render
from whet.evals.generation import Generation, generate

NAME = "builtin:tiny"


@dataclass(frozen=True)
class Fault:
    """What the server does instead of answering.

    status, error, headers: of the reply. raw: the reply's whole body. message: keys of the first choice's message.
    delay: seconds before it. trickle: seconds between two bytes of it. drop: the connection ends in the middle of it.
    """

    status: int = 200
    error: str = "as the test asked for"
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    raw: bytes | None = None
    message: dict[str, Any] | None = None
    finish: str = "stop"
    usage: bool = True
    delay: float = 0.0
    trickle: float = 0.0
    drop: bool = False


@dataclass(frozen=True)
class Seen:
    """A request as it came in."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]


Policy = Callable[[dict[str, Any]], Fault | str | None]


class Engine:
    """builtin:tiny, one request at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    @cached_property
    def loaded(self) -> tuple[Any, Any]:
        model, tokenizer = whet.FastLanguageModel.from_pretrained(NAME, load_in_4bit=False, dtype="float32")
        return model.eval(), tokenizer

    def tokens(self, text: str) -> list[int]:
        return list(self.loaded[1](text, add_special_tokens=False)["input_ids"])

    def rendered(self, messages: list[dict[str, Any]]) -> str:
        return render(self.loaded[1], messages, add_generation_prompt=True)

    def answer(self, text: str, max_tokens: int, stop: tuple[str, ...] = ()) -> str:
        with self._lock:
            how = Generation(max_new_tokens=max_tokens, stop=stop)
            return generate(*self.loaded, [self.tokens(text)], how)[0]

    def log_probs(self, text: str) -> tuple[list[str], list[float | None], list[int]]:
        """(tokens, log-probability of each but the first, place of each in the text), the likeliest next token last."""
        model, tokenizer = self.loaded
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], [begin for begin, _ in encoded["offset_mapping"]]
        with self._lock, torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        following = int(logits[-1].argmax())
        values: list[float | None] = [None, *(logits[i, id_].item() for i, id_ in enumerate([*ids[1:], following]))]
        tokens = [text[begin:end] for begin, end in encoded["offset_mapping"]]
        return [*tokens, tokenizer.decode([following])], values, [*offsets, len(text)]

    def _following(self, text: str) -> torch.Tensor:
        """Logits of the token after the text [V]."""
        with self._lock, torch.no_grad():
            logits = self.loaded[0](input_ids=torch.tensor([self.tokens(text)]), logits_to_keep=1).logits[0, -1]
        return torch.as_tensor(logits)

    def filled(self, schema: dict[str, Any], text: str) -> str:
        """JSON that fits the schema, each value the model's own after `text`."""
        if "enum" in schema:
            options = [json.dumps(value) for value in schema["enum"]]
            following = self._following(text)
            return max(options, key=lambda option: following[self.tokens(option)[0]].item())
        if schema["type"] == "string":
            return json.dumps(self.answer(text + '"', 3))
        made = "{"
        for i, (name, part) in enumerate(schema["properties"].items()):
            made += (", " if i else "") + json.dumps(name) + ": "
            made += self.filled(part, text + made)
        return made + "}"


ENGINE = Engine()


class OpenAIServer:
    """key: what Authorization must hold; None takes every request."""

    def __init__(self, key: str | None = None):
        self.key, self.policy = key, (lambda body: None)
        self.requests: list[Seen] = []
        self.most_at_once = self._now = 0
        self.policy: Policy

    def __enter__(self) -> OpenAIServer:
        listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        config = uvicorn.Config(self._app(), log_level="critical", timeout_graceful_shutdown=1, lifespan="off")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([listening],), daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.005)
        return self

    def __exit__(self, *error: object) -> None:
        self._server.should_exit = True
        self._thread.join()

    def _app(self) -> FastAPI:
        app = FastAPI()

        @app.get("/v1/models")
        async def models() -> dict[str, Any]:
            return {"object": "list", "data": [{"id": NAME, "object": "model", "created": 0, "owned_by": "whet"}]}

        @app.post("/v1/chat/completions")
        async def chat(request: Request) -> Response:
            return await self._served(request, self._chat)

        @app.post("/v1/completions")
        async def completions(request: Request) -> Response:
            return await self._served(request, self._completion)

        return app

    async def _served(self, request: Request, answer: Callable[[dict[str, Any]], dict[str, Any]]) -> Response:
        body = await request.json()
        self.requests.append(Seen(request.url.path, dict(request.headers), body))
        self._now += 1
        self.most_at_once = max(self.most_at_once, self._now)
        try:
            if self.key is not None and request.headers.get("authorization") != f"Bearer {self.key}":
                return _error(401, f"Incorrect API key provided: {request.headers.get('authorization')}", None, {})
            if body.get("model") != NAME:
                return _error(404, f"The model `{body.get('model')}` does not exist", "model_not_found", {})
            wanted = self.policy(body)
            if isinstance(wanted, Fault):
                return await _faulty(wanted, body)
            if isinstance(wanted, str):
                return JSONResponse(_chat_reply({"content": wanted}, "stop", 7, 5))
            return JSONResponse(await asyncio.to_thread(answer, body))
        finally:
            self._now -= 1

    def _chat(self, body: dict[str, Any]) -> dict[str, Any]:
        text = ENGINE.rendered(body["messages"])
        form = body.get("response_format") or {"type": "text"}
        if form["type"] == "json_schema":
            said = ENGINE.filled(form["json_schema"]["schema"], text)
        else:
            said = ENGINE.answer(text, body.get("max_tokens", 16), tuple(body.get("stop") or ()))
        return _chat_reply({"content": said}, "stop", len(ENGINE.tokens(text)), len(ENGINE.tokens(said)))

    def _completion(self, body: dict[str, Any]) -> dict[str, Any]:
        prompt = body["prompt"]
        if not isinstance(prompt, str):
            raise HTTPException(400, "one prompt at a time")
        said = (
            "" if body.get("echo") else ENGINE.answer(prompt, body.get("max_tokens", 16), tuple(body.get("stop") or ()))
        )
        choice: dict[str, Any] = {"index": 0, "text": said, "finish_reason": "stop", "logprobs": None}
        if body.get("echo"):
            tokens, values, offsets = ENGINE.log_probs(prompt)
            choice["text"] = "".join(tokens)
            choice["logprobs"] = {"tokens": tokens, "token_logprobs": values, "text_offset": offsets}
        usage = _usage(len(ENGINE.tokens(prompt)), len(ENGINE.tokens(said)))
        return {
            "id": "0",
            "object": "text_completion",
            "created": 0,
            "model": NAME,
            "choices": [choice],
            "usage": usage,
        }


async def _faulty(fault: Fault, body: dict[str, Any]) -> Response:
    await asyncio.sleep(fault.delay)
    if fault.status != 200:
        return _error(fault.status, fault.error, fault.code, fault.headers)
    reply = _chat_reply(fault.message or {"content": "so"}, fault.finish, 7, 5)
    if not fault.usage:
        del reply["usage"]
    content = fault.raw if fault.raw is not None else json.dumps(reply).encode()
    if fault.trickle or fault.drop:
        return StreamingResponse(_in_parts(content, fault), headers={"content-length": str(len(content))})
    return Response(content, media_type="application/json", headers=fault.headers)


async def _in_parts(content: bytes, fault: Fault) -> AsyncIterator[bytes]:
    for place in range(len(content)):
        if fault.drop and place == len(content) // 2:
            raise ConnectionResetError("as the test asked for")
        yield content[place : place + 1]
        await asyncio.sleep(fault.trickle)


def _error(status: int, message: str, code: str | None, headers: dict[str, str]) -> Response:
    return JSONResponse({"error": {"message": message, "type": "error", "code": code}}, status, headers)


def _chat_reply(message: dict[str, Any], finish: str, prompt: int, completion: int) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant"} | message, "finish_reason": finish, "logprobs": None}
    head = {"id": "0", "object": "chat.completion", "created": 0, "model": NAME}
    return head | {"choices": [choice], "usage": _usage(prompt, completion)}


def _usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
