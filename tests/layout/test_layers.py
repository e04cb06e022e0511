"""The layout's rules, read from the source: who may import whom, no patching, no pickle, no traces of its making."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import whet

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "whet"
MODULES = sorted(SOURCE.rglob("*.py"))

EVERYTHING = "*"
COMMON = {"addresses", "errors", "files", "retry_after", "units"}
MAY_IMPORT = {
    "addresses": "",
    "retry_after": "",
    "errors": "",
    "files": "",
    "units": "",
    "kernels": "",
    "quant": "",
    "models": "kernels quant",
    "pages": "",
    "data": "pages",
    "recipe": "evals yaml_faults",
    "recipe_evals": "recipe runs data evals",
    "eval_models": "recipe recipe_model runs models evals",
    "eval_gate": "eval_models recipe_evals runs evals yaml_faults",
    "yaml_faults": "",
    "recipe_data": "recipe data runs",
    "find_rate": "recipe recipe_data recipe_model data models train",
    "recipe_docs": "recipe yaml_faults",
    "runs": "recipe pages",
    "plan": "models",
    "evals": "models data yaml_faults",
    "train": "kernels models data plan recipe runs",
    "export": "models quant data pages",
    "serve": "models data export",
    "language_model": "models export",
    "recipe_model": "recipe data models language_model",
    "__init__": "",
    "compat": EVERYTHING,
    "pipeline": EVERYTHING,
    "stages": EVERYTHING,
    "cli": EVERYTHING,
    "cli_quiet": "",
    "cli_data": EVERYTHING,
    "cli_report": EVERYTHING,
    "cli_ab": EVERYTHING,
    "cli_judge": EVERYTHING,
    "cli_eval": EVERYTHING,
    "cli_runs": EVERYTHING,
    "cli_serve": EVERYTHING,
    "cli_doctor": EVERYTHING,
    "cli_export": EVERYTHING,
    "export_run": EVERYTHING,
}
REFUSED_MODULES = {"pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib"}
REFUSED_CALLS = {"exec", "eval", "__import__", "torch.load", "inspect.getsource", "inspect.getsourcelines"}


def layer(path: Path) -> str:
    """A file's layer: the folder, or the module's own name, directly under whet."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(module, name) of each import, wherever in the file it stands; the name is empty for `import module`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the layer they come from"
            yield from ((node.module or "", alias.name) for alias in node.names)


def layers_imported(tree: ast.AST) -> set[str]:
    """The layers of whet that a file imports; a public name of `whet` counts as the layer it lives in."""
    found = set()
    for module, name in imports(tree):
        if module == "whet":
            module = whet._HOME.get(name, f"whet.{name}")
        if module.startswith("whet."):
            found.add(module.split(".")[1])
    return {target for target in found if (SOURCE / target).is_dir() or (SOURCE / f"{target}.py").is_file()}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_module_imports_only_what_its_layer_may(path: Path) -> None:
    """Catches an export that needs the trainer, or a kernel that knows about models."""
    own = layer(path)
    assert own in MAY_IMPORT, f"say in MAY_IMPORT what the new layer {own} may import"
    if MAY_IMPORT[own] == EVERYTHING:
        return
    allowed = COMMON | {own} | set(MAY_IMPORT[own].split())
    foreign = layers_imported(ast.parse(path.read_text(encoding="utf-8"))) - allowed
    assert not foreign, f"{path.name} imports {', '.join(sorted(foreign))}"


def test_the_rule_sees_every_way_to_import() -> None:
    """Catches an import inside a function, or through the package's public names, that the rule does not count."""
    tree = ast.parse(
        "import whet.export.merge\ndef f():\n    from whet import SFTTrainer\n    from whet.data import pack"
    )
    assert layers_imported(tree) == {"export", "train", "data"}


