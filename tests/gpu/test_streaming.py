"""Weights read ahead onto a GPU: the bytes that transformers reads, in order with what is queued, in little room."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.parity.families import word_tokenizer
from whet.models import load as load_module
from whet.models import readahead, streaming
from whet.models.load import load
from whet.models.readahead import CHUNK, Gpu, Reader

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DEVICE = torch.device("cuda", 0)
MB = 2**20
LONG = 200_000_000  # cycles: a tenth of a second, more than the host needs for a launch


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 20 MB in many files."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("sharded")
    shape = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=1000, num_hidden_layers=4, **shape)).bfloat16()
    model.save_pretrained(folder, max_shard_size="3MB")
    word_tokenizer().save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 4
    return folder


def state(model: Any) -> dict[str, Tensor]:
    """All tensors of a model by name, the parts of NF4's quantization states among them."""
    found = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, layer in model.named_modules():
        if isinstance(layer, Linear4bit):
            found |= {f"{name}.{key}": x for key, x in layer.weight.quant_state.as_dict(packed=True).items()}
    return found


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


def written(folder: Path, tensors: dict[str, Tensor]) -> str:
    path = folder / "model.safetensors"
    save_file(tensors, path)
    return str(path)


def random_bytes(size: int) -> Tensor:
    return torch.randint(0, 256, (size,), dtype=torch.uint8)


