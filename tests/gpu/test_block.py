"""The fused block on a GPU: as near to fp32 as transformers is, the same under every policy, in the planned memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from tests.parity import harness
from tests.parity.families import FAMILIES, write_checkpoint
from whet import FastLanguageModel
from whet.models import activations, fused
from whet.plan import memory
from whet.plan.fit import sizes_of, static_bytes

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
POLICIES = ("ALL", "MOST", "ATTENTION", "INPUT")


def checkpoint(folder: Path, family: str) -> Path:
    head = {} if family == "phi3" else {"head_dim": 64}
    return write_checkpoint(folder, family, torch.bfloat16, **SHAPE, **head)


def batches() -> list[dict[str, torch.Tensor]]:
    """Full rows, and packed documents; long enough for the kernels that real training takes."""
    draw = torch.Generator().manual_seed(3)
    documents = [torch.randint(3, 120, (n,), generator=draw) for n in (100, 37, 1, 118)]
    rows = torch.randint(3, 120, (2, 128), generator=draw)
    found = [{"input_ids": rows, "labels": rows}, harness.packed(documents)]
    return [{name: x.cuda() for name, x in batch.items()} for batch in found]


def gradients(model: PeftModel, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return harness.run(model, batch).gradients


@pytest.mark.parametrize("base", ["bf16", "nf4-bf16"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_bf16_is_no_further_from_fp32_than_transformers_is(tmp_path: Path, family: str, base: str) -> None:
    """Catches a wrong kernel, mask, cap or scale of any family, and a sum that dropped to bf16."""
    folder = checkpoint(tmp_path, family)
    exact_base = {"bf16": "fp32", "nf4-bf16": "nf4"}[base]
    exact = harness.plain_model(folder, family, exact_base).cuda()
    plain = harness.plain_model(folder, family, base).cuda()
    ours = harness.whet_model(folder, family, base)
    for model in (exact, plain, ours):
        harness.randomise_adapter(model)
    seen: dict[str, list[torch.Tensor]] = {"exact": [], "plain": [], "ours": []}
    for batch in batches():
        for name, model in (("exact", exact), ("plain", plain), ("ours", ours)):
            seen[name] += [g.flatten().double() for g in gradients(model, batch).values()]
    stacked = {name: torch.cat(many) for name, many in seen.items()}
    theirs, mine = (harness.relative(stacked[name], stacked["exact"]) for name in ("plain", "ours"))
    assert mine <= 1.1 * theirs, (mine, theirs)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_policies_and_tiles_change_no_gradient(tmp_path: Path, family: str) -> None:
    """Catches a value computed again from the wrong inputs, or one that comes back from the host too early."""
    model = harness.whet_model(checkpoint(tmp_path, family), family, "nf4")
    harness.randomise_adapter(model)
    shared = fused.shared_of(model)
    assert shared is not None
    for batch in batches():
        expected = gradients(model, batch)
        for name in POLICIES:
            for offload in (False, True):
                shared.policy, shared.tile = replace(getattr(activations, name), offload=offload), 50
                for parameter, got in gradients(model, batch).items():
                    assert harness.relative(got, expected[parameter]) < 1e-5, (name, offload, parameter)
        shared.policy, shared.tile = activations.ALL, fused.TILE


def wide_llama(folder: Path, load_in_4bit: bool) -> PeftModel:
    """Two layers of 1B width: activations are what counts."""
    shape = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 6, "num_attention_heads": 32}
    write_checkpoint(folder, "llama", torch.bfloat16, **shape, num_key_value_heads=8, head_dim=64)
    model, _ = FastLanguageModel.from_pretrained(str(folder), load_in_4bit=load_in_4bit)
    return FastLanguageModel.get_peft_model(model, r=16).train()


@pytest.mark.parametrize("load_in_4bit", [True, False])
def test_peak_memory_is_as_planned(tmp_path: Path, load_in_4bit: bool) -> None:
    """Catches a buffer the plan does not count, or one that lives longer than it says."""
    model = wide_llama(tmp_path, load_in_4bit)
    shared, sizes = fused.shared_of(model), sizes_of(model)
    assert shared is not None
    assert sizes is not None
    ids = torch.randint(3, 120, (4, 2048), device="cuda")
    for name, offload, tile in [
        ("ALL", False, 4096),
        ("MOST", False, 4096),
        ("MOST", True, 1024),
        ("INPUT", False, 1024),
    ]:
        policy = replace(getattr(activations, name), offload=offload)
        shared.policy, shared.tile, shared.host = policy, tile, None
        for _ in range(2):  # in the first, libraries take their workspaces
            model.zero_grad()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            static = static_bytes(model, "adamw") - 8 * sum(p.numel() for p in model.parameters() if p.requires_grad)
            model.get_base_model().model(ids).last_hidden_state.float().square().mean().backward()
        planned = memory.peak(replace(sizes, tile=tile), static, {policy: sizes.layers}, ids.numel())
        measured = torch.cuda.max_memory_allocated()
        assert 0.9 * measured < planned, (name, offload, planned / 2**30, measured / 2**30)
        assert planned < 1.1 * measured + memory.LIBRARIES, (name, offload, planned / 2**30, measured / 2**30)


@pytest.mark.parametrize("family", ["llama", "qwen2"])  # one without biases, one with
def test_the_layer_s_weights_take_one_launch(tmp_path: Path, family: str) -> None:
    """Catches NF4 weights that no longer lie together, so that each is dequantized on its own."""
    model = harness.whet_model(checkpoint(tmp_path, family), family, "nf4-bf16")
    layer: Any = next(m for m in model.modules() if isinstance(m, fused.FusedLayer))
    projections = layer._whet_reader.read()
    assert projections._in_one_launch(torch.bfloat16, apart=False, ready=False) is not None
    together = projections.weights(torch.bfloat16, torch.device("cuda"))
    for projection, got in zip(projections.all, together, strict=True):
        expected = projection.weights(torch.bfloat16, torch.device("cuda"))
        for name in ("_forward", "_back", "down", "up"):
            torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=0, atol=0)


@pytest.mark.parametrize("fp8", [False, True])
def test_weights_that_stay_dequantized_change_nothing(tmp_path: Path, fp8: bool) -> None:
    """Catches adapters of an earlier step beside a weight that stays, and memory that is not given back."""
    model = harness.whet_model(checkpoint(tmp_path, "llama"), "llama", "nf4-bf16")
    harness.randomise_adapter(model)
    shared = fused.shared_of(model)
    assert shared is not None
    shared.fp8 = fp8
    layer: Any = next(m for m in model.modules() if isinstance(m, fused.FusedLayer))
    if fp8 and any(p.fp8_base is None for p in layer._whet_reader.read().all):
        pytest.skip("sizes that FP8 does not take")
    first, second = batches()[:2]
    expected = [gradients(model, first), gradients(model, second)]
    before = torch.cuda.memory_allocated()
    shared.held = shared.config.num_hidden_layers - 1
    with fused.weights_held(model):
        assert [shared.holds(i) for i in range(shared.config.num_hidden_layers)].count(True) == shared.held
        for batch, gradient in zip((first, second), expected, strict=True):
            for name, got in gradients(model, batch).items():
                torch.testing.assert_close(got, gradient[name], rtol=0, atol=0, msg=name)
        assert torch.cuda.memory_allocated() > before, "some weights stay"
        for parameter in harness.adapter(model).values():
            parameter.data.mul_(0.5)
        held = gradients(model, first)
    for name, got in gradients(model, first).items():
        torch.testing.assert_close(held[name], got, rtol=0, atol=0, msg=name)


def test_a_base_in_16_bits_beside_its_adapters(tmp_path: Path) -> None:
    """Catches a product whose rows are read at another stride, and a second copy of the weights."""
    model = harness.whet_model(checkpoint(tmp_path, "llama"), "llama", "bf16")
    harness.randomise_adapter(model)
    shared = fused.shared_of(model)
    assert shared is not None
    batch = batches()[0]
    expected = gradients(model, batch)
    before = torch.cuda.memory_allocated()
    shared.room = True
    with fused.weights_held(model):
        model.zero_grad()
        margins = torch.cuda.memory_allocated() - before
        for name, got in gradients(model, batch).items():
            assert harness.relative(got, expected[name]) < 0.05, name  # in bf16, summed in another order
    sizes = sizes_of(model)
    assert sizes is not None
    assert margins < 1.1 * memory.room(sizes) + 2**20
    model.zero_grad()
    assert torch.cuda.memory_allocated() < before + 2**20


def test_a_pass_that_is_let_go_leaves_the_next_one_right(tmp_path: Path) -> None:
    """Catches host memory of a forward pass without a backward that is still counted on, or lost."""
    model = harness.whet_model(checkpoint(tmp_path, "llama"), "llama", "nf4")
    harness.randomise_adapter(model)
    shared = fused.shared_of(model)
    assert shared is not None
    batch = batches()[0]
    expected = gradients(model, batch)
    shared.policy = replace(activations.MOST, offload=True)
    for _ in range(3):
        loss = model(**batch, use_cache=False).loss
        del loss
    for parameter, got in gradients(model, batch).items():
        assert harness.relative(got, expected[parameter]) < 1e-5, parameter
    loss = model(**batch, use_cache=False).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()
