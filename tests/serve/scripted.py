"""An engine whose answers are written down in advance, for what is the gateway's own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from whet.serve.interface import (
    Embedded,
    Piece,
    Refused,
    Request,
    ServedModel,
    TokenLogprob,
    UnknownModel,
)

MODELS = (
    ServedModel("scripted", context=4096),
    ServedModel("secret/adapter", context=4096, parent="scripted"),
    ServedModel("words", context=64, kind="completion"),
    ServedModel("vectors", context=512, kind="embedding"),
)


@dataclass
class Scripted:
    """answer: its pieces of text. It is `asked` what it was asked, and `running` counts what it works on.

    hold: after the first piece it waits until told to go on. failure: raised in place of the piece `fails_at`.
    """

    answer: Sequence[str] = ("Hel", "lo", "!")
    failure: Exception | None = None
    fails_at: int = 0
    hold: bool = False
    finish: str = "stop"
    starting: Exception | None = None
    asked: list[Request] = field(default_factory=list)
    running: int = 0
    closed: int = 0
    started: bool = False

    def __post_init__(self) -> None:
        self.go_on = asyncio.Event()

    async def start(self) -> None:
        if self.starting is not None:
            raise self.starting
        self.started = True

    async def stop(self) -> None:
        self.started = False

    def models(self) -> Sequence[ServedModel]:
        return MODELS

    async def generate(self, request: Request) -> AsyncIterator[Piece]:
        if request.model not in {model.name for model in MODELS}:
            raise UnknownModel(request.model)
        self.asked.append(request)
        self.running += 1
        try:
            for place, text in enumerate(self.answer):
                if self.failure is not None and place == self.fails_at:
                    raise self.failure
                if self.hold and place == 1:
                    await self.go_on.wait()
                await asyncio.sleep(0)
                yield Piece(text, logprobs=_logprobs(text, request.sampling.logprobs))
            if self.failure is not None and self.fails_at >= len(self.answer):
                raise self.failure
            yield Piece(finish=self.finish, prompt_tokens=7, completion_tokens=len(self.answer))  # type: ignore[arg-type]
        finally:
            self.running -= 1
            self.closed += 1

    async def embed(self, model: str, texts: Sequence[str | Sequence[int]]) -> Embedded:
        if model != "vectors":
            raise Refused(f"{model} makes no vectors", param="model")
        if self.failure is not None:
            raise self.failure
        return Embedded([[float(len(text)), 0.5, -1.0] for text in texts], tokens=sum(map(len, texts)))


def _logprobs(text: str, alternatives: int | None) -> tuple[TokenLogprob, ...]:
    if alternatives is None:
        return ()
    top = tuple(TokenLogprob(f"t{place}", b"t", -1.0 - place) for place in range(alternatives + 1))
    return (TokenLogprob(text, text.encode(), float("-inf"), top),)
