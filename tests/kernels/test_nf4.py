"""NF4: bitwise what bitsandbytes writes, on the CPU; the Triton kernel (interpreted) bitwise the reference."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit

from tests.kernels.interpreter import needs_interpreter
from whet.kernels import nf4
from whet.kernels.nf4 import NF4Weight, dequantize_nf4, stack

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# below a block, several programs (130x192: 390 blocks), more than one group of 256, blocks across rows, a last partial
# block, an odd number of weights
SHAPES = [(1, 8), (3, 64), (130, 192), (5, 72), (7, 100), (3, 33)]


def params4bit(rows: int, columns: int, dtype: torch.dtype = torch.float32, **options: Any) -> bnb.nn.Params4bit:
    generator = torch.Generator().manual_seed(rows * columns)
    weight = torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator)
    options = {"quant_type": "nf4", "compress_statistics": True} | options
    return bnb.nn.Params4bit(weight.to(dtype), requires_grad=False, **options)._quantize("cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_reference_is_bitsandbytes(rows: int, columns: int, double: bool, dtype: torch.dtype) -> None:
    """Catches swapped nibbles, a wrong group of absmax, a forgotten offset, a fused or reordered product."""
    weight = params4bit(rows, columns, dtype, compress_statistics=double)
    ours = dequantize_nf4(NF4Weight.from_params4bit(weight))
    theirs = dequantize_4bit(weight.data, weight.quant_state)
    assert ours.dtype == dtype
    assert torch.equal(ours, theirs)


def test_reference_into_a_view_and_another_dtype() -> None:
    """Catches a write past the width, and a weight that is rounded to its own dtype on the way to another."""
    weight = params4bit(5, 72, torch.bfloat16)
    exact = dequantize_nf4(NF4Weight.from_params4bit(weight), dtype=torch.float32)
    state = weight.quant_state
    state.dtype = torch.float32
    assert torch.equal(exact, dequantize_4bit(weight.data, state))
    buffer = torch.full((5, 80), float("nan"))
    out = buffer[:, :72]
    assert dequantize_nf4(NF4Weight.from_params4bit(weight), out) is out
    assert torch.equal(out, exact)
    assert buffer[:, 72:].isnan().all()


def test_sixteen_bit_storage() -> None:
    """Catches bytes read from a quant_storage of bf16 as numbers: FSDP needs such storage."""
    weight, plain = params4bit(6, 64, quant_storage=torch.bfloat16), params4bit(6, 64)
    assert weight.data.dtype == torch.bfloat16
    assert torch.equal(*(dequantize_nf4(NF4Weight.from_params4bit(w)) for w in (weight, plain)))


def test_nothing_is_copied() -> None:
    """Catches a constructor that duplicates the weights on the card."""
    weight = params4bit(6, 64)
    view = NF4Weight.from_params4bit(weight)
    assert view.packed.data_ptr() == weight.data.data_ptr()
    assert view.absmax.data_ptr() == weight.quant_state.absmax.data_ptr()


def test_bitsandbytes_is_not_imported() -> None:
    """Catches an import that would make every machine need bitsandbytes."""
    code = "import sys, whet.kernels.nf4; sys.exit('bitsandbytes' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@needs_interpreter
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(("rows", "columns"), [*SHAPES[:4], (256, 64)])
def test_kernel_is_the_reference(rows: int, columns: int, double: bool) -> None:
    """Catches a wrong row or mask at the end of a program, and a fused multiply-add; (256, 64) has no such end."""
    weight = NF4Weight.from_params4bit(params4bit(rows, columns, compress_statistics=double))
    assert nf4.kernel_takes(weight)
    buffer = torch.full((rows + 1, columns + 3), float("nan"))
    out = buffer[:rows, :columns]
    assert nf4.dequantize_nf4_triton(weight, out) is out
    assert torch.equal(out, nf4.dequantize_nf4_reference(weight))
    assert buffer[rows:].isnan().all()
    assert buffer[:, columns:].isnan().all()
    assert torch.equal(nf4.dequantize_nf4_triton(weight), out)


def test_kernel_is_not_given_what_it_cannot_read() -> None:
    """Catches rows that end inside a word, and words that start inside one."""
    weight = NF4Weight.from_params4bit(params4bit(4, 64))
    assert not nf4.kernel_takes(NF4Weight.from_params4bit(params4bit(7, 100)))
    shifted = torch.cat((weight.packed.new_zeros(1), weight.packed))[1:]
    moved = dataclasses.replace(weight, packed=shifted)
    assert not nf4.kernel_takes(moved)
    assert torch.equal(dequantize_nf4(moved), dequantize_nf4(weight))


def several(*shapes: tuple[int, int], double: bool) -> list[NF4Weight]:
    """Weights that are ever larger, so that none can be read with another's absmax or offset."""
    weights = []
    for i, (rows, columns) in enumerate(shapes):
        generator = torch.Generator().manual_seed(i)
        values = torch.randn(rows, columns, generator=generator) * 4.0**i
        weight = bnb.nn.Params4bit(values, requires_grad=False, quant_type="nf4", compress_statistics=double)
        weights.append(NF4Weight.from_params4bit(weight._quantize("cpu")))
    return weights


