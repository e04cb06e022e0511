"""Every family, loaded by real llama.cpp, gives the logits that transformers gives.

One case a part of a model that an export can get wrong. Each also says what the model would be without that part, and
the test fails if transformers' own logits do not tell the two apart: a comparison that cannot see a fault is no proof.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch

from tests.export.gguf_cases import CASES, WITHOUT_WINDOW, Measured, furthest, load, logits_of, measure
from tests.export.tiny_models import token_ids
from tests.llama_cpp import llama_cpp  # noqa: F401 - a fixture
from whet.export.gguf_architectures import architecture_of
from whet.export.llama_cpp import Reading, read_logits

EXACT = 2e-4  # sums of float32 in another order, over 300 tokens at most
TOLERANCE = 1e-3
SEEN = 20 * TOLERANCE
# llama.cpp looks Gemma's GELU up in a table of float16 numbers
GELU_IN_FLOAT16 = ("gemma2", "gemma3")


@pytest.fixture(scope="module")
def measured(llama_cpp: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Measured]:  # noqa: F811
    return measure(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("name", [name for name in CASES if name not in WITHOUT_WINDOW])
def test_logits_are_transformers(name: str, measured: dict[str, Measured]) -> None:
    """Catches any part of a family that is told to llama.cpp wrongly, or not at all."""
    case, logits = CASES[name], measured[name]
    assert furthest(logits.found, logits.expected) <= (TOLERANCE if case.family in GELU_IN_FLOAT16 else EXACT)
    if case.without:
        assert furthest(logits.without, logits.expected) >= SEEN


@pytest.mark.parametrize("name", WITHOUT_WINDOW)
def test_context_ends_where_the_window_does(name: str, measured: dict[str, Measured]) -> None:
    """Catches a file that claims a length at which llama.cpp sees tokens that the model does not, or one token less."""
    logits, report = measured[name], measured[name].report
    assert furthest(logits.found[:32], logits.expected[:32]) <= EXACT
    assert furthest(logits.found[32:33], logits.expected[32:33]) >= SEEN
    assert furthest(logits.found, logits.without) <= EXACT
    context = gguf.GGUFReader(report.path).get_field(f"{architecture_of(logits.folder).gguf_name}.context_length")
    assert context is not None
    assert context.contents() == 32
    assert any("32 tokens, not 1024" in note for note in report.notes)


@pytest.mark.parametrize("family", GELU_IN_FLOAT16)
def test_what_is_left_of_gemma_is_its_gelu(family: str, measured: dict[str, Measured]) -> None:
    """Catches a second difference that hides under the one that is known: with its GELU rounded, the model is exact."""
    model = load(measured[family].folder)
    for layer in model.model.layers:
        layer.mlp.act_fn = _GeluInFloat16()
    assert furthest(measured[family].found, logits_of(model, token_ids(48))) <= EXACT < TOLERANCE


class _GeluInFloat16(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()


def test_a_swapped_order_of_q_is_seen(measured: dict[str, Measured], tmp_path: Path) -> None:
    """The comparison itself: Llama's q left in transformers' order is far from its logits."""
    source = measured["llama"].report.path
    tensor = next(t for t in gguf.GGUFReader(source).tensors if t.name == "blk.0.attn_q.weight")
    content, start = bytearray(source.read_bytes()), int(tensor.data_offset)
    halves = tensor.data.reshape(4, 8, 2, 64).swapaxes(1, 2)
    content[start : start + halves.nbytes] = halves.tobytes()
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    (found,) = read_logits([Reading(path, token_ids(48))], threads=1)
    assert furthest(found, measured["llama"].expected) >= SEEN
