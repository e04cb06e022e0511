"""A model behind an OpenAI-compatible server: vLLM, llama.cpp, Ollama, TGI, a hosted one.

    prompts of messages  ->  POST URL/chat/completions
    prompts of text      ->  POST URL/completions
    choice_logprobs      ->  POST URL/completions with echo, as lm-evaluation-harness asks vLLM for them

A key comes from the environment variable that `key_env` names, and from nowhere else: none is sent unless asked for,
so that a key for one server never reaches another.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator

from whet.errors import WhetError
from whet.evals.endpoint_http import Caller, Failure, Outcome, key_from
from whet.evals.generation import Generation
from whet.evals.models import Prompt


class EndpointSettings(BaseModel):
    """Where a server is and how it is asked."""

    # what is refused may be a key in the wrong place, which no message must quote
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, hide_input_in_errors=True)

    url: str = Field(description="Up to the version, as http://localhost:8000/v1.")
    model: str = Field(min_length=1, description="The server's name for the model.")
    key_env: str | None = Field(
        None, description="Environment variable that holds the API key. Default: no key is sent."
    )
    timeout: float = Field(120.0, gt=0, description="Seconds for a whole reply.")
    retries: int = Field(4, ge=0, le=20, description="Further tries after overload, lost connections and timeouts.")
    backoff: float = Field(0.5, gt=0, description="Seconds before the second try; doubled from try to try.")
    concurrency: int = Field(8, ge=1, le=256, description="Requests at a time.")
    extra: dict[str, Any] = Field(
        default_factory=dict,
        description="Keys for the request's body, as this server wants them; null leaves out one that whet would send.",
    )

    @field_validator("url")
    @classmethod
    def _address(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("not the address of a server; write http://HOST:PORT/v1 or https://HOST/v1")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError(
                "an address with a user, password or ?query; put the key into the variable that key_env names"
            )
        return url.rstrip("/").removesuffix("/chat/completions").removesuffix("/completions")

    @field_validator("key_env")
    @classmethod
    def _variable(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ValueError("not the name of an environment variable; write the name, as JUDGE_API_KEY, not the key")
        return name


@dataclass(frozen=True)
class Usage:
    """Requests that were answered, and the tokens that the server says they cost.

    uncounted: replies without `usage`, whose tokens are in no sum.
    """

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    uncounted: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.requests + other.requests,
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.uncounted + other.uncounted,
        )

    def __sub__(self, earlier: Usage) -> Usage:
        return Usage(
            self.requests - earlier.requests,
            self.prompt_tokens - earlier.prompt_tokens,
            self.completion_tokens - earlier.completion_tokens,
            self.uncounted - earlier.uncounted,
        )

    def __str__(self) -> str:
        text = f"{self.requests:,} requests, {self.prompt_tokens:,} + {self.completion_tokens:,} tokens"
        return text + (f" ({self.uncounted:,} replies without a count)" if self.uncounted else "")


@dataclass(frozen=True)
class Reply:
    """What the model said, or why there is nothing.

    cut: it ended at the limit of tokens. refusal: what the model said as it declined, where it was given apart.
    """

    text: str | None
    failure: Failure | None = None
    cut: bool = False
    refusal: str | None = None


class Endpoint:
    """A served model. `replies` says of each prompt why it has no answer; `generate` raises instead."""

    def __init__(self, settings: EndpointSettings):
        """Raises WhetError when the key is not in the environment. Nothing is sent yet."""
        self.settings = settings
        key = key_from(settings.key_env)
        self._caller = Caller(
            settings.url, key, timeout=settings.timeout, retries=settings.retries, backoff=settings.backoff
        )
        self._usage = Usage()

    def __repr__(self) -> str:
        return f"Endpoint({self.name!r} at {self.settings.url!r})"

    @property
    def name(self) -> str:
        return self.settings.model

    @property
    def usage(self) -> Usage:
        """Of all requests so far."""
        return self._usage

    def generate(self, prompts: Sequence[Prompt], how: Generation) -> list[str]:
        """The answer to each prompt; a refusal's text is one. Raises WhetError when a prompt has none."""
        replies = self.replies(prompts, how)
        missing = [reply.failure.note for reply in replies if reply.failure and reply.refusal is None]
        if missing:
            what = f"{len(missing)} of {len(prompts)} prompts got no answer, the first since: {missing[0]}"
            raise WhetError(what, where=self.settings.url, fix="see to the server, or raise timeout and retries")
        return [(reply.text or reply.refusal or "").strip() for reply in replies]

    def replies(
        self,
        prompts: Sequence[Prompt],
        how: Generation,
        *,
        body: Mapping[str, Any] | None = None,
        done: Callable[[int], None] = lambda count: None,
    ) -> list[Reply]:
        """A reply a prompt, in order. body: further keys of each request. done: is told how many replies there are.

        Raises WhetError when the server cannot be used at all: no connection, a wrong key, no such model.
        """
        requests = [_request(prompt) for prompt in prompts]
        settings = _generation(how) | dict(body or {})
        outcomes = self._ask([(path, self._body(own | settings)) for path, own in requests], done)
        return [self._reply(outcome) for outcome in outcomes]

    def choice_logprobs(self, prompts: Sequence[Prompt], choices: Sequence[Sequence[str]]) -> list[list[float]]:
        """log p(choice | prompt) in nats, for prompts of text and servers that echo log-probabilities (vLLM does).

        A token that begins in the prompt and ends in the choice counts as the choice's. Raises WhetError when the
        prompt is a conversation, whose text only the server knows, or when the server echoes nothing.
        """
        pairs = [(self._text(prompt), choice) for prompt, own in zip(prompts, choices, strict=True) for choice in own]
        wanted = {"echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0.0}
        bodies = [("completions", self._body({"prompt": text + choice} | wanted)) for text, choice in pairs]
        outcomes = self._ask(bodies, lambda count: None)
        found = iter([self._log_prob(outcome, *pair) for outcome, pair in zip(outcomes, pairs, strict=True)])
        return [[next(found) for _ in own] for own in choices]

    def _body(self, body: Mapping[str, Any]) -> dict[str, Any]:
        whole = {"model": self.settings.model} | dict(body) | self.settings.extra
        return {name: value for name, value in whole.items() if value is not None}

    def _ask(self, requests: Sequence[tuple[str, dict[str, Any]]], done: Callable[[int], None]) -> list[Outcome]:
        """An outcome a request, in order, `concurrency` at a time. The first WhetError, or Ctrl-C, ends the others."""
        return _run(self._all(requests, done))

    async def _all(self, requests: Sequence[tuple[str, dict[str, Any]]], done: Callable[[int], None]) -> list[Outcome]:
        places = asyncio.Semaphore(self.settings.concurrency)
        finished = 0

        async def one(path: str, body: dict[str, Any]) -> Outcome:
            nonlocal finished
            async with places:
                outcome = await self._caller.post(client, path, body)
            if outcome.body is not None:
                self._usage += _usage(outcome.body)
            finished += 1
            done(finished)
            return outcome

        try:
            async with self._caller.client(self.settings.concurrency) as client, asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(path, body)) for path, body in requests]
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    def _reply(self, outcome: Outcome) -> Reply:
        """The text of the first choice."""
        if outcome.body is None:
            return Reply(None, outcome.failure)
        try:
            choice = outcome.body["choices"][0]
            message = choice.get("message") or {}
            text = choice["text"] if "text" in choice else message.get("content")
            end, refusal = choice.get("finish_reason"), message.get("refusal")
        except (KeyError, IndexError, TypeError, AttributeError):
            return Reply(None, Failure("malformed", "the server's reply has no choices"))
        if isinstance(refusal, str) and refusal.strip():
            note = f"the model refuses: {self._caller.shown(refusal)}"
            return Reply(None, Failure("refused", note), refusal=refusal)
        if end == "content_filter":
            return Reply(None, Failure("refused", "the server's content filter stopped the reply"))
        if not isinstance(text, str):
            return Reply(None, Failure("malformed", "the reply holds no text"))
        return Reply(text, cut=end == "length")

    def _text(self, prompt: Prompt) -> str:
        if prompt.text is None:
            raise WhetError(
                "an endpoint gives log-probabilities for prompts of text only",
                where=self.settings.url,
                fix="write the task's prompts as text, or evaluate the model in memory",
            )
        return prompt.text

    def _log_prob(self, outcome: Outcome, text: str, choice: str) -> float:
        if outcome.failure is not None:
            fix = "use a server that takes echo and logprobs on /completions, as vLLM does, or the model in memory"
            raise WhetError(f"no log-probabilities: {outcome.failure.note}", where=self.settings.url, fix=fix)
        try:
            (echoed, *_) = (outcome.body or {})["choices"]
            tokens, values = echoed["logprobs"]["tokens"], echoed["logprobs"]["token_logprobs"]
            offsets = echoed["logprobs"]["text_offset"]
            of_choice = [
                float(value)
                for token, value, offset in zip(tokens, values, offsets, strict=True)
                if offset + len(token) > len(text) and offset < len(text) + len(choice)
            ]
        except (KeyError, IndexError, TypeError, ValueError):
            of_choice = []
        if not of_choice:
            raise WhetError(
                "the server does not echo log-probabilities",
                where=self.settings.url,
                fix="use a server that takes echo and logprobs on /completions, as vLLM does, or the model in memory",
            )
        return sum(of_choice)