def adjacent(weights: list[NF4Weight], gap: tuple[int, int] = (0, 0)) -> list[NF4Weight]:
    """Copies that lie one after another, between bytes of others; `gap` bytes of packed and blocks of absmax apart."""
    fields: dict[str, list[torch.Tensor]] = {}
    for (name, space), margin in zip({"packed": gap[0], "absmax": gap[1]}.items(), (64, 3), strict=True):
        parts = [getattr(w, name) for w in weights]
        buffer = parts[0].new_full((2 * margin + sum(p.numel() + space for p in parts),), 99)
        fields[name], start = [], margin
        for part in parts:
            fields[name].append(buffer[start : start + part.numel()].copy_(part))
            start += part.numel() + space
    pairs = zip(weights, fields["packed"], fields["absmax"], strict=True)
    return [dataclasses.replace(w, packed=packed, absmax=absmax) for w, packed, absmax in pairs]


STACKS = [[(256, 64), (256, 64)], [(256, 192), (512, 192), (256, 192)]]  # groups of 256 blocks: 1 + 1, 3 + 6 + 3


@pytest.mark.parametrize("run", [dequantize_nf4, pytest.param(nf4.dequantize_nf4_triton, marks=needs_interpreter)])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shapes", STACKS)
def test_a_stack_is_the_weights_one_after_another(
    shapes: list[tuple[int, int]], double: bool, run: Callable[..., torch.Tensor]
) -> None:
    """Catches parts read with the first one's absmax2 or offset, and a stack that starts where the storage does."""
    parts = adjacent(several(*shapes, double=double))
    stacked = stack(parts)
    assert stacked is not None
    expected = torch.cat([nf4.dequantize_nf4_reference(part) for part in parts])
    assert (stacked.rows, stacked.columns) == tuple(expected.shape)
    assert stacked.packed.data_ptr() == parts[0].packed.data_ptr()
    assert stacked.absmax.data_ptr() == parts[0].absmax.data_ptr()
    assert nf4.kernel_takes(stacked)
    assert torch.equal(run(stacked), expected)


def test_a_stack_stacks() -> None:
    """Catches a stack's offsets, one a group, taken for a single one."""
    parts = adjacent(several(*STACKS[1], double=True))
    two = stack(parts[:2])
    assert two is not None
    three = stack([two, parts[2]])
    assert three is not None
    assert torch.equal(dequantize_nf4(three), torch.cat([dequantize_nf4(part) for part in parts]))


