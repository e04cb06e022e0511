"""Make the tables of README.md, bench/*.md and docs/*.md out of bench/results/*.jsonl.

    python bench/table.py            write them
    python bench/table.py --check    exit 1 where a file differs from what its results say

A table stands between `<!-- bench:NAME -->` and `<!-- /bench:NAME -->` and shows bench/results/NAME.jsonl, every line.
Engines are set against each other only within one run id, on one piece of hardware, at the same work.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from timeline import CATEGORIES

Line = dict[str, Any]
MARKERS = re.compile(r"<!-- bench:(?P<name>[\w-]+) -->\n.*?<!-- /bench:(?P=name) -->", re.DOTALL)
OPENING = re.compile(r"<!-- bench:[\w-]+ -->")
BASELINE = "hf"  # what the others are set against
OWN = {"packing": None, "gpu_memory": None, "compute": None}  # an engine's own ways through the same rows
NAMED = ("torch", "transformers", "trl", "peft", "bitsandbytes", "presidio-analyzer", "ftfy", "rensa", "datasketch")


def read(path: Path) -> list[Line]:
    """The results in a file. Raises ValueError naming the line that is not JSON."""
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            lines.append(json.loads(text))
        except ValueError as error:
            raise ValueError(f"{path.name}:{number}: {error}") from None
    return lines


def render(lines: list[Line]) -> str:
    """A Markdown table of results, all of one kind."""
    kinds = {line["kind"] for line in lines}
    if len(kinds) != 1:
        raise ValueError(f"one table holds one kind of result, not {', '.join(sorted(kinds)) or 'none'}")
    columns, row = KINDS[kinds.pop()]
    shown = [(line, cells) for line in lines if (cells := row(line, lines))]
    rows = [cells for _, cells in shown]
    caption = ""
    together = versions_together([line for line, _ in shown])
    origins = {tuple(where(line | {"versions": together or line["versions"]})) for line, _ in shown}
    if len(origins) == 1:  # said once, under the table
        caption = f"\n\n{'; '.join(origins.pop())}."
        columns, rows = columns[: -len(ORIGIN)], [cells[: -len(ORIGIN)] for cells in rows]
    table = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in table) + caption


def versions_together(lines: list[Line]) -> dict[str, str] | None:
    """Of every library that a line has; None where two lines have two versions of one."""
    found: dict[str, str] = {}
    for line in lines:
        if any(found.get(name, version) != version for name, version in line["versions"].items()):
            return None
        found |= line["versions"]
    return found


def finetune_row(line: Line, lines: list[Line]) -> list[str]:
    peak = line["peak_allocated_gib"]
    return [
        work(line["work"]),
        engine(line),
        f"{line['real_tok_s']:,.0f}",
        against_baseline(line, lines),
        f"{line['step_s']['median']:.3g} ({line['step_s']['min']:.3g} to {line['step_s']['max']:.3g})",
        f"{line['peak_host_gib']:.2f} (host)" if peak is None else f"{peak:.2f}",
        f"{line['load_s']:.1f}",
        f"{line['first_steps_s'][0]:.1f}" if line["first_steps_s"] else "-",
        *where(line),
    ]


def engine(line: Line) -> str:
    """Its name, with the extra that it ran with."""
    return "whet[flash4]" if with_flash4(line) else line["engine"]


def with_flash4(line: Line) -> bool:
    """Whether whet had its extra; beside a peer, FlashAttention 4 merely lies there."""
    return line["engine"] == "whet" and "flash-attn-4" in line["versions"]


def work(work: Line) -> str:
    """What was done, in words: the model, what trains, rows, recomputation."""
    trained = "full" if work["full"] else f"{'QLoRA' if work['bits'] == 4 else 'LoRA'} r={work['r']}"
    rows = f"{work['bs']}x{work['ga']} rows of {'up to ' if work['mixed'] else ''}{work['seq']}"
    recompute = {"on": "least memory", "true": "recomputing", "off": "keeping all"}[work["gc"]]
    if work.get("gpu_memory"):
        recompute = f"within {work['gpu_memory']} GiB"
    fp8 = ["fp8"] if work.get("compute") == "fp8" else []
    return ", ".join([work["model"], trained, rows + (" packed" if work["packing"] else ""), recompute, *fp8])


def against_baseline(line: Line, lines: list[Line]) -> str:
    """Tokens a second as a multiple of the baseline's, or a dash where no baseline may be compared."""
    same = [
        other
        for other in lines
        if other["engine"] == BASELINE
        and line["run_id"] is not None
        and (other["run_id"], other["hardware"]) == (line["run_id"], line["hardware"])
        and {**other["work"], **OWN} == {**line["work"], **OWN}
    ]
    return f"{line['real_tok_s'] / same[0]['real_tok_s']:.2f}x" if len(same) == 1 else "-"


