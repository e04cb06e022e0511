"""AdamW on moments of 8 bits, for many parameters in one launch.

    m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2        w = (1 - lr d) w - lr c2 / c1 m / (sqrt(v) + c2 e)
    c1 = 1 - b1^t                c2 = sqrt(1 - b2^t)            at step t, with decay d and epsilon e

in fp32. A moment is stored as bitsandbytes does it: the largest magnitude of each block of 256 values, and for each
value the number of the nearest of 256 in a map, after division by that magnitude; of two as near, the lower. Blocks
whose largest is below fp32's smallest normal number are stored as 0. Small parameters keep moments in fp32 instead. A
weight in bf16 is rounded at random, by the bits that kernels/stochastic_round.py says, or to nearest as others are.
Where v would not be finite (a gradient that is infinite, NaN, or whose square is too large) a value keeps its weight
and moments, and its neighbours are updated.

Moments are the reference's to the bit, since no product is fused into a sum. The square roots are the device's fast
ones, 2 units of the last place from the exact, so an update of a weight is as near before it is rounded. sqrt(v) + c2 e
counts as 3e-19 at least, whose square fp32 still holds.

The nearest number is looked up: the upper 16 bits of fp32 (sign, exponent, 7 bits of the mantissa) name a cell, and a
table holds where the cell's lowest value goes. Numbers of a map must be so far apart that at most one middle between
two of them lies in a cell; then one comparison with the middle above settles it. Those of bitsandbytes are.

A table on the device holds the addresses of every parameter and what belongs to it, and another one each program's
parameter; both are made again when something has moved. Nothing waits for the device.

Sources: Loshchilov & Hutter 2019, arXiv:1711.05101 (AdamW); Dettmers et al. 2022, arXiv:2110.02861 (8-bit moments).
Shapes: a parameter, its gradient and moments each N values that lie in one piece; scales [ceil(N / 256)].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from whet.kernels._precision import form
from whet.kernels._triton import fused, jit, jit_for_any, tl
from whet.kernels.stochastic_round import (
    BLOCK,
    kernel_keys,
    random_words,
    rounded_bits,
    stochastic_round_reference,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FIELDS = 9  # of a parameter in the table
_HALF = 128
_BLOCKS_A_PROGRAM = 8
_CELLS = 1 << 16
_SMALLEST = 2.0**-126


class Entry(NamedTuple):
    """A parameter, what its update reads and writes, and the number of its first block among all parameters' blocks.

    Moments are uint8 with scales in fp32, or fp32 with none.
    """

    weight: Tensor
    grad: Tensor
    moment1: Tensor
    moment2: Tensor
    scale1: Tensor | None
    scale2: Tensor | None
    first: int


class Update(NamedTuple):
    """What all parameters of a launch agree on. seed: of stochastic rounding; None where weights go to the nearest."""

    step: int
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    seed: int | None = None


class _Factors(NamedTuple):
    beta1: float
    rest1: float
    beta2: float
    rest2: float
    keep: float
    size: float
    eps: float


@dataclass(frozen=True, eq=False)
class CodeMap:
    """A map of 256 ascending numbers, on a device, and the tables by which the nearest is found."""

    numbers: Tensor  # fp32 [256]
    middles: Tensor  # fp32 [256]: between a number and the next; infinity after the last
    cells: Tensor  # uint8 [65536]: the code of each cell's lowest value
    zero: int  # the code of 0

    @classmethod
    def of(cls, numbers: Tensor) -> CodeMap:
        """Reads the map on the host. Raises ValueError if it isn't 256 ascending numbers with 0, or they lie too close
        for one comparison."""
        known = numbers.detach().cpu()
        if known.dtype != torch.float32 or known.shape != (256,) or not bool((known.diff() > 0).all()):
            raise ValueError(f"the map is {known.dtype} {list(known.shape)}; it must be 256 ascending numbers in fp32")
        if not bool((known == 0).any()):
            raise ValueError("the map has no 0, so it can't hold a block of zeros")
        middles = (known[:-1] + known[1:]) / 2
        upper = torch.arange(_CELLS) << 16
        ends = torch.stack((upper, upper | 0xFFFF))
        ends = torch.where(ends > 0x7FFFFFFF, ends - (1 << 32), ends).to(torch.int32).view(torch.float32)
        codes = torch.searchsorted(middles, ends)
        codes = torch.where(ends.isnan(), codes[0], codes)  # infinity's cell ends in NaN
        if bool(((codes[0] - codes[1]).abs() > 1).any()):
            raise ValueError("two middles between numbers of the map lie in one cell: one comparison can't tell")
        device = numbers.device
        middles = torch.cat((middles, torch.tensor([math.inf])))
        zero = int((known == 0).nonzero())
        return cls(numbers.detach(), middles.to(device), codes.amin(0).to(torch.uint8).to(device), zero)


def _factors(u: Update) -> _Factors:
    c1, c2 = 1 - u.beta1**u.step, math.sqrt(1 - u.beta2**u.step)
    keep, size = 1 - u.lr * u.weight_decay, -u.lr * c2 / c1
    return _Factors(u.beta1, 1 - u.beta1, u.beta2, 1 - u.beta2, keep, size, u.eps * c2)


# ---------------------------------------------------------------- reference


def adamw_8bit_reference(entries: Sequence[Entry], maps: tuple[CodeMap, CodeMap] | None, update: Update) -> None:
    """`adamw_8bit` in torch, on any device."""
    f = _factors(update)
    for entry in entries:
        w, g = entry.weight.detach().reshape(-1).float(), entry.grad.reshape(-1).float()
        m, v = _read(entry, maps)
        new_m = m * f.beta1 + g * f.rest1
        new_v = v * f.beta2 + g * f.rest2 * g
        good = new_v < math.inf
        w = torch.where(good, w * f.keep + new_m / (new_v.sqrt() + f.eps) * f.size, w)
        if update.seed is not None and entry.weight.dtype == torch.bfloat16:
            w = stochastic_round_reference(w, entry.first, seed=update.seed, step=update.step)
        entry.weight.detach().view(-1).copy_(w)
        _write(entry, maps, torch.where(good, new_m, m), torch.where(good, new_v, v))


def _read(entry: Entry, maps: tuple[CodeMap, CodeMap] | None) -> tuple[Tensor, Tensor]:
    m, v = entry.moment1.view(-1), entry.moment2.view(-1)
    if maps is None:
        return m, v
    assert entry.scale1 is not None
    assert entry.scale2 is not None
    scales = (scale.repeat_interleave(BLOCK)[: m.numel()] for scale in (entry.scale1, entry.scale2))
    m, v = (one.numbers[codes.int()] * scale for one, codes, scale in zip(maps, (m, v), scales, strict=True))
    return m, v


def _write(entry: Entry, maps: tuple[CodeMap, CodeMap] | None, m: Tensor, v: Tensor) -> None:
    if maps is None:
        entry.moment1.view(-1).copy_(m)
        entry.moment2.view(-1).copy_(v)
        return
    outs = (entry.moment1, entry.scale1), (entry.moment2, entry.scale2)
    for x, one, (codes, scale) in zip((m, v), maps, outs, strict=True):
        assert scale is not None
        rows = torch.nn.functional.pad(x, (0, -x.numel() % BLOCK)).view(-1, BLOCK)
        scale.copy_(rows.abs().amax(1))
        nearest = torch.searchsorted(one.middles, (rows * _inverse(scale)[:, None]).view(-1)[: x.numel()])
        codes.view(-1).copy_(nearest)


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale >= _SMALLEST, 1 / scale, 0.0)


# ---------------------------------------------------------------- kernel


@jit
def _look_up(numbers, at):
    """Of 256 numbers those at `at`, [BLOCKS, HALF]. `gather` goes by shared memory, where a warp's 32 places cost a few
    cycles; a load would take one for each line of the cache that they lie in."""
    whole = tl.load(numbers + tl.arange(0, 256))
    found = tl.gather(whole, tl.reshape(at.to(tl.int32), (at.shape[0] * at.shape[1],)), 0)
    return tl.reshape(found, (at.shape[0], at.shape[1]))


@jit
def _updated(
    weights, grads, moments1, moments2, scale1, scale2, numbers1, numbers2, zero1, zero2, at, inside,
    beta1, rest1, beta2, rest2, keep, size, eps, EIGHT_BITS: tl.constexpr,
):  # fmt: skip
    """Weights and both moments of half the values of each block."""
    w = tl.load(weights + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grads + at, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(moments1 + at, mask=inside, other=zero1)
    v = tl.load(moments2 + at, mask=inside, other=zero2)
    if EIGHT_BITS:
        m = _look_up(numbers1, m) * scale1[:, None]
        v = _look_up(numbers2, v) * scale2[:, None]
    new_m = m * beta1 + g * rest1
    new_v = v * beta2 + g * rest2 * g
    good = new_v < float("inf")
    q = tl.sqrt(new_v) + eps
    inverse = tl.rsqrt(tl.maximum(q * q, 1e-37))  # a quotient takes eight instructions, this three
    w = tl.where(good, w * keep + new_m * inverse * size, w)
    return w, tl.where(good, new_m, m), tl.where(good, new_v, v)


@jit
def _largest(low, high):
    return tl.maximum(tl.max(tl.abs(low), axis=1), tl.max(tl.abs(high), axis=1))


@jit
def _codes(x, inverse, middles, cells):
    x = x * inverse[:, None]
    code = tl.load(cells + ((x.to(tl.int32, bitcast=True) >> 16) & 0xFFFF)).to(tl.int32)
    return (code + (x > _look_up(middles, code)).to(tl.int32)).to(tl.uint8)


@jit
def _write_moment(
    moments, scales, low, high, numbers, middles, cells, block, blocks, at, n, HALF: tl.constexpr,
    EIGHT_BITS: tl.constexpr,
):  # fmt: skip
    if EIGHT_BITS:
        scale = _largest(low, high)
        tl.store(scales + block, scale, mask=block < blocks)
        normal = scale >= 1.1754943508222875e-38
        inverse = tl.where(normal, tl.div_rn(1.0, tl.where(normal, scale, 1.0)), 0.0)
        tl.store(moments + at, _codes(low, inverse, middles, cells), mask=at < n)
        tl.store(moments + at + HALF, _codes(high, inverse, middles, cells), mask=at + HALF < n)
    else:
        tl.store(moments + at, low, mask=at < n)
        tl.store(moments + at + HALF, high, mask=at + HALF < n)


@jit_for_any("k0", "k1")
def _adamw_kernel(
    table, owners, like, numbers1, middles1, cells1, zero1, numbers2, middles2, cells2, zero2,
    beta1, rest1, beta2, rest2, keep, size, eps, k0, k1,
    EIGHT_BITS: tl.constexpr, AT_RANDOM: tl.constexpr, ALIGNED: tl.constexpr, BLOCKS: tl.constexpr, HALF: tl.constexpr,
    FIELDS: tl.constexpr,
):  # fmt: skip
    """Fields of a parameter: see `_row`. A program updates BLOCKS of its blocks, each in two halves: a word of random
    bits serves one value of either."""
    program = tl.program_id(0)
    entry = table + tl.load(owners + program).to(tl.int64) * FIELDS
    moment = tl.pointer_type(tl.uint8) if EIGHT_BITS else tl.pointer_type(tl.float32)
    weights = tl.multiple_of(tl.load(entry).to(like.dtype), ALIGNED)
    grads = tl.multiple_of(tl.load(entry + 1).to(like.dtype), ALIGNED)
    moments1 = tl.multiple_of(tl.load(entry + 2).to(moment), ALIGNED)
    moments2 = tl.multiple_of(tl.load(entry + 3).to(moment), ALIGNED)
    scales1 = tl.load(entry + 4).to(tl.pointer_type(tl.float32))
    scales2 = tl.load(entry + 5).to(tl.pointer_type(tl.float32))
    n = tl.multiple_of(tl.load(entry + 6), ALIGNED)
    blocks = (n + 2 * HALF - 1) // (2 * HALF)
    block = (program - tl.load(entry + 7)) * BLOCKS + tl.arange(0, BLOCKS)
    at = block[:, None] * (2 * HALF) + tl.arange(0, HALF)[None, :]
    scale1 = tl.zeros((BLOCKS,), tl.float32)
    scale2 = tl.zeros((BLOCKS,), tl.float32)
    if EIGHT_BITS:
        scale1 = tl.load(scales1 + block, mask=block < blocks, other=0.0)
        scale2 = tl.load(scales2 + block, mask=block < blocks, other=0.0)
    w_low, m_low, v_low = _updated(
        weights, grads, moments1, moments2, scale1, scale2, numbers1, numbers2, zero1, zero2, at, at < n,
        beta1, rest1, beta2, rest2, keep, size, eps, EIGHT_BITS,
    )  # fmt: skip
    w_high, m_high, v_high = _updated(
        weights, grads, moments1, moments2, scale1, scale2, numbers1, numbers2, zero1, zero2, at + HALF, at + HALF < n,
        beta1, rest1, beta2, rest2, keep, size, eps, EIGHT_BITS,
    )  # fmt: skip
    if AT_RANDOM:
        h = random_words((tl.load(entry + 8) + block).to(tl.int32), k0, k1, HALF)
        low = rounded_bits(w_low.to(tl.uint32, bitcast=True), h & 0xFFFF)
        high = rounded_bits(w_high.to(tl.uint32, bitcast=True), h >> 16)
        bits = weights.to(tl.pointer_type(tl.int16))
        tl.store(bits + at, low.to(tl.int16), mask=at < n)
        tl.store(bits + at + HALF, high.to(tl.int16), mask=at + HALF < n)
    else:
        tl.store(weights + at, w_low.to(like.dtype.element_ty), mask=at < n)
        tl.store(weights + at + HALF, w_high.to(like.dtype.element_ty), mask=at + HALF < n)
    _write_moment(moments1, scales1, m_low, m_high, numbers1, middles1, cells1, block, blocks, at, n, HALF, EIGHT_BITS)
    _write_moment(moments2, scales2, v_low, v_high, numbers2, middles2, cells2, block, blocks, at, n, HALF, EIGHT_BITS)


@dataclass(eq=False)
class Tables:
    """Of one launch: where its parameters lie, and whose each program is. Made again when these are others."""

    rows: Tensor = field(init=False)  # int64 [parameters, FIELDS]
    owners: Tensor = field(init=False)  # int32 [programs]
    aligned: int = field(init=False)
    _known: list[list[int]] = field(default_factory=list)
    _stream: object = None

    def fill(self, entries: Sequence[Entry], maps: tuple[CodeMap, CodeMap] | None) -> None:
        """Also made again on another stream, which has not seen the copies."""
        device = entries[0].weight.device
        rows, first = [], 0
        for entry in entries:
            rows.append(_row(entry, first))
            first += _programs(entry)
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else device
        if stream == self._stream and rows == self._known:
            return
        _check(entries, maps)
        self.rows = _on(device, torch.tensor(rows, dtype=torch.int64))
        if stream != self._stream or [row[6:8] for row in rows] != [row[6:8] for row in self._known]:
            counts = torch.tensor([_programs(entry) for entry in entries])
            self.owners = _on(device, torch.arange(len(entries), dtype=torch.int32).repeat_interleave(counts))
        self.aligned = min(alignment(entry) for entry in entries)
        self._stream, self._known = stream, rows


def alignment(entry: Entry) -> int:
    """16 where the kernel may read 16 bytes at a time, 1 where it goes value by value: launch these apart."""
    weight, grad, moment1, moment2, *_ = entry
    places = weight.data_ptr() | grad.data_ptr() | moment1.data_ptr() | moment2.data_ptr()
    return 16 if (places | weight.numel()) % 16 == 0 else 1


def _programs(entry: Entry) -> int:
    return -(-entry.weight.numel() // (BLOCK * _BLOCKS_A_PROGRAM))


def _row(entry: Entry, program: int) -> list[int]:
    tensors = [0 if x is None else x.data_ptr() for x in entry[:6]]
    row = [*tensors, entry.weight.numel(), program, entry.first]
    assert len(row) == FIELDS
    return row


def _on(device: torch.device, x: Tensor) -> Tensor:
    """By a copy that the host does not wait for."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


