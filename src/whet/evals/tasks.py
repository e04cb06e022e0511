"""Evaluation tasks: a YAML file that says what is asked, how answers are generated, and how they are scored.

    name: capitals
    system: Answer with the name of the city alone.
    prompts:                                # or data: a file of rows
      - {prompt: "What is the capital of France?", reference: Paris}
    generation: {max_new_tokens: 16}
    scorer: normalized                      # or {kind: normalized, articles: false}

Paths start at the task's folder. A file with `benchmark` in the place of prompts and scorer names a task of
lm-evaluation-harness (benchmarks.py).
"""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from whet.data.faults import Faults
from whet.data.read.rows import Row, read_rows
from whet.errors import WhetError, WhetErrors
from whet.evals.benchmark_folder import check_include
from whet.evals.models import Generation
from whet.evals.questions import PARTS, Reading, content, questions_of, with_ids
from whet.evals.scorers import KINDS, kind_of
from whet.evals.scorers.base import Kind, Question, Scorer
from whet.files import sha256
from whet.yaml_faults import Document, explain, read_yaml
from whet.yaml_faults import Kind as FileKind

TASK = FileKind("task", "`name:`, `prompts:` or `data:`, and `scorer:`", "docs/evals.md lists every key")
ALLOW = "read it, then allow it: --allow-python (allow_python=True)"


