"""whet beside plain transformers and PEFT: the same checkpoint, adapter, batches and optimizer, compared step by step.

Two comparisons. `free_run` lets both train for 20 steps of AdamW on their own, in fp32, and takes the largest relative
difference of losses, logits and LoRA gradients: an error in any step shows in all that follow. `rounding` is for bf16,
where two correct programs differ by their rounding and trajectories part. There both are held to the adapter of a third
model that computes the same function in fp32, and each one's distance from it is taken: whet may lie no further off
than transformers and PEFT do.

A difference is ||a - b|| / ||b|| over a tensor. Batches are full rows, padded rows and packed documents in turn.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.parity.families import FAMILIES, WORDS, seeded
from whet import FastLanguageModel

STEPS = 20
RANK, ALPHA, SEED = 4, 8, 3407
IGNORED = -100
COMPUTE = {"fp32": torch.float32, "nf4": torch.float32, "bf16": torch.bfloat16, "nf4-bf16": torch.bfloat16}


@dataclass
class Differences:
    """Relative differences; of gradients the worst layer's, and of everything the worst step's."""

    loss: float = 0.0
    logits: float = 0.0
    gradients: float = 0.0

    def __ior__(self, other: Differences) -> Differences:
        for part in fields(self):
            setattr(self, part.name, max(getattr(self, part.name), getattr(other, part.name)))
        return self

    def largest(self) -> float:
        return max(asdict(self).values())


@dataclass
class Pass:
    """What a forward and backward pass gives: loss, logits [N, V] of the N real tokens, gradients by name."""

    loss: Tensor
    logits: Tensor
    gradients: dict[str, Tensor]


def whet_model(folder: Path, family: str, base: str) -> PeftModel:
    """The checkpoint with a LoRA adapter on all its linear layers, loaded by whet, ready to train."""
    model, _ = FastLanguageModel.from_pretrained(str(folder), load_in_4bit=base.startswith("nf4"), dtype=COMPUTE[base])
    targets = FAMILIES[family].targets
    return FastLanguageModel.get_peft_model(
        model, r=RANK, lora_alpha=ALPHA, target_modules=targets, random_state=SEED
    ).train()


def plain_model(folder: Path, family: str, base: str) -> PeftModel:
    """The same from transformers and PEFT alone."""
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=COMPUTE[base],
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=COMPUTE[base],
        quantization_config=nf4 if base.startswith("nf4") else None,
        attn_implementation=FAMILIES[family].plain_attention,
    )
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(FAMILIES[family].targets), task_type="CAUSAL_LM")
    with seeded(SEED):
        return get_peft_model(model, lora).train()


def adapter(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    """The trainable parameters by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def randomise_adapter(model: PeftModel) -> None:
    """Draw every B, which starts as zero and would leave A without a gradient, and the adapter without effect."""
    with seeded(1):
        for name, parameter in sorted(adapter(model).items()):
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)


def batches(steps: int = STEPS) -> Iterator[dict[str, Tensor]]:
    """Full rows, right-padded rows and packed documents in turn; about a quarter of the tokens carries no label."""
    draw = torch.Generator().manual_seed(2)
    for step in range(steps):
        lengths = [(20, 20), (20, 13), (9, 17, 4)][step % 3]
        documents = [torch.randint(3, WORDS, (length,), generator=draw) for length in lengths]
        yield packed(documents) if step % 3 == 2 else padded(documents)


def padded(documents: list[Tensor], side: str = "right") -> dict[str, Tensor]:
    """Documents as rows [B, T], the first quarter of each without labels; a mask only where there is padding."""
    longest = max(map(len, documents))
    ids, labels = torch.zeros(2, len(documents), longest, dtype=torch.long)
    labels.fill_(IGNORED)
    mask = torch.zeros_like(ids)
    for row, document in enumerate(documents):
        first = 0 if side == "right" else longest - len(document)
        place = slice(first, first + len(document))
        ids[row, place], mask[row, place], labels[row, place] = document, 1, _labels(document)
    batch = {"input_ids": ids, "labels": labels}
    if not mask.all():
        batch |= {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    return batch


def packed(documents: list[Tensor]) -> dict[str, Tensor]:
    """Documents one after another in one row [1, T], with positions that start again at each."""
    labels = [_labels(document) for document in documents]
    positions = [torch.arange(len(document)) for document in documents]
    return {
        "input_ids": torch.cat(documents)[None],
        "labels": torch.cat(labels)[None],
        "position_ids": torch.cat(positions)[None],
    }


def _labels(document: Tensor) -> Tensor:
    labels = document.clone()
    labels[: max(1, len(document) // 4)] = IGNORED
    return labels


def run(model: Any, batch: dict[str, Tensor]) -> Pass:
    """Forward and backward; gradients are fresh and stay on the model for the optimizer."""
    model.zero_grad()
    out = model(**batch, use_cache=False)
    out.loss.backward()
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    gradients = {name: parameter.grad.clone() for name, parameter in adapter(model).items()}
    return Pass(out.loss.detach(), out.logits.detach()[real], gradients)


def relative(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b|| in fp64; not-a-number counts as infinitely far."""
    distance = ((a.double() - b.double()).norm() / b.double().norm()).item()
    return distance if distance == distance else float("inf")


def differences(ours: Pass, theirs: Pass) -> Differences:
    assert ours.gradients.keys() == theirs.gradients.keys(), "the two models train different parameters"
    gradients = max(relative(ours.gradients[name], value) for name, value in theirs.gradients.items())
    return Differences(relative(ours.loss, theirs.loss), relative(ours.logits, theirs.logits), gradients)


def free_run(ours: PeftModel, theirs: PeftModel, steps: int = STEPS) -> Differences:
    """The largest differences while both train on their own from one adapter."""
    optimizers = []
    for model in (ours, theirs):
        randomise_adapter(model)
        optimizers.append(torch.optim.AdamW(adapter(model).values(), lr=1e-3))
    worst = Differences()
    for batch in batches(steps):
        worst |= differences(run(ours, batch), run(theirs, batch))
        for optimizer in optimizers:
            optimizer.step()
    return worst


def rounding(
    ours: PeftModel, theirs: PeftModel, exact: PeftModel, steps: int = STEPS
) -> tuple[Differences, Differences]:
    """How far ours and theirs lie from `exact` over all steps together, at the adapter that `exact` trains."""
    randomise_adapter(exact)
    optimizer = torch.optim.AdamW(adapter(exact).values(), lr=1e-3)
    seen: list[list[Pass]] = [[], [], []]
    for batch in batches(steps):
        for model in (ours, theirs):
            for name, parameter in adapter(model).items():
                parameter.data.copy_(adapter(exact)[name].data)
        for passes, model in zip(seen, (ours, theirs, exact), strict=True):
            passes.append(run(model, batch))
        optimizer.step()
    return _distance(seen[0], seen[2]), _distance(seen[1], seen[2])


def _distance(passes: list[Pass], exact: list[Pass]) -> Differences:
    def stacked(many: list[Pass], part: str) -> Tensor:
        if part == "gradients":
            return torch.cat([g.flatten().double() for one in many for g in one.gradients.values()])
        return torch.cat([getattr(one, part).flatten().double() for one in many])

    return Differences(
        **{f.name: relative(stacked(passes, f.name), stacked(exact, f.name)) for f in fields(Differences)}
    )
