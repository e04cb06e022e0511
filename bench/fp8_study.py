"""What FP8 compute of the frozen base costs in accuracy: a small model trained on real text, then LoRA on other text.

    PYTHONPATH=src python bench/fp8_study.py --run-id ID        -> bench/results/fp8.jsonl
    python bench/fp8_study.py --table --run-id ID               the means over seeds, as Markdown

1. A Llama of about 100M parameters learns the Python sources that are installed beside torch: from random weights, in
   bf16 with fp32 master weights, for --pretrain-seconds.
2. It is LoRA-tuned on C++ headers, which it has not seen, with its base held in three ways:

       bf16      16 bits
       nf4       NF4, multiplied by in bf16
       nf4+fp8   NF4, multiplied by in FP8 (`compute="fp8"`)

   A seed draws the adapter and the rows with their order, the same for all ways.
3. The loss on headers held out (whole files), each way in its own compute, before and after; and the adapter that
   nf4+fp8 trained once more with bf16 compute (`in_bf16`), as it is exported.

One JSON line for each way and seed. None is written unless every layer of every pass ran in the fused block, and in
FP8 where that is claimed. Without a GPU the references of FP8 run, which is for tests.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import math
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import numpy as np
import torch
from environment import ROOT, origin
from in_block import NotFused, check, counted
from torch import Tensor

RESULTS = ROOT / "bench" / "results" / "fp8.jsonl"
WAYS = ("bf16", "nf4", "nf4+fp8")
PRETRAINING = (
    *("width", "layers", "heads", "kv_heads", "hidden", "vocabulary", "seq"),
    *("pretrain_seconds", "pretrain_steps", "pretrain_rows", "pretrain_lr", "pretrain_mb"),
)
SPECIAL = ["<pad>", "<s>", "</s>"]
END = SPECIAL.index("</s>")
BPE_SHARE = 8  # every eighth file teaches the tokenizer
LONGEST_HEADER = 1 << 16  # characters: longer ones are tables, and one of them could be all that is held out
EVERY = 10  # steps between lines of progress


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shape = parser.add_argument_group("the model: sizes that FP8 takes are multiples of 16, those of NF4 of 64")
    shape.add_argument("--width", type=int, default=768)
    shape.add_argument("--layers", type=int, default=12)
    shape.add_argument("--heads", type=int, default=12)
    shape.add_argument("--kv-heads", type=int, default=4)
    shape.add_argument("--hidden", type=int, default=2560, help="width of the MLP")
    shape.add_argument("--vocabulary", type=int, default=8192)
    shape.add_argument("--seq", type=int, default=1024, help="tokens in a row")
    first = parser.add_argument_group("training from scratch")
    first.add_argument("--pretrain-seconds", type=float, default=60.0, help="counted from the end of the first step")
    first.add_argument("--pretrain-steps", type=int, default=None, help="so many steps instead")
    first.add_argument("--pretrain-rows", type=int, default=32, help="rows in a step")
    first.add_argument("--pretrain-lr", type=float, default=1e-3)
    first.add_argument("--pretrain-mb", type=float, default=100.0, help="most text to read, in 10^6 bytes")
    first.add_argument("--base", type=Path, default=ROOT / "build" / "fp8-study", help="made where it is not there")
    tune = parser.add_argument_group("LoRA")
    tune.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    tune.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    tune.add_argument("--steps", type=int, default=150)
    tune.add_argument("--rows", type=int, default=16, help="rows in a step")
    tune.add_argument("--lr", type=float, default=5e-4)
    tune.add_argument("--r", type=int, default=16, help="rank; alpha is the same")
    tune.add_argument("--heldout-rows", type=int, default=128)
    parser.add_argument("--run-id", default=None, help="names the lines; --table takes those of one run id")
    parser.add_argument("--out", type=Path, default=RESULTS, help="a .jsonl file to append to, or to read")
    parser.add_argument("--table", action="store_true", help="train nothing; print the means of the lines in --out")
    return parser.parse_args(argv)


def say(*what: object) -> None:
    print(*what, file=sys.stderr, flush=True)


# ------------------------------------------------------------ text


def texts(patterns: Sequence[str], skip: str | None = None) -> Iterator[str]:
    """Files of the folder where torch is installed, in an order that is drawn but fixed; none has a text twice.

    skip: a part of the paths to be left out.
    """
    folder = Path(torch.__file__).resolve().parents[1]
    paths = sorted(path.relative_to(folder).as_posix() for pattern in patterns for path in folder.rglob(pattern))
    random.Random(0).shuffle(paths)
    seen = set()
    for path in paths:
        if (skip is not None and skip in path) or not (folder / path).is_file():
            continue
        data = (folder / path).read_bytes()
        digest = hashlib.sha256(data).digest()
        if data and digest not in seen:
            seen.add(digest)
            yield data.decode("utf-8", errors="replace")


def python_texts(most: float) -> list[str]:
    """Python sources of at most about `most` bytes, one at least."""
    found, size = [], 0.0
    for text in texts(["*.py"]):
        if (size := size + len(text)) > most and found:
            break
        found.append(text)
    return found


def header_texts() -> Iterator[str]:
    """C and C++ headers, without the thousands that torch generates from one template, and without single giants."""
    found = texts(["*.h", "*.hpp", "*.cuh"], skip="torch/include/ATen/ops/")
    return (text for text in found if len(text) <= LONGEST_HEADER)


def digest_of(some: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(some).encode("utf-8", errors="replace")).hexdigest()


def encode(tokenizer: Any, some: Sequence[str]) -> np.ndarray:
    """The tokens of all texts, one after another, each with an end; uint16."""
    parts = []
    for start in range(0, len(some), 512):
        batch = tokenizer.encode_batch_fast(list(some[start : start + 512]), add_special_tokens=False)
        parts += [np.array([*one.ids, END], dtype=np.uint16) for one in batch]
    return np.concatenate(parts)


def rows_of(tokens: np.ndarray, length: int) -> Tensor:
    """[rows, length] int64; what is left over at the end is not used."""
    whole = len(tokens) // length
    return torch.from_numpy(tokens[: whole * length].astype(np.int64)).view(whole, length)


def new_tokenizer(some: Sequence[str], size: int) -> Any:
    """Byte-level BPE of at most `size` tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(some[::BPE_SHARE], trainer)
    return bpe


