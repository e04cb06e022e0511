"""fp32 rounded to bf16 at random, so that the mean of many roundings is the number itself.

    out = the bf16 next to x towards 0, or with probability f the one after it

f is where x lies between the two: 0 at the first, 1 at the second. bf16 is the upper half of fp32's bits, so 16 random
bits are added to the lower half, which is then cut off: exact for normal and subnormal numbers of either sign. What
bf16 can hold stays, infinities and NaN too. Between bf16's largest number and the next power of 2 the way up ends at
infinity, as it does in rounding to nearest.

The random bits are a hash of the seed, the step, the number of a value's block and its place in the block: no generator
has a state, torch's is left alone, and a value is rounded the same whatever else is rounded with it, on any device.

    k0, k1 = splitmix64's finalizer, twice, over seed and step        mix = MurmurHash3's finalizer of 32 bits
    r = mix(block ^ k0), s = mix(r ^ k1), h(l) = mix(mix(r + l * 0x9E3779B9) ^ s)                       for l < 128
    value l of the block takes the lower 16 bits of h(l), value l + 128 the upper ones

Sources: Gupta et al. 2015, arXiv:1502.02551; Zamirai et al. 2020, arXiv:2010.06192 (bf16 weights); Appleby's
MurmurHash3; Steele, Lea & Flood 2014 (SplitMix64).
Shapes: x, out [N]; N values, in blocks of 256 but for the last, which may be shorter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from whet.kernels._precision import form
from whet.kernels._triton import fused, jit, jit_for_any, tl, triton

BLOCK = 256  # values whose random bits are numbered together
_HALF = 128
_BLOCKS_A_PROGRAM = 8
_LOW = 0xFFFFFFFF
_LONG = 0xFFFFFFFFFFFFFFFF


def _mix64(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _LONG
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _LONG
    return z ^ (z >> 31)


def _keys(seed: int, step: int) -> tuple[int, int]:
    """Two words of 32 bits."""
    key = _mix64(_mix64(seed + 0x9E3779B97F4A7C15 & _LONG) + step & _LONG)
    return key & _LOW, key >> 32


def kernel_keys(seed: int, step: int) -> list[int]:
    """`_keys` as Triton's int32."""
    return [key - (1 << 32) if key >> 31 else key for key in _keys(seed, step)]


def _times(h: Tensor, factor: int) -> Tensor:
    """The lower 32 bits of a product; int64 holds both parts of it, but not the whole."""
    return (h * (factor & 0xFFFF) + ((h * (factor >> 16) & 0xFFFF) << 16)) & _LOW


def _mix_reference(h: Tensor) -> Tensor:
    h = _times(h ^ (h >> 16), 0x85EBCA6B)
    h = _times(h ^ (h >> 13), 0xC2B2AE35)
    return h ^ (h >> 16)


def random_bits_reference(blocks_B: Tensor, *, seed: int, step: int) -> Tensor:
    """int64 [B, 256], 0 to 65,535, for the blocks of these numbers."""
    k0, k1 = _keys(seed, step)
    r = _mix_reference(blocks_B.long()[:, None] ^ k0)
    s = _mix_reference(r ^ k1)
    lanes = _times(torch.arange(_HALF, device=blocks_B.device), 0x9E3779B9)
    h = _mix_reference(_mix_reference((r + lanes) & _LOW) ^ s)
    return torch.cat((h & 0xFFFF, h >> 16), dim=1)


def stochastic_round_reference(x_N: Tensor, blocks: Tensor | int, *, seed: int, step: int) -> Tensor:
    """`stochastic_round` in torch, on any device."""
    n = x_N.numel()
    count = -(-n // BLOCK)
    if isinstance(blocks, int):
        blocks = torch.arange(blocks, blocks + count, device=x_N.device)
    bits = x_N.contiguous().view(torch.int32).long() & _LOW
    rounded = (bits + random_bits_reference(blocks[:count], seed=seed, step=step).view(-1)[:n]) >> 16
    rounded = torch.where((bits & 0x7FFFFFFF) > 0x7F800000, bits >> 16 | 0x40, rounded)  # NaN: quiet, of the same sign
    return torch.where(rounded > 0x7FFF, rounded - 0x10000, rounded).to(torch.int16).view(torch.bfloat16)


@jit
def _mix(h):
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    return h ^ (h >> 16)


@jit
def random_words(block, k0, k1, HALF: tl.constexpr):
    """h of the docstring, uint32 [BLOCKS, 128], for the blocks of these numbers, int32 [BLOCKS]."""
    r = _mix(block.to(tl.uint32, bitcast=True) ^ k0)
    s = _mix(r ^ k1)
    spread = tl.arange(0, HALF).to(tl.uint32) * 0x9E3779B9
    return _mix(_mix(r[:, None] + spread[None, :]) ^ s[:, None])


@jit
def rounded_bits(bits, random):
    """The upper half of fp32's bits, uint32, rounded by 16 random ones."""
    cut = (bits + random) >> 16
    return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, (bits >> 16) | 0x40, cut)


