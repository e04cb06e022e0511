"""Reading ahead: the bytes of the files in any order of asking, errors where they are asked for, and no thread left.

Here the device is the CPU, or one that copies as late as it may; streams are tested on a GPU.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForCausalLM
from transformers.core_model_loading import dot_natural_key

from whet.errors import WhetError
from whet.models import readahead, streaming
from whet.models.load import load
from whet.models.readahead import DTYPES, Gpu, Host, Reader, natural
from whet.models.streaming import streamed

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Chunks and limits of the size of these tests' tensors. No thread is left behind."""
    monkeypatch.setattr(readahead, "CHUNK", 64)
    monkeypatch.setattr(readahead, "AHEAD", 500)
    monkeypatch.setattr(readahead, "THREADS", 4)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    yield
    assert not [x for x in threading.enumerate() if x.name == "whet-weights"]


class LateCopy:
    def __init__(self, source: Tensor, to: Tensor, queue: list[LateCopy]):
        self.source, self.to, self.ended, self.ending = source, to, False, threading.Lock()
        queue.append(self)

    def end(self) -> None:
        with self.ending:
            if not self.ended:
                self.to.copy_(self.source)
                self.ended = True


class Late(Host):
    """Copies when it must: when the host waits for a copy, or the current stream follows it. Fails at chosen sizes."""

    def __init__(self, refuses: int | None = None):
        super().__init__(CPU)
        self.refuses, self.queues = refuses, list[list[LateCopy]]()

    def empty(self, shape: list[int], dtype: torch.dtype) -> tuple[Tensor, Any]:
        if shape == [self.refuses]:
            raise torch.OutOfMemoryError("no memory")
        return super().empty(shape, dtype)

    def queue(self) -> Any:
        self.queues.append([])
        return self.queues[-1]

    def copy(self, source: Tensor, to: Tensor, queue: Any, after: Any) -> Any:
        return LateCopy(source, to, queue)

    def end(self, what: Any) -> None:
        for copy in what if isinstance(what, list) else [what]:
            copy.end()

    def follow(self, x: Tensor, copies: list[Any]) -> None:
        for copy in copies:
            copy.end()


def write(folder: Path, *files: dict[str, Tensor]) -> list[str]:
    paths = [str(folder / f"model-{i}.safetensors") for i in range(len(files))]
    for path, tensors in zip(paths, files, strict=True):
        save_file(tensors, path)
    return paths


def values(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    size = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (size,), dtype=torch.uint8)
    return raw.view(dtype).view(shape)


def same(a: Tensor, b: Tensor) -> bool:
    raw = [x.reshape(-1).view(torch.uint8) for x in (a, b)]
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(*raw)


def opened(device: Host, paths: list[str]) -> Reader:
    reader = Reader(device)
    for path in paths:
        reader.open(path)
    return reader


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], dict[str, Tensor]]:
    """Three files of tensors below and above a chunk and the limit, of all sizes modulo a chunk."""
    sizes = [0, 1, 31, 32, 33, 100, 7, 64, 400, 3, 1, 0, 90, 12, 13, 250]
    tensors = {f"layers.{i}.weight": values(size) for i, size in enumerate(sizes)}
    files: list[dict[str, Tensor]] = [{}, {}, {}]
    for i, (name, x) in enumerate(tensors.items()):
        files[i % 3][name] = x
    return write(tmp_path_factory.mktemp("files"), *files), tensors


@pytest.mark.parametrize("device", [partial(Host, CPU), Late])
@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_any_order_of_asking_gives_the_files_bytes(
    checkpoint: tuple[list[str], dict[str, Tensor]], device: Callable[[], Host], data: st.DataObject
) -> None:
    """Skipped tensors, repeated ones, several threads. Catches deadlocks, and use before a copy has ended."""
    paths, tensors = checkpoint
    order = data.draw(st.lists(st.sampled_from(sorted(tensors)), max_size=40) | st.permutations(sorted(tensors)))
    askers = data.draw(st.integers(1, 4))
    with opened(device(), paths) as reader, ThreadPoolExecutor(askers) as pool:
        found = list(pool.map(lambda name: (name, reader.tensors[name][...]), order, timeout=20))
    assert all(same(x, tensors[name]) for name, x in found)


