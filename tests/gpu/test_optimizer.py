"""The optimizer that updates many parameters at once, on a GPU: bitwise bitsandbytes', and no waiting.

What is compared with bitsandbytes rounds bf16 to nearest, as it does; rounding at random has tests of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("bitsandbytes")

from bitsandbytes.optim import AdamW

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


def parameters(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator).to("cuda", d)) for d in DTYPES for s in SHAPES]


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


@pytest.mark.parametrize("chunk", [optimizer.CHUNK, 1 << 14, 1 << 17])
def test_weights_and_state_are_bitwise_bitsandbytes(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches fill that gets into a block's scale, and a chunk's buffers used before the last one has left them."""
    monkeypatch.setattr(optimizer, "CHUNK", chunk)
    one, other = parameters(), parameters()
    left, right = own(groups(one)), nearest(groups(other))
    for step in range(20):
        for of, adam in ((one, left), (other, right)):
            set_gradients(of, step)
            for group in adam.param_groups:
                group["lr"] *= 0.95
            adam.step()
        assert all(torch.equal(a, b) for a, b in zip(tensors(one, left), tensors(other, right), strict=True))


def test_a_checkpoint_of_bitsandbytes_goes_on_bitwise() -> None:
    """Catches moments loaded from a file that the next step doesn't use."""
    one, other = parameters(), parameters()
    left, right = own(groups(one)), nearest(groups(other))
    for step in range(5):
        set_gradients(one, step)
        left.step()
    right.load_state_dict(left.state_dict())
    with torch.no_grad():
        torch._foreach_copy_(other, one)
    for step in range(5, 10):
        for of, adam in ((one, left), (other, right)):
            set_gradients(of, step)
            adam.step()
    assert all(torch.equal(a, b) for a, b in zip(tensors(one, left), tensors(other, right), strict=True))


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


@pytest.mark.parametrize("chunk", [optimizer.CHUNK, 1 << 14, 1 << 17])
def test_bf16_is_rounded_at_random_and_nothing_else_changes(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches, against bitsandbytes' own steps on copies in fp32 that the reference rounds back: random bits that are
    not a value's own, rounded weights that gradients overwrite, pieces with another's moments."""
    monkeypatch.setattr(optimizer, "CHUNK", chunk)
    one, other = parameters(), parameters()
    copies = [nn.Parameter(p.detach().float()) if p.dtype == torch.bfloat16 else p for p in one]
    firsts, number = {}, 0
    for p in (*range(0, len(one), 2), *range(1, len(one), 2)):  # as in the two groups
        firsts[p], number = number, number - (-one[p].numel() // 256)
    left, right = own(groups(copies)), AdamW8bit(groups(other), seed=9)
    for step in range(12):
        for of, adam in ((one, left), (other, right)):
            set_gradients(of, step)
            for group in adam.param_groups:
                group["lr"] *= 0.95
        for p, copied in zip(one, copies, strict=True):
            copied.grad = None if p.grad is None else p.grad.to(copied.dtype)
        for adam in (left, right):
            adam.step()
        for i, (p, copied) in enumerate(zip(one, copies, strict=True)):
            if p is not copied and copied.grad is not None:
                done = left.state[copied]["step"]
                rounded = stochastic_round_reference(copied.detach().view(-1), firsts[i], seed=9, step=done)
                p.data.copy_(rounded.view(p.shape))
                copied.data.copy_(p)
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        for name in NAMES:
            for copied, p in zip(copies, other, strict=True):
                expected = left.state[copied].get(name)
                if expected is not None:
                    assert torch.equal(right.state[p][name], expected)


def test_a_resumed_run_rounds_as_the_run_itself() -> None:
    """Catches random bits that depend on the layout or the process: some have no gradient in the step resumed at."""
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
    """Catches transposed weights, gradients or moments read in another order than bitsandbytes reads them."""
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
        seen.append([t.clone() for t in tensors(of, adam)])
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_a_step_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the device-wide waits of bitsandbytes' own step, and copies to the host. With a large weight in bf16."""
    of = [*parameters(), nn.Parameter(torch.ones(optimizer.CHUNK + 300, device="cuda", dtype=torch.bfloat16))]
    adam = AdamW8bit(groups(of))
    for step in range(2):
        set_gradients(of, 2 + step)
        adam.step()
    set_gradients(of, 4)

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
    """Catches an update on the default stream that runs before gradients are there, or after weights are read."""
    one, other = parameters(), parameters()
    left, right = own(groups(one)), nearest(groups(other))
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


def test_the_buffers_are_small() -> None:
    """Catches buffers that grow with the model: 64 MB are allowed."""
    of = [nn.Parameter(torch.ones(16, 4096, device="cuda")) for _ in range(448)]
    adam = AdamW8bit(of)
    for p in of:
        p.grad = torch.ones_like(p)
    before = torch.cuda.memory_allocated()
    adam.step()
    moments = 448 * 65536 * (2 + 8 / 256)
    assert torch.cuda.memory_allocated() - before < moments + 64e6


def test_a_step_of_448_parameters_is_faster_by_far() -> None:
    """Catches a step that is launched parameter by parameter. 42M values, as for an 8B model with r=16."""
    times = []
    for make in (own, AdamW8bit):
        of = [nn.Parameter(torch.ones(16, n, device="cuda")) for n in [4096, 4096, 4096, 1024, 14336, 14336, 4096] * 64]
        adam = make([{"params": of}])
        for p in of:
            p.grad = torch.ones_like(p)
        for repeat in range(8):
            if repeat == 3:
                start = torch.cuda.Event(enable_timing=True)
                start.record()
            adam.step()
        end = torch.cuda.Event(enable_timing=True)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 5)
    print(f"\nbitsandbytes {times[0]:.2f} ms, ours {times[1]:.2f} ms a step")
    assert times[1] < times[0] / 2


def test_rounding_at_random_is_no_slower_than_its_traffic() -> None:
    """Catches a kernel bound by its arithmetic. 64M weights in bf16; by bytes 36 a value instead of 10.

    The host queues a step's launches behind a wait, so that only the GPU's time counts.
    """
    times = []
    for make in (nearest, AdamW8bit):
        p = nn.Parameter(torch.ones(1 << 13, 1 << 13, device="cuda", dtype=torch.bfloat16))
        adam = make([p])
        p.grad = torch.ones_like(p)
        for _ in range(3):
            adam.step()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(50_000_000)
        start.record()
        for _ in range(5):
            adam.step()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 5)
    print(f"\nto nearest {times[0]:.2f} ms, at random {times[1]:.2f} ms a step")
    assert times[1] < 4.5 * times[0]


def test_rounding_at_random_keeps_no_copy() -> None:
    """Catches weights kept in fp32: beside two bytes of moments a value, 64 MB are allowed."""
    p = nn.Parameter(torch.ones(1 << 13, 1 << 13, device="cuda", dtype=torch.bfloat16))
    adam = AdamW8bit([p])
    p.grad = torch.ones_like(p)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    adam.step()
    assert torch.cuda.max_memory_allocated() - before < p.numel() * (2 + 8 / 256) + 64e6
