"""What a run's weights tell: checkpoints that do not match their seal, and an adapter that never moved."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from whet.files import sha256
from whet.runs.doctor.findings import Finding

SEAL = "sealed.json"


def find_in_checkpoints(folder: Path) -> list[Finding]:
    """folder: the run's."""
    return [*_damaged(folder / "checkpoints"), *_unmoved(folder / "trained")]


def _damaged(folder: Path) -> Iterator[Finding]:
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=lambda path: path.name):
        if fault := _fault(checkpoint):
            yield Finding(
                "warning",
                "damaged checkpoint",
                f"checkpoints/{checkpoint.name}",
                f"{fault}; training never goes on from it",
                "remove the folder; `whet run` goes on from the newest whole one. Look after disk and memory",
            )


def _fault(checkpoint: Path) -> str | None:
    """Why a checkpoint is not as it was sealed."""
    try:
        digests = json.loads((checkpoint / SEAL).read_text(encoding="utf-8"))
        names = sorted(digests.items())
    except FileNotFoundError:
        return "it has no seal: it was being written when the run stopped"
    except (OSError, ValueError, AttributeError):
        return f"{SEAL} can't be read"
    for name, digest in names:
        try:
            if sha256(checkpoint / name) != digest:
                return f"{name} is not what was written"
        except OSError:
            return f"{name} is missing or can't be read"
    return None


def _unmoved(trained: Path) -> Iterator[Finding]:
    """LoRA's B starts at 0, and stays there when nothing is learned."""
    from safetensors import SafetensorError, safe_open

    path = trained / "adapter_model.safetensors"
    if not path.is_file():
        return
    try:
        with safe_open(str(path), framework="numpy") as file:
            names = [name for name in file.keys() if ".lora_B." in name]  # noqa: SIM118 (no dict)
            still = [name for name in names if not file.get_tensor(name).any()]
    except (SafetensorError, OSError, TypeError):  # TypeError: bf16, which NumPy lacks
        return
    if names and len(still) == len(names):
        yield Finding(
            "error",
            "frozen adapter",
            "trained/adapter_model.safetensors",
            f"all {len(names)} B matrices are 0: the finished model is its base",
            "see that the adapter's weights require gradients and that the learning rate is not 0",
        )
