"""Scorers of answers, by the names that task files call them."""

from __future__ import annotations

import difflib

from whet.errors import WhetError
from whet.evals.scorers.base import Kind
from whet.evals.scorers.choice import CHOICE
from whet.evals.scorers.code import CODE
from whet.evals.scorers.embedding import EMBEDDING
from whet.evals.scorers.json_schema import JSON_SCHEMA
from whet.evals.scorers.judge import JUDGE
from whet.evals.scorers.overlap import BLEU, CHRF, ROUGE
from whet.evals.scorers.python_file import PYTHON
from whet.evals.scorers.text import EXACT, NORMALIZED, NUMERIC, REGEX

KINDS: dict[str, Kind] = {
    "exact": EXACT,
    "normalized": NORMALIZED,
    "regex": REGEX,
    "numeric": NUMERIC,
    "json_schema": JSON_SCHEMA,
    "choice": CHOICE,
    "rouge": ROUGE,
    "bleu": BLEU,
    "chrf": CHRF,
    "embedding": EMBEDDING,
    "judge": JUDGE,
    "code": CODE,
    "python": PYTHON,
}


def kind_of(name: str, where: str) -> Kind:
    """The kind of that name. Raises WhetError where there is none."""
    if name not in KINDS:
        near = difflib.get_close_matches(name, KINDS, n=1)
        fix = f"did you mean {near[0]!r}?" if near else f"use one of: {', '.join(KINDS)}"
        raise WhetError(f"no scorer is called {name!r}", where=where, fix=fix)
    return KINDS[name]
