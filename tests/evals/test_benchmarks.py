"""lm-evaluation-harness on the model in memory, against its own run on the same weights from their folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import whet
from whet.errors import WhetError
from whet.evals.benchmark_folder import check_include
from whet.evals.models import InMemory
from whet.evals.results import TaskResult
from whet.evals.run_tasks import run_task
from whet.evals.tasks import Task, load_task
from whet.models.load import resolve

CHOICE = """\
task: local_choice
dataset_path: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
GENERATE = """\
task: local_generate
dataset_path: {data}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{text}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 8, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true}}]
"""
WORDS = ("red", "a green one", "blue", "the very dark blue of the sea", "5", "yes")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks of the harness over a local file, of choices that differ in length, and of texts to write."""
    folder = tmp_path_factory.mktemp("benchmarks")
    rows = [
        {
            "question": f"{n}. The color of the {word} thing is",
            "choices": [WORDS[(n + i) % len(WORDS)] for i in range(4)],
            "answer": n % 4,
            "text": WORDS[n % len(WORDS)],
        }
        for n, word in enumerate(("sea", "grass", "old red", "sky", "lamp", "last") * 4)
    ]
    for name in ("data", "harness"):
        (folder / name).mkdir()
    (folder / "data" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (("choice", CHOICE), ("generate", GENERATE)):
        (folder / "harness" / f"{name}.yaml").write_text(text.format(data=folder / "data"))
        own = f"name: {name}\nbenchmark: {{task: local_{name}, include: harness}}\n"
        (folder / f"{name}.yaml").write_text(own)
    return folder


@pytest.fixture(scope="module")
def asked() -> InMemory:
    """The built-in model as training holds it: in training mode, with an adapter that as yet changes nothing."""
    model, tokenizer = whet.FastLanguageModel.from_pretrained("builtin:tiny", load_in_4bit=False, dtype="float32")
    model = whet.FastLanguageModel.get_peft_model(model, r=4, lora_dropout=0.5)
    return InMemory(model.train(), tokenizer, "tiny", batch=4)


@pytest.fixture(scope="module")
def plain(folder: Path) -> Mapping[str, Any]:
    """What the harness itself finds, with its own HFLM from the model's folder."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    lm = HFLM(pretrained=resolve("builtin:tiny"), device="cpu", dtype="float32", batch_size=1)
    manager = TaskManager(include_path=str(folder / "harness"), include_defaults=False)
    found: Mapping[str, Any] = lm_eval.simple_evaluate(
        lm, tasks=["local_choice", "local_generate"], task_manager=manager, bootstrap_iters=0
    )
    return found


@pytest.fixture(scope="module")
def results(folder: Path, asked: InMemory) -> dict[str, TaskResult]:
    return {name: run_task(load_task(folder / f"{name}.yaml"), asked) for name in ("choice", "generate")}


@pytest.mark.parametrize(("name", "metric"), [("choice", "acc"), ("generate", "exact_match")])
def test_the_numbers_are_the_harnesss_own(
    results: dict[str, TaskResult], plain: Mapping[str, Any], name: str, metric: str
) -> None:
    """Catches dropout that is on, an adapter or fused layers that answer otherwise, padding, and samples mixed up."""
    own, found = results[name], plain["results"][f"local_{name}"]
    numbers = {key: value for key, value in found.items() if "," in key and isinstance(value, float)}
    assert numbers
    assert own.measures == pytest.approx({k: v for k, v in numbers.items() if "stderr" not in k}, abs=0)
    samples = sorted(plain["samples"][f"local_{name}"], key=lambda sample: sample["doc_id"])
    assert [(item.id, item.score) for item in own.items] == [(str(s["doc_id"]), float(s[metric])) for s in samples]
    assert own.mean == found[f"{metric},none"]
    if name == "generate":
        assert [item.answer for item in own.items] == [sample["filtered_resps"][0] for sample in samples]
        assert any(item.answer for item in own.items)
    else:
        assert 0 < own.mean < 1
        assert [item.reference for item in own.items] == [s["doc"]["choices"][s["target"]] for s in samples]


