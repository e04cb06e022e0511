"""What GGUF keeps of a tokenizer, and how it is written."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from gguf import GGUFWriter, TokenType

from whet.export.gguf_tokenizer.carried import KEY as CARRIED

# A model's name with this in it makes llama.cpp drop blanks after special tokens, as Phi-3's tokenizer does.
STRIPS_RIGHT = re.compile("phi-?3", re.IGNORECASE)


@dataclass
class GGUFTokenizer:
    """A tokenizer, ready to write.

    model: `gpt2` or `llama`, GGUF's names for the two kinds. pre: the name of llama.cpp's pre-tokenizer.
    tokens, types: the text and type of each embedding row. merges: written for `gpt2`; scores: for `llama`.
    ids: GGUF's name of a special token ("eos", "eot", "padding", ...) -> its id.
    strips_right: blanks after a special token belong to that token. notes: what llama.cpp may do differently.
    carried: tokenizer.json, for those who ask llama.cpp with token ids; None where its own tokenizer does the same.
    """

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
    chat_template: str | dict[str, str] | None
    strips_right: bool = False
    notes: list[str] = field(default_factory=list)
    carried: str | None = None

    def model_name(self, name: str) -> str:
        """`name` as it must stand in `general.name`: llama.cpp reads from it whether special tokens strip blanks."""
        if self.strips_right:
            return name if STRIPS_RIGHT.search(name) else f"{name} (phi-3)"
        return STRIPS_RIGHT.sub("phi 3", name)

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
        if self.carried is not None:
            writer.add_string(CARRIED, self.carried)
        _write_templates(writer, self.chat_template)

    def write_vocabulary(self, path: Path) -> None:
        """A GGUF file of the tokenizer alone: enough for llama.cpp to cut text with, and written in a moment."""
        writer = GGUFWriter(path, "llama")
        writer.add_name(self.model_name("vocabulary"))
        self.write(writer)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()


def _write_templates(writer: GGUFWriter, template: str | dict[str, str] | None) -> None:
    """The chat template; named ones under `tokenizer.chat_template.NAME`, and their names in order."""
    templates = {"default": template} if isinstance(template, str) else template or {}
    # GGUFWriter.add_chat_template lists the names in the order of a set, which changes from run to run.
    named = {re.sub("[^A-Za-z0-9]", "_", name): text for name, text in templates.items() if name != "default"}
    for name in sorted(named):
        writer.add_string(f"tokenizer.chat_template.{name}", named[name])
    if named:
        writer.add_array("tokenizer.chat_templates", sorted(named))
    if templates.get("default"):
        writer.add_string("tokenizer.chat_template", templates["default"])
