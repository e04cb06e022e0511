"""`whet eval`: models by folder, adapter and run; tables; comparisons that are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from rich.console import Console
from typer.testing import CliRunner, Result

import whet
from tests.evals.openai_server import Fault, OpenAIServer
from whet.cli_eval import evaluate
from whet.errors import WhetError
from whet.eval_models import kept_results, model_at, model_in, model_of_run, other_model
from whet.evals.models import Generation, Prompt
from whet.evals.results import Item, TaskResult
from whet.evals.table import comparison_table, power_notes, results_table
from whet.recipe import Recipe

TASK = """\
name: colors
prompts:
  - {prompt: "Name a color.", reference: red}
  - {prompt: "Name another.", reference: blue}
generation: {max_new_tokens: 4}
scorer: {kind: exact, match: contains}
"""
app = typer.Typer()
app.command()(evaluate)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task; an adapter that changes what the built-in model says; and a run that has trained it."""
    folder = tmp_path_factory.mktemp("eval")
    (folder / "colors.yaml").write_text(TASK)
    model, tokenizer = whet.FastLanguageModel.from_pretrained("builtin:tiny", load_in_4bit=False, dtype="float32")
    model = whet.FastLanguageModel.get_peft_model(model, r=4)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    run = folder / "runs" / "small-1234567890"
    for target in (folder / "adapter", run / "trained"):
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
    recipe = Recipe(
        name="small", model={"base": "builtin:tiny", "load": "32bit"}, data={"sources": [{"path": "x.jsonl"}]}
    )
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump()))
    (run / "run.json").write_text("{}")
    return folder


def called(*arguments: Any) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=True)


def fault(*arguments: Any) -> WhetError:
    error = called(*arguments).exception
    assert isinstance(error, WhetError), error
    return error


def test_results_are_shown_and_written_and_compared(folder: Path, tmp_path: Path) -> None:
    """Catches a table without what was asked for, and a base that answers with the adapter on."""
    found = called(folder / "colors.yaml", "--model", folder / "adapter", "--out", tmp_path, "--compare", "base")
    assert found.exit_code == 0, found.output
    line = next(line for line in found.output.splitlines() if line.strip().startswith("colors  "))
    assert "2" in line.split()
    assert "no gain can be seen" in found.output
    result = TaskResult.load(tmp_path / "colors.jsonl")
    assert result.model == str(folder / "adapter")
    base = called(folder / "colors.yaml", "--model", "builtin:tiny", "--out", tmp_path / "base")
    assert base.exit_code == 0, base.output
    assert [i.answer for i in TaskResult.load(tmp_path / "base" / "colors.jsonl").items] != [
        i.answer for i in result.items
    ]
    again = called(folder / "colors.yaml", "--model", folder / "adapter", "--compare", tmp_path)
    assert again.exit_code == 0, again.output
    assert "+0.0" in again.output


def test_a_run_answers_as_the_adapter_it_has_trained(folder: Path) -> None:
    """Catches a run that is evaluated without what it trained, or by another run's name."""
    asked, how = [Prompt(messages=[{"role": "user", "content": "Count."}])], Generation(max_new_tokens=8)
    of_run = model_of_run("small", folder / "runs")
    assert of_run.name == "small-1234567890"
    assert of_run.generate(asked, how) == model_in(str(folder / "adapter"), held="32bit").generate(asked, how)
    assert of_run.generate(asked, how) != model_in("builtin:tiny", held="32bit").generate(asked, how)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ([], "no model is named"),
        (["--model", "builtin:tiny", "--run", "x"], "several models"),
        (["--model", "builtin:huge"], "no such built-in"),
        (["--endpoint", "http://localhost:1/v1"], "which of the server's"),
        (["--endpoint", "localhost:1", "--endpoint-model", "m"], "not the address"),
        (["--run", "none"], "no run is called"),
        (["--model", "builtin:tiny", "--compare", "base"], "no adapter"),
    ],
)
def test_what_is_wrong_with_the_command(folder: Path, arguments: list[str], what: str) -> None:
    assert what in fault(folder / "colors.yaml", *arguments, "--runs", folder / "runs").what


def test_a_run_that_has_trained_nothing(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "new-1").mkdir()
    (tmp_path / "new-1" / "run.json").write_text("{}")
    with pytest.raises(WhetError, match="trained nothing yet"):
        model_of_run("new", tmp_path)


