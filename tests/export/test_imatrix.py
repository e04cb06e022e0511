"""Importance matrices: measured on text, kept in llama.cpp's formats, and used to guide the rounding."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from tests.export.tiny_llama import STRINGS, byte_level_tokenizer, corpus, save_llama
from whet.errors import WhetError
from whet.export.gguf import write_gguf, write_ggufs
from whet.export.gguf_architectures import architecture_of
from whet.export.imatrix import Imatrix, read_imatrix
from whet.export.imatrix_measure import measure_imatrix

EXAMPLE = Imatrix(
    sums={"blk.0.attn_q.weight": np.float32([1, 2, 3, 0.5]), "blk.0.ffn_down.weight": np.float32([7, 0])},
    counts={"blk.0.attn_q.weight": 512, "blk.0.ffn_down.weight": 512},
    chunks=2,
    chunk_size=256,
    datasets=["chats"],
)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    """A Llama whose columns differ a hundredfold in how strongly they are used, as those of trained models do."""
    folder = save_llama(tmp_path_factory.mktemp("model"), byte_level_tokenizer(), num_hidden_layers=1)
    weights = load_file(folder / "model.safetensors")
    for name in ("model.layers.0.input_layernorm.weight", "model.layers.0.post_attention_layernorm.weight"):
        weights[name] *= torch.logspace(-1, 1, weights[name].numel())[torch.randperm(weights[name].numel())]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def measured(model_dir) -> Imatrix:
    return measure_imatrix(model_dir, corpus(), chunk_size=64, max_chunks=8, device="cpu", dataset="docstrings")


def test_sums_are_those_of_what_enters_the_matrices(model_dir, measured):
    """Catches outputs or means for inputs, columns that are mixed up, and tokens counted twice."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    ids = [token for text in corpus() for token in tokenizer(text)["input_ids"]][: 8 * 64]
    weights = load_file(model_dir / "model.safetensors")
    x = weights["model.embed_tokens.weight"][torch.tensor(ids)]
    x = x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6) * weights["model.layers.0.input_layernorm.weight"]
    for name in ("attn_q", "attn_k", "attn_v"):
        np.testing.assert_allclose(measured.sums[f"blk.0.{name}.weight"], x.square().sum(0), rtol=1e-4)
    assert set(measured.counts.values()) == {8 * 64}
    assert (measured.chunks, measured.chunk_size, measured.datasets) == (8, 64, ["docstrings"])


def test_every_matrix_of_the_layers_is_measured(model_dir, measured):
    matrices = {tensor.name: tensor.shape for tensor in architecture_of(model_dir).expected_tensors()}
    layers = {name: shape for name, shape in matrices.items() if name.startswith("blk.") and len(shape) == 2}
    assert {name: sums.shape for name, sums in measured.sums.items()} == {n: (s[1],) for n, s in layers.items()}


def test_each_chunk_begins_with_bos_where_the_tokenizer_adds_one(model_dir, tmp_path):
    """Catches calibration on texts that no model of the family ever sees: Llama's first token takes much attention."""
    texts = [text for text in STRINGS if "<s>" not in text] * 8
    plain = measure_imatrix(model_dir, texts, chunk_size=32, device="cpu")
    folder = Path(shutil.copytree(model_dir, tmp_path / "model"))
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(folder)
    with_bos = measure_imatrix(folder, texts, chunk_size=32, device="cpu")
    assert with_bos.chunks > plain.chunks  # 31 tokens of the texts in each, and not 32
    assert set(with_bos.counts.values()) == {with_bos.chunks * 32}


def test_one_short_text_is_read_whole(model_dir):
    assert measure_imatrix(model_dir, ["def f(x):\n    return x\n" * 3], chunk_size=512, device="cpu").chunks == 1
    with pytest.raises(WhetError, match="fewer than 16 tokens"):
        measure_imatrix(model_dir, ["a"], device="cpu")


def test_weights_that_overflow_are_refused(model_dir, tmp_path):
    """Catches a matrix of infinities, under which every rounding is as good as any other."""
    folder = Path(shutil.copytree(model_dir, tmp_path / "model"))
    weights = load_file(model_dir / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = float("inf")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WhetError, match=r"ffn_down\.weight is not finite"):
        measure_imatrix(folder, ["def f(x):\n    return x\n" * 9], device="cpu")


def _legacy(imatrix: Imatrix, tail: bool = True) -> bytes:
    """llama.cpp's binary form: mean squares times the number of chunks."""
    data = struct.pack("<i", len(imatrix.sums))
    for name in imatrix.sums:
        values = imatrix.importance(name) * np.float32(imatrix.chunks)
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", imatrix.chunks, values.size)
        data += values.astype("<f4").tobytes()
    return data + (struct.pack("<ii", imatrix.chunks, 5) + b"chats" if tail else b"")


