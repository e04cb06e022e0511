"""The blank that SentencePiece's kind of tokenizer puts before a text, and when llama.cpp does the same.

llama.cpp puts "▁" before a text and again after every special token, or nowhere at all (`add_space_prefix`). Tokenizers
of transformers also know "only at the start" and "unless there is a blank already". What a tokenizer does is measured.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from whet.errors import WhetError
from whet.export.gguf_tokenizer.strings import strings

SPACE = "▁"
_CHATS = (
    [{"role": "user", "content": "Hello"}],
    [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "Bye"},
    ],
)


@dataclass(frozen=True)
class Prefix:
    """Whether "▁" is put before a piece of text, by where it stands and whether it begins with a blank."""

    start: bool
    start_before_blank: bool
    after_special: bool
    after_special_before_blank: bool

    def before(self, piece: str, at_start: bool) -> bool:
        if piece.startswith(" "):
            return self.start_before_blank if at_start else self.after_special_before_blank
        return self.start if at_start else self.after_special


def space_prefix(tokenizer: Any, spec: dict[str, Any], where: str, notes: list[str]) -> bool:
    """`add_space_prefix` for GGUF. Where no value is right for all text, the one that is right for more of a chat; for
    the start of a text where the tokenizer has no chat template.

    Raises WhetError for a tokenizer that does more to a text than to mark its blanks.
    """
    backend = tokenizer.backend_tokenizer
    if SPACE not in spec["model"]["vocab"]:
        raise WhetError(f"the vocabulary has no {SPACE!r}, which stands for a blank", where=where)
    prefix = _measured(tokenizer, spec, *_at_start(backend, spec, where))
    each = {prefix.start, prefix.start_before_blank, prefix.after_special, prefix.after_special_before_blank}
    if len(each) == 1:
        return each.pop()
    pieces = [piece for chat in _chats(tokenizer) for piece in _pieces(chat, spec)]
    wrong = {value: sum(prefix.before(*piece) != value for piece in pieces) for value in (False, True)}
    chosen = wrong[True] < wrong[False] if pieces else prefix.start
    notes.append(_difference(prefix, chosen, wrong[chosen], len(pieces)))
    return chosen


def _at_start(backend: Any, spec: dict[str, Any], where: str) -> tuple[bool, bool]:
    """Whether "▁" is put before a whole text, and before one that begins with a blank."""
    seen: dict[bool, set[bool]] = {False: set(), True: set()}
    for text in strings():
        marked = backend.normalizer.normalize_str(text) if backend.normalizer else text
        pieces = backend.pre_tokenizer.pre_tokenize_str(marked) if backend.pre_tokenizer else [(marked, None)]
        plain = text.replace(" ", SPACE)
        if len(pieces) != 1 or pieces[0][0] not in (plain, SPACE + plain):
            raise _unequal(spec, text, [piece for piece, _ in pieces], where)
        seen[text.startswith(" ")].add(pieces[0][0] != plain)
    if any(len(found) != 1 for found in seen.values()):
        raise _unequal(spec, strings()[0], [], where)
    return seen[False].pop(), seen[True].pop()


def _unequal(spec: dict[str, Any], text: str, pieces: list[str], where: str) -> WhetError:
    return WhetError(
        f"llama.cpp has no equal of this byte-fallback tokenizer's normalizer {json.dumps(spec['normalizer'])} and "
        f"pre-tokenizer {json.dumps(spec['pre_tokenizer'])}: it makes {pieces} of {text!r}",
        where=where,
        fix='whet knows those that write " " as "▁", with or without "▁" before the text',
    )


def _measured(tokenizer: Any, spec: dict[str, Any], start: bool, start_before_blank: bool) -> Prefix:
    keeps = [token["content"] for token in spec["added_tokens"] if token["special"] and not token["rstrip"]]
    special = keeps[0] if keeps else tokenizer.eos_token

    def marks_after_special(text: str) -> int:
        tokens = tokenizer.convert_ids_to_tokens(tokenizer(special + text, add_special_tokens=False)["input_ids"])
        joined = "".join(tokens[1:])
        return len(joined) - len(joined.lstrip(SPACE))

    return Prefix(start, start_before_blank, marks_after_special("a") == 1, marks_after_special(" a") == 2)


def _chats(tokenizer: Any) -> Iterator[str]:
    """Conversations through the chat template; none where it has no template or refuses them."""
    for chat in _CHATS:
        try:
            yield str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
        except Exception:  # a template may raise anything, and other checks look at it
            return


def _pieces(chat: str, spec: dict[str, Any]) -> list[tuple[str, bool]]:
    """The pieces of text between the added tokens, each with whether it stands at the start."""
    contents = sorted((token["content"] for token in spec["added_tokens"]), key=len, reverse=True)
    pieces = re.split("|".join(map(re.escape, contents)), chat)
    return [(piece, index == 0) for index, piece in enumerate(pieces) if piece]


def _difference(prefix: Prefix, chosen: bool, wrong: int, pieces: int) -> str:
    places = {
        "at the start of a text": prefix.start,
        "at the start of a text that begins with a blank": prefix.start_before_blank,
        "after a special token": prefix.after_special,
        "between a special token and a blank": prefix.after_special_before_blank,
    }
    where = " or ".join(place for place, put in places.items() if put != chosen)
    ours, theirs = ("puts no blank", "puts one") if chosen else ("puts a blank", "puts none")
    chats = f"{wrong} of {pieces} pieces of a chat come out otherwise" if wrong else "chats come out the same"
    known = f"{chats}; for other text" if pieces else "for such text"
    return f"the tokenizer {ours} {where}, and llama.cpp {theirs}: {known} give it token ids"
