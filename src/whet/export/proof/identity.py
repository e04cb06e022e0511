"""What must be the same before any answer is compared: sizes, added tokens, the tokenizer's fingerprint, end tokens.

A file that passes these holds the tokenizer that the model was tuned with, and an embedding that fits it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from whet.data.fingerprint import PARTS, fingerprint
from whet.export.proof.checks import Check
from whet.export.proof.reference import Reference, end_tokens

SPECIAL = ("bos", "eos", "unk", "pad")


def sizes_check(reference: Reference, rows: int, head_rows: int) -> Check:
    """Rows of the embedding and of the head against the reference's, and against its tokenizer's tokens."""
    expected, tokens = reference.model.get_input_embeddings().weight.shape[0], len(reference.tokenizer)
    passed = rows == head_rows == expected >= tokens
    what = f"{rows:,} rows of the embedding and {head_rows:,} of the head, for {tokens:,} tokens"
    return Check("sizes", passed, what if passed else f"{what}; the tuned model has {expected:,} rows")


def tokenizer_checks(reference: Reference, tokenizer: PreTrainedTokenizerBase) -> list[Check]:
    """A folder's tokenizer against the reference's: its added tokens, then its fingerprint."""
    expected, found = fingerprint(reference.tokenizer), fingerprint(tokenizer)
    other = [words for name, words in PARTS.items() if expected[name] != found[name]]
    what = f"its {' and '.join(other)} differ" if other else "template, vocabulary and special tokens are the same"
    mine, theirs = (_added(one) for one in (reference.tokenizer, tokenizer))
    return [added_check(mine, theirs), Check("fingerprint", not other, what)]


def added_check(expected: Mapping[int, Any], found: Mapping[int, Any]) -> Check:
    """expected, found: token id -> what is known of the added token."""
    missing = [expected[index] for index in sorted(expected) if index not in found]
    other = [expected[index] for index in sorted(expected) if index in found and found[index] != expected[index]]
    if not missing and not other:
        return Check("added tokens", True, f"all {len(expected)} are there")
    told = [f"{len(missing)} are missing"] * bool(missing) + [f"{len(other)} are other ones"] * bool(other)
    return Check("added tokens", False, " and ".join(told) + f", {(missing + other)[0]!r} first")


def _added(tokenizer: PreTrainedTokenizerBase) -> dict[int, tuple[str, bool]]:
    return {index: (token.content, token.special) for index, token in tokenizer.added_tokens_decoder.items()}


def ends_check(reference: Reference, model: Any, tokenizer: PreTrainedTokenizerBase) -> Check:
    """The tokens that end an answer, of a folder's model and tokenizer."""
    return same_ends(reference, end_tokens(model, tokenizer))


def same_ends(reference: Reference, found: frozenset[int]) -> Check:
    name = reference.tokenizer.convert_ids_to_tokens
    expected = ", ".join(map(repr, name(sorted(reference.ends))))
    if found == reference.ends:
        return Check("end tokens", True, f"an answer ends with {expected}")
    ends = ", ".join(map(repr, name(sorted(found)))) or "nothing"
    return Check("end tokens", False, f"an answer would end with {ends}, not with {expected}")


def template_check(reference: Reference, found: str | Mapping[str, str] | None) -> Check:
    """The chat template's text: what it renders is the same for every conversation where the text is."""
    expected = reference.tokenizer.chat_template
    if found == expected:
        return Check("template", True, "the chat template is the same" if expected else "neither has a chat template")
    what = "the chat template is missing" if not found else "the chat template is another one"
    return Check("template", False, what)
