"""bench/pareto.py: which results share a panel, which lie on the front, and a picture that is the same each time."""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from tests.bench.scripts import load

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "bench" / "pareto.py"
WORK = {"model": "8b", "bs": 2, "ga": 4, "seq": 2048, "gc": "on", "bits": 4, "r": 16}
WORK |= {"full": False, "mixed": False, "packing": False}


pareto = load("pareto")


def line(engine: str, tok_s: float, gib: float | None, run_id: str | None = "one", **work: Any) -> dict[str, Any]:
    hardware = work.pop("hardware", "GPU A")
    measured = {"real_tok_s": tok_s, "peak_allocated_gib": gib, "hardware": hardware, "versions": {}}
    return {"kind": "finetune", "run_id": run_id, "engine": engine, "work": WORK | work, **measured}


MEASURED = [
    line("hf", 5850, 11.25),
    line("hf", 8106, 44.5, gc="off"),
    line("hf-liger", 6552, 10.94),
    line("unsloth", 10030, 6.77),
    line("unsloth", 10725, 8.82, bs=8, ga=1),
    line("unsloth", 14127, 20.97, gc="off"),
    line("whet", 14500, 6.8, bs=4, ga=2),
    line("whet", 13500, 7.0),
    line("whet", 14700, 26.0, bs=8, ga=1, gc="true"),
    line("whet", 16800, 18.5, gc="off"),
    line("whet", 9000, 8.1, mixed=True, packing=True),
    line("hf", 1424, 22.5, mixed=True),
]


def write(folder: Path, *lines: dict[str, Any]) -> Path:
    path = folder / "results.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in lines), encoding="utf-8")
    return path


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("points", "front"),
    [
        ([(6.8, 14500), (7.0, 13500), (18.5, 16800), (26, 14700)], [(6.8, 14500), (18.5, 16800)]),
        ([(18.5, 16800), (6.8, 14500)], [(6.8, 14500), (18.5, 16800)]),
        ([(7, 100), (7, 200), (7, 150)], [(7, 200)]),
        ([(7, 200), (9, 200)], [(7, 200)]),
        ([(7, 200), (7, 200)], [(7, 200)]),
        ([], []),
    ],
)
def test_the_front_is_what_nothing_beats_in_both(
    points: list[tuple[float, float]], front: list[tuple[float, float]]
) -> None:
    """Catches a beaten setting on the line: one that is slower, or no faster and larger; and one drawn twice."""
    found = pareto.front([pareto.Point("whet", gib, tok_s, "") for gib, tok_s in points])
    assert [(p.gib, p.tok_s) for p in found] == front


@pytest.mark.parametrize(
    "changes", [{"bs": 8, "ga": 1}, {"gc": "off"}, {"packing": True}, {"steps": 20}], ids=lambda c: "-".join(c)
)
def test_an_engine_s_own_way_through_the_same_work_is_no_other_panel(changes: dict[str, Any]) -> None:
    assert len(pareto.panels([line("hf", 1, 1), line("whet", 2, 2, **changes)])) == 1


@pytest.mark.parametrize(
    "changes",
    [
        *({"model": "1b"}, {"bits": 16}, {"mixed": True}, {"full": True}, {"r": 64}, {"hardware": "GPU B"}),
        *({"bs": 4}, {"seq": 4096}, {"bs": 1, "ga": 1, "seq": 16384}),
    ],
    ids=lambda c: "-".join(c),
)
def test_other_work_is_another_panel(changes: dict[str, Any]) -> None:
    """Catches results side by side that may not be compared, 8 rows of 2,048 and one of 16,384 tokens among them."""
    assert len(pareto.panels([line("hf", 1, 1), line("whet", 2, 2, **changes)])) == 2


def test_panels_and_points_stand_in_one_order() -> None:
    """Catches a --target for panel 2 that lands in another one when lines were measured in another order."""
    found, turned = pareto.panels(MEASURED), pareto.panels(MEASURED[::-1])
    assert list(found.items()) == list(turned.items())
    assert len(found) == 2


