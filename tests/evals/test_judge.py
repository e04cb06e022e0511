"""A judge on a real server: what it must never do is turn a reply that is no verdict into a score."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from tests.evals.judging import CLEAR, CORRECT, KEY, blocks_of, by_answer, cases, graded, settings
from tests.evals.openai_server import NAME, Fault, OpenAIServer
from whet.errors import WhetError
from whet.evals.generation import Generation
from whet.evals.judge.grading import Judge
from whet.evals.judge.settings import Criterion, JudgeSettings
from whet.evals.models import InMemory, Prompt


def test_a_real_model_held_to_the_schema_gives_scores(server: OpenAIServer) -> None:
    """Catches a schema that a server cannot follow, and a reader that refuses what fits it."""
    found = Judge(settings(server)).grade(cases("2", "three"))
    assert [each.score is not None for each in found.graded] == [True, True]
    assert not found.failures
    assert found.usage is not None
    assert found.usage.requests == 2
    assert found.usage.completion_tokens > 0


def test_whatever_is_no_verdict_is_no_score(server: OpenAIServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a refusal, a timeout or broken JSON that counts as the lowest grade, as the highest, or is left out."""
    monkeypatch.setenv("JUDGE_KEY", KEY)
    server.key = KEY
    server.policy = by_answer(
        {
            "good": graded(5),
            "refused": Fault(message={"content": None, "refusal": "I won't grade this."}),
            "filtered": Fault(message={"content": graded(5)}, finish="content_filter"),
            "broken": '{"correct": {"reason": "fine", "grade": 5',
            "chatty": f"Sure! {graded(5)}",
            "cut": Fault(message={"content": '{"correct": {"rea'}, finish="length"),
            "slow": Fault(delay=5.0),
            "down": Fault(status=503),
            "busy": Fault(status=429),
            "rejected": Fault(status=400, error=f"too long for {KEY}"),
            "poor": graded(1),
        }
    )
    judge = Judge(settings(server, retries=1, endpoint={"key_env": "JUDGE_KEY", "timeout": 2.0}))
    names = ("good", "refused", "filtered", "broken", "chatty", "cut", "slow", "down", "busy", "rejected", "poor")
    found = judge.grade(cases(*names))
    scores = dict(zip(names, [each.score for each in found.graded], strict=True))
    assert {name: score for name, score in scores.items() if score is not None} == {"good": 1.0, "poor": 0.0}
    assert found.unscored == 9
    assert found.failures == {"refused": 2, "malformed": 3, "timeout": 1, "unavailable": 2, "rejected": 1}
    assert all(each.note for each in found.graded)
    notes = dict(zip(names, [each.note for each in found.graded], strict=True))
    assert "I won't grade this" in notes["refused"]
    assert "cut at 1024 tokens" in notes["cut"]
    assert "no whole reply within 2 s" in notes["slow"]
    assert KEY not in f"{found}{found.summary()}{judge.__dict__}"
    assert found.summary()["unscored"] == 9


def test_a_malformed_reply_is_shown_to_the_judge_and_asked_again(server: OpenAIServer) -> None:
    replies = [graded(4), "no JSON", graded(9)]
    server.policy = lambda body: replies.pop()
    found = Judge(settings(server)).grade(cases("2"))
    assert found.graded[0].score == 0.75
    assert not found.failures
    assert found.graded[0].verdicts[0].replies == 3
    first, second, third = (seen.body for seen in server.requests)
    assert second["messages"][:2] == first["messages"]
    assert second["messages"][2] == {"role": "assistant", "content": graded(9)}
    assert "no whole number from 1 to 5" in second["messages"][3]["content"]
    assert "not one JSON object" in third["messages"][3]["content"]
    assert len({seen.body["seed"] for seen in server.requests}) == 3


def test_it_is_asked_no_more_than_was_said(server: OpenAIServer) -> None:
    server.policy = lambda body: "never JSON"
    found = Judge(settings(server, retries=2)).grade(cases("2"))
    assert len(server.requests) == 3
    assert found.graded[0].score is None
    assert found.graded[0].note == "the judge gave no verdict (malformed: it is not one JSON object)"


def by_seed(replies: Sequence[Fault | str]) -> Callable[[dict[str, Any]], Fault | str | None]:
    return lambda body: replies[body["seed"] % 1000]


REPEATED = {"repeats": 3, "temperature": 0.7, "retries": 0}


