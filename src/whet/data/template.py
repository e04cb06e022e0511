"""Renders chat templates and masks prompts. Training, evaluation, export and serving all come here for it.

A conversation is rendered once and tokenized once, as the server will do it; which tokens the model learns from is then
read off the character positions of the assistant's turns:

    start  the end of the text of the messages before, rendered with the generation prompt
    end    the end of the token that stops the turn (<|im_end|>, ...); white space the template puts after it is no
           part of the turn, for the model never gets to write it

A token belongs to the turn in which its first character lies.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jinja2
from rich.text import Text as RichText
from transformers import PreTrainedTokenizerBase

from whet.data.examples import Conversation, Example, Message, Text
from whet.data.labels import IGNORE as IGNORE
from whet.data.labels import Span, check_fast, first_characters, labels_in
from whet.data.markers import mask_by_markers as mask_by_markers
from whet.errors import WhetError

TrainOn = Literal["responses", "last", "all"]

PROBE = "\ue000answer\ue001"
"""Stands in for an answer to find what the template puts after it: private-use characters that no record holds."""


@dataclass(frozen=True)
class Tokenized:
    """input_ids, labels: [T], the labels IGNORE where a token takes no part in the loss. truncated: T was longer."""

    input_ids: list[int]
    labels: list[int]
    truncated: bool


# ---------------------------------------------------------------- text


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = False,
    tools: list[Any] | None = None,
) -> str:
    """The conversation as text. Raises WhetError when there is no chat template, or it refuses the messages."""
    return str(_apply(tokenizer, messages, tools, add_generation_prompt=add_generation_prompt, tokenize=False))


def prompt_text(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, tools: list[Any] | None = None
) -> str:
    """The text to generate the last answer of a finished conversation from: all before it, then the generation prompt.

    A conversation that waits for its answer is for `render(..., add_generation_prompt=True)`; without an assistant turn
    the two are the same.
    """
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    before = messages[: answers[-1]] if answers else messages
    return render(tokenizer, before, add_generation_prompt=True, tools=tools)


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises WhetError when the tokenizer has none."""
    if not tokenizer.chat_template:
        raise WhetError(
            "the tokenizer has no chat template",
            where="tokenizer",
            fix='name one in the recipe (template: chatml), or call get_chat_template(tokenizer, "chatml")',
        )


# ---------------------------------------------------------------- tokens and labels


def tokenize_conversation(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    train_on: TrainOn = "responses",
    max_length: int,
    tools: list[Any] | None = None,
) -> Tokenized:
    """Token ids of the whole conversation, cut at `max_length`, and the labels of the turns to learn from.

    train_on: every assistant turn, the last one, or all tokens, prompts included.
    Templates with {% generation %} tags say themselves what the assistant writes; else turns are found by rendering.
    Raises WhetError when the template changes the text of earlier messages as the conversation grows, because training
    would then learn from prompts that the server never makes.
    """
    check_fast(tokenizer)
    _check_train_on(train_on)
    if train_on != "all" and _has_generation_tag(tokenizer, tools):
        return _tokenize_by_tags(tokenizer, messages, train_on, max_length, tools)
    text = render(tokenizer, messages, tools=tools)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    input_ids: list[int] = encoded["input_ids"]
    if train_on == "all":
        return _cut(input_ids, list(input_ids), max_length)
    spans = _answer_spans(tokenizer, messages, text, train_on, tools)
    return _cut(input_ids, labels_in(spans, input_ids, first_characters(encoded["offset_mapping"])), max_length)


def tokenize_text(tokenizer: PreTrainedTokenizerBase, text: str, *, max_length: int) -> Tokenized:
    """Token ids of raw text, every one a label, with the end-of-sequence token after it.

    The tokenizer's own first token is put before it, unless the text already begins with that one.
    """
    if tokenizer.eos_token_id is None:
        raise WhetError(
            "the tokenizer has no end-of-sequence token, so a model could not learn where a text ends",
            where="tokenizer",
            fix="set tokenizer.eos_token to a token of its vocabulary",
        )
    has_bos = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    input_ids: list[int] = tokenizer(text, add_special_tokens=not has_bos)["input_ids"]
    if input_ids[-1:] != [tokenizer.eos_token_id]:
        input_ids = [*input_ids, tokenizer.eos_token_id]
    return _cut(input_ids, list(input_ids), max_length)


def tokenize(
    tokenizer: PreTrainedTokenizerBase, example: Example, *, max_length: int, train_on: TrainOn = "responses"
) -> Tokenized:
    """A conversation or a text; see the two above. Raises WhetError for a preference pair."""
    if isinstance(example, Conversation):
        return tokenize_conversation(
            tokenizer, example.messages, train_on=train_on, max_length=max_length, tools=example.tools
        )
    if isinstance(example, Text):
        return tokenize_text(tokenizer, example.text, max_length=max_length)
    raise WhetError(
        "a preference pair is no example to imitate", fix="train with method: dpo, or use a format of conversations"
    )


