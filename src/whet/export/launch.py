"""The files that start vLLM on an export: its own configuration file, and a script that calls it.

Source: vLLM's documentation of `vllm serve --config` (argument names in their long form) and of VLLM_API_KEY.
"""

from __future__ import annotations

import stat
from pathlib import Path

import yaml

from whet.files import write_text

CONFIG, SCRIPT = "vllm.yaml", "vllm.sh"
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}

SCRIPT_TEXT = """\
#!/bin/sh
# Serves the merged model with vLLM, on this machine alone. Further options go to `vllm serve`.
cd "$(dirname "$0")" || exit 1
if [ -z "$VLLM_API_KEY" ]; then
    echo "set VLLM_API_KEY to the key that clients must send" >&2
    exit 2
fi
exec vllm serve --config vllm.yaml "$@"
"""


def write_launch(folder: Path, *, model: str, name: str, format: str, context: int) -> None:
    """Write vllm.yaml and vllm.sh into `folder`.

    model: the merged folder's name in it. name: what clients call the model. format: of its weights. context: tokens.
    The key comes from the environment, so that no file holds it.
    """
    settings = {
        "model": f"./{model}",
        "served-model-name": name,
        "host": "127.0.0.1",
        "port": 8000,
        "dtype": DTYPES.get(format, "auto"),
        "max-model-len": context,
    }
    write_text(folder / CONFIG, yaml.safe_dump(settings, sort_keys=False))
    script = folder / SCRIPT
    write_text(script, SCRIPT_TEXT)
    script.chmod(script.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
