"""bench/table.py: tables follow from results, and a table that does not is found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
WORK = {
    "model": "8b",
    "bs": 2,
    "ga": 4,
    "seq": 2048,
    "steps": 10,
    "warm": 3,
    "gc": "on",
    "bits": 4,
    "r": 16,
    "full": False,
    "mixed": False,
    "packing": False,
}


def line(engine: str, tok_s: float, **changes: Any) -> dict[str, Any]:
    return {
        "kind": "finetune",
        "run_id": "one",
        "engine": engine,
        "work": WORK,
        "tok_s": tok_s,
        "real_tok_s": tok_s,
        "step_s": {"median": 1.5, "min": 1.4, "max": 1.7},
        "load_s": 4.0,
        "first_steps_s": [2.5, 1.6],
        "peak_allocated_gib": 6.77,
        "peak_host_gib": 3.0,
        "hardware": "GPU A",
        "versions": {"torch": "2.11.0", "transformers": "5.17.0"},
        "commit": "abc",
        "dirty": False,
        "date": "2026-11-25T00:00:00+00:00",
    } | changes


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    (tmp_path / "bench" / "results").mkdir(parents=True)
    (tmp_path / "README.md").write_text("Before.\n\n<!-- bench:qlora -->\nold\n<!-- /bench:qlora -->\n\nAfter.\n")
    return tmp_path


def write(repository: Path, *lines: dict[str, Any]) -> None:
    text = "".join(json.dumps(one) + "\n" for one in lines)
    (repository / "bench" / "results" / "qlora.jsonl").write_text(text)


def table(repository: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "bench" / "table.py"), "--root", str(repository), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def cells(repository: Path) -> list[list[str]]:
    rows = [row for row in (repository / "README.md").read_text().splitlines() if row.startswith("| 8b")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_a_table_is_written_once(repository: Path) -> None:
    """Catches a table that grows, or eats the text around it, when it is made again."""
    write(repository, line("hf", 5850.0), line("whet", 11700.0))
    assert table(repository).returncode == 0
    text = (repository / "README.md").read_text()
    assert text.startswith("Before.\n\n<!-- bench:qlora -->\n| work |")
    assert text.endswith("2026-11-25.\n<!-- /bench:qlora -->\n\nAfter.\n")
    assert table(repository).returncode == 0
    assert (repository / "README.md").read_text() == text


OF_WORK = "8b, QLoRA r=16, 2x4 rows of 2048, least memory"
MEASURED = [OF_WORK, "whet", "11,700", "-", "1.5 (1.4 to 1.7)", "6.77", "4.0", "2.5"]


def test_a_table_of_one_origin_says_it_once(repository: Path) -> None:
    write(repository, line("whet", 11700.0, dirty=True, versions={"torch": "2.11.0", "whet": "0.1.0"}))
    table(repository)
    assert cells(repository) == [MEASURED]
    caption = "GPU A; whet 0.1.0, torch 2.11.0, commit abc with changes; 2026-11-25.\n"
    assert caption in (repository / "README.md").read_text()


def test_an_extra_belongs_to_the_name(repository: Path) -> None:
    """Catches figures that need an extra given for whet's without it, and a peer said to use it."""
    versions = {"torch": "2.11.0", "whet": "0.1.0", "flash-attn-4": "4.0.0b36"}
    write(repository, line("whet", 11700.0, versions=versions), line("hf", 5850.0, versions=versions))
    table(repository)
    assert {row[1] for row in cells(repository)} == {"whet[flash4]", "hf"}


def test_libraries_that_one_engine_alone_has_are_named_once(repository: Path) -> None:
    """Catches a column of versions in each row, for the sake of a library that a peer does not have."""
    common = {"torch": "2.11.0", "transformers": "5.17.0"}
    write(repository, line("whet", 11700.0, versions=common | {"whet": "0.1.0"}), line("hf", 5850.0, versions=common))
    table(repository)
    assert {len(row) for row in cells(repository)} == {len(MEASURED)}
    caption = "GPU A; whet 0.1.0, torch 2.11.0, transformers 5.17.0, commit abc; 2026-11-25."
    assert caption in (repository / "README.md").read_text()


@pytest.mark.parametrize("name", ["torch", "whet"])
def test_two_versions_of_one_library_are_told_apart(repository: Path, name: str) -> None:
    """Catches a caption that names one of two."""
    versions = {"torch": "2.11.0", "whet": "0.1.0"}
    write(repository, line("whet", 1.0, versions=versions), line("whet", 1.0, versions=versions | {name: "9"}))
    table(repository)
    assert [row[-2].count(f"{name} 9") for row in cells(repository)] == [0, 1]


def test_rows_of_several_origins_each_say_theirs(repository: Path) -> None:
    """Catches a caption that claims one card for rows that were measured on two."""
    write(repository, line("whet", 11700.0), line("whet", 11700.0, hardware="GPU B"))
    table(repository)
    software = "torch 2.11.0, transformers 5.17.0, commit abc"
    assert cells(repository) == [
        [*MEASURED, "GPU A", software, "2026-11-25"],
        [*MEASURED, "GPU B", software, "2026-11-25"],
    ]


