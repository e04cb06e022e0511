"""The report of one run: what it was, how it went, what came of it, and what is missing."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from whet.files import refused_when_full
from whet.pages import write_page
from whet.pages.charts import Mark
from whet.pages.numbers import compact, count, duration, gib, size_of, three
from whet.runs.report.curves import numbers, score_charts, training_charts
from whet.runs.report.record import Answer, Json, Missing, Record, finite, is_count, part
from whet.runs.report.settings import masked, sections, without_text

TEMPLATE = Path(__file__).with_name("report.html.jinja")
CHECKPOINTS, PROMPTS = 8, 40
"""Checkpoints and prompts that samples are shown of, at most."""

LEVELS = {"error": "alarm", "warning": "warn"}
"""Severity of a finding -> the style's name for it."""


@dataclass(frozen=True)
class Score:
    """A task's score of one model: the mean, its interval where it is known, and how many items it rests on.

    percent: low, mean and high on a line from 0 to 100, for drawing; None for what is no share.
    """

    task: str
    model: str
    mean: float
    low: float | None = None
    high: float | None = None
    items: int | None = None
    percent: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class Sample:
    """One prompt's answers through the checkpoints. answers: text, whether it is the reference, whether it changed."""

    prompt: str
    reference: str | None
    answers: Sequence[tuple[int, str, bool, bool]]


