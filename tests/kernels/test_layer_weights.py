"""A layer's weights in one launch: what the separate kernels write, to the bit."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes.functional import quantize_4bit

from whet.kernels.layer_weights import (
    LayerWeights,
    ProjectionWeight,
    _reciprocal,
    layer_weights,
    layer_weights_reference,
    layer_weights_triton,
)
from whet.kernels.nf4 import NF4Weight

# rows and ranks of each projection's parts, its columns, its margin
LAYER = [
    ([(256, 3), (128, 4), (128, 1)], 128, 16),
    ([(130, 5)], 64, 8),
    ([(96, 0), (96, 2)], 192, 16),
    ([(64, 0)], 64, 0),
    ([(192, 2)], 8, 8),
]


def projection(parts: list[tuple[int, int]], columns: int, margin: int) -> ProjectionWeight:
    rows = sum(n for n, _ in parts)
    packed, state = quantize_4bit(torch.randn(rows, columns), quant_type="nf4", compress_statistics=True)
    weight = NF4Weight(
        packed.reshape(-1), state.absmax, state.code, rows, columns, torch.float32,
        state.state2.code, state.state2.absmax, state.offset,
    )  # fmt: skip
    downs, ups = [torch.randn(r, columns) for _, r in parts], [torch.randn(n, r) for n, r in parts]
    bias = torch.randn(rows) if margin > sum(r for _, r in parts) else None
    return ProjectionWeight(weight, downs, ups, [0.5 + i for i in range(len(parts))], margin, bias)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("which", [[0], [1], [3], [4], [0, 1, 2, 3], [4, 3, 2, 1, 0]])
def test_one_launch_writes_what_the_references_write(which: list[int], apart: bool) -> None:
    """Catches a program that works on another projection's table entry, and any byte not written.

    With [0] alone all programs are whole, otherwise not.
    """
    torch.manual_seed(0)
    layer = LayerWeights([projection(*LAYER[i]) for i in which], torch.float32, apart)
    expected, got = (torch.full((layer.size,), float("nan")) for _ in range(2))
    layer_weights_reference(layer, expected)
    layer_weights_triton(layer, got)
    pairs = list(zip(layer.views(expected), layer.views(got), strict=True))
    assert len(pairs) == len(which) * (2 if apart else 1)
    for i, (a, b) in enumerate(pairs):
        a, b = a.clone(), b.clone()
        if not apart:
            weight = layer.projections[i].weight
            a[weight.rows :, weight.columns :] = b[weight.rows :, weight.columns :] = 0  # the corner is nobody's
        torch.testing.assert_close(b, a, rtol=0, atol=0)


@pytest.mark.parametrize("which", [[0], [0, 1, 2, 3]])
def test_where_the_weights_are_ready_only_the_adapters_are_laid_out(which: list[int]) -> None:
    """Catches weights that are dequantized all the same, and adapters of the step before."""
    torch.manual_seed(0)
    projections = [projection(*LAYER[i]) for i in which]
    whole = LayerWeights(projections, torch.float32)
    out = torch.full((whole.size,), float("nan"))
    layer_weights_triton(whole, out)
    for p, e in zip(projections, whole.views(out), strict=True):
        e[: p.weight.rows, : p.weight.columns] += 1  # so that it shows when they are written again
        for x in (*p.downs, *p.ups):
            x.mul_(2)
    expected = out.clone()
    layer_weights_reference(LayerWeights(projections, torch.float32, ready=True), expected)
    layer_weights_triton(LayerWeights(projections, torch.float32, ready=True), out)
    for p, e, got in zip(projections, whole.views(expected), whole.views(out), strict=True):
        if p.margin:
            e[p.weight.rows :, p.weight.columns :] = got[p.weight.rows :, p.weight.columns :] = 0
        torch.testing.assert_close(got, e, rtol=0, atol=0)
    first = projections[0].weight
    again = layer_weights(whole)[0][: first.rows, : first.columns]
    torch.testing.assert_close(whole.views(out)[0][: first.rows, : first.columns], again + 1, rtol=0, atol=0)


def test_the_adapters_apart_are_those_beside_the_weights() -> None:
    torch.manual_seed(0)
    projections = [projection(*entry) for entry in LAYER]
    beside, apart = LayerWeights(projections, torch.float32), LayerWeights(projections, torch.float32, apart=True)
    whole, borders = layer_weights(beside), layer_weights(apart)
    for p, e, up, down in zip(projections, whole, borders[::2], borders[1::2], strict=True):
        assert torch.equal(e[: p.weight.rows, p.weight.columns :], up)
        assert torch.equal(e[p.weight.rows :, : p.weight.columns], down)


def test_a_moved_adapter_is_found() -> None:
    """Catches a table that still points at the memory an adapter had before."""
    layer = LayerWeights([projection(*LAYER[0])], torch.float32)
    out = torch.empty(layer.size)
    layer_weights_triton(layer, out)
    layer.projections[0].ups[1].data = torch.ones_like(layer.projections[0].ups[1])
    layer_weights_triton(layer, out)
    rows, columns = layer.projections[0].shape
    assert (out[: rows * columns].view(rows, columns)[256:384, 128 + 3 : 128 + 7] == 1.5).all()


@pytest.mark.parametrize("d", [1, 2, 3, 7, 512, 1792, 3584, 4099, 2**20 - 1, 2**20 + 1])
def test_division_by_a_reciprocal(d: int) -> None:
    """Catches a quotient one too large or too small at the ends of rows, and a factor beyond 32 bits."""
    m, s = _reciprocal(d)
    assert 0 < m < 2**32
    last = (2**31 - 1) // d
    for q in {0, 1, 2, last // 3, last // 2, last - 1, last}:
        for n in (q * d, min(q * d + d - 1, 2**31 - 1)):
            assert (2 * n * m >> 32) >> s == n // d
