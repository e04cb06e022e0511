"""QLoRA on real text, step by step: whet beside transformers + PEFT, and transformers + PEFT beside itself.

    PYTHONPATH=src python bench/curve.py --run-id ID            -> bench/results/curve.jsonl
    python bench/curve.py --plot --run-id ID                    -> bench/curve.png

The text is the machine's own torch/nn/**/*.py. Every run sees the same rows in the same order, from the same base, with
AdamW in fp32. The runs:

    whet      the fused block and whet's head; refused where a layer ran without the block
    hf        transformers + PEFT, starting from the same adapter
    hf-again  the same once more, on a GPU, whose sums are not always in one order
    hf-seed   the same from another random adapter: how far two right runs lie apart

One JSON line a run.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "curve.jsonl"
SEED, OTHER_SEED = 3407, 1
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RUNS = ("whet", "hf", "hf-again", "hf-seed")
SMOOTH = 10  # steps in the mean that is drawn over the differences


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="builtin:tiny", help="builtin:tiny, a folder, or a random shape: 8b, 1b, tiny"
    )
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=None, help="by default all that say something here")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--bs", type=int, default=4, help="rows in a step")
    parser.add_argument("--seq", type=int, default=512, help="tokens in a row")
    parser.add_argument("--bits", type=int, default=4, choices=[4, 16])
    parser.add_argument("--r", type=int, default=16, help="LoRA's rank; alpha is the same")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--run-id", default=None, help="names the lines; --plot takes those of one run id")
    parser.add_argument("--out", type=Path, default=RESULTS, help="a .jsonl file to append to, or to plot")
    parser.add_argument("--models", type=Path, default=ROOT / "build" / "bench-models", help="where shapes are made")
    parser.add_argument("--plot", action="store_true", help="train nothing; draw the lines in --out")
    parser.add_argument("--picture", type=Path, default=ROOT / "bench" / "curve.png")
    return parser.parse_args()


# ------------------------------------------------------------ text


def sources() -> list[Path]:
    """torch/nn's own Python files, sorted by their path."""
    import torch

    folder = Path(torch.__file__).parent / "nn"
    return sorted(folder.rglob("*.py"), key=lambda path: path.relative_to(folder).as_posix())


def rows(tokenizer: Any, count: int, length: int) -> tuple[Any, str]:
    """`count` rows [count, length] of the text, in an order that is drawn but fixed, and the text's SHA-256.

    Raises SystemExit when the text is too short.
    """
    import torch

    texts = [path.read_text(encoding="utf-8") for path in sources()]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = [i for text in texts for i in [*tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], *end]]
    whole = len(ids) // length
    if whole < count:
        sys.exit(
            f"the text has {whole} rows of {length} tokens, not {count}: use fewer --steps, or smaller --bs or --seq"
        )
    order = torch.randperm(whole, generator=torch.Generator().manual_seed(0))[:count]
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    return torch.tensor(ids[: whole * length]).view(whole, length)[order], digest


# ------------------------------------------------------------ models


def load(run: str, folder: str, args: argparse.Namespace) -> Any:
    """The base with a LoRA adapter in fp32, for one of RUNS."""
    import torch

    cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if cuda else torch.float32
    return load_whet(folder, args, dtype) if run == "whet" else load_hf(run, folder, args, dtype, cuda)


def load_whet(folder: str, args: argparse.Namespace, dtype: Any) -> Any:
    from types import MethodType

    from whet import FastLanguageModel
    from whet.models.head import use_fused_head

    model, _ = FastLanguageModel.from_pretrained(
        folder, max_seq_length=args.seq, load_in_4bit=args.bits == 4, dtype=dtype, random_state=SEED
    )
    model = FastLanguageModel.get_peft_model(
        model, r=args.r, lora_alpha=args.r, target_modules=TARGETS, random_state=SEED
    )
    base = model.get_base_model()
    base.forward = MethodType(type(base).forward, base)  # as TRL's trainer leaves it; the head goes in front
    use_fused_head(base)
    return model.train()


