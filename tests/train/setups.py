"""What the tests of the trainers share: rows and arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TEXTS = [f"The parser reads argument number {i}. " * (1 + i % 5) for i in range(12)]


def common(folder: Path, **more: Any) -> dict[str, Any]:
    base = {"output_dir": str(folder), "max_steps": 2, "save_strategy": "no", "logging_steps": 1, "report_to": []}
    return {**base, "per_device_train_batch_size": 2, "disable_tqdm": True, **more}
