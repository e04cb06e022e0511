"""Masks everything but the answers in the data of a trainer that was already made.

The trainer's rows are token ids by then, one conversation each or, packed, several with their lengths. Answers are
found by the text that the chat template puts before a user turn and before an answer.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from whet.data.template import IGNORE, mask_by_markers, render
from whet.errors import WhetError

log = logging.getLogger("whet")

CONTENTS = tuple(f"\ue000{content}\ue001" for content in ("one", "two", "three", "four"))
"""Messages to find the template's own text between: private-use characters that no template writes."""
SAMPLE_TOKENS = 100


def train_on_responses_only(trainer: Any, instruction_part: str | None = None, response_part: str | None = None) -> Any:
    """Let `trainer` learn from answers alone; changes its train_dataset and eval_dataset and returns it.

    instruction_part, response_part: the text that begins a user turn and the text that begins an answer, such as
    "<|im_start|>user\\n" and "<|im_start|>assistant\\n". Left out, they are read off the tokenizer's chat template.
    Labels that were masked before stay masked. Rows without an answer are dropped, and their number is logged.
    Raises WhetError where no row has an answer, or the data set is not one of token ids in memory or on disk.
    """
    tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    if instruction_part is None or response_part is None:
        markers = find_markers(tokenizer)
        instruction_part = markers[0] if instruction_part is None else instruction_part
        response_part = markers[1] if response_part is None else response_part

    num_proc = getattr(trainer.args, "dataset_num_proc", None)

    def masked(dataset: Any, where: str) -> Dataset:
        return _masked(dataset, where, tokenizer, (instruction_part, response_part), num_proc)

    train_dataset = masked(trainer.train_dataset, "train_dataset")
    eval_dataset = trainer.eval_dataset
    if isinstance(eval_dataset, dict):
        eval_dataset = {name: masked(part, f"eval_dataset[{name!r}]") for name, part in eval_dataset.items()}
    elif eval_dataset is not None:
        eval_dataset = masked(eval_dataset, "eval_dataset")
    trainer.train_dataset, trainer.eval_dataset = train_dataset, eval_dataset
    return trainer


def find_markers(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """(instruction_part, response_part): what the chat template writes before a question and before an answer.

    Both are taken from inside a conversation of two turns: before its first question there may be a system prompt.
    Raises WhetError where the template does not write the messages as they are, or writes nothing before them.
    """
    roles = ("user", "assistant", "user", "assistant")
    messages = [{"role": role, "content": content} for role, content in zip(roles, CONTENTS, strict=True)]
    text = render(tokenizer, messages)
    pieces = _between(text, CONTENTS)
    if pieces is None:
        raise _no_markers(text)
    _, before_answer, before_question, _, closing = pieces
    prompt = render(tokenizer, messages[:1], add_generation_prompt=True).partition(CONTENTS[0])[2]
    opening = prompt.removeprefix(render(tokenizer, messages[:1]).partition(CONTENTS[0])[2])
    instruction = before_question[_shared(tokenizer, closing, before_question) :]
    response = _overlap(before_answer, opening) or before_answer
    if not instruction.strip() or not response.strip() or instruction.strip() == response.strip():
        raise _no_markers(text)
    return instruction, response


def _between(text: str, contents: Sequence[str]) -> list[str] | None:
    """The pieces of `text` before, between and after `contents`; None where one of them is missing."""
    pieces = []
    for content in contents:
        piece, found, text = text.partition(content)
        if not found:
            return None
        pieces.append(piece)
    return [*pieces, text]


def _shared(tokenizer: PreTrainedTokenizerBase, closing: str, text: str) -> int:
    """How much of what closes a conversation also begins `text`, in whole tokens: the end of an answer."""
    offsets = tokenizer(closing, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return max((end for _, end in offsets if text.startswith(closing[:end])), default=0)


def _overlap(text: str, opening: str) -> str:
    """The longest end of `text` with which `opening` begins. A generation prompt may go on into an empty thought."""
    return next((text[i:] for i in range(len(text)) if opening.startswith(text[i:])), "")


def _masked(dataset: Any, where: str, tokenizer: Any, markers: tuple[str, str], num_proc: int | None) -> Dataset:
    if not isinstance(dataset, Dataset) or "input_ids" not in dataset.column_names:
        raise WhetError(
            "answers can be found only in rows of token ids that are all there (datasets.Dataset)",
            where=where,
            fix="do not stream the data set, and let the trainer prepare it before train_on_responses_only",
        )

    def mask(row: dict[str, Any]) -> dict[str, list[int]]:
        return {"labels": _labels(tokenizer, row, markers)}

    labelled = dataset.map(mask, num_proc=num_proc, desc=f"Masking all but the answers in {where}")
    # Nothing predicts the first token, so a label there teaches nothing.
    kept = labelled.filter(lambda labels: any(label != IGNORE for label in labels[1:]), input_columns="labels")
    dropped = len(dataset) - len(kept)
    if not len(kept):
        raise _nothing_left(dataset, where, tokenizer, markers)
    if dropped:
        log.warning("%s: dropped %d of %d rows, in which no answer was found", where, dropped, len(dataset))
    return kept


def _labels(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], markers: tuple[str, str]) -> list[int]:
    """Labels [T] of a row. Each document of a packed row is looked at by itself: an answer ends with its document."""
    input_ids = row["input_ids"]
    labels: list[int] = []
    for length in row.get("seq_lengths") or [len(input_ids)]:
        document = input_ids[len(labels) : len(labels) + length]
        labels += mask_by_markers(tokenizer, document, *markers)
    before = row.get("labels") or input_ids
    return [IGNORE if new == IGNORE else old for old, new in zip(before, labels, strict=True)]


def _no_markers(text: str) -> WhetError:
    return WhetError(
        f"the chat template does not show where turns begin; it writes {text!r}",
        where="train_on_responses_only",
        fix='pass both, as in instruction_part="<|im_start|>user\\n", response_part="<|im_start|>assistant\\n"',
    )


def _nothing_left(dataset: Dataset, where: str, tokenizer: Any, markers: tuple[str, str]) -> WhetError:
    if not len(dataset):
        return WhetError("the data set has no rows", where=where, fix="give rows to train on")
    sample = tokenizer.decode(dataset[0]["input_ids"][:SAMPLE_TOKENS])
    return WhetError(
        f"no answer found in any of {len(dataset)} rows between response_part {markers[1]!r} and instruction_part "
        f"{markers[0]!r}; the first row begins {sample!r}",
        where=where,
        fix="pass the two texts as they stand in the row, or raise max_seq_length if prompts fill the rows",
    )
