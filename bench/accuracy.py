"""How far bf16 training steps of whet and of transformers + PEFT lie from the same function in fp64, by model family.

    PYTHONPATH=src python bench/accuracy.py --run-id ID --out bench/results/accuracy.jsonl

The random models of tests/parity, larger, so that the GPU's fast matrix products and attention kernels are used. One
adapter (fp32, B random), full rows and packed documents, in bf16 on the GPU where there is one:

    whet      the fused block and whet's output head; refused where any layer of any batch ran without it
    plain     transformers + PEFT, whose adapters compute in fp32
    autocast  the same under autocast, as trainers run it: adapters compute in bf16
    exact     transformers + PEFT in fp64 on the same device, eager attention, from the same weights; of an NF4 base the
              values its bits stand for. torch's own operations alone, no kernel of whet's or of bitsandbytes'.
              transformers rounds norms, softmax, angles and its loss to fp32 even there: some 1e-7, TF32 is refused

An error is ||a - exact|| / ||exact|| over all batches together:

    loss        of the losses of rows, each the mean over its labelled tokens, as training sees it. The loss of one
                batch is one number, whose errors are of both signs and cancel as it grows: whichever program is nearer
                there is so by luck. The root mean square over many rows is not, and it still holds what the rows'
                tokens have in common. Forward passes alone, `loss_batches` of `loss_rows` rows
    token_loss  of every token's loss
    logits, gradients  of all real tokens; of all adapters

The last three are of `batches` forward and backward passes. `ratio` is whet's error to plain's, `spread` the least and
greatest of a single batch. What plain's loss rounds beyond its logits, in fp32, is left out, in its favour.
One JSON line for each family and base, printed and written as soon as it is known. Nothing is judged here.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from environment import ROOT, origin
from in_block import NotFused, check, counted
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils import logging

sys.path.insert(0, str(ROOT))

import whet
from tests.parity import harness
from tests.parity.families import ALTERNATING, FAMILIES, seeded, write_checkpoint
from whet import FastLanguageModel
from whet.kernels import attention as kernels
from whet.models import fused, head

RANK, ALPHA, SEED = 8, 16, 3407
BASES = ("bf16", "nf4")
PARTS = ("loss", "token_loss", "logits", "gradients")
WAYS = ("whet", "plain", "autocast")


@dataclass(frozen=True)
class Size:
    """The models and batches: widths, layers, tokens of a full row and of each packed row, window, batches; the rows
    whose losses are compared, in a batch, and such batches."""

    hidden: int = 512
    intermediate: int = 1408
    layers: int = 4
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 64
    vocabulary: int = 512
    length: int = 512
    window: int = 100
    batches: int = 4
    loss_rows: int = 128
    loss_batches: int = 4

    def __post_init__(self) -> None:
        if self.hidden % 64 or self.intermediate % 64 or self.heads * self.head_dim % 64:
            # bitsandbytes 0.50 dequantizes others wrongly on a CPU, by a quarter of the weight's norm
            raise ValueError("hidden, intermediate and heads x head_dim must be multiples of 64, a block of NF4")


class NotExact(RuntimeError):
    """The fp64 reference holds something that rounds more than it may."""


def measure(made: Path, family: str, base: str, size: Size, device: str) -> dict[str, Any]:
    """The errors of each way on the checkpoint `made`, their ratio, and which attention kernels whet's passes used."""
    models = {"plain": plain_model(made, family, base, device), "whet": whet_model(made, family, base)}
    models["exact"] = exact_model(made, family, models["plain"], device)
    check_exact(models["exact"])
    if base == "nf4":
        check_same_bits(models["whet"], models["plain"])
    randomise(models)
    errors = {way: Errors() for way in WAYS}
    passes = 2 * size.batches + size.loss_batches  # of whet's, once more for the logits
    with fused_only(models["whet"], passes) as backends:
        for batch in batches(size):
            compare(one_pass, models, to(batch, device), errors)
        for batch in loss_batches(size):
            compare(row_losses, models, to(batch, device), errors)
    totals = {way: found.total() for way, found in errors.items()}
    ratios = {part: errors["whet"].ratios(errors["plain"], part) for part in PARTS}
    return {
        **totals,
        "ratio": {part: totals["whet"][part] / totals["plain"][part] for part in PARTS},
        "spread": {part: [min(found), max(found)] for part, found in ratios.items()},
        "attention": dict(sorted(backends.items())),
    }


