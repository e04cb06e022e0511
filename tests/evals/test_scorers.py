"""Scorers against the libraries that define them, and against answers that a naive one gets wrong."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whet.errors import WhetError
from whet.evals.judge.grading import Judge
from whet.evals.models import Prompt
from whet.evals.scorers import KINDS, kind_of
from whet.evals.scorers.base import Question, Score, Scorer
from whet.evals.scorers.json_schema import Unreadable, read, same
from whet.evals.scorers.judge import Judged

TEXTS = st.text(st.characters(codec="utf-8"), max_size=60)


def scorer(kind: str, folder: Path = Path(), **options: Any) -> Scorer:
    found = KINDS[kind]
    return found.build(found.options.model_validate(options), folder)


def question(*references: str, choices: Sequence[str] = (), **extra: Any) -> Question:
    return Question("q", Prompt(text="asked"), references, tuple(choices), extra)


def score(kind: str, answer: str, *references: str, **options: Any) -> Score:
    asked = question(*references)
    made = scorer(kind, **options)
    made.check(asked)
    (found,) = made.score([asked], [answer])
    return found


@pytest.mark.parametrize(
    ("answer", "options", "worth"),
    [
        (" Paris\n", {}, 1), ("Rome", {}, 1), ("paris", {}, 0), ("Paris.", {}, 0), ("", {}, 0),
        ("Paris, of course", {"match": "begins"}, 1), ("It is Paris", {"match": "begins"}, 0),
        ("It is Paris", {"match": "contains"}, 1),
    ],
)  # fmt: skip
def test_exact(answer: str, options: dict[str, Any], worth: float) -> None:
    """Catches a second reference that is never looked at."""
    assert score("exact", answer, "Paris ", "Rome", **options).value == worth


@pytest.mark.parametrize(
    ("answer", "reference", "options", "worth"),
    [
        ("the  Eiffel\ttower!", "The Eiffel Tower", {}, 1),
        ("Eiffel Tower", "The Eiffel Tower", {}, 0),
        ("Eiffel Tower", "The Eiffel Tower", {"articles": False}, 1),
        ("Theme", "me", {"articles": False}, 0),
        ("STRASSE", "straße", {}, 1),
        ("ﬁne café", "fine cafe\u0301", {}, 1),
        ("«Oui»", "oui", {}, 1),
        ("C++", "C", {"punctuation": True}, 0),
        ("Paris", "paris", {"case": True}, 0),
    ],
)
def test_normalized(answer: str, reference: str, options: dict[str, Any], worth: float) -> None:
    assert score("normalized", answer, reference, **options).value == worth


def test_a_reference_of_which_nothing_is_left_is_refused() -> None:
    """Catches a task on punctuation that every answer without words gets right."""
    with pytest.raises(WhetError, match="nothing of the reference"):
        score("normalized", "x", "?!")


@given(TEXTS)
def test_normalized_is_squad_on_ascii(text: str) -> None:
    """Against the evaluation script of SQuAD 1.1, written out."""
    import re
    import string

    ascii_only = text.encode("ascii", "ignore").decode()
    plain = "".join(c for c in ascii_only.lower() if c not in set(string.punctuation))
    squad = " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())
    assert scorer("normalized", articles=False).normal(ascii_only) == squad  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("answer", "options", "references", "worth"),
    [
        ("So the answer is B.", {"pattern": r"answer is (\w)"}, ["B"], 1),
        ("answer is A. No, the answer is B", {"pattern": r"answer is (\w)", "take": "last"}, ["B"], 1),
        ("answer is A. No, the answer is B", {"pattern": r"answer is (\w)"}, ["B"], 0),
        ("ANSWER IS b", {"pattern": r"answer is (\w)", "ignore_case": True}, ["B"], 1),
        ("2024-01-31", {"pattern": r"\d{4}-\d\d-\d\d"}, [], 1),
        ("none", {"pattern": r"\d{4}-\d\d-\d\d"}, [], 0),
        ("ab", {"pattern": r"a(x)?b"}, [""], 1),
    ],
)
def test_regex(answer: str, options: dict[str, Any], references: list[str], worth: float) -> None:
    assert score("regex", answer, *references, **options).value == worth


def test_a_pattern_that_takes_for_ever_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an evaluation that hangs on one answer."""
    monkeypatch.setattr("whet.evals.scorers.text.PATTERN_SECONDS", 0.2)
    found = score("regex", "a" * 60, "x", pattern=r"^((?:a|aa|b|ab)+)+$[^a]")
    assert found.value == 0
    assert "took more than" in str(found.note)


