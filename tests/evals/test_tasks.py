"""Task files: what they say, what is wrong with them, and what becomes of their answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from whet.errors import WhetError, WhetErrors
from whet.evals.models import Generation, InMemory, Prompt
from whet.evals.results import Item, TaskResult
from whet.evals.run_tasks import load_results, run_task, run_tasks, save_results
from whet.evals.tasks import BenchmarkTask, Task, load_task, load_tasks

CAPITALS = """\
name: capitals
system: Answer with the city alone.
prompts:
  - {prompt: "Capital of France?", reference: Paris}
  - {prompt: "Capital of Italy?", reference: [Rome, Roma], id: italy}
  - {messages: [{role: user, content: "And of Spain?"}, {role: assistant, content: Madrid}]}
generation: {max_new_tokens: 8, stop: ["."]}
scorer: {kind: normalized, match: begins}
"""


@dataclass
class Says:
    """A model that answers from a table, and keeps what it was asked."""

    table: dict[str, str]
    name: str = "table"
    asked: list[Prompt] = field(default_factory=list)
    joined: list[list[str]] = field(default_factory=list)

    def generate(self, prompts: Sequence[Prompt], how: Generation) -> list[str]:
        self.asked += prompts
        return [self.table.get(prompt.shown, "") for prompt in prompts]

    def choice_logprobs(self, prompts: Sequence[Prompt], choices: Sequence[Sequence[str]]) -> list[list[float]]:
        self.joined += [list(own) for own in choices]
        return [[-float(len(choice)) for choice in own] for own in choices]


def task_in(folder: Path, text: str, name: str = "task.yaml", **options: Any) -> Task:
    (folder / name).write_text(text, encoding="utf-8")
    found = load_task(folder / name, **options)
    assert isinstance(found, Task)
    return found


def rows_in(folder: Path, *rows: dict[str, Any], name: str = "rows.jsonl") -> None:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def faults(folder: Path, text: str) -> list[WhetError]:
    with pytest.raises(WhetError) as caught:
        task_in(folder, text)
    return caught.value.errors if isinstance(caught.value, WhetErrors) else [caught.value]


# ---------------------------------------------------------------- what files say


def test_a_task_of_inline_prompts(tmp_path: Path) -> None:
    task = task_in(tmp_path, CAPITALS)
    france, italy, spain = task.questions
    assert france.prompt.messages == [
        {"role": "system", "content": "Answer with the city alone."},
        {"role": "user", "content": "Capital of France?"},
    ]
    assert (italy.references, italy.id) == (("Rome", "Roma"), "italy")
    assert spain.references == ("Madrid",)
    assert [m["role"] for m in spain.prompt.messages or ()] == ["system", "user"]
    assert task.generation == Generation(max_new_tokens=8, stop=(".",))
    assert task.scorer_kind == "normalized"


@pytest.mark.parametrize(
    ("row", "more"),
    [
        ({"prompt": "Q", "reference": "A"}, ""),
        ({"prompt": [{"role": "user", "content": "Q"}], "reference": "A"}, ""),
        ({"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}, ""),
        ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, ""),
        ({"prompt": "Q", "completion": "A"}, ""),
        ({"instruction": "Q", "output": "A"}, ""),
        ({"question": "Q", "answer": "A"}, "columns: {prompt: question, reference: answer}\n"),
        ({"q": "Q", "reference": "A"}, "template: '{q}'\n"),
    ],
)
def test_rows_of_any_format_are_questions(tmp_path: Path, row: dict[str, Any], more: str) -> None:
    """Catches a training row whose answer the model is shown, and a reference that is lost."""
    rows_in(tmp_path, row)
    (question,) = task_in(tmp_path, f"name: t\ndata: rows.jsonl\nscorer: exact\n{more}").questions
    assert question.prompt.messages == [{"role": "user", "content": "Q"}]
    assert question.references == ("A",)


def test_a_template_fills_in_columns(tmp_path: Path) -> None:
    rows_in(tmp_path, {"text": "{5} apples", "n": 5, "reference": 5})
    task = task_in(
        tmp_path, "name: t\ndata: rows.jsonl\nscorer: numeric\nchat: false\ntemplate: '{{n}}: {n}, {text}:'\n"
    )
    assert task.questions[0].prompt == Prompt(text="{n}: 5, {5} apples:")
    assert task.questions[0].references == ("5",)


def test_csv_and_parquet_are_read_as_training_data_are(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("prompt,reference\nQ,A\nQ2,A2\nQ3,A3\n")
    task = task_in(tmp_path, "name: t\ndata: rows.csv\nlimit: 2\nscorer: exact\n")
    assert [question.reference for question in task.questions] == ["A", "A2"]


def test_ids_do_not_depend_on_the_order_of_rows(tmp_path: Path) -> None:
    """Catches results that are paired with another question's once a row was moved."""
    one, two = {"prompt": "a", "reference": "1"}, {"prompt": "b", "reference": "2"}
    rows_in(tmp_path, one, two, one)
    first = task_in(tmp_path, "name: t\ndata: rows.jsonl\nscorer: exact\n")
    rows_in(tmp_path, two, one, one)
    second = task_in(tmp_path, "name: t\ndata: rows.jsonl\nscorer: exact\n")
    assert {q.id: q.references for q in first.questions} == {q.id: q.references for q in second.questions}
    assert len({q.id for q in first.questions}) == 3


