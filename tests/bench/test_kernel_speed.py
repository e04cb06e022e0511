"""bench/kernel_speed.py: what it counts and what it covers; its times need a GPU.

On a machine without one, kernels run in Triton's interpreter or as their references, at shapes of a few values.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import whet.kernels
from tests.bench.scripts import load
from tests.flash4_stand_in import StandIn
from whet.kernels import flash4
from whet.kernels._triton import HAVE_TRITON

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "bench" / "kernel_speed.py"
# of the kernels' files: they launch nothing, or once for a model
HELPERS = {
    "alignment",
    "arrange",
    "available",
    "chunk_rows",
    "installed",
    "interface",
    "kernel_keys",
    "kernel_takes",
    "lay_out",
    "matrix",
    "multiply",
    "new_buffer",
    "prepare",
    "shuffles",
    "stack",
    "stack_dense",
    "supported",
    "takes",
    "tune",
    "weight_scales",
}
# called within kernels; plain functions where Triton is not installed
PARTS = {"code_at", "decode", "random_words", "rounded_bits"}


bench = load("kernel_speed")
kernel_cases = sys.modules[bench.cases.__module__]
CUDA = torch.cuda.is_available()
HERE = bench.Device("cuda", torch.bfloat16) if CUDA else bench.Device("cpu", torch.float32)
ITEM = torch.empty(0, dtype=HERE.dtype).element_size()
SMALL = bench.Sizes(
    D=64, F=128, H=4, G=2, d=16, V=100, r=2, R=16, row=32, head_rows=8, chunk=4, layers=2,
    trained=((2, 16, 96), (1, 100, 64)),
)  # fmt: skip
T = 64
CASES = bench.cases(SMALL, [T], HERE)


def named(kernel: str, shape: str = "") -> Any:
    return next(case for case in CASES if case.kernel == kernel and case.shape.startswith(shape)).make()


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention 4 as far as a CPU can have it."""
    if not CUDA:
        monkeypatch.setattr(flash4, "_loaded", [StandIn()])


def needs_triton(kernel: str) -> None:
    if kernel in ("flash", "flash_backward") and not HAVE_TRITON:
        pytest.skip("has no reference of its own: needs triton")


def kernel_files() -> list[Any]:
    names = [module.name for module in pkgutil.iter_modules(whet.kernels.__path__)]
    return [importlib.import_module(f"whet.kernels.{name}") for name in names if not name.startswith("_")]


def test_every_kernel_is_measured() -> None:
    """Catches a kernel that was added, or renamed, and is left out of the measurements."""
    found = set()
    for file in kernel_files():
        for name, function in inspect.getmembers(file, inspect.isfunction):
            if function.__module__ == file.__name__ and not name.startswith("_") and not name.endswith("_reference"):
                found.add(name.removesuffix("_triton"))
    assert len(found) > 10
    assert found - HELPERS - PARTS - {case.kernel for case in CASES} == set()


def test_what_is_excused_exists_and_is_no_kernel() -> None:
    """Catches a name that is gone, under which a new kernel would be left out."""
    excused = HELPERS | PARTS
    assert {name for name in excused if not any(hasattr(file, name) for file in kernel_files())} == set()
    assert excused & {case.kernel for case in CASES} == set()


def test_cases_can_be_told_apart() -> None:
    """Catches two lines of one name, and a case that a --tokens leaves out."""
    both = bench.cases(bench.Sizes(), [4096, 16384], bench.Device())
    names = [(case.kernel, case.shape, case.tokens) for case in both]
    assert len(set(names)) == len(names)
    assert {4096, 16384, None} <= {tokens for *_, tokens in names}
    by_tokens = [sorted(kernel for kernel, _, tokens in names if tokens == T) for T in (4096, 16384)]
    assert set(by_tokens[0]) - {"linear_log_probs", "linear_log_probs_weight_grad"} == set(by_tokens[1])


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kernel} {case.shape}")
def test_every_case_runs(case: Any, stand_in: None) -> None:
    """Catches a call that no longer fits a kernel's signature, and an output that is not written."""
    needs_triton(case.kernel)
    work = case.make()
    for x in work.writes:
        inputs = {y.data_ptr() for y in work.reads}
        if not x.is_meta and x.data_ptr() not in inputs and x.is_floating_point():
            x.fill_(torch.nan)
    work.run()
    assert work.bytes > 0
    for x in work.writes:
        if not x.is_meta and x.is_floating_point():
            assert x.float().isfinite().all()