@pytest.mark.parametrize("name", sorted(DTYPES))
@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (1,), (5, 7), (2, 3, 4)])
def test_every_dtype_and_shape_is_as_safetensors_reads_it(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    x = values(*shape, dtype=DTYPES[name])
    paths = write(tmp_path, {"before": values(3, dtype=torch.uint8), "x": x})
    with opened(Host(CPU), paths) as reader, safe_open(paths[0], framework="pt") as theirs:
        found = reader.tensors["x"]
        assert found.get_shape() == list(shape)
        assert found.get_dtype() == name == theirs.get_slice("x").get_dtype()
        assert same(found[...], theirs.get_tensor("x"))
        assert same(found[...], x)
        assert shape == () or same(found[:1], x[:1])


def test_what_is_not_known_or_too_large_is_left_to_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a table on the GPU that transformers wants on the CPU, because no GPU holds it."""
    monkeypatch.setattr(readahead, "LARGEST", 100)
    monkeypatch.delitem(DTYPES, "F16")
    tensors = {"large": values(51), "half": values(2, dtype=torch.float16), "x": values(50)}
    with opened(Host(CPU), write(tmp_path, tensors)) as reader:
        assert [name for name, x in reader.tensors.items() if isinstance(x, readahead._Stored)] == ["x"]
        assert all(same(reader.tensors[name][...], x) for name, x in tensors.items())


def test_a_name_in_two_files_is_the_later_one_s(tmp_path: Path) -> None:
    first, second = {"x": values(9), "y": values(3)}, {"x": values(9)}
    with opened(Host(CPU), write(tmp_path, first, second)) as reader:
        assert same(reader.tensors["x"][...], second["x"])
        assert same(reader.tensors["y"][...], first["y"])


@given(st.lists(st.lists(st.text("ab019", min_size=1, max_size=4), min_size=1, max_size=3).map(".".join)))
def test_the_order_is_transformers_own(names: list[str]) -> None:
    """Catches layer 10 before layer 2."""
    assert sorted(names, key=natural) == sorted(names, key=dot_natural_key)


def test_reading_ahead_stops_at_its_limit(tmp_path: Path) -> None:
    """Catches a GPU that fills with tensors nobody has asked for, and a large one that is never begun."""
    tensors = {f"t.{i}": values(100) for i in range(6)} | {"t.6": values(400), "t.7": values(20)}
    ahead: list[int] = []

    class Watched(Host):
        def empty(self, shape: list[int], dtype: torch.dtype) -> tuple[Tensor, Any]:
            ahead.append(reader.bytes_ahead)
            return super().empty(shape, dtype)

    with opened(Watched(CPU), write(tmp_path, tensors)) as reader:
        for i, (name, x) in enumerate(tensors.items()):
            assert same(reader.tensors[name][...], x)
            if i in (0, 3):
                with reader.changed:
                    assert reader.changed.wait_for(lambda: reader.bytes_ahead == 400, timeout=20)
            if i == 5:
                with reader.changed:
                    assert reader.changed.wait_for(lambda: reader.bytes_ahead == 800, timeout=20)
                    assert len(reader.ahead) == 1
    assert all(x <= readahead.AHEAD or x == 800 for x in ahead)


def test_a_tensor_is_let_go_once_it_was_given(tmp_path: Path) -> None:
    """Catches a waiting thread that keeps what it read last: weights in 16 bits beside those in 4."""
    tensors = {f"t.{i}": values(200) for i in range(6)}
    with opened(Host(CPU), write(tmp_path, tensors)) as reader:
        reader.tensors["t.0"][...]
        with reader.changed:
            assert reader.changed.wait_for(lambda: not reader.chunks and len(reader.ahead) == 1, timeout=20)
            assert reader.changed.wait_for(lambda: not any(x.left for x in reader.held), timeout=20)
            assert {x.stored.name for x in reader.held} == {"t.1"}


def test_a_file_cut_short_after_it_was_opened_is_said(tmp_path: Path) -> None:
    """Catches a thread that dies alone while another waits for it, and weights that are zeros."""
    tensors = {f"t.{i}": values(1000) for i in range(4)}
    (path,) = write(tmp_path, tensors)
    with opened(Host(CPU), [path]) as reader:
        os.truncate(path, os.path.getsize(path) - 2500)
        order = sorted(tensors, key=lambda name: reader.tensors[name].start)
        assert same(reader.tensors[order[0]][...], tensors[order[0]])
        for name in (order[3], order[2], order[3]):
            with pytest.raises(SafetensorError, match=rf"model-0.safetensors was cut short .* within {name}"):
                reader.tensors[name][...]


@pytest.mark.parametrize("asked", ["t.0", "t.1", "t.2"])
def test_errors_come_out_where_the_tensor_is_asked_for(tmp_path: Path, asked: str) -> None:
    """In turn and before it. Catches an error that another tensor's reader gets."""
    tensors = {"t.0": values(3), "t.1": values(13), "t.2": values(5)}
    with opened(Late(refuses=13), write(tmp_path, tensors)) as reader:
        assert same(reader.tensors["t.0"][...], tensors["t.0"])
        if asked == "t.1":
            with pytest.raises(torch.OutOfMemoryError, match="no memory"):
                reader.tensors[asked][...]
        else:
            assert same(reader.tensors[asked][...], tensors[asked])


def test_a_failed_read_is_the_asking_thread_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> int:
        raise OSError(5, "Input/output error")

    with opened(Host(CPU), write(tmp_path, {"a": values(100), "b": values(100)})) as reader:
        monkeypatch.setattr(os, "preadv", failing)
        for name in ("a", "b", "a"):
            with pytest.raises(OSError, match="Input/output error"):
                reader.tensors[name][...]


@pytest.mark.parametrize("size", [0, 5, 100, 700])
def test_files_that_are_broken_are_refused_as_before(tmp_path: Path, size: int) -> None:
    (path,) = write(tmp_path, {f"t.{i}": values(100) for i in range(4)})
    Path(path).write_bytes(Path(path).read_bytes()[:size])
    with pytest.raises(SafetensorError) as theirs:
        safe_open(path, framework="pt")
    with pytest.raises(SafetensorError) as ours, Reader(Host(CPU)) as reader:
        reader.open(path)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_leaving_early_ends_everything(
    checkpoint: tuple[list[str], dict[str, Tensor]], error: type[BaseException]
) -> None:
    """Threads that read and threads that ask. Catches a process that hangs after Ctrl-C."""
    paths, tensors = checkpoint
    device = Late()
    reader = opened(device, paths)
    stored = dict(reader.tensors)
    with ThreadPoolExecutor(3) as pool:
        with pytest.raises(error), reader:  # noqa: PT012
            asked = {name: pool.submit(lambda x: x[...], x) for name, x in stored.items()}
            stored["layers.8.weight"][...]
            raise error
        for name, request in asked.items():
            if request.exception(timeout=20) is None:
                assert same(request.result(), tensors[name])
            else:
                assert "closed" in str(request.exception())
    assert device.queues
    assert all(copy.ended for queue in device.queues for copy in queue)
    with pytest.raises(RuntimeError, match="closed"):
        stored["layers.8.weight"][...]


def test_nothing_is_kept_of_files_that_were_read(tmp_path: Path) -> None:
    """Catches a file that stays mapped, or a tensor that stays, until the garbage is collected."""
    (path,) = write(tmp_path, {f"t.{i}": values(200) for i in range(6)})
    with opened(Host(CPU), [path]) as reader:
        given = reader.tensors["t.0"][...]
    assert given.numel() == 200
    if Path("/proc/self/maps").exists():
        assert path not in Path("/proc/self/maps").read_text()


def test_an_error_s_traceback_keeps_no_tensor(tmp_path: Path) -> None:
    """Catches a GPU that stays full after a load that failed, because the traceback knows what was read."""
    with opened(Host(CPU), write(tmp_path, {f"t.{i}": values(200) for i in range(6)})) as reader:
        reader.tensors["t.0"][...]
        with reader.changed:
            assert reader.changed.wait_for(lambda: reader.held, timeout=20)
            held = list(reader.held)
    assert all(x.tensor is None for x in held)


def test_a_system_that_gives_a_few_bytes_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches bytes that are read again, or not at all, after a read that was interrupted."""
    whole, tensors = os.preadv, {f"t.{i}": values(50 + i) for i in range(3)}
    monkeypatch.setattr(os, "preadv", lambda file, views, at: whole(file, [views[0][:7]], at))
    with opened(Host(CPU), write(tmp_path, tensors)) as reader:
        assert all(same(reader.tensors[name][...], x) for name, x in tensors.items())


def test_few_bytes_take_few_threads(tmp_path: Path) -> None:
    """Catches 200 MB of pinned memory for a model of 200 KB."""
    with opened(Host(CPU), write(tmp_path, {"a": values(4), "b": values(8)})) as reader:
        reader.tensors["a"][...]
        assert (len(reader.threads), reader.chunk) == (2, 16)


# ---------------------------------------------------------------- transformers


@pytest.fixture(scope="module")
def sharded(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same Llama in several files."""
    folder = tmp_path_factory.mktemp("sharded")
    LlamaForCausalLM.from_pretrained(llama).bfloat16().save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


@pytest.fixture
def to_cpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The CPU counts as a GPU. Returns the names of the tensors that were read ahead or by the asking thread."""
    read: list[str] = []

    class Noting(Reader):
        def get(self, stored: Any) -> Tensor:
            read.append(stored.name)
            return super().get(stored)

    monkeypatch.setattr(streaming, "Reader", Noting)
    monkeypatch.setattr(streaming, "_place", lambda device_map: Host(CPU))
    return read


@pytest.mark.parametrize("auto", [AutoModelForCausalLM, LlamaForCausalLM, AutoModelForSequenceClassification])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_model_in_many_files_is_the_same_either_way(
    auto: Any, dtype: torch.dtype, sharded: Path, to_cpu: list[str]
) -> None:
    """Catches a model of another class, and what is looked up by the class's name going astray."""
    options = {"dtype": dtype, "device_map": {"": "cpu"}, "output_loading_info": True}
    torch.manual_seed(0)
    expected, told = auto.from_pretrained(sharded, **options)
    assert not to_cpu
    torch.manual_seed(0)
    found, also_told = streamed(auto).from_pretrained(sharded, **options)
    assert type(found) is type(expected)
    assert also_told == told
    assert found.config.to_dict() == expected.config.to_dict()
    assert getattr(found, "generation_config", None) == getattr(expected, "generation_config", None)
    state = expected.state_dict()
    assert all(same(x, state[name]) for name, x in found.state_dict().items())
    assert len(set(to_cpu)) == len(state) - len(told["missing_keys"])


def test_files_cut_short_are_said_as_before(sharded: Path, to_cpu: list[str], tmp_path: Path) -> None:
    for file in sharded.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    last = sorted(tmp_path.glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-1])
    with pytest.raises(SafetensorError) as theirs:
        AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(SafetensorError) as ours:
        streamed(AutoModelForCausalLM).from_pretrained(tmp_path)
    assert str(ours.value) == str(theirs.value)


