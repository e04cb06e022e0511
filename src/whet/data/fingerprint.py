"""What a tokenizer makes of a conversation, as a digest: its chat template, its vocabulary, its special tokens.

Made with the data, kept with the adapter and with every export. A stage whose tokenizer has another fingerprint stops:
a model that was trained on one template answers worse, silently, when it is asked through another.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from whet.data.labels import check_fast
from whet.errors import WhetError
from whet.files import write_text

NAME = "fingerprint.json"
PARTS = {"template": "chat template", "vocabulary": "vocabulary or rules", "special": "special tokens"}

Fingerprint = dict[str, str]


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> Fingerprint:
    """PARTS -> 16 hex digits of SHA-256."""
    check_fast(tokenizer)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    # How the last batch was padded or cut is kept in tokenizer.json too, but changes no token.
    content.pop("padding", None)
    content.pop("truncation", None)
    parts = {"template": tokenizer.chat_template, "vocabulary": content, "special": tokenizer.special_tokens_map}
    return {name: _digest(value) for name, value in parts.items()}


def keep(found: Fingerprint, folder: Path) -> None:
    write_text(folder / NAME, json.dumps(found, indent=1) + "\n")


def check(tokenizer: PreTrainedTokenizerBase, folder: Path, what: str) -> Fingerprint:
    """The tokenizer's fingerprint. Raises WhetError unless it is the one that `folder` holds; what: made by whom."""
    kept = json.loads((folder / NAME).read_text(encoding="utf-8"))
    found = fingerprint(tokenizer)
    other = [words for name, words in PARTS.items() if found[name] != kept[name]]
    if other:
        raise WhetError(
            f"the tokenizer's {' and '.join(other)} {'is' if other == [PARTS['template']] else 'are'} not what {what}",
            where=str(tokenizer.name_or_path),
            fix="put the tokenizer back as it was, or run the recipe again from its data on, in another --runs folder",
        )
    return found


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode("ascii")).hexdigest()[:16]
