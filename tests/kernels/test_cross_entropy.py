"""Fused linear cross-entropy: its reference against autograd in fp64, its kernel against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from whet.kernels import cross_entropy
from whet.kernels._triton import HAVE_TRITON
from whet.kernels.cross_entropy import (
    LogProbs,
    chunk_rows,
    linear_log_probs,
    linear_log_probs_weight_grad,
    log_probs_of_logits_reference,
    logits_gradient_reference,
)

needs_interpreter = pytest.mark.skipif(
    not HAVE_TRITON or torch.cuda.is_available(), reason="runs the kernel on a CPU, in Triton's interpreter"
)
LOGITS = [{}, {"softcap": 3.0}, {"scale": 0.3}, {"softcap": 5.0, "scale": -2.0}]


def inputs(N: int, V: int, D: int, dtype: torch.dtype, seed: int = 0) -> dict[str, torch.Tensor]:
    """Logits of a spread of about 3."""
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(N, D, generator=generator, dtype=torch.float64)
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64) * 3 / D**0.5
    bias = torch.randn(V, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, V, (N,), generator=generator)
    return {"h": h.to(dtype), "weight": weight.to(dtype), "bias": bias.to(dtype), "labels": labels}


def plain(
    h: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, bias: Any, softcap: Any = None, scale: float = 1.0
) -> LogProbs:
    """The formula with whole logits, differentiated by autograd, in fp64."""
    h = h.double().detach().requires_grad_()
    z = h @ weight.double().T * scale if bias is None else (h @ weight.double().T + bias.double()) * scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    log_p = torch.log_softmax(z, -1)
    log_probs = log_p.gather(-1, labels[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    (dh,) = torch.autograd.grad(log_probs.sum(), h)
    return LogProbs(log_probs.detach(), entropy.detach(), z.argmax(-1) == labels, dh)


def assert_near(found: LogProbs, expected: LogProbs, tolerance: float) -> None:
    for name in ("log_probs_N", "entropy_N", "dh_ND"):
        value = getattr(expected, name)
        error = (getattr(found, name).double() - value).abs().max() if value.numel() else torch.zeros(())
        assert error <= tolerance * (1 + value.abs().max() if value.numel() else 1), name
    assert torch.equal(found.is_top1_N, expected.is_top1_N)
    if expected.lse_N is not None and found.lse_N is not None:
        torch.testing.assert_close(found.lse_N.double(), expected.lse_N.double(), rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------- reference and chunks


@pytest.mark.parametrize("logits", LOGITS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_formula_and_its_gradient(logits: dict[str, float], with_bias: bool) -> None:
    """Catches a factor of scale or of the cap's slope that the gradient lacks, and a wrong sign of the entropy."""
    x = inputs(23, 77, 16, torch.float64)
    bias = x["bias"] if with_bias else None
    z = x["h"] @ x["weight"].T + (x["bias"] if with_bias else 0)
    x["labels"][::3] = (z * logits.get("scale", 1.0)).argmax(-1)[::3]
    found = linear_log_probs(x["h"], x["weight"], x["labels"], bias=bias, **logits)
    expected = plain(x["h"], x["weight"], x["labels"], bias, **logits)
    assert_near(found, expected, 1e-13)
    assert 8 <= expected.is_top1_N.sum() < 23


def test_chunks_make_no_difference() -> None:
    """Catches rows lost, doubled or written to another chunk's place; the last chunk is shorter than the others."""
    x = inputs(700, 33, 8, torch.float64)
    assert chunk_rows(700, 1, 1) == 256
    found = linear_log_probs(x["h"], x["weight"], x["labels"], chunk_bytes=1)
    assert_near(found, plain(x["h"], x["weight"], x["labels"], None), 1e-13)


@pytest.mark.parametrize(
    ("rows", "vocabulary", "expected"),
    [(4096, 128256, 1024), (4096, 262144, 512), (1025, 128256, 640), (100, 128256, 128), (0, 128256, 128)],
)
def test_a_chunk_fits_its_bytes_and_is_not_left_nearly_empty(rows: int, vocabulary: int, expected: int) -> None:
    """Catches a second chunk of one row, which reads the whole weight for it. bf16, 256 MiB."""
    assert chunk_rows(rows, vocabulary * 2, cross_entropy.CHUNK_BYTES) == expected


