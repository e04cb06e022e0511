"""Which models the server has, what each can do, and what clients call them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from whet.errors import WhetError
from whet.serve.engines.vllm.wire import Card
from whet.serve.interface import ServedModel

Kind: TypeAlias = Literal["chat", "completion", "embedding"]
KINDS: dict[str | None, Kind] = {"chat": "chat", "completion": "completion", "embedding": "embedding"}


@dataclass(frozen=True)
class Entry:
    """id: the server's own name for the model. vllm: whether the server is one."""

    served: ServedModel
    id: str
    vllm: bool


def bases_without_kind(cards: list[Card]) -> list[str]:
    """Models of which the list does not say what they are for: vLLM's does not."""
    return [card.id for card in cards if card.parent is None and card.kind not in KINDS]


def catalogue(cards: list[Card], kinds: Mapping[str, Kind], name: str | None, where: str) -> dict[str, Entry]:
    """The models by the names that clients use. kinds: by id, of those that do not say. name: what the base is called.

    vLLM's adapters name their base and have no context of their own. Raises WhetError where a context is missing, or
    `name` could be for several.
    """
    by_id = {card.id: card for card in cards}
    bases = [card.id for card in cards if card.parent is None]
    if not bases:
        raise WhetError("the server has no model", where=where, fix="load one there")
    if name is not None and len(bases) > 1:
        what = f"the server has {len(bases)} models, and one name is given"
        raise WhetError(what, where=f"--name {name}", fix="leave it out: they keep their names")
    renamed = {} if name is None else {bases[0]: name}
    found = {}
    for card in cards:
        base = by_id.get(card.parent or card.id, card)
        context = card.max_model_len or card.context or base.max_model_len or base.context
        if context is None:
            what = f"the server does not say how many tokens {card.id} reads"
            raise WhetError(what, where=where, fix="give the address of a vLLM: its /v1/models says max_model_len")
        kind = KINDS.get(base.kind) or kinds[base.id]
        parent = None if card.parent is None else renamed.get(card.parent, card.parent)
        served = ServedModel(renamed.get(card.id, card.id), context, kind, parent)
        found[served.name] = Entry(served, card.id, vllm=card.owned_by == "vllm")
    return found