def test_the_digest_is_of_what_decides_the_result(tmp_path: Path) -> None:
    """Catches scores compared across another reference, setting or schema; and a comment that makes a task another."""
    (tmp_path / "schema.json").write_text("{}")
    text = "name: t\nprompts: [{prompt: q, reference: a}]\nscorer: {kind: json_schema, file: schema.json}\n"
    before = task_in(tmp_path, text).digest
    assert task_in(tmp_path, f"# note\n{text}").digest == before
    changed = [
        text.replace("q,", "r,"),
        text.replace("reference: a", "reference: b"),
        f"{text}chat: false\n",
        f"{text}generation: {{max_new_tokens: 5}}\n",
        text.replace("schema.json", "schema.json, find: block"),
    ]
    assert len({before, *(task_in(tmp_path, other).digest for other in changed)}) == len(changed) + 1
    (tmp_path / "schema.json").write_text('{"type": "object"}')
    assert task_in(tmp_path, text).digest != before


# ---------------------------------------------------------------- what is wrong with them


@pytest.mark.parametrize(
    ("text", "where", "what", "fix"),
    [
        (CAPITALS + "scorerr: exact\n", ":9: scorerr", "unknown key", "did you mean 'scorer'?"),
        (CAPITALS.replace("match:", "mach:"), ":8: scorer.mach", "unknown key", "did you mean 'match'?"),
        (CAPITALS.replace("begins", "begin"), ":8: scorer.match", "not a choice", "did you mean 'begins'?"),
        (CAPITALS.replace("normalized", "normalised"), ":8: scorer.kind", "no scorer", "did you mean 'normalized'?"),
        (CAPITALS.replace("tokens: 8", "tokens: 0"), ":7: generation.max_new_tokens", "not 0", "tokens"),
        (CAPITALS.replace("name: capitals", "name: a/b"), ":1: name", "not 'a/b'", "letters"),
        (CAPITALS.replace(", reference: Paris", ""), ":4", "no reference", "reference"),
        (CAPITALS.replace("reference: Paris", "reference: yes"), ":4", "a boolean", "quotes"),
        (CAPITALS.replace("reference: Paris", "answer: Paris"), ":4", "unknown key 'answer'", "reference"),
        (CAPITALS.replace("role: user", "role: usr"), ":6", "unknown role", "user"),
        (CAPITALS.replace('"Capital of France?"', '" "'), ":4", "empty", "fill it in"),
        (CAPITALS.replace("id: italy", "id: x").replace("Paris", "Paris, id: x"), ":4", "several rows", "its own"),
        (CAPITALS + "name: again\n", ":9", "stands here twice", "keep one"),
        (CAPITALS + "chat: false\n", ":2: system", "system is for a chat", "put the text"),
        ("name: t\nscorer: exact\n", ": task", "either prompts or data", "one of the two"),
        ("name: t\ndata: rows.jsonl\nprompts: [a]\nscorer: exact\n", ": task", "either prompts or data", "one"),
        ("name: t\ndata: nothing.jsonl\nscorer: exact\n", ":2: data", "no file", "task.yaml"),
        ("name: t\nprompts: [a]\n", ": task", "has a scorer", "exact"),
        ("name: t\nprompts: [a]\nscorer: {match: whole}\n", ":3: scorer", "has a kind", "kind"),
        ("name: t\nprompts: [a]\nscorer: {kind: regex}\n", ":3: scorer.pattern", "required", "pattern"),
        ("name: t\nprompts: [a]\nscorer: {kind: regex, pattern: '('}\n", ":3: scorer", "regular expr", "escape"),
        ("name: t\nprompts: [{prompt: a, reference: x}]\nscorer: numeric\n", ":2", "not a number", "1234.5"),
        ("name: t\nprompts: [a]\nscorer: {kind: json_schema, file: x}\n", ":3: scorer", "can't be read", "path"),
        ("name: t\nprompts: [a]\nscorer: {kind: python, file: own.py}\n", ":3: scorer", "runs own.py", "--allow"),
        ("name: t\ndata: r.csv\ncolumns: {promt: a}\nscorer: exact\n", ":3: columns.promt", "no part", "prompt"),
        ("name: t\nbenchmark: {task: x, limt: 3}\n", ":2: benchmark.limt", "unknown key", "limit"),
        ("name: t\nbenchmark: {task: x}\nscorer: exact\n", ":3: scorer", "scorer is for tasks", "keep one"),
        ("name: t\nbenchmark: {task: x, include: gone}\n", ":2: benchmark.include", "no folder", "folder"),
        ("- name: t\n", "task.yaml", "mapping of sections", "name:"),
        ("name: [t\n", ":2:1", "not valid YAML", "line"),
        ("", "task.yaml", "mapping of sections", "name:"),
    ],
)  # fmt: skip
def test_faults_have_a_place_and_a_fix(tmp_path: Path, text: str, where: str, what: str, fix: str) -> None:
    """Catches a fault without its line, or one that is told in pydantic's words."""
    (found,) = faults(tmp_path, text)
    assert where in str(found.where), str(found)
    assert what in found.what, str(found)
    assert fix in str(found.fix), str(found)


