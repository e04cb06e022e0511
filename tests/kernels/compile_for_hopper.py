"""Compiles whet's Triton kernels for Hopper, on a machine without a GPU, and prints as JSON what each one takes.

Triton asks its driver for the GPU only to launch. With a stand-in for the driver every launch compiles, and ends there.
The calls are those of bench/kernel_cases.py, in narrower shapes, and others that take branches of their own.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

ROOT = Path(__file__).parents[2]
TARGET = GPUTarget("cuda", 90, 32)
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
# Others ask `fused` whether they are on a GPU.
LOOK_FOR_THEMSELVES = (
    ("nf4", "dequantize_nf4"), ("fp8", "quantize_rows"), ("fp8", "dequantize_nf4_fp8"),
    ("layer_weights", "layer_weights"), ("glu", "glu"), ("glu", "glu_backward"), ("extend", "lay_out"),
)  # fmt: skip
BY_OTHERS = {"attention", "attention_backward", "flash4", "flash4_backward", "scaled_mm", "product", "lora_xa",
             "lora_dyb", "lora_db", "lora_da"}  # fmt: skip


def modules() -> list[ModuleType]:
    import whet.kernels

    names = [module.name for module in pkgutil.iter_modules(whet.kernels.__path__)]
    return [importlib.import_module(f"whet.kernels.{name}") for name in names]


def kernels() -> set[str]:
    """The names of those that are launched; others are called by them."""
    found = {name for m in modules() for name, x in vars(m).items() if isinstance(x, JITFunction)}
    return {name for name in found if name.endswith("_kernel")}


def compile_only(report: list[dict[str, Any]]) -> None:
    """From here on a launch compiles for TARGET and adds to the report."""
    stand_in = SimpleNamespace(
        get_current_target=lambda: TARGET, get_current_device=lambda: 0, get_current_stream=lambda device: 0
    )
    driver.set_active(stand_in)
    run = JITFunction.run

    def compiled(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        report.append({"kernel": self.fn.__name__, "warps": kernel.metadata.num_warps} | resources(kernel))
        return kernel

    JITFunction.run = compiled
    for module in modules():
        if hasattr(module, "fused"):
            module.fused = lambda x: True
    for module, name in LOOK_FOR_THEMSELVES:
        module = importlib.import_module(f"whet.kernels.{module}")
        setattr(module, f"{name}_reference", getattr(module, f"{name}_triton"))


def resources(kernel: Any) -> dict[str, int]:
    """Registers of a thread, its bytes of stack (which registers were spilled to), and bytes of shared memory."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        said = subprocess.run([CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert found is not None, said
    return {"registers": int(found[1]), "stack": int(found[2]), "shared": kernel.metadata.shared}


def calls() -> Iterator[Callable[[], object]]:
    sys.path.insert(0, str(ROOT / "bench"))
    import kernel_cases
    from kernel_work import Device, Sizes

    sizes = Sizes(
        D=512, F=1024, H=4, G=2, V=128256, row=64, head_rows=8, chunk=2, layers=1, trained=((1, 128, 512), (1, 3, 77)),
    )  # fmt: skip
    for dtype in (torch.bfloat16, torch.float16):
        on = Device("cpu", dtype)
        for case in kernel_cases.cases(sizes, [128], on):
            if case.kernel not in BY_OTHERS and not case.kernel.startswith("linear_log_probs"):
                yield case.make().run
    on = Device("cpu", torch.bfloat16)
    yield from of_losses(on)
    yield from of_layers(on)


def of_losses(on: Any) -> Iterator[Callable[[], object]]:
    """Branches that the 8B model does not take: Gemma 2's soft cap, a scale, a small vocabulary, no gradient."""
    from whet.kernels.cross_entropy import LogProbs, log_probs_of_logits_triton, logits_gradient_triton

    for width, softcap, scale, need_grad in (
        (256064, 30.0, 1.0, True),
        (100, None, 0.5, True),
        (5000, 30.0, 2.0, False),
    ):
        logits, labels = on.normal(2, -(-width // 64) * 64)[:, :width], torch.zeros(2, dtype=torch.int64)
        single = [torch.empty(2) for _ in range(3)]
        out = LogProbs(single[0], single[1], torch.empty(2, dtype=torch.bool), None, single[2])
        options = {"softcap": softcap, "scale": scale}
        yield partial(log_probs_of_logits_triton, logits, labels, out, need_grad=need_grad, **options)
        yield partial(logits_gradient_triton, logits, labels, *single[:2], 0, **options)


def of_layers(on: Any) -> Iterator[Callable[[], object]]:
    """Gemma's norms and activations, heads that are normed, and heads of other widths under a window."""
    from whet.kernels.flash import flash_backward_triton, flash_triton
    from whet.kernels.glu import glu, glu_backward
    from whet.kernels.rms_norm import rms_norm, rms_norm_backward
    from whet.kernels.rope import rope, rope_backward

    T, bounds = 70, torch.tensor([0, 30, 70], dtype=torch.int32)
    for width in (2304, 5120):
        x, w = on.normal(T, width), on.normal(width)
        yield partial(rms_norm, x, w, 1e-6, 1.0, residual=on.normal(T, width))
        yield partial(rms_norm_backward, x, x, w, 1e-6, 1.0, weight_grad=torch.zeros(width))
    for activation in ("gelu_tanh", "gelu"):
        yield partial(glu, on.normal(T, 512), activation)
        yield partial(glu_backward, on.normal(T, 256), on.normal(T, 512), activation, act=on.empty(T, 256))
    for d in (64, 96, 256):
        qkv, w, (cos, sin) = on.normal(T, 8 * d), on.normal(d), torch.randn(2, T, d // 2)
        q, k, v = qkv.unflatten(1, (-1, d)).split((4, 2, 2), dim=1)
        normed = {"q_weight": w, "k_weight": w, "offset": 1.0}
        sums = {f"{name}_weight_grad": torch.zeros(d) for name in "qk"}
        yield partial(rope, qkv, cos, sin, 4, 2, **normed)
        yield partial(rope_backward, q, k, v, cos, sin, qkv=qkv, out=on.empty(T, 8 * d), **normed, **sums)
        options: dict[str, Any] = {"scale": 0.1, "window": 20, "softcap": 50.0}
        yield partial(flash_triton, q, k, v, bounds, 40, **options)
        lse = torch.zeros(4, T)
        yield partial(flash_backward_triton, q, q, k, v, q, lse, bounds, 40, **options)


def main() -> None:
    report: list[dict[str, Any]] = []
    compile_only(report)
    for call in calls():
        call()
    print(json.dumps({"kernels": sorted(kernels()), "compiled": report}))


if __name__ == "__main__":
    main()
