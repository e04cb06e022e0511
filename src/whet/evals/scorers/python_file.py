"""A scorer of the user's own: a function in a Python file. It runs with all that whet may do, so it has to be allowed.

def score(prompt: str, references: list[str], answer: str, row: dict) -> float | bool | None | (that, note)
"""

from __future__ import annotations

import math
import runpy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from whet.errors import WhetError
from whet.evals.scorers.base import Each, Kind, Options, Question, Score


class PythonOptions(Options):
    file: str = Field(description="A Python file, relative to the task.")
    function: str = Field("score", description="Name of the function in it.")


@dataclass(frozen=True)
class PythonFile(Each):
    """What the function returns: 0 to 1, a truth value, None for an answer that can't be scored; or that and a note."""

    function: Callable[..., Any]
    name: str

    def one(self, question: Question, answer: str) -> Score:
        try:
            found = self.function(question.prompt.shown, list(question.references), answer, dict(question.extra))
        except Exception as error:  # the user's code may raise anything; the other answers are still to be scored
            return Score(None, f"{self.name} raised {type(error).__name__}: {error}")
        value, note = found if isinstance(found, tuple) and len(found) == 2 else (found, None)
        if value is None:
            return Score(None, _text(note))
        if not isinstance(value, int | float) or not math.isfinite(value) or not 0 <= value <= 1:
            return Score(None, f"{self.name} returned {value!r}, not a number of 0 to 1")
        return Score(float(value), _text(note))


def _text(note: Any) -> str | None:
    return None if note is None else str(note)


def _build(options: PythonOptions, folder: Path) -> PythonFile:
    path = folder / options.file
    if not path.is_file():
        raise WhetError("there is no such file", where=str(path), fix="check the path")
    try:
        names = runpy.run_path(str(path))
    except (Exception, SystemExit) as error:  # whatever the user's module does when it is read
        fix = "mend it, then run again"
        raise WhetError(f"it can't be read: {type(error).__name__}: {error}", where=str(path), fix=fix) from error
    function = names.get(options.function)
    if not callable(function):
        raise WhetError(f"it has no function {options.function!r}", where=str(path), fix="define it, or name another")
    return PythonFile(function, f"{options.file}:{options.function}")


PYTHON = Kind(PythonOptions, _build, needs_reference=False, reads=("file",), runs=lambda options: str(options.file))
