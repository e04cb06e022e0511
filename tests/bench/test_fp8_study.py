"""bench/fp8_study.py: from text to lines and their table, in seconds, with FP8's references."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BENCH = Path(__file__).parents[2] / "bench"
SIZES = {"width": 256, "hidden": 512, "layers": 2, "heads": 4, "kv-heads": 2, "vocabulary": 300, "seq": 32}
SIZES |= {"pretrain-steps": 3, "pretrain-rows": 2, "pretrain-mb": 0.1, "steps": 3, "rows": 2, "heldout-rows": 4}
TINY = [text for name, value in SIZES.items() for text in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    """bench/ as an importable folder: import_module(name)."""
    before = set(sys.modules)
    sys.path.insert(0, str(BENCH))
    try:
        yield import_module
    finally:
        sys.path.remove(str(BENCH))
        for name in {"fp8_study", "table", "timeline", "environment"} - before:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def study(bench: Any) -> Iterator[Any]:
    """The script as a module, with few files to read."""
    module = bench("fp8_study")
    with pytest.MonkeyPatch.context() as patch:
        few = [f"/* header {i} */\n" + "int f(void);\n" * 200 for i in range(8)]
        patch.setattr(module, "header_texts", lambda: iter(few))
        yield module


@pytest.fixture(scope="module")
def place(study: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The base, and the lines of three ways and two seeds."""
    folder = tmp_path_factory.mktemp("fp8")
    base, out = folder / "base", folder / "results" / "fp8.jsonl"
    study.main([*TINY, "--seeds", "1", "2", "--run-id", "one", "--base", str(base), "--out", str(out)])
    return base, out


@pytest.fixture
def lines(place: tuple[Path, Path]) -> list[dict[str, Any]]:
    return [json.loads(text) for text in place[1].read_text(encoding="utf-8").splitlines()]


def test_a_line_for_each_way_and_seed(study: Any, lines: list[dict[str, Any]]) -> None:
    """Catches a figure that nobody can place, and ways that do not start alike or do not see the same rows."""
    assert [(line["way"], line["seed"]) for line in lines] == [(way, seed) for way in study.WAYS for seed in (1, 2)]
    for line in lines:
        assert {"kind", "run_id", "hardware", "versions", "commit", "dirty", "date", "work"} < line.keys()
        assert len(line["losses"]) == 3
        assert line["work"]["pretrain"]["tokens"] == 3 * 2 * 32
    for seed in (1, 2):
        assert len({(x["start"], x["rows"]) for x in lines if x["seed"] == seed}) == 1
    assert len({(x["start"], x["rows"]) for x in lines}) == 2


def test_the_ways_are_three_computations(lines: list[dict[str, Any]]) -> None:
    """Catches a way that is another one under its name, an adapter that does not train, a seed kept from the last."""
    for part in ("before", "after"):
        assert len({line[part] for line in lines if line["seed"] == 1}) == 3
    before = {way: {x["before"] for x in lines if x["way"] == way} for way in ("bf16", "nf4", "nf4+fp8")}
    assert all(len(found) == 1 for found in before.values())  # B is zero: no adapter, whatever its seed
    assert all(line["after"] < line["before"] for line in lines)
    assert all((line["in_bf16"] == line["after"]) == (line["way"] != "nf4+fp8") for line in lines)


def test_a_base_of_other_settings_is_not_taken(study: Any, place: tuple[Path, Path]) -> None:
    """Catches a study of the model that an earlier call left behind."""
    base, out = place
    there = study.arguments([*TINY, "--base", str(base), "--out", str(out)])
    assert study.pretrain(there, DEVICE)["steps"] == 3
    other = study.arguments([*TINY, "--base", str(base), "--layers", "3"])
    with pytest.raises(SystemExit, match="name another --base"):
        study.pretrain(other, DEVICE)


@pytest.mark.parametrize(("claimed", "hook"), [(False, False), (True, True)])
def test_what_did_not_run_as_claimed_is_refused(
    study: Any, place: tuple[Path, Path], claimed: bool, hook: bool
) -> None:
    """Catches FP8 under another way's name, and a layer without the fused block."""
    args = study.arguments([*TINY, "--base", str(place[0])])
    model = study.adapted("nf4+fp8", args, DEVICE)
    rows = torch.ones(1, 2, 32, dtype=torch.long, device=DEVICE)
    if hook:
        model.get_base_model().model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(study.NotFused, match=r"(1|2) of 2 layer passes ran"):
        study.tune(model, rows, args, fp8=claimed)