def load_hf(run: str, folder: str, args: argparse.Namespace, dtype: Any, cuda: bool) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        quantization_config=nf4 if args.bits == 4 else None,
        device_map={"": 0 if cuda else "cpu"},
        attn_implementation="sdpa",
    )
    torch.manual_seed(OTHER_SEED if run == "hf-seed" else SEED)
    lora = LoraConfig(r=args.r, lora_alpha=args.r, target_modules=TARGETS, task_type="CAUSAL_LM")
    return get_peft_model(model, lora).train()


# ------------------------------------------------------------ training


def adapter_digest(model: Any) -> str:
    """SHA-256 of the adapter's weights: equal digests are equal starts."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            digest.update(name.encode())
            digest.update(parameter.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def train(run: str, model: Any, batches: Any, lr: float) -> list[float]:
    """The loss of each step, in nats a token, before its update."""
    import torch

    parameters = [p for p in model.parameters() if p.requires_grad]
    if any(p.dtype != torch.float32 for p in parameters):
        raise RuntimeError(f"{run} holds its adapter in {parameters[0].dtype}, not in fp32")
    device = parameters[0].device
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    options = {"fused_lm_head": True} if run == "whet" else {}
    losses = []
    for step, ids in enumerate(batches):
        ids = ids.to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            out = model(input_ids=ids, labels=ids, use_cache=False, **options)
        if run == "whet" and getattr(out, "log_probs", None) is None:
            raise RuntimeError("whet's head does not know this model")
        loss = out.loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(round(loss.item(), 8))
        if step % 20 == 0 or step == len(batches) - 1:
            print(f"{run}: step {step + 1} of {len(batches)}, loss {losses[-1]:.4f}", file=sys.stderr, flush=True)
    return losses


def results(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One line for each run, as it ends.

    Raises NotFused, or RuntimeError where whet and hf would not start from one adapter.
    """
    import torch
    from accuracy import fused_only
    from checkpoint import SHAPES, checkpoint
    from environment import origin
    from transformers import AutoTokenizer
    from transformers.utils import logging

    import whet
    from whet.models.load import resolve

    logging.disable_progress_bar()
    shape = args.model in SHAPES
    folder = str(checkpoint(args.model, args.models / args.model)) if shape else resolve(args.model)
    ids, digest = rows(AutoTokenizer.from_pretrained(folder), args.steps * args.bs, args.seq)
    batches = ids.view(args.steps, args.bs, args.seq)
    where = origin()
    where["versions"]["whet"] = whet.__version__
    starts: dict[str, str] = {}
    names = ("steps", "bs", "seq", "bits", "r", "lr")
    for run in args.runs or [name for name in RUNS if name != "hf-again" or torch.cuda.is_available()]:
        model = load(run, folder, args)
        starts[run] = adapter_digest(model)
        if "whet" in starts and "hf" in starts and starts["whet"] != starts["hf"]:
            raise RuntimeError("whet and hf do not start from the same adapter")
        if run == "whet":
            with fused_only(model, passes=args.steps):
                losses = train(run, model, batches, args.lr)
        else:
            losses = train(run, model, batches, args.lr)
        work = {"model": Path(args.model).name, **{name: getattr(args, name) for name in names}}
        about = {"kind": "curve", "run_id": args.run_id, "run": run, "work": work, "text": digest, "start": starts[run]}
        yield {**about, "losses": losses, **where}
        del model
        gc.collect()
        torch.cuda.empty_cache()


# ------------------------------------------------------------ the picture


def chosen(path: Path, run_id: str | None) -> dict[str, dict[str, Any]]:
    """The lines of one run id (the file's last, unless it is named) by run. Raises SystemExit for a mixed choice."""
    try:
        lines = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        sys.exit(f"{path}: {error}")
    lines = [line for line in lines if line["kind"] == "curve"]
    if not lines:
        sys.exit(f"{path}: there is no line of kind curve")
    if run_id is None:
        run_id = lines[-1]["run_id"]
    lines = [line for line in lines if line["run_id"] == run_id]
    found = {line["run"]: line for line in lines}
    if "hf" not in found:
        sys.exit(f"{path}: run id {run_id!r} has no run hf, which the others are set against")
    same = ("work", "text", "hardware")
    if len(found) < len(lines) or len({json.dumps([line[name] for name in same]) for line in lines}) > 1:
        sys.exit(
            f"{path}: run id {run_id!r} holds several measurements, or not all of the same work on the same hardware"
        )
    return found


