"""Train `builtin:tiny` from scratch on one GPU.

    python -m tiny.train TOKENS OUT [--epochs 12]        TOKENS: what tiny.tokens wrote

A Llama of 6.8M parameters (tied embeddings). The weights kept are those with the lowest loss on held-out text; they are
written to OUT as bf16 safetensors, with one JSON line an epoch in OUT/log.jsonl.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

CONTEXT = 2048
ROWS = 16
LEARNING_RATE = 2e-3


def model_config(tokenizer) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        attention_dropout=0.1,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def documents(ids: np.ndarray, end: int) -> list[np.ndarray]:
    """The stream cut after every end-of-text token."""
    return np.split(ids, np.flatnonzero(ids == end) + 1)


def epoch_rows(docs: list[np.ndarray], rng: np.random.Generator) -> torch.Tensor:
    """All documents in a fresh order as rows of CONTEXT tokens [rows, CONTEXT]; the last short row is left out."""
    stream = np.concatenate([docs[i] for i in rng.permutation(len(docs))])
    rows = len(stream) // CONTEXT
    return torch.from_numpy(stream[: rows * CONTEXT].astype(np.int64)).view(rows, CONTEXT)


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up over 100 steps, then a cosine to a tenth."""
    if step < 100:
        return LEARNING_RATE * (step + 1) / 100
    progress = (step - 100) / max(1, steps - 100)
    return LEARNING_RATE * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


@torch.no_grad()
def heldout_loss(model: LlamaForCausalLM, rows: torch.Tensor) -> float:
    """Mean loss a token, nats."""
    model.eval()
    losses = [model(input_ids=batch, labels=batch).loss.float() for batch in rows.split(ROWS)]
    model.train()
    return torch.stack(losses).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("tokens", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--epochs", type=int, default=12)
    args = parser.parse_args()

    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.tokens)
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    docs = documents(np.load(args.tokens / "train.npy"), end)
    heldout = epoch_rows(documents(np.load(args.tokens / "heldout.npy"), end), np.random.default_rng(1)).to(device)
    model = LlamaForCausalLM(model_config(tokenizer)).to(device)
    model.generation_config = GenerationConfig(
        eos_token_id=[tokenizer.eos_token_id, end], pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
        betas=(0.9, 0.95),
        fused=device == "cuda",
    )
    steps = args.epochs * (len(epoch_rows(docs, np.random.default_rng(0))) // ROWS)
    args.out.mkdir(parents=True, exist_ok=True)
    facts = {
        "parameters": model.num_parameters(),
        "gpu": torch.cuda.get_device_name(0) if device == "cuda" else platform.processor(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    print(json.dumps(facts), flush=True)
    best, step, started = math.inf, 0, time.time()
    with open(args.out / "log.jsonl", "w") as log:
        for epoch in range(args.epochs):
            rows = epoch_rows(docs, rng).to(device)
            total = torch.zeros((), device=device)
            batches = rows[: len(rows) // ROWS * ROWS].split(ROWS)
            for batch in batches:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, steps)
                with torch.autocast(device, dtype=torch.bfloat16):
                    loss = model(input_ids=batch, labels=batch).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                total += loss.detach()
                step += 1
            score = heldout_loss(model, heldout)
            line = {
                "epoch": epoch + 1,
                "step": step,
                "train_loss": (total / len(batches)).item(),
                "heldout_loss": score,
            }
            line |= {"seconds": round(time.time() - started, 1), **facts}
            log.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)
            if score < best:
                best = score
                kept = {name: value.detach().to("cpu", torch.bfloat16) for name, value in model.state_dict().items()}
    model.to(torch.bfloat16).load_state_dict(kept)
    model.config.attention_dropout = 0.0
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
