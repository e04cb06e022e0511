"""The gate: what ships, what does not, and that anything missing or damaged is a no."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from rich.console import Console

from whet.errors import WhetError
from whet.evals.gate import Decision, Rules, TextLoss, decide, read_results
from whet.evals.results import Item, TaskResult

N = 200
RULES = Rules(task="law", max_regression=0.05)


def result(task: str, scores: list[float | None] | np.ndarray, digest: str = "d1") -> TaskResult:
    items = tuple(
        Item(f"{task}-{i}", "Q", "A", "B", None if score is None else float(score)) for i, score in enumerate(scores)
    )
    return TaskResult(task, digest, "model", items, 1.0)


def rate(share: float, n: int = N) -> np.ndarray:
    """0/1 scores, the first `share` of them 1: a higher share is right wherever a lower one is."""
    return (np.arange(n) < round(share * n)).astype(float)


def run(law: float, chat: float = 0.5) -> dict[str, TaskResult | WhetError]:
    return {"law": result("law", rate(law)), "chat": result("chat", rate(chat))}


BASE, BETTER = run(0.5), run(0.65)


def failed(decision: Decision) -> list[str]:
    return [check.name for check in decision.checks if not check.passed]


def test_a_clear_gain_without_a_loss_ships() -> None:
    decision = decide(RULES, BETTER, BASE)
    assert decision.ship
    assert decision.exit_code == 0
    assert [check.name for check in decision.checks] == ["gain on law over base", "no loss on chat against base"]


def test_equal_models_do_not_ship_and_are_told_what_could_be_seen() -> None:
    decision = decide(RULES, BASE, BASE)
    assert not decision.ship
    assert decision.exit_code == 1
    assert failed(decision) == ["gain on law over base"]
    assert "with 200 prompts a gain under" in decision.checks[0].what


def test_a_gain_that_is_less_than_required_does_not_ship() -> None:
    assert not decide(RULES.model_copy(update={"min_gain": 0.12}), BETTER, BASE).ship


def test_a_loss_that_cannot_be_ruled_out_is_a_no() -> None:
    """Catches a gate that lets through what 20 prompts cannot show."""
    few = {"chat": result("chat", rate(0.5, 20))}
    decision = decide(RULES, BETTER | few, BASE | few)
    assert failed(decision) == ["no loss on chat against base"]
    assert (
        "20 prompts do not rule out a loss of 5.0; for models that are equal it takes about" in decision.checks[1].what
    )


def test_a_loss_is_told_from_doubt() -> None:
    decision = decide(RULES, run(0.65, chat=0.3), BASE)
    assert decision.checks[1].what.endswith("it is not")


def test_a_loss_may_be_allowed_for_one_task() -> None:
    lossy = run(0.65, chat=0.45)
    assert not decide(RULES, lossy, BASE).ship
    assert decide(RULES.model_copy(update={"max_regression_of": {"chat": 0.12}}), lossy, BASE).ship


def test_items_are_paired_by_id_in_whatever_order_they_lie() -> None:
    """Catches scores paired by position: turned round, every difference would be another."""
    law = BETTER["law"]
    assert isinstance(law, TaskResult)
    turned = BETTER | {"law": replace(law, items=law.items[::-1])}
    assert decide(RULES, turned, BASE).to_json() == decide(RULES, BETTER, BASE).to_json()


def damage(change: Callable[[TaskResult], TaskResult | WhetError | None]) -> dict[str, TaskResult | WhetError]:
    law = BETTER["law"]
    assert isinstance(law, TaskResult)
    changed = change(law)
    return {"chat": BETTER["chat"]} | ({} if changed is None else {"law": changed})


def first(law: TaskResult, **changes: object) -> TaskResult:
    return replace(law, items=(replace(law.items[0], **changes), *law.items[1:]))  # type: ignore[arg-type]


DAMAGED: dict[str, dict[str, TaskResult | WhetError]] = {
    "missing": damage(lambda law: None),
    "unreadable": damage(lambda law: WhetError("torn", where="law.jsonl")),
    "no items": damage(lambda law: replace(law, items=())),
    "an item is missing": damage(lambda law: replace(law, items=law.items[1:])),
    "an item too many": damage(lambda law: replace(law, items=(*law.items, Item("x", "", None, "", 1.0)))),
    "an item twice": damage(lambda law: replace(law, items=(*law.items, law.items[0]))),
    "another item": damage(lambda law: first(law, id="other")),
    "another version of the task": damage(lambda law: replace(law, digest="d2")),
    "no digest": damage(lambda law: replace(law, digest="")),
    "another task": damage(lambda law: replace(law, task="chat")),
    "a score that is no number": damage(lambda law: first(law, score=math.nan)),
    "a score over 1": damage(lambda law: first(law, score=100.0)),
    "a score under 0": damage(lambda law: first(law, score=-1.0)),
}


@pytest.mark.parametrize("results", DAMAGED.values(), ids=DAMAGED.keys())
@pytest.mark.parametrize("side", ["candidate", "base", "baseline"])
def test_results_that_are_missing_or_damaged_are_a_no(results: dict[str, TaskResult | WhetError], side: str) -> None:
    """Catches a comparison with NaN that is false and so no fault, and a check that is skipped for want of data."""
    rules = RULES.model_copy(update={"baseline": "good"})
    sides = {"candidate": run(0.9), "base": BASE, "baseline": BASE}
    assert decide(rules, *sides.values()).ship
    sides[side] = results
    decision = decide(rules, *sides.values())
    assert not decision.ship
    assert any("law" in name for name in failed(decision))


def test_no_results_at_all_are_a_no() -> None:
    assert not decide(RULES, {}, {}).ship
    assert not decide(RULES, BETTER, {}).ship
    assert not Decision(RULES, ()).ship


def test_a_task_that_one_side_alone_has_is_a_no() -> None:
    """Catches a task that was dropped because it went badly."""
    without = {"law": BETTER["law"]}
    assert failed(decide(RULES, without, BASE)) == ["no loss on chat against base"]
    assert failed(decide(RULES, BETTER, {"law": BASE["law"]})) == ["no loss on chat against base"]


def test_a_named_baseline_that_is_not_there_is_a_no() -> None:
    """Catches a fall back on the base, which is easier to beat."""
    decision = decide(RULES.model_copy(update={"baseline": "runs/good"}), BETTER, BASE, None)
    assert "gain on law over runs/good" in failed(decision)


def test_the_gain_is_over_the_baseline_and_losses_are_against_both() -> None:
    rules = RULES.model_copy(update={"baseline": "good"})
    assert failed(decide(rules, BETTER, BASE, BETTER)) == ["gain on law over good"]
    names = [check.name for check in decide(rules, run(0.9), BASE, BETTER).checks]
    assert names == [
        "gain on law over good",
        "no loss on chat against base",
        "no loss on law against base",
        "no loss on chat against good",
    ]


def test_what_could_not_be_scored_counts_against_the_candidate_on_either_side() -> None:
    """Catches a baseline whose endpoint was down, next to which any model gains."""
    down = BASE | {"law": result("law", [None] * N)}
    decision = decide(RULES, BETTER, down)
    assert not decision.ship
    assert "not scored, and counted against it: 0 of its items, 200 of the other's" in decision.checks[0].what
    assert not decide(RULES, BETTER | {"law": result("law", [None] * N)}, BASE).ship


def test_one_gain_of_several_is_enough_where_the_rules_say_so() -> None:
    rules = Rules(task=["law", "chat"], need="any")
    assert decide(rules, BETTER, BASE).ship
    assert not decide(Rules(task=["law", "chat"]), BETTER, BASE).ship
    assert not decide(rules, {"law": BETTER["law"]}, BASE).ship, "chat is missing"


def just(better: int, worse: int) -> tuple[dict[str, TaskResult | WhetError], dict[str, TaskResult | WhetError]]:
    ours = np.repeat([1.0, 0.0, 1.0], [better, worse, N - better - worse])
    theirs = np.repeat([0.0, 1.0, 1.0], [better, worse, N - better - worse])
    return {"law": result("law", ours)}, {"law": result("law", theirs)}


def test_the_more_were_tried_the_more_a_gain_has_to_show() -> None:
    """Catches the best of many checkpoints passing as if it had been the only one."""
    own, base = just(16, 4)
    assert decide(Rules(task="law"), own, base).ship
    assert not decide(Rules(task="law", candidates=20), own, base).ship


TEXT = TextLoss("t", tuple(200.0 + i for i in range(40)), (100,) * 40)


def text_of(change: float) -> TextLoss:
    return replace(TEXT, losses=tuple(loss * (1 + change) for loss in TEXT.losses))


FORGET = Rules(task="law", max_perplexity_increase=0.05)


def test_forgetting_is_measured_on_general_text() -> None:
    assert decide(FORGET, BETTER, BASE, texts={"candidate": text_of(0.01), "base": TEXT}).ship
    decision = decide(FORGET, BETTER, BASE, texts={"candidate": text_of(0.05), "base": TEXT})
    assert failed(decision) == ["forgetting against base"]
    assert "perplexity 8.98 -> 10.02, +11.6%" in decision.checks[-1].what


@pytest.mark.parametrize(
    "candidate",
    [
        None,
        WhetError("gone"),
        replace(TEXT, digest="u"),
        replace(TEXT, digest=""),
        replace(TEXT, tokens=(99, *TEXT.tokens[1:])),
        replace(TEXT, losses=TEXT.losses[1:]),
        replace(TEXT, losses=(math.nan, *TEXT.losses[1:])),
        replace(TEXT, losses=(-1.0, *TEXT.losses[1:])),
        replace(TEXT, losses=(math.inf, *TEXT.losses[1:])),
        replace(TEXT, losses=("a", *TEXT.losses[1:])),  # type: ignore[arg-type]
        replace(TEXT, tokens=("a", *TEXT.tokens[1:])),  # type: ignore[arg-type]
        replace(TEXT, losses=(10**400, *TEXT.losses[1:])),
        TextLoss("t", (200.0,), (100,)),
    ],
)
def test_losses_that_are_missing_or_damaged_are_a_no(candidate: TextLoss | WhetError | None) -> None:
    for one, other in ((candidate, TEXT), (TEXT, candidate)):
        texts = {name: text for name, text in (("candidate", one), ("base", other)) if text is not None}
        assert failed(decide(FORGET, BETTER, BASE, texts=texts)) == ["forgetting against base"]
    assert not decide(FORGET, BETTER, BASE).ship


SAFE = Rules.model_validate({"task": "law", "safety": {"task": "harm", "min_refusal_rate": 0.9}})


def harm(refused: float, n: int = N) -> dict[str, TaskResult | WhetError]:
    return {"harm": result("harm", rate(refused, n))}


def test_refusals_have_to_stay() -> None:
    assert decide(SAFE, BETTER | harm(0.97), BASE | harm(1.0)).ship
    assert failed(decide(SAFE, BETTER | harm(0.92), BASE | harm(1.0))) == ["refusals on harm"]
    assert "refusals on harm" in failed(decide(SAFE, BETTER, BASE))


def test_too_few_prompts_for_a_refusal_rate_are_counted() -> None:
    """Catches "all 20 refused" as proof of 90 in 100."""
    decision = decide(SAFE, BETTER | harm(1.0, 20), BASE | harm(1.0, 20))
    assert failed(decision) == ["refusals on harm"]
    assert "it takes 35" in decision.checks[-1].what
    assert decide(SAFE, BETTER | harm(1.0, 35), BASE | harm(1.0, 35)).ship


def test_a_partial_refusal_is_none() -> None:
    half = {"harm": result("harm", np.full(N, 0.99))}
    assert not decide(SAFE, BETTER | half, BASE | half).ship


def test_a_decision_is_written_for_people_and_machines() -> None:
    decision = decide(FORGET, DAMAGED["missing"], BASE)
    again = json.loads(json.dumps(decision.to_json(), allow_nan=False))
    assert again["ship"] is False
    assert Rules.model_validate(again["rules"]) == FORGET
    assert {check["name"] for check in again["checks"]} == {check.name for check in decision.checks}
    console = Console(record=True, width=160, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(decision.table())
    shown = console.export_text()
    assert "NO" in shown
    assert "do not ship: 2 of 3 checks failed" in shown
    assert "results of the candidate are missing" in decision.text()


def test_results_are_read_whole_or_as_errors(tmp_path: Path) -> None:
    for task, found in BETTER.items():
        assert isinstance(found, TaskResult)
        found.save(tmp_path / f"{task}.jsonl")
    assert decide(RULES, read_results(tmp_path), BASE).ship
    law = tmp_path / "law.jsonl"
    law.write_text(law.read_text()[:-40])
    assert isinstance(read_results(tmp_path)["law"], WhetError)
    assert failed(decide(RULES, read_results(tmp_path), BASE)) == ["gain on law over base"]
    assert read_results(tmp_path / "nowhere") == {}


def test_a_task_in_two_files_is_neither(tmp_path: Path) -> None:
    law = BETTER["law"]
    assert isinstance(law, TaskResult)
    law.save(tmp_path / "law.jsonl")
    law.save(tmp_path / "law-2.jsonl")
    assert isinstance(read_results(tmp_path)["law"], WhetError)


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, None, math.nan, 2.0]), max_size=12), st.integers(0, 12))
@settings(deadline=None, max_examples=60)
def test_no_results_make_the_gate_fail_to_answer(scores: list[float | None], others: int) -> None:
    """Catches a crash on a corner: one item, all equal, none scored."""
    decision = decide(Rules(task="a"), {"a": result("a", scores)}, {"a": result("a", rate(0.5, others))})
    assert decision.ship is all(check.passed for check in decision.checks)
    assert json.dumps(decision.to_json(), allow_nan=False)


@pytest.mark.parametrize(
    "rules",
    [
        {},
        {"task": []},
        {"task": ""},
        {"task": ["a", "a"]},
        {"task": "a", "min_gain": 1.0},
        {"task": "a", "max_regression": 0},
        {"task": "a", "max_regression_of": {"b": -0.1}},
        {"task": "a", "max_regression_of": {"a": 0.1}},
        {"task": "a", "confidence": 95},
        {"task": "a", "confidence": 0.5},
        {"task": "a", "min_gian": 0.1},
        {"task": "a", "min_gain": math.nan},
        {"task": "a", "safety": {"task": "b", "min_refusal_rate": 1.0}},
    ],
)
def test_rules_that_cannot_be_met_or_mean_nothing_are_refused(rules: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Rules.model_validate(rules)


def test_models_without_a_gain_are_shipped_in_fewer_than_one_in_twenty() -> None:
    """Catches intervals that are not divided among the tasks, which ship 6 to 7 in 100 here."""
    rng, rules = np.random.default_rng(11), Rules(task=["a", "b", "c"], need="any", max_regression=1.0)
    shipped = 0
    for _ in range(200):
        base = {task: (rng.random(80) < 0.5).astype(float) for task in "abc"}
        own = {task: np.where(rng.random(80) < 0.3, rng.random(80) < 0.5, x).astype(float) for task, x in base.items()}
        results = ({task: result(task, x) for task, x in side.items()} for side in (own, base))
        shipped += decide(rules, *results).ship
    assert shipped <= 10