def test_no_rows() -> None:
    x = inputs(0, 33, 8, torch.float32)
    found = linear_log_probs(x["h"], x["weight"], x["labels"])
    assert found.log_probs_N.shape == found.entropy_N.shape == found.is_top1_N.shape == (0,)
    assert found.dh_ND is not None
    assert found.dh_ND.shape == (0, 8)


def test_statistics_alone_are_the_same() -> None:
    x = inputs(9, 33, 8, torch.float32)
    both = linear_log_probs(x["h"], x["weight"], x["labels"])
    alone = linear_log_probs(x["h"], x["weight"], x["labels"], need_grad=False)
    assert alone.dh_ND is None
    for a, b in zip(alone[:3], both[:3], strict=True):
        assert torch.equal(a, b)


def test_the_gradient_may_take_the_place_of_its_input() -> None:
    """Catches a chunk whose gradient overwrites rows that a later chunk still reads."""
    x = inputs(600, 33, 8, torch.float32)
    apart = linear_log_probs(x["h"], x["weight"], x["labels"], chunk_bytes=1)
    wide = torch.full((600, 11), torch.nan)
    wide[:, :8] = x["h"]
    place = wide[:, :8]
    inside = linear_log_probs(place, x["weight"], x["labels"], chunk_bytes=1, out=place)
    assert inside.dh_ND is place
    torch.testing.assert_close(place, apart.dh_ND)
    assert wide[:, 8:].isnan().all()


def test_bf16_is_no_further_off_than_plain_torch() -> None:
    """Catches statistics taken in bf16."""
    x = inputs(64, 501, 32, torch.bfloat16)
    exact = plain(x["h"], x["weight"], x["labels"], None)
    found = linear_log_probs(x["h"], x["weight"], x["labels"])
    h = x["h"].clone().requires_grad_()
    log_p = torch.log_softmax((h @ x["weight"].T).float(), -1)
    log_probs = log_p.gather(-1, x["labels"][:, None])[:, 0]
    (dh,) = torch.autograd.grad(log_probs.sum(), h)
    assert found.log_probs_N.dtype == found.entropy_N.dtype == torch.float32
    assert found.dh_ND is not None
    assert found.dh_ND.dtype == torch.bfloat16
    for ours, plains, truth in (
        (found.log_probs_N, log_probs.detach(), exact.log_probs_N),
        (found.dh_ND, dh, exact.dh_ND),
    ):
        assert (ours - truth).norm() <= 1.05 * (plains - truth).norm()


@pytest.mark.parametrize(("N", "V", "D"), [(64, 501, 32), (600, 33, 64)])
def test_what_lay_in_memory_before_counts_for_nothing(N: int, V: int, D: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches products that read the logits buffer beyond its columns, as oneDNN's do on some CPUs."""
    x = inputs(N, V, D, torch.bfloat16)
    expected = linear_log_probs(x["h"], x["weight"], x["labels"])
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *shape, **how: self.new_full(shape, torch.nan, **how))
    found = linear_log_probs(x["h"], x["weight"], x["labels"])
    assert found.dh_ND is not None
    assert torch.equal(found.dh_ND, expected.dh_ND)


def test_the_first_of_equal_logits_counts() -> None:
    """Catches ties that count for each of the equal tokens: accuracy would then exceed that of argmax."""
    logits = torch.tensor([[1.0, 5.0, 5.0, 0.0]]).repeat(4, 1)
    assert statistics(log_probs_of_logits_reference, logits, torch.arange(4)).is_top1_N.tolist() == [
        False,
        True,
        False,
        False,
    ]


# ---------------------------------------------------------------- gradient of weight and bias


