"""Where an optimizer step's time goes: a table's lines and a picture, out of what bench/finetune.py --trace recorded.

    python bench/finetune.py --engine whet ... --run-id ID --trace build/trace      -> build/trace/whet.json
    python bench/timeline.py build/trace --out bench/results/trace.jsonl --picture bench/trace.png

After the timed steps finetune.py runs two more under torch.profiler. The first records operations and their shapes
too, which slows the launches down; the second only the GPU, and every time here is the second's. Its k-th kernel of a
name was launched by what launched the first's k-th of that name, where both steps ran the name equally often.

How a kernel gets its category: RULES go by its name and by the operations that launched it, the first that fits counts.
Matrix products (GEMM) are told apart by the shapes of the operation: the head's has the vocabulary for a dimension, or
is launched by a function that HEAD names; LoRA's have a dimension of at most four ranks (q, k and v in one are three).
A product of unknown shape is a base GEMM. The fused block's folded products hold base and LoRA in one: base GEMMs.
transformers' own norms, rope and activations are plain elementwise kernels, which nothing tells apart: "other
elementwise". A kernel without a rule is "other", and its name is printed.

Categories and idle add up to the step's wall time: while several kernels run, the first started counts, and a copy
counts only while no kernel runs. On a CPU the innermost operation counts, and idle is what lies between operations.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import mean, median_low
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DPI = 120
LAUNCHES_KEPT = 50_000  # in a file's timeline: the first micro-batch of an 8B step and more
FALLBACK_US = 25_000.0  # the piece to draw of a step in which no layer was found
SKINNY = 4  # ranks
Line = dict[str, Any]

# Functions that take the head's product and the loss together: whet's, TRL's, Liger's, Unsloth's.
HEAD = re.compile(r"LinearLogProbs|ChunkedLogProb|Linear_?Cross_?Entropy|FusedLoss", re.IGNORECASE)
GEMM = "GEMM"

# Category, pattern in the kernel's name, pattern in the path of operations that launched it; None fits nothing.
RULES: list[tuple[str, str | None, str | None]] = [
    ("optimizer", r"kOptimizer|_adamw?_|_adamw?8bit", r"^Optimizer\.step|::optimizer_update|_foreach_norm|clip_grad"),
    (
        "attention",
        r"sdpa|fmha|flash::|flash_(fwd|bwd|attn)|cudnn::fusion|^_attention|^_(forward|delta|keys|queries)_kernel$",
        r"scaled_dot_product|_(flash|cudnn|efficient)_attention|flash_attn",
    ),
    ("dequantization", r"dequant|_layer_weights_kernel|kQuantize|^_quantize_rows", r"dequantize"),
    (GEMM, r"nvjet|gemm|gemv|cutlass|xmma|cublas|splitK|^aten::(addmm|b?mm|baddbmm|_scaled_mm)$", None),
    ("head GEMM", r"^_cce_|^_indexed_", None),  # product and loss in one kernel
    ("loss", r"_log_probs|cross_entropy|nll_loss|soft_?max", HEAD.pattern + r"|cross_entropy|nll_loss|log_softmax"),
    ("norms", r"(rms|layer)_?norm", None),
    ("rope", r"rope|rotary", None),
    ("activation", r"_glu|swiglu|geglu|silu|gelu|^_fg_kernel|^_DWf_DW_dfg|^_(exact|approx)_(forward|backward)", None),
    (
        "copies and fills",
        r"^Mem(cpy|set)|copy|fill|CatArray|^_extend_kernel|^aten::(fill_|zero_|cat|stack)$",
        r"aten::(copy_|fill_|zero_|cat|stack|_foreach_copy_|_foreach_zero_|index_copy_)$",
    ),
    ("other elementwise", r"elementwise|reduce|multi_tensor_apply|gather|scatter|index|^triton_|^aten::", None),
]
COMPILED = [(category, *(re.compile(p or r"(?!)", re.IGNORECASE) for p in patterns)) for category, *patterns in RULES]
BACKWARD = re.compile(r"bprop|bwd|backward|^_(keys|queries)_kernel", re.IGNORECASE)

# In the order of the picture and the table. Colours are Okabe and Ito's, told apart by the colour-blind, and shades of
# them by hatching; the picture names all of them directly as well.
STYLES: dict[str, tuple[str, str]] = {
    "base GEMMs": ("#0072B2", ""),
    "LoRA GEMMs": ("#56B4E9", ""),
    "head GEMM": ("#0072B2", "////"),
    "attention": ("#D55E00", ""),
    "dequantization": ("#F0E442", ""),
    "norms": ("#009E73", ""),
    "rope": ("#009E73", "////"),
    "activation": ("#CC79A7", ""),
    "loss": ("#CC79A7", "////"),
    "copies and fills": ("#E69F00", ""),
    "optimizer": ("#E69F00", "////"),
    "other elementwise": ("#999999", ""),
    "other": ("#000000", ""),
    "idle": ("#FFFFFF", ""),
}
CATEGORIES = list(STYLES)
NAMES = {"whet": "whet", "hf": "transformers + PEFT", "hf-liger": "transformers + PEFT + Liger", "unsloth": "Unsloth"}


@dataclass(frozen=True)
class Event:
    """A kernel, copy or fill on the GPU, or an operation on the CPU; microseconds."""

    name: str
    start: float
    duration: float
    copies: bool = False
    path: str = ""  # of the operations that launched it, outermost first
    dims: tuple[tuple[int, ...], ...] = ()  # of a matrix product's operands

    @property
    def end(self) -> float:
        return self.start + self.duration


def recorder(after: int) -> Any:
    """A trainer callback that profiles the two steps that follow the first `after`."""
    import torch
    from torch.profiler import ProfilerActivity, profile
    from transformers import TrainerCallback

    cuda = torch.cuda.is_available()

    def now() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    class Recorder(TrainerCallback):
        def __init__(self) -> None:
            self.profile: Any = None
            self.wall_us: list[float] = []
            self.steps: list[list[Event]] = []

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step < after:
                return
            full = state.global_step == after
            activities = [ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]
            if cuda and full:
                activities.append(ProfilerActivity.CPU)
            self.profile = profile(activities=activities, record_shapes=full)
            self.profile.start()
            self.started = now()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.profile is None:
                return
            self.wall_us.append((now() - self.started) * 1e6)
            self.profile.stop()
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "trace.json"
                self.profile.export_chrome_trace(str(path))
                self.steps.append(events(json.loads(path.read_text("utf-8", "replace"))["traceEvents"], cuda))
            self.profile = None

        def trace(self) -> Line:
            """The step, as a file holds it."""
            full, quick = self.steps
            if not quick:  # a profiler that records no kernels without operations
                return {"device": "cuda" if cuda else "cpu"} | summary(full, self.wall_us[0], innermost=not cuda)
            timed = summary(joined(quick, full), self.wall_us[1], innermost=not cuda)
            return {"device": "cuda" if cuda else "cpu"} | timed

    return Recorder()


GEMM_OPERATIONS = re.compile(r"aten::(addmm|b?mm|baddbmm|_scaled_mm)$")
ENGINE = "autograd::engine::evaluate_function"


def events(trace: Iterable[Line], cuda: bool) -> list[Event]:
    """The GPU's events of a Chrome trace, or without `cuda` the CPU's operations, by start, with what launched them.

    A GPU event carries the number of the operation that launched it ("External id"); where that is missing, the call of
    the same "correlation" tells which operations were open on its thread.
    """
    spans = [e for e in trace if e.get("ph") == "X"]
    threads: dict[Any, list[Line]] = defaultdict(list)
    calls = ("cpu_op", "user_annotation", "cuda_runtime", "cuda_driver")
    for e in spans:
        name = e["name"]
        if e.get("cat") in calls and not name.startswith((ENGINE, "ProfilerStep")):
            threads[e.get("pid"), e.get("tid")].append(e)
    by_id: dict[Any, tuple[str, Any]] = {}
    by_correlation: dict[Any, tuple[str, Any]] = {}
    operations = []
    for thread in threads.values():
        for e, path, dims in nested(thread):
            args = e.get("args", {})
            if e["cat"].startswith("cuda_"):
                by_correlation[args.get("correlation")] = path, dims
            elif e["cat"] == "cpu_op":
                by_id[args.get("External id")] = path, dims
                operations.append(Event(e["name"], e["ts"], e["dur"], False, path, dims))
    by_id.pop(None, None)  # what carries no number was launched by none of those that carry none
    by_correlation.pop(None, None)
    if not cuda:
        return sorted(operations, key=lambda e: (e.start, -e.duration))
    found = []
    for e in spans:
        if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            args = e.get("args", {})
            fallback = by_correlation.get(args.get("correlation"), ("", ()))
            path, dims = by_id.get(args.get("External id"), fallback)
            found.append(Event(e["name"], e["ts"], e["dur"], e["cat"] != "kernel", path, dims))
    return sorted(found, key=lambda e: e.start)


def nested(thread: list[Line]) -> Iterator[tuple[Line, str, tuple[tuple[int, ...], ...]]]:
    """Each event of a thread with the names of those that enclose it, itself last unless it is a CUDA call.

    The dimensions are those of the innermost operation where that is a matrix product.
    """
    stack: list[tuple[float, str, tuple[tuple[int, ...], ...]]] = [(float("inf"), "", ())]
    for e in sorted(thread, key=lambda e: (e["ts"], -e.get("dur", 0))):
        while e["ts"] >= stack[-1][0]:
            stack.pop()
        _, path, dims = stack[-1]
        if not e["cat"].startswith("cuda_"):
            path = f"{path} / {e['name']}" if path else e["name"]
            dims = ()
            if GEMM_OPERATIONS.fullmatch(e["name"]):
                shapes = e.get("args", {}).get("Input Dims") or []
                dims = tuple(tuple(d) for d in shapes if len(d) >= 2 and all(isinstance(n, int) for n in d))
            stack.append((e["ts"] + e.get("dur", 0), path, dims))
        yield e, path, dims


def joined(quick: list[Event], full: list[Event]) -> list[Event]:
    """The quick step's events with the full step's paths and dimensions, the k-th of a name with the k-th."""
    known: dict[str, deque[Event]] = defaultdict(deque)
    for e in full:
        known[e.name].append(e)
    counts = Counter(e.name for e in quick)
    sure = {name for name in counts if counts[name] == len(known[name])}
    return [
        replace(e, path=twin.path, dims=twin.dims)
        for e in quick
        for twin in [known[e.name].popleft() if e.name in sure else e]
    ]


def pieces(found: list[Event], innermost: bool) -> Iterator[tuple[int, float, float]]:
    """(index, start, end) such that every moment in which something runs belongs to one event.

    Of several: the last started where operations nest; else the first started, and a copy after every kernel.
    """
    edges = sorted([(e.start, 1, i) for i, e in enumerate(found)] + [(e.end, 0, i) for i, e in enumerate(found)])
    kernels: dict[int, None] = {}  # a dict keeps the order in which they started
    copies: dict[int, None] = {}
    before = 0.0
    for moment, starts, i in edges:
        running = kernels or copies
        if running and moment > before:
            yield next(reversed(running) if innermost else iter(running)), before, moment
        before = moment
        among = copies if found[i].copies else kernels
        if starts and found[i].duration > 0:
            among[i] = None
        elif not starts:
            among.pop(i, None)


def summary(found: list[Event], wall_us: float, innermost: bool) -> Line:
    """Kernels added up by name, path and dimensions, and the timeline of those that come first.

    us: the sum of durations; alone_us: what counts of it, which adds up to busy_us.
    """
    alone = [0.0] * len(found)
    own = list(pieces(found, innermost))
    for i, start, end in own:
        alone[i] += end - start
    kinds: dict[tuple[Any, ...], int] = {}
    kernels: list[Line] = []
    kind_of = []
    for e, counts in zip(found, alone, strict=True):
        kind = kinds.setdefault((e.name, e.path, e.dims), len(kinds))
        kind_of.append(kind)
        if kind == len(kernels):
            kernels.append({"name": e.name, "count": 0, "us": 0.0, "alone_us": 0.0, "path": e.path, "dims": e.dims})
        kernels[kind]["count"] += 1
        kernels[kind]["us"] += e.duration
        kernels[kind]["alone_us"] += counts
    spans = own if innermost else [(i, e.start, e.end) for i, e in enumerate(found)]
    zero = min((start for _, start, _ in spans), default=0.0)
    kept = spans[:LAUNCHES_KEPT]
    busy = sum(alone)
    return {
        "wall_us": round(max(wall_us, busy), 1),
        "busy_us": round(busy, 1),
        "launches": len(found),
        "kernels": [k | {"us": round(k["us"], 3), "alone_us": round(k["alone_us"], 3)} for k in kernels],
        "timeline": {  # kernel: the place in kernels; microseconds after the first launch began
            "left_out": len(spans) - len(kept),
            "kernel": [kind_of[i] for i, _, _ in kept],
            "start_us": [round(start - zero, 2) for _, start, _ in kept],
            "duration_us": [round(end - start, 2) for _, start, end in kept],
        },
    }


def category(kernel: Line, work: Line, vocabulary: int) -> str:
    name, path = kernel["name"], kernel["path"]
    for found, by_name, by_path in COMPILED:
        if by_name.search(name) or by_path.search(path):
            return product(kernel, work, vocabulary) if found == GEMM else found
    return "other"


def product(kernel: Line, work: Line, vocabulary: int) -> str:
    """Which of the matrix products."""
    sizes = {n for dims in kernel["dims"] for n in dims}
    if vocabulary in sizes or HEAD.search(kernel["path"]):
        return "head GEMM"
    flat = bool(sizes) and all(len(dims) == 2 for dims in kernel["dims"])  # a batch may be as small as a rank
    return "LoRA GEMMs" if flat and not work["full"] and min(sizes) <= SKINNY * work["r"] else "base GEMMs"


def categories(trace: Line) -> list[str]:
    """Of each of its kernels."""
    return [category(kernel, trace["work"], trace["vocabulary"]) for kernel in trace["kernels"]]


def line(trace: Line) -> Line:
    """The result: milliseconds by category, idle among them, together the step's wall time."""
    ms = dict.fromkeys(CATEGORIES, 0.0)
    for kernel, found in zip(trace["kernels"], categories(trace), strict=True):
        ms[found] += kernel["alone_us"] / 1e3
    ms["idle"] = trace["wall_us"] / 1e3 - sum(ms.values())
    return {
        "kind": "trace",
        "run_id": trace["run_id"],
        "engine": trace["engine"],
        "device": trace["device"],
        "work": trace["work"],
        "wall_ms": round(trace["wall_us"] / 1e3, 3),
        "timed_ms": trace["timed_ms"],
        "busy_ms": round(trace["busy_us"] / 1e3, 3),
        "overlap_ms": round(sum(k["us"] - k["alone_us"] for k in trace["kernels"]) / 1e3, 3),
        "launches": trace["launches"],
        "ms": {name: round(value, 3) for name, value in ms.items()},
        **{name: trace[name] for name in ("hardware", "versions", "commit", "dirty", "date")},
    }


