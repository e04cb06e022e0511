"""A Hugging Face tokenizer in GGUF's terms, or a WhetError where llama.cpp would not cut text the same way.

llama.cpp has its own tokenizers. For byte-level BPE (`gpt2` in GGUF) it needs the name of one of the pre-tokenizers
built into it; the name is read off the structure of the tokenizer's own pre-tokenizer, never guessed. For BPE with
byte fallback on "▁"-marked text (`llama` in GGUF, as in Llama 2) it needs a score for each token: two neighbours merge
if their joint text is a token, best score first. That is the same as merge ranks only where every split of a token
into two tokens is a merge, and the merges of one token follow each other; both are checked.
Source: llama.cpp's `llama-vocab.cpp` for what each name means; gguf's `constants.py` for the keys.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType

from whet.errors import WhetError
from whet.export.gguf_llama import read_json

_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_2 = _LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
_CASED_WORD = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+{suffix}"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*{suffix}"
)
_CASED_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = _CASED_WORD.replace("{suffix}", "") + r"|\p{N}" + _CASED_REST
_GPT_4O = _CASED_WORD.replace("{suffix}", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?") + r"|\p{N}{1,3}" + _CASED_REST

_Step = tuple[str, Any]
# The steps of a pre-tokenizer -> llama.cpp's name for it, and whether that name takes a whole word that is in the
# vocabulary before it tries merges (`ignore_merges` in tokenizer.json).
PRE_TOKENIZERS: dict[tuple[_Step, ...], tuple[str, bool]] = {
    (("ByteLevel", True),): ("gpt-2", False),
    (("Digits", True), ("ByteLevel", True)): ("smollm", False),
    (("Split", _LLAMA_3), ("ByteLevel", False)): ("llama-bpe", True),
    (("Split", _QWEN_2), ("ByteLevel", False)): ("qwen2", False),
    (("Split", _TEKKEN), ("ByteLevel", False)): ("tekken", True),
    (("Split", _GPT_4O), ("ByteLevel", False)): ("gpt-4o", False),
}

# Names whose regex llama.cpp does not follow for combining marks, as in Hindi: measured, and noted in the report.
MARKS_CUT_DIFFERENTLY = frozenset({"tekken", "gpt-4o"})


@dataclass
class GGUFTokenizer:
    """Everything GGUF keeps of a tokenizer, ready to write. `notes`: what llama.cpp may do differently."""

    model: str
    pre: str
    tokens: list[str]
    types: list[TokenType]
    merges: list[str]
    scores: list[float] | None
    ids: dict[str, int]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool | None
    chat_template: str | list[dict[str, str]] | None
    notes: list[str] = field(default_factory=list)

    def write(self, writer: GGUFWriter) -> None:
        """Write the `tokenizer.*` keys."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores is None:
            writer.add_token_merges(self.merges)
        else:
            writer.add_token_scores(self.scores)
        for name, token_id in self.ids.items():
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token_id)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        if self.add_space_prefix is not None:
            writer.add_add_space_prefix(self.add_space_prefix)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def read_tokenizer(model_dir: Path, embedding_rows: int) -> GGUFTokenizer:
    """Read the tokenizer of a model folder as transformers loads it.

    Embedding rows beyond the tokenizer's vocabulary become unused tokens. Raises WhetError when the vocabulary is
    larger than the embedding, or llama.cpp has no equal of the tokenizer.
    """
    where = str(model_dir / "tokenizer.json")
    if not (model_dir / "tokenizer.json").is_file():
        raise WhetError(
            "the file is missing", where=where, fix="save the tokenizer beside the model: tokenizer.save_pretrained"
        )
    from transformers import AutoTokenizer  # slow to import, and only needed here

    try:
        tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    except Exception as error:  # tokenizers raises nothing more precise
        raise WhetError(f"the tokenizer cannot be loaded: {error}", where=where, fix="save it again") from error
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    notes: list[str] = []
    model = spec["model"]
    if model["type"] != "BPE":
        raise WhetError(
            f"a {model['type']} tokenizer has no equal in whet's GGUF", where=where, fix="use a BPE tokenizer"
        )
    if model.get("dropout") or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise WhetError("BPE with dropout, a subword prefix or a word suffix has no equal in llama.cpp", where=where)
    tokens, types = _vocabulary(spec, embedding_rows, where, notes)
    add_bos, add_eos = _added_around_text(tokenizer, where)
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    result = GGUFTokenizer(
        model="gpt2",
        pre="",
        tokens=tokens,
        types=types,
        merges=merges,
        scores=None,
        ids=_special_ids(tokenizer, model_dir, where, notes),
        add_bos=add_bos,
        add_eos=add_eos,
        add_space_prefix=None,
        chat_template=_chat_template(tokenizer),
        notes=notes,
    )
    if model.get("byte_fallback"):
        _as_sentencepiece(result, spec, where)
    else:
        result.pre = _pre_tokenizer_name(spec, tokenizer.backend_tokenizer.model, where, notes)
    return result


