"""bench/accuracy.py: what is set against what, and that nothing is written that is not the fused block's."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests import warm
from tests.bench.scripts import load
from tests.parity import harness

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "bench" / "accuracy.py"
SMALL = {"hidden": 64, "intermediate": 128, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 16}
SMALL |= {"length": 32, "window": 10, "batches": 2, "loss_rows": 16, "loss_batches": 2}
FIELDS = {
    *("kind", "run_id", "family", "base", "whet", "plain", "autocast", "ratio", "spread", "attention", "size", "r"),
    *("hardware", "versions", "commit", "dirty", "date"),
}
PARTS = {"loss", "token_loss", "logits", "gradients"}


@pytest.fixture(scope="module")
def accuracy() -> Iterator[Any]:
    """The script as a module; its folder is importable only while it is loaded."""
    before = set(sys.modules)
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        yield import_module("accuracy")
    finally:
        sys.path.remove(str(SCRIPT.parent))
        for name in ("accuracy", "environment"):
            if name not in before:
                sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def size(accuracy: Any) -> Any:
    return accuracy.Size(**SMALL)


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("accuracy") / "results" / "accuracy.jsonl"
    options = [text for name, value in SMALL.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    command = ["--family", "gemma2", "phi3", "--run-id", "test", "--out", str(out)]
    done = warm.run(warm.script, str(SCRIPT), *command, *options, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == 5  # a head and a row for each line
    return [json.loads(text) for text in out.read_text(encoding="utf-8").splitlines()]


def test_a_line_says_what_was_measured_and_where(lines: list[dict[str, Any]]) -> None:
    """Catches a figure that nobody can place afterwards, and a base or a family that was left out."""
    bases = [("gemma2", "bf16"), ("gemma2", "nf4"), ("phi3", "bf16"), ("phi3", "nf4")]
    assert [(line["family"], line["base"]) for line in lines] == bases
    for line in lines:
        assert line.keys() == FIELDS
        assert (line["kind"], line["run_id"]) == ("accuracy", "test")
        assert line["size"].items() >= SMALL.items()
        assert {"torch", "transformers", "peft", "bitsandbytes", "whet"} <= line["versions"].keys()
        passes = 3 * SMALL["batches"] + SMALL["loss_batches"]  # forward for the logits, forward, backward; forward
        assert sum(line["attention"].values()) == passes * SMALL["layers"]


def test_the_distances_are_those_of_bf16_from_a_far_more_exact_result(lines: list[dict[str, Any]]) -> None:
    """Catches two different functions (distances near one), and bf16 set against itself (distances of zero)."""
    for line in lines:
        for way in ("whet", "plain", "autocast"):
            assert line[way].keys() == PARTS
            assert 1e-6 < line[way]["loss"] < 0.02
            for part in ("token_loss", "logits", "gradients"):
                assert 5e-4 < line[way][part] < 0.1
        for part in PARTS:
            assert line["ratio"][part] == pytest.approx(line["whet"][part] / line["plain"][part])
        assert line["spread"].keys() == PARTS
        for part, (low, high) in line["spread"].items():
            assert 0 < low < line["ratio"][part] < high < math.inf
        assert line["plain"] != line["autocast"]


def test_widths_that_bitsandbytes_gets_wrong_are_refused(accuracy: Any) -> None:
    """Catches a reference off by a quarter: on a CPU a row of bitsandbytes' NF4 must end where a block does."""
    with pytest.raises(ValueError, match="multiples of 64"):
        accuracy.Size(intermediate=96)


def test_errors_are_taken_over_all_batches_together(accuracy: Any) -> None:
    """Catches a mean of each batch's own relative error, in which a small batch weighs as much as a large one."""

    def result(*values: float) -> dict[str, torch.Tensor]:
        return {part: torch.tensor(values, dtype=torch.float64) for part in PARTS}

    ours, theirs = accuracy.Errors(), accuracy.Errors()
    ours.add(result(3.0, 4.5), result(3.0, 4.0))
    ours.add(result(1.0), result(0.0))
    theirs.add(result(3.0, 5.0), result(3.0, 4.0))
    theirs.add(result(0.5), result(0.0))
    assert ours.total()["logits"] == pytest.approx(math.sqrt((0.25 + 1.0) / 25.0))
    assert ours.ratios(theirs, "gradients") == pytest.approx([0.5, 2.0])


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "phi3"])
def test_the_reference_keeps_documents_apart(accuracy: Any, size: Any, family: str, tmp_path: Path) -> None:
    """Catches packed documents that see each other in the reference or in plain transformers: whet would look wrong."""
    folder = accuracy.write(tmp_path, family, size)
    plain = accuracy.plain_model(folder, family, "bf16", "cpu")
    exact = accuracy.exact_model(folder, family, plain, "cpu")
    accuracy.check_exact(exact)
    accuracy.randomise({"whet": plain, "exact": exact})
    draw = torch.Generator().manual_seed(0)
    documents = [torch.randint(3, size.vocabulary, (length,), generator=draw) for length in (20, 7, 30)]
    together = accuracy.one_pass(exact, harness.packed(documents))
    alone = [accuracy.one_pass(exact, harness.packed([document])) for document in documents]
    assert together["token_loss"].dtype == torch.float64
    for part in ("token_loss", "logits"):
        apart = torch.cat([one[part] for one in alone])
        assert harness.relative(together[part], apart) < 1e-5
    of_plain = accuracy.one_pass(plain, harness.packed(documents))
    assert harness.relative(of_plain["logits"], together["logits"]) < 0.1


