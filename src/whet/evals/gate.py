"""The gate: whether a model ships, decided from results on the same items for it, its base and a known-good run.

    decision = decide(rules, candidate, base, baseline, texts={"candidate": ..., "base": ...})
    decision.ship                 True only when every check passed

A check passes when its whole confidence interval lies on the right side of the limit; for gains and losses a test must
agree, which is exact for 0/1 scores. What cannot be told is a no, and so is anything that is missing or unreadable.
Rates of wrong decisions are measured by bench/gate_simulation.py; docs/gate.md explains the rules.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from whet.errors import WhetError
from whet.evals.gate_checks import Check, Found, Results, TextLoss, compare_task, compare_text, refusals
from whet.evals.gate_rules import BASE, Rules
from whet.evals.results import TaskResult

__all__ = ["Check", "Decision", "Results", "Rules", "TextLoss", "decide", "read_results"]


@dataclass(frozen=True)
class Decision:
    """The checks that were made, and what follows from them."""

    rules: Rules
    checks: tuple[Check, ...]

    @property
    def ship(self) -> bool:
        """Every check passed, and there was one."""
        return bool(self.checks) and all(check.passed is True for check in self.checks)

    @property
    def exit_code(self) -> int:
        """0 to ship, 1 not to."""
        return 0 if self.ship else 1

    def to_json(self) -> dict[str, Any]:
        """For the ledger and for files: ship, the rules, the checks with their numbers."""
        return {"ship": self.ship, "rules": self.rules.model_dump(), "checks": [asdict(check) for check in self.checks]}

    def text(self) -> str:
        """A line a check, and the verdict."""
        lines = [f"{'ok' if check.passed else 'NO':<4}{check.name}: {check.what}" for check in self.checks]
        return "\n".join([*lines, self.verdict])

    def table(self) -> Table:
        """For the terminal."""
        table = Table("", "check", "what was found", caption=self.verdict, box=None, pad_edge=False)
        for check in self.checks:
            mark = Text("ok", style="green") if check.passed else Text("NO", style="bold red")
            table.add_row(mark, Text(check.name), Text(check.what))
        return table

    @property
    def verdict(self) -> str:
        """One sentence."""
        failed = sum(not check.passed for check in self.checks)
        return "ship" if self.ship else f"do not ship: {failed} of {len(self.checks)} checks failed"


def decide(
    rules: Rules,
    candidate: Results,
    base: Results,
    baseline: Results | None = None,
    *,
    texts: Mapping[str, TextLoss | WhetError] | None = None,
) -> Decision:
    """Hold `candidate` against `base` and, where the rules name one, the `baseline` run.

    Results are by task; an error stands for results that could not be read. A task that any of them or the rules name
    must be in all. texts: losses on general text of "candidate", "base" and, where one is named, "baseline".
    """
    references: dict[str, Results] = {BASE: base}
    if rules.baseline != BASE:
        references[rules.baseline] = baseline if baseline is not None else {}
    checks = [*_gains(rules, candidate, references), *_losses(rules, candidate, references)]
    if rules.safety:
        checks.append(refusals(rules.safety, candidate, rules.error))
    if rules.max_perplexity_increase is not None:
        checks += _forgetting(rules, rules.max_perplexity_increase, texts or {})
    return Decision(rules, tuple(checks))


def _gains(rules: Rules, candidate: Results, references: Mapping[str, Results]) -> list[Check]:
    """The tasks that must gain over the baseline. Where one of k is enough, each has a k-th of the error."""
    reference = references[rules.baseline]
    share = len(rules.tasks) if rules.need == "any" else 1
    found = [
        compare_task(
            f"gain on {task} over {rules.baseline}", task, candidate, reference, rules.min_gain, rules.error / share
        )
        for task in rules.tasks
    ]
    if rules.need == "all" or len(found) == 1:
        return [Check(one.name, one.passed, one.what, one.numbers) for one in found]
    return [_one_of(found), *(_still_there(one) for one in found if one.unreadable)]


def _one_of(found: list[Found]) -> Check:
    what = "; ".join(f"{one.name.removeprefix('gain on ')}: {one.what}" for one in found)
    numbers = {one.name: one.numbers for one in found}
    return Check("gain on one of the tasks", any(one.passed for one in found), what, numbers)


def _still_there(one: Found) -> Check:
    """A task whose results are missing stops the gate even where a gain on another would do."""
    return Check(one.name, False, one.what, one.numbers)


def _losses(rules: Rules, candidate: Results, references: Mapping[str, Results]) -> Iterator[Check]:
    """Every task against every reference, but for those whose gain or refusals are asked already."""
    tasks = rules.named.union(candidate, *references.values())
    if rules.safety and rules.safety.task not in rules.max_regression_of:
        tasks = tasks - {rules.safety.task}
    for name, reference in references.items():
        for task in sorted(tasks - ({*rules.tasks} if name == rules.baseline else set())):
            limit = -rules.max_regression_of.get(task, rules.max_regression)
            found = compare_task(f"no loss on {task} against {name}", task, candidate, reference, limit, rules.error)
            yield Check(found.name, found.passed, found.what, found.numbers)


def _forgetting(rules: Rules, limit: float, texts: Mapping[str, TextLoss | WhetError]) -> Iterator[Check]:
    names = {"base": BASE} if rules.baseline == BASE else {"base": BASE, "baseline": rules.baseline}
    for key, name in names.items():
        yield compare_text(f"forgetting against {name}", texts.get("candidate"), texts.get(key), limit, rules.error)


def read_results(folder: Path) -> dict[str, TaskResult | WhetError]:
    """The results of every task in a folder of TASK.jsonl; an error in place of those that cannot be read.

    A folder that is not there, or holds none, has no tasks: the gate then misses those it needs.
    """
    results: dict[str, TaskResult | WhetError] = {}
    for path in sorted(folder.glob("*.jsonl")) if folder.is_dir() else []:
        try:
            result = TaskResult.load(path)
        except WhetError as error:
            results[path.stem] = error
            continue
        if result.task in results:
            results[result.task] = WhetError(f"two files hold {result.task}", where=str(folder), fix="remove one")
        else:
            results[result.task] = result
    return results


def save_decision(decision: Decision) -> str:
    """The decision as indented JSON text."""
    return json.dumps(decision.to_json(), indent=1, allow_nan=False) + "\n"
