"""The evaluations of a recipe: its tasks and samples at checkpoints, tuned against base at the end, and the gate.

    RUN/samples/STEP.jsonl               what a checkpoint answers to the first held-out questions
    RUN/eval/tasks/{tuned,base}/*.jsonl  every answer to every task (evals/results.py)
    RUN/eval/text/{tuned,base}.json      losses on general text
    RUN/eval/gate.json                   the decision

Scores are lines of metrics.jsonl, of a checkpoint by its "step", at the end by "model":

    {"stage": "eval", "step" | "model", "task", "mean", "low", "high", "items", "seconds"}
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerState

from whet.data.prepare import questions
from whet.errors import WhetError
from whet.evals import general_text
from whet.evals.gate import Decision, Results, decide, read_results, save_decision
from whet.evals.gate_rules import BASE, Rules
from whet.evals.models import Generation, InMemory, Prompt
from whet.evals.results import TaskResult
from whet.evals.run_tasks import run_tasks, save_results
from whet.evals.statistics import mean
from whet.evals.tasks import BenchmarkTask, Task, load_tasks
from whet.files import write_text
from whet.recipe import Eval, Recipe
from whet.runs.folders import find
from whet.runs.ledger import Ledger
from whet.runs.store import Run

SIDES = ("tuned", "base")
Tasks = Sequence[Task | BenchmarkTask]


def tasks_of(recipe: Recipe, base: Path) -> Tasks:
    """The recipe's tasks, whose paths start at `base`. Raises WhetError for what is wrong with any of them."""
    settings = recipe.eval or Eval()
    return load_tasks([str(base / path) for path in settings.tasks], allow_python=settings.allow_python)


class AtCheckpoints(TrainerCallback):
    """Puts tasks and held-out questions to the model that is being trained, each time a checkpoint is written.

    Training goes on as if nothing had been asked. What a run that was killed did not come to is asked when it goes on.
    """

    def __init__(self, run: Run, tokenizer: PreTrainedTokenizerBase, tasks: Tasks):
        self.run, self.tokenizer, self.settings = run, tokenizer, run.recipe.eval or Eval()
        self.tasks = tasks if self.settings.every == "checkpoint" else []
        self.questions = questions(run.folder / "data", self.settings.samples) if self.settings.samples else []

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, model: Any = None, **kwargs: Any) -> None:
        step = state.global_step
        asked = {line["task"] for line in self.run.metrics("eval") if line.get("step") == step}
        self._ask(model, step, [task for task in self.tasks if task.name not in asked])

    def on_save(self, args: Any, state: TrainerState, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._ask(model, state.global_step, self.tasks)

    def _ask(self, model: Any, step: int, tasks: Tasks) -> None:
        if not tasks and not self.questions:
            return
        asked = InMemory(model, self.tokenizer, f"step {step}", self.settings.batch)
        for result in run_tasks(tasks, asked).values():
            self.run.log(stage="eval", step=step, **score_of(result))
        if self.questions:
            prompts = [Prompt(text=question.prompt) for question in self.questions]
            answers = asked.generate(prompts, Generation(max_new_tokens=self.settings.max_new_tokens))
            self._save(step, answers)

    def _save(self, step: int, answers: Sequence[str]) -> None:
        folder = self.run.folder / "samples"
        folder.mkdir(exist_ok=True)
        lines = [
            {"step": step, "prompt": question.prompt, "reference": question.reference, "answer": answer}
            for question, answer in zip(self.questions, answers, strict=True)
        ]
        write_text(folder / f"{step}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def score_of(result: TaskResult) -> dict[str, Any]:
    """A task's mean with its 95% interval, for a line of metrics."""
    interval = mean(result.scores)
    ends = {"mean": interval.estimate, "low": interval.low, "high": interval.high}
    return {"task": result.task, **ends, "items": len(result.items), "seconds": round(result.seconds, 3)}


def evaluate(run: Run, tasks: Tasks, base: Path, folder: Path, models: tuple[InMemory, InMemory]) -> dict[str, str]:
    """Put all tasks, and general text, to the tuned model and its base; results in `folder`. Each task's means."""
    text = run.recipe.eval.general_text if run.recipe.eval else None
    means: dict[str, dict[str, float]] = {}
    for side, model in zip(SIDES, models, strict=True):
        results = run_tasks(tasks, model)
        save_results(results, folder / "tasks" / side)
        for name, result in results.items():
            means.setdefault(name, {})[side] = result.mean
            run.log(stage="eval", model=side, **score_of(result))
        if text:
            rows = general_text.stretches(model, base / text)
            (folder / "text").mkdir(exist_ok=True)
            general_text.save(general_text.text_loss(model, rows), folder / "text" / f"{side}.json")
    return {name: f"{found['base']:.4g} -> {found['tuned']:.4g}" for name, found in means.items()}


def gate(recipe: Recipe, folder: Path, runs: Path) -> Decision | None:
    """What the recipe's gate says to the results in `folder`, written there too; None where there is no gate."""
    rules = recipe.eval.gate if recipe.eval else None
    if rules is None:
        return None
    tuned, original = (read_results(folder / "tasks" / side) for side in SIDES)
    decision = decided(rules, tuned, original, folder, runs)
    write_text(folder / "gate.json", save_decision(decision))
    return decision


def decided(rules: Rules, tuned: Results, original: Results, folder: Path, runs: Path) -> Decision:
    """The gate's decision on these results. folder: where the losses on general text lie. runs: where the baseline is.

    A baseline that is not there has no results, and the gate says no.
    """
    texts = {"candidate": general_text.read(folder / "text" / "tuned.json")}
    texts["base"] = general_text.read(folder / "text" / "base.json")
    known_good = None
    if rules.baseline != BASE:
        try:
            earlier = find(runs, rules.baseline) / "eval"
        except WhetError:
            earlier = runs / rules.baseline / "eval"
        known_good = read_results(earlier / "tasks" / "tuned")
        texts["baseline"] = general_text.read(earlier / "text" / "tuned.json")
    return decide(rules, tuned, original, known_good, texts=texts)


def tell(decision: Decision, ledger: Ledger, run: str, outputs: dict[str, str]) -> None:
    """Write the decision to the ledger. run: the id of the run it is about; outputs: SHA-256 of what it was kept in.

    Raises WhetError where that cannot be done.
    """
    failed = [check.name for check in decision.checks if not check.passed]
    facts = {"ship": decision.ship, "failed": failed, "baseline": decision.rules.baseline}
    ledger.append("gate.decided", run=run, outputs=outputs, facts=facts)
