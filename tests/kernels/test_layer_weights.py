"""A layer's weights in one launch: what the separate kernels write, to the bit."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes.functional import quantize_4bit

from whet.kernels.layer_weights import LayerWeights, ProjectionWeight, layer_weights_reference, layer_weights_triton
from whet.kernels.nf4 import NF4Weight

# rows and ranks of each projection's parts, its columns, its margin
LAYER = [
    ([(256, 3), (128, 4), (128, 1)], 128, 16),
    ([(130, 5)], 64, 8),
    ([(96, 0), (96, 2)], 192, 16),
    ([(64, 0)], 64, 0),
]


def projection(parts: list[tuple[int, int]], columns: int, margin: int) -> ProjectionWeight:
    rows = sum(n for n, _ in parts)
    packed, state = quantize_4bit(torch.randn(rows, columns), quant_type="nf4", compress_statistics=True)
    weight = NF4Weight(
        packed.reshape(-1), state.absmax, state.code, rows, columns, torch.float32,
        state.state2.code, state.state2.absmax, state.offset,
    )  # fmt: skip
    downs, ups = [torch.randn(r, columns) for _, r in parts], [torch.randn(n, r) for n, r in parts]
    return ProjectionWeight(weight, downs, ups, [0.5 + i for i in range(len(parts))], margin)


@pytest.mark.parametrize("which", [[0], [1], [3], [0, 1, 2, 3], [3, 2, 1, 0]])
def test_one_launch_writes_what_the_references_write(which: list[int]) -> None:
    """Catches a program that works on another projection's table entry, and any byte not written."""
    torch.manual_seed(0)
    layer = LayerWeights([projection(*LAYER[i]) for i in which])
    expected, got = (torch.full((layer.places[-1],), float("nan")) for _ in range(2))
    layer_weights_reference(layer, expected)
    layer_weights_triton(layer, got)
    for p, place in zip(layer.projections, layer.places, strict=False):
        rows, columns = p.shape
        a, b = (x[place : place + rows * columns].view(rows, columns) for x in (expected, got))
        a, b = a.clone(), b.clone()
        for x in (a, b):
            x[p.weight.rows :, p.weight.columns :] = 0  # the corner is nobody's
        torch.testing.assert_close(b, a, rtol=0, atol=0)


def test_a_moved_adapter_is_found() -> None:
    """Catches a table that still points at the memory an adapter had before."""
    layer = LayerWeights([projection(*LAYER[0])])
    out = torch.empty(layer.places[-1])
    layer_weights_triton(layer, out)
    layer.projections[0].ups[1].data = torch.ones_like(layer.projections[0].ups[1])
    layer_weights_triton(layer, out)
    rows, columns = layer.projections[0].shape
    assert (out[: rows * columns].view(rows, columns)[256:384, 128 + 3 : 128 + 7] == 1.5).all()
