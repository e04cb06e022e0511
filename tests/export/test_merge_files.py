"""Safetensors in strips: what is written, the safetensors library reads; what it writes is read; faults are refused."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from whet.errors import WhetError
from whet.export import merge_files
from whet.export.merge_files import NAMES, Part, ShardWriter, TensorFiles, first_axis, strips

SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
PARTS = st.lists(st.tuples(st.sampled_from(list(NAMES)), SHAPES), min_size=1, max_size=6)


def random_bytes(parts: list[tuple[torch.dtype, tuple[int, ...]]]) -> dict[str, Tensor]:
    """Tensors of any bits: NaNs too. Booleans are 0 or 1."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for i, (dtype, shape) in enumerate(parts):
        high = 2 if dtype == torch.bool else 256
        size = Part("", dtype, shape).nbytes
        raw = torch.randint(0, high, (size,), generator=generator, dtype=torch.uint8)
        found[f"t{i}"] = raw.view(dtype).reshape(shape)
    return found


def same(a: Tensor, b: Tensor) -> bool:
    raw = [x.contiguous().view(-1).view(torch.uint8) for x in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


@settings(max_examples=60, deadline=None)
@given(PARTS, st.integers(1, 200))
def test_what_is_written_in_strips_is_read_by_the_library(
    parts: list[tuple[torch.dtype, tuple[int, ...]]], limit: int
) -> None:
    """Catches offsets that overlap, rows at the wrong place, shards that the index does not name, scalars."""
    values = random_bytes(parts)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        groups = [[Part(name, value.dtype, tuple(value.shape))] for name, value in values.items()]
        with ShardWriter(folder, groups, limit) as writer:
            for name, value in reversed(values.items()):
                for start in range(first_axis(value.shape)):
                    writer.write(name, value[start : start + 1] if value.ndim else value, start)
        found: dict[str, Tensor] = {}
        for file in folder.glob("*.safetensors"):
            found |= load_file(file)
        read = TensorFiles(folder)
        assert found.keys() == values.keys() == set(read)
        assert all(same(found[name], value) and same(read.read(name), value) for name, value in values.items())


@settings(max_examples=40, deadline=None)
@given(PARTS, st.data())
def test_a_file_that_was_cut_or_changed_is_refused_or_read(
    parts: list[tuple[torch.dtype, tuple[int, ...]]], data: st.DataObject
) -> None:
    """Catches crashes other than the error with a remedy, on files cut anywhere or with bytes of the header changed."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "model.safetensors"
        save_file(random_bytes(parts), file)
        whole = file.read_bytes()
        header = 8 + int.from_bytes(whole[:8], "little")
        cut = data.draw(st.integers(0, len(whole) - 1))
        file.write_bytes(whole[:cut])
        with pytest.raises(WhetError):
            TensorFiles(file.parent)
        at, byte = data.draw(st.integers(0, header - 1)), data.draw(st.integers(0, 255))
        file.write_bytes(whole[:at] + bytes([byte]) + whole[at + 1 :])
        try:
            read = TensorFiles(file.parent)
        except WhetError:
            return
        for name in read:
            read.read(name)


def test_an_index_names_files_of_its_own_folder_only(tmp_path: Path) -> None:
    """Catches a downloaded index that reads a file from elsewhere on the machine."""
    (tmp_path / "inner").mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "outer.safetensors")
    index = tmp_path / "inner" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../outer.safetensors"}}))
    with pytest.raises(WhetError, match="not the name of a file here"):
        TensorFiles(tmp_path / "inner")


def test_a_shard_that_lacks_what_the_index_lists(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "one.safetensors"}}))
    with pytest.raises(WhetError, match="b is listed but not held"):
        TensorFiles(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "two.safetensors"}}))
    with pytest.raises(WhetError, match=r"two\.safetensors"):
        TensorFiles(tmp_path)


def test_a_tensor_that_was_not_written_whole_is_noticed(tmp_path: Path) -> None:
    """Catches a format that plans a part and forgets it: the file would hold zeros there."""
    writer = ShardWriter(tmp_path, [[Part("a", torch.int8, (2,)), Part("b", torch.int8, (4, 1))]]).__enter__()
    writer.write("a", torch.ones(2, dtype=torch.int8))
    writer.write("b", torch.ones(3, 1, dtype=torch.int8))
    with pytest.raises(AssertionError, match="b was not written whole"):
        writer.__exit__(None, None, None)


def test_parts_of_one_weight_lie_in_one_shard(tmp_path: Path) -> None:
    """Catches a quantized weight whose scales lie in another file than its codes."""
    groups = [[Part(f"{n}.q", torch.int8, (60,)), Part(f"{n}.s", torch.float32, (1,))] for n in "abc"]
    with ShardWriter(tmp_path, groups, 100) as writer:
        for group in groups:
            for part in group:
                writer.write(part.name, torch.zeros(part.shape, dtype=part.dtype))
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [sorted(load_file(file)) for file in files] == [[f"{n}.q", f"{n}.s"] for n in "abc"]
    assert files[0].name == "model-00001-of-00003.safetensors"


@given(st.lists(st.integers(1, 40), min_size=1, max_size=3), st.integers(1, 8))
def test_strips_cover_every_row_once(shape: list[int], multiple: int) -> None:
    found = list(strips(shape, multiple))
    assert [start for start, _ in found] == [0, *(stop for _, stop in found[:-1])]
    assert found[-1][1] == shape[0]
    assert all((stop - start) % multiple == 0 for start, stop in found[:-1])


def test_strips_are_of_one_size_whatever_the_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge_files, "STRIP", 1000)
    assert max(stop - start for start, stop in strips((10_000, 64))) == 15
    assert max(stop - start for start, stop in strips((10_000,))) == 1000
