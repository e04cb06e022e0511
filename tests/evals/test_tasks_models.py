"""The model in memory: what it generates and finds likely, and that training does not notice."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

import whet
from whet.errors import WhetError
from whet.evals import likelihood
from whet.evals.heldout import mean_loss
from whet.evals.likelihood import Continuation, log_probs
from whet.evals.models import Generation, InMemory, Model, Prompt
from whet.evals.undisturbed import undisturbed
from whet.models.fused import FusedLayer, path_of, shared_of

ASKED = [Prompt(messages=[{"role": "user", "content": f"Count to {n}. {'Please. ' * n}"}]) for n in (3, 1, 7, 2, 5)]


def loaded(dropout: float = 0.0) -> tuple[Any, Any]:
    """The built-in model with an adapter that changes what it says."""
    model, tokenizer = whet.FastLanguageModel.from_pretrained("builtin:tiny", load_in_4bit=False, dtype="float32")
    model = whet.FastLanguageModel.get_peft_model(model, r=4, lora_dropout=dropout)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.02)
    return model, tokenizer


@pytest.fixture(scope="module")
def tuned() -> InMemory:
    model, tokenizer = loaded()
    return InMemory(model, tokenizer, "tuned", batch=2)


def alone(tuned: InMemory, prompt: str, tokens: int, **sampling: Any) -> str:
    """transformers' own greedy answer to one text, without a batch or padding."""
    ids = tuned.tokenizer(prompt, add_special_tokens=False, return_tensors="pt", return_token_type_ids=False)
    tuned.model.eval()
    out = tuned.model.generate(**ids, max_new_tokens=tokens, do_sample=False, pad_token_id=tuned.tokenizer.pad_token_id)
    return str(tuned.tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


def test_batches_answer_as_transformers_does_alone(tuned: InMemory) -> None:
    """Catches padding at the wrong side, answers in the order of lengths, or special tokens twice in a prompt."""
    assert isinstance(tuned, Model)
    found = tuned.generate(ASKED, Generation(max_new_tokens=10))
    assert found == [alone(tuned, tuned.text_of(prompt), 10) for prompt in ASKED]
    assert len(set(found)) > 1


def test_a_models_own_generation_config_decides_nothing(tuned: InMemory) -> None:
    """Catches answers that change with a repetition penalty or sampling that came with the weights, not the task."""
    plain = tuned.generate(ASKED[:2], Generation(max_new_tokens=12))
    own = tuned.model.generation_config
    kept = copy.deepcopy(own)
    try:
        own.update(repetition_penalty=5.0, do_sample=True, temperature=3.0, no_repeat_ngram_size=1)
        assert tuned.generate(ASKED[:2], Generation(max_new_tokens=12)) == plain
    finally:
        own.update(**kept.to_dict())


def test_an_answer_ends_where_it_is_told_to_and_only_there(tuned: InMemory) -> None:
    """Catches a stop that is looked for in the prompt, or is left in the answer, or ends other rows too."""
    whole = tuned.generate(ASKED, Generation(max_new_tokens=16))
    stop = whole[0][3:6]
    assert stop in tuned.text_of(ASKED[0]) or stop not in whole[0][:3]
    cut = tuned.generate(ASKED, Generation(max_new_tokens=16, stop=(stop, "never said")))
    assert cut == [text.partition(stop)[0].strip() for text in whole]
    assert cut != whole
    prompt = Prompt(text="one. two. three.")
    assert tuned.generate([prompt], Generation(8, stop=(".",))) == [
        tuned.generate([prompt], Generation(8))[0].partition(".")[0].strip()
    ]


def test_sampling_depends_on_its_seed_alone(tuned: InMemory) -> None:
    """Catches samples drawn from whatever state the process is in."""
    how = Generation(max_new_tokens=12, temperature=1.5, seed=3)
    torch.manual_seed(1)
    first = tuned.generate(ASKED, how)
    torch.manual_seed(2)
    assert tuned.generate(ASKED, how) == first
    assert tuned.generate(ASKED, Generation(max_new_tokens=12, temperature=1.5, seed=4)) != first


def continued(tuned: InMemory, text: str, choice: str) -> float:
    """log p(choice | text), token by token from the plain logits in double precision."""
    before = len(tuned.tokenizer(text)["input_ids"])
    ids = tuned.tokenizer(text + choice)["input_ids"]
    tuned.model.eval()
    with torch.no_grad():
        logits = tuned.model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(logits[i - 1, ids[i]].item() for i in range(before, len(ids)))


@pytest.mark.parametrize("at_once", [2**27, 1])
def test_choices_are_as_likely_as_the_plain_logits_say(
    tuned: InMemory, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches logits read one place off, padding that is read, prompts that share a pass they do not share."""
    monkeypatch.setattr(likelihood, "LOGITS_AT_ONCE", at_once)
    prompts = [Prompt(text="The sky is"), Prompt(text="A much longer text about the sea, which is"), Prompt(text="x")]
    choices = [[" blue", " green and", " a"], [" deep", " the", " blue"], [" =", " = 1 and more"]]
    found = tuned.choice_logprobs(prompts, choices)
    for prompt, own, values in zip(prompts, choices, found, strict=True):
        assert values == pytest.approx([continued(tuned, str(prompt.text), choice) for choice in own], abs=1e-3)


def test_choices_that_are_the_same_tokens_read_one_pass(tuned: InMemory) -> None:
    """Catches a pass for each single-token choice; and a sum over the wrong tokens where passes are shared."""
    passes = []
    hook = tuned.model.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    try:
        found = log_probs(tuned.model, [Continuation([5, 6, 7], [token]) for token in range(20)])
    finally:
        hook.remove()
    assert passes == [torch.Size([1, 3])]
    with torch.no_grad():
        plain = tuned.model(input_ids=torch.tensor([[5, 6, 7]])).logits[0, -1].log_softmax(-1)
    assert found == pytest.approx(plain[:20].tolist(), abs=1e-4)


def test_white_space_at_a_prompts_end_belongs_to_the_choice(tuned: InMemory) -> None:
    """Catches a space counted as a token of the prompt, which no tokenizer writes before a word."""
    spaced = tuned.choice_logprobs([Prompt(text="The sky is ")], [["blue"]])
    assert spaced == tuned.choice_logprobs([Prompt(text="The sky is")], [[" blue"]])


def test_a_prompt_that_does_not_fit_is_refused(tuned: InMemory) -> None:
    """Catches a model asked beyond its positions, which answers nonsense without a word."""
    with pytest.raises(WhetError, match="the model takes 2048"):
        tuned.generate([Prompt(text="word " * 3000)], Generation(1))


@pytest.mark.parametrize("given", [{}, {"messages": [], "text": None}, {"messages": [{"role": "user"}], "text": "x"}])
def test_a_prompt_is_messages_or_text(given: dict[str, Any]) -> None:
    with pytest.raises(WhetError):
        Prompt(**given)


def test_the_base_answers_under_its_adapter(tuned: InMemory) -> None:
    """Catches a baseline that is asked with the adapter on, one that stays off, and frozen parts that then train."""
    plain, tokenizer = whet.FastLanguageModel.from_pretrained("builtin:tiny", load_in_4bit=False, dtype="float32")
    before = tuned.generate(ASKED, Generation(8))
    frozen = next(p for name, p in tuned.model.named_parameters() if "lora_A" in name).requires_grad_(False)
    base = InMemory(tuned.model, tuned.tokenizer, "base", adapter=False).generate(ASKED, Generation(8))
    assert base == InMemory(plain, tokenizer).generate(ASKED, Generation(8))
    assert base != before
    assert not frozen.requires_grad
    frozen.requires_grad_(True)
    assert tuned.generate(ASKED, Generation(8)) == before
    with pytest.raises(WhetError, match="no adapter"):
        InMemory(plain, tokenizer, adapter=False).generate(ASKED, Generation(8))


# ---------------------------------------------------------------- training does not notice


def states() -> list[bytes]:
    """All random state there is on this machine."""
    return [
        repr(random.getstate()).encode(),
        np.random.get_state()[1].tobytes(),
        torch.get_rng_state().numpy().tobytes(),
    ]


class Evaluates(TrainerCallback):
    """Puts the model being trained through everything an evaluation does, with gradients accumulated half way."""

    def __init__(self, asked: InMemory):
        self.asked, self.times = asked, 0

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        assert any(p.grad is not None for p in self.asked.model.parameters())
        self.evaluate()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.evaluate()

    def evaluate(self) -> None:
        self.times += 1
        self.asked.generate(ASKED[:2], Generation(max_new_tokens=4, temperature=1.0))
        self.asked.choice_logprobs(ASKED[:1], [["one", "two three"]])
        mean_loss(self.asked.model, [{"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]}])


def trained(folder: Path, dropout: float, evaluate: bool) -> tuple[list[torch.Tensor], list[bytes], list[bool], Any]:
    model, tokenizer = loaded(dropout)
    model.train()
    rows = [{"input_ids": list(range(i + 4, i + 24)), "labels": list(range(i + 4, i + 24))} for i in range(12)]
    callback = Evaluates(InMemory(model, tokenizer))
    trainer = whet.SFTTrainer(
        model=model,
        tokenizer=tokenizer,
        train_dataset=Dataset.from_list(rows),
        args=whet.SFTConfig(
            output_dir=str(folder), max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2,
            learning_rate=1e-2, report_to=[], disable_tqdm=True, save_strategy="no", seed=5, logging_steps=1,
        ),
        callbacks=[callback] if evaluate else [],
    )  # fmt: skip
    trainer.train()
    assert callback.times == (4 if evaluate else 0)
    kept = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    kept += [x for state in trainer.optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
    return kept, states(), [module.training for module in model.modules()], model


@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["fused", "dropout"])
def test_training_goes_on_bit_for_bit(tmp_path: Path, dropout: float) -> None:
    """Catches an evaluation that draws from training's random state, leaves evaluation mode or a cache on, adds to
    gradients, or has the layers leave the fused path."""
    plain, plain_states, plain_modes, plain_model = trained(tmp_path, dropout, evaluate=False)
    evaluated, evaluated_states, evaluated_modes, model = trained(tmp_path, dropout, evaluate=True)
    assert len(plain) > 100
    assert all(torch.equal(a, b) for a, b in zip(plain, evaluated, strict=True))
    assert evaluated_states == plain_states
    assert evaluated_modes == plain_modes
    assert True in plain_modes
    assert path_of(model) == path_of(plain_model)
    assert (path_of(model) == "fused") == (dropout == 0.0)
    assert model.config.use_cache == plain_model.config.use_cache


def test_what_layers_hold_for_training_is_put_back(tuned: InMemory) -> None:
    """Catches dequantized weights freed by an evaluation, from whose memory a recorded pass goes on reading."""
    tuned.model.train()
    tuned.model(input_ids=torch.tensor([[5, 6, 7]]))
    shared = shared_of(tuned.model)
    assert shared is not None
    readers = [m._whet_reader for m in tuned.model.modules() if isinstance(m, FusedLayer)]
    before = [reader.read() for reader in readers]
    shared.holding, shared.fp8 = True, True
    try:
        with undisturbed(tuned.model):
            assert (shared.holding, shared.fp8, tuned.model.training) == (False, False, False)
            tuned.model(input_ids=torch.tensor([[5, 6, 7]]))
            assert not any(reader._found is found for reader, found in zip(readers, before, strict=True))
        assert (shared.holding, shared.fp8, tuned.model.training) == (True, True, True)
        assert all(reader._found is found for reader, found in zip(readers, before, strict=True))
        assert all(reader.read() is found for reader, found in zip(readers, before, strict=True))
    finally:
        shared.holding = shared.fp8 = False


def test_a_module_that_was_in_evaluation_stays_so(tuned: InMemory) -> None:
    """Catches a frozen part that an evaluation puts into training mode."""
    tuned.model.train()
    frozen = next(module for module in tuned.model.modules() if isinstance(module, torch.nn.Embedding))
    frozen.eval()
    tuned.generate(ASKED[:1], Generation(1))
    assert tuned.model.training
    assert not frozen.training
