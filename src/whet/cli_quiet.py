"""One voice on the terminal: what the libraries would say there is turned off."""

from __future__ import annotations

import logging
import os
import warnings

from rich.console import Console
from rich.logging import RichHandler


def quiet_libraries() -> None:
    """whet's own log goes to stderr through rich; the libraries' warnings and bars are off. Call it before the work."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # in worker processes too
    os.environ.setdefault("DISABLE_MLFLOW_INTEGRATION", "TRUE")  # trl would load it, for a second
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in ("bitsandbytes", "trl", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    handler = RichHandler(console=Console(stderr=True, highlight=False), show_time=False, show_path=False)
    logging.getLogger("whet").addHandler(handler)
