"""What users get wrong, through the real command line: each time exit code 2, a message that names the place and the
fix, no traceback, and nothing half-written under a final name."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, OlmoConfig, OlmoForCausalLM

from tests.road import RECIPE, Here, Told, prepared, runs_in, write_recipe, write_rows
from whet.runs.store import Run

PAIRS = [{"prompt": f"Number {i}?", "chosen": "yes", "rejected": "no"} for i in range(12)]


def refused(told: Told, folder: Path, *signs: str, done: tuple[str, ...] = ()) -> None:
    """The command ended as a user's fault should end, with `signs` in its message; of stages only `done` are there."""
    message = " ".join(told.err.split())
    assert told.code == 2, told
    assert "Traceback" not in told.out + told.err
    assert "error " in message
    assert "fix " in message
    for sign in signs:
        assert sign in message, message
    runs = runs_in(folder / "runs") if (folder / "runs").is_dir() else []
    stages = {path.name for run in runs for path in run.glob("*") if path.is_dir()} - {"checkpoints", "receipts"}
    assert stages == set(done)
    assert not [path for path in folder.rglob("*") if path.name.endswith(".partial")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_rows(tmp_path / "rows.jsonl")
    return tmp_path


# ---------------------------------------------------------------- the recipe's text

TEXT = yaml.safe_dump(RECIPE, sort_keys=False)


def test_a_recipe_that_is_not_there(folder: Path, here: Here) -> None:
    write_recipe(folder)
    refused(here("run", "recipes.yaml", cwd=folder), folder, "recipes.yaml: there is no such recipe", "recipe.yaml")


def test_a_folder_as_recipe(folder: Path, here: Here) -> None:
    (folder / "recipes").mkdir()
    refused(here("run", "recipes", cwd=folder), folder, "recipes: this is a folder")


@pytest.mark.parametrize(
    ("text", "sign"),
    [
        (TEXT + "train: {epochs: 2\n", "recipe.yaml:21:1: not valid YAML"),
        (TEXT + "name: twice\n", "recipe.yaml:20: the key 'name' stands here twice"),
        ("- a\n- list\n", "a recipe is a mapping of sections"),
        ("", "a recipe is a mapping of sections"),
        ("name: 2001-99-99\n", "month must be in 1..12"),
        ("name: &loop\n  a: *loop\n", "a value that YAML cannot read"),
        (TEXT.replace("adapter:", "adaptor:"), "did you mean 'adapter'?"),
        (TEXT.replace("max_steps: 2", "max_steps: many"), "recipe.yaml:15: train.max_steps: input should be a valid"),
        (TEXT.replace("max_steps: 2", "max_steps: .inf"), "train.max_steps"),
        (TEXT.replace("r: 4", "r: 0"), "recipe.yaml:7: adapter.r: input should be greater than or equal to 1, not 0"),
        (TEXT.replace("load: 32bit", "load: nf5"), "did you mean 'nf4'?"),
        (TEXT + "export: {gguf: [q4_km]}\n", "did you mean 'q4_k_m'?"),
        (TEXT.replace("tokens_per_step: 128", "tokens_per_step: 63"), "use tokens_per_step: 128"),
        (TEXT.replace("rows.jsonl", "row.jsonl"), "recipe.yaml:11: data.sources.0.path: no file matches 'row.jsonl'"),
        (TEXT.replace("rows.jsonl", "."), "1 of 2 files of kinds that cannot be read: .yaml (1)"),
        (TEXT.replace("adapter:\n  r: 4\n  dropout: 0.1", "adapter: null").replace("32bit", "nf4"), "use load: 16bit"),
        (TEXT.replace("data:\n", "data:\n  eval_sources: [{path: rows.jsonl}]\n"), "both hold rows out"),
        (TEXT.replace("name: colours", "name: ../colours"), "recipe.yaml:1: name"),
        (TEXT + "budget: {gpu_memory: 0GiB}\n", "budget.gpu_memory: '0GiB' is not an amount of memory"),
    ],
)
def test_a_faulty_recipe(folder: Path, here: Here, text: str, sign: str) -> None:
    (folder / "recipe.yaml").write_text(text)
    refused(here("run", "recipe.yaml", cwd=folder), folder, sign)


def test_a_recipe_that_is_not_utf8(folder: Path, here: Here) -> None:
    (folder / "recipe.yaml").write_bytes(b"name: caf\xe9\n")
    refused(here("run", "recipe.yaml", cwd=folder), folder, "not UTF-8")


def test_several_faults_are_told_at_once(folder: Path, here: Here) -> None:
    """Catches a user who mends one fault a run."""
    text = TEXT.replace("r: 4", "rank: 4").replace("max_steps: 2", "max_steps: -1").replace("name: colours\n", "")
    (folder / "recipe.yaml").write_text(text)
    told = here("run", "recipe.yaml", cwd=folder)
    signs = (
        "recipe.yaml:1: name: this key is required",
        "recipe.yaml:6: adapter.rank: unknown key",
        "recipe.yaml:14: train.max_steps",
    )
    refused(told, folder, *signs)
    assert told.err.count("error") == 3


@pytest.mark.parametrize("arguments", [["run"], ["walk"], ["run", "recipe.yaml", "--fast"]])
def test_an_unknown_command_or_option(folder: Path, here: Here, arguments: list[str]) -> None:
    told = here(*arguments, cwd=folder)
    assert told.code == 2
    assert "Usage" in told.err
    assert "Traceback" not in told.out + told.err


# ---------------------------------------------------------------- the data


@pytest.mark.parametrize(
    ("content", "sign"),
    [
        (b"", "rows.jsonl: the file is empty"),
        (b"\n\n", "rows.jsonl: the file has no rows"),
        (b'{"text": "one"}\n{"text": "two"\n', "rows.jsonl:2: not JSON"),
        (b'{"text": "one"}\n{"text": "caf\xe9"}\n', "rows.jsonl:2: not UTF-8"),
        (
            b'{"question": "one", "answer": "two"}\n',
            "a row with the columns question, answer",
        ),
        (b'{"messages": []}\n', "rows.jsonl:1"),
        (b'{"text": 3}\n', "rows.jsonl:1"),
        (b'{"text": "the only one"}\n', "all 1 examples fall on one side"),
        (json.dumps(PAIRS[0]).encode(), "rows.jsonl:1"),
    ],
)
def test_faulty_data(folder: Path, here: Here, content: bytes, sign: str) -> None:
    (folder / "rows.jsonl").write_bytes(content * (12 if b"chosen" in content else 1))
    write_recipe(folder)
    refused(here("run", "recipe.yaml", cwd=folder), folder, sign)


@pytest.mark.parametrize(
    ("changes", "sign"),
    [
        ({"data.sources": [{"path": "rows.jsonl", "format": "alpaca"}]}, "rows.jsonl:1: no column 'instruction'"),
        ({"data.sources": [{"path": "rows.jsonl", "format": "messages", "columns": {"mesages": "m"}}]}, "use messages"),
        ({"data.split": {"group_by": "customer"}}, "rows.jsonl:1: no value in the column 'customer'"),
        ({"model.max_seq_length": 8}, "max_seq_length"),
        ({"train.method": "dpo"}, "dpo learns from preference pairs, and this row is none"),
        ({"model.template": "chatmll"}, "chatml"),
        ({"adapter.targets": ["q_porj"]}, "the model has no layer named q_porj"),
    ],
)
def test_data_or_model_that_do_not_fit_the_recipe(folder: Path, here: Here, changes: dict[str, Any], sign: str) -> None:
    write_recipe(folder, changes)
    done = ("data",) if "adapter.targets" in changes else ()
    refused(here("run", "recipe.yaml", cwd=folder), folder, sign, done=done)


def test_preference_pairs_without_dpo(folder: Path, here: Here) -> None:
    write_rows(folder / "rows.jsonl", PAIRS)
    write_recipe(folder)
    refused(here("run", "recipe.yaml", cwd=folder), folder, "rows.jsonl:", "dpo")


# ---------------------------------------------------------------- the model


def no_model(folder: Path, tiny_llama: Path) -> None:
    pass


def pickled(folder: Path, tiny_llama: Path) -> None:
    shutil.copytree(tiny_llama, folder / "model")
    (folder / "model" / "model.safetensors").unlink()
    torch.save({}, folder / "model" / "pytorch_model.bin")


def adapter_only(folder: Path, tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(folder / "model")


def too_many_tokens(folder: Path, tiny_llama: Path) -> None:
    shutil.copytree(tiny_llama, folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.add_tokens([f"<extra{i}>" for i in range(20)])
    tokenizer.save_pretrained(folder / "model")


def cut_short(folder: Path, tiny_llama: Path) -> None:
    shutil.copytree(tiny_llama, folder / "model")
    weights = folder / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])


@pytest.mark.parametrize(
    ("make", "sign", "done"),
    [
        (no_model, "there is no model folder here", ()),
        (pickled, "are a pickle (pytorch_model.bin)", ()),
        (adapter_only, "this is a LoRA adapter", ()),
        (too_many_tokens, "but the embedding only 512 rows", ()),
        (cut_short, "the model could not be read", ("data",)),
    ],
)
def test_a_faulty_model(
    folder: Path, tiny_llama: Path, here: Here, make: Callable[..., None], sign: str, done: tuple[str, ...]
) -> None:
    make(folder, tiny_llama)
    write_recipe(folder, {"model.base": "./model"})
    refused(here("run", "recipe.yaml", cwd=folder), folder, sign, done=done)


@pytest.mark.parametrize("arguments", [[], ["--dry-run"]])
def test_a_model_that_gguf_cannot_hold(folder: Path, tiny_llama: Path, here: Here, arguments: list[str]) -> None:
    """Catches the refusal coming after hours of training."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = OlmoConfig(vocab_size=512, num_key_value_heads=2, eos_token_id=tokenizer.eos_token_id, **sizes)
    OlmoForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    write_recipe(folder, {"model.base": "./model", "export.gguf": ["q8_0"]})
    told = here("run", "recipe.yaml", *arguments, cwd=folder)
    place = (folder / "model").resolve()
    refused(told, folder, f"export.gguf, {place}: whet cannot write GGUF for the architecture OlmoForCausalLM")


def test_a_loss_that_is_no_number(folder: Path, tiny_llama: Path, here: Here) -> None:
    """Catches a run that goes on to train NaN, or saves it."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("inf"))
    model.save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder / "model")
    write_recipe(folder, {"model.base": "./model"})
    told = here("run", "recipe.yaml", cwd=folder)
    refused(told, folder, "the loss became nan at step 1", "model.norm.weight", done=("data",))


