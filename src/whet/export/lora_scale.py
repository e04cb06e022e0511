"""What the product B A of a LoRA adapter is multiplied with: alpha / r, or alpha / sqrt(r) for rsLoRA.

Sources: Hu et al. 2021, arXiv:2106.09685; Kalajdzievski 2023, arXiv:2312.03732.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

USUAL_ALPHA = 8  # PEFT's, where the config names none


def lora_scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """Of one module. config: the fields of adapter_config.json; the first match of its alpha_pattern goes first."""
    patterns: Mapping[str, float] = config.get("alpha_pattern") or {}
    matching = (alpha for pattern, alpha in patterns.items() if re.fullmatch(rf"(.*\.)?({pattern})", module))
    alpha = float(next(matching, config.get("lora_alpha", USUAL_ALPHA)))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
