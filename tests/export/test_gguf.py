"""GGUF files of tiny random Llamas, run in the real llama.cpp and compared with transformers."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from transformers import AutoTokenizer, LlamaForCausalLM

from tests.export.tiny_llama import STRINGS, byte_level_tokenizer, save_llama
from tests.llama_cpp import llama_cpp  # noqa: F401 - a fixture
from whet.export import gguf_pieces
from whet.export import llama_cpp as runner
from whet.export.gguf import verify, write_gguf, write_ggufs
from whet.export.gguf_architectures import architecture_of
from whet.export.gguf_architectures.base import reorder_heads
from whet.quant.gguf_mixes import MIXES

NEW_TOKENS = 16
QUESTIONS = ("What is a list?", "def f(x):\n    return 1", "日本語 🙂 42")


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level_tokenizer()


@pytest.fixture(scope="module")
def plain(tokenizer, tmp_path_factory) -> Path:
    return save_llama(tmp_path_factory.mktemp("plain"), tokenizer)


def _prompts(tokenizer) -> list[str]:
    return [
        tokenizer.apply_chat_template([{"role": "user", "content": q}], tokenize=False, add_generation_prompt=True)
        for q in QUESTIONS
    ]


def _greedy(model: LlamaForCausalLM, prompt: list[int], eos: int) -> list[int]:
    """Greedy tokens up to eos, without it."""
    out = model.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=eos)
    new = out[0, len(prompt) :].tolist()
    return new[: new.index(eos)] if eos in new else new


def _load(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _ids(tokenizer, texts: list[str]) -> list[list[int]]:
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.usefixtures("llama_cpp")
def test_f32_answers_as_transformers_does(tied, tokenizer, tmp_path):
    """Catches wrong row order of q and k, a lost output matrix, an answer that does not stop."""
    folder = save_llama(tmp_path / "model", tokenizer, tie_word_embeddings=tied)
    report = write_gguf(folder, tmp_path / "model.gguf", "f32")
    assert report.fallbacks == {}
    assert ("output.weight" in report.types) != tied
    prompts, model = _prompts(tokenizer), _load(folder)
    answers = runner.generate(report.path, prompts, max_new_tokens=NEW_TOKENS, threads=1)
    for prompt, answer in zip(_ids(tokenizer, prompts), answers, strict=True):
        assert answer.prompt_token_ids == prompt
        expected = _greedy(model, prompt, tokenizer.eos_token_id)
        assert answer.token_ids == expected
        assert answer.stopped == (len(expected) < NEW_TOKENS)
        assert answer.text == tokenizer.decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize("changes", [{}, {"hidden_size": 96, "head_dim": 24, "intermediate_size": 160}], ids=str)
@pytest.mark.usefixtures("llama_cpp")
def test_every_quantization_computes_as_transformers_does_on_its_weights(changes, tokenizer, tmp_path):
    """Catches a block layout that gguf's Python reads as we do and llama.cpp does not.

    llama.cpp also rounds what enters a matrix, to 8 bits: logits are a little off, and stay in step.
    """
    folder = save_llama(tmp_path / "model", tokenizer, tie_word_embeddings=bool(changes), **changes)
    reports = write_ggufs(folder, {name: tmp_path / f"{name}.gguf" for name in MIXES})
    ids = _ids(tokenizer, STRINGS[:1])[0] + _ids(tokenizer, _prompts(tokenizer))[2]
    rows = runner.read_logits([runner.Reading(report.path, ids) for report in reports], threads=1)
    model = _load(folder)
    for report, found in zip(reports, rows, strict=True):
        _decode_into(model, report.path)
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0].numpy()
        in_step = [np.corrcoef(one, other)[0, 1] for one, other in zip(found, expected, strict=True)]
        assert min(in_step) > 0.995, report.quantization


def test_several_in_one_pass_are_each_as_alone(plain, tmp_path):
    """Catches a file that gets another's bytes: types that two files share are encoded once."""
    names = ("q4_k_m", "q4_k_s", "q8_0", "f16")
    together = write_ggufs(plain, {name: tmp_path / f"{name}.gguf" for name in names})
    for report in together:
        alone = write_gguf(plain, tmp_path / "alone.gguf", report.quantization)
        assert alone.path.read_bytes() == report.path.read_bytes()
        assert (alone.types, alone.nbytes) == (report.types, report.nbytes)


def test_pieces_of_any_size_give_the_same_file(plain, tmp_path, monkeypatch):
    """Catches pieces that cut through heads, whose rows change places, or lose rows at the end of a tensor."""
    whole = write_gguf(plain, tmp_path / "whole.gguf", "q4_k_m").path.read_bytes()
    for size in (48 * 256, 300 * 256):
        monkeypatch.setattr(gguf_pieces, "_PIECE", size)
        assert write_gguf(plain, tmp_path / "pieces.gguf", "q4_k_m").path.read_bytes() == whole


def _decode_into(model: LlamaForCausalLM, path: Path) -> None:
    """Replace the model's matrices by those of the file, undoing the row order of q and k."""
    names = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}
    names |= {"attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj"}
    names |= {"ffn_down": "mlp.down_proj"}
    state = {}
    for tensor in gguf.GGUFReader(path).tensors:
        x = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
        if tensor.name == "token_embd.weight":
            state["model.embed_tokens.weight"] = x
        elif tensor.name == "output.weight":
            state["lm_head.weight"] = x
        elif tensor.name.startswith("blk.") and "norm" not in tensor.name:
            _, layer, kind, _ = tensor.name.split(".")
            if kind in ("attn_q", "attn_k"):
                heads = model.config.num_attention_heads if kind == "attn_q" else model.config.num_key_value_heads
                x = x.reshape(heads, -1, 2, x.shape[-1]).transpose(1, 2).reshape(x.shape)
            state[f"model.layers.{layer}.{names[kind]}.weight"] = x
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert all("norm" in name or name == "lm_head.weight" for name in missing)


