"""The optimizer that updates many parameters at once, on a GPU: bitwise the reference's moments, and no waiting.

What is compared with bitsandbytes rounds bf16 to nearest, as it does; rounding at random has tests of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("bitsandbytes")

from bitsandbytes.functional import create_dynamic_map
from bitsandbytes.optim import AdamW

from whet.kernels.adamw_8bit import CodeMap, Entry, Tables, Update, adamw_8bit, adamw_8bit_reference
from whet.kernels.stochastic_round import stochastic_round, stochastic_round_reference
from whet.train import optimizer
from whet.train.optimizer import AdamW8bit

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(4096,), (4097,), (5000,), (65536 + 3,), (7,), (16, 300), (300, 16), (1, 4095), (256, 256), (16, 4096)] * 3
NAMES = ("state1", "state2", "absmax1", "absmax2")


def own(groups: list[dict[str, Any]]) -> AdamW:
    return AdamW(groups, optim_bits=8)


def nearest(groups: list[dict[str, Any]]) -> AdamW8bit:
    return AdamW8bit(groups, stochastic_rounding=False)


def at_random(groups: list[dict[str, Any]]) -> AdamW8bit:
    return AdamW8bit(groups, seed=9)


def parameters(seed: int = 0, device: str = "cuda") -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator).to(device, d)) for d in DTYPES for s in SHAPES]


def groups(of: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": of[::2], "weight_decay": 0.1}, {"params": of[1::2], "weight_decay": 0.0, "lr": 1e-2}]


def set_gradients(of: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for number, p in enumerate(of):
        grad = torch.randn(p.shape, generator=generator).mul(0.1).to(p.device, p.dtype)
        p.grad = None if number in (3, 4) and step % 5 == 1 else grad


def tensors(of: list[nn.Parameter], adam: AdamW) -> Iterator[Tensor]:
    for p in of:
        yield p
        yield from (adam.state[p][name] for name in NAMES if name in adam.state.get(p, {}))


def assert_close(got: Tensor, expected: Tensor, share: float) -> None:
    """Weights within the last bits of an update; of 16-bit ones, but for this share, equal, and none further off than
    the next number."""
    spacing = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[got.dtype]
    expected = expected.to(got.device)
    torch.testing.assert_close(got.float(), expected.float(), rtol=spacing, atol=5e-6)
    if got.dtype != torch.float32:
        assert (got != expected).sum() <= 2 + share * got.numel()


def entry(n: int, dtype: torch.dtype, maps: tuple[CodeMap, CodeMap] | None, first: int) -> Entry:
    draw = torch.Generator().manual_seed(n)

    def randn() -> Tensor:
        return torch.randn(n, generator=draw)

    weight, grad = randn().to(dtype), randn().mul(0.01).to(dtype)
    if n > 100:
        grad[5], grad[99] = torch.nan, torch.inf
    grad[256:512] = 0
    if maps is None:
        return Entry(weight, grad, randn() * 0.01, randn().square() * 1e-4, None, None, first)
    codes = [torch.randint(least, 256, (n,), generator=draw, dtype=torch.uint8) for least in (0, 128)]
    scales = [torch.rand(-(-n // 256), generator=draw) * size for size in (0.01, 1e-4)]
    for of, code, scale in zip(maps, codes, scales, strict=True):
        code[512:768] = of.zero
        scale[2:3] = 0
    return Entry(weight, grad, *codes, *scales, first)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("eight_bits", [True, False])
@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("sizes", [[1, 255, 257, 2049, 0, (1 << 20) + 77], [16, 4096, 0, 1 << 20, 65536 + 16]])
def test_the_kernel_is_the_reference(dtype: torch.dtype, eight_bits: bool, seed: int | None, sizes: list[int]) -> None:
    """Catches, beside what the interpreter shows: products fused into sums, wide loads of what does not fill them,
    weights not rounded to nearest, and steps compiled into the kernel."""
    maps = (CodeMap.of(create_dynamic_map(signed=True)), CodeMap.of(create_dynamic_map(signed=False)))
    on_gpu = tuple(CodeMap.of(of.numbers.cuda()) for of in maps) if eight_bits else None
    expected: list[Entry] = []
    for n in sizes:
        first = expected[-1].first - (-expected[-1].weight.numel() // 256) if expected else 3
        expected.append(entry(n, dtype, maps if eight_bits else None, first))
    ours = [Entry(*(x.cuda() if isinstance(x, Tensor) else x for x in one[:6]), one.first) for one in expected]
    tables = Tables()
    for step in (1, 16, 1000):
        update = Update(step, 1e-3, 0.9, 0.99, 1e-8, 0.1, seed)
        adamw_8bit(ours, on_gpu, update, tables)
        adamw_8bit_reference(expected, maps if eight_bits else None, update)
        for a, b in zip(ours, expected, strict=True):
            for x, y in zip(a[2:6], b[2:6], strict=True):
                assert x is None or torch.equal(x.cpu(), y)
            assert_close(a.weight, b.weight, share=1e-3)
            b.weight.copy_(a.weight)


@pytest.mark.parametrize("make", [nearest, at_random])
def test_steps_are_those_on_the_cpu(make: Callable[..., AdamW8bit]) -> None:
    """Catches parameters mixed up in a launch, gradients read where they were a step ago, and settings of another
    group: on a CPU the reference runs, one parameter after another."""
    one, other = parameters(), parameters(device="cpu")
    left, right = make(groups(one)), make(groups(other))
    for step in range(10):
        for of, adam in ((one, left), (other, right)):
            set_gradients(of, step)
            for group in adam.param_groups:
                group["lr"] *= 0.95
            adam.step()
        for p, q in zip(one, other, strict=True):
            assert_close(p, q, share=1e-3)
            q.data.copy_(p)
            for name in NAMES:
                expected = right.state[q].get(name)
                assert expected is None or torch.equal(left.state[p][name].cpu(), expected)


def test_each_step_is_bitsandbytes_own() -> None:
    """Catches another formula than that of bitsandbytes on a GPU: from its state, step after step.

    Its powers of the betas are approximate, which shows in the first steps, and it never makes a negative moment 0.
    """
    one, other = parameters(), parameters()
    left, right = own(groups(one)), nearest(groups(other))
    for step in range(10):
        with torch.no_grad():
            torch._foreach_copy_(other, one)
        right.load_state_dict(left.state_dict())
        for of, adam in ((one, left), (other, right)):
            set_gradients(of, step)
            adam.step()
        for p, q in zip(one, other, strict=True):
            spacing = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[p.dtype]
            torch.testing.assert_close(p.float(), q.float(), rtol=spacing, atol=1e-4)
            state, ours = left.state[p], right.state[q]
            for name in NAMES:
                if name not in state:
                    continue
                if state[name].dtype == torch.uint8:
                    off = (state[name].int() - ours[name].int()).abs()
                    assert off.max() <= 1
                    assert (off > 0).sum() <= 2 + 0.02 * off.numel()
                else:
                    torch.testing.assert_close(state[name], ours[name], rtol=1e-5, atol=1e-8)


def test_checkpoints_go_both_ways() -> None:
    """Catches moments loaded from a file that the next step doesn't use, and states that bitsandbytes can't use."""
    one, other, third = parameters(), parameters(), parameters()
    left, right, by_hand = own(groups(one)), nearest(groups(other)), nearest(groups(third))
    for step in range(5):
        set_gradients(one, step)
        left.step()
    right.load_state_dict(left.state_dict())
    for p, q in zip(one, third, strict=True):
        by_hand.state[q] = copy.deepcopy(dict(left.state[p]))
    with torch.no_grad():
        torch._foreach_copy_(other, one)
        torch._foreach_copy_(third, one)
    for step in range(5, 10):
        for of, adam in ((other, right), (third, by_hand)):
            set_gradients(of, step)
            adam.step()
    assert all(torch.equal(a, b) for a, b in zip(tensors(other, right), tensors(third, by_hand), strict=True))
    left.load_state_dict(right.state_dict())
    with torch.no_grad():
        torch._foreach_copy_(one, other)
    for of, adam in ((one, left), (other, right)):
        set_gradients(of, 10)
        adam.step()
    for p, q in zip(one, other, strict=True):
        torch.testing.assert_close(p.float(), q.float(), rtol=2**-7, atol=1e-4)
        assert left.state[p]["step"] == right.state[q]["step"]


@pytest.mark.parametrize("n", [1, 129, 256, 2049, (1 << 22) + 77])
@pytest.mark.parametrize("with_table", [False, True])
def test_stochastic_rounding_is_the_reference_bitwise(n: int, with_table: bool) -> None:
    """Catches shifts that the compiler makes signed, masks at the end, and a step compiled into a kernel."""
    draw = torch.Generator("cuda").manual_seed(n)
    x = torch.randint(-(1 << 31), 1 << 31, (n,), device="cuda", generator=draw).to(torch.int32).view(torch.float32)
    x[3::1000] = torch.inf
    count = -(-n // 256)
    table = torch.randint(0, 1 << 31, (count,), device="cuda", generator=draw).to(torch.int32)
    blocks = table if with_table else 2**31 - count
    out = torch.full((n + 64,), 5.0, device="cuda", dtype=torch.bfloat16)
    for seed, step in ((0, 1), (0, 16), (7, 100)):
        stochastic_round(x, out[:n], blocks, seed=seed, step=step)
        expected = stochastic_round_reference(
            x.cpu(), blocks if isinstance(blocks, int) else blocks.cpu(), seed=seed, step=step
        )
        assert torch.equal(out[:n].cpu().view(torch.int16), expected.view(torch.int16))
    assert (out[n:] == 5).all()


def test_a_resumed_run_rounds_as_the_run_itself() -> None:
    """Catches random bits that depend on launches or the process: some have no gradient in the step resumed at."""
    one, other = parameters(), parameters(seed=1)
    left, right = AdamW8bit(groups(one), seed=4), AdamW8bit(groups(other))
    for step in range(10):
        if step == 6:
            right.load_state_dict(left.state_dict())
            with torch.no_grad():
                torch._foreach_copy_(other, one)
        for of, adam in ((one, left), (other, right)) if step >= 6 else ((one, left),):
            set_gradients(of, step)
            adam.step()
    assert all(torch.equal(a, b) for a, b in zip(tensors(one, left), tensors(other, right), strict=True))


def test_what_does_not_lie_in_one_piece() -> None:
    """Catches transposed weights, gradients or moments read in another order than bitsandbytes reads them: steps are of
    1e-3, and what remains is codes that differ by one."""
    seen = []
    for make in (own, nearest):
        draw = torch.Generator("cuda").manual_seed(0)

        def randn(*shape: int, draw: torch.Generator = draw) -> Tensor:
            return torch.randn(shape, generator=draw, device="cuda")

        of = [nn.Parameter(t) for t in (randn(64, 100).t(), randn(70, 90), randn(100, 64), randn(5000))]
        adam = make([{"params": of}])
        for step in range(4):
            of[0].grad, of[1].grad = randn(100, 64), randn(90, 70).t()
            of[2].grad, of[3].grad = randn(64, 100).t(), randn(5000)
            adam.step()
            of[1].data = of[1].data.t().contiguous().t()
            if step == 1:
                adam.load_state_dict(adam.state_dict())
        seen.append([p.detach().clone() for p in of])
    for a, b in zip(*seen, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=5e-4)


def test_a_step_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the device-wide waits of bitsandbytes' own step, copies to the host, and tables that are waited for:
    gradients lie elsewhere than a step ago. With a large weight in bf16."""
    of = [*parameters(), nn.Parameter(torch.ones((1 << 22) + 300, device="cuda", dtype=torch.bfloat16))]
    adam = AdamW8bit(groups(of))
    for step in range(2):
        set_gradients(of, 2 + step)
        adam.step()
    before = [p.grad for p in of]  # so that the next ones lie elsewhere
    set_gradients(of, 4)
    assert all(p.grad.data_ptr() != g.data_ptr() for p, g in zip(of, before, strict=True))

    def refuse(*_: Any) -> None:
        raise AssertionError("waited for the GPU")

    monkeypatch.setattr(torch.cuda, "synchronize", refuse)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        adam.step()
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def test_another_stream_than_the_default() -> None:
    """Catches an update that runs before gradients are there, or after weights are read, on either way: the last of the
    weights is updated by bitsandbytes, on the default stream."""
    one, other = parameters(), parameters()
    for of in (one, other):
        of.append(nn.Parameter(torch.ones(64, 100, device="cuda").t()))
    left, right = nearest(groups(one)), nearest(groups(other))
    stream = torch.cuda.Stream()
    for step in range(5):
        set_gradients(one, step)
        left.step()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            set_gradients(other, step)
            torch.cuda._sleep(10_000_000)
            torch._foreach_mul_([p.grad for p in other if p.grad is not None], 1)
            right.step()
            read = [p.detach().clone() for p in other]
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(one, read, strict=True))


