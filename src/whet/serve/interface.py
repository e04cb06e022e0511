"""What the gateway asks of an engine, and what an engine answers.

The gateway speaks OpenAI's HTTP; engines speak this. A request is text and settings, an answer a stream of pieces.
Whoever stops reading an answer early closes it (`aclose`), and the engine frees what it held for it at once.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

Finish: TypeAlias = Literal["stop", "length", "tool_calls", "content_filter"]


@dataclass(frozen=True)
class ServedModel:
    """A model by the name that clients ask for. parent: the base's name, where it is an adapter on a shared base."""

    name: str
    context: int
    kind: Literal["chat", "completion", "embedding"] = "chat"
    parent: str | None = None


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. temperature 0: the likeliest. logprobs: so many alternatives a token; None for none."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    schema: Mapping[str, Any] | None = None
    """A JSON Schema that the answer must obey; {} for any JSON object."""


@dataclass(frozen=True)
class Request:
    """One answer to make: chat `messages` (with `tools`), or a `prompt` as text or token ids; one of the two."""

    model: str
    sampling: Sampling
    messages: Sequence[Mapping[str, Any]] | None = None
    tools: Sequence[Mapping[str, Any]] | None = None
    prompt: str | Sequence[int] | None = None


@dataclass(frozen=True)
class TokenLogprob:
    """A token's text and bytes, the natural logarithm of its probability, and the likeliest in its place."""

    token: str
    bytes: bytes
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Piece:
    """What has been added to an answer. The last one has `finish` and both counts of tokens."""

    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    finish: Finish | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True)
class Embedded:
    """A vector a text, and the tokens of all texts."""

    vectors: Sequence[Sequence[float]]
    tokens: int


class Refused(Exception):
    """A request the engine can not serve: the client's fault (HTTP 400). `param`: which of its fields."""

    def __init__(self, what: str, param: str | None = None):
        super().__init__(what)
        self.param = param


class UnknownModel(Refused):
    """No model of that name is served (HTTP 404)."""


class Busy(Exception):
    """The queue is full (HTTP 429). retry_after: seconds."""

    def __init__(self, retry_after: float = 1.0):
        super().__init__(f"too many requests at once; try again in {retry_after:g} s")
        self.retry_after = retry_after


class EngineDown(Exception):
    """The engine died or can not be reached (HTTP 503)."""


class Engine(Protocol):
    """Starts before the first request and stops after the last; `stop` ends what still runs."""

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    def models(self) -> Sequence[ServedModel]:
        """Those that can be asked for now."""
        ...

    def generate(self, request: Request) -> AsyncIterator[Piece]:
        """The answer, piece by piece. Raises Refused, Busy or EngineDown, before the first piece where it can."""
        ...

    async def embed(self, model: str, texts: Sequence[str | Sequence[int]]) -> Embedded:
        """A vector for each text. Raises Refused where `model` makes none."""
        ...
