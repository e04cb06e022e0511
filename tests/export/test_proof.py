"""The proof passes what is right and catches every planted fault; each fault is named in the test that plants it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken

from tests.export import planted
from tests.export.planted import Tuned, change_json, change_tokenizer, change_weights, contents, rewritten, swapped
from tests.llama_cpp import llama_cpp  # noqa: F401 - a fixture
from whet import FastLanguageModel
from whet.errors import WhetError
from whet.export.gguf import write_gguf
from whet.export.llama_cpp import Reading, read_logits
from whet.export.merge import save_merged
from whet.export.proof import Proof, Reference, prove_folder, prove_gguf
from whet.export.proof.behaviour import Answer, distribution_checks, parting
from whet.export.proof.folder import MergedFolder
from whet.export.proof.gguf_file import GGUFFile
from whet.export.proof.limits import FORMATS, limits_of
from whet.export.proof.reference import Asked, choose, divergence
from whet.export.proof.share import share_checks, shares
from whet.quant.gguf_mixes import MIXES

# A block of the k-quants wide; weights so small that rounding does to two layers what it does to a real model.
WIDE = {"hidden_size": 256, "intermediate_size": 256, "initializer_range": 0.04}


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    return planted.tune(tmp_path_factory.mktemp("tuned"), **WIDE)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    return planted.tune(tmp_path_factory.mktemp("gemma"), "gemma2")


def failed(proof: Proof) -> set[str]:
    return {check.name for check in proof.failed}


# ---------------------------------------------------------------- what is right passes


@pytest.mark.parametrize("format", ["fp32", "bf16"])
def test_a_right_folder_passes(tuned: Tuned, format: str) -> None:
    """Catches limits that no merge can meet, and a share that is not 1 where the adapter was merged as trained."""
    proof = prove_folder(tuned.reference, tuned.merged(format), format)
    assert proof.passed, proof.failed
    assert {"files", "fingerprint", "adapter's share", "KL a token", "top-1", "greedy answers"} <= {
        check.name for check in proof.checks
    }


@pytest.mark.parametrize(("held", "format"), [("nf4", "bf16"), ("nf4", "nf4"), ("int8", "fp8")])
def test_quantized_bases_and_folders_pass(tuned: Tuned, tmp_path: Path, held: str, format: str) -> None:
    """Catches a share that is computed from packed bytes, and a base that is compared before it was quantized."""
    loads = {"load_in_4bit": held == "nf4", "load_in_8bit": held == "int8"}
    model, tokenizer = FastLanguageModel.from_pretrained(str(tuned.folder / "base"), **loads)
    model = FastLanguageModel.get_peft_model(model, r=4)
    planted.train_like(model)
    method = "merged_16bit" if format == "bf16" else "merged_4bit" if format == "nf4" else "merged_fp8"
    save_merged(model, tmp_path / "merged", tokenizer, method=method)
    proof = prove_folder(Reference.of(model, tokenizer, tuned.reference.texts), tmp_path / "merged", format)
    assert proof.passed, proof.failed
    (share,) = (check for check in proof.checks if check.name == "adapter's share")
    assert "smaller than the rounding" not in share.what


@pytest.mark.usefixtures("llama_cpp")
@pytest.mark.parametrize("quantization", ["f32", "q4_k_m"])
def test_a_right_gguf_passes(tuned: Tuned, quantization: str) -> None:
    """Catches a comparison with llama.cpp that looks at other positions, other tokens, or other rows of a layer."""
    proof = prove_gguf(tuned.reference, tuned.gguf(quantization), quantization, tuned.merged(), threads=1)
    assert proof.passed, proof.failed
    assert "llama.cpp" in proof.engine


# ---------------------------------------------------------------- planted faults: folders


def truncated_shard(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-64])


def lost_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def wrong_template(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("<|im_start|>", "<|im_start|> "))


def changed_vocabulary(folder: Path) -> None:
    def change(values: dict[str, Any]) -> None:
        vocabulary = values["model"]["vocab"]
        a, b = "Ġthe", "Ġto"
        vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]

    change_json(folder / "tokenizer.json", change)


def token_added_in_training(folder: Path) -> None:
    """Within the embedding's rows, so that no size gives it away."""
    change_tokenizer(folder, lambda tokenizer: tokenizer.add_tokens([AddedToken("<new>", normalized=False)]))