@pytest.mark.parametrize(
    ("answer", "reference", "options", "worth"),
    [
        ("It costs $1,234.50.", "1234.5", {}, 1),
        ("5 apples and 7 pears", "7", {}, 1),
        ("5 apples and 7 pears", "5", {"take": "first"}, 1),
        ("\u221242", "-42", {}, 1),
        ("from 5-7", "7", {}, 1),
        ("10,5 €", "10,5", {"decimal": ","}, 1),
        ("1.234,5", "1234,5", {"decimal": ","}, 1),
        ("1e3", "1000", {}, 1),
        ("3.1", "3.14", {"absolute": 0.04}, 1),
        ("10,5", "10.5", {"decimal": ","}, 1),
        ("3.1", "3.14", {"absolute": 0.01}, 0),
        ("103", "100", {"relative": 0.03}, 1),
        ("104", "100", {"relative": 0.03}, 0),
        ("the 12 and more", "12", {"take": "whole"}, 0),
        ("$12", "12", {"take": "whole"}, 1),
        ("none", "0", {}, 0),
        ("x" + "9" * 400, "1", {}, 0),
        ("9" * 400, "1", {}, 0),
        ("1e999999999", "1", {}, 0),
        ("v2", "2", {}, 0),
    ],
)
def test_numeric(answer: str, reference: str, options: dict[str, Any], worth: float) -> None:
    assert score("numeric", answer, reference, **options).value == worth


@given(st.floats(-1e12, 1e12).map(lambda x: round(x, 3)))
def test_numeric_reads_what_python_writes(number: float) -> None:
    for written in (f"about {number}", f"it is {number:,.3f} or so", f"{number:e}"):
        assert score("numeric", written, repr(number), absolute=1e-3, relative=1e-6).value == 1


@pytest.mark.parametrize("reference", ["one", "", "nan", "1e999999999", "1 or 2"])
def test_a_reference_that_is_no_number_is_a_fault_of_the_task(reference: str) -> None:
    with pytest.raises(WhetError, match="not a number"):
        score("numeric", "1", reference)


# ---------------------------------------------------------------- JSON

SCHEMA = {
    "type": "object",
    "properties": {"total": {"type": "number"}},
    "required": ["total"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("answer", "worth", "note"),
    [
        ('{"total": 3}', 1, None),
        ('{"total": "3"}', 0, "$.total"),
        ("{}", 0, "required"),
        ('{"total": 3, "tax": 1}', 0, "tax"),
        ('{"total": NaN}', 0, "not JSON"),
        ('Sure! {"total": 3}', 0, "not JSON"),
        ("[" * 100_000, 0, "not JSON"),
        ("", 0, "not JSON"),
    ],
)
def test_json_schema(answer: str, worth: float, note: str | None) -> None:
    found = score("json_schema", answer, schema=SCHEMA)
    assert found.value == worth
    assert note is None or note in str(found.note)


def test_json_between_marks_and_equal_to_the_reference() -> None:
    """Catches an invoice whose numbers are wrong but whose keys are right."""
    answer = 'Here it is:\n```json\n{"total": 3.0}\n```\nAnything else?'
    assert score("json_schema", answer, schema=SCHEMA, find="block").value == 1
    assert score("json_schema", answer, '{"total": 3}', schema=SCHEMA, find="block", equals_reference=True).value == 1
    assert score("json_schema", answer, '{"total": 4}', schema=SCHEMA, find="block", equals_reference=True).value == 0
    assert score("json_schema", "no block", schema=SCHEMA, find="block").value == 0


def test_a_schema_reaches_for_nothing_outside(tmp_path: Path) -> None:
    """Catches a $ref that jsonschema fetches from the network, or from a file."""
    (tmp_path / "schema.json").write_text("true")
    for address in ("http://example.com/schema.json", f"file://{tmp_path}/schema.json"):
        (found,) = scorer("json_schema", schema={"$ref": address}).score([question()], ["1"])
        assert found.value is None
        assert address in str(found.note)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"schema": {"type": "nonsense"}}, "not a JSON Schema"),
        ({"file": "no.json"}, "can't be read"),
        ({}, "no schema"),
    ],
)
def test_a_schema_at_fault_is_told_before_anything_is_generated(options: dict[str, Any], what: str) -> None:
    with pytest.raises(WhetError, match=what):
        scorer("json_schema", **options).check(question())