def test_all_faults_are_told_together(tmp_path: Path) -> None:
    text = CAPITALS.replace("max_new_tokens: 8", "max_new_tokens: x").replace("name: capitals", "nam: capitals")
    assert len(faults(tmp_path, text)) == 3
    rows_in(tmp_path, {"prompt": "a"}, {"prompt": 3, "reference": "x"}, {"prompt": "b", "reference": "x"})
    found = faults(tmp_path, "name: t\ndata: rows.jsonl\nscorer: exact\n")
    assert [error.where for error in found] == ["rows.jsonl:1", "rows.jsonl:2"]


def test_several_files_are_checked_together(tmp_path: Path) -> None:
    """Catches two tasks of one name, of whose results one would be overwritten."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.yaml").write_text(CAPITALS)
    (tmp_path / "c.yaml").write_text("name: c\n")
    with pytest.raises(WhetErrors) as caught:
        load_tasks([str(tmp_path / "*.yaml")])
    assert [Path(str(e.where).partition(":")[0]).name for e in caught.value.errors] == ["c.yaml", "b.yaml"]
    with pytest.raises(WhetError, match="no task file matches"):
        load_tasks([str(tmp_path / "*.yml")])
    with pytest.raises(WhetError, match="no such task"):
        load_tasks([str(tmp_path / "gone.yaml")])


def test_python_of_the_users_own_runs_when_it_is_allowed(tmp_path: Path) -> None:
    """Catches a task file that runs code because somebody evaluated it."""
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef score(*args): return 1\n")
    text = "name: t\nprompts: [a]\nscorer: {kind: python, file: own.py}\n"
    faults(tmp_path, text)
    assert not (tmp_path / "ran").exists()
    assert run_task(task_in(tmp_path, text, allow_python=True), Says({})).mean == 1


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from(
    ["name", "prompts", "data", "columns", "chat", "system", "choices", "generation", "scorer", "limit"]
)


@given(st.dictionaries(KEYS, JUNK, max_size=6))
def test_junk_is_a_fault_and_never_a_traceback(tmp_path_factory: pytest.TempPathFactory, junk: dict[str, Any]) -> None:
    folder = tmp_path_factory.mktemp("junk")
    text = yaml.safe_dump({"name": "t", "prompts": [{"prompt": "a", "reference": "b"}], "scorer": "exact"} | junk)
    with suppress(WhetError):
        assert task_in(folder, text).questions


# ---------------------------------------------------------------- running them


def test_answers_are_scored_and_kept(tmp_path: Path) -> None:
    """Catches an answer that is scored against its neighbour's reference."""
    task = task_in(tmp_path, CAPITALS)
    shown = [question.prompt.shown for question in task.questions]
    model = Says({shown[0]: "paris, of course", shown[1]: "Roma", shown[2]: "Lisbon"})
    results = run_tasks([task], model)
    result = results["capitals"]
    assert result.scores == [1, 1, 0]
    assert result.mean == pytest.approx(2 / 3)
    assert (result.model, result.scorer, result.digest) == ("table", "normalized", task.digest)
    save_results(results, tmp_path / "out")
    assert load_results(tmp_path / "out") == results


