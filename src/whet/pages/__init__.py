"""Web pages of one file: no scripts, nothing fetched, every value escaped.

The page's frame and its style lie beside this file; the template of a page lies beside the code that fills it in.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from whet.files import write_text

FOLDER = Path(__file__).parent


def write_page(path: Path, template: Path, **values: Any) -> None:
    """Fill in the template and write it to `path` in one step. It extends page.html.jinja, which puts the style in.

    Jinja escapes every value, and the page's own policy forbids scripts and anything from elsewhere, should a template
    ever forget. A name that a template reads and `values` lacks raises jinja2.UndefinedError.
    """
    write_text(path, _environment(template.parent).get_template(template.name).render(values))


@cache
def _environment(folder: Path) -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, FOLDER]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