def test_whet_with_an_extra_is_told_apart() -> None:
    """Catches two points of one label, and a peer that is said to run with what merely lay beside it."""
    lines = [line(engine, 100, 7.0) | {"versions": {"flash-attn-4": "4"}} for engine in ("whet", "hf")]
    (points,) = pareto.panels([*lines, line("whet", 90, 7.0)]).values()
    labels = {(point.engine, point.tok_s): point.label for point in points}
    assert labels[("whet", 100)] == labels[("whet", 90)] + ", flash4"
    assert labels[("hf", 100)] == labels[("whet", 90)]


def test_the_rank_of_a_full_fine_tune_means_nothing() -> None:
    """Catches two panels for one work because an option without effect differed."""
    assert len(pareto.panels([line("hf", 1, 1, full=True, r=8), line("whet", 2, 2, full=True)])) == 1


def test_only_the_run_id_that_was_asked_for_is_drawn(tmp_path: Path) -> None:
    """Catches a figure from another machine or day beside this one's."""
    path = write(tmp_path, line("hf", 1, 1), line("whet", 2, 2, "two"), line("whet", 3, 3, None), {"kind": "parity"})
    assert [x["engine"] for x in pareto.read(path, "one")[0]] == ["hf"]
    lines, run_id = pareto.read(path, None)
    assert ([x["engine"] for x in lines], run_id) == (["whet"], "two")


def test_a_target_is_a_point() -> None:
    assert pareto.target("6.8:12000") == pareto.Target(6.8, 12000)
    assert pareto.target("2=6.8:12000") == pareto.Target(6.8, 12000, 2)
    for text in ("6.8", "6.8:", "a:b", "x=1:2", "0=1:2", "=1:2"):
        with pytest.raises(argparse.ArgumentTypeError, match="is not GIB:TOKS"):
            pareto.target(text)


@pytest.mark.parametrize(
    ("lines", "arguments", "message"),
    [
        ([line("hf", 1, 1)], ["--run-id", "none"], "no fine-tune of run id none; run ids there: one"),
        ([line("hf", 1, None)], [], "was not measured on a GPU"),
        ([line("hf", 1, 1)], ["--target", "2=1:1"], "there is no panel 2, only 1"),
        ([line("hf", 1, 1)], ["--target", "1"], "'1' is not GIB:TOKS"),
    ],
)
def test_faults_are_named(tmp_path: Path, lines: list[dict[str, Any]], arguments: list[str], message: str) -> None:
    """Catches an empty picture."""
    done = run(str(write(tmp_path, *lines)), "--out", str(tmp_path / "out.png"), *arguments)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out.png").exists()


def test_without_matplotlib_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit, match=r'pip install "whet\[plots\]"'):
        pareto.draw(pareto.panels(MEASURED), [])


def test_the_picture_depends_on_the_results_alone(tmp_path: Path) -> None:
    """Catches a picture that changes with the order of the lines, or from run to run."""
    pytest.importorskip("matplotlib")
    pictures = []
    for seed in (0, 1):
        lines = random.Random(seed).sample(MEASURED, len(MEASURED))
        done = run(str(write(tmp_path, *lines)), "--target", "1=6.8:15000", "--out", str(tmp_path / f"{seed}.png"))
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        pictures.append((tmp_path / f"{seed}.png").read_bytes())
    assert pictures[0][:8] == b"\x89PNG\r\n\x1a\n"
    assert pictures[0] == pictures[1]


def test_labels_can_be_read() -> None:
    """Catches labels over one another or outside the panel, and a point without one."""
    pytest.importorskip("matplotlib")
    from matplotlib.text import Text

    found = pareto.panels(MEASURED)
    figure = pareto.draw(found, [pareto.Target(6.8, 15000, 1)])
    renderer = figure.canvas.get_renderer()
    for number, (axes, points) in enumerate(zip(figure.axes, found.values(), strict=True), 1):
        assert sorted(t.get_text() for t in axes.texts if "target" not in t.get_text()) == sorted(
            p.label for p in points
        )
        assert sum("target" in t.get_text() for t in axes.texts) == (number == 1)
        boxes = [Text.get_window_extent(text, renderer) for text in axes.texts]
        inside = axes.get_window_extent(renderer)
        assert all(inside.contains(box.x0, box.y0) and inside.contains(box.x1, box.y1) for box in boxes)
        assert not [1 for a, b in combinations(boxes, 2) if a.overlaps(b)]