def missing_added_token(folder: Path) -> None:
    def change(values: dict[str, Any]) -> None:
        values["added_tokens"] = [token for token in values["added_tokens"] if token["content"] != "<tool>"]

    change_json(folder / "tokenizer.json", change)


def wrong_rope_base(folder: Path) -> None:
    change_json(folder / "config.json", lambda values: values["rope_parameters"].update(rope_theta=500000.0))


def head_untied_wrongly(folder: Path) -> None:
    """A head of its own becomes the embedding: transformers would load it without a word."""
    change_json(folder / "config.json", lambda values: values.update(tie_word_embeddings=True))


def head_lost(folder: Path) -> None:
    """transformers would fill it with random numbers."""
    change_weights(folder, lambda weights: weights.__delitem__("lm_head.weight"))


def layer_lost(folder: Path) -> None:
    change_weights(folder, lambda weights: weights.__delitem__("model.layers.1.mlp.up_proj.weight"))


def wrong_end(folder: Path) -> None:
    change_json(folder / "generation_config.json", lambda values: values.update(eos_token_id=7))


def embedding_cut(folder: Path) -> None:
    change_json(folder / "config.json", lambda values: values.update(vocab_size=values["vocab_size"] - 2))


def wrong_dtype(folder: Path) -> None:
    def change(weights: dict[str, torch.Tensor]) -> None:
        weights.update({name: value.half() for name, value in weights.items()})

    change_weights(folder, change)


FOLDER_FAULTS: list[tuple[Callable[[Path], None], str]] = [
    (truncated_shard, "files"),
    (lost_shard, "files"),
    (wrong_template, "fingerprint"),
    (changed_vocabulary, "fingerprint"),
    (token_added_in_training, "fingerprint"),
    (missing_added_token, "added tokens"),
    (wrong_rope_base, "config"),
    (head_untied_wrongly, "head"),
    (head_lost, "head"),
    (layer_lost, "loads"),
    (wrong_end, "end tokens"),
    (embedding_cut, "sizes"),
    (wrong_dtype, "types"),
]


@pytest.mark.parametrize(("plant", "check"), FOLDER_FAULTS, ids=lambda value: getattr(value, "__name__", value))
def test_a_fault_in_a_folder_is_caught(tuned: Tuned, tmp_path: Path, plant: Callable[[Path], None], check: str) -> None:
    folder = planted.copied(tuned.merged(), tmp_path / "merged")
    plant(folder)
    proof = prove_folder(tuned.reference, folder, "fp32")
    assert not proof.passed
    assert check in failed(proof), proof.failed


# ---------------------------------------------------------------- planted faults: GGUF


def gguf_wrong_template(path: Path, to: Path) -> None:
    template = contents(path, "tokenizer.chat_template")
    rewritten(path, to, {"tokenizer.chat_template": template.replace("<|im_start|>", "<|im_start|> ")})


def gguf_changed_vocabulary(path: Path, to: Path) -> None:
    rewritten(path, to, {"tokenizer.ggml.tokens": swapped(contents(path, "tokenizer.ggml.tokens"), 300, 301)})


def gguf_missing_added_token(path: Path, to: Path) -> None:
    """The token is there, and is no longer one that text is cut at first."""
    tokens, types = contents(path, "tokenizer.ggml.tokens"), list(contents(path, "tokenizer.ggml.token_type"))
    types[tokens.index("<tool>")] = 1
    rewritten(path, to, {"tokenizer.ggml.token_type": types})


