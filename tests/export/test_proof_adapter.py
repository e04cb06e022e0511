"""The proof of a GGUF adapter: what is right passes, and every planted fault is caught."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.export import planted
from tests.export.planted import Tuned, rewritten
from tests.llama_cpp import llama_cpp  # noqa: F401 - a fixture
from whet.export.proof import prove_adapter
from whet.export.proof.adapter_file import AdapterFile, followed
from whet.export.proof.behaviour import Answer, distribution_checks
from whet.export.proof.limits import limits_of
from whet.export.proof.reference import Asked


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    return planted.tune(tmp_path_factory.mktemp("tuned"))


@pytest.mark.usefixtures("llama_cpp")
def test_a_right_adapter_passes_and_llama_cpp_tells_one_that_is_not(tuned: Tuned, tmp_path: Path) -> None:
    """Catches a comparison that asks the base alone, or reads another row than the next token's."""
    path, base, folder = tuned.adapter()
    proof = prove_adapter(tuned.reference, path, base, folder, threads=1)
    assert proof.passed, proof.failed
    assert {"layers", "adapter's share", "KL a token", "greedy answers"} <= {check.name for check in proof.checks}
    half = rewritten(path, tmp_path / "half.gguf", {"adapter.lora.alpha": 4.0})
    file = AdapterFile(half, tuned.reference, base, folder, threads=1)
    checks, _ = distribution_checks(tuned.reference, file.log_probs(tuned.reference.asked), limits_of("f32"))
    assert not all(check.passed for check in checks)


ADAPTER_FAULTS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "half its scale": ({"adapter.lora.alpha": 4.0}, {}, "adapter's share"),
    "rows of q in transformers' order": (
        {},
        {"blk.0.attn_q.weight.lora_b": planted.halves_for_pairs(4)},
        "adapter's share",
    ),
    "one layer left out": ({}, {"blk.1.ffn_up.weight.lora_b": lambda x: 0 * x}, "adapter's share"),
    "a half that is cut": ({}, {"blk.1.ffn_up.weight.lora_a": lambda x: x[:-1]}, "layers"),
    "no alpha": ({"adapter.lora.alpha": 0.0}, {}, "metadata"),
}


@pytest.mark.parametrize("fault", ADAPTER_FAULTS)
def test_a_fault_in_an_adapter_is_caught(
    tuned: Tuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """By the file alone: llama.cpp is not there to be asked."""
    monkeypatch.setenv("WHET_NODE", str(tmp_path / "nothing"))
    path, base, folder = tuned.adapter()
    fields, tensors, check = ADAPTER_FAULTS[fault]
    broken = rewritten(path, tmp_path / "broken.gguf", fields, tensors)
    assert check in {one.name for one in prove_adapter(tuned.reference, broken, base, folder).failed}


@pytest.mark.parametrize(
    ("likeliest", "expected"),
    [
        ([0, 0, 3], Answer([0, 0], True)),
        ([0, 2, 3], Answer([0, 2], False)),
        ([0, 3, 3], Answer([0], True)),  # it ends too early
        ([0, 0, 1], Answer([0, 0, 1], False)),  # it goes on
    ],
)
def test_an_answer_is_told_from_the_distributions_along_the_reference_s(likeliest: list[int], expected: Answer) -> None:
    """Catches answers that are always the reference's own, and rows that are off by one."""
    rows = np.eye(4, dtype=np.float32)[[1, *likeliest]]  # the first is of the prompt's last token but one
    one = Asked([1, 2], [0, 0], True, rows)
    assert followed(one, rows, frozenset({3})) == expected
    cut = Asked([1, 2], [0, 0], False, rows)
    assert followed(cut, np.eye(4, dtype=np.float32)[[1, 0, 0, 1]], frozenset({3})) == Answer([0, 0], False)
