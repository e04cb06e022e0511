"""Each check finds what was planted, in the rows it was planted in; sets without faults get nothing above a note."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from quickstart.entries import Entry, summary
from quickstart.make_data import question, rows
from tests.data.conftest import named
from whet.data.chat_formats import CHAT_FORMATS
from whet.data.doctor import Finding, Place, examine, show, to_json
from whet.data.examples import Conversation, Example, Preference, Text
from whet.data.similar.tasks import read_tasks
from whet.data.template import render

ROWS = 200


@cache
def documented() -> tuple[tuple[Entry, str], ...]:
    """Entries of Python's documentation that differ from each other, and the package each is of."""
    return tuple(rows())


def chat(asked: str, answer: str, line: int, *, source: str = "train.jsonl", **more: Any) -> Conversation:
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return Conversation(messages=messages, source=source, line=line, **more)


def clean_set(count: int = ROWS, *, first: int = 0, source: str = "train.jsonl") -> list[Example]:
    """Questions about Python's library, answered by its documentation. Line i + 1 is row i."""
    chosen = documented()[first::5][:count]
    asked = [
        f"What does {entry.module}.{entry.name} do? Line {i}: {entry.signature}" for i, (entry, _) in enumerate(chosen)
    ]
    return [
        chat(text, summary(entry.doc), line, source=source)
        for line, (text, (entry, _)) in enumerate(zip(asked, chosen, strict=True), start=1)
    ]


def labelled_set() -> list[Example]:
    """The quickstart's own task: sixteen labels."""
    return [chat(question(entry), package, line) for line, (entry, package) in enumerate(documented(), start=1)]


def said(example: Example) -> tuple[str, str]:
    assert isinstance(example, Conversation)
    asked, answer = (message["content"] for message in example.messages)
    return asked, answer


def found_in(findings: Sequence[Finding], check: str) -> Finding:
    (finding,) = [finding for finding in findings if finding.check == check]
    return finding


def lines(finding: Finding) -> list[int]:
    return [int(place.where.rpartition(":")[2]) for place in finding.places]


def planted(answers: dict[int, str], *, questions: dict[int, str] | None = None) -> list[Example]:
    """The clean set with some answers, and questions, put in the place of its own, by line."""
    examples = clean_set()
    for line in {**answers, **(questions or {})}:
        asked, answer = said(examples[line - 1])
        examples[line - 1] = chat((questions or {}).get(line, asked), answers.get(line, answer), line)
    return examples


@pytest.mark.parametrize("with_tokenizer", [False, True])
def test_clean_sets_get_notes_at_most(with_tokenizer: bool):
    """Catches a threshold that an honest set crosses: free answers, and labels."""
    options: dict[str, Any] = {"tokenizer": named("chatml"), "max_length": 4096} if with_tokenizer else {}
    for examples in (clean_set(), labelled_set()):
        findings = examine(examples, **options)
        assert [finding for finding in findings if finding.severity != "note"] == []
        assert {finding.check for finding in findings} <= {"labels", "very long rows", "near duplicates"}


def test_a_clean_split_has_no_leak():
    heldout = clean_set(40, first=1, source="eval.jsonl")
    assert not [f for f in examine(clean_set(60, first=3), heldout) if "leaks" in f.check]


# ---------------------------------------------------------------- repeats


def test_duplicates_are_told_with_what_they_repeat():
    examples = clean_set()
    asked, answer = said(examples[9])
    examples += [chat(asked, answer, line) for line in (ROWS + 1, ROWS + 2, ROWS + 3)]
    longest = max(examples, key=lambda example: len(said(example)[1]))
    asked, answer = said(longest)
    examples.append(chat(asked, f"{answer} Indeed.", ROWS + 4))
    findings = examine(examples)
    exact = found_in(findings, "exact duplicates")
    assert (exact.severity, lines(exact)) == ("warning", [ROWS + 1, ROWS + 2, ROWS + 3])
    assert exact.places[0] == Place(f"train.jsonl:{ROWS + 1}", "as train.jsonl:10")
    alike = found_in(findings, "near duplicates")
    assert not {ROWS + 1, ROWS + 2, ROWS + 3} & set(lines(alike))
    assert alike.places[-1] == Place(f"train.jsonl:{ROWS + 4}", f"as {longest.where}")


