"""What stands in the server's answers, as far as it is read. Other fields are passed over.

A stream's events are chunks: of a chat (`ChatChunk`) or of a completion (`CompletionChunk`). The counts of tokens come
with the last one, which has no choices. Source: OpenAI's published schema, and vLLM's protocol.py for what it adds.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, Field, ValidationError, model_validator

from whet.serve.interface import EngineDown, Finish, Piece, TokenLogprob

FINISHES: dict[str, Finish] = {
    "stop": "stop",
    "length": "length",
    "tool_calls": "tool_calls",
    "content_filter": "content_filter",
}
UNKNOWN = "\ufffd"
Model = TypeVar("Model", bound=BaseModel)


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int | None = None


class Logprob(BaseModel):
    """bytes: vLLM gives those of the text, so that a part of a character has those of U+FFFD, which is none of it."""

    token: str
    logprob: float
    bytes: list[Annotated[int, Field(ge=0, le=255)]] | None = None
    top_logprobs: list[Logprob] = []

    def told(self) -> TokenLogprob:
        of_text = self.bytes is None or bytes(self.bytes) == self.token.encode()
        raw = _bytes(self.token) if of_text else bytes(self.bytes or ())
        return TokenLogprob(self.token, raw, self.logprob, tuple(one.told() for one in self.top_logprobs))


class Logprobs(BaseModel):
    content: list[Logprob] | None = None


class CalledFunction(BaseModel):
    name: str | None = None
    arguments: str | None = None


class ToolCall(BaseModel):
    """A call, or more of one: the first part has id and name."""

    index: int = 0
    id: str | None = None
    type: str | None = None
    function: CalledFunction | None = None


class ChatDelta(BaseModel):
    content: str | None = None
    tool_calls: list[ToolCall] | None = None


class ChatChosen(BaseModel):
    """finish_reason: a word of FINISHES, or one of the server's own, as vLLM's `abort`."""

    delta: ChatDelta
    logprobs: Logprobs | None = None
    finish_reason: str | None = None

    def added(self) -> Piece:
        told = (self.logprobs.content if self.logprobs else None) or []
        calls = tuple(call.model_dump(exclude_none=True) for call in self.delta.tool_calls or ())
        return Piece(self.delta.content or "", tuple(one.told() for one in told), calls)


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None = None

    @model_validator(mode="after")
    def _one_each(self) -> CompletionLogprobs:
        if any(len(one) != len(self.tokens) for one in (self.token_logprobs, self.top_logprobs or self.tokens)):
            raise ValueError("lists of different lengths")
        return self

    def told(self) -> tuple[TokenLogprob, ...]:
        tops = self.top_logprobs or [None] * len(self.tokens)
        return tuple(
            TokenLogprob(token, _bytes(token), float("-inf") if logprob is None else logprob, _likeliest(top or {}))
            for token, logprob, top in zip(self.tokens, self.token_logprobs, tops, strict=True)
        )


class CompletionChosen(BaseModel):
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None

    def added(self) -> Piece:
        return Piece(self.text, self.logprobs.told() if self.logprobs else ())


class ChatChunk(BaseModel):
    choices: list[ChatChosen] | None = None
    usage: Usage | None = None
    error: Any = None


class CompletionChunk(BaseModel):
    choices: list[CompletionChosen] | None = None
    usage: Usage | None = None
    error: Any = None


class Card(BaseModel):
    """A model in /v1/models. max_model_len is vLLM's word for the context, context and kind are whet's own."""

    id: str
    owned_by: str | None = None
    parent: str | None = None
    max_model_len: int | None = None
    context: int | None = None
    kind: str | None = None


class Cards(BaseModel):
    data: list[Card]


class Vector(BaseModel):
    index: int
    embedding: list[float]


class Vectors(BaseModel):
    data: list[Vector]
    usage: Usage


def read(kind: type[Model], text: str | bytes) -> Model:
    """Raises EngineDown for what is no JSON of that kind. What stood there is not repeated."""
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise EngineDown(f"the models' server's reply is no {kind.__name__}: {place}: {first['msg']}") from None


async def pieces(
    events: AsyncIterator[str], kind: type[ChatChunk | CompletionChunk], fault: Callable[[Any], Exception]
) -> AsyncIterator[Piece]:
    """An answer out of its stream; read to the stream's end, so that the connection can be used again.

    fault: what an error in the stream means. Raises EngineDown for a stream that ends before the answer does.
    """
    finish, usage = None, None
    async for data in events:
        if data == "[DONE]":
            continue
        chunk = read(kind, data)
        if chunk.error is not None:
            raise fault(chunk.error)
        if chunk.choices is None:
            raise EngineDown(f"the models' server's reply is no {kind.__name__}: it has no choices")
        usage = chunk.usage or usage
        for choice in chunk.choices:
            piece, finish = choice.added(), choice.finish_reason or finish
            if piece != Piece():
                yield piece
    if finish not in FINISHES:
        raise EngineDown("the models' server ended an answer early" + (f": {finish[:40]!r}" if finish else ""))
    if usage is None:
        raise EngineDown("the models' server counts no tokens: it passes over stream_options.include_usage")
    yield Piece(
        finish=FINISHES[finish],
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens or 0,
    )


def _bytes(token: str) -> bytes:
    """None where the text is that of a part of a character."""
    return b"" if UNKNOWN in token else token.encode()


def _likeliest(top: Mapping[str, float]) -> tuple[TokenLogprob, ...]:
    """vLLM names the drawn token first, though it be the least likely."""
    ranked = sorted(top.items(), key=lambda item: -item[1])
    return tuple(TokenLogprob(token, _bytes(token), logprob) for token, logprob in ranked)
