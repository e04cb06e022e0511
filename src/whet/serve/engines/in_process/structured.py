"""Answers held to a JSON Schema: which tokens may come next, by llguidance.

A schema is compiled once a request; each step then costs a mask over the vocabulary. White space between JSON's signs
is the model's own choice, but not without end.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from whet.serve.interface import Refused

FIELD = "response_format"
ANY_OBJECT = {"type": "object"}
WHITE_SPACE: Any = {"whitespace_pattern": r"[ \t\n\r]{0,40}"}


class Matcher:
    """Where one answer stands in its grammar."""

    def __init__(self, matcher: Any):
        self._matcher = matcher

    def allowed(self, vocabulary: int) -> Tensor:
        """Which tokens may come next: bool [V], on the CPU. Tokens that the tokenizer does not know never may."""
        bias = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8)[:vocabulary] > 0
        return torch.nn.functional.pad(bias, (0, vocabulary - len(bias)))

    def accept(self, token: int) -> None:
        if not self._matcher.consume_token(token):
            raise ValueError(f"token {token} does not follow the grammar: {self._matcher.get_error()}")

    @property
    def finished(self) -> bool:
        """Whether nothing but the end may follow."""
        return bool(self._matcher.is_stopped())


class Grammars:
    """Compiles schemas for one tokenizer. Built at the first request for it: a large vocabulary takes a second."""

    def __init__(self, tokenizer: Any, ends: Sequence[int]):
        self._tokenizer, self._ends = tokenizer, list(ends)
        self._vocabulary: Any = None
        self._lock = threading.Lock()

    def matcher(self, schema: Mapping[str, Any]) -> Matcher:
        """Raises Refused for what is no schema, or one that can't be compiled."""
        try:
            from llguidance import LLMatcher
        except ModuleNotFoundError:
            raise Refused('answers by a schema need llguidance: pip install "whet[serve]"', FIELD) from None
        try:
            grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema or ANY_OBJECT), overrides=WHITE_SPACE)
        except (ValueError, TypeError, RecursionError) as error:
            raise Refused(f"the schema can't be read: {error}", FIELD) from None
        matcher = LLMatcher(self._known_vocabulary(), grammar, log_level=0)
        if matcher.is_error():
            raise Refused(f"the schema can't be enforced: {matcher.get_error()}", FIELD)
        return Matcher(matcher)

    def _known_vocabulary(self) -> Any:
        from llguidance.hf import from_tokenizer

        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = from_tokenizer(self._tokenizer, eos_token=self._ends)
            return self._vocabulary