@pytest.mark.parametrize("config", ["", "[]", "{}", '{"base_model_name_or_path": null}'])
def test_an_adapter_that_does_not_name_its_base(tmp_path: Path, config: str) -> None:
    (tmp_path / "adapter_config.json").write_text(config)
    with pytest.raises(WhetError, match="name its base"):
        model_in(str(tmp_path))


def test_a_key_is_named_and_never_sent_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the environment's OpenAI key in a request to another server."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-planted")
    assert "sk-planted" not in json.dumps(vars(model_at("http://localhost:1/v1", "m", None, 4)), default=repr)


def result(*scores: float | None, task: str = "t", digest: str = "d", model: str = "m") -> TaskResult:
    items = tuple(Item(str(i), "p", "r", "a", score) for i, score in enumerate(scores))
    return TaskResult(task, digest, model, items, 2.0, "exact")


def text(table: Any) -> str:
    console = Console(width=140)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def test_the_tables_say_what_was_found() -> None:
    """Catches a difference with the wrong sign, and items that could not be scored left out of the mean."""
    own, other = result(*[1.0] * 30, *[0.0] * 10), result(*[1.0] * 10, *[0.0] * 30, model="before")
    assert "75.0 (59.8 to 85.8)" in text(results_table({"t": own}))
    shown = text(comparison_table({"t": own}, {"t": other}))
    assert "before" in shown
    assert "+50.0 (" in shown
    assert "50.0 (59" not in shown
    assert "-50.0 (" in text(comparison_table({"t": other}, {"t": own}))
    assert "25.0" in text(results_table({"t": result(1.0, None, None, 0.0)}))
    assert "40 prompts" in power_notes({"t": own})[0]
    assert not power_notes({"t": result(0.5, 1.0)})


@pytest.mark.parametrize(
    "other", [{}, {"t": result(1.0, 1.0, digest="e")}, {"t": result(1.0)}, {"t": result(1.0, 1.0, 1.0)}]
)
def test_results_of_other_questions_are_not_compared(other: dict[str, TaskResult]) -> None:
    """Catches a comparison of a task with what it was before it was edited."""
    with pytest.raises(WhetError, match="other"):
        comparison_table({"t": result(1.0, 0.0)}, other or {"u": result(1.0, task="u")})


def test_compared_results_may_lie_in_a_folder(tmp_path: Path) -> None:
    """Catches a folder of results that is taken for a model, and damage that is found after an hour of answers."""
    assert kept_results(str(tmp_path)) is None
    result(1.0, 0.0).save(tmp_path / "t.jsonl")
    assert kept_results(str(tmp_path)) == {"t": result(1.0, 0.0)}
    (tmp_path / "t.jsonl").write_text("torn")
    with pytest.raises(WhetError, match="torn"):
        kept_results(str(tmp_path))
    with pytest.raises(WhetError, match="no base in memory"):
        other_model("base", model_at("http://h/v1", "m", None, 1), tmp_path, held="16bit")


def test_a_served_model_answers_as_it_does_in_memory(server: OpenAIServer, folder: Path, tmp_path: Path) -> None:
    """Catches prompts, stops or choices that an endpoint is asked otherwise, and a lost answer that ends everything."""
    (tmp_path / "choice.yaml").write_text(
        "name: choice\nchat: false\nchoices: [blue, a very green one]\n"
        "prompts: [{prompt: The sky is, reference: blue}, {prompt: 'Grass is ', reference: blue}]\nscorer: choice\n"
    )
    files = [folder / "colors.yaml", tmp_path / "choice.yaml"]
    served = ["--endpoint", server.url, "--endpoint-model", "builtin:tiny"]
    assert called(*files, *served, "--out", tmp_path / "served").exit_code == 0
    assert called(*files, "--model", "builtin:tiny", "--out", tmp_path / "here").exit_code == 0
    for name in ("colors", "choice"):
        there, here = (TaskResult.load(tmp_path / where / f"{name}.jsonl") for where in ("served", "here"))
        assert [item.answer for item in there.items] == [item.answer for item in here.items]
    server.policy = lambda body: Fault(status=400) if "another" in str(body) else None
    found = called(folder / "colors.yaml", *served, "--out", tmp_path / "lost")
    assert found.exit_code == 0, found.output
    lost = TaskResult.load(tmp_path / "lost" / "colors.jsonl")
    assert [item.score is None for item in lost.items] == [False, True]
    assert lost.items[1].note
