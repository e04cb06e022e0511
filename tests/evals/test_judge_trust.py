"""A judge's leaning to a place, its agreement with people, and its way through task files and the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.evals.judging import CLEAR, CORRECT, KEY, blocks_of, by_answer, graded, settings
from tests.evals.openai_server import ENGINE, Fault, OpenAIServer
from whet import cli_judge
from whet.errors import WhetError
from whet.evals.agreement import cohen_kappa
from whet.evals.judge.grading import Judge
from whet.evals.judge.labels import agreement_with_people, read_labelled
from whet.evals.judge.pairwise import Pair, compare
from whet.evals.judge.settings import Criterion
from whet.evals.models import InMemory
from whet.evals.results import Item, TaskResult
from whet.evals.run_tasks import run_task
from whet.evals.scorers.judge import Judged
from whet.evals.tasks import Task, load_task

PAIRS = [Pair(f"p{i}", "What is 1 + 1?", "2", "three") for i in range(6)]


def preferred(better: str) -> str:
    return json.dumps({"reason": "so", "better": better})


def test_a_judge_that_takes_the_first_prefers_nobody(server: OpenAIServer) -> None:
    """Catches a leaning to one place that passes for a preference."""
    server.policy = lambda body: preferred("first")
    found = compare(Judge(settings(server)), PAIRS)
    assert found.outcomes == {"tie": 6}
    bias, rate, same = found.position_bias(), found.win_rate(), found.consistency()
    assert bias is not None
    assert rate is not None
    assert same is not None
    assert (bias.estimate, rate.estimate, same.estimate) == (1.0, 0.5, 0.0)


def test_a_judge_that_looks_at_the_answers_is_followed_through_both_orders(server: OpenAIServer) -> None:
    """Catches a verdict that is not turned round with the order."""
    server.policy = lambda body: preferred("first" if blocks_of(body)["first answer"] == "2" else "second")
    found = compare(Judge(settings(server)), PAIRS)
    assert found.outcomes == {"a": 6}
    bias, rate, same = found.position_bias(), found.win_rate(), found.consistency()
    assert bias is not None
    assert rate is not None
    assert same is not None
    assert (bias.estimate, rate.estimate, same.estimate) == (0.0, 1.0, 1.0)
    assert found.usage is not None
    assert found.usage.requests == 12


def test_an_order_without_a_verdict_leaves_the_pair_without_a_score(server: OpenAIServer) -> None:
    """Catches a pair that is decided by the one order that worked, which brings the bias back in."""
    server.policy = lambda body: preferred("first") if blocks_of(body)["first answer"] == "2" else "neither"
    found = compare(Judge(settings(server, retries=0)), PAIRS)
    assert found.outcomes == {"none": 6}
    assert found.failures == {"malformed": 6}
    assert found.win_rate() is None
    assert found.summary()["position_bias"] is None


# ---------------------------------------------------------------- people


def labelled_file(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "labels.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_agreement_with_people_is_that_of_the_grades(server: OpenAIServer, tmp_path: Path) -> None:
    """Catches grades that are paired with another answer's labels once one answer was not judged."""
    people = [1, 2, 3, 4, 5, 5, 4, 2]
    judged = [1, None, 3, 5, 5, 4, 4, 2]
    rows = [{"prompt": "Q", "answer": f"answer {i}", "labels": {"correct": label}} for i, label in enumerate(people)]
    path = labelled_file(tmp_path, rows)
    replies = {f"answer {i}": graded(g) if g else Fault(status=400) for i, g in enumerate(judged)}
    server.policy = by_answer(replies)
    judge = Judge(settings(server))
    found, grading = agreement_with_people(judge, read_labelled(path, judge.criteria))
    agreement = found["correct"]
    expected = cohen_kappa([1, 3, 5, 5, 4, 4, 2], [1, 3, 4, 5, 5, 4, 2], level="interval")
    assert agreement.kappa == expected
    assert (agreement.answers, agreement.judged, grading.unscored) == (8, 7, 1)
    assert agreement.exact is not None
    assert agreement.exact.estimate == pytest.approx(5 / 7)
    assert agreement.near is not None
    assert agreement.near.estimate == 1.0
    assert agreement.people is None
    assert agreement.alpha is not None
    assert agreement.summary()["alpha"]["estimate"] == agreement.alpha.estimate


