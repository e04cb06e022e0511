"""A chat template in Go's language, for Ollama, which does not read Jinja.

Nothing is guessed from the template's text. It is rendered for conversations of known pieces, and what stands between
the pieces is read off:

    with_system[0] SYSTEM with_system[1] USER between ASSISTANT next_user USER prompt
    opening USER between ASSISTANT next_user USER prompt

A template that is regular in this sense renders every conversation of alternating turns so; that is then checked on
longer ones. One that is not (a date in it, a system message that wanders to the last turn, thoughts that are cut out)
is refused. Source for what Ollama gives a template: its documentation (.System, .Messages with .Role and .Content).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from whet.data.examples import Message
from whet.data.template import render
from whet.errors import WhetError

SYSTEM, FIRST, REPLY, SECOND = (f"\ue000{name}\ue001" for name in ("system", "first", "reply", "second"))
"""Contents to look for in the rendered text: private-use characters that no template writes."""

FIX = "use the merged model, or serve the GGUF file with whet serve, which renders the template itself"


@dataclass(frozen=True)
class Turns:
    """What a template writes around the contents of alternating turns.

    opening: before the first user turn, without a system message. with_system: before and after one; None where the
    template takes none. between: from a user turn to the answer. next_user: from an answer to the next user turn.
    prompt: after the last user turn, for the model to go on.
    """

    opening: str
    with_system: tuple[str, str] | None
    between: str
    next_user: str
    prompt: str

    def render(self, messages: Sequence[Message]) -> str:
        """A conversation that ends with a user turn, as the Go template renders it."""
        system = messages[0]["content"] if messages[0]["role"] == "system" and self.with_system else ""
        turns = [message for message in messages if message["role"] != "system"]
        text = f"{self.with_system[0]}{system}{self.with_system[1]}" if system and self.with_system else self.opening
        for i, message in enumerate(turns):
            before = "" if i == 0 else self.between if message["role"] == "assistant" else self.next_user
            text += before + message["content"]
        return text + self.prompt


def read_turns(tokenizer: PreTrainedTokenizerBase) -> Turns:
    """Read the turns off the tokenizer's chat template, and check them. Raises WhetError for an irregular one."""
    first = _pieces(tokenizer, _conversation([FIRST]))
    longer = _pieces(tokenizer, _conversation([FIRST, REPLY, SECOND]))
    turns = Turns(first[0], None, longer[1], longer[2], first[1])
    if _takes_system(tokenizer):
        with_system = _pieces(tokenizer, _conversation([FIRST], system=SYSTEM))
        turns = replace(turns, with_system=(with_system[0], with_system[1]))
    _check(tokenizer, turns)
    return turns


def go_template(turns: Turns, bos: str | None = None) -> str:
    """The template for Ollama. bos: text of the token that the engine itself puts first, which is left out here.

    Raises WhetError where the engine puts one first that the chat template does not.
    """
    if bos:
        turns = _without(turns, bos)
    opening = _write(turns.opening)
    if turns.with_system is not None:
        before, after = map(_write, turns.with_system)
        opening = f"{{{{ if $.System }}}}{before}{{{{ $.System }}}}{after}{{{{ else }}}}{opening}{{{{ end }}}}"
    return "\n".join(
        [
            "{{- $first := true }}",
            "{{- range $i, $message := .Messages }}",
            '{{- if eq $message.Role "user" }}',
            f"{{{{- if $first }}}}{opening}{{{{ else }}}}{_write(turns.next_user)}{{{{ end }}}}",
            "{{- $message.Content }}{{- $first = false }}",
            f"{{{{- if eq (len (slice $.Messages $i)) 1 }}}}{_write(turns.prompt)}{{{{ end }}}}",
            '{{- else if eq $message.Role "assistant" }}',
            f"{{{{- {json_text(turns.between)} }}}}{{{{ $message.Content }}}}",
            "{{- end }}",
            "{{- end -}}",
        ]
    )


def json_text(text: str) -> str:
    """Text as a string of Go's: JSON's escapes are Go's too. It never holds the three quotes that end a template."""
    return json.dumps(text, ensure_ascii=False)


def _write(text: str) -> str:
    return f"{{{{ {json_text(text)} }}}}" if text else ""


def _without(turns: Turns, bos: str) -> Turns:
    heads = [turns.opening, *([turns.with_system[0]] if turns.with_system else [])]
    if not all(head.startswith(bos) for head in heads):
        raise WhetError(
            f"the engine puts {bos!r} before every text, and the chat template does not", where="chat template", fix=FIX
        )
    with_system = turns.with_system and (turns.with_system[0].removeprefix(bos), turns.with_system[1])
    return replace(turns, opening=turns.opening.removeprefix(bos), with_system=with_system)


def _conversation(turns: Sequence[str], system: str | None = None) -> list[Message]:
    messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    for i, content in enumerate(turns):
        messages.append({"role": ("user", "assistant")[i % 2], "content": content})
    return messages


def _pieces(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> list[str]:
    """What stands before, between and after the contents."""
    text, pieces = render(tokenizer, messages, add_generation_prompt=True), []
    for message in messages:
        before, found, text = text.partition(message["content"])
        if not found:
            raise _irregular(f"it does not write the content of a {message['role']} turn where it stands")
        pieces.append(before)
    return [*pieces, text]


def _takes_system(tokenizer: PreTrainedTokenizerBase) -> bool:
    try:
        return SYSTEM in render(tokenizer, _conversation([FIRST], system=SYSTEM), add_generation_prompt=True)
    except (WhetError, TemplateError):
        return False


def _check(tokenizer: PreTrainedTokenizerBase, turns: Turns) -> None:
    if "strftime_now" in str(tokenizer.chat_template):
        raise _irregular("it writes the date")
    contents = ["What is 2 + 2?", "It is 4.\n\nQED", "And\n\tthen {{ it }}?", "<b>5</b>", "Why “so”?", "日本語", "ok"]
    for system in (None, *(["Be brief.\nVery."] if turns.with_system else [])):
        for length in (1, 3, 5, 7):
            messages = _conversation(contents[:length], system=system)
            if turns.render(messages) != render(tokenizer, messages, add_generation_prompt=True):
                raise _irregular(f"with {length} turns it writes something else around them than with fewer")


def _irregular(why: str) -> WhetError:
    return WhetError(f"the chat template has no equal in Ollama's language: {why}", where="chat template", fix=FIX)
