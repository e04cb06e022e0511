"""cuBLASLt's products on a GPU, against fp64; in graphs, in autograd's thread, and what they cost besides."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from whet.kernels import cublaslt
from whet.kernels.cublaslt import available, product, tune
from whet.kernels.fp8 import E4M3, quantize_rows, scaled_mm

CUDA = torch.device("cuda")
BF16, FP32 = torch.bfloat16, torch.float32

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.version.hip is not None or torch.cuda.get_device_capability() < (8, 0),
        reason="needs an NVIDIA GPU that takes bf16",
    ),
]
hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)
ADDED = ["none", "out", "apart"]


def normal(*shape: int, dtype: torch.dtype = BF16, seed: int = 0) -> Tensor:
    return torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(seed)).to(dtype)


def margined(rows: int, columns: int, margin: int = 64, *, dtype: torch.dtype = BF16, seed: int = 0) -> Tensor:
    """[rows, columns] of a buffer with `margin` more, which hold NaN."""
    buffer = torch.full((rows, columns + margin), float("nan"), device="cuda").to(dtype)
    view = buffer[:, :columns]
    view.copy_(normal(rows, columns, dtype=FP32, seed=seed))
    return view


def of_kind(added: str, out: Tensor, *, margin: int = 0) -> Tensor | None:
    apart = margined(*out.shape, margin, dtype=out.dtype, seed=9)
    return {"none": None, "out": out, "apart": apart}[added]


def assert_product(y: Tensor, a: Tensor, b: Tensor, c: Tensor | None, *, twice: bool = False) -> None:
    """Within the rounding of `out`, and of sums in fp32. twice: the product may have been rounded before c is added."""
    a, b = a.double(), b.double()
    exact, size = a @ b, a.abs() @ b.abs()
    unit = {BF16: 2**-8, torch.float16: 2**-11, FP32: 2**-23}[y.dtype]
    before = unit * exact.abs() if twice else 0.0
    if c is not None:
        exact, size = exact + c.double(), size + c.double().abs()
    assert ((y.double() - exact).abs() <= before + unit * exact.abs() + 2**-16 * size + 1e-12).all()


def relative(y: Tensor, exact: Tensor) -> float:
    return ((y.double() - exact).norm() / exact.norm()).item()


def test_torch_has_loaded_cublaslt() -> None:
    """Catches a library that is looked for under a wrong name: everything else here would test torch."""
    assert available(CUDA)
    assert not available(CUDA, torch.float64)


# ------------------------------------------------------------------ 16 bits

SHAPES = [(1, 1, 1), (3, 5, 7), (1, 4096, 64), (130, 48, 4096), (77, 333, 129), (200, 6144, 4160), (1000, 48, 4096)]


@pytest.mark.parametrize("added", ADDED)
@pytest.mark.parametrize(("dtype", "out_dtype"), [(BF16, BF16), (BF16, FP32), (torch.float16, torch.float16)])
@pytest.mark.parametrize(("M", "N", "K"), SHAPES)
@pytest.mark.parametrize("a_by_rows", [True, False])
@pytest.mark.parametrize("b_by_rows", [True, False])
def test_products(
    M: int, N: int, K: int, a_by_rows: bool, b_by_rows: bool, dtype: torch.dtype, out_dtype: torch.dtype, added: str
) -> None:
    """Catches a wrong layout, a sum or a rounding in less than fp32, and c that is lost or added twice."""
    a = normal(M, K, dtype=dtype) if a_by_rows else normal(K, M, dtype=dtype).T
    b = normal(K, N, dtype=dtype, seed=1) if b_by_rows else normal(N, K, dtype=dtype, seed=1).T
    out = normal(M, N, dtype=out_dtype, seed=2)
    c = of_kind(added, out)
    before = None if c is None else c.clone()
    assert product(a, b, c=c, out=out) is out
    assert_product(out, a, b, before, twice=added == "out" and out_dtype != FP32)
    if added == "apart":
        assert torch.equal(c, before)


@pytest.mark.parametrize("added", ADDED)
@pytest.mark.parametrize("tokens", [77, 4096])
def test_views_with_margins(tokens: int, added: str) -> None:
    """Catches a margin that is read, which holds NaN, or written: forward and backward as the block lays them out."""
    e = normal(4096 + 64, 4096 + 64)
    xe = normal(tokens, 4096 + 64, seed=1)
    buffer = torch.full((tokens, 4096 + 64), 7.0, device="cuda", dtype=BF16)
    out = buffer[:, :4096]
    for a, b in ((xe, e[:4096].T), (xe, e[:, :4096]), (margined(tokens, 4096), margined(4096, 4096, seed=2).T)):
        c = of_kind(added, out, margin=64)
        before = None if c is None else c.clone()
        product(a, b, c=c, out=out)
        assert_product(out, a, b, before, twice=added == "out")
        assert (buffer[:, 4096:] == 7).all()


def test_gradients_add_up_in_fp32() -> None:
    """Catches sums that are rounded to bf16 on the way, or unscaled: 64 products into one fp32 matrix."""
    out = torch.zeros(48, 1024, device="cuda")
    exact = torch.zeros(48, 1024, device="cuda", dtype=torch.float64)
    for seed in range(64):
        g, x = margined(256, 48, seed=seed), normal(256, 1024, seed=100 + seed)
        product(g.T, x, c=out, out=out, alpha=-1.5)
        exact -= 1.5 * g.T.double() @ x.double()
    assert relative(out, exact) < 1e-5


def test_nothing_to_sum() -> None:
    out, c = normal(3, 16), normal(3, 16, seed=1)
    assert torch.equal(product(normal(3, 0), normal(0, 16), c=c, out=out), c)
    assert (product(normal(3, 0), normal(0, 16), out=out) == 0).all()
    assert product(normal(0, 8), normal(8, 16), out=out[:0]).shape == (0, 16)


# ------------------------------------------------------------------ E4M3


@hopper
@pytest.mark.parametrize("added", ADDED)
@pytest.mark.parametrize(
    ("M", "N", "K"), [(1, 4096, 4096), (200, 6144, 4096), (4096, 4096, 14336), (77, 48, 192), (513, 1024, 4096)]
)
def test_e4m3(M: int, N: int, K: int, added: str) -> None:
    """Catches scales of the wrong side, c that is scaled too, and sums unlike those of torch."""
    assert available(CUDA, E4M3)
    x8, x_scale = quantize_rows(normal(M, K) * normal(M, 1, seed=3).float().clamp(-2, 2).exp2())
    w8, w_scale = quantize_rows(normal(N, K, seed=1) * normal(N, 1, seed=4).float().clamp(-2, 2).exp2())
    buffer = torch.full((M, N + 64), 7.0, device="cuda", dtype=BF16)
    out = buffer[:, :-64]
    out.copy_(normal(M, N, seed=2) * 60)
    c = of_kind(added, out)
    exact = (x8.double() * x_scale) @ (w8.double() * w_scale).T
    theirs = scaled_mm(x8, x_scale, w8, w_scale.reshape(-1)).double()
    if c is not None:
        exact, theirs = exact + c.double(), theirs + c.double()
    product(x8, w8.T, c=c, out=out, scale_a=x_scale, scale_b=w_scale.reshape(-1))
    assert relative(out, exact) < 0.02
    assert relative(out, theirs) < 0.02
    assert (buffer[:, -64:] == 7).all()


@hopper
@pytest.mark.parametrize("dtype", [torch.float16, FP32])
@pytest.mark.parametrize("added", ADDED)
def test_e4m3_into_other_types(added: str, dtype: torch.dtype) -> None:
    """Catches a combination that cuBLASLt refuses."""
    x8, x_scale = quantize_rows(normal(200, 4096))
    w8, w_scale = quantize_rows(normal(1024, 4096, seed=1))
    out = normal(200, 1024, dtype=dtype, seed=2)
    c = of_kind(added, out)
    exact = 0.5 * (x8.double() * x_scale) @ (w8.double() * w_scale).T
    if c is not None:
        exact += c.double()
    product(x8, w8.T, c=c, out=out, scale_a=x_scale, scale_b=w_scale, alpha=0.5)
    assert relative(out, exact) < 0.02


@hopper
def test_each_call_has_its_own_scales() -> None:
    """Catches scales that stay those of the first call of a form."""
    x8, w8 = (quantize_rows(normal(64, 128, seed=seed))[0] for seed in (0, 1))
    out = normal(64, 64)
    for seed in range(3):
        scale_a, scale_b = normal(64, 1, dtype=FP32, seed=seed), normal(64, dtype=FP32, seed=10 + seed)
        product(x8, w8.T, out=out, scale_a=scale_a, scale_b=scale_b)
        assert relative(out, (x8.double() * scale_a) @ (w8.double() * scale_b[:, None]).T) < 0.02


# ------------------------------------------------------------------ how it runs


def bf16_case(tokens: int = 512) -> tuple[Callable[[], Tensor], Callable[[], Tensor], list[Tensor]]:
    a, w = normal(tokens, 4160), normal(4096, 4160, seed=1)
    c, out = normal(tokens, 4096, seed=2), normal(tokens, 4096)
    return lambda: product(a, w.T, c=c, out=out), lambda: a.double() @ w.double().T + c.double(), [a, w, c]


def e4m3_case(tokens: int = 512) -> tuple[Callable[[], Tensor], Callable[[], Tensor], list[Tensor]]:
    (a, s), (w, t) = quantize_rows(normal(tokens, 4096)), quantize_rows(normal(4096, 4096, seed=1))
    c, out = normal(tokens, 4096, seed=2), normal(tokens, 4096)

    def exact() -> Tensor:
        return (a.double() * s) @ (w.double() * t).T + c.double()

    return lambda: product(a, w.T, c=c, out=out, scale_a=s, scale_b=t.reshape(-1)), exact, [s, t, c]


CASES = [bf16_case, pytest.param(e4m3_case, marks=hopper)]


@pytest.mark.parametrize("case", CASES)
def test_a_graph_reads_what_is_there_at_its_replay(case: Callable) -> None:
    """Catches a copy, a scale or a factor that a recording holds on to, and host memory that it reads too late."""
    ours, exact, inputs = case()
    ours()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ours()
    for factor in (0.5, 3.0):
        for x in inputs:
            x.mul_(factor)
        out.fill_(float("nan"))
        graph.replay()
        assert relative(out, exact()) < 0.02


@pytest.mark.parametrize("case", CASES)
def test_a_form_that_a_graph_sees_first(case: Callable) -> None:
    """Catches an allocation or a wait on the way to a form's first product."""
    product(normal(16, 16), normal(16, 16), out=normal(16, 16))
    ours, exact, _ = case()
    cublaslt._plan.cache_clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ours()
    graph.replay()
    assert relative(out, exact()) < 0.02