@pytest.mark.parametrize("double", [True, False])
def test_only_adjacent_weights_stack(double: bool) -> None:
    """Catches bytes of something else read as weights: behind a gap, in another order, across two allocations."""
    weights = several((256, 64), (256, 64), double=double)
    assert stack(adjacent(weights)) is not None
    assert stack(weights) is None
    assert stack(adjacent(weights)[::-1]) is None
    assert stack(adjacent(weights, gap=(8, 0))) is None
    assert stack(adjacent(weights, gap=(0, 1))) is None
    # Neighbours by address, in storages that end between them: no view spans both.
    parts = adjacent(weights)
    apart = [dataclasses.replace(p, packed=torch.from_numpy(p.packed.numpy())) for p in parts]
    assert apart[0].packed.data_ptr() + apart[0].packed.nbytes == apart[1].packed.data_ptr()
    assert stack(apart) is None


def test_only_weights_alike_stack() -> None:
    """Catches rows cut at the wrong width, and a part dequantized by another's rule or into another's dtype."""
    assert stack(adjacent(several((256, 64), (128, 128), double=False))) is None
    assert stack(adjacent(several((256, 64), (128, 128), double=True))) is None
    first, second = adjacent(several((256, 64), (256, 64), double=True))
    assert stack([first, dataclasses.replace(second, dtype=torch.bfloat16)]) is None
    assert first.code2 is not None
    assert stack([first, dataclasses.replace(second, code2=first.code2 * 2)]) is None
    single = {"code2": None, "absmax2": None, "offset": None}
    assert stack([first, dataclasses.replace(second, **single)]) is None
    assert stack([dataclasses.replace(first, **single), second]) is None


def test_only_whole_blocks_and_groups_stack() -> None:
    """Catches a part that begins inside another's group of 256 blocks, or inside another's block of 64 weights."""
    shapes = [(128, 64), (256, 64)]  # 128 blocks
    assert stack(adjacent(several(*shapes, double=True))) is None
    assert stack(adjacent(several(*shapes, double=False))) is not None
    for double in (True, False):
        shapes = [(2047, 8), (2048, 8)]  # 256 blocks, the last of 56 weights
        assert stack(adjacent(several(*shapes, double=double))) is None


def test_refusals_name_what_is_wrong() -> None:
    """Catches a layout that would be read as NF4 in blocks of 64 and is not: the weights would be noise, in silence."""
    read = NF4Weight.from_params4bit
    with pytest.raises(ValueError, match="no quant_state"):
        read(torch.nn.Parameter(torch.zeros(2, 2)))
    with pytest.raises(ValueError, match="quant_type is 'fp4'"):
        read(params4bit(4, 64, quant_type="fp4"))
    with pytest.raises(ValueError, match="blocksize is 128"):
        read(params4bit(4, 128, blocksize=128))
    weight = params4bit(4, 64)
    with pytest.raises(ValueError, match="transposed"):
        read(SimpleNamespace(data=weight.data.t(), quant_state=weight.quant_state))
    with pytest.raises(ValueError, match="64 bytes of packed weights; 4x64 need 128"):
        read(SimpleNamespace(data=weight.data[:64], quant_state=weight.quant_state))
    weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="repacked"):
        read(weight)
    weight = params4bit(4, 64)
    weight.quant_state.state2.blocksize = 4096
    with pytest.raises(ValueError, match="nested blocksize is 4096"):
        read(weight)
    weight = params4bit(4, 64)
    weight.quant_state.shape = torch.Size([256])
    with pytest.raises(ValueError, match="only matrices"):
        read(weight)
    weight = params4bit(4, 64)
    weight.quant_state.absmax = weight.quant_state.absmax[:3]
    with pytest.raises(ValueError, match="3 absmax; 4x64 need 4"):
        read(weight)


def test_refuses_an_output_that_does_not_fit() -> None:
    """Catches a write outside of `out`, and a dtype that is asked for twice."""
    weight = NF4Weight.from_params4bit(params4bit(4, 64))
    with pytest.raises(ValueError, match="must be 4x64"):
        dequantize_nf4(weight, torch.empty(64, 4))
    with pytest.raises(ValueError, match="must be 4x64"):
        dequantize_nf4(weight, torch.empty(64, 4).t())
    with pytest.raises(ValueError, match="pass one of them"):
        dequantize_nf4(weight, torch.empty(4, 64), torch.bfloat16)
