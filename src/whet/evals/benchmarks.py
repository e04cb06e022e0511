"""Public benchmarks, by lm-evaluation-harness on the model in memory: its prompts, its metrics, its numbers.

A task's data come from where the harness has them: the Hugging Face hub for public ones, files for those in `include`.
An item's score is the value of one metric on one document; `measures` has every number the harness computes.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from whet.errors import WhetError
from whet.evals.models import InMemory
from whet.evals.results import Item, TaskResult
from whet.evals.tasks import BenchmarkTask

EXTRA = 'pip install "whet[benchmarks]"'
SEEDS = {"random": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}
"""The harness's own defaults."""


def run_benchmark(task: BenchmarkTask, model: InMemory) -> TaskResult:
    """The harness's results on the task. Raises WhetError where the task or its data can't be had.

    Training goes on as if nothing had happened: see `undisturbed`.
    """
    started = time.monotonic()
    with model.undisturbed(), _own_tie_weights(model.model):
        found = _evaluate(task, model)
    samples = _chosen_samples(found, task)
    items = tuple(_item(name, sample, metric, several=len(samples) > 1) for name, metric, sample in _flat(samples))
    return TaskResult(
        task=task.name,
        digest=_digest(task, found),
        model=model.name,
        items=items,
        seconds=time.monotonic() - started,
        scorer=f"lm-eval {task.task}",
        measures=_measures(found["results"]),
    )


def _evaluate(task: BenchmarkTask, model: InMemory) -> dict[str, Any]:
    """What the harness finds, seeded as its own command line seeds it."""
    try:
        from lm_eval.evaluator import evaluate  # type: ignore[import-untyped]
        from lm_eval.models.huggingface import HFLM  # type: ignore[import-untyped]
        from lm_eval.tasks import TaskManager  # type: ignore[import-untyped]
    except ImportError as error:
        raise WhetError(
            "benchmarks need lm-evaluation-harness, which is not here", where=str(task.path), fix=EXTRA
        ) from error
    random.seed(SEEDS["random"])
    np.random.seed(SEEDS["numpy"])
    torch.manual_seed(SEEDS["torch"])
    include = None if task.include is None else str(task.include)
    with _told(task):
        manager = TaskManager(include_path=include, include_defaults=include is None)
        loaded = manager.load([task.task])
        for each in loaded["tasks"].values():
            _settle(each, task.fewshot)
        # a copy of the tokenizer: the harness gives its own a padding side and a token to pad with
        lm = HFLM(pretrained=model.model, tokenizer=copy.deepcopy(model.tokenizer), batch_size=model.batch)
        found = evaluate(
            lm,
            loaded,
            limit=task.limit,
            bootstrap_iters=0,
            log_samples=True,
            apply_chat_template=task.chat,
            fewshot_as_multiturn=task.chat,
        )
    return dict(found)


def _settle(each: Any, fewshot: int | None) -> None:
    """The number of worked examples, as the harness's `simple_evaluate` settles it: a task that says 0 keeps it."""
    own = each.get_config("num_fewshot")
    if fewshot is not None and own != 0:
        each.set_config(key="num_fewshot", value=fewshot)
    elif own is None:
        each.set_config(key="num_fewshot", value=0)
    each.set_fewshot_seed(seed=SEEDS["fewshot"])


@contextmanager
def _told(task: BenchmarkTask) -> Iterator[None]:
    """What goes wrong inside the harness, as a fault of the task: it raises many kinds of error for a user's faults."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise WhetError("no memory for a batch", where=str(task.path), fix="evaluate with a smaller batch") from error
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        fix = "check the task's name, and that its data can be had: public ones come from the Hugging Face hub"
        raise WhetError(
            f"lm-evaluation-harness can't run {task.task}: {reason}", where=str(task.path), fix=fix
        ) from error


@contextmanager
def _own_tie_weights(model: Any) -> Iterator[None]:
    """The harness ties a model's weights again, which would undo what an adapter has put in the place of one."""
    model.tie_weights = _keep
    try:
        yield
    finally:
        del model.tie_weights


