"""An input embedding that waits in host memory: a pass reads a row of it for each token, across the link.

Its weight stays a tensor on the GPU, over pinned memory (models/pinned.py): what looks it up, copies or saves it works
on as before, at the link's rate. 8 KB a token of an 8B model; a gigabyte of the GPU's memory is free for it.
"""

from __future__ import annotations

from torch import Tensor, nn

from whet.models.pinned import Cuda, cut, mapped, pinned, room


def movable_embedding(model: nn.Module) -> nn.Embedding | None:
    """The input embedding, where a pass only looks rows of it up: frozen, not the head's weight too, on a GPU."""
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    if not isinstance(embedding, nn.Embedding) or not _plain(embedding.weight) or on_host(embedding):
        return None
    holders = [module for module in model.modules() if module._parameters.get("weight") is embedding.weight]
    return embedding if holders == [embedding] else None


def on_host(embedding: nn.Embedding) -> bool:
    """Whether the weight lies where `move_to_host` has put it."""
    there = vars(embedding).get("_whet_host")
    return isinstance(there, Tensor) and there.data_ptr() == embedding.weight.data_ptr()


def move_to_host(embedding: nn.Embedding) -> None:
    """Move the weight of a `movable_embedding`. Raises WhetError where host memory can't be pinned."""
    weight = embedding.weight
    kinds = {"weight": (weight.shape, weight.dtype)}
    there = cut(pinned(room(kinds), Cuda(weight.device)), kinds)["weight"]
    there.copy_(weight.detach())
    weight.data = mapped(there, weight.device)
    vars(embedding)["_whet_host"] = there


def _plain(weight: Tensor) -> bool:
    return type(weight) is nn.Parameter and weight.is_cuda and not weight.requires_grad and weight.is_contiguous()


def bytes_of(embedding: nn.Embedding | None) -> int:
    """Of its weight; 0 for none."""
    return 0 if embedding is None else embedding.weight.nbytes