@dataclass(frozen=True)
class Headers:
    """Rows of C++ headers; none of a file that is in `heldout` is in `train`."""

    train: Tensor
    heldout: Tensor
    digest: str


def headers(tokenizer: Any, args: argparse.Namespace) -> Headers:
    """Raises SystemExit when there are too few."""
    some = list(header_texts())
    wanted, files, size = args.heldout_rows * args.seq, 0, 0
    while size < wanted and files < len(some):
        size += len(encode(tokenizer, some[files : files + 1]))
        files += 1
    heldout = rows_of(encode(tokenizer, some[:files]), args.seq)[: args.heldout_rows]
    train = rows_of(encode(tokenizer, some[files:]), args.seq) if files < len(some) else heldout[:0]
    need = args.steps * args.rows
    if len(train) < need:
        sys.exit(f"the headers make {len(train)} rows, not {need}: use fewer --steps, or smaller --rows or --seq")
    say(f"headers: {len(train)} rows of {args.seq} tokens to train on, {len(heldout)} held out, of {files} files")
    return Headers(train, heldout, digest_of(some))


# ------------------------------------------------------------ the model


def token_loss(model: Any, ids: Tensor) -> Tensor:
    """The mean loss of rows [B, S] in nats a token, differentiable, through whet's head."""
    from whet.models.head import LinearLogProbs

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = base.model(ids, use_cache=False).last_hidden_state.flatten(0, 1)
    where = torch.arange(ids.numel(), device=ids.device).view_as(ids)[:, :-1].flatten()
    need = torch.is_grad_enabled()
    head = base.lm_head.weight
    return -LinearLogProbs.apply(hidden, where, head, ids[:, 1:].flatten(), None, None, 1.0, need)[0].mean()