def gguf_wrong_rope_base(path: Path, to: Path) -> None:
    rewritten(path, to, {"llama.rope.freq_base": 500000.0})


def gguf_wrong_end(path: Path, to: Path) -> None:
    rewritten(path, to, {"tokenizer.ggml.eos_token_id": 7})


def gguf_wrong_bos(path: Path, to: Path) -> None:
    rewritten(path, to, {"tokenizer.ggml.bos_token_id": 7})


def gguf_truncated(path: Path, to: Path) -> None:
    to.write_bytes(path.read_bytes()[:-4096])


def gguf_swapped_permutation(path: Path, to: Path) -> None:
    rewritten(path, to, tensors={"blk.0.attn_q.weight": planted.halves_for_pairs(4)})


def gguf_wrong_file_type(path: Path, to: Path) -> None:
    rewritten(path, to, {"general.file_type": int(MIXES["q8_0"].file_type)})


GGUF_FAULTS: list[tuple[Callable[[Path, Path], None], str]] = [
    (gguf_wrong_template, "template"),
    (gguf_changed_vocabulary, "vocabulary"),
    (gguf_missing_added_token, "added tokens"),
    (gguf_wrong_rope_base, "metadata"),
    (gguf_wrong_end, "end tokens"),
    (gguf_wrong_bos, "special tokens"),
    (gguf_truncated, "file"),
    (gguf_swapped_permutation, "tensors"),
    (gguf_wrong_file_type, "types"),
]


@pytest.mark.parametrize(("plant", "check"), GGUF_FAULTS, ids=lambda value: getattr(value, "__name__", value))
def test_a_fault_in_a_gguf_file_is_caught(
    tuned: Tuned, tmp_path: Path, plant: Callable[[Path, Path], None], check: str
) -> None:
    path = tmp_path / "broken.gguf"
    plant(tuned.gguf(), path)
    proof = prove_gguf(tuned.reference, path, "f32", tuned.merged(), threads=1)
    assert not proof.passed
    assert check in failed(proof), proof.failed


def test_a_quantization_of_another_type_is_caught(tuned: Tuned) -> None:
    """Catches a q8_0 file under the name of q4_k_m."""
    proof = prove_gguf(tuned.reference, tuned.gguf("q8_0"), "q4_k_m", tuned.merged(), threads=1)
    assert "types" in failed(proof)


def test_a_norm_without_gemmas_offset_is_caught(gemma: Tuned, tmp_path: Path) -> None:
    path = rewritten(gemma.gguf(), tmp_path / "broken.gguf", tensors={"blk.0.attn_norm.weight": lambda x: x - 1})
    proof = prove_gguf(gemma.reference, path, "f32", gemma.merged(), threads=1)
    assert failed(proof) == {"tensors"}


# ---------------------------------------------------------------- planted faults: merges


def unmerged(layer: str) -> Callable[[str, float], float]:
    return lambda name, scale: 0.0 if name.endswith(layer) else scale


MERGES: dict[str, Callable[[str, float], float]] = {
    "adapter at half its scale": lambda name, scale: scale / 2,
    "adapter at the scale of rsLoRA": lambda name, scale: scale * 2,
    "one layer unmerged": unmerged("layers.1.mlp.up_proj"),
    "one layer twice": lambda name, scale: 2 * scale if name.endswith("layers.0.self_attn.q_proj") else scale,
}


@pytest.mark.parametrize("fault", MERGES)
def test_a_wrong_merge_is_caught(tuned: Tuned, tmp_path: Path, fault: str) -> None:
    """In the folder, and below the rounding of 4 bits: the GGUF file is faithful to a merge that is wrong."""
    folder = tuned.merged_with(f"wrong-{len(list(tuned.folder.iterdir()))}", MERGES[fault])
    assert "adapter's share" in failed(prove_folder(tuned.reference, folder, "fp32"))
    file = GGUFFile(tuned.gguf("q4_k_m", folder), "q4_k_m", tuned.reference, folder)
    assert all(check.passed for check in file.static_checks())
    (share,) = share_checks(tuned.reference, file, limits_of("q4_k_m"))
    assert not share.passed, share