def test_a_saved_matrix_reads_the_same(tmp_path):
    EXAMPLE.save(tmp_path / "m.gguf")
    read = read_imatrix(tmp_path / "m.gguf")
    assert (read.counts, read.chunks, read.chunk_size, read.datasets) == (EXAMPLE.counts, 2, 256, ["chats"])
    assert all(np.array_equal(read.sums[name], EXAMPLE.sums[name]) for name in EXAMPLE.sums)
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    assert fields["general.type"].contents() == "imatrix"
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize("tail", [True, False])
def test_the_older_format_means_the_same(tail, tmp_path):
    """Catches sums taken for means: importances would be off by the number of chunks."""
    (tmp_path / "m.dat").write_bytes(_legacy(EXAMPLE, tail))
    read = read_imatrix(tmp_path / "m.dat")
    for name in EXAMPLE.sums:
        np.testing.assert_allclose(read.importance(name), EXAMPLE.importance(name), rtol=1e-6)
    assert read.datasets == (["chats"] if tail else [])


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "m.dat"


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_broken_files_are_refused_in_words(scratch, data):
    """Catches crashes and endless loops on files cut short or with a wrong number inside."""
    whole = _legacy(EXAMPLE)
    cut = data.draw(st.integers(0, len(whole)))
    content = bytearray(whole[:cut])
    for place, value in data.draw(
        st.lists(st.tuples(st.integers(0, max(0, cut - 1)), st.integers(0, 255)), max_size=4)
    ):
        content[place : place + 1] = bytes([value])
    scratch.write_bytes(bytes(content))
    try:
        read = read_imatrix(scratch)
    except WhetError:
        return
    assert all((read.importance(name) >= 0).all() for name in read.sums)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_a_gguf_cut_short_is_refused(part, tmp_path):
    EXAMPLE.save(tmp_path / "m.gguf")
    data = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(data[: int(part * len(data))])
    with pytest.raises(WhetError, match="no importance matrix"):
        read_imatrix(tmp_path / "m.gguf")


def test_another_gguf_is_refused(model_dir, tmp_path):
    path = write_gguf(model_dir, tmp_path / "m.gguf", "q8_0", check=False).path
    with pytest.raises(WhetError, match="no sums of squares"):
        read_imatrix(path)
    with pytest.raises(WhetError, match="missing"):
        read_imatrix(tmp_path / "nothing")


def test_a_matrix_of_another_model_is_refused(model_dir, tmp_path):
    with pytest.raises(WhetError, match=r"attn_q\.weight has 4 columns in it, and 256 in the model"):
        write_gguf(model_dir, tmp_path / "m.gguf", "q4_k_m", imatrix=EXAMPLE)
    other = Imatrix({"blk.7.attn_q.weight": np.ones(256, np.float32)}, {"blk.7.attn_q.weight": 1}, 1, 1)
    with pytest.raises(WhetError, match=r"blk\.7\.attn_q\.weight, and the model has not"):
        write_gguf(model_dir, tmp_path / "m.gguf", "q4_k_m", imatrix=other)
    assert not (tmp_path / "m.gguf").exists()


def _errors(path: Path, sources: dict[str, np.ndarray], imatrix: Imatrix) -> dict[str, float]:
    """The error of each matrix, weighted with its columns' importance, relative to the weighted weights."""
    errors = {}
    for tensor in gguf.GGUFReader(path).tensors:
        if tensor.name in imatrix.sums:
            x, h = sources[tensor.name], imatrix.importance(tensor.name)
            error = dequantize(tensor.data, tensor.tensor_type) - x
            errors[tensor.name] = float(np.sqrt((h * error**2).sum() / (h * x**2).sum()))
    return errors


def test_guided_rounding_loses_less_where_it_counts(model_dir, measured, tmp_path):
    """Catches a matrix that is read, passed on, and not used, or used for another tensor."""
    kinds = ("q2_k", "q4_0", "q4_k_s", "iq4_nl")
    plain = write_ggufs(model_dir, {kind: tmp_path / f"{kind}.gguf" for kind in kinds})
    guided = write_ggufs(model_dir, {kind: tmp_path / f"{kind}-i.gguf" for kind in kinds}, imatrix=measured)
    (exact,) = write_ggufs(model_dir, {"f32": tmp_path / "f32.gguf"})
    sources = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(exact.path).tensors}
    for one, other in zip(plain, guided, strict=True):
        before, after = _errors(one.path, sources, measured), _errors(other.path, sources, measured)
        for name in ("blk.0.attn_q.weight", "blk.0.attn_k.weight", "blk.0.ffn_gate.weight", "blk.0.ffn_up.weight"):
            assert other.types[name] == one.types[name]
            assert after[name] < 0.9 * before[name], (one.quantization, name)
        fields = gguf.GGUFReader(other.path).fields
        assert fields["quantize.imatrix.entries_count"].contents() == 7
        assert fields["quantize.imatrix.chunks_count"].contents() == 8
        assert fields["quantize.imatrix.dataset"].contents() == "docstrings"
