"""Examines a ready-made set of examples for what most often ruins a fine-tune, and says what to do about it.

    repeats.py     exact and near duplicates; leaks of evaluation rows and tasks into training
    markup.py      marks of a chat template inside the texts
    tokens.py      with a tokenizer: rows that are cut or refused, special tokens in texts, a doubled first token
    answers.py     near-constant and contradicting answers, refusals, copied questions, rare and misspelled labels
    lengths.py     rows far from the others in length
    damage.py      mojibake, unreadable bytes, control characters, entities of HTML, empty answers
    languages.py   a mix of languages; answers in another language than the question

A finding names rows by file and line, and holds no text of theirs unless it is asked to.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING

from whet.data.doctor.answers import find_in_answers
from whet.data.doctor.damage import find_damage
from whet.data.doctor.findings import Finding, Place, Severity, in_order, show, to_json
from whet.data.doctor.languages import find_languages
from whet.data.doctor.lengths import find_lengths
from whet.data.doctor.markup import find_markup
from whet.data.doctor.repeats import find_repeats
from whet.data.doctor.rows import Row
from whet.data.examples import Example
from whet.data.similar.tasks import TaskText

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Finding", "Place", "Severity", "examine", "show", "to_json"]


def examine(
    examples: Sequence[Example],
    eval_examples: Sequence[Example] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    tasks: Sequence[TaskText] = (),
    max_length: int | None = None,
    show_text: bool = False,
) -> list[Finding]:
    """What is wrong with the examples, the gravest first.

    eval_examples: held out; the training examples are searched for them.
    tasks: texts of evaluation tasks (`similar.tasks.read_tasks`), searched for too.
    tokenizer, max_length: also check what the tokenizer and its template make of the rows, cut at that many tokens.
    show_text: each place holds an excerpt of the row's text.
    """
    rows = [Row(example, show_text) for example in examples]
    heldout = [Row(example, show_text) for example in eval_examples]
    if not rows:
        return []
    return in_order(chain.from_iterable(_checks(rows, heldout, tasks, tokenizer, max_length)))


def _checks(
    rows: Sequence[Row],
    heldout: Sequence[Row],
    tasks: Sequence[TaskText],
    tokenizer: PreTrainedTokenizerBase | None,
    max_length: int | None,
) -> Iterator[Iterator[Finding]]:
    yield find_repeats(rows, heldout, tasks)
    if tokenizer is not None:
        from whet.data.doctor.tokens import find_in_tokens  # loads transformers

        yield find_in_tokens(rows, tokenizer, max_length)
    yield find_markup(rows)
    yield find_damage(rows)
    yield find_in_answers(rows)
    yield find_lengths(rows)
    yield find_languages(rows)