def compare(
    compute: Callable[[PeftModel, dict[str, Tensor]], dict[str, Tensor]],
    models: dict[str, PeftModel],
    batch: dict[str, Tensor],
    errors: dict[str, Errors],
) -> None:
    """Add what `compute` gives for each way to its errors."""
    exact = compute(models["exact"], batch)
    errors["whet"].add(compute(models["whet"], batch), exact)
    errors["plain"].add(compute(models["plain"], batch), exact)
    with torch.autocast(batch["input_ids"].device.type, dtype=torch.bfloat16):
        errors["autocast"].add(compute(models["plain"], batch), exact)


# ------------------------------------------------------------ models


def write(folder: Path, family: str, size: Size) -> Path:
    """The checkpoint of tests/parity in bf16 and at this size."""
    options: dict[str, Any] = {
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "vocab_size": size.vocabulary,
        "max_position_embeddings": 4 * size.length,
    }
    if family != "phi3":  # which works it out
        options["head_dim"] = size.head_dim
    if "sliding_window" in FAMILIES[family].options:
        options["sliding_window"] = size.window
    if "layer_types" in FAMILIES[family].options:
        options["layer_types"] = (ALTERNATING * size.layers)[: size.layers]
    return write_checkpoint(folder, family, torch.bfloat16, **options)


def whet_model(folder: Path, family: str, base: str) -> PeftModel:
    model, _ = FastLanguageModel.from_pretrained(str(folder), load_in_4bit=base == "nf4", dtype=torch.bfloat16)
    targets = FAMILIES[family].targets
    return FastLanguageModel.get_peft_model(model, r=RANK, lora_alpha=ALPHA, target_modules=targets).train()


def plain_model(folder: Path, family: str, base: str, device: str) -> PeftModel:
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.bfloat16,
        quantization_config=nf4 if base == "nf4" else None,
        device_map={"": 0 if device == "cuda" else "cpu"},
        attn_implementation=FAMILIES[family].plain_attention,
    )
    return get_peft_model(model, lora(family)).train()


def exact_model(folder: Path, family: str, plain: PeftModel, device: str) -> PeftModel:
    """In fp64. Layers that `plain` holds as NF4 get the values its bits stand for."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").to(device)
    for name, weight in nf4_weights(plain).items():
        layer = model.get_submodule(name)
        layer.weight.data.copy_(dequantized(weight).view_as(layer.weight))
    return get_peft_model(model, lora(family)).double().train()


def check_exact(model: PeftModel) -> None:
    """Every module torch's, transformers' or PEFT's as its class has it, weights in fp64, and no TF32 beside them."""
    for name, module in model.named_modules():
        origin_of = type(module).__module__.split(".")[0]
        if origin_of not in ("torch", "transformers", "peft") or "forward" in vars(module):
            raise NotExact(f"{name} of the reference is a {type(module).__name__} of {origin_of}, or has been changed")
    for name, parameter in model.named_parameters():
        if type(parameter) is not nn.Parameter or parameter.dtype != torch.float64:
            raise NotExact(f"{name} of the reference is a {type(parameter).__name__} in {parameter.dtype}")
    if model.config.get_text_config()._attn_implementation != "eager":
        raise NotExact(f"the reference's attention is {model.config._attn_implementation}, not eager")
    if torch.get_float32_matmul_precision() != "highest":
        raise NotExact("products in TF32 are on, and transformers' angles may be products in fp32")


def lora(family: str) -> LoraConfig:
    targets = list(FAMILIES[family].targets)
    return LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, task_type="CAUSAL_LM")


def nf4_weights(model: PeftModel) -> dict[str, Any]:
    """4-bit parameters by the name that their layer has without an adapter."""
    return {
        name.removesuffix(".base_layer"): module.weight
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, bnb.nn.Linear4bit)
    }


def dequantized(weight: Any) -> Tensor:
    """The values of double-quantized NF4 in fp64, [N, K], by indexing.

    What bf16 or a kernel rounds off is an error of the program that rounds, not of the weight. bitsandbytes keeps two
    values in a byte, the first in its high half, and a block's largest value as a byte into a second code.
    """
    state = weight.quant_state
    if state.quant_type != "nf4" or not state.nested:
        raise RuntimeError(f"expected double-quantized NF4, not {state.quant_type}")
    packed = weight.data.flatten()
    values = state.code.double()[torch.stack([packed >> 4, packed & 15], dim=1).flatten().long()]
    outer = state.state2
    absmax2 = outer.absmax.double().repeat_interleave(outer.blocksize)[: state.absmax.numel()]
    absmax = outer.code.double()[state.absmax.long()] * absmax2 + state.offset.double()
    found: Tensor = (values.view(-1, state.blocksize) * absmax[:, None]).view(state.shape)
    return found


