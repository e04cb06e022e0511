"""A server elsewhere as the gateway sees an engine."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from typing import Any

from whet.errors import WhetError
from whet.serve.engines.vllm.address import Address
from whet.serve.engines.vllm.asking import EMBEDDING, body_of, embedding_body
from whet.serve.engines.vllm.catalogue import Entry, Kind, bases_without_kind, catalogue
from whet.serve.engines.vllm.server import KeyRefused, Server
from whet.serve.engines.vllm.settings import Settings
from whet.serve.engines.vllm.wire import Cards, ChatChunk, CompletionChunk, Vectors, pieces, read
from whet.serve.interface import Busy, Embedded, EngineDown, Piece, Refused, Request, ServedModel, UnknownModel

logger = logging.getLogger("whet.serve")

NO_ROOM = "context length"
"""Stands in vLLM's refusal of a prompt whose answer, at its longest, would not fit beside it."""


class VllmEngine:
    """The models of a vLLM, or of another OpenAI-compatible server. name: what its base is called here.

    The server is looked at when the engine starts, and then from time to time: adapters that are loaded there later
    are served as well, and while it is away every request is told so.
    """

    def __init__(self, address: Address, *, name: str | None = None, settings: Settings | None = None):
        self._address, self._name, self._settings = address, name, settings or Settings()
        self._models: dict[str, Entry] = {}
        self._kinds: dict[str, Kind] = {}
        self._running = 0
        self._up = False

    async def start(self) -> None:
        """Raises WhetError for a server that is not there, does not let whet in, or is none of OpenAI's kind."""
        self._server = Server(self._address, self._settings)
        try:
            await self._look()
        except (EngineDown, Refused, Busy) as error:
            await self._server.close()
            raise WhetError(str(error), where=self._address.url, fix=_fix(error)) from error
        except BaseException:
            await self._server.close()
            raise
        self._looking = asyncio.create_task(self._look_again())

    async def stop(self) -> None:
        self._looking.cancel()
        await asyncio.gather(self._looking, return_exceptions=True)
        await self._server.close()

    def models(self) -> Sequence[ServedModel]:
        return [entry.served for entry in self._models.values()]

    async def generate(self, request: Request) -> AsyncIterator[Piece]:
        entry = self._entry(request.model)
        path, body = body_of(request, entry.id, entry.served.context, vllm=entry.vllm)
        kind = CompletionChunk if request.messages is None else ChatChunk
        self._running += 1
        try:
            async with AsyncExitStack() as held:
                events = await self._asked(path, body, held)
                async for piece in pieces(events, kind, lambda error: self._server.fault_in(error, body)):
                    yield piece
        finally:
            self._running -= 1

    async def embed(self, model: str, texts: Sequence[str | Sequence[int]]) -> Embedded:
        entry = self._entry(model)
        if entry.served.kind != "embedding":
            raise Refused(f"{model} makes no embeddings: it is a language model", "model")
        found = read(Vectors, await self._server.post(EMBEDDING, embedding_body(entry.id, texts)))
        vectors = {vector.index: vector.embedding for vector in found.data}
        if sorted(vectors) != list(range(len(texts))):
            raise EngineDown(f"{len(found.data)} vectors came for {len(texts)} texts")
        return Embedded([vectors[place] for place in range(len(texts))], found.usage.prompt_tokens)

    def load(self) -> dict[str, float]:
        """How busy the engine is: answers under way, and whether the server was there when last looked at."""
        return {"running": self._running, "up": float(self._up)}

    def _entry(self, model: str) -> Entry:
        if (entry := self._models.get(model)) is None:
            raise UnknownModel(f"no model {model!r} is served here", "model")
        return entry

    async def _asked(self, path: str, body: dict[str, Any], held: AsyncExitStack) -> AsyncIterator[str]:
        """The answer's events, until `held` is left. Without a limit the answer is clipped to what the prompt leaves,
        which is less than a limit that does not fit."""
        try:
            return await held.enter_async_context(self._server.events(path, body))
        except Refused as refused:
            if body["max_tokens"] is None or NO_ROOM not in str(refused):
                raise
        return await held.enter_async_context(self._server.events(path, body | {"max_tokens": None}))

    # ---------------------------------------------------------------- which models

    async def _look(self) -> None:
        try:
            async with asyncio.timeout(self._settings.probe):
                cards = read(Cards, await self._server.get("/models")).data
                for base in bases_without_kind(cards):
                    self._kinds[base] = self._kinds.get(base) or await self._kind(base)
        except TimeoutError:
            raise EngineDown(f"the models' server does not answer within {self._settings.probe:g} s") from None
        self._models = catalogue(cards, self._kinds, self._name, self._address.url)
        self._up = True

    async def _kind(self, model: str) -> Kind:
        """vLLM serves a model either for text or for embeddings, and does not say which."""
        try:
            await self._server.post(EMBEDDING, embedding_body(model, ["a"]))
        except Refused:
            return "chat"
        return "embedding"

    async def _look_again(self) -> None:
        while True:
            await asyncio.sleep(self._settings.refresh)
            try:
                await self._look()
            except (EngineDown, Refused, Busy, WhetError) as error:
                if self._up:
                    logger.error("models are unavailable: %s", error)
                self._up = False


def _fix(error: Exception) -> str:
    if isinstance(error, KeyRefused):
        return "name the environment variable that holds its key: --upstream-key-env VLLM_API_KEY"
    if "CERTIFICATE" in str(error):
        return "set SSL_CERT_FILE to the file of the authority that signed its certificate"
    return "start it first (vllm serve DIR --port 8001), and give its address as http://127.0.0.1:8001/v1"