def preview(tokenizer: PreTrainedTokenizerBase, tokenized: Tokenized) -> RichText:
    """The row as the model sees it, the tokens it does not learn from dimmed."""
    shown = RichText()
    start = 0
    masked = [label == IGNORE for label in tokenized.labels]
    for end in range(1, len(masked) + 1):
        if end == len(masked) or masked[end] != masked[start]:
            text = tokenizer.decode(tokenized.input_ids[start:end], clean_up_tokenization_spaces=False)
            shown.append(str(text), style="dim" if masked[start] else "bold")
            start = end
    return shown


# ---------------------------------------------------------------- how turns are found


def _answer_spans(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    text: str,
    train_on: TrainOn,
    tools: list[Any] | None,
) -> list[Span]:
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise WhetError("there is no assistant turn to learn from", fix="add the answer, or remove the row")
    chosen = turns[-1:] if train_on == "last" else turns
    return [_answer_span(tokenizer, messages, turn, text, tools) for turn in chosen]


def _answer_span(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], turn: int, text: str, tools: list[Any] | None
) -> Span:
    """Where the turn lies in `text`.

    Its end is found by rendering the same conversation with another answer in its place, so that a template may treat
    the last turn, or turns before the last question, differently.
    """
    probe = {"role": "assistant", "content": PROBE}
    probed = render(tokenizer, [*messages[:turn], probe, *messages[turn + 1 :]], tools=tools)
    before, found, after = probed.partition(PROBE)
    prompt = render(tokenizer, messages[:turn], add_generation_prompt=True, tools=tools) if turn else before
    written = len(text) - len(after)
    if not found or not text.endswith(after) or not text.startswith(prompt) or len(prompt) > written:
        raise _not_a_prefix(tokenizer, turn)
    return len(prompt), written + _stop_length(tokenizer, after, [*messages[:turn], probe], tools)


def _stop_length(
    tokenizer: PreTrainedTokenizerBase, after: str, until: Sequence[Message], tools: list[Any] | None
) -> int:
    """How much of the text after an answer is the model's own: through the token that stops it.

    Where no special token follows, the stop is what the template writes after an answer that ends a conversation.
    """
    rest = after.lstrip()
    space = len(after) - len(rest)
    special = {*tokenizer.added_tokens_encoder, *tokenizer.all_special_tokens}
    stop = max((token for token in special if token and rest.startswith(token)), key=len, default=None)
    if stop is not None:
        return space + len(stop)
    closing = render(tokenizer, until, tools=tools).partition(PROBE)[2].rstrip()
    return len(closing) if after.startswith(closing) else 0


def _cut(input_ids: list[int], labels: list[int], max_length: int) -> Tokenized:
    return Tokenized(input_ids[:max_length], labels[:max_length], truncated=len(input_ids) > max_length)


# ---------------------------------------------------------------- how templates are called, and how they fail


def _tokenize_by_tags(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    train_on: TrainOn,
    max_length: int,
    tools: list[Any] | None,
) -> Tokenized:
    encoded = _apply(tokenizer, messages, tools, return_dict=True, return_assistant_tokens_mask=True)
    input_ids: list[int] = encoded["input_ids"]
    mask: list[int] = encoded["assistant_masks"]
    if train_on == "last" and 1 in mask:
        end = len(mask) - mask[::-1].index(1)
        start = next((i + 1 for i in range(end - 1, -1, -1) if not mask[i]), 0)
        mask = [int(start <= i < end) for i in range(len(mask))]
    labels = [token if learn else IGNORE for token, learn in zip(input_ids, mask, strict=True)]
    return _cut(input_ids, labels, max_length)


def _has_generation_tag(tokenizer: PreTrainedTokenizerBase, tools: list[Any] | None) -> bool:
    check_template(tokenizer)
    code = re.sub(r"\{#.*?#\}", "", tokenizer.get_chat_template(tools=tools), flags=re.DOTALL)  # comments may name it
    return re.search(r"\{%[-+]?\s*generation\b", code) is not None


def _apply(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: list[Any] | None, **options: Any
) -> Any:
    check_template(tokenizer)
    if not messages:
        raise WhetError("there are no messages to render", fix="begin the conversation with a user turn")
    try:
        return tokenizer.apply_chat_template(list(messages), tools=tools, **options)
    except jinja2.TemplateError as error:
        raise WhetError(
            f"{_template_name(tokenizer)} refuses the messages: {error}",
            fix="change the messages, or use another template",
        ) from error


def _template_name(tokenizer: PreTrainedTokenizerBase) -> str:
    name = tokenizer.name_or_path
    return f"the chat template of {name}" if name else "the tokenizer's chat template"


def _not_a_prefix(tokenizer: PreTrainedTokenizerBase, turn: int) -> WhetError:
    return WhetError(
        f"{_template_name(tokenizer)} does not keep the text before the answer as it was when the answer was asked for",
        where=f"message {turn}",
        fix='learn from the last answer alone (train_on: "last"), name a template (template: chatml), '
        "or mark the answers in the template with {% generation %}",
    )


def _check_train_on(train_on: str) -> None:
    if train_on not in ("responses", "last", "all"):
        raise WhetError(f"train_on is {train_on!r}", where="train_on", fix="use responses, last or all")
