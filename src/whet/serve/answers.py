"""What clients get: OpenAI's objects. The routes declare them, so that the OpenAPI document says what comes back."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from whet.serve.interface import Finish, TokenLogprob

LEAST = -9999.0
"""Stands for the logarithm of zero, which JSON has no number for; OpenAI's own value."""


class TopLogprob(BaseModel):
    token: str
    bytes: list[int] | None
    logprob: float


class Logprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class Logprobs(BaseModel):
    content: list[Logprob] | None = None
    refusal: None = None


class CalledFunction(BaseModel):
    name: str
    arguments: str


class Call(BaseModel):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[Call] | None = Field(None, exclude_if=lambda calls: calls is None)


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: Logprobs | None
    finish_reason: Finish


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class CompletionLogprobs(BaseModel):
    """One entry a token; text_offset: characters from the start of the answer."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Finish | None


class Completion(BaseModel):
    """Streamed, it is the same object for each part."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = Field(None, exclude_if=lambda usage: usage is None)


class EmbeddingData(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str = Field(description="Numbers, or the base64 of little-endian float32.")


class EmbeddingUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(BaseModel):
    object: Literal["list"] = "list"
    model: str
    data: list[EmbeddingData]
    usage: EmbeddingUsage


class ModelCard(BaseModel):
    """context: tokens of prompt and answer at most. parent: the base's name, for an adapter on it."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["whet"] = "whet"
    context: int
    kind: Literal["chat", "completion", "embedding"]
    parent: str | None = None


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Status(BaseModel):
    status: str


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    error: ErrorDetail


def usage_of(prompt_tokens: int, completion_tokens: int) -> Usage:
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
    )


def chat_logprob(found: TokenLogprob, alternatives: int) -> Logprob:
    """alternatives: how many were asked for; engines may give more."""
    top = [
        TopLogprob(token=one.token, bytes=list(one.bytes), logprob=max(one.logprob, LEAST))
        for one in found.top[:alternatives]
    ]
    return Logprob(token=found.token, bytes=list(found.bytes), logprob=max(found.logprob, LEAST), top_logprobs=top)


def completion_logprobs(found: list[TokenLogprob], alternatives: int, offset: int) -> CompletionLogprobs:
    """offset: characters of the answer before these tokens."""
    offsets = []
    for one in found:
        offsets.append(offset)
        offset += len(one.token)
    return CompletionLogprobs(
        tokens=[one.token for one in found],
        token_logprobs=[max(one.logprob, LEAST) for one in found],
        top_logprobs=[{alt.token: max(alt.logprob, LEAST) for alt in one.top[:alternatives]} for one in found],
        text_offset=offsets,
    )
