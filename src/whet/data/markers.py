"""Masks prompts in rows that are token ids already, by the texts that begin a prompt and an answer.

instruction marker, prompt, response marker, answer, instruction marker, prompt, ...
                                             learned
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import takewhile

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from whet.data.labels import Span, check_fast, labels_in
from whet.errors import WhetError


def mask_by_markers(
    tokenizer: PreTrainedTokenizerBase, input_ids: Sequence[int], instruction_part: str, response_part: str
) -> list[int]:
    """Labels [T] for ids that are already there: what follows each response marker, up to the next instruction marker.

    The markers are looked for in the decoded text, not among the ids, because tokenizers merge a marker's outer line
    breaks with what stands beside it. White space at a marker's ends counts as part of it where it is present.
    A row without a response marker comes back all IGNORE: count those. Raises WhetError for unusable markers.
    """
    check_fast(tokenizer)
    if not instruction_part.strip() or not response_part.strip() or instruction_part.strip() == response_part.strip():
        raise WhetError(
            f"the markers {instruction_part!r} and {response_part!r} cannot tell prompts from answers",
            where="instruction_part, response_part",
            fix="pass the texts that begin a user turn and an answer, as '<|im_start|>user\\n'",
        )
    text, positions = _decode(tokenizer, input_ids)
    markers = sorted(
        [(*found, False) for found in _find_marker(text, instruction_part)]
        + [(*found, True) for found in _find_marker(text, response_part)]
    )
    spans: list[Span] = []
    answer: int | None = None  # where the answer that is open began
    for begin, end, is_response in [*markers, (len(text) + 1, 0, False)]:
        if answer is not None:
            spans.append((answer, begin))
        answer = end if is_response else None
    return labels_in(spans, input_ids, positions)


def _decode(tokenizer: PreTrainedTokenizerBase, input_ids: Sequence[int]) -> tuple[str, list[int]]:
    """(text, position of each token's first character in it)."""
    stream = DecodeStream(skip_special_tokens=False)
    pieces: list[str] = []
    positions = []
    length = 0
    for token in input_ids:
        positions.append(length)
        piece = stream.step(tokenizer.backend_tokenizer, int(token))  # None inside a character of several tokens
        if piece:
            pieces.append(piece)
            length += len(piece)
    return "".join(pieces), positions


def _find_marker(text: str, marker: str) -> list[Span]:
    """Where the marker stands, its outer white space included as far as the text has it."""
    core = marker.strip()
    lead, trail = marker.split(core)
    found = []
    for match in re.finditer(re.escape(core), text):
        begin, end = match.span()
        begin -= _shared(lead[::-1], text[max(0, begin - len(lead)) : begin][::-1])
        end += _shared(trail, text[end : end + len(trail)])
        found.append((begin, end))
    return found


def _shared(text: str, other: str) -> int:
    """How many characters the two texts begin with in common."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(text, other, strict=False)))
