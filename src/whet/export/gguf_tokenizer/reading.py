"""The tokenizer of a model folder, as transformers loads it, in GGUF's terms."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from gguf import TokenType

from whet.errors import WhetError
from whet.export.gguf_tokenizer import added, byte_fallback, byte_level
from whet.export.gguf_tokenizer.carried import to_carry
from whet.export.gguf_tokenizer.space_prefix import SPACE, space_prefix
from whet.export.gguf_tokenizer.special import added_around_text, special_ids
from whet.export.gguf_tokenizer.written import GGUFTokenizer

_FILES = ("tokenizer.json", "tokenizer.model")


def load_tokenizer(model_dir: Path) -> Any:
    """The folder's tokenizer, from `tokenizer.json` or SentencePiece's `tokenizer.model`. Raises WhetError."""
    where = str(model_dir / _FILES[0])
    if not any((model_dir / name).is_file() for name in _FILES):
        raise WhetError(
            "the file is missing", where=where, fix="save the tokenizer beside the model: tokenizer.save_pretrained"
        )
    from transformers import AutoTokenizer  # slow to import, and only needed here

    try:
        tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    except ImportError as error:
        raise WhetError(
            f"the tokenizer cannot be loaded: {error}", where=where, fix="pip install sentencepiece protobuf"
        ) from error
    except Exception as error:  # tokenizers raises nothing more precise
        raise WhetError(f"the tokenizer cannot be loaded: {error}", where=where, fix="save it again") from error
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise WhetError(
            f"{type(tokenizer).__name__} has no tokenizer.json, whose rules GGUF is written from",
            where=where,
            fix="save it as a fast tokenizer",
        )
    return tokenizer


def read_tokenizer(model_dir: Path, embedding_rows: int) -> GGUFTokenizer:
    """Read the tokenizer of a model folder as transformers loads it.

    Embedding rows beyond the tokenizer's vocabulary become unused tokens. Raises WhetError when the vocabulary is
    larger than the embedding, or llama.cpp has no equal of the tokenizer.
    """
    model_dir = Path(model_dir)
    tokenizer, where = load_tokenizer(model_dir), str(model_dir / _FILES[0])
    notes: list[str] = []
    other_notes: list[str] = []
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    _check_model(spec["model"], where)
    tokens, types = _vocabulary(spec, embedding_rows, where)
    added.note_what_is_ignored(spec["added_tokens"], notes)
    add_bos, add_eos = added_around_text(tokenizer, where)
    result = GGUFTokenizer(
        model="gpt2",
        pre="",
        tokens=tokens,
        types=types,
        merges=[" ".join(byte_level.pair(merge)) for merge in spec["model"]["merges"]],
        scores=None,
        ids=special_ids(tokenizer, model_dir, where, other_notes),
        add_bos=add_bos,
        add_eos=add_eos,
        add_space_prefix=None,
        chat_template=tokenizer.chat_template,
        strips_right=added.strips_right(spec["added_tokens"], notes),
        notes=notes,
    )
    if spec["model"].get("byte_fallback"):
        _as_sentencepiece(result, tokenizer, spec, where)
    else:
        result.pre = byte_level.pre_tokenizer_name(spec, tokenizer.backend_tokenizer, where, notes)
    if notes:
        result.carried = to_carry(spec)
        notes.append("the file carries tokenizer.json: whet serve cuts all text by it, as transformers does")
    notes.extend(other_notes)
    return result


def _check_model(model: dict[str, Any], where: str) -> None:
    if model["type"] != "BPE":
        raise WhetError(
            f"a {model['type']} tokenizer has no equal in whet's GGUF", where=where, fix="use a BPE tokenizer"
        )
    if model.get("dropout") or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise WhetError("BPE with dropout, a subword prefix or a word suffix has no equal in llama.cpp", where=where)


def _vocabulary(spec: dict[str, Any], embedding_rows: int, where: str) -> tuple[list[str], list[TokenType]]:
    """The text and type of each embedding row."""
    by_id = {index: (text, TokenType.NORMAL) for text, index in spec["model"]["vocab"].items()}
    for token in spec["added_tokens"]:
        if (other := by_id.get(token["id"], (token["content"],))[0]) != token["content"]:
            raise WhetError(
                f"the tokens {other!r} and {token['content']!r} have the same id, {token['id']}",
                where=where,
                fix="give the added token an id of its own",
            )
        by_id[token["id"]] = token["content"], added.type_of(token)
    size = max(by_id) + 1
    if size > embedding_rows:
        raise WhetError(
            f"the tokenizer has {size} tokens but the model's embedding has {embedding_rows} rows",
            where=where,
            fix="call model.resize_token_embeddings(len(tokenizer)) before training, or use the model's own tokenizer",
        )
    rows = [by_id.get(index, (f"[PAD{index}]", TokenType.UNUSED)) for index in range(embedding_rows)]
    (text, times) = Counter(text for text, _ in rows).most_common(1)[0]
    if times > 1:
        raise WhetError(
            f"{times} tokens have the text {text!r}, and llama.cpp wants each only once", where=where, fix="rename one"
        )
    return [text for text, _ in rows], [kind for _, kind in rows]


def _as_sentencepiece(result: GGUFTokenizer, tokenizer: Any, spec: dict[str, Any], where: str) -> None:
    """Turn `result` into GGUF's `llama` tokenizer: scores, byte tokens, the space prefix."""
    model = spec["model"]
    byte_fallback.check_bytes(model["vocab"], where)
    if model.get("ignore_merges"):
        byte_level.check_merges_reach_every_token(spec, tokenizer.backend_tokenizer.model, "llama", where)
    # Added tokens are found in the text as it came, where no blank is "▁" yet: such a token comes of merges alone.
    extracted = {token["content"] for token in spec["added_tokens"] if SPACE not in token["content"]}
    scores = byte_fallback.scores(model, extracted, where)
    result.model, result.pre = "llama", "default"
    result.add_space_prefix = space_prefix(tokenizer, spec, where, result.notes)
    worst = -float(len(scores) + 1)
    result.scores = [scores.get(text, worst) for text in result.tokens]
    for index, text in enumerate(result.tokens):
        if result.types[index] is TokenType.NORMAL and byte_fallback.byte_token(text) is not None:
            result.types[index], result.scores[index] = TokenType.BYTE, 0.0
        elif text in scores and text not in extracted:
            # As an added token, llama.cpp would write its "▁" out instead of a blank.
            result.types[index] = TokenType.NORMAL
    if "unknown" in result.ids:
        result.types[result.ids["unknown"]] = TokenType.UNKNOWN
    _note_normalized(spec, result.notes)


def _note_normalized(spec: dict[str, Any], notes: list[str]) -> None:
    changed = [token["content"] for token in spec["added_tokens"] if token["normalized"]]
    if spec["normalizer"] and changed:
        notes.append(
            f"the added token {changed[0]!r} ({len(changed)} such tokens) is found in text whose blanks are marked "
            "already (normalized), and llama.cpp finds it in the text as it is"
        )
