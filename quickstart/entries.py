"""The documentation of the Python that runs this: one entry for each documented module, class and function.

Entries come from the source of the standard library, read and never run, and from the built-in modules, which have no
source and are asked for their documentation strings. Licence of the text: PSF-2.0, as Python's own.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SKIPPED = ("site-packages", "test", "lib2to3", "idlelib", "turtledemo", "ensurepip", "pydoc_data", "__pycache__")
HELD_OUT = 0.10


@dataclass(frozen=True)
class Entry:
    """One documented thing. `module` is dotted; `signature` reads like code, e.g. "def get_message(self, key)"."""

    module: str
    name: str
    signature: str
    doc: str

    @property
    def package(self) -> str:
        """The first part of the module's name."""
        return self.module.partition(".")[0]


def entries() -> Iterator[Entry]:
    """Every entry of this Python, in an order that depends on its version alone."""
    yield from source_entries(Path(sysconfig.get_path("stdlib")))
    yield from builtin_entries()


def source_entries(library: Path) -> Iterator[Entry]:
    """Entries of the .py files under a standard library's folder."""
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if any(part in SKIPPED or part.startswith("test") for part in parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue  # a few files of the library are broken on purpose, or for another Python
        yield from _walk(tree, ".".join(part for part in parts if part != "__init__"), "")


def _walk(node: ast.AST, module: str, prefix: str) -> Iterator[Entry]:
    if isinstance(node, ast.Module) and (doc := ast.get_docstring(node)):
        yield Entry(module, module, f"module {module}", doc)
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        name = f"{prefix}{child.name}"
        if doc := ast.get_docstring(child):
            yield Entry(module, name, _signature(child), doc)
        yield from _walk(child, module, f"{name}.")


def _signature(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {node.name}({bases})" if bases else f"class {node.name}"
    keyword = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    return f"{keyword} {node.name}({ast.unparse(node.args)})"


def builtin_entries() -> Iterator[Entry]:
    """Entries of the modules that are compiled into the interpreter."""
    for module in sorted(sys.builtin_module_names):
        loaded = importlib.import_module(module)
        for name, value in sorted(vars(loaded).items()):
            if not callable(value):
                continue
            yield from _documented(module, name, value)
            if inspect.isclass(value):
                for member, function in sorted(vars(value).items()):
                    if not member.startswith("__"):
                        yield from _documented(module, f"{name}.{member}", function)


def _documented(module: str, name: str, value: object) -> Iterator[Entry]:
    doc = getattr(value, "__doc__", None)
    if isinstance(doc, str) and doc.strip():
        short = name.rpartition(".")[2]
        signature = f"class {short}" if inspect.isclass(value) else f"def {short}(...)"
        yield Entry(module, name, signature, inspect.cleandoc(doc))


def summary(doc: str, limit: int = 400) -> str:
    """The first paragraph of a documentation string on one line, cut at a word before `limit` characters."""
    text = " ".join(doc.strip().split("\n\n")[0].split())
    return text if len(text) <= limit else text[:limit].rsplit(" ", 1)[0] + " ..."


def held_out(doc: str) -> bool:
    """Whether a documentation string is kept for evaluation: one in ten, by the digest of its summary.

    The built-in model's training text and the quickstart's training rows both leave these out: neither has seen them.
    """
    digest = hashlib.blake2b(summary(doc).lower().encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64 < HELD_OUT
