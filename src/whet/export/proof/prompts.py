"""Prompts to compare answers on where a model comes without held-out ones of its own."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from whet.data.template import render

GENERAL = (
    "What is the capital of Portugal, and what is it known for?",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Explain in two sentences why the sky is blue.",
    "Translate into German: The invoice was paid on the third of May.",
    "List three uses of baking soda in the household.",
    "A train leaves at 9:40 and arrives at 12:05. How long does the trip take?",
    "Summarize: The committee met twice, could not agree on a budget, and adjourned until the autumn.",
    "Correct the grammar: She don't have no time for to read the reports.",
    "What does the HTTP status code 404 mean?",
    'Return JSON with the keys "name" and "age" for Maria, who is 34.',
    "Name two differences between TCP and UDP.",
    "Write a polite reply that declines an invitation to a meeting on Friday.",
)


def general_prompts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """GENERAL as the model sees them: through its chat template, or as plain text where it has none."""
    if not tokenizer.chat_template:
        return list(GENERAL)
    return [render(tokenizer, [{"role": "user", "content": text}], add_generation_prompt=True) for text in GENERAL]