def adamw_8bit_triton(
    entries: Sequence[Entry], maps: tuple[CodeMap, CodeMap] | None, update: Update, tables: Tables
) -> None:
    entries = [entry for entry in entries if entry.weight.numel()]
    if not entries:
        return
    tables.fill(entries, maps)
    like = entries[0].weight.detach()
    at_random = update.seed is not None and like.dtype == torch.bfloat16
    keys = kernel_keys(update.seed, update.step) if update.seed is not None and at_random else (0, 0)
    of_maps = [like, like, like, 0] * 2
    if maps is not None:
        of_maps = [x for one in maps for x in (one.numbers, one.middles, one.cells, one.zero)]
    with torch.cuda.device_of(like):  # type: ignore[no-untyped-call]
        _adamw_kernel[(tables.owners.numel(),)](
            tables.rows, tables.owners, like, *of_maps, *_factors(update), *keys,
            EIGHT_BITS=maps is not None, AT_RANDOM=at_random, ALIGNED=tables.aligned, BLOCKS=_BLOCKS_A_PROGRAM,
            HALF=_HALF, FIELDS=FIELDS, num_warps=4, enable_fp_fusion=False,  # every product is rounded, as in torch
        )  # fmt: skip


def adamw_8bit(entries: Sequence[Entry], maps: tuple[CodeMap, CodeMap] | None, update: Update, tables: Tables) -> None:
    """Update weights and moments in place, in one launch on the current stream. Entries have one dtype and device.

    Fastest where all have one `alignment`.
    maps: of the first and the second moment; None for moments in fp32. tables: kept by the caller from step to step,
    so that they are made once for parameters that stay where they are.
    Raises ValueError on what the kernel would misread.
    """
    if entries and fused(entries[0].weight):
        adamw_8bit_triton(entries, maps, update, tables)
        return
    _check(entries, maps)
    adamw_8bit_reference(entries, maps, update)


