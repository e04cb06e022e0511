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
from whet.export import llama_cpp as runner
from whet.export.gguf import verify, write_gguf
from whet.export.gguf_llama import read_config, reorder_heads

NEW_TOKENS = 16
QUESTIONS = ("What is a list?", "def f(x):\n    return 1", "日本語 🙂 42")
LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIANTS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "llama3 rope": {"rope_parameters": LLAMA_3_ROPE},
    "linear rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}},
    "odd heads": {"head_dim": 48, "num_attention_heads": 8, "num_key_value_heads": 4, "rms_norm_eps": 1e-3},
}


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


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.usefixtures("llama_cpp")
def test_f32_answers_as_transformers_does(changes, tokenizer, tmp_path):
    """Catches wrong row order of q and k, wrong rope, lost biases, a lost output matrix, wrong head counts."""
    folder = save_llama(tmp_path / "model", tokenizer, **changes)
    report = write_gguf(folder, tmp_path / "model.gguf", "f32")
    assert report.fallbacks == {}
    assert ("output.weight" in report.types) == (not changes.get("tie_word_embeddings", False))
    prompts, model = _prompts(tokenizer), _load(folder)
    answers = runner.generate(report.path, prompts, max_new_tokens=NEW_TOKENS, threads=1)
    for prompt, answer in zip(_ids(tokenizer, prompts), answers, strict=True):
        assert answer.prompt_token_ids == prompt
        expected = _greedy(model, prompt, tokenizer.eos_token_id)
        assert answer.token_ids == expected
        assert answer.stopped == (len(expected) < NEW_TOKENS)
        assert answer.text == tokenizer.decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize("quantization", ["f16", "bf16", "q8_0", "q4_k_m"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.usefixtures("llama_cpp")
def test_rounded_types_answer_nearly_as_transformers_does_on_the_rounded_weights(
    quantization, tied, tokenizer, tmp_path
):
    """Catches a block layout that gguf's Python reads as we do and llama.cpp does not.

    The first token must be among the five likeliest of 604 under the decoded weights: llama.cpp also rounds
    activations, and random weights have near ties.
    """
    folder = save_llama(tmp_path / "model", tokenizer, tie_word_embeddings=tied)
    report = write_gguf(folder, tmp_path / "model.gguf", quantization)
    model = _load(folder)
    _decode_into(model, report.path)
    prompts = _prompts(tokenizer) + STRINGS[:5]
    answers = runner.generate(report.path, prompts, max_new_tokens=1, threads=1)
    for answer in answers:
        with torch.no_grad():
            logits = model(torch.tensor([answer.prompt_token_ids])).logits[0, -1]
        likeliest = logits.topk(5).indices.tolist()
        assert answer.token_ids[0] in likeliest if answer.token_ids else tokenizer.eos_token_id in likeliest


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
    assert set(report.types.values()) == {"f32", "q8_0", "f16"}
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
    assert read_config(folder).rope == {"rope_theta": 1234.0, "type": "linear", "factor": 2.0, "rope_type": "linear"}


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
