"""What a layer keeps of its forward pass for its backward, and where: on the device, or in pinned host memory.

    ALL       everything the backward reads                                        92 KB a token and layer (8B, bf16)
    MOST      all but gate and up, the output of the widest product                36
    ATTENTION the layer's input and attention's output; products run again         16
    INPUT     the layer's input alone; attention runs again too                     8

On the host, layer l's values leave while layer l + 1 is computed, and come back while layer l + 1's backward runs: two
layers' worth is on the device at a time. One pinned block (models/pinned.py) holds a layer's values; it is made in the
first step and used again in every other.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from weakref import finalize, ref

import torch
from torch import Tensor

from whet.models.pinned import Cuda, cut, pinned, room

Values = dict[str, Tensor]

ALWAYS = frozenset({"o_tail"})


@dataclass(frozen=True)
class Policy:
    """Which of the values that the backward reads (models/block.py) stay beside the layer's input.

    offload: they wait in host memory.
    """

    keep: frozenset[str]
    offload: bool = False


ALL = Policy(ALWAYS | {"lse", "o", "m", "qkv", "gate_up"})
MOST = Policy(ALWAYS | {"lse", "o", "m", "qkv"})
ATTENTION = Policy(ALWAYS | {"lse", "o"})
INPUT = Policy(ALWAYS)


@dataclass(eq=False)
class Parked:
    """One layer's values in host memory. `device` holds them on the device: before they have left, or once back.

    fetched: the backward has had them, and their host memory may hold others.
    """

    host: Values
    device: Values | None
    arrived: torch.cuda.Event | None = None
    fetched: bool = False


@dataclass
class HostMemory:
    """Pinned blocks for the layers of one model, and the stream that copies to and from them.

    A graph that is let go without a backward pass takes its `Parked` with it; their blocks then are free again. A block
    serves any layer that keeps the same kinds of values, and needs no more room.
    """

    device: torch.device
    _stream: torch.cuda.Stream = field(init=False)
    _free: list[tuple[frozenset[str], Tensor]] = field(default_factory=list)
    _leaving: deque[tuple[torch.cuda.Event, Parked]] = field(default_factory=deque)
    _stack: list[ref[Parked]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._stream = torch.cuda.Stream(self.device)

    def park(self, values: Values) -> Parked:
        """Begin to copy values to the host. They must not be changed after this."""
        compute = torch.cuda.current_stream(self.device)
        names = frozenset(name.partition(".")[0] for name in values)  # "gate_up.3" is one of as many as there are tiles
        kinds = {name: (x.shape, x.dtype) for name, x in values.items()}
        block = self._block(names, room(kinds))
        parked = Parked(cut(block, kinds), values)
        finalize(parked, self._free.append, (names, block))
        self._stream.wait_stream(compute)
        with torch.cuda.stream(self._stream):
            for name, x in values.items():
                parked.host[name].copy_(x, non_blocking=True)
            left = torch.cuda.Event()
            left.record(self._stream)
        self._leaving.append((left, parked))
        self._stack = [*(x for x in self._stack if x() is not None), ref(parked)]
        while len(self._leaving) > 1:  # the memory of what has left may be written over from here on
            event, gone = self._leaving.popleft()
            compute.wait_event(event)
            gone.device = None
        return parked

    def fetch(self, parked: Parked) -> Values:
        """The values on the device; the layer below's begin to come back meanwhile.

        Raises RuntimeError the second time: their host memory may hold another layer's by then.
        """
        if parked.fetched:
            raise RuntimeError(
                "a second backward pass through the same graph, whose values waited in host memory and are gone; "
                'use use_gradient_checkpointing=True or False with retain_graph, not "auto" or "whet"'
            )
        parked.fetched = True
        self._recall(parked)
        if parked.arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(parked.arrived)
        self._leaving = deque(x for x in self._leaving if x[1] is not parked)
        waiting = [x() for x in self._stack]
        below = [x for x in waiting[: waiting.index(parked)] if x is not None and not x.fetched]
        if below:
            self._recall(below[-1])
        values, parked.device = parked.device, None
        assert values is not None
        return values

    def join(self) -> None:
        """Have the device wait for every copy that has begun."""
        torch.cuda.current_stream(self.device).wait_stream(self._stream)

    def _recall(self, parked: Parked) -> None:
        if parked.device is not None:
            return
        compute = torch.cuda.current_stream(self.device)
        parked.device = {name: torch.empty_like(x, device=self.device) for name, x in parked.host.items()}
        self._stream.wait_stream(compute)  # the memory may still be read by work that was queued before
        with torch.cuda.stream(self._stream):
            for name, x in parked.host.items():
                parked.device[name].copy_(x, non_blocking=True)
            parked.arrived = torch.cuda.Event()
            parked.arrived.record(self._stream)

    def _block(self, names: frozenset[str], size: int) -> Tensor:
        """The least of the free blocks that serve; else a new one, for which one that does not is let go."""
        own = [i for i, (held, _) in enumerate(self._free) if held == names]
        serving = [i for i in own if self._free[i][1].numel() >= size]
        if serving:
            return self._free.pop(min(serving, key=lambda i: self._free[i][1].numel()))[1]
        if self._free:
            self._free.pop(own[-1] if own else -1)
        if self.device.type == "cuda":
            return pinned(size, Cuda(self.device))
        return torch.empty(size, dtype=torch.uint8)
