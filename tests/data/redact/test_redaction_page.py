"""docs/redaction.md says what the code does.

Mend its table of classes with: python -m tests.data.redact.test_redaction_page
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import cast

import pytest

from tests.data.redact.conftest import KEY
from whet.data.redact.entities import ENTITIES
from whet.data.redact.policy import BUILT_IN, MODES
from whet.data.redact.replace import Mode, Replacer

PATH = Path(__file__).parents[3] / "docs" / "redaction.md"
PAGE = PATH.read_text(encoding="utf-8")
BLOCK = re.compile(r"(?<=<!-- classes -->\n).*?(?=<!-- /classes -->)", re.DOTALL)
EXAMPLES = re.findall(r"^\| `(\w+)` \| (\w+) \| `(.*?)` \| `(.*?)` \|$", PAGE, re.MULTILINE)


def classes() -> str:
    """The table of classes, in the order of ENTITIES."""
    rows = [
        f"| {entity.name} | {entity.description} | {'form' if entity.patterned else 'context'} | "
        f"{f'({entity.safe_harbor})' if entity.safe_harbor else ''} |"
        for entity in ENTITIES.values()
    ]
    return "\n".join(["| class | what | found by | Safe Harbor |", "|---|---|---|---|", *rows, ""])


def test_the_table_lists_every_class_as_it_is():
    """Catches a class that was added or described anew, and not on the page."""
    assert BLOCK.findall(PAGE) == [classes()]


@pytest.mark.parametrize(("mode", "entity", "value", "new"), EXAMPLES)
def test_each_example_is_what_happens(mode: str, entity: str, value: str, new: str):
    assert Replacer({entity: cast(Mode, mode)}, key=KEY).replacement(entity, value) == new


def test_every_mode_and_policy_is_on_the_page():
    assert {mode for mode, *_ in EXAMPLES} | {"drop", "keep"} == set(MODES)
    assert set(re.findall(r"^\| `([\w-]+)` \| \D", PAGE, re.MULTILINE)) >= set(BUILT_IN)


if __name__ == "__main__":
    PATH.write_text(BLOCK.sub(lambda _: classes(), PAGE), encoding="utf-8")
