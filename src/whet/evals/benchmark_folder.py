"""Looks through a folder of lm-evaluation-harness tasks for what would run as code when the harness reads them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import yaml

from whet.errors import WhetError

PLAIN = "tag:yaml.org,2002:"
"""Tags of values; the harness's own, such as !function, name Python."""


def check_include(folder: Path) -> None:
    """Raises WhetError where the harness would run Python that the folder's files name, or read pickles."""
    for path in sorted(folder.rglob("*.y*ml")):
        try:
            node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise WhetError(f"not readable as YAML: {error}", where=str(path), fix="mend the file") from error
        for reason in _code_in(node):
            fix = "read it, then allow it: --allow-python (allow_python=True)"
            raise WhetError(f"the benchmark would run code: {reason}", where=str(path), fix=fix)


def _code_in(node: yaml.Node | None) -> Iterator[str]:
    """What in a task of the harness runs code of its own, or leads to files that may."""
    if node is None:
        return
    if not node.tag.startswith(PLAIN):
        yield f"the tag {node.tag} on line {node.start_mark.line + 1}"
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _code_in(item)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            said = str(value.value) if isinstance(value, yaml.ScalarNode) else ""
            if key.value == "class":
                yield f"the class {said}"
            elif key.value == "include" and (said.startswith(("/", "~")) or ".." in said):
                yield f"it includes {said}, which lies elsewhere"
            elif key.value == "dataset_path" and (said == "pandas" or said.endswith(".py")):
                yield f"its data are read by {said}, which may run code"
            yield from _code_in(value)