def trained(
    x: dict[str, torch.Tensor], bias: torch.Tensor | None, upstream: torch.Tensor, **options: Any
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Both passes: (dW, db)."""
    logits = {name: options[name] for name in ("softcap", "scale") if name in options}
    lse = linear_log_probs(x["h"], x["weight"], x["labels"], bias=bias, need_grad=False, need_lse=True, **logits).lse_N
    assert lse is not None
    options = {"need_bias": bias is not None} | options
    return linear_log_probs_weight_grad(x["h"], x["weight"], x["labels"], lse, upstream, bias=bias, **options)


def plain_trained(
    x: dict[str, torch.Tensor], bias: torch.Tensor | None, upstream: torch.Tensor, softcap: Any = None, scale: Any = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dW, db) of the formula with whole logits, by autograd in fp64."""
    weight = x["weight"].double().requires_grad_()
    bias = torch.zeros(len(weight), dtype=torch.float64) if bias is None else bias.double()
    bias.requires_grad_()
    z = (x["h"].double() @ weight.T + bias) * scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    log_probs = torch.log_softmax(z, -1).gather(-1, x["labels"][:, None])[:, 0]
    dweight, dbias = torch.autograd.grad((log_probs * upstream.double()).sum(), (weight, bias))
    return dweight, dbias


def upstream_of(x: dict[str, torch.Tensor]) -> torch.Tensor:
    """A weight of its own for every row, of either sign; one row has none."""
    upstream = torch.randn(len(x["h"]), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    upstream[1] = 0
    return upstream.to(x["h"].dtype)


@pytest.mark.parametrize("logits", LOGITS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_gradient_of_weight_and_bias(
    logits: dict[str, float], with_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a lost scale or slope of the cap, rows weighted by another row's upstream gradient, and a chunk of the
    vocabulary whose labels are counted from 0, or whose rows of dW go to another chunk's place."""
    monkeypatch.setattr(cross_entropy, "LEAST_COLUMNS", 128)
    x = inputs(23, 301, 16, torch.float64)
    bias = x["bias"] if with_bias else None
    x["labels"][:3] = torch.tensor([0, 128, 300])  # first and last tokens of chunks
    expected = plain_trained(x, bias, upstream_of(x), **logits)
    dweight, dbias = trained(x, bias, upstream_of(x), chunk_bytes=1, **logits)
    assert dweight is not None
    assert (dweight - expected[0]).abs().max() <= 1e-13 * (1 + expected[0].abs().max())
    if dbias is None:
        assert not with_bias
    else:
        assert (dbias - expected[1]).abs().max() <= 1e-13 * (1 + expected[1].abs().max())


def test_lse_is_that_of_the_capped_logits() -> None:
    x = inputs(9, 33, 8, torch.float64)
    z = 2.0 * torch.tanh((x["h"] @ x["weight"].T) * 0.5 / 2.0)
    found = linear_log_probs(x["h"], x["weight"], x["labels"], softcap=2.0, scale=0.5, need_lse=True)
    torch.testing.assert_close(found.lse_N, torch.logsumexp(z, -1))


@pytest.mark.parametrize("rows", [0, 1])
def test_the_gradient_of_few_rows(rows: int) -> None:
    """Catches a division by the size of no rows, and a gradient left unset: that of no rows is zero."""
    x = inputs(rows, 33, 8, torch.float64)
    upstream = torch.ones(rows, dtype=torch.float64)
    found = trained(x, x["bias"], upstream)
    for ours, expected in zip(found, plain_trained(x, x["bias"], upstream), strict=True):
        torch.testing.assert_close(ours, expected)


def test_only_the_gradient_that_is_asked_for() -> None:
    x = inputs(9, 33, 8, torch.float32)
    both = trained(x, x["bias"], upstream_of(x))
    weight_alone = trained(x, x["bias"], upstream_of(x), need_bias=False)
    bias_alone = trained(x, x["bias"], upstream_of(x), need_weight=False)
    assert torch.equal(weight_alone[0], both[0])
    assert weight_alone[1] is None
    assert bias_alone[0] is None
    assert torch.equal(bias_alone[1], both[1])


def test_the_gradient_has_the_dtype_of_its_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32 weights of a model that computes in bf16."""
    monkeypatch.setattr(cross_entropy, "LEAST_COLUMNS", 128)
    x = inputs(40, 301, 16, torch.float32)
    low = x | {"h": x["h"].bfloat16()}
    dweight, dbias = trained(low, x["bias"], upstream_of(x), chunk_bytes=1)
    assert dweight is not None
    assert dbias is not None
    assert dweight.dtype == dbias.dtype == torch.float32
    for ours, expected in zip((dweight, dbias), plain_trained(low, x["bias"], upstream_of(x)), strict=True):
        assert (ours - expected).norm() <= 0.01 * expected.norm()


def test_the_gradient_in_bf16_is_no_further_off_than_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a sum over rows that is rounded more than once."""
    monkeypatch.setattr(cross_entropy, "LEAST_COLUMNS", 128)
    x = inputs(600, 501, 32, torch.bfloat16)
    upstream = upstream_of(x).float()
    exact = plain_trained(x, x["bias"], upstream)
    found = trained(x, x["bias"], upstream, chunk_bytes=1)
    weight, bias = x["weight"].clone().requires_grad_(), x["bias"].clone().requires_grad_()
    log_p = torch.log_softmax(torch.nn.functional.linear(x["h"], weight, bias).float(), -1)
    log_probs = log_p.gather(-1, x["labels"][:, None])[:, 0]
    usual = torch.autograd.grad((log_probs * upstream).sum(), (weight, bias))
    for ours, plains, truth in zip(found, usual, exact, strict=True):
        assert ours is not None
        assert ours.dtype == torch.bfloat16
        assert (ours - truth).norm() <= 1.05 * (plains - truth).norm()


# ---------------------------------------------------------------- the kernels


def statistics(fold: Any, logits: torch.Tensor, labels: torch.Tensor, **options: Any) -> LogProbs:
    """`fold` on logits that it may overwrite, into poisoned outputs; dh_ND is the overwritten logits."""
    N = len(labels)
    nan = torch.full((N,), torch.nan)
    out = LogProbs(nan, nan.clone(), torch.ones(N, dtype=torch.bool), None, nan.clone())
    fold(logits, labels, out, **options)
    return out._replace(dh_ND=logits)


@needs_interpreter
@pytest.mark.parametrize("V", [1, 7, 128, 129, 1000, 8191, 8193, 20001])
@pytest.mark.parametrize("logits", LOGITS)
def test_the_kernel_is_its_reference(V: int, logits: dict[str, float]) -> None:
    """Catches wrong masks at the end of a row and of its buffer, and sums that a new maximum does not rescale.

    The row's stride is wider than V, and the columns between hold NaN. Logits grow along the row, so that the maximum
    changes with each block.
    """
    generator = torch.Generator().manual_seed(V)
    stride = -(-V // 64) * 64
    buffer = torch.full((5, stride), torch.nan)
    buffer[:, :V] = torch.randn(5, V, generator=generator) * 3 + torch.linspace(-4, 4, V)
    labels = torch.randint(0, V, (5,), generator=generator)
    labels[0] = (buffer[0, :V] * logits.get("scale", 1.0)).argmax()
    expected = statistics(log_probs_of_logits_reference, buffer[:, :V].double().clone(), labels, **logits)
    found = statistics(cross_entropy.log_probs_of_logits_triton, buffer[:, :V], labels, **logits)
    assert_near(found, expected, 2e-6)
    assert found.is_top1_N[0]


@needs_interpreter
def test_the_kernel_leaves_logits_alone_without_a_gradient() -> None:
    logits = torch.randn(3, 100)
    before = logits.clone()
    found = statistics(cross_entropy.log_probs_of_logits_triton, logits, torch.arange(3), need_grad=False)
    expected = statistics(log_probs_of_logits_reference, before.clone(), torch.arange(3), need_grad=False)
    assert torch.equal(logits, before)
    assert_near(found, expected._replace(dh_ND=before.double()), 1e-6)


@needs_interpreter
def test_the_kernel_counts_the_first_of_equal_logits() -> None:
    logits = torch.tensor([[1.0, 5.0, 5.0, 0.0]]).repeat(4, 1)
    found = statistics(cross_entropy.log_probs_of_logits_triton, logits, torch.arange(4))
    assert found.is_top1_N.tolist() == [False, True, False, False]


@needs_interpreter
@pytest.mark.parametrize("size", [1e-3, 1e4])
def test_the_kernel_at_extreme_logits(size: float) -> None:
    """Catches exp without the maximum taken off, and an entropy that cancels when one token has all the weight."""
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(1)) * size
    labels = torch.tensor([0, 1, 299, int(logits[3].argmax())])
    expected = statistics(log_probs_of_logits_reference, logits.double().clone(), labels)
    found = statistics(cross_entropy.log_probs_of_logits_triton, logits, labels)
    assert_near(found, expected, 1e-6)
    assert found.entropy_N.min() >= -1e-6


@needs_interpreter
@pytest.mark.parametrize("label", [-100, 50, 1 << 40])
def test_a_label_outside_the_vocabulary_is_nan(label: int) -> None:
    """Catches reading past the row, and a log-probability made up for a label that does not exist."""
    found = statistics(cross_entropy.log_probs_of_logits_triton, torch.randn(1, 50), torch.tensor([label]))
    assert found.log_probs_N.isnan().all()
    assert not found.is_top1_N.any()


@needs_interpreter
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, about the buffer's unset columns past V
def test_the_kernel_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches statistics written at the wrong offset when the outputs are slices."""
    monkeypatch.setattr(
        cross_entropy, "log_probs_of_logits_reference", cross_entropy.log_probs_of_logits_triton
    )  # as a GPU would
    x = inputs(300, 33, 8, torch.float32)
    found = linear_log_probs(x["h"], x["weight"], x["labels"], chunk_bytes=1)
    assert_near(found, plain(x["h"], x["weight"], x["labels"], None), 1e-6)


@needs_interpreter
@pytest.mark.parametrize("C", [1, 7, 128, 129, 5000])
@pytest.mark.parametrize("first", [0, 6400])
@pytest.mark.parametrize("logits", LOGITS)
def test_the_kernel_of_the_gradient_is_its_reference(C: int, first: int, logits: dict[str, float]) -> None:
    """Catches a label before or after the chunk that counts in it, and wrong masks where rows are wider than C.

    Beyond the stride of the last row lies a value that must not change.
    """
    generator = torch.Generator().manual_seed(C)
    stride = -(-C // 64) * 64
    memory = torch.full((5 * stride + 1,), torch.nan)
    memory[-1] = 7.0
    buffer = memory[:-1].view(5, stride)
    buffer[:, :C] = torch.randn(5, C, generator=generator) * 3
    labels = torch.tensor([first, first + C - 1, first + C, first - 1, first + C // 2])
    lse = torch.full((5,), 9.0) + torch.arange(5)
    upstream = torch.tensor([-1.0, 0.5, 2.0, -3.0, 0.0])
    expected = buffer[:, :C].double().clone()
    logits_gradient_reference(expected, labels, lse, upstream, first, **logits)
    cross_entropy.logits_gradient_triton(buffer[:, :C], labels, lse, upstream, first, **logits)
    assert (buffer[:, :C] - expected).abs().max() <= 2e-6 * (1 + expected.abs().max())
    assert memory[-1] == 7.0


@needs_interpreter
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_kernels_in_chunks_of_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "log_probs_of_logits_reference", cross_entropy.log_probs_of_logits_triton)
    monkeypatch.setattr(cross_entropy, "logits_gradient_reference", cross_entropy.logits_gradient_triton)
    monkeypatch.setattr(cross_entropy, "LEAST_COLUMNS", 128)
    x = inputs(37, 301, 16, torch.float32)
    found = trained(x, x["bias"], upstream_of(x), softcap=5.0, scale=0.7, chunk_bytes=1)
    expected = plain_trained(x, x["bias"], upstream_of(x), softcap=5.0, scale=0.7)
    for ours, truth in zip(found, expected, strict=True):
        assert ours is not None
        assert (ours - truth).abs().max() <= 3e-6 * (1 + truth.abs().max())


@needs_interpreter
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_kernel_takes_one_upstream_gradient_for_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches reading what autograd hands over for a sum, of stride 0, as if its rows lay in memory."""
    monkeypatch.setattr(cross_entropy, "logits_gradient_reference", cross_entropy.logits_gradient_triton)
    x = inputs(9, 33, 8, torch.float32)
    memory = torch.full((9,), 100.0)
    memory[0] = -0.25
    found, _ = trained(x, None, memory[:1].expand(9))
    expected, _ = trained(x, None, torch.full((9,), -0.25))
    assert torch.equal(found, expected)