def check_same_bits(ours: PeftModel, theirs: PeftModel) -> None:
    """Both must hold the same NF4 weights, or they are two functions."""
    a, b = nf4_weights(ours), nf4_weights(theirs)
    if not a or a.keys() != b.keys():
        raise RuntimeError("whet and transformers hold different layers in 4 bits")
    for name in a:
        if not torch.equal(dequantized(a[name]), dequantized(b[name])):
            raise RuntimeError(f"whet and transformers hold different 4-bit weights in {name}")


def randomise(models: dict[str, PeftModel]) -> None:
    """One adapter for all, held in fp32, B drawn as well: while it is zero, A has no gradient."""
    with seeded(SEED):
        for name, parameter in sorted(harness.adapter(models["whet"]).items()):
            nn.init.normal_(parameter, std=0.1 if "lora_B" in name else parameter.shape[1] ** -0.5)
    ours = harness.adapter(models["whet"])
    for model in models.values():
        theirs = harness.adapter(model)
        if theirs.keys() != ours.keys():
            raise RuntimeError("the models train different parameters")
        for name, parameter in theirs.items():
            parameter.data.copy_(ours[name].data)


# ------------------------------------------------------------ batches and passes


def batches(size: Size) -> Iterator[dict[str, Tensor]]:
    """Two full rows, then two rows' worth of packed documents of unequal lengths, and so on; each drawn anew."""
    for seed in range(size.batches):
        draw = torch.Generator().manual_seed(seed)
        lengths = [size.length] * 2 if seed % 2 == 0 else document_lengths(2 * size.length, draw)
        documents = [torch.randint(3, size.vocabulary, (length,), generator=draw) for length in lengths]
        yield harness.padded(documents) if seed % 2 == 0 else harness.packed(documents)


