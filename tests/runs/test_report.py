"""Reports and comparisons: they say what a run's folder holds, and stand up to a folder that holds it badly."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.runs.folders import FINDINGS, QUESTIONS, VERSION, VERSIONS, write_run
from whet.errors import WhetError
from whet.runs.report import Record, read_run, write_comparison, write_report
from whet.runs.report.curves import overlaid_charts, score_charts, training_charts
from whet.runs.report.page import scores, tiles
from whet.runs.report.settings import differences, flat, sections
from whet.runs.trackers.start import start_of

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = "\"><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7*7 }}{% raw %}'&amp;"
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """A page's tags, attributes and text, and the text of each section by its heading."""

    def __init__(self, path: Path):
        super().__init__()
        self.html = path.read_text(encoding="utf-8")
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.texts: list[tuple[tuple[str, ...], str]] = []
        self.feed(self.html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.texts.append((tuple(self.open), data))

    @property
    def text(self) -> str:
        return " ".join(" ".join(data for open_, data in self.texts if "style" not in open_).split())

    def section(self, heading: str) -> str:
        """Text from a heading of the second level to the next one."""
        found, inside = [], False
        for open_, data in self.texts:
            if "h2" in open_:
                inside = data.strip() == heading
            elif inside:
                found.append(data)
        return " ".join(" ".join(found).split())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_run(tmp_path / "runs")


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Record:
    return read_run(write_run(tmp_path_factory.mktemp("runs"), steps=6))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write_run(tmp_path / "runs", steps=6)


def report(folder: Path, **options: Any) -> Page:
    path = folder / "report.html"
    write_report(read_run(folder), path, **options)
    return Page(path)


# ---------------------------------------------------------------- a run that is whole


def test_a_report_tells_the_run(folder: Path) -> None:
    page = report(folder, findings=FINDINGS)
    assert page.open == []
    for told in ("support-desk", folder.name, "done", "400 optimizer steps", VERSION, VERSIONS["torch"], "NVIDIA H200"):
        assert told in page.text
    assert "Not in this report" not in page.text
    assert page.section("What the doctor found").startswith("memory fragmentation training, from step 141 on")
    for chart in ("Loss", "Gradient norm", "Learning rate", "Tokens a second", "Memory", "Token accuracy"):
        assert chart in page.section("Training")
    assert page.tags.count("svg") == 6 + 2 + 6  # curves, scores through checkpoints, whiskers of scores that are shares
    evaluation = page.section("Evaluation")
    assert "triage base 0.31 0.227 to 0.393 120" in evaluation
    assert "exact match base 0.115 tuned 0.61" in evaluation
    assert "adapter_model.safetensors 7 B c4c4c4c4c4c4c4c4" in page.section("Where it came from, what came of it")


def test_the_speed_and_memory_are_the_metrics(folder: Path) -> None:
    """Catches a unit off by a thousand, and a speed with the checkpoints' time in it."""
    lines = [{"stage": "train", "step": s, "loss": 1.0, "seconds": 2.0, "tokens": 5000.0, "memory": 3 * 2**30}
             for s in (1, 2, 3)]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = report(folder).text
    assert "2,500 tokens a second" in text
    assert "3 GiB memory, highest" in text
    assert "6 s spent on steps" in text
    assert "15k tokens learned from" in text


def test_what_the_recipe_chose_is_told_from_the_defaults(folder: Path) -> None:
    recipe = dict(sections(read_run(folder).recipe))
    chosen = {f"{name}.{s.key}" for name, settings in recipe.items() for s in settings if s.chosen}
    assert chosen == {
        "recipe.name", "model.base", "adapter.r", "adapter.alpha", "adapter.rslora", "data.sources.0.path",
        "data.redact.policy", "train.max_steps", "train.learning_rate", "train.schedule", "export.merged",
        "export.gguf",
    }  # fmt: skip


def test_samples_stand_side_by_side(folder: Path) -> None:
    page = report(folder)
    section = page.section("Samples through the checkpoints")
    places = [section.index(f"step {step}") for step in (50, 100, 200, 400)]
    assert places == sorted(places)
    assert section.count("equals the reference") == 2 + 3
    assert "This part holds text of the records" in section


def test_many_checkpoints_and_prompts_are_thinned_out_and_that_is_said(small: Path) -> None:
    """Catches a page of a hundred megabytes."""
    for step in range(100):
        lines = [{"prompt": f"p{i}", "reference": None, "answer": "a", "step": step} for i in range(60)]
        (small / "samples" / f"{step}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    section = report(small).section("Samples through the checkpoints")
    assert "Shown: 8 of 100 checkpoints and 40 of 60 prompts." in section
    assert "base a" in section
    assert "step 99" in section


def test_text_of_records_is_among_the_samples_alone(folder: Path) -> None:
    """Catches a prompt that shows in the recipe, in a finding's place or in a stage's summary."""
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["eval"]["samples"] = ["PRIVATE question", "another PRIVATE one"]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "eval" / "answers.jsonl").write_text('{"prompt": "PRIVATE"}\n')
    (folder / "metrics.jsonl").open("a").write('{"stage": "train", "step": 3, "loss": 1, "text": "PRIVATE"}\n')
    shutil.rmtree(folder / "samples")
    page = report(folder, findings=FINDINGS)
    assert "PRIVATE" not in page.html
    assert "2 prompts" in page.section("Recipe")
    assert "No text of a record is in this page." in page.text


def test_passwords_in_addresses_are_masked(small: Path) -> None:
    """Catches a database's password in a page that is handed on, and at trackers."""
    recipe = yaml.safe_load((small / "recipe.yaml").read_text())
    recipe["data"]["sources"] = [{"url": "postgresql://reader:SECRET@db/tickets", "sql": "SELECT 1"}]
    recipe["track"] = {"mlflow": "https://me:SECRET@mlflow.example.org/x?a=b@c"}
    (small / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    page = report(small)
    write_comparison([read_run(small), read_run(write_run(small.parent, "other-1", steps=2))], small / "compare.html")
    assert "SECRET" not in page.html + (small / "compare.html").read_text() + str(start_of(small))
    assert "postgresql://reader:***@db/tickets" in page.text
    assert "https://me:***@mlflow.example.org/x?a=b@c" in page.text


def test_the_gates_decision_is_shown(small: Path) -> None:
    checks = [
        {"name": "triage", "passed": True, "what": "gain of 0.5"},
        {"name": "safety", "passed": False, "what": "x"},
    ]
    for ship, told in ((True, "The gate says: ship"), (False, "do not ship"), ("yes", "do not ship"), (None, "do not")):
        (small / "eval" / "gate.json").write_text(json.dumps({"ship": ship, "checks": checks}))
        text = report(small).text
        assert told in text
    assert "passed triage: gain of 0.5" in text
    assert "failed safety: x" in text


# ---------------------------------------------------------------- a run that is not


def test_a_run_that_still_trains_has_a_report(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "runs", steps=212, stages=("data",))
    page = report(folder)
    assert "not done: training is at step 212 of 400" in page.text
    for stage in ("trained", "eval", "export"):
        assert f"stage {stage} : it is not done yet" in page.text
    assert "The doctor did not look at this run" in page.text
    assert page.tags.count("svg") >= 6


PARTS = ("recipe.yaml", "run.json", "metrics.jsonl", "data/summary.json", "data/manifest.json", "samples/50.jsonl",
         "receipts/trained.json", "eval/gate.json")  # fmt: skip


@pytest.mark.parametrize("damage", ["gone", "empty", "torn", "binary", "a list", "a folder"])
@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_is_missing_or_damaged_still_gives_a_report(small: Path, part: str, damage: str) -> None:
    """Catches a report that fails for the very run one wants to understand."""
    path = small / part
    whole = path.read_bytes() if path.exists() else b'{"ship": true, "checks": []}'
    path.unlink(missing_ok=True)
    if damage == "a folder":
        path.mkdir()
    elif damage != "gone":
        texts = {
            "empty": b"",
            "torn": whole[: len(whole) // 2] + b'{"a',
            "binary": b"\xff\xfe\x00{",
            "a list": b"[1]\n",
        }
        path.write_bytes(texts[damage])
    page = report(small)
    assert page.open == []
    missed = part in ("recipe.yaml", "run.json", "metrics.jsonl", "data/summary.json")
    if missed and not (damage == "torn" and part == "recipe.yaml"):  # half a YAML file may be one
        assert "Not in this report" in page.text
    if damage == "torn" and part == "metrics.jsonl":
        assert "1 damaged lines of metrics.jsonl were left out" in page.text
    if part == "eval/gate.json":
        assert "says: ship" not in page.text


def test_an_empty_folder_has_a_report_and_no_folder_has_none(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    page = report(tmp_path / "empty")
    for part in ("recipe", "versions and hardware", "metrics", "stage data"):
        assert f"{part} :" in page.text
    with pytest.raises(WhetError, match="no such run"):
        read_run(tmp_path / "none")


def test_a_loss_that_was_no_number_leaves_a_gap(folder: Path) -> None:
    """Catches "nan" in a path, which makes the rest of the curve vanish."""
    values = [1.0, 0.9, math.nan, math.inf, 0.7, 0.6]
    lines = [{"stage": "train", "step": i, "loss": v, "grad_norm": math.nan} for i, v in enumerate(values, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = report(folder)
    paths = [value for name, value in page.attributes if name == "d"]
    assert all(re.fullmatch(r"([ML][\d.]+ [\d.]+)*Z?", path) for path in paths)
    assert any(path.count("M") == 2 for path in paths)


def test_a_step_done_twice_counts_once(folder: Path) -> None:
    lines = [
        {"stage": "train", "step": s, "loss": v, "tokens": 10.0, "seconds": 1.0} for s, v in ((1, 3), (2, 9), (2, 2))
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [line["loss"] for line in read_run(folder).steps] == [3, 2]
    assert "20 tokens learned from" in report(folder).text


VALUE = st.none() | st.booleans() | st.integers(-5, 500) | st.floats() | st.text(max_size=4) | st.just({"loss": "x"})
LINE = st.dictionaries(
    st.sampled_from(
        ["stage", "step", "loss", "seconds", "tokens", "num_tokens", "memory", "learning_rate", "task", "mean", "low",
         "high", "items", "base", "tuned", "grad_norm"]
    ),
    VALUE | st.sampled_from(["train", "eval"]),
)  # fmt: skip


@given(lines=st.lists(LINE, max_size=12))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_metrics_give_curves_and_numbers(record: Record, lines: list[dict[str, Any]]) -> None:
    """Catches a value of a wrong kind, as another version or a crash may leave, that ends the report."""
    damaged = dataclasses.replace(record, metrics=tuple(lines))
    charts = training_charts(damaged) + score_charts(damaged) + overlaid_charts([damaged, record])
    drawn = [number for chart in charts for number in re.findall(r'"[^"]*(nan|inf)[^"]*"', str(chart.svg))]
    assert drawn == []
    assert all(isinstance(text, str) for text, _ in tiles(damaged))
    assert all(0 <= place <= 100 for score in scores(damaged) for place in score.percent or ())


def test_nothing_in_a_run_can_write_html(small: Path) -> None:
    """Catches a name or an answer that becomes a script in a page that others open."""
    recipe = yaml.safe_load((small / "recipe.yaml").read_text())
    recipe["name"] = recipe["model"]["base"] = HOSTILE
    (small / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    facts = {"versions": {HOSTILE: HOSTILE}, "inputs": {HOSTILE: HOSTILE}, "hardware": {HOSTILE: HOSTILE},
             "git": {"commit": HOSTILE}, "command": [HOSTILE], "started": HOSTILE, "seed": HOSTILE}  # fmt: skip
    (small / "run.json").write_text(json.dumps(facts))
    (small / "trained" / "summary.json").write_text(json.dumps({HOSTILE: HOSTILE}))
    line = {"stage": "eval", "task": HOSTILE, "model": HOSTILE, "mean": 0.5, "step": 1}
    (small / "metrics.jsonl").open("a").write(json.dumps(line) + "\n" + json.dumps(line | {"step": 2}) + "\n")
    answer = {"prompt": HOSTILE, "reference": HOSTILE, "answer": HOSTILE, "step": 7}
    (small / "samples" / "7.jsonl").write_text(json.dumps(answer) + "\n")
    finding = dict.fromkeys(("severity", "cause", "where", "what", "advice"), HOSTILE) | {"step": 3}
    page = report(small, findings=[finding])
    write_comparison([read_run(small), read_run(small)], small / "compare.html")
    for found in (page, Page(small / "compare.html")):
        assert not {"script", "img", "iframe", "object", "form"} & set(found.tags)
        assert not [name for name, _ in found.attributes if name.startswith("on")]
        assert HOSTILE in "".join(data for _, data in found.texts)


# ---------------------------------------------------------------- a page by itself


@pytest.fixture
def pages(folder: Path) -> list[Path]:
    other = write_run(folder.parent, "support-desk-77aa01bc2d", steps=212, stages=("data",), seed=2, learning_rate=3e-4)
    write_report(read_run(folder), folder / "report.html", findings=FINDINGS)
    write_comparison([read_run(folder), read_run(other)], folder / "compare.html")
    return [folder / "report.html", folder / "compare.html"]


def test_a_page_needs_nothing_but_itself(pages: list[Path]) -> None:
    """Catches a page that tells a server who reads it, or that is bare on a machine without a network."""
    for path in pages:
        page = Page(path)
        assert not {"script", "link", "img", "iframe"} & set(page.tags)
        assert not [value for name, value in page.attributes if name in ("src", "href", "srcset", "action")]
        assert "url(" not in page.html
        assert "@import" not in page.html
        assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes


def test_a_browser_shows_it_in_light_and_dark_and_fetches_nothing(pages: list[Path]) -> None:
    """Catches a page whose own policy forbids its style, charts of no height, and text wider than the window."""
    if CHROMIUM is None or find_spec("playwright") is None:
        if os.environ.get("WHET_CI") == "1":
            pytest.fail("there is no Chromium, or no Playwright")
        pytest.skip("there is no Chromium, or no Playwright: apt-get install chromium, pip install playwright")
    from playwright import sync_api

    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        grounds = set()
        for scheme in ("light", "dark"):
            for width in (1100, 420) if scheme == "light" else (1100,):
                tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
                told: list[str] = []
                asked: list[str] = []
                tab.on("console", lambda message, told=told: told.append(message.text))
                tab.on("request", lambda request, asked=asked: asked.append(request.url))
                for path in pages:
                    tab.goto(path.as_uri())
                    assert tab.evaluate("document.documentElement.scrollWidth") <= width
                    assert tab.locator(".chart").first.bounding_box()["height"] > 100
                    grounds.add((scheme, tab.evaluate("getComputedStyle(document.body).backgroundColor")))
                assert told == []
                assert asked == [path.as_uri() for path in pages]
                tab.close()
        note = _pointed_at(browser, pages[0])
        browser.close()
    assert len(grounds) == 2
    assert re.search(r"step \d+ mean of 20 steps [\d.]+", note)


def _pointed_at(browser: Any, path: Path) -> str:
    """What the loss's chart tells where the pointer is."""
    tab = browser.new_page(viewport={"width": 1100, "height": 900})
    tab.goto(path.as_uri())
    chart = tab.locator(".chart").first
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    tab.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + box["height"] * 0.5)
    shown = "[...document.querySelectorAll('.spot > g')].filter(g => getComputedStyle(g).visibility == 'visible')"
    return str(
        tab.evaluate(f"{shown}.map(g => [...g.querySelectorAll('text')].map(t => t.textContent).join(' ')).join()")
    )


# ---------------------------------------------------------------- comparison


def test_a_comparison_tells_what_sets_runs_apart(folder: Path) -> None:
    other = write_run(folder.parent, "support-desk-77aa01bc2d", steps=212, stages=("data",), seed=2, learning_rate=3e-4)
    facts = json.loads((other / "run.json").read_text())
    facts["versions"]["torch"] = "2.12.0"
    (other / "run.json").write_text(json.dumps(facts))
    write_comparison([read_run(folder), read_run(other)], folder / "compare.html")
    page = Page(folder / "compare.html")
    assert page.open == []
    settings = page.section("What the recipes say differently")
    assert settings.endswith("train.learning_rate 0.0001 0.0003")
    assert page.section("What else was not the same").partition(" Made ")[0].endswith("torch 2.13.0 2.12.0")
    assert "not done: training is at step 212 of 400" in page.text
    curves = [value for name, value in page.attributes if name == "class" and value.startswith("line ")]
    assert {"line c0", "line c1"} == set(curves)
    for _, reference, answers in QUESTIONS:
        assert reference not in page.section("Training")
        assert answers[0] not in page.html


def test_equal_runs_are_said_to_be_equal(small: Path) -> None:
    write_comparison([read_run(small), read_run(small)], small / "compare.html")
    text = Page(small / "compare.html").text
    assert "the recipes are the same" in text
    assert "inputs, versions, hardware and git state are the same" in text


@pytest.mark.parametrize("count", [1, 9])
def test_one_run_or_too_many_are_refused(small: Path, count: int) -> None:
    with pytest.raises(WhetError, match="can't be compared"):
        write_comparison([read_run(small)] * count, small / "compare.html")
    assert not (small / "compare.html").exists()


def test_differences_are_of_every_depth() -> None:
    one = {"a": {"b": 1, "c": None}, "l": [{"p": 1}, {"p": 2}], "gone": True, "same": [1, 2]}
    two = {"a": {"b": 1, "c": {"d": 2}}, "l": [{"p": 1}], "same": [1, 2]}
    rows = {row.key: row.values for row in differences([one, two])}
    assert rows == {
        "a.c": ("null", "not there"),
        "l.1.p": ("2", "not there"),
        "gone": ("true", "not there"),
        "a.c.d": ("not there", "2"),
    }
    assert dict(flat(one))["same"] == [1, 2]


def test_where_nothing_can_be_written_that_is_said(small: Path) -> None:
    (small / "file").write_text("")
    with pytest.raises(WhetError, match="a file stands where a folder is to be"):
        write_report(read_run(small), small / "file" / "report.html")
