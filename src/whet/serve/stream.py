"""Answers as they are made: several of one request side by side, and the stream of events that carries them (SSE)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel
from pydantic_core import to_json
from starlette.responses import Response

from whet.serve.access_log import Record
from whet.serve.drain import cut_short
from whet.serve.errors import ApiError, from_engine, unforeseen
from whet.serve.exchange import ClientGone
from whet.serve.interface import Engine, EngineDown, Finish, Piece, Request, TokenLogprob
from whet.serve.tool_calls import Call, ToolText

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

logger = logging.getLogger("whet.serve")

AHEAD = 8
"""Pieces that wait to be sent at most; an engine ahead of its reader waits too."""

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Delta:
    """What has been added to the index-th answer. raw_calls: those that the engine itself found, in OpenAI's form."""

    index: int
    text: str = ""
    calls: tuple[Call, ...] = ()
    raw_calls: tuple[Any, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: Finish | None = None

    @property
    def empty(self) -> bool:
        return not (self.text or self.calls or self.raw_calls or self.logprobs or self.finish)


@dataclass
class Answers:
    """The answers to one request's Requests to the engine, and the count of their tokens.

    tools: names of the tools that calls are looked for; one_call: of several calls only the first is given.
    shared: how many answers have the same prompt, whose tokens then count once.
    """

    engine: Engine
    requests: Sequence[Request]
    record: Record
    tools: Sequence[str] = ()
    one_call: bool = False
    shared: int = 1
    prompt_tokens: int = 0
    completion_tokens: int = 0
    _written: dict[int, int] = field(default_factory=dict)

    async def deltas(self) -> AsyncGenerator[Delta]:
        """As they come, of all answers. Raises ApiError. Must be closed: that ends the engine's work."""
        readers = [_Reader(index, ToolText(self.tools), self.one_call) for index in range(len(self.requests))]
        try:
            async with aclosing(side_by_side(self.engine, self.requests)) as pieces:
                async for index, piece in pieces:
                    self._count(index, piece)
                    for delta in readers[index].read(piece) if self.tools else [_plain(index, piece)]:
                        if not delta.empty:
                            yield delta
        except Exception as error:
            if (refusal := from_engine(error, self.requests[0].model)) is None:
                raise
            raise refusal from error

    def _count(self, index: int, piece: Piece) -> None:
        """Pieces count as a token each until the engine says how many there were: a client may leave before."""
        self.record.said(index, piece.text)
        if piece.text or piece.tool_calls:
            self.record.token()
            self._written[index] = self._written.get(index, 0) + 1
        if piece.finish is not None:
            self._written[index] = piece.completion_tokens
            self.prompt_tokens += piece.prompt_tokens if index % self.shared == 0 else 0
            self.record.finish = piece.finish
        self.completion_tokens = sum(self._written.values())
        self.record.prompt_tokens, self.record.completion_tokens = self.prompt_tokens, self.completion_tokens


def _plain(index: int, piece: Piece) -> Delta:
    return Delta(index, piece.text, (), piece.tool_calls, piece.logprobs, piece.finish)


class _Reader:
    """Finds the calls in one answer."""

    def __init__(self, index: int, tools: ToolText, one_call: bool):
        self._index, self._tools, self._one_call = index, tools, one_call
        self._called = False

    def read(self, piece: Piece) -> list[Delta]:
        shown, calls = self._tools.feed(piece.text)
        if piece.finish is not None:
            more, last = self._tools.finish()
            shown, calls = shown + more, calls + last
        calls = calls[: 0 if self._called else 1] if self._one_call else calls
        raw = tuple(call for call in piece.tool_calls if not (self._one_call and call.get("index")))
        self._called = self._called or bool(calls or raw)
        finish: Finish | None = "tool_calls" if piece.finish == "stop" and self._called else piece.finish
        return [Delta(self._index, shown, tuple(calls), raw, piece.logprobs, finish)]


async def side_by_side(engine: Engine, requests: Sequence[Request]) -> AsyncGenerator[tuple[int, Piece]]:
    """Each request's pieces with its index, as they come. One that fails ends all."""
    if len(requests) == 1:
        async with aclosing(_whole(engine, requests[0])) as pieces:
            async for piece in pieces:
                yield 0, piece
        return
    queue: asyncio.Queue[tuple[int, Piece | BaseException | None]] = asyncio.Queue(AHEAD)
    tasks = [asyncio.create_task(_into(queue, index, engine, request)) for index, request in enumerate(requests)]
    try:
        open_ones = len(tasks)
        while open_ones:
            index, found = await queue.get()
            if isinstance(found, BaseException):
                raise found
            if found is None:
                open_ones -= 1
            else:
                yield index, found
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _into(queue: asyncio.Queue[Any], index: int, engine: Engine, request: Request) -> None:
    try:
        async with aclosing(_whole(engine, request)) as pieces:
            async for piece in pieces:
                await queue.put((index, piece))
        await queue.put((index, None))
    except Exception as error:
        await queue.put((index, error))


async def _whole(engine: Engine, request: Request) -> AsyncGenerator[Piece]:
    """The pieces through the last. Raises EngineDown where the engine stops before it."""
    made: Any = engine.generate(request)  # an async generator, though the protocol names what all iterators have
    async with aclosing(made) as pieces:
        async for piece in pieces:
            yield piece
            if piece.finish is not None:
                return
    raise EngineDown("the engine ended an answer early")


def event(data: BaseModel | dict[str, Any]) -> bytes:
    """One event. JSON has no line breaks of its own, so no text can end the event early."""
    return b"data: " + to_json(data) + b"\n\n"


class EventStream(Response):
    """Sends events until they end. What fails after the first is told as an event of its own, and no [DONE] follows."""

    media_type = "text/event-stream"

    def __init__(self, first: bytes, rest: AsyncGenerator[bytes], record: Record):
        super().__init__(headers={"x-accel-buffering": "no"})  # nginx would wait for the end
        del self.headers["content-length"]
        self._first, self._rest, self._record = first, rest, record

    @classmethod
    async def begun(cls, events: AsyncGenerator[bytes], record: Record) -> EventStream:
        """Waits for the first event, so that what is refused by then has its own status. Raises ApiError."""
        return cls(await anext(events), events, record)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with aclosing(self._rest) as rest:
            await send({"type": "http.response.body", "body": self._first, "more_body": True})
            last = DONE
            try:
                async for part in rest:
                    await send({"type": "http.response.body", "body": part, "more_body": True})
            except ClientGone:
                raise
            except asyncio.CancelledError:
                if not self._record.cut:
                    raise
                _stay()
                last = event(self._failed(cut_short()).body())
            except Exception as error:
                last = event(self._failed(error).body())
            await send({"type": "http.response.body", "body": last, "more_body": False})

    def _failed(self, error: Exception) -> ApiError:
        refusal = error if isinstance(error, ApiError) else unforeseen()
        if refusal is not error:
            logger.error("%s failed", self._record.id, exc_info=error)
        self._record.error = refusal.code
        return refusal


def _stay() -> None:
    """This task was told to end, and has a last word to say first."""
    task = asyncio.current_task()
    assert task is not None
    task.uncancel()