def document_lengths(total: int, draw: torch.Generator) -> list[int]:
    """At least two lengths that fill `total`, from three tokens to half of it."""
    lengths: list[int] = []
    while (left := total - sum(lengths)) > 0:
        length = int(torch.randint(3, total // 2 + 1, (1,), generator=draw))
        lengths.append(length if left - length >= 3 else left)
    return lengths


def loss_batches(size: Size) -> Iterator[dict[str, Tensor]]:
    """Full rows, other ones than in `batches`."""
    for seed in range(size.batches, size.batches + size.loss_batches):
        draw = torch.Generator().manual_seed(seed)
        rows = torch.randint(3, size.vocabulary, (size.loss_rows, size.length), generator=draw)
        yield harness.padded(list(rows))


def to(batch: dict[str, Tensor], device: str) -> dict[str, Tensor]:
    return {name: x.to(device) for name, x in batch.items()}


def one_pass(model: PeftModel, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Forward and backward: token_loss, logits and gradients, each a vector in fp64."""
    if fused.shared_of(model) is None:
        found = harness.run(model, batch)
        logits, token_loss = found.logits, token_losses(found.logits.double(), batch)
        gradients, loss = found.gradients, found.loss
    else:
        with torch.no_grad():
            logits = model(**batch, use_cache=False).logits[real(batch)]
        model.zero_grad()
        out = whet_head(model, batch)
        out.loss.backward()
        gradients = {name: p.grad for name, p in harness.adapter(model).items() if p.grad is not None}
        loss = out.loss.detach()
        token_loss = -out.log_probs.detach()[out.label_mask].double()
    check_mean(loss, token_loss)
    joined = torch.cat([gradients[name].double().flatten() for name in sorted(gradients)])
    return {"token_loss": token_loss, "logits": logits.double().flatten(), "gradients": joined}


@torch.no_grad()
def row_losses(model: PeftModel, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Forward alone: the loss of each row, in fp64. All rows must have as many labels."""
    if fused.shared_of(model) is None:
        out = model(**batch, use_cache=False)
        token_loss = token_losses(out.logits[real(batch)].double(), batch)
    else:
        out = whet_head(model, batch)
        token_loss = -out.log_probs[out.label_mask].double()
    check_mean(out.loss, token_loss)
    return {"loss": token_loss.view(len(batch["labels"]), -1).mean(1)}


def whet_head(model: PeftModel, batch: dict[str, Tensor]) -> Any:
    """Of whet's output head, as its trainer calls it: loss, and log_probs where label_mask is set."""
    base = model.get_base_model()
    reason = head._reason_for_trl_s(base, {})
    if reason is not None:
        raise NotFused(f"whet's head does not compute this loss: {reason}")
    return head._forward(base, **batch)


def real(batch: dict[str, Tensor]) -> Tensor:
    """Where there is no padding."""
    return batch.get("attention_mask", torch.ones_like(batch["labels"])).bool()


def token_losses(logits_NV: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Of every labelled token, in order. A document's first token carries no label, so rows may be joined."""
    labels = batch["labels"][real(batch)][1:]
    return nn.functional.cross_entropy(logits_NV[:-1], labels, reduction="none")[labels != harness.IGNORED]


def check_mean(loss: Tensor, token_loss: Tensor) -> None:
    """The losses that are compared must be those that the model itself averages."""
    if not torch.isclose(loss.double(), token_loss.mean(), rtol=1e-5, atol=0):
        raise RuntimeError(f"the model's loss is {loss.item()}, the mean of the tokens' is {token_loss.mean().item()}")


class Errors:
    """Sums of squares, batch by batch: of the distance from the exact result, and of the exact result."""

    def __init__(self) -> None:
        self._squares: dict[str, list[tuple[float, float]]] = {part: [] for part in PARTS}

    def add(self, found: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
        for part, b in exact.items():
            self._squares[part].append(((found[part] - b).square().sum().item(), b.square().sum().item()))

    def total(self) -> dict[str, float]:
        """||a - exact|| / ||exact|| by part, all batches stacked."""
        return {
            part: (sum(distance for distance, _ in squares) / sum(norm for _, norm in squares)) ** 0.5
            for part, squares in self._squares.items()
        }

    def ratios(self, other: Errors, part: str) -> list[float]:
        """This distance as a multiple of the other's, batch by batch."""
        pairs = zip(self._squares[part], other._squares[part], strict=True)
        return [(a / b) ** 0.5 for (a, _), (b, _) in pairs]


@contextmanager
def fused_only(model: PeftModel, passes: int) -> Iterator[Counter[str]]:
    """Gives a count of the attention kernels used within. Raises NotFused unless each layer was fused in each pass."""
    used: Counter[str] = Counter()
    backend = kernels._backend

    def counted_backend(*args: Any) -> str:
        used[backend(*args)] += 1
        return backend(*args)

    kernels._backend = counted_backend
    try:
        with counted() as ran:
            yield used
    finally:
        kernels._backend = backend
    check(ran, model, passes)


# ------------------------------------------------------------ what is shown and written


def table(line: dict[str, Any]) -> str:
    """One row of the printed table."""
    cells = [f"{line['family']:8} {line['base']:5}"]
    for part in PARTS:
        values = " ".join(f"{line[way][part]:.2e}" for way in WAYS)
        low, high = line["spread"][part]
        cells.append(f"{values} {line['ratio'][part]:5.2f} ({low:.2f} to {high:.2f})")
    return " | ".join(cells) + f" | {line['attention']}"


HEADER = " | ".join(["family   base ", *(f"{part}: whet plain autocast, whet/plain" for part in PARTS), "attention"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="+", default=list(FAMILIES), choices=list(FAMILIES), metavar="FAMILY")
    parser.add_argument("--base", nargs="+", default=list(BASES), choices=BASES)
    parser.add_argument("--run-id", default=None)
    parser.add_argument("--out", type=Path, default=None, help="a .jsonl file to append the lines to")
    for name, value in asdict(Size()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    args = parser.parse_args()
    try:
        size = Size(**{name: getattr(args, name) for name in asdict(Size())})
    except ValueError as error:
        parser.error(str(error))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = origin()
    where["versions"]["whet"] = whet.__version__
    logging.disable_progress_bar()
    print(HEADER, flush=True)
    for family in args.family:
        with tempfile.TemporaryDirectory() as folder:
            made = write(Path(folder), family, size)
            for base in args.base:
                started = time.perf_counter()
                about = {"kind": "accuracy", "run_id": args.run_id, "family": family, "base": base}
                line = about | measure(made, family, base, size, device) | {"size": asdict(size), "r": RANK, **where}
                print(table(line), f"| {time.perf_counter() - started:.1f} s", flush=True)
                if args.out is not None:
                    args.out.parent.mkdir(parents=True, exist_ok=True)
                    with open(args.out, "a", encoding="utf-8") as file:
                        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
