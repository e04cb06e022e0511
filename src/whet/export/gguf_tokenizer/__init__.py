"""A Hugging Face tokenizer in GGUF's terms, or a WhetError where llama.cpp would not cut text the same way.

llama.cpp has its own tokenizers, so nothing is converted by name: what a tokenizer does is read off its structure or
measured on `strings.strings`, and llama.cpp's settings are chosen to do the same. `byte_level` covers GPT-2's kind
(`gpt2` in GGUF), `byte_fallback` SentencePiece's kind (`llama` in GGUF), `added` the added tokens, `special` the tokens
around a text and at its end. Where llama.cpp can only come close, the result's notes say for which text, the file
carries tokenizer.json (`carried`), and `llama_cpp_cut` tells exactly what llama.cpp does instead.
"""

from whet.export.gguf_tokenizer.reading import load_tokenizer, read_tokenizer
from whet.export.gguf_tokenizer.written import GGUFTokenizer

__all__ = ["GGUFTokenizer", "load_tokenizer", "read_tokenizer"]