def write_report(record: Record, path: Path, *, findings: Sequence[Mapping[str, Any]] | None = None) -> None:
    """Write the report of a run to one HTML file.

    findings: what the doctor found, each with severity, cause, where, what and advice; None where it did not look.
    Text of records is among the samples, nowhere else.
    """
    with refused_when_full(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_page(path, TEMPLATE, title=f"Run: {record.name}", **_view(record, findings))


def _view(record: Record, findings: Sequence[Mapping[str, Any]] | None) -> dict[str, Any]:
    samples, left_out = _samples(record.samples)
    found = [_finding(finding) for finding in findings or []]
    return {
        "record": record,
        "status": status(record),
        "decision": None if record.decision is None else _decision(record.decision),
        "tiles": tiles(record),
        "missing": [*record.missing, *_not_there(record)],
        "findings": found,
        "examined": findings is not None,
        "charts": training_charts(record, _marks(record, found)),
        "scores": scores(record),
        "score_charts": score_charts(record),
        "samples": samples,
        "samples_left_out": left_out,
        "stages": list(record.stages.items()),
        "sections": sections(record.recipe),
        "recipe_yaml": masked(yaml.safe_dump(without_text(record.recipe), sort_keys=False, allow_unicode=True)),
        "versions": list(part(record.facts, "versions").items()),
        "about": _about(record),
        "inputs": list(part(record.facts, "inputs").items()),
        "files": _files(record),
        "made": time.strftime("%Y-%m-%d %H:%M"),
        "started": moment(record.facts.get("started")),
        "count": count,
        "three": three,
        "size_of": size_of,
    }


def status(record: Record) -> tuple[str, str]:
    """What is to be said first, and its level: fine, warn or nothing."""
    waiting = record.waited_for
    if not waiting:
        return "done", "fine"
    if record.steps and "trained" in waiting:
        of = part(record.recipe, "train").get("max_steps")
        return f"not done: training is at step {record.steps[-1]['step']}" + (f" of {of}" if of else ""), "warn"
    return f"not done: {', '.join(waiting)} {'is' if len(waiting) == 1 else 'are'} to come", "warn"


def tiles(record: Record) -> list[tuple[str, str]]:
    """The run in a few numbers."""
    known = numbers(record)
    shown: list[tuple[str, str, Callable[[Any], str]]] = [
        ("loss", "loss, mean of the last steps" if known.get("window", 1) > 1 else "loss of the last step", compact),
        ("steps", "optimizer steps", count),
        ("tokens", "tokens learned from", compact),
        ("speed", "tokens a second, median", lambda speed: count(round(speed))),
        ("memory", "memory, highest", gib),
        ("seconds", "spent on steps", duration),
    ]
    return [(show(known[name]), label) for name, label, show in shown if name in known]


def scores(record: Record) -> list[Score]:
    """The last score of each task and model. The base against the tuned model is there where both were scored."""
    found: dict[tuple[str, str], Score] = {}
    for line in record.lines("eval"):
        for model in ("base", "tuned"):
            for task, value in part(line, model).items():
                _keep(found, task, model, {"mean": value})
        if line.get("task"):
            _keep(found, str(line["task"]), str(line.get("model") or "tuned"), line)
    return sorted(found.values(), key=lambda score: (score.task, score.model != "base", score.model))


def _keep(found: dict[tuple[str, str], Score], task: str, model: str, line: Json) -> None:
    """The score in `line`, in the place of an earlier one, if there is one in it."""
    mean, low, high = (finite(line.get(name)) for name in ("mean", "low", "high"))
    if mean is None:
        return
    items = line.get("items")
    percent = (_percent(mean if low is None else low), _percent(mean), _percent(mean if high is None else high))
    share = task != "loss" and 0 <= mean <= 1
    score = Score(task, model, mean, low, high, items if is_count(items) else None, percent if share else None)
    found[task, model] = score


def _percent(share: float) -> float:
    return round(100 * min(1.0, max(0.0, share)), 2)


def _finding(finding: Mapping[str, Any]) -> dict[str, Any]:
    level = LEVELS.get(str(finding.get("severity")), "")
    return {
        "cause": "",
        "where": "",
        "what": "",
        "advice": "",
        "step": None,
        "primary": False,
        **finding,
        "level": level,
    }


def _decision(decision: Json) -> dict[str, Any]:
    """ship, and for each check whether it passed, its name, and what was found. Only True is a yes."""
    checks = decision.get("checks")
    told = [check for check in checks if isinstance(check, Mapping)] if isinstance(checks, list) else []
    return {
        "ship": decision.get("ship") is True,
        "checks": [(check.get("passed") is True, check.get("name", ""), check.get("what", "")) for check in told],
    }


def _about(record: Record) -> list[tuple[str, str]]:
    """Data's version, seed, machine, code and command, those that are known."""
    facts, git = record.facts, part(record.facts, "git")
    command = facts.get("command")
    hardware = [
        (name, ", ".join(map(str, value)) if isinstance(value, list) else _amount(name, value))
        for name, value in part(facts, "hardware").items()
        if value is not None and not isinstance(value, Mapping)
    ]
    rows = [
        ("data's version", str(record.data.get("digest") or "")),
        ("seed", str(facts.get("seed", ""))),
        *hardware,
        ("git commit", f"{git.get('commit')}{' with changes' if git.get('changed') else ''}" if git else ""),
        ("command", masked(" ".join(map(str, command))) if isinstance(command, list) else ""),
    ]
    return [(name, value) for name, value in rows if value]


def _amount(name: str, value: Any) -> str:
    return size_of(value) if name == "memory" and is_count(value) else str(value)


def moment(iso: Any) -> str:
    """A time as people read it; what is none, as it is."""
    try:
        return datetime.fromisoformat(str(iso)).strftime("%Y-%m-%d %H:%M") if iso else ""
    except ValueError:
        return str(iso)


def _not_there(record: Record) -> list[Missing]:
    """Parts that come with time, or that the recipe did not ask for."""
    known = {missing.part for missing in record.missing}
    parts = [Missing(f"stage {stage}", "it is not done yet: whet run goes on with it") for stage in record.waited_for]
    if not record.steps and "metrics" not in known:
        parts.append(Missing("training curves", "no step was logged"))
    if not record.lines("eval") and "eval" not in record.waited_for:
        parts.append(Missing("evaluation", "the recipe asks for none"))
    if not record.samples:
        parts.append(Missing("samples", "no answers were kept through the checkpoints"))
    return parts


def _marks(record: Record, findings: Sequence[Mapping[str, Any]]) -> list[Mark]:
    """Where the doctor's findings lie, those that tell a step, and where training was put back or stopped."""
    acted = [line for line in record.lines("watch") if line.get("cause") and is_count(line.get("step"))]
    return [
        Mark(finding["step"], f"step {finding['step']}: {finding['cause']}", finding["level"])
        for finding in findings
        if is_count(finding["step"])
    ] + [Mark(line["step"], f"step {line['step']}: {line['cause']} {line.get('action', '')}", "warn") for line in acted]


def _samples(answers: Sequence[Answer]) -> tuple[list[Sample], str]:
    """Prompts in their order, answers by step; and what was left out, in words."""
    steps = sorted({answer.step for answer in answers})
    kept = steps if len(steps) <= CHECKPOINTS else _spread(steps, CHECKPOINTS)
    by_prompt: dict[str, dict[int, Answer]] = {}
    for answer in answers:
        by_prompt.setdefault(answer.prompt, {})[answer.step] = answer
    samples = []
    for prompt, by_step in list(by_prompt.items())[:PROMPTS]:
        shown, before = [], None
        for step in kept:
            if (found := by_step.get(step)) is not None:
                same = found.reference is not None and found.answer.strip() == found.reference.strip()
                shown.append((step, found.answer, same, before is not None and found.answer == before))
                before = found.answer
        samples.append(Sample(prompt, next(iter(by_step.values())).reference, shown))
    left = []
    if len(kept) < len(steps):
        left.append(f"{len(kept)} of {len(steps)} checkpoints")
    if len(by_prompt) > PROMPTS:
        left.append(f"{PROMPTS} of {len(by_prompt)} prompts")
    return samples, " and ".join(left)


def _spread(steps: Sequence[int], most: int) -> list[int]:
    return [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]


def _files(record: Record) -> list[tuple[str, int, str]]:
    """Name, bytes and SHA-256 of what the run made; the digest is empty where no receipt has one."""
    files = []
    for stage in ("trained", "eval", "export"):
        folder = record.folder / stage
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.name != "summary.json":
                digest = record.receipts.get(stage, {}).get(path.relative_to(folder).as_posix(), "")
                files.append((f"{stage}/{path.relative_to(folder)}", path.stat().st_size, str(digest)))
    return files
