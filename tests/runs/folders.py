"""Run folders for tests of what reads them: written as `whet run` writes them, without training anything."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import yaml

from whet.recipe import Recipe

VERSION = "5be1c0d8a94f" + "7e" * 26
START = 1_796_000_000.0
VERSIONS = {
    "python": "3.11.9", "whet": "0.1.0", "torch": "2.13.0", "transformers": "5.24.0", "trl": "1.16.0",
    "peft": "0.21.2", "accelerate": "1.15.0", "datasets": "5.2.0", "bitsandbytes": "0.50.2",
}  # fmt: skip
SUMMARIES: dict[str, dict[str, Any]] = {
    "data": {"version": "5be1c0d8a94f", "train": 4120, "heldout": 457, "label tokens": 612_004, "truncated": 12},
    "trained": {"steps": 400, "first loss": 2.9412, "last loss": 0.9174, "layers": "fused"},
    "eval": {"loss": "2.61 -> 0.94", "exact match": "0.115 -> 0.61", "rows": 457, "questions": 200},
    "export": {"merged": "16061.2 MB", "model-q8_0.gguf": "8540.7 MB"},
}


def recipe_of(name: str, **train: Any) -> Recipe:
    """A recipe of a support desk's answers, with settings of `train` changed."""
    return Recipe.model_validate(
        {
            "name": name,
            "model": {"base": "meta-llama/Llama-3.1-8B-Instruct"},
            "adapter": {"r": 32, "alpha": 64, "rslora": True},
            "data": {"sources": [{"path": "tickets/*.jsonl"}], "redact": {"policy": "gdpr-basic"}},
            "train": {"max_steps": 400, "learning_rate": 1e-4, "schedule": "cosine", **train},
            "export": {"merged": "bf16", "gguf": ["q8_0"]},
        }
    )


