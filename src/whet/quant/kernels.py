"""The two ways to run what is slow: torch on any device, and compiled for the CPU. Both give the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from torch import Tensor

from whet.quant import affine, rounding, symmetric
from whet.quant.grids import Affine, Symmetric


@dataclass(frozen=True)
class Kernels:
    """The searches, and the plain roundings. Signatures and shapes: `affine`, `symmetric` and `rounding`."""

    affine_search: Callable[[Tensor, Tensor | None, Affine], tuple[Tensor, Tensor]]
    affine_levels: Callable[
        [Tensor, Tensor | None, Affine, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]
    ]
    symmetric_search: Callable[[Tensor, Tensor | None, Symmetric], Tensor]
    symmetric_levels: Callable[[Tensor, Tensor | None, Symmetric, Tensor, Tensor], tuple[Tensor, Tensor]]
    plain_int8: Callable[[Tensor], Tensor]
    plain_symmetric: Callable[[Tensor, int], Tensor]
    plain_affine: Callable[[Tensor, int], Tensor]


TORCH = Kernels(
    affine.affine_search,
    affine.affine_levels,
    symmetric.symmetric_search,
    symmetric.symmetric_levels,
    rounding.plain_int8,
    rounding.plain_symmetric,
    rounding.plain_affine,
)


@cache
def compiled() -> Kernels:
    """The searches for CPU tensors. numba is imported here, since that alone takes half a second."""
    from whet.quant import affine_cpu, rounding_cpu, symmetric_cpu

    return Kernels(
        affine_cpu.affine_search,
        affine_cpu.affine_levels,
        symmetric_cpu.symmetric_search,
        symmetric_cpu.symmetric_levels,
        rounding_cpu.plain_int8,
        rounding_cpu.plain_symmetric,
        rounding_cpu.plain_affine,
    )