def _vocabulary(
    spec: dict[str, Any], embedding_rows: int, where: str, notes: list[str]
) -> tuple[list[str], list[TokenType]]:
    """The text and type of each embedding row."""
    by_id = {index: (text, TokenType.NORMAL) for text, index in spec["model"]["vocab"].items()}
    for added in spec["added_tokens"]:
        by_id[added["id"]] = (added["content"], TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED)
        strict = [name for name in ("lstrip", "rstrip", "single_word") if added[name]]
        if strict:
            notes.append(f"llama.cpp ignores {' and '.join(strict)} of the added token {added['content']!r}")
    size = max(by_id) + 1
    if size > embedding_rows:
        raise WhetError(
            f"the tokenizer has {size} tokens but the model's embedding has {embedding_rows} rows",
            where=where,
            fix="call model.resize_token_embeddings(len(tokenizer)) before training, or use the model's own tokenizer",
        )
    rows = [by_id.get(index, (f"[PAD{index}]", TokenType.UNUSED)) for index in range(embedding_rows)]
    return [text for text, _ in rows], [kind for _, kind in rows]


def _added_around_text(tokenizer: Any, where: str) -> tuple[bool, bool]:
    """Whether the tokenizer puts BOS before and EOS after a text; found by asking it."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for bos in (False, True):
        for eos in (False, True):
            if whole == [tokenizer.bos_token_id] * bos + plain + [tokenizer.eos_token_id] * eos:
                return bos, eos
    raise WhetError(
        f"the tokenizer adds more than BOS and EOS around a text (token ids {whole} for 'a'), which GGUF cannot say",
        where=where,
        fix="remove the post-processor from tokenizer.json and put such tokens into the chat template",
    )


def _special_ids(tokenizer: Any, model_dir: Path, where: str, notes: list[str]) -> dict[str, int]:
    """GGUF's name -> token id: bos, eos, unknown, padding, and eot and eom for further tokens that end a turn."""
    if tokenizer.eos_token_id is None:
        raise WhetError(
            "the tokenizer has no eos token, and llama.cpp would take another token for it",
            where=where,
            fix='set it, for example tokenizer.eos_token = "<|im_end|>", and save the tokenizer again',
        )
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {gguf: getattr(tokenizer, f"{hf}_token_id") for hf, gguf in names.items()}
    ids = {name: index for name, index in ids.items() if index is not None}
    stops = _generation_stops(model_dir)
    further = [index for index in stops if index != tokenizer.eos_token_id]
    ids.update(zip(("eot", "eom"), further, strict=False))
    for index in further[2:]:
        notes.append(f"GGUF has no room for the stop token {tokenizer.convert_ids_to_tokens(index)!r} ({index})")
    return ids


def _generation_stops(model_dir: Path) -> list[int]:
    path = model_dir / "generation_config.json"
    if not path.is_file():
        return []
    stops = read_json(path).get("eos_token_id")
    return [] if stops is None else [stops] if isinstance(stops, int) else list(stops)


def _chat_template(tokenizer: Any) -> str | list[dict[str, str]] | None:
    template = tokenizer.chat_template
    if isinstance(template, dict):
        return [{"name": name, "template": text} for name, text in template.items()]
    return template


# Byte-level BPE


def _steps(pre_tokenizer: dict[str, Any] | None) -> tuple[_Step, ...]:
    """A pre-tokenizer as a tuple of (type, what matters of it); ("?", json) for what no known name could match."""
    if pre_tokenizer is None:
        return ()
    kind = pre_tokenizer["type"]
    if kind == "Sequence":
        return tuple(step for part in pre_tokenizer["pretokenizers"] for step in _steps(part))
    if kind == "ByteLevel" and not pre_tokenizer["add_prefix_space"]:
        return (("ByteLevel", pre_tokenizer["use_regex"]),)
    if kind == "Digits":
        return (("Digits", pre_tokenizer["individual_digits"]),)
    isolated = kind == "Split" and pre_tokenizer["behavior"] == "Isolated" and not pre_tokenizer["invert"]
    if isolated and "Regex" in pre_tokenizer["pattern"]:
        return (("Split", pre_tokenizer["pattern"]["Regex"]),)
    return (("?", json.dumps(pre_tokenizer)),)