def quickstart_row(line: Line, lines: list[Line]) -> list[str]:
    base, tuned = line["base"], line["tuned"]
    return [
        f"{base['exact match']:.1%} -> {tuned['exact match']:.1%}",
        f"{base['loss']:.2f} -> {tuned['loss']:.2f}",
        f"{line['commonest']:.1%}",
        *(f"{line['agreement'][name]:.1%}" for name in ("q8_0", "q4_k_m")),
        f"{line['questions']}",
        f"{line['minutes']:.1f}",
        *where(line),
    ]


def quantize_row(line: Line, lines: list[Line]) -> list[str]:
    """A format on the CPU, beside llama.cpp's quantizer; other lines are of other work."""
    if "llama_cpp" not in line:
        return []
    errors = [f"{line[name]:.4f}" if name in line else "-" for name in ("rmse", "llama_cpp_rmse")]
    return [line["what"], *errors, f"{line['times_llama_cpp']:.2f}x", *where(line)]


def proof_row(line: Line, lines: list[Line]) -> list[str]:
    def share(name: str) -> str:
        return "-" if line[name] is None else f"{line[name]:.3f}"

    return [
        line["format"],
        line["engine"].partition(" ")[0],
        f"{line['kl']:.2g} (base: {line['base_kl']:.2g})",
        f"{line['tail']:.2g}",
        f"{line['top1']:.1%}",
        share("share"),
        share("share_at_half"),
        *where(line),
    ]


def imatrix_row(line: Line, lines: list[Line]) -> list[str]:
    both = [f"{line[f'{name}_plain']:.3g} -> {line[f'{name}_guided']:.3g}" for name in ("kl", "tail")]
    same = f"{line['top_1_plain']:.1%} -> {line['top_1_guided']:.1%}"
    return [line["quantization"], *both, same, f"{line['tokens']:,}", *where(line)]


def gguf_tokenizers_row(line: Line, lines: list[Line]) -> list[str]:
    counts = (f"{line[name]:,}" for name in ("alone", "untold", "served", "again"))
    return [line["family"], *counts, *where(line)]


def merge_row(line: Line, lines: list[Line]) -> list[str]:
    return [
        line["to"],
        f"{line['parameters'] / 1e9:.1f}",
        f"{line['peak_bytes'] / 2**30:.2f}",
        f"{line['imported_bytes'] / 2**30:.2f}",
        f"{line['written_bytes'] / 1e9:.1f}",
        f"{line['cpu_seconds']:.0f}",
        *where(line),
    ]


def serve_row(line: Line, lines: list[Line]) -> list[str]:
    """A server under the load of all others; lines of whet alone stand in another table."""
    if line["what"] != "throughput":
        return []
    seconds = [f"{line[key]['p50']:.2f}, {line[key]['p99']:.2f}" for key in ("first_piece", "whole_answer")]
    return [line["server"], str(line["clients"]), f"{line['tokens_a_second']:,.0f}", *seconds, *where(line)]


def engine_row(line: Line, lines: list[Line]) -> list[str]:
    asked = f"{line['model']}, {line['requests']} requests, {line['prompt_tokens']:,} + {line['tokens']:,} tokens"
    seconds = f"{min(line['seconds']):.1f} to {max(line['seconds']):.1f}"
    return [asked, line["engine"], f"{line['tokens_a_second']:,.0f}", seconds, *where(line)]


def gguf_logits_row(line: Line, lines: list[Line]) -> list[str]:
    return [
        line["family"],
        str(len(line["cases"])),
        f"{line['max_difference']:.1e}",
        f"{line['spread']:.2g}",
        f"{line['kl']:.1e}",
        f"{line['top_1']:.2%}",
        *where(line),
    ]


def parity_row(line: Line, lines: list[Line]) -> list[str]:
    def cell(part: str) -> str:
        peer = line.get("plain")
        return f"{line['whet'][part]:.1e}" + (f" (plain: {peer[part]:.1e})" if peer else "")

    return [line["family"], line["base"], line["against"], *map(cell, ("loss", "logits", "gradients")), *where(line)]


def kernels_row(line: Line, lines: list[Line]) -> list[str]:
    name = [line["kernel"], line["shape"], "-" if line["tokens"] is None else f"{line['tokens']:,}"]
    rates = [f"{line['copy_tb_s']:.2f}", f"{line['gemm_tflop_s']:.0f}"]
    if line["error"] is not None:  # a cell holds neither a line's end nor a bar
        return [
            *name,
            "-",
            "-",
            "-",
            f"failed: {' '.join(line['error'].split())}".replace("|", "/"),
            "-",
            *rates,
            *where(line),
        ]
    measured = [f"{line[us]:,.1f}" for us in ("bound_us", "measured_us")]
    return [
        *name,
        f"{line['bytes'] / 1e6:,.1f}",
        f"{line['flops'] / 1e9:,.1f}",
        *measured,
        f"{line['ratio']:.2f}",
        *rates,
        *where(line),
    ]