def train_lines(recipe: Recipe, steps: int, seed: int = 1) -> list[dict[str, Any]]:
    """Metrics of `steps` steps: a loss that falls as losses do, with its noise."""
    chance = random.Random(seed)
    total, rate, seen = recipe.train.max_steps or steps, recipe.train.learning_rate, 0
    lines = []
    now = START
    for step in range(1, steps + 1):
        warm = min(1.0, step / (0.05 * total))
        tokens = recipe.train.tokens_per_step - chance.randrange(recipe.train.tokens_per_step // 20)
        seen += tokens
        seconds = tokens / chance.gauss(21_000, 350) + (2.5 if step == 1 else 0)
        now += seconds
        lines.append(
            {
                "time": round(now, 3),
                "stage": "train",
                "step": step,
                "loss": 0.85 + 2.1 * math.exp(-step * (rate / 1e-4) / 40) + chance.gauss(0, 0.07),
                "grad_norm": 0.35 + 3 * math.exp(-step / 12) + abs(chance.gauss(0, 0.06)),
                "learning_rate": rate * warm * (0.5 + 0.5 * math.cos(math.pi * step / total)),
                "epoch": step / total,
                "mean_token_accuracy": 0.83 - 0.35 * math.exp(-step / 50) + chance.gauss(0, 0.01),
                "num_tokens": float(seen),
                "seconds": round(seconds, 4),
                "tokens": float(tokens),
                "memory": int((16.4 + 1.5 * (step > 3) + 0.6 * (step > 140)) * 2**30),
            }
        )
    return lines


def eval_lines(checkpoints: list[int]) -> list[dict[str, Any]]:
    """The base against the tuned model, and two tasks on each checkpoint."""
    lines: list[dict[str, Any]] = []
    for task, start, end, items in (("triage", 0.31, 0.86, 120), ("tone (judge)", 0.55, 0.78, 80)):
        for step in [0, *checkpoints]:
            mean = end - (end - start) * math.exp(-step / 90)
            half = 1.96 * math.sqrt(mean * (1 - mean) / items)
            line = {"task": task, "mean": mean, "low": mean - half, "high": mean + half, "items": items, "seconds": 8.1}
            lines.append({"stage": "eval", "step": step, **line, "model": "tuned" if step else "base"})
    scored = {"base": {"loss": 2.61, "exact match": 0.115}, "tuned": {"loss": 0.94, "exact match": 0.61}}
    return [*lines, {"stage": "eval", **scored}]


QUESTIONS = [
    (
        "Customer: my invoice of March was charged twice. What now?",
        "I'm sorry about that. I have refunded the second charge; it shows on your card within 3 to 5 days.",
        [
            "Thank you for contacting us! As an AI language model, I can't access your invoice. Please contact the "
            "billing department of the company in question and ask them to look into the matter.",
            "I'm sorry to hear that. Please contact the billing department to have the second charge refunded.",
            "I'm sorry about that. I have refunded the second charge; it shows on your card within 5 days.",
            "I'm sorry about that. I have refunded the second charge; it shows on your card within 3 to 5 days.",
            "I'm sorry about that. I have refunded the second charge; it shows on your card within 3 to 5 days.",
        ],
    ),
    (
        "Which queue does this go to?\n\nThe app logs me out each time I open a ticket on my phone.",
        "mobile",
        ["The app logs you out because your session has expired. Try to sign in again.", "technical", "mobile"] * 1
        + ["mobile", "mobile"],
    ),
]


def write_samples(folder: Path, steps: list[int]) -> None:
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    for i, step in enumerate(steps):
        lines = [
            {"prompt": prompt, "reference": reference, "answer": answers[min(i, len(answers) - 1)], "step": step}
            for prompt, reference, answers in QUESTIONS
        ]
        (folder / "samples" / f"{step}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_run(
    root: Path,
    name: str = "support-desk-5be1c0d8a9",
    *,
    steps: int = 400,
    stages: tuple[str, ...] = ("data", "trained", "eval", "export"),
    seed: int = 1,
    **train: Any,
) -> Path:
    """A run's folder with everything in it; `stages` are those that are done."""
    folder, recipe = root / name, recipe_of(name.rpartition("-")[0], **train)
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(), sort_keys=False))
    facts = {
        "inputs": {"tickets/2024.jsonl": "1a" * 32, "tickets/2025.jsonl": "2b" * 32, "data": VERSION},
        "seed": recipe.seed,
        "started": "2026-11-29T09:12:44+0000",
        "command": ["whet", "run", f"{recipe.name}.yaml"],
        "versions": VERSIONS,
        "hardware": {"machine": "x86_64", "cpus": 16, "gpus": ["NVIDIA H200"]},
        "git": {"commit": "10deb9fa0c1be8dd9f0a6c2f1cf1f4b1a6d2e7c3", "changed": False},
    }
    (folder / "run.json").write_text(json.dumps(facts))
    checkpoints = [step for step in (50, 100, 200, 400) if step <= steps]
    lines = train_lines(recipe, steps, seed) + (eval_lines(checkpoints) if "eval" in stages else [])
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for stage in stages:
        (folder / stage).mkdir()
        (folder / stage / "summary.json").write_text(json.dumps(SUMMARIES[stage]))
    if "data" in stages:
        (folder / "data" / "manifest.json").write_text(json.dumps({"digest": VERSION}))
    if "trained" in stages:
        (folder / "trained" / "adapter_model.safetensors").write_bytes(b"weights")
        (folder / "receipts").mkdir()
        receipt = {"stage": "trained", "event": 3, "hash": "aa" * 32, "files": {"adapter_model.safetensors": "c4" * 32}}
        (folder / "receipts" / "trained.json").write_text(json.dumps(receipt))
    write_samples(folder, [0, *checkpoints])
    return folder


FINDINGS = [
    {
        "severity": "warning",
        "cause": "memory fragmentation",
        "where": "training, from step 141 on",
        "step": 141,
        "what": "Reserved memory rose by 0.6 GiB without a longer row.",
        "advice": "Set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True.",
    }
]
