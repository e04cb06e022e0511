"""Log-probabilities of labels under an output head, with their gradient, the logits never whole in memory.

    z = scale * (h W^T + b),   with a soft cap c:  z = c * tanh(scale * (h W^T + b) / c)
    log_prob = z[label] - logsumexp(z)
    entropy = logsumexp(z) - sum_v p_v z_v,   p = softmax(z)
    dh = d log_prob / d h = scale * ((1 - (z / c)^2) * (onehot(label) - p)) W    (without a soft cap, no middle factor)

    dW = sum_i g_i * scale * ((1 - (z_i / c)^2) * (onehot(label_i) - p_i)) h_i^T    (db: the same without h)

g_i is the loss's gradient for log_prob_i.
Rows are independent: the loss's gradient for h_i is g_i * dh_i, so one pass gives both.
Rows go in chunks. A chunk's logits are a GEMM in the dtype of h; one kernel reads them for the statistics and again to
overwrite them with the gradient (2 reads and 1 write of the logits in all); a second GEMM makes that rows of dh.

dW sums over rows, each with a weight g_i that only the backward pass knows (dft weighs rows by their probability), so
it cannot be made in that pass. `linear_log_probs_weight_grad` makes the logits once more, from lse: with it no
sum over the vocabulary is left, so that the chunks may be of the vocabulary, each with all rows. A chunk's rows of dW
are then one GEMM over all rows, rounded once. Chunks of rows would need dW in fp32 beside the one in 16 bits (1 GB at
V=128256, D=2048), read and written for every chunk, which takes longer than the third product that they would save.

All but the GEMMs in fp32 (in fp64 for fp64 inputs). Source: the online softmax of Milakov & Gimelshein 2018,
arXiv:1805.02867; entropy from the sums of exp(z - m) and of exp(z - m) (z - m), both kept at the running maximum m.
Shapes: h [N, D], W [V, D], b [V], labels [N]; N rows that have a label, D model width, V vocabulary.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from typing import NamedTuple

import torch

from whet.kernels._precision import wide_dtype
from whet.kernels._triton import fused, jit, tl, triton
from whet.kernels.cublaslt import multiply

CHUNK_BYTES = 256 << 20  # 1,024 rows of 128,256: 128 tiles for the product with W, one for nearly each core of an H100
ROWS = 128  # chunks are multiples of it, which GEMM tiles divide
LEAST_ROWS = 256  # with fewer rows a chunk's GEMMs wait for W from memory
LEAST_COLUMNS = 1024  # of dW's chunks: with fewer they wait for h, and dW's GEMM has too few tiles for all cores
WIDTH = 8  # columns of a thread in a block: one load of 16 bytes
ALIGNED = (
    64  # elements; the width of the logits buffer is a multiple of it, so that every row can be read in wide loads
)


class LogProbs(NamedTuple):
    """What `linear_log_probs` gives for each row: fp32, bool where it says so; dh in the dtype of h."""

    log_probs_N: torch.Tensor
    entropy_N: torch.Tensor
    is_top1_N: torch.Tensor  # bool: the label is the first of the largest logits, as argmax counts
    dh_ND: torch.Tensor | None  # gradient of log_probs_N[i] with respect to h_ND[i]
    lse_N: torch.Tensor | None = None  # logsumexp(z)


# ---------------------------------------------------------------- one chunk of logits


def log_probs_of_logits_reference(
    logits_NV: torch.Tensor,
    labels_N: torch.Tensor,
    out: LogProbs,
    *,
    softcap: float | None = None,
    scale: float = 1.0,
    need_grad: bool = True,
) -> None:
    """Write the statistics of a chunk into `out`; overwrite its logits with d log_prob / d logits where `need_grad`."""
    z_NV = logits_NV.to(wide_dtype(logits_NV.dtype))
    if scale != 1.0:
        z_NV = z_NV * scale
    if softcap is not None:
        t_NV = torch.tanh(z_NV / softcap)
        z_NV = t_NV * softcap
    top_N = z_NV.argmax(-1)
    out.is_top1_N.copy_(top_N == labels_N)
    log_p_NV = torch.log_softmax(z_NV, -1)
    if out.lse_N is not None:
        out.lse_N.copy_((z_NV.gather(-1, top_N[:, None]) - log_p_NV.gather(-1, top_N[:, None]))[:, 0])
    out.log_probs_N.copy_(log_p_NV.gather(-1, labels_N[:, None])[:, 0])
    p_NV = log_p_NV.exp()
    out.entropy_N.copy_(log_p_NV.mul_(p_NV).sum(-1).neg_())
    if not need_grad:
        return
    d_NV = p_NV.neg_()
    d_NV.scatter_add_(-1, labels_N[:, None], torch.ones_like(labels_N[:, None], dtype=d_NV.dtype))
    if softcap is not None:
        d_NV.mul_(1 - t_NV * t_NV)
    logits_NV.copy_(d_NV.mul_(scale) if scale != 1.0 else d_NV)


@jit
def _tanh_parts(x):
    """tanh(x) and 1 - tanh(x)^2, the second without cancellation."""
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t), 4.0 * e / ((1.0 + e) * (1.0 + e))


@jit
def _logits(words, scale, softcap, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """z of what the product gave, and its derivative with respect to that."""
    z = words.to(tl.float32)
    derivative = 1.0
    if HAS_SCALE:
        z = z * scale
        derivative = scale
    if HAS_SOFTCAP:
        t, slope = _tanh_parts(z / softcap)
        z = t * softcap
        derivative = slope * derivative
    return z, derivative


@jit
def _fold(z, z_max_L, m_L, s_L, zs_L, LOG2_E: tl.constexpr):
    """Add a block [L, W] to L lanes' sums: m is the largest z / ln 2, s and zs sum 2^d and 2^d d, d = z / ln 2 - m.

    d is one multiplication and sum, rounded once. m is kept as it was rounded, so that a lane whose m stays is rescaled
    by 1: m_old / ln 2 - m_new in one operation is the product's rounding error, which for -1e30 overflows 2^.
    """
    highest_L = tl.max(z, axis=1)
    new_m_L = tl.maximum(m_L, highest_L * LOG2_E)
    d = z * LOG2_E - new_m_L[:, None]
    e = tl.exp2(d)
    shift_L = m_L - new_m_L
    rescale_L = tl.exp2(shift_L)
    zs_L = (zs_L + s_L * shift_L) * rescale_L + tl.sum(e * d, axis=1)
    return tl.maximum(z_max_L, highest_L), new_m_L, s_L * rescale_L + tl.sum(e, axis=1), zs_L


@jit
def _log_probs_kernel(
    logits_ptr,
    labels_ptr,
    log_prob_ptr,
    entropy_ptr,
    top1_ptr,
    lse_ptr,
    row_stride,
    V,
    scale,
    softcap,
    HAS_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    STORE_LSE: tl.constexpr,
    NEED_GRAD: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    # One program a row. Loads and stores are masked by the row stride, which is divisible by 64, not by V: an odd V
    # would forbid wide ones. Columns from V to the stride belong to the buffer and count for nothing.
    BLOCK: tl.constexpr = LANES * WIDTH
    LOG2_E: tl.constexpr = 1.4426950408889634
    LN_2: tl.constexpr = 0.6931471805599453
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * row_stride
    label = tl.load(labels_ptr + row)
    in_range = (label >= 0) & (label < V)
    label = tl.where(in_range, label, 0).to(tl.int32)
    word = tl.load(row_ptr + label)
    z_label, derivative_label = _logits(word, scale, softcap, HAS_SCALE, HAS_SOFTCAP)
    z_label = tl.where(in_range, z_label, float("nan"))
    columns = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]

    # A lane is a thread's WIDTH columns of each block, with a maximum of its own: one of the block would have all warps
    # wait for each other. It starts finite, so that the first rescale is 2^-large = 0 and not 2^(-inf + inf), and above
    # the -1e30 / ln 2 of columns that are not there, so that in a lane without others those count for nothing. Whole
    # blocks before the label's come first: where their largest is no less than the label's, this is not the first of
    # the largest. In each loop the next block is on its way while this one is reduced.
    z_max_L = tl.full((LANES,), -1e30, tl.float32)
    m_L = tl.full((LANES,), -1e30, tl.float32)
    s_L = tl.zeros((LANES,), tl.float32)
    zs_L = tl.zeros((LANES,), tl.float32)
    whole = V // BLOCK * BLOCK
    middle = label // BLOCK * BLOCK
    ahead = tl.load(row_ptr + columns, mask=columns < row_stride, other=0.0)
    for start in range(0, middle, BLOCK):
        z, _derivative = _logits(ahead, scale, softcap, HAS_SCALE, HAS_SOFTCAP)
        ahead = tl.load(row_ptr + start + BLOCK + columns, mask=start + BLOCK + columns < row_stride, other=0.0)
        z_max_L, m_L, s_L, zs_L = _fold(z, z_max_L, m_L, s_L, zs_L, LOG2_E)
    z, _derivative = _logits(ahead, scale, softcap, HAS_SCALE, HAS_SOFTCAP)
    ahead = tl.load(row_ptr + middle + BLOCK + columns, mask=middle + BLOCK + columns < row_stride, other=0.0)
    tied = (z == z_label) & (middle + columns < label)
    beaten = (tl.max(z_max_L, axis=0) >= z_label) | (tl.max(tl.max(tied.to(tl.int32), axis=1), axis=0) > 0)
    z = tl.where(middle + columns < V, z, -1e30)
    z_max_L, m_L, s_L, zs_L = _fold(z, z_max_L, m_L, s_L, zs_L, LOG2_E)
    for start in range(middle + BLOCK, whole, BLOCK):
        z, _derivative = _logits(ahead, scale, softcap, HAS_SCALE, HAS_SOFTCAP)
        ahead = tl.load(row_ptr + start + BLOCK + columns, mask=start + BLOCK + columns < row_stride, other=0.0)
        z_max_L, m_L, s_L, zs_L = _fold(z, z_max_L, m_L, s_L, zs_L, LOG2_E)
    if (whole > middle) & (whole < V):
        z, _derivative = _logits(ahead, scale, softcap, HAS_SCALE, HAS_SOFTCAP)
        z = tl.where(whole + columns < V, z, -1e30)
        z_max_L, m_L, s_L, zs_L = _fold(z, z_max_L, m_L, s_L, zs_L, LOG2_E)
    m = tl.max(m_L, axis=0)
    shift_L = m_L - m
    rescale_L = tl.exp2(shift_L)
    zs = tl.sum((zs_L + s_L * shift_L) * rescale_L, axis=0)
    s = tl.sum(s_L * rescale_L, axis=0)
    inverse_s = 1.0 / s
    d_label = z_label * LOG2_E - m
    log_prob = (d_label - tl.log2(s)) * LN_2
    tl.store(log_prob_ptr + row, log_prob)
    tl.store(entropy_ptr + row, (tl.log2(s) - zs / s) * LN_2)
    if STORE_LSE:
        tl.store(lse_ptr + row, (m + tl.log2(s)) * LN_2)
    tl.store(top1_ptr + row, (tl.max(z_max_L, axis=0) <= z_label) & (beaten == 0) & (log_prob == log_prob))

    if NEED_GRAD:
        # From the end to the start: the last blocks of the row are still in cache. The label's own one comes last. All
        # blocks but the last are whole.
        negative = -inverse_s
        start = (tl.cdiv(V, BLOCK) - 1) * BLOCK
        word = tl.load(row_ptr + start + columns, mask=start + columns < row_stride, other=0.0)
        before = tl.maximum(start - BLOCK, 0)
        ahead = tl.load(row_ptr + before + columns, mask=before + columns < row_stride, other=0.0)
        z, derivative = _logits(word, scale, softcap, HAS_SCALE, HAS_SOFTCAP)
        grad = tl.where(start + columns < V, tl.exp2(z * LOG2_E - m) * negative * derivative, 0.0)
        kept = start + columns < row_stride
        tl.store(row_ptr + start + columns, grad.to(logits_ptr.dtype.element_ty), mask=kept)
        for i in range(0, start, BLOCK):
            z, derivative = _logits(ahead, scale, softcap, HAS_SCALE, HAS_SOFTCAP)
            here = start - BLOCK - i
            ahead = tl.load(row_ptr + tl.maximum(here - BLOCK, 0) + columns)
            grad = tl.exp2(z * LOG2_E - m) * negative * derivative
            # .cs: nobody reads it before long; the logits that are still to be read may stay in cache instead
            tl.store(row_ptr + here + columns, grad.to(logits_ptr.dtype.element_ty), cache_modifier=".cs")
        grad = (1.0 - tl.exp2(d_label) * inverse_s) * derivative_label
        tl.debug_barrier()
        tl.store(row_ptr + label, grad.to(logits_ptr.dtype.element_ty), mask=in_range)


def log_probs_of_logits_triton(
    logits_NV: torch.Tensor,
    labels_N: torch.Tensor,
    out: LogProbs,
    *,
    softcap: float | None = None,
    scale: float = 1.0,
    need_grad: bool = True,
) -> None:
    """As `log_probs_of_logits_reference`. Columns of a row past V, up to its stride, are overwritten too."""
    N, V = logits_NV.shape
    if N == 0:
        return
    lanes = min(1024, max(32, triton.next_power_of_2(V) // WIDTH))
    _log_probs_kernel[(N,)](
        logits_NV,
        labels_N,
        out.log_probs_N,
        out.entropy_N,
        out.is_top1_N,
        out.lse_N,
        logits_NV.stride(0),
        V,
        float(scale),
        float(softcap or 1.0),
        HAS_SCALE=scale != 1.0,
        HAS_SOFTCAP=softcap is not None,
        STORE_LSE=out.lse_N is not None,
        NEED_GRAD=need_grad,
        LANES=lanes,
        WIDTH=WIDTH,
        num_warps=lanes // 32,
    )


# ---------------------------------------------------------------- the logits of some tokens, all rows


def logits_gradient_reference(
    logits_NC: torch.Tensor,
    labels_N: torch.Tensor,
    lse_N: torch.Tensor,
    upstream_N: torch.Tensor,
    first: int,
    *,
    softcap: float | None = None,
    scale: float = 1.0,
) -> None:
    """Overwrite the logits of the tokens from `first` on with upstream_i * d log_prob_i / d logits."""
    z_NC = logits_NC.to(wide_dtype(logits_NC.dtype))
    if scale != 1.0:
        z_NC = z_NC * scale
    if softcap is not None:
        t_NC = torch.tanh(z_NC / softcap)
        z_NC = t_NC * softcap
    tokens_C = torch.arange(first, first + logits_NC.shape[1], device=labels_N.device)
    d_NC = (labels_N[:, None] == tokens_C).to(z_NC.dtype) - (z_NC - lse_N[:, None]).exp()
    if softcap is not None:
        d_NC.mul_(1 - t_NC * t_NC)
    logits_NC.copy_(d_NC.mul_((upstream_N * scale)[:, None]))


@jit
def _logits_gradient_kernel(
    logits_ptr, labels_ptr, lse_ptr, upstream_ptr, row_stride, first, scale, softcap,
    HAS_SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK columns of one row. Masked by the row stride, not by the width, as above."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < row_stride
    label = tl.load(labels_ptr + row) - first
    lse = tl.load(lse_ptr + row)
    factor = tl.load(upstream_ptr + row) * scale
    row_ptr = logits_ptr + row * row_stride
    u = tl.load(row_ptr + columns, mask=mask, other=0.0).to(tl.float32) * scale
    onehot = tl.where(columns == label, 1.0, 0.0)
    if HAS_SOFTCAP:
        t, slope = _tanh_parts(u / softcap)
        grad = (onehot - tl.exp2((t * softcap - lse) * 1.4426950408889634)) * slope * factor
    else:
        grad = (onehot - tl.exp2((u - lse) * 1.4426950408889634)) * factor
    tl.store(row_ptr + columns, grad.to(logits_ptr.dtype.element_ty), mask=mask)


def logits_gradient_triton(
    logits_NC: torch.Tensor,
    labels_N: torch.Tensor,
    lse_N: torch.Tensor,
    upstream_N: torch.Tensor,
    first: int,
    *,
    softcap: float | None = None,
    scale: float = 1.0,
) -> None:
    """As `logits_gradient_reference`. Columns of a row past C, up to its stride, may be overwritten too."""
    N, C = logits_NC.shape
    if N == 0:
        return
    block = min(4096, max(128, triton.next_power_of_2(C)))
    _logits_gradient_kernel[(N, triton.cdiv(C, block))](
        logits_NC,
        labels_N,
        lse_N,
        upstream_N,
        logits_NC.stride(0),
        first,
        float(scale),
        float(softcap or 1.0),
        HAS_SOFTCAP=softcap is not None,
        BLOCK=block,
        num_warps=max(4, block // 512),
    )


# ---------------------------------------------------------------- all of it


def chunk_rows(rows: int, row_bytes: int, chunk_bytes: int, least: int = LEAST_ROWS) -> int:
    """Rows of a chunk: equal chunks, but for the last, of as many rows as `chunk_bytes` holds."""
    most = max(least, chunk_bytes // max(1, row_bytes) // ROWS * ROWS)
    chunks = max(1, -(-rows // most))
    return max(ROWS, -(-rows // (chunks * ROWS)) * ROWS)


def linear_log_probs(
    h_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_N: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    need_grad: bool = True,
    need_lse: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
    out: torch.Tensor | None = None,
) -> LogProbs:
    """Log-probability, entropy and rank of each row's label, and the gradient of the first with respect to h.

    labels_N: int64 in [0, V). A label outside gives NaN on a GPU and an error on a CPU.
    need_lse: give lse_N too, for `linear_log_probs_weight_grad`.
    chunk_bytes: size of the logits buffer, unless 256 rows need more.
    out: takes dh; may be `h_ND` itself. Not used, and dh_ND is None, without `need_grad`.
    A weight in another dtype than h is cast whole. Autograd sees nothing of this.
    """
    N, V = h_ND.shape[0], weight_VD.shape[0]
    fold = log_probs_of_logits_triton if fused(h_ND) else log_probs_of_logits_reference
    with torch.no_grad(), torch.autocast(h_ND.device.type, enabled=False):
        weight_VD = weight_VD.to(h_ND.dtype)
        labels_N = labels_N.contiguous()
        wide = wide_dtype(h_ND.dtype)
        lse_N = h_ND.new_empty(N, dtype=wide) if need_lse else None
        result = LogProbs(
            h_ND.new_empty(N, dtype=wide),
            h_ND.new_empty(N, dtype=wide),
            h_ND.new_empty(N, dtype=torch.bool),
            (torch.empty_like(h_ND) if out is None else out) if need_grad else None,
            lse_N,
        )
        stride = -(-V // ALIGNED) * ALIGNED
        rows = chunk_rows(N, stride * h_ND.element_size(), chunk_bytes)
        buffer = h_ND.new_empty(rows, stride)
        if not fused(h_ND):
            # oneDNN's product in bf16 on AMX reads on to the row's stride, and times zero is no help against NaN there
            buffer[:, V:] = 0
        for i in range(0, N, rows):
            part = slice(i, min(i + rows, N))
            logits_nV = buffer[: part.stop - i, :V]
            if bias is None:
                multiply(h_ND[part], weight_VD.T, logits_nV)
            else:
                torch.addmm(bias.to(h_ND.dtype), h_ND[part], weight_VD.T, out=logits_nV)
            statistics = LogProbs(
                result.log_probs_N[part],
                result.entropy_N[part],
                result.is_top1_N[part],
                None,
                None if lse_N is None else lse_N[part],
            )
            fold(logits_nV, labels_N[part], statistics, softcap=softcap, scale=scale, need_grad=need_grad)
            if result.dh_ND is not None:
                multiply(logits_nV, weight_VD, result.dh_ND[part])
    return result


def linear_log_probs_weight_grad(
    h_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_N: torch.Tensor,
    lse_N: torch.Tensor,
    upstream_N: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    need_weight: bool = True,
    need_bias: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
    add_to: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(dW, db) of a loss whose gradient for log_probs_N is `upstream_N`, in the dtypes of weight and bias.

    Arguments as `linear_log_probs` took them, and the lse_N that it gave. Two products with the vocabulary.
    add_to [V, D], in the dtype of h: dW is added to it, and is what comes back.
    chunk_bytes: size of the logits buffer, unless 1024 tokens need more. Autograd sees nothing of this.
    """
    N, V = h_ND.shape[0], weight_VD.shape[0]
    differentiate = logits_gradient_triton if fused(h_ND) else logits_gradient_reference
    with torch.no_grad(), torch.autocast(h_ND.device.type, enabled=False):
        dtype = h_ND.dtype
        labels_N = labels_N.contiguous()
        upstream_N = upstream_N.to(wide_dtype(dtype)).contiguous()
        dweight_VD = add_to
        if need_weight and add_to is None:
            dweight_VD = torch.empty_like(weight_VD, memory_format=torch.contiguous_format)
        dbias_V = torch.empty_like(bias) if need_bias and bias is not None else None
        columns = chunk_rows(V, N * h_ND.element_size(), chunk_bytes, LEAST_COLUMNS)
        buffer = h_ND.new_empty(N, columns)
        for first in range(0, V, columns):
            part = slice(first, min(first + columns, V))
            logits_NC = buffer[:, : part.stop - first]
            weight_CD = weight_VD[part].to(dtype)
            if bias is None:
                torch.mm(h_ND, weight_CD.T, out=logits_NC)
            else:
                torch.addmm(bias[part].to(dtype), h_ND, weight_CD.T, out=logits_NC)
            differentiate(logits_NC, labels_N, lse_N, upstream_N, first, softcap=softcap, scale=scale)
            if dbias_V is not None:
                dbias_V[part] = logits_NC.sum(0, dtype=upstream_N.dtype)
            if dweight_VD is None:
                continue
            if add_to is not None:
                add_to[part].addmm_(logits_NC.T, h_ND)
            elif dweight_VD.dtype == dtype:
                torch.mm(logits_NC.T, h_ND, out=dweight_VD[part])
            else:  # rounded as under autocast
                dweight_VD[part] = logits_NC.T @ h_ND
    return dweight_VD, dbias_V