def _request(prompt: Prompt) -> tuple[str, dict[str, Any]]:
    """(path, the part of the body that is this prompt's own)."""
    if prompt.messages is None:
        return "completions", {"prompt": prompt.text}
    body: dict[str, Any] = {"messages": [dict(message) for message in prompt.messages]}
    if prompt.tools:
        body["tools"] = [dict(tool) for tool in prompt.tools]
    return "chat/completions", body


def _generation(how: Generation) -> dict[str, Any]:
    stop = list(how.stop) or None
    body = {"max_tokens": how.max_new_tokens, "temperature": how.temperature, "top_p": how.top_p, "seed": how.seed}
    return body | {"stop": stop}


def _usage(body: Mapping[str, Any]) -> Usage:
    usage = body.get("usage")
    counts = [usage.get(name) if isinstance(usage, dict) else None for name in ("prompt_tokens", "completion_tokens")]
    if not all(type(count) is int and count >= 0 for count in counts):
        return Usage(requests=1, uncounted=1)
    return Usage(1, *(int(count or 0) for count in counts))


Result = TypeVar("Result")


def _run(work: Coroutine[Any, Any, Result]) -> Result:
    """In this thread, or where it runs an event loop already, as a notebook's does, in one of its own."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as pool:
        begun: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[Result]]] = []
        future = pool.submit(asyncio.run, _noted(work, begun))
        try:
            return future.result()
        except KeyboardInterrupt:
            for loop, task in begun:
                if not loop.is_closed():
                    loop.call_soon_threadsafe(task.cancel)
            raise


async def _noted(
    work: Coroutine[Any, Any, Result], begun: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[Result]]]
) -> Result:
    """The work, its loop and task noted so that another thread can cancel it."""
    if (task := asyncio.current_task()) is not None:
        begun.append((asyncio.get_running_loop(), task))
    return await work
