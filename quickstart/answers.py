"""Does the exported model still say the same? llama.cpp's answers beside those of the merged model, row by row.

    python -m quickstart.answers RUN

Both answer every held-out question greedily: the merged folder in transformers, each GGUF in llama.cpp. Prints some
answers and the share that agree, writes them to RUN/llama_cpp.jsonl, and ends with 1 when the q8_0 file agrees on less
than 95%.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from whet import FastLanguageModel
from whet.data.prepare import questions as read_questions
from whet.errors import WhetError
from whet.evals.heldout import exact_match, generate
from whet.export import llama_cpp

NEEDED = 0.95
MAX_NEW_TOKENS = 8
SHOWN = 10
console = Console(highlight=False)


def main(run: Path) -> int:
    if llama_cpp.find() is None:
        try:
            llama_cpp.install()
        except WhetError as error:
            console.print(f"[yellow]llama.cpp was not run:[/] {error}")
            return 0
    questions = read_questions(run / "data")
    prompts = [question.prompt for question in questions]
    model, tokenizer = FastLanguageModel.from_pretrained(str(run / "export" / "merged"), load_in_4bit=False)
    answers = {"whet": generate(model, tokenizer, prompts, max_new_tokens=MAX_NEW_TOKENS)}
    for gguf in sorted((run / "export").glob("*.gguf")):
        # one thread: a model this small spends more on keeping two in step
        generations = llama_cpp.generate(gguf, prompts, max_new_tokens=MAX_NEW_TOKENS, threads=1)
        answers[gguf.stem.removeprefix("model-")] = [generation.text.strip() for generation in generations]

    references = [question.reference for question in questions]
    lines = [dict(zip(answers, row, strict=True)) for row in zip(*answers.values(), strict=True)]
    text = "".join(json.dumps({"reference": r, **line}) + "\n" for r, line in zip(references, lines, strict=True))
    (run / "llama_cpp.jsonl").write_text(text, encoding="utf-8")

    table = Table("entry", "its package", *answers, title="held-out answers: whet (merged) and llama.cpp (GGUF)")
    shown = list(zip(prompts, references, lines, strict=True))
    for prompt, reference, line in shown[:: max(1, len(shown) // SHOWN)]:
        signature = prompt.split("\n")[3]
        name = signature.partition("(")[0].split()[-1]
        table.add_row(name, reference, *line.values())
    console.print(table)
    agreement = {name: exact_match(given, answers["whet"]) for name, given in answers.items() if name != "whet"}
    for name, given in answers.items():
        agrees = f", same as whet's on {agreement[name]:.1%}" if name in agreement else ""
        console.print(f"{name:<8} right on {exact_match(given, references):.1%} of {len(questions)}{agrees}")
    return 0 if agreement["q8_0"] >= NEEDED else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