def test_a_small_change_that_a_format_keeps_in_part_is_no_fault(tuned: Tuned, tmp_path: Path) -> None:
    """Catches a proof that stops the export of a short training on an NF4 base, and one that lets any share pass."""
    model, tokenizer = FastLanguageModel.from_pretrained(str(tuned.folder / "base"), load_in_4bit=True)
    model = FastLanguageModel.get_peft_model(model, r=4)
    planted.train_like(model)
    reference = Reference.of(model, tokenizer, tuned.reference.texts)
    with planted.other_scales(model, lambda name, scale: scale / 4):
        save_merged(model, tmp_path / "merged", tokenizer)
        write_gguf(tmp_path / "merged", tmp_path / "small.gguf", "q4_k_m")
        file = GGUFFile(tmp_path / "small.gguf", "q4_k_m", reference, tmp_path / "merged")
        (share,) = share_checks(reference, file, limits_of("q4_k_m"))
        assert min(one.kept for one in shares(reference, file)) < 0.9, "this is no case of it"
    assert share.passed, share
    (share,) = share_checks(reference, file, limits_of("q4_k_m"))
    assert not share.passed, "the adapter is four times what was merged"


@pytest.mark.usefixtures("llama_cpp")
def test_what_the_engine_says_alone_gives_faults_away(tuned: Tuned, gemma: Tuned, tmp_path: Path) -> None:
    """Catches a comparison of distributions that would pass whatever llama.cpp computes. Each fault passes for right
    in the files once the writer itself has it, so the engine's answers must show it too."""
    cases: list[tuple[str, Tuned, Path]] = [
        ("right", tuned, tuned.gguf()),
        ("rope base", tuned, _made(gguf_wrong_rope_base, tuned, tmp_path / "rope.gguf")),
        ("permutation", tuned, _made(gguf_swapped_permutation, tuned, tmp_path / "swapped.gguf")),
        ("half the scale", tuned, tuned.gguf("f32", tuned.merged_with("half", lambda name, scale: scale / 2))),
        ("one layer", tuned, tuned.gguf("f32", tuned.merged_with("one", unmerged("layers.1.mlp.up_proj")))),
        ("right gemma", gemma, gemma.gguf()),
        (
            "norm offset",
            gemma,
            rewritten(gemma.gguf(), tmp_path / "norm.gguf", tensors={"blk.0.attn_norm.weight": lambda x: x - 1}),
        ),
    ]
    readings = [Reading(path, asked.ids, asked.start) for _, one, path in cases for asked in one.reference.asked]
    rows = iter(read_logits(readings, threads=1))
    for name, one, _ in cases:
        found = [torch.from_numpy(next(rows)).log_softmax(-1).numpy() for _ in one.reference.asked]
        checks, _ = distribution_checks(one.reference, found, limits_of("f32"))
        assert all(check.passed for check in checks) == name.startswith("right"), (name, checks)


def _made(plant: Callable[[Path, Path], None], tuned: Tuned, to: Path) -> Path:
    plant(tuned.gguf(), to)
    return to


# ---------------------------------------------------------------- its parts


