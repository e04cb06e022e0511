"""The two ways to run what is slow: torch on any device, and compiled for the CPU. Both give the same bytes.

Compiled ones are four times as fast and take seconds to compile, in each process anew: numba would keep them on disk as
pickles. So a process encodes in torch until it is clear that there is much to encode.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from torch import Tensor

from whet.quant import affine, rounding, symmetric
from whet.quant.grids import Affine, Symmetric

# Weights of one type that a process encodes in torch first: a second's work for most types, where compiling takes up to
# six. A model of a few million weights never compiles; a large one waits little longer than it must.
PATIENCE = 1 << 24


@dataclass(frozen=True)
class Kernels:
    """The searches, and the plain roundings. Signatures and shapes: `affine`, `symmetric` and `rounding`."""

    affine_search: Callable[[Tensor, Tensor | None, Affine], tuple[Tensor, Tensor]]
    affine_levels: Callable[
        [Tensor, Tensor | None, Affine, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]
    ]
    symmetric_search: Callable[[Tensor, Tensor | None, Symmetric], Tensor]
    symmetric_levels: Callable[[Tensor, Tensor | None, Symmetric, Tensor, Tensor], tuple[Tensor, Tensor]]
    largest: Callable[[Tensor], float]
    plain_int8: Callable[[Tensor], Tensor]
    plain_symmetric: Callable[[Tensor, int], Tensor]
    plain_affine: Callable[[Tensor, int], Tensor]


TORCH = Kernels(
    affine.affine_search,
    affine.affine_levels,
    symmetric.symmetric_search,
    symmetric.symmetric_levels,
    rounding.largest,
    rounding.plain_int8,
    rounding.plain_symmetric,
    rounding.plain_affine,
)


_encoded: Counter[str] = Counter()


def for_cpu(kind: str, weights: int) -> Kernels:
    """The kernels for the next `weights` weights of a type, on the CPU."""
    _encoded[kind] += weights
    return TORCH if _encoded[kind] <= PATIENCE else compiled()


@cache
def compiled() -> Kernels:
    """Those for CPU tensors. numba is imported here, since that alone takes half a second."""
    from whet.quant import affine_cpu, rounding_cpu, symmetric_cpu

    return Kernels(
        affine_cpu.affine_search,
        affine_cpu.affine_levels,
        symmetric_cpu.symmetric_search,
        symmetric_cpu.symmetric_levels,
        rounding_cpu.largest,
        rounding_cpu.plain_int8,
        rounding_cpu.plain_symmetric,
        rounding_cpu.plain_affine,
    )
