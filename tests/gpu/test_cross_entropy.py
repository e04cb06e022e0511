"""Fused linear cross-entropy on a GPU, against the formula in fp64, beside plain torch in the same dtype."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from whet.kernels.cross_entropy import CHUNK_BYTES, LogProbs, linear_log_probs, linear_log_probs_weight_grad

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

# rows, vocabulary, width: odd ones, one row, more rows than a chunk, and the vocabularies of Llama 3, Qwen and Gemma
SHAPES = [
    (1, 1, 8),
    (3, 257, 64),
    (700, 50257, 128),
    (1100, 128256, 2048),
    (300, 151936, 512),
    (300, 262144, 256),
    (300, 262208, 256),
]
LOGITS = [{}, {"softcap": 30.0}, {"scale": 0.125}]


def inputs(N: int, V: int, D: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of a spread of about 4; a third of the labels are likely ones."""
    generator = torch.Generator("cuda").manual_seed(0)
    h = torch.randn(N, D, generator=generator, device="cuda").to(dtype)
    weight = torch.randn(V, D, generator=generator, device="cuda").mul_(4).div_(D**0.5).to(dtype)
    labels = torch.randint(0, V, (N,), generator=generator, device="cuda")
    labels[::3] = (h[::3].float() @ weight.float().T).argmax(-1)
    return h, weight, labels