def test_leaks_are_errors_and_each_row_is_told_once():
    """Catches a leak that is counted as exact, near and 13-gram at once, or hidden by case and punctuation."""
    train = clean_set()
    copied, quoted = sorted(clean_set(first=1, source="eval.jsonl"), key=lambda example: -len(said(example)[1]))[:2]
    asked, answer = said(copied)
    train.append(chat(asked.upper(), answer.replace(",", " -"), ROWS + 1))
    words = said(quoted)[1].split()
    train.append(chat("Tell me something of Python.", "I have read that " + " ".join(words[2:22]), ROWS + 2))
    findings = examine(train, [copied, quoted])
    leaks = [finding for finding in findings if finding.check.startswith("leaks")]
    assert {finding.severity for finding in leaks} == {"error"}
    assert leaks == findings[: len(leaks)]
    assert found_in(leaks, "leaks (exact)").places == (Place(f"train.jsonl:{ROWS + 1}", f"as {copied.where}"),)
    assert found_in(leaks, "leaks (13-gram)").places == (Place(f"train.jsonl:{ROWS + 2}", f"as {quoted.where}"),)


def test_rows_that_hold_a_task_s_question_are_leaks(tmp_path: Path):
    """Catches a doctor that calls a set clean which holds the benchmark it will be measured by."""
    train = clean_set(60, first=3)
    asked, quoted = sorted((said(example)[1] for example in clean_set(first=4)), key=len)[-2:]
    train.append(chat(asked.upper(), "I don't know.", 61))
    train.append(chat("Tell me something of Python.", "I read: " + " ".join(quoted.split()[2:22]), 62))
    train.append(chat("Is that so, in your opinion?", "yes", 63))
    rows = [{"question": asked, "answer": "yes"}, {"question": quoted, "answer": "no"}]
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tasks = read_tasks(["tasks.jsonl"], tmp_path)
    heldout = clean_set(40, first=1, source="eval.jsonl")
    for held in ((), heldout):
        leaks = [finding for finding in examine(train, held, tasks=tasks) if finding.check.startswith("leaks")]
        assert found_in(leaks, "leaks (exact)").places == (Place("train.jsonl:61", "as tasks.jsonl:1"),)
        assert found_in(leaks, "leaks (13-gram)").places == (Place("train.jsonl:62", "as tasks.jsonl:2"),)
    assert not [finding for finding in examine(train, heldout) if finding.check.startswith("leaks")]


# ---------------------------------------------------------------- markup and tokens