def test_what_can_not_be_recorded() -> None:
    """Catches timing, or the making of a handle, that breaks a recording in a way that says nothing."""
    a, b, out = normal(96, 96), normal(96, 96), normal(96, 96)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        with pytest.raises(RuntimeError, match="tune before"):
            tune(a, b, out=out)
        with pytest.raises(RuntimeError, match="run one before"):
            cublaslt._Device(a.device.index)
        out.zero_()


@pytest.mark.parametrize("case", CASES)
def test_one_launch_and_no_wait(case: Callable) -> None:
    """Catches c that is copied into `out` first, and a wait for the device."""
    ours, _, _ = case(4096)  # fewer might be split along K, and summed up in a second launch
    ours()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        ours()
        torch.cuda.synchronize()
    events = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [name for name in events if not name.startswith("Memset")]  # a counter that some want cleared
    assert len(kernels) == 1, events


def test_memory_does_not_grow() -> None:
    """Catches a work space for each call, stream or form: there is one on a device."""
    case = bf16_case()[0]
    case()
    torch.cuda.synchronize()
    before, held = torch.cuda.memory_allocated(), cublaslt._plan.cache_info().currsize
    for _ in range(100):
        case()
    with torch.cuda.stream(torch.cuda.Stream()):
        case()
    assert torch.cuda.memory_allocated() == before
    assert cublaslt._plan.cache_info().currsize == held