def test_load_reads_this_way(llama: Path, to_cpu: list[str]) -> None:
    expected = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).state_dict()
    model, _ = load(str(llama), precision="32bit")
    assert len(to_cpu) >= len(list(model.parameters())) > 0
    assert all(same(x, expected[name]) for name, x in model.state_dict().items())


def test_options_that_choose_another_reading_are_kept(sharded: Path, to_cpu: list[str]) -> None:
    streamed(AutoModelForCausalLM).from_pretrained(sharded, device_map={"": "cpu"}, disable_mmap=True)
    assert not to_cpu


@pytest.mark.parametrize("places", [None, {}, {"": "cpu"}, {"a": 0, "b": 1}, {"a": 0, "b": "disk"}, {"": "mps"}])
def test_other_devices_are_left_alone(places: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert streaming._place(places) is None


@pytest.mark.parametrize("place", [1, "cuda", "cuda:1", torch.device("cuda", 1), torch.device("cuda")])
def test_one_gpu_by_any_name_is_seen(place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a model that goes to another GPU than the one that was named."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: device)
    for places in ({"": place}, {"a": place, "b": place}):
        found = streaming._place(places)
        assert isinstance(found, Gpu)
        assert found.device == torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert streaming._place({"": place}) is None


def test_memory_that_can_not_be_locked_does_not_end_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(*_: Any) -> Tensor:
        raise WhetError("no room")

    monkeypatch.setattr(readahead, "pinned", refusing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: device)
    assert Gpu(torch.device("cuda", 0)).buffer(5).shape == (5,)


def test_another_version_of_transformers_reads_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(streaming, "ARGUMENTS", ["model", "files"])
    with caplog.at_level(logging.INFO, logger="whet"):
        assert streamed(AutoModelForCausalLM) is AutoModelForCausalLM
    assert "this version of transformers" in caplog.text


def test_a_class_that_loads_in_its_own_way_is_left_alone() -> None:
    class Own(LlamaForCausalLM):  # type: ignore[misc]
        @classmethod
        def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
            return super().from_pretrained(*args, **kwargs)

    assert streamed(Own) is Own
    assert streamed(LlamaForCausalLM).__module__ == LlamaForCausalLM.__module__, "by which custom code is told"
