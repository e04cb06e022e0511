"""A script as they are found in public, in both ways of running it: one import line changed, and not a letter."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf import GGUFReader
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests import warm

TEMPLATE = Path(__file__).parent / "scripts" / "worked_example.py.template"
OLDER_IMPORTS = "from trl import SFTTrainer\nfrom transformers import TrainingArguments\n"


def worked_example(package: str, model: Path, data: Path) -> str:
    text = TEMPLATE.read_text(encoding="utf-8")
    for name, value in (("<whet>", package), ("<model>", str(model)), ("<data>", str(data))):
        text = text.replace(name, value)
    return text


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [{"text": f"Entry {i}: the parser reads argument number {i}. " * 8} for i in range(40)]
    (folder / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return folder


def run(folder: Path, main: Callable[..., None], *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "CI"}
    done = warm.run(main, *arguments, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def check_results(folder: Path, model: Path, done: subprocess.CompletedProcess[str]) -> None:
    assert "fp16=True: fp16 needs a GPU; using fp32 on the CPU" in done.stderr
    states = list((folder / "outputs").glob("checkpoint-*/trainer_state.json"))
    assert len(states) == 1
    state = json.loads(states[0].read_text(encoding="utf-8"))
    assert state["global_step"] >= 2
    assert state["epoch"] == 2.0
    base = AutoModelForCausalLM.from_pretrained(model)
    weights = base.num_parameters()
    adapter = PeftModel.from_pretrained(base, folder / "lora-adapter")
    moved = [p.abs().max() for name, p in adapter.named_parameters() if "lora_B" in name]
    assert len(moved) == 14
    assert min(moved) > 0
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged-16bit")
    assert merged.num_parameters() == weights
    (gguf,) = (folder / "merged-gguf").glob("*.gguf")
    assert "blk.1.ffn_down.weight" in {tensor.name for tensor in GGUFReader(gguf).tensors}


def test_with_the_import_line_changed(tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    text = worked_example("whet", tiny_llama, data)
    assert text.count(OLDER_IMPORTS) == 1
    script = text.replace(OLDER_IMPORTS, "from whet import SFTTrainer, TrainingArguments\n")
    (tmp_path / "script.py").write_text(script, encoding="utf-8")
    check_results(tmp_path, tiny_llama, run(tmp_path, warm.script, "script.py"))


def test_wholly_unchanged(tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(worked_example("unsloth", tiny_llama, data), encoding="utf-8")
    done = run(tmp_path, warm.whet, "exec", "script.py")
    check_results(tmp_path, tiny_llama, done)
    (said,) = (line for line in done.stderr.splitlines() if line.startswith("whet exec:"))
    for name in ("unsloth", "transformers.TrainingArguments", "trl.SFTTrainer", "trl.ORPOTrainer"):
        assert name in said
