"""From questions to a judge to its verdicts. What is no verdict after the last try stays a failure with a reason."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from whet.data.examples import Message
from whet.evals.endpoint import Endpoint, Reply
from whet.evals.endpoint_http import Failure
from whet.evals.generation import Generation
from whet.evals.judge.prompts import again
from whet.evals.judge.settings import JudgeSettings
from whet.evals.judge.verdicts import Form, Malformed, unwrapped
from whet.evals.models import Model, Prompt

T = TypeVar("T")
BETWEEN_TRIES = 1_000  # seeds: more than there are repeats


@dataclass(frozen=True)
class Verdict(Generic[T]):
    """What the judge decided, or why there is nothing. replies: how many it took."""

    value: T | None
    failure: Failure | None
    replies: int


def ask(
    model: Model,
    conversations: Sequence[list[Message]],
    form: Form[T],
    settings: JudgeSettings,
    *,
    seed: int,
    done: Callable[[int], None] = lambda count: None,
) -> list[Verdict[T]]:
    """A verdict a conversation. A malformed reply is shown to the judge with its fault, `settings.retries` times.

    Refusals and failures of the server are not asked again here: the endpoint has tried what may pass.
    """
    verdicts: list[Verdict[T]] = [Verdict(None, None, 0)] * len(conversations)
    open_: dict[int, list[Message]] = dict(enumerate(conversations))
    for round_ in range(settings.retries + 1):
        how = Generation(settings.max_new_tokens, settings.temperature, seed=seed + BETWEEN_TRIES * round_)
        replies = _replies(model, list(open_.values()), how, form, settings, done)
        following: dict[int, list[Message]] = {}
        for i, reply in zip(open_, replies, strict=True):
            verdicts[i] = _verdict(reply, form, settings, round_ + 1)
            failure = verdicts[i].failure
            if failure is not None and failure.kind == "malformed" and reply.text is not None:
                following[i] = [*conversations[i], *again(reply.text, failure.note, form.example)]
        open_ = following
        if not open_:
            break
    return verdicts


def _replies(
    model: Model,
    conversations: Sequence[list[Message]],
    how: Generation,
    form: Form[Any],
    settings: JudgeSettings,
    done: Callable[[int], None],
) -> list[Reply]:
    prompts = [Prompt(messages=messages) for messages in conversations]
    if isinstance(model, Endpoint):
        return model.replies(prompts, how, body=_response_format(form, settings), done=done)
    return [Reply(text) for text in model.generate(prompts, how)]


def _response_format(form: Form[Any], settings: JudgeSettings) -> dict[str, Any]:
    match settings.output:
        case "json_schema":
            schema = {"name": form.name, "strict": True, "schema": form.schema}
            return {"response_format": {"type": "json_schema", "json_schema": schema}}
        case "json_object":
            return {"response_format": {"type": "json_object"}}
        case "text":
            return {}


def _verdict(reply: Reply, form: Form[T], settings: JudgeSettings, replies: int) -> Verdict[T]:
    if reply.text is None:
        return Verdict(None, reply.failure, replies)
    bound = settings.endpoint is not None and settings.output != "text"
    try:
        return Verdict(form.read(reply.text if bound else unwrapped(reply.text)), None, replies)
    except Malformed as fault:
        note = f"cut at {settings.max_new_tokens} tokens" if reply.cut else str(fault)
        return Verdict(None, Failure("malformed", note), replies)