def load(folder: Path, args: argparse.Namespace, rows: int, **options: Any) -> Any:
    """In bf16, keeping everything for the backward pass, all rows of a step through a weight at once."""
    from whet import FastLanguageModel
    from whet.models import fused

    model, _ = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=args.seq, dtype=torch.bfloat16, use_gradient_checkpointing=False, **options
    )
    shared = fused.shared_of(model)
    if shared is None:
        raise NotFused("no layer of this model is a fused one")
    shared.tile = rows * args.seq
    return model.train()


# ------------------------------------------------------------ training


def rate(progress: float) -> float:
    """The share of the peak learning rate: up over the first twentieth, down a cosine to a tenth."""
    if progress < 0.05:
        return max(progress / 0.05, 0.01)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * min((progress - 0.05) / 0.95, 1.0)))


class Masters:
    """AdamW on fp32 copies of parameters that are held in fewer bits."""

    def __init__(self, parameters: Sequence[Tensor], **options: Any):
        self._parameters = list(parameters)
        self._masters = [p.detach().float().clone() for p in parameters]
        self._optimizer = torch.optim.AdamW(self._masters, fused=self._masters[0].is_cuda, **options)

    def step(self, lr: float) -> None:
        for parameter, master in zip(self._parameters, self._masters, strict=True):
            master.grad = parameter.grad.float()  # type: ignore[union-attr]
            parameter.grad = None
        torch.nn.utils.clip_grad_norm_(self._masters, 1.0)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(self._parameters, self._masters)


def pretrain(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Make the base model in `args.base`, unless it is there; returns what pretrain.json beside it says."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    asked = {name: getattr(args, name) for name in PRETRAINING}
    about = args.base / "pretrain.json"
    if about.is_file():
        there = dict(json.loads(about.read_text(encoding="utf-8")))
        if there["asked"] != asked:
            sys.exit(f"{args.base} was made with {there['asked']}, not {asked}: name another --base")
        return there
    some = python_texts(args.pretrain_mb * 1e6)
    bpe = new_tokenizer(some, args.vocabulary)
    rows = rows_of(encode(bpe, some), args.seq)
    if len(rows) < args.pretrain_rows:
        sys.exit(f"the Python sources make {len(rows)} rows, not {args.pretrain_rows}: use a larger --pretrain-mb")
    say(f"pretrain: {len(some)} files, {rows.numel() / 1e6:.1f}M tokens")
    config = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.width,
        intermediate_size=args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        max_position_embeddings=args.seq,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=END,
    )
    torch.manual_seed(0)
    args.base.mkdir(parents=True, exist_ok=True)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(args.base)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(args.base)
    model = load(args.base, args, args.pretrain_rows, full_finetuning=True)
    found = run_pretraining(model, rows.to(device), args, device)
    found |= {"asked": asked, "parameters": sum(p.numel() for p in model.parameters()), "text": digest_of(some)}
    model.save_pretrained(args.base)
    about.write_text(json.dumps(found), encoding="utf-8")
    return found