@pytest.mark.parametrize(
    "kernel", ["attention", "attention_backward", "flash", "flash_backward", "flash4", "flash4_backward"]
)
def test_ragged_documents_run(kernel: str, stand_in: None) -> None:
    """Catches a layout for rows given to documents: at the small shapes all mixed documents are equally long."""
    needs_triton(kernel)
    work = getattr(kernel_cases, kernel)(SMALL, HERE, [5, 20, 39])
    work.run()
    pairs = 5 * 6 // 2 + 20 * 21 // 2 + 39 * 40 // 2
    products = 5 if kernel.endswith("backward") else 2
    assert work.flops == products * 2 * SMALL.d * SMALL.H * pairs


QK, W = (4 + 2) * 16, (4 + 2 + 2) * 16
TABLES = 2 * 32 * 8 * 4  # fp32
LSE = 4 * T * 4
LORA = (T, 64, 16)
MAPS = 2 * (256 * 4 + 256 * 4 + 65536)
# q, k and v, o, gate and up, down; A and B
ADAPTERS = 2 * 2 * (3 * 64 + 64 + 2 * 64 + 128 + 64 + 2 * 32 + 64 + 2 * 128 + 64)
ADAPTER_BLOCKS = 2 * 14  # none has more than 256 values


@pytest.mark.parametrize(
    ("kernel", "shape", "values", "other_bytes", "flops"),
    [
        ("rms_norm", "", 2 * T * 64 + 64, 0, 0),
        ("rms_norm_backward", "", 4 * T * 64 + 64, 0, 0),
        ("rope", "", 2 * T * QK, TABLES, 0),
        ("rope_backward", "", 2 * T * W, TABLES, 0),
        ("glu", "", 3 * T * 128, 0, 0),
        ("glu_backward", "", 6 * T * 128, 0, 0),
        ("glu_backward_lora", "", 5 * T * 128 + 3 * T * 2, 2 * 3 * 128 * 2 * 4, 3 * 2 * T * 128 * 2),
        ("dequantize_nf4", "64x128", 64 * 128, 64 * 64 + 128 + 16 * 4 + 256 * 4 + 4 + 4, 0),
        ("dequantize_nf4_fp8", "64x128", 0, 64 * 64 + 128 + 16 * 4 + 256 * 4 + 4 + 4 + 64 * 4 + 64 * 128, 0),
        ("quantize_rows", "K=256", T * 256, T * 256 + T * 4, 0),
        ("scaled_mm", "N=64, K=128", T * 64, (T + 64) * (128 + 4), 2 * T * 64 * 128),
        ("extend", "qkv", W * 16 + 16 * 64, (3 * 2 * 64 + W * 2) * 4, 0),
        ("attention", "", T * W + T * 64, LSE, 2 * 2 * 16 * 4 * 2 * (32 * 33 // 2)),
        ("attention_backward", "", 2 * T * W + 2 * T * 64, LSE, 5 * 2 * 16 * 4 * 2 * (32 * 33 // 2)),
        ("flash4", "", T * W + T * 64, LSE, 2 * 2 * 16 * 4 * 2 * (32 * 33 // 2)),
        ("flash4_backward", "", 2 * T * W + 2 * T * 64, LSE, 5 * 2 * 16 * 4 * 2 * (32 * 33 // 2)),
        ("log_probs_of_logits", "", 2 * 4 * 100, 4 * (8 + 4 + 4 + 1), 0),
        ("linear_log_probs", "", 2 * 8 * 64 + 100 * 64, 8 * (8 + 4 + 4 + 1), 2 * 2 * 8 * 100 * 64),
        ("logits_gradient", "", 2 * 4 * 100, 4 * (8 + 4 + 4), 0),
        ("linear_log_probs_weight_grad", "", 8 * 64 + 2 * 100 * 64, 8 * (8 + 4 + 4), 2 * 2 * 8 * 100 * 64),
        ("stochastic_round", "", 0, 64 * 128 * (4 + 2), 0),
        ("product", "16 bits", 2 * T * 64 + (T + 64) * 144, 0, 2 * T * 64 * 144),
        ("product", "FP8", 2 * T * 256, (T + 256) * (64 + 4), 2 * T * 256 * 64),
        ("adamw_8bit", "bf16", 0, (2 * 16 * 96 + 100 * 64) * 10 + (2 * 6 + 25) * 16 + MAPS, 0),
        ("adamw_8bit", "fp32", 0, ADAPTERS * 16 + ADAPTER_BLOCKS * 16 + MAPS, 0),
        ("lora_xa", "K=128", T * 128 + 16 * 128 + T * 16, 0, 2 * T * 128 * 16),
        ("lora_dyb", "N=256", T * 256 + 256 * 16 + T * 16, 0, 2 * T * 256 * 16),
        ("lora_db", "N=128", T * 128 + T * 6, 128 * 6 * 4, 2 * T * 128 * 6),
        ("lora_da", "K=64", T * 6 + T * 64, 6 * 64 * 4, 2 * T * 64 * 6),
    ],
)
def test_what_must_move(kernel: str, shape: str, values: int, other_bytes: int, flops: int, stand_in: None) -> None:
    """Catches a margin, a table or an output that is not counted, or counted twice: the bound would be a wrong one."""
    work = named(kernel, shape)
    assert work.bytes == values * ITEM + other_bytes
    assert work.flops == flops


def test_adapters_are_those_of_the_8b_model() -> None:
    """Catches a projection or a layer that is left out: PEFT counts 41,943,040 parameters at rank 16."""
    adapters = bench.Sizes().adapters
    assert sum(count for count, *_ in adapters) == 448
    assert sum(count * rows * columns for count, rows, columns in adapters) == 41_943_040


def test_the_bound_is_the_slower_of_both_rates() -> None:
    """Catches a unit that is off by a thousand."""
    assert bench.bound_us(4_000_000, 0, 2.0, 0.0) == pytest.approx(2.0)
    assert bench.bound_us(4_000_000, 10**9, 2.0, 500.0) == pytest.approx(2.0)
    assert bench.bound_us(4_000_000, 10**10, 2.0, 500.0) == pytest.approx(20.0)


def test_products_are_held_to_the_rate_of_their_kind() -> None:
    """Catches FP8 held to bf16's rate, and milliseconds of products to the rate of a card that has just rested."""
    limits = bench.Ceilings(3.0, gemm_tflop_s=800.0, sustained_tflop_s=700.0, fp8_tflop_s=1400.0)
    bf16 = bench.Work(lambda: None, [], [], 1)
    fp8 = named("scaled_mm")
    assert [limits.gemm_for(bf16, us) for us in (600.0, 15_000.0)] == [800.0, 700.0]
    assert [limits.gemm_for(fp8, us) for us in (600.0, 15_000.0)] == [1400.0, 1400.0]
    assert named("attention").fp8 is False
    assert [named("product", shape).fp8 for shape in ("16 bits", "FP8")] == [False, True]


def test_sets_together_exceed_the_cache() -> None:
    """Catches inputs that are still in L2 when they are read again. All of a work's tensors may change in place."""
    x = torch.empty(3000, dtype=torch.uint8)
    work = partial(bench.Work, lambda: None)
    assert bench.sets(work([x], []), 10_000) * 3000 > 4 * 10_000
    assert bench.sets(work([x], [x]), 10_000) * 3000 > 4 * 10_000
    assert bench.sets(work([x], []), 10) == 1
    assert bench.sets(work([x[:1]], []), 10_000) == bench.MOST_SETS


@pytest.mark.parametrize("total", [100, 4096, 16384])
def test_mixed_documents_fill_the_batch(total: int) -> None:
    lengths = kernel_cases.mixed_lengths(total, 2048)
    assert sum(lengths) == total
    assert 1 <= min(lengths) <= max(lengths) <= 2048
    assert lengths == kernel_cases.mixed_lengths(total, 2048)


class Clock:
    """Stands for a GPU: `now` in microseconds, moved on by what runs."""

    now = 0.0

    def takes(self, us: float) -> Any:
        def run() -> None:
            self.now += us

        return run

    def cuda(self) -> dict[str, Any]:
        clock = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = clock.now

            def elapsed_time(self, end: Any) -> float:
                return float(end.at - self.at) / 1e3

        class Graph:
            us = 0.0

            def replay(self) -> None:
                clock.now += self.us

        @contextmanager
        def graph(recorded: Graph, stream: Any) -> Iterator[None]:
            start = clock.now
            yield
            recorded.us = clock.now - start

        stream = SimpleNamespace(wait_stream=lambda other: None)
        return {
            "Event": Event,
            "CUDAGraph": Graph,
            "graph": graph,
            "Stream": lambda: stream,
            "current_stream": lambda: stream,
            "stream": lambda stream: nullcontext(),
            "synchronize": lambda: None,
        }


@pytest.mark.parametrize(
    ("us", "kernel", "restored", "timing"),
    [
        (20.0, "rms_norm", False, "replayed"),
        (20.0, "attention", False, "one by one"),
        (20.0, "log_probs_of_logits", True, "one by one"),
        (900.0, "rms_norm", False, "one by one"),
    ],
)
def test_times_are_of_the_kernel_alone(
    us: float, kernel: str, restored: bool, timing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches the time of what goes before a call counted with it, and a mean over another number of calls."""
    clock, made, restores = Clock(), [], []
    for name, stub in clock.cuda().items():
        monkeypatch.setattr(torch.cuda, name, stub)
    monkeypatch.setattr(bench, "l2_bytes", lambda: 1000)

    def restore() -> None:
        restores.append(clock.now)
        clock.now += 100.0

    def make() -> Any:
        made.append(kernel)
        tensors = [torch.empty(4000, dtype=torch.uint8)]
        return bench.Work(clock.takes(us), tensors, [], restore=restore if restored else None)

    scratch = SimpleNamespace(neg_=clock.takes(100.0))
    _, found, how = bench.measure(bench.Case(kernel, "", 64, make), scratch)
    assert found == pytest.approx(us)
    assert how == timing
    assert len(made) == (3 if timing == "replayed" else 1)
    assert (len(restores) > 5) == restored


def test_what_keeps_the_host_is_timed_in_a_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the host's time over a table of parameters taken for the kernel's."""
    clock = Clock()
    for name, stub in clock.cuda().items():
        monkeypatch.setattr(torch.cuda, name, stub)
    monkeypatch.setattr(bench, "l2_bytes", lambda: 1000)
    recording, recorded = [False], torch.cuda.graph

    @contextmanager
    def graph(*given: Any, **options: Any) -> Iterator[None]:
        recording[0] = True
        with recorded(*given, **options):
            yield
        recording[0] = False

    monkeypatch.setattr(torch.cuda, "graph", graph)

    def run() -> None:
        clock.now += 400.0 if recording[0] else 900.0

    tensors = [torch.empty(4000, dtype=torch.uint8)]
    case = bench.Case("adamw_8bit", "", None, lambda: bench.Work(run, tensors, [], host_bound=True))
    _, us, how = bench.measure(case, SimpleNamespace(neg_=clock.takes(100.0)))
    assert us == pytest.approx(400.0)
    assert how == "replayed"
    assert named("adamw_8bit").host_bound is True


def failing() -> Any:
    raise RuntimeError("misaligned\naddress | and more")


def test_a_failing_kernel_is_a_line_of_its_own() -> None:
    """Catches a kernel that vanishes from the results by failing."""
    case = bench.Case("rms_norm", "D=64", 64, failing)
    line = bench.result(case, bench.Ceilings(3.0, 700.0, 650.0), torch.empty(1))
    assert line["error"] == "RuntimeError: misaligned\naddress | and more"
    assert line["measured_us"] is line["ratio"] is None
    assert (line["kernel"], line["shape"], line["tokens"]) == ("rms_norm", "D=64", 64)


def needs(case: Any) -> str | None:
    try:
        case.needs()
    except bench.Missing as missing:
        return str(missing)
    return None


@pytest.mark.parametrize(
    ("kernel", "shape", "dtype"), [("product", "16 bits", HERE.dtype), ("product", "FP8", torch.float8_e4m3fn)]
)
def test_products_need_cublaslt_in_their_precision(
    kernel: str, shape: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches torch's product, and its sum apart, recorded as cuBLASLt's."""
    case = next(case for case in CASES if case.kernel == kernel and case.shape.startswith(shape))
    asked: list[Any] = []
    monkeypatch.setattr("whet.kernels.cublaslt.available", lambda *given: asked.append(given) or False)
    assert needs(case) == f"cuBLASLt does not multiply {dtype} here"
    monkeypatch.setattr("whet.kernels.cublaslt.available", lambda *given: asked.append(given) or True)
    assert needs(case) is None
    assert asked == [(torch.device(HERE.name), dtype)] * 2


def test_fp8_needs_a_card_that_multiplies_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches references recorded as kernels, and a bound by a rate that is not known."""
    monkeypatch.setattr("whet.kernels.fp8.supported", lambda device: False)
    missing = {case.kernel for case in CASES if "FP8" in (needs(case) or "")}
    assert missing == {"dequantize_nf4_fp8", "quantize_rows", "scaled_mm"}
    monkeypatch.setattr("whet.kernels.fp8.supported", lambda device: True)
    assert not [case for case in CASES if "FP8" in (needs(case) or "")]


def measured(works: list[Any]) -> Any:
    def measure(case: Any, scratch: Any) -> tuple[Any, float, str]:
        if case.kernel == "glu":
            raise RuntimeError("no")
        works.append(case.kernel)
        return bench.Work(lambda: None, [torch.empty(3_000_000, dtype=torch.uint8)], []), 2.0, "replayed"

    return measure


def stub_the_gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that are measured from here on. Their times, and the card's rates, are made up."""
    taken: list[str] = []
    monkeypatch.setattr(bench, "measure", measured(taken))
    monkeypatch.setattr(bench, "ceilings", lambda on, scratch: bench.Ceilings(3.0, 700.0, 650.0))
    monkeypatch.setattr(bench, "l2_bytes", lambda: 1)
    monkeypatch.setattr(bench, "Device", lambda: SmallScratch())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "GPU A")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return taken


@pytest.mark.parametrize(("only", "code"), [(["rope", "glu"], 1), (["rope"], 0)])
def test_lines_and_exit_code(
    only: list[str],
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches a success that hides a failure, and a line that lacks what it was set against. The timer is a stub."""
    taken = stub_the_gpu(monkeypatch)
    out = tmp_path / "new" / "kernels.jsonl"
    given = ["--tokens", "2048", "--run-id", "one", "--out", str(out), "--only", *only]
    assert bench.main(given) == code
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["kernel"] for line in lines] == only
    assert taken == ["rope"]
    first = lines[0]
    assert first["kind"] == "kernels"
    assert (first["run_id"], first["tokens"], first["bytes"]) == ("one", 2048, 3_000_000)
    assert (first["bound_us"], first["measured_us"], first["ratio"]) == (1.0, 2.0, 2.0)
    assert (first["copy_tb_s"], first["gemm_tflop_s"], first["hardware"]) == (3.0, 700.0, "GPU A")
    assert {"versions", "commit", "dirty", "date", "shape", "flops", "timing", "error"} <= first.keys()
    shown = capsys.readouterr().out
    assert "| rope |" in shown
    assert ("failed: RuntimeError: no" in shown) == (code == 1)


@pytest.mark.parametrize(
    ("offered", "only", "shapes", "code"),
    [
        ([torch.bfloat16], ["product", "rope"], ["32+2x8 heads of 128", "16 bits, c apart: N=4096, K=14400"], 0),
        ([], ["product", "rope"], ["32+2x8 heads of 128"], 0),
        ([], ["product"], [], 1),
    ],
)
def test_what_cannot_be_measured_is_said(
    offered: list[torch.dtype],
    only: list[str],
    shapes: list[str],
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches a line for a kernel that did not run, one that is left out without a word, and success with no line."""
    taken = stub_the_gpu(monkeypatch)
    monkeypatch.setattr("whet.kernels.cublaslt.available", lambda device, dtype: dtype in offered)
    out = tmp_path / "kernels.jsonl"
    assert bench.main(["--tokens", "2048", "--run-id", "one", "--out", str(out), "--only", *only]) == code
    lines = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    assert [line["shape"] for line in lines] == shapes
    assert taken == [line["kernel"] for line in lines]
    said = capsys.readouterr().err
    assert "FP8, c in place: N=28672, K=4096 2048: not measured: cuBLASLt does not multiply torch.float8" in said
    assert ("N=4096, K=14400 2048: not measured: cuBLASLt does not multiply torch.bfloat16" in said) == (not offered)


class SmallScratch(bench.Device):  # type: ignore[misc, name-defined]
    """Makes nothing: the timer is a stub."""

    def normal(self, *shape: int, **options: Any) -> torch.Tensor:
        return torch.empty(0)


def script(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=hidden)


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    """Catches references timed on a processor and recorded as kernels."""
    done = script("--out", str(tmp_path / "kernels.jsonl"))
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr
    assert not list(tmp_path.iterdir())
