"""The whole road on the built-in model: every format of data, every kind of training, every export."""

from __future__ import annotations

import csv
import json
import os
import sys
from pathlib import Path
from typing import Any

import gguf
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.export import planted
from tests.llama_cpp import llama_cpp  # noqa: F401 - a fixture
from tests.road import COLOURS, CONVERSATIONS, Here, metrics, only_run, runs_in, write_recipe, write_rows
from whet import pipeline
from whet.data.prepare import rows
from whet.errors import WhetError
from whet.export import artifacts, checksums
from whet.export import llama_cpp as runner
from whet.export_run import training_texts
from whet.models.load import BUILTIN
from whet.recipe import load
from whet.recipe_model import load_tuned, tokenizer_of
from whet.runs.store import Run

QUESTIONS = [f"Which colour has number {i}?" for i in range(24)]


def run(folder: Path, changes: dict[str, Any]) -> Run:
    recipe = write_recipe(folder, changes)
    return pipeline.run_recipe(load(recipe), folder, folder / "runs", Console(quiet=True))


# ---------------------------------------------------------------- formats


def parquet(folder: Path) -> dict[str, Any]:
    table = pa.table({"q": QUESTIONS, "completion": [COLOURS[i % 3] for i in range(24)]})
    pq.write_table(table, folder / "rows.parquet")
    return {"path": "rows.parquet", "format": "prompt-completion", "columns": {"prompt": "q"}}