def unknown(trace: Line) -> list[str]:
    """The kernels that no rule fits, longest first."""
    ms: Counter[str] = Counter()
    for kernel, found in zip(trace["kernels"], categories(trace), strict=True):
        if found == "other":
            ms[kernel["name"]] += kernel["alone_us"] / 1e3
    return [f"{name}: {value:.3f} ms" for name, value in ms.most_common()]


def layers(trace: Line, found: list[str]) -> list[tuple[str, float, float]]:
    """(title, start, end) of one layer's forward and of one's backward, in microseconds.

    On a CPU, and where no two layers were found, a piece out of the middle.
    A layer reaches from one attention kernel to the next of its kind, which is one layer's work even though it starts
    in the middle of one. Of all layers the one of median length is taken. The forward's lie outside the backward: what
    a backward computes again is part of it.
    """
    timeline = trace["timeline"]
    launches = list(zip(timeline["kernel"], timeline["start_us"], timeline["duration_us"], strict=True))
    totals: dict[bool, Counter[str]] = {False: Counter(), True: Counter()}
    for kernel, kind in zip(trace["kernels"], found, strict=True):
        if kind == "attention":
            totals[bool(BACKWARD.search(kernel["name"]))][kernel["name"]] += kernel["us"]
    marks: dict[str, bool] = {}
    for backward, names in totals.items():
        marks |= {name: backward for name, _ in names.most_common(1)}
    # (in the backward?, end) of every attention in the order of time
    seen = [
        (marks[name], start + duration)
        for k, start, duration in launches
        for name in [trace["kernels"][k]["name"]]
        if name in marks
    ]
    windows = []
    for backward, title in ((False, "forward"), (True, "backward")):
        own = [(i, end) for i, (which, end) in enumerate(seen) if which == backward]
        spans = [(end - start, start, end) for (i, start), (j, end) in pairwise(own) if backward or j == i + 1]
        if spans:
            _, start, end = median_low(spans)
            windows.append((f"one layer's {title}: {(end - start) / 1e3:.2f} ms", start, end))
    if trace["device"] == "cuda" and len(windows) == 2:
        return windows
    last = max((start + duration for _, start, duration in launches), default=0.0)
    start = max(0.0, (last - FALLBACK_US) / 2)
    return [("out of the middle of the step", start, min(last, start + FALLBACK_US))]