def test_launches_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a launch a parameter: there are two groups, three dtypes, two kinds of moments, and sizes odd or not."""
    seen: list[int] = []

    def counted(entries: list[Entry], *args: Any) -> None:
        seen.append(len(entries))
        adamw_8bit(entries, *args)

    monkeypatch.setattr(optimizer, "adamw_8bit", counted)
    of = parameters()
    adam = AdamW8bit(groups(of))
    set_gradients(of, 0)
    adam.step()
    assert sum(seen) == len(of) == 90
    assert len(seen) <= 2 * 3 * 2 * 2


def test_a_step_keeps_little() -> None:
    """Catches copies of weights or gradients that stay: beside moments, 8 MB for tables are allowed."""
    of = [nn.Parameter(torch.ones(16, 4096, device="cuda")) for _ in range(448)]
    adam = AdamW8bit(of)
    for p in of:
        p.grad = torch.ones_like(p)
    before = torch.cuda.memory_allocated()
    adam.step()
    moments = 448 * 65536 * (2 + 8 / 256)
    assert torch.cuda.memory_allocated() - before < moments + 8e6


def test_a_step_needs_no_copy() -> None:
    """Catches weights in fp32, for a moment or for good: beside two bytes of moments a value, 8 MB are allowed."""
    p = nn.Parameter(torch.ones(1 << 13, 1 << 13, device="cuda", dtype=torch.bfloat16))
    adam = AdamW8bit([p])
    p.grad = torch.ones_like(p)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    adam.step()
    assert torch.cuda.max_memory_allocated() - before < p.numel() * (2 + 8 / 256) + 8e6
