"""How many strings become other tokens in llama.cpp than in transformers -> bench/results/gguf_tokenizers.jsonl.

    PYTHONPATH=src python bench/gguf_tokenizers.py [--out FILE]

The families and strings are those of tests/export/tokenizer_families.py. A line a family, with counts of strings:
alone: other tokens by llama.cpp's own tokenizer; untold: of all, those with which it does otherwise than whet tells.
served: other tokens as `whet serve` cuts text: by the tokenizer.json in the file, where it carries one, else by
llama.cpp. again: tokens that become another text through whet than transformers' `decode` gives.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from environment import ROOT, origin

sys.path.insert(0, str(ROOT))

from tests.export import tokenizer_families as families
from whet.export import llama_cpp
from whet.export.gguf_tokenizer import load_tokenizer, read_tokenizer
from whet.export.gguf_tokenizer.carried import Carried
from whet.export.gguf_tokenizer.llama_cpp_cut import llama_cpp_cut


def measured(name: str, folder: Path) -> dict[str, Any]:
    families.FAMILIES[name](folder)
    tokenizer, written, file = load_tokenizer(folder), read_tokenizer(folder, families.ROWS), folder / "vocabulary.gguf"
    written.write_vocabulary(file)
    texts = families.texts(tokenizer)
    ids = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    decoded = [tokenizer.decode(one, skip_special_tokens=False, clean_up_tokenization_spaces=False) for one in ids]
    own = llama_cpp.tokenize(file, texts)
    served = Carried(written.carried, families.ROWS, name).cut(texts) if written.carried else own
    return {
        "kind": "gguf_tokenizers",
        "family": name,
        "strings": len(texts),
        "carried": written.carried is not None,
        "alone": unlike(own, ids),
        "untold": unlike(own, llama_cpp_cut(written, texts)),
        "served": unlike(served, ids),
        "again": unlike(llama_cpp.detokenize_each([(file, ids)])[0], decoded),
    }


def unlike(found: list[Any], expected: list[Any]) -> int:
    return sum(a != b for a, b in zip(found, expected, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "gguf_tokenizers.jsonl")
    out = parser.parse_args().out
    where = origin("tokenizers", "gguf")
    where["versions"] |= {"node-llama-cpp": llama_cpp.VERSION}
    with tempfile.TemporaryDirectory() as scratch:
        lines = [measured(name, Path(scratch) / name) for name in families.FAMILIES]
    out.write_text("".join(json.dumps(line | where) + "\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
