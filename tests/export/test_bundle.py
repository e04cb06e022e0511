"""An export's folder: everything is in it, its digests are right, and it is there only when it was proven."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.export import planted
from tests.export.planted import Tuned
from tests.llama_cpp import llama_cpp  # noqa: F401 - a fixture
from whet.errors import WhetError
from whet.export import artifacts, checksums
from whet.export.bundle import Prompts, export_bundle
from whet.export.launch import write_launch
from whet.export.licence import licence_of
from whet.export.model_card import Origin, Section
from whet.export.proof.prompts import general_prompts
from whet.export.wanted import Wanted


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    return planted.tune(tmp_path_factory.mktemp("tuned"))


@pytest.fixture
def origin(tmp_path: Path) -> Origin:
    base = tmp_path / "base"
    base.mkdir()
    (base / "LICENSE").write_text("Share alike.")
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: base-1\n---\n# Base\n")
    return Origin("desk", "base", licence_of(str(base)), (Section("Data", (("data's version", "abc|def"),)),))


def exported(tuned: Tuned, out: Path, wanted: Wanted, origin: Origin) -> list[Any]:
    tokenizer = tuned.reference.tokenizer
    prompts = Prompts(general_prompts(tokenizer)[:2], "general prompts")
    return export_bundle(tuned.model, tokenizer, out, wanted, origin, prompts)


@pytest.mark.usefixtures("llama_cpp")
def test_everything_is_in_the_folder(tuned: Tuned, tmp_path: Path, origin: Origin) -> None:
    """Catches a file that the card names and that is not there, and a digest of what was changed afterwards."""
    out = tmp_path / "out"
    made = exported(tuned, out, Wanted(merged="fp32", gguf=("q8_0",)), origin)
    assert [(one.path, one.kind, one.format) for one in made] == [
        ("merged", "merged", "fp32"),
        ("model-q8_0.gguf", "gguf", "q8_0"),
    ]
    assert {path.name for path in out.iterdir()} == {
        "merged", "model-q8_0.gguf", "Modelfile", "vllm.yaml", "vllm.sh", "fingerprint.json", "base-licence",
        "proof.json", "proof.html", "export.json", "README.md", "SHA256SUMS",
    }  # fmt: skip
    command = ["sha256sum", "-c", "--strict", "--quiet", "SHA256SUMS"]
    assert subprocess.run(command, cwd=out, capture_output=True, text=True).stdout == ""
    checksums.check(out)
    proofs = json.loads((out / "proof.json").read_text())["proofs"]
    assert [(proof["artifact"], proof["passed"]) for proof in proofs] == [("merged", True), ("model-q8_0.gguf", True)]
    assert (out / "base-licence" / "LICENSE").read_text() == "Share alike."
    card = (out / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["license"] == "base-1"
    assert front["base_model"] == "base"
    for words in ("`merged`", "`model-q8_0.gguf`", "abc\\|def", "ollama create desk -f Modelfile", "vllm.sh"):
        assert words in card
    assert str(tmp_path) not in card + (out / "export.json").read_text() + (out / "vllm.yaml").read_text()
    assert "FROM ./model-q8_0.gguf" in (out / "Modelfile").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(out / "merged")
    assert loaded.dtype == torch.float32
    assert json.loads((out / "merged" / "generation_config.json").read_text())["eos_token_id"] == [1]
    assert AutoTokenizer.from_pretrained(out / "merged").chat_template == tuned.reference.tokenizer.chat_template
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]


def test_a_failed_proof_leaves_a_report_and_no_export(
    tuned: Tuned, tmp_path: Path, origin: Origin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a broken model under its final name. The merge that is planted here doubles the adapter."""
    right = artifacts.save_merged

    def doubled(model: Any, *arguments: Any, **options: Any) -> None:
        with planted.other_scales(model, lambda name, scale: 2 * scale):
            right(model, *arguments, **options)

    monkeypatch.setattr(artifacts, "save_merged", doubled)
    with pytest.raises(WhetError, match="merged is not what was trained: adapter's share") as caught:
        exported(tuned, tmp_path / "out", Wanted(merged="fp32"), origin)
    report = tmp_path / "out-not-proven"
    assert caught.value.where == str(report / "proof.html")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out-not-proven"]
    assert "Not exported" in (report / "proof.html").read_text()
    assert json.loads((report / "proof.json").read_text())["proofs"][0]["passed"] is False


def test_an_unproven_export_says_so(tuned: Tuned, tmp_path: Path, origin: Origin) -> None:
    """Catches a card that claims what nobody looked at."""
    exported(tuned, tmp_path / "out", Wanted(merged="bf16", proven=False), origin)
    assert "Not proven" in (tmp_path / "out" / "README.md").read_text()
    assert not (tmp_path / "out" / "proof.json").exists()
    assert json.loads((tmp_path / "out" / "export.json").read_text())["proven"] is False


