"""Reading the JSON files of a model folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from whet.errors import WhetError

AGAIN = "save it again, or copy it again from its source"


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises WhetError where it is missing, can't be read, or is no JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WhetError(
            "the file is missing", where=str(path), fix="give the folder that save_pretrained wrote"
        ) from None
    except OSError as error:
        raise WhetError(f"the file cannot be read: {error.strerror}", where=str(path), fix=AGAIN) from None
    except ValueError as error:  # no JSON, or no UTF-8
        raise WhetError(f"this is not valid JSON: {error}", where=str(path), fix=AGAIN) from None
    if not isinstance(content, dict):
        raise WhetError("this is not a JSON object", where=str(path), fix=AGAIN)
    return content