@jit_for_any("first", "k0", "k1")
def _round_kernel(
    x, out, blocks, N, first, k0, k1,
    HAS_TABLE: tl.constexpr, BLOCKS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """x and out as int32 and int16, their bits: nothing is computed in floating point, and NaN pass as they are."""
    row = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    lane = tl.arange(0, HALF)
    start = row[:, None] * (2 * HALF) + lane[None, :]
    block = tl.load(blocks + row, mask=row * (2 * HALF) < N, other=0) if HAS_TABLE else first + row.to(tl.int32)
    h = random_words(block, k0, k1, HALF)
    low = tl.load(x + start, mask=start < N, other=0).to(tl.uint32, bitcast=True)
    high = tl.load(x + start + HALF, mask=start + HALF < N, other=0).to(tl.uint32, bitcast=True)
    tl.store(out + start, rounded_bits(low, h & 0xFFFF).to(tl.int16), mask=start < N)
    tl.store(out + start + HALF, rounded_bits(high, h >> 16).to(tl.int16), mask=start + HALF < N)


def stochastic_round_triton(x_N: Tensor, out_N: Tensor, blocks: Tensor | int, *, seed: int, step: int) -> None:
    n = x_N.numel()
    if n == 0:
        return
    table = blocks if isinstance(blocks, Tensor) else None
    with torch.cuda.device_of(x_N):  # type: ignore[no-untyped-call]
        _round_kernel[(triton.cdiv(n, BLOCK * _BLOCKS_A_PROGRAM),)](
            x_N.view(torch.int32), out_N.view(torch.int16), x_N if table is None else table, n,
            blocks if table is None else 0, *kernel_keys(seed, step),
            HAS_TABLE=table is not None, BLOCKS=_BLOCKS_A_PROGRAM, HALF=_HALF, num_warps=4,
        )  # fmt: skip


def stochastic_round(x_N: Tensor, out_N: Tensor, blocks: Tensor | int, *, seed: int, step: int) -> Tensor:
    """Round x, fp32 [N], into out, bf16 [N], both contiguous. Returns out.

    blocks: the number of each block of 256 values, int32 [ceil(N / 256)] on x's device; or the first one's, below 2^31,
    from which they count up. Different blocks of one seed and step, and different steps, have different random bits.
    """
    _check(x_N, out_N, blocks)
    if fused(x_N):
        stochastic_round_triton(x_N, out_N, blocks, seed=seed, step=step)
        return out_N
    return out_N.copy_(stochastic_round_reference(x_N, blocks, seed=seed, step=step))


def _check(x: Tensor, out: Tensor, blocks: Tensor | int) -> None:
    """The kernel reads memory as it lies: what is not as promised is an error, not other numbers."""
    for name, tensor, dtype in (("x", x, torch.float32), ("out", out, torch.bfloat16)):
        if tensor.dtype != dtype or tensor.dim() != 1 or not tensor.is_contiguous():
            raise ValueError(f"{name} is {form(tensor)}; it must be a contiguous {dtype} [N]")
    if x.shape != out.shape or x.device != out.device:
        raise ValueError(f"x is {form(x)} and out {form(out)}; they must be of one size, on one device")
    count = -(-x.numel() // BLOCK)
    if isinstance(blocks, int):
        if not 0 <= blocks <= 2**31 - count:
            raise ValueError(f"blocks are numbered {blocks} to {blocks + count - 1}; numbers go from 0 to 2^31 - 1")
    elif blocks.dtype != torch.int32 or blocks.shape != (count,) or blocks.device != x.device:
        raise ValueError(f"blocks is {form(blocks)}; it must be torch.int32 [{count}] on {x.device}")
    elif not blocks.is_contiguous():
        raise ValueError(f"blocks is strided by {blocks.stride(0)}; it must be contiguous")