def test_gguf_alone_brings_its_tokenizer_and_a_word_where_ollama_cannot_have_the_template(
    tuned: Tuned, tmp_path: Path, origin: Origin, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tuned.reference.tokenizer
    irregular = "{% for m in messages %}{{ loop.index }}{{ m['content'] }}{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", irregular)
    exported(tuned, tmp_path / "out", Wanted(gguf=("q8_0", "f32"), proven=False), origin)
    out = tmp_path / "out"
    assert {path.name for path in out.glob("model*")} == {"model-q8_0.gguf", "model-f32.gguf"}
    assert not list(out.glob("Modelfile*"))
    assert AutoTokenizer.from_pretrained(out / "tokenizer").chat_template == irregular
    assert "There is no Modelfile for Ollama: the chat template has no equal" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("wanted", "what"),
    [
        (Wanted(), "nothing is to be written"),
        (Wanted(merged="bf17"), "unknown format 'bf17'"),
        (Wanted(gguf=("q4",)), "no GGUF quantization 'q4'"),
    ],
)
def test_what_can_not_be_written_is_refused_first(
    tuned: Tuned, tmp_path: Path, origin: Origin, wanted: Wanted, what: str
) -> None:
    with pytest.raises(WhetError, match=what):
        exported(tuned, tmp_path / "out", wanted, origin)
    assert not (tmp_path / "out").exists()


def test_gguf_without_its_engine_is_refused_first(
    tuned: Tuned, tmp_path: Path, origin: Origin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a proof that is left out because llama.cpp is not there."""
    monkeypatch.setenv("WHET_NODE", str(tmp_path / "nothing"))
    with pytest.raises(WhetError, match=r"proven in llama\.cpp, which is not installed"):
        exported(tuned, tmp_path / "out", Wanted(gguf=("q8_0",)), origin)


def test_a_folder_with_something_in_it_is_refused(tuned: Tuned, tmp_path: Path, origin: Origin) -> None:
    """Catches files of an older export that stay, unproven, beside the new ones."""
    with pytest.raises(WhetError, match="is not empty"):
        exported(tuned, tmp_path / "base", Wanted(merged="bf16", proven=False), origin)


# ---------------------------------------------------------------- its small parts


def test_checksums_find_every_change(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one").write_text("1")
    (tmp_path / "two").write_text("2")
    checksums.write_checksums(tmp_path)
    checksums.check(tmp_path)
    (tmp_path / "two").write_text("3")
    with pytest.raises(WhetError, match="two was changed"):
        checksums.check(tmp_path)
    (tmp_path / "two").unlink()
    with pytest.raises(WhetError, match="two is missing"):
        checksums.check(tmp_path)
    (tmp_path / "two").write_text("2")
    (tmp_path / "three").write_text("3")
    with pytest.raises(WhetError, match="three is not listed"):
        checksums.check(tmp_path)


def test_a_licence_is_found_by_its_files_and_its_card(tmp_path: Path) -> None:
    """Catches a base whose terms are lost on the way."""
    for name in ("LICENSE.txt", "NOTICE", "USE_POLICY.md", "license_plates.csv", "model.safetensors"):
        (tmp_path / name).write_text(name)
    found = licence_of(str(tmp_path))
    assert [path.name for path in found.files] == ["LICENSE.txt", "NOTICE", "USE_POLICY.md"]
    assert (found.name, found.text) == (None, "LICENSE.txt")
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    assert licence_of(str(tmp_path)).name == "mit"
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    assert licence_of(str(tmp_path)).name is None
    own = licence_of("builtin:tiny")
    assert own.name == "apache-2.0"
    assert "Apache License" in str(own.text)
    assert not licence_of("nobody/nothing").known


def test_vllm_files(tmp_path: Path) -> None:
    """Catches a server that binds to every address, or that needs no key."""
    write_launch(tmp_path, model="merged", name="desk", format="bf16", context=4096)
    assert yaml.safe_load((tmp_path / "vllm.yaml").read_text()) == {
        "model": "./merged",
        "served-model-name": "desk",
        "host": "127.0.0.1",
        "port": 8000,
        "dtype": "bfloat16",
        "max-model-len": 4096,
    }
    script = tmp_path / "vllm.sh"
    asked = subprocess.run([str(script)], env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True)
    assert asked.returncode == 2
    assert "VLLM_API_KEY" in asked.stderr
    stand_in = tmp_path / "bin" / "vllm"
    stand_in.parent.mkdir()
    stand_in.write_text('#!/bin/sh\necho "$PWD" "$@"\n')
    stand_in.chmod(0o755)
    env = {"PATH": f"{stand_in.parent}:/usr/bin:/bin", "VLLM_API_KEY": "k"}
    asked = subprocess.run([str(script), "--port", "9"], env=env, capture_output=True, text=True, cwd="/")
    assert asked.stdout.strip() == f"{tmp_path} serve --config vllm.yaml --port 9"
