"""The weight with its adapters beside it: the products it stands for, and the kernel that lays it out."""

from __future__ import annotations

import pytest
import torch

from whet.kernels.extend import extend, lay_out, lay_out_reference, lay_out_triton

PARTS = [((5, 3),), ((7, 2), (9, 4), (4, 1)), ((70, 16), (33, 8)), ((3, 0), (6, 4))]


def case(parts: tuple[tuple[int, int], ...], columns: int, width: int) -> tuple:
    generator = torch.Generator().manual_seed(0)
    rows = sum(n for n, _ in parts)
    downs = [torch.randn(r, columns, generator=generator) for _, r in parts]
    ups = [torch.randn(n, r, generator=generator) for n, r in parts]
    scales = [0.5 + j for j in range(len(parts))]
    return rows, downs, ups, scales, torch.full((rows + width, columns + width), float("nan"))


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("bias", [False, True])
def test_one_product_gives_weight_adapters_and_bias(parts: tuple, bias: bool) -> None:
    """Catches a B off its block diagonal, a lost scale, padding that is not zero, a bias in the wrong column."""
    rows, downs, ups, scales, e = case(parts, columns=11, width=32)
    draw = torch.Generator().manual_seed(1)
    w, b, x, g = (torch.randn(shape, generator=draw) for shape in ((rows, 11), (rows,), (6, 11), (6, rows)))
    e[:rows, :11] = w
    extend(e, downs, ups, scales, rows, 11, b if bias else None)
    delta = torch.block_diag(*[u * s for u, s in zip(ups, scales, strict=True)]) @ torch.cat(downs)
    tail = x @ e[rows:, :11].T
    if bias:
        tail[:, sum(d.shape[0] for d in downs)] = 1
    forward = torch.cat([x, tail], 1) @ e[:rows].T
    torch.testing.assert_close(forward, x @ (w + delta).T + (b if bias else 0), rtol=1e-5, atol=1e-4)
    backward = torch.cat([g, g @ e[:rows, 11:]], 1) @ e[:, :11]
    torch.testing.assert_close(backward, g @ (w + delta), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("columns", [11, 300])
def test_the_kernel_lays_out_what_the_reference_does(parts: tuple, columns: int) -> None:
    """Catches a wrong mask at a part's edge, and writes outside of the two borders."""
    rows, downs, ups, scales, expected = case(parts, columns, width=32)
    got = expected.clone()
    for e, lay in ((expected, lay_out_reference), (got, lay_out_triton)):
        lay(e[rows:, :columns], e[:rows, columns:], downs, ups, scales)
    torch.testing.assert_close(got, expected, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("bias", [False, True])
def test_the_borders_alone_are_those_beside_a_weight(parts: tuple, bias: bool) -> None:
    """Catches borders that differ when the weight is held apart from them."""
    rows, downs, ups, scales, e = case(parts, columns=11, width=32)
    b = torch.randn(rows, generator=torch.Generator().manual_seed(1)) if bias else None
    extend(e, downs, ups, scales, rows, 11, b)
    down, up = torch.full((32, 11), float("nan")), torch.full((rows, 32), float("nan"))
    lay_out(down, up, downs, ups, scales, b)
    assert torch.equal(down, e[rows:, :11])
    assert torch.equal(up, e[:rows, 11:])
