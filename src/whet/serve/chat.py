"""POST /v1/chat/completions: from OpenAI's request to the engine's, and from its pieces to OpenAI's answer."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from whet.serve.access_log import Record
from whet.serve.answers import (
    Call,
    CalledFunction,
    ChatChoice,
    ChatCompletion,
    ChatMessage,
    Logprobs,
    Usage,
    chat_logprob,
    usage_of,
)
from whet.serve.interface import Engine, Finish, Request, ServedModel, TokenLogprob
from whet.serve.schemas import ChatRequest, NamedTool
from whet.serve.stream import Answers, Delta, event
from whet.serve.tool_calls import forced_schema


class Chat:
    """One chat request being answered. max_tokens: of each answer."""

    def __init__(self, body: ChatRequest, model: ServedModel, engine: Engine, record: Record, max_tokens: int):
        self.body, self.model = body, model
        self.id, self.created = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())
        self.answers = Answers(
            engine,
            [self._request(index, max_tokens) for index in range(body.count)],
            record,
            tools=[tool.function.name for tool in body.offered],
            one_call=body.parallel_tool_calls is False,
            shared=body.count,
        )

    def _request(self, index: int, max_tokens: int) -> Request:
        body = self.body
        alternatives = (body.top_logprobs or 0) if body.logprobs else None
        tools = [tool.model_dump(exclude_none=True) for tool in body.offered]
        return Request(
            model=self.model.name,
            sampling=body.sampling(max_tokens, index, logprobs=alternatives, schema=self._schema()),
            messages=body.plain_messages(),
            tools=tools or None,
        )

    def _schema(self) -> dict[str, Any] | None:
        """Of the whole answer; where a tool must be called, of the call."""
        choice = self.body.tool_choice
        if choice in (None, "auto", "none"):
            return self.body.answer_schema
        tools = {tool.function.name: tool.function.parameters for tool in self.body.offered}
        if isinstance(choice, NamedTool):
            tools = {choice.function.name: tools[choice.function.name]}
        return forced_schema(tools)

    # ---------------------------------------------------------------- whole

    async def whole(self) -> ChatCompletion:
        """Raises ApiError."""
        choices = [_Choice(index) for index in range(self.body.count)]
        async with aclosing(self.answers.deltas()) as deltas:
            async for delta in deltas:
                choices[delta.index].add(delta)
        return ChatCompletion(
            id=self.id,
            created=self.created,
            model=self.model.name,
            choices=[choice.done(self._logprobs(choice.logprobs)) for choice in choices],
            usage=self.usage(),
        )

    def usage(self) -> Usage:
        return usage_of(self.answers.prompt_tokens, self.answers.completion_tokens)

    def _logprobs(self, found: list[TokenLogprob] | tuple[TokenLogprob, ...]) -> Logprobs | None:
        if not self.body.logprobs:
            return None
        return Logprobs(content=[chat_logprob(one, self.body.top_logprobs or 0) for one in found])

    # ---------------------------------------------------------------- streamed

    async def events(self) -> AsyncGenerator[bytes]:
        """Each an event of SSE. Raises ApiError."""
        calls = [0] * self.body.count
        async with aclosing(self.answers.deltas()) as deltas:
            begun = set[int]()
            async for delta in deltas:
                if delta.index not in begun:
                    begun.add(delta.index)
                    yield self._chunk(delta.index, {"role": "assistant", "content": ""})
                if said := self._said(delta, calls):
                    yield self._chunk(delta.index, said, self._logprobs(delta.logprobs) if delta.logprobs else None)
                if delta.finish is not None:
                    yield self._chunk(delta.index, {}, finish=delta.finish)
        if self.body.wants_usage:
            yield event({**self._head(), "choices": [], "usage": self.usage()})

    def _said(self, delta: Delta, calls: list[int]) -> dict[str, Any]:
        """The delta of a chunk. calls: how many each answer has had, which numbers them."""
        said: dict[str, Any] = {"content": delta.text} if delta.text or delta.logprobs else {}
        found = [_call(call.name, call.arguments) for call in delta.calls]
        numbered = [{"index": calls[delta.index] + place, **call.model_dump()} for place, call in enumerate(found)]
        numbered += [{"index": calls[delta.index] + place, **call} for place, call in enumerate(delta.raw_calls)]
        calls[delta.index] += len(found)
        return said | ({"tool_calls": numbered} if numbered else {})

    def _chunk(
        self, index: int, delta: dict[str, Any], logprobs: Logprobs | None = None, finish: Finish | None = None
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        usage = {"usage": None} if self.body.wants_usage else {}
        return event({**self._head(), "choices": [choice], **usage})

    def _head(self) -> dict[str, Any]:
        return {"id": self.id, "object": "chat.completion.chunk", "created": self.created, "model": self.model.name}


@dataclass
class _Choice:
    """One answer, gathered."""

    index: int
    text: str = ""
    calls: list[Call] = field(default_factory=list)
    raw: dict[int, dict[str, Any]] = field(default_factory=dict)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: Finish = "stop"

    def add(self, delta: Delta) -> None:
        self.text += delta.text
        self.calls += [_call(call.name, call.arguments) for call in delta.calls]
        for part in delta.raw_calls:
            self._add_raw(part)
        self.logprobs += delta.logprobs
        self.finish = delta.finish or self.finish

    def _add_raw(self, part: Any) -> None:
        """An engine's own call, which may come in parts: the first has id and name, the others more arguments."""
        call = self.raw.setdefault(part.get("index", len(self.raw)), {"id": "", "name": "", "arguments": ""})
        function = part.get("function") or {}
        call["id"] = call["id"] or part.get("id") or ""
        call["name"] += function.get("name") or ""
        call["arguments"] += function.get("arguments") or ""

    def done(self, logprobs: Logprobs | None) -> ChatChoice:
        calls = [*self.calls, *(_call(call["name"], call["arguments"], call["id"]) for call in self.raw.values())]
        content = None if calls and not self.text else self.text
        message = ChatMessage(content=content, tool_calls=calls or None)
        return ChatChoice(index=self.index, message=message, logprobs=logprobs, finish_reason=self.finish)


def _call(name: str, arguments: str, identifier: str = "") -> Call:
    """With an id of its own, of nine letters and digits: Mistral's templates take no other length."""
    return Call(id=identifier or secrets.token_hex(5)[:9], function=CalledFunction(name=name, arguments=arguments))
