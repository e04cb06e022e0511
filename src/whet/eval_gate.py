"""The gate of `whet eval --gate`: on results that were just made, for a run; the decision goes to the ledger."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from whet.errors import WhetError, WhetErrors
from whet.eval_models import recipe_of
from whet.evals.gate import Decision, Rules
from whet.evals.results import TaskResult
from whet.recipe_evals import decided, tell
from whet.runs.folders import find
from whet.runs.ledger import NAME, Ledger
from whet.runs.signing import key_in_use
from whet.yaml_faults import Kind, explain, read_yaml

RULES = Kind("file of rules", "`task:` and `min_gain:`", "docs/gate.md lists every key")


def rules_of(path: Path | None, run: str, runs: Path) -> Rules:
    """The rules in a YAML file; without one, those of the run's recipe. Raises WhetError where there are none."""
    if path is None:
        folder = find(runs, run)
        settings = recipe_of(folder).eval
        if settings is None or settings.gate is None:
            fix = "name a file of rules: --rules gate.yaml"
            raise WhetError("the run's recipe has no eval.gate", where=str(folder / "recipe.yaml"), fix=fix)
        return settings.gate
    document = read_yaml(path, RULES)
    try:
        return Rules.model_validate(document.values)
    except ValidationError as error:
        raise WhetErrors([explain(fault, Rules, document) for fault in error.errors()]) from None


def decide_on_run(
    run: str, runs: Path, rules: Rules, results: Mapping[str, TaskResult], other: Mapping[str, TaskResult]
) -> Decision:
    """Hold the run's results against others; what it forgot is read from its evaluation. The ledger is told."""
    folder = find(runs, run)
    decision = decided(rules, results, other, folder / "eval", runs)
    tell(decision, Ledger(runs / NAME, key_in_use()), folder.name, {})
    return decision
