"""Models that answer evaluation tasks: what they are asked, how they generate, and one that is held in memory.

    generate          an answer a prompt
    choice_logprobs   log p(choice | prompt), nats, summed over the choice's tokens

`InMemory` may be the model that is being trained: `undisturbed` leaves its training as it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from transformers import PreTrainedTokenizerBase

from whet.data.examples import Message
from whet.data.template import render
from whet.errors import WhetError
from whet.evals.generation import Generation as Generation
from whet.evals.generation import generate
from whet.evals.likelihood import Continuation, log_probs
from whet.evals.undisturbed import undisturbed


@dataclass(frozen=True)
class Prompt:
    """What a model is asked: the messages of a conversation, or a text to go on from. One of the two.

    tools: JSON schemas of the functions that may be called, for the chat template.
    """

    messages: Sequence[Message] | None = None
    text: str | None = None
    tools: Sequence[Mapping[str, Any]] | None = None

    def __post_init__(self) -> None:
        if (self.messages is None) == (self.text is None):
            raise WhetError("a prompt has either messages or a text", where="prompt", fix="give one of the two")
        if self.messages is not None and not self.messages:
            raise WhetError("a prompt has no messages", where="prompt", fix="give a user's message")

    @property
    def shown(self) -> str:
        """As a person reads it: a single message as its text, several as ROLE: TEXT."""
        if self.messages is None:
            return self.text or ""
        if len(self.messages) == 1:
            return str(self.messages[0]["content"])
        return "\n\n".join(f"{message['role']}: {message['content']}" for message in self.messages)


@runtime_checkable
class Model(Protocol):
    """A model that can be asked, wherever it runs."""

    @property
    def name(self) -> str:
        """What results call it."""

    def generate(self, prompts: Sequence[Prompt], how: Generation) -> list[str]:
        """The answer to each prompt, white space at the ends cut."""

    def choice_logprobs(self, prompts: Sequence[Prompt], choices: Sequence[Sequence[str]]) -> list[list[float]]:
        """log p(choice | prompt) in nats, of each of a prompt's choices. Raises WhetError where they can't be had."""


@dataclass
class InMemory:
    """A transformers model, or one with a PEFT adapter, and its tokenizer.

    batch: prompts generated for at a time. adapter: False asks the base under the adapter.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    name: str = "model"
    batch: int = 16
    adapter: bool = True

    def generate(self, prompts: Sequence[Prompt], how: Generation) -> list[str]:
        """Batched; the same prompts, settings and batch give the same answers."""
        with self.undisturbed():
            return generate(self.model, self.tokenizer, [self._ids(p) for p in prompts], how, batch=self.batch)

    def choice_logprobs(self, prompts: Sequence[Prompt], choices: Sequence[Sequence[str]]) -> list[list[float]]:
        """A choice goes on where the prompt ends, without a space of its own."""
        pairs = [
            self._continued(prompt, choice) for prompt, own in zip(prompts, choices, strict=True) for choice in own
        ]
        with self.undisturbed():
            found = iter(log_probs(self.model, pairs))
        return [[next(found) for _ in own] for own in choices]

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Evaluation mode, with or without the adapter; afterwards all is as it was."""
        with undisturbed(self.model):
            if self.adapter:
                yield
                return
            if not hasattr(self.model, "disable_adapter"):
                raise WhetError("the model has no adapter to turn off", where=self.name, fix="ask the model itself")
            with self.model.disable_adapter():
                yield

    def text_of(self, prompt: Prompt) -> str:
        """What the model reads. Raises WhetError when the chat template refuses the messages."""
        if prompt.text is not None:
            return prompt.text
        tools = None if prompt.tools is None else [dict(tool) for tool in prompt.tools]
        return render(self.tokenizer, list(prompt.messages or ()), add_generation_prompt=True, tools=tools)

    def _ids(self, prompt: Prompt) -> list[int]:
        return self._fitting(self._encode(self.text_of(prompt), chat=prompt.messages is not None))

    def _encode(self, text: str, *, chat: bool) -> list[int]:
        """A rendered conversation brings its special tokens along; a text gets the tokenizer's own first one."""
        bos = self.tokenizer.bos_token
        own = chat or (bos is not None and text.startswith(bos))
        ids: list[int] = self.tokenizer(text, add_special_tokens=not own)["input_ids"]
        return ids

    def _continued(self, prompt: Prompt, choice: str) -> Continuation:
        """Token ids of the prompt and of what is left of prompt + choice: tokens may join where the two meet.

        White space at the prompt's end counts as the choice's, because tokenizers put it there.
        """
        text, chat = self.text_of(prompt), prompt.messages is not None
        context = text.rstrip() if not chat else text
        whole = self._encode(text + choice, chat=chat)
        before = self._encode(context, chat=chat)
        if len(before) >= len(whole):
            fix = "write a choice that adds to the prompt"
            raise WhetError(f"the choice {choice!r} adds no token to its prompt", where="choices", fix=fix)
        return Continuation(self._fitting(whole)[: len(before)], whole[len(before) :])

    def _fitting(self, ids: list[int]) -> list[int]:
        """The same. Raises WhetError where the model has no position for one of them."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and len(ids) > limit:
            what = f"a prompt has {len(ids)} tokens, and the model takes {limit}"
            raise WhetError(what, where=self.name, fix="shorten the task's prompts, or leave the longest out")
        return ids
