"""compressed-tensors: what is written is what the library writes itself, and transformers loads it as that."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from tests.parity import harness
from tests.parity.families import write_checkpoint
from whet.errors import WhetError
from whet.export import merge_files
from whet.export.compressed import SCHEMES, search_scales
from whet.export.merge import save_merged
from whet.export.merge_stream import merge_folders

IDS = torch.tensor([[5, 9, 17, 33, 40, 3, 77, 101, 64, 21, 8]])
# Largest relative distance of the logits; weights, and inputs where the scheme quantizes those too.
BOUNDS = {"fp8": 0.12, "int8": 0.04, "w4a16": 0.35}
LOSS = {"fp8": 0.035, "int8": 0.012, "w4a16": 0.12}  # of a matrix of random weights


@pytest.fixture(autouse=True)
def _short_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge_files, "STRIP", 640)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("base"), "llama", torch.bfloat16)


@pytest.fixture(scope="module")
def written(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("written")
    for to in SCHEMES:
        merge_folders(base, root / to, to=to, max_shard_size="40KB")
    return {to: root / to for to in SCHEMES}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=IDS).logits.float()
    return found


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.mark.parametrize("to", list(SCHEMES))
def test_transformers_loads_it_and_answers_alike(base: Path, written: dict[str, Path], to: str) -> None:
    """Catches scales of the wrong axis, codes packed in another order, and a config that names other layers."""
    model, found = AutoModelForCausalLM.from_pretrained(written[to], output_loading_info=True)
    assert not any(found.values()), found
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert 0 < harness.relative(logits(model), logits(plain)) < BOUNDS[to]


@pytest.mark.parametrize("to", list(SCHEMES))
def test_weights_are_near_those_they_stand_for(base: Path, written: dict[str, Path], to: str) -> None:
    """Catches a row, a group or a strip that took its neighbour's scale."""
    dense = AutoModelForCausalLM.from_pretrained(
        written[to], quantization_config=CompressedTensorsConfig(dequantize=True), dtype=torch.float32
    )
    held, steps = load_file(base / "model.safetensors"), tensors(written[to])
    for name, value in dense.state_dict().items():
        exact = held[name].float()
        if f"{name}_scale" not in steps:
            assert torch.equal(value, exact)
            continue
        scale = steps[f"{name}_scale"].float()
        codes = exact / scale.repeat_interleave(value.shape[1] // scale.shape[1], dim=1)
        codes = codes.clamp(-448, 448).to(torch.float8_e4m3fn).float() if to == "fp8" else codes.round()
        codes = codes.clamp(*{"fp8": (-448, 448), "int8": (-128, 127), "w4a16": (-8, 7)}[to])
        nearest = codes * scale.repeat_interleave(value.shape[1] // scale.shape[1], dim=1)
        torch.testing.assert_close(value, nearest, rtol=2**-8, atol=0)  # the library multiplies in bf16
        assert harness.relative(value, exact) < LOSS[to]


@pytest.mark.parametrize("to", ["fp8", "int8"])
def test_the_library_writes_the_same_bytes(base: Path, written: dict[str, Path], to: str, tmp_path: Path) -> None:
    """Catches tensors under names, in shapes or of dtypes that compressed-tensors, and so vLLM, does not write."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)  # we too divide in fp32
    config = QuantizationConfig(config_groups={SCHEMES[to]: ["Linear"]}, ignore=["lm_head"])
    apply_quantization_config(model, config)
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None:
            low, high = module.weight.aminmax(dim=1, keepdim=True)
            module.weight_scale.data = calculate_qparams(low, high, scheme.weights)[0].bfloat16()
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    theirs, ours = model.state_dict(), tensors(written[to])
    assert theirs.keys() == ours.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == (torch.bfloat16 if value.dtype == torch.float32 else value.dtype)
        assert torch.equal(value.float(), ours[name].float()), name
    compressor.update_config(str(_config_in(tmp_path, base)))
    expected = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    found = json.loads((written[to] / "config.json").read_text())["quantization_config"]
    for key in ("quant_method", "format", "quantization_status", "ignore", "version"):
        assert found[key] == expected[key], key
    (group,), (theirs_group,) = found["config_groups"].values(), expected["config_groups"].values()
    assert {k: v for k, v in group.items() if k != "format"} == {k: v for k, v in theirs_group.items() if k != "format"}


def _config_in(folder: Path, base: Path) -> Path:
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    return folder


def test_4_bits_lie_as_vllm_reads_them(written: dict[str, Path]) -> None:
    """Eight codes in 32 bits, the first lowest, each plus 8; a scale a group of 64; the shape beside them."""
    held = tensors(written["w4a16"])
    name = "model.layers.0.mlp.down_proj"
    packed, scale, shape = (held[f"{name}.weight_{kind}"] for kind in ("packed", "scale", "shape"))
    assert packed.shape == (64, 16)
    assert packed.dtype == torch.int32
    assert scale.shape == (64, 2)
    assert shape.tolist() == [64, 128]
    codes = torch.stack([(packed >> (4 * i)) & 15 for i in range(8)], dim=2).reshape(64, 128) - 8
    assert codes.min() == -8
    assert codes.max() == 7
    assert f"{name}.weight" not in held
    assert "lm_head.weight" in held


def test_a_layer_of_a_width_that_no_group_divides_stays_in_16_bits(tmp_path: Path) -> None:
    """Catches a group that is cut short, which vLLM's kernels refuse when the model is loaded there."""
    base = write_checkpoint(tmp_path / "base", "llama", intermediate_size=72)
    found = merge_folders(base, tmp_path / "out", to="w4a16")
    unfit = {name for name in found.kept if name != "lm_head"}
    assert unfit == {f"model.layers.{i}.mlp.down_proj" for i in (0, 1)}
    assert "72 inputs" in found.kept["model.layers.0.mlp.down_proj"]
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert model.model.layers[0].mlp.down_proj.weight.shape == (64, 72)
    narrow = write_checkpoint(tmp_path / "narrow", "llama", hidden_size=40, intermediate_size=72, head_dim=10)
    with pytest.raises(WhetError, match="no linear layer"):
        merge_folders(narrow, tmp_path / "none", to="w4a16")


def test_a_model_in_memory_is_written_as_from_its_folder(base: Path, written: dict[str, Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    save_merged(model, tmp_path / "out", None, method="merged_fp8")
    ours, theirs = tensors(tmp_path / "out"), tensors(written["fp8"])
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name].float(), theirs[name].float()) for name in ours)


def test_without_the_library_it_says_what_to_install(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "compressed_tensors.quantization", None)
    with pytest.raises(WhetError, match=r'pip install "whet\[compressed\]"'):
        merge_folders(base, tmp_path / "out", to="fp8")
    assert not any(tmp_path.iterdir())


def error(rows: Tensor, scale: Tensor, weight: Tensor | None = None) -> Tensor:
    """Squared error of each group of 32, weighted by `weight`."""
    x, s = rows.view(len(rows), -1, 32), scale.float()[:, :, None]
    w = torch.ones(1) if weight is None else weight.view(-1, 32)
    return (w * (x - (x / s).round().clamp(-8, 7) * s).square()).sum(dim=2)


def test_searched_scales_lose_less() -> None:
    """Catches a search that keeps the last try, or another group's, or leaves the inputs' weights out."""
    torch.manual_seed(0)
    rows, weight = torch.randn(64, 128), torch.rand(128) ** 4
    plain = rows.view(64, 4, 32).abs().amax(dim=2) / 7
    searched, weighted = search_scales(rows, 32, torch.float32), search_scales(rows, 32, torch.float32, weight)
    assert (error(rows, searched) <= error(rows, plain) * 1.000001).all()
    assert error(rows, searched).sum() < 0.9 * error(rows, plain).sum()
    assert error(rows, weighted, weight).sum() < 0.95 * error(rows, searched, weight).sum()


VALUES = (
    st.sampled_from([0.0, 1e-45, -1e-38, 1e30, -3e38]) | st.floats(-1, 1, width=32) | st.floats(-1e4, 1e4, width=32)
)


@settings(max_examples=60, deadline=None)
@given(st.lists(VALUES, min_size=32, max_size=32), st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
def test_any_group_has_a_scale_that_is_a_number(values: list[float], dtype: torch.dtype) -> None:
    """Catches zeros, denormals and constants that become 0/0, and scales that are infinite in fp16."""
    rows = torch.tensor([values])
    scale = search_scales(rows, 32, dtype)
    assert scale.dtype == dtype
    assert scale.isfinite().all()
    assert (scale > 0).all()
