"""Matrix products that torch doesn't offer, straight from cuBLASLt: what is added may lie anywhere, with E4M3 too.

    out = alpha (s_a a) (b s_b) + c      s_a [M], s_b [N]: scales of a's rows and of b's columns, with E4M3 only

torch.addmm copies c into `out` before it multiplies, and torch._scaled_mm adds nothing. Here the product adds c as it
writes. Sums are in fp32, those of parts of K too (E4M3's as kernels/fp8.py has them), and `out` is rounded once.

cuBLASLt's matrices are column-major, and a row-major matrix is its own transpose to it. So it is asked for
out^T = b^T a^T + c^T: b is its left operand, with b's scales, a its right one.
Source: cublasLt.h and cublas_api.h of cuBLAS 13.8.2, library_types.h of CUDA 13. All values are the same in 12.9.3.
Shapes: a [M, K], b [K, N], c and out [M, N].
"""

from __future__ import annotations

import ctypes
import functools
import os
import statistics
import sys
import threading
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from whet.kernels import _choices
from whet.kernels.fp8 import E4M3, scaled_mm

WORKSPACE = 32 << 20  # bytes on each device that has multiplied, for good: what NVIDIA advises for Hopper
LARGE = 1024  # rows of the left operand, below which launching costs the host more than the GPU
WORTH = 0.015  # of a product's time, for which another algorithm than the heuristic's first is taken
PLANS = 4096  # that are kept: batches of documents come in many lengths
TYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 14, E4M3: 28}  # CUDA_R_32F, 16F, 16BF, 8F_E4M3
OUTPUTS = {
    torch.bfloat16: (torch.bfloat16, torch.float32),
    torch.float16: (torch.float16, torch.float32),
    E4M3: (torch.bfloat16, torch.float16, torch.float32),
}
COMPUTE_32F = 68
TRANSPOSE_A, TRANSPOSE_B, SCALE_A, SCALE_B, FAST_ACCUMULATION, SCALE_MODE_A, SCALE_MODE_B = 3, 4, 17, 18, 25, 31, 32
OUTER_VECTOR = 3  # a scale for each row of the left operand, or column of the right one
MAX_WORKSPACE, REDUCTION, ALIGNMENT = 1, 3, (5, 6, 7, 8)
IN_FP32 = 2  # the reduction that keeps parts of K in the type of the sums
POINTER = ctypes.c_void_p
SIGNATURES: dict[str, list[Any]] = {
    "Create": [POINTER],
    "MatmulDescCreate": [POINTER, ctypes.c_int, ctypes.c_int],
    "MatmulDescSetAttribute": [POINTER, ctypes.c_int, POINTER, ctypes.c_size_t],
    "MatmulDescDestroy": [POINTER],
    "MatrixLayoutCreate": [POINTER, ctypes.c_int, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int64],
    "MatrixLayoutDestroy": [POINTER],
    "MatmulPreferenceCreate": [POINTER],
    "MatmulPreferenceSetAttribute": [POINTER, ctypes.c_int, POINTER, ctypes.c_size_t],
    "MatmulPreferenceDestroy": [POINTER],
    "MatmulAlgoGetHeuristic": [POINTER] * 7 + [ctypes.c_int, POINTER, POINTER],
    "Matmul": [POINTER] * 14 + [ctypes.c_size_t, POINTER],
}


# ------------------------------------------------------------------ what is asked of cuBLASLt


class Matrix(NamedTuple):
    """Column-major in memory, `lead` values from a column to the next; `transposed` before it is multiplied."""

    dtype: torch.dtype
    transposed: bool
    rows: int
    columns: int
    lead: int
    alignment: int  # of the first value, in bytes, 256 at most


class Problem(NamedTuple):
    """All that an algorithm is chosen by."""

    left: Matrix
    right: Matrix
    c: Matrix
    out: Matrix
    beta: float  # 0 or 1


class Call(NamedTuple):
    """out^T = alpha left right + beta c^T. left is [N, K], right [K, M], once they are transposed as `problem` says."""

    problem: Problem
    left: Tensor
    right: Tensor
    left_scale: Tensor | None
    right_scale: Tensor | None
    alpha: float
    c: Tensor
    out: Tensor


