"""Chat templates in Go's language say what the Jinja template says. What Go makes of them is in rendered.json."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig

from tests.export.go_templates.cases import RENDERED, cases, tokenizer_with
from whet.data.chat_formats import CHAT_FORMATS
from whet.data.template import render
from whet.errors import WhetError
from whet.export.go_template import Turns, go_template, read_turns
from whet.export.modelfile import modelfile, parameters

KEPT: list[dict[str, Any]] = json.loads(RENDERED.read_text(encoding="utf-8"))


def test_go_renders_what_transformers_renders() -> None:
    """Catches a role's text that is lost, white space that Go trims, and a BOS that is written twice."""
    assert {case["name"] for case in KEPT} == {chat_format.name for chat_format in CHAT_FORMATS}
    for case in KEPT:
        expected = render(tokenizer_with(case["name"]), case["messages"], add_generation_prompt=True)
        assert (case["bos"] or "") + case["text"] == expected, case["name"]


def test_what_go_rendered_are_todays_templates() -> None:
    """Catches a change of the templates that Go was never asked about: python -m tests.export.go_templates."""
    assert [{key: case[key] for key in ("name", "bos", "template", "messages")} for case in KEPT] == cases()


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ strftime_now('%d') }}{% for m in messages %}{{ m['content'] }}{% endfor %}", "it writes the date"),
        ("{% for m in messages %}{{ loop.index }}{{ m['content'] }}{% endfor %}", "with 5 turns"),
        ("{% for m in messages %}{{ m['content'] | upper }}{% endfor %}", "does not write the content"),
        ("{% for m in messages %}{{ m['content'] | replace('<b>', '') }} {% endfor %}", "with 5 turns"),
        (
            "{% for m in messages %}{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'][:1] }}"
            "{% else %}{{ m['content'] }}{% endif %};{% endfor %}",
            "does not write the content of a assistant turn",
        ),
    ],
)
def test_an_irregular_template_is_refused(template: str, why: str) -> None:
    """Catches a Modelfile that asks the model in a way in which it was never trained."""
    tokenizer = copy.deepcopy(tokenizer_with("chatml"))
    tokenizer.chat_template = template
    with pytest.raises(WhetError, match=why):
        read_turns(tokenizer)


PIECE = st.text(st.characters(exclude_categories=("Cs", "Co")), max_size=8)


@settings(max_examples=25, deadline=None)
@given(st.lists(PIECE, min_size=6, max_size=6))
def test_any_regular_template_is_read_as_it_is(pieces: list[str]) -> None:
    """Catches quotes, braces, backslashes and line breaks of a template that are lost on the way."""
    before_system, after_system, before_user, after_user, before_answer, after_answer = (
        f"{{{{ {json.dumps(piece, ensure_ascii=False)} }}}}" for piece in pieces
    )
    tokenizer = copy.deepcopy(tokenizer_with("chatml"))
    tokenizer.chat_template = (
        "{%- for m in messages -%}{%- if m['role'] == 'system' -%}"
        f"{before_system}{{{{ m['content'] }}}}{after_system}{{%- elif m['role'] == 'user' -%}}"
        f"{before_user}{{{{ m['content'] }}}}{after_user}{{%- else -%}}"
        f"{before_answer}{{{{ m['content'] }}}}{after_answer}{{%- endif -%}}{{%- endfor -%}}{before_answer}"
    )
    turns = read_turns(tokenizer)
    first, second, third, fourth, fifth, sixth = pieces
    expected = Turns(third, (first, second + third), fourth + fifth, sixth + third, fourth + fifth)
    assert turns == expected
    for text in (turns.opening, turns.between, turns.prompt):
        assert not text or json.dumps(text, ensure_ascii=False) in go_template(turns)


def test_a_template_without_a_system_message() -> None:
    """Catches a refusal of templates that raise for a system message, as Gemma's own does."""
    tokenizer = copy.deepcopy(tokenizer_with("gemma"))
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
    )
    turns = read_turns(tokenizer)
    assert turns == Turns("<user>", None, "<assistant>", "<user>", "<assistant>")
    assert "System" not in go_template(turns)


def test_a_bos_that_only_the_engine_writes_is_refused() -> None:
    """Catches a token before every prompt that training never saw."""
    turns = read_turns(tokenizer_with("chatml"))
    with pytest.raises(WhetError, match="puts '<s>' before every text"):
        go_template(turns, "<s>")


def test_a_modelfile() -> None:
    tokenizer = tokenizer_with("chatml")
    text = modelfile(
        "model-q4_k_m.gguf",
        tokenizer,
        GenerationConfig(do_sample=True, temperature=0.7, top_p=0.9, repetition_penalty=1.1),
        ends=[1, 0],
        context=131072,
        adds_bos=False,
        licence="Do no harm.",
    )
    assert text.startswith('FROM ./model-q4_k_m.gguf\nTEMPLATE """{{- $first := true }}\n')
    assert text.count('"""') == 4
    after = text.split('"""')[2]
    assert after.strip().splitlines() == [
        'PARAMETER stop "<s>"',
        'PARAMETER stop "<|im_end|>"',
        "PARAMETER num_ctx 8192",
        "PARAMETER temperature 0.7",
        "PARAMETER top_p 0.9",
        "PARAMETER repeat_penalty 1.1",
        "LICENSE",
    ]
    assert parameters(GenerationConfig()) == {"temperature": 0}  # type: ignore[no-untyped-call]