def differences(found: dict[str, dict[str, Any]]) -> dict[str, list[float]]:
    """Each run's losses less those of hf."""
    plain = found["hf"]["losses"]
    return {
        run: [a - b for a, b in zip(line["losses"], plain, strict=True)] for run, line in found.items() if run != "hf"
    }


def summary(found: dict[str, dict[str, Any]]) -> str:
    """The mean and the largest distance from hf by run, and the mean loss of the last tenth."""
    lines = []
    apart = differences(found)
    for run, line in found.items():
        tail = line["losses"][-max(1, len(line["losses"]) // 10) :]
        text = f"{run:9} mean loss of the last {len(tail)} steps {sum(tail) / len(tail):.5f}"
        if run in apart:
            sizes = [abs(x) for x in apart[run]]
            mean = sum(apart[run]) / len(sizes)
            text += f"; less hf: mean {mean:+.1e}, mean size {sum(sizes) / len(sizes):.1e}, largest {max(sizes):.1e}"
        lines.append(text)
    return "\n".join(lines)


def plot(found: dict[str, dict[str, Any]], path: Path) -> None:
    """Losses of all runs, and below what each lies off hf: step by step, thin, and their running mean."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        sys.exit('plots need matplotlib: pip install "whet[plots]"')

    # Okabe and Ito's colours, told apart by the colour-blind; dashes for those who print in grey.
    styles = {
        "hf": ("transformers + PEFT", "black", "-"),
        "whet": ("whet", "#D55E00", (0, (4, 3))),
        "hf-again": ("transformers + PEFT, run again", "#009E73", (0, (1, 1.5))),
        "hf-seed": ("transformers + PEFT, another random adapter", "#0072B2", (0, (6, 2, 1, 2))),
    }
    figure = Figure(figsize=(9, 7), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    order = [run for run in styles if run in found]
    for run in order:
        label, colour, dashes = styles[run]
        width = 2.2 if run == "hf" else 1.4
        losses = found[run]["losses"]
        above.plot(range(1, len(losses) + 1), losses, label=label, color=colour, linestyle=dashes, linewidth=width)
    apart = differences(found)
    below.axhline(0, color="black", linewidth=1)
    for run in reversed([name for name in order if name in apart]):  # whet on top
        _, colour, _ = styles[run]
        steps = range(1, len(apart[run]) + 1)
        below.plot(steps, apart[run], color=colour, linewidth=0.8, alpha=0.45)
        label = styles[run][0].rpartition(", ")[2]
        below.plot(steps, smooth(apart[run]), color=colour, linewidth=2, label=label)
    line = found["hf"]
    work = line["work"]
    kind = f"{'QLoRA' if work['bits'] == 4 else 'LoRA'} r={work['r']}"
    title = f"{work['model']}, {kind}, {work['bs']}x{work['seq']} tokens of Python source a step, AdamW {work['lr']:g}"
    versions = ", ".join(f"{name} {line['versions'][name]}" for name in ("torch", "transformers", "peft"))
    above.set_title(f"{title}\n{line['hardware']}; {versions}; {line['date'][:10]}", fontsize=10)
    above.set_ylabel("loss, nats a token")
    below.set_ylabel("less transformers + PEFT")
    below.set_xlabel("step")
    for axes in (above, below):
        axes.grid(alpha=0.25)
    above.legend(fontsize=9)
    below.set_title(f"thick: mean of {SMOOTH} steps", fontsize=9, loc="right")
    below.legend(fontsize=9, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, borderaxespad=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Software": None})


def smooth(values: list[float], width: int = SMOOTH) -> list[float]:
    """The mean of the last `width` values, fewer at the start."""
    windows = [values[max(0, i + 1 - width) : i + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def main() -> None:
    args = arguments()
    if args.plot:
        found = chosen(args.out, args.run_id)
        print(summary(found))
        plot(found, args.picture)
        return
    found = {}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for line in results(args):
        found[line["run"]] = line
        with open(args.out, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    if "hf" in found:
        print(summary(found))


if __name__ == "__main__":
    main()