@pytest.mark.parametrize(("combine", "score"), [("mean", (0 + 2 + 2) / 3 / 4), ("majority", 0.5)])
def test_repeats_become_one_grade(server: OpenAIServer, combine: str, score: float) -> None:
    server.policy = by_seed([graded(1), graded(3), graded(3)])
    found = Judge(settings(server, combine=combine, **REPEATED)).grade(cases("2", "3"))
    assert [each.score for each in found.graded] == pytest.approx([score, score])
    alpha = found.repeatability("correct")
    assert alpha is not None
    assert alpha.estimate < 0  # the repeats differ within each answer, and answers not at all
    assert found.summary()["repeats_alpha"]["correct"]["estimate"] == alpha.estimate


def test_a_score_stands_on_more_than_half_of_the_repeats(server: OpenAIServer) -> None:
    """Catches one lucky verdict of three that passes for the judge's, and failed repeats that nobody hears of."""
    server.policy = by_seed(["no JSON", graded(5), graded(5)])
    found = Judge(settings(server, **REPEATED)).grade(cases("2"))
    assert found.graded[0].score == 1.0
    assert "1 of 3 repeats of the judge gave no verdict" in found.graded[0].note
    assert found.failures == {"malformed": 1}
    server.policy = by_seed(["no JSON", graded(5), Fault(status=400)])
    found = Judge(settings(server, **REPEATED)).grade(cases("2"))
    assert found.graded[0].score is None
    assert found.failures == {"malformed": 1, "rejected": 1}


def test_criteria_are_weighted_by_their_place_on_their_scales(server: OpenAIServer) -> None:
    server.policy = lambda body: json.dumps(
        {"correct": {"reason": "half right", "grade": 3}, "clear": {"reason": "clear", "grade": 1}}
    )
    found = Judge(settings(server, criteria=[CORRECT, CLEAR])).grade(cases("2"))
    assert found.graded[0].score == pytest.approx((1 * 0.5 + 3 * 1.0) / 4)
    assert found.graded[0].note == "correct 3: half right; clear 1: clear"


@pytest.mark.parametrize(("reference", "shown"), [("optional", True), ("required", True), ("never", False)])
def test_the_reference_is_shown_as_the_rubric_says(server: OpenAIServer, reference: str, shown: bool) -> None:
    server.policy = lambda body: graded(1)
    Judge(settings(server, reference=reference)).grade(cases("3"))
    blocks = blocks_of(server.requests[0].body)
    assert blocks == {"question": "What is 1 + 1?", "answer": "3"} | ({"reference": "2"} if shown else {})


FAULTY = {
    "no judge": {"endpoint": None},
    "two judges": {"model": NAME},
    "a scale that falls": {"criteria": [CORRECT | {"scale": [5, 1]}]},
    "a scale of a hundred": {"criteria": [CORRECT | {"scale": [0, 100]}]},
    "a level off the scale": {"criteria": [CORRECT | {"levels": {6: "perfect"}}]},
    "two criteria of one name": {"criteria": [CORRECT, CORRECT]},
    "no criteria": {"criteria": []},
    "repeats of the same": {"repeats": 3},
}


@pytest.mark.parametrize("name", FAULTY)
def test_a_rubric_that_cannot_be_is_refused(server: OpenAIServer, name: str) -> None:
    good = settings(server).model_dump()
    with pytest.raises(ValueError, match="validation error"):
        JudgeSettings.model_validate(good | FAULTY[name])


def test_a_local_model_that_cannot_judge_gives_no_scores() -> None:
    """builtin:tiny writes no JSON when nothing holds it to it."""
    judge = Judge(
        JudgeSettings(model=NAME, load="32bit", criteria=[Criterion(**CORRECT)], max_new_tokens=16, retries=0)
    )
    found = judge.grade(cases("2", "3"))
    assert isinstance(judge.model, InMemory)
    assert found.unscored == 2
    assert found.failures == {"malformed": 2}
    assert found.usage is None


class Fenced:
    """A model here, in this process, that puts its JSON into a fence as local models do."""

    name = "fenced"

    def generate(self, prompts: Sequence[Prompt], how: Generation) -> list[str]:
        return [f"```json\n{graded(4)}\n```" for _ in prompts]

    def choice_logprobs(self, prompts: Sequence[Prompt], choices: Sequence[Sequence[str]]) -> list[list[float]]:
        raise WhetError("not here")


def test_a_local_models_fence_is_taken_off() -> None:
    judge = Judge(JudgeSettings(model="fenced", criteria=[Criterion(**CORRECT)]), model=Fenced())
    assert judge.grade(cases("2")).graded[0].score == 0.75
