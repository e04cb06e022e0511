"""Marks of a chat template where only text should stand: rows that were rendered before, or for another model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from whet.data.doctor.findings import Finding, Place, by_share
from whet.data.doctor.rows import Row

MANY = 0.001
"""Share of the rows from which marks are more than a note: a set about templates quotes some."""

MARKS: dict[str, str] = {
    "ChatML": r"<\|im_(?:start|end|sep)\|>",
    "Llama 3": r"<\|(?:begin_of_text|start_header_id|end_header_id|eot_id|eom_id)\|>",
    "Llama 2 or Mistral": r"\[/?INST\]|<</?SYS>>|\[/?(?:AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS)\]",
    "Gemma": r"</?(?:start|end)_of_turn>|<(?:start|end)_of_turn>",
    "Phi or Zephyr": r"<\|(?:system|user|assistant|end)\|>",
    "gpt-oss": r"<\|(?:channel|message|start|return)\|>",
    "DeepSeek": "<\uff5c(?:User|Assistant|begin\u2581of\u2581sentence|end\u2581of\u2581sentence)\uff5c>",
    "GPT-2": r"<\|endoftext\|>",
    "Alpaca": r"^###\ (?:Instruction|Response|Input):",
}
"""Template -> what none but it writes. The same marks in several templates are told as the first."""

MARK = re.compile("|".join(f"(?P<m{i}>{pattern})" for i, pattern in enumerate(MARKS.values())), re.MULTILINE)
NAMES = {f"m{i}": name for i, name in enumerate(MARKS)}

ROLE = re.compile(r"^[ \t]*(?:#+[ ]|\*\*)?(user|human|assistant|ai|bot|gpt|chatgpt)(?:\*\*)?[ \t]?:", re.I | re.M)
ASKING = {"user", "human"}
INLINE = re.compile(r"\b(?:USER|HUMAN): .*?\b(?:ASSISTANT|AI|BOT):", re.DOTALL)
"""As Vicuna writes both on one line."""


def find_markup(rows: Sequence[Row]) -> Iterator[Finding]:
    marked = [place for row in rows if (place := _mark(row)) is not None]
    if marked:
        names = sorted({place.detail for place in marked})
        yield Finding(
            "template marks",
            by_share(len(marked), len(rows), warning=MANY),
            tuple(marked),
            f"Texts with marks of a chat template ({', '.join(names)}). Rendered again, the model sees them twice, "
            "or sees those of another model, and the turns inside are not masked.",
            "Take the rendered text apart into messages, without the marks.",
        )
    named = [place for row in rows if (place := _roles(row)) is not None]
    if named:
        yield Finding(
            "roles in texts",
            by_share(len(named), len(rows), warning=MANY),
            tuple(named),
            "Texts in which lines begin with roles (User: ... Assistant: ...), or answers that begin with one. "
            "The model learns to write both sides.",
            "Take such texts apart into messages; cut the role off the answers.",
        )


def _mark(row: Row) -> Place | None:
    for text in row.texts:
        if hit := MARK.search(text):
            return row.place(text, hit.start(), hit.end(), detail=NAMES[str(hit.lastgroup)])
    return None


def _roles(row: Row) -> Place | None:
    for answer in row.answers:
        if (hit := ROLE.match(answer)) and hit[1].lower() not in ASKING:
            return row.place(answer, hit.start(), hit.end())
    for text in row.texts:
        hits = list(ROLE.finditer(text))
        asking = {hit[1].lower() in ASKING for hit in hits}
        if asking == {True, False}:
            return row.place(text, hits[0].start(), hits[0].end())
        if inline := INLINE.search(text):
            return row.place(text, inline.start(), inline.start() + 5)
    return None