def plain(
    h: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, softcap: float | None = None, scale: float = 1.0
) -> LogProbs:
    """The formula with whole logits: the product in the dtype of h, the rest in fp32, or all of it in fp64."""
    h = h.detach().requires_grad_()
    z = h @ weight.T
    z = (z if z.dtype == torch.float64 else z.float()) * scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    log_p = torch.log_softmax(z, -1)
    log_probs = log_p.gather(-1, labels[:, None])[:, 0]
    (dh,) = torch.autograd.grad(log_probs.sum(), h)
    entropy = torch.cat([-(part.exp() * part).sum(-1) for part in log_p.detach().split(128)])
    return LogProbs(log_probs.detach(), entropy, z.argmax(-1) == labels, dh)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("logits", LOGITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_no_further_from_fp64_than_plain_torch(
    shape: tuple[int, int, int], logits: dict[str, Any], dtype: torch.dtype
) -> None:
    """Catches statistics or gradients rounded once too often, wide loads past a row's end, rows of a wrong chunk."""
    h, weight, labels = inputs(*shape, dtype)
    part = slice(max(0, shape[0] - 300), None)  # the last rows of the last chunk; all logits in fp64 are too many
    found = linear_log_probs(h, weight, labels, **logits)
    exact = plain(h[part].double(), weight.double(), labels[part], **logits)
    usual = plain(h[part], weight, labels[part], **logits)
    for name in ("log_probs_N", "entropy_N", "dh_ND"):
        truth = getattr(exact, name)
        ours = (getattr(found, name)[part].double() - truth).norm()
        theirs = (getattr(usual, name).double() - truth).norm()
        assert ours <= 1.05 * theirs + 1e-6 * truth.norm() + 1e-7, f"{name}: {ours:.3g}, plain torch {theirs:.3g}"
    # Logits that round to the same number may come in another order from another GEMM.
    assert (found.is_top1_N[part] != usual.is_top1_N).float().mean() <= 0.02


def test_a_strided_input_and_the_gradient_in_its_place() -> None:
    """Catches a kernel or GEMM that takes rows to be contiguous."""
    h, weight, labels = inputs(900, 5003, 96, torch.bfloat16)
    expected = linear_log_probs(h, weight, labels)
    wide = torch.full((900, 160), torch.nan, device="cuda", dtype=torch.bfloat16)
    wide[:, :96] = h
    found = linear_log_probs(wide[:, :96], weight, labels, out=wide[:, :96])
    torch.testing.assert_close(found.log_probs_N, expected.log_probs_N)
    torch.testing.assert_close(wide[:, :96], expected.dh_ND)
    assert wide[:, 96:].isnan().all()


def test_no_rows_and_a_label_outside() -> None:
    h, weight, labels = inputs(4, 1000, 64, torch.bfloat16)
    assert linear_log_probs(h[:0], weight, labels[:0]).log_probs_N.shape == (0,)
    labels[1] = 1000
    assert linear_log_probs(h, weight, labels).log_probs_N.isnan().tolist() == [False, True, False, False]


def test_the_logits_are_never_whole_and_the_host_never_waits() -> None:
    """Catches a temporary of the logits' size, and a copy to the host in the middle of a step."""
    h, weight, labels = inputs(4096, 128256, 1024, torch.bfloat16)
    linear_log_probs(h[:128], weight, labels[:128])  # compiles
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_log_probs(h, weight, labels, chunk_bytes=128 << 20)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= (128 << 20) + h.numel() * 2 + (1 << 20)


# ---------------------------------------------------------------- a trained head

# odd numbers of rows and tokens, one row, and more tokens than a chunk
TRAINED = [(1, 1, 8), (3, 257, 64), (700, 50257, 128), (601, 128256, 512), (257, 128259, 256), (300, 262208, 256)]


def few_bits(*shape: int, std: float, seed: int) -> torch.Tensor:
    """Normal numbers rounded to 8 bits and a sign, which bf16 and fp16 hold: steps of a 16th of std to a 32nd.

    Sums of their products are exact in fp32, in any order: all GEMMs give the same logits, bit by bit.
    """
    step = 2.0 ** math.floor(math.log2(std / 16))
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(shape, generator=generator, device="cuda")
    return x.mul_(std / step).round_().clamp_(-256, 256).mul_(step)


def plain_trained(
    x: tuple[torch.Tensor, ...], bias: torch.Tensor | None, upstream: torch.Tensor, softcap: Any = None, scale: Any = 1
) -> tuple[torch.Tensor, ...]:
    """(dW, db) by autograd: the product in the dtype of h, the rest in fp32, or all of it in fp64."""
    h, weight, labels = x
    leaves = [leaf.detach().requires_grad_() for leaf in (weight, bias) if leaf is not None]
    z = torch.nn.functional.linear(h, *leaves)
    z = (z if z.dtype == torch.float64 else z.float()) * scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    log_probs = torch.log_softmax(z, -1).gather(-1, labels[:, None])[:, 0]
    return torch.autograd.grad((log_probs * upstream).sum(), leaves)


@pytest.fixture
def sums_in_fp32() -> Iterator[None]:
    """GEMMs that split a sum keep its parts in fp32. (monkeypatch can't put these settings back.)"""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction
    matmul.allow_bf16_reduced_precision_reduction = matmul.allow_fp16_reduced_precision_reduction = False
    yield
    matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction = before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("logits", LOGITS)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", TRAINED)
def test_the_trained_head_is_no_further_from_fp64_than_plain_torch(
    shape: tuple[int, int, int],
    with_bias: bool,
    logits: dict[str, Any],
    dtype: torch.dtype,
    sums_in_fp32: None,
) -> None:
    """Catches chunks of dW that are rounded twice or lost, labels of the wrong chunk, wide stores past a chunk's end.

    Every row has a weight of its own. Chunks of 8 MiB, several for all but the smallest shapes.
    Logits of a chunk and those that lse came from are products of two GEMMs. Were one large logit rounded up in the one
    and down in the other, its row's whole probability would be off, which alone can exceed what is allowed. So that
    only whet's own roundings are judged, values have few bits, and GEMMs that split their sums keep the parts in fp32.
    """
    N, V, D = shape
    h, weight = few_bits(N, D, std=1.0, seed=0).to(dtype), few_bits(V, D, std=4 / D**0.5, seed=1).to(dtype)
    generator = torch.Generator("cuda").manual_seed(2)
    upstream = torch.randn(N, generator=generator, device="cuda")
    labels = torch.randint(0, V, (N,), generator=generator, device="cuda")
    labels[::3] = (h[::3].float() @ weight.float().T).argmax(-1)
    bias = few_bits(V, std=1.0, seed=3).to(dtype) if with_bias else None
    x = h, weight, labels
    lse = linear_log_probs(*x, bias=bias, need_grad=False, need_lse=True, **logits).lse_N
    assert lse is not None
    found = linear_log_probs_weight_grad(
        *x, lse, upstream, bias=bias, need_bias=with_bias, chunk_bytes=8 << 20, **logits
    )
    wide = (h.double(), weight.double(), labels)
    exact = plain_trained(wide, None if bias is None else bias.double(), upstream.double(), **logits)
    usual = plain_trained(x, bias, upstream, **logits)
    # How large logits are rounded decides most of the error. cuBLASLt adds the bias in whole chunks, cuBLAS in the last
    # one, which need not round alike; were all of ours rounded twice, the error would be two to three times as large.
    slack = 1.5 if with_bias and "scale" not in logits else 1.05
    for name, truth, plains, ours in zip(("dW", "db"), exact, usual, found, strict=False):
        assert ours is not None
        assert ours.dtype == dtype
        # The last term is for fp32, where the kernels' exp and tanh are some last digits off.
        own, theirs = (ours.double() - truth).norm(), (plains.double() - truth).norm()
        assert own <= slack * theirs + 5e-6 * truth.norm() + 1e-6, f"{name}: {own:.3g}, plain torch {theirs:.3g}"


def test_a_trained_head_of_fp32_under_bf16() -> None:
    """Catches a whole copy of the weight in the backward pass, and a gradient in the dtype of h."""
    h, weight, labels = inputs(512, 50257, 256, torch.float32)
    low, upstream = h.bfloat16(), torch.full((512,), -1 / 512, device="cuda")
    lse = linear_log_probs(low, weight, labels, need_grad=False, need_lse=True).lse_N
    assert lse is not None
    exact = plain_trained((low.double(), weight.double(), labels), None, upstream.double())[0]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found, _ = linear_log_probs_weight_grad(low, weight, labels, lse, upstream, chunk_bytes=4 << 20)
    peak = torch.cuda.max_memory_allocated() - before
    assert found is not None
    assert found.dtype == torch.float32
    assert (found - exact).norm() <= 0.03 * exact.norm()
    assert peak <= found.numel() * 4 + (4 << 20) + (12 << 20)  # a copy of the weight in bf16: 25 MB


def test_the_trained_head_needs_its_gradient_and_a_chunk_and_the_host_never_waits() -> None:
    """Catches dW in fp32 beside the one in bf16, logits kept whole, and a copy to the host."""
    h, weight, labels = inputs(4096, 128256, 1024, torch.bfloat16)
    upstream = torch.full((), -1 / 4096, device="cuda").expand(4096)  # as the backward pass of a sum gives it
    lse = linear_log_probs(h, weight, labels, need_grad=False, need_lse=True).lse_N
    assert lse is not None
    linear_log_probs_weight_grad(h, weight, labels, lse, upstream)  # compiles
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        dweight, _ = linear_log_probs_weight_grad(h, weight, labels, lse, upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert dweight is not None
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= CHUNK_BYTES + dweight.numel() * 2 + (1 << 20)
