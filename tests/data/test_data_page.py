"""docs/data.md shows the formats and templates that there are, as they are."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from tests.data.conftest import CHAT
from whet.data.chat_formats import CHAT_FORMATS
from whet.data.chat_templates import get_chat_template
from whet.data.formats import FORMATS, detect, normalise
from whet.data.read.rows import Row
from whet.data.template import render

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
ROWS = {name: json.loads(row) for name, row in re.findall(r"^\| `([\w-]+)` \| `(\{.*\})` \|$", PAGE, re.MULTILINE)}
(BLOCK,) = re.findall(r"```\n(chatml .*?)\n```", PAGE, re.DOTALL)
TEMPLATES = dict(re.findall(r"^([\w.-]+) +(.*)$", BLOCK, re.MULTILINE))


def test_each_format_has_a_row_of_that_format():
    assert set(ROWS) == set(FORMATS)
    for name, row in ROWS.items():
        assert detect(row) == name
        normalise(Row(row, "page", 1), name)


def test_every_template_is_listed():
    assert list(TEMPLATES) == [chat_format.name for chat_format in CHAT_FORMATS]


@pytest.mark.parametrize("name", [name for name, text in TEMPLATES.items() if not text.startswith("as ")])
def test_each_template_writes_what_the_page_shows(tokenizer: PreTrainedTokenizerFast, name: str):
    get_chat_template(tokenizer, name, system_message="")
    shown = TEMPLATES[name].split(", with")[0]
    for mark, text in {"⏎": "\n", "BOS": "<s>", "EOS": tokenizer.eos_token}.items():
        shown = shown.replace(mark, text)
    assert render(tokenizer, CHAT[:2]) == shown
