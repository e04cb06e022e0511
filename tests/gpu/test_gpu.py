"""What a CPU can't show: the same models on a GPU, against an fp32 reference there.

Run with: python -m pytest tests/gpu. Skipped where there is no GPU.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

from whet import FastLanguageModel, SFTConfig, SFTTrainer
from whet.models import attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def packed_batch(lengths: list[int], vocabulary: int) -> dict[str, torch.Tensor | int]:
    """One row of documents as TRL's collator makes it."""
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).cuda()
    generator = torch.Generator().manual_seed(0)
    return {
        "input_ids": torch.randint(4, vocabulary, (1, sum(lengths)), generator=generator).cuda(),
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None].cuda(),
        "cu_seq_lens_q": cu,
        "cu_seq_lens_k": cu,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


def llama(**options: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.08,
        **options,
    )
    return LlamaForCausalLM(config).cuda()


@pytest.mark.parametrize("lengths", [[37], [1, 5, 130, 64], [200, 3, 3, 50]])
def test_packed_attention_is_no_further_from_fp32_than_sdpa_in_bf16(lengths: list[int]) -> None:
    """Catches wrong boundaries, scale, or grouped heads in the variable-length kernel, forward and backward."""
    exact = llama()
    exact.set_attn_implementation("sdpa")
    batch = packed_batch(lengths, 512)
    plain = {name: batch[name] for name in ("input_ids", "position_ids")}

    def logits_and_gradient(model: LlamaForCausalLM, inputs: dict) -> tuple[torch.Tensor, torch.Tensor]:
        logits = model(**inputs, use_cache=False).logits.float()
        weight = model.model.layers[0].self_attn.k_proj.weight
        (gradient,) = torch.autograd.grad(logits.square().mean(), weight)
        return logits.detach(), gradient.float()

    reference = logits_and_gradient(exact, plain)
    theirs = copy.deepcopy(exact).to(torch.bfloat16)
    ours = copy.deepcopy(theirs)
    ours.set_attn_implementation(attention.register())
    for expected, peer, mine in zip(
        reference, logits_and_gradient(theirs, plain), logits_and_gradient(ours, batch), strict=True
    ):
        error_peer, error_mine = ((x - expected).norm() / expected.norm() for x in (peer, mine))
        assert error_mine < 1.25 * error_peer, (error_mine, error_peer)


def test_sliding_window_on_the_gpu_equals_the_masked_reference() -> None:
    """Catches a window that is off by one: FlashAttention counts the keys before a query, transformers also itself."""
    generator = torch.Generator(device="cuda").manual_seed(0)
    q, k, v = (torch.randn(1, h, 90, 64, device="cuda", generator=generator).bfloat16() for h in (4, 2, 2))
    module = torch.nn.Module()
    cu = torch.tensor([0, 20, 90], dtype=torch.int32, device="cuda")
    flash, _ = attention.varlen_attention(module, q, k, v, None, sliding_window=16, cu_seq_lens_q=cu, max_length_q=70)
    exact, _ = attention.varlen_attention(
        module, q.float(), k.float(), v.float(), None, sliding_window=16, cu_seq_lens_q=cu
    )
    torch.testing.assert_close(flash.float(), exact, atol=2e-2, rtol=2e-2)


def test_other_documents_do_not_change_a_document_bitwise() -> None:
    model = llama().to(torch.bfloat16)
    model.set_attn_implementation(attention.register())
    batch = packed_batch([40, 60, 30], 512)
    with torch.no_grad():
        before = model(**batch, use_cache=False).logits
        batch["input_ids"][:, 40:100] = 7
        after = model(**batch, use_cache=False).logits
    assert torch.equal(before[:, :40], after[:, :40])
    assert torch.equal(before[:, 100:], after[:, 100:])
    assert not torch.equal(before[:, 40:100], after[:, 40:100])


@pytest.mark.parametrize("load_in_4bit", [True, False])
def test_builtin_model_trains_packed_saves_and_merges(tmp_path: Path, load_in_4bit: bool) -> None:
    """The loss falls on the GPU, and the merged model answers as the adapter does."""
    model, tokenizer = FastLanguageModel.from_pretrained("builtin:tiny", max_seq_length=256, load_in_4bit=load_in_4bit)
    model = FastLanguageModel.get_peft_model(model, r=16, use_gradient_checkpointing="whet")
    rows = Dataset.from_dict({"text": [f"entry {i}: returns {i * i} for {i}" for i in range(200)]})
    config = SFTConfig(
        output_dir=str(tmp_path / "out"),
        max_steps=30,
        per_device_train_batch_size=4,
        learning_rate=2e-3,
        packing=True,
        max_length=256,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
    )
    trainer = SFTTrainer(model=model, args=config, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5]), losses
    model.save_pretrained_merged(str(tmp_path / "merged"), tokenizer)
    assert isinstance(model, PeftModel)
    merged, _ = FastLanguageModel.from_pretrained(str(tmp_path / "merged"), load_in_4bit=False)
    ids = tokenizer("entry 11: returns", return_tensors="pt").input_ids.cuda()
    with torch.no_grad():
        ours, theirs = model.eval()(ids).logits.float(), merged.eval()(ids).logits.float()
    assert (ours - theirs).norm() / ours.norm() < 0.03
