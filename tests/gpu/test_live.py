"""What is measured of a step, and shown, on a GPU: memory is the allocator's, and nothing waits."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from whet.runs.memory import memory
from whet.train.callbacks import Bar, Metrics

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_memory_is_what_the_allocator_has_reserved() -> None:
    held = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    found = memory()
    assert found.used == torch.cuda.memory_reserved() >= held.numel()
    assert found.total == torch.cuda.get_device_properties(0).total_memory


def test_a_step_is_measured_and_shown_while_the_gpu_works(tmp_path: Path) -> None:
    """Catches a measure that waits for the GPU: torch itself refuses such calls here."""
    torch.zeros(1, device="cuda")
    state: Any = SimpleNamespace(max_steps=2, global_step=1)
    run: Any = SimpleNamespace(folder=tmp_path, log=lambda **values: None)
    metrics, bar = Metrics(run), Bar(Console(file=io.StringIO(), force_terminal=True, width=80))
    torch.cuda.set_sync_debug_mode("error")
    try:
        bar.on_train_begin(None, state, None)  # type: ignore[arg-type]
        for callback in (metrics, bar):
            callback.on_step_begin()
            callback.on_log(None, state, None, logs={"loss": 1.0, "grad_norm": 0.1, "num_tokens": 10.0})
        bar.on_train_end()
    finally:
        torch.cuda.set_sync_debug_mode("default")