# ---------------------------------------------------------------- the disk and other processes


def test_a_file_as_the_folder_of_runs(folder: Path, here: Here) -> None:
    write_recipe(folder)
    told = here("run", "recipe.yaml", "--runs", "rows.jsonl", cwd=folder)
    refused(told, folder, "a file stands where a folder is to be")


def test_a_folder_of_runs_that_cannot_be_written(folder: Path, here: Here) -> None:
    """/sys takes no new folders, not even from root."""
    write_recipe(folder)
    told = here("run", "recipe.yaml", "--runs", "/sys/runs", cwd=folder)
    assert told.code == 2, told
    assert "/sys/runs" in told.err
    assert "Traceback" not in told.out + told.err


def test_two_processes_on_one_run(folder: Path, here: Here) -> None:
    from whet.recipe import load

    recipe = load(write_recipe(folder))
    run = Run.open(recipe, folder, folder / "runs", prepared(recipe, folder).digest)
    try:
        refused(here("run", "recipe.yaml", cwd=folder), folder, "another process is at work on this run")
    finally:
        run.close()


@pytest.mark.parametrize(
    ("limit", "done"),
    [
        (100_000, ("data",)),  # met by a checkpoint
        (2_000_000, ("data", "trained")),  # met by the merged model
    ],
)
def test_no_space_left(folder: Path, here: Here, limit: int, done: tuple[str, ...]) -> None:
    """A limit on the size of files stands for a full disk: writes fail in the midst of a file, in every library."""
    write_recipe(folder, {"export.merged": "bf16", "adapter.r": 1, "adapter.targets": ["q_proj"]})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        told = here("run", "recipe.yaml", cwd=folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    refused(told, folder, "no space left on the disk", "runs/colours-", done=done)


@pytest.mark.parametrize(("size", "done"), [("4k", ()), ("320k", ("data",))])
def test_a_full_disk(folder: Path, here: Here, size: str, done: tuple[str, ...]) -> None:
    """A real one, where this process may make one."""
    disk = folder / "runs"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a small disk takes root; test_no_space_left covers the rest")
    try:
        write_recipe(folder)
        refused(here("run", "recipe.yaml", cwd=folder), folder, "no space left on the disk", done=done)
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


# ---------------------------------------------------------------- exec


def test_a_script_that_is_not_there(folder: Path, here: Here) -> None:
    refused(here("exec", "script.py", cwd=folder), folder, "script.py: there is no script here")
