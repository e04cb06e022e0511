"""NF4 on a GPU: the kernel is bitwise the reference on the CPU, at real sizes, in one launch and without a copy.

bitsandbytes is not needed: the weights are random bytes in its layout.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from whet.kernels import layer_weights, nf4
from whet.kernels.layer_weights import LayerWeights, ProjectionWeight
from whet.kernels.nf4 import NF4Weight, dequantize_nf4, dequantize_nf4_reference, stack

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

# fmt: off
CODE = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
# fmt: on


def random_weight(rows: int, columns: int, double: bool, device: str) -> NF4Weight:
    generator = torch.Generator().manual_seed(rows * columns)
    size = rows * columns
    blocks = -(-size // 64)
    packed = torch.randint(0, 256, (-(-size // 2),), generator=generator, dtype=torch.uint8)
    fields: dict[str, torch.Tensor] = {"absmax": torch.rand(blocks, generator=generator)}
    if double:
        fields = {
            "absmax": torch.randint(0, 256, (blocks,), generator=generator, dtype=torch.uint8),
            "code2": torch.linspace(-1, 1, 256),
            "absmax2": torch.rand(-(-blocks // 256), generator=generator) * 0.1,
            "offset": torch.tensor(0.137),
        }
    fields = {name: x.to(device) for name, x in (fields | {"packed": packed, "code": torch.tensor(CODE)}).items()}
    return NF4Weight(rows=rows, columns=columns, dtype=torch.bfloat16, **fields)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 8), (5, 72), (130, 192), (7, 100), (3, 33), (1024, 4096), (4096, 14336), (14336, 4096)]
)
def test_kernel_is_bitwise_the_reference(rows: int, columns: int, double: bool, dtype: torch.dtype) -> None:
    """Catches a fused multiply-add, a rounding other than the CPU's, and an offset that overflows."""
    expected = dequantize_nf4_reference(random_weight(rows, columns, double, "cpu"), dtype=dtype)
    weight = random_weight(rows, columns, double, "cuda")
    assert torch.equal(dequantize_nf4(weight, dtype=dtype).cpu(), expected)
    buffer = torch.full((rows + 1, columns + 64), float("nan"), device="cuda", dtype=dtype)
    out = buffer[:rows, :columns]
    assert dequantize_nf4(weight, out) is out
    assert torch.equal(out.cpu(), expected)
    assert buffer[rows:].isnan().all()
    assert buffer[:, columns:].isnan().all()


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shapes", [[(256, 64), (256, 64)], [(4096, 4096), (1024, 4096), (1024, 4096)]])
def test_a_stack_is_bitwise_the_weights_one_after_another(shapes: list[tuple[int, int]], double: bool) -> None:
    """Catches a part read with another's absmax2 or offset, and weights that are copied to be stacked."""
    weights = [random_weight(*shape, double, "cuda") for shape in shapes]
    for i, weight in enumerate(weights):  # no two alike
        scales = {"offset": weight.offset + i, "absmax2": weight.absmax2 * (i + 1)} if double else {}
        weights[i] = dataclasses.replace(weight, packed=weight.packed + i, **scales)
    packed, absmax = torch.cat([w.packed for w in weights]), torch.cat([w.absmax for w in weights])
    parts = [
        dataclasses.replace(w, packed=p, absmax=a)
        for w, p, a in zip(
            weights,
            packed.split([w.packed.numel() for w in weights]),
            absmax.split([w.absmax.numel() for w in weights]),
            strict=True,
        )
    ]
    stacked = stack(parts)
    assert stacked is not None
    assert stacked.packed.data_ptr() == packed.data_ptr()
    assert stacked.absmax.data_ptr() == absmax.data_ptr()
    separate = torch.cat([dequantize_nf4(w) for w in weights])
    assert separate.dtype == torch.bfloat16
    out = torch.full((separate.shape[0], separate.shape[1] + 64), float("nan"), device="cuda", dtype=torch.bfloat16)
    assert torch.equal(dequantize_nf4(stacked, out[:, :-64]), separate)
    assert out[:, -64:].isnan().all()
    assert torch.equal(dequantize_nf4_reference(stacked), separate)
    assert stack(weights) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize(
    "shapes", [[(6144, 4096), (4096, 4096), (4096, 14336)], [(130, 192), (896, 4864), (5, 72)], [(33, 8), (3, 904)]]
)
def test_a_layer_in_one_launch_is_bitwise_the_reference(shapes: list[tuple[int, int]], dtype: torch.dtype) -> None:
    """Catches a row or absmax that is found wrongly, where all programs are whole and where they are not."""
    projections = []
    for i, (rows, columns) in enumerate(shapes):
        weight = random_weight(rows, columns, True, "cuda")
        down, up = torch.randn(5, columns, device="cuda"), torch.randn(rows, 5, device="cuda")
        projections.append(ProjectionWeight(weight, [down], [up], [0.5], 8 * (i + 1)))
    assert layer_weights.takes(projections)
    layer = LayerWeights(projections, dtype)
    expected, got = (torch.full((layer.size,), float("nan"), device="cuda", dtype=dtype) for _ in range(2))
    layer_weights.layer_weights_reference(layer, expected)
    layer_weights.layer_weights_triton(layer, got)
    for p, a, b in zip(projections, layer.views(expected), layer.views(got), strict=True):
        rows, columns = p.weight.rows, p.weight.columns
        assert not a[:rows].isnan().any()
        assert torch.equal(a[:rows], b[:rows])
        assert torch.equal(a[rows:, :columns], b[rows:, :columns])
        assert torch.equal(a[:rows, :columns].cpu(), dequantize_nf4_reference(to_cpu(p.weight), dtype=dtype))


def to_cpu(weight: NF4Weight) -> NF4Weight:
    tensors = {f.name: getattr(weight, f.name) for f in dataclasses.fields(weight)}
    return dataclasses.replace(weight, **{k: x.cpu() for k, x in tensors.items() if isinstance(x, torch.Tensor)})


def test_one_launch_and_no_allocation() -> None:
    """Catches a helper kernel or a copy beside the one launch, and a wait for the device."""
    weight = random_weight(4096, 4096, True, "cuda")
    out = torch.empty(4096, 4096, device="cuda", dtype=torch.bfloat16)
    nf4.dequantize_nf4(weight, out)  # compiles
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        nf4.dequantize_nf4(weight, out)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.max_memory_allocated() == before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        nf4.dequantize_nf4(weight, out)
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) == 1, kernels