def test_several_people_are_compared_among_themselves_too(server: OpenAIServer, tmp_path: Path) -> None:
    labels = [[1, 2], [3, 3], [5, 4], [2, 2]]
    rows = [
        {"prompt": "Q", "answer": f"{i}", "labels": {"correct": own, "clear": None}} for i, own in enumerate(labels)
    ]
    server.policy = lambda body: json.dumps(
        {"correct": {"reason": "r", "grade": min(labels[int(blocks_of(body)["answer"])])}}
        | {"clear": {"reason": "r", "grade": 0}}
    )
    judge = Judge(settings(server, criteria=[CORRECT, CLEAR]))
    found, _ = agreement_with_people(judge, read_labelled(labelled_file(tmp_path, rows), judge.criteria))
    assert list(found) == ["correct"]
    people, exact = found["correct"].people, found["correct"].exact
    assert people is not None
    assert 0.5 < people.estimate < 1
    assert exact is not None
    assert exact.estimate == 1.0


def test_every_fault_of_a_labelled_file_has_its_line(tmp_path: Path) -> None:
    good = {"prompt": "Q", "answer": "A", "labels": {"correct": 4}}
    bad = [{"labels": {"correct": 6}}, {"labels": {"tone": 1}}, {"labels": {}}, {"answer": None}, {"labels": "good"}]
    path = labelled_file(tmp_path, [good, *(good | change for change in bad)])
    with path.open("a") as file:
        file.write('{"prompt": "torn')
    with pytest.raises(WhetError) as refused:
        read_labelled(path, [Criterion(**CORRECT)])
    assert re.findall(r"labels\.jsonl:(\d)", str(refused.value)) == ["2", "3", "4", "5", "6", "7"]
    with pytest.raises(WhetError, match="empty"):
        read_labelled(labelled_file(tmp_path, []), [Criterion(**CORRECT)])
    with pytest.raises(WhetError, match=r"labels\.jsonl"):
        read_labelled(tmp_path / "no" / "labels.jsonl", [Criterion(**CORRECT)])
    with pytest.raises(WhetError, match="the id '7'"):
        read_labelled(labelled_file(tmp_path, [good | {"id": 7}] * 2), [Criterion(**CORRECT)])


# ---------------------------------------------------------------- tasks


TASK = """
name: sums
prompts:
  - {prompt: "What is 1 + 1?", reference: "2"}
  - {prompt: "What is 2 + 2?", reference: "4"}
generation: {max_new_tokens: 4}
scorer:
  kind: judge
  endpoint: {url: URL, model: "builtin:tiny"}
  criteria:
    - {name: correct, about: The answer is the reference's number.}
  reference: required
"""


def test_a_task_is_scored_by_the_judge(server: OpenAIServer, tmp_path: Path) -> None:
    """Catches a judge that a task file cannot name, and counts that do not reach the results."""
    path = tmp_path / "sums.yaml"
    path.write_text(TASK.replace("URL", server.url))
    task = load_task(path)
    assert isinstance(task, Task)
    server.policy = lambda body: graded(2) if blocks_of(body)["reference"] == "2" else Fault(message={"refusal": "No."})
    result = run_task(task, InMemory(*ENGINE.loaded))
    assert [item.score for item in result.items] == [0.25, None]
    assert "refused" in (result.items[1].note or "")
    assert result.measures["judge_refused"] == 1
    assert result.measures["judge_prompt_tokens"] == 14
    result.save(tmp_path / "results.jsonl")
    path.write_text(path.read_text().replace(', reference: "4"', ""))
    with pytest.raises(WhetError, match="no reference for the judge to see"):
        load_task(path)


