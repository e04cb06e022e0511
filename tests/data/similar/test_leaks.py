"""Text of the evaluation in a training row is found; what rows share by their nature is not taken for it."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import numpy as np
import pytest
from faker import Faker
from hypothesis import given, settings
from hypothesis import strategies as st

from whet.data.similar import leaks
from whet.data.similar.duplicates import clusters, keepers, sign
from whet.data.similar.leaks import Counts, LeakIndex, Matches, Role, Text, faults_of, near_leaks
from whet.data.similar.tasks import read_tasks
from whet.data.split import hash_of, sides
from whet.errors import WhetError

SYSTEM = (
    "You are the support assistant of Acme Logistics. Answer politely, in the customer's language, and never promise a "
    "refund that the policy does not allow. If an order number is missing, ask for it before anything else."
)
GREETINGS = (
    "Hello {name},",
    "Dear {name}, thank you for contacting Acme Logistics about your order.",
    "Hi {name}! Thanks for reaching out to us today, we are happy to help.",
    "Good morning {name}, I hope this message finds you well on this fine day.",
)
REQUESTS = (
    "My order {order} from {city} has not arrived yet. I was told that it would be delivered by {date}.",
    "I would like to return the {product} that I bought on {date}. It came with a scratch on the left side.",
    "Can you change the delivery address of order {order} to {street} in {city}? I have moved since I placed it.",
    "The {product} in order {order} is not what I asked for. The invoice says {amount} euros, but I paid less.",
    "I was charged {amount} euros twice for order {order}. Please send the second payment back to my account.",
)
ANSWERS = (
    "I have checked order {order} and it is with the carrier in {city}. You will get it by {date} at the latest.",
    "I am sorry about the {product}. A label for sending it back is on its way to {street}; it is valid for a month.",
    "We have refunded {amount} euros. It can take up to five working days until your bank shows the payment.",
)
SIGNATURES = (
    "Kind regards, {agent}, Acme Logistics customer care, open Monday to Friday from nine to five",
    "Best wishes from {agent} and the whole team at Acme Logistics. Please rate this conversation when you can.",
)


NEW_YEAR = date(2026, 1, 1)  # Faker's dates end today otherwise, and the texts would be others every day


def tickets(count: int, seed: int) -> list[list[str]]:
    """Conversations as their messages, made of shared parts, with a free sentence or two in some."""
    fake = Faker("en_US")
    fake.seed_instance(seed)
    draw = random.Random(seed)
    names, cities = [fake.name() for _ in range(400)], [fake.city() for _ in range(300)]
    agents, products = [fake.first_name() for _ in range(12)], ["laptop", "kettle", "office chair", "lamp", "printer"]

    def ticket() -> list[str]:
        slots = {
            "name": draw.choice(names), "city": draw.choice(cities), "agent": draw.choice(agents),
            "product": draw.choice(products), "order": draw.randrange(10**5, 10**6),
            "date": fake.date(end_datetime=NEW_YEAR), "amount": f"{draw.uniform(5, 500):.2f}",
            "street": fake.street_address(),
        }  # fmt: skip
        own = fake.sentence(12) if draw.random() < 0.6 else ""
        question = f"{draw.choice(REQUESTS)} {own}".format(**slots)
        answer = f"{draw.choice(GREETINGS)} {draw.choice(ANSWERS)}\n{draw.choice(SIGNATURES)}".format(**slots)
        return [SYSTEM, question, answer]

    return [ticket() for _ in range(count)]


def gate(training: Sequence[Text], held_out: Sequence[str], roles: Sequence[Role] | None = None) -> Matches:
    index = LeakIndex.build(held_out, roles)
    return index.live(index.count(training)).find(training)


def only_touched(training: Sequence[Text], held_out: Sequence[str]) -> Matches:
    """As `gate`, the second pass on the rows that the first one named."""
    index = LeakIndex.build(held_out)
    counts = index.count(training)
    found = index.live(counts).find([training[i] for i in counts.touched])
    return Matches.of(counts.touched[found.row], found.text, found.kind)


def joined(row: Sequence[str]) -> str:
    return "\n".join(row)


@pytest.fixture(scope="module")
def clean_set() -> tuple[list[list[str]], list[list[str]]]:
    """Training and held-out tickets, without near duplicates, as a pipeline has them."""
    rows = tickets(5000, seed=1)
    said = [joined(row[1:]) for row in rows]
    signatures = sign(said, 0.85)
    labels = clusters(signatures, 0.85)
    kept = np.flatnonzero(keepers(labels, np.array(list(map(len, said))), signatures.exact))
    held = sides(np.array([hash_of(said[i], 0) for i in kept], np.uint64), 0.1)
    return [rows[i] for i in kept[~held]], [rows[i] for i in kept[held]]


def test_a_clean_set_of_shared_templates_greetings_signatures_and_one_system_prompt_is_not_stopped(clean_set):
    """Catches a gate that takes boilerplate, or one name in one template, for a leak."""
    training, held_out = clean_set
    assert len(training) > 3000
    assert len(held_out) > 300
    assert len(gate(training, [joined(row) for row in held_out])) == 0
    assert len(gate([row[1:] for row in training], [joined(row[1:]) for row in held_out])) == 0


TASKS = [
    "What is the maximum weight of a parcel that may be sent to a pickup point in the mountains?",
    "A customer in Lisbon orders three lamps at 20 euros each and returns one. How much is refunded?",
    "Which form must accompany lithium batteries on an aircraft, and who signs it before departure?",
    "How long is a return label valid?",
    "Name the carrier for overnight deliveries to islands.",
]


def disguised(text: str, draw: random.Random) -> str:
    """The same words, in other case, punctuation and spacing."""
    text = draw.choice([str.upper, str.lower, str.title, str.swapcase])(text)
    return re.sub(r"(?<=[^\W\d])[.,;:!?]? ", lambda _: draw.choice([" ", "  ", ", ", " ... ", "\n", "! "]), text)


def test_leaks_planted_at_fifty_places_are_all_found_and_nothing_else(clean_set):
    clean, held_out = clean_set
    draw = random.Random(7)
    texts = [joined(row[1:]) for row in held_out]
    training = [row[1:] for row in clean]
    planted: dict[int, tuple[str, int]] = {}
    victims = draw.sample(range(len(held_out)), 35)
    places = draw.sample(range(len(training)), 50)
    for place, victim in zip(places[:15], victims[:15], strict=True):
        training[place] = [disguised(part, draw) for part in held_out[victim][1:]]
        planted[place] = ("disguised", victim)
    for place, victim in zip(places[15:25], victims[15:25], strict=True):
        training[place] = [f"{training[place][0]} {disguised(texts[victim], draw)} {training[place][1]}", "Noted."]
        planted[place] = ("inside a longer row", victim)
    for place, victim in zip(places[25:35], victims[25:], strict=True):
        training[place] = [held_out[victim][1], held_out[victim][2].rsplit(" ", 1)[0] + " again"]
        planted[place] = ("near", victim)
    for i, place in enumerate(places[35:]):
        training[place] = [f"Please help. {disguised(TASKS[i % 3], draw)} Be brief.", training[place][1]]
        if i % 5 > 2:
            training[place][0] = disguised(TASKS[i % 5], draw)
        planted[place] = ("task", len(texts) + (i % 5 if i % 5 > 2 else i % 3))

    others = texts + TASKS
    roles: list[Role] = ["row"] * len(texts) + ["question"] * len(TASKS)
    said = [joined(row) for row in training]
    labels = clusters(sign(said + others, 0.85), 0.85)
    is_training = np.arange(len(labels)) < len(training)
    near = near_leaks(labels, is_training, ~is_training)
    near = Matches.of(near.row, near.text - len(training), "near")
    found = Matches.merged([gate(training, others, roles), near])

    pairs = set(zip(found.row.tolist(), found.text.tolist(), strict=True))
    missed = {kind for place, (kind, victim) in planted.items() if (place, victim) not in pairs}
    assert not missed
    assert set(found.row.tolist()) == set(planted)
    assert sum(found.counts().values()) == 50


def test_a_leak_in_more_rows_than_boilerplate_needs_is_still_a_leak(clean_set):
    """Catches the plain rule of more than ten documents, which lets through what was copied eleven times."""
    training, held_out = clean_set
    texts = [joined(row[1:]) for row in held_out]
    copied = [[*row[1:], f"By the way: {texts[3]}"] for row in training[:40]]
    found = gate(copied + [row[1:] for row in training[40:]], texts)
    assert set(found.row.tolist()) == set(range(40))
    assert set(found.text.tolist()) == {3}


def test_texts_that_lie_in_each_other_are_still_found_when_planted_often():
    """Catches texts that have no run for themselves: a question that two files list, a row that quotes another."""
    question, quoted = prose(1, 30), prose(2, 30)
    held_out = [question, question.upper(), quoted, f"{prose(3)} {quoted} {prose(4)}"]
    rows = [prose(seed) for seed in range(10, 300)]
    rows[:20] = [f"{row} {question}" for row in rows[:20]]
    rows[20:40] = [f"{row} {quoted}" for row in rows[20:40]]
    found = gate(rows, held_out)
    assert set(zip(found.row.tolist(), found.text.tolist(), strict=True)) == {
        *((row, 0) for row in range(20)),
        *((row, 2) for row in range(20, 40)),
    }


def test_a_row_without_any_shared_run_need_not_be_looked_at_again():
    index = LeakIndex.build([prose(1), "only this"])
    parts = [[prose(2), prose(1)], [prose(3), f"{prose(1)} {prose(4)}", "Only this!"]]
    counts = Counts.merged([index.count(parts[0]), index.count(parts[1]).shifted(2)])
    assert counts.touched.tolist() == [1, 3, 4]


def prose(seed: int, words: int = 60) -> str:
    fake = Faker("en_US")
    fake.seed_instance(seed)
    return " ".join(fake.words(words, unique=False))


def test_thirteen_words_are_a_leak_and_twelve_are_not():
    held_out, training = prose(1).split(), prose(2).split()
    for words, leaks_ in ((13, 1), (12, 0)):
        row = " ".join(training[:20] + held_out[5 : 5 + words] + training[20:])
        assert len(gate([row, prose(3)], [" ".join(held_out)])) == leaks_


@pytest.mark.parametrize(("words", "inside"), [(12, True), (8, True), (7, False)])
def test_a_short_text_is_found_inside_others_only_if_it_is_long_enough(words: int, inside: bool):
    text = " ".join(prose(1).split()[:words])
    assert (len(gate([f"{prose(2)} {text} {prose(3)}"], [text])) == 1) == inside
    assert gate([text.upper()], [text]).counts()["exact"] == 1


def test_a_short_question_is_looked_for_among_messages_and_a_short_answer_is_not():
    """Catches a gate that stops at every training row that says "yes"."""
    rows = [["What is the capital of France?", "Paris"], ["Is it open?", "Yes."], ["Bye"]]
    asked = gate(rows, ["What is the capital of France", "Yes", "Yes"], ["question", "question", "answer"])
    assert (asked.row.tolist(), asked.text.tolist()) == ([0], [0])


def test_operators_tell_questions_apart():
    assert len(gate([["What is 12+30?", "42"]], ["What is 12-30?"], ["question"])) == 0
    assert len(gate([["what is 12 + 30", "42"]], ["What is 12+30?"], ["question"])) == 1


def test_a_small_set_with_one_instruction_is_not_stopped():
    """Catches a count of ten rows asked of a set that has eight."""
    instruction = "Classify the following customer review as positive, negative or neutral, and answer in one word:"
    fake = Faker("en_US")
    fake.seed_instance(5)
    rows = [f"{instruction} the {fake.sentence(9)}" for _ in range(10)]
    assert len(gate(rows[:8], rows[8:])) == 0
    assert gate([*rows[:8], rows[9] + " Thanks"], rows[8:]).text.tolist() == [1]


WORD = st.sampled_from(["a", "b", "c", "d"])
TEXTS = st.lists(st.lists(WORD, max_size=40).map(" ".join), max_size=8)


@settings(deadline=None, max_examples=60)
@given(rows=TEXTS, held_out=TEXTS, cut=st.integers(0, 8), order=st.randoms(use_true_random=False))
def test_chunks_add_up_to_the_whole_in_any_order(rows: list[str], held_out: list[str], cut: int, order: random.Random):
    whole = gate(rows, held_out)
    index = LeakIndex.build(held_out)
    parts = [(0, rows[:cut]), (min(cut, len(rows)), rows[cut:])]
    order.shuffle(parts)
    live = index.live(Counts.merged([index.count(part) for _, part in parts]))
    found = Matches.merged([live.find(part).shifted(first) for first, part in parts])
    touched = only_touched(rows, held_out)
    for name in ("row", "text", "kind"):
        assert getattr(found, name).tolist() == getattr(whole, name).tolist()
        assert getattr(touched, name).tolist() == getattr(whole, name).tolist()


@settings(deadline=None, max_examples=60)
@given(rows=TEXTS, held_out=TEXTS)
def test_only_what_shares_words_is_a_leak_and_equal_texts_always_are(rows: list[str], held_out: list[str]):
    """Against the definition, read off the texts themselves."""
    found = gate(rows, held_out)
    pairs = set(zip(found.row.tolist(), found.text.tolist(), strict=True))

    def runs(text: str, length: int) -> set[tuple[str, ...]]:
        words = text.split()
        return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}

    for row, text in pairs:
        length = min(len(held_out[text].split()), 13)
        assert held_out[text] == rows[row] or runs(rows[row], length) & runs(held_out[text], length)
    leaking = {row for row, _ in pairs}
    assert {i for i, row in enumerate(rows) if row and row in held_out} <= leaking


def test_an_index_from_files_finds_the_same_and_its_files_hold_no_text(tmp_path: Path):
    held_out = [prose(i) for i in range(20)]
    rows = [prose(100), f"{prose(101)} {held_out[4]}"]
    index = LeakIndex.build(held_out)
    index.save(tmp_path)
    loaded = LeakIndex.load(tmp_path)
    found = loaded.live(loaded.count(rows)).find(rows)
    assert (found.row.tolist(), found.text.tolist()) == ([1], [4])
    content = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert not any(word.encode() in content for word in prose(4).split() if len(word) > 4)


def test_nothing_held_out_and_no_rows_are_no_faults():
    assert len(gate(["some text"], [])) == 0
    assert len(gate([], ["some text"])) == 0
    assert len(gate([[]], ["", "!!!"])) == 0
    assert len(gate(["", "???"], ["", "!!!"])) == 0


def test_near_leaks_are_named_with_the_first_text_of_their_cluster():
    labels = np.array([0, 1, 0, 2, 0, 1])
    training = np.array([1, 1, 0, 1, 0, 0], np.bool_)
    held_out = np.array([0, 0, 1, 0, 1, 0], np.bool_)
    found = near_leaks(labels, training, held_out)
    assert (found.row.tolist(), found.text.tolist()) == ([0], [2])
    assert found.counts() == {"exact": 0, "near": 1, "ngram": 0}


def test_what_the_user_is_told_names_both_places_and_no_text():
    told = faults_of([leaks.Leak("a.jsonl:3", "evals/x.yaml:9", "ngram")] * 30, rows=30)
    assert len(told) == 21
    assert str(told[0]) == "a.jsonl:3: this training row holds text of evals/x.yaml:9"
    assert "30 training rows" in told[-1].what
    assert "gate: drop" in (told[-1].fix or "")


# ---------------------------------------------------------------- files of tasks


def test_tasks_are_read_from_every_kind_of_file(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"question": "Q one", "answer": ["A one", "A two"], "id": "not text"}) + "\n"
        + json.dumps({"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "Q two"},
                                   {"role": "assistant", "content": "A three"}]}) + "\n"
    )  # fmt: skip
    (tmp_path / "b.csv").write_text('prompt,ideal\n"Q three","A four"\n')
    (tmp_path / "c.yaml").write_text(
        "name: a task\ndataset:\n  - input: Q four\n    target: A five\n  - vars: {query: Q five}\n"
    )
    found = read_tasks(["a.jsonl", "*.csv", "c.yaml"], tmp_path)
    assert [(task.text, task.where, task.role) for task in found] == [
        ("Q one", "a.jsonl:1", "question"),
        ("A one", "a.jsonl:1", "answer"),
        ("A two", "a.jsonl:1", "answer"),
        ("Q two", "a.jsonl:2", "question"),
        ("A three", "a.jsonl:2", "answer"),
        ("Q three", "b.csv:2", "question"),
        ("A four", "b.csv:2", "answer"),
        ("Q four", "c.yaml:3", "question"),
        ("A five", "c.yaml:3", "answer"),
        ("Q five", "c.yaml:5", "question"),
    ]


def test_rows_that_a_task_names_are_read_under_its_names(tmp_path: Path):
    """Catches a task whose questions lie in another file, which the gate would compare with nothing."""
    (tmp_path / "evals").mkdir()
    (tmp_path / "evals" / "rows.csv").write_text("ask,right,note\nQ one,A one,no text\n")
    (tmp_path / "evals" / "a.yaml").write_text(
        "name: a\ndata: rows.csv\ncolumns: {prompt: ask, reference: right}\nscorer: exact\n"
    )
    (tmp_path / "evals" / "b.yaml").write_text("name: b\ndata: rows.csv\ntemplate: '{ask}?'\nscorer: exact\n")
    (tmp_path / "evals" / "c.yaml").write_text("name: c\nbenchmark: {task: arc_easy}\n")
    found = read_tasks(["evals/*.yaml"], tmp_path)
    assert [(task.text, task.role) for task in found] == [
        ("Q one", "question"),
        ("A one", "answer"),
        ("Q one", "question"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("t.jsonl", '{"id": 1, "score": 2}', "no task in the file; its columns are id, score"),
        ("t.yaml", "a: [1, 2", "t.yaml:1: not readable as YAML"),
        ("t.yaml", "a: &x [*x]", "no task in the file"),
        ("t.yaml", "a: !!python/object/apply:os.system [x]", "no task in the file"),
        ("t.yaml", "", "no task in the file"),
    ],
)
def test_a_file_without_tasks_is_a_fault_that_names_it(tmp_path: Path, name: str, content: str, fault: str):
    """Catches a gate that passes since it compared with nothing."""
    (tmp_path / name).write_text(content)
    with pytest.raises(WhetError, match=re.escape(fault)):
        read_tasks([name], tmp_path)


def test_a_pattern_that_matches_no_file_is_a_fault(tmp_path: Path):
    with pytest.raises(WhetError, match="no file matches"):
        read_tasks(["evals/*.jsonl"], tmp_path)
