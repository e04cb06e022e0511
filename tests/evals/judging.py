"""What the judge's tests share: a rubric, the replies of a judge, and what a judge was shown."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from tests.evals.openai_server import NAME, Fault, OpenAIServer
from whet.evals.judge.grading import Case
from whet.evals.judge.settings import JudgeSettings

CORRECT: dict[str, Any] = {"name": "correct", "about": "The answer is right.", "scale": [1, 5]}
CLEAR: dict[str, Any] = {"name": "clear", "about": "The answer is easy to read.", "scale": [0, 1], "weight": 3.0}
KEY = "sk-a-key-that-nobody-may-see"


def settings(server: OpenAIServer, **changes: Any) -> JudgeSettings:
    address = {"url": server.url, "model": NAME, "backoff": 0.001, "retries": 1} | changes.pop("endpoint", {})
    return JudgeSettings.model_validate({"endpoint": address, "criteria": [CORRECT]} | changes)


def cases(*answers: str) -> list[Case]:
    return [Case(f"q{i}", "What is 1 + 1?", answer, "2") for i, answer in enumerate(answers)]


def graded(grade: int, reason: str = "because") -> str:
    return json.dumps({"correct": {"reason": reason, "grade": grade}})


def blocks_of(body: dict[str, Any]) -> dict[str, str]:
    """What the judge was shown, by the block's name."""
    request = body["messages"][1]["content"]
    mark = request.split("\n")[0].removeprefix("MARK: ")
    found = re.findall(rf"<<<([a-z ]+) {mark}>>>\n(.*?)\n<<<end of \1 {mark}>>>", request, re.DOTALL)
    return dict(found)


def by_answer(replies: dict[str, Fault | str]) -> Callable[[dict[str, Any]], Fault | str | None]:
    return lambda body: replies[blocks_of(body)["answer"]]