def accuracy_row(line: Line, lines: list[Line]) -> list[str]:
    def cell(part: str) -> str:
        errors = " / ".join(f"{line[way][part]:.1e}" for way in ("whet", "plain", "autocast"))
        return f"{errors}; {line['ratio'][part]:.2f}x"

    return [line["family"], line["base"], *map(cell, ("loss", "logits", "gradients")), *where(line)]


def fp8_row(line: Line, lines: list[Line]) -> list[str]:
    def against(way: str) -> str:
        same = [x for x in lines if x["way"] == way and all(x[k] == line[k] for k in ("run_id", "seed", "work"))]
        return f"{100 * (line['after'] / same[0]['after'] - 1):+.3f}%" if len(same) == 1 and way != line["way"] else "-"

    losses = [f"{line[name]:.4f}" for name in ("before", "after", "in_bf16")]
    return [line["way"], f"{line['seed']}", *losses, against("bf16"), against("nf4"), *where(line)]


def redaction_row(line: Line, lines: list[Line]) -> list[str]:
    """A class: whet's figures, and Presidio's beside them."""
    if line["engine"] != "whet":
        return []
    ours = [share(line[name]) for name in ("recall", "precision")]
    other = [
        o for o in lines if (o["engine"], o["entity"], o["run_id"]) == ("presidio", line["entity"], line["run_id"])
    ]
    theirs = [share(other[0][name]) if other else "-" for name in ("recall", "precision")]
    found_by = "form" if line["patterned"] else "context"
    return [line["entity"], found_by, f"{line['labels']:,}", *ours, *theirs, *where(line)]