def test_a_key_in_a_task_file_is_refused_without_showing_it(tmp_path: Path) -> None:
    path = tmp_path / "sums.yaml"
    for wrong in (f"https://user:{KEY}@host/v1", f"http://host/v1, key_env: {KEY}", f"http://host/v1, api_key: {KEY}"):
        path.write_text(TASK.replace("URL", wrong))
        with pytest.raises(WhetError) as refused:
            load_task(path)
        assert KEY not in str(refused.value)
        assert "sums.yaml:9" in str(refused.value)


def test_the_task_in_the_documentation_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches docs/judge.md showing keys that there are not."""
    monkeypatch.setenv("JUDGE_API_KEY", KEY)
    page = (Path(__file__).parents[2] / "docs" / "judge.md").read_text(encoding="utf-8")
    text, labels = re.findall(r"```(?:yaml|json)\n(.*?)```", page, re.DOTALL)
    (tmp_path / "support.yaml").write_text(text)
    (tmp_path / "support.jsonl").write_text('{"prompt": "Hello?", "reference": "Hello."}\n')
    (tmp_path / "labels.jsonl").write_text(labels)
    task = load_task(tmp_path / "support.yaml")
    assert isinstance(task, Task)
    assert isinstance(task.scorer, Judged)
    assert len(read_labelled(tmp_path / "labels.jsonl", task.scorer.judge.criteria)) == 1


# ---------------------------------------------------------------- command line


@pytest.fixture
def task(server: OpenAIServer, tmp_path: Path) -> Path:
    path = tmp_path / "sums.yaml"
    path.write_text(TASK.replace("URL", server.url))
    return path


def told(*arguments: str | Path) -> str:
    done = CliRunner().invoke(cli_judge.judge, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_the_command_line_tells_agreement_and_failures(server: OpenAIServer, task: Path, tmp_path: Path) -> None:
    """Catches failures that only the JSON tells of."""
    rows = [{"prompt": "Q", "answer": f"{i}", "labels": {"correct": 1 + i}} for i in range(5)]
    server.policy = lambda body: (
        graded(1 + int(blocks_of(body)["answer"])) if blocks_of(body)["answer"] != "4" else Fault(status=400)
    )
    out = tmp_path / "agreement.json"
    said = told("agree", task, labelled_file(tmp_path, rows), "--out", out)
    assert "4 of 5 answers judged" in said
    assert re.search(r"kappa, quadratic weights +1\.00 \[0\.\d+, 1\.00\]", said)
    assert re.search(r"alpha, people alone +-", said)
    assert "without a score: 1 (1 rejected)" in said
    assert "judge: 4 requests, 28 + 20 tokens" in said
    assert json.loads(out.read_text())["agreement"]["correct"]["judged"] == 4


def test_the_command_line_compares_two_models_results(server: OpenAIServer, task: Path, tmp_path: Path) -> None:
    """Catches answers that are paired by their place in the file."""

    def results(name: str, order: list[str], worth: int) -> Path:
        items = tuple(Item(own, f"Q{own}", None, f"{own} {name}", worth, None) for own in order)
        TaskResult("sums", "digest", name, items, 1.0).save(tmp_path / f"{name}.jsonl")
        return tmp_path / f"{name}.jsonl"

    server.policy = lambda body: preferred("first" if "good" in blocks_of(body)["first answer"] else "second")
    good, bad = results("good", ["1", "2", "3"], 1), results("bad", ["3", "1", "2"], 0)
    said = told("compare", task, good, bad)
    assert "preferred: a 3, b 0, tie 0" in said
    assert "position bias: 0.00" in said
    shown = [blocks_of(seen.body) for seen in server.requests]
    assert all(blocks["first answer"][0] == blocks["second answer"][0] == blocks["question"][1] for blocks in shown)
    with pytest.raises(WhetError, match="different questions"):
        told("compare", task, good, results("bad", ["1", "2"], 0))
