"""What is done to each row of a chunk: cleaning and redaction of what stands in tool calls' arguments, and by whom."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from whet.data.formats import Source
from whet.data.prep import chunks
from whet.data.prep.prep import prep
from whet.data.prep.steps import Redaction, Split, Steps

CLASSES = {"EMAIL": "placeholder", "PHONE": "placeholder", "SSN": "placeholder"}


def call(number: int, arguments: Any) -> dict[str, Any]:
    function = {"name": "look_up", "arguments": arguments}
    answer = {"role": "assistant", "content": "", "tool_calls": [{"id": "c", "type": "function", "function": function}]}
    return {"messages": [{"role": "user", "content": f"Entry {number}, please"}, answer]}


def made(folder: Path, arguments: Any, redaction: Redaction | None = None) -> set[str]:
    """The arguments of rows that all have these, as they are in the version."""
    rows = [call(i, arguments) for i in range(20)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    steps = Steps(sources=(Source("rows.jsonl"),), redact=redaction, dedup=None, split=Split(0.3), leaks=None)
    version = prep("set", steps, folder, folder / "runs")
    return {
        example.messages[1]["tool_calls"][0]["function"]["arguments"]
        for side in ("train", "eval")
        for example in version.examples(side)
    }


def test_arguments_are_cleaned_and_keep_their_space(tmp_path: Path):
    """Catches a separator of one line feed, or the indent of a patch, that cleaning takes for loose space."""
    before = '{"separator": "\\n", "patch": "  a \\n\\n\\n\\n\\n b\\t\\n", "name": "caf\\u00c3\\u00a9\\u200b"}'
    after = '{"separator": "\\n", "patch": "  a \\n\\n\\n\\n\\n b\\t\\n", "name": "café"}'
    assert made(tmp_path, before) == {after}


def test_arguments_are_redacted_by_their_keys(tmp_path: Path):
    """Catches a step that looks at the raw JSON, where \\u0040 hides an address, or at values without their keys."""
    before = '{"to": "ann\\u0040example.org", "ssn": 123456789, "n": 7}'
    found = made(tmp_path, before, Redaction("test", CLASSES))
    assert found == {'{"to": "[EMAIL]", "ssn": "[SSN]", "n": 7}'}


@pytest.mark.parametrize(("regions", "new"), [(("CH",), "sagen [PHONE]"), (("US",), "sagen 044 668 18 00")])
def test_regions_reach_the_redactor(tmp_path: Path, regions: tuple[str, ...], new: str):
    found = made(tmp_path, '{"x": "sagen 044 668 18 00"}', Redaction("test", CLASSES, regions=regions))
    assert found == {json.dumps({"x": new})}


def test_what_is_not_covered_is_told_by_a_model_s_configuration_alone(tmp_path: Path):
    """Catches weights that are read in the process that plans the work. There are none here."""
    config = {"architectures": ["BertForTokenClassification"], "id2label": {"0": "O", "1": "B-PER"}}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    how = Redaction("test", {"PERSON": "placeholder", "LOCATION": "placeholder"}, ner=str(tmp_path))
    assert list(chunks.redactor(how).not_covered) == ["LOCATION"]
