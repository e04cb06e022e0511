"""The runner of llama.cpp: what it does when something is missing or broken."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.llama_cpp import llama_cpp  # noqa: F401 - a fixture
from whet.errors import WhetError
from whet.export import llama_cpp as runner


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
