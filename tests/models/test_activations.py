"""Values that wait in host memory: what comes back, when buffers are used again, what is refused.

The streams here do nothing, since a CPU has none; that copies wait for each other is tested on a GPU.
"""

from __future__ import annotations

import gc
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from whet.models.activations import HostMemory


class Idle:
    """A stream or an event of a device that has finished everything."""

    def __init__(self, *arguments: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: None


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> HostMemory:
    for name in ("Stream", "Event"):
        monkeypatch.setattr(torch.cuda, name, Idle)
    monkeypatch.setattr(torch.cuda, "current_stream", Idle)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    return HostMemory(torch.device("cpu"))


def layer(number: int, tokens: int = 3) -> dict[str, torch.Tensor]:
    return {"h": torch.full((tokens, 2), float(number)), "o": torch.full((tokens,), 10.0 * number)}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_each_layer_gets_back_its_own(memory: HostMemory) -> None:
    """Catches a buffer given to two layers, and a recall of the wrong one."""
    for _ in range(3):
        parked = [memory.park(layer(i)) for i in range(5)]
        for i in reversed(range(5)):
            assert same(memory.fetch(parked[i]), layer(i))


def test_only_the_last_layer_s_values_stay_on_the_device(memory: HostMemory) -> None:
    parked = [memory.park(layer(i)) for i in range(4)]
    assert [p.device is not None for p in parked] == [False, False, False, True]
    memory.fetch(parked[3])
    assert [p.device is not None for p in parked] == [False, False, True, False], "the layer below is on its way"


def test_buffers_are_used_again_once_their_graph_is_gone(memory: HostMemory) -> None:
    """Catches pinned memory that grows with every step, or with every forward pass that has no backward."""
    first = [memory.park(layer(i)) for i in range(3)]
    used = {p.host["h"].data_ptr() for p in first}
    memory.fetch(first[2])
    del first
    memory.park(layer(9))  # lets go of what was leaving
    gc.collect()
    again = [memory.park(layer(i)) for i in range(2)]
    assert {p.host["h"].data_ptr() for p in again} <= used
    assert same(memory.fetch(again[1]), layer(1))
    assert same(memory.fetch(again[0]), layer(0))


def test_a_forward_pass_without_a_backward_is_not_recalled(memory: HostMemory) -> None:
    dropped = memory.park(layer(1))
    kept = [memory.park(layer(i)) for i in (2, 3)]
    del dropped
    gc.collect()
    assert same(memory.fetch(kept[1]), layer(3))
    assert same(memory.fetch(kept[0]), layer(2))


def test_another_batch_shape_gets_buffers_of_its_own(memory: HostMemory) -> None:
    for tokens in (3, 5, 3):
        parked = memory.park(layer(1, tokens))
        assert same(memory.fetch(parked), layer(1, tokens))


def test_a_second_backward_is_refused(memory: HostMemory) -> None:
    """Catches gradients made of another layer's values."""
    parked = memory.park(layer(1))
    memory.fetch(parked)
    with pytest.raises(RuntimeError, match="second backward"):
        memory.fetch(parked)
