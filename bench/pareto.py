"""Throughput against memory: a picture of bench/finetune.py's results of one run id.

    python bench/pareto.py qlora --run-id ID --target 6.8:12000         -> bench/pareto.png

One panel for each work: the same model, base, rows a step and their length, on the same hardware. A line joins whet's
settings that no other of its settings beats in both. Lines without a GPU's peak are left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from table import Line, with_flash4

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
DPI = 120

# Okabe and Ito's colours, told apart by the colour-blind; markers tell the same in grey.
STYLES = {
    "whet": ("whet", "#D55E00", "o"),
    "hf": ("transformers + PEFT", "#0072B2", "s"),
    "hf-liger": ("transformers + PEFT + Liger", "#009E73", "D"),
    "unsloth": ("Unsloth", "#CC79A7", "^"),
}
OTHER = ("black", "v")
TARGET = ("target", "#555555", "*")
KEPT = {"on": "least memory", "true": "recomputing", "off": "keeping all"}


@dataclass(frozen=True, order=True)
class Panel:
    """What may be compared. rows: a step's, of all micro-batches; packing and recomputation are an engine's own way."""

    model: str
    bits: int
    full: bool
    mixed: bool
    rows: int
    seq: int
    r: int
    hardware: str

    @property
    def title(self) -> str:
        kind = "full fine-tune" if self.full else f"{'QLoRA' if self.bits == 4 else 'LoRA'} r={self.r}"
        rows = "1 row" if self.rows == 1 else f"{self.rows} rows"
        return f"{self.model}, {kind}, {rows} of {'up to ' if self.mixed else ''}{self.seq:,} tokens a step"


@dataclass(frozen=True)
class Point:
    """One run: GiB at its peak, real tokens a second."""

    engine: str
    gib: float
    tok_s: float
    label: str


@dataclass(frozen=True)
class Target:
    """A point to reach, in one panel (counted from 1) or in all."""

    gib: float
    tok_s: float
    panel: int | None = None


def target(text: str) -> Target:
    """GIB:TOKS, or PANEL=GIB:TOKS."""
    panel, equals, point = text.rpartition("=")
    gib, colon, tok_s = point.partition(":")
    try:
        if not colon or (equals and int(panel) < 1):
            raise ValueError
        return Target(float(gib), float(tok_s), int(panel) if equals else None)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not GIB:TOKS or PANEL=GIB:TOKS, such as 6.8:12000") from None


def read(path: Path, run_id: str | None) -> tuple[list[Line], str]:
    """The fine-tunes of one run id (the file's last, unless it is named). Raises SystemExit where there are none."""
    try:
        lines = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        sys.exit(f"{path}: {error}")
    lines = [line for line in lines if line["kind"] == "finetune" and line["run_id"] is not None]
    if run_id is None and lines:
        run_id = lines[-1]["run_id"]
    chosen = [line for line in lines if line["run_id"] == run_id]
    if not chosen:
        have = ", ".join(sorted({line["run_id"] for line in lines})) or "none"
        sys.exit(f"{path.name} has no fine-tune of run id {run_id}; run ids there: {have}")
    return chosen, str(run_id)


def panels(lines: list[Line]) -> dict[Panel, list[Point]]:
    """Points by panel, both in an order that does not depend on the file's."""
    found: dict[Panel, list[Point]] = {}
    for line in lines:
        if line["peak_allocated_gib"] is None:
            continue
        work = line["work"]
        r = 0 if work["full"] else work["r"]
        panel = Panel(
            model=work["model"],
            bits=work["bits"],
            full=work["full"],
            mixed=work["mixed"],
            rows=work["bs"] * work["ga"],
            seq=work["seq"],
            r=r,
            hardware=line["hardware"],
        )
        extra = ", flash4" if with_flash4(line) else ""
        point = Point(line["engine"], line["peak_allocated_gib"], line["real_tok_s"], setting(work) + extra)
        found.setdefault(panel, []).append(point)
    order = list(STYLES)

    def place(point: Point) -> tuple[Any, ...]:
        known = order.index(point.engine) if point.engine in order else len(order)
        return known, point.engine, point.gib, point.tok_s, point.label

    return {panel: sorted(found[panel], key=place) for panel in sorted(found)}


def setting(work: Line) -> str:
    """An engine's own choices: micro-batches, what it keeps, packing."""
    kept = f"within {work['gpu_memory']} GiB" if work.get("gpu_memory") else KEPT[work["gc"]]
    packed, fp8 = ", packed" if work["packing"] else "", ", fp8" if work.get("compute") == "fp8" else ""
    return f"{work['bs']}x{work['ga']}, {kept}{packed}{fp8}"


def front(points: list[Point]) -> list[Point]:
    """Points that no other beats in memory and speed at once, from the least memory on."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.gib, -p.tok_s)):
        if not best or point.tok_s > best[-1].tok_s:
            best.append(point)
    return best


def draw(found: dict[Panel, list[Point]], targets: list[Target]) -> Any:
    """The figure. Raises SystemExit without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        sys.exit('plots need matplotlib: pip install "whet[plots]"')
    columns = min(2, len(found))
    rows = -(-len(found) // columns)
    figure = Figure(figsize=(8 * columns, 5.5 * rows), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid[len(found) :]:
        axes.remove()
    for number, (axes, (panel, points)) in enumerate(zip(grid, found.items(), strict=False), 1):
        draw_panel(axes, points, [t for t in targets if t.panel in (None, number)])
        count = f"{number}. " if len(found) > 1 else ""
        axes.set_title(f"{count}{panel.title}\n{panel.hardware}", fontsize=11)
    entries: dict[str, Any] = {}
    for axes in grid[: len(found)]:
        handles, names = axes.get_legend_handles_labels()
        entries |= {name: handle for name, handle in zip(names, handles, strict=True) if name not in entries}
    figure.legend(
        entries.values(), entries, loc="outside lower center", ncols=min(len(entries), 3 * columns), fontsize=10
    )
    figure.canvas.draw()  # fixes the places of everything, which labels then keep clear of
    figure.set_layout_engine("none")
    for number, (axes, points) in enumerate(zip(grid, found.values(), strict=False), 1):
        wanted = [t for t in targets if t.panel in (None, number)]
        labels = [Point(TARGET[0], t.gib, t.tok_s, f"target: {t.gib:g} GiB, {t.tok_s:,.0f}") for t in wanted]
        place_labels(axes, [*labels, *points])
    return figure


def style(engine: str) -> tuple[str, str, str]:
    """Name, colour and marker."""
    return TARGET if engine == TARGET[0] else STYLES.get(engine, (engine, *OTHER))


def draw_panel(axes: Any, points: list[Point], targets: list[Target]) -> None:
    best = front([p for p in points if p.engine == "whet"])
    if best:
        axes.step(*zip(*((p.gib, p.tok_s) for p in best), strict=True), where="post", color=STYLES["whet"][1], lw=2)
    for engine in dict.fromkeys(p.engine for p in points):
        name, colour, marker = style(engine)
        own = [p for p in points if p.engine == engine]
        # whet's settings that another of its settings beats are hollow
        faces = [colour if engine != "whet" or p in best else "white" for p in own]
        xs, ys = [p.gib for p in own], [p.tok_s for p in own]
        axes.scatter(xs, ys, s=70, c=faces, edgecolors=colour, marker=marker, linewidths=1.6, zorder=3)
        axes.scatter([], [], s=70, c=colour, marker=marker, label=name)
    if targets:
        name, colour, marker = TARGET
        axes.scatter([t.gib for t in targets], [t.tok_s for t in targets], s=190, c=colour, marker=marker, label=name)
    widest = max([p.gib for p in points] + [t.gib for t in targets])
    fastest = max([p.tok_s for p in points] + [t.tok_s for t in targets])
    axes.set(xlim=(0, widest * 1.22), ylim=(0, fastest * 1.2), xlabel="peak allocated, GiB", ylabel="tokens a second")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.grid(alpha=0.25)


# Where a label may stand beside its point, in points of type: the first place that is free is taken.
PLACES = [
    *((10, 0, "left", "center"), (-10, 0, "right", "center"), (0, 10, "center", "bottom"), (0, -10, "center", "top")),
    *((8, 8, "left", "bottom"), (8, -8, "left", "top"), (-8, 8, "right", "bottom"), (-8, -8, "right", "top")),
    *((14, 20, "left", "bottom"), (14, -20, "left", "top"), (-14, 20, "right", "bottom"), (-14, -20, "right", "top")),
    *((14, 34, "left", "bottom"), (14, -34, "left", "top"), (-14, 34, "right", "bottom"), (-14, -34, "right", "top")),
]


def place_labels(axes: Any, points: list[Point]) -> None:
    """Each point's setting beside it, clear of points, labels, the line and the edges where that can be."""
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    renderer = axes.figure.canvas.get_renderer()
    inside = axes.get_window_extent(renderer)
    half = 6 * axes.figure.dpi / 72
    taken = []
    for point in points:
        x, y = axes.transData.transform((point.gib, point.tok_s))
        taken.append(Bbox([[x - half, y - half], [x + half, y + half]]))
    lines = [line.get_transform().transform_path(line.get_path()) for line in axes.lines]
    for point in points:
        colour = style(point.engine)[1]
        text = axes.annotate(
            point.label,
            (point.gib, point.tok_s),
            (0, 0),
            textcoords="offset points",
            fontsize=8,
            color="#222222",
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.6, "shrinkA": 0, "shrinkB": 5},
        )
        scores = []
        for place in PLACES:
            move(text, place)
            text.update_positions(renderer)
            box = Text.get_window_extent(text, renderer)  # an annotation's own has its line to the point in it
            faults = 3 * sum(box.overlaps(other) for other in taken)
            faults += sum(path.intersects_bbox(box, filled=False) for path in lines)
            faults += 10 * (not (inside.contains(box.x0, box.y0) and inside.contains(box.x1, box.y1)))
            scores.append(faults)
        move(text, PLACES[scores.index(min(scores))])
        text.update_positions(renderer)
        taken.append(Text.get_window_extent(text, renderer))


def move(text: Any, place: tuple[float, float, str, str]) -> None:
    dx, dy, across, down = place
    text.set_position((dx, dy))
    text.set_ha(across)
    text.set_va(down)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="a file of bench/results without its .jsonl, or a path")
    parser.add_argument("--run-id", default=None, help="by default that of the file's last fine-tune")
    parser.add_argument("--target", type=target, action="append", default=[], help="GIB:TOKS, or PANEL=GIB:TOKS")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "pareto.png")
    args = parser.parse_args()
    path = Path(args.name) if args.name.endswith(".jsonl") else RESULTS / f"{args.name}.jsonl"
    lines, run_id = read(path, args.run_id)
    found = panels(lines)
    if not found:
        sys.exit(f"{path.name}: run id {run_id} was not measured on a GPU, so there is no peak to draw")
    for t in args.target:
        if t.panel is not None and t.panel > len(found):
            sys.exit(f"--target: there is no panel {t.panel}, only {len(found)}")
    figure = draw(found, args.target)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=DPI, metadata={"Software": None})  # which would name matplotlib's version


if __name__ == "__main__":
    main()
