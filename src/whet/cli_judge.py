"""The command line's verbs for a task's judge: `whet judge agree`, `whet judge compare`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from whet.errors import WhetError
from whet.files import write_text

if TYPE_CHECKING:
    from whet.evals.judge.grading import Judge

console = Console(highlight=False)
judge = typer.Typer(no_args_is_help=True, help="How far the judge of a task can be trusted, and what it prefers.")

TaskPath = Annotated[Path, typer.Argument(help="A task file whose scorer is a judge.")]
Out = Annotated[Path | None, typer.Option(help="Write the numbers here too, as JSON.")]
MEASURES = {
    "exact": "equal grades",
    "near": "at most one apart",
    "kappa": "kappa, quadratic weights",
    "alpha": "alpha, judge and people",
    "people": "alpha, people alone",
}


@judge.command()
def agree(
    task: TaskPath,
    labels: Annotated[Path, typer.Argument(help="Rows with prompt, answer, and people's grades in labels.")],
    out: Out = None,
) -> None:
    """Let the judge grade answers that people have graded, and report how far they agree."""
    from whet.evals.judge.labels import agreement_with_people, read_labelled

    grader = _judge(task)
    labelled = read_labelled(labels, grader.criteria)
    with _progress(f"{len(labelled)} answers") as done:
        found, grading = agreement_with_people(grader, labelled, done=done)
    table = Table.grid(padding=(0, 2))
    for name, agreement in found.items():
        table.add_row(f"[bold]{escape(name)}[/]", f"{agreement.judged} of {agreement.answers} answers judged")
        for measure, what in MEASURES.items():
            table.add_row(f"  {what}", _shown(agreement.summary()[measure]))
    console.print(table)
    numbers = grading.summary()
    for name, alpha in numbers["repeats_alpha"].items():
        if alpha is not None:
            console.print(f"repeats, {escape(name)}: alpha {_shown(alpha)}")
    _finish(numbers, grading.usage, {"agreement": {n: a.summary() for n, a in found.items()}, "judge": numbers}, out)


@judge.command()
def compare(
    task: TaskPath,
    a: Annotated[Path, typer.Argument(help="Results of the task, as `whet eval` writes them.")],
    b: Annotated[Path, typer.Argument(help="Results of the same task by another model.")],
    out: Out = None,
) -> None:
    """Let the judge compare two models' answers, in both orders, and report how far it leans to a place."""
    from whet.evals.judge.pairwise import compare as compared
    from whet.evals.judge.pairwise import pairs_of
    from whet.evals.results import TaskResult

    grader = _judge(task)
    pairs = pairs_of(TaskResult.load(a), TaskResult.load(b))
    with _progress(f"{len(pairs)} pairs") as done:
        found = compared(grader, pairs, done=done)
    numbers = found.summary()
    outcomes = {name: found.outcomes[name] for name in ("a", "b", "tie")}
    console.print(f"preferred: a {outcomes['a']}, b {outcomes['b']}, tie {outcomes['tie']}")
    for name in ("win_rate", "consistency", "position_bias"):
        console.print(f"{name.replace('_', ' ')}: {_shown(numbers[name])}")
    _finish(numbers, found.usage, numbers, out)


def _judge(path: Path) -> Judge:
    """The judge that the task names."""
    from whet.evals.scorers.judge import Judged
    from whet.evals.tasks import Task, load_task

    task = load_task(path)
    if not isinstance(task, Task) or not isinstance(task.scorer, Judged):
        raise WhetError("the task is not scored by a judge", where=str(path), fix="give it scorer: {kind: judge, ...}")
    return task.scorer.judge


def _shown(interval: Mapping[str, float] | None) -> str:
    """0.71 [0.55, 0.83]"""
    return escape(f"{interval['estimate']:.2f} [{interval['low']:.2f}, {interval['high']:.2f}]") if interval else "-"


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int], None]]:
    """On a terminal, how many replies of the judge have come in this round."""
    if not console.is_terminal:
        yield lambda count: None
        return
    with console.status(f"the judge reads {what}") as status:
        yield lambda count: status.update(f"the judge reads {what}: {count:,} replies")


def _finish(numbers: Mapping[str, Any], usage: object, written: Mapping[str, Any], out: Path | None) -> None:
    failures = ", ".join(f"{count} {kind}" for kind, count in numbers["failures"].items())
    console.print(f"without a score: {numbers['unscored']}" + (f" ({failures})" if failures else ""))
    if usage is not None:
        console.print(f"judge: {usage}")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, json.dumps(written, indent=2, allow_nan=False) + "\n")
        console.print(f"[bold]written[/] {escape(str(out))}", soft_wrap=True)