def matrix(x: Tensor, name: str) -> Matrix:
    """x^T as cuBLASLt reads it from x's memory."""
    (rows, columns), (down, right), pointer = x.shape, x.stride(), x.data_ptr()
    alignment = min(pointer & -pointer, 256)
    if (right == 1 or columns <= 1) and (down >= columns or rows <= 1):
        return Matrix(x.dtype, False, columns, rows, max(down, columns, 1), alignment)
    if (down == 1 or rows <= 1) and (right >= rows or columns <= 1):
        return Matrix(x.dtype, True, rows, columns, max(right, rows, 1), alignment)
    raise ValueError(f"{name} is {rows}x{columns} with strides {x.stride()}; rows or columns must be adjacent values")


def arrange(
    a: Tensor, b: Tensor, c: Tensor | None, out: Tensor, scale_a: Tensor | None = None, scale_b: Tensor | None = None,
    alpha: float = 1.0,
) -> Call:  # fmt: skip
    """The call that gives `product`. Needs no GPU. ValueError: cuBLASLt does not multiply these."""
    _check_shapes(a, b, c, out)
    if b.dtype != a.dtype or out.dtype not in OUTPUTS.get(a.dtype, ()):
        raise ValueError(f"{a.dtype} x {b.dtype} into {out.dtype}: expected one of {OUTPUTS}, both operands alike")
    given = {"a": a, "b": b, "out": out, "c": c, "scale_a": scale_a, "scale_b": scale_b}
    used = {name: x for name, x in given.items() if x is not None}
    if len({x.device for x in used.values()}) > 1:
        raise ValueError("on several devices: " + ", ".join(f"{name} on {x.device}" for name, x in used.items()))
    form = {name: matrix(x, name) for name, x in used.items() if not name.startswith("scale")}
    added, added_form = (out, form["out"]) if c is None else (c, form["c"])
    for name in form.keys() & {"c", "out"}:
        if form[name].transposed:
            raise ValueError(f"{name} has strides {out.stride() if name == 'out' else added.stride()}; give it by rows")
    if added.data_ptr() == out.data_ptr() and added_form != form["out"]:
        raise ValueError(f"c begins where out does, with strides {added.stride()} and {out.stride()}; they must be one")
    if a.dtype == E4M3:
        _check_e4m3(form, scale_a, scale_b)
    elif scale_a is not None or scale_b is not None:
        raise ValueError(f"scales are for {E4M3}; the operands are {a.dtype}")
    problem = Problem(form["b"], form["a"], added_form, form["out"], float(c is not None))
    return Call(problem, b, a, scale_b, scale_a, alpha, added, out)


def _check_shapes(a: Tensor, b: Tensor, c: Tensor | None, out: Tensor) -> None:
    shapes = [tuple(x.shape) for x in (a, b, out, *([] if c is None else [c]))]
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0] or set(shapes[2:]) != {(a.shape[0], b.shape[1])}:
        raise ValueError(f"shapes of a, b, out{', c'[: 3 * (c is not None)]} are {shapes}; they must be MxK, KxN, MxN")
    if c is not None and c.dtype != out.dtype:
        raise ValueError(f"c is {c.dtype} and out {out.dtype}; they must be alike")


def _check_e4m3(form: dict[str, Matrix], scale_a: Tensor | None, scale_b: Tensor | None) -> None:
    """FP8 tensor cores take both operands with K adjacent, in pieces of 16 bytes."""
    a, b = form["a"], form["b"]
    if a.transposed or not b.transposed:
        raise ValueError("E4M3 operands must have K adjacent: give a by rows, and b as the transpose of a [N, K]")
    if b.rows % 16 or b.columns % 16:
        raise ValueError(f"K and N are {b.rows} and {b.columns}; FP8 products need multiples of 16")
    for name, x in form.items():
        if x.alignment % 16 or x.lead * x.dtype.itemsize % 16:
            where = f"begins at a multiple of {x.alignment} bytes, its rows {x.lead * x.dtype.itemsize} bytes apart"
            raise ValueError(f"{name} {where}; FP8 products need multiples of 16")
    for name, scale, count in (("scale_a", scale_a, a.columns), ("scale_b", scale_b, b.columns)):
        if scale is None or scale.dtype != torch.float32 or scale.numel() != count or not scale.is_contiguous():
            found = "missing" if scale is None else f"{scale.dtype} {tuple(scale.shape)}"
            raise ValueError(f"{name} is {found}; it must be {count} adjacent fp32 values")


# ------------------------------------------------------------------ the library


