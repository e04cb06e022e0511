"""The runner of llama.cpp: what it does when something is missing or broken."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from tests.export.tiny_models import save_tiny, token_ids
from tests.llama_cpp import llama_cpp  # noqa: F401 - a fixture
from whet.errors import WhetError
from whet.export import llama_cpp as runner
from whet.export.gguf import write_gguf


def test_not_installed(tmp_path, monkeypatch):
    monkeypatch.setenv("WHET_NODE", str(tmp_path / "nothing"))
    (tmp_path / "m.gguf").touch()
    assert runner.find() is None
    with pytest.raises(WhetError, match=r"llama\.cpp is not installed"):
        runner.tokenize(tmp_path / "m.gguf", ["a"])


@pytest.mark.parametrize("missing", ["node", "npm"])
def test_install_without_node_or_npm(missing, tmp_path, monkeypatch):
    """A path with only the other program on it."""
    other = tmp_path / ("npm" if missing == "node" else "node")
    other.write_text("#!/bin/sh\n")
    other.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(WhetError, match=f"{missing} is not installed"):
        runner.install(tmp_path / "packages")


def test_default_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("WHET_NODE", raising=False)
    monkeypatch.chdir(tmp_path)
    assert runner.default_folder() == tmp_path / ".node"


def test_missing_gguf(tmp_path):
    with pytest.raises(WhetError, match="GGUF file is missing"):
        runner.generate(tmp_path / "m.gguf", ["a"], max_new_tokens=1)


@pytest.mark.parametrize(
    ("prompts", "tokens", "match"), [(["a"], 0, "max_new_tokens is 0"), ([""], 1, "prompt is empty")]
)
def test_wrong_arguments(prompts, tokens, match, tmp_path):
    with pytest.raises(WhetError, match=match):
        runner.generate(tmp_path / "m.gguf", prompts, max_new_tokens=tokens)


@pytest.mark.usefixtures("llama_cpp")
def test_broken_gguf_shows_llama_cpps_own_words(tmp_path):
    path: Path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(WhetError, match=r"llama\.cpp failed \(exit code 1\):\n(.|\n)*gguf"):
        runner.tokenize(path, ["a"])


@pytest.mark.usefixtures("llama_cpp")
def test_timeout(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(WhetError, match=r"did not finish in 0\.01 s"):
        runner.tokenize(tmp_path / "m.gguf", ["a"], timeout=0.01)


@pytest.mark.usefixtures("llama_cpp")
def test_rows_of_logits(tmp_path):
    """Catches rows that are of another token or sequence, and a batch's border (512 tokens) that shifts them."""
    paths = [
        write_gguf(save_tiny(tmp_path / n, "llama", seed=int(n)), tmp_path / f"{n}.gguf", "f16").path for n in "01"
    ]
    long, short = token_ids(600), token_ids(5, seed=1)
    readings = [
        runner.Reading(paths[0], short),
        runner.Reading(paths[0], long, start=510),
        runner.Reading(paths[1], short, start=4),
        runner.Reading(paths[0], long[:512]),
    ]
    found = runner.read_logits(readings, threads=1)
    assert [rows.shape for rows in found] == [(5, 604), (90, 604), (1, 604), (512, 604)]
    assert np.abs(found[1][:2] - found[3][510:]).max() <= 1e-4
    alone = runner.log_probabilities(paths[1], [short], threads=1)[0]
    np.testing.assert_allclose(np.exp(alone).sum(axis=1), 1, rtol=1e-5)
    of_the_row = found[2] - found[2].max()
    assert np.abs(alone[4:] - alone[4:].max() - of_the_row).max() <= 1e-4
    assert np.abs(alone - alone.max(axis=1, keepdims=True) - found[0] + found[0].max(axis=1, keepdims=True)).max() > 0.1


@pytest.mark.parametrize("start", [-1, 3])
def test_rows_outside_a_sequence(start, tmp_path):
    with pytest.raises(WhetError, match=f"row {start} of 3 tokens"):
        runner.logits(tmp_path / "m.gguf", [[1, 2, 3]], start=[start])


@pytest.mark.usefixtures("llama_cpp")
def test_a_token_outside_the_vocabulary(tmp_path):
    """Catches a crash, or numbers of no meaning, where tokens and file do not belong together."""
    path = write_gguf(save_tiny(tmp_path / "m", "llama"), tmp_path / "m.gguf", "f16").path
    with pytest.raises(WhetError, match="token 604 is outside the file's vocabulary of 604"):
        runner.logits(path, [[1, 604]], threads=1)


def test_threads_leave_a_core_to_others() -> None:
    """Catches llama.cpp's own choice, which may be more threads than there are cores: they spin while they wait."""
    cores = len(os.sched_getaffinity(0))
    assert runner.threads_for(None) == max(1, cores - 1)
    assert runner.threads_for(3) == 3
