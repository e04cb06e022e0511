"""How well a model still knows general text: the loss of each stretch of a file, for the gate's check on forgetting."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from whet.data.examples import texts
from whet.data.formats import Source, load_examples
from whet.errors import WhetError
from whet.evals.gate_checks import TextLoss
from whet.evals.likelihood import Continuation, log_probs
from whet.evals.models import InMemory
from whet.files import write_text

STRETCH = 512
"""Tokens that are read together. The first one is given, so no stretch counts it."""


def stretches(model: InMemory, path: Path) -> list[list[int]]:
    """The file's texts as token ids, cut into stretches of STRETCH; a rest of one token is left out.

    path: a file of texts or conversations, in any form that training data may have. Raises WhetError.
    """
    rows = load_examples([Source(path.name)], base=path.parent)
    ids = [
        model.tokenizer("\n\n".join(texts(row)), add_special_tokens=True, verbose=False)["input_ids"] for row in rows
    ]
    cut = [row[start : start + STRETCH] for row in ids for start in range(0, len(row), STRETCH)]
    if not (long := [stretch for stretch in cut if len(stretch) > 1]):
        raise WhetError("there is no text to measure", where=str(path), fix="name a file with some pages of text")
    return long


def text_loss(model: InMemory, rows: list[list[int]]) -> TextLoss:
    """The loss of each stretch under the model, nats summed over its tokens but the first."""
    with model.undisturbed():
        found = log_probs(model.model, [Continuation(row[:1], row[1:]) for row in rows])
    digest = hashlib.sha256(json.dumps(rows).encode("ascii")).hexdigest()
    return TextLoss(digest, tuple(-value for value in found), tuple(len(row) - 1 for row in rows))


def save(loss: TextLoss, path: Path) -> None:
    write_text(path, json.dumps(asdict(loss)) + "\n")


def read(path: Path) -> TextLoss | WhetError:
    """What `save` wrote; what is wrong with it otherwise."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return TextLoss(values["digest"], tuple(values["losses"]), tuple(values["tokens"]))
    except (OSError, ValueError, KeyError, TypeError):
        return WhetError("the losses on general text can't be read", where=str(path), fix="run the evaluation again")
