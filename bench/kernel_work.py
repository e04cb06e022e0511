"""What a measured kernel is: its sizes, where its tensors are, the call, and what it must read and write.

Shapes: T tokens, D model width, F width of the MLP, H query heads and G key heads of size d, W = (H + 2 G) d, V
vocabulary, r LoRA's rank, R columns for adapters beside a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class Missing(Exception):
    """This machine lacks what a kernel needs. Says what."""


@dataclass(frozen=True)
class Sizes:
    """Of a model (Llama-3.1-8B), and of what is cut into pieces."""

    D: int = 4096
    F: int = 14336
    H: int = 32
    G: int = 8
    d: int = 128
    V: int = 128256
    r: int = 16
    R: int = 64
    row: int = 2048  # tokens of a row, and at most of a mixed document
    head_rows: int = 4096  # labelled rows of `linear_log_probs`
    chunk: int = 1024  # of them in one buffer of logits
    layers: int = 32  # whose adapters an optimizer updates
    # weights trained whole, count and shape: matrices of Llama-3.2-1B's MLPs, and its head
    trained: tuple[tuple[int, int, int], ...] = ((16, 2048, 8192), (1, 128256, 2048))

    @property
    def W(self) -> int:
        return (self.H + 2 * self.G) * self.d

    @property
    def projections(self) -> dict[str, tuple[tuple[int, ...], int]]:
        """Of a layer: outputs of each one's stacked layers, and its inputs."""
        q, kv = self.H * self.d, self.G * self.d
        return {
            "qkv": ((q, kv, kv), self.D),
            "o": ((self.D,), q),
            "gate, up": ((self.F,) * 2, self.D),
            "down": ((self.D,), self.F),
        }

    @property
    def adapters(self) -> list[tuple[int, int, int]]:
        """Count and shape of A and B of every stacked layer."""
        parts = [(n, K) for ns, K in self.projections.values() for n in ns]
        return [(self.layers, *shape) for n, K in parts for shape in ((self.r, K), (n, self.r))]


@dataclass(frozen=True)
class Device:
    """Where tensors are, and in what precision. Values are random: a GPU multiplies zeros faster."""

    name: str = "cuda"
    dtype: torch.dtype = torch.bfloat16

    def normal(self, *shape: int, std: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, device=self.name, dtype=dtype or self.dtype).mul_(std)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, device=self.name, dtype=dtype or self.dtype)

    def random_bytes(self, *shape: int) -> Tensor:
        return torch.randint(256, shape, device=self.name, dtype=torch.uint8)


@dataclass(frozen=True)
class Work:
    """A call with its tensors: what it must read and write, once each. What changes in place is in both."""

    run: Callable[[], object]
    reads: Sequence[Tensor]
    writes: Sequence[Tensor]
    flops: int = 0  # of matrix products
    fp8: bool = False  # their precision, else 16 bits
    restore: Callable[[], object] | None = None  # after a call whose output is no input for the next
    host_bound: bool = False  # the host may take longer over a call than the device, whose time a replay alone shows

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (*self.reads, *self.writes))


@dataclass(frozen=True)
class Case:
    kernel: str
    shape: str
    tokens: int | None
    make: Callable[[], Work]
    needs: Callable[[], None] = lambda: None  # raises Missing


def unallocated(x: Tensor) -> Tensor:
    """As large as x: stands for an output that the kernel allocates."""
    return x.to("meta")
