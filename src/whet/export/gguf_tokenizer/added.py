"""Added tokens: their types in GGUF, and what llama.cpp cannot do of them.

transformers cuts added tokens out of a text before anything else, leftmost first and then longest; llama.cpp cuts out
the longest token of all first. Blanks beside a token (`lstrip`, `rstrip`) llama.cpp drops for Phi-3 alone, which it
knows by the model's name: then after every special token but `<unk>`, `<s>` and `<|endoftext|>`.
Source: llama.cpp's `llama-vocab.cpp`.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from gguf import TokenType

NEVER_STRIPPED = frozenset({"<unk>", "<s>", "<|endoftext|>"})
_NEEDED_TO_STRIP = NEVER_STRIPPED | {"</s>"}  # llama.cpp fails to load a Phi-3 without them

Added = dict[str, Any]


def type_of(token: Added) -> TokenType:
    """CONTROL for a special token, which is cut out where special tokens are parsed; else USER_DEFINED: always."""
    return TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED


def strips_right(added: list[Added], notes: list[str]) -> bool:
    """Whether llama.cpp must drop blanks after special tokens; notes name the tokens for which that is wrong."""
    wanted = {token["content"] for token in added if token["rstrip"]}
    contents = {token["content"] for token in added}
    stripped = contents - NEVER_STRIPPED if contents >= _NEEDED_TO_STRIP else set()
    strips = len(wanted ^ stripped) < len(wanted)
    if strips:
        notes.append("llama.cpp drops only ASCII blanks after special tokens, and the tokenizer drops all (rstrip)")
    if strips and (kept := sorted(stripped - wanted)):
        notes.append(f"llama.cpp drops blanks after {_listed(kept)}, and the tokenizer keeps them")
    if kept := sorted(wanted - stripped if strips else wanted):
        notes.append(f"llama.cpp keeps blanks after {_listed(kept)}, and the tokenizer drops them (rstrip)")
    return strips


def note_what_is_ignored(added: list[Added], notes: list[str]) -> None:
    """A note for each property of added tokens that has no equal in llama.cpp."""
    for name, meaning in (("lstrip", "drops blanks before"), ("single_word", "wants no letters beside")):
        if contents := sorted(token["content"] for token in added if token[name]):
            notes.append(f"the tokenizer {meaning} {_listed(contents)} ({name}), and llama.cpp does not")
    if pairs := overlaps([token["content"] for token in added]):
        first, second = pairs[0]
        notes.append(
            f"where the added tokens {first!r} and {second!r} overlap in a text ({len(pairs)} such pairs), "
            "transformers takes the one that begins first and llama.cpp the longest"
        )


def overlaps(contents: list[str]) -> list[tuple[str, str]]:
    """Pairs (x, y) of tokens, y no shorter than x, such that the end of x is the beginning of y."""
    by_prefix: defaultdict[str, list[str]] = defaultdict(list)
    for content in contents:
        for end in range(1, len(content)):
            by_prefix[content[:end]].append(content)
    return [
        (x, y)
        for x in contents
        for start in range(1, len(x))
        for y in by_prefix[x[start:]]
        # Runs of one character come out the same either way: the longest run first.
        if len(y) >= len(x) and x != y and len(set(x + y)) > 1
    ]


def _listed(contents: list[str]) -> str:
    few = ", ".join(map(repr, contents[:5]))
    return f"{few} and {len(contents) - 5} more" if len(contents) > 5 else few