@pytest.mark.parametrize("precision", ["nf4", "int8", "16bit", "32bit"])
@pytest.mark.parametrize("chunk", [CHUNK, 100_000])
def test_a_model_in_many_files_is_the_same_either_way(
    precision: str, chunk: int, sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches weights of another file's offset, and a load that falls back to transformers' reading in silence."""
    monkeypatch.setattr(readahead, "CHUNK", chunk)
    read: set[str] = set()

    class Noting(Reader):
        def get(self, stored: Any) -> Tensor:
            read.add(stored.name)
            return super().get(stored)

    monkeypatch.setattr(streaming, "Reader", Noting)
    found = state(load(str(sharded), precision=precision)[0])
    assert len(read) > 30
    read.clear()
    monkeypatch.setattr(load_module, "streamed", lambda auto_model: auto_model)
    expected = state(load(str(sharded), precision=precision)[0])
    assert not read
    assert found.keys() == expected.keys()
    assert [name for name, x in found.items() if not same(x, expected[name])] == []


def test_a_model_loaded_on_a_busy_stream_is_the_same(sharded: Path) -> None:
    """Catches bitsandbytes' quantization, which goes to the default stream, of weights that are not there yet."""
    expected = state(load(str(sharded), precision="nf4")[0])
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(5 * LONG)
        found = state(load(str(sharded), precision="nf4")[0])
        assert [name for name, x in found.items() if not same(x, expected[name])] == []


@pytest.mark.parametrize("place", ["cuda", "cuda:0", 0, DEVICE])
def test_one_gpu_may_be_named_in_any_way(place: Any, sharded: Path) -> None:
    model, _ = load(str(sharded), precision="16bit", device_map={"": place})
    assert {x.device for x in model.parameters()} == {DEVICE}


def test_tensors_above_a_chunk_and_at_odd_offsets(tmp_path: Path) -> None:
    """In and out of order, and twice. Catches the last bytes of a chunk, and a buffer that is read into too early."""
    sizes = [3, 2 * CHUNK + 1, 7, 5 * CHUNK - 3, 0, CHUNK, 1, CHUNK + 1, 4 * CHUNK + 5]
    tensors = {f"t.{i}": random_bytes(size) for i, size in enumerate(sizes)}
    path = written(tmp_path, tensors)
    for order in (list(tensors), list(reversed(tensors)), [*tensors, "t.3", "t.1"]):
        with Reader(Gpu(DEVICE)) as reader:
            reader.open(path)
            found = [(name, reader.tensors[name][...]) for name in order]
        assert all(torch.equal(x.cpu(), tensors[name]) for name, x in found)


def test_several_threads_may_ask_on_streams_of_their_own(tmp_path: Path) -> None:
    """Catches a stream that uses what was not copied yet, and memory given away while that stream still reads it."""
    tensors = {f"t.{i}": random_bytes(3 * MB + i) for i in range(40)}
    path = written(tmp_path, tensors)

    def asked(name: str) -> int:
        with torch.cuda.stream(torch.cuda.Stream(DEVICE)):
            x = reader.tensors[name][...]
            torch.cuda._sleep(LONG // 10)
            total = x.sum(dtype=torch.int64)
            del x
            return int(total.item())

    with Reader(Gpu(DEVICE)) as reader, ThreadPoolExecutor(4) as pool:
        reader.open(path)
        found = list(pool.map(asked, tensors))
    assert found == [int(x.sum(dtype=torch.int64)) for x in tensors.values()]


def test_memory_that_queued_kernels_use_is_not_written_over(tmp_path: Path) -> None:
    """A tensor is given away while kernels that read and write it wait in the queue: its memory becomes the next's."""
    tensors = {f"t.{i}": random_bytes(8 * MB) for i in range(8)}
    path = written(tmp_path, tensors)
    torch.cuda.empty_cache()
    poison = [torch.zeros(8 * MB, dtype=torch.uint8, device=DEVICE) for _ in range(len(tensors))]
    torch.cuda._sleep(LONG)
    sums = [x.fill_(255).sum(dtype=torch.int64) for x in poison]
    addresses = {x.data_ptr() for x in poison}
    del poison
    reused = 0
    with Reader(Gpu(DEVICE)) as reader:
        reader.open(path)
        for name, expected in tensors.items():
            x = reader.tensors[name][...]
            reused += x.data_ptr() in addresses
            torch.cuda._sleep(LONG // 10)
            assert torch.equal(x.cpu(), expected)
            x.fill_(255)
            del x
    assert reused > 0
    assert {int(x.item()) for x in sums} == {255 * 8 * MB}


def test_what_is_read_ahead_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a GPU that holds the file, or a tensor that a waiting thread keeps. The limit is 32 MB, a tensor 8."""
    monkeypatch.setattr(readahead, "AHEAD", 32 * MB)
    tensors = {f"t.{i}": random_bytes(8 * MB) for i in range(30)}
    path = written(tmp_path, tensors)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(DEVICE)
    before = torch.cuda.memory_allocated(DEVICE)
    with Reader(Gpu(DEVICE)) as reader:
        reader.open(path)
        for name in tensors:
            x = reader.tensors[name][...]
            x[-1].item()  # a sum would make a copy in int64
            del x
    held = torch.cuda.max_memory_allocated(DEVICE) - before
    assert held <= (32 + 4 * 8) * MB  # one that is asked for, and what threads are about to let go
    assert torch.cuda.memory_allocated(DEVICE) == before


def test_leaving_early_lets_no_copy_write_into_freed_memory(tmp_path: Path) -> None:
    """Catches tensors that nobody asked for, freed while their copies still wait in a queue."""
    path = written(tmp_path, {f"t.{i}": random_bytes(8 * MB) for i in range(30)})
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt), Reader(Gpu(DEVICE)) as reader:  # noqa: PT012
            reader.open(path)
            torch.cuda._sleep(LONG)  # copies wait for it, because their memory was given out behind it
            reader.tensors["t.0"][...]
            raise KeyboardInterrupt
        blocks = [torch.zeros(8 * MB, dtype=torch.uint8, device=DEVICE) for _ in range(40)]
        torch.cuda.synchronize(DEVICE)
        assert not any(bool(x.any()) for x in blocks)


def test_a_tensor_too_large_for_the_gpu_is_an_error_where_it_is_asked_for(tmp_path: Path) -> None:
    """Catches a load that hangs when the memory is full."""
    path = written(tmp_path, {"a": random_bytes(5), "b": random_bytes(64 * MB)})
    with Reader(Gpu(DEVICE)) as reader:
        reader.open(path)
        total = torch.cuda.get_device_properties(DEVICE).total_memory
        torch.cuda.empty_cache()
        used = torch.cuda.memory_reserved(DEVICE)
        torch.cuda.set_per_process_memory_fraction((used + 32 * MB) / total, DEVICE)
        try:
            assert len(reader.tensors["a"][...]) == 5
            with pytest.raises(torch.OutOfMemoryError):
                reader.tensors["b"][...]
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)


def test_an_auto_class_and_a_model_s_own_class_both_read_this_way(sharded: Path) -> None:
    options: dict[str, Any] = {"device_map": {"": 0}, "dtype": torch.bfloat16}
    expected = state(AutoModelForCausalLM.from_pretrained(sharded, **options))
    for kind in (AutoModelForCausalLM, LlamaForCausalLM):
        model = streaming.streamed(kind).from_pretrained(sharded, **options)
        assert type(model) is LlamaForCausalLM
        assert all(same(x, expected[name]) for name, x in state(model).items())
