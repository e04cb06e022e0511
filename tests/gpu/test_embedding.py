"""An input embedding that waits in host memory: the same model, in less of the GPU's memory."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from whet import FastLanguageModel, SFTConfig, SFTTrainer, WhetError
from whet.models.embedding import movable_embedding, on_host
from whet.plan import fit

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

ROWS, WIDTH = 8192, 256


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small Llama with a head of its own; the built-in model's tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=ROWS,
        hidden_size=WIDTH,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    _, tokenizer = FastLanguageModel.from_pretrained("builtin:tiny")
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_logits_and_answers_are_the_same_and_the_memory_is_free(folder: Path) -> None:
    model, _ = FastLanguageModel.from_pretrained(str(folder), max_seq_length=64)
    ids = torch.randint(4, ROWS, (2, 33), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    with torch.no_grad():
        expected = model(ids).logits
    answer = model.generate(ids, max_new_tokens=5, do_sample=False)
    del model
    gc.collect()
    before = torch.cuda.memory_allocated()
    plain, _ = FastLanguageModel.from_pretrained(str(folder), max_seq_length=64)
    took = torch.cuda.memory_allocated() - before
    del plain
    gc.collect()
    before = torch.cuda.memory_allocated()
    model, _ = FastLanguageModel.from_pretrained(str(folder), max_seq_length=64, offload_embedding=True)
    gc.collect()
    assert torch.cuda.memory_allocated() - before == pytest.approx(took - 2 * ROWS * WIDTH, abs=4096)
    embedding = model.get_input_embeddings()
    assert on_host(embedding)
    assert embedding.weight.is_cuda
    assert movable_embedding(model) is None
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), answer)
    assert model.state_dict()["model.embed_tokens.weight"].cpu().isfinite().all()


def test_a_plan_moves_it_and_training_and_saving_go_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a plan that counts on the room and does not make it, or a merged model with other rows."""
    losses, plan = [], fit.plan
    for moved in (False, True):
        model, tokenizer = FastLanguageModel.from_pretrained(str(folder), max_seq_length=128)
        monkeypatch.setattr(fit, "plan", lambda *a, m=moved, **k: replace(plan(*a, **k), embedding_on_host=m))
        model = FastLanguageModel.get_peft_model(model, r=8)
        draw = torch.Generator().manual_seed(1)
        rows = [torch.randint(4, ROWS, (128,), generator=draw).tolist() for _ in range(24)]
        config = SFTConfig(
            output_dir=str(tmp_path / "out"),
            max_steps=6,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_length=128,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
        )
        data = Dataset.from_dict({"input_ids": rows})
        trainer = SFTTrainer(model=model, args=config, train_dataset=data, processing_class=tokenizer)
        trainer.train()
        losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
        assert on_host(model.get_base_model().get_input_embeddings()) == moved
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    model.save_pretrained_merged(str(tmp_path / "merged"), tokenizer)
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16)
    original = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert torch.equal(merged.model.embed_tokens.weight, original.model.embed_tokens.weight)


def test_one_that_the_head_multiplies_by_stays() -> None:
    with pytest.raises(WhetError, match="output head"):
        FastLanguageModel.from_pretrained("builtin:tiny", offload_embedding=True)
