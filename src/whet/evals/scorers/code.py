"""A scorer that runs the Python which an answer holds: against tests, or for what it prints.

The tests run in the same process as the answer, after it. An answer that sets out to be counted as right can therefore
cheat; one that merely ends early can't, because the tests have to say that they came to their end.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, field_validator

from whet.errors import WhetError
from whet.evals.scorers.base import Each, Kind, Options, Question, Score
from whet.evals.scorers.sandbox import Limits, Ran, isolation, run_python
from whet.units import parse_memory

COLUMN = "tests"


class CodeOptions(Options):
    tests: str | None = Field(
        None, description="Python that runs after the answer, for rows without tests of their own."
    )
    prefix: Literal["none", "prompt"] = Field(
        "none", description="prompt: the program is the prompt's text and then the answer, as in HumanEval."
    )
    seconds: float = Field(10.0, gt=0, le=600, description="A program may take so long.")
    memory: str = Field("1GiB", description="Address space of a process.")
    processes: int = Field(32, ge=1, description="Processes and threads at a time; no limit for root.")
    workers: int = Field(1, ge=1, le=64, description="Programs at a time.")
    isolation: Literal["required", "best-effort"] = Field(
        "required", description="best-effort runs programs also where network or files can't be taken away."
    )

    @field_validator("memory", mode="after")
    @classmethod
    def _amount(cls, memory: str) -> str:
        parse_memory(memory)
        return memory

    @property
    def limits(self) -> Limits:
        return Limits(self.seconds, int(parse_memory(self.memory)), processes=self.processes)


@dataclass(frozen=True)
class Code(Each):
    """1 where the tests come to their end; or, without tests, where the program prints one of the references."""

    options: CodeOptions

    def check(self, question: Question) -> None:
        if self.tests(question) is None and not question.references:
            raise WhetError("neither tests nor a reference", fix="add a column tests, or the output as the reference")

    def score(self, questions: Sequence[Question], answers: Sequence[str]) -> list[Score]:
        """Several programs at a time where the options say so."""
        with ThreadPoolExecutor(self.options.workers) as pool:
            return list(pool.map(self.one, questions, answers))

    def one(self, question: Question, answer: str) -> Score:
        code, tests = code_of(answer), self.tests(question)
        if self.options.prefix == "prompt":
            code = f"{question.prompt.shown}{code}"
        done = secrets.token_hex(16)
        program = code if tests is None else f"{code}\n\n{tests}\n\nprint({done!r})\n"
        ran = run_python(program, self.options.limits, isolated=self.options.isolation == "required")
        return self.judged(ran, question, None if tests is None else done)

    def judged(self, ran: Ran, question: Question, done: str | None) -> Score:
        """done: what the tests print at their end."""
        if ran.code is None:
            return Score(0.0, self.said(f"not done after {self.options.seconds:g} s"))
        if ran.code != 0:
            return Score(0.0, self.said((ran.err.strip().splitlines() or [f"exit status {ran.code}"])[-1]))
        if done is not None:
            right = ran.out.rstrip().endswith(done)
            return Score(float(right), self.said(None if right else "it ended before its tests did"))
        right = any(ran.out.strip() == reference.strip() for reference in question.references)
        return Score(float(right), self.said(f"printed {ran.out.strip()[:200]!r}"))

    def said(self, note: str | None) -> str | None:
        """The note, and what the program had within reach beyond what it may."""
        reached = isolation()
        return "; ".join(part for part in (note, reached and f"within its reach: {reached}") if part) or None

    def tests(self, question: Question) -> str | None:
        found: Any = question.extra.get(COLUMN, self.options.tests)
        return None if found is None else str(found)


def code_of(answer: str) -> str:
    """What the answer's first ``` block holds; without one, the whole answer."""
    found = re.search(r"^```[^\n`]*\n(.*?)^```", answer, flags=re.DOTALL | re.MULTILINE)
    return found[1] if found else answer


CODE = Kind(CodeOptions, lambda options, folder: Code(options), needs_reference=False, columns=(COLUMN,))