def test_a_file_that_the_engine_refuses_fails(tuned: Tuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a proof that passes because its engine could not be asked."""
    monkeypatch.setenv("WHET_NODE", str(tmp_path / "nothing"))
    proof = prove_gguf(tuned.reference, tuned.gguf(), "f32", tuned.merged())
    assert failed(proof) == {"runs"}
    assert not Proof("m", "f32", "e", ()).passed


def test_every_format_has_limits_and_coarser_ones_are_wider() -> None:
    """Catches a quantization that is exported and can't be proven."""
    assert set(MIXES) <= set(FORMATS)
    order = ["f32", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q3_k_m", "q2_k"]
    limits = [FORMATS[name] for name in order]
    for a, b in pairwise(limits):
        assert a.kl < b.kl
        assert a.tail < b.tail
        assert a.tie < b.tie
        assert a.top1 > b.top1
    with pytest.raises(WhetError, match="no limits are known"):
        limits_of("q1_x")


def test_divergence_is_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(5, 40, generator=generator).log_softmax(-1) for _ in range(2))
    expected = torch.nn.functional.kl_div(q.double(), p.double(), reduction="none", log_target=True).sum(-1)
    np.testing.assert_allclose(divergence(p.numpy(), q.numpy()), expected.numpy(), rtol=1e-5)
    lost = q.numpy().copy()
    lost[0, 3] = -np.inf
    assert np.isfinite(divergence(p.numpy(), lost)).all()
    assert (divergence(p.numpy(), p.numpy()) == 0).all()


def asked(answer: list[int], stopped: bool) -> Asked:
    rows = np.log(np.array([[0.4, 0.39, 0.2, 0.01]] * (len(answer) + 1), np.float32))
    return Asked([1, 2], answer, stopped, rows)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (Answer([0, 0], True), None),
        (Answer([0, 1], True), np.log(0.4 / 0.39)),
        (Answer([0, 2], False), np.log(0.4 / 0.2)),
        (Answer([0], True), np.log(0.4 / 0.01)),  # it ends too early
        (Answer([0, 0, 0], False), np.log(0.01 / 0.4)),  # it goes on, as likely as not
        (Answer([0, 0], False), np.inf),  # it was cut short
    ],
)
def test_where_answers_part(answer: Answer, expected: float | None) -> None:
    """Catches a token at a near tie taken for a fault, and an answer that never ends taken for right."""
    found = parting(asked([0, 0], True), answer, frozenset({3}))
    assert found is None if expected is None else found == pytest.approx(expected, abs=1e-5)


def test_prompts_are_spread_and_never_none(tuned: Tuned) -> None:
    texts = [f"question {i}" for i in range(100)]
    chosen = choose(tuned.reference.tokenizer, texts)
    assert len(chosen) == 16
    assert chosen[0] == texts[0]
    assert chosen[-1] > "question 90"
    long = ["word " * 3000, "word " * 2000]
    assert choose(tuned.reference.tokenizer, long) == [long[1]]
    with pytest.raises(WhetError, match="no prompt"):
        choose(tuned.reference.tokenizer, [])


def test_an_adapter_that_changes_nothing_is_not_held_to_a_share(tuned: Tuned) -> None:
    """Catches a division by zero, and a check that reads rounding noise as a missing adapter."""
    with planted.other_scales(tuned.model, lambda name, scale: 0.0):
        folder = MergedFolder(tuned.merged(), "fp32", tuned.reference)
        (check,) = share_checks(tuned.reference, folder, limits_of("fp32"))
    assert check.passed
    assert "smaller than the rounding in all" in check.what


def test_a_proof_keeps_no_text(tuned: Tuned, tmp_path: Path) -> None:
    """Catches held-out records that leave the house inside a report."""
    from whet.export.proof import checks, page

    proof = prove_folder(tuned.reference, tuned.merged(), "fp32")
    checks.save([proof], tmp_path)
    page.write_proof([proof], tmp_path / page.NAME, name="m", prompts="Two prompts.")
    kept: list[Mapping[str, Any]] = checks.read(tmp_path)
    assert kept[0]["passed"] is True
    for name in (checks.NAME, page.NAME):
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert "Portugal" not in text
        assert "Fibonacci" not in text
    assert json.loads((tmp_path / checks.NAME).read_text())["proofs"][0]["checks"]