@pytest.mark.parametrize("chat", ["true", "false"])
def test_choices_go_on_from_their_prompt(tmp_path: Path, chat: str) -> None:
    """Catches words that run together where a text goes on, and a chat's answer that begins with a space."""
    text = f"name: t\nchat: {chat}\nchoices: [yes it is, 'no']\nprompts: [{{prompt: 'Is it?', reference: 'no'}}]\n"
    model = Says({})
    result = run_task(task_in(tmp_path, f"{text}scorer: choice\n"), model)
    assert model.joined == [["yes it is", "no"] if chat == "true" else [" yes it is", " no"]]
    assert (result.items[0].answer, result.mean) == ("no", 1)


@dataclass(frozen=True)
class Failure:
    note: str


@dataclass(frozen=True)
class Reply:
    text: str | None
    failure: Failure | None = None
    refusal: str | None = None


class Fails(Says):
    """A served model: one of its answers does not come, and it declines to give another."""

    def replies(self, prompts: Sequence[Prompt], how: Generation) -> list[Reply]:
        return [Reply("Paris"), Reply(None, Failure("timed out")), Reply(None, Failure("refuses"), refusal="Sorry.")]


def test_an_answer_that_did_not_come_counts_as_wrong_and_says_why(tmp_path: Path) -> None:
    """Catches an evaluation that one timeout ends, or that leaves unanswered questions out of the mean."""
    result = run_task(task_in(tmp_path, CAPITALS), Fails({}))
    assert [item.score for item in result.items] == [1, None, 0]
    assert result.mean == pytest.approx(1 / 3)
    assert (result.unscored, result.items[1].note) == (1, "timed out")
    assert result.items[2].answer == "Sorry."


