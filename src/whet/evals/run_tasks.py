"""Puts tasks to a model and scores its answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from whet.errors import WhetError
from whet.evals.models import Generation, InMemory, Model, Prompt
from whet.evals.results import Item, TaskResult
from whet.evals.scorers.base import Question, Score
from whet.evals.scorers.choice import Choice
from whet.evals.tasks import BenchmarkTask, Task

AT_ONCE = 128
"""Questions put to a model between two looks at the progress; a batch never reaches over it."""

Progress = Callable[[str, int, int], None]
"""Is told the task's name, questions answered, and questions in all."""


@runtime_checkable
class Replying(Protocol):
    """A model whose single answers may fail: an endpoint. Each reply has a text, or a failure with a note."""

    def replies(self, prompts: Sequence[Prompt], how: Generation) -> Sequence[Any]:
        """A reply a prompt, in order."""


class Answer(NamedTuple):
    """text: None where there is no answer. note: why, or what the model was torn between."""

    text: str | None
    note: str | None = None


def run_tasks(
    tasks: Iterable[Task | BenchmarkTask],
    model: Model,
    *,
    progress: Progress = lambda task, done, total: None,
    done: Callable[[TaskResult], None] = lambda result: None,
) -> dict[str, TaskResult]:
    """The result of each task, by name. `done` is told each as soon as it is there. Raises WhetError."""
    results = {}
    for task in tasks:
        results[task.name] = result = run_task(task, model, progress=progress)
        done(result)
    return results


def run_task(
    task: Task | BenchmarkTask, model: Model, *, progress: Progress = lambda task, done, total: None
) -> TaskResult:
    """Ask all of the task's questions and score the answers. An answer that does not come is scored as none."""
    started = time.monotonic()
    if isinstance(task, BenchmarkTask):
        if not isinstance(model, InMemory):
            fix = "evaluate the model in memory (--model or --run), or leave the task out"
            raise WhetError("benchmarks are run on a model in memory", where=str(task.path), fix=fix)
        from whet.evals.benchmarks import run_benchmark

        return run_benchmark(task, model)
    answers = _answers(task, model, progress)
    scores, measures = _scores(task, answers)
    items = tuple(map(_item, task.questions, answers, scores))
    seconds = time.monotonic() - started
    return TaskResult(task.name, task.digest, model.name, items, seconds, task.scorer_kind, measures)


def save_results(results: Mapping[str, TaskResult], folder: Path) -> None:
    """One file a task: FOLDER/NAME.jsonl."""
    for name, result in results.items():
        result.save(folder / f"{name}.jsonl")


def load_results(folder: Path) -> dict[str, TaskResult]:
    """What `save_results` wrote, by the task's name. Raises WhetError where a file is damaged or there is none."""
    paths = sorted(folder.glob("*.jsonl")) if folder.is_dir() else []
    if not paths:
        raise WhetError(
            "there are no results here", where=str(folder), fix="name a folder that `whet eval --out` wrote"
        )
    results = {}
    for path in paths:
        result = TaskResult.load(path)
        if result.task != path.stem:
            fix = "do not rename results; run the evaluation again"
            raise WhetError(f"these are the results of {result.task}", where=str(path), fix=fix)
        results[result.task] = result
    return results


def _answers(task: Task, model: Model, progress: Progress) -> list[Answer]:
    ask = _choose if task.chooses else _reply if isinstance(model, Replying) else _generate
    answers: list[Answer] = []
    for start in range(0, len(task.questions), AT_ONCE):
        progress(task.name, start, len(task.questions))
        answers += ask(task, task.questions[start : start + AT_ONCE], model)
    progress(task.name, len(task.questions), len(task.questions))
    return answers


def _generate(task: Task, questions: Sequence[Question], model: Model) -> list[Answer]:
    return [Answer(text) for text in model.generate([q.prompt for q in questions], task.generation)]


def _reply(task: Task, questions: Sequence[Question], model: Model) -> list[Answer]:
    assert isinstance(model, Replying)
    answers = []
    for reply in model.replies([q.prompt for q in questions], task.generation):
        refused = getattr(reply, "refusal", None)  # what a model says as it declines is its answer
        text, note = reply.text or refused, reply.failure.note if reply.failure else None
        answers.append(Answer(None if text is None and note else (text or "").strip(), note))
    return answers


def _choose(task: Task, questions: Sequence[Question], model: Model) -> list[Answer]:
    assert isinstance(task.scorer, Choice)
    choices = [[_joined(question.prompt, choice) for choice in question.choices] for question in questions]
    found = model.choice_logprobs([question.prompt for question in questions], choices)
    return [Answer(*task.scorer.pick(question, own)) for question, own in zip(questions, found, strict=True)]


def _joined(prompt: Prompt, choice: str) -> str:
    """A text and the choice that goes on from it have a space between them; an answer in a chat begins with none."""
    if prompt.text is None or prompt.text[-1:].isspace() or choice[:1].isspace():
        return choice
    return f" {choice}"


def _scores(task: Task, answers: Sequence[Answer]) -> tuple[list[Score], dict[str, float]]:
    """A score for each answer that there is; and the measures of all of them."""
    scores = [Score(None, answer.note or "no answer") for answer in answers]
    there = [i for i, answer in enumerate(answers) if answer.text is not None]
    if not there:
        return scores, {}
    questions, texts = [task.questions[i] for i in there], [str(answers[i].text) for i in there]
    for i, score in zip(there, task.scorer.score(questions, texts), strict=True):
        scores[i] = score
    return scores, task.scorer.measures(questions, texts)


def _item(question: Question, answer: Answer, score: Score) -> Item:
    note = "; ".join(part for part in dict.fromkeys((score.note, answer.note)) if part) or None
    reference = question.reference
    return Item(question.id, question.prompt.shown, reference, answer.text or "", score.value, note)