class _Choice(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t: an algorithm, and whether it can run."""

    _fields_ = (
        ("algorithm", ctypes.c_uint64 * 8),
        ("workspace", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The cuBLASLt that torch has loaded, under its usual name or, bundled with torch, another. None: there is none."""
    if sys.platform != "linux" or torch.version.cuda is None:
        return None
    with open("/proc/self/maps") as maps:
        mapped = sorted({line.split(maxsplit=5)[5].strip() for line in maps if "/libcublasLt" in line})
    for name in (f"libcublasLt.so.{torch.version.cuda.split('.')[0]}", *mapped):
        try:
            library = ctypes.CDLL(name, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
        except OSError:
            continue
        for function, arguments in SIGNATURES.items():
            getattr(library, f"cublasLt{function}").argtypes = arguments
        library.cublasLtGetStatusName.restype, library.cublasLtGetVersion.restype = ctypes.c_char_p, ctypes.c_size_t
        return library
    return None


def _run(function: str, *arguments: Any, problem: Problem | None = None) -> None:
    library = _library()
    assert library is not None
    status = getattr(library, f"cublasLt{function}")(*arguments)
    if status:
        about = "" if problem is None else f" for {problem}"
        raise RuntimeError(f"cublasLt{function} returned {library.cublasLtGetStatusName(status).decode()}{about}")


def _made(owner: object, kind: str, *arguments: int) -> ctypes.c_void_p:
    """A descriptor, which is destroyed with its owner."""
    made = POINTER()
    _run(f"{kind}Create", ctypes.byref(made), *arguments)
    weakref.finalize(owner, _run, f"{kind}Destroy", made).atexit = False
    return made


def _set(kind: str, descriptor: ctypes.c_void_p, attribute: int, value: Any) -> None:
    _run(f"{kind}SetAttribute", descriptor, attribute, ctypes.byref(value), ctypes.sizeof(value))


class _Device:
    """A device's handle and its one work space, which products use in turn whatever stream they are on."""

    def __init__(self, index: int):
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("a device's first product can't be recorded in a CUDA graph: run one before")
        self.index, self.handle, self.lock = index, POINTER(), threading.Lock()
        _run("Create", ctypes.byref(self.handle))
        self.workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device=f"cuda:{index}")
        self._last = torch.cuda.current_stream()

    def stream(self) -> int:
        """The current stream, which waits for the one before. What a graph replays, its caller must order."""
        stream = torch.cuda.current_stream()
        if stream != self._last and not torch.cuda.is_current_stream_capturing():
            stream.wait_stream(self._last)
            self._last = stream
        return int(stream.cuda_stream)


class _Plan:
    """Descriptors of a problem, and the heuristic's algorithms for it, the best first."""

    def __init__(self, device: _Device, problem: Problem, first: int = 1):
        self.problem, (left, right, *_) = problem, problem
        self.description = _made(self, "MatmulDesc", COMPUTE_32F, TYPES[torch.float32])
        self.layouts = [_made(self, "MatrixLayout", TYPES[x.dtype], *x[2:5]) for x in problem[:4]]
        self.describe(TRANSPOSE_A, ctypes.c_int32(left.transposed))
        self.describe(TRANSPOSE_B, ctypes.c_int32(right.transposed))
        if left.dtype == E4M3:
            self.describe(FAST_ACCUMULATION, ctypes.c_int8(1))
            for mode, pointer in ((SCALE_MODE_A, SCALE_A), (SCALE_MODE_B, SCALE_B)):
                self.describe(mode, ctypes.c_int32(OUTER_VECTOR))
                self.describe(pointer, POINTER(device.workspace.data_ptr()))  # each call sets its own
        preference = _made(self, "MatmulPreference")
        _set("MatmulPreference", preference, MAX_WORKSPACE, ctypes.c_uint64(WORKSPACE))
        _set("MatmulPreference", preference, REDUCTION, ctypes.c_uint32(IN_FP32))
        for attribute, x in zip(ALIGNMENT, problem[:4], strict=True):
            _set("MatmulPreference", preference, attribute, ctypes.c_uint32(x.alignment))
        found, count = (_Choice * first)(), ctypes.c_int()
        given = (device.handle, self.description, *self.layouts, preference, first, found, ctypes.byref(count))
        _run("MatmulAlgoGetHeuristic", *given, problem=problem)
        self.choices = [choice for choice in found[: count.value] if choice.state == 0]
        if not self.choices:
            raise RuntimeError(f"cuBLASLt has no algorithm for {problem}")

    def describe(self, attribute: int, value: Any) -> None:
        _set("MatmulDesc", self.description, attribute, value)

    def run(self, device: _Device, call: Call, choice: _Choice) -> None:
        left, right, c, out = self.layouts
        alpha, beta = ctypes.c_float(call.alpha), ctypes.c_float(self.problem.beta)
        with device.lock:
            if call.left_scale is not None and call.right_scale is not None:
                self.describe(SCALE_A, POINTER(call.left_scale.data_ptr()))
                self.describe(SCALE_B, POINTER(call.right_scale.data_ptr()))
            _run(
                "Matmul", device.handle, self.description, ctypes.byref(alpha), call.left.data_ptr(), left,
                call.right.data_ptr(), right, ctypes.byref(beta), call.c.data_ptr(), c, call.out.data_ptr(), out,
                ctypes.byref(choice.algorithm), device.workspace.data_ptr(), WORKSPACE, device.stream(),
                problem=self.problem,
            )  # fmt: skip


_device = functools.cache(_Device)
_tuned: dict[tuple[int, Problem], tuple[_Plan, tuple[float, ...]]] = {}


@functools.lru_cache(maxsize=PLANS)
def _plan(index: int, problem: Problem) -> _Plan:
    return _Plan(_device(index), problem)


# ------------------------------------------------------------------ the product


@functools.cache
def available(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether cuBLASLt multiplies operands of `dtype` on `device`. Scales of rows it takes on Hopper, from 12.9 on."""
    if device.type != "cuda" or dtype not in OUTPUTS:
        return False
    library, capability = _library(), torch.cuda.get_device_capability(device)
    if library is None:
        return False
    return capability >= (8, 0) if dtype != E4M3 else capability == (9, 0) and library.cublasLtGetVersion() >= 120900


def product(
    a: Tensor, b: Tensor, *, c: Tensor | None = None, out: Tensor, scale_a: Tensor | None = None,
    scale_b: Tensor | None = None, alpha: float = 1.0, tuned: bool = False,
) -> Tensor:  # fmt: skip
    """out = alpha a @ b (+ c): one launch of cuBLASLt where it is `available`; elsewhere what torch offers.

    16-bit operands give their own dtype or fp32, each of them by rows or by columns, with any stride between. E4M3
    ones, a by rows and b by columns, come with fp32 scales of a's rows and b's columns, and give 16 bits or fp32. c has
    the dtype of `out`, both by rows; it is `out`, or apart from it. In 16 bits a c that is `out` may be added to a
    product that was rounded before. tuned: `tune` this form the first time, where that may be and M is a power of 2, as
    lengths that come again are.
    ValueError: shapes, dtypes, strides or alignment. RuntimeError: cuBLASLt refuses; it gives the status.
    """
    if not available(out.device, a.dtype):
        return _with_torch(a, b, c, out, scale_a, scale_b, alpha)
    call = arrange(a, b, c, out, scale_a, scale_b, alpha)
    if not out.numel() or not a.shape[1]:
        return out.zero_() if c is None else out.copy_(c)
    with torch.cuda.device(out.device):
        found = _tuned.get((out.device.index, call.problem))
        if found is None and tuned and _may_tune(call):
            tune(a, b, c=c, out=out, scale_a=scale_a, scale_b=scale_b)
            found = _tuned[out.device.index, call.problem]
        plan = found[0] if found else _plan(out.device.index, call.problem)
        plan.run(_device(out.device.index), call, plan.choices[0])
    return out


def multiply(a: Tensor, b: Tensor, out: Tensor | None = None, c: Tensor | None = None) -> Tensor:
    """a @ b (+ c) in 16 bits, into `out` or a new tensor; where it is large, by the fastest algorithm there is.

    Below `LARGE` rows, and on a CPU, torch multiplies.
    """
    if not a.is_cuda or a.shape[0] < LARGE:
        return torch.mm(a, b, out=out) if c is None else torch.addmm(c, a, b, out=out)
    if out is None:
        out = a.new_empty(a.shape[0], b.shape[1])
    return product(a, b, c=c, out=out, tuned=True)


def _may_tune(call: Call) -> bool:
    """Not where c would be added again and again, nor while a graph is recorded."""
    rows, apart = call.out.shape[0], call.problem.beta == 0 or call.c.data_ptr() != call.out.data_ptr()
    return apart and rows & (rows - 1) == 0 and not torch.cuda.is_current_stream_capturing()


def _with_torch(
    a: Tensor, b: Tensor, c: Tensor | None, out: Tensor, scale_a: Tensor | None, scale_b: Tensor | None,
    alpha: float,
) -> Tensor:  # fmt: skip
    """Any dtype, any device. Where `out` has another dtype than the operands, it is rounded before c is added."""
    _check_shapes(a, b, c, out)
    if a.dtype == out.dtype and c is not None:
        return torch.addmm(c, a, b, alpha=alpha, out=out)
    if scale_a is not None and scale_b is not None:
        y = scaled_mm(a, scale_a.reshape(-1, 1), b.T, scale_b, out.dtype)
    elif a.dtype == out.dtype:
        y = torch.mm(a, b, out=out)
    else:
        y = torch.mm(a, b, out_dtype=out.dtype) if a.is_cuda else a.to(out.dtype) @ b.to(out.dtype)
    if c is not None:
        return torch.add(c, y, alpha=alpha, out=out)
    return out.copy_(y) if alpha == 1 else torch.mul(y, alpha, out=out)


def tune(
    a: Tensor, b: Tensor, *, c: Tensor | None = None, out: Tensor, scale_a: Tensor | None = None,
    scale_b: Tensor | None = None, first: int = 16, rounds: int = 5,
) -> tuple[float, ...]:  # fmt: skip
    """Time the heuristic's `first` algorithms; the fastest serves this form of product from then on.

    Which one that was is kept in a file (kernels/_choices.py), for later processes with the same card and library: they
    time nothing, and sum as this one does. The first choice stays unless another is faster by more than `WORTH`.
    Returns the median of each in microseconds, infinite where it failed; of a form that was tuned here, those of then;
    none where it was read, or where torch multiplies. Waits for the device. Where c is `out` it takes room for another
    meanwhile, and leaves `out` as it is; else `out` is written. Of products below 50 microseconds it times the host.
    RuntimeError: in the recording of a CUDA graph.
    """
    if not available(out.device, a.dtype) or not out.numel() or not a.shape[1]:
        return ()
    call = arrange(a, b, c, out, scale_a, scale_b)
    with torch.cuda.device(out.device):
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("algorithms can't be timed while a CUDA graph is recorded: tune before")
        key, device = (out.device.index, call.problem), _device(out.device.index)
        if key not in _tuned:
            plan, kept = _Plan(device, call.problem, first), _choices.kept(_kind(device.index))
            best = kept.get(str(call.problem))
            times: tuple[float, ...] = ()
            if best is None or best >= len(plan.choices):
                if c is not None and call.c.data_ptr() == out.data_ptr():
                    scratch = torch.empty_strided(out.shape, out.stride(), dtype=out.dtype, device=out.device).zero_()
                    call = call._replace(out=scratch, c=scratch)
                times = _times(device, plan, call, rounds)
                fastest = times.index(min(times))
                best = fastest if times[fastest] < (1 - WORTH) * times[0] else 0
                _choices.keep(_kind(device.index), str(call.problem), best)
            plan.choices = [plan.choices[best]]
            _tuned[key] = plan, times
    return _tuned[key][1]


def _kind(index: int) -> str:
    library = _library()
    assert library is not None
    return f"{torch.cuda.get_device_name(index)}, cuBLASLt {library.cublasLtGetVersion()}"


def _times(device: _Device, plan: _Plan, call: Call, rounds: int) -> tuple[float, ...]:
    """In turn, as a card that has grown hot slows down. The first round, which loads kernels, does not count."""
    event: Any = functools.partial(torch.cuda.Event, enable_timing=True)
    spans: list[list[tuple[Any, Any]]] = [[] for _ in plan.choices]
    for _ in range(rounds + 1):
        for choice, timed in zip(plan.choices, spans, strict=True):
            start, end = event(), event()
            start.record()
            try:
                plan.run(device, call, choice)
            except RuntimeError:
                continue  # an algorithm that can't run after all
            end.record()
            timed.append((start, end))
    torch.cuda.synchronize()
    medians = [statistics.median(s.elapsed_time(e) for s, e in timed[1:]) if timed else None for timed in spans]
    if all(ms is None for ms in medians):
        raise RuntimeError(f"no algorithm of cuBLASLt runs {call.problem}")
    return tuple(float("inf") if ms is None else 1000 * ms for ms in medians)
