"""POST /v1/completions: text that goes on a text, for models without a chat template, and older clients."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

from whet.serve.access_log import Record
from whet.serve.answers import Completion, CompletionChoice, Usage, completion_logprobs, usage_of
from whet.serve.interface import Engine, Finish, Request, ServedModel, TokenLogprob
from whet.serve.schemas import CompletionRequest
from whet.serve.stream import Answers, Delta, event


class Completing:
    """One request being answered: `n` answers to each prompt, in the prompts' order. max_tokens: of each."""

    def __init__(self, body: CompletionRequest, model: ServedModel, engine: Engine, record: Record, max_tokens: int):
        self.body, self.model = body, model
        self.id, self.created = f"cmpl-{secrets.token_hex(12)}", int(time.time())
        requests = [
            Request(model.name, body.sampling(max_tokens, index, logprobs=body.logprobs), prompt=prompt)
            for prompt in body.prompts
            for index in range(body.count)
        ]
        self.answers = Answers(engine, requests, record, shared=body.count)
        self._offsets = [0] * len(requests)

    def _echo(self, index: int) -> str:
        return str(self.answers.requests[index].prompt) if self.body.echo else ""

    async def whole(self) -> Completion:
        """Raises ApiError."""
        count = len(self.answers.requests)
        texts = [self._echo(index) for index in range(count)]
        logprobs: list[list[TokenLogprob]] = [[] for _ in range(count)]
        finish: list[Finish | None] = [None] * count
        async with aclosing(self.answers.deltas()) as deltas:
            async for delta in deltas:
                texts[delta.index] += delta.text
                logprobs[delta.index] += delta.logprobs
                finish[delta.index] = delta.finish
        choices = [self._choice(index, texts[index], logprobs[index], finish[index]) for index in range(count)]
        return self._object(choices, self.usage())

    async def events(self) -> AsyncGenerator[bytes]:
        """Each an event of SSE. Raises ApiError."""
        begun = set[int]()
        async with aclosing(self.answers.deltas()) as deltas:
            async for delta in deltas:
                text = delta.text if delta.index in begun else self._echo(delta.index) + delta.text
                begun.add(delta.index)
                yield self._event([self._part(delta, text)])
        if self.body.wants_usage:
            yield self._event([], self.usage())

    def _part(self, delta: Delta, text: str) -> CompletionChoice:
        return self._choice(delta.index, text, list(delta.logprobs), delta.finish)

    def _choice(self, index: int, text: str, found: list[TokenLogprob], finish: Finish | None) -> CompletionChoice:
        logprobs = None
        if self.body.logprobs is not None:
            logprobs = completion_logprobs(found, self.body.logprobs, self._offsets[index])
            self._offsets[index] += sum(len(one.token) for one in found)
        return CompletionChoice(index=index, text=text, logprobs=logprobs, finish_reason=finish)

    def _event(self, choices: list[CompletionChoice], usage: Usage | None = None) -> bytes:
        made = self._object(choices, usage)
        return event(made.model_dump() | ({"usage": usage} if self.body.wants_usage else {}))

    def _object(self, choices: list[CompletionChoice], usage: Usage | None) -> Completion:
        return Completion(id=self.id, created=self.created, model=self.model.name, choices=choices, usage=usage)

    def usage(self) -> Usage:
        return usage_of(self.answers.prompt_tokens, self.answers.completion_tokens)