class Seen(TorchDispatchMode):
    """Which libraries' operations ran, and the dtypes of matrix products that sum over more than one value."""

    def __init__(self) -> None:
        super().__init__()
        self.libraries: set[str] = set()
        self.products: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.libraries.add(func.namespace)
        if func.overloadpacket.__name__ in ("mm", "bmm", "addmm", "baddbmm"):
            first = args[-2]
            if first.shape[-1] > 1:  # transformers up to 5.17 multiplies angles so: a product of two values each
                self.products.add(first.dtype)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("base", ["bf16", "nf4"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_reference_is_torch_s_own_operations_in_fp64(
    accuracy: Any, size: Any, family: str, base: str, tmp_path: Path
) -> None:
    """Catches a product in less than fp64 in the reference, and a kernel of bitsandbytes' in its weights or passes."""
    folder = accuracy.write(tmp_path, family, size)
    plain = accuracy.plain_model(folder, family, base, "cpu")
    with Seen() as seen:
        exact = accuracy.exact_model(folder, family, plain, "cpu")
        for batch in accuracy.batches(size):
            accuracy.one_pass(exact, batch)
    assert seen.libraries == {"aten"}
    assert seen.products == {torch.float64}


def test_a_reference_that_rounds_is_refused(
    accuracy: Any, size: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Catches fused layers, NF4 weights, bf16, another attention or TF32 in what the others are measured against."""
    folder = accuracy.write(tmp_path, "llama", size)
    plain = accuracy.plain_model(folder, "llama", "bf16", "cpu")
    with pytest.raises(accuracy.NotExact, match="bfloat16"):
        accuracy.check_exact(plain)
    with pytest.raises(accuracy.NotExact, match="of bitsandbytes"):
        accuracy.check_exact(accuracy.plain_model(folder, "llama", "nf4", "cpu"))
    with pytest.raises(accuracy.NotExact, match="attention is sdpa"):
        accuracy.check_exact(plain.double())
    exact = accuracy.exact_model(folder, "llama", plain, "cpu")
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    with pytest.raises(accuracy.NotExact, match="TF32"):
        accuracy.check_exact(exact)
    norm = exact.get_base_model().model.norm
    norm.forward = norm.forward
    with pytest.raises(accuracy.NotExact, match="has been changed"):
        accuracy.check_exact(exact)


def test_the_loss_is_compared_row_by_row(accuracy: Any, size: Any, tmp_path: Path) -> None:
    """Catches one loss a batch, whose errors cancel, and whet's measured without its own output head."""
    folder = accuracy.write(tmp_path, "gemma2", size)
    models = {"whet": accuracy.whet_model(folder, "gemma2", "bf16")}
    models |= {"plain": accuracy.plain_model(folder, "gemma2", "bf16", "cpu")}
    models |= {"exact": accuracy.exact_model(folder, "gemma2", models["plain"], "cpu")}
    accuracy.randomise(models)
    batch, other = list(accuracy.loss_batches(size))
    assert batch["input_ids"].shape == (size.loss_rows, size.length)
    assert not torch.equal(batch["input_ids"], other["input_ids"])
    exact = accuracy.row_losses(models["exact"], batch)["loss"]
    assert exact.shape == (size.loss_rows,)
    one = {name: x[5:6] for name, x in batch.items()}
    assert accuracy.one_pass(models["exact"], one)["token_loss"].mean() == pytest.approx(exact[5].item(), rel=1e-6)
    calls: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        head = accuracy.whet_head

        def counted(model: Any, batch: Any) -> Any:
            calls.append(model)
            return head(model, batch)

        patch.setattr(accuracy, "whet_head", counted)
        ours = accuracy.row_losses(models["whet"], batch)["loss"]
        theirs = accuracy.row_losses(models["plain"], batch)["loss"]
    assert len(calls) == 1
    assert calls[0] is models["whet"]
    for found in (ours, theirs):
        assert 0 < harness.relative(found, exact) < 0.01
    with pytest.raises(RuntimeError, match="the mean of the tokens'"):
        accuracy.check_mean(exact.mean() * 1.001, exact)


def test_the_reference_of_an_nf4_base_has_the_values_its_bits_stand_for(
    accuracy: Any, size: Any, tmp_path: Path
) -> None:
    """Catches a reference with the weights before quantization, or with rounded ones; and one adapter for each."""
    from whet.kernels.nf4 import NF4Weight, dequantize_nf4

    folder = accuracy.write(tmp_path, "llama", size)
    models = {"plain": accuracy.plain_model(folder, "llama", "nf4", "cpu")}
    models |= {"whet": accuracy.whet_model(folder, "llama", "nf4")}
    models |= {"exact": accuracy.exact_model(folder, "llama", models["plain"], "cpu")}
    accuracy.check_same_bits(models["whet"], models["plain"])
    weights = accuracy.nf4_weights(models["whet"])
    assert len(weights) == 7 * size.layers
    for name, weight in weights.items():
        layer = models["exact"].get_base_model().get_submodule(name).base_layer
        stored = NF4Weight.from_params4bit(weight)
        out = torch.empty(layer.weight.shape, dtype=torch.float32)
        assert layer.weight.dtype == torch.float64
        assert harness.relative(layer.weight, dequantize_nf4(stored, out=out)) < 1e-6
        assert harness.relative(layer.weight, layer.weight.bfloat16()) > 1e-4
    accuracy.randomise(models)
    ours, theirs = (harness.adapter(models[name]) for name in ("whet", "exact"))
    assert all(torch.equal(ours[name].double(), theirs[name]) for name in ours)
    assert all(p.dtype == torch.float32 and p.abs().max() > 0 for p in ours.values())

    next(iter(weights.values())).data[0] ^= 1
    with pytest.raises(RuntimeError, match="different 4-bit weights"):
        accuracy.check_same_bits(models["whet"], models["plain"])


def test_a_layer_without_the_fused_block_is_refused(
    accuracy: Any, size: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Catches a line that says whet and measured transformers: here in one of the two layers."""
    load = accuracy.whet_model

    def with_a_norm_of_its_own(*given: Any) -> Any:
        model = load(*given)
        norm = model.get_base_model().model.layers[1].input_layernorm
        norm.weight = torch.nn.Parameter(norm.weight.detach().clone(), requires_grad=False)
        return model

    monkeypatch.setattr(accuracy, "whet_model", with_a_norm_of_its_own)
    made = accuracy.write(tmp_path, "llama", size)
    with pytest.raises(accuracy.NotFused, match=r"6 of 12 layer passes .*norms that were replaced"):
        accuracy.measure(made, "llama", "bf16", size, "cpu")


def test_counting_leaves_the_block_as_it_was(accuracy: Any) -> None:
    """Catches a wrapper that stays, and slows or miscounts whatever comes after."""
    from whet.kernels import attention
    from whet.models import fused

    before = fused.run, attention._backend
    with pytest.raises(KeyError, match="within"):
        fail_within(accuracy, before[0])
    assert (fused.run, attention._backend) == before


def fail_within(accuracy: Any, before: Any) -> None:
    from whet.models import fused

    with accuracy.fused_only(None, passes=1):
        assert fused.run is not before
        raise KeyError("within")


def test_rows_are_full_and_documents_packed_in_turn(accuracy: Any, size: Any) -> None:
    """Catches batches that are all of one layout, that repeat, or whose documents leave out or add tokens."""
    first, second, third = list(accuracy.batches(accuracy.Size(**SMALL | {"batches": 3})))
    assert first["input_ids"].shape == third["input_ids"].shape == (2, size.length)
    assert "attention_mask" not in first
    assert second["input_ids"].shape == second["position_ids"].shape == (1, 2 * size.length)
    assert (second["position_ids"] == 0).sum() >= 2
    assert not torch.equal(first["input_ids"], third["input_ids"])
    for seed in range(50):
        lengths = accuracy.document_lengths(64, torch.Generator().manual_seed(seed))
        assert sum(lengths) == 64
        assert len(lengths) >= 2
        assert min(lengths) >= 3


def test_the_table_shows_all_three_and_the_ratio(lines: list[dict[str, Any]]) -> None:
    """Catches a row whose cells are not in the order of the columns' names."""
    table = load("table")
    line = lines[0] | {way: dict.fromkeys(PARTS, value) for way, value in (("whet", 0.01), ("plain", 0.02))}
    line |= {"autocast": dict.fromkeys(PARTS, 0.03), "ratio": dict.fromkeys(PARTS, 0.5)}
    head, _, row, *_ = table.render([line]).splitlines()
    assert len(head.split("|")) == len(row.split("|"))
    assert row == "| gemma2 | bf16 |" + " 1.0e-02 / 2.0e-02 / 3.0e-02; 0.50x |" * 3
