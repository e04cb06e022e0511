"""How FlashAttention 4 is found, imported and called, by a stand-in for it. Its numbers: tests/gpu."""

from __future__ import annotations

import os
import sys
from importlib.metadata import PackageNotFoundError
from threading import Thread
from types import SimpleNamespace

import pytest
import torch

from tests.flash4_stand_in import StandIn
from whet.kernels import attention as module
from whet.kernels import flash4
from whet.kernels.attention import Documents, Layout, Rows, attention, attention_backward

PLACE = "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"
HOPPER = (9, 0)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch):
    """As in a new process."""
    monkeypatch.setattr(flash4, "_loaded", [])
    for name in (PLACE, "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    flash4.installed.cache_clear()
    yield
    flash4.installed.cache_clear()


def install(monkeypatch: pytest.MonkeyPatch, version: str | None, found: object = None) -> list[str]:
    """Have this version installed, and `found` (a module, or what importing raises) come of it. Names imported."""
    imported: list[str] = []

    def version_of(package: str) -> str:
        assert package == "flash-attn-4"
        if version is None:
            raise PackageNotFoundError
        return version

    def import_module(name: str) -> object:
        imported.append(name)
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(flash4, "version", version_of)
    monkeypatch.setattr(flash4, "import_module", import_module)
    return imported


def test_without_it_nothing_is_imported(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    """Catches an extra that everybody pays for, or that nobody with a Hopper hears of."""
    caplog.set_level("INFO")
    imported = install(monkeypatch, None)
    assert not flash4.takes(torch.empty(4, 2, 64), HOPPER)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: HOPPER)
    assert caplog.records == []
    assert flash4.prepare() is None
    assert imported == []
    (record,) = caplog.records
    assert (record.levelname, record.message.rpartition(": ")[2]) == ("INFO", 'pip install "whet[flash4]"')


def test_another_version_is_not_called(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    """Catches functions of a beta that are called as another beta had them, and an extra ignored in silence."""
    imported = install(monkeypatch, "4.0.0b99")
    for _ in range(2):
        assert not flash4.takes(torch.empty(4, 2, 64), HOPPER)
    assert imported == []
    assert [r.message for r in caplog.records] == [
        f"flash-attn-4 4.0.0b99 is installed, of which whet calls {flash4.VERSION}: "
        f"attention runs without it (pip install flash-attn-4=={flash4.VERSION})"
    ]


def test_what_can_not_be_imported_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    """Catches a broken installation that ends the training, or that nobody hears of."""
    imported = install(monkeypatch, flash4.VERSION, OSError("libcuda.so.1: cannot open"))
    for _ in range(2):
        assert not flash4.takes(torch.empty(4, 2, 64), HOPPER)
    assert imported == [flash4.MODULE]
    assert [r.message for r in caplog.records] == [
        "FlashAttention 4 can't be loaded, attention runs without it: OSError: libcuda.so.1: cannot open"
    ]


def test_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a GPU or a head size that it has no kernel for."""
    install(monkeypatch, flash4.VERSION, SimpleNamespace())
    taken = [(8, HOPPER), (128, HOPPER), (256, HOPPER)]
    refused = [(36, HOPPER), (264, HOPPER), (128, (8, 0)), (128, (10, 0)), (128, (12, 0))]
    assert all(flash4.takes(torch.empty(4, 2, width), capability) for width, capability in taken)
    assert not any(flash4.takes(torch.empty(4, 2, width), capability) for width, capability in refused)


def test_compiled_kernels_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """Catches three seconds a kernel in each process, a folder others can write to, and a place of the user's lost."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    install(monkeypatch, flash4.VERSION, SimpleNamespace())
    flash4.interface()
    assert os.environ["FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"] == "1"
    assert os.environ[PLACE] == str(tmp_path / "whet" / "flash4")
    monkeypatch.setattr(flash4, "_loaded", [])
    monkeypatch.setenv(PLACE, "/elsewhere")
    flash4.interface()
    assert os.environ[PLACE] == "/elsewhere"


def test_a_thread_imports_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a second import beside the first, and one where there is no Hopper."""
    imported = install(monkeypatch, flash4.VERSION, SimpleNamespace())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert flash4.prepare() is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: HOPPER)
    threads = [flash4.prepare(), Thread(target=flash4.interface)]
    threads[1].start()
    for thread in threads:
        thread.join()
    assert imported == [flash4.MODULE]


@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize(
    "layout", [Rows(3, 11), Documents(torch.tensor([0, 1, 14, 14, 33], dtype=torch.int32), 19)], ids=["rows", "ragged"]
)
def test_it_is_asked_for_what_attention_is_asked_for(
    layout: Layout, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a window off by one, rows taken for documents, statistics of another shape, and results in the strides of
    one projection."""
    monkeypatch.setattr(flash4, "_loaded", [StandIn()])
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = torch.randn(33, 4 + 2 + 2 + 4, 8, generator=generator).split((4, 2, 2, 4), dim=1)
    found = []
    for backend in ("flash4", "reference"):
        monkeypatch.setattr(module, "_backend", lambda *_, backend=backend: backend)
        out, saved = attention(q, k, v, layout, scale=0.3, window=window)
        options = {"scale": 0.3, "window": window}
        found.append([out, *attention_backward(dout, q, k, v, out, saved, layout, **options)])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
        assert a.is_contiguous()


def test_it_is_not_imported_with_whet() -> None:
    """Catches an import of seconds in commands that train nothing."""
    assert flash4.MODULE not in sys.modules