def test_reorder_heads_pairs_the_halves():
    rows = np.arange(8, dtype=np.float32)[:, None]
    assert reorder_heads(rows, 2).ravel().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_metadata(plain, tokenizer, tmp_path):
    report = write_gguf(plain, tmp_path / "m.gguf", "q4_k_m")
    fields = gguf.GGUFReader(report.path).fields
    value = {name: fields[name].contents() for name in fields}
    assert value["general.architecture"] == "llama"
    assert value["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_K_M
    assert value["llama.block_count"] == 2
    assert value["llama.context_length"] == 512
    assert value["llama.attention.head_count"] == 4
    assert value["llama.attention.head_count_kv"] == 2
    assert value["llama.attention.key_length"] == value["llama.rope.dimension_count"] == 64
    assert value["llama.vocab_size"] == len(tokenizer) + 2
    assert value["tokenizer.ggml.model"] == "gpt2"
    assert value["tokenizer.ggml.pre"] == "gpt-2"
    assert value["tokenizer.ggml.bos_token_id"] == tokenizer.bos_token_id
    assert value["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert value["tokenizer.ggml.padding_token_id"] == tokenizer.pad_token_id
    assert value["tokenizer.ggml.add_bos_token"] is False
    assert value["tokenizer.chat_template"] == tokenizer.chat_template
    tokens, types = value["tokenizer.ggml.tokens"], value["tokenizer.ggml.token_type"]
    assert tokens[-2:] == [f"[PAD{len(tokenizer)}]", f"[PAD{len(tokenizer) + 1}]"]
    assert types[-2:] == [gguf.TokenType.UNUSED] * 2
    assert types[tokens.index("<|im_end|>")] == gguf.TokenType.CONTROL
    assert types[tokens.index("<tool>")] == gguf.TokenType.USER_DEFINED
    assert report.bits_per_weight == pytest.approx(8 * report.path.stat().st_size / 1_490_000, rel=0.02)


def test_rows_that_do_not_divide_are_reported(tokenizer, tmp_path):
    """q4_k_m of a model whose rows are 64 and 96 long holds no k-quants, and says so for each matrix."""
    folder = save_llama(tmp_path / "m", tokenizer, hidden_size=64, intermediate_size=100, head_dim=16)
    report = write_gguf(folder, tmp_path / "m.gguf", "q4_k_m")
    assert set(report.types.values()) == {"f32", "q5_0", "q8_0", "f16"}
    assert set(report.fallbacks) == {name for name, kind in report.types.items() if kind != "f32"}
    assert report.fallbacks["blk.0.ffn_down.weight"].startswith("f16 instead of q4_k: rows of 100")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sharded_16_bit_checkpoints_give_the_same_file(dtype, plain, tmp_path):
    model = LlamaForCausalLM.from_pretrained(plain, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(plain)
    for name, size in (("one", "1GB"), ("many", "500KB")):
        model.save_pretrained(tmp_path / name, max_shard_size=size)
        tokenizer.save_pretrained(tmp_path / name)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    kind = "bf16" if dtype is torch.bfloat16 else "f16"
    one = write_gguf(tmp_path / "one", tmp_path / "one.gguf", kind)
    many = write_gguf(tmp_path / "many", tmp_path / "many.gguf", kind)
    ours, theirs = gguf.GGUFReader(one.path).tensors, gguf.GGUFReader(many.path).tensors
    assert [t.name for t in ours] == [t.name for t in theirs]
    assert all(np.array_equal(a.data, b.data) for a, b in zip(ours, theirs, strict=True))


def test_older_rope_fields_are_read(plain, tmp_path):
    """Checkpoints from before transformers 5 have rope_theta and rope_scaling of their own."""
    config = (plain / "config.json").read_text()
    folder = tmp_path / "old"
    folder.mkdir()
    start, end = config.index('"rope_parameters"'), config.index("}", config.index('"rope_parameters"')) + 1
    older = '"rope_theta": 1234.0, "rope_scaling": {"type": "linear", "factor": 2.0}'
    (folder / "config.json").write_text(config[:start] + older + config[end:])
    rope = architecture_of(folder).config.rope
    assert (rope.kind, rope.base, rope.parameters["factor"]) == ("linear", 1234.0, 2.0)


def test_progress_ends_at_the_total(plain, tmp_path):
    calls = []
    write_gguf(plain, tmp_path / "m.gguf", "f16", progress=lambda done, total, name: calls.append((done, total, name)))
    assert calls[-1][0] == calls[-1][1] == sum(p.numel() for p in _load(plain).parameters())
    assert [done for done, _, _ in calls] == sorted({done for done, _, _ in calls})


def test_verify_finds_one_wrong_byte(plain, tmp_path):
    """A flipped exponent bit in one weight of one tensor is found, and the tensor named."""
    path = write_gguf(plain, tmp_path / "m.gguf", "q4_k_m").path
    verify(path, plain)
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.1.attn_q.weight")
    data = bytearray(path.read_bytes())
    data[int(tensor.data_offset) + 1] ^= 0x10
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"blk\.1\.attn_q\.weight decodes to"):
        verify(path, plain)


def test_verify_finds_another_models_file(plain, tokenizer, tmp_path):
    other = save_llama(tmp_path / "other", tokenizer, seed=1)
    path = write_gguf(other, tmp_path / "m.gguf", "q8_0").path
    with pytest.raises(ValueError, match=r"token_embd\.weight decodes to"):
        verify(path, plain)
