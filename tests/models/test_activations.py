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


def step(memory: HostMemory, tokens: int, layers: int = 3) -> set[int]:
    """One pass forward and back; the sizes of the blocks it had."""
    parked = [memory.park(layer(i, tokens)) for i in range(layers)]
    sizes = {p.host["h"].untyped_storage().nbytes() for p in parked}
    for i in reversed(range(layers)):
        assert same(memory.fetch(parked[i]), layer(i, tokens))
    return sizes


def test_a_layer_s_values_lie_in_one_block_that_is_no_larger_than_they_need(memory: HostMemory) -> None:
    """Catches an allocation a value, each rounded up."""
    host = memory.park(layer(1, 100)).host
    assert host["h"].untyped_storage().data_ptr() == host["o"].untyped_storage().data_ptr()
    assert host["h"].untyped_storage().nbytes() == 1024 + 512, "800 and 400 bytes, in multiples of 256"


def test_a_smaller_batch_has_the_blocks_of_a_larger_one(memory: HostMemory) -> None:
    """Batches that are padded to their longest row. Catches pages locked anew each step, and values cut too short."""
    assert step(memory, 300) == {2560 + 1280}
    assert step(memory, 40) == {2560 + 1280}
    assert step(memory, 299) == {2560 + 1280}
    assert len(memory._free) == 3


def test_a_larger_batch_lets_the_blocks_of_a_smaller_one_go(memory: HostMemory) -> None:
    """Catches memory for every batch shape there was."""
    step(memory, 40)
    assert step(memory, 300) == {2560 + 1280}
    assert {block.numel() for _, block in memory._free} == {2560 + 1280}
    assert len(memory._free) == 3


def test_a_layer_that_keeps_little_leaves_the_block_of_one_that_keeps_much(memory: HostMemory) -> None:
    """Catches a small layer that takes the large block, so that the large one needs another in every longer batch."""

    def passed(tokens: int) -> None:
        little, much = {"h": torch.ones(tokens)}, {"h": torch.ones(tokens), "gate_up": torch.ones(9 * tokens)}
        parked = [memory.park(dict(x)) for x in (little, much)]
        for p, x in zip(reversed(parked), (much, little), strict=True):
            assert same(memory.fetch(p), x)

    for tokens in (64, 128, 256):
        passed(tokens)
        assert sorted(block.numel() for _, block in memory._free) == [4 * tokens, 40 * tokens]


def test_a_batch_of_fewer_tiles_has_the_same_blocks(memory: HostMemory) -> None:
    """Catches "gate_up.1", which a short batch does not have, taken for another kind of value."""
    used = set()
    for tiles in (3, 1, 2):
        parked = memory.park({"h": torch.ones(64)} | {f"gate_up.{i}": torch.ones(64) for i in range(tiles)})
        used.add(parked.host["h"].data_ptr())
        memory.fetch(parked)
        del parked
    assert len(used) == 1
    assert [block.numel() for _, block in memory._free] == [4 * 256]


def test_a_second_backward_is_refused(memory: HostMemory) -> None:
    """Catches gradients made of another layer's values."""
    parked = memory.park(layer(1))
    memory.fetch(parked)
    with pytest.raises(RuntimeError, match="second backward"):
        memory.fetch(parked)