def alpaca_csv(folder: Path) -> dict[str, Any]:
    with open(folder / "rows.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["instruction", "input", "output"])
        writer.writerows([["Name the colour.", question, COLOURS[i % 3]] for i, question in enumerate(QUESTIONS)])
    return {"path": "rows.csv"}


def sharegpt(folder: Path) -> dict[str, Any]:
    rows = [
        {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": COLOURS[i % 3]}]}
        for i, question in enumerate(QUESTIONS)
    ]
    write_rows(folder / "rows.jsonl", rows)
    return {"path": "rows.jsonl"}


def texts(folder: Path) -> dict[str, Any]:
    (folder / "docs" / "more").mkdir(parents=True)
    for i, question in enumerate(QUESTIONS):
        (folder / "docs" / ("more" if i % 2 else ".") / f"{i}.txt").write_text(f"{question} It has {COLOURS[i % 3]}.")
    return {"path": "docs/**/*.txt"}


def messages(folder: Path) -> dict[str, Any]:
    write_rows(folder / "rows.jsonl")
    return {"path": "*.jsonl", "format": "messages"}


@pytest.mark.parametrize(
    ("make", "packing"),
    [(parquet, True), (alpaca_csv, True), (sharegpt, True), (texts, True), (messages, True), (messages, False)],
)
def test_every_format_trains(tmp_path: Path, make: Any, packing: bool) -> None:
    """From the files to an adapter, base against tuned on what was held out."""
    changes = {"data.sources": [make(tmp_path)], "train.packing": packing, "eval": {"max_new_tokens": 2, "limit": 3}}
    done = run(tmp_path, changes)
    assert [line["step"] for line in done.metrics("train")] == [1, 2]
    (scored,) = done.metrics("eval")
    kept = json.loads((done.folder / "data" / "summary.json").read_text())
    assert kept["rows"] + kept["held out"] == 24
    assert ("packed rows" in kept) is packing
    answers = [json.loads(line) for line in (done.folder / "eval" / "answers.jsonl").read_text().splitlines()]
    if make is texts:
        assert answers == []
        assert "exact match" not in scored["base"]
    else:
        assert len(answers) == 3
        assert {answer["reference"] for answer in answers} <= set(COLOURS)
        assert all("Which colour has number" in answer["prompt"] for answer in answers)
    assert 0 < scored["tuned"]["loss"] != scored["base"]["loss"] > 0
    assert (done.folder / "trained" / "adapter_model.safetensors").exists()


def test_preference_pairs_train_by_dpo(tmp_path: Path) -> None:
    pairs = [
        {"prompt": question, "chosen": COLOURS[i % 3], "rejected": COLOURS[(i + 1) % 3]}
        for i, question in enumerate(QUESTIONS)
    ]
    write_rows(tmp_path / "rows.jsonl", pairs)
    done = run(tmp_path, {"train.method": "dpo", "eval": {"max_new_tokens": 2, "limit": 2}})
    steps = done.metrics("train")
    assert [line["step"] for line in steps] == [1, 2]
    assert "rewards/margins" in steps[-1]
    told = json.loads((done.folder / "data" / "summary.json").read_text())
    assert told["pairs"] == len(rows(done.folder / "data", "train"))
    assert done.metrics("eval")
    texts = training_texts(done.folder, tokenizer_of(done.recipe.model))
    assert len(texts) == told["pairs"]
    assert any(f"number {i}?" in texts[0] and COLOURS[i % 3] in texts[0] for i in range(24))


# ---------------------------------------------------------------- kinds of training


def test_the_loss_of_the_rows_that_are_trained_falls(tmp_path: Path) -> None:
    """Catches labels that are shifted, or an adapter that gets no gradient."""
    write_rows(tmp_path / "rows.jsonl")
    changes = {"train.max_steps": 20, "train.epochs": 20, "train.learning_rate": 5.0e-3, "adapter.dropout": 0.0}
    done = run(tmp_path, {**changes, "eval": {"exact_match": False}})
    losses = [line["loss"] for line in done.metrics("train")]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    (scored,) = done.metrics("eval")
    assert scored["tuned"]["loss"] < scored["base"]["loss"]


def test_every_weight_is_trained_without_an_adapter(tmp_path: Path) -> None:
    """Catches a full fine-tuning that leaves layers frozen, or is saved or evaluated as the base."""
    write_rows(tmp_path / "rows.jsonl")
    export = {"merged": "bf16", "gguf": ["f16"], "proof": False}
    done = run(tmp_path, {"adapter": None, "eval": {"exact_match": False}, "export": export})
    trained = load_file(done.folder / "trained" / "model.safetensors")
    base = load_file(BUILTIN / "tiny" / "model.safetensors")
    assert trained.keys() == base.keys()
    for name, weight in base.items():
        assert not torch.equal(trained[name], weight.float()), f"{name} was not trained"
    (scored,) = done.metrics("eval")
    assert scored["tuned"]["loss"] != scored["base"]["loss"]
    merged = load_file(done.folder / "export" / "merged" / "model.safetensors")
    assert all(torch.equal(merged[name], weight.bfloat16()) for name, weight in trained.items())
    assert "**Not proven.**" in (done.folder / "export" / "README.md").read_text()


# ---------------------------------------------------------------- export


@pytest.mark.usefixtures("llama_cpp")
def test_exports_are_the_tuned_model_and_proven(tmp_path: Path) -> None:
    """Catches an export of the base, or of weights that were never merged; one that nobody compared; a summary that
    the checksums do not know."""
    write_rows(tmp_path / "rows.jsonl")
    changes = {
        "model.load": "nf4",
        "train.learning_rate": 1.0e-2,
        "export": {"merged": "fp32", "gguf": ["f32", "q8_0"]},
    }
    done = run(tmp_path, changes)
    export = done.folder / "export"
    assert {path.name for path in export.iterdir()} == {
        "merged", "model-f32.gguf", "model-q8_0.gguf", "Modelfile", "Modelfile-q8_0", "vllm.yaml", "vllm.sh",
        "base-licence", "fingerprint.json", "proof.json", "proof.html", "export.json", "README.md", "SHA256SUMS",
        "summary.json",
    }  # fmt: skip
    checksums.check(export)
    assert json.loads((export / "summary.json").read_text())["proof"] == "passed"
    proofs = json.loads((export / "proof.json").read_text())["proofs"]
    assert [(proof["format"], proof["passed"]) for proof in proofs] == [("fp32", True), ("f32", True), ("q8_0", True)]
    tuned, tokenizer = load_tuned(done.recipe, done.folder / "trained")
    merged = AutoModelForCausalLM.from_pretrained(export / "merged", dtype=torch.float32)
    ids = tokenizer(QUESTIONS[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        ours, theirs = tuned(ids).logits, merged(ids).logits
        with tuned.disable_adapter():
            base = tuned(ids).logits
    assert (ours - theirs).abs().max() < 1e-3 < (ours - base).abs().max()
    written = {tensor.name: tensor for tensor in gguf.GGUFReader(export / "model-f32.gguf").tensors}
    norm = merged.state_dict()["model.layers.0.mlp.down_proj.weight"]
    assert torch.equal(torch.tensor(written["blk.0.ffn_down.weight"].data), norm)


def test_without_matplotlib_only_the_picture_is_missing(
    tmp_path: Path, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches hours of training lost to an extra that is not installed."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    write_rows(tmp_path / "rows.jsonl")
    write_recipe(tmp_path)
    told = here("run", "recipe.yaml", cwd=tmp_path)
    assert told.code == 0
    assert 'no loss.png: plots need matplotlib; pip install "whet[plots]"' in told.out
    trained = only_run(tmp_path / "runs") / "trained"
    assert (trained / "adapter_model.safetensors").exists()
    assert not (trained / "loss.png").exists()


# ---------------------------------------------------------------- stages


def test_a_changed_input_is_another_run(tmp_path: Path, here: Here) -> None:
    """Catches going on in the folder of other data, and a name that changes with nothing."""
    write_rows(tmp_path / "rows.jsonl")
    write_recipe(tmp_path)
    assert here("run", "recipe.yaml", cwd=tmp_path).code == 0
    first = only_run(tmp_path / "runs")
    write_rows(tmp_path / "rows.jsonl", [*CONVERSATIONS, CONVERSATIONS[0]])
    assert here("run", "recipe.yaml", cwd=tmp_path).code == 0
    assert len(runs_in(tmp_path / "runs")) == 2
    write_rows(tmp_path / "rows.jsonl")
    told = here("run", "recipe.yaml", cwd=tmp_path)
    assert told.out.count("(done before)") == 3
    assert len(metrics(first)) == 2


def test_an_export_that_fails_its_proof_is_made_again_and_nothing_else(
    tmp_path: Path, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a broken model under its final name, a training repeated because of it, and a report of failure that
    stays beside what was proven later. The merge that is planted here doubles the adapter."""
    right = artifacts.save_merged

    def doubled(model: Any, *arguments: Any, **options: Any) -> None:
        with planted.other_scales(model, lambda name, scale: 2 * scale):
            right(model, *arguments, **options)

    write_rows(tmp_path / "rows.jsonl")
    write_recipe(tmp_path, {"export.merged": "fp32"})
    monkeypatch.setattr(artifacts, "save_merged", doubled)
    told = here("run", "recipe.yaml", cwd=tmp_path)
    folder = only_run(tmp_path / "runs")
    report = folder / "export-not-proven"
    assert told.code == 2
    assert "export-not-proven/proof.html: merged is not what was trained: adapter's share" in told.err
    assert (report / "proof.json").is_file()
    assert not (folder / "export").exists()
    adapter = folder / "trained" / "adapter_model.safetensors"
    before = adapter.stat().st_mtime_ns
    monkeypatch.setattr(artifacts, "save_merged", right)
    told = here("run", "recipe.yaml", cwd=tmp_path)
    assert told.code == 0, told.err
    assert told.out.count("(done before)") == 2
    assert (folder / "export" / "merged" / "model.safetensors").exists()
    assert not report.exists()
    assert adapter.stat().st_mtime_ns == before


@pytest.mark.usefixtures("llama_cpp")
def test_what_can_not_be_proven_here_is_refused_before_it_is_trained(
    tmp_path: Path, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches hours of training that end in the news that llama.cpp is missing, and a way out that is none."""
    installed = os.environ["WHET_NODE"]
    monkeypatch.setenv("WHET_NODE", str(tmp_path / "nothing"))
    write_rows(tmp_path / "rows.jsonl")
    write_recipe(tmp_path, {"export.gguf": ["q8_0"]})
    told = here("run", "recipe.yaml", cwd=tmp_path)
    assert told.code == 2
    assert "llama.cpp, which is not installed" in told.err
    assert "--fetch-llama-cpp" in told.err
    assert "proof: false" in told.err
    assert not (tmp_path / "runs").exists()
    monkeypatch.setattr(runner, "install", lambda: monkeypatch.setenv("WHET_NODE", installed))
    assert here("run", "recipe.yaml", "--fetch-llama-cpp", "--dry-run", cwd=tmp_path).code == 0
    monkeypatch.setenv("WHET_NODE", str(tmp_path / "nothing"))
    pipeline.check_export(load(write_recipe(tmp_path, {"export": {"gguf": ["q8_0"], "proof": False}})))


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"export": {"merged": "bf16", "imatrix": "training"}}, "none is to be rounded"),
        ({"export": {"gguf": ["f16"], "imatrix": "training", "proof": False}}, "none is to be rounded"),
        ({"export": {"gguf": ["q4_0"], "imatrix": "none.jsonl"}}, "there is no file 'none.jsonl'"),
        ({"export": {"gguf_adapter": True}, "adapter": None}, r"but every weight is trained \(adapter: null\)"),
        ({"export": {"gguf_adapter": True}, "adapter.dora": True}, "but adapter.dora is true"),
    ],
)
def test_what_an_export_can_not_be_is_told_first(tmp_path: Path, changes: dict[str, Any], what: str) -> None:
    write_rows(tmp_path / "rows.jsonl")
    with pytest.raises(WhetError, match=what):
        pipeline.check_export(load(write_recipe(tmp_path, changes)))


def test_calibration_text_lies_beside_the_recipe_and_formats_for_vllm_are_taken(tmp_path: Path) -> None:
    """Catches a file that is looked for where the command was typed, once hours of training are done."""
    write_rows(tmp_path / "rows.jsonl")
    write_rows(tmp_path / "chats.jsonl", CONVERSATIONS[:1])
    export = {"merged": "w4a16", "gguf": ["q4_0"], "imatrix": "chats.jsonl", "proof": False}
    recipe = load(write_recipe(tmp_path, {"export": export}))
    assert recipe.export.imatrix == str(tmp_path / "chats.jsonl")
    pipeline.check_export(recipe)