def test_whets_own_choices_agree_with_the_harness(folder: Path, asked: InMemory, plain: Mapping[str, Any]) -> None:
    """Catches a choice scorer whose log-likelihoods are of other tokens than everybody else's."""
    (folder / "own.yaml").write_text(
        "name: own\ndata: data/test.jsonl\nchat: false\ncolumns: {prompt: question, reference: answer}\n"
        "scorer: {kind: choice, reference: index, normalize: characters}\n"
    )
    task = load_task(folder / "own.yaml")
    assert isinstance(task, Task)
    samples = sorted(plain["samples"]["local_choice"], key=lambda sample: sample["doc_id"])
    assert run_task(task, asked).scores == [sample["acc_norm"] for sample in samples]
    prompts = [question.prompt for question in task.questions]
    found = asked.choice_logprobs(prompts, [[f" {choice}" for choice in q.choices] for q in task.questions])
    for values, sample in zip(found, samples, strict=True):
        assert values == pytest.approx([log_prob for log_prob, _ in sample["filtered_resps"]], abs=1e-3)
    likeliest = [max(range(len(values)), key=values.__getitem__) for values in found]
    assert [float(i == s["target"]) for i, s in zip(likeliest, samples, strict=True)] == [s["acc"] for s in samples]


def test_training_does_not_notice(folder: Path, asked: InMemory) -> None:
    """Catches seeds set for good, evaluation mode left on, weights tied again, a tokenizer that pads otherwise."""
    import random

    import numpy as np

    def state() -> list[Any]:
        modes = [module.training for module in asked.model.modules()]
        tied = asked.model.get_output_embeddings().weight.data_ptr()
        padding = (asked.tokenizer.padding_side, asked.tokenizer.pad_token)
        seeds = [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]
        weights = [parameter.sum().item() for parameter in asked.model.parameters()]
        return [modes, tied, padding, seeds, weights, "tie_weights" in vars(asked.model)]

    random.seed(7), np.random.seed(7), torch.manual_seed(7)
    before = state()
    assert True in before[0]
    run_task(load_task(folder / "generate.yaml"), asked)
    assert state() == before


def test_the_digest_follows_the_documents(folder: Path, results: dict[str, TaskResult], asked: InMemory) -> None:
    """Catches a comparison of results on other documents, or on fewer."""
    (folder / "fewer.yaml").write_text("name: choice\nbenchmark: {task: local_choice, include: harness, limit: 3}\n")
    fewer = run_task(load_task(folder / "fewer.yaml"), asked)
    assert len(fewer.items) == 3
    assert fewer.digest != results["choice"].digest
    (folder / "metric.yaml").write_text(
        "name: choice\nbenchmark: {task: local_choice, include: harness, limit: 3, metric: acc_norm}\n"
    )
    by_length = run_task(load_task(folder / "metric.yaml"), asked)
    assert by_length.mean == by_length.measures["acc_norm,none"]
    assert by_length.digest != fewer.digest


@pytest.mark.parametrize(
    ("benchmark", "what"),
    [
        ("{task: no_such_task, include: harness}", "can't run no_such_task"),
        ("{task: local_choice, include: harness, limit: 1, metric: f1}", "no metric 'f1'"),
        ("{task: local_choice, include: harness, limit: 1, metric: 'acc,strict'}", "no metric"),
    ],
)
def test_a_task_that_cannot_be_had_is_a_fault(folder: Path, asked: InMemory, benchmark: str, what: str) -> None:
    (folder / "fault.yaml").write_text(f"name: fault\nbenchmark: {benchmark}\n")
    with pytest.raises(WhetError, match=what) as caught:
        run_task(load_task(folder / "fault.yaml"), asked)
    assert "fault.yaml" in str(caught.value.where)


@pytest.mark.parametrize(
    "line",
    [
        "doc_to_text: !function utils.text", "doc_to_text: !<!function> utils.text", "class: utils.Task",
        "include: ../elsewhere.yaml", "include: /etc/task.yaml", "dataset_path: pandas", "dataset_path: ./load.py",
        "metric_list: [{metric: !function utils.score}]",
    ],
)  # fmt: skip
def test_a_folder_of_tasks_that_run_code_has_to_be_allowed(tmp_path: Path, line: str) -> None:
    """Catches Python that runs because a task's YAML names it."""
    (tmp_path / "harness").mkdir()
    (tmp_path / "harness" / "task.yaml").write_text(f"task: x\n{line}\n")
    (tmp_path / "t.yaml").write_text("name: t\nbenchmark: {task: x, include: harness}\n")
    with pytest.raises(WhetError, match="would run code"):
        load_task(tmp_path / "t.yaml")
    assert load_task(tmp_path / "t.yaml", allow_python=True).name == "t"


def test_a_folder_of_plain_tasks_is_fine(folder: Path) -> None:
    check_include(folder / "harness")