def run_pretraining(model: Any, rows: Tensor, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    masters = Masters(list(model.parameters()), lr=args.pretrain_lr, betas=(0.9, 0.95), weight_decay=0.1)
    draw = torch.Generator().manual_seed(0)
    order = torch.randperm(len(rows), generator=draw)
    place, step, progress = 0, 0, 0.0
    recent: list[Tensor] = []
    started = time.perf_counter()
    with counted() as passes:
        while progress < 1:
            if place + args.pretrain_rows > len(order):
                order, place = torch.randperm(len(rows), generator=draw), 0
            ids = rows[order[place : place + args.pretrain_rows].to(device)]
            place += args.pretrain_rows
            loss = token_loss(model, ids)
            loss.backward()
            masters.step(args.pretrain_lr * rate(progress))
            recent = [*recent[1 - EVERY :], loss.detach()]
            step += 1
            if step == 1:
                wait(device)  # kernels compile in the first step
                started = time.perf_counter()
            seconds = time.perf_counter() - started
            progress = step / args.pretrain_steps if args.pretrain_steps else seconds / args.pretrain_seconds
            if step % EVERY == 0 or progress >= 1:  # reading the loss also keeps the host from running ahead
                say(f"pretrain: step {step}, {seconds:.1f} s, loss {loss.item():.3f}")
    check(passes, model, step)
    wait(device)
    last = torch.stack(recent).mean().item()
    if not math.isfinite(last):
        sys.exit(f"pretraining ended with a loss of {last}: use a smaller --pretrain-lr")
    tokens = step * args.pretrain_rows * args.seq
    return {"steps": step, "tokens": tokens, "seconds": round(time.perf_counter() - started, 1), "loss": round(last, 4)}


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


# ------------------------------------------------------------ LoRA


def adapted(way: str, args: argparse.Namespace, device: torch.device) -> Any:
    """The base held in `way`, with an adapter."""
    from whet import FastLanguageModel
    from whet.models import fused

    options: dict[str, Any] = {"load_in_16bit": True} if way == "bf16" else {"load_in_4bit": True}
    if way == "nf4+fp8" and device.type == "cuda":
        options["compute"] = "fp8"
    model = load(args.base, args, args.rows, **options)
    model = FastLanguageModel.get_peft_model(model, r=args.r, lora_alpha=args.r, use_gradient_checkpointing=False)
    shared = fused.shared_of(model)
    shared.tile = args.rows * args.seq
    if way == "nf4+fp8":
        shared.fp8 = True  # on a CPU the public setting is refused
    return model.train()


def start_adapter(model: Any, seed: int) -> str:
    """Draw A as PEFT does and set B to zero, by `seed` alone; returns the SHA-256 of all of it."""
    digest, draw = hashlib.sha256(), torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            value = torch.zeros(parameter.shape)
            if "lora_A" in name:
                torch.nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=draw)
            parameter.data.copy_(value)
            digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


def heldout_loss(model: Any, rows: Tensor, args: argparse.Namespace, *, fp8: bool) -> float:
    """The mean loss in nats a token, the base multiplied by in FP8 or in bf16. Raises NotFused."""
    from whet.models import fused

    shared, total = fused.shared_of(model), 0.0
    before, shared.fp8 = shared.fp8, fp8
    batches = rows.split(args.rows)
    try:
        with torch.no_grad(), counted() as passes:
            for batch in batches:
                total += token_loss(model, batch).double() * len(batch)
    finally:
        shared.fp8 = before
    check(passes, model, len(batches), fp8=fp8)
    return float(total) / len(rows)


def tune(model: Any, batches: Tensor, args: argparse.Namespace, *, fp8: bool) -> list[float]:
    """Train the adapter on [steps, rows, length]; returns the loss of each step before its update."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0, fused=parameters[0].is_cuda)
    losses = []
    with counted() as passes:
        for step, ids in enumerate(batches):
            loss = token_loss(model, ids)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            for group in optimizer.param_groups:
                group["lr"] = args.lr * rate(step / len(batches))
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
    check(passes, model, len(batches), fp8=fp8)
    return [round(x, 5) for x in torch.stack(losses).tolist()]


def measure(model: Any, way: str, seed: int, text: Headers, args: argparse.Namespace, device: torch.device) -> Any:
    """The fields of one line. Raises NotFused where FP8 was asked for and makes no difference, or no layer ran so."""
    fp8 = way == "nf4+fp8"
    start = start_adapter(model, seed)
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(text.train), generator=draw)[: args.steps * args.rows]
    batches = text.train[order].view(args.steps, args.rows, args.seq).to(device)
    heldout = text.heldout.to(device)
    before = heldout_loss(model, heldout, args, fp8=fp8)
    if fp8 and before == heldout_loss(model, heldout, args, fp8=False):
        raise NotFused("the loss in FP8 is that in bf16, bit for bit")
    wait(device)
    started = time.perf_counter()
    losses = tune(model, batches, args, fp8=fp8)
    wait(device)
    seconds = time.perf_counter() - started
    after = heldout_loss(model, heldout, args, fp8=fp8)
    in_bf16 = heldout_loss(model, heldout, args, fp8=False) if fp8 else after
    if not math.isfinite(after):
        raise RuntimeError(f"{way}, seed {seed}: the held-out loss is {after}")
    rows = hashlib.sha256(order.numpy().tobytes()).hexdigest()
    return {
        "before": before,
        "after": after,
        "in_bf16": in_bf16,
        "losses": losses,
        "tune_s": round(seconds, 2),
        "start": start,
        "rows": rows,
    }


def results(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One line for each way and seed, as it is known. Raises NotFused."""
    from tokenizers import Tokenizer
    from transformers.utils import logging

    import whet

    logging.disable_progress_bar()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base = pretrain(args, device)
    text = headers(Tokenizer.from_file(str(args.base / "tokenizer.json")), args)
    where = origin()
    where["versions"]["whet"] = whet.__version__
    names = ("seq", "steps", "rows", "lr", "r", "heldout_rows")
    work = {"pretrain": base, "text": text.digest, **{name: getattr(args, name) for name in names}}
    for way in args.ways:
        model = adapted(way, args, device)
        for seed in args.seeds:
            found = measure(model, way, seed, text, args, device)
            yield {"kind": "fp8", "run_id": args.run_id, "way": way, "seed": seed, **found, "work": work, **where}
        del model
        gc.collect()
        torch.cuda.empty_cache()