@pytest.mark.parametrize("name", [chat_format.name for chat_format in CHAT_FORMATS])
def test_a_conversation_rendered_by_any_named_template_is_seen(name: str):
    """Catches a template whose marks no pattern knows."""
    messages = [{"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "Hello"}]
    text = render(named(name), messages)
    findings = examine(planted({}, questions={7: f"As before.\n\n{text}"}))
    (finding,) = [f for f in findings if f.check in ("template marks", "roles in texts")]
    assert (finding.severity, lines(finding)) == ("warning", [7])


@pytest.mark.parametrize(
    ("answer", "is_found"),
    [
        ("Assistant: It sorts the list.", True),
        ("**User**: Hello\n**Assistant**: Hello to you", True),
        ("Human: Hi\n\nAI: Hi", True),
        ("The user: a person who calls.", False),
        ("User: the name of the account\nHost: the name of the server", False),
        ("It is called with a system: Linux.", False),
    ],
)
def test_roles_in_texts(answer: str, is_found: bool):
    """Catches a field called User taken for a turn, and a turn that is missed."""
    findings = examine(planted({3: answer}))
    assert [lines(f) for f in findings if f.check == "roles in texts"] == ([[3]] if is_found else [])


def test_special_tokens_of_the_tokenizer_are_errors_in_messages_alone():
    examples = planted({5: "Done.<|im_end|>\n<|im_start|>user\nMore"})
    examples.append(Text(text="<|im_start|>user\nHi<|im_end|>", source="notes.txt", line=1))
    findings = examine(examples, tokenizer=named("chatml"))
    special = found_in(findings, "special tokens")
    assert (special.severity, special.places) == ("error", (Place("train.jsonl:5", "<|im_end|>"),))
    assert found_in(findings, "rendered texts").places == (Place("notes.txt:1", "<|im_start|>"),)
    assert "special tokens" not in {f.check for f in examine(examples, tokenizer=None)}


def test_cut_barren_and_refused_rows():
    examples = planted({}, questions={4: "word " * 600, 8: "word " * 10})
    examples.append(chat("word " * 40, "long " * 400, ROWS + 1))
    examples.append(
        Conversation(
            messages=[
                {"role": "user", "content": "Add 1 and 2."},
                {"role": "tool", "content": "3"},
                {"role": "assistant", "content": "It is three."},
            ],
            source="tools.jsonl",
            line=9,
        )
    )
    findings = examine(examples, tokenizer=named("mistral"), max_length=1000)
    assert lines(found_in(findings, "cut rows")) == [4, ROWS + 1]
    assert lines(found_in(findings, "nothing to learn from")) == [4]
    refused = found_in(findings, "refused by the template")
    assert (refused.severity, [place.where for place in refused.places]) == ("error", ["tools.jsonl:9"])
    assert "role" in refused.places[0].detail


def test_a_doubled_first_token():
    """Catches a template that writes the first token before a text that has it already."""
    examples: list[Example] = [chat("<s>Hello", "Hi", 2)]
    findings = examine(examples, tokenizer=named("llama-3"))
    assert "doubled first token" not in {f.check for f in findings}  # the role stands between
    text = Text(text="<s><s>Hello", source="a.txt", line=1)
    doubled = found_in(examine([text], tokenizer=named("llama-3")), "doubled first token")
    assert (doubled.severity, lines(doubled)) == ("error", [1])


# ---------------------------------------------------------------- answers


def test_near_constant_answers():
    most = dict.fromkeys(range(1, 80), "Please ask your administrator.")
    finding = found_in(examine(planted(most)), "near-constant answers")
    assert (finding.severity, lines(finding)) == ("warning", list(range(1, 80)))
    always = dict.fromkeys(range(1, ROWS), "Please ask your administrator.")
    assert found_in(examine(planted(always)), "near-constant answers").severity == "error"


def test_labels_that_are_rare_or_spelled_otherwise():
    examples = labelled_set()
    for line, answer in ((10, "Email"), (20, "logging."), (30, "shelve"), (40, "shelve")):
        examples[line - 1] = chat(said(examples[line - 1])[0], answer, line)
    findings = examine(examples)
    assert lines(found_in(findings, "label spellings")) == [10, 20]
    assert lines(found_in(findings, "rare labels")) == [30, 40]
    assert found_in(findings, "labels").what.startswith("17 labels: the largest has ")
    assert "rare labels" not in {f.check for f in examine(clean_set())}


def test_one_label_for_nearly_all_rows():
    examples = [chat(question(entry), "no" if i % 50 else "yes", i) for i, (entry, _) in enumerate(documented())]
    assert found_in(examine(examples), "near-constant answers").severity == "error"


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry, but I can't do that.",
        "I cannot help with this request.",
        "As an AI language model, I have no opinion.",
        "Sorry, I can\u2019t share that.",
        "Es tut mir leid, aber ich kann das nicht.",
        "Je suis désolé, mais je ne peux pas.",
    ],
)
def test_refusals(answer: str):
    findings = examine(planted({11: answer, 12: "I cannot recommend this book enough.", 13: "Sorry to hear that."}))
    assert lines(found_in(findings, "refusals")) == [11]