class Part(BaseModel):
    """A section of a task file; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class GenerationPart(Part):
    max_new_tokens: int = Field(256, ge=1, description="Longest answer, in tokens.")
    temperature: float = Field(0.0, ge=0, le=10, description="0 takes the likeliest token; above, tokens are drawn.")
    top_p: float = Field(1.0, gt=0, le=1, description="Tokens are drawn from the likeliest that hold this share.")
    stop: list[str] = Field(default_factory=list, description="Texts at which an answer ends.")
    seed: int = Field(0, ge=0, lt=2**63, description="Of what is drawn.")

    @model_validator(mode="after")
    def _stops_say_something(self) -> GenerationPart:
        if not all(self.stop):
            raise ValueError("stop holds an empty text; remove it")
        return self


class BenchmarkPart(Part):
    task: str = Field(description="Name of a task of lm-evaluation-harness, or of one in `include`.")
    include: str | None = Field(None, description="Folder of lm-evaluation-harness tasks of your own.")
    metric: str | None = Field(None, description="Metric whose value is an item's score. Default: the task's first.")
    fewshot: int | None = Field(None, ge=0, description="Worked examples before each question. Default: the task's.")
    limit: int | None = Field(None, ge=1, description="Questions to ask; null for all.")
    chat: bool = Field(False, description="Put the chat template around each question.")


class TaskFile(Part):
    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Name of the task, of letters, digits, and . _ -"
    )
    prompts: list[str | dict[str, Any]] | None = Field(
        None, min_length=1, description=f"The questions: texts, or mappings of {', '.join(PARTS)}."
    )
    data: str | None = Field(None, min_length=1, description="File, glob or folder of rows, relative to the task.")
    columns: dict[str, str] = Field(default_factory=dict, description="Part of a question -> the column that holds it.")
    template: str | None = Field(None, min_length=1, description="Text of the prompt, with {COLUMN} for a row's value.")
    limit: int | None = Field(None, ge=1, description="The first rows of `data` alone; null for all.")
    chat: bool = Field(True, description="A prompt is a user's message; false: a text to go on from.")
    system: str | None = Field(None, min_length=1, description="System message before each prompt.")
    choices: list[str] = Field(default_factory=list, description="Answers to choose from, the same for each prompt.")
    generation: GenerationPart = Field(default_factory=GenerationPart, description="How answers are generated.")
    scorer: str | dict[str, Any] | None = Field(None, description=f"Kind and options: {', '.join(KINDS)}.")
    benchmark: BenchmarkPart | None = Field(None, description="A task of lm-evaluation-harness in place of all that.")

    @model_validator(mode="after")
    def _consistent(self) -> TaskFile:
        if self.benchmark is not None:
            given = self.model_fields_set - {"name", "benchmark"}
            if given:
                raise ValueError(
                    f"{min(given)} is for tasks of whet's own, and benchmark names another; keep one of them"
                )
            return self
        if (self.prompts is None) == (self.data is None):
            raise ValueError("a task has either prompts or data; give one of the two")
        if self.scorer is None:
            raise ValueError(f"a task has a scorer; add scorer: {', '.join(KINDS)}")
        if self.prompts is not None and (given := self.model_fields_set & {"columns", "limit"}):
            raise ValueError(f"{min(given)} is for data, and the prompts stand here; leave it out")
        if not self.chat and self.system is not None:
            raise ValueError("system is for a chat template (chat: true); put the text into the prompts")
        return self


@dataclass(frozen=True)
class Task:
    """What is asked, how, and how the answers are scored.

    scorer_kind: its name. digest: SHA-256, in hex, of all that decides a result but the model.
    """

    name: str
    questions: tuple[Question, ...]
    generation: Generation
    scorer: Scorer
    scorer_kind: str
    chooses: bool
    digest: str
    path: Path


@dataclass(frozen=True)
class BenchmarkTask:
    """A task of lm-evaluation-harness. include: a folder of more such tasks. The rest is as in `BenchmarkPart`."""

    name: str
    task: str
    include: Path | None
    metric: str | None
    fewshot: int | None
    limit: int | None
    chat: bool
    path: Path


def load_tasks(patterns: Iterable[str | Path], *, allow_python: bool = False) -> list[Task | BenchmarkTask]:
    """The tasks in the files that match, by path. Raises WhetErrors that list every fault of every file."""
    paths: dict[Path, None] = {}
    for pattern in map(str, patterns):
        found = (
            sorted(glob.glob(pattern, recursive=True))
            if glob.has_magic(pattern) and not Path(pattern).exists()
            else [pattern]
        )
        if not found:
            raise WhetError("no task file matches", where=pattern, fix="name YAML files, as evals/*.yaml")
        paths |= dict.fromkeys(map(Path, found))
    tasks: list[Task | BenchmarkTask] = []
    errors: list[WhetError] = []
    for path in paths:
        try:
            tasks.append(load_task(path, allow_python=allow_python))
        except WhetErrors as several:
            errors += several.errors
        except WhetError as error:
            errors.append(error)
    errors += _repeated(tasks)
    if errors:
        raise WhetErrors(errors)
    return tasks


def load_task(path: Path, *, allow_python: bool = False) -> Task | BenchmarkTask:
    """Read and check a task and its data. Raises WhetErrors that list every fault with its line.

    allow_python: a scorer may run Python that the task names.
    """
    document = read_yaml(path, TASK)
    try:
        file = TaskFile.model_validate(document.values)
    except ValidationError as error:
        raise _faults(error, TaskFile, document) from None
    if file.benchmark is not None:
        given = file.benchmark
        include = path.parent / given.include if given.include else None
        if include is not None and not include.is_dir():
            where, fix = document.where(("benchmark", "include")), "name a folder beside the task"
            raise WhetError(f"there is no folder {given.include!r}", where=where, fix=fix)
        if include is not None and not allow_python:
            check_include(include)
        return BenchmarkTask(file.name, given.task, include, given.metric, given.fewshot, given.limit, given.chat, path)
    name, kind, options, scorer = _scorer(file, document, allow_python=allow_python)
    questions = _questions(file, document, kind, scorer)
    generation = Generation(**file.generation.model_dump() | {"stop": tuple(file.generation.stop)})
    digest = _digest(file, name, options, generation, questions, path.parent)
    return Task(file.name, questions, generation, scorer, name, kind.chooses, digest, path)


def _faults(error: ValidationError, root: type[BaseModel], document: Document) -> WhetErrors:
    faults = [explain(fault, root, document) for fault in error.errors()]
    return WhetErrors(list({fault.where: fault for fault in faults}.values()))


def _scorer(file: TaskFile, document: Document, *, allow_python: bool) -> tuple[str, Kind, BaseModel, Scorer]:
    given = {"kind": file.scorer} if isinstance(file.scorer, str) else dict(file.scorer or {})
    name = given.pop("kind", None)
    where = document.where(("scorer", "kind"))
    if not isinstance(name, str):
        raise WhetError("a scorer has a kind", where=where, fix=f"kind: {', '.join(KINDS)}")
    kind = kind_of(name, where)
    section = document.under("scorer") if isinstance(file.scorer, dict) else document
    try:
        options = kind.options.model_validate(given)
    except ValidationError as error:
        raise _faults(error, kind.options, section) from None
    if (runs := kind.runs(options)) is not None and not allow_python:
        what = f"the scorer runs {runs}, which may do whatever you may"
        raise WhetError(what, where=document.where(("scorer",)), fix=ALLOW)
    try:
        return name, kind, options, kind.build(options, document.path.parent)
    except WhetError as error:
        beside = "" if error.where in (None, "scorer") else f"{error.where}: "
        raise WhetError(f"{beside}{error.what}", where=document.where(("scorer",)), fix=error.fix) from error


def _questions(file: TaskFile, document: Document, kind: Kind, scorer: Scorer) -> tuple[Question, ...]:
    _check_columns(file, document, kind)
    faults = Faults()
    reading = Reading(
        file.columns,
        template=file.template,
        chat=file.chat,
        system=file.system,
        choices=tuple(file.choices),
        needs_reference=kind.needs_reference,
        strict=kind.columns if file.prompts is not None and file.template is None else None,
    )
    questions = questions_of(_rows(file, document, faults), reading, faults)
    faults.raise_if_any()
    if not questions:
        raise WhetError("the task asks nothing", where=document.where(("data",)), fix="check the data")
    for question in questions:
        try:
            scorer.check(question)
        except WhetError as error:
            faults.add(WhetError(error.what, where=question.where, fix=error.fix))
    faults.raise_if_any()
    return with_ids(questions)


def _check_columns(file: TaskFile, document: Document, kind: Kind) -> None:
    for part in file.columns:
        known = (*PARTS, *kind.columns)
        if part not in known:
            where = document.where(("columns", part))
            raise WhetError(f"a question has no part {part!r}", where=where, fix=f"use {', '.join(known)}")


def _rows(file: TaskFile, document: Document, faults: Faults) -> list[Row]:
    if file.prompts is not None:
        rows = []
        for i, prompt in enumerate(file.prompts):
            line = document.lines.get(("prompts", i), 1)
            rows.append(Row({"prompt": prompt} if isinstance(prompt, str) else prompt, str(document.path), line))
        return rows
    rows = []
    try:
        for row in read_rows(str(file.data), base=document.path.parent, on_error=faults.add):
            rows.append(row)
            if len(rows) == file.limit:
                break
    except WhetErrors:
        raise
    except WhetError as error:
        where = document.where(("data",))
        raise WhetError(error.what, where=f"{where}: {error.where}" if error.where else where, fix=error.fix) from error
    return rows


def _digest(
    file: TaskFile, kind: str, options: BaseModel, generation: Generation, questions: Sequence[Question], folder: Path
) -> str:
    """Of what is asked and how it is scored, not of how the file is written."""
    read = {name: getattr(options, name) for name in KINDS[kind].reads}
    said = {
        "scorer": {"kind": kind, "options": options.model_dump()},
        "read": {name: _content_digest(folder / path) for name, path in read.items() if path is not None},
        "generation": asdict(generation),
        "questions": [content(question) | {"id": question.id} for question in questions],
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()


def _content_digest(path: Path) -> str | dict[str, str]:
    """Of a file, or of each file in a folder."""
    if path.is_dir():
        return {str(file.relative_to(path)): sha256(file) for file in sorted(path.rglob("*")) if file.is_file()}
    return sha256(path)


def _repeated(tasks: Sequence[Task | BenchmarkTask]) -> list[WhetError]:
    """Results are kept by the task's name."""
    seen: dict[str, Path] = {}
    errors = []
    for task in tasks:
        if task.name in seen:
            what = f"the task is called {task.name!r}, as the one in {seen[task.name]} is"
            errors.append(WhetError(what, where=str(task.path), fix="give it another name"))
        seen.setdefault(task.name, task.path)
    return errors