def _check(entries: Sequence[Entry], maps: tuple[CodeMap, CodeMap] | None) -> None:
    """The kernel reads memory as it lies: what is not as promised is an error, not other numbers."""
    for i, entry in enumerate(entries):
        weight, first = entry.weight, entries[0].weight
        if weight.dtype not in DTYPES or weight.dtype != first.dtype or weight.device != first.device:
            raise ValueError(f"weight {i} is {form(weight)}; it must be like the first, {form(first)}, in {DTYPES}")
        moment = torch.float32 if maps is None else torch.uint8
        values, blocks = weight.numel(), -(-weight.numel() // BLOCK)
        wanted = {"weight": (weight.dtype, values), "grad": (weight.dtype, values)}
        wanted |= dict.fromkeys(("moment1", "moment2"), (moment, values))
        if maps is not None:
            wanted |= dict.fromkeys(("scale1", "scale2"), (torch.float32, blocks))
        for name, (dtype, count) in wanted.items():
            x = getattr(entry, name)
            if x is None or x.dtype != dtype or x.numel() != count or x.device != weight.device:
                found = "missing" if x is None else form(x)
                raise ValueError(f"{name} {i} is {found}; it must be {dtype} with {count} values on {weight.device}")
            if not x.is_contiguous():
                raise ValueError(f"{name} {i} is {form(x)}; it must lie in one piece")
        if not 0 <= entry.first <= 2**31 - blocks:
            raise ValueError(f"the blocks of weight {i} are numbered from {entry.first}; numbers go from 0 to 2^31 - 1")