def test_many_refusals_are_a_warning():
    refused = {n: f"I cannot answer question {n}, for it is about something else." for n in range(1, 21)}
    assert found_in(examine(planted(refused)), "refusals").severity == "warning"


def test_answers_that_copy_the_question():
    asked = [said(example)[0] for example in clean_set()[:2]]
    long = "Which of the modules of this library would you use for reading mail?"
    changed = planted({1: asked[0], 2: asked[1].upper(), 3: f"{long}\nThe one called mailbox."}, questions={3: long})
    assert lines(found_in(examine(changed), "copied questions")) == [1, 2, 3]
    assert "copied questions" not in {f.check for f in examine([chat("Hello", "Hello, how are you?", 1)])}
    thanks = Conversation(
        messages=[chat("", "Thanks.", 1).messages[1], chat("Thanks.", "", 1).messages[0]], source="a", line=1
    )
    assert examine([thanks]) == []  # what a user says after the last answer is no question


def test_contradicting_answers():
    examples = clean_set()
    asked, _ = said(examples[19])
    examples += [chat(f" {asked}", "Nothing at all.", ROWS + 1), chat("Other: " + asked, "No.", ROWS + 2)]
    finding = found_in(examine(examples), "contradicting answers")
    assert finding.places == (Place("train.jsonl:20"), Place(f"train.jsonl:{ROWS + 1}", "asked as train.jsonl:20"))
    follow_up = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    asked_later = {"role": "user", "content": asked}, {"role": "assistant", "content": "Nothing at all."}
    talk = Conversation(messages=[*follow_up, *asked_later], source="b.jsonl", line=1)
    assert "contradicting answers" not in {f.check for f in examine([*clean_set(), talk])}


# ---------------------------------------------------------------- lengths, damage, languages


def test_lengths_far_from_the_others():
    findings = examine(planted({6: "x", 9: "very " * 9000}, questions={6: "?"}))
    assert lines(found_in(findings, "very long rows")) == [9]
    assert lines(found_in(findings, "very short rows")) == [6]
    even = [chat(f"Number {n:04}?", f"It is {n * 7919 % 9973:04}.", n) for n in range(100)]
    assert not [f for f in examine(even) if f.check.startswith("very")]


@pytest.mark.parametrize(
    ("check", "text", "severity"),
    [
        ("mojibake", "It isnâ€™t read as UTF-8, nor is the cafÃ©.", "warning"),
        ("unreadable bytes", "The caf\ufffd is open.", "warning"),
        ("control characters", "Red \x1b[31mtext\x1b[0m in a log.", "warning"),
        ("HTML entities", "Salt &amp; pepper&nbsp;here", "warning"),
        ("empty answers", "\u200b \ufeff", "error"),
    ],
)
def test_damaged_texts(check: str, text: str, severity: str):
    found = found_in(examine(planted({15: text, 16: "Über naïve façades: “Qué?” — 日本語, Привет, Ελλάδα."})), check)
    assert (found.severity, lines(found)) == (severity, [15])


def test_languages():
    other = "Diese Antwort steht auf Deutsch, obwohl auf Englisch gefragt worden ist, und das ist Nummer "
    findings = examine(planted({n: f"{other}{n}." for n in range(1, 41)}))
    mix = found_in(findings, "language mix")
    assert (mix.severity, sorted(lines(mix))) == ("note", list(range(1, 41)))
    assert {place.detail for place in mix.places} == {"de"}


def test_answers_in_another_language_than_the_question():
    german = (
        "Welches Modul der Standardbibliothek liest Nachrichten aus einem Postfach, und wie heißt die Klasse? Nummer "
    )
    english = "The module is called mailbox, and its class is Mailbox; see the documentation of the library, item "
    examples = [chat(f"{german}{n}", f"{english}{n}", n) for n in range(1, 41)]
    finding = found_in(examine(examples), "language switches")
    assert sorted(lines(finding)) == list(range(1, 41))
    assert {place.detail for place in finding.places} == {"de to en"}


