"""The README's examples run as they are printed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from gguf import GGUFReader
from peft import PeftConfig

from tests import warm
from tests.llama_cpp import llama_cpp  # noqa: F401 - a fixture
from tests.road import only_run

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    return found


def test_the_python_example_runs_to_its_last_line(tmp_path: Path) -> None:
    texts = [json.dumps({"text": f"Return entry number {i} of the table, or None."}) + "\n" for i in range(40)]
    (tmp_path / "texts.jsonl").write_text("".join(texts))
    (tmp_path / "example.py").write_text(block("python"))
    done = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert PeftConfig.from_pretrained(tmp_path / "adapter").r == 16
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    for name in ("q8_0", "q4_k_m"):
        assert GGUFReader(tmp_path / "gguf" / f"model-{name}.gguf").tensors


@pytest.mark.usefixtures("llama_cpp")
def test_the_recipe_runs(tmp_path: Path) -> None:
    (tmp_path / "tickets").mkdir()
    rows = [
        {
            "customer": f"c{i % 25}",
            "messages": [
                {"role": "user", "content": f"The printer on floor {i} is out of {'paper' if i % 2 else 'ink'}."},
                {"role": "assistant", "content": "supplies"},
            ],
        }
        for i in range(60)
    ]
    (tmp_path / "tickets" / "june.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.yaml").write_text(block("yaml"))
    done = warm.run(warm.whet, "run", "recipe.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = only_run(tmp_path / "runs")
    assert (run / "export" / "merged" / "model.safetensors").is_file()
    assert (run / "export" / "model-q4_k_m.gguf").is_file()