def test_a_row_may_have_a_schema_of_its_own() -> None:
    made = scorer("json_schema", schema=SCHEMA)
    found = made.score([question(schema='{"type": "array"}'), question(schema={"type": "string"})], ["[]", "[]"])
    assert [each.value for each in found] == [1, 0]


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | TEXTS,
        lambda x: st.lists(x) | st.dictionaries(TEXTS, x),
        max_leaves=8,
    )
)
def test_json_is_read_as_it_was_written(value: Any) -> None:
    assert same(read(json.dumps(value)), value)


def test_json_values_of_other_kinds_differ() -> None:
    assert not same(True, 1)
    assert not same([0], [False])
    assert not same({"a": 1}, {"a": 1, "b": 2})
    assert same(1, 1.0)
    assert isinstance(read("nope"), Unreadable)


# ---------------------------------------------------------------- overlap: the libraries' numbers

ANSWERS = ["the cat sat on the mat", "a dog", "", "Der Hund läuft schnell über die Straße", "the the the"]
REFERENCES = [("the cat is on the mat", "there is a cat on the mat"), ("a dog runs",), ("nothing",),
              ("Der Hund rennt schnell über die Straße",), ("the cat", "a cat", "the dog")]  # fmt: skip


@pytest.mark.parametrize("kind", ["rouge1", "rouge2", "rougeL", "rougeLsum"])
@pytest.mark.parametrize("measure", ["fmeasure", "recall"])
def test_rouge_is_the_librarys(kind: str, measure: str) -> None:
    """Catches the wrong of two references, precision in the place of recall, and answer and reference exchanged."""
    from rouge_score.rouge_scorer import RougeScorer

    own = RougeScorer([kind], use_stemmer=True)
    found = scorer("rouge", type=kind, measure=measure, stem=True).score([question(*r) for r in REFERENCES], ANSWERS)
    for each, answer, references in zip(found, ANSWERS, REFERENCES, strict=True):
        best = max((own.score(r, answer)[kind] for r in references), key=lambda s: s.fmeasure)
        assert each.value == pytest.approx(getattr(best, measure))


@pytest.mark.parametrize(
    ("kind", "options", "make"),
    [
        ("bleu", {"lowercase": True}, lambda s, whole: s.BLEU(True, effective_order=not whole)),
        ("bleu", {}, lambda s, whole: s.BLEU(effective_order=not whole)),
        ("bleu", {"tokenize": "char"}, lambda s, whole: s.BLEU(tokenize="char", effective_order=not whole)),
        ("chrf", {}, lambda s, whole: s.CHRF()),
        ("chrf", {"word_order": 2}, lambda s, whole: s.CHRF(word_order=2)),
    ],
)  # fmt: skip
def test_bleu_and_chrf_are_sacrebleus(kind: str, options: dict[str, Any], make: Any) -> None:
    """Catches a mean of sentences in the place of the corpus, and references that move to the next answer."""
    import sacrebleu

    made, questions = scorer(kind, **options), [question(*r) for r in REFERENCES]
    found = made.score(questions, ANSWERS)
    for each, answer, references in zip(found, ANSWERS, REFERENCES, strict=True):
        assert each.value == pytest.approx(make(sacrebleu, False).sentence_score(answer, list(references)).score / 100)
    streams = [[r[i] if i < len(r) else None for r in REFERENCES] for i in range(3)]
    (measured,) = made.measures(questions, ANSWERS).values()
    assert measured == pytest.approx(make(sacrebleu, True).corpus_score(ANSWERS, streams).score)
    assert 0 < measured < 100
    assert measured != pytest.approx(100 * sum(each.value or 0 for each in found) / len(found))