def test_another_stream_waits_for_the_work_space() -> None:
    """Catches two streams that write their parts of K to one work space at once: these products are split."""
    forms = [(normal(64, 16384, seed=i), normal(16384, 64, seed=10 + i), normal(64, 64)) for i in range(2)]
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    for _ in range(50):
        for (a, b, out), stream in zip(forms, (torch.cuda.current_stream(), side), strict=True):
            with torch.cuda.stream(stream):
                product(a, b, out=out)
    torch.cuda.synchronize()
    for a, b, out in forms:
        assert_product(out, a, b, None)


def test_autograds_thread() -> None:
    """Catches a device or stream that is only set in the main thread."""

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor, w: Tensor) -> Tensor:
            ctx.save_for_backward(w)
            return product(x, w.T, out=x.new_empty(x.shape[0], w.shape[0]))

        @staticmethod
        def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
            (w,) = ctx.saved_tensors
            return product(dy, w, out=dy.new_empty(dy.shape[0], w.shape[1])), None

    x, w, dy = normal(200, 320).requires_grad_(), normal(96, 320, seed=1), normal(200, 96, seed=2)
    with torch.cuda.stream(torch.cuda.Stream()):
        Double.apply(x, w).backward(dy)
    torch.cuda.synchronize()
    assert x.grad is not None
    assert_product(x.grad, dy, w, None)