def _keep(*args: Any, **kwargs: Any) -> None:
    """Does nothing."""


# ---------------------------------------------------------------- from the harness's samples to items

Samples = Mapping[str, tuple[str, Sequence[Mapping[str, Any]]]]
"""Task -> the metric that counts, and a sample for each document."""


def _chosen_samples(found: Mapping[str, Any], task: BenchmarkTask) -> Samples:
    """Of each task the samples of one filter, with one metric: the one asked for, as NAME or NAME,FILTER."""
    chosen = {}
    for name, samples in sorted(found["samples"].items()):
        metric, _, asked = (task.metric or "").partition(",")
        own = [sample for sample in samples if not asked or sample["filter"] == asked]
        if not own or (metric and metric not in own[0]["metrics"]):
            have = sorted({f"{m},{s['filter']}" for s in samples for m in s["metrics"]})
            raise WhetError(
                f"{name} has no metric {task.metric!r}", where=str(task.path), fix=f"metric: one of {' '.join(have)}"
            )
        own = [sample for sample in own if sample["filter"] == own[0]["filter"]]
        chosen[name] = (metric or own[0]["metrics"][0], own)
    return chosen


def _flat(samples: Samples) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    for name, (metric, own) in samples.items():
        for sample in own:
            yield name, metric, sample


def _item(name: str, sample: Mapping[str, Any], metric: str, *, several: bool) -> Item:
    value, note = sample[metric], None
    if isinstance(value, bool | int | float | np.number) and math.isfinite(value) and 0 <= value <= 1:
        score: float | None = float(value)
    else:
        score, note = None, f"{metric} is {value!r} here, not a number of 0 to 1"
    own = str(sample["doc_id"])
    return Item(
        id=f"{name}/{own}" if several else own,
        prompt=_text(sample["arguments"][0][0]),
        reference=_reference(sample),
        answer=_answer(sample),
        score=score,
        note=note,
    )


def _is_choice(sample: Mapping[str, Any]) -> bool:
    """Whether the model was asked for log-likelihoods: (log p, whether it is what the model itself would write)."""
    return all(
        isinstance(r, tuple | list) and len(r) == 2 and isinstance(r[0], float) for r in sample["filtered_resps"]
    )


def _reference(sample: Mapping[str, Any]) -> str:
    """The target; of several continuations, the text of the one it counts to."""
    target, arguments = sample["target"], sample["arguments"]
    if _is_choice(sample) and type(target) is int and 0 <= target < len(arguments):
        return _text(arguments[target][1]).strip()
    return _text(target)


def _answer(sample: Mapping[str, Any]) -> str:
    """What was generated; of several continuations, the likeliest."""
    responses, arguments = sample["filtered_resps"], sample["arguments"]
    if _is_choice(sample):
        best = max(range(len(responses)), key=lambda i: responses[i][0])
        return _text(arguments[best][1]).strip()
    return _text(responses[0])


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _measures(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Every finite number, as METRIC,FILTER, or TASK/METRIC,FILTER where there are several tasks."""
    return {
        key if len(results) == 1 else f"{name}/{key}": float(value)
        for name, numbers in results.items()
        for key, value in numbers.items()
        if "," in key and isinstance(value, int | float | np.number) and math.isfinite(value)
    }


def _digest(task: BenchmarkTask, found: Mapping[str, Any]) -> str:
    """Of the prompts and targets as they were put to the model, and of what decides how they are scored."""
    hashes = {
        name: [[s["doc_id"], s["filter"], s["doc_hash"], s["prompt_hash"], s["target_hash"]] for s in samples]
        for name, samples in found["samples"].items()
    }
    said = [task.task, task.metric, task.chat, found.get("versions"), hashes]
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()