def test_held_out_files_are_not_trained_on(study: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches rows that are in both, and files whose rows are split between them."""
    texts = [chr(65 + i) * 40 for i in range(10)]
    monkeypatch.setattr(study, "header_texts", lambda: iter(texts))
    args = study.arguments(["--seq", "8", "--heldout-rows", "11", "--steps", "5", "--rows", "2"])
    found = study.headers(study.new_tokenizer(["ab"] * 8, 260), args)
    assert found.heldout.shape == (11, 8)
    letters = [set(rows.flatten().tolist()) - {study.END} for rows in (found.heldout, found.train)]
    assert [len(x) for x in letters] == [3, 7]
    assert not letters[0] & letters[1]
    args.steps = 500
    with pytest.raises(SystemExit, match="fewer --steps"):
        study.headers(study.new_tokenizer(["ab"] * 8, 260), args)


def test_texts_are_found_in_a_fixed_order_and_once(study: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Catches an order that is the file system's, the same file twice, and generated ones."""
    for name, text in {"b.h": "two", "a.h": "one", "d/c.h": "two", "ops/e.h": "three", "f.py": "x"}.items():
        (tmp_path / "site" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "site" / name).write_text(text)
    (tmp_path / "site" / "torch").mkdir()
    monkeypatch.setattr(study.torch, "__file__", str(tmp_path / "site" / "torch" / "__init__.py"))
    assert sorted(study.texts(["*.h"], skip="ops/")) == ["one", "two"]
    assert list(study.texts(["*.h"])) == list(study.texts(["*.h"]))


def made(way: str, seed: int, after: float, in_bf16: float | None = None, **changes: Any) -> dict[str, Any]:
    line = {"kind": "fp8", "run_id": "r", "way": way, "seed": seed, "before": 4.0, "after": after}
    line |= {"in_bf16": after if in_bf16 is None else in_bf16, "work": {}, "start": seed, "rows": seed}
    return line | {"hardware": "GPU", "commit": "c", "dirty": False, "versions": {}, "date": "2026-11-25T0"} | changes


LINES = [
    *(made("bf16", seed, 2.0) for seed in (1, 2)),
    *(made("nf4", seed, x) for seed, x in ((1, 2.01), (2, 2.03))),
    *(made("nf4+fp8", seed, x, 2.0) for seed, x in ((1, 2.02), (2, 2.02))),
]


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_table_is_of_seeds_in_pairs(study: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a difference of means in the place of the mean difference, and a column under another's name."""
    out = write(tmp_path / "fp8.jsonl", LINES)
    study.main(["--table", "--out", str(out)])
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows[2:]] == ["bf16", "nf4", "nf4+fp8", "nf4+fp8, evaluated in bf16"]
    assert rows[2][1:4] == ["4.0000", "2.0000 (2.0000 to 2.0000)", "-"]
    assert rows[3][2:4] == ["2.0200 (2.0100 to 2.0300)", "+1.000% (+0.500% to +1.500%)"]
    assert rows[4][3:] == ["+1.000% (+1.000% to +1.000%)", "+0.002% (-0.493% to +0.498%)"]
    assert rows[5][2:4] == ["2.0000 (2.0000 to 2.0000)", "+0.000% (+0.000% to +0.000%)"]


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (LINES[1:], "needs each way once with every seed"),
        ([*LINES, LINES[-1]], "needs each way once with every seed"),
        ([*LINES[:-1], LINES[-1] | {"hardware": "another"}], "not of one work on one machine"),
        ([*LINES[:-1], LINES[-1] | {"start": 7}], "not of one work on one machine"),
        ([], "is empty"),
    ],
)
def test_no_table_of_what_is_not_alike(study: Any, tmp_path: Path, lines: list[dict[str, Any]], reason: str) -> None:
    """Catches ways of different seeds, adapters or machines set against each other."""
    with pytest.raises(SystemExit, match=reason):
        study.main(["--table", "--out", str(write(tmp_path / "fp8.jsonl", lines))])


def test_the_lines_make_a_table_of_the_documents(bench: Any) -> None:
    """Catches a row whose cells are not in the order of the columns' names, and a seed set against another."""
    head, _, *rows = [row for row in bench("table").render(LINES).splitlines() if row.startswith("|")]
    assert all(len(row.split("|")) == len(head.split("|")) for row in rows)
    assert rows[5] == "| nf4+fp8 | 2 | 4.0000 | 2.0200 | 2.0000 | +1.000% | -0.493% |"
