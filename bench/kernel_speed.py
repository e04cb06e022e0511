"""Every kernel of src/whet/kernels at the 8B shape on this GPU, in bf16, against the time it cannot go below.

    python bench/kernel_speed.py --out bench/results/kernels.jsonl --run-id ID [--tokens 4096 16384] [--only NAME ...]

That time, the bound, is the larger of two: the bytes that must move (each input once, each output once) at the rate of
a large copy, and the matrix products' FLOP at the rate of a large GEMM in the same precision. The rates are measured
first, in the same process: a GEMM by itself, for calls that take no longer than LONG_US, and many of them in a row for
longer ones, in which the card's power holds it below that. `gemm_tflop_s` of a line is the one its bound was made with.
A ratio is the measured time over the bound. What no bound holds: exponentials, and in attention the half of each block
on the diagonal that is multiplied for nothing.

Kernels under SHORT_US are replayed in a CUDA graph over sets of tensors that together exceed the L2 cache several
times, so that neither launches nor cached inputs count; longer ones are timed one by one, each after passes over a
buffer larger than L2, during which the call is launched. As in training, L2 then holds someone else's values, some not
written back yet. The optimizer's step is replayed whatever it takes, as the host goes through all parameters first.
CUDA events; medians. One JSON line a kernel; one that fails has its error there, and the script then exits 1. A kernel
that this machine lacks the means for has no line; standard error says what it lacks.

What is measured, and at which shapes: kernel_cases.py.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from kernel_cases import cases
from kernel_work import Case, Device, Missing, Sizes, Work
from torch import Tensor

SHORT_US = 250
LONG_US = 2500
SUSTAINED_US = 20_000  # of GEMMs in a row
REPLAYED_US = 3000  # of one replay
REPLAYS = 15
TIMED_US = 40_000  # of all calls timed one by one
L2_TIMES = 6  # what rotated sets hold together, in L2 caches
MOST_SETS = 64


@dataclass(frozen=True)
class Ceilings:
    """Rates. gemm: of one by itself; sustained: of many in a row; fp8: of one by itself, 0 where it is not known."""

    copy_tb_s: float
    gemm_tflop_s: float
    sustained_tflop_s: float
    fp8_tflop_s: float = 0.0

    def gemm_for(self, work: Work, us: float) -> float:
        """What the products of a work that took so long could run at."""
        if work.fp8:
            return self.fp8_tflop_s
        return self.gemm_tflop_s if us <= LONG_US else min(self.gemm_tflop_s, self.sustained_tflop_s)


def bound_us(moved: int, flops: int, copy_tb_s: float, gemm_tflop_s: float) -> float:
    return max(moved / copy_tb_s, flops / gemm_tflop_s if flops else 0.0) / 1e6


# ------------------------------------------------------------------ timing


def one_by_one(work: Work, scratch: Tensor) -> float:
    """Median microseconds. What goes before a call sweeps L2, and keeps the GPU busy while the call is launched."""

    def before() -> None:
        if work.restore is not None:
            work.restore()
        for _ in range(2):  # the second one for the host alone: some calls launch several kernels
            scratch.neg_()

    before()
    work.run()  # compiles
    times = _times(work.run, before, 3)
    calls = min(max(int(TIMED_US / median(times)), 5), 50)
    return median(_times(work.run, before, calls))


def _times(run: Callable[[], object], before: Callable[[], object], calls: int) -> list[float]:
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(calls)]
    for start, end in events:
        before()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e3 for start, end in events]


def replayed(works: Sequence[Work], estimate_us: float) -> float:
    """Median over replays of the mean microseconds a call, the works taken in turn."""
    rounds = max(1, round(REPLAYED_US / estimate_us / len(works)))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for work in works:
            work.run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(rounds):
            for work in works:
                work.run()
    graph.replay()
    times = _times(graph.replay, lambda: None, REPLAYS)
    return median(times) / (rounds * len(works))


def sets(work: Work, l2_bytes: int) -> int:
    """How many sets of a work's tensors to take in turn. Those changed in place are counted twice, which is as well."""
    return min(MOST_SETS, max(1, -(-2 * L2_TIMES * l2_bytes // work.bytes)))


def measure(case: Case, scratch: Tensor) -> tuple[Work, float, str]:
    """The work, median microseconds, and how they were taken."""
    work = case.make()
    us = one_by_one(work, scratch)
    # Attention's back ends keep random state, which a graph would have to hold for them.
    if work.restore is not None or case.kernel.startswith("attention") or (us >= SHORT_US and not work.host_bound):
        return work, us, "one by one"
    others = [case.make() for _ in range(sets(work, l2_bytes()) - 1)]
    return work, replayed([work, *others], us), "replayed"


def l2_bytes() -> int:
    return int(torch.cuda.get_device_properties(0).L2_cache_size)


def ceilings(on: Device, scratch: Tensor) -> Ceilings:
    """Of a copy of 1 GiB, read and written, and of GEMMs of 4096x4096x14336.

    FP8's is torch._scaled_mm with one scale a tensor and sums on tensor cores, which has nothing to do but multiply.
    """
    source = on.normal(2**29)
    target = torch.empty_like(source)
    copy = Work(lambda: target.copy_(source), [source], [target])
    copy_us = one_by_one(copy, scratch)
    m, k, n = 4096, 4096, 14336
    a, b, c = on.normal(m, k), on.normal(n, k), on.empty(m, n)
    gemm = Work(lambda: torch.mm(a, b.T, out=c), [a, b], [c], 2 * m * k * n)
    gemm_us = one_by_one(gemm, scratch)
    many = max(1, round(SUSTAINED_US / gemm_us))
    sustained_us = one_by_one(replace(gemm, run=lambda: [gemm.run() for _ in range(many)]), scratch) / many
    limits = Ceilings(copy.bytes / copy_us / 1e6, gemm.flops / gemm_us / 1e6, gemm.flops / sustained_us / 1e6)
    from whet.kernels.fp8 import E4M3, supported

    if not supported(a.device):
        return limits
    a8, b8, one = a.to(E4M3), b.to(E4M3), torch.ones((), device=on.name)

    def product() -> Tensor:
        return torch._scaled_mm(a8, b8.t(), one, one, out_dtype=on.dtype, use_fast_accum=True, out=c)

    fp8 = Work(product, [a8, b8], [c], gemm.flops, fp8=True)
    return replace(limits, fp8_tflop_s=fp8.flops / one_by_one(fp8, scratch) / 1e6)


def result(case: Case, limits: Ceilings, scratch: Tensor) -> dict[str, Any]:
    """The fields of a line that this case has of its own. Raises Missing."""
    line: dict[str, Any] = {"kernel": case.kernel, "shape": case.shape, "tokens": case.tokens}
    line |= dict.fromkeys(("bytes", "flops", "bound_us", "measured_us", "ratio", "timing", "error"))
    line |= {"copy_tb_s": round(limits.copy_tb_s, 3), "gemm_tflop_s": round(limits.gemm_tflop_s, 1)}
    try:
        case.needs()
        work, us, line["timing"] = measure(case, scratch)
    except Missing:
        raise
    except Exception as error:  # whatever it is, the other kernels are still measured
        return line | {"error": f"{type(error).__name__}: {error}"[:500]}
    gemm = limits.gemm_for(work, us)
    bound = bound_us(work.bytes, work.flops, limits.copy_tb_s, gemm)
    return line | {
        "bytes": work.bytes,
        "flops": work.flops,
        "bound_us": round(bound, 3),
        "measured_us": round(us, 3),
        "ratio": round(us / bound, 3),
        "gemm_tflop_s": round(gemm, 1),
    }


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    row = Sizes().row
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384], help=f"multiples of {row}")
    names = sorted({case.kernel for case in cases(Sizes(), [row], Device())})
    parser.add_argument("--only", nargs="+", default=names, choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--run-id", default=None)
    parser.add_argument("--out", type=Path, default=None, help="a .jsonl file to append the lines to")
    args = parser.parse_args(argv)
    if any(tokens < row or tokens % row for tokens in args.tokens):
        parser.error(f"--tokens must be multiples of {row}, the length of a row")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    if not torch.cuda.is_available():
        print("bench/kernel_speed.py measures kernels on a GPU, and torch finds no CUDA device here", file=sys.stderr)
        return 2
    from environment import origin
    from table import render

    on, where = Device(), origin()
    scratch = on.normal(max(2**27, 2 * l2_bytes()))
    started = time.perf_counter()
    limits = ceilings(on, scratch)
    said = ", ".join(f"{name} {value:.4g}" for name, value in asdict(limits).items())
    print(f"{said}; {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)
    lines = []
    for case in cases(Sizes(), args.tokens, on):
        if case.kernel not in args.only:
            continue
        torch.cuda.empty_cache()
        name = f"{case.kernel} {case.shape} {case.tokens or ''}"
        try:
            found = result(case, limits, scratch)
        except Missing as missing:
            print(f"{name}: not measured: {missing}", file=sys.stderr, flush=True)
            continue
        line = {"kind": "kernels", "run_id": args.run_id, **found, **where}
        lines.append(line)
        said = line["error"] or f"{line['measured_us']} us, {line['ratio']} of the bound"
        said += f"; {time.perf_counter() - started:.1f} s"
        print(f"{name}: {said}", file=sys.stderr, flush=True)
        if args.out is not None:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            with open(args.out, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
    if not lines:
        print("nothing was measured", file=sys.stderr)
        return 1
    print(render(lines))
    return 1 if any(line["error"] for line in lines) else 0


if __name__ == "__main__":
    sys.exit(main())
