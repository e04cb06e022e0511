"""The in-process engine as the gateway sees it: asynchronous outside, one thread with a model inside."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import AsyncIterator, Mapping
from collections.abc import Sequence as Many
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic
from typing import Literal

from whet.errors import WhetError
from whet.serve.engines.in_process.adapters import Adapter, adapter_folder, check_name
from whet.serve.engines.in_process.prompts import param_of, prompt_tokens
from whet.serve.engines.in_process.runner import Runner
from whet.serve.engines.in_process.sampling import Drawing
from whet.serve.engines.in_process.sequence import Sequence
from whet.serve.engines.in_process.settings import Settings
from whet.serve.engines.in_process.structured import Grammars
from whet.serve.engines.in_process.worker import Delivery, Worker
from whet.serve.engines.mailbox import Mailbox
from whet.serve.engines.messages import check_ids
from whet.serve.interface import Busy, Embedded, EngineDown, Piece, Refused, Request, ServedModel, UnknownModel

log = logging.getLogger("whet")


class InProcessEngine:
    """A language model of transformers, and LoRA adapters on it, with continuous batching.

    adapters: folders by the names they are served under, loaded at the start. adapters_folder: a folder of adapters,
    each served under its folder's name and loaded at the first request for it.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        name: str | None = None,
        adapters: Mapping[str, str | Path] | None = None,
        adapters_folder: str | Path | None = None,
        settings: Settings | None = None,
    ):
        self._folder = str(folder)
        self._name = name or self._folder.rstrip("/").rpartition("/")[2].rpartition(":")[2]
        self._settings = settings or Settings()
        self._wanted = {check_name(adapter): Path(path) for adapter, path in (adapters or {}).items()}
        self._adapters_folder = None if adapters_folder is None else Path(adapters_folder)
        self._adapters: dict[str, Adapter] = {}
        self._loading = asyncio.Lock()
        self._outstanding = 0
        self._seconds = 1.0  # that an answer takes, a running mean
        self._prompts = ThreadPoolExecutor(1, thread_name_prefix="whet-prompts")

    async def start(self) -> None:
        """Load the model and the adapters. Raises WhetError for what can't be served."""
        loop = asyncio.get_running_loop()

        def deliver(pieces: list[Delivery]) -> None:
            loop.call_soon_threadsafe(_tell_all, pieces)

        self._worker = Worker(self._folder, self._settings, deliver)
        self._worker.start()
        self._runner: Runner = await asyncio.wrap_future(self._worker.ready)
        self._grammars = Grammars(self._runner.tokenizer, sorted(self._runner.vocabulary.ends))
        try:
            for name, folder in self._wanted.items():
                await self.load_adapter(name, folder)
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        await asyncio.to_thread(self._worker.stop)
        self._prompts.shutdown(wait=False, cancel_futures=True)

    def models(self) -> Many[ServedModel]:
        kind: Literal["chat", "completion"] = "chat" if self._runner.tokenizer.chat_template else "completion"
        served = functools.partial(ServedModel, context=self._runner.size.context, kind=kind)
        names = sorted({*self._adapters, *self._names_in_folder()})
        return [served(self._name), *(served(name, parent=self._name) for name in names)]

    async def generate(self, request: Request) -> AsyncIterator[Piece]:
        if not self._worker.alive:
            raise EngineDown("the engine is not running")
        if self._outstanding >= self._settings.max_running + self._settings.max_waiting:
            raise Busy(self._retry_after())
        self._outstanding += 1
        start = monotonic()
        try:
            mailbox = Mailbox()
            sequence = await self._sequence(request, mailbox)
            self._worker.submit(sequence)
            try:
                async for piece in mailbox.pieces():
                    yield piece
                self._seconds += 0.1 * (monotonic() - start - self._seconds)
            finally:
                if not sequence.finished:
                    self._worker.cancel(sequence)
        finally:
            self._outstanding -= 1

    async def embed(self, model: str, texts: Many[str | Many[int]]) -> Embedded:
        raise Refused(f"{model} makes no embeddings: it is a language model", "model")

    async def load_adapter(self, name: str, folder: str | Path) -> None:
        """Serve the adapter in `folder` as the model `name`; others go on meanwhile. Replaces one of that name.

        Answers under way are finished by the adapter that they began with. Raises WhetError.
        """
        if check_name(name) == self._name:
            raise WhetError(f"the base is called {name}", where="adapter", fix="give the adapter another name")
        adapter = await asyncio.to_thread(self._runner.read_adapter, name, Path(folder))
        await asyncio.wrap_future(self._worker.call(lambda runner: runner.cover(adapter)))
        self._adapters[name] = adapter

    async def unload_adapter(self, name: str) -> None:
        """Serve it no more. One that lies in the adapters' folder is loaded again when it is asked for."""
        if self._adapters.pop(name, None) is None:
            raise WhetError(f"no adapter {name!r} is loaded", where="adapter", fix="see /v1/models for those that are")

    def load(self) -> dict[str, float]:
        """How busy the engine is: running, waiting, cache_used (of 1); tokens and steps since the start."""
        return self._worker.load()

    # ------------------------------------------------------------ one request

    async def _sequence(self, request: Request, mailbox: Mailbox) -> Sequence:
        adapter = await self._adapter(request.model)
        loop = asyncio.get_running_loop()
        tokens = await loop.run_in_executor(self._prompts, prompt_tokens, request, self._runner.vocabulary)
        sampling = request.sampling
        room = self._runner.size.context - len(tokens)
        if room < 1:
            context = self._runner.size.context
            what = f"the prompt has {len(tokens)} tokens, and the model reads {context} with its answer"
            raise Refused(what, param_of(request))
        check_ids(sampling.logit_bias, self._runner.vocabulary.size, "logit_bias")
        matcher = None
        if sampling.schema is not None:
            matcher = await loop.run_in_executor(self._prompts, self._grammars.matcher, sampling.schema)
        return Sequence(
            tokens,
            most=min(sampling.max_tokens, room),
            drawing=Drawing(sampling, matcher),
            vocabulary=self._runner.vocabulary,
            tell=self._worker.say(mailbox.put),
            adapter=adapter,
            special=bool(request.tools),
        )

    async def _adapter(self, model: str) -> Adapter | None:
        """None for the base. Raises UnknownModel."""
        if model == self._name:
            return None
        if model not in self._adapters and self._adapters_folder is not None:
            async with self._loading:
                await self._load_from(self._adapters_folder, model)
        if model not in self._adapters:
            raise UnknownModel(f"no model {model!r} is served here", "model")
        return self._adapters[model]

    async def _load_from(self, root: Path, model: str) -> None:
        """Load the adapter if `root` has it. Why one can't be served is for the log: it may name files."""
        folder = adapter_folder(root, model)
        if model in self._adapters or folder is None:
            return
        try:
            await self.load_adapter(model, folder)
        except WhetError as error:
            log.warning("the adapter %s can't be served: %s", model, error)
            raise Refused(f"the adapter {model} can't be served; the server's log says why", "model") from error

    def _names_in_folder(self) -> list[str]:
        if self._adapters_folder is None or not self._adapters_folder.is_dir():
            return []
        names = [path.name for path in self._adapters_folder.iterdir()]
        return [name for name in names if adapter_folder(self._adapters_folder, name) is not None]

    def _retry_after(self) -> float:
        """Seconds until a place is likely: the queue takes turns of max_running answers."""
        turns = self._outstanding / self._settings.max_running
        return min(60.0, max(1.0, round(self._seconds * turns)))


def _tell_all(pieces: list[Delivery]) -> None:
    for to, piece in pieces:
        to(piece)
