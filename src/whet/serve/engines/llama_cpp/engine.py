"""The llama.cpp engine as the gateway sees it."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whet.errors import WhetError
from whet.export.gguf_tokenizer.carried import Carried
from whet.serve.engines.llama_cpp.process import Message, NodeProcess
from whet.serve.engines.llama_cpp.schema import ANY_OBJECT, translated
from whet.serve.engines.messages import check_ids, plain
from whet.serve.engines.text import Outgoing
from whet.serve.interface import (
    Busy,
    Embedded,
    EngineDown,
    Finish,
    Piece,
    Refused,
    Request,
    Sampling,
    ServedModel,
    TokenLogprob,
    UnknownModel,
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """sequences: answers made at once, each with memory for `context` tokens. max_waiting: those that may wait.

    context: tokens of prompt and answer, at most the model's own. threads: None for one less than there are cores.
    """

    sequences: int = 8
    max_waiting: int = 256
    context: int = 8192
    threads: int | None = None


class LlamaCppEngine:
    """A GGUF file in llama.cpp, on the CPU. A process that dies is started again by the next request.

    Log-probabilities are of the distribution that tokens are drawn from: the model's own at temperature 1 without
    filters, biases and penalties. Text is cut by the tokenizer.json in the file, where there is one, else by llama.cpp.
    """

    def __init__(self, gguf: str | Path, *, name: str | None = None, settings: Settings | None = None):
        self._gguf = Path(gguf).absolute()
        self._name = name or self._gguf.stem
        self._settings = settings or Settings()
        self._outstanding = 0
        self._node: NodeProcess | None = None
        self._starting = asyncio.Lock()
        self._stopped = False
        self._model: Message = {}
        self._carried: Carried | None = None

    async def start(self) -> None:
        """Raises WhetError for a file that is missing or that llama.cpp can't load."""
        if not self._gguf.is_file():
            raise WhetError("the GGUF file is missing", where=str(self._gguf), fix="export the model first")
        await self._running()

    async def stop(self) -> None:
        self._stopped = True
        if self._node is not None:
            await self._node.stop()

    def models(self) -> Sequence[ServedModel]:
        kind: Any = "chat" if self._model["template"] else "completion"
        return [ServedModel(self._name, self._model["context"], kind)]

    async def generate(self, request: Request) -> AsyncIterator[Piece]:
        if request.model != self._name:
            raise UnknownModel(f"no model {request.model!r} is served here", "model")
        if self._outstanding >= self._settings.sequences + self._settings.max_waiting:
            raise Busy()
        self._outstanding += 1
        try:
            node = await self._running()
            number, messages = node.order(self._order(request))
            try:
                async for piece in _pieces(messages, request):
                    yield piece
                    if piece.finish:
                        break
            finally:
                node.cancel(number)
        finally:
            self._outstanding -= 1

    async def embed(self, model: str, texts: Sequence[str | Sequence[int]]) -> Embedded:
        raise Refused(f"{model} makes no embeddings: it is a language model", "model")

    def load(self) -> dict[str, float]:
        """How busy the engine is."""
        running = min(self._outstanding, self._settings.sequences)
        return {"running": running, "waiting": self._outstanding - running}

    async def _running(self) -> NodeProcess:
        async with self._starting:
            if self._stopped:
                raise EngineDown("the server is stopping")
            if self._node is None or not self._node.alive:
                try:
                    self._node = await self._started()
                except WhetError as error:
                    if not self._model:
                        raise
                    raise EngineDown(f"llama.cpp can't be started again: {error.what}") from error
                self._model = self._node.ready
            return self._node

    async def _started(self) -> NodeProcess:
        """A process with the model, and the tokenizer that it found in the file. Raises WhetError."""
        s = self._settings
        settings = {"sequences": s.sequences, "context": s.context, "threads": s.threads}
        node = await NodeProcess.start({"gguf": str(self._gguf), **settings})
        content = node.ready.pop("tokenizer")
        try:
            self._carried = Carried(content, node.ready["vocabulary"], str(self._gguf)) if content else None
        except WhetError:
            await node.stop()
            raise
        return node

    def _order(self, request: Request) -> Message:
        sampling = request.sampling
        schema = sampling.schema
        return {
            "prompt": self._prompt(request),
            "bos": isinstance(request.prompt, str),
            "special": bool(request.tools),
            "maxTokens": sampling.max_tokens,
            "sampling": self._sampling(sampling),
            "logprobs": sampling.logprobs,
            "schema": translated(schema) if schema else schema,
            "anyObject": ANY_OBJECT,
        }

    def _sampling(self, sampling: Sampling) -> Message:
        check_ids(sampling.logit_bias, self._model["vocabulary"], "logit_bias")
        return {
            "temperature": sampling.temperature,
            "topP": sampling.top_p,
            "topK": sampling.top_k,
            "seed": secrets.randbits(32) if sampling.seed is None else sampling.seed % 2**32,
            "presence": sampling.presence_penalty,
            "frequency": sampling.frequency_penalty,
            "bias": [[token, bias] for token, bias in sampling.logit_bias.items()],
        }

    def _prompt(self, request: Request) -> str | list[int]:
        if request.messages is not None:
            text = self._rendered(request)
        elif isinstance(request.prompt, str):
            text = request.prompt
        else:
            return check_ids(request.prompt or (), self._model["vocabulary"], "prompt")
        return self._carried.cut([text])[0] if self._carried else text

    def _rendered(self, request: Request) -> str:
        """Through the file's own template, in transformers' sandbox."""
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template

        if not self._model["template"]:
            raise Refused("the model has no chat template", "messages")
        if not request.messages:
            raise Refused("there are no messages", "messages")
        messages = [plain(message) for message in request.messages]
        tools: list[Any] | None = [dict(tool) for tool in request.tools] if request.tools else None
        try:
            rendered: Any = render_jinja_template(
                [messages],
                tools=tools,
                chat_template=self._model["template"],
                add_generation_prompt=True,
                bos_token=self._model["bos"] or "",
                eos_token=self._model["eos"] or "",
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise Refused(f"the chat template refuses the messages: {error}", "messages") from None
        texts = rendered[0] if isinstance(rendered, tuple) else rendered
        return str(texts if isinstance(texts, str) else texts[0])


async def _pieces(messages: asyncio.Queue[Message | EngineDown], request: Request) -> AsyncIterator[Piece]:
    """What comes for one answer, up to its end or a stop string."""
    outgoing = Outgoing(request.sampling.stop)
    drawn = 0
    while True:
        message = await messages.get()
        if isinstance(message, EngineDown):
            raise message
        if "refused" in message:
            raise Refused(message["refused"], "prompt" if request.messages is None else "messages")
        if "failed" in message:
            raise EngineDown(f"llama.cpp failed: {message['failed']}")
        if "end" in message:
            text, logprobs = outgoing.finish(message["text"])
            finish: Finish = "stop" if outgoing.stopped else message["end"]
            yield Piece(text, logprobs, (), finish, message["prompt"], message["drawn"])
            return
        drawn += 1
        text, logprobs = outgoing.push(message["text"], _named(message["entry"]) if "entry" in message else None)
        if outgoing.stopped:
            yield Piece(text, logprobs, (), "stop", message["prompt"], drawn)
            return
        if text or logprobs:
            yield Piece(text, logprobs)


def _named(entry: Message) -> TokenLogprob:
    raw = bytes(entry["bytes"])
    return TokenLogprob(
        raw.decode(errors="replace"), raw, entry["logprob"], tuple(_named(other) for other in entry.get("top", ()))
    )