# ------------------------------------------------------------ the table


def chosen(path: Path, run_id: str | None) -> list[dict[str, Any]]:
    """The lines of one run id, the file's last unless it is named. Raises SystemExit where they are not of one work."""
    try:
        lines = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        sys.exit(f"{path}: {error}")
    if not lines:
        sys.exit(f"{path} is empty")
    run_id = lines[-1]["run_id"] if run_id is None else run_id
    lines = [line for line in lines if line["run_id"] == run_id]
    if not lines:
        sys.exit(f"{path}: there is no line of run id {run_id!r}")
    ways = {line["way"]: sorted(x["seed"] for x in lines if x["way"] == line["way"]) for line in lines}
    seeds = ways.get("bf16")
    if seeds is None or any(found != seeds for found in ways.values()) or len(set(seeds)) != len(seeds):
        sys.exit(f"{path}: run id {run_id!r} needs each way once with every seed, bf16 among them; it has {ways}")
    same = {json.dumps([line["work"], line["hardware"], line["commit"]]) for line in lines}
    starts = {(line["seed"], line["start"], line["rows"]) for line in lines}
    if len(same) > 1 or len(starts) != len(seeds):
        sys.exit(f"{path}: the lines of run id {run_id!r} are not of one work on one machine")
    return lines


def table(lines: list[dict[str, Any]]) -> str:
    """Final held-out losses by way, mean over seeds (least to most), and each seed's distance from bf16 and NF4."""
    found = {way: {x["seed"]: x for x in lines if x["way"] == way} for way in WAYS}
    shown = [(way, way, "after") for way in WAYS if found[way]]
    if found["nf4+fp8"]:
        shown.append(("nf4+fp8, evaluated in bf16", "nf4+fp8", "in_bf16"))
    out = ["| way | before | held-out loss | against bf16 | against NF4 |", "|---|---|---|---|---|"]
    for name, way, part in shown:
        seeds = sorted(found[way])
        before = mean(found[way][seed]["before"] for seed in seeds)
        cells = [name, f"{before:.4f}", spread([found[way][seed][part] for seed in seeds], "{:.4f}")]
        for other in ("bf16", "nf4"):
            against = found[other]
            percent = [100 * (found[way][seed][part] / against[seed]["after"] - 1) for seed in seeds if against]
            cells.append(spread(percent, "{:+.3f}%") if percent and (way, part) != (other, "after") else "-")
        out.append(f"| {' | '.join(cells)} |")
    return "\n".join(out)


def spread(values: Sequence[float], form: str) -> str:
    return f"{form.format(mean(values))} ({form.format(min(values))} to {form.format(max(values))})"


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    if args.table:
        print(table(chosen(args.out, args.run_id)))
        return
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for line in results(args):
        say(f"{line['way']}, seed {line['seed']}: {line['before']:.4f} -> {line['after']:.4f} in {line['tune_s']} s")
        with open(args.out, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