def _pre_tokenizer_name(spec: dict[str, Any], bpe: Any, where: str, notes: list[str]) -> str:
    normalizer = spec["normalizer"]
    if normalizer is not None:
        if normalizer["type"] != "NFC":
            raise WhetError(f"llama.cpp has no normalizer {json.dumps(normalizer)} for byte-level BPE", where=where)
        notes.append("the tokenizer normalizes text to NFC and llama.cpp does not: give it text in NFC")
    steps = _steps(spec["pre_tokenizer"])
    if steps not in PRE_TOKENIZERS:
        raise WhetError(
            "llama.cpp has no pre-tokenizer known to whet that cuts text by "
            + (", then ".join(f"{kind} {what}" for kind, what in steps) or "nothing at all"),
            where=where,
            fix="whet knows " + ", ".join(name for name, _ in PRE_TOKENIZERS.values()),
        )
    name, whole_words_first = PRE_TOKENIZERS[steps]
    if name in MARKS_CUT_DIFFERENTLY:
        notes.append(f"llama.cpp's {name!r} cuts words with combining marks (Hindi, Arabic vowels) at other places")
    if whole_words_first != spec["model"].get("ignore_merges", False):
        _check_merges_reach_every_token(spec, bpe, name, where)
    return name


def _check_merges_reach_every_token(spec: dict[str, Any], bpe: Any, name: str, where: str) -> None:
    """`ignore_merges` changes nothing where merges turn each token's own text back into that token."""
    added = {token["id"] for token in spec["added_tokens"]}
    bpe_without = type(bpe)(vocab=spec["model"]["vocab"], merges=[_pair(m) for m in spec["model"]["merges"]])
    for text, index in spec["model"]["vocab"].items():
        if index not in added and [token.id for token in bpe_without.tokenize(text)] != [index]:
            raise WhetError(
                f"ignore_merges of this tokenizer is not llama.cpp's for {name!r}, and it matters: merges do not lead "
                f"to the token {text!r}",
                where=where,
                fix="train the tokenizer again with the other value of ignore_merges",
            )


def _pair(merge: str | list[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


# BPE with byte fallback, SentencePiece's kind

_SPACE = "▁"


def _as_sentencepiece(result: GGUFTokenizer, spec: dict[str, Any], where: str) -> None:
    """Turn `result` into GGUF's `llama` tokenizer: scores, byte tokens, the space prefix."""
    prefix = _space_prefix(spec)
    if prefix is None:
        raise WhetError(
            "llama.cpp has no equal of this byte-fallback tokenizer's normalizer "
            f"{json.dumps(spec['normalizer'])} and pre-tokenizer {json.dumps(spec['pre_tokenizer'])}",
            where=where,
            fix='whet knows Llama 2\'s: Prepend "▁" and Replace " " by "▁", or Metaspace without split',
        )
    if prefix == "first":
        result.notes.append(
            "llama.cpp puts a space before text after every special token; this tokenizer only at the start of a text"
        )
    ranks = _token_ranks(spec["model"], where)
    result.model, result.pre, result.add_space_prefix = "llama", "default", prefix != "never"
    worst = float(len(ranks) + 1)
    result.scores = [-float(ranks.get(text, worst)) for text in result.tokens]
    for index, text in enumerate(result.tokens):
        if result.types[index] is TokenType.NORMAL and len(text) == 6 and text.startswith("<0x"):
            result.types[index], result.scores[index] = TokenType.BYTE, 0.0
    if "unknown" in result.ids:
        result.types[result.ids["unknown"]] = TokenType.UNKNOWN


def _space_prefix(spec: dict[str, Any]) -> str | None:
    """When "▁" is put before a text: "always", "first" or "never"; None for a structure llama.cpp has no equal of."""
    normalizer, pre = spec["normalizer"], spec["pre_tokenizer"]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    if pre is None and normalizer is not None:
        if normalizer == {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": _SPACE}, replace]}:
            return "always"
        return "never" if normalizer == replace else None
    if normalizer is None and pre["type"] == "Metaspace" and pre["replacement"] == _SPACE and not pre["split"]:
        return str(pre["prepend_scheme"])
    return None


def _token_ranks(model: dict[str, Any], where: str) -> dict[str, int]:
    """Merged token -> its place among merged tokens. Raises WhetError where places are not the same as merge ranks."""
    vocab = model["vocab"]
    pairs = [_pair(merge) for merge in model["merges"]]
    ranks: dict[str, int] = {}
    previous = None
    for left, right in pairs:
        token = left + right
        if token != previous and token in ranks:
            raise WhetError(f"the merges of the token {token!r} do not follow each other, as scores need", where=where)
        ranks.setdefault(token, len(ranks) + 1)
        previous = token
    listed = set(pairs)
    for token in ranks:
        for cut in range(1, len(token)):
            pair = (token[:cut], token[cut:])
            if pair[0] in vocab and pair[1] in vocab and pair not in listed:
                raise WhetError(
                    f"llama.cpp would merge {pair[0]!r} and {pair[1]!r}, which are both tokens as is {token!r}, but "
                    "this tokenizer has no such merge",
                    where=where,
                    fix="use a byte-level BPE tokenizer, or one converted from SentencePiece",
                )
    return ranks