@pytest.mark.parametrize(
    ("changes", "against"),
    [
        ({}, "2.00x"),
        ({"work": WORK | {"packing": True}}, "2.00x"),
        ({"run_id": "two"}, "-"),
        ({"run_id": None}, "-"),
        ({"hardware": "GPU B"}, "-"),
        ({"work": WORK | {"gc": "off"}}, "-"),
    ],
)
def test_only_like_is_set_against_like(repository: Path, changes: dict[str, Any], against: str) -> None:
    """Catches a speed-up over a figure from another machine, another run or other work."""
    write(repository, line("hf", 5850.0), line("whet", 11700.0, **changes))
    table(repository)
    assert cells(repository)[1][3] == against


def test_check_finds_a_table_that_is_out_of_date(repository: Path) -> None:
    """Catches a figure typed by hand. Nothing is written."""
    write(repository, line("whet", 11700.0))
    table(repository)
    assert table(repository, "--check").returncode == 0
    edited = (repository / "README.md").read_text().replace("11,700", "99,999")
    (repository / "README.md").write_text(edited)
    done = table(repository, "--check")
    assert done.returncode == 1
    assert "README.md is out of date" in done.stderr
    assert (repository / "README.md").read_text() == edited


def kernel(**changes: Any) -> dict[str, Any]:
    origin = {name: line("whet", 1.0)[name] for name in ("hardware", "versions", "commit", "dirty", "date")}
    return {
        "kind": "kernels",
        "run_id": "one",
        "kernel": "glu",
        "shape": "F=8b",
        "tokens": 4096,
        "bytes": 352_321_536,
        "flops": 7_516_192_768,
        "bound_us": 117.44,
        "measured_us": 129.18,
        "ratio": 1.1,
        "timing": "replayed",
        "error": None,
        "copy_tb_s": 3.0,
        "gemm_tflop_s": 712.4,
    } | (origin | changes)


def kernel_cells(repository: Path, *lines: dict[str, Any]) -> list[list[str]]:
    write(repository, *lines)
    done = table(repository)
    assert done.returncode == 0, done.stderr
    rows = [row for row in (repository / "README.md").read_text().splitlines() if row.startswith("| glu")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_kernels_are_set_against_their_bounds(repository: Path) -> None:
    """Catches a figure in another unit than its column's, and a tokens of None."""
    rows = kernel_cells(repository, kernel(), kernel(tokens=None))
    counts = ["352.3", "7.5", "117.4", "129.2", "1.10", "3.00", "712"]
    assert rows == [["glu", "F=8b", "4,096", *counts], ["glu", "F=8b", "-", *counts]]
    header = next(row for row in (repository / "README.md").read_text().splitlines() if row.startswith("| kernel"))
    assert header.count("|") == len(rows[0]) + 1


def test_a_kernel_that_failed_is_in_the_table(repository: Path) -> None:
    """Catches a failure left out, and an error whose lines or bars break the table."""
    missing = dict.fromkeys(("bytes", "flops", "bound_us", "measured_us", "ratio", "timing"))
    failed, fine = kernel_cells(repository, kernel(error="CudaError: a | b\n  at c", **missing), kernel())
    failure = ["-", "-", "-", "failed: CudaError: a / b at c", "-"]
    assert failed == ["glu", "F=8b", "4,096", *failure, "3.00", "712"]
    assert len(failed) == len(fine)


def test_a_trace_shows_all_of_a_step(repository: Path) -> None:
    """Catches a share under another one's heading, and a traced step taken for a timed one."""
    shares = ["base GEMMs", "LoRA GEMMs", "head GEMM", "attention", "dequantization", "norms", "rope", "activation"]
    shares += ["loss", "copies and fills", "optimizer", "other elementwise", "other", "idle"]
    ms = {name: 10.0 * number for number, name in enumerate(shares)}
    one = line("whet", 1.0, kind="trace", wall_ms=sum(ms.values()), timed_ms=899.96, launches=4331, ms=ms)
    write(repository, one)
    done = table(repository)
    assert done.returncode == 0, done.stderr
    rows = [row for row in (repository / "README.md").read_text().splitlines() if row.startswith("|")]
    header, _, cells = ([cell.strip() for cell in row.strip("|").split("|")] for row in rows)
    row = dict(zip(header, cells, strict=True))
    assert {name: float(row[name]) for name in shares} == ms
    expected = {"engine": "whet", "ms a step, timed": "900.0", "ms of the traced step": "910.0", "launches": "4,331"}
    assert row.items() >= expected.items()


@pytest.mark.parametrize(
    ("readme", "results", "message"),
    [
        ("<!-- bench:none -->\n<!-- /bench:none -->\n", None, "there is no none.jsonl"),
        ("<!-- bench:qlora -->\n", None, "has no <!-- /bench:NAME -->"),
        (None, "{", "qlora.jsonl:1:"),
        (None, '{"kind": "finetune"}\n{"kind": "parity"}\n', "one kind of result"),
        (None, "", "one kind of result"),
    ],
)
def test_faults_are_named(repository: Path, readme: str | None, results: str | None, message: str) -> None:
    """Catches a check that passes because it could not read."""
    write(repository, line("whet", 1.0))
    if readme is not None:
        (repository / "README.md").write_text(readme)
    if results is not None:
        (repository / "bench" / "results" / "qlora.jsonl").write_text(results)
    done = table(repository, "--check")
    assert done.returncode == 1
    assert "README.md" in done.stderr
    assert message in done.stderr


def test_the_tables_of_this_repository_are_up_to_date() -> None:
    done = table(ROOT, "--check")
    assert done.returncode == 0, done.stderr
