"""Byte-level BPE, GPT-2's kind: which of llama.cpp's pre-tokenizers cuts text as this tokenizer does.

llama.cpp has its pre-tokenizers compiled in, each under a name. A tokenizer gets the name whose steps are its own. One
whose steps are merely spelled otherwise gets the name that cuts every one of `strings.strings` as it does.
Source: llama.cpp's `llama-vocab.cpp` and `unicode.cpp` for what each name does.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from whet.errors import WhetError
from whet.export.gguf_tokenizer.strings import strings

Step = tuple[str, Any]

_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_BLANKS = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA_3 = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _BLANKS
_QWEN_2 = _LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
_QWEN_3_5 = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + _BLANKS
_CASED_WORD = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+{suffix}"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*{suffix}"
)
# How llama.cpp reads the two classes: every letter beyond ASCII is upper and lower case at once, and no mark is either.
_CASED_WORD_IN_LLAMA_CPP = (
    r"[^\r\n\p{L}\p{N}]?(?:(?=\p{L})[^a-z])*(?:(?=\p{L})[^A-Z])+{suffix}"
    r"|[^\r\n\p{L}\p{N}]?(?:(?=\p{L})[^a-z])+(?:(?=\p{L})[^A-Z])*{suffix}"
)
_AFTER_CASED_WORD = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _BLANKS


def _tekken(word: str) -> str:
    return word.replace("{suffix}", "") + r"|\p{N}" + _AFTER_CASED_WORD


def _gpt_4o(word: str) -> str:
    return word.replace("{suffix}", _CONTRACTION + "?") + r"|\p{N}{1,3}" + _AFTER_CASED_WORD


_DEEPSEEK_V3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*" + _BLANKS
)


def _split(*regexes: str) -> tuple[Step, ...]:
    return tuple(("Split", regex) for regex in regexes)


_BYTES: tuple[Step, ...] = (("ByteLevel", False),)
_BYTES_AND_GPT_2: tuple[Step, ...] = (("ByteLevel", True),)


def _deepseek_coder(east_asian: str) -> tuple[Step, ...]:
    return (*_split(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", east_asian), ("Digits", True), *_BYTES)


@dataclass(frozen=True)
class PreTokenizer:
    """One of llama.cpp's pre-tokenizers.

    steps: those of tokenizer.json, as `steps_of` gives them. whole_words_first: takes a word that is in the vocabulary
    before it tries merges, as `ignore_merges` does. followed: the steps that llama.cpp really follows, where it only
    comes close to `steps`, and what that means for a text.
    """

    name: str
    steps: tuple[Step, ...]
    whole_words_first: bool = False
    followed: tuple[Step, ...] | None = None
    difference: str = ""


_CASED = "words with combining marks (Hindi, Thai, Arabic vowels) and words of mixed case beyond ASCII"
PRE_TOKENIZERS = (
    PreTokenizer("gpt-2", _BYTES_AND_GPT_2),
    PreTokenizer("smollm", (("Digits", True), *_BYTES_AND_GPT_2)),
    PreTokenizer("llama-bpe", _split(_LLAMA_3) + _BYTES, whole_words_first=True),
    PreTokenizer("dbrx", _split(_LLAMA_3) + _BYTES),
    PreTokenizer("qwen2", _split(_QWEN_2) + _BYTES),
    PreTokenizer("qwen35", _split(_QWEN_3_5) + _BYTES),
    PreTokenizer("deepseek-v3", _split(r"\p{N}{1,3}", "[一-龥\u3040-ゟ\u30a0-ヿ]+", _DEEPSEEK_V3) + _BYTES),
    PreTokenizer(
        "deepseek-coder",
        _deepseek_coder("[一-龥ࠀ-一가-퟿]+"),
        followed=_deepseek_coder(r"[[一-龥ࠀ-一가-퟿]&&\S]+"),
        difference="blanks beyond ASCII",
    ),
    PreTokenizer(
        "tekken",
        _split(_tekken(_CASED_WORD)) + _BYTES,
        whole_words_first=True,
        followed=_split(_tekken(_CASED_WORD_IN_LLAMA_CPP)) + _BYTES,
        difference=_CASED,
    ),
    PreTokenizer(
        "gpt-4o",
        _split(_gpt_4o(_CASED_WORD)) + _BYTES,
        followed=_split(_gpt_4o(_CASED_WORD_IN_LLAMA_CPP)) + _BYTES,
        difference=_CASED,
    ),
)


def known(name: str) -> PreTokenizer:
    """The pre-tokenizer of this name."""
    return next(pre for pre in PRE_TOKENIZERS if pre.name == name)


def pre_tokenizer_name(spec: dict[str, Any], backend: Any, where: str, notes: list[str]) -> str:
    """The name for `tokenizer.ggml.pre`. backend: the `tokenizers.Tokenizer` that `spec` is the JSON of.

    Raises WhetError where no name of llama.cpp does what this tokenizer does.
    """
    _check_normalizer(spec["normalizer"], where, notes)
    found = _matching(spec, backend, where, notes)
    wanted = spec["model"].get("ignore_merges", False)
    exact = [pre for pre in found if pre.whole_words_first == wanted]
    pre = (exact or found)[0]
    if not exact:
        check_merges_reach_every_token(spec, backend.model, pre.name, where)
    if pre.followed:
        notes.append(f"llama.cpp's {pre.name!r} cuts {pre.difference} at other places: give it token ids for such text")
    return pre.name


def _check_normalizer(normalizer: dict[str, Any] | None, where: str, notes: list[str]) -> None:
    if normalizer is None:
        return
    if normalizer["type"] != "NFC":
        raise WhetError(f"llama.cpp has no normalizer {json.dumps(normalizer)} for byte-level BPE", where=where)
    notes.append("the tokenizer normalizes text to NFC and llama.cpp does not: give it text in NFC")


def _matching(spec: dict[str, Any], backend: Any, where: str, notes: list[str]) -> list[PreTokenizer]:
    """The pre-tokenizers with these steps, or that cut every string the same."""
    steps = steps_of(spec["pre_tokenizer"])
    if found := [pre for pre in PRE_TOKENIZERS if pre.steps == steps]:
        return found
    if found := _cutting_alike(backend.pre_tokenizer):
        notes.append(
            f"the pre-tokenizer is spelled otherwise than llama.cpp's {found[0].name!r}, and cuts "
            f"{len(strings()):,} strings the same"
        )
        return found
    raise WhetError(
        "llama.cpp has no pre-tokenizer known to whet that cuts text by "
        + (", then ".join(f"{kind} {what}" for kind, what in steps) or "nothing at all"),
        where=where,
        fix="whet knows " + ", ".join(pre.name for pre in PRE_TOKENIZERS),
    )


def steps_of(pre_tokenizer: dict[str, Any] | None) -> tuple[Step, ...]:
    """A pre-tokenizer as a tuple of (type, what matters of it); ("?", json) for what no known name could match."""
    if pre_tokenizer is None:
        return ()
    kind = pre_tokenizer["type"]
    if kind == "Sequence":
        return tuple(step for part in pre_tokenizer["pretokenizers"] for step in steps_of(part))
    if kind == "ByteLevel" and not pre_tokenizer["add_prefix_space"]:
        return (("ByteLevel", pre_tokenizer["use_regex"]),)
    if kind == "Digits":
        return (("Digits", pre_tokenizer["individual_digits"]),)
    isolated = kind == "Split" and pre_tokenizer["behavior"] == "Isolated" and not pre_tokenizer["invert"]
    if isolated and "Regex" in pre_tokenizer["pattern"]:
        return (("Split", pre_tokenizer["pattern"]["Regex"]),)
    return (("?", json.dumps(pre_tokenizer)),)


def built(steps: tuple[Step, ...]) -> Any:
    """The `tokenizers.pre_tokenizers.PreTokenizer` of these steps."""
    from tokenizers import Regex, pre_tokenizers

    def part(kind: str, what: Any) -> Any:
        if kind == "Split":
            return pre_tokenizers.Split(Regex(what), behavior="isolated", invert=False)
        if kind == "Digits":
            return pre_tokenizers.Digits(individual_digits=what)
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=what)

    return pre_tokenizers.Sequence([part(kind, what) for kind, what in steps])


def _cutting_alike(pre_tokenizer: Any) -> list[PreTokenizer]:
    if pre_tokenizer is None:
        return []
    expected = [pre_tokenizer.pre_tokenize_str(text) for text in strings()]
    return [
        pre
        for pre in PRE_TOKENIZERS
        if all(
            cut == wanted
            for cut, wanted in zip(map(built(pre.steps).pre_tokenize_str, strings()), expected, strict=True)
        )
    ]


def check_merges_reach_every_token(spec: dict[str, Any], bpe: Any, name: str, where: str) -> None:
    """`ignore_merges` changes nothing where merges turn each token's own text back into that token."""
    model = spec["model"]
    added = {token["id"] for token in spec["added_tokens"]}
    options = {key: model[key] for key in ("byte_fallback", "fuse_unk", "unk_token") if model.get(key)}
    merging = type(bpe)(vocab=model["vocab"], merges=[pair(merge) for merge in model["merges"]], **options)
    for text, index in model["vocab"].items():
        if index not in added and not _is_byte(text) and [token.id for token in merging.tokenize(text)] != [index]:
            raise WhetError(
                f"ignore_merges of this tokenizer is not llama.cpp's for {name!r}, and it matters: merges do not lead "
                f"to the token {text!r}",
                where=where,
                fix="train the tokenizer again with the other value of ignore_merges",
            )


def _is_byte(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def pair(merge: str | list[str]) -> tuple[str, str]:
    """A merge of tokenizer.json, in either of its spellings."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right