def blocks(trace: Line, found: list[str], start: float, end: float) -> dict[str, list[tuple[float, float]]]:
    """(start, duration) in ms after `start` of what runs until `end`, by category."""
    shown: dict[str, list[tuple[float, float]]] = defaultdict(list)
    timeline = trace["timeline"]
    for k, begin, duration in zip(timeline["kernel"], timeline["start_us"], timeline["duration_us"], strict=True):
        low, high = max(begin, start), min(begin + duration, end)
        if high > low:
            shown[found[k]].append(((low - start) / 1e3, (high - low) / 1e3))
    return shown


def label(trace: Line) -> str:
    work = trace["work"]
    kept = {"on": "least memory", "true": "recomputing", "off": "keeping all"}[work["gc"]]
    if work.get("gpu_memory"):
        kept = f"within {work['gpu_memory']} GiB"
    return f"{NAMES.get(trace['engine'], trace['engine'])}, {work['bs']}x{work['ga']}, {kept}"


def draw(traces: list[Line]) -> Any:
    """The figure: a bar of categories for each trace, and below it one layer of each. Needs matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        sys.exit('plots need matplotlib: pip install "whet[plots]"')
    kinds = [categories(trace) for trace in traces]
    windows = [layers(trace, found) for trace, found in zip(traces, kinds, strict=True)]
    shown = [
        [blocks(trace, found, *window[1:]) for window in own]
        for trace, found, own in zip(traces, kinds, windows, strict=True)
    ]
    present = [name for name in CATEGORIES if any(name in panel for own in shown for panel in own)]
    heights = [1.25 * len(traces) + 0.5, *[0.24 * max(len(present), 4) + 0.7 for _ in traces]]
    figure = Figure(figsize=(15, sum(heights) + 0.6), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(hspace=0.04)
    grid = figure.add_gridspec(len(traces) + 1, 2, height_ratios=heights)
    bars = figure.add_subplot(grid[0, :])
    draw_bars(bars, [line(trace) for trace in traces], [label(trace) for trace in traces])
    machine = "GPU" if traces[0]["device"] == "cuda" else "CPU"
    work = traces[0]["work"]
    bars.set_title(
        f"One optimizer step: where the {machine}'s time goes. {work['model']}, rows of {work['seq']:,} tokens; "
        f"{traces[0]['hardware']}",
        fontsize=11,
    )
    # one scale a column, so that lengths compare
    longest = [max((own[c][2] - own[c][1] for own in windows if len(own) == 2), default=0) / 1e3 for c in (0, 1)]
    for row, (trace, own, panels) in enumerate(zip(traces, windows, shown, strict=True), 1):
        for column, ((title, start, end), panel) in enumerate(zip(own, panels, strict=True)):
            pair = len(own) == 2
            axes = figure.add_subplot(grid[row, column] if pair else grid[row, :])
            draw_layer(axes, panel, present, longest[column] if pair else (end - start) / 1e3)
            axes.set_title(f"{label(trace)}: {title}", fontsize=9)
            if row == len(traces):
                axes.set_xlabel("ms", fontsize=9)
    figure.canvas.draw()  # fixes the places of everything, which labels then keep clear of
    figure.set_layout_engine("none")
    label_bars(bars, [line(trace) for trace in traces])
    return figure


def draw_bars(axes: Any, lines: list[Line], labels: list[str]) -> None:
    for row, one in enumerate(lines):
        left = 0.0
        for name, (colour, hatch) in STYLES.items():
            width = max(one["ms"][name], 0.0)
            axes.barh(row, width, 0.42, left, color=colour, hatch=hatch, edgecolor="#333333", linewidth=0.5)
            left += width
    names = []
    for text, one in zip(labels, lines, strict=True):
        counted = "launches" if one["device"] == "cuda" else "operations"
        steps = f"{figures(one['wall_ms'])} ms traced, {figures(one['timed_ms'])} timed"
        names.append(f"{text}\n{steps}\n{one['launches']:,} {counted}")
    axes.set_yticks(range(len(lines)), names, fontsize=9)
    axes.set_xlim(0, max(one["wall_ms"] for one in lines) * 1.01)
    axes.set_ylim(len(lines) - 0.35, -0.45)
    axes.set_xlabel("ms", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def label_bars(axes: Any, lines: list[Line]) -> None:
    """A name and its ms in each segment that has room; below the bar, with a line to it, for the others."""
    renderer = axes.figure.canvas.get_renderer()
    scale = axes.get_window_extent(renderer).width / axes.get_xlim()[1]  # pixels a ms
    for row, one in enumerate(lines):
        left = 0.0
        below: list[tuple[float, Any, float]] = []  # middle, text, width: all in ms
        for name in CATEGORIES:
            width = max(one["ms"][name], 0.0)
            middle, left = left + width / 2, left + width
            if width * scale < 1:  # thinner than a pixel: the table has it
                continue
            dark = name in ("base GEMMs", "other")
            text = axes.text(middle, row, f"{name}\n{figures(width)}", ha="center", va="center", fontsize=8, zorder=5)
            size = text.get_window_extent(renderer).width / scale
            if size + 6 / scale < width:
                text.set_color("white" if dark else "black")
                if STYLES[name][1]:  # readable on hatching
                    text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1})
            else:
                text.set_fontsize(7)
                text.set_va("top")
                below.append((middle, text, text.get_window_extent(renderer).width / scale))
        for (middle, text, _), x in zip(below, spread(below, axes.get_xlim()[1], 6 / scale), strict=True):
            text.set_position((x, row + 0.34))
            axes.plot([middle, x], [row + 0.21, row + 0.33], color="#333333", lw=0.6, zorder=4)


def figures(ms: float) -> str:
    """Three digits, without an exponent."""
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.3g}"


def spread(items: list[tuple[float, Any, float]], limit: float, gap: float) -> list[float]:
    """Middles for labels of these widths: all of them apart, left of `limit`, and least far from where they belong."""
    offsets, edge = [], 0.0  # of each label from the first one's left end, were they side by side
    for _, _, width in items:
        offsets.append(edge + width / 2)
        edge += width + gap
    groups: list[list[float]] = []  # labels that touch, each with where the row would start for it alone
    for (middle, _, _), offset in zip(items, offsets, strict=True):
        groups.append([middle - offset])
        while len(groups) > 1 and mean(groups[-2]) > mean(groups[-1]):
            groups[-2:] = [groups[-2] + groups[-1]]
    starts = [min(max(mean(group), 0.0), limit + gap - edge) for group in groups for _ in group]
    return [start + offset for start, offset in zip(starts, offsets, strict=True)]


def draw_layer(axes: Any, panel: dict[str, list[tuple[float, float]]], present: list[str], longest: float) -> None:
    for row, name in enumerate(present):
        colour, hatch = STYLES[name]
        edge = "#333333" if hatch else colour
        axes.broken_barh(
            panel.get(name, []), (row - 0.42, 0.84), facecolor=colour, hatch=hatch, edgecolor=edge, linewidth=0.4
        )
    axes.set_yticks(range(len(present)), present, fontsize=8)
    axes.set(xlim=(0, longest), ylim=(len(present) - 0.5, -0.5))
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)


def read(folders: list[Path], run_id: str | None) -> list[Line]:
    """The traces in these folders, all of one run id on one piece of hardware. Raises SystemExit where they are not."""
    paths = [path for folder in folders for path in sorted(folder.glob("*.json"))]
    traces = []
    for path in paths:
        try:
            trace = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            sys.exit(f"{path}: {error}")
        if not isinstance(trace, dict) or "timeline" not in trace:
            sys.exit(f"{path} is not a trace of bench/finetune.py --trace")
        if trace["run_id"] is None:
            trace["run_id"] = run_id
        traces.append(trace)
    chosen = [trace for trace in traces if run_id is None or trace["run_id"] == run_id]
    have = sorted({str(trace["run_id"]) for trace in traces})
    if not chosen:
        sys.exit(f"no trace of run id {run_id} in {', '.join(map(str, folders))}; run ids there: {have or 'none'}")
    if len({(trace["run_id"], trace["hardware"]) for trace in chosen}) > 1:
        sys.exit(f"traces of several runs or machines cannot be compared: name one with --run-id, of {have}")
    order = list(NAMES)
    return sorted(chosen, key=lambda t: order.index(t["engine"]) if t["engine"] in order else len(order))


def write(lines: list[Line], path: Path) -> None:
    """Append them to `path`; one of the same run, engine and work that is there already is replaced."""

    def key(one: Line) -> tuple[str, ...]:
        return tuple(json.dumps(one.get(name), sort_keys=True) for name in ("run_id", "engine", "work"))

    path.parent.mkdir(parents=True, exist_ok=True)
    old = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    new = {key(one) for one in lines}
    kept = [one for one in old if key(one) not in new] + lines
    path.write_text("".join(json.dumps(one) + "\n" for one in kept), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="what finetune.py --trace wrote")
    parser.add_argument("--run-id", default=None, help="only the traces of this run")
    parser.add_argument("--out", type=Path, default=None, help="a .jsonl file for a line an engine")
    parser.add_argument("--picture", type=Path, default=None, help="a .png to draw; needs matplotlib")
    args = parser.parse_args()
    traces = read(args.folders, args.run_id)
    lines = [line(trace) for trace in traces]
    for trace, one in zip(traces, lines, strict=True):
        print(json.dumps(one))
        for text in unknown(trace):
            print(f"{trace['engine']}: no category for {text}", file=sys.stderr)
    if args.out is not None:
        write(lines, args.out)
    if args.picture is not None:
        figure = draw(traces)
        args.picture.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(args.picture, dpi=DPI, metadata={"Software": None})  # which would name matplotlib's version


if __name__ == "__main__":
    main()
