"""How far an artifact may be from the model it was made of, by format.

The limits are several times the distances that bench/proof.py measures: rounding differs from model to model, and small
models suffer most. What hides below a coarse format's limit is found by comparing weights, layer by layer (share.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from whet.errors import WhetError


@dataclass(frozen=True)
class Limits:
    """kl: mean KL divergence a token, nats. tail: its 99th percentile. top1: least share of positions where both find
    the same token likeliest, near ties apart. tie: nats by which the two likeliest tokens may lie apart where greedy
    answers part, for the parting to be no fault. share: how far from 1 the adapter's share in a layer may lie, rounding
    noise apart.
    """

    kl: float
    tail: float
    top1: float
    tie: float
    share: float = 0.02


EXACT = Limits(kl=5e-5, tail=5e-4, top1=0.995, tie=0.02, share=0.002)
HALF = Limits(kl=1e-3, tail=0.02, top1=0.98, tie=0.25)
EIGHT = Limits(kl=5e-3, tail=0.06, top1=0.96, tie=0.6)
SIX = Limits(kl=0.02, tail=0.2, top1=0.93, tie=1.2)
FIVE = Limits(kl=0.06, tail=0.6, top1=0.88, tie=1.8)
FOUR = Limits(kl=0.2, tail=2.0, top1=0.78, tie=3.0)
THREE = Limits(kl=0.6, tail=4.0, top1=0.65, tie=5.0)
TWO = Limits(kl=1.5, tail=8.0, top1=0.45, tie=8.0)

FORMATS: dict[str, Limits] = {
    "f32": EXACT,
    "fp32": EXACT,
    "f16": HALF,
    "fp16": HALF,
    "bf16": HALF,
    "q8_0": EIGHT,
    "fp8": SIX,
    "int8": SIX,
    "q6_k": SIX,
    "q5_0": FIVE,
    "q5_1": FIVE,
    "q5_k_s": FIVE,
    "q5_k_m": FIVE,
    "q4_0": FOUR,
    "q4_1": FOUR,
    "q4_k_s": FOUR,
    "q4_k_m": FOUR,
    "iq4_nl": FOUR,
    "nf4": FOUR,
    "w4a16": FOUR,
    "q3_k_l": THREE,
    "q3_k_m": THREE,
    "q3_k_s": THREE,
    "q2_k": TWO,
}


def limits_of(format: str) -> Limits:
    """The limits of a format. Raises WhetError for one that has none, for then nothing would be proven."""
    if format not in FORMATS:
        raise WhetError(
            f"no limits are known for the format {format!r}", where="proof", fix=f"use one of {', '.join(FORMATS)}"
        )
    return FORMATS[format]