def share(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def redaction_speed_row(line: Line, lines: list[Line]) -> list[str]:
    return [line["engine"], str(line["characters"]), f"{line['documents_s']:,.0f}", *where(line)]


def data_prep_row(line: Line, lines: list[Line]) -> list[str]:
    return [
        line["engine"],
        str(line["workers"]),
        f"{line['rows']:,}",
        f"{line['seconds']:,.0f}",
        f"{line['rows_s']:,}",
        f"{line['memory_gib']:.2f}",
        *where(line),
    ]


def overhead_row(line: Line, lines: list[Line]) -> list[str]:
    work = f"{line['model']}, {line['load']}, {line['rows']} rows of {line['seq']}"
    times = [f"{line[name]:,.2f}" for name in ("off_ms", "on_ms")]
    return [work, str(line["steps"]), *times, f"{line['added']:+.2%}", *where(line)]


def data_steps_row(line: Line, lines: list[Line]) -> list[str]:
    return [line["step"], line["engine"], f"{line['rows']:,}", f"{line['us_row']:.1f}", *where(line)]


def trace_row(line: Line, lines: list[Line]) -> list[str]:
    shares = [f"{line['ms'][name]:,.1f}" for name in CATEGORIES]
    steps = [f"{line[name]:,.1f}" for name in ("timed_ms", "wall_ms")]
    return [work(line["work"]), engine(line), *steps, *shares, f"{line['launches']:,}", *where(line)]


def where(line: Line) -> list[str]:
    """Hardware, versions (with whet's commit) and date."""
    versions = [f"{name} {line['versions'][name]}" for name in NAMED if name in line["versions"]]
    for name in ("flash-attn-4", "whet", "liger-kernel", "unsloth"):
        if name in line["versions"]:
            versions.insert(0, f"{name} {line['versions'][name]}")
    if line["commit"]:
        versions.append(f"commit {line['commit'][:10]}{' with changes' if line['dirty'] else ''}")
    return [line["hardware"], ", ".join(versions), line["date"][:10]]


Row = Callable[[Line, list[Line]], list[str]]
ORIGIN = ["hardware", "versions", "date"]
KINDS: dict[str, tuple[list[str], Row]] = {
    "finetune": (
        [
            "work",
            "engine",
            "tokens/s",
            f"against {BASELINE}",
            "s a step (least to most)",
            "peak GiB",
            "load s",
            "first step s",
            *ORIGIN,
        ],
        finetune_row,
    ),
    "gguf_tokenizers": (
        [
            "tokenizer",
            "other tokens in llama.cpp alone",
            "of those whet does not tell of",
            "other tokens through whet",
            "other text again",
            *ORIGIN,
        ],
        gguf_tokenizers_row,
    ),
    "quickstart": (
        [
            "answers right: base -> tuned",
            "loss (nats a token)",
            "right by always naming the commonest",
            "llama.cpp says the same: q8_0",
            "q4_k_m",
            "held-out questions",
            "minutes",
            *ORIGIN,
        ],
        quickstart_row,
    ),
    "kernels": (
        [
            "kernel",
            "shape",
            "tokens",
            "MB",
            "GFLOP",
            "bound us",
            "measured us",
            "measured / bound",
            "copy TB/s",
            "GEMM TFLOP/s",
            *ORIGIN,
        ],
        kernels_row,
    ),
    "trace": (
        [
            "work",
            "engine",
            "ms a step, timed",
            "ms of the traced step",
            *CATEGORIES,
            "launches",
            *ORIGIN,
        ],
        trace_row,
    ),
    "redaction": (
        ["class", "by", "labels", "whet: recall", "precision", "Presidio: recall", "precision", *ORIGIN],
        redaction_row,
    ),
    "redaction_speed": (["engine", "characters a document", "documents a second", *ORIGIN], redaction_speed_row),
    "data_prep": (["engine", "processes", "rows", "seconds", "rows a second", "GiB", *ORIGIN], data_prep_row),
    "overhead": (["work", "steps", "ms a step without", "with", "added", *ORIGIN], overhead_row),
    "data_steps": (["step", "engine", "rows", "us a row", *ORIGIN], data_steps_row),
    "fp8": (
        ["base", "seed", "held-out loss before", "after", "the same in bf16", "against bf16", "against nf4", *ORIGIN],
        fp8_row,
    ),
    "quantize": (["type", "whet's error", "llama.cpp's", "llama.cpp's processor time / whet's", *ORIGIN], quantize_row),
    "imatrix": (
        ["type", "KL a token: plain -> guided", "99th percentile", "same likeliest token", "measured on", *ORIGIN],
        imatrix_row,
    ),
    "proof": (
        [
            "format",
            "engine",
            "KL a token",
            "99th percentile",
            "same likeliest token",
            "adapter's share",
            "merged at half",
            *ORIGIN,
        ],
        proof_row,
    ),
    "merge": (
        [
            "to",
            "billion weights",
            "GiB of host memory at most",
            "the libraries alone",
            "GB written",
            "processor seconds",
            *ORIGIN,
        ],
        merge_row,
    ),
    "serve": (
        ["server", "clients", "tokens/s", "first piece, s (p50, p99)", "whole answer, s (p50, p99)", *ORIGIN],
        serve_row,
    ),
    "engine": (["work", "engine", "tokens/s", "seconds", *ORIGIN], engine_row),
    "gguf_logits": (
        [
            "family",
            "parts tried",
            "largest difference",
            "logits' spread",
            "KL a token",
            "same likeliest token",
            *ORIGIN,
        ],
        gguf_logits_row,
    ),
    "parity": (["family", "base", "against", "loss", "logits", "gradients", *ORIGIN], parity_row),
    "accuracy": (
        [
            "family",
            "base",
            "loss: whet / plain / under autocast; whet to plain",
            "logits",
            "gradients",
            *ORIGIN,
        ],
        accuracy_row,
    ),
}


def fill(text: str, results: Path) -> str:
    """`text` with every table made anew. Raises ValueError for a marker without an end or without results."""
    found = len(MARKERS.findall(text))
    if found != len(OPENING.findall(text)):
        raise ValueError("a <!-- bench:NAME --> has no <!-- /bench:NAME --> after it")

    def table(match: re.Match[str]) -> str:
        name = match["name"]
        path = results / f"{name}.jsonl"
        if not path.is_file():
            raise ValueError(f"there is no {path.name} for the table bench:{name}")
        return f"<!-- bench:{name} -->\n{render(read(path))}\n<!-- /bench:{name} -->"

    return MARKERS.sub(table, text)


def documents(root: Path) -> list[Path]:
    found = [root / "README.md", *sorted(root.glob("bench/*.md")), *sorted(root.glob("docs/**/*.md"))]
    return [path for path in found if path.is_file()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a table is out of date")
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[1], help="the repository")
    args = parser.parse_args()
    outdated = 0
    for path in documents(args.root):
        text = path.read_text(encoding="utf-8")
        try:
            filled = fill(text, args.root / "bench" / "results")
        except ValueError as error:
            sys.exit(f"{path.relative_to(args.root)}: {error}")
        if filled != text and args.check:
            print(f"{path.relative_to(args.root)} is out of date: run python bench/table.py", file=sys.stderr)
            outdated += 1
        elif filled != text:
            path.write_text(filled, encoding="utf-8")
    return 1 if outdated else 0


if __name__ == "__main__":
    sys.exit(main())