def test_a_benchmark_needs_a_model_in_memory(tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_text("name: b\nbenchmark: {task: hellaswag}\n")
    task = load_task(tmp_path / "b.yaml")
    assert isinstance(task, BenchmarkTask)
    with pytest.raises(WhetError, match="in memory"):
        run_task(task, Says({}))


def test_the_built_in_model_answers(tmp_path: Path) -> None:
    """The whole way once, with generation and with log-likelihood, on real weights."""
    import whet

    model, tokenizer = whet.FastLanguageModel.from_pretrained("builtin:tiny", load_in_4bit=False, dtype="float32")
    asked = InMemory(model, tokenizer, "tiny")
    generated = run_task(task_in(tmp_path, CAPITALS), asked)
    assert all(item.answer for item in generated.items)
    assert not any("." in item.answer for item in generated.items)
    chosen = run_task(
        task_in(tmp_path, "name: t\nprompts: [{prompt: a, reference: x, choices: [x, y z]}]\nscorer: choice\n"), asked
    )
    assert chosen.items[0].answer in ("x", "y z")
    assert "'x' -" in str(chosen.items[0].note)


# ---------------------------------------------------------------- results as files

ITEMS = st.builds(
    Item, st.text(), st.text(), st.none() | st.text(), st.text(), st.none() | st.floats(0, 1), st.none() | st.text()
)


@given(st.lists(ITEMS, min_size=1, max_size=4, unique_by=lambda item: item.id), st.text(), st.floats(0, 1e6))
def test_results_are_read_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, items: list[Item], text: str, seconds: float
) -> None:
    """Catches line separators inside answers that tear a file."""
    result = TaskResult(text, text, text, tuple(items), seconds, text, {text: seconds})
    path = tmp_path_factory.mktemp("results") / "t.jsonl"
    try:
        result.save(path)
    except UnicodeEncodeError:
        pytest.fail("JSON escapes what UTF-8 can't hold")
    assert TaskResult.load(path) == result


def damaged(text: str) -> dict[str, str]:
    lines = text.splitlines(keepends=True)
    return {
        "empty": "", "torn": text[:-5], "cut": "".join(lines[:-1]),
        "no items": lines[0].replace('"items": 2', '"items": 0'),
        "twice": "".join([lines[0], lines[1], lines[1]]), "score": text.replace('"score": 1.0', '"score": 1.5'),
        "nan": text.replace('"score": 1.0', '"score": NaN'), "text": text.replace('"score": 1.0', '"score": "1"'),
        "true": text.replace('"score": 1.0', '"score": true'), "json": text.replace("{", "(", 1),
        "missing": text.replace('"answer"', '"answr"'), "version": text.replace('"version": 1', '"version": 2'),
        "list": "[]\n" + "".join(lines[1:]), "measure": text.replace('{"m": 0.5}', '{"m": "x"}'), "bytes": "\udcff",
    }  # fmt: skip


@pytest.mark.parametrize("kind", damaged("\n\n"))
def test_results_that_are_damaged_are_refused(tmp_path: Path, kind: str) -> None:
    """Catches a gate that ships on half a file."""
    items = (Item("1", "p", "r", "a", 1.0), Item("2", "p", None, "a", None, "why"))
    path = tmp_path / "t.jsonl"
    TaskResult("t", "d", "m", items, 1.0, measures={"m": 0.5}).save(path)
    spoiled = damaged(path.read_text())[kind]
    assert spoiled != path.read_text()
    path.write_bytes(spoiled.encode("utf-8", "surrogateescape"))
    with pytest.raises(WhetError) as caught:
        TaskResult.load(path)
    assert str(path) in str(caught.value.where)
    assert caught.value.fix


def test_results_that_are_not_there_or_were_renamed(tmp_path: Path) -> None:
    with pytest.raises(WhetError, match="no results here"):
        TaskResult.load(tmp_path / "t.jsonl")
    with pytest.raises(WhetError, match="no results here"):
        load_results(tmp_path)
    result = TaskResult("t", "d", "m", (Item("1", "p", "r", "a", 1.0),), 1.0)
    replace(result, task="other").save(tmp_path / "t.jsonl")
    with pytest.raises(WhetError, match="results of other"):
        load_results(tmp_path)
