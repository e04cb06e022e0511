"""When an input embedding may leave the GPU. tests/gpu moves one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from whet import FastLanguageModel, WhetError
from whet.models import embedding


class Model(nn.Module):
    """An embedding, and a head that may have the same weight."""

    def __init__(self, *, tied: bool = False):
        super().__init__()
        self.embed_tokens, self.lm_head = nn.Embedding(8, 4), nn.Linear(4, 8, bias=False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens


@pytest.fixture
def as_if_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "_plain", lambda weight: not weight.requires_grad)


@pytest.mark.usefixtures("as_if_on_a_gpu")
def test_only_a_frozen_embedding_of_its_own_may_leave() -> None:
    """Catches one whose gradient, or whose product with every token, would go across the link."""
    model = Model()
    assert embedding.movable_embedding(model) is None, "it trains"
    model.requires_grad_(False)
    assert embedding.movable_embedding(model) is model.embed_tokens
    assert embedding.bytes_of(model.embed_tokens) == 8 * 4 * 4
    assert embedding.movable_embedding(Model(tied=True).requires_grad_(False)) is None
    assert embedding.movable_embedding(nn.Linear(2, 2)) is None
    model.embed_tokens._whet_host = model.embed_tokens.weight.data
    assert embedding.movable_embedding(model) is None, "it has left"
    model.embed_tokens.weight.data = torch.zeros(8, 4)
    assert embedding.movable_embedding(model) is model.embed_tokens, "somebody has brought it back"


def test_without_a_gpu_nothing_leaves_and_what_trains_may_not() -> None:
    model, _ = FastLanguageModel.from_pretrained("builtin:tiny", max_seq_length=64, offload_embedding=True)
    assert embedding.movable_embedding(model) is None
    with pytest.raises(WhetError, match="every weight is to be trained") as error:
        FastLanguageModel.from_pretrained("builtin:tiny", full_finetuning=True, offload_embedding=True)
    assert error.value.where == "offload_embedding"
