"""Web pages of one file: no scripts, nothing fetched, every value escaped. Templates and the style lie beside this."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from whet.files import write_text

FOLDER = Path(__file__).parent


def write_page(path: Path, template: str, **values: Any) -> None:
    """Fill in the template of that name and write it to `path` in one step.

    Jinja escapes every value, and the page's own policy forbids scripts and anything from elsewhere, should a template
    ever forget. A name that a template reads and `values` lacks raises jinja2.UndefinedError.
    """
    write_text(path, _environment().get_template(template).render(values))


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