def faults(tree: ast.AST) -> list[str]:
    """Each place where a file changes what it imported, runs text as code, or reads pickles."""
    modules = {module for module, _ in imports(tree)}
    found = [f"imports {module}" for module in modules if module.split(".")[0] in REFUSED_MODULES]
    found += [f"imports {module}.{name}" for module, name in imports(tree) if f"{module}.{name}" in REFUSED_CALLS]
    names = {
        (alias.asname or alias.name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom) and not _is_future(node)
        for alias in node.names
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
            if isinstance(node, ast.Subscript) and not ast.unparse(node.value).endswith(("__dict__", "sys.modules")):
                continue
            if _root(node) in names:
                found.append(f"line {node.lineno} assigns to {ast.unparse(node)}")
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in REFUSED_CALLS:
                found.append(f"line {node.lineno} calls {called}")
            if called in ("setattr", "delattr") and _root(node.args[0]) in names:
                found.append(f"line {node.lineno} changes {ast.unparse(node.args[0])}")
    return found


def _is_future(node: ast.Import | ast.ImportFrom) -> bool:
    return isinstance(node, ast.ImportFrom) and node.module == "__future__"


def _root(node: ast.AST) -> str | None:
    """The name at the left of a.b[c].d."""
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_nothing_imported_is_changed(path: Path) -> None:
    """Catches a patched library, code run from text, and pickles. `compat.exec` alone sets up a program."""
    found = faults(ast.parse(path.read_text(encoding="utf-8")))
    if path == SOURCE / "compat" / "exec.py":
        found = [fault for fault in found if "assigns to sys." not in fault]
    assert not found, f"{path.name}: {'; '.join(found)}"


@pytest.mark.parametrize(
    "code",
    [
        "import torch\ntorch.nn.functional.cross_entropy = print",
        "from trl import SFTTrainer\nSFTTrainer.train = print",
        "import trl as t\nsetattr(t.SFTTrainer, 'train', print)",
        "import sys\nsys.modules['x'] = sys",
        "from torch.nn import Linear\ndel Linear.forward",
        "from torch.nn import Linear\nLinear.__dict__['forward'] = print",
        "exec('1')",
        "from inspect import getsource",
        "import inspect\ninspect.getsource(print)",
        "import pickle",
        "from dill import loads",
        "import torch\ntorch.load('x')",
    ],
)
def test_the_rule_sees_what_it_forbids(code: str) -> None:
    """Catches a rule that passes because it looks at nothing."""
    assert faults(ast.parse(code))


def test_the_rule_lets_instances_be() -> None:
    """A model that was loaded may be changed; its class may not."""
    assert not faults(
        ast.parse("import torch\nimport os\nmodel = torch.nn.Linear(1, 1)\nmodel.x = 1\nos.environ['A'] = '1'")
    )


# Written as patterns, so that this file does not hold what it looks for.
TRACES = {
    "a path of the machine it was written on": re.compile(r"(?<![\w.~])/wor[k]/|/tmp/bri[e]f"),
    "a host that packages came from": re.compile(r"dev[p]i", re.IGNORECASE),
}
TEXT = {".py", ".md", ".toml", ".yaml", ".yml", ".json", ".jsonl", ".txt", ".mjs", ".cfg", ".sh", ""}


def text_files() -> Iterator[Path]:
    """The project's own text files: all but hidden folders, caches and what runs leave behind."""
    ignored = {line.strip("/\n") for line in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()}
    for path in sorted(ROOT.iterdir()):
        if path.name in ignored | {".git"} or (path.name.startswith(".") and path.is_dir()):
            continue
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file() and file.suffix in TEXT and not ignored & set(file.relative_to(ROOT).parts):
                yield file


def test_no_file_tells_where_it_was_written() -> None:
    files = list(text_files())
    assert SOURCE / "errors.py" in files
    found = [
        f"{file.relative_to(ROOT)} holds {what}"
        for file in files
        for what, pattern in TRACES.items()
        if pattern.search(file.read_text(encoding="utf-8"))
    ]
    assert not found
