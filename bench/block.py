"""The training core alone: optimizer steps of a LoRA model without a trainer, at many settings in one process.

    python bench/block.py --model 8b --out bench/results/block.jsonl all,2x2048x4 most+host,8x2048x1

A setting is POLICY[+host],ROWSxLENGTHxPASSES[,tile=N][,fp8=1]: what layers keep (models/activations.py),
and how many rows of how many tokens go through the model at once, how many times a step. One JSON line a setting.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from checkpoint import checkpoint
from environment import origin

GIB = 2**30


def load(folder: Path, bits: int, r: int) -> Any:
    from whet import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        str(folder), load_in_4bit=bits == 4, load_in_16bit=bits == 16, dtype=torch.bfloat16
    )
    model = FastLanguageModel.get_peft_model(model, r=r, lora_alpha=16)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first, which would leave A without gradients
            torch.nn.init.normal_(parameter, std=0.02)
    return model.train()


def configure(model: Any, setting: str) -> tuple[int, int, int]:
    """Set the policy and sizes of `setting`; returns rows, length, passes."""
    from whet.models import activations, fused

    policy, sizes, *options = setting.split(",")
    name, _, where = policy.partition("+")
    shared = fused.shared_of(model)
    shared.policy = replace(getattr(activations, name.upper()), offload=where == "host")
    shared.host = None
    values = dict(option.split("=") for option in options)
    shared.tile, shared.fp8 = int(values.get("tile", fused.TILE)), bool(int(values.get("fp8", 0)))
    rows, length, passes = map(int, sizes.split("x"))
    return rows, length, passes


def step(model: Any, batches: torch.Tensor, optimizer: Any, params: list[torch.Tensor]) -> torch.Tensor:
    from whet.models.head import LinearLogProbs

    base = model.get_base_model()
    total = torch.zeros((), device=batches.device)
    for ids in batches:
        hidden = base.model(ids).last_hidden_state.flatten(0, 1)
        where = torch.arange(ids.numel(), device=ids.device).view_as(ids)[:, :-1].flatten()
        labels = ids[:, 1:].flatten()
        log_probs = LinearLogProbs.apply(hidden, where, base.lm_head.weight, labels, None, None, 1.0, True)[0]
        loss = -log_probs.sum() / (batches.numel() - batches.shape[0] * batches.shape[1])
        loss.backward()
        total += loss.detach()
    torch.nn.utils.clip_grad_norm_(params, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return total


def measure(model: Any, setting: str, steps: int, warm: int, profile: Path | None) -> dict[str, Any]:
    from whet.train.optimizer import AdamW8bit

    rows, length, passes = configure(model, setting)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = AdamW8bit(params, lr=1e-5)
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 8000, (steps, passes, rows, length), generator=draw).cuda()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    seconds, losses, host = [], [], []
    for batches in ids:
        torch.cuda.synchronize()
        started = time.perf_counter()
        loss = step(model, batches, optimizer, params)
        host.append(time.perf_counter() - started)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        losses.append(round(loss.item(), 4))
    timed = seconds[warm:]
    if profile is not None:
        trace(model, ids[0], optimizer, params, profile / (setting.replace(",", "_").replace("=", "") + ".txt"))
    return {
        "kind": "block",
        "setting": setting,
        "tok_s": round(rows * length * passes / median(timed), 1),
        "step_s": {"median": round(median(timed), 4), "min": round(min(timed), 4), "max": round(max(timed), 4)},
        "host_s": round(median(host[warm:]), 4),
        "first_steps_s": [round(s, 2) for s in seconds[:warm]],
        "peak_allocated_gib": round(torch.cuda.max_memory_allocated() / GIB, 3),
        "losses": losses,
    }


def trace(model: Any, batches: torch.Tensor, optimizer: Any, params: list[torch.Tensor], path: Path) -> None:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
        step(model, batches, optimizer, params)
        torch.cuda.synchronize()
    path.parent.mkdir(parents=True, exist_ok=True)
    table = profiled.key_averages().table(sort_by="self_cuda_time_total", row_limit=60, max_name_column_width=90)
    path.write_text(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="+")
    parser.add_argument("--model", default="8b")
    parser.add_argument("--models", type=Path, default=Path("build/bench-models"))
    parser.add_argument("--bits", type=int, default=4, choices=[4, 16])
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warm", type=int, default=3)
    parser.add_argument("--profile", type=Path, default=None, help="a folder for a table of kernels a setting")
    parser.add_argument("--run-id", default=None)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    model = load(checkpoint(args.model, args.models / args.model), args.bits, args.r)
    where = origin()
    for setting in args.settings:
        try:
            line = measure(model, setting, args.steps, args.warm, args.profile)
        except torch.cuda.OutOfMemoryError as error:
            line = {"kind": "block", "setting": setting, "error": str(error).splitlines()[0]}
            model.zero_grad()
        line |= {"model": args.model, "bits": args.bits, "r": args.r, "run_id": args.run_id, **where}
        print({k: line.get(k) for k in ("setting", "tok_s", "step_s", "host_s", "first_steps_s", "peak_allocated_gib",
                                        "losses", "error")}, flush=True)  # fmt: skip
        if args.out is not None:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            with open(args.out, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
