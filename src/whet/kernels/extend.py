"""A weight with its LoRA adapters beside it, so that one matrix product applies both.

    E = | W    s B |      [x | x A^T] E[:N]^T  = x W^T + s (x A^T) B^T        forward
        | A     .  |      [g | s g B] E[:, :K] = g W   + s (g B) A            gradient of the input

W is a stack of linear layers that read one input; their A lie under each other, their B on a block diagonal. A bias
takes the column after B's, against a one in the input's. The corner is never read and never written.
Source: the adapters are Hu et al. 2021, arXiv:2106.09685.
Shapes: W [N, K]; A_j [r_j, K]; B_j [n_j, r_j]; E [N + R, K + R], R >= sum of r_j, and one more where there is a bias.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from whet.kernels._triton import HAVE_TRITON, jit, tl

MOST_PARTS = 3  # q, k and v
BLOCK_N, BLOCK_K = 64, 128


def lay_out_reference(
    down_RK: Tensor, up_NR: Tensor, downs: Sequence[Tensor], ups: Sequence[Tensor], scales: Sequence[float]
) -> None:
    down_RK.zero_()
    up_NR.zero_()
    row, column = 0, 0
    for down, up, scale in zip(downs, ups, scales, strict=True):
        ranks = slice(column, column + down.shape[0])
        down_RK[ranks] = down
        up_NR[row : row + up.shape[0], ranks] = up * scale
        row, column = row + up.shape[0], ranks.stop


@jit
def _lay_out_kernel(
    down, up, down_stride, up_stride, rows, columns, a0, a1, a2, b0, b1, b2, n0, n1, n2, r0, r1, r2, s0, s1, s2,
    R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    right = tl.cdiv(rows, BLOCK_N)
    c = tl.arange(0, R)
    if program < right:  # s B
        i = program * BLOCK_N + tl.arange(0, BLOCK_N)
        row, column = i[:, None], c[None, :]
        m0 = (row < n0) & (column < r0)
        m1 = (row >= n0) & (row < n0 + n1) & (column >= r0) & (column < r0 + r1)
        m2 = (row >= n0 + n1) & (row < n0 + n1 + n2) & (column >= r0 + r1) & (column < r0 + r1 + r2)
        x = tl.load(b0 + row * r0 + column, mask=m0, other=0.0).to(tl.float32) * s0
        x += tl.load(b1 + (row - n0) * r1 + (column - r0), mask=m1, other=0.0).to(tl.float32) * s1
        x += tl.load(b2 + (row - n0 - n1) * r2 + (column - r0 - r1), mask=m2, other=0.0).to(tl.float32) * s2
        tl.store(up + row * up_stride + column, x.to(up.dtype.element_ty), mask=row < rows)
    else:  # A
        k = ((program - right) * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
        j = c[:, None]
        inside = k < columns
        y = tl.load(a0 + j * columns + k, mask=inside & (j < r0), other=0.0).to(tl.float32)
        y += tl.load(a1 + (j - r0) * columns + k, mask=inside & (j >= r0) & (j < r0 + r1), other=0.0).to(tl.float32)
        m = inside & (j >= r0 + r1) & (j < r0 + r1 + r2)
        y += tl.load(a2 + (j - r0 - r1) * columns + k, mask=m, other=0.0).to(tl.float32)
        tl.store(down + j.to(tl.int64) * down_stride + k, y.to(down.dtype.element_ty), mask=inside)


def lay_out_triton(
    down_RK: Tensor, up_NR: Tensor, downs: Sequence[Tensor], ups: Sequence[Tensor], scales: Sequence[float]
) -> None:
    """In one launch. R must be a power of two here."""
    missing = MOST_PARTS - len(downs)
    a, b = [*downs, *[down_RK] * missing], [*ups, *[up_NR] * missing]
    n, r = [*(x.shape[0] for x in ups), *[0] * missing], [*(x.shape[0] for x in downs), *[0] * missing]
    rows, columns, width = up_NR.shape[0], down_RK.shape[1], up_NR.shape[1]
    programs = -(-rows // BLOCK_N) + -(-columns // BLOCK_K)
    _lay_out_kernel[(programs,)](
        down_RK, up_NR, down_RK.stride(0), up_NR.stride(0), rows, columns,
        *a, *b, *n, *r, *scales, *[0.0] * missing,
        R=width, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, num_warps=4,
    )  # fmt: skip


def lay_out(
    down_RK: Tensor,
    up_NR: Tensor,
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    scales: Sequence[float],
    bias: Tensor | None = None,
) -> None:
    """The borders of E: A into `down_RK`; s B, block by block, into `up_NR`; zeros around them.

    downs, ups: A_j and B_j of each stacked layer from the top, contiguous, all of them or (rank 0) none.
    bias [N]: of all stacked layers; written as column sum(r_j) of `up_NR`.
    """
    width = up_NR.shape[1]
    fast = down_RK.is_cuda and HAVE_TRITON and width & (width - 1) == 0 and len(downs) <= MOST_PARTS
    (lay_out_triton if fast else lay_out_reference)(down_RK, up_NR, downs, ups, scales)
    if bias is not None:
        up_NR[:, sum(down.shape[0] for down in downs)] = bias


def extend(
    extended: Tensor,
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    scales: Sequence[float],
    rows: int,
    columns: int,
    bias: Tensor | None = None,
) -> None:
    """`lay_out` beside the weight that fills extended[:rows, :columns]."""
    lay_out(extended[rows:, :columns], extended[:rows, columns:], downs, ups, scales, bias)