@pytest.mark.parametrize("added", ADDED)
def test_tuning_leaves_the_product_as_it_was(added: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a tuning that adds to `out`, is done twice, or keeps an algorithm that is wrong."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cublaslt, "_tuned", {})
    a, b, out = normal(1024, 1088), normal(1024, 1088, seed=1).T, normal(1024, 1024, seed=2)
    c = of_kind(added, out)
    before = out.clone()
    times = tune(a, b, c=c, out=out)
    assert added != "out" or torch.equal(out, before)
    assert 1 <= len(times) <= 16
    assert 0 < min(times) < 10_000
    assert tune(a, b, c=c, out=out) is times
    expected = None if c is None else c.clone()
    product(a, b, c=c, out=out)
    assert_product(out, a, b, expected, twice=added == "out")
    cublaslt._tuned.clear()
    assert tune(a, b, c=c, out=out) == (), "it was kept"


def test_a_form_that_comes_again_is_tuned_by_its_first_product(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches batches of every length that are each timed for some hundred products, and a timing in a recording."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for tokens, tuned in ((2048, True), (2049, False)):
        a, b = normal(tokens, 320), normal(96, 320, seed=1).T
        out, known = normal(tokens, 96), len(cublaslt._tuned)
        graph = torch.cuda.CUDAGraph()
        product(a, b, out=out)
        with torch.cuda.graph(graph):
            product(a, b, out=out, tuned=True)
        assert len(cublaslt._tuned) == known
        product(a, b, out=out, tuned=True)
        assert len(cublaslt._tuned) == known + tuned
        assert_product(out, a, b, None)


@hopper
def test_tuning_of_e4m3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an algorithm that takes other scales."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cublaslt, "_tuned", {})
    x8, x_scale = quantize_rows(normal(1024, 1024))
    w8, w_scale = quantize_rows(normal(2048, 1024, seed=1))
    out = normal(1024, 2048)
    assert tune(x8, w8.T, c=out, out=out, scale_a=x_scale, scale_b=w_scale)
    exact = (x8.double() * x_scale) @ (w8.double() * w_scale).T + out.double()
    product(x8, w8.T, c=out, out=out, scale_a=x_scale, scale_b=w_scale)
    assert relative(out, exact) < 0.02


def test_a_wrong_call_raises() -> None:
    """Catches a fault that reaches the device, where it would end the process."""
    a, b, out = normal(16, 32), normal(32, 48), normal(16, 48)
    with pytest.raises(ValueError, match="MxK"):
        product(a, b.T, out=out)
    with pytest.raises(ValueError, match="into torch"):
        product(a, b, out=out.half())
    with pytest.raises(ValueError, match="several devices"):
        product(a, b.cpu(), out=out)
    with pytest.raises(ValueError, match="rows or columns must be adjacent"):
        product(normal(16, 64)[:, ::2], b, out=out)
    right = cublaslt.arrange(a, b, None, out).problem
    with pytest.raises(RuntimeError, match=r"CUBLAS_STATUS_\w+ for Problem\(left=Matrix\(dtype=torch.bfloat16"):
        cublaslt._Plan(cublaslt._device(0), right._replace(right=right.left))
    assert_product(product(a, b, out=out), a, b, None)
