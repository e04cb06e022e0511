"""`whet export` from end to end: a run, a model, an adapter; and what it says to what it can not do."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from transformers import AutoTokenizer

from tests.llama_cpp import llama_cpp  # noqa: F401 - a fixture
from tests.road import CONVERSATIONS, Here, only_run, write_recipe, write_rows
from whet.cli_export import _types
from whet.data.prepare import rows
from whet.errors import WhetError
from whet.export import checksums
from whet.export.imatrix import Imatrix, read_imatrix
from whet.export.wanted import Wanted
from whet.export_run import importance_for


@pytest.mark.usefixtures("llama_cpp")
def test_a_run_is_exported_and_proven(here: Here, tmp_path: Path) -> None:
    """Catches a card without the run's digests, prompts that are not the run's, and text of records in a report; an
    importance matrix that guides nothing, or was measured on other text; an adapter that is written and not compared.
    """
    write_rows(tmp_path / "rows.jsonl")
    write_recipe(tmp_path)
    assert here("run", "recipe.yaml", cwd=tmp_path).code == 0
    run = only_run(tmp_path / "runs")
    told = here("export", run.name, "--gguf", "q4_0", "--merged", "bf16", "--imatrix", "training", "--gguf-adapter",
                "--out", "desk", cwd=tmp_path)  # fmt: skip
    assert told.code == 0, told.err
    assert "proven" in told.out
    out = tmp_path / "desk"
    checksums.check(out)
    proofs = json.loads((out / "proof.json").read_text())["proofs"]
    assert [proof["artifact"] for proof in proofs] == ["adapter.gguf", "merged", "model-q4_0.gguf"]
    for proof in proofs:
        assert proof["passed"]
        assert {"adapter's share", "KL a token", "greedy answers"} <= {check["name"] for check in proof["checks"]}
    matrix = read_imatrix(out / "model.imatrix")
    assert matrix.datasets == ["training rows of the run"]
    tokens = sum(len(row["input_ids"]) for row in rows(run / "data", "train"))
    assert tokens // 2 < matrix.counts["blk.0.attn_q.weight"] <= tokens
    fields = gguf.GGUFReader(out / "model-q4_0.gguf").fields
    assert fields["quantize.imatrix.dataset"].contents() == "training rows of the run"
    card = (out / "README.md").read_text()
    data = json.loads((run / "data" / "manifest.json").read_text())["digest"]
    for words in (data, run.name, "held-out prompts of the run", "LoRA, r 4", "license: apache-2.0", "builtin:tiny",
                  "adapter/adapter.gguf", "an importance matrix of"):  # fmt: skip
        assert words in card
    for path in (out / "README.md", out / "proof.html", out / "proof.json", out / "export.json"):
        text = path.read_text()
        assert "Which colour" not in text
        assert str(tmp_path) not in text
    again = here("export", run.name, "--merged", "bf16", "--out", "desk", cwd=tmp_path)
    assert again.code == 2
    assert "not empty" in again.err


def test_an_adapters_folder_is_exported(here: Here, tiny_llama: Path, tmp_path: Path) -> None:
    """Catches a base that is looked for under the adapter's name; a tokenizer that is the adapter's is the base's."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    get_peft_model(base, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).save_pretrained(tmp_path / "a")
    write_rows(tmp_path / "asked.jsonl", CONVERSATIONS[:1])
    told = here("export", "a", "--merged", "fp32", "--held", "32bit", "--prompts", "asked.jsonl", "--name", "Mine",
                "--out", "out", cwd=tmp_path)  # fmt: skip
    assert told.code == 0, told.err
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# Mine" in card
    assert f"base_model: {tiny_llama.name}" in card
    assert "Compared on 1 prompts of asked.jsonl" in card
    assert "No licence was found" in card


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["builtin:tiny", "--merged", "bf16"], "where to?"),
        (["builtin:tiny", "--out", "o"], "nothing is to be written"),
        (["builtin:tiny", "q8_0", "--out", "o"], "what is 'q8_0'?"),
        (["builtin:tiny", "--gguf", "q9", "--out", "o"], "no GGUF quantization 'q9'"),
        (["builtin:tiny", "--gguf", "q4_0", "--imatrix", "none", "--out", "o"], "there is no such file"),
        (["nothing", "--merged", "bf16", "--out", "o"], "there is no such folder"),
    ],
)
def test_what_it_can_not_do(here: Here, tmp_path: Path, arguments: list[str], what: str) -> None:
    told = here("export", *arguments, cwd=tmp_path)
    assert told.code == 2
    assert what in told.err
    assert not any(tmp_path.iterdir())


def test_types_are_given_in_any_way() -> None:
    """Catches `--gguf q4_k_m q8_0` that writes only the first."""
    assert _types(["q4_k_m"], ["Q8_0"]) == ("q4_k_m", "q8_0")
    assert _types(["q4_k_m,q8_0"], None) == ("q4_k_m", "q8_0")
    assert _types(["q4_k_m", "q8_0", "q4_k_m"], []) == ("q4_k_m", "q8_0")
    assert _types(None, None) == ()
    with pytest.raises(WhetError, match="what is 'q8_0'"):
        _types(None, ["q8_0"])


def test_what_an_importance_matrix_is_measured_on(tiny_llama: Path, tmp_path: Path) -> None:
    """Catches a matrix's file that is read as text, chats without their template, and rows that are guessed."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    write_rows(tmp_path / "asked.jsonl", CONVERSATIONS[:2])
    found = importance_for(Wanted(gguf=("q4_0",), imatrix=str(tmp_path / "asked.jsonl")), tokenizer)
    assert found.words == "asked.jsonl"
    assert (
        found.texts[1]
        == "<|im_start|>user\nWhich colour has number 1?<|im_end|>\n<|im_start|>assistant\ngreen<|im_end|>\n"
    )
    matrix = Imatrix({"blk.0.attn_q.weight": np.ones(8, np.float32)}, {"blk.0.attn_q.weight": 4}, 1, 4)
    matrix.save(tmp_path / "m.imatrix")
    read = importance_for(Wanted(gguf=("q4_0",), imatrix=str(tmp_path / "m.imatrix")), tokenizer)
    assert read.counts == matrix.counts
    assert importance_for(Wanted(gguf=("q4_0",)), tokenizer) is None
    with pytest.raises(WhetError, match="does not know the rows it was trained on"):
        importance_for(Wanted(gguf=("q4_0",), imatrix="training"), tokenizer)
