"""proof.html: what was compared, with what it was held to, for people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from whet.export.proof.checks import Proof
from whet.pages import write_page
from whet.pages.numbers import compact, count

NAME = "proof.html"
TEMPLATE = Path(__file__).with_name("proof.html.jinja")


def write_proof(proofs: Sequence[Proof], path: Path, *, name: str, prompts: str) -> None:
    """Write the proofs of an export to one HTML file. prompts: which ones were asked, in words."""
    passed = all(proof.passed for proof in proofs)
    write_page(
        path,
        TEMPLATE,
        title=f"Proof: {name}",
        name=name,
        prompts=prompts,
        proofs=proofs,
        passed=passed,
        failed=sum(len(proof.failed) for proof in proofs),
        compact=compact,
        count=count,
    )
