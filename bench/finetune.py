"""One fine-tune by one engine, measured: the same work for whet and its peers, one JSON line a run.

    python bench/finetune.py --engine whet --model 8b --run-id ID --out bench/results/qlora.jsonl

The model has random weights (or is a folder's), the tokens are random, the trainer is TRL's SFT on every engine.
Engines are comparable when one command ran them, one after the other, on one machine: give those runs one --run-id.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SEED = 3407
GIB = 2**30
Loaded = tuple[Any, Any]  # model and tokenizer


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", required=True, choices=list(ENGINES))
    parser.add_argument("--model", default="tiny", help="a folder, or a shape to make at random: 8b, 1b, tiny")
    parser.add_argument("--bs", type=int, default=2, help="rows in a micro-batch")
    parser.add_argument("--ga", type=int, default=4, help="micro-batches in an optimizer step")
    parser.add_argument("--seq", type=int, default=2048, help="tokens in a row, at most with --mixed")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warm", type=int, default=3, help="first steps, left out of the timing")
    parser.add_argument("--gc", default="on", choices=["on", "true", "off"], help="on: the engine's least memory")
    parser.add_argument(
        "--gpu-memory", default=None, help="whet: the fastest plan in so many GiB, in the place of --gc"
    )
    parser.add_argument("--bits", type=int, default=4, choices=[4, 16], help="of the frozen base")
    parser.add_argument("--compute", default="bf16", choices=["bf16", "fp8"], help="whet: of products with the base")
    parser.add_argument("--r", type=int, default=16, help="LoRA's rank")
    parser.add_argument("--full", action="store_true", help="train every weight")
    parser.add_argument("--mixed", action="store_true", help="rows of unequal lengths, median about 270 tokens")
    parser.add_argument("--packing", action="store_true", help="pack rows up to --seq")
    parser.add_argument("--run-id", default=None, help="the same for all runs of one command, which may be compared")
    parser.add_argument("--out", type=Path, default=None, help="a .jsonl file to append the line to")
    parser.add_argument(
        "--trace",
        type=Path,
        default=None,
        help="a folder for ENGINE.json: two more steps, profiled",
    )
    parser.add_argument("--models", type=Path, default=Path("build/bench-models"), help="where made models are kept")
    args = parser.parse_args()
    if not 0 <= args.warm < args.steps:
        parser.error("--warm must leave at least one of --steps to be timed")
    if args.compute != "bf16" and args.engine != "whet":
        parser.error(f"--compute {args.compute} is whet's alone: leave it out for {args.engine}, or take --engine whet")
    if args.full:
        args.bits = 16
    return args


def load_whet(folder: Path, args: argparse.Namespace, dtype: Any) -> Loaded:
    from whet import FastLanguageModel

    kept: dict[str, bool | str] = {"on": "whet", "true": True, "off": False}
    recompute = kept[args.gc]
    options: dict[str, Any] = {}
    if args.gpu_memory is not None:
        recompute, options["gpu_memory"] = "auto", float(args.gpu_memory)
    if args.compute != "bf16":
        options["compute"] = args.compute
    return _load_fast(FastLanguageModel, folder, args, dtype, recompute, **options)


def load_unsloth(folder: Path, args: argparse.Namespace, dtype: Any) -> Loaded:
    from unsloth import FastLanguageModel

    recompute = {"on": "unsloth", "true": True, "off": False}[args.gc]
    return _load_fast(FastLanguageModel, folder, args, dtype, recompute)


def _load_fast(
    engine: Any, folder: Path, args: argparse.Namespace, dtype: Any, recompute: bool | str, **options: Any
) -> Loaded:
    model, tokenizer = engine.from_pretrained(
        str(folder),
        max_seq_length=args.seq,
        dtype=dtype,
        load_in_4bit=args.bits == 4 and not args.full,
        full_finetuning=args.full,
        use_gradient_checkpointing=recompute,
        **options,
    )
    if not args.full:
        model = engine.get_peft_model(
            model,
            r=args.r,
            target_modules=TARGETS,
            lora_alpha=16,
            lora_dropout=0,
            bias="none",
            use_gradient_checkpointing=recompute,
            random_state=SEED,
        )
    return model, tokenizer


def load_hf(folder: Path, args: argparse.Namespace, dtype: Any) -> Loaded:
    """transformers + PEFT as their documentation has it: NF4 with double quantization, SDPA."""
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    quantized = args.bits == 4 and not args.full
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=nf4 if quantized else None,
        dtype=dtype,
        device_map={"": 0 if torch.cuda.is_available() else "cpu"},
        attn_implementation="sdpa",
    )
    if quantized:
        model = prepare_model_for_kbit_training(
            model,
            use_gradient_checkpointing=args.gc != "off",
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )
    if not args.full:
        torch.manual_seed(SEED)
        lora = LoraConfig(r=args.r, lora_alpha=16, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)
    return model, AutoTokenizer.from_pretrained(folder)


# What to import before the clock starts (unsloth: before the libraries it changes), and the function that loads.
ENGINES: dict[str, tuple[str, Callable[[Path, argparse.Namespace, Any], Loaded]]] = {
    "whet": ("whet.language_model", load_whet),
    "hf": ("peft", load_hf),
    "hf-liger": ("liger_kernel.transformers", load_hf),
    "unsloth": ("unsloth", load_unsloth),
}


def steps(args: argparse.Namespace) -> int:
    """All steps, with those that are profiled after the others."""
    return args.steps + (0 if args.trace is None else 2)


def rows(args: argparse.Namespace, vocabulary: int) -> list[list[int]]:
    """Random token ids, the same for every engine; lengths log-normal where they are mixed."""
    import torch

    draw = torch.Generator().manual_seed(1)
    count = args.bs * args.ga * steps(args)
    if not args.mixed:
        return torch.randint(3, vocabulary, (count, args.seq), generator=draw).tolist()
    count *= 8 if args.packing else 1  # packed rows hold several
    lengths = torch.exp(torch.randn(count, generator=draw) * 0.9 + 5.6).clamp(min(16, args.seq), args.seq).long()
    return [torch.randint(3, vocabulary, (n,), generator=draw).tolist() for n in lengths.tolist()]


def meter() -> Any:
    """A trainer callback that times each step, waiting for the GPU at both ends, and keeps its tokens and loss."""
    import torch
    from transformers import TrainerCallback

    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    class Meter(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.tokens: list[int] = [0]
            self.losses: list[float] = []

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.started = now()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.seconds.append(now() - self.started)
            self.tokens.append(int(state.num_input_tokens_seen))

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                self.losses.append(round(float(logs["loss"]), 4))

    return Meter()


def train(model: Any, tokenizer: Any, args: argparse.Namespace) -> tuple[Any, Any]:
    """Run the steps and return their meter, and with --trace the recorder of the profiled ones."""
    import torch
    from datasets import Dataset

    if args.engine == "whet":
        from whet import SFTConfig, SFTTrainer
    else:
        from trl import SFTConfig, SFTTrainer
    cuda = torch.cuda.is_available()
    settings: dict[str, Any] = {
        "per_device_train_batch_size": args.bs,
        "gradient_accumulation_steps": args.ga,
        "max_steps": steps(args),
        "learning_rate": 2e-4,
        "bf16": cuda,
        "use_cpu": not cuda,
        "optim": "adamw_8bit",
        "weight_decay": 0.01,
        "lr_scheduler_type": "linear",
        "warmup_steps": 2,
        "logging_steps": 1,
        "seed": SEED,
        "report_to": [],
        "save_strategy": "no",
        "max_length": args.seq,
        "packing": args.packing,
        "include_num_input_tokens_seen": "non_padding",
    }
    if args.engine.startswith("hf"):
        settings["gradient_checkpointing"] = args.gc != "off"
        settings["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
        settings["use_liger_kernel"] = args.engine == "hf-liger"
    measured, recorded = meter(), None
    if args.trace is not None:
        from timeline import recorder

        recorded = recorder(after=args.steps)
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=model,
            processing_class=tokenizer,
            train_dataset=Dataset.from_dict({"input_ids": rows(args, len(tokenizer))}),
            args=SFTConfig(output_dir=folder, **settings),
            callbacks=[measured] if recorded is None else [measured, recorded],
        )
        trainer.train()
    return measured, recorded


def result(args: argparse.Namespace) -> dict[str, Any]:
    """Load, train, and say how fast, in how much memory, on what."""
    library, load = ENGINES[args.engine]
    import_module(library)
    import torch
    from checkpoint import checkpoint
    from environment import origin

    cuda = torch.cuda.is_available()
    folder = checkpoint(args.model, args.models / args.model)
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    model, tokenizer = load(folder, args, torch.bfloat16 if cuda else torch.float32)
    load_s = time.perf_counter() - started
    load_peak = torch.cuda.max_memory_allocated() / GIB if cuda else None
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    measured, recorded = train(model, tokenizer, args)
    timed = measured.seconds[args.warm : args.steps]
    real = measured.tokens[args.steps] - measured.tokens[args.warm]
    where = origin()
    if args.engine == "whet":
        import whet

        where["versions"]["whet"] = whet.__version__
    names = ("bs", "ga", "seq", "steps", "warm", "gc", "gpu_memory", "bits", "compute", "r", "full", "mixed", "packing")
    run = {
        "run_id": args.run_id,
        "engine": args.engine,
        "work": {"model": folder.name, **{name: getattr(args, name) for name in names}},
    }
    if recorded is not None:
        facts = {"vocabulary": model.config.get_text_config().vocab_size, "timed_ms": round(median(timed) * 1e3, 3)}
        args.trace.mkdir(parents=True, exist_ok=True)
        path = args.trace / f"{args.engine}.json"
        path.write_text(json.dumps({**run, **facts, **recorded.trace(), **where}), encoding="utf-8")
    line = {
        "kind": "finetune",
        **run,
        # rows of unequal length say little by their padded size
        "tok_s": None if args.mixed else round(args.bs * args.ga * args.seq / median(timed), 1),
        "real_tok_s": round(real / sum(timed), 1),
        "step_s": {"median": _s(median(timed)), "min": _s(min(timed)), "max": _s(max(timed))},
        "first_steps_s": [_s(seconds) for seconds in measured.seconds[: args.warm]],
        "load_s": _s(load_s),
        "load_peak_gib": _gib(load_peak),
        "peak_allocated_gib": _gib(torch.cuda.max_memory_allocated() / GIB if cuda else None),
        "peak_reserved_gib": _gib(torch.cuda.max_memory_reserved() / GIB if cuda else None),
        "peak_host_gib": _gib(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB),
        "losses": measured.losses[: args.steps],
    }
    if args.engine == "whet":
        line["plan"] = plan_of(model)  # allocates, so after the peaks are read
    return line | where


def plan_of(model: Any) -> dict[str, Any]:
    """What whet chose for the model's layers, in words, and the link to the host, in GB/s, measured as for the plan.

    None for the plan where none was made (a fixed --gc, no GPU), and for the link where there is no GPU.
    """
    import torch

    from whet.models.fused import shared_of
    from whet.plan.fit import device_rates

    shared = shared_of(model)
    link = device_rates(torch.device("cuda")).link / 1e9 if torch.cuda.is_available() else None
    return {"chosen": None if shared is None else shared.plan, "link_gb_s": None if link is None else round(link, 1)}


def _s(seconds: float) -> float:
    return round(seconds, 4)


def _gib(size: float | None) -> float | None:
    return None if size is None else round(size, 3)


def main() -> None:
    args = arguments()
    stdout, sys.stdout = sys.stdout, sys.stderr  # the trainer prints too; stdout holds the one line
    line = json.dumps(result(args))
    print(line, file=stdout, flush=True)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with open(args.out, "a", encoding="utf-8") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
