"""The packages that the web page needs, and what to type where they are missing."""

from __future__ import annotations

from importlib.util import find_spec

from whet.errors import WhetError

PACKAGES = ("fastapi", "uvicorn", "markdown_it")


def need_web() -> None:
    """Raises WhetError naming what is missing."""
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        what = f"the page needs {' and '.join(missing)}, not installed here"
        raise WhetError(what, where="whet ab serve", fix='pip install "whet[ab]"')
