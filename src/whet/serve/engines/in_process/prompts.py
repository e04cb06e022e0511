"""A request's prompt as token ids: chat messages through the model's own template, or a text, or ids as they are."""

from __future__ import annotations

from whet.data.template import render
from whet.errors import WhetError
from whet.serve.engines.in_process.vocabulary import Vocabulary
from whet.serve.engines.messages import check_ids, plain
from whet.serve.interface import Refused, Request


def prompt_tokens(request: Request, vocabulary: Vocabulary) -> list[int]:
    """Raises Refused for messages that the template refuses, and for an empty prompt or ids out of range."""
    if request.messages is not None:
        return vocabulary.encode(_rendered(request, vocabulary), special=False)
    if isinstance(request.prompt, str):
        tokens = vocabulary.encode(request.prompt, special=True)
    else:
        tokens = check_ids(request.prompt or (), vocabulary.size, "prompt")
    if not tokens:
        raise Refused("the prompt is empty", "prompt")
    return tokens


def param_of(request: Request) -> str:
    """The field that a prompt came in."""
    return "prompt" if request.messages is None else "messages"


def _rendered(request: Request, vocabulary: Vocabulary) -> str:
    messages = [plain(message) for message in request.messages or ()]
    tools = [dict(tool) for tool in request.tools] if request.tools else None
    try:
        return render(vocabulary.tokenizer, messages, add_generation_prompt=True, tools=tools)
    except WhetError as error:
        raise Refused(error.what, "messages") from None
    except (TypeError, ValueError, KeyError, AttributeError) as error:  # a template that takes a shape for granted
        raise Refused(f"the chat template fails on these messages: {error}", "messages") from None
