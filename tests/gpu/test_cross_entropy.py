"""Fused linear cross-entropy on a GPU, against the formula in fp64, beside plain torch in the same dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from whet.kernels.cross_entropy import LogProbs, linear_log_probs, linear_log_probs_weight_grad

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

# rows, vocabulary, width: odd ones, one row, more rows than a chunk, and those of Llama 3 8B, Qwen and Gemma
SHAPES = [
    (1, 1, 8),
    (3, 257, 64),
    (700, 50257, 128),
    (1100, 128256, 4096),
    (300, 151936, 512),
    (300, 262144, 256),
    (300, 262208, 256),
]
LOGITS = [{}, {"softcap": 30.0}, {"scale": 0.125}]


def inputs(N: int, V: int, D: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of a spread of about 4; a third of the labels are likely ones."""
    generator = torch.Generator("cuda").manual_seed(0)
    h = torch.randn(N, D, generator=generator, device="cuda").to(dtype)
    weight = (torch.randn(V, D, generator=generator, device="cuda") * 4 / D**0.5).to(dtype)
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
TRAINED = [(1, 1, 8), (3, 257, 64), (700, 50257, 128), (1101, 128256, 2048), (257, 128259, 512), (300, 262208, 256)]


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("logits", LOGITS)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", TRAINED)
def test_the_trained_head_is_no_further_from_fp64_than_plain_torch(
    shape: tuple[int, int, int], with_bias: bool, logits: dict[str, Any], dtype: torch.dtype
) -> None:
    """Catches chunks of dW that are rounded twice or lost, labels of the wrong chunk, wide stores past a chunk's end.

    Every row has a weight of its own. Chunks of 8 MiB, several for all but the smallest shapes.
    """
    h, weight, labels = x = inputs(*shape, dtype)
    generator = torch.Generator("cuda").manual_seed(1)
    upstream = torch.randn(len(h), generator=generator, device="cuda")
    bias = torch.randn(len(weight), generator=generator, device="cuda").to(dtype) if with_bias else None
    lse = linear_log_probs(*x, bias=bias, need_grad=False, need_lse=True, **logits).lse_N
    assert lse is not None
    found = linear_log_probs_weight_grad(
        *x, lse, upstream, bias=bias, need_bias=with_bias, chunk_bytes=8 << 20, **logits
    )
    wide = (h.double(), weight.double(), labels)
    exact = plain_trained(wide, None if bias is None else bias.double(), upstream.double(), **logits)
    usual = plain_trained(x, bias, upstream, **logits)
    for name, truth, plains, ours in zip(("dW", "db"), exact, usual, found, strict=False):
        assert ours is not None
        assert ours.dtype == dtype
        # In fp32 another GEMM gives another last digit, of logits and lse apart: plain torch takes both from one.
        own, theirs = (ours.double() - truth).norm(), (plains.double() - truth).norm()
        assert own <= 1.05 * theirs + 5e-6 * truth.norm() + 1e-6, f"{name}: {own:.3g}, plain torch {theirs:.3g}"


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
    assert peak <= (128 << 20) + dweight.numel() * 2 + (1 << 20)