# ---------------------------------------------------------------- all together


def test_tool_calls_and_pairs_are_no_empty_answers():
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": "{}"}}]}
    turns = [{"role": "user", "content": "Add."}, call, {"role": "tool", "content": "3"}]
    talk = Conversation(messages=[*turns, {"role": "assistant", "content": "Three."}], source="a", line=1)
    pair = Preference(
        prompt=turns[:1],
        chosen=[{"role": "assistant", "content": "Four."}],
        rejected=[{"role": "assistant", "content": "No idea."}],
        source="a",
        line=2,
    )
    assert examine([talk, pair]) == []
    assert examine([]) == []


def faulty_set() -> list[Example]:
    secret = "Jane Roe, 555-0100"
    faults = {3: f"{secret} &amp; more", 4: f"{secret}\ufffd", 5: f"I cannot help {secret}", 6: f"Assistant: {secret}"}
    faults |= {7: f"{secret} <|im_end|>", 8: f"{secret} â€™", 9: f"{secret} " * 900}
    examples = planted(faults, questions={10: secret, 11: secret})
    return [*examples, chat(secret, secret, ROWS + 1), chat(secret, secret, ROWS + 2)]


def test_no_text_of_a_record_is_told_unless_asked_for():
    """Catches a check that quotes the row in its message, in a terminal or in JSON."""
    heldout = [chat("Jane Roe, 555-0100", "Jane Roe, 555-0100", 1, source="eval.jsonl")]
    for show_text in (False, True):
        findings = examine(faulty_set(), heldout, named("chatml"), max_length=500, show_text=show_text)
        assert len(findings) >= 10
        output = io.StringIO()
        show(findings, Console(file=output, width=200))
        told = output.getvalue() + json.dumps(to_json(findings)) + repr(findings)
        assert ("Jane" in told) == show_text


def test_the_report_is_the_same_in_any_order_of_the_rows():
    """Catches a finding that rests on which rows come first, beyond the order in which they are named."""
    examples = faulty_set()
    shuffled = random.Random(3).sample(examples, len(examples))
    first_only = ("exact duplicates", "near duplicates", "contradicting answers")  # tell all rows but the first
    told = [
        {
            (f.check, f.severity, f.rows, f.what, tuple(sorted(f.places)) if f.check not in first_only else ())
            for f in examine(some)
        }
        for some in (examples, shuffled)
    ]
    assert told[0] == told[1]


def test_the_table_names_five_places_and_hides_what_a_terminal_would_obey():
    output = io.StringIO()
    source = "evil\x1b[2J[red].jsonl"
    places = tuple(Place(f"{source}:{n}", excerpt="\x1b]0;title\x07") for n in range(8))
    findings = [Finding("mojibake", "warning", places, "What [bold]it[/bold] is.", "Mend it.")]
    bare = tuple(Place(f"evil\x1b[2J.jsonl:{n}") for n in range(2))
    findings += [Finding("labels", "note", (), "Labels.", "None."), Finding("cut rows", "note", bare, "Cut.", "Part.")]
    show(findings, Console(file=output, width=120))
    text = output.getvalue()
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "[red].jsonl:4" in text
    assert ".jsonl:5" not in text
    assert "and 3 more" in text
    assert "1 warning, 2 notes" in text
    show([], Console(file=output))
    assert output.getvalue().endswith("nothing found\n")


def test_json_holds_the_counts_and_as_many_places_as_asked_for():
    findings = examine(planted({n: "Caf\ufffd number " + str(n) for n in range(1, 9)}))
    (value,) = [v for v in to_json(findings) if v["check"] == "unreadable bytes"]
    assert value["rows"] == 8
    assert value["places"] == [{"where": f"train.jsonl:{n}"} for n in range(1, 6)]
    (value,) = [v for v in to_json(findings, places=None) if v["check"] == "unreadable bytes"]
    assert len(value["places"]) == 8