# ---------------------------------------------------------------- choice


def test_the_likeliest_choice_counts_as_the_harness_has_it() -> None:
    """Catches a normalization that divides by tokens, or by the length of the wrong choice."""
    asked = question("long answer", choices=["a", "long answer"])
    plain, even = scorer("choice"), scorer("choice", normalize="characters")
    assert plain.pick(asked, [-2.0, -5.0])[0] == "a"  # type: ignore[attr-defined]
    assert even.pick(asked, [-2.0, -5.0])[0] == "long answer"  # type: ignore[attr-defined]
    assert plain.pick(asked, [float("nan"), -5.0])[0] == "long answer"  # type: ignore[attr-defined]
    assert scorer("choice", normalize="bytes").pick(question(choices=["é", "aa"]), [-2.0, -2.0])[0] == "é"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("reference", "how", "right"), [("1", "index", "b"), ("B", "letter", "b"), ("b ", "text", "b")]
)
def test_what_a_reference_to_a_choice_holds(reference: str, how: str, right: str) -> None:
    made, asked = scorer("choice", reference=how), question(reference, choices=["a", "b"])
    made.check(asked)
    assert [each.value for each in made.score([asked, asked], [right, "a"])] == [1, 0]


@pytest.mark.parametrize(
    ("asked", "what"),
    [
        (question("c", choices=["a", "b"]), "none of the choices"), (question("a", choices=["a"]), "1 choices"),
        (question("a", choices=["a", "a"]), "the same"), (question("a", choices=["a", ""]), "empty"),
    ],
)  # fmt: skip
def test_choices_at_fault(asked: Question, what: str) -> None:
    with pytest.raises(WhetError, match=what):
        scorer("choice").check(asked)


# ---------------------------------------------------------------- embedding


def test_similarity_is_sentence_transformers(tmp_path: Path) -> None:
    """Catches vectors that are not normalized, and a pair that is compared with its neighbour."""
    import sentence_transformers
    from sentence_transformers import models

    import whet.models.load

    folder = whet.models.load.resolve("builtin:tiny")
    offline = {"local_files_only": True}
    transformer = models.Transformer(
        folder, model_kwargs={"dtype": "float32", **offline}, processor_kwargs=offline, config_kwargs=offline
    )
    transformer.tokenizer.pad_token = transformer.tokenizer.pad_token or transformer.tokenizer.eos_token
    built = sentence_transformers.SentenceTransformer(
        modules=[transformer, models.Pooling(transformer.get_word_embedding_dimension())], device="cpu"
    )
    built.save(str(tmp_path / "embedder"), create_model_card=False)
    references = [("a cat", "a small cat"), ("the stock market",)]
    answers = ["a cat on a mat", "trains in Japan"]
    made = scorer("embedding", tmp_path, model="embedder")
    found = made.score([question(*r) for r in references], answers)
    for each, answer, own in zip(found, answers, references, strict=True):
        similarity = built.similarity(built.encode([answer]), built.encode(list(own)))
        assert each.value == pytest.approx(min(1.0, max(0.0, float(similarity.max()))), abs=1e-4)
    assert scorer("embedding", tmp_path, model="embedder", threshold=1.0).score([question("x")], ["y"])[0].value == 0
    assert made.score([question("x")], ["  "])[0] == Score(0.0, "an empty answer")


def test_an_embedding_model_that_is_not_there() -> None:
    with pytest.raises(WhetError, match="no such folder"):
        scorer("embedding", model="sentence-transformers/all-MiniLM-L6-v2")


# ---------------------------------------------------------------- the user's own


def test_a_function_of_the_users_own(tmp_path: Path) -> None:
    """Catches a function whose one bad answer ends the evaluation, or whose 100 is taken for a score."""
    (tmp_path / "own.py").write_text(
        "def score(prompt, references, answer, row):\n"
        "    if answer == 'raise': raise KeyError('gone')\n"
        "    if answer == 'big': return 100\n"
        "    if answer == 'none': return None, 'unclear'\n"
        "    return answer == row['wanted'], prompt\n"
    )
    made = scorer("python", tmp_path, file="own.py")
    answers = ["yes", "no", "raise", "big", "none"]
    found = made.score([question(wanted="yes")] * len(answers), answers)
    assert [each.value for each in found] == [1, 0, None, None, None]
    assert found[0].note == "asked"
    assert "KeyError" in str(found[2].note)
    assert found[4].note == "unclear"


@pytest.mark.parametrize(("text", "what"), [
    ("score = 1\n", "no function"), ("import nothing_here\n", "can't be read"), ("raise SystemExit\n", "can't be read"),
    ("def score(:\n", "can't be read"),
])  # fmt: skip
def test_a_file_of_the_users_at_fault(tmp_path: Path, text: str, what: str) -> None:
    (tmp_path / "own.py").write_text(text)
    with pytest.raises(WhetError, match=what):
        scorer("python", tmp_path, file="own.py")


# ---------------------------------------------------------------- a judge


class Grades:
    """A judge in memory that gives full marks to one answer, and none at all to another."""

    name = "grades"

    def generate(self, prompts: Sequence[Prompt], how: Any) -> list[str]:
        full = json.dumps({"right": {"reason": "as asked", "grade": 5}})
        return [full if "Paris" in prompt.shown else "I like it." for prompt in prompts]

    def choice_logprobs(self, prompts: Any, choices: Any) -> list[list[float]]:
        raise AssertionError


def test_a_judge_scores_as_other_scorers_do() -> None:
    """Catches a verdict that goes to the next answer, and one that did not come taken for a grade."""
    options = {
        "model": "builtin:tiny",
        "criteria": [{"name": "right", "about": "It is right."}],
        "reference": "required",
    }
    settings = KINDS["judge"].options.model_validate(options)
    made = Judged(settings, Judge(settings, model=Grades()))  # type: ignore[arg-type]
    found = made.score([question("r"), question("r")], ["Rome", "Paris"])
    assert [each.value for each in found] == [None, 1]
    assert "no verdict" in str(found[0].note)
    with pytest.raises(WhetError, match="no reference"):
        KINDS["judge"].build(settings, Path()).check(question())


# ---------------------------------------------------------------- all of them


def test_an_unknown_kind_is_told_what_there_is() -> None:
    with pytest.raises(WhetError, match="did you mean 'exact'"):
        kind_of("exakt", "task.yaml:3")


@settings(deadline=None, max_examples=40)
@given(TEXTS, TEXTS.filter(str.strip))
def test_any_answer_gets_a_score_between_0_and_1(answer: str, reference: str) -> None:
    """Catches a scorer that one odd answer brings down."""
    made = {
        "exact": {}, "regex": {"pattern": r"(\w+)"}, "rouge": {}, "bleu": {}, "chrf": {},
        "json_schema": {"schema": SCHEMA}, "numeric": {}, "normalized": {"punctuation": True},
    }  # fmt: skip
    for kind, options in made.items():
        own = "3" if kind == "numeric" else reference
        (found,) = scorer(kind, **options).score([question(own)], [answer])
        assert found.value is not None, kind
        assert 0 <= found.value <= 1, kind
